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
// Keys, ranges per channel: x' = (x - z) / r in f32; the code is the nearest level of the channel's table by
//   |x' - level| in f32, the lower index on a tie; decoded value z + r * level, each operation rounded, and where an
//   outlier names the element its residual is added. r = 0: code 0, decodes to z. r may be negative (a table shared by
//   channels that lean the other way).
// Which elements are outliers is asked of another range: beyond = (x - middle) / half beyond +-KVQ_OUTLIER_EDGE; half =
//   0: never. Of a token at most n_side per side are, the largest |beyond| (ties: the lower channel); of all those of a
//   tile at most n_slots, the largest |beyond| (ties: the lower token, then the lower channel). The rest is coded as it
//   is, at the end of its table.
// Values, a scale per token and head: y = R x, R the rotation [head_dim, head_dim], y_i summed in f32 in the order of
//   j, from 0 on; s = sqrt(sum y_i^2 / head_dim), the sum in f32 in the order of i, then rounded to how it is stored:
//   e4m3 holds s * 2^-exponent. y' = y / s with the rounded s, 0 where that is 0. The code is the nearest level vector
//   by squared distance in f32 (dim 2: dx^2 + dy^2), the lower index on a tie. Decoded: y = s * level, x = R^T y, x_j
//   summed in f32 in the order of i, from 0 on. Attention over values needs R^T only once per head, on its weighted
//   sum.
//
// Tokens of a tile that are not coded (sinks, and behind the end of a tile that is closed early) have code 0 in every
// column, no outliers, and scale 0.
#ifndef KVQ_TILE_HD_H
#define KVQ_TILE_HD_H

#include "kvq_block_hd.h"
#include "kvq_fp8_hd.h"
#include "kvq_plane_hd.h"

#define KVQ_TILE_MAX_HEAD_DIM 512   // 9 bits name a channel of a head
#define KVQ_TILE_MAX_SLOTS    65534 // the largest even count of outliers that 16 bits hold
#define KVQ_TILE_LANES        16    // tokens that are rotated together

typedef enum kvq_scale_format { KVQ_SCALE_E4M3, KVQ_SCALE_F16, KVQ_N_SCALE_FORMATS } kvq_scale_format;

// What is needed to code the tiles of one tensor of one layer. All pointers are borrowed.
typedef struct kvq_tile_spec {
    int                    d, head_dim; // head_dim divides d, 2 .. KVQ_TILE_MAX_HEAD_DIM
    int                    dim;         // channels of a column: 1, or 2 for values; divides head_dim
    const uint8_t         *widths;      // [d / dim]
    const kvq_tile_column *columns;     // [d / dim], from kvq_tile_layout
    const float           *levels;      // level vectors [.., dim] of all tables
    const int32_t         *table;       // [d / dim] index of the first of a column's 2^width level vectors
    // keys; z, r NULL for values
    const float *z, *r;         // [d] map of levels to values
    const float *middle, *half; // [d] beyond which elements are outliers
    int          n_side;        // outliers of a token and side, 0 = none; at most KVQ_BLOCK_MAX_SIDE
    int          n_slots;       // outliers of a tile, 0 = none; at most KVQ_TILE_MAX_SLOTS
    // values
    const float     *rotation; // [head_dim, head_dim], y = R x
    kvq_scale_format scale_format;
    int              scale_exponent;
} kvq_tile_spec;

// Scratch of one tile at a time, caller's: floats [KVQ_TILE_TOKENS * head_dim], keys [n_slots + 1], places [n_slots +
// 1]. A place is token * d + channel.
typedef struct kvq_tile_scratch {
    float    *floats;
    float    *keys;
    uint32_t *places;
} kvq_tile_scratch;

// ---------------------------------------------------------------- sizes

