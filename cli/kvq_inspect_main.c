// SPDX-License-Identifier: Apache-2.0
//
// kvq-inspect: what an artifact says about itself. Reading verifies the content hash, so whatever is shown is intact.
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"

typedef struct inspect_options {
    kvq_cli_common common;
    const char    *artifact;
    bool           check, json;
} inspect_options;

#define AT(field) offsetof(inspect_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"OUT.kvq.h5", 0, CLI_OPERAND, AT(artifact), NULL, .help = "the artifact"},
    {"check", 0, CLI_FLAG, AT(check), NULL, .help = "verify only: print one line, or exit with code 4"},
    {"json", 0, CLI_FLAG, AT(json), NULL, .help = "everything, as one JSON document on stdout (kvq.inspect/1)"},
};
#undef AT

static const char *const AXIS_NAMES[] = {[KVQ_AXIS_CHANNEL] = "channel", [KVQ_AXIS_TOKEN] = "token"};

static double outlier_share(const kvq_fit_report *fit) {
    int64_t n = fit->n_points + fit->n_outliers + fit->n_constant;
    return n > 0 ? (double)fit->n_outliers / (double)n : 0;
}

// ---------------------------------------------------------------- text

static void print_header(const kvq_artifact *a, const char *path, const char *content_sha256) {
    printf("artifact   %s  content sha256 %s\n", kvq_file_name(path), content_sha256);
    printf("model      %s  %s  %lld layers  %lld KV heads x %lld  %s\n", a->model.name, a->model.architecture,
           (long long)a->model.n_layers, (long long)a->model.n_kv_heads, (long long)a->model.head_dim, a->model.dtype);
    printf("           config sha256 %s\n", a->model.config_sha256);
    printf("           weights sha256 %s  %lld tensors\n", a->model.weights_sha256, (long long)a->model.n_tensors);
    printf("           rope %s  theta %g\n", a->model.rope_type, a->model.rope_theta);
    printf("tokenizer  %s  sha256 %s  BOS %s\n", a->tokenizer.kind,
           a->tokenizer.sha256[0] != 0 ? a->tokenizer.sha256 : "-", a->tokenizer.bos_added ? "added" : "not added");
    printf("dataset    %s  %lld x %lld tokens of %lld  seed %llu\n", a->dataset.source, (long long)a->dataset.n_samples,
           (long long)a->dataset.seq_len, (long long)a->dataset.n_available_tokens,
           (unsigned long long)a->dataset.seed);
    printf("           text sha256 %s\n", a->dataset.source_sha256[0] != 0 ? a->dataset.source_sha256 : "-");
    printf("           token ids sha256 %s\n", a->dataset.token_ids_sha256);
    printf("quantizer  %s  outliers %g%% (K %d, V %d per side and token)  sink tokens %lld  weighting %s\n",
           a->quantizer.scheme, a->quantizer.outlier_fraction * 100, a->quantizer.n_side_k, a->quantizer.n_side_v,
           (long long)a->quantizer.sink_tokens, kvq_weighting_name(a->quantizer.weighting));
    printf("made by    kvq %s  %s  %s\n", a->provenance.producer_version, a->provenance.matmul, a->provenance.cpu);
    printf("baseline   %.6f nats per token on the calibration windows\n", a->baseline_nll);
    printf("cache      %.3f bits per element at %lld tokens, everything counted\n\n",
           kvq_cache_bits_per_element(kvq_artifact_cache_size(a, a->dataset.seq_len)), (long long)a->dataset.seq_len);
}

static void print_layers(const kvq_artifact *a) {
    printf("layer  tensor  bits  effective samples  outliers  weighted error\n");
    for (int64_t l = 0; l < a->model.n_layers; l++) {
        const kvq_tensor_quant *tensors[] = {&a->layers[l].k, &a->layers[l].v};
        for (int i = 0; i < CLI_COUNT_OF(tensors); i++) {
            const kvq_tensor_quant *t = tensors[i];
            printf("%5lld  %c       %4d  %17.1f  %7.3f%%  %14.4e\n", (long long)l, "KV"[i], t -> bits,
                   t -> fit.effective_samples, outlier_share(&t->fit) * 100, t->fit.objective);
        }
    }
}

// ---------------------------------------------------------------- JSON

