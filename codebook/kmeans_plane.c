// SPDX-License-Identifier: Apache-2.0
//
// Weighted k-means in the plane: k-means++ and Lloyd's iteration. Nearest levels are searched for a block of points
// with the levels outside, so that a compiler vectorises, and only among the levels that can be nearest to a point of
// the block: with a box around it, a level is passed over when its distance to the box exceeds what the farthest corner
// has to some other level. Points that come row by row have small boxes, and few of 256 levels are left.
//
// Distances are f32 and sums f64 in the order of the points: the same bits everywhere and on any number of threads,
// of which each runs whole starts.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define BLOCK      32
#define N_STARTS   3
#define MAX_ROUNDS 50
#define SLACK      1.0001f // on the bound, for the rounding of f32

typedef struct box {
    float x_low, x_high, y_low, y_high;
} box;

// Points that carry weight, filled up to whole blocks with copies of the last one that weigh nothing.
typedef struct plane {
    int64_t n, n_blocks;
    float  *w, *x, *y; // [n_blocks * BLOCK]
    box    *boxes;     // [n_blocks]
} plane;

// What one thread needs.
typedef struct worker_scratch {
    double *chance;   // [n]
    int    *codes;    // [n]
    double *sums;     // [k, 3] w, wx, wy of each level
    float  *nearby;   // [k, 2] levels that may be nearest to a block, ...
    int    *indices;  // [k] ... which they are, ...
    float  *distance; // [k] ... and how near each level comes to its box
} worker_scratch;

// ---------------------------------------------------------------- points

static box box_of(const float *x, const float *y) {
    box b = {x[0], x[0], y[0], y[0]};
    for (int j = 1; j < BLOCK; j++) {
        b.x_low = x[j] < b.x_low ? x[j] : b.x_low;
        b.x_high = x[j] > b.x_high ? x[j] : b.x_high;
        b.y_low = y[j] < b.y_low ? y[j] : b.y_low;
        b.y_high = y[j] > b.y_high ? y[j] : b.y_high;
    }
    return b;
}

static kvq_status check_points(const float *w, const float *x, const float *y, int64_t n, kvq_error *err) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(w[i]) || w[i] < 0 || !isfinite(x[i]) || !isfinite(y[i])) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "k-means: point %lld lies at (%g, %g) and has weight %g",
                            (long long)i, (double)x[i], (double)y[i], (double)w[i]);
        }
    }
    return KVQ_OK;
}

static void plane_free(const kvq_context *ctx, plane *p) {
    kvq_free(ctx, p->w);
    kvq_free(ctx, p->boxes);
}

// When no point has weight each counts as 1, as in one dimension. `p` must be zero.
static kvq_status plane_init(const kvq_context *ctx, const float *w, const float *x, const float *y, int64_t n,
                             plane *p, kvq_error *err) {
    kvq_status status = KVQ_OK;
    bool       weighted = false;
    int64_t    padded = (n + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t i = 0; i < n; i++) weighted = weighted || w[i] > 0;
    KVQ_TRY(KVQ_NEW(ctx, 3 * padded, "points of k-means", &p->w, err));
    p->x = p->w + padded;
    p->y = p->x + padded;
    for (int64_t i = 0; i < n; i++) {
        if (weighted && !(w[i] > 0)) continue;
        p->w[p->n] = weighted ? w[i] : 1.0f;
        p->x[p->n] = x[i];
        p->y[p->n++] = y[i];
    }
    p->n_blocks = (p->n + BLOCK - 1) / BLOCK;
    for (int64_t i = p->n; i < p->n_blocks * BLOCK; i++) {
        p->w[i] = 0;
        p->x[i] = p->x[p->n - 1];
        p->y[i] = p->y[p->n - 1];
    }
    KVQ_TRY(KVQ_NEW(ctx, p->n_blocks, "boxes of k-means", &p->boxes, err));
    for (int64_t b = 0; b < p->n_blocks; b++) p->boxes[b] = box_of(p->x + b * BLOCK, p->y + b * BLOCK);
done:
    return status;
}

// ---------------------------------------------------------------- nearest levels

static inline float squared(float dx, float dy) { return dx * dx + dy * dy; }

// Levels that can be nearest to a point of a block, in their order, so that ties go to the lowest as without the box.
static int find_nearby(box b, const float *levels, int k, const worker_scratch *s) {
    float reach = HUGE_VALF;
    int   n = 0;
    for (int j = 0; j < k; j++) {
        float x = levels[2 * j], y = levels[2 * j + 1];
        float left = b.x_low - x, right = x - b.x_high, below = b.y_low - y, above = y - b.y_high;
        float dx = left > right ? left : right, dy = below > above ? below : above;
        float far_x = -left > -right ? -left : -right, far_y = -below > -above ? -below : -above;
        float farthest = squared(far_x, far_y);
        s->distance[j] = squared(dx > 0 ? dx : 0.0f, dy > 0 ? dy : 0.0f);
        reach = farthest < reach ? farthest : reach;
    }
    reach *= SLACK;
    for (int j = 0; j < k; j++) {
        s->nearby[2 * n] = levels[2 * j];
        s->nearby[2 * n + 1] = levels[2 * j + 1];
        s->indices[n] = j;
        n += s->distance[j] <= reach;
    }
    return n;
}

