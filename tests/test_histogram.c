// SPDX-License-Identifier: Apache-2.0
// Weighted histograms and the fit: order does not matter, rows are counted by the codec's rule, the bound on binning
// holds.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

static double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(21, KVQ_RNG_TEST, stream, (uint64_t)index);
}

static kvq_histogram *new_histogram(void) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_histogram *h = NULL;
    kvq_test_ok(kvq_histogram_create(&ctx, &h, &err), &err);
    return h;
}

static void drop(kvq_histogram **h) {
    kvq_context ctx = kvq_test_context();
    kvq_histogram_destroy(&ctx, h);
    ck_assert_ptr_null(*h);
}

static void expect_same(const kvq_histogram *a, const kvq_histogram *b) {
    ck_assert(memcmp(a->bins, b->bins, KVQ_HISTOGRAM_BINS * sizeof *a->bins) == 0);
    ck_assert(memcmp(&a->w2_large, &b->w2_large, sizeof a->w2_large) == 0);
    ck_assert(memcmp(&a->w2_small, &b->w2_small, sizeof a->w2_small) == 0);
    ck_assert(a->n_outliers == b->n_outliers && a->n_constant == b->n_constant);
}

static int64_t count_of(const kvq_histogram *h) {
    int64_t n = 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) n += h->bins[i].n;
    return n;
}

START_TEST(elements_fall_into_the_bin_that_holds_them) {
    static const struct {
        float x;
        int   bin;
    } EXAMPLES[] = {
        {-1, 0},
        {-7, 0},
        {-1 + 0x1p-15f - 0x1p-24f, 0},
        {-1 + 0x1p-15f, 1},
        {-1e-30f, 32767},
        {-0.0f, 32768},
        {0.0f, 32768},
        {1e-30f, 32768},
        {0x1p-15f, 32769},
        {0.5f, 49152},
        {0.9999999f, 65535},
        {1, 65535},
        {1.5f, 65535},
    };
    for (size_t i = 0; i < sizeof EXAMPLES / sizeof *EXAMPLES; i++) {
        kvq_histogram *h = new_histogram();
        kvq_histogram_add(h, EXAMPLES[i].x, 2);
        const kvq_bin *bin = &h->bins[EXAMPLES[i].bin];
        double         clipped = fmax(-1, fmin(1, (double)EXAMPLES[i].x));
        ck_assert_int_eq(bin->n, 1);
        ck_assert(kvq_fixed_to_double(bin->w) == 2);
        ck_assert_double_eq_tol(kvq_fixed_to_double(bin->x), clipped, 0x1p-96);
        ck_assert_double_eq_tol(kvq_fixed_to_double(bin->wx), 2 * clipped, 0x1p-96);
        drop(&h);
    }
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
        for (int j = 0; j < 1000; j++) {
            kvq_histogram_add(h, (float)(2 * uniform(0, j) - 1), j == 0 ? EXAMPLES[i].first : EXAMPLES[i].others);
        }
        ck_assert_double_eq_tol(kvq_histogram_effective_samples(h), EXAMPLES[i].expected,
                                1e-5 * EXAMPLES[i].expected + 1e-30);
        drop(&h);
    }
}
END_TEST

enum { N_ROWS = 90, D = 40 };

typedef struct row_set {
    float          x[N_ROWS * D], weights[N_ROWS * D], z[D], r[D];
    kvq_block_spec spec;
} row_set;

// Rows with outliers on both sides, one constant channel (7), and a constant row (11).
static void random_rows(row_set *rows, bool keys, int n_side) {
    for (int i = 0; i < N_ROWS * D; i++) {
        rows->x[i] = (float)(tan(2.6 * (uniform(1, i) - 0.5)) + i % D);
        if (i % D == 7) rows->x[i] = 0.25f;
        if (i / D == 11) rows->x[i] = -3;
        rows->weights[i] = (float)exp(30 * (uniform(2, i) - 1));
    }
    for (int c = 0; c < D; c++) {
        rows->z[c] = c == 7 ? 0.25f : (float)c;
        rows->r[c] = c == 7 ? 0 : 2.0f + 0.01f * (float)c;
    }
    kvq_block_spec spec = {D, 3, n_side, NULL, keys ? rows->z : NULL, keys ? rows->r : NULL};
    rows->spec = spec;
}

