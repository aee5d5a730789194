// SPDX-License-Identifier: Apache-2.0
// Estimates against computations by hand; how often their intervals contain the truth is measured in test_coverage.c.
#include <math.h>
#include <stdlib.h>

#include "decoder_impl.h"
#include "kvq_test.h"
#include "limited_memory.h"

#define CLOSE 1e-14 // a few roundings of numbers around 1

static const double NONE = (double)NAN;

static void expect(kvq_estimate x, double value, double stderr_, double low, double high, double tolerance) {
    const double got[] = {x.value, x.stderr_, x.low, x.high}, wanted[] = {value, stderr_, low, high};
    for (int i = 0; i < 4; i++) {
        if (isnan(wanted[i]) || isinf(wanted[i])) {
            ck_assert_msg(isnan(wanted[i]) ? isnan(got[i]) : got[i] == wanted[i], "number %d: %g", i, got[i]);
        } else {
            ck_assert_double_eq_tol(got[i], wanted[i], tolerance);
        }
    }
}

// ---------------------------------------------------------------- ratios

// Below KVQ_BOOTSTRAP_BLOCKS: mean 7/3, squares of residuals (16 + 1 + 25) / 9, Student's 4.3027 with two degrees of
// freedom; two blocks: 1 and 3, error 1, Student's 12.7062.
START_TEST(few_blocks_have_students_interval) {
    const double x[] = {1, 2, 4}, error = sqrt(42.0 / 9 * 3 / 2) / 3, y[] = {1, 3};
    expect(kvq_estimate_ratio(x, NULL, 3), 7.0 / 3, error, 7.0 / 3 - 4.3027 * error, 7.0 / 3 + 4.3027 * error, CLOSE);
    expect(kvq_estimate_ratio(y, NULL, 2), 2, 1, 2 - 12.7062, 2 + 12.7062, CLOSE);
}
END_TEST

// Sums 2, 6 over counts 1, 2: 8/3; residuals -2/3 and 2/3; error sqrt(8/9 * 2) / 3.
START_TEST(ratios_weigh_blocks_by_their_counts) {
    const double sums[] = {2, 6}, counts[] = {1, 2}, error = 4.0 / 9;
    expect(kvq_estimate_ratio(sums, counts, 2), 8.0 / 3, error, 8.0 / 3 - 12.7062 * error, 8.0 / 3 + 12.7062 * error,
           CLOSE);
}
END_TEST

START_TEST(what_has_no_scatter_or_no_blocks_says_so) {
    const double same[] = {0.25, 0.25, 0.25, 0.25, 0.25}, zeros[9] = {0}, bad[] = {1, NONE, 2, 3, 5};
    const double big[] = {1e308, 1e308, 1e308};
    expect(kvq_estimate_ratio(same, NULL, 5), 0.25, 0, 0.25, 0.25, CLOSE);
    expect(kvq_estimate_ratio(same, NULL, 1), 0.25, NONE, NONE, NONE, CLOSE); // one window says nothing of scatter
    expect(kvq_estimate_ratio(zeros, NULL, 9), 0, 0, 0, 0, CLOSE);
    expect(kvq_estimate_ratio(zeros, zeros, 9), NONE, NONE, NONE, NONE, CLOSE);
    expect(kvq_estimate_ratio(zeros, NULL, 0), NONE, NONE, NONE, NONE, CLOSE);
    expect(kvq_estimate_ratio(bad, NULL, 5), NONE, NONE, NONE, NONE, CLOSE);
    expect(kvq_estimate_ratio(same, bad, 5), NONE, NONE, NONE, NONE, CLOSE);
    ck_assert(kvq_estimate_ratio(big, NULL, 3).value == (double)INFINITY);
}
END_TEST

// A bucket that only some windows have: the others are as if they were not there, be they few or many.
START_TEST(empty_blocks_are_not_there) {
    const double sums[] = {0, 1, 0, 5, 2, 0, 4, 3, 0, 0, 7, 1, 0}, counts[] = {0, 2, 0, 3, 1, 0, 4, 1, 0, 0, 2, 3, 0};
    const double few[] = {1, 5, 2, 4, 3, 7, 1}, of[] = {2, 3, 1, 4, 1, 2, 3};
    kvq_estimate a = kvq_estimate_ratio(sums, counts, 13), b = kvq_estimate_ratio(few, of, 7);
    ck_assert_mem_eq(&a, &b, sizeof a);
    expect(kvq_estimate_ratio(sums, counts, 3), 0.5, NONE, NONE, NONE, CLOSE); // a single one
}
END_TEST

