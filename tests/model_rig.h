// SPDX-License-Identifier: Apache-2.0
//
// Private to the tests of model/: small generated models, one for every feature, and everything that is needed to run a
// window through one.
#ifndef KVQ_MODEL_RIG_H
#define KVQ_MODEL_RIG_H

#include "kvq_model.h"
#include "kvq_test.h"

// What a generated model is there for: biases; windows; q, k and v biases without one of o; head norms; fused tensors
// and partial rotation; soft caps, norms behind, scaled embeddings and windows in turn; two rotary bases; experts with
// and without normalised weights.
enum {
    TINY_LLAMA,
    TINY_BIASES,
    TINY_MISTRAL,
    TINY_QWEN2,
    TINY_QWEN3,
    TINY_PHI3,
    TINY_GEMMA2,
    TINY_GEMMA3,
    TINY_MIXTRAL,
    TINY_QWEN3_MOE,
    N_TINY
};
#define TINY_S 9 // tokens of a window: more than the sliding windows
void make_tiny(char *path, size_t size, int which);
void random_ids(int32_t *ids, int n, int64_t vocab);

// Everything one checkpoint needs to run a window, on the CPU or, where a suite is compiled for it, on another device.
// KVQ_RIG_SLOW: an emulated one, for which thousands of tokens take minutes.
#ifndef KVQ_RIG_DEVICE
#define KVQ_RIG_DEVICE "cpu"
#define KVQ_RIG_SLOW   0
#endif
typedef struct rig {
    kvq_context             ctx;
    kvq_backend            *be;
    kvq_checkpoint         *checkpoint;
    const kvq_model_config *c;
    kvq_model              *model;
    kvq_workspace          *ws;
    kvq_head               *head;
    int64_t                 S, C, d;
    const int32_t          *ids;
    float                  *states; // backend memory [L + 1, S, C]: layer inputs and the final state
    float                  *k, *v;  // host memory [L, S, d]
    float                  *dk, *dv;
} rig;

bool rig_has_device(char *why, size_t size); // and if not, why
void rig_open(rig *r, const char *path, const int32_t *ids, int64_t S, int n_threads);
void rig_close(rig *r);
void rig_forward(rig *r); // fills states, k, v
// Returns the mean loss; leaves the gradients of every layer's K and V in dk, dv.
double rig_backward(rig *r);
float *rig_logits(rig *r, int64_t first); // of the rows from `first` on, for the caller to free
// x [n] of the backend in new host memory, and the other way round.
float *rig_host(const rig *r, const float *x, int64_t n);
float *rig_backend(const rig *r, const float *host_x, int64_t n);

#endif
