// SPDX-License-Identifier: Apache-2.0
//
// Token by token: a batch of sequences in step, with a full-precision cache. It makes text (datasets/self_text.c); the
// packed cache of decoder/ is what quantised decoding uses.
#include "model_impl.h"

struct kvq_decode {
    int64_t     n_seqs, capacity, n_past;
    float      *storage;
    float      *k_cache, *v_cache;        // [L, n_seqs, capacity, Hkv * D], keys after RoPE
    float      *x, *q, *k, *v, *attended; // one row per sequence, as in mlp
    mlp_buffers mlp;
    float      *scores, *logits;
    rope_tables rope[2];
    float      *host_tables; // [2, n_seqs, n_dims / 2]
};

enum { DECODE_BUFFERS = 13, ALL_BUFFERS = DECODE_BUFFERS + MLP_BUFFERS };

static void list_buffers(const kvq_model *model, kvq_decode *s, int64_t n_seqs, int64_t capacity,
                         kvq_model_buffer list[ALL_BUFFERS]) {
    const kvq_model_config *c = model->config;
    int64_t                 d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim;
    int64_t                 global = n_seqs * (c->rope.n_dims / 2), local = kvq_rope_count(c) > 1 ? global : 0;
    int64_t                 cache = c->n_layers * n_seqs * capacity * d;
    const kvq_model_buffer  own[DECODE_BUFFERS] = {
         {&s->k_cache, cache},
         {&s->v_cache, cache},
         {&s->x, n_seqs * c->hidden_size},
         {&s->q, n_seqs * q},
         {&s->k, n_seqs * d},
         {&s->v, n_seqs * d},
         {&s->attended, n_seqs * q},
         {&s->scores, n_seqs * c->n_heads * capacity},
         {&s->logits, n_seqs * c->vocab_size},
         {&s->rope[0].cos_table, global},
         {&s->rope[0].sin_table, global},
         {&s->rope[1].cos_table, local},
         {&s->rope[1].sin_table, local},
    };
    int n = kvq_mlp_list(model, &s->mlp, n_seqs, false, list);
    for (int i = 0; i < DECODE_BUFFERS; i++) list[n++] = own[i];
}

int64_t kvq_decode_floats(const kvq_model *model, int64_t n_seqs, int64_t capacity) {
    kvq_decode       unused;
    kvq_model_buffer list[ALL_BUFFERS];
    list_buffers(model, &unused, n_seqs, capacity, list);
    return kvq_buffers_floats(list, ALL_BUFFERS) + kvq_routing_floats(model->config, n_seqs) +
           n_seqs * model->config->rope.n_dims + kvq_model_floats(model);
}

kvq_status kvq_decode_create(kvq_model *model, int64_t n_seqs, int64_t capacity, kvq_decode **out, kvq_error *err) {
    kvq_decode      *s = NULL;
    kvq_model_buffer list[ALL_BUFFERS];
    kvq_status       status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(model->ctx, 1, "decode state", &s, err));
    s->n_seqs = n_seqs;
    s->capacity = capacity;
    list_buffers(model, s, n_seqs, capacity, list);
    KVQ_TRY(kvq_buffers_alloc(model->be, list, ALL_BUFFERS, "cache of the decoder", &s->storage, err));
    KVQ_TRY(kvq_routing_create(model, n_seqs, &s->mlp.routing, err));
    KVQ_TRY(KVQ_NEW(model->ctx, n_seqs * model->config->rope.n_dims, "rotary tables", &s->host_tables, err));
    *out = s;
    s = NULL;

done:
    kvq_decode_destroy(model, &s);
    return status;
}

void kvq_decode_destroy(kvq_model *model, kvq_decode **decode) {
    if (*decode == NULL) return;
    kvq_routing_destroy(model, &(*decode)->mlp.routing);
    model->be->release(model->be, (*decode)->storage);
    kvq_free(model->ctx, (*decode)->host_tables);
    kvq_free(model->ctx, *decode);
    *decode = NULL;
}

// All sequences are at the same position, so a table holds the same row for each.
static void fill_tables(const kvq_model *model, kvq_decode *s) {
    int64_t half = model->config->rope.n_dims / 2, n = s->n_seqs * half;
    for (int which = 0; which < kvq_rope_count(model->config); which++) {
        for (int64_t i = 0; i < s->n_seqs; i++) {
            kvq_rope_fill(model, which, s->n_past, 1, s->host_tables + i * half, s->host_tables + n + i * half);
        }
        model->be->upload(model->be, s->rope[which].cos_table, s->host_tables, n);
        model->be->upload(model->be, s->rope[which].sin_table, s->host_tables + n, n);
    }
}

static kvq_status decode_layer(kvq_model *model, const kvq_layer *layer, kvq_decode *s, kvq_error *err) {
    const kvq_backend      *be = model->be;
    const kvq_model_config *c = model->config;
    int64_t                 d = layer->k.n_out, per_layer = s->n_seqs * s->capacity * d;
    float *k_cache = s->k_cache + layer->index * per_layer, *v_cache = s->v_cache + layer->index * per_layer;
    const rope_tables  *rope = &s->rope[kvq_rope_of_layer(c, layer->index)];
    kvq_attention_shape shape = kvq_model_attention_shape(c, layer->index, 1);
    kvq_layer_project(model, layer, s->n_seqs, s->x, s->mlp.normed, s->q, s->k, s->q, s->k, s->v);
    be->rope(be, s->q, rope->cos_table, rope->sin_table, 1, 1, s->n_seqs, c->n_heads, c->head_dim, c->rope.n_dims);
    be->rope(be, s->k, rope->cos_table, rope->sin_table, 1, 1, s->n_seqs, c->n_kv_heads, c->head_dim, c->rope.n_dims);
    for (int64_t i = 0; i < s->n_seqs; i++) {
        be->copy(be, k_cache + (i * s->capacity + s->n_past) * d, s->k + i * d, d);
        be->copy(be, v_cache + (i * s->capacity + s->n_past) * d, s->v + i * d, d);
    }
    be->attention_step(be, &shape, s->n_seqs, s->n_past, s->capacity, s->q, k_cache, v_cache, s->attended, s->scores);
    kvq_layer_attended(model, layer, s->n_seqs, s->attended, s->x, &s->mlp);
    return kvq_layer_mlp(model, layer, s->n_seqs, s->x, &s->mlp, err);
}

kvq_status kvq_decode_step(kvq_model *model, kvq_decode *s, const int32_t *ids, const float **logits, kvq_error *err) {
    const kvq_model_config *c = model->config;
    kvq_layer              *layer = NULL;
    kvq_head               *head = NULL;
    kvq_status              status = KVQ_OK;
    if (s->n_past == s->capacity) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "decoding: position %lld is beyond the cache's capacity",
                        (long long)s->n_past);
    }
    KVQ_TRY(kvq_model_embed(model, ids, s->n_seqs, s->x, err));
    fill_tables(model, s);
    for (int64_t l = 0; l < c->n_layers; l++) {
        KVQ_TRY(kvq_layer_load(model, l, &layer, err));
        KVQ_TRY(decode_layer(model, layer, s, err));
        kvq_layer_release(model, &layer);
    }
    KVQ_TRY(kvq_head_load(model, &head, err));
    status = kvq_head_apply(model, head, s->x, 0, s->n_seqs, s->mlp.normed, s->logits, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "decoding, position %lld (row = sequence): ", (long long)s->n_past);
        goto done;
    }
    s->n_past++;
    *logits = s->logits;

done:
    kvq_layer_release(model, &layer);
    kvq_head_release(model, &head);
    return status;
}
