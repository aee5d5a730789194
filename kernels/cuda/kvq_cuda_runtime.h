// SPDX-License-Identifier: Apache-2.0
//
// What the backend asks of a device beside its own kernels: memory, streams, events, copies, products. runtime.cpp asks
// the CUDA runtime and cuBLAS for it; tests/simt/simt_runtime.cpp gives it on the emulated device. So the backend is
// plain C, and what is tested without a GPU is what runs on one.
//
// Functions may be called from any thread. What is asked for on a stream happens in order, some time after the call has
// returned; a failure is told by the call, or by a later one that waits. Devices, streams and events of different
// devices do not mix.
#ifndef KVQ_CUDA_RUNTIME_H
#define KVQ_CUDA_RUNTIME_H

#include "kvq_core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvq_cuda_device kvq_cuda_device;

typedef struct kvq_cuda_about {
    char    name[128];           // "NVIDIA H200"
    char    library[64];         // of products, with its version: "cublas 13.2"
    int     index, major, minor; // compute capability major.minor
    int64_t memory_bytes, free_bytes;    // in all, and free when it was opened
} kvq_cuda_about;

// Device `index`. KVQ_ERR_UNSUPPORTED: there is no driver, no such device, or one that the kernels were not compiled
// for; the message says which and the hint what to do about it.
kvq_status            kvq_cuda_open(const kvq_context *ctx, int index, kvq_cuda_device **out, kvq_error *err);
void                  kvq_cuda_close(const kvq_context *ctx, kvq_cuda_device **device); // *device may be NULL
const kvq_cuda_about *kvq_cuda_describe(const kvq_cuda_device *device);

// ---------------------------------------------------------------- memory

// Device memory, aligned to 256 bytes, of undefined content. KVQ_ERR_MEMORY, naming `what` and the bytes that are free.
kvq_status kvq_cuda_alloc(kvq_cuda_device *device, size_t bytes, const char *what, void **out, kvq_error *err);
// Waits until nothing uses it any more. p may be NULL.
void kvq_cuda_free(kvq_cuda_device *device, void *p);
// Host memory that a device reads and writes by itself.
kvq_status kvq_cuda_alloc_pinned(kvq_cuda_device *device, size_t bytes, void **out, kvq_error *err);
void       kvq_cuda_free_pinned(kvq_cuda_device *device, void *p);

// ---------------------------------------------------------------- order

// A stream is a cudaStream_t, an event a cudaEvent_t. To destroy NULL does nothing; a stream is waited for.
kvq_status kvq_cuda_stream_create(kvq_cuda_device *device, void **stream, kvq_error *err);
void       kvq_cuda_stream_destroy(kvq_cuda_device *device, void *stream);
kvq_status kvq_cuda_event_create(kvq_cuda_device *device, void **event, kvq_error *err);
void       kvq_cuda_event_destroy(kvq_cuda_device *device, void *event);
// The event stands for all that was asked for on the stream so far. One that was never recorded has happened.
kvq_status kvq_cuda_record(kvq_cuda_device *device, void *event, void *stream, kvq_error *err);
kvq_status kvq_cuda_await(kvq_cuda_device *device, void *event, kvq_error *err);                // the caller waits
kvq_status kvq_cuda_follow(kvq_cuda_device *device, void *stream, void *event, kvq_error *err); // the stream waits
// The caller waits for all of a stream; KVQ_ERR_INTERNAL says what a kernel has done wrong.
kvq_status kvq_cuda_finish(kvq_cuda_device *device, void *stream, kvq_error *err);

// ---------------------------------------------------------------- work

// Host memory must be pinned, and stay as it is until the copy has happened.
typedef enum kvq_cuda_way { KVQ_CUDA_TO_DEVICE, KVQ_CUDA_TO_HOST, KVQ_CUDA_ON_DEVICE } kvq_cuda_way;
kvq_status kvq_cuda_copy(kvq_cuda_device *device, kvq_cuda_way way, void *to, const void *from, size_t bytes,
                         void *stream, kvq_error *err);
kvq_status kvq_cuda_clear(kvq_cuda_device *device, void *to, size_t bytes, void *stream, kvq_error *err);

// y [m, n] = x [m, k] W + (accumulate ? y : 0), all row-major, in device memory. Products of f32 in f32, of bf16 in f32
// as well; the same bits on every run of one device and library.
typedef struct kvq_cuda_product {
    int64_t     m, n, k;
    const void *x, *w;
    float      *y;
    bool        bf16;       // the type of x and w
    bool        transposed; // w is [n, k], otherwise [k, n]
    bool        accumulate;
} kvq_cuda_product;
kvq_status kvq_cuda_multiply(kvq_cuda_device *device, const kvq_cuda_product *product, void *stream, kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
