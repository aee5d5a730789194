// SPDX-License-Identifier: Apache-2.0
// Weighted histograms: order does not matter, rows are counted by the codec's rule, every element is accounted for.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "histogram_test.h"

static void expect_same(const kvq_histogram *a, const kvq_histogram *b) {
    kvq_histogram x = *a, y = *b;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        ck_assert(memcmp(a->by[w].bins, b->by[w].bins, KVQ_HISTOGRAM_BINS * sizeof *a->by[w].bins) == 0);
        x.by[w].bins = y.by[w].bins = NULL;
    }
    ck_assert(memcmp(&x, &y, sizeof x) == 0); // pointers, integers and fixed-point sums: no padding
}

static double sum_of(const kvq_histogram *h, kvq_weighting weighting) {
    double sum = 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) sum += kvq_fixed_to_double(h->by[weighting].bins[i].w);
    return sum;
}

START_TEST(elements_fall_into_the_bin_that_holds_them) {
    static const struct {
        float x;
        int   bin;
    } EXAMPLES[] = {
        {-1, 0},
        {-7, 0},
        {-1 + 0x1p-12f - 0x1p-24f, 0},
        {-1 + 0x1p-12f, 1},
        {-1e-30f, 4095},
        {-0.0f, 4096},
        {0.0f, 4096},
        {1e-30f, 4096},
        {0x1p-12f, 4097},
        {0.5f, 6144},
        {0.9999999f, 8191},
        {1, 8191},
        {1.5f, 8191},
    };
    for (size_t i = 0; i < sizeof EXAMPLES / sizeof *EXAMPLES; i++) {
        kvq_histogram      *h = new_histogram();
        const double        weights[KVQ_N_WEIGHTINGS] = {1, 2, 3, 4};
        const double *const lists[KVQ_N_WEIGHTINGS] = {&weights[0], &weights[1], &weights[2], &weights[3]};
        kvq_histogram_add(h, &EXAMPLES[i].x, lists, 1);
        double clipped = fmax(-1, fmin(1, (double)EXAMPLES[i].x));
        ck_assert_int_eq(h->counts.n_points, 1);
        for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
            const kvq_bin *bin = &h->by[w].bins[EXAMPLES[i].bin];
            double         unit = w == KVQ_WEIGHT_RANGE ? 0x1p-20 : 1; // squared ranges are summed in units of 2^20
            ck_assert(kvq_fixed_to_double(bin->w) == weights[w] * unit);
            ck_assert_double_eq_tol(kvq_fixed_to_double(bin->wx), weights[w] * unit * clipped, 0x1p-96);
            ck_assert_double_eq_tol(kvq_fixed_to_double(h->by[w].wxx), weights[w] * unit * clipped * clipped, 0x1p-96);
        }
        drop(&h);
    }
}
END_TEST

enum { N_ROWS = 90, D = 40, HEADS = 4 };

typedef struct row_set {
    float          x[N_ROWS * D], gradients[N_ROWS * D], z[D], r[D];
    kvq_block_spec spec;
} row_set;

// Rows with outliers on both sides, one constant channel (7), and a constant row (11).
static void random_rows(row_set *rows, bool keys, int n_side) {
    for (int i = 0; i < N_ROWS * D; i++) {
        rows->x[i] = (float)(tan(2.6 * (uniform(1, i) - 0.5)) + i % D);
        if (i % D == 7) rows->x[i] = 0.25f;
        if (i / D == 11) rows->x[i] = -3;
        rows->gradients[i] = (float)exp(30 * (uniform(2, i) - 1));
    }
    for (int c = 0; c < D; c++) {
        rows->z[c] = c == 7 ? 0.25f : (float)c;
        rows->r[c] = c == 7 ? 0 : 2.0f + 0.01f * (float)c;
    }
    rows->spec =
        (kvq_block_spec){.d = D, .bits = 3, .n_side = n_side, .z = keys ? rows->z : NULL, .r = keys ? rows->r : NULL};
}

