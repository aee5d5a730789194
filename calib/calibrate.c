// SPDX-License-Identifier: Apache-2.0
// A whole calibration: an empty artifact, a measurement that watches the sweeps and fills it.
#include <string.h>

#include "calib_impl.h"

static void describe_tensor(kvq_tensor_quant *t, int bits, kvq_axis axis) {
    t->bits = bits;
    t->axis = axis;
    t->n_groups = t->dim = 1;
    t->n_levels = 1 << bits;
}

kvq_status calib_create_artifact(const kvq_context *ctx, const kvq_model_config *c, const kvq_calib_options *options,
                                 kvq_artifact **out, kvq_error *err) {
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
    a->quantizer.outlier_fraction = options->outlier_fraction;
    a->quantizer.n_side_k = a->quantizer.n_side_v =
        kvq_block_n_side(options->outlier_fraction, c->n_kv_heads * c->head_dim);
    a->quantizer.sink_tokens = options->sink_tokens;
    a->quantizer.weighting = options->weighting;
    for (int64_t l = 0; l < c->n_layers; l++) {
        describe_tensor(&a->layers[l].k, options->k_bits, KVQ_AXIS_CHANNEL);
        describe_tensor(&a->layers[l].v, options->v_bits, KVQ_AXIS_TOKEN);
    }
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

kvq_status kvq_calibrate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                         const kvq_calib_options *options, const kvq_sweep_options *sweep,
                         const kvq_processes *processes, kvq_artifact **out, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    kvq_artifact           *artifact = NULL;
    measure                *m = NULL;
    kvq_loss_sum            loss = {0};
    int64_t                 all = 0;
    kvq_status              status = kvq_calib_options_check(options, c, windows->seq_len, err);
    if (status == KVQ_OK) status = calib_create_artifact(ctx, c, options, &artifact, err);
    if (status == KVQ_OK) status = calib_describe_windows(ctx, windows, artifact, err);
    if (status == KVQ_OK) {
        status = measure_create(ctx, options, c->n_kv_heads * c->head_dim, windows->seq_len, windows->n_windows,
                                artifact, &m, err);
    }
    kvq_status agreed = processes->agree(processes, status == KVQ_OK, &all, status == KVQ_OK ? err : NULL);
    if (status == KVQ_OK) status = agreed;
    if (status == KVQ_OK && all == 0)
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "another process of this run could not start");
    if (status != KVQ_OK) goto done;
    kvq_observer observer = measure_observer(m);
    KVQ_TRY(kvq_sweep(ctx, be, model, windows, sweep, processes, &observer, &loss, err));
    artifact->baseline_nll = calib_mean_loss(loss);
    *out = artifact;
    artifact = NULL;
done:
    measure_destroy(ctx, &m);
    kvq_artifact_destroy(ctx, &artifact);
    return status;
}
