// SPDX-License-Identifier: Apache-2.0
//
// f32 <-> fp8 e4m3 in the variant without infinities (OCP 8-bit floating point specification, "E4M3"): 1 sign, 4
// exponent bits of bias 7, 3 mantissa bits; largest 448 (0x7e), smallest normal 2^-6, subnormals in steps of 2^-9, NaN
// 0x7f and 0xff.
#ifndef KVQ_FP8_HD_H
#define KVQ_FP8_HD_H

#include "kvq_hd.h"

#define KVQ_E4M3_MAX 448.0f

// Exact.
KVQ_HD float kvq_float_of_e4m3(uint8_t h) {
    uint32_t sign = (uint32_t)(h & 0x80u) << 24, magnitude = h & 0x7fu;
    float    tiny = (float)magnitude * 0.001953125f; // steps of 2^-9
    uint32_t normal = (magnitude << 20) + 0x3c000000u;
    uint32_t bits = magnitude < 8u ? kvq_bits_of_float(tiny) : normal;
    return kvq_float_of_bits(sign | (magnitude == 0x7fu ? 0x7fc00000u : bits));
}

// Round to nearest, ties to even; magnitudes beyond the largest, infinities too, become the largest; NaN stays NaN.
KVQ_HD uint8_t kvq_e4m3_of_float(float x) {
    uint32_t u = kvq_bits_of_float(x), sign = (u >> 24) & 0x80u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (u >= 0x43e00000u) return (uint8_t)(sign | 0x7eu); // 448
    uint32_t normal = (u + 0x7ffffu + ((u >> 20) & 1u) - 0x3c000000u) >> 20;
    // The unit in the last place of 2^14 is 2^-9, so the addition itself rounds to a subnormal.
    uint32_t subnormal = kvq_bits_of_float(kvq_float_of_bits(u) + 16384.0f) - 0x46800000u;
    return (uint8_t)(sign | (u >= 0x3c800000u ? normal : subnormal));
}

#endif
