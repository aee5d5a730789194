// SPDX-License-Identifier: Apache-2.0
// The next layer is expanded by one thread in the background while the present one is used.
#include "model_impl.h"

static void *expand_in_background(void *argument) {
    layer_prefetch *p = argument;
    // Whoever asks for a layer that could not be had expands it again and gets the message.
    (void)kvq_layer_expand(p->model, &p->ctx, p->index, &p->layer, NULL);
    return NULL;
}

// What came, or NULL when that is another layer or none.
static kvq_layer *take(kvq_model *model, int64_t index) {
    layer_prefetch *p = &model->prefetch;
    if (!p->running) return NULL;
    (void)pthread_join(p->thread, NULL);
    p->running = false;
    if (p->index == index) return p->layer;
    kvq_layer_destroy(model, p->layer);
    return NULL;
}

void kvq_prefetch_drop(kvq_model *model) { (void)take(model, -1); }

void kvq_layer_prefetch(kvq_model *model, int64_t index) {
    layer_prefetch *p = &model->prefetch;
    if (index < 0 || index >= model->config->n_layers || model->layers[index] != NULL) return;
    if (p->running && p->index == index) return;
    kvq_prefetch_drop(model);
    *p = (layer_prefetch){.model = model, .ctx = *model->ctx, .index = index};
    p->ctx.n_threads = 1;
    p->ctx.log = NULL; // callbacks belong to the thread that calls the library
    p->ctx.progress = NULL;
    p->ctx.stop = NULL;
    p->running = pthread_create(&p->thread, NULL, expand_in_background, p) == 0;
}

kvq_status kvq_layer_load(kvq_model *model, int64_t index, kvq_layer **out, kvq_error *err) {
    kvq_layer *layer = model->layers[index];
    kvq_status status = KVQ_OK;
    if (layer == NULL) layer = take(model, index);
    if (layer == NULL) status = kvq_layer_expand(model, model->ctx, index, &layer, err);
    if (status != KVQ_OK) return status;
    if (model->resident) model->layers[index] = layer;
    *out = layer;
    return KVQ_OK;
}

void kvq_layer_release(kvq_model *model, kvq_layer **layer) {
    if (!model->resident) kvq_layer_destroy(model, *layer);
    *layer = NULL;
}
