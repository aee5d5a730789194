// SPDX-License-Identifier: Apache-2.0
//
// kvq-validate: what a model loses on a text when its KV cache goes through an artifact, and whether that passes.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"
#include "validate_report.h"

#define SELF_WINDOWS 4

typedef struct validate_options {
    kvq_cli_common common;
    kvq_cli_source source;
    passkey_wanted passkey; // instead of source
    const char    *model, *artifact;
    int64_t        seq_len, windows; // 0 = not given
    kvq_cli_seed   seed;
    kvq_cli_list   gates;
    int            compute;  // kvq_compute
    int            protocol; // kvq_protocol
    int64_t        prompt;   // 0 = not given
    int64_t        layer_windows, noise_windows;
    int            gate_mode, inconclusive; // of GATE_MODES, INCONCLUSIVE
    bool           json, allow_other_weights;
} validate_options;

enum { GATES_BY_INTERVAL, GATES_BY_POINT };
enum { INCONCLUSIVE_CODE, INCONCLUSIVE_PASSES, INCONCLUSIVE_FAILS };
static const char *const GATE_MODES[] = {"interval", "point", NULL}, *const INCONCLUSIVE[] = {"code", "pass", "fail",
                                                                                              NULL};

#define AT(field) offsetof(validate_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "Hugging Face directory (safetensors) or one GGUF file"},
    {"artifact", 0, CLI_TEXT, AT(artifact), "FILE",
     .help = "artifact of this model; without it only the baseline is measured"},
    CLI_TEXT_ROWS,
    {"tokens", 0, CLI_TEXT, AT(source.tokens), "FILE.npy", .help = "token ids instead of --text; no tokenizer is used"},
    {"seq-len", 0, CLI_COUNT, AT(seq_len), "S", .help = "tokens per window (the artifact's, or 2048)", .min = 2,
     .max = CLI_MAX_TOKENS},
    {"windows", 0, CLI_COUNT, AT(windows), "N", .help = "windows from the start of the text (all; 4 with self)",
     .min = 1, .max = CLI_MAX_TOKENS},
    {"seed", 0, CLI_SEED, AT(seed), "X",
     .help = "of --text self (one more than the artifact's, or 0) or --passkey (0)"},
    PASSKEY_ROWS,
    {"bos", 0, CLI_CHOICE, AT(source.bos), "HOW",
     .help = "BOS token in front of a window: auto (as the tokenizer does), always, never",
     .choices = kvq_cli_bos_names},
    {"protocol", 0, CLI_CHOICE, AT(protocol), "HOW",
     .help = "prefill: every key and value is quantised; decode: the prompt is exact, later tokens see the cache",
     .choices = kvq_protocol_names},
    {"prompt", 0, CLI_COUNT, AT(prompt), "N", .help = "tokens of a window that are the prompt (decode; half of them)",
     .min = 1, .max = CLI_MAX_TOKENS},
    {"layer-windows", 0, CLI_COUNT, AT(layer_windows), "N",
     .help = "windows on which each layer's errors are measured (4)", .min = 0, .max = CLI_MAX_TOKENS, .rare = true},
    {"noise-windows", 0, CLI_COUNT, AT(noise_windows), "N",
     .help = "windows on which the reference's own noise is measured (2)", .min = 0, .max = CLI_MAX_TOKENS,
     .rare = true},
    {"gate", 0, CLI_LIST, AT(gates), "EXPR", .help = "a limit such as 'dppl<=1%'; repeatable, all must hold"},
    {"gate-mode", 0, CLI_CHOICE, AT(gate_mode), "HOW",
     .help = "judge by the interval of 95%, or by the measured point alone", .choices = GATE_MODES, .rare = true},
    {"inconclusive", 0, CLI_CHOICE, AT(inconclusive), "HOW",
     .help = "what an interval across the limit means: exit code 7, pass, or fail", .choices = INCONCLUSIVE,
     .rare = true},
    {"allow-other-weights", 0, CLI_FLAG, AT(allow_other_weights), NULL,
     .help = "accept a model of equal shape with other weights"},
    {"compute", 0, CLI_CHOICE, AT(compute), "TYPE",
     .help = "type of the factors in linear layers: f32 (default), or bf16 where the processor has it",
     .choices = kvq_compute_names},
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "changes speed, never a result (one per core)",
     .min = 1, .max = KVQ_MAX_THREADS},
    {"json", 0, CLI_FLAG, AT(json), NULL, .help = "one JSON document on stdout (kvq.validate/1)"},
};
#undef AT