typedef struct head_set {
    kvq_histogram *of[HEADS];
} head_set;

static head_set new_heads(void) {
    head_set heads;
    for (int h = 0; h < HEADS; h++) heads.of[h] = new_histogram();
    return heads;
}

static void drop_heads(head_set *heads) {
    for (int h = 0; h < HEADS; h++) drop(&heads->of[h]);
}

static kvq_status try_count(const row_set *rows, int64_t first, int64_t n, kvq_count_options options, int n_threads,
                            head_set *heads, kvq_error *err) {
    static float     scratch[N_ROWS * D + N_ROWS];
    kvq_context      ctx = kvq_test_context();
    kvq_count_tensor tensor = {"K", &rows->spec, rows->x + first * D, rows->gradients + first * D, heads->of};
    ck_assert_int_eq(kvq_count_scratch_floats(N_ROWS, D), N_ROWS * D + N_ROWS);
    ctx.n_threads = n_threads;
    options.n_heads = HEADS;
    return kvq_count_rows(&ctx, &tensor, 1, n, options, scratch, err);
}

static void count(const row_set *rows, int64_t first, int64_t n, kvq_count_options options, head_set *heads) {
    kvq_error err = {0};
    kvq_test_ok(try_count(rows, first, n, options, 1, heads, &err), &err);
}

// _i: keys or values
START_TEST(order_partition_and_threads_do_not_matter) {
    static row_set    rows;
    kvq_count_options options = {.n_skip = 0};
    kvq_error         err = {0};
    head_set          whole = new_heads(), parts = new_heads(), part = new_heads(), threads = new_heads();
    random_rows(&rows, _i == 0, 2);
    count(&rows, 0, N_ROWS, options, &whole);
    for (int64_t row = N_ROWS - 1; row >= 30; row--) count(&rows, row, 1, options, &parts);
    count(&rows, 0, 30, options, &part);
    kvq_test_ok(try_count(&rows, 0, N_ROWS, options, 3, &threads, &err), &err);
    for (int h = 0; h < HEADS; h++) {
        kvq_histogram_merge(parts.of[h], part.of[h]);
        expect_same(whole.of[h], parts.of[h]);
        expect_same(whole.of[h], threads.of[h]);
    }
    drop_heads(&whole);
    drop_heads(&parts);
    drop_heads(&part);
    drop_heads(&threads);
}
END_TEST

// Saved and merged bytes are worth the same as the histogram itself; what is not such bytes is refused.
START_TEST(packed_histograms_merge_as_themselves) {
    kvq_histogram *parts[2] = {new_histogram(), new_histogram()}, *whole = new_histogram(), *merged = new_histogram();
    kvq_error      err = {0};
    for (int i = 0; i < 500; i++) {
        float  x = (float)(2 * kvq_rng_uniform(3, KVQ_RNG_TEST, 0, (uint64_t)i) - 1);
        double weight = exp(-30 * kvq_rng_uniform(3, KVQ_RNG_TEST, 1, (uint64_t)i));
        add(parts[i % 2], x, weight);
        add(whole, x, weight);
    }
    parts[0]->counts.n_outliers = whole->counts.n_outliers = 3;
    parts[1]->counts.n_constant = whole->counts.n_constant = 4;
    parts[1]->counts.n_clipped = whole->counts.n_clipped = 5;
    kvq_fixed_add(&parts[0]->energy, 7);
    kvq_fixed_add(&whole->energy, 7);
    for (int i = 0; i < 2; i++) {
        int64_t  n = kvq_histogram_packed_bytes(parts[i]);
        uint8_t *bytes = malloc((size_t)n);
        kvq_histogram_pack(parts[i], bytes);
        kvq_test_ok(kvq_histogram_merge_packed(merged, bytes, n, &err), &err);
        kvq_histogram *spoilt = new_histogram();
        kvq_test_failed(kvq_histogram_merge_packed(spoilt, bytes, n - 1, &err), KVQ_ERR_INTEGRITY, &err,
                        "fit together");
        kvq_test_failed(kvq_histogram_merge_packed(spoilt, bytes, 5, &err), KVQ_ERR_INTEGRITY, &err, "5 bytes");
        drop(&spoilt);
        free(bytes);
    }
    expect_same(merged, whole);
    kvq_histogram_clear(merged);
    kvq_histogram *empty = new_histogram();
    expect_same(merged, empty);
    for (int i = 0; i < 2; i++) drop(&parts[i]);
    drop(&whole);
    drop(&merged);
    drop(&empty);
}
END_TEST

