// SPDX-License-Identifier: Apache-2.0
// Thresholds from the ends of columns against sorting, whatever the blocks, parts, threads and signs; refusals.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"
#include "units.h"

enum { N_ROWS = 700, N_COLUMNS = 37 };

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// Columns of very different kinds: all magnitudes of f32, few distinct values, one value, both zeros.
static float *matrix(void) {
    float *x = calloc((size_t)N_ROWS * N_COLUMNS, sizeof *x);
    for (int i = 0; i < N_ROWS * N_COLUMNS; i++) {
        double u = kvq_rng_uniform(5, KVQ_RNG_TEST, 0, (uint64_t)i) - 0.5;
        int    kind = i % N_COLUMNS % 4, exponent = (int)kvq_rng_below(5, KVQ_RNG_TEST, 1, (uint64_t)i, 270) - 140;
        x[i] = kind == 0 ? (float)ldexp(u, exponent) : kind == 1 ? (float)(int)(u * 10) : kind == 2 ? 7.5f : (float)u;
        if (kind == 3 && i % 3 != 0) x[i] = u < 0 ? -0.0f : 0.0f;
    }
    return x;
}

// What thresholds say by definition: interpolation in the sorted column.
static void expect_column(const float *x, int c, double fraction, float lower, float upper) {
    float             column[N_ROWS];
    kvq_quantile_rank at[2] = {kvq_quantile_position(fraction / 2, N_ROWS),
                               kvq_quantile_position(1 - fraction / 2, N_ROWS)};
    float             got[2] = {lower, upper};
    for (int row = 0; row < N_ROWS; row++) column[row] = x[row * N_COLUMNS + c];
    qsort(column, N_ROWS, sizeof *column, by_value);
    for (int side = 0; side < 2; side++) {
        int64_t rank = at[side].rank, next = rank + 1 < N_ROWS ? rank + 1 : rank;
        ck_assert(got[side] == kvq_quantile_interpolate(column[rank], column[next], at[side].fraction));
    }
}

static const double FRACTIONS[] = {0, 0.001, 0.01, 0.1, 0.5, 0.99};
#define N_FRACTIONS ((int)(sizeof FRACTIONS / sizeof *FRACTIONS))

// Rows in blocks of some size, dealt to two states of which one is merged into the other, on several threads.
static void collect(kvq_context *ctx, const float *x, int block, bool backwards, kvq_tails *t[2]) {
    kvq_error err = {0};
    int       n_blocks = (N_ROWS + block - 1) / block;
    for (int b = 0; b < n_blocks; b++) {
        int first = (backwards ? n_blocks - 1 - b : b) * block;
        int n = N_ROWS - first < block ? N_ROWS - first : block;
        kvq_test_ok(kvq_tails_push(ctx, t[b % 2], x + first * N_COLUMNS, n, &err), &err);
    }
    float *packed = calloc((size_t)(2 * N_COLUMNS * kvq_tails_width(t[1]) + 1), sizeof *packed);
    kvq_tails_pack(ctx, t[1], packed);
    kvq_test_ok(kvq_tails_merge(ctx, t[0], packed, kvq_tails_rows(t[1]), &err), &err);
    ck_assert_int_eq(kvq_tails_rows(t[0]), N_ROWS);
    free(packed);
}

// _i chooses fraction, block size, order and threads.
START_TEST(thresholds_equal_sorting) {
    static const int BLOCK[] = {1, 3, 64, 700};
    double           fraction = FRACTIONS[_i % N_FRACTIONS];
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_tails       *t[2] = {NULL, NULL};
    float           *x = matrix(), lower[N_COLUMNS], upper[N_COLUMNS];
    ctx.n_threads = 1 + _i % 3;
    for (int i = 0; i < 2; i++)
        kvq_test_ok(kvq_tails_create(&ctx, N_COLUMNS, kvq_tails_needed(fraction, KVQ_SCOPE_CHANNEL, N_COLUMNS, N_ROWS),
                                     &t[i], &err),
                    &err);
    collect(&ctx, x, BLOCK[_i / N_FRACTIONS], _i % 2 == 1, t);
    kvq_test_ok(kvq_tails_thresholds(&ctx, t[0], fraction, KVQ_SCOPE_CHANNEL, lower, upper, &err), &err);
    for (int c = 0; c < N_COLUMNS; c++) expect_column(x, c, fraction, lower[c], upper[c]);
    for (int i = 0; i < 2; i++) kvq_tails_destroy(&ctx, &t[i]);
    ck_assert_ptr_null(t[0]);
    free(x);
}
END_TEST

