// SPDX-License-Identifier: Apache-2.0
//
// From logits to losses, a block per row: cross entropy with its gradient in place, the comparison of two models, and
// sampling. A row is read two or three times, which the second level cache serves; the exponentials are f64 and
// computed by all threads, and added in the CPU's order (block_sum.cuh), so results have its bits as far as the
// device's log and exp have: both are within one unit of f64's last place.
#include <limits.h>
#include <math.h>

#include "block_sum.cuh"
#include "kvq_cuda_ops.h"
#include "kvq_exp_hd.h"

// ---------------------------------------------------------------- the largest

enum { N_WARPS = OP_THREADS / 32, N_TOP = 5, NONE = INT_MAX };

// The order in which logits are ranked: the larger, and of equals the one with the lower id.
KVQ_DEVICE bool ranks_before(float a, int a_at, float b, int b_at) { return a > b || (a == b && a_at < b_at); }

// The first in that order of what each thread brings, for all threads. NONE where no thread has a number.
KVQ_DEVICE void first_of_block(float *value, int *at, KVQ_SHARED_PTR(float) values, KVQ_SHARED_PTR(int) places) {
    for (int by = 16; by > 0; by /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, *value, by);
        int   other_at = __shfl_xor_sync(0xffffffffu, *at, by);
        if (ranks_before(other, other_at, *value, *at)) *value = other, *at = other_at;
    }
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = *value, places[threadIdx.x / 32] = *at;
    __syncthreads();
    for (int warp = 0; warp < N_WARPS; warp++) {
        float other = values[warp];
        int   other_at = places[warp];
        if (ranks_before(other, other_at, *value, *at)) *value = other, *at = other_at;
    }
    __syncthreads(); // the next call overwrites what others may still read
}

KVQ_DEVICE float maximum_of(KVQ_GLOBAL_ALIASED(const float) x, int n, int *at, KVQ_SHARED_PTR(float) values,
                            KVQ_SHARED_PTR(int) places) {
    float best = -INFINITY;
    *at = NONE;
    for (int i = (int)threadIdx.x; i < n; i += OP_THREADS) {
        float value = x[i];
        if (ranks_before(value, i, best, *at)) best = value, *at = i;
    }
    first_of_block(&best, at, values, places);
    return best;
}

// The N_TOP first of a row, and where they are; NONE behind the end of a shorter row. Each thread keeps its own N_TOP
// in registers, and the block takes the first one of all N_TOP times.
KVQ_DEVICE void largest_of(KVQ_GLOBAL_ALIASED(const float) x, int n, float *value, int *at,
                           KVQ_SHARED_PTR(float) values, KVQ_SHARED_PTR(int) places) {
    float own[N_TOP];
    int   own_at[N_TOP];
    KVQ_UNROLL for (int j = 0; j < N_TOP; j++) own[j] = -INFINITY, own_at[j] = NONE;
    for (int i = (int)threadIdx.x; i < n; i += OP_THREADS) {
        float moved = x[i];
        int   moved_at = i;
        KVQ_UNROLL for (int j = 0; j < N_TOP; j++) { // what is displaced moves on
            if (!ranks_before(moved, moved_at, own[j], own_at[j])) continue;
            float next = own[j];
            int   next_at = own_at[j];
            own[j] = moved, own_at[j] = moved_at;
            moved = next, moved_at = next_at;
        }
    }
    KVQ_UNROLL for (int k = 0; k < N_TOP; k++) {
        value[k] = own[0], at[k] = own_at[0];
        first_of_block(&value[k], &at[k], values, places);
        if (at[k] != own_at[0]) continue;
        KVQ_UNROLL for (int j = 0; j + 1 < N_TOP; j++) own[j] = own[j + 1], own_at[j] = own_at[j + 1];
        own[N_TOP - 1] = -INFINITY, own_at[N_TOP - 1] = NONE;
    }
}

// ---------------------------------------------------------------- sums

// The terms of the tile that begins at `first`.
KVQ_DEVICE int fill_exponentials(KVQ_GLOBAL_ALIASED(const float) x, int n, int first, double maximum,
                                 KVQ_SHARED_PTR(double) tile) {
    int count = sum_count(n - first);
    for (int i = (int)threadIdx.x; i < count; i += OP_THREADS) tile[i] = kvq_exp_f64((double)x[first + i] - maximum);
    return count;
}

