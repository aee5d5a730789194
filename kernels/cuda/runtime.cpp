// SPDX-License-Identifier: Apache-2.0
//
// The device of kvq_cuda_runtime.h on the CUDA runtime and cuBLAS. There is no kernel in it, so that any C++ compiler
// takes it. It uses no C++ library either: programs stay C.
#include <climits>
#include <cstdio>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#include "kvq_cuda_runtime.h"
#include "probe.h"

// Compute capabilities that the build asked for, as CMake lists them.
#ifndef KVQ_CUDA_ARCHITECTURES
#define KVQ_CUDA_ARCHITECTURES "unknown"
#endif

// What NVIDIA recommends for the newest devices. Always the same one: cuBLAS chooses its kernels by it, and so the
// bits.
static const size_t WORKSPACE_BYTES = (size_t)32 << 20;
static const int    MIN_MAJOR = 8; // asynchronous copies and bf16

struct kvq_cuda_device {
    kvq_cuda_about  about;
    cublasHandle_t  products;
    void           *workspace;
    cudaEvent_t     product_done; // of the last product, which has the workspace until then
    pthread_mutex_t lock;         // of these three
};

// ---------------------------------------------------------------- failures

// What a person can do about a failure, NULL when there is nothing better than to report it.
static const char *advice(cudaError_t code) {
    switch (code) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchFailure:
        return "please report it; with CUDA_LAUNCH_BLOCKING=1 in the environment the message names the operation";
    case cudaErrorLaunchTimeout:
        return "take a device that drives no display: there the driver ends kernels that take long";
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
        return "the device is damaged or was reset: look at nvidia-smi and the kernel's log (Xid), or take another one";
    default:
        return NULL;
    }
}

// Forwards what the CUDA runtime says. The runtime also remembers it for whoever asks next, who would then blame the
// next launch: forgotten here. What a device does not recover from comes back all the same.
static kvq_status told(int index, cudaError_t code, const char *what, kvq_error *err) {
    if (code == cudaSuccess) return KVQ_OK;
    (void)cudaGetLastError();
    return kvq_fail(err, KVQ_ERR_INTERNAL, advice(code), "cuda:%d, %s: %s (%s)", index, what, cudaGetErrorString(code),
                    cudaGetErrorName(code));
}

// Asks the device for something. Which device is current belongs to a thread, and any thread may call.
template <typename Call>
static kvq_status ask(const kvq_cuda_device *device, const char *what, kvq_error *err, Call call) {
    int         index = device->about.index;
    cudaError_t code = cudaSetDevice(index);
    return told(index, code == cudaSuccess ? call() : code, what, err);
}

// The same where nobody can be told. A failure that lasts is told by whoever waits next.
template <typename Call> static void ask_quietly(const kvq_cuda_device *device, Call call) {
    if (cudaSetDevice(device->about.index) != cudaSuccess || call() != cudaSuccess) (void)cudaGetLastError();
}

// Forwards what cuBLAS says. Behind its codes there may be a failure of the device, which says more.
static kvq_status told_by_library(int index, cublasStatus_t code, const char *what, kvq_error *err) {
    if (code == CUBLAS_STATUS_SUCCESS) return KVQ_OK;
    cudaError_t behind = cudaGetLastError();
    if (code == CUBLAS_STATUS_ALLOC_FAILED || behind == cudaErrorMemoryAllocation)
        return kvq_fail(err, KVQ_ERR_MEMORY, "end other programs that use the device, or take another one",
                        "cuda:%d, %s: cuBLAS could not allocate memory", index, what);
    return kvq_fail(err, KVQ_ERR_INTERNAL, advice(behind), "cuda:%d, %s: %s%s%s", index, what,
                    cublasGetStatusString(code), behind == cudaSuccess ? "" : ", ",
                    behind == cudaSuccess ? "" : cudaGetErrorString(behind));
}

// ---------------------------------------------------------------- a device, or why there is none

