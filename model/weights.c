// SPDX-License-Identifier: Apache-2.0
//
// Weights from the checkpoint to the backend, one layer at a time. A layer is described by a list of slots (tensor
// name, shape, where its pointer goes); the list sizes the allocation, and its blocks of rows are expanded in parallel.
#include <stdio.h>
#include <string.h>

#include "model_impl.h"

#define MAX_SLOTS      16
#define STAGING_FLOATS 65536

typedef struct slot {
    char    name[128];
    int64_t n_rows, n_columns; // a vector is one row
    bool    is_matrix;         // of a linear layer, stored in the backend's own form
    float **pointer;
} slot;

typedef struct slot_list {
    slot slots[MAX_SLOTS];
    int  n;
} slot_list;

static void add_slot(slot_list *list, const char *prefix, const char *name, int64_t n_rows, int64_t n_columns,
                     bool is_matrix, float **pointer) {
    slot *s = &list->slots[list->n++];
    (void)snprintf(s->name, sizeof s->name, "%s%s", prefix, name);
    s->n_rows = n_rows;
    s->n_columns = n_columns;
    s->is_matrix = is_matrix;
    s->pointer = pointer;
}

static int64_t slot_floats(const kvq_model *model, const slot *s) {
    return s->is_matrix ? model->be->weights_floats(model->be, s->n_rows, s->n_columns) : s->n_rows * s->n_columns;
}

