// SPDX-License-Identifier: Apache-2.0
//
// Exact quantiles of the columns of a matrix that need not fit into memory: radix selection. Sorting would need all
// values at once; here each pass counts one digit of the values that agree with a wanted one in all higher digits, so
// three passes over the data pin down every bit, and counts from blocks, threads or processes simply add up.
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"

// Images have 32 bits, so the digits are 11 + 11 + 10 of them: 2^11 counters of 4 bytes stay in the fast caches.
#define PASS_BINS 2048

typedef struct radix_digit {
    uint32_t above; // mask of the digits known before this pass
    int      shift;
    uint32_t mask;
} radix_digit;

static const radix_digit DIGITS[KVQ_RADIX_PASSES] = {{0, 21, 0x7ff}, {0xffe00000u, 10, 0x7ff}, {0xfffffc00u, 0, 0x3ff}};

// What is known of one rank in one column.
typedef struct target {
    int64_t  rank;   // among the values that share the prefix
    uint32_t prefix; // known high digits, the rest zero; the whole image in the end
    int      slot;   // which watched prefix of its column that is: ranks with equal prefixes share one histogram
} target;

struct kvq_radix {
    int64_t   n_columns;
    int       n_ranks, pass;
    int64_t   n_rows, n_rows_first; // pushed in this pass, and in the first one
    target   *targets;              // [n_columns, n_ranks]
    uint32_t *watched;   // [n_columns, n_ranks] distinct prefixes; the first n_watched of a column are in use
    int      *n_watched; // [n_columns]
    uint32_t *counts;    // [n_columns, n_ranks (slot), PASS_BINS]
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

kvq_status kvq_radix_create(const kvq_context *ctx, int64_t n_columns, const int64_t *ranks, int n_ranks,
                            kvq_radix **out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    kvq_radix *radix = NULL;
    if (n_columns < 1 || n_ranks < 1 || n_columns > INT64_MAX / PASS_BINS / n_ranks) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "quantiles of %lld columns at %d ranks", (long long)n_columns,
                        n_ranks);
    }
    for (int i = 0; i < n_ranks; i++) {
        if (ranks[i] < 0) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "rank %d is %lld", i, (long long)ranks[i]);
    }
    KVQ_TRY(KVQ_NEW(ctx, 1, "quantile state", &radix, err));
    radix->n_columns = n_columns;
    radix->n_ranks = n_ranks;
    KVQ_TRY(KVQ_NEW(ctx, n_columns * n_ranks, "quantile targets", &radix->targets, err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns * n_ranks, "quantile prefixes", &radix->watched, err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns, "quantile prefix counts", &radix->n_watched, err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns * n_ranks * PASS_BINS, "quantile histograms", &radix->counts, err));
    for (int64_t column = 0; column < n_columns; column++) {
        for (int i = 0; i < n_ranks; i++) radix->targets[column * n_ranks + i].rank = ranks[i];
        radix->n_watched[column] = 1; // the empty prefix, shared by all
    }
    *out = radix;
    radix = NULL;
done:
    kvq_radix_destroy(ctx, &radix);
    return status;
}

void kvq_radix_destroy(const kvq_context *ctx, kvq_radix **radix) {
    if (*radix == NULL) return;
    kvq_free(ctx, (*radix)->targets);
    kvq_free(ctx, (*radix)->watched);
    kvq_free(ctx, (*radix)->n_watched);
    kvq_free(ctx, (*radix)->counts);
    kvq_free(ctx, *radix);
    *radix = NULL;
}

// ---------------------------------------------------------------- counting

typedef struct push_job {
    kvq_radix   *radix;
    const float *x; // [n_rows, n_columns]
    int64_t      n_rows, columns_per_item;
} push_job;

// Counts a block of columns; blocks share no counter. Rows are the outer loop because memory likes to be read in order.
static void push_columns(void *user, int64_t item, int worker) {
    const push_job    *job = user;
    kvq_radix         *radix = job->radix;
    const radix_digit *digit = &DIGITS[radix->pass];
    int64_t            first = item * job->columns_per_item, end = first + job->columns_per_item;
    (void)worker;
    if (end > radix->n_columns) end = radix->n_columns;
    for (int64_t row = 0; row < job->n_rows; row++) {
        const float *x = job->x + row * radix->n_columns;
        for (int64_t column = first; column < end; column++) {
            const uint32_t *watched = radix->watched + column * radix->n_ranks;
            uint32_t        image = image_of(x[column]), prefix = image & digit->above;
            int             slot = 0, n_watched = radix->n_watched[column];
            while (slot < n_watched && watched[slot] != prefix) slot++;
            if (slot == n_watched) continue;
            radix->counts[(column * radix->n_ranks + slot) * PASS_BINS + ((image >> digit->shift) & digit->mask)]++;
        }
    }
}

// One item per thread: each reads one stretch of every row, as long as possible. Counts do not depend on the cut.
void kvq_radix_push(const kvq_context *ctx, kvq_radix *radix, const float *x, int64_t n_rows) {
    int64_t  n_items = ctx->n_threads > 1 ? ctx->n_threads : 1;
    push_job job = {radix, x, n_rows, (radix->n_columns + n_items - 1) / n_items};
    radix->n_rows += n_rows;
    if (radix->pass < KVQ_RADIX_PASSES) kvq_parallel_for(ctx, n_items, push_columns, &job);
}

// ---------------------------------------------------------------- between passes

