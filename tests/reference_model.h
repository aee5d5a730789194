// SPDX-License-Identifier: Apache-2.0
//
// A second, independent transformer for the tests: plain loops in f64, default RoPE only, slow on purpose. It shares
// nothing with model/ but the checkpoint reader, and so can contradict it.
#ifndef KVQ_REFERENCE_MODEL_H
#define KVQ_REFERENCE_MODEL_H

#include "kvq_io.h"

typedef struct reference_model reference_model;

// An element of pre-RoPE K or V that is moved by `delta`, for difference quotients.
typedef struct reference_nudge {
    int64_t layer, position, channel;
    bool    is_v;
    double  delta;
} reference_nudge;

reference_model *reference_model_open(const kvq_checkpoint *checkpoint);
void             reference_model_close(reference_model *model);

// Mean next-token loss of one window. Optional outputs (NULL = not wanted): logits [S, V], k and v [L, S, d].
double reference_model_loss(reference_model *model, const int32_t *ids, int64_t n_tokens, const reference_nudge *nudge,
                            double *logits, double *k, double *v);

#endif
