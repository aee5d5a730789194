// SPDX-License-Identifier: Apache-2.0
//
// The one definition of how a token's key or value vector becomes bytes and comes back. Simulation, CPU decoder and
// GPU decoder all compile this text, so what validation measured is what an engine stores.
//
// A *row* is one token's K or V of one layer, d = n_kv_heads * head_dim elements, channel c = head * head_dim + i:
//
//     K row   | codes, b bits each | 2 * n_side outliers |
//     V row   | codes, b bits each | z, r (two f16)      | 2 * n_side outliers |
//
//     codes     one little-endian bit stream, code c at bits [c*b, (c+1)*b), padded with zeros to a multiple of 4 bytes
//     outlier   { u16 channel, f16 residual }; first the n_side slots of the upper side, then those of the lower side;
//               an unused slot (K only) has channel 0xFFFF and residual 0
//
// "K row" is short for a tensor whose ranges are fixed per channel, "V row" for one whose ranges are found per token;
// which of the two a tensor is, is a choice of its artifact.
//
// Decoded value: level[code] * r + z in f32, each operation rounded; where an outlier names the channel its residual is
// added. The rules (docs/format.md has them in prose):
//   * Normalised value x' = (x - z) / r in f32; code = nearest level by |x' - level| in f32, the lower index on a tie.
//   * K: z, r are fixed per channel. x' beyond +-(1 + 2^-14) is an outlier; a side with more than n_side of them keeps
//     the n_side with the largest |x'| (ties: the lower channel), the rest are clamped to an end level.
//   * V: per token, the n_side smallest and n_side largest elements in (value, channel) order are outliers; z and r are
//     the middle and half width of the range of the rest, rounded to f16 before anything is coded with them.
//   * r = 0 (a constant channel or token): every code is 0 and decodes to z.
//   * Several tables: the channels of a KV head have a table of their own.
//   * Q-Norm: codes are chosen by `levels` and decode by `decoded`.
//   * Clamped zero point: z is moved to where one of the evenly spaced levels decodes to 0, after the outliers are
//     chosen and before r and z are rounded (kvq_block_clamped_middle).
#ifndef KVQ_BLOCK_HD_H
#define KVQ_BLOCK_HD_H

#include <math.h>

#include "kvq_hd.h"

#define KVQ_MAX_BITS       8
#define KVQ_BLOCK_GROUP    32   // channels coded together: 32 codes of b bits fill exactly b words
#define KVQ_BLOCK_MAX_SIDE 2047 // bounds n_side, so that selection scratch can live on the stack
#define KVQ_NO_CHANNEL     0xFFFFu
#define KVQ_OUTLIER_EDGE                                                                                               \
    1.00006103515625f // 1 + 2^-14: data often EQUALS a threshold, and a bare > 1 would be decided by the last bit

typedef struct kvq_block_outlier {
    uint16_t channel;
    uint16_t residual; // f16
} kvq_block_outlier;
KVQ_STATIC_ASSERT(sizeof(kvq_block_outlier) == 4, "an outlier is four bytes on every machine");

// What is needed to code the rows of one tensor of one layer. All pointers are borrowed.
typedef struct kvq_block_spec {
    int          d;          // row width, 1 .. 65535 - 1
    int          bits;       // 1 .. KVQ_MAX_BITS
    int          n_side;     // outliers per side and token; 0 = none; 2 * n_side < d, at most KVQ_BLOCK_MAX_SIDE
    const float *levels;     // [n_groups, 2^bits] ascending in each group, normalised
    const float *z, *r;      // K: [d] offset and half range of each channel, r >= 0.  V: NULL, found per token
    int          n_groups;   // tables; divides d, channel c has table c / (d / n_groups). 0 = one
    const float *decoded;    // [n_groups, 2^bits] what codes decode to; NULL = levels
    const float *grid_z;     // K with a clamped zero point: [d] the offset of codes; NULL = z
    int          clamp_zero; // V: whether each token's zero point is clamped
} kvq_block_spec;

KVQ_HD int kvq_block_code_bytes(int d, int bits) { return (d * bits + 31) / 32 * 4; }