static void count(kvq_histogram *h, const row_set *rows, int64_t first, int64_t n, kvq_count_options options) {
    kvq_error err = {0};
    kvq_test_ok(
        kvq_histogram_count_rows(h, &rows->spec, rows->x + first * D, rows->weights + first * D, n, options, &err),
        &err);
}

// _i: keys or values
START_TEST(order_and_partition_do_not_matter) {
    static row_set    rows;
    kvq_count_options options = {true, 0};
    kvq_histogram    *whole = new_histogram(), *parts = new_histogram(), *part = new_histogram();
    random_rows(&rows, _i == 0, 2);
    count(whole, &rows, 0, N_ROWS, options);
    for (int64_t row = N_ROWS - 1; row >= 30; row--) count(parts, &rows, row, 1, options);
    count(part, &rows, 0, 30, options);
    kvq_histogram_merge(parts, part);
    expect_same(whole, parts);
    drop(&whole);
    drop(&parts);
    drop(&part);
}
END_TEST

// The outliers a stored row names are exactly those left out of the count, and every element is accounted for.
// Saved and merged bytes are worth the same as the histogram itself; what is not such bytes is refused.
START_TEST(packed_histograms_merge_as_themselves) {
    kvq_histogram *parts[2] = {new_histogram(), new_histogram()}, *whole = new_histogram(), *merged = new_histogram();
    kvq_error      err = {0};
    for (int i = 0; i < 500; i++) {
        float  x = (float)(2 * kvq_rng_uniform(3, KVQ_RNG_TEST, 0, (uint64_t)i) - 1);
        double weight = exp(-30 * kvq_rng_uniform(3, KVQ_RNG_TEST, 1, (uint64_t)i));
        kvq_histogram_add(parts[i % 2], x, weight);
        kvq_histogram_add(whole, x, weight);
    }
    parts[0]->n_outliers = whole->n_outliers = 3;
    parts[1]->n_constant = whole->n_constant = 4;
    for (int i = 0; i < 2; i++) {
        int64_t  n = kvq_histogram_packed_bytes(parts[i]);
        uint8_t *bytes = malloc((size_t)n);
        kvq_histogram_pack(parts[i], bytes);
        kvq_test_ok(kvq_histogram_merge_packed(merged, bytes, n, &err), &err);
        kvq_test_failed(kvq_histogram_merge_packed(merged, bytes, n - 1, &err), KVQ_ERR_INTEGRITY, &err,
                        "fit together");
        kvq_test_failed(kvq_histogram_merge_packed(merged, bytes, 5, &err), KVQ_ERR_INTEGRITY, &err, "5 bytes");
        free(bytes);
    }
    expect_same(merged, whole);
    kvq_histogram_clear(merged);
    ck_assert_int_eq(count_of(merged) + merged->n_outliers + merged->n_constant, 0);
    ck_assert(kvq_histogram_effective_samples(merged) == 0);
    for (int i = 0; i < 2; i++) drop(&parts[i]);
    drop(&whole);
    drop(&merged);
}
END_TEST

