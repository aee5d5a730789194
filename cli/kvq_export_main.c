// SPDX-License-Identifier: Apache-2.0
//
// kvq-export: an artifact in the form that something else reads.
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"

#define MAX_TARGETS 64

typedef struct export_options {
    kvq_cli_common common;
    const char    *artifact, *target, *model, *output;
    bool           check, list_targets, json, force;
} export_options;

#define AT(field) offsetof(export_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"OUT.kvq.h5", 0, CLI_OPERAND, AT(artifact), NULL, .help = "the artifact"},
    {"to", 0, CLI_TEXT, AT(target), "TARGET", .help = "what to write; --list-targets shows them"},
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "refuse when the artifact was not made for this model"},
    {"check", 0, CLI_FLAG, AT(check), NULL, .help = "read the result back and compare every number"},
    {"force", 'f', CLI_FLAG, AT(force), NULL, .help = "replace an existing output"},
    {"output", 'o', CLI_TEXT, AT(output), "FILE", .help = "the file to write"},
    {"list-targets", 0, CLI_FLAG, AT(list_targets), NULL, .help = "print the targets and exit"},
    {"json", 0, CLI_FLAG, AT(json), NULL, .help = "with --list-targets: one JSON document (kvq.targets/1)"},
};
#undef AT

// ---------------------------------------------------------------- targets

static kvq_status list_targets(bool as_json, kvq_error *err) {
    int                      n;
    const kvq_export_target *targets = kvq_export_targets(&n);
    if (!as_json) {
        for (int i = 0; i < n; i++) {
            printf("%-16s %s\n%-16s   read by %s\n%-16s   carries %s\n", targets[i].name, targets[i].files, "",
                   targets[i].consumer, "", targets[i].carries);
        }
        return KVQ_OK;
    }
    kvq_json json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "schema", "kvq.targets/1");
    cJSON *array = kvq_json_array(&json, json.root, "targets");
    for (int i = 0; i < n; i++) {
        cJSON *target = kvq_json_object(&json, array, NULL);
        kvq_json_text(&json, target, "name", targets[i].name);
        kvq_json_text(&json, target, "files", targets[i].files);
        kvq_json_text(&json, target, "consumer", targets[i].consumer);
        kvq_json_text(&json, target, "carries", targets[i].carries);
    }
    kvq_status status = kvq_json_print(&json, err);
    kvq_json_free(&json);
    return status;
}

static kvq_status find_target(const char *name, const kvq_export_target **out, kvq_error *err) {
    int                      n;
    const kvq_export_target *targets = kvq_export_targets(&n);
    const char              *names[MAX_TARGETS];
    char                     next[160];
    *out = kvq_export_find(name);
    if (*out != NULL) return KVQ_OK;
    if (n > MAX_TARGETS) n = MAX_TARGETS;
    for (int i = 0; i < n; i++) names[i] = targets[i].name;
    const char *closest = kvq_cli_closest(name, names, n);
    (void)snprintf(next, sizeof next, "%s%s%skvq-export --list-targets shows all",
                   closest != NULL ? "did you mean " : "", closest != NULL ? closest : "", closest != NULL ? "? " : "");
    return kvq_fail(err, KVQ_ERR_USAGE, next, "--to %s: there is no such target", name);
}

// ---------------------------------------------------------------- one run

static kvq_status check_options(const export_options *o, kvq_error *err) {
    if (o->json) return kvq_fail(err, KVQ_ERR_USAGE, "leave --json out", "--json: belongs to --list-targets");
    if (o->artifact == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "the artifact is missing");
    if (o->target == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "kvq-export --list-targets shows what there is", "--to is missing");
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    return KVQ_OK;
}

static kvq_status check_model(kvq_cli *cli, const char *path, const kvq_artifact *artifact, kvq_error *err) {
    kvq_status              status = KVQ_OK;
    kvq_checkpoint         *checkpoint = NULL;
    kvq_checkpoint_identity identity;
    KVQ_TRY(kvq_checkpoint_open(&cli->ctx, path, &checkpoint, err));
    KVQ_TRY(kvq_checkpoint_identify(&cli->ctx, checkpoint, &identity, err));
    KVQ_TRY(kvq_artifact_matches(artifact, kvq_checkpoint_config(checkpoint), &identity, err));

done:
    kvq_checkpoint_close(&cli->ctx, &checkpoint);
    return status;
}

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const export_options    *o = options;
    const kvq_export_target *target;
    kvq_artifact            *artifact = NULL;
    char                     content_sha256[KVQ_SHA256_HEX];
    double                   max_error = 0;

    if (o->list_targets) return list_targets(o->json, err);
    KVQ_TRY(check_options(o, err));
    KVQ_TRY(find_target(o->target, &target, err));
    KVQ_TRY(kvq_artifact_read(&cli->ctx, o->artifact, &artifact, content_sha256, err));
    if (o->model != NULL) KVQ_TRY(check_model(cli, o->model, artifact, err));
    const char *inputs[] = {o->artifact, o->model};
    KVQ_TRY(kvq_cli_check_output(cli, o->output, o->force, inputs, CLI_COUNT_OF(inputs), err));
    KVQ_TRY(target->write(&cli->ctx, artifact, content_sha256, o->output, o->force, err));
    if (o->check) KVQ_TRY(target->check(&cli->ctx, artifact, content_sha256, o->output, &max_error, err));

    kvq_cli_end_progress(cli);
    printf("wrote %s  %s", o->output, target->name);
    if (o->check) printf("  checked: largest error %g", max_error);
    printf("\n");
    if (!(max_error <= 0)) *exit_code = CLI_VERDICT_NEGATIVE; // every target is exact; NaN is no match either
    if (o->check) {
        kvq_cli_next(cli, "kvq-validate", "--model", o->model != NULL ? o->model : "MODEL", "--artifact", o->artifact,
                     "--text", "HELD_OUT.txt", NULL);
    } else {
        kvq_cli_next(cli, "kvq-export", o->artifact, "--to", o->target, "-o", o->output, "--force", "--check", NULL);
    }

done:
    kvq_artifact_destroy(&cli->ctx, &artifact);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-export",
    .summary = "Writes an artifact in a form that other programs read.",
    .synopsis = "OUT.kvq.h5 --to TARGET [--model PATH] -o FILE [--check]\n"
                "--list-targets [--json]\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "examples:\n"
             "  kvq-export l31.kvq.h5 --to safetensors -o l31.safetensors --check\n"
             "  kvq-export --list-targets\n",
    .run = run,
};

int main(int argc, char **argv) {
    export_options options = {.artifact = NULL};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
