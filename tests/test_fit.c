// SPDX-License-Identifier: Apache-2.0
// Fits: the certificate holds, tables of heads add up, Q-Norm restores mean and deviation, reports follow their
// definitions, degenerate data is defined.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "histogram_test.h"

typedef struct fitted {
    float          levels[256], decoded[256];
    kvq_fit_report report;
} fitted;

static const kvq_fit_options WEIGHTED = {.weighting = KVQ_WEIGHT_FISHER};

static fitted fit_parts(kvq_histogram *const *parts, int n, kvq_datatype datatype, int bits,
                        const kvq_fit_options *options) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_distribution *d = NULL;
    fitted            f;
    kvq_test_ok(kvq_distributions_create(&ctx, KVQ_WEIGHTINGS_ALL, n, &d, &err), &err);
    for (int i = 0; i < n; i++) kvq_test_ok(kvq_distribution_take(parts[i], &d[i], &err), &err);
    kvq_test_ok(kvq_fit_table(&ctx, d, n, datatype, bits, options, f.levels, options->q_norm ? f.decoded : NULL,
                              &f.report, &err),
                &err);
    for (int j = 1; j < 1 << bits; j++) ck_assert(f.levels[j] >= f.levels[j - 1]);
    kvq_distributions_free(&ctx, &d);
    return f;
}

static fitted fit(kvq_histogram *h, int bits) { return fit_parts(&h, 1, KVQ_NUQ, bits, &WEIGHTED); }

static int by_position(const void *a, const void *b) {
    double x = ((const kvq_weighted_point *)a)->x, y = ((const kvq_weighted_point *)b)->x;
    return (x > y) - (x < y);
}

// ---------------------------------------------------------------- the certificate

// Few elements crowded into a handful of neighbouring bins, where binning hides most: the true optimum over the
// elements lies between objective - binning_bound and the objective. Distributions keep positions as f32: 2^-25
// relative to 1, which moves a squared distance of at most (6 bins)^2 by less than 2 * 6h * 2^-25.
START_TEST(the_binning_bound_holds) {
    const double h = 2.0 / KVQ_HISTOGRAM_BINS, rounding = 12 * h * 0x1p-25;
    double       largest_share = 0;
    for (int problem = 0; problem < 400; problem++) {
        kvq_context        ctx = kvq_test_context();
        kvq_error          err = {0};
        kvq_weighted_point points[40];
        kvq_histogram     *histogram = new_histogram();
        int                n = 3 + problem % 38, bits = 1 + problem % 2, n_bins = 2 + problem % 5;
        double             levels[4], optimum, weight = 0;
        for (int i = 0; i < n; i++) {
            double bin = floor(n_bins * uniform(3, 64 * problem + i)), inside = uniform(4, 64 * problem + i);
            float  x = (float)(0.25 + h * (bin + (problem % 3 == 0 ? 0.999 * round(inside) : inside)));
            points[i] = (kvq_weighted_point){(double)x, problem % 2 == 0 ? 1 : exp(8 * uniform(5, 64 * problem + i))};
            weight += points[i].w;
            add(histogram, x, points[i].w);
        }
        qsort(points, (size_t)n, sizeof *points, by_position);
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, n, 1 << bits, levels, &optimum, &err), &err);
        kvq_fit_report report = fit(histogram, bits).report;
        ck_assert(optimum / weight >= report.objective - report.binning_bound - rounding);
        ck_assert(optimum / weight <= report.objective + rounding);
        largest_share = fmax(largest_share, (report.objective - optimum / weight) / report.binning_bound);
        drop(&histogram);
    }
    ck_assert(largest_share > 0.05); // without a bound the test would fail
}
END_TEST

// The formula at the head of fit.c, on levels that f32 holds exactly: range * h / 2 * heaviest bin / all weight.
START_TEST(the_binning_bound_by_hand) {
    kvq_histogram *histogram = new_histogram();
    add(histogram, -0.5f, 1);
    add(histogram, 0.75f, 3);
    kvq_fit_report report = fit(histogram, 1).report;
    ck_assert(report.objective == 0 && report.binning_bound == (1.25 + 0x1p-12) * 0x1p-13 * 3 / 4);
    drop(&histogram);
}
END_TEST