START_TEST(counting_agrees_with_the_codec) {
    static row_set    rows;
    kvq_count_options options = {true, 4};
    kvq_histogram    *h = new_histogram();
    float             keys[2][8], levels[8] = {-1, -0.7f, -0.4f, -0.1f, 0.1f, 0.4f, 0.7f, 1};
    uint16_t          channels[2][8];
    kvq_block_scratch scratch = {keys[0], keys[1], channels[0], channels[1], 0, 0};
    uint8_t           row_bytes[256];
    bool              is_key = _i < 3;
    int64_t           n_outliers = 0;
    random_rows(&rows, is_key, _i % 3);
    kvq_block_spec spec = rows.spec;
    spec.levels = levels;
    count(h, &rows, 0, N_ROWS, options);
    for (int64_t row = 4; row < N_ROWS; row++) {
        ck_assert_int_eq(kvq_block_encode(&spec, rows.x + row * D, &scratch, row_bytes), 1);
        n_outliers += scratch.n_upper + scratch.n_lower;
    }
    ck_assert_int_eq(h->n_outliers, n_outliers);
    ck_assert_int_eq(h->n_constant, is_key ? N_ROWS - 4 : D - 2 * spec.n_side);
    ck_assert_int_eq(count_of(h) + h->n_outliers + h->n_constant, (N_ROWS - 4) * D);
    drop(&h);
}
END_TEST

// Sums in double by the definition; the fixed-point ones lose at most 2^-96 per element, the double ones 2^-53
// relative.
START_TEST(weights_are_gradients_times_squared_range) {
    static row_set rows;
    kvq_histogram *scaled = new_histogram(), *plain = new_histogram();
    double         expected_scaled = 0, expected_plain = 0, sums[2] = {0};
    random_rows(&rows, true, 0);
    count(scaled, &rows, 0, N_ROWS, (kvq_count_options){true, 0});
    count(plain, &rows, 0, N_ROWS, (kvq_count_options){false, 0});
    for (int i = 0; i < N_ROWS * D; i++) {
        double r = (double)rows.r[i % D], w = r > 0 ? (double)rows.weights[i] : 0;
        expected_scaled += w * (r * r);
        expected_plain += w;
    }
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        sums[0] += kvq_fixed_to_double(scaled->bins[i].w);
        sums[1] += kvq_fixed_to_double(plain->bins[i].w);
    }
    ck_assert_double_eq_tol(sums[0], expected_scaled, 1e-12 * expected_scaled);
    ck_assert_double_eq_tol(sums[1], expected_plain, 1e-12 * expected_plain);
    drop(&scaled);
    drop(&plain);
}
END_TEST

// Without weights every element counts as 1; a value row is normalised with the f16 middle and half width.
START_TEST(a_value_row_by_hand) {
    kvq_error         err = {0};
    kvq_histogram    *h = new_histogram();
    const float       x[6] = {9, 1, -8, 5, 2, 3}; // outliers 9 and -8; the rest 1 .. 5: z = 3, r = 2
    kvq_block_spec    spec = {6, 2, 1, NULL, NULL, NULL};
    kvq_count_options options = {true, 0};
    kvq_test_ok(kvq_histogram_count_rows(h, &spec, x, NULL, 1, options, &err), &err);
    static const int BINS[4] = {0, 16384, 32768, 65535};
    for (int i = 0; i < 4; i++) {
        ck_assert_int_eq(h->bins[BINS[i]].n, 1);
        ck_assert(kvq_fixed_to_double(h->bins[BINS[i]].w) == 4);
    }
    ck_assert_int_eq(h->n_outliers, 2);
    drop(&h);
}
END_TEST

