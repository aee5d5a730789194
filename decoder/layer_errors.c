// SPDX-License-Identifier: Apache-2.0
//
// Errors of a layer's tensors beside a pass in full precision: the hidden states stay as they are, so that a layer's
// errors are its own. K and V go through the packed cache, and attention is computed from the layer's queries and every
// combination of exact and quantised keys and values. Sums are taken in f64, window by window and element by element,
// by one thread: next to attention they cost nothing.
#include <math.h>

#include "layer_errors.h"

enum { TENSOR_K, TENSOR_V, N_TENSORS, JOINT = N_TENSORS, N_VARIANTS }; // variants of attention: K alone, V alone, both

typedef struct tensor_sums {
    double          error, energy; // of elements behind the sinks
    kvq_row_counts  counts;
    kvq_code_counts codes;
} tensor_sums;

typedef struct layer_sums {
    int64_t     n_tokens; // behind the sinks
    tensor_sums tensors[N_TENSORS];
    double      attention_energy, attention_error[N_VARIANTS];
} layer_sums;

struct layer_errors {
    const kvq_context  *ctx;
    const kvq_backend  *be;
    const kvq_model    *model;
    const kvq_artifact *artifact;
    kvq_workspace      *ws; // borrowed
    kvq_packed_layer   *cache;
    layer_sums         *layers;                       // [L]
    double             *window_error, *window_energy; // [L, n_windows] of attention with both quantised
    float              *q;                            // [S, H * D], rotated
    float              *exact[N_TENSORS];             // [S, d], K as it is stored, then rotated; V is the hook's
    float              *coded[N_TENSORS];             // [S, d]
    float              *recent[N_TENSORS];            // [S, d] in f16; NULL without a recent window
    float              *out, *other;                  // [S, H * D]
    float              *host_a, *host_b;              // [S, H * D] or [S, d]
    int64_t             seq_len, n_windows, window;
    int64_t             q_floats, d; // of a token
};

kvq_status layer_errors_create(const kvq_context *ctx, const kvq_backend *be, const kvq_model *model,
                               const kvq_artifact *artifact, kvq_workspace *ws, int64_t seq_len, int64_t n_windows,
                               layer_errors **out, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    layer_errors           *e = NULL;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "errors of layers", &e, err));
    *e = (layer_errors){.ctx = ctx,
                        .be = be,
                        .model = model,
                        .artifact = artifact,
                        .ws = ws,
                        .n_windows = n_windows,
                        .seq_len = seq_len,
                        .q_floats = (int64_t)c->n_heads * c->head_dim,
                        .d = (int64_t)c->n_kv_heads * c->head_dim};
    int64_t n_host = seq_len * (e->q_floats > e->d ? e->q_floats : e->d);
    float **wide[] = {&e->q, &e->out, &e->other}, **host[] = {&e->host_a, &e->host_b};
    KVQ_TRY(KVQ_NEW(ctx, c->n_layers, "errors of layers", &e->layers, err));
    KVQ_TRY(KVQ_NEW(ctx, c->n_layers * n_windows, "errors of windows", &e->window_error, err));
    KVQ_TRY(KVQ_NEW(ctx, c->n_layers * n_windows, "errors of windows", &e->window_energy, err));
    for (int i = 0; i < 3; i++) KVQ_TRY(be->alloc(be, seq_len * e->q_floats, "queries and outputs", wide[i], err));
    for (int i = 0; i < 2; i++) KVQ_TRY(KVQ_NEW(ctx, n_host, "what is compared", host[i], err));
    for (int i = 0; i < N_TENSORS; i++) {
        KVQ_TRY(be->alloc(be, seq_len * e->d, "keys and values", &e->exact[i], err));
        KVQ_TRY(be->alloc(be, seq_len * e->d, "keys and values", &e->coded[i], err));
        if (artifact->quantizer.recent_tokens > 0)
            KVQ_TRY(be->alloc(be, seq_len * e->d, "recent keys and values", &e->recent[i], err));
    }
    *out = e;
    e = NULL;

done:
    layer_errors_destroy(ctx, &e);
    return status;
}

