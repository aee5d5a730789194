// SPDX-License-Identifier: Apache-2.0
//
// The case `fit` on points of the user's own: everything that turns normalised elements and their weights into a
// codebook, from counting to levels, as bench/kmeans_sklearn.py compares it with scikit-learn. The levels are rows too,
// so that the script can judge them on the points themselves.
#include <math.h>
#include <string.h>

#include "bench.h"

#define MIN_BITS  2
#define MAX_BITS  4
#define PER_ITEM  65536 // points that a thread counts at a time
#define CONVERTED 256   // weights to f64 at a time
#define WEIGHTING KVQ_WEIGHT_FISHER

typedef struct points {
    int64_t            n;
    float             *x, *w; // [n]
    int                n_parts;
    kvq_histogram     *parts[KVQ_MAX_THREADS]; // one for each thread
    kvq_distribution  *distribution;
    kvq_weighted_point sample[KVQ_HISTOGRAM_BINS];
    int64_t            n_sample;
} points;

static kvq_status read_points(const kvq_context *ctx, const char *path, points *p, kvq_error *err) {
    kvq_mapped_file file = {0};
    kvq_status      status = kvq_map_file(path, &file, err);
    if (status != KVQ_OK) return status;
    p->n = (int64_t)(file.bytes / (2 * sizeof(float)));
    if (p->n == 0 || file.bytes % (2 * sizeof(float)) != 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INPUT, "write pairs of f32: a position and its weight",
                         "%s: %lld bytes are no pairs of f32", path, (long long)file.bytes));
    }
    KVQ_TRY(KVQ_NEW(ctx, p->n, "points", &p->x, err));
    KVQ_TRY(KVQ_NEW(ctx, p->n, "weights of points", &p->w, err));
    for (int64_t i = 0; i < p->n; i++) {
        float pair[2];
        memcpy(pair, file.data + (size_t)i * sizeof pair, sizeof pair);
        p->x[i] = pair[0];
        p->w[i] = pair[1];
        if (isfinite(pair[0]) && pair[1] >= 0 && pair[1] < 0x1p15f) continue;
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s: point %lld is %g with weight %g", path, (long long)i,
                         (double)pair[0], (double)pair[1]));
    }
done:
    kvq_unmap_file(&file);
    return status;
}

// ---------------------------------------------------------------- what is measured

static void count_item(void *user, int64_t item, int worker) {
    points       *p = user;
    double        weights[CONVERTED];
    const double *lists[KVQ_N_WEIGHTINGS] = {NULL};
    int64_t       first = item * PER_ITEM, end = first + PER_ITEM < p->n ? first + PER_ITEM : p->n;
    lists[WEIGHTING] = weights;
    for (int64_t at = first; at < end; at += CONVERTED) {
        int64_t n = end - at < CONVERTED ? end - at : CONVERTED;
        for (int64_t i = 0; i < n; i++) weights[i] = (double)p->w[at + i];
        kvq_histogram_add(p->parts[worker], p->x + at, lists, n);
    }
}

// The occupied bins, in the precision in which measurements are stored.
static kvq_status count(const kvq_context *ctx, points *p, kvq_error *err) {
    for (int i = 0; i < p->n_parts; i++) kvq_histogram_clear(p->parts[i]);
    kvq_parallel_for(ctx, (p->n + PER_ITEM - 1) / PER_ITEM, count_item, p);
    for (int i = 1; i < p->n_parts; i++) kvq_histogram_merge(p->parts[0], p->parts[i]);
    kvq_status status = kvq_distribution_take(p->parts[0], p->distribution, err);
    if (status != KVQ_OK) return status;
    const kvq_weighted_bins *bins = &p->distribution->by[WEIGHTING];
    p->n_sample = 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        if (bins->w[i] > 0) p->sample[p->n_sample++] = (kvq_weighted_point){(double)bins->x[i], (double)bins->w[i]};
    }
    return KVQ_OK;
}

static kvq_status measure_width(bench_report *r, points *p, int bits, kvq_error *err) {
    const kvq_context *ctx = &r->cli->ctx;
    double             levels[1 << KVQ_MAX_BITS], cost;
    bench_series       counting = {.n = (int)r->options->repeats}, all = counting;
    kvq_status         status = KVQ_OK;
    for (int i = 0; i < all.n; i++) {
        double start = kvq_now_s();
        KVQ_TRY(count(ctx, p, err));
        counting.values[i] = kvq_now_s() - start;
        KVQ_TRY(kvq_kmeans_exact(ctx, p->sample, p->n_sample, 1 << bits, levels, &cost, err));
        all.values[i] = kvq_now_s() - start;
    }
    KVQ_TRY(bench_add(r, &all, "s", err, "codebook from points, %d bits", bits));
    KVQ_TRY(bench_add(r, &counting, "s", err, "of that counting, %d bits", bits));
    for (int j = 0; j < 1 << bits; j++) {
        bench_series level = {.values = {(double)(float)levels[j]}, .n = 1}; // as an artifact holds it
        KVQ_TRY(bench_add(r, &level, "normalised", err, "level %d, %d bits", j, bits));
    }
done:
    return status;
}

kvq_status bench_points(bench_report *r, kvq_error *err) {
    const kvq_context *ctx = &r->cli->ctx;
    points            *p = NULL;
    kvq_status         status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "benchmark", &p, err));
    KVQ_TRY(read_points(ctx, r->options->points, p, err));
    KVQ_TRY(kvq_distributions_create(ctx, 1u << WEIGHTING, 1, &p->distribution, err));
    for (; p->n_parts < ctx->n_threads && p->n_parts < KVQ_MAX_THREADS; p->n_parts++)
        KVQ_TRY(kvq_histogram_create(ctx, 1u << WEIGHTING, &p->parts[p->n_parts], err));
    int bits = (int)r->options->bits, last = bits > 0 ? bits : MAX_BITS;
    for (bits = bits > 0 ? bits : MIN_BITS; bits <= last; bits++) KVQ_TRY(measure_width(r, p, bits, err));
done:
    if (p != NULL) {
        for (int i = 0; i < p->n_parts; i++) kvq_histogram_destroy(ctx, &p->parts[i]);
        kvq_distributions_free(ctx, &p->distribution);
        kvq_free(ctx, p->x);
        kvq_free(ctx, p->w);
    }
    kvq_free(ctx, p);
    return status;
}
