// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: a small measurement, and a file of it.
#ifndef SAMPLE_MEASUREMENT_H
#define SAMPLE_MEASUREMENT_H

#include <math.h>
#include <string.h>

#include "measurement_impl.h"
#include "sample_artifact.h"

#define SAMPLE_LAYERS 2

// Every choice differs from the zero that a forgotten one would be.
static inline kvq_measure_options sample_options(void) {
    return (kvq_measure_options){.n_fractions = 2,
                                 .fractions = {0, 0.01},
                                 .weightings = KVQ_WEIGHTINGS_ALL,
                                 .sink_tokens = 5,
                                 .count_sinks = true,
                                 .k_axis = KVQ_AXIS_CHANNEL,
                                 .k_domain = KVQ_KEYS_POST_ROPE,
                                 .threshold_scope = KVQ_SCOPE_MATRIX,
                                 .k_slots = -1,
                                 .token_range = KVQ_RANGE_PERCENTILES,
                                 .moments = true};
}

static inline kvq_measure_options allocated_options(void) {
    kvq_measure_options o = sample_options();
    o.allocated = true;
    o.channel_weighting = KVQ_WEIGHT_FISHER_SCALED;
    o.tile_side = 5;
    o.rotation = KVQ_ROTATION_NONE;
    o.scale_format = KVQ_SCALE_F16;
    return o;
}

// Where a file is written a hundred times: an eighth of the numbers.
static inline kvq_measure_options small_options(void) {
    kvq_measure_options o = sample_options();
    o.n_fractions = 1;
    o.weightings = KVQ_WEIGHTINGS_BASIC;
    return o;
}

static inline double uniform(int64_t layer, int part, int64_t i) {
    return kvq_rng_uniform(7, KVQ_RNG_TEST, (uint32_t)(1000 * layer + part), (uint64_t)i);
}

// A mean inside of each bin, weights around the middle as a bell, and other awkward numbers elsewhere; the second
// moments are X^T X of random X, so that they have a spectrum.
static inline void fill_part(const kvq_measured_part *p, int64_t layer, int number) {
    array_spec spec = measurement_part_spec(p);
    int64_t    n = array_elements(&spec);
    bool       is_mean = strstr(p->name, "mean_") != NULL, is_weight = strstr(p->name, "weight_") != NULL;
    for (int64_t i = 0; i < n; i++) {
        double u = uniform(layer, number, i),
               center = ((double)(i % KVQ_HISTOGRAM_BINS) + u) * 2 / KVQ_HISTOGRAM_BINS - 1;
        if (p->type == KVQ_PART_I64) ((int64_t *)p->data)[i] = (int64_t)(u * 1e9);
        if (p->type == KVQ_PART_F64) ((double *)p->data)[i] = u * 1e-3;
        if (p->type != KVQ_PART_F32) continue;
        double x = is_mean     ? center
                   : is_weight ? exp(-8 * center * center) * u * 1e-3
                               : u - (strstr(p->name, "lower") != NULL);
        ((float *)p->data)[i] = is_weight && fabs(center) > 0.8 ? 0 : (float)x;
    }
}

static inline void fill_moments(double *moments, int n_heads, int D, int64_t layer, int stream) {
    for (int h = 0; h < n_heads; h++) {
        for (int i = 0; i < D * D; i++) {
            double sum = 0;
            for (int t = 0; t < D + 3; t++)
                sum += (uniform(layer, stream + h, t * D + i / D) - 0.5) *
                       (uniform(layer, stream + h, t * D + i % D) - 0.5);
            moments[h * D * D + i] = sum;
        }
    }
}

// Positions i of n bins over +-reach, one in each bin, and weights on every third.
static inline void fill_bins(float *w, float *x, int n, double reach, int64_t layer, int stream) {
    for (int i = 0; i < n; i++) {
        double u = uniform(layer, stream, i);
        w[i] = i % 3 == 0 ? (float)u : 0;
        x[i] = (float)((2 * ((double)i + u) / n - 1) * reach);
    }
}

