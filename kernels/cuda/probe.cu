// SPDX-License-Identifier: Apache-2.0
//
// Whether the kernels were compiled for a device. All of them are compiled for the same ones, so one kernel that does
// nothing answers for all. The emulator takes every kernel: this file is for nvcc alone.
#include "probe.h"

static __global__ void probe() {}

cudaError_t kvq_cuda_probe() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, probe);
}
