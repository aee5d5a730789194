// SPDX-License-Identifier: Apache-2.0
// Every metric of a validation from positions that are made up, against computations by hand.
#include <math.h>

#include "kvq_test.h"
#include "scores.h"

#define CLOSE         1e-12
#define MAX_POSITIONS 1024

static const double T2 = 12.7062; // Student's, one degree of freedom: two windows

// A validation of n windows with n_scored positions each, from `first` on, and room for what comes from them.
typedef struct table {
    kvq_context    ctx;
    kvq_validation v;
    scores         s;
    double         windows[4][8];
    float          kld[MAX_POSITIONS];
} table;

static void table_open(table *t, int64_t n_windows, int64_t n_scored, int64_t first, bool has_artifact) {
    *t = (table){.ctx = kvq_test_context()};
    t->v = (kvq_validation){.has_artifact = has_artifact,
                            .n_windows = n_windows,
                            .seq_len = first + n_scored + 1,
                            .n_scored = n_scored,
                            .tokens_scored = n_windows * n_scored,
                            .window_baseline_nll = t->windows[0],
                            .window_quantized_nll = t->windows[1],
                            .window_kld = t->windows[2],
                            .window_top1 = t->windows[3],
                            .position_kld = t->kld};
    ck_assert_int_le(n_windows, 8);
    ck_assert_int_le(t->v.tokens_scored, MAX_POSITIONS);
    kvq_test_ok(scores_create(&t->ctx, n_windows, n_scored, &t->s, NULL), NULL);
    t->s.n_best = 5;
}

static void table_add(table *t, int64_t window, int64_t first, const kvq_position_score *positions) {
    for (int64_t i = 0; i < t->v.n_scored; i++) t->kld[window * t->v.n_scored + i] = (float)positions[i].kl;
    scores_add(&t->s, window, first, positions);
}

static void table_close(table *t) {
    kvq_test_ok(scores_summarise(&t->ctx, &t->s, &t->v, NULL), NULL);
    scores_free(&t->ctx, &t->s);
}

static void expect(kvq_estimate x, double value, double stderr_, double low, double high) {
    ck_assert_double_eq_tol(x.value, value, CLOSE);
    ck_assert_double_eq_tol(x.stderr_, stderr_, CLOSE);
    ck_assert_double_eq_tol(x.low, low, CLOSE * fabs(low) + CLOSE);
    ck_assert_double_eq_tol(x.high, high, CLOSE * fabs(high) + CLOSE);
}

// Student's interval, as far as it lies where such a number can be: from `least` to `most`.
static void expect_students(kvq_estimate x, double value, double stderr_, double least, double most) {
    expect(x, value, stderr_, fmax(value - T2 * stderr_, least), fmin(value + T2 * stderr_, most));
}
static const double NO_END = HUGE_VAL;

// ---------------------------------------------------------------- metrics

// Two windows of two positions. Means of windows: full precision 1 and 3, quantised 1.2 and 3.4, so differences 0.2 and
// 0.4: mean 0.3, error of two numbers = half of what is between them.
static const kvq_position_score PAIRS[2][2] = {
    {{.nll_a = 0.5, .nll_b = 0.6, .kl = 0.01, .top_a = 7, .top_b = 7, .confidence_a = 0.05, .top5_common = 5},
     {.nll_a = 1.5, .nll_b = 1.8, .kl = 0.03, .top_a = 7, .top_b = 8, .confidence_a = 0.5, .top5_common = 4}},
    {{.nll_a = 2.0, .nll_b = 2.2, .kl = 0.02, .top_a = 1, .top_b = 1, .confidence_a = 0.3, .top5_common = 3},
     {.nll_a = 4.0, .nll_b = 4.6, .kl = 0.10, .top_a = 2, .top_b = 2, .confidence_a = 1.0, .top5_common = 5}}};

static void open_pairs(table *t) {
    table_open(t, 2, 2, 0, true);
    for (int w = 0; w < 2; w++) table_add(t, w, 0, PAIRS[w]);
    table_close(t);
}

