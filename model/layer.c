// SPDX-License-Identifier: Apache-2.0
//
// One decoder layer over one window:  x += o(attention(norm(x)));  x += down(silu(gate(norm(x))) * up(norm(x))).
// The backward pass goes to activations only; weights have no gradients here, so nothing but x has to be kept.
#include "model_impl.h"

kvq_attention_shape kvq_model_attention_shape(const kvq_model_config *c, int64_t n_tokens) {
    kvq_attention_shape shape = {
        .n_tokens = n_tokens, .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim};
    shape.scale = c->attention_scale;
    return shape;
}

void kvq_apply_linear(const kvq_backend *be, const linear_weights *l, const float *x, float *y, int64_t m) {
    be->linear(be, x, l->w, l->bias, y, m, l->n_out, l->n_in);
}

static void linear_gradient(const kvq_backend *be, const linear_weights *l, const float *dy, float *dx, int64_t m,
                            bool accumulate) {
    be->linear_backward(be, dy, l->w, dx, m, l->n_out, l->n_in, accumulate);
}

// ---------------------------------------------------------------- workspace

#define MAX_BUFFERS 24

static int list_buffers(const kvq_model *model, kvq_workspace *ws, int64_t S, bool backward,
                        kvq_model_buffer list[MAX_BUFFERS]) {
    const kvq_model_config *c = model->config;
    int64_t C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim;
    int64_t rot = c->rope.n_dims / 2, F = c->intermediate_size;
    int64_t rows = S < LOGIT_ROWS ? S : LOGIT_ROWS;
    kvq_attention_shape    shape = kvq_model_attention_shape(c, S);
    const kvq_model_buffer both[] = {
        {&ws->cos_table, S * rot},
        {&ws->sin_table, S * rot},
        {&ws->normed, S * C},
        {&ws->q, S * q},
        {&ws->attended, S * q},
        {&ws->k, S * d},
        {&ws->v, S * d},
        {&ws->gate, S * F},
        {&ws->up, S * F},
        {&ws->logits, rows * c->vocab_size},
        {&ws->logits_b, backward ? 0 : rows * c->vocab_size},
        {&ws->attention, model->be->attention_scratch_floats(model->be, &shape, backward)},
    };
    const kvq_model_buffer gradients[] = {
        {&ws->mid, S * C}, {&ws->k_rotated, S * d}, {&ws->dq, S * q},     {&ws->dattended, S * q},
        {&ws->dk, S * d},  {&ws->dv, S * d},        {&ws->dgated, S * F}, {&ws->dnormed, S * C},
    };
    int n = 0;
    for (size_t i = 0; i < sizeof both / sizeof *both; i++) list[n++] = both[i];
    for (size_t i = 0; backward && i < sizeof gradients / sizeof *gradients; i++) list[n++] = gradients[i];
    return n;
}

int64_t kvq_buffers_floats(const kvq_model_buffer *list, int n) {
    int64_t sum = 0;
    for (int i = 0; i < n; i++) sum += list[i].n_floats;
    return sum;
}

kvq_status kvq_buffers_alloc(const kvq_backend *be, const kvq_model_buffer *list, int n, const char *what,
                             float **storage, kvq_error *err) {
    kvq_status status = be->alloc(be, kvq_buffers_floats(list, n), what, storage, err);
    float     *at = *storage;
    for (int i = 0; i < n && status == KVQ_OK; i++) {
        *list[i].pointer = at;
        at += list[i].n_floats;
    }
    return status;
}

int64_t kvq_workspace_floats(const kvq_model *model, int64_t seq_len, bool backward) {
    kvq_workspace    unused;
    kvq_model_buffer list[MAX_BUFFERS];
    return kvq_buffers_floats(list, list_buffers(model, &unused, seq_len, backward, list));
}

