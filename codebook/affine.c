// SPDX-License-Identifier: Apache-2.0
//
// Affine tables: the channels of a width share the levels T and each has an offset z and a scale s, so that code j
// decodes to z + s T[j]. Found by turns: T is the exact one-dimensional k-means of all points (x - z) / s of the width
// together, with weights w s^2; then z and s of every channel are the weighted least squares for the codes that its
// points have. Either turn lowers the cost, but for what the pool's bins hide, so the best maps seen are kept. It
// starts from z = mean, s = deviation with the sign of the skewness: channels that lean the other way share a table.
//
// Here x is normalised by the channel's range, and w holds the square of that range. At the end z and s are rounded to
// f16 in the tensor's units and T is fitted once more, for the rounded maps.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define POOL_BINS    4096
#define MAX_ROUNDS   20
#define LEAST_GAIN   1e-4
#define DEGENERATE   1e-12 // of the determinant of least squares, relative
#define MAX_LEVELS   (1 << KVQ_MAX_KEY_WIDTH)
#define N_WIDTHS     (KVQ_MAX_KEY_WIDTH + 1)
#define FIRST_SHARED 2 // widths below are exact

// The channels of one width.
typedef struct affine_fit {
    const kvq_channel_distribution *channels;
    kvq_weighting                   weighting;
    kvq_tensor_quant               *k;
    int64_t                         d;
    int                             width;
    bool                            failed;
    double                         *z, *s, *best_z, *best_s; // [d], those of this width are used
    double                         *pool_w, *pool_wu;        // [POOL_BINS]
    kvq_weighted_point             *pool;                    // [POOL_BINS]
    double                         *kmeans;                  // scratch
    double                          levels[MAX_LEVELS];
} affine_fit;

// ---------------------------------------------------------------- maps

// Points of a channel with the weights that make errors those of the tensor.
static int64_t scaled_points(const affine_fit *f, int64_t c, kvq_weighted_point *points) {
    double  factor = codebook_channel_factor(f->weighting, f->k->lower[c], f->k->upper[c]);
    int64_t n = codebook_channel_points(f->channels, c, points);
    for (int64_t i = 0; i < n; i++) points[i].w *= factor;
    return n;
}

static void start_from_moments(const kvq_weighted_point *points, int64_t n, double *z, double *s) {
    double w = 0, mean = 0, square = 0, cube = 0;
    for (int64_t i = 0; i < n; i++) w += points[i].w;
    for (int64_t i = 0; i < n; i++) mean += points[i].w * points[i].x;
    mean = w > 0 ? mean / w : 0;
    for (int64_t i = 0; i < n; i++) {
        double y = points[i].x - mean;
        square += points[i].w * y * y;
        cube += points[i].w * y * y * y;
    }
    *z = mean;
    *s = w > 0 ? copysign(sqrt(square / w), cube) : 0;
}

// Two levels of the channel's own are z - s and z + s, one is z.
static void map_exactly(affine_fit *f, int64_t c, const kvq_weighted_point *points, int64_t n) {
    double levels[2] = {0}, cost;
    int    k = 1 << f->width;
    if (!codebook_kmeans_many(points, n, &k, 1, f->kmeans, levels, &cost)) f->failed = true;
    f->z[c] = k == 1 ? levels[0] : (levels[0] + levels[1]) / 2;
    f->s[c] = k == 1 ? 0 : (levels[1] - levels[0]) / 2;
}

// To f16 in the tensor's units, and back. A constant channel is its middle, and so is one whose map does not fit: the
// caller finds the infinite number.
static void round_map(affine_fit *f, int64_t c) {
    double middle = (double)kvq_range_middle(f->k->lower[c], f->k->upper[c]);
    double half = (double)kvq_range_half(f->k->lower[c], f->k->upper[c]);
    f->k->offset[c] = codebook_half(middle + half * f->z[c]);
    f->k->scale[c] = codebook_half(half * f->s[c]);
    bool fits = half > 0 && isfinite(f->k->offset[c]) && isfinite(f->k->scale[c]);
    f->z[c] = fits ? ((double)f->k->offset[c] - middle) / half : 0;
    f->s[c] = fits ? (double)f->k->scale[c] / half : 0;
}

// ---------------------------------------------------------------- the table

typedef struct span {
    double low, high;
} span;

