// SPDX-License-Identifier: Apache-2.0
//
// Weights from the checkpoint to the backend, one layer, or one expert, at a time. Each is described by a list of slots
// (tensor name, shape, where its pointer goes); the list sizes the allocation, and its blocks of rows are expanded in
// parallel.
#include <stdio.h>
#include <string.h>

#include "model_impl.h"

#define MAX_SLOTS      24
#define STAGING_FLOATS 65536
#define EMBEDDED       64 // rows of the embedding that are handed to the backend together

typedef enum slot_kind {
    SLOT_PLAIN,  // f32 as stored: biases, routers
    SLOT_NORM,   // f32, plus 1 where the architecture stores norms that way
    SLOT_MATRIX, // of a linear layer, in the backend's own form
} slot_kind;

typedef struct slot {
    char      name[256];
    int64_t   n_rows, n_columns; // a vector is one row
    slot_kind kind;
    float   **pointer;
} slot;

typedef struct slot_list {
    slot slots[MAX_SLOTS];
    int  n;
} slot_list;

static void add_slot(slot_list *list, const char *prefix, const char *name, int64_t n_rows, int64_t n_columns,
                     slot_kind kind, float **pointer) {
    slot *s = &list->slots[list->n++];
    (void)snprintf(s->name, sizeof s->name, "%s%s", prefix, name);
    s->n_rows = n_rows;
    s->n_columns = n_columns;
    s->kind = kind;
    s->pointer = pointer;
}

static int64_t slot_floats(const kvq_model *model, const slot *s) {
    if (s->kind == SLOT_MATRIX) return model->be->weights_floats(model->be, s->n_rows, s->n_columns);
    return s->n_rows * s->n_columns;
}

static void add_linear(slot_list *list, const char *prefix, const char *name, int64_t n_out, int64_t n_in, bool bias,
                       linear_weights *linear) {
    char full[128];
    linear->n_out = n_out;
    linear->n_in = n_in;
    (void)snprintf(full, sizeof full, "%s.weight", name);
    add_slot(list, prefix, full, n_out, n_in, SLOT_MATRIX, &linear->w);
    if (!bias) return;
    (void)snprintf(full, sizeof full, "%s.bias", name);
    add_slot(list, prefix, full, 1, n_out, SLOT_PLAIN, &linear->bias);
}

static void add_norm(slot_list *list, const char *prefix, const char *name, int64_t n, float **pointer) {
    add_slot(list, prefix, name, 1, n, SLOT_NORM, pointer);
}

static int64_t list_floats(const kvq_model *model, const slot_list *list) {
    int64_t sum = 0;
    for (int i = 0; i < list->n; i++) sum += slot_floats(model, &list->slots[i]);
    return sum;
}

// ---------------------------------------------------------------- expanding a list of slots

typedef struct row_block {
    const slot *slot;
    int64_t     row, n_rows;
    kvq_status  status;
} row_block;

typedef struct expand_job {
    const kvq_model *model;
    row_block       *blocks;
    float           *staging; // [n_threads, staging_floats]
    int64_t          staging_floats;
} expand_job;

static kvq_status expand(const kvq_model *model, const row_block *b, float *staging, kvq_error *err) {
    const slot *s = b->slot;
    kvq_status  status =
        kvq_checkpoint_read(model->checkpoint, s->name, s->n_rows, s->n_columns, b->row, b->n_rows, staging, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; s->kind == SLOT_NORM && model->config->norm_offset && i < b->n_rows * s->n_columns; i++)
        staging[i] += 1.0f;
    if (s->kind == SLOT_MATRIX) {
        model->be->upload_weights(model->be, *s->pointer, s->n_columns, b->row, b->n_rows, staging);
    } else {
        model->be->upload(model->be, *s->pointer + b->row * s->n_columns, staging, b->n_rows * s->n_columns);
    }
    return KVQ_OK;
}

static void expand_block(void *user, int64_t item, int worker) {
    expand_job *job = user;
    row_block  *b = &job->blocks[item];
    b->status = expand(job->model, b, job->staging + worker * job->staging_floats, NULL);
}

