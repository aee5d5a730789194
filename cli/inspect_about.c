// SPDX-License-Identifier: Apache-2.0
//
// The part of kvq-inspect's reports that all kinds of files have in common.
#include <stdio.h>

#include "inspect.h"

kvq_status inspect_check_layer(const inspect_options *o, int64_t n_layers, kvq_error *err) {
    if (o->layer < n_layers) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--layer %lld: %s has %lld layers, counted from 0", (long long)o->layer,
                    o->file, (long long)n_layers);
}

static const char *or_dash(const char *text) { return text[0] != 0 ? text : "-"; }

void inspect_print_model(const kvq_artifact *a) {
    printf("model      %s  %s  %lld layers  %lld KV heads x %lld  %s\n", a->model.name, a->model.architecture,
           (long long)a->model.n_layers, (long long)a->model.n_kv_heads, (long long)a->model.head_dim, a->model.dtype);
    printf("           config sha256 %s\n", a->model.config_sha256);
    printf("           weights sha256 %s  %lld tensors\n", a->model.weights_sha256, (long long)a->model.n_tensors);
    printf("           rope %s  theta %g\n", a->model.rope_type, a->model.rope_theta);
    printf("tokenizer  %s  sha256 %s  BOS %s\n", a->tokenizer.kind, or_dash(a->tokenizer.sha256),
           a->tokenizer.bos_added ? "added" : "not added");
    printf("dataset    %s  %lld x %lld tokens of %lld  seed %llu\n", a->dataset.source, (long long)a->dataset.n_samples,
           (long long)a->dataset.seq_len, (long long)a->dataset.n_available_tokens,
           (unsigned long long)a->dataset.seed);
    printf("           text sha256 %s\n", or_dash(a->dataset.source_sha256));
    printf("           token ids sha256 %s\n", a->dataset.token_ids_sha256);
}

void inspect_print_run(const kvq_artifact *a) {
    printf("made by    kvq %s  %s  %s\n", a->provenance.producer_version, a->provenance.matmul, a->provenance.cpu);
    printf("baseline   %.6f nats per token on the calibration windows\n", a->baseline_nll);
}

void inspect_add_model(kvq_json *json, const kvq_artifact *a) {
    cJSON *model = kvq_json_object(json, json->root, "model");
    kvq_json_text(json, model, "name", a->model.name);
    kvq_json_text(json, model, "architecture", a->model.architecture);
    kvq_json_text(json, model, "dtype", a->model.dtype);
    kvq_json_text(json, model, "config_sha256", a->model.config_sha256);
    kvq_json_text(json, model, "weights_sha256", a->model.weights_sha256);
    kvq_json_count(json, model, "tensors", a->model.n_tensors);
    kvq_json_count(json, model, "layers", a->model.n_layers);
    kvq_json_count(json, model, "hidden_size", a->model.hidden_size);
    kvq_json_count(json, model, "heads", a->model.n_heads);
    kvq_json_count(json, model, "kv_heads", a->model.n_kv_heads);
    kvq_json_count(json, model, "head_dim", a->model.head_dim);
    kvq_json_count(json, model, "vocab_size", a->model.vocab_size);
    kvq_json_text(json, model, "rope_type", a->model.rope_type);
    kvq_json_number(json, model, "rope_theta", a->model.rope_theta);
    cJSON *tokenizer = kvq_json_object(json, json->root, "tokenizer");
    kvq_json_text(json, tokenizer, "kind", a->tokenizer.kind);
    kvq_json_text(json, tokenizer, "sha256", a->tokenizer.sha256);
    kvq_json_bool(json, tokenizer, "bos_added", a->tokenizer.bos_added);
}

void inspect_add_dataset(kvq_json *json, const kvq_artifact *a) {
    cJSON *dataset = kvq_json_object(json, json->root, "dataset");
    kvq_json_text(json, dataset, "source", a->dataset.source);
    kvq_json_text(json, dataset, "sha256", a->dataset.source_sha256);
    kvq_json_text(json, dataset, "token_ids_sha256", a->dataset.token_ids_sha256);
    kvq_json_count(json, dataset, "available_tokens", a->dataset.n_available_tokens);
    kvq_json_count(json, dataset, "samples", a->dataset.n_samples);
    kvq_json_count(json, dataset, "seq_len", a->dataset.seq_len);
    kvq_json_seed(json, dataset, "seed", a->dataset.seed);
}

void inspect_add_run(kvq_json *json, const kvq_artifact *a) {
    cJSON *provenance = kvq_json_object(json, json->root, "provenance");
    kvq_json_text(json, provenance, "producer_version", a->provenance.producer_version);
    kvq_json_text(json, provenance, "matmul", a->provenance.matmul);
    kvq_json_text(json, provenance, "cpu", a->provenance.cpu);
    kvq_json_text(json, provenance, "options_json", a->provenance.options_json);
    kvq_json_number(json, json->root, "baseline_nll", a->baseline_nll);
}