KVQ_HD int kvq_block_row_bytes(const kvq_block_spec *s) {
    return kvq_block_code_bytes(s->d, s->bits) + (s->r == 0 ? 4 : 0) + 2 * s->n_side * (int)sizeof(kvq_block_outlier);
}

// Outliers per side for a two-sided fraction o of d channels: floor(o/2 * d) + 1, and none for o = 0. The small
// constant keeps products such as 0.005 * 200 from falling below the integer they stand for.
KVQ_HD int kvq_block_n_side(double fraction, int d) { return fraction > 0 ? (int)(fraction / 2 * d + 1e-9) + 1 : 0; }

// The middle of a grid of n evenly spaced levels over [z - r, z + r], moved by less than half a step so that a level
// decodes to 0; where 0 lies outside of the range the nearest end becomes 0, which may move it by more (the integer
// zero point of common quantisers, clamped to 0 .. n - 1, halves rounded to even). r = 0 keeps z.
KVQ_HD float kvq_block_clamped_middle(float z, float r, int n) {
    if (!(r > 0)) return z;
    float step = 2.0f * r / (float)(n - 1), zero = rintf((r - z) / step);
    zero = zero < 0 ? 0.0f : zero > (float)(n - 1) ? (float)(n - 1) : zero;
    return r - zero * step;
}

// (x - z) / r; `constant` where r = 0. The division is done in either case, for a branch would keep loops from
// vectorising.
KVQ_HD float kvq_block_normalise(float x, float z, float r, float constant) {
    float quotient = (x - z) / (r > 0 ? r : 1.0f);
    return r > 0 ? quotient : constant;
}

// One step of the search for the nearest level: level i is taken when it is strictly nearer than what was found before,
// so the lower index wins a tie. Without branches, because which level is nearest cannot be predicted.
KVQ_HD void kvq_block_take_nearer(float x, float level, int i, float *distance, int *best) {
    float next = fabsf(x - level);
    *best = next < *distance ? i : *best;
    *distance = next < *distance ? next : *distance;
}

// Index of the nearest of n levels by |x - level| in f32.
KVQ_HD int kvq_block_nearest(float x, const float *levels, int n) {
    float distance = fabsf(x - levels[0]);
    int   best = 0;
    for (int i = 1; i < n; i++) kvq_block_take_nearer(x, levels[i], i, &distance, &best);
    return best;
}

// The same for a group of elements; with the levels outside the compiler works on many elements at once.
KVQ_HD void kvq_block_nearest_group(const float *x, const float *levels, int n, int *codes) {
    float distance[KVQ_BLOCK_GROUP];
    for (int j = 0; j < KVQ_BLOCK_GROUP; j++) {
        distance[j] = fabsf(x[j] - levels[0]);
        codes[j] = 0;
    }
    for (int i = 1; i < n; i++) {
        for (int j = 0; j < KVQ_BLOCK_GROUP; j++) kvq_block_take_nearer(x[j], levels[i], i, &distance[j], &codes[j]);
    }
}

// Byte by byte, to be little-endian everywhere; compilers make one store of it.
KVQ_HD void kvq_block_store_word(uint8_t *at, uint32_t word) {
    for (int i = 0; i < 4; i++) at[i] = (uint8_t)(word >> 8 * i);
}

// Writes the codes of a group, or of the `count` last channels of a row; a last incomplete word is filled with zeros.
KVQ_HD void kvq_block_pack_group(const int *codes, int count, int bits, uint8_t *words) {
    uint64_t window = 0;
    int      filled = 0;
    for (int j = 0; j < count; j++) {
        window |= (uint64_t)codes[j] << filled;
        filled += bits;
        if (filled < 32) continue;
        kvq_block_store_word(words, (uint32_t)window);
        words += 4;
        window >>= 32;
        filled -= 32;
    }
    if (filled > 0) kvq_block_store_word(words, (uint32_t)window);
}

KVQ_HD int kvq_block_get_code(const uint8_t *codes, int c, int bits) {
    int      at = c * bits;
    uint32_t window = codes[at >> 3];
    if ((at & 7) + bits > 8) window |= (uint32_t)codes[(at >> 3) + 1] << 8;
    return (int)((window >> (at & 7)) & ((1u << bits) - 1u));
}

