// SPDX-License-Identifier: Apache-2.0
//
// Binds the tensors that a config implies to what a container stores: names, shapes, nothing missing, nothing left.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"

// ---------------------------------------------------------------- what the config implies

static int64_t extent_of(const kvq_model_config *c, tensor_extent extent) {
    int64_t query = (int64_t)c->n_heads * c->head_dim, key = (int64_t)c->n_kv_heads * c->head_dim;
    switch (extent) {
    case EXTENT_ZERO:
        return 0;
    case EXTENT_VOCAB:
        return c->vocab_size;
    case EXTENT_HIDDEN:
        return c->hidden_size;
    case EXTENT_FFN:
        return c->intermediate_size;
    case EXTENT_GATE_UP:
        return 2 * c->intermediate_size;
    case EXTENT_HEAD:
        return c->head_dim;
    case EXTENT_QUERY:
        return query;
    case EXTENT_KEY:
        return key;
    case EXTENT_QUERY_KEY:
        return query + key;
    case EXTENT_QKV:
        return query + 2 * key;
    case EXTENT_EXPERTS:
        return c->n_experts;
    case EXTENT_ONE:
        break;
    }
    return 1;
}

static bool is_needed(const kvq_model_config *c, tensor_when when) {
    switch (when) {
    case WHEN_UNTIED:
        return !c->tied_head;
    case WHEN_QKV_BIAS:
        return c->qkv_bias;
    case WHEN_O_BIAS:
        return c->o_bias;
    case WHEN_MLP_BIAS:
        return c->mlp_bias;
    case WHEN_ALWAYS:
        break;
    }
    return true;
}

// Why a tensor is expected, in the words of config.json.
static const char *const REASONS[] = {
    [WHEN_ALWAYS] = "every model of this architecture has it",
    [WHEN_UNTIED] = "tie_word_embeddings is not true",
    [WHEN_QKV_BIAS] = "attention_bias is true",
    [WHEN_O_BIAS] = "attention_bias is true",
    [WHEN_MLP_BIAS] = "mlp_bias is true",
};

static int64_t n_layers_of(const kvq_model_config *c, const tensor_role *role) {
    return role->scope == PER_MODEL ? 1 : c->n_layers;
}

static int64_t n_experts_of(const kvq_model_config *c, const tensor_role *role) {
    return role->scope == PER_EXPERT ? c->n_experts : 1;
}

// ---------------------------------------------------------------- one tensor

typedef struct tensor_place {
    int64_t layer, expert;
} tensor_place;

enum { MAX_STORED_NAME = 160 };

// `prefix`, the layer ("blk." or "model.layers." with its number) unless the tensor is the whole model's, then `name`
// with the number of the expert in place of '#'.
static void compose_name(char *out, size_t size, const char *prefix, const char *layers, const char *name,
                         const tensor_role *role, tensor_place place) {
    const char *hash = strchr(name, '#');
    size_t      n = (size_t)snprintf(out, size, "%s", prefix);
    if (role->scope != PER_MODEL) n += (size_t)snprintf(out + n, size - n, "%s%lld.", layers, (long long)place.layer);
    if (hash == NULL) {
        (void)snprintf(out + n, size - n, "%s", name);
    } else {
        (void)snprintf(out + n, size - n, "%.*s%lld%s", (int)(hash - name), name, (long long)place.expert, hash + 1);
    }
}

// "[3, 4]"
static void format_shape(char *out, size_t size, const int64_t *dims, int n_dims) {
    size_t n = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < n_dims && n < size; i++) {
        n += (size_t)snprintf(out + n, size - n, "%s%lld", i > 0 ? ", " : "", (long long)dims[i]);
    }
    if (n < size) (void)snprintf(out + n, size - n, "]");
}

