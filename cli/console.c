// SPDX-License-Identifier: Apache-2.0
//
// What a person sees on stderr: plan, log, progress, errors, the next command. A terminal gets a bar that is redrawn;
// a pipe or a file gets plain lines, seldom enough for a log of a run of hours.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kvq_cli.h"

#define BAR_CELLS          28
#define REDRAW_S           0.1
#define PLAIN_LINE_S       30.0 // a plain line at the latest after this long, ...
#define PLAIN_LINE_PERCENT 5    // ... or after this much more, ...
#define PLAIN_PAUSE_S      2.0  // ... but a run of a few seconds is not worth a line

double kvq_cli_now_s(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

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

// ---------------------------------------------------------------- lines

void kvq_cli_end_progress(kvq_cli *cli) {
    if (cli->bar_on_screen) (void)fputc('\n', stderr);
    cli->bar_on_screen = false;
}

void kvq_cli_say(kvq_cli *cli, const char *format, ...) {
    if (cli->quiet) return;
    kvq_cli_end_progress(cli);
    va_list args;
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    va_end(args);
    (void)fputc('\n', stderr);
}

// A word as a shell would read it back: quoted when it holds anything but letters, digits and harmless signs.
static void say_word(const char *word) {
    bool plain = word[0] != 0;
    for (const char *c = word; *c != 0; c++) {
        plain = plain && strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=,+@%", *c) != NULL;
    }
    if (plain) {
        (void)fputs(word, stderr);
        return;
    }
    (void)fputc('\'', stderr);
    for (const char *c = word; *c != 0; c++) (void)(*c == '\'' ? fputs("'\\''", stderr) : fputc(*c, stderr));
    (void)fputc('\'', stderr);
}

void kvq_cli_next(kvq_cli *cli, const char *first, ...) {
    if (cli->quiet) return;
    (void)fflush(stdout); // the result comes first, also where both streams go into one file
    kvq_cli_end_progress(cli);
    (void)fputs("next: ", stderr);
    va_list args;
    va_start(args, first);
    for (const char *word = first; word != NULL; word = va_arg(args, const char *)) {
        if (word != first) (void)fputc(' ', stderr);
        say_word(word);
    }
    va_end(args);
    (void)fputc('\n', stderr);
}

void kvq_cli_print_error(kvq_cli *cli, const kvq_error *err) {
    kvq_cli_end_progress(cli);
    (void)fprintf(stderr, "%s: error KVQ-E%04d: %s\n", cli->program, kvq_status_number(err->status), err->message);
    (void)fprintf(stderr, "  why:  %s\n", kvq_status_cause(err->status));
    (void)fprintf(stderr, "  next: %s\n", err->next);
}

static void on_log(void *user, kvq_log_level level, const char *text) {
    static const char *const NAMES[] = {"error: ", "warning: ", "", ""};
    kvq_cli                 *cli = user;
    kvq_log_level            highest = cli->quiet ? KVQ_LOG_WARNING : cli->verbose ? KVQ_LOG_DEBUG : KVQ_LOG_INFO;
    if (level > highest) return;
    kvq_cli_end_progress(cli);
    (void)fprintf(stderr, "%s: %s%s\n", cli->program, NAMES[level], text);
}

// ---------------------------------------------------------------- progress

static void draw_bar(kvq_cli *cli, int percent, const char *elapsed, const char *left) {
    char cells[BAR_CELLS + 1];
    for (int i = 0; i < BAR_CELLS; i++) cells[i] = (char)(i * 100 < percent * BAR_CELLS ? '#' : '.');
    cells[BAR_CELLS] = 0;
    // padded so that a shorter line covers what a longer one left
    (void)fprintf(stderr, "\r%-12s [%s] %3d%%  %s  left %-8s", cli->stage, cells, percent, elapsed, left);
    (void)fflush(stderr);
    cli->bar_on_screen = true;
}

static void on_progress(void *user, const kvq_progress *p) {
    kvq_cli *cli = user;
    double   now = kvq_cli_now_s();
    if (cli->silent || p->total <= 0) return;
    if (strcmp(cli->stage, p->stage) != 0) {
        kvq_cli_end_progress(cli);
        (void)snprintf(cli->stage, sizeof cli->stage, "%s", p->stage);
        cli->stage_start_s = cli->last_shown_s = now;
        cli->last_percent = 0;
    }
    int    percent = (int)((double)p->done / (double)p->total * 100);
    double pause = now - cli->last_shown_s;
    bool   finished = p->done >= p->total;
    bool   due = cli->animate ? pause >= REDRAW_S || (finished && cli->bar_on_screen)
                              : pause >= PLAIN_LINE_S ||
                                  (pause >= PLAIN_PAUSE_S && percent >= cli->last_percent + PLAIN_LINE_PERCENT);
    if (!due) return;
    cli->last_shown_s = now;
    cli->last_percent = percent;

    char   elapsed[32], left[32] = "?";
    double passed = now - cli->stage_start_s;
    kvq_cli_format_seconds(passed, elapsed, sizeof elapsed);
    if (p->done > 0) kvq_cli_format_seconds(passed * (double)(p->total - p->done) / (double)p->done, left, sizeof left);
    if (cli->animate) {
        draw_bar(cli, percent, elapsed, left);
    } else {
        (void)fprintf(stderr, "%s: %s %d%%  %s  left %s\n", cli->program, cli->stage, percent, elapsed, left);
    }
}

void kvq_cli_console_init(kvq_cli *cli, const char *program, const kvq_cli_common *common) {
    kvq_cli empty = {
        .program = program, .ctx = kvq_context_default(), .quiet = common->quiet, .verbose = common->verbose};
    *cli = empty;
    const char *terminal = getenv("TERM");
    bool        can_animate = isatty(STDERR_FILENO) != 0 && terminal != NULL && strcmp(terminal, "dumb") != 0;
    cli->animate = common->progress == CLI_PROGRESS_AUTO && can_animate;
    cli->silent = common->progress == CLI_PROGRESS_NONE || common->quiet;
    cli->ctx.log = on_log;
    cli->ctx.progress = on_progress;
    cli->ctx.user = cli;
    if (common->n_threads > 0) cli->ctx.n_threads = (int)common->n_threads;
}
