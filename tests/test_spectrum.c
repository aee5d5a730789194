// SPDX-License-Identifier: Apache-2.0
// Spectra: matrices whose eigenvalues are known, the properties of any decomposition, signs, refusals; effective rank.
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_test.h"

enum { MAX_N = 128 };
static const double PI = 3.14159265358979323846;

// What a backward stable method may be off in units of the largest eigenvalue: a modest multiple of n roundings (LAPACK
// Users' Guide, section 4.7). The multiple of 2 leaves room; losing single digits would be far more.
static double bound(int n, double largest) { return 2 * n * 0x1p-52 * largest; }

static void spectrum(const double *moments, int n_heads, int n, double *values, double *vectors) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_test_ok(kvq_spectrum(&ctx, moments, n_heads, n, values, vectors, &err), &err);
}

// Descending values; orthonormal rows of unique sign; and together they are the matrix.
static void check_decomposition(const double *a, int n, const double *values, const double *vectors) {
    double largest = 0;
    for (int i = 0; i < n; i++) largest = fmax(largest, fabs(values[i]));
    for (int i = 0; i < n; i++) {
        const double *v = vectors + i * n;
        ck_assert(i == 0 || values[i] <= values[i - 1]);
        for (int j = 0; j <= i; j++) {
            double product = 0, sum = 0;
            for (int c = 0; c < n; c++) {
                product += v[c] * vectors[j * n + c];
                sum += vectors[c * n + i] * values[c] * vectors[c * n + j];
            }
            ck_assert_double_eq_tol(product, i == j, bound(n, 1));
            ck_assert_double_eq_tol(sum, a[i * n + j], 1e-300 + 2 * bound(n, largest)); // and n products of ours
        }
        int first = 0;
        for (int c = 0; c < n; c++) first = fabs(v[c]) > fabs(v[first]) ? c : first;
        ck_assert(v[first] > 0);
    }
}

static void check_values(const double *a, int n, const double *expected) {
    static double values[MAX_N], alone[MAX_N], vectors[MAX_N * MAX_N];
    spectrum(a, 1, n, values, vectors);
    check_decomposition(a, n, values, vectors);
    spectrum(a, 1, n, alone, NULL); // by another algorithm of LAPACK
    for (int i = 0; i < n; i++) {
        ck_assert_double_eq_tol(values[i], expected[i], 1e-300 + bound(n, fabs(expected[0])));
        ck_assert_double_eq_tol(alone[i], expected[i], 1e-300 + bound(n, fabs(expected[0])));
    }
}

START_TEST(diagonal_matrices_have_their_diagonal) {
    const double a[16] = {3, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5}, expected[4] = {7, 5, 3, 0};
    double       values[4], vectors[16];
    check_values(a, 4, expected);
    spectrum(a, 1, 4, values, vectors);
    for (int i = 0; i < 4; i++) { // exactly: nothing is there to be rounded
        static const int CHANNEL[] = {1, 3, 0, 2};
        ck_assert(values[i] == expected[i]);
        for (int c = 0; c < 4; c++) ck_assert(vectors[i * 4 + c] == (c == CHANNEL[i]));
    }
}
END_TEST

START_TEST(small_matrices_have_the_values_of_paper) {
    // sum and product of the values, and (1, 1) with (1, -1) as directions
    const double two[4] = {2, -1, -1, 2}, two_values[2] = {3, 1}, one[1] = {-4}, negative[4] = {0, 1, 1, 0};
    const double signs[2] = {1, -1}, zeros[9] = {0};
    double       values[2], vectors[4];
    check_values(two, 2, two_values);
    check_values(one, 1, one);
    check_values(negative, 2, signs);
    check_values(zeros, 3, zeros);
    spectrum(two, 1, 2, values, vectors);
    ck_assert_double_eq_tol(vectors[2], sqrt(0.5), bound(2, 1));
    ck_assert_double_eq_tol(vectors[3], sqrt(0.5), bound(2, 1));
}
END_TEST

// 1 / (i + j + 1): seven decades between its values, computed with 60 digits from the characteristic polynomial.
START_TEST(hilbert_matrices_have_their_known_values) {
    static const double FOUR[] = {1.5002142800592428232, 0.16914122022145003243, 0.0067382736057607479500,
                                  0.0000967023040225868855};
    static const double SIX[] = {1.6188998589243390970,    0.24236087057520955214,   0.016321521319875822124,
                                 0.0006157483541826576976, 0.0000125707571226251949, 1.0827994845655497685e-7};
    double              a[36];
    for (int n = 4; n <= 6; n += 2) {
        for (int i = 0; i < n * n; i++) a[i] = 1.0 / (i / n + i % n + 1);
        check_values(a, n, n == 4 ? FOUR : SIX);
    }
}
END_TEST

