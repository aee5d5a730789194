// SPDX-License-Identifier: Apache-2.0
//
// The tensors of each architecture: canonical names, what the containers call them, their shapes, when they exist. An
// architecture is a list of groups; most groups are shared. The model asks by canonical names only.
#include <string.h>

#include "checkpoint.h"

// The last arguments: when it must be there, or what else is special about a tensor that always must.
#define TENSOR(per, canonical, in_gguf, n_rows, n_columns, ...)                                                        \
    {                                                                                                                  \
        .scope = per, .name = canonical, .gguf = in_gguf, .rows = EXTENT_##n_rows, .columns = EXTENT_##n_columns,      \
        __VA_ARGS__                                                                                                    \
    }
#define ALWAYS                      .when = WHEN_ALWAYS
#define ROTATED                     .is_rotated = true
#define STORED(text)                .stored = (text)
#define ROWS_OF(matrix, from, text) .stored = (text), .first = EXTENT_##from, .fused = EXTENT_##matrix

static const tensor_role OUTER[] = {
    TENSOR(PER_MODEL, "model.embed_tokens.weight", "token_embd.weight", VOCAB, HIDDEN, ALWAYS),
    TENSOR(PER_MODEL, "model.norm.weight", "output_norm.weight", ONE, HIDDEN, ALWAYS),
    TENSOR(PER_MODEL, "lm_head.weight", "output.weight", VOCAB, HIDDEN, .when = WHEN_UNTIED),
};

// ---------------------------------------------------------------- norms

static const tensor_role NORMS[] = {
    TENSOR(PER_LAYER, "input_layernorm.weight", "attn_norm.weight", ONE, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "post_attention_layernorm.weight", "ffn_norm.weight", ONE, HIDDEN, ALWAYS),
};

static const tensor_role FOUR_NORMS[] = {
    TENSOR(PER_LAYER, "input_layernorm.weight", NULL, ONE, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "post_attention_layernorm.weight", NULL, ONE, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "pre_feedforward_layernorm.weight", NULL, ONE, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "post_feedforward_layernorm.weight", NULL, ONE, HIDDEN, ALWAYS),
};

static const tensor_role QK_NORMS[] = {
    TENSOR(PER_LAYER, "self_attn.q_norm.weight", "attn_q_norm.weight", ONE, HEAD, ALWAYS),
    TENSOR(PER_LAYER, "self_attn.k_norm.weight", "attn_k_norm.weight", ONE, HEAD, ALWAYS),
};

// ---------------------------------------------------------------- attention

static const tensor_role ATTENTION[] = {
    TENSOR(PER_LAYER, "self_attn.q_proj.weight", "attn_q.weight", QUERY, HIDDEN, ROTATED),
    TENSOR(PER_LAYER, "self_attn.k_proj.weight", "attn_k.weight", KEY, HIDDEN, ROTATED),
    TENSOR(PER_LAYER, "self_attn.v_proj.weight", "attn_v.weight", KEY, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "self_attn.o_proj.weight", "attn_output.weight", HIDDEN, QUERY, ALWAYS),
};

static const tensor_role FUSED_ATTENTION[] = {
    TENSOR(PER_LAYER, "self_attn.q_proj.weight", NULL, QUERY, HIDDEN, ROWS_OF(QKV, ZERO, "self_attn.qkv_proj.weight")),
    TENSOR(PER_LAYER, "self_attn.k_proj.weight", NULL, KEY, HIDDEN, ROWS_OF(QKV, QUERY, "self_attn.qkv_proj.weight")),
    TENSOR(PER_LAYER, "self_attn.v_proj.weight", NULL, KEY, HIDDEN,
           ROWS_OF(QKV, QUERY_KEY, "self_attn.qkv_proj.weight")),
    TENSOR(PER_LAYER, "self_attn.o_proj.weight", NULL, HIDDEN, QUERY, ALWAYS),
};

static const tensor_role BIASES[] = {
    TENSOR(PER_LAYER, "self_attn.q_proj.bias", "attn_q.bias", ONE, QUERY, .when = WHEN_QKV_BIAS, ROTATED),
    TENSOR(PER_LAYER, "self_attn.k_proj.bias", "attn_k.bias", ONE, KEY, .when = WHEN_QKV_BIAS, ROTATED),
    TENSOR(PER_LAYER, "self_attn.v_proj.bias", "attn_v.bias", ONE, KEY, .when = WHEN_QKV_BIAS),
    TENSOR(PER_LAYER, "self_attn.o_proj.bias", "attn_output.bias", ONE, HIDDEN, .when = WHEN_O_BIAS),
};

static const tensor_role QWEN2_BIASES[] = {
    TENSOR(PER_LAYER, "self_attn.q_proj.bias", "attn_q.bias", ONE, QUERY, ROTATED),
    TENSOR(PER_LAYER, "self_attn.k_proj.bias", "attn_k.bias", ONE, KEY, ROTATED),
    TENSOR(PER_LAYER, "self_attn.v_proj.bias", "attn_v.bias", ONE, KEY, ALWAYS),
};

// ---------------------------------------------------------------- MLP

