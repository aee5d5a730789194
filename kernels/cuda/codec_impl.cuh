// SPDX-License-Identifier: Apache-2.0
//
// Private to the device codecs: what rows and tiles have in common beside the selection of outliers.
#ifndef KVQ_CODEC_IMPL_CUH
#define KVQ_CODEC_IMPL_CUH

#include "launch.cuh"

#include "kvq_cuda_codec.h"

// MIN_BLOCKS: of an SM. Without a number ptxas would rather spill registers on sm_90 than lose a block.
enum { ALL_LANES = -1, MIN_BLOCKS = 1 };

KVQ_DEVICE int lane_of_thread() { return (int)threadIdx.x % 32; }

// Eight codes of b bits are b bytes. Gives all of them to each of eight neighbouring lanes, the first lane's code in
// the lowest bits; lane i of the eight then stores byte i. So bytes are written whole, by one thread each, without
// atomics and without assuming anything about what was there before.
KVQ_DEVICE unsigned long long join_eight(unsigned code, int bits) {
    unsigned long long joined = (unsigned long long)code << (int)threadIdx.x % 8 * bits;
    KVQ_UNROLL
    for (int by = 1; by < 8; by *= 2) joined |= __shfl_xor_sync((unsigned)ALL_LANES, joined, by);
    return joined;
}

KVQ_DEVICE uint8_t byte_of(unsigned long long bytes, int i) { return (uint8_t)(bytes >> 8 * i); }

// ---------------------------------------------------------------- host

static inline unsigned round_up(int n, int step) { return (unsigned)((n + step - 1) / step * step); }

#endif
