// SPDX-License-Identifier: Apache-2.0
//
// Rows of K and V while they are coded or counted: how their outliers rank, and where their ranges come from.
#ifndef KVQ_ROW_RANGES_CUH
#define KVQ_ROW_RANGES_CUH

#include "codec_select.cuh"

// Of a channel, or of a token.
struct Range {
    float z, r;
};

// What a K row and a V row differ in: where ranges come from, and how outliers rank.
struct FixedRanges {
    enum { HAS_LIMITS = 0 };
    KeyToken keys;
    KVQ_GLOBAL(const float) grid_z;
};
struct TokenRange {
    enum { HAS_LIMITS = 1 }; // its range ends at the first elements that are no outliers, even if none are
    ValueToken keys;
    Range      range;
};

KVQ_DEVICE Range range_of(const FixedRanges &row, int c) { return {row.grid_z[c], row.keys.r[c]}; }
KVQ_DEVICE Range range_of(const TokenRange &row, int) { return row.range; }

// As it is stored.
struct HalfRange {
    uint16_t z, r;
};

// Range of what is not an outlier, between the first keys that are none; rounded before anything is coded with it.
KVQ_DEVICE HalfRange find_token_range(TokenRange *row, const Chosen &chosen, int clamp_zero, int bits) {
    float high = row->keys.x[channel_of_key(row->keys, UPPER, chosen.limit[UPPER])];
    float low = row->keys.x[channel_of_key(row->keys, LOWER, chosen.limit[LOWER])];
    float middle = (high + low) / 2.0f, half = (high - low) / 2.0f;
    if (clamp_zero != 0) middle = kvq_block_clamped_middle(middle, half, 1 << bits);
    HalfRange range = {kvq_half_of_float(middle), kvq_half_of_float(half)};
    row->range.z = kvq_float_of_half(range.z);
    row->range.r = kvq_float_of_half(range.r);
    return range;
}

KVQ_DEVICE int fits_halves(HalfRange range) { return kvq_half_is_finite(range.z) && kvq_half_is_finite(range.r); }

#endif
