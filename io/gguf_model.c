// SPDX-License-Identifier: Apache-2.0
//
// A GGUF file as a checkpoint: its keys as a model config, its tensors as stored tensors. Like hf_models.c, a table
// says what kvq makes of every key; keys and defaults are those of the GGUF specification.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"

// What general.architecture implies without a key; biases and a tied head are seen by the tensors. Keys begin with its
// name.
typedef struct gguf_model {
    const char *name;
    bool        qk_norm;
} gguf_model;

static const gguf_model MODELS[] = {
    {"llama", false}, // mistral files call themselves llama, too
    {"qwen2", false},
    {"qwen3", true},
};
enum { N_MODELS = sizeof MODELS / sizeof *MODELS };

// A file and the model it holds: what every look-up needs.
typedef struct source {
    const gguf_file  *file;
    const gguf_model *model;
} source;

enum { MAX_KEY = 128 };

static void make_key(const source *s, const char *name, char key[MAX_KEY]) {
    (void)snprintf(key, MAX_KEY, "%s.%s", s->model->name, name);
}

typedef enum key_rule {
    KEY_READ,
    KEY_HARMLESS,
    KEY_OFF, // false or 0
    KEY_ON,  // true
} key_rule;

static const struct {
    const char *name; // behind the model's name and a dot
    key_rule    rule;
} KEYS[] = {
    {"block_count", KEY_READ},
    {"embedding_length", KEY_READ},
    {"feed_forward_length", KEY_READ},
    {"attention.head_count", KEY_READ},
    {"attention.head_count_kv", KEY_READ},
    {"attention.key_length", KEY_READ},
    {"attention.value_length", KEY_READ},
    {"attention.layer_norm_rms_epsilon", KEY_READ},
    {"context_length", KEY_READ},
    {"vocab_size", KEY_READ},
    {"rope.dimension_count", KEY_READ},
    {"rope.freq_base", KEY_READ},
    {"rope.scale_linear", KEY_READ},
    {"rope.scaling.type", KEY_READ},
    {"rope.scaling.factor", KEY_READ},
    {"rope.scaling.original_context_length", KEY_READ},
    {"rope.scaling.attn_factor", KEY_READ},
    {"rope.scaling.yarn_attn_factor", KEY_READ},
    {"rope.scaling.yarn_beta_fast", KEY_READ},
    {"rope.scaling.yarn_beta_slow", KEY_READ},
    {"rope.scaling.finetuned", KEY_HARMLESS},
    {"tensor_data_layout", KEY_HARMLESS},
    {"attention.causal", KEY_ON},
    {"expert_count", KEY_OFF},
    {"expert_used_count", KEY_OFF},
    {"attention.sliding_window", KEY_OFF},
    {"attention.scale", KEY_OFF},
    {"attention.clamp_kqv", KEY_OFF},
    {"attention.max_alibi_bias", KEY_OFF},
    {"attn_logit_softcapping", KEY_OFF},
    {"final_logit_softcapping", KEY_OFF},
    {"logit_scale", KEY_OFF},
    {"embedding_scale", KEY_OFF},
    {"residual_scale", KEY_OFF},
    {"use_parallel_residual", KEY_OFF},
    {"pooling_type", KEY_OFF},
    {"rope.scaling.yarn_log_multiplier", KEY_OFF},
    {"rope.scaling.yarn_ext_factor", KEY_OFF},
};

// ---------------------------------------------------------------- keys that must have a certain value

static bool key_obeys(const gguf_file *f, const char *key, key_rule rule) {
    bool   flag = false;
    double number = 0;
    if (rule == KEY_READ || rule == KEY_HARMLESS) return true;
    if (gguf_get_bool(f, key, &flag)) return flag == (rule == KEY_ON);
    return gguf_get_float(f, key, &number) && (number != 0) == (rule == KEY_ON);
}

static kvq_status refuse_key(const gguf_file *f, const char *key, kvq_error *err) {
    char   value[32] = "not a number";
    double number = 0;
    bool   flag = false;
    if (gguf_get_float(f, key, &number)) (void)snprintf(value, sizeof value, "%.6g", number);
    if (gguf_get_bool(f, key, &flag)) (void)snprintf(value, sizeof value, "%s", flag ? "true" : "false");
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: key '%s' is %s, and kvq does not implement what that means",
                    gguf_path(f), key, value);
}

