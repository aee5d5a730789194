// SPDX-License-Identifier: Apache-2.0
//
// Sums that do not depend on the order of their summands, as one text for C and for devices: 128-bit fixed point, two's
// complement. Integer addition is associative, so any thread count or partition gives the same bits. A summand loses
// what lies below 2^-96 (truncated) and must be smaller than 2^31 in magnitude; the sum must stay below 2^31 too.
#ifndef KVQ_FIXED_HD_H
#define KVQ_FIXED_HD_H

#include <math.h>

#include "kvq_hd.h"

#define KVQ_FIXED_LIMIT 0x1p31

typedef struct kvq_fixed {
    uint64_t lo;
    int64_t  hi;
} kvq_fixed;

// Of a number from 0 up. The difference is exact and below 1.
KVQ_HD kvq_fixed kvq_fixed_of_positive(double x) {
    double    scaled = x * 0x1p32;
    uint64_t  whole = (uint64_t)scaled;
    kvq_fixed result;
    result.lo = (uint64_t)((scaled - (double)whole) * 0x1p64);
    result.hi = (int64_t)whole;
    return result;
}

// Of any number. Without branches, so that loops over it vectorise.
KVQ_HD kvq_fixed kvq_fixed_of(double x) {
    kvq_fixed magnitude = kvq_fixed_of_positive(fabs(x)), result;
    uint64_t  flip = x < 0 ? UINT64_MAX : 0, negated = (magnitude.lo ^ flip) - flip;
    result.lo = negated;
    result.hi = (int64_t)(((uint64_t)magnitude.hi ^ flip) + (negated == 0 ? flip & 1u : 0));
    return result;
}

KVQ_HD void kvq_fixed_merge(kvq_fixed *sum, kvq_fixed x) {
    uint64_t lo = sum->lo + x.lo;
    sum->hi = (int64_t)((uint64_t)sum->hi + (uint64_t)x.hi + (lo < x.lo ? 1u : 0u));
    sum->lo = lo;
}

KVQ_HD void kvq_fixed_add(kvq_fixed *sum, double x) { kvq_fixed_merge(sum, kvq_fixed_of(x)); }

// Sums of what cannot be negative: a negative one means that the range was left, for one addition reaches at most the
// sign bit. It stays negative from then on, whatever is added, and whoever reads it refuses it.
KVQ_HD void kvq_fixed_merge_positive(kvq_fixed *sum, kvq_fixed x) {
    if (sum->hi < 0 || x.hi < 0) {
        sum->hi = INT64_MIN;
    } else {
        kvq_fixed_merge(sum, x);
    }
}

// Adds a number from 0 up; one that is too large by itself leaves the range.
KVQ_HD void kvq_fixed_add_positive(kvq_fixed *sum, double x) {
    if (x < KVQ_FIXED_LIMIT)
        kvq_fixed_merge_positive(sum, kvq_fixed_of_positive(x));
    else
        sum->hi = INT64_MIN;
}

#endif