// All resamples of five blocks, 3125 equally likely ones, instead of 1999 that are drawn: 2.5 % of their t lie beyond
// the end, as near as 1999 draws say. The bound of twice Student's is not reached by these numbers.
START_TEST(ends_come_from_resampled_t) {
    enum { N = 5, N_ALL = 3125 };
    const double x[N] = {1, 1.6, 2.7, 3.1, 6};
    kvq_estimate m = kvq_estimate_ratio(x, NULL, N);
    double       student = 2.7764, t_low = (m.value - m.high) / m.stderr_;
    int          beyond = 0, at = 0;
    ck_assert_double_gt(-t_low, 1.02 * student); // farther out than Student's: the bootstrap's own
    ck_assert_double_lt(-t_low, 1.99 * student);
    ck_assert_double_eq_tol((m.value - m.low) / m.stderr_, student, 1e-4); // the short side is Student's
    for (int all = 0; all < N_ALL; all++) {
        double y[N], mean = 0, squares = 0;
        for (int i = 0, rest = all; i < N; i++, rest /= N) mean += (y[i] = x[rest % N]) / N;
        for (int i = 0; i < N; i++) squares += (y[i] - mean) * (y[i] - mean);
        double error = sqrt(squares / (N * (N - 1)));
        double t = error > 1e-9 ? (mean - m.value) / error : mean < m.value ? -HUGE_VAL : HUGE_VAL;
        beyond += t < t_low - 1e-9;
        at += fabs(t - t_low) <= 1e-9;
    }
    // standard error of a share of 2.5 % in 1999 draws: 0.35 %
    ck_assert_double_lt((double)beyond / N_ALL, 0.025 + 2 * 0.0035);
    ck_assert_double_gt((double)(beyond + at) / N_ALL, 0.025 - 2 * 0.0035);
    ck_assert_int_gt(at, 0);
}
END_TEST

// Skewed upwards: the upper end lies farther out, and nowhere nearer than Student's or farther than twice that. The
// same input gives the same bits; scaled input the same interval; negated input its mirror image.
START_TEST(intervals_follow_skewness) {
    enum { N = 12 };
    const double student = 2.2010; // 11 degrees of freedom
    double       x[N], scaled[N], negated[N];
    for (int i = 0; i < N; i++) {
        x[i] = exp(0.4 * i);
        scaled[i] = 4 * x[i];
        negated[i] = -x[i];
    }
    kvq_estimate m = kvq_estimate_ratio(x, NULL, N), again = kvq_estimate_ratio(x, NULL, N);
    kvq_estimate s = kvq_estimate_ratio(scaled, NULL, N), mirror = kvq_estimate_ratio(negated, NULL, N);
    double       up = (m.high - m.value) / m.stderr_, down = (m.value - m.low) / m.stderr_;
    ck_assert_mem_eq(&m, &again, sizeof m);
    ck_assert_double_ge(down, student - 1e-3);
    ck_assert_double_gt(up, 1.2 * down);
    ck_assert_double_le(up, 2 * student + 1e-3);
    expect(s, 4 * m.value, 4 * m.stderr_, 4 * m.low, 4 * m.high, 1e-9);
    // the ranks of the two ends mirror each other, and so do the draws, whose signs alone change
    expect(mirror, -m.value, m.stderr_, -m.high, -m.low, 1e-9);
}
END_TEST

// One event in one of eight blocks: a third of all resamples do not have it, and no scatter. The ends stay finite.
START_TEST(resamples_without_scatter_do_not_run_away) {
    const double x[] = {1, 0, 0, 0, 0, 0, 0, 0}, student = 2.3646;
    kvq_estimate m = kvq_estimate_ratio(x, NULL, 8);
    expect(m, 0.125, 0.125, 0.125 * (1 - student), 0.125 * (1 + 2 * student), 1e-4);
}
END_TEST

