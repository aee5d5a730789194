// SPDX-License-Identifier: Apache-2.0
//
// Causal attention of one window in blocks of query rows: scores exist for QUERY_BLOCK rows of one head at a time, so
// memory grows with S and not with S^2. The backward pass recomputes the scores (Dao et al., FlashAttention, 2022,
// without the tiling over keys that a processor with caches does not need).
//
// With a second set, the keys of a block fall into three parts: those that all its queries read from the first set,
// those that all read from the second, and those between them of which both sets are needed: with recent keys or open
// tiles about QUERY_BLOCK, in the one block where a prompt ends all before it.
//
// Forward items are (head, query block). Backward items are query heads that share a KV head, one after the other,
// because their blocks add into the same dK and dV and the order of those sums must be fixed.
#include <math.h>

#include "kernels_impl.h"
#include "kvq_exp_hd.h"

#define QUERY_BLOCK 128
#define F32_LANES   16

typedef struct attention_job {
    kvq_attention_shape shape;
    const float        *q, *k, *v, *k_recent, *v_recent, *out, *dout;
    float              *result, *dq, *dk, *dv; // result: forward output
    float              *scratch;               // per worker
    float              *parts;                 // [n_parts - 1, 2, S, Hkv, D]: dk and dv of all parts but the first
} attention_job;

// The keys that the queries [first, end) of a block can see: [first_key, end). Some query reads a key before recent_end
// from the first set, and one from recent_first on from the second; [recent_first, recent_end) is read from both.
typedef struct query_block {
    int64_t first, end, first_key, recent_first, recent_end;
} query_block;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static query_block block_at(const kvq_attention_shape *s, int64_t index) {
    query_block b = {.first = index * QUERY_BLOCK};
    b.end = b.first + QUERY_BLOCK < s->n_tokens ? b.first + QUERY_BLOCK : s->n_tokens;
    b.first_key = s->window > 0 && b.first >= s->window ? b.first - s->window + 1 : 0;
    b.recent_first = b.recent_end = b.end;
    if (kvq_second_set_used(&s->second)) {
        b.recent_first = larger(kvq_second_set_begin(&s->second, b.first), b.first_key);
        b.recent_end = larger(kvq_second_set_begin(&s->second, b.end - 1), b.first_key);
    }
    return b;
}

static int64_t n_blocks(const kvq_attention_shape *s) { return (s->n_tokens + QUERY_BLOCK - 1) / QUERY_BLOCK; }
static int64_t kv_head_of(const kvq_attention_shape *s, int64_t head) { return head / (s->n_heads / s->n_kv_heads); }

static float row_maximum(const float *x, int64_t n) {
    float   lane[F32_LANES], best = x[0];
    int64_t i = 0;
    for (int j = 0; j < F32_LANES; j++) lane[j] = x[0];
    for (; i + F32_LANES <= n; i += F32_LANES) {
        for (int j = 0; j < F32_LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    }
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    for (int j = 0; j < F32_LANES; j++) best = lane[j] > best ? lane[j] : best;
    return best;
}

// x [n] -> exp(x - maximum), returns the sum
static float exponentials(float *x, int64_t n, float maximum) {
    float   lane[F32_LANES] = {0};
    int64_t i = 0;
    for (; i + F32_LANES <= n; i += F32_LANES) {
        for (int j = 0; j < F32_LANES; j++) {
            x[i + j] = kvq_exp_f32(x[i + j] - maximum);
            lane[j] += x[i + j];
        }
    }
    for (int j = 0; i < n; i++, j++) {
        x[i] = kvq_exp_f32(x[i] - maximum);
        lane[j] += x[i];
    }
    for (int width = F32_LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    }
    return lane[0];
}

// x [n] -> cap * tanh(x / cap); slope (NULL = not wanted) receives the derivative
static void cap_scores(float cap, float *x, float *slope, int64_t n) {
    for (int64_t j = 0; j < n; j++) x[j] = kvq_tanh_f32(x[j] / cap);
    for (int64_t j = 0; slope != NULL && j < n; j++) slope[j] = 1.0f - x[j] * x[j];
    for (int64_t j = 0; j < n; j++) x[j] *= cap;
}

// Keys [from, to) of a row that the query does not see.
static void hide(float *row, float *slope, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) row[j] = 0;
    for (int64_t j = from; slope != NULL && j < to; j++) slope[j] = 0;
}

