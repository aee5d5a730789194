// SPDX-License-Identifier: Apache-2.0
//
// Exact outlier thresholds of the columns of a matrix that never exists as a whole. A threshold of a two-sided fraction
// o lies between two order statistics near an end of the sorted column, so only the o / 2 smallest and largest values
// of each column are kept while rows stream by: one pass, o times the memory of the data, and the ends of two parts of
// the data give the ends of the whole.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"

enum { LOW, HIGH, N_ENDS };

#define MIN_SPARE 32 // room behind the kept values; less would sort for every other value

// One end of one column. Values are images, ordered so that smaller means further out at both ends.
typedef struct tail {
    uint32_t limit; // images above it cannot be among the kept ones
    int32_t  count;
} tail;

struct kvq_tails {
    int64_t   n_columns, n_keep, capacity, n_rows;
    tail     *tails;  // [n_columns, N_ENDS]
    uint32_t *images; // [n_columns, N_ENDS, capacity]
};

// Order-preserving: for finite floats a < b means image(a) < image(b); -0 comes just before +0. Negative numbers are
// inverted because their magnitude bits grow the wrong way.
static uint32_t image_of(float x) {
    uint32_t u = kvq_bits_of_float(x);
    return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}

static float value_of(uint32_t image) {
    return kvq_float_of_bits((image & 0x80000000u) != 0 ? image ^ 0x80000000u : ~image);
}

static kvq_status check_fraction(double fraction, kvq_error *err) {
    if (fraction >= 0 && fraction < 1) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "choose a share from 0 up to, but not including, 1", "outlier share %g",
                    fraction);
}

kvq_quantile_rank kvq_quantile_position(double q, int64_t n) {
    double            position = q * (double)(n - 1), whole = floor(position);
    kvq_quantile_rank rank = {(int64_t)whole, position - whole};
    return rank;
}

float kvq_quantile_interpolate(float low, float high, double fraction) {
    return (float)((double)low + fraction * ((double)high - (double)low));
}

int64_t kvq_tails_needed(double fraction, kvq_scope scope, int64_t n_columns, int64_t n_rows) {
    int64_t n = scope == KVQ_SCOPE_MATRIX ? n_rows * n_columns : n_rows;
    int64_t low = kvq_quantile_position(fraction / 2, n).rank + 2;
    int64_t high = n - kvq_quantile_position(1 - fraction / 2, n).rank;
    int64_t needed = low > high ? low : high;
    return needed < n_rows ? needed : n_rows;
}

static int64_t capacity_for(int64_t n_keep) { return n_keep + (n_keep > MIN_SPARE ? n_keep : MIN_SPARE); }

int64_t kvq_tails_bytes(int64_t n_columns, int64_t n_keep) {
    return n_columns * N_ENDS * (capacity_for(n_keep) * (int64_t)sizeof(uint32_t) + (int64_t)sizeof(tail));
}

kvq_status kvq_tails_create(const kvq_context *ctx, int64_t n_columns, int64_t n_keep, kvq_tails **out,
                            kvq_error *err) {
    kvq_status status = KVQ_OK;
    kvq_tails *t = NULL;
    if (n_columns < 1 || n_keep < 1 || n_keep > INT32_MAX / 4 || n_columns > INT64_MAX / 32 / n_keep) {
        return kvq_fail(err, KVQ_ERR_INPUT, "use more or longer windows, or fewer sink tokens",
                        "thresholds: %lld values at either end of %lld channels", (long long)n_keep,
                        (long long)n_columns);
    }
    KVQ_TRY(KVQ_NEW(ctx, 1, "threshold state", &t, err));
    t->n_columns = n_columns;
    t->n_keep = n_keep;
    t->capacity = capacity_for(n_keep);
    KVQ_TRY(KVQ_NEW(ctx, n_columns * N_ENDS, "ends of K", &t->tails, err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns * N_ENDS * t->capacity, "extreme values of K", &t->images, err));
    for (int64_t i = 0; i < n_columns * N_ENDS; i++) t->tails[i].limit = UINT32_MAX;
    *out = t;
    t = NULL;
done:
    kvq_tails_destroy(ctx, &t);
    return status;
}

void kvq_tails_destroy(const kvq_context *ctx, kvq_tails **tails) {
    if (*tails == NULL) return;
    kvq_free(ctx, (*tails)->tails);
    kvq_free(ctx, (*tails)->images);
    kvq_free(ctx, *tails);
    *tails = NULL;
}

int64_t kvq_tails_rows(const kvq_tails *t) { return t->n_rows; }
int64_t kvq_tails_width(const kvq_tails *t) { return t->n_rows < t->n_keep ? t->n_rows : t->n_keep; }

// ---------------------------------------------------------------- keeping