START_TEST(losses_and_perplexities_by_hand) {
    table t;
    open_pairs(&t);
    expect_students(t.v.baseline_nll, 2, 1, 0, NO_END);
    expect_students(t.v.quantized_nll, 2.3, 1.1, 0, NO_END);
    expect_students(t.v.difference_nll, 0.3, 0.1, -NO_END, NO_END);
    expect(t.v.baseline_ppl, exp(2), exp(2), 1, exp(2 + T2));
    expect(t.v.quantized_ppl, exp(2.3), 1.1 * exp(2.3), 1, exp(2.3 + 1.1 * T2));
    expect(t.v.dppl, expm1(0.3), 0.1 * exp(0.3), expm1(0.3 - 0.1 * T2), expm1(0.3 + 0.1 * T2));
    ck_assert_double_eq_tol(t.v.dppl.value, t.v.quantized_ppl.value / t.v.baseline_ppl.value - 1, CLOSE);
    const double windows[4][2] = {{1, 3}, {1.2, 3.4}, {0.02, 0.06}, {0.5, 1}};
    for (int i = 0; i < 4; i++) {
        for (int w = 0; w < 2; w++) ck_assert_double_eq_tol(t.windows[i][w], windows[i][w], CLOSE);
    }
}
END_TEST

// The same tokens are compared: what windows differ by cancels. Taken for independent samples, the two losses would
// have an error fifteen times as large.
START_TEST(differences_are_paired) {
    table t;
    open_pairs(&t);
    double unpaired = hypot(t.v.baseline_nll.stderr_, t.v.quantized_nll.stderr_);
    ck_assert_double_eq_tol(unpaired / t.v.difference_nll.stderr_, sqrt(1 + 1.1 * 1.1) / 0.1, 1e-9);
}
END_TEST

START_TEST(kl_and_choices_by_hand) {
    table t;
    open_pairs(&t);
    expect_students(t.v.kld, 0.04, 0.02, 0, NO_END);
    expect_students(t.v.top1, 0.75, 0.25, 0, 1);
    expect_students(t.v.top5, 17.0 / 20, 0.05, 0, 1); // 9 and 8 of 10
    ck_assert(t.v.kld_max == (double)0.10f);
    // ranks 2, 4, 4, 4 of 0.01, 0.02, 0.03, 0.1
    const double quantiles[] = {0.02, 0.1, 0.1, 0.1};
    for (int i = 0; i < KVQ_N_KLD_QUANTILES; i++) {
        ck_assert_double_eq_tol(t.v.kld_quantiles[i].value, quantiles[i], 1e-8); // floats
        ck_assert(t.v.kld_quantiles[i].high == (double)INFINITY);
    }
    ck_assert(!t.v.has_noise);
}
END_TEST

// p(token) 0.5 and 0.4 after 0.6 and 0.2: changes -0.1 and 0.2 in one window, none in the other: mean square 0.0125.
START_TEST(changes_of_probability_by_hand) {
    table              t;
    kvq_position_score changed[2] = {{.nll_a = -log(0.6), .nll_b = -log(0.5)},
                                     {.nll_a = -log(0.2), .nll_b = -log(0.4)}};
    kvq_position_score same[2] = {{.nll_a = 1, .nll_b = 1}, {.nll_a = 2, .nll_b = 2}};
    table_open(&t, 2, 2, 0, true);
    table_add(&t, 0, 0, changed);
    table_add(&t, 1, 0, same);
    table_close(&t);
    double square = 0.0125, error = 0.0125, value = sqrt(square);
    expect(t.v.dp_rms, value, error / (2 * value), 0, sqrt(square + T2 * error));
}
END_TEST

// With a vocabulary of three all of the best three are counted.
START_TEST(small_vocabularies_have_fewer_best) {
    table              t;
    kvq_position_score p[2] = {{.top5_common = 3}, {.top5_common = 2}};
    table_open(&t, 1, 2, 0, true);
    t.s.n_best = 3;
    table_add(&t, 0, 0, p);
    table_close(&t);
    ck_assert_double_eq_tol(t.v.top5.value, 5.0 / 6, CLOSE);
    ck_assert(isnan(t.v.top5.stderr_) && isnan(t.v.kld.low) && isnan(t.v.dppl.high)); // one window
}
END_TEST

