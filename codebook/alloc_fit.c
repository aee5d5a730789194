// SPDX-License-Identifier: Apache-2.0
//
// From the statistics of a layer and its chosen widths to the tables of the channel-allocated format.
//
// What decodes how. With tables per channel the levels are those of the channel's exact k-means, normalised, rounded to
// f16: width 0 has its weighted mean. With affine tables (affine.c) the table of width 0 is the level 0 and of width 1
// the levels -1 and 1, and the offset and scale of a channel do the rest exactly. A channel that carries no weight,
// because it is constant or the loss does not feel it, has levels 0, or scale 0: it decodes to the middle of its range.
//
// Reports. The objective is the weighted squared error in the tensor's units, scatter inside bins included, divided by
// the sum of weights times squared ranges (where the weights do not contain them, as in curves.c): like that of other
// tables it is the weighted mean squared error in units of the range, of keys, or of the scale, of values.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "codebook_impl.h"

// ---------------------------------------------------------------- settings

static void describe_keys(kvq_tensor_quant *k, const kvq_measure_options *measure, const kvq_alloc_options *options) {
    k->bits = k->n_levels = 0;
    k->datatype = KVQ_NUQ;
    k->axis = KVQ_AXIS_CHANNEL;
    k->domain = measure->k_domain;
    k->n_groups = k->dim = 1;
    k->table_kind = options->tables;
}

static void describe_values(kvq_tensor_quant *v, const kvq_measure_options *measure, const kvq_alloc_options *options) {
    v->bits = v->n_levels = 0;
    v->datatype = KVQ_NUQ;
    v->axis = KVQ_AXIS_TOKEN;
    v->n_groups = 1;
    v->dim = options->v_dim;
    v->scale_format = measure->scale_format;
}

static kvq_status make_rotation(const kvq_context *ctx, kvq_artifact *a, kvq_rotation_kind wanted, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    int64_t     D = a->model.head_dim;
    float      *rotation = NULL;
    const char *kind;
    KVQ_TRY(KVQ_NEW(ctx, D * D, "rotation of values", &rotation, err));
    KVQ_TRY(kvq_make_rotation(ctx, wanted, (int)D, rotation, &kind, err));
    KVQ_TRY(kvq_artifact_set_text(ctx, &a->quantizer.rotation_kind, kind, err));
    kvq_free(ctx, a->quantizer.rotation);
    a->quantizer.rotation = rotation;
    rotation = NULL;
done:
    kvq_free(ctx, rotation);
    return status;
}

kvq_status kvq_artifact_describe_allocated(const kvq_context *ctx, kvq_artifact *a, const kvq_measure_options *measure,
                                           const kvq_alloc_options *options, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int        d = (int)(a->model.n_kv_heads * a->model.head_dim), n_slots;
    bool       by_target = !(options->k_bits > 0);
    KVQ_TRY(kvq_alloc_options_check(options, (int)a->model.head_dim, err));
    n_slots = kvq_tile_slots(options->outlier_fraction, d);
    if (options->outlier_fraction * KVQ_TILE_TOKENS * d > KVQ_TILE_MAX_SLOTS) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use a smaller outlier fraction",
                        "outliers of %g need more slots for a tile of %d channels than the %d that are possible",
                        options->outlier_fraction, d, KVQ_TILE_MAX_SLOTS);
    }
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        kvq_tensor_quant *k = &a->layers[layer].k;
        if (k->widths == NULL) KVQ_TRY(KVQ_NEW(ctx, d, "widths of keys", &k->widths, err));
        memset(k->widths, 0, (size_t)d);
        describe_keys(k, measure, options);
        describe_values(&a->layers[layer].v, measure, options);
    }
    KVQ_TRY(kvq_artifact_set_text(ctx, &a->quantizer.scheme, "alloc", err));
    KVQ_TRY(make_rotation(ctx, a, measure->rotation, err));
    a->quantizer.outlier_fraction = options->outlier_fraction;
    a->quantizer.n_side_k = kvq_measured_tile_side(measure, options->outlier_fraction, d);
    a->quantizer.n_side_v = 0;
    a->quantizer.n_slots = n_slots;
    a->quantizer.sink_tokens = measure->sink_tokens;
    a->quantizer.recent_tokens = 0; // those of a tile that is not full are
    a->quantizer.weighting = measure->channel_weighting;
    a->quantizer.threshold_scope = measure->threshold_scope;
    a->quantizer.sinks_counted = measure->count_sinks;
    a->quantizer.budget_tokens = options->n_tokens;
    a->quantizer.budget_sequences = options->n_sequences;
    a->quantizer.target_bits = by_target ? options->target_bits : 0;
done:
    return status;
}

