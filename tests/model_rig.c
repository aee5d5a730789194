// SPDX-License-Identifier: Apache-2.0
// See model_rig.h.
#include "model_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_make_model.h"

typedef struct tiny_model {
    const char *model_type;
    int         n_layers;
    bool        biases, tied;
} tiny_model;

static const tiny_model TINY[N_TINY] = {
    [TINY_LLAMA] = {"llama", 2, false, false},     [TINY_BIASES] = {"llama", 2, true, false},
    [TINY_MISTRAL] = {"mistral", 2, false, false}, [TINY_QWEN2] = {"qwen2", 2, false, true},
    [TINY_QWEN3] = {"qwen3", 2, false, false},     [TINY_PHI3] = {"phi3", 2, false, true},
    [TINY_GEMMA2] = {"gemma2", 2, false, true},    [TINY_GEMMA3] = {"gemma3_text", 3, false, true},
    [TINY_MIXTRAL] = {"mixtral", 2, false, false}, [TINY_QWEN3_MOE] = {"qwen3_moe", 2, false, false},
};

void make_tiny(char *path, size_t size, int which) {
    kvq_make_options options = kvq_make_options_default();
    options.model_type = TINY[which].model_type;
    options.n_layers = TINY[which].n_layers;
    options.attention_bias = options.mlp_bias = TINY[which].biases;
    options.tied_head = TINY[which].tied;
    (void)snprintf(path, size, "%s/model-%d", kvq_test_folder(), which);
    kvq_make_model_hf(&options, path);
}

void random_ids(int32_t *ids, int n, int64_t vocab) {
    for (int i = 0; i < n; i++) ids[i] = (int32_t)kvq_rng_below(8, KVQ_RNG_TEST, 50, (uint64_t)i, (uint64_t)vocab);
}

bool rig_has_device(char *why, size_t size) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_backend *be = NULL;
    bool         found = kvq_backend_open(&ctx, KVQ_RIG_DEVICE, KVQ_COMPUTE_F32, &be, &err) == KVQ_OK;
    (void)snprintf(why, size, "%s", err.message);
    if (found) be->destroy(&be);
    return found;
}

void rig_open(rig *r, const char *path, const int32_t *ids, int64_t S, int n_threads) {
    kvq_error err = {0};
    memset(r, 0, sizeof *r);
    r->ctx = kvq_test_context();
    r->ctx.n_threads = n_threads;
    kvq_test_ok(kvq_backend_open(&r->ctx, KVQ_RIG_DEVICE, KVQ_COMPUTE_F32, &r->be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(&r->ctx, path, &r->checkpoint, &err), &err);
    r->c = kvq_checkpoint_config(r->checkpoint);
    kvq_test_ok(kvq_model_create(&r->ctx, r->be, r->checkpoint, false, &r->model, &err), &err);
    kvq_test_ok(kvq_workspace_create(r->model, S, true, &r->ws, &err), &err);
    r->S = S;
    r->C = r->c->hidden_size;
    r->d = (int64_t)r->c->n_kv_heads * r->c->head_dim;
    r->ids = ids;
    kvq_test_ok(r->be->alloc(r->be, (r->c->n_layers + 1) * S * r->C, "states", &r->states, &err), &err);
    float **kv[] = {&r->k, &r->v, &r->dk, &r->dv};
    for (int i = 0; i < 4; i++) *kv[i] = malloc((size_t)(r->c->n_layers * S * r->d) * sizeof **kv[i]);
}

void rig_close(rig *r) {
    float *host[] = {r->k, r->v, r->dk, r->dv};
    for (int i = 0; i < 4; i++) free(host[i]);
    r->be->release(r->be, r->states);
    kvq_head_release(r->model, &r->head);
    kvq_workspace_destroy(r->model, &r->ws);
    kvq_model_destroy(&r->ctx, &r->model);
    kvq_checkpoint_close(&r->ctx, &r->checkpoint);
    r->be->destroy(&r->be);
}

float *rig_host(const rig *r, const float *x, int64_t n) {
    float *host = malloc((size_t)n * sizeof *host);
    r->be->download(r->be, host, x, n);
    return host;
}

float *rig_backend(const rig *r, const float *host_x, int64_t n) {
    kvq_error err = {0};
    float    *x = NULL;
    kvq_test_ok(r->be->alloc(r->be, n, "numbers of a test", &x, &err), &err);
    r->be->upload(r->be, x, host_x, n);
    return x;
}

static kvq_status keep(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    rig *r = user;
    (void)err;
    r->be->download(r->be, r->k + layer * r->S * r->d, x->k, n_tokens * r->d);
    r->be->download(r->be, r->v + layer * r->S * r->d, x->v, n_tokens * r->d);
    return KVQ_OK;
}

void rig_forward(rig *r) {
    kvq_error err = {0};
    int64_t   n = r->S * r->C;
    kvq_test_ok(kvq_model_embed(r->model, r->ids, r->S, r->states, &err), &err);
    for (int64_t l = 0; l < r->c->n_layers; l++) {
        kvq_layer *layer = NULL;
        kvq_test_ok(kvq_layer_load(r->model, l, &layer, &err), &err);
        r->be->copy(r->be, r->states + (l + 1) * n, r->states + l * n, n);
        kvq_test_ok(kvq_layer_forward(r->model, layer, r->ws, r->S, r->states + (l + 1) * n, keep, r, &err), &err);
        kvq_layer_release(r->model, &layer);
    }
    kvq_test_ok(kvq_head_load(r->model, &r->head, &err), &err);
}

double rig_backward(rig *r) {
    kvq_error err = {0};
    int64_t   n = r->S * r->C, kv = r->S * r->d;
    double   *nll = malloc((size_t)r->S * sizeof *nll), sum = 0;
    float    *dx = NULL;
    kvq_test_ok(r->be->alloc(r->be, n, "dx", &dx, &err), &err);
    kvq_test_ok(kvq_head_loss(r->model, r->head, r->ws, r->ids, r->S, r->states + r->c->n_layers * n, dx, nll, &err),
                &err);
    for (int64_t t = 0; t + 1 < r->S; t++) sum += nll[t];
    free(nll);
    for (int64_t l = r->c->n_layers - 1; l >= 0; l--) {
        kvq_layer *layer = NULL;
        kvq_test_ok(kvq_layer_load(r->model, l, &layer, &err), &err);
        kvq_test_ok(kvq_layer_backward(r->model, layer, r->ws, r->S, r->states + l * n, dx, &err), &err);
        kvq_kv_view view = kvq_workspace_kv(r->ws);
        float      *again = rig_host(r, view.k, kv);
        ck_assert_mem_eq(again, r->k + l * kv, (size_t)kv * sizeof(float)); // recomputation gives the same bits
        free(again);
        r->be->download(r->be, r->dk + l * kv, view.dk, kv);
        r->be->download(r->be, r->dv + l * kv, view.dv, kv);
        kvq_layer_release(r->model, &layer);
    }
    r->be->release(r->be, dx);
    return sum / (double)(r->S - 1);
}

float *rig_logits(rig *r, int64_t first) {
    kvq_error err = {0};
    float    *logits = NULL;
    int64_t   n = r->S - first;
    kvq_test_ok(r->be->alloc(r->be, n * r->c->vocab_size, "logits", &logits, &err), &err);
    kvq_test_ok(
        kvq_head_logits(r->model, r->head, r->ws, r->states + (r->c->n_layers * r->S + first) * r->C, n, logits, &err),
        &err);
    float *host = rig_host(r, logits, n * r->c->vocab_size);
    r->be->release(r->be, logits);
    return host;
}
