// SPDX-License-Identifier: Apache-2.0
//
// Decode attention in exact mode; kvq_cuda_attention.h says what it computes, attention_launch.cu starts it.
//
// `attend`: a block takes one KV head of one sequence, up to HEADS query heads of its group, and one split of the
// positions. Chunk by chunk it puts 32 keys into shared memory, rotates them, lets each warp score some of the query
// heads with a token per lane, puts the 32 values into the same memory, and adds them to sums that each thread keeps
// for its own channels. Softmax is online: sums are relative to the largest score so far, and are rescaled when a
// larger one comes. What a split has summed goes to the workspace; `combine` adds up splits in order.
//
// Sums of a chunk begin at 0 and are added to those before, so the roundings that a term goes through grow with the
// chunks and not with the tokens (tests/test_cuda_attention.cpp counts them).
#include "attention_kernels.cuh"
#include "attention_rows.cuh"
#include "attention_tiles.cuh"
#include "kvq_exp_hd.h"
#include "rope.cuh"

// Lower than any score; differences to it are far below where exp ends.
#define NO_SCORE (-3.0e38f)

// Shared memory of a block. weights: [HEADS, ATTEND_CHUNK] of values as they are, then the same times their scale, of
// values in the rotated space.
struct Shared {
    KVQ_SHARED_PTR(float) kv;      // [ATTEND_CHUNK, row_stride] keys, then values
    KVQ_SHARED_PTR(float) q;       // [HEADS, head_dim], scaled
    KVQ_SHARED_PTR(float) weights; // [2, HEADS, ATTEND_CHUNK]
    KVQ_SHARED_PTR(float) rescale; // [HEADS] of what was summed before
    KVQ_SHARED_PTR(int) source;    // [ATTEND_CHUNK]
};

// The query heads of a block: [first, first + n).
struct Heads {
    int first, n;
};

// The largest score so far, and the sum of exp(score - largest). Each warp keeps those of its heads; all lanes the
// same.
struct Softmax {
    float largest, sum;
};

template <int HEADS> KVQ_DEVICE void clear_weights(const Shared &s) {
    for (int i = (int)threadIdx.x; i < 2 * HEADS * ATTEND_CHUNK; i += ATTEND_THREADS) s.weights[i] = 0.0f;
    if ((int)threadIdx.x < HEADS) s.rescale[threadIdx.x] = 0.0f;
}

KVQ_DEVICE void load_queries(const Call &c, KVQ_GLOBAL(const float) q, int seq, const Heads &heads, const Shared &s) {
    KVQ_GLOBAL(const float) from = q + ((int64_t)seq * c.n_heads + heads.first) * c.head_dim;
    for (int i = (int)threadIdx.x; i < heads.n * c.head_dim; i += ATTEND_THREADS) s.q[i] = from[i] * c.scale;
}

template <bool TILED> KVQ_DEVICE void load_keys(const Call &c, const Chunk &chunk, const Shared &s) {
    if (TILED)
        load_tile<true>(c, c.k, chunk, s.source, s.kv);
    else
        load_rows(c, c.k, chunk, s.source, s.kv);
    __syncthreads();
    if (TILED)
        add_tile_outliers(c, c.k, chunk, s.source, s.kv);
    else
        add_row_outliers(c, c.k, chunk, s.source, s.kv);
    __syncthreads();
}

// Tiles of values have no outliers.
template <bool TILED> KVQ_DEVICE void load_values(const Call &c, const Chunk &chunk, const Shared &s) {
    if (TILED) {
        load_tile<false>(c, c.v, chunk, s.source, s.kv);
    } else {
        load_rows(c, c.v, chunk, s.source, s.kv);
        __syncthreads();
        add_row_outliers(c, c.v, chunk, s.source, s.kv);
    }
    __syncthreads();
}

