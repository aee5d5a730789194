// SPDX-License-Identifier: Apache-2.0
//
// Linear layers in f32 and in bf16 against f64. Three references:
// - Whole numbers up to 8 in magnitude are exact in both types and so are their sums below 2^24: results must be equal.
// - A sum of n products in f32 differs from the exact one by at most n * EPS * sum |a b| (Higham, Accuracy and
//   Stability, section 3.1), whatever its order; EPS = 2^-24. For bf16 the factors are the rounded ones, rounded here
//   in another way than the library does it.
// - Rounding to bf16, 8 significant bits, changes a factor by at most 2^-8 of itself, and so a product of two by at
//   most 2 * 2^-8 + 2^-16 of itself.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_kernels.h"
#include "kvq_test.h"

#define EPS              5.9604644775390625e-08
#define ROUNDING         (2 * 0x1p-8 + 0x1p-16)
#define MAX_TEST_THREADS 3

static kvq_context  contexts[MAX_TEST_THREADS + 1];
static kvq_backend *backends[MAX_TEST_THREADS + 1]; // [i] runs on i threads; 0 is not used

static void open_backends(kvq_compute compute) {
    kvq_error err;
    for (int i = 1; i <= MAX_TEST_THREADS; i++) {
        contexts[i] = kvq_test_context();
        contexts[i].n_threads = i;
        kvq_test_ok(kvq_backend_cpu(&contexts[i], compute, &backends[i], &err), &err);
    }
}

// Each test is a process of its own, so arrays live until it ends; a leak checker finds them here.
static void *arrays[512];
static int   n_arrays;

static void *array(int64_t n, size_t size) {
    ck_assert_int_lt(n_arrays, 512);
    kvq_test_ok(kvq_alloc(&contexts[1], n, size, "test array", &arrays[n_arrays], NULL), NULL);
    return arrays[n_arrays++];
}

static float  *floats(int64_t n) { return array(n, sizeof(float)); }
static double *doubles(int64_t n) { return array(n, sizeof(double)); }

static float *randoms(int64_t n, uint32_t stream) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(2 * kvq_rng_uniform(5, KVQ_RNG_TEST, stream, (uint64_t)i) - 1);
    return x;
}

static float *whole_numbers(int64_t n, uint32_t stream) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)kvq_rng_below(5, KVQ_RNG_TEST, stream, (uint64_t)i, 17) - 8;
    return x;
}

// Host weights [n_out, n_in] in the form of a backend.
static float *weights(const kvq_backend *be, const float *w, int64_t n_out, int64_t n_in) {
    float *own = floats(be->weights_floats(be, n_out, n_in));
    be->upload_weights(be, own, n_in, 0, n_out, w);
    return own;
}

// Nearest number with 8 significant bits, ties to even, by arithmetic.
static double rounded_to_bf16(double x) {
    int    exponent;
    double fraction = frexp(x, &exponent);
    return ldexp(rint(ldexp(fraction, 8)), exponent - 8);
}

// ---------------------------------------------------------------- shapes

// Odd sizes, sizes around a tile, and the last ones around the longest sum that a tile of bf16 takes at once.
typedef struct shape {
    int64_t m, n_out, n_in;
} shape;

static const shape SHAPES[] = {
    {1, 1, 1},     {1, 15, 17},    {15, 17, 1},    {17, 257, 15},  {257, 15, 17},   {257, 4097, 15}, {15, 17, 4097},
    {17, 4097, 3}, {513, 33, 257}, {128, 513, 31}, {129, 513, 31}, {256, 4096, 8},  {300, 4100, 5},  {33, 3, 16384},
    {5, 7, 16385}, {2, 9, 33000},  {2, 33000, 9},  {5, 16385, 7},  {256, 2, 16385},
};
#define N_SHAPES ((int)(sizeof SHAPES / sizeof *SHAPES))

// ---------------------------------------------------------------- the definition

