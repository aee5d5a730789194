// SPDX-License-Identifier: Apache-2.0
//
// Measure once, fit many: the results of the sweeps into a measurement file, and from such a file into an artifact.
#include <stdio.h>
#include <string.h>

#include "calib_impl.h"

// ---------------------------------------------------------------- from the sweeps

kvq_status calib_measured_layer(const kvq_context *ctx, work_dir *work, const kvq_artifact *about,
                                const kvq_measure_options *options, int64_t layer, kvq_measured_layer **out,
                                kvq_error *err) {
    kvq_blob   forward = {0}, backward = {0};
    kvq_status status = KVQ_OK;
    KVQ_TRY(sweep_get_result(ctx, work, (step){STEP_FORWARD, layer}, &forward, err));
    KVQ_TRY(sweep_get_result(ctx, work, (step){STEP_BACKWARD, layer}, &backward, err));
    KVQ_TRY(measure_layer_from_results(ctx, options, measure_shape_of_artifact(about), &forward, &backward, out, err));
    if (options->allocated) {
        (*out)->kl[0] = about->layers[layer].k.kl;
        (*out)->kl[1] = about->layers[layer].v.kl;
    }
done:
    kvq_blob_free(ctx, &forward);
    kvq_blob_free(ctx, &backward);
    return status;
}

kvq_status kvq_measure_write(const kvq_context *ctx, const kvq_artifact *about, const kvq_measure_options *options,
                             const kvq_sweep_options *sweep, const kvq_processes *processes, const char *path,
                             bool force, bool eigenvectors, char sha256[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_measurement_writer *writer = NULL;
    kvq_measured_layer     *measured = NULL;
    work_dir               *work = NULL;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(sweep_open_results(ctx, sweep, processes, &work, err));
    KVQ_TRY(kvq_measurement_create(ctx, path, force, about, options, eigenvectors, &writer, err));
    for (int64_t l = 0; l < about->model.n_layers; l++) {
        KVQ_TRY(calib_measured_layer(ctx, work, about, options, l, &measured, err));
        KVQ_TRY(kvq_measurement_put(ctx, writer, l, measured, err));
        kvq_measured_layer_destroy(ctx, &measured);
        kvq_report_progress(ctx, "write", l, l + 1, about->model.n_layers);
    }
    KVQ_TRY(kvq_measurement_commit(ctx, &writer, sha256, err));
done:
    kvq_measured_layer_destroy(ctx, &measured);
    kvq_measurement_discard(ctx, &writer);
    work_close(ctx, &work, false);
    return status;
}

// ---------------------------------------------------------------- fitting

kvq_status calib_check_fraction(const kvq_measure_options *measured, double fraction, kvq_error *err) {
    char list[256] = "";
    if (kvq_measured_fraction(measured, fraction) >= 0) return KVQ_OK;
    for (int f = 0; f < measured->n_fractions; f++) {
        size_t used = strlen(list);
        (void)snprintf(list + used, sizeof list - used, "%s%g%%", f > 0 ? ", " : "", 100 * measured->fractions[f]);
    }
    return kvq_fail(err, KVQ_ERR_USAGE, "choose one of them, or measure again with --measure-only --outliers LIST",
                    "--outliers %g%% was not measured; the file has %s", 100 * fraction, list);
}

static kvq_status check_measured(const kvq_measure_options *measured, const kvq_fit_options *fit, kvq_error *err) {
    char       list[256] = "";
    kvq_status status = calib_check_fraction(measured, fit->outlier_fraction, err);
    if (status != KVQ_OK) return status;
    if (kvq_weightings_have(measured->weightings, fit->weighting)) return KVQ_OK;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        size_t used = strlen(list);
        if (kvq_weightings_have(measured->weightings, (kvq_weighting)w))
            (void)snprintf(list + used, sizeof list - used, "%s%s", used > 0 ? ", " : "", kvq_weighting_names[w]);
    }
    return kvq_fail(err, KVQ_ERR_USAGE, "choose one of them, or measure again",
                    "--weighting %s was not measured; the file has %s", kvq_weighting_names[fit->weighting], list);
}