static int64_t rows_per_block(const slot *s) {
    int64_t rows = STAGING_FLOATS / s->n_columns;
    return rows > 0 ? rows : 1;
}

static int64_t n_blocks_of(const slot *s) { return (s->n_rows + rows_per_block(s) - 1) / rows_per_block(s); }

// One slot, its blocks in parallel; then its pages of the mapped file are given back, so that the file never takes more
// memory than its largest tensor.
static kvq_status fill_slot(const kvq_model *model, const kvq_context *ctx, const slot *s, expand_job *job,
                            kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < n_blocks_of(s); i++) {
        int64_t row = i * rows_per_block(s), rest = s->n_rows - row;
        job->blocks[i] = (row_block){s, row, rest < rows_per_block(s) ? rest : rows_per_block(s), KVQ_OK};
    }
    kvq_parallel_for(ctx, n_blocks_of(s), expand_block, job);
    // The first failing block is read again, alone, for its message.
    for (int64_t i = 0; i < n_blocks_of(s) && status == KVQ_OK; i++) {
        if (job->blocks[i].status != KVQ_OK) status = expand(model, &job->blocks[i], job->staging, err);
    }
    kvq_checkpoint_forget(model->checkpoint, s->name);
    return status;
}

// Expands into storage of list_floats, on the threads of ctx, and sets the pointers of the slots.
static kvq_status fill_slots(const kvq_model *model, const kvq_context *ctx, const slot_list *list, float *storage,
                             kvq_error *err) {
    int64_t    most_blocks = 0;
    expand_job job = {.model = model, .staging_floats = STAGING_FLOATS};
    kvq_status status = KVQ_OK;
    for (int i = 0; i < list->n; i++) {
        const slot *s = &list->slots[i];
        if (n_blocks_of(s) > most_blocks) most_blocks = n_blocks_of(s);
        if (s->n_columns > job.staging_floats) job.staging_floats = s->n_columns;
    }
    KVQ_TRY(KVQ_NEW(ctx, most_blocks, "weight blocks", &job.blocks, err));
    KVQ_TRY(KVQ_NEW(ctx, ctx->n_threads * job.staging_floats, "weight staging", &job.staging, err));
    for (int i = 0; i < list->n; i++) {
        *list->slots[i].pointer = storage;
        storage += slot_floats(model, &list->slots[i]);
        KVQ_TRY(fill_slot(model, ctx, &list->slots[i], &job, err));
    }
    status = model->be->check(model->be, err);

done:
    kvq_free(ctx, job.blocks);
    kvq_free(ctx, job.staging);
    return status;
}

static kvq_status load_slots(const kvq_model *model, const kvq_context *ctx, const slot_list *list, const char *what,
                             float **storage, kvq_error *err) {
    kvq_status status = model->be->alloc(model->be, list_floats(model, list), what, storage, err);
    return status == KVQ_OK ? fill_slots(model, ctx, list, *storage, err) : status;
}

// ---------------------------------------------------------------- experts

static void describe_expert(const kvq_model_config *c, expert_weights *expert, slot_list *list) {
    char prefix[96];
    (void)snprintf(prefix, sizeof prefix, "model.layers.%lld.mlp.experts.%lld.", (long long)expert->layer,
                   (long long)expert->index);
    add_linear(list, prefix, "gate_proj", c->intermediate_size, c->hidden_size, false, &expert->mlp.gate);
    add_linear(list, prefix, "up_proj", c->intermediate_size, c->hidden_size, false, &expert->mlp.up);
    add_linear(list, prefix, "down_proj", c->hidden_size, c->intermediate_size, false, &expert->mlp.down);
}

static int64_t expert_floats(const kvq_model *model) {
    expert_weights unused = {.storage = NULL};
    slot_list      list = {.n = 0};
    describe_expert(model->config, &unused, &list);
    return list_floats(model, &list);
}

