// SPDX-License-Identifier: Apache-2.0
//
// Causal attention of one window in blocks of query rows: scores exist for QUERY_BLOCK rows of one head at a time, so
// memory grows with S and not with S^2. The backward pass recomputes the scores (Dao et al., FlashAttention, 2022,
// without the tiling over keys that a processor with caches does not need).
//
// Forward items are (head, query block). Backward items are whole query heads, because the blocks of a head add into
// the same dK and dV and the order of those sums must be fixed; heads that share a KV head are summed at the end, in
// order.
#include <math.h>

#include "kernels_impl.h"
#include "kvq_exp_hd.h"

#define QUERY_BLOCK 128
#define F32_LANES   16

typedef struct attention_job {
    kvq_attention_shape shape;
    const float        *q, *k, *v, *out, *dout;
    float              *result, *dq, *dk, *dv; // result: forward output
    float              *scratch;               // per worker, then per head
} attention_job;

// The keys that the queries [first, end) of a block can see: [first_key, end).
typedef struct query_block {
    int64_t first, end, first_key;
} query_block;

static query_block block_at(const kvq_attention_shape *s, int64_t index) {
    query_block b = {.first = index * QUERY_BLOCK};
    b.end = b.first + QUERY_BLOCK < s->n_tokens ? b.first + QUERY_BLOCK : s->n_tokens;
    b.first_key = s->window > 0 && b.first >= s->window ? b.first - s->window + 1 : 0;
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

// One row of scores over keys [first_key, end): probabilities where query i may look, 0 elsewhere.
static void softmax_row(const kvq_attention_shape *s, float *row, int64_t i, const query_block *b) {
    int64_t from = s->window > 0 && i >= s->window ? i - s->window + 1 : 0;
    float  *visible = row + (from - b->first_key);
    int64_t n = i + 1 - from;
    float   inverse = 1.0f / exponentials(visible, n, row_maximum(visible, n));
    for (int64_t j = 0; j < from - b->first_key; j++) row[j] = 0;
    for (int64_t j = 0; j < n; j++) visible[j] *= inverse;
    for (int64_t j = i + 1; j < b->end; j++) row[j - b->first_key] = 0;
}

// p [rows, keys] = softmax(scale * Q K^T) of one block
static void probabilities(const attention_job *job, int64_t head, const query_block *b, float *p) {
    const kvq_attention_shape *s = &job->shape;
    int64_t      q_stride = (int64_t)s->n_heads * s->head_dim, k_stride = (int64_t)s->n_kv_heads * s->head_dim;
    int64_t      rows = b->end - b->first, keys = b->end - b->first_key;
    const float *q = job->q + b->first * q_stride + head * s->head_dim;
    const float *k = job->k + b->first_key * k_stride + kv_head_of(s, head) * s->head_dim;
    kvq_gemm(false, true, rows, keys, s->head_dim, s->scale, q, q_stride, k, k_stride, 0.0f, p, keys);
    for (int64_t i = 0; i < rows; i++) softmax_row(s, p + i * keys, b->first + i, b);
}

static void attention_item(void *user, int64_t item, int worker) {
    const attention_job       *job = user;
    const kvq_attention_shape *s = &job->shape;
    query_block                b = block_at(s, item % n_blocks(s));
    int64_t                    head = item / n_blocks(s);
    int64_t q_stride = (int64_t)s->n_heads * s->head_dim, k_stride = (int64_t)s->n_kv_heads * s->head_dim;
    int64_t keys = b.end - b.first_key;
    float  *p = job->scratch + worker * QUERY_BLOCK * s->n_tokens;
    probabilities(job, head, &b, p);
    kvq_gemm(false, false, b.end - b.first, s->head_dim, keys, 1.0f, p, keys,
             job->v + b.first_key * k_stride + kv_head_of(s, head) * s->head_dim, k_stride, 0.0f,
             job->result + b.first * q_stride + head * s->head_dim, q_stride);
}

void kvq_attention_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                       const float *v, float *out, float *scratch) {
    attention_job job = {.shape = *shape, .q = q, .k = k, .v = v, .result = out, .scratch = scratch};
    kvq_parallel_for(be->ctx, n_blocks(shape) * shape->n_heads, attention_item, &job);
}

// ---------------------------------------------------------------- backward

