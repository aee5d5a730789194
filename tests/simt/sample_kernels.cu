// SPDX-License-Identifier: Apache-2.0
// Correct kernels of the usual kinds; see sample_kernels.h. nvcc compiles this file as well.
#include "sample_kernels.h"

enum { SUM_THREADS = 256 };

KVQ_KERNEL KVQ_BOUNDS(SUM_THREADS) block_sums(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(float) sums) {
    KVQ_SHARED(float, part, SUM_THREADS);
    int i = (int)threadIdx.x;
    part[i] = x[(int)blockIdx.x * SUM_THREADS + i];
    __syncthreads();
    for (int n = SUM_THREADS / 2; n > 0; n /= 2) {
        if (i < n) part[i] += part[i + n];
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

KVQ_KERNEL fill_shared(KVQ_GLOBAL(float) y, int n) {
    KVQ_DYNAMIC_SHARED(float, part);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) part[i] = 1;
    __syncthreads();
    float count = 0;
    for (int i = 0; i < n && threadIdx.x == 0; i++) count += part[i];
    if (threadIdx.x == 0) y[0] = count;
}

bool sample_large_shared(float *y, size_t bytes, kvq_stream stream) {
    if (!KVQ_ALLOW_SHARED(fill_shared, bytes)) return false;
    KVQ_LAUNCH(fill_shared, 1, 64, bytes, stream, y, (int)(bytes / sizeof(float)));
    return true;
}

KVQ_KERNEL indices(KVQ_GLOBAL_ALIASED(unsigned) counts) {
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    atomicAdd(counts + i, i + 1);
}

void sample_indices(unsigned *counts, kvq_stream stream) {
    KVQ_LAUNCH(indices, dim3(2, 3, 2), dim3(5, 3, 2), 0, stream, counts);
}

// ---------------------------------------------------------------- lanes

KVQ_KERNEL lanes(KVQ_GLOBAL(const int) x, KVQ_GLOBAL(int) y) {
    const unsigned all = 0xffffffffu, odd = 0xaaaaaaaau;
    int            lane = (int)threadIdx.x, v = x[lane], is_odd = lane % 2;
    int            words[SAMPLE_LANE_WORDS] = {
                   __shfl_sync(all, v, lane * 5),
                   __shfl_sync(all, v, 3, 8),
                   __shfl_up_sync(all, v, 3),
                   __shfl_up_sync(all, v, 3, 4),
                   __shfl_down_sync(all, v, 7),
                   __shfl_down_sync(all, v, 7, 16),
                   __shfl_xor_sync(all, v, 9),
                   __shfl_xor_sync(all, v, 9, 8),
                   __float_as_int(__shfl_xor_sync(all, __int_as_float(v), 1)),
                   (int)__ballot_sync(all, v > 0),
                   __any_sync(all, v == x[5]) * 2 + __all_sync(all, v != x[5]),
                   0,
                   0,
    };
    if (is_odd) words[11] = __shfl_xor_sync(odd, v, 2) + (int)__ballot_sync(odd, lane > 16);
    words[12] = __all_sync(is_odd ? odd : ~odd, is_odd);
    for (int i = 0; i < SAMPLE_LANE_WORDS; i++) y[i * 32 + lane] = words[i];
}

void sample_lanes(const int *x, int *y, kvq_stream stream) { KVQ_LAUNCH(lanes, 1, 32, 0, stream, x, y); }

// ---------------------------------------------------------------- matrices

// A row of b is 8 halves, which is what an address of ldmatrix stands for; those of a are two.
KVQ_KERNEL mma_product(KVQ_GLOBAL(const uint16_t) a, KVQ_GLOBAL(const uint16_t) b, KVQ_GLOBAL(float) d,
                       KVQ_GLOBAL(uint16_t) t) {
    KVQ_SHARED(uint16_t, rows_a, 16 * 16);
    KVQ_SHARED(uint16_t, rows_b, 16 * 8);
    int      lane = (int)threadIdx.x, row = lane / 4, column = lane % 4 * 2;
    unsigned fragment_a[4], fragment_b[2];
    float    sums[4] = {0, 0, 0, 0};
    kvq_as<uint4>(rows_a)[lane] = kvq_as<uint4>(a)[lane];
    if (lane < 16) kvq_as<uint4>(rows_b)[lane] = kvq_as<uint4>(b)[lane];
    __syncwarp();
    kvq_ldmatrix<4>(fragment_a, rows_a + lane % 16 * 16 + lane / 16 * 8);
    kvq_ldmatrix_trans<2>(fragment_b, rows_b + lane % 16 * 8);
    kvq_mma_m16n8k16(sums, fragment_a, fragment_b);
    for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
    kvq_as<unsigned>(t)[lane] = kvq_movmatrix_trans(fragment_a[0]);
}

void sample_mma(const uint16_t *a, const uint16_t *b, float *d, uint16_t *t, kvq_stream stream) {
    KVQ_LAUNCH(mma_product, 1, 32, 0, stream, a, b, d, t);
}

// ---------------------------------------------------------------- asynchronous copies

enum { PIPE_THREADS = 64, PIPE_TILE = 4 * PIPE_THREADS, PIPE_STAGES = 3 };

// One vector per thread; beyond the end zeros.
KVQ_DEVICE void copy_tile(KVQ_SHARED_PTR(int) stages, KVQ_GLOBAL(const int) x, int n, int tile) {
    int at = tile * PIPE_TILE + 4 * (int)threadIdx.x, inside = at < n;
    kvq_copy_async_16(stages + tile % PIPE_STAGES * PIPE_TILE + 4 * (int)threadIdx.x, x + (inside ? at : 0),
                      inside ? 16u : 0u);
    kvq_copy_commit(); // empty groups count as well
}

KVQ_KERNEL pipeline(KVQ_GLOBAL(const int) x, KVQ_GLOBAL(int) result, int n) {
    KVQ_SHARED(int, stages, PIPE_STAGES *PIPE_TILE);
    KVQ_SHARED(int, warps, PIPE_THREADS / 32);
    int sum = 0, n_tiles = (n + PIPE_TILE - 1) / PIPE_TILE;
    for (int tile = 0; tile < PIPE_STAGES - 1; tile++) copy_tile(stages, x, n, tile);
    for (int tile = 0; tile < n_tiles; tile++) {
        kvq_copy_wait<PIPE_STAGES - 2>(); // this thread's part of the tile is there
        __syncthreads();                  // everybody's is, and all are done with the stage that is filled next
        copy_tile(stages, x, n, tile + PIPE_STAGES - 1);
        for (int i = 0; i < 4; i++) sum += stages[tile % PIPE_STAGES * PIPE_TILE + i * PIPE_THREADS + (int)threadIdx.x];
    }
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) result[0] = warps[0] + warps[1];
}

