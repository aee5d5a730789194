// SPDX-License-Identifier: Apache-2.0
//
// What a mixture of experts needs beside linear layers: the router with its gradient, and moving the rows of one
// expert's tokens to where they are dense and back.
#include <math.h>

#include "kernels_impl.h"
#include "kvq_exp_hd.h"

#define ROWS_PER_ITEM 16

static int64_t n_row_items(int64_t m) { return (m + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM; }

static int64_t last_row(int64_t item, int64_t m) {
    return (item + 1) * ROWS_PER_ITEM < m ? (item + 1) * ROWS_PER_ITEM : m;
}

static double dot(const float *a, const float *b, int64_t n) {
    double  lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) lane[j] += (double)a[i + j] * (double)b[i + j];
    }
    for (; i < n; i++) lane[0] += (double)a[i] * (double)b[i];
    return sum_lanes(lane);
}

// ---------------------------------------------------------------- router

typedef struct route_job {
    kvq_route    route;
    const float *x, *w, *dweight;
    float       *dx;
    int64_t      m, n;
} route_job;

// logits [E] -> probabilities
static void softmax(float *x, int n) {
    double top = (double)x[0], sum = 0;
    for (int e = 1; e < n; e++) top = fmax(top, (double)x[e]);
    for (int e = 0; e < n; e++) sum += kvq_exp_f64((double)x[e] - top);
    for (int e = 0; e < n; e++) x[e] = (float)(kvq_exp_f64((double)x[e] - top) / sum);
}

// The k largest of logits [E] by insertion: an expert goes behind those that are at least as large.
static void choose(const float *logits, int n_experts, int32_t *chosen, int k) {
    int n = 0;
    for (int e = 0; e < n_experts; e++) {
        int at = n;
        while (at > 0 && logits[e] > logits[chosen[at - 1]]) at--;
        if (at == k) continue;
        n = n < k ? n + 1 : k;
        for (int i = n - 1; i > at; i--) chosen[i] = chosen[i - 1];
        chosen[at] = e;
    }
}

// The choice is made on logits: two that differ may have the same probability in f32.
static void route_row(const route_job *job, int64_t t) {
    const kvq_route *r = &job->route;
    float           *p = r->probability + t * r->n_experts, *weight = r->weight + t * r->per_token;
    int32_t         *chosen = r->expert + t * r->per_token;
    double           sum = 0;
    for (int e = 0; e < r->n_experts; e++) p[e] = (float)dot(job->x + t * job->n, job->w + e * job->n, job->n);
    choose(p, r->n_experts, chosen, r->per_token);
    softmax(p, r->n_experts);
    for (int j = 0; j < r->per_token; j++) sum += (double)p[chosen[j]];
    for (int j = 0; j < r->per_token; j++)
        weight[j] = r->normalize ? (float)((double)p[chosen[j]] / sum) : p[chosen[j]];
}

static void route_rows(void *user, int64_t item, int worker) {
    const route_job *job = user;
    (void)worker;
    for (int64_t t = item * ROWS_PER_ITEM; t < last_row(item, job->m); t++) route_row(job, t);
}

void kvq_route_cpu(const kvq_backend *be, const kvq_route *to, const float *x, const float *w, int64_t m, int64_t n) {
    route_job job = {.route = *to, .x = x, .w = w, .m = m, .n = n};
    kvq_parallel_for(be->ctx, n_row_items(m), route_rows, &job);
}

// With w the weights of the chosen, c = sum_j w_j dw_j over them:
//   normalised: w is the softmax of the chosen logits, dz_j = w_j (dw_j - c), and 0 for the others;
//   otherwise:  w is part of the softmax p of all logits, dz_e = p_e (dw_e - c) with dw_e = 0 for the others.
static void route_backward_row(const route_job *job, int64_t t) {
    const kvq_route *r = &job->route;
    const float     *weight = r->weight + t * r->per_token, *dweight = job->dweight + t * r->per_token;
    const int32_t   *chosen = r->expert + t * r->per_token;
    float           *dx = job->dx + t * job->n;
    double           center = 0;
    for (int j = 0; j < r->per_token; j++) center += (double)weight[j] * (double)dweight[j];
    for (int e = 0; e < r->n_experts; e++) {
        int j = 0;
        while (j < r->per_token && chosen[j] != e) j++;
        bool is_chosen = j < r->per_token;
        if (r->normalize && !is_chosen) continue;
        double p = is_chosen ? (double)weight[j] : (double)r->probability[t * r->n_experts + e];
        float  dz = (float)(p * ((is_chosen ? (double)dweight[j] : 0) - center));
        for (int64_t i = 0; i < job->n; i++) dx[i] += dz * job->w[e * job->n + i];
    }
}

static void route_backward_rows(void *user, int64_t item, int worker) {
    const route_job *job = user;
    (void)worker;
    for (int64_t t = item * ROWS_PER_ITEM; t < last_row(item, job->m); t++) route_backward_row(job, t);
}

void kvq_route_backward_cpu(const kvq_backend *be, const kvq_route *from, const float *dweight, const float *w,
                            float *dx, int64_t m, int64_t n) {
    route_job job = {.route = *from, .w = w, .dweight = dweight, .dx = dx, .m = m, .n = n};
    kvq_parallel_for(be->ctx, n_row_items(m), route_backward_rows, &job);
}

// ---------------------------------------------------------------- rows

typedef struct rows_job {
    const float   *x, *b, *scales;
    const int32_t *rows;
    float         *out;
    int64_t        m, n;
} rows_job;

static void gather_items(void *user, int64_t item, int worker) {
    const rows_job *job = user;
    (void)worker;
    for (int64_t i = item * ROWS_PER_ITEM; i < last_row(item, job->m); i++) {
        for (int64_t c = 0; c < job->n; c++) job->out[i * job->n + c] = job->x[job->rows[i] * job->n + c];
    }
}

static void scatter_items(void *user, int64_t item, int worker) {
    const rows_job *job = user;
    (void)worker;
    for (int64_t i = item * ROWS_PER_ITEM; i < last_row(item, job->m); i++) {
        float *y = job->out + job->rows[i] * job->n;
        for (int64_t c = 0; c < job->n; c++) y[c] += job->scales[i] * job->x[i * job->n + c];
    }
}

static void dot_items(void *user, int64_t item, int worker) {
    const rows_job *job = user;
    (void)worker;
    for (int64_t i = item * ROWS_PER_ITEM; i < last_row(item, job->m); i++)
        job->out[i] = (float)dot(job->x + i * job->n, job->b + i * job->n, job->n);
}

void kvq_gather_rows_cpu(const kvq_backend *be, const float *x, const int32_t *rows, float *y, int64_t m, int64_t n) {
    rows_job job = {.x = x, .rows = rows, .out = y, .m = m, .n = n};
    kvq_parallel_for(be->ctx, n_row_items(m), gather_items, &job);
}

void kvq_scatter_rows_cpu(const kvq_backend *be, const float *x, const int32_t *rows, const float *scales, float *y,
                          int64_t m, int64_t n) {
    rows_job job = {.x = x, .rows = rows, .scales = scales, .out = y, .m = m, .n = n};
    kvq_parallel_for(be->ctx, n_row_items(m), scatter_items, &job);
}

void kvq_row_dots_cpu(const kvq_backend *be, const float *a, const float *b, float *out, int64_t m, int64_t n) {
    rows_job job = {.x = a, .b = b, .out = out, .m = m, .n = n};
    kvq_parallel_for(be->ctx, n_row_items(m), dot_items, &job);
}