// ds = p * (dp - sum_j p_j dp_j) * scale, in place of dp; the sum equals the dot product of the row's output and its
// gradient, which costs D instead of S operations.
static void score_gradient(const attention_job *job, int64_t head, const query_block *b, const float *p, float *dp) {
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
    }
}

static void attention_backward_head(void *user, int64_t head, int worker) {
    const attention_job       *job = user;
    const kvq_attention_shape *s = &job->shape;
    int64_t                    D = s->head_dim, q_stride = s->n_heads * D, k_stride = s->n_kv_heads * D;
    float *p = job->scratch + 2 * worker * QUERY_BLOCK * s->n_tokens, *dp = p + QUERY_BLOCK * s->n_tokens;
    float *dk = job->dk + head * s->n_tokens * D, *dv = job->dv + head * s->n_tokens * D;
    for (int64_t i = 0; i < s->n_tokens * D; i++) dk[i] = dv[i] = 0;
    for (int64_t index = 0; index < n_blocks(s); index++) {
        query_block b = block_at(s, index);
        int64_t     rows = b.end - b.first, keys = b.end - b.first_key,
                kv_at = b.first_key * k_stride + kv_head_of(s, head) * D;
        int64_t      q_at = b.first * q_stride + head * D;
        const float *dout = job->dout + q_at;
        probabilities(job, head, &b, p);
        kvq_gemm(false, true, rows, keys, D, 1.0f, dout, q_stride, job->v + kv_at, k_stride, 0.0f, dp, keys);
        score_gradient(job, head, &b, p, dp);
        kvq_gemm(false, false, rows, D, keys, 1.0f, dp, keys, job->k + kv_at, k_stride, 0.0f, job->dq + q_at, q_stride);
        kvq_gemm(true, false, keys, D, rows, 1.0f, dp, keys, job->q + q_at, q_stride, 1.0f, dk + b.first_key * D, D);
        kvq_gemm(true, false, keys, D, rows, 1.0f, p, keys, dout, q_stride, 1.0f, dv + b.first_key * D, D);
    }
}

typedef struct group_sum_job {
    kvq_attention_shape shape;
    const float        *per_head; // [H, S, D]
    float              *out;      // [S, Hkv, D]
} group_sum_job;

static void group_sum(void *user, int64_t kv_head, int worker) {
    const group_sum_job       *job = user;
    const kvq_attention_shape *s = &job->shape;
    int64_t                    D = s->head_dim, group = s->n_heads / s->n_kv_heads, per_head = s->n_tokens * D;
    (void)worker;
    for (int64_t t = 0; t < s->n_tokens; t++) {
        float       *out = job->out + (t * s->n_kv_heads + kv_head) * D;
        const float *in = job->per_head + kv_head * group * per_head + t * D;
        for (int64_t c = 0; c < D; c++) {
            float sum = in[c];
            for (int64_t g = 1; g < group; g++) sum += in[g * per_head + c];
            out[c] = sum;
        }
    }
}

void kvq_attention_backward_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                                const float *v, const float *out, const float *dout, float *dq, float *dk, float *dv,
                                float *scratch) {
    int64_t per_worker = 2 * QUERY_BLOCK * shape->n_tokens, per_head = shape->n_tokens * shape->head_dim;
    float  *dk_heads = scratch + be->ctx->n_threads * per_worker, *dv_heads = dk_heads + shape->n_heads * per_head;
    attention_job job = {*shape, q, k, v, out, dout, NULL, dq, dk_heads, dv_heads, scratch};
    kvq_parallel_for(be->ctx, shape->n_heads, attention_backward_head, &job);
    group_sum_job sum_k = {*shape, dk_heads, dk}, sum_v = {*shape, dv_heads, dv};
    kvq_parallel_for(be->ctx, shape->n_kv_heads, group_sum, &sum_k);
    kvq_parallel_for(be->ctx, shape->n_kv_heads, group_sum, &sum_v);
}

int64_t kvq_attention_scratch_floats_cpu(const kvq_backend *be, const kvq_attention_shape *shape, bool backward) {
    int64_t block = (int64_t)QUERY_BLOCK * shape->n_tokens * be->ctx->n_threads;
    return backward ? 2 * block + 2 * (int64_t)shape->n_heads * shape->n_tokens * shape->head_dim : block;
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