static kvq_element_counts counts_of(const head_set *heads) {
    kvq_element_counts sum = {0};
    for (int h = 0; h < HEADS; h++) {
        sum.n_points += heads->of[h]->counts.n_points;
        sum.n_outliers += heads->of[h]->counts.n_outliers;
        sum.n_constant += heads->of[h]->counts.n_constant;
        sum.n_clipped += heads->of[h]->counts.n_clipped;
    }
    return sum;
}

// The outliers a stored row names are exactly those left out of the count, and every element is accounted for.
START_TEST(counting_agrees_with_the_codec) {
    static row_set    rows;
    kvq_count_options options = {.n_skip = 4};
    head_set          heads = new_heads();
    float             keys[2][8], levels[8] = {-1, -0.7f, -0.4f, -0.1f, 0.1f, 0.4f, 0.7f, 1};
    uint16_t          channels[2][8];
    kvq_block_scratch scratch = {keys[0], keys[1], channels[0], channels[1], 0, 0};
    uint8_t           row_bytes[256];
    bool              is_key = _i < 3;
    int64_t           n_outliers = 0, n_beyond = 0;
    random_rows(&rows, is_key, _i % 3);
    kvq_block_spec spec = rows.spec;
    spec.levels = levels;
    count(&rows, 0, N_ROWS, options, &heads);
    for (int64_t row = 4; row < N_ROWS; row++) {
        ck_assert_int_eq(kvq_block_encode(&spec, rows.x + row * D, &scratch, row_bytes), 1);
        n_outliers += scratch.n_upper + scratch.n_lower;
        for (int c = 0; c < D; c++)
            n_beyond +=
                is_key && rows.r[c] > 0 && fabsf((rows.x[row * D + c] - rows.z[c]) / rows.r[c]) > KVQ_OUTLIER_EDGE;
    }
    kvq_element_counts counts = counts_of(&heads);
    ck_assert_int_eq(counts.n_outliers, n_outliers);
    ck_assert_int_eq(counts.n_constant, is_key ? N_ROWS - 4 : D - 2 * spec.n_side);
    ck_assert_int_eq(counts.n_points + counts.n_outliers + counts.n_constant, (N_ROWS - 4) * D);
    ck_assert_int_eq(counts.n_clipped, is_key ? n_beyond - n_outliers : 0);
    drop_heads(&heads);
}
END_TEST

