// SPDX-License-Identifier: Apache-2.0
//
// What kvq-calibrate says before and after a run.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calibrate_report.h"

#define WORST_LAYERS 3

static void print_needs(kvq_cli *cli, const calibration *c) {
    const kvq_calib_plan *p = &c->plan;
    char                  total[32], weights[32], activations[32], statistics[32], scratch[32], device[32];
    char                  compute[CLI_COMPUTE_TEXT];
    kvq_cli_format_bytes((double)p->memory_bytes, total, sizeof total);
    kvq_cli_format_bytes((double)p->weight_bytes, weights, sizeof weights);
    kvq_cli_format_bytes((double)p->activation_bytes, activations, sizeof activations);
    kvq_cli_format_bytes((double)p->statistics_bytes, statistics, sizeof statistics);
    kvq_cli_format_bytes((double)p->scratch_bytes, scratch, sizeof scratch);
    if (c->processes.n_ranks > 1)
        kvq_cli_say(cli, "processes  %d; what follows is for each of them", c->processes.n_ranks);
    kvq_cli_say(cli, "memory     peak about %s (weights %s%s, activations %s, statistics %s)", total, weights,
                p->prefetch ? " with the next layer's" : "", activations, statistics);
    kvq_cli_format_bytes((double)p->device_bytes, device, sizeof device);
    if (p->device_bytes > 0)
        kvq_cli_say(cli, "           and %s of the device's, for weights, activations and counters", device);
    kvq_cli_say(cli, "disk       %s in %s%s", scratch, c->work_dir,
                p->stride > 1 ? ", with layers recomputed to keep within the limit" : "");
    kvq_cli_compute_text(cli, c->be, compute);
    kvq_cli_say(cli, "work       %.3g TFLOP on %s", p->tera_flops, compute);
    if (c->kl_tokens > 0) {
        kvq_sensitivity_cost cost = kvq_sensitivity_plan(c->model, c->seq_len, c->o->samples, c->kl_tokens);
        kvq_cli_say(cli, "           and %.3g TFLOP to measure the KL of each K and V alone on %lld x %lld tokens",
                    cost.tera_flops, (long long)cost.n_windows, (long long)cost.n_tokens);
    }
}

// Only what is not as usual is said beyond the first line.
static void print_unusual(kvq_cli *cli, const calibration *c) {
    const kvq_measure_options *m = &c->measured;
    const kvq_fit_options     *f = &c->options.fit;
    char                       recent[48] = "";
    if (f->recent_tokens > 0)
        (void)snprintf(recent, sizeof recent, "  last %lld tokens in f16", (long long)f->recent_tokens);
    bool usual = m->k_axis == KVQ_AXIS_CHANNEL && m->k_domain == KVQ_KEYS_PRE_ROPE &&
                 m->threshold_scope == KVQ_SCOPE_CHANNEL && !m->count_sinks && m->token_range == KVQ_RANGE_EXTREMES;
    if (usual && !f->per_head && !f->q_norm && recent[0] == 0) return;
    kvq_cli_say(cli, "           K ranges per %s, %s, thresholds by %s%s%s  tables per %s%s%s",
                kvq_axis_names[m->k_axis], kvq_key_domain_names[m->k_domain], kvq_scope_names[m->threshold_scope],
                m->count_sinks ? " over sinks too" : "",
                m->token_range == KVQ_RANGE_PERCENTILES ? "  V ranges by percentiles" : "",
                calibrate_group_names[f->per_head], f->q_norm ? "  Q-Norm" : "", recent);
}

void print_quantizer(kvq_cli *cli, const calibration *c) {
    const kvq_measure_options *m = &c->measured;
    const kvq_fit_options     *f = &c->options.fit;
    char                       fractions[128] = "", weightings[96] = "";
    if (c->allocated) {
        print_allocated(cli, c);
        return;
    }
    if (!c->o->measure_only) {
        kvq_cli_say(cli, "quantizer  K %s %d bits  V %s %d bits  outliers %g%%  sink tokens %lld  weighting %s",
                    kvq_datatype_names[f->k_datatype], f->k_bits, kvq_datatype_names[f->v_datatype], f->v_bits,
                    f->outlier_fraction * 100, (long long)m->sink_tokens, kvq_weighting_names[f->weighting]);
        print_unusual(cli, c);
        return;
    }
    for (int i = 0; i < m->n_fractions; i++) {
        size_t used = strlen(fractions);
        (void)snprintf(fractions + used, sizeof fractions - used, "%s%g%%", i > 0 ? ", " : "", m->fractions[i] * 100);
    }
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        size_t used = strlen(weightings);
        if (kvq_weightings_have(m->weightings, (kvq_weighting)w))
            (void)snprintf(weightings + used, sizeof weightings - used, "%s%s", used > 0 ? ", " : "",
                           kvq_weighting_names[w]);
    }
    kvq_cli_say(cli, "measures   outliers %s  weightings %s  sink tokens %lld%s%s", fractions, weightings,
                (long long)m->sink_tokens, m->moments ? "  second moments of Q, K and V" : "",
                m->allocated ? "  channels and rotated values" : "");
    print_unusual(cli, c);
}

