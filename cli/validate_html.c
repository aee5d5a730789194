// SPDX-License-Identifier: Apache-2.0
//
// One page that needs nothing else: no scripts, no files beside it. HTML 5 that is well-formed XML as well, so that it
// can be checked. Equal results give equal bytes: nothing in it tells when or where it was made.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plots.h"
#include "validate_report.h"
#include "xml_report.h"

// Signs that XML escapes (< > &) would not be read as such inside of a style element, so there are none.
static const char STYLE[] =
    "*{box-sizing:border-box}"
    "html{color-scheme:light}"
    "body{margin:0;background:#f6f7f9;color:#1e293b;font:15px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,"
    "'Noto Sans',sans-serif}"
    "main{max-width:1060px;margin:0 auto;padding:40px 24px 56px}"
    "h1{font-size:17px;font-weight:600;margin:0 0 4px;color:#475569}"
    "h2{font-size:17px;font-weight:650;margin:40px 0 12px}"
    "h3{font-size:15px;font-weight:600;margin:0}"
    "p{margin:0}"
    ".top{display:flex;gap:18px;align-items:flex-start;background:#fff;border:1px solid #e2e8f0;border-left-width:6px;"
    "border-radius:10px;padding:22px 24px}"
    ".top p{font-size:17px;max-width:46em}"
    ".PASS{border-left-color:#16a34a}.FAIL{border-left-color:#dc2626}.INCONCLUSIVE{border-left-color:#d97706}"
    ".MEASURED{border-left-color:#64748b}"
    ".chip{display:inline-block;padding:2px "
    "10px;border-radius:999px;font-size:12px;font-weight:650;letter-spacing:.03em;"
    "white-space:nowrap}"
    ".top .chip{font-size:15px;padding:5px 16px}"
    ".pass{background:#dcfce7;color:#166534}.fail{background:#fee2e2;color:#991b1b}"
    ".inconclusive{background:#fef3c7;color:#92400e}.measured{background:#e2e8f0;color:#334155}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 20px;margin:20px 0 0;padding:0 2px}"
    "dt{color:#64748b}dd{margin:0;overflow-wrap:anywhere}"
    ".scroll{overflow-x:auto;background:#fff;border:1px solid #e2e8f0;border-radius:10px}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{padding:7px 16px;text-align:right;white-space:nowrap;border-bottom:1px solid #eef2f6}"
    "tbody tr:last-child td{border-bottom:0}"
    "th{font-weight:600;font-size:13px;color:#64748b;background:#fafbfc}"
    "th:first-child,td:first-child,.left{text-align:left}"
    ".dense th,.dense td{padding:4px 9px}.dense{font-size:13px}.dense th{font-size:12px}"
    ".dim,.unit{color:#64748b}.value{font-weight:550}td.unit{text-align:left;padding-left:0;width:3.5em}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:18px}"
    "figure{margin:0;background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:16px 16px 8px}"
    "figcaption p{color:#64748b;font-size:13px;margin:1px 0 6px}"
    "svg{display:block;width:100%;height:auto}svg g,svg text{font-family:inherit}"
    ".wide{grid-column:1/-1}"
    "details{margin-top:14px}summary{cursor:pointer;color:#334155;font-weight:600;margin-bottom:10px}"
    "pre{background:#fff;border:1px solid #e2e8f0;border-radius:10px;padding:14px 16px;margin:0;white-space:pre-wrap;"
    "overflow-wrap:anywhere;font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
    ".note{background:#fffbeb;border:1px solid #fde68a;border-radius:10px;padding:10px 16px;color:#78350f}"
    "footer{margin-top:36px;color:#64748b;font-size:13px}"
    "@media print{body{background:#fff}main{padding:0}}";

// ---------------------------------------------------------------- pieces

static void open_class(kvq_xml *xml, const char *name, const char *class) {
    kvq_xml_open(xml, name);
    kvq_xml_attribute(xml, "class", class);
}

