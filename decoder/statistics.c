// SPDX-License-Identifier: Apache-2.0
//
// Estimates with their errors and intervals, over blocks of text. Why intervals are made as they are: what is estimated
// has long tails (KL), is a small share (changed first choices), or scatters evenly around 0 (differences of losses).
// Student's interval is too short above for the first two; a studentised bootstrap follows their skewness, but with few
// blocks of the third kind it is too short on both sides, and where resamples hardly scatter its ends run away. The
// outer one of both, within a bound, covered 95 % or little less of all three; tests/test_coverage.c measures it.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "decoder_impl.h"

// Ends are the 50th t from either side: (N_RESAMPLES + 1) * 0.025.
#define N_RESAMPLES 1999
#define END_RANK    50
// More blocks are resampled in so many groups of neighbours. The skewness of a mean, which is what resampling is for,
// does not depend on how its terms are grouped; time and memory then have a bound.
#define MAX_GROUPS 128
// No end lies farther out than so many times Student's: with 4 or 5 blocks, or a rare event in few of them, a resample
// may have no scatter of its own, and the bootstrap's end is infinite.
#define MAX_STRETCH 2.0

static const kvq_estimate NOTHING = {(double)NAN, (double)NAN, (double)NAN, (double)NAN};

// ---------------------------------------------------------------- ratios

// Sums are sums[i] - minus[i]; minus and counts may be NULL (0 and 1).
typedef struct blocks {
    const double *sums, *minus, *counts;
    int64_t       n;
} blocks;

static double sum_of(const blocks *x, int64_t i) { return x->sums[i] - (x->minus != NULL ? x->minus[i] : 0); }
static double count_of(const blocks *x, int64_t i) { return x->counts != NULL ? x->counts[i] : 1; }
static bool   is_empty(const blocks *x, int64_t i) { return sum_of(x, i) == 0 && count_of(x, i) == 0; }

// 97.5 % quantile of Student's t; a series in 1 / df (Abramowitz and Stegun 1964, 26.7.5) is good to 2e-4 from 10 on.
static double student(int64_t df) {
    static const double FEW[] = {0, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622};
    double              d = (double)df;
    if (df < (int64_t)(sizeof FEW / sizeof *FEW)) return FEW[df];
    return 1.95996 + (2.37227 + (2.82250 + 2.55585 / d) / d) / d;
}

typedef struct groups {
    int    n;
    double residuals[MAX_GROUPS], counts[MAX_GROUPS];
} groups;

static void make_groups(const blocks *x, double value, int64_t n_blocks, groups *out) {
    int64_t k = 0;
    *out = (groups){.n = n_blocks < MAX_GROUPS ? (int)n_blocks : MAX_GROUPS};
    for (int64_t i = 0; i < x->n; i++) {
        if (is_empty(x, i)) continue;
        int64_t group = k++ * out->n / n_blocks;
        out->residuals[group] += sum_of(x, i) - value * count_of(x, i);
        out->counts[group] += count_of(x, i);
    }
}

// (value* - value) / stderr* of one resample. In residuals it is their ratio over its error, without cancellation. The
// numbers drawn depend on the number of groups and of the resample alone, so that estimates of one run are comparable.
static double resampled_t(const groups *g, int resample) {
    double   e = 0, c = 0, ee = 0, ec = 0, cc = 0, n = (double)g->n;
    uint32_t words[4];
    for (int i = 0; i < g->n; i++) {
        if (i % 4 == 0)
            kvq_rng_block(0, KVQ_RNG_BOOTSTRAP, (uint32_t)g->n, (uint64_t)resample * (MAX_GROUPS / 4) + (uint64_t)i / 4,
                          words);
        int    drawn = (int)((uint64_t)words[i % 4] * (uint64_t)g->n >> 32);
        double residual = g->residuals[drawn], count = g->counts[drawn];
        e += residual;
        c += count;
        ee += residual * residual;
        ec += residual * count;
        cc += count * count;
    }
    double ratio = e / c, error = sqrt((ee - 2 * ratio * ec + ratio * ratio * cc) * n / (n - 1)) / c;
    if (c > 0 && error > 0) return ratio / error;
    return e > 0 ? (double)INFINITY : e < 0 ? -(double)INFINITY : 0; // the same block again and again
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double at_least_at_most(double x, double least, double most) { return x < least ? least : x > most ? most : x; }

static void set_interval(const blocks *x, int64_t n_blocks, kvq_estimate *out) {
    double s = student(n_blocks - 1), t_low = -s, t_high = s;
    groups g;
    if (n_blocks >= KVQ_BOOTSTRAP_BLOCKS) {
        double t[N_RESAMPLES];
        make_groups(x, out->value, n_blocks, &g);
        for (int i = 0; i < N_RESAMPLES; i++) t[i] = resampled_t(&g, i);
        qsort(t, N_RESAMPLES, sizeof *t, compare_doubles);
        t_low = at_least_at_most(t[END_RANK - 1], -MAX_STRETCH * s, -s);
        t_high = at_least_at_most(t[N_RESAMPLES - END_RANK], s, MAX_STRETCH * s);
    }
    out->low = out->value - t_high * out->stderr_; // t_high: how far above the truth a value may lie
    out->high = out->value - t_low * out->stderr_;
}

static kvq_estimate estimate(const blocks *x) {
    double  sum = 0, count = 0, squares = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < x->n; i++) {
        sum += sum_of(x, i);
        count += count_of(x, i);
        n += !is_empty(x, i);
    }
    if (!(count > 0)) return NOTHING;
    kvq_estimate out = {sum / count, (double)NAN, (double)NAN, (double)NAN};
    if (n < 2) return out;
    for (int64_t i = 0; i < x->n; i++) {
        double e = sum_of(x, i) - out.value * count_of(x, i);
        squares += e * e;
    }
    out.stderr_ = sqrt(squares * (double)n / (double)(n - 1)) / count;
    if (out.stderr_ > 0 && isfinite(out.stderr_)) {
        set_interval(x, n, &out);
    } else {
        out.low = out.value - out.stderr_;
        out.high = out.value + out.stderr_;
    }
    return out;
}

