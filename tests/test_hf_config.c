// SPDX-License-Identifier: Apache-2.0
//
// config.json of every supported model_type: what a field means, what a missing one means, and what is refused. The
// expected values are those of transformers' configuration classes.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"
#include "kvq_test.h"

#define SIZES                                                                                                          \
    "\"num_hidden_layers\": 8, \"hidden_size\": 256, \"intermediate_size\": 96, \"num_attention_heads\": 32,"          \
    "\"vocab_size\": 100, \"max_position_embeddings\": 512"

// `extra`: further members, or "". Sizes of a text_config are left to its class.
static const char *config_text(const char *type, const char *extra) {
    static char text[2048];
    (void)snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s%s%s}", type, SIZES ", \"moe_intermediate_size\": 24",
                   extra[0] != 0 ? ", " : "", extra);
    return text;
}

static kvq_status read_text(const char *text, kvq_model_config *out, kvq_error *err) {
    kvq_context ctx = kvq_test_context();
    return hf_config_read(&ctx, text, strlen(text), "config.json", out, err);
}

static kvq_model_config read_good(const char *type, const char *extra) {
    kvq_model_config c = {0};
    kvq_error        err = {0};
    kvq_test_ok(read_text(config_text(type, extra), &c, &err), &err);
    ck_assert_str_eq(c.architecture, type);
    return c;
}

// "s" for a layer that slides, "f" for one that sees all keys.
static const char *windows(const kvq_model_config *c) {
    static char text[64];
    for (int64_t i = 0; i < c->n_layers; i++) {
        ck_assert(kvq_layer_window(c, i) == 0 || kvq_layer_window(c, i) == c->sliding_window);
        text[i] = kvq_layer_window(c, i) > 0 ? 's' : 'f';
    }
    text[c->n_layers] = 0;
    return text;
}

// ---------------------------------------------------------------- what missing fields mean

static const struct {
    const char *type;
    int         n_kv_heads, head_dim;
    int64_t     window;
    const char *windows;
    double      eps, theta, local_theta, attention_scale, attention_softcap, logit_softcap;
    bool        tied, qkv_bias, qk_norm, gemma; // gemma: norms, activation and embedding of that family
    int         n_experts, experts_per_token;
    bool        normalize;
} DEFAULTS[] = {
    {"llama", 32, 8, 0, "ffffffff", 1e-6, 1e4, 0, 8, 0, 0, false, false, false, false, 0, 0, false},
    {"mistral", 8, 8, 4096, "ssssssss", 1e-6, 1e4, 0, 8, 0, 0, false, false, false, false, 0, 0, false},
    {"qwen2", 32, 8, 0, "ffffffff", 1e-6, 1e4, 0, 8, 0, 0, false, true, false, false, 0, 0, false},
    {"qwen3", 32, 128, 0, "ffffffff", 1e-6, 1e4, 0, 128, 0, 0, false, false, true, false, 0, 0, false},
    {"phi3", 32, 8, 0, "ffffffff", 1e-5, 1e4, 0, 8, 0, 0, false, false, false, false, 0, 0, false},
    {"gemma2", 4, 256, 4096, "sfsfsfsf", 1e-6, 1e4, 0, 256, 50, 30, true, false, false, true, 0, 0, false},
    {"gemma3_text", 4, 256, 4096, "sssssfss", 1e-6, 1e6, 1e4, 256, 0, 0, true, false, true, true, 0, 0, false},
    {"mixtral", 8, 8, 0, "ffffffff", 1e-5, 1e6, 0, 8, 0, 0, false, false, false, false, 8, 2, true},
    {"qwen3_moe", 4, 8, 0, "ffffffff", 1e-6, 1e4, 0, 8, 0, 0, false, false, true, false, 128, 8, false},
};
enum { N_DEFAULTS = sizeof DEFAULTS / sizeof *DEFAULTS };

