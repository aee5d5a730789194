// SPDX-License-Identifier: Apache-2.0
//
// The result of kvq-validate on stdout, for people.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "validate_report.h"

int count_gates(const validate_report *r, kvq_verdict verdict) {
    int n = 0;
    for (int i = 0; i < r->n_gates; i++) n += r->judgements[i].verdict == verdict;
    return n;
}

// "0.5123 (0.5011 .. 0.5240)"; without an interval the value alone. An end that is not known is "?".
void format_estimate(kvq_estimate x, double scale, int digits, const char *unit, char *out, size_t n) {
    char low[32] = "?", high[32] = "?";
    if (isnan(x.low) || (x.low == x.value && x.high == x.value)) {
        (void)snprintf(out, n, "%.*f%s", digits, x.value * scale, unit);
        return;
    }
    if (isfinite(x.low)) (void)snprintf(low, sizeof low, "%.*f", digits, x.low * scale);
    if (isfinite(x.high)) (void)snprintf(high, sizeof high, "%.*f", digits, x.high * scale);
    (void)snprintf(out, n, "%.*f%s (%s .. %s)", digits, x.value * scale, unit, low, high);
}

static void print_row(const char *name, kvq_estimate x, double scale, int digits, const char *unit, const char *more) {
    char text[96];
    format_estimate(x, scale, digits, unit, text, sizeof text);
    printf("%-18s %s%s\n", name, text, more);
}

static void print_kld(const kvq_validation *v) {
    char noise[64] = "";
    if (v->has_noise) (void)snprintf(noise, sizeof noise, "  noise floor %.5f", v->noise_kld.value);
    print_row("KLD mean", v->kld, 1, 5, " nats", noise);
    print_row("KLD median", v->kld_quantiles[KVQ_KLD_MEDIAN], 1, 5, "", "");
    print_row("KLD p90", v->kld_quantiles[KVQ_KLD_P90], 1, 4, "", "");
    print_row("KLD p99", v->kld_quantiles[KVQ_KLD_P99], 1, 4, "", "");
    print_row("KLD p99.9", v->kld_quantiles[KVQ_KLD_P999], 1, 3, "", "");
    printf("%-18s %.3f\n", "KLD max", v->kld_max);
}

static void print_buckets(const char *name, const kvq_bucket *buckets, int n, int digits, bool inclusive) {
    printf("%-18s", name);
    for (int i = 0; i < n; i++) {
        printf("%s%.*f-%.*f: %.4f", i == 0 ? " " : ", ", digits, buckets[i].from, digits,
               buckets[i].to - (inclusive ? 1 : 0), buckets[i].kld.value);
    }
    printf("\n");
}

static int worst(const kvq_validation *v, double (*error)(const kvq_layer_errors *)) {
    int at = 0;
    for (int l = 1; l < v->n_layers; l++) at = error(&v->layers[l]) > error(&v->layers[at]) ? l : at;
    return at;
}
static double attention_of(const kvq_layer_errors *e) { return e->attention_error.value; }
static double k_nmse_of(const kvq_layer_errors *e) { return e->k.nmse; }
static double v_nmse_of(const kvq_layer_errors *e) { return e->v.nmse; }

static void print_layers(const kvq_validation *v) {
    if (v->layers == NULL) return;
    int  a = worst(v, attention_of), k = worst(v, k_nmse_of), value = worst(v, v_nmse_of);
    char text[96];
    format_estimate(v->layers[a].attention_error, 100, 2, "%", text, sizeof text);
    printf("%-18s attention %s in layer %d, K %.2e in layer %d, V %.2e in layer %d (%lld windows)\n", "worst layers",
           text, a, v->layers[k].k.nmse, k, v->layers[value].v.nmse, value, (long long)v->options.layer_windows);
}

