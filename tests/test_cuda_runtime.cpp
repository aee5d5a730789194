// SPDX-License-Identifier: Apache-2.0
//
// kernels/cuda/runtime.cpp against a CUDA runtime and a cuBLAS that are played here, so that what it says without a
// driver, with too old a device or without memory is seen on any machine, and products lie as the table wants them.
// Only in builds with CUDA, whose headers it needs; no library of it is linked.
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <string>
#include <thread>
#include <vector>

#include "kvq_cuda_runtime.h"
#include "kvq_test.h"
#include "probe.h"

// ---------------------------------------------------------------- what is played

enum { INDEX = 1 }; // the device that is opened, so that the one which is current by itself is wrong

static struct {
    cudaError_t count_code = cudaSuccess, probe_code = cudaSuccess, forever = cudaSuccess; // what is answered
    int         n_devices = 2, driver = 13020, major = 9, minor = 0;
    size_t      free_bytes = (size_t)1 << 30;
    int         n_held = 0, n_strays = 0; // what was made and not destroyed; calls with another device current
    void       *stream = NULL, *workspace = NULL;
    bool        full_sums = false;
    bool followed = false, unrecorded = false; // a product waits for the last one, and leaves an event for the next
} played;
static thread_local int         current = 0;
static thread_local cudaError_t last = cudaSuccess;

static cudaError_t answer(cudaError_t code) {
    if (played.forever != cudaSuccess) code = played.forever;
    if (code != cudaSuccess) last = code;
    return code;
}

static cudaError_t on_device(cudaError_t code = cudaSuccess) {
    played.n_strays += current != INDEX;
    return answer(code);
}

template <typename T> static cudaError_t make(T *out) {
    cudaError_t code = on_device();
    if (code != cudaSuccess) return code;
    played.n_held++;
    *out = static_cast<T>(malloc(1));
    return code;
}

static cudaError_t unmake(void *p) {
    played.n_held--;
    free(p);
    return on_device();
}

static cudaError_t give(void **p, size_t bytes) {
    if (bytes > played.free_bytes) return on_device(cudaErrorMemoryAllocation);
    return make(p);
}

