// SPDX-License-Identifier: Apache-2.0
// See reference_model.h.
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "reference_model.h"

typedef struct matrix {
    double *w, *bias;
    int64_t n_out, n_in;
} matrix;

typedef struct mlp {
    matrix gate, up, down;
} mlp;

typedef struct layer {
    matrix norm1, q, k, v, q_norm, k_norm, o, post1, norm2, post2; // post1, post2: gemma
    matrix router;
    mlp   *mlps; // one, or one per expert
} layer;

struct reference_model {
    const kvq_checkpoint   *checkpoint;
    const kvq_model_config *c;
    layer                  *layers;
    matrix                  embedding, norm, head;
};

static double *read_tensor(const kvq_checkpoint *checkpoint, const char *name, int64_t rows, int64_t columns) {
    float    *raw = malloc((size_t)(rows * columns) * sizeof *raw);
    double   *wide = malloc((size_t)(rows * columns) * sizeof *wide);
    kvq_error err = {0};
    ck_assert_msg(kvq_checkpoint_read(checkpoint, name, rows, columns, 0, rows, raw, &err) == KVQ_OK, "%s",
                  err.message);
    for (int64_t i = 0; i < rows * columns; i++) wide[i] = (double)raw[i];
    free(raw);
    return wide;
}

static matrix read_matrix(const kvq_checkpoint *checkpoint, const char *prefix, const char *name, int64_t n_out,
                          int64_t n_in, bool bias) {
    char   full[256];
    matrix m = {.n_out = n_out, .n_in = n_in};
    (void)snprintf(full, sizeof full, "%s%s.weight", prefix, name);
    m.w = read_tensor(checkpoint, full, n_out, n_in);
    (void)snprintf(full, sizeof full, "%s%s.bias", prefix, name);
    if (bias) m.bias = read_tensor(checkpoint, full, 1, n_out);
    return m;
}

static matrix read_norm(const kvq_checkpoint *checkpoint, const char *prefix, const char *name, int64_t n) {
    matrix m = read_matrix(checkpoint, prefix, name, 1, n, false);
    for (int64_t i = 0; i < n && kvq_checkpoint_config(checkpoint)->norm_offset; i++) m.w[i] += 1;
    return m;
}

static int n_mlps(const kvq_model_config *c) { return c->n_experts > 0 ? c->n_experts : 1; }

static mlp *read_mlps(const kvq_checkpoint *checkpoint, const char *prefix) {
    const kvq_model_config *c = kvq_checkpoint_config(checkpoint);
    mlp                    *list = calloc((size_t)n_mlps(c), sizeof *list);
    for (int e = 0; e < n_mlps(c); e++) {
        char p[128];
        (void)snprintf(p, sizeof p, "%smlp.", prefix);
        if (c->n_experts > 0) (void)snprintf(p, sizeof p, "%smlp.experts.%d.", prefix, e);
        list[e].gate = read_matrix(checkpoint, p, "gate_proj", c->intermediate_size, c->hidden_size, c->mlp_bias);
        list[e].up = read_matrix(checkpoint, p, "up_proj", c->intermediate_size, c->hidden_size, c->mlp_bias);
        list[e].down = read_matrix(checkpoint, p, "down_proj", c->hidden_size, c->intermediate_size, c->mlp_bias);
    }
    return list;
}

static layer read_layer(const kvq_checkpoint *checkpoint, const char *p) {
    const kvq_model_config *c = kvq_checkpoint_config(checkpoint);
    int64_t C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim;
    layer   y = {.norm1 = read_norm(checkpoint, p, "input_layernorm", C)};
    y.q = read_matrix(checkpoint, p, "self_attn.q_proj", q, C, c->qkv_bias);
    y.k = read_matrix(checkpoint, p, "self_attn.k_proj", d, C, c->qkv_bias);
    y.v = read_matrix(checkpoint, p, "self_attn.v_proj", d, C, c->qkv_bias);
    y.o = read_matrix(checkpoint, p, "self_attn.o_proj", C, q, c->o_bias);
    if (c->qk_norm) y.q_norm = read_norm(checkpoint, p, "self_attn.q_norm", c->head_dim);
    if (c->qk_norm) y.k_norm = read_norm(checkpoint, p, "self_attn.k_norm", c->head_dim);
    y.norm2 = read_norm(checkpoint, p, c->post_norms ? "pre_feedforward_layernorm" : "post_attention_layernorm", C);
    if (c->post_norms) y.post1 = read_norm(checkpoint, p, "post_attention_layernorm", C);
    if (c->post_norms) y.post2 = read_norm(checkpoint, p, "post_feedforward_layernorm", C);
    if (c->n_experts > 0) y.router = read_matrix(checkpoint, p, "mlp.gate", c->n_experts, C, false);
    y.mlps = read_mlps(checkpoint, p);
    return y;
}

