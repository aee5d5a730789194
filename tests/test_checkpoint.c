// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints: block formats bit by bit, both containers against the numbers they were made from, and every way in
// which a file can be wrong.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint_test.h"
#include "ggml_types.h"
#include "kvq_make_model.h"

// ---------------------------------------------------------------- block formats

// Eight blocks of bytes from a linear congruential generator, the scales at the named places made finite, expanded and
// hashed. The digests were computed with gguf-py 0.17 (gguf.quants.dequantize), an implementation we have no part in.
static const struct {
    const char *name;
    uint32_t    number;
    int         scales[2];
    const char *sha256;
} BLOCKS[] = {
    {"Q4_0", 2, {0, 0}, "3bdc3543558c4cf5bc93ee6b8cdafeff530609e360531b284f0e9cd95cecc29b"},
    {"Q4_1", 3, {0, 2}, "abb9c4057c17dfe18ca84cfae41fa17c863eda6eb99dcbd8bf8740c218c925bb"},
    {"Q5_0", 6, {0, 0}, "eca66fd39c33fec7c0f68d221599c48cbb1a2735f17a1b99d3d86f394f76afbc"},
    {"Q5_1", 7, {0, 2}, "3dcd5f7c49ce7b69531a69b39d126ba54aa832a83b3ff5bb2f5777fa3f1c89ee"},
    {"Q8_0", 8, {0, 0}, "3570bedb9f3be89d4b59a36acd31a765161ef17c91155207186dd7abed8ed8a0"},
    {"Q2_K", 10, {80, 82}, "73e2f2320ae5c3374f6662264b0461f00f6b1e7a292650531fdc7e3d0b920424"},
    {"Q3_K", 11, {108, 108}, "258063fb8fe9020a9cc755324bdb451559602d4c528073e0584c132ad2eef5b8"},
    {"Q4_K", 12, {0, 2}, "c19bbde7bdc50225d6e98eee852e949389a8a4bb62875aae2659c9864ab9cf1a"},
    {"Q5_K", 13, {0, 2}, "0e8b5a31048cc821fe3afaa5ff42e911d9188ba6361e6561bfbec90ccc61c31d"},
    {"Q6_K", 14, {208, 208}, "749b1e2d0d7fbd63ddd35d063cee4cd18f47fa26b61d92e0223cc4b42f0d56ea"},
};
enum { N_BLOCK_TYPES = sizeof BLOCKS / sizeof *BLOCKS };

START_TEST(blocks_expand_as_an_independent_implementation_does) {
    const ggml_type *type = ggml_type_find(BLOCKS[_i].number);
    uint8_t          raw[8 * 256];
    float            values[8 * 256];
    char             hex[KVQ_SHA256_HEX];
    uint32_t         x = BLOCKS[_i].number;
    ck_assert_ptr_nonnull(type);
    ck_assert_str_eq(type->name, BLOCKS[_i].name);
    for (int i = 0; i < 8 * type->bytes; i++) {
        x = x * 1664525u + 1013904223u;
        raw[i] = (uint8_t)(x >> 24);
    }
    for (int i = 0; i < 16; i++) {
        uint8_t *high = &raw[i / 2 * type->bytes + BLOCKS[_i].scales[i % 2] + 1];
        *high = (uint8_t)((*high & 0x8fu) | 0x20u);
    }
    type->expand(raw, 8, values);
    kvq_test_ok(kvq_sha256_of(values, (size_t)(8 * type->values) * sizeof *values, hex, NULL), NULL);
    ck_assert_str_eq(hex, BLOCKS[_i].sha256);
}
END_TEST

// By hand: d = 0.5 (0x3800), m = -1 (0xbc00), byte j = 0x80 + j in the first half.
START_TEST(small_blocks_by_hand) {
    uint8_t q4_0[18] = {0x00, 0x38}, q4_1[20] = {0x00, 0x38, 0x00, 0xbc}, q8_0[34] = {0x00, 0x38, 0x80, 0x7f};
    float   x[32];
    for (int j = 0; j < 16; j++) q4_0[2 + j] = q4_1[4 + j] = (uint8_t)(0x80 + j);
    ggml_type_find(2)->expand(q4_0, 1, x);
    ck_assert(x[0] == -4 && x[15] == 3.5f && x[16] == 0 && x[31] == 0);
    ggml_type_find(3)->expand(q4_1, 1, x);
    ck_assert(x[0] == -1 && x[15] == 6.5f && x[16] == 3 && x[31] == 3);
    ggml_type_find(8)->expand(q8_0, 1, x);
    ck_assert(x[0] == -64 && x[1] == 63.5f && x[2] == 0);
    ck_assert_ptr_null(ggml_type_find(16));
    ck_assert_str_eq(ggml_type_name(16), "IQ2_XXS");
    ck_assert_str_eq(ggml_type_name(4000000000u), "unknown");
}
END_TEST