// result (against) sum: x [m, k] times b, b(j, c) being at b[j * b_row + c * b_column]
typedef struct product {
    const float *x, *b, *start; // start [n] or [m, n], or NULL
    int64_t      m, n, k, b_row, b_column, start_row;
} product;

// The factors as the library should round them, in f64.
static double *factors(kvq_compute compute, const float *x, int64_t n) {
    double *out = doubles(n);
    for (int64_t i = 0; i < n; i++) out[i] = compute == KVQ_COMPUTE_BF16 ? rounded_to_bf16((double)x[i]) : (double)x[i];
    return out;
}

// An assertion that holds costs a message to the process that runs the suite, so only failures become one.
static void assert_near(double value, double expected, double tolerance, const char *what, int64_t i, int64_t j) {
    if (fabs(value - expected) <= tolerance) return;
    ck_abort_msg("%s [%lld, %lld]: %.9g instead of %.9g, tolerance %.2g", what, (long long)i, (long long)j, value,
                 expected, tolerance);
}

static void assert_product(kvq_compute compute, const product *p, const float *result, bool exact, const char *what) {
    const double *x = factors(compute, p->x, p->m * p->k), *b = factors(compute, p->b, p->n * p->k);
    double        per_factor = compute == KVQ_COMPUTE_BF16 ? ROUNDING : 0;
    for (int64_t i = 0; i < p->m; i++) {
        for (int64_t j = 0; j < p->n; j++) {
            double start = p->start != NULL ? (double)p->start[i * p->start_row + j] : 0;
            double sum = start, unrounded = start, magnitude = fabs(start);
            for (int64_t c = 0; c < p->k; c++) {
                int64_t at = j * p->b_row + c * p->b_column;
                double  term = (double)p->x[i * p->k + c] * (double)p->b[at];
                sum += x[i * p->k + c] * b[at];
                unrounded += term;
                magnitude += fabs(term);
            }
            double value = (double)result[i * p->n + j];
            double summing = exact ? 0 : (double)(p->k + 2) * EPS * (1 + per_factor) * magnitude;
            assert_near(value, sum, summing, what, i, j);
            assert_near(value, unrounded, summing + per_factor * magnitude, what, i, j);
        }
    }
}

typedef float *(*number_maker)(int64_t n, uint32_t stream);

static void check_linear(kvq_compute compute, shape s, number_maker make, bool exact) {
    float *x = make(s.m * s.n_in, 1), *w = make(s.n_out * s.n_in, 2), *bias = make(s.n_out, 3);
    float *y[MAX_TEST_THREADS + 1];
    for (int i = 1; i <= MAX_TEST_THREADS; i++) {
        y[i] = floats(s.m * s.n_out);
        backends[i]->linear(backends[i], x, weights(backends[i], w, s.n_out, s.n_in), bias, y[i], s.m, s.n_out, s.n_in);
        ck_assert_mem_eq(y[1], y[i], (size_t)(s.m * s.n_out) * sizeof *x);
    }
    product p = {x, w, bias, s.m, s.n_out, s.n_in, s.n_in, 1, 0};
    assert_product(compute, &p, y[1], exact, "y");
    backends[1]->linear(backends[1], x, weights(backends[1], w, s.n_out, s.n_in), NULL, y[1], s.m, s.n_out, s.n_in);
    p.start = NULL;
    assert_product(compute, &p, y[1], exact, "y without bias");
}

