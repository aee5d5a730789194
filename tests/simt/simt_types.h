// SPDX-License-Identifier: Apache-2.0
//
// CUDA's vector types under the names that kernels use, with the same sizes and alignments.
#ifndef SIMT_TYPES_H
#define SIMT_TYPES_H

#include <stddef.h>
#include <stdint.h>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};

#define SIMT_VECTOR_2(name, T)                                                                                         \
    struct alignas(2 * sizeof(T)) name {                                                                               \
        T x, y;                                                                                                        \
    };                                                                                                                 \
    static inline name make_##name(T x, T y) { return {x, y}; }
#define SIMT_VECTOR_4(name, T)                                                                                         \
    struct alignas(4 * sizeof(T)) name {                                                                               \
        T x, y, z, w;                                                                                                  \
    };                                                                                                                 \
    static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR_2(uchar2, unsigned char)
SIMT_VECTOR_4(uchar4, unsigned char)
SIMT_VECTOR_2(ushort2, unsigned short)
SIMT_VECTOR_4(ushort4, unsigned short)
SIMT_VECTOR_2(int2, int)
SIMT_VECTOR_4(int4, int)
SIMT_VECTOR_2(uint2, unsigned)
SIMT_VECTOR_4(uint4, unsigned)
SIMT_VECTOR_2(float2, float)
SIMT_VECTOR_4(float4, float)

#endif
