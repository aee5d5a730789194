// SPDX-License-Identifier: Apache-2.0
//
// Weighted histograms of normalised elements, and what a fit sees of them. Everything is added in fixed point, so
// windows and processes may count in any order and the fit still sees the same bits.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

kvq_status kvq_histogram_create(const kvq_context *ctx, kvq_weighting_set weightings, kvq_histogram **out,
                                kvq_error *err) {
    kvq_status     status = KVQ_OK;
    kvq_histogram *h = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "histogram", &h, err));
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (kvq_weightings_have(weightings, (kvq_weighting)w))
            KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "histogram bins", &h->by[w].bins, err));
    }
    *out = h;
    h = NULL;
done:
    kvq_histogram_destroy(ctx, &h);
    return status;
}

void kvq_histogram_destroy(const kvq_context *ctx, kvq_histogram **h) {
    if (*h == NULL) return;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) kvq_free(ctx, (*h)->by[w].bins);
    kvq_free(ctx, *h);
    *h = NULL;
}

int64_t kvq_histogram_bytes(kvq_weighting_set weightings) {
    int64_t n = 0;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) n += kvq_weightings_have(weightings, (kvq_weighting)w);
    return (int64_t)sizeof(kvq_histogram) + n * KVQ_HISTOGRAM_BINS * (int64_t)sizeof(kvq_bin);
}

void kvq_histogram_clear(kvq_histogram *h) {
    kvq_histogram empty = {.counts = {0}};
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        kvq_bin *bins = h->by[w].bins;
        if (bins != NULL) memset(bins, 0, KVQ_HISTOGRAM_BINS * sizeof *bins);
        empty.by[w].bins = bins;
    }
    *h = empty;
}

// ---------------------------------------------------------------- merging

static void merge_counts(kvq_element_counts *into, const kvq_element_counts *from) {
    into->n_points += from->n_points;
    into->n_outliers += from->n_outliers;
    into->n_constant += from->n_constant;
    into->n_clipped += from->n_clipped;
}

static void merge_bin(kvq_bin *into, const kvq_bin *from) {
    kvq_fixed_merge_positive(&into->w, from->w);
    kvq_fixed_merge(&into->wx, from->wx);
}

// All but the bins.
static void merge_sums(kvq_histogram *into, const kvq_histogram *from) {
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        kvq_fixed_merge_positive(&into->by[w].wxx, from->by[w].wxx);
        kvq_fixed_merge_positive(&into->by[w].w2_large, from->by[w].w2_large);
        kvq_fixed_merge_positive(&into->by[w].w2_small, from->by[w].w2_small);
    }
    merge_counts(&into->counts, &from->counts);
    kvq_fixed_merge_positive(&into->energy, from->energy);
    for (int side = 0; side < 2; side++) kvq_fixed_merge_positive(&into->beyond[side], from->beyond[side]);
    kvq_fixed_merge_positive(&into->beyond_squared, from->beyond_squared);
}

void kvq_histogram_merge(kvq_histogram *into, const kvq_histogram *from) {
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        for (int i = 0; into->by[w].bins != NULL && i < KVQ_HISTOGRAM_BINS; i++)
            merge_bin(&into->by[w].bins[i], &from->by[w].bins[i]);
    }
    merge_sums(into, from);
}

// The histogram at the beginning gets pointers to the bins behind it, in the order of weightings.
void kvq_histogram_merge_counters(kvq_histogram *into, void *counters) {
    kvq_histogram *from = counters;
    uint8_t       *bins = (uint8_t *)(from + 1);
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        from->by[w].bins = into->by[w].bins != NULL ? (kvq_bin *)(void *)bins : NULL;
        if (into->by[w].bins != NULL) bins += KVQ_HISTOGRAM_BINS * sizeof(kvq_bin);
    }
    kvq_histogram_merge(into, from);
}

// ---------------------------------------------------------------- as bytes

// A header, which is the histogram itself without its pointers, and the bins of each weighting that is counted.
static codebook_records records_of(const kvq_histogram *h, int w) {
    return codebook_bins(h->by[w].bins, KVQ_HISTOGRAM_BINS);
}

int64_t kvq_histogram_packed_bytes(const kvq_histogram *h) {
    int64_t bytes = (int64_t)sizeof *h;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (h->by[w].bins != NULL) bytes += codebook_packed_bytes(records_of(h, w));
    }
    return bytes;
}

void kvq_histogram_pack(const kvq_histogram *h, uint8_t *out) {
    kvq_histogram header = *h;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) header.by[w].bins = NULL;
    memcpy(out, &header, sizeof header);
    out += sizeof header;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (h->by[w].bins != NULL) out = codebook_pack(records_of(h, w), out);
    }
}