kvq_status calib_copy_identity(const kvq_context *ctx, const kvq_artifact *from, kvq_artifact *to, kvq_error *err) {
    struct {
        char      **to;
        const char *from;
    } texts[] = {{&to->model.architecture, from->model.architecture},
                 {&to->model.name, from->model.name},
                 {&to->model.rope_type, from->model.rope_type},
                 {&to->model.dtype, from->model.dtype},
                 {&to->tokenizer.kind, from->tokenizer.kind},
                 {&to->dataset.source, from->dataset.source},
                 {&to->provenance.producer_version, from->provenance.producer_version},
                 {&to->provenance.matmul, from->provenance.matmul},
                 {&to->provenance.cpu, from->provenance.cpu},
                 {&to->provenance.options_json, from->provenance.options_json}};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        kvq_status status = kvq_artifact_set_text(ctx, texts[i].to, texts[i].from, err);
        if (status != KVQ_OK) return status;
    }
    strcpy(to->model.config_sha256, from->model.config_sha256);
    strcpy(to->model.weights_sha256, from->model.weights_sha256);
    strcpy(to->tokenizer.sha256, from->tokenizer.sha256);
    strcpy(to->dataset.source_sha256, from->dataset.source_sha256);
    strcpy(to->dataset.token_ids_sha256, from->dataset.token_ids_sha256);
    to->model.hidden_size = from->model.hidden_size;
    to->model.n_heads = from->model.n_heads;
    to->model.n_kv_heads = from->model.n_kv_heads;
    to->model.head_dim = from->model.head_dim;
    to->model.vocab_size = from->model.vocab_size;
    to->model.rope_theta = from->model.rope_theta;
    to->model.n_tensors = from->model.n_tensors;
    to->tokenizer.bos_added = from->tokenizer.bos_added;
    to->dataset.n_available_tokens = from->dataset.n_available_tokens;
    to->dataset.n_samples = from->dataset.n_samples;
    to->dataset.seq_len = from->dataset.seq_len;
    to->dataset.seed = from->dataset.seed;
    to->baseline_nll = from->baseline_nll;
    return KVQ_OK;
}

kvq_status kvq_refit(const kvq_context *ctx, const kvq_measurement *measurement, const kvq_fit_options *options,
                     kvq_artifact **out, kvq_error *err) {
    const kvq_artifact        *about = kvq_measurement_about(measurement);
    const kvq_measure_options *measured = kvq_measurement_options(measurement);
    kvq_artifact              *a = NULL;
    kvq_measured_layer        *layer = NULL;
    kvq_status                 status = KVQ_OK;
    KVQ_TRY(check_measured(measured, options, err));
    KVQ_TRY(kvq_fit_options_check(options, err));
    KVQ_TRY(kvq_artifact_create(ctx, about->model.n_layers, &a, err));
    KVQ_TRY(calib_copy_identity(ctx, about, a, err));
    KVQ_TRY(kvq_artifact_set_text(ctx, &a->quantizer.scheme, "nuq", err));
    kvq_artifact_describe_quantizer(a, measured, options);
    for (int64_t l = 0; l < about->model.n_layers; l++) {
        KVQ_TRY(kvq_measurement_read(ctx, measurement, l, &layer, err));
        KVQ_TRY(kvq_fit_layer(ctx, layer, measured, options, a, l, err));
        kvq_measured_layer_destroy(ctx, &layer);
        kvq_report_progress(ctx, "fit", l, l + 1, about->model.n_layers);
    }
    *out = a;
    a = NULL;
done:
    kvq_measured_layer_destroy(ctx, &layer);
    kvq_artifact_destroy(ctx, &a);
    return status;
}