// ---------------------------------------------------------------- good checkpoints

typedef struct shape {
    const char *name;
    int64_t     rows, columns;
} shape;

// Every tensor of the default test model with biases.
static const shape SHAPES[] = {
    {"model.embed_tokens.weight", 288, 64},
    {"model.norm.weight", 1, 64},
    {"lm_head.weight", 288, 64},
    {"model.layers.1.input_layernorm.weight", 1, 64},
    {"model.layers.1.post_attention_layernorm.weight", 1, 64},
    {"model.layers.0.self_attn.q_proj.weight", 64, 64},
    {"model.layers.1.self_attn.q_proj.weight", 64, 64},
    {"model.layers.1.self_attn.k_proj.weight", 32, 64},
    {"model.layers.1.self_attn.v_proj.weight", 32, 64},
    {"model.layers.1.self_attn.o_proj.weight", 64, 64},
    {"model.layers.1.self_attn.q_proj.bias", 1, 64},
    {"model.layers.1.self_attn.k_proj.bias", 1, 32},
    {"model.layers.1.self_attn.v_proj.bias", 1, 32},
    {"model.layers.1.self_attn.o_proj.bias", 1, 64},
    {"model.layers.1.mlp.gate_proj.weight", 96, 64},
    {"model.layers.1.mlp.up_proj.weight", 96, 64},
    {"model.layers.1.mlp.down_proj.weight", 64, 96},
    {"model.layers.1.mlp.gate_proj.bias", 1, 96},
    {"model.layers.1.mlp.up_proj.bias", 1, 96},
    {"model.layers.1.mlp.down_proj.bias", 1, 64},
};
enum { N_SHAPES = sizeof SHAPES / sizeof *SHAPES, MAX_ELEMENTS = 288 * 64 };

static kvq_make_options with_biases(void) {
    kvq_make_options o = kvq_make_options_default();
    o.attention_bias = o.mlp_bias = true;
    return o;
}

static const float *read_tensor(const kvq_checkpoint *c, const shape *s) {
    static float x[MAX_ELEMENTS];
    kvq_error    err = {0};
    kvq_test_ok(kvq_checkpoint_read(c, s->name, s->rows, s->columns, 0, s->rows, x, &err), &err);
    return x;
}

// The checkpoint holds what it was made from, up to `relative` of each value or `absolute` (both 0: the same bits).
static void assert_weights(const kvq_checkpoint *c, const kvq_make_options *o, float relative, float absolute) {
    for (int i = 0; i < N_SHAPES; i++) {
        const float *x = read_tensor(c, &SHAPES[i]);
        for (int64_t e = 0; e < SHAPES[i].rows * SHAPES[i].columns; e += 7) {
            float made = kvq_make_weight(o, SHAPES[i].name, e / SHAPES[i].columns, e % SHAPES[i].columns);
            ck_assert_msg(fabsf(x[e] - made) <= fmaxf(relative * fabsf(made), absolute),
                          "%s element %lld: %g instead of %g", SHAPES[i].name, (long long)e, (double)x[e],
                          (double)made);
        }
    }
}

// F16 keeps 11 bits and BF16 8, so rounding to nearest moves a value by at most 2^-11 or 2^-8 of it; F16 values below
// the normal range lie 2^-24 apart and move by at most half of that.
START_TEST(safetensors_give_the_stored_values) {
    static const struct {
        const char *dtype;
        float       relative, absolute;
    } types[] = {{"F32", 0, 0}, {"F16", 0x1p-11f, 0x1p-25f}, {"BF16", 0x1p-8f, 0}};
    kvq_make_options o = with_biases();
    o.dtype = types[_i].dtype;
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_checkpoint *c = open_good(in_folder("m"));
    assert_weights(c, &o, types[_i].relative, types[_i].absolute);
    ck_assert(kvq_checkpoint_has(c, "lm_head.weight"));
    ck_assert(!kvq_checkpoint_has(c, "lm_head.bias"));
    close_it(c);
}
END_TEST