static int major_of(int version) { return version / 1000; }
static int minor_of(int version) { return version % 1000 / 10; }

// No device at all.
static kvq_status refuse_driver(cudaError_t code, kvq_error *err) {
    int driver = 0;
    if (code == cudaErrorNoDevice)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                        "look at nvidia-smi and at CUDA_VISIBLE_DEVICES in the environment, or take --device cpu",
                        "the driver finds no CUDA device");
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "install NVIDIA's driver (nvidia-smi shows it), or take --device cpu",
                        "there is no NVIDIA driver for CUDA");
    if (code == cudaErrorInsufficientDriver)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                        "update NVIDIA's driver, build kvq with an older CUDA Toolkit, or take --device cpu",
                        "the driver is for CUDA %d.%d, but kvq was built with %d.%d", major_of(driver),
                        minor_of(driver), major_of(CUDART_VERSION), minor_of(CUDART_VERSION));
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "see whether nvidia-smi works, or take --device cpu", "%s (%s)",
                    cudaGetErrorString(code), cudaGetErrorName(code));
}

static kvq_status refuse_index(int count, kvq_error *err) {
    if (count == 1)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "take cuda:0, or look at CUDA_VISIBLE_DEVICES in the environment",
                        "there is one CUDA device");
    char next[96];
    (void)snprintf(next, sizeof next, "take cuda:0 to cuda:%d, or look at CUDA_VISIBLE_DEVICES in the environment",
                   count - 1);
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, next, "there are %d CUDA devices", count);
}

// Its name, and whether kernels could be compiled for it.
static kvq_status look_at(int index, kvq_cuda_about *about, kvq_error *err) {
    int         count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count == 0) code = cudaErrorNoDevice;
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return refuse_driver(code, err);
    }
    if (index < 0 || index >= count) return refuse_index(count, err);
    cudaDeviceProp found;
    kvq_status     status = told(index, cudaGetDeviceProperties(&found, index), "its properties", err);
    if (status != KVQ_OK) return status;
    (void)snprintf(about->name, sizeof about->name, "%.*s", (int)sizeof about->name - 1, found.name);
    about->index = index;
    about->major = found.major;
    about->minor = found.minor;
    about->memory_bytes = (int64_t)found.totalGlobalMem;
    if (found.major >= MIN_MAJOR) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "take a device of 8.0 or later (Ampere), or --device cpu",
                    "%s: compute capability %d.%d is below 8.0", about->name, about->major, about->minor);
}

// Whether kernels were compiled for it. The first call to a device also makes what the driver keeps about a program,
// which fails when another program has the device for itself.
static kvq_status try_kernels(const kvq_cuda_about *about, kvq_error *err) {
    char        next[160];
    cudaError_t code = cudaSetDevice(about->index);
    if (code == cudaSuccess) code = kvq_cuda_probe();
    if (code != cudaSuccess) (void)cudaGetLastError();
    switch (code) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
        (void)snprintf(next, sizeof next, "build kvq with -DCMAKE_CUDA_ARCHITECTURES=%d%d, or take --device cpu",
                       about->major, about->minor);
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, next,
                        "%s: the kernels were compiled for %s, not for compute capability %d.%d (%s)", about->name,
                        KVQ_CUDA_ARCHITECTURES, about->major, about->minor, cudaGetErrorName(code));
    case cudaErrorDevicesUnavailable:
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "end the program that uses it (nvidia-smi), or take another device",
                        "%s: another program has it for itself", about->name);
    case cudaErrorMemoryAllocation:
        return kvq_fail(err, KVQ_ERR_MEMORY, "end other programs that use the device, or take another one",
                        "%s: it has no free memory, not even to begin with", about->name);
    default:
        return told(about->index, code, about->name, err);
    }
}

// What makes results of cuBLAS reproducible, and those of f32 f32: no TF32 (the default), which each product asks for
// once more, no sums in less than f32, no atomics.
static const cublasMath_t MATH =
    static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);