static void add_class(kvq_xml *xml, const char *name, const char *class, const char *text) {
    open_class(xml, name, class);
    kvq_xml_text(xml, text);
    kvq_xml_close(xml);
}

// titles: NULL at the end; those before n_left are words, not numbers.
static void open_table(kvq_xml *xml, const char *const *titles, int n_left, const char *class) {
    open_class(xml, "div", class);
    kvq_xml_open(xml, "table");
    kvq_xml_open(xml, "thead");
    kvq_xml_open(xml, "tr");
    for (int i = 0; titles[i] != NULL; i++) {
        kvq_xml_open(xml, "th");
        if (i < n_left) kvq_xml_attribute(xml, "class", "left");
        kvq_xml_text(xml, titles[i]);
        kvq_xml_close(xml);
    }
    kvq_xml_close(xml);
    kvq_xml_close(xml);
    kvq_xml_open(xml, "tbody");
}

static void close_table(kvq_xml *xml) {
    for (int i = 0; i < 3; i++) kvq_xml_close(xml);
    kvq_xml_raw(xml, "\n");
}

static void add_chip(kvq_xml *xml, const char *verdict, const char *text) {
    char class[32];
    (void)snprintf(class, sizeof class, "chip %s", verdict);
    add_class(xml, "span", class, text);
}

static void add_number_cell(kvq_xml *xml, const named_number *form, double x, const char *class, const char *unknown) {
    char text[NUMBER_TEXT];
    format_digits(form, x, unknown, text);
    add_class(xml, "td", class, text);
}

// Units have a column of their own, so that points stand below each other. An end of an interval that the data cannot
// give is infinite; where there is no interval the cells are empty.
static void add_estimate_cells(kvq_xml *xml, const named_number *number) {
    bool has_interval = !isnan(number->x.low) || !isnan(number->x.high);
    add_number_cell(xml, number, number->x.value, "value", "–");
    add_number_cell(xml, number, number->x.low, "dim", has_interval ? "?" : "");
    add_number_cell(xml, number, number->x.high, "dim", has_interval ? "?" : "");
    add_class(xml, "td", "unit", number_unit_name(number));
}

static void open_section(kvq_xml *xml, const char *title) {
    kvq_xml_open(xml, "section");
    kvq_xml_element(xml, "h2", title);
}

// ---------------------------------------------------------------- what was found

static void add_top(kvq_xml *xml, const validate_report *r) {
    static const char *const CHIPS[][2] = {{"PASS", "pass"}, {"FAIL", "fail"}, {"INCONCLUSIVE", "inconclusive"}};
    const char              *outcome = report_outcome(r), *chip = "measured";
    char                     headline[320], class[32];
    report_fact              facts[MAX_FACTS];
    for (int i = 0; i < CLI_COUNT_OF(CHIPS); i++) {
        if (strcmp(outcome, CHIPS[i][0]) == 0) chip = CHIPS[i][1];
    }
    report_headline(r, headline, sizeof headline);
    (void)snprintf(class, sizeof class, "top %s", outcome);
    open_class(xml, "header", class);
    add_chip(xml, chip, outcome);
    kvq_xml_open(xml, "div");
    kvq_xml_element(xml, "h1", "kvq-validate");
    kvq_xml_element(xml, "p", headline);
    kvq_xml_close(xml);
    kvq_xml_close(xml);
    kvq_xml_open(xml, "dl");
    int n = report_facts(r, facts);
    for (int i = 0; i < n; i++) {
        kvq_xml_element(xml, "dt", facts[i].name);
        kvq_xml_element(xml, "dd", facts[i].text);
    }
    kvq_xml_close(xml);
    kvq_xml_raw(xml, "\n");
}

