// SPDX-License-Identifier: Apache-2.0
// Private to decoder: errors of each layer's K, V and attention, beside a pass in full precision.
#ifndef KVQ_LAYER_ERRORS_H
#define KVQ_LAYER_ERRORS_H

#include "decoder_impl.h"

typedef struct layer_errors layer_errors;

// Borrows everything but its own memory. ws: the workspace of the pass.
kvq_status layer_errors_create(const kvq_context *ctx, const kvq_backend *be, const kvq_model *model,
                               const kvq_artifact *artifact, kvq_workspace *ws, int64_t seq_len, int64_t n_windows,
                               layer_errors **out, kvq_error *err);
void       layer_errors_destroy(const kvq_context *ctx, layer_errors **errors);
int64_t    layer_errors_floats(const kvq_model_config *config, int64_t seq_len);
// Around the windows of a layer; close may be called twice.
kvq_status layer_errors_open(layer_errors *e, int64_t layer, kvq_error *err);
void       layer_errors_close(layer_errors *e);
// A hook of kvq_layer_forward that looks at what the layer is about to attend to and leaves it as it is. `user` is a
// layer_errors, whose `window` was set by layer_errors_window.
kvq_status layer_errors_see(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err);
void       layer_errors_window(layer_errors *e, int64_t window);

kvq_layer_errors layer_errors_report(const layer_errors *e, int64_t layer);

#endif