START_TEST(gguf_rows_come_in_hugging_face_order) {
    kvq_make_options o = with_biases();
    kvq_make_model_gguf(&o, in_folder("m.gguf"));
    kvq_checkpoint *c = open_good(in_folder("m.gguf"));
    assert_weights(c, &o, 0, 0);
    close_it(c);
}
END_TEST

// Quantised matrices: the error of a block is at most half a step (a whole one for the end of Q4_0's lopsided range),
// plus what rounding the scale to F16 moves the largest code: 2^-11 of a value. Vectors stay exact.
START_TEST(quantised_gguf_is_close) {
    static const struct {
        const char *type;
        float       steps; // largest error as a part of the block's largest magnitude
    } types[] = {{"Q8_0", 0.5f / 127 + 0x1p-10f},
                 {"Q4_0", 1.0f / 8 + 0x1p-10f},
                 {"Q4_1", 1.0f / 15 + 0x1p-9f},
                 {"F16", 0x1p-10f},
                 {"BF16", 0x1p-8f}};
    kvq_make_options o = with_biases();
    o.gguf_type = types[_i].type;
    kvq_make_model_gguf(&o, in_folder("m.gguf"));
    kvq_checkpoint *c = open_good(in_folder("m.gguf"));
    for (int i = 0; i < N_SHAPES; i++) {
        const float *x = read_tensor(c, &SHAPES[i]);
        for (int64_t e = 0; e < SHAPES[i].rows * SHAPES[i].columns; e += 32) {
            float made[32], largest = 0, worst = 0;
            for (int j = 0; j < 32; j++) {
                made[j] = kvq_make_weight(&o, SHAPES[i].name, (e + j) / SHAPES[i].columns, (e + j) % SHAPES[i].columns);
                largest = fmaxf(largest, fabsf(made[j]));
                worst = fmaxf(worst, fabsf(made[j] - x[e + j]));
            }
            float allowed = SHAPES[i].rows == 1 ? 0 : types[_i].steps * largest;
            ck_assert_msg(worst <= allowed, "%s %s at %lld: %g > %g", types[_i].type, SHAPES[i].name, (long long)e,
                          (double)worst, (double)allowed);
        }
        if (i == 5) i = N_SHAPES - 4; // one matrix of each width is enough
    }
    kvq_checkpoint_identity id;
    kvq_context             ctx = kvq_test_context();
    kvq_error               err = {0};
    kvq_test_ok(kvq_checkpoint_identify(&ctx, c, &id, &err), &err);
    ck_assert_str_eq(id.dtype, types[_i].type);
    close_it(c);
}
END_TEST

START_TEST(any_block_of_rows_is_a_part_of_the_whole) {
    kvq_make_options o = kvq_make_options_default();
    kvq_error        err = {0};
    float            part[64 * 64];
    kvq_make_model_gguf(&o, in_folder("m.gguf"));
    kvq_checkpoint *c = open_good(in_folder("m.gguf"));
    const shape    *s = &SHAPES[6];
    const float    *whole = read_tensor(c, s);
    for (int64_t row = 0; row <= s->rows; row += 5) {
        int64_t n = s->rows - row < 9 ? s->rows - row : 9;
        kvq_test_ok(kvq_checkpoint_read(c, s->name, s->rows, s->columns, row, n, part, &err), &err);
        ck_assert_mem_eq(part, whole + row * s->columns, (size_t)(n * s->columns) * sizeof *part);
    }
    kvq_test_failed(kvq_checkpoint_read(c, s->name, s->rows, s->columns, 60, 5, part, &err), KVQ_ERR_INTERNAL, &err,
                    "60 + 5");
    kvq_test_failed(kvq_checkpoint_read(c, s->name, 32, 128, 0, 1, part, &err), KVQ_ERR_INTERNAL, &err, "[32, 128]");
    kvq_test_failed(kvq_checkpoint_read(c, s->name, s->rows, s->columns, -1, 1, part, &err), KVQ_ERR_INTERNAL, &err,
                    "-1");
    kvq_test_failed(kvq_checkpoint_read(c, "nothing", 1, 1, 0, 1, part, &err), KVQ_ERR_INPUT, &err, "nothing");
    close_it(c);
}
END_TEST

