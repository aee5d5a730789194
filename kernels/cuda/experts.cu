// SPDX-License-Identifier: Apache-2.0
//
// What a mixture of experts needs beside linear layers and moving rows: the router, its gradient, and dot products of
// rows. The bits are those of experts_cpu.c, because every sum runs in its order: a dot product over eight lanes, of
// which eight threads have one each; a sum over the experts of a token in one thread, or in each for itself, which is
// short beside the dot products. What such a sum needs an exponential for is computed by all threads before.
#include <math.h>

#include "kvq_cuda_ops.h"
#include "kvq_exp_hd.h"
#include "launch.cuh"

enum { DOT_LANES = 8, DOTS = OP_THREADS / DOT_LANES, MAX_EXPERTS = KVQ_CUDA_MAX_EXPERTS }; // DOTS: of a block at a time

// ---------------------------------------------------------------- dot products

// The lane of a, b [n] that this thread has: elements i % 8, and for lane 0 those behind the last whole eight.
KVQ_DEVICE double lane_of_dot(KVQ_GLOBAL(const float) a, KVQ_GLOBAL(const float) b, int64_t n) {
    int     lane = (int)threadIdx.x % DOT_LANES;
    int64_t whole = n / DOT_LANES * DOT_LANES;
    double  sum = 0;
    for (int64_t i = lane; i < whole; i += DOT_LANES) sum += (double)a[i] * (double)b[i];
    for (int64_t i = whole; i < n && lane == 0; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

// Pairs of lanes, pairs of pairs, and both halves, in each of the eight threads. All threads of a warp must come.
KVQ_DEVICE double sum_of_dot(double lane) {
    for (int by = 1; by < DOT_LANES; by *= 2) lane += __shfl_xor_sync(0xffffffffu, lane, by);
    return lane;
}

// out [m, n_b]: the rows of a with all n_b rows of b. Where `paired`, n_b is 1 and it is the row of b with the number
// of a's.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) dots(KVQ_GLOBAL(const float) a, KVQ_GLOBAL(const float) b, KVQ_GLOBAL(float) out,
                                       int64_t m, int n_b, bool paired, int64_t n) {
    int64_t n_dots = m * n_b;
    for (int64_t first = (int64_t)blockIdx.x * DOTS; first < n_dots; first += (int64_t)gridDim.x * DOTS) {
        int64_t at = first + (int)threadIdx.x / DOT_LANES, row = at / n_b, row_b = paired ? row : at % n_b;
        double  lane = at < n_dots ? lane_of_dot(a + row * n, b + row_b * n, n) : 0, sum = sum_of_dot(lane);
        if (at < n_dots && threadIdx.x % DOT_LANES == 0) out[at] = (float)sum;
    }
}

static unsigned blocks_of_dots(int64_t n_dots) { return op_blocks((n_dots + DOTS - 1) / DOTS); }

// ---------------------------------------------------------------- router

// The k largest of E logits by insertion: an expert goes behind those that are at least as large.
KVQ_DEVICE void choose(KVQ_SHARED_PTR(float) logits, int n_experts, KVQ_SHARED_PTR(int) chosen, int k) {
    int n = 0;
    for (int e = 0; e < n_experts; e++) {
        float logit = logits[e];
        int   at = n;
        while (at > 0 && logit > logits[chosen[at - 1]]) at--;
        if (at == k) continue;
        n = n < k ? n + 1 : k;
        for (int i = n - 1; i > at; i--) chosen[i] = chosen[i - 1];
        chosen[at] = e;
    }
}

KVQ_DEVICE double maximum_of(KVQ_SHARED_PTR(float) logits, int n_experts) {
    float top = logits[0];
    for (int e = 1; e < n_experts; e++) top = fmaxf(top, logits[e]);
    return (double)top;
}

KVQ_DEVICE double sum_in_order(KVQ_SHARED_PTR(double) x, int n) {
    double sum = 0;
    for (int e = 0; e < n; e++) sum += x[e];
    return sum;
}

KVQ_DEVICE double sum_of_chosen(KVQ_SHARED_PTR(float) p, KVQ_SHARED_PTR(int) chosen, int k) {
    double sum = 0;
    for (int j = 0; j < k; j++) sum += (double)p[chosen[j]];
    return sum;
}

// A block per token; `probability` has the logits. The choice is made on them: two that differ may have the same
// probability in f32. Two warps sum and choose at the same time.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS) choose_experts(int n_experts, int k, bool normalize, KVQ_GLOBAL(float) probability,
                                                 KVQ_GLOBAL(int32_t) expert, KVQ_GLOBAL(float) weight, int64_t m) {
    KVQ_SHARED(double, exponential, MAX_EXPERTS);
    KVQ_SHARED(double, total, 1);
    KVQ_SHARED(float, p, MAX_EXPERTS); // logits, then probabilities
    KVQ_SHARED(int, chosen, MAX_EXPERTS);
    int t = (int)threadIdx.x;
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        for (int e = t; e < n_experts; e += OP_THREADS) p[e] = probability[row * n_experts + e];
        __syncthreads();
        double top = maximum_of(p, n_experts);
        for (int e = t; e < n_experts; e += OP_THREADS) exponential[e] = kvq_exp_f64((double)p[e] - top);
        __syncthreads();
        if (t == 0) total[0] = sum_in_order(exponential, n_experts);
        if (t == 32) choose(p, n_experts, chosen, k);
        __syncthreads();
        for (int e = t; e < n_experts; e += OP_THREADS) {
            float value = (float)(exponential[e] / total[0]);
            p[e] = value;
            probability[row * n_experts + e] = value;
        }
        __syncthreads();
        double divisor = normalize && t < k ? sum_of_chosen(p, chosen, k) : 1;
        for (int j = t; j < k; j += OP_THREADS) {
            expert[row * k + j] = chosen[j];
            weight[row * k + j] = (float)((double)p[chosen[j]] / divisor);
        }
        __syncthreads(); // the next token overwrites what others may still read
    }
}

