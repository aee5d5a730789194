// SPDX-License-Identifier: Apache-2.0
//
// The words in which device code is written, so that one text is compiled by nvcc for a GPU and by a C++ compiler for
// the emulator of the tests (tests/simt/README.md), which runs it without a GPU and checks every access. Beside these
// words a kernel uses CUDA's own names for threads, barriers, shuffles, votes, integer atomics, vector types and
// halves, and the instructions of device_ptx.cuh.
//
//     KVQ_KERNEL KVQ_BOUNDS(256) scale(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(float) y, int n) {
//         KVQ_SHARED(float, part, 256);
//         ...
//     }
//     KVQ_LAUNCH(scale, grid, 256, 0, stream, x, y, n); // x, y: plain pointers
//
// Elements are p[i]: there is no *p, no p->member, no auto v = p[i]. A function on shared memory takes
// KVQ_SHARED_PTR(T), one on either kind a template parameter.
#ifndef KVQ_DEVICE_CUH
#define KVQ_DEVICE_CUH

#ifndef __CUDACC__
#include "simt.h" // of tests/simt; only tests give that path
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kvq_hd.h"

#define KVQ_KERNEL             static __global__ void
#define KVQ_BOUNDS(n_threads)  __launch_bounds__(n_threads)
#define KVQ_DEVICE             static __device__ __forceinline__
#define KVQ_UNROLL             _Pragma("unroll")

// Buffers that are the only way to their elements while the kernel runs, and others.
#define KVQ_GLOBAL(T)          T *__restrict__
#define KVQ_GLOBAL_ALIASED(T)  T *

// Shared memory: variables of a fixed size, one of a size given at the launch, and pointers to them.
#define KVQ_SHARED_PTR(T)      T *
#define KVQ_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define KVQ_DYNAMIC_SHARED(T, name)                                                                                    \
    extern __shared__ __align__(16) unsigned char kvq_dynamic_shared[];                                                \
    T *const                                      name = reinterpret_cast<T *>(kvq_dynamic_shared)

// A kernel that is an instance of a template is put in parentheses when it has a comma.
#define KVQ_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...)                                                    \
    kernel<<<grid, block, dynamic_bytes, stream>>>(__VA_ARGS__)

// Must be asked before a launch with more than 48 KiB of dynamic shared memory. False: the device has not as much.
#define KVQ_ALLOW_SHARED(kernel, bytes)                                                                                \
    (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)) == cudaSuccess)

typedef cudaStream_t kvq_stream;

// What was wrong with the last launch, or NULL.
static inline const char *kvq_launch_error() {
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

// The same bytes as another type: kvq_as<uint4>(codes)[i].
template <typename T, typename U> KVQ_DEVICE T       *kvq_as(U *p) { return reinterpret_cast<T *>(p); }
template <typename T, typename U> KVQ_DEVICE const T *kvq_as(const U *p) { return reinterpret_cast<const T *>(p); }

// A plain pointer to n elements, for the functions of *_hd.h. Counts as one read (const) or write of all of them.
template <typename T> KVQ_DEVICE T *kvq_raw(T *p, ptrdiff_t n) {
    (void)n;
    return p;
}

#include "device_ptx.cuh"

#endif
#endif
