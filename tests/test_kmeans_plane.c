// SPDX-License-Identifier: Apache-2.0
// k-means in the plane: against all partitions of few points, clusters that are plain to see, what holds of every local
// optimum; degenerate data; refusals.
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

enum { SIDE = 64, MANY = SIDE * SIDE };

static double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(41, KVQ_RNG_TEST, stream, (uint64_t)index);
}

static double fit(const float *w, const float *x, const float *y, int64_t n, int k, uint64_t seed, float *levels) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    double      cost = -1;
    kvq_test_ok(kvq_kmeans_plane(&ctx, w, x, y, n, k, seed, levels, &cost, &err), &err);
    return cost;
}

// The nearest level of every point by looking at all of them, in f32 as the definition of the codec has it.
static double plain_cost(const float *w, const float *x, const float *y, int64_t n, const float *levels, int k,
                         int *codes) {
    double cost = 0;
    for (int64_t i = 0; i < n; i++) {
        float least = HUGE_VALF;
        for (int j = 0; j < k; j++) {
            float dx = x[i] - levels[2 * j], dy = y[i] - levels[2 * j + 1], distance = dx * dx + dy * dy;
            if (distance < least) codes[i] = j;
            if (distance < least) least = distance;
        }
        cost += (double)w[i] * (double)least;
    }
    return cost;
}

// The best of all partitions of n points into k sets.
static double exhaustive_cost(const float *w, const float *x, const float *y, int n, int k) {
    double best = HUGE_VAL;
    int    n_partitions = 1;
    for (int i = 0; i < n; i++) n_partitions *= k;
    for (int p = 0; p < n_partitions; p++) {
        double sums[3][4] = {{0}}, cost = 0;
        for (int i = 0, rest = p; i < n; i++, rest /= k) {
            double a = (double)x[i], b = (double)y[i], weight = (double)w[i];
            sums[rest % k][0] += weight;
            sums[rest % k][1] += weight * a;
            sums[rest % k][2] += weight * b;
            sums[rest % k][3] += weight * (a * a + b * b);
        }
        for (int j = 0; j < k; j++) {
            const double *s = sums[j];
            if (s[0] > 0) cost += s[3] - (s[1] * s[1] + s[2] * s[2]) / s[0];
        }
        best = fmin(best, cost);
    }
    return best;
}

// Never below the optimum (positions and levels are f32), nearly always at it.
START_TEST(few_points_against_all_partitions) {
    int n_optimal = 0, n_problems = 0;
    for (int problem = 0; problem < 60; problem++) {
        float w[8], x[8], y[8], levels[6];
        int   n = 4 + problem % 5, k = 1 + problem % 3;
        for (int i = 0; i < n; i++) {
            w[i] = (float)exp(3 * uniform(1, 8 * problem + i));
            x[i] = (float)uniform(2, 8 * problem + i);
            y[i] = (float)uniform(3, 8 * problem + i);
        }
        double cost = fit(w, x, y, n, k, 5, levels), optimum = exhaustive_cost(w, x, y, n, k);
        ck_assert(cost >= optimum - 1e-5 * (optimum + 1));
        n_optimal += cost <= optimum + 1e-5 * (optimum + 1);
        n_problems++;
    }
    ck_assert_int_ge(n_optimal, n_problems * 8 / 10);
}
END_TEST

// 12 clusters far apart: each gets a level, its mean.
START_TEST(plain_clusters_are_found) {
    enum { K = 12, EACH = 30 };
    float  w[K * EACH], x[K * EACH], y[K * EACH], levels[2 * K];
    double means[K][3] = {{0}};
    for (int i = 0; i < K * EACH; i++) {
        int c = i % K;
        w[i] = (float)(1 + uniform(4, i));
        x[i] = (float)(10 * (c % 4) + 0.1 * uniform(5, i));
        y[i] = (float)(10 * (c / 4) + 0.1 * uniform(6, i));
        means[c][0] += (double)w[i];
        means[c][1] += (double)w[i] * (double)x[i];
        means[c][2] += (double)w[i] * (double)y[i];
    }
    (void)fit(w, x, y, K * EACH, K, 0, levels);
    for (int c = 0; c < K; c++) {
        int n_at = 0;
        for (int j = 0; j < K; j++) {
            double dx = (double)levels[2 * j] - means[c][1] / means[c][0];
            double dy = (double)levels[2 * j + 1] - means[c][2] / means[c][0];
            n_at += fabs(dx) < 1e-5 && fabs(dy) < 1e-5;
        }
        ck_assert_int_eq(n_at, 1);
    }
}
END_TEST

static float grid_w[MANY], grid_x[MANY], grid_y[MANY];

// Cells of a square, with normal weights; a tenth is empty.
static void make_grid(void) {
    for (int i = 0; i < MANY; i++) {
        double x = (i / SIDE + 0.5) * 8 / SIDE - 4, y = (i % SIDE + 0.5) * 8 / SIDE - 4;
        grid_x[i] = (float)x;
        grid_y[i] = (float)y;
        grid_w[i] = uniform(7, i) < 0.1 ? 0.0f : (float)(exp(-(x * x + y * y) / 2) * (0.5 + uniform(8, i)));
    }
}

