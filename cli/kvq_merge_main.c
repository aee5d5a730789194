// SPDX-License-Identifier: Apache-2.0
//
// kvq-merge: the shards of one round of a calibration in, thresholds or the artifact out.
#include <stdio.h>

#include "kvq_cli.h"

typedef struct merge_options {
    kvq_cli_common common;
    kvq_cli_list   shards;
    const char    *output;
    bool           force;
} merge_options;

#define AT(field) offsetof(merge_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"SHARD.kvqp...", 0, CLI_OPERANDS, AT(shards), NULL, .help = "what all runs of kvq-calibrate --shard wrote"},
    {"force", 'f', CLI_FLAG, AT(force), NULL, .help = "replace an existing output"},
    {"output", 'o', CLI_TEXT, AT(output), "FILE", .help = "thresholds (first round) or the artifact (second round)"},
};
#undef AT

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    const merge_options *o = options;
    kvq_status           status = KVQ_OK;
    kvq_round            round;
    char                 content_sha256[KVQ_SHA256_HEX];
    (void)exit_code; // a merge has no negative verdict
    if (o->shards.count == 0) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "no shards are given");
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    KVQ_TRY(kvq_cli_check_output(cli, o->output, o->force, o->shards.items, o->shards.count, err));
    KVQ_TRY(kvq_merge(&cli->ctx, o->shards.items, o->shards.count, o->output, o->force, &round, content_sha256, err));
    if (round == KVQ_ROUND_ENDS) {
        printf("wrote %s  thresholds of %d shards\n", o->output, o->shards.count);
        kvq_cli_next(cli, "kvq-calibrate", "THE_SAME_OPTIONS", "--shard", "I/N", "--work-dir", "THE_SAME",
                     "--thresholds", o->output, "-o", "SHARD_I.round2.kvqp", NULL);
    } else {
        printf("wrote %s  from %d shards  content sha256 %s\n", o->output, o->shards.count, content_sha256);
        kvq_cli_next(cli, "kvq-validate", "--model", "MODEL", "--artifact", o->output, "--text", "HELD_OUT.txt", NULL);
    }
done:
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-merge",
    .summary = "Puts the shards of a calibration together; the result has the same bytes as that of one run.",
    .synopsis = "SHARD.kvqp... [--force] -o FILE\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "examples: two rounds, each shard on any machine of the same kind, with its own work directory kept in "
             "between:\n"
             "  kvq-calibrate ... --shard 0/2 --work-dir w0 -o a0.kvqp    (and 1/2)\n"
             "  kvq-merge a0.kvqp a1.kvqp -o thresholds.kvqp\n"
             "  kvq-calibrate ... --shard 0/2 --work-dir w0 --thresholds thresholds.kvqp -o b0.kvqp    (and 1/2)\n"
             "  kvq-merge b0.kvqp b1.kvqp -o OUT.kvq.h5\n",
    .run = run,
};

int main(int argc, char **argv) {
    merge_options options = {.force = false};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
