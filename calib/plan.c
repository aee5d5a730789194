// SPDX-License-Identifier: Apache-2.0
//
// What a run will cost, before it starts: memory and disk from shapes, time from two windows that are really run.
#include <math.h>

#include "calib_impl.h"

// Code and data of the libraries, buffers that the matrix library packs into, HDF5, the fit, the text: measured as the
// resident set that is left when everything counted here is taken off.
#define PROGRAM_BYTES ((int64_t)80 << 20)

#define MIB 1048576.0

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------- memory and disk

// What is the backend's of weights and of one window's activations; the rest of both is the host's.
static int64_t backend_weight_bytes(const kvq_model *model, bool prefetch) {
    int64_t layer = 4 * kvq_layer_floats(model), head = 4 * kvq_head_floats(model);
    return larger(layer, head) + (prefetch ? layer : 0);
}

// Beside the model's own: a hidden state, its gradient, and rotated keys and their gradients where they are wanted.
static int64_t backend_activation_bytes(const kvq_model *model, const kvq_measure_options *options, int64_t seq_len) {
    const kvq_model_config *c = kvq_model_describe(model);
    int64_t                 width = 2 * c->hidden_size;
    bool                    gradients = measure_needs_gradients(options);
    if (options->k_domain == KVQ_KEYS_POST_ROPE) width += (gradients ? 2 : 1) * (int64_t)c->n_kv_heads * c->head_dim;
    return 4 * (kvq_workspace_floats(model, seq_len, gradients) + seq_len * width);
}

// A hidden state, and of K and V the values, gradients, squared gradients and normalised elements; queries where they
// are wanted. Where a device counts, there are values, and for tiles gradients.
static int64_t host_activation_bytes(const kvq_model *model, const kvq_measure_options *options, int64_t seq_len) {
    const kvq_model_config *c = kvq_model_describe(model);
    int64_t                 d = (int64_t)c->n_kv_heads * c->head_dim;
    bool                    counts = !device_counts_possible(kvq_model_backend(model), options);
    int64_t                 n = counts ? 4 : 2; // of [S, d]
    if (measure_needs_gradients(options)) n += (counts || options->allocated ? 2 : 0) + (counts ? 2 : 0);
    int64_t width = c->hidden_size + n * d;
    if (options->moments) width += (int64_t)c->n_heads * c->head_dim;
    return 4 * seq_len * width;
}

static kvq_status fit_memory(const kvq_model *model, int64_t limit, int64_t backend_activations, int64_t counters,
                             kvq_calib_plan *plan, kvq_error *err) {
    int64_t device = kvq_model_backend(model)->memory_bytes;
    for (plan->prefetch = true;; plan->prefetch = false) {
        int64_t backend_weights = backend_weight_bytes(model, plan->prefetch);
        plan->weight_bytes = backend_weights + kvq_model_mapped_bytes(model);
        plan->device_bytes = device > 0 ? backend_weights + backend_activations + counters : 0;
        plan->memory_bytes = plan->weight_bytes + plan->activation_bytes + plan->statistics_bytes +
                             plan->program_bytes - plan->device_bytes;
        bool fits = limit == 0 || plan->memory_bytes <= limit, fits_device = plan->device_bytes <= device;
        if (fits && fits_device) return KVQ_OK;
        if (plan->prefetch) continue;
        if (!fits_device) {
            return kvq_fail(err, KVQ_ERR_MEMORY, "use shorter windows, compute in bf16, or take --device cpu",
                            "%s has %.0f MiB of memory: the least for windows of this length is %.0f MiB (weights of "
                            "one layer or the head %.0f, activations of one window %.0f, statistics %.0f)",
                            kvq_model_backend(model)->device, floor((double)device / MIB),
                            ceil((double)plan->device_bytes / MIB), (double)backend_weights / MIB,
                            (double)backend_activations / MIB, (double)counters / MIB);
        }
        return kvq_fail(err, KVQ_ERR_MEMORY, "use shorter windows or fewer threads, compute in bf16, or allow more",
                        "a memory limit of %.0f MiB: the least for windows of this length is %.0f MiB (weights of one "
                        "layer or the head %.0f, activations of one window %.0f, statistics %.0f, program %.0f)",
                        floor((double)limit / MIB), ceil((double)plan->memory_bytes / MIB),
                        (double)plan->weight_bytes / MIB, (double)plan->activation_bytes / MIB,
                        (double)plan->statistics_bytes / MIB, (double)plan->program_bytes / MIB);
    }
}