// Outlier entries of a tile that hold a two-sided fraction o of its elements, rounded up to an even number, at most
// KVQ_TILE_MAX_SLOTS. The small constant keeps products such as 0.01 * 12800 from rising above the integer they stand
// for.
KVQ_HD int kvq_tile_slots(double fraction, int d) {
    if (!(fraction > 0)) return 0;
    int pairs = (int)ceil(fraction * KVQ_TILE_TOKENS * d / 2 - 1e-9);
    return pairs < KVQ_TILE_MAX_SLOTS / 2 ? 2 * pairs : KVQ_TILE_MAX_SLOTS;
}

KVQ_HD int kvq_tile_code_bytes(const kvq_tile_spec *s) {
    int bits = 0;
    for (int c = 0; c < s->d / s->dim; c++) bits += s->widths[c];
    return bits * (KVQ_TILE_TOKENS / 8);
}

// Of the counts in front of the outliers.
KVQ_HD int kvq_tile_count_bytes(const kvq_tile_spec *s) { return (2 * (s->d / s->head_dim) + 3) / 4 * 4; }

KVQ_HD int kvq_tile_bytes(const kvq_tile_spec *s) { // of one tile
    int scales = KVQ_TILE_TOKENS * (s->d / s->head_dim) * (s->scale_format == KVQ_SCALE_F16 ? 2 : 1);
    int outliers = s->n_slots > 0 ? kvq_tile_count_bytes(s) + 4 * s->n_slots : 0;
    return kvq_tile_code_bytes(s) + (s->r != 0 ? outliers : scales);
}

// ---------------------------------------------------------------- scales and rotation of values

// What is stored of a scale, and what that stands for.
KVQ_HD uint16_t kvq_tile_code_of_scale(const kvq_tile_spec *s, float scale) {
    if (s->scale_format == KVQ_SCALE_F16) return kvq_half_of_float(scale);
    return kvq_e4m3_of_float(ldexpf(scale, -s->scale_exponent));
}

KVQ_HD float kvq_tile_scale_of_code(const kvq_tile_spec *s, uint16_t code) {
    if (s->scale_format == KVQ_SCALE_F16) return kvq_float_of_half(code);
    return ldexpf(kvq_float_of_e4m3((uint8_t)code), s->scale_exponent);
}

// The scale of a head from the sum of its squares, as stored and as rounded. Returns 0 when it is beyond f16, or not a
// number.
KVQ_HD int kvq_tile_find_scale(const kvq_tile_spec *s, float squares, uint16_t *code, float *scale) {
    *code = kvq_tile_code_of_scale(s, sqrtf(squares / (float)s->head_dim));
    *scale = kvq_tile_scale_of_code(s, *code);
    return *scale < HUGE_VALF;
}

// y / scale, 0 where that is 0; divided in either case, for a branch would keep loops from vectorising.
KVQ_HD float kvq_tile_unscale(float y, float scale) {
    float quotient = y / (scale > 0 ? scale : 1.0f);
    return scale > 0 ? quotient : 0.0f;
}

// Four sums of KVQ_TILE_LANES tokens: sums[k][t] = sum over b of m[k * row + b * step] * x[b][t], in the order of b
// from 0 on. With (row, step) = (n, 1) these are rows of the rotation, with (1, n) rows of its transpose. Of rows from
// n_rows on the last one is summed again, for nothing.
KVQ_HD void kvq_tile_rotate_four(const float *m, int row, int step, int n_rows, int n, const float *x,
                                 float sums[4][KVQ_TILE_LANES]) {
    const float *m1 = m + (n_rows > 1 ? 1 : n_rows - 1) * row, *m2 = m + (n_rows > 2 ? 2 : n_rows - 1) * row,
                *m3 = m + (n_rows > 3 ? 3 : n_rows - 1) * row;
    float s0[KVQ_TILE_LANES] = {0}, s1[KVQ_TILE_LANES] = {0}, s2[KVQ_TILE_LANES] = {0}, s3[KVQ_TILE_LANES] = {0};
    for (int b = 0; b < n; b++) {
        const float *xb = x + b * KVQ_TILE_LANES;
        float        a0 = m[b * step], a1 = m1[b * step], a2 = m2[b * step], a3 = m3[b * step];
        for (int t = 0; t < KVQ_TILE_LANES; t++) {
            s0[t] += a0 * xb[t];
            s1[t] += a1 * xb[t];
            s2[t] += a2 * xb[t];
            s3[t] += a3 * xb[t];
        }
    }
    memcpy(sums[0], s0, sizeof s0);
    memcpy(sums[1], s1, sizeof s1);
    memcpy(sums[2], s2, sizeof s2);
    memcpy(sums[3], s3, sizeof s3);
}

