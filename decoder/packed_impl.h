// SPDX-License-Identifier: Apache-2.0
// Private to the packed cache: what its two ways of storing tokens behind the sinks, rows and tiles, share.
#ifndef KVQ_PACKED_IMPL_H
#define KVQ_PACKED_IMPL_H

#include "decoder_impl.h"

// Rows (kvq_block_hd.h) and, behind them, the recent window. The window is a ring: a token's place in it depends on its
// position alone, so nothing moves when it leaves.
typedef struct packed_rows {
    int64_t        n_recent;  // what there is room for
    int64_t        n_rows;    // tokens stored as rows
    kvq_block_spec specs[2];  // K, V
    float         *ranges[2]; // what belongs to channels, [3 d]
    uint16_t      *recent[2]; // [n_recent, d] f16
    uint8_t       *rows[2];   // [capacity - n_sinks, row_bytes]
} packed_rows;

// Tiles (kvq_tile_hd.h) of 128 positions, sinks included, and the tokens of the last, incomplete one.
typedef struct packed_tiles {
    kvq_tile_view views[2];
    uint8_t      *tiles[2]; // [ceil(capacity / 128), tile_bytes]
    uint16_t     *open[2];  // [128, d] f16 tokens behind the last complete tile
    float        *row[2];   // [d] scratch of counting
    bool          flushed;  // the open tile is coded too, and read from there
} packed_tiles;

struct kvq_packed_layer {
    const kvq_context *ctx;
    int64_t            layer, capacity, length;
    int64_t            n_sinks; // what there is room for
    int                d;
    uint16_t          *sinks[2]; // [n_sinks, d] f16
    bool               tiled;
    packed_rows        rows;
    packed_tiles       tiles;
};

static inline int64_t packed_smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// x [n] of the backend -> f16 on the host (`to` may be NULL: only looked at). Returns the index of the first number
// that does not fit, or -1.
int64_t packed_store_halves(const kvq_backend *be, const float *x, int64_t n, uint16_t *to);
void    packed_load_halves(const kvq_backend *be, const uint16_t *from, int64_t n, float *x);
void    packed_round_to_half(const kvq_backend *be, float *x, int64_t n);
// "a number does not fit into f16", naming layer, tensor and position
kvq_status packed_does_not_fit(const kvq_packed_layer *cache, int tensor, int64_t position, kvq_error *err);

// An append happens in two steps for each of K and V: `prepare` does all that can fail and changes nothing that is in
// use, `commit` the rest. n tokens x [n, d] behind the `length` that are there; the caller has stored their sinks.
kvq_status packed_rows_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err);
void       packed_rows_destroy(kvq_packed_layer *cache);
kvq_status packed_rows_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                               int64_t n, kvq_error *err);
void       packed_rows_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n);
void       packed_rows_advance(kvq_packed_layer *cache, int64_t n); // after both commits
kvq_status packed_rows_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err);
void    packed_rows_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x); // all but sinks
int64_t packed_rows_bytes(const kvq_packed_layer *cache);                                               // all but sinks
kvq_row_counts packed_rows_count(const kvq_packed_layer *cache, int tensor, const float *host_x);

kvq_status packed_tiles_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err);
void       packed_tiles_destroy(kvq_packed_layer *cache);
kvq_status packed_tiles_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                                int64_t n, kvq_error *err);
void       packed_tiles_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n);
kvq_status packed_tiles_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err);
void       packed_tiles_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x);
int64_t    packed_tiles_bytes(const kvq_packed_layer *cache);
kvq_row_counts packed_tiles_count(const kvq_packed_layer *cache, int tensor, const float *host_x);

#endif