START_TEST(bad_rows_are_refused_with_their_place) {
    static row_set    rows;
    kvq_error         err = {0};
    kvq_histogram    *h = new_histogram();
    kvq_count_options options = {true, 0};
    static const struct {
        bool        in_weights;
        float       value;
        const char *message;
    } EXAMPLES[] = {
        {false, (float)NAN, "row 5, channel 3 is nan"},
        {false, (float)INFINITY, "row 5, channel 3 is inf"},
        {true, (float)NAN, "row 5, channel 3 has weight nan"},
        {true, (float)INFINITY, "row 5, channel 3 has weight inf"},
        {true, -1, "row 5, channel 3 has weight -1"},
        {true, 1e6f, "row 5, channel 3 has weight"},
    };
    for (size_t i = 0; i < sizeof EXAMPLES / sizeof *EXAMPLES; i++) {
        random_rows(&rows, true, 1);
        rows.x[5 * D + 3] = 3;
        (EXAMPLES[i].in_weights ? rows.weights : rows.x)[5 * D + 3] = EXAMPLES[i].value;
        kvq_test_failed(kvq_histogram_count_rows(h, &rows.spec, rows.x, rows.weights, N_ROWS, options, &err),
                        KVQ_ERR_NUMERICAL, &err, EXAMPLES[i].message);
        options.n_skip = 6; // a sink row is not looked at
        kvq_test_ok(kvq_histogram_count_rows(h, &rows.spec, rows.x, rows.weights, N_ROWS, options, &err), &err);
        options.n_skip = 0;
    }
    random_rows(&rows, true, D / 2);
    kvq_test_failed(kvq_histogram_count_rows(h, &rows.spec, rows.x, NULL, 1, options, &err), KVQ_ERR_USAGE, &err,
                    "rows of 40 channels cannot have 20 outliers on each side");
    random_rows(&rows, true, 1);
    kvq_test_failed(kvq_histogram_count_rows(h, &rows.spec, rows.x, NULL, -1, options, &err), KVQ_ERR_USAGE, &err,
                    "-1 rows");
    rows.r[9] = (float)INFINITY;
    kvq_test_failed(kvq_histogram_count_rows(h, &rows.spec, rows.x, NULL, 1, options, &err), KVQ_ERR_NUMERICAL, &err,
                    "channel 9");
    random_rows(&rows, false, 1);
    for (int c = 0; c < D; c += 2) rows.x[2 * D + c] = 2e5f; // the half width of row 2 is about 10^5
    kvq_test_failed(kvq_histogram_count_rows(h, &rows.spec, rows.x, NULL, N_ROWS, options, &err), KVQ_ERR_NUMERICAL,
                    &err, "row 2: the middle or half width of its range exceeds f16");
    drop(&h);
}
END_TEST

// ---------------------------------------------------------------- fit

static kvq_fit_report fit(const kvq_histogram *h, int bits, float *codebook) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_fit_report report;
    kvq_test_ok(kvq_fit_histogram(&ctx, h, bits, codebook, &report, &err), &err);
    for (int j = 1; j < 1 << bits; j++) ck_assert(codebook[j] >= codebook[j - 1]);
    return report;
}

static int by_position(const void *a, const void *b) {
    double x = ((const kvq_weighted_point *)a)->x, y = ((const kvq_weighted_point *)b)->x;
    return (x > y) - (x < y);
}

// Few elements crowded into a handful of neighbouring bins, where binning hides most: the optimum over the elements
// must lie between objective - binning_bound and objective + scatter within bins (h^2 / 4), and often lies below the
// objective.
START_TEST(the_binning_bound_holds) {
    const double h = 2.0 / KVQ_HISTOGRAM_BINS;
    double       largest_share = 0;
    for (int problem = 0; problem < 400; problem++) {
        kvq_context        ctx = kvq_test_context();
        kvq_error          err = {0};
        kvq_weighted_point points[40];
        kvq_histogram     *histogram = new_histogram();
        int                n = 3 + problem % 38, bits = 1 + problem % 2, n_bins = 2 + problem % 5;
        double             levels[4], optimum, weight = 0;
        float              codebook[4];
        for (int i = 0; i < n; i++) {
            double bin = floor(n_bins * uniform(3, 64 * problem + i)), inside = uniform(4, 64 * problem + i);
            float  x = (float)(0.25 + h * (bin + (problem % 3 == 0 ? 0.999 * round(inside) : inside)));
            points[i] = (kvq_weighted_point){(double)x, problem % 2 == 0 ? 1 : exp(8 * uniform(5, 64 * problem + i))};
            weight += points[i].w;
            kvq_histogram_add(histogram, x, points[i].w);
        }
        qsort(points, (size_t)n, sizeof *points, by_position);
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, n, 1 << bits, levels, &optimum, &err), &err);
        kvq_fit_report report = fit(histogram, bits, codebook);
        ck_assert(optimum / weight >= report.objective - report.binning_bound);
        ck_assert(optimum / weight <= report.objective + h * h / 4);
        largest_share = fmax(largest_share, (report.objective - optimum / weight) / report.binning_bound);
        drop(&histogram);
    }
    ck_assert(largest_share > 0.02); // without a bound the test would fail
}
END_TEST

