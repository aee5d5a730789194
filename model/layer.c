// SPDX-License-Identifier: Apache-2.0
//
// One decoder layer over one window:  x += o(attention(norm(x)));  x += mlp(norm(x)).
// The backward pass goes to activations only; weights have no gradients here, so nothing but x has to be kept.
#include "model_impl.h"

kvq_attention_shape kvq_model_attention_shape(const kvq_model_config *c, int64_t layer, int64_t n_tokens) {
    return (kvq_attention_shape){.n_tokens = n_tokens,
                                 .n_heads = c->n_heads,
                                 .n_kv_heads = c->n_kv_heads,
                                 .head_dim = c->head_dim,
                                 .window = kvq_layer_window(c, layer),
                                 .scale = c->attention_scale,
                                 .softcap = c->attention_softcap};
}

void kvq_linear_forward(const kvq_backend *be, const linear_weights *l, const float *x, float *y, int64_t m) {
    be->linear(be, x, l->w, l->bias, y, m, l->n_out, l->n_in);
}

void kvq_linear_gradient(const kvq_backend *be, const linear_weights *l, const float *dy, float *dx, int64_t m,
                         bool accumulate) {
    be->linear_backward(be, dy, l->w, dx, m, l->n_out, l->n_in, accumulate);
}

// ---------------------------------------------------------------- workspace

enum { WORKSPACE_BUFFERS = 19, ALL_BUFFERS = WORKSPACE_BUFFERS + MLP_BUFFERS };

static int list_buffers(const kvq_model *model, kvq_workspace *ws, int64_t S, bool backward,
                        kvq_model_buffer list[ALL_BUFFERS]) {
    const kvq_model_config *c = model->config;
    int64_t C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim;
    int64_t global = S * (c->rope.n_dims / 2), local = kvq_rope_count(c) > 1 ? global : 0;
    int64_t rows = S < LOGIT_ROWS ? S : LOGIT_ROWS, kept = backward ? S : 0, raw = c->qk_norm ? kept : 0;
    kvq_attention_shape shape = kvq_model_attention_shape(c, 0, S);
    shape.window = 0;        // no layer needs more
    shape.second.recent = 1; // a hook may have a second set
    const kvq_model_buffer own[WORKSPACE_BUFFERS] = {
        {&ws->rope[0].cos_table, global},
        {&ws->rope[0].sin_table, global},
        {&ws->rope[1].cos_table, local},
        {&ws->rope[1].sin_table, local},
        {&ws->q, S * q},
        {&ws->attended, S * q},
        {&ws->k, S * d},
        {&ws->v, S * d},
        {&ws->logits, rows * c->vocab_size},
        {&ws->logits_b, backward ? 0 : rows * c->vocab_size},
        {&ws->attention, model->be->attention_scratch_floats(model->be, &shape, backward)},
        {&ws->mid, kept * C},
        {&ws->k_rotated, kept * d},
        {&ws->dq, kept * q},
        {&ws->dattended, kept * q},
        {&ws->dk, kept * d},
        {&ws->dv, kept * d},
        {&ws->q_raw, raw * q},
        {&ws->k_raw, raw * d},
    };
    int n = kvq_mlp_list(model, &ws->mlp, S, backward, list);
    for (int i = 0; i < WORKSPACE_BUFFERS; i++) list[n++] = own[i];
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
    kvq_model_buffer list[ALL_BUFFERS];
    return kvq_buffers_floats(list, list_buffers(model, &unused, seq_len, backward, list)) +
           kvq_routing_floats(model->config, seq_len);
}

static kvq_status upload_rope(const kvq_model *model, kvq_workspace *ws, kvq_error *err) {
    const kvq_backend *be = model->be;
    int64_t            n = ws->capacity * (model->config->rope.n_dims / 2);
    float             *tables = NULL;
    kvq_status         status = KVQ_NEW(model->ctx, 2 * n, "rotary tables", &tables, err);
    if (status != KVQ_OK) return status;
    for (int i = 0; i < kvq_rope_count(model->config); i++) {
        kvq_rope_fill(model, i, 0, ws->capacity, tables, tables + n);
        be->upload(be, ws->rope[i].cos_table, tables, n);
        be->upload(be, ws->rope[i].sin_table, tables + n, n);
    }
    kvq_free(model->ctx, tables);
    return KVQ_OK;
}

