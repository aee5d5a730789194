// SPDX-License-Identifier: Apache-2.0
//
// config.json of a Hugging Face directory, read by the tables of hf_models.c. Every field is looked up there: read it,
// ignore it because it cannot change a result, or insist on the one value that kvq implements. A field outside the
// tables is reported and ignored; a field with another value is refused by name.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"
#include "hf_config.h"

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

static bool obeys(const cJSON *item, const hf_model *model, const hf_field *field) {
    switch (field->rule) {
    case HF_OFF:
        return is_off(item);
    case HF_ONE:
        return cJSON_IsNull(item) || (cJSON_IsNumber(item) && item->valuedouble == 1);
    case HF_TRUE:
        return cJSON_IsNull(item) || cJSON_IsTrue(item);
    case HF_TEXT:
        return cJSON_IsNull(item) || (cJSON_IsString(item) && strcmp(item->valuestring, field->text) == 0);
    case HF_EACH:
        return is_each(item, field->text);
    case HF_CLASS:
        return is_each(item, model->class_name);
    case HF_READ:
    case HF_HARMLESS:
        break;
    }
    return true;
}

static const char *wanted_value(const hf_model *model, const hf_field *field) {
    static const char *const WANTED[HF_CLASS + 1] = {[HF_OFF] = "null or false", [HF_ONE] = "1", [HF_TRUE] = "true"};
    if (field->rule == HF_CLASS) return model->class_name;
    return field->text != NULL ? field->text : WANTED[field->rule];
}

static kvq_status refuse_value(const cJSON *item, const hf_model *model, const hf_field *field, const char *what,
                               kvq_error *err) {
    char      *value = cJSON_PrintUnformatted(item); // NULL when out of memory; the message can do without
    kvq_status status = kvq_fail(
        err, KVQ_ERR_UNSUPPORTED, NULL, "%s: field '%s' is %.200s; for model_type '%s' kvq supports only %s", what,
        field->name, value != NULL ? value : "something else", model->model_type, wanted_value(model, field));
    cJSON_free(value);
    return status;
}

static kvq_status check_fields(const kvq_context *ctx, const hf_model *model, const cJSON *config, const char *what,
                               kvq_error *err) {
    char         unknown[400] = "";
    size_t       n = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, config) {
        const hf_field *field = hf_field_find(model, item->string);
        if (field == NULL && n < sizeof unknown) {
            n += (size_t)snprintf(unknown + n, sizeof unknown - n, "%s%.80s", n > 0 ? ", " : "", item->string);
        }
        if (field != NULL && !obeys(item, model, field)) return refuse_value(item, model, field, what, err);
    }
    if (n > 0) kvq_log(ctx, KVQ_LOG_WARNING, "%s: fields that kvq does not know are ignored: %s", what, unknown);
    return KVQ_OK;
}

// ---------------------------------------------------------------- sizes

// Upper limits are far beyond any model and keep every product of two of them inside 64 bits.
enum { LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS, N_SIZES };
static const struct {
    const char *name;
    int64_t     high;
} SIZES[N_SIZES] = {
    [LAYERS] = {"num_hidden_layers", KVQ_MAX_LAYERS},
    [HIDDEN] = {"hidden_size", 1 << 24},
    [FFN] = {"intermediate_size", 1 << 24},
    [HEADS] = {"num_attention_heads", 8192},
    [KV_HEADS] = {"num_key_value_heads", 8192},
    [HEAD_DIM] = {"head_dim", 8192},
    [VOCAB] = {"vocab_size", 1 << 26},
    [POSITIONS] = {"max_position_embeddings", INT32_MAX},
};

static bool is_null(const cJSON *config, const char *name) {
    return cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(config, name));
}

