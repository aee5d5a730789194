// SPDX-License-Identifier: Apache-2.0
//
// Errors of an artifact's tensors on windows that its fit did not see. The hidden states stay in full precision, so
// that a layer's errors are its own; beside each layer K and V go through the packed cache, and attention is computed
// from the layer's queries and every combination of exact and quantised keys and values. Sums are taken in f64, window
// by window and element by element, by one thread: next to attention they cost nothing.
#include <math.h>
#include <string.h>

#include "decoder_impl.h"

enum { TENSOR_K, TENSOR_V, N_TENSORS, JOINT = N_TENSORS, N_VARIANTS }; // variants of attention: K alone, V alone, both

typedef struct tensor_sums {
    double         error, energy; // of elements behind the sinks
    kvq_row_counts counts;
} tensor_sums;

typedef struct layer_sums {
    int64_t     n_tokens; // behind the sinks
    tensor_sums tensors[N_TENSORS];
    double      attention_energy, attention_error[N_VARIANTS];
} layer_sums;

typedef struct run {
    const kvq_context      *ctx;
    const kvq_backend      *be;
    kvq_model              *model;
    const kvq_model_config *config;
    const kvq_artifact     *artifact;
    const kvq_windows      *windows;
    kvq_workspace          *ws;
    kvq_packed_layer       *cache;
    layer_sums             *layers;                        // [L]
    float                  *states;                        // [group, S, C]
    float                  *q;                             // [S, H * D], rotated
    float                  *exact[N_TENSORS];              // [S, d], K as it is stored, then rotated; V is the hook's
    float                  *coded[N_TENSORS];              // [S, d]
    float                  *recent[N_TENSORS];             // [S, d] in f16; NULL without a recent window
    float                  *out, *other;                   // [S, H * D]
    float                  *host_a, *host_b;               // [S, H * D] or [S, d]
    int64_t                 group, state_floats, q_floats; // q_floats: of a token
    int64_t                 d;
} run;

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

static void add_elements(run *r, tensor_sums *sums, int tensor, int64_t n_tokens, int64_t n_skip) {
    int64_t skip = n_skip * r->d, n = n_tokens * r->d;
    r->be->download(r->be, r->host_a, r->exact[tensor], n);
    r->be->download(r->be, r->host_b, r->coded[tensor], n);
    sums->error += difference(r->host_a + skip, r->host_b + skip, n - skip);
    sums->energy += energy(r->host_a + skip, n - skip);
    if (r->recent[tensor] != NULL) r->be->download(r->be, r->host_a, r->recent[tensor], n);
    kvq_row_counts counts = kvq_packed_layer_count(r->cache, tensor, r->host_a);
    sums->counts.n_elements += counts.n_elements;
    sums->counts.n_outliers += counts.n_outliers;
    sums->counts.n_clipped += counts.n_clipped;
}

// exact, coded and recent hold rotated keys by now.
static void add_attention(run *r, layer_sums *sums, int64_t layer, int64_t n_tokens) {
    int64_t n = n_tokens * r->q_floats;
    kvq_qkv x = {.q = r->q, .k = r->exact[TENSOR_K], .v = r->exact[TENSOR_V]};
    kvq_layer_attention(r->model, r->ws, layer, &x, n_tokens, r->out);
    r->be->download(r->be, r->host_a, r->out, n);
    sums->attention_energy += energy(r->host_a, n);
    x.recent = r->artifact->quantizer.recent_tokens;
    for (int variant = 0; variant < N_VARIANTS; variant++) {
        bool k = variant != TENSOR_V, v = variant != TENSOR_K;
        x.k = k ? r->coded[TENSOR_K] : r->exact[TENSOR_K];
        x.v = v ? r->coded[TENSOR_V] : r->exact[TENSOR_V];
        x.k_recent = k ? r->recent[TENSOR_K] : r->exact[TENSOR_K];
        x.v_recent = v ? r->recent[TENSOR_V] : r->exact[TENSOR_V];
        kvq_layer_attention(r->model, r->ws, layer, &x, n_tokens, r->other);
        r->be->download(r->be, r->host_b, r->other, n);
        sums->attention_error[variant] += difference(r->host_a, r->host_b, n);
    }
}

