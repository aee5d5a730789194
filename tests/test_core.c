// SPDX-License-Identifier: Apache-2.0
// Core: half conversion over all inputs, fixed-point sums, the random generator's known answers, hashing, errors.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_test.h"

// Every half survives the way through f32, and every f32 between two halves goes to the nearer one, ties to even.
START_TEST(half_round_trip_and_rounding) {
    for (uint32_t h = 0; h < 0x7c00u; h++) {
        float x = kvq_float_of_half((uint16_t)h);
        ck_assert_uint_eq(kvq_half_of_float(x), h);
        ck_assert_uint_eq(kvq_half_of_float(-x), h | 0x8000u);
        if (h + 1 == 0x7c00u) break;
        float    next = kvq_float_of_half((uint16_t)(h + 1)), middle = (x + next) / 2; // exact in f32
        uint32_t even = (h & 1) == 0 ? h : h + 1;
        ck_assert_uint_eq(kvq_half_of_float(middle), even);
        ck_assert_uint_eq(kvq_half_of_float(nextafterf(middle, -1)), h);
        ck_assert_uint_eq(kvq_half_of_float(nextafterf(middle, INFINITY)), h + 1);
    }
    ck_assert_uint_eq(kvq_half_of_float(65519.0f), 0x7bff);
    ck_assert_uint_eq(kvq_half_of_float(65520.0f), 0x7c00);
    ck_assert_uint_eq(kvq_half_of_float(INFINITY), 0x7c00);
    ck_assert(isnan(kvq_float_of_half(kvq_half_of_float(NAN))));
    ck_assert(kvq_float_of_bf16(0x3f80) == 1.0f);
}
END_TEST

// The same numbers in any order give the same bits, and the value is the exact sum.
START_TEST(fixed_sums_do_not_depend_on_order) {
    enum { N = 10000 };
    static double x[N];
    for (int i = 0; i < N; i++) {
        double u = kvq_rng_uniform(1, KVQ_RNG_TEST, 0, (uint64_t)i);
        x[i] = ldexp(u - 0.5, (int)kvq_rng_below(1, KVQ_RNG_TEST, 1, (uint64_t)i, 60) - 50);
    }
    kvq_fixed forward = {0, 0}, backward = {0, 0}, halves[2] = {{0, 0}, {0, 0}};
    double    plain = 0;
    for (int i = 0; i < N; i++) {
        kvq_fixed_add(&forward, x[i]);
        kvq_fixed_add(&backward, x[N - 1 - i]);
        kvq_fixed_add(&halves[i % 2], x[i]);
        plain += x[i];
    }
    kvq_fixed_merge(&halves[0], halves[1]);
    ck_assert(memcmp(&forward, &backward, sizeof forward) == 0);
    ck_assert(memcmp(&forward, &halves[0], sizeof forward) == 0);
    ck_assert_double_eq_tol(kvq_fixed_to_double(forward), plain, 1e-9);
}
END_TEST

START_TEST(fixed_negative_and_tiny) {
    kvq_fixed s = {0, 0};
    kvq_fixed_add(&s, -0x1p-90);
    ck_assert(kvq_fixed_to_double(s) == -0x1p-90);
    kvq_fixed_add(&s, 0x1p-90);
    ck_assert(s.hi == 0 && s.lo == 0);
    kvq_fixed_add(&s, -1e-30); // below the unit: truncated to nothing
    ck_assert(s.hi == 0 && s.lo == 0);
    kvq_fixed_add(&s, -1234.5);
    ck_assert(kvq_fixed_to_double(s) == -1234.5);
}
END_TEST

