// SPDX-License-Identifier: Apache-2.0
//
// Private to the device's packed cache: what its two halves share, the cache and how it comes to be and is looked at
// (cache_memory.c), and what it does with tokens (cache.c).
#ifndef KVQ_CUDA_CACHE_IMPL_H
#define KVQ_CUDA_CACHE_IMPL_H

#include "cache_steps.h"
#include "kvq_cuda_attention.h"
#include "kvq_cuda_cache.h"
#include "kvq_cuda_codec.h"

enum { CACHE_PAGE = KVQ_TILE_TOKENS };

// Device memory. The last three hold nothing between calls and grow.
typedef enum cache_area {
    CACHE_TABLES, // of the specs of K, then of V
    CACHE_STATE,  // int32: lengths [n_seqs], coded [n_seqs], bad [n_seqs, 2], codec_bad [2], table [n_seqs, max_pages]
    CACHE_BASES,  // of rotary angles
    CACHE_OFFSETS,
    CACHE_PAGES,                     // K; the next one is V, and so on
    CACHE_SINKS = CACHE_PAGES + 2,   // [n_seqs, n_sinks, d] f16
    CACHE_RECENT = CACHE_SINKS + 2,  // [n_seqs, n_places, d] f16
    CACHE_STAGED = CACHE_RECENT + 2, // [n, d] f32 of tokens on their way from f16 to the codec
    CACHE_SCRATCH,                   // of the codec
    CACHE_WORKSPACE,                 // of attention
    CACHE_N_AREAS
} cache_area;

// Tokens are numbered as in cache_steps.h.
typedef struct cache_sequence {
    int64_t length;  // tokens, sinks among them
    int64_t n_coded; // tokens in rows, or positions in whole tiles
    int64_t n_pages;
} cache_sequence;

struct kvq_cuda_cache {
    kvq_cuda_device   *device;
    const kvq_context *ctx;
    bool               tiled;
    int                d, n_kv_heads, head_dim, n_seqs, n_pairs;
    int64_t            capacity, n_sinks, n_recent;
    int64_t            n_places;  // of f16 tokens behind the sinks: the ring, or the open tile
    int64_t            max_pages; // of a sequence
    int64_t            n_pages;   // of the pool
    kvq_block_spec     rows[2];   // on the device, as are the tiles
    kvq_cuda_tiles     tiles[2];
    int64_t            page_bytes[2], row_bytes[2]; // row_bytes: of a tile where there are tiles
    struct {
        void  *memory;
        size_t bytes;
    } areas[CACHE_N_AREAS];
    void *pinned; // on the way to and from the host
    // on the host
    cache_sequence *sequences;          // [n_seqs]
    int32_t        *table;              // [n_seqs, max_pages], as on the device
    uint8_t        *used;               // [n_pages]
    int64_t         n_free, first_free; // no free page lies before first_free
};

// Makes sure that an area has `bytes`; what it holds is lost when it grows.
kvq_status cache_grow(kvq_cuda_cache *cache, cache_area area, size_t bytes, kvq_error *err);
kvq_status cache_check_sequence(const kvq_cuda_cache *cache, int sequence, kvq_error *err);

static inline int64_t cache_smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t cache_larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t cache_pages_for(int64_t n_tokens) { return (n_tokens + CACHE_PAGE - 1) / CACHE_PAGE; }

// Position of token 0.
static inline int64_t cache_shift(const kvq_cuda_cache *c) { return c->tiled ? 0 : c->n_sinks; }
// Number of the token at a position; those of sinks in rows: 0.
static inline int64_t cache_token(const kvq_cuda_cache *c, int64_t position) {
    return cache_larger(position - cache_shift(c), 0);
}

static inline int32_t *cache_state_at(const kvq_cuda_cache *c, int64_t i) {
    return (int32_t *)c->areas[CACHE_STATE].memory + i;
}
static inline int32_t *cache_lengths(const kvq_cuda_cache *c) { return cache_state_at(c, 0); }
static inline int32_t *cache_coded(const kvq_cuda_cache *c) { return cache_state_at(c, c->n_seqs); }
static inline int32_t *cache_bad(const kvq_cuda_cache *c) { return cache_state_at(c, 2 * (int64_t)c->n_seqs); }
static inline int32_t *cache_codec_bad(const kvq_cuda_cache *c) { return cache_state_at(c, 4 * (int64_t)c->n_seqs); }
static inline int32_t *cache_table(const kvq_cuda_cache *c) { return cache_state_at(c, 4 * (int64_t)c->n_seqs + 2); }
static inline int64_t  cache_state_count(const kvq_cuda_cache *c) {
     return 4 * (int64_t)c->n_seqs + 2 + c->n_seqs * c->max_pages;
}

static inline int32_t *cache_pages_of(const kvq_cuda_cache *c, int sequence) { // on the host
    return c->table + sequence * c->max_pages;
}
static inline uint16_t *cache_halves(const kvq_cuda_cache *c, cache_area area, int tensor, int sequence) {
    int64_t n = area == CACHE_SINKS ? c->n_sinks : c->n_places;
    return (uint16_t *)c->areas[area + (cache_area)tensor].memory + sequence * n * c->d;
}

// Where token `first` is coded (in tiles, the first one of its tile); *n, up to n_wanted, of the tokens from there on
// lie in one piece.
uint8_t *cache_codes_at(const kvq_cuda_cache *cache, int sequence, int tensor, int64_t first, int64_t n_wanted,
                        int64_t *n);

#endif
