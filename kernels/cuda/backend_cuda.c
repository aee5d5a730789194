// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend: its table, products, and the operations whose arguments or results are on the host. Contracts are
// those of the table's fields in kvq_kernels.h.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cuda_impl.h"
#include "kvq_cuda_ops.h"

// ---------------------------------------------------------------- memory

static void copy(const kvq_backend *be, float *to, const float *from, int64_t n) {
    cuda_backend *c = cuda_of(be);
    kvq_error     err = {KVQ_OK, "", ""};
    if (n == 0 || atomic_load(&c->failed)) return;
    (void)cuda_note(c, kvq_cuda_copy(c->device, KVQ_CUDA_ON_DEVICE, to, from, (size_t)n * sizeof *to, c->stream, &err),
                    &err);
}

static void zero(const kvq_backend *be, float *x, int64_t n) {
    cuda_backend *c = cuda_of(be);
    kvq_error     err = {KVQ_OK, "", ""};
    if (n == 0 || atomic_load(&c->failed)) return;
    (void)cuda_note(c, kvq_cuda_clear(c->device, x, (size_t)n * sizeof *x, c->stream, &err), &err);
}

static void add(const kvq_backend *be, float *y, const float *x, int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_add, y, x, n);
}

// ---------------------------------------------------------------- linear layers

static int64_t weights_floats(const kvq_backend *be, int64_t n_out, int64_t n_in) {
    int64_t n = n_out * n_in;
    return cuda_of(be)->compute == KVQ_COMPUTE_BF16 ? (n + 1) / 2 : n;
}

// x, in f32, becomes bf16 first when weights are.
static void multiply(cuda_backend *c, kvq_cuda_product p) {
    kvq_error err = {KVQ_OK, "", ""};
    if (p.m == 0 || p.n == 0 || atomic_load(&c->failed)) return;
    if (c->compute == KVQ_COMPUTE_BF16) {
        size_t bytes = (size_t)(p.m * p.k) * sizeof(uint16_t);
        if (!cuda_grow(c, &c->factors, &c->factor_bytes, bytes, "factors of a product")) return;
        CUDA_RUN(c, kvq_cuda_bf16_of_float, p.x, c->factors, p.m * p.k);
        p.x = c->factors;
        p.bf16 = true;
    }
    if (!atomic_load(&c->failed)) (void)cuda_note(c, kvq_cuda_multiply(c->device, &p, c->stream, &err), &err);
}

static void linear(const kvq_backend *be, const float *x, const float *w, const float *bias, float *y, int64_t m,
                   int64_t n_out, int64_t n_in) {
    cuda_backend *c = cuda_of(be);
    multiply(c, (kvq_cuda_product){.m = m, .n = n_out, .k = n_in, .x = x, .w = w, .y = y, .transposed = true});
    if (bias != NULL) CUDA_RUN(c, kvq_cuda_add_bias, y, bias, m, n_out);
}

static void linear_backward(const kvq_backend *be, const float *dy, const float *w, float *dx, int64_t m, int64_t n_out,
                            int64_t n_in, bool accumulate) {
    multiply(cuda_of(be),
             (kvq_cuda_product){.m = m, .n = n_in, .k = n_out, .x = dy, .w = w, .y = dx, .accumulate = accumulate});
}

// ---------------------------------------------------------------- rows

static void rmsnorm(const kvq_backend *be, const float *x, const float *w, float eps, float *y, int64_t m, int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_rmsnorm, x, w, eps, y, m, n);
}

static void rmsnorm_backward(const kvq_backend *be, const float *x, const float *w, float eps, const float *dy,
                             float *dx, int64_t m, int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_rmsnorm_backward, x, w, eps, dy, dx, m, n);
}

static void rope(const kvq_backend *be, float *x, const float *cos_table, const float *sin_table, int direction,
                 float scale, int64_t m, int n_heads, int head_dim, int rot) {
    CUDA_RUN(cuda_of(be), kvq_cuda_rope, x, cos_table, sin_table, direction, scale, m, n_heads, head_dim, rot);
}

static void gated_mul(const kvq_backend *be, kvq_gate_kind kind, const float *gate, const float *up, float *y,
                      int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_gated_mul, kind, gate, up, y, n);
}

static void gated_mul_backward(const kvq_backend *be, kvq_gate_kind kind, float *gate, float *up, const float *dy,
                               int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_gated_mul_backward, kind, gate, up, dy, n);
}

