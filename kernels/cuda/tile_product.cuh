// SPDX-License-Identifier: Apache-2.0
//
// The two products that attention and linear layers are made of, for a block of 256 threads and tiles of 64 rows: of
// all pairs of rows of two matrices, and of a tile of weights with rows. Thread (x, y) of 16 x 16 has the results at
// rows y + 16 i and columns x + 16 j, in registers. Operands pass through shared memory in parts of 32 columns, so its
// size does not depend on that of a head; a part's row is one longer, so that a column lies in 32 banks. Sums are f32,
// fused, and run in the order of the index, so their error is at most n * 2^-24 times the sum of magnitudes.
#ifndef KVQ_TILE_PRODUCT_CUH
#define KVQ_TILE_PRODUCT_CUH

#include "launch.cuh"

enum {
    TILE = 64,                            // rows
    TILE_SIDE = 16,                       // threads in a row
    TILE_EACH = TILE / TILE_SIDE,         // results of a thread in each direction
    TILE_PART = 32,                       // columns in shared memory at a time
    TILE_PART_ROW = TILE_PART + 1,        //
    TILE_SHARED = TILE * TILE_PART_ROW,   // floats of a part
    TILE_SQUARE_ROW = TILE + 1,           //
    TILE_SQUARE = TILE * TILE_SQUARE_ROW, // floats of a tile of weights
    TILE_SLICE = 128,                     // columns of rows that tile_mix adds up
    TILE_SLICE_EACH = TILE_SLICE / TILE_SIDE
};

KVQ_DEVICE int tile_x() { return (int)threadIdx.x % TILE_SIDE; }
KVQ_DEVICE int tile_y() { return (int)threadIdx.x / TILE_SIDE; }

// part [64, 33] = the first `width` columns of n rows, `stride` apart; 0 elsewhere
KVQ_DEVICE void tile_load(KVQ_GLOBAL(const float) rows, int64_t stride, int n, int width, KVQ_SHARED_PTR(float) part) {
    int c = (int)threadIdx.x % TILE_PART;
    for (int r = (int)threadIdx.x / TILE_PART; r < TILE; r += OP_THREADS / TILE_PART) {
        float value = 0;
        if (r < n && c < width) value = rows[r * stride + c];
        part[r * TILE_PART_ROW + c] = value;
    }
}

KVQ_DEVICE int tile_width(int64_t left) { return left < TILE_PART ? (int)left : (int)TILE_PART; }

// sums[i][j] += row y + 16 i of a times row x + 16 j of b, both of `depth` elements; n_a, n_b rows exist
KVQ_DEVICE void tile_products(KVQ_GLOBAL(const float) a, int64_t a_stride, int n_a, KVQ_GLOBAL(const float) b,
                              int64_t b_stride, int n_b, int64_t depth, KVQ_SHARED_PTR(float) a_part,
                              KVQ_SHARED_PTR(float) b_part, float (*sums)[TILE_EACH]) {
    for (int64_t from = 0; from < depth; from += TILE_PART) {
        int width = tile_width(depth - from);
        tile_load(a + from, a_stride, n_a, width, a_part);
        tile_load(b + from, b_stride, n_b, width, b_part);
        __syncthreads();
        for (int c = 0; c < width; c++) {
            float x[TILE_EACH], y[TILE_EACH];
            KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) x[i] =
                a_part[(tile_y() + TILE_SIDE * i) * TILE_PART_ROW + c];
            KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) y[j] =
                b_part[(tile_x() + TILE_SIDE * j) * TILE_PART_ROW + c];
            KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
                KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) sums[i][j] = __fmaf_rn(x[i], y[j], sums[i][j]);
            }
        }
        __syncthreads();
    }
}

// sums[i][j] += sum over k of weights [y + 16 i, k] times column x + 16 j of row k; `width` columns of n rows exist, at
// most TILE_SLICE and TILE. What other threads wrote to weights just before is seen.
KVQ_DEVICE void tile_mix(KVQ_SHARED_PTR(float) weights, KVQ_GLOBAL(const float) rows, int64_t stride, int n, int width,
                         KVQ_SHARED_PTR(float) part, float (*sums)[TILE_SLICE_EACH]) {
    KVQ_UNROLL for (int p = 0; p < TILE_SLICE / TILE_PART; p++) {
        if (p * TILE_PART >= width) continue; // for all threads
        tile_load(rows + p * TILE_PART, stride, n, tile_width(width - p * TILE_PART), part);
        __syncthreads();
        for (int k = 0; k < n; k++) {
            float low = part[k * TILE_PART_ROW + tile_x()], high = part[k * TILE_PART_ROW + tile_x() + TILE_SIDE];
            KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
                float weight = weights[(tile_y() + TILE_SIDE * i) * TILE_SQUARE_ROW + k];
                sums[i][2 * p] = __fmaf_rn(weight, low, sums[i][2 * p]);
                sums[i][2 * p + 1] = __fmaf_rn(weight, high, sums[i][2 * p + 1]);
            }
        }
        __syncthreads();
    }
}

#endif
