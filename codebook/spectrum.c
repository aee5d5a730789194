// SPDX-License-Identifier: Apache-2.0
//
// Spectra of second moments: in how many directions the keys, values or queries of a head really move.
#include <dlfcn.h>
#include <lapacke.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "codebook_impl.h"

// LAPACK sees columns where we see rows: the upper triangle by columns is the lower one by rows, and eigenvectors, its
// columns, are our rows. The form with the caller's workspace is used because the other one reads the environment.
#define LAYOUT   LAPACK_COL_MAJOR
#define TRIANGLE 'U'

typedef struct spectra {
    int             n_heads, n, n_workers;
    char            job;     // LAPACK's: 'V' with vectors, 'N' without
    double         *vectors; // [n_heads, n, n] moments, then eigenvectors
    double         *values;  // [n_heads, n] ascending
    double         *work;    // [n_workers, work_size]
    lapack_int     *iwork;   // [n_workers, iwork_size]
    lapack_int      work_size, iwork_size;
    _Atomic int64_t first_failed; // head, or n_heads
} spectra;

// An OpenBLAS has threads of its own that spin while they wait and obey no OpenMP setting; heads are what is parallel
// here.
void codebook_keep_lapack_to_one_thread(void) {
    void *program = dlopen(NULL, RTLD_LAZY);
    void *found = program != NULL ? dlsym(program, "openblas_set_num_threads") : NULL;
    void (*set_threads)(int);
    if (found != NULL) {
        memcpy(&set_threads, &found, sizeof set_threads); // ISO C has no conversion, POSIX says that it is the same
        set_threads(1);
    }
    if (program != NULL) (void)dlclose(program);
}

static void decompose(void *user, int64_t head, int worker) {
    spectra   *s = user;
    lapack_int n = (lapack_int)s->n;
    lapack_int info = LAPACKE_dsyevd_work(LAYOUT, s->job, TRIANGLE, n, s->vectors + head * n * n, n,
                                          s->values + head * n, s->work + (int64_t)worker * s->work_size, s->work_size,
                                          s->iwork + (int64_t)worker * s->iwork_size, s->iwork_size);
    if (info != 0) codebook_note_failure(&s->first_failed, head);
}

static kvq_status check_moments(const double *moments, int n_heads, int n, kvq_error *err) {
    if (n_heads < 0 || n < 1 || n > INT16_MAX) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "moments of %d heads of %d channels", n_heads, n);
    }
    for (int64_t i = 0; i < (int64_t)n_heads * n * n; i++) {
        if (isfinite(moments[i])) continue;
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "head %lld: the moment of channels %lld and %lld is %g",
                        (long long)(i / n / n), (long long)(i / n % n), (long long)(i % n), moments[i]);
    }
    return KVQ_OK;
}

static kvq_status allocate(const kvq_context *ctx, spectra *s, kvq_error *err) {
    double     work_size;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)s->n_heads * s->n * s->n, "eigenvectors", &s->vectors, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)s->n_heads * s->n, "eigenvalues", &s->values, err));
    if (LAPACKE_dsyevd_work(LAYOUT, s->job, TRIANGLE, s->n, NULL, s->n, NULL, &work_size, -1, &s->iwork_size, -1) != 0)
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "dsyevd of %d channels gives no size of its workspace", s->n));
    s->work_size = (lapack_int)work_size;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)s->n_workers * s->work_size, "workspace of LAPACK", &s->work, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)s->n_workers * s->iwork_size, "workspace of LAPACK", &s->iwork, err));
done:
    return status;
}

// Copies a vector [n] with the sign that makes its largest component, the first of them, positive.
static void copy_signed(const double *vector, int n, double *out) {
    int largest = 0;
    for (int c = 1; c < n; c++) largest = fabs(vector[c]) > fabs(vector[largest]) ? c : largest;
    double sign = vector[largest] < 0 ? -1 : 1;
    for (int c = 0; c < n; c++) out[c] = sign * vector[c];
}

static void give_descending(const spectra *s, double *values, double *vectors) {
    for (int64_t head = 0; head < s->n_heads; head++) {
        for (int64_t i = 0; i < s->n; i++) {
            int64_t from = head * s->n + s->n - 1 - i, to = head * s->n + i;
            values[to] = s->values[from];
            if (vectors != NULL) copy_signed(s->vectors + from * s->n, s->n, vectors + to * s->n);
        }
    }
}

kvq_status kvq_spectrum(const kvq_context *ctx, const double *moments, int n_heads, int head_dim, double *values,
                        double *vectors, kvq_error *err) {
    spectra    s = {.n_heads = n_heads, .n = head_dim, .job = vectors != NULL ? 'V' : 'N', .first_failed = n_heads};
    kvq_status status = KVQ_OK;
    KVQ_TRY(check_moments(moments, n_heads, head_dim, err));
    s.n_workers = ctx->n_threads < n_heads ? ctx->n_threads : n_heads;
    KVQ_TRY(allocate(ctx, &s, err));
    memcpy(s.vectors, moments, (size_t)n_heads * (size_t)head_dim * (size_t)head_dim * sizeof *moments);
    codebook_keep_lapack_to_one_thread();
    kvq_parallel_for(ctx, n_heads, decompose, &s);
    int64_t failed = atomic_load(&s.first_failed);
    if (failed < n_heads) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "head %lld: the eigenvalues of its moments do not converge",
                         (long long)failed));
    }
    give_descending(&s, values, vectors);
done:
    kvq_free(ctx, s.iwork);
    kvq_free(ctx, s.work);
    kvq_free(ctx, s.values);
    kvq_free(ctx, s.vectors);
    return status;
}

double kvq_effective_rank(const double *values, int n) {
    double largest = 0, sum = 0, entropy = 0;
    for (int i = 0; i < n; i++) largest = fmax(largest, values[i]);
    if (!(largest > 0)) return 0;
    for (int i = 0; i < n; i++) sum += fmax(values[i] / largest, 0); // of the largest, so that no sum overflows
    for (int i = 0; i < n; i++) {
        double share = values[i] > 0 ? values[i] / largest / sum : 0;
        if (share > 0) entropy -= share * log(share);
    }
    return fmin(fmax(exp(entropy), 1), n); // rounding must not leave the range
}