static void softcap(const kvq_backend *be, float cap, float *x, int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_softcap, cap, x, n);
}

// ---------------------------------------------------------------- experts

// A choice that can be used as indices, and weights that nobody takes for results.
static void spoil_route(const kvq_route *to, int64_t m) {
    for (int64_t i = 0; i < m * to->n_experts; i++) to->probability[i] = NAN;
    for (int64_t i = 0; i < m * to->per_token; i++) {
        to->expert[i] = (int32_t)(i % to->per_token);
        to->weight[i] = NAN;
    }
}

enum { PROBABILITY, EXPERT, WEIGHT, N_ROUTE };

static void route_pieces(const kvq_route *route, int64_t m, cuda_piece *p) {
    p[PROBABILITY].bytes = (size_t)(m * route->n_experts) * sizeof *route->probability;
    p[EXPERT].bytes = (size_t)(m * route->per_token) * sizeof *route->expert;
    p[WEIGHT].bytes = (size_t)(m * route->per_token) * sizeof *route->weight;
}

static kvq_route route_on_device(const kvq_route *route, const cuda_piece *p) {
    kvq_route there = *route;
    there.probability = p[PROBABILITY].device;
    there.expert = p[EXPERT].device;
    there.weight = p[WEIGHT].device;
    return there;
}

static void route(const kvq_backend *be, const kvq_route *to, const float *x, const float *w, int64_t m, int64_t n) {
    cuda_backend *c = cuda_of(be);
    cuda_piece    p[N_ROUTE];
    void *const   host[N_ROUTE] = {to->probability, to->expert, to->weight};
    route_pieces(to, m, p);
    if (cuda_area(c, p, N_ROUTE)) {
        kvq_route there = route_on_device(to, p);
        CUDA_RUN(c, kvq_cuda_route, &there, x, w, m, n);
        for (int i = 0; i < N_ROUTE; i++) cuda_fetch(c, &p[i]);
    }
    if (!cuda_arrived(c)) {
        spoil_route(to, m);
        return;
    }
    for (int i = 0; i < N_ROUTE; i++) memcpy(host[i], p[i].host, p[i].bytes);
}

static void route_backward(const kvq_backend *be, const kvq_route *from, const float *host_dweight, const float *w,
                           float *dx, int64_t m, int64_t n) {
    cuda_backend     *c = cuda_of(be);
    cuda_piece        p[N_ROUTE + 1];
    const void *const host[N_ROUTE + 1] = {from->probability, from->expert, from->weight, host_dweight};
    route_pieces(from, m, p);
    p[N_ROUTE].bytes = p[WEIGHT].bytes;
    if (!cuda_area(c, p, N_ROUTE + 1)) return;
    for (int i = 0; i <= N_ROUTE; i++) cuda_put(c, &p[i], host[i]);
    kvq_route there = route_on_device(from, p);
    CUDA_RUN(c, kvq_cuda_route_backward, &there, p[N_ROUTE].device, w, dx, m, n);
}

static void gather_rows(const kvq_backend *be, const float *x, const int32_t *host_rows, float *y, int64_t m,
                        int64_t n) {
    cuda_backend *c = cuda_of(be);
    cuda_piece    rows = {.bytes = (size_t)m * sizeof *host_rows};
    if (m == 0 || !cuda_area(c, &rows, 1)) return;
    cuda_put(c, &rows, host_rows);
    CUDA_RUN(c, kvq_cuda_gather_rows, x, rows.device, y, m, n);
}

static void scatter_rows(const kvq_backend *be, const float *x, const int32_t *host_rows, const float *host_scales,
                         float *y, int64_t m, int64_t n) {
    enum { ROWS, SCALES, N };
    cuda_backend *c = cuda_of(be);
    cuda_piece    p[N] = {{.bytes = (size_t)m * sizeof *host_rows}, {.bytes = (size_t)m * sizeof *host_scales}};
    if (m == 0 || !cuda_area(c, p, N)) return;
    cuda_put(c, &p[ROWS], host_rows);
    cuda_put(c, &p[SCALES], host_scales);
    CUDA_RUN(c, kvq_cuda_scatter_rows, x, p[ROWS].device, p[SCALES].device, y, m, n);
}

