// SPDX-License-Identifier: Apache-2.0
//
// Which tokens are used: windows of a text, their drawing from a seed, and text that a model writes itself. Holds no
// bulk data and knows nothing of quantisation.
#ifndef KVQ_DATASETS_H
#define KVQ_DATASETS_H

#include "kvq_core.h"
#include "kvq_io.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kvq_bos_policy { KVQ_BOS_AUTO, KVQ_BOS_ALWAYS, KVQ_BOS_NEVER } kvq_bos_policy;

// Windows of equal length, each a sequence of its own: positions restart at 0 in each.
typedef struct kvq_windows {
    int64_t  n_windows, seq_len;            // N, S
    int32_t *ids;                           // [N, S]
    int64_t  n_available;                   // tokens of the sources they were taken from, as far as these were read
    bool     bos_added;                     // position 0 of every window is a beginning-of-text token
    char     source[256];                   // file names, or "self"
    char     source_sha256[KVQ_SHA256_HEX]; // of the texts (kvq_windows_name); "" when self-generated
    char     ids_sha256[KVQ_SHA256_HEX];    // of ids as int32 little-endian
    int64_t  n_heldout;                     // further windows of the same text that share no token with the others
    int32_t *heldout_ids;                   // [n_heldout, S]
} kvq_windows;
void kvq_windows_free(const kvq_context *ctx, kvq_windows *windows);

// ---------------------------------------------------------------- sources

// Token ids in documents, in order and from the start as often as needed, so that a source may be larger than memory.
typedef struct kvq_token_batch {
    const int32_t *ids;                // [n], valid until the next call
    int64_t        n;                  // 0 is possible
    bool           ends_document, end; // behind these ids a document ends; nothing follows
} kvq_token_batch;
typedef struct kvq_token_source {
    const char *name; // for messages; NULL = "the text"
    void       *user;
    kvq_status (*rewind)(void *user, kvq_error *err); // called before the first batch, too
    kvq_status (*next)(void *user, kvq_token_batch *batch, kvq_error *err);
} kvq_token_source;

// What happens to the line ends of a text before it is tokenized: models meet bare line feeds, blanks in front of them
// and blank lines, and a cache that was calibrated on one of these forms alone does worse on the others.
typedef enum kvq_newlines {
    KVQ_NEWLINES_KEPT,
    KVQ_NEWLINES_BARE,  // spaces in front of a line feed are dropped
    KVQ_NEWLINES_SINGLE // and blank lines
} kvq_newlines;
extern const char *const kvq_newlines_names[]; // "kept", "bare", "single", NULL at the end

// A text file as a source. Tokenizer and context are borrowed.
typedef struct kvq_text_source kvq_text_source;
typedef struct kvq_text_source_options {
    kvq_text_format format; // as for kvq_text_open, with field
    const char     *field;
    int64_t         vocab_size; // of the model: a larger id is KVQ_ERR_MISMATCH
    kvq_newlines    newlines;
} kvq_text_source_options;
kvq_status       kvq_text_source_open(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const char *path,
                                      const kvq_text_source_options *options, kvq_text_source **out, kvq_error *err);
void             kvq_text_source_close(const kvq_context *ctx, kvq_text_source **source);
kvq_token_source kvq_text_source_view(kvq_text_source *source);
// Of the file as it is stored.
kvq_status kvq_text_source_sha256(kvq_text_source *source, char sha256[KVQ_SHA256_HEX], kvq_error *err);

// ---------------------------------------------------------------- windows of sources

#define KVQ_MAX_SOURCES 32

// How windows are taken. With a BOS token (bos_id >= 0) it takes position 0 of a window and counts in S, so that a
// window has M = S - 1 tokens of the text; otherwise M = S.
typedef struct kvq_window_rule {
    int64_t  seq_len;        // S
    int64_t  n_windows;      // as many when they are drawn; at most as many when they are consecutive, 0 = all
    uint64_t seed;           // of drawn windows
    int64_t  bos_id;         // -1 = none
    bool     keep_documents; // no window holds tokens of two documents; those of fewer than M tokens are left out
    int32_t  joint[2];       // otherwise: ids that stand between two documents that are not empty, [n_joint]
    int      n_joint;
    bool python_draw;  // drawn starts are random.Random(seed).randint(0, T - M - 1) of Python, T tokens in one joined
                       // source, in ascending order; they may overlap. For comparison with the code of KVQuant
    int64_t n_heldout; // of drawn windows: as many more, where the gaps between the others leave room
} kvq_window_rule;

// What a source had, as far as it was read, and what was taken from it.
typedef struct kvq_source_use {
    int64_t n_documents, n_short; // n_short: left out because they are shorter than a window
    int64_t n_tokens;             // of the others, joints included
    int64_t n_windows;
    bool    overlap; // the windows share tokens
} kvq_source_use;

