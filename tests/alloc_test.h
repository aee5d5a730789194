// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites of the channel-allocated format: an artifact of a given shape, and the statistics of a layer
// from made-up points.
#ifndef ALLOC_TEST_H
#define ALLOC_TEST_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

enum { N_WIDTHS = KVQ_MAX_KEY_WIDTH + 1, N_CELLS = KVQ_PAIR_CELLS * KVQ_PAIR_CELLS };

static inline double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(31, KVQ_RNG_TEST, stream, (uint64_t)index);
}

// Nearly normal, of variance 1.
static inline double normal(uint32_t stream, int64_t index) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform(stream, 12 * index + i);
    return sum;
}

static inline kvq_measure_options measure_options(double fraction) {
    return (kvq_measure_options){.n_fractions = 1,
                                 .fractions = {fraction},
                                 .weightings = KVQ_WEIGHTINGS_BASIC,
                                 .sink_tokens = 4,
                                 .k_slots = -1,
                                 .allocated = true,
                                 .channel_weighting = KVQ_WEIGHT_FISHER_SCALED,
                                 .tile_side = 8};
}

static inline kvq_artifact *described(int64_t n_layers, int n_heads, int D, const kvq_measure_options *measure,
                                      const kvq_alloc_options *options) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *a = NULL;
    kvq_test_ok(kvq_artifact_create(&ctx, n_layers, &a, &err), &err);
    a->model.n_kv_heads = n_heads;
    a->model.head_dim = D;
    kvq_test_ok(kvq_artifact_describe_allocated(&ctx, a, measure, options, &err), &err);
    return a;
}

// ---------------------------------------------------------------- a layer

typedef struct made_layer {
    kvq_measured_tensor k;
    kvq_measured_layer  layer;
    double              kl[2];
    int64_t             n_points, exponent;
} made_layer;

#define NEW(n, type) ((type *)calloc((size_t)(n), sizeof(type)))

static inline int bin_of(double x, double reach, int n) {
    int bin = (int)floor((x / reach + 1) * n / 2);
    return bin < 0 ? 0 : bin >= n ? n - 1 : bin;
}

// Points of channel c: of different spread, some leaning to one side or the other, weights over several decades.
static inline void make_channel(made_layer *m, int64_t c, int n_points) {
    static double             w[KVQ_CHANNEL_BINS], wx[KVQ_CHANNEL_BINS];
    double                    squares = 0;
    kvq_channel_distribution *ch = &m->k.channels;
    memset(w, 0, sizeof w);
    memset(wx, 0, sizeof wx);
    for (int i = 0; i < n_points; i++) {
        double y = normal((uint32_t)c, i) * (0.1 + 0.05 * (double)(c % 4)), weight = exp(4 * uniform(7000, i + c)) / 64;
        double x = fmin(fmax(c % 3 == 0 ? y : c % 3 == 1 ? 4 * y * y - 0.6 : 0.6 - 4 * y * y, -1), 1);
        int    bin = bin_of(x, 1, KVQ_CHANNEL_BINS);
        weight *= exp(2 * normal(7001, c));
        w[bin] += weight;
        wx[bin] += weight * x;
        squares += weight * x * x;
    }
    for (int i = 0; i < KVQ_CHANNEL_BINS; i++) {
        int64_t at = c * KVQ_CHANNEL_BINS + i;
        if (w[i] == 0) continue;
        ch->w[at] = (float)w[i];
        ch->x[at] = (float)(wx[i] / w[i]);
        squares -= wx[i] * wx[i] / w[i];
    }
    ch->scatter[c] = fmax(squares, 0);
    ch->n_points[c] = n_points;
    ch->n_outliers[c] = c % 5;
    m->k.lower[c] = kvq_float_of_half(kvq_half_of_float((float)(-1 - uniform(7002, c))));
    m->k.upper[c] = kvq_float_of_half(kvq_half_of_float((float)(1 + 2 * uniform(7003, c))));
}

