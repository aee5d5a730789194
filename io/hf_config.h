// SPDX-License-Identifier: Apache-2.0
//
// Private to io: what config.json means for each model_type, as data. hf_models.c holds the tables, hf_config.c and
// hf_rope.c read by them. A field of the config is read only where the model's row says READ, so a model that does not
// know a field cannot be changed by it.
#ifndef KVQ_IO_HF_CONFIG_H
#define KVQ_IO_HF_CONFIG_H

#include "json_read.h"
#include "kvq_io.h"

typedef enum hf_rule {
    HF_READ,     // used by the readers
    HF_HARMLESS, // training, generation or bookkeeping: cannot change a logit
    HF_OFF,      // null, false, 0 or an empty list
    HF_ONE,      // null or the number 1
    HF_TRUE,     // null or true
    HF_TEXT,     // null or the string `text`
    HF_EACH,     // null or a list in which every element is `text`
    HF_CLASS,    // null or a list in which every element is the model's class
} hf_rule;

typedef struct hf_field {
    const char *name;
    hf_rule     rule;
    const char *text;
} hf_field;

// One model_type: its fields, what transformers' config class takes for those that are missing, and what the class
// itself implies. Zero defaults mean: the field must be there (n_kv_heads: as many as heads; head_dim: hidden_size /
// heads).
typedef struct hf_model {
    const char     *model_type;
    const char     *class_name; // in `architectures`
    const hf_field *fields;     // where the model differs from the fields common to all; ends with a NULL name
    // A checkpoint of several models: the object of config.json that describes the decoder, and its model_type.
    const char *part, *part_type;

    int64_t     n_heads, n_kv_heads, head_dim, vocab_size, max_positions;
    const char *intermediate_field; // NULL = "intermediate_size"
    double      rms_norm_eps, rope_theta, local_rope_theta;
    double      query_scalar, attention_softcap, logit_softcap;
    bool        tied_head, only_default_rope;
    int64_t     sliding_window; // 0 = none
    int64_t     window_pattern; // every such layer sees all keys, the others slide; 0 = all slide that may
    int64_t     first_sliding;  // layers below see all keys
    bool        mixes_layers;   // the class goes by `layer_types`; otherwise all layers are alike
    int64_t     n_experts, experts_per_token;
    const char *expert_fields[2]; // names under which the number of experts may stand

    bool           qkv_bias, qk_norm, post_norms, norm_offset, scales_embedding, normalize_experts;
    kvq_activation activation;
} hf_model;

const hf_model *hf_model_find(const char *model_type); // NULL when kvq does not know it
// All names, separated by commas, for messages.
void hf_model_names(char *out, size_t size);
// The model's own row, or the one common to all, or NULL.
const hf_field *hf_field_find(const hf_model *model, const char *name);
bool            hf_reads(const hf_model *model, const char *name);

// Rotary positions; head_dim and max_positions of *out must be filled.
kvq_status hf_rope_read(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *out,
                        kvq_error *err);

#endif
