// SPDX-License-Identifier: Apache-2.0
//
// From weighted numbers to a datatype: exact quantiles, thresholds, weighted histograms, exact one-dimensional k-means,
// bit accounting, and the in-memory form of what kvq stores (the artifact). Pure arithmetic on arrays; knows no files
// and no models.
//
// How is a codebook made?  Elements are normalised to [-1, 1] (per channel for K with fixed thresholds, per token for
// V),
//   elements kept apart as outliers and the sink tokens left out, the rest counted into KVQ_HISTOGRAM_BINS bins with
//   their weights, and the levels are the exact optimum of weighted squared error over the bins.
// Which weights?  Fisher information times the squared range (KVQuant, arXiv 2401.18079, Eq. 7): the squared gradient
// of
//   the loss with respect to the element, because an error in normalised units is r times larger in real ones.
// How many samples?  The effective sample size says: (sum w)^2 / sum w^2. Fewer than some hundreds per level is noise.
// Why a histogram?  Adding into bins is associative in fixed point: any order, thread or process count gives the same
//   bytes, and the fit costs the same for ten thousand and for a billion elements. What binning can hide is bounded.
// Why per KV head, when a layer has one table?  Histograms add, so one measurement serves tables of either kind; a
//   fit for a layer adds those of its heads.
#ifndef KVQ_CODEBOOK_H
#define KVQ_CODEBOOK_H

#include "kvq_block_hd.h"
#include "kvq_core.h"
#include "kvq_count_hd.h"
#include "kvq_tile_hd.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------- quantiles

// The quantile q of n sorted values by linear interpolation (numpy's default): position p = q (n - 1), value
// v[floor p] + frac(p) (v[floor p + 1] - v[floor p]), in f64, rounded to f32.
typedef struct kvq_quantile_rank {
    int64_t rank;     // floor p; the second value is at min(rank + 1, n - 1)
    double  fraction; // p - floor p
} kvq_quantile_rank;
kvq_quantile_rank kvq_quantile_position(double q, int64_t n);
float             kvq_quantile_interpolate(float low, float high, double fraction);

// The two ends of every sorted column of a matrix that arrives in blocks of rows, in any order: the n_keep smallest and
// n_keep largest values. All that exact thresholds need, in one pass and a fraction of the data's memory; the ends of
// parts (threads, processes, shards) merge into the ends of the whole.
typedef struct kvq_tails kvq_tails;
// What a threshold is a quantile of: each channel by itself, or all of K together ("per-vector" and "per-matrix" in
// KVQuant, table 12).
typedef enum kvq_scope { KVQ_SCOPE_CHANNEL, KVQ_SCOPE_MATRIX } kvq_scope;
extern const char *const kvq_scope_names[]; // "channel", "matrix", NULL at the end
// Values per end for thresholds over n_rows rows. Those of a matrix may all come from a few channels, so they need
// more: up to all rows.
int64_t    kvq_tails_needed(double fraction, kvq_scope scope, int64_t n_columns, int64_t n_rows);
int64_t    kvq_tails_bytes(int64_t n_columns, int64_t n_keep);
kvq_status kvq_tails_create(const kvq_context *ctx, int64_t n_columns, int64_t n_keep, kvq_tails **out, kvq_error *err);
void       kvq_tails_destroy(const kvq_context *ctx, kvq_tails **tails);
// x [n_rows, n_columns]. KVQ_ERR_NUMERICAL, naming row and channel, when a value is not finite.
kvq_status kvq_tails_push(const kvq_context *ctx, kvq_tails *tails, const float *x, int64_t n_rows, kvq_error *err);
int64_t    kvq_tails_rows(const kvq_tails *tails);
// The state as numbers: out [n_columns, 2, w], w = min(n_keep, rows): the smallest from the smallest up, then the
// largest from the largest down. The same for any order of rows.
int64_t kvq_tails_width(const kvq_tails *tails); // w
void    kvq_tails_pack(const kvq_context *ctx, kvq_tails *tails, float *out);
// Adds n_rows rows of which only the packed ends [n_columns, 2, min(n_keep, n_rows)] are known.
kvq_status kvq_tails_merge(const kvq_context *ctx, kvq_tails *tails, const float *packed, int64_t n_rows,
                           kvq_error *err);
// K thresholds of a two-sided outlier fraction in [0, 1) (0: minimum and maximum) over all rows. lower, upper:
// [n_columns]. Scope matrix: a channel's thresholds are its smallest and largest value between the two quantiles of all
// values; a channel without a value between them keeps its own minimum and maximum.
kvq_status kvq_tails_thresholds(const kvq_context *ctx, kvq_tails *tails, double fraction, kvq_scope scope,
                                float *lower, float *upper, kvq_error *err);

// Middle and half width of a range in f32: z = (u + l) / 2, r = (u - l) / 2.
static inline float kvq_range_middle(float lower, float upper) { return (upper + lower) / 2.0f; }
static inline float kvq_range_half(float lower, float upper) { return (upper - lower) / 2.0f; }

// ---------------------------------------------------------------- weights (kvq_count_hd.h)

extern const char *const kvq_weighting_names[]; // "none", "fisher", "fisher-scaled", "range", NULL at the end

// ---------------------------------------------------------------- weighted histogram (kvq_count_hd.h)

kvq_status kvq_histogram_create(const kvq_context *ctx, kvq_weighting_set weightings, kvq_histogram **out,
                                kvq_error *err);
