// SPDX-License-Identifier: Apache-2.0
//
// One-dimensional weighted k-means, exactly. In one dimension an optimal cluster is a run of neighbours, so the problem
// is to cut the sorted points into k runs, and dynamic programming finds the global optimum: with cost(i, j) of the run
// of points i .. j-1 around its own mean,
//
//     best(m, j) = min over i of best(m-1, i) + cost(i, j)        best m runs of the first j points
//
// (Wang and Song, "Ckmeans.1d.dp", The R Journal 3/2, 2011). The best i never falls as j grows, because cost is concave
// Monge, so finding it for the middle j first bounds the search on both sides: O(n log n) per m instead of O(n^2). Nor
// does it fall as m grows, which bounds the search from below once more.
//
// Costs come from prefix sums of w, w y and w y^2 with y = x - the weighted mean. Weights span many decades, and beside
// a point of weight 10^15 a plain prefix sum would lose the others, so each sum is kept as an unevaluated pair of
// doubles (Knuth's two-sum): a difference of two prefixes is then as accurate as a sum over the run itself.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define SHORT_SCAN 12 // up to as many candidates, the usual case with many levels, a plain loop is faster
#define SCAN_CHUNK 64 // candidates whose costs are computed together, so that the compiler can vectorise them

// ---------------------------------------------------------------- the sample

typedef struct pair_sums {
    double *high, *low; // [n + 1] sum of the first i terms = high[i] + low[i]
} pair_sums;

// The distinct positions that carry weight, and their sums.
typedef struct sample {
    int64_t             n;
    kvq_weighted_point *points; // [n] strictly ascending, weights positive
    double              centre;
    pair_sums           w, wy, wyy;
} sample;
#define SAMPLE_DOUBLES(n) (2 * (n) + 6 * ((n) + 1))

static void append(pair_sums *sums, int64_t i, double term) {
    double high = sums->high[i], sum = high + term, shadow = sum - high;
    sums->low[i + 1] = sums->low[i] + ((high - (sum - shadow)) + (term - shadow));
    sums->high[i + 1] = sum;
}

static inline double between(const pair_sums *sums, int64_t i, int64_t j) {
    return (sums->high[j] - sums->high[i]) + (sums->low[j] - sums->low[i]);
}

static inline double run_cost(const sample *s, int64_t i, int64_t j) {
    double wy = between(&s->wy, i, j);
    double cost = between(&s->wyy, i, j) - wy * wy / between(&s->w, i, j);
    return cost > 0 ? cost : 0; // rounding may leave a trace below zero
}

static kvq_status check_points(const kvq_weighted_point *points, int64_t n, int k, kvq_error *err) {
    if (k < 1 || n < 0 || n >= INT32_MAX) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "k-means of %lld points with %d levels", (long long)n, k);
    }
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(points[i].x) || !isfinite(points[i].w) || points[i].w < 0) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "k-means: point %lld lies at %g and has weight %g",
                            (long long)i, points[i].x, points[i].w);
        }
        if (i > 0 && points[i].x < points[i - 1].x) {
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "k-means: points are not sorted, %g comes after %g", points[i].x,
                            points[i - 1].x);
        }
    }
    return KVQ_OK;
}

// Drops points without weight and joins points at one position; when no point has weight, each counts as 1.
static void gather_positions(sample *s, const kvq_weighted_point *points, int64_t n) {
    bool weighted = false;
    for (int64_t i = 0; i < n; i++) weighted = weighted || points[i].w != 0;
    for (int64_t i = 0; i < n; i++) {
        kvq_weighted_point p = {points[i].x, weighted ? points[i].w : 1};
        if (p.w == 0) continue;
        if (s->n > 0 && s->points[s->n - 1].x == p.x) {
            s->points[s->n - 1].w += p.w;
        } else {
            s->points[s->n++] = p;
        }
    }
}

static void sum_up(sample *s) {
    double w = 0, wx = 0;
    for (int64_t i = 0; i < s->n; i++) {
        w += s->points[i].w;
        wx += s->points[i].w * s->points[i].x;
    }
    s->centre = s->n > 0 ? wx / w : 0; // rounding does no harm: any shift is right, one near the mean cancels least
    for (int64_t i = 0; i < s->n; i++) {
        double y = s->points[i].x - s->centre, wy = s->points[i].w * y;
        append(&s->w, i, s->points[i].w);
        append(&s->wy, i, wy);
        append(&s->wyy, i, wy * y);
    }
}

