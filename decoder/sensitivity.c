// SPDX-License-Identifier: Apache-2.0
//
// How much the model's predictions feel the quantisation of each tensor alone. A window's hidden state is taken beside
// the exact one from the layer whose K or V is quantised to the end; there are two such variants for each layer, and as
// many as fit into memory are carried at a time. Only some positions are scored, because for small models the head
// costs more than the layers do.
#include <string.h>

#include "decoder_impl.h"

#define SCORED_STRIDE 4
#define MAX_TOKENS    512 // of a window: enough context to be typical, and attention stays cheap

typedef struct run {
    const kvq_context      *ctx;
    const kvq_backend      *be;
    kvq_model              *model;
    const kvq_model_config *config;
    const kvq_artifact     *artifact;
    const kvq_windows      *windows;
    kvq_workspace          *ws;
    kvq_packed_layer       *cache;
    int64_t                 n_windows, n_tokens, n_scored; // n_scored: positions of a window
    int64_t                 state_floats;                  // of all windows
    int64_t                 batch;                         // layers whose variants are carried together
    float                  *exact, *next;                  // states; next: those at the first layer of the next batch
    float                  *variants;                      // [batch, 2] states
    float                  *other;                         // [T, d]
    float                  *rows_a, *rows_b;               // [n_scored + 1, C]
    int32_t                *positions, *targets;           // [n_scored + 1]
    kvq_position_score     *scores;
    int                     tensor; // that the hook quantises
    double                 *kl;     // [L, 2]; the caller's stays as it is until all are known
} run;

// ---------------------------------------------------------------- one layer

// K or V alone through the cache: the other one is put back.
static kvq_status quantise_one(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    run       *r = user;
    int64_t    n = n_tokens * r->config->n_kv_heads * r->config->head_dim;
    float     *keep = r->tensor == 0 ? x->v : x->k;
    kvq_status status = KVQ_OK;
    r->be->copy(r->be, r->other, keep, n);
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, x->k);
    KVQ_TRY(kvq_packed_layer_prefill(r->be, r->cache, n_tokens, x->k, x->v, NULL, NULL, err));
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_BACK, n_tokens, x->k);
    r->be->copy(r->be, keep, r->other, n);

done:
    return status;
}

static kvq_status forward(run *r, const kvq_layer *layer, float *states, kvq_qkv_hook hook, kvq_error *err) {
    int64_t    window = r->state_floats / r->n_windows;
    kvq_status status = KVQ_OK;
    for (int64_t w = 0; w < r->n_windows && status == KVQ_OK; w++)
        status = kvq_layer_forward(r->model, layer, r->ws, r->n_tokens, states + w * window, hook, r, err);
    return status;
}

static float *variant_of(const run *r, int64_t first, int64_t layer, int tensor) {
    return r->variants + ((layer - first) * 2 + tensor) * r->state_floats;
}

// Layer l with the variants of the batch [first, end): those of earlier layers pass it, its own begin in it.
static kvq_status pass_layer(run *r, int64_t l, int64_t first, int64_t end, kvq_error *err) {
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_layer_load(r->model, l, &layer, err));
    for (int64_t from = first; from < end && from <= l; from++) {
        if (from == l) KVQ_TRY(kvq_packed_layer_create(r->ctx, r->artifact, l, r->n_tokens, &r->cache, err));
        for (r->tensor = 0; r->tensor < 2; r->tensor++) {
            float *states = variant_of(r, first, from, r->tensor);
            if (from == l) r->be->copy(r->be, states, r->exact, r->state_floats);
            KVQ_TRY(forward(r, layer, states, from == l ? quantise_one : NULL, err));
            if (kvq_stop_requested(r->ctx))
                KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL, "tensors are measured anew by the run that goes on"));
        }
    }
    KVQ_TRY(forward(r, layer, r->exact, NULL, err));

done:
    kvq_packed_layer_destroy(r->ctx, &r->cache);
    kvq_layer_release(r->model, &layer);
    return status;
}

// ---------------------------------------------------------------- scores

