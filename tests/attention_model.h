// SPDX-License-Identifier: Apache-2.0
//
// stories15M token by token with its attention over packed caches: the loop of an engine, in which test_cuda_decode.cpp
// chooses who attends. In C, as the rig of the packed cache is.
#ifndef ATTENTION_MODEL_H
#define ATTENTION_MODEL_H

#include "attention_rig.h"

#ifdef __cplusplus
extern "C" {
#endif

// One token's attention in one layer, the token being the last of the sequence. Keys were stored before RoPE; pair i
// turns by position * frequency[i]. q, out [n_heads, head_dim]
typedef struct attention_step {
    const attention_rig      *rig;
    const attention_sequence *sequence;
    const double             *frequency;
    int                       layer; // all of a token, in order
    int                       n_heads;
    float                     scale;
    const float              *q;
    const float              *k, *v; // [d] of the token, k before RoPE: what was appended to the CPU's cache
} attention_step;
typedef void (*attention_attend)(void *user, const attention_step *step, float *out);

// Mean negative log-likelihood, in nats, of tokens 1 .. n - 1 of a text behind those before them. Ranges of channels
// are those of the text itself. attend NULL: full precision, no packed cache.
double attention_model_nll(bool tiled, int64_t n, attention_attend attend, void *user);
// Attends as the CPU does: decodes the cache, rotates its keys, and calls the backend.
void attention_on_cpu(void *user, const attention_step *step, float *out);

#ifdef __cplusplus
}
#endif
#endif
