// SPDX-License-Identifier: Apache-2.0
//
// config.json of a Hugging Face directory. Every field is looked up in a table that says what kvq makes of it: read it,
// ignore it because it cannot change a result, or insist on the one value that kvq implements. A field outside the
// table is reported and ignored; a field with another value is refused by name.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"
#include "json_read.h"

typedef enum field_rule {
    RULE_READ,     // used below
    RULE_HARMLESS, // training, generation or bookkeeping
    RULE_OFF,      // null, false, 0 or an empty list
    RULE_TEXT,     // null or the string `text`
    RULE_EACH,     // null or a list in which every element is `text`
    RULE_ONE,      // null or the number 1
} field_rule;

typedef struct hf_field {
    const char *name;
    field_rule  rule;
    const char *text;
} hf_field;

static const hf_field LLAMA_FIELDS[] = {
    {"model_type", RULE_READ, NULL},
    {"num_hidden_layers", RULE_READ, NULL},
    {"hidden_size", RULE_READ, NULL},
    {"intermediate_size", RULE_READ, NULL},
    {"num_attention_heads", RULE_READ, NULL},
    {"num_key_value_heads", RULE_READ, NULL},
    {"head_dim", RULE_READ, NULL},
    {"vocab_size", RULE_READ, NULL},
    {"max_position_embeddings", RULE_READ, NULL},
    {"rms_norm_eps", RULE_READ, NULL},
    {"rope_theta", RULE_READ, NULL},
    {"rope_scaling", RULE_READ, NULL},
    {"rope_parameters", RULE_READ, NULL},
    {"tie_word_embeddings", RULE_READ, NULL},
    {"attention_bias", RULE_READ, NULL},
    {"mlp_bias", RULE_READ, NULL},
    {"bos_token_id", RULE_READ, NULL},
    {"eos_token_id", RULE_READ, NULL},
    {"architectures", RULE_EACH, "LlamaForCausalLM"},
    {"hidden_act", RULE_TEXT, "silu"},
    {"layer_types", RULE_EACH, "full_attention"},
    {"partial_rotary_factor", RULE_ONE, NULL},
    {"sliding_window", RULE_OFF, NULL},
    {"use_sliding_window", RULE_OFF, NULL},
    {"rope_interleaved", RULE_OFF, NULL},
    {"no_rope_layers", RULE_OFF, NULL},
    {"use_qk_norm", RULE_OFF, NULL},
    {"qk_norm", RULE_OFF, NULL},
    {"clip_qkv", RULE_OFF, NULL},
    {"attn_logit_softcapping", RULE_OFF, NULL},
    {"final_logit_softcapping", RULE_OFF, NULL},
    {"query_pre_attn_scalar", RULE_OFF, NULL},
    {"attention_multiplier", RULE_OFF, NULL},
    {"embedding_multiplier", RULE_OFF, NULL},
    {"residual_multiplier", RULE_OFF, NULL},
    {"logits_scaling", RULE_OFF, NULL},
    {"logit_scale", RULE_OFF, NULL},
    {"num_local_experts", RULE_OFF, NULL},
    {"num_experts", RULE_OFF, NULL},
    {"quantization_config", RULE_OFF, NULL},
    {"compression_config", RULE_OFF, NULL},
    {"is_encoder_decoder", RULE_OFF, NULL},
    {"add_cross_attention", RULE_OFF, NULL},
    {"auto_map", RULE_OFF, NULL}, // the checkpoint brings its own code
    {"attention_dropout", RULE_HARMLESS, NULL},
    {"initializer_range", RULE_HARMLESS, NULL},
    {"pretraining_tp", RULE_HARMLESS, NULL},
    {"use_cache", RULE_HARMLESS, NULL},
    {"torch_dtype", RULE_HARMLESS, NULL},
    {"dtype", RULE_HARMLESS, NULL},
    {"transformers_version", RULE_HARMLESS, NULL},
    {"transformers.js_config", RULE_HARMLESS, NULL},
    {"unsloth_version", RULE_HARMLESS, NULL},
    {"unsloth_fixed", RULE_HARMLESS, NULL},
    {"_name_or_path", RULE_HARMLESS, NULL},
    {"_attn_implementation_autoset", RULE_HARMLESS, NULL},
    {"is_llama_config", RULE_HARMLESS, NULL},
    {"pad_token_id", RULE_HARMLESS, NULL},
    {"max_sequence_length", RULE_HARMLESS, NULL},
};
enum { N_LLAMA_FIELDS = sizeof LLAMA_FIELDS / sizeof *LLAMA_FIELDS };

// ---------------------------------------------------------------- fields that must have a certain value

static bool is_off(const cJSON *item) {
    if (cJSON_IsArray(item)) return cJSON_GetArraySize(item) == 0;
    return cJSON_IsNull(item) || cJSON_IsFalse(item) || (cJSON_IsNumber(item) && item->valuedouble == 0);
}

