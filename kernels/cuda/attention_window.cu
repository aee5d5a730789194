// SPDX-License-Identifier: Apache-2.0
//
// Causal attention of one window and its gradients, in tiles of 64 queries and 64 keys: scores never leave the block,
// so memory grows with S (Dao et al., FlashAttention, 2022). Sums run over tiles in their order and nothing is added by
// atomics, so every run gives the same bits.
//
//   forward   a block per (query tile, head, slice of 128 channels); softmax is kept relative to the maximum so far
//   backward  1. statistics of every row: maximum, 1 / sum, and out . dout, which is sum_j p_j dp_j
//             2. dq, a block per (query tile, head, slice)
//             3. dk and dv, a block per (key tile, KV head, slice), which goes through the query heads of its group one
//                after the other
// Slices bound the registers: heads wider than 128 have their scores computed once per slice. Work is 2 (forward) and 7
// products of S^2 D / 2; the largest blocks are started first.
//
// A second set is a second pass over the tiles that need it: a key is hidden in the pass of the set that its query does
// not read it from.
#include <math.h>

#include "kvq_cuda_ops.h"
#include "kvq_exp_hd.h"
#include "tile_product.cuh"

typedef kvq_attention_shape window_shape;

KVQ_DEVICE int     smaller(int a, int b) { return a < b ? a : b; }
KVQ_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------- scores

// Whether query i reads key j, from the second set if `from_second`; begin: the first that it reads from there.
KVQ_DEVICE bool reads(const window_shape &s, int i, int j, int begin, bool from_second) {
    return i < s.n_tokens && j <= i && (s.window <= 0 || i - j < s.window) && (j >= begin) == from_second;
}

// Sum of a query's and a key's products -> score, and the derivative of its cap
KVQ_DEVICE float score_of(const window_shape &s, float sum, float *slope) {
    float score = sum * s.scale;
    *slope = 1.0f;
    if (s.softcap <= 0) return score;
    float t = kvq_tanh_f32(score / s.softcap);
    *slope = 1.0f - t * t;
    return s.softcap * t;
}

// The 16 threads that share rows.
KVQ_DEVICE float maximum_of_row(float x) {
    for (int by = TILE_SIDE / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
    return x;
}
KVQ_DEVICE float sum_of_row(float x) {
    for (int by = TILE_SIDE / 2; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

// Row i of a thread in a softmax over tiles: scores relative to `maximum`, of which `sum` is that of the exponentials.
typedef struct running_row {
    float maximum, sum;
} running_row;

// Takes a tile's scores of one row, of which a thread has four: x becomes their exponentials, 0 where not visible.
// Returns the factor for what was summed with the maximum before.
KVQ_DEVICE float take_scores(running_row *row, float *x, const bool *visible) {
    float top = row->maximum, sum = 0;
    KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) top = visible[j] ? fmaxf(top, x[j]) : top;
    top = maximum_of_row(top);
    float factor = top == -INFINITY ? 1.0f : kvq_exp_f32(row->maximum - top); // nothing seen yet: nothing to scale
    KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) {
        x[j] = visible[j] ? kvq_exp_f32(x[j] - top) : 0.0f;
        sum += x[j];
    }
    row->maximum = top;
    row->sum = row->sum * factor + sum_of_row(sum);
    return factor;
}

// ---------------------------------------------------------------- a tile of queries

// What a block of queries has to do: its head and rows, and the keys that it sees, from a whole tile on.
typedef struct query_tile {
    int first, rows, head, kv_head, first_key, end_key, channel, width; // channel, width: of the slice
} query_tile;

KVQ_DEVICE query_tile query_tile_of_block(const window_shape &s) {
    query_tile t;
    t.first = (int)(gridDim.x - 1 - blockIdx.x) * TILE;
    t.rows = smaller(TILE, (int)s.n_tokens - t.first);
    t.head = (int)blockIdx.y;
    t.kv_head = t.head / (s.n_heads / s.n_kv_heads);
    t.first_key = s.window > 0 ? (int)larger(0, t.first - s.window + 1) / TILE * TILE : 0;
    t.end_key = t.first + t.rows;
    t.channel = (int)blockIdx.z * TILE_SLICE;
    t.width = smaller(TILE_SLICE, s.head_dim - t.channel);
    return t;
}

KVQ_DEVICE int64_t q_stride(const window_shape &s) { return (int64_t)s.n_heads * s.head_dim; }
KVQ_DEVICE int64_t kv_stride(const window_shape &s) { return (int64_t)s.n_kv_heads * s.head_dim; }

// Where a head begins in a row of q or k.
KVQ_DEVICE int64_t q_at(const window_shape &s, int token, int head) {
    return token * q_stride(s) + (int64_t)head * s.head_dim;
}
KVQ_DEVICE int64_t kv_at(const window_shape &s, int token, int head) {
    return token * kv_stride(s) + (int64_t)head * s.head_dim;
}

// x [4][4] of the tile of keys from `key` on: exponentials of its scores relative to the rows' maxima; factors [4].
KVQ_DEVICE void take_tile(const window_shape &s, const query_tile &t, KVQ_GLOBAL(const float) q,
                          KVQ_GLOBAL(const float) k, int key, bool from_second, KVQ_SHARED_PTR(float) a_part,
                          KVQ_SHARED_PTR(float) b_part, running_row *rows, float (*x)[TILE_EACH], float *factors) {
    tile_products(q + q_at(s, t.first, t.head), q_stride(s), t.rows, k + kv_at(s, key, t.kv_head), kv_stride(s),
                  smaller(TILE, t.end_key - key), s.head_dim, a_part, b_part, x);
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        int  query = t.first + tile_y() + TILE_SIDE * i, begin = (int)kvq_second_set_begin(&s.second, query);
        bool visible[TILE_EACH];
        KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) {
            float slope;
            x[i][j] = score_of(s, x[i][j], &slope);
            visible[j] = reads(s, query, key + tile_x() + TILE_SIDE * j, begin, from_second);
        }
        factors[i] = take_scores(&rows[i], x[i], visible);
    }
}

