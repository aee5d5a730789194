// SPDX-License-Identifier: Apache-2.0
// The options of kvq-validate, and which of them go together.
#include <stdio.h>
#include <string.h>

#include "validate_options.h"

static const char *const GATE_MODES[] = {"interval", "point", NULL};
static const char *const INCONCLUSIVE[] = {"code", "pass", "fail", NULL};

#define AT(field) offsetof(validate_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "Hugging Face directory (safetensors) or one GGUF file",
     .path = true},
    {"artifact", 0, CLI_TEXT, AT(artifact), "FILE",
     .help = "artifact of this model; without it only the baseline is measured", .path = true},
    CLI_TEXT_ROWS,
    {"tokens", 0, CLI_TEXT, AT(source.tokens), "FILE.npy", .help = "token ids instead of --text; no tokenizer is used",
     .path = true},
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
     .help = "prefill: all keys and values are quantised; decode: the prompt is exact, later tokens not",
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
    CLI_ENGINE_ROWS,
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "changes speed, never a result (one per core)",
     .min = 1, .max = KVQ_MAX_THREADS, .aside = true},
    {"baseline", 0, CLI_TEXT, AT(baseline), "FILE.json",
     .help = "an earlier report (--json) of the same text to compare with", .path = true},
    {"max-regression", 0, CLI_FRACTION, AT(max_regression), "X",
     .help = "a gate: perplexity may exceed that of --baseline by this share, as 2%", .min = 0, .max = 100},
    {"json", 0, CLI_FLAG, AT(json), NULL, .help = "one JSON document on stdout (kvq.validate/1)", .aside = true},
    VALIDATE_OUTPUT_ROWS,
};
#undef AT

const validate_options validate_defaults = {
    .protocol = VALIDATE_NO_PROTOCOL, .layer_windows = 4, .noise_windows = 2, .max_regression = VALIDATE_NOT_LIMITED};

const kvq_cli_program validate_program = {
    .name = "kvq-validate",
    .summary =
        "Measures perplexity, KL divergence and top-1 agreement of a model with and without a quantised KV cache.",
    .synopsis = "--model PATH [--artifact OUT.kvq.h5] --text FILE|self... [--seq-len S]\n"
                "    [--windows N] [--bos auto|always|never] [--gate EXPR]...\n"
                "    [--protocol prefill|decode] [--baseline FILE.json] [--json] [--html FILE]\n"
                "--model PATH --artifact OUT.kvq.h5 --passkey S,S... [--depths F,F...] [--passkey-trials N]\n"
                "    [--seed X] [--bos auto|always|never] [--gate 'passkey>=SHARE'] [--json]\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes =
        "gates: a metric, <= or >=, a limit; shares as 1% or 0.01. Metrics: dppl, ppl, kld.mean, kld.median, kld.p90,\n"
        "  kld.p99, kld.p99.9, kld.max, top1, top5, dp.rms, layer.attn_err.max, effective_bits; with --baseline\n"
        "  regression.ppl, regression.kld; with --passkey: passkey, the share kept of what the baseline retrieves.\n"
        "A gate passes when the whole interval of 95% is within its limit, fails when none of it is, and is "
        "inconclusive\n"
        "otherwise. exit code: 0 when every gate passes, 1 when one fails, 7 when one is inconclusive.\n\n"
        "examples:\n"
        "  kvq-validate --model llama-3.1-8b --artifact l31.kvq.h5 --text wiki.test.raw\n"
        "  kvq-validate --model m.gguf --artifact m.kvq.h5 --text self --gate 'dppl<=1%' --json > report.json\n"
        "  kvq-validate --model m.gguf --artifact m.kvq.h5 --passkey 1k,4k --gate 'passkey>=90%'\n",
    .run = validate_run,
};

// ---------------------------------------------------------------- gates

static kvq_status parse_gate(const validate_options *o, const char *expression, kvq_gate *gate, kvq_error *err) {
    kvq_status status = kvq_gate_parse(expression, gate, err);
    if (status != KVQ_OK) return status;
    if (o->artifact == NULL && kvq_gate_needs_artifact(gate)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--gate '%s': %s is only measured with an artifact",
                        gate->expression, gate->metric);
    }
    if (o->baseline == NULL && strncmp(gate->metric, "regression.", strlen("regression.")) == 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "add --baseline", "--gate '%s': there is no earlier report to compare with",
                        gate->expression);
    }
    return KVQ_OK;
}

// The gates of the command line, and the one that --max-regression is another word for.
static kvq_status parse_gates(const validate_options *o, kvq_gate *gates, int *n, kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       regression[64];
    *n = o->gates.count;
    for (int i = 0; i < *n; i++) KVQ_TRY(parse_gate(o, o->gates.items[i], &gates[i], err));
    if (o->max_regression >= 0) {
        (void)snprintf(regression, sizeof regression, "regression.ppl<=%.12g%%", 100 * o->max_regression);
        KVQ_TRY(parse_gate(o, regression, &gates[(*n)++], err));
    }

done:
    return status;
}

