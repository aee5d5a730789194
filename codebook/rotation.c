// SPDX-License-Identifier: Apache-2.0
//
// The rotation of values. A Hadamard matrix spreads every channel evenly over all others and needs no random numbers;
// where none is made here, a random orthogonal matrix does nearly as well.
#include <lapacke.h>
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

const char *const kvq_rotation_names[] = {"orthogonal", "none", NULL};

// ---------------------------------------------------------------- Hadamard

// Orders whose doublings are used: Paley's construction gives q + 1 for a prime q = 3 mod 4. 0: the matrix (1).
static const struct { int order, prime; } BASES[] = {{1, 0}, {12, 11}, {20, 19}};
enum { N_BASES = sizeof BASES / sizeof *BASES };

static int find_base(int n) {
    for (int b = 0; b < N_BASES; b++) {
        int doublings = n / BASES[b].order;
        if (n % BASES[b].order == 0 && (doublings & (doublings - 1)) == 0) return b;
    }
    return -1;
}

// 1 for a nonzero square modulo a prime, -1 for what is none, 0 for 0.
static int quadratic_character(int a, int prime) {
    int x = (a % prime + prime) % prime;
    for (int root = 1; root < prime; root++) {
        if (root * root % prime == x) return x == 0 ? 0 : 1;
    }
    return x == 0 ? 0 : -1;
}

// Paley's first construction: I + S, S skew, bordered by ones, with the characters of differences inside.
static int paley_sign(int i, int j, int prime) {
    if (i == j) return 1;
    if (i == 0 || j == 0) return i == 0 ? 1 : -1;
    return quadratic_character(i - j, prime);
}

static int parity(unsigned bits) {
    int odd = 0;
    for (; bits != 0; bits &= bits - 1) odd ^= 1;
    return odd;
}

// Each doubling of H to (H H; H -H) is one more binary digit in front of both indices.
static void make_hadamard(int base, int n, float *rotation) {
    int   order = BASES[base].order, prime = BASES[base].prime;
    float entry = 1.0f / sqrtf((float)n);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            int sign = prime > 0 ? paley_sign(i % order, j % order, prime) : 1;
            if (parity((unsigned)(i / order) & (unsigned)(j / order)) != 0) sign = -sign;
            rotation[(int64_t)i * n + j] = sign > 0 ? entry : -entry;
        }
    }
}

// ---------------------------------------------------------------- random

// Box and Muller's transform; 1 - u keeps the logarithm finite.
static double normal(uint64_t index) {
    static const double TWO_PI = 6.283185307179586;
    double              u = kvq_rng_uniform(0, KVQ_RNG_ROTATION, 0, index);
    return sqrt(-2 * log(1 - u)) * cos(TWO_PI * kvq_rng_uniform(0, KVQ_RNG_ROTATION, 1, index));
}

// LAPACK's columns are our rows. The form with the caller's workspace is used because the other one reads the
// environment.
static lapack_int factorise(lapack_int n, double *a, double *tau, double *diagonal, double *work, lapack_int size) {
    lapack_int info = LAPACKE_dgeqrf_work(LAPACK_COL_MAJOR, n, n, a, n, tau, work, size);
    for (lapack_int i = 0; i < n; i++) diagonal[i] = a[(int64_t)i * n + i];
    return info != 0 ? info : LAPACKE_dorgqr_work(LAPACK_COL_MAJOR, n, n, n, a, n, tau, work, size);
}

static lapack_int workspace_size(lapack_int n) {
    double qr = 0, q = 0, dummy = 0;
    if (LAPACKE_dgeqrf_work(LAPACK_COL_MAJOR, n, n, &dummy, n, &dummy, &qr, -1) != 0 ||
        LAPACKE_dorgqr_work(LAPACK_COL_MAJOR, n, n, n, &dummy, n, &dummy, &q, -1) != 0)
        return -1;
    return (lapack_int)fmax(qr, q);
}

static kvq_status make_random(const kvq_context *ctx, int n, float *rotation, kvq_error *err) {
    double    *a = NULL, *vectors = NULL, *work = NULL;
    lapack_int size = workspace_size(n);
    kvq_status status = KVQ_OK;
    if (size < 1) KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "QR of %d channels has no size of its workspace", n));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)n * n, "random rotation", &a, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * (int64_t)n, "random rotation", &vectors, err));
    KVQ_TRY(KVQ_NEW(ctx, size, "workspace of LAPACK", &work, err));
    for (int64_t i = 0; i < (int64_t)n * n; i++) a[i] = normal((uint64_t)i);
    codebook_keep_lapack_to_one_thread();
    if (factorise(n, a, vectors, vectors + n, work, size) != 0)
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "no orthogonal factor of %d random channels", n));
    for (int64_t i = 0; i < n; i++) {
        double sign = vectors[n + i] < 0 ? -1 : 1;
        for (int64_t j = 0; j < n; j++) rotation[i * n + j] = (float)(sign * a[i * n + j]);
    }
done:
    kvq_free(ctx, work);
    kvq_free(ctx, vectors);
    kvq_free(ctx, a);
    return status;
}

// ---------------------------------------------------------------- either

kvq_status kvq_make_rotation(const kvq_context *ctx, kvq_rotation_kind wanted, int head_dim, float *rotation,
                             const char **kind, kvq_error *err) {
    int64_t n = head_dim;
    if (n < 2 || n > KVQ_TILE_MAX_HEAD_DIM) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "heads of %d channels; tiles are made of 2 to %d", head_dim,
                        KVQ_TILE_MAX_HEAD_DIM);
    }
    int         base = wanted == KVQ_ROTATION_NONE ? -1 : find_base(head_dim);
    const char *made = wanted == KVQ_ROTATION_NONE ? "none" : base >= 0 ? "hadamard" : "random";
    if (wanted == KVQ_ROTATION_NONE) {
        memset(rotation, 0, (size_t)(n * n) * sizeof *rotation);
        for (int64_t i = 0; i < n; i++) rotation[i * n + i] = 1;
    } else if (base >= 0) {
        make_hadamard(base, head_dim, rotation);
    } else {
        kvq_status status = make_random(ctx, head_dim, rotation, err);
        if (status != KVQ_OK) return status;
    }
    *kind = made;
    return KVQ_OK;
}