// One row of scores over keys [first_key, end): probabilities where query i may look, 0 elsewhere. slope: NULL unless
// the scores are capped and their gradient is wanted.
static void softmax_row(const kvq_attention_shape *s, float *row, float *slope, int64_t i, const query_block *b) {
    int64_t first = s->window > 0 && i >= s->window ? i - s->window + 1 : 0, from = first - b->first_key;
    int64_t n = i + 1 - first, keys = b->end - b->first_key;
    float  *visible = row + from;
    if (s->softcap > 0) cap_scores(s->softcap, visible, slope != NULL ? slope + from : NULL, n);
    float inverse = 1.0f / exponentials(visible, n, row_maximum(visible, n));
    for (int64_t j = 0; j < n; j++) visible[j] *= inverse;
    hide(row, slope, 0, from);
    hide(row, slope, from + n, keys);
}

// Where the heads of a call lie.
typedef struct strides {
    int64_t q, kv;
} strides;

static strides strides_of(const kvq_attention_shape *s) {
    return (strides){(int64_t)s->n_heads * s->head_dim, (int64_t)s->n_kv_heads * s->head_dim};
}

// to [rows, n], rows `to_stride` apart = scaled scores of a block's queries with keys [from, from + n) of k
static void scores(const attention_job *job, int64_t head, const query_block *b, const float *k, int64_t from,
                   int64_t n, float *to, int64_t to_stride) {
    const kvq_attention_shape *s = &job->shape;
    strides                    stride = strides_of(s);
    if (n == 0) return;
    kvq_gemm(false, true, b->end - b->first, n, s->head_dim, s->scale,
             job->q + b->first * stride.q + head * s->head_dim, stride.q,
             k + from * stride.kv + kv_head_of(s, head) * s->head_dim, stride.kv, 0.0f, to, to_stride);
}

// The block's output [rows, D] (+)= p [rows, n] V, V being the values [from, from + n) of v; returns whether the next
// product adds to it.
static bool mix(const attention_job *job, int64_t head, const query_block *b, const float *v, int64_t from, int64_t n,
                const float *p, int64_t p_stride, bool add) {
    const kvq_attention_shape *s = &job->shape;
    strides                    stride = strides_of(s);
    if (n == 0) return add;
    kvq_gemm(false, false, b->end - b->first, s->head_dim, n, 1.0f, p, p_stride,
             v + from * stride.kv + kv_head_of(s, head) * s->head_dim, stride.kv, add ? 1.0f : 0.0f,
             job->result + b->first * stride.q + head * s->head_dim, stride.q);
    return true;
}

static void softmax_rows(const kvq_attention_shape *s, const query_block *b, float *p, float *slope) {
    int64_t keys = b->end - b->first_key;
    for (int64_t i = 0; i < b->end - b->first; i++)
        softmax_row(s, p + i * keys, slope != NULL ? slope + i * keys : NULL, b->first + i, b);
}

// p [rows, keys] = softmax(capped(scale * Q K^T)) of one block
static void probabilities(const attention_job *job, int64_t head, const query_block *b, float *p, float *slope) {
    int64_t keys = b->end - b->first_key;
    scores(job, head, b, job->k, b->first_key, keys, p, keys);
    softmax_rows(&job->shape, b, p, slope);
}

// Between the parts, the first key that query i reads from the second set, as a column of `both`.
static int64_t first_recent_column(const attention_job *job, const query_block *b, int64_t i) {
    return larger(kvq_second_set_begin(&job->shape.second, i) - b->recent_first, 0);
}

