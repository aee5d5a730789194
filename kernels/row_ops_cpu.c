// SPDX-License-Identifier: Apache-2.0
//
// Operations on single rows or elements: RMS norm, rotary embedding, gated activation, soft cap. Sums of a row run over
// LANES partial sums in a fixed order, which a compiler can turn into vector code without reordering anything.
#include <math.h>
#include <string.h>

#include "kernels_impl.h"
#include "kvq_gate_hd.h"

#define ROWS_PER_ITEM     32
#define ELEMENTS_PER_ITEM 16384

static double sum_of_squares(const float *x, int64_t n) {
    double  lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) lane[j] += (double)x[i + j] * (double)x[i + j];
    }
    for (; i < n; i++) lane[0] += (double)x[i] * (double)x[i];
    return sum_lanes(lane);
}

static double sum_of_triple_products(const float *x, const float *y, const float *z, int64_t n) {
    double  lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) lane[j] += (double)x[i + j] * (double)y[i + j] * (double)z[i + j];
    }
    for (; i < n; i++) lane[0] += (double)x[i] * (double)y[i] * (double)z[i];
    return sum_lanes(lane);
}

// ---------------------------------------------------------------- RMS norm

typedef struct norm_job {
    const float *x, *w, *dy;
    float       *out;
    float        eps;
    int64_t      m, n;
} norm_job;

static double inverse_rms(const norm_job *job, const float *x) {
    return 1.0 / sqrt(sum_of_squares(x, job->n) / (double)job->n + (double)job->eps);
}

static void rmsnorm_rows(void *user, int64_t item, int worker) {
    const norm_job *job = user;
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        const float *x = job->x + row * job->n;
        float       *y = job->out + row * job->n;
        float        inverse = (float)inverse_rms(job, x);
        for (int64_t i = 0; i < job->n; i++) y[i] = x[i] * inverse * job->w[i];
    }
}

// With s = 1 / rms(x): dx_i = s (w_i dy_i - x_i s^2 / n * sum_j w_j dy_j x_j)
static void rmsnorm_backward_rows(void *user, int64_t item, int worker) {
    const norm_job *job = user;
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        const float *x = job->x + row * job->n, *dy = job->dy + row * job->n;
        float       *dx = job->out + row * job->n;
        double       s = inverse_rms(job, x);
        float        inverse = (float)s;
        float        pull = (float)(s * s / (double)job->n * sum_of_triple_products(job->w, dy, x, job->n));
        for (int64_t i = 0; i < job->n; i++) dx[i] += inverse * (job->w[i] * dy[i] - x[i] * pull);
    }
}

static int64_t n_items(int64_t n, int64_t per_item) { return (n + per_item - 1) / per_item; }

void kvq_rmsnorm_cpu(const kvq_backend *be, const float *x, const float *w, float eps, float *y, int64_t m, int64_t n) {
    norm_job job = {x, w, NULL, y, eps, m, n};
    kvq_parallel_for(be->ctx, n_items(m, ROWS_PER_ITEM), rmsnorm_rows, &job);
}

void kvq_rmsnorm_backward_cpu(const kvq_backend *be, const float *x, const float *w, float eps, const float *dy,
                              float *dx, int64_t m, int64_t n) {
    norm_job job = {x, w, dy, dx, eps, m, n};
    kvq_parallel_for(be->ctx, n_items(m, ROWS_PER_ITEM), rmsnorm_backward_rows, &job);
}

// ---------------------------------------------------------------- rotary embedding

typedef struct rope_job {
    float       *x;
    const float *cos_table, *sin_table;
    float        direction, scale;
    int64_t      m;
    int          n_heads, head_dim, half;
} rope_job;

static void rope_rows(void *user, int64_t item, int worker) {
    const rope_job *job = user;
    int             half = job->half;
    float           scale = job->scale, direction = job->direction * scale;
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        const float *c = job->cos_table + row * half, *s = job->sin_table + row * half;
        for (int head = 0; head < job->n_heads; head++) {
            float *x = job->x + (row * job->n_heads + head) * job->head_dim;
            for (int i = 0; i < half; i++) {
                float a = x[i], b = x[i + half], cosine = c[i] * scale, sine = s[i] * direction;
                x[i] = a * cosine - b * sine;
                x[i + half] = b * cosine + a * sine;
            }
        }
    }
}

