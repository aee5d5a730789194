// SPDX-License-Identifier: Apache-2.0
//
// The reference transformer, written once against the backend table: one layer's weights at a time, forward,
// activation-only backward, and a batched decode step. Architecture is data (kvq_model_config); there are no classes.
//
// "Pre-RoPE K" is what enters RoPE: k_proj output plus bias, after k_norm where there is one, [S, Hkv, D]. V is v_proj
// output plus bias.
#ifndef KVQ_MODEL_H
#define KVQ_MODEL_H

#include "kvq_core.h"
#include "kvq_io.h"
#include "kvq_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvq_model kvq_model;

// Borrows backend and checkpoint. resident keeps every expanded layer once it was used (decoding needs all layers for
// each token); otherwise a layer's weights live from kvq_layer_load to kvq_layer_release.
kvq_status kvq_model_create(const kvq_context *ctx, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                            bool resident, kvq_model **out, kvq_error *err);
void       kvq_model_destroy(const kvq_context *ctx, kvq_model **model);
const kvq_model_config *kvq_model_describe(const kvq_model *model);
const kvq_backend      *kvq_model_backend(const kvq_model *model); // the one it was created with

// ---------------------------------------------------------------- weights

typedef struct kvq_layer kvq_layer; // one decoder layer, expanded to f32 in backend memory
typedef struct kvq_head  kvq_head;  // final norm and output matrix

// What one layer keeps in memory. Of a mixture of experts that is one expert at a time (all of them in a resident
// model): an expert is expanded from the checkpoint when a window has tokens for it, and again for the next window.
int64_t kvq_layer_floats(const kvq_model *model);
int64_t kvq_head_floats(const kvq_model *model);
int64_t kvq_layer_products(const kvq_model_config *config); // weights of a layer that one token is multiplied with
// Operations of one token: a forward pass through a layer, and what attention is of it, which sees half of the scores.
double     kvq_layer_flops(const kvq_model_config *config, int64_t seq_len);
double     kvq_attention_flops(const kvq_model_config *config, int64_t seq_len);
int64_t    kvq_model_mapped_bytes(const kvq_model *model); // of the file, in memory while weights are expanded
kvq_status kvq_layer_load(kvq_model *model, int64_t index, kvq_layer **out, kvq_error *err);
void       kvq_layer_release(kvq_model *model, kvq_layer **layer);
// Starts to expand a layer on one thread in the background; kvq_layer_load of the same layer waits for it and takes it,
// of another one drops it. Until then it takes the memory of one more layer (without its experts). Never fails: what
// goes wrong is reported by kvq_layer_load.
void kvq_layer_prefetch(kvq_model *model, int64_t index);
// Ends what was started and not asked for. Until then the context is in use: whoever starts to prefetch ends it too.
void       kvq_prefetch_drop(kvq_model *model);
kvq_status kvq_head_load(kvq_model *model, kvq_head **out, kvq_error *err);
void       kvq_head_release(kvq_model *model, kvq_head **head);

// ---------------------------------------------------------------- one window

// Activations of one window of up to seq_len tokens, for forward, or forward and backward.
typedef struct kvq_workspace kvq_workspace;
kvq_status kvq_workspace_create(kvq_model *model, int64_t seq_len, bool backward, kvq_workspace **out, kvq_error *err);
void       kvq_workspace_destroy(kvq_model *model, kvq_workspace **workspace);
int64_t    kvq_workspace_floats(const kvq_model *model, int64_t seq_len, bool backward); // what create will allocate

// x [S, C] = embedding rows of ids (host); x is backend memory.
kvq_status kvq_model_embed(kvq_model *model, const int32_t *ids, int64_t n_tokens, float *x, kvq_error *err);

// Sees, and may replace, what enters RoPE and attention of a layer: q [S, H * D], k and v [S, Hkv * D], backend memory.
// A hook that sets `second` gives a second version of keys (before RoPE) and values, k_recent and v_recent, and says
// which queries read what from it. Both stay the hook's; k_recent is rotated in place.
typedef struct kvq_qkv {
    float         *q, *k, *v;
    float         *k_recent, *v_recent;
    kvq_second_set second;
} kvq_qkv;
typedef kvq_status (*kvq_qkv_hook)(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err);

