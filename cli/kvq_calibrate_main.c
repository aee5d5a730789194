// SPDX-License-Identifier: Apache-2.0
//
// kvq-calibrate: a checkpoint and a text in, an artifact out.
#include <stdio.h>
#include <string.h>

#include "calibrate_report.h"

#define AT(field) offsetof(calibrate_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "Hugging Face directory (safetensors) or one GGUF file"},
    CLI_TEXT_ROWS,
    {"capture", 0, CLI_TEXT, AT(capture), "FILE",
     .help = "K and V from kvq-capture or another program, instead of a model and a text"},
    CLI_WINDOW_ROWS,
    {"bits", 0, CLI_COUNT, AT(bits), "B", .help = "bits per element of K and V, 2 to 4 (3)", .min = 2, .max = 4},
    {"k-bits", 0, CLI_COUNT, AT(k_bits), "B", .help = "bits of K alone", .min = 2, .max = 4},
    {"v-bits", 0, CLI_COUNT, AT(v_bits), "B", .help = "bits of V alone", .min = 2, .max = 4},
    {"outliers", 0, CLI_FRACTION, AT(outliers), "F", .help = "share of elements kept exact, 0 to 10% (1%)", .min = 0,
     .max = 0.1},
    {"sink-tokens", 0, CLI_COUNT, AT(sink_tokens), "N", .help = "first tokens kept in f16 (1)", .min = 0,
     .max = CLI_MAX_TOKENS},
    {"weighting", 0, CLI_CHOICE, AT(weighting), "HOW", .help = "fisher-scaled (default), fisher or none",
     .choices = kvq_weighting_names},
    {"compute", 0, CLI_CHOICE, AT(compute), "TYPE",
     .help = "type of the factors in linear layers: f32 (default), or bf16 where the processor has it",
     .choices = kvq_compute_names},
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "changes speed, never a result (one per core)",
     .min = 1, .max = KVQ_MAX_THREADS},
    {"memory-limit", 0, CLI_BYTES, AT(memory_limit), "SIZE", .help = "resident memory to stay below, like 16GiB"},
    {"work-dir", 0, CLI_TEXT, AT(work_dir), "DIR",
     .help = "scratch, from which the same command continues; removed at the end (OUT.work)"},
    {"scratch-limit", 0, CLI_BYTES, AT(scratch_limit), "SIZE",
     .help = "disk to use there; what does not fit is recomputed (what is free)"},
    {"restart", 0, CLI_FLAG, AT(restart), NULL, .help = "begin anew instead of continuing an interrupted run"},
    {"shard", 0, CLI_TEXT, AT(shard), "I/N",
     .help = "only every N-th window (I from 0, N to 32), for kvq-merge; needs --work-dir"},
    {"thresholds", 0, CLI_TEXT, AT(thresholds), "FILE", .help = "second round of a shard: what kvq-merge wrote"},
    {"dry-run", 'n', CLI_FLAG, AT(dry_run), NULL, .help = "print the plan, write nothing"},
    {"force", 'f', CLI_FLAG, AT(force), NULL, .help = "replace an existing output"},
    {"output", 'o', CLI_TEXT, AT(output), "OUT.kvq.h5", .help = "the artifact to write"},
};
#undef AT

// ---------------------------------------------------------------- options

static kvq_status check_bits_options(const calibrate_options *o, kvq_error *err) {
    if (o->bits > 0 && (o->k_bits > 0 || o->v_bits > 0)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give --bits, or --k-bits and --v-bits",
                        "--bits %lld and --k-bits or --v-bits contradict each other", (long long)o->bits);
    }
    return KVQ_OK;
}

