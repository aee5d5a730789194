// SPDX-License-Identifier: Apache-2.0
//
// The tensors of each architecture: what they are called in both containers, their shapes, when they exist.
#include <string.h>

#include "checkpoint.h"

static const tensor_role LLAMA[] = {
    {"model.embed_tokens.weight", "token_embd.weight", false, false, EXTENT_VOCAB, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"model.norm.weight", "output_norm.weight", false, false, EXTENT_ONE, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"lm_head.weight", "output.weight", false, false, EXTENT_VOCAB, EXTENT_HIDDEN, WHEN_UNTIED},
    {"input_layernorm.weight", "attn_norm.weight", true, false, EXTENT_ONE, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"self_attn.q_proj.weight", "attn_q.weight", true, true, EXTENT_QUERY, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"self_attn.k_proj.weight", "attn_k.weight", true, true, EXTENT_KEY, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"self_attn.v_proj.weight", "attn_v.weight", true, false, EXTENT_KEY, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"self_attn.o_proj.weight", "attn_output.weight", true, false, EXTENT_HIDDEN, EXTENT_QUERY, WHEN_ALWAYS},
    {"self_attn.q_proj.bias", "attn_q.bias", true, true, EXTENT_ONE, EXTENT_QUERY, WHEN_QKV_BIAS},
    {"self_attn.k_proj.bias", "attn_k.bias", true, true, EXTENT_ONE, EXTENT_KEY, WHEN_QKV_BIAS},
    {"self_attn.v_proj.bias", "attn_v.bias", true, false, EXTENT_ONE, EXTENT_KEY, WHEN_QKV_BIAS},
    {"self_attn.o_proj.bias", "attn_output.bias", true, false, EXTENT_ONE, EXTENT_HIDDEN, WHEN_O_BIAS},
    {"post_attention_layernorm.weight", "ffn_norm.weight", true, false, EXTENT_ONE, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"mlp.gate_proj.weight", "ffn_gate.weight", true, false, EXTENT_FFN, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"mlp.up_proj.weight", "ffn_up.weight", true, false, EXTENT_FFN, EXTENT_HIDDEN, WHEN_ALWAYS},
    {"mlp.down_proj.weight", "ffn_down.weight", true, false, EXTENT_HIDDEN, EXTENT_FFN, WHEN_ALWAYS},
    {"mlp.gate_proj.bias", "ffn_gate.bias", true, false, EXTENT_ONE, EXTENT_FFN, WHEN_MLP_BIAS},
    {"mlp.up_proj.bias", "ffn_up.bias", true, false, EXTENT_ONE, EXTENT_FFN, WHEN_MLP_BIAS},
    {"mlp.down_proj.bias", "ffn_down.bias", true, false, EXTENT_ONE, EXTENT_HIDDEN, WHEN_MLP_BIAS},
};

static const struct {
    const char        *name;
    const tensor_role *roles;
    int                n_roles;
} ARCHITECTURES[] = {
    {"llama", LLAMA, (int)(sizeof LLAMA / sizeof *LLAMA)},
};

const char ARCHITECTURE_NAMES[] = "llama";

const tensor_role *architecture_tensors(const char *name, int *n_roles) {
    for (size_t i = 0; i < sizeof ARCHITECTURES / sizeof *ARCHITECTURES; i++) {
        if (strcmp(ARCHITECTURES[i].name, name) != 0) continue;
        *n_roles = ARCHITECTURES[i].n_roles;
        return ARCHITECTURES[i].roles;
    }
    return NULL;
}