void       kvq_histogram_destroy(const kvq_context *ctx, kvq_histogram **h);
int64_t    kvq_histogram_bytes(kvq_weighting_set weightings);
void       kvq_histogram_clear(kvq_histogram *h);
// Both count the same weightings.
void kvq_histogram_merge(kvq_histogram *into, const kvq_histogram *from);
// Adds what a device has counted: a piece of kvq_counters_bytes, of the same weightings; aligned for 64-bit integers.
void kvq_histogram_merge_counters(kvq_histogram *into, void *counters);
// Elements x [n], clipped to [-1, 1], with weights[w] [n] of each weighting w that is counted, 0 <= weight < 2^15, or
// NULL for 1 each.
void kvq_histogram_add(kvq_histogram *h, const float *x, const double *const weights[KVQ_N_WEIGHTINGS], int64_t n);
// The occupied bins and all sums as bytes, to be saved or sent and merged elsewhere. KVQ_ERR_INTEGRITY when merged
// bytes are not what pack gives for the same weightings; h may then hold a part of them.
int64_t    kvq_histogram_packed_bytes(const kvq_histogram *h);
void       kvq_histogram_pack(const kvq_histogram *h, uint8_t *out);
kvq_status kvq_histogram_merge_packed(kvq_histogram *into, const uint8_t *packed, int64_t bytes, kvq_error *err);

// How the range of a token is found while counting (spec->r NULL). The decoder's rule is `extremes`; `percentiles`,
// what the public code of KVQuant calibrates with and does not decode by, exists for comparison.
typedef enum kvq_token_range { KVQ_RANGE_EXTREMES, KVQ_RANGE_PERCENTILES } kvq_token_range;
extern const char *const kvq_token_range_names[]; // "extremes", "percentiles", NULL at the end

// One tensor over the rows of one window: counted by the decoder's own rule (kvq_block_hd.h), outliers apart, the rest
// normalised. Each KV head has a histogram of its own.
typedef struct kvq_count_tensor {
    const char           *name;      // "K"
    const kvq_block_spec *spec;      // levels are not used
    const float          *x;         // [n_rows, spec->d]
    const float          *gradients; // [n_rows, spec->d] squared; NULL = none
    kvq_histogram       **heads;     // [n_heads], n_heads divides spec->d
} kvq_count_tensor;
typedef struct kvq_count_options {
    int             n_heads;
    int64_t         n_skip; // first rows, which are left out: sink tokens
    kvq_token_range token_range;
    double          fraction; // of the percentiles
} kvq_count_options;
// On all threads of ctx; each histogram is filled by one of them, so the count of threads leaves no trace. scratch:
// kvq_count_scratch_floats for every tensor, one behind the other. KVQ_ERR_NUMERICAL, naming tensor, row and channel,
// for a non-finite element, a squared gradient that is negative, not finite, or beyond the range of the sums, or the
// range of a token beyond f16; the histograms then hold a part of the rows. KVQ_ERR_USAGE when the outliers leave
// nothing of a row.
int64_t kvq_count_scratch_floats(int64_t n_rows, int64_t d);
// What is wrong with a spec, whoever counts by it: KVQ_ERR_USAGE, or KVQ_ERR_NUMERICAL for a range of a channel.
kvq_status kvq_count_check(const kvq_block_spec *spec, int n_heads, kvq_error *err);
kvq_status kvq_count_rows(const kvq_context *ctx, const kvq_count_tensor *tensors, int n_tensors, int64_t n_rows,
                          kvq_count_options options, float *scratch, kvq_error *err);

// ---------------------------------------------------------------- distributions

// What a fit needs of a histogram, in the precision in which it is stored: a fit from a file and a fit right after
// counting see the same numbers.
typedef struct kvq_weighted_bins {
    float *w, *x; // [KVQ_HISTOGRAM_BINS] weight, and weighted mean of the normalised values; NULL = not counted
} kvq_weighted_bins;
typedef struct kvq_distribution_sums {        // doubles only, so that an array of them is one of doubles
    double energy, beyond[2], beyond_squared; // as in kvq_histogram
    double scatter[KVQ_N_WEIGHTINGS];         // sum of w (x' - mean of its bin)^2
    double w2[KVQ_N_WEIGHTINGS];              // sum of w^2
} kvq_distribution_sums;
typedef struct kvq_distribution {
    kvq_weighted_bins      by[KVQ_N_WEIGHTINGS];
    kvq_element_counts    *counts;
    kvq_distribution_sums *sums;
} kvq_distribution;
// Of n KV heads: arrays of all heads lie behind each other. Free with kvq_distributions_free, which takes NULL.
kvq_status kvq_distributions_create(const kvq_context *ctx, kvq_weighting_set weightings, int n, kvq_distribution **out,
                                    kvq_error *err);
void       kvq_distributions_free(const kvq_context *ctx, kvq_distribution **distributions);
// Fills one of them from a histogram of the same weightings. KVQ_ERR_NUMERICAL when a sum left the range of fixed
// point.
kvq_status kvq_distribution_take(const kvq_histogram *h, kvq_distribution *out, kvq_error *err);

// ---------------------------------------------------------------- channels, and rotated values

// What the channel-allocated format (kvq_tile_hd.h) needs besides: each channel of K by itself, and values after their
// rotation, one by one and in pairs of adjacent channels. One weighting; weights and positions as in histograms.

#define KVQ_CHANNEL_BINS 1024 // of a channel of K over [-1, 1]
#define KVQ_VALUE_REACH  8.0f // values in units of their scale are counted in KVQ_HISTOGRAM_BINS bins over +-this ...
#define KVQ_PAIR_CELLS   256  // ... and pairs in a square of as many cells a side ...
#define KVQ_PAIR_REACH   4.0f // ... over +-this. What lies beyond counts in the outermost bin or cell, at its position.

