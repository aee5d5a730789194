// SPDX-License-Identifier: Apache-2.0
//
// A chunk of tokens in tiles (kvq_tile_hd.h) as floats in shared memory. Keys have the bits that kvq_tile_decode gives.
// Values stay as levels in the rotated space: their scales go into the weights, and the weighted sum is rotated back
// once. Lanes are tokens, so a warp reads one column at a time, and its planes are the same for all lanes.
#ifndef KVQ_ATTENTION_TILES_CUH
#define KVQ_ATTENTION_TILES_CUH

#include "attention.cuh"

KVQ_DEVICE KVQ_GLOBAL_ALIASED(const uint8_t) tile_at(const Tensor &x, int page) {
    return x.pages + page * x.page_bytes;
}

// The code of token `t` of the tile in a column; as kvq_tile_get_code.
KVQ_DEVICE int tile_code(const TileTensor &x, KVQ_GLOBAL_ALIASED(const uint8_t) tile, int column, int t) {
    unsigned code = 0;
    int      shift = 0;
    KVQ_UNROLL
    for (int k = 0; k < KVQ_N_PLANES; k++) {
        int bits = 8 >> k, bit = t * bits, at = x.columns[column * KVQ_N_PLANES + k];
        if (at < 0) continue;
        code |= (((unsigned)tile[at + (bit >> 3)] >> (bit & 7)) & ((1u << bits) - 1u)) << shift;
        shift += bits;
    }
    return (int)code;
}

KVQ_DEVICE float tile_key(const TileTensor &x, KVQ_GLOBAL_ALIASED(const uint8_t) tile, int channel, int t) {
    float level = x.levels[x.table[channel] + tile_code(x, tile, channel, t)];
    return x.z[channel] + x.r[channel] * level;
}

KVQ_DEVICE float tile_value_level(const TileTensor &x, KVQ_GLOBAL_ALIASED(const uint8_t) tile, int channel, int t) {
    int column = channel / x.dim, code = x.table[column] + tile_code(x, tile, column, t);
    return x.levels[code * x.dim + channel % x.dim];
}

// kv [ATTEND_CHUNK, row_stride]: keys without outliers, or levels of values; 0 where hidden.
template <bool KEYS>
KVQ_DEVICE void load_tile(const Call &c, const Tensor &x, const Chunk &chunk, KVQ_SHARED_PTR(const int) source,
                          KVQ_SHARED_PTR(float) kv) {
    int t = (int)threadIdx.x % 32, page = source[t], in_tile = (chunk.first + t) % KVQ_TILE_TOKENS;
    for (int k = (int)threadIdx.x / 32; k < c.head_dim; k += ATTEND_THREADS / 32) {
        int   channel = chunk.kv_head * c.head_dim + k;
        float value = 0;
        if (page >= 0)
            value = KEYS ? tile_key(x.tiles, tile_at(x, page), channel, in_tile)
                         : tile_value_level(x.tiles, tile_at(x, page), channel, in_tile);
        if (page == IN_HALVES) value = half_at<true>(c, x, chunk.seq, chunk.first + t, channel);
        kv[t * row_stride(c) + k] = value;
    }
}

// The page of the chunk's tile, or -1 when none of its tokens is coded.
KVQ_DEVICE int tile_page(const Call &c, const Chunk &chunk) {
    int from = max(max(chunk.first, chunk.begin), c.n_sinks);
    int end = min(min(chunk.first + ATTEND_CHUNK, chunk.end), chunk.coded_end);
    if (from >= end) return -1;
    return c.page_table[(int64_t)chunk.seq * c.max_pages + chunk.first / KVQ_TILE_TOKENS];
}

// Adds the residuals of this head's outliers that are in the chunk. A tile names an element once, so no two threads
// meet. The first entry of a head is behind those of the heads before it.
KVQ_DEVICE void add_tile_outliers(const Call &c, const Tensor &x, const Chunk &chunk, KVQ_SHARED_PTR(const int) source,
                                  KVQ_SHARED_PTR(float) kv) {
    int page = tile_page(c, chunk), count_at = x.tiles.code_bytes, first = 0;
    if (x.tiles.n_slots == 0 || page < 0) return;
    KVQ_GLOBAL_ALIASED(const uint16_t) counts = kvq_as<uint16_t>(tile_at(x, page) + count_at);
    KVQ_GLOBAL_ALIASED(const uint16_t)
    entries = counts + (2 * c.n_kv_heads + 3) / 4 * 2; // padded to a multiple of 4 bytes
    for (int head = 0; head < chunk.kv_head; head++) first += (int)counts[head];
    int end = first + (int)counts[chunk.kv_head];
    for (int i = first + (int)threadIdx.x; i < end; i += ATTEND_THREADS) {
        int place = (int)entries[2 * i], t = (place >> 9) - chunk.first % KVQ_TILE_TOKENS, k = place & 511;
        if (t < 0 || t >= ATTEND_CHUNK || k >= c.head_dim) continue;
        if (source[t] >= 0) kv[t * row_stride(c) + k] += kvq_float_of_half(entries[2 * i + 1]);
    }
}

// The scale of token t of the chunk in this head, 0 where its value is not coded.
KVQ_DEVICE float tile_scale(const Tensor &x, const Chunk &chunk, int t, int page) {
    const TileTensor &v = x.tiles;
    int               i = chunk.kv_head * KVQ_TILE_TOKENS + (chunk.first + t) % KVQ_TILE_TOKENS;
    if (page < 0) return 0;
    KVQ_GLOBAL_ALIASED(const uint8_t) scales = tile_at(x, page) + v.code_bytes;
    if (v.half_scales) return kvq_float_of_half(kvq_as<uint16_t>(scales)[i]);
    return kvq_float_of_e4m3(scales[i]) * v.scale_unit;
}

#endif
