// SPDX-License-Identifier: Apache-2.0
//
// A program from argv to exit code. The only place where a status becomes an exit code, and where signals arrive.
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>

#include "option_table.h"

// ---------------------------------------------------------------- stopping

// timeout(1) and some batch systems send one request twice, to the process and to its group. A person's second one
// comes later than that.
#define SAME_REQUEST_S 0.2

#define STOPPING "finishing the current step, then saving; once more ends at once"

static const int STOP_SIGNALS[] = {SIGINT, SIGTERM, SIGUSR1};

// Requests to stop are awaited by a thread, and blocked in all others. A handler would run on the stack of the thread
// it interrupts, where oneDNN's matrix products keep data below the stack pointer: it would change their results.
typedef struct stop_watch {
    kvq_cli    *cli;
    sigset_t    awaited;
    pthread_t   thread;
    bool        running;
    atomic_bool over;
} stop_watch;

static void answer_request(const kvq_cli *cli) {
    const char *before = cli->animate ? "\n" : "", *after = "\n"; // leaves the line of a bar
    if (cli->json) {
        before = "{\"event\":\"stopping\",\"text\":\"";
        after = "\"}\n";
    }
    (void)fprintf(stderr, "%s" STOPPING "%s", before, after);
}

// The first request asks the program to end in order, the second one ends it.
static void *await_requests(void *argument) {
    stop_watch *watch = argument;
    int         number = 0;
    double      first_s = 0;
    while (sigwait(&watch->awaited, &number) == 0 && !atomic_load(&watch->over)) {
        if (!atomic_load(&watch->cli->stop)) {
            first_s = kvq_now_s();
            atomic_store(&watch->cli->stop, true);
            answer_request(watch->cli);
        } else if (kvq_now_s() - first_s > SAME_REQUEST_S) {
            (void)signal(number, SIG_DFL);
            (void)pthread_sigmask(SIG_UNBLOCK, &watch->awaited, NULL);
            (void)raise(number);
        }
    }
    return NULL;
}

static bool stop_requested(void *user) {
    kvq_cli *cli = user;
    return atomic_load(&cli->stop);
}

// Before any other thread is started, which inherits what is blocked. A signal that is ignored on entry (a job in the
// background of a script) stays ignored. Without a thread to await them signals do what they always do.
static void start_watch(stop_watch *watch, kvq_cli *cli) {
    struct sigaction action;
    bool             any = false;
    watch->cli = cli;
    (void)sigemptyset(&watch->awaited);
    for (int i = 0; i < CLI_COUNT_OF(STOP_SIGNALS); i++) {
        if (sigaction(STOP_SIGNALS[i], NULL, &action) != 0 || action.sa_handler == SIG_IGN) continue;
        (void)sigaddset(&watch->awaited, STOP_SIGNALS[i]);
        any = true;
    }
    if (!any) return;
    (void)pthread_sigmask(SIG_BLOCK, &watch->awaited, NULL);
    watch->running = pthread_create(&watch->thread, NULL, await_requests, watch) == 0;
    if (watch->running) {
        cli->ctx.stop = stop_requested;
    } else {
        (void)pthread_sigmask(SIG_UNBLOCK, &watch->awaited, NULL);
    }
}

// The signals stay blocked: a request that comes now gets what it asks for, in order.
static void end_watch(stop_watch *watch) {
    if (!watch->running) return;
    atomic_store(&watch->over, true);
    for (int i = 0; i < CLI_COUNT_OF(STOP_SIGNALS); i++) { // wakes the thread
        if (sigismember(&watch->awaited, STOP_SIGNALS[i]) == 1) (void)pthread_kill(watch->thread, STOP_SIGNALS[i]);
    }
    (void)pthread_join(watch->thread, NULL);
}

// ---------------------------------------------------------------- one program

// A result that did not reach its reader (a full disk behind a redirection) is a failure like any other.
static kvq_status flush_results(kvq_error *err) {
    if (fflush(stdout) == 0 && ferror(stdout) == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_DISK, NULL, "standard output: the result could not be written");
}

int kvq_cli_main(const kvq_cli_program *program, int argc, char **argv, void *options) {
    kvq_cli         cli;
    kvq_cli_common *common = options;
    arguments       args = {NULL, 0};
    stop_watch      watch = {.running = false};
    kvq_error       err = {KVQ_OK, "", ""};
    int             exit_code = 0;

    kvq_status status = parse_arguments(program, argc, argv, options, &args, &err);
    kvq_cli_console_init(&cli, program->name, common);
    cli.argc = argc;
    cli.argv = (const char *const *)argv;
    if (status == KVQ_OK && (common->help || common->help_all)) {
        print_help(program, common->help_all);
    } else if (status == KVQ_OK && common->version) {
        printf("%s %s\n", program->name, KVQ_VERSION);
    } else if (status == KVQ_OK) {
        if (program->can_stop) start_watch(&watch, &cli);
        status = program->run(&cli, options, &exit_code, &err);
    }
    kvq_cli_end_progress(&cli);
    if (status == KVQ_OK) status = flush_results(&err);
    if (status != KVQ_OK) {
        kvq_cli_print_error(&cli, &err);
        exit_code = kvq_status_exit_code(status);
    }
    end_watch(&watch);
    free_arguments(&args);
    return exit_code;
}

kvq_status kvq_cli_backend(kvq_cli *cli, const kvq_cli_engine *engine, kvq_backend **out, kvq_error *err) {
    const char *device = engine->device != NULL ? engine->device : "auto";
    return kvq_backend_open(&cli->ctx, device, (kvq_compute)engine->compute, out, err);
}

void kvq_cli_compute_text(const kvq_cli *cli, const kvq_backend *be, char out[CLI_COMPUTE_TEXT]) {
    char threads[32] = "";
    bool on_host = be->memory_bytes == 0;
    if (on_host)
        (void)snprintf(threads, sizeof threads, "%d thread%s of ", cli->ctx.n_threads,
                       cli->ctx.n_threads > 1 ? "s" : "");
    (void)snprintf(out, CLI_COMPUTE_TEXT, "%s%s%s with %s%s%s%s", threads, be->device, on_host ? "" : ",", be->matmul,
                   be->fallback[0] != 0 ? " (no GPU: " : "", be->fallback, be->fallback[0] != 0 ? ")" : "");
}
