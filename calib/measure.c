// SPDX-License-Identifier: Apache-2.0
//
// What a calibration keeps of what it sees: in the forward pass the ends of K per channel, which give the thresholds;
// in the backward pass histograms of the normalised elements of K and V, which give the levels. Both are order
// statistics, integer counts and fixed-point sums, so parts merge exactly.
#include <string.h>

#include "calib_impl.h"
#include "kvq_fisher.h"

struct measure {
    const kvq_context       *ctx;
    const kvq_calib_options *options;
    kvq_artifact            *artifact;
    int                      d, n_counters;
    int64_t                  seq_len, n_rows; // n_rows: of all windows, sinks left out
    bool                     raw;             // results are what was seen
    kvq_tails               *tails;           // forward
    kvq_histogram          **histograms;      // [2 * n_counters], backward: K and V of each thread
    float                   *w_k, *w_v;       // [S, d]
    float                   *z_and_r;         // [2 d]
    kvq_block_spec           specs[2];        // K, V
};

static const char *const TENSOR_NAMES[] = {"K", "V"};

// An array of the artifact, which an earlier pass over the layer may have made.
static kvq_status make_array(const measure *m, int64_t n, const char *what, float **array, kvq_error *err) {
    return *array != NULL ? KVQ_OK : KVQ_NEW(m->ctx, n, what, array, err);
}

static void destroy_histograms(measure *m) {
    for (int i = 0; m->histograms != NULL && i < 2 * m->n_counters; i++)
        kvq_histogram_destroy(m->ctx, &m->histograms[i]);
}

// ---------------------------------------------------------------- forward: thresholds

static kvq_status begin_forward(measure *m, kvq_error *err) {
    destroy_histograms(m); // the passes never need both
    kvq_tails_destroy(m->ctx, &m->tails);
    return kvq_tails_create(m->ctx, m->d, kvq_tails_needed(m->options->outlier_fraction, m->n_rows), &m->tails, err);
}

static kvq_status save_tails(const measure *m, kvq_blob *out, kvq_error *err) {
    uint8_t   *at = NULL;
    int64_t    n_rows = kvq_tails_rows(m->tails);
    kvq_status status = kvq_blob_append(m->ctx, out, &n_rows, sizeof n_rows, err);
    int64_t    bytes = 2 * m->d * kvq_tails_width(m->tails) * (int64_t)sizeof(float);
    if (status == KVQ_OK) status = kvq_blob_extend(m->ctx, out, bytes, &at, err);
    if (status == KVQ_OK) kvq_tails_pack(m->ctx, m->tails, (float *)(void *)at);
    return status;
}

static kvq_status merge_tails(measure *m, blob_reader *in, kvq_error *err) {
    float     *packed = NULL;
    int64_t    n_rows = 0, n_keep = kvq_tails_needed(m->options->outlier_fraction, m->n_rows);
    kvq_status status = KVQ_OK;
    KVQ_TRY(blob_take(in, &n_rows, sizeof n_rows, err));
    if (n_rows < 0 || n_rows > m->n_rows) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "saved statistics speak of %lld rows of %lld", (long long)n_rows,
                         (long long)m->n_rows));
    }
    int64_t n = 2 * m->d * (n_rows < n_keep ? n_rows : n_keep);
    if (n * (int64_t)sizeof *packed > in->left) KVQ_TRY(blob_take(in, NULL, n * (int64_t)sizeof *packed, err));
    KVQ_TRY(KVQ_NEW(m->ctx, n, "extreme values", &packed, err));
    KVQ_TRY(blob_take(in, packed, n * (int64_t)sizeof *packed, err));
    KVQ_TRY(kvq_tails_merge(m->ctx, m->tails, packed, n_rows, err));
done:
    kvq_free(m->ctx, packed);
    return status;
}