// ---------------------------------------------------------------- tables per channel

typedef struct channel_fit {
    const kvq_channel_distribution *channels;
    const kvq_tensor_quant         *k;
    const int64_t                  *at; // [d] where a channel's table begins
    codebook_channel_scratch        scratch;
} channel_fit;

static void fit_channel(void *user, int64_t c, int worker) {
    const channel_fit *f = user;
    double             levels[1 << KVQ_MAX_KEY_WIDTH] = {0}, cost;
    int                n = 1 << f->k->widths[c];
    if (!codebook_channel_tables(f->channels, c, &n, 1, &f->scratch, worker, levels, &cost)) levels[0] = NAN;
    for (int j = 0; j < n; j++) f->k->key_levels[f->at[c] + j] = codebook_half(levels[j]);
}

static kvq_status fit_channels(const kvq_context *ctx, const kvq_measured_tensor *measured, int64_t d,
                               kvq_tensor_quant *k, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    int64_t    *at = NULL, n = 0;
    channel_fit f = {.channels = &measured->channels, .k = k};
    KVQ_TRY(KVQ_NEW(ctx, d, "places of tables", &at, err));
    for (int64_t c = 0; c < d; n += (int64_t)1 << k->widths[c++]) at[c] = n;
    f.at = at;
    KVQ_TRY(codebook_renew(ctx, n, "levels of keys", &k->key_levels, err));
    k->n_key_levels = n;
    KVQ_TRY(codebook_channel_scratch_create(ctx, &f.scratch, err));
    kvq_parallel_for(ctx, d, fit_channel, &f);
done:
    kvq_free(ctx, f.scratch.memory);
    kvq_free(ctx, at);
    return status;
}

// ---------------------------------------------------------------- affine tables

static kvq_status fit_affine(const kvq_context *ctx, const kvq_measured_tensor *measured, kvq_weighting weighting,
                             int64_t d, kvq_tensor_quant *k, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(codebook_renew(ctx, CODEBOOK_AFFINE_LEVELS, "levels of keys", &k->key_levels, err));
    KVQ_TRY(codebook_renew(ctx, d, "offsets of keys", &k->offset, err));
    KVQ_TRY(codebook_renew(ctx, d, "scales of keys", &k->scale, err));
    k->n_key_levels = CODEBOOK_AFFINE_LEVELS;
    KVQ_TRY(codebook_fit_affine(ctx, &measured->channels, weighting, d, k, err));
    for (int64_t c = 0; c < d && status == KVQ_OK; c++) {
        if (isfinite(k->offset[c]) && isfinite(k->scale[c])) continue;
        status = kvq_fail(err, KVQ_ERR_NUMERICAL, "use tables per channel",
                          "channel %lld has the range %g to %g, and its affine map does not fit into f16", (long long)c,
                          (double)k->lower[c], (double)k->upper[c]);
    }
done:
    return status;
}

// ---------------------------------------------------------------- reports

// The levels of a channel as they decode, in units of its range, ascending.
static void decoded_levels(const kvq_tensor_quant *k, int64_t c, const float *table, double *levels) {
    int    n = 1 << k->widths[c];
    bool   affine = k->table_kind == KVQ_TABLE_AFFINE, reversed = affine && k->scale[c] < 0;
    double middle = (double)kvq_range_middle(k->lower[c], k->upper[c]);
    double half = (double)kvq_range_half(k->lower[c], k->upper[c]);
    for (int j = 0; j < n; j++) {
        double level = (double)table[reversed ? n - 1 - j : j];
        if (affine) level = half > 0 ? ((double)k->offset[c] + (double)k->scale[c] * level - middle) / half : 0;
        levels[j] = level;
    }
}

static kvq_fit_report report_keys(const kvq_measured_tensor *measured, kvq_weighting weighting, int64_t d,
                                  const kvq_tensor_quant *k) {
    const kvq_channel_distribution *channels = &measured->channels;
    kvq_fit_report                  report = {.n_points = 0};
    double                          error = 0;
    const float                    *next = k->key_levels;
    for (int64_t c = 0; c < d; next += 1 << k->widths[c++]) {
        kvq_weighted_point points[KVQ_CHANNEL_BINS];
        double             levels[1 << KVQ_MAX_KEY_WIDTH], weight = 0;
        double             factor = codebook_channel_factor(weighting, k->lower[c], k->upper[c]);
        int64_t            n = codebook_channel_points(channels, c, points);
        bool               affine = k->table_kind == KVQ_TABLE_AFFINE;
        decoded_levels(k, c, affine ? k->key_levels + codebook_affine_table(k->widths[c]) : next, levels);
        for (int64_t i = 0; i < n; i++) weight += points[i].w;
        error += factor * (codebook_cost(points, n, levels, 1 << k->widths[c]) + channels->scatter[c]);
        report.weight_sum += factor * weight;
        report.n_points += channels->n_points[c];
        report.n_outliers += channels->n_outliers[c];
    }
    report.objective = report.weight_sum > 0 ? error / report.weight_sum : 0;
    return report;
}

