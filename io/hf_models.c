// SPDX-License-Identifier: Apache-2.0
//
// The table of Hugging Face models: which fields their config.json has and what the missing ones stand for. Names,
// defaults and meanings are those of transformers' configuration classes (4.57, and 5 where it spells things anew).
#include <stdio.h>
#include <string.h>

#include "hf_config.h"

// ---------------------------------------------------------------- fields

// What holds unless a model says otherwise. A field outside both lists is reported and ignored.
static const hf_field COMMON[] = {
    {"model_type", HF_READ, NULL},
    {"num_hidden_layers", HF_READ, NULL},
    {"hidden_size", HF_READ, NULL},
    {"intermediate_size", HF_READ, NULL},
    {"num_attention_heads", HF_READ, NULL},
    {"num_key_value_heads", HF_READ, NULL},
    {"head_dim", HF_READ, NULL},
    {"vocab_size", HF_READ, NULL},
    {"max_position_embeddings", HF_READ, NULL},
    {"rms_norm_eps", HF_READ, NULL},
    {"rope_theta", HF_READ, NULL},
    {"rope_scaling", HF_READ, NULL},
    {"rope_parameters", HF_READ, NULL},
    {"tie_word_embeddings", HF_READ, NULL},
    {"bos_token_id", HF_READ, NULL},
    {"eos_token_id", HF_READ, NULL},
    {"architectures", HF_CLASS, NULL},
    {"hidden_act", HF_TEXT, "silu"},
    {"layer_types", HF_EACH, "full_attention"},
    {"partial_rotary_factor", HF_ONE, NULL},
    {"attention_bias", HF_OFF, NULL},
    {"mlp_bias", HF_OFF, NULL},
    {"lm_head_bias", HF_OFF, NULL},
    {"sliding_window", HF_OFF, NULL},
    {"use_sliding_window", HF_OFF, NULL},
    {"sliding_window_pattern", HF_OFF, NULL},
    {"use_bidirectional_attention", HF_OFF, NULL},
    {"rope_interleaved", HF_OFF, NULL},
    {"no_rope_layers", HF_OFF, NULL},
    {"use_qk_norm", HF_OFF, NULL},
    {"qk_norm", HF_OFF, NULL},
    {"clip_qkv", HF_OFF, NULL},
    {"attn_logit_softcapping", HF_OFF, NULL},
    {"final_logit_softcapping", HF_OFF, NULL},
    {"query_pre_attn_scalar", HF_OFF, NULL},
    {"attention_multiplier", HF_OFF, NULL},
    {"embedding_multiplier", HF_OFF, NULL},
    {"residual_multiplier", HF_OFF, NULL},
    {"logits_scaling", HF_OFF, NULL},
    {"logit_scale", HF_OFF, NULL},
    {"num_local_experts", HF_OFF, NULL},
    {"num_experts", HF_OFF, NULL},
    {"quantization_config", HF_OFF, NULL},
    {"compression_config", HF_OFF, NULL},
    {"is_encoder_decoder", HF_OFF, NULL},
    {"add_cross_attention", HF_OFF, NULL},
    {"auto_map", HF_OFF, NULL}, // the checkpoint brings its own code
    {"attention_dropout", HF_HARMLESS, NULL},
    {"initializer_range", HF_HARMLESS, NULL},
    {"pretraining_tp", HF_HARMLESS, NULL},
    {"use_cache", HF_HARMLESS, NULL},
    {"cache_implementation", HF_HARMLESS, NULL},
    {"torch_dtype", HF_HARMLESS, NULL},
    {"dtype", HF_HARMLESS, NULL},
    {"transformers_version", HF_HARMLESS, NULL},
    {"transformers.js_config", HF_HARMLESS, NULL},
    {"unsloth_version", HF_HARMLESS, NULL},
    {"unsloth_fixed", HF_HARMLESS, NULL},
    {"_name_or_path", HF_HARMLESS, NULL},
    {"_attn_implementation_autoset", HF_HARMLESS, NULL},
    {"is_llama_config", HF_HARMLESS, NULL},
    {"pad_token_id", HF_HARMLESS, NULL},
    {"max_sequence_length", HF_HARMLESS, NULL},
};

static const hf_field LLAMA[] = {
    {"attention_bias", HF_READ, NULL},
    {"mlp_bias", HF_READ, NULL},
    {NULL, HF_READ, NULL},
};

static const hf_field MISTRAL[] = {
    {"sliding_window", HF_READ, NULL},
    {"layer_types", HF_READ, NULL},
    {NULL, HF_READ, NULL},
};