reference_model *reference_model_open(const kvq_checkpoint *checkpoint) {
    reference_model        *m = calloc(1, sizeof *m);
    const kvq_model_config *c = kvq_checkpoint_config(checkpoint);
    ck_assert_int_eq(c->rope.type, KVQ_ROPE_DEFAULT);
    m->checkpoint = checkpoint;
    m->c = c;
    m->layers = calloc((size_t)c->n_layers, sizeof *m->layers);
    for (int64_t l = 0; l < c->n_layers; l++) {
        char p[64];
        (void)snprintf(p, sizeof p, "model.layers.%d.", (int)l);
        m->layers[l] = read_layer(checkpoint, p);
    }
    m->embedding = read_matrix(checkpoint, "", "model.embed_tokens", c->vocab_size, c->hidden_size, false);
    m->norm = read_norm(checkpoint, "", "model.norm", c->hidden_size);
    m->head =
        c->tied_head ? m->embedding : read_matrix(checkpoint, "", "lm_head", c->vocab_size, c->hidden_size, false);
    return m;
}

static void free_matrix(matrix m) {
    free(m.w);
    free(m.bias);
}

static void free_layer(const kvq_model_config *c, layer *y) {
    const matrix all[] = {y->norm1, y->q,     y->k,     y->v,     y->q_norm, y->k_norm,
                          y->o,     y->post1, y->norm2, y->post2, y->router};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free_matrix(all[i]);
    for (int e = 0; e < n_mlps(c); e++) {
        free_matrix(y->mlps[e].gate);
        free_matrix(y->mlps[e].up);
        free_matrix(y->mlps[e].down);
    }
    free(y->mlps);
}

void reference_model_close(reference_model *m) {
    for (int64_t l = 0; l < m->c->n_layers; l++) free_layer(m->c, &m->layers[l]);
    if (!m->c->tied_head) free_matrix(m->head);
    free_matrix(m->embedding);
    free_matrix(m->norm);
    free(m->layers);
    free(m);
}

// ---------------------------------------------------------------- pieces

static void apply(matrix m, const double *x, double *y) {
    for (int64_t i = 0; i < m.n_out; i++) {
        y[i] = m.bias != NULL ? m.bias[i] : 0;
        for (int64_t j = 0; j < m.n_in; j++) y[i] += m.w[i * m.n_in + j] * x[j];
    }
}

// y may be x; a norm that the model does not have changes nothing.
static void normalise(matrix norm, double eps, const double *x, double *y) {
    double squares = 0;
    if (norm.w == NULL) return;
    for (int64_t i = 0; i < norm.n_in; i++) squares += x[i] * x[i];
    for (int64_t i = 0; i < norm.n_in; i++) y[i] = x[i] / sqrt(squares / (double)norm.n_in + eps) * norm.w[i];
}

static double capped(double x, double cap) { return cap > 0 ? cap * tanh(x / cap) : x; }

static void rotate(const kvq_model_config *c, int64_t layer_index, double *x, int n_heads, int64_t position) {
    int    half = c->rope.n_dims / 2;
    bool   local = c->local_rope_theta > 0 && kvq_layer_window(c, layer_index) > 0;
    double theta = local ? c->local_rope_theta : c->rope.theta;
    for (int h = 0; h < n_heads; h++) {
        for (int i = 0; i < half; i++) {
            double *a = x + h * c->head_dim + i, *b = a + half,
                   angle = (double)position * pow(theta, -2.0 * i / c->rope.n_dims);
            double x0 = *a, x1 = *b;
            *a = x0 * cos(angle) - x1 * sin(angle);
            *b = x1 * cos(angle) + x0 * sin(angle);
        }
    }
}

