// SPDX-License-Identifier: Apache-2.0
//
// What the programs share: strict values, suggestions, exact numbers in JSON. Whole programs are run by
// tests/cli/*.bats.
#include <cjson/cJSON.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kvq_test.h"
#include "option_table.h"

// ---------------------------------------------------------------- a program of every kind of option

typedef struct sample_options {
    kvq_cli_common common;
    const char    *text, *operand;
    kvq_cli_list   list;
    int64_t        count, bytes;
    kvq_cli_seed   seed;
    double         fraction;
    int            choice;
    bool           flag;
} sample_options;

static const char *const CHOICES[] = {"red", "green", NULL};

#define AT(field) offsetof(sample_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"INPUT", 0, CLI_OPERAND, AT(operand), NULL, .help = "operand"},
    {"text", 't', CLI_TEXT, AT(text), "WORD", .help = "text"},
    {"gate", 0, CLI_LIST, AT(list), "EXPR", .help = "list"},
    {"seq-len", 0, CLI_COUNT, AT(count), "N", .help = "count", .min = 2, .max = 100},
    {"seed", 0, CLI_SEED, AT(seed), "X", .help = "seed"},
    {"outliers", 0, CLI_FRACTION, AT(fraction), "F", .help = "fraction", .min = 0, .max = 0.05},
    {"memory-limit", 0, CLI_BYTES, AT(bytes), "SIZE", .help = "bytes"},
    {"colour", 0, CLI_CHOICE, AT(choice), "HOW", .help = "choice", .choices = CHOICES},
    {"force", 'f', CLI_FLAG, AT(flag), NULL, .help = "flag"},
};
#undef AT

static const kvq_cli_program PROGRAM = {.name = "sample",
                                        .summary = "",
                                        .synopsis = "",
                                        .options = OPTIONS,
                                        .n_options = CLI_COUNT_OF(OPTIONS),
                                        .notes = ""};

// Parses up to four words. The strings stay alive in *args.
static kvq_status parse(sample_options *o, arguments *args, kvq_error *err, const char *a, const char *b, const char *c,
                        const char *d) {
    char        words[5][128] = {"sample"};
    char       *argv[6] = {words[0]};
    const char *given[] = {a, b, c, d};
    int         argc = 1;
    memset(o, 0, sizeof *o);
    memset(args, 0, sizeof *args);
    for (int i = 0; i < 4 && given[i] != NULL; i++) {
        (void)snprintf(words[argc], sizeof words[argc], "%s", given[i]);
        argv[argc] = words[argc];
        argc++;
    }
    return parse_arguments(&PROGRAM, argc, argv, o, args, err);
}

static void accepts(sample_options *o, arguments *args, const char *a, const char *b) {
    kvq_error err = {0};
    kvq_test_ok(parse(o, args, &err, a, b, NULL, NULL), &err);
}

static void refuses(const char *a, const char *b, const char *fragment, const char *advice) {
    sample_options o;
    arguments      args;
    kvq_error      err = {0};
    kvq_status     status = parse(&o, &args, &err, a, b, NULL, NULL);
    kvq_test_failed(status, KVQ_ERR_USAGE, &err, fragment);
    if (advice != NULL) ck_assert_msg(strstr(err.next, advice) != NULL, "'%s' is not in '%s'", advice, err.next);
    free_arguments(&args);
}

// ---------------------------------------------------------------- values

START_TEST(values_arrive_in_their_fields) {
    sample_options o;
    arguments      args;
    accepts(&o, &args, "--text=a b", "-f");
    ck_assert_str_eq(o.text, "a b");
    ck_assert(o.flag);
    free_arguments(&args);
    accepts(&o, &args, "-t", "--odd_value");
    ck_assert_str_eq(o.text, "--odd_value"); // a value is not a name: its underscore stays
    free_arguments(&args);
    accepts(&o, &args, "--seq-len", "100");
    ck_assert_int_eq(o.count, 100);
    free_arguments(&args);
    accepts(&o, &args, "--seed", "18446744073709551615");
    ck_assert(o.seed.given);
    ck_assert(o.seed.value == UINT64_MAX);
    free_arguments(&args);
    accepts(&o, &args, "--colour", "green");
    ck_assert_int_eq(o.choice, 1);
    free_arguments(&args);
    accepts(&o, &args, "file.h5", NULL);
    ck_assert_str_eq(o.operand, "file.h5");
    free_arguments(&args);
}
END_TEST

