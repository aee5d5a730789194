// SPDX-License-Identifier: Apache-2.0
// One kernel for each thing that gates.py must find in compiled code. Its name says which.
#include <cuda_runtime.h>

__global__ void forbidden_sine(float *x) { x[threadIdx.x] = __sinf(x[threadIdx.x]); }

__global__ void forbidden_double(float *x, double by) { x[threadIdx.x] = (float)((double)x[threadIdx.x] * by); }

__global__ void forbidden_local_memory(float *x, const int *at) {
    float kept[64] = {0};
    for (int i = 0; i < 64; i++) kept[at[i] & 63] += x[i];
    x[threadIdx.x] = kept[at[threadIdx.x] & 63];
}

__global__ void forbidden_floating_atomic(float *x) { atomicAdd(x, x[threadIdx.x + 1]); }

__global__ void __launch_bounds__(1024) forbidden_spilled(float *x) {
    float a[96];
#pragma unroll
    for (int i = 0; i < 96; i++) a[i] = x[1024 * i + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; i++) x[1024 * i + threadIdx.x] = a[i] * a[95 - i] + a[(7 * i + 3) % 96];
}

__global__ void __launch_bounds__(256) forbidden_registers(float *x) {
    float a[160];
#pragma unroll
    for (int i = 0; i < 160; i++) a[i] = x[256 * i + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 160; i++) x[256 * i + threadIdx.x] = a[i] * a[159 - i] + a[(7 * i + 3) % 160];
}
