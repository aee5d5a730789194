// SPDX-License-Identifier: Apache-2.0
// Private to kvq-validate: its options, and what they mean together.
#ifndef KVQ_VALIDATE_OPTIONS_H
#define KVQ_VALIDATE_OPTIONS_H

#include "validate_passkey.h"
#include "validate_report.h"

typedef struct validate_options {
    kvq_cli_common   common;
    kvq_cli_source   source;
    passkey_wanted   passkey; // instead of source
    const char      *model, *artifact;
    int64_t          seq_len, windows; // 0 = not given
    kvq_cli_seed     seed;
    kvq_cli_list     gates;
    kvq_cli_engine   engine;
    int              protocol; // kvq_protocol, VALIDATE_NO_PROTOCOL = not given, which means prefill
    int64_t          prompt;   // 0 = not given
    int64_t          layer_windows, noise_windows;
    int              gate_mode, inconclusive; // VALIDATE_BY_..., VALIDATE_OPEN_...
    bool             json, allow_other_weights;
    const char      *baseline;       // an earlier report, or NULL
    double           max_regression; // VALIDATE_NOT_LIMITED = not given
    validate_outputs outputs;
} validate_options;

#define VALIDATE_NO_PROTOCOL (-1)
#define VALIDATE_NOT_LIMITED (-1.0)
enum { VALIDATE_BY_INTERVAL, VALIDATE_BY_POINT };
enum { VALIDATE_OPEN_IS_A_CODE, VALIDATE_OPEN_PASSES, VALIDATE_OPEN_FAILS };

extern const validate_options validate_defaults;
extern const kvq_cli_program  validate_program;
kvq_status                    validate_run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err);

// Everything that is wrong about options before anything is opened; KVQ_ERR_USAGE, or what a text or an output that
// cannot be used gives. gates [VALIDATE_MAX_GATES] are those of the command line and, last, the one that
// --max-regression is another word for; plan: lengths, depths and trials of pass keys.
kvq_status validate_check_options(kvq_cli *cli, const validate_options *o, kvq_gate *gates, int *n_gates,
                                  passkey_report *plan, kvq_error *err);

#endif