KVQ_DEVICE void start_rows(running_row *rows) {
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) rows[i].maximum = -INFINITY, rows[i].sum = 0;
}

// Whether some query of a tile reads a key of the tile at `key` from the set. What it begins with does not fall from
// one query to the next.
KVQ_DEVICE bool set_is_read(const window_shape &s, const query_tile &t, int key, bool second) {
    if (!kvq_second_set_used(&s.second)) return !second;
    if (second) return smaller(key + TILE, t.end_key) > kvq_second_set_begin(&s.second, t.first);
    return key < kvq_second_set_begin(&s.second, t.first + t.rows - 1);
}

// ---------------------------------------------------------------- forward

KVQ_KERNEL OP_BOUNDS attention(window_shape s, KVQ_GLOBAL(const float) q, KVQ_GLOBAL(const float) k,
                               KVQ_GLOBAL(const float) v, KVQ_GLOBAL(const float) k_second,
                               KVQ_GLOBAL(const float) v_second, KVQ_GLOBAL(float) out) {
    KVQ_SHARED(float, a_part, TILE_SHARED);
    KVQ_SHARED(float, b_part, TILE_SHARED);
    KVQ_SHARED(float, weights, TILE_SQUARE);
    query_tile  t = query_tile_of_block(s);
    running_row rows[TILE_EACH];
    float       sums[TILE_EACH][TILE_SLICE_EACH] = {};
    start_rows(rows);
    for (int pass = 2 * (t.first_key / TILE); pass < 2 * ((t.end_key + TILE - 1) / TILE); pass++) {
        int  key = pass / 2 * TILE;
        bool second = pass % 2 == 1;
        if (!set_is_read(s, t, key, second)) continue; // for all threads
        float x[TILE_EACH][TILE_EACH] = {}, factors[TILE_EACH];
        take_tile(s, t, q, second ? k_second : k, key, second, a_part, b_part, rows, x, factors);
        KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
            KVQ_UNROLL for (int j = 0; j < TILE_SLICE_EACH; j++) sums[i][j] *= factors[i];
            KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++)
                weights[(tile_y() + TILE_SIDE * i) * TILE_SQUARE_ROW + tile_x() + TILE_SIDE * j] = x[i][j];
        }
        tile_mix(weights, (second ? v_second : v) + kv_at(s, key, t.kv_head) + t.channel, kv_stride(s),
                 smaller(TILE, t.end_key - key), t.width, b_part, sums);
    }
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        int row = tile_y() + TILE_SIDE * i;
        KVQ_UNROLL for (int j = 0; j < TILE_SLICE_EACH; j++) {
            int c = tile_x() + TILE_SIDE * j;
            if (row < t.rows && c < t.width)
                out[q_at(s, t.first + row, t.head) + t.channel + c] = sums[i][j] / rows[i].sum;
        }
    }
}

