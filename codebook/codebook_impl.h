// SPDX-License-Identifier: Apache-2.0
//
// Private to the folder: what counting, fit and k-means share.
#ifndef KVQ_CODEBOOK_IMPL_H
#define KVQ_CODEBOOK_IMPL_H

#include "kvq_codebook.h"

#define CODEBOOK_BIN_WIDTH (2.0 / KVQ_HISTOGRAM_BINS)
static inline double codebook_bin_edge(int64_t bin) { return (double)bin * CODEBOOK_BIN_WIDTH - 1; }

// sum w (x - nearest level)^2 over n ascending points and k ascending levels.
double codebook_cost(const kvq_weighted_point *points, int64_t n, const double *levels, int k);

// What kvq_histogram_add leaves to the one who counts: whether all weights are in the range of the sums (if not, *bad is
// the first that is not), the square of an element whatever became of it, and how far beyond the range of half width
// sqrt(r2) a clipped one lies, in units of that.
bool histogram_weights_fit(const kvq_histogram *h, const double weights[KVQ_N_WEIGHTINGS], double *bad);
void histogram_add_energy(kvq_histogram *h, double x);
void histogram_add_clipped(kvq_histogram *h, bool above, double beyond, double r2);

#endif
