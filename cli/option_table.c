// SPDX-License-Identifier: Apache-2.0
//
// One option table drives parsing, checking, suggestions and help, so that they cannot disagree. popt splits the
// command line; values are converted here, because a number must be read to its last character and lie in a stated
// range.
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <popt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "option_table.h"

static const char *const PROGRESS_NAMES[] = {"auto", "plain", "json", "none", NULL}; // in the order of kvq_cli_progress

static const kvq_cli_option COMMON[] = {
    {"progress", 0, CLI_CHOICE, offsetof(kvq_cli_common, progress), "HOW",
     .help = "auto (a bar on a terminal), plain, json (events) or none", .choices = PROGRESS_NAMES},
    {"quiet", 'q', CLI_FLAG, offsetof(kvq_cli_common, quiet), NULL, .help = "only results, warnings and errors"},
    {"verbose", 'v', CLI_FLAG, offsetof(kvq_cli_common, verbose), NULL, .help = "more about what is being done"},
    {"help", 'h', CLI_FLAG, offsetof(kvq_cli_common, help), NULL, .help = "print this and exit"},
    {"help-all", 0, CLI_FLAG, offsetof(kvq_cli_common, help_all), NULL, .help = "all options, also those that few need",
     .rare = true},
    {"version", 'V', CLI_FLAG, offsetof(kvq_cli_common, version), NULL, .help = "print the version and exit"},
};

static bool is_operand(const kvq_cli_option *option) {
    return option->kind == CLI_OPERAND || option->kind == CLI_OPERANDS;
}

option_rows collect_options(const kvq_cli_program *program) {
    option_rows all = {.n = 0};
    assert(program->n_options + CLI_COUNT_OF(COMMON) <= CLI_MAX_OPTIONS);
    for (int i = 0; i < program->n_options && all.n < CLI_MAX_OPTIONS; i++) all.rows[all.n++] = &program->options[i];
    for (int i = 0; i < CLI_COUNT_OF(COMMON) && all.n < CLI_MAX_OPTIONS; i++) all.rows[all.n++] = &COMMON[i];
    return all;
}

// ---------------------------------------------------------------- suggestions

#define MAX_WORD 63

// Levenshtein's distance, one row of the table at a time. Both words are at most MAX_WORD long.
static int edit_distance(const char *a, const char *b) {
    int row[MAX_WORD + 1];
    int n_b = (int)strlen(b);
    for (int j = 0; j <= n_b; j++) row[j] = j;
    for (int i = 1; a[i - 1] != 0; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n_b; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[n_b];
}

const char *kvq_cli_closest(const char *word, const char *const *names, int n_names) {
    const char *closest = NULL;
    size_t      length = strlen(word);
    int         limit = (int)(length / 3) + 2; // more changes than this make another word, not a slip
    if (length > MAX_WORD) return NULL;
    for (int i = 0; i < n_names; i++) {
        if (strlen(names[i]) > MAX_WORD) continue;
        int distance = edit_distance(word, names[i]);
        if (distance < limit) {
            limit = distance;
            closest = names[i];
        }
    }
    return closest;
}

static kvq_status fail_unknown(const kvq_cli_program *program, const char *given, kvq_error *err) {
    option_rows all = collect_options(program);
    const char *names[CLI_MAX_OPTIONS];
    int         n = 0;
    for (int i = 0; i < all.n; i++) {
        if (!is_operand(all.rows[i])) names[n++] = all.rows[i]->name;
    }
    char word[MAX_WORD + 1];
    (void)snprintf(word, sizeof word, "%s", given + strspn(given, "-"));
    word[strcspn(word, "=")] = 0;
    const char *closest = strlen(word) > 1 ? kvq_cli_closest(word, names, n) : NULL;
    char        next[160];
    (void)snprintf(next, sizeof next, closest != NULL ? "did you mean --%s? see %s --help" : "%ssee %s --help",
                   closest != NULL ? closest : "", program->name);
    return kvq_fail(err, KVQ_ERR_USAGE, next, "unknown option %.*s", (int)strcspn(given, "="), given);
}

// ---------------------------------------------------------------- values

static kvq_status set_flag(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    (void)option, (void)text, (void)err;
    *(bool *)field = true;
    return KVQ_OK;
}

static kvq_status set_text(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    (void)option, (void)err;
    *(const char **)field = text;
    return KVQ_OK;
}

static kvq_status set_list(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    kvq_cli_list *list = field;
    if (list->count == CLI_MAX_LIST) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: given more than %d times", option->name, CLI_MAX_LIST);
    }
    list->items[list->count++] = text;
    return KVQ_OK;
}