// One head of values: y [head_dim] = R x / s as it is coded, *s = the rounded scale. Counting uses it too. Returns 0
// when the scale does not fit: beyond f16, or not a number after sums that overflowed.
KVQ_HD int kvq_tile_normalise_values(const kvq_tile_spec *s, const float *x, float *y, float *scale) {
    const int n = s->head_dim;
    float     squares = 0;
    uint16_t  code;
    for (int i = 0; i < n; i += 8) { // eight sums at a time, for each has to wait for its last addition
        const float *rows[8];
        float        sums[8] = {0};
        for (int k = 0; k < 8; k++) rows[k] = s->rotation + (i + k < n ? i + k : n - 1) * n;
        for (int j = 0; j < n; j++) {
            for (int k = 0; k < 8; k++) sums[k] += rows[k][j] * x[j];
        }
        for (int k = 0; k < 8 && i + k < n; k++) y[i + k] = sums[k];
    }
    for (int i = 0; i < n; i++) squares += y[i] * y[i];
    int fits = kvq_tile_find_scale(s, squares, &code, scale);
    for (int i = 0; i < n; i++) y[i] = kvq_tile_unscale(y[i], *scale);
    return fits;
}

// ---------------------------------------------------------------- codes

// Channels of a head of tokens [from, from + n_lanes), channel by channel: out [head_dim, n_lanes]. Tokens outside of
// [first, last) give 0.
KVQ_HD void kvq_tile_gather_head(const kvq_tile_spec *s, const float *x, int from, int first, int last, int n_lanes,
                                 float *out) {
    const int n = s->head_dim;
    for (int t = 0; t < n_lanes; t++) {
        if (from + t >= first && from + t < last) {
            const float *row = x + (from + t) * s->d;
            for (int i = 0; i < n; i++) out[i * n_lanes + t] = row[i];
        } else {
            for (int i = 0; i < n; i++) out[i * n_lanes + t] = 0;
        }
    }
}

// Normalised keys of a head that begins at `channel`: y [head_dim, KVQ_TILE_TOKENS]. A channel with r = 0 is not coded.
KVQ_HD void kvq_tile_prepare_keys(const kvq_tile_spec *s, const float *x, int channel, int first, int n_tokens,
                                  float *y) {
    kvq_tile_gather_head(s, x + channel, 0, first, n_tokens, KVQ_TILE_TOKENS, y);
    for (int i = 0; i < s->head_dim; i++, y += KVQ_TILE_TOKENS) {
        float z = s->z[channel + i], r = s->r[channel + i] != 0 ? s->r[channel + i] : 1.0f;
        for (int t = 0; t < KVQ_TILE_TOKENS; t++) y[t] = (y[t] - z) / r;
    }
}

