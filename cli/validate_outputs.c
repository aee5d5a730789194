// SPDX-License-Identifier: Apache-2.0
//
// The report files of kvq-validate: which there are, what is checked before hours are spent on them, and how they come
// to be. A renderer writes into memory; io puts that in place as a whole.
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "validate_report.h"

typedef struct report_kind {
    const char      *option;
    size_t           at; // of its file name in validate_outputs
    report_renderer *render;
} report_kind;

#define AT(field) offsetof(validate_outputs, field)
static const report_kind KINDS[] = {
    {"--junit", AT(junit), render_junit}, {"--markdown", AT(markdown), render_markdown},
    {"--csv", AT(csv), render_csv},       {"--lm-eval-json", AT(lm_eval_json), render_lm_eval},
    {"--html", AT(html), render_html}, // last: it waits for another program
};
#undef AT
#define N_KINDS CLI_COUNT_OF(KINDS)

static const char *file_of(const validate_outputs *outputs, int kind) {
    return *(const char *const *)((const char *)outputs + KINDS[kind].at);
}

bool wants_report_files(const validate_outputs *outputs) {
    for (int i = 0; i < N_KINDS; i++) {
        if (file_of(outputs, i) != NULL) return true;
    }
    return false;
}

// `--markdown auto` adds to the summary of a job, which others write to as well.
static bool is_shared(const validate_outputs *outputs, const char *file) {
    return file == outputs->markdown && strcmp(file, "auto") == 0;
}
static const char *shared_summary(void) {
    const char *file = getenv("GITHUB_STEP_SUMMARY");
    return file != NULL && file[0] != 0 ? file : NULL;
}

// ---------------------------------------------------------------- before the run

// Also for files that do not exist yet: the same name in the same folder.
static bool same_place(const char *a, const char *b) {
    char        folder[2][CLI_MAX_PATH];
    const char *paths[2] = {a, b};
    struct stat info[2];
    if (strcmp(kvq_file_name(a), kvq_file_name(b)) != 0) return false;
    for (int i = 0; i < 2; i++) {
        int length = (int)(kvq_file_name(paths[i]) - paths[i]);
        (void)snprintf(folder[i], CLI_MAX_PATH, "%.*s.", length, paths[i]);
        if (stat(folder[i], &info[i]) != 0) return false;
    }
    return info[0].st_dev == info[1].st_dev && info[0].st_ino == info[1].st_ino;
}

static kvq_status check_apart(const validate_outputs *outputs, int kind, kvq_error *err) {
    const char *file = file_of(outputs, kind);
    for (int other = 0; other < kind; other++) {
        const char *taken = file_of(outputs, other);
        if (taken == NULL || is_shared(outputs, taken) || !same_place(file, taken)) continue;
        return kvq_fail(err, KVQ_ERR_USAGE, "choose another name", "%s %s: %s has the same file", KINDS[kind].option,
                        file, KINDS[other].option);
    }
    return KVQ_OK;
}

static kvq_status check_summary(kvq_error *err) {
    const char *summary = shared_summary();
    if (summary != NULL) return kvq_append_file(summary, "", 0, err);
    return kvq_fail(err, KVQ_ERR_USAGE, "give a file name", "--markdown auto: GITHUB_STEP_SUMMARY is not set");
}

kvq_status check_report_files(kvq_cli *cli, const validate_outputs *outputs, bool has_layers, const char *const *inputs,
                              int n_inputs, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (outputs->csv != NULL && !has_layers) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, "leave --csv out",
                         "--csv: errors of layers are measured with --artifact and --layer-windows above 0 only"));
    }
    for (int i = 0; i < N_KINDS; i++) {
        const char *file = file_of(outputs, i);
        if (file == NULL) continue;
        if (is_shared(outputs, file)) {
            KVQ_TRY(check_summary(err));
            continue;
        }
        KVQ_TRY(kvq_cli_check_output_of(cli, KINDS[i].option, file, outputs->force, inputs, n_inputs, err));
        KVQ_TRY(check_apart(outputs, i, err));
    }

done:
    return status;
}

// ---------------------------------------------------------------- after it

static kvq_status write_one(kvq_cli *cli, const validate_outputs *outputs, int kind, const validate_report *r,
                            kvq_error *err) {
    const char *file = file_of(outputs, kind);
    char       *text = NULL;
    size_t      bytes = 0;
    FILE       *out = open_memstream(&text, &bytes);
    if (out == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for the report", file);
    kvq_status status = KINDS[kind].render(cli, r, out, err);
    bool       written = ferror(out) == 0;
    written = fclose(out) == 0 && written;
    if (status == KVQ_OK && !written) status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for it", file);
    if (status == KVQ_OK && is_shared(outputs, file))
        status = kvq_append_file(shared_summary(), text, bytes, err);
    else if (status == KVQ_OK)
        status = kvq_write_file(&cli->ctx, file, outputs->force, text, bytes, err);
    free(text);
    return status;
}

kvq_status write_report_files(kvq_cli *cli, const validate_outputs *outputs, const validate_report *r, kvq_error *err) {
    kvq_status first = KVQ_OK;
    for (int i = 0; i < N_KINDS; i++) {
        if (file_of(outputs, i) == NULL) continue;
        kvq_status status = write_one(cli, outputs, i, r, first == KVQ_OK ? err : NULL);
        if (first == KVQ_OK) first = status;
    }
    return first;
}