typedef enum kvq_rotation_kind { KVQ_ROTATION_ORTHOGONAL, KVQ_ROTATION_NONE } kvq_rotation_kind;
extern const char *const kvq_rotation_names[]; // "orthogonal", "none", NULL at the end
// The rotation of values: rotation [head_dim, head_dim] orthogonal, rows are where a value is measured along; *kind a
// fixed text. A Hadamard matrix divided by sqrt(head_dim) ("hadamard") where head_dim is 2^k, 12 * 2^k or 20 * 2^k
// (Sylvester's doubling of the matrix of order 1, or of Paley's of order 12 or 20); otherwise the orthogonal factor of
// a matrix of normal random numbers by LAPACK's QR, seed 0, signs made unique by a positive diagonal of R ("random");
// or the identity ("none"). Same bytes on every machine for "hadamard" and "none".
kvq_status kvq_make_rotation(const kvq_context *ctx, kvq_rotation_kind wanted, int head_dim, float *rotation,
                             const char **kind, kvq_error *err);

typedef struct kvq_cell {
    kvq_fixed w, wx, wy;
} kvq_cell;

// Sums over windows, exact and mergeable in any order; those of weights are in units of 2^10 whatever the weighting.
typedef struct kvq_channel_counts {
    int        d;
    kvq_bin   *bins;                  // [d, KVQ_CHANNEL_BINS]
    kvq_fixed *wxx;                   // [d] sum of w x'^2
    int64_t   *n_points, *n_outliers; // [d]; constant channels count nothing
} kvq_channel_counts;
typedef struct kvq_value_counts {
    kvq_bin  *bins;          // [KVQ_HISTOGRAM_BINS]
    kvq_cell *cells;         // [KVQ_PAIR_CELLS, KVQ_PAIR_CELLS], x (the lower channel) is the slower index
    kvq_fixed wxx, pair_wxx; // sums of w y'^2, and of w (x'^2 + y'^2); the weight of a pair is the mean of its two
    int64_t   n_points;      // elements; those of a zero scale count nothing, and odd heads have no pairs
} kvq_value_counts;
kvq_status kvq_channel_counts_create(const kvq_context *ctx, int d, kvq_channel_counts **out, kvq_error *err);
kvq_status kvq_value_counts_create(const kvq_context *ctx, kvq_value_counts **out, kvq_error *err);
void       kvq_channel_counts_destroy(const kvq_context *ctx, kvq_channel_counts **counts);
void       kvq_value_counts_destroy(const kvq_context *ctx, kvq_value_counts **counts);
int64_t    kvq_channel_counts_bytes(int d); // in memory
int64_t    kvq_value_counts_bytes(void);
// As kvq_histogram_pack: what is occupied, as bytes to be merged elsewhere. KVQ_ERR_INTEGRITY for bytes that pack did
// not make.
int64_t    kvq_channel_counts_packed_bytes(const kvq_channel_counts *counts);
void       kvq_channel_counts_pack(const kvq_channel_counts *counts, uint8_t *out);
kvq_status kvq_channel_counts_merge_packed(kvq_channel_counts *into, const uint8_t *packed, int64_t bytes,
                                           kvq_error *err);
int64_t    kvq_value_counts_packed_bytes(const kvq_value_counts *counts);
void       kvq_value_counts_pack(const kvq_value_counts *counts, uint8_t *out);
kvq_status kvq_value_counts_merge_packed(kvq_value_counts *into, const uint8_t *packed, int64_t bytes, kvq_error *err);

// Adds rows [n_skip, n_rows) of keys x [n_rows, d], with gradients [n_rows, d] of the loss (signed; NULL when the
// weighting needs none). Outliers are those of spec, a key row of kvq_block_hd.h, whose levels are not used: at most
// n_side per side and row, the largest ones; none when n_side is 0. They are not in the bins; whatever else lies beyond
// [-1, 1] is, so means of the end bins may lie there too. Deterministic on any number of threads. KVQ_ERR_NUMERICAL,
// naming position and channel, for an element or a gradient that is not finite, and for a weight, alone or times the
// square of the position, beyond the range of the sums; nothing has been added then. KVQ_ERR_USAGE as of
// kvq_count_rows, and for a weighting that needs gradients without any.
kvq_status kvq_count_channels(const kvq_context *ctx, const kvq_block_spec *spec, const float *x,
                              const float *gradients, kvq_weighting weighting, int64_t n_rows, int64_t n_skip,
                              kvq_channel_counts *counts, kvq_error *err);
// The same of values: rotated and scaled by the rule of `spec` (rotation and scale; levels and widths are not used),
// weights from the gradients after the same rotation: g'^2, g'^2 s^2, s^2 or 1. KVQ_ERR_NUMERICAL also for a scale that
// does not fit into its format; a part of the rows may have been added then.
kvq_status kvq_count_values(const kvq_context *ctx, const kvq_tile_spec *spec, const float *x, const float *gradients,
                            kvq_weighting weighting, int64_t n_rows, int64_t n_skip, kvq_value_counts *counts,
                            kvq_error *err);
// Power of two near the root mean square of values: e such that e4m3 scales of rms * 2^-e lie well inside its range;
// from the mean square of a layer's values (0 gives 0). The nearest one by ratio, within -100 .. 100.
int kvq_scale_exponent(double mean_square);

