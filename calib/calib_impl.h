// SPDX-License-Identifier: Apache-2.0
// Private to calib: scratch files for the hidden states between layers.
#ifndef KVQ_CALIB_IMPL_H
#define KVQ_CALIB_IMPL_H

#include "kvq_calib.h"

// One file per layer boundary plus one for the gradient, each [n_windows, window_floats] f32, on the disk of `folder`.
// The files have no names, and a folder that did not exist before is removed again at once: nothing can be left behind.
typedef struct kvq_scratch kvq_scratch;
#define KVQ_SCRATCH_GRADIENT (-1)

kvq_status kvq_scratch_create(const kvq_context *ctx, const char *folder, int64_t n_boundaries, int64_t window_floats,
                              kvq_scratch **out, kvq_error *err);
void       kvq_scratch_destroy(const kvq_context *ctx, kvq_scratch **scratch);
// boundary: 0 .. n_boundaries - 1 or KVQ_SCRATCH_GRADIENT
kvq_status kvq_scratch_write(kvq_scratch *scratch, int64_t boundary, int64_t window, const float *x, kvq_error *err);
kvq_status kvq_scratch_read(kvq_scratch *scratch, int64_t boundary, int64_t window, float *x, kvq_error *err);
void       kvq_scratch_drop(kvq_scratch *scratch, int64_t boundary); // frees the disk space of a boundary that is done

#endif