// Keeps the `capacity` best of a stream of (key, channel) pairs in order, best first. A key that equals a kept one
// ranks behind it when `later_wins` is 0, in front of it when 1. Channels must arrive in ascending order.
KVQ_HD int kvq_block_keep_best(float *keys, uint16_t *channels, int count, int capacity, float key, int channel,
                               int later_wins) {
    int at = count;
    while (at > 0 && (later_wins ? key >= keys[at - 1] : key > keys[at - 1])) at--;
    if (at >= capacity) return count;
    int last = count < capacity ? count : capacity - 1;
    for (int i = last; i > at; i--) {
        keys[i] = keys[i - 1];
        channels[i] = channels[i - 1];
    }
    keys[at] = key;
    channels[at] = (uint16_t)channel;
    return count < capacity ? count + 1 : count;
}

// Scratch of one selection: keys and channels of the two sides. `n_side` + 1 entries each, because the value rule also
// needs the first element that is not an outlier.
typedef struct kvq_block_scratch {
    float    *upper_key, *lower_key;         // [n_side + 1]
    uint16_t *upper_channel, *lower_channel; // [n_side + 1]
    int       n_upper, n_lower;
} kvq_block_scratch;

// Selects the outliers of a key row: scratch->n_upper and n_lower (each at most n_side) with their channels. Outliers
// are rare, so a group is first asked whether it has any.
KVQ_HD void kvq_block_select_k(const kvq_block_spec *s, const float *x, kvq_block_scratch *w) {
    float xn[KVQ_BLOCK_GROUP];
    w->n_upper = w->n_lower = 0;
    for (int first = 0; first < s->d && s->n_side > 0; first += KVQ_BLOCK_GROUP) {
        int count = s->d - first < KVQ_BLOCK_GROUP ? s->d - first : KVQ_BLOCK_GROUP, n_beyond = 0;
        for (int j = 0; j < count; j++) {
            xn[j] = kvq_block_normalise(x[first + j], s->z[first + j], s->r[first + j], 0.0f);
            n_beyond += fabsf(xn[j]) > KVQ_OUTLIER_EDGE;
        }
        for (int j = 0; j < count && n_beyond > 0; j++) {
            if (xn[j] > KVQ_OUTLIER_EDGE)
                w->n_upper =
                    kvq_block_keep_best(w->upper_key, w->upper_channel, w->n_upper, s->n_side, xn[j], first + j, 0);
            if (xn[j] < -KVQ_OUTLIER_EDGE)
                w->n_lower =
                    kvq_block_keep_best(w->lower_key, w->lower_channel, w->n_lower, s->n_side, -xn[j], first + j, 0);
        }
    }
}

// Selects the outliers of a value row, exactly n_side per side, and gives the range of the rest: z its middle (moved
// where the zero point is clamped), r half its width, both as f16 bits. In (value, channel) order the low end prefers
// low channels and the high end high ones.
KVQ_HD void kvq_block_select_v(const kvq_block_spec *s, const float *x, kvq_block_scratch *w, uint16_t *z,
                               uint16_t *r) {
    int keep = s->n_side + 1;
    w->n_upper = w->n_lower = 0;
    for (int c = 0; c < s->d; c++) {
        w->n_upper = kvq_block_keep_best(w->upper_key, w->upper_channel, w->n_upper, keep, x[c], c, 1);
        w->n_lower = kvq_block_keep_best(w->lower_key, w->lower_channel, w->n_lower, keep, -x[c], c, 0);
    }
    float high = w->upper_key[s->n_side], low = -w->lower_key[s->n_side];
    float middle = (high + low) / 2.0f, half = (high - low) / 2.0f;
    w->n_upper = w->n_lower = s->n_side;
    if (s->clamp_zero) middle = kvq_block_clamped_middle(middle, half, 1 << s->bits);
    *z = kvq_half_of_float(middle);
    *r = kvq_half_of_float(half);
}

KVQ_HD void kvq_block_store_half(uint8_t *at, uint16_t h) {
    at[0] = (uint8_t)(h & 0xffu);
    at[1] = (uint8_t)(h >> 8);
}

