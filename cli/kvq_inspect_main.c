// SPDX-License-Identifier: Apache-2.0
//
// kvq-inspect: what an artifact or a measurement says about itself. Which of them a file is, it says itself, too.
#include <string.h>

#include "inspect.h"

static const char *const TENSORS[] = {"all", "q", "k", "v", NULL}; // in the order of inspect_tensor

#define AT(field) offsetof(inspect_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"FILE", 0, CLI_OPERAND, AT(file), NULL, .help = "an artifact (.kvq.h5) or a measurement (.kvqm.h5)"},
    {"check", 0, CLI_FLAG, AT(check), NULL, .help = "verify only: print one line, or exit with code 4"},
    {"json", 0, CLI_FLAG, AT(json), NULL,
     .help = "one JSON document on stdout (kvq.inspect/1 or kvq.inspect-measurement/1)"},
    {"layer", 0, CLI_COUNT, AT(layer), "N", .help = "this layer only, counted from 0", .min = 0, .max = 999},
    {"tensor", 0, CLI_CHOICE, AT(tensor), "T", .help = "this tensor only: k, v, or q of a measurement",
     .choices = TENSORS},
    {"codebook", 0, CLI_FLAG, AT(codebook), NULL, .help = "artifact: print the levels, and what codes decode to"},
    {"fraction", 0, CLI_FRACTION, AT(fraction), "F",
     .help = "measurement: the outlier fraction of the table (the first)", .min = 0, .max = 1},
    {"spectrum", 0, CLI_FLAG, AT(spectrum), NULL, .help = "measurement: print the eigenvalues of second moments"},
};
#undef AT

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    const inspect_options *o = options;
    char                   format[KVQ_FORMAT_NAME];
    (void)exit_code; // damage is an error (4), not a verdict

    if (o->file == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "the artifact is missing");
    kvq_status status = kvq_file_format(&cli->ctx, o->file, format, err);
    if (status != KVQ_OK) return status;
    // whatever else it is, the reader of artifacts says so and names the program to use
    return strcmp(format, "kvq.measurement") == 0 ? inspect_measurement(cli, o, err) : inspect_artifact(cli, o, err);
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-inspect",
    .summary = "Shows what an artifact or a measurement holds and where it comes from, and verifies it.",
    .synopsis = "OUT.kvq.h5 [--check] [--json] [--layer N] [--tensor k|v] [--codebook]\n"
                "OUT.kvqm.h5 [--check] [--json] [--layer N] [--tensor q|k|v] [--fraction F] [--spectrum]\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "examples:\n"
             "  kvq-inspect l31.kvq.h5\n"
             "  kvq-inspect l31.kvq.h5 --layer 3 --tensor k --codebook\n",
    .run = run,
};

int main(int argc, char **argv) {
    inspect_options options = {.layer = -1, .fraction = -1};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