// Packed ends are numbers in a defined order, whatever the way they came.
START_TEST(packed_ends_do_not_depend_on_the_way) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_tails  *t[2];
    float      *x = matrix(), *packed[2];
    for (int way = 0; way < 2; way++) {
        for (int i = 0; i < 2; i++) kvq_test_ok(kvq_tails_create(&ctx, N_COLUMNS, 9, &t[i], &err), &err);
        collect(&ctx, x, way == 0 ? 1 : 50, way == 1, t);
        ck_assert_int_eq(kvq_tails_width(t[0]), 9);
        packed[way] = calloc((size_t)2 * N_COLUMNS * 9, sizeof(float));
        kvq_tails_pack(&ctx, t[0], packed[way]);
        for (int i = 0; i < 2; i++) kvq_tails_destroy(&ctx, &t[i]);
    }
    ck_assert_mem_eq(packed[0], packed[1], (size_t)2 * N_COLUMNS * 9 * sizeof(float));
    ck_assert(packed[0][0] <= packed[0][8] && packed[0][9] >= packed[0][17]);
    for (int way = 0; way < 2; way++) free(packed[way]);
    free(x);
}
END_TEST

START_TEST(too_few_kept_values_are_refused) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_tails  *t = NULL;
    float       x[100], lower, upper;
    for (int i = 0; i < 100; i++) x[i] = (float)i;
    kvq_test_failed(kvq_tails_create(&ctx, 0, 1, &t, &err), KVQ_ERR_INPUT, &err, "0 channels");
    kvq_test_failed(kvq_tails_create(&ctx, INT64_MAX / 32, 2, &t, &err), KVQ_ERR_INPUT, &err, "channels");
    kvq_test_ok(kvq_tails_create(&ctx, 1, 2, &t, &err), &err);
    kvq_test_ok(kvq_tails_push(&ctx, t, x, 100, &err), &err);
    kvq_test_failed(kvq_tails_thresholds(&ctx, t, 0.1, KVQ_SCOPE_CHANNEL, &lower, &upper, &err), KVQ_ERR_INTERNAL, &err,
                    "need 6");
    kvq_tails_destroy(&ctx, &t);
}
END_TEST

START_TEST(interpolation_follows_the_definition) {
    kvq_quantile_rank p = kvq_quantile_position(0.995, 4096);
    ck_assert_int_eq(p.rank, 4074);
    ck_assert_double_eq_tol(p.fraction, 0.525, 1e-11); // 4074.525 in f64: 2^-40 apart
    ck_assert(kvq_quantile_interpolate(4074, 4075, p.fraction) == 4074.525f);
    ck_assert(kvq_quantile_position(1, 5).rank == 4 && kvq_quantile_position(1, 5).fraction == 0);
    ck_assert(kvq_quantile_interpolate(-3e38f, 3e38f, 0.5) == 0); // the difference does not fit into f32
}
END_TEST

static void expect_thresholds(const float *x, int n, double fraction, double lower, double upper) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_tails  *t = NULL;
    float       got_lower, got_upper;
    kvq_test_ok(kvq_tails_create(&ctx, 1, kvq_tails_needed(fraction, KVQ_SCOPE_CHANNEL, 1, n), &t, &err), &err);
    kvq_test_ok(kvq_tails_push(&ctx, t, x, n, &err), &err);
    kvq_test_ok(kvq_tails_thresholds(&ctx, t, fraction, KVQ_SCOPE_CHANNEL, &got_lower, &got_upper, &err), &err);
    kvq_tails_destroy(&ctx, &t);
    ck_assert(got_lower == (float)lower && got_upper == (float)upper);
}

START_TEST(thresholds_equal_the_reference) {
    cJSON       *units = units_read();
    const cJSON *example;
    float        x[4096];
    int          n_all, n;
    double      *all = units_array(units, "quantile_input_1000", &n_all);
    cJSON_ArrayForEach(example, units_get(units, "quantile")) {
        bool    reuse = cJSON_IsString(units_get(example, "x"));
        double *values = reuse ? all : units_array(example, "x", &n);
        if (reuse) n = n_all;
        for (int i = 0; i < n; i++) x[i] = (float)values[i];
        expect_thresholds(x, n, units_number(example, "outliers"), units_number(example, "lower"),
                          units_number(example, "upper"));
        if (!reuse) free(values);
    }
    for (int i = 0; i < 4096; i++) x[i] = (float)(i * 1001 % 4096); // 1001 is odd: a permutation of 0 .. 4095
    const cJSON *steps = units_get(units, "quantile_0_to_4095_o0.01");
    expect_thresholds(x, 4096, 0.01, units_number(steps, "lower"), units_number(steps, "upper"));
    free(all);
    cJSON_Delete(units);
}
END_TEST

START_TEST(thresholds_without_outliers_are_the_extremes) {
    const float x[] = {3, -1, 2, -5, 0};
    expect_thresholds(x, 5, 0, -5, 3);
    expect_thresholds(x, 1, 0.01, 3, 3);
    ck_assert(kvq_range_middle(-5, 3) == -1 && kvq_range_half(-5, 3) == 4);
}
END_TEST