void kvq_rope_cpu(const kvq_backend *be, float *x, const float *cos_table, const float *sin_table, int direction,
                  float scale, int64_t m, int n_heads, int head_dim, int rot) {
    rope_job job = {x, cos_table, sin_table, direction < 0 ? -1.0f : 1.0f, scale, m, n_heads, head_dim, rot / 2};
    kvq_parallel_for(be->ctx, n_items(m, ROWS_PER_ITEM), rope_rows, &job);
}

// ---------------------------------------------------------------- gated activation

// Results go through small local blocks: outputs may overlap inputs, and a compiler that cannot exclude it would not
// vectorise the loop.
#define BLOCK 64

typedef struct activated {
    float value[BLOCK], slope[BLOCK]; // of the activation
} activated;

static void silu(const float *g, activated *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) a->value[i] = kvq_silu_f32(g[i], &a->slope[i]);
}

static void gelu_tanh(const float *g, activated *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) a->value[i] = kvq_gelu_tanh_f32(g[i], &a->slope[i]);
}

static void (*const ACTIVATIONS[])(const float *g, activated *a, int64_t n) = {
    [KVQ_GATE_SILU] = silu,
    [KVQ_GATE_GELU_TANH] = gelu_tanh,
};

typedef struct gate_job {
    kvq_gate_kind kind;
    const float  *gate, *up, *dy;
    float        *out_gate, *out_up; // forward: out_gate is y
    int64_t       n;
} gate_job;

static void gated_mul_block(const activated *a, const float *up, float *y, int64_t n) {
    float result[BLOCK];
    for (int64_t i = 0; i < n; i++) result[i] = a->value[i] * up[i];
    memcpy(y, result, (size_t)n * sizeof *y);
}

static void gated_mul_backward_block(const activated *a, float *gate, float *up, const float *dy, int64_t n) {
    float dgate[BLOCK], dup[BLOCK];
    for (int64_t i = 0; i < n; i++) {
        dgate[i] = dy[i] * up[i] * a->slope[i];
        dup[i] = dy[i] * a->value[i];
    }
    memcpy(gate, dgate, (size_t)n * sizeof *gate);
    memcpy(up, dup, (size_t)n * sizeof *up);
}

static void gate_item(void *user, int64_t item, int worker) {
    const gate_job *job = user;
    int64_t         end = (item + 1) * ELEMENTS_PER_ITEM < job->n ? (item + 1) * ELEMENTS_PER_ITEM : job->n;
    activated       a;
    (void)worker;
    for (int64_t i = item * ELEMENTS_PER_ITEM; i < end; i += BLOCK) {
        int64_t n = end - i < BLOCK ? end - i : BLOCK;
        ACTIVATIONS[job->kind](job->gate + i, &a, n);
        if (job->dy == NULL) {
            gated_mul_block(&a, job->up + i, job->out_gate + i, n);
        } else {
            gated_mul_backward_block(&a, job->out_gate + i, job->out_up + i, job->dy + i, n);
        }
    }
}

void kvq_gated_mul_cpu(const kvq_backend *be, kvq_gate_kind kind, const float *gate, const float *up, float *y,
                       int64_t n) {
    gate_job job = {kind, gate, up, NULL, y, NULL, n};
    kvq_parallel_for(be->ctx, n_items(n, ELEMENTS_PER_ITEM), gate_item, &job);
}

void kvq_gated_mul_backward_cpu(const kvq_backend *be, kvq_gate_kind kind, float *gate, float *up, const float *dy,
                                int64_t n) {
    gate_job job = {kind, gate, up, dy, gate, up, n};
    kvq_parallel_for(be->ctx, n_items(n, ELEMENTS_PER_ITEM), gate_item, &job);
}

// ---------------------------------------------------------------- soft cap

typedef struct cap_job {
    float   cap, *x;
    int64_t n;
} cap_job;

static void softcap_item(void *user, int64_t item, int worker) {
    const cap_job *job = user;
    int64_t        end = (item + 1) * ELEMENTS_PER_ITEM < job->n ? (item + 1) * ELEMENTS_PER_ITEM : job->n;
    float          cap = job->cap, *x = job->x;
    (void)worker;
    for (int64_t i = item * ELEMENTS_PER_ITEM; i < end; i++) x[i] = cap * kvq_tanh_f32(x[i] / cap);
}

void kvq_softcap_cpu(const kvq_backend *be, float cap, float *x, int64_t n) {
    cap_job job = {cap, x, n};
    kvq_parallel_for(be->ctx, n_items(n, ELEMENTS_PER_ITEM), softcap_item, &job);
}
