// SPDX-License-Identifier: Apache-2.0
//
// A program from argv to exit code. The only place where a status becomes an exit code.
#include <stdio.h>
#include <string.h>

#include "option_table.h"

// A result that did not reach its reader (a full disk behind a redirection) is a failure like any other.
static kvq_status flush_results(kvq_error *err) {
    if (fflush(stdout) == 0 && ferror(stdout) == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_DISK, NULL, "standard output: the result could not be written");
}

int kvq_cli_main(const kvq_cli_program *program, int argc, char **argv, void *options) {
    kvq_cli         cli;
    kvq_cli_common *common = options;
    arguments       args = {NULL, 0};
    kvq_error       err = {KVQ_OK, "", ""};
    int             exit_code = 0;

    kvq_status status = parse_arguments(program, argc, argv, options, &args, &err);
    kvq_cli_console_init(&cli, program->name, common);
    if (status == KVQ_OK && common->help) {
        print_help(program);
    } else if (status == KVQ_OK && common->version) {
        printf("%s %s\n", program->name, KVQ_VERSION);
    } else if (status == KVQ_OK) {
        status = program->run(&cli, options, &exit_code, &err);
    }
    kvq_cli_end_progress(&cli);
    if (status == KVQ_OK) status = flush_results(&err);
    if (status != KVQ_OK) {
        kvq_cli_print_error(&cli, &err);
        exit_code = kvq_status_exit_code(status);
    }
    free_arguments(&args);
    return exit_code;
}