// The same in the precision in which it is stored; arrays NULL when not measured.
typedef struct kvq_channel_distribution {
    float   *w, *x;                 // [d, KVQ_CHANNEL_BINS] weight and weighted mean
    double  *scatter;               // [d] sum of w (x' - mean of its bin)^2
    int64_t *n_points, *n_outliers; // [d]
} kvq_channel_distribution;
typedef struct kvq_value_distribution {
    float   *w, *x;                    // [KVQ_HISTOGRAM_BINS], x in units of the scale
    float   *pair_w, *pair_x, *pair_y; // [KVQ_PAIR_CELLS, KVQ_PAIR_CELLS]
    double  *scatter;                  // [2] of the bins, of the cells
    int64_t *n_points;                 // [1]
    int64_t *scale_exponent;           // [1]
} kvq_value_distribution;
// Fill arrays that the caller made, all but the exponent. KVQ_ERR_NUMERICAL when a sum left the range of fixed point.
kvq_status kvq_channel_distribution_take(const kvq_channel_counts *counts, kvq_channel_distribution *out,
                                         kvq_error *err);
kvq_status kvq_value_distribution_take(const kvq_value_counts *counts, kvq_value_distribution *out, kvq_error *err);

// ---------------------------------------------------------------- exact k-means

// One point or bin of a sorted weighted sample.
typedef struct kvq_weighted_point {
    double x, w; // position (ascending), weight >= 0
} kvq_weighted_point;

// The k levels minimising sum w (x - level)^2 over n sorted points: dynamic programming over runs with the monotone
// minimum property (divide and conquer), O(k n log n); the global optimum, not a local one (Wang and Song,
// Ckmeans.1d.dp, 2011). Points of weight 0 are ignored. Fewer distinct weighted positions than k: those positions, the
// last one repeated. No weight at all: every point counts as 1. No points: all levels 0. Results: levels [k] ascending,
// *cost = the sum at the optimum (recomputed from the levels, f64).
kvq_status kvq_kmeans_exact(const kvq_context *ctx, const kvq_weighted_point *points, int64_t n, int k, double *levels,
                            double *cost, kvq_error *err);

// Lloyd's iteration from k-means++ seeds (Arthur and Vassilvitskii 2007), best of n_starts: the baseline that users
// know, kept only to compare with. Stops when no point moves or after max_rounds.
kvq_status kvq_kmeans_lloyd(const kvq_context *ctx, const kvq_weighted_point *points, int64_t n, int k, uint64_t seed,
                            int n_starts, int max_rounds, double *levels, double *cost, kvq_error *err);

// ---------------------------------------------------------------- datatypes

typedef enum kvq_datatype {
    KVQ_NUQ,         // levels fitted by weighted k-means
    KVQ_NF,          // NormalFloat: fixed quantiles of a normal distribution (method of QLoRA, both halves scaled to 1)
    KVQ_INT,         // evenly spaced levels from end to end: integers with a real-valued zero point
    KVQ_INT_CLAMPED, // the same, moved so that one level is 0: integers with an integer zero point in range
    KVQ_N_DATATYPES
} kvq_datatype;
extern const char *const kvq_datatype_names[]; // "nuq", "nf", "int", "int-clamped", NULL at the end
// The levels of a datatype that needs no fit, ascending [2^bits] from -1 to 1. KVQ_ERR_USAGE for nuq and for other
// widths than 1 .. KVQ_MAX_BITS.
kvq_status kvq_fixed_levels(kvq_datatype datatype, int bits, float *levels, kvq_error *err);

// ---------------------------------------------------------------- the artifact in memory

typedef enum kvq_axis { KVQ_AXIS_CHANNEL, KVQ_AXIS_TOKEN } kvq_axis;
extern const char *const kvq_axis_names[]; // "channel", "token", NULL at the end

// Which keys are stored: as they enter the rotary embedding, or as they leave it.
typedef enum kvq_key_domain { KVQ_KEYS_PRE_ROPE, KVQ_KEYS_POST_ROPE } kvq_key_domain;
extern const char *const kvq_key_domain_names[]; // "pre_rope", "post_rope", NULL at the end

#define KVQ_MAX_KEY_WIDTH 5

// How keys of the channel-allocated format get their levels. All are numbers of f16, so that an engine may keep them
// so.
typedef enum kvq_table_kind {
    KVQ_TABLE_CHANNEL, // a table of 2^width levels for each channel, one behind the other in the order of channels;
                       // normalised by the channel's thresholds: z = middle, r = half range
    KVQ_TABLE_AFFINE,  // one for each width 0 .. KVQ_MAX_KEY_WIDTH, one behind the other (63 levels, zeros where no
                       // channel has the width); z = offset, r = scale of the channel
    KVQ_N_TABLE_KINDS
} kvq_table_kind;
extern const char *const kvq_table_kind_names[];   // "channel", "affine", NULL at the end
extern const char *const kvq_scale_format_names[]; // "e4m3", "f16", NULL at the end

// The fit, over the calibration windows. Errors are of elements that are coded: neither outliers nor sinks.
typedef struct kvq_fit_report {
    int64_t n_points, n_outliers, n_constant, n_clipped;
    double  weight_sum, effective_samples; // (sum w)^2 / sum w^2 of the fit's weighting; 0 when all weights are 0
    double  objective;                     // weighted mean squared error in normalised units of the levels as stored
    double  binning_bound;                 // the true optimum is at most this much below `objective`
    double  lloyd_objective; // what k-means++ and Lloyd's iteration reach on the same bins; 0 = not asked for
    // 0 = not known for int-clamped, whose levels differ from channel to channel or token to token:
    double normalised_mse; // unweighted, normalised units, of what codes decode to
    double mse;            // unweighted, in the tensor's units, clipping included
    double energy;         // mean square of all elements in the tensor's units
    double entropy_bits;   // of the codes: what an ideal entropy coder would need per element
} kvq_fit_report;
double kvq_fit_nmse(const kvq_fit_report *fit);    // mse / energy; 0 when energy is 0
double kvq_fit_sqnr_db(const kvq_fit_report *fit); // -10 log10 of it; infinite without error