void print_calibration_plan(kvq_cli *cli, const calibration *c) {
    const kvq_model_config *config = kvq_checkpoint_config(c->checkpoint);
    kvq_cli_say(cli, "model      %s  %s  %lld layers  %d KV heads x %d", c->identity.name, config->architecture,
                (long long)config->n_layers, config->n_kv_heads, config->head_dim);
    kvq_cli_say(cli, "windows    %lld x %lld tokens  seed %llu", (long long)c->o->samples, (long long)c->seq_len,
                (unsigned long long)c->o->seed.value);
    if (c->windows.ids != NULL) {
        kvq_cli_say(cli, "text       %s  %lld tokens available  tokenizer %s  BOS %s", c->windows.source,
                    (long long)c->windows.n_available, c->tokenizer.kind, c->windows.bos_added ? "added" : "not added");
    } else {
        char writing[32];
        kvq_cli_format_bytes(c->writing_bytes, writing, sizeof writing);
        kvq_cli_say(cli,
                    "text       the model writes its own, which keeps all of it in memory: about %s before the sweeps",
                    writing);
    }
    print_quantizer(cli, c);
    print_needs(cli, c);
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

void print_memory(kvq_cli *cli, const calibration *c) {
    int64_t peak = kvq_peak_memory(), limit = c->o->memory_limit;
    char    was[32], planned[32], allowed[32];
    if (peak < 0 || c->plan.memory_bytes == 0) return; // a fit from a capture has no plan
    kvq_cli_format_bytes((double)peak, was, sizeof was);
    kvq_cli_format_bytes(fmax((double)c->plan.memory_bytes, c->writing_bytes), planned, sizeof planned);
    kvq_cli_format_bytes((double)limit, allowed, sizeof allowed);
    kvq_cli_say(cli, "memory: peak %s, planned %s", was, planned);
    if (limit > 0 && peak > limit)
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "the peak of %s is above --memory-limit %s", was, allowed);
}

kvq_status print_calibration_summary(kvq_cli *cli, const calibration *c, kvq_error *err) {
    const char     *out = c->o->output;
    kvq_mapped_file file;
    char            size[32], seconds[32];
    kvq_status      status = kvq_map_file(out, &file, err);
    if (status != KVQ_OK) return status;
    kvq_cli_format_bytes((double)file.bytes, size, sizeof size);
    kvq_unmap_file(&file);
    kvq_cli_format_seconds(kvq_now_s() - c->start_s, seconds, sizeof seconds);
    kvq_cache_size cache = kvq_artifact_cache_size(c->artifact, c->seq_len);

    if (c->allocated) {
        print_allocated_size(cli, c);
    } else {
        kvq_cli_say(cli, "cache: %.3f bits per element at %lld tokens, everything counted",
                    kvq_cache_bits_per_element(cache, 1), (long long)c->seq_len);
    }
    status = print_worst_layers(cli, c->artifact, err);
    if (status != KVQ_OK) return status;
    print_memory(cli, c);
    printf("wrote %s  %s  content sha256 %s  %s\n", out, size, c->content_sha256, seconds);
    bool self = kvq_cli_is_self(&c->o->source);
    kvq_cli_next(cli, "kvq-validate", "--model", c->o->model != NULL ? c->o->model : "MODEL", "--artifact", out,
                 "--text", self ? "self" : "HELD_OUT.txt", NULL);
    return KVQ_OK;
}

void print_shard_summary(kvq_cli *cli, const calibration *c) {
    print_memory(cli, c);
    printf("wrote %s  shard %lld of %lld, round %d of 2\n", c->o->output, (long long)c->sweep.shard,
           (long long)c->sweep.n_shards, c->o->thresholds == NULL ? 1 : 2);
    kvq_cli_next(cli, "kvq-merge", "-o", c->o->thresholds == NULL ? "THRESHOLDS.kvqp" : "OUT.kvq.h5", c->o->output,
                 "AND_THE_OTHER_SHARDS.kvqp", NULL);
}
