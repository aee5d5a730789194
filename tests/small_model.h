// SPDX-License-Identifier: Apache-2.0
// Private to the suites that need a small random model in their own rigs: written, opened, closed.
#ifndef SMALL_MODEL_H
#define SMALL_MODEL_H

#include <stdio.h>

#include "kvq_make_model.h"
#include "kvq_model.h"
#include "kvq_test.h"

static inline void small_model_open(const kvq_context *ctx, const kvq_make_options *options, bool resident,
                                    kvq_backend **be, kvq_checkpoint **checkpoint, kvq_model **model) {
    kvq_error err = {0};
    char      path[256];
    (void)snprintf(path, sizeof path, "%s/model", kvq_test_folder());
    kvq_make_model_hf(options, path);
    kvq_test_ok(kvq_backend_cpu(ctx, KVQ_COMPUTE_F32, be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(ctx, path, checkpoint, &err), &err);
    kvq_test_ok(kvq_model_create(ctx, *be, *checkpoint, resident, model, &err), &err);
}

static inline void small_model_close(const kvq_context *ctx, kvq_backend **be, kvq_checkpoint **checkpoint,
                                     kvq_model **model) {
    kvq_model_destroy(ctx, model);
    kvq_checkpoint_close(ctx, checkpoint);
    (*be)->destroy(be);
}

#endif