KVQ_HD uint16_t kvq_block_load_half(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

// Offset and half range of channel c by which it is coded and decoded: z[c * step], r[c * step].
typedef struct kvq_block_ranges {
    const float *z, *r;
    int          step;
    float        token_z, token_r; // of a value row; z and r point here
} kvq_block_ranges;

// Fills `ranges` (of a value row from its z and r behind the codes) and returns where the row's outlier slots begin.
KVQ_HD const uint8_t *kvq_block_find_ranges(const kvq_block_spec *s, const uint8_t *row, kvq_block_ranges *ranges) {
    const uint8_t *rest = row + kvq_block_code_bytes(s->d, s->bits);
    ranges->z = s->grid_z != 0 ? s->grid_z : s->z;
    ranges->r = s->r;
    ranges->step = 1;
    ranges->token_z = ranges->token_r = 0;
    if (s->r != 0) return rest;
    ranges->token_z = kvq_float_of_half(kvq_block_load_half(rest));
    ranges->token_r = kvq_float_of_half(kvq_block_load_half(rest + 2));
    ranges->z = &ranges->token_z;
    ranges->r = &ranges->token_r;
    ranges->step = 0;
    return rest + 4;
}

// Channels of a table. Tables need not begin where groups do.
KVQ_HD int kvq_block_table_width(const kvq_block_spec *s) { return s->n_groups > 1 ? s->d / s->n_groups : s->d; }

// Codes of `count` channels from `first` on, at most a group, all of one table; those of a whole group are written. A
// constant channel or token takes code 0: its x' is put on level 0 itself.
KVQ_HD void kvq_block_code_span(const float *x, const kvq_block_ranges *ranges, const float *levels, int n_levels,
                                int first, int count, int *codes) {
    float        xn[KVQ_BLOCK_GROUP];
    const float *z = ranges->z, *r = ranges->r;
    int          step = ranges->step;
    for (int j = count; j < KVQ_BLOCK_GROUP; j++) xn[j] = 0; // computed for nothing
    for (int j = 0; j < count; j++)
        xn[j] = kvq_block_normalise(x[first + j], z[(first + j) * step], r[(first + j) * step], levels[0]);
    kvq_block_nearest_group(xn, levels, n_levels, codes);
}

// Codes of the whole row. Where tables meet inside a group, the codes of each are written for a whole group from its
// first channel there on, and the next one's replace what lies beyond its end; hence the double length.
KVQ_HD void kvq_block_encode_dense(const kvq_block_spec *s, const float *x, const kvq_block_ranges *ranges,
                                   uint8_t *row) {
    int          codes[2 * KVQ_BLOCK_GROUP];
    int          width = kvq_block_table_width(s), table_end = width, n = 1 << s->bits;
    const float *levels = s->levels;
    for (int first = 0; first < s->d; first += KVQ_BLOCK_GROUP) {
        int end = s->d - first < KVQ_BLOCK_GROUP ? s->d : first + KVQ_BLOCK_GROUP;
        if (end <= table_end) { // the rule, and faster than the loop
            kvq_block_code_span(x, ranges, levels, n, first, end - first, codes);
        } else {
            for (int from = first, to; from < end; from = to) {
                if (from == table_end) levels += n, table_end += width;
                to = table_end < end ? table_end : end;
                kvq_block_code_span(x, ranges, levels, n, from, to - from, codes + (from - first));
            }
        }
        kvq_block_pack_group(codes, end - first, s->bits, row);
        row += s->bits * (KVQ_BLOCK_GROUP / 8);
    }
}

KVQ_HD float kvq_block_decode_dense(const kvq_block_spec *s, const uint8_t *row, const float *table, int c,
                                    const kvq_block_ranges *ranges) {
    return table[kvq_block_get_code(row, c, s->bits)] * ranges->r[c * ranges->step] + ranges->z[c * ranges->step];
}

KVQ_HD const float *kvq_block_decode_levels(const kvq_block_spec *s) {
    return s->decoded != 0 ? s->decoded : s->levels;
}

// Residuals of one side's outliers against what their dense codes decode to. Returns 1 when all of them fit into f16.
KVQ_HD int kvq_block_store_side(const kvq_block_spec *s, const float *x, const uint8_t *row,
                                const kvq_block_ranges *ranges, const uint16_t *channels, int count, uint8_t *slots) {
    int finite = 1, width = kvq_block_table_width(s);
    for (int i = 0; i < s->n_side; i++) {
        uint16_t channel = KVQ_NO_CHANNEL, residual = 0;
        if (i < count) {
            channel = channels[i];
            const float *table = kvq_block_decode_levels(s) + (channel / width) * (1 << s->bits);
            residual = kvq_half_of_float(x[channel] - kvq_block_decode_dense(s, row, table, channel, ranges));
            if (!kvq_half_is_finite(residual)) finite = 0;
        }
        kvq_block_store_half(slots + 4 * i, channel);
        kvq_block_store_half(slots + 4 * i + 2, residual);
    }
    return finite;
}

// Encodes x [d] into row [kvq_block_row_bytes]. Returns 1, or 0 when a number does not fit into f16 (the row is then
// unusable). NaN and infinities must have been refused before.
KVQ_HD int kvq_block_encode(const kvq_block_spec *s, const float *x, kvq_block_scratch *w, uint8_t *row) {
    uint8_t         *slots = row + kvq_block_row_bytes(s) - 2 * s->n_side * (int)sizeof(kvq_block_outlier);
    int              finite = 1;
    kvq_block_ranges ranges;
    if (s->r != 0) {
        kvq_block_select_k(s, x, w);
    } else {
        uint16_t half_z, half_r;
        kvq_block_select_v(s, x, w, &half_z, &half_r);
        kvq_block_store_half(slots - 4, half_z);
        kvq_block_store_half(slots - 2, half_r);
        finite = kvq_half_is_finite(half_z) && kvq_half_is_finite(half_r);
    }
    (void)kvq_block_find_ranges(s, row, &ranges);
    kvq_block_encode_dense(s, x, &ranges, row);
    finite &= kvq_block_store_side(s, x, row, &ranges, w->upper_channel, w->n_upper, slots);
    finite &= kvq_block_store_side(s, x, row, &ranges, w->lower_channel, w->n_lower, slots + 4 * s->n_side);
    return finite;
}

KVQ_HD void kvq_block_decode(const kvq_block_spec *s, const uint8_t *row, float *x) {
    kvq_block_ranges ranges;
    const uint8_t   *slots = kvq_block_find_ranges(s, row, &ranges);
    const float     *table = kvq_block_decode_levels(s);
    int              width = kvq_block_table_width(s);
    for (int first = 0; first < s->d; first += width, table += 1 << s->bits) {
        for (int c = first; c < first + width; c++) x[c] = kvq_block_decode_dense(s, row, table, c, &ranges);
    }
    for (int i = 0; i < 2 * s->n_side; i++) {
        uint16_t channel = kvq_block_load_half(slots + 4 * i);
        if (channel < s->d) x[channel] += kvq_float_of_half(kvq_block_load_half(slots + 4 * i + 2));
    }
}

// Outliers that a row holds.
KVQ_HD int kvq_block_count_outliers(const kvq_block_spec *s, const uint8_t *row) {
    const uint8_t *slots = row + kvq_block_row_bytes(s) - 2 * s->n_side * (int)sizeof(kvq_block_outlier);
    int            count = 0;
    for (int i = 0; i < 2 * s->n_side; i++) count += kvq_block_load_half(slots + 4 * i) < s->d;
    return count;
}

// Elements of x [d] beyond the range of their channel: the outliers, and those that are clipped because the slots of
// their side were taken. A value row has none: its range is that of everything that is not an outlier.
KVQ_HD int kvq_block_count_beyond(const kvq_block_spec *s, const float *x) {
    int count = 0;
    for (int c = 0; c < s->d && s->r != 0; c++)
        count += fabsf(kvq_block_normalise(x[c], s->z[c], s->r[c], 0.0f)) > KVQ_OUTLIER_EDGE;
    return count;
}

#endif
