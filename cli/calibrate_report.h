// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-calibrate: one run, and what is said and recorded about it.
#ifndef KVQ_CALIBRATE_REPORT_H
#define KVQ_CALIBRATE_REPORT_H

#include "kvq_cli.h"

#define MAX_FINGERPRINT 24

typedef struct calibrate_options {
    kvq_cli_common common;
    kvq_cli_source source;
    const char    *model, *output, *work_dir, *shard, *thresholds, *capture;
    int64_t        samples, seq_len, bits, k_bits, v_bits, sink_tokens; // bits: 0 = not given
    kvq_cli_seed   seed;
    double         outliers;
    int            weighting;                   // kvq_weighting
    int            compute;                     // kvq_compute
    int64_t        memory_limit, scratch_limit; // bytes, 0 = none
    bool           force, dry_run, restart;
} calibrate_options;

typedef struct calibration {
    const calibrate_options *o;
    kvq_calib_options        options;
    kvq_calib_plan           plan;
    double                   writing_bytes; // memory while the model writes its own text, 0 = it does not
    kvq_sweep_options        sweep;
    kvq_processes            processes;
    bool                     finished; // the output is what this run wrote before it was killed
    char                     work_dir[CLI_MAX_PATH];
    kvq_field                fingerprint[MAX_FINGERPRINT];
    int64_t                  n_fingerprint;
    int64_t                  seq_len;
    kvq_checkpoint          *checkpoint;
    kvq_checkpoint_identity  identity;
    kvq_backend             *be;
    kvq_model               *model;
    kvq_windows              windows;
    kvq_cli_tokenizer        tokenizer;
    kvq_artifact            *artifact;
    char                     content_sha256[KVQ_SHA256_HEX];
    double                   start_s;
} calibration;

void print_calibration_plan(kvq_cli *cli, const calibration *c);
void make_fingerprint(calibration *c);
// Fills identity and provenance of the artifact: what the sweeps, which record the shapes, cannot know. A capture
// brings its identity along, so it needs the provenance alone.
kvq_status record_provenance(kvq_cli *cli, const calibration *c, kvq_error *err);
kvq_status record_identity(kvq_cli *cli, const calibration *c, kvq_error *err);
void       print_shard_summary(kvq_cli *cli, const calibration *c);
kvq_status print_calibration_summary(kvq_cli *cli, const calibration *c, kvq_error *err);

#endif
