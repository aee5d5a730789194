// SPDX-License-Identifier: Apache-2.0
//
// Operations on rows and elements: each reads its inputs and writes its outputs once, so memory is what they cost, and
// none needs more than one thread per element or one block per row. Norms add as the CPU does (block_sum.cuh);
// everything else has no sums. So all results have the bits of row_ops_cpu.c, experts_cpu.c and codec_cpu.c.
#include "block_sum.cuh"
#include "kvq_cuda_ops.h"
#include "kvq_gate_hd.h"

// ---------------------------------------------------------------- norms

// x [n] of the row of this block -> 1 / sqrt(mean of squares + eps)
KVQ_DEVICE double inverse_rms(KVQ_GLOBAL_ALIASED(const float) x, int64_t n, float eps, KVQ_SHARED_PTR(double) tile) {
    double lane = 0;
    for (int64_t first = 0; first < n; first += SUM_TILE) {
        int count = sum_count(n - first);
        for (int i = (int)threadIdx.x; i < count; i += OP_THREADS) {
            double value = (double)x[first + i];
            tile[i] = value * value;
        }
        lane = sum_add(tile, count, lane);
    }
    return 1.0 / sqrt(sum_of_lanes(tile, lane) / (double)n + (double)eps);
}

// sum of w dy x
KVQ_DEVICE double sum_of_triple_products(KVQ_GLOBAL(const float) w, KVQ_GLOBAL(const float) dy,
                                         KVQ_GLOBAL(const float) x, int64_t n, KVQ_SHARED_PTR(double) tile) {
    double lane = 0;
    for (int64_t first = 0; first < n; first += SUM_TILE) {
        int count = sum_count(n - first);
        for (int i = (int)threadIdx.x; i < count; i += OP_THREADS)
            tile[i] = (double)w[first + i] * (double)dy[first + i] * (double)x[first + i];
        lane = sum_add(tile, count, lane);
    }
    return sum_of_lanes(tile, lane);
}

// A block per row; y may be x: a thread overwrites what only itself reads again.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) rmsnorm(KVQ_GLOBAL_ALIASED(const float) all_x, KVQ_GLOBAL(const float) w, float eps,
                                          KVQ_GLOBAL_ALIASED(float) all_y, int64_t m, int64_t n) {
    KVQ_SHARED(double, tile, SUM_SHARED);
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        KVQ_GLOBAL_ALIASED(const float) x = all_x + row * n;
        KVQ_GLOBAL_ALIASED(float) y = all_y + row * n;
        float inverse = (float)inverse_rms(x, n, eps, tile);
        for (int64_t i = threadIdx.x; i < n; i += OP_THREADS) y[i] = x[i] * inverse * w[i];
    }
}

// With s = 1 / rms(x): dx_i += s (w_i dy_i - x_i s^2 / n * sum_j w_j dy_j x_j)
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    rmsnorm_backward(KVQ_GLOBAL(const float) all_x, KVQ_GLOBAL(const float) w, float eps,
                     KVQ_GLOBAL(const float) all_dy, KVQ_GLOBAL(float) dx, int64_t m, int64_t n) {
    KVQ_SHARED(double, tile, SUM_SHARED);
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        KVQ_GLOBAL(const float) x = all_x + row * n;
        KVQ_GLOBAL(const float) dy = all_dy + row * n;
        double s = inverse_rms(x, n, eps, tile);
        float  inverse = (float)s;
        float  pull = (float)(s * s / (double)n * sum_of_triple_products(w, dy, x, n, tile));
        for (int64_t i = threadIdx.x; i < n; i += OP_THREADS) dx[row * n + i] += inverse * (w[i] * dy[i] - x[i] * pull);
    }
}

// ---------------------------------------------------------------- rotary embedding

// A block per token, a thread per pair of channels.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    rope(KVQ_GLOBAL(float) all_x, KVQ_GLOBAL(const float) cos_table, KVQ_GLOBAL(const float) sin_table, float direction,
         float scale, int64_t m, int n_heads, int head_dim, int half) {
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        for (int pair = (int)threadIdx.x; pair < n_heads * half; pair += OP_THREADS) {
            int head = pair / half, i = pair % half;
            KVQ_GLOBAL(float) x = all_x + (row * n_heads + head) * head_dim;
            float a = x[i], b = x[i + half], cosine = cos_table[row * half + i] * scale,
                  sine = sin_table[row * half + i] * direction;
            x[i] = a * cosine - b * sine;
            x[i + half] = b * cosine + a * sine;
        }
    }
}

// ---------------------------------------------------------------- elements

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) add(KVQ_GLOBAL(float) y, KVQ_GLOBAL(const float) x, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) y[i] += x[i];
}