// All experts of a resident layer.
static kvq_status load_experts(const kvq_model *model, const kvq_context *ctx, kvq_layer *layer, kvq_error *err) {
    kvq_status status = KVQ_NEW(ctx, model->config->n_experts, "experts", &layer->experts, err);
    for (int64_t e = 0; e < model->config->n_experts && status == KVQ_OK; e++) {
        expert_weights *expert = &layer->experts[e];
        slot_list       list = {.n = 0};
        expert->layer = layer->index;
        expert->index = e;
        describe_expert(model->config, expert, &list);
        status = load_slots(model, ctx, &list, "weights of one expert", &expert->storage, err);
    }
    return status;
}

kvq_status kvq_expert_load(kvq_model *model, const kvq_layer *layer, int64_t index, const mlp_weights **out,
                           kvq_error *err) {
    expert_weights *expert = &model->expert;
    slot_list       list = {.n = 0};
    kvq_status      status = KVQ_OK;
    if (layer->experts != NULL) {
        *out = &layer->experts[index].mlp;
        return KVQ_OK;
    }
    if (expert->storage == NULL)
        KVQ_TRY(model->be->alloc(model->be, expert_floats(model), "weights of one expert", &expert->storage, err));
    expert->layer = layer->index;
    expert->index = index;
    describe_expert(model->config, expert, &list);
    KVQ_TRY(fill_slots(model, model->ctx, &list, expert->storage, err));
    *out = &expert->mlp;

done:
    return status;
}

// ---------------------------------------------------------------- layers

static void describe_mlp(const kvq_model_config *c, const char *prefix, kvq_layer *layer, slot_list *list) {
    int64_t C = c->hidden_size, F = c->intermediate_size;
    if (c->n_experts > 0) {
        add_slot(list, prefix, "mlp.gate.weight", c->n_experts, C, SLOT_PLAIN, &layer->router);
        return;
    }
    add_linear(list, prefix, "mlp.gate_proj", F, C, c->mlp_bias, &layer->mlp.gate);
    add_linear(list, prefix, "mlp.up_proj", F, C, c->mlp_bias, &layer->mlp.up);
    add_linear(list, prefix, "mlp.down_proj", C, F, c->mlp_bias, &layer->mlp.down);
}

static void describe_norms(const kvq_model_config *c, const char *prefix, kvq_layer *layer, slot_list *list) {
    int64_t C = c->hidden_size;
    add_norm(list, prefix, "input_layernorm.weight", C, &layer->input_norm);
    add_norm(list, prefix, "post_attention_layernorm.weight", C,
             c->post_norms ? &layer->attention_post_norm : &layer->mlp_norm);
    if (c->post_norms) {
        add_norm(list, prefix, "pre_feedforward_layernorm.weight", C, &layer->mlp_norm);
        add_norm(list, prefix, "post_feedforward_layernorm.weight", C, &layer->mlp_post_norm);
    }
    if (c->qk_norm) {
        add_norm(list, prefix, "self_attn.q_norm.weight", c->head_dim, &layer->q_norm);
        add_norm(list, prefix, "self_attn.k_norm.weight", c->head_dim, &layer->k_norm);
    }
}

static void describe_layer(const kvq_model_config *c, kvq_layer *layer, slot_list *list) {
    char    prefix[64];
    int64_t d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim, C = c->hidden_size;
    (void)snprintf(prefix, sizeof prefix, "model.layers.%lld.", (long long)layer->index);
    describe_norms(c, prefix, layer, list);
    add_linear(list, prefix, "self_attn.q_proj", q, C, c->qkv_bias, &layer->q);
    add_linear(list, prefix, "self_attn.k_proj", d, C, c->qkv_bias, &layer->k);
    add_linear(list, prefix, "self_attn.v_proj", d, C, c->qkv_bias, &layer->v);
    add_linear(list, prefix, "self_attn.o_proj", C, q, c->o_bias, &layer->o);
    describe_mlp(c, prefix, layer, list);
}

