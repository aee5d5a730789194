// SPDX-License-Identifier: Apache-2.0
// Tokens of the packed cache in f16, which is how sinks, recent tokens and open tiles are stored.
#include "packed_impl.h"

#define STAGED_FLOATS 1024

static const char *const TENSOR_NAME[2] = {"K", "V"};

kvq_status packed_does_not_fit(const kvq_packed_layer *cache, int tensor, int64_t position, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_NUMERICAL,
                    "this model's activations need more than 16-bit floats; kvq cannot store them",
                    "layer %lld, %s, position %lld: a number does not fit into f16", (long long)cache->layer,
                    TENSOR_NAME[tensor], (long long)position);
}

int64_t packed_store_halves(const kvq_backend *be, const float *x, int64_t n, uint16_t *to) {
    float staged[STAGED_FLOATS];
    for (int64_t first = 0, count; first < n; first += count) {
        count = packed_smaller(n - first, STAGED_FLOATS);
        be->download(be, staged, x + first, count);
        for (int64_t i = 0; i < count; i++) {
            uint16_t half = kvq_half_of_float(staged[i]);
            if ((half & 0x7c00u) == 0x7c00u) return first + i;
            if (to != NULL) to[first + i] = half;
        }
    }
    return -1;
}

void packed_load_halves(const kvq_backend *be, const uint16_t *from, int64_t n, float *x) {
    float staged[STAGED_FLOATS];
    for (int64_t first = 0, count; first < n; first += count) {
        count = packed_smaller(n - first, STAGED_FLOATS);
        for (int64_t i = 0; i < count; i++) staged[i] = kvq_float_of_half(from[first + i]);
        be->upload(be, x + first, staged, count);
    }
}

void packed_round_to_half(const kvq_backend *be, float *x, int64_t n) {
    uint16_t staged[STAGED_FLOATS];
    for (int64_t first = 0, count; first < n; first += count) {
        count = packed_smaller(n - first, STAGED_FLOATS);
        (void)packed_store_halves(be, x + first, count, staged);
        packed_load_halves(be, staged, count, x + first);
    }
}