// ---------------------------------------------------------------- options

// A test of pass keys makes its windows itself, decodes through a cache, and measures nothing else.
static kvq_status check_passkey(const validate_options *o, const kvq_gate *gates, passkey_report *plan,
                                kvq_error *err) {
    const kvq_cli_source *s = &o->source;
    bool of_texts = s->mix != NULL || s->field != NULL || s->format != 0 || s->documents != 0 || s->newlines != 0;
    if (s->texts.count > 0 || s->tokens != NULL || of_texts || o->seq_len > 0 || o->windows > 0 || o->prompt > 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "run it twice, once for the text",
                        "--passkey %s: it makes its own windows, so nothing else says what is read",
                        o->passkey.lengths);
    }
    if (o->artifact == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--passkey: there is no cache to decode with");
    for (int i = 0; i < o->gates.count; i++) {
        if (strcmp(gates[i].metric, "passkey") == 0) continue;
        return kvq_fail(err, KVQ_ERR_USAGE, "gate passkey, or measure a text",
                        "--gate '%s': --passkey does not measure it", gates[i].expression);
    }
    return passkey_plan(&o->passkey, plan, err);
}

static kvq_status check_text(const validate_options *o, const kvq_gate *gates, kvq_error *err) {
    if (o->passkey.depths.count > 0 || o->passkey.trials > 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "add --passkey 1k,2k", "--%s: belongs to --passkey",
                        o->passkey.depths.count > 0 ? "depths" : "passkey-trials");
    }
    for (int i = 0; i < o->gates.count; i++) {
        if (strcmp(gates[i].metric, "passkey") == 0)
            return kvq_fail(err, KVQ_ERR_USAGE, "measure it with --passkey 1k,2k",
                            "--gate '%s': a text has no pass keys", gates[i].expression);
    }
    return kvq_cli_source_check(&o->source, err);
}

static kvq_status check_options(const validate_options *o, kvq_gate *gates, passkey_report *plan, kvq_error *err) {
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--model is missing");
    if (o->seed.given && o->passkey.lengths == NULL && !kvq_cli_is_self(&o->source)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "leave --seed out",
                        "--seed: only text that the model writes (--text self) and pass keys (--passkey) have a seed");
    }
    if (o->prompt > 0 && o->protocol != KVQ_PROTOCOL_DECODE) {
        return kvq_fail(err, KVQ_ERR_USAGE, "add --protocol decode", "--prompt: only the protocol decode has a prompt");
    }
    if (o->protocol == KVQ_PROTOCOL_DECODE && o->artifact == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--protocol: there is no cache to decode with");
    for (int i = 0; i < o->gates.count; i++) {
        kvq_status status = kvq_gate_parse(o->gates.items[i], &gates[i], err);
        if (status != KVQ_OK) return status;
        if (o->artifact == NULL && kvq_gate_needs_artifact(&gates[i])) {
            return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--gate '%s': %s is only measured with an artifact",
                            gates[i].expression, gates[i].metric);
        }
    }
    return o->passkey.lengths != NULL ? check_passkey(o, gates, plan, err) : check_text(o, gates, err);
}

// A model that is judged on the very text its artifact was fitted to looks better than it is.
static kvq_status resolve_seed(const validate_options *o, const kvq_artifact *a, uint64_t *seed, kvq_error *err) {
    bool fitted_to_self = a != NULL && strcmp(a->dataset.source, "self") == 0 && a->dataset.source_sha256[0] == 0;
    *seed = o->seed.given ? o->seed.value : fitted_to_self && o->passkey.lengths == NULL ? a->dataset.seed + 1 : 0;
    if (fitted_to_self && kvq_cli_is_self(&o->source) && *seed == a->dataset.seed) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose another seed, or leave --seed out",
                        "--seed %llu: the artifact was calibrated on the text of this seed", (unsigned long long)*seed);
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- one run

