// SPDX-License-Identifier: Apache-2.0
//
// The numbers of a validation as one list, so that each has one name, title, unit and precision in every report file.
#include <math.h>
#include <string.h>

#include "validate_report.h"

// ---------------------------------------------------------------- the list

// When a number is there.
typedef enum condition { ALWAYS, QUANTIZED, WITH_NOISE, WITH_RANGE, WITH_REGRESSION } condition;

typedef struct number_row {
    const char *name, *title;
    number_unit unit;
    int         digits;
    condition   when;
    bool        more_is_better;
    bool        exact; // a double; otherwise an estimate
    size_t      at;    // in kvq_validation
} number_row;

#define AT(field) offsetof(kvq_validation, field)
#define KLD(q)    (AT(kld_quantiles) + (q) * sizeof(kvq_estimate))
static const number_row NUMBERS[] = {
    {"baseline.ppl", "Perplexity, full precision", UNIT_NONE, 4, ALWAYS, false, false, AT(baseline_ppl)},
    {"ppl", "Perplexity, quantised", UNIT_NONE, 4, QUANTIZED, false, false, AT(quantized_ppl)},
    {"dppl", "Perplexity, change", UNIT_SHARE, 3, QUANTIZED, false, false, AT(dppl)},
    {"baseline.nll", "Loss, full precision", UNIT_NATS, 5, ALWAYS, false, false, AT(baseline_nll)},
    {"nll", "Loss, quantised", UNIT_NATS, 5, QUANTIZED, false, false, AT(quantized_nll)},
    {"difference_nll", "Loss, difference", UNIT_NATS, 5, QUANTIZED, false, false, AT(difference_nll)},
    {"kld.mean", "KL divergence, mean", UNIT_NATS, 5, QUANTIZED, false, false, AT(kld)},
    {"kld.noise_floor", "KL divergence, noise floor", UNIT_NATS, 5, WITH_NOISE, false, false, AT(noise_kld)},
    {"kld.median", "KL divergence, median", UNIT_NATS, 5, QUANTIZED, false, false, KLD(KVQ_KLD_MEDIAN)},
    {"kld.p90", "KL divergence, 90th percentile", UNIT_NATS, 4, QUANTIZED, false, false, KLD(KVQ_KLD_P90)},
    {"kld.p99", "KL divergence, 99th percentile", UNIT_NATS, 4, QUANTIZED, false, false, KLD(KVQ_KLD_P99)},
    {"kld.p99.9", "KL divergence, 99.9th percentile", UNIT_NATS, 3, QUANTIZED, false, false, KLD(KVQ_KLD_P999)},
    {"kld.max", "KL divergence, largest", UNIT_NATS, 3, QUANTIZED, false, true, AT(kld_max)},
    {"top1", "Same first choice", UNIT_SHARE, 2, QUANTIZED, true, false, AT(top1)},
    {"noise_top1", "Same first choice, noise floor", UNIT_SHARE, 2, WITH_NOISE, true, false, AT(noise_top1)},
    {"top5", "First five in common", UNIT_SHARE, 2, QUANTIZED, true, false, AT(top5)},
    {"dp.rms", "Change of the token's probability, RMS", UNIT_SHARE, 2, QUANTIZED, false, false, AT(dp_rms)},
    {"k_beyond_range", "Keys beyond their calibrated range", UNIT_SHARE, 3, WITH_RANGE, false, false, AT(range.share)},
    {"k_beyond_range.expected", "Keys beyond their range, expected", UNIT_SHARE, 3, WITH_RANGE, false, true,
     AT(range.expected)},
    {"effective_bits", "Bits per element", UNIT_BITS, 3, QUANTIZED, false, true, AT(effective_bits)},
    {"regression.ppl", "Perplexity, against the earlier report", UNIT_SHARE, 3, WITH_REGRESSION, false, false,
     AT(regression_ppl)},
    {"regression.kld", "KL divergence, against the earlier report", UNIT_SHARE, 2, WITH_REGRESSION, false, false,
     AT(regression_kld)},
};
#undef AT