// A capture fixes all that concerns model, text and sweeps; an option that could have no effect is a misunderstanding.
static kvq_status check_capture_options(const calibrate_options *o, int n_ranks, kvq_error *err) {
    const struct {
        const char *name;
        bool        given;
    } useless[] = {
        {"--model", o->model != NULL},
        {"--text", o->source.texts.count > 0},
        {"--tokens", o->source.tokens != NULL},
        {"--samples", o->samples != CLI_USUAL_SAMPLES},
        {"--seq-len", o->seq_len > 0},
        {"--seed", o->seed.given},
        {"--bos", o->source.bos != KVQ_BOS_AUTO},
        {"--compute", o->compute != KVQ_COMPUTE_F32},
        {"--memory-limit", o->memory_limit > 0},
        {"--scratch-limit", o->scratch_limit > 0},
        {"--work-dir", o->work_dir != NULL},
        {"--restart", o->restart},
        {"--shard", o->shard != NULL},
        {"--thresholds", o->thresholds != NULL},
        {"mpirun", n_ranks > 1},
    };
    for (int i = 0; i < CLI_COUNT_OF(useless); i++) {
        if (!useless[i].given) continue;
        return kvq_fail(err, KVQ_ERR_USAGE, "leave it out; the capture brings model, text and windows along",
                        "--capture %s: %s has no meaning here", o->capture, useless[i].name);
    }
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    return check_bits_options(o, err);
}

static kvq_status check_options(const calibrate_options *o, int n_ranks, kvq_error *err) {
    if (o->capture != NULL) return check_capture_options(o, n_ranks, err);
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--model is missing");
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    kvq_status status = check_bits_options(o, err);
    if (status != KVQ_OK) return status;
    if (o->shard != NULL && n_ranks > 1) {
        return kvq_fail(err, KVQ_ERR_USAGE, "use one of them", "--shard %s and %d processes contradict each other",
                        o->shard, n_ranks);
    }
    if (o->thresholds != NULL && o->shard == NULL) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--thresholds belongs to the second round of a --shard");
    }
    return kvq_cli_source_check(&o->source, err);
}

// "I/N"
static kvq_status read_shard(const char *text, kvq_sweep_options *out, kvq_error *err) {
    long long shard = 0, n_shards = 1;
    int       end = 0;
    if (text != NULL && (sscanf(text, "%lld/%lld%n", &shard, &n_shards, &end) != 2 || text[end] != 0 || shard < 0 ||
                         shard >= n_shards || n_shards > CLI_MAX_LIST)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "the first of two is 0/2", "--shard: '%s' is not I/N with 0 <= I < N <= %d",
                        text, CLI_MAX_LIST);
    }
    out->shard = shard;
    out->n_shards = n_shards;
    return KVQ_OK;
}

static kvq_status resolve_options(calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    c->options = kvq_calib_options_default();
    if (o->bits > 0) c->options.k_bits = c->options.v_bits = (int)o->bits;
    if (o->k_bits > 0) c->options.k_bits = (int)o->k_bits;
    if (o->v_bits > 0) c->options.v_bits = (int)o->v_bits;
    c->options.outlier_fraction = o->outliers;
    c->options.sink_tokens = o->sink_tokens;
    c->options.weighting = (kvq_weighting)o->weighting;
    kvq_status status = kvq_cli_work_dir(o->work_dir, o->output, c->work_dir, err);
    if (status != KVQ_OK) return status;
    c->sweep = (kvq_sweep_options){.work_dir = c->work_dir, .restart = o->restart};
    status = read_shard(o->shard, &c->sweep, err);
    if (status != KVQ_OK || o->shard == NULL || o->work_dir != NULL) return status;
    return kvq_fail(err, KVQ_ERR_USAGE, "give each shard a folder of its own, the same in both rounds",
                    "--shard %s needs --work-dir: the second round goes on where the first one ended", o->shard);
}

// ---------------------------------------------------------------- preparations

// An output that is in the way is found now, not after hours; unless it is what this very run wrote just before it was
// killed, as its work directory knows.
static kvq_status check_output(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    kvq_artifact            *existing = NULL;
    char                     result[KVQ_SHA256_HEX], found[KVQ_SHA256_HEX] = "";
    kvq_status               status = kvq_sweep_peek_result(&cli->ctx, &c->sweep, &c->processes, result, err);
    if (status != KVQ_OK) return status;
    if (result[0] != 0 && !o->restart && kvq_artifact_read(&cli->ctx, o->output, &existing, found, NULL) == KVQ_OK)
        c->finished = strcmp(result, found) == 0;
    kvq_artifact_destroy(&cli->ctx, &existing);
    const char *inputs[CLI_SOURCE_FILES + 2] = {NULL};
    kvq_cli_source_files(&o->source, inputs);
    inputs[CLI_SOURCE_FILES] = o->model;
    inputs[CLI_SOURCE_FILES + 1] = o->thresholds;
    return kvq_cli_check_output(cli, o->output, o->force || c->finished, inputs, CLI_COUNT_OF(inputs), err);
}

