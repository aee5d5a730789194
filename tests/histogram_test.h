// SPDX-License-Identifier: Apache-2.0
// Private to the suites of counting and fitting: histograms of every weighting, and elements that all weigh the same in
// each.
#ifndef KVQ_HISTOGRAM_TEST_H
#define KVQ_HISTOGRAM_TEST_H

#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

static inline double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(21, KVQ_RNG_TEST, stream, (uint64_t)index);
}

static inline kvq_histogram *new_histogram(void) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_histogram *h = NULL;
    kvq_test_ok(kvq_histogram_create(&ctx, KVQ_WEIGHTINGS_ALL, &h, &err), &err);
    return h;
}

static inline void drop(kvq_histogram **h) {
    kvq_context ctx = kvq_test_context();
    kvq_histogram_destroy(&ctx, h);
    ck_assert_ptr_null(*h);
}

// An element of half range 1, so that the scaled weights are the plain ones.
static inline void add(kvq_histogram *h, float x, double weight) {
    const double *const weights[KVQ_N_WEIGHTINGS] = {NULL, &weight, &weight, NULL};
    kvq_histogram_add(h, &x, weights, 1);
}

static inline kvq_distribution *distribution_of(const kvq_histogram *h) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_distribution *d = NULL;
    kvq_test_ok(kvq_distributions_create(&ctx, KVQ_WEIGHTINGS_ALL, 1, &d, &err), &err);
    kvq_test_ok(kvq_distribution_take(h, d, &err), &err);
    return d;
}

#endif
