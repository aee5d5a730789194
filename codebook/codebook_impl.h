// SPDX-License-Identifier: Apache-2.0
//
// Private to the folder: what counting, fit and k-means share.
#ifndef KVQ_CODEBOOK_IMPL_H
#define KVQ_CODEBOOK_IMPL_H

#include "kvq_codebook.h"

#define CODEBOOK_BIN_WIDTH (2.0 / KVQ_HISTOGRAM_BINS)
static inline double codebook_bin_edge(int64_t bin) { return (double)bin * CODEBOOK_BIN_WIDTH - 1; }

// What sums are in units of, and where squares of weights go.
#define CODEBOOK_SMALL_WEIGHT      0x1p-27 // squares of smaller ones go to w2_small, scaled ...
#define CODEBOOK_SMALL_SQUARE_UNIT 0x1p-45 // ... so that 2^40 of them still fit and 2^-60 is resolved to six digits
#define CODEBOOK_SQUARE_UNIT       0x1p-20 // of r^2 and x^2: keys of some models reach hundreds, and they add up
static inline double codebook_weight_unit(kvq_weighting w) { return w == KVQ_WEIGHT_RANGE ? CODEBOOK_SQUARE_UNIT : 1; }

// Sums of what cannot be negative: a negative one means that the range was left, for one addition reaches at most the
// sign bit. It stays negative from then on, whatever is added, and whoever reads it refuses it.
static inline void codebook_add_positive(kvq_fixed *sum, kvq_fixed x) {
    if (sum->hi < 0 || x.hi < 0) {
        sum->hi = INT64_MIN;
    } else {
        kvq_fixed_merge(sum, x);
    }
}

// sum w (x - nearest level)^2 over n ascending points and k ascending levels.
double codebook_cost(const kvq_weighted_point *points, int64_t n, const double *levels, int k);

// What kvq_histogram_add leaves to the one who counts: whether a weight is in the range of the sums, the squares
// of elements x [n] whatever became of them, and how far beyond the range of half width sqrt(r2) one lies, in
// units of that.
bool histogram_weight_fits(kvq_weighting by, double weight);
void histogram_add_energy(kvq_histogram *h, const float *x, int64_t n);
void histogram_add_beyond(kvq_histogram *h, bool above, double beyond, double r2);

#endif