static kvq_status score(run *r, const kvq_head *head, const float *states, double *kl, kvq_error *err) {
    int64_t    C = r->config->hidden_size;
    double     sum = 0;
    kvq_status status = KVQ_OK;
    for (int64_t w = 0; w < r->n_windows; w++) {
        int64_t at = w * r->n_tokens * C;
        r->be->gather_rows(r->be, r->exact + at, r->positions, r->rows_a, r->n_scored, C);
        r->be->gather_rows(r->be, states + at, r->positions, r->rows_b, r->n_scored, C);
        KVQ_TRY(
            kvq_head_compare(r->model, head, r->ws, r->targets, r->n_scored + 1, r->rows_a, r->rows_b, r->scores, err));
        for (int64_t i = 0; i < r->n_scored; i++) sum += r->scores[i].kl;
    }
    *kl = sum / (double)(r->n_windows * r->n_scored);

done:
    return status;
}

// Passes of variants through layers, two at a time: those of the layers [0, first) to the end, ...
static int64_t work_until(int64_t first, int64_t n_layers) { return first * n_layers - first * (first - 1) / 2; }

// ... and those of [first, end) through the layers before l.
static int64_t work_of(int64_t l, int64_t first, int64_t end) {
    int64_t inside = (l < end ? l : end) - first, behind = l > end ? l - end : 0;
    return inside * (inside + 1) / 2 + behind * (end - first);
}

// Exact states up to the first layer that is measured.
static kvq_status pass_before(run *r, int64_t first, kvq_error *err) {
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    for (int64_t l = 0; l < first; l++) {
        KVQ_TRY(kvq_layer_load(r->model, l, &layer, err));
        KVQ_TRY(forward(r, layer, r->exact, NULL, err));
        kvq_layer_release(r->model, &layer);
    }

done:
    kvq_layer_release(r->model, &layer);
    return status;
}

static kvq_status run_batch(run *r, int64_t first, int64_t end, kvq_error *err) {
    int64_t    L = r->config->n_layers;
    kvq_head  *head = NULL;
    kvq_status status = KVQ_OK;
    for (int64_t l = first; l < L; l++) {
        KVQ_TRY(pass_layer(r, l, first, end, err));
        if (l == end - 1) r->be->copy(r->be, r->next, r->exact, r->state_floats);
        kvq_report_progress(r->ctx, "sensitivity", l, work_until(first, L) + work_of(l + 1, first, end),
                            L * (L + 1) / 2);
    }
    KVQ_TRY(kvq_head_load(r->model, &head, err));
    for (int64_t l = first; l < end; l++) {
        for (int t = 0; t < 2; t++) KVQ_TRY(score(r, head, variant_of(r, first, l, t), &r->kl[2 * l + t], err));
    }
    r->be->copy(r->be, r->exact, r->next, r->state_floats);

done:
    kvq_head_release(r->model, &head);
    return status;
}

// ---------------------------------------------------------------- all of it

// Windows and tokens that are measured.
static void choose(const kvq_windows *windows, int64_t n_tokens, int64_t *count, int64_t *length) {
    *length = windows->seq_len < MAX_TOKENS ? windows->seq_len : MAX_TOKENS;
    *count = n_tokens / *length;
    if (*count > windows->n_windows) *count = windows->n_windows;
    if (*count < 1) *count = 1;
}

static int64_t batch_of(const kvq_model_config *c, int64_t state_floats) {
    return kvq_group_size(2 * state_floats, c->n_layers);
}

kvq_sensitivity_cost kvq_sensitivity_plan(const kvq_model *model, int64_t seq_len, int64_t n_windows,
                                          int64_t n_tokens) {
    const kvq_model_config *c = kvq_model_describe(model);
    const kvq_windows       windows = {.seq_len = seq_len, .n_windows = n_windows};
    int64_t                 count, length;
    choose(&windows, n_tokens, &count, &length);
    int64_t state = count * length * c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim;
    double  tokens = (double)(count * length), L = (double)c->n_layers;
    double  layer = kvq_layer_flops(c, length);
    double  head = 2.0 * (double)c->vocab_size * (double)c->hidden_size / SCORED_STRIDE;
    return (kvq_sensitivity_cost){.n_windows = count,
                                  .n_tokens = length,
                                  .n_layers = batch_of(c, state),
                                  .bytes = 4 * ((2 * batch_of(c, state) + 2) * state + length * 4 * d +
                                                kvq_workspace_floats(model, length + 1, false)),
                                  .tera_flops = tokens * (L * (L + 2) * layer + 4 * L * head) * 1e-12};
}