static kvq_status check_stored(const kvq_checkpoint *c, const bound_tensor *b, int64_t stored_rows, kvq_error *err) {
    const stored_tensor *s = b->stored;
    const int64_t        matrix[2] = {stored_rows, b->columns};
    int                  n_dims = b->is_vector ? 1 : 2;
    const int64_t       *wanted = b->is_vector ? matrix + 1 : matrix;
    if (s->n_dims != n_dims || memcmp(s->dims, wanted, (size_t)n_dims * sizeof *wanted) != 0) {
        char has[192], needs[64];
        format_shape(has, sizeof has, s->dims, s->n_dims);
        format_shape(needs, sizeof needs, wanted, n_dims);
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: tensor '%.*s' has shape %s, the config of %s needs %s", s->file,
                        (int)s->name.n, s->name.text, has, c->path, needs);
    }
    if (s->type == NULL) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use a checkpoint stored as F32, F16 or BF16",
                        "%s: tensor '%.*s' has type %s, which is no weight type of kvq", s->file, (int)s->name.n,
                        s->name.text, s->type_name);
    }
    if (b->is_vector && b->is_paired && s->type->values != 1) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: bias '%.*s' is stored in blocks (%s)", s->file,
                        (int)s->name.n, s->name.text, s->type_name);
    }
    return KVQ_OK;
}

// Rows [first, first + b->rows) of a stored tensor of stored_rows rows.
static kvq_status take_rows(const kvq_checkpoint *c, bound_tensor *b, stored_tensor *stored, int64_t first,
                            int64_t stored_rows, kvq_error *err) {
    b->stored = stored;
    kvq_status status = check_stored(c, b, stored_rows, err);
    if (status != KVQ_OK) return status;
    size_t row_bytes = (size_t)(b->columns / stored->type->values) * (size_t)stored->type->bytes;
    stored->used = true;
    b->data = stored->data + (size_t)first * row_bytes;
    b->bytes = (size_t)b->rows * row_bytes;
    return KVQ_OK;
}

static kvq_status bind(kvq_checkpoint *c, const architecture *a, const tensor_role *role, tensor_place place,
                       kvq_error *err) {
    bound_tensor *b = &c->bound[c->n_bound++];
    bool          gguf = c->gguf != NULL;
    char          name[MAX_STORED_NAME];
    compose_name(b->name, sizeof b->name, "", "model.layers.", role->name, role, place);
    if (gguf) {
        compose_name(name, sizeof name, "", "blk.", role->gguf, role, place);
    } else {
        compose_name(name, sizeof name, a->prefix != NULL ? a->prefix : "", "model.layers.",
                     role->stored != NULL ? role->stored : role->name, role, place);
    }
    stored_tensor *stored = checkpoint_find_stored(c, (gguf_string){name, strlen(name)});
    if (stored == NULL) {
        return kvq_fail(err, KVQ_ERR_INPUT, "check that all files of the checkpoint are there and belong together",
                        "%s: tensor '%s' is missing (%s)", c->path, name, REASONS[gguf ? WHEN_ALWAYS : role->when]);
    }
    b->rows = extent_of(&c->config, role->rows);
    b->columns = extent_of(&c->config, role->columns);
    b->is_vector = role->rows == EXTENT_ONE;
    b->is_paired = role->is_rotated && gguf && a->gguf_pairs;
    return take_rows(c, b, stored, extent_of(&c->config, role->first),
                     role->fused != EXTENT_ZERO ? extent_of(&c->config, role->fused) : b->rows, err);
}

// The rotary divisors of a GGUF have no Hugging Face name; they are bound under their own, so that they count as used
// and enter the identity.
static kvq_status bind_rotary_divisors(kvq_checkpoint *c, kvq_error *err) {
    static const char NAME[] = "rope_freqs.weight";
    if (c->config.rope.frequency_divisors == NULL) return KVQ_OK;
    bound_tensor *b = &c->bound[c->n_bound++];
    b->rows = 1;
    b->columns = c->config.rope.n_dims / 2;
    b->is_vector = true;
    (void)snprintf(b->name, sizeof b->name, "%s", NAME);
    return take_rows(c, b, checkpoint_find_stored(c, (gguf_string){NAME, sizeof NAME - 1}), 0, 1, err);
}

