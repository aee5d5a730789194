// SPDX-License-Identifier: Apache-2.0
// What is measured of a layer: the list of its arrays, outlier slots, second moments, and the fit of a whole layer.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "histogram_test.h"

enum { HEADS = 6, KV_HEADS = 2, DIM = 5, WIDTH = KV_HEADS * DIM };

static kvq_measure_options options_of(bool moments) {
    return (kvq_measure_options){.n_fractions = 2,
                                 .fractions = {0, 0.2},
                                 .weightings = KVQ_WEIGHTINGS_BASIC | 1u << KVQ_WEIGHT_FISHER,
                                 .moments = moments};
}

static kvq_measured_layer *new_layer(const kvq_measure_options *o) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measured_layer *layer = NULL;
    kvq_test_ok(kvq_measured_layer_create(&ctx, o, HEADS, KV_HEADS, DIM, &layer, &err), &err);
    return layer;
}

static int64_t elements(const kvq_measured_part *p) {
    int64_t n = 1;
    for (int i = 0; i < p->n_dims; i++) n *= p->dims[i];
    return n;
}

// Names are unique, extents are right, and every array can be written from end to end without touching another.
START_TEST(the_list_of_parts_is_complete) {
    kvq_context         ctx = kvq_test_context();
    kvq_measure_options o = options_of(_i % 2 == 1);
    o.k_axis = _i % 4 < 2 ? KVQ_AXIS_CHANNEL : KVQ_AXIS_TOKEN;
    o.allocated = _i >= 4;
    kvq_measured_layer *layer = new_layer(&o);
    kvq_measured_part   part, other;
    int                 n = 0;
    for (; kvq_measured_layer_parts(layer, n, &part); n++) {
        int64_t bytes = elements(&part) * (part.type == KVQ_PART_F32 ? 4 : 8);
        memset(part.data, n + 1, (size_t)bytes);
        for (int j = 0; j < n; j++) {
            ck_assert_int_eq(kvq_measured_layer_parts(layer, j, &other), 1);
            ck_assert_str_ne(part.name, other.name);
            ck_assert_int_eq(*(unsigned char *)other.data, j + 1);
        }
    }
    // counts, sums and three weightings of two arrays, for K and V and two fractions; thresholds; moments; of the
    // channel-allocated format (keys per channel only) five of each fraction and nine
    ck_assert_int_eq(n, 2 * 2 * (2 + 3 * 2) + (_i % 4 < 2 ? 2 * 2 : 0) + (_i % 2 == 1 ? 3 : 0) +
                            (_i >= 4 ? 2 * 5 + 9 : 0));
    kvq_measured_layer_destroy(&ctx, &layer);
    ck_assert_ptr_null(layer);
}
END_TEST

static bool has_part(const kvq_measured_layer *layer, const char *name, kvq_part_type type, int64_t n) {
    kvq_measured_part part;
    for (int i = 0; kvq_measured_layer_parts(layer, i, &part); i++) {
        if (strcmp(part.name, name) == 0) return part.type == type && elements(&part) == n && part.data != NULL;
    }
    return false;
}

static int n_parts(const kvq_measured_layer *layer) {
    kvq_measured_part part;
    int               n = 0;
    while (kvq_measured_layer_parts(layer, n, &part)) n++;
    return n;
}

