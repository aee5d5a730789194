// SPDX-License-Identifier: Apache-2.0
//
// kvq: `kvq calibrate ...` runs the kvq-calibrate beside it, as git does with its commands.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kvq_cli.h"

static const char *const COMMANDS[][2] = {
    {"calibrate", "fit the KV cache datatypes of a model from a text"},
    {"capture", "write keys and values of a model to a file"},
    {"merge", "put the shards of a calibration together"},
    {"inspect", "show and check an artifact"},
    {"export", "write an artifact in a form that other programs read"},
    {"validate", "measure what a model loses with an artifact"},
    {"bench", "measure how fast this machine is"},
};
#define N_COMMANDS CLI_COUNT_OF(COMMANDS)

static void print_usage(FILE *to) {
    (void)fprintf(to, "usage: kvq COMMAND [ARGUMENT]...\n\n");
    for (int i = 0; i < N_COMMANDS; i++) (void)fprintf(to, "  %-12s %s\n", COMMANDS[i][0], COMMANDS[i][1]);
    (void)fprintf(to, "\nkvq COMMAND --help says more. kvq --version prints the version.\n");
}

// The programs are installed together, so the one in the same folder is the one of the same version; PATH comes second.
static kvq_status run_command(const char *command, char **argv, kvq_error *err) {
    char    path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 64);
    char   *slash = NULL;
    if (length > 0) {
        path[length] = 0;
        slash = strrchr(path, '/');
    }
    if (slash != NULL) {
        (void)snprintf(slash + 1, 60, "kvq-%s", command);
        (void)execv(path, argv);
    }
    (void)snprintf(path, sizeof path, "kvq-%s", command);
    (void)execvp(path, argv);
    return kvq_fail(err, KVQ_ERR_NOT_FOUND, "install all programs of kvq in one folder", "%s: cannot be run: %s", path,
                    strerror(errno));
}

int main(int argc, char **argv) {
    const kvq_cli_common common = {.quiet = false};
    kvq_cli              cli;
    kvq_error            err = {KVQ_OK, "", ""};
    const char          *names[N_COMMANDS];
    const char          *command = argc > 1 ? argv[1] : "";
    kvq_cli_console_init(&cli, "kvq", &common);

    if (strcmp(command, "--help") == 0 || strcmp(command, "-h") == 0) {
        print_usage(stdout);
        return fflush(stdout) == 0 ? 0 : kvq_status_exit_code(KVQ_ERR_DISK);
    }
    if (strcmp(command, "--version") == 0 || strcmp(command, "-V") == 0) {
        printf("kvq %s\n", KVQ_VERSION);
        return fflush(stdout) == 0 ? 0 : kvq_status_exit_code(KVQ_ERR_DISK);
    }
    for (int i = 0; i < N_COMMANDS; i++) {
        names[i] = COMMANDS[i][0];
        if (strcmp(command, names[i]) != 0) continue;
        kvq_status status = run_command(command, argv + 1, &err); // returns only when nothing could be run
        kvq_cli_print_error(&cli, &err);
        return kvq_status_exit_code(status);
    }
    if (argc < 2) {
        print_usage(stderr);
        return kvq_status_exit_code(KVQ_ERR_USAGE);
    }
    const char *closest = kvq_cli_closest(command, names, N_COMMANDS);
    char        next[96];
    (void)snprintf(next, sizeof next, closest != NULL ? "did you mean kvq %s? see kvq --help" : "%ssee kvq --help",
                   closest != NULL ? closest : "");
    kvq_status status = kvq_fail(&err, KVQ_ERR_USAGE, next, "unknown command '%s'", command);
    kvq_cli_print_error(&cli, &err);
    return kvq_status_exit_code(status);
}
