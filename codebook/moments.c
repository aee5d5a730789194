// SPDX-License-Identifier: Apache-2.0
//
// Second moments of heads. The products of one window are summed in f64 in the order of its rows, by one thread for a
// head; the windows' means are added in fixed point. So the result depends on neither threads nor the order of windows.
//
// Range: means of squares are summed in units of 2^20. A diagonal sum that leaves the range becomes negative and stays
// so; as long as all diagonals are in range, the others are too (|x y| <= (x^2 + y^2) / 2).
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

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

void kvq_moments_merge(kvq_fixed *sum, kvq_fixed x, bool diagonal) {
    if (diagonal)
        kvq_fixed_merge_positive(sum, x);
    else
        kvq_fixed_merge(sum, x);
}

static void add_mean(kvq_fixed *sum, double mean, bool diagonal) {
    kvq_fixed term = {0, 0};
    double    scaled = mean * KVQ_COUNT_SQUARE_UNIT;
    if (fabs(scaled) < 0x1p31)
        kvq_fixed_add(&term, scaled);
    else
        term.hi = INT64_MIN;
    kvq_moments_merge(sum, term, diagonal);
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
            add_mean(&job->sums[head * D * D + i * D + j], products[i * D + j] / (double)job->n_rows, i == j);
    }
}

void kvq_moments_add(const kvq_context *ctx, const float *x, int64_t n_rows, int n_heads, int head_dim, kvq_fixed *sums,
                     double *scratch) {
    moment_job job = {x, n_rows, n_heads, head_dim, sums, scratch};
    if (n_rows > 0) kvq_parallel_for(ctx, n_heads, add_head, &job);
}

kvq_status kvq_moments_finish(const kvq_fixed *sums, int64_t n_windows, int n_heads, int head_dim, double *moments,
                              kvq_error *err) {
    int64_t D = head_dim;
    for (int64_t h = 0; h < n_heads; h++) {
        for (int64_t i = 0; i < D; i++) {
            if (sums[h * D * D + i * D + i].hi < 0) {
                return kvq_fail(err, KVQ_ERR_NUMERICAL, "a damaged checkpoint can be the cause",
                                "head %lld, channel %lld: squares add up to more than 2^51", (long long)h,
                                (long long)i);
            }
            for (int64_t j = 0; j <= i; j++) {
                double mean = kvq_fixed_to_double(sums[h * D * D + i * D + j]) / KVQ_COUNT_SQUARE_UNIT;
                moments[h * D * D + i * D + j] = moments[h * D * D + j * D + i] = mean / (double)n_windows;
            }
        }
    }
    return KVQ_OK;
}