START_TEST(parts_of_the_channel_allocated_format) {
    static const struct {
        const char   *name;
        kvq_part_type type;
        int64_t       n;
    } PARTS[] = {
        {"k/0/channel_weight", KVQ_PART_F32, WIDTH * KVQ_CHANNEL_BINS},
        {"k/0/channel_mean", KVQ_PART_F32, WIDTH * KVQ_CHANNEL_BINS},
        {"k/0/channel_scatter", KVQ_PART_F64, WIDTH},
        {"k/0/channel_points", KVQ_PART_I64, WIDTH},
        {"k/0/channel_outliers", KVQ_PART_I64, WIDTH},
        {"k/1/channel_weight", KVQ_PART_F32, WIDTH * KVQ_CHANNEL_BINS},
        {"k/1/channel_mean", KVQ_PART_F32, WIDTH * KVQ_CHANNEL_BINS},
        {"k/1/channel_scatter", KVQ_PART_F64, WIDTH},
        {"k/1/channel_points", KVQ_PART_I64, WIDTH},
        {"k/1/channel_outliers", KVQ_PART_I64, WIDTH},
        {"rotated/weight", KVQ_PART_F32, KVQ_HISTOGRAM_BINS},
        {"rotated/mean", KVQ_PART_F32, KVQ_HISTOGRAM_BINS},
        {"rotated/pair_weight", KVQ_PART_F32, KVQ_PAIR_CELLS * KVQ_PAIR_CELLS},
        {"rotated/pair_x", KVQ_PART_F32, KVQ_PAIR_CELLS * KVQ_PAIR_CELLS},
        {"rotated/pair_y", KVQ_PART_F32, KVQ_PAIR_CELLS * KVQ_PAIR_CELLS},
        {"rotated/scatter", KVQ_PART_F64, 2},
        {"rotated/n_points", KVQ_PART_I64, 1},
        {"rotated/scale_exponent", KVQ_PART_I64, 1},
        {"kl", KVQ_PART_F64, 2},
    };
    enum { N_PARTS = sizeof PARTS / sizeof *PARTS };
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measured_layer *layers[2] = {NULL, NULL};
    for (int a = 0; a < 2; a++) {
        kvq_measure_options o = options_of(true);
        o.allocated = a == 1;
        kvq_test_ok(kvq_measured_layer_create(&ctx, &o, HEADS, KV_HEADS, DIM, &layers[a], &err), &err);
    }
    ck_assert_int_eq(n_parts(layers[1]), n_parts(layers[0]) + N_PARTS);
    for (int i = 0; i < N_PARTS; i++) {
        ck_assert(has_part(layers[1], PARTS[i].name, PARTS[i].type, PARTS[i].n));
        ck_assert(!has_part(layers[0], PARTS[i].name, PARTS[i].type, PARTS[i].n));
    }
    for (int a = 0; a < 2; a++) kvq_measured_layer_destroy(&ctx, &layers[a]);
    kvq_measure_options by_token = options_of(true);
    by_token.allocated = true;
    by_token.k_axis = KVQ_AXIS_TOKEN;
    kvq_test_failed(kvq_measured_layer_create(&ctx, &by_token, HEADS, KV_HEADS, DIM, &layers[0], &err), KVQ_ERR_USAGE,
                    &err, "per token");
}
END_TEST

START_TEST(outlier_slots_follow_the_options) {
    kvq_measure_options o = options_of(false);
    ck_assert_int_eq(kvq_measured_k_side(&o, 0.01, 1024), 6);
    ck_assert_int_eq(kvq_measured_v_side(0.01, 1024), 6);
    ck_assert_int_eq(kvq_measured_k_side(&o, 0, 1024), 0);
    o.k_slots = 11;
    ck_assert_int_eq(kvq_measured_k_side(&o, 0.01, 1024), 11);
    ck_assert_int_eq(kvq_measured_k_side(&o, 0, 1024), 0); // none is none
    o.k_slots = -1;
    ck_assert_int_eq(kvq_measured_k_side(&o, 0.01, 192), 95);
    ck_assert_int_eq(kvq_measured_k_side(&o, 0.01, 8192), KVQ_BLOCK_MAX_SIDE);
    o.k_axis = KVQ_AXIS_TOKEN; // a range per token is that of what its outliers leave
    ck_assert_int_eq(kvq_measured_k_side(&o, 0.01, 192), 1);
    ck_assert_int_eq(kvq_measured_fraction(&o, 0.2), 1);
    ck_assert_int_eq(kvq_measured_fraction(&o, 0.1), -1);
}
END_TEST