// Does the work directory hold a run that this one would continue?
static bool continues(const calibration *c) { return !c->o->restart && kvq_sweep_has_begun(&c->sweep, &c->processes); }

// Writing text keeps the whole model and a cache in memory, which no plan of the sweeps counts.
static kvq_status check_writing_memory(calibration *c, kvq_error *err) {
    char text[32], limit[32];
    c->writing_bytes =
        4.0 * (double)kvq_decode_floats(c->model, c->o->samples, c->seq_len) + (double)c->plan.program_bytes;
    if (c->o->memory_limit == 0 || c->writing_bytes <= (double)c->o->memory_limit) return KVQ_OK;
    kvq_cli_format_bytes(c->writing_bytes, text, sizeof text);
    kvq_cli_format_bytes((double)c->o->memory_limit, limit, sizeof limit);
    return kvq_fail(err, KVQ_ERR_MEMORY, "give a text file, or fewer or shorter windows",
                    "--memory-limit %s: a model that writes its own text needs about %s", limit, text);
}

// What the disk has sets the limit when the user does not; a run that goes on has its files already.
static kvq_status make_plan(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_calib_limits limits = {c->o->memory_limit, c->o->scratch_limit};
    double           free_bytes = kvq_cli_free_bytes(c->work_dir);
    if (limits.scratch_bytes == 0 && free_bytes > 0 && !continues(c))
        limits.scratch_bytes = (int64_t)free_bytes / c->processes.n_ranks;
    kvq_status status = kvq_calib_plan_make(&cli->ctx, c->model, &c->options, c->o->samples, c->seq_len,
                                            c->sweep.n_shards * c->processes.n_ranks, limits, &c->plan, err);
    if (status == KVQ_ERR_DISK) kvq_error_prefix(err, "%s: ", c->work_dir);
    c->sweep.stride = c->plan.stride;
    c->sweep.prefetch = c->plan.prefetch;
    return status == KVQ_OK && kvq_cli_is_self(&c->o->source) ? check_writing_memory(c, err) : status;
}

static kvq_status find_windows(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    kvq_cli_window_request   request = {
          .n_windows = o->samples, .seed = o->seed.value, .drawn = true, .seq_len = c->seq_len};
    return kvq_cli_windows(cli, c->be, c->checkpoint, o->model, &o->source, &request, &c->windows, &c->tokenizer, err);
}

static kvq_status open_model(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const calibrate_options *o = c->o;
    KVQ_TRY(kvq_checkpoint_open(&cli->ctx, o->model, &c->checkpoint, err));
    const kvq_model_config *config = kvq_checkpoint_config(c->checkpoint);
    cli->n_layers = config->n_layers;
    KVQ_TRY(kvq_cli_seq_len(cli, config, o->seq_len, CLI_DEFAULT_SEQ_LEN, &c->seq_len, err));
    KVQ_TRY(kvq_calib_options_check(&c->options, config, c->seq_len, err));
    KVQ_TRY(kvq_checkpoint_identify(&cli->ctx, c->checkpoint, &c->identity, err));
    KVQ_TRY(kvq_backend_cpu(&cli->ctx, (kvq_compute)o->compute, &c->be, err));
    KVQ_TRY(kvq_model_create(&cli->ctx, c->be, c->checkpoint, false, &c->model, err));
done:
    return status;
}

// Once per calibration: not in every process, shard and continuation.
static kvq_status check_bos(kvq_cli *cli, calibration *c, kvq_error *err) {
    if (c->processes.rank > 0 || c->sweep.shard > 0 || c->o->thresholds != NULL || continues(c)) return KVQ_OK;
    return kvq_cli_check_bos(cli, c->be, c->model, &c->o->source, &c->windows, &c->tokenizer, c->o->dry_run, err);
}

// Everything opened and checked, the windows known, the plan printed.
static kvq_status prepare(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const calibrate_options *o = c->o;
    bool                     self = kvq_cli_is_self(&o->source);
    KVQ_TRY(check_output(cli, c, err));
    KVQ_TRY(open_model(cli, c, err));
    KVQ_TRY(make_plan(cli, c, err));
    // a text is read before the plan, which says how much there is; writing one takes long, so it comes after
    if (!self) KVQ_TRY(find_windows(cli, c, err));
    print_calibration_plan(cli, c);
    if (!self) KVQ_TRY(check_bos(cli, c, err));
    if (o->dry_run) goto done;
    if (self) KVQ_TRY(find_windows(cli, c, err));
    make_fingerprint(c);
    c->sweep.fingerprint = c->fingerprint;
    c->sweep.n_fingerprint = c->n_fingerprint;
done:
    return status;
}