// Errors on held-out windows, through the codec.
typedef struct kvq_heldout_report {
    int64_t n_tokens; // 0 = not measured
    double  nmse;     // of all elements but sinks: sum (x - decoded)^2 / sum x^2
    double  clipped_share, outlier_share;
    double  attention_error; // |o - o'| / |o| over the outputs of all heads when this tensor alone is quantised
} kvq_heldout_report;

// One tensor (K or V) of one layer. Which fields are set depends on the axis: ranges per channel are thresholds, ranges
// per token are found by the codec.
typedef struct kvq_tensor_quant {
    int                bits;
    kvq_datatype       datatype;
    kvq_axis           axis;
    kvq_key_domain     domain;                  // of K
    int                n_groups, n_levels, dim; // codebook [n_groups, n_levels, dim]; groups: 1, or one per KV head
    float             *codebook;                // ascending within a group
    float             *decode_levels; // [n_groups, n_levels] with Q-Norm, else NULL: codes decode to the codebook
    float             *lower, *upper; // [Hkv, D] or NULL
    kvq_fit_report     fit;
    kvq_heldout_report heldout;
    // Scheme "alloc" only. Values: `bits` are those of a column of `dim` channels, `codebook` is [1, 2^bits, dim] in no
    // order, there are no thresholds. Keys: bits, n_levels and codebook are 0 and NULL, `lower` and `upper` say what is
    // an outlier.
    uint8_t         *widths;         // keys: [d] bits of each channel, 0 .. KVQ_MAX_KEY_WIDTH
    kvq_table_kind   table_kind;     // keys
    int64_t          n_key_levels;   // of `key_levels`
    float           *key_levels;     // keys, f16 numbers, ascending in each table; see kvq_table_kind
    float           *offset, *scale; // keys with affine tables, f16 numbers: [d]
    kvq_scale_format scale_format;   // values
    int              scale_exponent;
    double           kl; // measured for the budget: mean KL in nats per token of this tensor alone, quantised by the
                         // reference allocation; 0 = not measured
} kvq_tensor_quant;

typedef struct kvq_layer_quant {
    kvq_tensor_quant k, v;
    double           attention_error; // held out, both tensors quantised
} kvq_layer_quant;

// Text fields are owned, never NULL after kvq_artifact_create ("" = not known).
typedef struct kvq_artifact {
    struct {
        char   *architecture, *name; // "llama"; directory or file name without its path
        char    config_sha256[KVQ_SHA256_HEX], weights_sha256[KVQ_SHA256_HEX];
        int64_t n_layers, hidden_size, n_heads, n_kv_heads, head_dim, vocab_size;
        double  rope_theta;
        char   *rope_type;
        char   *dtype; // of the largest part of the weights
        int64_t n_tensors;
    } model;
    struct {
        char *kind; // "bpe-bytelevel", "bpe-sentencepiece", "none" (token ids were given)
        char  sha256[KVQ_SHA256_HEX];
        bool  bos_added;
    } tokenizer;
    struct {
        char    *source;                           // file name without its path, or "self"
        char     source_sha256[KVQ_SHA256_HEX];    // of the text; "" for self-generated
        char     token_ids_sha256[KVQ_SHA256_HEX]; // int32 little-endian, [N, S]
        int64_t  n_available_tokens, n_samples, seq_len;
        uint64_t seed;
    } dataset;
    struct {
        double        outlier_fraction; // two-sided
        int           n_side_k, n_side_v;
        int64_t       sink_tokens;   // first tokens of a sequence, kept in f16
        int64_t       recent_tokens; // last tokens, kept in f16 until they leave this window
        kvq_weighting weighting;
        kvq_scope     threshold_scope;
        bool          sinks_counted; // thresholds were taken over sink tokens too
        char         *scheme;        // "nuq": tables of levels of one width per tensor, outliers apart;
                                     // "alloc": channel-allocated keys and rotated values, in tiles
        // of "alloc":
        int     n_slots;                         // outliers of keys per tile
        int64_t budget_tokens, budget_sequences; // length and number of the sequences that target_bits speak of
        double  target_bits;   // effective bits per element that were asked for; 0 = the widths were given
        float  *rotation;      // [D, D] of values, NULL in "nuq"
        char   *rotation_kind; // "hadamard", "random", "none"
    } quantizer;
    struct {
        char *producer_version, *matmul, *cpu, *options_json; // options_json: every option as resolved
    } provenance;
    double           baseline_nll; // mean over the calibration windows, nats per token, full precision
    kvq_layer_quant *layers;       // [n_layers]
} kvq_artifact;

// n_layers layers with empty tensors. `destroy` frees everything reachable and accepts half-built objects.
kvq_status kvq_artifact_create(const kvq_context *ctx, int64_t n_layers, kvq_artifact **out, kvq_error *err);
void       kvq_artifact_destroy(const kvq_context *ctx, kvq_artifact **artifact);
// Replaces an owned text field.
kvq_status kvq_artifact_set_text(const kvq_context *ctx, char **field, const char *value, kvq_error *err);

