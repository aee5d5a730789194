// SPDX-License-Identifier: Apache-2.0
//
// A mixture of experts: a router sends every token to k of E MLPs and adds their outputs by its weights. Experts are
// taken one after the other, each with all of its tokens, so that one expert's weights are in memory at a time and the
// terms of a token are added in the order of the experts.
#include "model_impl.h"

// ---------------------------------------------------------------- lists of tokens

int64_t kvq_routing_floats(const kvq_model_config *c, int64_t n_tokens) {
    if (c->n_experts == 0) return 0;
    return n_tokens * (c->n_experts + 7 * (int64_t)c->experts_per_token) + 2 * (c->n_experts + 1);
}

kvq_status kvq_routing_create(const kvq_model *model, int64_t n_tokens, kvq_routing **out, kvq_error *err) {
    const kvq_context      *ctx = model->ctx;
    const kvq_model_config *c = model->config;
    int64_t                 n = n_tokens * c->experts_per_token;
    kvq_routing            *r = NULL;
    kvq_status              status = KVQ_OK;
    if (c->n_experts == 0) return KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "routing", &r, err));
    r->route.n_experts = c->n_experts;
    r->route.per_token = c->experts_per_token;
    r->route.normalize = c->normalize_experts;
    KVQ_TRY(KVQ_NEW(ctx, n_tokens * c->n_experts, "routing", &r->route.probability, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->route.expert, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->route.weight, err));
    KVQ_TRY(KVQ_NEW(ctx, c->n_experts + 1, "routing", &r->start, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->token, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->choice, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->weight, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->dot, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "routing", &r->dweight, err));
    *out = r;
    r = NULL;

done:
    kvq_routing_destroy(model, &r);
    return status;
}

void kvq_routing_destroy(const kvq_model *model, kvq_routing **routing) {
    kvq_routing *r = *routing;
    if (r == NULL) return;
    void *const all[] = {r->route.probability,
                         r->route.expert,
                         r->route.weight,
                         r->start,
                         r->token,
                         r->choice,
                         r->weight,
                         r->dot,
                         r->dweight};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvq_free(model->ctx, all[i]);
    kvq_free(model->ctx, r);
    *routing = NULL;
}

// Routes of the tokens from `first` on.
static kvq_route route_from(const kvq_routing *r, int64_t first) {
    kvq_route route = r->route;
    route.probability += first * route.n_experts;
    route.expert += first * route.per_token;
    route.weight += first * route.per_token;
    return route;
}

// Counting sort of the choices by expert.
static void make_lists(kvq_routing *r, int64_t n_tokens) {
    int     E = r->route.n_experts, k = r->route.per_token;
    int64_t n = n_tokens * k;
    for (int e = 0; e <= E; e++) r->start[e] = 0;
    for (int64_t i = 0; i < n; i++) r->start[r->route.expert[i] + 1]++;
    for (int e = 0; e < E; e++) r->start[e + 1] += r->start[e];
    for (int64_t i = 0; i < n; i++) {
        int64_t at = r->start[r->route.expert[i]]++;
        r->token[at] = (int32_t)(i / k);
        r->choice[at] = (int32_t)i;
        r->weight[at] = r->route.weight[i];
    }
    for (int e = E; e > 0; e--) r->start[e] = r->start[e - 1]; // each has become the end of its list
    r->start[0] = 0;
}

static void norm(const kvq_model *model, const kvq_layer *layer, const float *x, float *y, int64_t m) {
    model->be->rmsnorm(model->be, x, layer->mlp_norm, model->config->rms_norm_eps, y, m, model->config->hidden_size);
}

static void route_all(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, mlp_buffers *b) {
    int64_t C = model->config->hidden_size;
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        kvq_route to = route_from(b->routing, first);
        norm(model, layer, x + first * C, b->normed, end - first);
        model->be->route(model->be, &to, b->normed, layer->router, end - first, C);
    }
    make_lists(b->routing, m);
}

// ---------------------------------------------------------------- one expert