KVQ_DEVICE float activation(int kind, float gate, float *slope) {
    return kind == KVQ_GATE_SILU ? kvq_silu_f32(gate, slope) : kvq_gelu_tanh_f32(gate, slope);
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    gated_mul(int kind, KVQ_GLOBAL_ALIASED(const float) gate, KVQ_GLOBAL_ALIASED(const float) up,
              KVQ_GLOBAL_ALIASED(float) y, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) {
        float slope;
        y[i] = activation(kind, gate[i], &slope) * up[i];
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    gated_mul_backward(int kind, KVQ_GLOBAL(float) gate, KVQ_GLOBAL(float) up, KVQ_GLOBAL(const float) dy, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) {
        float slope, value = activation(kind, gate[i], &slope);
        gate[i] = dy[i] * up[i] * slope;
        up[i] = dy[i] * value;
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) softcap(float cap, KVQ_GLOBAL(float) x, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) x[i] = cap * kvq_tanh_f32(x[i] / cap);
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) bf16_of_float(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(uint16_t) y, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) y[i] = kvq_bf16_of_float(x[i]);
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) float_of_bf16(KVQ_GLOBAL(const uint16_t) x, KVQ_GLOBAL(float) y, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) y[i] = kvq_float_of_bf16(x[i]);
}

// ---------------------------------------------------------------- rows

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) add_bias(KVQ_GLOBAL(float) y, KVQ_GLOBAL(const float) bias, int64_t m, int64_t n) {
    for (int64_t i = blockIdx.x; i < m; i += gridDim.x) {
        for (int64_t c = threadIdx.x; c < n; c += OP_THREADS) y[i * n + c] += bias[c];
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    gather_rows(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(const int32_t) rows, KVQ_GLOBAL(float) y, int64_t m, int64_t n) {
    for (int64_t i = blockIdx.x; i < m; i += gridDim.x) {
        int64_t from = rows[i];
        for (int64_t c = threadIdx.x; c < n; c += OP_THREADS) y[i * n + c] = x[from * n + c];
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    scatter_rows(KVQ_GLOBAL(const float) x, KVQ_GLOBAL(const int32_t) rows, KVQ_GLOBAL(const float) scales,
                 KVQ_GLOBAL(float) y, int64_t m, int64_t n) {
    for (int64_t i = blockIdx.x; i < m; i += gridDim.x) {
        int64_t to = rows[i];
        float   scale = scales[i];
        for (int64_t c = threadIdx.x; c < n; c += OP_THREADS) y[to * n + c] += scale * x[i * n + c];
    }
}

// ---------------------------------------------------------------- finite numbers

KVQ_KERNEL store_all_finite(KVQ_GLOBAL(unsigned long long) first) { first[0] = KVQ_CUDA_ALL_FINITE; }

// A thread stops at its first; usually there is none and nobody meets in the minimum, whose result no order changes.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    find_nonfinite(KVQ_GLOBAL(const float) x, int64_t n, KVQ_GLOBAL_ALIASED(unsigned long long) first) {
    for (int64_t i = op_first(); i < n; i += op_stride()) {
        if ((kvq_bits_of_float(x[i]) & 0x7f800000u) != 0x7f800000u) continue;
        atomicMin(first, (unsigned long long)i);
        return;
    }
}

// ---------------------------------------------------------------- halves

// All are stored, also those behind the first that f16 cannot hold: what is there does not depend on who came first. A
// thread's numbers come in their order, so only its first bad one can be the first of all. to: not used unless `stores`
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) store_halves(KVQ_GLOBAL(const float) x, int64_t n, KVQ_GLOBAL(uint16_t) to,
                                               bool stores, KVQ_GLOBAL_ALIASED(unsigned long long) first) {
    bool reported = false;
    for (int64_t i = op_first(); i < n; i += op_stride()) {
        uint16_t half = kvq_half_of_float(x[i]);
        if (stores) to[i] = half;
        if (reported || kvq_half_is_finite(half)) continue;
        atomicMin(first, (unsigned long long)i);
        reported = true;
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) load_halves(KVQ_GLOBAL(const uint16_t) from, int64_t n, KVQ_GLOBAL(float) x) {
    for (int64_t i = op_first(); i < n; i += op_stride()) x[i] = kvq_float_of_half(from[i]);
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) round_halves(KVQ_GLOBAL(float) x, int64_t n) {
    for (int64_t i = op_first(); i < n; i += op_stride()) x[i] = kvq_float_of_half(kvq_half_of_float(x[i]));
}

// ---------------------------------------------------------------- launches

extern "C" {

kvq_status kvq_cuda_add(float *y, const float *x, int64_t n, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(add, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), y, x, n);
    return op_launched("add", err);
}

kvq_status kvq_cuda_rmsnorm(const float *x, const float *w, float eps, float *y, int64_t m, int64_t n, void *stream,
                            kvq_error *err) {
    if (m <= 0 || n <= 0) return KVQ_OK;
    KVQ_LAUNCH(rmsnorm, op_blocks(m), OP_THREADS, 0, op_stream(stream), x, w, eps, y, m, n);
    return op_launched("rmsnorm", err);
}

kvq_status kvq_cuda_rmsnorm_backward(const float *x, const float *w, float eps, const float *dy, float *dx, int64_t m,
                                     int64_t n, void *stream, kvq_error *err) {
    if (m <= 0 || n <= 0) return KVQ_OK;
    KVQ_LAUNCH(rmsnorm_backward, op_blocks(m), OP_THREADS, 0, op_stream(stream), x, w, eps, dy, dx, m, n);
    return op_launched("rmsnorm_backward", err);
}

kvq_status kvq_cuda_add_bias(float *y, const float *bias, int64_t m, int64_t n, void *stream, kvq_error *err) {
    if (m <= 0 || n <= 0) return KVQ_OK;
    KVQ_LAUNCH(add_bias, op_blocks(m), OP_THREADS, 0, op_stream(stream), y, bias, m, n);
    return op_launched("add_bias", err);
}

kvq_status kvq_cuda_rope(float *x, const float *cos_table, const float *sin_table, int direction, float scale,
                         int64_t m, int n_heads, int head_dim, int rot, void *stream, kvq_error *err) {
    float signed_scale = (direction < 0 ? -1.0f : 1.0f) * scale;
    if (m <= 0 || n_heads <= 0 || rot < 2) return KVQ_OK;
    KVQ_LAUNCH(rope, op_blocks(m), OP_THREADS, 0, op_stream(stream), x, cos_table, sin_table, signed_scale, scale, m,
               n_heads, head_dim, rot / 2);
    return op_launched("rope", err);
}

kvq_status kvq_cuda_gated_mul(kvq_gate_kind kind, const float *gate, const float *up, float *y, int64_t n, void *stream,
                              kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(gated_mul, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), (int)kind, gate, up, y, n);
    return op_launched("gated_mul", err);
}

kvq_status kvq_cuda_gated_mul_backward(kvq_gate_kind kind, float *gate, float *up, const float *dy, int64_t n,
                                       void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(gated_mul_backward, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), (int)kind, gate, up, dy,
               n);
    return op_launched("gated_mul_backward", err);
}

kvq_status kvq_cuda_softcap(float cap, float *x, int64_t n, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(softcap, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), cap, x, n);
    return op_launched("softcap", err);
}