KVQ_DEVICE double log_sum_exp(KVQ_GLOBAL_ALIASED(const float) x, int n, float maximum, KVQ_SHARED_PTR(double) tile) {
    double lane = 0;
    for (int first = 0; first < n; first += SUM_TILE) {
        int count = fill_exponentials(x, n, first, (double)maximum, tile);
        lane = sum_add(tile, count, lane);
    }
    return (double)maximum + log(sum_of_lanes(tile, lane));
}

// KL(a || b) = sum p_a (log p_a - log p_b)
KVQ_DEVICE double divergence(KVQ_GLOBAL_ALIASED(const float) a, KVQ_GLOBAL_ALIASED(const float) b, int n, double lse_a,
                             double lse_b, KVQ_SHARED_PTR(double) tile) {
    double lane = 0;
    for (int first = 0; first < n; first += SUM_TILE) {
        int count = sum_count(n - first);
        for (int i = (int)threadIdx.x; i < count; i += OP_THREADS) {
            double log_p = (double)a[first + i] - lse_a, log_q = (double)b[first + i] - lse_b;
            tile[i] = kvq_exp_f64(log_p) * (log_p - log_q);
        }
        lane = sum_add(tile, count, lane);
    }
    return sum_of_lanes(tile, lane);
}

// ---------------------------------------------------------------- cross entropy

// d (cap tanh(z / cap)) / dz at the result x; 1 without a cap
KVQ_DEVICE double cap_slope(double inverse_cap, float x) {
    double t = (double)x * inverse_cap;
    return 1.0 - t * t;
}

// The target's logit is read by all before the first barrier, and overwritten after the last.
KVQ_KERNEL OP_BOUNDS cross_entropy(KVQ_GLOBAL(float) logits, KVQ_GLOBAL(const int32_t) targets, int64_t m, int n_vocab,
                                   double inverse_cap, double scale, KVQ_GLOBAL(double) nll) {
    KVQ_SHARED(double, tile, SUM_SHARED);
    KVQ_SHARED(float, values, N_WARPS);
    KVQ_SHARED(int, places, N_WARPS);
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        KVQ_GLOBAL(float) x = logits + row * n_vocab;
        int    target = targets[row], top;
        float  expected = x[target];
        double lse = log_sum_exp(x, n_vocab, maximum_of(x, n_vocab, &top, values, places), tile);
        double loss = lse - (double)expected, p = exp(-loss);
        if (threadIdx.x == 0) nll[row] = loss;
        if (scale == 0) continue;
        for (int i = (int)threadIdx.x; i < n_vocab; i += OP_THREADS) {
            float  value = x[i];
            double gradient = i == target ? scale * (p - 1.0) : scale * kvq_exp_f64((double)value - lse);
            x[i] = (float)(gradient * cap_slope(inverse_cap, value));
        }
    }
}

// ---------------------------------------------------------------- two models at one position

KVQ_DEVICE int n_common(const int *a, const int *b) {
    int common = 0;
    KVQ_UNROLL for (int i = 0; i < N_TOP; i++) {
        KVQ_UNROLL for (int j = 0; j < N_TOP; j++) common += a[i] == b[j] && a[i] != NONE;
    }
    return common;
}

KVQ_KERNEL OP_BOUNDS compare(KVQ_GLOBAL_ALIASED(const float) logits_a, KVQ_GLOBAL_ALIASED(const float) logits_b,
                             KVQ_GLOBAL(const int32_t) targets, int64_t m, int n_vocab,
                             KVQ_GLOBAL(kvq_position_score) scores) {
    KVQ_SHARED(double, tile, SUM_SHARED);
    KVQ_SHARED(float, values, N_WARPS);
    KVQ_SHARED(int, places, N_WARPS);
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        KVQ_GLOBAL_ALIASED(const float) a = logits_a + row * n_vocab;
        KVQ_GLOBAL_ALIASED(const float) b = logits_b + row * n_vocab;
        float top_a[N_TOP], top_b[N_TOP];
        int   at_a[N_TOP], at_b[N_TOP], target = targets[row];
        largest_of(a, n_vocab, top_a, at_a, values, places);
        largest_of(b, n_vocab, top_b, at_b, values, places);
        double lse_a = log_sum_exp(a, n_vocab, top_a[0], tile), lse_b = log_sum_exp(b, n_vocab, top_b[0], tile);
        double kl = divergence(a, b, n_vocab, lse_a, lse_b, tile);
        if (threadIdx.x != 0) continue;
        kvq_position_score score;
        score.nll_a = lse_a - (double)a[target];
        score.nll_b = lse_b - (double)b[target];
        score.kl = kl;
        score.top_a = at_a[0];
        score.top_b = at_b[0];
        score.confidence_a = exp((double)top_a[0] - lse_a);
        score.top5_common = n_common(at_a, at_b);
        scores[row] = score;
    }
}

