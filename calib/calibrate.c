// SPDX-License-Identifier: Apache-2.0
// A whole calibration: an empty artifact, a measurement that watches the sweeps, and a fit of each layer when it is
// complete.
#include <string.h>

#include "calib_impl.h"

kvq_status calib_create_artifact(const kvq_context *ctx, const kvq_model_config *c, const kvq_measure_options *measured,
                                 const kvq_fit_options *fit, kvq_artifact **out, kvq_error *err) {
    kvq_artifact *a = NULL;
    kvq_status    status = KVQ_OK;
    KVQ_TRY(kvq_artifact_create(ctx, c->n_layers, &a, err));
    a->model.n_layers = c->n_layers;
    a->model.hidden_size = c->hidden_size;
    a->model.n_heads = c->n_heads;
    a->model.n_kv_heads = c->n_kv_heads;
    a->model.head_dim = c->head_dim;
    a->model.vocab_size = c->vocab_size;
    a->model.rope_theta = c->rope.theta;
    if (fit != NULL) kvq_artifact_describe_quantizer(a, measured, fit);
    KVQ_TRY(kvq_artifact_set_text(ctx, &a->model.architecture, c->architecture, err));
    KVQ_TRY(kvq_artifact_set_text(ctx, &a->model.rope_type, kvq_rope_type_name(c->rope.type), err));
    KVQ_TRY(kvq_artifact_set_text(ctx, &a->quantizer.scheme, "nuq", err));
    *out = a;
    a = NULL;
done:
    kvq_artifact_destroy(ctx, &a);
    return status;
}

kvq_status calib_describe_windows(const kvq_context *ctx, const kvq_windows *w, kvq_artifact *a, kvq_error *err) {
    a->dataset.n_available_tokens = w->n_available;
    a->dataset.n_samples = w->n_windows;
    a->dataset.seq_len = w->seq_len;
    strcpy(a->dataset.source_sha256, w->source_sha256);
    strcpy(a->dataset.token_ids_sha256, w->ids_sha256);
    a->tokenizer.bos_added = w->bos_added;
    return kvq_artifact_set_text(ctx, &a->dataset.source, w->source, err);
}

double calib_mean_loss(kvq_loss_sum loss) {
    return loss.n_tokens > 0 ? kvq_fixed_to_double(loss.sum) / (double)loss.n_tokens : 0;
}

// The sweeps with a measurement that watches them, and with fit NULL nothing else.
static kvq_status sweep_and_fit(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                                const kvq_windows *windows, const kvq_measure_options *options,
                                const kvq_fit_options *fit, const kvq_sweep_options *sweep,
                                const kvq_processes *processes, kvq_artifact **out, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    kvq_artifact           *a = NULL;
    measure                *m = NULL;
    kvq_loss_sum            loss = {0};
    int64_t                 all = 0;
    kvq_status              status = kvq_measure_options_check(options, c, windows->seq_len, err);
    if (status == KVQ_OK && fit != NULL) status = kvq_fit_options_check(fit, err);
    if (status == KVQ_OK) status = calib_create_artifact(ctx, c, options, fit, &a, err);
    if (status == KVQ_OK) status = calib_describe_windows(ctx, windows, a, err);
    if (status == KVQ_OK) {
        status = measure_create(ctx, be, options, measure_shape_of(c, windows->seq_len, windows->n_windows), fit, a, &m,
                                err);
    }
    kvq_status agreed = processes->agree(processes, status == KVQ_OK, &all, status == KVQ_OK ? err : NULL);
    if (status == KVQ_OK) status = agreed;
    if (status == KVQ_OK && all == 0)
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "another process of this run could not start");
    if (status != KVQ_OK) goto done;
    kvq_observer observer = measure_observer(m);
    KVQ_TRY(kvq_sweep(ctx, be, model, windows, sweep, processes, &observer, &loss, err));
    a->baseline_nll = calib_mean_loss(loss);
    *out = a;
    a = NULL;
done:
    measure_destroy(ctx, &m);
    kvq_artifact_destroy(ctx, &a);
    return status;
}

kvq_status kvq_calibrate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                         const kvq_calib_options *options, const kvq_sweep_options *sweep,
                         const kvq_processes *processes, kvq_artifact **out, kvq_error *err) {
    kvq_measure_options measured = kvq_measure_for_fit(options);
    return sweep_and_fit(ctx, be, model, windows, &measured, &options->fit, sweep, processes, out, err);
}

kvq_status kvq_measure(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                       const kvq_measure_options *options, const kvq_sweep_options *sweep,
                       const kvq_processes *processes, kvq_artifact **about, kvq_error *err) {
    return sweep_and_fit(ctx, be, model, windows, options, NULL, sweep, processes, about, err);
}