kvq_status kvq_histogram_merge_packed(kvq_histogram *into, const uint8_t *packed, int64_t bytes, kvq_error *err) {
    kvq_histogram   header;
    codebook_reader from = codebook_read_from("histogram", packed, bytes);
    kvq_status      status = KVQ_OK;
    KVQ_TRY(codebook_read(&from, &header, (int64_t)sizeof header, err));
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (into->by[w].bins != NULL) KVQ_TRY(codebook_merge_packed(records_of(into, w), &from, err));
    }
    KVQ_TRY(codebook_read_end(&from, err));
    merge_sums(into, &header);
done:
    return status;
}

// ---------------------------------------------------------------- what a fit sees

kvq_status kvq_distributions_create(const kvq_context *ctx, kvq_weighting_set weightings, int n, kvq_distribution **out,
                                    kvq_error *err) {
    kvq_status        status = KVQ_OK;
    kvq_distribution *d = NULL;
    KVQ_TRY(KVQ_NEW(ctx, n, "distributions", &d, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "distribution counts", &d[0].counts, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "distribution sums", &d[0].sums, err));
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (!kvq_weightings_have(weightings, (kvq_weighting)w)) continue;
        KVQ_TRY(KVQ_NEW(ctx, (int64_t)n * KVQ_HISTOGRAM_BINS, "distribution weights", &d[0].by[w].w, err));
        KVQ_TRY(KVQ_NEW(ctx, (int64_t)n * KVQ_HISTOGRAM_BINS, "distribution positions", &d[0].by[w].x, err));
    }
    for (int i = 1; i < n; i++) {
        d[i] = d[i - 1];
        d[i].counts++;
        d[i].sums++;
        for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
            if (d[i].by[w].w == NULL) continue;
            d[i].by[w].w += KVQ_HISTOGRAM_BINS;
            d[i].by[w].x += KVQ_HISTOGRAM_BINS;
        }
    }
    *out = d;
    d = NULL;
done:
    kvq_distributions_free(ctx, &d);
    return status;
}

void kvq_distributions_free(const kvq_context *ctx, kvq_distribution **distributions) {
    kvq_distribution *d = *distributions;
    if (d == NULL) return;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        kvq_free(ctx, d[0].by[w].w);
        kvq_free(ctx, d[0].by[w].x);
    }
    kvq_free(ctx, d[0].counts);
    kvq_free(ctx, d[0].sums);
    kvq_free(ctx, d);
    *distributions = NULL;
}

static kvq_status check_sums(const kvq_histogram *h, kvq_error *err) {
    bool overflow = h->energy.hi < 0 || h->beyond[0].hi < 0 || h->beyond[1].hi < 0 || h->beyond_squared.hi < 0;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        const kvq_weight_sums *s = &h->by[w];
        overflow = overflow || s->wxx.hi < 0 || s->w2_large.hi < 0 || s->w2_small.hi < 0;
        for (int i = 0; s->bins != NULL && i < KVQ_HISTOGRAM_BINS; i++) overflow = overflow || s->bins[i].w.hi < 0;
    }
    if (!overflow) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, "use fewer windows; a damaged checkpoint can also be the cause",
                    "the weights of a histogram add up to more than 2^31");
}

// Means are kept inside their bins, which truncation of the smallest weights in the sums could leave.
static void take_bins(const kvq_weight_sums *from, double unit, kvq_weighted_bins *to, double *scatter, double *w2) {
    double about_means = 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        double w = kvq_fixed_to_double(from->bins[i].w), wx = kvq_fixed_to_double(from->bins[i].wx);
        double x = w > 0 ? fmin(fmax(wx / w, codebook_bin_edge(i)), codebook_bin_edge(i + 1)) : 0;
        to->w[i] = (float)(w / unit);
        to->x[i] = to->w[i] > 0 ? (float)x : 0;
        about_means += w > 0 ? wx * (wx / w) : 0;
    }
    *scatter = fmax(kvq_fixed_to_double(from->wxx) - about_means, 0) / unit;
    *w2 = (kvq_fixed_to_double(from->w2_large) + kvq_fixed_to_double(from->w2_small) * KVQ_COUNT_SMALL_SQUARE_UNIT) /
          (unit * unit);
}

kvq_status kvq_distribution_take(const kvq_histogram *h, kvq_distribution *out, kvq_error *err) {
    kvq_status status = check_sums(h, err);
    if (status != KVQ_OK) return status;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (h->by[w].bins != NULL)
            take_bins(&h->by[w], kvq_count_unit((kvq_weighting)w), &out->by[w], &out->sums->scatter[w],
                      &out->sums->w2[w]);
    }
    *out->counts = h->counts;
    out->sums->energy = kvq_fixed_to_double(h->energy) / KVQ_COUNT_SQUARE_UNIT;
    for (int side = 0; side < 2; side++)
        out->sums->beyond[side] = kvq_fixed_to_double(h->beyond[side]) / KVQ_COUNT_SQUARE_UNIT;
    out->sums->beyond_squared = kvq_fixed_to_double(h->beyond_squared) / KVQ_COUNT_SQUARE_UNIT;
    return KVQ_OK;
}