static kvq_status set_count(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    bool      is_number = (isdigit((unsigned char)text[0]) || text[0] == '-') && *end == 0;
    if (!is_number) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: '%s' is not a whole number", option->name, text);
    }
    if (errno == ERANGE || (double)value < option->min || (double)value > option->max) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: %s is not between %.0f and %.0f", option->name, text,
                        option->min, option->max);
    }
    *(int64_t *)field = value;
    return KVQ_OK;
}

static kvq_status set_seed(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (!isdigit((unsigned char)text[0]) || *end != 0 || errno == ERANGE) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: '%s' is not a whole number between 0 and %llu", option->name,
                        text, (unsigned long long)UINT64_MAX);
    }
    kvq_cli_seed seed = {true, value};
    *(kvq_cli_seed *)field = seed;
    return KVQ_OK;
}

// Digits and points only: strtod also takes hexadecimal numbers, "inf" and "nan". Returns where the number ends, NULL
// when there is none.
static const char *read_number(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return end != text && strspn(text, "+-.0123456789eE") == (size_t)(end - text) ? end : NULL;
}

static kvq_status set_number(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    double      value;
    const char *end = read_number(text, &value);
    if (end == NULL || *end != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: '%s' is not a number", option->name, text);
    if (!(value >= option->min && value <= option->max)) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: %s is not between %g and %g", option->name, text, option->min,
                        option->max);
    }
    *(double *)field = value;
    return KVQ_OK;
}

static kvq_status set_fraction(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    double      value;
    const char *end = read_number(text, &value);
    bool        percent = end != NULL && *end == '%';
    if (end == NULL || end[percent ? 1 : 0] != 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--%s: '%s' is neither a fraction like 0.01 nor a percentage like 1%%", option->name, text);
    }
    if (percent) value /= 100;
    if (!(value >= option->min && value <= option->max)) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: %s is not between %g%% and %g%%", option->name, text,
                        option->min * 100, option->max * 100);
    }
    *(double *)field = value;
    return KVQ_OK;
}

static kvq_status set_fractions(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    kvq_cli_fractions list = {.count = 0};
    for (const char *at = text; at != NULL;) {
        char        one[32];
        const char *comma = strchr(at, ',');
        size_t      length = comma != NULL ? (size_t)(comma - at) : strlen(at);
        if (length >= sizeof one || list.count == KVQ_MAX_FRACTIONS) {
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: '%s' is not a list of up to %d shares like 0,0.25%%,1%%",
                            option->name, text, KVQ_MAX_FRACTIONS);
        }
        memcpy(one, at, length);
        one[length] = 0;
        kvq_status status = set_fraction(option, one, &list.values[list.count++], err);
        if (status != KVQ_OK) return status;
        at = comma != NULL ? comma + 1 : NULL;
    }
    *(kvq_cli_fractions *)field = list;
    return KVQ_OK;
}

static kvq_status set_choice(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    char list[256] = "";
    for (int i = 0; option->choices[i] != NULL; i++) {
        if (strcmp(option->choices[i], text) == 0) {
            *(int *)field = i;
            return KVQ_OK;
        }
        size_t used = strlen(list);
        (void)snprintf(list + used, sizeof list - used, "%s%s", i > 0 ? ", " : "", option->choices[i]);
    }
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: '%s' is none of %s", option->name, text, list);
}