// Its tokens [first, end) of the list through the first half of the MLP: gate and up in b.
static void expert_inputs(const kvq_model *model, const kvq_layer *layer, const mlp_weights *w, const float *x,
                          int64_t first, int64_t end, mlp_buffers *b) {
    const kvq_backend *be = model->be;
    be->gather_rows(be, x, b->routing->token + first, b->normed, end - first, model->config->hidden_size);
    norm(model, layer, b->normed, b->normed, end - first);
    kvq_mlp_gate_and_up(model, w, end - first, b->normed, b->gate, b->up);
}

static void expert_forward(const kvq_model *model, const kvq_layer *layer, const mlp_weights *w, const float *x,
                           int64_t first, int64_t end, mlp_buffers *b) {
    const kvq_backend *be = model->be;
    const kvq_routing *r = b->routing;
    expert_inputs(model, layer, w, x, first, end, b);
    kvq_mlp_activate(model, end - first, b->gate, b->up, b->gate);
    kvq_linear_forward(be, &w->down, b->gate, b->normed, end - first);
    be->scatter_rows(be, b->normed, r->token + first, r->weight + first, b->mixed, end - first,
                     model->config->hidden_size);
}

// With y = down(gated) and a token's weight p: the token's output holds p y, so d loss / d gated = p down^T dy and
// d loss / d p = dy . y = (down^T dy) . gated. Everything is linear in p, which is applied last.
static void expert_backward(const kvq_model *model, const kvq_layer *layer, const mlp_weights *w, const float *x,
                            const float *dy, int64_t first, int64_t end, mlp_buffers *b) {
    const kvq_backend *be = model->be;
    const kvq_routing *r = b->routing;
    int64_t            n = end - first, C = model->config->hidden_size;
    expert_inputs(model, layer, w, x, first, end, b);
    kvq_mlp_activate(model, n, b->gate, b->up, b->gated);
    be->gather_rows(be, dy, r->token + first, b->dnormed, n, C);
    kvq_linear_gradient(be, &w->down, b->dnormed, b->dgated, n, false);
    be->row_dots(be, b->dgated, b->gated, r->dot + first, n, model->config->intermediate_size);
    for (int64_t i = first; i < end; i++) r->dweight[r->choice[i]] = r->dot[i];
    kvq_mlp_gate_backward(model, w, n, b->gate, b->up, b->dgated, b->dnormed);
    be->scatter_rows(be, b->dnormed, r->token + first, r->weight + first, b->mixed, n, C);
}

// ---------------------------------------------------------------- all experts

// dy NULL: forward. Experts without tokens are not even loaded.
static kvq_status each_expert(kvq_model *model, const kvq_layer *layer, const float *x, const float *dy, mlp_buffers *b,
                              kvq_error *err) {
    const kvq_routing *r = b->routing;
    for (int e = 0; e < r->route.n_experts; e++) {
        const mlp_weights *w = NULL;
        int64_t            n = r->start[e + 1] - r->start[e];
        kvq_status         status = n > 0 ? kvq_expert_load(model, layer, e, &w, err) : KVQ_OK;
        if (status != KVQ_OK) return status;
        for (int64_t first = 0, end; first < n; first = end) {
            int64_t at = r->start[e] + first;
            end = kvq_block_end(model, first, n);
            if (dy == NULL) {
                expert_forward(model, layer, w, x, at, at + end - first, b);
            } else {
                expert_backward(model, layer, w, x, dy, at, at + end - first, b);
            }
        }
    }
    return KVQ_OK;
}

kvq_status kvq_experts_forward(kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, mlp_buffers *b,
                               kvq_error *err) {
    route_all(model, layer, m, x, b);
    model->be->zero(model->be, b->mixed, m * model->config->hidden_size);
    return each_expert(model, layer, x, NULL, b, err);
}

kvq_status kvq_experts_backward(kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, const float *dy,
                                mlp_buffers *b, kvq_error *err) {
    const kvq_backend *be = model->be;
    int64_t            C = model->config->hidden_size;
    route_all(model, layer, m, x, b);
    be->zero(be, b->mixed, m * C);
    kvq_status status = each_expert(model, layer, x, dy, b, err);
    if (status == KVQ_OK)
        be->route_backward(be, &b->routing->route, b->routing->dweight, layer->router, b->mixed, m, C);
    return status;
}