static kvq_status check_keys(const kvq_context *ctx, const source *s, kvq_error *err) {
    const gguf_file *f = s->file;
    char             unknown[400] = "", key[MAX_KEY], prefix[MAX_KEY];
    make_key(s, "", prefix);
    size_t n = 0, n_prefix = strlen(prefix), n_keys = sizeof KEYS / sizeof *KEYS;
    for (int64_t k = 0; gguf_key(f, k).text != NULL; k++) {
        gguf_string name = gguf_key(f, k);
        if (name.n <= n_prefix || name.n >= sizeof key || memcmp(name.text, prefix, n_prefix) != 0) continue;
        (void)snprintf(key, sizeof key, "%.*s", (int)name.n, name.text);
        size_t i = 0;
        while (i < n_keys && strcmp(KEYS[i].name, key + n_prefix) != 0) i++;
        if (i == n_keys && n < sizeof unknown) {
            n += (size_t)snprintf(unknown + n, sizeof unknown - n, "%s%s", n > 0 ? ", " : "", key);
        } else if (i < n_keys && !key_obeys(f, key, KEYS[i].rule)) {
            return refuse_key(f, key, err);
        }
    }
    if (n > 0) kvq_log(ctx, KVQ_LOG_WARNING, "%s: keys that kvq does not know are ignored: %s", gguf_path(f), unknown);
    return KVQ_OK;
}

// ---------------------------------------------------------------- look-ups that name what is wrong

// Absent and optional: *out stays.
static kvq_status get_int(const source *s, const char *name, bool optional, int64_t high, int64_t *out,
                          kvq_error *err) {
    const gguf_file *f = s->file;
    char             key[MAX_KEY];
    int64_t          value = 0;
    make_key(s, name, key);
    if (!gguf_has(f, key)) {
        if (optional) return KVQ_OK;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: key '%s' is missing", gguf_path(f), key);
    }
    if (!gguf_get_int(f, key, &value)) { // a list has one value per layer: a model whose layers differ
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: key '%s' is not a single integer", gguf_path(f), key);
    }
    if (value < 1 || value > high) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: key '%s' is %lld, must be from 1 to %lld", gguf_path(f), key,
                        (long long)value, (long long)high);
    }
    *out = value;
    return KVQ_OK;
}

static kvq_status get_float(const source *s, const char *name, bool optional, double *out, kvq_error *err) {
    const gguf_file *f = s->file;
    char             key[MAX_KEY];
    double           value = 0;
    make_key(s, name, key);
    if (optional && !gguf_has(f, key)) return KVQ_OK;
    if (!gguf_get_float(f, key, &value) || !isfinite(value)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: key '%s' is missing or not a finite number", gguf_path(f), key);
    }
    *out = value;
    return KVQ_OK;
}

static bool text_is(gguf_string s, const char *text) { return s.n == strlen(text) && memcmp(s.text, text, s.n) == 0; }

// ---------------------------------------------------------------- config

static kvq_status read_head_sizes(const source *s, kvq_model_config *c, kvq_error *err) {
    kvq_status status;
    int64_t    heads = 1, kv_heads, key, value, rotated;
    KVQ_TRY(get_int(s, "attention.head_count", false, 8192, &heads, err));
    kv_heads = heads;
    KVQ_TRY(get_int(s, "attention.head_count_kv", true, 8192, &kv_heads, err));
    key = c->hidden_size / heads;
    KVQ_TRY(get_int(s, "attention.key_length", true, 8192, &key, err));
    value = rotated = key;
    KVQ_TRY(get_int(s, "attention.value_length", true, 8192, &value, err));
    KVQ_TRY(get_int(s, "rope.dimension_count", true, 8192, &rotated, err));
    if (key < 1 || key > 8192) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: embedding_length %lld / head_count %lld is no head width",
                          gguf_path(s->file), (long long)c->hidden_size, (long long)heads);
    } else if (value != key || rotated != key) {
        status =
            kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                     "%s: heads of width %lld with values of width %lld and %lld rotated channels; kvq needs one width",
                     gguf_path(s->file), (long long)key, (long long)value, (long long)rotated);
    }
    c->n_heads = (int)heads;
    c->n_kv_heads = (int)kv_heads;
    c->head_dim = c->rope.n_dims = (int)key;
done:
    return status;
}

static kvq_status read_sizes(const source *s, kvq_model_config *c, kvq_error *err) {
    kvq_status status;
    gguf_array tokens = {.count = 0};
    KVQ_TRY(get_int(s, "block_count", false, KVQ_MAX_LAYERS, &c->n_layers, err));
    KVQ_TRY(get_int(s, "embedding_length", false, 1 << 24, &c->hidden_size, err));
    KVQ_TRY(get_int(s, "feed_forward_length", false, 1 << 24, &c->intermediate_size, err));
    KVQ_TRY(get_int(s, "context_length", false, INT32_MAX, &c->max_positions, err));
    KVQ_TRY(read_head_sizes(s, c, err));
    if (gguf_get_array(s->file, "tokenizer.ggml.tokens", GGUF_STRING, &tokens) && tokens.count <= 1 << 26) {
        c->vocab_size = (int64_t)tokens.count;
    }
    KVQ_TRY(get_int(s, "vocab_size", c->vocab_size > 0, 1 << 26, &c->vocab_size, err));
done:
    return status;
}

