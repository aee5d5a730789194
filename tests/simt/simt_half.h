// SPDX-License-Identifier: Apache-2.0
//
// Half precision under CUDA's names, bit by bit: each operation is rounded once to the nearest half, ties to even,
// subnormals kept; a result that is not a number is 0x7fff, as on the device. Of add, subtract and multiply only the
// forms with _rn exist: nvcc may fuse the others, and then the device has other bits.
#ifndef SIMT_HALF_H
#define SIMT_HALF_H

#include <math.h>

#include "kvq_hd.h"
#include "simt_types.h"

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

static inline __half         __ushort_as_half(unsigned short u) { return {u}; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }

static inline __half __float2half_rn(float x) {
    return {x == x ? kvq_half_of_float(x) : static_cast<uint16_t>(0x7fff)};
}
static inline __half __float2half(float x) { return __float2half_rn(x); }
static inline float  __half2float(__half h) { return kvq_float_of_half(h.bits); }

namespace simt {

// Rounded once: first to a float that is odd where it is not exact, which keeps on which side of a tie the sum lies.
static inline __half half_of_double(double x) {
    float f = static_cast<float>(x);
    if (static_cast<double>(f) != x && x == x && f - f == 0) {
        uint32_t bits = kvq_bits_of_float(f);
        if (fabs(static_cast<double>(f)) > fabs(x)) bits--; // towards zero
        f = kvq_float_of_bits(bits | 1u);
    }
    return __float2half_rn(f);
}

} // namespace simt

// Sums of two halves are exact as double, products as float. A product plus a half is exact as double as well, or the
// product is less than 2^-32 of the half, and the half is the result.
static inline __half __hadd_rn(__half a, __half b) {
    return simt::half_of_double(static_cast<double>(__half2float(a)) + static_cast<double>(__half2float(b)));
}
static inline __half __hsub_rn(__half a, __half b) {
    return simt::half_of_double(static_cast<double>(__half2float(a)) - static_cast<double>(__half2float(b)));
}
static inline __half __hmul_rn(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }
static inline __half __hfma(__half a, __half b, __half c) {
    double product = static_cast<double>(__half2float(a)) * static_cast<double>(__half2float(b));
    return simt::half_of_double(product + static_cast<double>(__half2float(c)));
}
static inline __half __hneg(__half a) { return {static_cast<uint16_t>(a.bits ^ 0x8000u)}; }
static inline __half __habs(__half a) { return {static_cast<uint16_t>(a.bits & 0x7fffu)}; }

static inline bool __hisnan(__half a) { return (a.bits & 0x7fffu) > 0x7c00u; }
static inline bool __heq(__half a, __half b) { return __half2float(a) == __half2float(b); }
static inline bool __hlt(__half a, __half b) { return __half2float(a) < __half2float(b); }
static inline bool __hle(__half a, __half b) { return __half2float(a) <= __half2float(b); }
static inline bool __hgt(__half a, __half b) { return __half2float(a) > __half2float(b); }
static inline bool __hge(__half a, __half b) { return __half2float(a) >= __half2float(b); }

// The number where the other is none; +0 is greater than -0.
static inline __half __hmax(__half a, __half b) {
    if (__hisnan(a)) return __hisnan(b) ? __half{0x7fff} : b;
    if (__hisnan(b)) return a;
    return __hgt(a, b) || (__heq(a, b) && a.bits < b.bits) ? a : b;
}
static inline __half __hmin(__half a, __half b) { return __hneg(__hmax(__hneg(a), __hneg(b))); }

static inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
static inline __half2 __half2half2(__half h) { return {h, h}; }
static inline __half  __low2half(__half2 h) { return h.x; }
static inline __half  __high2half(__half2 h) { return h.y; }
static inline float   __low2float(__half2 h) { return __half2float(h.x); }
static inline float   __high2float(__half2 h) { return __half2float(h.y); }
static inline __half2 __lowhigh2highlow(__half2 h) { return {h.y, h.x}; }
static inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
static inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
static inline float2  __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
static inline __half2 __hadd2_rn(__half2 a, __half2 b) { return {__hadd_rn(a.x, b.x), __hadd_rn(a.y, b.y)}; }
static inline __half2 __hsub2_rn(__half2 a, __half2 b) { return {__hsub_rn(a.x, b.x), __hsub_rn(a.y, b.y)}; }
static inline __half2 __hmul2_rn(__half2 a, __half2 b) { return {__hmul_rn(a.x, b.x), __hmul_rn(a.y, b.y)}; }
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
static inline __half2 __hneg2(__half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
static inline __half2 __habs2(__half2 a) { return {__habs(a.x), __habs(a.y)}; }
static inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
static inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }

// The register that holds two halves, the first in the low bits.
static inline unsigned kvq_uint_of_half2(__half2 h) { return h.x.bits | static_cast<unsigned>(h.y.bits) << 16; }
static inline __half2  kvq_half2_of_uint(unsigned u) {
     return {{static_cast<uint16_t>(u & 0xffffu)}, {static_cast<uint16_t>(u >> 16)}};
}

#endif