// ---------------------------------------------------------------- backward

// Of each row: [H, S] each, one behind the other in scratch.
typedef struct statistics_at {
    int64_t maximum, inverse, center;
} statistics_at;

KVQ_DEVICE statistics_at statistics_of(const window_shape &s, int head, int64_t query) {
    int64_t       n = s.n_heads * s.n_tokens, at = head * s.n_tokens + query;
    statistics_at where = {at, n + at, 2 * n + at};
    return where;
}

// out . dout of a row, in f64 and in the order of the CPU
KVQ_DEVICE float dot_of_row(KVQ_GLOBAL(const float) out, KVQ_GLOBAL(const float) dout, int64_t at, int head_dim) {
    double sum = 0;
    for (int c = 0; c < head_dim; c++) sum += (double)out[at + c] * (double)dout[at + c];
    return (float)sum;
}

KVQ_KERNEL OP_BOUNDS statistics(window_shape s, KVQ_GLOBAL(const float) q, KVQ_GLOBAL(const float) k,
                                KVQ_GLOBAL(const float) out, KVQ_GLOBAL(const float) dout, KVQ_GLOBAL(float) scratch) {
    KVQ_SHARED(float, a_part, TILE_SHARED);
    KVQ_SHARED(float, b_part, TILE_SHARED);
    query_tile  t = query_tile_of_block(s);
    running_row rows[TILE_EACH];
    start_rows(rows);
    for (int key = t.first_key; key < t.end_key; key += TILE) {
        float x[TILE_EACH][TILE_EACH] = {}, factors[TILE_EACH];
        take_tile(s, t, q, k, key, false, a_part, b_part, rows, x, factors);
    }
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        int row = tile_y() + TILE_SIDE * i;
        if (row >= t.rows || tile_x() != 0) continue;
        statistics_at at = statistics_of(s, t.head, t.first + row);
        scratch[at.maximum] = rows[i].maximum;
        scratch[at.inverse] = 1.0f / rows[i].sum;
    }
    if ((int)threadIdx.x >= t.rows) return;
    int query = t.first + (int)threadIdx.x;
    scratch[statistics_of(s, t.head, query).center] = dot_of_row(out, dout, q_at(s, query, t.head), s.head_dim);
}

// A sum of products and that of dout and v -> probability, and the gradient of the product: p (dp - center) scale slope
KVQ_DEVICE float probability_of(const window_shape &s, float sum, float dp, float maximum, float inverse, float center,
                                float *gradient) {
    float slope, p = kvq_exp_f32(score_of(s, sum, &slope) - maximum) * inverse;
    *gradient = p * (dp - center) * s.scale * slope;
    return p;
}

