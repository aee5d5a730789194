// SPDX-License-Identifier: Apache-2.0
//
// kvq-calibrate: a checkpoint and a text in, an artifact out.
#include <stdio.h>

#include "calibrate_report.h"

#define MAX_PATH 4096

#define AT(field) offsetof(calibrate_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "Hugging Face directory (safetensors) or one GGUF file"},
    {"text", 0, CLI_TEXT, AT(source.text), "FILE", .help = "UTF-8 text; the word self: the model writes its own"},
    {"tokens", 0, CLI_TEXT, AT(source.tokens), "FILE.npy", .help = "token ids instead of --text; no tokenizer is used"},
    {"samples", 0, CLI_COUNT, AT(samples), "N", .help = "windows drawn from the text (16)", .min = 1,
     .max = CLI_MAX_TOKENS},
    {"seq-len", 0, CLI_COUNT, AT(seq_len), "S", .help = "tokens per window (2048, or all positions of the model)",
     .min = 2, .max = CLI_MAX_TOKENS},
    {"seed", 0, CLI_SEED, AT(seed), "X", .help = "decides which windows are drawn (0)"},
    {"bos", 0, CLI_CHOICE, AT(source.bos), "HOW",
     .help = "BOS token in front of a window: auto (as the tokenizer does), always, never",
     .choices = kvq_cli_bos_names},
    {"bits", 0, CLI_COUNT, AT(bits), "B", .help = "bits per element of K and V, 2 to 4 (3)", .min = 2, .max = 4},
    {"k-bits", 0, CLI_COUNT, AT(k_bits), "B", .help = "bits of K alone", .min = 2, .max = 4},
    {"v-bits", 0, CLI_COUNT, AT(v_bits), "B", .help = "bits of V alone", .min = 2, .max = 4},
    {"outliers", 0, CLI_FRACTION, AT(outliers), "F", .help = "share of elements kept exact, 0 to 10% (1%)", .min = 0,
     .max = 0.1},
    {"sink-tokens", 0, CLI_COUNT, AT(sink_tokens), "N", .help = "first tokens kept in f16 (1)", .min = 0,
     .max = CLI_MAX_TOKENS},
    {"weighting", 0, CLI_CHOICE, AT(weighting), "HOW", .help = "fisher-scaled (default), fisher or none",
     .choices = kvq_weighting_names},
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "changes speed, never a result (one per core)",
     .min = 1, .max = KVQ_MAX_THREADS},
    {"work-dir", 0, CLI_TEXT, AT(work_dir), "DIR", .help = "scratch, removed at the end (OUT.work)"},
    {"dry-run", 'n', CLI_FLAG, AT(dry_run), NULL, .help = "print the plan, write nothing"},
    {"force", 'f', CLI_FLAG, AT(force), NULL, .help = "replace an existing output"},
    {"output", 'o', CLI_TEXT, AT(output), "OUT.kvq.h5", .help = "the artifact to write"},
};
#undef AT

// ---------------------------------------------------------------- options

static kvq_status check_options(const calibrate_options *o, kvq_error *err) {
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--model is missing");
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    if (o->bits > 0 && (o->k_bits > 0 || o->v_bits > 0)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give --bits, or --k-bits and --v-bits",
                        "--bits %lld and --k-bits or --v-bits contradict each other", (long long)o->bits);
    }
    return kvq_cli_source_check(&o->source, err);
}

static void resolve_options(const calibrate_options *o, const char *work_dir, kvq_calib_options *out) {
    *out = kvq_calib_options_default();
    if (o->bits > 0) out->k_bits = out->v_bits = (int)o->bits;
    if (o->k_bits > 0) out->k_bits = (int)o->k_bits;
    if (o->v_bits > 0) out->v_bits = (int)o->v_bits;
    out->outlier_fraction = o->outliers;
    out->sink_tokens = o->sink_tokens;
    out->weighting = (kvq_weighting)o->weighting;
    out->scratch_dir = work_dir;
}

// ---------------------------------------------------------------- one run

// A disk that is too small is found before hours are spent on filling it.
static kvq_status check_disk(const calibration *c, kvq_error *err) {
    double free_bytes = kvq_cli_free_bytes(c->options.scratch_dir);
    char   needed[32], available[32];
    if (free_bytes < 0 || free_bytes >= (double)c->plan.scratch_bytes) return KVQ_OK; // below 0: not known
    kvq_cli_format_bytes((double)c->plan.scratch_bytes, needed, sizeof needed);
    kvq_cli_format_bytes(free_bytes, available, sizeof available);
    return kvq_fail(err, KVQ_ERR_DISK, "use fewer or shorter windows, or another disk with --work-dir",
                    "%s: the scratch files need %s, but %s are free", c->options.scratch_dir, needed, available);
}

