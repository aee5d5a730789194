// SPDX-License-Identifier: Apache-2.0
// k-means: the exact solution against exhaustive search, a plain dynamic programme and Lloyd; degenerate data;
// refusals.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"
#include "units.h"

enum { MAX_POINTS = 1500, MAX_LEVELS = 16 };

static int by_position(const void *a, const void *b) {
    double x = ((const kvq_weighted_point *)a)->x, y = ((const kvq_weighted_point *)b)->x;
    return (x > y) - (x < y);
}

static double uniform(uint32_t stream, uint64_t index) { return kvq_rng_uniform(11, KVQ_RNG_TEST, stream, index); }

// Problem number `problem`: smooth, heavy-tailed, clustered or gridded positions; weights equal, over many decades, or
// partly zero.
static void random_points(uint32_t problem, kvq_weighted_point *points, int n) {
    for (int i = 0; i < n; i++) {
        double u = uniform(problem, (uint64_t)i), v = uniform(problem, 1000000 + (uint64_t)i);
        double shapes[4] = {u, tan(3.1 * (u - 0.5)), floor(5 * u) + 0.01 * v, floor(9 * u)};
        double weights[3] = {1, exp(16 * (v - 0.5)), v < 0.3 ? 0 : v};
        points[i].x = shapes[problem % 4];
        points[i].w = weights[problem % 3];
    }
    qsort(points, (size_t)n, sizeof *points, by_position);
}

static double exact_cost(const kvq_weighted_point *points, int n, int k, double *levels) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    double      cost = -1;
    kvq_test_ok(kvq_kmeans_exact(&ctx, points, n, k, levels, &cost, &err), &err);
    for (int j = 1; j < k; j++) ck_assert(levels[j] >= levels[j - 1]);
    return cost;
}

// What rounding may do: prefix sums are good to some units of 2^-53 of the sum of squares about the mean, which is the
// cost of a single level.
static double tolerance(const kvq_weighted_point *points, int n) {
    double level;
    return 8 * 0x1p-53 * exact_cost(points, n, 1, &level);
}

// The cost of the best of all assignments of points to k clusters, neighbours or not.
static double exhaustive_cost(const kvq_weighted_point *points, int n, int k) {
    double best = HUGE_VAL;
    int    n_assignments = 1;
    for (int i = 0; i < n; i++) n_assignments *= k;
    for (int a = 0; a < n_assignments; a++) {
        double w[4] = {0}, wx[4] = {0}, cost = 0;
        for (int i = 0, rest = a; i < n; i++, rest /= k) {
            w[rest % k] += points[i].w;
            wx[rest % k] += points[i].w * points[i].x;
        }
        for (int i = 0, rest = a; i < n; i++, rest /= k) {
            double distance = w[rest % k] > 0 ? points[i].x - wx[rest % k] / w[rest % k] : 0;
            cost += points[i].w * distance * distance;
        }
        best = fmin(best, cost);
    }
    return best;
}

START_TEST(exact_equals_exhaustive_search) {
    kvq_weighted_point points[8];
    double             levels[4];
    for (uint32_t problem = 0; problem < 240; problem++) {
        int n = 1 + (int)(problem % 8), k = 1 + (int)(problem / 8 % 4);
        random_points(problem, points, n);
        bool weighted = false;
        for (int i = 0; i < n; i++) weighted = weighted || points[i].w > 0;
        for (int i = 0; i < n && !weighted; i++) points[i].w = 1;
        ck_assert_double_eq_tol(exact_cost(points, n, k, levels), exhaustive_cost(points, n, k),
                                1e-300 + tolerance(points, n));
    }
}
END_TEST

static double cost_of_cut(const kvq_weighted_point *points, int first, int end) {
    double w = 0, mean = 0, cost = 0;
    for (int i = first; i < end; i++) w += points[i].w;
    for (int i = first; i < end && w > 0; i++) mean += points[i].w / w * points[i].x;
    for (int i = first; i < end; i++) cost += points[i].w * (points[i].x - mean) * (points[i].x - mean);
    return cost;
}

// All ways to cut n points into at most k runs.
static double cheapest_cut(const kvq_weighted_point *points, int first, int n, int k) {
    double best = cost_of_cut(points, first, n);
    for (int end = first + 1; end < n && k > 1; end++) {
        best = fmin(best, cost_of_cut(points, first, end) + cheapest_cut(points, end, n, k - 1));
    }
    return best;
}

START_TEST(exact_equals_all_cuts) {
    kvq_weighted_point points[12];
    double             levels[4];
    for (uint32_t problem = 300; problem < 600; problem++) {
        int n = 9 + (int)(problem % 4), k = 2 + (int)(problem / 4 % 3);
        random_points(problem, points, n);
        ck_assert_double_eq_tol(exact_cost(points, n, k, levels), cheapest_cut(points, 0, n, k),
                                1e-300 + tolerance(points, n));
    }
}
END_TEST