static kvq_status find_thresholds(measure *m, int64_t layer, kvq_blob *result, kvq_error *err) {
    kvq_tensor_quant *k = &m->artifact->layers[layer].k;
    int64_t           bytes = m->d * (int64_t)sizeof(float);
    kvq_status        status = KVQ_OK;
    KVQ_TRY(make_array(m, m->d, "lower thresholds", &k->lower, err));
    KVQ_TRY(make_array(m, m->d, "upper thresholds", &k->upper, err));
    KVQ_TRY(kvq_tails_thresholds(m->ctx, m->tails, m->options->outlier_fraction, k->lower, k->upper, err));
    KVQ_TRY(kvq_blob_append(m->ctx, result, k->lower, bytes, err));
    KVQ_TRY(kvq_blob_append(m->ctx, result, k->upper, bytes, err));
done:
    return status;
}

static kvq_status restore_thresholds(measure *m, int64_t layer, blob_reader *in, kvq_error *err) {
    kvq_tensor_quant *k = &m->artifact->layers[layer].k;
    int64_t           bytes = m->d * (int64_t)sizeof(float);
    kvq_status        status = KVQ_OK;
    KVQ_TRY(make_array(m, m->d, "lower thresholds", &k->lower, err));
    KVQ_TRY(make_array(m, m->d, "upper thresholds", &k->upper, err));
    KVQ_TRY(blob_take(in, k->lower, bytes, err));
    KVQ_TRY(blob_take(in, k->upper, bytes, err));
done:
    return status;
}

// ---------------------------------------------------------------- backward: histograms

static kvq_status begin_backward(measure *m, int64_t layer, kvq_error *err) {
    const kvq_layer_quant *quant = &m->artifact->layers[layer];
    kvq_status             status = KVQ_OK;
    kvq_tails_destroy(m->ctx, &m->tails);
    destroy_histograms(m);
    for (int i = 0; i < 2 * m->n_counters; i++) KVQ_TRY(kvq_histogram_create(m->ctx, &m->histograms[i], err));
    m->specs[0] = kvq_tensor_block_spec(&quant->k, m->d, m->artifact->quantizer.n_side_k, m->z_and_r);
    m->specs[1] = kvq_tensor_block_spec(&quant->v, m->d, m->artifact->quantizer.n_side_v, NULL);
done:
    return status;
}

kvq_status measure_count(measure *m, int64_t layer, const float *k, const float *v, const float *w_k, const float *w_v,
                         kvq_error *err) {
    kvq_context            counters = *m->ctx;
    const kvq_count_tensor tensors[] = {{TENSOR_NAMES[0], &m->specs[0], k, w_k},
                                        {TENSOR_NAMES[1], &m->specs[1], v, w_v}};
    kvq_count_options      options = {.range_squared = m->options->weighting == KVQ_WEIGHT_FISHER_SCALED,
                                      .n_skip = m->options->sink_tokens};
    counters.n_threads = m->n_counters;
    kvq_status status = kvq_histograms_count(&counters, m->histograms, tensors, 2, m->seq_len, options, err);
    if (status != KVQ_OK) kvq_error_prefix(err, "layer %lld, ", (long long)layer);
    return status;
}

static kvq_status count_seen(measure *m, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    if (m->options->weighting == KVQ_WEIGHT_NONE) return measure_count(m, layer, seen->k, seen->v, NULL, NULL, err);
    kvq_fisher_diagonal(seen->dk, m->seq_len * m->d, m->w_k);
    kvq_fisher_diagonal(seen->dv, m->seq_len * m->d, m->w_v);
    return measure_count(m, layer, seen->k, seen->v, m->w_k, m->w_v, err);
}

static kvq_status save_histograms(measure *m, kvq_blob *out, kvq_error *err) {
    uint8_t   *at = NULL;
    kvq_status status = KVQ_OK;
    kvq_histograms_gather(m->histograms, m->n_counters, 2);
    for (int tensor = 0; tensor < 2; tensor++) {
        int64_t bytes = kvq_histogram_packed_bytes(m->histograms[tensor]);
        KVQ_TRY(kvq_blob_append(m->ctx, out, &bytes, sizeof bytes, err));
        KVQ_TRY(kvq_blob_extend(m->ctx, out, bytes, &at, err));
        kvq_histogram_pack(m->histograms[tensor], at);
    }
done:
    return status;
}

