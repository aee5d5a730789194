// SPDX-License-Identifier: Apache-2.0
// Private to model: the structs behind the handles of kvq_model.h.
#ifndef KVQ_MODEL_IMPL_H
#define KVQ_MODEL_IMPL_H

#include <pthread.h>

#include "kvq_model.h"

typedef struct linear_weights {
    float  *w, *bias; // [n_out, n_in], [n_out] or NULL
    int64_t n_out, n_in;
} linear_weights;

typedef struct mlp_weights { // a dense MLP, or one expert
    linear_weights gate, up, down;
} mlp_weights;

typedef struct expert_weights {
    float      *storage;
    int64_t     layer, index;
    mlp_weights mlp;
} expert_weights;

struct kvq_layer {
    int64_t         index;
    float          *storage;                             // one allocation holds everything below but the experts
    float          *input_norm, *mlp_norm;               // [C], before attention and before the MLP
    float          *attention_post_norm, *mlp_post_norm; // [C], of their outputs, or NULL
    float          *q_norm, *k_norm;                     // [D] or NULL
    linear_weights  q, k, v, o;
    mlp_weights     mlp;     // without experts
    float          *router;  // [E, C] f32, or NULL
    expert_weights *experts; // [E] when resident; otherwise they come and go one by one, see kvq_expert_load
};

struct kvq_head {
    float         *storage;
    float         *norm; // [C]
    linear_weights output;
};

typedef struct rope_frequencies {
    double *frequency; // [n_dims / 2] radians per position
    double  amplitude; // multiplies cosine and sine
} rope_frequencies;

// A layer on its way in the background. Everything but `thread` belongs to the thread until it is joined.
typedef struct layer_prefetch {
    bool             running;
    pthread_t        thread;
    const kvq_model *model;
    kvq_context      ctx; // the model's, on one thread, without callbacks
    int64_t          index;
    kvq_layer       *layer; // NULL when it failed
} layer_prefetch;

struct kvq_model {
    const kvq_context      *ctx;
    const kvq_backend      *be;
    const kvq_checkpoint   *checkpoint;
    const kvq_model_config *config;
    bool                    resident;
    kvq_layer             **layers; // [L], filled when resident
    kvq_head               *head;   // when resident
    expert_weights          expert; // the one in memory when not resident
    layer_prefetch          prefetch;
    rope_frequencies        rope[2]; // of all layers; of sliding layers where they have a base of their own
};

// ---------------------------------------------------------------- weights

// One layer from the checkpoint, on the threads of ctx, without a look at what is there already.
kvq_status kvq_layer_expand(const kvq_model *model, const kvq_context *ctx, int64_t index, kvq_layer **out,
                            kvq_error *err);
void       kvq_layer_destroy(const kvq_model *model, kvq_layer *layer);
// The weights of one expert, valid until the next call.
kvq_status kvq_expert_load(kvq_model *model, const kvq_layer *layer, int64_t expert, const mlp_weights **out,
                           kvq_error *err);
int64_t    kvq_model_floats(const kvq_model *model); // weights of all layers and the head, of a resident model

// ---------------------------------------------------------------- rotary tables

// Cosine and sine of positions [first, first + n): [n, n_dims / 2] each, angles and functions in f64, stored as f32.
// Both tables are host memory.
kvq_status kvq_rope_prepare(kvq_model *model, kvq_error *err);               // fills model->rope
int        kvq_rope_count(const kvq_model_config *config);                   // how many of them there are
int        kvq_rope_of_layer(const kvq_model_config *config, int64_t layer); // which one a layer uses
void kvq_rope_fill(const kvq_model *model, int which, int64_t first, int64_t n, float *cos_table, float *sin_table);

typedef struct rope_tables {
    float *cos_table, *sin_table; // [S, n_dims / 2], backend memory
} rope_tables;

// ---------------------------------------------------------------- rows in blocks

// Rows of a window do not depend on each other outside attention, so what is wide (the MLP) exists for a block of rows
// at a time. Blocks start at multiples of the row tile of matrix products and are larger than it, the last one too (it
// takes what is left when that is less than a tile), so that they change no bit of a result; there is a tile for every
// thread.
#define ROW_TILE 256
int64_t kvq_block_end(const kvq_model *model, int64_t first, int64_t n_rows);
int64_t kvq_block_capacity(const kvq_model *model, int64_t n_rows); // rows of the largest block

// ---------------------------------------------------------------- buffers

// A set of buffers in one allocation: where each pointer goes, how many floats it gets.
typedef struct kvq_model_buffer {
    float **pointer;
    int64_t n_floats;
} kvq_model_buffer;
int64_t    kvq_buffers_floats(const kvq_model_buffer *list, int n);
kvq_status kvq_buffers_alloc(const kvq_backend *be, const kvq_model_buffer *list, int n, const char *what,
                             float **storage, kvq_error *err);