// What identifies weights is their content: not the threads that hash, nor how they are cut into files; but one bit
// counts.
START_TEST(identity_is_of_the_content) {
    kvq_context             one = kvq_test_context(), two = kvq_test_context();
    kvq_error               err = {0};
    kvq_make_options        o = kvq_make_options_default();
    kvq_checkpoint_identity a, b;
    one.n_threads = 1;
    kvq_make_model_hf(&o, in_folder("single"));
    o.n_shards = 3;
    kvq_make_model_hf(&o, in_folder("shards"));
    kvq_checkpoint *c = open_good(in_folder("single")), *d = open_good(in_folder("shards//"));
    kvq_test_ok(kvq_checkpoint_identify(&one, c, &a, &err), &err);
    kvq_test_ok(kvq_checkpoint_identify(&two, d, &b, &err), &err);
    ck_assert_str_eq(a.weights_sha256, b.weights_sha256);
    ck_assert_str_eq(a.config_sha256, b.config_sha256);
    ck_assert_str_eq(a.dtype, "F32");
    ck_assert_str_eq(a.name, "single");
    ck_assert_str_eq(b.name, "shards");
    ck_assert_int_eq(a.n_tensors, 21);
    ck_assert_int_eq(a.weight_bytes, 4 * (2 * 288 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)));
    close_it(d);
    size_t n = 0;
    char  *bytes = read_bytes(in_folder("single/model.safetensors"), &n);
    bytes[n - 4] ^= 1;
    close_it(c);
    write_bytes(in_folder("single/model.safetensors"), bytes, n);
    free(bytes);
    c = open_good(in_folder("single"));
    kvq_test_ok(kvq_checkpoint_identify(&two, c, &b, &err), &err);
    ck_assert_str_ne(a.weights_sha256, b.weights_sha256);
    close_it(c);
}
END_TEST

START_TEST(config_reaches_the_model) {
    kvq_make_options o = kvq_make_options_default();
    o.tied_head = true;
    o.extra_config =
        "{\"rms_norm_eps\": 1e-6, \"rope_theta\": 500000, \"eos_token_id\": [7, 8], \"bos_token_id\": null}";
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_checkpoint         *c = open_good(in_folder("m"));
    const kvq_model_config *m = kvq_checkpoint_config(c);
    ck_assert_str_eq(m->architecture, "llama");
    ck_assert(m->n_layers == 2 && m->hidden_size == 64 && m->intermediate_size == 96 && m->vocab_size == 288);
    ck_assert(m->n_heads == 4 && m->n_kv_heads == 2 && m->head_dim == 16 && m->max_positions == 512);
    ck_assert(m->rms_norm_eps == 1e-6f && m->rope.theta == 500000 && m->rope.n_dims == 16);
    ck_assert(m->rope.type == KVQ_ROPE_DEFAULT && m->rope.frequency_divisors == NULL);
    ck_assert(m->tied_head && !m->qkv_bias && !m->o_bias && !m->mlp_bias);
    ck_assert(m->eos_id == 7 && m->bos_id == -1);
    ck_assert(!kvq_checkpoint_has(c, "lm_head.weight"));
    close_it(c);
}
END_TEST

// Forms of the same settings: absent and null head_dim and key/value heads, transformers 5's rope_parameters.
START_TEST(other_spellings_of_a_config) {
    kvq_make_options o = kvq_make_options_default();
    o.n_kv_heads = o.n_heads;
    o.extra_config = "{\"head_dim\": null, \"num_key_value_heads\": null, \"rope_theta\": null, \"rope_scaling\": null,"
                     "\"rope_parameters\": {\"rope_type\": \"llama3\", \"rope_theta\": 20000.0, \"factor\": 8, "
                     "\"low_freq_factor\": 1,"
                     "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 64}, \"sliding_window\": null,"
                     "\"layer_types\": [\"full_attention\", \"full_attention\"], \"something_new\": 1}";
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_checkpoint         *c = open_good(in_folder("m"));
    const kvq_model_config *m = kvq_checkpoint_config(c);
    ck_assert(m->head_dim == 16 && m->n_kv_heads == 4 && m->rope.theta == 20000);
    ck_assert(m->rope.type == KVQ_ROPE_LLAMA3 && m->rope.factor == 8 && m->rope.original_max_positions == 64);
    ck_assert(m->rope.low_freq_factor == 1 && m->rope.high_freq_factor == 4);
    close_it(c);
}
END_TEST

static void keep_warning(void *user, kvq_log_level level, const char *text) {
    if (level == KVQ_LOG_WARNING) (void)snprintf(user, 256, "%s", text);
}