static void add_linear(slot_list *list, const char *prefix, const char *name, int64_t n_out, int64_t n_in, bool bias,
                       linear_weights *linear) {
    char full[128];
    linear->n_out = n_out;
    linear->n_in = n_in;
    (void)snprintf(full, sizeof full, "%s.weight", name);
    add_slot(list, prefix, full, n_out, n_in, true, &linear->w);
    if (!bias) return;
    (void)snprintf(full, sizeof full, "%s.bias", name);
    add_slot(list, prefix, full, 1, n_out, false, &linear->bias);
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
    if (s->is_matrix) {
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

static kvq_status load_slots(const kvq_model *model, const slot_list *list, const char *what, float **storage,
                             kvq_error *err) {
    const kvq_context *ctx = model->ctx;
    int64_t            n_floats = 0, n_blocks = 0;
    expand_job         job = {.model = model, .staging_floats = STAGING_FLOATS};
    kvq_status         status = KVQ_OK;
    for (int i = 0; i < list->n; i++) {
        const slot *s = &list->slots[i];
        n_floats += slot_floats(model, s);
        n_blocks += (s->n_rows + rows_per_block(s) - 1) / rows_per_block(s);
        if (s->n_columns > job.staging_floats) job.staging_floats = s->n_columns;
    }
    KVQ_TRY(model->be->alloc(model->be, n_floats, what, storage, err));
    KVQ_TRY(KVQ_NEW(ctx, n_blocks, "weight blocks", &job.blocks, err));
    KVQ_TRY(KVQ_NEW(ctx, ctx->n_threads * job.staging_floats, "weight staging", &job.staging, err));
    int64_t at = 0, block = 0;
    for (int i = 0; i < list->n; i++) {
        const slot *s = &list->slots[i];
        *s->pointer = *storage + at;
        at += slot_floats(model, s);
        for (int64_t row = 0; row < s->n_rows; row += rows_per_block(s)) {
            int64_t rest = s->n_rows - row;
            job.blocks[block++] = (row_block){s, row, rest < rows_per_block(s) ? rest : rows_per_block(s), KVQ_OK};
        }
    }
    kvq_parallel_for(ctx, n_blocks, expand_block, &job);
    // The first failing block in tensor order is read again, alone, for its message.
    for (int64_t i = 0; i < n_blocks && status == KVQ_OK; i++) {
        if (job.blocks[i].status != KVQ_OK) status = expand(model, &job.blocks[i], job.staging, err);
    }

done:
    kvq_free(ctx, job.blocks);
    kvq_free(ctx, job.staging);
    return status;
}

// ---------------------------------------------------------------- layers

int64_t kvq_layer_floats(const kvq_model_config *c) {
    int64_t q = (int64_t)c->n_heads * c->head_dim, d = (int64_t)c->n_kv_heads * c->head_dim;
    return c->hidden_size * (2 * q + 2 * d + 3 * c->intermediate_size + 2);
}

static void describe_layer(const kvq_model_config *c, kvq_layer *layer, slot_list *list) {
    char    prefix[64];
    int64_t d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim, C = c->hidden_size;
    (void)snprintf(prefix, sizeof prefix, "model.layers.%lld.", (long long)layer->index);
    add_slot(list, prefix, "input_layernorm.weight", 1, C, false, &layer->input_norm);
    add_slot(list, prefix, "post_attention_layernorm.weight", 1, C, false, &layer->post_attention_norm);
    add_linear(list, prefix, "self_attn.q_proj", q, C, c->qkv_bias, &layer->q);
    add_linear(list, prefix, "self_attn.k_proj", d, C, c->qkv_bias, &layer->k);
    add_linear(list, prefix, "self_attn.v_proj", d, C, c->qkv_bias, &layer->v);
    add_linear(list, prefix, "self_attn.o_proj", C, q, c->o_bias, &layer->o);
    add_linear(list, prefix, "mlp.gate_proj", c->intermediate_size, C, c->mlp_bias, &layer->gate);
    add_linear(list, prefix, "mlp.up_proj", c->intermediate_size, C, c->mlp_bias, &layer->up);
    add_linear(list, prefix, "mlp.down_proj", C, c->intermediate_size, c->mlp_bias, &layer->down);
}

static void destroy_layer(const kvq_model *model, kvq_layer *layer) {
    if (layer == NULL) return;
    model->be->release(model->be, layer->storage);
    kvq_free(model->ctx, layer);
}

kvq_status kvq_layer_load(kvq_model *model, int64_t index, kvq_layer **out, kvq_error *err) {
    kvq_layer *layer = NULL;
    slot_list  list = {.n = 0};
    kvq_status status = KVQ_OK;
    if (model->layers[index] != NULL) {
        *out = model->layers[index];
        return KVQ_OK;
    }
    KVQ_TRY(KVQ_NEW(model->ctx, 1, "layer", &layer, err));
    layer->index = index;
    describe_layer(model->config, layer, &list);
    KVQ_TRY(load_slots(model, &list, "weights of one layer", &layer->storage, err));
    if (model->resident) model->layers[index] = layer;
    *out = layer;
    layer = NULL;

done:
    destroy_layer(model, layer);
    return status;
}

void kvq_layer_release(kvq_model *model, kvq_layer **layer) {
    if (*layer != NULL && !model->resident) destroy_layer(model, *layer);
    *layer = NULL;
}

static void destroy_head(const kvq_model *model, kvq_head *head) {
    if (head == NULL) return;
    model->be->release(model->be, head->storage);
    kvq_free(model->ctx, head);
}

kvq_status kvq_head_load(kvq_model *model, kvq_head **out, kvq_error *err) {
    const kvq_model_config *c = model->config;
    kvq_head               *head = NULL;
    slot_list               list = {.n = 0};
    kvq_status              status = KVQ_OK;
    if (model->head != NULL) {
        *out = model->head;
        return KVQ_OK;
    }
    KVQ_TRY(KVQ_NEW(model->ctx, 1, "output head", &head, err));
    add_slot(&list, "", "model.norm.weight", 1, c->hidden_size, false, &head->norm);
    add_linear(&list, "", c->tied_head ? "model.embed_tokens" : "lm_head", c->vocab_size, c->hidden_size, false,
               &head->output);
    KVQ_TRY(load_slots(model, &list, "output matrix", &head->storage, err));
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
    for (int64_t i = 0; (*model)->layers != NULL && i < (*model)->config->n_layers; i++)
        destroy_layer(*model, (*model)->layers[i]);
    destroy_head(*model, (*model)->head);
    kvq_free(ctx, (*model)->layers);
    kvq_free(ctx, (*model)->rope_frequency);
    kvq_free(ctx, *model);
    *model = NULL;
}

const kvq_model_config *kvq_model_describe(const kvq_model *model) { return model->config; }

kvq_status kvq_model_embed(kvq_model *model, const int32_t *ids, int64_t n_tokens, float *x, kvq_error *err) {
    const kvq_model_config *c = model->config;
    float                  *row = NULL;
    kvq_status              status = KVQ_NEW(model->ctx, c->hidden_size, "embedding row", &row, err);
    for (int64_t t = 0; t < n_tokens && status == KVQ_OK; t++) {
        if (ids[t] < 0 || ids[t] >= c->vocab_size) {
            status = kvq_fail(err, KVQ_ERR_INPUT, "use token ids made by this model's tokenizer",
                              "position %lld: token id %d is outside the vocabulary of %lld", (long long)t, (int)ids[t],
                              (long long)c->vocab_size);
            break;
        }
        status = kvq_checkpoint_read(model->checkpoint, "model.embed_tokens.weight", c->vocab_size, c->hidden_size,
                                     ids[t], 1, row, err);
        if (status == KVQ_OK) model->be->upload(model->be, x + t * c->hidden_size, row, c->hidden_size);
    }
    kvq_free(model->ctx, row);
    return status;
}
