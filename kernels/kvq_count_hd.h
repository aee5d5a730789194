// SPDX-License-Identifier: Apache-2.0
//
// The one definition of how an element of K or V is counted: where its normalised value falls, what it weighs, and what
// is added to which sum. The host (codebook/count.c, which takes elements by the chunk) and devices (cuda/count.cu)
// compile this text. Everything is added in fixed point, so who counts, and in which order, leaves no trace.
#ifndef KVQ_COUNT_HD_H
#define KVQ_COUNT_HD_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>

#include "kvq_block_hd.h"
#include "kvq_fixed_hd.h"

// ---------------------------------------------------------------- weights

// Element weights of a fit. Fisher information is the squared gradient g^2; r is the half range of the element's
// channel or token, and turns an error in normalised units into one in the tensor's.
typedef enum kvq_weighting {
    KVQ_WEIGHT_NONE,          // 1
    KVQ_WEIGHT_FISHER,        // g^2: what the public code of KVQuant does
    KVQ_WEIGHT_FISHER_SCALED, // g^2 r^2: Eq. 7 of the paper
    KVQ_WEIGHT_RANGE,         // r^2: plain squared error in the tensor's own units
    KVQ_N_WEIGHTINGS
} kvq_weighting;
KVQ_HD bool kvq_weighting_needs_gradients(kvq_weighting w) {
    return w == KVQ_WEIGHT_FISHER || w == KVQ_WEIGHT_FISHER_SCALED;
}

// A set of weightings, as bits 1 << weighting. `none` and `range` are always counted: the error reports need them.
typedef unsigned kvq_weighting_set;
#define KVQ_WEIGHTINGS_BASIC (1u << KVQ_WEIGHT_NONE | 1u << KVQ_WEIGHT_RANGE)
#define KVQ_WEIGHTINGS_ALL   ((1u << KVQ_N_WEIGHTINGS) - 1u)
KVQ_HD bool kvq_weightings_have(kvq_weighting_set set, kvq_weighting w) { return (set >> w & 1u) != 0; }
KVQ_HD bool kvq_weightings_need_gradients(kvq_weighting_set set) {
    return kvq_weightings_have(set, KVQ_WEIGHT_FISHER) || kvq_weightings_have(set, KVQ_WEIGHT_FISHER_SCALED);
}

// Fisher information of an element, rounded to f32.
KVQ_HD float kvq_count_squared_gradient(float gradient) { return gradient * gradient; }
KVQ_HD bool  kvq_count_gradient_fits(double squared) { return squared >= 0 && squared <= (double)FLT_MAX; }

KVQ_HD double kvq_count_weight(kvq_weighting by, double squared_gradient, double r) {
    double weight = kvq_weighting_needs_gradients(by) ? squared_gradient : 1;
    return by == KVQ_WEIGHT_FISHER_SCALED || by == KVQ_WEIGHT_RANGE ? weight * r * r : weight;
}

// What sums are in units of. Squares of ranges and elements: keys of some models reach hundreds, and they add up.
#define KVQ_COUNT_SQUARE_UNIT 0x1p-20
KVQ_HD double kvq_count_unit(kvq_weighting by) { return by == KVQ_WEIGHT_RANGE ? KVQ_COUNT_SQUARE_UNIT : 1; }

// A bin then holds 2^16 of the largest weights.
KVQ_HD bool kvq_count_weight_fits(kvq_weighting by, double weight) { return weight * kvq_count_unit(by) < 0x1p15; }

// Squares of weights in their units. Those of small weights are added by themselves, scaled, so that 2^40 of them still
// fit and 2^-60 is resolved to six digits.
#define KVQ_COUNT_SMALL_WEIGHT      0x1p-27
#define KVQ_COUNT_SMALL_SQUARE_UNIT 0x1p-45
KVQ_HD double kvq_count_large_square(double w) { return w < KVQ_COUNT_SMALL_WEIGHT ? 0 : w * w; }
KVQ_HD double kvq_count_small_square(double w) {
    return w < KVQ_COUNT_SMALL_WEIGHT ? w * w / KVQ_COUNT_SMALL_SQUARE_UNIT : 0;
}

// ---------------------------------------------------------------- positions

// What a normalised element can be besides a finite number; a quotient never looks like one of these.
#define KVQ_COUNT_APART    HUGE_VALF    // an outlier
#define KVQ_COUNT_CONSTANT (-HUGE_VALF) // of a channel or token without a range

// A quotient beyond f32 is clipped to it: an outlier or beyond its range like any other.
KVQ_HD float kvq_count_quotient(float x, float z, float r) {
    float quotient = (x - z) / r;
    return quotient > FLT_MAX ? FLT_MAX : quotient < -FLT_MAX ? -FLT_MAX : quotient;
}
KVQ_HD float kvq_count_normalise(float x, float z, float r) {
    return r > 0 ? kvq_count_quotient(x, z, r) : KVQ_COUNT_CONSTANT;
}

