// SPDX-License-Identifier: Apache-2.0
//
// What a packed cache on a device is told, and its functions as an optional part of a backend's table. The cache itself
// is kernels/cuda/kvq_cuda_cache.h, where its rules are.
#ifndef KVQ_DEVICE_CACHE_H
#define KVQ_DEVICE_CACHE_H

#include "kvq_core.h"
#include "kvq_tile_hd.h"

#ifdef __cplusplus
extern "C" {
#endif

// One layer's cache of several sequences, channels d = n_kv_heads * head_dim of K and of V. Specs and frequencies are
// host memory that is not needed once the cache is there.
typedef struct kvq_cache_layer {
    bool           tiled;
    kvq_block_spec rows[2];  // K, V, unless tiled; d channels each
    kvq_tile_spec  tiles[2]; // K, V, when tiled
    int            n_kv_heads, head_dim;
    int            n_seqs;    // 1 .. 65535
    int64_t        capacity;  // tokens of a sequence, 1 .. 2^30
    int64_t        n_sinks;   // first tokens of a sequence, in f16; what exceeds the capacity is ignored
    int64_t        n_recent;  // rows: last tokens in f16, as n_sinks; tiles: 0
    int64_t        n_pages;   // of 128 tokens, in a pool that all sequences take from; 0: enough for all of them
    int            n_pairs;   // keys come before RoPE, channels (i, i + n_pairs) of a head turn; 0: after RoPE
    const double  *frequency; // [n_pairs] radians per token, scaled in any way
    double         amplitude; // of the rotated keys, YaRN's; else 1
} kvq_cache_layer;

// One new token of every sequence; see kvq_cuda_attention.h.
typedef struct kvq_cache_query {
    int     n_heads;  // a multiple of n_kv_heads
    float   scale;    // of scores, 1 / sqrt(head_dim) as a rule
    float   softcap;  // 0 = none
    int64_t window;   // tokens that a query sees, itself included; 0 = all
    int     n_splits; // of a sequence; 0 = chosen by shapes
} kvq_cache_query;

// The parts of a tensor of a sequence; one after the other, of K and then of V, they are what kvq_packed_layer_save has
// between header and seal (docs/packed-cache.md).
typedef enum kvq_cache_part {
    KVQ_CACHE_SINKS,   // [n, d] f16
    KVQ_CACHE_CODED,   // rows [n, row bytes], or whole tiles
    KVQ_CACHE_WAITING, // [n, d] f16, the tokens behind them
    KVQ_N_CACHE_PARTS
} kvq_cache_part;

// ---------------------------------------------------------------- in the table of a backend

// Packed caches in a backend's memory; all numbers k, v, q, out are the backend's. As the functions of
// kvq_cuda_cache.h, in the backend's order: one thread at a time, and who downloads a result has waited for it. A
// failure of the device is told by a later call, or by the backend's check.
typedef struct kvq_device_cache kvq_device_cache;
struct kvq_backend;
typedef struct kvq_cache_functions {
    kvq_status (*create)(const struct kvq_backend *be, const kvq_cache_layer *layer, kvq_device_cache **out,
                         kvq_error *err);
    void (*destroy)(const struct kvq_backend *be, kvq_device_cache **cache); // *cache may be NULL
    kvq_status (*append)(const struct kvq_backend *be, kvq_device_cache *cache, int sequence, const float *k,
                         const float *v, int64_t n, kvq_error *err);
    kvq_status (*reset)(const struct kvq_backend *be, kvq_device_cache *cache, int sequence, kvq_error *err);
    kvq_status (*attend)(const struct kvq_backend *be, kvq_device_cache *cache, const kvq_cache_query *query,
                         const float *q, float *out, kvq_error *err);
    kvq_status (*check)(const struct kvq_backend *be, kvq_device_cache *cache, kvq_error *err); // waits
    int64_t (*part_bytes)(const kvq_device_cache *cache, int sequence, int tensor, kvq_cache_part part);
    kvq_status (*read)(const struct kvq_backend *be, kvq_device_cache *cache, int sequence, int tensor,
                       kvq_cache_part part, void *host, kvq_error *err);
    int64_t (*held_bytes)(const kvq_device_cache *cache);
} kvq_cache_functions;

#ifdef __cplusplus
}
#endif
#endif
