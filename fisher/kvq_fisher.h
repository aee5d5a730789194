// SPDX-License-Identifier: Apache-2.0
//
// From gradients to element weights. The empirical Fisher diagonal of an activation element is the squared gradient of
// the loss with respect to it (KVQuant, arXiv 2401.18079, section 3.2); whether it is multiplied by the squared range
// is a choice of the fit (KVQ_WEIGHT_FISHER_SCALED, Eq. 7 there) and applied where the range is known.
// Pure arithmetic; knows no files.
#ifndef KVQ_FISHER_H
#define KVQ_FISHER_H

#include "kvq_core.h"

#ifdef __cplusplus
extern "C" {
#endif

// weights [n] = gradient^2, each product rounded to f32. In place is allowed.
void kvq_fisher_diagonal(const float *gradient, int64_t n, float *weights);

#ifdef __cplusplus
}
#endif
#endif