// One block of a call with recent keys. p [rows, keys] holds all scores of a row, so that softmax sees one row as ever;
// both [rows, n_both] the second set's in between.
static void attend_to_both(const attention_job *job, int64_t head, const query_block *b, float *p, float *both) {
    int64_t keys = b->end - b->first_key, n_both = b->recent_end - b->recent_first, rows = b->end - b->first;
    int64_t n_first = b->recent_end - b->first_key, at = b->recent_first - b->first_key;
    bool    add = false;
    scores(job, head, b, job->k, b->first_key, n_first, p, keys);
    scores(job, head, b, job->k_recent, b->recent_end, keys - n_first, p + n_first, keys);
    scores(job, head, b, job->k_recent, b->recent_first, n_both, both, n_both);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = first_recent_column(job, b, b->first + i); j < n_both; j++)
            p[i * keys + at + j] = both[i * n_both + j];
    }
    softmax_rows(&job->shape, b, p, NULL);
    for (int64_t i = 0; i < rows; i++) { // what one set has of a row, the other must not have
        int64_t column = first_recent_column(job, b, b->first + i);
        for (int64_t j = 0; j < n_both; j++) {
            both[i * n_both + j] = j >= column ? p[i * keys + at + j] : 0.0f;
            p[i * keys + at + j] = j >= column ? 0.0f : p[i * keys + at + j];
        }
    }
    add = mix(job, head, b, job->v, b->first_key, n_first, p, keys, add);
    add = mix(job, head, b, job->v_recent, b->recent_first, n_both, both, n_both, add);
    (void)mix(job, head, b, job->v_recent, b->recent_end, keys - n_first, p + n_first, keys, add);
}

static int64_t forward_floats(const kvq_attention_shape *s) { // of a worker
    return (kvq_second_set_used(&s->second) ? 2 : 1) * QUERY_BLOCK * s->n_tokens;
}

static void attention_item(void *user, int64_t item, int worker) {
    const attention_job       *job = user;
    const kvq_attention_shape *s = &job->shape;
    query_block                b = block_at(s, item % n_blocks(s));
    int64_t                    head = item / n_blocks(s), keys = b.end - b.first_key;
    float                     *p = job->scratch + worker * forward_floats(s);
    if (kvq_second_set_used(&s->second)) {
        attend_to_both(job, head, &b, p, p + QUERY_BLOCK * s->n_tokens);
        return;
    }
    probabilities(job, head, &b, p, NULL);
    (void)mix(job, head, &b, job->v, b.first_key, keys, p, keys, false);
}

void kvq_attention_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                       const float *v, const float *k_recent, const float *v_recent, float *out, float *scratch) {
    attention_job         job = {.shape = *shape,
                                 .q = q,
                                 .k = k,
                                 .v = v,
                                 .k_recent = k_recent,
                                 .v_recent = v_recent,
                                 .result = out,
                                 .scratch = scratch};
    const kvq_second_set *second = &shape->second;
    if (second->recent >= shape->n_tokens || second->prompt >= shape->n_tokens ||
        (shape->window > 0 && second->recent >= shape->window)) {
        job.k = k_recent; // no query sees the first set
        job.v = v_recent;
        job.shape.second = (kvq_second_set){.recent = 0};
    }
    kvq_parallel_for(be->ctx, n_blocks(shape) * shape->n_heads, attention_item, &job);
}

// ---------------------------------------------------------------- backward

// A capped score needs room for its derivative beside p and dp.
static int64_t backward_blocks(const kvq_attention_shape *s) { return s->softcap > 0 ? 3 : 2; }

// Items of the backward pass: the query heads of a KV head, cut into parts so that there are some 16 items (what a
// machine with that many cores keeps busy) where there are heads enough. The first part adds into dk and dv, each other
// one into arrays of its own.
static int64_t n_parts(const kvq_attention_shape *s) {
    int64_t group = s->n_heads / s->n_kv_heads, wanted = (16 + s->n_kv_heads - 1) / s->n_kv_heads;
    return wanted < group ? wanted : group;
}