kvq_status kvq_workspace_create(kvq_model *model, int64_t seq_len, bool backward, kvq_workspace **out, kvq_error *err) {
    kvq_workspace   *ws = NULL;
    kvq_model_buffer list[ALL_BUFFERS];
    kvq_status       status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(model->ctx, 1, "workspace", &ws, err));
    ws->capacity = seq_len;
    ws->backward = backward;
    int n = list_buffers(model, ws, seq_len, backward, list);
    KVQ_TRY(kvq_buffers_alloc(model->be, list, n, "activations of one window", &ws->storage, err));
    KVQ_TRY(kvq_routing_create(model, seq_len, &ws->mlp.routing, err));
    KVQ_TRY(upload_rope(model, ws, err));
    *out = ws;
    ws = NULL;

done:
    kvq_workspace_destroy(model, &ws);
    return status;
}

void kvq_workspace_destroy(kvq_model *model, kvq_workspace **workspace) {
    if (*workspace == NULL) return;
    kvq_routing_destroy(model, &(*workspace)->mlp.routing);
    model->be->release(model->be, (*workspace)->storage);
    kvq_free(model->ctx, *workspace);
    *workspace = NULL;
}

kvq_kv_view kvq_workspace_kv(const kvq_workspace *ws) { return (kvq_kv_view){ws->k, ws->v, ws->dk, ws->dv}; }

// ---------------------------------------------------------------- checks and projections

static kvq_status check_finite(const kvq_model *model, const float *x, int64_t m, int64_t width, int64_t layer,
                               const char *tensor, kvq_error *err) {
    int64_t at = model->be->find_nonfinite(model->be, x, m * width);
    if (at < 0) return KVQ_OK;
    kvq_status status = model->be->check(model->be, err); // a device that has failed gives no numbers
    if (status != KVQ_OK) return status;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL,
                    "layer %lld, %s, position %lld, channel %lld: the value is not finite", (long long)layer, tensor,
                    (long long)(at / width), (long long)(at % width));
}

static kvq_status check_workspace(const kvq_workspace *ws, int64_t n_tokens, bool backward, kvq_error *err) {
    if (n_tokens <= ws->capacity && (ws->backward || !backward)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "a %s workspace of %lld tokens was given %lld tokens",
                    ws->backward ? "backward" : "forward", (long long)ws->capacity, (long long)n_tokens);
}

// Every head of x [m, n_heads, D] through its norm.
static void head_norm(const kvq_model *model, const float *w, int n_heads, int64_t m, const float *x, float *y) {
    const kvq_model_config *c = model->config;
    model->be->rmsnorm(model->be, x, w, c->rms_norm_eps, y, m * n_heads, c->head_dim);
}

void kvq_layer_project(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, float *normed,
                       float *q_raw, float *k_raw, float *q, float *k, float *v) {
    const kvq_backend      *be = model->be;
    const kvq_model_config *c = model->config;
    int64_t                 C = c->hidden_size, nq = layer->q.n_out, d = layer->k.n_out;
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        int64_t rows = end - first;
        be->rmsnorm(be, x + first * C, layer->input_norm, c->rms_norm_eps, normed, rows, C);
        kvq_linear_forward(be, &layer->q, normed, q_raw + first * nq, rows);
        kvq_linear_forward(be, &layer->k, normed, k_raw + first * d, rows);
        kvq_linear_forward(be, &layer->v, normed, v + first * d, rows);
    }
    if (!c->qk_norm) return;
    head_norm(model, layer->q_norm, c->n_heads, m, q_raw, q);
    head_norm(model, layer->k_norm, c->n_kv_heads, m, k_raw, k);
}

// ---------------------------------------------------------------- attention

