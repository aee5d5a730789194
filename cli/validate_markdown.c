// SPDX-License-Identifier: Apache-2.0
//
// A summary in Markdown for a pull request: a few KiB, whatever the model. Names are not ours, so they are escaped
// twice: signs of Markdown by backslashes, then those of HTML, which Markdown lets through, by libxml2.
#include <ctype.h>
#include <libxml/entities.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "validate_report.h"

#define N_WORST     3
#define MAX_COMMAND 2000 // bytes of the command that are shown

static void write_escaped(FILE *out, const char *text) {
    char *valid = kvq_cli_valid_text(text), *plain = valid != NULL ? malloc(2 * strlen(valid) + 1) : NULL, *to = plain;
    for (const char *c = valid; to != NULL && *c != 0; c++) {
        if (strchr("\\`*_{}[]()#+!|~:@", *c) != NULL) *to++ = '\\';
        *to++ = (char)(iscntrl((unsigned char)*c) ? ' ' : *c); // a line feed would end a row of a table
    }
    if (to != NULL) *to = 0;
    xmlChar *escaped = plain != NULL ? xmlEncodeSpecialChars(NULL, BAD_CAST plain) : NULL;
    if (escaped != NULL) (void)fputs((const char *)escaped, out);
    xmlFree(escaped);
    free(plain);
    free(valid);
}

static void write_interval(FILE *out, const named_number *number) {
    char low[NUMBER_TEXT], high[NUMBER_TEXT];
    if (!isfinite(number->x.low) && !isfinite(number->x.high)) return;
    format_number(number, number->x.low, "?", low);
    format_number(number, number->x.high, "?", high);
    (void)fprintf(out, "%s to %s", low, high);
}

static void write_number(void *user, const named_number *number) {
    FILE *out = user;
    char  value[NUMBER_TEXT];
    format_number(number, number->x.value, "?", value);
    (void)fprintf(out, "| %s | %s | ", number->title, value);
    write_interval(out, number);
    (void)fputs(" |\n", out);
}

static void write_facts(FILE *out, const validate_report *r) {
    report_fact facts[MAX_FACTS];
    int         n = report_facts(r, facts);
    for (int i = 0; i < n; i++) {
        (void)fprintf(out, "* %s: ", facts[i].name);
        write_escaped(out, facts[i].text);
        (void)fputc('\n', out);
    }
}

static void write_gates(FILE *out, const validate_report *r) {
    if (r->n_gates == 0) return;
    (void)fputs("\n| gate | verdict | measured | interval of 95 % |\n|---|---|---:|---|\n", out);
    for (int i = 0; i < r->n_gates; i++) {
        named_number number = gate_number(r, i);
        char         value[NUMBER_TEXT];
        format_number(&number, number.x.value, "nothing", value);
        (void)fputs("| ", out);
        write_escaped(out, r->gates[i].expression);
        (void)fprintf(out, " | %s | %s | ", kvq_verdict_names[r->judgements[i].verdict], value);
        write_interval(out, &number);
        (void)fputs(" |\n", out);
    }
}

static void write_layers(FILE *out, const validate_report *r) {
    int64_t layers[N_WORST];
    int     n = worst_layers(r, layers, N_WORST);
    if (n == 0) return;
    (void)fputs("\n| worst layers | error of attention | by K alone | by V alone |\n|---:|---:|---:|---:|\n", out);
    for (int i = 0; i < n; i++) {
        const kvq_layer_errors *e = &r->validation.layers[layers[i]];
        (void)fprintf(out, "| %lld | %.2f %% | %.2f %% | %.2f %% |\n", (long long)layers[i],
                      100 * e->attention_error.value, 100 * e->k.attention_error, 100 * e->v.attention_error);
    }
}

// A fence longer than any row of backticks inside cannot be closed from inside.
static void write_command(FILE *out, const char *command) {
    char *text = kvq_cli_valid_text(command != NULL ? command : "");
    int   fence = 3;
    if (text == NULL || text[0] == 0 || strlen(text) > MAX_COMMAND) {
        free(text);
        return;
    }
    for (const char *c = text; *c != 0; c++) {
        int run = (int)strspn(c, "`");
        if (run >= fence) fence = run + 1;
    }
    (void)fputs("\nThe same again:\n\n", out);
    for (int i = 0; i < fence; i++) (void)fputc('`', out);
    (void)fprintf(out, "sh\n%s\n", text);
    for (int i = 0; i < fence; i++) (void)fputc('`', out);
    (void)fputc('\n', out);
    free(text);
}

kvq_status render_markdown(kvq_cli *cli, const validate_report *r, FILE *out, kvq_error *err) {
    char headline[320];
    (void)cli, (void)err;
    report_headline(r, headline, sizeof headline);
    (void)fprintf(out, "### kvq-validate: %s\n\n%s\n", report_outcome(r), headline);
    write_gates(out, r);
    (void)fputs("\n| metric | value | interval of 95 % |\n|---|---:|---|\n", out);
    visit_numbers(r, false, write_number, out);
    write_layers(out, r);
    (void)fputc('\n', out);
    write_facts(out, r);
    write_command(out, r->command);
    (void)fputc('\n', out); // what another program appends begins a new paragraph
    return KVQ_OK;
}
