// SPDX-License-Identifier: Apache-2.0
//
// Values after their rotation, in units of their scale, one by one and in pairs. All heads add to the same bins and
// cells, which are too large to have one set of each thread. So a slab of rows is rotated in parallel, by the codec's
// own rule, and then one thread adds it to the bins and another one to the cells.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define SLAB_ROWS      256 // scratch: two floats an element
#define ROWS_PER_ITEM  8
#define N_CELLS        ((int64_t)KVQ_PAIR_CELLS * KVQ_PAIR_CELLS)
#define BINS_PER_UNIT  (KVQ_HISTOGRAM_BINS / 2 / KVQ_VALUE_REACH)
#define CELLS_PER_UNIT (KVQ_PAIR_CELLS / 2 / KVQ_PAIR_REACH)

// ---------------------------------------------------------------- ownership

kvq_status kvq_value_counts_create(const kvq_context *ctx, kvq_value_counts **out, kvq_error *err) {
    kvq_value_counts *counts = NULL;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "counts of rotated values", &counts, err));
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "bins of rotated values", &counts->bins, err));
    KVQ_TRY(KVQ_NEW(ctx, N_CELLS, "cells of rotated values", &counts->cells, err));
    *out = counts;
    counts = NULL;
done:
    kvq_value_counts_destroy(ctx, &counts);
    return status;
}

void kvq_value_counts_destroy(const kvq_context *ctx, kvq_value_counts **counts) {
    if (*counts == NULL) return;
    kvq_free(ctx, (*counts)->bins);
    kvq_free(ctx, (*counts)->cells);
    kvq_free(ctx, *counts);
    *counts = NULL;
}

int64_t kvq_value_counts_bytes(void) {
    return (int64_t)(sizeof(kvq_value_counts) + KVQ_HISTOGRAM_BINS * sizeof(kvq_bin)) +
           N_CELLS * (int64_t)sizeof(kvq_cell);
}

// ---------------------------------------------------------------- as bytes

static codebook_records bins_of(const kvq_value_counts *counts) {
    return codebook_bins(counts->bins, KVQ_HISTOGRAM_BINS);
}

static codebook_records cells_of(const kvq_value_counts *counts) {
    return (codebook_records){&counts->cells->w, N_CELLS, 3};
}

int64_t kvq_value_counts_packed_bytes(const kvq_value_counts *counts) {
    return (int64_t)(2 * sizeof(kvq_fixed) + sizeof(int64_t)) + codebook_packed_bytes(bins_of(counts)) +
           codebook_packed_bytes(cells_of(counts));
}

void kvq_value_counts_pack(const kvq_value_counts *counts, uint8_t *out) {
    out = codebook_put(out, &counts->wxx, (int64_t)sizeof counts->wxx);
    out = codebook_put(out, &counts->pair_wxx, (int64_t)sizeof counts->pair_wxx);
    out = codebook_put(out, &counts->n_points, (int64_t)sizeof counts->n_points);
    out = codebook_pack(bins_of(counts), out);
    (void)codebook_pack(cells_of(counts), out);
}

kvq_status kvq_value_counts_merge_packed(kvq_value_counts *into, const uint8_t *packed, int64_t bytes, kvq_error *err) {
    codebook_reader from = codebook_read_from("count of values", packed, bytes);
    kvq_fixed       squares[2];
    kvq_status      status = KVQ_OK;
    KVQ_TRY(codebook_read(&from, squares, (int64_t)sizeof squares, err));
    KVQ_TRY(codebook_merge_count(&into->n_points, &from, err));
    KVQ_TRY(codebook_merge_packed(bins_of(into), &from, err));
    KVQ_TRY(codebook_merge_packed(cells_of(into), &from, err));
    KVQ_TRY(codebook_read_end(&from, err));
    kvq_fixed_merge_positive(&into->wxx, squares[0]);
    kvq_fixed_merge_positive(&into->pair_wxx, squares[1]);
done:
    return status;
}

// ---------------------------------------------------------------- what a fit sees