static void attend(const kvq_model_config *c, int64_t window, const double *q, const double *k, const double *v,
                   int64_t position, double *out, double *p) {
    int64_t D = c->head_dim, d = c->n_kv_heads * D, from = window > 0 && position >= window ? position - window + 1 : 0;
    for (int64_t h = 0; h < c->n_heads; h++) {
        int64_t kv = h / (c->n_heads / c->n_kv_heads) * D;
        double  sum = 0;
        for (int64_t j = from; j <= position; j++) {
            p[j] = 0;
            for (int64_t i = 0; i < D; i++) p[j] += q[h * D + i] * k[j * d + kv + i];
            // tiny models: no overflow to guard against
            p[j] = exp(capped(p[j] * (double)c->attention_scale, (double)c->attention_softcap));
            sum += p[j];
        }
        for (int64_t i = 0; i < D; i++) {
            out[h * D + i] = 0;
            for (int64_t j = from; j <= position; j++) out[h * D + i] += p[j] / sum * v[j * d + kv + i];
        }
    }
}

static double activate(const kvq_model_config *c, double g) {
    if (c->activation == KVQ_SILU) return g / (1 + exp(-g));
    return 0.5 * g * (1 + tanh(sqrt(2 / acos(-1)) * (g + 0.044715 * g * g * g)));
}

// y [C] += weight * mlp(x)
static void add_mlp(const kvq_model_config *c, const mlp *m, double weight, const double *x, double *y) {
    int64_t F = c->intermediate_size, C = c->hidden_size;
    double *gate = calloc((size_t)(2 * F + C), sizeof *gate), *up = gate + F, *out = up + F;
    apply(m->gate, x, gate);
    apply(m->up, x, up);
    for (int64_t i = 0; i < F; i++) gate[i] = activate(c, gate[i]) * up[i];
    apply(m->down, gate, out);
    for (int64_t i = 0; i < C; i++) y[i] += weight * out[i];
    free(gate);
}

// The best expert that is not taken yet, again and again.
static void add_experts(const kvq_model_config *c, const layer *l, const double *x, double *y) {
    double p[256], all = 0, chosen = 0;
    bool   taken[256] = {false};
    ck_assert_int_le(c->n_experts, 256);
    apply(l->router, x, p);
    for (int e = 0; e < c->n_experts; e++) all += p[e] = exp(p[e]);
    for (int j = 0; j < c->experts_per_token; j++) {
        int best = -1;
        for (int e = 0; e < c->n_experts; e++) {
            if (!taken[e] && (best < 0 || p[e] > p[best])) best = e;
        }
        taken[best] = true;
        chosen += p[best];
    }
    for (int e = 0; e < c->n_experts; e++) {
        if (taken[e]) add_mlp(c, &l->mlps[e], p[e] / (c->normalize_experts ? chosen : all), x, y);
    }
}

// ---------------------------------------------------------------- the model

typedef struct activations {
    double *x, *normed, *q, *k, *v;        // [S, ..]
    double *attended, *delta, *p, *logits; // one position
} activations;

static activations alloc_activations(const kvq_model_config *c, int64_t S) {
    int64_t     C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, nq = (int64_t)c->n_heads * c->head_dim;
    activations a;
    a.x = calloc((size_t)(2 * S * C + S * nq + 2 * S * d + nq + C + S + c->vocab_size), sizeof *a.x);
    a.normed = a.x + S * C;
    a.q = a.normed + S * C;
    a.k = a.q + S * nq;
    a.v = a.k + S * d;
    a.attended = a.v + S * d;
    a.delta = a.attended + nq;
    a.p = a.delta + C;
    a.logits = a.p + S;
    return a;
}