static const tensor_role MLP[] = {
    TENSOR(PER_LAYER, "mlp.gate_proj.weight", "ffn_gate.weight", FFN, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "mlp.up_proj.weight", "ffn_up.weight", FFN, HIDDEN, ALWAYS),
    TENSOR(PER_LAYER, "mlp.down_proj.weight", "ffn_down.weight", HIDDEN, FFN, ALWAYS),
};

static const tensor_role FUSED_MLP[] = {
    TENSOR(PER_LAYER, "mlp.gate_proj.weight", NULL, FFN, HIDDEN, ROWS_OF(GATE_UP, ZERO, "mlp.gate_up_proj.weight")),
    TENSOR(PER_LAYER, "mlp.up_proj.weight", NULL, FFN, HIDDEN, ROWS_OF(GATE_UP, FFN, "mlp.gate_up_proj.weight")),
    TENSOR(PER_LAYER, "mlp.down_proj.weight", NULL, HIDDEN, FFN, ALWAYS),
};

static const tensor_role MLP_BIASES[] = {
    TENSOR(PER_LAYER, "mlp.gate_proj.bias", "ffn_gate.bias", ONE, FFN, .when = WHEN_MLP_BIAS),
    TENSOR(PER_LAYER, "mlp.up_proj.bias", "ffn_up.bias", ONE, FFN, .when = WHEN_MLP_BIAS),
    TENSOR(PER_LAYER, "mlp.down_proj.bias", "ffn_down.bias", ONE, HIDDEN, .when = WHEN_MLP_BIAS),
};

static const tensor_role QWEN_MOE[] = {
    TENSOR(PER_LAYER, "mlp.gate.weight", NULL, EXPERTS, HIDDEN, ALWAYS),
    TENSOR(PER_EXPERT, "mlp.experts.#.gate_proj.weight", NULL, FFN, HIDDEN, ALWAYS),
    TENSOR(PER_EXPERT, "mlp.experts.#.up_proj.weight", NULL, FFN, HIDDEN, ALWAYS),
    TENSOR(PER_EXPERT, "mlp.experts.#.down_proj.weight", NULL, HIDDEN, FFN, ALWAYS),
};

static const tensor_role MIXTRAL_MOE[] = {
    TENSOR(PER_LAYER, "mlp.gate.weight", NULL, EXPERTS, HIDDEN, STORED("block_sparse_moe.gate.weight")),
    TENSOR(PER_EXPERT, "mlp.experts.#.gate_proj.weight", NULL, FFN, HIDDEN,
           STORED("block_sparse_moe.experts.#.w1.weight")),
    TENSOR(PER_EXPERT, "mlp.experts.#.up_proj.weight", NULL, FFN, HIDDEN,
           STORED("block_sparse_moe.experts.#.w3.weight")),
    TENSOR(PER_EXPERT, "mlp.experts.#.down_proj.weight", NULL, HIDDEN, FFN,
           STORED("block_sparse_moe.experts.#.w2.weight")),
};

// ---------------------------------------------------------------- architectures

#define GROUP(roles)                                                                                                   \
    { roles, (int)(sizeof(roles) / sizeof *(roles)) }

static const char *const PICTURES[] = {"vision_tower.", "multi_modal_projector.", NULL};

static const architecture ARCHITECTURES[] = {
    {.name = "llama",
     .gguf_pairs = true,
     .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(ATTENTION), GROUP(BIASES), GROUP(MLP), GROUP(MLP_BIASES)}},
    {.name = "mistral", .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(ATTENTION), GROUP(MLP)}},
    {.name = "qwen2", .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(ATTENTION), GROUP(QWEN2_BIASES), GROUP(MLP)}},
    {.name = "qwen3",
     .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(ATTENTION), GROUP(BIASES), GROUP(QK_NORMS), GROUP(MLP)}},
    {.name = "phi3", .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(FUSED_ATTENTION), GROUP(FUSED_MLP)}},
    {.name = "gemma2", .groups = {GROUP(OUTER), GROUP(FOUR_NORMS), GROUP(ATTENTION), GROUP(BIASES), GROUP(MLP)}},
    {.name = "gemma3_text",
     .groups = {GROUP(OUTER), GROUP(FOUR_NORMS), GROUP(ATTENTION), GROUP(BIASES), GROUP(QK_NORMS), GROUP(MLP)}},
    {.name = "gemma3",
     .prefix = "language_model.",
     .ignored = PICTURES,
     .groups = {GROUP(OUTER), GROUP(FOUR_NORMS), GROUP(ATTENTION), GROUP(BIASES), GROUP(QK_NORMS), GROUP(MLP)}},
    {.name = "mixtral", .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(ATTENTION), GROUP(MIXTRAL_MOE)}},
    {.name = "qwen3_moe",
     .groups = {GROUP(OUTER), GROUP(NORMS), GROUP(ATTENTION), GROUP(BIASES), GROUP(QK_NORMS), GROUP(QWEN_MOE)}},
};

const architecture *architecture_find(const char *name) {
    for (size_t i = 0; i < sizeof ARCHITECTURES / sizeof *ARCHITECTURES; i++) {
        if (strcmp(ARCHITECTURES[i].name, name) == 0) return &ARCHITECTURES[i];
    }
    return NULL;
}
