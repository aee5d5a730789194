// SPDX-License-Identifier: Apache-2.0
//
// From the rows of a tensor to histograms, by the decoder's own rule. In two steps: rows are normalised and their
// outliers marked, which concerns all channels of a row together; then each KV head's channels are added to its
// histogram by one thread. So no histogram exists twice, and the number of threads leaves no trace.
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "codebook_impl.h"

#define ROWS_PER_ITEM 64  // normalised by one thread at a time
#define GATHERED      512 // elements of a head that are added together

typedef struct count_job {
    const kvq_count_tensor *tensors;
    int                     n_tensors;
    int64_t                 n_rows, n_blocks; // of one tensor
    kvq_count_options       options;
    float                  *scratch;
    _Atomic int64_t         first_failed; // item, or the number of items
} count_job;

// The scratch of one tensor: normalised elements [n_rows, d] and the ranges of rows [n_rows].
typedef struct normalised {
    float *x, *r;
} normalised;

int64_t kvq_count_scratch_floats(int64_t n_rows, int64_t d) { return n_rows * d + n_rows; }

static normalised scratch_of(const count_job *job, int64_t tensor) {
    float *at = job->scratch;
    for (int64_t i = 0; i < tensor; i++) at += kvq_count_scratch_floats(job->n_rows, job->tensors[i].spec->d);
    return (normalised){at, at + job->n_rows * job->tensors[tensor].spec->d};
}

// ---------------------------------------------------------------- rows

// On the stack of a thread: calls come from inside parallel loops, which must not use the context's allocator.
typedef struct row_work {
    codebook_selection select;
    float              sorted[KVQ_NO_CHANNEL];
} row_work;

kvq_status codebook_check_row(const float *x, int d, kvq_error *err) {
    int64_t bad = kvq_find_nonfinite(x, d);
    if (bad < 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "channel %lld is %g", (long long)bad, (double)x[bad]);
}

// step 1: z, r [d] of the channels; 0: one of each for all.
static void normalise(const float *x, int d, const float *z, const float *r, int step, float *out) {
    for (int c = 0; c < d; c++) out[c] = kvq_count_normalise(x[c], z[c * step], r[c * step]);
}

static void mark_outliers(const kvq_block_scratch *w, float *out) {
    for (int i = 0; i < w->n_upper; i++) out[w->upper_channel[i]] = KVQ_COUNT_APART;
    for (int i = 0; i < w->n_lower; i++) out[w->lower_channel[i]] = KVQ_COUNT_APART;
}

static kvq_status by_extremes(row_work *w, const kvq_block_spec *spec, const float *x, float *out, float *row_r,
                              kvq_error *err) {
    uint16_t half_z, half_r;
    kvq_block_select_v(spec, x, &w->select.scratch, &half_z, &half_r);
    float z = kvq_float_of_half(half_z), r = kvq_float_of_half(half_r);
    if (!isfinite(z) || !isfinite(r))
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "the middle or half width of its range exceeds f16");
    normalise(x, spec->d, &z, &r, 0, out);
    mark_outliers(&w->select.scratch, out);
    *row_r = r;
    return KVQ_OK;
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static float percentile(const float *sorted, int d, double q) {
    kvq_quantile_rank at = kvq_quantile_position(q, d);
    return kvq_quantile_interpolate(sorted[at.rank], sorted[at.rank + 1 < d ? at.rank + 1 : d - 1], at.fraction);
}

// Everything beyond the percentiles is apart, however much it is.
static void by_percentiles(row_work *w, const kvq_block_spec *spec, double fraction, const float *x, float *out,
                           float *row_r) {
    memcpy(w->sorted, x, (size_t)spec->d * sizeof *x);
    qsort(w->sorted, (size_t)spec->d, sizeof *w->sorted, by_value);
    float low = percentile(w->sorted, spec->d, fraction / 2), high = percentile(w->sorted, spec->d, 1 - fraction / 2);
    float z = kvq_range_middle(low, high), r = kvq_range_half(low, high);
    normalise(x, spec->d, &z, &r, 0, out);
    for (int c = 0; c < spec->d; c++) {
        if (out[c] != KVQ_COUNT_CONSTANT && fabsf(out[c]) > 1 && fraction > 0) out[c] = KVQ_COUNT_APART;
    }
    *row_r = r;
}