// Lays the sample of n points out in memory [SAMPLE_DOUBLES(n)]; returns what is behind.
static double *sample_place(sample *s, double *memory, int64_t n) {
    pair_sums *sums[] = {&s->w, &s->wy, &s->wyy};
    s->n = 0;
    s->points = (kvq_weighted_point *)(void *)memory;
    memory += 2 * n;
    for (int i = 0; i < 3; i++) {
        sums[i]->high = memory;
        sums[i]->low = memory + (n + 1);
        sums[i]->high[0] = sums[i]->low[0] = 0;
        memory += 2 * (n + 1);
    }
    return memory;
}

// Whether the sums are finite.
static bool sample_take(sample *s, const kvq_weighted_point *points, int64_t n) {
    gather_positions(s, points, n);
    sum_up(s);
    return isfinite(s->w.high[s->n]) && isfinite(s->wyy.high[s->n]);
}

static kvq_status too_large(kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "k-means: the sum of weight times squared position exceeds a double");
}

// The mean of a run straight from its points: around a position inside the run nothing cancels.
static double run_mean(const kvq_weighted_point *run, int64_t n) {
    double w = 0, wy = 0;
    for (int64_t i = 0; i < n; i++) {
        w += run[i].w;
        wy += run[i].w * (run[i].x - run[0].x);
    }
    return run[0].x + wy / w;
}

double codebook_cost(const kvq_weighted_point *points, int64_t n, const double *levels, int k) {
    double cost = 0;
    int    j = 0;
    for (int64_t i = 0; i < n; i++) {
        while (j + 1 < k && points[i].x - levels[j] > levels[j + 1] - points[i].x) j++;
        double distance = points[i].x - levels[j];
        cost += points[i].w * distance * distance;
    }
    return cost;
}

// With no more positions than levels, the positions are the levels and the last one is repeated.
static void take_positions(const sample *s, int k, double *levels) {
    for (int j = 0; j < k; j++) levels[j] = s->n == 0 ? 0 : s->points[j < s->n ? j : s->n - 1].x;
}

// ---------------------------------------------------------------- the global optimum

// One step of the dynamic programme, from m - 1 runs to m.
typedef struct step {
    const sample  *s;
    const double  *previous; // [n + 1] best(m - 1, .)
    double        *current;  // [n + 1] best(m, .)
    int32_t       *split;    // [n + 1] start of the last run
    const int32_t *lowest;   // [n + 1] the same of the step before, NULL = none
} step;

// The best start of a last run that ends before j, among i_first .. i_last; the lowest on a tie.
static int64_t cheapest_of_few(const step *t, int64_t j, int64_t i_first, int64_t i_last, double *cost) {
    double  least = HUGE_VAL;
    int64_t best = i_first;
    for (int64_t i = i_first; i <= i_last; i++) {
        double candidate = t->previous[i] + run_cost(t->s, i, j);
        best = candidate < least ? i : best;
        least = candidate < least ? candidate : least;
    }
    *cost = least;
    return best;
}

static int64_t cheapest_start(const step *t, int64_t j, int64_t i_first, int64_t i_last, double *cost) {
    double  costs[SCAN_CHUNK];
    int64_t best = i_first;
    if (i_last - i_first < SHORT_SCAN) return cheapest_of_few(t, j, i_first, i_last, cost);
    *cost = HUGE_VAL;
    for (int64_t first = i_first; first <= i_last; first += SCAN_CHUNK) {
        int64_t n = i_last - first + 1 < SCAN_CHUNK ? i_last - first + 1 : SCAN_CHUNK;
        for (int64_t i = 0; i < n; i++) costs[i] = t->previous[first + i] + run_cost(t->s, first + i, j);
        for (int64_t i = 0; i < n; i++) {
            if (costs[i] < *cost) {
                *cost = costs[i];
                best = first + i;
            }
        }
    }
    return best;
}