static inline bool kvq_artifact_is_allocated(const kvq_artifact *a) { return a->quantizer.rotation != NULL; }

// A tensor of an artifact of scheme "alloc" as the codec of tiles wants it; owns what is derived and borrows the rest.
typedef struct kvq_tile_view {
    kvq_tile_spec    spec;
    kvq_tile_column *columns;
    uint8_t         *widths; // of values
    int32_t         *table;
    float           *ranges;
} kvq_tile_view;
kvq_status kvq_tile_view_create(const kvq_context *ctx, const kvq_artifact *artifact, const kvq_tensor_quant *tensor,
                                kvq_tile_view *out, kvq_error *err);
void       kvq_tile_view_free(const kvq_context *ctx, kvq_tile_view *view);

// Views of an artifact tensor as the codec wants it. What belongs to channels is computed from the thresholds into
// `storage` (caller's, 3 * d floats); where ranges are found per token storage may be NULL.
kvq_block_spec kvq_tensor_block_spec(const kvq_tensor_quant *tensor, int d, int n_side, float *storage);

// ---------------------------------------------------------------- measurements

#define KVQ_MAX_FRACTIONS 8

// What is measured of a model, once; many fits can follow.
typedef struct kvq_measure_options {
    int    n_fractions;
    double fractions[KVQ_MAX_FRACTIONS]; // outlier fractions, ascending, two-sided: normalisation depends on it
    kvq_weighting_set weightings;        // includes KVQ_WEIGHTINGS_BASIC
    int64_t           sink_tokens;       // left out of the fit
    bool              count_sinks;       // but not out of the thresholds
    kvq_axis          k_axis;
    kvq_key_domain    k_domain;
    kvq_scope         threshold_scope;
    bool              half_thresholds; // thresholds are rounded to f16, as in the public code
    int64_t           k_slots; // outliers of K per side and token; 0 = kvq_block_n_side, -1 = as many as there can be
    kvq_token_range   token_range; // of V (and of K per token)
    bool              moments;     // second moments of Q, K and V; of keys before RoPE only
    bool              allocated;   // also what the channel-allocated format needs; keys per channel only
    // of that:
    kvq_weighting     channel_weighting; // of its bins and cells; one weighting, for they are many
    int64_t           tile_side;         // outliers of K per side and token; what a tile has room for bounds them too
    kvq_rotation_kind rotation;
    kvq_scale_format  scale_format;
} kvq_measure_options;
int kvq_measured_k_side(const kvq_measure_options *options, double fraction, int d); // outliers of K per side
int kvq_measured_v_side(double fraction, int d);
int kvq_measured_tile_side(const kvq_measure_options *options, double fraction, int d); // of K in tiles
// Index of a fraction, -1 when it was not measured.
int kvq_measured_fraction(const kvq_measure_options *options, double fraction);

// How a table is fitted.
typedef struct kvq_fit_options {
    double        outlier_fraction; // one of those measured
    int           k_bits, v_bits;   // 2, 3, 4, 5 or 8
    kvq_datatype  k_datatype, v_datatype;
    kvq_weighting weighting; // of nuq; one of those measured
    bool          per_head;  // a table for each KV head instead of one for the layer
    bool          q_norm;    // codes decode to levels with the mean and deviation of the data (KVQuant v1, section 3.4)
    bool          compare_lloyd;
    int64_t       recent_tokens;
} kvq_fit_options;

typedef struct kvq_measured_tensor {
    float                   *lower, *upper; // [d] thresholds, NULL where ranges are found per token
    kvq_distribution        *heads;         // [n_kv_heads]
    kvq_channel_distribution channels;      // of K; empty unless `allocated`
} kvq_measured_tensor;

// Second moments, uncentred: mean over tokens (sinks left out) of x x^T of each head.
typedef struct kvq_moments {
    double *q, *k, *v; // [H, D, D], [Hkv, D, D], [Hkv, D, D]; Q and K before RoPE
} kvq_moments;

// All that was measured of one layer. Arrays [n_fractions].
typedef struct kvq_measured_layer {
    int                    n_fractions, n_heads, n_kv_heads, head_dim;
    kvq_weighting_set      weightings;
    kvq_measured_tensor   *k, *v;
    kvq_moments            moments; // NULL unless measured
    kvq_value_distribution rotated; // of V; empty unless `allocated`
    double                *kl;      // [2] of K and V, see kvq_reference_allocation; NULL unless `allocated`
} kvq_measured_layer;
kvq_status kvq_measured_layer_create(const kvq_context *ctx, const kvq_measure_options *options, int n_heads,
                                     int n_kv_heads, int head_dim, kvq_measured_layer **out, kvq_error *err);
void       kvq_measured_layer_destroy(const kvq_context *ctx, kvq_measured_layer **layer);
// Every array of a layer with its name and extent, in a fixed order; what files and saved states are made of. Scalars
// come as arrays of one element.
typedef enum kvq_part_type { KVQ_PART_I64, KVQ_PART_F32, KVQ_PART_F64 } kvq_part_type;
typedef struct kvq_measured_part {
    char          name[64]; // "k/0/weight_fisher": fraction 0; unique in a layer
    kvq_part_type type;
    int           n_dims;
    int64_t       dims[3];
    void         *data;
} kvq_measured_part;
int kvq_measured_layer_parts(const kvq_measured_layer *layer, int index, kvq_measured_part *out); // 0 behind the last