START_TEST(missing_fields_mean_what_the_class_says) {
    kvq_model_config c = read_good(DEFAULTS[_i].type, "");
    ck_assert(c.n_layers == 8 && c.hidden_size == 256 && c.n_heads == 32 && c.vocab_size == 100);
    ck_assert_int_eq(c.intermediate_size, strcmp(DEFAULTS[_i].type, "qwen3_moe") == 0 ? 24 : 96);
    ck_assert_int_eq(c.n_kv_heads, DEFAULTS[_i].n_kv_heads);
    ck_assert_int_eq(c.head_dim, DEFAULTS[_i].head_dim);
    ck_assert_int_eq(c.sliding_window, DEFAULTS[_i].window);
    ck_assert_str_eq(windows(&c), DEFAULTS[_i].windows);
    ck_assert(c.rms_norm_eps == (float)DEFAULTS[_i].eps && c.rope.theta == DEFAULTS[_i].theta);
    ck_assert(c.local_rope_theta == DEFAULTS[_i].local_theta && c.rope.n_dims == c.head_dim);
    ck_assert(c.rope.type == KVQ_ROPE_DEFAULT && c.rope.factor == 1);
    ck_assert(c.attention_scale == (float)(1 / sqrt(DEFAULTS[_i].attention_scale)));
    ck_assert(c.attention_softcap == (float)DEFAULTS[_i].attention_softcap);
    ck_assert(c.logit_softcap == (float)DEFAULTS[_i].logit_softcap);
    ck_assert(c.tied_head == DEFAULTS[_i].tied && c.qkv_bias == DEFAULTS[_i].qkv_bias);
    ck_assert(!c.o_bias && !c.mlp_bias && c.qk_norm == DEFAULTS[_i].qk_norm);
    ck_assert(c.post_norms == DEFAULTS[_i].gemma && c.norm_offset == DEFAULTS[_i].gemma);
    ck_assert_int_eq(c.activation, DEFAULTS[_i].gemma ? KVQ_GELU_TANH : KVQ_SILU);
    ck_assert(c.embedding_scale == (DEFAULTS[_i].gemma ? 16 : 1)); // sqrt(256)
    ck_assert_int_eq(c.n_experts, DEFAULTS[_i].n_experts);
    ck_assert_int_eq(c.experts_per_token, DEFAULTS[_i].experts_per_token);
    ck_assert(c.normalize_experts == DEFAULTS[_i].normalize && c.bos_id == -1 && c.eos_id == -1);
}
END_TEST

// ---------------------------------------------------------------- what fields mean

START_TEST(null_derives_heads) {
    static const char *const types[] = {"mistral", "qwen2", "mixtral", "gemma2"};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        kvq_model_config c = read_good(types[i], "\"num_key_value_heads\": null, \"head_dim\": null");
        ck_assert(c.n_kv_heads == 32 && c.head_dim == 8);
    }
}
END_TEST

START_TEST(numbers_reach_the_model) {
    kvq_model_config c = read_good("gemma2", "\"query_pre_attn_scalar\": 64, \"attn_logit_softcapping\": 20.0,"
                                             "\"final_logit_softcapping\": 15.0, \"attention_bias\": true,"
                                             "\"head_dim\": 24, \"tie_word_embeddings\": false");
    ck_assert(c.attention_scale == 0.125f && c.attention_softcap == 20 && c.logit_softcap == 15);
    ck_assert(c.qkv_bias && c.o_bias && c.head_dim == 24 && !c.tied_head);
    c = read_good("gemma2", "\"attn_logit_softcapping\": null, \"final_logit_softcapping\": null");
    ck_assert(c.attention_softcap == 0 && c.logit_softcap == 0);
    c = read_good("gemma2", "\"head_dim\": 24"); // the scale does not follow the width
    ck_assert(c.attention_scale == 0.0625f);
    c = read_good("gemma3_text", "\"final_logit_softcapping\": 30, \"rope_local_base_freq\": 20000");
    ck_assert(c.logit_softcap == 30 && c.local_rope_theta == 20000 && c.rope.theta == 1e6);
    c = read_good("qwen3", "\"attention_bias\": true");
    ck_assert(c.qkv_bias && c.o_bias);
    c = read_good("mixtral", "\"num_local_experts\": 4, \"num_experts_per_tok\": 3");
    ck_assert(c.n_experts == 4 && c.experts_per_token == 3 && c.normalize_experts);
    c = read_good("qwen3_moe", "\"num_experts\": 16, \"num_experts_per_tok\": 4, \"norm_topk_prob\": true,"
                               "\"decoder_sparse_step\": 1, \"mlp_only_layers\": []");
    ck_assert(c.n_experts == 16 && c.experts_per_token == 4 && c.normalize_experts);
    c = read_good("qwen3_moe", "\"num_local_experts\": 16"); // as transformers 5 writes it
    ck_assert_int_eq(c.n_experts, 16);
}
END_TEST