static void rotate(run *r, int64_t layer, int64_t n_tokens, float *k) {
    if (k != NULL) kvq_rotate_keys(r->model, r->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, k);
}

// Looks at what the layer is about to attend to, and leaves it as it is.
static kvq_status measure(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    run               *r = user;
    const kvq_backend *be = r->be;
    layer_sums        *sums = &r->layers[layer];
    bool               post = r->artifact->layers[layer].k.domain == KVQ_KEYS_POST_ROPE;
    int64_t            n = n_tokens * r->d, n_sinks = r->artifact->quantizer.sink_tokens;
    const float       *from[N_TENSORS] = {x->k, x->v};
    kvq_status         status = KVQ_OK;
    if (n_sinks > n_tokens) n_sinks = n_tokens;
    be->copy(be, r->q, x->q, n_tokens * r->q_floats);
    kvq_rotate_queries(r->model, r->ws, layer, n_tokens, r->q);
    for (int i = 0; i < N_TENSORS; i++) be->copy(be, r->exact[i], from[i], n);
    if (post) rotate(r, layer, n_tokens, r->exact[TENSOR_K]);
    for (int i = 0; i < N_TENSORS; i++) be->copy(be, r->coded[i], r->exact[i], n);
    KVQ_TRY(kvq_packed_layer_prefill(be, r->cache, n_tokens, r->coded[TENSOR_K], r->coded[TENSOR_V],
                                     r->recent[TENSOR_K], r->recent[TENSOR_V], err));
    sums->n_tokens += n_tokens - n_sinks;
    for (int i = 0; i < N_TENSORS; i++) add_elements(r, &sums->tensors[i], i, n_tokens, n_sinks);
    if (!post) {
        rotate(r, layer, n_tokens, r->exact[TENSOR_K]);
        rotate(r, layer, n_tokens, r->coded[TENSOR_K]);
        rotate(r, layer, n_tokens, r->recent[TENSOR_K]);
    }
    add_attention(r, sums, layer, n_tokens);

done:
    return status;
}

// ---------------------------------------------------------------- windows

static kvq_status run_layer(run *r, int64_t l, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len, L = r->config->n_layers;
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_layer_load(r->model, l, &layer, err));
    KVQ_TRY(kvq_packed_layer_create(r->ctx, r->artifact, l, S, &r->cache, err));
    for (int64_t i = 0; i < n; i++) {
        status = kvq_layer_forward(r->model, layer, r->ws, S, r->states + i * r->state_floats, measure, r, err);
        if (status != KVQ_OK) {
            kvq_error_prefix(err, "window %lld: ", (long long)(first + i));
            goto done;
        }
        if (kvq_stop_requested(r->ctx)) {
            KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL,
                             "errors on held-out windows are measured anew by the run that goes on"));
        }
        kvq_report_progress(r->ctx, "held-out", l, first * L + l * n + i + 1, L * r->windows->n_windows);
    }

done:
    kvq_packed_layer_destroy(r->ctx, &r->cache);
    kvq_layer_release(r->model, &layer);
    return status;
}

static kvq_status run_group(run *r, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len;
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < n; i++) {
        float *x = r->states + i * r->state_floats;
        KVQ_TRY(kvq_model_embed(r->model, r->windows->ids + (first + i) * S, S, x, err));
    }
    for (int64_t l = 0; l < r->config->n_layers; l++) KVQ_TRY(run_layer(r, l, first, n, err));

done:
    return status;
}

// Per token of a window: queries, two outputs and the two sides of a comparison; exact, coded and recent K and V, and a
// cache that holds less than two f16 of each.
int64_t kvq_heldout_bytes(const kvq_model *model, int64_t seq_len, int64_t n_windows) {
    const kvq_model_config *c = kvq_model_describe(model);
    int64_t                 q = (int64_t)c->n_heads * c->head_dim, d = (int64_t)c->n_kv_heads * c->head_dim;
    int64_t                 state = seq_len * c->hidden_size, tokens = seq_len * (5 * q + 8 * d);
    return (kvq_group_size(state, n_windows) * state + tokens + kvq_workspace_floats(model, seq_len, false)) *
           (int64_t)sizeof(float);
}