// scale: what the result is multiplied with; channels that are not rotated pass
static void rotate(const kvq_model *model, const kvq_workspace *ws, int64_t layer, int direction, float scale,
                   int64_t m, int n_heads, float *x) {
    const kvq_model_config *c = model->config;
    const rope_tables      *t = &ws->rope[kvq_rope_of_layer(c, layer)];
    model->be->rope(model->be, x, t->cos_table, t->sin_table, direction, scale, m, n_heads, c->head_dim,
                    c->rope.n_dims);
}

// The layer multiplies by a R, R being a rotation and a the amplitude. The inverse is R^T / a. By the chain rule a
// gradient before is a R^T times the one after, so the one after is R / a times the one before. The tables hold a R,
// hence the second division.
void kvq_rotate_keys(const kvq_model *model, const kvq_workspace *ws, int64_t layer, kvq_rotation rotation,
                     int64_t n_tokens, float *k) {
    double a = model->rope[kvq_rope_of_layer(model->config, layer)].amplitude;
    float  scale = rotation == KVQ_ROTATE_FORWARD ? 1.0f : (float)(1 / (a * a));
    rotate(model, ws, layer, rotation == KVQ_ROTATE_BACK ? -1 : 1, scale, n_tokens, model->config->n_kv_heads, k);
}

void kvq_rotate_queries(const kvq_model *model, const kvq_workspace *ws, int64_t layer, int64_t n_tokens, float *q) {
    rotate(model, ws, layer, 1, 1, n_tokens, model->config->n_heads, q);
}

void kvq_layer_attention(const kvq_model *model, const kvq_workspace *ws, int64_t layer, const kvq_qkv *rotated,
                         int64_t n_tokens, float *out) {
    kvq_attention_shape shape = kvq_model_attention_shape(model->config, layer, n_tokens);
    shape.second = rotated->second;
    model->be->attention(model->be, &shape, rotated->q, rotated->k, rotated->v, rotated->k_recent, rotated->v_recent,
                         out, ws->attention);
}

// ---------------------------------------------------------------- forward

kvq_status kvq_layer_forward(kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t n_tokens, float *x,
                             kvq_qkv_hook hook, void *user, kvq_error *err) {
    int64_t    d = layer->k.n_out;
    kvq_qkv    qkv = {.q = ws->q, .k = ws->k, .v = ws->v};
    kvq_status status = KVQ_OK;
    KVQ_TRY(check_workspace(ws, n_tokens, false, err));
    kvq_layer_project(model, layer, n_tokens, x, ws->mlp.normed, ws->q, ws->k, ws->q, ws->k, ws->v);
    KVQ_TRY(check_finite(model, ws->k, n_tokens, d, layer->index, "K", err));
    KVQ_TRY(check_finite(model, ws->v, n_tokens, d, layer->index, "V", err));
    if (hook != NULL) KVQ_TRY(hook(user, layer->index, &qkv, n_tokens, err));
    kvq_rotate_queries(model, ws, layer->index, n_tokens, qkv.q);
    kvq_rotate_keys(model, ws, layer->index, KVQ_ROTATE_FORWARD, n_tokens, qkv.k);
    if (kvq_second_set_used(&qkv.second))
        kvq_rotate_keys(model, ws, layer->index, KVQ_ROTATE_FORWARD, n_tokens, qkv.k_recent);
    kvq_layer_attention(model, ws, layer->index, &qkv, n_tokens, ws->attended);
    kvq_layer_attended(model, layer, n_tokens, ws->attended, x, &ws->mlp);
    KVQ_TRY(kvq_layer_mlp(model, layer, n_tokens, x, &ws->mlp, err));
    KVQ_TRY(check_finite(model, x, n_tokens, model->config->hidden_size, layer->index, "hidden state", err));

done:
    return status;
}

// ---------------------------------------------------------------- backward