static const struct {
    const char *type, *extra;
    int64_t     window;
    const char *windows;
} WINDOWS[] = {
    {"mistral", "\"sliding_window\": null", 0, "ffffffff"},
    {"mistral", "\"sliding_window\": 16", 16, "ssssssss"},
    {"mistral", "\"sliding_window\": 16, \"num_hidden_layers\": 1, \"layer_types\": [\"sliding_attention\"]", 16, "s"},
    {"mixtral", "\"sliding_window\": 7", 7, "ssssssss"},
    {"phi3", "\"sliding_window\": 2047", 2047, "ssssssss"},
    {"qwen2", "\"sliding_window\": 16", 0, "ffffffff"},                               // needs use_sliding_window
    {"qwen2", "\"sliding_window\": 16, \"use_sliding_window\": true", 0, "ffffffff"}, // from layer 28
    {"qwen2", "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 6", 16, "ffffffss"},
    {"qwen3", "\"use_sliding_window\": true, \"max_window_layers\": 0", 4096, "ssssssss"},
    {"qwen3", "\"sliding_window\": null, \"use_sliding_window\": true, \"max_window_layers\": 0", 0, "ffffffff"},
    {"qwen3",
     "\"sliding_window\": 5, \"use_sliding_window\": true, \"num_hidden_layers\": 2,"
     "\"layer_types\": [\"sliding_attention\", \"full_attention\"]",
     5, "sf"},
    {"gemma2", "\"num_hidden_layers\": 3, \"layer_types\": null, \"sliding_window\": 9", 9, "sfs"},
    {"gemma2", "\"num_hidden_layers\": 2, \"layer_types\": [\"full_attention\", \"full_attention\"]", 0, "ff"},
    {"gemma3_text", "\"sliding_window_pattern\": 3", 4096, "ssfssfss"},
    {"gemma3_text", "\"_sliding_window_pattern\": 3", 4096, "sssssfss"}, // written, never read back
    {"gemma3_text", "\"num_hidden_layers\": 2, \"layer_types\": [\"full_attention\", \"sliding_attention\"]", 4096,
     "fs"},
};
enum { N_WINDOWS = sizeof WINDOWS / sizeof *WINDOWS };

// A second value of num_hidden_layers would be refused as a duplicate: the text is built without the first.
START_TEST(layers_slide_as_the_config_says) {
    char             text[2048];
    const char      *type = WINDOWS[_i].type, *extra = WINDOWS[_i].extra;
    kvq_model_config c = {0};
    kvq_error        err = {0};
    (void)snprintf(text, sizeof text, "%s", config_text(type, extra));
    char *eight = strstr(text, "\"num_hidden_layers\": 8, ");
    if (strstr(extra, "num_hidden_layers") != NULL) memmove(eight, eight + 24, strlen(eight + 24) + 1);
    kvq_test_ok(read_text(text, &c, &err), &err);
    ck_assert_int_eq(c.sliding_window, WINDOWS[_i].window);
    ck_assert_str_eq(windows(&c), WINDOWS[_i].windows);
}
END_TEST

START_TEST(rotary_settings) {
    kvq_model_config c = read_good("phi3", "\"head_dim\": 16, \"partial_rotary_factor\": 0.75");
    ck_assert(c.rope.n_dims == 12 && c.head_dim == 16);
    c = read_good("phi3", "\"head_dim\": 16, \"partial_rotary_factor\": 0.3"); // 4.8 is cut off
    ck_assert_int_eq(c.rope.n_dims, 4);
    c = read_good("phi3", "\"head_dim\": 16, \"rope_parameters\": {\"rope_theta\": 5e5, \"rope_type\": \"default\","
                          "\"partial_rotary_factor\": 0.5}");
    ck_assert(c.rope.n_dims == 8 && c.rope.theta == 5e5);
    c = read_good("gemma3_text", "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 8.0}");
    ck_assert(c.rope.type == KVQ_ROPE_LINEAR && c.rope.factor == 8 && c.local_rope_theta == 1e4);
    c = read_good("gemma3_text", "\"rope_parameters\": {"
                                 "\"full_attention\": {\"rope_type\": \"linear\", \"factor\": 4, \"rope_theta\": 3e5},"
                                 "\"sliding_attention\": {\"rope_type\": \"default\", \"rope_theta\": 2e4}}");
    ck_assert(c.rope.type == KVQ_ROPE_LINEAR && c.rope.factor == 4 && c.rope.theta == 3e5);
    ck_assert(c.local_rope_theta == 2e4);
    c = read_good("gemma3_text", "\"rope_parameters\": {\"sliding_attention\": {\"rope_theta\": 2e4}}");
    ck_assert(c.rope.type == KVQ_ROPE_DEFAULT && c.rope.theta == 1e6 && c.local_rope_theta == 2e4);
    c = read_good("qwen2", "\"rope_theta\": 1e6, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0,"
                           "\"original_max_position_embeddings\": 128}");
    ck_assert(c.rope.type == KVQ_ROPE_YARN && c.rope.theta == 1e6 && c.rope.original_max_positions == 128);
}
END_TEST