// With smooth data the fit is as good as k-means on the elements themselves, to the digits the bound promises.
START_TEST(fit_agrees_with_kmeans_on_the_elements) {
    enum { N = 20000 };
    static kvq_weighted_point points[N];
    kvq_context               ctx = kvq_test_context();
    kvq_error                 err = {0};
    kvq_histogram            *h = new_histogram();
    double                    levels[32], optimum, weight = 0;
    for (int i = 0; i < N; i++) {
        float x = (float)(2 * uniform(6, i) * uniform(7, i) - 1);
        points[i] = (kvq_weighted_point){(double)x, exp(10 * uniform(8, i) - 20)};
        weight += points[i].w;
        add(h, x, points[i].w);
    }
    qsort(points, N, sizeof *points, by_position);
    for (int bits = 2; bits <= 5; bits++) {
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, N, 1 << bits, levels, &optimum, &err), &err);
        kvq_fit_report report = fit(h, bits).report;
        ck_assert(report.objective >= optimum / weight * (1 - 1e-6)); // positions are f32
        ck_assert(report.objective <= optimum / weight * (1 + 1e-4)); // what is hidden is of second order
        ck_assert(report.objective - optimum / weight <= report.binning_bound);
        ck_assert_int_eq(report.n_points, N);
        ck_assert_double_eq_tol(report.weight_sum, weight, 1e-7 * weight); // weights of bins are f32
    }
    drop(&h);
}
END_TEST

START_TEST(lloyd_is_never_better) {
    kvq_histogram  *h = new_histogram();
    kvq_fit_options options = WEIGHTED;
    for (int i = 0; i < 3000; i++) add(h, (float)(2 * uniform(6, i) - 1), exp(12 * uniform(8, i) - 12));
    ck_assert(fit(h, 3).report.lloyd_objective == 0); // not asked for
    options.compare_lloyd = true;
    fitted f = fit_parts(&h, 1, KVQ_NUQ, 3, &options);
    ck_assert(f.report.lloyd_objective >= f.report.objective * (1 - 1e-6)); // levels of one are f32
    ck_assert(f.report.lloyd_objective < 10 * f.report.objective);
    drop(&h);
}
END_TEST

// (sum w)^2 / sum w^2, over weights of every size a gradient can have; each case has one closed form.
START_TEST(effective_samples_follow_the_definition) {
    static const struct {
        double first, others, expected;
    } EXAMPLES[] = {
        {1, 1, 1000}, {0x1p-11, 0x1p-11, 1000}, {1e-9, 1e-9, 1000}, {1e-18, 1e-18, 1000},
        {1, 0, 1},    {999e-7, 1e-7, 3.996},    {1000, 1000, 1000}, {1e-8, 6e-9, 999.5568},
        {0, 0, 0},
    };
    for (size_t i = 0; i < sizeof EXAMPLES / sizeof *EXAMPLES; i++) {
        kvq_histogram *h = new_histogram();
        for (int j = 0; j < 1000; j++)
            add(h, (float)(2 * uniform(0, j) - 1), j == 0 ? EXAMPLES[i].first : EXAMPLES[i].others);
        ck_assert_double_eq_tol(fit(h, 1).report.effective_samples, EXAMPLES[i].expected,
                                1e-5 * EXAMPLES[i].expected + 1e-30);
        drop(&h);
    }
}
END_TEST

// ---------------------------------------------------------------- several heads

// One table for several histograms is the table of their sum.
START_TEST(a_table_of_heads_is_that_of_their_sum) {
    kvq_histogram *parts[3] = {new_histogram(), new_histogram(), new_histogram()}, *whole = new_histogram();
    for (int i = 0; i < 6000; i++) {
        float  x = (float)((2 * uniform(6, i) - 1) * (i % 3 + 1) / 3);
        double w = exp(9 * uniform(8, i) - 9);
        add(parts[i % 3], x, w);
        add(whole, x, w);
    }
    fitted a = fit_parts(parts, 3, KVQ_NUQ, 3, &WEIGHTED), b = fit(whole, 3);
    for (int j = 0; j < 8; j++) ck_assert_double_eq_tol((double)a.levels[j], (double)b.levels[j], 1e-6);
    ck_assert_double_eq_tol(a.report.objective, b.report.objective, 1e-6 * b.report.objective);
    ck_assert_double_eq_tol(a.report.mse, b.report.mse, 1e-6 * b.report.mse);
    ck_assert_int_eq(a.report.n_points, b.report.n_points);
    for (int i = 0; i < 3; i++) drop(&parts[i]);
    drop(&whole);
}
END_TEST

// ---------------------------------------------------------------- Q-Norm

