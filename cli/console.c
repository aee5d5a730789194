// SPDX-License-Identifier: Apache-2.0
//
// What a person sees on stderr: plan, log, progress, errors, the next command. A terminal gets a bar that is redrawn;
// a pipe or a file gets plain lines, seldom enough for a log of a run of hours; a program gets one JSON event a line.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "kvq_cli.h"

#define LINE_BYTES         2048 // a longer line of the plan is cut
#define MAX_COLUMNS        200  // of a line that is redrawn
#define USUAL_COLUMNS      80   // of a terminal that does not say
#define BAR_CELLS          28   // fewer in a narrow terminal, ...
#define LEAST_BAR_CELLS    5    // ... or none
#define REDRAW_S           0.1
#define EVENT_S            1.0  // JSON events of a stage, beside its first and its last
#define PLAIN_LINE_S       30.0 // a plain line at the latest after this long, ...
#define PLAIN_LINE_PERCENT 5    // ... or after this much more, ...
#define PLAIN_PAUSE_S      2.0  // ... but a run of a few seconds is not worth a line

void kvq_cli_format_bytes(double bytes, char *out, size_t n) {
    static const char *const UNITS[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    int                      unit = 0;
    while (bytes >= 1024 && unit < CLI_COUNT_OF(UNITS) - 1) {
        bytes /= 1024;
        unit++;
    }
    (void)snprintf(out, n, unit == 0 ? "%.0f %s" : "%.1f %s", bytes, UNITS[unit]);
}

void kvq_cli_format_seconds(double s, char *out, size_t n) {
    long whole = (long)s;
    if (s < 10) {
        (void)snprintf(out, n, "%.1fs", s);
    } else if (whole < 3600) {
        (void)snprintf(out, n, "%ldm%02lds", whole / 60, whole % 60);
    } else {
        (void)snprintf(out, n, "%ldh%02ldm", whole / 3600, whole / 60 % 60);
    }
}

// ---------------------------------------------------------------- events

// An event is written at once, so that nothing comes between its parts. Without memory its name must do.
static void emit(kvq_json *event, const char *name) {
    char *text = NULL;
    if (kvq_json_line(event, &text, NULL) == KVQ_OK) {
        (void)fprintf(stderr, "%s\n", text);
    } else {
        (void)fprintf(stderr, "{\"event\":\"%s\"}\n", name);
    }
    free(text);
    kvq_json_free(event);
}

static kvq_json new_event(const char *name) {
    kvq_json event;
    kvq_json_init(&event);
    kvq_json_text(&event, event.root, "event", name);
    return event;
}

static void emit_log(const char *level, const char *text) {
    kvq_json event = new_event("log");
    kvq_json_text(&event, event.root, "level", level);
    kvq_json_text(&event, event.root, "text", text);
    emit(&event, "log");
}

// ---------------------------------------------------------------- lines

void kvq_cli_end_progress(kvq_cli *cli) {
    if (cli->bar_on_screen) (void)fputc('\n', stderr);
    cli->bar_on_screen = false;
}

void kvq_cli_say(kvq_cli *cli, const char *format, ...) {
    char    text[LINE_BYTES];
    va_list args;
    if (cli->quiet) return;
    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    kvq_cli_end_progress(cli);
    if (cli->json) {
        emit_log("info", text);
    } else {
        (void)fprintf(stderr, "%s\n", text);
    }
}

static void on_log(void *user, kvq_log_level level, const char *text) {
    static const char *const LEVELS[] = {"error", "warning", "info", "debug"};
    kvq_cli                 *cli = user;
    kvq_log_level            highest = cli->quiet ? KVQ_LOG_WARNING : cli->verbose ? KVQ_LOG_DEBUG : KVQ_LOG_INFO;
    bool                     named = level <= KVQ_LOG_WARNING;
    if (level > highest) return;
    kvq_cli_end_progress(cli);
    if (cli->json) {
        emit_log(LEVELS[level], text);
    } else {
        (void)fprintf(stderr, "%s: %s%s%s\n", cli->program, named ? LEVELS[level] : "", named ? ": " : "", text);
    }
}

// ---------------------------------------------------------------- commands

// A word as a shell would read it back: quoted when it holds anything but letters, digits and harmless signs.
void kvq_cli_write_word(FILE *to, const char *word) {
    bool plain = word[0] != 0;
    for (const char *c = word; *c != 0; c++) {
        plain = plain && strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=,+@%", *c) != NULL;
    }
    if (plain) {
        (void)fputs(word, to);
        return;
    }
    (void)fputc('\'', to);
    for (const char *c = word; *c != 0; c++) (void)(*c == '\'' ? fputs("'\\''", to) : fputc(*c, to));
    (void)fputc('\'', to);
}

// A command that can be pasted into a shell, released with free(); NULL when out of memory.
static char *quote_command(const char *const *words, int n_words) {
    char  *text = NULL;
    size_t length = 0;
    FILE  *to = open_memstream(&text, &length);
    if (to == NULL) return NULL;
    for (int i = 0; i < n_words; i++) {
        if (i > 0) (void)fputc(' ', to);
        kvq_cli_write_word(to, words[i]);
    }
    if (fclose(to) == 0) return text;
    free(text);
    return NULL;
}

void kvq_cli_next(kvq_cli *cli, const char *first, ...) {
    const char *words[CLI_MAX_NEXT_WORDS];
    int         n = 0;
    va_list     args;
    if (cli->quiet) return;
    va_start(args, first);
    for (const char *word = first; word != NULL && n < CLI_MAX_NEXT_WORDS; word = va_arg(args, const char *))
        words[n++] = word;
    va_end(args);
    char *command = quote_command(words, n);
    (void)fflush(stdout); // the result comes first, also where both streams go into one file
    kvq_cli_end_progress(cli);
    if (cli->json) {
        kvq_json event = new_event("next");
        kvq_json_text(&event, event.root, "command", command != NULL ? command : "");
        emit(&event, "next");
    } else if (command != NULL) {
        (void)fprintf(stderr, "next: %s\n", command);
    }
    free(command);
}

// The command line again. A program that `kvq` started was called by a shorter name, which is none of a program.
static char *same_command(const kvq_cli *cli) {
    if (cli->argc < 1) return NULL;
    char         ranks[16];
    int          first = cli->n_ranks > 1 ? 3 : 0;
    const char **words = malloc((size_t)(first + cli->argc) * sizeof *words);
    if (words == NULL) return NULL;
    if (first > 0) {
        (void)snprintf(ranks, sizeof ranks, "%d", cli->n_ranks);
        words[0] = "mpirun";
        words[1] = "-n";
        words[2] = ranks;
    }
    int n = first;
    for (int i = 0; i < cli->argc; i++) {
        if (strcmp(cli->argv[i], "--restart") != 0) words[n++] = cli->argv[i]; // that would not continue
    }
    if (strcmp(kvq_file_name(words[first]), cli->program) != 0) words[first] = cli->program;
    char *command = quote_command(words, n);
    free(words);
    return command;
}

// ---------------------------------------------------------------- errors

// A run that was stopped did what it was told, so this reads as no failure: what was kept, and the way to go on.
static void print_stopped(kvq_cli *cli, const kvq_error *err, const char *command) {
    (void)fprintf(stderr, "%s: stopped: %s\n", cli->program, err->message);
    if (command != NULL) (void)fprintf(stderr, "continue with: %s\n", command);
}

static void print_failed(kvq_cli *cli, const kvq_error *err) {
    (void)fprintf(stderr, "%s: error KVQ-E%04d: %s\n", cli->program, kvq_status_number(err->status), err->message);
    (void)fprintf(stderr, "  why:  %s\n", kvq_status_cause(err->status));
    (void)fprintf(stderr, "  next: %s\n", err->next);
}

static void emit_error(const kvq_error *err, const char *command) {
    const char *name = err->status == KVQ_ERR_INTERRUPTED ? "stopped" : "error";
    kvq_json    event = new_event(name);
    char        code[16];
    (void)snprintf(code, sizeof code, "KVQ-E%04d", kvq_status_number(err->status));
    kvq_json_text(&event, event.root, "code", code);
    kvq_json_count(&event, event.root, "exit_code", kvq_status_exit_code(err->status));
    kvq_json_text(&event, event.root, "message", err->message);
    kvq_json_text(&event, event.root, "why", kvq_status_cause(err->status));
    kvq_json_text(&event, event.root, "next", err->next);
    if (command != NULL) kvq_json_text(&event, event.root, "command", command);
    emit(&event, name);
}

void kvq_cli_print_error(kvq_cli *cli, const kvq_error *err) {
    bool stopped = err->status == KVQ_ERR_INTERRUPTED;
    if (stopped && cli->rank > 0) return; // the first process says it for all
    char *command = stopped ? same_command(cli) : NULL;
    kvq_cli_end_progress(cli);
    if (cli->json) {
        emit_error(err, command);
    } else if (stopped) {
        print_stopped(cli, err, command);
    } else {
        print_failed(cli, err);
    }
    free(command);
}

// ---------------------------------------------------------------- progress

// One moment of a stage. Percentage and remaining time are those of the stage: what the stages after it will cost is
// not known here. Elapsed time is that of the program.
typedef struct moment {
    const kvq_progress *p;
    double              percent, elapsed_s, left_s; // left_s NAN: nothing was done yet to judge by
} moment;

static int terminal_columns(void) {
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return USUAL_COLUMNS;
    return size.ws_col < MAX_COLUMNS ? size.ws_col : MAX_COLUMNS;
}

// "  layer 11/32  12m40s  stage left 24m10s  rss 6.1 GiB"; what is not known is left out.
static void describe_moment(const kvq_cli *cli, const moment *m, bool with_memory, char *out, size_t n) {
    char    elapsed[32], left[32] = "?", layer[64] = "", memory[48] = "";
    int64_t resident = with_memory ? kvq_resident_memory() : -1;
    kvq_cli_format_seconds(m->elapsed_s, elapsed, sizeof elapsed);
    if (isfinite(m->left_s)) kvq_cli_format_seconds(m->left_s, left, sizeof left);
    if (m->p->layer >= 0 && cli->n_layers > 0) {
        (void)snprintf(layer, sizeof layer, "  layer %lld/%lld", (long long)m->p->layer, (long long)cli->n_layers);
    } else if (m->p->layer >= 0) {
        (void)snprintf(layer, sizeof layer, "  layer %lld", (long long)m->p->layer);
    }
    if (resident >= 0) {
        char bytes[32];
        kvq_cli_format_bytes((double)resident, bytes, sizeof bytes);
        (void)snprintf(memory, sizeof memory, "  rss %s", bytes);
    }
    (void)snprintf(out, n, "%s  %s  stage left %s%s", layer, elapsed, left, memory);
}

static void draw_bar(kvq_cli *cli, const moment *m) {
    char details[256], bar[BAR_CELLS + 4] = "", line[512];
    int  columns = terminal_columns() - 1;                        // the last column would wrap in some terminals
    int  around = (int)(strlen(cli->stage) + strlen(" [] 100%")); // the bar, beside the details
    describe_moment(cli, m, true, details, sizeof details);
    int cells = columns - around - (int)strlen(details);
    if (cells < 0) describe_moment(cli, m, false, details, sizeof details);
    if (cells > BAR_CELLS) cells = BAR_CELLS;
    if (cells >= LEAST_BAR_CELLS) {
        bar[0] = ' ';
        bar[1] = '[';
        for (int i = 0; i < cells; i++) bar[2 + i] = (char)(i * 100 < m->percent * cells ? '#' : '.');
        bar[2 + cells] = ']';
    }
    (void)snprintf(line, sizeof line, "%s%s %3d%%%s", cli->stage, bar, (int)m->percent, details);
    // cut to the terminal, and padded so that a shorter line covers what a longer one left
    (void)fprintf(stderr, "\r%-*.*s", columns, columns, line);
    (void)fflush(stderr);
    cli->bar_on_screen = true;
}

static void print_line(kvq_cli *cli, const moment *m) {
    char details[256];
    describe_moment(cli, m, true, details, sizeof details);
    (void)fprintf(stderr, "%s: %s %d%%%s\n", cli->program, cli->stage, (int)m->percent, details);
}

static void add_known(kvq_json *event, const char *key, int64_t value, bool known) {
    if (known) {
        kvq_json_count(event, event->root, key, value);
    } else {
        kvq_json_number(event, event->root, key, (double)NAN); // null
    }
}

static void emit_progress(kvq_cli *cli, const moment *m) {
    kvq_json event = new_event("progress");
    int64_t  resident = kvq_resident_memory();
    kvq_json_text(&event, event.root, "stage", cli->stage);
    add_known(&event, "layer", m->p->layer, m->p->layer >= 0);
    add_known(&event, "n_layers", cli->n_layers, cli->n_layers > 0);
    kvq_json_count(&event, event.root, "done", m->p->done);
    kvq_json_count(&event, event.root, "total", m->p->total);
    kvq_json_number(&event, event.root, "percent", floor(m->percent * 10) / 10);
    kvq_json_number(&event, event.root, "elapsed_s", floor(m->elapsed_s * 1000) / 1000);
    kvq_json_number(&event, event.root, "remaining_s", floor(m->left_s * 1000) / 1000);
    add_known(&event, "rss_bytes", resident, resident >= 0);
    emit(&event, "progress");
}

// Whether this moment is shown. A bar is redrawn, so it may come often; a line of a log stays.
static bool is_due(const kvq_cli *cli, const moment *m, double pause_s, bool first) {
    bool finished = m->p->done >= m->p->total;
    if (cli->json) return first || finished || pause_s >= EVENT_S;
    if (cli->animate) return pause_s >= REDRAW_S || (finished && cli->bar_on_screen);
    return pause_s >= PLAIN_LINE_S ||
           (pause_s >= PLAIN_PAUSE_S && (int)m->percent >= cli->last_percent + PLAIN_LINE_PERCENT);
}

static void on_progress(void *user, const kvq_progress *p) {
    kvq_cli *cli = user;
    double   now = kvq_now_s();
    bool     first = strcmp(cli->stage, p->stage) != 0;
    if (cli->silent || p->total <= 0) return;
    moment m = {p, (double)p->done / (double)p->total * 100, now - cli->start_s, (double)NAN};
    if (first) {
        kvq_cli_end_progress(cli);
        (void)snprintf(cli->stage, sizeof cli->stage, "%s", p->stage);
        cli->stage_start_s = cli->last_shown_s = now;
        cli->stage_start_done = p->done; // what an earlier run did says nothing about the speed of this one
        cli->last_percent = (int)m.percent;
    }
    if (p->done > cli->stage_start_done) {
        m.left_s =
            (now - cli->stage_start_s) * (double)(p->total - p->done) / (double)(p->done - cli->stage_start_done);
    }
    if (!is_due(cli, &m, now - cli->last_shown_s, first)) return;
    cli->last_shown_s = now;
    cli->last_percent = (int)m.percent;
    if (cli->json) {
        emit_progress(cli, &m);
    } else if (cli->animate) {
        draw_bar(cli, &m);
    } else {
        print_line(cli, &m);
    }
}

void kvq_cli_console_init(kvq_cli *cli, const char *program, const kvq_cli_common *common) {
    kvq_cli empty = {.program = program,
                     .ctx = kvq_context_default(),
                     .quiet = common->quiet,
                     .verbose = common->verbose,
                     .start_s = kvq_now_s()};
    *cli = empty;
    const char *terminal = getenv("TERM");
    bool        can_animate = isatty(STDERR_FILENO) != 0 && terminal != NULL && strcmp(terminal, "dumb") != 0;
    cli->animate = common->progress == CLI_PROGRESS_AUTO && can_animate;
    cli->json = common->progress == CLI_PROGRESS_JSON;
    cli->silent = common->progress == CLI_PROGRESS_NONE || common->quiet;
    cli->ctx.log = on_log;
    cli->ctx.progress = on_progress;
    cli->ctx.user = cli;
    if (common->n_threads > 0) cli->ctx.n_threads = (int)common->n_threads;
}