// The same of values, and their scales: codes of scales [KVQ_TILE_TOKENS]. Returns the first token whose scale does not
// fit, or n_tokens.
KVQ_HD int kvq_tile_prepare_values(const kvq_tile_spec *s, const float *x, int channel, int first, int n_tokens,
                                   float *y, uint16_t *scales) {
    const int n = s->head_dim;
    int       bad = n_tokens;
    for (int from = 0; from < KVQ_TILE_TOKENS; from += KVQ_TILE_LANES, y += KVQ_TILE_LANES) {
        float lanes[KVQ_TILE_MAX_HEAD_DIM * KVQ_TILE_LANES], sums[4][KVQ_TILE_LANES];
        float squares[KVQ_TILE_LANES] = {0}, scale[KVQ_TILE_LANES];
        kvq_tile_gather_head(s, x + channel, from, first, n_tokens, KVQ_TILE_LANES, lanes);
        for (int i = 0; i < n; i += 4) {
            kvq_tile_rotate_four(s->rotation + i * n, n, 1, n - i, n, lanes, sums);
            for (int k = 0; k < 4 && i + k < n; k++) {
                memcpy(y + (i + k) * KVQ_TILE_TOKENS, sums[k], sizeof sums[k]);
                for (int t = 0; t < KVQ_TILE_LANES; t++) squares[t] += sums[k][t] * sums[k][t];
            }
        }
        for (int t = 0; t < KVQ_TILE_LANES; t++) {
            int fits = kvq_tile_find_scale(s, squares[t], &scales[from + t], &scale[t]);
            if (!fits && from + t < bad) bad = from + t;
        }
        for (int i = 0; i < n; i++) {
            float *yi = y + i * KVQ_TILE_TOKENS;
            for (int t = 0; t < KVQ_TILE_LANES; t++) yi[t] = kvq_tile_unscale(yi[t], scale[t]);
        }
    }
    return bad;
}

// Nearest level vector of a group of elements by dx^2 + dy^2; y = 0 where dim is 1. Written for compilers to make
// vector code of: two loops over the group, for one would be unrolled together with its neighbours and stay scalar, and
// indices chosen by a mask, for a conditional store becomes a branch.
KVQ_HD void kvq_tile_nearest_group(const float *x, const float *y, const float *levels, int dim, int n, int *codes) {
    float    distance[KVQ_BLOCK_GROUP], next[KVQ_BLOCK_GROUP];
    uint32_t best[KVQ_BLOCK_GROUP];
    for (int j = 0; j < KVQ_BLOCK_GROUP; j++) {
        distance[j] = HUGE_VALF;
        best[j] = 0;
    }
    for (int i = 0; i < n; i++) {
        float level_x = levels[i * dim], level_y = dim == 2 ? levels[i * dim + 1] : 0.0f;
        for (int j = 0; j < KVQ_BLOCK_GROUP; j++) {
            float dx = x[j] - level_x, dy = y[j] - level_y;
            next[j] = dx * dx + dy * dy;
        }
        for (int j = 0; j < KVQ_BLOCK_GROUP; j++) {
            uint32_t nearer = 0u - (uint32_t)(next[j] < distance[j]);
            best[j] = (best[j] & ~nearer) | ((uint32_t)i & nearer);
            distance[j] = next[j] < distance[j] ? next[j] : distance[j];
        }
    }
    for (int j = 0; j < KVQ_BLOCK_GROUP; j++) codes[j] = (int)best[j];
}

// Codes of a column from its normalised channels y [dim, KVQ_TILE_TOKENS] into its planes.
KVQ_HD void kvq_tile_code_column(const kvq_tile_spec *s, int column, const float *y, int first, int n_tokens,
                                 uint8_t *tile) {
    const float  zeros[KVQ_BLOCK_GROUP] = {0};
    const float *levels = s->levels + s->table[column] * s->dim;
    int          n = 1 << s->widths[column], found[KVQ_BLOCK_GROUP];
    uint8_t      codes[KVQ_TILE_TOKENS];
    for (int t = 0; t < KVQ_TILE_TOKENS; t += KVQ_BLOCK_GROUP) {
        if (s->r != 0)
            kvq_block_nearest_group(y + t, levels, n, found);
        else
            kvq_tile_nearest_group(y + t, s->dim == 2 ? y + KVQ_TILE_TOKENS + t : zeros, levels, s->dim, n, found);
        for (int j = 0; j < KVQ_BLOCK_GROUP; j++) codes[t + j] = (uint8_t)found[j];
    }
    memset(codes, 0, (size_t)first);
    memset(codes + n_tokens, 0, (size_t)(KVQ_TILE_TOKENS - n_tokens));
    kvq_tile_put_codes(&s->columns[column], codes, tile);
}