// Fills current and split for j in [j_first, j_last], whose best starts are known to lie in [i_first, i_last].
// Recursion on the left half and iteration on the right one: the depth is log2 n.
static void fill(const step *t, int64_t j_first, int64_t j_last, int64_t i_first, int64_t i_last) {
    while (j_first <= j_last) {
        int64_t j = j_first + (j_last - j_first) / 2, lowest = t->lowest != NULL ? t->lowest[j] : 0;
        int64_t i =
            cheapest_start(t, j, i_first > lowest ? i_first : lowest, i_last < j - 1 ? i_last : j - 1, &t->current[j]);
        t->split[j] = (int32_t)i;
        fill(t, j_first, j - 1, i_first, i);
        j_first = j + 1;
        i_first = i;
    }
}

// best(m, .) for m up to the largest of ks [n_ks], all below n: splits [k - 1, n + 1] of the steps m = 2 .. k, costs
// [2, n + 1].
static void run_steps(const sample *s, const int *ks, int n_ks, double *costs, int32_t *splits) {
    double *previous = costs, *current = costs + (s->n + 1);
    int     k = ks[n_ks - 1], next = 0;
    for (int64_t j = 1; j <= s->n; j++) previous[j] = run_cost(s, 0, j);
    for (int m = 2; m <= k; m++) { // the first m-1 points cannot be m runs, later runs up to the next k need one each
        while (ks[next] < m) next++;
        int64_t  j_last = s->n - (ks[next] - m);
        int32_t *split = splits + (m - 2) * (s->n + 1);
        step     t = {s, previous, current, split, m > 2 ? split - (s->n + 1) : NULL};
        fill(&t, m == k ? s->n : m, j_last, m - 1, s->n - 1);
        for (int64_t j = j_last + 1; j <= s->n; j++) split[j] = 0; // no bound for the step that follows
        current = previous;
        previous = t.current;
    }
}

// The levels of k runs from the splits of all steps.
static void trace_back(const sample *s, int k, const int32_t *splits, double *levels) {
    int64_t end = s->n;
    for (int m = k; m >= 1; m--) {
        int64_t start = m > 1 ? splits[(m - 2) * (s->n + 1) + end] : 0;
        levels[m - 1] = run_mean(s->points + start, end - start);
        end = start;
    }
}

int64_t codebook_kmeans_scratch(int64_t n, int k) {
    int64_t steps = (k < n ? k : n) - 1;
    return SAMPLE_DOUBLES(n) + 2 * (n + 1) + (steps > 0 ? steps * (n + 1) / 2 + 1 : 0);
}

bool codebook_kmeans_many(const kvq_weighted_point *points, int64_t n, const int *ks, int n_ks, double *scratch,
                          double *levels, double *costs) {
    sample   s = {0};
    double  *step_costs = sample_place(&s, scratch, n);
    int32_t *splits = (int32_t *)(void *)(step_costs + 2 * (n + 1));
    int      n_cut = 0;
    if (!sample_take(&s, points, n)) return false;
    while (n_cut < n_ks && ks[n_cut] < s.n) n_cut++;
    if (n_cut > 0) run_steps(&s, ks, n_cut, step_costs, splits);
    for (int i = 0; i < n_ks; levels += ks[i++]) {
        if (i < n_cut) {
            trace_back(&s, ks[i], splits, levels);
        } else {
            take_positions(&s, ks[i], levels);
        }
        costs[i] = codebook_cost(s.points, s.n, levels, ks[i]);
    }
    return true;
}

kvq_status kvq_kmeans_exact(const kvq_context *ctx, const kvq_weighted_point *points, int64_t n, int k, double *levels,
                            double *cost, kvq_error *err) {
    kvq_status status = KVQ_OK;
    double    *scratch = NULL;
    KVQ_TRY(check_points(points, n, k, err));
    KVQ_TRY(KVQ_NEW(ctx, codebook_kmeans_scratch(n, k), "k-means", &scratch, err));
    if (!codebook_kmeans_many(points, n, &k, 1, scratch, levels, cost)) status = too_large(err);
done:
    kvq_free(ctx, scratch);
    return status;
}

// ---------------------------------------------------------------- Lloyd