static int64_t layer_floats(const kvq_model *model, int64_t n_experts) {
    kvq_layer unused = {.index = 0};
    slot_list list = {.n = 0};
    describe_layer(model->config, &unused, &list);
    return list_floats(model, &list) + (n_experts > 0 ? n_experts * expert_floats(model) : 0);
}

int64_t kvq_layer_floats(const kvq_model *model) {
    int64_t E = model->config->n_experts;
    return layer_floats(model, model->resident || E == 0 ? E : 1);
}

int64_t kvq_layer_products(const kvq_model_config *c) {
    int64_t q = (int64_t)c->n_heads * c->head_dim, d = (int64_t)c->n_kv_heads * c->head_dim;
    int64_t n_mlps = c->n_experts > 0 ? c->experts_per_token : 1;
    return c->hidden_size * (2 * q + 2 * d + 3 * n_mlps * c->intermediate_size + c->n_experts);
}

double kvq_attention_flops(const kvq_model_config *c, int64_t seq_len) {
    return 2.0 * (double)c->n_heads * c->head_dim * (double)seq_len;
}

double kvq_layer_flops(const kvq_model_config *c, int64_t seq_len) {
    return 2.0 * (double)kvq_layer_products(c) + kvq_attention_flops(c, seq_len);
}

void kvq_layer_destroy(const kvq_model *model, kvq_layer *layer) {
    if (layer == NULL) return;
    for (int64_t e = 0; layer->experts != NULL && e < model->config->n_experts; e++)
        model->be->release(model->be, layer->experts[e].storage);
    kvq_free(model->ctx, layer->experts);
    model->be->release(model->be, layer->storage);
    kvq_free(model->ctx, layer);
}

kvq_status kvq_layer_expand(const kvq_model *model, const kvq_context *ctx, int64_t index, kvq_layer **out,
                            kvq_error *err) {
    kvq_layer *layer = NULL;
    slot_list  list = {.n = 0};
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "layer", &layer, err));
    layer->index = index;
    describe_layer(model->config, layer, &list);
    KVQ_TRY(load_slots(model, ctx, &list, "weights of one layer", &layer->storage, err));
    if (model->resident && layer->router != NULL) KVQ_TRY(load_experts(model, ctx, layer, err));
    *out = layer;
    layer = NULL;

done:
    kvq_layer_destroy(model, layer);
    return status;
}

// ---------------------------------------------------------------- head

static void destroy_head(const kvq_model *model, kvq_head *head) {
    if (head == NULL) return;
    model->be->release(model->be, head->storage);
    kvq_free(model->ctx, head);
}

static void describe_head(const kvq_model_config *c, kvq_head *head, slot_list *list) {
    add_norm(list, "", "model.norm.weight", c->hidden_size, &head->norm);
    add_linear(list, "", c->tied_head ? "model.embed_tokens" : "lm_head", c->vocab_size, c->hidden_size, false,
               &head->output);
}

int64_t kvq_head_floats(const kvq_model *model) {
    kvq_head  unused = {.storage = NULL};
    slot_list list = {.n = 0};
    describe_head(model->config, &unused, &list);
    return list_floats(model, &list);
}

int64_t kvq_model_floats(const kvq_model *model) {
    const kvq_model_config *c = model->config;
    return c->n_layers * layer_floats(model, c->n_experts) + kvq_head_floats(model);
}

kvq_status kvq_head_load(kvq_model *model, kvq_head **out, kvq_error *err) {
    kvq_head  *head = NULL;
    slot_list  list = {.n = 0};
    kvq_status status = KVQ_OK;
    if (model->head != NULL) {
        *out = model->head;
        return KVQ_OK;
    }
    KVQ_TRY(KVQ_NEW(model->ctx, 1, "output head", &head, err));
    describe_head(model->config, head, &list);
    KVQ_TRY(load_slots(model, model->ctx, &list, "output matrix", &head->storage, err));
    if (model->resident) model->head = head;
    *out = head;
    head = NULL;

done:
    destroy_head(model, head);
    return status;
}