static span pool_span(const affine_fit *f) {
    span r = {HUGE_VAL, -HUGE_VAL};
    for (int64_t c = 0; c < f->d; c++) {
        kvq_weighted_point points[KVQ_CHANNEL_BINS];
        if (f->k->widths[c] != f->width || f->s[c] == 0) continue;
        int64_t n = codebook_channel_points(f->channels, c, points);
        if (n == 0) continue;
        double first = (points[0].x - f->z[c]) / f->s[c], last = (points[n - 1].x - f->z[c]) / f->s[c];
        r.low = fmin(r.low, fmin(first, last));
        r.high = fmax(r.high, fmax(first, last));
    }
    return r;
}

static void pool_channel(affine_fit *f, int64_t c, span r) {
    kvq_weighted_point points[KVQ_CHANNEL_BINS];
    int64_t            n = scaled_points(f, c, points);
    double             per_unit = r.high > r.low ? POOL_BINS / (r.high - r.low) : 0;
    for (int64_t i = 0; i < n; i++) {
        double u = (points[i].x - f->z[c]) / f->s[c], w = points[i].w * f->s[c] * f->s[c];
        double at = (u - r.low) * per_unit;
        int    bin = at < POOL_BINS - 1 ? (int)at : POOL_BINS - 1;
        f->pool_w[bin] += w;
        f->pool_wu[bin] += w * u;
    }
}

// T for the maps as they are.
static void fit_table(affine_fit *f) {
    span    r = pool_span(f);
    int     k = 1 << f->width;
    int64_t n = 0;
    double  cost;
    memset(f->pool_w, 0, POOL_BINS * sizeof *f->pool_w);
    memset(f->pool_wu, 0, POOL_BINS * sizeof *f->pool_wu);
    for (int64_t c = 0; c < f->d; c++) {
        if (f->k->widths[c] == f->width && f->s[c] != 0) pool_channel(f, c, r);
    }
    for (int i = 0; i < POOL_BINS; i++) {
        if (f->pool_w[i] == 0) continue;
        double u = f->pool_wu[i] / f->pool_w[i];
        f->pool[n] = (kvq_weighted_point){n > 0 && u < f->pool[n - 1].x ? f->pool[n - 1].x : u, f->pool_w[i]};
        n++;
    }
    if (!codebook_kmeans_many(f->pool, n, &k, 1, f->kmeans, f->levels, &cost)) f->failed = true;
}

// ---------------------------------------------------------------- the maps

// Sums of w, w T, w T^2, w x, w x T over the points of a channel, T the level of a point.
typedef struct squares {
    double w, t, tt, x, xt, cost;
} squares;

// The levels of the channel ascend with the table or, for a negative scale, against it.
static squares sum_squares(const affine_fit *f, int64_t c, const kvq_weighted_point *points, int64_t n) {
    squares q = {0};
    double  t[MAX_LEVELS];
    int     k = 1 << f->width, j = 0;
    double  z = f->z[c], s = f->s[c];
    for (int i = 0; i < k; i++) t[i] = f->levels[s < 0 ? k - 1 - i : i];
    for (int64_t i = 0; i < n; i++) {
        double x = points[i].x, w = points[i].w;
        while (j + 1 < k && x - (z + s * t[j]) > z + s * t[j + 1] - x) j++;
        double error = x - (z + s * t[j]);
        q.cost += w * error * error;
        q.w += w;
        q.t += w * t[j];
        q.tt += w * t[j] * t[j];
        q.x += w * x;
        q.xt += w * x * t[j];
    }
    return q;
}

// Where all points have one code the scale says nothing and stays.
static void solve(const squares *q, double *z, double *s) {
    double determinant = q->w * q->tt - q->t * q->t;
    if (!(q->w > 0)) return;
    if (determinant > DEGENERATE * q->w * q->tt) *s = (q->w * q->xt - q->t * q->x) / determinant;
    *z = (q->x - *s * q->t) / q->w;
}

static void keep_best(affine_fit *f) {
    memcpy(f->best_z, f->z, (size_t)f->d * sizeof *f->z);
    memcpy(f->best_s, f->s, (size_t)f->d * sizeof *f->s);
}

// The cost of the maps as they are, which are then kept when it is the least so far and moved to those that fit best.
static double improve_maps(affine_fit *f, double least) {
    double cost = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1 && cost < least) keep_best(f);
        for (int64_t c = 0; c < f->d; c++) {
            kvq_weighted_point points[KVQ_CHANNEL_BINS];
            if (f->k->widths[c] != f->width) continue;
            int64_t n = scaled_points(f, c, points);
            squares q = sum_squares(f, c, points, n);
            if (pass == 0) {
                cost += q.cost;
            } else if (f->s[c] != 0) {
                solve(&q, &f->z[c], &f->s[c]);
            }
        }
    }
    return cost;
}

