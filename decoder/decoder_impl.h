// SPDX-License-Identifier: Apache-2.0
// Private to decoder: windows in groups, and what became of the elements of a cache.
#ifndef KVQ_DECODER_IMPL_H
#define KVQ_DECODER_IMPL_H

#include "kvq_decoder.h"

#ifndef KVQ_GROUP_BYTES                      // a suite makes it small, so that there are several groups
#define KVQ_GROUP_BYTES ((int64_t)256 << 20) // hidden states of one group of windows
#endif

// Windows whose hidden states wait together between two layers; window_floats: all states of one window.
static inline int64_t kvq_group_size(int64_t window_floats, int64_t n_windows) {
    int64_t n = KVQ_GROUP_BYTES / (window_floats * (int64_t)sizeof(float));
    return n < 1 ? 1 : n < n_windows ? n : n_windows;
}

// Layers hand over keys before RoPE and rotate what they get back: between the two, keys that are stored after RoPE are
// rotated as they are stored, and back. k NULL: there are none.
static inline void kvq_rotate_stored_keys(const kvq_artifact *artifact, const kvq_model *model, const kvq_workspace *ws,
                                          int64_t layer, kvq_rotation rotation, int64_t n_tokens, float *k) {
    if (k != NULL && artifact->layers[layer].k.domain == KVQ_KEYS_POST_ROPE)
        kvq_rotate_keys(model, ws, layer, rotation, n_tokens, k);
}

// ---------------------------------------------------------------- estimates (statistics.c)

// The estimate of f(x), f rising: the interval moves with it, the error by its slope at the value.
kvq_estimate estimate_map(kvq_estimate x, double (*f)(double), double slope);
kvq_estimate estimate_root(kvq_estimate x); // of what is not negative; ends below 0 become 0

// ---------------------------------------------------------------- what became of elements

typedef struct kvq_row_counts {
    int64_t n_elements; // of tokens that are stored as rows
    int64_t n_outliers, n_clipped;
} kvq_row_counts;
// host_x [length, d]: what was encoded of a tensor, 0 = K, 1 = V (after the rounding to f16 where there is a recent
// window).
kvq_row_counts kvq_packed_layer_count(const kvq_packed_layer *cache, int tensor, const float *host_x);

// How often each code was used: n[width][code] of columns of that many bits. A pair of value channels that is coded
// together is one column.
typedef struct kvq_code_counts {
    int64_t n[9][256];
} kvq_code_counts;
// Adds the codes of a tensor, 0 = K, 1 = V: those of all tokens that are stored as rows, in whole tiles, or in a tile
// that a flush closed; sinks are none of them.
void kvq_packed_layer_count_codes(const kvq_packed_layer *cache, int tensor, kvq_code_counts *counts);
// The share of their bits that codes make use of: sum over widths w of N_w H_w / sum of N_w w, N_w codes of w bits with
// an entropy of H_w bits. 1: all codes of a width are equally frequent. NaN when no code has any bits.
double kvq_code_use(const kvq_code_counts *counts);

// ---------------------------------------------------------------- keys beyond their ranges (range_watch.c)

// Watches the keys of windows of one length, as they are stored. *out = NULL when the artifact has no ranges of
// channels or does not know how often they were left, or all tokens of a window are sinks.
typedef struct range_watch range_watch;
kvq_status                 range_watch_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t vocab_size,
                                              const kvq_windows *windows, range_watch **out, kvq_error *err);
void                       range_watch_destroy(const kvq_context *ctx, range_watch **watch);
void range_watch_see(range_watch *watch, const kvq_backend *be, int64_t layer, int64_t window, const int32_t *ids,
                     const float *k, int64_t n_tokens);
kvq_range_report range_watch_report(const range_watch *watch);

#endif
