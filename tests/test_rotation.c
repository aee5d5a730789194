// SPDX-License-Identifier: Apache-2.0
// The rotation of values, and the exponent of their scales.
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

static const char *make(kvq_rotation_kind wanted, int n, int n_threads, float *rotation) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    const char *kind = NULL;
    ctx.n_threads = n_threads;
    kvq_test_ok(kvq_make_rotation(&ctx, wanted, n, rotation, &kind, &err), &err);
    return kind;
}

static double dot(const float *a, const float *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static int signs_in_common(const float *a, const float *b, int n) {
    int common = 0;
    for (int i = 0; i < n; i++) common += (a[i] > 0) == (b[i] > 0);
    return common;
}

static void expect_orthogonal(const float *rotation, int n, double tolerance) {
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++) {
            double expected = i == j;
            ck_assert_double_eq_tol(dot(rotation + i * n, rotation + j * n, n), expected, tolerance);
        }
    }
}

// Square root and quotient are each off by 2^-24 relative at most, so a squared entry by 2^-22 and hardly more; n of
// them add up to 1. Different rows agree in exactly half of their signs.
START_TEST(hadamard_rotations) {
    static const int ORDERS[] = {2, 8, 12, 20, 24, 40, 48, 64, 80, 96, 128, 160, 256, 512};
    static float     rotation[512 * 512], again[512 * 512];
    for (size_t k = 0; k < sizeof ORDERS / sizeof *ORDERS; k++) {
        int   n = ORDERS[k];
        float entry = 1.0f / sqrtf((float)n);
        ck_assert_str_eq(make(KVQ_ROTATION_ORTHOGONAL, n, 1, rotation), "hadamard");
        for (int i = 0; i < n * n; i++) ck_assert(fabsf(rotation[i]) == entry);
        expect_orthogonal(rotation, n, 0x1p-21);
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < i; j++) ck_assert_int_eq(signs_in_common(rotation + i * n, rotation + j * n, n), n / 2);
        }
        (void)make(KVQ_ROTATION_ORTHOGONAL, n, 3, again);
        ck_assert_mem_eq(rotation, again, (size_t)(n * n) * sizeof *rotation);
    }
}
END_TEST

// Sylvester's doubling, down to the smallest matrices: of order 1, and of Paley's, whose first row is positive and
// whose sum with its transpose is twice the identity.
START_TEST(hadamard_rotations_are_doublings) {
    static const int ORDERS[] = {1, 2, 4, 8, 32, 64, 12, 24, 48, 20, 40};
    static float     half[64 * 64], whole[128 * 128];
    half[0] = 1;
    for (size_t k = 0; k < sizeof ORDERS / sizeof *ORDERS; k++) {
        int n = ORDERS[k];
        if (n > 1) (void)make(KVQ_ROTATION_ORTHOGONAL, n, 1, half);
        (void)make(KVQ_ROTATION_ORTHOGONAL, 2 * n, 1, whole);
        for (int i = 0; i < 4 * n * n; i++) {
            int  row = i / (2 * n), column = i % (2 * n);
            bool flipped = row >= n && column >= n;
            ck_assert(((whole[i] > 0) != flipped) == (half[row % n * n + column % n] > 0));
        }
        for (int i = 0; i < n * n && (n == 12 || n == 20); i++)
            ck_assert(half[i % n] > 0 && (half[i] > 0) == (i / n == i % n || half[i % n * n + i / n] < 0));
    }
}
END_TEST

static double random_normal(int64_t i) {
    double u = kvq_rng_uniform(0, KVQ_RNG_ROTATION, 0, (uint64_t)i);
    return sqrt(-2 * log(1 - u)) * cos(2 * acos(-1) * kvq_rng_uniform(0, KVQ_RNG_ROTATION, 1, (uint64_t)i));
}

// Each entry is off by 2^-24 relative, so a product of two rows by 2^-23 (their entries' products add up to 1 at most);
// LAPACK in f64 adds nothing to speak of. With a positive diagonal every row leans towards the one it was made of, and
// the first has its direction.
START_TEST(random_rotations) {
    static const int ORDERS[] = {3, 72, 112, 7};
    static float     rotation[112 * 112], again[112 * 112];
    for (size_t k = 0; k < sizeof ORDERS / sizeof *ORDERS; k++) {
        int n = ORDERS[k];
        ck_assert_str_eq(make(KVQ_ROTATION_ORTHOGONAL, n, 1, rotation), "random");
        expect_orthogonal(rotation, n, 0x1p-22);
        (void)make(KVQ_ROTATION_ORTHOGONAL, n, 3, again);
        ck_assert_mem_eq(rotation, again, (size_t)(n * n) * sizeof *rotation);
        double length = 0, along = 0;
        for (int i = 0; i < n; i++) {
            along = 0;
            for (int j = 0; j < n; j++) along += random_normal((int64_t)i * n + j) * (double)rotation[i * n + j];
            ck_assert(along > 0);
        }
        for (int j = 0; j < n; j++) length += random_normal(j) * random_normal(j);
        for (int j = 0; j < n; j++)
            ck_assert_double_eq_tol((double)rotation[j], random_normal(j) / sqrt(length), 0x1p-24);
    }
}
END_TEST

START_TEST(no_rotation_and_no_such_rotation) {
    float       rotation[9] = {7, 7, 7, 7, 7, 7, 7, 7, 7};
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    const char *kind = "untouched";
    kvq_test_failed(kvq_make_rotation(&ctx, KVQ_ROTATION_ORTHOGONAL, 1, rotation, &kind, &err), KVQ_ERR_UNSUPPORTED,
                    &err, "heads of 1 channels");
    kvq_test_failed(kvq_make_rotation(&ctx, KVQ_ROTATION_NONE, 513, rotation, &kind, &err), KVQ_ERR_UNSUPPORTED, &err,
                    "heads of 513 channels; tiles are made of 2 to 512");
    ck_assert_str_eq(kind, "untouched");
    ck_assert_str_eq(make(KVQ_ROTATION_NONE, 3, 1, rotation), "none");
    for (int i = 0; i < 9; i++) ck_assert(rotation[i] == (i % 4 == 0 ? 1.0f : 0.0f));
    ck_assert_str_eq(kvq_rotation_names[KVQ_ROTATION_ORTHOGONAL], "orthogonal");
    ck_assert_str_eq(kvq_rotation_names[KVQ_ROTATION_NONE], "none");
}
END_TEST

START_TEST(scale_exponents_are_nearest) {
    static const struct {
        double mean_square;
        int    exponent;
    } EXAMPLES[] = {{0, 0},
                    {1, 0},
                    {4, 1},
                    {16, 2},
                    {0.25, -1},
                    {1.999, 0},
                    {2, 1},
                    {7.99, 1},
                    {8, 2},
                    {0.5, 0},
                    {0.499, -1},
                    {0.125, -1},
                    {0.124, -2},
                    {1e-90, -100},
                    {1e90, 100},
                    {-1, 0},
                    {(double)INFINITY, 0},
                    {(double)NAN, 0}};
    for (size_t i = 0; i < sizeof EXAMPLES / sizeof *EXAMPLES; i++)
        ck_assert_int_eq(kvq_scale_exponent(EXAMPLES[i].mean_square), EXAMPLES[i].exponent);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(hadamard_rotations),
    KVQ_CASE(hadamard_rotations_are_doublings),
    KVQ_CASE(random_rotations),
    KVQ_CASE(no_rotation_and_no_such_rotation),
    KVQ_CASE(scale_exponents_are_nearest),
};
KVQ_TEST_MAIN("rotation", CASES)
