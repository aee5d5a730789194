// SPDX-License-Identifier: Apache-2.0
//
// The proof: a cache that holds packed bytes, and statistics of what a model loses when it attends to it.
#ifndef KVQ_DECODER_H
#define KVQ_DECODER_H

#include "kvq_codebook.h"
#include "kvq_core.h"
#include "kvq_datasets.h"
#include "kvq_kernels.h"
#include "kvq_model.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------- packed cache

// K and V of one layer and one sequence as an engine would store them: the first sink_tokens and the last recent_tokens
// tokens in f16, the rest as rows of kvq_block_hd.h. A recent token is encoded, from its f16 values, when it leaves
// that window. Of an artifact of scheme "alloc" the rest is in tiles of kvq_tile_hd.h by absolute position; the tokens
// of the last, incomplete tile are in f16 and are encoded when it is full. Keys are given and stored before or after
// RoPE, as the artifact's key domain says.
//
// Rows and tiles are in pages of 128 tokens, which are allocated when tokens arrive: beside them a cache holds room for
// sinks and for the recent window or the open tile. Nothing that was stored moves. `ctx` and `artifact` are borrowed
// for the life of a cache, which is used by one thread at a time.
typedef struct kvq_packed_layer kvq_packed_layer;
// An empty cache of one layer for at most `capacity` tokens (0 or more); before tokens come a page costs its entry
// in a table. KVQ_ERR_USAGE when there is no such layer, KVQ_ERR_MEMORY.
kvq_status kvq_packed_layer_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t layer,
                                   int64_t capacity, kvq_packed_layer **out, kvq_error *err);
void       kvq_packed_layer_destroy(const kvq_context *ctx, kvq_packed_layer **cache);
void       kvq_packed_layer_reset(kvq_packed_layer *cache); // length 0; the pages are kept
// An independent copy, of the same capacity: what is appended to one does not show in the other. KVQ_ERR_MEMORY.
kvq_status kvq_packed_layer_copy(const kvq_context *ctx, const kvq_packed_layer *cache, kvq_packed_layer **out,
                                 kvq_error *err);
// Appends n tokens; k, v [n, d] in backend memory. KVQ_ERR_USAGE beyond the capacity, KVQ_ERR_NUMERICAL when a number
// does not fit into f16 (layer, tensor, position are named), KVQ_ERR_MEMORY; the cache then holds what it held before.
// Any pieces give the same bytes.
kvq_status kvq_packed_layer_append(const kvq_backend *be, kvq_packed_layer *cache, const float *k, const float *v,
                                   int64_t n, kvq_error *err);
// Encodes what is in the recent window before its time; the tokens that follow fill a new one. In tiles: encodes the
// open tile as far as it is; an append opens it again, with what it held. KVQ_ERR_NUMERICAL and KVQ_ERR_MEMORY as
// above.
kvq_status kvq_packed_layer_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err);
// All that the queries of a window see when its n tokens come one by one, at once: k, v [n, d] go through the empty
// cache, which is flushed, and become what it gives back; k_recent, v_recent [n, d] (NULL = not wanted) become what was
// given in f16. Query i reads the keys j > i - recent_tokens from the second pair and all others from the first. Why
// that is the same: a row depends on the f16 values of its token and on the artifact, not on other tokens, nor on when
// it is encoded; and right after token i was appended, the tokens (i - recent_tokens, i] but the sinks, which are in
// f16 in both pairs, are the recent window.
kvq_status kvq_packed_layer_prefill(const kvq_backend *be, kvq_packed_layer *cache, int64_t n, float *k, float *v,
                                    float *k_recent, float *v_recent, kvq_error *err);
// Decodes positions [0, length) into k, v [length, d].
void    kvq_packed_layer_decode(const kvq_backend *be, const kvq_packed_layer *cache, float *k, float *v);
int64_t kvq_packed_layer_length(const kvq_packed_layer *cache);
int64_t kvq_packed_layer_bytes(const kvq_packed_layer *cache); // stored for the current length, tables excluded
// Allocated for tokens: pages, also those that a reset left empty, and the room for sinks and for f16 tokens.
int64_t kvq_packed_layer_held_bytes(const kvq_packed_layer *cache);