static void check_backward(kvq_compute compute, shape s, number_maker make, bool exact) {
    float *dy = make(s.m * s.n_out, 4), *w = make(s.n_out * s.n_in, 5), *before = make(s.m * s.n_in, 6);
    float *dx[MAX_TEST_THREADS + 1], *added = floats(s.m * s.n_in);
    for (int i = 1; i <= MAX_TEST_THREADS; i++) {
        float *own = weights(backends[i], w, s.n_out, s.n_in);
        dx[i] = floats(s.m * s.n_in);
        for (int64_t c = 0; c < s.m * s.n_in; c++) dx[i][c] = NAN; // is overwritten
        backends[i]->linear_backward(backends[i], dy, own, dx[i], s.m, s.n_out, s.n_in, false);
        ck_assert_mem_eq(dx[1], dx[i], (size_t)(s.m * s.n_in) * sizeof *dx[i]);
        float *sum = floats(s.m * s.n_in);
        memcpy(sum, before, (size_t)(s.m * s.n_in) * sizeof *sum);
        backends[i]->linear_backward(backends[i], dy, own, sum, s.m, s.n_out, s.n_in, true);
        if (i > 1) ck_assert_mem_eq(sum, added, (size_t)(s.m * s.n_in) * sizeof *sum);
        added = sum;
    }
    product p = {dy, w, NULL, s.m, s.n_in, s.n_out, 1, s.n_in, s.n_in};
    assert_product(compute, &p, dx[1], exact, "dx");
    p.start = before;
    assert_product(compute, &p, added, exact, "dx added to what was there");
}

static void check_shape(kvq_compute compute, int index) {
    open_backends(compute);
    check_linear(compute, SHAPES[index], randoms, false);
    check_backward(compute, SHAPES[index], randoms, false);
    check_linear(compute, SHAPES[index], whole_numbers, true);
    check_backward(compute, SHAPES[index], whole_numbers, true);
}

START_TEST(f32_products_equal_the_definition) { check_shape(KVQ_COMPUTE_F32, _i); }
END_TEST

START_TEST(bf16_products_equal_the_definition) { check_shape(KVQ_COMPUTE_BF16, _i); }
END_TEST

// Row counts go through rows of zeros and through products of several sizes.
START_TEST(bf16_is_exact_for_every_row_count) {
    open_backends(KVQ_COMPUTE_BF16);
    shape s = {_i + 1, 19, 21};
    check_linear(KVQ_COMPUTE_BF16, s, whole_numbers, true);
    check_backward(KVQ_COMPUTE_BF16, s, whole_numbers, true);
}
END_TEST

// ---------------------------------------------------------------- threads

enum { OUT = 301, IN = 77, M = 45, BLOCK = 7 };

typedef struct upload_job {
    const kvq_backend *be;
    const float       *from;
    float             *to;
} upload_job;

static void upload_block(void *user, int64_t item, int worker) {
    const upload_job *job = user;
    int64_t           row = item * BLOCK, n = row + BLOCK < OUT ? BLOCK : OUT - row;
    (void)worker;
    job->be->upload_weights(job->be, job->to, IN, row, n, job->from + row * IN);
}

static void check_parallel_upload(kvq_compute compute) {
    open_backends(compute);
    const kvq_backend *be = backends[3];
    float             *w = randoms(OUT * IN, 7), *whole = weights(be, w, OUT, IN);
    int64_t            n_floats = be->weights_floats(be, OUT, IN);
    upload_job         job = {be, w, floats(n_floats)};
    kvq_parallel_for(&contexts[3], (OUT + BLOCK - 1) / BLOCK, upload_block, &job);
    ck_assert_mem_eq(whole, job.to, (size_t)n_floats * sizeof *whole);
}

START_TEST(f32_weights_from_several_threads) { check_parallel_upload(KVQ_COMPUTE_F32); }
END_TEST

START_TEST(bf16_weights_from_several_threads) { check_parallel_upload(KVQ_COMPUTE_BF16); }
END_TEST

typedef struct caller_job {
    const kvq_backend *be;
    const float       *x, *w;
    float             *y; // [n_callers, M, OUT]
} caller_job;

static void call_linear(void *user, int64_t item, int worker) {
    const caller_job *job = user;
    int64_t           rows = M - item % 4; // several shapes at a time
    (void)worker;
    job->be->linear(job->be, job->x, job->w, NULL, job->y + item * M * OUT, rows, OUT, IN);
}

