// SPDX-License-Identifier: Apache-2.0
//
// Private to the folder: what the fit shares with the k-means.
#ifndef KVQ_CODEBOOK_IMPL_H
#define KVQ_CODEBOOK_IMPL_H

#include "kvq_codebook.h"

// sum w (x - nearest level)^2 over n ascending points and k ascending levels.
double codebook_cost(const kvq_weighted_point *points, int64_t n, const double *levels, int k);

#endif
