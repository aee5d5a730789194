// SPDX-License-Identifier: Apache-2.0
//
// The result of kvq-validate on stdout: a table for people, or one JSON document whose keys stay what they are.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "validate_report.h"

static const char *const VERDICT_NAMES[] = {[KVQ_PASS] = "pass", [KVQ_FAIL] = "fail"};

int count_failed_gates(const validate_report *r) {
    double value;
    int    n = 0;
    for (int i = 0; i < r->n_gates; i++) n += kvq_gate_judge(&r->gates[i], &r->validation, &value) == KVQ_FAIL;
    return n;
}

// ---------------------------------------------------------------- text

// "+- 0.050%", or why there is none: one window has no spread.
static const char *plus_minus(double value, int digits, const char *unit, char *out, size_t n) {
    if (isnan(value)) return "+- unknown: one window only";
    (void)snprintf(out, n, "+- %.*f%s", digits, value, unit);
    return out;
}

void print_report_text(const validate_report *r) {
    const kvq_validation *v = &r->validation;
    char                  text[48];
    printf("%s  seq_len %lld  %lld windows  %lld tokens scored\n", r->windows.source, (long long)v->seq_len,
           (long long)v->n_windows, (long long)v->tokens_scored);
    if (r->artifact == NULL) {
        printf("PPL          %.4f\n", v->baseline_ppl);
    } else {
        printf("             baseline     quantized    change\n");
        printf("PPL          %-12.4f %-12.4f %+.3f%% %s\n", v->baseline_ppl, v->quantized_ppl, v->dppl.mean * 100,
               plus_minus(v->dppl.stderr_ * 100, 3, "%", text, sizeof text));
        printf("KLD mean     -            %-12.5f %s\n", v->kld.mean,
               plus_minus(v->kld.stderr_, 5, " nats", text, sizeof text));
        printf("top-1        -            %-12.4f %s\n", v->top1.mean,
               plus_minus(v->top1.stderr_, 4, "", text, sizeof text));
        printf("bits         -            %-12.3f per element of these windows, everything counted\n",
               v->effective_bits);
        int64_t open = v->seq_len % KVQ_TILE_TOKENS;
        if (kvq_artifact_is_allocated(r->artifact) && open > 0) {
            printf("             of which the last %lld tokens of a window, an open tile, count 16 bits\n",
                   (long long)open);
        }
        printf("+- is one standard error over %lld windows\n", (long long)v->n_windows);
    }
    for (int i = 0; i < r->n_gates; i++) {
        double      value;
        kvq_verdict verdict = kvq_gate_judge(&r->gates[i], v, &value);
        bool        percent = strchr(r->gates[i].expression, '%') != NULL;
        printf("gate         %s  %s  (measured %.6g%s)\n", verdict == KVQ_PASS ? "PASS" : "FAIL",
               r->gates[i].expression, percent ? 100 * value : value, percent ? "%" : "");
    }
    if (r->n_gates > 0) {
        int failed = count_failed_gates(r);
        printf("result: %s (%d of %d gates failed)\n", failed == 0 ? "PASS" : "FAIL", failed, r->n_gates);
    }
}

// ---------------------------------------------------------------- JSON

static void add_model(kvq_json *json, const validate_report *r) {
    cJSON *model = kvq_json_object(json, json->root, "model");
    kvq_json_text(json, model, "name", r->identity.name);
    kvq_json_text(json, model, "architecture", r->config->architecture);
    kvq_json_text(json, model, "dtype", r->identity.dtype);
    kvq_json_text(json, model, "config_sha256", r->identity.config_sha256);
    kvq_json_text(json, model, "weights_sha256", r->identity.weights_sha256);
    if (r->artifact == NULL) return;
    cJSON *artifact = kvq_json_object(json, json->root, "artifact");
    kvq_json_text(json, artifact, "name", r->artifact_name);
    kvq_json_text(json, artifact, "content_sha256", r->artifact_sha256);
    kvq_json_bool(json, artifact, "weights_checked", r->weights_checked);
}