kvq_estimate kvq_estimate_ratio(const double *sums, const double *counts, int64_t n) {
    return estimate(&(blocks){.sums = sums, .counts = counts, .n = n});
}

void kvq_validation_compare(kvq_validation *v, const double *earlier_quantized_nll, const double *earlier_kld) {
    blocks nll = {.sums = v->window_quantized_nll, .minus = earlier_quantized_nll, .n = v->n_windows};
    blocks kld = {.sums = v->window_kld, .minus = earlier_kld, .counts = earlier_kld, .n = v->n_windows};
    v->has_regression = v->has_artifact;
    if (!v->has_regression) return;
    kvq_estimate difference = estimate(&nll);
    v->regression_ppl = estimate_map(difference, expm1, exp(difference.value));
    v->regression_kld = estimate(&kld);
}

// ---------------------------------------------------------------- quantiles

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// The smallest rank whose share is at least q; the product alone may round to beyond a whole number.
static int64_t rank_of(double q, int64_t n) {
    int64_t rank = (int64_t)ceil(q * (double)n);
    if ((double)(rank - 1) / (double)n >= q) rank--;
    return rank < 1 ? 1 : rank;
}

// values [n_blocks, n]; sorted holds the same; shares [n_blocks] is scratch.
static kvq_estimate quantile(const float *values, const float *sorted, int64_t n_blocks, int64_t n, double q,
                             double *shares) {
    int64_t      total = n_blocks * n;
    float        point = sorted[rank_of(q, total) - 1];
    kvq_estimate out = {(double)point, (double)NAN, (double)NAN, (double)NAN};
    if (n_blocks < 2) return out;
    for (int64_t b = 0; b < n_blocks; b++) {
        int64_t below = 0;
        for (int64_t i = 0; i < n; i++) below += values[b * n + i] <= point;
        shares[b] = (double)below / (double)n;
    }
    kvq_estimate share = kvq_estimate_ratio(shares, NULL, n_blocks);
    // Few values may by chance lie evenly over the blocks, but they scatter at least as independent ones do.
    double least = 1.95996 * sqrt(q * (1 - q) / (double)total);
    double low = ceil((q - fmax(share.value - share.low, least)) * (double)total - 0.5);
    double high = floor((q + fmax(share.high - share.value, least)) * (double)total + 0.5) + 1;
    out.low = low < 1 ? -(double)INFINITY : (double)sorted[(int64_t)low - 1];
    out.high = high > (double)total ? (double)INFINITY : (double)sorted[(int64_t)high - 1];
    return out;
}

kvq_status kvq_estimate_quantiles(const kvq_context *ctx, const float *values, int64_t n_blocks, int64_t n,
                                  const double *q, int n_q, kvq_estimate *out, kvq_error *err) {
    int64_t    total = n_blocks * n;
    float     *sorted = NULL;
    double    *shares = NULL;
    bool       known = total > 0;
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < total && known; i++) known = !isnan(values[i]);
    for (int i = 0; i < n_q && !known; i++) out[i] = NOTHING;
    if (!known) return KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, total, "sorted values", &sorted, err));
    KVQ_TRY(KVQ_NEW(ctx, n_blocks, "shares of blocks", &shares, err));
    memcpy(sorted, values, (size_t)total * sizeof *sorted);
    qsort(sorted, (size_t)total, sizeof *sorted, compare_floats);
    for (int i = 0; i < n_q; i++) out[i] = quantile(values, sorted, n_blocks, n, q[i], shares);

done:
    kvq_free(ctx, sorted);
    kvq_free(ctx, shares);
    return status;
}

// ---------------------------------------------------------------- estimates of functions

kvq_estimate estimate_map(kvq_estimate x, double (*f)(double), double slope) {
    return (kvq_estimate){f(x.value), fabs(slope) * x.stderr_, f(x.low), f(x.high)};
}

static double root(double x) { return x > 0 ? sqrt(x) : x < 0 ? 0 : x; } // NaN stays

kvq_estimate estimate_root(kvq_estimate x) { return estimate_map(x, root, x.value > 0 ? 0.5 / sqrt(x.value) : 0); }
