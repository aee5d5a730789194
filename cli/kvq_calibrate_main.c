// SPDX-License-Identifier: Apache-2.0
//
// kvq-calibrate: a checkpoint and a text in, an artifact or a measurement out; or a measurement in, an artifact out.
#include <stdio.h>
#include <string.h>

#include "calibrate_report.h"

#define AT(field) offsetof(calibrate_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "Hugging Face directory (safetensors) or one GGUF file"},
    CLI_TEXT_ROWS,
    {"capture", 0, CLI_TEXT, AT(capture), "FILE",
     .help = "K and V from kvq-capture or another program, instead of a model and a text", .rare = true},
    CLI_WINDOW_ROWS,
    {"measure-only", 0, CLI_FLAG, AT(measure_only), NULL,
     .help = "write a measurement (-o M.kvqm.h5) from which --from fits in seconds"},
    {"from", 0, CLI_TEXT, AT(from), "M.kvqm.h5", .help = "fit from a measurement, without model and text"},
    {"eigenvectors", 0, CLI_FLAG, AT(eigenvectors), NULL,
     .help = "also those of the second moments, into a measurement", .rare = true},
    {"bits", 0, CLI_COUNT, AT(bits), "B", .help = "bits per element of K and V: 2 to 5, and 8 (3)", .min = 2, .max = 8},
    {"k-bits", 0, CLI_COUNT, AT(k_bits), "B", .help = "bits of K alone", .min = 2, .max = 8},
    {"v-bits", 0, CLI_COUNT, AT(v_bits), "B", .help = "bits of V alone", .min = 2, .max = 8},
    {"datatype", 0, CLI_CHOICE, AT(datatype), "TYPE",
     .help = "nuq (fitted levels, default), nf, int (real zero point) or int-clamped", .choices = kvq_datatype_names,
     .rare = true},
    {"k-datatype", 0, CLI_CHOICE, AT(k_datatype), "TYPE", .help = "of K alone", .choices = kvq_datatype_names,
     .rare = true},
    {"v-datatype", 0, CLI_CHOICE, AT(v_datatype), "TYPE", .help = "of V alone", .choices = kvq_datatype_names,
     .rare = true},
    {"groups", 0, CLI_CHOICE, AT(groups), "OF", .help = "one table per layer (default), or per KV head",
     .choices = calibrate_group_names, .rare = true},
    {"weighting", 0, CLI_CHOICE, AT(weighting), "HOW",
     .help = "of the fit: fisher-scaled (default), fisher, range or none", .choices = kvq_weighting_names},
    {"q-norm", 0, CLI_FLAG, AT(q_norm), NULL, .help = "codes decode to levels with the data's mean and deviation",
     .rare = true},
    {"compare-lloyd", 0, CLI_FLAG, AT(compare_lloyd), NULL, .help = "also record what Lloyd's k-means would reach",
     .rare = true},
    {"target-bits", 0, CLI_NUMBER, AT(allocated.target_bits), "B",
     .help = "channel-allocated (docs/allocated.md): bits per element of the cache, everything counted", .min = 1,
     .max = 8},
    {"preset", 0, CLI_CHOICE, AT(allocated.preset), "NAME",
     .help = "such a target by a name: alloc-3.4, alloc-3, alloc-2.75 or alloc-2.1", .choices = calibrate_preset_names},
    {"target-tokens", 0, CLI_COUNT, AT(allocated.target_tokens), "N",
     .help = "of each sequence that the target is about, in whole tiles of 128 (as --seq-len)", .min = 128,
     .max = CLI_MAX_TOKENS, .rare = true},
    {"target-sequences", 0, CLI_COUNT, AT(allocated.target_sequences), "N",
     .help = "how many such sequences there are; they share the tables (8)", .min = 1, .max = 1024, .rare = true},
    {"widths-from", 0, CLI_TEXT, AT(allocated.widths_from), "FILE",
     .help = "use the widths of this artifact instead of a target; tables are fitted anew", .rare = true},
    {"k-mean-bits", 0, CLI_NUMBER, AT(allocated.k_bits), "B",
     .help = "mean bits of the codes of K, instead of a target; with --v-mean-bits", .min = 0.0625, .max = 5,
     .rare = true},
    {"v-mean-bits", 0, CLI_NUMBER, AT(allocated.v_bits), "B", .help = "mean bits of the codes of V, beside it",
     .min = 0.5, .max = 8, .rare = true},
    {"k-widths", 0, CLI_TEXT, AT(allocated.k_widths), "LIST", .help = "bits that channels of K may have (0,1,2,3,4,5)",
     .rare = true},
    {"v-rates", 0, CLI_TEXT, AT(allocated.v_rates), "LIST",
     .help = "bits that pairs of channels of V may have (4,5,6,7,8), with --v-dim 1 channels (2,3,4)", .rare = true},
    {"width-group", 0, CLI_COUNT, AT(allocated.width_group), "N",
     .help = "channels of a head of K that share a width (8; fewer in a head of less than 64)", .min = 1,
     .max = KVQ_TILE_MAX_HEAD_DIM, .rare = true},
    {"budget", 0, CLI_CHOICE, AT(allocated.scope), "OF",
     .help = "bits of K are dealt within the model (default), layer or head", .choices = kvq_budget_scope_names,
     .rare = true},
    {"k-tables", 0, CLI_CHOICE, AT(allocated.tables), "KIND",
     .help = "tables of K by channel (default), or affine: by layer and width, for fast kernels",
     .choices = kvq_table_kind_names, .rare = true},
    {"v-dim", 0, CLI_CHOICE, AT(allocated.v_dim), "N", .help = "channels of V coded together: 2 (default) or 1",
     .choices = calibrate_v_dim_names, .rare = true},
    {"v-scale", 0, CLI_CHOICE, AT(allocated.scale), "TYPE",
     .help = "scales of V, one for each token and head: e4m3 (default) or f16", .choices = kvq_scale_format_names,
     .rare = true},
    {"v-rotation", 0, CLI_CHOICE, AT(allocated.rotation), "KIND",
     .help = "of V before it is coded: orthogonal (default) or none", .choices = kvq_rotation_names, .rare = true},
    {"kl-tokens", 0, CLI_COUNT, AT(allocated.kl_tokens), "N",
     .help = "tokens to measure the KL of each K and V alone on, for their bits; 0 = do not (2048)", .min = 0,
     .max = CLI_MAX_TOKENS, .rare = true},
    {"allocated", 0, CLI_FLAG, AT(allocated.measure), NULL,
     .help = "with --measure-only: also what --from needs for the channel-allocated format", .rare = true},
    {"outliers", 0, CLI_FRACTIONS, AT(outliers), "F",
     .help = "share of elements kept exact, to 10% (1%; channel-allocated 0.25%); --measure-only: a list", .min = 0,
     .max = 0.1},
    {"k-outlier-slots", 0, CLI_COUNT, AT(k_slots), "N", .help = "K outliers per side and token (as F says)", .min = 1,
     .max = KVQ_BLOCK_MAX_SIDE, .rare = true},
    {"threshold-scope", 0, CLI_CHOICE, AT(threshold_scope), "OF",
     .help = "K thresholds by channel (default), or by the matrix of a layer", .choices = kvq_scope_names,
     .rare = true},
    {"k-axis", 0, CLI_CHOICE, AT(k_axis), "AXIS", .help = "ranges of K per channel (default) or per token",
     .choices = kvq_axis_names, .rare = true},
    {"k-domain", 0, CLI_CHOICE, AT(k_domain), "WHERE", .help = "keys are stored pre_rope (default) or post_rope",
     .choices = kvq_key_domain_names, .rare = true},
    {"sink-tokens", 0, CLI_COUNT, AT(sink_tokens), "N", .help = "first tokens kept in f16 (1)", .min = 0,
     .max = CLI_MAX_TOKENS},
    {"count-sinks", 0, CLI_FLAG, AT(count_sinks), NULL, .help = "take thresholds over the sink tokens too",
     .rare = true},
    {"recent-window", 0, CLI_COUNT, AT(recent_window), "N", .help = "last tokens kept in f16 (0)", .min = 0,
     .max = CLI_MAX_TOKENS, .rare = true},
    {"held-out", 0, CLI_COUNT, AT(held_out), "N",
     .help = "windows beside the calibration's, for an error report per layer (0)", .min = 0, .max = CLI_MAX_TOKENS,
     .rare = true},
    {"draw", 0, CLI_CHOICE, AT(draw), "HOW", .help = "windows spread over the text (kvq), or as Python's random does",
     .choices = calibrate_draw_names, .rare = true},
    {"compat", 0, CLI_CHOICE, AT(compat), "WITH",
     .help = "kvquant: the rules of its public code, for comparison (docs/kvquant.md)",
     .choices = calibrate_compat_names, .rare = true},
    CLI_ENGINE_ROWS,
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "changes speed, never a result (one per core)",
     .min = 1, .max = KVQ_MAX_THREADS},
    {"memory-limit", 0, CLI_BYTES, AT(memory_limit), "SIZE", .help = "resident memory to stay below, like 16GiB"},
    {"work-dir", 0, CLI_TEXT, AT(work_dir), "DIR",
     .help = "scratch, from which the same command continues; removed at the end (OUT.work)"},
    {"scratch-limit", 0, CLI_BYTES, AT(scratch_limit), "SIZE",
     .help = "disk to use there; what does not fit is recomputed (what is free)", .rare = true},
    {"restart", 0, CLI_FLAG, AT(restart), NULL, .help = "begin anew instead of continuing an interrupted run"},
    {"shard", 0, CLI_TEXT, AT(shard), "I/N",
     .help = "only every N-th window (I from 0, N to 32), for kvq-merge; needs --work-dir", .rare = true},
    {"thresholds", 0, CLI_TEXT, AT(thresholds), "FILE", .help = "second round of a shard: what kvq-merge wrote",
     .rare = true},
    {"dry-run", 'n', CLI_FLAG, AT(dry_run), NULL, .help = "print the plan, write nothing"},
    {"force", 'f', CLI_FLAG, AT(force), NULL, .help = "replace an existing output"},
    {"output", 'o', CLI_TEXT, AT(output), "OUT.kvq.h5", .help = "the artifact to write"},
};
#undef AT

