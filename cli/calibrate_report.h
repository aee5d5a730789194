// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-calibrate: one run, what its options mean, and what is said and recorded about it.
#ifndef KVQ_CALIBRATE_REPORT_H
#define KVQ_CALIBRATE_REPORT_H

#include "kvq_cli.h"

#define MAX_FINGERPRINT 64
#define NOT_GIVEN       (-1) // of a choice or count that has no default of its own

// Of the channel-allocated format; see calibrate_allocated.c.
typedef struct allocated_options {
    double      target_bits, k_bits, v_bits;                             // 0 = not given
    int64_t     target_tokens, target_sequences, width_group, kl_tokens; // 0 = not given; kl_tokens: NOT_GIVEN
    const char *k_widths, *v_rates, *widths_from;
    int         preset;                                // NOT_GIVEN, or index of calibrate_preset_names
    int         scope, tables, v_dim, scale, rotation; // choices
    bool        measure;                               // also measure what the format needs
} allocated_options;

typedef struct calibrate_options {
    kvq_cli_common    common;
    kvq_cli_source    source;
    const char       *model, *output, *work_dir, *shard, *thresholds, *capture, *from;
    int64_t           samples, seq_len, bits, k_bits, v_bits;        // bits: 0 = not given
    int64_t           sink_tokens, recent_window, k_slots, held_out; // sink_tokens: NOT_GIVEN
    kvq_cli_seed      seed;
    kvq_cli_fractions outliers;
    int               datatype, k_datatype, v_datatype; // kvq_datatype, or NOT_GIVEN
    int               weighting;                        // kvq_weighting, or NOT_GIVEN
    int               groups, k_axis, k_domain, threshold_scope, draw, compat;
    kvq_cli_engine    engine;
    allocated_options allocated;
    int64_t           memory_limit, scratch_limit; // bytes, 0 = none
    bool              force, dry_run, restart, measure_only, eigenvectors, q_norm, compare_lloyd, count_sinks;
} calibrate_options;

// calibrate_options.c: how the choices are spelled, in the order of their values.
extern const char *const calibrate_group_names[];  // layer, head
extern const char *const calibrate_draw_names[];   // kvq, python
extern const char *const calibrate_compat_names[]; // none, kvquant

// calibrate_allocated.c: likewise.
extern const char *const calibrate_preset_names[];
extern const char *const calibrate_v_dim_names[]; // 1, 2

typedef struct calibration {
    const calibrate_options *o;
    kvq_calib_options        options;
    kvq_measure_options      measured;  // by the sweeps: what a fit needs, or all of options.measure
    bool                     allocated; // the artifact is of scheme "alloc"
    kvq_alloc_options        alloc;
    int64_t                  kl_tokens; // on which the sensitivity of single tensors is measured
    kvq_calib_plan           plan;
    double                   writing_bytes; // memory while the model writes its own text, 0 = it does not
    kvq_sweep_options        sweep;
    kvq_processes            processes;
    bool                     finished; // the output is what this run wrote before it was killed
    bool                     python_draw;
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
    kvq_measurement         *measurement; // --from
    kvq_artifact            *like;        // --widths-from
    kvq_artifact            *artifact;
    char                     content_sha256[KVQ_SHA256_HEX];
    double                   start_s;
} calibration;

// The first option of a list that was given, or NULL (calibrate_options.c).
typedef struct named_option {
    const char *name;
    bool        given;
} named_option;
const char *find_given(const named_option *options, int n);

// Contradictions, and what every kind of run needs. KVQ_ERR_USAGE.
kvq_status check_calibrate_options(const calibrate_options *o, int n_ranks, kvq_error *err);
// Fills what a calibration knows from its options alone.
kvq_status resolve_calibrate_options(calibration *c, kvq_error *err);
// A warning when outliers of the first token will find no slots.
void warn_of_cut_sinks(const kvq_cli *cli, const calibration *c);

// Every setting that decides the result of a fit or a measurement, as it took effect; the same list is recorded in the
// artifact and compared before a run goes on. Returns the number of settings.
#define MAX_SETTINGS 48
typedef struct setting {
    const char *name, *text; // text NULL: a number
    double      number;
} setting;
int list_settings(const calibration *c, setting out[MAX_SETTINGS]);

void print_calibration_plan(kvq_cli *cli, const calibration *c);
void print_quantizer(kvq_cli *cli, const calibration *c);
void make_fingerprint(calibration *c);
// Fills identity and provenance of the artifact: what the sweeps, which record the shapes, cannot know. A capture
// brings its identity along, so it needs the provenance alone.
kvq_status record_provenance(kvq_cli *cli, const calibration *c, kvq_error *err);
kvq_status record_identity(kvq_cli *cli, const calibration *c, kvq_error *err);
void       print_shard_summary(kvq_cli *cli, const calibration *c);
void       print_memory(kvq_cli *cli, const calibration *c); // the plan against what was
kvq_status print_calibration_summary(kvq_cli *cli, const calibration *c, kvq_error *err);

// calibrate_prepare.c: the model, the windows and the plan; with them a run can start, and a dry run ends.
kvq_status prepare_calibration(kvq_cli *cli, calibration *c, kvq_error *err);
kvq_status open_model(kvq_cli *cli, calibration *c, kvq_error *err);
kvq_status find_windows(kvq_cli *cli, calibration *c, kvq_error *err);
bool       continues(const calibration *c); // the work directory holds a run that this one would continue

// calibrate_allocated.c: artifacts of scheme "alloc".
kvq_status check_allocated_options(const calibrate_options *o, kvq_error *err);
kvq_status resolve_allocated_options(calibration *c, kvq_error *err);
// Reads the artifact of --widths-from, if it is given; what does not fit should be known before a run.
kvq_status open_widths(kvq_cli *cli, calibration *c, kvq_error *err);
// Called when c->seq_len is known.
void       complete_allocated_options(calibration *c, int64_t head_dim);
void       set_by_shape(calibration *c, int64_t head_dim); // what depends on windows and heads
void       print_allocated(kvq_cli *cli, const calibration *c);
void       print_allocated_size(kvq_cli *cli, const calibration *c);
void       list_allocated(const calibration *c, setting list[MAX_SETTINGS], int *n);
double     sensitivity_tera_flops(const calibration *c);
int64_t    sensitivity_bytes(const calibration *c);                          // of memory, 0 when it is not measured
kvq_status run_allocated(kvq_cli *cli, calibration *c, kvq_error *err);      // c->artifact from a model
kvq_status fit_allocated_from(kvq_cli *cli, calibration *c, kvq_error *err); // c->artifact from a measurement
// After kvq_measure: the KL of single tensors into c->artifact.
kvq_status measure_sensitivity(kvq_cli *cli, calibration *c, kvq_error *err);

// calibrate_measured.c: measurements into files, and fits from them.
kvq_status run_measurement(kvq_cli *cli, calibration *c, kvq_error *err);
kvq_status run_from(kvq_cli *cli, calibration *c, kvq_error *err);
// Errors on the held-out windows into the artifact, when there are any.
kvq_status measure_held_out(kvq_cli *cli, calibration *c, kvq_error *err);

#endif
