// SPDX-License-Identifier: Apache-2.0
//
// Weighted histograms of normalised elements. Everything is added in fixed point, so threads, windows and processes may
// count in any order and the fit still sees the same bits.
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "kvq_codebook.h"

#define WEIGHT_LIMIT      0x1p15  // a bin then holds 2^16 of the largest weights
#define SMALL_WEIGHT      0x1p-27 // squares of smaller ones go to w2_small, scaled ...
#define SMALL_SQUARE_UNIT 0x1p-45 // ... so that 2^40 of them still fit and 2^-60 is resolved to six digits

kvq_status kvq_histogram_create(const kvq_context *ctx, kvq_histogram **out, kvq_error *err) {
    kvq_status     status = KVQ_OK;
    kvq_histogram *h = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "histogram", &h, err));
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "histogram bins", &h->bins, err));
    *out = h;
    h = NULL;
done:
    kvq_histogram_destroy(ctx, &h);
    return status;
}

void kvq_histogram_destroy(const kvq_context *ctx, kvq_histogram **h) {
    if (*h == NULL) return;
    kvq_free(ctx, (*h)->bins);
    kvq_free(ctx, *h);
    *h = NULL;
}

// ---------------------------------------------------------------- adding

// Sums of weights cannot be negative, so a negative one means that the range was left: one addition reaches at most the
// sign bit. It stays negative from then on, whatever is added, and the fit refuses it.
static inline void merge_weight(kvq_fixed *sum, kvq_fixed x) {
    if (sum->hi < 0 || x.hi < 0) {
        sum->hi = INT64_MIN;
    } else {
        kvq_fixed_merge(sum, x);
    }
}

static inline void add_weight(kvq_fixed *sum, double x) {
    if (sum->hi >= 0) kvq_fixed_add(sum, x);
}

// x * 2^15 is exact in f32, and so is what floor leaves of it.
static inline int bin_of(float x) {
    int bin = (int)floorf(x * (KVQ_HISTOGRAM_BINS / 2)) + KVQ_HISTOGRAM_BINS / 2;
    return bin < KVQ_HISTOGRAM_BINS ? bin : KVQ_HISTOGRAM_BINS - 1;
}

void kvq_histogram_add(kvq_histogram *h, float x, double weight) {
    x = x > 1 ? 1.0f : x < -1 ? -1.0f : x;
    kvq_bin *bin = &h->bins[bin_of(x)];
    add_weight(&bin->w, weight);
    kvq_fixed_add(&bin->wx, weight * (double)x);
    kvq_fixed_add(&bin->x, (double)x);
    bin->n++;
    if (weight >= SMALL_WEIGHT)
        add_weight(&h->w2_large, weight * weight);
    else
        add_weight(&h->w2_small, weight * weight / SMALL_SQUARE_UNIT);
}

static void merge_bin(kvq_bin *into, const kvq_bin *from) {
    merge_weight(&into->w, from->w);
    kvq_fixed_merge(&into->wx, from->wx);
    kvq_fixed_merge(&into->x, from->x);
    into->n += from->n;
}

void kvq_histogram_merge(kvq_histogram *into, const kvq_histogram *from) {
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) merge_bin(&into->bins[i], &from->bins[i]);
    merge_weight(&into->w2_large, from->w2_large);
    merge_weight(&into->w2_small, from->w2_small);
    into->n_outliers += from->n_outliers;
    into->n_constant += from->n_constant;
}

void kvq_histogram_clear(kvq_histogram *h) {
    kvq_bin *bins = h->bins;
    memset(bins, 0, KVQ_HISTOGRAM_BINS * sizeof *bins);
    *h = (kvq_histogram){.bins = bins};
}

// ---------------------------------------------------------------- as bytes

typedef struct packed_sums {
    kvq_fixed w2_large, w2_small;
    int64_t   n_outliers, n_constant, n_bins;
} packed_sums;

typedef struct packed_bin {
    kvq_bin bin;
    int64_t index;
} packed_bin;

static int64_t n_occupied(const kvq_histogram *h) {
    int64_t n = 0;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) n += h->bins[i].n != 0;
    return n;
}

int64_t kvq_histogram_packed_bytes(const kvq_histogram *h) {
    return (int64_t)sizeof(packed_sums) + n_occupied(h) * (int64_t)sizeof(packed_bin);
}

void kvq_histogram_pack(const kvq_histogram *h, uint8_t *out) {
    packed_sums sums = {h->w2_large, h->w2_small, h->n_outliers, h->n_constant, n_occupied(h)};
    memcpy(out, &sums, sizeof sums);
    out += sizeof sums;
    for (int64_t i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        if (h->bins[i].n == 0) continue;
        packed_bin bin = {h->bins[i], i};
        memcpy(out, &bin, sizeof bin);
        out += sizeof bin;
    }
}