// Against sums by the definition; windows in any order and any number of threads give the same bits.
START_TEST(moments_follow_the_definition) {
    enum { ROWS = 30, WINDOWS = 3, N = KV_HEADS * DIM * DIM };
    static float x[WINDOWS][ROWS * WIDTH];
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_fixed    sums[2][N] = {{{0, 0}}};
    double       scratch[KV_HEADS * (DIM * DIM + DIM)], got[2][N];
    ck_assert_int_eq(kvq_moments_scratch_doubles(KV_HEADS, DIM), KV_HEADS * (DIM * DIM + DIM));
    for (int i = 0; i < WINDOWS * ROWS * WIDTH; i++)
        x[i / (ROWS * WIDTH)][i % (ROWS * WIDTH)] = (float)(100 * (uniform(3, i) - 0.4));
    for (int w = 0; w < WINDOWS; w++) {
        ctx.n_threads = 1;
        kvq_moments_add(&ctx, x[w], ROWS, KV_HEADS, DIM, sums[0], scratch);
        ctx.n_threads = 3;
        kvq_moments_add(&ctx, x[WINDOWS - 1 - w], ROWS, KV_HEADS, DIM, sums[1], scratch);
    }
    ck_assert_mem_eq(sums[0], sums[1], sizeof sums[0]);
    kvq_test_ok(kvq_moments_finish(sums[0], WINDOWS, KV_HEADS, DIM, got[0], &err), &err);
    for (int h = 0; h < KV_HEADS; h++) {
        for (int i = 0; i < DIM; i++) {
            for (int j = 0; j < DIM; j++) {
                double expected = 0;
                for (int t = 0; t < WINDOWS * ROWS; t++) {
                    const float *row = x[t / ROWS] + (t % ROWS) * WIDTH + h * DIM;
                    expected += (double)row[i] * (double)row[j] / (WINDOWS * ROWS);
                }
                ck_assert_double_eq_tol(got[0][(h * DIM + i) * DIM + j], expected, 1e-9);
            }
        }
    }
}
END_TEST

// Squares beyond the range of the sums are an error, however often they are added or merged.
START_TEST(moments_beyond_their_range_are_refused) {
    enum { N = DIM * DIM };
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_fixed   sums[N] = {{0, 0}}, others[N] = {{0, 0}};
    double      scratch[DIM * DIM + DIM], moments[N];
    float       x[DIM] = {1, -2, 3e7f, 0, 5};
    x[2] = 4e7f; // 1.6e15 is below 2^51
    kvq_moments_add(&ctx, x, 1, 1, DIM, sums, scratch);
    kvq_test_ok(kvq_moments_finish(sums, 1, 1, DIM, moments, &err), &err);
    ck_assert(moments[2 * DIM + 2] == (double)x[2] * (double)x[2] && moments[1 * DIM + 2] == -2 * (double)x[2]);
    x[2] = 1e18f;
    for (int i = 0; i < 4; i++) {
        kvq_moments_add(&ctx, x, 1, 1, DIM, i % 2 == 0 ? sums : others, scratch);
        for (int j = 0; j < N; j++) kvq_moments_merge(&sums[j], others[j], j / DIM == j % DIM);
        kvq_test_failed(kvq_moments_finish(sums, 2, 1, DIM, moments, &err), KVQ_ERR_NUMERICAL, &err,
                        "head 0, channel 2");
    }
}
END_TEST

// ---------------------------------------------------------------- a layer

// Elements of the two heads on different scales, so that a table per head differs from one for both.
static void fill(kvq_measured_layer *layer, double weight) {
    kvq_error err = {0};
    for (int f = 0; f < layer->n_fractions; f++) {
        for (int h = 0; h < KV_HEADS; h++) {
            kvq_context    ctx = kvq_test_context();
            kvq_histogram *histogram = NULL;
            kvq_test_ok(kvq_histogram_create(&ctx, layer->weightings, &histogram, &err), &err);
            for (int i = 0; i < 500; i++) add(histogram, (float)((2 * uniform(4, i) - 1) / (1 + h + f)), weight);
            kvq_test_ok(kvq_distribution_take(histogram, &layer->k[f].heads[h], &err), &err);
            kvq_test_ok(kvq_distribution_take(histogram, &layer->v[f].heads[h], &err), &err);
            drop(&histogram);
        }
        for (int c = 0; c < WIDTH; c++) {
            layer->k[f].lower[c] = -1.0001f - (float)f;
            layer->k[f].upper[c] = 1.0001f + (float)c;
        }
    }
}