// A cache as bytes that do not depend on its capacity nor on the machine (docs/packed-cache.md draws them): out
// [saved_bytes]. KVQ_ERR_MEMORY, and `out` is then useless.
int64_t    kvq_packed_layer_saved_bytes(const kvq_packed_layer *cache);
kvq_status kvq_packed_layer_save(const kvq_packed_layer *cache, uint8_t *out, kvq_error *err);
// A cache of the given capacity that goes on where the saved one was; `data` is borrowed for the call. Any bytes are
// safe to try. KVQ_ERR_INTEGRITY: truncated, damaged, or not such bytes at all; KVQ_ERR_VERSION: of another version;
// KVQ_ERR_MISMATCH: of another layer or model, or coded with other tables or settings; KVQ_ERR_USAGE: no such layer, or
// more tokens than the capacity; KVQ_ERR_MEMORY.
kvq_status kvq_packed_layer_load(const kvq_context *ctx, const kvq_artifact *artifact, int64_t layer, int64_t capacity,
                                 const uint8_t *data, int64_t bytes, kvq_packed_layer **out, kvq_error *err);

// K and V of all layers of a model for several sequences of at most `capacity` tokens each.
typedef struct kvq_packed_cache kvq_packed_cache;
kvq_status kvq_packed_cache_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t n_sequences,
                                   int64_t capacity, kvq_packed_cache **out, kvq_error *err); // KVQ_ERR_MEMORY, _USAGE
void       kvq_packed_cache_destroy(const kvq_context *ctx, kvq_packed_cache **cache);
// One layer of one sequence, borrowed from the cache; NULL when there is none such.
kvq_packed_layer *kvq_packed_cache_layer(const kvq_packed_cache *cache, int64_t sequence, int64_t layer);
// Length 0 for all layers of a sequence; KVQ_ERR_USAGE when there is none such.
kvq_status kvq_packed_cache_reset(kvq_packed_cache *cache, int64_t sequence, kvq_error *err);
// Makes sequence `to` an independent copy of sequence `from`: all layers, or none after KVQ_ERR_MEMORY or _USAGE.
kvq_status kvq_packed_cache_copy(kvq_packed_cache *cache, int64_t from, int64_t to, kvq_error *err);
int64_t    kvq_packed_cache_bytes(const kvq_packed_cache *cache); // sums over layers and sequences
int64_t    kvq_packed_cache_held_bytes(const kvq_packed_cache *cache);

// ---------------------------------------------------------------- held-out errors

// Fills the held-out reports of every layer: the windows pass through the model in full precision, and beside it each
// layer's K and V go through the packed cache and its attention is computed from K alone, V alone, and both quantised.
// Element errors are those of rows: sink tokens are left out, recent ones count as the rows that they become. Clipped
// are elements beyond the range of their channel for which no outlier slot was left; ranges per token clip nothing.
// Attention sees sinks and recent tokens in f16. Memory: one layer of weights and the hidden states of a group of
// windows. KVQ_ERR_INPUT without windows, KVQ_ERR_INTERRUPTED when ctx->stop asks for it; reports are then as before.
int64_t    kvq_heldout_bytes(const kvq_model *model, int64_t seq_len, int64_t n_windows); // beside weights
kvq_status kvq_measure_heldout(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, kvq_artifact *artifact,
                               const kvq_windows *windows, kvq_error *err);

// ---------------------------------------------------------------- sensitivity of single tensors

// kl [n_layers, 2] = mean KL(full precision || quantised) in nats per token when K, or V, of one layer alone goes
// through the packed cache of the artifact, over the beginnings (at most 512 tokens) of as many windows, spread over
// those given, as hold n_tokens; every fourth position is scored. No recent window. Only the rows of layers [first,
// end) are measured and set, so that long work can be done in pieces: the pieces do not change the numbers. Memory and
// work: kvq_sensitivity_plan. KVQ_ERR_INTERRUPTED when ctx->stop asks for it.
typedef struct kvq_sensitivity_cost {
    int64_t n_windows, n_tokens; // that are measured; n_tokens of each
    int64_t n_layers;            // whose tensors are measured together
    int64_t bytes;               // beside weights
    double  tera_flops;
} kvq_sensitivity_cost;
kvq_sensitivity_cost kvq_sensitivity_plan(const kvq_model *model, int64_t seq_len, int64_t n_windows, int64_t n_tokens);
kvq_status           kvq_measure_sensitivity(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                                             const kvq_artifact *artifact, const kvq_windows *windows, int64_t n_tokens,
                                             int64_t first, int64_t end, double *kl, kvq_error *err);