static kvq_status allocate(run *r, kvq_error *err) {
    const kvq_backend *be = r->be;
    int64_t            S = r->windows->seq_len, n_host = S * (r->q_floats > r->d ? r->q_floats : r->d);
    kvq_status         status = KVQ_OK;
    r->state_floats = S * r->config->hidden_size;
    r->group = kvq_group_size(r->state_floats, r->windows->n_windows);
    KVQ_TRY(be->alloc(be, r->group * r->state_floats, "hidden states", &r->states, err));
    KVQ_TRY(kvq_workspace_create(r->model, S, false, &r->ws, err));
    KVQ_TRY(KVQ_NEW(r->ctx, r->config->n_layers, "held-out sums", &r->layers, err));
    float **wide[] = {&r->q, &r->out, &r->other}, **host[] = {&r->host_a, &r->host_b};
    for (int i = 0; i < 3; i++) KVQ_TRY(be->alloc(be, S * r->q_floats, "queries and outputs", wide[i], err));
    for (int i = 0; i < 2; i++) KVQ_TRY(KVQ_NEW(r->ctx, n_host, "what is compared", host[i], err));
    for (int i = 0; i < N_TENSORS; i++) {
        KVQ_TRY(be->alloc(be, S * r->d, "keys and values", &r->exact[i], err));
        KVQ_TRY(be->alloc(be, S * r->d, "keys and values", &r->coded[i], err));
        if (r->artifact->quantizer.recent_tokens > 0)
            KVQ_TRY(be->alloc(be, S * r->d, "recent keys and values", &r->recent[i], err));
    }

done:
    return status;
}

static void release(run *r) {
    float *all[] = {r->states,   r->q,        r->out,      r->other,     r->exact[0],
                    r->exact[1], r->coded[0], r->coded[1], r->recent[0], r->recent[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) r->be->release(r->be, all[i]);
    kvq_workspace_destroy(r->model, &r->ws);
    kvq_free(r->ctx, r->layers);
    kvq_free(r->ctx, r->host_a);
    kvq_free(r->ctx, r->host_b);
}

// ---------------------------------------------------------------- results

static double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

static kvq_heldout_report report_of(const layer_sums *sums, int tensor) {
    const tensor_sums *t = &sums->tensors[tensor];
    return (kvq_heldout_report){
        .n_tokens = sums->n_tokens,
        .nmse = ratio(t->error, t->energy),
        .clipped_share = ratio((double)t->counts.n_clipped, (double)t->counts.n_elements),
        .outlier_share = ratio((double)t->counts.n_outliers, (double)t->counts.n_elements),
        .attention_error = sqrt(ratio(sums->attention_error[tensor], sums->attention_energy)),
    };
}

kvq_status kvq_measure_heldout(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, kvq_artifact *artifact,
                               const kvq_windows *windows, kvq_error *err) {
    const kvq_model_config *config = kvq_model_describe(model);
    run                     r = {.ctx = ctx,
                                 .be = be,
                                 .model = model,
                                 .config = config,
                                 .artifact = artifact,
                                 .windows = windows,
                                 .q_floats = (int64_t)config->n_heads * config->head_dim,
                                 .d = (int64_t)config->n_kv_heads * config->head_dim};
    kvq_status              status = KVQ_OK;
    if (windows->n_windows < 1 || windows->seq_len < 1) {
        return kvq_fail(err, KVQ_ERR_INPUT, "give a longer text", "%s: no token is left to measure errors on",
                        windows->source);
    }
    KVQ_TRY(kvq_artifact_matches(artifact, config, NULL, err));
    KVQ_TRY(allocate(&r, err));
    for (int64_t first = 0; first < windows->n_windows; first += r.group) {
        int64_t left = windows->n_windows - first;
        KVQ_TRY(run_group(&r, first, left < r.group ? left : r.group, err));
    }
    for (int64_t l = 0; l < config->n_layers; l++) {
        kvq_layer_quant *layer = &artifact->layers[l];
        layer->k.heldout = report_of(&r.layers[l], TENSOR_K);
        layer->v.heldout = report_of(&r.layers[l], TENSOR_V);
        layer->attention_error = sqrt(ratio(r.layers[l].attention_error[JOINT], r.layers[l].attention_energy));
    }

done:
    release(&r);
    return status;
}