// Second differences: 2 - 2 cos(pi k / (n + 1)).
START_TEST(chains_have_cosines) {
    static const int LENGTHS[] = {1, 2, 31, 32, 33, 64, 127, 128};
    static double    a[MAX_N * MAX_N], expected[MAX_N];
    for (size_t k = 0; k < sizeof LENGTHS / sizeof *LENGTHS; k++) {
        int n = LENGTHS[k];
        for (int i = 0; i < n * n; i++) a[i] = i / n == i % n ? 2 : i / n - i % n == 1 || i % n - i / n == 1 ? -1 : 0;
        for (int i = 0; i < n; i++) expected[i] = 2 - 2 * cos(PI * (n - i) / (n + 1));
        check_values(a, n, expected);
    }
}
END_TEST

// A ring has all values but one or two in pairs, 2 + 2 cos(2 pi k / n), and identity has one value only.
START_TEST(equal_values_are_no_trouble) {
    static double a[MAX_N * MAX_N], expected[MAX_N];
    enum { N = 48 };
    for (int i = 0; i < N * N; i++) {
        int distance = (i / N - i % N + N) % N;
        a[i] = distance == 0 ? 2 : distance == 1 || distance == N - 1 ? 1 : 0;
    }
    for (int i = 0; i < N; i++) expected[i] = 2 + 2 * cos(2 * PI * ((i + 1) / 2) / N);
    check_values(a, N, expected);
    for (int i = 0; i < N * N; i++) a[i] = i / N == i % N;
    for (int i = 0; i < N; i++) expected[i] = 1;
    check_values(a, N, expected);
}
END_TEST

static double uniform(uint32_t stream, int i) { return kvq_rng_uniform(3, KVQ_RNG_TEST, stream, (uint64_t)i) - 0.5; }

// Sum over r rows of x x^T.
static void make_moments(uint32_t stream, int n, int r, double *a) {
    memset(a, 0, (size_t)(n * n) * sizeof *a);
    for (int row = 0; row < r; row++) {
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < n; j++) a[i * n + j] += uniform(stream, row * n + i) * uniform(stream, row * n + j);
        }
    }
}

START_TEST(one_direction_has_one_value) {
    static double a[MAX_N * MAX_N], values[MAX_N], vectors[MAX_N * MAX_N];
    double        square = 0;
    make_moments(1, 64, 1, a);
    for (int i = 0; i < 64; i++) square += uniform(1, i) * uniform(1, i);
    spectrum(a, 1, 64, values, vectors);
    check_decomposition(a, 64, values, vectors);
    ck_assert_double_eq_tol(values[0], square, bound(64, square));
    for (int i = 1; i < 64; i++) ck_assert_double_eq_tol(values[i], 0, bound(64, square));
    double sign = vectors[0] * uniform(1, 0) > 0 ? 1 : -1;
    for (int i = 0; i < 64; i++) ck_assert_double_eq_tol(vectors[i], sign * uniform(1, i) / sqrt(square), bound(64, 1));
    ck_assert_double_eq_tol(kvq_effective_rank(values, 64), 1,
                            1e-9); // 63 traces of 2e-16, each 36 times by its entropy
}
END_TEST

// Each head by itself gives the same bits as all together, on any number of threads; only one triangle is read.
START_TEST(heads_do_not_touch_each_other) {
    enum { H = 9, N = 32 };
    static double moments[H * N * N], values[H * N], vectors[H * N * N], again[H * N], again_vectors[H * N * N];
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    for (int h = 0; h < H; h++) make_moments((uint32_t)h, N, 1 + 7 * h, moments + h * N * N);
    spectrum(moments, H, N, values, vectors);
    for (int h = 0; h < H; h++) {
        check_decomposition(moments + h * N * N, N, values + h * N, vectors + h * N * N);
        spectrum(moments + h * N * N, 1, N, again, again_vectors);
        ck_assert(memcmp(again, values + h * N, N * sizeof *again) == 0);
        ck_assert(memcmp(again_vectors, vectors + h * N * N, N * N * sizeof *again) == 0);
    }
    for (int n_threads = 1; n_threads <= 16; n_threads *= 4) {
        ctx.n_threads = n_threads;
        kvq_test_ok(kvq_spectrum(&ctx, moments, H, N, again, again_vectors, &err), &err);
        ck_assert(memcmp(again, values, sizeof values) == 0 && memcmp(again_vectors, vectors, sizeof vectors) == 0);
    }
    spectrum(moments, 0, N, values, vectors); // no heads, nothing to do
}
END_TEST