static kvq_status read_sizes(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *out,
                             kvq_error *err) {
    int64_t    size[N_SIZES] = {[HEADS] = model->n_heads,
                                [KV_HEADS] = model->n_kv_heads,
                                [HEAD_DIM] = model->head_dim,
                                [VOCAB] = model->vocab_size,
                                [POSITIONS] = model->max_positions};
    kvq_status status = KVQ_OK;
    for (int i = 0; i < N_SIZES; i++) {
        bool        derived = i == KV_HEADS || i == HEAD_DIM; // null asks for the value that follows from the others
        const char *name = i == FFN && model->intermediate_field != NULL ? model->intermediate_field : SIZES[i].name;
        if (derived && is_null(config, name)) size[i] = 0;
        KVQ_TRY(json_get_int(config, name, what, derived || size[i] > 0, 1, SIZES[i].high, &size[i], err));
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
    if (!cJSON_IsArray(item)) return json_get_int(config, name, what, true, -1, INT32_MAX, out, err);
    const cJSON *first = cJSON_GetArrayItem(item, 0);
    if (!cJSON_IsNumber(first) || first->valuedouble != (double)first->valueint || first->valueint < 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is a list without a token id", what, name);
    }
    *out = first->valueint;
    return KVQ_OK;
}

// ---------------------------------------------------------------- experts

enum { MAX_EXPERTS = 4096 };

// The number of experts may stand under one of two names, or under both when they agree.
static kvq_status read_n_experts(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                                 kvq_error *err) {
    int64_t n = 0;
    for (int i = 0; i < 2 && model->expert_fields[i] != NULL; i++) {
        const char *name = model->expert_fields[i];
        int64_t     value = n;
        kvq_status  status = json_get_int(config, name, what, true, 1, MAX_EXPERTS, &value, err);
        if (status != KVQ_OK) return status;
        if (n > 0 && value != n) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is %lld, but '%s' is %lld", what, name,
                            (long long)value, model->expert_fields[0], (long long)n);
        }
        n = value;
    }
    c->n_experts = (int)(n > 0 ? n : model->n_experts);
    return KVQ_OK;
}

static kvq_status read_experts(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                               kvq_error *err) {
    kvq_status status;
    int64_t    chosen = model->experts_per_token;
    c->normalize_experts = model->normalize_experts;
    if (model->n_experts == 0) return KVQ_OK;
    KVQ_TRY(read_n_experts(model, config, what, c, err));
    KVQ_TRY(json_get_int(config, "num_experts_per_tok", what, true, 1, MAX_EXPERTS, &chosen, err));
    if (hf_reads(model, "norm_topk_prob"))
        KVQ_TRY(json_get_bool(config, "norm_topk_prob", what, true, &c->normalize_experts, err));
    if (chosen > c->n_experts) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field 'num_experts_per_tok' is %lld of only %d experts", what,
                          (long long)chosen, c->n_experts);
        goto done;
    }
    c->experts_per_token = (int)chosen;
done:
    return status;
}

// ---------------------------------------------------------------- sliding windows

typedef struct window_rule {
    int64_t      window;  // 0 = none
    int64_t      first;   // sliding layer
    int64_t      pattern; // every such layer sees all keys
    const cJSON *types;   // a list that says it for every layer, or NULL
} window_rule;

static kvq_status read_window_rule(const hf_model *model, const cJSON *config, const char *what, window_rule *out,
                                   kvq_error *err) {
    kvq_status  status = KVQ_OK;
    bool        use = !hf_reads(model, "use_sliding_window");
    window_rule r = {model->sliding_window, model->first_sliding, model->window_pattern, NULL};
    if (!use) KVQ_TRY(json_get_bool(config, "use_sliding_window", what, true, &use, err));
    if (!use || is_null(config, "sliding_window")) r.window = 0;
    if (use) KVQ_TRY(json_get_int(config, "sliding_window", what, true, 1, INT32_MAX, &r.window, err));
    if (hf_reads(model, "max_window_layers"))
        KVQ_TRY(json_get_int(config, "max_window_layers", what, true, 0, INT32_MAX, &r.first, err));
    if (hf_reads(model, "sliding_window_pattern"))
        KVQ_TRY(json_get_int(config, "sliding_window_pattern", what, true, 1, INT32_MAX, &r.pattern, err));
    r.types = cJSON_GetObjectItemCaseSensitive(config, "layer_types");
    if (cJSON_IsNull(r.types)) r.types = NULL;
    *out = r;
done:
    return status;
}

static bool slides_by_rule(const window_rule *r, int64_t layer) {
    if (r->window == 0 && r->pattern == 0) return false;
    return layer >= r->first && (r->pattern == 0 || (layer + 1) % r->pattern != 0);
}

