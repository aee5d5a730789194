// SPDX-License-Identifier: Apache-2.0
//
// Private to the programs: what all of them do the same way. One table per program drives parsing, checking and help;
// one function runs a program from argv to exit code; plan, progress, errors and JSON have one form each. A program
// itself is options -> plan -> library calls -> report, and holds no arithmetic.
//
// Streams: results on stdout, everything else on stderr. Exit codes: docs/exit-codes.md.
#ifndef KVQ_CLI_H
#define KVQ_CLI_H

#include <stdatomic.h>
#include <stdio.h>

#include "kvq_calib.h"
#include "kvq_core.h"
#include "kvq_datasets.h"
#include "kvq_decoder.h"
#include "kvq_io.h"

// ---------------------------------------------------------------- options (option_table.c)

typedef enum kvq_cli_kind {
    CLI_FLAG,      // bool
    CLI_TEXT,      // const char *
    CLI_LIST,      // kvq_cli_list; the option may be repeated
    CLI_COUNT,     // int64_t in [min, max]
    CLI_SEED,      // kvq_cli_seed
    CLI_NUMBER,    // double in [min, max]
    CLI_FRACTION,  // double in [min, max]; "1%" or "0.01"
    CLI_FRACTIONS, // kvq_cli_fractions; some of them with commas between, "0,0.25%,1%"
    CLI_BYTES,     // int64_t above 0; "16GiB", "500MB", "1000000"
    CLI_CHOICE,    // int, index into choices
    CLI_OPERAND,   // const char *; the one argument without a dash; `name` is its word in help
    CLI_OPERANDS   // kvq_cli_list; all arguments without a dash
} kvq_cli_kind;

#define CLI_MAX_LIST 32

typedef struct kvq_cli_list {
    const char *items[CLI_MAX_LIST];
    int         count;
} kvq_cli_list;

typedef struct kvq_cli_fractions {
    double values[KVQ_MAX_FRACTIONS];
    int    count;
} kvq_cli_fractions;

typedef struct kvq_cli_seed {
    bool     given;
    uint64_t value;
} kvq_cli_seed;

// One row: spelling, type, where the value goes, what help says. An option given twice: the last one counts.
typedef struct kvq_cli_option {
    const char        *name;   // long name without dashes
    char               letter; // short name or 0
    kvq_cli_kind       kind;
    size_t             at;       // offsetof the field in the program's options struct
    const char        *value;    // word for the value in help, NULL for flags
    const char        *help;     // one line
    double             min, max; // CLI_COUNT, CLI_NUMBER, CLI_FRACTION, CLI_FRACTIONS
    const char *const *choices;  // CLI_CHOICE, ends with NULL
    bool               rare;     // shown by --help-all only
    bool               path;     // names a file or folder; CLI_TEXT, CLI_LIST
    bool               aside;    // where results go and how fast: no result depends on it
} kvq_cli_option;

typedef enum kvq_cli_progress {
    CLI_PROGRESS_AUTO, // a bar on a terminal, plain lines elsewhere
    CLI_PROGRESS_PLAIN,
    CLI_PROGRESS_JSON, // everything on stderr is one JSON event per line (README.md)
    CLI_PROGRESS_NONE
} kvq_cli_progress;

// Options of every program; the first member of each options struct.
typedef struct kvq_cli_common {
    bool    quiet, verbose, help, help_all, version;
    int     progress;  // kvq_cli_progress
    int64_t n_threads; // 0 = one per core
} kvq_cli_common;

typedef struct kvq_cli kvq_cli;

typedef struct kvq_cli_program {
    const char *name;    // "kvq-calibrate"
    const char *summary; // one sentence
    // Usage lines without the program's name; one that starts with a space goes on with the line above.
    const char           *synopsis;
    const kvq_cli_option *options;
    int                   n_options;
    const char           *notes; // last part of help: tables and two examples
    // Its library calls ask kvq_stop_requested and save what they have; without this a signal ends the program at once.
    bool can_stop;
    // *exit_code is 0 on entry; set it for a negative verdict (a failed gate), which is not an error.
    kvq_status (*run)(kvq_cli *cli, void *options, int *exit_code, kvq_error *err);
} kvq_cli_program;

