// SPDX-License-Identifier: Apache-2.0
//
// Private to the folder: what counting, fit and k-means share.
#ifndef KVQ_CODEBOOK_IMPL_H
#define KVQ_CODEBOOK_IMPL_H

#include <float.h>
#include <stdatomic.h>

#include "kvq_codebook.h"

#define CODEBOOK_BIN_WIDTH (2.0 / KVQ_HISTOGRAM_BINS)
static inline double codebook_bin_edge(int64_t bin) { return (double)bin * CODEBOOK_BIN_WIDTH - 1; }

// sum w (x - nearest level)^2 over n ascending points and k ascending levels.
double codebook_cost(const kvq_weighted_point *points, int64_t n, const double *levels, int k);

// ---------------------------------------------------------------- fixed point by the chunk (accumulate.c)

#define CODEBOOK_CHUNK 256 // sums of as many limbs stay far below 64 bits

typedef struct codebook_chunk {
    int      n;
    int      bin[CODEBOOK_CHUNK];
    double   x[CODEBOOK_CHUNK], w[CODEBOOK_CHUNK], wx[CODEBOOK_CHUNK], square[CODEBOOK_CHUNK];
    uint64_t w_lo[CODEBOOK_CHUNK], w_hi[CODEBOOK_CHUNK], wx_lo[CODEBOOK_CHUNK], wx_hi[CODEBOOK_CHUNK];
} codebook_chunk; // lo, hi: the halves of kvq_fixed

// kvq_fixed_of_positive and kvq_fixed_of for n numbers at once.
void codebook_to_fixed(const double *x, int n, uint64_t *lo, uint64_t *hi);
void codebook_to_signed_fixed(const double *x, int n, uint64_t *lo, uint64_t *hi);
// Adds x [n], n <= CODEBOOK_CHUNK, from 0 up; what is too large by itself makes the sum negative as well.
void codebook_add_sum(kvq_fixed *sum, const double *x, int n);
// Adds elements of which n, bin, x and w are set to bins and to the sum of w x^2; w and |w x| below 2^31.
void codebook_add_chunk(codebook_chunk *c, kvq_bin *bins, kvq_fixed *wxx);

// ---------------------------------------------------------------- sums as bytes (packed.c)

// Records of `width` sums, the first of them of what cannot be negative: kvq_bin or kvq_cell. As bytes: how many are
// not all zero, and each of these with its index.
typedef struct codebook_records {
    kvq_fixed *at; // [n, width]
    int64_t    n;
    int        width;
} codebook_records;
static inline codebook_records codebook_bins(kvq_bin *bins, int64_t n) { return (codebook_records){&bins->w, n, 2}; }
int64_t                        codebook_packed_bytes(codebook_records r);
uint8_t                       *codebook_pack(codebook_records r, uint8_t *out);             // returns what is behind,
uint8_t                       *codebook_put(uint8_t *out, const void *data, int64_t bytes); // and so does this
// Takes bytes apart. KVQ_ERR_INTEGRITY, naming `what`, when they are not what was packed.
typedef struct codebook_reader {
    const char    *what; // "histogram"
    const uint8_t *at, *end;
    int64_t        bytes; // of all
} codebook_reader;
static inline codebook_reader codebook_read_from(const char *what, const uint8_t *packed, int64_t bytes) {
    return (codebook_reader){what, packed, packed + bytes, bytes};
}
kvq_status codebook_read(codebook_reader *from, void *out, int64_t bytes, kvq_error *err);
kvq_status codebook_merge_packed(codebook_records into, codebook_reader *from, kvq_error *err);
kvq_status codebook_merge_count(int64_t *into, codebook_reader *from, kvq_error *err); // a number from 0 up
kvq_status codebook_read_end(const codebook_reader *from, kvq_error *err);
bool       codebook_left_range(codebook_records r);

// ---------------------------------------------------------------- counting (count.c)

