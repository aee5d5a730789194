// SPDX-License-Identifier: Apache-2.0
//
// The few words that let one header be compiled as C11, as C++ and by nvcc, and the conversions between f32 and the
// 16-bit float formats. Everything here is pure arithmetic without state. `_hd` in a file name means host and device:
// such headers use fixed-width integers, explicit casts, no designated array initialisers and no variable-length
// arrays.
#ifndef KVQ_HD_H
#define KVQ_HD_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KVQ_HD static __host__ __device__ inline
#else
#define KVQ_HD static inline
#endif

#ifdef __cplusplus
#define KVQ_STATIC_ASSERT(condition, text) static_assert(condition, text)
#else
#define KVQ_STATIC_ASSERT(condition, text) _Static_assert(condition, text)
#endif

#if defined(__GNUC__)
#define KVQ_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define KVQ_PRINTF(text, first)
#endif

KVQ_HD uint32_t kvq_bits_of_float(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

KVQ_HD float kvq_float_of_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// IEEE binary16 -> f32, exact. Subnormals, infinities and NaN payloads are kept.
KVQ_HD float kvq_float_of_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (uint32_t)(h >> 10) & 0x1fu;
    uint32_t mantissa = (uint32_t)h & 0x3ffu;
    if (exponent == 0x1fu) return kvq_float_of_bits(sign | 0x7f800000u | (mantissa << 13));
    if (exponent != 0) return kvq_float_of_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    float tiny = (float)mantissa * 5.9604644775390625e-08f; // mantissa * 2^-24
    return (sign != 0) ? -tiny : tiny;
}

// Neither infinite nor NaN: what a number has become that f16 can hold.
KVQ_HD int kvq_half_is_finite(uint16_t h) { return (h & 0x7c00u) != 0x7c00u; }

// f32 -> IEEE binary16, round to nearest, ties to even; magnitudes of 65520 and more become infinite, NaN stays NaN.
KVQ_HD uint16_t kvq_half_of_float(float x) {
    uint32_t u = kvq_bits_of_float(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (u >= 0x38800000u) { // normal: keep 10 of 23 mantissa bits
        uint32_t rounded = u + 0xfffu + ((u >> 13) & 1u);
        return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
    }
    if (u < 0x33000000u) return (uint16_t)sign; // below half of the smallest subnormal
    uint32_t shift = 126u - (u >> 23);          // 14 .. 24
    uint32_t mantissa = (u & 0x7fffffu) | 0x800000u;
    uint32_t result = mantissa >> shift;
    uint32_t rest = mantissa & ((1u << shift) - 1u), halfway = 1u << (shift - 1u);
    if (rest > halfway || (rest == halfway && (result & 1u) != 0)) result++;
    return (uint16_t)(sign | result);
}

KVQ_HD float kvq_float_of_bf16(uint16_t h) { return kvq_float_of_bits((uint32_t)h << 16); }

// f32 -> bf16, round to nearest, ties to even; beyond the largest bf16 infinite, NaN stays NaN.
KVQ_HD uint16_t kvq_bf16_of_float(float x) {
    uint32_t u = kvq_bits_of_float(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet_nan = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

#endif
