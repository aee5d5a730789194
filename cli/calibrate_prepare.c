// SPDX-License-Identifier: Apache-2.0
//
// Before a calibration starts: outputs that are in the way, the model, the plan, the windows. What cannot work is found
// here, not after hours.
#include <string.h>

#include "calibrate_report.h"

// What a run recorded before it wrote, as it shows in what lies where the output will be: the content hash of an
// artifact, the windows of a measurement. False: it is neither.
static bool read_result(kvq_cli *cli, const calibration *c, char found[KVQ_SHA256_HEX]) {
    kvq_artifact    *artifact = NULL;
    kvq_measurement *measurement = NULL;
    bool             known;
    if (c->o->measure_only) {
        known = kvq_measurement_open(&cli->ctx, c->o->output, &measurement, NULL) == KVQ_OK;
        if (known) strcpy(found, kvq_measurement_about(measurement)->dataset.token_ids_sha256);
        kvq_measurement_close(&cli->ctx, &measurement);
    } else {
        known = kvq_artifact_read(&cli->ctx, c->o->output, &artifact, found, NULL) == KVQ_OK;
        kvq_artifact_destroy(&cli->ctx, &artifact);
    }
    return known;
}

// An output that is in the way is found now, not after hours; unless it is what this very run wrote just before it was
// killed, as its work directory knows.
static kvq_status check_output(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    char                     result[KVQ_SHA256_HEX], found[KVQ_SHA256_HEX] = "";
    kvq_status               status = kvq_sweep_peek_result(&cli->ctx, &c->sweep, &c->processes, result, err);
    if (status != KVQ_OK) return status;
    if (result[0] != 0 && !o->restart) c->finished = read_result(cli, c, found) && strcmp(result, found) == 0;
    const char *inputs[CLI_SOURCE_FILES + 3] = {NULL};
    kvq_cli_source_files(&o->source, inputs);
    inputs[CLI_SOURCE_FILES] = o->model;
    inputs[CLI_SOURCE_FILES + 1] = o->thresholds;
    inputs[CLI_SOURCE_FILES + 2] = o->allocated.widths_from;
    return kvq_cli_check_output(cli, o->output, o->force || c->finished, inputs, CLI_COUNT_OF(inputs), err);
}

bool continues(const calibration *c) { return !c->o->restart && kvq_sweep_has_begun(&c->sweep, &c->processes); }

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

// What comes after the sweeps, whose memory is free by then.
static kvq_status check_later_memory(calibration *c, int64_t bytes, const char *what, const char *next,
                                     kvq_error *err) {
    char text[32], limit[32];
    if (bytes > c->plan.memory_bytes) c->plan.memory_bytes = bytes;
    if (c->o->memory_limit == 0 || bytes <= c->o->memory_limit) return KVQ_OK;
    kvq_cli_format_bytes((double)bytes, text, sizeof text);
    kvq_cli_format_bytes((double)c->o->memory_limit, limit, sizeof limit);
    return kvq_fail(err, KVQ_ERR_MEMORY, next, "--memory-limit %s: %s needs about %s", limit, what, text);
}

static kvq_status check_held_out_memory(calibration *c, kvq_error *err) {
    int64_t bytes =
        c->plan.weight_bytes + c->plan.program_bytes + kvq_heldout_bytes(c->model, c->seq_len, c->o->held_out);
    return check_later_memory(c, bytes, "the report on held-out windows", "use fewer held-out windows, or shorter ones",
                              err);
}

// What the disk has sets the limit when the user does not; a run that goes on has its files already.
static kvq_status make_plan(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_calib_limits limits = {c->o->memory_limit, c->o->scratch_limit};
    double           free_bytes = kvq_cli_free_bytes(c->work_dir);
    if (limits.scratch_bytes == 0 && free_bytes > 0 && !continues(c))
        limits.scratch_bytes = (int64_t)free_bytes / c->processes.n_ranks;
    kvq_status status = kvq_calib_plan_make(&cli->ctx, c->model, &c->measured, c->o->samples, c->seq_len,
                                            c->sweep.n_shards * c->processes.n_ranks, limits, &c->plan, err);
    if (status == KVQ_ERR_DISK) kvq_error_prefix(err, "%s: ", c->work_dir);
    c->sweep.stride = c->plan.stride;
    c->sweep.prefetch = c->plan.prefetch;
    if (status == KVQ_OK && c->o->held_out > 0) status = check_held_out_memory(c, err);
    if (status == KVQ_OK) {
        status = check_later_memory(c, sensitivity_bytes(c), "the KL of single tensors",
                                    "use fewer --kl-tokens; 0 does without", err);
    }
    return status == KVQ_OK && kvq_cli_is_self(&c->o->source) ? check_writing_memory(c, err) : status;
}

kvq_status find_windows(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    kvq_cli_window_request   request = {.n_windows = o->samples,
                                        .seed = o->seed.value,
                                        .drawn = true,
                                        .seq_len = c->seq_len,
                                        .python_draw = c->python_draw,
                                        .n_heldout = o->held_out};
    return kvq_cli_windows(cli, c->be, c->checkpoint, o->model, &o->source, &request, &c->windows, &c->tokenizer, err);
}

kvq_status open_model(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const calibrate_options *o = c->o;
    KVQ_TRY(kvq_checkpoint_open(&cli->ctx, o->model, &c->checkpoint, err));
    const kvq_model_config *config = kvq_checkpoint_config(c->checkpoint);
    cli->n_layers = config->n_layers;
    KVQ_TRY(kvq_cli_seq_len(cli, config, o->seq_len, CLI_DEFAULT_SEQ_LEN, &c->seq_len, err));
    complete_allocated_options(c, config->head_dim);
    KVQ_TRY(kvq_measure_options_check(&c->measured, config, c->seq_len, err));
    if (c->allocated && o->allocated.widths_from == NULL)
        KVQ_TRY(kvq_fit_allocated_check(&cli->ctx, config, &c->measured, &c->alloc, err));
    else if (c->allocated)
        KVQ_TRY(kvq_alloc_options_check(&c->alloc, config->head_dim, err));
    else if (!o->measure_only)
        KVQ_TRY(kvq_fit_options_check(&c->options.fit, err));
    if (c->like != NULL) KVQ_TRY(kvq_artifact_matches(c->like, config, NULL, err));
    KVQ_TRY(kvq_checkpoint_identify(&cli->ctx, c->checkpoint, &c->identity, err));
    KVQ_TRY(kvq_cli_backend(cli, &o->engine, &c->be, err));
    KVQ_TRY(kvq_model_create(&cli->ctx, c->be, c->checkpoint, false, &c->model, err));
done:
    return status;
}

// Once per calibration: not in every process, shard and continuation.
static kvq_status check_bos(kvq_cli *cli, calibration *c, kvq_error *err) {
    if (c->processes.rank > 0 || c->sweep.shard > 0 || c->o->thresholds != NULL || continues(c)) return KVQ_OK;
    return kvq_cli_check_bos(cli, c->be, c->model, &c->o->source, &c->windows, &c->tokenizer, c->o->dry_run, err);
}

kvq_status prepare_calibration(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status               status = KVQ_OK;
    const calibrate_options *o = c->o;
    bool                     self = kvq_cli_is_self(&o->source);
    KVQ_TRY(check_output(cli, c, err));
    KVQ_TRY(open_widths(cli, c, err));
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