static const char WORST_LAYER[] = "layer.attn_err.max";

static bool is_there(const kvq_validation *v, condition when) {
    switch (when) {
    case ALWAYS:
        return true;
    case QUANTIZED:
        return v->has_artifact;
    case WITH_NOISE:
        return v->has_artifact && v->has_noise;
    case WITH_RANGE:
        return v->has_artifact && v->has_range;
    case WITH_REGRESSION:
        return v->has_artifact && v->has_regression;
    }
    return false;
}

static kvq_estimate exact(double x) { return (kvq_estimate){x, (double)NAN, (double)NAN, (double)NAN}; }

static named_number number_of(const number_row *row, const kvq_validation *v) {
    const char *field = (const char *)v + row->at;
    return (named_number){.name = row->name,
                          .title = row->title,
                          .unit = row->unit,
                          .digits = row->digits,
                          .more_is_better = row->more_is_better,
                          .x = row->exact ? exact(*(const double *)field) : *(const kvq_estimate *)field};
}

static named_number worst_layer(const validate_report *r) {
    int64_t      layer;
    named_number number = {.name = WORST_LAYER,
                           .title = "Error of attention, worst layer",
                           .unit = UNIT_SHARE,
                           .digits = 2,
                           .x = exact((double)NAN)};
    if (worst_layers(r, &layer, 1) == 1) number.x = r->validation.layers[layer].attention_error;
    return number;
}

// ---------------------------------------------------------------- numbers of buckets and layers

typedef struct detail {
    number_visitor *visit;
    void           *user;
    char            place[48];
} detail;

static void add_detail(const detail *d, const char *name, number_unit unit, kvq_estimate x) {
    char         full[96];
    named_number number = {.name = full, .unit = unit, .digits = 5, .x = x};
    (void)snprintf(full, sizeof full, "%s.%s", d->place, name);
    d->visit(d->user, &number);
}

static void visit_buckets(detail *d, const char *what, const kvq_bucket *buckets, int n) {
    for (int i = 0; i < n; i++) {
        const kvq_bucket *b = &buckets[i];
        (void)snprintf(d->place, sizeof d->place, "%s.%g", what, b->from);
        add_detail(d, "tokens", UNIT_COUNT, exact((double)b->n));
        add_detail(d, "baseline_nll", UNIT_NATS, exact(b->baseline_nll));
        add_detail(d, "quantized_nll", UNIT_NATS, exact(b->quantized_nll));
        add_detail(d, "difference_nll", UNIT_NATS, b->difference_nll);
        add_detail(d, "kld", UNIT_NATS, b->kld);
        add_detail(d, "top1", UNIT_SHARE, b->top1);
    }
}

static void visit_tensor(detail *d, int64_t layer, const char *tensor, const kvq_heldout_report *e, double code_use) {
    (void)snprintf(d->place, sizeof d->place, "layer.%lld.%s", (long long)layer, tensor);
    add_detail(d, "nmse", UNIT_SHARE, exact(e->nmse));
    add_detail(d, "attention_error", UNIT_SHARE, exact(e->attention_error));
    add_detail(d, "outlier_share", UNIT_SHARE, exact(e->outlier_share));
    add_detail(d, "clipped_share", UNIT_SHARE, exact(e->clipped_share));
    add_detail(d, "code_use", UNIT_SHARE, exact(code_use));
}

static void visit_layers(detail *d, const kvq_validation *v) {
    for (int64_t l = 0; v->layers != NULL && l < v->n_layers; l++) {
        const kvq_layer_errors *e = &v->layers[l];
        (void)snprintf(d->place, sizeof d->place, "layer.%lld", (long long)l);
        add_detail(d, "attention_error", UNIT_SHARE, e->attention_error);
        visit_tensor(d, l, "k", &e->k, e->k_code_use);
        visit_tensor(d, l, "v", &e->v, e->v_code_use);
    }
}