START_TEST(an_unknown_field_is_reported) {
    char             warning[256] = "";
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_checkpoint  *c = NULL;
    kvq_make_options o = kvq_make_options_default();
    ctx.log = keep_warning;
    ctx.user = warning;
    o.extra_config = "{\"something_new\": 1}";
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_test_ok(kvq_checkpoint_open(&ctx, in_folder("m"), &c, &err), &err);
    ck_assert_ptr_nonnull(strstr(warning, "something_new"));
    kvq_checkpoint_close(&ctx, &c);
}
END_TEST

static const char LLAMA3_ROPE[] =
    "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
    "\"original_max_position_embeddings\": 64}";
static const char YARN_ROPE[] = "{\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 128}";
static const char LINEAR_ROPE[] = "{\"rope_type\": \"linear\", \"factor\": 4.0}";

// Both containers describe the same rotation. llama3 becomes divisors in a GGUF: the slowest frequency is divided by
// the whole factor, the fastest by one.
START_TEST(rope_settings_agree_between_containers) {
    static const char *const settings[] = {LINEAR_ROPE, YARN_ROPE, LLAMA3_ROPE}, *const names[] = {"linear", "yarn",
                                                                                                   "llama3"};
    kvq_make_options o = kvq_make_options_default();
    o.rope_scaling = settings[_i];
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_make_model_gguf(&o, in_folder("m.gguf"));
    kvq_checkpoint         *c = open_good(in_folder("m")), *g = open_good(in_folder("m.gguf"));
    const kvq_model_config *a = kvq_checkpoint_config(c), *b = kvq_checkpoint_config(g);
    ck_assert_str_eq(kvq_rope_type_name(a->rope.type), names[_i]);
    if (_i < 2) {
        ck_assert_int_eq(a->rope.type, b->rope.type);
        ck_assert(a->rope.factor == 4 && b->rope.factor == 4);
        ck_assert_int_eq(a->rope.original_max_positions, b->rope.original_max_positions);
        ck_assert(a->rope.beta_fast == b->rope.beta_fast && a->rope.beta_slow == b->rope.beta_slow);
        ck_assert(a->rope.attention_factor == 0 && b->rope.attention_factor == 0);
    } else {
        ck_assert_int_eq(b->rope.type, KVQ_ROPE_DEFAULT);
        ck_assert_ptr_nonnull(b->rope.frequency_divisors);
        ck_assert(b->rope.frequency_divisors[0] == 1 && b->rope.frequency_divisors[7] == 8);
        ck_assert(kvq_checkpoint_has(g, "rope_freqs.weight")); // so that it enters the identity
    }
    ck_assert(a->rms_norm_eps == b->rms_norm_eps && a->bos_id == b->bos_id && a->eos_id == b->eos_id);
    close_it(c);
    close_it(g);
}
END_TEST

// The output matrix of a tied model may be stored; the embedding wins, and the file's copy is not part of the identity.
START_TEST(tied_wins_over_a_stored_head) {
    kvq_make_options o = kvq_make_options_default();
    o.extra_config = "{\"tie_word_embeddings\": true}";
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_checkpoint *c = open_good(in_folder("m"));
    ck_assert(kvq_checkpoint_config(c)->tied_head && !kvq_checkpoint_has(c, "lm_head.weight"));
    close_it(c);
}
END_TEST

// ---------------------------------------------------------------- configs that are refused

