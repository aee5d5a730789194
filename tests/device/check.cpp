// SPDX-License-Identifier: Apache-2.0
// Runs cases; see check.h.
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

struct Round {
    const TTest *test;
    int          i;
};

struct TCase {
    std::vector<Round> rounds;
    unsigned           seconds = 0;
};

struct Suite {
    std::string name;
    TCase      *tcase = nullptr;
};

// What outlives a process that cases run in.
struct Progress {
    size_t next;    // round to begin
    bool   running; // the round before that
    int    failed;
};

struct SRunner {
    Suite   *suite;
    Progress progress = {};
};

namespace {

struct Failed {}; // ends a case

// Of the process, for messages and for what a case has done so far.
const Round *current;
bool         current_failed;

void say(const char *file, int line, const char *format, va_list values) {
    fprintf(stderr, "%s:%d:F:%s:%d: ", file, line, current != nullptr ? current->test->name : "", // as Check does
            current != nullptr ? current->i : 0);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    current_failed = true;
}

bool succeeds(const Round &round) {
    current = &round;
    current_failed = false;
    try {
        round.test->body(round.i);
    } catch (const Failed &) {
    }
    current = nullptr;
    return !current_failed;
}

// Ends behind the last round, or behind one that has failed.
void run_some(const TCase &tcase, Progress *progress) {
    bool sound = true;
    while (sound && progress->next < tcase.rounds.size()) {
        const Round &round = tcase.rounds[progress->next++];
        progress->running = true;
        (void)alarm(tcase.seconds); // its signal ends the process
        sound = succeeds(round);
        (void)alarm(0);
        progress->running = false;
        progress->failed += !sound;
    }
}

// The same in a process of its own. It leaves without farewell: a device that a case has broken may not answer.
void run_some_apart(const TCase &tcase, Progress *progress) {
    int   status = 0;
    pid_t child = fork();
    if (child == 0) {
        run_some(tcase, progress);
        fflush(nullptr);
        _exit(EXIT_SUCCESS);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || (status != 0 && !progress->running)) {
        fprintf(stderr, "check: a process for cases could not run\n");
        exit(EXIT_FAILURE);
    }
    if (!progress->running) return;
    const Round &round = tcase.rounds[progress->next - 1];
    fprintf(stderr, "%s:%d: ended its process, with status 0x%x\n", round.test->name, round.i, (unsigned)status);
    progress->running = false;
    progress->failed++;
}

int most_rounds() {
    const char *most = getenv("KVQ_DEVICE_LOOPS");
    return most != nullptr && atoi(most) > 0 ? atoi(most) : INT32_MAX;
}

} // namespace

extern "C" {

Suite *suite_create(const char *name) {
    Suite *suite = new Suite;
    suite->name = name;
    return suite;
}

TCase *tcase_create(const char *) { return new TCase; }

void tcase_set_timeout(TCase *tcase, double seconds) { tcase->seconds = static_cast<unsigned>(seconds); }

void tcase_add_loop_test(TCase *tcase, const TTest *test, int first, int end) {
    int64_t n = end - first, n_used = n < most_rounds() ? n : most_rounds();
    for (int64_t i = 0; i < n_used; i++) tcase->rounds.push_back({test, first + static_cast<int>(i * n / n_used)});
}

void suite_add_tcase(Suite *suite, TCase *tcase) { suite->tcase = tcase; }

SRunner *srunner_create(Suite *suite) {
    SRunner *runner = new SRunner;
    runner->suite = suite;
    return runner;
}

void srunner_run_all(SRunner *runner, enum print_output) {
    const TCase &tcase = *runner->suite->tcase;
    const char  *fork_says = getenv("CK_FORK");
    bool         apart = fork_says == nullptr || strcmp(fork_says, "no") != 0;
    void        *shared = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        perror("check: no memory to share");
        exit(EXIT_FAILURE);
    }
    Progress *progress = new (shared) Progress();
    while (progress->next < tcase.rounds.size()) {
        fflush(nullptr); // or a child would write it again
        if (apart)
            run_some_apart(tcase, progress);
        else
            run_some(tcase, progress);
    }
    runner->progress = *progress;
    (void)munmap(shared, sizeof(Progress));
}

int srunner_ntests_run(SRunner *runner) { return static_cast<int>(runner->suite->tcase->rounds.size()); }

int srunner_ntests_failed(SRunner *runner) { return runner->progress.failed; }

void srunner_free(SRunner *runner) {
    delete runner->suite->tcase;
    delete runner->suite;
    delete runner;
}

void ck_note_failed(const char *file, int line, const char *format, ...) {
    va_list values;
    va_start(values, format);
    say(file, line, format, values);
    va_end(values);
}

void ck_end_failed(const char *file, int line, const char *format, ...) {
    va_list values;
    va_start(values, format);
    say(file, line, format, values);
    va_end(values);
    throw Failed();
}

} // extern "C"