static bool is_each(const cJSON *item, const char *text) {
    const cJSON *element;
    if (!cJSON_IsArray(item)) return cJSON_IsNull(item);
    cJSON_ArrayForEach(element, item) {
        if (!cJSON_IsString(element) || strcmp(element->valuestring, text) != 0) return false;
    }
    return true;
}

static bool obeys(const cJSON *item, const hf_field *field) {
    switch (field->rule) {
    case RULE_OFF:
        return is_off(item);
    case RULE_TEXT:
        return cJSON_IsNull(item) || (cJSON_IsString(item) && strcmp(item->valuestring, field->text) == 0);
    case RULE_EACH:
        return is_each(item, field->text);
    case RULE_ONE:
        return cJSON_IsNull(item) || (cJSON_IsNumber(item) && item->valuedouble == 1);
    case RULE_READ:
    case RULE_HARMLESS:
        break;
    }
    return true;
}

static kvq_status refuse_value(const cJSON *item, const hf_field *field, const char *what, kvq_error *err) {
    const char *wanted = field->text != NULL ? field->text : field->rule == RULE_ONE ? "1" : "null or false";
    char       *value = cJSON_PrintUnformatted(item); // NULL when out of memory; the message can do without
    kvq_status  status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                                  "%s: field '%s' is %.200s; for model_type 'llama' kvq supports only %s", what,
                                  field->name, value != NULL ? value : "something else", wanted);
    cJSON_free(value);
    return status;
}

static const hf_field *find_field(const char *name) {
    for (int i = 0; i < N_LLAMA_FIELDS; i++) {
        if (strcmp(LLAMA_FIELDS[i].name, name) == 0) return &LLAMA_FIELDS[i];
    }
    return NULL;
}

static kvq_status check_fields(const kvq_context *ctx, const cJSON *config, const char *what, kvq_error *err) {
    char         unknown[400] = "";
    size_t       n = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, config) {
        const hf_field *field = find_field(item->string);
        if (field == NULL && n < sizeof unknown) {
            n += (size_t)snprintf(unknown + n, sizeof unknown - n, "%s%.80s", n > 0 ? ", " : "", item->string);
        }
        if (field != NULL && !obeys(item, field)) return refuse_value(item, field, what, err);
    }
    if (n > 0) kvq_log(ctx, KVQ_LOG_WARNING, "%s: fields that kvq does not know are ignored: %s", what, unknown);
    return KVQ_OK;
}

// ---------------------------------------------------------------- sizes

// Upper limits are far beyond any model and keep every product of two of them inside 64 bits.
enum { LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS, N_SIZES };
static const struct {
    const char *name;
    bool        optional;
    int64_t     high;
} SIZES[N_SIZES] = {
    [LAYERS] = {"num_hidden_layers", false, 4096},    [HIDDEN] = {"hidden_size", false, 1 << 24},
    [FFN] = {"intermediate_size", false, 1 << 24},    [HEADS] = {"num_attention_heads", false, 8192},
    [KV_HEADS] = {"num_key_value_heads", true, 8192}, [HEAD_DIM] = {"head_dim", true, 8192},
    [VOCAB] = {"vocab_size", false, 1 << 26},         [POSITIONS] = {"max_position_embeddings", false, INT32_MAX},
};

static kvq_status read_sizes(const cJSON *config, const char *what, kvq_model_config *out, kvq_error *err) {
    int64_t    size[N_SIZES] = {0};
    kvq_status status = KVQ_OK;
    for (int i = 0; i < N_SIZES; i++) {
        KVQ_TRY(json_get_int(config, SIZES[i].name, what, SIZES[i].optional, 1, SIZES[i].high, &size[i], err));
    }
    if (size[KV_HEADS] == 0) size[KV_HEADS] = size[HEADS];
    if (size[HEAD_DIM] == 0) size[HEAD_DIM] = size[HIDDEN] / size[HEADS];
    if (size[HEAD_DIM] < 1 || size[HEAD_DIM] > SIZES[HEAD_DIM].high) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: hidden_size %lld / num_attention_heads %lld is no head width",
                          what, (long long)size[HIDDEN], (long long)size[HEADS]);
        goto done;
    }
    out->n_layers = size[LAYERS];
    out->hidden_size = size[HIDDEN];
    out->intermediate_size = size[FFN];
    out->n_heads = (int)size[HEADS];
    out->n_kv_heads = (int)size[KV_HEADS];
    out->head_dim = (int)size[HEAD_DIM];
    out->vocab_size = size[VOCAB];
    out->max_positions = size[POSITIONS];
done:
    return status;
}