static inline void fill_allocated(kvq_measured_layer *m, int64_t layer) {
    kvq_value_distribution *v = &m->rotated;
    for (int f = 0; f < m->n_fractions; f++) {
        for (int c = 0; c < SAMPLE_D; c++)
            fill_bins(m->k[f].channels.w + c * KVQ_CHANNEL_BINS, m->k[f].channels.x + c * KVQ_CHANNEL_BINS,
                      KVQ_CHANNEL_BINS, 1, layer, 800 + f * SAMPLE_D + c);
    }
    fill_bins(v->w, v->x, KVQ_HISTOGRAM_BINS, 8, layer, 900);
    v->x[0] = -11; // beyond the reach, as the outermost bins may be
    for (int i = 0; i < KVQ_PAIR_CELLS * KVQ_PAIR_CELLS; i++) {
        int row = i / KVQ_PAIR_CELLS, column = i % KVQ_PAIR_CELLS;
        v->pair_w[i] = i % 7 == 0 ? (float)uniform(layer, 901, i) : 0;
        v->pair_x[i] = (float)((2 * (row + uniform(layer, 902, i)) / KVQ_PAIR_CELLS - 1) * 4);
        v->pair_y[i] = (float)((2 * (column + uniform(layer, 903, i)) / KVQ_PAIR_CELLS - 1) * 4);
    }
    v->pair_x[0] = -4.5f;
    *v->scale_exponent = -7 - layer;
    m->kl[1] = 0; // not measured
}

static inline kvq_measured_layer *sample_layer(const kvq_context *ctx, const kvq_measure_options *options,
                                               int64_t layer) {
    kvq_measured_layer *m = NULL;
    kvq_measured_part   part;
    kvq_error           err = {0};
    sample_require(kvq_measured_layer_create(ctx, options, 4, SAMPLE_HEADS, SAMPLE_HEAD_DIM, &m, &err));
    for (int i = 0; kvq_measured_layer_parts(m, i, &part) != 0; i++) fill_part(&part, layer, i);
    if (options->allocated) fill_allocated(m, layer);
    if (!options->moments) return m;
    fill_moments(m->moments.q, 4, SAMPLE_HEAD_DIM, layer, 500);
    fill_moments(m->moments.k, SAMPLE_HEADS, SAMPLE_HEAD_DIM, layer, 600);
    fill_moments(m->moments.v, SAMPLE_HEADS, SAMPLE_HEAD_DIM, layer, 700);
    return m;
}

// Changes a layer, or says that it is not put, when not NULL.
typedef bool (*spoil_fn)(kvq_measured_layer *m, int64_t layer);

// `good` makes the samples, which is not what a failing allocation is about.
static inline kvq_status write_measurement(const kvq_context *good, const kvq_context *ctx, const char *path,
                                           kvq_measure_options options, spoil_fn spoil, char sha256[KVQ_SHA256_HEX],
                                           kvq_error *err) {
    kvq_status              status = KVQ_OK;
    kvq_measurement_writer *w = NULL;
    kvq_artifact           *about = sample_artifact(good, SAMPLE_LAYERS);
    kvq_measured_layer     *m = NULL;
    KVQ_TRY(kvq_measurement_create(ctx, path, true, about, &options, true, &w, err));
    for (int64_t layer = 0; layer < SAMPLE_LAYERS; layer++) {
        m = sample_layer(good, &options, layer);
        if (spoil == NULL || spoil(m, layer)) KVQ_TRY(kvq_measurement_put(ctx, w, layer, m, err));
        kvq_measured_layer_destroy(good, &m);
    }
    KVQ_TRY(kvq_measurement_commit(ctx, &w, sha256, err));
done:
    kvq_measured_layer_destroy(good, &m);
    kvq_measurement_discard(ctx, &w);
    kvq_artifact_destroy(good, &about);
    return status;
}

#endif
