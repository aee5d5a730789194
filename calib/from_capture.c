// SPDX-License-Identifier: Apache-2.0
// A calibration without a model: the windows that somebody captured are shown to the same measurement.
#include <string.h>

#include "calib_impl.h"

typedef struct capture_fit {
    const kvq_context      *ctx;
    const kvq_capture      *capture;
    const kvq_capture_info *info;
    kvq_measure_options     measured;
    bool                    weighted; // squared gradients are needed
    kvq_artifact           *artifact;
    measure                *m;
    float                  *k, *v, *w_k, *w_v; // [S, d]
} capture_fit;

static kvq_status check_capture(const kvq_capture_info *info, const kvq_calib_options *options, kvq_error *err) {
    if (options->measure.k_domain == KVQ_KEYS_POST_ROPE) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "calibrate from the model itself",
                        "a capture holds keys before the rotary embedding, not after it");
    }
    for (int64_t l = 0; l < info->model.n_layers; l++) {
        if (kvq_capture_has_layer(info, l)) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, "capture all layers", "the capture lacks layer %lld of %lld", (long long)l,
                        (long long)info->model.n_layers);
    }
    if (!kvq_weighting_needs_gradients(options->fit.weighting) || info->has_fisher) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, "capture squared gradients too, or pass --weighting none",
                    "the capture holds no squared gradients, which the weighting '%s' needs",
                    kvq_weighting_names[options->fit.weighting]);
}

static kvq_model_config shape_of(const kvq_capture_info *info) {
    kvq_model_config c = {.n_layers = info->model.n_layers,
                          .n_heads = (int)info->model.n_heads,
                          .n_kv_heads = (int)info->model.n_kv_heads,
                          .head_dim = (int)info->model.head_dim,
                          .hidden_size = info->model.hidden_size,
                          .vocab_size = info->model.vocab_size};
    c.rope.theta = info->model.rope_theta;
    return c;
}

static kvq_status describe(capture_fit *f, const char *source_name, kvq_error *err) {
    kvq_artifact           *a = f->artifact;
    const kvq_capture_info *info = f->info;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(kvq_artifact_set_text(f->ctx, &a->model.architecture, info->model.architecture, err));
    KVQ_TRY(kvq_artifact_set_text(f->ctx, &a->model.name, info->model.name, err));
    KVQ_TRY(kvq_artifact_set_text(f->ctx, &a->model.rope_type, info->model.rope_type, err));
    KVQ_TRY(kvq_artifact_set_text(f->ctx, &a->model.dtype, info->model.dtype, err));
    KVQ_TRY(kvq_artifact_set_text(f->ctx, &a->tokenizer.kind, info->tokenizer.kind, err));
    KVQ_TRY(kvq_artifact_set_text(f->ctx, &a->dataset.source,
                                  info->dataset.source[0] != 0 ? info->dataset.source : source_name, err));
    a->model.n_tensors = info->model.n_tensors;
    strcpy(a->model.config_sha256, info->model.config_sha256);
    strcpy(a->model.weights_sha256, info->model.weights_sha256);
    strcpy(a->tokenizer.sha256, info->tokenizer.sha256);
    a->tokenizer.bos_added = info->tokenizer.bos_added;
    strcpy(a->dataset.source_sha256, info->dataset.source_sha256);
    a->dataset.n_available_tokens = info->dataset.n_available_tokens;
    a->dataset.n_samples = info->dataset.n_windows;
    a->dataset.seq_len = info->dataset.seq_len;
    a->dataset.seed = info->dataset.seed;
    a->baseline_nll = info->dataset.baseline_nll;
done:
    return status;
}

static kvq_status hash_ids(capture_fit *f, kvq_error *err) {
    int64_t    n = f->info->dataset.n_windows * f->info->dataset.seq_len;
    int32_t   *ids = NULL;
    kvq_status status = KVQ_OK;
    if (!f->info->has_ids) return KVQ_OK;
    KVQ_TRY(KVQ_NEW(f->ctx, n, "token ids", &ids, err));
    KVQ_TRY(kvq_capture_read_ids(f->capture, ids, err));
    KVQ_TRY(kvq_sha256_of(ids, (size_t)n * sizeof *ids, f->artifact->dataset.token_ids_sha256, err));
done:
    kvq_free(f->ctx, ids);
    return status;
}

