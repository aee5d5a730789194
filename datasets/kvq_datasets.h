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
    int64_t  n_available;                   // tokens of the source they were taken from
    bool     bos_added;                     // position 0 of every window is a beginning-of-text token
    char     source[256];                   // file name, or "self"
    char     source_sha256[KVQ_SHA256_HEX]; // of the text; "" when self-generated
    char     ids_sha256[KVQ_SHA256_HEX];    // of ids as int32 little-endian
} kvq_windows;
void kvq_windows_free(const kvq_context *ctx, kvq_windows *windows);

// Consecutive windows from the start: window i = ids[i*s, (i+1)*s), at most n_max (0 = all). With a BOS token
// (bos_id >= 0) it takes position 0, counts in S, and a window advances by S - 1 tokens.
// KVQ_ERR_INPUT when the text is shorter than one window.
kvq_status kvq_windows_consecutive(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_max,
                                   int64_t bos_id, kvq_windows *out, kvq_error *err);

// n windows for calibration, spread over the whole text: the possible starts are divided into n equal strata and one
// start is drawn from each (Philox, purpose KVQ_RNG_WINDOWS, stream 0, index = window). Possible are, in a text that
// holds n windows, those that leave room for the others, so that no two overlap; in a shorter text all.
kvq_status kvq_windows_drawn(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_windows,
                             uint64_t seed, int64_t bos_id, kvq_windows *out, kvq_error *err);

// Text from a model, by a callback so that this folder need not know models. `step` receives the newest token of each
// of n_seqs sequences and u [n_seqs] in [0, 1), and returns the next tokens drawn at temperature 1 by inverse CDF at u.
typedef kvq_status (*kvq_next_token_fn)(void *user, int64_t n_seqs, const int32_t *ids, const double *u, int32_t *next,
                                        kvq_error *err);

// n windows of S tokens, each beginning with bos_id; after eos_id (-1 = none) the sequence goes on with bos_id, as
// packed training data do. u depends on (seed, window, position) alone.
kvq_status kvq_windows_self(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, uint64_t seed, int64_t bos_id,
                            int64_t eos_id, kvq_next_token_fn step, void *user, kvq_windows *out, kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