// Yarn: a GGUF states a factor on top of the usual 0.1 ln(factor) + 1, Hugging Face states the product.
static kvq_status read_yarn(const source *s, double on_top, kvq_model_config *c, kvq_error *err) {
    kvq_status status;
    c->rope.beta_fast = 32;
    c->rope.beta_slow = 1;
    c->rope.original_max_positions = c->max_positions;
    KVQ_TRY(get_int(s, "rope.scaling.original_context_length", true, INT32_MAX, &c->rope.original_max_positions, err));
    KVQ_TRY(get_float(s, "rope.scaling.yarn_beta_fast", true, &c->rope.beta_fast, err));
    KVQ_TRY(get_float(s, "rope.scaling.yarn_beta_slow", true, &c->rope.beta_slow, err));
    if (c->rope.factor < 1 || !(on_top > 0) || !(c->rope.beta_slow > 0 && c->rope.beta_fast > c->rope.beta_slow)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL,
                          "%s: yarn with factor %g, attention factor %g, beta %g to %g makes no sense",
                          gguf_path(s->file), c->rope.factor, on_top, c->rope.beta_slow, c->rope.beta_fast);
    }
    if (on_top != 1) c->rope.attention_factor = on_top * (0.1 * log(c->rope.factor) + 1);
done:
    return status;
}

// A factor without a type means linear scaling, and 0 no scaling.
static kvq_status read_rope(const source *s, kvq_model_config *c, kvq_error *err) {
    kvq_status  status;
    char        key[MAX_KEY];
    gguf_string type = {"linear", 6};
    double      factor = 0, on_top = 1;
    c->rope.theta = 10000;
    KVQ_TRY(get_float(s, "rope.freq_base", true, &c->rope.theta, err));
    KVQ_TRY(get_float(s, "rope.scale_linear", true, &factor, err));
    KVQ_TRY(get_float(s, "rope.scaling.factor", true, &factor, err));
    KVQ_TRY(get_float(s, "rope.scaling.attn_factor", true, &on_top, err));
    KVQ_TRY(get_float(s, "rope.scaling.yarn_attn_factor", true, &on_top, err));
    make_key(s, "rope.scaling.type", key);
    (void)gguf_get_string(s->file, key, &type);
    c->rope.factor = factor == 0 ? 1 : factor;
    if (!(c->rope.factor > 0)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the rotary factor is %g", gguf_path(s->file), factor);
    } else if (text_is(type, "none") || (text_is(type, "linear") && c->rope.factor == 1)) {
        c->rope.type = KVQ_ROPE_DEFAULT;
        c->rope.factor = 1;
    } else if (text_is(type, "linear")) {
        c->rope.type = KVQ_ROPE_LINEAR;
    } else if (text_is(type, "yarn")) {
        c->rope.type = KVQ_ROPE_YARN;
        KVQ_TRY(read_yarn(s, on_top, c, err));
    } else {
        status =
            kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: rotary scaling type '%.*s'; kvq supports none, linear, yarn",
                     gguf_path(s->file), (int)(type.n < 80 ? type.n : 80), type.text);
    }
    if (c->rope.type != KVQ_ROPE_YARN && on_top != 1) {
        status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: a rotary attention factor (%g) without yarn",
                          gguf_path(s->file), on_top);
    }
done:
    return status;
}

static kvq_status read_token_id(const gguf_file *f, const char *key, int64_t *out, kvq_error *err) {
    *out = -1;
    if (!gguf_has(f, key) || (gguf_get_int(f, key, out) && *out >= -1)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: key '%s' is not a token id", gguf_path(f), key);
}

static kvq_status refuse_model(const gguf_file *f, gguf_string name, kvq_error *err) {
    char   known[128];
    size_t n = 0;
    for (int i = 0; i < N_MODELS && n < sizeof known; i++)
        n += (size_t)snprintf(known + n, sizeof known - n, "%s%s", i > 0 ? ", " : "", MODELS[i].name);
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "pass the Hugging Face directory of the model if kvq knows it there",
                    "%s: general.architecture '%.*s' is not supported; of GGUF files kvq knows: %s", gguf_path(f),
                    (int)(name.n < 80 ? name.n : 80), name.text, known);
}