// What layer_types, when it is there, says about a layer. Where the class does not go by it, it must agree.
static kvq_status read_layer_type(const hf_model *model, const cJSON *type, int64_t layer, const char *what,
                                  bool *slides, kvq_error *err) {
    const char *text = cJSON_IsString(type) ? type->valuestring : "no text";
    bool        says_sliding = strcmp(text, "sliding_attention") == 0;
    if (!says_sliding && strcmp(text, "full_attention") != 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "%s: element %lld of 'layer_types' is '%.80s'; kvq supports full_attention, sliding_attention",
                        what, (long long)layer, text);
    }
    if (!model->mixes_layers && says_sliding != *slides) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "%s: element %lld of 'layer_types' is '%s', but with this sliding_window all layers of a %s "
                        "model are '%s'",
                        what, (long long)layer, text, model->model_type,
                        *slides ? "sliding_attention" : "full_attention");
    }
    *slides = says_sliding;
    return KVQ_OK;
}

static kvq_status read_windows(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                               kvq_error *err) {
    window_rule r = {0};
    bool        any = false;
    if (!hf_reads(model, "sliding_window")) return KVQ_OK;
    kvq_status status = read_window_rule(model, config, what, &r, err);
    if (status != KVQ_OK) return status;
    if (r.types != NULL && (!cJSON_IsArray(r.types) || cJSON_GetArraySize(r.types) != c->n_layers)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: 'layer_types' is no list of %lld elements, one for each layer",
                        what, (long long)c->n_layers);
    }
    const cJSON *type = r.types != NULL ? r.types->child : NULL;
    for (int64_t layer = 0; layer < c->n_layers; layer++, type = type != NULL ? type->next : NULL) {
        bool slides = slides_by_rule(&r, layer);
        if (type != NULL) status = read_layer_type(model, type, layer, what, &slides, err);
        if (status != KVQ_OK) return status;
        if (slides) c->slides[layer / 8] |= (uint8_t)(1u << (layer % 8));
        any = any || slides;
    }
    if (any && r.window == 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "%s: has layers of sliding_attention, but no sliding_window is in use", what);
    }
    c->sliding_window = any ? r.window : 0;
    return KVQ_OK;
}

// ---------------------------------------------------------------- numbers

// A positive number that null switches off (0).
static kvq_status read_softcap(const hf_model *model, const cJSON *config, const char *name, const char *what,
                               double missing, float *out, kvq_error *err) {
    double value = missing;
    if (!hf_reads(model, name)) return KVQ_OK;
    kvq_status status = json_get_double(config, name, what, true, &value, err);
    if (status != KVQ_OK) return status;
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(config, name);
    bool         is_given = item != NULL && !cJSON_IsNull(item);
    if (is_given && !(value > 0)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is %g, must be above 0 or null", what, name, value);
    }
    *out = cJSON_IsNull(item) ? 0 : (float)value;
    return KVQ_OK;
}

static kvq_status read_numbers(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                               kvq_error *err) {
    kvq_status status;
    double     eps = model->rms_norm_eps, scalar = model->query_scalar > 0 ? model->query_scalar : c->head_dim;
    KVQ_TRY(json_get_double(config, "rms_norm_eps", what, true, &eps, err));
    if (hf_reads(model, "query_pre_attn_scalar"))
        KVQ_TRY(json_get_double(config, "query_pre_attn_scalar", what, true, &scalar, err));
    KVQ_TRY(read_softcap(model, config, "attn_logit_softcapping", what, model->attention_softcap, &c->attention_softcap,
                         err));
    KVQ_TRY(read_softcap(model, config, "final_logit_softcapping", what, model->logit_softcap, &c->logit_softcap, err));
    if (!(scalar > 0)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field 'query_pre_attn_scalar' is %g, must be above 0", what,
                          scalar);
        goto done;
    }
    c->rms_norm_eps = (float)eps;
    c->attention_scale = (float)(1 / sqrt(scalar));
    c->embedding_scale = model->scales_embedding ? (float)sqrt((double)c->hidden_size) : 1;
done:
    return status;
}

