// SPDX-License-Identifier: Apache-2.0
//
// Between the files of the option table only: what program.c needs to answer a command line.
#ifndef KVQ_OPTION_TABLE_H
#define KVQ_OPTION_TABLE_H

#include "kvq_cli.h"

// The program's own rows followed by the rows every program has.
#define CLI_MAX_OPTIONS 96 // of a program, the common ones included
typedef struct option_rows {
    const kvq_cli_option *rows[CLI_MAX_OPTIONS];
    int                   n;
} option_rows;
option_rows collect_options(const kvq_cli_program *program);

// Strings that option fields point to; alive until free_arguments.
typedef struct arguments {
    char **owned;
    int    n_owned;
} arguments;

// Fills `options` from argv. KVQ_ERR_USAGE names the option and its value.
kvq_status parse_arguments(const kvq_cli_program *program, int argc, char **argv, void *options, arguments *args,
                           kvq_error *err);
void       free_arguments(arguments *args);

void print_help(const kvq_cli_program *program, bool with_rare); // to stdout

#endif
