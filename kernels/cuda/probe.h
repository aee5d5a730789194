// SPDX-License-Identifier: Apache-2.0
#ifndef KVQ_CUDA_PROBE_H
#define KVQ_CUDA_PROBE_H

#include <cuda_runtime_api.h>

// What the current device answers when it is asked for a kernel; cudaSuccess when it can run them.
cudaError_t kvq_cuda_probe();

#endif
