// SPDX-License-Identifier: Apache-2.0
//
// CUDA's functions on integers, single floats, lanes of a warp and atomics, under their own names. What is missing is
// missing on purpose: floating atomics (their order would show), __activemask (it depends on the scheduler), and the
// approximate functions, whose bits no processor but the device has.
#ifndef SIMT_INTRINSICS_H
#define SIMT_INTRINSICS_H

#include <math.h>

#include "simt_pointer.h"

// ---------------------------------------------------------------- threads

#define threadIdx (::simt::self->index)
#define blockIdx  (::simt::self->block)
#define blockDim  (::simt::block_dim)
#define gridDim   (::simt::grid_dim)
#define warpSize  32

static inline void __syncthreads(Place at = Place::here()) { simt::sync_threads(at); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, Place at = Place::here()) { simt::sync_warp(mask, at); }
static inline void __threadfence() { simt::fence(); }
static inline void __threadfence_block() {}

// ---------------------------------------------------------------- bits and numbers

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
static inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }

static inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (x >> i & 1u) << (31 - i);
    return result;
}

// Four of the eight bytes of (y, x), chosen by the low three bits of the nibbles of s: unlike the instruction, the
// function does not look at the fourth.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = s >> 4 * i & 7u;
        result |= (static_cast<unsigned>(bytes >> 8 * pick) & 0xffu) << 8 * i;
    }
    return result;
}

static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}

static inline unsigned __float_as_uint(float x) { return kvq_bits_of_float(x); }
static inline float    __uint_as_float(unsigned u) { return kvq_float_of_bits(u); }
static inline int      __float_as_int(float x) { return static_cast<int>(kvq_bits_of_float(x)); }
static inline float    __int_as_float(int i) { return kvq_float_of_bits(static_cast<unsigned>(i)); }
static inline float    __fadd_rn(float a, float b) { return a + b; }
static inline float    __fsub_rn(float a, float b) { return a - b; }
static inline float    __fmul_rn(float a, float b) { return a * b; }
static inline float    __fdiv_rn(float a, float b) { return a / b; }
static inline float    __fsqrt_rn(float a) { return sqrtf(a); }
static inline float    __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// Halves to even, saturating, 0 for NaN, as the device does.
static inline int __float2int_rn(float x) {
    if (!(x == x)) return 0;
    float whole = rintf(x);
    return whole >= 2147483648.0f ? 2147483647 : whole < -2147483648.0f ? -2147483647 - 1 : static_cast<int>(whole);
}

#define SIMT_MIN_MAX(T)                                                                                                \
    static inline T min(T a, T b) { return b < a ? b : a; }                                                            \
    static inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX

template <typename T, simt::Space S>
static inline std::remove_cv_t<T> __ldg(simt::Pointer<T, S> p, Place at = Place::here()) {
    static_assert(S == simt::GLOBAL, "__ldg is for global memory");
    return simt::load(p, at);
}

// ---------------------------------------------------------------- lanes

namespace simt {

// What a lane brings to a shuffle, and gets.
struct Shuffled {
    uint64_t value, result;
    int      from; // lane
};

static inline void exchange(void **payload, unsigned mask) {
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1u) == 0) continue;
        Shuffled *s = static_cast<Shuffled *>(payload[lane]);
        bool      there = (mask >> s->from & 1u) != 0;
        s->result = there ? static_cast<Shuffled *>(payload[s->from])->value : 0;
        if (!there) s->from = -1;
    }
}

template <typename T> T shuffle(const char *name, unsigned mask, T value, int from, Place at) {
    Shuffled s = {0, 0, from};
    memcpy(&s.value, &value, sizeof value);
    sync_lanes(name, mask, &s, exchange, at);
    if (s.from < 0)
        report(BAD_LANE, SHARED, at, nullptr,
               std::string("takes a value in ") + name + " from a lane outside of the mask");
    memcpy(&value, &s.result, sizeof value);
    return value;
}