static kvq_status open_products(kvq_cuda_device *device, kvq_error *err) {
    int        index = device->about.index, version[3] = {0, 0, 0};
    kvq_status status = kvq_cuda_alloc(device, WORKSPACE_BYTES, "workspace of cuBLAS", &device->workspace, err);
    if (status != KVQ_OK) return status;
    status = ask(device, "an event", err,
                 [&] { return cudaEventCreateWithFlags(&device->product_done, cudaEventDisableTiming); });
    if (status != KVQ_OK) return status;
    cublasStatus_t code = cublasCreate(&device->products);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasSetMathMode(device->products, MATH);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasSetAtomicsMode(device->products, CUBLAS_ATOMICS_NOT_ALLOWED);
    static const libraryPropertyType parts[3] = {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
    for (int i = 0; i < 3 && code == CUBLAS_STATUS_SUCCESS; i++) code = cublasGetProperty(parts[i], &version[i]);
    (void)snprintf(device->about.library, sizeof device->about.library, "cublas %d.%d.%d", version[0], version[1],
                   version[2]);
    return told_by_library(index, code, "opening cuBLAS", err);
}

static kvq_status look_at_memory(kvq_cuda_device *device, kvq_error *err) {
    size_t     free_bytes = 0, all_bytes = 0;
    kvq_status status = ask(device, "its memory", err, [&] { return cudaMemGetInfo(&free_bytes, &all_bytes); });
    device->about.free_bytes = (int64_t)free_bytes;
    return status;
}

kvq_status kvq_cuda_open(const kvq_context *ctx, int index, kvq_cuda_device **out, kvq_error *err) {
    kvq_cuda_device *device = NULL;
    kvq_cuda_about   about = {};
    kvq_status       status = look_at(index, &about, err);
    if (status == KVQ_OK) status = try_kernels(&about, err);
    if (status == KVQ_OK) status = KVQ_NEW(ctx, 1, "a CUDA device", &device, err);
    if (status != KVQ_OK) return status;
    device->about = about;
    (void)pthread_mutex_init(&device->lock, NULL); // with default attributes it cannot fail
    status = open_products(device, err);
    if (status == KVQ_OK) status = look_at_memory(device, err);
    if (status != KVQ_OK)
        kvq_cuda_close(ctx, &device);
    else
        *out = device;
    return status;
}

void kvq_cuda_close(const kvq_context *ctx, kvq_cuda_device **device) {
    kvq_cuda_device *it = *device;
    if (it == NULL) return;
    ask_quietly(it, [] { return cudaDeviceSynchronize(); });
    if (it->products != NULL) (void)cublasDestroy(it->products);
    kvq_cuda_event_destroy(it, it->product_done);
    kvq_cuda_free(it, it->workspace);
    (void)pthread_mutex_destroy(&it->lock);
    kvq_free(ctx, it);
    *device = NULL;
}

const kvq_cuda_about *kvq_cuda_describe(const kvq_cuda_device *device) { return &device->about; }

// ---------------------------------------------------------------- memory

kvq_status kvq_cuda_alloc(kvq_cuda_device *device, size_t bytes, const char *what, void **out, kvq_error *err) {
    void       *p = NULL;
    int         index = device->about.index;
    size_t      free_bytes = 0, all_bytes = 0;
    cudaError_t code = cudaSetDevice(index);
    if (code == cudaSuccess) code = cudaMalloc(&p, bytes > 0 ? bytes : 1);
    if (code == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        if (cudaMemGetInfo(&free_bytes, &all_bytes) != cudaSuccess) (void)cudaGetLastError();
        return kvq_fail(err, KVQ_ERR_MEMORY,
                        "use fewer or shorter windows, end other programs that use the device, or take a larger one",
                        "cuda:%d, %s: could not allocate %zu bytes of device memory; %zu of %zu are free", index, what,
                        bytes, free_bytes, all_bytes);
    }
    kvq_status status = told(index, code, what, err);
    if (status == KVQ_OK) *out = p;
    return status;
}

void kvq_cuda_free(kvq_cuda_device *device, void *p) {
    if (p == NULL) return;
    ask_quietly(device, [] { return cudaDeviceSynchronize(); }); // cudaFree waits as well, but does not promise to
    ask_quietly(device, [&] { return cudaFree(p); });
}

kvq_status kvq_cuda_alloc_pinned(kvq_cuda_device *device, size_t bytes, void **out, kvq_error *err) {
    void       *p = NULL;
    int         index = device->about.index;
    cudaError_t code = cudaSetDevice(index);
    if (code == cudaSuccess) code = cudaHostAlloc(&p, bytes > 0 ? bytes : 1, cudaHostAllocDefault);
    if (code == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return kvq_fail(err, KVQ_ERR_MEMORY, "end other programs, or take a machine with more memory",
                        "cuda:%d: could not pin %zu bytes of the machine's memory for copies", index, bytes);
    }
    kvq_status status = told(index, code, "memory for copies", err);
    if (status == KVQ_OK) *out = p;
    return status;
}

void kvq_cuda_free_pinned(kvq_cuda_device *device, void *p) {
    if (p != NULL) ask_quietly(device, [&] { return cudaFreeHost(p); });
}

// ---------------------------------------------------------------- order

static cudaStream_t as_stream(void *stream) { return static_cast<cudaStream_t>(stream); }
static cudaEvent_t  as_event(void *event) { return static_cast<cudaEvent_t>(event); }

kvq_status kvq_cuda_stream_create(kvq_cuda_device *device, void **stream, kvq_error *err) {
    cudaStream_t made = NULL;
    kvq_status   status = ask(device, "a stream", err, [&] {
        return cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking); // does not wait for the default stream
    });
    if (status == KVQ_OK) *stream = made;
    return status;
}

