// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-validate: the test that hides pass keys in windows, --passkey.
#ifndef KVQ_VALIDATE_PASSKEY_H
#define KVQ_VALIDATE_PASSKEY_H

#include "kvq_cli.h"

typedef struct passkey_wanted {
    const char       *lengths; // as given; NULL: no such test
    kvq_cli_fractions depths;
    int64_t           trials; // of each length and depth; 0 = not given
} passkey_wanted;
#define PASSKEY_TRIALS 3

// Rows of the option table; AT(passkey.lengths) must be what the table calls it.
// clang-format off
#define PASSKEY_ROWS                                                                                                   \
    {"passkey", 0, CLI_TEXT, AT(passkey.lengths), "S,S",                                                               \
     .help = "instead of a text: is a hidden number found in windows of so many tokens? 1k,2k (k = 1024)"},            \
    {"depths", 0, CLI_FRACTIONS, AT(passkey.depths), "F,F",                                                            \
     .help = "where it is hidden (0%,25%,50%,75%,100%)", .min = 0, .max = 1},                                          \
    {"passkey-trials", 0, CLI_COUNT, AT(passkey.trials), "N", .help = "windows of each length and depth (3)",          \
     .min = 1, .max = 1000}
// clang-format on

#define PASSKEY_MAX_LENGTHS 16
typedef struct passkey_report {
    int              n_lengths; // 0: there is no such test
    int64_t          lengths[PASSKEY_MAX_LENGTHS];
    int              n_depths;
    int64_t          n_trials;
    kvq_passkeys     windows[PASSKEY_MAX_LENGTHS];
    kvq_passkey_cell cells[PASSKEY_MAX_LENGTHS * KVQ_MAX_FRACTIONS]; // [n_lengths, n_depths]
    kvq_passkey_cell all;                                            // sums; its seq_len and depth mean nothing
    kvq_estimate     kept;
} passkey_report;

// Lengths, depths and trials as they take effect. KVQ_ERR_USAGE for a list of lengths that is none.
kvq_status passkey_plan(const passkey_wanted *options, passkey_report *out, kvq_error *err);
// Makes the windows. KVQ_ERR_USAGE for lengths that the model has no positions for, or that leave no room for filler.
kvq_status passkey_prepare(kvq_cli *cli, const kvq_model_config *config, const char *model_path, int bos, uint64_t seed,
                           passkey_report *report, kvq_cli_tokenizer *tokenizer, kvq_error *err);
kvq_validate_cost passkey_cost(const kvq_model *model, const passkey_report *report);
kvq_status        passkey_run(kvq_cli *cli, const kvq_backend *be, kvq_model *model, const kvq_artifact *artifact,
                              passkey_report *report, kvq_error *err);
void              passkey_free(kvq_cli *cli, passkey_report *report);

void passkey_say(kvq_cli *cli, const passkey_report *report);                 // its line of the plan
void passkey_print(const passkey_report *report);                             // a table on stdout
void passkey_add(kvq_json *json, const passkey_report *report, uint64_t seed, // an object "passkey" in the root
                 int bos, const kvq_cli_tokenizer *tokenizer);

#endif