// ---------------------------------------------------------------- runs

static kvq_status dry_run(kvq_cli *cli, calibration *c, kvq_error *err) {
    char       text[32];
    double     seconds = 0;
    kvq_status status = kvq_calib_probe(&cli->ctx, c->be, c->model, &c->measured, c->o->samples, c->seq_len,
                                        c->sweep.n_shards * c->processes.n_ranks, &c->plan, &seconds, err);
    if (status != KVQ_OK) return status;
    // the KL of single tensors passes the same layers, so it takes as long for its share of the work
    seconds += seconds * sensitivity_tera_flops(c) / c->plan.tera_flops;
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
    KVQ_TRY(kvq_shard_write(&cli->ctx, c->artifact, &c->options, &c->sweep, round, o->output, o->force, err));
    if (round == KVQ_ROUND_HISTOGRAMS) KVQ_TRY(kvq_sweep_forget(&cli->ctx, &c->sweep, &c->processes, err));
    print_shard_summary(cli, c);
done:
    return status;
}

// Every process holds the same artifact; the first one writes it. What it will be is recorded first, see check_output.
static kvq_status write_artifact(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    least = 1;
    KVQ_TRY(measure_held_out(cli, c, err));
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
        KVQ_TRY(c->allocated ? run_allocated(cli, c, err)
                             : kvq_calibrate(&cli->ctx, c->be, c->model, &c->windows, &c->options, &c->sweep,
                                             &c->processes, &c->artifact, err));
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
    kvq_status status = prepare_calibration(cli, c, err);
    int64_t    least = 1;
    // nobody starts while another rank has no model or text
    kvq_status agreed = c->processes.agree(&c->processes, status == KVQ_OK, &least, NULL);
    if (status != KVQ_OK || agreed != KVQ_OK) return status != KVQ_OK ? status : agreed;
    if (least == 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, "see the message of the other process",
                        "another process of this run could not start");
    }
    if (c->o->dry_run) return dry_run(cli, c, err);
    if (c->o->measure_only) return run_measurement(cli, c, err);
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
    KVQ_TRY(check_calibrate_options(c.o, c.processes.n_ranks, err));
    KVQ_TRY(resolve_calibrate_options(&c, err));
    warn_of_cut_sinks(cli, &c);
    KVQ_TRY(c.o->from != NULL      ? run_from(cli, &c, err)
            : c.o->capture != NULL ? run_capture(cli, &c, err)
                                   : run_prepared(cli, &c, err));
