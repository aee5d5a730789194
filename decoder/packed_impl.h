// SPDX-License-Identifier: Apache-2.0
// Private to the packed cache: what its two ways of storing tokens behind the sinks, rows and tiles, share.
#ifndef KVQ_PACKED_IMPL_H
#define KVQ_PACKED_IMPL_H

#include "decoder_impl.h"

// ---------------------------------------------------------------- pages (packed_pages.c)

// Bytes of a tensor's rows or tiles, in pages of KVQ_TILE_TOKENS tokens that are allocated when they are needed. They
// read as one array of bytes, in which nothing ever moves. Pages that are asked for together are one allocation: what
// a window brings at once lies in one piece, and the codec has work for all threads.
typedef struct packed_page {
    uint8_t *bytes;
    bool     owner; // its allocation begins here
} packed_page;

typedef struct packed_pages {
    int64_t      page_bytes, n_pages, n_most; // of a page; allocated; what there may be
    packed_page *table;                       // [n_most]
} packed_pages;

kvq_status packed_pages_create(const kvq_context *ctx, int64_t page_bytes, int64_t n_most, packed_pages *out,
                               kvq_error *err);
void       packed_pages_destroy(const kvq_context *ctx, packed_pages *pages);
// Makes sure that there are `n_pages`, at most n_most. After a failure there are as many as before.
kvq_status packed_pages_reserve(const kvq_context *ctx, packed_pages *pages, int64_t n_pages, kvq_error *err);
// Where byte `at` lies; *run (1 .. bytes) of the bytes from there on lie in one piece, a whole number of pages but for
// the first and the last one.
uint8_t *packed_pages_at(const packed_pages *pages, int64_t at, int64_t bytes, int64_t *run);
void     packed_pages_get(const packed_pages *pages, int64_t bytes, uint8_t *to); // the first `bytes`
void     packed_pages_put(const packed_pages *pages, int64_t at, int64_t bytes, const uint8_t *from);

static inline int64_t packed_pages_for(int64_t n_tokens) { return (n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS; }

// ---------------------------------------------------------------- one layer

// Rows (kvq_block_hd.h) in pages, counted from the first token behind the sinks, and behind them the recent window. The
// window is a ring: a token's place in it depends on its position alone, so nothing moves when it leaves.
typedef struct packed_rows {
    int64_t        n_recent;  // what there is room for
    int64_t        n_rows;    // tokens stored as rows
    kvq_block_spec specs[2];  // K, V
    float         *ranges[2]; // what belongs to channels, [3 d]
    uint16_t      *recent[2]; // [n_recent, d] f16
} packed_rows;

// Tiles (kvq_tile_hd.h) of 128 positions, sinks included, a page each, and the tokens of the last, incomplete one. When
// that is closed early its codes do not go into the pages: an append, which may fail, codes the tile anew.
typedef struct packed_tiles {
    kvq_tile_view views[2];
    uint16_t     *open[2];   // [128, d] f16 tokens behind the last complete tile
    uint8_t      *closed[2]; // the open tile as a flush coded it; NULL before the first one
    float        *row[2];    // [d] scratch of counting
    bool          flushed;   // the open tile is read from `closed`
} packed_tiles;

struct kvq_packed_layer {
    const kvq_context  *ctx;
    const kvq_artifact *artifact;
    int64_t             layer, capacity, length;
    int64_t             n_sinks; // what there is room for
    int                 d;
    uint16_t           *sinks[2]; // [n_sinks, d] f16
    bool                tiled;
    packed_pages        pages[2];
    packed_rows         rows;
    packed_tiles        tiles;
};

static inline int64_t packed_smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How many of n tokens from position `at` on are sinks.
static inline int64_t packed_sinks(const kvq_packed_layer *cache, int64_t at, int64_t n) {
    return cache->n_sinks > at ? packed_smaller(cache->n_sinks - at, n) : 0;
}

static inline int64_t packed_half_bytes(const kvq_packed_layer *cache, int64_t n_tokens) { // of K or V
    return n_tokens * cache->d * (int64_t)sizeof(uint16_t);
}

// "a number does not fit into f16", naming layer, tensor and position; or, when the backend has failed, that.
kvq_status packed_does_not_fit(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, int64_t position,
                               kvq_error *err);

// A copy into `to` (same artifact, layer and capacity) in two steps: `reserve_like` makes room for what `of` holds,
// which may be the cache itself, and leaves what `to` holds alone; `assign` cannot fail.
kvq_status packed_layer_reserve_like(kvq_packed_layer *to, const kvq_packed_layer *of, kvq_error *err);
void       packed_layer_assign(kvq_packed_layer *to, const kvq_packed_layer *from);

// Which model and tables the bytes of a cache belong to (packed_identity.c). KVQ_ERR_MEMORY.
kvq_status packed_identity(const kvq_packed_layer *cache, char hex[KVQ_SHA256_HEX], kvq_error *err);

// ---------------------------------------------------------------- rows and tiles

// An append happens in steps: `reserve` makes room; `prepare`, for each of K and V, does all else that can fail and
// changes nothing that is in use; `commit`, for each of them, does the rest; `advance` says what there is now. n tokens
// x [n, d] behind the `length` that are there; the caller has stored their sinks. `copied` is what is left of a copy
// when pages and sinks are copied.
kvq_status packed_rows_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err);
void       packed_rows_destroy(kvq_packed_layer *cache);
kvq_status packed_rows_reserve(kvq_packed_layer *cache, int64_t n, kvq_error *err);
kvq_status packed_rows_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                               int64_t n, kvq_error *err);
void       packed_rows_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n);
void       packed_rows_advance(kvq_packed_layer *cache, int64_t n);
kvq_status packed_rows_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err);
void    packed_rows_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x); // all but sinks
int64_t packed_rows_bytes(const kvq_packed_layer *cache);                                               // all but sinks
kvq_row_counts packed_rows_count(const kvq_packed_layer *cache, int tensor, const float *host_x);
void           packed_rows_copied(kvq_packed_layer *to, const kvq_packed_layer *from);
uint16_t      *packed_rows_recent(const kvq_packed_layer *cache, int tensor, int64_t token); // counted behind the sinks

kvq_status packed_tiles_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err);
void       packed_tiles_destroy(kvq_packed_layer *cache);
kvq_status packed_tiles_reserve(kvq_packed_layer *cache, int64_t n, kvq_error *err);
kvq_status packed_tiles_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                                int64_t n, kvq_error *err);
void       packed_tiles_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n);
kvq_status packed_tiles_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err);
void       packed_tiles_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x);
int64_t    packed_tiles_bytes(const kvq_packed_layer *cache);
kvq_row_counts packed_tiles_count(const kvq_packed_layer *cache, int tensor, const float *host_x);
kvq_status     packed_tiles_reserve_closed(kvq_packed_layer *cache, kvq_error *err); // room for a flush
void           packed_tiles_copied(kvq_packed_layer *to, const kvq_packed_layer *from);
int64_t        packed_tiles_coded(const kvq_packed_layer *cache); // positions that are read from tiles
// The i-th tile of those that are in use.
uint8_t *packed_tiles_at(const kvq_packed_layer *cache, int tensor, int64_t i);

#endif
