// SPDX-License-Identifier: Apache-2.0
// What the suites share; see kvq_test.h.
#include <ftw.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kvq_test.h"

#define TEST_TIMEOUT_S 900 // ends what hangs; the longest takes two minutes of a quiet machine

static const char *readable(const char *variable, const char *fallback) {
    const char *path = getenv(variable);
    if (path == NULL) path = fallback;
    return access(path, R_OK) == 0 ? path : NULL;
}

const char *kvq_test_shared(void) { return readable("KVQ_SHARED", KVQ_TEST_SOURCE_DIR "/../shared"); }

const char *kvq_test_smollm2(void) {
    return readable("KVQ_SMOLLM2_GGUF", KVQ_TEST_SOURCE_DIR "/demo/SmolLM2-135M-Instruct.Q4_1.gguf");
}

void kvq_test_shared_path(char *out, size_t size, const char *name) {
    (void)snprintf(out, size, "%s/%s", kvq_test_shared(), name);
}

static const char *missing_need(int needs) {
    if ((needs & KVQ_NEEDS_SHARED) != 0 && kvq_test_shared() == NULL) return "no reference data; set KVQ_SHARED";
    if ((needs & KVQ_NEEDS_SMOLLM2) != 0 && kvq_test_smollm2() == NULL) return "no SmolLM2 GGUF; run script/demo";
    return NULL;
}

int kvq_test_run(const char *suite_name, const kvq_test_case *cases, int n_cases) {
    Suite *suite = suite_create(suite_name);
    TCase *tcase = tcase_create("all");
    int    n_skipped = 0;
    tcase_set_timeout(tcase, TEST_TIMEOUT_S);
    for (int i = 0; i < n_cases; i++) {
        const char *missing = missing_need(cases[i].needs);
        int         n_loops = cases[i].n_loops > 1 ? cases[i].n_loops : 1;
        if (missing != NULL) {
            printf("skipped: %s/%s (%s)\n", suite_name, cases[i].name, missing);
            n_skipped += n_loops;
        } else {
            tcase_add_loop_test(tcase, *cases[i].test, 0, n_loops);
        }
    }
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner), n_run = srunner_ntests_run(runner);
    printf("%s: %d passed, %d failed, %d skipped\n", suite_name, n_run - n_failed, n_failed, n_skipped);
    srunner_free(runner);
    return n_failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

kvq_context kvq_test_context(void) {
    kvq_context ctx = kvq_context_default();
    ctx.n_threads = 2;
    return ctx;
}

static char  test_folder[128];
static pid_t test_folder_owner;

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *where) {
    (void)info, (void)type, (void)where;
    return remove(path);
}

static void remove_folder(void) {
    if (test_folder_owner == getpid()) (void)nftw(test_folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

const char *kvq_test_folder(void) {
    if (test_folder_owner != getpid()) {
        const char *in = getenv("TMPDIR");
        int length = snprintf(test_folder, sizeof test_folder, "%s/kvq-test-XXXXXX", in != NULL ? in : P_tmpdir);
        ck_assert_int_lt(length, (int)sizeof test_folder);
        ck_assert_ptr_nonnull(mkdtemp(test_folder));
        test_folder_owner = getpid();
        (void)atexit(remove_folder);
    }
    return test_folder;
}

void kvq_test_limit_files(uint64_t bytes) {
    struct rlimit limit = {bytes == KVQ_TEST_NO_LIMIT ? RLIM_INFINITY : (rlim_t)bytes, RLIM_INFINITY};
    (void)signal(SIGXFSZ, SIG_IGN); // a full disk sends none
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) abort();
}

void kvq_test_ok(kvq_status status, const kvq_error *err) {
    ck_assert_msg(status == KVQ_OK, "KVQ-E%d: %s", kvq_status_number(status), err != NULL ? err->message : "");
}

void kvq_test_failed(kvq_status status, kvq_status expected, const kvq_error *err, const char *fragment) {
    ck_assert_msg(status == expected, "status KVQ-E%d instead of KVQ-E%d: %s", kvq_status_number(status),
                  kvq_status_number(expected), status == KVQ_OK ? "(no error)" : err->message);
    ck_assert_msg(strstr(err->message, fragment) != NULL, "'%s' does not contain '%s'", err->message, fragment);
}

double kvq_test_relative_error(const float *a, const float *b, int64_t n) {
    double difference = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        difference = fmax(difference, fabs((double)a[i] - (double)b[i]));
        scale = fmax(scale, fabs((double)b[i]));
        if (isnan(a[i])) return HUGE_VAL;
    }
    return difference / scale;
}