void visit_numbers(const validate_report *r, bool all, number_visitor *visit, void *user) {
    const kvq_validation *v = &r->validation;
    detail                d = {.visit = visit, .user = user};
    for (int i = 0; i < CLI_COUNT_OF(NUMBERS); i++) {
        named_number number = number_of(&NUMBERS[i], v);
        if (is_there(v, NUMBERS[i].when)) visit(user, &number);
    }
    if (v->layers != NULL) {
        named_number number = worst_layer(r);
        visit(user, &number);
    }
    if (!all || !v->has_artifact) return;
    visit_buckets(&d, "by_position", v->positions, v->n_positions);
    visit_buckets(&d, "by_confidence", v->confidences, v->n_confidences);
    visit_layers(&d, v);
}

// ---------------------------------------------------------------- calibration

calibrated_tensor calibrated_of(const kvq_tensor_quant *t) {
    const double          nan = (double)NAN;
    const kvq_fit_report *fit = &t->fit;
    double                n = (double)(fit->n_points + fit->n_outliers + fit->n_constant);
    calibrated_tensor     c = {nan, nan, nan, nan};
    if (fit->energy > 0 && n > 0 && t->bits > 0 && t->dim == 1) {
        c = (calibrated_tensor){.nmse = kvq_fit_nmse(fit),
                                .outlier_share = (double)fit->n_outliers / n,
                                .clipped_share = (double)fit->n_clipped / n,
                                .code_use = fit->entropy_bits / t->bits};
        if (t->datatype == KVQ_INT_CLAMPED) c.nmse = c.code_use = nan; // see kvq_fit_report
    }
    if (t->heldout.n_tokens > 0) {
        c.nmse = t->heldout.nmse;
        c.outlier_share = t->heldout.outlier_share;
        c.clipped_share = t->heldout.clipped_share;
    }
    return c;
}

// ---------------------------------------------------------------- gates

named_number gate_number(const validate_report *r, int gate) {
    const char  *metric = r->gates[gate].metric;
    named_number number = worst_layer(r);
    if (strcmp(metric, "ppl") == 0 && !r->validation.has_artifact) metric = "baseline.ppl";
    for (int i = 0; i < CLI_COUNT_OF(NUMBERS); i++) {
        if (strcmp(NUMBERS[i].name, metric) == 0) number = number_of(&NUMBERS[i], &r->validation);
    }
    number.x = r->judgements[gate].measured;
    return number;
}

const char *report_outcome(const validate_report *r) {
    return r->n_gates == 0                         ? "MEASURED"
           : count_gates(r, KVQ_FAIL) > 0          ? "FAIL"
           : count_gates(r, KVQ_INCONCLUSIVE) == 0 ? "PASS"
           : r->open_fails                         ? "FAIL"
                                                   : "INCONCLUSIVE";
}

int worst_layers(const validate_report *r, int64_t *layers, int n) {
    const kvq_validation *v = &r->validation;
    int                   found = 0;
    for (int64_t l = 0; v->layers != NULL && l < v->n_layers; l++) {
        int at = found;
        while (at > 0 && v->layers[l].attention_error.value > v->layers[layers[at - 1]].attention_error.value) at--;
        if (at >= n) continue;
        if (found < n) found++;
        memmove(layers + at + 1, layers + at, (size_t)(found - 1 - at) * sizeof *layers);
        layers[at] = l;
    }
    return found;
}

// ---------------------------------------------------------------- words

const char *number_unit_name(const named_number *number) {
    switch (number->unit) {
    case UNIT_NATS:
        return "nats";
    case UNIT_SHARE:
        return "%";
    case UNIT_BITS:
        return "bits";
    case UNIT_NONE:
    case UNIT_COUNT:
        break;
    }
    return "";
}

