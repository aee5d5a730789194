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

typedef struct layer {
    matrix norm1, q, k, v, o, norm2, gate, up, down;
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

reference_model *reference_model_open(const kvq_checkpoint *checkpoint) {
    reference_model        *m = calloc(1, sizeof *m);
    const kvq_model_config *c = kvq_checkpoint_config(checkpoint);
    int64_t C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, q = (int64_t)c->n_heads * c->head_dim;
    ck_assert_int_eq(c->rope.type, KVQ_ROPE_DEFAULT);
    m->checkpoint = checkpoint;
    m->c = c;
    m->layers = calloc((size_t)c->n_layers, sizeof *m->layers);
    for (int64_t l = 0; l < c->n_layers; l++) {
        char p[64];
        (void)snprintf(p, sizeof p, "model.layers.%d.", (int)l);
        m->layers[l] = (layer){
            read_matrix(checkpoint, p, "input_layernorm", 1, C, false),
            read_matrix(checkpoint, p, "self_attn.q_proj", q, C, c->qkv_bias),
            read_matrix(checkpoint, p, "self_attn.k_proj", d, C, c->qkv_bias),
            read_matrix(checkpoint, p, "self_attn.v_proj", d, C, c->qkv_bias),
            read_matrix(checkpoint, p, "self_attn.o_proj", C, q, c->o_bias),
            read_matrix(checkpoint, p, "post_attention_layernorm", 1, C, false),
            read_matrix(checkpoint, p, "mlp.gate_proj", c->intermediate_size, C, c->mlp_bias),
            read_matrix(checkpoint, p, "mlp.up_proj", c->intermediate_size, C, c->mlp_bias),
            read_matrix(checkpoint, p, "mlp.down_proj", C, c->intermediate_size, c->mlp_bias),
        };
    }
    m->embedding = read_matrix(checkpoint, "", "model.embed_tokens", c->vocab_size, C, false);
    m->norm = read_matrix(checkpoint, "", "model.norm", 1, C, false);
    m->head = c->tied_head ? m->embedding : read_matrix(checkpoint, "", "lm_head", c->vocab_size, C, false);
    return m;
}

static void free_matrix(matrix m) {
    free(m.w);
    free(m.bias);
}

void reference_model_close(reference_model *m) {
    for (int64_t l = 0; l < m->c->n_layers; l++) {
        const layer *y = &m->layers[l];
        const matrix all[] = {y->norm1, y->q, y->k, y->v, y->o, y->norm2, y->gate, y->up, y->down};
        for (int i = 0; i < 9; i++) free_matrix(all[i]);
    }
    if (!m->c->tied_head) free_matrix(m->head);
    free_matrix(m->embedding);
    free_matrix(m->norm);
    free(m->layers);
    free(m);
}

static void apply(matrix m, const double *x, double *y) {
    for (int64_t i = 0; i < m.n_out; i++) {
        y[i] = m.bias != NULL ? m.bias[i] : 0;
        for (int64_t j = 0; j < m.n_in; j++) y[i] += m.w[i * m.n_in + j] * x[j];
    }
}

static void normalise(matrix norm, double eps, const double *x, double *y) {
    double squares = 0;
    for (int64_t i = 0; i < norm.n_in; i++) squares += x[i] * x[i];
    for (int64_t i = 0; i < norm.n_in; i++) y[i] = x[i] / sqrt(squares / (double)norm.n_in + eps) * norm.w[i];
}

static void rotate(const kvq_model_config *c, double *x, int n_heads, int64_t position) {
    int half = c->head_dim / 2;
    for (int h = 0; h < n_heads; h++) {
        for (int i = 0; i < half; i++) {
            double *a = x + h * c->head_dim + i, *b = a + half,
                   angle = (double)position * pow(c->rope.theta, -2.0 * i / c->head_dim);
            double x0 = *a, x1 = *b;
            *a = x0 * cos(angle) - x1 * sin(angle);
            *b = x1 * cos(angle) + x0 * sin(angle);
        }
    }
}

static void attend(const kvq_model_config *c, const double *q, const double *k, const double *v, int64_t position,
                   double *out, double *p) {
    int64_t D = c->head_dim, d = c->n_kv_heads * D;
    for (int64_t h = 0; h < c->n_heads; h++) {
        int64_t kv = h / (c->n_heads / c->n_kv_heads) * D;
        double  sum = 0;
        for (int64_t j = 0; j <= position; j++) {
            p[j] = 0;
            for (int64_t i = 0; i < D; i++) p[j] += q[h * D + i] * k[j * d + kv + i];
            p[j] = exp(p[j] / sqrt((double)D)); // tiny models: no overflow to guard against
            sum += p[j];
        }
        for (int64_t i = 0; i < D; i++) {
            out[h * D + i] = 0;
            for (int64_t j = 0; j <= position; j++) out[h * D + i] += p[j] / sum * v[j * d + kv + i];
        }
    }
}

double reference_model_loss(reference_model *m, const int32_t *ids, int64_t S, const reference_nudge *nudge,
                            double *logits_out, double *k_out, double *v_out) {
    const kvq_model_config *c = m->c;
    int64_t C = c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim, nq = (int64_t)c->n_heads * c->head_dim,
            F = c->intermediate_size;
    size_t  total = (size_t)(2 * S * C + S * nq + 2 * S * d + 2 * F + nq + C + S + c->vocab_size);
    double *buffer = calloc(total, sizeof *buffer), *x = buffer, *normed = x + S * C, *q = normed + S * C,
           *k = q + S * nq, *v = k + S * d, *gate = v + S * d, *up = gate + F, *attended = up + F,
           *delta = attended + nq, *p = delta + C, *logits = p + S, loss = 0;
    for (int64_t t = 0; t < S; t++) memcpy(x + t * C, m->embedding.w + ids[t] * C, (size_t)C * sizeof *x);
    for (int64_t l = 0; l < c->n_layers; l++) {
        const layer *y = &m->layers[l];
        for (int64_t t = 0; t < S; t++) {
            normalise(y->norm1, (double)c->rms_norm_eps, x + t * C, normed + t * C);
            apply(y->q, normed + t * C, q + t * nq);
            apply(y->k, normed + t * C, k + t * d);
            apply(y->v, normed + t * C, v + t * d);
        }
        if (nudge != NULL && nudge->layer == l)
            (nudge->is_v ? v : k)[nudge->position * d + nudge->channel] += nudge->delta;
        if (k_out != NULL) memcpy(k_out + l * S * d, k, (size_t)(S * d) * sizeof *k);
        if (v_out != NULL) memcpy(v_out + l * S * d, v, (size_t)(S * d) * sizeof *v);
        for (int64_t t = 0; t < S; t++) {
            rotate(c, q + t * nq, c->n_heads, t);
            rotate(c, k + t * d, c->n_kv_heads, t);
        }
        for (int64_t t = 0; t < S; t++) {
            attend(c, q + t * nq, k, v, t, attended, p);
            apply(y->o, attended, delta);
            for (int64_t i = 0; i < C; i++) x[t * C + i] += delta[i];
            normalise(y->norm2, (double)c->rms_norm_eps, x + t * C, normed + t * C);
            apply(y->gate, normed + t * C, gate);
            apply(y->up, normed + t * C, up);
            for (int64_t i = 0; i < F; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
            apply(y->down, gate, delta);
            for (int64_t i = 0; i < C; i++) x[t * C + i] += delta[i];
        }
    }
    for (int64_t t = 0; t < S; t++) {
        double sum = 0;
        normalise(m->norm, (double)c->rms_norm_eps, x + t * C, normed);
        apply(m->head, normed, logits);
        if (logits_out != NULL) memcpy(logits_out + t * c->vocab_size, logits, (size_t)c->vocab_size * sizeof *logits);
        for (int64_t i = 0; i < c->vocab_size; i++) sum += exp(logits[i]);
        if (t + 1 < S) loss += log(sum) - logits[ids[t + 1]];
    }
    free(buffer);
    return loss / (double)(S - 1);
}
