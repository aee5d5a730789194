// SPDX-License-Identifier: Apache-2.0
//
// The packed cache of one layer on a device, for several sequences: what a port to another device or engine starts
// from. It is kvq_cuda_codec.h and kvq_cuda_attention.h put together by the rules of the CPU's cache
// (kvq_packed_layer): the same tokens, in whatever pieces, give the same bytes.
//
//     kvq_cuda_cache_create(device, ctx, &layer, &cache, err);
//     kvq_cuda_cache_append(cache, 0, k, v, n_prompt, stream, err);          // a prompt
//     kvq_cuda_cache_append(cache, 0, k + .., v + .., 1, stream, err);       // and token by token
//     kvq_cuda_cache_attend(cache, &query, q, out, stream, err);             // one query of every sequence
//     kvq_cuda_cache_check(cache, NULL, stream, err);                        // now and then
//
// How tokens lie:
//   * the first n_sinks of a sequence, in f16
//   * rows: the others as rows, but the last n_recent in f16, in a ring. A token is coded from its f16 values when it
//     leaves the ring, or at once, from f32, where there is no ring.
//   * tiles: whole tiles of 128 positions; the last, incomplete one waits in f16 and is coded from those values
//   * rows and tiles in pages of 128 tokens out of one pool. A sequence takes the first free page, so a prompt in a
//     fresh cache lies in one piece; no page ever moves. The table of pages is on the device, as are all lengths.
//
// Order: work is put on the stream (a cudaStream_t) that a function is given, and nothing waits for the device unless
// it says so. What one cache is asked for on different streams the caller orders by events. One thread at a time.
//
// All sizes are known on the host. An append of n tokens to rows without a recent window is, for each piece of pages
// that lies together (one, as a rule), two launches of the codec and a small one: nothing is copied, allocated or
// waited for, also not when pages are taken. Positions are arguments of launches, so a graph that captures a step is
// good for that step alone.
//
// Numbers that f16 cannot hold (of sinks, recent tokens, tokens of tiles; residuals and ranges of rows) are noticed on
// the device and remembered there. From that token on the sequence's bytes and outputs are unusable, until it is reset;
// others are as they should be. NaN and infinities are noticed as well wherever a token passes through f16; tokens that
// are coded from f32 at once must be without them, as with the codec.
#ifndef KVQ_CUDA_CACHE_H
#define KVQ_CUDA_CACHE_H

#include "kvq_cuda_runtime.h"
#include "kvq_device_cache.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvq_cuda_cache kvq_cuda_cache;

// An empty cache; device and ctx are borrowed for its life. Waits. KVQ_ERR_USAGE: sizes or specs that contradict each
// other; KVQ_ERR_MEMORY: host or device, naming what was to be allocated; KVQ_ERR_INTERNAL: the device failed.
kvq_status kvq_cuda_cache_create(kvq_cuda_device *device, const kvq_context *ctx, const kvq_cache_layer *layer,
                                 kvq_cuda_cache **out, kvq_error *err);
void       kvq_cuda_cache_destroy(kvq_cuda_cache **cache); // waits; *cache may be NULL

// Appends n >= 0 tokens k, v [n, d] f32, device memory, to a sequence. KVQ_ERR_USAGE: no such sequence, or more than
// its capacity, and KVQ_ERR_MEMORY: no page is free, or no memory for tokens on their way; the cache is as before.
// KVQ_ERR_INTERNAL: the device refused a launch; the sequence must be reset. Waits where more tokens pass through f16
// to the codec than in any append before (up to 1024): memory for them is allocated.
kvq_status kvq_cuda_cache_append(kvq_cuda_cache *cache, int sequence, const float *k, const float *v, int64_t n,
                                 void *stream, kvq_error *err);

// Forgets a sequence, also that it had a number beyond f16. KVQ_ERR_USAGE: no such sequence.
kvq_status kvq_cuda_cache_reset(kvq_cuda_cache *cache, int sequence, void *stream, kvq_error *err);

// Attention of the last token of every sequence: q, out [n_seqs, n_heads, head_dim] in device memory, q after RoPE. The
// output of an empty sequence is 0. Waits only for more heads or splits than ever before. Errors of kvq_cuda_attention.
kvq_status kvq_cuda_cache_attend(kvq_cuda_cache *cache, const kvq_cache_query *query, const float *q, float *out,
                                 void *stream, kvq_error *err);

// Where a number was that f16 cannot hold.
typedef struct kvq_cuda_cache_bad {
    int     sequence, tensor; // 0 K, 1 V
    int64_t position;
} kvq_cuda_cache_bad;

// Waits for the stream. KVQ_ERR_NUMERICAL: a number did not fit; told, and put into *bad (may be NULL), is the first
// position of the first sequence that has one, K before V. KVQ_ERR_INTERNAL: the device failed.
kvq_status kvq_cuda_cache_check(kvq_cuda_cache *cache, kvq_cuda_cache_bad *bad, void *stream, kvq_error *err);

// Bytes of a part of tensor 0 (K) or 1 (V) of a sequence, and themselves, into host memory. Reading waits.
int64_t    kvq_cuda_cache_part_bytes(const kvq_cuda_cache *cache, int sequence, int tensor, kvq_cache_part part);
kvq_status kvq_cuda_cache_read(kvq_cuda_cache *cache, int sequence, int tensor, kvq_cache_part part, void *host,
                               void *stream, kvq_error *err);

int64_t kvq_cuda_cache_length(const kvq_cuda_cache *cache, int sequence); // tokens
int64_t kvq_cuda_cache_bytes(const kvq_cuda_cache *cache, int sequence);  // of its tokens, as kvq_packed_layer_bytes
int64_t kvq_cuda_cache_held_bytes(const kvq_cuda_cache *cache);           // device memory, all that is allocated

#ifdef __cplusplus
}
#endif
#endif