// From x to the state between attention and MLP in ws->mid; q and k_rotated stay as they entered attention, k as it
// entered RoPE.
static void recompute(const kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t m, const float *x) {
    const kvq_backend *be = model->be;
    bool               norms = model->config->qk_norm;
    const kvq_qkv      rotated = {.q = ws->q, .k = ws->k_rotated, .v = ws->v};
    kvq_layer_project(model, layer, m, x, ws->mlp.normed, norms ? ws->q_raw : ws->q, norms ? ws->k_raw : ws->k, ws->q,
                      ws->k, ws->v);
    be->copy(be, ws->k_rotated, ws->k, m * layer->k.n_out);
    kvq_rotate_queries(model, ws, layer->index, m, ws->q);
    kvq_rotate_keys(model, ws, layer->index, KVQ_ROTATE_FORWARD, m, ws->k_rotated);
    kvq_layer_attention(model, ws, layer->index, &rotated, m, ws->attended);
    be->copy(be, ws->mid, x, m * model->config->hidden_size);
    kvq_layer_attended(model, layer, m, ws->attended, ws->mid, &ws->mlp);
}

// dx [m, n_heads, D] = d loss / d (input of head_norm)
static void head_norm_backward(const kvq_model *model, const float *w, int n_heads, int64_t m, const float *x,
                               const float *dy, float *dx) {
    const kvq_model_config *c = model->config;
    model->be->zero(model->be, dx, m * n_heads * c->head_dim);
    model->be->rmsnorm_backward(model->be, x, w, c->rms_norm_eps, dy, dx, m * n_heads, c->head_dim);
}

// dx += what comes through the projections; dq, dk and dv are the gradients of their outputs.
static void project_backward(const kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t m,
                             const float *x, const float *dq, const float *dk, float *dx) {
    const kvq_backend *be = model->be;
    int64_t            C = model->config->hidden_size, nq = layer->q.n_out, d = layer->k.n_out;
    float             *dnormed = ws->mlp.dnormed;
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        int64_t rows = end - first;
        kvq_linear_gradient(be, &layer->q, dq + first * nq, dnormed, rows, false);
        kvq_linear_gradient(be, &layer->k, dk + first * d, dnormed, rows, true);
        kvq_linear_gradient(be, &layer->v, ws->dv + first * d, dnormed, rows, true);
        be->rmsnorm_backward(be, x + first * C, layer->input_norm, model->config->rms_norm_eps, dnormed, dx + first * C,
                             rows, C);
    }
}

kvq_status kvq_layer_backward(kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t n_tokens,
                              const float *x, float *dx, kvq_error *err) {
    const kvq_backend      *be = model->be;
    const kvq_model_config *c = model->config;
    int64_t                 m = n_tokens, d = layer->k.n_out;
    kvq_attention_shape     shape = kvq_model_attention_shape(c, layer->index, m);
    const float            *dq = ws->dq, *dk = ws->dk;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(check_workspace(ws, n_tokens, true, err));
    recompute(model, layer, ws, m, x);
    KVQ_TRY(kvq_layer_mlp_backward(model, layer, m, ws->mid, dx, &ws->mlp, err));
    kvq_layer_attended_backward(model, layer, m, ws->attended, dx, ws->dattended, &ws->mlp);
    be->attention_backward(be, &shape, ws->q, ws->k_rotated, ws->v, ws->attended, ws->dattended, ws->dq, ws->dk, ws->dv,
                           ws->attention);
    rotate(model, ws, layer->index, -1, 1, m, c->n_heads, ws->dq); // a R^T, as the chain rule says
    rotate(model, ws, layer->index, -1, 1, m, c->n_kv_heads, ws->dk);
    if (c->qk_norm) { // q and k_rotated have done their work; dk itself is a result
        head_norm_backward(model, layer->q_norm, c->n_heads, m, ws->q_raw, ws->dq, ws->q);
        head_norm_backward(model, layer->k_norm, c->n_kv_heads, m, ws->k_raw, ws->dk, ws->k_rotated);
        dq = ws->q;
        dk = ws->k_rotated;
    }
    project_backward(model, layer, ws, m, x, dq, dk, dx);

    KVQ_TRY(check_finite(model, ws->dk, m, d, layer->index, "gradient of K", err));
    KVQ_TRY(check_finite(model, ws->dv, m, d, layer->index, "gradient of V", err));
    KVQ_TRY(check_finite(model, dx, m, c->hidden_size, layer->index, "gradient of the hidden state", err));

done:
    return status;
}
