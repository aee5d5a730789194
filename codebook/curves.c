// SPDX-License-Identifier: Apache-2.0
//
// What each width of a channel of K, and each rate of the values, would cost in error: all that the allocation of bits
// needs to know of a layer.
//
// Units. Bins hold normalised positions x' = (x - z) / r and weights w. An error e' of a channel is r e' in the
// tensor's units, so sums of w e'^2 get a factor r^2 where the weights do not contain it. Values have a scale of their
// own in every token; where the weights do not contain its square their errors stay in units of the scale.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define VALUE_SEED 0 // of k-means: the same data must give the same table in whatever layer

static const int KEY_LEVELS[KVQ_MAX_KEY_WIDTH + 1] = {1, 2, 4, 8, 16, 32};

// ---------------------------------------------------------------- what was measured

kvq_status codebook_find_allocated(const kvq_measured_layer *measured, const kvq_measure_options *measure,
                                   const kvq_alloc_options *options, int *fraction, kvq_error *err) {
    int f = kvq_measured_fraction(measure, options->outlier_fraction);
    if (f < 0 || measured->k[f].channels.w == NULL || measured->rotated.w == NULL) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL,
                        "outliers of %g were not measured for the channel-allocated format", options->outlier_fraction);
    }
    *fraction = f;
    return KVQ_OK;
}

// ---------------------------------------------------------------- channels

double codebook_channel_factor(kvq_weighting weighting, float lower, float upper) {
    double half = (double)kvq_range_half(lower, upper);
    return weighting == KVQ_WEIGHT_FISHER_SCALED || weighting == KVQ_WEIGHT_RANGE ? 1 : half * half;
}

// Means of neighbouring bins, rounded, may cross.
static int64_t points_of(const float *w, const float *x, int n_bins, kvq_weighted_point *points) {
    int64_t n = 0;
    for (int i = 0; i < n_bins; i++) {
        if (w[i] == 0) continue;
        double at = (double)x[i];
        if (n > 0 && at < points[n - 1].x) at = points[n - 1].x;
        points[n++] = (kvq_weighted_point){at, (double)w[i]};
    }
    return n;
}

int64_t codebook_channel_points(const kvq_channel_distribution *channels, int64_t c, kvq_weighted_point *points) {
    int64_t first = c * KVQ_CHANNEL_BINS;
    return points_of(channels->w + first, channels->x + first, KVQ_CHANNEL_BINS, points);
}

kvq_status codebook_channel_scratch_create(const kvq_context *ctx, codebook_channel_scratch *out, kvq_error *err) {
    int n_workers = ctx->n_threads < KVQ_MAX_THREADS ? ctx->n_threads : KVQ_MAX_THREADS;
    out->stride = 2 * KVQ_CHANNEL_BINS + codebook_kmeans_scratch(KVQ_CHANNEL_BINS, 1 << KVQ_MAX_KEY_WIDTH);
    return KVQ_NEW(ctx, n_workers * out->stride, "k-means of channels", &out->memory, err);
}

bool codebook_channel_tables(const kvq_channel_distribution *channels, int64_t c, const int *ks, int n_ks,
                             const codebook_channel_scratch *scratch, int worker, double *levels, double *costs) {
    double             *memory = scratch->memory + worker * scratch->stride;
    kvq_weighted_point *points = (kvq_weighted_point *)(void *)memory;
    int64_t             n = codebook_channel_points(channels, c, points);
    return codebook_kmeans_many(points, n, ks, n_ks, memory + 2 * KVQ_CHANNEL_BINS, levels, costs);
}

typedef struct key_curves {
    const kvq_measured_tensor *measured;
    kvq_weighting              weighting;
    codebook_channel_scratch   scratch;
    double                    *k; // [d, KVQ_MAX_KEY_WIDTH + 1]
} key_curves;

