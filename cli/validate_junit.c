// SPDX-License-Identifier: Apache-2.0
//
// JUnit XML, which every build server shows: a test case per gate, and all numbers as properties. A case that every
// report has says that something was scored, so that a run without gates is no empty suite.
#include <math.h>
#include <string.h>

#include "validate_report.h"
#include "xml_report.h"

static void add_property(kvq_xml *xml, const char *name, const char *value) {
    kvq_xml_open(xml, "property");
    kvq_xml_attribute(xml, "name", name);
    kvq_xml_attribute(xml, "value", value);
    kvq_xml_close_void(xml);
}

static void add_part(kvq_xml *xml, const char *name, const char *part, double x) {
    char full[128], value[CLI_EXACT_NUMBER];
    if (!isfinite(x)) return;
    (void)snprintf(full, sizeof full, "%s%s", name, part);
    kvq_cli_format_exact(x, value);
    add_property(xml, full, value);
}

static void add_number(void *user, const named_number *number) {
    add_part(user, number->name, "", number->x.value);
    add_part(user, number->name, ".stderr", number->x.stderr_);
    add_part(user, number->name, ".low", number->x.low);
    add_part(user, number->name, ".high", number->x.high);
}

static void add_properties(kvq_xml *xml, const validate_report *r) {
    report_fact facts[MAX_FACTS];
    int         n = report_facts(r, facts);
    kvq_xml_open(xml, "properties");
    for (int i = 0; i < n; i++) add_property(xml, facts[i].name, facts[i].text);
    add_property(xml, "token_ids_sha256", r->windows.ids_sha256);
    if (r->artifact != NULL) add_property(xml, "artifact_sha256", r->artifact_sha256);
    if (r->command != NULL) add_property(xml, "command", r->command);
    add_part(xml, "tokens_scored", "", (double)r->validation.tokens_scored);
    visit_numbers(r, true, add_number, xml);
    kvq_xml_close(xml);
}

static void open_case(kvq_xml *xml, const char *name) {
    kvq_xml_open(xml, "testcase");
    kvq_xml_attribute(xml, "classname", "kvq-validate");
    kvq_xml_attribute(xml, "name", name);
}

static void describe_gate(const validate_report *r, int gate, char *out, size_t size) {
    named_number         number = gate_number(r, gate);
    const kvq_judgement *j = &r->judgements[gate];
    char                 value[NUMBER_TEXT], low[NUMBER_TEXT], high[NUMBER_TEXT], limit[NUMBER_TEXT];
    format_number(&number, number.x.value, "nothing", value);
    format_number(&number, number.x.low, "?", low);
    format_number(&number, number.x.high, "?", high);
    format_number(&number, r->gates[gate].limit, "?", limit);
    int length = snprintf(out, size, "measured %s, interval %s to %s, limit %s %s", value, low, high,
                          r->gates[gate].at_most ? "at most" : "at least", limit);
    if (j->verdict == KVQ_INCONCLUSIVE && isfinite(j->tokens_to_decide) && (size_t)length < size) {
        (void)snprintf(out + length, size - (size_t)length, "; about %.0f scored tokens would decide",
                       j->tokens_to_decide);
    }
}

static void add_gate(kvq_xml *xml, const validate_report *r, int gate) {
    char        text[320];
    kvq_verdict verdict = r->judgements[gate].verdict;
    bool        failed = verdict == KVQ_FAIL || (verdict == KVQ_INCONCLUSIVE && r->open_fails);
    describe_gate(r, gate, text, sizeof text);
    open_case(xml, r->gates[gate].expression);
    if (failed || verdict == KVQ_INCONCLUSIVE) {
        kvq_xml_open(xml, failed ? "failure" : "skipped");
        kvq_xml_attribute(xml, "message", text);
        if (failed) kvq_xml_attribute(xml, "type", kvq_verdict_names[verdict]);
        kvq_xml_close_void(xml);
    } else {
        kvq_xml_element(xml, "system-out", text);
    }
    kvq_xml_close(xml);
}

static void add_counts(kvq_xml *xml, const validate_report *r) {
    int  open = count_gates(r, KVQ_INCONCLUSIVE), failed = count_gates(r, KVQ_FAIL);
    char text[32];
    (void)snprintf(text, sizeof text, "%d", r->n_gates + 1);
    kvq_xml_attribute(xml, "tests", text);
    (void)snprintf(text, sizeof text, "%d", r->open_fails ? failed + open : failed);
    kvq_xml_attribute(xml, "failures", text);
    kvq_xml_attribute(xml, "errors", "0");
    (void)snprintf(text, sizeof text, "%d", r->open_fails ? 0 : open);
    kvq_xml_attribute(xml, "skipped", text);
}

kvq_status render_junit(kvq_cli *cli, const validate_report *r, FILE *out, kvq_error *err) {
    kvq_xml xml;
    char    headline[320], name[640];
    (void)cli;
    kvq_xml_init(&xml, false);
    kvq_xml_open(&xml, "testsuites");
    kvq_xml_attribute(&xml, "name", "kvq-validate");
    add_counts(&xml, r);
    kvq_xml_open(&xml, "testsuite");
    (void)snprintf(name, sizeof name, "%s%s%s", r->identity.name, r->artifact != NULL ? ", " : "",
                   r->artifact != NULL ? r->artifact_name : "");
    kvq_xml_attribute(&xml, "name", name);
    add_counts(&xml, r);
    add_properties(&xml, r);
    open_case(&xml, "scored");
    report_headline(r, headline, sizeof headline);
    kvq_xml_element(&xml, "system-out", headline);
    kvq_xml_close(&xml);
    for (int i = 0; i < r->n_gates; i++) add_gate(&xml, r, i);
    kvq_xml_close(&xml);
    kvq_xml_close(&xml);
    kvq_status status = kvq_xml_write(&xml, out, err);
    kvq_xml_free(&xml);
    return status;
}