// As codebook_take_bins.
static double take_cells(const kvq_cell *cells, kvq_fixed wxx, kvq_value_distribution *out) {
    double about_means = 0;
    for (int i = 0; i < N_CELLS; i++) {
        double sum = kvq_fixed_to_double(cells[i].w);
        double mx = kvq_fixed_to_double(cells[i].wx), my = kvq_fixed_to_double(cells[i].wy);
        double x = sum > 0 ? mx / sum : 0, y = sum > 0 ? my / sum : 0;
        out->pair_w[i] = (float)(sum / CODEBOOK_CHANNEL_UNIT);
        bool counted = out->pair_w[i] > 0;
        out->pair_x[i] =
            counted ? (float)codebook_mean_in_bin(x, i / KVQ_PAIR_CELLS, CELLS_PER_UNIT, KVQ_PAIR_CELLS) : 0;
        out->pair_y[i] =
            counted ? (float)codebook_mean_in_bin(y, i % KVQ_PAIR_CELLS, CELLS_PER_UNIT, KVQ_PAIR_CELLS) : 0;
        about_means += x * mx + y * my;
    }
    return fmax(kvq_fixed_to_double(wxx) - about_means, 0) / CODEBOOK_CHANNEL_UNIT;
}

kvq_status kvq_value_distribution_take(const kvq_value_counts *counts, kvq_value_distribution *out, kvq_error *err) {
    if (counts->wxx.hi < 0 || counts->pair_wxx.hi < 0 || codebook_left_range(bins_of(counts)) ||
        codebook_left_range(cells_of(counts))) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, "use fewer windows; a damaged checkpoint can also be the cause",
                        "V: weights or weighted squares add up to more than 2^41");
    }
    out->scatter[0] = codebook_take_bins(counts->bins, KVQ_HISTOGRAM_BINS, BINS_PER_UNIT, counts->wxx, out->w, out->x);
    out->scatter[1] = take_cells(counts->cells, counts->pair_wxx, out);
    *out->n_points = counts->n_points;
    return KVQ_OK;
}

// Nearest in the ratio: 2^(2e - 1) <= mean square < 2^(2e + 1). frexp, unlike log2, is exact everywhere. The limits
// keep 2^e and 2^-e far inside f32.
int kvq_scale_exponent(double mean_square) {
    static const int LIMIT = 100;
    int              exponent = 0;
    if (!(mean_square > 0) || !isfinite(mean_square)) return 0;
    (void)frexp(mean_square, &exponent); // mean square in [2^(exponent - 1), 2^exponent)
    int e = exponent >= 0 ? exponent / 2 : -((1 - exponent) / 2);
    return e > LIMIT ? LIMIT : e < -LIMIT ? -LIMIT : e;
}

// ---------------------------------------------------------------- rows

// A slab of rows [first, end): y in units of the scale, gradients and scales after rotation.
typedef struct value_job {
    const kvq_tile_spec *spec;
    const float         *x, *gradients; // gradients NULL when not needed
    kvq_weighting        weighting;
    int64_t              first, end;
    int                  n_heads;
    float               *transposed; // R^T [head_dim, head_dim]
    float               *y, *g;      // [SLAB_ROWS, d]; g zeros when not needed
    float               *scale;      // [SLAB_ROWS, n_heads]
    kvq_value_counts    *counts;
    _Atomic int64_t      first_failed; // item, or the number of items
} value_job;

// The sums over j of R_ij x_j in the order of j, of all i at once.
static void rotate(const float *transposed, int n, const float *restrict x, float *restrict y) {
    for (int i = 0; i < n; i++) y[i] = 0;
    for (int j = 0; j < n; j++) {
        const float *restrict row = transposed + (int64_t)j * n;
        for (int i = 0; i < n; i++) y[i] += row[i] * x[j];
    }
}

static double weight_of(const value_job *job, float g, float scale) {
    return codebook_channel_weight(job->weighting, (double)g, (double)scale);
}

static kvq_status check_weights(const value_job *job, int64_t row, int head, const float *y, const float *g,
                                float scale, kvq_error *err) {
    int    n = job->spec->head_dim;
    double w_before = 0, x2_before = 0;
    for (int i = 0; i < n; i++) {
        double w = weight_of(job, g[i], scale), x2 = (double)y[i] * (double)y[i];
        if (!codebook_channel_weight_fits(w, x2))
            return codebook_bad_channel_weight(row, (int64_t)head * n + i, w, x2, err);
        if (i % 2 == 1 && !codebook_channel_weight_fits((w + w_before) / 2, x2 + x2_before))
            return codebook_bad_channel_weight(row, (int64_t)head * n + i, (w + w_before) / 2, x2 + x2_before, err);
        w_before = w;
        x2_before = x2;
    }
    return KVQ_OK;
}

