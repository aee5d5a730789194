// SPDX-License-Identifier: Apache-2.0
//
// Decode attention over packed keys and values on a device, exact mode: every operation is f32 and rounded, keys and
// values are what the CPU's codec decodes, bit for bit, and angles are right at any position. It is what faster kernels
// are compared with, and the fallback for shapes that they do not know.
//
// One call is one layer and one new query token per sequence:
//
//     out[h] = sum_t softmax_t(cap(scale * q[h] . R_t k_t)) v_t     over the tokens t that the query sees
//
// h a query head, k_t and v_t those of KV head h / (n_heads / n_kv_heads), R_t the rotation of position t where keys
// are stored before RoPE, cap(x) = softcap * tanh(x / softcap) or nothing. The new token is in the cache already, as
// its last one. The tokens are found where kvq_packed_layer has them: sinks and the last tokens in f16, the others in
// rows (kvq_block_hd.h) or tiles (kvq_tile_hd.h), in pages of 128.
//
// Same input, same bits, on every run and device: work is split by shapes alone and added up in order.
#ifndef KVQ_CUDA_ATTENTION_H
#define KVQ_CUDA_ATTENTION_H

#include "kvq_core.h"
#include "kvq_tile_hd.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVQ_CUDA_MAX_HEAD_DIM 256
#define KVQ_CUDA_MAX_SPLITS   256

// All pointers in these descriptions are device memory, borrowed until the stream has passed the call.

// A tensor in rows. `z`, `r` [d]: ranges per channel, z by which codes decode (grid_z of kvq_block_spec where that is
// set); both NULL: found per token, behind the codes.
typedef struct kvq_cuda_rows {
    int          bits, n_side; // 1 .. KVQ_MAX_BITS; outliers of a token and side
    int          n_groups;     // tables: 1, or one for each KV head
    const float *levels;       // [n_groups, 2^bits] what codes decode to
    const float *z, *r;
} kvq_cuda_rows;

// Keys in tiles, as in kvq_tile_spec.
typedef struct kvq_cuda_tile_keys {
    const kvq_tile_column *columns; // [d]
    const int32_t         *table;   // [d]
    const float           *levels;
    const float           *z, *r;      // [d]
    int                    code_bytes; // kvq_tile_code_bytes
    int                    n_slots;
} kvq_cuda_tile_keys;

typedef struct kvq_cuda_tile_values {
    int                    dim;      // 1, or 2: pairs
    const kvq_tile_column *columns;  // [d / dim]
    const int32_t         *table;    // [d / dim]
    const float           *levels;   // [.., dim]
    const float           *rotation; // [head_dim, head_dim]
    kvq_scale_format       scale_format;
    int                    scale_exponent; // of e4m3: -100 .. 100
    int                    code_bytes;
} kvq_cuda_tile_values;

// Angles p * frequency[i] of pairs (i, i + n_pairs) of the first 2 n_pairs channels of a head, in two levels: position
// p = 128 b + j takes bases[b] times offsets[j]. Filled on the host by kvq_cuda_rope_fill and copied.
typedef struct kvq_cuda_rope {
    int          n_pairs; // 0: keys are stored after RoPE, and there are no tables
    int64_t      n_bases; // positions below 128 n_bases
    const float *bases;   // [n_bases, n_pairs, 2] cosine, sine
    const float *offsets; // [128, n_pairs, 2]
} kvq_cuda_rope;

typedef struct kvq_cuda_attention_call {
    int     n_seqs, n_heads, n_kv_heads, head_dim; // head_dim even, 8 .. KVQ_CUDA_MAX_HEAD_DIM
    float   scale;                                 // of scores, 1 / sqrt(head_dim) as a rule
    float   softcap;                               // 0 = none
    int64_t window;                                // tokens that a query sees, itself included; 0 = all
    int     n_splits;                              // of a sequence, 1 .. KVQ_CUDA_MAX_SPLITS; 0 = chosen by shapes

    // The cache. K and V share the table of pages: page i of a sequence is at k_pages + table[i] * k_page_bytes, with
    // the tokens [128 i, 128 i + 128), counted from the first one behind the sinks in rows, by position in tiles.
    bool                 tiled;
    kvq_cuda_rows        k_rows, v_rows;
    kvq_cuda_tile_keys   k_tiles;
    kvq_cuda_tile_values v_tiles;
    kvq_cuda_rope        rope;
    const uint8_t       *k_pages, *v_pages;          // aligned to 4 bytes
    int64_t              k_page_bytes, v_page_bytes; // multiples of 4
    const int32_t       *page_table;                 // [n_seqs, max_pages]
    int                  max_pages;
    int                  n_sinks;             // first tokens of a sequence, in f16
    const uint16_t      *k_sinks, *v_sinks;   // [n_seqs, n_sinks, d]
    int                  n_recent;            // places for other tokens in f16; 128 with tiles
    const uint16_t      *k_recent, *v_recent; // [n_seqs, n_recent, d], see below
    const int32_t       *lengths;             // [n_seqs] tokens, up to max_length; 0: the output is 0
    const int32_t       *coded;               // [n_seqs] rows that there are, or positions that are read from tiles
    int64_t              max_length;

    const float *q;         // [n_seqs, n_heads, head_dim], after RoPE
    float       *out;       // the same
    void        *workspace; // kvq_cuda_attention_workspace bytes, aligned to 4; need not be cleared
} kvq_cuda_attention_call;

// Tokens that are neither sinks nor coded lie in `recent`: with rows, token i behind the sinks at place i % n_recent
// (a ring); with tiles, position p at place p % 128 (the open tile).

// Bytes of the workspace of a call of these shapes.
size_t kvq_cuda_attention_workspace(const kvq_cuda_attention_call *call);

// Starts the kernels of a call on a stream (cudaStream_t) of the current device and returns. KVQ_ERR_UNSUPPORTED: a
// shape that there is no kernel for; KVQ_ERR_USAGE: descriptions that contradict each other; KVQ_ERR_INTERNAL: the
// device refused to start. What lies in device memory is not looked at: page indices, lengths and outlier channels must
// be what kvq_packed_layer made. No synchronisation, no allocation, fit for graph capture.
kvq_status kvq_cuda_attention(const kvq_cuda_attention_call *call, void *stream, kvq_error *err);

// Fills host memory bases [n_bases, n_pairs, 2] and offsets [128, n_pairs, 2] from frequencies in radians per token,
// scaled in any way; `amplitude` (of YaRN, else 1) is multiplied into the offsets.
void kvq_cuda_rope_fill(const double *frequency, int n_pairs, double amplitude, int64_t n_bases, float *bases,
                        float *offsets);

#ifdef __cplusplus
}
#endif
#endif
