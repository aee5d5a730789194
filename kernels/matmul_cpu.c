// SPDX-License-Identifier: Apache-2.0
//
// Linear layers. The product is cut into tiles whose shape depends on the problem alone; each tile is one library call
// (or our own loops, where there is no library) on one thread. Threading the tiles instead of the library makes the
// result independent of the thread count.
#include <string.h>

#include "kernels_impl.h"

#ifdef KVQ_MATMUL_ONEDNN
#include <oneapi/dnnl/dnnl.h>

void kvq_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    dnnl_status_t status =
        dnnl_sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    if (status != dnnl_success) spoil(c, ldc, m, n);
}

const char   *kvq_gemm_prepare(void) { return "onednn"; } // its threads are kept at one by core/parallel.c
#elif defined KVQ_MATMUL_PLAIN
// For machines that have neither library, such as those on which tests/device runs. Rows of b are added up, so that the
// inner loop is one over columns, which a compiler turns into vector code; with b transposed it is a dot product.
static float plain_dot(int64_t k, const float *a, int64_t a_step, const float *b) {
    float sum = 0;
    for (int64_t i = 0; i < k; i++) sum += a[i * a_step] * b[i];
    return sum;
}

static void plain_row(bool transpose_b, int64_t n, int64_t k, float alpha, const float *a, int64_t a_step,
                      const float *b, int64_t ldb, float *c) {
    for (int64_t j = 0; j < n && transpose_b; j++) c[j] += alpha * plain_dot(k, a, a_step, b + j * ldb);
    for (int64_t i = 0; i < k && !transpose_b; i++) {
        float factor = alpha * a[i * a_step];
        for (int64_t j = 0; j < n; j++) c[j] += factor * b[i * ldb + j];
    }
}

void kvq_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    for (int64_t i = 0; i < m; i++) {
        float *row = c + i * ldc;
        for (int64_t j = 0; j < n; j++) row[j] = beta == 0 ? 0 : beta * row[j]; // what is overwritten may be a NaN
        plain_row(transpose_b, n, k, alpha, transpose_a ? a + i : a + i * lda, transpose_a ? lda : 1, b, ldb, row);
    }
}

const char *kvq_gemm_prepare(void) { return "plain"; }
#else
#include <cblas.h>

void kvq_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans,
                (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

// OpenBLAS has threads of its own that follow no OpenMP setting.
const char *kvq_gemm_prepare(void) {
    openblas_set_num_threads(1);
    return "cblas";
}
#endif

// Tall tiles amortise the packing of w, as long as there are enough of them.
static tiling tiles_for(int64_t m, int64_t n) {
    if (m <= FEW_ROWS) return cut_into_tiles(m, n, FEW_ROWS, columns_for_few_rows(n));
    tiling tall = cut_into_tiles(m, n, 512, equal_columns(n, 1024));
    return tall.n_tiles >= 8 ? tall : cut_into_tiles(m, n, 256, equal_columns(n, 4096));
}

typedef struct linear_job {
    const float *x, *w, *bias;
    float       *y;
    int64_t      m, n, k;
    bool         transpose_w; // w is [n, k] rather than [k, n]
    float        beta;
    tiling       tiles;
} linear_job;

static void linear_tile(void *user, int64_t item, int worker) {
    const linear_job *job = user;
    tile              t = tile_of(&job->tiles, job->m, job->n, item);
    const float      *w = job->transpose_w ? job->w + t.column * job->k : job->w + t.column;
    float            *y = job->y + t.row * job->n + t.column;
    (void)worker;
    kvq_gemm(false, job->transpose_w, t.rows, t.columns, job->k, 1.0f, job->x + t.row * job->k, job->k, w,
             job->transpose_w ? job->k : job->n, job->beta, y, job->n);
    if (job->bias == NULL) return;
    for (int64_t i = 0; i < t.rows; i++) {
        for (int64_t j = 0; j < t.columns; j++) y[i * job->n + j] += job->bias[t.column + j];
    }
}

int64_t kvq_weights_floats_cpu(const kvq_backend *be, int64_t n_out, int64_t n_in) {
    (void)be;
    return n_out * n_in;
}

void kvq_upload_weights_cpu(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                            const float *host_from) {
    (void)be;
    memcpy(w + row * n_in, host_from, (size_t)(n_rows * n_in) * sizeof *w);
}

void kvq_linear_cpu(const kvq_backend *be, const float *x, const float *w, const float *bias, float *y, int64_t m,
                    int64_t n_out, int64_t n_in) {
    linear_job job = {x, w, bias, y, m, n_out, n_in, true, 0.0f, tiles_for(m, n_out)};
    kvq_parallel_for(be->ctx, job.tiles.n_tiles, linear_tile, &job);
}

void kvq_linear_backward_cpu(const kvq_backend *be, const float *dy, const float *w, float *dx, int64_t m,
                             int64_t n_out, int64_t n_in, bool accumulate) {
    linear_job job = {dy, w, NULL, dx, m, n_in, n_out, false, accumulate ? 1.0f : 0.0f, tiles_for(m, n_in)};
    kvq_parallel_for(be->ctx, job.tiles.n_tiles, linear_tile, &job);
}
