// SPDX-License-Identifier: Apache-2.0
//
// The one definition of the channel-allocated format: how 128 tokens of keys or of values of one layer become a *tile*
// of bytes and come back. Simulation, CPU decoder and GPU decoder all compile this text. docs/allocated.md draws it.
//
// A tile holds the tokens of positions [128 i, 128 i + 128), d = n_heads * head_dim elements each. What is coded
// together is a *column*: one channel (dim 1), or two adjacent channels of a head (dim 2). A column has a width of 0 to
// 8 bits that depends on nothing but the column, so a warp whose lanes are tokens decodes without divergence.
//
//     tile   | codes of head 0 | codes of head 1 | ... | keys: outliers   values: scales |
//
//     codes of a head    bit planes. The binary digits of a column's width say which planes it has: 5 = 4 + 1 bits,
//                        3 = 2 + 1. First the 8-bit planes of all columns that have one, then all 4-bit planes, then
//                        2, then 1; within a size by falling width, and by rising channel within a width. A plane of p
//                        bits is 16 p bytes: the p bits of token t are bits [t p, (t + 1) p) of it, little-endian, so
//                        every plane starts at a multiple of 16 bytes and no code straddles a byte. The largest plane
//                        holds the lowest bits of a code, the next one those above.
//     outliers (keys)    u16 count of each head, padded with zeros to a multiple of 4 bytes, then n_slots entries
//                        { u16 token << 9 | channel in its head, f16 residual } in the order of (head, token, channel);
//                        what is not used is zero. Nothing at all when n_slots is 0.
//     scales (values)    one for each token of head 0, then of head 1, ...: e4m3 (1 byte) or f16 (2 bytes)
//
// Keys, ranges per channel: x' = (x - z) / r in f32; the code is the nearest level of the channel's table; decoded
// value
//   z + r * level, each operation rounded, and where an outlier names the element its residual is added. r = 0: code 0,
//   decodes to z. r may be negative (a table shared by channels that lean the other way).
// Which elements are outliers is asked of another range: beyond = (x - middle) / half beyond +-KVQ_OUTLIER_EDGE; half =
//   0: never. Of a token at most n_side per side are, the largest |beyond| (ties: the lower channel); of all those of a
//   tile at most n_slots, the largest |beyond| (ties: the lower token, then the lower channel). The rest is coded as it
//   is, at the end of its table.
// Values, a scale per token and head: y = R x, R the rotation [head_dim, head_dim], y_i summed in f32 in the order of
// j;
//   s = sqrt(sum y_i^2 / head_dim), the sum in f32 in the order of i, then rounded to how it is stored: e4m3 holds
//   s * 2^-exponent. y' = y / s with the rounded s, 0 where that is 0. The code is the nearest level vector by squared
//   distance in f32 (dim 2: dx^2 + dy^2), the lower index on a tie. Decoded: y = s * level, x = R^T y, x_j summed in
//   f32 in the order of i. Attention over values needs R^T only once per head, on its weighted sum.
//
// Tokens of a tile that are not coded (sinks, and behind the end of a tile that is closed early) have code 0 in every
// column, no outliers, and scale 0.
#ifndef KVQ_TILE_HD_H
#define KVQ_TILE_HD_H

#include "kvq_block_hd.h"
#include "kvq_fp8_hd.h"

#define KVQ_TILE_TOKENS       128
#define KVQ_TILE_MAX_HEAD_DIM 512 // 9 bits name a channel of a head
#define KVQ_TILE_MAX_WIDTH    8

typedef enum kvq_scale_format { KVQ_SCALE_E4M3, KVQ_SCALE_F16, KVQ_N_SCALE_FORMATS } kvq_scale_format;

// Where the planes of a column lie: byte offsets from the start of the tile of its planes of 8, 4, 2, 1 bits, -1 =
// none.
typedef struct kvq_tile_column {
    int32_t at[4];
} kvq_tile_column;

// What is needed to code the tiles of one tensor of one layer. All pointers are borrowed.
typedef struct kvq_tile_spec {
    int                    d, head_dim; // head_dim divides d, 2 .. KVQ_TILE_MAX_HEAD_DIM
    int                    dim;         // channels of a column: 1 or 2; divides head_dim
    const uint8_t         *widths;      // [d / dim]
    const kvq_tile_column *columns;     // [d / dim], from kvq_tile_layout
    const float           *levels;      // level vectors [.., dim] of all tables
    const int32_t         *table;       // [d / dim] index of the first of a column's 2^width level vectors
    // keys; z, r NULL for values
    const float *z, *r;         // [d] map of levels to values
    const float *middle, *half; // [d] beyond which elements are outliers
    int          n_side;        // outliers of a token and side, 0 = none; at most KVQ_BLOCK_MAX_SIDE
    int          n_slots;       // outliers of a tile, 0 = none; at most 65535
    // values
    const float     *rotation; // [head_dim, head_dim], y = R x
    kvq_scale_format scale_format;
    int              scale_exponent;
} kvq_tile_spec;

// Fills columns [n_columns] and returns the bytes of all codes. per_head divides n_columns.
KVQ_HD int kvq_tile_layout(const uint8_t *widths, int n_columns, int per_head, kvq_tile_column *columns);
// Outlier entries of a tile that hold a two-sided fraction o of its elements, rounded up to an even number.
KVQ_HD int kvq_tile_slots(double fraction, int d);
KVQ_HD int kvq_tile_bytes(const kvq_tile_spec *s); // of one tile

// Scratch of one tile at a time, caller's: floats [KVQ_TILE_TOKENS * head_dim], keys [n_slots + 1], places [n_slots +
// 1]. A place is token * d + channel.
typedef struct kvq_tile_scratch {
    float    *floats;
    float    *keys;
    uint32_t *places;
} kvq_tile_scratch;

// Codes tokens [first, n_tokens) of x [n_tokens, d], n_tokens <= KVQ_TILE_TOKENS, into tile [kvq_tile_bytes]. Returns
// -1, or the first token (the lowest) with a residual or scale that does not fit into f16; the tile is then unusable.
// NaN and infinities must have been refused before.
KVQ_HD int kvq_tile_encode(const kvq_tile_spec *s, const float *x, int first, int n_tokens, const kvq_tile_scratch *w,
                           uint8_t *tile);
// Decodes tokens [first, n_tokens) into x [n_tokens, d]; the rows before `first` are left alone.
KVQ_HD void kvq_tile_decode(const kvq_tile_spec *s, const uint8_t *tile, int first, int n_tokens, float *x);

// One head of values: y [head_dim] = R x / s as it is coded, *s = the rounded scale. Counting uses it too. Returns 0
// when the scale does not fit.
KVQ_HD int kvq_tile_normalise_values(const kvq_tile_spec *s, const float *x, float *y, float *scale);
// Outliers that a tile holds; elements of tokens [first, n_tokens) beyond the range of their channel (values have
// none).
KVQ_HD int kvq_tile_count_outliers(const kvq_tile_spec *s, const uint8_t *tile);
KVQ_HD int kvq_tile_count_beyond(const kvq_tile_spec *s, const float *x, int first, int n_tokens);

#endif