// Beyond 128 blocks neighbours are resampled together: error and value are exact, and an interval of normal numbers has
// the width of a normal one.
START_TEST(many_blocks_are_resampled_in_groups) {
    enum { N = 3000 };
    double *x = malloc(N * sizeof *x), sum = 0, squares = 0;
    for (int i = 0; i < N; i++) {
        x[i] = 0;
        for (int k = 0; k < 12; k++) x[i] += kvq_rng_uniform(3, KVQ_RNG_TEST, (uint32_t)k, (uint64_t)i) - 0.5;
        sum += x[i];
    }
    for (int i = 0; i < N; i++) squares += (x[i] - sum / N) * (x[i] - sum / N);
    kvq_estimate m = kvq_estimate_ratio(x, NULL, N);
    ck_assert_double_eq_tol(m.value, sum / N, CLOSE);
    ck_assert_double_eq_tol(m.stderr_, sqrt(squares / N / (N - 1)), CLOSE);
    // the standard error of the 50th of 1999 normal numbers from the end is 0.06
    ck_assert_double_eq_tol((m.high - m.value) / m.stderr_, 1.98, 0.18);
    ck_assert_double_eq_tol((m.value - m.low) / m.stderr_, 1.98, 0.18);
    free(x);
}
END_TEST

// 0.975 quantiles of Student's t from tables; the low end of numbers that are skewed upwards is Student's.
START_TEST(students_t_is_that_of_tables) {
    const struct {
        int64_t df;
        double  t;
    } TABLE[] = {{1, 12.706}, {2, 4.303}, {4, 2.776}, {9, 2.262}, {10, 2.228}, {15, 2.131}, {30, 2.042}, {63, 1.998}};
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++) {
        double x[64];
        for (int64_t k = 0; k <= TABLE[i].df; k++) x[k] = exp(4.0 * (double)k / (double)(TABLE[i].df + 1));
        kvq_estimate m = kvq_estimate_ratio(x, NULL, TABLE[i].df + 1);
        ck_assert_double_eq_tol((m.value - m.low) / m.stderr_, TABLE[i].t, 6e-4);
    }
}
END_TEST

// ---------------------------------------------------------------- functions of estimates

START_TEST(functions_move_value_error_and_ends) {
    kvq_estimate x = {0.04, 0.01, -0.01, 0.09};
    expect(estimate_root(x), 0.2, 0.025, 0, 0.3, CLOSE); // 0.01 / (2 * 0.2)
    expect(estimate_map(x, expm1, exp(0.04)), expm1(0.04), exp(0.04) * 0.01, expm1(-0.01), expm1(0.09), CLOSE);
    expect(estimate_root((kvq_estimate){0.04, NONE, NONE, NONE}), 0.2, NONE, NONE, NONE, CLOSE);
    expect(estimate_root((kvq_estimate){NONE, NONE, NONE, NONE}), NONE, NONE, NONE, NONE, CLOSE);
}
END_TEST

// ---------------------------------------------------------------- quantiles

static kvq_estimate quantile_of(const float *x, int64_t n_blocks, int64_t n, double q) {
    kvq_context  ctx = kvq_test_context();
    kvq_estimate out;
    kvq_test_ok(kvq_estimate_quantiles(&ctx, x, n_blocks, n, &q, 1, &out, NULL), NULL);
    return out;
}

// Nearest rank: the smallest value that a share of at least q does not exceed, among 1 .. N in mixed order. 0.07 * 100
// and 0.14 * 100 are rounded to beyond 7 and 14.
START_TEST(quantiles_are_nearest_ranks) {
    const struct {
        int64_t n;
        double  q;
        float   value;
    } RANKS[] = {{10, 0.5, 5},    {11, 0.5, 6},     {10, 0.51, 6},      {10, 0.9, 9},      {10, 0.91, 10},
                 {10, 0.99, 10},  {10, 0.01, 1},    {1, 0.5, 1},        {100, 0.07, 7},    {100, 0.14, 14},
                 {100, 0.99, 99}, {101, 0.99, 100}, {1000, 0.999, 999}, {999, 0.999, 999}, {1001, 0.999, 1000}};
    float x[1001];
    for (size_t i = 0; i < sizeof RANKS / sizeof *RANKS; i++) {
        for (int64_t k = 0; k < RANKS[i].n; k++) x[(k * 13) % RANKS[i].n] = (float)(k + 1);
        kvq_estimate v = quantile_of(x, 1, RANKS[i].n, RANKS[i].q);
        expect(v, (double)RANKS[i].value, NONE, NONE, NONE, CLOSE); // one block: no interval
    }
}
END_TEST

