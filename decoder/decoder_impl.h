// SPDX-License-Identifier: Apache-2.0
// Private to decoder: windows in groups, and what became of the elements of a cache.
#ifndef KVQ_DECODER_IMPL_H
#define KVQ_DECODER_IMPL_H

#include "kvq_decoder.h"

#define KVQ_GROUP_BYTES ((int64_t)256 << 20) // hidden states of one group of windows

// Windows whose hidden states wait together between two layers; window_floats: all states of one window.
static inline int64_t kvq_group_size(int64_t window_floats, int64_t n_windows) {
    int64_t n = KVQ_GROUP_BYTES / (window_floats * (int64_t)sizeof(float));
    return n < 1 ? 1 : n < n_windows ? n : n_windows;
}

typedef struct kvq_row_counts {
    int64_t n_elements; // of tokens that are stored as rows
    int64_t n_outliers, n_clipped;
} kvq_row_counts;
// host_x [length, d]: what was encoded of a tensor, 0 = K, 1 = V (after the rounding to f16 where there is a recent
// window).
kvq_row_counts kvq_packed_layer_count(const kvq_packed_layer *cache, int tensor, const float *host_x);

#endif