// Units of 1024 and of 1000, with or without the B; "16G" means GiB, as most who type it expect.
static const struct {
    const char *name;
    double      bytes;
} SIZE_UNITS[] = {{"", 1},       {"B", 1},        {"K", 0x1p10},   {"KiB", 0x1p10}, {"KB", 1e3},
                  {"M", 0x1p20}, {"MiB", 0x1p20}, {"MB", 1e6},     {"G", 0x1p30},   {"GiB", 0x1p30},
                  {"GB", 1e9},   {"T", 0x1p40},   {"TiB", 0x1p40}, {"TB", 1e12}};

static kvq_status set_bytes(const kvq_cli_option *option, const char *text, void *field, kvq_error *err) {
    char  *end;
    size_t digits = strspn(text, ".0123456789");
    double value = strtod(text, &end);
    bool   is_number = digits > 0 && end == text + digits; // strtod also takes exponents and hexadecimal numbers
    for (int i = 0; is_number && i < CLI_COUNT_OF(SIZE_UNITS); i++) {
        if (strcasecmp(text + digits, SIZE_UNITS[i].name) != 0) continue;
        value *= SIZE_UNITS[i].bytes;
        if (!(value >= 1 && value < 0x1p60)) break;
        *(int64_t *)field = (int64_t)value;
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--%s: '%s' is not a size like 16GiB or 500MB", option->name, text);
}

typedef kvq_status (*setter)(const kvq_cli_option *option, const char *text, void *field, kvq_error *err);
static const setter SETTERS[] = {
    [CLI_FLAG] = set_flag,   [CLI_TEXT] = set_text,         [CLI_LIST] = set_list,           [CLI_COUNT] = set_count,
    [CLI_SEED] = set_seed,   [CLI_FRACTION] = set_fraction, [CLI_CHOICE] = set_choice,       [CLI_OPERAND] = set_text,
    [CLI_BYTES] = set_bytes, [CLI_OPERANDS] = set_list,     [CLI_FRACTIONS] = set_fractions, [CLI_NUMBER] = set_number,
};

static kvq_status set_value(const kvq_cli_option *option, const char *text, void *options, kvq_error *err) {
    const char *dashes = is_operand(option) ? "" : "--";
    if (text != NULL && text[0] == 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s%s: the value is empty", dashes, option->name);
    }
    return SETTERS[option->kind](option, text, (char *)options + option->at, err);
}

// ---------------------------------------------------------------- the command line

// Long names are accepted with underscores too. Only words that then name an option are changed, so that a value that
// happens to start with two dashes stays what it is.
static void accept_underscores(const option_rows *all, char *word) {
    char   dashed[MAX_WORD + 1];
    size_t length = strcspn(word, "=");
    if (strncmp(word, "--", 2) != 0 || length > MAX_WORD) return;
    for (size_t i = 0; i < length; i++) dashed[i] = word[i];
    for (size_t i = 0; i < length; i++) dashed[i] = (char)(dashed[i] == '_' ? '-' : dashed[i]);
    dashed[length] = 0;
    for (int i = 0; i < all->n; i++) {
        if (!is_operand(all->rows[i]) && strcmp(dashed + 2, all->rows[i]->name) == 0) memcpy(word, dashed, length);
    }
}

static kvq_status take_operands(const kvq_cli_program *program, const option_rows *all, poptContext context,
                                void *options, arguments *args, kvq_error *err) {
    const char *given;
    int         row = 0;
    while ((given = poptGetArg(context)) != NULL) {
        while (row < all->n && !is_operand(all->rows[row])) row++;
        if (row == all->n) {
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s: unexpected argument '%s'", program->name, given);
        }
        char *text = strdup(given); // the given one goes with the context
        if (text == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "could not allocate the command line");
        args->owned[args->n_owned++] = text;
        kvq_status status = set_value(all->rows[row], text, options, err);
        if (status != KVQ_OK) return status;
        row += all->rows[row]->kind == CLI_OPERAND;
    }
    return KVQ_OK;
}

static kvq_status fail_option(const kvq_cli_program *program, int problem, const char *given, kvq_error *err) {
    if (problem == POPT_ERROR_BADOPT) return fail_unknown(program, given, err);
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%.*s: %s", (int)strcspn(given, "="), given,
                    problem == POPT_ERROR_NOARG ? "the value is missing" : poptStrerror(problem));
}

