// SPDX-License-Identifier: Apache-2.0
//
// The part of a layer behind attention:  x += o(attended);  x += mlp(norm(x)), each sum's second half normed once more
// where the model has such norms. Rows are independent here, so everything goes by blocks of them.
#include "model_impl.h"

int64_t kvq_block_end(const kvq_model *model, int64_t first, int64_t n_rows) {
    int64_t n_threads = model->ctx->n_threads, rows = ROW_TILE * (n_threads > 2 ? n_threads : 2);
    return n_rows - first < rows + ROW_TILE ? n_rows : first + rows;
}

int64_t kvq_block_capacity(const kvq_model *model, int64_t n_rows) {
    int64_t first = kvq_block_end(model, 0, n_rows);
    return first == n_rows ? n_rows : first + ROW_TILE - 1;
}

int kvq_mlp_list(const kvq_model *model, mlp_buffers *b, int64_t n_tokens, bool backward,
                 kvq_model_buffer list[MLP_BUFFERS]) {
    const kvq_model_config *c = model->config;
    int64_t                 rows = kvq_block_capacity(model, n_tokens), C = c->hidden_size, F = c->intermediate_size;
    bool                    experts = c->n_experts > 0;
    const kvq_model_buffer  all[MLP_BUFFERS] = {
         {&b->normed, rows * C},
         {&b->gate, rows * F},
         {&b->up, rows * F},
         {&b->dnormed, backward ? rows * C : 0},
         {&b->dgated, backward ? rows * F : 0},
         {&b->mixed, experts ? n_tokens * C : 0},
         {&b->gated, experts && backward ? rows * F : 0},
    };
    for (int i = 0; i < MLP_BUFFERS; i++) list[i] = all[i];
    return MLP_BUFFERS;
}

// ---------------------------------------------------------------- pieces

static kvq_gate_kind gate_of(const kvq_model *model) {
    static const kvq_gate_kind GATES[] = {[KVQ_SILU] = KVQ_GATE_SILU, [KVQ_GELU_TANH] = KVQ_GATE_GELU_TANH};
    return GATES[model->config->activation];
}

void kvq_mlp_gate_and_up(const kvq_model *model, const mlp_weights *w, int64_t m, const float *normed, float *gate,
                         float *up) {
    kvq_linear_forward(model->be, &w->gate, normed, gate, m);
    kvq_linear_forward(model->be, &w->up, normed, up, m);
}

void kvq_mlp_activate(const kvq_model *model, int64_t m, const float *gate, const float *up, float *y) {
    model->be->gated_mul(model->be, gate_of(model), gate, up, y, m * model->config->intermediate_size);
}

void kvq_mlp_gate_backward(const kvq_model *model, const mlp_weights *w, int64_t m, float *gate, float *up,
                           const float *dgated, float *dnormed) {
    const kvq_backend *be = model->be;
    be->gated_mul_backward(be, gate_of(model), gate, up, dgated, m * model->config->intermediate_size);
    kvq_linear_gradient(be, &w->gate, gate, dnormed, m, false);
    kvq_linear_gradient(be, &w->up, up, dnormed, m, true);
}

static void norm(const kvq_model *model, const float *w, const float *x, float *y, int64_t m) {
    model->be->rmsnorm(model->be, x, w, model->config->rms_norm_eps, y, m, model->config->hidden_size);
}

static void norm_gradient(const kvq_model *model, const float *w, const float *x, const float *dy, float *dx,
                          int64_t m) {
    model->be->rmsnorm_backward(model->be, x, w, model->config->rms_norm_eps, dy, dx, m, model->config->hidden_size);
}

// ---------------------------------------------------------------- forward

void kvq_layer_attended(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *attended, float *x,
                        mlp_buffers *b) {
    int64_t C = model->config->hidden_size;
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        kvq_linear_forward(model->be, &layer->o, attended + first * layer->o.n_in, b->normed, end - first);
        if (layer->attention_post_norm != NULL)
            norm(model, layer->attention_post_norm, b->normed, b->normed, end - first);
        model->be->add(model->be, x + first * C, b->normed, (end - first) * C);
    }
}