KVQ_DEVICE void rotate_keys(const Call &c, const Chunk &chunk, KVQ_SHARED_PTR(float) kv) {
    if (c.n_pairs == 0) return;
    for (int j = (int)threadIdx.x; j < ATTEND_CHUNK * c.n_pairs; j += ATTEND_THREADS) {
        int t = j / c.n_pairs, i = j % c.n_pairs, at = t * row_stride(c) + i;
        if (chunk.first + t >= chunk.end) continue; // the tables need not reach beyond the sequence
        float2 turn = rope_angle(c.bases, c.offsets, c.n_pairs, chunk.first + t, i);
        float  a = kv[at], b = kv[at + c.n_pairs];
        kv[at] = a * turn.x - b * turn.y;
        kv[at + c.n_pairs] = b * turn.x + a * turn.y;
    }
    __syncthreads();
}

KVQ_DEVICE float score(const Call &c, const Shared &s, int head, int t) {
    float sum = 0;
    for (int i = 0; i < c.head_dim; i++) sum += s.q[head * c.head_dim + i] * s.kv[t * row_stride(c) + i];
    return c.softcap > 0 ? c.softcap * kvq_tanh_f32(sum / c.softcap) : sum;
}

KVQ_DEVICE float largest_of_warp(float x) {
    for (int by = 16; by > 0; by /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, by);
        x = other > x ? other : x;
    }
    return x;
}

KVQ_DEVICE float sum_of_warp(float x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

// Weights of a chunk. A warp takes every fourth head, its lanes are tokens.
template <bool TILED, int HEADS>
KVQ_DEVICE void weigh(const Call &c, const Chunk &chunk, const Heads &heads, const Shared &s, Softmax *softmax) {
    int   t = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, page = s.source[t];
    float scale = TILED ? tile_scale(c.v, chunk, t, page) : 0.0f;
    KVQ_UNROLL
    for (int k = 0; k < (HEADS + 3) / 4; k++) {
        int head = warp + 4 * k;
        if (head >= heads.n) continue; // the whole warp
        float x = page == HIDDEN ? NO_SCORE : score(c, s, head, t), before = softmax[k].largest;
        float largest = largest_of_warp(x);
        largest = before > largest ? before : largest;
        float rescale = kvq_exp_f32(before - largest), p = page == HIDDEN ? 0.0f : kvq_exp_f32(x - largest);
        softmax[k].sum = softmax[k].sum * rescale + sum_of_warp(p);
        softmax[k].largest = largest;
        bool rotated = TILED && page >= 0;
        s.weights[head * ATTEND_CHUNK + t] = rotated ? 0.0f : p;
        if (TILED) s.weights[(HEADS + head) * ATTEND_CHUNK + t] = p * scale;
        if (t == 0) s.rescale[head] = rescale;
    }
}

// sums [ATTEND_KEEPS, HEADS] of this thread's channels, rescaled, and the weighted values of a chunk.
template <int HEADS>
KVQ_DEVICE void add_values(const Call &c, const Shared &s, KVQ_SHARED_PTR(const float) weights,
                           float (&sums)[ATTEND_KEEPS][HEADS]) {
    KVQ_UNROLL
    for (int k = 0; k < ATTEND_KEEPS; k++) {
        int   channel = (int)threadIdx.x + k * ATTEND_THREADS;
        float chunk_sums[HEADS] = {0};
        if (channel >= c.head_dim) continue;
        for (int t = 0; t < ATTEND_CHUNK; t++) {
            float value = s.kv[t * row_stride(c) + channel];
            KVQ_UNROLL
            for (int h = 0; h < HEADS; h++) chunk_sums[h] += weights[h * ATTEND_CHUNK + t] * value;
        }
        KVQ_UNROLL
        for (int h = 0; h < HEADS; h++) sums[k][h] = sums[k][h] * s.rescale[h] + chunk_sums[h];
    }
}

// ---------------------------------------------------------------- what a split leaves

// Its place in the workspace: {largest, sum} of all, then `width` sums of channels of all.
KVQ_DEVICE int64_t part_of(const Call &c, int seq, int head, int split) {
    return ((int64_t)seq * c.n_heads + head) * c.n_splits + split;
}

KVQ_DEVICE int64_t sums_at(const Call &c, int64_t part, int width) {
    return 2 * (int64_t)gridDim.z * c.n_heads * c.n_splits + part * width;
}

template <bool TILED, int HEADS>
KVQ_DEVICE void store_part(const Call &c, const Chunk &chunk, const Heads &heads, const Softmax *softmax,
                           const float (&plain)[ATTEND_KEEPS][HEADS], const float (&rotated)[ATTEND_KEEPS][HEADS],
                           KVQ_GLOBAL_ALIASED(float) parts) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, split = (int)blockIdx.x;
    KVQ_UNROLL
    for (int k = 0; k < (HEADS + 3) / 4; k++) {
        int head = warp + 4 * k;
        if (head >= heads.n || lane != 0) continue;
        int64_t part = part_of(c, chunk.seq, heads.first + head, split);
        parts[2 * part] = softmax[k].largest;
        parts[2 * part + 1] = softmax[k].sum;
    }
    KVQ_UNROLL
    for (int h = 0; h < HEADS; h++) {
        if (h >= heads.n) continue;
        int64_t at = sums_at(c, part_of(c, chunk.seq, heads.first + h, split), (TILED ? 2 : 1) * c.head_dim);
        KVQ_UNROLL
        for (int k = 0; k < ATTEND_KEEPS; k++) {
            int channel = (int)threadIdx.x + k * ATTEND_THREADS;
            if (channel >= c.head_dim) continue;
            parts[at + channel] = plain[k][h];
            if (TILED) parts[at + c.head_dim + channel] = rotated[k][h];
        }
    }
}