// A curve that is not finite is left for the caller to find. More levels never cost more, but for rounding.
static void channel_curve(void *user, int64_t c, int worker) {
    const key_curves *r = user;
    double           *curve = r->k + c * (KVQ_MAX_KEY_WIDTH + 1), levels[2 << KVQ_MAX_KEY_WIDTH];
    double            factor = codebook_channel_factor(r->weighting, r->measured->lower[c], r->measured->upper[c]);
    if (!codebook_channel_tables(&r->measured->channels, c, KEY_LEVELS, KVQ_MAX_KEY_WIDTH + 1, &r->scratch, worker,
                                 levels, curve)) {
        curve[0] = NAN;
        return;
    }
    for (int b = 0; b <= KVQ_MAX_KEY_WIDTH; b++) {
        curve[b] = factor * (curve[b] + r->measured->channels.scatter[c]);
        if (b > 0 && curve[b] > curve[b - 1]) curve[b] = curve[b - 1];
    }
}

static kvq_status make_key_curves(const kvq_context *ctx, const kvq_measured_tensor *measured, kvq_weighting weighting,
                                  int64_t d, double *k, kvq_error *err) {
    kvq_status status = KVQ_OK;
    key_curves r = {.measured = measured, .weighting = weighting, .k = k};
    KVQ_TRY(codebook_channel_scratch_create(ctx, &r.scratch, err));
    kvq_parallel_for(ctx, d, channel_curve, &r);
    for (int64_t c = 0; c < d; c++) {
        if (isfinite(k[c * (KVQ_MAX_KEY_WIDTH + 1)])) continue;
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NUMERICAL, "measure again", "the statistics of channel %lld of K are not finite",
                         (long long)c));
    }
done:
    kvq_free(ctx, r.scratch.memory);
    return status;
}

// ---------------------------------------------------------------- values

static bool any_weight(const float *w, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (w[i] > 0) return true;
    }
    return false;
}

// All numbers of levels in one run; costs are those of the levels as they are stored.
static kvq_status line_tables(const kvq_context *ctx, const kvq_value_distribution *v, const int *ks, int n_tables,
                              float *levels, double *costs, kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_weighted_point *points = NULL;
    double             *scratch = NULL, *exact = NULL;
    int64_t             n, n_levels = 0;
    for (int t = 0; t < n_tables; t++) n_levels += ks[t];
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "points of values", &points, err));
    n = points_of(v->w, v->x, KVQ_HISTOGRAM_BINS, points);
    KVQ_TRY(KVQ_NEW(ctx, codebook_kmeans_scratch(n, ks[n_tables - 1]), "k-means of values", &scratch, err));
    KVQ_TRY(KVQ_NEW(ctx, n_levels, "levels of values", &exact, err));
    if (!codebook_kmeans_many(points, n, ks, n_tables, scratch, exact, costs)) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NUMERICAL, "measure again", "the statistics of V are not finite"));
    }
    for (int64_t j = 0; j < n_levels; j++) exact[j] = (double)(levels[j] = codebook_half(exact[j]));
    for (int64_t t = 0, at = 0; t < n_tables; at += ks[t++]) costs[t] = codebook_cost(points, n, exact + at, ks[t]);
done:
    kvq_free(ctx, exact);
    kvq_free(ctx, scratch);
    kvq_free(ctx, points);
    return status;
}

kvq_status codebook_value_tables(const kvq_context *ctx, const kvq_value_distribution *v, int dim, const int *rates,
                                 int n_tables, float *levels, double *errors, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int        ks[KVQ_TILE_MAX_WIDTH + 1];
    int64_t    n_cells = (int64_t)KVQ_PAIR_CELLS * KVQ_PAIR_CELLS;
    for (int t = 0; t < n_tables; t++) ks[t] = 1 << rates[t];
    if (dim == 1) {
        KVQ_TRY(line_tables(ctx, v, ks, n_tables, levels, errors, err));
    } else { // without any weight there are no points, and all levels are 0
        KVQ_TRY(codebook_plane_tables(ctx, v->pair_w, v->pair_x, v->pair_y,
                                      any_weight(v->pair_w, n_cells) ? n_cells : 0, ks, n_tables, VALUE_SEED, true,
                                      levels, errors, err));
    }
    for (int t = 0; t < n_tables; t++) errors[t] += v->scatter[dim - 1];
done:
    return status;
}

