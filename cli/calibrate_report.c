// SPDX-License-Identifier: Apache-2.0
//
// What kvq-calibrate says before and after a run, and what it writes into the artifact about where it came from.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calibrate_report.h"

#define WORST_LAYERS 3

void print_calibration_plan(kvq_cli *cli, const calibration *c) {
    const kvq_model_config  *config = kvq_checkpoint_config(c->checkpoint);
    const kvq_calib_options *q = &c->options;
    char                     memory[32], scratch[32];
    kvq_cli_format_bytes((double)c->plan.memory_bytes, memory, sizeof memory);
    kvq_cli_format_bytes((double)c->plan.scratch_bytes, scratch, sizeof scratch);

    kvq_cli_say(cli, "model      %s  %s  %lld layers  %d KV heads x %d", c->identity.name, config->architecture,
                (long long)config->n_layers, config->n_kv_heads, config->head_dim);
    kvq_cli_say(cli, "windows    %lld x %lld tokens  seed %llu", (long long)c->o->samples, (long long)c->seq_len,
                (unsigned long long)c->o->seed.value);
    if (c->windows.ids != NULL) {
        kvq_cli_say(cli, "text       %s  %lld tokens available  tokenizer %s  BOS %s", c->windows.source,
                    (long long)c->windows.n_available, c->tokenizer.kind, c->windows.bos_added ? "added" : "not added");
    } else {
        char writing[32];
        kvq_cli_format_bytes(4.0 * (double)kvq_decode_floats(c->model, c->o->samples, c->seq_len), writing,
                             sizeof writing);
        kvq_cli_say(cli,
                    "text       the model writes its own, which keeps all of it in memory: about %s before the sweeps",
                    writing);
    }
    kvq_cli_say(cli, "quantizer  K %d bits  V %d bits  outliers %g%%  sink tokens %lld  weighting %s", q->k_bits,
                q->v_bits, q->outlier_fraction * 100, (long long)q->sink_tokens, kvq_weighting_name(q->weighting));
    kvq_cli_say(
        cli,
        "needs      about %s memory beside the mapped model  %s scratch in %s  %.3g TFLOP on %d %s threads with %s",
        memory, scratch, q->scratch_dir, c->plan.tera_flops, cli->ctx.n_threads, c->be->name, c->be->matmul);
}

// ---------------------------------------------------------------- provenance

// Every option as it took effect, without paths, threads or anything else that does not change the result.
static kvq_status describe_options(const calibration *c, char **out, kvq_error *err) {
    kvq_json json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "source", c->windows.source);
    kvq_json_count(&json, json.root, "samples", c->windows.n_windows);
    kvq_json_count(&json, json.root, "seq_len", c->windows.seq_len);
    kvq_json_seed(&json, json.root, "seed", c->o->seed.value);
    kvq_json_text(&json, json.root, "bos", kvq_cli_bos_names[c->o->source.bos]);
    kvq_json_count(&json, json.root, "k_bits", c->options.k_bits);
    kvq_json_count(&json, json.root, "v_bits", c->options.v_bits);
    kvq_json_number(&json, json.root, "outliers", c->options.outlier_fraction);
    kvq_json_count(&json, json.root, "sink_tokens", c->options.sink_tokens);
    kvq_json_text(&json, json.root, "weighting", kvq_weighting_name(c->options.weighting));
    kvq_status status = kvq_json_line(&json, out, err);
    kvq_json_free(&json);
    return status;
}

kvq_status record_identity(kvq_cli *cli, const calibration *c, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    kvq_artifact *a = c->artifact;
    char          cpu[256];
    char         *options_json = NULL;

    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->model.name, c->identity.name, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->model.dtype, c->identity.dtype, err));
    memcpy(a->model.config_sha256, c->identity.config_sha256, sizeof a->model.config_sha256);
    memcpy(a->model.weights_sha256, c->identity.weights_sha256, sizeof a->model.weights_sha256);
    a->model.n_tensors = c->identity.n_tensors;

    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->tokenizer.kind, c->tokenizer.kind, err));
    memcpy(a->tokenizer.sha256, c->tokenizer.sha256, sizeof a->tokenizer.sha256);
    a->dataset.seed = c->o->seed.value;

    kvq_cli_describe_cpu(cpu, sizeof cpu);
    KVQ_TRY(describe_options(c, &options_json, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.producer_version, KVQ_VERSION, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.matmul, c->be->matmul, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.cpu, cpu, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.options_json, options_json, err));

done:
    free(options_json);
    return status;
}

// ---------------------------------------------------------------- report

typedef struct ranked_tensor {
    int64_t layer;
    char    tensor; // 'K' or 'V'
    double  objective;
} ranked_tensor;

static int by_objective(const void *a, const void *b) {
    const ranked_tensor *x = a, *y = b;
    if (x->objective != y->objective) return x->objective > y->objective ? -1 : 1;
    return x->layer != y->layer ? (x->layer > y->layer) - (x->layer < y->layer) : x->tensor - y->tensor;
}

static kvq_status print_worst_layers(kvq_cli *cli, const kvq_artifact *a, kvq_error *err) {
    ranked_tensor *ranked;
    int64_t        n = 2 * a->model.n_layers;
    kvq_status     status = KVQ_NEW(&cli->ctx, n, "list of layers", &ranked, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < n; i++) {
        const kvq_layer_quant *layer = &a->layers[i / 2];
        ranked_tensor entry = {i / 2, i % 2 == 0 ? 'K' : 'V', (i % 2 == 0 ? &layer->k : &layer->v)->fit.objective};
        ranked[i] = entry;
    }
    qsort(ranked, (size_t)n, sizeof *ranked, by_objective);
    char text[256] = "";
    for (int64_t i = 0; i < n && i < WORST_LAYERS; i++) {
        size_t used = strlen(text);
        (void)snprintf(text + used, sizeof text - used, "  %lld %c (%.2e)", (long long)ranked[i].layer,
                       ranked[i].tensor, ranked[i].objective);
    }
    kvq_cli_say(cli, "worst layers by weighted error:%s", text);
    kvq_free(&cli->ctx, ranked);
    return KVQ_OK;
}

kvq_status print_calibration_summary(kvq_cli *cli, const calibration *c, kvq_error *err) {
    const char     *out = c->o->output;
    kvq_mapped_file file;
    char            size[32], seconds[32];
    kvq_status      status = kvq_map_file(out, &file, err);
    if (status != KVQ_OK) return status;
    kvq_cli_format_bytes((double)file.bytes, size, sizeof size);
    kvq_unmap_file(&file);
    kvq_cli_format_seconds(kvq_cli_now_s() - c->start_s, seconds, sizeof seconds);
    kvq_cache_size cache = kvq_artifact_cache_size(c->artifact, c->seq_len);

    kvq_cli_say(cli, "cache: %.3f bits per element at %lld tokens, everything counted",
                kvq_cache_bits_per_element(cache), (long long)c->seq_len);
    status = print_worst_layers(cli, c->artifact, err);
    if (status != KVQ_OK) return status;
    printf("wrote %s  %s  content sha256 %s  %s\n", out, size, c->content_sha256, seconds);
    bool self = kvq_cli_is_self(&c->o->source);
    kvq_cli_next(cli, "kvq-validate", "--model", c->o->model, "--artifact", out, "--text",
                 self ? "self" : "HELD_OUT.txt", NULL);
    return KVQ_OK;
}