// A token id: a number, null (none), or a list of which the first counts. Some checkpoints write -1 for none.
static kvq_status read_token_id(const cJSON *config, const char *name, const char *what, int64_t *out, kvq_error *err) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(config, name);
    *out = -1;
    if (!cJSON_IsArray(item)) return json_get_int(config, name, what, true, -1, INT32_MAX, out, err);
    const cJSON *first = cJSON_GetArrayItem(item, 0);
    if (!cJSON_IsNumber(first) || first->valuedouble != (double)first->valueint || first->valueint < 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is a list without a token id", what, name);
    }
    *out = first->valueint;
    return KVQ_OK;
}

// ---------------------------------------------------------------- rotary positions

enum { IN_LINEAR = 1 << KVQ_ROPE_LINEAR, IN_LLAMA3 = 1 << KVQ_ROPE_LLAMA3, IN_YARN = 1 << KVQ_ROPE_YARN, IN_ALL = 15 };

// Fields of rope_scaling or rope_parameters and the types that know them. Here an unknown field is an error: whatever
// it means, it changes the positions.
static const struct {
    const char *name;
    unsigned    types;
} ROPE_FIELDS[] = {
    {"rope_type", IN_ALL},
    {"type", IN_ALL},
    {"rope_theta", IN_ALL},
    {"partial_rotary_factor", IN_ALL},
    {"factor", IN_LINEAR | IN_LLAMA3 | IN_YARN},
    {"original_max_position_embeddings", IN_LLAMA3 | IN_YARN},
    {"low_freq_factor", IN_LLAMA3},
    {"high_freq_factor", IN_LLAMA3},
    {"attention_factor", IN_YARN},
    {"beta_fast", IN_YARN},
    {"beta_slow", IN_YARN},
    {"finetuned", IN_YARN}, // says how the model was made, not how it is run
};

static kvq_status check_rope_fields(const cJSON *rope, kvq_rope_type type, const char *what, kvq_error *err) {
    const cJSON *item;
    cJSON_ArrayForEach(item, rope) {
        size_t i = 0, n = sizeof ROPE_FIELDS / sizeof *ROPE_FIELDS;
        while (i < n && strcmp(ROPE_FIELDS[i].name, item->string) != 0) i++;
        if (i < n && (ROPE_FIELDS[i].types & 1u << type) != 0) continue;
        if (cJSON_IsNull(item)) continue;
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "%s: '%s' has the field '%s', which kvq does not know for the type '%s'", what, rope->string,
                        item->string, kvq_rope_type_name(type));
    }
    return KVQ_OK;
}

static kvq_status read_rope_type(const cJSON *rope, const char *what, kvq_rope_type *out, kvq_error *err) {
    const char *name = "default";
    kvq_status  status = json_get_string(rope, "type", what, true, &name, err);
    if (status == KVQ_OK) status = json_get_string(rope, "rope_type", what, true, &name, err);
    if (status != KVQ_OK) return status;
    for (int type = KVQ_ROPE_DEFAULT; type <= KVQ_ROPE_YARN; type++) {
        if (strcmp(name, kvq_rope_type_name((kvq_rope_type)type)) != 0) continue;
        *out = (kvq_rope_type)type;
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                    "%s: rotary type '%.80s' in '%s'; kvq supports default, linear, llama3, yarn", what, name,
                    rope->string);
}

// The numbers of one scaling type; defaults and formulas are those of transformers' modeling_rope_utils.
static kvq_status read_rope_numbers(const cJSON *rope, const char *what, kvq_model_config *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    bool       llama3 = c->rope.type == KVQ_ROPE_LLAMA3, yarn = c->rope.type == KVQ_ROPE_YARN;
    double     partial = 1;
    c->rope.beta_fast = yarn ? 32 : 0;
    c->rope.beta_slow = yarn ? 1 : 0;
    KVQ_TRY(json_get_double(rope, "partial_rotary_factor", what, true, &partial, err));
    KVQ_TRY(json_get_double(rope, "factor", what, c->rope.type == KVQ_ROPE_DEFAULT, &c->rope.factor, err));
    KVQ_TRY(json_get_double(rope, "low_freq_factor", what, !llama3, &c->rope.low_freq_factor, err));
    KVQ_TRY(json_get_double(rope, "high_freq_factor", what, !llama3, &c->rope.high_freq_factor, err));
    KVQ_TRY(json_get_double(rope, "beta_fast", what, true, &c->rope.beta_fast, err));
    KVQ_TRY(json_get_double(rope, "beta_slow", what, true, &c->rope.beta_slow, err));
    KVQ_TRY(json_get_double(rope, "attention_factor", what, true, &c->rope.attention_factor, err));
    if (llama3 || yarn) {
        c->rope.original_max_positions = c->max_positions;
        KVQ_TRY(json_get_int(rope, "original_max_position_embeddings", what, yarn, 1, INT32_MAX,
                             &c->rope.original_max_positions, err));
    }
    if (partial != 1) {
        status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                          "%s: field 'partial_rotary_factor' is %g; kvq supports only 1", what, partial);
    } else if (!(c->rope.factor > 0) || (yarn && c->rope.factor < 1)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the rotary factor %g is too small", what, c->rope.factor);
    } else if (llama3 && !(c->rope.low_freq_factor > 0 && c->rope.high_freq_factor > c->rope.low_freq_factor)) {
        status =
            kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: low_freq_factor %g and high_freq_factor %g are not 0 < low < high",
                     what, c->rope.low_freq_factor, c->rope.high_freq_factor);
    } else if (yarn &&
               !(c->rope.beta_slow > 0 && c->rope.beta_fast > c->rope.beta_slow && c->rope.attention_factor >= 0)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL,
                          "%s: beta_slow %g, beta_fast %g, attention_factor %g are not 0 < slow < fast, 0 <= factor",
                          what, c->rope.beta_slow, c->rope.beta_fast, c->rope.attention_factor);
    }