// As the published checkpoints with pictures write it: most sizes are left to the class.
START_TEST(a_text_config_inside) {
    static const char TEXT[] =
        "{\"architectures\": [\"Gemma3ForConditionalGeneration\"], \"model_type\": \"gemma3\","
        "\"eos_token_id\": [1, 106], \"mm_tokens_per_image\": 256, \"vision_config\": {\"hidden_size\": 1152},"
        "\"text_config\": {\"hidden_size\": 2560, \"intermediate_size\": 10240, \"model_type\": \"gemma3_text\","
        "\"num_hidden_layers\": 34, \"sliding_window\": 1024,"
        "\"rope_scaling\": {\"factor\": 8.0, \"rope_type\": \"linear\"}}}";
    kvq_model_config c = {0};
    kvq_error        err = {0};
    kvq_test_ok(read_text(TEXT, &c, &err), &err);
    ck_assert_str_eq(c.architecture, "gemma3");
    ck_assert(c.hidden_size == 2560 && c.n_layers == 34 && c.n_heads == 8 && c.n_kv_heads == 4 && c.head_dim == 256);
    ck_assert(c.vocab_size == 262208 && c.max_positions == 131072 && c.sliding_window == 1024 && c.tied_head);
    ck_assert(c.rope.type == KVQ_ROPE_LINEAR && c.eos_id == 1 && c.bos_id == -1 && c.qk_norm);
    ck_assert_str_eq(windows(&c), "sssssfsssssfsssssfsssssfsssssfssss");
}
END_TEST

// ---------------------------------------------------------------- what is refused