static inline void make_values(made_layer *m, int n_points) {
    kvq_value_distribution *v = &m->layer.rotated;
    static double           w[KVQ_HISTOGRAM_BINS], wx[KVQ_HISTOGRAM_BINS], cells[3][N_CELLS];
    memset(w, 0, sizeof w);
    memset(wx, 0, sizeof wx);
    memset(cells, 0, sizeof cells);
    for (int i = 0; i < n_points; i++) {
        double x = normal(7010, i), y = normal(7011, i), weight = exp(2 * uniform(7012, i)), at[2] = {x, y};
        for (int j = 0; j < 2; j++) {
            w[bin_of(at[j], (double)KVQ_VALUE_REACH, KVQ_HISTOGRAM_BINS)] += weight;
            wx[bin_of(at[j], (double)KVQ_VALUE_REACH, KVQ_HISTOGRAM_BINS)] += weight * at[j];
        }
        int cell = bin_of(x, (double)KVQ_PAIR_REACH, KVQ_PAIR_CELLS) * KVQ_PAIR_CELLS +
                   bin_of(y, (double)KVQ_PAIR_REACH, KVQ_PAIR_CELLS);
        cells[0][cell] += weight;
        cells[1][cell] += weight * x;
        cells[2][cell] += weight * y;
    }
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        v->w[i] = (float)w[i];
        v->x[i] = w[i] > 0 ? (float)(wx[i] / w[i]) : 0;
    }
    for (int i = 0; i < N_CELLS; i++) {
        v->pair_w[i] = (float)cells[0][i];
        v->pair_x[i] = cells[0][i] > 0 ? (float)(cells[1][i] / cells[0][i]) : 0;
        v->pair_y[i] = cells[0][i] > 0 ? (float)(cells[2][i] / cells[0][i]) : 0;
    }
    v->scatter[0] = 0.25;
    v->scatter[1] = 0.5;
    *v->n_points = 2 * n_points;
    *v->scale_exponent = -3;
}

static inline made_layer *make_layer(int n_heads, int D, int n_points) {
    made_layer *m = NEW(1, made_layer);
    int64_t     d = (int64_t)n_heads * D;
    m->k.lower = NEW(d, float);
    m->k.upper = NEW(d, float);
    m->k.channels = (kvq_channel_distribution){.w = NEW(d * KVQ_CHANNEL_BINS, float),
                                               .x = NEW(d * KVQ_CHANNEL_BINS, float),
                                               .scatter = NEW(d, double),
                                               .n_points = NEW(d, int64_t),
                                               .n_outliers = NEW(d, int64_t)};
    m->layer = (kvq_measured_layer){.n_fractions = 1, .n_heads = n_heads, .n_kv_heads = n_heads, .head_dim = D};
    m->layer.k = &m->k;
    m->layer.kl = m->kl;
    m->layer.rotated = (kvq_value_distribution){.w = NEW(KVQ_HISTOGRAM_BINS, float),
                                                .x = NEW(KVQ_HISTOGRAM_BINS, float),
                                                .pair_w = NEW(N_CELLS, float),
                                                .pair_x = NEW(N_CELLS, float),
                                                .pair_y = NEW(N_CELLS, float),
                                                .scatter = NEW(2, double),
                                                .n_points = &m->n_points,
                                                .scale_exponent = &m->exponent};
    for (int64_t c = 0; c < d && n_points > 0; c++) make_channel(m, c, n_points);
    make_values(m, 8 * n_points);
    return m;
}

static inline void drop_layer(made_layer *m) {
    void *owned[] = {m->k.lower,
                     m->k.upper,
                     m->k.channels.w,
                     m->k.channels.x,
                     m->k.channels.scatter,
                     m->k.channels.n_points,
                     m->k.channels.n_outliers,
                     m->layer.rotated.w,
                     m->layer.rotated.x,
                     m->layer.rotated.pair_w,
                     m->layer.rotated.pair_x,
                     m->layer.rotated.pair_y,
                     m->layer.rotated.scatter,
                     m};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

#endif
