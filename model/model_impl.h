// SPDX-License-Identifier: Apache-2.0
// Private to model: the structs behind the handles of kvq_model.h.
#ifndef KVQ_MODEL_IMPL_H
#define KVQ_MODEL_IMPL_H

#include "kvq_model.h"

typedef struct linear_weights {
    float  *w, *bias; // [n_out, n_in], [n_out] or NULL
    int64_t n_out, n_in;
} linear_weights;

struct kvq_layer {
    int64_t        index;
    float         *storage;                          // one allocation holds everything below
    float         *input_norm, *post_attention_norm; // [C]
    linear_weights q, k, v, o, gate, up, down;
};

struct kvq_head {
    float         *storage;
    float         *norm; // [C]
    linear_weights output;
};

struct kvq_model {
    const kvq_context      *ctx;
    const kvq_backend      *be;
    const kvq_checkpoint   *checkpoint;
    const kvq_model_config *config;
    bool                    resident;
    kvq_layer             **layers;         // [L], filled when resident
    kvq_head               *head;           // when resident
    double                 *rope_frequency; // [n_dims / 2] radians per position
    double                  rope_amplitude; // multiplies cosine and sine
};

// Cosine and sine of positions [first, first + n): [n, n_dims / 2] each, angles and functions in f64, stored as f32.
// Both tables are host memory.
kvq_status kvq_rope_prepare(kvq_model *model, kvq_error *err); // fills rope_frequency and rope_amplitude
void       kvq_rope_fill(const kvq_model *model, int64_t first, int64_t n, float *cos_table, float *sin_table);

// Logits of a block of rows at a time; also the unit in which losses are computed.
#define LOGIT_ROWS 128

struct kvq_workspace {
    int64_t capacity; // tokens
    bool    backward;
    float  *storage;
    float  *cos_table, *sin_table; // [S, n_dims / 2]
    float  *normed, *mid;          // [S, C]
    float  *q, *attended;          // [S, H * D]
    float  *k, *v, *k_rotated;     // [S, Hkv * D]
    float  *gate, *up;             // [S, F]
    float  *logits, *logits_b;     // [LOGIT_ROWS, V]
    float  *attention;             // the backend's scratch
    float  *dq, *dattended, *dk, *dv, *dgated, *dnormed;
};

// A set of buffers in one allocation: where each pointer goes, how many floats it gets.
typedef struct kvq_model_buffer {
    float **pointer;
    int64_t n_floats;
} kvq_model_buffer;
int64_t    kvq_buffers_floats(const kvq_model_buffer *list, int n);
kvq_status kvq_buffers_alloc(const kvq_backend *be, const kvq_model_buffer *list, int n, const char *what,
                             float **storage, kvq_error *err);

kvq_attention_shape kvq_model_attention_shape(const kvq_model_config *config, int64_t n_tokens);

// The two halves of a layer up to and from attention, shared by the window and the decode path.
void kvq_layer_project(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, float *normed,
                       float *q, float *k, float *v);
void kvq_layer_finish(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *attended, float *x,
                      float *normed, float *gate, float *up);

// logits [n_rows, V] of hidden states x; normed [n_rows, C] is scratch.
kvq_status kvq_head_apply(const kvq_model *model, const kvq_head *head, const float *x, int64_t n_rows, float *normed,
                          float *logits, kvq_error *err);

void kvq_apply_linear(const kvq_backend *be, const linear_weights *l, const float *x, float *y, int64_t m);

#endif