#define CLI_COUNT_OF(table)  ((int)(sizeof(table) / sizeof *(table)))
#define CLI_VERDICT_NEGATIVE 1          // exit code
#define CLI_VERDICT_OPEN     7          // exit code: more tokens are needed for a verdict
#define CLI_DEFAULT_SEQ_LEN  2048       // limited to what the model can do
#define CLI_MAX_TOKENS       16777216.0 // 2^24: no window, and no count of windows, is meant to be longer

// A program from argv to exit code: parse, answer --help and --version, run, print the error. `options` holds the
// defaults on entry and starts with a kvq_cli_common.
int kvq_cli_main(const kvq_cli_program *program, int argc, char **argv, void *options);

// The command that asks for the same results again, to be shown in a report: the options whose value is not that of
// `defaults`, without those that are `aside`, files under their names alone. Released with free(); NULL when out of
// memory.
char *kvq_cli_command(const kvq_cli_program *program, const void *options, const void *defaults); // command_line.c

// The name nearest to `word` by edit distance, or NULL when none is similar.
const char *kvq_cli_closest(const char *word, const char *const *names, int n_names);

// ---------------------------------------------------------------- console (console.c)

struct kvq_cli {
    const char        *program;
    int                argc; // the command line, for the line that continues a stopped run; 0 = not known
    const char *const *argv;
    kvq_context        ctx;           // ctx.user is this kvq_cli
    int                rank, n_ranks; // of the processes of one run; a program sets them, 0 of 0 = alone
    atomic_bool        stop;          // a signal asked for it; set by a thread that waits for one
    bool               quiet, verbose;
    bool               animate; // a bar that is redrawn, ...
    bool               json;    // ... events, otherwise plain lines
    bool               silent;  // no progress at all
    bool               bar_on_screen;
    int64_t            n_layers; // of the model, for progress; a program sets it when it knows, 0 = not known
    char               stage[32];
    double             start_s, stage_start_s, last_shown_s;
    int64_t            stage_start_done;
    int                last_percent;
};

void kvq_cli_console_init(kvq_cli *cli, const char *program, const kvq_cli_common *common);
void kvq_cli_say(kvq_cli *cli, const char *format, ...) KVQ_PRINTF(2, 3); // one line on stderr, unless quiet
#define CLI_MAX_NEXT_WORDS 16
void kvq_cli_write_word(FILE *to, const char *word);     // of a command, quoted for a shell where it must be
void kvq_cli_next(kvq_cli *cli, const char *first, ...); // "next: ..." of words up to NULL, quoted for a shell
void kvq_cli_end_progress(kvq_cli *cli);                 // leaves the line of a bar, if there is one
// Three lines, also when quiet. KVQ_ERR_INTERRUPTED is no failure: two lines, the second with the command that
// continues.
void kvq_cli_print_error(kvq_cli *cli, const kvq_error *err);
void kvq_cli_format_bytes(double bytes, char *out, size_t n); // "6.8 GiB"
void kvq_cli_format_seconds(double s, char *out, size_t n);   // "37m52s"

// Processor model and the instruction sets that can change a matrix product's last bits; "unknown" when not readable.
void   kvq_cli_describe_cpu(char *out, size_t n); // machine.c
bool   kvq_cli_under_mpirun(void);                // one of several processes that mpirun started
double kvq_cli_free_bytes(const char *path);      // on the disk of a path that need not exist yet; -1 = unknown

// Bytes of this process in physical memory, mapped files included; -1 = unknown. machine.c
int64_t kvq_resident_memory(void); // now
int64_t kvq_peak_memory(void);     // the most it ever was