static kvq_fit_report report_values(const kvq_value_distribution *v, int dim, double error) {
    kvq_fit_report report = {.n_points = *v->n_points};
    const float   *w = dim == 1 ? v->w : v->pair_w;
    int64_t        n = dim == 1 ? KVQ_HISTOGRAM_BINS : (int64_t)KVQ_PAIR_CELLS * KVQ_PAIR_CELLS;
    for (int64_t i = 0; i < n; i++) report.weight_sum += dim * (double)w[i]; // a pair is two elements
    report.objective = report.weight_sum > 0 ? error / report.weight_sum : 0;
    return report;
}

// A fit without any weight would say nothing.
static kvq_status check_weight(const kvq_measure_options *measure, const kvq_fit_report *fit, int64_t layer, char name,
                               kvq_error *err) {
    if (!kvq_weighting_needs_gradients(measure->channel_weighting) || fit->n_points == 0 || fit->weight_sum > 0) {
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_NUMERICAL, "use more or longer windows, or no weighting",
                    "layer %lld, %c: the loss does not feel any of the %lld elements, their weights are all zero",
                    (long long)layer, name, (long long)fit->n_points);
}

// ---------------------------------------------------------------- layers

static kvq_status fit_keys(const kvq_context *ctx, const kvq_measured_tensor *measured, kvq_weighting weighting,
                           const uint8_t *widths, int64_t d, kvq_tensor_quant *k, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int64_t c = 0; c < d; c++) {
        if (widths[c] <= KVQ_MAX_KEY_WIDTH) continue;
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "channel %lld has a width of %d bits", (long long)c, widths[c]);
    }
    memcpy(k->widths, widths, (size_t)d);
    KVQ_TRY(codebook_copy_thresholds(ctx, measured, d, k, err));
    if (k->table_kind == KVQ_TABLE_AFFINE) {
        KVQ_TRY(fit_affine(ctx, measured, weighting, d, k, err));
    } else {
        KVQ_TRY(fit_channels(ctx, measured, d, k, err));
    }
    if (kvq_find_nonfinite(k->key_levels, k->n_key_levels) >= 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NUMERICAL, "measure again", "a level of K is not a number of f16"));
    }
    k->fit = report_keys(measured, weighting, d, k);
done:
    return status;
}

static kvq_status fit_values(const kvq_context *ctx, const kvq_value_distribution *rotated, int rate,
                             kvq_tensor_quant *v, kvq_error *err) {
    kvq_status status = KVQ_OK;
    double     error;
    if (rate < 1 || rate > KVQ_TILE_MAX_WIDTH) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "a column of values has %d bits", rate);
    }
    KVQ_TRY(codebook_renew(ctx, (int64_t)v->dim << rate, "codebook", &v->codebook, err));
    v->bits = rate;
    v->n_levels = 1 << rate;
    v->scale_exponent = (int)*rotated->scale_exponent;
    KVQ_TRY(codebook_value_tables(ctx, rotated, v->dim, &rate, 1, v->codebook, &error, err));
    v->fit = report_values(rotated, v->dim, error);
done:
    return status;
}

kvq_status kvq_fit_allocated_layer(const kvq_context *ctx, const kvq_measured_layer *measured,
                                   const kvq_measure_options *measure, const kvq_alloc_options *options,
                                   const uint8_t *widths, int rate, kvq_artifact *artifact, int64_t layer,
                                   kvq_error *err) {
    kvq_status        status = KVQ_OK;
    int64_t           d = (int64_t)measured->n_kv_heads * measured->head_dim;
    kvq_tensor_quant *k = &artifact->layers[layer].k, *v = &artifact->layers[layer].v;
    int               f = 0;
    KVQ_TRY(codebook_find_allocated(measured, measure, options, &f, err));
    KVQ_TRY(fit_keys(ctx, &measured->k[f], measure->channel_weighting, widths, d, k, err));
    KVQ_TRY(fit_values(ctx, &measured->rotated, rate, v, err));
    KVQ_TRY(check_weight(measure, &k->fit, layer, 'K', err));
    KVQ_TRY(check_weight(measure, &v->fit, layer, 'V', err));
    k->kl = measured->kl != NULL ? measured->kl[0] : 0;
    v->kl = measured->kl != NULL ? measured->kl[1] : 0;
done:
    return status;
}
