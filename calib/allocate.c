// SPDX-License-Identifier: Apache-2.0
//
// Artifacts of the channel-allocated format from measured layers, wherever these are: in the work directory that the
// sweeps left, or in a measurement file. Layers are read twice, for their error curves and for the fit, so that one at
// a time is in memory.
#include <string.h>

#include "calib_impl.h"

// ---------------------------------------------------------------- measured layers

struct kvq_measured_layers {
    const kvq_artifact        *about;
    const kvq_measure_options *measure;
    const kvq_measurement     *file; // or the results of sweeps:
    work_dir                  *work;
};

kvq_status kvq_measured_layers_open(const kvq_context *ctx, const kvq_artifact *about,
                                    const kvq_measure_options *options, const kvq_sweep_options *sweep,
                                    const kvq_processes *processes, kvq_measured_layers **out, kvq_error *err) {
    kvq_measured_layers *layers = NULL;
    kvq_status           status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "measured layers", &layers, err));
    layers->about = about;
    layers->measure = options;
    KVQ_TRY(sweep_open_results(ctx, sweep, processes, &layers->work, err));
    *out = layers;
    layers = NULL;
done:
    kvq_measured_layers_close(ctx, &layers);
    return status;
}

kvq_status kvq_measured_layers_of_file(const kvq_context *ctx, const kvq_measurement *file, kvq_measured_layers **out,
                                       kvq_error *err) {
    kvq_status status = KVQ_NEW(ctx, 1, "measured layers", out, err);
    if (status != KVQ_OK) return status;
    (*out)->about = kvq_measurement_about(file);
    (*out)->measure = kvq_measurement_options(file);
    (*out)->file = file;
    return KVQ_OK;
}

void kvq_measured_layers_close(const kvq_context *ctx, kvq_measured_layers **layers) {
    if (*layers == NULL) return;
    if ((*layers)->work != NULL) work_close(ctx, &(*layers)->work, false);
    kvq_free(ctx, *layers);
    *layers = NULL;
}

static kvq_status get_layer(const kvq_context *ctx, const kvq_measured_layers *from, int64_t layer,
                            kvq_measured_layer **out, kvq_error *err) {
    if (from->file != NULL) return kvq_measurement_read(ctx, from->file, layer, out, err);
    return calib_measured_layer(ctx, from->work, from->about, from->measure, layer, out, err);
}

// ---------------------------------------------------------------- allocation and fit

typedef struct allocating {
    const kvq_context         *ctx;
    const kvq_measured_layers *from;
    const kvq_alloc_options   *options;
    kvq_layer_curves          *curves; // [n_layers]
    kvq_artifact              *artifact;
} allocating;

// A layer as the options want it seen: what is not asked is not recorded either.
static kvq_status read_layer(const allocating *a, int64_t l, kvq_measured_layer **out, kvq_error *err) {
    kvq_status status = get_layer(a->ctx, a->from, l, out, err);
    if (status == KVQ_OK && a->options->gradients_only) (*out)->kl[0] = (*out)->kl[1] = 0;
    return status;
}

static kvq_status make_curves(allocating *a, kvq_error *err) {
    kvq_measured_layer *layer = NULL;
    int64_t             L = a->artifact->model.n_layers;
    kvq_status          status = KVQ_OK;
    for (int64_t l = 0; l < L; l++) {
        KVQ_TRY(read_layer(a, l, &layer, err));
        status = kvq_layer_curves_make(a->ctx, layer, a->from->measure, a->options, &a->curves[l], err);
        if (status != KVQ_OK) kvq_error_prefix(err, "layer %lld: ", (long long)l);
        if (status != KVQ_OK) goto done;
        a->artifact->layers[l].k.kl = layer->kl[0];
        a->artifact->layers[l].v.kl = layer->kl[1];
        kvq_measured_layer_destroy(a->ctx, &layer);
        kvq_report_progress(a->ctx, "curves", l, l + 1, L);
    }
done:
    kvq_measured_layer_destroy(a->ctx, &layer);
    return status;
}

static kvq_status fit_layers(allocating *a, const kvq_allocation *chosen, kvq_error *err) {
    kvq_measured_layer *layer = NULL;
    int64_t    L = a->artifact->model.n_layers, d = a->artifact->model.n_kv_heads * a->artifact->model.head_dim;
    kvq_status status = KVQ_OK;
    for (int64_t l = 0; l < L; l++) {
        KVQ_TRY(read_layer(a, l, &layer, err));
        KVQ_TRY(kvq_fit_allocated_layer(a->ctx, layer, a->from->measure, a->options, chosen->widths + l * d,
                                        chosen->rates[l], a->artifact, l, err));
        kvq_measured_layer_destroy(a->ctx, &layer);
        kvq_report_progress(a->ctx, "fit", l, l + 1, L);
    }
done:
    kvq_measured_layer_destroy(a->ctx, &layer);
    return status;
}

