// SPDX-License-Identifier: Apache-2.0
//
// Stands in for LAPACKE in the device suites, whose heads all have a Hadamard matrix (codebook/rotation.c), so that
// nobody asks LAPACK for a random one. Whoever does is told that it failed. Only run.sh gives this path.
#ifndef KVQ_DEVICE_LAPACKE_H
#define KVQ_DEVICE_LAPACKE_H

typedef int lapack_int;
enum { LAPACK_COL_MAJOR = 102 };

static inline lapack_int LAPACKE_dgeqrf_work(int order, lapack_int m, lapack_int n, double *a, lapack_int lda,
                                             double *tau, double *work, lapack_int size) {
    (void)order, (void)m, (void)n, (void)a, (void)lda, (void)tau, (void)work, (void)size;
    return -1;
}

static inline lapack_int LAPACKE_dorgqr_work(int order, lapack_int m, lapack_int n, lapack_int k, double *a,
                                             lapack_int lda, const double *tau, double *work, lapack_int size) {
    (void)order, (void)m, (void)n, (void)k, (void)a, (void)lda, (void)tau, (void)work, (void)size;
    return -1;
}

#endif