// ---------------------------------------------------------------- kernels

// The whole of what a block reads: positions that the query sees, in chunks [first, end) of this split.
struct Range {
    int begin, length, first_chunk, end_chunk;
};

KVQ_DEVICE Range range_of_split(const Call &c, int seq) {
    Range r;
    r.length = min((int)c.lengths[seq], c.max_length);
    r.begin = c.window > 0 && r.length > c.window ? r.length - c.window : 0;
    int first = r.begin / ATTEND_CHUNK, end = (r.length + ATTEND_CHUNK - 1) / ATTEND_CHUNK;
    int per_split = (end - first + c.n_splits - 1) / c.n_splits;
    r.first_chunk = min(first + (int)blockIdx.x * per_split, end);
    r.end_chunk = min(r.first_chunk + per_split, end);
    return r;
}

template <bool TILED, int HEADS>
KVQ_KERNEL KVQ_BOUNDS(ATTEND_THREADS) attend(Call c, KVQ_GLOBAL(const float) q, KVQ_GLOBAL_ALIASED(float) parts) {
    KVQ_SHARED(float, kv, ATTEND_CHUNK *(ATTEND_MAX_DIM | 1));
    KVQ_SHARED(float, queries, HEADS *ATTEND_MAX_DIM);
    KVQ_SHARED(float, weights, 2 * HEADS * ATTEND_CHUNK);
    KVQ_SHARED(float, rescale, HEADS);
    KVQ_SHARED(int, source, ATTEND_CHUNK);
    Shared  s = {kv, queries, weights, rescale, source};
    int     seq = (int)blockIdx.z, kv_head = (int)blockIdx.y / c.blocks_per_group;
    int     group = c.n_heads / c.n_kv_heads, of_group = (int)blockIdx.y % c.blocks_per_group * c.heads_per_block;
    Heads   heads = {kv_head * group + of_group, min(c.heads_per_block, group - of_group)};
    Range   range = range_of_split(c, seq);
    Chunk   chunk = {seq, kv_head, 0, range.begin, range.length, (TILED ? 0 : c.n_sinks) + c.coded[seq]};
    Softmax softmax[(HEADS + 3) / 4];
    float   plain[ATTEND_KEEPS][HEADS] = {{0}}, rotated[ATTEND_KEEPS][HEADS] = {{0}};
    KVQ_UNROLL
    for (int k = 0; k < (HEADS + 3) / 4; k++) softmax[k].largest = NO_SCORE, softmax[k].sum = 0;
    clear_weights<HEADS>(s);
    load_queries(c, q, seq, heads, s);
    for (int i = range.first_chunk; i < range.end_chunk; i++) {
        chunk.first = i * ATTEND_CHUNK;
        find_sources<TILED>(c, chunk, s.source); // all have read those of the last chunk: load_values ends in a barrier
        __syncthreads();                         // nor does anybody read its values any longer
        load_keys<TILED>(c, chunk, s);
        rotate_keys(c, chunk, s.kv);
        weigh<TILED, HEADS>(c, chunk, heads, s, softmax);
        __syncthreads();
        load_values<TILED>(c, chunk, s);
        add_values<HEADS>(c, s, s.weights, plain);
        if (TILED) add_values<HEADS>(c, s, s.weights + HEADS * ATTEND_CHUNK, rotated);
    }
    store_part<TILED, HEADS>(c, chunk, heads, softmax, plain, rotated, parts);
}