// ds = p * (dp - sum_j p_j dp_j) * scale * slope, in place of dp; the sum equals the dot product of the row's output
// and its gradient, which costs D instead of S operations.
static void score_gradient(const attention_job *job, int64_t head, const query_block *b, const float *p,
                           const float *slope, float *dp) {
    const kvq_attention_shape *s = &job->shape;
    int64_t                    stride = (int64_t)s->n_heads * s->head_dim, keys = b->end - b->first_key;
    for (int64_t i = b->first; i < b->end; i++) {
        const float *out = job->out + i * stride + head * s->head_dim,
                    *dout = job->dout + i * stride + head * s->head_dim;
        double dot = 0;
        for (int c = 0; c < s->head_dim; c++) dot += (double)out[c] * (double)dout[c];
        float        center = (float)dot;
        const float *p_row = p + (i - b->first) * keys;
        float       *ds = dp + (i - b->first) * keys;
        for (int64_t j = 0; j < keys; j++) ds[j] = p_row[j] * (ds[j] - center) * s->scale;
        for (int64_t j = 0; slope != NULL && j < keys; j++) ds[j] *= slope[(i - b->first) * keys + j];
    }
}

// One query head: overwrites its part of dq, adds to dk and dv of its KV head.
static void attention_backward_head(const attention_job *job, int64_t head, float *scratch, float *dk, float *dv) {
    const kvq_attention_shape *s = &job->shape;
    int64_t D = s->head_dim, q_stride = s->n_heads * D, k_stride = s->n_kv_heads * D, block = QUERY_BLOCK * s->n_tokens;
    float  *p = scratch, *dp = p + block, *slope = s->softcap > 0 ? dp + block : NULL;
    for (int64_t index = 0; index < n_blocks(s); index++) {
        query_block b = block_at(s, index);
        int64_t     rows = b.end - b.first, keys = b.end - b.first_key,
                kv_at = b.first_key * k_stride + kv_head_of(s, head) * D;
        int64_t      q_at = b.first * q_stride + head * D;
        const float *dout = job->dout + q_at;
        probabilities(job, head, &b, p, slope);
        kvq_gemm(false, true, rows, keys, D, 1.0f, dout, q_stride, job->v + kv_at, k_stride, 0.0f, dp, keys);
        score_gradient(job, head, &b, p, slope, dp);
        kvq_gemm(false, false, rows, D, keys, 1.0f, dp, keys, job->k + kv_at, k_stride, 0.0f, job->dq + q_at, q_stride);
        kvq_gemm(true, false, keys, D, rows, 1.0f, dp, keys, job->q + q_at, q_stride, 1.0f, dk + kv_at, k_stride);
        kvq_gemm(true, false, keys, D, rows, 1.0f, p, keys, dout, q_stride, 1.0f, dv + kv_at, k_stride);
    }
}

static int64_t kv_floats(const kvq_attention_shape *s) { return s->n_tokens * s->n_kv_heads * s->head_dim; }

static void attention_backward_item(void *user, int64_t item, int worker) {
    const attention_job       *job = user;
    const kvq_attention_shape *s = &job->shape;
    int64_t parts = n_parts(s), kv_head = item / parts, part = item % parts, group = s->n_heads / s->n_kv_heads;
    int64_t stride = (int64_t)s->n_kv_heads * s->head_dim;
    float  *scratch = job->scratch + worker * backward_blocks(s) * QUERY_BLOCK * s->n_tokens;
    float  *dk = job->dk, *dv = job->dv;
    if (part > 0) {
        dk = job->parts + 2 * (part - 1) * kv_floats(s);
        dv = dk + kv_floats(s);
    }
    for (int64_t t = 0; t < s->n_tokens; t++) {
        int64_t at = t * stride + kv_head * s->head_dim;
        for (int c = 0; c < s->head_dim; c++) dk[at + c] = dv[at + c] = 0;
    }
    for (int64_t head = group * part / parts; head < group * (part + 1) / parts; head++)
        attention_backward_head(job, kv_head * group + head, scratch, dk, dv);
}

