// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the kernels that test the emulator: correct ones here, faulty ones in faulty_kernels.h. Pointers are
// device memory.
#ifndef SAMPLE_KERNELS_H
#define SAMPLE_KERNELS_H

#include "device.cuh"

enum { SAMPLE_BINS = 16, SAMPLE_TILE = 32 };

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

#endif