// Errors per rate of the set `wanted`; those of other rates are left alone.
static kvq_status value_errors(const kvq_context *ctx, const kvq_value_distribution *v, int dim, unsigned wanted,
                               double *errors, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int        rates[KVQ_TILE_MAX_WIDTH + 1], n = 0;
    double     found[KVQ_TILE_MAX_WIDTH + 1];
    float     *levels = NULL;
    for (int rate = 0; rate <= KVQ_TILE_MAX_WIDTH; rate++) {
        if ((wanted >> rate & 1u) != 0) rates[n++] = rate;
    }
    KVQ_TRY(KVQ_NEW(ctx, 2 * (2 << KVQ_TILE_MAX_WIDTH), "levels of values", &levels, err));
    KVQ_TRY(codebook_value_tables(ctx, v, dim, rates, n, levels, found, err));
    for (int i = 0; i < n; i++) errors[rates[i]] = found[i];
done:
    kvq_free(ctx, levels);
    return status;
}

// ---------------------------------------------------------------- reference

// What the reference allocation costs: a budget in bits alone needs no more than the shape of an artifact.
static kvq_status reference_errors(const kvq_context *ctx, const kvq_measured_layer *measured,
                                   const kvq_layer_curves *pairs, double reference[2], kvq_error *err) {
    kvq_status        status = KVQ_OK;
    kvq_alloc_options options = kvq_reference_allocation();
    kvq_artifact      shape = {.model = {.n_layers = 1}};
    kvq_allocation    allocation = {.widths = NULL};
    shape.model.n_kv_heads = measured->n_kv_heads;
    shape.model.head_dim = measured->head_dim;
    KVQ_TRY(kvq_allocate(ctx, &shape, pairs, &options, &allocation, err));
    reference[0] = allocation.chosen.k_loss;
    reference[1] = allocation.chosen.v_loss;
done:
    kvq_allocation_free(ctx, &allocation);
    return status;
}

kvq_status kvq_layer_curves_make(const kvq_context *ctx, const kvq_measured_layer *measured,
                                 const kvq_measure_options *measure, const kvq_alloc_options *options,
                                 kvq_layer_curves *out, kvq_error *err) {
    kvq_status       status = KVQ_OK;
    kvq_layer_curves curves = {.k = NULL}, pairs;
    int64_t          d = (int64_t)measured->n_kv_heads * measured->head_dim;
    unsigned         reference = kvq_reference_allocation().v_rates;
    int              f = 0;
    KVQ_TRY(codebook_find_allocated(measured, measure, options, &f, err));
    KVQ_TRY(KVQ_NEW(ctx, d * (KVQ_MAX_KEY_WIDTH + 1), "curves of channels", &curves.k, err));
    KVQ_TRY(make_key_curves(ctx, &measured->k[f], measure->channel_weighting, d, curves.k, err));
    for (int rate = 0; rate <= KVQ_TILE_MAX_WIDTH; rate++) curves.v[rate] = HUGE_VAL;
    pairs = curves;
    if (options->v_dim == 2) { // the reference may have a rate that is not allowed
        KVQ_TRY(value_errors(ctx, &measured->rotated, 2, options->v_rates | reference, pairs.v, err));
        for (int rate = 0; rate <= KVQ_TILE_MAX_WIDTH; rate++) {
            if ((options->v_rates >> rate & 1u) != 0) curves.v[rate] = pairs.v[rate];
        }
    } else {
        KVQ_TRY(value_errors(ctx, &measured->rotated, 2, reference, pairs.v, err));
        KVQ_TRY(value_errors(ctx, &measured->rotated, 1, options->v_rates, curves.v, err));
    }
    KVQ_TRY(reference_errors(ctx, measured, &pairs, curves.reference, err));
    for (int i = 0; i < 2; i++) curves.kl[i] = measured->kl != NULL ? measured->kl[i] : 0;
    *out = curves;
    curves.k = NULL;
done:
    kvq_layer_curves_free(ctx, &curves);
    return status;
}

void kvq_layer_curves_free(const kvq_context *ctx, kvq_layer_curves *curves) {
    kvq_free(ctx, curves->k);
    curves->k = NULL;
}