// Sums in double by the definition; the fixed-point ones lose at most 2^-96 per element, the double ones 2^-53
// relative.
START_TEST(weights_and_squares_follow_their_definitions) {
    static row_set rows;
    head_set       heads = new_heads();
    double         weights[KVQ_N_WEIGHTINGS] = {0}, energy = 0, beyond[2] = {0}, beyond2 = 0;
    double         got[KVQ_N_WEIGHTINGS] = {0}, got_energy = 0, got_beyond[2] = {0}, got_beyond2 = 0;
    random_rows(&rows, true, 0);
    count(&rows, 0, N_ROWS, (kvq_count_options){.n_skip = 0}, &heads);
    for (int i = 0; i < N_ROWS * D; i++) {
        double x = (double)rows.x[i], r = (double)rows.r[i % D], g = (double)rows.gradients[i];
        energy += x * x;
        if (!(r > 0)) continue;
        const double w[KVQ_N_WEIGHTINGS] = {1, g, g * (r * r), r * r};
        for (int k = 0; k < KVQ_N_WEIGHTINGS; k++) weights[k] += w[k];
        double excess = fabs((double)((rows.x[i] - rows.z[i % D]) / rows.r[i % D])) - 1;
        if (!(excess > 0)) continue;
        beyond[rows.x[i] > rows.z[i % D]] += excess * r * r;
        beyond2 += excess * excess * r * r;
    }
    for (int h = 0; h < HEADS; h++) {
        for (int k = 0; k < KVQ_N_WEIGHTINGS; k++) got[k] += sum_of(heads.of[h], (kvq_weighting)k);
        kvq_distribution *d = distribution_of(heads.of[h]);
        kvq_context       ctx = kvq_test_context();
        got_energy += d->sums->energy;
        for (int side = 0; side < 2; side++) got_beyond[side] += d->sums->beyond[side];
        got_beyond2 += d->sums->beyond_squared;
        kvq_distributions_free(&ctx, &d);
    }
    got[KVQ_WEIGHT_RANGE] *= 0x1p20;
    for (int k = 0; k < KVQ_N_WEIGHTINGS; k++) ck_assert_double_eq_tol(got[k], weights[k], 1e-12 * weights[k]);
    ck_assert_double_eq_tol(got_energy, energy, 1e-12 * energy);
    for (int side = 0; side < 2; side++) ck_assert_double_eq_tol(got_beyond[side], beyond[side], 1e-12 * beyond[side]);
    ck_assert_double_eq_tol(got_beyond2, beyond2, 1e-12 * beyond2);
    ck_assert(beyond[0] > 0 && beyond[1] > 0);
    drop_heads(&heads);
}
END_TEST

// A value row is normalised with the f16 middle and half width; each head counts its own channels.
START_TEST(a_value_row_by_hand) {
    kvq_error         err = {0};
    kvq_context       ctx = kvq_test_context();
    kvq_histogram    *heads[2] = {new_histogram(), new_histogram()};
    const float       x[6] = {9, 1, -8, 5, 2, 3}; // outliers 9 and -8; the rest 1 .. 5: z = 3, r = 2
    float             scratch[7];
    kvq_block_spec    spec = {.d = 6, .bits = 2, .n_side = 1};
    kvq_count_tensor  tensor = {"V", &spec, x, NULL, heads};
    kvq_count_options options = {.n_heads = 2};
    kvq_test_ok(kvq_count_rows(&ctx, &tensor, 1, 1, options, scratch, &err), &err);
    static const struct { int head, bin; } PLACES[4] = {{0, 0}, {1, 2048}, {1, 4096}, {1, 8191}};
    for (int i = 0; i < 4; i++) {
        const kvq_histogram *h = heads[PLACES[i].head];
        ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_NONE].bins[PLACES[i].bin].w) == 1);
        ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_RANGE].bins[PLACES[i].bin].w) == 4 * 0x1p-20);
        ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_FISHER].bins[PLACES[i].bin].w) == 0); // no gradients were given
    }
    ck_assert(heads[0]->counts.n_outliers == 2 && heads[1]->counts.n_outliers == 0);
    ck_assert(heads[0]->counts.n_points == 1 && heads[1]->counts.n_points == 3);
    for (int h = 0; h < 2; h++) drop(&heads[h]);
}
END_TEST

// What the public code calibrates with: percentiles of the row, everything strictly beyond them apart.
START_TEST(percentile_ranges_by_hand) {
    kvq_error         err = {0};
    kvq_context       ctx = kvq_test_context();
    kvq_histogram    *h = new_histogram();
    float             x[11], scratch[12];
    kvq_block_spec    spec = {.d = 11, .bits = 2, .n_side = 1};
    kvq_count_tensor  tensor = {"V", &spec, x, NULL, &h};
    kvq_count_options options = {.n_heads = 1, .token_range = KVQ_RANGE_PERCENTILES, .fraction = 0.3};
    for (int c = 0; c < 11; c++) x[c] = (float)((7 * c) % 11); // 0 .. 10 in some order
    kvq_test_ok(kvq_count_rows(&ctx, &tensor, 1, 1, options, scratch, &err), &err);
    // positions 1.5 and 8.5: z = 5, r = 3.5; 0, 1, 9 and 10 lie beyond
    ck_assert(h->counts.n_outliers == 4 && h->counts.n_points == 7 && h->counts.n_clipped == 0);
    ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_RANGE].bins[4096].w) == 12.25 * 0x1p-20);
    ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_NONE].bins[(int)(4096 * (1 + 3 / 3.5))].w) == 1); // the value 8
    drop(&h);
}
END_TEST