START_TEST(a_percentage_and_a_fraction_are_the_same_number) {
    sample_options o;
    arguments      args;
    accepts(&o, &args, "--outliers", "1%");
    ck_assert_double_eq(o.fraction, 0.01);
    free_arguments(&args);
    accepts(&o, &args, "--outliers", "0.01");
    ck_assert_double_eq(o.fraction, 0.01);
    free_arguments(&args);
}
END_TEST

static const struct {
    const char *text;
    int64_t     bytes;
} SIZES[] = {
    {"1", 1},
    {"1500", 1500},
    {"7B", 7},
    {"2K", 2048},
    {"2KiB", 2048},
    {"2KB", 2000},
    {"1.5M", 1572864},
    {"1.5MB", 1500000},
    {"16GiB", 17179869184},
    {"16gib", (int64_t)16 << 30},
    {"3G", 3221225472},
    {"2TB", 2000000000000},
};

START_TEST(sizes_have_units) {
    sample_options o;
    arguments      args;
    accepts(&o, &args, "--memory-limit", SIZES[_i].text);
    ck_assert_int_eq(o.bytes, SIZES[_i].bytes);
    free_arguments(&args);
}
END_TEST

START_TEST(operands_are_kept_in_order_between_options) {
    static const kvq_cli_option rows[] = {
        {"FILE...", 0, CLI_OPERANDS, offsetof(sample_options, list), NULL, .help = ""},
        {"force", 'f', CLI_FLAG, offsetof(sample_options, flag), NULL, .help = ""}};
    static const kvq_cli_program program = {.name = "sample", .synopsis = "", .options = rows, .n_options = 2};
    char                         words[5][8] = {"sample", "b", "-f", "a", "b"};
    char                        *argv[] = {words[0], words[1], words[2], words[3], words[4], NULL};
    sample_options               o = {.flag = false};
    arguments                    args = {NULL, 0};
    kvq_error                    err = {0};
    kvq_test_ok(parse_arguments(&program, 5, argv, &o, &args, &err), &err);
    ck_assert(o.flag);
    ck_assert_int_eq(o.list.count, 3);
    ck_assert_str_eq(o.list.items[0], "b");
    ck_assert_str_eq(o.list.items[1], "a");
    ck_assert_str_eq(o.list.items[2], "b");
    free_arguments(&args);
}
END_TEST

START_TEST(underscores_in_names_are_dashes) {
    sample_options o;
    arguments      args;
    accepts(&o, &args, "--seq_len=7", NULL);
    ck_assert_int_eq(o.count, 7);
    free_arguments(&args);
}
END_TEST

START_TEST(a_list_keeps_every_value_in_order) {
    sample_options o;
    arguments      args;
    kvq_error      err = {0};
    kvq_test_ok(parse(&o, &args, &err, "--gate", "a<=1", "--gate", "b>=2"), &err);
    ck_assert_int_eq(o.list.count, 2);
    ck_assert_str_eq(o.list.items[0], "a<=1");
    ck_assert_str_eq(o.list.items[1], "b>=2");
    free_arguments(&args);
}
END_TEST

static const struct {
    const char *option, *value, *fragment;
} BAD_VALUES[] = {
    {"--seq-len", "1", "--seq-len: 1 is not between 2 and 100"},
    {"--seq-len", "101", "101 is not between"},
    {"--seq-len", "12x", "'12x' is not a whole number"},
    {"--seq-len", " 12", "' 12' is not a whole number"},
    {"--seq-len", "1e2", "'1e2' is not a whole number"},
    {"--seq-len", "99999999999999999999", "is not between"},
    {"--seq-len", "", "the value is empty"},
    {"--seed", "-1", "'-1' is not a whole number between 0 and 18446744073709551615"},
    {"--seed", "18446744073709551616", "is not a whole number between"},
    {"--outliers", "6%", "6% is not between 0% and 5%"},
    {"--outliers", "-0.01", "is not between"},
    {"--outliers", "nan", "'nan' is neither"},
    {"--outliers", "0x1p-7", "'0x1p-7' is neither"},
    {"--outliers", "1%%", "'1%%' is neither"},
    {"--outliers", "%", "'%' is neither"},
    {"--memory-limit", "0", "--memory-limit: '0' is not a size"},
    {"--memory-limit", "-5G", "'-5G' is not a size"},
    {"--memory-limit", "5 G", "'5 G' is not a size"},
    {"--memory-limit", "5q", "'5q' is not a size like 16GiB or 500MB"},
    {"--memory-limit", "1e3", "'1e3' is not a size"},
    {"--memory-limit", "1..5G", "'1..5G' is not a size"},
    {"--memory-limit", "0x10", "'0x10' is not a size"},
    {"--memory-limit", "G", "'G' is not a size"},
    {"--memory-limit", "99999999TiB", "is not a size"},
    {"--colour", "blue", "--colour: 'blue' is none of red, green"},
    {"--text", NULL, "--text: the value is missing"},
    {"--force=yes", NULL, "--force: option does not take an argument"},
    {"one", "two", "unexpected argument 'two'"},
};

