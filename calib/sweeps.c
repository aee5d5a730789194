// SPDX-License-Identifier: Apache-2.0
//
// The two sweeps. Forward finds the thresholds of K layer by layer; backward weighs and counts every element of K and V
// and fits. Between layers nothing is in memory but the thresholds: hidden states and gradients are on scratch.
//
// What adds up across windows is either an integer count or a fixed-point sum, so the order of windows and the number
// of threads leave no trace in the result.
#include <stdio.h>
#include <string.h>

#include "calib_impl.h"
#include "kvq_fisher.h"

#define ROWS_PER_ITEM 256 // of one window, counted by one thread

typedef struct sweep {
    const kvq_context       *ctx;
    const kvq_backend       *be;
    kvq_model               *model;
    const kvq_model_config  *config;
    const kvq_windows       *windows;
    const kvq_calib_options *options;
    kvq_artifact            *artifact;
    kvq_scratch             *scratch;
    kvq_workspace           *ws;
    int                      d;
    float                   *x, *dx;            // backend [S, C]
    float                   *host_x;            // [S, C] between backend and scratch
    float                   *layer_k;           // forward: [N * (S - sinks), d] of one layer
    float                   *k, *v, *w_k, *w_v; // backward: host copies of one window, [S, d]
    float                   *z_and_r;           // [2 d]
    kvq_histogram          **histograms;        // [2 * n_threads]: K, then V
    int64_t                  window;            // the one being worked on, for messages
} sweep;

static kvq_status name_window(const sweep *s, kvq_status status, kvq_error *err) {
    if (status != KVQ_OK) kvq_error_prefix(err, "calibration window %lld: ", (long long)s->window);
    return status;
}

static kvq_status load_state(sweep *s, int64_t boundary, float *to, kvq_error *err) {
    kvq_status status = kvq_scratch_read(s->scratch, boundary, s->window, s->host_x, err);
    if (status == KVQ_OK) s->be->upload(s->be, to, s->host_x, s->windows->seq_len * s->config->hidden_size);
    return status;
}

static kvq_status store_state(sweep *s, int64_t boundary, const float *from, kvq_error *err) {
    s->be->download(s->be, s->host_x, from, s->windows->seq_len * s->config->hidden_size);
    return kvq_scratch_write(s->scratch, boundary, s->window, s->host_x, err);
}

// ---------------------------------------------------------------- forward

// Keeps K of this window, without its sinks, for the thresholds of the layer.
static kvq_status keep_k(void *user, int64_t layer, kvq_qkv x, int64_t n_tokens, kvq_error *err) {
    sweep  *s = user;
    int64_t sinks = s->options->sink_tokens, n = n_tokens - sinks;
    (void)layer, (void)err;
    s->be->download(s->be, s->layer_k + s->window * n * s->d, x.k + sinks * s->d, n * s->d);
    return KVQ_OK;
}

static kvq_status forward_layer(sweep *s, int64_t l, kvq_error *err) {
    kvq_tensor_quant *k = &s->artifact->layers[l].k;
    kvq_layer        *layer = NULL;
    int64_t           S = s->windows->seq_len, N = s->windows->n_windows;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(kvq_layer_load(s->model, l, &layer, err));
    for (s->window = 0; s->window < N; s->window++) {
        KVQ_TRY(load_state(s, l, s->x, err));
        KVQ_TRY(name_window(s, kvq_layer_forward(s->model, layer, s->ws, S, s->x, keep_k, s, err), err));
        KVQ_TRY(store_state(s, l + 1, s->x, err));
        kvq_report_progress(s->ctx, "forward", l * N + s->window + 1, s->config->n_layers * N);
    }
    KVQ_TRY(KVQ_NEW(s->ctx, s->d, "lower thresholds", &k->lower, err));
    KVQ_TRY(KVQ_NEW(s->ctx, s->d, "upper thresholds", &k->upper, err));
    KVQ_TRY(kvq_thresholds(s->ctx, s->layer_k, N * (S - s->options->sink_tokens), s->d, s->options->outlier_fraction,
                           k->lower, k->upper, err));

done:
    kvq_layer_release(s->model, &layer);
    return status;
}