static void check_several_callers(kvq_compute compute) {
    enum { N_CALLERS = 24 };
    open_backends(compute);
    const kvq_backend *be = backends[2];
    float             *x = whole_numbers(M * IN, 8), *w = whole_numbers(OUT * IN, 9);
    caller_job         job = {be, x, weights(be, w, OUT, IN), floats((int64_t)N_CALLERS * M * OUT)};
    kvq_parallel_for(&contexts[3], N_CALLERS, call_linear, &job);
    for (int i = 0; i < N_CALLERS; i++) {
        product p = {x, w, NULL, M - i % 4, OUT, IN, IN, 1, 0};
        assert_product(compute, &p, job.y + (int64_t)i * M * OUT, true, "y");
    }
}

START_TEST(f32_products_for_several_callers) { check_several_callers(KVQ_COMPUTE_F32); }
END_TEST

START_TEST(bf16_products_for_several_callers) { check_several_callers(KVQ_COMPUTE_BF16); }
END_TEST

// ---------------------------------------------------------------- bf16

START_TEST(bf16_rounds_to_nearest_even) {
    for (uint32_t h = 0; h < 65536; h++) { // what is a bf16 stays what it is
        float x = kvq_float_of_bf16((uint16_t)h);
        if (!isnan(x)) ck_assert_uint_eq(kvq_bf16_of_float(x), h);
        if (isnan(x)) ck_assert(isnan(kvq_float_of_bf16(kvq_bf16_of_float(x))));
    }
    for (uint64_t i = 0; i < 200000; i++) {
        double x = (double)(float)ldexp(kvq_rng_uniform(5, KVQ_RNG_TEST, 10, i) - 0.5, (int)(i % 200) - 100);
        ck_assert_double_eq((double)kvq_float_of_bf16(kvq_bf16_of_float((float)x)), rounded_to_bf16(x));
    }
    const uint32_t expected[][2] = {
        {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82},                       // halfway: to the even neighbour
        {0x3f808001, 0x3f81}, {0x3f817fff, 0x3f81},                       // just beside halfway
        {0x7f7f7fff, 0x7f7f}, {0x7f7f8000, 0x7f80},                       // the largest, and beyond it
        {0x00008000, 0x0000}, {0x00008001, 0x0001},                       // subnormal
        {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0xffffffff, 0xffff}, // -infinity, NaN that would round away
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        ck_assert_uint_eq(kvq_bf16_of_float(kvq_float_of_bits(expected[i][0])), expected[i][1]);
}
END_TEST

START_TEST(bf16_weights_take_half_the_memory) {
    open_backends(KVQ_COMPUTE_BF16);
    ck_assert_int_eq(backends[1]->weights_floats(backends[1], 4, 8), 16);
    ck_assert_int_eq(backends[1]->weights_floats(backends[1], 3, 5), 8);
    ck_assert_str_eq(backends[1]->matmul, "onednn-bf16");
}
END_TEST

START_TEST(bf16_passes_on_what_is_not_finite) {
    open_backends(KVQ_COMPUTE_BF16);
    float *x = whole_numbers(8 * 16, 11), *w = whole_numbers(4 * 16, 12), *y = floats(8 * 4);
    x[3 * 16 + 5] = 3.4e38f; // finite in f32, infinite in bf16
    w[5] = 1;
    backends[1]->linear(backends[1], x, weights(backends[1], w, 4, 16), NULL, y, 8, 4, 16);
    ck_assert(!isfinite(y[3 * 4]));
    ck_assert(isfinite(y[2 * 4]));
}
END_TEST

static bool allocations_fail;

static void *limited_alloc(void *user, size_t bytes) {
    (void)user;
    return allocations_fail ? NULL : aligned_alloc(64, bytes);
}

static void plain_release(void *user, void *p) {
    (void)user;
    free(p);
}

// Without memory for its scratch a product has no result, and must not leave an old one behind.
START_TEST(bf16_without_memory_is_not_a_number) {
    open_backends(KVQ_COMPUTE_BF16);
    kvq_backend *be;
    kvq_context  ctx = contexts[1];
    ctx.alloc = limited_alloc;
    ctx.release = plain_release;
    kvq_test_ok(kvq_backend_cpu(&ctx, KVQ_COMPUTE_BF16, &be, NULL), NULL);
    float *x = whole_numbers(8 * 16, 13), *w = weights(be, whole_numbers(4 * 16, 14), 4, 16), *y = floats(8 * 4);
    allocations_fail = true;
    be->linear(be, x, w, NULL, y, 8, 4, 16);
    for (int i = 0; i < 8 * 4; i++) ck_assert(isnan(y[i]));
    allocations_fail = false;
    be->linear(be, x, w, NULL, y, 8, 4, 16);
    ck_assert_int_eq(be->find_nonfinite(be, y, 8 * 4), -1);
    be->destroy(&be);
    ck_assert_ptr_null(be);
}
END_TEST

// Runs first in its process, so that oneDNN still asks the environment what it may use.
START_TEST(bf16_is_refused_where_the_processor_has_none) {
    kvq_backend *be = NULL;
    kvq_error    err;
    kvq_context  ctx = kvq_test_context();
    ck_assert_int_eq(setenv("DNNL_MAX_CPU_ISA", "AVX2", 1), 0);
    kvq_test_failed(kvq_backend_cpu(&ctx, KVQ_COMPUTE_BF16, &be, &err), KVQ_ERR_UNSUPPORTED, &err, "bf16");
    ck_assert_ptr_null(be);
    ck_assert_ptr_nonnull(strstr(err.next, "--compute f32"));
    kvq_test_ok(kvq_backend_cpu(&ctx, KVQ_COMPUTE_F32, &be, &err), &err);
    be->destroy(&be);
}
END_TEST

// ---------------------------------------------------------------- the two suites

static const kvq_test_case CASES[] = {
    KVQ_LOOP(f32_products_equal_the_definition, N_SHAPES),
    KVQ_CASE(f32_weights_from_several_threads),
    KVQ_CASE(f32_products_for_several_callers),
    KVQ_CASE(bf16_rounds_to_nearest_even),
    KVQ_CASE(bf16_is_refused_where_the_processor_has_none),
};

static const kvq_test_case BF16_CASES[] = {
    KVQ_LOOP(bf16_products_equal_the_definition, N_SHAPES),
    KVQ_LOOP(bf16_is_exact_for_every_row_count, 70),
    KVQ_CASE(bf16_weights_from_several_threads),
    KVQ_CASE(bf16_products_for_several_callers),
    KVQ_CASE(bf16_weights_take_half_the_memory),
    KVQ_CASE(bf16_passes_on_what_is_not_finite),
    KVQ_CASE(bf16_without_memory_is_not_a_number),
};

#define N_OF(cases) ((int)(sizeof(cases) / sizeof *(cases)))

static int skip_bf16(const kvq_error *err) {
    int n = 0;
    for (int i = 0; i < N_OF(BF16_CASES); i++) {
        printf("skipped: test_matmul_bf16/%s (%s)\n", BF16_CASES[i].name, err->message);
        n += BF16_CASES[i].n_loops > 1 ? BF16_CASES[i].n_loops : 1;
    }
    printf("test_matmul_bf16: 0 passed, 0 failed, %d skipped\n", n);
    return EXIT_SUCCESS;
}

int main(void) {
    int          status = kvq_test_run("test_matmul", CASES, N_OF(CASES));
    kvq_context  ctx = kvq_test_context();
    kvq_backend *be = NULL;
    kvq_error    err;
    bool         available = kvq_backend_cpu(&ctx, KVQ_COMPUTE_BF16, &be, &err) == KVQ_OK;
    if (available) be->destroy(&be);
    return (available ? kvq_test_run("test_matmul_bf16", BF16_CASES, N_OF(BF16_CASES)) : skip_bf16(&err)) | status;
}
