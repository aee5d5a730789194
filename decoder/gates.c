// SPDX-License-Identifier: Apache-2.0
// Gates: a metric, a direction, a limit.
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"

typedef struct metric {
    const char *name;
    bool        share; // a part of one, which may be written in percent
    double (*value)(const kvq_validation *v);
} metric;

static double missing(const kvq_validation *v, double value) { return v->has_artifact ? value : (double)NAN; }
static double dppl_of(const kvq_validation *v) { return missing(v, v->dppl.mean); }
static double kld_of(const kvq_validation *v) { return missing(v, v->kld.mean); }
static double top1_of(const kvq_validation *v) { return missing(v, v->top1.mean); }
static double bits_of(const kvq_validation *v) { return missing(v, v->effective_bits); }
static double ppl_of(const kvq_validation *v) { return v->has_artifact ? v->quantized_ppl : v->baseline_ppl; }

static const metric METRICS[] = {
    {"dppl", true, dppl_of}, {"kld.mean", false, kld_of},        {"top1", true, top1_of},
    {"ppl", false, ppl_of},  {"effective_bits", false, bits_of},
};
#define N_METRICS (sizeof METRICS / sizeof *METRICS)

static kvq_status bad_gate(const char *expression, const char *why, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_USAGE,
                    "write METRIC<=LIMIT or METRIC>=LIMIT; metrics: dppl, kld.mean, top1, ppl, effective_bits",
                    "--gate '%s': %s", expression, why);
}

kvq_status kvq_gate_parse(const char *expression, kvq_gate *out, kvq_error *err) {
    kvq_gate gate = {.metric = NULL};
    bool     share = false, percent = false;
    while (isspace((unsigned char)*expression)) expression++;
    const char *relation = strpbrk(expression, "<>");
    if (strlen(expression) >= sizeof gate.expression) return bad_gate(expression, "too long", err);
    if (relation == NULL || relation[1] != '=') return bad_gate(expression, "there is no <= or >=", err);
    size_t length = (size_t)(relation - expression);
    while (length > 0 && isspace((unsigned char)expression[length - 1])) length--;
    for (size_t i = 0; i < N_METRICS; i++) {
        if (strlen(METRICS[i].name) != length || strncmp(expression, METRICS[i].name, length) != 0) continue;
        gate.metric = METRICS[i].name;
        share = METRICS[i].share;
    }
    if (gate.metric == NULL) return bad_gate(expression, "unknown metric", err);
    char *end;
    gate.limit = strtod(relation + 2, &end);
    if (end == relation + 2 || !isfinite(gate.limit)) return bad_gate(expression, "the limit is not a number", err);
    percent = *end == '%';
    if (percent) {
        gate.limit /= 100;
        end++;
    }
    while (isspace((unsigned char)*end)) end++;
    if (*end != 0) return bad_gate(expression, "there is something behind the limit", err);
    if (percent && !share) return bad_gate(expression, "this metric is no percentage", err);
    // a limit of 10 for a share is 1000 %: a gate that is always open, or never
    if (share && !percent && fabs(gate.limit) > 1)
        return bad_gate(expression, "a limit above 1 needs a percent sign", err);
    gate.at_most = *relation == '<';
    (void)snprintf(gate.expression, sizeof gate.expression, "%s", expression);
    *out = gate;
    return KVQ_OK;
}

kvq_verdict kvq_gate_judge(const kvq_gate *gate, const kvq_validation *validation, double *value) {
    double x = (double)NAN;
    for (size_t i = 0; i < N_METRICS; i++) {
        if (METRICS[i].name == gate->metric) x = METRICS[i].value(validation);
    }
    *value = x;
    return (gate->at_most ? x <= gate->limit : x >= gate->limit) ? KVQ_PASS : KVQ_FAIL;
}