kvq_status kvq_workspace_create(kvq_model *model, int64_t seq_len, bool backward, kvq_workspace **out, kvq_error *err) {
    const kvq_context *ctx = model->ctx;
    const kvq_backend *be = model->be;
    int64_t            n_table = seq_len * (model->config->rope.n_dims / 2);
    kvq_workspace     *ws = NULL;
    float             *tables = NULL;
    kvq_model_buffer   list[MAX_BUFFERS];
    kvq_status         status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "workspace", &ws, err));
    ws->capacity = seq_len;
    ws->backward = backward;
    int n = list_buffers(model, ws, seq_len, backward, list);
    KVQ_TRY(kvq_buffers_alloc(be, list, n, "activations of one window", &ws->storage, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * n_table, "rotary tables", &tables, err));
    kvq_rope_fill(model, 0, seq_len, tables, tables + n_table);
    be->upload(be, ws->cos_table, tables, n_table);
    be->upload(be, ws->sin_table, tables + n_table, n_table);
    *out = ws;
    ws = NULL;

done:
    kvq_free(ctx, tables);
    kvq_workspace_destroy(model, &ws);
    return status;
}

void kvq_workspace_destroy(kvq_model *model, kvq_workspace **workspace) {
    if (*workspace == NULL) return;
    model->be->release(model->be, (*workspace)->storage);
    kvq_free(model->ctx, *workspace);
    *workspace = NULL;
}

kvq_kv_view kvq_workspace_kv(const kvq_workspace *ws) { return (kvq_kv_view){ws->k, ws->v, ws->dk, ws->dv}; }

// ---------------------------------------------------------------- forward

static kvq_status check_finite(const kvq_model *model, const float *x, int64_t m, int64_t width, int64_t layer,
                               const char *tensor, kvq_error *err) {
    int64_t at = model->be->find_nonfinite(model->be, x, m * width);
    if (at < 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL,
                    "layer %lld, %s, position %lld, channel %lld: the value is not finite", (long long)layer, tensor,
                    (long long)(at / width), (long long)(at % width));
}

static kvq_status check_workspace(const kvq_workspace *ws, int64_t n_tokens, bool backward, kvq_error *err) {
    if (n_tokens <= ws->capacity && (ws->backward || !backward)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "a %s workspace of %lld tokens was given %lld tokens",
                    ws->backward ? "backward" : "forward", (long long)ws->capacity, (long long)n_tokens);
}

void kvq_layer_project(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, float *normed,
                       float *q, float *k, float *v) {
    const kvq_backend *be = model->be;
    be->rmsnorm(be, x, layer->input_norm, model->config->rms_norm_eps, normed, m, model->config->hidden_size);
    kvq_apply_linear(be, &layer->q, normed, q, m);
    kvq_apply_linear(be, &layer->k, normed, k, m);
    kvq_apply_linear(be, &layer->v, normed, v, m);
}

static void gate_and_up(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, float *normed,
                        float *gate, float *up) {
    const kvq_backend *be = model->be;
    be->rmsnorm(be, x, layer->post_attention_norm, model->config->rms_norm_eps, normed, m, model->config->hidden_size);
    kvq_apply_linear(be, &layer->gate, normed, gate, m);
    kvq_apply_linear(be, &layer->up, normed, up, m);
}

void kvq_layer_finish(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *attended, float *x,
                      float *normed, float *gate, float *up) {
    const kvq_backend *be = model->be;
    int64_t            C = model->config->hidden_size;
    kvq_apply_linear(be, &layer->o, attended, normed, m);
    be->add(be, x, normed, m * C);
    gate_and_up(model, layer, m, x, normed, gate, up);
    be->silu_mul(be, gate, up, gate, m * model->config->intermediate_size);
    kvq_apply_linear(be, &layer->down, gate, normed, m);
    be->add(be, x, normed, m * C);
}

static void rotate(const kvq_model *model, const kvq_workspace *ws, int direction, int64_t m, float *q, float *k) {
    const kvq_model_config *c = model->config;
    model->be->rope(model->be, q, ws->cos_table, ws->sin_table, direction, m, c->n_heads, c->head_dim, c->rope.n_dims);
    model->be->rope(model->be, k, ws->cos_table, ws->sin_table, direction, m, c->n_kv_heads, c->head_dim,
                    c->rope.n_dims);
}

