// SPDX-License-Identifier: Apache-2.0
// Gates: a metric, a direction, a limit.
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"

const char *const kvq_verdict_names[] = {"pass", "fail", "inconclusive", NULL};

typedef struct metric {
    const char *name;
    bool        share; // a part of one, which may be written in percent
    kvq_estimate (*of)(const kvq_validation *v);
} metric;

static kvq_estimate exact(double x) { return (kvq_estimate){x, 0, x, x}; }
static kvq_estimate unknown(void) { return exact((double)NAN); }

// The layer whose outputs are hurt most; one that is not known may be that.
static kvq_estimate worst_layer(const kvq_validation *v) {
    kvq_estimate worst = unknown();
    for (int64_t l = 0; v->layers != NULL && l < v->n_layers; l++) {
        kvq_estimate error = v->layers[l].attention_error;
        if (isnan(error.value)) return error;
        if (!(error.value <= worst.value)) worst = error;
    }
    return worst;
}

static kvq_estimate ppl(const kvq_validation *v) { return v->has_artifact ? v->quantized_ppl : v->baseline_ppl; }
static kvq_estimate dppl(const kvq_validation *v) { return v->dppl; }
static kvq_estimate kld(const kvq_validation *v) { return v->kld; }
static kvq_estimate kld_median(const kvq_validation *v) { return v->kld_quantiles[KVQ_KLD_MEDIAN]; }
static kvq_estimate kld_p90(const kvq_validation *v) { return v->kld_quantiles[KVQ_KLD_P90]; }
static kvq_estimate kld_p99(const kvq_validation *v) { return v->kld_quantiles[KVQ_KLD_P99]; }
static kvq_estimate kld_p999(const kvq_validation *v) { return v->kld_quantiles[KVQ_KLD_P999]; }
static kvq_estimate kld_max(const kvq_validation *v) { return exact(v->kld_max); }
static kvq_estimate top1(const kvq_validation *v) { return v->top1; }
static kvq_estimate top5(const kvq_validation *v) { return v->top5; }
static kvq_estimate dp_rms(const kvq_validation *v) { return v->dp_rms; }
static kvq_estimate bits(const kvq_validation *v) { return exact(v->effective_bits); }
static kvq_estimate more_ppl(const kvq_validation *v) { return v->has_regression ? v->regression_ppl : unknown(); }
static kvq_estimate more_kld(const kvq_validation *v) { return v->has_regression ? v->regression_kld : unknown(); }
static kvq_estimate passkey(const kvq_validation *v) { return v->has_passkey ? v->passkey : unknown(); }

#define METRIC_NAMES                                                                                                   \
    "dppl, ppl, kld.mean, kld.median, kld.p90, kld.p99, kld.p99.9, kld.max, top1, top5, dp.rms, layer.attn_err.max, "  \
    "effective_bits, regression.ppl, regression.kld, passkey"
static const metric METRICS[] = {
    {"dppl", true, dppl},
    {"ppl", false, ppl},
    {"kld.mean", false, kld},
    {"kld.median", false, kld_median},
    {"kld.p90", false, kld_p90},
    {"kld.p99", false, kld_p99},
    {"kld.p99.9", false, kld_p999},
    {"kld.max", false, kld_max},
    {"top1", true, top1},
    {"top5", true, top5},
    {"dp.rms", true, dp_rms},
    {"layer.attn_err.max", true, worst_layer},
    {"effective_bits", false, bits},
    {"regression.ppl", true, more_ppl},
    {"regression.kld", true, more_kld},
    {"passkey", true, passkey},
};
#define N_METRICS (sizeof METRICS / sizeof *METRICS)

static kvq_status bad_gate(const char *expression, const char *why, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_USAGE, "write METRIC<=LIMIT or METRIC>=LIMIT; metrics: " METRIC_NAMES,
                    "--gate '%s': %s", expression, why);
}

kvq_status kvq_gate_parse(const char *expression, kvq_gate *out, kvq_error *err) {
    kvq_gate gate = {.metric = NULL};
    bool     percent = false;
    while (isspace((unsigned char)*expression)) expression++;
    const char *relation = strpbrk(expression, "<>");
    if (strlen(expression) >= sizeof gate.expression) return bad_gate(expression, "too long", err);
    if (relation == NULL || relation[1] != '=') return bad_gate(expression, "there is no <= or >=", err);
    size_t length = (size_t)(relation - expression);
    while (length > 0 && isspace((unsigned char)expression[length - 1])) length--;
    for (size_t i = 0; i < N_METRICS; i++) {
        if (strlen(METRICS[i].name) != length || strncmp(expression, METRICS[i].name, length) != 0) continue;
        gate.metric = METRICS[i].name;
        gate.share = METRICS[i].share;
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
    if (percent && !gate.share) return bad_gate(expression, "this metric is no percentage", err);
    // a limit of 10 for a share is 1000 %: a gate that is always open, or never
    if (gate.share && !percent && fabs(gate.limit) > 1)
        return bad_gate(expression, "a limit above 1 needs a percent sign", err);
    gate.at_most = *relation == '<';
    (void)snprintf(gate.expression, sizeof gate.expression, "%s", expression);
    *out = gate;
    return KVQ_OK;
}

bool kvq_gate_needs_artifact(const kvq_gate *gate) { return strcmp(gate->metric, "ppl") != 0; }

static bool within(const kvq_gate *gate, double x) { return gate->at_most ? x <= gate->limit : x >= gate->limit; }

// How many times the tokens bring the end of the interval that lies beyond the limit back to it.
static double times_the_tokens(const kvq_gate *gate, const kvq_estimate *x) {
    double end = x->value < gate->limit ? x->high : x->low;
    if (isnan(end)) return end;
    if (x->value == gate->limit) return (double)INFINITY; // where that end may be the value, too
    double ratio = (end - x->value) / (gate->limit - x->value);
    return ratio * ratio;
}

// Scored tokens of the windows that the metric was measured on.
static double tokens_of(const kvq_gate *gate, const kvq_validation *v) {
    bool of_layers = strcmp(gate->metric, "layer.attn_err.max") == 0;
    return (double)(of_layers ? v->options.layer_windows * v->n_scored : v->tokens_scored);
}

kvq_judgement kvq_gate_judge(const kvq_gate *gate, const kvq_validation *v, bool by_point) {
    kvq_judgement j = {.measured = unknown()};
    for (size_t i = 0; i < N_METRICS && (v->has_artifact || !kvq_gate_needs_artifact(gate)); i++) {
        if (METRICS[i].name == gate->metric) j.measured = METRICS[i].of(v);
    }
    const kvq_estimate *x = &j.measured;
    if (by_point || !isfinite(x->value)) {                        // what overflowed has no interval
        j.verdict = within(gate, x->value) ? KVQ_PASS : KVQ_FAIL; // NaN is within nothing
    } else if (within(gate, x->low) && within(gate, x->high)) {
        j.verdict = KVQ_PASS;
    } else if (x->low > gate->limit || x->high < gate->limit) {
        j.verdict = KVQ_FAIL; // an end that is not within, and the other is not either
    } else {
        j.verdict = KVQ_INCONCLUSIVE;
        j.tokens_to_decide = times_the_tokens(gate, x) * tokens_of(gate, v);
    }
    return j;
}
