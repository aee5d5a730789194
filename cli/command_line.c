// SPDX-License-Identifier: Apache-2.0
//
// Options back to a command line. Reports say how their numbers came about; they are passed on, so they name files as
// everything else that is passed on does, without the folders of this machine.
#include <stdlib.h>
#include <string.h>

#include "kvq_cli.h"

typedef struct command {
    FILE                 *to;
    const kvq_cli_option *row;
} command;

// Without value NULL: a flag.
static void write_option(const command *c, const char *value) {
    (void)fprintf(c->to, " --%s", c->row->name);
    if (value == NULL) return;
    (void)fputc(' ', c->to);
    if (c->row->path) {
        const char *name = kvq_file_name(value);
        if (name[0] != 0) value = name; // "folder/" stays
    }
    kvq_cli_write_word(c->to, value);
}

static void write_texts(const command *c, const kvq_cli_list *list) {
    for (int i = 0; i < list->count; i++) write_option(c, list->items[i]);
}

static bool same_text(const char *a, const char *b) { return a == b || (a != NULL && b != NULL && strcmp(a, b) == 0); }

static void write_row(const command *c, const void *now, const void *usual) {
    const kvq_cli_seed *seed = now;
    char                text[32];
    switch (c->row->kind) {
    case CLI_FLAG:
        if (*(const bool *)now && !*(const bool *)usual) write_option(c, NULL);
        break;
    case CLI_TEXT:
        if (!same_text(*(const char *const *)now, *(const char *const *)usual))
            write_option(c, *(const char *const *)now);
        break;
    case CLI_LIST:
        write_texts(c, now);
        break;
    case CLI_COUNT:
    case CLI_BYTES:
        (void)snprintf(text, sizeof text, "%lld", (long long)*(const int64_t *)now);
        if (*(const int64_t *)now != *(const int64_t *)usual) write_option(c, text);
        break;
    case CLI_SEED:
        (void)snprintf(text, sizeof text, "%llu", (unsigned long long)seed->value);
        if (seed->given) write_option(c, text);
        break;
    case CLI_NUMBER:
        kvq_cli_format_exact(*(const double *)now, text);
        if (*(const double *)now != *(const double *)usual) write_option(c, text);
        break;
    case CLI_FRACTION: // 12 digits: 0.07 is not 7.000000000000001 %
        (void)snprintf(text, sizeof text, "%.12g%%", 100 * *(const double *)now);
        if (*(const double *)now != *(const double *)usual) write_option(c, text);
        break;
    case CLI_CHOICE:
        if (*(const int *)now != *(const int *)usual) write_option(c, c->row->choices[*(const int *)now]);
        break;
    case CLI_FRACTIONS: // no program with a report has these
    case CLI_OPERAND:
    case CLI_OPERANDS:
        break;
    }
}

char *kvq_cli_command(const kvq_cli_program *program, const void *options, const void *defaults) {
    char   *text = NULL;
    size_t  length = 0;
    command c = {.to = open_memstream(&text, &length)};
    if (c.to == NULL) return NULL;
    (void)fputs(program->name, c.to);
    for (int i = 0; i < program->n_options; i++) {
        c.row = &program->options[i];
        if (!c.row->aside) write_row(&c, (const char *)options + c.row->at, (const char *)defaults + c.row->at);
    }
    if (fclose(c.to) == 0) return text;
    free(text);
    return NULL;
}