START_TEST(config_is_refused_by_name) {
    static const struct {
        const char *extra;
        kvq_status  status;
        const char *fragment;
    } cases[] = {
        {"{\"model_type\": \"gpt2\"}", KVQ_ERR_UNSUPPORTED, "'gpt2' is not supported; kvq knows: llama"},
        {"{\"model_type\": null}", KVQ_ERR_INPUT, "'model_type' is missing"},
        {"{\"hidden_act\": \"gelu\"}", KVQ_ERR_UNSUPPORTED, "'hidden_act' is \"gelu\""},
        {"{\"sliding_window\": 128}", KVQ_ERR_UNSUPPORTED, "'sliding_window' is 128"},
        {"{\"quantization_config\": {\"bits\": 4}}", KVQ_ERR_UNSUPPORTED, "quantization_config"},
        {"{\"partial_rotary_factor\": 0.5}", KVQ_ERR_UNSUPPORTED, "partial_rotary_factor"},
        {"{\"attn_logit_softcapping\": 50.0}", KVQ_ERR_UNSUPPORTED, "attn_logit_softcapping"},
        {"{\"num_local_experts\": 8}", KVQ_ERR_UNSUPPORTED, "num_local_experts"},
        {"{\"rope_interleaved\": true}", KVQ_ERR_UNSUPPORTED, "rope_interleaved"},
        {"{\"layer_types\": [\"full_attention\", \"sliding_attention\"]}", KVQ_ERR_UNSUPPORTED, "sliding_attention"},
        {"{\"architectures\": [\"LlamaForSequenceClassification\"]}", KVQ_ERR_UNSUPPORTED, "architectures"},
        {"{\"rope_scaling\": {\"rope_type\": \"longrope\"}}", KVQ_ERR_UNSUPPORTED, "'longrope'"},
        {"{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}}", KVQ_ERR_UNSUPPORTED, "'dynamic'"},
        {"{\"rope_scaling\": {\"type\": \"linear\"}}", KVQ_ERR_INPUT, "'factor' is missing"},
        {"{\"rope_scaling\": {\"type\": \"linear\", \"factor\": -1}}", KVQ_ERR_INPUT, "factor -1"},
        {"{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2, \"mscale\": 1}}", KVQ_ERR_UNSUPPORTED, "'mscale'"},
        {"{\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 2, \"low_freq_factor\": 4, \"high_freq_factor\": 4,"
         "\"original_max_position_embeddings\": 64}}",
         KVQ_ERR_INPUT, "low_freq_factor 4"},
        {"{\"rope_scaling\": 3}", KVQ_ERR_INPUT, "rope_scaling"},
        {"{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}, \"rope_parameters\": {\"rope_type\": \"default\"}}",
         KVQ_ERR_INPUT, "both"},
        {"{\"rope_theta\": 1}", KVQ_ERR_INPUT, "rotary base 1"},
        {"{\"rms_norm_eps\": 0}", KVQ_ERR_INPUT, "epsilon 0"},
        {"{\"num_hidden_layers\": 0}", KVQ_ERR_INPUT, "'num_hidden_layers' is 0"},
        {"{\"num_hidden_layers\": 1.5}", KVQ_ERR_INPUT, "'num_hidden_layers' is 1.5"},
        {"{\"num_attention_heads\": \"4\"}", KVQ_ERR_INPUT, "'num_attention_heads' is not an integer"},
        {"{\"num_key_value_heads\": 3}", KVQ_ERR_INPUT, "not a multiple of 3"},
        {"{\"head_dim\": 15}", KVQ_ERR_INPUT, "15 is odd"},
        {"{\"vocab_size\": null}", KVQ_ERR_INPUT, "'vocab_size' is missing"},
        {"{\"hidden_size\": 1e300}", KVQ_ERR_INPUT, "hidden_size"},
        {"{\"eos_token_id\": 288}", KVQ_ERR_INPUT, "eos 288"},
        {"{\"eos_token_id\": []}", KVQ_ERR_INPUT, "eos_token_id"},
        {"{\"tie_word_embeddings\": 1}", KVQ_ERR_INPUT, "'tie_word_embeddings'"},
        {"{\"num_hidden_layers\": 3}", KVQ_ERR_INPUT, "'model.layers.2.input_layernorm.weight' is missing"},
        {"{\"num_hidden_layers\": 1}", KVQ_ERR_UNSUPPORTED, "'model.layers.1.input_layernorm.weight' does not belong"},
        {"{\"hidden_size\": 32, \"head_dim\": 16}", KVQ_ERR_INPUT, "has shape [288, 64], the config of"},
        {"{\"attention_bias\": true}", KVQ_ERR_INPUT,
         "'model.layers.0.self_attn.q_proj.bias' is missing (attention_bias is true)"},
    };
    kvq_make_options o = kvq_make_options_default();
    const char      *path = in_folder("m");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        o.extra_config = cases[i].extra;
        kvq_make_model_hf(&o, path);
        refused(path, cases[i].status, cases[i].fragment);
    }
}
END_TEST

START_TEST(biases_and_heads_must_be_declared) {
    kvq_make_options o = with_biases();
    const char      *path = in_folder("m");
    o.extra_config = "{\"attention_bias\": false}";
    kvq_make_model_hf(&o, path);
    refused(path, KVQ_ERR_UNSUPPORTED, "self_attn.k_proj.bias' does not belong");
    o = kvq_make_options_default();
    o.tied_head = true;
    o.extra_config = "{\"tie_word_embeddings\": false}";
    kvq_make_model_hf(&o, path);
    refused(path, KVQ_ERR_INPUT, "'lm_head.weight' is missing (tie_word_embeddings is not true)");
}
END_TEST