// The smallest stride that fits: each larger one costs more recomputation.
static kvq_status fit_disk(const step_plan *steps, int64_t state_bytes, int64_t limit, kvq_calib_plan *plan,
                           kvq_error *err) {
    int64_t least = INT64_MAX;
    for (int64_t stride = 1; stride <= steps->n_layers; stride++) {
        step_plan trial = *steps;
        trial.stride = stride;
        int64_t bytes = step_peak_states(&trial) * state_bytes;
        if (limit == 0 || bytes <= limit) {
            plan->stride = stride;
            plan->scratch_bytes = bytes;
            return KVQ_OK;
        }
        if (bytes < least) least = bytes;
    }
    return kvq_fail(err, KVQ_ERR_DISK, "allow more, use fewer or shorter windows, or another disk with --work-dir",
                    "%.0f MiB can be used for the work directory, but the least is %.0f MiB",
                    floor((double)limit / MIB), ceil((double)least / MIB));
}

kvq_status kvq_calib_plan_make(const kvq_context *ctx, const kvq_model *model, const kvq_measure_options *options,
                               int64_t n_windows, int64_t seq_len, int64_t n_parts, kvq_calib_limits limits,
                               kvq_calib_plan *out, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    bool                    gradients = measure_needs_gradients(options);
    int64_t                 mine = (n_windows + n_parts - 1) / n_parts, tokens = mine * seq_len;
    step_plan               steps = {.n_layers = c->n_layers, .second_pass = true, .gradients = gradients};
    kvq_calib_plan          plan = {.program_bytes = PROGRAM_BYTES};
    (void)ctx;
    measure_shape shape = measure_shape_of(c, seq_len, n_windows);
    int64_t       backend_activations = backend_activation_bytes(model, options, seq_len);
    int64_t       counters = device_counts_bytes(kvq_model_backend(model), options, shape);
    plan.activation_bytes = backend_activations + host_activation_bytes(model, options, seq_len);
    plan.statistics_bytes = measure_bytes(options, shape) + counters;
    if (counters > 0) plan.statistics_bytes += kvq_counters_bytes(options->weightings); // taken one head at a time
    kvq_status status = fit_memory(model, limits.memory_bytes, backend_activations, counters, &plan, err);
    if (status == KVQ_OK) status = fit_disk(&steps, 4 * tokens * c->hidden_size, limits.scratch_bytes, &plan, err);
    if (status != KVQ_OK) return status;
    // forward once, and for the gradients a recomputed forward and as much again; what the stride makes again; the head
    double passes = 2 + (gradients ? 1 : 0) + (double)(plan.stride - 1) / (double)plan.stride;
    plan.tera_flops = ((double)c->n_layers * passes * ((double)tokens * kvq_layer_flops(c, seq_len)) +
                       (gradients ? 4.0 : 2.0) * (double)c->vocab_size * (double)c->hidden_size * (double)tokens) *
                      1e-12;
    *out = plan;
    return KVQ_OK;
}

// ---------------------------------------------------------------- time

typedef struct probe {
    const kvq_context *ctx;
    const kvq_backend *be;
    kvq_model         *model;
    bool               gradients;
    int64_t            seq_len;
    kvq_workspace     *ws;
    kvq_layer         *layer;
    kvq_head          *head;
    measure           *m;
    float             *x, *y, *dx;                            // [S, C]
    int32_t           *ids;                                   // [S]
    double            *nll;                                   // [S]
    float             *host[4];                               // [S, H D] or [S, d]: what the observer sees
    double             load_s, forward_s, loss_s, backward_s; // of one layer, one window
} probe;

static int64_t kv_floats(const probe *p) {
    const kvq_model_config *c = kvq_model_describe(p->model);
    return p->seq_len * c->n_kv_heads * c->head_dim;
}

static int64_t q_floats(const probe *p) {
    const kvq_model_config *c = kvq_model_describe(p->model);
    return p->seq_len * c->n_heads * c->head_dim;
}

static kvq_status see_forward(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    probe       *p = user;
    kvq_observer o = measure_observer(p->m);
    kvq_seen     seen = {.q = p->host[0], .k = p->host[1], .v = p->host[2]};
    (void)n_tokens;
    p->be->download(p->be, p->host[0], x->q, q_floats(p));
    p->be->download(p->be, p->host[1], x->k, kv_floats(p));
    p->be->download(p->be, p->host[2], x->v, kv_floats(p));
    return o.window(o.user, KVQ_PASS_FORWARD, layer, &seen, err);
}

static kvq_status see_backward(probe *p, kvq_error *err) {
    kvq_observer o = measure_observer(p->m);
    kvq_kv_view  view = kvq_workspace_kv(p->ws);
    const float *from[4] = {view.k, view.v, view.dk, view.dv};
    kvq_seen     seen = {.k = p->host[0], .v = p->host[1], .dk = p->host[2], .dv = p->host[3], .there = view};
    for (int i = 0; i < 4 && !o.wants_no_copies; i++) p->be->download(p->be, p->host[i], from[i], kv_floats(p));
    return o.window(o.user, KVQ_PASS_BACKWARD, 0, &seen, err);
}