// The lane that each kind of shuffle takes from; lanes are in sections of `width`, a power of two.
static inline int own_lane() { return static_cast<int>(self->lane); }
static inline int lane_at(int lane, int width) { return (own_lane() & ~(width - 1)) | (lane & (width - 1)); }
static inline int lane_up(unsigned by, int width) {
    int lane = own_lane() - static_cast<int>(by);
    return lane < (own_lane() & ~(width - 1)) ? own_lane() : lane;
}
static inline int lane_down(unsigned by, int width) {
    int lane = own_lane() + static_cast<int>(by);
    return lane > (own_lane() | (width - 1)) ? own_lane() : lane;
}
static inline int lane_xor(int by, int width) {
    int lane = own_lane() ^ by;
    return lane > (own_lane() | (width - 1)) ? own_lane() : lane;
}

struct Vote {
    bool     yes;
    unsigned ballot;
};

static inline void count_votes(void **payload, unsigned mask) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1u) != 0 && static_cast<Vote *>(payload[lane])->yes) ballot |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1u) != 0) static_cast<Vote *>(payload[lane])->ballot = ballot;
    }
}

static inline unsigned vote(const char *name, unsigned mask, bool yes, Place at) {
    Vote v = {yes, 0};
    sync_lanes(name, mask, &v, count_votes, at);
    return v.ballot;
}

} // namespace simt

#define SIMT_SHUFFLES(T)                                                                                               \
    static inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32, Place at = Place::here()) {              \
        return simt::shuffle("__shfl_sync", mask, v, simt::lane_at(lane, width), at);                                  \
    }                                                                                                                  \
    static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, Place at = Place::here()) {        \
        return simt::shuffle("__shfl_up_sync", mask, v, simt::lane_up(by, width), at);                                 \
    }                                                                                                                  \
    static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, Place at = Place::here()) {      \
        return simt::shuffle("__shfl_down_sync", mask, v, simt::lane_down(by, width), at);                             \
    }                                                                                                                  \
    static inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, Place at = Place::here()) {            \
        return simt::shuffle("__shfl_xor_sync", mask, v, simt::lane_xor(by, width), at);                               \
    }
SIMT_SHUFFLES(int)
SIMT_SHUFFLES(unsigned)
SIMT_SHUFFLES(float)
SIMT_SHUFFLES(double)
SIMT_SHUFFLES(unsigned long long)
#undef SIMT_SHUFFLES

static inline unsigned __ballot_sync(unsigned mask, int predicate, Place at = Place::here()) {
    return simt::vote("__ballot_sync", mask, predicate != 0, at);
}
static inline int __any_sync(unsigned mask, int predicate, Place at = Place::here()) {
    return simt::vote("__any_sync", mask, predicate != 0, at) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, Place at = Place::here()) {
    return simt::vote("__all_sync", mask, predicate != 0, at) == mask;
}

// ---------------------------------------------------------------- atomics

#define SIMT_ATOMIC(name, expression)                                                                                  \
    template <typename T, simt::Space S>                                                                               \
    static inline T name(simt::Pointer<T, S> p, std::enable_if_t<true, T> by, Place at = Place::here()) {              \
        return simt::update(                                                                                           \
            p, [&]([[maybe_unused]] T old) -> T { return expression; }, at);                                           \
    }
SIMT_ATOMIC(atomicAdd, static_cast<T>(static_cast<unsigned long long>(old) + static_cast<unsigned long long>(by)))
SIMT_ATOMIC(atomicMax, old < by ? by : old)
SIMT_ATOMIC(atomicMin, by < old ? by : old)
SIMT_ATOMIC(atomicOr, old | by)
SIMT_ATOMIC(atomicAnd, old &by)
SIMT_ATOMIC(atomicXor, old ^ by)
SIMT_ATOMIC(atomicExch, by)
#undef SIMT_ATOMIC

template <typename T, simt::Space S>
static inline T atomicCAS(simt::Pointer<T, S> p, std::enable_if_t<true, T> expected, std::enable_if_t<true, T> desired,
                          Place at = Place::here()) {
    return simt::update(
        p, [&](T old) -> T { return old == expected ? desired : old; }, at);
}

#endif