// ---------------------------------------------------------------- outliers of keys

// What kvq_block_select_k needs to find the outliers of a token.
KVQ_HD kvq_block_spec kvq_tile_token_spec(const kvq_tile_spec *s) {
    kvq_block_spec token;
    memset(&token, 0, sizeof token);
    token.d = s->d;
    token.n_side = s->n_side;
    token.z = s->middle;
    token.r = s->half;
    return token;
}

// Restores a heap below entry `at`: no entry is better than its parent, so entry 0 is the one to give up. Better is the
// larger key, or the lower place.
KVQ_HD void kvq_tile_sink(float *keys, uint32_t *places, int n, int at) {
    float    key = keys[at];
    uint32_t place = places[at];
    for (int child; (child = 2 * at + 1) < n; at = child) {
        int other = child + 1;
        if (other < n && (keys[other] < keys[child] || (keys[other] == keys[child] && places[other] > places[child])))
            child = other;
        if (key < keys[child] || (key == keys[child] && place > places[child])) break;
        keys[at] = keys[child];
        places[at] = places[child];
    }
    keys[at] = key;
    places[at] = place;
}

KVQ_HD void kvq_tile_make_heap(float *keys, uint32_t *places, int n) {
    for (int at = n / 2 - 1; at >= 0; at--) kvq_tile_sink(keys, places, n, at);
}

// Offers an element to the `capacity` best ones; returns how many there are now.
KVQ_HD int kvq_tile_offer(const kvq_tile_scratch *w, int n, int capacity, float key, uint32_t place) {
    if (n < capacity) {
        w->keys[n] = key;
        w->places[n] = place;
        if (n + 1 == capacity) kvq_tile_make_heap(w->keys, w->places, capacity);
        return n + 1;
    }
    if (key > w->keys[0] || (key == w->keys[0] && place < w->places[0])) {
        w->keys[0] = key;
        w->places[0] = place;
        kvq_tile_sink(w->keys, w->places, n, 0);
    }
    return n;
}

// Puts the places of n elements into the order of (head, token, channel), as (head * KVQ_TILE_TOKENS + token) *
// head_dim + channel in its head. Among equal keys the heap gives up the highest place first.
KVQ_HD void kvq_tile_sort_places(const kvq_tile_spec *s, const kvq_tile_scratch *w, int n) {
    for (int i = 0; i < n; i++) {
        int token = (int)w->places[i] / s->d, channel = (int)w->places[i] % s->d, head = channel / s->head_dim;
        w->places[i] = (uint32_t)((head * KVQ_TILE_TOKENS + token) * s->head_dim + channel % s->head_dim);
        w->keys[i] = 0;
    }
    kvq_tile_make_heap(w->keys, w->places, n);
    for (int last = n - 1; last > 0; last--) {
        uint32_t highest = w->places[0];
        w->places[0] = w->places[last];
        w->places[last] = highest;
        kvq_tile_sink(w->keys, w->places, last, 0);
    }
}