static kvq_status forward_sweep(sweep *s, kvq_error *err) {
    int64_t    S = s->windows->seq_len;
    kvq_status status = KVQ_OK;
    for (s->window = 0; s->window < s->windows->n_windows; s->window++) {
        KVQ_TRY(name_window(s, kvq_model_embed(s->model, s->windows->ids + s->window * S, S, s->x, err), err));
        KVQ_TRY(store_state(s, 0, s->x, err));
    }
    for (int64_t l = 0; l < s->config->n_layers; l++) KVQ_TRY(forward_layer(s, l, err));

done:
    return status;
}

// ---------------------------------------------------------------- the loss

// Mean loss per token of the calibration text and, unless weights are off, its gradient at the last boundary.
static kvq_status loss_sweep(sweep *s, kvq_error *err) {
    bool       gradient = s->options->weighting != KVQ_WEIGHT_NONE;
    int64_t    S = s->windows->seq_len, N = s->windows->n_windows, last = s->config->n_layers;
    double    *nll = NULL, sum = 0;
    kvq_head  *head = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(s->ctx, S - 1, "losses", &nll, err));
    KVQ_TRY(kvq_head_load(s->model, &head, err));
    for (s->window = 0; s->window < N; s->window++) {
        const int32_t *ids = s->windows->ids + s->window * S;
        KVQ_TRY(load_state(s, last, s->x, err));
        KVQ_TRY(
            name_window(s, kvq_head_loss(s->model, head, s->ws, ids, S, s->x, gradient ? s->dx : NULL, nll, err), err));
        for (int64_t t = 0; t < S - 1; t++) sum += nll[t];
        if (gradient) KVQ_TRY(store_state(s, KVQ_SCRATCH_GRADIENT, s->dx, err));
        kvq_report_progress(s->ctx, "loss", s->window + 1, N);
    }
    s->artifact->baseline_nll = sum / (double)(N * (S - 1));
    kvq_scratch_drop(s->scratch, last);

done:
    kvq_head_release(s->model, &head);
    kvq_free(s->ctx, nll);
    return status;
}

// ---------------------------------------------------------------- backward

// Rows of one tensor of one window are cut into items; each thread counts into histograms of its own.
typedef struct count_job {
    sweep         *s;
    kvq_block_spec specs[2]; // K, V
    kvq_status    *statuses; // per item
    int64_t        n_blocks;
} count_job;

static kvq_status count_block(const count_job *job, int64_t item, int worker, kvq_error *err) {
    const sweep      *s = job->s;
    int               tensor = (int)(item / job->n_blocks);
    int64_t           S = s->windows->seq_len, first = item % job->n_blocks * ROWS_PER_ITEM;
    int64_t           n = S - first < ROWS_PER_ITEM ? S - first : ROWS_PER_ITEM, sinks = s->options->sink_tokens;
    const float      *x = tensor == 0 ? s->k : s->v, *w = tensor == 0 ? s->w_k : s->w_v;
    kvq_count_options options = {.range_squared = s->options->weighting == KVQ_WEIGHT_FISHER_SCALED,
                                 .n_skip = sinks <= first      ? 0
                                           : sinks - first < n ? sinks - first
                                                               : n};
    bool              weighted = s->options->weighting != KVQ_WEIGHT_NONE;
    return kvq_histogram_count_rows(s->histograms[2 * worker + tensor], &job->specs[tensor], x + first * s->d,
                                    weighted ? w + first * s->d : NULL, n, options, err);
}

static void count_item(void *user, int64_t item, int worker) {
    count_job *job = user;
    job->statuses[item] = count_block(job, item, worker, NULL);
}

static kvq_status count_window(count_job *job, int64_t layer, kvq_error *err) {
    kvq_parallel_for(job->s->ctx, 2 * job->n_blocks, count_item, job);
    for (int64_t item = 0; item < 2 * job->n_blocks; item++) {
        if (job->statuses[item] == KVQ_OK) continue;
        (void)count_block(job, item, 0, err); // again, for its message
        kvq_error_prefix(err, "layer %lld, %s, positions from %lld: ", (long long)layer,
                         item < job->n_blocks ? "K" : "V", (long long)(item % job->n_blocks * ROWS_PER_ITEM));
        return name_window(job->s, job->statuses[item], err);
    }
    return KVQ_OK;
}