// ---------------------------------------------------------------- outputs (outputs.c)

// KVQ_ERR_USAGE when the output is one of the inputs (a path or NULL each) or part of an input folder, KVQ_ERR_EXISTS
// and KVQ_ERR_DISK as kvq_output_begin. Nothing is left behind.
kvq_status kvq_cli_check_output(kvq_cli *cli, const char *output, bool force, const char *const *inputs, int n_inputs,
                                kvq_error *err);

// The same for an output that another option than --output names.
kvq_status kvq_cli_check_output_of(kvq_cli *cli, const char *option, const char *output, bool force,
                                   const char *const *inputs, int n_inputs, kvq_error *err);

// The work directory: `wanted`, or OUTPUT.work when that is NULL. KVQ_ERR_USAGE when the path is too long.
#define CLI_MAX_PATH 4096
kvq_status kvq_cli_work_dir(const char *wanted, const char *output, char out[CLI_MAX_PATH], kvq_error *err);

// ---------------------------------------------------------------- where and how it is computed (program.c)

typedef struct kvq_cli_engine {
    const char *device;  // NULL: auto
    int         compute; // kvq_compute
} kvq_cli_engine;

// clang-format off
#define CLI_ENGINE_ROWS                                                                                                \
    {"device", 0, CLI_TEXT, AT(engine.device), "DEV", .help = "cpu, cuda, cuda:N, or auto: a GPU when there is one",   \
     .rare = true},                                                                                                    \
    {"compute", 0, CLI_CHOICE, AT(engine.compute), "TYPE",                                                             \
     .help = "type of the factors in linear layers: f32 (default), or bf16 where the device has it",                \
     .choices = kvq_compute_names}
// clang-format on
kvq_status kvq_cli_backend(kvq_cli *cli, const kvq_cli_engine *engine, kvq_backend **out, kvq_error *err);
// "2 threads of this processor with onednn", "cuda:0, NVIDIA H200, with cublas ..", and why `auto` took no other.
#define CLI_COMPUTE_TEXT 640
void kvq_cli_compute_text(const kvq_cli *cli, const kvq_backend *be, char out[CLI_COMPUTE_TEXT]);

// ---------------------------------------------------------------- tokens (tokens.c, texts.c, self_text.c)

extern const char *const kvq_cli_bos_names[];         // in the order of kvq_bos_policy
extern const char *const kvq_cli_text_format_names[]; // in the order of kvq_text_format
extern const char *const kvq_cli_documents_names[];   // joined, kept
extern const char *const kvq_cli_newlines_names[];    // kept, bare, single, mixed

// Where windows come from. Texts or tokens are given, not both; the single text "self" lets the model write.
typedef struct kvq_cli_source {
    kvq_cli_list texts;
    const char  *tokens;
    const char  *mix;       // "NAME=0.6,NAME=0.4", or NULL
    const char  *field;     // of jsonl, or NULL
    int          format;    // kvq_text_format
    int          documents; // 1 = kept
    int          newlines;  // kvq_newlines, or one more: mixed
    int          bos;       // kvq_bos_policy
} kvq_cli_source;

// Rows of an option table for the texts of a kvq_cli_source; AT(source.texts) must be what the table calls it.
// clang-format off
#define CLI_TEXT_ROWS                                                                                                  \
    {"text", 0, CLI_LIST, AT(source.texts), "FILE", .path = true,                                                      \
     .help = "text or jsonl, also .gz .zst .xz; repeatable; the word self: the model writes its own"},                 \
    {"mix", 0, CLI_TEXT, AT(source.mix), "A=W,B=W",                                                                    \
     .help = "share of each text by its file name (in proportion to tokens)", .rare = true},                           \
    {"text-format", 0, CLI_CHOICE, AT(source.format), "HOW", .help = "auto (by the name), raw or jsonl",               \
     .choices = kvq_cli_text_format_names, .rare = true},                                                              \
    {"text-field", 0, CLI_TEXT, AT(source.field), "NAME",                                                              \
     .help = "member of a jsonl object that holds its text (text)", .rare = true},                                     \
    {"documents", 0, CLI_CHOICE, AT(source.documents), "HOW",                                                          \
     .help = "joined, or kept: no window holds text of two documents", .choices = kvq_cli_documents_names,             \
     .rare = true},                                                                                                    \
    {"newlines", 0, CLI_CHOICE, AT(source.newlines), "HOW",                                                            \
     .help = "kept; bare: no spaces in front; single: nor blank lines; mixed: half kept, half bare",                   \
     .choices = kvq_cli_newlines_names, .rare = true}

