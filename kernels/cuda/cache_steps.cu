// SPDX-License-Identifier: Apache-2.0
// What an append does on the device beside the codec: tokens to and from f16, lengths, pages. See cache_steps.h.
#include <limits.h>

#include "cache_steps.h"
#include "kvq_block_hd.h"
#include "launch.cuh"

// The half of x, or 0 when f16 cannot hold it, which is noted.
KVQ_DEVICE uint16_t checked_half(float x, int64_t position, KVQ_GLOBAL_ALIASED(int) bad) {
    uint16_t half = kvq_half_of_float(x);
    if (kvq_half_is_finite(half)) return half;
    atomicMin(bad, (int)position);
    return 0;
}

// blockIdx.y is the tensor.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    store_tokens(cache_tokens t, KVQ_GLOBAL(const float) k, KVQ_GLOBAL(const float) v, KVQ_GLOBAL(uint16_t) k_places,
                 KVQ_GLOBAL(uint16_t) v_places, KVQ_GLOBAL_ALIASED(int) bad) {
    int tensor = (int)blockIdx.y;
    for (int64_t i = op_first(); i < t.n * t.d; i += op_stride()) {
        int64_t  token = t.first + i / t.d, at = token % t.n_places * t.d + i % t.d;
        uint16_t half = checked_half(tensor == 0 ? (float)k[i] : (float)v[i], t.shift + token, bad + tensor);
        if (tensor == 0)
            k_places[at] = half;
        else
            v_places[at] = half;
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS)
    stage_tokens(cache_tokens t, KVQ_GLOBAL(const uint16_t) places, KVQ_GLOBAL(const float) x, int64_t new_first,
                 KVQ_GLOBAL(float) staged, KVQ_GLOBAL_ALIASED(int) bad) {
    for (int64_t i = op_first(); i < t.n * t.d; i += op_stride()) {
        int64_t  token = t.first + i / t.d, c = i % t.d;
        uint16_t half = 0;
        if (token < new_first)
            half = places[token % t.n_places * t.d + c];
        else
            half = checked_half(x[(token - new_first) * t.d + c], t.shift + token, bad);
        staged[i] = kvq_float_of_half(half);
    }
}

KVQ_KERNEL advance(KVQ_GLOBAL(int) length, KVQ_GLOBAL(int) coded, KVQ_GLOBAL(int) bad, KVQ_GLOBAL(int) codec_bad,
                   int base, int n, int n_coded) {
    for (int i = 0; i < 2; i++) {
        int index = codec_bad[i];
        if (index == INT_MAX) continue;
        if (base + index < bad[i]) bad[i] = base + index;
        codec_bad[i] = INT_MAX;
    }
    length[0] = n;
    coded[0] = n_coded;
}

KVQ_KERNEL forget(KVQ_GLOBAL(int) length, KVQ_GLOBAL(int) coded, KVQ_GLOBAL(int) bad) {
    length[0] = 0;
    coded[0] = 0;
    for (int i = 0; i < 2; i++) bad[i] = INT_MAX;
}

KVQ_KERNEL map_pages(KVQ_GLOBAL(int) table, int page, int n) {
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        table[i] = page + i;
}

// ---------------------------------------------------------------- launches

extern "C" {

kvq_status cache_store(const cache_tokens *t, const float *const x[2], uint16_t *const places[2], int32_t *bad,
                       void *stream, kvq_error *err) {
    if (t->n <= 0) return KVQ_OK;
    KVQ_LAUNCH(store_tokens, dim3(op_blocks_of_elements(t->n * t->d), 2), OP_THREADS, 0, op_stream(stream), *t, x[0],
               x[1], places[0], places[1], bad);
    return op_launched("store_tokens", err);
}

kvq_status cache_stage(const cache_tokens *t, const uint16_t *places, const float *x, int64_t new_first, float *staged,
                       int32_t *bad, void *stream, kvq_error *err) {
    if (t->n <= 0) return KVQ_OK;
    KVQ_LAUNCH(stage_tokens, op_blocks_of_elements(t->n * t->d), OP_THREADS, 0, op_stream(stream), *t, places, x,
               new_first, staged, bad);
    return op_launched("stage_tokens", err);
}

kvq_status cache_advance(const cache_state *s, int64_t base, int64_t length, int64_t coded, void *stream,
                         kvq_error *err) {
    KVQ_LAUNCH(advance, 1, 1, 0, op_stream(stream), s->length, s->coded, s->bad, s->codec_bad, (int)base, (int)length,
               (int)coded);
    return op_launched("advance", err);
}

kvq_status cache_forget(const cache_state *s, void *stream, kvq_error *err) {
    KVQ_LAUNCH(forget, 1, 1, 0, op_stream(stream), s->length, s->coded, s->bad);
    return op_launched("forget", err);
}

kvq_status cache_map(int32_t *table, int64_t page, int64_t n, void *stream, kvq_error *err) {
    if (n <= 0) return KVQ_OK;
    KVQ_LAUNCH(map_pages, op_blocks_of_elements(n), OP_THREADS, 0, op_stream(stream), table, (int)page, (int)n);
    return op_launched("map_pages", err);
}

} // extern "C"