// Without weights K and V are all that is needed, and a forward pass gives them.
static kvq_status fetch_kv(void *user, int64_t layer, kvq_qkv x, int64_t n_tokens, kvq_error *err) {
    sweep *s = user;
    (void)layer, (void)err;
    s->be->download(s->be, s->k, x.k, n_tokens * s->d);
    s->be->download(s->be, s->v, x.v, n_tokens * s->d);
    return KVQ_OK;
}

static void fetch_weighted_kv(sweep *s, int64_t n) {
    kvq_kv_view view = kvq_workspace_kv(s->ws);
    s->be->download(s->be, s->k, view.k, n);
    s->be->download(s->be, s->v, view.v, n);
    s->be->download(s->be, s->w_k, view.dk, n);
    s->be->download(s->be, s->w_v, view.dv, n);
    kvq_fisher_diagonal(s->w_k, n, s->w_k);
    kvq_fisher_diagonal(s->w_v, n, s->w_v);
}

static kvq_status recompute_window(sweep *s, const kvq_layer *layer, int64_t l, kvq_error *err) {
    int64_t    S = s->windows->seq_len;
    kvq_status status = KVQ_OK;
    KVQ_TRY(load_state(s, l, s->x, err));
    if (s->options->weighting == KVQ_WEIGHT_NONE) {
        KVQ_TRY(name_window(s, kvq_layer_forward(s->model, layer, s->ws, S, s->x, fetch_kv, s, err), err));
        return KVQ_OK;
    }
    KVQ_TRY(load_state(s, KVQ_SCRATCH_GRADIENT, s->dx, err));
    KVQ_TRY(name_window(s, kvq_layer_backward(s->model, layer, s->ws, S, s->x, s->dx, err), err));
    KVQ_TRY(store_state(s, KVQ_SCRATCH_GRADIENT, s->dx, err));
    fetch_weighted_kv(s, S * s->d);

done:
    return status;
}

// A fit without any weight would be an unweighted one under the name of a weighted one.
static kvq_status check_weights(const sweep *s, int64_t layer, int tensor, const kvq_fit_report *fit, kvq_error *err) {
    if (s->options->weighting == KVQ_WEIGHT_NONE || fit->n_points == 0 || fit->weight_sum > 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, "use more or longer windows, or --weighting none",
                    "layer %lld, %s: the loss does not feel any of the %lld elements, their weights are all zero",
                    (long long)layer, tensor == 0 ? "K" : "V", (long long)fit->n_points);
}

static kvq_status fit_tensor(sweep *s, int64_t layer, int tensor, kvq_tensor_quant *out, kvq_error *err) {
    kvq_histogram *total = s->histograms[tensor];
    kvq_status     status = KVQ_OK;
    for (int worker = 1; worker < s->ctx->n_threads; worker++)
        kvq_histogram_merge(total, s->histograms[2 * worker + tensor]);
    KVQ_TRY(KVQ_NEW(s->ctx, out->n_levels, "codebook", &out->codebook, err));
    KVQ_TRY(kvq_fit_histogram(s->ctx, total, out->bits, out->codebook, &out->fit, err));
    KVQ_TRY(check_weights(s, layer, tensor, &out->fit, err));
    kvq_log(s->ctx, KVQ_LOG_DEBUG,
            "layer %lld %s: %lld elements worth %.0f samples, %lld outliers, weighted error %.3e", (long long)layer,
            tensor == 0 ? "K" : "V", (long long)out->fit.n_points, out->fit.effective_samples,
            (long long)out->fit.n_outliers, out->fit.objective);
    if (s->options->weighting != KVQ_WEIGHT_NONE && out->fit.n_points > 0 &&
        out->fit.effective_samples < out->n_levels) {
        kvq_log(
            s->ctx, KVQ_LOG_WARNING,
            "layer %lld %s: the weights make %lld elements worth %.1f samples, too few for %d levels; use more text",
            (long long)layer, tensor == 0 ? "K" : "V", (long long)out->fit.n_points, out->fit.effective_samples,
            out->n_levels);
    }

done:
    return status;
}