START_TEST(thresholds_refuse_bad_input) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_tails  *t = NULL;
    float       x[8] = {1, 2, 3, 4, NAN, 6, 7, 8}, lower[2] = {8, 8}, upper[2] = {9, 9};
    kvq_test_ok(kvq_tails_create(&ctx, 2, 3, &t, &err), &err);
    kvq_test_failed(kvq_tails_push(&ctx, t, x, 3, &err), KVQ_ERR_NUMERICAL, &err, "row 2, channel 0 is nan");
    x[4] = -INFINITY;
    kvq_test_failed(kvq_tails_push(&ctx, t, x, 3, &err), KVQ_ERR_NUMERICAL, &err, "row 2, channel 0 is -inf");
    kvq_test_failed(kvq_tails_merge(&ctx, t, x, 2, &err), KVQ_ERR_NUMERICAL, &err, "channel 1 is -inf");
    kvq_test_failed(kvq_tails_thresholds(&ctx, t, 0, KVQ_SCOPE_CHANNEL, lower, upper, &err), KVQ_ERR_INPUT, &err,
                    "no rows");
    kvq_test_ok(kvq_tails_push(&ctx, t, x, 1, &err), &err);
    kvq_test_failed(kvq_tails_thresholds(&ctx, t, 1, KVQ_SCOPE_CHANNEL, lower, upper, &err), KVQ_ERR_USAGE, &err,
                    "outlier share 1");
    kvq_test_failed(kvq_tails_thresholds(&ctx, t, (double)NAN, KVQ_SCOPE_CHANNEL, lower, upper, &err), KVQ_ERR_USAGE,
                    &err, "outlier share");
    kvq_tails_destroy(&ctx, &t);
    ck_assert(lower[0] == 8 && lower[1] == 8 && upper[0] == 9 && upper[1] == 9);
}
END_TEST

// Thresholds of all columns together, against the definition on sorted copies: columns of very different sizes, one
// that lies beyond the quantiles as a whole and keeps its own ends.
START_TEST(matrix_thresholds_follow_the_definition) {
    enum { ROWS = 200, COLUMNS = 6 };
    static float x[ROWS * COLUMNS], sorted[ROWS * COLUMNS];
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_tails   *t = NULL;
    const double MATRIX_FRACTIONS[] = {0, 0.01, 0.1, 0.6};
    double       fraction = MATRIX_FRACTIONS[_i];
    float        lower[COLUMNS], upper[COLUMNS];
    for (int i = 0; i < ROWS * COLUMNS; i++) {
        double u = kvq_rng_uniform(4, KVQ_RNG_TEST, 70, (uint64_t)i);
        x[i] = i % COLUMNS == 5 ? (float)(100 + u) : (float)((u - 0.5) * (1 + i % COLUMNS));
        sorted[i] = x[i];
    }
    qsort(sorted, ROWS * COLUMNS, sizeof *sorted, by_value);
    kvq_quantile_rank a = kvq_quantile_position(fraction / 2, ROWS * COLUMNS),
                      b = kvq_quantile_position(1 - fraction / 2, ROWS * COLUMNS);
    float   low = kvq_quantile_interpolate(sorted[a.rank], sorted[a.rank + 1], a.fraction);
    float   high = fraction > 0 ? kvq_quantile_interpolate(sorted[b.rank], sorted[b.rank + 1], b.fraction)
                                : sorted[ROWS * COLUMNS - 1];
    int64_t needed = kvq_tails_needed(fraction, KVQ_SCOPE_MATRIX, COLUMNS, ROWS);
    kvq_test_ok(kvq_tails_create(&ctx, COLUMNS, needed, &t, &err), &err);
    kvq_test_ok(kvq_tails_push(&ctx, t, x, ROWS, &err), &err);
    kvq_test_ok(kvq_tails_thresholds(&ctx, t, fraction, KVQ_SCOPE_MATRIX, lower, upper, &err), &err);
    for (int c = 0; c < COLUMNS; c++) {
        float inside[2] = {INFINITY, -INFINITY}, all[2] = {INFINITY, -INFINITY};
        for (int r = 0; r < ROWS; r++) {
            float value = x[r * COLUMNS + c];
            all[0] = fminf(all[0], value);
            all[1] = fmaxf(all[1], value);
            if (value < low || value > high) continue;
            inside[0] = fminf(inside[0], value);
            inside[1] = fmaxf(inside[1], value);
        }
        const float *expected = inside[0] <= inside[1] ? inside : all;
        ck_assert(lower[c] == expected[0] && upper[c] == expected[1]);
    }
    ck_assert(fraction < 0.2 || lower[5] >= 100); // the last column is beyond the upper quantile as a whole
    kvq_tails_destroy(&ctx, &t);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(matrix_thresholds_follow_the_definition, 4),   KVQ_LOOP(thresholds_equal_sorting, 4 * N_FRACTIONS),
    KVQ_CASE(packed_ends_do_not_depend_on_the_way),         KVQ_CASE(too_few_kept_values_are_refused),
    KVQ_CASE(interpolation_follows_the_definition),         KVQ_GOLDEN_CASE(thresholds_equal_the_reference),
    KVQ_CASE(thresholds_without_outliers_are_the_extremes), KVQ_CASE(thresholds_refuse_bad_input),
};
KVQ_TEST_MAIN("tails", CASES)