// Scratch of one selection of outliers, on the stack of a thread: parallel loops must not use the context's allocator.
typedef struct codebook_selection {
    kvq_block_scratch scratch;
    float             upper_key[KVQ_BLOCK_MAX_SIDE + 1], lower_key[KVQ_BLOCK_MAX_SIDE + 1];
    uint16_t          upper_channel[KVQ_BLOCK_MAX_SIDE + 1], lower_channel[KVQ_BLOCK_MAX_SIDE + 1];
} codebook_selection;
static inline void codebook_selection_init(codebook_selection *s) {
    s->scratch =
        (kvq_block_scratch){s->upper_key, s->lower_key, s->upper_channel, s->lower_channel, .n_upper = 0, .n_lower = 0};
}

kvq_status codebook_check_row(const float *x, int d, kvq_error *err);

// Keeps the lowest item that failed.
static inline void codebook_note_failure(_Atomic int64_t *first, int64_t item) {
    int64_t known = atomic_load(first);
    while (item < known && !atomic_compare_exchange_weak(first, &known, item)) {
    }
}

// ---------------------------------------------------------------- channels and rotated values (channels.c)

// Sums are in units of 2^10 for every weighting, since nothing in them says which one they are of: squared ranges need
// room above, Fisher weights below. A position may lie beyond the bins, so the weighted square must fit too; as long
// as the sums of w and of w x^2 do, those of w x do (|x| <= (1 + x^2) / 2).
#define CODEBOOK_CHANNEL_UNIT   0x1p-10
#define CODEBOOK_CHANNEL_WEIGHT 0x1p30 // 2^20 in units: 2^11 of them still fit
static inline double codebook_channel_weight(kvq_weighting weighting, double gradient, double r) {
    return kvq_count_weight(weighting, gradient * gradient, r);
}
static inline bool codebook_channel_weight_fits(double w, double x2) {
    return w < CODEBOOK_CHANNEL_WEIGHT && w * x2 < 0x1p31 / CODEBOOK_CHANNEL_UNIT;
}
kvq_status codebook_bad_channel_weight(int64_t position, int64_t channel, double w, double x2, kvq_error *err);
// Rows as given to the counting functions; gradients [d] of one row.
kvq_status codebook_check_count(const float *gradients, kvq_weighting weighting, int64_t n_rows, int64_t n_skip,
                                kvq_error *err);
kvq_status codebook_check_gradients(const float *gradients, int64_t d, int64_t position, kvq_error *err);

// What a fit sees of bins that are 1 / per_unit wide; returns the scatter.
double codebook_take_bins(const kvq_bin *bins, int n, double per_unit, kvq_fixed wxx, float *w, float *x);

// The bin of a position among n over +-n / 2 / per_unit, the outermost one for what lies beyond.
static inline int codebook_bin_of(float x, float per_unit, int n) {
    float at = x * per_unit, half = (float)(n / 2);
    at = at < -half ? -half : at > half - 1 ? half - 1 : at; // before the conversion, which has no room for all floats
    int bin = (int)at - (at < (float)(int)at);
    return bin + n / 2;
}
// Mean kept inside its bin, of which the outermost ones have no outer edge: truncation of the smallest weights in the
// sums could leave it.
static inline double codebook_mean_in_bin(double mean, int bin, double per_unit, int n) {
    double low = bin > 0 ? (bin - n / 2) / per_unit : -(double)FLT_MAX;
    double high = bin < n - 1 ? (bin + 1 - n / 2) / per_unit : (double)FLT_MAX;
    return mean < low ? low : mean > high ? high : mean;
}

// Which LAPACK is behind the name is the system's choice, and so are its threads; here it gets one (spectrum.c).
void codebook_keep_lapack_to_one_thread(void);

