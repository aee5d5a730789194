// SPDX-License-Identifier: Apache-2.0
// The runner of the device suites (check.cpp), which needs no device: what fails is counted, however it fails, and the
// cases behind it run.
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <vector>

#include "check.h"

struct Guard { // must go when a case ends in the middle
    int *n;
    ~Guard() { ++*n; }
};
static int n_gone;

START_TEST(passes) { ck_assert_int_eq(_i, _i); }
END_TEST
START_TEST(fails) {
    Guard guard = {&n_gone};
    ck_assert_double_lt(2, 1);
    exit(EXIT_FAILURE);
}
END_TEST
START_TEST(notes) { ck_note_failed(__FILE__, __LINE__, "noted"); }
END_TEST
START_TEST(crashes) { abort(); }
END_TEST
START_TEST(exits) { _exit(EXIT_SUCCESS); }
END_TEST
START_TEST(hangs) {
    for (;;) (void)pause();
}
END_TEST
START_TEST(sees_what_went) { ck_assert_int_eq(n_gone, 1); }
END_TEST

struct Expected {
    const char                *what, *fork, *loops;
    int                        n_rounds, n_run, n_failed;
    std::vector<const TTest *> tests;
};

static bool as_expected(const Expected &e) {
    Suite *suite = suite_create(e.what);
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 1);
    (void)setenv("CK_FORK", e.fork, 1);
    (void)setenv("KVQ_DEVICE_LOOPS", e.loops, 1);
    for (const TTest *test : e.tests) tcase_add_loop_test(tcase, test, 0, e.n_rounds);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_run = srunner_ntests_run(runner), n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    if (n_run == e.n_run && n_failed == e.n_failed) return true;
    printf("%s: %d of %d failed, not %d of %d\n", e.what, n_failed, n_run, e.n_failed, e.n_run);
    return false;
}

int main() {
    const Expected all[] = {
        {"processes", "yes", "", 2, 12, 10, {fails, passes, notes, crashes, exits, hangs}},
        {"one process", "no", "", 1, 4, 2, {fails, sees_what_went, notes, passes}},
        {"fewer rounds", "yes", "3", 10, 3, 0, {passes}},
    };
    int n_passed = 0, n = sizeof all / sizeof *all;
    for (const Expected &e : all) n_passed += as_expected(e);
    printf("test_device_check: %d passed, %d failed, 0 skipped\n", n_passed, n - n_passed);
    return n_passed == n ? EXIT_SUCCESS : EXIT_FAILURE;
}