kvq_status kvq_histogram_merge_packed(kvq_histogram *into, const uint8_t *packed, int64_t bytes, kvq_error *err) {
    packed_sums sums = {0};
    if (bytes >= (int64_t)sizeof sums) memcpy(&sums, packed, sizeof sums);
    if (bytes < (int64_t)sizeof sums || sums.n_bins < 0 || sums.n_bins > KVQ_HISTOGRAM_BINS ||
        bytes != (int64_t)sizeof sums + sums.n_bins * (int64_t)sizeof(packed_bin)) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "a saved histogram of %lld bytes does not fit together",
                        (long long)bytes);
    }
    for (int64_t i = 0; i < sums.n_bins; i++) {
        packed_bin bin;
        memcpy(&bin, packed + sizeof sums + (size_t)i * sizeof bin, sizeof bin);
        if (bin.index < 0 || bin.index >= KVQ_HISTOGRAM_BINS) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "a saved histogram speaks of bin %lld", (long long)bin.index);
        }
        merge_bin(&into->bins[bin.index], &bin.bin);
    }
    merge_weight(&into->w2_large, sums.w2_large);
    merge_weight(&into->w2_small, sums.w2_small);
    into->n_outliers += sums.n_outliers;
    into->n_constant += sums.n_constant;
    return KVQ_OK;
}

double kvq_histogram_effective_samples(const kvq_histogram *h) {
    double w = 0, w2 = kvq_fixed_to_double(h->w2_large) + kvq_fixed_to_double(h->w2_small) * SMALL_SQUARE_UNIT;
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) w += kvq_fixed_to_double(h->bins[i].w);
    return w2 > 0 ? w * w / w2 : 0;
}

// ---------------------------------------------------------------- rows

// What one call of kvq_histogram_count_rows works on. It lives on the stack, because calls come from inside parallel
// loops and those must not use the context's allocator.
typedef struct row_counter {
    kvq_histogram        *h;
    const kvq_block_spec *spec;
    bool                  range_squared;
    kvq_block_scratch     scratch;
    float                 upper_key[KVQ_BLOCK_MAX_SIDE + 1], lower_key[KVQ_BLOCK_MAX_SIDE + 1];
    uint16_t              upper_channel[KVQ_BLOCK_MAX_SIDE + 1], lower_channel[KVQ_BLOCK_MAX_SIDE + 1];
    bool                  apart[KVQ_NO_CHANNEL]; // outliers of the current row; all false between rows
} row_counter;

static kvq_status check_spec(const kvq_block_spec *spec, int64_t n_rows, int64_t n_skip, kvq_error *err) {
    if (spec->d < 1 || spec->d >= (int)KVQ_NO_CHANNEL || spec->n_side < 0 || spec->n_side > KVQ_BLOCK_MAX_SIDE ||
        2 * spec->n_side >= spec->d) {
        return kvq_fail(err, KVQ_ERR_USAGE, "lower the share of outliers",
                        "rows of %d channels cannot have %d outliers on each side", spec->d, spec->n_side);
    }
    if (n_rows < 0 || n_skip < 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld rows of which %lld are skipped", (long long)n_rows,
                        (long long)n_skip);
    }
    for (int c = 0; spec->r != NULL && c < spec->d; c++) {
        if (isfinite(spec->z[c]) && isfinite(spec->r[c]) && spec->r[c] >= 0) continue;
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "channel %d: offset %g, half range %g", c, (double)spec->z[c],
                        (double)spec->r[c]);
    }
    return KVQ_OK;
}

static kvq_status check_row(const float *x, const float *weights, int d, int64_t row, kvq_error *err) {
    for (int c = 0; c < d; c++) {
        if (!isfinite(x[c])) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "row %lld, channel %d is %g", (long long)row, c,
                            (double)x[c]);
        }
        if (weights != NULL && !(weights[c] >= 0 && isfinite(weights[c]))) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "row %lld, channel %d has weight %g", (long long)row, c,
                            (double)weights[c]);
        }
    }
    return KVQ_OK;
}

static void mark_outliers(row_counter *rc, bool apart) {
    for (int i = 0; i < rc->scratch.n_upper; i++) rc->apart[rc->scratch.upper_channel[i]] = apart;
    for (int i = 0; i < rc->scratch.n_lower; i++) rc->apart[rc->scratch.lower_channel[i]] = apart;
}

// Counts the elements of a row whose outliers are marked. step 1: z, r [d] of the channels; 0: one z, r for all.
static kvq_status count_row(row_counter *rc, const float *x, const float *weights, const float *z, const float *r,
                            int step, int64_t row, kvq_error *err) {
    for (int c = 0; c < rc->spec->d; c++) {
        float range = r[c * step];
        if (rc->apart[c]) {
            rc->h->n_outliers++;
        } else if (!(range > 0)) {
            rc->h->n_constant++;
        } else {
            double weight = weights != NULL ? (double)weights[c] : 1;
            if (rc->range_squared) weight *= (double)range * (double)range;
            if (!(weight < WEIGHT_LIMIT)) {
                return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL,
                                "row %lld, channel %d has weight %g; sums hold weights below %g", (long long)row, c,
                                weight, WEIGHT_LIMIT);
            }
            kvq_histogram_add(rc->h, kvq_block_normalise(x[c], z[c * step], range, 0), weight);
        }
    }
    return KVQ_OK;
}