// One window through layer 0 and the head; what it takes is in the probe.
static kvq_status pass_once(probe *p, kvq_error *err) {
    int64_t      S = p->seq_len, n = S * kvq_model_describe(p->model)->hidden_size;
    kvq_observer o = measure_observer(p->m);
    kvq_blob     result = {0};
    kvq_status   status = KVQ_OK;
    KVQ_TRY(o.begin(o.user, KVQ_PASS_FORWARD, 0, err));
    KVQ_TRY(kvq_model_embed(p->model, p->ids, S, p->x, err));
    double start = kvq_now_s();
    p->be->copy(p->be, p->y, p->x, n);
    KVQ_TRY(kvq_layer_forward(p->model, p->layer, p->ws, S, p->y, see_forward, p, err));
    p->forward_s = kvq_now_s() - start;
    start = kvq_now_s();
    KVQ_TRY(kvq_head_loss(p->model, p->head, p->ws, p->ids, S, p->y, p->gradients ? p->dx : NULL, p->nll, err));
    p->loss_s = kvq_now_s() - start;
    p->backward_s = p->forward_s; // without gradients the second pass is another forward one
    if (!p->gradients) goto done;
    KVQ_TRY(o.finish(o.user, KVQ_PASS_FORWARD, 0, &result, err)); // the histograms need thresholds
    KVQ_TRY(o.begin(o.user, KVQ_PASS_BACKWARD, 0, err));
    start = kvq_now_s();
    KVQ_TRY(kvq_layer_backward(p->model, p->layer, p->ws, S, p->x, p->dx, err));
    KVQ_TRY(see_backward(p, err));
    p->backward_s = kvq_now_s() - start;
done:
    kvq_blob_free(p->ctx, &result);
    return status;
}

static kvq_status prepare_probe(probe *p, const kvq_measure_options *options, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(p->model);
    int64_t                 S = p->seq_len, n = S * c->hidden_size;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(measure_create(p->ctx, p->be, options, measure_shape_of(c, S, 1), NULL, NULL, &p->m, err));
    KVQ_TRY(kvq_workspace_create(p->model, S, p->gradients, &p->ws, err));
    KVQ_TRY(p->be->alloc(p->be, n, "hidden state", &p->x, err));
    KVQ_TRY(p->be->alloc(p->be, n, "hidden state", &p->y, err));
    KVQ_TRY(p->be->alloc(p->be, n, "gradient", &p->dx, err));
    KVQ_TRY(KVQ_NEW(p->ctx, S, "token ids", &p->ids, err));
    KVQ_TRY(KVQ_NEW(p->ctx, S, "losses", &p->nll, err));
    for (int i = 0; i < 4; i++)
        KVQ_TRY(KVQ_NEW(p->ctx, i == 0 ? q_floats(p) : kv_floats(p), "K and V", &p->host[i], err));
    for (int64_t t = 0; t < S; t++)
        p->ids[t] = (int32_t)kvq_rng_below(0, KVQ_RNG_WINDOWS, 1, (uint64_t)t, (uint64_t)c->vocab_size);
    double start = kvq_now_s();
    KVQ_TRY(kvq_layer_load(p->model, 0, &p->layer, err));
    p->load_s = kvq_now_s() - start;
    KVQ_TRY(kvq_head_load(p->model, &p->head, err));
done:
    return status;
}

kvq_status kvq_calib_probe(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                           const kvq_measure_options *options, int64_t n_windows, int64_t seq_len, int64_t n_parts,
                           const kvq_calib_plan *plan, double *seconds, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    bool                    gradients = measure_needs_gradients(options);
    double                  L = (double)c->n_layers, mine = (double)((n_windows + n_parts - 1) / n_parts);
    double                  again = (double)(plan->stride - 1) / (double)plan->stride; // share of layers made again
    probe                   p = {.ctx = ctx, .be = be, .model = model, .gradients = gradients, .seq_len = seq_len};
    kvq_status              status = KVQ_OK;
    KVQ_TRY(prepare_probe(&p, options, err));
    for (int i = 0; i < 2; i++) KVQ_TRY(pass_once(&p, err)); // the first one also warms up; the second one counts
    *seconds = L * mine * ((1 + again) * p.forward_s + p.backward_s) + mine * p.loss_s + (2 + again) * L * p.load_s;
done:
    kvq_layer_release(model, &p.layer);
    kvq_head_release(model, &p.head);
    kvq_workspace_destroy(model, &p.ws);
    measure_destroy(ctx, &p.m);
    be->release(be, p.x);
    be->release(be, p.y);
    be->release(be, p.dx);
    for (int i = 0; i < 4; i++) kvq_free(ctx, p.host[i]);
    kvq_free(ctx, p.ids);
    kvq_free(ctx, p.nll);
    return status;
}