void layer_errors_destroy(const kvq_context *ctx, layer_errors **errors) {
    layer_errors *e = *errors;
    if (e == NULL) return;
    float *all[] = {e->q,        e->out,      e->other,     e->exact[0], e->exact[1],
                    e->coded[0], e->coded[1], e->recent[0], e->recent[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) e->be->release(e->be, all[i]);
    layer_errors_close(e);
    kvq_free(ctx, e->layers);
    kvq_free(ctx, e->window_error);
    kvq_free(ctx, e->window_energy);
    kvq_free(ctx, e->host_a);
    kvq_free(ctx, e->host_b);
    kvq_free(ctx, e);
    *errors = NULL;
}

// Per token: queries, two outputs and the two sides of a comparison; exact, coded and recent K and V, and a cache that
// holds less than two f16 of each.
int64_t layer_errors_floats(const kvq_model_config *c, int64_t seq_len) {
    int64_t q = (int64_t)c->n_heads * c->head_dim, d = (int64_t)c->n_kv_heads * c->head_dim;
    return seq_len * (5 * q + 8 * d);
}

kvq_status layer_errors_open(layer_errors *e, int64_t layer, kvq_error *err) {
    return kvq_packed_layer_create(e->ctx, e->artifact, layer, e->seq_len, &e->cache, err);
}

void layer_errors_close(layer_errors *e) { kvq_packed_layer_destroy(e->ctx, &e->cache); }

void layer_errors_window(layer_errors *e, int64_t window) { e->window = window; }

// ---------------------------------------------------------------- one window

static double difference(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sum;
}

static double energy(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

static void add_elements(layer_errors *e, tensor_sums *sums, int tensor, int64_t n_tokens, int64_t n_skip) {
    int64_t skip = n_skip * e->d, n = n_tokens * e->d;
    e->be->download(e->be, e->host_a, e->exact[tensor], n);
    e->be->download(e->be, e->host_b, e->coded[tensor], n);
    sums->error += difference(e->host_a + skip, e->host_b + skip, n - skip);
    sums->energy += energy(e->host_a + skip, n - skip);
    if (e->recent[tensor] != NULL) e->be->download(e->be, e->host_a, e->recent[tensor], n);
    kvq_row_counts counts = kvq_packed_layer_count(e->cache, tensor, e->host_a);
    sums->counts.n_elements += counts.n_elements;
    sums->counts.n_outliers += counts.n_outliers;
    sums->counts.n_clipped += counts.n_clipped;
    kvq_packed_layer_count_codes(e->cache, tensor, &sums->codes);
}

// exact, coded and recent hold rotated keys by now.
static void add_attention(layer_errors *e, layer_sums *sums, int64_t layer, int64_t n_tokens) {
    int64_t n = n_tokens * e->q_floats;
    kvq_qkv x = {.q = e->q, .k = e->exact[TENSOR_K], .v = e->exact[TENSOR_V]};
    kvq_layer_attention(e->model, e->ws, layer, &x, n_tokens, e->out);
    e->be->download(e->be, e->host_a, e->out, n);
    double all = energy(e->host_a, n);
    sums->attention_energy += all;
    e->window_energy[layer * e->n_windows + e->window] += all;
    x.second.recent = e->artifact->quantizer.recent_tokens;
    for (int variant = 0; variant < N_VARIANTS; variant++) {
        bool k = variant != TENSOR_V, v = variant != TENSOR_K;
        x.k = k ? e->coded[TENSOR_K] : e->exact[TENSOR_K];
        x.v = v ? e->coded[TENSOR_V] : e->exact[TENSOR_V];
        x.k_recent = k ? e->recent[TENSOR_K] : e->exact[TENSOR_K];
        x.v_recent = v ? e->recent[TENSOR_V] : e->exact[TENSOR_V];
        kvq_layer_attention(e->model, e->ws, layer, &x, n_tokens, e->other);
        e->be->download(e->be, e->host_b, e->other, n);
        double error = difference(e->host_a, e->host_b, n);
        sums->attention_error[variant] += error;
        if (variant == JOINT) e->window_error[layer * e->n_windows + e->window] += error;
    }
}

static void rotate(layer_errors *e, int64_t layer, int64_t n_tokens, float *k) {
    if (k != NULL) kvq_rotate_keys(e->model, e->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, k);
}

kvq_status layer_errors_see(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    layer_errors      *e = user;
    const kvq_backend *be = e->be;
    layer_sums        *sums = &e->layers[layer];
    bool               post = e->artifact->layers[layer].k.domain == KVQ_KEYS_POST_ROPE;
    int64_t            n = n_tokens * e->d, n_sinks = e->artifact->quantizer.sink_tokens;
    const float       *from[N_TENSORS] = {x->k, x->v};
    kvq_status         status = KVQ_OK;
    if (n_sinks > n_tokens) n_sinks = n_tokens;
    be->copy(be, e->q, x->q, n_tokens * e->q_floats);
    kvq_rotate_queries(e->model, e->ws, layer, n_tokens, e->q);
    for (int i = 0; i < N_TENSORS; i++) be->copy(be, e->exact[i], from[i], n);
    if (post) rotate(e, layer, n_tokens, e->exact[TENSOR_K]);
    for (int i = 0; i < N_TENSORS; i++) be->copy(be, e->coded[i], e->exact[i], n);
    KVQ_TRY(kvq_packed_layer_prefill(be, e->cache, n_tokens, e->coded[TENSOR_K], e->coded[TENSOR_V],
                                     e->recent[TENSOR_K], e->recent[TENSOR_V], err));
    sums->n_tokens += n_tokens - n_sinks;
    for (int i = 0; i < N_TENSORS; i++) add_elements(e, &sums->tensors[i], i, n_tokens, n_sinks);
    if (!post) {
        rotate(e, layer, n_tokens, e->exact[TENSOR_K]);
        rotate(e, layer, n_tokens, e->coded[TENSOR_K]);
        rotate(e, layer, n_tokens, e->recent[TENSOR_K]);
    }
    add_attention(e, sums, layer, n_tokens);

done:
    return status;
}

// ---------------------------------------------------------------- results

static double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

static kvq_heldout_report tensor_report(const layer_sums *sums, int tensor) {
    const tensor_sums *t = &sums->tensors[tensor];
    return (kvq_heldout_report){
        .n_tokens = sums->n_tokens,
        .nmse = ratio(t->error, t->energy),
        .clipped_share = ratio((double)t->counts.n_clipped, (double)t->counts.n_elements),
        .outlier_share = ratio((double)t->counts.n_outliers, (double)t->counts.n_elements),
        .attention_error = sqrt(ratio(sums->attention_error[tensor], sums->attention_energy)),
    };
}

kvq_layer_errors layer_errors_report(const layer_errors *e, int64_t layer) {
    const layer_sums *sums = &e->layers[layer];
    kvq_estimate      squared = kvq_estimate_ratio(e->window_error + layer * e->n_windows,
                                                   e->window_energy + layer * e->n_windows, e->n_windows);
    return (kvq_layer_errors){
        .k = tensor_report(sums, TENSOR_K),
        .v = tensor_report(sums, TENSOR_V),
        .k_code_use = kvq_code_use(&sums->tensors[TENSOR_K].codes),
        .v_code_use = kvq_code_use(&sums->tensors[TENSOR_V].codes),
        .attention_error = estimate_root(squared),
    };
}