static kvq_status find_model(const gguf_file *f, const gguf_model **out, kvq_error *err) {
    gguf_string name = {"", 0};
    int64_t     n_files = 1;
    int         i = 0;
    (void)gguf_get_string(f, "general.architecture", &name);
    while (i < N_MODELS && !text_is(name, MODELS[i].name)) i++;
    if (i == N_MODELS) return refuse_model(f, name, err);
    if (gguf_get_int(f, "split.count", &n_files) && n_files > 1) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "merge the parts into one file (llama-gguf-split --merge)",
                        "%s: is one of %lld parts of a split GGUF", gguf_path(f), (long long)n_files);
    }
    *out = &MODELS[i];
    return KVQ_OK;
}

// ---------------------------------------------------------------- tensors

static kvq_status list_stored(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err) {
    int64_t            n = 0;
    const gguf_tensor *t = gguf_tensors(c->gguf, &n);
    kvq_status         status = KVQ_NEW(ctx, n, "tensor list", &c->stored, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < n; i++) {
        stored_tensor *s = &c->stored[i];
        s->name = t[i].name;
        s->file = gguf_path(c->gguf);
        s->type = ggml_type_find(t[i].type);
        s->type_name = ggml_type_name(t[i].type);
        s->n_dims = t[i].n_dims;
        for (int k = 0; k < t[i].n_dims; k++) s->dims[k] = (int64_t)t[i].dims[t[i].n_dims - 1 - k];
        s->data = t[i].data;
        s->bytes = t[i].bytes;
    }
    c->n_stored = n;
    return checkpoint_sort_stored(c, err);
}

static const stored_tensor *find_tensor(const kvq_checkpoint *c, const char *name) {
    return checkpoint_find_stored(c, (gguf_string){name, strlen(name)});
}

// What the config of a GGUF does not say and its tensors do.
static kvq_status config_from_tensors(kvq_checkpoint *c, kvq_error *err) {
    const stored_tensor *divisors = find_tensor(c, "rope_freqs.weight");
    c->config.tied_head = find_tensor(c, "output.weight") == NULL;
    c->config.qkv_bias = find_tensor(c, "blk.0.attn_q.bias") != NULL;
    c->config.o_bias = find_tensor(c, "blk.0.attn_output.bias") != NULL;
    c->config.mlp_bias = find_tensor(c, "blk.0.ffn_gate.bias") != NULL;
    if (divisors == NULL) return KVQ_OK;
    if (divisors->type->number != GGML_F32 || divisors->n_dims != 1 || divisors->dims[0] != c->config.rope.n_dims / 2) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: tensor 'rope_freqs.weight' is not %d values of type F32",
                        divisors->file, c->config.rope.n_dims / 2);
    }
    c->config.rope.frequency_divisors = (const float *)(const void *)divisors->data; // GGUF aligns to 8 bytes or more
    for (int64_t i = 0; i < divisors->dims[0]; i++) {
        double x = (double)c->config.rope.frequency_divisors[i];
        if (x > 0 && isfinite(x)) continue;
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s: element %lld of tensor 'rope_freqs.weight' is %g",
                        divisors->file, (long long)i, x);
    }
    return KVQ_OK;
}

kvq_status checkpoint_open_gguf(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err) {
    kvq_status        status;
    kvq_model_config *config = &c->config;
    source            s = {0};
    double            eps = 0;
    KVQ_TRY(gguf_open(ctx, c->path, &c->gguf, err));
    s.file = c->gguf;
    KVQ_TRY(find_model(s.file, &s.model, err));
    KVQ_TRY(check_keys(ctx, &s, err));
    (void)snprintf(config->architecture, sizeof config->architecture, "%s", s.model->name);
    KVQ_TRY(read_sizes(&s, config, err));
    KVQ_TRY(read_rope(&s, config, err));
    KVQ_TRY(get_float(&s, "attention.layer_norm_rms_epsilon", false, &eps, err));
    config->rms_norm_eps = (float)eps;
    config->qk_norm = s.model->qk_norm;
    config->embedding_scale = 1;
    config->attention_scale = (float)(1 / sqrt(config->head_dim));
    KVQ_TRY(read_token_id(s.file, "tokenizer.ggml.bos_token_id", &config->bos_id, err));
    KVQ_TRY(read_token_id(s.file, "tokenizer.ggml.eos_token_id", &config->eos_id, err));
    KVQ_TRY(checkpoint_check_config(config, c->path, err));
    KVQ_TRY(list_stored(ctx, c, err));
    KVQ_TRY(config_from_tensors(c, err));
done:
    return status;
}