static void row_dots(const kvq_backend *be, const float *a, const float *b, float *host_out, int64_t m, int64_t n) {
    cuda_backend *c = cuda_of(be);
    cuda_piece    dots = {.bytes = (size_t)m * sizeof *host_out};
    if (m == 0) return;
    if (cuda_area(c, &dots, 1)) {
        CUDA_RUN(c, kvq_cuda_row_dots, a, b, dots.device, m, n);
        cuda_fetch(c, &dots);
    }
    if (cuda_arrived(c)) {
        memcpy(host_out, dots.host, dots.bytes);
    } else {
        for (int64_t i = 0; i < m; i++) host_out[i] = NAN;
    }
}

// ---------------------------------------------------------------- attention

static int64_t attention_scratch_floats(const kvq_backend *be, const kvq_attention_shape *shape, bool backward) {
    (void)be;
    return kvq_cuda_window_scratch_floats(shape, backward);
}

static void attention(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                      const float *v, const float *k_recent, const float *v_recent, float *out, float *scratch) {
    (void)scratch;
    CUDA_RUN(cuda_of(be), kvq_cuda_window_attention, shape, q, k, v, k_recent, v_recent, out);
}

static void attention_backward(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                               const float *v, const float *out, const float *dout, float *dq, float *dk, float *dv,
                               float *scratch) {
    CUDA_RUN(cuda_of(be), kvq_cuda_window_attention_backward, shape, q, k, v, out, dout, dq, dk, dv, scratch);
}

static void attention_step(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                           int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                           float *scratch) {
    CUDA_RUN(cuda_of(be), kvq_cuda_attention_step, shape, n_seqs, n_past, capacity, q, k_cache, v_cache, out, scratch);
}

// ---------------------------------------------------------------- losses

static void cross_entropy(const kvq_backend *be, float *logits, const int32_t *host_targets, int64_t m, int64_t n_vocab,
                          float cap, double scale, double *host_nll) {
    enum { TARGETS, NLL, N };
    cuda_backend *c = cuda_of(be);
    cuda_piece    p[N] = {{.bytes = (size_t)m * sizeof *host_targets}, {.bytes = (size_t)m * sizeof *host_nll}};
    if (m == 0) return;
    if (cuda_area(c, p, N)) {
        cuda_put(c, &p[TARGETS], host_targets);
        CUDA_RUN(c, kvq_cuda_cross_entropy, logits, p[TARGETS].device, m, n_vocab, cap, scale, p[NLL].device);
        cuda_fetch(c, &p[NLL]);
    }
    if (cuda_arrived(c)) {
        memcpy(host_nll, p[NLL].host, p[NLL].bytes);
    } else {
        for (int64_t i = 0; i < m; i++) host_nll[i] = (double)NAN;
    }
}

static void compare(const kvq_backend *be, const float *logits_a, const float *logits_b, const int32_t *host_targets,
                    int64_t m, int64_t n_vocab, kvq_position_score *host_out) {
    enum { TARGETS, SCORES, N };
    const double       nan = (double)NAN;
    kvq_position_score spoiled = {.nll_a = nan, .nll_b = nan, .kl = nan, .confidence_a = nan};
    cuda_backend      *c = cuda_of(be);
    cuda_piece         p[N] = {{.bytes = (size_t)m * sizeof *host_targets}, {.bytes = (size_t)m * sizeof *host_out}};
    if (m == 0) return;
    if (cuda_area(c, p, N)) {
        cuda_put(c, &p[TARGETS], host_targets);
        CUDA_RUN(c, kvq_cuda_compare, logits_a, logits_b, p[TARGETS].device, m, n_vocab, p[SCORES].device);
        cuda_fetch(c, &p[SCORES]);
    }
    if (cuda_arrived(c)) {
        memcpy(host_out, p[SCORES].host, p[SCORES].bytes);
    } else {
        for (int64_t i = 0; i < m; i++) host_out[i] = spoiled;
    }
}

static void sample(const kvq_backend *be, const float *logits, const double *host_u, int64_t m, int64_t n_vocab,
                   int32_t *host_ids) {
    enum { U, IDS, N };
    cuda_backend *c = cuda_of(be);
    cuda_piece    p[N] = {{.bytes = (size_t)m * sizeof *host_u}, {.bytes = (size_t)m * sizeof *host_ids}};
    if (m == 0) return;
    memset(host_ids, 0, p[IDS].bytes);
    if (!cuda_area(c, p, N)) return;
    cuda_put(c, &p[U], host_u);
    CUDA_RUN(c, kvq_cuda_sample, logits, p[U].device, m, n_vocab, p[IDS].device);
    cuda_fetch(c, &p[IDS]);
    if (cuda_arrived(c)) memcpy(host_ids, p[IDS].host, p[IDS].bytes);
}