// What another artifact chose.
static kvq_status copy_allocation(const allocating *a, const kvq_artifact *like, kvq_allocation *out, kvq_error *err) {
    const kvq_artifact *to = a->artifact;
    int64_t             L = to->model.n_layers, d = to->model.n_kv_heads * to->model.head_dim;
    kvq_status          status = KVQ_OK;
    if (!kvq_artifact_is_allocated(like) || like->model.n_layers != L ||
        like->model.n_kv_heads != to->model.n_kv_heads || like->model.head_dim != to->model.head_dim ||
        like->layers[0].v.dim != a->options->v_dim) {
        return kvq_fail(err, KVQ_ERR_MISMATCH, "give an artifact of this model and --v-dim",
                        "the artifact whose widths are to be used is not channel-allocated, or of another shape");
    }
    a->artifact->quantizer.target_bits = 0; // the widths were given
    KVQ_TRY(KVQ_NEW(a->ctx, L * d, "widths of keys", &out->widths, err));
    KVQ_TRY(KVQ_NEW(a->ctx, L, "rates of values", &out->rates, err));
    for (int64_t l = 0; l < L; l++) {
        memcpy(out->widths + l * d, like->layers[l].k.widths, (size_t)d);
        out->rates[l] = (uint8_t)like->layers[l].v.bits;
        for (int64_t c = 0; c < d; c++) out->chosen.k_bits += (double)out->widths[l * d + c] / (double)(L * d);
        out->chosen.v_bits += (double)out->rates[l] / (double)(L * a->options->v_dim);
    }
done:
    return status;
}

kvq_status kvq_fit_allocated(const kvq_context *ctx, const kvq_measured_layers *layers,
                             const kvq_alloc_options *options, const kvq_artifact *like, kvq_artifact **out,
                             kvq_allocation *chosen, kvq_error *err) {
    const kvq_artifact *about = layers->about;
    kvq_allocation      allocation = {.widths = NULL};
    allocating          a = {.ctx = ctx, .from = layers, .options = options};
    kvq_status          status = KVQ_OK;
    if (!layers->measure->allocated) {
        return kvq_fail(err, KVQ_ERR_USAGE, "measure again with kvq-calibrate --measure-only --allocated",
                        "the measurement does not have what the channel-allocated format needs");
    }
    KVQ_TRY(kvq_alloc_options_check(options, (int)about->model.head_dim, err));
    KVQ_TRY(calib_check_fraction(layers->measure, options->outlier_fraction, err));
    KVQ_TRY(kvq_artifact_create(ctx, about->model.n_layers, &a.artifact, err));
    KVQ_TRY(calib_copy_identity(ctx, about, a.artifact, err));
    KVQ_TRY(kvq_artifact_describe_allocated(ctx, a.artifact, layers->measure, options, err));
    if (like != NULL) {
        KVQ_TRY(copy_allocation(&a, like, &allocation, err));
    } else {
        KVQ_TRY(KVQ_NEW(ctx, about->model.n_layers, "error curves", &a.curves, err));
        KVQ_TRY(make_curves(&a, err));
        KVQ_TRY(kvq_allocate(ctx, a.artifact, a.curves, options, &allocation, err));
    }
    KVQ_TRY(fit_layers(&a, &allocation, err));
    *out = a.artifact;
    a.artifact = NULL;
    if (chosen != NULL) {
        *chosen = allocation;
        allocation = (kvq_allocation){.widths = NULL};
    }
done:
    for (int64_t l = 0; a.curves != NULL && l < about->model.n_layers; l++) kvq_layer_curves_free(ctx, &a.curves[l]);
    kvq_free(ctx, a.curves);
    kvq_allocation_free(ctx, &allocation);
    kvq_artifact_destroy(ctx, &a.artifact);
    return status;
}

// ---------------------------------------------------------------- before a run

// An allocation of layers without any error has the same budget, and the same least that it must spend.
kvq_status kvq_fit_allocated_check(const kvq_context *ctx, const kvq_model_config *config,
                                   const kvq_measure_options *measured, const kvq_alloc_options *options,
                                   kvq_error *err) {
    kvq_artifact     *shape = NULL;
    kvq_layer_curves *curves = NULL;
    double           *zeros = NULL;
    kvq_allocation    allocation = {.widths = NULL};
    int64_t           L = config->n_layers, d = (int64_t)config->n_kv_heads * config->head_dim;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(calib_create_artifact(ctx, config, measured, NULL, &shape, err));
    KVQ_TRY(kvq_artifact_describe_allocated(ctx, shape, measured, options, err));
    KVQ_TRY(KVQ_NEW(ctx, L, "error curves", &curves, err));
    KVQ_TRY(KVQ_NEW(ctx, d * (KVQ_MAX_KEY_WIDTH + 1), "error curves", &zeros, err));
    for (int64_t l = 0; l < L; l++) curves[l].k = zeros;
    KVQ_TRY(kvq_allocate(ctx, shape, curves, options, &allocation, err));
done:
    kvq_allocation_free(ctx, &allocation);
    kvq_free(ctx, zeros);
    kvq_free(ctx, curves);
    kvq_artifact_destroy(ctx, &shape);
    return status;
}
