// SPDX-License-Identifier: Apache-2.0
// Quantiles: radix selection against sorting, whatever the blocks, threads and signs; thresholds; refusals.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"
#include "units.h"

enum { N_ROWS = 700, N_COLUMNS = 37, N_RANKS = 6 };
static const int64_t RANKS[N_RANKS] = {0, 699, 350, 3, 4, 350};

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

static void expect_sorted_values(const kvq_radix *radix, const float *x) {
    float column[N_ROWS];
    for (int c = 0; c < N_COLUMNS; c++) {
        for (int row = 0; row < N_ROWS; row++) column[row] = x[row * N_COLUMNS + c];
        qsort(column, N_ROWS, sizeof *column, by_value);
        for (int i = 0; i < N_RANKS; i++) ck_assert(kvq_radix_value(radix, c, i) == column[RANKS[i]]);
    }
}

// _i chooses the block size; blocks come in a different order in every pass.
START_TEST(selection_equals_sorting) {
    static const int BLOCK[] = {1, 3, 64, 700};
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_radix       *radix = NULL;
    float           *x = matrix();
    int              block = BLOCK[_i], n_blocks = (N_ROWS + block - 1) / block;
    kvq_test_ok(kvq_radix_create(&ctx, N_COLUMNS, RANKS, N_RANKS, &radix, &err), &err);
    for (int pass = 0; pass < KVQ_RADIX_PASSES; pass++) {
        ctx.n_threads = 1 + 3 * pass;
        for (int b = 0; b < n_blocks; b++) {
            int first = (pass == 1 ? n_blocks - 1 - b : b) * block, n = N_ROWS - first < block ? N_ROWS - first : block;
            kvq_radix_push(&ctx, radix, x + first * N_COLUMNS, n);
        }
        kvq_test_ok(kvq_radix_end_pass(radix, &err), &err);
    }
    expect_sorted_values(radix, x);
    kvq_radix_destroy(&ctx, &radix);
    ck_assert_ptr_null(radix);
    free(x);
}
END_TEST

START_TEST(selection_refuses_what_it_cannot_answer) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_radix    *radix = NULL;
    const float   x[4] = {1, 2, 3, 4};
    const int64_t rank = 3, negative = -1;
    kvq_test_failed(kvq_radix_create(&ctx, 0, &rank, 1, &radix, &err), KVQ_ERR_USAGE, &err, "0 columns");
    kvq_test_failed(kvq_radix_create(&ctx, 2, &negative, 1, &radix, &err), KVQ_ERR_USAGE, &err, "rank 0 is -1");
    kvq_test_failed(kvq_radix_create(&ctx, INT64_MAX / 2, &rank, 1, &radix, &err), KVQ_ERR_USAGE, &err, "columns");
    ck_assert_ptr_null(radix);

    kvq_test_ok(kvq_radix_create(&ctx, 1, &rank, 1, &radix, &err), &err);
    kvq_radix_push(&ctx, radix, x, 3);
    kvq_test_failed(kvq_radix_end_pass(radix, &err), KVQ_ERR_INPUT, &err,
                    "rank 3 was asked for, but there are only 3 rows");
    kvq_radix_push(&ctx, radix, x + 3, 1);
    kvq_test_ok(kvq_radix_end_pass(radix, &err), &err);
    kvq_radix_push(&ctx, radix, x, 3);
    kvq_test_failed(kvq_radix_end_pass(radix, &err), KVQ_ERR_INPUT, &err, "pass 2 had 3 rows, the first one 4");
    kvq_radix_push(&ctx, radix, x, 1); // four rows again, but none of them is 4
    kvq_test_failed(kvq_radix_end_pass(radix, &err), KVQ_ERR_INPUT, &err, "column 0 was not the same in pass 2");
    kvq_radix_destroy(&ctx, &radix);
    kvq_radix_destroy(&ctx, &radix);
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
    float       got_lower, got_upper;
    kvq_test_ok(kvq_thresholds(&ctx, x, n, 1, fraction, &got_lower, &got_upper, &err), &err);
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
    float       x[6] = {1, 2, 3, 4, NAN, 6}, lower[2] = {8, 8}, upper[2] = {9, 9};
    kvq_test_failed(kvq_thresholds(&ctx, x, 3, 2, 0.01, lower, upper, &err), KVQ_ERR_NUMERICAL, &err,
                    "row 2, channel 0 is nan");
    x[4] = -INFINITY;
    kvq_test_failed(kvq_thresholds(&ctx, x, 3, 2, 0, lower, upper, &err), KVQ_ERR_NUMERICAL, &err,
                    "row 2, channel 0 is -inf");
    kvq_test_failed(kvq_thresholds(&ctx, x, 0, 2, 0, lower, upper, &err), KVQ_ERR_INPUT, &err, "0 rows");
    kvq_test_failed(kvq_thresholds(&ctx, x, 1, 2, 1, lower, upper, &err), KVQ_ERR_USAGE, &err, "outlier share 1");
    kvq_test_failed(kvq_thresholds(&ctx, x, 1, 2, (double)NAN, lower, upper, &err), KVQ_ERR_USAGE, &err,
                    "outlier share");
    ck_assert(lower[0] == 8 && lower[1] == 8 && upper[0] == 9 && upper[1] == 9);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(selection_equals_sorting, 4),
    KVQ_CASE(selection_refuses_what_it_cannot_answer),
    KVQ_CASE(interpolation_follows_the_definition),
    KVQ_GOLDEN_CASE(thresholds_equal_the_reference),
    KVQ_CASE(thresholds_without_outliers_are_the_extremes),
    KVQ_CASE(thresholds_refuse_bad_input),
};
KVQ_TEST_MAIN("quantile", CASES)
