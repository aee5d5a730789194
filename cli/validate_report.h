// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-validate: everything a report says, and its forms. stdout has a table or JSON; the other forms are
// files, one renderer each.
#ifndef KVQ_VALIDATE_REPORT_H
#define KVQ_VALIDATE_REPORT_H

#include "kvq_cli.h"
#include "validate_passkey.h"

#define VALIDATE_MAX_GATES (CLI_MAX_LIST + 1) // those of --gate, and the one that --max-regression stands for

typedef struct validate_report {
    const kvq_model_config *config;   // borrowed, as are artifact and gates
    const kvq_artifact     *artifact; // NULL: baseline only
    const kvq_backend      *be;       // what computed
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
    kvq_judgement           judgements[VALIDATE_MAX_GATES]; // of the gates
    bool                    open_fails;                     // what is inconclusive counts as failed
    const char             *earlier_name;                   // file of the earlier report, NULL = none
    kvq_report_baseline     earlier;
    const char             *command; // that measures the same again
} validate_report;

int        count_gates(const validate_report *r, kvq_verdict verdict);
void       format_estimate(kvq_estimate x, double scale, int digits, const char *unit, char *out, size_t n);
void       print_report_text(const validate_report *r);
kvq_status print_report_json(const validate_report *r, kvq_error *err);

// ---------------------------------------------------------------- numbers (validate_numbers.c)

typedef enum number_unit { UNIT_NONE, UNIT_NATS, UNIT_SHARE, UNIT_BITS, UNIT_COUNT } number_unit;

// One number of a report, under one name in every form. What gates can judge is called as gates call it.
typedef struct named_number {
    const char  *name;  // "kld.mean"
    const char  *title; // "KL divergence, mean"; NULL: one of many, of a bucket or a layer
    number_unit  unit;
    int          digits; // behind the point, of a share in percent
    bool         more_is_better;
    kvq_estimate x; // of a number that has no error, all but the value are NaN
} named_number;

typedef void number_visitor(void *user, const named_number *number);
// Every number that was measured, in the order of a report; `all`: also those without a title.
void visit_numbers(const validate_report *r, bool all, number_visitor *visit, void *user);

#define NUMBER_TEXT 48
// Any x in the form of a number: "0.61 %"; not known: the text `unknown`.
void format_number(const named_number *number, double x, const char *unknown, char out[NUMBER_TEXT]);
// The same without the unit, and the unit.
void        format_digits(const named_number *number, double x, const char *unknown, char out[NUMBER_TEXT]);
const char *number_unit_name(const named_number *number); // "%", "nats", "bits" or ""
// Of a gate: its metric, unit and digits, with x as measured.
named_number gate_number(const validate_report *r, int gate);

// The outcome of all gates: "PASS", "FAIL", "INCONCLUSIVE", or without any "MEASURED".
const char *report_outcome(const validate_report *r);
// What was measured in one sentence, and the sources in lines of a name and a text.
void report_headline(const validate_report *r, char *out, size_t n);
#define MAX_FACTS 8
typedef struct report_fact {
    const char *name;
    char        text[640];
} report_fact;
int report_facts(const validate_report *r, report_fact facts[MAX_FACTS]);
// The layers with the largest errors of attention, at most n of them, the worst one first.
int worst_layers(const validate_report *r, int64_t *layers, int n);

// What calibration knew of a tensor, to be held against what is measured now: its held-out windows, or without them the
// fit. NaN: not known.
typedef struct calibrated_tensor {
    double nmse, outlier_share, clipped_share, code_use;
} calibrated_tensor;
calibrated_tensor calibrated_of(const kvq_tensor_quant *t);

// ---------------------------------------------------------------- files (validate_outputs.c)

typedef struct validate_outputs {
    const char *junit, *markdown, *csv, *html, *lm_eval_json; // NULL = not wanted
    bool        force;
} validate_outputs;

// clang-format off
#define VALIDATE_OUTPUT_ROWS                                                                                           \
    {"junit", 0, CLI_TEXT, AT(outputs.junit), "FILE", .help = "JUnit XML: a test case per gate", .aside = true},       \
    {"markdown", 0, CLI_TEXT, AT(outputs.markdown), "FILE",                                                            \
     .help = "a short summary; auto: added to the one of GitHub's job", .aside = true},                                \
    {"html", 0, CLI_TEXT, AT(outputs.html), "FILE", .help = "one page with tables and pictures (by gnuplot)",          \
     .aside = true},                                                                                                   \
    {"csv", 0, CLI_TEXT, AT(outputs.csv), "FILE", .help = "errors of each layer", .rare = true, .aside = true},        \
    {"lm-eval-json", 0, CLI_TEXT, AT(outputs.lm_eval_json), "FILE",                                                    \
     .help = "results as lm-evaluation-harness writes them", .rare = true, .aside = true},                             \
    {"force", 'f', CLI_FLAG, AT(outputs.force), NULL, .help = "replace existing reports", .aside = true}
// clang-format on

bool wants_report_files(const validate_outputs *outputs);
// Before a run: everything that can be wrong about the files, so that no result is lost. inputs: a path or NULL each.
// has_layers: errors of layers will be measured.
kvq_status check_report_files(kvq_cli *cli, const validate_outputs *outputs, bool has_layers, const char *const *inputs,
                              int n_inputs, kvq_error *err);
// Writes every file that is wanted, also when one fails; the first failure is returned.
kvq_status write_report_files(kvq_cli *cli, const validate_outputs *outputs, const validate_report *r, kvq_error *err);

// A renderer writes its form to `out`; the caller looks whether that could be written.
typedef kvq_status report_renderer(kvq_cli *cli, const validate_report *r, FILE *out, kvq_error *err);
report_renderer    render_junit, render_markdown, render_csv, render_html, render_lm_eval;

// ---------------------------------------------------------------- pictures (validate_plots.c)

typedef struct report_plot {
    const char *title, *caption;
    bool        wide; // takes the whole width of a page
    bool (*has_data)(const validate_report *r);
    void (*script)(const validate_report *r, FILE *to); // commands of gnuplot, behind those that all plots begin with
} report_plot;
const report_plot *report_plots(int *n);
void               begin_plot(const report_plot *plot, FILE *to); // those commands

#endif