static const struct {
    const char *type, *extra;
    kvq_status  status;
    const char *fragment;
} REFUSED[] = {
    {"gpt2", "", KVQ_ERR_UNSUPPORTED,
     "model_type 'gpt2' is not supported; kvq knows: llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text, gemma3, "
     "mixtral, qwen3_moe"},
    {"llama", "\"num_experts\": 4", KVQ_ERR_UNSUPPORTED, "'num_experts' is 4; for model_type 'llama'"},
    {"mistral", "\"attention_bias\": true", KVQ_ERR_UNSUPPORTED, "'attention_bias' is true; for model_type 'mistral'"},
    {"mistral", "\"sliding_window\": 0", KVQ_ERR_INPUT, "'sliding_window' is 0"},
    {"mistral", "\"architectures\": [\"LlamaForCausalLM\"]", KVQ_ERR_UNSUPPORTED, "supports only MistralForCausalLM"},
    {"mistral", "\"layer_types\": [\"full_attention\"]", KVQ_ERR_INPUT, "'layer_types' is no list of 8 elements"},
    {"mistral", "\"layer_types\": \"full_attention\"", KVQ_ERR_INPUT, "'layer_types' is no list of 8 elements"},
    {"qwen2", "\"mlp_bias\": true", KVQ_ERR_UNSUPPORTED, "'mlp_bias'"},
    {"qwen2", "\"attention_bias\": true", KVQ_ERR_UNSUPPORTED, "'attention_bias'"},
    {"qwen2", "\"use_sliding_window\": 1", KVQ_ERR_INPUT, "'use_sliding_window' is not true or false"},
    {"qwen2", "\"rope_scaling\": {\"type\": \"mrope\", \"mrope_section\": [1]}", KVQ_ERR_UNSUPPORTED, "'mrope'"},
    {"qwen3", "\"hidden_act\": \"gelu\"", KVQ_ERR_UNSUPPORTED, "'hidden_act'"},
    {"qwen3", "\"num_key_value_heads\": 5", KVQ_ERR_INPUT, "not a multiple of 5"},
    {"qwen3", "\"partial_rotary_factor\": 0.5", KVQ_ERR_UNSUPPORTED, "'partial_rotary_factor'"},
    {"qwen3", "\"rope_parameters\": {\"partial_rotary_factor\": 0.5}", KVQ_ERR_UNSUPPORTED,
     "'partial_rotary_factor' is 0.5; for model_type 'qwen3'"},
    {"qwen3", "\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}}", KVQ_ERR_UNSUPPORTED,
     "the field 'full_attention'"},
    {"phi3", "\"rope_scaling\": {\"type\": \"longrope\", \"long_factor\": [1], \"short_factor\": [1]}",
     KVQ_ERR_UNSUPPORTED, "'longrope'"},
    {"phi3", "\"rope_scaling\": {\"type\": \"su\"}", KVQ_ERR_UNSUPPORTED, "'su'"},
    {"phi3", "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2}", KVQ_ERR_UNSUPPORTED,
     "'yarn' in 'rope_scaling'; kvq supports only default"},
    {"phi3", "\"partial_rotary_factor\": 0", KVQ_ERR_INPUT, "'partial_rotary_factor' is 0"},
    {"phi3", "\"partial_rotary_factor\": 1.5", KVQ_ERR_INPUT, "'partial_rotary_factor' is 1.5"},
    {"phi3", "\"partial_rotary_factor\": 0.45", KVQ_ERR_UNSUPPORTED, "3 channels would be rotated"},
    {"phi3", "\"attention_bias\": true", KVQ_ERR_UNSUPPORTED, "'attention_bias'"},
    {"phi3", "\"lm_head_bias\": true", KVQ_ERR_UNSUPPORTED, "'lm_head_bias'"},
    {"gemma2", "\"hidden_activation\": \"gelu\"", KVQ_ERR_UNSUPPORTED, "'hidden_activation' is \"gelu\""},
    {"gemma2", "\"query_pre_attn_scalar\": 0", KVQ_ERR_INPUT, "'query_pre_attn_scalar' is 0"},
    {"gemma2", "\"query_pre_attn_scalar\": -4", KVQ_ERR_INPUT, "'query_pre_attn_scalar' is -4"},
    {"gemma2", "\"attn_logit_softcapping\": 0", KVQ_ERR_INPUT, "'attn_logit_softcapping' is 0"},
    {"gemma2", "\"final_logit_softcapping\": -1", KVQ_ERR_INPUT, "'final_logit_softcapping' is -1"},
    {"gemma2", "\"sliding_window\": null", KVQ_ERR_INPUT, "no sliding_window"},
    {"gemma2", "\"use_bidirectional_attention\": true", KVQ_ERR_UNSUPPORTED, "'use_bidirectional_attention'"},
    {"gemma3_text", "\"use_bidirectional_attention\": true", KVQ_ERR_UNSUPPORTED, "'use_bidirectional_attention'"},
    {"gemma3_text", "\"attn_logit_softcapping\": 50", KVQ_ERR_UNSUPPORTED, "'attn_logit_softcapping'"},
    {"gemma3_text", "\"sliding_window_pattern\": 0", KVQ_ERR_INPUT, "'sliding_window_pattern' is 0"},
    {"gemma3_text", "\"rope_local_base_freq\": 1", KVQ_ERR_INPUT, "rotary base 1 of sliding layers"},
    {"gemma3_text", "\"rope_parameters\": {\"rope_theta\": 1e6}", KVQ_ERR_UNSUPPORTED, "the field 'rope_theta' where"},
    {"gemma3_text", "\"rope_parameters\": {\"sliding_attention\": {\"rope_type\": \"linear\", \"factor\": 2}}",
     KVQ_ERR_UNSUPPORTED, "'linear' in 'sliding_attention'"},
    {"gemma3_text", "\"rope_parameters\": {\"chunked_attention\": {}}", KVQ_ERR_UNSUPPORTED, "'chunked_attention'"},
    {"gemma3", "", KVQ_ERR_INPUT, "no object 'text_config'"},
    {"gemma3", "\"text_config\": {\"model_type\": \"qwen2\"}", KVQ_ERR_UNSUPPORTED, "'qwen2' in 'text_config'"},
    {"gemma3", "\"text_config\": {}, \"tie_word_embeddings\": false", KVQ_ERR_UNSUPPORTED, "'tie_word_embeddings'"},
    {"gemma3", "\"text_config\": {}, \"quantization_config\": {\"a\": 1}", KVQ_ERR_UNSUPPORTED, "quantization_config"},
    {"gemma3", "\"text_config\": {\"attn_logit_softcapping\": 1}", KVQ_ERR_UNSUPPORTED, "'attn_logit_softcapping'"},
    {"gemma3", "\"text_config\": {}", KVQ_ERR_INPUT, "'num_hidden_layers' is missing"},
    {"mixtral", "\"num_local_experts\": 0", KVQ_ERR_INPUT, "'num_local_experts' is 0"},
    {"mixtral", "\"num_local_experts\": 4096001", KVQ_ERR_INPUT, "'num_local_experts' is 4096001"},
    {"mixtral", "\"num_experts_per_tok\": 9", KVQ_ERR_INPUT, "'num_experts_per_tok' is 9 of only 8"},
    {"mixtral", "\"num_experts\": 4", KVQ_ERR_UNSUPPORTED, "'num_experts'"},
    {"mixtral", "\"attention_bias\": true", KVQ_ERR_UNSUPPORTED, "'attention_bias'"},
    {"qwen3_moe", "\"decoder_sparse_step\": 2", KVQ_ERR_UNSUPPORTED, "'decoder_sparse_step' is 2"},
    {"qwen3_moe", "\"mlp_only_layers\": [0]", KVQ_ERR_UNSUPPORTED, "'mlp_only_layers' is [0]"},
    {"qwen3_moe", "\"use_sliding_window\": true", KVQ_ERR_UNSUPPORTED, "'use_sliding_window'"},
    {"qwen3_moe", "\"num_experts\": 8, \"num_local_experts\": 16", KVQ_ERR_INPUT, "'num_experts' is 8"},
    {"qwen3_moe", "\"norm_topk_prob\": 1", KVQ_ERR_INPUT, "'norm_topk_prob'"},
};
enum { N_REFUSED = sizeof REFUSED / sizeof *REFUSED };