// To [-1, 1] by the bits, whose order is that of magnitudes: with comparisons of floats a loop would not vectorise,
// since they may trap.
KVQ_HD float kvq_count_clip(float x) {
    uint32_t bits = kvq_bits_of_float(x), magnitude = bits & INT32_MAX, one = 0x3f800000u;
    return kvq_float_of_bits((bits & ~(uint32_t)INT32_MAX) | (magnitude < one ? magnitude : one));
}

#define KVQ_HISTOGRAM_BINS 8192 // over [-1, 1]; what lies outside is clipped to the edges of the end bins

// x * 2^12 is exact in f32, and so is what floor leaves of it.
KVQ_HD int kvq_count_bin(float clipped) {
    int bin = (int)floorf(clipped * (KVQ_HISTOGRAM_BINS / 2)) + KVQ_HISTOGRAM_BINS / 2;
    return bin < KVQ_HISTOGRAM_BINS ? bin : KVQ_HISTOGRAM_BINS - 1;
}

// An element beyond a channel's range loses what lies there. The range of a token is that of the elements themselves,
// which only its rounding to f16 can put outside.
KVQ_HD bool   kvq_count_is_beyond(float normalised) { return fabsf(normalised) > 1; }
KVQ_HD double kvq_count_beyond(float normalised) { return fabs((double)normalised) - 1; }
KVQ_HD bool   kvq_count_is_clipped(float normalised) { return fabsf(normalised) > KVQ_OUTLIER_EDGE; } // of channels

// Terms of what is counted in the tensor's units: of x^2, and of r^2 times the first and second power of `beyond`.
KVQ_HD double kvq_count_energy(float x) { return (double)x * (double)x * KVQ_COUNT_SQUARE_UNIT; }
KVQ_HD double kvq_count_lost(double beyond, double r2) { return beyond * r2 * KVQ_COUNT_SQUARE_UNIT; }
KVQ_HD double kvq_count_lost_square(double beyond, double r2) { return beyond * beyond * r2 * KVQ_COUNT_SQUARE_UNIT; }

// ---------------------------------------------------------------- sums

typedef struct kvq_bin {
    kvq_fixed w, wx; // sum of weights, sum of weight * normalised value
} kvq_bin;

// The sums of one weighting.
typedef struct kvq_weight_sums {
    kvq_bin  *bins;     // [KVQ_HISTOGRAM_BINS], NULL = not counted
    kvq_fixed wxx;      // sum of weight * normalised value^2
    kvq_fixed w2_large; // sum of w^2 over weights of 2^-27 and more, and ...
    kvq_fixed w2_small; // ... of w^2 * 2^45 over smaller ones: Fisher weights span many decades
} kvq_weight_sums;

// Elements by what became of them, and sums over elements in the tensor's units.
typedef struct kvq_element_counts {
    int64_t n_points;   // in the bins
    int64_t n_outliers; // kept apart
    int64_t n_constant; // of a constant channel or token, which decode exactly
    int64_t n_clipped;  // of the points of ranges per channel: outliers for which no slot of their side was left
} kvq_element_counts;

// The elements of one KV head of one tensor at one outlier fraction.
typedef struct kvq_histogram {
    kvq_weight_sums    by[KVQ_N_WEIGHTINGS];
    kvq_element_counts counts;
    kvq_fixed          energy;         // sum of x^2 of all elements
    kvq_fixed          beyond[2];      // sum of r^2 (|x'| - 1) of elements beyond [-1, 1] below and above, and ...
    kvq_fixed          beyond_squared; // ... of r^2 (|x'| - 1)^2: what clipping adds to squared errors
} kvq_histogram;
KVQ_STATIC_ASSERT(sizeof(kvq_bin) == 32 && sizeof(kvq_histogram) % 8 == 0, "devices see both as words of 64 bits");

// The same in one piece of memory, as a device has it: a kvq_histogram, whose pointers mean nothing, and behind it the
// bins of each weighting that is counted, in the order of weightings.
KVQ_HD int64_t kvq_counters_bytes(kvq_weighting_set set) {
    int64_t bytes = (int64_t)sizeof(kvq_histogram);
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++)
        bytes += kvq_weightings_have(set, (kvq_weighting)w) ? KVQ_HISTOGRAM_BINS * (int64_t)sizeof(kvq_bin) : 0;
    return bytes;
}
// Where the bins of a weighting begin, in bytes.
KVQ_HD int64_t kvq_counters_bins(kvq_weighting_set set, kvq_weighting by) {
    return kvq_counters_bytes(set & ((1u << by) - 1u));
}

#endif