// Codes decode to values with the mean and the deviation of the data (population, unweighted).
START_TEST(q_norm_restores_mean_and_deviation) {
    enum { N = 40000 };
    kvq_histogram  *h = new_histogram();
    kvq_fit_options options = {.weighting = KVQ_WEIGHT_FISHER, .q_norm = true};
    double          m1 = 0, s1 = 0, m2 = 0, s2 = 0;
    static float    x[N];
    for (int i = 0; i < N; i++) {
        x[i] = (float)(0.9 * sin(3 * uniform(6, i)) * uniform(7, i) - 0.1);
        add(h, x[i], fabs((double)x[i]) + 0.01); // weights that pull the levels away from the bulk
    }
    fitted f = fit_parts(&h, 1, KVQ_NUQ, 2, &options);
    for (int i = 0; i < N; i++) {
        double y = (double)f.decoded[kvq_block_nearest(x[i], f.levels, 4)];
        m1 += (double)x[i] / N;
        s1 += (double)x[i] * (double)x[i] / N;
        m2 += y / N;
        s2 += y * y / N;
    }
    // elements that share a bin with a boundary may be counted with the wrong level: under 4 h of 2 in all
    ck_assert_double_eq_tol(m2, m1, 1e-4);
    ck_assert_double_eq_tol(sqrt(s2 - m2 * m2), sqrt(s1 - m1 * m1), 1e-4);
    ck_assert(f.decoded[0] != f.levels[0]);
    double mse = 0;
    for (int i = 0; i < N; i++) {
        double e = (double)x[i] - (double)f.decoded[kvq_block_nearest(x[i], f.levels, 4)];
        mse += e * e / N;
    }
    ck_assert_double_eq_tol(f.report.normalised_mse, mse, 1e-4 * mse); // the report is about what is decoded
    drop(&h);
}
END_TEST

// ---------------------------------------------------------------- reports

// Rows through counting, fit and codec: the errors of the report are those of the decoded elements.
START_TEST(reports_agree_with_decoded_elements) {
    enum { N = 400, D = 24 };
    static float      x[N * D], z[D], r[D], scratch[N * D + N];
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_histogram    *h = new_histogram();
    kvq_block_spec    spec = {.d = D, .bits = 3, .n_side = 1, .z = z, .r = r};
    kvq_count_tensor  tensor = {"K", &spec, x, NULL, &h};
    kvq_fit_options   options = {.weighting = KVQ_WEIGHT_RANGE};
    float             keys[2][2], back[D];
    uint16_t          channels[2][2];
    kvq_block_scratch work = {keys[0], keys[1], channels[0], channels[1], 0, 0};
    uint8_t           row[64];
    double            squares = 0, energy = 0, codes[8] = {0}, entropy = 0;
    int64_t           n_coded = 0;
    for (int c = 0; c < D; c++) {
        z[c] = 0.1f * (float)c - 1;
        r[c] = c == 5 ? 0 : 0.5f + 0.2f * (float)c;
    }
    for (int i = 0; i < N * D; i++) // now and then more elements beyond the range than a row has slots for
        x[i] = i % D == 5 ? z[5] : z[i % D] + r[i % D] * (float)(2.4 * uniform(9, i) - 1.2);
    kvq_test_ok(kvq_count_rows(&ctx, &tensor, 1, N, (kvq_count_options){.n_heads = 1}, scratch, &err), &err);
    fitted f = fit_parts(&h, 1, KVQ_NUQ, 3, &options);
    spec.levels = f.levels;
    for (int64_t t = 0; t < N; t++) {
        ck_assert_int_eq(kvq_block_encode(&spec, x + t * D, &work, row), 1);
        kvq_block_decode(&spec, row, back);
        for (int c = 0; c < D; c++) {
            bool apart = false;
            for (int i = 0; i < work.n_upper; i++) apart = apart || work.upper_channel[i] == c;
            for (int i = 0; i < work.n_lower; i++) apart = apart || work.lower_channel[i] == c;
            energy += (double)x[t * D + c] * (double)x[t * D + c];
            if (apart) continue;
            double e = (double)x[t * D + c] - (double)back[c];
            squares += e * e;
            n_coded++;
            if (c != 5) codes[kvq_block_get_code(row, c, 3)]++;
        }
    }
    for (int j = 0; j < 8; j++) {
        double p = codes[j] / (double)f.report.n_points;
        if (p > 0) entropy -= p * log2(p);
    }
    ck_assert_int_gt(f.report.n_clipped, 100);
    ck_assert_int_eq(f.report.n_points + f.report.n_constant, n_coded);
    ck_assert_double_eq_tol(f.report.mse, squares / (double)n_coded, 2e-4 * f.report.mse);
    ck_assert_double_eq_tol(f.report.energy, energy / (N * D), 1e-6 * f.report.energy);
    ck_assert_double_eq_tol(kvq_fit_nmse(&f.report), squares / energy, 2e-4 * squares / energy);
    ck_assert_double_eq_tol(kvq_fit_sqnr_db(&f.report), -10 * log10(squares / energy), 1e-3);
    ck_assert_double_eq_tol(f.report.entropy_bits, entropy, 1e-3);
    drop(&h);
}
END_TEST

