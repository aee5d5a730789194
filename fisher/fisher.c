// SPDX-License-Identifier: Apache-2.0
//
// Squares gradients. One loop, but in a place of its own: other element weights (a forward-only substitute for
// gradients, say) belong beside it.
#include "kvq_fisher.h"

#include "kvq_count_hd.h"

void kvq_fisher_diagonal(const float *gradient, int64_t n, float *weights) {
    for (int64_t i = 0; i < n; i++) weights[i] = kvq_count_squared_gradient(gradient[i]);
}