START_TEST(bad_values_are_refused_with_option_and_value) {
    refuses(BAD_VALUES[_i].option, BAD_VALUES[_i].value, BAD_VALUES[_i].fragment, NULL);
}
END_TEST

START_TEST(unknown_options_name_the_closest_one) {
    refuses("--outlier=1%", NULL, "unknown option --outlier", "did you mean --outliers? see sample --help");
    refuses("--seqlen", "5", "unknown option --seqlen", "--seq-len");
    refuses("--verison", NULL, "unknown option --verison", "--version");
    refuses("--zzzzzzzz", NULL, "unknown option --zzzzzzzz", "see sample --help");
    refuses("-z", NULL, "unknown option -z", "see sample --help");
}
END_TEST

START_TEST(what_follows_a_mistake_is_read_all_the_same) {
    sample_options o;
    arguments      args;
    kvq_error      err = {0};
    kvq_test_failed(parse(&o, &args, &err, "--odd=1", "--seq-len=1", "--progress=json", "-f"), KVQ_ERR_USAGE, &err,
                    "unknown option --odd"); // the first one is reported
    ck_assert_int_eq(o.common.progress, CLI_PROGRESS_JSON);
    ck_assert(o.flag);
    free_arguments(&args);
}
END_TEST

START_TEST(abbreviations_are_not_accepted) { refuses("--out", "1%", "unknown option --out", NULL); }
END_TEST

START_TEST(closest_prefers_the_fewest_changes_and_gives_up_on_other_words) {
    const char *names[] = {"calibrate", "validate", "inspect"};
    ck_assert_str_eq(kvq_cli_closest("calibarte", names, 3), "calibrate");
    ck_assert_str_eq(kvq_cli_closest("valdate", names, 3), "validate");
    ck_assert_ptr_null(kvq_cli_closest("bench", names, 3));
    ck_assert_ptr_null(kvq_cli_closest("", names, 0));
}
END_TEST

// ---------------------------------------------------------------- words for people

START_TEST(sizes_and_times_are_short) {
    char text[32];
    kvq_cli_format_bytes(1023, text, sizeof text);
    ck_assert_str_eq(text, "1023 B");
    kvq_cli_format_bytes(1536, text, sizeof text);
    ck_assert_str_eq(text, "1.5 KiB");
    kvq_cli_format_bytes(6.8 * 1024 * 1024 * 1024, text, sizeof text);
    ck_assert_str_eq(text, "6.8 GiB");
    kvq_cli_format_seconds(2.25, text, sizeof text);
    ck_assert_str_eq(text, "2.2s");
    kvq_cli_format_seconds(2272, text, sizeof text);
    ck_assert_str_eq(text, "37m52s");
    kvq_cli_format_seconds(7260, text, sizeof text);
    ck_assert_str_eq(text, "2h01m");
}
END_TEST

START_TEST(the_processor_has_a_name) {
    char text[256] = "";
    kvq_cli_describe_cpu(text, sizeof text);
    ck_assert_int_gt((int)strlen(text), 0);
    ck_assert_ptr_null(strchr(text, '\n'));
    char tiny[8];
    kvq_cli_describe_cpu(tiny, sizeof tiny); // cut, never overrun
    ck_assert_int_lt((int)strlen(tiny), (int)sizeof tiny);
}
END_TEST

START_TEST(memory_is_measured) {
    const size_t n = 64 << 20;
    int64_t      peak = kvq_peak_memory();
    if (peak < 0) return; // no /proc here: unknown
    ck_assert_int_gt(kvq_resident_memory(), 0);
    ck_assert(kvq_resident_memory() <= peak + (1 << 20)); // a page or two may come between the two readings
    volatile char *block = malloc(n);
    ck_assert_ptr_nonnull((void *)block);
    for (size_t i = 0; i < n; i += 1024) block[i] = 1;
    int64_t with_block = kvq_resident_memory();
    free((void *)block);
    // a block of this size is mapped and unmapped by itself, so it shows in full; 1 MiB for what else moved
    ck_assert_int_ge(with_block, (int64_t)n);
    ck_assert_int_ge(kvq_peak_memory(), peak > with_block ? peak : with_block - (1 << 20));
    ck_assert_int_le(kvq_peak_memory(), with_block + (16 << 20));
}
END_TEST