static const hf_field QWEN2[] = {
    {"sliding_window", HF_READ, NULL},
    {"use_sliding_window", HF_READ, NULL},
    {"max_window_layers", HF_READ, NULL},
    {"layer_types", HF_READ, NULL},
    {NULL, HF_READ, NULL},
};

static const hf_field QWEN3[] = {
    {"attention_bias", HF_READ, NULL},    {"sliding_window", HF_READ, NULL}, {"use_sliding_window", HF_READ, NULL},
    {"max_window_layers", HF_READ, NULL}, {"layer_types", HF_READ, NULL},    {NULL, HF_READ, NULL},
};

// Without use_sliding_window, which must be off, the window counts for nothing; and with every layer sparse the width
// of a dense MLP does not either.
static const hf_field QWEN3_MOE[] = {
    {"attention_bias", HF_READ, NULL},           {"num_experts", HF_READ, NULL},
    {"num_local_experts", HF_READ, NULL},        {"num_experts_per_tok", HF_READ, NULL},
    {"norm_topk_prob", HF_READ, NULL},           {"moe_intermediate_size", HF_READ, NULL},
    {"intermediate_size", HF_HARMLESS, NULL},    {"decoder_sparse_step", HF_ONE, NULL},
    {"mlp_only_layers", HF_OFF, NULL},           {"sliding_window", HF_HARMLESS, NULL},
    {"max_window_layers", HF_HARMLESS, NULL},    {"output_router_logits", HF_HARMLESS, NULL},
    {"router_aux_loss_coef", HF_HARMLESS, NULL}, {NULL, HF_READ, NULL},
};

// The code that Phi-3 checkpoints bring along is what transformers has under this model_type. The original length
// matters to longrope only, which is refused.
static const hf_field PHI3[] = {
    {"sliding_window", HF_READ, NULL},        {"layer_types", HF_READ, NULL},
    {"partial_rotary_factor", HF_READ, NULL}, {"original_max_position_embeddings", HF_HARMLESS, NULL},
    {"resid_pdrop", HF_HARMLESS, NULL},       {"embd_pdrop", HF_HARMLESS, NULL},
    {"auto_map", HF_HARMLESS, NULL},          {NULL, HF_READ, NULL},
};

// hidden_act is a leftover that the class does not look at.
static const hf_field GEMMA2[] = {
    {"hidden_act", HF_HARMLESS, NULL},
    {"hidden_activation", HF_TEXT, "gelu_pytorch_tanh"},
    {"attention_bias", HF_READ, NULL},
    {"query_pre_attn_scalar", HF_READ, NULL},
    {"attn_logit_softcapping", HF_READ, NULL},
    {"final_logit_softcapping", HF_READ, NULL},
    {"sliding_window", HF_READ, NULL},
    {"layer_types", HF_READ, NULL},
    {NULL, HF_READ, NULL},
};

// The class takes attn_logit_softcapping and never uses it; a value there says that something else was meant.
// _sliding_window_pattern is written beside layer_types and never read back.
static const hf_field GEMMA3_TEXT[] = {
    {"hidden_act", HF_HARMLESS, NULL},
    {"hidden_activation", HF_TEXT, "gelu_pytorch_tanh"},
    {"attention_bias", HF_READ, NULL},
    {"query_pre_attn_scalar", HF_READ, NULL},
    {"final_logit_softcapping", HF_READ, NULL},
    {"sliding_window", HF_READ, NULL},
    {"sliding_window_pattern", HF_READ, NULL},
    {"_sliding_window_pattern", HF_HARMLESS, NULL},
    {"layer_types", HF_READ, NULL},
    {"rope_local_base_freq", HF_READ, NULL},
    {NULL, HF_READ, NULL},
};

// Text and pictures; kvq runs the text part.
static const hf_field GEMMA3[] = {
    {"text_config", HF_READ, NULL},           {"tie_word_embeddings", HF_TRUE, NULL},
    {"vision_config", HF_HARMLESS, NULL},     {"mm_tokens_per_image", HF_HARMLESS, NULL},
    {"boi_token_index", HF_HARMLESS, NULL},   {"eoi_token_index", HF_HARMLESS, NULL},
    {"image_token_index", HF_HARMLESS, NULL}, {NULL, HF_READ, NULL},
};

static const hf_field MIXTRAL[] = {
    {"sliding_window", HF_READ, NULL},
    {"layer_types", HF_READ, NULL},
    {"num_local_experts", HF_READ, NULL},
    {"num_experts_per_tok", HF_READ, NULL},
    {"output_router_logits", HF_HARMLESS, NULL},
    {"router_aux_loss_coef", HF_HARMLESS, NULL},
    {"router_jitter_noise", HF_HARMLESS, NULL}, // in training
    {NULL, HF_READ, NULL},
};