// ---------------------------------------------------------------- together

static kvq_status check_gates_of(const validate_options *o, const kvq_gate *gates, int n, kvq_error *err) {
    bool passkey = o->passkey.lengths != NULL;
    for (int i = 0; i < n; i++) {
        if ((strcmp(gates[i].metric, "passkey") == 0) == passkey) continue;
        if (passkey)
            return kvq_fail(err, KVQ_ERR_USAGE, "gate passkey, or measure a text",
                            "--gate '%s': --passkey does not measure it", gates[i].expression);
        return kvq_fail(err, KVQ_ERR_USAGE, "measure it with --passkey 1k,2k", "--gate '%s': a text has no pass keys",
                        gates[i].expression);
    }
    return KVQ_OK;
}

// A test of pass keys makes its windows itself, decodes through a cache, and measures nothing else.
static kvq_status check_passkey(const validate_options *o, passkey_report *plan, kvq_error *err) {
    const kvq_cli_source *s = &o->source;
    bool of_texts = s->mix != NULL || s->field != NULL || s->format != 0 || s->documents != 0 || s->newlines != 0;
    if (s->texts.count > 0 || s->tokens != NULL || of_texts || o->seq_len > 0 || o->windows > 0 || o->prompt > 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "run it twice, once for the text",
                        "--passkey %s: it makes its own windows, so nothing else says what is read",
                        o->passkey.lengths);
    }
    if (o->artifact == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--passkey: there is no cache to decode with");
    if (o->protocol == KVQ_PROTOCOL_PREFILL)
        return kvq_fail(err, KVQ_ERR_USAGE, "leave --protocol out", "--passkey: its windows are always decoded");
    if (o->layer_windows != validate_defaults.layer_windows || o->noise_windows != validate_defaults.noise_windows)
        return kvq_fail(err, KVQ_ERR_USAGE, "measure a text for that", "--passkey: layers and noise are not measured");
    if (o->baseline != NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "compare reports of a text",
                        "--baseline: --passkey has no windows to pair");
    if (wants_report_files(&o->outputs))
        return kvq_fail(err, KVQ_ERR_USAGE, "take --json", "--passkey: its report is on stdout only");
    return passkey_plan(&o->passkey, plan, err);
}

static kvq_status check_text(const validate_options *o, kvq_error *err) {
    if (o->passkey.depths.count > 0 || o->passkey.trials > 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "add --passkey 1k,2k", "--%s: belongs to --passkey",
                        o->passkey.depths.count > 0 ? "depths" : "passkey-trials");
    }
    return kvq_cli_source_check(&o->source, err);
}

static kvq_status check_protocol(const validate_options *o, kvq_error *err) {
    if (o->prompt > 0 && o->protocol != KVQ_PROTOCOL_DECODE) {
        return kvq_fail(err, KVQ_ERR_USAGE, "add --protocol decode", "--prompt: only the protocol decode has a prompt");
    }
    if (o->protocol == KVQ_PROTOCOL_DECODE && o->artifact == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--protocol: there is no cache to decode with");
    return KVQ_OK;
}

static kvq_status check_earlier(const validate_options *o, kvq_error *err) {
    if (o->max_regression >= 0 && o->baseline == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --baseline", "--max-regression: there is no report to compare with");
    if (o->baseline != NULL && o->artifact == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --artifact", "--baseline: there is nothing quantised to compare");
    return KVQ_OK;
}

static kvq_status check_outputs(kvq_cli *cli, const validate_options *o, kvq_error *err) {
    const char *inputs[CLI_SOURCE_FILES + 3];
    kvq_cli_source_files(&o->source, inputs);
    inputs[CLI_SOURCE_FILES] = o->model;
    inputs[CLI_SOURCE_FILES + 1] = o->artifact;
    inputs[CLI_SOURCE_FILES + 2] = o->baseline;
    return check_report_files(cli, &o->outputs, o->artifact != NULL && o->layer_windows > 0, inputs,
                              CLI_COUNT_OF(inputs), err);
}

kvq_status validate_check_options(kvq_cli *cli, const validate_options *o, kvq_gate *gates, int *n_gates,
                                  passkey_report *plan, kvq_error *err) {
    bool       passkey = o->passkey.lengths != NULL;
    kvq_status status = KVQ_OK;
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--model is missing");
    if (o->seed.given && !passkey && !kvq_cli_is_self(&o->source)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "leave --seed out",
                        "--seed: only text that the model writes (--text self) and pass keys (--passkey) have a seed");
    }
    KVQ_TRY(check_protocol(o, err));
    KVQ_TRY(check_earlier(o, err));
    KVQ_TRY(parse_gates(o, gates, n_gates, err));
    KVQ_TRY(check_gates_of(o, gates, *n_gates, err));
    KVQ_TRY(passkey ? check_passkey(o, plan, err) : check_text(o, err));
    KVQ_TRY(check_outputs(cli, o, err));

done:
    return status;
}