// Adds the mean over rows of x x^T of every head to sums [n_heads, D, D], of which the triangle i >= j is used.
// x [n_rows, n_heads * D]; scratch: kvq_moments_scratch_doubles. Sums of other windows merge element by element. At the
// end moments [n_heads, D, D] = sums / n_windows, both triangles; KVQ_ERR_NUMERICAL when squares left the range of the
// sums, which ends at 2^51.
int64_t kvq_moments_scratch_doubles(int n_heads, int head_dim);
void kvq_moments_add(const kvq_context *ctx, const float *x, int64_t n_rows, int n_heads, int head_dim, kvq_fixed *sums,
                     double *scratch);
void kvq_moments_merge(kvq_fixed *sum, kvq_fixed x, bool diagonal);
kvq_status kvq_moments_finish(const kvq_fixed *sums, int64_t n_windows, int n_heads, int head_dim, double *moments,
                              kvq_error *err);

// Eigenvalues of second moments [n_heads, D, D], descending [n_heads, D], by LAPACK's dsyevd; eigenvectors (NULL = not
// wanted) [n_heads, D, D], row i belongs to value i, signs made unique: the component of largest magnitude is positive
// (the first of them on a tie). KVQ_ERR_NUMERICAL when a moment is not finite or it does not converge.
kvq_status kvq_spectrum(const kvq_context *ctx, const double *moments, int n_heads, int head_dim, double *values,
                        double *vectors, kvq_error *err);
// exp of the entropy of the normalised eigenvalues (Roy and Vetterli 2007): 1 .. n; negative ones count as 0; 0 when
// all are.
double kvq_effective_rank(const double *values, int n);

// ---------------------------------------------------------------- fit

// The levels of one table from the elements of `parts` together, in the order given.
kvq_status kvq_fit_table(const kvq_context *ctx, const kvq_distribution *parts, int n_parts, kvq_datatype datatype,
                         int bits, const kvq_fit_options *options, float *levels, float *decode_levels,
                         kvq_fit_report *report, kvq_error *err);

// Settings and empty tensors of an artifact whose model shape is known.
void kvq_artifact_describe_quantizer(kvq_artifact *artifact, const kvq_measure_options *measure,
                                     const kvq_fit_options *fit);
// Codebooks, thresholds and reports of one layer of such an artifact. KVQ_ERR_NUMERICAL, naming layer and tensor, when
// a weighted fit has no weight at all; a warning when the weights are worth fewer samples than there are levels.
kvq_status kvq_fit_layer(const kvq_context *ctx, const kvq_measured_layer *measured, const kvq_measure_options *measure,
                         const kvq_fit_options *fit, kvq_artifact *artifact, int64_t layer, kvq_error *err);

// ---------------------------------------------------------------- allocation of bits

// How the bits of the channel-allocated format are spent. Keys: D_c(b) = least weighted squared error of channel c with
// a table of 2^b levels of its own (b = 0: one level), in the tensor's units. Channels that share a width add theirs
// up. Only points on the lower convex hull of (cost in bits, D) are used, from the smallest width up by steepest slope
// until the budget is spent; ties: the lower layer, then the lower channel; what does not fit is passed over and the
// next is tried. Values: the same over layers, with the error of the layer's codebook at each rate. A layer's errors
// are scaled so that the reference allocation costs the KL that was measured with it (kvq_measured_layer.kl), for
// predictions from gradients alone misjudge layers; without a measurement they are taken as they are.

typedef enum kvq_budget_scope { // what shares a budget of keys
    KVQ_BUDGET_MODEL,           // all of it
    KVQ_BUDGET_LAYER,           // each layer gets the same
    KVQ_BUDGET_HEAD,            // each KV head of each layer gets the same
    KVQ_N_BUDGET_SCOPES
} kvq_budget_scope;
extern const char *const kvq_budget_scope_names[]; // "model", "layer", "head", NULL at the end

typedef struct kvq_alloc_options {
    double           outlier_fraction;      // of K, one of those measured
    double           target_bits;           // effective bits per element, everything counted, of a cache that holds
    int64_t          n_tokens, n_sequences; // n_sequences sequences of n_tokens, which share the tables
    double           k_bits, v_bits; // > 0: mean code bits per element of keys, and of values, instead of target_bits
    unsigned         k_widths;       // allowed widths as bits 1 << width
    unsigned         v_rates;        // allowed bits of a column of values as bits 1 << bits
    int              group;          // channels of a head that share a width, 0: kvq_alloc_group decides
    kvq_budget_scope scope;
    kvq_table_kind   tables;
    int              v_dim;          // 1, or 2: pairs
    bool             gradients_only; // do not scale errors by measured KL
} kvq_alloc_options;
kvq_alloc_options kvq_alloc_options_default(void); // 0.25 %, 3 bits of 8 sequences of 2048 tokens, widths 0 .. 5,
                                                   // group 0, model, channel, pairs of 2 to 4 bits per element
// How many channels of a head share a width, sorted by D_c(2) (ties: the lower channel). What options->group says, or
// the largest power of two up to 8 that leaves a head at least 8 groups: 8 from 64 channels on, 4 from 32, 2 from 16.
int kvq_alloc_group(const kvq_alloc_options *options, int head_dim);
// KVQ_ERR_USAGE, naming the option as kvq-calibrate spells it.
kvq_status kvq_alloc_options_check(const kvq_alloc_options *options, int head_dim, kvq_error *err);

