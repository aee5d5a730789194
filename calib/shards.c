// SPDX-License-Identifier: Apache-2.0
//
// One calibration as independent runs that meet only in files: what a shard saw is written with a template of the
// artifact; a merge adds up all shards by the same rules that processes and resumed runs use, and concludes.
#include <stdio.h>
#include <string.h>

#include "calib_impl.h"

static const char ARTIFACT_NAME[] = "artifact", LOSS_NAME[] = "loss";

static const char *layer_name(char name[64], kvq_pass pass, int64_t layer) {
    (void)snprintf(name, 64, "layers/%04lld/%s", (long long)layer, pass == KVQ_PASS_FORWARD ? "ends" : "histograms");
    return name;
}

static kvq_pass pass_of(kvq_round round) { return round == KVQ_ROUND_ENDS ? KVQ_PASS_FORWARD : KVQ_PASS_BACKWARD; }

// ---------------------------------------------------------------- bytes in partial files

static kvq_status put_bytes(kvq_partial_writer *writer, const char *name, const void *data, int64_t bytes,
                            kvq_error *err) {
    return kvq_partial_put(writer, name, KVQ_ARRAY_U8, 1, &bytes, data, err);
}

static kvq_status get_bytes(const kvq_context *ctx, const kvq_partial *partial, const char *name, kvq_blob *out,
                            kvq_error *err) {
    int64_t    bytes = 0;
    uint8_t   *at = NULL;
    kvq_status status = kvq_partial_dims(partial, name, KVQ_ARRAY_U8, 1, &bytes, err);
    out->bytes = 0;
    if (status == KVQ_OK) status = kvq_blob_extend(ctx, out, bytes, &at, err);
    return status == KVQ_OK ? kvq_partial_get(partial, name, KVQ_ARRAY_U8, 1, &bytes, at, err) : status;
}

static kvq_status put_artifact(const kvq_context *ctx, kvq_partial_writer *writer, const kvq_artifact *artifact,
                               kvq_error *err) {
    uint8_t   *data = NULL;
    size_t     bytes = 0;
    kvq_status status = kvq_artifact_pack(ctx, artifact, &data, &bytes, err);
    if (status == KVQ_OK) status = put_bytes(writer, ARTIFACT_NAME, data, (int64_t)bytes, err);
    kvq_free(ctx, data);
    return status;
}

static kvq_status get_artifact(const kvq_context *ctx, const kvq_partial *partial, kvq_artifact **out, kvq_error *err) {
    kvq_blob   blob = {0};
    kvq_status status = get_bytes(ctx, partial, ARTIFACT_NAME, &blob, err);
    if (status == KVQ_OK) status = kvq_artifact_unpack(ctx, blob.data, (size_t)blob.bytes, out, err);
    kvq_blob_free(ctx, &blob);
    return status;
}

// ---------------------------------------------------------------- one shard

static kvq_status fill_tensor(const kvq_context *ctx, int64_t d, bool q_norm, kvq_tensor_quant *t, kvq_error *err) {
    int64_t    n = (int64_t)t->n_groups * t->n_levels;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, n, "codebook", &t->codebook, err));
    for (int g = 0; g < t->n_groups && t->datatype != KVQ_NUQ; g++)
        KVQ_TRY(kvq_fixed_levels(t->datatype, t->bits, t->codebook + g * t->n_levels, err));
    if (q_norm) KVQ_TRY(KVQ_NEW(ctx, n, "levels that codes decode to", &t->decode_levels, err));
    if (t->axis != KVQ_AXIS_CHANNEL) goto done;
    KVQ_TRY(KVQ_NEW(ctx, d, "lower thresholds", &t->lower, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "upper thresholds", &t->upper, err));
done:
    return status;
}

// Thresholds between a measurement, which has them for one fraction here, and the artifact that travels.
typedef enum direction { INTO_ARTIFACT, FROM_ARTIFACT } direction;
static void copy_thresholds(measure *m, kvq_artifact *a, direction way) {
    int64_t d = a->model.n_kv_heads * a->model.head_dim;
    float  *of_measure = measure_thresholds(m);
    for (int64_t l = 0; l < a->model.n_layers && measure_thresholds_count(m) > 0; l++) {
        float *of_artifact[] = {a->layers[l].k.lower, a->layers[l].k.upper};
        for (int i = 0; i < 2; i++, of_measure += d) {
            size_t bytes = (size_t)d * sizeof *of_measure;
            memcpy(way == INTO_ARTIFACT ? of_artifact[i] : of_measure,
                   way == INTO_ARTIFACT ? of_measure : of_artifact[i], bytes);
        }
    }
}

