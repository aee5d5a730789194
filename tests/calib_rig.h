// SPDX-License-Identifier: Apache-2.0
//
// A checkpoint's model on the CPU and a folder for its boundaries: what the suites that calibrate start from.
#ifndef KVQ_CALIB_RIG_H
#define KVQ_CALIB_RIG_H

#include <stdio.h>

#include "kvq_calib.h"
#include "kvq_test.h"

typedef struct rig {
    kvq_context     ctx;
    kvq_backend    *be;
    kvq_checkpoint *checkpoint;
    kvq_model      *model;
    char            work_dir[256];
} rig;

static inline void rig_open(rig *r, const char *path, int n_threads) {
    kvq_error err = {0};
    r->ctx = kvq_test_context();
    r->ctx.n_threads = n_threads;
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(&r->ctx, path, &r->checkpoint, &err), &err);
    kvq_test_ok(kvq_model_create(&r->ctx, r->be, r->checkpoint, false, &r->model, &err), &err);
    (void)snprintf(r->work_dir, sizeof r->work_dir, "%s/work", kvq_test_folder());
}

static inline void rig_close(rig *r) {
    kvq_model_destroy(&r->ctx, &r->model);
    kvq_checkpoint_close(&r->ctx, &r->checkpoint);
    r->be->destroy(&r->be);
}

#endif