// Codes and squared distances of the points of a block.
static void nearest(const plane *p, int64_t block, const float *levels, int k, const worker_scratch *s, int *codes,
                    float *distances) {
    const float *x = p->x + block * BLOCK, *y = p->y + block * BLOCK;
    int          n = find_nearby(p->boxes[block], levels, k, s), best[BLOCK] = {0};
    float        least[BLOCK];
    for (int i = 0; i < BLOCK; i++) least[i] = squared(x[i] - s->nearby[0], y[i] - s->nearby[1]);
    for (int j = 1; j < n; j++) {
        float at_x = s->nearby[2 * j], at_y = s->nearby[2 * j + 1];
        for (int i = 0; i < BLOCK; i++) {
            float distance = squared(x[i] - at_x, y[i] - at_y);
            best[i] = distance < least[i] ? j : best[i];
            least[i] = distance < least[i] ? distance : least[i];
        }
    }
    for (int i = 0; i < BLOCK; i++) codes[i] = s->indices[best[i]];
    memcpy(distances, least, sizeof least);
}

static double plane_cost(const plane *p, const float *levels, int k, const worker_scratch *s) {
    double cost = 0;
    for (int64_t b = 0; b < p->n_blocks; b++) {
        int   codes[BLOCK];
        float distances[BLOCK];
        nearest(p, b, levels, k, s, codes, distances);
        for (int i = 0; i < BLOCK; i++) cost += (double)p->w[b * BLOCK + i] * (double)distances[i];
    }
    return cost;
}

// ---------------------------------------------------------------- one start

// k-means++ (Arthur and Vassilvitskii 2007). When every point lies on a level the last level is repeated.
static void draw_levels(const plane *p, int k, uint64_t seed, uint32_t start, double *chance, float *levels) {
    for (int64_t i = 0; i < p->n; i++) chance[i] = (double)p->w[i];
    for (int drawn = 0; drawn < k; drawn++) {
        double  total = 0, sum = chance[0];
        int64_t chosen = 0;
        for (int64_t i = 0; i < p->n; i++) total += chance[i];
        double target = kvq_rng_uniform(seed, KVQ_RNG_KMEANS, start, (uint64_t)drawn) * total;
        while (chosen + 1 < p->n && sum <= target) sum += chance[++chosen];
        for (; chosen > 0 && !(chance[chosen] > 0); chosen--) continue; // rounding may run past the last chance
        if (drawn > 0 && !(total > 0)) {
            memcpy(levels + 2 * (int64_t)drawn, levels + 2 * ((int64_t)drawn - 1), 2 * sizeof *levels);
            continue;
        }
        double x = (double)p->x[chosen], y = (double)p->y[chosen];
        levels[2 * drawn] = p->x[chosen];
        levels[2 * drawn + 1] = p->y[chosen];
        for (int64_t i = 0; i < p->n; i++) {
            double dx = (double)p->x[i] - x, dy = (double)p->y[i] - y;
            double next = (double)p->w[i] * (dx * dx + dy * dy);
            chance[i] = drawn == 0 || next < chance[i] ? next : chance[i];
        }
    }
}

// Moves each level to the mean of the points nearest to it; one without points stays. Returns whether a point has
// another level than before.
static bool lloyd_round(const plane *p, int k, const worker_scratch *s, float *levels) {
    bool moved = false;
    memset(s->sums, 0, 3 * (size_t)k * sizeof *s->sums);
    for (int64_t b = 0; b < p->n_blocks; b++) {
        int   codes[BLOCK], *before = s->codes + b * BLOCK;
        float distances[BLOCK];
        nearest(p, b, levels, k, s, codes, distances);
        moved = moved || memcmp(codes, before, sizeof codes) != 0;
        memcpy(before, codes, sizeof codes);
        for (int i = 0; i < BLOCK; i++) {
            int64_t at = b * BLOCK + i;
            double *sum = s->sums + 3 * (int64_t)codes[i], w = (double)p->w[at];
            sum[0] += w;
            sum[1] += w * (double)p->x[at];
            sum[2] += w * (double)p->y[at];
        }
    }
    for (int j = 0; j < k && moved; j++) {
        const double *sum = s->sums + 3 * (int64_t)j;
        if (!(sum[0] > 0)) continue;
        levels[2 * j] = (float)(sum[1] / sum[0]);
        levels[2 * j + 1] = (float)(sum[2] / sum[0]);
    }
    return moved;
}

// ---------------------------------------------------------------- all starts of all tables

typedef struct fit_run {
    const plane    *p;
    const int      *ks;
    int             n_tables;
    uint64_t        seed;
    bool            half;
    worker_scratch *workers;
    float         **levels; // [n_tables * N_STARTS]
    double         *costs;  // the same
} fit_run;

