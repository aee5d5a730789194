// SPDX-License-Identifier: Apache-2.0
//
// The result of kvq-validate as one JSON document. Its keys stay what they are; docs/schema has them all.
#include "validate_report.h"

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

// ---------------------------------------------------------------- estimates

static void add_interval(kvq_json *json, cJSON *object, kvq_estimate x) {
    kvq_json_number(json, object, "stderr", x.stderr_);
    kvq_json_number(json, object, "low", x.low);
    kvq_json_number(json, object, "high", x.high);
}

static cJSON *add_estimate(kvq_json *json, cJSON *parent, const char *key, kvq_estimate x) {
    cJSON *object = kvq_json_object(json, parent, key);
    kvq_json_number(json, object, "mean", x.value);
    add_interval(json, object, x);
    return object;
}

static void add_side(kvq_json *json, const char *key, kvq_estimate ppl, kvq_estimate nll, const double *window_nll,
                     int64_t n) {
    cJSON *side = kvq_json_object(json, json->root, key);
    kvq_json_number(json, side, "ppl", ppl.value);
    kvq_json_number(json, side, "ppl_low", ppl.low);
    kvq_json_number(json, side, "ppl_high", ppl.high);
    kvq_json_number(json, side, "nll", nll.value);
    kvq_json_number(json, side, "nll_stderr", nll.stderr_);
    kvq_json_doubles(json, side, "window_nll", window_nll, n);
}

static void add_kld(kvq_json *json, const kvq_validation *v) {
    static const char *const QUANTILES[KVQ_N_KLD_QUANTILES] = {
        [KVQ_KLD_MEDIAN] = "median", [KVQ_KLD_P90] = "p90", [KVQ_KLD_P99] = "p99", [KVQ_KLD_P999] = "p99.9"};
    cJSON *kld = add_estimate(json, json->root, "kld", v->kld);
    for (int i = 0; i < KVQ_N_KLD_QUANTILES; i++) {
        cJSON *quantile = kvq_json_object(json, kld, QUANTILES[i]);
        kvq_json_number(json, quantile, "value", v->kld_quantiles[i].value);
        kvq_json_number(json, quantile, "low", v->kld_quantiles[i].low);
        kvq_json_number(json, quantile, "high", v->kld_quantiles[i].high);
    }
    kvq_json_number(json, kld, "max", v->kld_max);
    if (v->has_noise) add_estimate(json, kld, "noise_floor", v->noise_kld);
    kvq_json_doubles(json, kld, "windows", v->window_kld, v->n_windows);
}

static void add_buckets(kvq_json *json, const char *key, const kvq_bucket *buckets, int n) {
    cJSON *array = kvq_json_array(json, json->root, key);
    for (int i = 0; i < n; i++) {
        cJSON *bucket = kvq_json_object(json, array, NULL);
        kvq_json_number(json, bucket, "from", buckets[i].from);
        kvq_json_number(json, bucket, "to", buckets[i].to);
        kvq_json_count(json, bucket, "tokens", buckets[i].n);
        kvq_json_number(json, bucket, "baseline_nll", buckets[i].baseline_nll);
        kvq_json_number(json, bucket, "quantized_nll", buckets[i].quantized_nll);
        add_estimate(json, bucket, "difference_nll", buckets[i].difference_nll);
        add_estimate(json, bucket, "kld", buckets[i].kld);
        add_estimate(json, bucket, "top1", buckets[i].top1);
    }
}

// ---------------------------------------------------------------- layers

static void add_tensor(kvq_json *json, cJSON *layer, const char *key, const kvq_heldout_report *now, double code_use,
                       const kvq_tensor_quant *calibrated) {
    cJSON *tensor = kvq_json_object(json, layer, key);
    kvq_json_number(json, tensor, "nmse", now->nmse);
    kvq_json_number(json, tensor, "attention_error", now->attention_error);
    kvq_json_number(json, tensor, "outlier_share", now->outlier_share);
    kvq_json_number(json, tensor, "clipped_share", now->clipped_share);
    kvq_json_number(json, tensor, "code_use", code_use);
    calibrated_tensor c = calibrated_of(calibrated);
    cJSON            *then = kvq_json_object(json, tensor, "calibrated");
    kvq_json_number(json, then, "nmse", c.nmse);
    kvq_json_number(json, then, "outlier_share", c.outlier_share);
    kvq_json_number(json, then, "clipped_share", c.clipped_share);
    kvq_json_number(json, then, "code_use", c.code_use);
}

static void add_layers(kvq_json *json, const validate_report *r) {
    const kvq_validation *v = &r->validation;
    if (v->layers == NULL) return;
    kvq_json_count(json, json->root, "layer_windows", v->options.layer_windows);
    cJSON *layers = kvq_json_array(json, json->root, "layers");
    for (int64_t l = 0; l < v->n_layers; l++) {
        const kvq_layer_errors *e = &v->layers[l];
        cJSON                  *layer = kvq_json_object(json, layers, NULL);
        add_estimate(json, layer, "attention_error", e->attention_error);
        add_tensor(json, layer, "k", &e->k, e->k_code_use, &r->artifact->layers[l].k);
        add_tensor(json, layer, "v", &e->v, e->v_code_use, &r->artifact->layers[l].v);
    }
}

