// SPDX-License-Identifier: Apache-2.0
//
// Each channel of K by itself. As in count.c in two steps: outliers are chosen among all channels of a row, in parallel
// over rows, which also finds whatever is wrong with one before anything is added; then each channel is added to its
// bins by one thread, a chunk of rows at a time.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define ROWS_PER_ITEM     64
#define CHANNELS_PER_ITEM 16 // a cache line of each row
#define BINS_PER_UNIT     (KVQ_CHANNEL_BINS / 2)

// ---------------------------------------------------------------- ownership

kvq_status kvq_channel_counts_create(const kvq_context *ctx, int d, kvq_channel_counts **out, kvq_error *err) {
    kvq_channel_counts *counts = NULL;
    kvq_status          status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "counts of channels", &counts, err));
    counts->d = d;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)d * KVQ_CHANNEL_BINS, "bins of channels", &counts->bins, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "squares of channels", &counts->wxx, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "points of channels", &counts->n_points, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "outliers of channels", &counts->n_outliers, err));
    *out = counts;
    counts = NULL;
done:
    kvq_channel_counts_destroy(ctx, &counts);
    return status;
}

void kvq_channel_counts_destroy(const kvq_context *ctx, kvq_channel_counts **counts) {
    if (*counts == NULL) return;
    kvq_free(ctx, (*counts)->bins);
    kvq_free(ctx, (*counts)->wxx);
    kvq_free(ctx, (*counts)->n_points);
    kvq_free(ctx, (*counts)->n_outliers);
    kvq_free(ctx, *counts);
    *counts = NULL;
}

#define BYTES_PER_CHANNEL                                                                                              \
    ((int64_t)(KVQ_CHANNEL_BINS * sizeof(kvq_bin) + sizeof(kvq_fixed) + 2 * sizeof(int64_t))) // of each array

int64_t kvq_channel_counts_bytes(int d) { return (int64_t)sizeof(kvq_channel_counts) + d * BYTES_PER_CHANNEL; }

// ---------------------------------------------------------------- as bytes

// The number of channels, then the arrays; of the bins those that are occupied.
static codebook_records records_of(const kvq_channel_counts *counts) {
    return codebook_bins(counts->bins, (int64_t)counts->d * KVQ_CHANNEL_BINS);
}

int64_t kvq_channel_counts_packed_bytes(const kvq_channel_counts *counts) {
    return (int64_t)sizeof(int64_t) + counts->d * (int64_t)(sizeof(kvq_fixed) + 2 * sizeof(int64_t)) +
           codebook_packed_bytes(records_of(counts));
}

void kvq_channel_counts_pack(const kvq_channel_counts *counts, uint8_t *out) {
    int64_t d = counts->d;
    out = codebook_put(out, &d, (int64_t)sizeof d);
    out = codebook_put(out, counts->wxx, d * (int64_t)sizeof *counts->wxx);
    out = codebook_put(out, counts->n_points, d * (int64_t)sizeof *counts->n_points);
    out = codebook_put(out, counts->n_outliers, d * (int64_t)sizeof *counts->n_outliers);
    (void)codebook_pack(records_of(counts), out);
}

static kvq_status merge_numbers(int64_t *into, int64_t n, codebook_reader *from, kvq_error *err) {
    for (int64_t i = 0; i < n; i++) {
        kvq_status status = codebook_merge_count(&into[i], from, err);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

kvq_status kvq_channel_counts_merge_packed(kvq_channel_counts *into, const uint8_t *packed, int64_t bytes,
                                           kvq_error *err) {
    codebook_reader from = codebook_read_from("count of channels", packed, bytes);
    int64_t         d = 0;
    kvq_fixed       wxx;
    kvq_status      status = KVQ_OK;
    KVQ_TRY(codebook_read(&from, &d, (int64_t)sizeof d, err));
    if (d != into->d) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "a saved count is of %lld channels instead of %d", (long long)d,
                         into->d));
    }
    for (int c = 0; c < into->d; c++) {
        KVQ_TRY(codebook_read(&from, &wxx, (int64_t)sizeof wxx, err));
        kvq_fixed_merge_positive(&into->wxx[c], wxx);
    }
    KVQ_TRY(merge_numbers(into->n_points, d, &from, err));
    KVQ_TRY(merge_numbers(into->n_outliers, d, &from, err));
    KVQ_TRY(codebook_merge_packed(records_of(into), &from, err));
    KVQ_TRY(codebook_read_end(&from, err));
done:
    return status;
}

// ---------------------------------------------------------------- what a fit sees

double codebook_take_bins(const kvq_bin *bins, int n, double per_unit, kvq_fixed wxx, float *w, float *x) {
    double about_means = 0;
    for (int i = 0; i < n; i++) {
        double sum = kvq_fixed_to_double(bins[i].w), moment = kvq_fixed_to_double(bins[i].wx);
        double mean = sum > 0 ? moment / sum : 0;
        w[i] = (float)(sum / CODEBOOK_CHANNEL_UNIT);
        x[i] = w[i] > 0 ? (float)codebook_mean_in_bin(mean, i, per_unit, n) : 0;
        about_means += mean * moment;
    }
    return fmax(kvq_fixed_to_double(wxx) - about_means, 0) / CODEBOOK_CHANNEL_UNIT;
}