extern "C" {
cudaError_t cudaGetDeviceCount(int *count) {
    *count = played.n_devices;
    return answer(played.count_code);
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = played.driver;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int) {
    memset(prop, 0, sizeof *prop);
    (void)snprintf(prop->name, sizeof prop->name, "Played Device");
    prop->major = played.major;
    prop->minor = played.minor;
    prop->totalGlobalMem = (size_t)1 << 31;
    return answer(cudaSuccess);
}
cudaError_t cudaSetDevice(int device) {
    current = device;
    return answer(cudaSuccess);
}
cudaError_t cudaGetLastError() {
    cudaError_t code = last;
    last = played.forever;
    return code;
}
const char *cudaGetErrorString(cudaError_t code) {
    return code == cudaErrorIllegalAddress ? "illegal address" : "other";
}
const char *cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = played.free_bytes;
    *total = (size_t)1 << 31;
    return on_device();
}
cudaError_t cudaMalloc(void **p, size_t bytes) { return give(p, bytes); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return give(p, bytes); }
cudaError_t cudaFree(void *p) { return unmake(p); }
cudaError_t cudaFreeHost(void *p) { return unmake(p); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) { return make(reinterpret_cast<void **>(out)); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { return make(reinterpret_cast<void **>(out)); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return unmake(stream); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return unmake(event); }
cudaError_t cudaDeviceSynchronize() { return on_device(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return on_device(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return on_device(); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    played.unrecorded = false;
    return on_device();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    played.followed = true;
    return on_device();
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return on_device();
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    memset(to, value, bytes);
    return on_device();
}

cublasStatus_t cublasCreate(cublasHandle_t *out) {
    *out = static_cast<cublasHandle_t>(malloc(1));
    played.n_held++;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    free(handle);
    played.n_held--;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t mode) {
    played.full_sums = mode == (CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetAtomicsMode(cublasHandle_t, cublasAtomicsMode_t mode) {
    return mode == CUBLAS_ATOMICS_NOT_ALLOWED ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasGetProperty(libraryPropertyType type, int *value) {
    *value = type == MAJOR_VERSION ? 13 : type == MINOR_VERSION ? 4 : 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t stream) {
    played.stream = stream;
    played.workspace = NULL; // so says the manual
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *workspace, size_t) {
    played.workspace = workspace;
    return CUBLAS_STATUS_SUCCESS;
}
const char *cublasGetStatusString(cublasStatus_t) { return "cublas says no"; }

static float element(const void *p, cudaDataType_t type, int64_t at) {
    return type == CUDA_R_16BF ? kvq_float_of_bf16(static_cast<const uint16_t *>(p)[at])
                               : static_cast<const float *>(p)[at];
}

// C [m, n] = alpha op(A) B + beta C, all column-major, as the manual has it.
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType_t a_type, int lda, const void *b,
                            cudaDataType_t b_type, int ldb, const void *beta, void *c, cudaDataType_t c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
    bool  allowed = op_b == CUBLAS_OP_N && lda >= (op_a == CUBLAS_OP_N ? m : k) && ldb >= k && ldc >= m;
    bool  exact = compute == (a_type == CUDA_R_16BF ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_PEDANTIC);
    bool  reproducible = exact && played.full_sums && played.workspace != NULL;
    bool  in_turn = played.followed && !played.unrecorded;
    float scale, keep, *to = static_cast<float *>(c);
    memcpy(&scale, alpha, sizeof scale);
    memcpy(&keep, beta, sizeof keep);
    played.followed = false;
    played.unrecorded = true;
    if (!allowed || !reproducible || !in_turn || c_type != CUDA_R_32F || a_type != b_type)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (int64_t i = 0; i < (int64_t)m * n; i++) {
        int64_t row = i % m, column = i / m;
        float   sum = 0;
        for (int64_t j = 0; j < k; j++)
            sum += element(a, a_type, op_a == CUBLAS_OP_N ? j * lda + row : row * lda + j) *
                   element(b, b_type, column * ldb + j);
        float *y = &to[column * ldc + row];
        *y = scale * sum + (keep == 0 ? 0 : keep * *y);
    }
    return played.forever == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
}

cudaError_t kvq_cuda_probe() { return on_device(played.probe_code); }

// ---------------------------------------------------------------- a device, or why there is none

static kvq_context      context;
static kvq_cuda_device *device;
static kvq_error        err;

static kvq_status open_one() {
    context = kvq_test_context();
    return kvq_cuda_open(&context, INDEX, &device, &err);
}

// Ends with everything given back, and every call having gone to the device.
static void close_one() {
    kvq_cuda_close(&context, &device);
    ck_assert_ptr_null(device);
    ck_assert_int_eq(played.n_held, 0);
    ck_assert_int_eq(played.n_strays, 0);
}

static void refused(kvq_status expected, const char *message, const char *next) {
    ck_assert_int_eq(open_one(), expected);
    ck_assert_msg(strstr(err.message, message) != NULL, "'%s' is not in '%s'", message, err.message);
    ck_assert_msg(strstr(err.next, next) != NULL, "'%s' is not in '%s'", next, err.next);
    ck_assert_ptr_null(device);
    ck_assert_int_eq(played.n_held, 0);
    ck_assert_int_eq(cudaGetLastError(), cudaSuccess); // nobody after is blamed
}

START_TEST(a_device_is_described) {
    ck_assert_int_eq(open_one(), KVQ_OK);
    const kvq_cuda_about *about = kvq_cuda_describe(device);
    ck_assert_str_eq(about->name, "Played Device");
    ck_assert_str_eq(about->library, "cublas 13.4.1");
    ck_assert(about->index == INDEX && about->major == 9 && about->minor == 0);
    ck_assert_int_eq(about->memory_bytes, (int64_t)1 << 31);
    close_one();
}
END_TEST

START_TEST(without_a_device_it_says_why) {
    played.count_code = cudaErrorInsufficientDriver;
    played.driver = 0;
    refused(KVQ_ERR_UNSUPPORTED, "no NVIDIA driver", "install");
    played.driver = 11080;
    refused(KVQ_ERR_UNSUPPORTED, "the driver is for CUDA 11.8", "update");
    played.count_code = cudaErrorNoDevice;
    refused(KVQ_ERR_UNSUPPORTED, "finds no CUDA device", "CUDA_VISIBLE_DEVICES");
    played.count_code = cudaErrorSystemNotReady;
    refused(KVQ_ERR_UNSUPPORTED, "cudaErrorName", "nvidia-smi");
    played.count_code = cudaSuccess;
    played.n_devices = 0;
    refused(KVQ_ERR_UNSUPPORTED, "finds no CUDA device", "CUDA_VISIBLE_DEVICES");
    played.n_devices = 1;
    refused(KVQ_ERR_UNSUPPORTED, "there is one CUDA device", "take cuda:0,");
    context = kvq_test_context();
    played.n_devices = 3;
    ck_assert_int_eq(kvq_cuda_open(&context, 3, &device, &err), KVQ_ERR_UNSUPPORTED);
    ck_assert_str_eq(err.message, "there are 3 CUDA devices");
    ck_assert_ptr_nonnull(strstr(err.next, "cuda:0 to cuda:2"));
}
END_TEST

START_TEST(a_device_that_cannot_run_the_kernels) {
    played.major = 7;
    played.minor = 5;
    refused(KVQ_ERR_UNSUPPORTED, "Played Device: compute capability 7.5 is below 8.0", "8.0 or later");
    played.major = 12;
    played.minor = 1;
    played.probe_code = cudaErrorNoKernelImageForDevice;
    refused(KVQ_ERR_UNSUPPORTED, "compiled for 80, 90, not for compute capability 12.1",
            "-DCMAKE_CUDA_ARCHITECTURES=121");
    played.probe_code = cudaErrorUnsupportedPtxVersion;
    refused(KVQ_ERR_UNSUPPORTED, "compiled for 80, 90", "-DCMAKE_CUDA_ARCHITECTURES=121");
    played.probe_code = cudaErrorDevicesUnavailable;
    refused(KVQ_ERR_UNSUPPORTED, "another program", "nvidia-smi");
    played.probe_code = cudaErrorMemoryAllocation;
    refused(KVQ_ERR_MEMORY, "no free memory", "end other programs");
}
END_TEST

START_TEST(a_device_without_room_for_the_workspace) {
    played.free_bytes = 1000;
    refused(KVQ_ERR_MEMORY, "workspace of cuBLAS: could not allocate 33554432 bytes", "end other programs");
}
END_TEST

// ---------------------------------------------------------------- memory, failures, threads

START_TEST(memory_that_is_not_there) {
    void *p = NULL;
    ck_assert_int_eq(open_one(), KVQ_OK);
    played.free_bytes = 4096;
    ck_assert_int_eq(kvq_cuda_alloc(device, 5000, "weights", &p, &err), KVQ_ERR_MEMORY);
    ck_assert_str_eq(err.message,
                     "cuda:1, weights: could not allocate 5000 bytes of device memory; 4096 of 2147483648 are free");
    ck_assert_int_eq(kvq_cuda_alloc_pinned(device, 5000, &p, &err), KVQ_ERR_MEMORY);
    ck_assert_int_eq(cudaGetLastError(), cudaSuccess);
    ck_assert_ptr_null(p);
    ck_assert_int_eq(kvq_cuda_alloc(device, 0, "nothing", &p, &err), KVQ_OK);
    ck_assert_ptr_nonnull(p);
    kvq_cuda_free(device, p);
    close_one();
}
END_TEST

START_TEST(a_failure_that_lasts_is_told_each_time) {
    ck_assert_int_eq(open_one(), KVQ_OK);
    played.forever = cudaErrorIllegalAddress;
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(kvq_cuda_finish(device, NULL, &err), KVQ_ERR_INTERNAL);
        ck_assert_ptr_nonnull(strstr(err.message, "cuda:1, work of a stream: illegal address"));
        ck_assert_ptr_nonnull(strstr(err.next, "CUDA_LAUNCH_BLOCKING=1"));
    }
    played.forever = cudaSuccess;
    close_one();
}
END_TEST

START_TEST(any_thread_may_call) {
    void *stream = NULL, *event = NULL, *memory = NULL, *pinned = NULL;
    ck_assert_int_eq(open_one(), KVQ_OK);
    bool        ok = false;
    std::thread other([&] { // its current device is 0
        float            y = 0, x = 2;
        kvq_cuda_product product = {1, 1, 1, &x, &x, &y, false, false, false};
        ok = kvq_cuda_stream_create(device, &stream, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_multiply(device, &product, stream, NULL) == KVQ_OK && y == 4;
        ok = ok && kvq_cuda_event_create(device, &event, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_record(device, event, stream, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_follow(device, stream, event, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_await(device, event, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_alloc(device, 8, "memory", &memory, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_alloc_pinned(device, 8, &pinned, NULL) == KVQ_OK;
        ok = ok && kvq_cuda_finish(device, stream, NULL) == KVQ_OK;
    });
    other.join();
    ck_assert(ok);
    std::thread third([&] {
        kvq_cuda_free(device, memory);
        kvq_cuda_free_pinned(device, pinned);
        kvq_cuda_event_destroy(device, event);
        kvq_cuda_stream_destroy(device, stream);
    });
    third.join();
    close_one();
}
END_TEST

// ---------------------------------------------------------------- products

static const int64_t SHAPES[][3] = {{1, 1, 1}, {2, 3, 5}, {7, 4, 1}, {1, 6, 3}, {5, 1, 4},
                                    {3, 2, 0}, {0, 2, 3}, {2, 0, 3}, {4, 4, 4}};
enum { N_SHAPES = sizeof SHAPES / sizeof *SHAPES };

// Whole numbers that bf16 has as well, so that sums are exact.
static float whole(uint32_t stream, int64_t i) {
    return (float)kvq_rng_below(3, KVQ_RNG_TEST, stream, (uint64_t)i, 17) - 8.0f;
}

struct Factor {
    std::vector<float>    f32;
    std::vector<uint16_t> bf16;
    Factor(int64_t n, uint32_t stream) {
        for (int64_t i = 0; i < n; i++) f32.push_back(whole(stream, i));
        for (float x : f32) bf16.push_back(kvq_bf16_of_float(x));
    }
    const void *as(bool is_bf16) const { return is_bf16 ? (const void *)bf16.data() : (const void *)f32.data(); }
};

// y [m, n] = x [m, k] W by the words of the header.
static float by_hand(const kvq_cuda_product *p, const float *x, const float *w, float old, int64_t i, int64_t j) {
    float sum = p->accumulate ? old : 0;
    for (int64_t l = 0; l < p->k; l++) sum += x[i * p->k + l] * (p->transposed ? w[j * p->k + l] : w[l * p->n + j]);
    return sum;
}

START_TEST(products_are_those_of_row_major_matrices) {
    int64_t m = SHAPES[_i][0], n = SHAPES[_i][1], k = SHAPES[_i][2];
    Factor  x(m * k, 1), w(k * n, 2);
    ck_assert_int_eq(open_one(), KVQ_OK);
    for (int variant = 0; variant < 8; variant++) {
        bool               bf16 = (variant & 1) != 0, transposed = (variant & 2) != 0, accumulate = (variant & 4) != 0;
        std::vector<float> y((size_t)(m * n), accumulate ? 3.0f : NAN); // what is overwritten is not read
        kvq_cuda_product   p = {m, n, k, x.as(bf16), w.as(bf16), y.data(), bf16, transposed, accumulate};
        ck_assert_int_eq(kvq_cuda_multiply(device, &p, NULL, &err), KVQ_OK);
        for (int64_t i = 0; i < m * n; i++) {
            float expected = by_hand(&p, x.f32.data(), w.f32.data(), 3.0f, i / n, i % n);
            ck_assert_msg(y[(size_t)i] == expected, "variant %d, element %d: %g, not %g", variant, (int)i,
                          (double)y[(size_t)i], (double)expected);
        }
    }
    close_one();
}
END_TEST

START_TEST(products_that_cublas_cannot_count) {
    kvq_cuda_product p = {1, (int64_t)INT_MAX + 1, 2, NULL, NULL, NULL, false, false, false};
    ck_assert_int_eq(open_one(), KVQ_OK);
    ck_assert_int_eq(kvq_cuda_multiply(device, &p, NULL, &err), KVQ_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err.message, "[1, 2] and [2, 2147483648]"));
    close_one();
}
END_TEST

START_TEST(a_product_that_fails) {
    float            x = 1, y = 0;
    kvq_cuda_product p = {1, 1, 1, &x, &x, &y, false, false, false};
    ck_assert_int_eq(open_one(), KVQ_OK);
    played.full_sums = false; // which the played library refuses
    ck_assert_int_eq(kvq_cuda_multiply(device, &p, NULL, &err), KVQ_ERR_INTERNAL);
    ck_assert_str_eq(err.message, "cuda:1, a product: cublas says no");
    close_one();
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_CASE(a_device_is_described),
    KVQ_CASE(without_a_device_it_says_why),
    KVQ_CASE(a_device_that_cannot_run_the_kernels),
    KVQ_CASE(a_device_without_room_for_the_workspace),
    KVQ_CASE(memory_that_is_not_there),
    KVQ_CASE(a_failure_that_lasts_is_told_each_time),
    KVQ_CASE(any_thread_may_call),
    KVQ_LOOP(products_are_those_of_row_major_matrices, N_SHAPES),
    KVQ_CASE(products_that_cublas_cannot_count),
    KVQ_CASE(a_product_that_fails),
};
KVQ_TEST_MAIN("test_cuda_runtime", cases)