// With many levels, of which blocks of points see only the nearest ones: the cost is that of a search through all of
// them, every level is near the mean of its cell (the last of 50 rounds need not have been needed), and more levels
// cost less.
START_TEST(many_levels_on_a_grid) {
    static int codes[MANY];
    float      levels[512];
    double     before = HUGE_VAL;
    make_grid();
    for (int k = 1; k <= 256; k *= 2) {
        double sums[256][3] = {{0}}, cost = fit(grid_w, grid_x, grid_y, MANY, k, 3, levels), at_means = 0;
        double plain = plain_cost(grid_w, grid_x, grid_y, MANY, levels, k, codes);
        ck_assert_double_eq_tol(cost, plain, 1e-9 * plain);
        for (int i = 0; i < MANY; i++) {
            double *s = sums[codes[i]], w = (double)grid_w[i];
            s[0] += w;
            s[1] += w * (double)grid_x[i];
            s[2] += w * (double)grid_y[i];
        }
        for (int i = 0; i < MANY; i++) {
            const double *s = sums[codes[i]];
            double        dx = (double)grid_x[i] - s[1] / s[0], dy = (double)grid_y[i] - s[2] / s[0];
            if (s[0] > 0) at_means += (double)grid_w[i] * (dx * dx + dy * dy);
        }
        ck_assert(at_means <= cost * (1 + 1e-6) && at_means >= cost * 0.99);
        ck_assert(cost < before * (k > 1 ? 0.75 : 1)); // 2^-1 is the rule of high rates
        before = cost;
    }
}
END_TEST

START_TEST(the_seed_decides_and_threads_do_not) {
    float a[128], b[128];
    make_grid();
    double cost = fit(grid_w, grid_x, grid_y, MANY, 64, 3, a);
    for (int threads = 1; threads <= 4; threads++) {
        kvq_context ctx = kvq_test_context();
        kvq_error   err = {0};
        double      again;
        ctx.n_threads = threads;
        kvq_test_ok(kvq_kmeans_plane(&ctx, grid_w, grid_x, grid_y, MANY, 64, 3, b, &again, &err), &err);
        ck_assert_mem_eq(a, b, sizeof a);
        ck_assert(cost == again);
    }
    (void)fit(grid_w, grid_x, grid_y, MANY, 64, 4, b);
    ck_assert_mem_ne(a, b, sizeof a);
}
END_TEST

START_TEST(degenerate_data) {
    const float w[] = {1, 0, 2, 3, 1}, x[] = {1, 7, 2, 1, 2}, y[] = {1, 7, 3, 1, 3}, zero[5] = {0};
    float       levels[8];
    bool        seen[2] = {false, false};
    ck_assert(fit(w, x, y, 5, 4, 0, levels) == 0); // two places that have weight
    for (int j = 0; j < 4; j++) {
        bool first = levels[2 * j] == 1 && levels[2 * j + 1] == 1,
             second = levels[2 * j] == 2 && levels[2 * j + 1] == 3;
        ck_assert(first || second);
        seen[second] = true;
        if (j > 1) ck_assert_mem_eq(levels + 2 * j, levels + 2, 2 * sizeof *levels);
    }
    ck_assert(seen[0] && seen[1]);
    ck_assert(fit(zero, x, y, 5, 4, 0, levels) == 0); // three places, each point weighs the same
    bool far = false;
    for (int j = 0; j < 4; j++) far = far || levels[2 * j] == 7;
    ck_assert(far);
    ck_assert(fit(w, x, y, 0, 4, 0, levels) == 0);
    for (int j = 0; j < 8; j++) ck_assert(levels[j] == 0);
    (void)fit(w, x, y, 1, 1, 0, levels);
    ck_assert(levels[0] == 1 && levels[1] == 1);
}
END_TEST

START_TEST(refusals) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    float       w[] = {1, -1}, x[] = {0, 1}, levels[2];
    double      cost;
    kvq_test_failed(kvq_kmeans_plane(&ctx, w, x, x, 2, 1, 0, levels, &cost, &err), KVQ_ERR_NUMERICAL, &err, "point 1");
    w[1] = 1;
    x[0] = NAN;
    kvq_test_failed(kvq_kmeans_plane(&ctx, w, x, x, 2, 1, 0, levels, &cost, &err), KVQ_ERR_NUMERICAL, &err, "point 0");
    kvq_test_failed(kvq_kmeans_plane(&ctx, w, x, x, 2, 0, 0, levels, &cost, &err), KVQ_ERR_USAGE, &err, "0 levels");
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(few_points_against_all_partitions),   KVQ_CASE(plain_clusters_are_found), KVQ_CASE(many_levels_on_a_grid),
    KVQ_CASE(the_seed_decides_and_threads_do_not), KVQ_CASE(degenerate_data),          KVQ_CASE(refusals),
};
KVQ_TEST_MAIN("kmeans_plane", CASES)