static int by_image(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

// Sorts an end and forgets what is not needed of it.
static void settle(const kvq_tails *t, tail *end, uint32_t *images) {
    qsort(images, (size_t)end->count, sizeof *images, by_image);
    if (end->count < t->n_keep) return;
    end->count = (int32_t)t->n_keep;
    end->limit = images[t->n_keep - 1];
}

static void keep(const kvq_tails *t, int64_t index, uint32_t image) {
    tail     *end = &t->tails[index];
    uint32_t *images = t->images + index * t->capacity;
    if (image > end->limit) return;
    images[end->count++] = image;
    if (end->count == t->capacity) settle(t, end, images);
}

// Columns are cut among the threads: they share nothing, and what is kept does not depend on the cut.
typedef struct column_job {
    const kvq_tails *tails;
    const float     *x;   // push: [n_rows, n_columns]; merge: [n_columns, N_ENDS, width]
    float           *out; // pack: [n_columns, N_ENDS, width]
    int64_t          n_rows, width, columns_per_item;
} column_job;

static int64_t end_of(const column_job *job, int64_t item) {
    int64_t end = (item + 1) * job->columns_per_item;
    return end < job->tails->n_columns ? end : job->tails->n_columns;
}

static void over_columns(const kvq_context *ctx, kvq_parallel_fn body, column_job *job) {
    int64_t n_items = ctx->n_threads > 1 ? ctx->n_threads : 1;
    job->columns_per_item = (job->tails->n_columns + n_items - 1) / n_items;
    kvq_parallel_for(ctx, n_items, body, job);
}

// Rows are the outer loop because memory likes to be read in order.
static void push_columns(void *user, int64_t item, int worker) {
    const column_job *job = user;
    (void)worker;
    for (int64_t row = 0; row < job->n_rows; row++) {
        const float *x = job->x + row * job->tails->n_columns;
        for (int64_t column = item * job->columns_per_item; column < end_of(job, item); column++) {
            uint32_t image = image_of(x[column]);
            keep(job->tails, column * N_ENDS + LOW, image);
            keep(job->tails, column * N_ENDS + HIGH, ~image);
        }
    }
}

kvq_status kvq_tails_push(const kvq_context *ctx, kvq_tails *t, const float *x, int64_t n_rows, kvq_error *err) {
    int64_t bad = kvq_find_nonfinite(x, n_rows * t->n_columns);
    if (bad >= 0) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "thresholds: row %lld, channel %lld is %g",
                        (long long)(bad / t->n_columns), (long long)(bad % t->n_columns), (double)x[bad]);
    }
    column_job job = {.tails = t, .x = x, .n_rows = n_rows};
    over_columns(ctx, push_columns, &job);
    t->n_rows += n_rows;
    return KVQ_OK;
}

// ---------------------------------------------------------------- parts

static void pack_columns(void *user, int64_t item, int worker) {
    const column_job *job = user;
    const kvq_tails  *t = job->tails;
    (void)worker;
    for (int64_t i = item * job->columns_per_item * N_ENDS; i < end_of(job, item) * N_ENDS; i++) {
        uint32_t *images = t->images + i * t->capacity;
        float    *out = job->out + i * job->width;
        settle(t, &t->tails[i], images);
        for (int64_t j = 0; j < job->width; j++) out[j] = value_of(i % N_ENDS == LOW ? images[j] : ~images[j]);
    }
}

void kvq_tails_pack(const kvq_context *ctx, kvq_tails *t, float *out) {
    column_job job = {.tails = t, .out = out, .width = kvq_tails_width(t)};
    over_columns(ctx, pack_columns, &job);
}

static void merge_columns(void *user, int64_t item, int worker) {
    const column_job *job = user;
    (void)worker;
    for (int64_t i = item * job->columns_per_item * N_ENDS; i < end_of(job, item) * N_ENDS; i++) {
        for (int64_t j = 0; j < job->width; j++) {
            uint32_t image = image_of(job->x[i * job->width + j]);
            keep(job->tails, i, i % N_ENDS == LOW ? image : ~image);
        }
    }
}

kvq_status kvq_tails_merge(const kvq_context *ctx, kvq_tails *t, const float *packed, int64_t n_rows, kvq_error *err) {
    int64_t width = n_rows < t->n_keep ? n_rows : t->n_keep;
    int64_t bad = kvq_find_nonfinite(packed, t->n_columns * N_ENDS * width);
    if (bad >= 0) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "thresholds: an extreme value of channel %lld is %g",
                        (long long)(bad / (N_ENDS * width)), (double)packed[bad]);
    }
    column_job job = {.tails = t, .x = packed, .width = width};
    over_columns(ctx, merge_columns, &job);
    t->n_rows += n_rows;
    return KVQ_OK;
}

// ---------------------------------------------------------------- thresholds

const char *const kvq_scope_names[] = {"channel", "matrix", NULL};

// Where in the sorted values the two quantiles lie: ranks counted from the smallest, and from the largest.
typedef struct quantile_pair {
    int64_t low, low_next, high, high_next;
    double  low_fraction, high_fraction;
} quantile_pair;