static kvq_status normalise_row(row_work *w, const count_job *job, const kvq_block_spec *spec, const float *x,
                                float *out, float *row_r, kvq_error *err) {
    kvq_status status = codebook_check_row(x, spec->d, err);
    if (status != KVQ_OK) return status;
    if (spec->r == NULL && job->options.token_range == KVQ_RANGE_EXTREMES)
        return by_extremes(w, spec, x, out, row_r, err);
    if (spec->r == NULL) {
        by_percentiles(w, spec, job->options.fraction, x, out, row_r);
    } else {
        kvq_block_select_k(spec, x, &w->select.scratch);
        normalise(x, spec->d, spec->z, spec->r, 1, out);
        mark_outliers(&w->select.scratch, out);
    }
    return KVQ_OK;
}

static kvq_status normalise_item(const count_job *job, int64_t item, kvq_error *err) {
    int64_t                 tensor = item / job->n_blocks, first = item % job->n_blocks * ROWS_PER_ITEM;
    int64_t                 end = first + ROWS_PER_ITEM < job->n_rows ? first + ROWS_PER_ITEM : job->n_rows;
    const kvq_count_tensor *t = &job->tensors[tensor];
    normalised              to = scratch_of(job, tensor);
    row_work                w;
    codebook_selection_init(&w.select);
    for (int64_t row = first > job->options.n_skip ? first : job->options.n_skip; row < end; row++) {
        kvq_status status =
            normalise_row(&w, job, t->spec, t->x + row * t->spec->d, to.x + row * t->spec->d, &to.r[row], err);
        if (status == KVQ_OK) continue;
        kvq_error_prefix(err, "%s, position %lld: ", t->name, (long long)row);
        return status;
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- heads

// Elements of one head on their way into its histogram. Energy is that of all elements, the rest of those in the bins.
typedef struct gathered {
    kvq_histogram *h;
    int            n_all, n;
    float          all[GATHERED], normalised[GATHERED];
    double         gradient[GATHERED], scaled[GATHERED], r2[GATHERED]; // squared gradient, times r^2, r^2
} gathered;

static void flush(gathered *g) {
    const double *const weights[KVQ_N_WEIGHTINGS] = {NULL, g->gradient, g->scaled, g->r2};
    kvq_histogram_add(g->h, g->normalised, weights, g->n);
    histogram_add_energy(g->h, g->all, g->n_all);
    g->n = g->n_all = 0;
}

static void add_beyond(kvq_histogram *h, float x, double r2) {
    double beyond = kvq_count_beyond(x);
    kvq_fixed_add_positive(&h->beyond[x > 0], kvq_count_lost(beyond, r2));
    kvq_fixed_add_positive(&h->beyond_squared, kvq_count_lost_square(beyond, r2));
}

static void add_element(gathered *g, float x, double gradient, double r, bool of_channel) {
    g->normalised[g->n] = x;
    g->gradient[g->n] = gradient;
    g->scaled[g->n] = kvq_count_weight(KVQ_WEIGHT_FISHER_SCALED, gradient, r);
    g->r2[g->n] = kvq_count_weight(KVQ_WEIGHT_RANGE, gradient, r);
    if (kvq_count_is_beyond(x)) add_beyond(g->h, x, g->r2[g->n]);
    g->n++;
    g->h->counts.n_clipped += of_channel && kvq_count_is_clipped(x);
}

// Whether all weights of what was gathered last can be added; if not, *bad is one of those that cannot.
static bool weights_fit(const gathered *g, double *bad) {
    const double weights[] = {1, g->gradient[g->n - 1], g->scaled[g->n - 1], g->r2[g->n - 1]};
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (g->h->by[w].bins == NULL || kvq_count_weight_fits((kvq_weighting)w, weights[w])) continue;
        *bad = weights[w];
        return false;
    }
    return true;
}

static kvq_status bad_weight(const kvq_count_tensor *t, int64_t row, int64_t channel, double weight, kvq_error *err) {
    if (!(weight >= 0 && isfinite(weight))) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s, position %lld, channel %lld has the squared gradient %g",
                        t->name, (long long)row, (long long)channel, weight);
    }
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL,
                    "%s, position %lld, channel %lld has weight %g, which is beyond the range of the sums", t->name,
                    (long long)row, (long long)channel, weight);
}