// Rows for the windows that are drawn from it, or from given ids: samples, seq_len and seed beside the source.
#define CLI_WINDOW_ROWS                                                                                                \
    {"tokens", 0, CLI_TEXT, AT(source.tokens), "FILE.npy",                                                             \
     .help = "token ids instead of --text; no tokenizer is used"},                                                     \
    {"samples", 0, CLI_COUNT, AT(samples), "N", .help = "windows drawn from the text (16)", .min = 1,                  \
     .max = CLI_MAX_TOKENS},                                                                                           \
    {"seq-len", 0, CLI_COUNT, AT(seq_len), "S", .help = "tokens per window (2048, or all positions of the model)",     \
     .min = 2, .max = CLI_MAX_TOKENS},                                                                                 \
    {"seed", 0, CLI_SEED, AT(seed), "X", .help = "decides which windows are drawn (0)"},                               \
    {"bos", 0, CLI_CHOICE, AT(source.bos), "HOW",                                                                      \
     .help = "BOS token in front of a window: auto (as the tokenizer does), always, never",                            \
     .choices = kvq_cli_bos_names}
#define CLI_USUAL_SAMPLES 16
// clang-format on

#define CLI_SOURCE_FILES (CLI_MAX_LIST + 1)
bool kvq_cli_is_self(const kvq_cli_source *source);
// The files of a source (none for self), for kvq_cli_check_output, [CLI_SOURCE_FILES], unused ones NULL.
void kvq_cli_source_files(const kvq_cli_source *source, const char **inputs);
// Cheap checks before anything large is opened: one kind of source, its files can be read, weights belong to files.
kvq_status kvq_cli_source_check(const kvq_cli_source *source, kvq_error *err);
// The window length: `wanted`, or when that is 0 `usual` limited to what the model can do. KVQ_ERR_USAGE beyond it.
kvq_status kvq_cli_seq_len(kvq_cli *cli, const kvq_model_config *config, int64_t wanted, int64_t usual, int64_t *out,
                           kvq_error *err);

typedef struct kvq_cli_window_request {
    int64_t  seq_len, n_windows; // n_windows 0 = all, for consecutive windows only
    uint64_t seed;
    bool     drawn;       // windows drawn from the whole text, otherwise consecutive ones
    bool     python_draw; // as kvq_window_rule
    int64_t  n_heldout;   // likewise; of files only
} kvq_cli_window_request;

// What turned text into ids; kind "none" when token ids were given or the model wrote them.
typedef struct kvq_cli_tokenizer {
    char    kind[32], sha256[KVQ_SHA256_HEX];
    int64_t bos_id;                     // of a text's beginning, -1 = none known, or no text was read
    int     n_texts;                    // read, with ...
    int64_t text_windows[CLI_MAX_LIST]; // ... the windows that come from each
} kvq_cli_tokenizer;

kvq_status kvq_cli_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                           const char *model_path, const kvq_cli_source *source, const kvq_cli_window_request *request,
                           kvq_windows *out, kvq_cli_tokenizer *tokenizer, kvq_error *err);

// The parts of kvq_cli_windows.
kvq_status kvq_cli_text_windows(kvq_cli *cli, const kvq_model_config *config, const char *model_path,
                                const kvq_cli_source *source, const kvq_cli_window_request *request, kvq_windows *out,
                                kvq_cli_tokenizer *tokenizer, kvq_error *err);