// Everything opened and checked, the windows known, the plan printed.
static kvq_status prepare(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const calibrate_options *o = c->o;
    bool                     self = kvq_cli_is_self(&o->source);
    kvq_cli_window_request   request = {.n_windows = o->samples, .seed = o->seed.value, .drawn = true};

    const char *inputs[] = {o->model, self ? NULL : o->source.text, o->source.tokens};
    KVQ_TRY(kvq_cli_check_output(cli, o->output, o->force, inputs, CLI_COUNT_OF(inputs), err));
    KVQ_TRY(kvq_checkpoint_open(&cli->ctx, o->model, &c->checkpoint, err));
    const kvq_model_config *config = kvq_checkpoint_config(c->checkpoint);
    KVQ_TRY(kvq_cli_seq_len(cli, config, o->seq_len, CLI_DEFAULT_SEQ_LEN, &c->seq_len, err));
    KVQ_TRY(kvq_calib_options_check(&c->options, config, c->seq_len, err));
    KVQ_TRY(kvq_checkpoint_identify(&cli->ctx, c->checkpoint, &c->identity, err));
    KVQ_TRY(kvq_backend_cpu(&cli->ctx, &c->be, err));
    KVQ_TRY(kvq_model_create(&cli->ctx, c->be, c->checkpoint, false, &c->model, err));
    c->plan = kvq_calib_estimate(&cli->ctx, c->model, o->samples, c->seq_len);
    request.seq_len = c->seq_len;
    // a text is read before the plan, which says how much there is; writing one takes long, so it comes after
    if (!self) {
        KVQ_TRY(kvq_cli_windows(cli, c->be, c->checkpoint, o->model, &o->source, &request, &c->windows, &c->tokenizer,
                                err));
    }
    print_calibration_plan(cli, c);
    if (!self && c->windows.n_available < o->samples * c->seq_len) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "%s has fewer than %lld x %lld tokens, so windows overlap",
                c->windows.source, (long long)o->samples, (long long)c->seq_len);
    }
    KVQ_TRY(check_disk(c, err));
    if (self && !o->dry_run) {
        KVQ_TRY(kvq_cli_windows(cli, c->be, c->checkpoint, o->model, &o->source, &request, &c->windows, &c->tokenizer,
                                err));
    }

done:
    return status;
}

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const calibrate_options *o = options;
    calibration              c = {.o = o, .start_s = kvq_cli_now_s()};
    char                     work_dir[MAX_PATH];
    (void)exit_code; // a calibration has no negative verdict

    KVQ_TRY(check_options(o, err));
    int length = snprintf(work_dir, sizeof work_dir, o->work_dir != NULL ? "%s" : "%s.work",
                          o->work_dir != NULL ? o->work_dir : o->output);
    if (length >= MAX_PATH) {
        status = kvq_fail(err, KVQ_ERR_USAGE, NULL, "--work-dir: the path has more than %d characters", MAX_PATH - 6);
        goto done;
    }
    resolve_options(o, work_dir, &c.options);
    KVQ_TRY(prepare(cli, &c, err));
    if (o->dry_run) {
        kvq_cli_say(cli, "would write %s; nothing was written", o->output);
        goto done;
    }
    KVQ_TRY(kvq_calibrate(&cli->ctx, c.be, c.model, &c.windows, &c.options, &c.artifact, err));
    KVQ_TRY(record_identity(cli, &c, err));
    KVQ_TRY(kvq_artifact_write(&cli->ctx, c.artifact, o->output, o->force, c.content_sha256, err));
    KVQ_TRY(print_calibration_summary(cli, &c, err));

done:
    kvq_artifact_destroy(&cli->ctx, &c.artifact);
    kvq_windows_free(&cli->ctx, &c.windows);
    kvq_model_destroy(&cli->ctx, &c.model);
    if (c.be != NULL) c.be->destroy(&c.be);
    kvq_checkpoint_close(&cli->ctx, &c.checkpoint);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-calibrate",
    .summary =
        "Fits 2-to-4-bit datatypes for the KV cache of a model from a text, weighted by how much the loss feels them.",
    .synopsis = "--model PATH --text FILE|self [--samples N] [--seq-len S] [--seed X]\n"
                "    [--bits B | --k-bits B --v-bits B] [--outliers 1%] [--sink-tokens N]\n"
                "    [--threads N] [--force] -o OUT.kvq.h5\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "bits per element of a long cache with 1024 KV channels (8 heads x 128), everything counted:\n"
             "  --bits           2      3      4     (f16: 16)\n"
             "  --outliers 1%    2.39   3.39   4.39\n"
             "  --outliers 0     2.02   3.02   4.02\n\n"
             "examples:\n"
             "  kvq-calibrate --model llama-3.1-8b --text wiki.train.raw -o l31.kvq.h5\n"
             "  kvq-calibrate --model model.gguf --text self --bits 2 --samples 64 -o m.kvq.h5\n",
    .run = run,
};

int main(int argc, char **argv) {
    kvq_calib_options usual = kvq_calib_options_default();
    calibrate_options options = {.samples = 16,
                                 .outliers = usual.outlier_fraction,
                                 .sink_tokens = usual.sink_tokens,
                                 .weighting = (int)usual.weighting};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