// Finds the next digit of a target in its histogram; false when the histogram holds too few values, which happens only
// when the passes saw different data.
static bool narrow(target *t, const uint32_t *counts, const radix_digit *digit) {
    for (uint32_t bin = 0; bin <= digit->mask; bin++) {
        if (t->rank < counts[bin]) {
            t->prefix |= bin << digit->shift;
            return true;
        }
        t->rank -= counts[bin];
    }
    return false;
}

// Lists the distinct prefixes of a column's targets and clears their histograms.
static void watch(kvq_radix *radix, int64_t column) {
    target   *targets = radix->targets + column * radix->n_ranks;
    uint32_t *watched = radix->watched + column * radix->n_ranks;
    int       n = 0;
    for (int i = 0; i < radix->n_ranks; i++) {
        int slot = 0;
        while (slot < n && watched[slot] != targets[i].prefix) slot++;
        if (slot == n) watched[n++] = targets[i].prefix;
        targets[i].slot = slot;
    }
    radix->n_watched[column] = n;
    memset(radix->counts + column * radix->n_ranks * PASS_BINS, 0, (size_t)n * PASS_BINS * sizeof *radix->counts);
}

kvq_status kvq_radix_end_pass(kvq_radix *radix, kvq_error *err) {
    if (radix->pass == KVQ_RADIX_PASSES)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "quantiles: a fourth pass was ended");
    if (radix->n_rows > (int64_t)UINT32_MAX) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use fewer or shorter windows",
                        "quantiles of %lld rows; at most %lld can be counted", (long long)radix->n_rows,
                        (long long)UINT32_MAX);
    }
    if (radix->pass > 0 && radix->n_rows != radix->n_rows_first) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "quantiles: pass %d had %lld rows, the first one %lld",
                        radix->pass + 1, (long long)radix->n_rows, (long long)radix->n_rows_first);
    }
    for (int i = 0; i < radix->n_ranks && radix->pass == 0; i++) {
        if (radix->targets[i].rank < radix->n_rows) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "quantiles: rank %lld was asked for, but there are only %lld rows",
                        (long long)radix->targets[i].rank, (long long)radix->n_rows);
    }
    for (int64_t column = 0; column < radix->n_columns; column++) {
        for (int i = 0; i < radix->n_ranks; i++) {
            target *t = radix->targets + column * radix->n_ranks + i;
            if (narrow(t, radix->counts + (column * radix->n_ranks + t->slot) * PASS_BINS, &DIGITS[radix->pass]))
                continue;
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "quantiles: column %lld was not the same in pass %d as before",
                            (long long)column, radix->pass + 1);
        }
        watch(radix, column);
    }
    radix->n_rows_first = radix->n_rows;
    radix->n_rows = 0;
    radix->pass++;
    return KVQ_OK;
}

float kvq_radix_value(const kvq_radix *radix, int64_t column, int rank_index) {
    return value_of(radix->targets[column * radix->n_ranks + rank_index].prefix);
}

// ---------------------------------------------------------------- quantiles and thresholds

kvq_quantile_rank kvq_quantile_position(double q, int64_t n) {
    double            position = q * (double)(n - 1), whole = floor(position);
    kvq_quantile_rank rank = {(int64_t)whole, position - whole};
    return rank;
}

float kvq_quantile_interpolate(float low, float high, double fraction) {
    return (float)((double)low + fraction * ((double)high - (double)low));
}

static kvq_status check_finite(const float *x, int64_t n_rows, int64_t n_columns, kvq_error *err) {
    int64_t i = kvq_find_nonfinite(x, n_rows * n_columns);
    if (i < 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "thresholds: row %lld, channel %lld is %g",
                    (long long)(i / n_columns), (long long)(i % n_columns), (double)x[i]);
}

kvq_status kvq_thresholds(const kvq_context *ctx, const float *x, int64_t n_rows, int64_t n_columns, double fraction,
                          float *lower, float *upper, kvq_error *err) {
    kvq_status status = KVQ_OK;
    kvq_radix *radix = NULL;
    if (!(fraction >= 0 && fraction < 1)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose a share from 0 up to, but not including, 1", "outlier share %g",
                        fraction);
    }
    if (n_rows < 1) {
        return kvq_fail(err, KVQ_ERR_INPUT, "use more or longer windows, or fewer sink tokens",
                        "thresholds: %lld rows are left to take them from", (long long)n_rows);
    }
    KVQ_TRY(check_finite(x, n_rows, n_columns, err));
    kvq_quantile_rank at[2] = {kvq_quantile_position(fraction / 2, n_rows),
                               kvq_quantile_position(1 - fraction / 2, n_rows)};
    int64_t           ranks[4];
    for (int side = 0; side < 2; side++) {
        ranks[2 * side] = at[side].rank;
        ranks[2 * side + 1] = at[side].rank + 1 < n_rows ? at[side].rank + 1 : n_rows - 1;
    }
    KVQ_TRY(kvq_radix_create(ctx, n_columns, ranks, 4, &radix, err));
    for (int pass = 0; pass < KVQ_RADIX_PASSES; pass++) {
        kvq_radix_push(ctx, radix, x, n_rows);
        KVQ_TRY(kvq_radix_end_pass(radix, err));
    }
    for (int64_t c = 0; c < n_columns; c++) {
        lower[c] = kvq_quantile_interpolate(kvq_radix_value(radix, c, 0), kvq_radix_value(radix, c, 1), at[0].fraction);
        upper[c] = kvq_quantile_interpolate(kvq_radix_value(radix, c, 2), kvq_radix_value(radix, c, 3), at[1].fraction);
    }
done:
    kvq_radix_destroy(ctx, &radix);
    return status;
}