// ---------------------------------------------------------------- runs

static kvq_status dry_run(kvq_cli *cli, calibration *c, kvq_error *err) {
    char       text[32];
    double     seconds = 0;
    kvq_status status = kvq_calib_probe(&cli->ctx, c->be, c->model, &c->options, c->o->samples, c->seq_len,
                                        c->sweep.n_shards * c->processes.n_ranks, &c->plan, &seconds, err);
    if (status != KVQ_OK) return status;
    kvq_cli_format_seconds(seconds, text, sizeof text);
    kvq_cli_say(cli, "time       about %s on %d threads (2 windows of random tokens were timed in layer 0)", text,
                cli->ctx.n_threads);
    if (continues(c))
        kvq_cli_say(cli, "%s holds a run that was interrupted; the same command would continue it", c->work_dir);
    kvq_cli_say(cli, "would write %s; nothing was written", c->o->output);
    return KVQ_OK;
}

static kvq_status run_shard(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    kvq_status               status = KVQ_OK;
    kvq_round                round = o->thresholds == NULL ? KVQ_ROUND_ENDS : KVQ_ROUND_HISTOGRAMS;
    KVQ_TRY(kvq_calibrate_shard(&cli->ctx, c->be, c->model, &c->windows, &c->options, &c->sweep, o->thresholds,
                                &c->artifact, err));
    KVQ_TRY(record_identity(cli, c, err));
    KVQ_TRY(kvq_shard_write(&cli->ctx, c->artifact, &c->sweep, round, o->output, o->force, err));
    if (round == KVQ_ROUND_HISTOGRAMS) KVQ_TRY(kvq_sweep_forget(&cli->ctx, &c->sweep, &c->processes, err));
    print_shard_summary(cli, c);
done:
    return status;
}

// Every process holds the same artifact; the first one writes it. What it will be is recorded first, see check_output.
static kvq_status write_artifact(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    least = 1;
    KVQ_TRY(record_identity(cli, c, err));
    KVQ_TRY(kvq_artifact_hash(&cli->ctx, c->artifact, c->content_sha256, err));
    KVQ_TRY(kvq_sweep_set_result(&cli->ctx, &c->sweep, &c->processes, c->content_sha256, err));
    if (c->processes.rank == 0) {
        KVQ_TRY(kvq_artifact_write(&cli->ctx, c->artifact, c->o->output, c->o->force || c->finished, c->content_sha256,
                                   err));
    }
done:;
    // the others' work directories wait for the artifact
    kvq_status agreed = c->processes.agree(&c->processes, status == KVQ_OK, &least, status == KVQ_OK ? err : NULL);
    if (status != KVQ_OK || agreed != KVQ_OK) return status != KVQ_OK ? status : agreed;
    if (least == 1) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_DISK, "see the message of the other process",
                    "the artifact was not written by another process of this run");
}

static kvq_status run_whole(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (c->finished) {
        KVQ_TRY(kvq_artifact_read(&cli->ctx, c->o->output, &c->artifact, c->content_sha256, err));
        kvq_cli_say(cli, "%s was complete; only its work directory was left", c->o->output);
    } else {
        KVQ_TRY(kvq_calibrate(&cli->ctx, c->be, c->model, &c->windows, &c->options, &c->sweep, &c->processes,
                              &c->artifact, err));
        KVQ_TRY(write_artifact(cli, c, err));
    }
    KVQ_TRY(kvq_sweep_forget(&cli->ctx, &c->sweep, &c->processes, err));
    if (c->processes.rank == 0) KVQ_TRY(print_calibration_summary(cli, c, err));
done:
    return status;
}

