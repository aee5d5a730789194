// SPDX-License-Identifier: Apache-2.0
//
// What a calibration keeps of what it sees: in the forward pass the ends of K per channel, which give the thresholds,
// and second moments; in the backward pass histograms of the normalised elements of K and V, for every KV head and
// every outlier fraction. All are order statistics, integer counts and fixed-point sums, so parts merge exactly.
#include <string.h>

#include "calib_impl.h"
#include "kvq_fisher.h"

enum { K, V, N_TENSORS };
static const char *const TENSOR_NAMES[] = {"K", "V"};

struct measure {
    const kvq_context         *ctx;
    const kvq_measure_options *options;
    measure_shape              shape;
    const kvq_fit_options     *fit;      // NULL: layers are only measured
    kvq_artifact              *artifact; // what is fitted
    int                        d;
    int64_t                    n_rows;     // behind all thresholds
    bool                       raw;        // results are what was seen
    kvq_tails                 *tails;      // forward
    kvq_fixed                 *moments[3]; // forward: of Q, K and V, [heads, D, D]
    double                    *moment_scratch;
    kvq_histogram            **histograms;   // backward: [n_fractions, N_TENSORS, Hkv]
    float                     *thresholds;   // see measure_thresholds
    float                     *w[N_TENSORS]; // [S, d] squared gradients
    float                     *scratch;      // of counting
    float                     *z_and_r;      // [2 d]
    device_counts             *device;       // NULL: the host counts
    const kvq_backend         *be;           // whose it is
    tile_measure              *tiles;        // NULL unless options->allocated
};

measure_shape measure_shape_of(const kvq_model_config *c, int64_t seq_len, int64_t n_windows) {
    return (measure_shape){c->n_layers, seq_len, n_windows, c->n_heads, c->n_kv_heads, c->head_dim};
}

measure_shape measure_shape_of_artifact(const kvq_artifact *a) {
    return (measure_shape){a->model.n_layers,     a->dataset.seq_len,       a->dataset.n_samples,
                           (int)a->model.n_heads, (int)a->model.n_kv_heads, (int)a->model.head_dim};
}

// Rows that thresholds are taken over.
static int64_t threshold_rows(const kvq_measure_options *o, measure_shape shape) {
    return shape.n_windows * (shape.seq_len - (o->count_sinks ? 0 : o->sink_tokens));
}

static int64_t kept_ends(const kvq_measure_options *o, measure_shape shape) {
    return kvq_tails_needed(o->fractions[o->n_fractions - 1], o->threshold_scope, measure_width(shape),
                            threshold_rows(o, shape));
}

bool measure_needs_gradients(const kvq_measure_options *o) {
    return kvq_weightings_need_gradients(o->weightings) ||
           (o->allocated && kvq_weighting_needs_gradients(o->channel_weighting));
}

static bool has_thresholds(const kvq_measure_options *o) { return o->k_axis == KVQ_AXIS_CHANNEL; }

// Of one layer, all fractions.
static int64_t threshold_count(const kvq_measure_options *o, measure_shape shape) {
    return has_thresholds(o) ? o->n_fractions * 2 * measure_width(shape) : 0;
}

// Of counting on the host.
static int64_t count_scratch_floats(measure_shape shape) {
    return N_TENSORS * kvq_count_scratch_floats(shape.seq_len, measure_width(shape));
}

static int64_t moment_count(measure_shape shape, int which) {
    return (int64_t)(which == 0 ? shape.n_heads : shape.n_kv_heads) * shape.head_dim * shape.head_dim;
}

// ---------------------------------------------------------------- thresholds

int64_t measure_thresholds_count(const measure *m) { return m->shape.n_layers * threshold_count(m->options, m->shape); }

float *measure_thresholds(measure *m) { return m->thresholds; }

static float *lower_of(const measure *m, int64_t layer, int fraction) {
    return m->thresholds + (layer * m->options->n_fractions + fraction) * 2 * m->d;
}

