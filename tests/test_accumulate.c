// SPDX-License-Identifier: Apache-2.0
// Adding to a histogram by the chunk: the same bits as one fixed-point addition after the other; sums that leave their
// range.
#include <float.h>
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

enum { MAX_N = 3000 };

static double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(31, KVQ_RNG_TEST, stream, (uint64_t)index);
}

static kvq_histogram *new_histogram(kvq_weighting_set weightings) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_histogram *h = NULL;
    kvq_test_ok(kvq_histogram_create(&ctx, weightings, &h, &err), &err);
    return h;
}

static void drop(kvq_histogram **h) {
    kvq_context ctx = kvq_test_context();
    kvq_histogram_destroy(&ctx, h);
    ck_assert_ptr_null(*h);
}

// The definition: what the header says of each sum, added one by one. `unit` 2^-20 for sums of r^2.
static void add_plainly(kvq_weight_sums *sums, float x, double weight, double unit) {
    double clipped = x > 1 ? 1 : x < -1 ? -1 : (double)x, w = weight * unit;
    int    bin = (int)floor((clipped + 1) * (KVQ_HISTOGRAM_BINS / 2)); // exact in f64 but for tiny x below 0, where ...
    if (clipped < 0 && clipped + 1 == 1) bin = KVQ_HISTOGRAM_BINS / 2 - 1; // ... x + 1 is rounded to 1
    if (bin == KVQ_HISTOGRAM_BINS) bin--;
    kvq_fixed_add(&sums->bins[bin].w, w);
    kvq_fixed_add(&sums->bins[bin].wx, w * clipped);
    kvq_fixed_add(&sums->wxx, w * clipped * clipped);
    if (w >= 0x1p-27)
        kvq_fixed_add(&sums->w2_large, w * w);
    else
        kvq_fixed_add(&sums->w2_small, w * w * 0x1p45);
}

static const float EDGES[] = {
    -1, 1,  -0.0f,   0.0f,     0x1p-12f, -0x1p-12f, 1e-30f,       -1e-30f,       FLT_MIN,       -FLT_MIN,
    7,  -7, FLT_MAX, -FLT_MAX, 0.5f,     -0.5f,     1 - 0x1p-24f, -1 + 0x1p-24f, 0x1.000002p0f, -0x1.000002p0f};
enum { N_EDGES = sizeof EDGES / sizeof *EDGES };

// Positions inside, at and beyond the edges; weights over many decades, 0, tiny ones and large
// ones, but not so many that a sum leaves its range. stream % 3: 0 large weights, 1 small ones, 2 all kinds.
static void make_elements(uint32_t stream, int n, float *x, double *w) {
    for (int i = 0; i < n; i++) {
        double u = uniform(stream, 2 * i), v = uniform(stream, 2 * i + 1);
        x[i] = u < 0.1 ? EDGES[(int)(u * 10 * N_EDGES)] : (float)(2.2 * u - 1.2);
        w[i] = stream % 3 == 0 ? 0.1 + v : stream % 3 == 1 ? 1e-9 * v : exp(80 * (v - 0.9));
        if (v < 0.05) w[i] = v < 0.01 ? 0 : v < 0.02 ? 5e-324 : v < 0.03 ? 0x1.fffffffffffffp11 : 0x1p-96 * (v * 100);
        if (stream % 3 == 1 && w[i] > 1e-9) w[i] = 1e-9;
    }
}

static void expect_same(const kvq_weight_sums *a, const kvq_weight_sums *b) {
    ck_assert(memcmp(a->bins, b->bins, KVQ_HISTOGRAM_BINS * sizeof *a->bins) == 0);
    ck_assert(memcmp(&a->wxx, &b->wxx, sizeof a->wxx) == 0);
    ck_assert(memcmp(&a->w2_large, &b->w2_large, sizeof a->w2_large) == 0);
    ck_assert(memcmp(&a->w2_small, &b->w2_small, sizeof a->w2_small) == 0);
}