static void project(const kvq_model_config *c, const layer *y, int64_t S, const activations *a) {
    int64_t C = c->hidden_size, D = c->head_dim, d = c->n_kv_heads * D, nq = c->n_heads * D;
    double  eps = (double)c->rms_norm_eps;
    for (int64_t t = 0; t < S; t++) {
        normalise(y->norm1, eps, a->x + t * C, a->normed + t * C);
        apply(y->q, a->normed + t * C, a->q + t * nq);
        apply(y->k, a->normed + t * C, a->k + t * d);
        apply(y->v, a->normed + t * C, a->v + t * d);
        for (int h = 0; h < c->n_heads; h++) normalise(y->q_norm, eps, a->q + t * nq + h * D, a->q + t * nq + h * D);
        for (int h = 0; h < c->n_kv_heads; h++) normalise(y->k_norm, eps, a->k + t * d + h * D, a->k + t * d + h * D);
    }
}

static void finish(const kvq_model_config *c, int64_t index, const layer *y, int64_t S, const activations *a) {
    int64_t C = c->hidden_size, D = c->head_dim, d = c->n_kv_heads * D, nq = c->n_heads * D;
    double  eps = (double)c->rms_norm_eps;
    for (int64_t t = 0; t < S; t++) {
        rotate(c, index, a->q + t * nq, c->n_heads, t);
        rotate(c, index, a->k + t * d, c->n_kv_heads, t);
    }
    for (int64_t t = 0; t < S; t++) {
        double *x = a->x + t * C, *normed = a->normed + t * C;
        attend(c, kvq_layer_window(c, index), a->q + t * nq, a->k, a->v, t, a->attended, a->p);
        apply(y->o, a->attended, a->delta);
        normalise(y->post1, eps, a->delta, a->delta);
        for (int64_t i = 0; i < C; i++) x[i] += a->delta[i];
        normalise(y->norm2, eps, x, normed);
        memset(a->delta, 0, (size_t)C * sizeof *a->delta);
        if (c->n_experts > 0) {
            add_experts(c, y, normed, a->delta);
        } else {
            add_mlp(c, y->mlps, 1, normed, a->delta);
        }
        normalise(y->post2, eps, a->delta, a->delta);
        for (int64_t i = 0; i < C; i++) x[i] += a->delta[i];
    }
}

double reference_model_loss(reference_model *m, const int32_t *ids, int64_t S, const reference_nudge *nudge,
                            double *logits_out, double *k_out, double *v_out) {
    const kvq_model_config *c = m->c;
    int64_t                 C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, V = c->vocab_size;
    activations             a = alloc_activations(c, S);
    double                  loss = 0;
    for (int64_t i = 0; i < S * C; i++) a.x[i] = m->embedding.w[ids[i / C] * C + i % C] * (double)c->embedding_scale;
    for (int64_t l = 0; l < c->n_layers; l++) {
        project(c, &m->layers[l], S, &a);
        if (nudge != NULL && nudge->layer == l)
            (nudge->is_v ? a.v : a.k)[nudge->position * d + nudge->channel] += nudge->delta;
        if (k_out != NULL) memcpy(k_out + l * S * d, a.k, (size_t)(S * d) * sizeof *k_out);
        if (v_out != NULL) memcpy(v_out + l * S * d, a.v, (size_t)(S * d) * sizeof *v_out);
        finish(c, l, &m->layers[l], S, &a);
    }
    for (int64_t t = 0; t < S; t++) {
        double sum = 0;
        normalise(m->norm, (double)c->rms_norm_eps, a.x + t * C, a.normed);
        apply(m->head, a.normed, a.logits);
        for (int64_t i = 0; i < V; i++) a.logits[i] = capped(a.logits[i], (double)c->logit_softcap);
        if (logits_out != NULL) memcpy(logits_out + t * V, a.logits, (size_t)V * sizeof *logits_out);
        for (int64_t i = 0; i < V; i++) sum += exp(a.logits[i]);
        if (t + 1 < S) loss += log(sum) - a.logits[ids[t + 1]];
    }
    free(a.x);
    return loss / (double)(S - 1);
}
