// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-validate: everything a report says, and its two forms.
#ifndef KVQ_VALIDATE_REPORT_H
#define KVQ_VALIDATE_REPORT_H

#include "kvq_cli.h"
#include "validate_passkey.h"

typedef struct validate_report {
    const kvq_model_config *config;   // borrowed, as are artifact and gates
    const kvq_artifact     *artifact; // NULL: baseline only
    const char             *artifact_name;
    char                    artifact_sha256[KVQ_SHA256_HEX];
    kvq_checkpoint_identity identity;
    kvq_windows             windows;
    kvq_cli_tokenizer       tokenizer;
    int                     bos, compute; // kvq_bos_policy, kvq_compute
    bool                    self, weights_checked;
    uint64_t                seed; // of self text, of pass keys
    passkey_report          passkey;
    kvq_validation          validation; // with pass keys only has_artifact, options and passkey are set
    const kvq_gate         *gates;
    int                     n_gates;
    kvq_judgement           judgements[CLI_MAX_LIST]; // of the gates
} validate_report;

int        count_gates(const validate_report *r, kvq_verdict verdict);
void       format_estimate(kvq_estimate x, double scale, int digits, const char *unit, char *out, size_t n);
void       print_report_text(const validate_report *r);
kvq_status print_report_json(const validate_report *r, kvq_error *err);

#endif
