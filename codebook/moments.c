// SPDX-License-Identifier: Apache-2.0
//
// Second moments of heads. The products of one window are summed in f64 in the order of its rows, by one thread for a
// head; the windows' means are added in fixed point. So the result depends on neither threads nor the order of windows.
#include <string.h>

#include "kvq_codebook.h"

typedef struct moment_job {
    const float *x;
    int64_t      n_rows;
    int          n_heads, head_dim;
    kvq_fixed   *sums;
    double      *scratch;
} moment_job;

int64_t kvq_moments_scratch_doubles(int n_heads, int head_dim) {
    return (int64_t)n_heads * ((int64_t)head_dim * head_dim + head_dim);
}

// Only the triangle below the diagonal is computed.
static void add_head(void *user, int64_t head, int worker) {
    const moment_job *job = user;
    int64_t           D = job->head_dim, width = job->n_heads * D;
    double           *products = job->scratch + head * (D * D + D), *row = products + D * D;
    (void)worker;
    memset(products, 0, (size_t)(D * D) * sizeof *products);
    for (int64_t t = 0; t < job->n_rows; t++) {
        for (int64_t i = 0; i < D; i++) row[i] = (double)job->x[t * width + head * D + i];
        for (int64_t i = 0; i < D; i++) {
            double *to = products + i * D, xi = row[i];
            for (int64_t j = 0; j <= i; j++) to[j] += xi * row[j];
        }
    }
    for (int64_t i = 0; i < D; i++) {
        for (int64_t j = 0; j <= i; j++)
            kvq_fixed_add(&job->sums[head * D * D + i * D + j], products[i * D + j] / (double)job->n_rows);
    }
}

void kvq_moments_add(const kvq_context *ctx, const float *x, int64_t n_rows, int n_heads, int head_dim, kvq_fixed *sums,
                     double *scratch) {
    moment_job job = {x, n_rows, n_heads, head_dim, sums, scratch};
    if (n_rows > 0) kvq_parallel_for(ctx, n_heads, add_head, &job);
}

void kvq_moments_finish(const kvq_fixed *sums, int64_t n_windows, int n_heads, int head_dim, double *moments) {
    int64_t D = head_dim;
    for (int64_t h = 0; h < n_heads; h++) {
        for (int64_t i = 0; i < D; i++) {
            for (int64_t j = 0; j <= i; j++) {
                double value = kvq_fixed_to_double(sums[h * D * D + i * D + j]) / (double)n_windows;
                moments[h * D * D + i * D + j] = moments[h * D * D + j * D + i] = value;
            }
        }
    }
}