static kvq_status run_capture(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    kvq_capture             *capture = NULL;
    kvq_status               status = KVQ_OK;
    KVQ_TRY(kvq_cli_check_output(cli, o->output, o->force, &o->capture, 1, err));
    KVQ_TRY(kvq_capture_open(&cli->ctx, o->capture, &capture, err));
    const kvq_capture_info *info = kvq_capture_describe(capture);
    c->seq_len = info->dataset.seq_len;
    kvq_cli_say(cli, "capture    %s  %s  %lld layers  %lld KV heads x %lld  %lld x %lld tokens",
                kvq_file_name(o->capture), info->model.name, (long long)info->model.n_layers,
                (long long)info->model.n_kv_heads, (long long)info->model.head_dim, (long long)info->dataset.n_windows,
                (long long)info->dataset.seq_len);
    if (o->dry_run) kvq_cli_say(cli, "would write %s; nothing was written", o->output);
    if (o->dry_run) goto done;
    KVQ_TRY(kvq_calibrate_capture(&cli->ctx, capture, kvq_file_name(o->capture), &c->options, &c->artifact, err));
    KVQ_TRY(record_provenance(cli, c, err));
    KVQ_TRY(kvq_artifact_write(&cli->ctx, c->artifact, o->output, o->force, c->content_sha256, err));
    KVQ_TRY(print_calibration_summary(cli, c, err));
done:
    kvq_capture_close(&cli->ctx, &capture);
    return status;
}

static kvq_status run_prepared(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status status = prepare(cli, c, err);
    int64_t    least = 1;
    // nobody starts while another rank has no model or text
    kvq_status agreed = c->processes.agree(&c->processes, status == KVQ_OK, &least, NULL);
    if (status != KVQ_OK || agreed != KVQ_OK) return status != KVQ_OK ? status : agreed;
    if (least == 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, "see the message of the other process",
                        "another process of this run could not start");
    }
    if (c->o->dry_run) return dry_run(cli, c, err);
    return c->o->shard != NULL ? run_shard(cli, c, err) : run_whole(cli, c, err);
}

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    calibration c = {.o = options, .start_s = kvq_now_s(), .processes = kvq_processes_single()};
    bool        several = kvq_cli_under_mpirun();
    (void)exit_code; // a calibration has no negative verdict
    if (several) KVQ_TRY(kvq_processes_start(&c.processes, err));
    cli->rank = c.processes.rank;
    cli->n_ranks = c.processes.n_ranks;
    if (cli->rank > 0) cli->quiet = cli->silent = true; // one voice
    KVQ_TRY(check_options(c.o, c.processes.n_ranks, err));
    KVQ_TRY(resolve_options(&c, err));
    KVQ_TRY(c.o->capture != NULL ? run_capture(cli, &c, err) : run_prepared(cli, &c, err));
done:
    kvq_artifact_destroy(&cli->ctx, &c.artifact);
    kvq_windows_free(&cli->ctx, &c.windows);
    kvq_model_destroy(&cli->ctx, &c.model);
    if (c.be != NULL) c.be->destroy(&c.be);
    kvq_checkpoint_close(&cli->ctx, &c.checkpoint);
    if (several) kvq_processes_finish(&c.processes);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-calibrate",
    .summary =
        "Fits 2-to-4-bit datatypes for the KV cache of a model from a text, weighted by how much the loss feels them.",
    .synopsis = "--model PATH --text FILE|self... [--samples N] [--seq-len S] [--seed X]\n"
                "    [--bits B | --k-bits B --v-bits B] [--outliers 1%] [--sink-tokens N]\n"
                "    [--compute f32|bf16] [--threads N] [--force] -o OUT.kvq.h5\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "bits per element of a long cache with 1024 KV channels (8 heads x 128), everything counted:\n"
             "  --bits           2      3      4     (f16: 16)\n"
             "  --outliers 1%    2.39   3.39   4.39\n"
             "  --outliers 0     2.02   3.02   4.02\n\n"
             "examples:\n"
             "  kvq-calibrate --model llama-3.1-8b --text wiki.train.raw -o l31.kvq.h5\n"
             "  kvq-calibrate --model model.gguf --text self --bits 2 --samples 64 -o m.kvq.h5\n",
    .can_stop = true,
    .run = run,
};

int main(int argc, char **argv) {
    kvq_calib_options usual = kvq_calib_options_default();
    calibrate_options options = {.samples = CLI_USUAL_SAMPLES,
                                 .outliers = usual.outlier_fraction,
                                 .sink_tokens = usual.sink_tokens,
                                 .weighting = (int)usual.weighting};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