// ---------------------------------------------------------------- the table

static kvq_status check(const kvq_backend *be, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    kvq_error     own = {KVQ_OK, "", ""};
    for (int i = 0; i < CUDA_LANES && !atomic_load(&c->failed); i++)
        (void)cuda_note(c, kvq_cuda_finish(c->device, c->lanes[i].stream, &own), &own);
    if (cuda_arrived(c)) return KVQ_OK;
    (void)pthread_mutex_lock(&c->lock);
    own = c->failure;
    (void)pthread_mutex_unlock(&c->lock);
    if (err != NULL) *err = own;
    return own.status;
}

static void destroy(kvq_backend **be) {
    if (*be == NULL) return;
    const kvq_context *ctx = (*be)->ctx;
    cuda_backend      *c = cuda_of(*be);
    cuda_transfer_destroy(c);
    kvq_cuda_close(ctx, &c->device);
    kvq_free(ctx, c);
    *be = NULL;
}

static void fill_table(cuda_backend *c, const kvq_context *ctx) {
    c->table = (kvq_backend){
        .name = "cuda",
        .device = c->device_text,
        .matmul = c->matmul_text,
        .memory_bytes = kvq_cuda_describe(c->device)->free_bytes,
        .ctx = ctx,
        .destroy = destroy,
        .check = check,
        .alloc = cuda_alloc,
        .release = cuda_release,
        .upload = cuda_upload,
        .download = cuda_download,
        .copy = copy,
        .zero = zero,
        .add = add,
        .weights_floats = weights_floats,
        .upload_weights = cuda_upload_weights,
        .linear = linear,
        .linear_backward = linear_backward,
        .rmsnorm = rmsnorm,
        .rmsnorm_backward = rmsnorm_backward,
        .rope = rope,
        .gated_mul = gated_mul,
        .gated_mul_backward = gated_mul_backward,
        .softcap = softcap,
        .route = route,
        .route_backward = route_backward,
        .gather_rows = gather_rows,
        .scatter_rows = scatter_rows,
        .row_dots = row_dots,
        .attention_scratch_floats = attention_scratch_floats,
        .attention = attention,
        .attention_backward = attention_backward,
        .attention_step = attention_step,
        .cross_entropy = cross_entropy,
        .compare = compare,
        .sample = sample,
        .encode = cuda_encode,
        .decode = cuda_decode,
        .encode_tiles = cuda_encode_tiles,
        .decode_tiles = cuda_decode_tiles,
        .store_halves = cuda_store_halves,
        .load_halves = cuda_load_halves,
        .round_halves = cuda_round_halves,
        .find_nonfinite = cuda_find_nonfinite,
        .count_scratch_floats = cuda_count_scratch_floats,
        .count = cuda_count,
        .cache = &cuda_cache_functions,
    };
}

// What decides the bits of a product beside its factors: library, architecture, type.
static void describe(cuda_backend *c) {
    const kvq_cuda_about *about = kvq_cuda_describe(c->device);
    (void)snprintf(c->device_text, sizeof c->device_text, "cuda:%d, %s", about->index, about->name);
    (void)snprintf(c->matmul_text, sizeof c->matmul_text, "%s%s on sm_%d%d", about->library,
                   c->compute == KVQ_COMPUTE_BF16 ? " in bf16" : "", about->major, about->minor);
}

kvq_status kvq_backend_cuda(const kvq_context *ctx, int index, kvq_compute compute, kvq_backend **out, kvq_error *err) {
    cuda_backend *c = NULL;
    kvq_backend  *be = NULL;
    kvq_status    status = KVQ_NEW(ctx, 1, "backend", &c, err);
    if (status != KVQ_OK) return status;
    status = kvq_cuda_open(ctx, index, &c->device, err);
    if (status != KVQ_OK) {
        kvq_free(ctx, c);
        return status;
    }
    c->compute = compute;
    describe(c);
    fill_table(c, ctx);
    be = &c->table;
    status = cuda_transfer_create(c, err);
    if (status == KVQ_OK)
        *out = be;
    else
        destroy(&be);
    return status;
}
