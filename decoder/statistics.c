// SPDX-License-Identifier: Apache-2.0
// Means with their errors.
#include <math.h>

#include "kvq_decoder.h"

kvq_mean kvq_mean_of(const double *values, int64_t n) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) mean += values[i] / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (values[i] - mean) * (values[i] - mean);
    return (kvq_mean){mean, n > 1 ? sqrt(squares / (double)(n - 1) / (double)n) : (double)NAN};
}