// Leaves the outliers of a tile in w->places, sorted; returns how many.
KVQ_HD int kvq_tile_select_outliers(const kvq_tile_spec *s, const float *x, int first, int n_tokens,
                                    const kvq_tile_scratch *w) {
    kvq_block_spec    token = kvq_tile_token_spec(s);
    float             upper_key[KVQ_BLOCK_MAX_SIDE + 1], lower_key[KVQ_BLOCK_MAX_SIDE + 1];
    uint16_t          upper_channel[KVQ_BLOCK_MAX_SIDE + 1], lower_channel[KVQ_BLOCK_MAX_SIDE + 1];
    kvq_block_scratch sides = {upper_key, lower_key, upper_channel, lower_channel, 0, 0};
    int               n = 0;
    for (int t = first; t < n_tokens && s->n_slots > 0; t++) {
        kvq_block_select_k(&token, x + t * s->d, &sides);
        for (int i = 0; i < sides.n_upper; i++)
            n = kvq_tile_offer(w, n, s->n_slots, upper_key[i], (uint32_t)(t * s->d + upper_channel[i]));
        for (int i = 0; i < sides.n_lower; i++)
            n = kvq_tile_offer(w, n, s->n_slots, lower_key[i], (uint32_t)(t * s->d + lower_channel[i]));
    }
    kvq_tile_sort_places(s, w, n);
    return n;
}

// A key without its residual.
KVQ_HD float kvq_tile_decode_key(const kvq_tile_spec *s, const uint8_t *tile, int token, int channel) {
    int code = kvq_tile_get_code(&s->columns[channel], tile, token);
    return s->z[channel] + s->r[channel] * s->levels[s->table[channel] + code];
}

// Writes counts and entries, whose bytes must be 0. Returns the first token whose residual does not fit, or n_tokens.
KVQ_HD int kvq_tile_store_outliers(const kvq_tile_spec *s, const float *x, int n_tokens, const uint32_t *places, int n,
                                   uint8_t *tile) {
    uint8_t *counts = tile + kvq_tile_code_bytes(s), *entry = counts + kvq_tile_count_bytes(s);
    int      bad = n_tokens;
    for (int i = 0; i < n; i++, entry += 4) {
        int      row = (int)places[i] / s->head_dim, head = row / KVQ_TILE_TOKENS, t = row % KVQ_TILE_TOKENS;
        int      within = (int)places[i] % s->head_dim, channel = head * s->head_dim + within;
        uint16_t residual = kvq_half_of_float(x[t * s->d + channel] - kvq_tile_decode_key(s, tile, t, channel));
        if (!kvq_half_is_finite(residual) && t < bad) bad = t;
        kvq_block_store_half(counts + 2 * head, (uint16_t)(kvq_block_load_half(counts + 2 * head) + 1));
        kvq_block_store_half(entry, (uint16_t)(t << 9 | within));
        kvq_block_store_half(entry + 2, residual);
    }
    return bad;
}

// ---------------------------------------------------------------- a tile

// Columns of a head, and its scales. Returns the first token whose scale does not fit, or n_tokens.
KVQ_HD int kvq_tile_encode_head(const kvq_tile_spec *s, const float *x, int head, int first, int n_tokens, float *y,
                                uint8_t *tile) {
    int      per_head = s->head_dim / s->dim, channel = head * s->head_dim, bad = n_tokens;
    uint16_t scales[KVQ_TILE_TOKENS];
    if (s->r != 0)
        kvq_tile_prepare_keys(s, x, channel, first, n_tokens, y);
    else
        bad = kvq_tile_prepare_values(s, x, channel, first, n_tokens, y, scales);
    for (int c = 0; c < per_head; c++) {
        int constant = s->r != 0 && !(s->r[channel + c] != 0);
        if (s->widths[head * per_head + c] > 0 && !constant)
            kvq_tile_code_column(s, head * per_head + c, y + c * s->dim * KVQ_TILE_TOKENS, first, n_tokens, tile);
    }
    uint8_t *stored = tile + kvq_tile_code_bytes(s);
    for (int t = first; t < n_tokens && s->r == 0; t++) {
        int at = head * KVQ_TILE_TOKENS + t;
        if (s->scale_format == KVQ_SCALE_F16)
            kvq_block_store_half(stored + 2 * at, scales[t]);
        else
            stored[at] = (uint8_t)scales[t];
    }
    return bad;
}