// ---------------------------------------------------------------- what is left over

static bool begins_with(gguf_string s, const char *head) {
    size_t n = strlen(head);
    return s.n >= n && memcmp(s.text, head, n) == 0;
}

static bool ends_with(gguf_string s, const char *tail) {
    size_t n = strlen(tail);
    return s.n >= n && memcmp(s.text + s.n - n, tail, n) == 0;
}

// Two kinds of tensors are known to be harmless: the rotary table that old checkpoints store, and the output matrix of
// a tied model, where the embedding wins as it does in transformers. Others belong to other models of the checkpoint.
static bool may_be_left(const architecture *a, gguf_string name) {
    const char *prefix = a->prefix != NULL ? a->prefix : "";
    if (ends_with(name, ".rotary_emb.inv_freq")) return true;
    if (name.n == strlen(prefix) + strlen("lm_head.weight") && begins_with(name, prefix) &&
        ends_with(name, "lm_head.weight"))
        return true;
    for (const char *const *head = a->ignored; head != NULL && *head != NULL; head++) {
        if (begins_with(name, *head)) return true;
    }
    return false;
}

// A tensor that nothing refers to means that the model is not the one described: running it without would be silently
// wrong.
static kvq_status refuse_unused(const kvq_checkpoint *c, const architecture *a, kvq_error *err) {
    for (int64_t i = 0; i < c->n_stored; i++) {
        const stored_tensor *s = &c->stored[i];
        if (s->used || may_be_left(a, s->name)) continue;
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                        ends_with(s->name, ".bias")
                            ? "biases must be declared by attention_bias or mlp_bias in config.json"
                            : "check that the config describes this model",
                        "%s: tensor '%.*s' does not belong to the %s model that the config describes", s->file,
                        (int)s->name.n, s->name.text, c->config.architecture);
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- the whole

static kvq_status bind_everywhere(kvq_checkpoint *c, const architecture *a, const tensor_role *role, kvq_error *err) {
    if (!is_needed(&c->config, role->when)) return KVQ_OK;
    for (int64_t layer = 0; layer < n_layers_of(&c->config, role); layer++) {
        for (int64_t expert = 0; expert < n_experts_of(&c->config, role); expert++) {
            kvq_status status = bind(c, a, role, (tensor_place){layer, expert}, err);
            if (status != KVQ_OK) return status;
        }
    }
    return KVQ_OK;
}

static int by_bound_name(const void *a, const void *b) {
    return strcmp(((const bound_tensor *)a)->name, ((const bound_tensor *)b)->name);
}

kvq_status checkpoint_bind(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err) {
    kvq_status          status;
    int64_t             n = 1; // the rotary divisors
    const architecture *a = architecture_find(c->config.architecture);
    if (a == NULL)
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "no tensors are known of a %s model", c->config.architecture);
    for (const tensor_group *g = a->groups; g < a->groups + MAX_TENSOR_GROUPS; g++) {
        for (int i = 0; i < g->n_roles; i++)
            n += n_layers_of(&c->config, &g->roles[i]) * n_experts_of(&c->config, &g->roles[i]);
    }
    // A config may claim millions of experts. At most three tensors lie in a stored one, so the first that is missing
    // is met within this many.
    if (n > 3 * c->n_stored + 2) n = 3 * c->n_stored + 2;
    KVQ_TRY(KVQ_NEW(ctx, n, "tensor list", &c->bound, err));
    for (const tensor_group *g = a->groups; g < a->groups + MAX_TENSOR_GROUPS; g++) {
        for (int i = 0; i < g->n_roles; i++) KVQ_TRY(bind_everywhere(c, a, &g->roles[i], err));
    }
    KVQ_TRY(bind_rotary_divisors(c, err));
    KVQ_TRY(refuse_unused(c, a, err));
    qsort(c->bound, (size_t)c->n_bound, sizeof *c->bound, by_bound_name);
done:
    return status;
}
