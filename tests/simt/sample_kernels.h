// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the kernels that test the emulator: correct ones here, faulty ones in faulty_kernels.h. Pointers are
// device memory.
#ifndef SAMPLE_KERNELS_H
#define SAMPLE_KERNELS_H

#include "device.cuh"
#include "kvq_tile_hd.h"

enum { SAMPLE_BINS = 16, SAMPLE_TILE = 32, SAMPLE_LANE_WORDS = 13 };

// sums[b] = sum of the 256 elements of block b, by a tree in shared memory.
void sample_block_sums(const float *x, float *sums, int n_blocks, kvq_stream stream);
// Inclusive sums of every 32 elements, by shuffles.
void sample_warp_scan(const int *x, int *y, int n_warps, kvq_stream stream);
// y [n, m] = transpose of x [m, n], tile by tile through shared memory. Multiples of SAMPLE_TILE.
void sample_transpose(const float *x, float *y, int m, int n, kvq_stream stream);
// counts [SAMPLE_BINS] += how often each value occurs in x [n].
void sample_histogram(const uint8_t *x, unsigned *counts, int n, kvq_stream stream);
// total[0] = sum of x [256 * n_blocks]; the last block to finish adds up. `parts` [n_blocks], `arrived` one zero.
void sample_last_block(const int *x, int *parts, unsigned *arrived, int *total, int n_blocks, kvq_stream stream);
// y[i] = x[i] + 1 for n elements of a block, in dynamic shared memory, by vectors of four.
void sample_vectors(const float *x, float *y, int n, kvq_stream stream);

// y[0] = how many floats fit into `bytes` of dynamic shared memory, found by writing them. False: not to be had.
bool sample_large_shared(float *y, size_t bytes, kvq_stream stream);
// counts [2, 3, 2, 5, 3, 2] = 1, 2, ...: each thread of each block adds its number to its own element.
void sample_indices(unsigned *counts, kvq_stream stream);
// y [SAMPLE_LANE_WORDS, 32]: what shuffles and votes over x [32] give each lane, see the kernel.
void sample_lanes(const int *x, int *y, kvq_stream stream);
// d [16, 8] = a [16, 16] b [16, 8] in halves, by ldmatrix and mma; t [8, 8] = transpose of the upper left of a.
void sample_mma(const uint16_t *a, const uint16_t *b, float *d, uint16_t *t, kvq_stream stream);
// sum[0] = sum of x [n], a multiple of 4, tile by tile through asynchronous copies, two on their way.
void sample_pipeline(const int *x, int *sum, int n, kvq_stream stream);
// y[0] = 7 for two blocks, the first of which leaves a copy of x [4] on its way when it ends.
void sample_unfinished_copy(const int *x, int *y, kvq_stream stream);
// What one thread makes of one row and of one tile with the codec. Everything that the specs point to is on the device;
// results are the status and the bytes.
void sample_encode_row(const kvq_block_spec *spec, const float *x, const kvq_block_scratch *scratch, uint8_t *row,
                       int *status, kvq_stream stream);
void sample_encode_tile(const kvq_tile_spec *spec, const float *x, int n_tokens, const kvq_tile_scratch *scratch,
                        uint8_t *tile, int *status, kvq_stream stream);

#endif