START_TEST(bad_rows_are_refused_with_their_place) {
    static row_set    rows;
    kvq_error         err = {0};
    head_set          heads = new_heads();
    kvq_count_options options = {.n_skip = 0};
    static const struct {
        bool        in_gradients;
        float       value;
        const char *message;
    } EXAMPLES[] = {
        {false, (float)NAN, "K, position 5: channel 3 is nan"},
        {false, (float)INFINITY, "K, position 5: channel 3 is inf"},
        {true, (float)NAN, "K, position 5, channel 3 has the squared gradient nan"},
        {true, (float)INFINITY, "K, position 5, channel 3 has the squared gradient inf"},
        {true, -1, "K, position 5, channel 3 has the squared gradient -1"},
        {true, 1e6f, "K, position 5, channel 3 has weight 1e+06, which is beyond"},
    };
    for (size_t i = 0; i < sizeof EXAMPLES / sizeof *EXAMPLES; i++) {
        random_rows(&rows, true, 1);
        rows.x[5 * D + 3] = 3;
        (EXAMPLES[i].in_gradients ? rows.gradients : rows.x)[5 * D + 3] = EXAMPLES[i].value;
        kvq_test_failed(try_count(&rows, 0, N_ROWS, options, 1 + (int)i % 2, &heads, &err), KVQ_ERR_NUMERICAL, &err,
                        EXAMPLES[i].message);
        options.n_skip = 6; // a sink row is not looked at
        kvq_test_ok(try_count(&rows, 0, N_ROWS, options, 1, &heads, &err), &err);
        options.n_skip = 0;
    }
    random_rows(&rows, true, D / 2);
    kvq_test_failed(try_count(&rows, 0, 1, options, 1, &heads, &err), KVQ_ERR_USAGE, &err,
                    "K: rows of 40 channels cannot have 20 outliers on each side");
    random_rows(&rows, true, 1);
    kvq_test_failed(try_count(&rows, 0, -1, options, 1, &heads, &err), KVQ_ERR_USAGE, &err, "-1 rows");
    rows.r[9] = (float)INFINITY;
    kvq_test_failed(try_count(&rows, 0, 1, options, 1, &heads, &err), KVQ_ERR_NUMERICAL, &err, "channel 9");
    random_rows(&rows, false, 1);
    for (int c = 0; c < D; c += 2) rows.x[2 * D + c] = 2e5f; // the half width of row 2 is about 10^5
    kvq_test_failed(try_count(&rows, 0, N_ROWS, options, 1, &heads, &err), KVQ_ERR_NUMERICAL, &err,
                    "position 2: the middle or half width of its range exceeds f16");
    drop_heads(&heads);
}
END_TEST

// A range so small that the quotient leaves f32: clipped like any other element, not taken for a mark.
START_TEST(a_quotient_beyond_f32_is_clipped) {
    kvq_error         err = {0};
    kvq_context       ctx = kvq_test_context();
    kvq_histogram    *h = new_histogram();
    const float       x[3] = {1000, -1000, 0}, z[3] = {0, 0, 0}, r[3] = {1e-38f, 1e-38f, 1};
    float             scratch[4];
    kvq_block_spec    spec = {.d = 3, .bits = 2, .n_side = 0, .z = z, .r = r};
    kvq_count_tensor  tensor = {"K", &spec, x, NULL, &h};
    kvq_count_options options = {.n_heads = 1};
    kvq_test_ok(kvq_count_rows(&ctx, &tensor, 1, 1, options, scratch, &err), &err);
    ck_assert(h->counts.n_points == 3 && h->counts.n_clipped == 2 && h->counts.n_constant == 0);
    ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_NONE].bins[0].w) == 1);
    ck_assert(kvq_fixed_to_double(h->by[KVQ_WEIGHT_NONE].bins[8191].w) == 1);
    drop(&h);
}
END_TEST

