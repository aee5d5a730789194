// SPDX-License-Identifier: Apache-2.0
//
// The case `fit`: how fast elements are counted into the histogram, and the exact codebook against the iteration that
// users know, on normal data whose weights span as many decades as Fisher weights do.
#include <math.h>
#include <stdio.h>

#include "bench.h"

#define ROWS         4096
#define HEADS        8
#define WIDTH        1024 // 8 heads x 128
#define OUTLIERS     0.01
#define MIN_BITS     2
#define MAX_BITS     4
#define LLOYD_STARTS 1 // as the public code of KVQuant runs it: one start from k-means++, 50 rounds at most
#define LLOYD_ROUNDS 50
#define WEIGHT_SIGMA 2.5 // of the natural logarithm: about 9 decades between the smallest and the largest of 10^6

typedef struct fit_data {
    float              *x, *w; // [ROWS, WIDTH]
    float               z[WIDTH], r[WIDTH];
    float              *scratch;
    kvq_histogram      *heads[HEADS];
    kvq_weighted_point *points; // [KVQ_HISTOGRAM_BINS]
    int64_t             n_points;
} fit_data;

// Two independent normal numbers from two uniform ones (Box and Muller 1958).
static void normal_pair(uint32_t stream, uint64_t index, double out[2]) {
    double radius = sqrt(-2 * log(1 - kvq_rng_uniform(0, KVQ_RNG_BENCH, stream, 2 * index)));
    double angle = 6.283185307179586 * kvq_rng_uniform(0, KVQ_RNG_BENCH, stream, 2 * index + 1);
    out[0] = radius * cos(angle);
    out[1] = radius * sin(angle);
}

static kvq_status make_data(bench_report *r, fit_data *f, kvq_error *err) {
    const kvq_context *ctx = &r->cli->ctx;
    kvq_status         status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)ROWS * WIDTH, "elements", &f->x, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)ROWS * WIDTH, "weights", &f->w, err));
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "points", &f->points, err));
    KVQ_TRY(KVQ_NEW(ctx, kvq_count_scratch_floats(ROWS, WIDTH), "normalised elements", &f->scratch, err));
    for (int h = 0; h < HEADS; h++) KVQ_TRY(kvq_histogram_create(ctx, KVQ_WEIGHTINGS_ALL, &f->heads[h], err));
    for (int64_t i = 0; i < (int64_t)ROWS * WIDTH; i++) {
        double pair[2];
        normal_pair(7, (uint64_t)i, pair);
        f->x[i] = (float)pair[0];
        f->w[i] = (float)(1e-6 * exp(WEIGHT_SIGMA * pair[1]));
    }
    for (int c = 0; c < WIDTH; c++) f->r[c] = 2.5758f; // 1% of a normal distribution lies outside

done:
    return status;
}

// ---------------------------------------------------------------- counting

static kvq_status measure_counting(bench_report *r, fit_data *f, bool is_k, kvq_error *err) {
    bench_series      rate = {.n = (int)r->options->repeats};
    kvq_context       alone = r->cli->ctx;
    kvq_count_options options = {.n_heads = HEADS};
    kvq_block_spec    spec = {.d = WIDTH, .bits = 3, .n_side = kvq_block_n_side(OUTLIERS, WIDTH)};
    if (is_k) {
        spec.z = f->z;
        spec.r = f->r;
    }
    kvq_count_tensor tensor = {is_k ? "K" : "V", &spec, f->x, f->w, f->heads};
    alone.n_threads = 1;
    for (int i = 0; i < rate.n; i++) {
        for (int h = 0; h < HEADS; h++) kvq_histogram_clear(f->heads[h]);
        double     start = kvq_now_s();
        kvq_status status = kvq_count_rows(&alone, &tensor, 1, ROWS, options, f->scratch, err);
        if (status != KVQ_OK) return status;
        rate.values[i] = (double)ROWS * WIDTH / (kvq_now_s() - start) * 1e-6;
    }
    return bench_add(r, &rate, "Melements/s", err, "count %s, one thread", is_k ? "K" : "V");
}

// ---------------------------------------------------------------- codebooks

// The occupied bins of what was counted last, as the fit sees them.
static void take_points(fit_data *f) {
    const kvq_bin *bins = f->heads[0]->by[KVQ_WEIGHT_FISHER_SCALED].bins;
    for (int h = 1; h < HEADS; h++) kvq_histogram_merge(f->heads[0], f->heads[h]);
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        double w = kvq_fixed_to_double(bins[i].w), wx = kvq_fixed_to_double(bins[i].wx);
        if (!(w > 0)) continue;
        kvq_weighted_point p = {wx / w, w};
        f->points[f->n_points++] = p;
    }
}

static kvq_status measure_codebook(bench_report *r, fit_data *f, int bits, kvq_error *err) {
    const kvq_context *ctx = &r->cli->ctx;
    double             levels[1 << MAX_BITS], exact_cost, lloyd_cost;
    bench_series       exact = {.n = (int)r->options->repeats}, lloyd = exact, cost = exact;
    kvq_status         status = KVQ_OK;
    for (int i = 0; i < exact.n; i++) {
        double start = kvq_now_s();
        KVQ_TRY(kvq_kmeans_exact(ctx, f->points, f->n_points, 1 << bits, levels, &exact_cost, err));
        exact.values[i] = kvq_now_s() - start;
        start = kvq_now_s();
        KVQ_TRY(kvq_kmeans_lloyd(ctx, f->points, f->n_points, 1 << bits, (uint64_t)i, LLOYD_STARTS, LLOYD_ROUNDS,
                                 levels, &lloyd_cost, err));
        lloyd.values[i] = kvq_now_s() - start;
        cost.values[i] = lloyd_cost / exact_cost;
    }
    bench_series ratio = bench_ratio(&exact, &lloyd, 1);
    KVQ_TRY(bench_add(r, &exact, "s", err, "exact k-means, %d bits", bits));
    KVQ_TRY(bench_add(r, &lloyd, "s", err, "Lloyd, %d bits", bits));
    KVQ_TRY(bench_add(r, &ratio, "x", err, "exact / Lloyd time, %d bits", bits));
    KVQ_TRY(bench_add(r, &cost, "x", err, "Lloyd / exact error, %d bits", bits));

done:
    return status;
}

kvq_status bench_fit(bench_report *r, kvq_error *err) {
    const kvq_context *ctx = &r->cli->ctx;
    kvq_status         status = KVQ_OK;
    fit_data          *f = NULL;
    if (r->options->points != NULL) return bench_points(r, err);
    KVQ_TRY(KVQ_NEW(ctx, 1, "benchmark", &f, err));
    KVQ_TRY(make_data(r, f, err));
    KVQ_TRY(measure_counting(r, f, false, err));
    KVQ_TRY(measure_counting(r, f, true, err));
    take_points(f);
    for (int bits = MIN_BITS; bits <= MAX_BITS; bits++) KVQ_TRY(measure_codebook(r, f, bits, err));

done:
    if (f != NULL) {
        for (int h = 0; h < HEADS; h++) kvq_histogram_destroy(ctx, &f->heads[h]);
        kvq_free(ctx, f->scratch);
        kvq_free(ctx, f->x);
        kvq_free(ctx, f->w);
        kvq_free(ctx, f->points);
    }
    kvq_free(ctx, f);
    return status;
}