static kvq_status merge_histograms(measure *m, blob_reader *in, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int tensor = 0; tensor < 2; tensor++) {
        int64_t bytes = 0;
        KVQ_TRY(blob_take(in, &bytes, sizeof bytes, err));
        if (bytes < 0 || bytes > in->left) {
            KVQ_TRY(kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "saved statistics of %lld bytes end too early",
                             (long long)bytes));
        }
        KVQ_TRY(kvq_histogram_merge_packed(m->histograms[tensor], in->at, bytes, err));
        in->at += bytes;
        in->left -= bytes;
    }
done:
    return status;
}

// A fit without any weight would be an unweighted one under the name of a weighted one.
static kvq_status check_weights(const measure *m, int64_t layer, int tensor, const kvq_fit_report *fit,
                                kvq_error *err) {
    if (m->options->weighting == KVQ_WEIGHT_NONE || fit->n_points == 0) return KVQ_OK;
    if (!(fit->weight_sum > 0)) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, "use more or longer windows, or no weighting",
                        "layer %lld, %s: the loss does not feel any of the %lld elements, their weights are all zero",
                        (long long)layer, TENSOR_NAMES[tensor], (long long)fit->n_points);
    }
    int n_levels = 1 << (tensor == 0 ? m->options->k_bits : m->options->v_bits);
    if (fit->effective_samples < n_levels) {
        kvq_log(m->ctx, KVQ_LOG_WARNING,
                "layer %lld %s: the weights make %lld elements worth %.1f samples, too few for %d levels; use more "
                "text",
                (long long)layer, TENSOR_NAMES[tensor], (long long)fit->n_points, fit->effective_samples, n_levels);
    }
    return KVQ_OK;
}

static kvq_status fit_tensor(measure *m, int64_t layer, int tensor, kvq_tensor_quant *out, kvq_blob *result,
                             kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(make_array(m, out->n_levels, "codebook", &out->codebook, err));
    KVQ_TRY(kvq_fit_histogram(m->ctx, m->histograms[tensor], out->bits, out->codebook, &out->fit, err));
    KVQ_TRY(check_weights(m, layer, tensor, &out->fit, err));
    kvq_log(m->ctx, KVQ_LOG_DEBUG,
            "layer %lld %s: %lld elements worth %.0f samples, %lld outliers, weighted error %.3e", (long long)layer,
            TENSOR_NAMES[tensor], (long long)out->fit.n_points, out->fit.effective_samples,
            (long long)out->fit.n_outliers, out->fit.objective);
    KVQ_TRY(kvq_blob_append(m->ctx, result, out->codebook, out->n_levels * (int64_t)sizeof(float), err));
    KVQ_TRY(kvq_blob_append(m->ctx, result, &out->fit, sizeof out->fit, err));
done:
    return status;
}

static kvq_status restore_tensor(measure *m, kvq_tensor_quant *out, blob_reader *in, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(make_array(m, out->n_levels, "codebook", &out->codebook, err));
    KVQ_TRY(blob_take(in, out->codebook, out->n_levels * (int64_t)sizeof(float), err));
    KVQ_TRY(blob_take(in, &out->fit, sizeof out->fit, err));
done:
    return status;
}

// ---------------------------------------------------------------- the observer

static kvq_status begin(void *user, kvq_pass pass, int64_t layer, kvq_error *err) {
    measure *m = user;
    return pass == KVQ_PASS_FORWARD ? begin_forward(m, err) : begin_backward(m, layer, err);
}

static kvq_status window(void *user, kvq_pass pass, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    measure *m = user;
    int64_t  sinks = m->options->sink_tokens;
    if (pass == KVQ_PASS_BACKWARD) return count_seen(m, layer, seen, err);
    return kvq_tails_push(m->ctx, m->tails, seen->k + sinks * m->d, m->seq_len - sinks, err);
}

static kvq_status save(void *user, kvq_pass pass, int64_t layer, kvq_blob *out, kvq_error *err) {
    measure *m = user;
    (void)layer;
    return pass == KVQ_PASS_FORWARD ? save_tails(m, out, err) : save_histograms(m, out, err);
}