// x [S, C] -> the next layer's input, in place. hook may be NULL. KVQ_ERR_NUMERICAL names layer, tensor, position and
// channel when K, V or the result are not finite.
kvq_status kvq_layer_forward(kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t n_tokens, float *x,
                             kvq_qkv_hook hook, void *user, kvq_error *err);

// Recomputes the layer from its input x [S, C], then turns dx = d loss / d output into d loss / d input in place, and
// leaves K, V and their gradients in the views below until the next call.
kvq_status kvq_layer_backward(kvq_model *model, const kvq_layer *layer, kvq_workspace *ws, int64_t n_tokens,
                              const float *x, float *dx, kvq_error *err);

// Rotary embedding of keys [n_tokens, Hkv * D] at positions 0 .. n_tokens - 1 of a layer, in place. forward: as the
// layer does before attention; back: its inverse; gradient: what turns d loss / d (key before) into d loss / d (key
// after). Where a scaling gives the embedding an amplitude (yarn) the last two divide by it.
typedef enum kvq_rotation { KVQ_ROTATE_FORWARD, KVQ_ROTATE_BACK, KVQ_ROTATE_GRADIENT } kvq_rotation;
void kvq_rotate_keys(const kvq_model *model, const kvq_workspace *ws, int64_t layer, kvq_rotation rotation,
                     int64_t n_tokens, float *k);

// The same for queries [n_tokens, H * D]; they have no other use than forward.
void kvq_rotate_queries(const kvq_model *model, const kvq_workspace *ws, int64_t layer, int64_t n_tokens, float *q);
// Attention of a layer over what was rotated already, out [n_tokens, H * D]. A hook may call it: it changes nothing of
// what the hook is shown.
void kvq_layer_attention(const kvq_model *model, const kvq_workspace *ws, int64_t layer, const kvq_qkv *rotated,
                         int64_t n_tokens, float *out);

typedef struct kvq_kv_view { // backend memory, [S, Hkv * D], valid until the workspace is used again
    const float *k, *v, *dk, *dv;
} kvq_kv_view;
kvq_kv_view kvq_workspace_kv(const kvq_workspace *ws);

// Next-token loss of one window: host_nll [S - 1] receives -log p(ids[t + 1] | ids[..t]) in nats. When dx is not NULL
// it receives d(mean of host_nll) / dx. Logits exist for a block of rows at a time, never for the whole window.
kvq_status kvq_head_loss(kvq_model *model, const kvq_head *head, kvq_workspace *ws, const int32_t *ids,
                         int64_t n_tokens, const float *x, float *dx, double *host_nll, kvq_error *err);
// The same positions scored for two final hidden states of one window; ws must be a forward workspace.
kvq_status kvq_head_compare(kvq_model *model, const kvq_head *head, kvq_workspace *ws, const int32_t *ids,
                            int64_t n_tokens, const float *x_a, const float *x_b, kvq_position_score *host_scores,
                            kvq_error *err);
// Logits [n_rows, V] of rows of x; logits is backend memory.
kvq_status kvq_head_logits(kvq_model *model, const kvq_head *head, kvq_workspace *ws, const float *x, int64_t n_rows,
                           float *logits, kvq_error *err);

// ---------------------------------------------------------------- decoding

// A batch of sequences decoded in step, with an f32 cache of `capacity` positions each.
typedef struct kvq_decode kvq_decode;
kvq_status kvq_decode_create(kvq_model *model, int64_t n_seqs, int64_t capacity, kvq_decode **out, kvq_error *err);
// What decoding keeps in memory, with the weights of all layers and the head (a resident model).
int64_t kvq_decode_floats(const kvq_model *model, int64_t n_seqs, int64_t capacity);
void    kvq_decode_destroy(kvq_model *model, kvq_decode **decode);
// Appends ids [n_seqs] (host) at the next position; *logits [n_seqs, V] (backend memory) stay valid until the next
// step.
kvq_status kvq_decode_step(kvq_model *model, kvq_decode *decode, const int32_t *ids, const float **logits,
                           kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