kvq_status kvq_cuda_gather_rows(const float *x, const int32_t *d_rows, float *y, int64_t m, int64_t n, void *stream,
                                kvq_error *err) {
    if (m <= 0 || n <= 0) return KVQ_OK;
    KVQ_LAUNCH(gather_rows, op_blocks(m), OP_THREADS, 0, op_stream(stream), x, d_rows, y, m, n);
    return op_launched("gather_rows", err);
}

kvq_status kvq_cuda_scatter_rows(const float *x, const int32_t *d_rows, const float *d_scales, float *y, int64_t m,
                                 int64_t n, void *stream, kvq_error *err) {
    if (m <= 0 || n <= 0) return KVQ_OK;
    KVQ_LAUNCH(scatter_rows, op_blocks(m), OP_THREADS, 0, op_stream(stream), x, d_rows, d_scales, y, m, n);
    return op_launched("scatter_rows", err);
}

kvq_status kvq_cuda_find_nonfinite(const float *x, int64_t n, unsigned long long *d_first, void *stream,
                                   kvq_error *err) {
    KVQ_LAUNCH(store_all_finite, 1, 1, 0, op_stream(stream), d_first);
    if (n > 0) KVQ_LAUNCH(find_nonfinite, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), x, n, d_first);
    return op_launched("find_nonfinite", err);
}

kvq_status kvq_cuda_store_halves(const float *x, int64_t n, uint16_t *d_to, unsigned long long *d_first, void *stream,
                                 kvq_error *err) {
    KVQ_LAUNCH(store_all_finite, 1, 1, 0, op_stream(stream), d_first);
    if (n > 0)
        KVQ_LAUNCH(store_halves, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), x, n, d_to, d_to != NULL,
                   d_first);
    return op_launched("store_halves", err);
}

kvq_status kvq_cuda_load_halves(const uint16_t *d_from, int64_t n, float *x, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(load_halves, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), d_from, n, x);
    return op_launched("load_halves", err);
}

kvq_status kvq_cuda_round_halves(float *x, int64_t n, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(round_halves, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), x, n);
    return op_launched("round_halves", err);
}

kvq_status kvq_cuda_bf16_of_float(const float *x, uint16_t *y, int64_t n, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(bf16_of_float, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), x, y, n);
    return op_launched("bf16_of_float", err);
}

kvq_status kvq_cuda_float_of_bf16(const uint16_t *x, float *y, int64_t n, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(float_of_bf16, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), x, y, n);
    return op_launched("float_of_bf16", err);
}

} // extern "C"