// ---------------------------------------------------------------- progress

// What the callbacks of `cli` wrote to stderr since the last call. Check runs every test in a process of its own, so
// stderr may be moved.
static void stderr_to_file(char *path, size_t n) {
    (void)snprintf(path, n, "%s/stderr", kvq_test_folder());
    ck_assert_ptr_nonnull(freopen(path, "w+", stderr));
}

static void read_stderr(char *text, size_t n) {
    (void)fflush(stderr);
    rewind(stderr);
    text[fread(text, 1, n - 1, stderr)] = 0;
    rewind(stderr);
    ck_assert_int_eq(ftruncate(fileno(stderr), 0), 0);
}

static void starts_with(const char *text, const char *beginning) {
    ck_assert_msg(strncmp(text, beginning, strlen(beginning)) == 0, "'%s' does not start with '%s'", text, beginning);
}

// A console as a program has it, with stderr in a file.
static void open_console(kvq_cli *cli, kvq_cli_common common) {
    char path[512];
    stderr_to_file(path, sizeof path);
    kvq_cli_console_init(cli, "sample", &common);
}

// As if everything so far had happened this much earlier.
static void wait_seconds(kvq_cli *cli, double s) {
    cli->start_s -= s;
    cli->stage_start_s -= s;
    cli->last_shown_s -= s;
}

START_TEST(without_a_terminal_progress_is_a_line_now_and_then) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_PLAIN};
    kvq_cli              cli;
    char                 text[512];
    open_console(&cli, common);
    kvq_report_progress(&cli.ctx, "forward", 0, 1, 1000);
    kvq_report_progress(&cli.ctx, "forward", 5, 500, 1000);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, ""); // nothing yet: the run may be over in a second
    cli.n_layers = 12;
    wait_seconds(&cli, 31);
    cli.start_s -= 60; // a stage before this one
    kvq_report_progress(&cli.ctx, "forward", 5, 500, 1000);
    kvq_report_progress(&cli.ctx, "forward", 5, 501, 1000);
    read_stderr(text, sizeof text);
    starts_with(text, "sample: forward 50%  layer 5/12  1m31s  stage left 0m31s");
    ck_assert_ptr_eq(strchr(text, '\n'), text + strlen(text) - 1);
    if (kvq_resident_memory() >= 0) ck_assert_ptr_nonnull(strstr(text, "iB\n"));
    wait_seconds(&cli, 3); // 5 % more after a short pause are worth a line, 4 % are not
    kvq_report_progress(&cli.ctx, "forward", 5, 540, 1000);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "");
    kvq_report_progress(&cli.ctx, "forward", 5, 550, 1000);
    read_stderr(text, sizeof text);
    starts_with(text, "sample: forward 55%");
    wait_seconds(&cli, 29); // without as much progress, a line every half minute
    kvq_report_progress(&cli.ctx, "forward", 5, 551, 1000);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "");
    wait_seconds(&cli, 1.5);
    kvq_report_progress(&cli.ctx, "forward", -1, 551, 1000);
    read_stderr(text, sizeof text);
    starts_with(text, "sample: forward 55%  2m0"); // no layer
}
END_TEST

START_TEST(what_an_earlier_run_did_says_nothing_about_the_time_left) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_PLAIN};
    kvq_cli              cli;
    char                 text[512];
    open_console(&cli, common);
    kvq_report_progress(&cli.ctx, "backward", 3, 800, 1000); // continued
    wait_seconds(&cli, 40);
    kvq_report_progress(&cli.ctx, "backward", 3, 800, 1000);
    read_stderr(text, sizeof text);
    starts_with(text, "sample: backward 80%  layer 3  0m40s  stage left ?");
    wait_seconds(&cli, 60);
    kvq_report_progress(&cli.ctx, "backward", 3, 850, 1000); // 50 steps in 100 s: 150 more take 300 s
    read_stderr(text, sizeof text);
    starts_with(text, "sample: backward 85%  layer 3  1m40s  stage left 5m00s");
}
END_TEST

