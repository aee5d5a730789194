// SPDX-License-Identifier: Apache-2.0
//
// Linear layers in f32 without a library: tiles of 64 x 64 and 64 x 128 results in registers (tile_product.cuh). They
// are what the emulator can run, and what is there for a device without cuBLAS; they are several times slower than a
// library, and nobody should choose them where there is one.
#include "kvq_cuda_ops.h"
#include "tile_product.cuh"

KVQ_DEVICE int rows_left(int64_t n, int64_t first) { return n - first < TILE ? (int)(n - first) : (int)TILE; }

// A block per 64 rows of x and 64 rows of w. bias: NULL = none
KVQ_KERNEL OP_BOUNDS linear(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(const float) w, KVQ_GLOBAL(const float) bias,
                            bool has_bias, KVQ_GLOBAL(float) y, int64_t m, int64_t n_out, int64_t n_in) {
    KVQ_SHARED(float, x_part, TILE_SHARED);
    KVQ_SHARED(float, w_part, TILE_SHARED);
    int64_t row = (int64_t)blockIdx.x * TILE, column = (int64_t)blockIdx.y * TILE;
    int     n_rows = rows_left(m, row), n_columns = rows_left(n_out, column);
    float   sums[TILE_EACH][TILE_EACH] = {};
    tile_products(x + row * n_in, n_in, n_rows, w + column * n_in, n_in, n_columns, n_in, x_part, w_part, sums);
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) {
            int r = tile_y() + TILE_SIDE * i, c = tile_x() + TILE_SIDE * j;
            if (r >= n_rows || c >= n_columns) continue;
            float sum = sums[i][j];
            if (has_bias) sum += bias[column + c];
            y[(row + r) * n_out + column + c] = sum;
        }
    }
}

// A block per 64 rows of dy and 128 columns of w.
KVQ_KERNEL OP_BOUNDS linear_backward(KVQ_GLOBAL(const float) dy, KVQ_GLOBAL(const float) w, KVQ_GLOBAL(float) dx,
                                     int64_t m, int64_t n_out, int64_t n_in, bool accumulate) {
    KVQ_SHARED(float, weights, TILE_SQUARE);
    KVQ_SHARED(float, w_part, TILE_SHARED);
    int64_t row = (int64_t)blockIdx.x * TILE, column = (int64_t)blockIdx.y * TILE_SLICE;
    int     n_rows = rows_left(m, row), width = n_in - column < TILE_SLICE ? (int)(n_in - column) : (int)TILE_SLICE;
    float   sums[TILE_EACH][TILE_SLICE_EACH] = {};
    for (int64_t from = 0; from < n_out; from += TILE) {
        int n = rows_left(n_out, from);
        for (int i = (int)threadIdx.x; i < TILE * TILE; i += OP_THREADS) {
            int   r = i / TILE, k = i % TILE;
            float value = 0;
            if (r < n_rows && k < n) value = dy[(row + r) * n_out + from + k];
            weights[r * TILE_SQUARE_ROW + k] = value;
        }
        tile_mix(weights, w + from * n_in + column, n_in, n, width, w_part, sums);
    }
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        KVQ_UNROLL for (int j = 0; j < TILE_SLICE_EACH; j++) {
            int r = tile_y() + TILE_SIDE * i, c = tile_x() + TILE_SIDE * j;
            if (r >= n_rows || c >= width) continue;
            int64_t at = (row + r) * n_in + column + c;
            float   sum = sums[i][j];
            if (accumulate) sum += dx[at];
            dx[at] = sum;
        }
    }
}

static dim3 grid_of(int64_t m, int64_t n, int64_t columns) {
    return dim3((unsigned)((m + TILE - 1) / TILE), (unsigned)((n + columns - 1) / columns));
}

extern "C" {

kvq_status kvq_cuda_linear_plain(const float *x, const float *w, const float *bias, float *y, int64_t m, int64_t n_out,
                                 int64_t n_in, void *stream, kvq_error *err) {
    if (m <= 0 || n_out <= 0) return KVQ_OK;
    KVQ_LAUNCH(linear, grid_of(m, n_out, TILE), OP_THREADS, 0, op_stream(stream), x, w, bias, bias != NULL, y, m, n_out,
               n_in);
    return op_launched("linear", err);
}

kvq_status kvq_cuda_linear_backward_plain(const float *dy, const float *w, float *dx, int64_t m, int64_t n_out,
                                          int64_t n_in, bool accumulate, void *stream, kvq_error *err) {
    if (m <= 0 || n_in <= 0) return KVQ_OK;
    KVQ_LAUNCH(linear_backward, grid_of(m, n_in, TILE_SLICE), OP_THREADS, 0, op_stream(stream), dy, w, dx, m, n_out,
               n_in, accumulate);
    return op_launched("linear_backward", err);
}

} // extern "C"