// Noise on two of three windows: the third is as if it were not there, and none of it mixes with the cache's.
START_TEST(noise_is_kept_apart) {
    table              t;
    kvq_position_score noise[2][1] = {{{.kl = 0.001, .top_a = 1, .top_b = 1}}, {{.kl = 0.003, .top_a = 1, .top_b = 2}}};
    kvq_position_score cache[1] = {{.kl = 1, .top_a = 1, .top_b = 1}};
    table_open(&t, 3, 1, 0, true);
    for (int w = 0; w < 3; w++) table_add(&t, w, 0, cache);
    for (int w = 0; w < 2; w++) scores_add_noise(&t.s, w, noise[w]);
    table_close(&t);
    ck_assert(t.v.has_noise);
    expect_students(t.v.noise_kld, 0.002, 0.001, 0, NO_END);
    expect_students(t.v.noise_top1, 0.5, 0.5, 0, 1);
    expect(t.v.kld, 1, 0, 1, 1);
    expect(t.v.top1, 1, 0, 1, 1);
}
END_TEST

START_TEST(without_an_artifact_there_is_the_baseline) {
    table        t;
    const double nll[2][2] = {{1, 2}, {2, 5}};
    table_open(&t, 2, 2, 0, false);
    for (int w = 0; w < 2; w++) scores_add_baseline(&t.s, w, nll[w]);
    table_close(&t);
    expect_students(t.v.baseline_nll, 2.5, 1, 0, NO_END);
    expect(t.v.baseline_ppl, exp(2.5), exp(2.5), 1, exp(2.5 + T2));
    ck_assert(t.v.n_positions == 0 && t.v.n_confidences == 0);
    ck_assert_double_eq_tol(t.windows[0][1], 3.5, CLOSE);
}
END_TEST

// NaN is never hidden: not in means, quantiles or the maximum, whatever comes after it.
START_TEST(nan_stays) {
    table              t;
    kvq_position_score p[3] = {{.kl = 1}, {.kl = NAN}, {.kl = 2}};
    table_open(&t, 2, 3, 0, true);
    for (int w = 0; w < 2; w++) table_add(&t, w, 0, p);
    table_close(&t);
    ck_assert(isnan(t.v.kld.value) && isnan(t.v.kld_max) && isnan(t.v.kld_quantiles[0].value));
}
END_TEST

// ---------------------------------------------------------------- buckets

// Positions 60 .. 519 of two windows, one KL each: edges at 64, 128, 256, 512, the last one the window's end.
START_TEST(positions_fall_into_buckets) {
    enum { FIRST = 60, N = 460 };
    static table              t;
    static kvq_position_score p[2][N];
    const double              edges[] = {0, 64, 128, 256, 512, FIRST + N + 1};
    table_open(&t, 2, N, FIRST, true);
    for (int w = 0; w < 2; w++) {
        for (int i = 0; i < N; i++)
            p[w][i] = (kvq_position_score){.nll_a = 1, .nll_b = 2 + w, .kl = FIRST + i, .top_a = 3, .top_b = 3 + w};
        table_add(&t, w, FIRST, p[w]);
    }
    table_close(&t);
    ck_assert_int_eq(t.v.n_positions, 5);
    for (int b = 0; b < 5; b++) {
        const kvq_bucket *k = &t.v.positions[b];
        double            first = b == 0 ? FIRST : edges[b], end = b == 4 ? FIRST + N : edges[b + 1];
        ck_assert(k->from == edges[b] && k->to == edges[b + 1]);
        ck_assert_int_eq(k->n, 2 * (int64_t)(end - first));
        ck_assert_double_eq_tol(k->kld.value, (first + end - 1) / 2, CLOSE * 1e3); // the mean of its positions
        ck_assert_double_eq_tol(k->baseline_nll, 1, CLOSE);
        ck_assert_double_eq_tol(k->quantized_nll, 2.5, CLOSE);
        expect_students(k->difference_nll, 1.5, 0.5, -NO_END, NO_END);
        expect_students(k->top1, 0.5, 0.5, 0, 1);
    }
}
END_TEST