// The formula at the head of fit.c, on levels that f32 holds exactly: range * h / 2 * heaviest bin / all weight.
START_TEST(the_binning_bound_by_hand) {
    kvq_histogram *histogram = new_histogram();
    float          codebook[2];
    kvq_histogram_add(histogram, -0.5f, 1);
    kvq_histogram_add(histogram, 0.75f, 3);
    kvq_fit_report report = fit(histogram, 1, codebook);
    ck_assert(report.objective == 0 && report.binning_bound == (1.25 + 0x1p-15) * 0x1p-16 * 3 / 4);
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
    double                    levels[16], optimum, weight = 0;
    float                     codebook[16];
    for (int i = 0; i < N; i++) {
        float x = (float)(2 * uniform(6, i) * uniform(7, i) - 1);
        points[i] = (kvq_weighted_point){(double)x, exp(10 * uniform(8, i) - 20)};
        weight += points[i].w;
        kvq_histogram_add(h, x, points[i].w);
    }
    qsort(points, N, sizeof *points, by_position);
    for (int bits = 2; bits <= 4; bits++) {
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, N, 1 << bits, levels, &optimum, &err), &err);
        kvq_fit_report report = fit(h, bits, codebook);
        ck_assert(fabs(report.objective - optimum / weight) <= report.binning_bound);
        ck_assert(report.binning_bound < 1e-3 * report.objective);
        ck_assert_int_eq(report.n_points, N);
        ck_assert_double_eq_tol(report.weight_sum, weight, 1e-12 * weight);
    }
    drop(&h);
}
END_TEST

START_TEST(degenerate_histograms_are_defined) {
    float          codebook[4];
    kvq_histogram *h = new_histogram();
    kvq_fit_report report = fit(h, 2, codebook);
    ck_assert(report.n_points == 0 && report.objective == 0 && report.binning_bound == 0 && report.weight_sum == 0);
    for (int j = 0; j < 4; j++) ck_assert(codebook[j] == 0);

    for (int i = 0; i < 6; i++) kvq_histogram_add(h, i < 4 ? -0.5f : 0.75f, 0); // no weight: every element counts as 1
    report = fit(h, 1, codebook);
    ck_assert(codebook[0] == -0.5f && codebook[1] == 0.75f && report.n_points == 6 && report.objective == 0);
    ck_assert(report.effective_samples == 0);

    for (int i = 0; i < 5; i++) kvq_histogram_add(h, 0.125f, 0x1p-90); // the only weight: a constant tensor
    report = fit(h, 2, codebook);
    for (int j = 0; j < 4; j++) ck_assert(codebook[j] == 0.125f);
    ck_assert(report.objective == 0);
    drop(&h);
}
END_TEST

START_TEST(sums_beyond_their_range_are_refused) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_histogram *h = new_histogram(), *sum = new_histogram();
    kvq_fit_report report;
    float          codebook[4] = {5, 5, 5, 5};
    for (int i = 0; i < 70000; i++) kvq_histogram_add(h, 0.5f, 32767); // 2.3e9
    for (int i = 0; i < 3; i++) {                                      // any number of them stays refused
        kvq_histogram_merge(sum, h);
        kvq_test_failed(kvq_fit_histogram(&ctx, sum, 2, codebook, &report, &err), KVQ_ERR_NUMERICAL, &err,
                        "add up to more than 2^31");
    }
    kvq_test_failed(kvq_fit_histogram(&ctx, h, 9, codebook, &report, &err), KVQ_ERR_USAGE, &err, "9 bits");
    ck_assert(codebook[0] == 5 && codebook[3] == 5);
    drop(&h);
    drop(&sum);
}
END_TEST