static void dense_block(const kvq_model *model, const kvq_layer *layer, int64_t m, float *x, mlp_buffers *b) {
    norm(model, layer->mlp_norm, x, b->normed, m);
    kvq_mlp_gate_and_up(model, &layer->mlp, m, b->normed, b->gate, b->up);
    kvq_mlp_activate(model, m, b->gate, b->up, b->gate);
    kvq_linear_forward(model->be, &layer->mlp.down, b->gate, b->normed, m);
    if (layer->mlp_post_norm != NULL) norm(model, layer->mlp_post_norm, b->normed, b->normed, m);
    model->be->add(model->be, x, b->normed, m * model->config->hidden_size);
}

kvq_status kvq_layer_mlp(kvq_model *model, const kvq_layer *layer, int64_t m, float *x, mlp_buffers *b,
                         kvq_error *err) {
    int64_t C = model->config->hidden_size;
    if (layer->router != NULL) {
        kvq_status status = kvq_experts_forward(model, layer, m, x, b, err);
        if (status == KVQ_OK) model->be->add(model->be, x, b->mixed, m * C);
        return status;
    }
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        dense_block(model, layer, end - first, x + first * C, b);
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- backward

// dy = d loss / d (norm of y) with y = down(gated) -> d loss / d y in b->dnormed; y is made again.
static void mlp_post_norm_backward(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *dy,
                                   mlp_buffers *b) {
    kvq_mlp_activate(model, m, b->gate, b->up, b->dgated);
    kvq_linear_forward(model->be, &layer->mlp.down, b->dgated, b->normed, m);
    model->be->zero(model->be, b->dnormed, m * model->config->hidden_size);
    norm_gradient(model, layer->mlp_post_norm, b->normed, dy, b->dnormed, m);
}

static void dense_block_backward(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *mid, float *dx,
                                 mlp_buffers *b) {
    norm(model, layer->mlp_norm, mid, b->normed, m);
    kvq_mlp_gate_and_up(model, &layer->mlp, m, b->normed, b->gate, b->up);
    if (layer->mlp_post_norm != NULL) mlp_post_norm_backward(model, layer, m, dx, b);
    kvq_linear_gradient(model->be, &layer->mlp.down, layer->mlp_post_norm != NULL ? b->dnormed : dx, b->dgated, m,
                        false);
    kvq_mlp_gate_backward(model, &layer->mlp, m, b->gate, b->up, b->dgated, b->dnormed);
    norm_gradient(model, layer->mlp_norm, mid, b->dnormed, dx, m);
}

kvq_status kvq_layer_mlp_backward(kvq_model *model, const kvq_layer *layer, int64_t m, const float *mid, float *dx,
                                  mlp_buffers *b, kvq_error *err) {
    int64_t C = model->config->hidden_size;
    if (layer->router != NULL) {
        kvq_status status = kvq_experts_backward(model, layer, m, mid, dx, b, err);
        if (status == KVQ_OK) norm_gradient(model, layer->mlp_norm, mid, b->mixed, dx, m);
        return status;
    }
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        dense_block_backward(model, layer, end - first, mid + first * C, dx + first * C, b);
    }
    return KVQ_OK;
}

void kvq_layer_attended_backward(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *attended,
                                 const float *dx, float *dattended, mlp_buffers *b) {
    int64_t C = model->config->hidden_size, q = layer->o.n_in;
    for (int64_t first = 0, end; first < m; first = end) {
        end = kvq_block_end(model, first, m);
        int64_t      rows = end - first;
        const float *dy = dx + first * C;
        if (layer->attention_post_norm != NULL) {
            kvq_linear_forward(model->be, &layer->o, attended + first * q, b->normed, rows);
            model->be->zero(model->be, b->dnormed, rows * C);
            norm_gradient(model, layer->attention_post_norm, b->normed, dy, b->dnormed, rows);
            dy = b->dnormed;
        }
        kvq_linear_gradient(model->be, &layer->o, dy, dattended + first * q, rows, false);
    }
}
