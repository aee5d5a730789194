// SPDX-License-Identifier: Apache-2.0
//
// From distributions to the tables of a tensor, and how good they are.
//
// The bound. Let h be the width of a bin, W the sum of all weights, D(C) the cost of levels C over the elements, G(C)
// the cost over the bins, each bin being one point at its mean, and S the scatter of the elements about the means of
// their bins, which is known. If all elements of a bin took the level nearest to the mean, the cost would be G(C) + S.
// They may take a nearer one, and gain by it only where a boundary t between two neighbouring levels, a distance g
// apart, lies inside the bin. An element x beyond t (seen from the mean) gains (x - c)^2 - (x - c - g)^2 = 2 g (x - t).
// With the mean not beyond t, the weighted sum of (x - t) over those elements is largest when t is the mean itself and
// all weight sits at the two ends of the bin: with t dividing the bin in parts a and h - a it is a (h - a) / h of the
// bin's weight, at most h / 4. An element that crosses several boundaries gains the sum of their contributions. So each
// boundary gains at most g h / 2 times the weight of its bin; the distances g add up to last level - first level, which
// for optimal levels is at most the range R of the elements. For every C therefore
//
//     G(C) + S >= D(C) >= G(C) + S - R (h / 2) max_bin w,    and the true optimum is >= G* + S - R (h / 2) max_bin w.
//
// The reported objective is (G + S) / W at the levels rounded to f32: no less than their true cost, and above the
// optimum over the bins by a difference that is known and added to the bound.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "codebook_impl.h"

#define LLOYD_STARTS 1 // as the public code of KVQuant runs it: one start from k-means++, at most 50 rounds
#define LLOYD_ROUNDS 50
#define MAX_LEVELS   (1 << KVQ_MAX_BITS)

// ---------------------------------------------------------------- points

// All parts as one sample: a point per bin that holds weight.
typedef struct sample {
    kvq_weighted_point *points; // [n] non-empty bins
    int64_t             n;
    double              weight, heaviest; // sum and maximum of the points' weights
    double              range;            // outer edge to outer edge
    double              scatter;          // of the elements about the points
} sample;

static bool has_weight(const kvq_distribution *parts, int n_parts, kvq_weighting by) {
    for (int p = 0; p < n_parts; p++) {
        for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
            if (parts[p].by[by].w[i] > 0) return true;
        }
    }
    return false;
}

static void collect(const kvq_distribution *parts, int n_parts, kvq_weighting by, sample *out) {
    int64_t first = -1, last = -1;
    for (int p = 0; p < n_parts; p++) out->scatter += parts[p].sums->scatter[by];
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        double w = 0, wx = 0, wxx = 0;
        for (int p = 0; p < n_parts; p++) {
            double part = (double)parts[p].by[by].w[i], x = (double)parts[p].by[by].x[i];
            w += part;
            wx += part * x;
            wxx += part * x * x;
        }
        if (!(w > 0)) continue;
        double x = fmin(fmax(wx / w, codebook_bin_edge(i)), codebook_bin_edge(i + 1));
        out->points[out->n++] = (kvq_weighted_point){x, w};
        out->scatter += fmax(wxx - wx * x, 0);
        out->weight += w;
        out->heaviest = fmax(out->heaviest, w);
        first = first < 0 ? i : first;
        last = i;
    }
    out->range = out->n > 0 ? codebook_bin_edge(last + 1) - codebook_bin_edge(first) : 0;
}

// ---------------------------------------------------------------- sums of a report

// Numerators of the report, which add up over tables. A table without any weight was fitted as if all elements weighed
// the same; its certificate counts only when no table has weight.
typedef struct certificate {
    double cost, bound, lloyd;
} certificate;
typedef struct report_sums {
    kvq_element_counts counts;
    certificate        weighted, unweighted;
    double             weight, w2, normalised, squares, energy, code_bits;
} report_sums;

static double ratio(double a, double b) { return b > 0 ? a / b : 0; }

static kvq_fit_report report_of(const report_sums *s) {
    double             n = (double)s->counts.n_points, coded = n + (double)s->counts.n_constant;
    const certificate *c = s->weight > 0 ? &s->weighted : &s->unweighted;
    double             weight = s->weight > 0 ? s->weight : n;
    return (kvq_fit_report){.n_points = s->counts.n_points,
                            .n_outliers = s->counts.n_outliers,
                            .n_constant = s->counts.n_constant,
                            .n_clipped = s->counts.n_clipped,
                            .weight_sum = s->weight,
                            .effective_samples = ratio(s->weight * s->weight, s->w2),
                            .objective = ratio(c->cost, weight),
                            .binning_bound = ratio(c->bound, weight),
                            .lloyd_objective = ratio(c->lloyd, weight),
                            .normalised_mse = ratio(s->normalised, n),
                            .mse = ratio(s->squares, coded),
                            .energy = ratio(s->energy, coded + (double)s->counts.n_outliers),
                            .entropy_bits = ratio(s->code_bits, n)};
}

