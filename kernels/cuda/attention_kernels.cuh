// SPDX-License-Identifier: Apache-2.0
// Between the kernels (attention.cu) and the host function that checks and describes a call (attention_launch.cu).
#ifndef KVQ_ATTENTION_KERNELS_CUH
#define KVQ_ATTENTION_KERNELS_CUH

#include "attention.cuh"

enum { ATTEND_MAX_HEADS = 8 }; // query heads of a block

// parts: the workspace; q, out as in kvq_cuda_attention_call.
void attention_launch(const Call &c, bool tiled, int n_seqs, const float *q, float *parts, float *out,
                      kvq_stream stream);

#endif