KVQ_KERNEL OP_BOUNDS query_gradient(window_shape s, KVQ_GLOBAL(const float) q, KVQ_GLOBAL(const float) k,
                                    KVQ_GLOBAL(const float) v, KVQ_GLOBAL(const float) dout,
                                    KVQ_GLOBAL(const float) scratch, KVQ_GLOBAL(float) dq) {
    KVQ_SHARED(float, a_part, TILE_SHARED);
    KVQ_SHARED(float, b_part, TILE_SHARED);
    KVQ_SHARED(float, weights, TILE_SQUARE);
    query_tile t = query_tile_of_block(s);
    int64_t    at = q_at(s, t.first, t.head);
    float      sums[TILE_EACH][TILE_SLICE_EACH] = {};
    for (int key = t.first_key; key < t.end_key; key += TILE) {
        float   x[TILE_EACH][TILE_EACH] = {}, dp[TILE_EACH][TILE_EACH] = {};
        int     n_keys = smaller(TILE, t.end_key - key);
        int64_t from = kv_at(s, key, t.kv_head);
        tile_products(q + at, q_stride(s), t.rows, k + from, kv_stride(s), n_keys, s.head_dim, a_part, b_part, x);
        tile_products(dout + at, q_stride(s), t.rows, v + from, kv_stride(s), n_keys, s.head_dim, a_part, b_part, dp);
        KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
            int           row = tile_y() + TILE_SIDE * i;
            statistics_at where = statistics_of(s, t.head, t.first + smaller(row, t.rows - 1));
            float maximum = scratch[where.maximum], inverse = scratch[where.inverse], center = scratch[where.center];
            KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) {
                int   column = tile_x() + TILE_SIDE * j;
                float gradient;
                (void)probability_of(s, x[i][j], dp[i][j], maximum, inverse, center, &gradient);
                bool visible = reads(s, t.first + row, key + column, t.end_key, false);
                weights[row * TILE_SQUARE_ROW + column] = visible ? gradient : 0.0f;
            }
        }
        tile_mix(weights, k + from + t.channel, kv_stride(s), n_keys, t.width, b_part, sums);
    }
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        int row = tile_y() + TILE_SIDE * i;
        KVQ_UNROLL for (int j = 0; j < TILE_SLICE_EACH; j++) {
            int c = tile_x() + TILE_SIDE * j;
            if (row < t.rows && c < t.width) dq[at + row * q_stride(s) + t.channel + c] = sums[i][j];
        }
    }
}

// What a block of keys has to do: rows of K and V, and the queries that see some of them.
typedef struct key_tile {
    int first, rows, kv_head, end_query, channel, width;
} key_tile;

KVQ_DEVICE key_tile key_tile_of_block(const window_shape &s) {
    key_tile t;
    t.first = (int)blockIdx.x * TILE;
    t.rows = smaller(TILE, (int)s.n_tokens - t.first);
    t.kv_head = (int)blockIdx.y;
    t.end_query = (int)s.n_tokens;
    if (s.window > 0 && s.window < s.n_tokens) t.end_query = smaller(t.end_query, t.first + t.rows - 1 + (int)s.window);
    t.channel = (int)blockIdx.z * TILE_SLICE;
    t.width = smaller(TILE_SLICE, s.head_dim - t.channel);
    return t;
}

// Adds what the tile of queries from `query` on gives to dk and dv; in shared memory keys are rows and queries columns.
KVQ_DEVICE void add_key_gradients(const window_shape &s, const key_tile &t, int head, int query,
                                  KVQ_GLOBAL(const float) q, KVQ_GLOBAL(const float) k, KVQ_GLOBAL(const float) v,
                                  KVQ_GLOBAL(const float) dout, KVQ_GLOBAL(const float) scratch,
                                  KVQ_SHARED_PTR(float) a_part, KVQ_SHARED_PTR(float) b_part,
                                  KVQ_SHARED_PTR(float) weights, float (*dk)[TILE_SLICE_EACH],
                                  float (*dv)[TILE_SLICE_EACH]) {
    float   x[TILE_EACH][TILE_EACH] = {}, dp[TILE_EACH][TILE_EACH] = {};
    int     n_queries = smaller(TILE, t.end_query - query);
    int64_t to = kv_at(s, t.first, t.kv_head), from = q_at(s, query, head);
    tile_products(k + to, kv_stride(s), t.rows, q + from, q_stride(s), n_queries, s.head_dim, a_part, b_part, x);
    tile_products(v + to, kv_stride(s), t.rows, dout + from, q_stride(s), n_queries, s.head_dim, a_part, b_part, dp);
    KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++) {
        int           column = tile_x() + TILE_SIDE * j;
        statistics_at where = statistics_of(s, head, query + smaller(column, n_queries - 1));
        float maximum = scratch[where.maximum], inverse = scratch[where.inverse], center = scratch[where.center];
        KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
            int   row = tile_y() + TILE_SIDE * i;
            float gradient, p = probability_of(s, x[i][j], dp[i][j], maximum, inverse, center, &gradient);
            bool  visible = column < n_queries && reads(s, query + column, t.first + row, t.end_query, false);
            weights[row * TILE_SQUARE_ROW + column] = visible ? p : 0.0f;
            dp[i][j] = visible ? gradient : 0.0f;
        }
    }
    tile_mix(weights, dout + from + t.channel, q_stride(s), n_queries, t.width, b_part, dv);
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        KVQ_UNROLL for (int j = 0; j < TILE_EACH; j++)
            weights[(tile_y() + TILE_SIDE * i) * TILE_SQUARE_ROW + tile_x() + TILE_SIDE * j] = dp[i][j];
    }
    tile_mix(weights, q + from + t.channel, q_stride(s), n_queries, t.width, b_part, dk);
}