START_TEST(sums_beyond_their_range_are_refused) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_histogram    *h = new_histogram(), *sum = new_histogram();
    kvq_distribution *d = distribution_of(h);
    for (int i = 0; i < 70000; i++) add(h, 0.5f, 32767); // 2.3e9
    for (int i = 0; i < 3; i++) {                        // any number of them stays refused
        kvq_histogram_merge(sum, h);
        kvq_test_failed(kvq_distribution_take(sum, d, &err), KVQ_ERR_NUMERICAL, &err, "add up to more than 2^31");
    }
    kvq_distributions_free(&ctx, &d);
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
    kvq_distribution  *distribution = NULL;
    kvq_tails         *tails = NULL;
    kvq_artifact      *artifact = NULL;
    kvq_fit_report     report;
    kvq_weighted_point points[3] = {{0, 1}, {1, 1}, {2, 1}};
    float              lower[D], upper[D], codebook[4];
    double             levels[2], cost;
    KVQ_TRY(kvq_tails_create(ctx, D, kvq_tails_needed(0.05, KVQ_SCOPE_MATRIX, D, N_ROWS), &tails, err));
    KVQ_TRY(kvq_tails_push(ctx, tails, rows->x, N_ROWS, err));
    KVQ_TRY(kvq_tails_thresholds(ctx, tails, 0.05, KVQ_SCOPE_MATRIX, lower, upper, err));
    static float     scratch[N_ROWS * D + N_ROWS];
    kvq_count_tensor tensor = {"K", &rows->spec, rows->x, rows->gradients, &h};
    kvq_fit_options  options = {.weighting = KVQ_WEIGHT_FISHER, .compare_lloyd = true};
    KVQ_TRY(kvq_histogram_create(ctx, KVQ_WEIGHTINGS_ALL, &h, err));
    KVQ_TRY(kvq_count_rows(ctx, &tensor, 1, N_ROWS, (kvq_count_options){.n_heads = 1}, scratch, err));
    KVQ_TRY(kvq_distributions_create(ctx, KVQ_WEIGHTINGS_ALL, 1, &distribution, err));
    KVQ_TRY(kvq_distribution_take(h, distribution, err));
    KVQ_TRY(kvq_fit_table(ctx, distribution, 1, KVQ_NUQ, 2, &options, codebook, NULL, &report, err));
    KVQ_TRY(kvq_kmeans_lloyd(ctx, points, 3, 2, 1, 1, 5, levels, &cost, err));
    KVQ_TRY(kvq_artifact_create(ctx, 2, &artifact, err));
    KVQ_TRY(kvq_artifact_set_text(ctx, &artifact->model.name, "x", err));
done:
    kvq_artifact_destroy(ctx, &artifact);
    kvq_tails_destroy(ctx, &tails);
    kvq_distributions_free(ctx, &distribution);
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
    KVQ_LOOP(order_partition_and_threads_do_not_matter, 2),
    KVQ_CASE(packed_histograms_merge_as_themselves),
    KVQ_LOOP(counting_agrees_with_the_codec, 6),
    KVQ_CASE(weights_and_squares_follow_their_definitions),
    KVQ_CASE(a_value_row_by_hand),
    KVQ_CASE(percentile_ranges_by_hand),
    KVQ_CASE(bad_rows_are_refused_with_their_place),
    KVQ_CASE(a_quotient_beyond_f32_is_clipped),
    KVQ_CASE(sums_beyond_their_range_are_refused),
    KVQ_CASE(no_allocation_failure_leaks),
};
KVQ_TEST_MAIN("histogram", CASES)