static kvq_status open_pair(kvq_cli *cli, const validate_options *o, validate_report *r, kvq_checkpoint **checkpoint,
                            kvq_artifact **artifact, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (o->artifact != NULL) KVQ_TRY(kvq_artifact_read(&cli->ctx, o->artifact, artifact, r->artifact_sha256, err));
    KVQ_TRY(resolve_seed(o, *artifact, &r->seed, err));
    KVQ_TRY(kvq_checkpoint_open(&cli->ctx, o->model, checkpoint, err));
    KVQ_TRY(kvq_checkpoint_identify(&cli->ctx, *checkpoint, &r->identity, err));
    if (*artifact != NULL) {
        const kvq_checkpoint_identity *identity = o->allow_other_weights ? NULL : &r->identity;
        KVQ_TRY(kvq_artifact_matches(*artifact, kvq_checkpoint_config(*checkpoint), identity, err));
    }

done:
    return status;
}

static void check_tokenizer(kvq_cli *cli, const validate_report *r) {
    if (strcmp(r->tokenizer.kind, "none") == 0 || strcmp(r->artifact->tokenizer.kind, "none") == 0) return;
    if (strcmp(r->tokenizer.sha256, r->artifact->tokenizer.sha256) == 0) return;
    kvq_log(&cli->ctx, KVQ_LOG_WARNING, "the artifact was calibrated with another tokenizer file (%s, sha256 %.12s...)",
            r->artifact->tokenizer.kind, r->artifact->tokenizer.sha256);
}

// What a user would not want to be measured in silence.
static void warn(kvq_cli *cli, const validate_report *r) {
    const kvq_artifact *a = r->artifact;
    if (a == NULL) return;
    check_tokenizer(cli, r);
    if (a->tokenizer.bos_added != r->windows.bos_added) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "calibrated %s BOS token in front of each window, measured %s (--bos)",
                a->tokenizer.bos_added ? "with a" : "without", r->windows.bos_added ? "with one" : "without");
    }
    if (r->windows.source_sha256[0] != 0 && strcmp(r->windows.source_sha256, a->dataset.source_sha256) == 0) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "%s is the text the artifact was calibrated on: expect flattering numbers",
                r->windows.source);
    }
    if (!r->weights_checked) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "--allow-other-weights: the model need not be the one that was calibrated");
    }
}

// A token as the tokenizer spells it, for a message; empty when there is no tokenizer.
static void spell(kvq_cli *cli, const validate_options *o, int64_t id, char *out, size_t size) {
    kvq_tokenizer *tokenizer = NULL;
    out[0] = 0;
    if (o->source.tokens == NULL && kvq_tokenizer_open(&cli->ctx, o->model, &tokenizer, NULL) == KVQ_OK)
        kvq_tokenizer_spelling(tokenizer, id, out, size);
    kvq_tokenizer_close(&cli->ctx, &tokenizer);
}

// The text is of another kind than what was calibrated on; what to do about it is known.
static void warn_of_ranges(kvq_cli *cli, const validate_options *o, const validate_report *r) {
    const kvq_range_report *range = &r->validation.range;
    char                    token[64] = "";
    if (!r->validation.has_range || !range->exceeds) return;
    spell(cli, o, range->token, token, sizeof token);
    kvq_log(&cli->ctx, KVQ_LOG_WARNING,
            "%.3f%% of the keys lie outside of the calibrated ranges, %.1f times as many as expected (%.3f%%): most of "
            "them in layer %lld (%.2f%%), there in channel %lld (%.1f%%); %.0f%% of all at token %lld%s%s%s; calibrate "
            "on text like this too (--text, --newlines mixed)",
            100 * range->share.value, range->share.value / range->expected, 100 * range->expected,
            (long long)range->layer, 100 * range->layer_share, (long long)range->channel, 100 * range->channel_share,
            100 * range->token_part, (long long)range->token, token[0] != 0 ? " ('" : "", token,
            token[0] != 0 ? "')" : "");
}