// Known answers of Philox4x32-10 (Random123's kat_vectors).
START_TEST(philox_known_answers) {
    uint32_t out[4];
    kvq_rng_block(0, 0, 0, 0, out);
    ck_assert_uint_eq(out[0], 0x6627e8d5u);
    ck_assert_uint_eq(out[1], 0xe169c58du);
    ck_assert_uint_eq(out[2], 0xbc57ac4cu);
    ck_assert_uint_eq(out[3], 0x9b00dbd8u);
    kvq_rng_block(UINT64_MAX, UINT32_MAX, UINT32_MAX, UINT64_MAX, out);
    ck_assert_uint_eq(out[0], 0x408f276du);
    ck_assert_uint_eq(out[1], 0x41c83b0eu);
    ck_assert_uint_eq(out[2], 0xa20bc7c6u);
    ck_assert_uint_eq(out[3], 0x6d5451fdu);
}
END_TEST

START_TEST(random_numbers_stay_in_range) {
    int counts[7] = {0};
    for (uint64_t i = 0; i < 70000; i++) {
        double u = kvq_rng_uniform(3, KVQ_RNG_TEST, 2, i);
        ck_assert(u >= 0 && u < 1);
        counts[kvq_rng_below(3, KVQ_RNG_TEST, 3, i, 7)]++;
    }
    for (int i = 0; i < 7; i++) ck_assert_int_lt(abs(counts[i] - 10000), 500); // 5.4 standard deviations
    ck_assert_uint_lt(kvq_rng_below(3, KVQ_RNG_TEST, 4, 0, UINT64_MAX), UINT64_MAX);
}
END_TEST

START_TEST(sha256_of_abc) {
    char hex[KVQ_SHA256_HEX];
    ck_assert_int_eq(kvq_sha256_of("abc", 3, hex, NULL), KVQ_OK);
    ck_assert_str_eq(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}
END_TEST

START_TEST(allocation_is_checked) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    double     *p = NULL;
    kvq_test_failed(KVQ_NEW(&ctx, INT64_MAX, "huge array", &p, &err), KVQ_ERR_MEMORY, &err, "huge array");
    kvq_test_failed(KVQ_NEW(&ctx, -1, "negative array", &p, &err), KVQ_ERR_MEMORY, &err, "negative array");
    ck_assert_ptr_null(p);
    kvq_test_ok(KVQ_NEW(&ctx, 3, "small array", &p, &err), &err);
    ck_assert_uint_eq((uintptr_t)p % 64, 0);
    ck_assert(p[0] == 0 && p[1] == 0 && p[2] == 0);
    kvq_free(&ctx, p);
}
END_TEST

static void add_item(void *user, int64_t item, int worker) {
    (void)worker;
    ((int *)user)[item]++;
}

START_TEST(parallel_for_visits_each_item_once) {
    kvq_context ctx = kvq_test_context();
    int         visits[1000] = {0};
    kvq_parallel_for(&ctx, 1000, add_item, visits);
    for (int i = 0; i < 1000; i++) ck_assert_int_eq(visits[i], 1);
    kvq_parallel_for(&ctx, 0, add_item, visits);
}
END_TEST

START_TEST(status_table_is_complete) {
    ck_assert_int_eq(kvq_status_exit_code(KVQ_OK), 0);
    ck_assert_int_eq(kvq_status_exit_code(KVQ_ERR_INTEGRITY), 4);
    ck_assert_int_eq(kvq_status_number(KVQ_ERR_DISK) / 1000, 6);
    kvq_error err = {0};
    ck_assert_int_eq(kvq_fail(&err, KVQ_ERR_INPUT, "look %d", "value %d at %s", 7, "x"), KVQ_ERR_INPUT);
    ck_assert_str_eq(err.message, "value 7 at x");
    ck_assert_str_eq(err.next, "look %d"); // advice is text, never a format
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(half_round_trip_and_rounding), KVQ_CASE(fixed_sums_do_not_depend_on_order),
    KVQ_CASE(fixed_negative_and_tiny),      KVQ_CASE(philox_known_answers),
    KVQ_CASE(random_numbers_stay_in_range), KVQ_CASE(sha256_of_abc),
    KVQ_CASE(allocation_is_checked),        KVQ_CASE(parallel_for_visits_each_item_once),
    KVQ_CASE(status_table_is_complete),
};
KVQ_TEST_MAIN("core", CASES)