// Fixed levels have errors but no optimum to be compared with; an integer zero point has neither.
START_TEST(fixed_datatypes_are_reported) {
    kvq_histogram *h = new_histogram();
    float          expected[8];
    kvq_error      err = {0};
    for (int i = 0; i < 3000; i++) add(h, (float)(2 * uniform(6, i) - 1), 1e-3);
    for (int type = KVQ_NF; type <= KVQ_INT_CLAMPED; type++) {
        fitted f = fit_parts(&h, 1, (kvq_datatype)type, 3, &WEIGHTED);
        kvq_test_ok(kvq_fixed_levels((kvq_datatype)type, 3, expected, &err), &err);
        ck_assert_mem_eq(f.levels, expected, sizeof expected);
        ck_assert(f.report.binning_bound == 0 && f.report.objective > 0);
        ck_assert((f.report.normalised_mse > 0) == (type != KVQ_INT_CLAMPED));
    }
    drop(&h);
}
END_TEST

// ---------------------------------------------------------------- degenerate data

START_TEST(degenerate_histograms_are_defined) {
    kvq_histogram *h = new_histogram();
    fitted         f = fit(h, 2);
    ck_assert(f.report.n_points == 0 && f.report.objective == 0 && f.report.binning_bound == 0);
    ck_assert(f.report.weight_sum == 0 && f.report.entropy_bits == 0 && f.report.mse == 0);
    for (int j = 0; j < 4; j++) ck_assert(f.levels[j] == 0);

    for (int i = 0; i < 6; i++) add(h, i < 4 ? -0.5f : 0.75f, 0); // no weight: every element counts as 1
    f = fit(h, 1);
    ck_assert(f.levels[0] == -0.5f && f.levels[1] == 0.75f && f.report.n_points == 6 && f.report.objective == 0);
    ck_assert(f.report.effective_samples == 0);

    for (int i = 0; i < 5; i++) add(h, 0.125f, 0x1p-90); // the only weight: a constant tensor
    f = fit(h, 2);
    for (int j = 0; j < 4; j++) ck_assert(f.levels[j] == 0.125f);
    ck_assert(f.report.objective == 0);

    add(h, -0.25f, 30000); // one huge weight beside the others: 2^105 times as heavy
    f = fit(h, 1);
    ck_assert(f.levels[0] == -0.25f && f.levels[1] == 0.125f);
    drop(&h);

    h = new_histogram(); // constant data under Q-Norm: nothing to scale
    for (int i = 0; i < 9; i++) add(h, 0.5f, 1);
    kvq_fit_options options = {.weighting = KVQ_WEIGHT_FISHER, .q_norm = true};
    f = fit_parts(&h, 1, KVQ_NUQ, 2, &options);
    for (int j = 0; j < 4; j++) ck_assert(f.levels[j] == 0.5f && f.decoded[j] == 0.5f);
    drop(&h);
}
END_TEST

START_TEST(impossible_widths_are_refused) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_histogram    *h = new_histogram();
    kvq_distribution *d = distribution_of(h);
    float             levels[4] = {5, 5, 5, 5};
    kvq_fit_report    report;
    kvq_test_failed(kvq_fit_table(&ctx, d, 1, KVQ_NUQ, 9, &WEIGHTED, levels, NULL, &report, &err), KVQ_ERR_USAGE, &err,
                    "9 bits");
    ck_assert(levels[0] == 5 && levels[3] == 5);
    kvq_distributions_free(&ctx, &d);
    drop(&h);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(the_binning_bound_holds),
    KVQ_CASE(the_binning_bound_by_hand),
    KVQ_CASE(fit_agrees_with_kmeans_on_the_elements),
    KVQ_CASE(lloyd_is_never_better),
    KVQ_CASE(effective_samples_follow_the_definition),
    KVQ_CASE(a_table_of_heads_is_that_of_their_sum),
    KVQ_CASE(q_norm_restores_mean_and_deviation),
    KVQ_CASE(reports_agree_with_decoded_elements),
    KVQ_CASE(fixed_datatypes_are_reported),
    KVQ_CASE(degenerate_histograms_are_defined),
    KVQ_CASE(impossible_widths_are_refused),
};
KVQ_TEST_MAIN("fit", CASES)