START_TEST(a_weight_that_is_not_finite_is_found) {
    static const char *const names[] = {"model.layers.1.self_attn.k_proj.weight",
                                        "model.layers.1.self_attn.q_proj.bias"};
    static float             x[MAX_ELEMENTS];
    kvq_make_options         o = with_biases();
    kvq_error                err = {0};
    o.not_finite = names[_i];
    const int64_t rows = _i == 0 ? 32 : 1;
    kvq_make_model_hf(&o, in_folder("m"));
    kvq_make_model_gguf(&o, in_folder("m.gguf"));
    for (int form = 0; form < 2; form++) {
        kvq_checkpoint *c = open_good(in_folder(form == 0 ? "m" : "m.gguf"));
        kvq_test_failed(kvq_checkpoint_read(c, names[_i], rows, 64, 0, rows, x, &err), KVQ_ERR_NUMERICAL, &err,
                        names[_i]);
        ck_assert_ptr_nonnull(strstr(err.message, _i == 0 ? "row 1, column 2" : "row 0, column 2"));
        close_it(c);
    }
}
END_TEST

// ---------------------------------------------------------------- paths

START_TEST(paths_that_are_no_checkpoint) {
    char            folder[256];
    kvq_error       err = {0};
    kvq_context     ctx = kvq_test_context();
    kvq_checkpoint *c = NULL;
    (void)snprintf(folder, sizeof folder, "%s/m", kvq_test_folder());
    refused(in_folder("none"), KVQ_ERR_NOT_FOUND, "none");
    kvq_test_failed(kvq_checkpoint_open(&ctx, "no-such-org/no-such-model", &c, &err), KVQ_ERR_NOT_FOUND, &err,
                    "no-such-model");
    ck_assert_ptr_nonnull(strstr(err.next, "hf download no-such-org/no-such-model --local-dir DIR"));
    ck_assert_int_eq(mkdir(folder, 0700), 0);
    refused(folder, KVQ_ERR_NOT_FOUND, "no config.json");
    write_bytes(in_folder("m/a.gguf"), "GGUF", 4);
    refused(folder, KVQ_ERR_NOT_FOUND, "m/a.gguf");
    ck_assert_int_eq(unlink(in_folder("m/a.gguf")), 0);
    write_bytes(in_folder("file"), "hello", 5);
    refused(in_folder("file"), KVQ_ERR_INPUT, "neither a directory nor a GGUF");
    kvq_make_options o = kvq_make_options_default();
    kvq_make_model_hf(&o, folder);
    ck_assert_int_eq(rename(in_folder("m/model.safetensors"), in_folder("m/pytorch_model.bin")), 0);
    refused(folder, KVQ_ERR_UNSUPPORTED, "pickles");
    ck_assert_int_eq(unlink(in_folder("m/pytorch_model.bin")), 0);
    refused(folder, KVQ_ERR_NOT_FOUND, "no model.safetensors");
    write_bytes(in_folder("m/config.json"), "{", 1);
    refused(folder, KVQ_ERR_INTEGRITY, "config.json: not JSON");
    write_bytes(in_folder("m/config.json"), "[]", 2);
    refused(folder, KVQ_ERR_INPUT, "config.json: is not a JSON object");
}
END_TEST

// As the hub's cache stores them: names are links to blobs.
START_TEST(links_are_followed) {
    kvq_make_options o = kvq_make_options_default();
    kvq_make_model_hf(&o, in_folder("blobs"));
    ck_assert_int_eq(mkdir(in_folder("m"), 0700), 0);
    ck_assert_int_eq(symlink("../blobs/config.json", in_folder("m/config.json")), 0);
    ck_assert_int_eq(symlink("../blobs/model.safetensors", in_folder("m/model.safetensors")), 0);
    close_it(open_good(in_folder("m")));
}
END_TEST

// ---------------------------------------------------------------- faults

typedef struct rationed { // an allocator that fails at one call, and counts what is not given back
    int calls, fail_at, live;
} rationed;

static void *rationed_alloc(void *user, size_t bytes) {
    rationed *r = user;
    if (++r->calls == r->fail_at) return NULL;
    r->live++;
    return aligned_alloc(64, bytes);
}

static void rationed_release(void *user, void *p) {
    if (p == NULL) return;
    ((rationed *)user)->live--;
    free(p);
}