// Three blocks of 100: 1 .. 100, 11 .. 110 and 21 .. 120. The median of all has rank 150 and is 60 or 61 by counting:
// not above 60 are 60 + 50 + 40 = 150. Shares 0.6, 0.5, 0.4: error 0.1 / sqrt(3), times Student's 4.3027 is 0.24842;
// ranks 300 * (0.5 -+ 0.24842) -+ 1/2 = 74.97 and 225.03: the 75th and the 226th. Not above 35 are 35 + 25 + 15 = 75;
// above 85 are 15 + 25 + 35 = 75, so the 226th is 86.
START_TEST(ends_of_quantiles_are_quantiles_at_the_ends) {
    float x[300];
    for (int b = 0; b < 3; b++) {
        for (int i = 0; i < 100; i++) x[b * 100 + (i * 7) % 100] = (float)(b * 10 + i + 1);
    }
    expect(quantile_of(x, 3, 100, 0.5), 60, NONE, 35, 86, CLOSE);
}
END_TEST

// Values that lie the same in every block have shares without scatter; what is left is that of independent values:
// 1.95996 sqrt(0.25 / 400) = 0.04900, ranks 400 * (0.5 -+ 0.049) -+ 1/2 = 179.9 and 220.1: the 180th and the 221st of
// 1, 1, 1, 1, 2, 2, ... of which there are four each.
START_TEST(quantiles_scatter_at_least_as_independent_values) {
    float x[400];
    for (int i = 0; i < 400; i++) x[i] = (float)(i % 100 + 1);
    expect(quantile_of(x, 4, 100, 0.5), 50, NONE, 45, 56, CLOSE);
    // 0.99: 1.95996 sqrt(0.0099 / 400) = 0.00975; ranks 396 - 3.9 - 0.5 = 391.6, the 392nd; 400.4 + 1, beyond the last
    expect(quantile_of(x, 4, 100, 0.99), 99, NONE, 98, (double)INFINITY, CLOSE);
    // one block all above the other: Student's with one degree of freedom is 12.7, and neither end is known
    for (int i = 0; i < 100; i++) x[i] = 1000;
    expect(quantile_of(x, 2, 100, 0.5), 100, NONE, -(double)INFINITY, (double)INFINITY, CLOSE);
}
END_TEST

// Zeros are 55, 60 and 65 of three blocks of 100, the rest is 1, 2, 3, .. 120. Not above the median, 0, are 0.55, 0.6
// and 0.65: error 0.05 / sqrt(3), times 4.3027 is 0.12421; ranks 112.2 and 187.8: the 113th, a zero, and the 188th, 8.
START_TEST(ties_with_a_quantile_are_not_above_it) {
    float x[300], next = 1;
    for (int i = 0; i < 300; i++) x[i] = i % 100 < 55 + i / 100 * 5 ? 0 : next++;
    expect(quantile_of(x, 3, 100, 0.5), 0, NONE, 0, 8, CLOSE);
}
END_TEST

START_TEST(quantiles_of_odd_data) {
    const double q[] = {0.5, 0.99};
    kvq_context  ctx = kvq_test_context();
    kvq_estimate out[2];
    float        same[32], bad[32], x = 0;
    for (int i = 0; i < 32; i++) same[i] = 0.5f, bad[i] = i == 20 ? NAN : (float)i;
    kvq_test_ok(kvq_estimate_quantiles(&ctx, same, 4, 8, q, 2, out, NULL), NULL);
    expect(out[0], 0.5, NONE, 0.5, 0.5, CLOSE);
    expect(out[1], 0.5, NONE, 0.5, (double)INFINITY, CLOSE); // larger ones may be rarer than 1 in 32
    kvq_test_ok(kvq_estimate_quantiles(&ctx, bad, 4, 8, q, 2, out, NULL), NULL);
    for (int i = 0; i < 2; i++) expect(out[i], NONE, NONE, NONE, NONE, CLOSE);
    kvq_test_ok(kvq_estimate_quantiles(&ctx, &x, 0, 8, q, 2, out, NULL), NULL);
    for (int i = 0; i < 2; i++) expect(out[i], NONE, NONE, NONE, NONE, CLOSE);
}
END_TEST

START_TEST(quantiles_without_memory_fail_cleanly) {
    limited_memory memory = {.inner = kvq_test_context()};
    kvq_context    ctx = limited_context(&memory);
    kvq_error      err = {0};
    kvq_estimate   out;
    const float    x[] = {1, 2, 3, 4};
    const double   q = 0.5;
    for (int64_t n = 0; n < 2; n++) {
        memory.left = n;
        kvq_test_failed(kvq_estimate_quantiles(&ctx, x, 2, 2, &q, 1, &out, &err), KVQ_ERR_MEMORY, &err, "");
        ck_assert_int_eq(memory.n_live, 0);
    }
    memory.left = 2;
    kvq_test_ok(kvq_estimate_quantiles(&ctx, x, 2, 2, &q, 1, &out, &err), &err);
    ck_assert_int_eq(memory.n_live, 0);
}
END_TEST