// Biases, and what the class implies without a field.
static kvq_status read_switches(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                                kvq_error *err) {
    kvq_status status;
    c->tied_head = model->tied_head;
    c->qk_norm = model->qk_norm;
    c->post_norms = model->post_norms;
    c->norm_offset = model->norm_offset;
    c->activation = model->activation;
    KVQ_TRY(json_get_bool(config, "tie_word_embeddings", what, true, &c->tied_head, err));
    if (hf_reads(model, "attention_bias"))
        KVQ_TRY(json_get_bool(config, "attention_bias", what, true, &c->o_bias, err)); // one switch for all four
    if (hf_reads(model, "mlp_bias")) KVQ_TRY(json_get_bool(config, "mlp_bias", what, true, &c->mlp_bias, err));
    c->qkv_bias = model->qkv_bias || c->o_bias;
done:
    return status;
}

// ---------------------------------------------------------------- the whole

static kvq_status find_model(const char *type, const char *what, const hf_model **out, kvq_error *err) {
    char names[256];
    *out = hf_model_find(type);
    if (*out != NULL) return KVQ_OK;
    hf_model_names(names, sizeof names);
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: model_type '%.80s' is not supported; kvq knows: %s", what,
                    type, names);
}

// The decoder inside a checkpoint of several models: *config and *model become its own.
static kvq_status enter_part(const hf_model **model, const cJSON **config, const char *what, kvq_error *err) {
    const char  *type = (*model)->part_type;
    const cJSON *part = cJSON_GetObjectItemCaseSensitive(*config, (*model)->part);
    if (!cJSON_IsObject(part))
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: has no object '%s'", what, (*model)->part);
    kvq_status status = json_get_string(part, "model_type", what, true, &type, err);
    if (status != KVQ_OK) return status;
    if (strcmp(type, (*model)->part_type) != 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: model_type '%.80s' in '%s'; kvq supports only %s", what,
                        type, (*model)->part, (*model)->part_type);
    }
    *model = hf_model_find(type);
    *config = part;
    return KVQ_OK;
}

static kvq_status read_decoder(const hf_model *model, const cJSON *config, const char *what, kvq_model_config *c,
                               kvq_error *err) {
    kvq_status status;
    KVQ_TRY(read_sizes(model, config, what, c, err));
    KVQ_TRY(read_switches(model, config, what, c, err));
    KVQ_TRY(read_numbers(model, config, what, c, err));
    KVQ_TRY(read_experts(model, config, what, c, err));
    KVQ_TRY(read_windows(model, config, what, c, err));
    KVQ_TRY(hf_rope_read(model, config, what, c, err));
    KVQ_TRY(read_token_id(config, "bos_token_id", what, &c->bos_id, err));
    KVQ_TRY(read_token_id(config, "eos_token_id", what, &c->eos_id, err));
    KVQ_TRY(checkpoint_check_config(c, what, err));
done:
    return status;
}

kvq_status hf_config_read(const kvq_context *ctx, const char *text, size_t n, const char *what, kvq_model_config *out,
                          kvq_error *err) {
    kvq_status       status;
    kvq_model_config c = {.bos_id = -1, .eos_id = -1};
    cJSON           *tree = NULL;
    const cJSON     *config;
    const hf_model  *model = NULL;
    const char      *type = NULL;
    KVQ_TRY(json_parse(text, n, what, &tree, err));
    config = tree;
    KVQ_TRY(json_get_string(config, "model_type", what, false, &type, err));
    KVQ_TRY(find_model(type, what, &model, err));
    KVQ_TRY(check_fields(ctx, model, config, what, err));
    (void)snprintf(c.architecture, sizeof c.architecture, "%s", type);
    if (model->part != NULL) {
        KVQ_TRY(read_token_id(config, "bos_token_id", what, &c.bos_id, err)); // the part's own come on top
        KVQ_TRY(read_token_id(config, "eos_token_id", what, &c.eos_id, err));
        KVQ_TRY(enter_part(&model, &config, what, err));
        KVQ_TRY(check_fields(ctx, model, config, what, err));
    }
    KVQ_TRY(read_decoder(model, config, what, &c, err));
    *out = c;
done:
    cJSON_Delete(tree);
    return status;
}