static void print_plan(kvq_cli *cli, const validate_options *o, const kvq_backend *be, const validate_report *r) {
    kvq_cli_say(cli, "model      %s  %s  %lld layers  %d KV heads x %d", r->identity.name, r->config->architecture,
                (long long)r->config->n_layers, r->config->n_kv_heads, r->config->head_dim);
    if (r->artifact != NULL)
        kvq_cli_say(cli, "artifact   %s  content sha256 %s", kvq_file_name(o->artifact), r->artifact_sha256);
    if (r->passkey.n_lengths > 0)
        passkey_say(cli, &r->passkey);
    else
        kvq_cli_say(cli, "text       %s  %lld tokens read  %lld windows of %lld  BOS %s", r->windows.source,
                    (long long)r->windows.n_available, (long long)r->windows.n_windows, (long long)r->windows.seq_len,
                    r->windows.bos_added ? "added" : "not added");
    if (r->self || r->passkey.n_lengths > 0) kvq_cli_say(cli, "seed       %llu", (unsigned long long)r->seed);
    kvq_cli_say(cli, "compute    %d %s threads with %s", cli->ctx.n_threads, be->name, be->matmul);
}

static void judge(const validate_options *o, validate_report *r) {
    for (int i = 0; i < r->n_gates; i++)
        r->judgements[i] = kvq_gate_judge(&r->gates[i], &r->validation, o->gate_mode == GATES_BY_POINT);
}

static int verdict_code(const validate_options *o, const validate_report *r) {
    bool open = count_gates(r, KVQ_INCONCLUSIVE) > 0;
    if (count_gates(r, KVQ_FAIL) > 0 || (open && o->inconclusive == INCONCLUSIVE_FAILS)) return CLI_VERDICT_NEGATIVE;
    return open && o->inconclusive == INCONCLUSIVE_CODE ? CLI_VERDICT_OPEN : 0;
}

static void suggest_next(kvq_cli *cli, const validate_options *o, const validate_report *r) {
    if (o->artifact == NULL) {
        kvq_cli_next(cli, "kvq-calibrate", "--model", o->model, "--text", "TRAIN.txt", "-o", "OUT.kvq.h5", NULL);
    } else if (count_gates(r, KVQ_FAIL) > 0) {
        kvq_cli_next(cli, "kvq-calibrate", "--model", o->model, "--text", "TRAIN.txt", "--bits", "4", "-o",
                     "OTHER.kvq.h5", NULL);
    } else {
        kvq_cli_next(cli, "kvq-export", o->artifact, "--to", "safetensors", "-o", "OUT.safetensors", "--check", NULL);
    }
}

static kvq_status take_windows(kvq_cli *cli, const validate_options *o, const kvq_backend *be,
                               const kvq_checkpoint *checkpoint, validate_report *r, kvq_error *err) {
    kvq_cli_window_request request = {.n_windows = o->windows, .seed = r->seed};
    kvq_status             status = KVQ_OK;
    if (r->passkey.n_lengths > 0) {
        KVQ_TRY(passkey_prepare(cli, r->config, o->model, o->source.bos, r->seed, &r->passkey, &r->tokenizer, err));
        r->windows.bos_added = r->passkey.windows[0].windows.bos_added; // warn compares it with the artifact's
        return KVQ_OK;
    }
    int64_t usual = r->artifact != NULL ? r->artifact->dataset.seq_len : CLI_DEFAULT_SEQ_LEN;
    KVQ_TRY(kvq_cli_seq_len(cli, r->config, o->seq_len, usual, &request.seq_len, err));
    if (r->self && request.n_windows == 0) request.n_windows = SELF_WINDOWS;
    KVQ_TRY(kvq_cli_windows(cli, be, checkpoint, o->model, &o->source, &request, &r->windows, &r->tokenizer, err));

done:
    return status;
}