static kvq_status allocate(run *r, kvq_error *err) {
    const kvq_backend *be = r->be;
    int64_t            C = r->config->hidden_size, d = (int64_t)r->config->n_kv_heads * r->config->head_dim;
    kvq_status         status = KVQ_OK;
    r->state_floats = r->n_windows * r->n_tokens * C;
    r->batch = batch_of(r->config, r->state_floats);
    r->n_scored = (r->n_tokens + SCORED_STRIDE - 1) / SCORED_STRIDE;
    KVQ_TRY(be->alloc(be, r->state_floats, "hidden states", &r->exact, err));
    KVQ_TRY(be->alloc(be, r->state_floats, "hidden states", &r->next, err));
    KVQ_TRY(be->alloc(be, 2 * r->batch * r->state_floats, "hidden states", &r->variants, err));
    KVQ_TRY(be->alloc(be, r->n_tokens * d, "keys or values", &r->other, err));
    KVQ_TRY(be->alloc(be, (r->n_scored + 1) * C, "scored positions", &r->rows_a, err));
    KVQ_TRY(be->alloc(be, (r->n_scored + 1) * C, "scored positions", &r->rows_b, err));
    KVQ_TRY(KVQ_NEW(r->ctx, r->n_scored + 1, "scored positions", &r->positions, err));
    KVQ_TRY(KVQ_NEW(r->ctx, r->n_scored + 1, "targets", &r->targets, err));
    KVQ_TRY(KVQ_NEW(r->ctx, r->n_scored, "scores", &r->scores, err));
    KVQ_TRY(KVQ_NEW(r->ctx, 2 * r->config->n_layers, "KL of tensors", &r->kl, err));
    KVQ_TRY(kvq_workspace_create(r->model, r->n_tokens + 1, false, &r->ws, err));
    for (int64_t i = 0; i < r->n_scored; i++) // the last ones of each stride, which have most context
        r->positions[i] = (int32_t)(r->n_tokens - 1 - i * SCORED_STRIDE);

done:
    return status;
}

static void release(run *r) {
    float *all[] = {r->exact, r->next, r->variants, r->other, r->rows_a, r->rows_b};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) r->be->release(r->be, all[i]);
    kvq_workspace_destroy(r->model, &r->ws);
    kvq_free(r->ctx, r->positions);
    kvq_free(r->ctx, r->targets);
    kvq_free(r->ctx, r->scores);
    kvq_free(r->ctx, r->kl);
}

kvq_status kvq_measure_sensitivity(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                                   const kvq_artifact *artifact, const kvq_windows *windows, int64_t n_tokens,
                                   int64_t first, int64_t end, double *kl, kvq_error *err) {
    run        r = {.ctx = ctx,
                    .be = be,
                    .model = model,
                    .config = kvq_model_describe(model),
                    .artifact = artifact,
                    .windows = windows};
    kvq_status status = KVQ_OK;
    if (windows->n_windows < 1 || windows->seq_len < 2)
        return kvq_fail(err, KVQ_ERR_INPUT, "give a longer text", "%s: no token can be scored", windows->source);
    choose(windows, n_tokens, &r.n_windows, &r.n_tokens);
    KVQ_TRY(kvq_artifact_matches(artifact, r.config, NULL, err));
    KVQ_TRY(allocate(&r, err));
    for (int64_t w = 0; w < r.n_windows; w++) { // spread over the windows there are
        const int32_t *ids = windows->ids + w * windows->n_windows / r.n_windows * windows->seq_len;
        float         *x = r.exact + w * r.n_tokens * r.config->hidden_size;
        KVQ_TRY(kvq_model_embed(model, ids, r.n_tokens, x, err));
    }
    KVQ_TRY(pass_before(&r, first, err));
    for (int64_t at = first; at < end; at += r.batch)
        KVQ_TRY(run_batch(&r, at, at + r.batch < end ? at + r.batch : end, err));
    memcpy(kl + 2 * first, r.kl + 2 * first, (size_t)(2 * (end - first)) * sizeof *kl);

done:
    release(&r);
    return status;
}