// Windows drawn from sources, each spread over its whole source. Memory holds the windows and one batch; every source
// is read twice, first to count its tokens, then up to the last token that is used.
//
// Windows are dealt to the sources in proportion to `weights` [n_sources] (0 or more, not all 0; they need not add up
// to 1), or to their tokens when weights is NULL: n * w / sum(w) rounded down, and what is left one by one to the
// largest fractions, the earlier source on a tie. Windows of a source stand together, in the order of sources, and
// within a source in the order of the text.
//
// Source number j with n windows and T tokens: its possible starts are divided into n equal strata, and one start is
// drawn from each (Philox, purpose KVQ_RNG_WINDOWS, stream j, index = window within the source).
//   joined         when n * M <= T, starts are those that leave room for the other windows, so that no two overlap;
//                  otherwise all T - M + 1
//   keep_documents a document of t tokens has floor(t / M) places, the first at its beginning, one behind the other.
//                  Where the source has n places in all, what is drawn is which; otherwise every start at which a
//                  window fits into its document is possible, and windows overlap
// KVQ_ERR_INPUT when a source that windows are dealt to cannot fill one. Warnings say what was left out and what
// overlaps. uses [n_sources] may be NULL.
//
// Held-out windows lie in the middle of the widest gaps between the others (the ends of the text are gaps too; the
// earlier one on a tie, no gap holds two), of joined sources that give windows, none of which overlap; never beside a
// python_draw. They stand in the order of sources and text, do not change which windows are drawn, and are read with
// them. out->n_heldout says how many there was room for.
//
// KVQ_ERR_USAGE for a python_draw of several sources or of documents that are kept.
kvq_status kvq_windows_draw(const kvq_context *ctx, const kvq_token_source *sources, const double *weights,
                            int n_sources, const kvq_window_rule *rule, kvq_source_use *uses, kvq_windows *out,
                            kvq_error *err);

// Consecutive windows from the start of each source, one source behind the other: all, or those dealt to it as above.
// What does not fill a window at the end of a text, or of a document that is kept, is not used. Nothing is read behind
// the last window; sources are read twice only when windows have to be dealt in proportion to tokens. KVQ_ERR_INPUT
// when a source has fewer windows than the weights ask for, or none.
kvq_status kvq_windows_take(const kvq_context *ctx, const kvq_token_source *sources, const double *weights,
                            int n_sources, const kvq_window_rule *rule, kvq_source_use *uses, kvq_windows *out,
                            kvq_error *err);

// Names the sources: one by its name and hash; of several the names joined by " + " (cut off with "..." when too long)
// and the hash of the text that sha256sum would print for them, a line "<sha256>  <name>" for each.
kvq_status kvq_windows_name(kvq_windows *windows, const char *const *names, char (*const sha256)[KVQ_SHA256_HEX],
                            int n_sources, kvq_error *err);

// The same for a list of ids in memory, as one document.
kvq_status kvq_windows_consecutive(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_max,
                                   int64_t bos_id, kvq_windows *out, kvq_error *err);
kvq_status kvq_windows_drawn(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_windows,
                             uint64_t seed, int64_t bos_id, kvq_windows *out, kvq_error *err);

// ---------------------------------------------------------------- self-generated text

// Text from a model, by a callback so that this folder need not know models. `step` receives the newest token of each
// of n_seqs sequences and u [n_seqs] in [0, 1), and returns the next tokens drawn at temperature 1 by inverse CDF at u.
typedef kvq_status (*kvq_next_token_fn)(void *user, int64_t n_seqs, const int32_t *ids, const double *u, int32_t *next,
                                        kvq_error *err);

// n windows of S tokens, each beginning with bos_id; after eos_id (-1 = none) the sequence goes on with bos_id, as
// packed training data do. u depends on (seed, window, position) alone.
kvq_status kvq_windows_self(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, uint64_t seed, int64_t bos_id,
                            int64_t eos_id, kvq_next_token_fn step, void *user, kvq_windows *out, kvq_error *err);

// ---------------------------------------------------------------- retrieval

// Windows that hide a pass key of five digits, to see whether a model finds it again:
//   [BOS] introduction, filler, needle ("The pass key is 12345. ..."), filler, question, answer (" 12345"), room
// in English that stands in passkey.c. Filler are sentences in random order; the first of them is cut off at its
// beginning, so that a window has exactly S tokens.
typedef struct kvq_passkey_rule {
    int64_t       seq_len; // S
    const double *depths;  // [n_depths] in [0, 1]: the share of the filler in front of the needle
    int           n_depths;
    int64_t       n_trials; // windows of each depth, 1 .. KVQ_MAX_PASSKEY_TRIALS
    uint64_t      seed;
    int64_t       bos_id; // -1 = none
    int64_t       vocab_size;
} kvq_passkey_rule;
#define KVQ_MAX_PASSKEY_TRIALS 65536
// The last tokens of every window, from answer_at on: the answer, and behind a shorter one filler that nothing of it
// sees. So that answers of all windows begin at one position, however many tokens a tokenizer makes of a number.
#define KVQ_PASSKEY_ROOM 8

typedef struct kvq_passkeys {
    kvq_windows windows; // [n_depths * n_trials, S]; number depth * n_trials + trial; source "passkey"
    int         n_depths;
    int64_t     n_trials;
    double     *depths;    // [n_depths]
    int64_t     answer_at; // S - KVQ_PASSKEY_ROOM
    int32_t    *keys;      // [N] 10000 .. 99999
    int32_t    *n_answer;  // [N] tokens of the answer, 1 .. KVQ_PASSKEY_ROOM
    int64_t    *needle_at; // [N] position of the needle: before the whole sentence, or at the end, nearest to the depth
} kvq_passkeys;
// Key and filler depend on (seed, S, depth in parts of 10000, trial) alone, not on what else is asked for. Texts are
// tokenized as they stand, a part with the sentence end before it in view, never joined from text of other tokens; so
// the answer is what the tokenizer makes of it behind the question. KVQ_ERR_USAGE when S is too short to have filler,
// naming the least possible; KVQ_ERR_UNSUPPORTED when an answer has more than KVQ_PASSKEY_ROOM tokens;
// KVQ_ERR_MISMATCH for an id that is not in the vocabulary.
kvq_status kvq_passkeys_make(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const kvq_passkey_rule *rule,
                             kvq_passkeys *out, kvq_error *err);
void       kvq_passkeys_free(const kvq_context *ctx, kvq_passkeys *keys);

#ifdef __cplusplus
}
#endif
#endif
