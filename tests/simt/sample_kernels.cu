// SPDX-License-Identifier: Apache-2.0
// Correct kernels of the usual kinds; see sample_kernels.h. nvcc compiles this file as well.
#include "sample_kernels.h"

enum { SUM_THREADS = 256 };

KVQ_KERNEL KVQ_BOUNDS(SUM_THREADS) block_sums(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(float) sums) {
    KVQ_SHARED(float, part, SUM_THREADS);
    int i = (int)threadIdx.x;
    part[i] = x[(int)blockIdx.x * SUM_THREADS + i];
    __syncthreads();
    for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
        if (i < half) part[i] += part[i + half];
        __syncthreads();
    }
    if (i == 0) sums[blockIdx.x] = part[0];
}

void sample_block_sums(const float *x, float *sums, int n_blocks, kvq_stream stream) {
    KVQ_LAUNCH(block_sums, (unsigned)n_blocks, SUM_THREADS, 0, stream, x, sums);
}

// Sums over the lanes up to this one.
KVQ_DEVICE int lane_sums(int value) {
    int lane = (int)threadIdx.x % 32;
    for (unsigned by = 1; by < 32; by *= 2) {
        int before = __shfl_up_sync(0xffffffffu, value, by);
        if (lane >= (int)by) value += before;
    }
    return value;
}

KVQ_KERNEL warp_scan(KVQ_GLOBAL(const int) x, KVQ_GLOBAL(int) y) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    y[i] = lane_sums(x[i]);
}

void sample_warp_scan(const int *x, int *y, int n_warps, kvq_stream stream) {
    KVQ_LAUNCH(warp_scan, (unsigned)n_warps / 2, 64, 0, stream, x, y);
}

// A row is one element longer than the tile, so that a column lies in 32 banks.
KVQ_KERNEL transpose(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(float) y, int m, int n) {
    KVQ_SHARED(float, tile, SAMPLE_TILE *(SAMPLE_TILE + 1));
    int tx = (int)threadIdx.x, column = (int)blockIdx.x * SAMPLE_TILE, row = (int)blockIdx.y * SAMPLE_TILE;
    for (int r = (int)threadIdx.y; r < SAMPLE_TILE; r += (int)blockDim.y)
        tile[r * (SAMPLE_TILE + 1) + tx] = x[(row + r) * n + column + tx];
    __syncthreads();
    for (int r = (int)threadIdx.y; r < SAMPLE_TILE; r += (int)blockDim.y)
        y[(column + r) * m + row + tx] = tile[tx * (SAMPLE_TILE + 1) + r];
}

void sample_transpose(const float *x, float *y, int m, int n, kvq_stream stream) {
    dim3 grid((unsigned)n / SAMPLE_TILE, (unsigned)m / SAMPLE_TILE), block(SAMPLE_TILE, 8);
    KVQ_LAUNCH(transpose, grid, block, 0, stream, x, y, m, n);
}

KVQ_KERNEL histogram(KVQ_GLOBAL(const uint8_t) x, KVQ_GLOBAL_ALIASED(unsigned) counts, int n) {
    KVQ_SHARED(unsigned, local, SAMPLE_BINS);
    if (threadIdx.x < SAMPLE_BINS) local[threadIdx.x] = 0;
    __syncthreads();
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        atomicAdd(&local[x[i]], 1u);
    __syncthreads();
    if (threadIdx.x < SAMPLE_BINS) atomicAdd(counts + threadIdx.x, local[threadIdx.x]);
}

void sample_histogram(const uint8_t *x, unsigned *counts, int n, kvq_stream stream) {
    KVQ_LAUNCH(histogram, 3, 96, 0, stream, x, counts, n);
}

// Sum over a block of 256, valid in its first thread.
KVQ_DEVICE int sum_of_block(int value, KVQ_SHARED_PTR(int) warps) {
    for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < 8 && threadIdx.x == 0; w++) sum += warps[w];
    return sum;
}

KVQ_KERNEL last_block(KVQ_GLOBAL(const int) x, KVQ_GLOBAL_ALIASED(int) parts, KVQ_GLOBAL_ALIASED(unsigned) arrived,
                      KVQ_GLOBAL(int) total) {
    KVQ_SHARED(int, warps, 8);
    KVQ_SHARED(int, is_last, 1);
    int sum = sum_of_block(x[blockIdx.x * blockDim.x + threadIdx.x], warps);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
        __threadfence();
        is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (is_last[0] == 0) return;
    sum = 0;
    for (int i = (int)threadIdx.x; i < (int)gridDim.x; i += (int)blockDim.x) sum += parts[i];
    sum = sum_of_block(sum, warps);
    if (threadIdx.x == 0) total[0] = sum;
}

void sample_last_block(const int *x, int *parts, unsigned *arrived, int *total, int n_blocks, kvq_stream stream) {
    KVQ_LAUNCH(last_block, (unsigned)n_blocks, 256, 0, stream, x, parts, arrived, total);
}

// Loaded by one vector, stored by another thread's: a warp reverses its part, which needs no barrier of the block.
KVQ_KERNEL vectors(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(float) y, int n) {
    KVQ_DYNAMIC_SHARED(float, part);
    int i = (int)threadIdx.x, other = i ^ 31;
    if (4 * i >= n) return; // whole warps
    float4 v = kvq_as<float4>(x)[i];
    kvq_as<float4>(part)[i] = make_float4(v.x + 1, v.y + 1, v.z + 1, v.w + 1);
    __syncwarp();
    kvq_as<float4>(y)[other] = kvq_as<float4>(part)[other];
}

void sample_vectors(const float *x, float *y, int n, kvq_stream stream) {
    KVQ_LAUNCH(vectors, 1, (unsigned)n / 4, (size_t)n * 4, stream, x, y, n);
}
