// SPDX-License-Identifier: Apache-2.0
//
// kvq-validate: what a model loses on a text when its KV cache goes through an artifact, and whether that passes.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "validate_options.h"

#define SELF_WINDOWS 4

// ---------------------------------------------------------------- before a run

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

static int64_t prompt_of(const validate_options *o, const validate_report *r) {
    return o->prompt > 0 ? o->prompt : r->windows.seq_len / 2;
}

static kvq_protocol protocol_of(const validate_options *o) {
    return o->protocol == VALIDATE_NO_PROTOCOL ? KVQ_PROTOCOL_PREFILL : (kvq_protocol)o->protocol;
}

static kvq_validate_options options_of(const validate_options *o, const validate_report *r) {
    return (kvq_validate_options){.protocol = protocol_of(o),
                                  .n_prompt = prompt_of(o, r),
                                  .layer_windows = o->layer_windows,
                                  .noise_windows = o->noise_windows};
}

// Before anything is computed: reports that cannot be compared are found out at once.
static kvq_status check_baseline(const validate_options *o, const validate_report *r, kvq_error *err) {
    kvq_report_terms now = {.seq_len = r->windows.seq_len, .n_windows = r->windows.n_windows};
    if (o->baseline == NULL) return KVQ_OK;
    now.n_prompt = o->protocol == KVQ_PROTOCOL_DECODE ? prompt_of(o, r) : 0;
    (void)snprintf(now.protocol, sizeof now.protocol, "%s", kvq_protocol_names[protocol_of(o)]);
    (void)snprintf(now.ids_sha256, sizeof now.ids_sha256, "%s", r->windows.ids_sha256);
    return kvq_report_baseline_matches(&r->earlier, o->baseline, &now, err);
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
    char compute[CLI_COMPUTE_TEXT];
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
    kvq_cli_compute_text(cli, be, compute);
    kvq_cli_say(cli, "compute    %s", compute);
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

// ---------------------------------------------------------------- a run

static kvq_status measure(kvq_cli *cli, const validate_options *o, const kvq_backend *be, kvq_model *model,
                          validate_report *r, kvq_error *err) {
    const kvq_validate_options how = options_of(o, r);
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

static void say_cost(kvq_cli *cli, const validate_options *o, const kvq_model *model, const validate_report *r) {
    const kvq_validate_options how = options_of(o, r);
    kvq_validate_cost          cost = {0};
    char                       bytes[32];
    if (r->passkey.n_lengths > 0)
        cost = passkey_cost(model, &r->passkey);
    else
        cost = kvq_validate_plan(model, r->artifact != NULL, r->windows.n_windows, r->windows.seq_len, &how);
    kvq_cli_format_bytes((double)cost.bytes, bytes, sizeof bytes);
    kvq_cli_say(cli, "cost       %.3g TFLOP, about %s of memory", cost.tera_flops, bytes);
}

static void judge(const validate_options *o, validate_report *r) {
    for (int i = 0; i < r->n_gates; i++)
        r->judgements[i] = kvq_gate_judge(&r->gates[i], &r->validation, o->gate_mode == VALIDATE_BY_POINT);
}

static int verdict_code(const validate_options *o, const validate_report *r) {
    bool open = count_gates(r, KVQ_INCONCLUSIVE) > 0;
    if (count_gates(r, KVQ_FAIL) > 0 || (open && o->inconclusive == VALIDATE_OPEN_FAILS)) return CLI_VERDICT_NEGATIVE;
    return open && o->inconclusive == VALIDATE_OPEN_IS_A_CODE ? CLI_VERDICT_OPEN : 0;
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

// stdout first: it is there whatever becomes of the files.
static kvq_status report(kvq_cli *cli, const validate_options *o, validate_report *r, int *exit_code, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (o->baseline != NULL) kvq_validation_compare(&r->validation, r->earlier.window_nll, r->earlier.window_kld);
    judge(o, r);
    if (o->json) {
        KVQ_TRY(print_report_json(r, err));
    } else {
        print_report_text(r);
    }
    KVQ_TRY(write_report_files(cli, &o->outputs, r, err));
    suggest_next(cli, o, r);
    *exit_code = verdict_code(o, r);

done:
    return status;
}

kvq_status validate_run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    kvq_status              status = KVQ_OK;
    const validate_options *o = options;
    kvq_gate                gates[VALIDATE_MAX_GATES];
    char                   *command = kvq_cli_command(&validate_program, o, &validate_defaults);
    kvq_checkpoint         *checkpoint = NULL;
    kvq_artifact           *artifact = NULL;
    kvq_backend            *be = NULL;
    kvq_model              *model = NULL;
    validate_report         r = {.self = kvq_cli_is_self(&o->source),
                                 .bos = o->source.bos,
                                 .compute = o->engine.compute,
                                 .gates = gates,
                                 .open_fails = o->inconclusive == VALIDATE_OPEN_FAILS,
                                 .command = command,
                                 .weights_checked = !o->allow_other_weights};

    KVQ_TRY(validate_check_options(cli, o, gates, &r.n_gates, &r.passkey, err));
    if (o->baseline != NULL) {
        KVQ_TRY(kvq_report_baseline_read(&cli->ctx, o->baseline, &r.earlier, err));
        r.earlier_name = kvq_file_name(o->baseline);
    }
    KVQ_TRY(open_pair(cli, o, &r, &checkpoint, &artifact, err));
    r.config = kvq_checkpoint_config(checkpoint);
    cli->n_layers = r.config->n_layers;
    r.artifact = artifact;
    r.artifact_name = o->artifact != NULL ? kvq_file_name(o->artifact) : NULL;
    KVQ_TRY(kvq_cli_backend(cli, &o->engine, &be, err));
    r.be = be;
    KVQ_TRY(take_windows(cli, o, be, checkpoint, &r, err));
    print_plan(cli, o, be, &r);
    KVQ_TRY(check_baseline(o, &r, err));
    warn(cli, &r);
    KVQ_TRY(kvq_model_create(&cli->ctx, be, checkpoint, false, &model, err));
    say_cost(cli, o, model, &r);
    KVQ_TRY(measure(cli, o, be, model, &r, err));
    kvq_cli_end_progress(cli);
    if (cli->verbose) kvq_cli_say(cli, "memory     peak %.0f MiB", (double)kvq_peak_memory() / 0x1p20);
    warn_of_ranges(cli, o, &r);
    KVQ_TRY(report(cli, o, &r, exit_code, err));

done:
    free(command);
    kvq_report_baseline_free(&cli->ctx, &r.earlier);
    kvq_validation_free(&cli->ctx, &r.validation);
    passkey_free(cli, &r.passkey);
    kvq_windows_free(&cli->ctx, &r.windows);
    kvq_model_destroy(&cli->ctx, &model);
    if (be != NULL) be->destroy(&be);
    kvq_checkpoint_close(&cli->ctx, &checkpoint);
    kvq_artifact_destroy(&cli->ctx, &artifact);
    return status;
}

int main(int argc, char **argv) {
    validate_options options = validate_defaults;
    return kvq_cli_main(&validate_program, argc, argv, &options);
}