START_TEST(a_bar_is_redrawn_in_place_and_left_before_other_lines) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_AUTO};
    kvq_cli              cli;
    char                 text[512];
    open_console(&cli, common);
    ck_assert(!cli.animate); // stderr is a file
    cli.animate = true;
    kvq_report_progress(&cli.ctx, "forward", 0, 1, 4);
    wait_seconds(&cli, 1);
    kvq_report_progress(&cli.ctx, "forward", 0, 2, 4);
    kvq_log(&cli.ctx, KVQ_LOG_WARNING, "odd");
    read_stderr(text, sizeof text);
    starts_with(text, "\rforward [###"); // how long it is depends on the width of what follows
    ck_assert_ptr_nonnull(strstr(text, ".]  50%  layer 0  1.0s  stage left 2.0s"));
    const char *end = strchr(text, '\n');
    ck_assert_str_eq(end, "\nsample: warning: odd\n");
    ck_assert_int_eq(end - text, 1 + 79); // the usual terminal without its last column, so that nothing wraps
}
END_TEST

// ---------------------------------------------------------------- events

// The one line on stderr as a document; cJSON_Delete.
static cJSON *read_event(const char *name) {
    char text[4096];
    read_stderr(text, sizeof text);
    const char *end = NULL;
    cJSON      *event = cJSON_ParseWithOpts(text, &end, false);
    ck_assert_msg(event != NULL && strcmp(end, "\n") == 0, "not one line of JSON: %s", text);
    ck_assert_str_eq(cJSON_GetStringValue(cJSON_GetObjectItem(event, "event")), name);
    return event;
}

static void has_text(const cJSON *event, const char *key, const char *expected) {
    const char *value = cJSON_GetStringValue(cJSON_GetObjectItem(event, key));
    ck_assert_msg(value != NULL, "no text '%s'", key);
    ck_assert_str_eq(value, expected);
}

static void has_number(const cJSON *event, const char *key, double least, double most) {
    double value = cJSON_GetNumberValue(cJSON_GetObjectItem(event, key)); // NaN when it is none
    ck_assert_msg(value >= least && value <= most, "%s is %g, not within [%g, %g]", key, value, least, most);
}

static void has_null(const cJSON *event, const char *key) {
    ck_assert_msg(cJSON_IsNull(cJSON_GetObjectItem(event, key)), "%s is not null", key);
}

START_TEST(a_progress_event_says_everything) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_JSON};
    kvq_cli              cli;
    open_console(&cli, common);
    kvq_report_progress(&cli.ctx, "forward", -1, 1, 3);
    cJSON *first = read_event("progress");
    has_null(first, "layer");
    has_null(first, "n_layers");
    has_null(first, "remaining_s");
    cJSON_Delete(first);
    cli.n_layers = 8;
    wait_seconds(&cli, 10);
    cli.start_s -= 100;
    kvq_report_progress(&cli.ctx, "forward", 7, 2, 3);
    cJSON *second = read_event("progress");
    has_text(second, "stage", "forward");
    has_number(second, "layer", 7, 7);
    has_number(second, "n_layers", 8, 8);
    has_number(second, "done", 2, 2);
    has_number(second, "total", 3, 3);
    has_number(second, "percent", 66.6, 66.6);
    has_number(second, "elapsed_s", 110, 140);
    has_number(second, "remaining_s", 10, 40); // one step took 10 s, one is left; no test machine stalls for 30 s
    if (kvq_resident_memory() >= 0) has_number(second, "rss_bytes", 4096, 1e12);
    cJSON_Delete(second);
}
END_TEST

START_TEST(events_come_once_a_second_and_at_both_ends_of_a_stage) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_JSON};
    kvq_cli              cli;
    char                 text[512];
    open_console(&cli, common);
    kvq_report_progress(&cli.ctx, "forward", 0, 1, 4);
    cJSON_Delete(read_event("progress"));
    kvq_report_progress(&cli.ctx, "forward", 0, 2, 4);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "");
    wait_seconds(&cli, 1);
    kvq_report_progress(&cli.ctx, "forward", 0, 3, 4);
    cJSON_Delete(read_event("progress"));
    kvq_report_progress(&cli.ctx, "forward", 0, 4, 4);
    cJSON_Delete(read_event("progress"));
    kvq_report_progress(&cli.ctx, "loss", -1, 1, 4);
    cJSON_Delete(read_event("progress"));
}
END_TEST

