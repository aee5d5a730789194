// SPDX-License-Identifier: Apache-2.0
//
// What the parts of the decode attention kernels share: the cache as they see it, the piece of a sequence that a block
// works on, and tokens in f16.
//
// A block reads a sequence in chunks of 32 positions, one per lane of a warp. Chunks begin at multiples of 32, so a
// chunk lies in one tile and at one base of the rotary tables. Its tokens can be of all kinds at once (a sink, rows, a
// recent token), so where each lies is worked out once per chunk, and shared.
#ifndef KVQ_ATTENTION_CUH
#define KVQ_ATTENTION_CUH

#include "device.cuh"
#include "kvq_tile_hd.h"

enum {
    ATTEND_THREADS = 128,
    ATTEND_CHUNK = 32,
    ATTEND_MAX_DIM = 256,
    ATTEND_KEEPS = ATTEND_MAX_DIM / ATTEND_THREADS, // channels of the output that a thread sums
    // Where a token of a chunk lies: on the page of this index, or
    IN_HALVES = -1,
    HIDDEN = -2, // the query does not see it, or it does not exist
};

// Rows of one tensor.
struct RowTensor {
    KVQ_GLOBAL(const float) levels;
    KVQ_GLOBAL(const float) z; // [d] of channels
    KVQ_GLOBAL(const float) r;
    int per_token;   // z and r are behind the codes instead
    int bits, width; // of codes; channels of a table
    int code_bytes, row_bytes, n_slots;
};

// Tiles of one tensor. Keys have z, r and outliers, values a scale.
struct TileTensor {
    KVQ_GLOBAL(const int) columns; // [d / dim, KVQ_N_PLANES]
    KVQ_GLOBAL(const int) table;
    KVQ_GLOBAL(const float) levels;
    KVQ_GLOBAL(const float) z;
    KVQ_GLOBAL(const float) r;
    KVQ_GLOBAL(const float) rotation;
    int   dim, code_bytes, n_slots;
    int   half_scales; // f16, otherwise e4m3
    float scale_unit;  // 2^exponent of e4m3
};

// K or V.
struct Tensor {
    KVQ_GLOBAL(const uint8_t) pages;
    KVQ_GLOBAL(const uint16_t) sinks;
    KVQ_GLOBAL(const uint16_t) recent;
    int64_t    page_bytes;
    RowTensor  rows;
    TileTensor tiles;
};

struct Call {
    Tensor k, v;
    KVQ_GLOBAL(const int) page_table;
    KVQ_GLOBAL(const int) lengths;
    KVQ_GLOBAL(const int) coded;
    KVQ_GLOBAL(const float2) bases;
    KVQ_GLOBAL(const float2) offsets;
    int   n_pairs;
    int   n_heads, n_kv_heads, head_dim, d;
    int   max_length, max_pages, n_sinks, n_recent, window;
    int   n_splits, heads_per_block, blocks_per_group;
    float scale, softcap;
};

// A chunk of one sequence: its positions from `first` on, of which [begin, end) are seen; coded are [n_sinks,
// coded_end).
struct Chunk {
    int seq, kv_head;
    int first, begin, end, coded_end;
};

// Row of a chunk in shared memory: an odd number of floats, so that a column lies in 32 banks.
KVQ_DEVICE int row_stride(const Call &c) { return c.head_dim | 1; }

// Tokens are counted from the first one behind the sinks in rows, by position in tiles.
template <bool TILED> KVQ_DEVICE int stored_index(const Call &c, int position) {
    return TILED ? position : position - c.n_sinks;
}

template <bool TILED> KVQ_DEVICE void find_sources(const Call &c, const Chunk &chunk, KVQ_SHARED_PTR(int) source) {
    int t = (int)threadIdx.x, position = chunk.first + t, where = IN_HALVES;
    if (t >= ATTEND_CHUNK) return;
    if (position < chunk.begin || position >= chunk.end) {
        where = HIDDEN;
    } else if (position >= c.n_sinks && position < chunk.coded_end) {
        where = c.page_table[(int64_t)chunk.seq * c.max_pages + stored_index<TILED>(c, position) / KVQ_TILE_TOKENS];
    }
    source[t] = where;
}

// Channel `channel` of a token that is in f16.
template <bool TILED> KVQ_DEVICE float half_at(const Call &c, const Tensor &x, int seq, int position, int channel) {
    uint16_t half;
    if (position < c.n_sinks) {
        half = x.sinks[((int64_t)seq * c.n_sinks + position) * c.d + channel];
    } else {
        int place = stored_index<TILED>(c, position) % c.n_recent;
        half = x.recent[((int64_t)seq * c.n_recent + place) * c.d + channel];
    }
    return kvq_float_of_half(half);
}

#endif