// ---------------------------------------------------------------- sampling

// The CPU adds in the order of tokens, and so does the first thread here: with another order a number close to the
// border of two tokens would choose the other one.
KVQ_DEVICE double total_in_order(KVQ_GLOBAL(const float) x, int n, double maximum, KVQ_SHARED_PTR(double) tile) {
    double total = 0;
    for (int first = 0; first < n; first += SUM_TILE) {
        int count = fill_exponentials(x, n, first, maximum, tile);
        __syncthreads();
        for (int i = 0; i < count && threadIdx.x == 0; i++) total += tile[i];
        __syncthreads();
    }
    return total; // of the first thread
}

// The first token behind which the sum exceeds `goal` (of the first thread), NONE if there is none.
KVQ_DEVICE int first_beyond(KVQ_GLOBAL(const float) x, int n, double maximum, double goal, KVQ_SHARED_PTR(double) tile,
                            KVQ_SHARED_PTR(int) found) {
    double sum = 0;
    int    token = NONE;
    for (int64_t first = 0; first < n && token == NONE; first += SUM_TILE) {
        int count = fill_exponentials(x, n, first, maximum, tile);
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < count && token == NONE; i++) {
                sum += tile[i];
                if (sum > goal) token = first + i;
            }
            found[0] = token;
        }
        __syncthreads();
        token = found[0];
    }
    return token;
}

KVQ_KERNEL OP_BOUNDS sample(KVQ_GLOBAL(const float) logits, KVQ_GLOBAL(const double) u, int64_t m, int64_t n_vocab,
                            KVQ_GLOBAL(int32_t) ids) {
    KVQ_SHARED(double, tile, SUM_SHARED);
    KVQ_SHARED(float, values, N_WARPS);
    KVQ_SHARED(int, places, N_WARPS);
    KVQ_SHARED(int, found, 1); // read until the next row has begun
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        KVQ_GLOBAL(const float) x = logits + row * n_vocab;
        int    top;
        double maximum = (double)maximum_of(x, n_vocab, &top, values, places);
        double goal = (u[row] + 0x1p-54) * total_in_order(x, n_vocab, maximum, tile); // the middle of the cell of u
        int    token = first_beyond(x, n_vocab, maximum, goal, tile, found);
        if (threadIdx.x == 0) ids[row] = token == NONE ? top : token; // rounding may keep the sum below the goal
    }
}

// ---------------------------------------------------------------- launches

extern "C" {

kvq_status kvq_cuda_cross_entropy(float *logits, const int32_t *d_targets, int64_t m, int64_t n_vocab, float cap,
                                  double scale, double *d_nll, void *stream, kvq_error *err) {
    double inverse_cap = cap > 0 ? 1.0 / (double)cap : 0;
    if (m <= 0) return KVQ_OK;
    KVQ_LAUNCH(cross_entropy, op_blocks(m), OP_THREADS, 0, op_stream(stream), logits, d_targets, m, (int)n_vocab,
               inverse_cap, scale, d_nll);
    return op_launched("cross_entropy", err);
}

kvq_status kvq_cuda_compare(const float *logits_a, const float *logits_b, const int32_t *d_targets, int64_t m,
                            int64_t n_vocab, kvq_position_score *d_out, void *stream, kvq_error *err) {
    if (m <= 0) return KVQ_OK;
    KVQ_LAUNCH(compare, op_blocks(m), OP_THREADS, 0, op_stream(stream), logits_a, logits_b, d_targets, m, (int)n_vocab,
               d_out);
    return op_launched("compare", err);
}

kvq_status kvq_cuda_sample(const float *logits, const double *d_u, int64_t m, int64_t n_vocab, int32_t *d_ids,
                           void *stream, kvq_error *err) {
    if (m <= 0) return KVQ_OK;
    KVQ_LAUNCH(sample, op_blocks(m), OP_THREADS, 0, op_stream(stream), logits, d_u, m, (int)n_vocab, d_ids);
    return op_launched("sample", err);
}

} // extern "C"