static void add_model(kvq_json *json, const kvq_artifact *a) {
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

static void add_dataset(kvq_json *json, const kvq_artifact *a) {
    cJSON *dataset = kvq_json_object(json, json->root, "dataset");
    kvq_json_text(json, dataset, "source", a->dataset.source);
    kvq_json_text(json, dataset, "sha256", a->dataset.source_sha256);
    kvq_json_text(json, dataset, "token_ids_sha256", a->dataset.token_ids_sha256);
    kvq_json_count(json, dataset, "available_tokens", a->dataset.n_available_tokens);
    kvq_json_count(json, dataset, "samples", a->dataset.n_samples);
    kvq_json_count(json, dataset, "seq_len", a->dataset.seq_len);
    kvq_json_seed(json, dataset, "seed", a->dataset.seed);
    cJSON *quantizer = kvq_json_object(json, json->root, "quantizer");
    kvq_json_text(json, quantizer, "scheme", a->quantizer.scheme);
    kvq_json_number(json, quantizer, "outlier_fraction", a->quantizer.outlier_fraction);
    kvq_json_count(json, quantizer, "n_side_k", a->quantizer.n_side_k);
    kvq_json_count(json, quantizer, "n_side_v", a->quantizer.n_side_v);
    kvq_json_count(json, quantizer, "sink_tokens", a->quantizer.sink_tokens);
    kvq_json_text(json, quantizer, "weighting", kvq_weighting_name(a->quantizer.weighting));
    cJSON *provenance = kvq_json_object(json, json->root, "provenance");
    kvq_json_text(json, provenance, "producer_version", a->provenance.producer_version);
    kvq_json_text(json, provenance, "matmul", a->provenance.matmul);
    kvq_json_text(json, provenance, "cpu", a->provenance.cpu);
    kvq_json_text(json, provenance, "options_json", a->provenance.options_json);
}

static void add_tensor(kvq_json *json, cJSON *layer, const char *key, const kvq_artifact *a,
                       const kvq_tensor_quant *t) {
    int64_t d = a->model.n_kv_heads * a->model.head_dim;
    cJSON  *tensor = kvq_json_object(json, layer, key);
    kvq_json_count(json, tensor, "bits", t->bits);
    kvq_json_text(json, tensor, "axis", AXIS_NAMES[t->axis]);
    kvq_json_floats(json, tensor, "codebook", t->codebook, (int64_t)t->n_groups * t->n_levels * t->dim);
    kvq_json_floats(json, tensor, "lower", t->lower, d);
    kvq_json_floats(json, tensor, "upper", t->upper, d);
    kvq_json_count(json, tensor, "points", t->fit.n_points);
    kvq_json_count(json, tensor, "outliers", t->fit.n_outliers);
    kvq_json_count(json, tensor, "constant", t->fit.n_constant);
    kvq_json_number(json, tensor, "weight_sum", t->fit.weight_sum);
    kvq_json_number(json, tensor, "effective_samples", t->fit.effective_samples);
    kvq_json_number(json, tensor, "objective", t->fit.objective);
    kvq_json_number(json, tensor, "binning_bound", t->fit.binning_bound);
}

static kvq_status print_json(const kvq_artifact *a, const char *path, const char *content_sha256, kvq_error *err) {
    kvq_json json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "schema", "kvq.inspect/1");
    kvq_json_text(&json, json.root, "file", kvq_file_name(path));
    kvq_json_text(&json, json.root, "content_sha256", content_sha256);
    add_model(&json, a);
    add_dataset(&json, a);
    kvq_json_number(&json, json.root, "baseline_nll", a->baseline_nll);
    kvq_json_number(&json, json.root, "bits_per_element",
                    kvq_cache_bits_per_element(kvq_artifact_cache_size(a, a->dataset.seq_len)));
    cJSON *layers = kvq_json_array(&json, json.root, "layers");
    for (int64_t l = 0; l < a->model.n_layers; l++) {
        cJSON *layer = kvq_json_object(&json, layers, NULL);
        add_tensor(&json, layer, "k", a, &a->layers[l].k);
        add_tensor(&json, layer, "v", a, &a->layers[l].v);
    }
    kvq_status status = kvq_json_print(&json, err);
    kvq_json_free(&json);
    return status;
}

// ---------------------------------------------------------------- program

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    const inspect_options *o = options;
    kvq_artifact          *artifact = NULL;
    char                   content_sha256[KVQ_SHA256_HEX];
    (void)exit_code; // damage is an error (4), not a verdict

    if (o->artifact == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "the artifact is missing");
    kvq_status status = kvq_artifact_read(&cli->ctx, o->artifact, &artifact, content_sha256, err);
    if (status != KVQ_OK) return status;
    if (o->json) {
        status = print_json(artifact, o->artifact, content_sha256, err);
    } else if (o->check) {
        printf("ok  content sha256 %s\n", content_sha256);
    } else {
        print_header(artifact, o->artifact, content_sha256);
        print_layers(artifact);
    }
    if (status == KVQ_OK)
        kvq_cli_next(cli, "kvq-validate", "--model", "MODEL", "--artifact", o->artifact, "--text", "HELD_OUT.txt",
                     NULL);
    kvq_artifact_destroy(&cli->ctx, &artifact);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-inspect",
    .summary = "Shows what an artifact holds and where it comes from, and verifies its content hash.",
    .synopsis = "OUT.kvq.h5 [--check] [--json]\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "examples:\n"
             "  kvq-inspect l31.kvq.h5\n"
             "  kvq-inspect l31.kvq.h5 --check\n",
    .run = run,
};

int main(int argc, char **argv) {
    inspect_options options = {.artifact = NULL};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
