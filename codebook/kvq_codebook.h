// SPDX-License-Identifier: Apache-2.0
//
// From weighted numbers to a datatype: exact quantiles, thresholds, weighted histograms, exact one-dimensional k-means,
// bit accounting, and the in-memory form of what kvq stores (the artifact). Pure arithmetic on arrays; knows no files
// and no models.
//
// How is a codebook made?  Elements are normalised to [-1, 1] (per channel for K with fixed thresholds, per token for
// V),
//   elements kept apart as outliers and the sink tokens left out, the rest counted into 2^16 bins with their weights,
//   and the levels are the exact optimum of weighted squared error over the bins.
// Which weights?  Fisher information times the squared range (KVQuant, arXiv 2401.18079, Eq. 7): the squared gradient
// of
//   the loss with respect to the element, because an error in normalised units is r times larger in real ones.
// How many samples?  The effective sample size says: (sum w)^2 / sum w^2. Fewer than some hundreds per level is noise.
// Why a histogram?  Adding into bins is associative in fixed point: any order, thread or process count gives the same
//   bytes, and the fit costs the same for ten thousand and for a billion elements. What binning can hide is bounded.
#ifndef KVQ_CODEBOOK_H
#define KVQ_CODEBOOK_H

#include "kvq_block_hd.h"
#include "kvq_core.h"

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
int64_t    kvq_tails_needed(double fraction, int64_t n_rows); // values per end for thresholds over n_rows rows
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
// Per-channel K thresholds of a two-sided outlier fraction in [0, 1) (0: minimum and maximum) over all rows, which are
// the layer's K without sink rows. lower, upper: [n_columns].
kvq_status kvq_tails_thresholds(const kvq_context *ctx, kvq_tails *tails, double fraction, float *lower, float *upper,
                                kvq_error *err);

// Middle and half width of a range in f32: z = (u + l) / 2, r = (u - l) / 2.
static inline float kvq_range_middle(float lower, float upper) { return (upper + lower) / 2.0f; }
static inline float kvq_range_half(float lower, float upper) { return (upper - lower) / 2.0f; }

// ---------------------------------------------------------------- weighted histogram

#define KVQ_HISTOGRAM_BINS 65536 // over [-1, 1]; what lies outside is clipped to the end bins' edges

typedef struct kvq_bin {
    kvq_fixed w, wx; // sum of weights, sum of weight * normalised value
    kvq_fixed x;     // sum of normalised values
    int64_t   n;
} kvq_bin;

typedef struct kvq_histogram {
    kvq_bin  *bins;       // [KVQ_HISTOGRAM_BINS]
    kvq_fixed w2_large;   // sum of w^2 over weights of 2^-27 and more, and ...
    kvq_fixed w2_small;   // ... of w^2 * 2^45 over smaller ones: Fisher weights span many decades
    int64_t   n_outliers; // elements kept apart
    int64_t   n_constant; // elements of a constant channel or token, which decode exactly
} kvq_histogram;

kvq_status kvq_histogram_create(const kvq_context *ctx, kvq_histogram **out, kvq_error *err);
void       kvq_histogram_destroy(const kvq_context *ctx, kvq_histogram **h);
void       kvq_histogram_add(kvq_histogram *h, float x, double weight); // x clipped to [-1, 1]; 0 <= weight < 2^15
void       kvq_histogram_merge(kvq_histogram *into, const kvq_histogram *from);
void       kvq_histogram_clear(kvq_histogram *h);
// The occupied bins and all sums as bytes, to be saved or sent and merged elsewhere. KVQ_ERR_INTEGRITY when merged
// bytes are not what pack gives; h may then hold a part of them.
int64_t    kvq_histogram_packed_bytes(const kvq_histogram *h);
void       kvq_histogram_pack(const kvq_histogram *h, uint8_t *out);
kvq_status kvq_histogram_merge_packed(kvq_histogram *into, const uint8_t *packed, int64_t bytes, kvq_error *err);
double     kvq_histogram_effective_samples(const kvq_histogram *h); // (sum w)^2 / sum w^2; 0 when all weights are 0