// ---------------------------------------------------------------- allocation failures

typedef struct allocator {
    int n_until_failure, n_live;
} allocator;

static void *limited_alloc(void *user, size_t bytes) {
    allocator *a = user;
    if (a->n_until_failure-- <= 0) return NULL;
    a->n_live++;
    return aligned_alloc(64, bytes);
}

static void limited_release(void *user, void *p) {
    ((allocator *)user)->n_live--;
    free(p);
}

static kvq_status whole_stage(const kvq_context *ctx, const row_set *rows, kvq_error *err) {
    kvq_status         status = KVQ_OK;
    kvq_histogram     *h = NULL;
    kvq_tails         *tails = NULL;
    kvq_artifact      *artifact = NULL;
    kvq_fit_report     report;
    kvq_weighted_point points[3] = {{0, 1}, {1, 1}, {2, 1}};
    float              lower[D], upper[D], codebook[4];
    double             levels[2], cost;
    KVQ_TRY(kvq_tails_create(ctx, D, kvq_tails_needed(0.05, N_ROWS), &tails, err));
    KVQ_TRY(kvq_tails_push(ctx, tails, rows->x, N_ROWS, err));
    KVQ_TRY(kvq_tails_thresholds(ctx, tails, 0.05, lower, upper, err));
    KVQ_TRY(kvq_histogram_create(ctx, &h, err));
    KVQ_TRY(
        kvq_histogram_count_rows(h, &rows->spec, rows->x, rows->weights, N_ROWS, (kvq_count_options){true, 0}, err));
    KVQ_TRY(kvq_fit_histogram(ctx, h, 2, codebook, &report, err));
    KVQ_TRY(kvq_kmeans_lloyd(ctx, points, 3, 2, 1, 1, 5, levels, &cost, err));
    KVQ_TRY(kvq_artifact_create(ctx, 2, &artifact, err));
    KVQ_TRY(kvq_artifact_set_text(ctx, &artifact->model.name, "x", err));
done:
    kvq_artifact_destroy(ctx, &artifact);
    kvq_tails_destroy(ctx, &tails);
    kvq_histogram_destroy(ctx, &h);
    return status;
}

// Every allocation in turn is made to fail: the status says so and nothing is left behind.
START_TEST(no_allocation_failure_leaks) {
    static row_set rows;
    random_rows(&rows, true, 2);
    kvq_status status = KVQ_ERR_MEMORY;
    int        n_failures = 0;
    for (; status != KVQ_OK; n_failures++) {
        allocator   a = {n_failures, 0};
        kvq_context ctx = {.n_threads = 1, .alloc = limited_alloc, .release = limited_release, .user = &a};
        kvq_error   err = {0};
        status = whole_stage(&ctx, &rows, &err);
        ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
        ck_assert_int_eq(a.n_live, 0);
    }
    ck_assert_int_gt(n_failures, 25);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(elements_fall_into_the_bin_that_holds_them),
    KVQ_CASE(effective_samples_follow_the_definition),
    KVQ_LOOP(order_and_partition_do_not_matter, 2),
    KVQ_CASE(packed_histograms_merge_as_themselves),
    KVQ_LOOP(counting_agrees_with_the_codec, 6),
    KVQ_CASE(weights_are_gradients_times_squared_range),
    KVQ_CASE(a_value_row_by_hand),
    KVQ_CASE(bad_rows_are_refused_with_their_place),
    KVQ_CASE(the_binning_bound_holds),
    KVQ_CASE(the_binning_bound_by_hand),
    KVQ_CASE(fit_agrees_with_kmeans_on_the_elements),
    KVQ_CASE(degenerate_histograms_are_defined),
    KVQ_CASE(sums_beyond_their_range_are_refused),
    KVQ_CASE(no_allocation_failure_leaks),
};
KVQ_TEST_MAIN("histogram", CASES)