static void add_gates(kvq_xml *xml, const validate_report *r) {
    static const char *const TITLES[] = {"Gate", "Verdict", "Measured", "95 % from", "to", "", NULL};
    if (r->n_gates == 0) return;
    open_section(xml, "Gates");
    open_table(xml, TITLES, 2, "scroll");
    for (int i = 0; i < r->n_gates; i++) {
        named_number number = gate_number(r, i);
        const char  *verdict = kvq_verdict_names[r->judgements[i].verdict];
        kvq_xml_open(xml, "tr");
        kvq_xml_element(xml, "td", r->gates[i].expression);
        open_class(xml, "td", "left");
        add_chip(xml, verdict, verdict);
        kvq_xml_close(xml);
        add_estimate_cells(xml, &number);
        kvq_xml_close(xml);
    }
    close_table(xml);
    kvq_xml_close(xml);
}

static void add_number_row(void *user, const named_number *number) {
    kvq_xml *xml = user;
    kvq_xml_open(xml, "tr");
    kvq_xml_element(xml, "td", number->title);
    add_estimate_cells(xml, number);
    kvq_xml_close(xml);
}

static void add_numbers(kvq_xml *xml, const validate_report *r) {
    static const char *const TITLES[] = {"Metric", "Value", "95 % from", "to", "", NULL};
    open_section(xml, "Metrics");
    open_table(xml, TITLES, 1, "scroll");
    visit_numbers(r, false, add_number_row, xml);
    close_table(xml);
    kvq_xml_close(xml);
}

// ---------------------------------------------------------------- pictures

static plot_result draw(const report_plot *plot, const validate_report *r, char **svg) {
    char  *commands = NULL;
    size_t bytes = 0;
    FILE  *to = open_memstream(&commands, &bytes);
    if (to == NULL) return PLOT_FAILED;
    begin_plot(plot, to);
    plot->script(r, to);
    plot_result result = fclose(to) == 0 ? plot_run(commands, bytes, plot->title, svg) : PLOT_FAILED;
    free(commands);
    return result;
}

static void add_figure(kvq_xml *xml, const report_plot *plot, const char *svg) {
    open_class(xml, "figure", plot->wide ? "wide" : "half");
    kvq_xml_open(xml, "figcaption");
    kvq_xml_element(xml, "h3", plot->title);
    kvq_xml_element(xml, "p", plot->caption);
    kvq_xml_close(xml);
    kvq_xml_raw(xml, svg);
    kvq_xml_close(xml);
    kvq_xml_raw(xml, "\n");
}

// One warning, whatever failed: the numbers are in the tables, so a report without pictures is a report.
static void add_note(kvq_cli *cli, kvq_xml *xml, plot_result result) {
    const char *why = result == PLOT_NO_GNUPLOT ? "gnuplot is not installed" : "gnuplot failed";
    char        text[160];
    kvq_log(&cli->ctx, KVQ_LOG_WARNING, "--html: %s, so the report has tables only", why);
    (void)snprintf(text, sizeof text, "This page has no pictures, because %s where it was made.", why);
    add_class(xml, "p", "note", text);
}

static void add_plots(kvq_cli *cli, kvq_xml *xml, const validate_report *r) {
    int                n;
    const report_plot *plots = report_plots(&n);
    plot_result        result = PLOT_DRAWN;
    if (r->artifact == NULL) return;
    open_section(xml, "Where it is lost");
    open_class(xml, "div", "plots");
    for (int i = 0; i < n && result == PLOT_DRAWN; i++) {
        char *svg = NULL;
        if (!plots[i].has_data(r)) continue;
        result = draw(&plots[i], r, &svg);
        if (result == PLOT_DRAWN) add_figure(xml, &plots[i], svg);
        free(svg);
    }
    kvq_xml_close(xml);
    if (result != PLOT_DRAWN) add_note(cli, xml, result);
    kvq_xml_close(xml);
}

// ---------------------------------------------------------------- tables to look things up in

typedef enum cell_form { CELL_SHORT, CELL_COUNT, CELL_FINE, CELL_SHARE, CELL_SMALL } cell_form;

