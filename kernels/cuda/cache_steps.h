// SPDX-License-Identifier: Apache-2.0
//
// Private to the device's packed cache: what its kernels (cache_steps.cu) do for cache.c. Pointers but `tokens`,
// `places` and `state` are device memory; nothing waits.
#ifndef KVQ_CUDA_CACHE_STEPS_H
#define KVQ_CUDA_CACHE_STEPS_H

#include "kvq_core.h"

#ifdef __cplusplus
extern "C" {
#endif

// Tokens are numbered by the place that they are stored at: by position, or, in rows, counted from the first one behind
// the sinks.
typedef struct cache_tokens {
    int     d;
    int64_t first, n; // the tokens in question
    int64_t shift;    // position of token 0
    int64_t n_places; // token i is at place i % n_places of f16 memory
} cache_tokens;

// Of one sequence, all in device memory; `bad` and `codec_bad` for K and V.
typedef struct cache_state {
    int32_t *length, *coded;
    int32_t *bad;       // lowest position with a number that f16 cannot hold, or INT_MAX
    int32_t *codec_bad; // first_bad of the codec's last calls, or INT_MAX
} cache_state;

// k, v [n, d] into their places, [n_places, d] f16. What f16 cannot hold becomes 0, so that nothing behind it meets an
// infinity, and is noted in bad.
kvq_status cache_store(const cache_tokens *tokens, const float *const x[2], uint16_t *const places[2], int32_t *bad,
                       void *stream, kvq_error *err);
// staged [n, d] f32: tokens before new_first from their places, others from x [.., d], which begins with new_first,
// rounded to f16. Of one tensor; *bad is its.
kvq_status cache_stage(const cache_tokens *tokens, const uint16_t *places, const float *x, int64_t new_first,
                       float *staged, int32_t *bad, void *stream, kvq_error *err);
// What the codec has noted, counted from position `base`, goes to bad; the sequence has `length` tokens, `coded` coded.
kvq_status cache_advance(const cache_state *state, int64_t base, int64_t length, int64_t coded, void *stream,
                         kvq_error *err);
kvq_status cache_forget(const cache_state *state, void *stream, kvq_error *err); // an empty sequence
// Pages [page, page + n) of the pool are the next of a sequence: table [n].
kvq_status cache_map(int32_t *table, int64_t page, int64_t n, void *stream, kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
