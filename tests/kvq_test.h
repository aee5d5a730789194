// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: one way to run a Check suite and count, one way to find the shared reference data.
#ifndef KVQ_TEST_H
#define KVQ_TEST_H

#include <check.h>

#include "kvq_core.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a test may need from outside the repository. A test whose needs are not met is counted as skipped, and said to
// be.
typedef enum kvq_test_need {
    KVQ_NEEDS_NOTHING = 0,
    KVQ_NEEDS_SHARED = 1,  // reference data: $KVQ_SHARED, else ../shared beside the repository
    KVQ_NEEDS_SMOLLM2 = 2, // the demo's model: $KVQ_SMOLLM2_GGUF, else where script/demo puts it
} kvq_test_need;

const char *kvq_test_shared(void);                                          // folder or NULL
void        kvq_test_shared_path(char *out, size_t size, const char *name); // "<shared>/<name>"
const char *kvq_test_smollm2(void);                                         // GGUF file or NULL

typedef struct kvq_test_case {
    const char         *name;
    const TTest *const *test;
    int                 needs;   // kvq_test_need, or-ed
    int                 n_loops; // 0 = once; otherwise _i runs over [0, n_loops)
} kvq_test_case;

#define KVQ_CASE(test)                                                                                                 \
    { #test, (const TTest *const *)&test, KVQ_NEEDS_NOTHING, 0 }
#define KVQ_LOOP(test, n)                                                                                              \
    { #test, (const TTest *const *)&test, KVQ_NEEDS_NOTHING, n }
#define KVQ_GOLDEN_CASE(test)                                                                                          \
    { #test, (const TTest *const *)&test, KVQ_NEEDS_SHARED, 0 }
#define KVQ_GOLDEN_LOOP(test, n)                                                                                       \
    { #test, (const TTest *const *)&test, KVQ_NEEDS_SHARED, n }
#define KVQ_SMOLLM2_CASE(test)                                                                                         \
    { #test, (const TTest *const *)&test, KVQ_NEEDS_SHARED | KVQ_NEEDS_SMOLLM2, 0 }

// Runs all cases, each in a forked process with a time limit, prints every failure and then the line
// "<suite>: N passed, N failed, N skipped". Returns the exit status for main.
int kvq_test_run(const char *suite, const kvq_test_case *cases, int n_cases);
#define KVQ_TEST_MAIN(suite, cases)                                                                                    \
    int main(void) { return kvq_test_run(suite, cases, (int)(sizeof(cases) / sizeof *(cases))); }

// A context on two threads whose log goes nowhere.
kvq_context kvq_test_context(void);

// A temporary folder, removed at exit of the process that asked for it.
const char *kvq_test_folder(void);

// No file of this process may grow beyond so many bytes, which stands in for a full disk. Check's own messages are a
// file as well: assert nothing before KVQ_TEST_NO_LIMIT.
#define KVQ_TEST_NO_LIMIT UINT64_MAX
void kvq_test_limit_files(uint64_t bytes);

// Asserts a status and, on failure, shows the error's message. `fragment` must occur in the message of an error.
void kvq_test_ok(kvq_status status, const kvq_error *err);
void kvq_test_failed(kvq_status status, kvq_status expected, const kvq_error *err, const char *fragment);

// Reference arrays: golden.json names dtype, shape and offset of arrays in golden.bin.
typedef struct kvq_golden kvq_golden;
kvq_golden               *kvq_golden_open(const char *folder_under_shared, const char *stem);
void                      kvq_golden_close(kvq_golden *golden);
const float   *kvq_golden_f32(const kvq_golden *golden, const char *name, int64_t *n_elements); // NULL when absent
const int32_t *kvq_golden_i32(const kvq_golden *golden, const char *name, int64_t *n_elements);

// The measure the reference data uses: max |a - b| / max |b|.
double kvq_test_relative_error(const float *a, const float *b, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