START_TEST(every_failing_allocation_is_an_error_without_leaks) {
    kvq_make_options o = kvq_make_options_default();
    const char      *path = in_folder(_i == 0 ? "m" : "m.gguf");
    o.n_shards = 2;
    if (_i == 0)
        kvq_make_model_hf(&o, path);
    else
        kvq_make_model_gguf(&o, path);
    kvq_status status = KVQ_ERR_MEMORY;
    for (int fail_at = 1; status != KVQ_OK; fail_at++) {
        rationed                r = {0, fail_at, 0};
        kvq_context             ctx = kvq_test_context();
        kvq_error               err = {0};
        kvq_checkpoint         *c = NULL;
        kvq_checkpoint_identity id;
        ctx.alloc = rationed_alloc;
        ctx.release = rationed_release;
        ctx.user = &r;
        status = kvq_checkpoint_open(&ctx, path, &c, &err);
        if (status == KVQ_OK) status = kvq_checkpoint_identify(&ctx, c, &id, &err);
        if (status != KVQ_OK) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "could not allocate");
        kvq_checkpoint_close(&ctx, &c);
        ck_assert_int_eq(r.live, 0);
        ck_assert_int_lt(fail_at, 100);
    }
}
END_TEST

// ---------------------------------------------------------------- checkpoints made by a framework

START_TEST(framework_checkpoints_open) {
    static const struct {
        const char   *name, *dtype;
        int           n_kv_heads, head_dim;
        bool          tied, bias;
        kvq_rope_type rope;
    } cases[] = {
        {"llama_mha", "F32", 4, 16, false, false, KVQ_ROPE_DEFAULT},
        {"llama_gqa_llama3", "F32", 2, 16, false, false, KVQ_ROPE_LLAMA3},
        {"llama_linear", "F32", 2, 16, true, false, KVQ_ROPE_LINEAR},
        {"llama_yarn", "F32", 2, 16, true, false, KVQ_ROPE_YARN},
        {"llama_bias", "F32", 2, 16, false, true, KVQ_ROPE_DEFAULT},
        {"llama_sharded", "F32", 4, 16, false, false, KVQ_ROPE_DEFAULT},
        {"llama_bf16", "BF16", 2, 24, false, false, KVQ_ROPE_DEFAULT},
    };
    kvq_context ctx = kvq_test_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char                    name[64], path[512];
        kvq_error               err = {0};
        kvq_checkpoint_identity id;
        float                   x[64];
        (void)snprintf(name, sizeof name, "goldens/tiny/%s", cases[i].name);
        kvq_test_shared_path(path, sizeof path, name);
        kvq_checkpoint         *c = open_good(path);
        const kvq_model_config *m = kvq_checkpoint_config(c);
        ck_assert(m->n_kv_heads == cases[i].n_kv_heads && m->head_dim == cases[i].head_dim &&
                  m->tied_head == cases[i].tied);
        ck_assert(m->qkv_bias == cases[i].bias && m->o_bias == cases[i].bias && m->mlp_bias == cases[i].bias);
        ck_assert_int_eq(m->rope.type, cases[i].rope);
        kvq_test_ok(kvq_checkpoint_identify(&ctx, c, &id, &err), &err);
        ck_assert_str_eq(id.dtype, cases[i].dtype);
        ck_assert_str_eq(id.name, cases[i].name);
        kvq_test_ok(kvq_checkpoint_read(c, "model.norm.weight", 1, 64, 0, 1, x, &err), &err);
        close_it(c);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(blocks_expand_as_an_independent_implementation_does, N_BLOCK_TYPES),
    KVQ_CASE(small_blocks_by_hand),
    KVQ_LOOP(safetensors_give_the_stored_values, 3),
    KVQ_CASE(gguf_rows_come_in_hugging_face_order),
    KVQ_LOOP(quantised_gguf_is_close, 5),
    KVQ_CASE(any_block_of_rows_is_a_part_of_the_whole),
    KVQ_CASE(identity_is_of_the_content),
    KVQ_CASE(config_reaches_the_model),
    KVQ_CASE(other_spellings_of_a_config),
    KVQ_CASE(an_unknown_field_is_reported),
    KVQ_LOOP(rope_settings_agree_between_containers, 3),
    KVQ_CASE(tied_wins_over_a_stored_head),
    KVQ_CASE(config_is_refused_by_name),
    KVQ_CASE(biases_and_heads_must_be_declared),
    KVQ_LOOP(a_weight_that_is_not_finite_is_found, 2),
    KVQ_CASE(paths_that_are_no_checkpoint),
    KVQ_CASE(links_are_followed),
    KVQ_LOOP(every_failing_allocation_is_an_error_without_leaks, 2),
    KVQ_GOLDEN_CASE(framework_checkpoints_open),
};
KVQ_TEST_MAIN("checkpoint", CASES)
