// SPDX-License-Identifier: Apache-2.0
// A chunk of tokens in rows (kvq_block_hd.h) as floats in shared memory, the bits that kvq_block_decode gives.
#ifndef KVQ_ATTENTION_ROWS_CUH
#define KVQ_ATTENTION_ROWS_CUH

#include "attention.cuh"

KVQ_DEVICE KVQ_GLOBAL_ALIASED(const uint8_t)
    row_at(const Call &c, const Tensor &x, const Chunk &chunk, int t, int page) {
    int within = stored_index<false>(c, chunk.first + t) % KVQ_TILE_TOKENS;
    return x.pages + (page * x.page_bytes + (int64_t)within * x.rows.row_bytes);
}

KVQ_DEVICE float row_half(KVQ_GLOBAL_ALIASED(const uint8_t) row, int at) {
    return kvq_float_of_half(kvq_as<uint16_t>(row + at)[0]);
}

// What the code of a channel decodes to. A code may straddle two bytes, but none beyond the last one.
KVQ_DEVICE float row_element(const RowTensor &r, KVQ_GLOBAL_ALIASED(const uint8_t) row, int channel) {
    int      at = channel * r.bits, from = at & 7;
    unsigned window = row[at >> 3];
    if (from + r.bits > 8) window |= (unsigned)row[(at >> 3) + 1] << 8;
    int   code = (int)((window >> from) & ((1u << r.bits) - 1u));
    float level = r.levels[(channel / r.width << r.bits) + code];
    float half_range = r.per_token ? row_half(row, r.code_bytes + 2) : (float)r.r[channel];
    float middle = r.per_token ? row_half(row, r.code_bytes) : (float)r.z[channel];
    return level * half_range + middle;
}

// kv [ATTEND_CHUNK, row_stride]: tokens of the chunk without outliers, 0 where hidden.
KVQ_DEVICE void load_rows(const Call &c, const Tensor &x, const Chunk &chunk, KVQ_SHARED_PTR(const int) source,
                          KVQ_SHARED_PTR(float) kv) {
    for (int i = (int)threadIdx.x; i < ATTEND_CHUNK * c.head_dim; i += ATTEND_THREADS) {
        int   t = i / c.head_dim, k = i % c.head_dim, channel = chunk.kv_head * c.head_dim + k, page = source[t];
        float value = 0;
        if (page >= 0) value = row_element(x.rows, row_at(c, x, chunk, t, page), channel);
        if (page == IN_HALVES) value = half_at<false>(c, x, chunk.seq, chunk.first + t, channel);
        kv[t * row_stride(c) + k] = value;
    }
}

// Adds the residuals of outliers in this head. A row names a channel once, so no two threads meet.
KVQ_DEVICE void add_row_outliers(const Call &c, const Tensor &x, const Chunk &chunk, KVQ_SHARED_PTR(const int) source,
                                 KVQ_SHARED_PTR(float) kv) {
    const RowTensor &r = x.rows;
    int              slots_at = r.code_bytes + (r.per_token ? 4 : 0);
    for (int i = (int)threadIdx.x; i < ATTEND_CHUNK * r.n_slots; i += ATTEND_THREADS) {
        int t = i / r.n_slots, slot = slots_at + 4 * (i % r.n_slots), page = source[t];
        if (page < 0) continue;
        KVQ_GLOBAL_ALIASED(const uint8_t) row = row_at(c, x, chunk, t, page);
        int k = (int)kvq_as<uint16_t>(row + slot)[0] - chunk.kv_head * c.head_dim; // KVQ_NO_CHANNEL is in no head
        if (k >= 0 && k < c.head_dim) kv[t * row_stride(c) + k] += row_half(row, slot + 2);
    }
}

#endif