// What only all shards together know is zero in a template, which keeps it a valid artifact.
static kvq_status fill_template(const kvq_context *ctx, measure *m, bool q_norm, kvq_artifact *a, kvq_error *err) {
    int64_t    d = a->model.n_kv_heads * a->model.head_dim;
    kvq_status status = KVQ_OK;
    for (int64_t l = 0; l < a->model.n_layers; l++) {
        KVQ_TRY(fill_tensor(ctx, d, q_norm, &a->layers[l].k, err));
        KVQ_TRY(fill_tensor(ctx, d, q_norm, &a->layers[l].v, err));
    }
    copy_thresholds(m, a, INTO_ARTIFACT);
done:
    return status;
}

// What the template does not say of the options.
typedef struct shard_count {
    const char *name;
    int64_t     high;
} shard_count;
enum { COUNT_LLOYD, COUNT_HALF, COUNT_RANGE, N_OPTION_COUNTS };
static const shard_count OPTION_COUNTS[N_OPTION_COUNTS] = {
    {"compare_lloyd", 1}, {"half_thresholds", 1}, {"token_range", KVQ_RANGE_PERCENTILES}};

static void count_options(const kvq_calib_options *options, kvq_count out[N_OPTION_COUNTS]) {
    const int64_t values[N_OPTION_COUNTS] = {options->fit.compare_lloyd, options->measure.half_thresholds,
                                             options->measure.token_range};
    for (int i = 0; i < N_OPTION_COUNTS; i++) {
        (void)snprintf(out[i].name, sizeof out[i].name, "%s", OPTION_COUNTS[i].name);
        out[i].value = values[i];
    }
}

static kvq_status read_options(const kvq_partial *partial, const kvq_artifact *a, kvq_calib_options *out,
                               kvq_error *err) {
    int64_t                 counts[N_OPTION_COUNTS];
    const kvq_tensor_quant *k = &a->layers[0].k, *v = &a->layers[0].v;
    for (int i = 0; i < N_OPTION_COUNTS; i++) {
        kvq_status status =
            kvq_partial_count(partial, OPTION_COUNTS[i].name, 0, OPTION_COUNTS[i].high, &counts[i], err);
        if (status != KVQ_OK) return status;
    }
    out->measure = (kvq_measure_options){.sink_tokens = a->quantizer.sink_tokens,
                                         .count_sinks = a->quantizer.sinks_counted,
                                         .k_axis = k->axis,
                                         .k_domain = k->domain,
                                         .threshold_scope = a->quantizer.threshold_scope,
                                         .half_thresholds = counts[COUNT_HALF] != 0,
                                         .k_slots = a->quantizer.n_side_k,
                                         .token_range = (kvq_token_range)counts[COUNT_RANGE]};
    out->fit = (kvq_fit_options){.outlier_fraction = a->quantizer.outlier_fraction,
                                 .k_bits = k->bits,
                                 .v_bits = v->bits,
                                 .k_datatype = k->datatype,
                                 .v_datatype = v->datatype,
                                 .weighting = a->quantizer.weighting,
                                 .per_head = k->n_groups > 1,
                                 .q_norm = k->decode_levels != NULL,
                                 .compare_lloyd = counts[COUNT_LLOYD] != 0,
                                 .recent_tokens = a->quantizer.recent_tokens};
    return KVQ_OK;
}