// ---------------------------------------------------------------- estimates

// A number that was measured on blocks of text, with its standard error and its interval of 95 %. Blocks are windows;
// they are taken as independent of each other, tokens inside of one are not. With a single block the last three are
// NaN. An end of an interval that the data cannot give is infinite. NaN among the data makes all of it NaN.
typedef struct kvq_estimate {
    double value, stderr_, low, high;
} kvq_estimate;
// sum of sums [n] / sum of counts [n] (NULL: 1 each). stderr = sqrt(sum e^2 n / (n - 1)) / sum of counts with
// e_i = sums_i - value counts_i; blocks whose sum and count are 0 are as if they were not there. The ends are those of
// Student's interval or of a studentised bootstrap over blocks (Efron and Tibshirani 1993, 12.5), whichever lies
// farther out, but none farther than twice Student's; with fewer than KVQ_BOOTSTRAP_BLOCKS blocks they are Student's.
// stderr 0: low = high = value. Without counts to divide by, all are NaN. Same input, same bits. What it covers,
// measured: 94 to 97 % where values are lognormal with sigma 1.5 and correlated between tokens, at any number of blocks
// from 4 on; 91 to 93 % where a block holds only a handful of independent values with sigma 2.
#define KVQ_BOOTSTRAP_BLOCKS 4
kvq_estimate kvq_estimate_ratio(const double *sums, const double *counts, int64_t n);
// The q-quantiles, q [n_q] in (0, 1), of values [n_blocks, n]: the smallest value that a share of at least q of all
// does not exceed. Their intervals (Woodruff 1952): the share of a block's values that are not above the quantile is
// estimated over blocks; moved to q, and at least as wide as that of independent values, the interval of this share
// gives two ranks, and half a rank farther out (shares move in steps) the values at the ends. stderr is NaN. The high
// end is infinite where there is nothing beyond it: of p99.9 with fewer than about 5000 values. KVQ_ERR_MEMORY.
kvq_status kvq_estimate_quantiles(const kvq_context *ctx, const float *values, int64_t n_blocks, int64_t n,
                                  const double *q, int n_q, kvq_estimate *out, kvq_error *err);

// ---------------------------------------------------------------- validation

// Keys beyond the thresholds of their channel (outliers, and what is cut off when there are too many), sinks left out.
// `expected`: the share in calibration, and what chance adds to it on new text. Where the share is larger by the
// margin, and by two standard errors over windows, the text is of another kind than the calibration's.
#define KVQ_RANGE_MARGIN 1.25
typedef struct kvq_range_report {
    bool         exceeds;
    double       expected;
    kvq_estimate share;                      // of all elements of K
    int64_t      layer, channel, token;      // the layer with most of them, its worst channel, the worst token id
    double       layer_share, channel_share; // of the elements of that layer, of that channel
    double       token_part;                 // of all elements beyond their range, those at that token
} kvq_range_report;

// Which keys and values a query sees.
// prefill: all as the cache gives them back (KVQuant's protocol); with a recent window the last recent_tokens, its own
//   included, in f16.
// decode: the first n_prompt tokens see each other in f16, as in an engine that packs a prompt after it was computed.
//   Every later token is appended to the packed cache and then sees what that holds: rows and a recent window, or whole
//   tiles and an open one. Only tokens behind the prompt are scored.
typedef enum kvq_protocol { KVQ_PROTOCOL_PREFILL, KVQ_PROTOCOL_DECODE } kvq_protocol;
extern const char *const kvq_protocol_names[]; // "prefill", "decode", NULL at the end

typedef struct kvq_validate_options {
    kvq_protocol protocol;
    int64_t      n_prompt;      // decode: 1 .. seq_len - 2
    int64_t      layer_windows; // so many windows, from the first, are measured layer by layer
    int64_t      noise_windows; // on so many the noise floor is measured
} kvq_validate_options;

// The positions whose number (0 = first of the window), or whose reference is as sure of its first choice as, [from,
// to); a certainty of 1 is in the last bucket.
typedef struct kvq_bucket {
    double       from, to;
    int64_t      n;                           // scored
    double       baseline_nll, quantized_nll; // means
    kvq_estimate difference_nll, kld, top1;
} kvq_bucket;
#define KVQ_MAX_BUCKETS 24