START_TEST(with_events_every_line_is_json) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_JSON};
    kvq_cli              cli;
    kvq_error            err;
    cJSON               *event;
    open_console(&cli, common);
    kvq_cli_say(&cli, "a \"plan\"\nof two lines");
    event = read_event("log");
    has_text(event, "level", "info");
    has_text(event, "text", "a \"plan\"\nof two lines");
    cJSON_Delete(event);
    kvq_log(&cli.ctx, KVQ_LOG_WARNING, "%s", "odd \xc3\xa9 \xff \xe2\x82"); // well-formed, malformed, cut off
    event = read_event("log");
    has_text(event, "level", "warning");
    has_text(event, "text", "odd \xc3\xa9 \xef\xbf\xbd \xef\xbf\xbd\xef\xbf\xbd");
    cJSON_Delete(event);
    kvq_cli_next(&cli, "kvq-inspect", "a b", NULL);
    event = read_event("next");
    has_text(event, "command", "kvq-inspect 'a b'");
    cJSON_Delete(event);
    (void)kvq_fail(&err, KVQ_ERR_DISK, "buy one", "the disk is full");
    kvq_cli_print_error(&cli, &err);
    event = read_event("error");
    has_text(event, "code", "KVQ-E6002");
    has_number(event, "exit_code", 6, 6);
    has_text(event, "message", "the disk is full");
    has_text(event, "why", "the disk does not take it");
    has_text(event, "next", "buy one");
    cJSON_Delete(event);
}
END_TEST

// ---------------------------------------------------------------- stopping

static const int SIGNALS[] = {SIGINT, SIGTERM, SIGUSR1};

typedef struct stop_options {
    kvq_cli_common common;
    int            signal_number;
    bool           again;   // a second request, a while after the first
    bool           ignored; // on entry
    const char    *name;    // as it was called, NULL = by a path with a space
} stop_options;

static void rest(double s) {
    const struct timespec pause = {(time_t)s, (long)((s - floor(s)) * 1e9)};
    (void)nanosleep(&pause, NULL);
}

// A library call that ends in order when it is asked to. One request may come as two signals at once; two different
// ones, because the system may make one of two that are alike.
static kvq_status be_stopped(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    const stop_options *o = options;
    sigset_t            blocked;
    (void)exit_code;
    // no handler may run on the stack of a computing thread; threads inherit what is blocked
    bool handled_elsewhere =
        pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0 && sigismember(&blocked, o->signal_number) == 1;
    if (cli->ctx.stop != NULL && !o->ignored && !handled_elsewhere)
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "not blocked");
    ck_assert(!kvq_stop_requested(&cli->ctx));
    (void)kill(getpid(), o->signal_number);
    if (!o->ignored) (void)kill(getpid(), o->signal_number == SIGTERM ? SIGUSR1 : SIGTERM);
    for (int i = 0; i < 100 && !kvq_stop_requested(&cli->ctx); i++) rest(0.02);
    if (o->again) {
        rest(0.3);
        (void)kill(getpid(), o->signal_number);
        rest(2); // it does not take as long
    }
    if (!kvq_stop_requested(&cli->ctx)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL, "layers 0 to 3 are kept");
}

// Runs it in a process of its own with `word` on its command line; what it wrote to stderr, and how it ended.
static int run_stopped(bool can_stop, stop_options o, const char *word, char *text, size_t n) {
    const kvq_cli_program program = {.name = "sample",
                                     .summary = "",
                                     .synopsis = "",
                                     .options = OPTIONS,
                                     .n_options = 0,
                                     .notes = "",
                                     .can_stop = can_stop,
                                     .run = be_stopped};
    char                  path[512], words[2][64];
    char                 *argv[] = {words[0], words[1], NULL};
    int                   status = 0;
    (void)snprintf(words[0], sizeof words[0], "%s", o.name != NULL ? o.name : "/opt/a b/sample");
    (void)snprintf(words[1], sizeof words[1], "%s", word);
    stderr_to_file(path, sizeof path);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        (void)signal(o.signal_number, o.ignored ? SIG_IGN : SIG_DFL); // Check has handlers of its own
        int exit_code = kvq_cli_main(&program, 2, argv, &o);
        (void)fflush(stderr);
        _exit(exit_code);
    }
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    read_stderr(text, n);
    return status;
}

START_TEST(the_first_signal_ends_a_program_in_order) {
    char         text[1024];
    stop_options o = {.signal_number = SIGNALS[_i]};
    int          status = run_stopped(true, o, "-v", text, sizeof text);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 75, "status %d: %s", status, text);
    ck_assert_str_eq(text, "finishing the current step, then saving; once more ends at once\n"
                           "sample: stopped: layers 0 to 3 are kept\n"
                           "continue with: '/opt/a b/sample' -v\n");
}
END_TEST