// Exact k-means for several numbers of levels ks [n_ks] ascending in one run, from points as kvq_kmeans_exact wants
// them, without allocating: levels [sum of ks] one table behind the other, costs [n_ks], scratch
// [codebook_kmeans_scratch(n, largest k)] of doubles. False when a sum is not finite.
int64_t codebook_kmeans_scratch(int64_t n, int k);
bool    codebook_kmeans_many(const kvq_weighted_point *points, int64_t n, const int *ks, int n_ks, double *scratch,
                             double *levels, double *costs);

// kvq_kmeans_plane for several numbers of levels ks [n_tables] ascending, on all threads: levels one table behind the
// other, of f16 precision when `half`, and the costs [n_tables] of these.
kvq_status codebook_plane_tables(const kvq_context *ctx, const float *w, const float *x, const float *y, int64_t n,
                                 const int *ks, int n_tables, uint64_t seed, bool half, float *levels, double *costs,
                                 kvq_error *err);

// An array of an artifact in place of what an earlier fit of the layer left there, and the thresholds [d] of a tensor
// that has them (fit.c).
kvq_status codebook_renew(const kvq_context *ctx, int64_t n, const char *what, float **array, kvq_error *err);
kvq_status codebook_copy_thresholds(const kvq_context *ctx, const kvq_measured_tensor *measured, int64_t d,
                                    kvq_tensor_quant *t, kvq_error *err);

// The channel-allocated format. Index of the options' outlier fraction in a measurement of its statistics;
// KVQ_ERR_INTERNAL when they were not measured.
kvq_status codebook_find_allocated(const kvq_measured_layer *measured, const kvq_measure_options *measure,
                                   const kvq_alloc_options *options, int *fraction, kvq_error *err);
// What turns weighted squared errors of a channel in normalised units into those in the tensor's.
double codebook_channel_factor(kvq_weighting weighting, float lower, float upper);
// The occupied bins of a channel, points [KVQ_CHANNEL_BINS]; returns how many.
int64_t codebook_channel_points(const kvq_channel_distribution *channels, int64_t c, kvq_weighted_point *points);
// Exact k-means of a channel as codebook_kmeans_many, with at most 2^KVQ_MAX_KEY_WIDTH levels, by a thread of
// kvq_parallel_for. The scratch is for all threads; its memory is freed by the caller.
typedef struct codebook_channel_scratch {
    double *memory;
    int64_t stride;
} codebook_channel_scratch;
kvq_status codebook_channel_scratch_create(const kvq_context *ctx, codebook_channel_scratch *out, kvq_error *err);
bool       codebook_channel_tables(const kvq_channel_distribution *channels, int64_t c, const int *ks, int n_ks,
                                   const codebook_channel_scratch *scratch, int worker, double *levels, double *costs);
// Tables of values for rates [n_tables] ascending, in columns of dim channels, of f16 precision, one behind the other;
// errors [n_tables] of these, the scatter inside bins included.
kvq_status codebook_value_tables(const kvq_context *ctx, const kvq_value_distribution *v, int dim, const int *rates,
                                 int n_tables, float *levels, double *errors, kvq_error *err);
static inline float codebook_half(double x) { return kvq_float_of_half(kvq_half_of_float((float)x)); }

// Keys with affine tables: all levels, and where the table of a width begins.
#define CODEBOOK_AFFINE_LEVELS ((2 << KVQ_MAX_KEY_WIDTH) - 1)
static inline int32_t codebook_affine_table(int width) { return (1 << width) - 1; }

// Fills key_levels, offset and scale of keys from their widths and thresholds; what does not fit into f16 is infinite.
kvq_status codebook_fit_affine(const kvq_context *ctx, const kvq_channel_distribution *channels,
                               kvq_weighting weighting, int64_t d, kvq_tensor_quant *k, kvq_error *err);

// What kvq_histogram_add leaves to the one who counts: the squares of elements x [n] whatever became of them.
void histogram_add_energy(kvq_histogram *h, const float *x, int64_t n);

#endif
