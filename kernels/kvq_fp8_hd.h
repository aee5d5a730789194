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
KVQ_HD float kvq_float_of_e4m3(uint8_t h);

// Round to nearest, ties to even; magnitudes beyond the largest, infinities too, become the largest; NaN stays NaN.
KVQ_HD uint8_t kvq_e4m3_of_float(float x);

#endif