static kvq_status create_histograms(sweep *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2 * s->ctx->n_threads && status == KVQ_OK; i++)
        status = kvq_histogram_create(s->ctx, &s->histograms[i], err);
    return status;
}

static void destroy_histograms(sweep *s) {
    for (int i = 0; s->histograms != NULL && i < 2 * s->ctx->n_threads; i++)
        kvq_histogram_destroy(s->ctx, &s->histograms[i]);
}

static kvq_status backward_layer(sweep *s, int64_t l, kvq_error *err) {
    kvq_layer_quant *quant = &s->artifact->layers[l];
    int64_t          N = s->windows->n_windows, L = s->config->n_layers;
    kvq_layer       *layer = NULL;
    count_job        job = {.s = s, .n_blocks = (s->windows->seq_len + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM};
    kvq_status       status = KVQ_OK;
    job.specs[0] = kvq_tensor_block_spec(&quant->k, s->d, s->artifact->quantizer.n_side_k, s->z_and_r);
    job.specs[1] = kvq_tensor_block_spec(&quant->v, s->d, s->artifact->quantizer.n_side_v, NULL);
    KVQ_TRY(KVQ_NEW(s->ctx, 2 * job.n_blocks, "block statuses", &job.statuses, err));
    KVQ_TRY(create_histograms(s, err));
    KVQ_TRY(kvq_layer_load(s->model, l, &layer, err));
    for (s->window = 0; s->window < N; s->window++) {
        KVQ_TRY(recompute_window(s, layer, l, err));
        KVQ_TRY(count_window(&job, l, err));
        kvq_report_progress(s->ctx, "backward", (L - 1 - l) * N + s->window + 1, L * N);
    }
    KVQ_TRY(fit_tensor(s, l, 0, &quant->k, err));
    KVQ_TRY(fit_tensor(s, l, 1, &quant->v, err));
    kvq_scratch_drop(s->scratch, l);

done:
    kvq_layer_release(s->model, &layer);
    destroy_histograms(s);
    kvq_free(s->ctx, job.statuses);
    return status;
}

// ---------------------------------------------------------------- the whole run

static void describe_tensor(kvq_tensor_quant *t, int bits, kvq_axis axis) {
    t->bits = bits;
    t->axis = axis;
    t->n_groups = t->dim = 1;
    t->n_levels = 1 << bits;
}

static kvq_status describe_artifact(sweep *s, kvq_error *err) {
    const kvq_model_config *c = s->config;
    kvq_artifact           *a = s->artifact;
    kvq_status              status = KVQ_OK;
    a->model.n_layers = c->n_layers;
    a->model.hidden_size = c->hidden_size;
    a->model.n_heads = c->n_heads;
    a->model.n_kv_heads = c->n_kv_heads;
    a->model.head_dim = c->head_dim;
    a->model.vocab_size = c->vocab_size;
    a->model.rope_theta = c->rope.theta;
    a->dataset.n_available_tokens = s->windows->n_available;
    a->dataset.n_samples = s->windows->n_windows;
    a->dataset.seq_len = s->windows->seq_len;
    strcpy(a->dataset.source_sha256, s->windows->source_sha256);
    strcpy(a->dataset.token_ids_sha256, s->windows->ids_sha256);
    a->tokenizer.bos_added = s->windows->bos_added;
    a->quantizer.outlier_fraction = s->options->outlier_fraction;
    a->quantizer.n_side_k = a->quantizer.n_side_v = kvq_block_n_side(s->options->outlier_fraction, s->d);
    a->quantizer.sink_tokens = s->options->sink_tokens;
    a->quantizer.weighting = s->options->weighting;
    for (int64_t l = 0; l < c->n_layers; l++) {
        describe_tensor(&a->layers[l].k, s->options->k_bits, KVQ_AXIS_CHANNEL);
        describe_tensor(&a->layers[l].v, s->options->v_bits, KVQ_AXIS_TOKEN);
    }
    KVQ_TRY(kvq_artifact_set_text(s->ctx, &a->model.architecture, c->architecture, err));
    KVQ_TRY(kvq_artifact_set_text(s->ctx, &a->model.rope_type, kvq_rope_type_name(c->rope.type), err));
    KVQ_TRY(kvq_artifact_set_text(s->ctx, &a->dataset.source, s->windows->source, err));
    KVQ_TRY(kvq_artifact_set_text(s->ctx, &a->quantizer.scheme, "nuq", err));

done:
    return status;
}

static kvq_status allocate(sweep *s, kvq_error *err) {
    int64_t    S = s->windows->seq_len, state = S * s->config->hidden_size, kv = S * s->d;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_artifact_create(s->ctx, s->config->n_layers, &s->artifact, err));
    KVQ_TRY(kvq_scratch_create(s->ctx, s->options->scratch_dir, s->config->n_layers + 1, state, &s->scratch, err));
    KVQ_TRY(kvq_workspace_create(s->model, S, s->options->weighting != KVQ_WEIGHT_NONE, &s->ws, err));
    KVQ_TRY(s->be->alloc(s->be, state, "hidden state", &s->x, err));
    KVQ_TRY(s->be->alloc(s->be, state, "gradient", &s->dx, err));
    KVQ_TRY(KVQ_NEW(s->ctx, state, "hidden state", &s->host_x, err));
    KVQ_TRY(KVQ_NEW(s->ctx, kv, "K of a window", &s->k, err));
    KVQ_TRY(KVQ_NEW(s->ctx, kv, "V of a window", &s->v, err));
    KVQ_TRY(KVQ_NEW(s->ctx, kv, "weights of K", &s->w_k, err));
    KVQ_TRY(KVQ_NEW(s->ctx, kv, "weights of V", &s->w_v, err));
    KVQ_TRY(KVQ_NEW(s->ctx, 2 * s->d, "offsets and ranges", &s->z_and_r, err));
    KVQ_TRY(KVQ_NEW(s->ctx, 2 * s->ctx->n_threads, "histograms", &s->histograms, err));
    KVQ_TRY(KVQ_NEW(s->ctx, s->windows->n_windows * (S - s->options->sink_tokens) * s->d, "K of one layer", &s->layer_k,
                    err));

done:
    return status;
}

