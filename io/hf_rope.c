// SPDX-License-Identifier: Apache-2.0
//
// Rotary positions of config.json: rope_theta and rope_scaling up to transformers 4, rope_parameters from 5 on, one
// object for each kind of layer where these differ.
#include <string.h>

#include "hf_config.h"

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

// Types above `last` are refused.
static kvq_status read_rope_type(const cJSON *rope, kvq_rope_type last, const char *what, kvq_rope_type *out,
                                 kvq_error *err) {
    const char *name = "default";
    kvq_status  status = json_get_string(rope, "type", what, true, &name, err);
    if (status == KVQ_OK) status = json_get_string(rope, "rope_type", what, true, &name, err);
    if (status != KVQ_OK) return status;
    for (int type = KVQ_ROPE_DEFAULT; type <= (int)last; type++) {
        if (strcmp(name, kvq_rope_type_name((kvq_rope_type)type)) != 0) continue;
        *out = (kvq_rope_type)type;
        return KVQ_OK;
    }
    return kvq_fail(
        err, KVQ_ERR_UNSUPPORTED, NULL, "%s: rotary type '%.80s' in '%s'; kvq supports %s", what, name, rope->string,
        last == KVQ_ROPE_DEFAULT ? "only default for this model or layer" : "default, linear, llama3, yarn");
}

// The numbers of one scaling type; defaults and formulas are those of transformers' modeling_rope_utils.
static kvq_status read_rope_numbers(const cJSON *rope, const char *what, kvq_model_config *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    bool       llama3 = c->rope.type == KVQ_ROPE_LLAMA3, yarn = c->rope.type == KVQ_ROPE_YARN;
    c->rope.beta_fast = yarn ? 32 : 0;
    c->rope.beta_slow = yarn ? 1 : 0;
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
    if (!(c->rope.factor > 0) || (yarn && c->rope.factor < 1)) {
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

// How much of a head is rotated. Written beside the other fields, or from transformers 5 on inside rope_parameters.
static kvq_status read_partial(const hf_model *model, const cJSON *config, const cJSON *rope, const char *what,
                               kvq_model_config *c, kvq_error *err) {
    static const char NAME[] = "partial_rotary_factor";
    kvq_status        status = KVQ_OK;
    double            partial = 1;
    if (hf_reads(model, NAME)) KVQ_TRY(json_get_double(config, NAME, what, true, &partial, err));
    if (rope != NULL) KVQ_TRY(json_get_double(rope, NAME, what, true, &partial, err));
    if (partial != 1 && !hf_reads(model, NAME)) {
        status =
            kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: field '%s' is %g; for model_type '%s' kvq supports only 1",
                     what, NAME, partial, model->model_type);
        goto done;
    }
    if (!(partial > 0 && partial <= 1)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is %g, must be above 0 and at most 1", what, NAME,
                          partial);
        goto done;
    }
    c->rope.n_dims = (int)(c->head_dim * partial); // cut off, as transformers does
    if (partial < 1 && (c->rope.n_dims < 2 || c->rope.n_dims % 2 != 0)) {
        status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                          "%s: field '%s' is %g: of heads of width %d, %d channels would be rotated, and rotary "
                          "positions need pairs",
                          what, NAME, partial, c->head_dim, c->rope.n_dims);
    }
done:
    return status;
}

// Sliding layers may have a base of their own, but no scaling.
static kvq_status read_local(const cJSON *local, const char *what, kvq_model_config *c, kvq_error *err) {
    kvq_rope_type type = KVQ_ROPE_DEFAULT;
    kvq_status    status;
    KVQ_TRY(json_get_double(local, "rope_theta", what, true, &c->local_rope_theta, err));
    KVQ_TRY(read_rope_type(local, KVQ_ROPE_DEFAULT, what, &type, err));
    KVQ_TRY(check_rope_fields(local, type, what, err));
done:
    return status;
}

// { "full_attention": {...}, "sliding_attention": {...} }: *rope receives the first.
static kvq_status split_by_layer_type(const cJSON **rope, const char *what, kvq_model_config *c, kvq_error *err) {
    const cJSON *item, *full = NULL;
    cJSON_ArrayForEach(item, *rope) {
        bool       is_full = strcmp(item->string, "full_attention") == 0;
        kvq_status status = KVQ_OK;
        if (!cJSON_IsObject(item) || (!is_full && strcmp(item->string, "sliding_attention") != 0)) {
            return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                            "%s: '%s' has the field '%s' where kvq knows the objects full_attention, sliding_attention",
                            what, (*rope)->string, item->string);
        }
        if (is_full)
            full = item;
        else
            status = read_local(item, what, c, err);
        if (status != KVQ_OK) return status;
    }
    *rope = full;
    return KVQ_OK;
}

static kvq_status find_rope(const cJSON *config, const char *what, const cJSON **out, bool *is_new, kvq_error *err) {
    const cJSON *scaling = cJSON_GetObjectItemCaseSensitive(config, "rope_scaling");
    const cJSON *parameters = cJSON_GetObjectItemCaseSensitive(config, "rope_parameters");
    bool         null = (scaling == NULL || cJSON_IsNull(scaling)) && (parameters == NULL || cJSON_IsNull(parameters));
    if (cJSON_IsObject(parameters) && cJSON_IsObject(scaling)) {
        return kvq_fail(err, KVQ_ERR_INPUT, "remove the one that does not apply",
                        "%s: has both rope_scaling and rope_parameters", what);
    }
    *is_new = cJSON_IsObject(parameters);
    *out = *is_new ? parameters : cJSON_IsObject(scaling) ? scaling : NULL;
    if (*out == NULL && !null)
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: rope_scaling or rope_parameters is no object", what);
    return KVQ_OK;
}

// Up to transformers 4 the base lies beside rope_scaling, from 5 on both lie in rope_parameters.
kvq_status hf_rope_read(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                        kvq_error *err) {
    kvq_status   status;
    const cJSON *rope = NULL;
    bool         is_new = false;
    c->rope.theta = model->rope_theta;
    c->rope.factor = 1;
    c->local_rope_theta = model->local_rope_theta;
    KVQ_TRY(find_rope(config, what, &rope, &is_new, err));
    KVQ_TRY(json_get_double(config, "rope_theta", what, true, &c->rope.theta, err));
    if (hf_reads(model, "rope_local_base_freq"))
        KVQ_TRY(json_get_double(config, "rope_local_base_freq", what, true, &c->local_rope_theta, err));
    if (is_new && model->local_rope_theta > 0) KVQ_TRY(split_by_layer_type(&rope, what, c, err));
    KVQ_TRY(read_partial(model, config, rope, what, c, err));
    if (rope == NULL) goto done;
    KVQ_TRY(json_get_double(rope, "rope_theta", what, true, &c->rope.theta, err));
    KVQ_TRY(
        read_rope_type(rope, model->only_default_rope ? KVQ_ROPE_DEFAULT : KVQ_ROPE_YARN, what, &c->rope.type, err));
    KVQ_TRY(check_rope_fields(rope, c->rope.type, what, err));
    KVQ_TRY(read_rope_numbers(rope, what, c, err));
done:
    return status;
}