static kvq_status take_options(const kvq_cli_program *program, const option_rows *all, poptContext context,
                               void *options, arguments *args, kvq_error *err) {
    kvq_status first = KVQ_OK;
    int        found;
    // the first mistake is the answer; the rest is read all the same, because it may say how answers are wanted
    while ((found = poptGetNextOpt(context)) != -1) {
        kvq_error *to = first == KVQ_OK ? err : NULL;
        kvq_status status;
        if (found > 0) {
            char *text = poptGetOptArg(context); // ours to free
            if (text != NULL) args->owned[args->n_owned++] = text;
            status = set_value(all->rows[found - 1], text, options, to);
        } else {
            status = fail_option(program, found, poptBadOption(context, POPT_BADOPTION_NOALIAS), to);
        }
        if (first == KVQ_OK) first = status;
    }
    return first;
}

kvq_status parse_arguments(const kvq_cli_program *program, int argc, char **argv, void *options, arguments *args,
                           kvq_error *err) {
    kvq_status        status = KVQ_OK;
    option_rows       all = collect_options(program);
    struct poptOption table[CLI_MAX_OPTIONS + 1] = {{0}}; // the zeroed last row ends the table
    int               n_table = 0;
    for (int i = 0; i < all.n; i++) {
        if (is_operand(all.rows[i])) continue;
        struct poptOption row = {.longName = all.rows[i]->name, .shortName = all.rows[i]->letter, .val = i + 1};
        row.argInfo = all.rows[i]->kind == CLI_FLAG ? POPT_ARG_NONE : POPT_ARG_STRING;
        table[n_table++] = row;
    }

    // every word is copied once, and there are at most as many values and operands as words
    args->owned = calloc(2 * (size_t)argc + 1, sizeof *args->owned);
    if (args->owned == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "could not allocate the command line");
    for (int i = 0; i < argc; i++) {
        char *copy = args->owned[i] = strdup(argv[i]);
        if (copy == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "could not allocate the command line");
        args->n_owned++;
        accept_underscores(&all, copy);
    }

    poptContext context = poptGetContext(program->name, argc, (const char **)args->owned, table, POPT_CONTEXT_NO_EXEC);
    if (context == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "could not allocate the command line");
    status = take_options(program, &all, context, options, args, err);
    if (status == KVQ_OK) status = take_operands(program, &all, context, options, args, err);
    (void)poptFreeContext(context);
    return status;
}

void free_arguments(arguments *args) {
    for (int i = 0; i < args->n_owned; i++) free(args->owned[i]);
    free(args->owned);
}

// ---------------------------------------------------------------- help

#define HELP_COLUMN 28

static void print_row(const kvq_cli_option *option) {
    char left[64] = "";
    if (is_operand(option)) {
        (void)snprintf(left, sizeof left, "  %s", option->name);
    } else {
        char letter[8] = "    ";
        if (option->letter != 0) (void)snprintf(letter, sizeof letter, "-%c, ", option->letter);
        (void)snprintf(left, sizeof left, "  %s--%s%s%s", letter, option->name, option->value != NULL ? " " : "",
                       option->value != NULL ? option->value : "");
    }
    printf("%-*s %s\n", HELP_COLUMN, left, option->help);
}

void print_help(const kvq_cli_program *program, bool with_rare) {
    option_rows all = collect_options(program);
    const char *lead = "usage:";
    int         n_rare = 0;
    for (const char *line = program->synopsis; *line != 0;) {
        int length = (int)strcspn(line, "\n");
        if (*line == ' ') { // goes on with the command above
            printf("       %.*s\n", length, line);
        } else {
            printf("%-6s %s %.*s\n", lead, program->name, length, line);
        }
        lead = "";
        line += length + (line[length] == '\n');
    }
    printf("\n%s\n\n", program->summary);
    for (int i = 0; i < program->n_options; i++) n_rare += program->options[i].rare;
    for (int i = 0; i < all.n; i++) {
        if (!all.rows[i]->rare || with_rare) print_row(all.rows[i]);
    }
    if (n_rare > 0 && !with_rare) printf("      --help-all             these, and %d more options\n", n_rare);
    printf("\n%s", program->notes);
}
