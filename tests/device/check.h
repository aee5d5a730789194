// SPDX-License-Identifier: Apache-2.0
//
// Stands in for Check's header where the suites of device code are built for a device, so that they need nothing but
// the CUDA runtime: what kvq_test.c and those suites use of Check, under the same names. Only run.sh gives this path.
//
// Cases share a process until one of them fails, since a process that uses a device takes long to start; the next case
// then gets a new one. CK_FORK=no: one process for all, which is what tools that watch a process want.
// KVQ_DEVICE_LOOPS=n: at most n rounds of each loop, spread over all of them.
#ifndef KVQ_DEVICE_CHECK_H
#define KVQ_DEVICE_CHECK_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct TTest {
    const char *name;
    void (*body)(int _i);
} TTest;

#define START_TEST(test)                                                                                               \
    static void               test##_body(int _i);                                                                     \
    static const TTest        test##_test = {#test, test##_body};                                                      \
    static const TTest *const test = &test##_test;                                                                     \
    static void               test##_body(int _i) {                                                                    \
                      (void)_i;
#define END_TEST }

typedef struct Suite   Suite;
typedef struct TCase   TCase;
typedef struct SRunner SRunner;
enum print_output { CK_NORMAL };

Suite   *suite_create(const char *name);
TCase   *tcase_create(const char *name);
void     tcase_set_timeout(TCase *tcase, double seconds); // of each round of a test
void     tcase_add_loop_test(TCase *tcase, const TTest *test, int first, int end);
void     suite_add_tcase(Suite *suite, TCase *tcase); // the only one
SRunner *srunner_create(Suite *suite);                // takes the suite, with what was added to it
void     srunner_run_all(SRunner *runner, enum print_output mode);
int      srunner_ntests_run(SRunner *runner);
int      srunner_ntests_failed(SRunner *runner);
void     srunner_free(SRunner *runner);

// The running case has failed: says so, and, in ck_end_failed, ends it by an exception that C must let through
// (-fexceptions). ck_note_failed is not of Check; it is for those who may not throw.
void ck_note_failed(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));
void ck_end_failed(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4), noreturn));

#ifdef __cplusplus
}
#endif

#define ck_abort_msg(...) ck_end_failed(__FILE__, __LINE__, __VA_ARGS__)
#define ck_assert_msg(condition, ...)                                                                                  \
    do {                                                                                                               \
        if (!(condition)) ck_abort_msg(__VA_ARGS__);                                                                   \
    } while (0)
#define ck_assert(condition) ck_assert_msg(condition, "'%s' is false", #condition)

#define CK_COMPARE(type, format, a, relation, b)                                                                       \
    do {                                                                                                               \
        type ck_a = (a), ck_b = (b);                                                                                   \
        ck_assert_msg(ck_a relation ck_b, "%s %s %s: %s is " format ", %s is " format, #a, #relation, #b, #a, ck_a,    \
                      #b, ck_b);                                                                                       \
    } while (0)
#define ck_assert_int_eq(a, b)    CK_COMPARE(intmax_t, "%jd", a, ==, b)
#define ck_assert_int_ne(a, b)    CK_COMPARE(intmax_t, "%jd", a, !=, b)
#define ck_assert_int_lt(a, b)    CK_COMPARE(intmax_t, "%jd", a, <, b)
#define ck_assert_int_le(a, b)    CK_COMPARE(intmax_t, "%jd", a, <=, b)
#define ck_assert_int_gt(a, b)    CK_COMPARE(intmax_t, "%jd", a, >, b)
#define ck_assert_int_ge(a, b)    CK_COMPARE(intmax_t, "%jd", a, >=, b)
#define ck_assert_uint_eq(a, b)   CK_COMPARE(uintmax_t, "%ju", a, ==, b)
#define ck_assert_uint_ne(a, b)   CK_COMPARE(uintmax_t, "%ju", a, !=, b)
#define ck_assert_double_lt(a, b) CK_COMPARE(double, "%.9g", a, <, b)
#define ck_assert_double_le(a, b) CK_COMPARE(double, "%.9g", a, <=, b)
#define ck_assert_double_gt(a, b) CK_COMPARE(double, "%.9g", a, >, b)
#define ck_assert_double_ge(a, b) CK_COMPARE(double, "%.9g", a, >=, b)
#define ck_assert_ptr_nonnull(p)  ck_assert_msg((p) != NULL, "%s is NULL", #p)
#define ck_assert_ptr_null(p)     ck_assert_msg((p) == NULL, "%s is not NULL", #p)
#define ck_assert_str_eq(a, b)    ck_assert_msg(strcmp(a, b) == 0, "%s is '%s', not '%s'", #a, a, b)

#endif