// Errors of one layer through the packed cache, its input being in full precision so that they are its own; sinks left
// out. Code use: entropy of the codes / their bits, 1 when all codes are equally frequent.
typedef struct kvq_layer_errors {
    kvq_heldout_report k, v; // attention_error: of this tensor alone
    double             k_code_use, v_code_use;
    kvq_estimate       attention_error; // |o - o'| / |o| of both together
} kvq_layer_errors;

// KL of all scored positions in bins of a decade's quarter, for a picture: bin i holds [10^(i/4 - 8), 10^((i+1)/4 -
// 8)), the first one everything below, the last one everything above.
#define KVQ_KLD_BINS 40

enum { KVQ_KLD_MEDIAN, KVQ_KLD_P90, KVQ_KLD_P99, KVQ_KLD_P999, KVQ_N_KLD_QUANTILES };

enum { KVQ_BASELINE_HIT = 1, KVQ_QUANTIZED_HIT = 2 }; // bits of a position whose first choice is the token that follows

// nll = -log p(token | tokens before) in nats; perplexity = exp(mean nll). Every estimate is over windows, differences
// are paired: of the same token with the full-precision and with the quantised cache; where an interval
// reaches beyond what a number can be, a share beyond 1, it ends there.
typedef struct kvq_validation {
    bool                 has_artifact; // false: only the baseline's fields are set
    kvq_validate_options options;
    int64_t              n_windows, seq_len;
    int64_t              n_scored, tokens_scored; // in a window, in all
    kvq_estimate         baseline_nll, quantized_nll, difference_nll;
    kvq_estimate         baseline_ppl, quantized_ppl;
    kvq_estimate         dppl; // quantized_ppl / baseline_ppl - 1 = exp(difference_nll) - 1; 0.01 = 1 %
    kvq_estimate         kld;  // KL(baseline || quantised) in nats per token
    kvq_estimate         kld_quantiles[KVQ_N_KLD_QUANTILES];
    double               kld_max;
    kvq_estimate         top1;   // share of positions where both have the same first choice
    kvq_estimate         top5;   // share of the baseline's first five that are among the other's first five
    kvq_estimate         dp_rms; // root of the mean square of p(token) quantised - p(token) baseline
    bool                 has_noise;
    kvq_estimate         noise_kld, noise_top1; // full precision against itself with hidden states rounded to bf16
                                                // between layers: what no cache can be blamed for
    int               n_positions, n_confidences;
    kvq_bucket        positions[KVQ_MAX_BUCKETS], confidences[KVQ_MAX_BUCKETS];
    int64_t           kld_histogram[KVQ_KLD_BINS];
    int64_t           n_layers;
    kvq_layer_errors *layers;    // [n_layers], NULL when no window was measured layer by layer
    bool              has_range; // the artifact knows ranges of channels, and some tokens are no sinks
    kvq_range_report  range;
    kvq_cache_size    size;           // of one window
    double            effective_bits; // of a cache that holds the windows as sequences; these share the tables
    bool              has_regression; // kvq_validation_compare was called
    kvq_estimate      regression_ppl, regression_kld; // relative change against an earlier report
    bool              has_passkey; // set by who ran kvq_validate_passkey; everything else is then unknown
    kvq_estimate      passkey;     // kvq_passkey_kept
    double           *window_baseline_nll, *window_quantized_nll, *window_kld, *window_top1; // [N], means over n_scored
    float            *position_kld;                                                          // [N, n_scored]
    uint8_t          *position_hits;                                                         // [N, n_scored]
} kvq_validation;
void kvq_validation_free(const kvq_context *ctx, kvq_validation *validation);

// Scores every window with full precision and, when artifact is not NULL, with K and V through the packed cache as the
// protocol says. options NULL: prefill, and nothing beside it. Both passes run over the same windows side by side;
// memory is one layer of weights, the hidden states of a group of windows, logits of a block of positions, and a few
// bytes per scored position.
kvq_status kvq_validate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_artifact *artifact,
                        const kvq_windows *windows, const kvq_validate_options *options, kvq_validation *out,
                        kvq_error *err);

// What that costs, options as above: memory at its peak, with weights and what is mapped of their file, and work.
typedef struct kvq_validate_cost {
    int64_t bytes;
    double  tera_flops;
} kvq_validate_cost;
kvq_validate_cost kvq_validate_plan(const kvq_model *model, bool has_artifact, int64_t n_windows, int64_t seq_len,
                                    const kvq_validate_options *options);

