// SPDX-License-Identifier: Apache-2.0
//
// Errors of an artifact's tensors on windows that its fit did not see: one pass in full precision, which layer_errors.c
// watches.
#include <math.h>

#include "layer_errors.h"

typedef struct run {
    const kvq_context      *ctx;
    const kvq_backend      *be;
    kvq_model              *model;
    const kvq_model_config *config;
    const kvq_windows      *windows;
    kvq_workspace          *ws;
    layer_errors           *errors;
    float                  *states; // [group, S, C]
    int64_t                 group, state_floats;
} run;

static kvq_status run_layer(run *r, int64_t l, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len, L = r->config->n_layers;
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_layer_load(r->model, l, &layer, err));
    KVQ_TRY(layer_errors_open(r->errors, l, err));
    for (int64_t i = 0; i < n; i++) {
        layer_errors_window(r->errors, first + i);
        status = kvq_layer_forward(r->model, layer, r->ws, S, r->states + i * r->state_floats, layer_errors_see,
                                   r->errors, err);
        if (status != KVQ_OK) {
            kvq_error_prefix(err, "window %lld: ", (long long)(first + i));
            goto done;
        }
        if (kvq_stop_requested(r->ctx)) {
            KVQ_TRY(kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL,
                             "errors on held-out windows are measured anew by the run that goes on"));
        }
        kvq_report_progress(r->ctx, "held-out", l, first * L + l * n + i + 1, L * r->windows->n_windows);
    }

done:
    layer_errors_close(r->errors);
    kvq_layer_release(r->model, &layer);
    return status;
}

static kvq_status run_group(run *r, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len;
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < n; i++) {
        float *x = r->states + i * r->state_floats;
        KVQ_TRY(kvq_model_embed(r->model, r->windows->ids + (first + i) * S, S, x, err));
    }
    for (int64_t l = 0; l < r->config->n_layers; l++) KVQ_TRY(run_layer(r, l, first, n, err));

done:
    return status;
}

int64_t kvq_heldout_bytes(const kvq_model *model, int64_t seq_len, int64_t n_windows) {
    const kvq_model_config *c = kvq_model_describe(model);
    int64_t                 state = seq_len * c->hidden_size;
    return (kvq_group_size(state, n_windows) * state + layer_errors_floats(c, seq_len) +
            kvq_workspace_floats(model, seq_len, false)) *
           (int64_t)sizeof(float);
}

kvq_status kvq_measure_heldout(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, kvq_artifact *artifact,
                               const kvq_windows *windows, kvq_error *err) {
    const kvq_model_config *config = kvq_model_describe(model);
    int64_t                 S = windows->seq_len, N = windows->n_windows;
    run                     r = {.ctx = ctx, .be = be, .model = model, .config = config, .windows = windows};
    kvq_status              status = KVQ_OK;
    if (windows->n_windows < 1 || windows->seq_len < 1) {
        return kvq_fail(err, KVQ_ERR_INPUT, "give a longer text", "%s: no token is left to measure errors on",
                        windows->source);
    }
    KVQ_TRY(kvq_artifact_matches(artifact, config, NULL, err));
    r.state_floats = S * config->hidden_size;
    r.group = kvq_group_size(r.state_floats, N);
    KVQ_TRY(be->alloc(be, r.group * r.state_floats, "hidden states", &r.states, err));
    KVQ_TRY(kvq_workspace_create(model, S, false, &r.ws, err));
    KVQ_TRY(layer_errors_create(ctx, be, model, artifact, r.ws, S, N, &r.errors, err));
    for (int64_t first = 0; first < windows->n_windows; first += r.group) {
        int64_t left = windows->n_windows - first;
        KVQ_TRY(run_group(&r, first, left < r.group ? left : r.group, err));
    }
    for (int64_t l = 0; l < config->n_layers; l++) {
        kvq_layer_errors errors = layer_errors_report(r.errors, l);
        artifact->layers[l].k.heldout = errors.k;
        artifact->layers[l].v.heldout = errors.v;
        artifact->layers[l].attention_error = errors.attention_error.value;
    }

done:
    layer_errors_destroy(ctx, &r.errors);
    kvq_workspace_destroy(model, &r.ws);
    be->release(be, r.states);
    return status;
}
