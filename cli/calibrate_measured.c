// SPDX-License-Identifier: Apache-2.0
//
// kvq-calibrate --measure-only and --from: measure once, fit many times; and the error report on held-out windows.
#include <stdio.h>
#include <string.h>

#include "calibrate_report.h"

// ---------------------------------------------------------------- held out

static kvq_status report_held_out(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_windows held_out = c->windows; // borrowed ids
    held_out.ids = c->windows.heldout_ids;
    held_out.n_windows = c->windows.n_heldout;
    if (c->windows.n_heldout < c->o->held_out) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "--held-out %lld: between the calibration windows there is room for %lld",
                (long long)c->o->held_out, (long long)c->windows.n_heldout);
    }
    if (held_out.n_windows == 0) return KVQ_OK;
    return kvq_measure_heldout(&cli->ctx, c->be, c->model, c->artifact, &held_out, err);
}

kvq_status measure_held_out(kvq_cli *cli, calibration *c, kvq_error *err) {
    return c->o->held_out > 0 ? report_held_out(cli, c, err) : KVQ_OK;
}

// ---------------------------------------------------------------- measuring

// That this run was about to write is recorded first, see check_output. What the file's hash will be is not known then;
// the hash of the windows tells it from another text's.
static kvq_status write_measurement(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(record_identity(cli, c, err));
    KVQ_TRY(kvq_sweep_set_result(&cli->ctx, &c->sweep, &c->processes, c->windows.ids_sha256, err));
    if (c->processes.rank == 0) {
        KVQ_TRY(kvq_measure_write(&cli->ctx, c->artifact, &c->measured, &c->sweep, &c->processes, c->o->output,
                                  c->o->force || c->finished, c->o->eigenvectors, c->content_sha256, err));
    }
done:
    return status;
}

kvq_status run_measurement(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    least = 1;
    KVQ_TRY(kvq_measure(&cli->ctx, c->be, c->model, &c->windows, &c->measured, &c->sweep, &c->processes, &c->artifact,
                        err));
    status = measure_sensitivity(cli, c, err);
    if (status == KVQ_OK) status = write_measurement(cli, c, err);
    // the others' work directories wait for the file
    kvq_status agreed = c->processes.agree(&c->processes, status == KVQ_OK, &least, status == KVQ_OK ? err : NULL);
    if (status != KVQ_OK || agreed != KVQ_OK) return status != KVQ_OK ? status : agreed;
    if (least == 0) {
        return kvq_fail(err, KVQ_ERR_DISK, "see the message of the other process",
                        "the measurement was not written by another process of this run");
    }
    KVQ_TRY(kvq_sweep_forget(&cli->ctx, &c->sweep, &c->processes, err));
    if (c->processes.rank > 0) goto done;
    char seconds[32];
    kvq_cli_format_seconds(kvq_now_s() - c->start_s, seconds, sizeof seconds);
    print_memory(cli, c);
    printf("wrote %s  sha256 %s  %s\n", c->o->output, c->content_sha256, seconds);
    kvq_cli_next(cli, "kvq-calibrate", "--from", c->o->output, c->o->allocated.measure ? "--target-bits" : "--bits",
                 "3", "-o", "OUT.kvq.h5", NULL);
done:
    return status;
}

// ---------------------------------------------------------------- fitting

// A report on text that the fit has seen would flatter it; on other weights it would mean nothing.
static kvq_status prepare_held_out(kvq_cli *cli, calibration *c, kvq_error *err) {
    const kvq_artifact *about = kvq_measurement_about(c->measurement);
    calibrate_options   as_measured = *c->o;
    kvq_status          status = KVQ_OK;
    as_measured.samples = about->dataset.n_samples;
    as_measured.seq_len = about->dataset.seq_len;
    as_measured.seed = (kvq_cli_seed){true, about->dataset.seed};
    const calibrate_options *given = c->o;
    c->o = &as_measured;
    status = open_model(cli, c, err);
    if (status == KVQ_OK)
        status = kvq_artifact_matches(c->artifact, kvq_checkpoint_config(c->checkpoint), &c->identity, err);
    if (status == KVQ_OK) status = find_windows(cli, c, err);
    c->o = given;
    if (status != KVQ_OK || strcmp(c->windows.source_sha256, about->dataset.source_sha256) != 0 ||
        strcmp(c->windows.ids_sha256, about->dataset.token_ids_sha256) == 0)
        return status;
    return kvq_fail(err, KVQ_ERR_MISMATCH, "give --bos, --mix and --text as then, or another text",
                    "--held-out: the measurement took other windows of this text, so it may have seen these");
}

kvq_status run_from(kvq_cli *cli, calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    const char              *inputs[CLI_SOURCE_FILES + 3] = {NULL};
    kvq_status               status = KVQ_OK;
    kvq_cli_source_files(&o->source, inputs);
    inputs[CLI_SOURCE_FILES] = o->model;
    inputs[CLI_SOURCE_FILES + 1] = o->from;
    inputs[CLI_SOURCE_FILES + 2] = o->allocated.widths_from;
    KVQ_TRY(kvq_cli_check_output(cli, o->output, o->force, inputs, CLI_COUNT_OF(inputs), err));
    KVQ_TRY(open_widths(cli, c, err));
    KVQ_TRY(kvq_measurement_open(&cli->ctx, o->from, &c->measurement, err));
    const kvq_artifact *about = kvq_measurement_about(c->measurement);
    c->measured = *kvq_measurement_options(c->measurement);
    c->seq_len = about->dataset.seq_len;
    cli->n_layers = about->model.n_layers;
    set_by_shape(c, about->model.head_dim);
    kvq_cli_say(cli, "measured   %s  %s  %lld layers  %lld KV heads x %lld  %s  %lld x %lld tokens",
                kvq_file_name(o->from), about->model.name, (long long)about->model.n_layers,
                (long long)about->model.n_kv_heads, (long long)about->model.head_dim, about->dataset.source,
                (long long)about->dataset.n_samples, (long long)about->dataset.seq_len);
    print_quantizer(cli, c);
    if (o->dry_run) kvq_cli_say(cli, "would write %s; nothing was written", o->output);
    if (o->dry_run) goto done;
    KVQ_TRY(c->allocated ? fit_allocated_from(cli, c, err)
                         : kvq_refit(&cli->ctx, c->measurement, &c->options.fit, &c->artifact, err));
    if (o->held_out > 0) {
        KVQ_TRY(prepare_held_out(cli, c, err));
        KVQ_TRY(report_held_out(cli, c, err));
    }
    KVQ_TRY(record_provenance(cli, c, err));
    KVQ_TRY(kvq_artifact_write(&cli->ctx, c->artifact, o->output, o->force, c->content_sha256, err));
    KVQ_TRY(print_calibration_summary(cli, c, err));
done:
    return status;
}