done:
    kvq_artifact_destroy(&cli->ctx, &c.artifact);
    kvq_artifact_destroy(&cli->ctx, &c.like);
    kvq_measurement_close(&cli->ctx, &c.measurement);
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
                "    [--compute f32|bf16] [--threads N] [--force] -o OUT.kvq.h5\n"
                "--model PATH --text FILE... --target-bits B [--k-tables affine] -o OUT.kvq.h5\n"
                "--model PATH --text FILE... --measure-only [--allocated] [--outliers 0,0.25%,1%] -o M.kvqm.h5\n"
                "--from M.kvqm.h5 [--bits B | --target-bits B] [--outliers F] [--datatype TYPE] -o OUT.kvq.h5\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes = "bits per element of a long cache with 1024 KV channels (8 heads x 128), everything counted:\n"
             "  --bits           2      3      4     (f16: 16)\n"
             "  --outliers 1%    2.39   3.39   4.39\n"
             "  --outliers 0     2.02   3.02   4.02\n\n"
             "examples:\n"
             "  kvq-calibrate --model llama-3.1-8b --text wiki.train.raw -o l31.kvq.h5\n"
             "  kvq-calibrate --model llama-3.1-8b --text wiki.train.raw --target-bits 3 -o l31-alloc-3.kvq.h5\n"
             "  kvq-calibrate --from l31.kvqm.h5 --k-bits 2 --v-bits 3 --outliers 0.25% -o l31-2.3.kvq.h5\n",
    .can_stop = true,
    .run = run,
};

int main(int argc, char **argv) {
    calibrate_options options = {.samples = CLI_USUAL_SAMPLES,
                                 .allocated = {.preset = NOT_GIVEN, .kl_tokens = NOT_GIVEN, .v_dim = 1},
                                 .sink_tokens = NOT_GIVEN,
                                 .datatype = NOT_GIVEN,
                                 .k_datatype = NOT_GIVEN,
                                 .v_datatype = NOT_GIVEN,
                                 .weighting = NOT_GIVEN};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