// The largest tables first, for threads wait for the last item.
static void run_start(void *user, int64_t item, int worker) {
    const fit_run        *r = user;
    int                   table = r->n_tables - 1 - (int)(item / N_STARTS), start = (int)(item % N_STARTS);
    int                   at = table * N_STARTS + start, k = r->ks[table];
    const worker_scratch *s = &r->workers[worker];
    float                *levels = r->levels[at];
    if (r->p->n == 0) return; // levels and cost are 0
    draw_levels(r->p, k, r->seed, (uint32_t)start, s->chance, levels);
    memset(s->codes, -1, (size_t)(r->p->n_blocks * BLOCK) * sizeof *s->codes);
    for (int round = 0; round < MAX_ROUNDS && lloyd_round(r->p, k, s, levels); round++) continue;
    for (int j = 0; j < 2 * k && r->half; j++) levels[j] = kvq_float_of_half(kvq_half_of_float(levels[j]));
    r->costs[at] = plane_cost(r->p, levels, k, s);
}

static kvq_status make_worker(const kvq_context *ctx, const plane *p, int k, worker_scratch *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, p->n, "k-means chances", &s->chance, err));
    KVQ_TRY(KVQ_NEW(ctx, p->n_blocks * BLOCK, "k-means codes", &s->codes, err));
    KVQ_TRY(KVQ_NEW(ctx, 3 * (int64_t)k, "k-means sums", &s->sums, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * (int64_t)k, "k-means levels nearby", &s->nearby, err));
    KVQ_TRY(KVQ_NEW(ctx, k, "k-means levels nearby", &s->indices, err));
    KVQ_TRY(KVQ_NEW(ctx, k, "k-means distances", &s->distance, err));
done:
    return status;
}

static void free_worker(const kvq_context *ctx, worker_scratch *s) {
    kvq_free(ctx, s->chance);
    kvq_free(ctx, s->codes);
    kvq_free(ctx, s->sums);
    kvq_free(ctx, s->nearby);
    kvq_free(ctx, s->indices);
    kvq_free(ctx, s->distance);
}

static kvq_status make_run(const kvq_context *ctx, int n_workers, fit_run *r, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, n_workers, "k-means threads", &r->workers, err));
    KVQ_TRY(KVQ_NEW(ctx, r->n_tables * N_STARTS, "k-means starts", &r->levels, err));
    KVQ_TRY(KVQ_NEW(ctx, r->n_tables * N_STARTS, "k-means costs", &r->costs, err));
    for (int i = 0; i < n_workers; i++) KVQ_TRY(make_worker(ctx, r->p, r->ks[r->n_tables - 1], &r->workers[i], err));
    for (int i = 0; i < r->n_tables * N_STARTS; i++) {
        KVQ_TRY(KVQ_NEW(ctx, 2 * (int64_t)r->ks[i / N_STARTS], "k-means levels", &r->levels[i], err));
    }
done:
    return status;
}

static void free_run(const kvq_context *ctx, int n_workers, fit_run *r) {
    for (int i = 0; i < n_workers && r->workers != NULL; i++) free_worker(ctx, &r->workers[i]);
    for (int i = 0; i < r->n_tables * N_STARTS && r->levels != NULL; i++) kvq_free(ctx, r->levels[i]);
    kvq_free(ctx, r->workers);
    kvq_free(ctx, r->levels);
    kvq_free(ctx, r->costs);
}

kvq_status codebook_plane_tables(const kvq_context *ctx, const float *w, const float *x, const float *y, int64_t n,
                                 const int *ks, int n_tables, uint64_t seed, bool half, float *levels, double *costs,
                                 kvq_error *err) {
    kvq_status status = KVQ_OK;
    plane      p = {0};
    fit_run    r = {&p, ks, n_tables, seed, half, NULL, NULL, NULL};
    int        n_workers = ctx->n_threads < n_tables * N_STARTS ? ctx->n_threads : n_tables * N_STARTS;
    KVQ_TRY(check_points(w, x, y, n, err));
    KVQ_TRY(plane_init(ctx, w, x, y, n, &p, err));
    KVQ_TRY(make_run(ctx, n_workers, &r, err));
    kvq_parallel_for(ctx, (int64_t)n_tables * N_STARTS, run_start, &r);
    for (int t = 0; t < n_tables; levels += 2 * (int64_t)ks[t++]) {
        int best = t * N_STARTS;
        for (int i = best + 1; i < (t + 1) * N_STARTS; i++) best = r.costs[i] < r.costs[best] ? i : best;
        memcpy(levels, r.levels[best], 2 * (size_t)ks[t] * sizeof *levels);
        costs[t] = r.costs[best];
    }
done:
    free_run(ctx, n_workers, &r);
    plane_free(ctx, &p);
    return status;
}

kvq_status kvq_kmeans_plane(const kvq_context *ctx, const float *w, const float *x, const float *y, int64_t n,
                            int n_levels, uint64_t seed, float *levels, double *cost, kvq_error *err) {
    if (n_levels < 1 || n < 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "k-means of %lld points with %d levels", (long long)n, n_levels);
    }
    return codebook_plane_tables(ctx, w, x, y, n, &n_levels, 1, seed, false, levels, cost, err);
}