double kvq_fit_nmse(const kvq_fit_report *fit) {
    double coded = (double)(fit->n_points + fit->n_constant);
    return ratio(fit->mse * coded, fit->energy * (coded + (double)fit->n_outliers));
}

double kvq_fit_sqnr_db(const kvq_fit_report *fit) { return -10 * log10(kvq_fit_nmse(fit)); }

static void count_elements(const kvq_distribution *parts, int n_parts, kvq_weighting by, report_sums *s) {
    for (int p = 0; p < n_parts; p++) {
        const kvq_element_counts *c = parts[p].counts;
        s->counts.n_points += c->n_points;
        s->counts.n_outliers += c->n_outliers;
        s->counts.n_constant += c->n_constant;
        s->counts.n_clipped += c->n_clipped;
        s->energy += parts[p].sums->energy;
        s->w2 += parts[p].sums->w2[by];
        for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) s->weight += (double)parts[p].by[by].w[i];
    }
}

// A table as it is used: codes by `levels`, values by `decoded`.
typedef struct table {
    double levels[MAX_LEVELS], decoded[MAX_LEVELS];
    int    k;
} table;

// sum w (x - decoded)^2 over one part, and the weight of each code when `per_code` is not NULL.
static double decoded_cost(const kvq_weighted_bins *bins, const table *t, double *per_code) {
    double cost = 0;
    int    j = 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        double w = (double)bins->w[i], x = (double)bins->x[i];
        if (!(w > 0)) continue;
        while (j + 1 < t->k && x - t->levels[j] > t->levels[j + 1] - x) j++;
        cost += w * (x - t->decoded[j]) * (x - t->decoded[j]);
        if (per_code != NULL) per_code[j] += w;
    }
    return cost;
}

// What clipping adds to the squares, beyond what the ends of the range cost: an element |x'| = 1 + b is b + e from a
// decoded end level that is e inside of the end.
static double clipping_cost(const kvq_distribution_sums *s, const table *t) {
    double inside_low = 1 + t->decoded[0], inside_high = 1 - t->decoded[t->k - 1];
    return s->beyond_squared + 2 * (s->beyond[0] * inside_low + s->beyond[1] * inside_high);
}

static void add_errors(const kvq_distribution *parts, int n_parts, const table *t, report_sums *s) {
    double per_code[MAX_LEVELS] = {0}, n = 0;
    for (int p = 0; p < n_parts; p++) {
        const kvq_distribution_sums *sums = parts[p].sums;
        s->normalised += decoded_cost(&parts[p].by[KVQ_WEIGHT_NONE], t, per_code) + sums->scatter[KVQ_WEIGHT_NONE];
        s->squares += decoded_cost(&parts[p].by[KVQ_WEIGHT_RANGE], t, NULL) + sums->scatter[KVQ_WEIGHT_RANGE] +
                      clipping_cost(sums, t);
    }
    for (int j = 0; j < t->k; j++) n += per_code[j];
    for (int j = 0; j < t->k; j++) {
        if (per_code[j] > 0) s->code_bits += per_code[j] * log2(n / per_code[j]);
    }
}

// ---------------------------------------------------------------- tables

// Mean and deviation of the data and of what it is rounded to; the affine map from the second to the first. The data is
// unweighted, as in the public code of KVQuant (Q-Norm).
static void normalise_levels(const kvq_distribution *parts, int n_parts, table *t, float *decode_levels) {
    double n = 0, m1 = 0, s1 = 0, m2 = 0, s2 = 0, per_code[MAX_LEVELS] = {0};
    for (int p = 0; p < n_parts; p++) {
        const kvq_weighted_bins *bins = &parts[p].by[KVQ_WEIGHT_NONE];
        (void)decoded_cost(bins, t, per_code);
        s1 += parts[p].sums->scatter[KVQ_WEIGHT_NONE];
        for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
            double w = (double)bins->w[i], x = (double)bins->x[i];
            n += w;
            m1 += w * x;
            s1 += w * x * x;
        }
    }
    for (int j = 0; j < t->k; j++) {
        m2 += per_code[j] * t->levels[j];
        s2 += per_code[j] * t->levels[j] * t->levels[j];
    }
    m1 = ratio(m1, n);
    m2 = ratio(m2, n);
    s1 = ratio(s1, n) - m1 * m1;
    s2 = ratio(s2, n) - m2 * m2;
    bool  defined = s1 > 0 && s2 > 0; // data or codes without spread have no scale
    float scale = defined ? (float)sqrt(s1 / s2) : 1, offset = defined ? (float)(m1 - m2 * sqrt(s1 / s2)) : 0;
    for (int j = 0; j < t->k; j++) {
        decode_levels[j] = (float)t->levels[j] * scale + offset;
        t->decoded[j] = (double)decode_levels[j];
    }
}

