// SPDX-License-Identifier: Apache-2.0
//
// exp for f32 and f64 and tanh for f32 without branches and library calls, so that compilers turn loops over them into
// vector code and the same bits come out on every processor. Cody-Waite reduction x = n ln 2 + r with |r| <= ln 2 / 2,
// a Taylor polynomial in r, and n added to the exponent. Relative error: below 2 units in the last place, of tanh below
// 3 (tests/test_kernels.c).
#ifndef KVQ_EXP_HD_H
#define KVQ_EXP_HD_H

#include "kvq_hd.h"

// exp(x) = (1 + result) * scale for -87 <= x <= 88, scale a power of two
KVQ_HD float kvq_exp_parts_f32(float x, float *scale) {
    float shifted = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's low bits are the rounded quotient
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f; // ln 2 in two parts; the first has 9 bits, so n times it is exact
    r = r + n * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    *scale = kvq_float_of_bits((kvq_bits_of_float(shifted) - 0x4b400000u + 127u) << 23);
    return p * r * r + r;
}

// exp(x) for x <= 88; anything below -87 gives a number no larger than exp(-87) = 1.6e-38, never a subnormal.
KVQ_HD float kvq_exp_f32(float x) {
    float scale, p = kvq_exp_parts_f32(x < -87.0f ? -87.0f : x, &scale);
    return (p + 1.0f) * scale;
}

// tanh(x) = -m / (2 + m) with m = exp(-2 |x|) - 1, whose parts add without cancellation, for every finite x.
KVQ_HD float kvq_tanh_f32(float x) {
    float y = x < 0.0f ? x + x : -(x + x), scale; // beyond |x| = 20 the result rounds to 1
    float p = kvq_exp_parts_f32(y < -40.0f ? -40.0f : y, &scale);
    float m = p * scale + (scale - 1.0f);
    float t = m / (2.0f + m);
    return x < 0.0f ? t : -t;
}

// exp(x) for x <= 709; anything below -708 gives exp(-708).
KVQ_HD double kvq_exp_f64(double x) {
    x = x < -708.0 ? -708.0 : x;
    double shifted = x * 1.4426950408889634 + 6755399441055744.0; // 1.5 * 2^52
    double n = shifted - 6755399441055744.0;
    double r = x - n * 0.693147180369123816490; // 33 bits
    r = r - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4338000000000000u + 1023u) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return (p + 1.0) * scale;
}

#endif