static kvq_status fit_layer(capture_fit *f, int64_t l, kvq_error *err) {
    kvq_observer o = measure_observer(f->m);
    bool         weighted = f->weighted;
    int64_t      N = f->info->dataset.n_windows;
    kvq_blob     result = {0};
    kvq_status   status = KVQ_OK;
    KVQ_TRY(o.begin(o.user, KVQ_PASS_FORWARD, l, err));
    for (int64_t w = 0; w < N; w++) {
        kvq_seen seen = {.window = w, .k = f->k};
        KVQ_TRY(kvq_capture_read(f->capture, KVQ_CAPTURE_K, l, w, f->k, err));
        KVQ_TRY(o.window(o.user, KVQ_PASS_FORWARD, l, &seen, err));
    }
    KVQ_TRY(o.finish(o.user, KVQ_PASS_FORWARD, l, &result, err));
    KVQ_TRY(o.begin(o.user, KVQ_PASS_BACKWARD, l, err));
    for (int64_t w = 0; w < N; w++) {
        KVQ_TRY(kvq_capture_read(f->capture, KVQ_CAPTURE_K, l, w, f->k, err));
        KVQ_TRY(kvq_capture_read(f->capture, KVQ_CAPTURE_V, l, w, f->v, err));
        if (weighted) KVQ_TRY(kvq_capture_read(f->capture, KVQ_CAPTURE_FISHER_K, l, w, f->w_k, err));
        if (weighted) KVQ_TRY(kvq_capture_read(f->capture, KVQ_CAPTURE_FISHER_V, l, w, f->w_v, err));
        status = measure_count(f->m, l, f->k, f->v, weighted ? f->w_k : NULL, weighted ? f->w_v : NULL, err);
        if (status != KVQ_OK) kvq_error_prefix(err, "window %lld: ", (long long)w);
        if (status != KVQ_OK) goto done;
        if (kvq_stop_requested(f->ctx))
            KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL, "a fit from a capture is short and starts anew"));
        kvq_report_progress(f->ctx, "fit", l, l * N + w + 1, f->info->model.n_layers * N);
    }
    result.bytes = 0;
    KVQ_TRY(o.finish(o.user, KVQ_PASS_BACKWARD, l, &result, err));
done:
    kvq_blob_free(f->ctx, &result);
    return status;
}

kvq_status kvq_calibrate_capture(const kvq_context *ctx, const kvq_capture *capture, const char *source_name,
                                 const kvq_calib_options *options, kvq_artifact **out, kvq_error *err) {
    const kvq_capture_info *info = kvq_capture_describe(capture);
    kvq_model_config        shape = shape_of(info);
    int64_t                 d = info->model.n_kv_heads * info->model.head_dim, n = info->dataset.seq_len * d;
    capture_fit             f = {.ctx = ctx, .capture = capture, .info = info};
    kvq_status              status = KVQ_OK;
    KVQ_TRY(check_capture(info, options, err));
    f.measured = kvq_measure_for_fit(options);
    f.weighted = kvq_weightings_need_gradients(f.measured.weightings);
    KVQ_TRY(kvq_measure_options_check(&f.measured, &shape, info->dataset.seq_len, err));
    KVQ_TRY(kvq_fit_options_check(&options->fit, err));
    KVQ_TRY(calib_create_artifact(ctx, &shape, &f.measured, &options->fit, &f.artifact, err));
    KVQ_TRY(describe(&f, source_name, err));
    KVQ_TRY(hash_ids(&f, err));
    KVQ_TRY(measure_create(ctx, NULL, &f.measured,
                           measure_shape_of(&shape, info->dataset.seq_len, info->dataset.n_windows), &options->fit,
                           f.artifact, &f.m, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "K of a window", &f.k, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "V of a window", &f.v, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "weights of K", &f.w_k, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "weights of V", &f.w_v, err));
    for (int64_t l = 0; l < info->model.n_layers; l++) KVQ_TRY(fit_layer(&f, l, err));
    *out = f.artifact;
    f.artifact = NULL;
done:
    measure_destroy(ctx, &f.m);
    kvq_artifact_destroy(ctx, &f.artifact);
    float *host[] = {f.k, f.v, f.w_k, f.w_v};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) kvq_free(ctx, host[i]);
    return status;
}