void kvq_head_release(kvq_model *model, kvq_head **head) {
    if (*head != NULL && !model->resident) destroy_head(model, *head);
    *head = NULL;
}

// ---------------------------------------------------------------- the model

// What the reader lets through because it is well-formed, but no known model has.
static kvq_status check_config(const kvq_model_config *c, kvq_error *err) {
    if (c->n_experts == 0 || !c->post_norms) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "model: a %s with experts and with norms behind them",
                    c->architecture);
}

kvq_status kvq_model_create(const kvq_context *ctx, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                            bool resident, kvq_model **out, kvq_error *err) {
    kvq_model *model = NULL;
    kvq_status status = KVQ_NEW(ctx, 1, "model", &model, err);
    if (status != KVQ_OK) return status;
    model->ctx = ctx;
    model->be = be;
    model->checkpoint = checkpoint;
    model->config = kvq_checkpoint_config(checkpoint);
    model->resident = resident;
    KVQ_TRY(check_config(model->config, err));
    KVQ_TRY(KVQ_NEW(ctx, model->config->n_layers, "layer table", &model->layers, err));
    KVQ_TRY(kvq_rope_prepare(model, err));
    *out = model;
    model = NULL;

done:
    kvq_model_destroy(ctx, &model);
    return status;
}

void kvq_model_destroy(const kvq_context *ctx, kvq_model **model) {
    if (*model == NULL) return;
    kvq_prefetch_drop(*model);
    for (int64_t i = 0; (*model)->layers != NULL && i < (*model)->config->n_layers; i++)
        kvq_layer_destroy(*model, (*model)->layers[i]);
    destroy_head(*model, (*model)->head);
    (*model)->be->release((*model)->be, (*model)->expert.storage);
    kvq_free(ctx, (*model)->layers);
    for (int i = 0; i < 2; i++) kvq_free(ctx, (*model)->rope[i].frequency);
    kvq_free(ctx, *model);
    *model = NULL;
}

const kvq_model_config *kvq_model_describe(const kvq_model *model) { return model->config; }

const kvq_backend *kvq_model_backend(const kvq_model *model) { return model->be; }

int64_t kvq_model_mapped_bytes(const kvq_model *model) { return kvq_checkpoint_largest_tensor(model->checkpoint); }

static kvq_status read_embedding(const kvq_model *model, int64_t position, int32_t id, float *row, kvq_error *err) {
    const kvq_model_config *c = model->config;
    if (id < 0 || id >= c->vocab_size) {
        return kvq_fail(err, KVQ_ERR_INPUT, "use token ids made by this model's tokenizer",
                        "position %lld: token id %d is outside the vocabulary of %lld", (long long)position, (int)id,
                        (long long)c->vocab_size);
    }
    kvq_status status = kvq_checkpoint_read(model->checkpoint, "model.embed_tokens.weight", c->vocab_size,
                                            c->hidden_size, id, 1, row, err);
    for (int64_t i = 0; i < c->hidden_size; i++) row[i] *= c->embedding_scale;
    return status;
}

kvq_status kvq_model_embed(kvq_model *model, const int32_t *ids, int64_t n_tokens, float *x, kvq_error *err) {
    int64_t    C = model->config->hidden_size, most = n_tokens < EMBEDDED ? n_tokens : EMBEDDED;
    float     *rows = NULL;
    kvq_status status = KVQ_NEW(model->ctx, most * C, "embedding rows", &rows, err);
    for (int64_t first = 0, n; first < n_tokens && status == KVQ_OK; first += n) {
        n = n_tokens - first < most ? n_tokens - first : most;
        for (int64_t t = 0; t < n && status == KVQ_OK; t++)
            status = read_embedding(model, first + t, ids[first + t], rows + t * C, err);
        if (status == KVQ_OK) model->be->upload(model->be, x + first * C, rows, n * C);
    }
    if (!model->resident) kvq_checkpoint_forget(model->checkpoint, "model.embed_tokens.weight");
    kvq_free(model->ctx, rows);
    return status;
}