// The textbook recursion without any pruning, on enough points for every depth and chunk of the fast one. Points of one
// problem have no equal positions.
START_TEST(exact_equals_the_quadratic_recursion) {
    static kvq_weighted_point points[MAX_POINTS];
    static double             best[2][MAX_POINTS + 1];
    static double             w[MAX_POINTS + 1], wx[MAX_POINTS + 1], wxx[MAX_POINTS + 1];
    int                       n = MAX_POINTS, k = _i < 10 ? 9 : 160;
    double                    levels[160];
    random_points(720 + (uint32_t)_i, points, n);
    for (int i = 0; i < n; i++) {
        w[i + 1] = w[i] + points[i].w;
        wx[i + 1] = wx[i] + points[i].w * points[i].x;
        wxx[i + 1] = wxx[i] + points[i].w * points[i].x * points[i].x;
    }
    for (int m = 1; m <= k; m++) {
        double *now = best[m % 2], *before = best[(m + 1) % 2];
        for (int j = 0; j <= n; j++) {
            now[j] = j == 0 ? 0 : HUGE_VAL;
            for (int i = m == 1 ? 0 : j - 1; i >= 0 && i < j; i--) {
                double weight = w[j] - w[i], sum = wx[j] - wx[i];
                double run = weight > 0 ? fmax(0, wxx[j] - wxx[i] - sum * sum / weight) : 0;
                if (m == 1 && i > 0) continue;
                now[j] = fmin(now[j], (m == 1 ? 0 : before[i]) + run);
            }
        }
    }
    // plain sums about zero: n roundings of the whole sum of squares
    ck_assert_double_eq_tol(exact_cost(points, n, k, levels), best[k % 2][n], MAX_POINTS * 0x1p-53 * wxx[n]);
}
END_TEST

START_TEST(exact_never_costs_more_than_lloyd) {
    static kvq_weighted_point points[400];
    kvq_context               ctx = kvq_test_context();
    kvq_error                 err = {0};
    double                    exact_levels[MAX_LEVELS], levels[MAX_LEVELS], cost;
    int                       n_better = 0;
    for (uint32_t problem = 1000; problem < 2000; problem++) {
        int n = 20 + (int)(problem % 381), k = 2 + (int)(problem % 15);
        random_points(problem, points, n);
        kvq_test_ok(kvq_kmeans_lloyd(&ctx, points, n, k, problem, 3, 100, levels, &cost, &err), &err);
        for (int j = 1; j < k; j++) ck_assert(levels[j] >= levels[j - 1]);
        double exact = exact_cost(points, n, k, exact_levels);
        ck_assert_msg(exact <= cost + tolerance(points, n), "problem %u: exact %.17g, Lloyd %.17g", problem, exact,
                      cost);
        n_better += exact < 0.999 * cost;
    }
    ck_assert_int_gt(n_better, 100); // otherwise the comparison would say nothing
}
END_TEST

// Levels are not compared: several codebooks can be optimal, and rounding chooses among them.
START_TEST(exact_equals_the_reference) {
    cJSON             *units = units_read();
    const cJSON       *example;
    kvq_weighted_point points[400];
    double             levels[MAX_LEVELS];
    cJSON_ArrayForEach(example, units_get(units, "kmeans")) {
        int     n, k = (int)units_number(example, "k");
        double *x = units_array(example, "x", &n), *w = units_array(example, "w", &n);
        for (int i = 0; i < n; i++) points[i] = (kvq_weighted_point){x[i], w[i]};
        qsort(points, (size_t)n, sizeof *points, by_position);
        double mean = exact_cost(points, n, k, levels) / units_number(example, "weight_sum");
        double reference = units_number(example, "weighted_mean_sq_error"); // which is 6e-34 where it should be 0
        ck_assert_msg(fabs(mean - reference) <= 1e-9 * reference + 1e-30, "%s: %.17g, reference %.17g",
                      units_get(example, "name")->valuestring, mean, reference);
        free(x);
        free(w);
    }
    cJSON_Delete(units);
}
END_TEST

// Beside points of weight 10^15 the others must still be placed to the last digit: with plain prefix sums they are not.
START_TEST(huge_weights_do_not_hide_small_ones) {
    kvq_weighted_point points[42], *small = points + 1;
    double             levels[6];
    random_points(2400, small, 40); // positions in [0, 1), weights 1
    points[0] = (kvq_weighted_point){-50, 1e15};
    points[41] = (kvq_weighted_point){70, 3e15};
    double alone = exact_cost(small, 40, 4, levels), bound = tolerance(small, 40);
    ck_assert_double_eq_tol(exact_cost(points, 42, 6, levels), alone, bound);
    ck_assert(levels[0] == -50 && levels[5] == 70);
}
END_TEST