static void add_text(kvq_json *json, const validate_report *r) {
    const kvq_windows *w = &r->windows;
    cJSON             *text = kvq_json_object(json, json->root, "text");
    kvq_json_text(json, text, "source", w->source);
    kvq_json_text(json, text, "sha256", w->source_sha256);
    kvq_json_text(json, text, "token_ids_sha256", w->ids_sha256);
    kvq_json_count(json, text, "available_tokens", w->n_available);
    kvq_json_text(json, text, "tokenizer", r->tokenizer.kind);
    kvq_json_text(json, text, "tokenizer_sha256", r->tokenizer.sha256);
    kvq_json_text(json, text, "bos", kvq_cli_bos_names[r->bos]);
    kvq_json_bool(json, text, "bos_added", w->bos_added);
    if (r->self) kvq_json_seed(json, text, "seed", r->seed);
}

static void add_mean(kvq_json *json, const char *key, kvq_mean mean, const double *values, int64_t n) {
    cJSON *object = kvq_json_object(json, json->root, key);
    kvq_json_number(json, object, "mean", mean.mean);
    kvq_json_number(json, object, "stderr", mean.stderr_);
    if (values != NULL) kvq_json_doubles(json, object, "windows", values, n);
}

static void add_side(kvq_json *json, const char *key, double ppl, kvq_mean nll, const double *window_nll, int64_t n) {
    cJSON *side = kvq_json_object(json, json->root, key);
    kvq_json_number(json, side, "ppl", ppl);
    kvq_json_number(json, side, "nll", nll.mean);
    kvq_json_number(json, side, "nll_stderr", nll.stderr_);
    kvq_json_doubles(json, side, "window_nll", window_nll, n);
}

static void add_range(kvq_json *json, const kvq_range_report *range) {
    cJSON *object = kvq_json_object(json, json->root, "k_beyond_range");
    kvq_json_number(json, object, "share", range->share.mean);
    kvq_json_number(json, object, "share_stderr", range->share.stderr_);
    kvq_json_number(json, object, "expected", range->expected);
    kvq_json_bool(json, object, "exceeds", range->exceeds);
    kvq_json_count(json, object, "layer", range->layer);
    kvq_json_count(json, object, "channel", range->channel);
    kvq_json_count(json, object, "token", range->token);
    kvq_json_number(json, object, "layer_share", range->layer_share);
    kvq_json_number(json, object, "channel_share", range->channel_share);
    kvq_json_number(json, object, "token_part", range->token_part);
}

static void add_gates(kvq_json *json, const validate_report *r) {
    cJSON *gates = kvq_json_array(json, json->root, "gates");
    for (int i = 0; i < r->n_gates; i++) {
        double      value;
        kvq_verdict verdict = kvq_gate_judge(&r->gates[i], &r->validation, &value);
        cJSON      *gate = kvq_json_object(json, gates, NULL);
        kvq_json_text(json, gate, "expression", r->gates[i].expression);
        kvq_json_text(json, gate, "metric", r->gates[i].metric);
        kvq_json_number(json, gate, "value", value);
        kvq_json_number(json, gate, "limit", r->gates[i].limit);
        kvq_json_text(json, gate, "verdict", VERDICT_NAMES[verdict]);
    }
}

kvq_status print_report_json(const validate_report *r, kvq_error *err) {
    const kvq_validation *v = &r->validation;
    int64_t               n = v->n_windows;
    kvq_json              json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "schema", "kvq.validate/1");
    kvq_json_text(&json, json.root, "kvq_version", KVQ_VERSION);
    add_model(&json, r);
    add_text(&json, r);
    kvq_json_text(&json, json.root, "compute", kvq_compute_names[r->compute]);
    kvq_json_count(&json, json.root, "windows", n);
    kvq_json_count(&json, json.root, "seq_len", v->seq_len);
    kvq_json_count(&json, json.root, "tokens_scored", v->tokens_scored);
    add_side(&json, "baseline", v->baseline_ppl, v->baseline_nll, v->window_baseline_nll, n);
    if (r->artifact != NULL) {
        add_side(&json, "quantized", v->quantized_ppl, v->quantized_nll, v->window_quantized_nll, n);
        add_mean(&json, "dppl", v->dppl, NULL, 0);
        add_mean(&json, "kld", v->kld, v->window_kld, n);
        kvq_json_number(&json, json.root, "top1", v->top1.mean);
        kvq_json_number(&json, json.root, "top1_stderr", v->top1.stderr_);
        kvq_json_doubles(&json, json.root, "window_top1", v->window_top1, n);
        kvq_json_number(&json, json.root, "effective_bits", v->effective_bits);
        if (v->has_range) add_range(&json, &v->range);
    }
    add_gates(&json, r);
    kvq_status status = kvq_json_print(&json, err);
    kvq_json_free(&json);
    return status;
}