void format_digits(const named_number *number, double x, const char *unknown, char out[NUMBER_TEXT]) {
    if (isfinite(x))
        (void)snprintf(out, NUMBER_TEXT, "%.*f", number->digits, number->unit == UNIT_SHARE ? 100 * x : x);
    else
        (void)snprintf(out, NUMBER_TEXT, "%s", unknown);
}

void format_number(const named_number *number, double x, const char *unknown, char out[NUMBER_TEXT]) {
    const char *unit = number_unit_name(number);
    format_digits(number, x, unknown, out);
    size_t length = strlen(out);
    if (isfinite(x) && unit[0] != 0) (void)snprintf(out + length, NUMBER_TEXT - length, " %s", unit);
}

void report_headline(const validate_report *r, char *out, size_t n) {
    const kvq_validation *v = &r->validation;
    if (!v->has_artifact) {
        (void)snprintf(out, n, "Perplexity %.4f of the model in full precision.", v->baseline_ppl.value);
        return;
    }
    (void)snprintf(out, n,
                   "Perplexity %.4f becomes %.4f (%+.2f %%) with a cache of %.2f bits per element; the first choice is "
                   "the same for %.1f %% of %lld tokens.",
                   v->baseline_ppl.value, v->quantized_ppl.value, 100 * v->dppl.value, v->effective_bits,
                   100 * v->top1.value, (long long)v->tokens_scored);
}

static report_fact *add_fact(report_fact *facts, int *n, const char *name) {
    facts[*n] = (report_fact){.name = name};
    return &facts[(*n)++];
}

static void describe_text(const validate_report *r, report_fact *fact) {
    const kvq_windows *w = &r->windows;
    size_t             size = sizeof fact->text;
    if (r->self)
        (void)snprintf(fact->text, size, "written by the model, seed %llu", (unsigned long long)r->seed);
    else if (w->source_sha256[0] != 0)
        (void)snprintf(fact->text, size, "%s, sha256 %.12s", w->source, w->source_sha256);
    else
        (void)snprintf(fact->text, size, "%s", w->source);
}

int report_facts(const validate_report *r, report_fact facts[MAX_FACTS]) {
    const kvq_validation *v = &r->validation;
    int                   n = 0;
    report_fact          *f = add_fact(facts, &n, "Model");
    (void)snprintf(f->text, sizeof f->text, "%s, %s, %lld layers", r->identity.name, r->config->architecture,
                   (long long)r->config->n_layers);
    if (r->artifact != NULL) {
        f = add_fact(facts, &n, "Artifact");
        (void)snprintf(f->text, sizeof f->text, "%s, content %.12s", r->artifact_name, r->artifact_sha256);
    }
    describe_text(r, add_fact(facts, &n, "Text"));
    f = add_fact(facts, &n, "Scored");
    (void)snprintf(f->text, sizeof f->text, "%lld tokens in %lld windows of %lld", (long long)v->tokens_scored,
                   (long long)v->n_windows, (long long)v->seq_len);
    f = add_fact(facts, &n, "Protocol");
    (void)snprintf(f->text, sizeof f->text, "%s", kvq_protocol_names[v->options.protocol]);
    if (v->options.protocol == KVQ_PROTOCOL_DECODE)
        (void)snprintf(f->text, sizeof f->text, "decode behind a prompt of %lld", (long long)v->options.n_prompt);
    if (r->earlier_name != NULL) {
        f = add_fact(facts, &n, "Compared with");
        (void)snprintf(f->text, sizeof f->text, "%s, measured by kvq %s", r->earlier_name, r->earlier.kvq_version);
    }
    f = add_fact(facts, &n, "Measured by");
    (void)snprintf(f->text, sizeof f->text, "kvq %s on %s with %s, factors in %s", KVQ_VERSION, r->be->device,
                   r->be->matmul, kvq_compute_names[r->compute]);
    return n;
}
