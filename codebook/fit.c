// SPDX-License-Identifier: Apache-2.0
//
// From a histogram to a codebook, and how much the histogram can have hidden.
//
// The bound. Let h be the width of a bin, W the sum of all weights, D(C) the cost of levels C over the elements and
// G(C) the cost over the bins, each bin being one point at its mean. If all elements of a bin took the level nearest to
// the mean, the cost would be G(C) + S, where S >= 0 is the scatter within the bins. They may take a nearer one, and
// gain by it only where a boundary t between two neighbouring levels, a distance g apart, lies inside the bin. An
// element x beyond t (seen from the mean) gains (x - c)^2 - (x - c - g)^2 = 2 g (x - t). With the mean not beyond t,
// the weighted sum of (x - t) over those elements is largest when t is the mean itself and all weight sits at the two
// ends of the bin: with t dividing the bin in parts a and h - a it is a (h - a) / h of the bin's weight, at most h / 4.
// An element that crosses several boundaries gains the sum of their contributions. So each boundary gains at most g h /
// 2 times the weight of its bin; the distances g add up to last level - first level, which for optimal levels is at
// most the range R of the elements. For every C therefore
//
//     D(C) >= G(C) - R (h / 2) max_bin w,    and the true optimum is >= G* - R (h / 2) max_bin w.
//
// The reported objective is G at the levels rounded to f32, above G* by a difference that is known and added.
#include <math.h>

#include "codebook_impl.h"

#define BIN_WIDTH (2.0 / KVQ_HISTOGRAM_BINS)

typedef struct bin_points {
    kvq_weighted_point *points; // [n] non-empty bins
    int64_t             n;
    double              weight, heaviest; // sum and maximum of the points' weights
    double              range;            // outer edge to outer edge
} bin_points;

static double bin_edge(int64_t bin) { return (double)bin * BIN_WIDTH - 1; }

static kvq_status check_sums(const kvq_histogram *h, kvq_error *err) {
    bool overflow = h->w2_large.hi < 0 || h->w2_small.hi < 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) overflow = overflow || h->bins[i].w.hi < 0;
    if (!overflow) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, "use fewer windows; a damaged checkpoint can also be the cause",
                    "the weights of a histogram add up to more than 2^31");
}

// One point per non-empty bin, at its weighted mean; at its plain mean and weighing its count when no bin has weight.
// The means are kept inside their bins, which truncation of the smallest weights in the sums could leave.
static void collect_points(const kvq_histogram *h, bool weighted, bin_points *out) {
    int64_t first = -1, last = -1;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        const kvq_bin *bin = &h->bins[i];
        double         w = weighted ? kvq_fixed_to_double(bin->w) : (double)bin->n;
        if (!(w > 0)) continue;
        double             x = kvq_fixed_to_double(weighted ? bin->wx : bin->x) / w;
        kvq_weighted_point p = {fmin(fmax(x, bin_edge(i)), bin_edge(i + 1)), w};
        out->points[out->n++] = p;
        out->weight += w;
        out->heaviest = fmax(out->heaviest, w);
        first = first < 0 ? i : first;
        last = i;
    }
    out->range = out->n > 0 ? bin_edge(last + 1) - bin_edge(first) : 0;
}

static kvq_fit_report describe(const kvq_histogram *h) {
    kvq_fit_report report = {.n_outliers = h->n_outliers, .n_constant = h->n_constant};
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        report.n_points += h->bins[i].n;
        report.weight_sum += kvq_fixed_to_double(h->bins[i].w);
    }
    report.effective_samples = kvq_histogram_effective_samples(h);
    return report;
}

kvq_status kvq_fit_histogram(const kvq_context *ctx, const kvq_histogram *h, int bits, float *codebook,
                             kvq_fit_report *report, kvq_error *err) {
    kvq_status status = KVQ_OK;
    bin_points bins = {0};
    double     levels[1 << KVQ_MAX_BITS], optimum;
    if (bits < 1 || bits > KVQ_MAX_BITS) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a codebook of %d bits; 1 to %d are possible", bits, KVQ_MAX_BITS);
    }
    int k = 1 << bits;
    KVQ_TRY(check_sums(h, err));
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "histogram points", &bins.points, err));
    kvq_fit_report result = describe(h);
    collect_points(h, result.weight_sum > 0, &bins);
    KVQ_TRY(kvq_kmeans_exact(ctx, bins.points, bins.n, k, levels, &optimum, err));
    for (int j = 0; j < k; j++) {
        codebook[j] = (float)levels[j];
        levels[j] = (double)codebook[j];
    }
    if (bins.n > 0) {
        double cost = codebook_cost(bins.points, bins.n, levels, k);
        result.objective = cost / bins.weight;
        result.binning_bound = (fmax(cost - optimum, 0) + bins.range * BIN_WIDTH / 2 * bins.heaviest) / bins.weight;
    }
    *report = result;
done:
    kvq_free(ctx, bins.points);
    return status;
}