// Counts the rows x [n_rows, d] of one tensor by the decoder's own rule (kvq_block_hd.h): outliers apart, the rest
// normalised. Element weight: weights[row, c] * r^2 (r of the channel for K, of the token for V), or weights alone when
// range_squared is false; weights NULL = 1. spec->z, r NULL means the V rule. Rows below n_skip are sinks and left out.
// KVQ_ERR_NUMERICAL, naming row and channel, for a non-finite element or weight, a negative weight, or one outside the
// range of the fixed-point sums; h then holds a part of the rows. Allocates nothing, so it may be called in parallel
// loops.
typedef struct kvq_count_options {
    bool    range_squared;
    int64_t n_skip;
} kvq_count_options;
kvq_status kvq_histogram_count_rows(kvq_histogram *h, const kvq_block_spec *spec, const float *x, const float *weights,
                                    int64_t n_rows, kvq_count_options options, kvq_error *err);

// The same for several tensors with the same rows, on all threads of ctx: histograms [n_threads, n_tensors], each
// thread counts into its own. Errors name tensor and position. Which thread counts what leaves no trace once
// kvq_histograms_gather has added all of them to the first n_tensors and cleared the others.
typedef struct kvq_count_tensor {
    const char           *name; // "K"
    const kvq_block_spec *spec;
    const float          *x, *weights; // [n_rows, spec->d]; weights NULL = 1
} kvq_count_tensor;
kvq_status kvq_histograms_count(const kvq_context *ctx, kvq_histogram **histograms, const kvq_count_tensor *tensors,
                                int n_tensors, int64_t n_rows, kvq_count_options options, kvq_error *err);
void       kvq_histograms_gather(kvq_histogram **histograms, int n_threads, int n_tensors);

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

// ---------------------------------------------------------------- the artifact in memory

typedef enum kvq_axis { KVQ_AXIS_CHANNEL, KVQ_AXIS_TOKEN } kvq_axis;

// Element weights of the fit.
typedef enum kvq_weighting { KVQ_WEIGHT_NONE, KVQ_WEIGHT_FISHER, KVQ_WEIGHT_FISHER_SCALED } kvq_weighting;
extern const char *const kvq_weighting_names[]; // in the order of the enumeration, NULL at the end
const char              *kvq_weighting_name(kvq_weighting weighting); // "none", "fisher", "fisher-scaled"
bool                     kvq_weighting_parse(const char *name, kvq_weighting *out);

typedef struct kvq_fit_report {
    int64_t n_points, n_outliers, n_constant;
    double  weight_sum, effective_samples;
    double  objective;     // weighted mean squared error in normalised units, over the bins
    double  binning_bound; // the true optimum is at most this much below `objective`
} kvq_fit_report;

// One tensor (K or V) of one layer. Which fields are set depends on the axis: K has thresholds per channel, V has none.
typedef struct kvq_tensor_quant {
    int      bits;
    kvq_axis axis;
    int      n_groups, n_levels, dim; // codebook [n_groups, n_levels, dim]; 1, 2^bits, 1 for one scalar table per layer
    float   *codebook;                // ascending within a group
    float   *lower, *upper;           // [Hkv, D] or NULL
    kvq_fit_report fit;
} kvq_tensor_quant;

typedef struct kvq_layer_quant {
    kvq_tensor_quant k, v;
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
        int64_t       sink_tokens;
        kvq_weighting weighting;
        char         *scheme; // "nuq"
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

// Views of an artifact tensor as the codec wants it. z and r [Hkv * D] of K are computed from the thresholds into
// `storage` (caller's, 2 * d floats); for V storage may be NULL.
kvq_block_spec kvq_tensor_block_spec(const kvq_tensor_quant *tensor, int d, int n_side, float *storage);

// ---------------------------------------------------------------- fit

// Levels of one histogram: 2^bits ascending f32 values into codebook, and the report.
kvq_status kvq_fit_histogram(const kvq_context *ctx, const kvq_histogram *h, int bits, float *codebook,
                             kvq_fit_report *report, kvq_error *err);

// ---------------------------------------------------------------- bit accounting

// Every byte a cache of n_tokens tokens of one sequence needs: packed rows, sink tokens in f16, thresholds (f32) and
// codebooks (f32). `tables_bytes` is the part that does not grow with tokens and is shared by all sequences.
typedef struct kvq_cache_size {
    int64_t n_elements; // K and V elements of all layers
    int64_t row_bytes, sink_bytes, tables_bytes;
} kvq_cache_size;
kvq_cache_size kvq_artifact_cache_size(const kvq_artifact *artifact, int64_t n_tokens);
double         kvq_cache_bits_per_element(kvq_cache_size size); // all bytes * 8 / elements

#ifdef __cplusplus
}
#endif
#endif