// ---------------------------------------------------------------- against an earlier report

// Losses 2.1, 2.3, 2.5 after 2, 2.2, 2.3: differences 0.1, 0.1, 0.2, mean 0.4/3, error sqrt(sum of squares (1 + 1 + 4)
// / 900 * 3 / 2) / 3 = 1/30, while the losses themselves scatter by four times that. KL 0.11, 0.22, 0.36 after 0.1,
// 0.2, 0.3: 0.09 / 0.6 = 15 %; residuals 0.01 - 0.015, 0.02 - 0.03, 0.06 - 0.045.
START_TEST(regressions_are_paired) {
    double         nll[] = {2.1, 2.3, 2.5}, kld[] = {0.11, 0.22, 0.36}, t = 4.3027, mean = 0.4 / 3, error = 1.0 / 30;
    const double   old_nll[] = {2, 2.2, 2.3}, old_kld[] = {0.1, 0.2, 0.3};
    double         kld_error = sqrt((0.005 * 0.005 + 0.01 * 0.01 + 0.015 * 0.015) * 1.5) / 0.6;
    double         baseline[] = {9, 1, 5};
    kvq_validation v = {.has_artifact = true,
                        .n_windows = 3,
                        .window_quantized_nll = nll,
                        .window_baseline_nll = baseline,
                        .window_kld = kld};
    kvq_validation_compare(&v, old_nll, old_kld);
    ck_assert(v.has_regression);
    expect(v.regression_ppl, expm1(mean), exp(mean) * error, expm1(mean - t * error), expm1(mean + t * error), 1e-12);
    expect(v.regression_kld, 0.15, kld_error, 0.15 - t * kld_error, 0.15 + t * kld_error, 1e-12);
    ck_assert_double_gt(kvq_estimate_ratio(nll, NULL, 3).stderr_, 3 * error); // unpaired it would be larger still
    v.has_artifact = false;
    kvq_validation_compare(&v, old_nll, old_kld);
    ck_assert(!v.has_regression);
}
END_TEST

// Against itself nothing changed, for certain; a KL of 0 cannot grow by a share.
START_TEST(regressions_against_itself_and_against_nothing) {
    double         nll[] = {2.1, 2.3, 2.5, 1.9, 4}, kld[] = {0.11, 0.22, 0.36, 0.1, 0.2};
    const double   zeros[5] = {0};
    kvq_validation v = {.has_artifact = true, .n_windows = 5, .window_quantized_nll = nll, .window_kld = kld};
    kvq_validation_compare(&v, nll, kld);
    expect(v.regression_ppl, 0, 0, 0, 0, CLOSE);
    expect(v.regression_kld, 0, 0, 0, 0, CLOSE);
    kvq_validation_compare(&v, nll, zeros);
    expect(v.regression_kld, NONE, NONE, NONE, NONE, CLOSE);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(few_blocks_have_students_interval),
    KVQ_CASE(ratios_weigh_blocks_by_their_counts),
    KVQ_CASE(what_has_no_scatter_or_no_blocks_says_so),
    KVQ_CASE(empty_blocks_are_not_there),
    KVQ_CASE(ends_come_from_resampled_t),
    KVQ_CASE(intervals_follow_skewness),
    KVQ_CASE(resamples_without_scatter_do_not_run_away),
    KVQ_CASE(many_blocks_are_resampled_in_groups),
    KVQ_CASE(students_t_is_that_of_tables),
    KVQ_CASE(functions_move_value_error_and_ends),
    KVQ_CASE(quantiles_are_nearest_ranks),
    KVQ_CASE(ends_of_quantiles_are_quantiles_at_the_ends),
    KVQ_CASE(quantiles_scatter_at_least_as_independent_values),
    KVQ_CASE(ties_with_a_quantile_are_not_above_it),
    KVQ_CASE(quantiles_of_odd_data),
    KVQ_CASE(quantiles_without_memory_fail_cleanly),
    KVQ_CASE(regressions_are_paired),
    KVQ_CASE(regressions_against_itself_and_against_nothing),
};
KVQ_TEST_MAIN("statistics", CASES)