void kvq_cuda_stream_destroy(kvq_cuda_device *device, void *stream) {
    if (stream == NULL) return;
    ask_quietly(device, [&] { return cudaStreamSynchronize(as_stream(stream)); });
    ask_quietly(device, [&] { return cudaStreamDestroy(as_stream(stream)); });
}

kvq_status kvq_cuda_event_create(kvq_cuda_device *device, void **event, kvq_error *err) {
    cudaEvent_t made = NULL;
    kvq_status  status =
        ask(device, "an event", err, [&] { return cudaEventCreateWithFlags(&made, cudaEventDisableTiming); });
    if (status == KVQ_OK) *event = made;
    return status;
}

void kvq_cuda_event_destroy(kvq_cuda_device *device, void *event) {
    if (event != NULL) ask_quietly(device, [&] { return cudaEventDestroy(as_event(event)); });
}

kvq_status kvq_cuda_record(kvq_cuda_device *device, void *event, void *stream, kvq_error *err) {
    return ask(device, "recording an event", err, [&] { return cudaEventRecord(as_event(event), as_stream(stream)); });
}

kvq_status kvq_cuda_await(kvq_cuda_device *device, void *event, kvq_error *err) {
    return ask(device, "work before an event", err, [&] { return cudaEventSynchronize(as_event(event)); });
}

kvq_status kvq_cuda_follow(kvq_cuda_device *device, void *stream, void *event, kvq_error *err) {
    return ask(device, "following an event", err,
               [&] { return cudaStreamWaitEvent(as_stream(stream), as_event(event), 0); });
}

kvq_status kvq_cuda_finish(kvq_cuda_device *device, void *stream, kvq_error *err) {
    return ask(device, "work of a stream", err, [&] { return cudaStreamSynchronize(as_stream(stream)); });
}

// ---------------------------------------------------------------- work

static cudaMemcpyKind kind_of(kvq_cuda_way way) {
    if (way == KVQ_CUDA_TO_DEVICE) return cudaMemcpyHostToDevice;
    return way == KVQ_CUDA_TO_HOST ? cudaMemcpyDeviceToHost : cudaMemcpyDeviceToDevice;
}