static kvq_status take_thresholds(const kvq_context *ctx, const char *path, const kvq_sweep_options *sweep,
                                  const kvq_artifact *mine, measure *m, kvq_error *err) {
    kvq_partial  *partial = NULL;
    kvq_artifact *merged = NULL;
    int64_t       n = 0, unused = 0;
    kvq_status    status = KVQ_OK;
    status = kvq_partial_open(ctx, path, &partial, err); // names the file itself
    if (status != KVQ_OK) return status;
    if (kvq_partial_count(partial, "merged_round", KVQ_ROUND_ENDS, KVQ_ROUND_ENDS, &unused, NULL) != KVQ_OK) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INPUT, "merge the first round's files of all shards with kvq-merge",
                         "holds no merged thresholds; it is what a shard wrote"));
    }
    const kvq_field *fields = kvq_partial_fields(partial, &n);
    KVQ_TRY(kvq_fields_compare(fields, n, sweep->fingerprint, sweep->n_fingerprint, err));
    KVQ_TRY(get_artifact(ctx, partial, &merged, err));
    bool same_shape =
        merged->model.n_layers == mine->model.n_layers && merged->model.n_kv_heads == mine->model.n_kv_heads &&
        merged->model.head_dim == mine->model.head_dim && merged->layers[0].k.axis == mine->layers[0].k.axis;
    if (!same_shape) {
        KVQ_TRY(kvq_fail(
            err, KVQ_ERR_MISMATCH, NULL, "%lld layers of %lld x %lld channels instead of %lld of %lld x %lld",
            (long long)merged->model.n_layers, (long long)merged->model.n_kv_heads, (long long)merged->model.head_dim,
            (long long)mine->model.n_layers, (long long)mine->model.n_kv_heads, (long long)mine->model.head_dim));
    }
    copy_thresholds(m, merged, FROM_ARTIFACT);
done:
    if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", path);
    kvq_artifact_destroy(ctx, &merged);
    kvq_partial_close(ctx, &partial);
    return status;
}

kvq_status kvq_calibrate_shard(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                               const kvq_windows *windows, const kvq_calib_options *options,
                               const kvq_sweep_options *sweep, const char *thresholds, kvq_artifact **out,
                               kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    kvq_artifact           *artifact = NULL;
    measure                *m = NULL;
    kvq_loss_sum            loss = {0};
    kvq_sweep_options       mine = *sweep;
    kvq_processes           alone = kvq_processes_single();
    kvq_status              status = KVQ_OK;
    mine.forward_only = thresholds == NULL;
    kvq_measure_options measured = kvq_measure_for_fit(options);
    KVQ_TRY(kvq_measure_options_check(&measured, c, windows->seq_len, err));
    KVQ_TRY(kvq_fit_options_check(&options->fit, err));
    KVQ_TRY(calib_create_artifact(ctx, c, &measured, &options->fit, &artifact, err));
    KVQ_TRY(calib_describe_windows(ctx, windows, artifact, err));
    KVQ_TRY(measure_create(ctx, be, &measured, measure_shape_of(c, windows->seq_len, windows->n_windows), NULL, NULL,
                           &m, err));
    measure_keep_raw(m);
    if (thresholds != NULL) KVQ_TRY(take_thresholds(ctx, thresholds, sweep, artifact, m, err));
    kvq_observer observer = measure_observer(m);
    KVQ_TRY(kvq_sweep(ctx, be, model, windows, &mine, &alone, &observer, &loss, err));
    KVQ_TRY(fill_template(ctx, m, options->fit.q_norm, artifact, err));
    *out = artifact;
    artifact = NULL;
done:
    measure_destroy(ctx, &m);
    kvq_artifact_destroy(ctx, &artifact);
    return status;
}

kvq_status kvq_shard_write(const kvq_context *ctx, const kvq_artifact *artifact, const kvq_calib_options *options,
                           const kvq_sweep_options *sweep, kvq_round round, const char *path, bool force,
                           kvq_error *err) {
    kvq_processes alone = kvq_processes_single();
    kvq_count counts[3 + N_OPTION_COUNTS] = {{"round", round}, {"shard", sweep->shard}, {"n_shards", sweep->n_shards}};
    kvq_partial_writer *writer = NULL;
    work_dir           *work = NULL;
    kvq_blob            blob = {0};
    char                name[64];
    kvq_status          status = KVQ_OK;
    KVQ_TRY(sweep_open_results(ctx, sweep, &alone, &work, err));
    count_options(options, counts + 3);
    KVQ_TRY(kvq_partial_create(ctx, path, force, sweep->fingerprint, sweep->n_fingerprint, counts, 3 + N_OPTION_COUNTS,
                               &writer, err));
    KVQ_TRY(put_artifact(ctx, writer, artifact, err));
    if (round == KVQ_ROUND_HISTOGRAMS) {
        KVQ_TRY(sweep_get_result(ctx, work, (step){STEP_LOSS, artifact->model.n_layers}, &blob, err));
        KVQ_TRY(put_bytes(writer, LOSS_NAME, blob.data, blob.bytes, err));
    }
    step_kind kind = round == KVQ_ROUND_ENDS ? STEP_FORWARD : STEP_BACKWARD;
    for (int64_t l = 0; l < artifact->model.n_layers; l++) {
        blob.bytes = 0;
        KVQ_TRY(sweep_get_result(ctx, work, (step){kind, l}, &blob, err));
        KVQ_TRY(put_bytes(writer, layer_name(name, pass_of(round), l), blob.data, blob.bytes, err));
    }
    KVQ_TRY(kvq_partial_commit(ctx, &writer, err));
done:
    kvq_partial_discard(ctx, &writer);
    work_close(ctx, &work, false);
    kvq_blob_free(ctx, &blob);
    return status;
}

