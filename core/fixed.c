// SPDX-License-Identifier: Apache-2.0
// Fixed-point sums back to floating point.
#include "kvq_core.h"

double kvq_fixed_to_double(kvq_fixed x) {
    bool negative = x.hi < 0;
    if (negative) { // two's complement, so that the two halves have the same sign and add without cancellation
        x.lo = ~x.lo + 1u;
        x.hi = (int64_t)(~(uint64_t)x.hi + (x.lo == 0 ? 1u : 0u));
    }
    double magnitude = (double)(uint64_t)x.hi * 0x1p-32 + (double)x.lo * 0x1p-96;
    return negative ? -magnitude : magnitude;
}