// k-means++ (Arthur and Vassilvitskii 2007): each seed is drawn with probability proportional to weight times squared
// distance to the nearest seed so far, the first one by weight alone. `chance` [n] is scratch.
static void draw_seeds(const sample *s, int k, uint64_t seed, uint32_t start, double *chance, double *levels) {
    for (int64_t i = 0; i < s->n; i++) chance[i] = s->points[i].w;
    for (int drawn = 0; drawn < k; drawn++) {
        double total = 0;
        for (int64_t i = 0; i < s->n; i++) total += chance[i];
        double  target = kvq_rng_uniform(seed, KVQ_RNG_KMEANS, start, (uint64_t)drawn) * total;
        int64_t chosen = 0;
        for (double sum = chance[0]; chosen + 1 < s->n && sum <= target;) sum += chance[++chosen];
        int at = drawn;
        for (; at > 0 && levels[at - 1] > s->points[chosen].x; at--) levels[at] = levels[at - 1];
        levels[at] = s->points[chosen].x;
        for (int64_t i = 0; i < s->n; i++) {
            double distance = s->points[i].x - s->points[chosen].x, new_chance = s->points[i].w * distance * distance;
            if (drawn == 0 || new_chance < chance[i]) chance[i] = new_chance;
        }
    }
}

// The number of points that belong to levels below `middle`; a point in the middle belongs to the lower one.
static int64_t points_up_to(const sample *s, double middle) {
    int64_t low = 0, high = s->n;
    while (low < high) {
        int64_t at = low + (high - low) / 2;
        if (s->points[at].x <= middle)
            low = at + 1;
        else
            high = at;
    }
    return low;
}

// One round: ends [k] of the runs nearest to each level, and each level moved to the mean of its run (an empty one
// stays). Returns whether a run changed.
static bool lloyd_round(const sample *s, int k, int64_t *ends, double *levels) {
    bool moved = false;
    for (int j = 0; j < k; j++) {
        int64_t end = j + 1 < k ? points_up_to(s, levels[j] + (levels[j + 1] - levels[j]) / 2) : s->n;
        moved = moved || end != ends[j];
        ends[j] = end;
    }
    for (int j = 0; j < k; j++) {
        int64_t first = j > 0 ? ends[j - 1] : 0;
        if (ends[j] > first) levels[j] = s->centre + between(&s->wy, first, ends[j]) / between(&s->w, first, ends[j]);
    }
    return moved;
}

kvq_status kvq_kmeans_lloyd(const kvq_context *ctx, const kvq_weighted_point *points, int64_t n, int k, uint64_t seed,
                            int n_starts, int max_rounds, double *levels, double *cost, kvq_error *err) {
    kvq_status status = KVQ_OK;
    sample     s = {0};
    double    *memory = NULL, *chance = NULL, *candidate = NULL;
    int64_t   *ends = NULL;
    if (n_starts < 1) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "k-means with %d starts", n_starts);
    KVQ_TRY(check_points(points, n, k, err));
    KVQ_TRY(KVQ_NEW(ctx, SAMPLE_DOUBLES(n), "k-means sample", &memory, err));
    (void)sample_place(&s, memory, n);
    if (!sample_take(&s, points, n)) KVQ_TRY(too_large(err));
    KVQ_TRY(KVQ_NEW(ctx, s.n, "k-means chances", &chance, err));
    KVQ_TRY(KVQ_NEW(ctx, k, "k-means levels", &candidate, err));
    KVQ_TRY(KVQ_NEW(ctx, k, "k-means runs", &ends, err));
    double best = HUGE_VAL;
    for (int start = 0; start < n_starts; start++) {
        if (s.n <= k) {
            take_positions(&s, k, candidate);
        } else {
            draw_seeds(&s, k, seed, (uint32_t)start, chance, candidate);
            for (int j = 0; j < k; j++) ends[j] = -1;
            for (int round = 0; round < max_rounds && lloyd_round(&s, k, ends, candidate); round++) continue;
        }
        double found = codebook_cost(s.points, s.n, candidate, k);
        if (found >= best) continue;
        best = found;
        memcpy(levels, candidate, (size_t)k * sizeof *levels);
    }
    *cost = best;
done:
    kvq_free(ctx, ends);
    kvq_free(ctx, candidate);
    kvq_free(ctx, chance);
    kvq_free(ctx, memory);
    return status;
}