// ---------------------------------------------------------------- merging

typedef struct merger {
    const kvq_context  *ctx;
    const char *const  *paths;
    int                 n;
    kvq_partial       **partials; // [n], in the order of paths
    bool               *seen;     // [n] by shard
    kvq_round           round;
    kvq_artifact       *artifact;
    kvq_calib_options   options;
    kvq_measure_options measured;
    measure            *m;
} merger;

static kvq_status open_shard(merger *g, int i, kvq_error *err) {
    int64_t    round = 0, shard = 0, n_shards = 0, n_first = 0, n_mine = 0;
    kvq_status status = KVQ_OK;
    status = kvq_partial_open(g->ctx, g->paths[i], &g->partials[i], err); // names the file itself
    if (status != KVQ_OK) return status;
    KVQ_TRY(kvq_partial_count(g->partials[i], "round", KVQ_ROUND_ENDS, KVQ_ROUND_HISTOGRAMS, &round, err));
    KVQ_TRY(kvq_partial_count(g->partials[i], "n_shards", 1, INT32_MAX, &n_shards, err));
    KVQ_TRY(kvq_partial_count(g->partials[i], "shard", 0, n_shards - 1, &shard, err));
    if (n_shards != g->n) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INPUT, "give the files of all shards, each once",
                         "shard %lld of %lld, but %d files are given", (long long)shard, (long long)n_shards, g->n));
    }
    if (g->seen[shard]) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INPUT, "give the files of all shards, each once",
                         "shard %lld of %lld is given twice", (long long)shard, (long long)n_shards));
    }
    g->seen[shard] = true;
    if (i == 0) g->round = (kvq_round)round;
    if (round != (int64_t)g->round) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_MISMATCH, NULL, "is of round %lld, the first file of round %d", (long long)round,
                         (int)g->round));
    }
    const kvq_field *first = kvq_partial_fields(g->partials[0], &n_first),
                    *mine = kvq_partial_fields(g->partials[i], &n_mine);
    const char *version = kvq_fields_find(mine, n_mine, "kvq");
    if (version != NULL && strcmp(version, KVQ_VERSION) != 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_VERSION, "merge with the version that wrote it",
                         "written by kvq %s, this is " KVQ_VERSION, version));
    }
    status = kvq_fields_compare(first, n_first, mine, n_mine, err);
    if (status != KVQ_OK) kvq_error_prefix(err, "does not belong to %s: ", g->paths[0]);
done:
    if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", g->paths[i]);
    return status;
}

// The template says all that a measurement needs to know.
static kvq_status prepare_merge(merger *g, kvq_error *err) {
    kvq_status status = get_artifact(g->ctx, g->partials[0], &g->artifact, err);
    if (status == KVQ_OK) status = read_options(g->partials[0], g->artifact, &g->options, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", g->paths[0]);
        return status;
    }
    g->measured = kvq_measure_for_fit(&g->options);
    status = measure_create(g->ctx, NULL, &g->measured, measure_shape_of_artifact(g->artifact), &g->options.fit,
                            g->artifact, &g->m, err);
    if (status == KVQ_OK && g->round == KVQ_ROUND_HISTOGRAMS) copy_thresholds(g->m, g->artifact, FROM_ARTIFACT);
    return status;
}