// What allocation needs of a layer.
typedef struct kvq_layer_curves {
    double *k;                         // [d, KVQ_MAX_KEY_WIDTH + 1] D_c(b)
    double  v[KVQ_TILE_MAX_WIDTH + 1]; // error per rate (bits of a column), infinite where not allowed
    double  kl[2];                     // measured, 0 = not
    double  reference[2];              // error of the reference allocation, which kl belongs to
} kvq_layer_curves;
// On all threads.
kvq_status kvq_layer_curves_make(const kvq_context *ctx, const kvq_measured_layer *measured,
                                 const kvq_measure_options *measure, const kvq_alloc_options *options,
                                 kvq_layer_curves *out, kvq_error *err);
void       kvq_layer_curves_free(const kvq_context *ctx, kvq_layer_curves *curves);

typedef struct kvq_split { // keys against values
    double k_bits, v_bits; // mean code bits per element
    double k_loss, v_loss; // predicted; nats per token where KL was measured
} kvq_split;
#define KVQ_MAX_NEIGHBOURS 8
typedef struct kvq_allocation {
    uint8_t  *widths; // [n_layers, d] of keys
    uint8_t  *rates;  // [n_layers] bits of a column of values
    kvq_split chosen;
    int       n_neighbours;
    kvq_split neighbours[KVQ_MAX_NEIGHBOURS]; // other splits of the same budget, by rising k_bits
} kvq_allocation;
// curves [n_layers]; the artifact tells shape, sinks and what else costs bits. The best split is searched in steps of
// 1/16 bit of keys. KVQ_ERR_USAGE, naming the least possible, when the target is out of reach.
kvq_status kvq_allocate(const kvq_context *ctx, const kvq_artifact *artifact, const kvq_layer_curves *curves,
                        const kvq_alloc_options *options, kvq_allocation *out, kvq_error *err);
void       kvq_allocation_free(const kvq_context *ctx, kvq_allocation *allocation);

// The allocation at which the KL of single tensors is measured, whatever will be asked for later: keys of each layer at
// a mean of 2 bits in groups of 8 with widths 0 .. 5 and tables per channel, values in pairs at 3 bits per element.
kvq_alloc_options kvq_reference_allocation(void);

// Settings and empty tensors of an artifact of scheme "alloc" whose model shape is known; the widths follow per layer.
kvq_status kvq_artifact_describe_allocated(const kvq_context *ctx, kvq_artifact *artifact,
                                           const kvq_measure_options *measure, const kvq_alloc_options *options,
                                           kvq_error *err);
// Tables, thresholds and reports of one layer of such an artifact, with the widths [d] and the rate that were chosen.
kvq_status kvq_fit_allocated_layer(const kvq_context *ctx, const kvq_measured_layer *measured,
                                   const kvq_measure_options *measure, const kvq_alloc_options *options,
                                   const uint8_t *widths, int rate, kvq_artifact *artifact, int64_t layer,
                                   kvq_error *err);
// Weighted k-means in the plane: points of weight w [n], n_levels vectors levels [n_levels, 2]. K-means++ (Arthur and
// Vassilvitskii 2007) and Lloyd's iteration, the best of 3 seeded starts: a local optimum, the same for the same seed.
// Fewer distinct points than levels: the last one is repeated. *cost = sum w |x - nearest|^2.
kvq_status kvq_kmeans_plane(const kvq_context *ctx, const float *w, const float *x, const float *y, int64_t n,
                            int n_levels, uint64_t seed, float *levels, double *cost, kvq_error *err);

// ---------------------------------------------------------------- bit accounting

// Every byte a cache of n_tokens tokens of one sequence needs: packed rows, sink and recent tokens in f16, thresholds
// (f32) and tables (f32). Scheme "alloc": full tiles (of which sinks are a part), the tokens behind them in f16, sinks,
// thresholds, maps and levels (f16), widths (a byte each), and the rotation (f32) when it is random. `tables_bytes` is
// the part that does not grow with tokens and is shared by all sequences.
typedef struct kvq_cache_size {
    int64_t n_elements;                           // K and V elements of all layers
    int64_t row_bytes, exact_bytes, tables_bytes; // exact: sink and recent tokens
} kvq_cache_size;
kvq_cache_size kvq_artifact_cache_size(const kvq_artifact *artifact, int64_t n_tokens);
// Bits per element of a cache that holds n_sequences such sequences: all bytes * 8 / elements, the tables once.
double kvq_cache_bits_per_element(kvq_cache_size size, int64_t n_sequences);

// What a sequence of some length needs: in f16, through the artifact with every byte counted, and by the formula of the
// KVQuant paper, which its published sizes follow. For elements of b bits, the mean over K and V, and d channels:
//   bits per element = b + 16/d + (with an outlier fraction f > 0) 32 f + 16/d
// that is two f16 per token for V, a 16-bit value and a 16-bit index per outlier, a 32-bit pointer per token of one of
// K and V; tables, thresholds, sinks and outlier slots that stay empty are not counted. The formula is about keys with
// ranges per channel and values with ranges per token; for anything else, formula_bytes is 0.
typedef struct kvq_memory {
    int64_t n_tokens;
    double  fp16_bytes, bytes, formula_bytes;
} kvq_memory;
kvq_memory kvq_artifact_memory(const kvq_artifact *artifact, int64_t n_tokens);

// The lengths that are usually published: "32K", "128K" and "1M" are powers of two, "10M" is 10^7.
#define KVQ_N_MEMORY_LENGTHS 4
typedef struct kvq_memory_length {
    const char *name;
    int64_t     n_tokens;
} kvq_memory_length;
extern const kvq_memory_length kvq_memory_lengths[KVQ_N_MEMORY_LENGTHS];

#ifdef __cplusplus
}
#endif
#endif