static void fit_by_turns(affine_fit *f) {
    double least = HUGE_VAL;
    for (int round = 0; round < MAX_ROUNDS; round++) {
        fit_table(f);
        double cost = improve_maps(f, least);
        bool   gained = cost < least * (1 - LEAST_GAIN);
        least = fmin(least, cost);
        if (!gained) break;
    }
    memcpy(f->z, f->best_z, (size_t)f->d * sizeof *f->z);
    memcpy(f->s, f->best_s, (size_t)f->d * sizeof *f->s);
}

// ---------------------------------------------------------------- all widths

static void fit_width(void *user, int64_t width, int worker) {
    affine_fit *f = (affine_fit *)user + width;
    float      *table = f->k->key_levels + codebook_affine_table(f->width);
    bool        used = false;
    (void)worker;
    for (int64_t c = 0; c < f->d; c++) {
        kvq_weighted_point points[KVQ_CHANNEL_BINS];
        if (f->k->widths[c] != f->width) continue;
        int64_t n = codebook_channel_points(f->channels, c, points);
        used = true;
        if (f->width < FIRST_SHARED) {
            map_exactly(f, c, points, n);
        } else {
            start_from_moments(points, n, &f->z[c], &f->s[c]);
        }
    }
    if (!used) return; // the table stays 0
    if (f->width >= FIRST_SHARED) fit_by_turns(f);
    for (int64_t c = 0; c < f->d; c++) {
        if (f->k->widths[c] == f->width) round_map(f, c);
    }
    if (f->width >= FIRST_SHARED) fit_table(f);
    for (int j = 0; j < 1 << f->width; j++) { // of those that are exact 0, or -1 and 1
        table[j] = f->width >= FIRST_SHARED ? codebook_half(f->levels[j]) : (float)(2 * j - f->width);
    }
}

static kvq_status make_fit(const kvq_context *ctx, affine_fit *f, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, f->d, "offsets", &f->z, err));
    KVQ_TRY(KVQ_NEW(ctx, f->d, "scales", &f->s, err));
    KVQ_TRY(KVQ_NEW(ctx, f->d, "best offsets", &f->best_z, err));
    KVQ_TRY(KVQ_NEW(ctx, f->d, "best scales", &f->best_s, err));
    KVQ_TRY(KVQ_NEW(ctx, POOL_BINS, "pool of channels", &f->pool_w, err));
    KVQ_TRY(KVQ_NEW(ctx, POOL_BINS, "pool of channels", &f->pool_wu, err));
    KVQ_TRY(KVQ_NEW(ctx, POOL_BINS, "pool of channels", &f->pool, err));
    KVQ_TRY(KVQ_NEW(ctx, codebook_kmeans_scratch(POOL_BINS, 1 << f->width), "k-means of a pool", &f->kmeans, err));
done:
    return status;
}

static void free_fit(const kvq_context *ctx, affine_fit *f) {
    void *owned[] = {f->z, f->s, f->best_z, f->best_s, f->pool_w, f->pool_wu, f->pool, f->kmeans};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) kvq_free(ctx, owned[i]);
}

kvq_status codebook_fit_affine(const kvq_context *ctx, const kvq_channel_distribution *channels,
                               kvq_weighting weighting, int64_t d, kvq_tensor_quant *k, kvq_error *err) {
    kvq_status status = KVQ_OK;
    affine_fit fits[N_WIDTHS] = {{.channels = NULL}};
    for (int width = 0; width < N_WIDTHS; width++) {
        fits[width] = (affine_fit){.channels = channels, .weighting = weighting, .k = k, .d = d, .width = width};
        KVQ_TRY(make_fit(ctx, &fits[width], err));
    }
    kvq_parallel_for(ctx, N_WIDTHS, fit_width, fits);
    for (int width = 0; width < N_WIDTHS; width++) {
        if (!fits[width].failed) continue;
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NUMERICAL, "measure again, or use tables per channel",
                         "the statistics of keys of %d bits are not finite", width));
    }
done:
    for (int width = 0; width < N_WIDTHS; width++) free_fit(ctx, &fits[width]);
    return status;
}