static void add_cell(kvq_xml *xml, cell_form form, double x) {
    char text[48] = "";
    if (isfinite(x)) {
        switch (form) {
        case CELL_SHORT:
            (void)snprintf(text, sizeof text, "%g", x);
            break;
        case CELL_COUNT:
            (void)snprintf(text, sizeof text, "%.0f", x);
            break;
        case CELL_FINE:
            (void)snprintf(text, sizeof text, "%.4f", x);
            break;
        case CELL_SHARE:
            (void)snprintf(text, sizeof text, "%.2f %%", 100 * x);
            break;
        case CELL_SMALL:
            (void)snprintf(text, sizeof text, "%.2e", x);
            break;
        }
    }
    kvq_xml_element(xml, "td", text);
}

static void open_details(kvq_xml *xml, const char *title) {
    kvq_xml_open(xml, "details");
    kvq_xml_element(xml, "summary", title);
}

static void add_buckets(kvq_xml *xml, const char *title, const kvq_bucket *buckets, int n) {
    static const char *const TITLES[] = {"From",     "to below", "Tokens", "Perplexity",        "quantised",
                                         "KL, nats", "from",     "to",     "Same first choice", NULL};
    open_details(xml, title);
    open_table(xml, TITLES, 1, "scroll dense");
    for (int i = 0; i < n; i++) {
        const kvq_bucket *b = &buckets[i];
        kvq_xml_open(xml, "tr");
        add_cell(xml, CELL_SHORT, b->from);
        add_cell(xml, CELL_SHORT, b->to);
        add_cell(xml, CELL_COUNT, (double)b->n);
        add_cell(xml, CELL_FINE, exp(b->baseline_nll));
        add_cell(xml, CELL_FINE, exp(b->quantized_nll));
        add_cell(xml, CELL_FINE, b->kld.value);
        add_cell(xml, CELL_FINE, b->kld.low);
        add_cell(xml, CELL_FINE, b->kld.high);
        add_cell(xml, CELL_SHARE, b->top1.value);
        kvq_xml_close(xml);
    }
    close_table(xml);
    kvq_xml_close(xml);
}

static void add_tensor_cells(kvq_xml *xml, const kvq_heldout_report *e, double code_use) {
    add_cell(xml, CELL_SHARE, e->attention_error);
    add_cell(xml, CELL_SMALL, e->nmse);
    add_cell(xml, CELL_SHARE, e->outlier_share);
    add_cell(xml, CELL_SHARE, e->clipped_share);
    add_cell(xml, CELL_FINE, code_use);
}

static void add_layers(kvq_xml *xml, const validate_report *r) {
    static const char *const TITLES[] = {"Layer",   "Attention",  "K alone", "NMSE", "outliers",
                                         "clipped", "codes used", "V alone", "NMSE", "outliers",
                                         "clipped", "codes used", NULL};
    const kvq_validation    *v = &r->validation;
    if (v->layers == NULL) return;
    open_details(xml, "Layers");
    open_table(xml, TITLES, 1, "scroll dense");
    for (int64_t l = 0; l < v->n_layers; l++) {
        const kvq_layer_errors *e = &v->layers[l];
        kvq_xml_open(xml, "tr");
        add_cell(xml, CELL_COUNT, (double)l);
        add_cell(xml, CELL_SHARE, e->attention_error.value);
        add_tensor_cells(xml, &e->k, e->k_code_use);
        add_tensor_cells(xml, &e->v, e->v_code_use);
        kvq_xml_close(xml);
    }
    close_table(xml);
    kvq_xml_close(xml);
}