static kvq_status prepare_head(const value_job *job, int64_t row, int head, kvq_error *err) {
    int64_t n = job->spec->head_dim, d = job->spec->d, at = (row - job->first) * d + head * n;
    float  *y = job->y + at, *g = job->g + at, *scale = &job->scale[(row - job->first) * job->n_heads + head];
    if (!kvq_tile_normalise_values(job->spec, job->x + row * d + head * n, y, scale)) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "position %lld, head %d: the scale of its values exceeds f16",
                        (long long)row, head);
    }
    if (job->gradients != NULL) rotate(job->transposed, (int)n, job->gradients + row * d + head * n, g);
    if (kvq_find_nonfinite(y, n) >= 0 || !isfinite(*scale) || kvq_find_nonfinite(g, n) >= 0) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "position %lld, head %d: rotated, it leaves the range of f32",
                        (long long)row, head);
    }
    return *scale > 0 ? check_weights(job, row, head, y, g, *scale, err) : KVQ_OK;
}

static kvq_status prepare_rows(const value_job *job, int64_t item, kvq_error *err) {
    int64_t    first = job->first + item * ROWS_PER_ITEM, d = job->spec->d;
    int64_t    end = first + ROWS_PER_ITEM < job->end ? first + ROWS_PER_ITEM : job->end;
    kvq_status status = KVQ_OK;
    for (int64_t row = first; row < end; row++) {
        status = codebook_check_row(job->x + row * d, (int)d, err);
        if (status != KVQ_OK) kvq_error_prefix(err, "position %lld: ", (long long)row);
        KVQ_TRY(status);
        if (job->gradients != NULL) KVQ_TRY(codebook_check_gradients(job->gradients + row * d, d, row, err));
        for (int head = 0; head < job->n_heads; head++) KVQ_TRY(prepare_head(job, row, head, err));
    }
done:
    return status;
}

static void try_prepare(void *user, int64_t item, int worker) {
    (void)worker;
    if (prepare_rows(user, item, NULL) != KVQ_OK) codebook_note_failure(&((value_job *)user)->first_failed, item);
}

// ---------------------------------------------------------------- adding

// What is added together lies side by side: the channels of one head of one row.
typedef struct value_run {
    const float *y, *g;
    float        scale;
} value_run;

static int64_t n_runs(const value_job *job) { return (job->end - job->first) * job->n_heads; }

static value_run run_of(const value_job *job, int64_t run) {
    int64_t at = run * job->spec->head_dim;
    return (value_run){job->y + at, job->g + at, job->scale[run]};
}

static void flush_elements(codebook_chunk *c, kvq_value_counts *counts) {
    codebook_add_chunk(c, counts->bins, &counts->wxx);
    counts->n_points += c->n;
    c->n = 0;
}

static void add_to_bins(const value_job *job) {
    codebook_chunk chunk;
    chunk.n = 0;
    for (int64_t run = 0; run < n_runs(job); run++) {
        value_run r = run_of(job, run);
        for (int i = 0; i < job->spec->head_dim && r.scale > 0; i++) {
            chunk.x[chunk.n] = (double)r.y[i];
            chunk.bin[chunk.n] = codebook_bin_of(r.y[i], BINS_PER_UNIT, KVQ_HISTOGRAM_BINS);
            chunk.w[chunk.n] = weight_of(job, r.g[i], r.scale) * CODEBOOK_CHANNEL_UNIT;
            if (++chunk.n == CODEBOOK_CHUNK) flush_elements(&chunk, job->counts);
        }
    }
    flush_elements(&chunk, job->counts);
}

typedef struct pair_chunk {
    int      n;
    int      cell[CODEBOOK_CHUNK];
    double   w[CODEBOOK_CHUNK], wx[CODEBOOK_CHUNK], wy[CODEBOOK_CHUNK], square[CODEBOOK_CHUNK];
    uint64_t lo[3][CODEBOOK_CHUNK], hi[3][CODEBOOK_CHUNK]; // of w, wx, wy as the halves of kvq_fixed
} pair_chunk;

static void flush_pairs(pair_chunk *c, kvq_value_counts *counts) {
    codebook_to_fixed(c->w, c->n, c->lo[0], c->hi[0]);
    codebook_to_signed_fixed(c->wx, c->n, c->lo[1], c->hi[1]);
    codebook_to_signed_fixed(c->wy, c->n, c->lo[2], c->hi[2]);
    for (int i = 0; i < c->n; i++) {
        kvq_cell *cell = &counts->cells[c->cell[i]];
        kvq_fixed wx = {c->lo[1][i], (int64_t)c->hi[1][i]}, wy = {c->lo[2][i], (int64_t)c->hi[2][i]};
        kvq_fixed_merge_positive(&cell->w, (kvq_fixed){c->lo[0][i], (int64_t)c->hi[0][i]});
        kvq_fixed_merge(&cell->wx, wx);
        kvq_fixed_merge(&cell->wy, wy);
    }
    codebook_add_sum(&counts->pair_wxx, c->square, c->n);
    c->n = 0;
}