// The range of f64 is no obstacle.
START_TEST(scale_is_no_trouble) {
    static double    a[16 * 16], values[16], expected[16];
    static const int EXPONENTS[] = {-1000, -600, 600, 1000};
    make_moments(5, 16, 40, a);
    spectrum(a, 1, 16, expected, NULL);
    for (int k = 0; k < 4; k++) {
        double scaled[16 * 16];
        for (int i = 0; i < 16 * 16; i++) scaled[i] = ldexp(a[i], EXPONENTS[k]);
        spectrum(scaled, 1, 16, values, NULL);
        for (int i = 0; i < 16; i++)
            ck_assert_double_eq_tol(ldexp(values[i], -EXPONENTS[k]), expected[i], 2 * bound(16, expected[0]));
        ck_assert_double_eq_tol(kvq_effective_rank(values, 16), kvq_effective_rank(expected, 16), 1e-12 * 16);
    }
}
END_TEST

START_TEST(moments_that_cannot_be_are_refused) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    double      a[18] = {0}, values[6] = {7}, vectors[18] = {7};
    a[9 + 5] = (double)NAN;
    kvq_test_failed(kvq_spectrum(&ctx, a, 2, 3, values, vectors, &err), KVQ_ERR_NUMERICAL, &err,
                    "head 1: the moment of channels 1 and 2 is nan");
    a[9 + 5] = (double)INFINITY;
    kvq_test_failed(kvq_spectrum(&ctx, a, 2, 3, values, NULL, &err), KVQ_ERR_NUMERICAL, &err, "is inf");
    kvq_test_failed(kvq_spectrum(&ctx, a, 2, 0, values, NULL, &err), KVQ_ERR_USAGE, &err, "2 heads of 0 channels");
    kvq_test_failed(kvq_spectrum(&ctx, a, -1, 3, values, NULL, &err), KVQ_ERR_USAGE, &err, "-1 heads");
    ck_assert(values[0] == 7 && vectors[0] == 7);
}
END_TEST

START_TEST(effective_rank_counts_directions) {
    double values[MAX_N];
    for (int n = 1; n <= MAX_N; n++) {
        for (int i = 0; i < n; i++) values[i] = 0.37;
        ck_assert_double_eq_tol(kvq_effective_rank(values, n), n, n * n * 0x1p-50); // log n to n roundings
        ck_assert(kvq_effective_rank(values, n) <= n);
        for (int i = 1; i < n; i++) values[i] = 0;
        ck_assert(kvq_effective_rank(values, n) == 1);
        values[0] = 0;
        ck_assert(kvq_effective_rank(values, n) == 0);
    }
    const double shares[4] = {2, 1, 1, -0.5}, negative[2] = {-1, -2}, large[2] = {1.5e308, 1.5e308};
    ck_assert_double_eq_tol(kvq_effective_rank(shares, 4), sqrt(8),
                            1e-14); // 1.5 bits; the negative one is no direction
    ck_assert(kvq_effective_rank(negative, 2) == 0 && kvq_effective_rank(negative, 0) == 0);
    ck_assert_double_eq_tol(kvq_effective_rank(large, 2), 2, 1e-14);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(diagonal_matrices_have_their_diagonal),
    KVQ_CASE(small_matrices_have_the_values_of_paper),
    KVQ_CASE(hilbert_matrices_have_their_known_values),
    KVQ_CASE(chains_have_cosines),
    KVQ_CASE(equal_values_are_no_trouble),
    KVQ_CASE(one_direction_has_one_value),
    KVQ_CASE(heads_do_not_touch_each_other),
    KVQ_CASE(scale_is_no_trouble),
    KVQ_CASE(moments_that_cannot_be_are_refused),
    KVQ_CASE(effective_rank_counts_directions),
};
KVQ_TEST_MAIN("spectrum", CASES)