// Sets the regression of a validation against an earlier one of the same windows, given by its window means [N].
// Paired.
void kvq_validation_compare(kvq_validation *validation, const double *earlier_quantized_nll, const double *earlier_kld);

// ---------------------------------------------------------------- retrieval

// Of the windows that hide a pass key at one depth: those whose key is retrieved, that is every token of the answer is
// the first choice behind those before it.
typedef struct kvq_passkey_cell {
    int64_t seq_len;
    double  depth;
    int64_t n_trials, baseline, quantized,
        both; // retrieved with the full-precision, with the quantised cache, with both
} kvq_passkey_cell;
kvq_validate_options kvq_passkey_options(const kvq_passkeys *keys); // by which such windows are validated
// cells [keys->n_depths]. Protocol decode: all but the last token of the question are the prompt, so the first token of
// the answer is predicted by the first step that sees the cache. As kvq_validate, which it calls.
kvq_status kvq_validate_passkey(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                                const kvq_artifact *artifact, const kvq_passkeys *keys, kvq_passkey_cell *cells,
                                kvq_error *err);
// The share of what the baseline retrieves that is retrieved with the quantised cache as well, over all cells. Trials
// are independent, so the interval is that of a share (Wilson 1927), which has a width even where all are retrieved.
// NaN when the baseline retrieves none.
kvq_estimate kvq_passkey_kept(const kvq_passkey_cell *cells, int64_t n_cells);

// KVQ_ERR_MISMATCH when the artifact was made for another model; names the first field that differs.
kvq_status kvq_artifact_matches(const kvq_artifact *artifact, const kvq_model_config *config,
                                const kvq_checkpoint_identity *identity, kvq_error *err);

// ---------------------------------------------------------------- beginning of text

// The first windows (at most 2, at most 512 tokens of text each), with a BOS token in front and without one. Scored are
// the n_tokens - 1 tokens of the text that both ways predict; the losses are their means in nats per token. No window
// (n_windows 0): they are too short.
typedef struct kvq_bos_trial {
    int64_t n_windows, n_tokens;
    double  with_bos, without_bos; // set by kvq_bos_trial_run
    double  tera_flops;
} kvq_bos_trial;
kvq_bos_trial kvq_bos_trial_plan(const kvq_model *model, const kvq_windows *windows);
// bos_id is in the vocabulary. Memory: one layer of weights and the hidden states of four short windows.
kvq_status kvq_bos_trial_run(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                             const kvq_windows *windows, int64_t bos_id, kvq_bos_trial *out, kvq_error *err);

// ---------------------------------------------------------------- gates

typedef enum kvq_verdict { KVQ_PASS, KVQ_FAIL, KVQ_INCONCLUSIVE } kvq_verdict;
extern const char *const kvq_verdict_names[]; // "pass", "fail", "inconclusive"

// `metric operator limit`: dppl<=1%, kld.p99<=0.2, top1>=97%, ppl<=25. Shares may be written in percent: 1% or 0.01.
typedef struct kvq_gate {
    char        expression[64];
    const char *metric; // points to a table of names
    bool        share;
    bool        at_most;
    double      limit;
} kvq_gate;
kvq_status kvq_gate_parse(const char *expression, kvq_gate *out, kvq_error *err); // KVQ_ERR_USAGE lists the metrics
bool       kvq_gate_needs_artifact(const kvq_gate *gate);

// By the interval of what was measured: pass when all of it is within the limit, fail when none of it is, otherwise
// inconclusive; with a single window, which has no interval, always. By the point: pass or fail. What was not measured,
// or is not finite, fails either way; effective_bits and kld.max are what they are, without an interval.
// tokens_to_decide: scored tokens, all told (for layer.attn_err.max those of windows measured layer by layer), with
// which an interval around the same value would end at the limit, since its width shrinks as 1 / sqrt(tokens); infinite
// when the value is the limit or an end is, NaN with a single window, 0 when decided.
typedef struct kvq_judgement {
    kvq_verdict  verdict;
    kvq_estimate measured;
    double       tokens_to_decide;
} kvq_judgement;
kvq_judgement kvq_gate_judge(const kvq_gate *gate, const kvq_validation *validation, bool by_point);

#ifdef __cplusplus
}
#endif
#endif