static kvq_status measure(kvq_cli *cli, const validate_options *o, const kvq_backend *be, kvq_model *model,
                          validate_report *r, kvq_error *err) {
    const kvq_validate_options how = {.protocol = (kvq_protocol)o->protocol,
                                      .n_prompt = o->prompt > 0 ? o->prompt : r->windows.seq_len / 2,
                                      .layer_windows = o->layer_windows,
                                      .noise_windows = o->noise_windows};
    if (r->passkey.n_lengths == 0)
        return kvq_validate(&cli->ctx, be, model, r->artifact, &r->windows, &how, &r->validation, err);
    kvq_status status = passkey_run(cli, be, model, r->artifact, &r->passkey, err);
    r->validation = (kvq_validation){.has_artifact = true,
                                     .options = {.protocol = KVQ_PROTOCOL_DECODE},
                                     .tokens_scored = r->passkey.all.baseline, // what its share is a share of
                                     .has_passkey = status == KVQ_OK,
                                     .passkey = r->passkey.kept};
    return status;
}

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    kvq_status              status = KVQ_OK;
    const validate_options *o = options;
    kvq_gate                gates[CLI_MAX_LIST];
    kvq_checkpoint         *checkpoint = NULL;
    kvq_artifact           *artifact = NULL;
    kvq_backend            *be = NULL;
    kvq_model              *model = NULL;
    validate_report         r = {.self = kvq_cli_is_self(&o->source),
                                 .bos = o->source.bos,
                                 .compute = o->compute,
                                 .gates = gates,
                                 .n_gates = o->gates.count,
                                 .weights_checked = !o->allow_other_weights};

    KVQ_TRY(check_options(o, gates, &r.passkey, err));
    KVQ_TRY(open_pair(cli, o, &r, &checkpoint, &artifact, err));
    r.config = kvq_checkpoint_config(checkpoint);
    cli->n_layers = r.config->n_layers;
    r.artifact = artifact;
    r.artifact_name = o->artifact != NULL ? kvq_file_name(o->artifact) : NULL;
    KVQ_TRY(kvq_backend_cpu(&cli->ctx, (kvq_compute)o->compute, &be, err));
    KVQ_TRY(take_windows(cli, o, be, checkpoint, &r, err));
    print_plan(cli, o, be, &r);
    warn(cli, &r);
    KVQ_TRY(kvq_model_create(&cli->ctx, be, checkpoint, false, &model, err));
    KVQ_TRY(measure(cli, o, be, model, &r, err));
    kvq_cli_end_progress(cli);
    warn_of_ranges(cli, o, &r);
    judge(o, &r);
    if (o->json) {
        KVQ_TRY(print_report_json(&r, err));
    } else {
        print_report_text(&r);
    }
    suggest_next(cli, o, &r);
    *exit_code = verdict_code(o, &r);

done:
    kvq_validation_free(&cli->ctx, &r.validation);
    passkey_free(cli, &r.passkey);
    kvq_windows_free(&cli->ctx, &r.windows);
    kvq_model_destroy(&cli->ctx, &model);
    if (be != NULL) be->destroy(&be);
    kvq_checkpoint_close(&cli->ctx, &checkpoint);
    kvq_artifact_destroy(&cli->ctx, &artifact);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-validate",
    .summary =
        "Measures perplexity, KL divergence and top-1 agreement of a model with and without a quantised KV cache.",
    .synopsis = "--model PATH [--artifact OUT.kvq.h5] --text FILE|self... [--seq-len S]\n"
                "    [--windows N] [--bos auto|always|never] [--gate EXPR]...\n"
                "    [--protocol prefill|decode] [--compute f32|bf16] [--json]\n"
                "--model PATH --artifact OUT.kvq.h5 --passkey S,S... [--depths F,F...] [--passkey-trials N]\n"
                "    [--seed X] [--bos auto|always|never] [--gate 'passkey>=SHARE'] [--json]\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes =
        "gates: a metric, <= or >=, a limit; shares as 1% or 0.01. Metrics: dppl, ppl, kld.mean, kld.median, kld.p90,\n"
        "  kld.p99, kld.p99.9, kld.max, top1, top5, dp.rms, layer.attn_err.max, effective_bits;\n"
        "  with --passkey: passkey, the share kept of the keys that the baseline retrieves.\n"
        "A gate passes when the whole interval of 95% is within its limit, fails when none of it is, and is "
        "inconclusive\n"
        "otherwise. exit code: 0 when every gate passes, 1 when one fails, 7 when one is inconclusive.\n\n"
        "examples:\n"
        "  kvq-validate --model llama-3.1-8b --artifact l31.kvq.h5 --text wiki.test.raw\n"
        "  kvq-validate --model m.gguf --artifact m.kvq.h5 --text self --gate 'dppl<=1%' --json > report.json\n"
        "  kvq-validate --model m.gguf --artifact m.kvq.h5 --passkey 1k,4k --gate 'passkey>=90%'\n",
    .run = run,
};

int main(int argc, char **argv) {
    validate_options options = {.layer_windows = 4, .noise_windows = 2};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