static void add_pair(pair_chunk *c, const float *at, double w, kvq_value_counts *counts) {
    double x = (double)at[0], y = (double)at[1];
    c->cell[c->n] = codebook_bin_of(at[0], CELLS_PER_UNIT, KVQ_PAIR_CELLS) * KVQ_PAIR_CELLS +
                    codebook_bin_of(at[1], CELLS_PER_UNIT, KVQ_PAIR_CELLS);
    c->w[c->n] = w;
    c->wx[c->n] = w * x;
    c->wy[c->n] = w * y;
    c->square[c->n] = w * (x * x + y * y);
    if (++c->n == CODEBOOK_CHUNK) flush_pairs(c, counts);
}

// A head of an odd number of channels has no pairs: the format could not code them.
static void add_to_cells(const value_job *job) {
    int        n = job->spec->head_dim;
    pair_chunk chunk;
    chunk.n = 0;
    for (int64_t run = 0; run < n_runs(job) && n % 2 == 0; run++) {
        value_run r = run_of(job, run);
        for (int i = 0; i < n && r.scale > 0; i += 2) {
            double w = (weight_of(job, r.g[i], r.scale) + weight_of(job, r.g[i + 1], r.scale)) / 2;
            add_pair(&chunk, r.y + i, w * CODEBOOK_CHANNEL_UNIT, job->counts);
        }
    }
    flush_pairs(&chunk, job->counts);
}

static void add_slab(void *user, int64_t item, int worker) {
    static void (*const ADD[])(const value_job *) = {add_to_bins, add_to_cells};
    (void)worker;
    ADD[item](user);
}

// ---------------------------------------------------------------- all of it

static kvq_status allocate(const kvq_context *ctx, value_job *job, kvq_error *err) {
    int64_t    n = job->spec->head_dim, d = job->spec->d;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, n * n, "transposed rotation", &job->transposed, err));
    KVQ_TRY(KVQ_NEW(ctx, SLAB_ROWS * d, "rotated values", &job->y, err));
    KVQ_TRY(KVQ_NEW(ctx, SLAB_ROWS * d, "rotated gradients", &job->g, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)SLAB_ROWS * job->n_heads, "scales of values", &job->scale, err));
    for (int64_t i = 0; i < n * n; i++) job->transposed[i % n * n + i / n] = job->spec->rotation[i];
done:
    return status;
}

static kvq_status count_slab(const kvq_context *ctx, value_job *job, kvq_error *err) {
    int64_t n_items = (job->end - job->first + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
    atomic_store(&job->first_failed, n_items);
    kvq_parallel_for(ctx, n_items, try_prepare, job);
    int64_t failed = atomic_load(&job->first_failed);
    if (failed < n_items) return prepare_rows(job, failed, err); // once more, for its message
    kvq_parallel_for(ctx, 2, add_slab, job);
    return KVQ_OK;
}

static kvq_status check_heads(const kvq_tile_spec *spec, kvq_error *err) {
    if (spec->head_dim >= 1 && spec->head_dim <= KVQ_TILE_MAX_HEAD_DIM && spec->d >= 1 && spec->d % spec->head_dim == 0)
        return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%d channels of heads of %d", spec->d, spec->head_dim);
}

kvq_status kvq_count_values(const kvq_context *ctx, const kvq_tile_spec *spec, const float *x, const float *gradients,
                            kvq_weighting weighting, int64_t n_rows, int64_t n_skip, kvq_value_counts *counts,
                            kvq_error *err) {
    value_job  job = {.spec = spec, .x = x, .weighting = weighting, .counts = counts};
    kvq_status status = KVQ_OK;
    KVQ_TRY(codebook_check_count(gradients, weighting, n_rows, n_skip, err));
    KVQ_TRY(check_heads(spec, err));
    job.n_heads = spec->d / spec->head_dim;
    if (kvq_weighting_needs_gradients(weighting)) job.gradients = gradients;
    KVQ_TRY(allocate(ctx, &job, err));
    for (int64_t first = n_skip; first < n_rows; first += SLAB_ROWS) {
        job.first = first;
        job.end = first + SLAB_ROWS < n_rows ? first + SLAB_ROWS : n_rows;
        KVQ_TRY(count_slab(ctx, &job, err));
    }
done:
    if (status != KVQ_OK) kvq_error_prefix(err, status == KVQ_ERR_NUMERICAL ? "V, " : "V: ");
    kvq_free(ctx, job.scale);
    kvq_free(ctx, job.g);
    kvq_free(ctx, job.y);
    kvq_free(ctx, job.transposed);
    return status;
}
