// SPDX-License-Identifier: Apache-2.0
// The host's half of rope.cuh: tables in f64, rounded once.
#include <math.h>

#include "kvq_cuda_attention.h"
#include "rope.cuh"

static void fill(const double *frequency, int n_pairs, double amplitude, int64_t n, int64_t step, float *to) {
    for (int64_t row = 0; row < n; row++) {
        for (int i = 0; i < n_pairs; i++, to += 2) {
            double angle = (double)(row * step) * frequency[i];
            to[0] = (float)(cos(angle) * amplitude);
            to[1] = (float)(sin(angle) * amplitude);
        }
    }
}

void kvq_cuda_rope_fill(const double *frequency, int n_pairs, double amplitude, int64_t n_bases, float *bases,
                        float *offsets) {
    fill(frequency, n_pairs, 1, n_bases, KVQ_ROPE_OFFSETS, bases);
    fill(frequency, n_pairs, amplitude, KVQ_ROPE_OFFSETS, 1, offsets);
}
