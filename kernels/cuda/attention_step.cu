// SPDX-License-Identifier: Apache-2.0
//
// Attention of one new token per sequence over caches in f32, a block per (sequence, query head): scores of its keys go
// to scratch, a warp per key; then their exponentials relative to the largest; then the sum of values, a warp per key
// again, over 128 channels at a time, and the warps' sums are added in their order. All orders are fixed by the shape,
// so every run and every grid gives the same bits. It reads keys and values once per query head; packed caches, with
// their splits of long sequences, have a kernel of their own (attention.cu).
#include <math.h>

#include "kvq_cuda_ops.h"
#include "kvq_exp_hd.h"
#include "launch.cuh"

enum {
    WARPS = OP_THREADS / 32,
    MAX_DIM = 1024,   // channels of a head that the block keeps
    SLICE = 128,      // channels that are summed at a time
    EACH = SLICE / 32 // of them in a thread
};

KVQ_DEVICE int lane_of_thread() { return (int)threadIdx.x % 32; }
KVQ_DEVICE int warp_of_thread() { return (int)threadIdx.x / 32; }

// ---------------------------------------------------------------- sums and maxima

KVQ_DEVICE float sum_of_warp(float x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}
KVQ_DEVICE float maximum_of_warp(float x) {
    for (int by = 16; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
    return x;
}

// parts [WARPS] = what each warp has; the caller has a barrier before it writes them again.
KVQ_DEVICE void share_of_warp(float x, KVQ_SHARED_PTR(float) parts) {
    if (lane_of_thread() == 0) parts[warp_of_thread()] = x;
    __syncthreads();
}
KVQ_DEVICE float sum_of_block(float x, KVQ_SHARED_PTR(float) parts) {
    share_of_warp(sum_of_warp(x), parts);
    float sum = 0;
    for (int warp = 0; warp < WARPS; warp++) sum += parts[warp];
    return sum;
}
KVQ_DEVICE float maximum_of_block(float x, KVQ_SHARED_PTR(float) parts) {
    share_of_warp(maximum_of_warp(x), parts);
    float top = parts[0];
    for (int warp = 1; warp < WARPS; warp++) top = fmaxf(top, parts[warp]);
    return top;
}

// ---------------------------------------------------------------- one head of one sequence

// The keys that the new token sees, n of them; its channels of key j are at [at + j * stride].
typedef struct seen_keys {
    int64_t n, at, stride;
} seen_keys;

KVQ_DEVICE seen_keys keys_of(const kvq_attention_shape &s, int64_t n_past, int64_t capacity, int64_t seq, int head) {
    int64_t   length = n_past + 1, from = s.window > 0 && length > s.window ? length - s.window : 0;
    int       kv_head = head / (s.n_heads / s.n_kv_heads);
    seen_keys keys;
    keys.n = length - from;
    keys.stride = (int64_t)s.n_kv_heads * s.head_dim;
    keys.at = (seq * capacity + from) * keys.stride + (int64_t)kv_head * s.head_dim;
    return keys;
}

KVQ_DEVICE float score_of(const kvq_attention_shape &s, float sum) {
    float score = sum * s.scale;
    return s.softcap > 0 ? s.softcap * kvq_tanh_f32(score / s.softcap) : score;
}

KVQ_DEVICE void fill_scores(const kvq_attention_shape &s, seen_keys keys, KVQ_SHARED_PTR(float) query,
                            KVQ_GLOBAL(const float) k, KVQ_GLOBAL(float) scores) {
    for (int64_t j = warp_of_thread(); j < keys.n; j += WARPS) {
        float sum = 0;
        for (int c = lane_of_thread(); c < s.head_dim; c += 32) sum += query[c] * k[keys.at + j * keys.stride + c];
        sum = sum_of_warp(sum);
        if (lane_of_thread() == 0) scores[j] = score_of(s, sum);
    }
}

// Scores -> their exponentials relative to the largest; returns the sum.
KVQ_DEVICE float fill_exponentials(int64_t n, KVQ_GLOBAL(float) scores, KVQ_SHARED_PTR(float) maxima,
                                   KVQ_SHARED_PTR(float) sums) {
    float top = -INFINITY, sum = 0;
    for (int64_t j = threadIdx.x; j < n; j += OP_THREADS) top = fmaxf(top, scores[j]);
    top = maximum_of_block(top, maxima);
    for (int64_t j = threadIdx.x; j < n; j += OP_THREADS) {
        float p = kvq_exp_f32(scores[j] - top);
        scores[j] = p;
        sum += p;
    }
    return sum_of_block(sum, sums);
}

// out: `width` channels from `first` on of the sum of values, divided by that of the weights
KVQ_DEVICE void mix_slice(seen_keys keys, KVQ_GLOBAL(const float) weights, KVQ_GLOBAL(const float) v, int first,
                          int width, float total, KVQ_SHARED_PTR(float) parts, KVQ_GLOBAL(float) out) {
    int   lane = lane_of_thread();
    float sums[EACH] = {};
    for (int64_t j = warp_of_thread(); j < keys.n; j += WARPS) {
        float weight = weights[j];
        KVQ_UNROLL for (int i = 0; i < EACH; i++) {
            int c = lane + 32 * i;
            if (c < width) sums[i] += weight * v[keys.at + j * keys.stride + first + c];
        }
    }
    KVQ_UNROLL for (int i = 0; i < EACH; i++) parts[warp_of_thread() * SLICE + lane + 32 * i] = sums[i];
    __syncthreads();
    for (int c = (int)threadIdx.x; c < width; c += OP_THREADS) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; warp++) sum += parts[warp * SLICE + c];
        out[first + c] = sum / total;
    }
    __syncthreads(); // the next slice, or head, overwrites what others may still read
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    attention_step(kvq_attention_shape s, int64_t n_seqs, int64_t n_past, int64_t capacity, KVQ_GLOBAL(const float) q,
                   KVQ_GLOBAL(const float) k, KVQ_GLOBAL(const float) v, KVQ_GLOBAL(float) out,
                   KVQ_GLOBAL(float) scratch) {
    KVQ_SHARED(float, query, MAX_DIM);
    KVQ_SHARED(float, parts, WARPS *SLICE);
    KVQ_SHARED(float, maxima, WARPS);
    KVQ_SHARED(float, sums, WARPS);
    for (int64_t item = blockIdx.x; item < n_seqs * s.n_heads; item += gridDim.x) {
        seen_keys keys = keys_of(s, n_past, capacity, item / s.n_heads, (int)(item % s.n_heads));
        int64_t   at = item * s.head_dim;
        KVQ_GLOBAL(float) scores = scratch + item * capacity;
        for (int c = (int)threadIdx.x; c < s.head_dim; c += OP_THREADS) query[c] = q[at + c];
        __syncthreads();
        fill_scores(s, keys, query, k, scores);
        __syncthreads(); // a warp's scores are read by all, also in global memory
        float total = fill_exponentials(keys.n, scores, maxima, sums);
        for (int first = 0; first < s.head_dim; first += SLICE) {
            int left = s.head_dim - first;
            mix_slice(keys, scores, v, first, left < SLICE ? left : (int)SLICE, total, parts, out + at);
        }
    }
}

// ---------------------------------------------------------------- launch

extern "C" kvq_status kvq_cuda_attention_step(const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                                              int64_t capacity, const float *q, const float *k_cache,
                                              const float *v_cache, float *out, float *scratch, void *stream,
                                              kvq_error *err) {
    if (shape->head_dim > MAX_DIM)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "heads of %d channels; on a CUDA device there may be at most %d: use the CPU", shape->head_dim,
                        (int)MAX_DIM);
    if (n_seqs <= 0 || shape->n_heads <= 0 || shape->head_dim <= 0) return KVQ_OK;
    KVQ_LAUNCH(attention_step, op_blocks(n_seqs * shape->n_heads), OP_THREADS, 0, op_stream(stream), *shape, n_seqs,
               n_past, capacity, q, k_cache, v_cache, out, scratch);
    return op_launched("attention_step", err);
}