kvq_status kvq_layer_forward(kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t n_tokens, float *x,
                             kvq_qkv_hook hook, void *user, kvq_error *err) {
    const kvq_backend  *be = model->be;
    int64_t             d = layer->k.n_out;
    kvq_attention_shape shape = kvq_model_attention_shape(model->config, n_tokens);
    kvq_status          status = KVQ_OK;
    KVQ_TRY(check_workspace(ws, n_tokens, false, err));
    kvq_layer_project(model, layer, n_tokens, x, ws->normed, ws->q, ws->k, ws->v);
    KVQ_TRY(check_finite(model, ws->k, n_tokens, d, layer->index, "K", err));
    KVQ_TRY(check_finite(model, ws->v, n_tokens, d, layer->index, "V", err));
    if (hook != NULL) KVQ_TRY(hook(user, layer->index, (kvq_qkv){ws->q, ws->k, ws->v}, n_tokens, err));
    rotate(model, ws, 1, n_tokens, ws->q, ws->k);
    be->attention(be, &shape, ws->q, ws->k, ws->v, ws->attended, ws->attention);
    kvq_layer_finish(model, layer, n_tokens, ws->attended, x, ws->normed, ws->gate, ws->up);
    KVQ_TRY(check_finite(model, x, n_tokens, model->config->hidden_size, layer->index, "hidden state", err));

done:
    return status;
}

// ---------------------------------------------------------------- backward

// From d loss / d output in dx to d loss / d mid, mid being the state between attention and MLP.
static void mlp_backward(const kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t m, float *dx) {
    const kvq_backend      *be = model->be;
    const kvq_model_config *c = model->config;
    gate_and_up(model, layer, m, ws->mid, ws->normed, ws->gate, ws->up);
    linear_gradient(be, &layer->down, dx, ws->dgated, m, false);
    be->silu_mul_backward(be, ws->gate, ws->up, ws->dgated, m * c->intermediate_size);
    linear_gradient(be, &layer->gate, ws->gate, ws->dnormed, m, false);
    linear_gradient(be, &layer->up, ws->up, ws->dnormed, m, true);
    be->rmsnorm_backward(be, ws->mid, layer->post_attention_norm, c->rms_norm_eps, ws->dnormed, dx, m, c->hidden_size);
}

kvq_status kvq_layer_backward(kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t n_tokens,
                              const float *x, float *dx, kvq_error *err) {
    const kvq_backend      *be = model->be;
    const kvq_model_config *c = model->config;
    int64_t                 m = n_tokens, C = c->hidden_size, d = layer->k.n_out;
    kvq_attention_shape     shape = kvq_model_attention_shape(c, m);
    kvq_status              status = KVQ_OK;
    KVQ_TRY(check_workspace(ws, n_tokens, true, err));

    kvq_layer_project(model, layer, m, x, ws->normed, ws->q, ws->k, ws->v);
    be->copy(be, ws->k_rotated, ws->k, m * d);
    rotate(model, ws, 1, m, ws->q, ws->k_rotated);
    be->attention(be, &shape, ws->q, ws->k_rotated, ws->v, ws->attended, ws->attention);
    kvq_apply_linear(be, &layer->o, ws->attended, ws->mid, m);
    be->add(be, ws->mid, x, m * C);

    mlp_backward(model, layer, ws, m, dx);
    linear_gradient(be, &layer->o, dx, ws->dattended, m, false);
    be->attention_backward(be, &shape, ws->q, ws->k_rotated, ws->v, ws->attended, ws->dattended, ws->dq, ws->dk, ws->dv,
                           ws->attention);
    rotate(model, ws, -1, m, ws->dq, ws->dk);
    linear_gradient(be, &layer->q, ws->dq, ws->dnormed, m, false);
    linear_gradient(be, &layer->k, ws->dk, ws->dnormed, m, true);
    linear_gradient(be, &layer->v, ws->dv, ws->dnormed, m, true);
    be->rmsnorm_backward(be, x, layer->input_norm, c->rms_norm_eps, ws->dnormed, dx, m, C);

    KVQ_TRY(check_finite(model, ws->dk, m, d, layer->index, "gradient of K", err));
    KVQ_TRY(check_finite(model, ws->dv, m, d, layer->index, "gradient of V", err));
    KVQ_TRY(check_finite(model, dx, m, C, layer->index, "gradient of the hidden state", err));

done:
    return status;
}