START_TEST(a_program_that_kvq_started_is_continued_by_its_own_name) {
    char         text[1024];
    stop_options o = {.signal_number = SIGTERM, .name = "ample"}; // what `kvq ample` passes on
    (void)run_stopped(true, o, "-v", text, sizeof text);
    ck_assert_msg(strstr(text, "\ncontinue with: sample -v\n") != NULL, "%s", text);
}
END_TEST

START_TEST(the_second_signal_ends_it_at_once) {
    char         text[1024];
    stop_options o = {.signal_number = SIGNALS[_i], .again = true};
    int          status = run_stopped(true, o, "-v", text, sizeof text);
    ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGNALS[_i], "status %d: %s", status, text);
}
END_TEST

START_TEST(a_program_that_cannot_stop_in_order_ends_at_once) {
    char         text[1024];
    stop_options o = {.signal_number = SIGNALS[_i]};
    int          status = run_stopped(false, o, "-v", text, sizeof text);
    ck_assert_msg(WIFSIGNALED(status) && WTERMSIG(status) == SIGNALS[_i], "status %d: %s", status, text);
}
END_TEST

START_TEST(a_signal_that_was_ignored_stays_ignored) {
    char         text[1024];
    stop_options o = {.signal_number = SIGNALS[_i], .again = true, .ignored = true};
    int          status = run_stopped(true, o, "-v", text, sizeof text);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %d: %s", status, text);
    ck_assert_str_eq(text, "");
}
END_TEST

START_TEST(a_stopped_program_says_so_in_events) {
    char         text[1024];
    stop_options o = {.signal_number = SIGTERM};
    (void)run_stopped(true, o, "--progress=json", text, sizeof text);
    char *second = strchr(text, '\n') + 1;
    *strchr(second, '\n') = 0;
    cJSON *event = cJSON_Parse(second);
    second[-1] = 0;
    cJSON *answer = cJSON_Parse(text);
    ck_assert_msg(event != NULL && answer != NULL, "not JSON: %s, %s", text, second);
    has_text(answer, "event", "stopping");
    has_text(event, "event", "stopped");
    has_text(event, "code", "KVQ-E7501");
    has_number(event, "exit_code", 75, 75);
    has_text(event, "message", "layers 0 to 3 are kept");
    has_text(event, "command", "'/opt/a b/sample' --progress=json");
    cJSON_Delete(event);
    cJSON_Delete(answer);
}
END_TEST

START_TEST(quiet_keeps_warnings_and_errors_only) {
    const kvq_cli_common common = {.quiet = true};
    kvq_cli              cli;
    char                 path[512], text[512];
    stderr_to_file(path, sizeof path);
    kvq_cli_console_init(&cli, "sample", &common);
    kvq_cli_say(&cli, "plan");
    kvq_cli_next(&cli, "kvq", NULL);
    kvq_log(&cli.ctx, KVQ_LOG_INFO, "info");
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "");
    kvq_log(&cli.ctx, KVQ_LOG_WARNING, "odd");
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "sample: warning: odd\n");
}
END_TEST

START_TEST(the_next_command_can_be_pasted_into_a_shell) {
    const kvq_cli_common common = {.quiet = false};
    kvq_cli              cli;
    char                 path[512], text[512];
    stderr_to_file(path, sizeof path);
    kvq_cli_console_init(&cli, "sample", &common);
    kvq_cli_next(&cli, "kvq-validate", "--text", "my file's.txt", "--gate", "dppl<=1%", "", NULL);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "next: kvq-validate --text 'my file'\\''s.txt' --gate 'dppl<=1%' ''\n");
}
END_TEST

// ---------------------------------------------------------------- JSON

START_TEST(numbers_come_back_with_every_bit) {
    const double values[] = {0.02, 1.0 / 3, 5.0 / 3 * 1e-9, 0x1.fffffffffffffp+1023, 0x1p-1074, -1234567.891};
    kvq_json     json;
    char        *text = NULL;
    kvq_json_init(&json);
    kvq_json_doubles(&json, json.root, "x", values, CLI_COUNT_OF(values));
    kvq_test_ok(kvq_json_line(&json, &text, NULL), NULL);
    cJSON *back = cJSON_Parse(text);
    for (int i = 0; i < CLI_COUNT_OF(values); i++) {
        ck_assert_double_eq(cJSON_GetArrayItem(cJSON_GetObjectItem(back, "x"), i)->valuedouble, values[i]);
    }
    ck_assert_msg(strstr(text, "[0.02,") != NULL, "not the shortest form: %s", text);
    cJSON_Delete(back);
    free(text);
    kvq_json_free(&json);
}
END_TEST