// The factor of a split, whose sums are relative to its own largest score. Those of one that saw no token are 0.
KVQ_DEVICE float factor_of_part(KVQ_GLOBAL_ALIASED(const float) parts, int64_t part, float largest) {
    return kvq_exp_f32(parts[2 * part] - largest);
}

// Sum over splits of what `at` says of each, in their order.
KVQ_DEVICE float sum_of_parts(const Call &c, KVQ_GLOBAL_ALIASED(const float) parts, int64_t part, float largest,
                              int64_t at, int step) {
    float sum = 0;
    for (int i = 0; i < c.n_splits; i++)
        sum += factor_of_part(parts, part + i, largest) * parts[at + (int64_t)i * step];
    return sum;
}

template <bool TILED>
KVQ_KERNEL KVQ_BOUNDS(ATTEND_THREADS)
    combine(Call c, KVQ_GLOBAL_ALIASED(const float) parts, KVQ_GLOBAL_ALIASED(float) out) {
    KVQ_SHARED(float, rotated, ATTEND_MAX_DIM);
    int     head = (int)blockIdx.y, seq = (int)blockIdx.z, width = (TILED ? 2 : 1) * c.head_dim;
    int64_t part = part_of(c, seq, head, 0), at = sums_at(c, part, width);
    float   largest = NO_SCORE;
    for (int i = 0; i < c.n_splits; i++) {
        float x = parts[2 * (part + i)];
        largest = x > largest ? x : largest;
    }
    float total = sum_of_parts(c, parts, part, largest, 2 * part + 1, 2);
    for (int i = (int)threadIdx.x; i < c.head_dim && TILED; i += ATTEND_THREADS)
        rotated[i] = sum_of_parts(c, parts, part, largest, at + c.head_dim + i, width);
    __syncthreads();
    for (int j = (int)threadIdx.x; j < c.head_dim; j += ATTEND_THREADS) {
        float sum = 0;
        for (int i = 0; i < c.head_dim && TILED; i++) sum += c.v.tiles.rotation[i * c.head_dim + j] * rotated[i];
        sum += sum_of_parts(c, parts, part, largest, at + j, width);
        out[((int64_t)seq * c.n_heads + head) * c.head_dim + j] = c.lengths[seq] > 0 ? sum / total : 0.0f;
    }
}

// ---------------------------------------------------------------- launchers

template <bool TILED> static void launch(const Call &c, dim3 grid, const float *q, float *parts, kvq_stream stream) {
    if (c.heads_per_block == 1)
        KVQ_LAUNCH((attend<TILED, 1>), grid, ATTEND_THREADS, 0, stream, c, q, parts);
    else if (c.heads_per_block <= 4)
        KVQ_LAUNCH((attend<TILED, 4>), grid, ATTEND_THREADS, 0, stream, c, q, parts);
    else
        KVQ_LAUNCH((attend<TILED, 8>), grid, ATTEND_THREADS, 0, stream, c, q, parts);
}

void attention_launch(const Call &c, bool tiled, int n_seqs, const float *q, float *parts, float *out,
                      kvq_stream stream) {
    dim3 grid((unsigned)c.n_splits, (unsigned)(c.n_kv_heads * c.blocks_per_group), (unsigned)n_seqs);
    dim3 heads(1, (unsigned)c.n_heads, (unsigned)n_seqs);
    if (tiled) {
        launch<true>(c, grid, q, parts, stream);
        KVQ_LAUNCH((combine<true>), heads, ATTEND_THREADS, 0, stream, c, parts, out);
    } else {
        launch<false>(c, grid, q, parts, stream);
        KVQ_LAUNCH((combine<false>), heads, ATTEND_THREADS, 0, stream, c, parts, out);
    }
}