// Codes tokens [first, n_tokens) of x [n_tokens, d], n_tokens <= KVQ_TILE_TOKENS, into tile [kvq_tile_bytes]. Returns
// -1, or the first token (the lowest) with a residual or scale that does not fit into f16; the tile is then unusable.
// NaN and infinities must have been refused before.
KVQ_HD int kvq_tile_encode(const kvq_tile_spec *s, const float *x, int first, int n_tokens, const kvq_tile_scratch *w,
                           uint8_t *tile) {
    int bad = n_tokens;
    memset(tile, 0, (size_t)kvq_tile_bytes(s));
    for (int head = 0; head < s->d / s->head_dim; head++) {
        int bad_scale = kvq_tile_encode_head(s, x, head, first, n_tokens, w->floats, tile);
        bad = bad_scale < bad ? bad_scale : bad;
    }
    if (s->r != 0 && s->n_slots > 0) {
        int n = kvq_tile_select_outliers(s, x, first, n_tokens, w);
        bad = kvq_tile_store_outliers(s, x, n_tokens, w->places, n, tile);
    }
    return bad < n_tokens ? bad : -1;
}

// Some columns are decoded for all tokens, and then written row by row: a column of x by itself would touch 128 lines
// of the cache for 4 bytes each.
KVQ_HD void kvq_tile_decode_keys(const kvq_tile_spec *s, const uint8_t *tile, int first, int n_tokens, float *x) {
    float   values[1 << KVQ_TILE_MAX_WIDTH], decoded[KVQ_TILE_LANES][KVQ_TILE_TOKENS];
    uint8_t codes[KVQ_TILE_TOKENS];
    for (int from = 0; from < s->d; from += KVQ_TILE_LANES) {
        int count = s->d - from < KVQ_TILE_LANES ? s->d - from : KVQ_TILE_LANES;
        for (int k = 0; k < count; k++) {
            int          c = from + k;
            const float *levels = s->levels + s->table[c];
            for (int i = 0; i < 1 << s->widths[c]; i++) values[i] = s->z[c] + s->r[c] * levels[i];
            kvq_tile_get_codes(&s->columns[c], tile, 0, KVQ_TILE_TOKENS, codes);
            for (int t = 0; t < KVQ_TILE_TOKENS; t++) decoded[k][t] = values[codes[t]];
        }
        for (int t = first; t < n_tokens; t++) {
            for (int k = 0; k < count; k++) x[t * s->d + from + k] = decoded[k][t];
        }
    }
}

KVQ_HD void kvq_tile_add_outliers(const kvq_tile_spec *s, const uint8_t *tile, int first, int n_tokens, float *x) {
    const uint8_t *counts = tile + kvq_tile_code_bytes(s), *entry = counts + kvq_tile_count_bytes(s);
    for (int head = 0; head < s->d / s->head_dim && s->n_slots > 0; head++) {
        for (int left = kvq_block_load_half(counts + 2 * head); left > 0; left--, entry += 4) {
            int place = kvq_block_load_half(entry), t = place >> 9;
            if (t < first || t >= n_tokens) continue;
            x[t * s->d + head * s->head_dim + (place & 511)] += kvq_float_of_half(kvq_block_load_half(entry + 2));
        }
    }
}

// Levels times scales of KVQ_TILE_LANES tokens of a head: y [head_dim, KVQ_TILE_LANES].
KVQ_HD void kvq_tile_expand_values(const kvq_tile_spec *s, const uint8_t *tile, int head, int token,
                                   const float scales[KVQ_TILE_LANES], float *y) {
    int     per_head = s->head_dim / s->dim;
    uint8_t codes[KVQ_TILE_LANES];
    for (int c = head * per_head; c < (head + 1) * per_head; c++) {
        const float *levels = s->levels + s->table[c] * s->dim;
        kvq_tile_get_codes(&s->columns[c], tile, token, KVQ_TILE_LANES, codes);
        for (int k = 0; k < s->dim; k++, y += KVQ_TILE_LANES) {
            for (int t = 0; t < KVQ_TILE_LANES; t++) y[t] = scales[t] * levels[codes[t] * s->dim + k];
        }
    }
}

