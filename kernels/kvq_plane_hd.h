// SPDX-License-Identifier: Apache-2.0
//
// Codes of a tile in bit planes: where the planes of a column lie, and codes in and out of them. The layout is drawn in
// kvq_tile_hd.h.
#ifndef KVQ_PLANE_HD_H
#define KVQ_PLANE_HD_H

#include "kvq_hd.h"

#define KVQ_TILE_TOKENS    128
#define KVQ_TILE_MAX_WIDTH 8
#define KVQ_N_PLANES       4 // of 8, 4, 2 and 1 bits: plane k has 8 >> k

// Where the planes of a column lie: byte offsets from the start of the tile of its planes of 8, 4, 2, 1 bits, -1 =
// none.
typedef struct kvq_tile_column {
    int32_t at[KVQ_N_PLANES];
} kvq_tile_column;

// Fills columns [n_columns] and returns the bytes of all codes. per_head divides n_columns.
KVQ_HD int kvq_tile_layout(const uint8_t *widths, int n_columns, int per_head, kvq_tile_column *columns) {
    int at = 0;
    for (int head = 0; head < n_columns; head += per_head) {
        for (int k = 0; k < KVQ_N_PLANES; k++) {
            int bits = 8 >> k;
            for (int c = head; c < head + per_head; c++) columns[c].at[k] = -1;
            for (int width = KVQ_TILE_MAX_WIDTH; width >= bits; width--) {
                for (int c = head; c < head + per_head && (width & bits) != 0; c++) {
                    if (widths[c] != width) continue;
                    columns[c].at[k] = at;
                    at += bits * (KVQ_TILE_TOKENS / 8);
                }
            }
        }
    }
    return at;
}

// The code of one token.
KVQ_HD int kvq_tile_get_code(const kvq_tile_column *column, const uint8_t *tile, int token) {
    unsigned code = 0;
    int      shift = 0;
    for (int k = 0; k < KVQ_N_PLANES; k++) {
        int bits = 8 >> k, bit = token * bits;
        if (column->at[k] < 0) continue;
        code |= (((unsigned)tile[column->at[k] + (bit >> 3)] >> (bit & 7)) & ((1u << bits) - 1u)) << shift;
        shift += bits;
    }
    return (int)code;
}

// One plane of `bits` bits from the bits of codes [KVQ_TILE_TOKENS] from `shift` up. Neighbours are joined until they
// fill a byte: loops over many bytes that a compiler makes vector code of, between two arrays, for in place it would
// not.
KVQ_HD void kvq_plane_pack(const uint8_t *codes, int shift, int bits, uint8_t *plane) {
    uint8_t parts[2][KVQ_TILE_TOKENS], *from = parts[0], *to = parts[1];
    int     n = KVQ_TILE_TOKENS, mask = (1 << bits) - 1;
    for (int t = 0; t < KVQ_TILE_TOKENS; t++) from[t] = (uint8_t)((codes[t] >> shift) & mask);
    for (int filled = bits; filled < 8; filled *= 2) {
        n /= 2;
        for (int i = 0; i < n; i++) to[i] = (uint8_t)(from[2 * i] | from[2 * i + 1] << filled);
        uint8_t *joined = to;
        to = from;
        from = joined;
    }
    memcpy(plane, from, (size_t)n);
}

// Adds the bits of a plane to codes [n], from `shift` up; `plane` is where the first of these tokens lies in it. n is a
// multiple of 8, at most KVQ_TILE_TOKENS.
KVQ_HD void kvq_plane_unpack(const uint8_t *plane, int shift, int bits, int n, uint8_t *codes) {
    uint8_t parts[2][KVQ_TILE_TOKENS], *from = parts[0], *to = parts[1];
    int     n_from = n * bits / 8;
    memcpy(from, plane, (size_t)n_from);
    for (int filled = 4; filled >= bits; filled /= 2) {
        for (int i = 0; i < n_from; i++) {
            to[2 * i] = (uint8_t)(from[i] & ((1 << filled) - 1));
            to[2 * i + 1] = (uint8_t)(from[i] >> filled);
        }
        n_from *= 2;
        uint8_t *split = to;
        to = from;
        from = split;
    }
    for (int t = 0; t < n; t++) codes[t] = (uint8_t)(codes[t] | from[t] << shift);
}

// All planes of a column from codes [KVQ_TILE_TOKENS].
KVQ_HD void kvq_tile_put_codes(const kvq_tile_column *column, const uint8_t *codes, uint8_t *tile) {
    int shift = 0;
    for (int k = 0; k < KVQ_N_PLANES; k++) {
        if (column->at[k] < 0) continue;
        kvq_plane_pack(codes, shift, 8 >> k, tile + column->at[k]);
        shift += 8 >> k;
    }
}

// Codes [n] of tokens [token, token + n), multiples of 8.
KVQ_HD void kvq_tile_get_codes(const kvq_tile_column *column, const uint8_t *tile, int token, int n, uint8_t *codes) {
    int shift = 0;
    memset(codes, 0, (size_t)n);
    for (int k = 0; k < KVQ_N_PLANES; k++) {
        int bits = 8 >> k;
        if (column->at[k] < 0) continue;
        kvq_plane_unpack(tile + column->at[k] + token * bits / 8, shift, bits, n, codes);
        shift += bits;
    }
}

#endif