kvq_status kvq_cli_self_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                                const char *model_path, const kvq_cli_window_request *request, kvq_windows *out,
                                kvq_error *err);
// The BOS token of each window, -1 for none, by a policy. KVQ_ERR_USAGE when one is wanted that nobody names.
kvq_status kvq_cli_resolve_bos(int policy, bool tokenizer_adds, int64_t known_id, int64_t vocab_size, int64_t *bos_id,
                               kvq_error *err);
// Weights in the order of texts [texts->count]. `mix` gives each its weight under its name or its path.
kvq_status kvq_cli_parse_mix(const char *mix, const kvq_cli_list *texts, double *weights, kvq_error *err);

// ---------------------------------------------------------------- beginning of text (bos_check.c)

// With --bos auto and a text: says in the plan what scoring the first windows with and without a BOS token costs, and,
// unless only the plan is wanted, does so; a warning says when the other way is better by more than 0.5 nats per token.
kvq_status kvq_cli_check_bos(kvq_cli *cli, const kvq_backend *be, kvq_model *model, const kvq_cli_source *source,
                             const kvq_windows *windows, const kvq_cli_tokenizer *tokenizer, bool plan_only,
                             kvq_error *err);

// ---------------------------------------------------------------- JSON (json_report.c)

// A growing document. Adding never fails visibly: a failed allocation is remembered and reported when it is printed.
typedef struct cJSON cJSON;
typedef struct kvq_json {
    cJSON *root;
    bool   failed;
} kvq_json;

#define CLI_EXACT_NUMBER 32
void kvq_cli_format_exact(double x, char out[CLI_EXACT_NUMBER]); // the shortest that reads back as x; NaN, Inf: empty
// A copy in well-formed UTF-8, released with free(): a file name, or a message that was cut, need not be, so each
// malformed byte becomes U+FFFD. NULL when out of memory.
char *kvq_cli_valid_text(const char *text);

// Where a value goes: `key` of an object, or with key NULL the end of an array.
void   kvq_json_init(kvq_json *json); // the root is an object
void   kvq_json_free(kvq_json *json);
cJSON *kvq_json_object(kvq_json *json, cJSON *parent, const char *key);
cJSON *kvq_json_array(kvq_json *json, cJSON *parent, const char *key);
void   kvq_json_text(kvq_json *json, cJSON *parent, const char *key, const char *value);
void   kvq_json_bool(kvq_json *json, cJSON *parent, const char *key, bool value);
void   kvq_json_number(kvq_json *json, cJSON *parent, const char *key,
                       double value); // shortest exact form; NaN, Inf: null
void   kvq_json_count(kvq_json *json, cJSON *parent, const char *key, int64_t value);
void   kvq_json_seed(kvq_json *json, cJSON *parent, const char *key, uint64_t value); // beyond 2^53 a string
void   kvq_json_doubles(kvq_json *json, cJSON *parent, const char *key, const double *values, int64_t n);
void   kvq_json_floats(kvq_json *json, cJSON *parent, const char *key, const float *values, int64_t n); // NULL: null
void   kvq_json_null(kvq_json *json, cJSON *parent, const char *key);
// The document as one line, released with free(); or the same, indented, to a file or on stdout.
kvq_status kvq_json_line(const kvq_json *json, char **out, kvq_error *err);
kvq_status kvq_json_write(const kvq_json *json, FILE *out, kvq_error *err);
kvq_status kvq_json_print(const kvq_json *json, kvq_error *err);

// ---------------------------------------------------------------- memory of long contexts (memory_table.c)

void kvq_cli_print_memory(const kvq_artifact *artifact);               // a table on stdout
void kvq_cli_add_memory(kvq_json *json, const kvq_artifact *artifact); // an array "memory" in the root

#endif