// One head's channels of one row; r [width] of the channels, or of the row with step 0.
static kvq_status count_row(gathered *g, const float *x, const float *scaled, const float *gradients, const float *r,
                            int step, int64_t width, int64_t *channel, double *bad) {
    for (int64_t c = 0; c < width; c++) {
        double gradient = gradients != NULL ? (double)gradients[c] : 0;
        *channel = c;
        *bad = gradient;
        if (!kvq_count_gradient_fits(gradient)) return KVQ_ERR_NUMERICAL;
        if (g->n_all == GATHERED) flush(g);
        g->all[g->n_all++] = x[c];
        if (scaled[c] == KVQ_COUNT_APART) {
            g->h->counts.n_outliers++;
        } else if (scaled[c] == KVQ_COUNT_CONSTANT) {
            g->h->counts.n_constant++;
        } else {
            add_element(g, scaled[c], gradient, (double)r[c * step], step == 1);
            if (!weights_fit(g, bad)) return KVQ_ERR_NUMERICAL;
        }
    }
    return KVQ_OK;
}

static kvq_status count_head(const count_job *job, int64_t item, kvq_error *err) {
    int                     n_heads = job->options.n_heads;
    const kvq_count_tensor *t = &job->tensors[item / n_heads];
    normalised              from = scratch_of(job, item / n_heads);
    int64_t                 d = t->spec->d, width = d / n_heads, first = item % n_heads * width, channel = 0;
    gathered                g;
    double                  bad = 0;
    g.h = t->heads[item % n_heads];
    g.n = g.n_all = 0;
    for (int64_t row = job->options.n_skip; row < job->n_rows; row++) {
        int64_t      at = row * d + first;
        const float *r = t->spec->r != NULL ? t->spec->r + first : &from.r[row];
        kvq_status   status = count_row(&g, t->x + at, from.x + at, t->gradients != NULL ? t->gradients + at : NULL, r,
                                        t->spec->r != NULL, width, &channel, &bad);
        if (status != KVQ_OK) return bad_weight(t, row, first + channel, bad, err);
    }
    flush(&g);
    return KVQ_OK;
}

// ---------------------------------------------------------------- all of it

static void try_normalise(void *user, int64_t item, int worker) {
    (void)worker;
    if (normalise_item(user, item, NULL) != KVQ_OK) codebook_note_failure(&((count_job *)user)->first_failed, item);
}

static void try_count(void *user, int64_t item, int worker) {
    (void)worker;
    if (count_head(user, item, NULL) != KVQ_OK) codebook_note_failure(&((count_job *)user)->first_failed, item);
}

kvq_status kvq_count_check(const kvq_block_spec *spec, int n_heads, kvq_error *err) {
    if (spec->d < 1 || spec->d >= (int)KVQ_NO_CHANNEL || spec->n_side < 0 || spec->n_side > KVQ_BLOCK_MAX_SIDE ||
        2 * spec->n_side >= spec->d) {
        return kvq_fail(err, KVQ_ERR_USAGE, "lower the share of outliers",
                        "rows of %d channels cannot have %d outliers on each side", spec->d, spec->n_side);
    }
    if (n_heads < 1 || spec->d % n_heads != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%d channels of %d heads", spec->d, n_heads);
    for (int c = 0; spec->r != NULL && c < spec->d; c++) {
        if (isfinite(spec->z[c]) && isfinite(spec->r[c]) && spec->r[c] >= 0) continue;
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "channel %d: offset %g, half range %g", c, (double)spec->z[c],
                        (double)spec->r[c]);
    }
    return KVQ_OK;
}

// The first failure is computed once more, for its message; a count that failed has added to a histogram by then, and
// adds again, which is allowed.
kvq_status kvq_count_rows(const kvq_context *ctx, const kvq_count_tensor *tensors, int n_tensors, int64_t n_rows,
                          kvq_count_options options, float *scratch, kvq_error *err) {
    int64_t   n_blocks = (n_rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, n_items = n_tensors * n_blocks;
    count_job job = {tensors, n_tensors, n_rows, n_blocks, options, scratch, n_items};
    if (n_rows < 0 || options.n_skip < 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld rows of which %lld are skipped", (long long)n_rows,
                        (long long)options.n_skip);
    }
    for (int i = 0; i < n_tensors; i++) {
        kvq_status status = kvq_count_check(tensors[i].spec, options.n_heads, err);
        if (status == KVQ_OK) continue;
        kvq_error_prefix(err, "%s: ", tensors[i].name);
        return status;
    }
    kvq_parallel_for(ctx, n_items, try_normalise, &job);
    int64_t failed = atomic_load(&job.first_failed);
    if (failed < n_items) return normalise_item(&job, failed, err);
    n_items = (int64_t)n_tensors * options.n_heads;
    atomic_store(&job.first_failed, n_items);
    kvq_parallel_for(ctx, n_items, try_count, &job);
    failed = atomic_load(&job.first_failed);
    return failed < n_items ? count_head(&job, failed, err) : KVQ_OK;
}