static kvq_status find_thresholds(measure *m, int64_t layer, kvq_error *err) {
    for (int f = 0; f < m->options->n_fractions && has_thresholds(m->options); f++) {
        float     *lower = lower_of(m, layer, f);
        kvq_status status = kvq_tails_thresholds(m->ctx, m->tails, m->options->fractions[f],
                                                 m->options->threshold_scope, lower, lower + m->d, err);
        if (status != KVQ_OK) return status;
        for (int c = 0; c < 2 * m->d && m->options->half_thresholds; c++)
            lower[c] = kvq_float_of_half(kvq_half_of_float(lower[c]));
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- forward

static void drop_histograms(measure *m) {
    int n = measure_histograms(m->options, m->shape);
    for (int i = 0; m->histograms != NULL && i < n; i++) kvq_histogram_destroy(m->ctx, &m->histograms[i]);
    if (m->device != NULL) device_counts_drop(m->device);
}

static void drop_forward(measure *m) {
    kvq_tails_destroy(m->ctx, &m->tails);
    for (int i = 0; i < 3; i++) {
        kvq_free(m->ctx, m->moments[i]);
        m->moments[i] = NULL;
    }
    kvq_free(m->ctx, m->moment_scratch);
    m->moment_scratch = NULL;
    if (m->tiles != NULL) measure_tiles_drop(m->tiles);
}

// The passes never need what the other one keeps.
static kvq_status begin_forward(measure *m, kvq_error *err) {
    kvq_status status = KVQ_OK;
    drop_histograms(m);
    drop_forward(m);
    if (m->tiles != NULL) measure_tiles_begin_forward(m->tiles);
    if (has_thresholds(m->options))
        KVQ_TRY(kvq_tails_create(m->ctx, m->d, kept_ends(m->options, m->shape), &m->tails, err));
    for (int i = 0; i < 3 && m->options->moments; i++)
        KVQ_TRY(KVQ_NEW(m->ctx, moment_count(m->shape, i), "second moments", &m->moments[i], err));
    if (m->options->moments) {
        KVQ_TRY(KVQ_NEW(m->ctx, kvq_moments_scratch_doubles(m->shape.n_heads, m->shape.head_dim), "second moments",
                        &m->moment_scratch, err));
    }
done:
    return status;
}

static kvq_status see_forward(measure *m, const kvq_seen *seen, kvq_error *err) {
    int64_t skip = m->options->sink_tokens, n = m->shape.seq_len - skip;
    int     H = m->shape.n_heads, Hkv = m->shape.n_kv_heads, D = m->shape.head_dim;
    if (m->options->moments) {
        kvq_moments_add(m->ctx, seen->q + skip * H * D, n, H, D, m->moments[0], m->moment_scratch);
        kvq_moments_add(m->ctx, seen->k + skip * m->d, n, Hkv, D, m->moments[1], m->moment_scratch);
        kvq_moments_add(m->ctx, seen->v + skip * m->d, n, Hkv, D, m->moments[2], m->moment_scratch);
    }
    if (m->tiles != NULL) measure_tiles_see_forward(m->tiles, seen->v);
    if (m->tails == NULL) return KVQ_OK;
    if (m->options->count_sinks) return kvq_tails_push(m->ctx, m->tails, seen->k, m->shape.seq_len, err);
    return kvq_tails_push(m->ctx, m->tails, seen->k + skip * m->d, n, err);
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
    int64_t    n_rows = 0, n_keep = kept_ends(m->options, m->shape);
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

static kvq_status save_forward(const measure *m, kvq_blob *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    mark = m->options->n_fractions; // something to save, also without thresholds and moments
    KVQ_TRY(kvq_blob_append(m->ctx, out, &mark, sizeof mark, err));
    if (m->tails != NULL) KVQ_TRY(save_tails(m, out, err));
    if (m->tiles != NULL)
        KVQ_TRY(kvq_blob_append(m->ctx, out, measure_tiles_squares(m->tiles), sizeof(kvq_fixed), err));
    for (int i = 0; i < 3 && m->options->moments; i++) {
        int64_t bytes = moment_count(m->shape, i) * (int64_t)sizeof *m->moments[i];
        KVQ_TRY(kvq_blob_append(m->ctx, out, m->moments[i], bytes, err));
    }
done:
    return status;
}

static kvq_status merge_forward(measure *m, blob_reader *in, kvq_error *err) {
    int64_t    mark = 0;
    kvq_fixed  sum;
    kvq_status status = KVQ_OK;
    KVQ_TRY(blob_take(in, &mark, sizeof mark, err));
    if (m->tails != NULL) KVQ_TRY(merge_tails(m, in, err));
    if (m->tiles != NULL) {
        KVQ_TRY(blob_take(in, &sum, sizeof sum, err));
        kvq_fixed_merge(measure_tiles_squares(m->tiles), sum);
    }
    for (int i = 0; i < 3 && m->options->moments; i++) {
        for (int64_t j = 0, D = m->shape.head_dim; j < moment_count(m->shape, i); j++) {
            KVQ_TRY(blob_take(in, &sum, sizeof sum, err));
            kvq_moments_merge(&m->moments[i][j], sum, j / D % D == j % D);
        }
    }
done:
    return status;
}

// The result of the forward pass: a mark, thresholds of all fractions, for tiles the exponent of scales, moments of Q,
// K and V as doubles.
static kvq_status finish_forward(measure *m, int64_t layer, kvq_blob *result, kvq_error *err) {
    int64_t    mark = m->options->n_fractions, n = threshold_count(m->options, m->shape);
    kvq_status status = KVQ_OK;
    KVQ_TRY(find_thresholds(m, layer, err));
    KVQ_TRY(kvq_blob_append(m->ctx, result, &mark, sizeof mark, err));
    KVQ_TRY(kvq_blob_append(m->ctx, result, lower_of(m, layer, 0), n * (int64_t)sizeof(float), err));
    if (m->tiles != NULL) {
        measure_tiles_finish_forward(m->tiles, layer);
        KVQ_TRY(kvq_blob_append(m->ctx, result, measure_tiles_exponent(m->tiles, layer), sizeof(int64_t), err));
    }
    for (int i = 0; i < 3 && m->options->moments; i++) {
        uint8_t *at = NULL;
        int64_t  bytes = moment_count(m->shape, i) * (int64_t)sizeof(double);
        KVQ_TRY(kvq_blob_extend(m->ctx, result, bytes, &at, err));
        int        n_heads = i == 0 ? m->shape.n_heads : m->shape.n_kv_heads;
        double    *to = (double *)(void *)at;
        kvq_status finished =
            kvq_moments_finish(m->moments[i], m->shape.n_windows, n_heads, m->shape.head_dim, to, err);
        if (finished != KVQ_OK) kvq_error_prefix(err, "layer %lld, %c, ", (long long)layer, "QKV"[i]);
        KVQ_TRY(finished);
    }
done:
    return status;
}

static kvq_status restore_forward(measure *m, int64_t layer, blob_reader *in, kvq_error *err) {
    int64_t    mark = 0, n = threshold_count(m->options, m->shape);
    kvq_status status = blob_take(in, &mark, sizeof mark, err);
    if (status == KVQ_OK) status = blob_take(in, lower_of(m, layer, 0), n * (int64_t)sizeof(float), err);
    if (status != KVQ_OK || m->tiles == NULL) return status;
    return blob_take(in, measure_tiles_exponent(m->tiles, layer), sizeof(int64_t), err);
}

// ---------------------------------------------------------------- backward

static kvq_histogram **heads_of(const measure *m, int fraction, int tensor) {
    return m->histograms + (fraction * N_TENSORS + tensor) * m->shape.n_kv_heads;
}

static kvq_status begin_backward(measure *m, kvq_error *err) {
    int        n = measure_histograms(m->options, m->shape);
    kvq_status status = KVQ_OK;
    drop_forward(m);
    drop_histograms(m);
    for (int i = 0; i < n; i++) KVQ_TRY(kvq_histogram_create(m->ctx, m->options->weightings, &m->histograms[i], err));
    if (m->device != NULL) KVQ_TRY(device_counts_begin(m->device, err));
    if (m->tiles != NULL) KVQ_TRY(measure_tiles_begin_backward(m->tiles, err));
done:
    return status;
}

static kvq_block_spec spec_of(const measure *m, int64_t layer, int fraction, int tensor) {
    double         o = m->options->fractions[fraction];
    kvq_block_spec spec = {.d = m->d, .n_side = kvq_measured_v_side(o, m->d)};
    if (tensor == V) return spec;
    spec.n_side = kvq_measured_k_side(m->options, o, m->d);
    if (!has_thresholds(m->options)) return spec;
    const float *lower = lower_of(m, layer, fraction), *upper = lower + m->d;
    for (int c = 0; c < m->d; c++) {
        m->z_and_r[c] = kvq_range_middle(lower[c], upper[c]);
        m->z_and_r[m->d + c] = kvq_range_half(lower[c], upper[c]);
    }
    spec.z = m->z_and_r;
    spec.r = m->z_and_r + m->d;
    return spec;
}

kvq_status measure_count(measure *m, int64_t layer, const float *k, const float *v, const float *w_k, const float *w_v,
                         kvq_error *err) {
    for (int f = 0; f < m->options->n_fractions; f++) {
        const kvq_block_spec   specs[] = {spec_of(m, layer, f, K), spec_of(m, layer, f, V)};
        const kvq_count_tensor tensors[] = {{TENSOR_NAMES[K], &specs[K], k, w_k, heads_of(m, f, K)},
                                            {TENSOR_NAMES[V], &specs[V], v, w_v, heads_of(m, f, V)}};
        kvq_count_options      options = {.n_heads = m->shape.n_kv_heads,
                                          .n_skip = m->options->sink_tokens,
                                          .token_range = m->options->token_range,
                                          .fraction = m->options->fractions[f]};
        kvq_status status = kvq_count_rows(m->ctx, tensors, N_TENSORS, m->shape.seq_len, options, m->scratch, err);
        if (status == KVQ_OK) continue;
        kvq_error_prefix(err, "layer %lld, ", (long long)layer);
        return status;
    }
    return KVQ_OK;
}

static kvq_status count_tiles(measure *m, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    kvq_status status = measure_tiles_see_values(m->tiles, layer, seen->v, seen->dv, err);
    for (int f = 0; f < m->options->n_fractions && status == KVQ_OK; f++) {
        kvq_block_spec spec = spec_of(m, layer, f, K);
        spec.n_side = kvq_measured_tile_side(m->options, m->options->fractions[f], m->d);
        status = measure_tiles_see_keys(m->tiles, f, &spec, seen->k, seen->dk, err);
    }
    if (status != KVQ_OK) kvq_error_prefix(err, "layer %lld, ", (long long)layer);
    return status;
}

// A window that the device could not count, once more on the host, which says why.
static kvq_status count_refused(measure *m, int64_t layer, const kvq_kv_view *there, kvq_error *err) {
    const float *from[] = {there->k, there->v, there->dk, there->dv};
    float       *host[] = {NULL, NULL, NULL, NULL};
    int64_t      n = m->shape.seq_len * m->d;
    kvq_status   status = KVQ_OK;
    for (int i = 0; i < 4 && from[i] != NULL; i++) {
        KVQ_TRY(KVQ_NEW(m->ctx, n, "K and V of a window", &host[i], err));
        m->be->download(m->be, host[i], from[i], n);
        if (i >= N_TENSORS) kvq_fisher_diagonal(host[i], n, host[i]);
    }
    KVQ_TRY(m->be->check(m->be, err));
    if (m->scratch == NULL)
        KVQ_TRY(KVQ_NEW(m->ctx, count_scratch_floats(m->shape), "normalised elements", &m->scratch, err));
    KVQ_TRY(measure_count(m, layer, host[0], host[1], host[2], host[3], err));
    status = kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "layer %lld: the device could not count what the host could",
                      (long long)layer);
done:
    for (int i = 0; i < 4; i++) kvq_free(m->ctx, host[i]);
    return status;
}

static kvq_status count_there(measure *m, int64_t layer, kvq_kv_view there, kvq_error *err) {
    if (!kvq_weightings_need_gradients(m->options->weightings)) there.dk = there.dv = NULL;
    const float *x[] = {there.k, there.v}, *dx[] = {there.dk, there.dv};
    for (int i = 0; i < m->options->n_fractions * N_TENSORS; i++) {
        int            tensor = i % N_TENSORS;
        kvq_block_spec spec = spec_of(m, layer, i / N_TENSORS, tensor);
        if (!device_counts_add(m->device, i * m->shape.n_kv_heads, &spec, x[tensor], dx[tensor]))
            return count_refused(m, layer, &there, err);
    }
    return KVQ_OK;
}

static kvq_status see_backward(measure *m, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    kvq_status status = m->tiles != NULL ? count_tiles(m, layer, seen, err) : KVQ_OK;
    if (status != KVQ_OK) return status;
    if (m->device != NULL) return count_there(m, layer, seen->there, err);
    if (!kvq_weightings_need_gradients(m->options->weightings))
        return measure_count(m, layer, seen->k, seen->v, NULL, NULL, err);
    kvq_fisher_diagonal(seen->dk, m->shape.seq_len * m->d, m->w[K]);
    kvq_fisher_diagonal(seen->dv, m->shape.seq_len * m->d, m->w[V]);
    return measure_count(m, layer, seen->k, seen->v, m->w[K], m->w[V], err);
}

static kvq_status save_backward(measure *m, kvq_blob *out, kvq_error *err) {
    uint8_t   *at = NULL;
    int        n = measure_histograms(m->options, m->shape);
    kvq_status status = KVQ_OK;
    if (m->device != NULL) KVQ_TRY(device_counts_take(m->device, m->histograms, err));
    for (int i = 0; i < n; i++) {
        KVQ_TRY(blob_append_sized(m->ctx, out, kvq_histogram_packed_bytes(m->histograms[i]), &at, err));
        kvq_histogram_pack(m->histograms[i], at);
    }
    if (m->tiles != NULL) KVQ_TRY(measure_tiles_save(m->tiles, out, err));
done:
    return status;
}

static kvq_status merge_backward(measure *m, blob_reader *in, kvq_error *err) {
    const uint8_t *at = NULL;
    int64_t        bytes = 0;
    int            n = measure_histograms(m->options, m->shape);
    kvq_status     status = KVQ_OK;
    for (int i = 0; i < n; i++) {
        KVQ_TRY(blob_take_sized(in, &at, &bytes, err));
        KVQ_TRY(kvq_histogram_merge_packed(m->histograms[i], at, bytes, err));
    }
    if (m->tiles != NULL) KVQ_TRY(measure_tiles_merge(m->tiles, in, err));
done:
    return status;
}

// ---------------------------------------------------------------- layers

static kvq_status create_layer(const kvq_context *ctx, const kvq_measure_options *options, measure_shape shape,
                               bool moments, kvq_measured_layer **out, kvq_error *err) {
    kvq_measure_options without = *options;
    without.moments = moments;
    return kvq_measured_layer_create(ctx, &without, shape.n_heads, shape.n_kv_heads, shape.head_dim, out, err);
}

static int64_t part_bytes(const kvq_measured_part *p) {
    int64_t n = p->type == KVQ_PART_F32 ? (int64_t)sizeof(float) : (int64_t)sizeof(double);
    for (int i = 0; i < p->n_dims; i++) n *= p->dims[i];
    return n;
}

static kvq_status append_layer(const kvq_context *ctx, const kvq_measured_layer *layer, kvq_blob *out, kvq_error *err) {
    kvq_measured_part part;
    for (int i = 0; kvq_measured_layer_parts(layer, i, &part); i++) {
        kvq_status status = kvq_blob_append(ctx, out, part.data, part_bytes(&part), err);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

static kvq_status take_layer(kvq_measured_layer *layer, blob_reader *in, kvq_error *err) {
    kvq_measured_part part;
    for (int i = 0; kvq_measured_layer_parts(layer, i, &part); i++) {
        kvq_status status = blob_take(in, part.data, part_bytes(&part), err);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

// What was seen of a layer, as a fit wants it.
static kvq_status fill_layer(const measure *m, int64_t layer, kvq_measured_layer *to, kvq_error *err) {
    size_t bytes = (size_t)m->d * sizeof(float);
    for (int f = 0; f < m->options->n_fractions; f++) {
        if (has_thresholds(m->options)) {
            memcpy(to->k[f].lower, lower_of(m, layer, f), bytes);
            memcpy(to->k[f].upper, lower_of(m, layer, f) + m->d, bytes);
        }
        for (int h = 0; h < m->shape.n_kv_heads; h++) {
            kvq_status status = kvq_distribution_take(heads_of(m, f, K)[h], &to->k[f].heads[h], err);
            if (status == KVQ_OK) status = kvq_distribution_take(heads_of(m, f, V)[h], &to->v[f].heads[h], err);
            if (status == KVQ_OK) continue;
            kvq_error_prefix(err, "layer %lld, KV head %d: ", (long long)layer, h);
            return status;
        }
    }
    return m->tiles != NULL ? measure_tiles_fill(m->tiles, layer, to, err) : KVQ_OK;
}

static kvq_status finish_backward(measure *m, int64_t layer, kvq_blob *result, kvq_error *err) {
    kvq_measured_layer *measured = NULL;
    kvq_status          status = KVQ_OK;
    if (m->device != NULL) KVQ_TRY(device_counts_take(m->device, m->histograms, err));
    KVQ_TRY(create_layer(m->ctx, m->options, m->shape, false, &measured, err));
    KVQ_TRY(fill_layer(m, layer, measured, err));
    KVQ_TRY(append_layer(m->ctx, measured, result, err));
    if (m->fit != NULL) KVQ_TRY(kvq_fit_layer(m->ctx, measured, m->options, m->fit, m->artifact, layer, err));
done:
    kvq_measured_layer_destroy(m->ctx, &measured);
    return status;
}

static kvq_status restore_backward(measure *m, int64_t layer, blob_reader *in, kvq_error *err) {
    kvq_measured_layer *measured = NULL;
    kvq_status          status = KVQ_OK;
    if (m->fit == NULL) return KVQ_OK;
    KVQ_TRY(create_layer(m->ctx, m->options, m->shape, false, &measured, err));
    KVQ_TRY(take_layer(measured, in, err));
    KVQ_TRY(kvq_fit_layer(m->ctx, measured, m->options, m->fit, m->artifact, layer, err));
done:
    kvq_measured_layer_destroy(m->ctx, &measured);
    return status;
}

kvq_status measure_layer_from_results(const kvq_context *ctx, const kvq_measure_options *options, measure_shape shape,
                                      const kvq_blob *forward, const kvq_blob *backward, kvq_measured_layer **out,
                                      kvq_error *err) {
    int64_t skip = (int64_t)sizeof(int64_t) + threshold_count(options, shape) * (int64_t)sizeof(float) +
                   (options->allocated ? (int64_t)sizeof(int64_t) : 0);
    blob_reader         before = {forward->data, forward->bytes}, after = {backward->data, backward->bytes};
    kvq_measured_layer *layer = NULL;
    kvq_status          status = KVQ_OK;
    KVQ_TRY(create_layer(ctx, options, shape, options->moments, &layer, err));
    kvq_moments moments = layer->moments; // the backward pass left all parts but these
    layer->moments = (kvq_moments){NULL, NULL, NULL};
    status = take_layer(layer, &after, err);
    layer->moments = moments;
    if (status != KVQ_OK) goto done;
    double *parts[] = {moments.q, moments.k, moments.v};
    KVQ_TRY(blob_take(&before, NULL, skip, err));
    for (int i = 0; i < 3 && options->moments; i++)
        KVQ_TRY(blob_take(&before, parts[i], moment_count(shape, i) * (int64_t)sizeof(double), err));
    *out = layer;
    layer = NULL;
done:
    kvq_measured_layer_destroy(ctx, &layer);
    return status;
}

// ---------------------------------------------------------------- the observer

static kvq_status begin(void *user, kvq_pass pass, int64_t layer, kvq_error *err) {
    (void)layer;
    return pass == KVQ_PASS_FORWARD ? begin_forward(user, err) : begin_backward(user, err);
}

static kvq_status window(void *user, kvq_pass pass, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    return pass == KVQ_PASS_FORWARD ? see_forward(user, seen, err) : see_backward(user, layer, seen, err);
}

static kvq_status save(void *user, kvq_pass pass, int64_t layer, kvq_blob *out, kvq_error *err) {
    (void)layer;
    return pass == KVQ_PASS_FORWARD ? save_forward(user, out, err) : save_backward(user, out, err);
}

static kvq_status merge(void *user, kvq_pass pass, int64_t layer, const uint8_t *data, int64_t bytes, kvq_error *err) {
    blob_reader in = {data, bytes};
    (void)layer;
    kvq_status status = pass == KVQ_PASS_FORWARD ? merge_forward(user, &in, err) : merge_backward(user, &in, err);
    if (status != KVQ_OK || in.left == 0) return status;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "saved statistics have %lld bytes too many", (long long)in.left);
}

static kvq_status finish(void *user, kvq_pass pass, int64_t layer, kvq_blob *result, kvq_error *err) {
    measure *m = user;
    if (m->raw) return save(user, pass, layer, result, err);
    return pass == KVQ_PASS_FORWARD ? finish_forward(m, layer, result, err) : finish_backward(m, layer, result, err);
}

static kvq_status restore(void *user, kvq_pass pass, int64_t layer, const uint8_t *data, int64_t bytes,
                          kvq_error *err) {
    measure    *m = user;
    blob_reader in = {data, bytes};
    if (m->raw) return KVQ_OK; // waits in the work directory for whoever merges it
    return pass == KVQ_PASS_FORWARD ? restore_forward(m, layer, &in, err) : restore_backward(m, layer, &in, err);
}

kvq_observer measure_observer(measure *m) {
    return (kvq_observer){.user = m,
                          .wants_query = m->options->moments,
                          .wants_second_pass = true,
                          .wants_gradients = measure_needs_gradients(m->options),
                          .wants_rotated_keys = m->options->k_domain == KVQ_KEYS_POST_ROPE,
                          .wants_no_copies = m->device != NULL && m->tiles == NULL,
                          .begin = begin,
                          .window = window,
                          .finish = finish,
                          .save = save,
                          .merge = merge,
                          .restore = restore};
}

void measure_keep_raw(measure *m) { m->raw = true; }

// The worst moment of a pass is when what was seen is saved: beside it the same as bytes, in a blob that grew (up to
// half as much again), and once more as the file.
static int64_t while_saving(int64_t seen, int64_t bytes) { return seen + bytes * 5 / 2; }

// Forward: what is kept of K, saved as its packed ends (finding thresholds packs and sorts them, which is less), and
// moments. Backward: histograms and what tiles need, as bytes with an index for each bin.
int64_t measure_bytes(const kvq_measure_options *o, measure_shape shape) {
    int64_t d = measure_width(shape), n_ends = has_thresholds(o) ? 2 * d * kept_ends(o, shape) : 0, moments = 0;
    int64_t tails = has_thresholds(o) ? kvq_tails_bytes(d, kept_ends(o, shape)) : 0;
    int64_t counts = measure_histograms(o, shape) * kvq_histogram_bytes(o->weightings);
    if (o->allocated) counts += measure_tiles_bytes(o, shape);
    for (int i = 0; i < 3 && o->moments; i++) moments += moment_count(shape, i) * (int64_t)sizeof(kvq_fixed);
    int64_t forward = while_saving(tails + moments, n_ends * (int64_t)sizeof(float) + moments);
    int64_t backward = while_saving(counts, counts * 5 / 4);
    if (o->moments) forward += kvq_moments_scratch_doubles(shape.n_heads, shape.head_dim) * (int64_t)sizeof(double);
    return forward > backward ? forward : backward;
}

kvq_status measure_create(const kvq_context *ctx, const kvq_backend *be, const kvq_measure_options *options,
                          measure_shape shape, const kvq_fit_options *fit, kvq_artifact *artifact, measure **out,
                          kvq_error *err) {
    measure   *m = NULL;
    int64_t    d = measure_width(shape), n = shape.seq_len * d;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "measurement", &m, err));
    m->ctx = ctx;
    m->options = options;
    m->shape = shape;
    m->fit = fit;
    m->artifact = artifact;
    m->d = (int)d;
    m->n_rows = threshold_rows(options, shape);
    m->be = be;
    if (device_counts_possible(be, options)) {
        KVQ_TRY(device_counts_create(ctx, be, options, shape, &m->device, err));
    } else {
        for (int i = 0; i < N_TENSORS && kvq_weightings_need_gradients(options->weightings); i++)
            KVQ_TRY(KVQ_NEW(ctx, n, "squared gradients", &m->w[i], err));
        KVQ_TRY(KVQ_NEW(ctx, count_scratch_floats(shape), "normalised elements", &m->scratch, err));
    }
    KVQ_TRY(KVQ_NEW(ctx, 2 * d, "offsets and ranges", &m->z_and_r, err));
    KVQ_TRY(KVQ_NEW(ctx, measure_thresholds_count(m), "thresholds", &m->thresholds, err));
    KVQ_TRY(KVQ_NEW(ctx, measure_histograms(options, shape), "histograms", &m->histograms, err));
    if (options->allocated) KVQ_TRY(measure_tiles_create(ctx, options, shape, &m->tiles, err));
    *out = m;
    m = NULL;
done:
    measure_destroy(ctx, &m);
    return status;
}

void measure_destroy(const kvq_context *ctx, measure **measurement) {
    measure *m = *measurement;
    if (m == NULL) return;
    drop_histograms(m);
    drop_forward(m);
    kvq_free(ctx, m->histograms);
    kvq_free(ctx, m->thresholds);
    for (int i = 0; i < N_TENSORS; i++) kvq_free(ctx, m->w[i]);
    kvq_free(ctx, m->scratch);
    kvq_free(ctx, m->z_and_r);
    device_counts_destroy(ctx, &m->device);
    measure_tiles_destroy(ctx, &m->tiles);
    kvq_free(ctx, m);
    *measurement = NULL;
}