START_TEST(degenerate_samples_are_defined) {
    kvq_weighted_point constant[3] = {{2.5, 1}, {2.5, 0}, {2.5, 7}}, few[4] = {{-1, 1}, {0, 0}, {1, 2}, {1, 1}};
    kvq_weighted_point weightless[4] = {{0, 0}, {1, 0}, {5, 0}, {6, 0}}, tie[3] = {{0, 1}, {1, 1}, {2, 1}};
    double             levels[4];
    ck_assert(exact_cost(constant, 3, 3, levels) == 0 && levels[0] == 2.5 && levels[2] == 2.5);
    ck_assert(exact_cost(few, 4, 4, levels) == 0);
    ck_assert(levels[0] == -1 && levels[1] == 1 && levels[2] == 1 && levels[3] == 1);
    ck_assert(exact_cost(weightless, 4, 2, levels) == 1 && levels[0] == 0.5 && levels[1] == 5.5);
    ck_assert(exact_cost(weightless, 0, 3, levels) == 0 && levels[0] == 0 && levels[2] == 0);
    ck_assert(exact_cost(tie, 3, 2, levels) == 0.5 && levels[0] == 0 && levels[1] == 1.5); // the lowest cut
    ck_assert(exact_cost(tie, 3, 1, levels) == 2 && levels[0] == 1);
}
END_TEST

START_TEST(lloyd_handles_the_same_degenerate_samples) {
    kvq_context        ctx = kvq_test_context();
    kvq_error          err = {0};
    kvq_weighted_point few[3] = {{-1, 1}, {0, 0}, {1, 2}};
    double             levels[4], cost;
    kvq_test_ok(kvq_kmeans_lloyd(&ctx, few, 3, 4, 1, 2, 10, levels, &cost, &err), &err);
    ck_assert(cost == 0 && levels[0] == -1 && levels[1] == 1 && levels[3] == 1);
    kvq_test_ok(kvq_kmeans_lloyd(&ctx, few, 0, 2, 1, 2, 10, levels, &cost, &err), &err);
    ck_assert(cost == 0 && levels[0] == 0 && levels[1] == 0);
    kvq_test_failed(kvq_kmeans_lloyd(&ctx, few, 3, 2, 1, 0, 10, levels, &cost, &err), KVQ_ERR_USAGE, &err, "0 starts");
}
END_TEST

START_TEST(bad_points_are_refused) {
    kvq_context        ctx = kvq_test_context();
    kvq_error          err = {0};
    kvq_weighted_point points[2] = {{0, 1}, {1, 1}};
    double             levels[2] = {7, 7}, cost = 7;
    kvq_test_failed(kvq_kmeans_exact(&ctx, points, 2, 0, levels, &cost, &err), KVQ_ERR_USAGE, &err, "with 0 levels");
    kvq_test_failed(kvq_kmeans_exact(&ctx, points, -1, 2, levels, &cost, &err), KVQ_ERR_USAGE, &err, "-1 points");
    points[1].w = -2;
    kvq_test_failed(kvq_kmeans_exact(&ctx, points, 2, 2, levels, &cost, &err), KVQ_ERR_NUMERICAL, &err,
                    "point 1 lies at 1 and has weight -2");
    points[1].w = (double)NAN;
    kvq_test_failed(kvq_kmeans_exact(&ctx, points, 2, 2, levels, &cost, &err), KVQ_ERR_NUMERICAL, &err, "point 1");
    points[1] = (kvq_weighted_point){-1, 1};
    kvq_test_failed(kvq_kmeans_exact(&ctx, points, 2, 2, levels, &cost, &err), KVQ_ERR_USAGE, &err,
                    "not sorted, -1 comes after 0");
    points[1] = (kvq_weighted_point){1e200, 1};
    kvq_test_failed(kvq_kmeans_exact(&ctx, points, 2, 1, levels, &cost, &err), KVQ_ERR_NUMERICAL, &err,
                    "exceeds a double");
    ck_assert(levels[0] == 7 && levels[1] == 7 && cost == 7);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(exact_equals_exhaustive_search),
    KVQ_CASE(exact_equals_all_cuts),
    KVQ_LOOP(exact_equals_the_quadratic_recursion, 12),
    KVQ_CASE(exact_never_costs_more_than_lloyd),
    KVQ_GOLDEN_CASE(exact_equals_the_reference),
    KVQ_CASE(huge_weights_do_not_hide_small_ones),
    KVQ_CASE(degenerate_samples_are_defined),
    KVQ_CASE(lloyd_handles_the_same_degenerate_samples),
    KVQ_CASE(bad_points_are_refused),
};
KVQ_TEST_MAIN("kmeans", CASES)