KVQ_KERNEL OP_BOUNDS key_gradients(window_shape s, KVQ_GLOBAL(const float) q, KVQ_GLOBAL(const float) k,
                                   KVQ_GLOBAL(const float) v, KVQ_GLOBAL(const float) dout,
                                   KVQ_GLOBAL(const float) scratch, KVQ_GLOBAL(float) dk, KVQ_GLOBAL(float) dv) {
    KVQ_SHARED(float, a_part, TILE_SHARED);
    KVQ_SHARED(float, b_part, TILE_SHARED);
    KVQ_SHARED(float, weights, TILE_SQUARE);
    key_tile t = key_tile_of_block(s);
    int      group = s.n_heads / s.n_kv_heads;
    float    k_sums[TILE_EACH][TILE_SLICE_EACH] = {}, v_sums[TILE_EACH][TILE_SLICE_EACH] = {};
    for (int head = t.kv_head * group; head < (t.kv_head + 1) * group; head++) {
        for (int query = t.first; query < t.end_query; query += TILE)
            add_key_gradients(s, t, head, query, q, k, v, dout, scratch, a_part, b_part, weights, k_sums, v_sums);
    }
    KVQ_UNROLL for (int i = 0; i < TILE_EACH; i++) {
        int row = tile_y() + TILE_SIDE * i;
        KVQ_UNROLL for (int j = 0; j < TILE_SLICE_EACH; j++) {
            int     c = tile_x() + TILE_SIDE * j;
            int64_t at = kv_at(s, t.first + row, t.kv_head) + t.channel + c;
            if (row < t.rows && c < t.width) dk[at] = k_sums[i][j], dv[at] = v_sums[i][j];
        }
    }
}

// ---------------------------------------------------------------- launches

static dim3 grid_of(const window_shape *s, int n_heads, bool sliced) {
    unsigned n_slices = sliced ? (unsigned)(s->head_dim + TILE_SLICE - 1) / TILE_SLICE : 1;
    return dim3((unsigned)((s->n_tokens + TILE - 1) / TILE), (unsigned)n_heads, n_slices);
}

extern "C" {

int64_t kvq_cuda_window_scratch_floats(const kvq_attention_shape *shape, bool backward) {
    return backward ? 3 * shape->n_tokens * shape->n_heads : 0;
}

kvq_status kvq_cuda_window_attention(const kvq_attention_shape *shape, const float *q, const float *k, const float *v,
                                     const float *k_recent, const float *v_recent, float *out, void *stream,
                                     kvq_error *err) {
    if (shape->n_tokens <= 0) return KVQ_OK;
    KVQ_LAUNCH(attention, grid_of(shape, shape->n_heads, true), OP_THREADS, 0, op_stream(stream), *shape, q, k, v,
               k_recent, v_recent, out);
    return op_launched("attention", err);
}

kvq_status kvq_cuda_window_attention_backward(const kvq_attention_shape *shape, const float *q, const float *k,
                                              const float *v, const float *out, const float *dout, float *dq, float *dk,
                                              float *dv, float *scratch, void *stream, kvq_error *err) {
    kvq_attention_shape s = *shape;
    if (s.n_tokens <= 0) return KVQ_OK;
    s.second.recent = s.second.tile = s.second.prompt = 0;
    KVQ_LAUNCH(statistics, grid_of(&s, s.n_heads, false), OP_THREADS, 0, op_stream(stream), s, q, k, out, dout,
               scratch);
    KVQ_LAUNCH(query_gradient, grid_of(&s, s.n_heads, true), OP_THREADS, 0, op_stream(stream), s, q, k, v, dout,
               scratch, dq);
    KVQ_LAUNCH(key_gradients, grid_of(&s, s.n_kv_heads, true), OP_THREADS, 0, op_stream(stream), s, q, k, v, dout,
               scratch, dk, dv);
    return op_launched("attention_backward", err);
}

} // extern "C"