static void add_range(kvq_json *json, const kvq_range_report *range) {
    cJSON *object = kvq_json_object(json, json->root, "k_beyond_range");
    kvq_json_number(json, object, "share", range->share.value);
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

// ---------------------------------------------------------------- gates

static void add_gates(kvq_json *json, const validate_report *r) {
    cJSON *gates = kvq_json_array(json, json->root, "gates");
    for (int i = 0; i < r->n_gates; i++) {
        const kvq_judgement *j = &r->judgements[i];
        cJSON               *gate = kvq_json_object(json, gates, NULL);
        kvq_json_text(json, gate, "expression", r->gates[i].expression);
        kvq_json_text(json, gate, "metric", r->gates[i].metric);
        kvq_json_number(json, gate, "value", j->measured.value);
        kvq_json_number(json, gate, "low", j->measured.low);
        kvq_json_number(json, gate, "high", j->measured.high);
        kvq_json_number(json, gate, "limit", r->gates[i].limit);
        kvq_json_text(json, gate, "verdict", kvq_verdict_names[j->verdict]);
        if (j->verdict == KVQ_INCONCLUSIVE) kvq_json_number(json, gate, "tokens_to_decide", j->tokens_to_decide);
    }
}

// ---------------------------------------------------------------- document

static void add_quantized(kvq_json *json, const validate_report *r) {
    const kvq_validation *v = &r->validation;
    int64_t               n = v->n_windows;
    add_side(json, "quantized", v->quantized_ppl, v->quantized_nll, v->window_quantized_nll, n);
    add_estimate(json, json->root, "dppl", v->dppl);
    add_estimate(json, json->root, "difference_nll", v->difference_nll);
    add_kld(json, v);
    kvq_json_number(json, json->root, "top1", v->top1.value);
    kvq_json_number(json, json->root, "top1_stderr", v->top1.stderr_);
    kvq_json_number(json, json->root, "top1_low", v->top1.low);
    kvq_json_number(json, json->root, "top1_high", v->top1.high);
    kvq_json_doubles(json, json->root, "window_top1", v->window_top1, n);
    add_estimate(json, json->root, "top5", v->top5);
    add_estimate(json, json->root, "dp_rms", v->dp_rms);
    if (v->has_noise) add_estimate(json, json->root, "noise_top1", v->noise_top1);
    kvq_json_number(json, json->root, "effective_bits", v->effective_bits);
    add_buckets(json, "by_position", v->positions, v->n_positions);
    add_buckets(json, "by_confidence", v->confidences, v->n_confidences);
    add_layers(json, r);
    if (v->has_range) add_range(json, &v->range);
    if (v->has_regression) {
        cJSON *regression = kvq_json_object(json, json->root, "regression");
        kvq_json_text(json, regression, "baseline", r->earlier_name);
        kvq_json_text(json, regression, "kvq_version", r->earlier.kvq_version);
        add_estimate(json, regression, "ppl", v->regression_ppl);
        add_estimate(json, regression, "kld", v->regression_kld);
    }
}

static void add_measured(kvq_json *json, const validate_report *r) {
    const kvq_validation *v = &r->validation;
    kvq_json_count(json, json->root, "prompt", v->options.n_prompt);
    kvq_json_count(json, json->root, "windows", v->n_windows);
    kvq_json_count(json, json->root, "seq_len", v->seq_len);
    kvq_json_count(json, json->root, "tokens_scored", v->tokens_scored);
    add_side(json, "baseline", v->baseline_ppl, v->baseline_nll, v->window_baseline_nll, v->n_windows);
    if (r->artifact != NULL) add_quantized(json, r);
}

static void add_device(kvq_json *json, const kvq_backend *be) {
    cJSON *device = kvq_json_object(json, json->root, "device");
    kvq_json_text(json, device, "name", be->device);
    kvq_json_text(json, device, "products", be->matmul);
    if (be->fallback[0] != 0) kvq_json_text(json, device, "fallback", be->fallback);
}

kvq_status print_report_json(const validate_report *r, kvq_error *err) {
    const kvq_validation *v = &r->validation;
    bool                  passkey = r->passkey.n_lengths > 0;
    kvq_json              json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "schema", "kvq.validate/1");
    kvq_json_text(&json, json.root, "kvq_version", KVQ_VERSION);
    add_model(&json, r);
    if (!passkey) add_text(&json, r);
    kvq_json_text(&json, json.root, "compute", kvq_compute_names[r->compute]);
    add_device(&json, r->be);
    kvq_json_text(&json, json.root, "protocol", kvq_protocol_names[v->options.protocol]);
    if (passkey)
        passkey_add(&json, &r->passkey, r->seed, r->bos, &r->tokenizer);
    else
        add_measured(&json, r);
    if (r->artifact != NULL) kvq_cli_add_memory(&json, r->artifact);
    add_gates(&json, r);
    kvq_status status = kvq_json_print(&json, err);
    kvq_json_free(&json);
    return status;
}