static void release(sweep *s) {
    kvq_scratch_destroy(s->ctx, &s->scratch);
    kvq_workspace_destroy(s->model, &s->ws);
    s->be->release(s->be, s->x);
    s->be->release(s->be, s->dx);
    float *host[] = {s->host_x, s->k, s->v, s->w_k, s->w_v, s->z_and_r, s->layer_k};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) kvq_free(s->ctx, host[i]);
    kvq_free(s->ctx, s->histograms);
    kvq_artifact_destroy(s->ctx, &s->artifact);
}

kvq_status kvq_calibrate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                         const kvq_calib_options *options, kvq_artifact **out, kvq_error *err) {
    const kvq_model_config *config = kvq_model_describe(model);
    sweep                   s = {.ctx = ctx,
                                 .be = be,
                                 .model = model,
                                 .config = config,
                                 .windows = windows,
                                 .options = options,
                                 .d = config->n_kv_heads * config->head_dim};
    kvq_status              status = KVQ_OK;
    KVQ_TRY(kvq_calib_options_check(options, config, windows->seq_len, err));
    KVQ_TRY(allocate(&s, err));
    KVQ_TRY(describe_artifact(&s, err));
    KVQ_TRY(forward_sweep(&s, err));
    kvq_free(ctx, s.layer_k); // the sweeps never need it at the same time as the histograms
    s.layer_k = NULL;
    KVQ_TRY(loss_sweep(&s, err));
    for (int64_t l = config->n_layers - 1; l >= 0; l--) KVQ_TRY(backward_layer(&s, l, err));
    *out = s.artifact;
    s.artifact = NULL;

done:
    release(&s);
    return status;
}