// Position 2^40 is in the last bucket there is.
START_TEST(positions_end_in_the_last_bucket) {
    table              t;
    kvq_position_score p[1] = {{.kl = 1}};
    table_open(&t, 1, 1, (int64_t)1 << 40, true);
    table_add(&t, 0, (int64_t)1 << 40, p);
    table_close(&t);
    ck_assert_int_eq(t.v.n_positions, 1);
    ck_assert_int_eq(t.v.positions[0].n, 1);
}
END_TEST

// Of each edge the number itself and the one before it; nothing is as sure as [0.1, 0.25), which has no bucket then.
START_TEST(confidences_fall_into_buckets) {
    const double sure[] = {
        0, nextafter(0.1, 0), 0.25, nextafter(0.5, 0), 0.5, nextafter(0.75, 0), 0.75, 0.9, nextafter(0.99, 0), 0.99, 1};
    const double       from[] = {0, 0.25, 0.5, 0.75, 0.9, 0.99}, to[] = {0.1, 0.5, 0.75, 0.9, 0.99, 1};
    const int64_t      n[] = {2, 2, 2, 1, 2, 2};
    table              t;
    kvq_position_score p[11];
    table_open(&t, 1, 11, 0, true);
    for (int i = 0; i < 11; i++) p[i] = (kvq_position_score){.confidence_a = sure[i], .kl = i};
    table_add(&t, 0, 0, p);
    table_close(&t);
    ck_assert_int_eq(t.v.n_confidences, 6);
    for (int b = 0, i = 0; b < 6; i += (int)n[b++]) {
        const kvq_bucket *k = &t.v.confidences[b];
        ck_assert(k->from == from[b] && k->to == to[b]);
        ck_assert_int_eq(k->n, n[b]);
        ck_assert_double_eq_tol(k->kld.value, i + 0.5 * (double)(n[b] - 1), CLOSE);
    }
}
END_TEST

// Quarters of decades from 1e-8: bin 31 ends and bin 32 begins at 1.
START_TEST(kl_falls_into_bins) {
    const struct {
        double kl;
        int    bin;
    } BINS[] = {{-1e-9, 0}, {0, 0},     {1e-30, 0}, {1.01e-8, 0}, {1.7e-8, 0}, {1.8e-8, 1}, {0.99, 31},
                {1.01, 32}, {1.77, 32}, {1.79, 33}, {5.7, 35},    {99, 39},    {101, 39},   {1e30, 39}};
    enum { N = (int)(sizeof BINS / sizeof *BINS) };
    table              t;
    kvq_position_score p[N] = {{.kl = 0}};
    int64_t            expected[KVQ_KLD_BINS] = {0};
    for (int i = 0; i < N; i++) p[i].kl = BINS[i].kl, expected[BINS[i].bin]++;
    table_open(&t, 1, N, 0, true);
    table_add(&t, 0, 0, p);
    table_close(&t);
    for (int b = 0; b < KVQ_KLD_BINS; b++) ck_assert_int_eq(t.v.kld_histogram[b], expected[b]);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(losses_and_perplexities_by_hand),
    KVQ_CASE(differences_are_paired),
    KVQ_CASE(kl_and_choices_by_hand),
    KVQ_CASE(changes_of_probability_by_hand),
    KVQ_CASE(small_vocabularies_have_fewer_best),
    KVQ_CASE(noise_is_kept_apart),
    KVQ_CASE(without_an_artifact_there_is_the_baseline),
    KVQ_CASE(nan_stays),
    KVQ_CASE(positions_fall_into_buckets),
    KVQ_CASE(positions_end_in_the_last_bucket),
    KVQ_CASE(confidences_fall_into_buckets),
    KVQ_CASE(kl_falls_into_bins),
};
KVQ_TEST_MAIN("scores", CASES)