kvq_status kvq_channel_distribution_take(const kvq_channel_counts *counts, kvq_channel_distribution *out,
                                         kvq_error *err) {
    for (int c = 0; c < counts->d; c++) {
        kvq_bin *bins = counts->bins + (int64_t)c * KVQ_CHANNEL_BINS;
        if (counts->wxx[c].hi >= 0 && !codebook_left_range(codebook_bins(bins, KVQ_CHANNEL_BINS))) continue;
        return kvq_fail(err, KVQ_ERR_NUMERICAL, "use fewer windows; a damaged checkpoint can also be the cause",
                        "K, channel %d: weights or weighted squares add up to more than 2^41", c);
    }
    for (int64_t c = 0; c < counts->d; c++) {
        int64_t at = c * KVQ_CHANNEL_BINS;
        out->scatter[c] = codebook_take_bins(counts->bins + at, KVQ_CHANNEL_BINS, BINS_PER_UNIT, counts->wxx[c],
                                             out->w + at, out->x + at);
        out->n_points[c] = counts->n_points[c];
        out->n_outliers[c] = counts->n_outliers[c];
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- checks

kvq_status codebook_check_count(const float *gradients, kvq_weighting weighting, int64_t n_rows, int64_t n_skip,
                                kvq_error *err) {
    if (n_rows < 0 || n_skip < 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld rows of which %lld are skipped", (long long)n_rows,
                        (long long)n_skip);
    }
    if (gradients != NULL || !kvq_weighting_needs_gradients(weighting)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "weights \"%s\" without gradients", kvq_weighting_names[weighting]);
}

kvq_status codebook_check_gradients(const float *gradients, int64_t d, int64_t position, kvq_error *err) {
    int64_t bad = kvq_find_nonfinite(gradients, d);
    if (bad < 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "position %lld, channel %lld has the gradient %g",
                    (long long)position, (long long)bad, (double)gradients[bad]);
}

kvq_status codebook_bad_channel_weight(int64_t position, int64_t channel, double w, double x2, kvq_error *err) {
    if (!(w < CODEBOOK_CHANNEL_WEIGHT)) {
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL,
                        "position %lld, channel %lld has weight %g, which is beyond the range of the sums",
                        (long long)position, (long long)channel, w);
    }
    return kvq_fail(err, KVQ_ERR_NUMERICAL,
                    "leave more sink tokens out, or use the weights fisher-scaled, which do not depend on the range",
                    "position %lld, channel %lld lies %g ranges away and has weight %g, which is together beyond the "
                    "range of the sums",
                    (long long)position, (long long)channel, sqrt(x2), w);
}

// ---------------------------------------------------------------- counting

typedef struct channel_job {
    const kvq_block_spec *spec;
    const float          *x, *gradients; // gradients NULL when not needed
    kvq_weighting         weighting;
    int64_t               first, end; // rows
    uint8_t              *apart;      // [n_rows, apart_bytes] a bit for each outlier; NULL when there are none
    int64_t               apart_bytes;
    kvq_channel_counts   *counts;
    _Atomic int64_t       first_failed; // item, or the number of items
} channel_job;

static bool is_apart(const channel_job *job, int64_t row, int c) {
    return job->apart != NULL && (job->apart[row * job->apart_bytes + c / 8] >> c % 8 & 1) != 0;
}

static double weight_of(const channel_job *job, int64_t row, int c) {
    double gradient = job->gradients != NULL ? (double)job->gradients[row * job->spec->d + c] : 0;
    return codebook_channel_weight(job->weighting, gradient, (double)job->spec->r[c]);
}

static float position_of(const channel_job *job, int64_t row, int c) {
    return kvq_count_quotient(job->x[row * job->spec->d + c], job->spec->z[c], job->spec->r[c]);
}

static void mark(uint8_t *bits, const uint16_t *channels, int n) {
    for (int i = 0; i < n; i++) bits[channels[i] / 8] |= (uint8_t)(1u << channels[i] % 8);
}

static void mark_outliers(const channel_job *job, int64_t row, kvq_block_scratch *w) {
    if (job->apart == NULL) return;
    kvq_block_select_k(job->spec, job->x + row * job->spec->d, w);
    mark(job->apart + row * job->apart_bytes, w->upper_channel, w->n_upper);
    mark(job->apart + row * job->apart_bytes, w->lower_channel, w->n_lower);
}

static kvq_status check_weights(const channel_job *job, int64_t row, kvq_error *err) {
    for (int c = 0; c < job->spec->d; c++) {
        if (!(job->spec->r[c] > 0) || is_apart(job, row, c)) continue;
        double x = (double)position_of(job, row, c), w = weight_of(job, row, c);
        if (!codebook_channel_weight_fits(w, x * x)) return codebook_bad_channel_weight(row, c, w, x * x, err);
    }
    return KVQ_OK;
}

