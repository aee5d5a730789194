// SPDX-License-Identifier: Apache-2.0
// The CPU backend: its table, and the operations that are only memory.
#include <string.h>

#include "kernels_impl.h"

static kvq_status alloc_floats(const kvq_backend *be, int64_t n_floats, const char *what, float **out, kvq_error *err) {
    return KVQ_NEW(be->ctx, n_floats, what, out, err);
}

static void release_floats(const kvq_backend *be, float *p) { kvq_free(be->ctx, p); }

static void copy_floats(const kvq_backend *be, float *to, const float *from, int64_t n) {
    (void)be;
    memcpy(to, from, (size_t)n * sizeof *to);
}

static void zero_floats(const kvq_backend *be, float *x, int64_t n) {
    (void)be;
    memset(x, 0, (size_t)n * sizeof *x);
}

static void add_floats(const kvq_backend *be, float *y, const float *x, int64_t n) {
    (void)be;
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

static kvq_status check(const kvq_backend *be, kvq_error *err) { // every call has done what it was asked for
    (void)be, (void)err;
    return KVQ_OK;
}

static int64_t find_nonfinite(const kvq_backend *be, const float *x, int64_t n) {
    (void)be;
    return kvq_find_nonfinite(x, n);
}

static void destroy(kvq_backend **be) {
    if (*be == NULL) return;
    const kvq_context *ctx = (*be)->ctx;
    cpu_backend       *cpu = (cpu_backend *)*be; // its first member
    kvq_bf16_destroy(ctx, &cpu->bf16);
    kvq_free(ctx, cpu);
    *be = NULL;
}

const char *const kvq_compute_names[] = {[KVQ_COMPUTE_F32] = "f32", [KVQ_COMPUTE_BF16] = "bf16", NULL};

kvq_status kvq_backend_cpu(const kvq_context *ctx, kvq_compute compute, kvq_backend **out, kvq_error *err) {
    cpu_backend *cpu = NULL;
    kvq_backend *be = NULL;
    kvq_status   status = KVQ_NEW(ctx, 1, "backend", &cpu, err);
    if (status != KVQ_OK) return status;
    be = &cpu->table;
    *be = (kvq_backend){
        .name = "cpu",
        .device = "this processor",
        .matmul = kvq_gemm_prepare(),
        .ctx = ctx,
        .destroy = destroy,
        .check = check,
        .alloc = alloc_floats,
        .release = release_floats,
        .upload = copy_floats,
        .download = copy_floats,
        .copy = copy_floats,
        .zero = zero_floats,
        .add = add_floats,
        .weights_floats = kvq_weights_floats_cpu,
        .upload_weights = kvq_upload_weights_cpu,
        .linear = kvq_linear_cpu,
        .linear_backward = kvq_linear_backward_cpu,
        .rmsnorm = kvq_rmsnorm_cpu,
        .rmsnorm_backward = kvq_rmsnorm_backward_cpu,
        .rope = kvq_rope_cpu,
        .gated_mul = kvq_gated_mul_cpu,
        .gated_mul_backward = kvq_gated_mul_backward_cpu,
        .softcap = kvq_softcap_cpu,
        .route = kvq_route_cpu,
        .route_backward = kvq_route_backward_cpu,
        .gather_rows = kvq_gather_rows_cpu,
        .scatter_rows = kvq_scatter_rows_cpu,
        .row_dots = kvq_row_dots_cpu,
        .attention_scratch_floats = kvq_attention_scratch_floats_cpu,
        .attention = kvq_attention_cpu,
        .attention_backward = kvq_attention_backward_cpu,
        .attention_step = kvq_attention_step_cpu,
        .cross_entropy = kvq_cross_entropy_cpu,
        .compare = kvq_compare_cpu,
        .sample = kvq_sample_cpu,
        .encode = kvq_encode_cpu,
        .decode = kvq_decode_cpu,
        .encode_tiles = kvq_encode_tiles_cpu,
        .decode_tiles = kvq_decode_tiles_cpu,
        .store_halves = kvq_store_halves_cpu,
        .load_halves = kvq_load_halves_cpu,
        .round_halves = kvq_round_halves_cpu,
        .find_nonfinite = find_nonfinite,
    };
    if (compute == KVQ_COMPUTE_BF16) status = kvq_use_bf16(cpu, err);
    if (status != KVQ_OK) {
        destroy(&be);
        return status;
    }
    *out = be;
    return KVQ_OK;
}