// ---------------------------------------------------------------- gradient of the router

// Which of chosen [k] is e, k = none; *below: how many are before it in the order of experts.
KVQ_DEVICE int place_of(KVQ_GLOBAL(const int32_t) chosen, int k, int e, int *below) {
    int place = k;
    *below = 0;
    for (int j = 0; j < k; j++) {
        int other = chosen[j];
        if (other == e) place = j;
        *below += other < e;
    }
    return place;
}

KVQ_DEVICE double center_of(KVQ_GLOBAL(const float) weight, KVQ_GLOBAL(const float) dweight, int k) {
    double center = 0;
    for (int j = 0; j < k; j++) center += (double)weight[j] * (double)dweight[j];
    return center;
}

// A block per token; the formulas are in experts_cpu.c. Threads first leave the gradients dz of logits in shared
// memory, of those experts only that have one, in the order of experts; then each adds them up for its channels.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    route_backward(int n_experts, int k, bool normalize, KVQ_GLOBAL(const float) all_probability,
                   KVQ_GLOBAL(const int32_t) all_expert, KVQ_GLOBAL(const float) all_weight,
                   KVQ_GLOBAL(const float) all_dweight, KVQ_GLOBAL(const float) w, KVQ_GLOBAL(float) dx, int64_t m,
                   int64_t n) {
    KVQ_SHARED(float, dz, MAX_EXPERTS);
    KVQ_SHARED(int, expert_of, MAX_EXPERTS);
    int n_terms = normalize ? k : n_experts;
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        KVQ_GLOBAL(const int32_t) chosen = all_expert + row * k;
        KVQ_GLOBAL(const float) probability = all_probability + row * n_experts;
        KVQ_GLOBAL(const float) weight = all_weight + row * k;
        KVQ_GLOBAL(const float) dweight = all_dweight + row * k;
        double center = center_of(weight, dweight, k);
        for (int e = (int)threadIdx.x; e < n_experts; e += OP_THREADS) {
            int  below, j = place_of(chosen, k, e, &below);
            bool is_chosen = j < k;
            if (normalize && !is_chosen) continue;
            double p = is_chosen ? (double)weight[j] : (double)probability[e];
            int    at = normalize ? below : e;
            dz[at] = (float)(p * ((is_chosen ? (double)dweight[j] : 0) - center));
            expert_of[at] = e;
        }
        __syncthreads();
        for (int64_t i = threadIdx.x; i < n; i += OP_THREADS) {
            float sum = dx[row * n + i];
            for (int term = 0; term < n_terms; term++) sum += dz[term] * w[(int64_t)expert_of[term] * n + i];
            dx[row * n + i] = sum;
        }
        __syncthreads(); // the next token overwrites what others may still read
    }
}

// ---------------------------------------------------------------- launches

static kvq_status check_experts(int n_experts, kvq_error *err) {
    if (n_experts <= MAX_EXPERTS) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                    "a router with %d experts; on a CUDA device there may be at most %d: use the CPU", n_experts,
                    (int)MAX_EXPERTS);
}

extern "C" {

kvq_status kvq_cuda_route(const kvq_route *d_to, const float *x, const float *w, int64_t m, int64_t n, void *stream,
                          kvq_error *err) {
    kvq_route  r = *d_to;
    kvq_status status = check_experts(r.n_experts, err);
    if (status != KVQ_OK || m <= 0 || r.n_experts <= 0) return status;
    KVQ_LAUNCH(dots, blocks_of_dots(m * r.n_experts), OP_THREADS, 0, op_stream(stream), x, w, r.probability, m,
               r.n_experts, false, n);
    KVQ_LAUNCH(choose_experts, op_blocks(m), OP_THREADS, 0, op_stream(stream), r.n_experts, r.per_token, r.normalize,
               r.probability, r.expert, r.weight, m);
    return op_launched("route", err);
}

kvq_status kvq_cuda_route_backward(const kvq_route *d_from, const float *d_dweight, const float *w, float *dx,
                                   int64_t m, int64_t n, void *stream, kvq_error *err) {
    kvq_route  r = *d_from;
    kvq_status status = check_experts(r.n_experts, err);
    if (status != KVQ_OK || m <= 0 || n <= 0 || r.n_experts <= 0) return status;
    KVQ_LAUNCH(route_backward, op_blocks(m), OP_THREADS, 0, op_stream(stream), r.n_experts, r.per_token, r.normalize,
               r.probability, r.expert, r.weight, d_dweight, w, dx, m, n);
    return op_launched("route_backward", err);
}

kvq_status kvq_cuda_row_dots(const float *a, const float *b, float *d_out, int64_t m, int64_t n, void *stream,
                             kvq_error *err) {
    if (m <= 0) return KVQ_OK;
    KVQ_LAUNCH(dots, blocks_of_dots(m), OP_THREADS, 0, op_stream(stream), a, b, d_out, m, 1, true, n);
    return op_launched("row_dots", err);
}

} // extern "C"