// Which tokens go to which expert; host memory. Lists of all experts lie one behind the other, tokens ascending.
typedef struct kvq_routing {
    kvq_route route;
    int64_t  *start;          // [E + 1], where the list of an expert begins
    int32_t  *token, *choice; // [m * k] of a list: the token, and where its choice lies in route.weight
    float    *weight, *dot;   // [m * k] of a list
    float    *dweight;        // [m, k] as route.weight
} kvq_routing;
kvq_status kvq_routing_create(const kvq_model *model, int64_t n_tokens, kvq_routing **out, kvq_error *err);
void       kvq_routing_destroy(const kvq_model *model, kvq_routing **routing);
int64_t    kvq_routing_floats(const kvq_model_config *config, int64_t n_tokens); // units of 4 bytes; 0 without experts

// What the part of a layer behind attention works in; [rows, ..] exist for one block of rows.
typedef struct mlp_buffers {
    float       *normed;           // [rows, C]
    float       *gate, *up;        // [rows, F]
    float       *dnormed, *dgated; // [rows, C], [rows, F], backward
    float       *mixed;            // [S, C], experts: what they add up to, or their gradients
    float       *gated;            // [rows, F], backward through experts
    kvq_routing *routing;          // experts
} mlp_buffers;
enum { MLP_BUFFERS = 7 };
int kvq_mlp_list(const kvq_model *model, mlp_buffers *b, int64_t n_tokens, bool backward,
                 kvq_model_buffer list[MLP_BUFFERS]);

// Logits of a block of rows at a time; also the unit in which losses are computed.
#define LOGIT_ROWS 128

struct kvq_workspace {
    int64_t     capacity; // tokens
    bool        backward;
    float      *storage;
    rope_tables rope[2];
    mlp_buffers mlp;
    float      *mid;               // [S, C]
    float      *q, *attended;      // [S, H * D]
    float      *k, *v, *k_rotated; // [S, Hkv * D]
    float      *q_raw, *k_raw;     // as q and k, before their norms
    float      *logits, *logits_b; // [LOGIT_ROWS, V]
    float      *attention;         // the backend's scratch
    float      *dq, *dattended, *dk, *dv;
};

// ---------------------------------------------------------------- parts of a layer

kvq_attention_shape kvq_model_attention_shape(const kvq_model_config *config, int64_t layer, int64_t n_tokens);

// The two halves of a layer up to and from attention, shared by the window and the decode path.
// q_raw, k_raw: where q and k go before their norms; q and k themselves unless a gradient will be wanted.
void kvq_layer_project(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, float *normed,
                       float *q_raw, float *k_raw, float *q, float *k, float *v);
// x [m, C] += what attention adds
void kvq_layer_attended(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *attended, float *x,
                        mlp_buffers *b);
// From d loss / d (what x became) in dx to d loss / d attended
void kvq_layer_attended_backward(const kvq_model *model, const kvq_layer *layer, int64_t m, const float *attended,
                                 const float *dx, float *dattended, mlp_buffers *b);
// x [m, C] += what the MLP, or the experts, add
kvq_status kvq_layer_mlp(kvq_model *model, const kvq_layer *layer, int64_t m, float *x, mlp_buffers *b, kvq_error *err);
// From d loss / d output in dx to d loss / d mid, mid [m, C] being the state between attention and MLP.
kvq_status kvq_layer_mlp_backward(kvq_model *model, const kvq_layer *layer, int64_t m, const float *mid, float *dx,
                                  mlp_buffers *b, kvq_error *err);

// The same for layers with a router.
kvq_status kvq_experts_forward(kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, mlp_buffers *b,
                               kvq_error *err); // fills b->mixed
kvq_status kvq_experts_backward(kvq_model *model, const kvq_layer *layer, int64_t m, const float *x, const float *dy,
                                mlp_buffers *b, kvq_error *err); // b->mixed becomes d loss / d norm(x)

// gate, up [m, F] of normed inputs, and y [m, F] = activation(gate) * up, which may be gate
void kvq_mlp_gate_and_up(const kvq_model *model, const mlp_weights *w, int64_t m, const float *normed, float *gate,
                         float *up);
void kvq_mlp_activate(const kvq_model *model, int64_t m, const float *gate, const float *up, float *y);
// dgated [m, F] -> dnormed [m, C], which is overwritten; gate and up are replaced by their gradients
void kvq_mlp_gate_backward(const kvq_model *model, const mlp_weights *w, int64_t m, float *gate, float *up,
                           const float *dgated, float *dnormed);

// logits [n_rows, V] of hidden states x; normed [n_rows, C] is scratch. Messages count rows from first_row.
kvq_status kvq_head_apply(const kvq_model *model, const kvq_head *head, const float *x, int64_t first_row,
                          int64_t n_rows, float *normed, float *logits, kvq_error *err);

void kvq_linear_forward(const kvq_backend *be, const linear_weights *l, const float *x, float *y, int64_t m);
void kvq_linear_gradient(const kvq_backend *be, const linear_weights *l, const float *dy, float *dx, int64_t m,
                         bool accumulate);

#endif