kvq_status kvq_cuda_copy(kvq_cuda_device *device, kvq_cuda_way way, void *to, const void *from, size_t bytes,
                         void *stream, kvq_error *err) {
    if (bytes == 0) return KVQ_OK;
    return ask(device, "a copy", err,
               [&] { return cudaMemcpyAsync(to, from, bytes, kind_of(way), as_stream(stream)); });
}

kvq_status kvq_cuda_clear(kvq_cuda_device *device, void *to, size_t bytes, void *stream, kvq_error *err) {
    if (bytes == 0) return KVQ_OK;
    return ask(device, "clearing memory", err, [&] { return cudaMemsetAsync(to, 0, bytes, as_stream(stream)); });
}

static bool fits_int(int64_t n) { return n >= 0 && n <= INT_MAX; }

// The matrices of cuBLAS are column-major: what is y [m, n] here is y^T there, and y^T = W^T x^T. A matrix read in the
// other order is transposed already, so x is taken as it is, and W as well unless it lies as [n, k].
// Pedantic: factors of f32 are not rounded to TF32 and sums are rounded as f32. That keeps tensor cores out for bf16 as
// well, so bf16 saves memory rather than time.
static cublasStatus_t multiply(kvq_cuda_device *device, const kvq_cuda_product *p) {
    const float       one = 1.0f, add = p->accumulate ? 1.0f : 0.0f;
    cudaDataType_t    type = p->bf16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t w_as = p->transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    // Tensor cores take factors in bf16 as they are; pedantic arithmetic would keep them out.
    cublasComputeType_t compute = p->bf16 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_PEDANTIC;
    int                 m = (int)p->m, n = (int)p->n, k = (int)p->k, w_row = p->transposed ? k : n;
    return cublasGemmEx(device->products, w_as, CUBLAS_OP_N, n, m, k, &one, p->w, type, w_row, p->x, type, k, &add,
                        p->y, CUDA_R_32F, n, compute, CUBLAS_GEMM_DEFAULT);
}

// The workspace belongs to one product at a time, so a product waits for the last one, of whatever stream that was.
// Setting a stream takes the workspace away, which is why it is given each time.
static kvq_status multiply_in_turn(kvq_cuda_device *device, const kvq_cuda_product *product, void *stream,
                                   kvq_error *err) {
    kvq_status status = kvq_cuda_follow(device, stream, device->product_done, err);
    if (status != KVQ_OK) return status;
    cublasStatus_t code = cublasSetStream(device->products, as_stream(stream));
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasSetWorkspace(device->products, device->workspace, WORKSPACE_BYTES);
    if (code == CUBLAS_STATUS_SUCCESS) code = multiply(device, product);
    status = told_by_library(device->about.index, code, "a product", err);
    return status == KVQ_OK ? kvq_cuda_record(device, device->product_done, stream, err) : status;
}

kvq_status kvq_cuda_multiply(kvq_cuda_device *device, const kvq_cuda_product *product, void *stream, kvq_error *err) {
    int64_t m = product->m, n = product->n, k = product->k;
    if (!fits_int(m) || !fits_int(n) || !fits_int(k))
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use fewer or shorter windows",
                        "a product of [%lld, %lld] and [%lld, %lld]: cuBLAS takes sides of 0 to %d", (long long)m,
                        (long long)k, (long long)k, (long long)n, INT_MAX);
    if (m == 0 || n == 0 || (k == 0 && product->accumulate)) return KVQ_OK;
    if (k == 0) return kvq_cuda_clear(device, product->y, (size_t)m * (size_t)n * sizeof(float), stream, err);
    (void)pthread_mutex_lock(&device->lock);
    kvq_status status = multiply_in_turn(device, product, stream, err);
    (void)pthread_mutex_unlock(&device->lock);
    return status;
}
