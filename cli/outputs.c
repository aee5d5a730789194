// SPDX-License-Identifier: Apache-2.0
//
// Where a program may write. Outputs replace files by renaming, so an output that is one of the inputs would take the
// place of a model or a text; --force means an older output, not that.
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "kvq_cli.h"

#define ARTIFACT_SUFFIX ".kvq.h5"

static bool same_file(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

static bool ends_with(const char *text, const char *suffix) {
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && strcmp(text + n - m, suffix) == 0;
}

// Of a folder that is an input (a model) only artifacts may be replaced.
static bool is_part_of(const char *output, const struct stat *input) {
    char        folder[4096];
    struct stat info;
    int         n = (int)(kvq_file_name(output) - output);
    if (!S_ISDIR(input->st_mode) || ends_with(output, ARTIFACT_SUFFIX)) return false;
    (void)snprintf(folder, sizeof folder, "%.*s", n > 0 ? n : 1, n > 0 ? output : ".");
    return stat(folder, &info) == 0 && same_file(&info, input);
}

kvq_status kvq_cli_check_output_of(kvq_cli *cli, const char *option, const char *output, bool force,
                                   const char *const *inputs, int n_inputs, kvq_error *err) {
    struct stat at, input;
    kvq_output  trial;
    if (strcmp(output, "-") == 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give a file name", "%s -: results are not written to a pipe", option);
    }
    for (int i = 0; i < n_inputs && stat(output, &at) == 0; i++) {
        if (inputs[i] == NULL || stat(inputs[i], &input) != 0) continue;
        if (!same_file(&at, &input) && !is_part_of(output, &input)) continue;
        return kvq_fail(err, KVQ_ERR_USAGE, "choose another name", "%s %s: this file is an input, or belongs to %s",
                        option, output, inputs[i]);
    }
    // tried before hours are spent on it
    kvq_status status = kvq_output_begin(&cli->ctx, output, force, &trial, err);
    if (status == KVQ_OK) kvq_output_discard(&cli->ctx, &trial);
    return status;
}

kvq_status kvq_cli_check_output(kvq_cli *cli, const char *output, bool force, const char *const *inputs, int n_inputs,
                                kvq_error *err) {
    return kvq_cli_check_output_of(cli, "--output", output, force, inputs, n_inputs, err);
}

kvq_status kvq_cli_work_dir(const char *wanted, const char *output, char out[CLI_MAX_PATH], kvq_error *err) {
    int length = snprintf(out, CLI_MAX_PATH, wanted != NULL ? "%s" : "%s.work", wanted != NULL ? wanted : output);
    if (length < CLI_MAX_PATH) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--work-dir: the path is longer than %d characters", CLI_MAX_PATH - 6);
}