START_TEST(many_are_added_as_one_by_one) {
    static const int COUNTS[] = {0, 1, 2, 31, 255, 256, 257, 511, 512, 513, MAX_N};
    static float     x[MAX_N];
    static double    w[MAX_N];
    for (uint32_t stream = 0; stream < 33; stream++) {
        int            n = COUNTS[stream / 3];
        kvq_histogram *plain = new_histogram(KVQ_WEIGHTINGS_ALL), *single = new_histogram(KVQ_WEIGHTINGS_ALL);
        kvq_histogram *many = new_histogram(KVQ_WEIGHTINGS_ALL);
        const double  *lists[KVQ_N_WEIGHTINGS] = {NULL, w, w, w};
        make_elements(stream, n, x, w);
        for (int i = 0; i < n; i++) {
            const double weights[KVQ_N_WEIGHTINGS] = {1, w[i], w[i], w[i]};
            for (int by = 0; by < KVQ_N_WEIGHTINGS; by++)
                add_plainly(&plain->by[by], x[i], weights[by], by == KVQ_WEIGHT_RANGE ? 0x1p-20 : 1);
            const double *const one[KVQ_N_WEIGHTINGS] = {NULL, &w[i], &w[i], &w[i]};
            kvq_histogram_add(single, &x[i], one, 1);
        }
        kvq_histogram_add(many, x, lists, n);
        for (int by = 0; by < KVQ_N_WEIGHTINGS; by++) {
            expect_same(&many->by[by], &plain->by[by]);
            expect_same(&single->by[by], &plain->by[by]);
        }
        ck_assert(many->counts.n_points == n && single->counts.n_points == n);
        drop(&plain);
        drop(&single);
        drop(&many);
    }
}
END_TEST

// Weights that are not counted are not read, and one weighting is as with all of them.
START_TEST(only_what_is_counted_is_read) {
    static float   x[MAX_N];
    static double  w[MAX_N];
    kvq_histogram *all = new_histogram(KVQ_WEIGHTINGS_ALL), *fisher = new_histogram(1u << KVQ_WEIGHT_FISHER);
    const double  *lists[KVQ_N_WEIGHTINGS] = {w, w, w, w}, *one[KVQ_N_WEIGHTINGS] = {NULL, w, NULL, NULL};
    make_elements(2, MAX_N, x, w);
    kvq_histogram_add(all, x, lists, MAX_N);
    kvq_histogram_add(fisher, x, one, MAX_N);
    expect_same(&all->by[KVQ_WEIGHT_FISHER], &fisher->by[KVQ_WEIGHT_FISHER]);
    ck_assert_ptr_null(fisher->by[KVQ_WEIGHT_NONE].bins);
    drop(&all);
    drop(&fisher);
}
END_TEST

// Once a sum has left its range it stays negative, so that the fit can refuse it: a bin's weight after 2^16 of the
// largest, the sum of squares within one chunk.
START_TEST(sums_beyond_their_range_stay_negative) {
    static float   x[MAX_N];
    static double  w[MAX_N];
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_histogram *h = new_histogram(1u << KVQ_WEIGHT_FISHER);
    const double  *lists[KVQ_N_WEIGHTINGS] = {NULL, w, NULL, NULL};
    for (int i = 0; i < MAX_N; i++) w[i] = 0x1.fffffffffffffp14;
    const kvq_weight_sums *sums = &h->by[KVQ_WEIGHT_FISHER];
    kvq_histogram_add(h, x, lists, 2);
    ck_assert(sums->w2_large.hi > 0); // just below 2^31
    kvq_histogram_add(h, x, lists, MAX_N);
    ck_assert(sums->w2_large.hi < 0 && sums->bins[KVQ_HISTOGRAM_BINS / 2].w.hi > 0);
    for (int i = 0; i < 1000; i++) kvq_histogram_add(h, x, lists, MAX_N);
    ck_assert(sums->w2_large.hi < 0 && sums->bins[KVQ_HISTOGRAM_BINS / 2].w.hi < 0);
    kvq_distribution *d = NULL;
    kvq_test_ok(kvq_distributions_create(&ctx, 1u << KVQ_WEIGHT_FISHER, 1, &d, &err), &err);
    kvq_test_failed(kvq_distribution_take(h, d, &err), KVQ_ERR_NUMERICAL, &err, "add up to more than 2^31");
    kvq_distributions_free(&ctx, &d);
    drop(&h);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(many_are_added_as_one_by_one),
    KVQ_CASE(only_what_is_counted_is_read),
    KVQ_CASE(sums_beyond_their_range_stay_negative),
};
KVQ_TEST_MAIN("accumulate", CASES)