static kvq_status prepare_rows(const channel_job *job, int64_t item, kvq_error *err) {
    int64_t            first = job->first + item * ROWS_PER_ITEM, d = job->spec->d;
    int64_t            end = first + ROWS_PER_ITEM < job->end ? first + ROWS_PER_ITEM : job->end;
    codebook_selection select;
    kvq_status         status = KVQ_OK;
    codebook_selection_init(&select);
    for (int64_t row = first; row < end; row++) {
        status = codebook_check_row(job->x + row * d, (int)d, err);
        if (status != KVQ_OK) kvq_error_prefix(err, "position %lld: ", (long long)row);
        KVQ_TRY(status);
        if (job->gradients != NULL) KVQ_TRY(codebook_check_gradients(job->gradients + row * d, d, row, err));
        mark_outliers(job, row, &select.scratch);
        KVQ_TRY(check_weights(job, row, err));
    }
done:
    return status;
}

static void try_prepare(void *user, int64_t item, int worker) {
    (void)worker;
    if (prepare_rows(user, item, NULL) != KVQ_OK) codebook_note_failure(&((channel_job *)user)->first_failed, item);
}

static void add_rows(const channel_job *job, int c, int64_t first, int64_t end, codebook_chunk *chunk) {
    kvq_channel_counts *counts = job->counts;
    int                 n = 0;
    for (int64_t row = first; row < end; row++) {
        if (is_apart(job, row, c)) continue;
        float x = position_of(job, row, c);
        chunk->x[n] = (double)x;
        chunk->bin[n] = codebook_bin_of(x, BINS_PER_UNIT, KVQ_CHANNEL_BINS);
        chunk->w[n++] = weight_of(job, row, c) * CODEBOOK_CHANNEL_UNIT;
    }
    chunk->n = n;
    codebook_add_chunk(chunk, counts->bins + (int64_t)c * KVQ_CHANNEL_BINS, &counts->wxx[c]);
    counts->n_points[c] += n;
    counts->n_outliers[c] += end - first - n;
}

static void add_channels(void *user, int64_t item, int worker) {
    const channel_job *job = user;
    int                first = (int)item * CHANNELS_PER_ITEM, d = job->spec->d;
    int                end = first + CHANNELS_PER_ITEM < d ? first + CHANNELS_PER_ITEM : d;
    codebook_chunk     chunk;
    (void)worker;
    for (int64_t row = job->first; row < job->end; row += CODEBOOK_CHUNK) {
        int64_t behind = row + CODEBOOK_CHUNK < job->end ? row + CODEBOOK_CHUNK : job->end;
        for (int c = first; c < end; c++) {
            if (job->spec->r[c] > 0) add_rows(job, c, row, behind, &chunk);
        }
    }
}

static kvq_status check_channels(const channel_job *job, kvq_error *err) {
    const kvq_block_spec *spec = job->spec;
    if (spec->z == NULL || spec->r == NULL || spec->d != job->counts->d) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "counts of %d channels, ranges of %d", job->counts->d,
                        spec->r != NULL ? spec->d : 0);
    }
    return kvq_count_check(spec, 1, err);
}

kvq_status kvq_count_channels(const kvq_context *ctx, const kvq_block_spec *spec, const float *x,
                              const float *gradients, kvq_weighting weighting, int64_t n_rows, int64_t n_skip,
                              kvq_channel_counts *counts, kvq_error *err) {
    channel_job job = {.spec = spec, .x = x, .weighting = weighting, .first = n_skip, .end = n_rows, .counts = counts};
    int64_t     n_items = n_rows > n_skip ? (n_rows - n_skip + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM : 0;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(codebook_check_count(gradients, weighting, n_rows, n_skip, err));
    KVQ_TRY(check_channels(&job, err));
    if (kvq_weighting_needs_gradients(weighting)) job.gradients = gradients;
    job.apart_bytes = (spec->d + 7) / 8;
    if (spec->n_side > 0) KVQ_TRY(KVQ_NEW(ctx, n_rows * job.apart_bytes, "marks of outliers", &job.apart, err));
    atomic_store(&job.first_failed, n_items);
    kvq_parallel_for(ctx, n_items, try_prepare, &job);
    int64_t failed = atomic_load(&job.first_failed);
    if (failed < n_items) KVQ_TRY(prepare_rows(&job, failed, err)); // once more, for its message
    if (n_items > 0) kvq_parallel_for(ctx, (spec->d + CHANNELS_PER_ITEM - 1) / CHANNELS_PER_ITEM, add_channels, &job);
done:
    if (status != KVQ_OK) kvq_error_prefix(err, status == KVQ_ERR_NUMERICAL ? "K, " : "K: ");
    kvq_free(ctx, job.apart);
    return status;
}