static void add_memory(kvq_xml *xml, const validate_report *r) {
    static const char *const TITLES[] = {
        "Tokens", "GiB in f16", "with this artifact", "times smaller", "bytes per token", "GiB by the paper's formula",
        NULL};
    open_details(xml, "Memory of one sequence");
    open_table(xml, TITLES, 1, "scroll dense");
    for (int i = 0; i < KVQ_N_MEMORY_LENGTHS; i++) {
        kvq_memory m = kvq_artifact_memory(r->artifact, kvq_memory_lengths[i].n_tokens);
        kvq_xml_open(xml, "tr");
        kvq_xml_element(xml, "td", kvq_memory_lengths[i].name);
        add_cell(xml, CELL_FINE, m.fp16_bytes / 0x1p30);
        add_cell(xml, CELL_FINE, m.bytes / 0x1p30);
        add_cell(xml, CELL_FINE, m.fp16_bytes / m.bytes);
        add_cell(xml, CELL_COUNT, m.bytes / (double)m.n_tokens);
        add_cell(xml, CELL_FINE, m.formula_bytes > 0 ? m.formula_bytes / 0x1p30 : (double)NAN);
        kvq_xml_close(xml);
    }
    close_table(xml);
    kvq_xml_close(xml);
}

static void add_details(kvq_xml *xml, const validate_report *r) {
    const kvq_validation *v = &r->validation;
    if (r->artifact == NULL) return;
    open_section(xml, "In detail");
    add_buckets(xml, "By position in the window", v->positions, v->n_positions);
    add_buckets(xml, "By the probability of the first choice in full precision", v->confidences, v->n_confidences);
    add_layers(xml, r);
    add_memory(xml, r);
    kvq_xml_close(xml);
}

// ---------------------------------------------------------------- the page

static void add_head(kvq_xml *xml, const validate_report *r) {
    char title[640];
    kvq_xml_open(xml, "head");
    kvq_xml_open(xml, "meta");
    kvq_xml_attribute(xml, "charset", "utf-8");
    kvq_xml_close_void(xml);
    kvq_xml_open(xml, "meta");
    kvq_xml_attribute(xml, "name", "viewport");
    kvq_xml_attribute(xml, "content", "width=device-width, initial-scale=1");
    kvq_xml_close_void(xml);
    (void)snprintf(title, sizeof title, "kvq-validate: %s, %s", report_outcome(r),
                   r->artifact != NULL ? r->artifact_name : r->identity.name);
    kvq_xml_element(xml, "title", title);
    kvq_xml_element(xml, "style", STYLE);
    kvq_xml_close(xml);
    kvq_xml_raw(xml, "\n");
}

static void add_end(kvq_xml *xml, const validate_report *r) {
    char text[320];
    if (r->command != NULL) {
        open_section(xml, "The same again");
        kvq_xml_element(xml, "pre", r->command);
        kvq_xml_close(xml);
    }
    if (r->validation.n_windows > 1) {
        (void)snprintf(text, sizeof text,
                       "“from” and “to” are the ends of intervals of 95 %% over %lld windows. The differences are "
                       "paired: each token is scored with both caches.",
                       (long long)r->validation.n_windows);
    } else {
        (void)snprintf(text, sizeof text, "A single window has no spread, so there are no intervals.");
    }
    kvq_xml_element(xml, "footer", text);
}

kvq_status render_html(kvq_cli *cli, const validate_report *r, FILE *out, kvq_error *err) {
    kvq_xml xml;
    kvq_xml_init(&xml, true);
    kvq_xml_open(&xml, "html");
    kvq_xml_attribute(&xml, "lang", "en");
    add_head(&xml, r);
    kvq_xml_open(&xml, "body");
    kvq_xml_open(&xml, "main");
    add_top(&xml, r);
    add_gates(&xml, r);
    add_numbers(&xml, r);
    add_plots(cli, &xml, r);
    add_details(&xml, r);
    add_end(&xml, r);
    kvq_xml_close(&xml);
    kvq_xml_close(&xml);
    kvq_xml_close(&xml);
    kvq_status status = kvq_xml_write(&xml, out, err);
    kvq_xml_free(&xml);
    return status;
}