done:
    return status;
}

// Up to transformers 4 the base lies beside rope_scaling, from 5 on both lie in rope_parameters.
static kvq_status read_rope(const cJSON *config, const char *what, kvq_model_config *c, kvq_error *err) {
    kvq_status   status;
    const cJSON *scaling = cJSON_GetObjectItemCaseSensitive(config, "rope_scaling");
    const cJSON *parameters = cJSON_GetObjectItemCaseSensitive(config, "rope_parameters");
    const cJSON *rope = cJSON_IsObject(parameters) ? parameters : cJSON_IsObject(scaling) ? scaling : NULL;
    c->rope.theta = 10000;
    c->rope.n_dims = c->head_dim;
    c->rope.factor = 1;
    KVQ_TRY(json_get_double(config, "rope_theta", what, true, &c->rope.theta, err));
    if (rope == NULL) {
        bool null = (scaling == NULL || cJSON_IsNull(scaling)) && (parameters == NULL || cJSON_IsNull(parameters));
        if (!null)
            status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: rope_scaling or rope_parameters is no object", what);
        goto done;
    }
    if (cJSON_IsObject(parameters) && cJSON_IsObject(scaling)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, "remove the one that does not apply",
                          "%s: has both rope_scaling and rope_parameters", what);
        goto done;
    }
    KVQ_TRY(json_get_double(rope, "rope_theta", what, true, &c->rope.theta, err));
    KVQ_TRY(read_rope_type(rope, what, &c->rope.type, err));
    KVQ_TRY(check_rope_fields(rope, c->rope.type, what, err));
    KVQ_TRY(read_rope_numbers(rope, what, c, err));
done:
    return status;
}

// ---------------------------------------------------------------- the whole

kvq_status hf_config_read(const kvq_context *ctx, const char *text, size_t n, const char *what, kvq_model_config *out,
                          kvq_error *err) {
    kvq_status       status;
    kvq_model_config c = {0};
    cJSON           *config = NULL;
    const char      *type = NULL;
    double           eps = 1e-6; // transformers' default for llama
    int              n_roles = 0;
    KVQ_TRY(json_parse(text, n, what, &config, err));
    KVQ_TRY(json_get_string(config, "model_type", what, false, &type, err));
    if (architecture_tensors(type, &n_roles) == NULL) {
        status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: model_type '%.80s' is not supported; kvq knows: %s",
                          what, type, ARCHITECTURE_NAMES);
        goto done;
    }
    (void)snprintf(c.architecture, sizeof c.architecture, "%s", type);
    KVQ_TRY(check_fields(ctx, config, what, err));
    KVQ_TRY(read_sizes(config, what, &c, err));
    KVQ_TRY(json_get_double(config, "rms_norm_eps", what, true, &eps, err));
    KVQ_TRY(json_get_bool(config, "tie_word_embeddings", what, true, &c.tied_head, err));
    KVQ_TRY(json_get_bool(config, "attention_bias", what, true, &c.qkv_bias, err));
    KVQ_TRY(json_get_bool(config, "mlp_bias", what, true, &c.mlp_bias, err));
    KVQ_TRY(read_token_id(config, "bos_token_id", what, &c.bos_id, err));
    KVQ_TRY(read_token_id(config, "eos_token_id", what, &c.eos_id, err));
    KVQ_TRY(read_rope(config, what, &c, err));
    c.rms_norm_eps = (float)eps;
    c.embedding_scale = 1;
    c.attention_scale = (float)(1 / sqrt(c.head_dim));
    c.o_bias = c.qkv_bias; // llama has one switch for the four of them
    KVQ_TRY(checkpoint_check_config(&c, what, err));
    *out = c;
done:
    cJSON_Delete(config);
    return status;
}