typedef struct fit_request {
    const kvq_context     *ctx;
    const kvq_fit_options *options;
    kvq_datatype           datatype;
    int                    bits;
} fit_request;

// Levels of a datatype for a sample, and their certificate.
static kvq_status find_levels(const fit_request *r, const sample *points, float *levels, table *t, certificate *sums,
                              kvq_error *err) {
    kvq_status status = KVQ_OK;
    double     optimum, cost;
    t->k = 1 << r->bits;
    if (r->datatype == KVQ_NUQ) {
        KVQ_TRY(kvq_kmeans_exact(r->ctx, points->points, points->n, t->k, t->levels, &optimum, err));
        for (int j = 0; j < t->k; j++) levels[j] = (float)t->levels[j];
    } else {
        KVQ_TRY(kvq_fixed_levels(r->datatype, r->bits, levels, err));
    }
    for (int j = 0; j < t->k; j++) t->levels[j] = t->decoded[j] = (double)levels[j];
    cost = codebook_cost(points->points, points->n, t->levels, t->k);
    sums->cost += cost + points->scatter;
    if (r->datatype != KVQ_NUQ) goto done; // there is no optimum to be compared with
    sums->bound += fmax(cost - optimum, 0) + points->range * CODEBOOK_BIN_WIDTH / 2 * points->heaviest;
    if (r->options->compare_lloyd) {
        double lloyd[MAX_LEVELS], lloyd_cost;
        KVQ_TRY(kvq_kmeans_lloyd(r->ctx, points->points, points->n, t->k, 0, LLOYD_STARTS, LLOYD_ROUNDS, lloyd,
                                 &lloyd_cost, err));
        sums->lloyd += lloyd_cost + points->scatter;
    }
done:
    return status;
}

static kvq_status fit_one(const fit_request *r, const kvq_distribution *parts, int n_parts, float *levels,
                          float *decode_levels, report_sums *sums, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    sample        points = {0};
    table         t;
    kvq_weighting by = r->options->weighting;
    bool          weighted = has_weight(parts, n_parts, by);
    if (r->bits < 1 || r->bits > KVQ_MAX_BITS) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a codebook of %d bits; 1 to %d are possible", r->bits, KVQ_MAX_BITS);
    }
    count_elements(parts, n_parts, by, sums);
    KVQ_TRY(KVQ_NEW(r->ctx, KVQ_HISTOGRAM_BINS, "histogram points", &points.points, err));
    collect(parts, n_parts, weighted ? by : KVQ_WEIGHT_NONE, &points);
    KVQ_TRY(find_levels(r, &points, levels, &t, weighted ? &sums->weighted : &sums->unweighted, err));
    if (decode_levels != NULL) normalise_levels(parts, n_parts, &t, decode_levels);
    // an integer zero point moves the levels of each channel or token, which no histogram of normalised values shows
    if (r->datatype != KVQ_INT_CLAMPED) add_errors(parts, n_parts, &t, sums);
done:
    kvq_free(r->ctx, points.points);
    return status;
}

kvq_status kvq_fit_table(const kvq_context *ctx, const kvq_distribution *parts, int n_parts, kvq_datatype datatype,
                         int bits, const kvq_fit_options *options, float *levels, float *decode_levels,
                         kvq_fit_report *report, kvq_error *err) {
    fit_request r = {ctx, options, datatype, bits};
    report_sums sums = {.counts = {0}};
    kvq_status  status = fit_one(&r, parts, n_parts, levels, decode_levels, &sums, err);
    if (status == KVQ_OK) *report = report_of(&sums);
    return status;
}

// ---------------------------------------------------------------- tensors and layers

kvq_status codebook_renew(const kvq_context *ctx, int64_t n, const char *what, float **array, kvq_error *err) {
    kvq_free(ctx, *array);
    *array = NULL;
    return KVQ_NEW(ctx, n, what, array, err);
}