START_TEST(a_double_and_its_neighbour_stay_different) {
    const double pair[] = {0.1, nextafter(0.1, 1)};
    kvq_json     json;
    char        *text = NULL;
    kvq_json_init(&json);
    kvq_json_doubles(&json, json.root, "x", pair, 2);
    kvq_test_ok(kvq_json_line(&json, &text, NULL), NULL);
    ck_assert_str_eq(text, "{\"x\":[0.1,0.10000000000000002]}");
    free(text);
    kvq_json_free(&json);
}
END_TEST

START_TEST(what_json_cannot_say_becomes_null_or_text) {
    const float floats[] = {0.1f, (float)NAN, (float)INFINITY};
    kvq_json    json;
    char       *text = NULL;
    kvq_json_init(&json);
    kvq_json_number(&json, json.root, "nan", (double)NAN);
    kvq_json_number(&json, json.root, "inf", -(double)INFINITY);
    kvq_json_floats(&json, json.root, "f", floats, 3);
    kvq_json_floats(&json, json.root, "none", NULL, 3);
    kvq_json_seed(&json, json.root, "small", 9007199254740992u);
    kvq_json_seed(&json, json.root, "large", 9007199254740993u);
    kvq_json_text(&json, json.root, "quote", "a\"b\n");
    kvq_test_ok(kvq_json_line(&json, &text, NULL), NULL);
    ck_assert_str_eq(text, "{\"nan\":null,\"inf\":null,\"f\":[0.1,null,null],\"none\":null,\"small\":9007199254740992,"
                           "\"large\":\"9007199254740993\",\"quote\":\"a\\\"b\\n\"}");
    free(text);
    kvq_json_free(&json);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(values_arrive_in_their_fields),
    KVQ_CASE(a_percentage_and_a_fraction_are_the_same_number),
    KVQ_LOOP(sizes_have_units, CLI_COUNT_OF(SIZES)),
    KVQ_CASE(operands_are_kept_in_order_between_options),
    KVQ_CASE(underscores_in_names_are_dashes),
    KVQ_CASE(a_list_keeps_every_value_in_order),
    KVQ_LOOP(bad_values_are_refused_with_option_and_value, CLI_COUNT_OF(BAD_VALUES)),
    KVQ_CASE(unknown_options_name_the_closest_one),
    KVQ_CASE(what_follows_a_mistake_is_read_all_the_same),
    KVQ_CASE(abbreviations_are_not_accepted),
    KVQ_CASE(closest_prefers_the_fewest_changes_and_gives_up_on_other_words),
    KVQ_CASE(sizes_and_times_are_short),
    KVQ_CASE(the_processor_has_a_name),
    KVQ_CASE(memory_is_measured),
    KVQ_CASE(without_a_terminal_progress_is_a_line_now_and_then),
    KVQ_CASE(what_an_earlier_run_did_says_nothing_about_the_time_left),
    KVQ_CASE(a_bar_is_redrawn_in_place_and_left_before_other_lines),
    KVQ_CASE(a_progress_event_says_everything),
    KVQ_CASE(events_come_once_a_second_and_at_both_ends_of_a_stage),
    KVQ_CASE(with_events_every_line_is_json),
    KVQ_LOOP(the_first_signal_ends_a_program_in_order, CLI_COUNT_OF(SIGNALS)),
    KVQ_CASE(a_program_that_kvq_started_is_continued_by_its_own_name),
    KVQ_LOOP(the_second_signal_ends_it_at_once, CLI_COUNT_OF(SIGNALS)),
    KVQ_LOOP(a_program_that_cannot_stop_in_order_ends_at_once, CLI_COUNT_OF(SIGNALS)),
    KVQ_LOOP(a_signal_that_was_ignored_stays_ignored, CLI_COUNT_OF(SIGNALS)),
    KVQ_CASE(a_stopped_program_says_so_in_events),
    KVQ_CASE(quiet_keeps_warnings_and_errors_only),
    KVQ_CASE(the_next_command_can_be_pasted_into_a_shell),
    KVQ_CASE(numbers_come_back_with_every_bit),
    KVQ_CASE(a_double_and_its_neighbour_stay_different),
    KVQ_CASE(what_json_cannot_say_becomes_null_or_text),
};

KVQ_TEST_MAIN("cli", CASES)