static kvq_artifact *new_artifact(const kvq_measure_options *o, const kvq_fit_options *fit) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *a = NULL;
    kvq_test_ok(kvq_artifact_create(&ctx, 1, &a, &err), &err);
    a->model.n_kv_heads = KV_HEADS;
    a->model.head_dim = DIM;
    kvq_artifact_describe_quantizer(a, o, fit);
    return a;
}

START_TEST(a_layer_is_fitted_as_the_options_say) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options o = options_of(false);
    kvq_measured_layer *layer = new_layer(&o);
    kvq_fit_options     fit = {.outlier_fraction = 0.2,
                               .k_bits = 2,
                               .v_bits = 3,
                               .v_datatype = KVQ_NF,
                               .weighting = KVQ_WEIGHT_FISHER,
                               .per_head = _i % 2 == 1,
                               .q_norm = _i >= 2,
                               .recent_tokens = 9};
    fill(layer, 0.01);
    o.sink_tokens = 3;
    kvq_artifact *a = new_artifact(&o, &fit);
    for (int twice = 0; twice < 2; twice++) kvq_test_ok(kvq_fit_layer(&ctx, layer, &o, &fit, a, 0, &err), &err);
    const kvq_tensor_quant *k = &a->layers[0].k, *v = &a->layers[0].v;
    ck_assert(k->bits == 2 && k->datatype == KVQ_NUQ && k->axis == KVQ_AXIS_CHANNEL && k->n_levels == 4);
    ck_assert(v->bits == 3 && v->datatype == KVQ_NF && v->axis == KVQ_AXIS_TOKEN && v->lower == NULL);
    ck_assert(k->n_groups == (fit.per_head ? KV_HEADS : 1) && (k->decode_levels != NULL) == fit.q_norm);
    ck_assert(a->quantizer.recent_tokens == 9 && a->quantizer.sink_tokens == 3 && a->quantizer.n_side_k == 2);
    if (fit.per_head) ck_assert(k->codebook[0] < -0.35f && k->codebook[4] > -0.35f); // scales 1/2 and 1/3
    ck_assert(k->lower[0] == -1.0001f - 1.0f);
    ck_assert_int_eq(k->fit.n_points, 1000);
    kvq_artifact_destroy(&ctx, &a);

    fit.outlier_fraction = 0.1;
    a = new_artifact(&o, &fit);
    kvq_test_failed(kvq_fit_layer(&ctx, layer, &o, &fit, a, 0, &err), KVQ_ERR_INTERNAL, &err, "were not measured");
    fit.outlier_fraction = 0;
    fit.weighting = KVQ_WEIGHT_FISHER_SCALED;
    kvq_test_failed(kvq_fit_layer(&ctx, layer, &o, &fit, a, 0, &err), KVQ_ERR_INTERNAL, &err, "fisher-scaled");
    kvq_artifact_destroy(&ctx, &a);
    kvq_measured_layer_destroy(&ctx, &layer);
}
END_TEST

START_TEST(a_weighted_fit_needs_weight) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options o = options_of(false);
    kvq_measured_layer *layer = new_layer(&o);
    kvq_fit_options     fit = {.k_bits = 2, .v_bits = 2, .weighting = KVQ_WEIGHT_FISHER};
    fill(layer, 0);
    kvq_artifact *a = new_artifact(&o, &fit);
    kvq_test_failed(kvq_fit_layer(&ctx, layer, &o, &fit, a, 0, &err), KVQ_ERR_NUMERICAL, &err,
                    "layer 0, K: the loss does not feel any of the 1000 elements");
    fit.weighting = KVQ_WEIGHT_NONE;
    kvq_test_ok(kvq_fit_layer(&ctx, layer, &o, &fit, a, 0, &err), &err);
    kvq_artifact_destroy(&ctx, &a);
    kvq_measured_layer_destroy(&ctx, &layer);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(the_list_of_parts_is_complete, 6),
    KVQ_CASE(parts_of_the_channel_allocated_format),
    KVQ_CASE(outlier_slots_follow_the_options),
    KVQ_CASE(moments_follow_the_definition),
    KVQ_CASE(moments_beyond_their_range_are_refused),
    KVQ_LOOP(a_layer_is_fitted_as_the_options_say, 4),
    KVQ_CASE(a_weighted_fit_needs_weight),
};
KVQ_TEST_MAIN("measured", CASES)