KVQ_HD void kvq_tile_decode_values(const kvq_tile_spec *s, const uint8_t *tile, int head, int first, int n_tokens,
                                   float *x) {
    const int      n = s->head_dim, size = s->scale_format == KVQ_SCALE_F16 ? 2 : 1;
    const uint8_t *stored = tile + kvq_tile_code_bytes(s) + head * KVQ_TILE_TOKENS * size;
    float          y[KVQ_TILE_MAX_HEAD_DIM * KVQ_TILE_LANES], scales[KVQ_TILE_LANES], sums[4][KVQ_TILE_LANES];
    x += head * n;
    for (int from = first / KVQ_TILE_LANES * KVQ_TILE_LANES; from < n_tokens; from += KVQ_TILE_LANES) {
        int begin = from < first ? first : from,
            end = from + KVQ_TILE_LANES < n_tokens ? from + KVQ_TILE_LANES : n_tokens;
        for (int t = 0; t < KVQ_TILE_LANES; t++) {
            const uint8_t *at = stored + (from + t) * size;
            scales[t] = kvq_tile_scale_of_code(s, size == 2 ? kvq_block_load_half(at) : *at);
        }
        kvq_tile_expand_values(s, tile, head, from, scales, y);
        for (int j = 0; j < n; j += 4) {
            kvq_tile_rotate_four(s->rotation + j, 1, n, n - j, n, y, sums);
            for (int t = begin; t < end; t++) {
                for (int k = 0; k < 4 && j + k < n; k++) x[t * s->d + j + k] = sums[k][t - from];
            }
        }
    }
}

// Decodes tokens [first, n_tokens) into x [n_tokens, d]; the rows before `first` are left alone.
KVQ_HD void kvq_tile_decode(const kvq_tile_spec *s, const uint8_t *tile, int first, int n_tokens, float *x) {
    if (s->r != 0) {
        kvq_tile_decode_keys(s, tile, first, n_tokens, x);
        kvq_tile_add_outliers(s, tile, first, n_tokens, x);
        return;
    }
    for (int head = 0; head < s->d / s->head_dim; head++) kvq_tile_decode_values(s, tile, head, first, n_tokens, x);
}

// Outliers that a tile holds (values have none).
KVQ_HD int kvq_tile_count_outliers(const kvq_tile_spec *s, const uint8_t *tile) {
    const uint8_t *counts = tile + kvq_tile_code_bytes(s);
    int            n = 0;
    for (int head = 0; head < s->d / s->head_dim && s->r != 0 && s->n_slots > 0; head++)
        n += kvq_block_load_half(counts + 2 * head);
    return n;
}

// Whether counts and entries of outliers name elements of the tile, which decoding relies on: 1 for what
// kvq_tile_encode wrote, 0 for bytes that would be read or written out of bounds.
KVQ_HD int kvq_tile_outliers_fit(const kvq_tile_spec *s, const uint8_t *tile) {
    const uint8_t *entry = tile + kvq_tile_code_bytes(s) + kvq_tile_count_bytes(s);
    int            n = kvq_tile_count_outliers(s, tile), fit = n <= s->n_slots;
    for (int i = 0; i < n && fit; i++) fit = (kvq_block_load_half(entry + 4 * i) & 511) < s->head_dim;
    return fit;
}

// Elements of tokens [first, n_tokens) beyond the range of their channel (values have none).
KVQ_HD int kvq_tile_count_beyond(const kvq_tile_spec *s, const float *x, int first, int n_tokens) {
    kvq_block_spec token = kvq_tile_token_spec(s);
    int            n = 0;
    for (int t = first; t < n_tokens && s->r != 0; t++) n += kvq_block_count_beyond(&token, x + t * s->d);
    return n;
}

#endif