// ---------------------------------------------------------------- models

static const hf_model MODELS[] = {
    {.model_type = "llama",
     .class_name = "LlamaForCausalLM",
     .fields = LLAMA,
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000},
    {.model_type = "mistral",
     .class_name = "MistralForCausalLM",
     .fields = MISTRAL,
     .n_kv_heads = 8,
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .sliding_window = 4096},
    {.model_type = "qwen2",
     .class_name = "Qwen2ForCausalLM",
     .fields = QWEN2,
     .n_kv_heads = 32,
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .sliding_window = 4096,
     .first_sliding = 28,
     .mixes_layers = true,
     .qkv_bias = true},
    {.model_type = "qwen3",
     .class_name = "Qwen3ForCausalLM",
     .fields = QWEN3,
     .n_kv_heads = 32,
     .head_dim = 128,
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .sliding_window = 4096,
     .first_sliding = 28,
     .mixes_layers = true,
     .qk_norm = true},
    {.model_type = "phi3",
     .class_name = "Phi3ForCausalLM",
     .fields = PHI3,
     .rms_norm_eps = 1e-5,
     .rope_theta = 10000,
     .only_default_rope = true},
    {.model_type = "gemma2",
     .class_name = "Gemma2ForCausalLM",
     .fields = GEMMA2,
     .n_kv_heads = 4,
     .head_dim = 256,
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .query_scalar = 256,
     .attention_softcap = 50,
     .logit_softcap = 30,
     .tied_head = true,
     .sliding_window = 4096,
     .window_pattern = 2,
     .mixes_layers = true,
     .post_norms = true,
     .norm_offset = true,
     .scales_embedding = true,
     .activation = KVQ_GELU_TANH},
    {.model_type = "gemma3_text",
     .class_name = "Gemma3ForCausalLM",
     .fields = GEMMA3_TEXT,
     .n_heads = 8, // the text_config of published checkpoints leaves most sizes to the class
     .n_kv_heads = 4,
     .head_dim = 256,
     .vocab_size = 262208,
     .max_positions = 131072,
     .rms_norm_eps = 1e-6,
     .rope_theta = 1e6,
     .local_rope_theta = 10000,
     .query_scalar = 256,
     .tied_head = true,
     .sliding_window = 4096,
     .window_pattern = 6,
     .mixes_layers = true,
     .qk_norm = true,
     .post_norms = true,
     .norm_offset = true,
     .scales_embedding = true,
     .activation = KVQ_GELU_TANH},
    {.model_type = "gemma3",
     .class_name = "Gemma3ForConditionalGeneration",
     .fields = GEMMA3,
     .part = "text_config",
     .part_type = "gemma3_text"},
    {.model_type = "mixtral",
     .class_name = "MixtralForCausalLM",
     .fields = MIXTRAL,
     .n_kv_heads = 8,
     .rms_norm_eps = 1e-5,
     .rope_theta = 1e6,
     .n_experts = 8,
     .experts_per_token = 2,
     .expert_fields = {"num_local_experts", NULL},
     .normalize_experts = true},
    {.model_type = "qwen3_moe",
     .class_name = "Qwen3MoeForCausalLM",
     .fields = QWEN3_MOE,
     .n_kv_heads = 4,
     .intermediate_field = "moe_intermediate_size",
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .n_experts = 128,
     .experts_per_token = 8,
     .expert_fields = {"num_experts", "num_local_experts"},
     .qk_norm = true},
};
enum { N_MODELS = sizeof MODELS / sizeof *MODELS };

const hf_model *hf_model_find(const char *model_type) {
    for (int i = 0; i < N_MODELS; i++) {
        if (strcmp(MODELS[i].model_type, model_type) == 0) return &MODELS[i];
    }
    return NULL;
}

void hf_model_names(char *out, size_t size) {
    size_t n = 0;
    for (int i = 0; i < N_MODELS && n < size; i++) {
        n += (size_t)snprintf(out + n, size - n, "%s%s", i > 0 ? ", " : "", MODELS[i].model_type);
    }
}

const hf_field *hf_field_find(const hf_model *model, const char *name) {
    for (const hf_field *f = model->fields; f->name != NULL; f++) {
        if (strcmp(f->name, name) == 0) return f;
    }
    for (size_t i = 0; i < sizeof COMMON / sizeof *COMMON; i++) {
        if (strcmp(COMMON[i].name, name) == 0) return &COMMON[i];
    }
    return NULL;
}

bool hf_reads(const hf_model *model, const char *name) {
    const hf_field *field = hf_field_find(model, name);
    return field != NULL && field->rule == HF_READ;
}