START_TEST(other_values_are_refused_by_name) {
    kvq_model_config c = {0}, untouched = {0};
    kvq_error        err = {0};
    kvq_test_failed(read_text(config_text(REFUSED[_i].type, REFUSED[_i].extra), &c, &err), REFUSED[_i].status, &err,
                    REFUSED[_i].fragment);
    ck_assert_mem_eq(&c, &untouched, sizeof c);
}
END_TEST

START_TEST(layer_types_are_checked) {
    static const struct {
        const char *type, *types, *fragment;
        kvq_status  status;
    } cases[] = {
        {"mistral", "[\"full_attention\", \"full_attention\"]", "element 0 of 'layer_types' is 'full_attention', but",
         KVQ_ERR_UNSUPPORTED},
        {"phi3", "[\"full_attention\", \"sliding_attention\"]",
         "element 1 of 'layer_types' is 'sliding_attention', but", KVQ_ERR_UNSUPPORTED},
        {"qwen2", "[\"full_attention\", \"chunked_attention\"]", "'chunked_attention'", KVQ_ERR_UNSUPPORTED},
        {"gemma2", "[\"full_attention\", 1]", "element 1 of 'layer_types' is 'no text'", KVQ_ERR_UNSUPPORTED},
        {"gemma2", "{\"a\": \"full_attention\", \"b\": \"full_attention\"}", "no list of 2", KVQ_ERR_INPUT},
        {"qwen2", "[\"full_attention\", \"sliding_attention\"]", "no sliding_window is in use", KVQ_ERR_INPUT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char             text[1024];
        kvq_model_config c = {0};
        kvq_error        err = {0};
        (void)snprintf(text, sizeof text,
                       "{\"model_type\": \"%s\", \"num_hidden_layers\": 2, \"hidden_size\": 256,"
                       "\"intermediate_size\": 96, \"num_attention_heads\": 32, \"vocab_size\": 100,"
                       "\"max_position_embeddings\": 512, \"layer_types\": %s}",
                       cases[i].type, cases[i].types);
        kvq_test_failed(read_text(text, &c, &err), cases[i].status, &err, cases[i].fragment);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(missing_fields_mean_what_the_class_says, N_DEFAULTS),
    KVQ_CASE(null_derives_heads),
    KVQ_CASE(numbers_reach_the_model),
    KVQ_LOOP(layers_slide_as_the_config_says, N_WINDOWS),
    KVQ_CASE(rotary_settings),
    KVQ_CASE(a_text_config_inside),
    KVQ_LOOP(other_values_are_refused_by_name, N_REFUSED),
    KVQ_CASE(layer_types_are_checked),
};
KVQ_TEST_MAIN("hf_config", CASES)