static quantile_pair quantiles_of(double fraction, int64_t n) {
    kvq_quantile_rank low = kvq_quantile_position(fraction / 2, n), high = kvq_quantile_position(1 - fraction / 2, n);
    int64_t           high_next = high.rank + 1 < n ? high.rank + 1 : n - 1;
    return (quantile_pair){low.rank,          low.rank + 1 < n ? low.rank + 1 : n - 1,
                           n - 1 - high.rank, n - 1 - high_next,
                           low.fraction,      high.fraction};
}

// ends [n_columns, N_ENDS, width], as packed.
static void by_channel(const kvq_tails *t, const float *ends, double fraction, float *lower, float *upper) {
    int64_t       width = kvq_tails_width(t);
    quantile_pair q = quantiles_of(fraction, t->n_rows);
    for (int64_t c = 0; c < t->n_columns; c++) {
        const float *smallest = ends + (c * N_ENDS + LOW) * width, *largest = ends + (c * N_ENDS + HIGH) * width;
        lower[c] = kvq_quantile_interpolate(smallest[q.low], smallest[q.low_next], q.low_fraction);
        upper[c] = kvq_quantile_interpolate(largest[q.high], largest[q.high_next], q.high_fraction);
    }
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// The values that all columns keep of one end, ascending: those at the end of the whole matrix are among them.
static void sort_end(const kvq_tails *t, const float *ends, int end, float *sorted) {
    int64_t width = kvq_tails_width(t);
    for (int64_t c = 0; c < t->n_columns; c++)
        memcpy(sorted + c * width, ends + (c * N_ENDS + end) * width, (size_t)width * sizeof *sorted);
    qsort(sorted, (size_t)(t->n_columns * width), sizeof *sorted, by_value);
}

static void by_matrix(const kvq_tails *t, const float *ends, float *sorted, double fraction, float *lower,
                      float *upper) {
    int64_t       width = kvq_tails_width(t), last = t->n_columns * width - 1;
    quantile_pair q = quantiles_of(fraction, t->n_rows * t->n_columns);
    sort_end(t, ends, LOW, sorted);
    float low = kvq_quantile_interpolate(sorted[q.low], sorted[q.low_next], q.low_fraction);
    sort_end(t, ends, HIGH, sorted);
    float high = kvq_quantile_interpolate(sorted[last - q.high], sorted[last - q.high_next], q.high_fraction);
    for (int64_t c = 0; c < t->n_columns; c++) {
        const float *smallest = ends + (c * N_ENDS + LOW) * width, *largest = ends + (c * N_ENDS + HIGH) * width;
        int64_t      i = 0, j = 0;
        while (i < width && smallest[i] < low) i++;
        while (j < width && largest[j] > high) j++;
        bool between = i < width && j < width && smallest[i] <= high && largest[j] >= low;
        lower[c] = between ? smallest[i] : smallest[0];
        upper[c] = between ? largest[j] : largest[0];
    }
}

static kvq_status check_enough(const kvq_tails *t, double fraction, kvq_scope scope, kvq_error *err) {
    int64_t needed = kvq_tails_needed(fraction, scope, t->n_columns, t->n_rows);
    if (t->n_rows < 1) {
        return kvq_fail(err, KVQ_ERR_INPUT, "use more or longer windows, or fewer sink tokens",
                        "thresholds: no rows are left to take them from");
    }
    if (needed <= kvq_tails_width(t)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERNAL, NULL,
                    "thresholds: %lld values are kept at either end, but %lld rows with an outlier share of %g need "
                    "%lld",
                    (long long)kvq_tails_width(t), (long long)t->n_rows, fraction, (long long)needed);
}

kvq_status kvq_tails_thresholds(const kvq_context *ctx, kvq_tails *t, double fraction, kvq_scope scope, float *lower,
                                float *upper, kvq_error *err) {
    int64_t    width = kvq_tails_width(t);
    float     *ends = NULL, *sorted = NULL;
    kvq_status status = check_fraction(fraction, err);
    if (status == KVQ_OK) status = check_enough(t, fraction, scope, err);
    if (status != KVQ_OK) return status;
    KVQ_TRY(KVQ_NEW(ctx, t->n_columns * N_ENDS * width, "extreme values", &ends, err));
    if (scope == KVQ_SCOPE_MATRIX) KVQ_TRY(KVQ_NEW(ctx, t->n_columns * width, "extreme values", &sorted, err));
    kvq_tails_pack(ctx, t, ends);
    if (scope == KVQ_SCOPE_MATRIX)
        by_matrix(t, ends, sorted, fraction, lower, upper);
    else
        by_channel(t, ends, fraction, lower, upper);
done:
    kvq_free(ctx, sorted);
    kvq_free(ctx, ends);
    return status;
}
