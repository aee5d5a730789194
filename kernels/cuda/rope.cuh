// SPDX-License-Identifier: Apache-2.0
//
// Rotary angles without trigonometry on the device, and as right at position one million as at position one. f32 angles
// are not: near 2^20 they are 2^-4 apart. Here p = 128 b + j, the host knows cosine and sine of both parts (rope.cu),
// and the angle of the sum is one complex product.
//
// Error, u = 2^-24: the four factors are rounded (u each), so are the two products and their sum. With (a, b) and
// (c, d) on the unit circle |a c| + |b d| <= 1, hence |error of a c - b d| <= (|a c| + |b d|) (2 u + u) + u = 4 u up to
// terms in u^2, and that of the sine alike: two units in the last place of 1. The host's own angle, rounded to f64, is
// wrong by less than 2^-53 * 2^20 rad at 2^20 radians: nothing.
#ifndef KVQ_ROPE_CUH
#define KVQ_ROPE_CUH

#include "device.cuh"

#define KVQ_ROPE_OFFSETS 128

// Cosine (x) and sine (y) of the sum of two angles.
KVQ_DEVICE float2 rope_sum(float2 base, float2 offset) {
    return make_float2(base.x * offset.x - base.y * offset.y, base.y * offset.x + base.x * offset.y);
}

// Cosine and sine of pair i at a position; bases [.., n_pairs], offsets [KVQ_ROPE_OFFSETS, n_pairs].
KVQ_DEVICE float2 rope_angle(KVQ_GLOBAL(const float2) bases, KVQ_GLOBAL(const float2) offsets, int n_pairs,
                             int position, int i) {
    float2 base = bases[(int64_t)(position / KVQ_ROPE_OFFSETS) * n_pairs + i];
    float2 offset = offsets[position % KVQ_ROPE_OFFSETS * n_pairs + i];
    return rope_sum(base, offset);
}

#endif