// One token of dk and dv: the parts are added in order.
static void add_parts(void *user, int64_t token, int worker) {
    const attention_job *job = user;
    int64_t              d = (int64_t)job->shape.n_kv_heads * job->shape.head_dim, n = kv_floats(&job->shape);
    float               *dk = job->dk + token * d, *dv = job->dv + token * d;
    (void)worker;
    for (int64_t part = 1; part < n_parts(&job->shape); part++) {
        const float *more_dk = job->parts + 2 * (part - 1) * n + token * d, *more_dv = more_dk + n;
        for (int64_t c = 0; c < d; c++) dk[c] += more_dk[c];
        for (int64_t c = 0; c < d; c++) dv[c] += more_dv[c];
    }
}

void kvq_attention_backward_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                                const float *v, const float *out, const float *dout, float *dq, float *dk, float *dv,
                                float *scratch) {
    float        *parts = scratch + be->ctx->n_threads * backward_blocks(shape) * QUERY_BLOCK * shape->n_tokens;
    attention_job job = {.shape = *shape,
                         .q = q,
                         .k = k,
                         .v = v,
                         .out = out,
                         .dout = dout,
                         .dq = dq,
                         .dk = dk,
                         .dv = dv,
                         .scratch = scratch,
                         .parts = parts};
    kvq_parallel_for(be->ctx, shape->n_kv_heads * n_parts(shape), attention_backward_item, &job);
    if (n_parts(shape) > 1) kvq_parallel_for(be->ctx, shape->n_tokens, add_parts, &job);
}

int64_t kvq_attention_scratch_floats_cpu(const kvq_backend *be, const kvq_attention_shape *shape, bool backward) {
    int64_t block = (int64_t)QUERY_BLOCK * shape->n_tokens * be->ctx->n_threads;
    if (backward) return backward_blocks(shape) * block + 2 * (n_parts(shape) - 1) * kv_floats(shape);
    return forward_floats(shape) * be->ctx->n_threads;
}

// ---------------------------------------------------------------- one token of many sequences

typedef struct step_job {
    kvq_attention_shape shape;
    int64_t             n_past, capacity;
    const float        *q, *k_cache, *v_cache;
    float              *out, *scratch;
} step_job;

static void attention_step_item(void *user, int64_t item, int worker) {
    const step_job            *job = user;
    const kvq_attention_shape *s = &job->shape;
    int64_t                    D = s->head_dim, stride = s->n_kv_heads * D;
    int64_t                    seq = item / s->n_heads, head = item % s->n_heads, n = job->n_past + 1;
    int64_t                    from = s->window > 0 && n > s->window ? n - s->window : 0;
    const float               *q = job->q + (seq * s->n_heads + head) * D;
    const float               *k = job->k_cache + seq * job->capacity * stride + kv_head_of(s, head) * D;
    const float               *v = job->v_cache + seq * job->capacity * stride + kv_head_of(s, head) * D;
    float                     *p = job->scratch + item * job->capacity, *out = job->out + (seq * s->n_heads + head) * D;
    (void)worker;
    kvq_gemm(false, true, 1, n - from, D, s->scale, q, D, k + from * stride, stride, 0.0f, p, n - from);
    if (s->softcap > 0) cap_scores(s->softcap, p, NULL, n - from);
    float inverse = 1.0f / exponentials(p, n - from, row_maximum(p, n - from));
    for (int64_t j = 0; j < n - from; j++) p[j] *= inverse;
    kvq_gemm(false, false, 1, D, n - from, 1.0f, p, n - from, v + from * stride, stride, 0.0f, out, D);
}

void kvq_attention_step_cpu(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                            int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                            float *scratch) {
    step_job job = {*shape, n_past, capacity, q, k_cache, v_cache, out, scratch};
    kvq_parallel_for(be->ctx, n_seqs * shape->n_heads, attention_step_item, &job);
}