static void print_quantized(const validate_report *r) {
    const kvq_validation *v = &r->validation;
    int64_t               open = v->seq_len % KVQ_TILE_TOKENS;
    print_row("PPL baseline", v->baseline_ppl, 1, 4, "", "");
    print_row("PPL quantized", v->quantized_ppl, 1, 4, "", "");
    print_row("PPL change", v->dppl, 100, 3, "%", "  paired");
    print_kld(v);
    print_row("top-1 agreement", v->top1, 100, 2, "%", "");
    print_row("top-5 agreement", v->top5, 100, 2, "%", "");
    print_row("RMS of dp", v->dp_rms, 100, 2, "%", "");
    print_buckets("KLD by position", v->positions, v->n_positions, 0, true);
    print_buckets("KLD by confidence", v->confidences, v->n_confidences, 2, false);
    print_layers(v);
    printf("%-18s %.3f per element of these windows, everything counted\n", "bits", v->effective_bits);
    if (kvq_artifact_is_allocated(r->artifact) && open > 0) {
        printf("                   of which the last %lld tokens of a window, an open tile, count 16 bits\n",
               (long long)open);
    }
    if (v->has_regression) {
        print_row("PPL regression", v->regression_ppl, 100, 3, "%", "  paired with the earlier report");
        print_row("KLD regression", v->regression_kld, 100, 2, "%", "");
    }
    if (v->n_windows > 1)
        printf("(in parentheses: intervals of 95%% over %lld windows)\n", (long long)v->n_windows);
    else
        printf("(one window has no spread: there are no intervals)\n");
}

static void print_gate(const validate_report *r, int i) {
    const kvq_gate          *gate = &r->gates[i];
    const kvq_judgement     *j = &r->judgements[i];
    static const char *const WORDS[] = {[KVQ_PASS] = "PASS", [KVQ_FAIL] = "FAIL", [KVQ_INCONCLUSIVE] = "INCONCLUSIVE"};
    bool                     percent = strchr(gate->expression, '%') != NULL;
    char                     text[96];
    format_estimate(j->measured, percent ? 100 : 1, percent ? 3 : 5, percent ? "%" : "", text, sizeof text);
    printf("gate               %s  %s  measured %s", WORDS[j->verdict], gate->expression, text);
    if (j->verdict == KVQ_INCONCLUSIVE && isfinite(j->tokens_to_decide) && r->passkey.n_lengths == 0)
        printf("; about %.0f scored tokens would decide", j->tokens_to_decide);
    else if (j->verdict == KVQ_INCONCLUSIVE)
        printf("; %s", r->passkey.n_lengths > 0       ? "take more trials"
                       : r->validation.n_windows == 1 ? "one window decides nothing"
                                                      : "take more windows");
    printf("\n");
}

static void print_measured(const validate_report *r) {
    const kvq_validation *v = &r->validation;
    printf("%s  seq_len %lld  %lld windows  %lld tokens scored", r->windows.source, (long long)v->seq_len,
           (long long)v->n_windows, (long long)v->tokens_scored);
    if (v->options.protocol == KVQ_PROTOCOL_DECODE)
        printf("  decoding behind a prompt of %lld", (long long)v->options.n_prompt);
    printf("\n");
    if (r->artifact == NULL)
        print_row("PPL", v->baseline_ppl, 1, 4, "", "");
    else
        print_quantized(r);
}

void print_report_text(const validate_report *r) {
    if (r->passkey.n_lengths > 0)
        passkey_print(&r->passkey);
    else
        print_measured(r);
    if (r->artifact != NULL) kvq_cli_print_memory(r->artifact);
    for (int i = 0; i < r->n_gates; i++) print_gate(r, i);
    if (r->n_gates == 0) return;
    int failed = count_gates(r, KVQ_FAIL), open = count_gates(r, KVQ_INCONCLUSIVE);
    printf("result: %s (%d of %d gates failed, %d inconclusive)\n",
           failed > 0 ? "FAIL"
           : open > 0 ? "INCONCLUSIVE"
                      : "PASS",
           failed, r->n_gates, open);
}
