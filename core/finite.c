// SPDX-License-Identifier: Apache-2.0
// The search for NaN and infinity, which every weight and every activation passes.
#include "kvq_core.h"

#define BLOCK 4096 // tested without branches, so that the usual case runs at the speed of memory

static uint32_t is_nonfinite(float x) { return (kvq_bits_of_float(x) & 0x7f800000u) == 0x7f800000u ? 1u : 0u; }

int64_t kvq_find_nonfinite(const float *x, int64_t n) {
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t  end = first + BLOCK < n ? first + BLOCK : n;
        uint32_t bad = 0;
        for (int64_t i = first; i < end; i++) bad |= is_nonfinite(x[i]);
        for (int64_t i = first; i < end && bad != 0; i++) {
            if (is_nonfinite(x[i])) return i;
        }
    }
    return -1;
}