static kvq_status merge(void *user, kvq_pass pass, int64_t layer, const uint8_t *data, int64_t bytes, kvq_error *err) {
    measure    *m = user;
    blob_reader in = {data, bytes};
    (void)layer;
    kvq_status status = pass == KVQ_PASS_FORWARD ? merge_tails(m, &in, err) : merge_histograms(m, &in, err);
    if (status != KVQ_OK || in.left == 0) return status;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "saved statistics have %lld bytes too many", (long long)in.left);
}

static kvq_status finish(void *user, kvq_pass pass, int64_t layer, kvq_blob *result, kvq_error *err) {
    measure         *m = user;
    kvq_layer_quant *quant = &m->artifact->layers[layer];
    if (m->raw) return save(user, pass, layer, result, err);
    if (pass == KVQ_PASS_FORWARD) return find_thresholds(m, layer, result, err);
    kvq_histograms_gather(m->histograms, m->n_counters, 2);
    kvq_status status = fit_tensor(m, layer, 0, &quant->k, result, err);
    return status == KVQ_OK ? fit_tensor(m, layer, 1, &quant->v, result, err) : status;
}

static kvq_status restore(void *user, kvq_pass pass, int64_t layer, const uint8_t *data, int64_t bytes,
                          kvq_error *err) {
    measure         *m = user;
    kvq_layer_quant *quant = &m->artifact->layers[layer];
    blob_reader      in = {data, bytes};
    if (m->raw) return KVQ_OK; // waits in the work directory for whoever merges it
    if (pass == KVQ_PASS_FORWARD) return restore_thresholds(m, layer, &in, err);
    kvq_status status = restore_tensor(m, &quant->k, &in, err);
    return status == KVQ_OK ? restore_tensor(m, &quant->v, &in, err) : status;
}

kvq_observer measure_observer(measure *m) {
    return (kvq_observer){.user = m,
                          .wants_second_pass = true,
                          .wants_gradients = m->options->weighting != KVQ_WEIGHT_NONE,
                          .begin = begin,
                          .window = window,
                          .finish = finish,
                          .save = save,
                          .merge = merge,
                          .restore = restore};
}

void measure_keep_raw(measure *m) { m->raw = true; }

int64_t measure_bytes(const kvq_context *ctx, const kvq_calib_options *options, int d, int64_t n_rows) {
    int64_t tails = kvq_tails_bytes(d, kvq_tails_needed(options->outlier_fraction, n_rows));
    int64_t histograms = 2 * ctx->n_threads * (int64_t)(KVQ_HISTOGRAM_BINS * sizeof(kvq_bin));
    return tails > histograms ? tails : histograms;
}

kvq_status measure_create(const kvq_context *ctx, const kvq_calib_options *options, int d, int64_t seq_len,
                          int64_t n_windows, kvq_artifact *artifact, measure **out, kvq_error *err) {
    measure   *m = NULL;
    int64_t    n = seq_len * d;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "measurement", &m, err));
    m->ctx = ctx;
    m->options = options;
    m->artifact = artifact;
    m->d = d;
    m->n_counters = ctx->n_threads;
    m->seq_len = seq_len;
    m->n_rows = n_windows * (seq_len - options->sink_tokens);
    KVQ_TRY(KVQ_NEW(ctx, n, "weights of K", &m->w_k, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "weights of V", &m->w_v, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * d, "offsets and ranges", &m->z_and_r, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * m->n_counters, "histograms", &m->histograms, err));
    *out = m;
    m = NULL;
done:
    measure_destroy(ctx, &m);
    return status;
}

void measure_destroy(const kvq_context *ctx, measure **m) {
    if (*m == NULL) return;
    destroy_histograms(*m);
    kvq_tails_destroy(ctx, &(*m)->tails);
    kvq_free(ctx, (*m)->histograms);
    kvq_free(ctx, (*m)->w_k);
    kvq_free(ctx, (*m)->w_v);
    kvq_free(ctx, (*m)->z_and_r);
    kvq_free(ctx, *m);
    *m = NULL;
}