// A fit without any weight would be an unweighted one under the name of a weighted one.
static kvq_status check_weights(const kvq_context *ctx, const kvq_fit_options *options, const kvq_tensor_quant *t,
                                const char *name, kvq_error *err) {
    const kvq_fit_report *fit = &t->fit;
    if (!kvq_weighting_needs_gradients(options->weighting) || fit->n_points == 0) return KVQ_OK;
    if (!(fit->weight_sum > 0)) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, "use more or longer windows, or no weighting",
                        "%s: the loss does not feel any of the %lld elements, their weights are all zero", name,
                        (long long)fit->n_points);
    }
    if (t->datatype == KVQ_NUQ && fit->effective_samples < t->n_groups * t->n_levels) {
        kvq_log(ctx, KVQ_LOG_WARNING,
                "%s: the weights make %lld elements worth %.1f samples, too few for %d levels; use more text", name,
                (long long)fit->n_points, fit->effective_samples, t->n_groups * t->n_levels);
    }
    return KVQ_OK;
}

static kvq_status fit_tensor(const kvq_context *ctx, const kvq_distribution *heads, int n_heads,
                             const kvq_fit_options *options, kvq_tensor_quant *t, kvq_error *err) {
    fit_request r = {ctx, options, t->datatype, t->bits};
    report_sums sums = {.counts = {0}};
    int         per_group = n_heads / t->n_groups, n = t->n_groups * t->n_levels;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(codebook_renew(ctx, n, "codebook", &t->codebook, err));
    if (options->q_norm) KVQ_TRY(codebook_renew(ctx, n, "levels that codes decode to", &t->decode_levels, err));
    for (int g = 0; g < t->n_groups; g++) {
        float *decode_levels = options->q_norm ? t->decode_levels + g * t->n_levels : NULL;
        KVQ_TRY(
            fit_one(&r, heads + g * per_group, per_group, t->codebook + g * t->n_levels, decode_levels, &sums, err));
    }
    t->fit = report_of(&sums);
done:
    return status;
}

kvq_status codebook_copy_thresholds(const kvq_context *ctx, const kvq_measured_tensor *measured, int64_t d,
                                    kvq_tensor_quant *t, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (t->axis != KVQ_AXIS_CHANNEL) return KVQ_OK;
    KVQ_TRY(codebook_renew(ctx, d, "lower thresholds", &t->lower, err));
    KVQ_TRY(codebook_renew(ctx, d, "upper thresholds", &t->upper, err));
    memcpy(t->lower, measured->lower, (size_t)d * sizeof *t->lower);
    memcpy(t->upper, measured->upper, (size_t)d * sizeof *t->upper);
done:
    return status;
}

kvq_status kvq_fit_layer(const kvq_context *ctx, const kvq_measured_layer *measured, const kvq_measure_options *measure,
                         const kvq_fit_options *fit, kvq_artifact *artifact, int64_t layer, kvq_error *err) {
    int                        f = kvq_measured_fraction(measure, fit->outlier_fraction);
    int64_t                    d = (int64_t)measured->n_kv_heads * measured->head_dim;
    kvq_tensor_quant          *tensors[] = {&artifact->layers[layer].k, &artifact->layers[layer].v};
    const kvq_measured_tensor *from[] = {measured->k, measured->v};
    kvq_status                 status = KVQ_OK;
    if (f < 0 || !kvq_weightings_have(measured->weightings, fit->weighting)) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "outliers of %g with weights '%s' were not measured",
                        fit->outlier_fraction, kvq_weighting_names[fit->weighting]);
    }
    for (int i = 0; i < 2; i++) {
        char name[64];
        (void)snprintf(name, sizeof name, "layer %lld, %c", (long long)layer, "KV"[i]);
        KVQ_TRY(codebook_copy_thresholds(ctx, &from[i][f], d, tensors[i], err));
        KVQ_TRY(fit_tensor(ctx, from[i][f].heads, measured->n_kv_heads, fit, tensors[i], err));
        KVQ_TRY(check_weights(ctx, fit, tensors[i], name, err));
        kvq_log(ctx, KVQ_LOG_DEBUG, "%s: %lld elements worth %.0f samples, %lld outliers, weighted error %.3e", name,
                (long long)tensors[i]->fit.n_points, tensors[i]->fit.effective_samples,
                (long long)tensors[i]->fit.n_outliers, tensors[i]->fit.objective);
    }
done:
    return status;
}