static kvq_status merge_layer(merger *g, int64_t l, kvq_error *err) {
    kvq_observer o = measure_observer(g->m);
    kvq_pass     pass = pass_of(g->round);
    kvq_blob     blob = {0}, result = {0};
    char         name[64];
    kvq_status   status = KVQ_OK;
    KVQ_TRY(o.begin(o.user, pass, l, err));
    for (int i = 0; i < g->n; i++) {
        status = get_bytes(g->ctx, g->partials[i], layer_name(name, pass, l), &blob, err);
        if (status == KVQ_OK) status = o.merge(o.user, pass, l, blob.data, blob.bytes, err);
        if (status != KVQ_OK) kvq_error_prefix(err, "%s: layer %lld: ", g->paths[i], (long long)l);
        if (status != KVQ_OK) goto done;
    }
    KVQ_TRY(o.finish(o.user, pass, l, &result, err));
    kvq_report_progress(g->ctx, "merge", l, l + 1, g->artifact->model.n_layers);
done:
    kvq_blob_free(g->ctx, &blob);
    kvq_blob_free(g->ctx, &result);
    return status;
}

static kvq_status merge_loss(merger *g, kvq_error *err) {
    kvq_loss_sum sum = {0}, part;
    kvq_blob     blob = {0};
    kvq_status   status = KVQ_OK;
    for (int i = 0; i < g->n; i++) {
        KVQ_TRY(get_bytes(g->ctx, g->partials[i], LOSS_NAME, &blob, err));
        blob_reader in = {blob.data, blob.bytes};
        KVQ_TRY(blob_take(&in, &part, sizeof part, err));
        kvq_fixed_merge(&sum.sum, part.sum);
        sum.n_tokens += part.n_tokens;
    }
    g->artifact->baseline_nll = calib_mean_loss(sum);
done:
    kvq_blob_free(g->ctx, &blob);
    return status;
}

static kvq_status write_thresholds(merger *g, const char *path, bool force, kvq_error *err) {
    kvq_count           count = {"merged_round", KVQ_ROUND_ENDS};
    kvq_partial_writer *writer = NULL;
    int64_t             n = 0;
    kvq_status          status = KVQ_OK;
    const kvq_field    *fields = kvq_partial_fields(g->partials[0], &n);
    copy_thresholds(g->m, g->artifact, INTO_ARTIFACT);
    KVQ_TRY(kvq_partial_create(g->ctx, path, force, fields, n, &count, 1, &writer, err));
    KVQ_TRY(put_artifact(g->ctx, writer, g->artifact, err));
    KVQ_TRY(kvq_partial_commit(g->ctx, &writer, err));
done:
    kvq_partial_discard(g->ctx, &writer);
    return status;
}

kvq_status kvq_merge(const kvq_context *ctx, const char *const *paths, int n_paths, const char *path, bool force,
                     kvq_round *round, char content_sha256[KVQ_SHA256_HEX], kvq_error *err) {
    merger     g = {.ctx = ctx, .paths = paths, .n = n_paths};
    kvq_status status = KVQ_OK;
    if (n_paths < 1) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "no shards are given");
    KVQ_TRY(KVQ_NEW(ctx, n_paths, "list of shards", &g.partials, err));
    KVQ_TRY(KVQ_NEW(ctx, n_paths, "list of shards", &g.seen, err));
    for (int i = 0; i < n_paths; i++) KVQ_TRY(open_shard(&g, i, err));
    KVQ_TRY(prepare_merge(&g, err));
    for (int64_t l = 0; l < g.artifact->model.n_layers; l++) KVQ_TRY(merge_layer(&g, l, err));
    *round = g.round;
    content_sha256[0] = 0;
    if (g.round == KVQ_ROUND_ENDS) {
        KVQ_TRY(write_thresholds(&g, path, force, err));
    } else {
        KVQ_TRY(merge_loss(&g, err));
        KVQ_TRY(kvq_artifact_write(ctx, g.artifact, path, force, content_sha256, err));
    }
done:
    measure_destroy(ctx, &g.m);
    kvq_artifact_destroy(ctx, &g.artifact);
    for (int i = 0; g.partials != NULL && i < n_paths; i++) kvq_partial_close(ctx, &g.partials[i]);
    kvq_free(ctx, g.partials);
    kvq_free(ctx, g.seen);
    return status;
}
