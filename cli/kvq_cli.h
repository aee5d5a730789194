// SPDX-License-Identifier: Apache-2.0
//
// Private to the programs: what all of them do the same way. One table per program drives parsing, checking and help;
// one function runs a program from argv to exit code; plan, progress, errors and JSON have one form each. A program
// itself is options -> plan -> library calls -> report, and holds no arithmetic.
//
// Streams: results on stdout, everything else on stderr. Exit codes: docs/exit-codes.md.
#ifndef KVQ_CLI_H
#define KVQ_CLI_H

#include "kvq_calib.h"
#include "kvq_core.h"
#include "kvq_datasets.h"
#include "kvq_decoder.h"
#include "kvq_io.h"

// ---------------------------------------------------------------- options (option_table.c)

typedef enum kvq_cli_kind {
    CLI_FLAG,     // bool
    CLI_TEXT,     // const char *
    CLI_LIST,     // kvq_cli_list; the option may be repeated
    CLI_COUNT,    // int64_t in [min, max]
    CLI_SEED,     // kvq_cli_seed
    CLI_FRACTION, // double in [min, max]; "1%" or "0.01"
    CLI_CHOICE,   // int, index into choices
    CLI_OPERAND   // const char *; the one argument without a dash; `name` is its word in help
} kvq_cli_kind;

#define CLI_MAX_LIST 32

typedef struct kvq_cli_list {
    const char *items[CLI_MAX_LIST];
    int         count;
} kvq_cli_list;

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
    double             min, max; // CLI_COUNT, CLI_FRACTION
    const char *const *choices;  // CLI_CHOICE, ends with NULL
} kvq_cli_option;

typedef enum kvq_cli_progress { CLI_PROGRESS_AUTO, CLI_PROGRESS_PLAIN, CLI_PROGRESS_NONE } kvq_cli_progress;

// Options of every program; the first member of each options struct.
typedef struct kvq_cli_common {
    bool    quiet, verbose, help, version;
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
    // *exit_code is 0 on entry; set it for a negative verdict (a failed gate), which is not an error.
    kvq_status (*run)(kvq_cli *cli, void *options, int *exit_code, kvq_error *err);
} kvq_cli_program;

#define CLI_COUNT_OF(table)  ((int)(sizeof(table) / sizeof *(table)))
#define CLI_VERDICT_NEGATIVE 1          // exit code
#define CLI_DEFAULT_SEQ_LEN  2048       // limited to what the model can do
#define CLI_MAX_TOKENS       16777216.0 // 2^24: no window, and no count of windows, is meant to be longer

// A program from argv to exit code: parse, answer --help and --version, run, print the error. `options` holds the
// defaults on entry and starts with a kvq_cli_common.
int kvq_cli_main(const kvq_cli_program *program, int argc, char **argv, void *options);

// The name nearest to `word` by edit distance, or NULL when none is similar.
const char *kvq_cli_closest(const char *word, const char *const *names, int n_names);

// ---------------------------------------------------------------- console (console.c)

struct kvq_cli {
    const char *program;
    kvq_context ctx; // ctx.user is this kvq_cli
    bool        quiet, verbose;
    bool        animate; // a bar that is redrawn; otherwise plain lines
    bool        silent;  // no progress at all
    bool        bar_on_screen;
    char        stage[32];
    double      stage_start_s, last_shown_s;
    int         last_percent;
};

void   kvq_cli_console_init(kvq_cli *cli, const char *program, const kvq_cli_common *common);
void   kvq_cli_say(kvq_cli *cli, const char *format, ...) KVQ_PRINTF(2, 3); // one line on stderr, unless quiet
void   kvq_cli_next(kvq_cli *cli, const char *first, ...); // "next: ..." of words up to NULL, quoted for a shell
void   kvq_cli_end_progress(kvq_cli *cli);                 // leaves the line of a bar, if there is one
void   kvq_cli_print_error(kvq_cli *cli, const kvq_error *err);
double kvq_cli_now_s(void);                                     // monotonic
void   kvq_cli_format_bytes(double bytes, char *out, size_t n); // "6.8 GiB"
void   kvq_cli_format_seconds(double s, char *out, size_t n);   // "37m52s"

// Processor model and the instruction sets that can change a matrix product's last bits; "unknown" when not readable.
void   kvq_cli_describe_cpu(char *out, size_t n); // machine.c
double kvq_cli_free_bytes(const char *path);      // on the disk of a path that need not exist yet; -1 = unknown

// ---------------------------------------------------------------- outputs (outputs.c)

// KVQ_ERR_USAGE when the output is one of the inputs (a path or NULL each) or part of an input folder, KVQ_ERR_EXISTS
// and KVQ_ERR_DISK as kvq_output_begin. Nothing is left behind.
kvq_status kvq_cli_check_output(kvq_cli *cli, const char *output, bool force, const char *const *inputs, int n_inputs,
                                kvq_error *err);

// ---------------------------------------------------------------- tokens (tokens.c)

extern const char *const kvq_cli_bos_names[]; // in the order of kvq_bos_policy

// Where windows come from. Exactly one of text and tokens is given; text "self" lets the model write.
typedef struct kvq_cli_source {
    const char *text, *tokens;
    int         bos; // kvq_bos_policy
} kvq_cli_source;

bool kvq_cli_is_self(const kvq_cli_source *source);
// Cheap checks before anything large is opened: one source, and its file can be read.
kvq_status kvq_cli_source_check(const kvq_cli_source *source, kvq_error *err);
// The window length: `wanted`, or when that is 0 `usual` limited to what the model can do. KVQ_ERR_USAGE beyond it.
kvq_status kvq_cli_seq_len(kvq_cli *cli, const kvq_model_config *config, int64_t wanted, int64_t usual, int64_t *out,
                           kvq_error *err);

typedef struct kvq_cli_window_request {
    int64_t  seq_len, n_windows; // n_windows 0 = all, for consecutive windows only
    uint64_t seed;
    bool     drawn; // windows drawn from the whole text, otherwise consecutive ones
} kvq_cli_window_request;

// What turned text into ids; kind "none" when token ids were given or the model wrote them.
typedef struct kvq_cli_tokenizer {
    char kind[32], sha256[KVQ_SHA256_HEX];
} kvq_cli_tokenizer;

kvq_status kvq_cli_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                           const char *model_path, const kvq_cli_source *source, const kvq_cli_window_request *request,
                           kvq_windows *out, kvq_cli_tokenizer *tokenizer, kvq_error *err);

// ---------------------------------------------------------------- JSON (json_report.c)

// A growing document. Adding never fails visibly: a failed allocation is remembered and reported when it is printed.
typedef struct cJSON cJSON;
typedef struct kvq_json {
    cJSON *root;
    bool   failed;
} kvq_json;

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
// The document as one line, released with free(); or the same on stdout, indented.
kvq_status kvq_json_line(const kvq_json *json, char **out, kvq_error *err);
kvq_status kvq_json_print(const kvq_json *json, kvq_error *err);

#endif