void sample_pipeline(const int *x, int *sum, int n, kvq_stream stream) {
    KVQ_LAUNCH(pipeline, 1, PIPE_THREADS, 0, stream, x, sum, n);
}

KVQ_KERNEL unfinished_copy(KVQ_GLOBAL(const int) x, KVQ_GLOBAL(int) y, int is_first) {
    KVQ_SHARED(int, part, 4);
    if (is_first) {
        kvq_copy_async_16(part, x);
        kvq_copy_commit();
    } else {
        part[0] = 7;
        kvq_copy_commit();
        kvq_copy_wait<0>();
        y[0] = part[0];
    }
}

void sample_unfinished_copy(const int *x, int *y, kvq_stream stream) {
    for (int is_first = 1; is_first >= 0; is_first--) KVQ_LAUNCH(unfinished_copy, 1, 1, 0, stream, x, y, is_first);
}

// ---------------------------------------------------------------- the codec

// A spec goes to the device as it is, with plain pointers.
KVQ_KERNEL encode_row(kvq_block_spec spec, KVQ_GLOBAL(const float) x, kvq_block_scratch scratch,
                      KVQ_GLOBAL(uint8_t) row, KVQ_GLOBAL(int) status) {
    if (threadIdx.x != 0) return;
    status[0] = kvq_block_encode(&spec, kvq_raw(x, spec.d), &scratch, kvq_raw(row, kvq_block_row_bytes(&spec)));
}

void sample_encode_row(const kvq_block_spec *spec, const float *x, const kvq_block_scratch *scratch, uint8_t *row,
                       int *status, kvq_stream stream) {
    KVQ_LAUNCH(encode_row, 1, 32, 0, stream, *spec, x, *scratch, row, status);
}

KVQ_KERNEL encode_tile(kvq_tile_spec spec, KVQ_GLOBAL(const float) x, int n_tokens, kvq_tile_scratch scratch,
                       KVQ_GLOBAL(uint8_t) tile, KVQ_GLOBAL(int) status) {
    if (threadIdx.x != 0) return;
    status[0] = kvq_tile_encode(&spec, kvq_raw(x, n_tokens * spec.d), 0, n_tokens, &scratch,
                                kvq_raw(tile, kvq_tile_bytes(&spec)));
}

void sample_encode_tile(const kvq_tile_spec *spec, const float *x, int n_tokens, const kvq_tile_scratch *scratch,
                        uint8_t *tile, int *status, kvq_stream stream) {
    KVQ_LAUNCH(encode_tile, 1, 32, 0, stream, *spec, x, n_tokens, *scratch, tile, status);
}
