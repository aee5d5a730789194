// SPDX-License-Identifier: Apache-2.0
//
// f64 sums of a row by one block, in the order in which the CPU adds (kernels_impl.h): element i goes to lane i % 8,
// those behind the last whole eight to lane 0, and the lanes are added in pairs. So a norm or a loss has the same bits
// on both. The terms, which are the work, are computed by all threads into a tile of shared memory; only the additions,
// one per term, are left to eight threads, each with a chain of a lane's length, which other blocks hide.
//
//     double lane = 0;
//     for (int64_t first = 0; first < n; first += SUM_TILE) {
//         int count = sum_count(n - first);
//         for (int i = (int)threadIdx.x; i < count; i += OP_THREADS) tile[i] = ...; // term first + i
//         lane = sum_add(tile, count, lane);
//     }
//     double sum = sum_of_lanes(tile, lane);
#ifndef KVQ_BLOCK_SUM_CUH
#define KVQ_BLOCK_SUM_CUH

#include "launch.cuh"

enum { SUM_LANES = 8, SUM_TILE = 2048, SUM_SHARED = SUM_TILE + SUM_LANES }; // doubles; the lanes lie behind the tile

// Terms of the tile that begins where `left` are left.
KVQ_DEVICE int sum_count(int64_t left) { return left < SUM_TILE ? (int)left : (int)SUM_TILE; }

// Adds the terms in the tile to the lane of this thread. All threads of the block must come, and may fill the tile
// again afterwards.
KVQ_DEVICE double sum_add(KVQ_SHARED_PTR(double) tile, int count, double lane) {
    int t = (int)threadIdx.x, whole = count / SUM_LANES * SUM_LANES;
    __syncthreads();
    for (int i = t; i < whole && t < SUM_LANES; i += SUM_LANES) lane += tile[i];
    for (int i = whole; i < count && t == 0; i++) lane += tile[i];
    __syncthreads();
    return lane;
}

// The sum, for every thread. The next call of sum_add has the barrier that keeps the lanes until all have read them.
KVQ_DEVICE double sum_of_lanes(KVQ_SHARED_PTR(double) tile, double lane) {
    KVQ_SHARED_PTR(double) all = tile + SUM_TILE;
    if (threadIdx.x < SUM_LANES) all[threadIdx.x] = lane;
    __syncthreads();
    return ((all[0] + all[1]) + (all[2] + all[3])) + ((all[4] + all[5]) + (all[6] + all[7]));
}

#endif