static kvq_status select_and_count(row_counter *rc, const float *x, const float *weights, int64_t row, kvq_error *err) {
    kvq_status status;
    if (rc->spec->r != NULL) {
        kvq_block_select_k(rc->spec, x, &rc->scratch);
        mark_outliers(rc, true);
        status = count_row(rc, x, weights, rc->spec->z, rc->spec->r, 1, row, err);
    } else {
        uint16_t half_z, half_r;
        kvq_block_select_v(rc->spec, x, &rc->scratch, &half_z, &half_r);
        float z = kvq_float_of_half(half_z), r = kvq_float_of_half(half_r);
        if (!isfinite(z) || !isfinite(r)) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "row %lld: the middle or half width of its range exceeds f16",
                            (long long)row);
        }
        mark_outliers(rc, true);
        status = count_row(rc, x, weights, &z, &r, 0, row, err);
    }
    mark_outliers(rc, false);
    return status;
}

kvq_status kvq_histogram_count_rows(kvq_histogram *h, const kvq_block_spec *spec, const float *x, const float *weights,
                                    int64_t n_rows, kvq_count_options options, kvq_error *err) {
    kvq_status  status = check_spec(spec, n_rows, options.n_skip, err);
    row_counter rc;
    if (status != KVQ_OK) return status;
    rc.h = h;
    rc.spec = spec;
    rc.range_squared = options.range_squared;
    kvq_block_scratch scratch = {rc.upper_key, rc.lower_key, rc.upper_channel, rc.lower_channel, 0, 0};
    rc.scratch = scratch;
    memset(rc.apart, 0, (size_t)spec->d * sizeof *rc.apart);
    for (int64_t row = options.n_skip; row < n_rows && status == KVQ_OK; row++) {
        const float *row_weights = weights != NULL ? weights + row * spec->d : NULL;
        status = check_row(x + row * spec->d, row_weights, spec->d, row, err);
        if (status == KVQ_OK) status = select_and_count(&rc, x + row * spec->d, row_weights, row, err);
    }
    return status;
}

// ---------------------------------------------------------------- several tensors, in parallel

#define ROWS_PER_ITEM 256 // counted by one thread

typedef struct count_job {
    kvq_histogram         **histograms;
    const kvq_count_tensor *tensors;
    int                     n_tensors;
    int64_t                 n_rows, n_blocks; // blocks of rows of one tensor
    kvq_count_options       options;
    _Atomic int64_t         first_failed; // item, or the number of items
} count_job;

static kvq_status count_item(const count_job *job, int64_t item, int worker, kvq_error *err) {
    int64_t                 tensor = item / job->n_blocks, first = item % job->n_blocks * ROWS_PER_ITEM;
    int64_t                 n = job->n_rows - first < ROWS_PER_ITEM ? job->n_rows - first : ROWS_PER_ITEM;
    int64_t                 skip = job->options.n_skip - first;
    const kvq_count_tensor *t = &job->tensors[tensor];
    kvq_count_options       options = job->options;
    options.n_skip = skip < 0 ? 0 : skip < n ? skip : n;
    return kvq_histogram_count_rows(job->histograms[worker * job->n_tensors + tensor], t->spec,
                                    t->x + first * t->spec->d,
                                    t->weights != NULL ? t->weights + first * t->spec->d : NULL, n, options, err);
}

static void try_item(void *user, int64_t item, int worker) {
    count_job *job = user;
    if (count_item(job, item, worker, NULL) == KVQ_OK) return;
    int64_t known = atomic_load(&job->first_failed);
    while (item < known && !atomic_compare_exchange_weak(&job->first_failed, &known, item)) {
    }
}

kvq_status kvq_histograms_count(const kvq_context *ctx, kvq_histogram **histograms, const kvq_count_tensor *tensors,
                                int n_tensors, int64_t n_rows, kvq_count_options options, kvq_error *err) {
    int64_t   n_blocks = (n_rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, n_items = n_tensors * n_blocks;
    count_job job = {histograms, tensors, n_tensors, n_rows, n_blocks, options, n_items};
    kvq_parallel_for(ctx, n_items, try_item, &job);
    int64_t failed = atomic_load(&job.first_failed);
    if (failed == n_items) return KVQ_OK;
    kvq_status status = count_item(&job, failed, 0, err); // again, for its message
    kvq_error_prefix(err, "%s, positions from %lld: ", tensors[failed / n_blocks].name,
                     (long long)(failed % n_blocks * ROWS_PER_ITEM));
    return status;
}

void kvq_histograms_gather(kvq_histogram **histograms, int n_threads, int n_tensors) {
    for (int i = n_tensors; i < n_threads * n_tensors; i++) {
        kvq_histogram_merge(histograms[i % n_tensors], histograms[i]);
        kvq_histogram_clear(histograms[i]);
    }
}
