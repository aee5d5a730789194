// SPDX-License-Identifier: Apache-2.0
//
// What the programs share: strict values, suggestions, exact numbers in JSON. Whole programs are run by
// tests/cli/*.bats.
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kvq_test.h"
#include "option_table.h"

// ---------------------------------------------------------------- a program of every kind of option

typedef struct sample_options {
    kvq_cli_common common;
    const char    *text, *operand;
    kvq_cli_list   list;
    int64_t        count;
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

START_TEST(without_a_terminal_progress_is_a_line_now_and_then) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_PLAIN};
    kvq_cli              cli;
    char                 path[512], text[512];
    stderr_to_file(path, sizeof path);
    kvq_cli_console_init(&cli, "sample", &common);
    kvq_report_progress(&cli.ctx, "forward", 1, 1000);
    kvq_report_progress(&cli.ctx, "forward", 500, 1000);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, ""); // nothing yet: the run may be over in a second
    cli.stage_start_s -= 31;
    cli.last_shown_s -= 31;
    kvq_report_progress(&cli.ctx, "forward", 500, 1000);
    kvq_report_progress(&cli.ctx, "forward", 501, 1000);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "sample: forward 50%  0m31s  left 0m31s\n");
    cli.last_shown_s -= 3; // 5 % more after a short pause are worth a line, 4 % are not
    kvq_report_progress(&cli.ctx, "forward", 540, 1000);
    read_stderr(text, sizeof text);
    ck_assert_str_eq(text, "");
    kvq_report_progress(&cli.ctx, "forward", 550, 1000);
    read_stderr(text, sizeof text);
    ck_assert_msg(strncmp(text, "sample: forward 55%", 19) == 0, "%s", text);
}
END_TEST

START_TEST(a_bar_is_redrawn_in_place_and_left_before_other_lines) {
    const kvq_cli_common common = {.progress = CLI_PROGRESS_AUTO};
    kvq_cli              cli;
    char                 path[512], text[512];
    stderr_to_file(path, sizeof path);
    kvq_cli_console_init(&cli, "sample", &common);
    ck_assert(!cli.animate); // stderr is a file
    cli.animate = true;
    kvq_report_progress(&cli.ctx, "forward", 1, 4);
    cli.last_shown_s -= 1;
    kvq_report_progress(&cli.ctx, "forward", 2, 4);
    kvq_log(&cli.ctx, KVQ_LOG_WARNING, "odd");
    read_stderr(text, sizeof text);
    ck_assert_msg(strstr(text, "\rforward      [##############..............]  50%") == text, "%s", text);
    ck_assert_msg(strstr(text, "\nsample: warning: odd\n") != NULL, "%s", text);
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
    KVQ_CASE(underscores_in_names_are_dashes),
    KVQ_CASE(a_list_keeps_every_value_in_order),
    KVQ_LOOP(bad_values_are_refused_with_option_and_value, CLI_COUNT_OF(BAD_VALUES)),
    KVQ_CASE(unknown_options_name_the_closest_one),
    KVQ_CASE(abbreviations_are_not_accepted),
    KVQ_CASE(closest_prefers_the_fewest_changes_and_gives_up_on_other_words),
    KVQ_CASE(sizes_and_times_are_short),
    KVQ_CASE(the_processor_has_a_name),
    KVQ_CASE(without_a_terminal_progress_is_a_line_now_and_then),
    KVQ_CASE(a_bar_is_redrawn_in_place_and_left_before_other_lines),
    KVQ_CASE(quiet_keeps_warnings_and_errors_only),
    KVQ_CASE(the_next_command_can_be_pasted_into_a_shell),
    KVQ_CASE(numbers_come_back_with_every_bit),
    KVQ_CASE(a_double_and_its_neighbour_stay_different),
    KVQ_CASE(what_json_cannot_say_becomes_null_or_text),
};

KVQ_TEST_MAIN("cli", CASES)
