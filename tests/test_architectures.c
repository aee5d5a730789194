// SPDX-License-Identifier: Apache-2.0
//
// The tensors of each architecture: small files with the names that frameworks store, read back by canonical names;
// what is refused when names, rows or experts are others; and pages that are given back.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint_test.h"

// ---------------------------------------------------------------- small files

// Stored tensors as "name rows columns", a vector with 0 rows. "N" between dots is the layer, "E" the expert.
// Two layers, two heads of width 4 on one, 3 experts.
enum { N_LAYERS = 2, N_EXPERTS = 3, HIDDEN = 6, FFN = 10, VOCAB = 12, MAX_LINES = 24, MAX_TENSORS = 128 };

#define SIZES                                                                                                          \
    "\"num_hidden_layers\": 2, \"hidden_size\": 6, \"intermediate_size\": 10, \"num_attention_heads\": 2,"             \
    "\"num_key_value_heads\": 1, \"head_dim\": 4, \"vocab_size\": 12, \"max_position_embeddings\": 64"

#define OUTER "model.embed_tokens.weight 12 6", "model.norm.weight 0 6"
#define NORMS "model.layers.N.input_layernorm.weight 0 6", "model.layers.N.post_attention_layernorm.weight 0 6"
#define GEMMA_NORMS                                                                                                    \
    "model.layers.N.input_layernorm.weight 0 6", "model.layers.N.post_attention_layernorm.weight 0 6",                 \
        "model.layers.N.pre_feedforward_layernorm.weight 0 6", "model.layers.N.post_feedforward_layernorm.weight 0 6"
#define QKVO                                                                                                           \
    "model.layers.N.self_attn.q_proj.weight 8 6", "model.layers.N.self_attn.k_proj.weight 4 6",                        \
        "model.layers.N.self_attn.v_proj.weight 4 6", "model.layers.N.self_attn.o_proj.weight 6 8"
#define QKV_BIAS                                                                                                       \
    "model.layers.N.self_attn.q_proj.bias 0 8", "model.layers.N.self_attn.k_proj.bias 0 4",                            \
        "model.layers.N.self_attn.v_proj.bias 0 4"
#define QK_NORM "model.layers.N.self_attn.q_norm.weight 0 4", "model.layers.N.self_attn.k_norm.weight 0 4"
#define MLP                                                                                                            \
    "model.layers.N.mlp.gate_proj.weight 10 6", "model.layers.N.mlp.up_proj.weight 10 6",                              \
        "model.layers.N.mlp.down_proj.weight 6 10"
#define HEAD "lm_head.weight 12 6"

typedef struct model_file {
    const char *model_type, *extra; // members of config.json beside SIZES
    const char *prefix;             // in front of all names
    const char *lines[MAX_LINES];
} model_file;

enum { MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3_TEXT, GEMMA3, MIXTRAL, QWEN3_MOE, N_FILES };
static const model_file FILES[N_FILES] = {
    [MISTRAL] = {"mistral", SIZES, "", {OUTER, HEAD, NORMS, QKVO, MLP}},
    [QWEN2] = {"qwen2", SIZES, "", {OUTER, HEAD, NORMS, QKVO, QKV_BIAS, MLP}},
    [QWEN3] = {"qwen3",
               SIZES ", \"attention_bias\": true",
               "",
               {OUTER, HEAD, NORMS, QKVO, QKV_BIAS, "model.layers.N.self_attn.o_proj.bias 0 6", QK_NORM, MLP}},
    [PHI3] = {"phi3",
              SIZES,
              "",
              {OUTER, HEAD, NORMS, "model.layers.N.self_attn.qkv_proj.weight 16 6",
               "model.layers.N.self_attn.o_proj.weight 6 8", "model.layers.N.mlp.gate_up_proj.weight 20 6",
               "model.layers.N.mlp.down_proj.weight 6 10"}},
    [GEMMA2] = {"gemma2", SIZES, "", {OUTER, GEMMA_NORMS, QKVO, MLP}},
    [GEMMA3_TEXT] = {"gemma3_text", SIZES, "", {OUTER, GEMMA_NORMS, QKVO, QK_NORM, MLP}},
    [GEMMA3] = {"gemma3", "\"text_config\": {" SIZES "}", "language_model.", {OUTER, GEMMA_NORMS, QKVO, QK_NORM, MLP}},
    [MIXTRAL] = {"mixtral",
                 SIZES ", \"num_local_experts\": 3",
                 "",
                 {OUTER, HEAD, NORMS, QKVO, "model.layers.N.block_sparse_moe.gate.weight 3 6",
                  "model.layers.N.block_sparse_moe.experts.E.w1.weight 10 6",
                  "model.layers.N.block_sparse_moe.experts.E.w2.weight 6 10",
                  "model.layers.N.block_sparse_moe.experts.E.w3.weight 10 6"}},
    [QWEN3_MOE] = {"qwen3_moe",
                   SIZES ", \"num_experts\": 3, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 5",
                   "",
                   {OUTER, HEAD, NORMS, QKVO, QK_NORM, "model.layers.N.mlp.gate.weight 3 6",
                    "model.layers.N.mlp.experts.E.gate_proj.weight 5 6",
                    "model.layers.N.mlp.experts.E.up_proj.weight 5 6",
                    "model.layers.N.mlp.experts.E.down_proj.weight 6 5"}},
};

typedef struct tensor {
    char name[128];
    int  rows, columns; // rows 0: a vector
} tensor;

typedef struct tensor_list {
    tensor tensors[MAX_TENSORS];
    int    n;
} tensor_list;

static int n_elements(const tensor *t) { return (t->rows > 0 ? t->rows : 1) * t->columns; }

// Element i of the stored tensor of this name.
static float element(const char *name, int i) {
    uint32_t h = 2166136261u;
    for (; *name != 0; name++) h = (h ^ (uint8_t)*name) * 16777619u;
    h = (h ^ (uint32_t)i) * 2654435761u;
    return (float)(h >> 8) / 0x1p24f - 0.5f;
}

static void add_line(tensor_list *list, const char *prefix, const char *line, int layer, int expert) {
    char        name[128] = "", *to = name;
    const char *space = strchr(line, ' ');
    tensor     *t = &list->tensors[list->n++];
    ck_assert_int_le(list->n, MAX_TENSORS);
    for (const char *p = line; p < space; p++) {
        bool marked = p > line && p[-1] == '.' && p[1] == '.' && (*p == 'N' || *p == 'E');
        *to++ = marked ? (char)('0' + (*p == 'N' ? layer : expert)) : *p;
    }
    (void)snprintf(t->name, sizeof t->name, "%s%s", prefix, name);
    ck_assert_int_eq(sscanf(space, "%d %d", &t->rows, &t->columns), 2);
}

static tensor_list all_tensors(const model_file *f) {
    tensor_list list = {.n = 0};
    for (int i = 0; i < MAX_LINES && f->lines[i] != NULL; i++) {
        int n_layers = strstr(f->lines[i], ".N.") != NULL ? N_LAYERS : 1;
        int n_experts = strstr(f->lines[i], ".E.") != NULL ? N_EXPERTS : 1;
        for (int layer = 0; layer < n_layers; layer++) {
            for (int expert = 0; expert < n_experts; expert++) add_line(&list, f->prefix, f->lines[i], layer, expert);
        }
    }
    return list;
}

// Returns the bytes of data that the header announces.
static int64_t write_header(FILE *file, const tensor_list *list) {
    static char header[65536];
    size_t      n = 1;
    int64_t     offset = 0;
    header[0] = '{';
    for (int i = 0; i < list->n; i++) {
        const tensor *t = &list->tensors[i];
        int64_t       end = offset + 4 * n_elements(t);
        char          shape[32];
        (void)snprintf(shape, sizeof shape, "%d, %d", t->rows, t->columns);
        n += (size_t)snprintf(header + n, sizeof header - n,
                              "%s\"%s\": {\"dtype\": \"F32\", \"shape\": [%s], \"data_offsets\": [%lld, %lld]}",
                              i > 0 ? ", " : "", t->name, t->rows > 0 ? shape : shape + strlen("0, "),
                              (long long)offset, (long long)end);
        offset = end;
    }
    header[n++] = '}';
    uint64_t length = n;
    ck_assert_uint_eq(fwrite(&length, 8, 1, file) + fwrite(header, n, 1, file), 2);
    return offset;
}

static void write_elements(FILE *file, const tensor *t) {
    for (int e = 0; e < n_elements(t); e++) {
        float x = element(t->name, e);
        ck_assert_uint_eq(fwrite(&x, sizeof x, 1, file), 1);
    }
}

static void write_config(const char *model_type, const char *members) {
    char text[1024];
    (void)mkdir(in_folder("m"), 0700);
    (void)snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s}", model_type, members);
    write_bytes(in_folder("m/config.json"), text, strlen(text));
}

static const char *write_model(const model_file *f, const tensor_list *list, const char *config) {
    write_config(f->model_type, config);
    FILE *file = fopen(in_folder("m/model.safetensors"), "wb");
    ck_assert_ptr_nonnull(file);
    (void)write_header(file, list);
    for (int i = 0; i < list->n; i++) write_elements(file, &list->tensors[i]);
    ck_assert_int_eq(fclose(file), 0);
    return in_folder("m");
}

// ---------------------------------------------------------------- canonical names

// Rows of a canonical tensor are these rows of a stored one.
static void assert_rows(const kvq_checkpoint *c, const char *canonical, int rows, int columns, const char *stored,
                        int first) {
    float     x[VOCAB * FFN];
    kvq_error err = {0};
    kvq_test_ok(kvq_checkpoint_read(c, canonical, rows, columns, 0, rows, x, &err), &err);
    for (int i = 0; i < rows * columns; i++) {
        float expected = element(stored, first * columns + i);
        ck_assert_msg(x[i] == expected, "%s element %d: %g instead of %g", canonical, i, (double)x[i],
                      (double)expected);
    }
}

START_TEST(names_that_are_canonical_are_read_as_they_are) {
    static const int which[] = {MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT, QWEN3_MOE};
    for (size_t k = 0; k < sizeof which / sizeof *which; k++) {
        const model_file *f = &FILES[which[k]];
        tensor_list       list = all_tensors(f);
        kvq_checkpoint   *c = open_good(write_model(f, &list, f->extra));
        for (int i = 0; i < list.n; i++) {
            const tensor *t = &list.tensors[i];
            ck_assert(kvq_checkpoint_has(c, t->name));
            assert_rows(c, t->name, t->rows > 0 ? t->rows : 1, t->columns, t->name, 0);
        }
        close_it(c);
    }
}
END_TEST

START_TEST(fused_matrices_are_ranges_of_rows) {
    tensor_list     list = all_tensors(&FILES[PHI3]);
    kvq_error       err = {0};
    float           row[HIDDEN];
    kvq_checkpoint *c = open_good(write_model(&FILES[PHI3], &list, FILES[PHI3].extra));
    const char *qkv = "model.layers.1.self_attn.qkv_proj.weight", *gate_up = "model.layers.1.mlp.gate_up_proj.weight";
    assert_rows(c, "model.layers.1.self_attn.q_proj.weight", 8, HIDDEN, qkv, 0);
    assert_rows(c, "model.layers.1.self_attn.k_proj.weight", 4, HIDDEN, qkv, 8);
    assert_rows(c, "model.layers.1.self_attn.v_proj.weight", 4, HIDDEN, qkv, 12);
    assert_rows(c, "model.layers.1.mlp.gate_proj.weight", FFN, HIDDEN, gate_up, 0);
    assert_rows(c, "model.layers.1.mlp.up_proj.weight", FFN, HIDDEN, gate_up, FFN);
    ck_assert(!kvq_checkpoint_has(c, qkv) && !kvq_checkpoint_has(c, gate_up));
    kvq_test_ok(kvq_checkpoint_read(c, "model.layers.1.mlp.up_proj.weight", FFN, HIDDEN, 3, 1, row, &err), &err);
    ck_assert(row[2] == element(gate_up, (FFN + 3) * HIDDEN + 2));
    kvq_test_failed(kvq_checkpoint_read(c, "model.layers.1.self_attn.k_proj.weight", 4, HIDDEN, 3, 2, row, &err),
                    KVQ_ERR_INTERNAL, &err, "3 + 2");
    close_it(c);
}
END_TEST

START_TEST(mixtral_experts_have_canonical_names) {
    tensor_list     list = all_tensors(&FILES[MIXTRAL]);
    kvq_checkpoint *c = open_good(write_model(&FILES[MIXTRAL], &list, FILES[MIXTRAL].extra));
    assert_rows(c, "model.layers.1.mlp.gate.weight", 3, HIDDEN, "model.layers.1.block_sparse_moe.gate.weight", 0);
    for (int e = 0; e < N_EXPERTS; e++) {
        static const char *const parts[3][2] = {{"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}};
        for (int p = 0; p < 3; p++) {
            char name[96], stored[96];
            (void)snprintf(name, sizeof name, "model.layers.0.mlp.experts.%d.%s.weight", e, parts[p][0]);
            (void)snprintf(stored, sizeof stored, "model.layers.0.block_sparse_moe.experts.%d.%s.weight", e,
                           parts[p][1]);
            assert_rows(c, name, p < 2 ? FFN : HIDDEN, p < 2 ? HIDDEN : FFN, stored, 0);
        }
    }
    ck_assert(!kvq_checkpoint_has(c, "model.layers.0.mlp.gate_proj.weight"));
    close_it(c);
}
END_TEST

// A checkpoint with pictures: the decoder has a prefix, the other parts are passed over, anything else is not.
START_TEST(the_decoder_of_a_checkpoint_with_pictures) {
    const model_file *f = &FILES[GEMMA3];
    tensor_list       list = all_tensors(f);
    add_line(&list, "", "vision_tower.vision_model.embeddings.weight 3 4", 0, 0);
    add_line(&list, "", "multi_modal_projector.mm_input_projection_weight 2 2", 0, 0);
    add_line(&list, "", "language_model.lm_head.weight 12 6", 0, 0); // tied: the embedding wins
    kvq_checkpoint *c = open_good(write_model(f, &list, f->extra));
    assert_rows(c, "model.embed_tokens.weight", VOCAB, HIDDEN, "language_model.model.embed_tokens.weight", 0);
    assert_rows(c, "model.layers.1.self_attn.k_norm.weight", 1, 4,
                "language_model.model.layers.1.self_attn.k_norm.weight", 0);
    close_it(c);
    add_line(&list, "", "audio_tower.weight 2 2", 0, 0);
    refused(write_model(f, &list, f->extra), KVQ_ERR_UNSUPPORTED, "'audio_tower.weight' does not belong to the gemma3");
}
END_TEST

// Everything that is stored counts once, fused or not.
START_TEST(every_byte_is_bound_once) {
    kvq_context ctx = kvq_test_context();
    for (int i = 0; i < N_FILES; i++) {
        kvq_checkpoint_identity id;
        kvq_error               err = {0};
        int64_t                 bytes = 0;
        tensor_list             list = all_tensors(&FILES[i]);
        kvq_checkpoint         *c = open_good(write_model(&FILES[i], &list, FILES[i].extra));
        for (int k = 0; k < list.n; k++) bytes += 4 * n_elements(&list.tensors[k]);
        kvq_test_ok(kvq_checkpoint_identify(&ctx, c, &id, &err), &err);
        ck_assert_int_eq(id.weight_bytes, bytes);
        ck_assert_int_eq(id.n_tensors, list.n + (i == PHI3 ? N_LAYERS * 3 : 0)); // 5 of 2 fused
        close_it(c);
    }
}
END_TEST

// ---------------------------------------------------------------- what is refused

// A file in which one stored tensor is missing, has another shape (`with` has its name), or is there in addition.
static const struct {
    int         file;
    const char *without, *with;
    kvq_status  status;
    const char *fragment;
} WRONG[] = {
    {MISTRAL, NULL, "model.layers.0.self_attn.q_proj.bias 0 8", KVQ_ERR_UNSUPPORTED,
     "'model.layers.0.self_attn.q_proj.bias' does not belong to the mistral"},
    {MISTRAL, "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight 8 6", KVQ_ERR_INPUT,
     "shape [8, 6], the config of"},
    {QWEN2, "model.layers.1.self_attn.k_proj.bias", NULL, KVQ_ERR_INPUT,
     "'model.layers.1.self_attn.k_proj.bias' is missing (every model of this architecture has it)"},
    {QWEN2, NULL, "model.layers.0.self_attn.o_proj.bias 0 6", KVQ_ERR_UNSUPPORTED, "o_proj.bias' does not belong"},
    {QWEN3, "model.layers.0.self_attn.q_norm.weight", NULL, KVQ_ERR_INPUT, "q_norm.weight' is missing"},
    {QWEN3, "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_norm.weight 0 8", KVQ_ERR_INPUT,
     "shape [8], the config of"},
    {QWEN3, "model.layers.1.self_attn.o_proj.bias", NULL, KVQ_ERR_INPUT, "is missing (attention_bias is true)"},
    {PHI3, "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.qkv_proj.weight 15 6", KVQ_ERR_INPUT,
     "qkv_proj.weight' has shape [15, 6], the config of"},
    {PHI3, "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.qkv_proj.weight 24 6", KVQ_ERR_INPUT,
     "needs [16, 6]"},
    {PHI3, "model.layers.1.mlp.gate_up_proj.weight", "model.layers.1.mlp.gate_up_proj.weight 10 6", KVQ_ERR_INPUT,
     "needs [20, 6]"},
    {PHI3, "model.layers.1.mlp.gate_up_proj.weight", "model.layers.1.mlp.gate_up_proj.weight 0 120", KVQ_ERR_INPUT,
     "shape [120]"},
    {PHI3, NULL, "model.layers.0.mlp.gate_proj.weight 10 6", KVQ_ERR_UNSUPPORTED, "gate_proj.weight' does not belong"},
    {GEMMA2, "model.layers.1.post_feedforward_layernorm.weight", NULL, KVQ_ERR_INPUT, "is missing"},
    {GEMMA2, NULL, "model.layers.0.self_attn.q_norm.weight 0 4", KVQ_ERR_UNSUPPORTED, "does not belong to the gemma2"},
    {GEMMA3, "language_model.model.norm.weight", "model.norm.weight 0 6", KVQ_ERR_INPUT,
     "'language_model.model.norm.weight' is missing"},
    {MIXTRAL, "model.layers.1.block_sparse_moe.experts.2.w3.weight", NULL, KVQ_ERR_INPUT,
     "'model.layers.1.block_sparse_moe.experts.2.w3.weight' is missing"},
    {MIXTRAL, NULL, "model.layers.1.block_sparse_moe.experts.3.w3.weight 10 6", KVQ_ERR_UNSUPPORTED,
     "experts.3.w3.weight' does not belong"},
    {MIXTRAL, "model.layers.0.block_sparse_moe.experts.0.w2.weight",
     "model.layers.0.block_sparse_moe.experts.0.w2.weight 10 6", KVQ_ERR_INPUT, "needs [6, 10]"},
    {MIXTRAL, "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.gate.weight 4 6",
     KVQ_ERR_INPUT, "needs [3, 6]"},
    {QWEN3_MOE, "model.layers.1.mlp.experts.0.up_proj.weight", NULL, KVQ_ERR_INPUT,
     "experts.0.up_proj.weight' is missing"},
    {QWEN3_MOE, NULL, "model.layers.0.mlp.shared_expert.up_proj.weight 5 6", KVQ_ERR_UNSUPPORTED,
     "shared_expert.up_proj.weight' does not belong"},
    {QWEN3_MOE, "model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.2.down_proj.weight 6 10",
     KVQ_ERR_INPUT, "needs [6, 5]"},
};
enum { N_WRONG = sizeof WRONG / sizeof *WRONG };

START_TEST(other_tensors_are_refused_by_name) {
    const model_file *f = &FILES[WRONG[_i].file];
    tensor_list       all = all_tensors(f), list = {.n = 0};
    for (int i = 0; i < all.n; i++) {
        if (WRONG[_i].without == NULL || strcmp(all.tensors[i].name, WRONG[_i].without) != 0)
            list.tensors[list.n++] = all.tensors[i];
    }
    ck_assert_int_eq(list.n, all.n - (WRONG[_i].without != NULL ? 1 : 0));
    if (WRONG[_i].with != NULL) add_line(&list, "", WRONG[_i].with, 0, 0);
    refused(write_model(f, &list, f->extra), WRONG[_i].status, WRONG[_i].fragment);
}
END_TEST

static void *small_alloc(void *user, size_t bytes) {
    size_t *largest = user;
    if (bytes > *largest) *largest = bytes;
    return aligned_alloc(64, bytes);
}

static void small_release(void *user, void *p) {
    (void)user;
    free(p);
}

// A config that claims more experts than any memory could list is refused for the first tensor that is missing.
START_TEST(claims_cost_no_memory) {
    tensor_list     list = all_tensors(&FILES[MIXTRAL]);
    size_t          largest = 0;
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_checkpoint *c = NULL;
    const char     *path =
        write_model(&FILES[MIXTRAL], &list,
                    "\"num_hidden_layers\": 4096, \"hidden_size\": 6, \"intermediate_size\": 10, \"head_dim\": 4,"
                    "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"vocab_size\": 12,"
                    "\"max_position_embeddings\": 64, \"num_local_experts\": 4096");
    ctx.alloc = small_alloc;
    ctx.release = small_release;
    ctx.user = &largest;
    kvq_test_failed(kvq_checkpoint_open(&ctx, path, &c, &err), KVQ_ERR_INPUT, &err,
                    "'model.layers.2.input_layernorm.weight' is missing");
    ck_assert_uint_le(largest, 1 << 20);
}
END_TEST

// ---------------------------------------------------------------- GGUF

// The same tensors under GGUF names; rows of q and k are in Hugging Face order, unlike those of llama files.
#define GGUF_LAYER(bias_or_norm)                                                                                       \
    "blk.N.attn_norm.weight 0 6", "blk.N.ffn_norm.weight 0 6", "blk.N.attn_q.weight 8 6", "blk.N.attn_k.weight 4 6",   \
        "blk.N.attn_v.weight 4 6", "blk.N.attn_output.weight 6 8", bias_or_norm, "blk.N.ffn_gate.weight 10 6",         \
        "blk.N.ffn_up.weight 10 6", "blk.N.ffn_down.weight 6 10"
#define GGUF_OUTER   "token_embd.weight 12 6", "output_norm.weight 0 6"
#define GGUF_BIASES  "blk.N.attn_q.bias 0 8", "blk.N.attn_k.bias 0 4", "blk.N.attn_v.bias 0 4"
#define GGUF_QK_NORM "blk.N.attn_q_norm.weight 0 4", "blk.N.attn_k_norm.weight 0 4"

static const model_file GGUF_FILES[] = {
    {"qwen2", NULL, "", {GGUF_OUTER, "output.weight 12 6", GGUF_LAYER(GGUF_BIASES)}},
    {"qwen3", NULL, "", {GGUF_OUTER, GGUF_LAYER(GGUF_QK_NORM)}},
    {"gemma2", NULL, "", {GGUF_OUTER, GGUF_LAYER(GGUF_QK_NORM)}},
};

static void put_u32(FILE *file, uint32_t x) { ck_assert_uint_eq(fwrite(&x, sizeof x, 1, file), 1); }
static void put_u64(FILE *file, uint64_t x) { ck_assert_uint_eq(fwrite(&x, sizeof x, 1, file), 1); }
static void put_text(FILE *file, const char *text) {
    put_u64(file, strlen(text));
    ck_assert_uint_eq(fwrite(text, 1, strlen(text), file), strlen(text));
}

static void put_key(FILE *file, const char *model, const char *name, uint32_t type) {
    char key[96];
    (void)snprintf(key, sizeof key, "%s.%s", model, name);
    put_text(file, key);
    put_u32(file, type);
}

static uint64_t aligned(uint64_t bytes) { return (bytes + 31) / 32 * 32; }

// A GGUF v3 with the sizes of SIZES and tensors of type F32.
static void write_gguf(const char *path, const char *model, const tensor_list *list) {
    static const struct {
        const char *name;
        uint32_t    value;
    } sizes[] = {{"block_count", 2},          {"embedding_length", 6},       {"feed_forward_length", 10},
                 {"context_length", 64},      {"attention.head_count", 2},   {"attention.head_count_kv", 1},
                 {"attention.key_length", 4}, {"attention.value_length", 4}, {"vocab_size", 12}};
    enum { N_SIZES = sizeof sizes / sizeof *sizes, U32 = 4, F32 = 6, TEXT = 8 };
    float    eps = 1e-6f;
    uint64_t offset = 0;
    FILE    *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite("GGUF", 4, 1, file), 1);
    put_u32(file, 3);
    put_u64(file, (uint64_t)list->n);
    put_u64(file, N_SIZES + 2);
    put_key(file, "general", "architecture", TEXT);
    put_text(file, model);
    put_key(file, model, "attention.layer_norm_rms_epsilon", F32);
    ck_assert_uint_eq(fwrite(&eps, sizeof eps, 1, file), 1);
    for (int i = 0; i < N_SIZES; i++) {
        put_key(file, model, sizes[i].name, U32);
        put_u32(file, sizes[i].value);
    }
    for (int i = 0; i < list->n; i++) {
        const tensor *t = &list->tensors[i];
        put_text(file, t->name);
        put_u32(file, t->rows > 0 ? 2 : 1);
        put_u64(file, (uint64_t)t->columns); // innermost first
        if (t->rows > 0) put_u64(file, (uint64_t)t->rows);
        put_u32(file, 0);
        put_u64(file, offset);
        offset += aligned(4 * (uint64_t)n_elements(t));
    }
    for (int i = 0; i < list->n; i++) {
        while (ftell(file) % 32 != 0) (void)fputc(0, file);
        write_elements(file, &list->tensors[i]);
    }
    while (ftell(file) % 32 != 0) (void)fputc(0, file);
    ck_assert_int_eq(fclose(file), 0);
}

START_TEST(qwen_gguf_rows_are_not_permuted) {
    const char *path = in_folder("m.gguf");
    tensor_list list = all_tensors(&GGUF_FILES[_i]);
    write_gguf(path, GGUF_FILES[_i].model_type, &list);
    kvq_checkpoint         *c = open_good(path);
    const kvq_model_config *m = kvq_checkpoint_config(c);
    ck_assert_str_eq(m->architecture, GGUF_FILES[_i].model_type);
    ck_assert(m->qkv_bias == (_i == 0) && m->qk_norm == (_i == 1) && !m->o_bias && m->tied_head == (_i == 1));
    ck_assert(m->head_dim == 4 && m->n_heads == 2 && m->n_kv_heads == 1 && m->attention_scale == 0.5f);
    ck_assert(m->embedding_scale == 1 && m->activation == KVQ_SILU && m->n_experts == 0 && m->sliding_window == 0);
    assert_rows(c, "model.layers.1.self_attn.q_proj.weight", 8, HIDDEN, "blk.1.attn_q.weight", 0);
    assert_rows(c, "model.layers.1.self_attn.k_proj.weight", 4, HIDDEN, "blk.1.attn_k.weight", 0);
    assert_rows(c, "model.layers.0.mlp.down_proj.weight", HIDDEN, FFN, "blk.0.ffn_down.weight", 0);
    if (_i == 0) {
        assert_rows(c, "model.layers.1.self_attn.q_proj.bias", 1, 8, "blk.1.attn_q.bias", 0);
        assert_rows(c, "lm_head.weight", VOCAB, HIDDEN, "output.weight", 0);
    } else {
        assert_rows(c, "model.layers.1.self_attn.k_norm.weight", 1, 4, "blk.1.attn_k_norm.weight", 0);
    }
    close_it(c);
}
END_TEST

START_TEST(other_gguf_models_are_refused_by_name) {
    const char *path = in_folder("m.gguf");
    tensor_list list = all_tensors(&GGUF_FILES[2]);
    write_gguf(path, "gemma2", &list);
    refused(path, KVQ_ERR_UNSUPPORTED, "'gemma2' is not supported; of GGUF files kvq knows: llama, qwen2, qwen3");
    write_gguf(path, "qwen2", &list); // norms of q and k, no biases
    refused(path, KVQ_ERR_INPUT, "'blk.0.attn_q.bias' is missing");
    write_gguf(path, "llama", &list);
    refused(path, KVQ_ERR_UNSUPPORTED, "'blk.0.attn_k_norm.weight' does not belong to the llama model");
    list = all_tensors(&GGUF_FILES[0]);
    write_gguf(path, "qwen3", &list);
    refused(path, KVQ_ERR_INPUT, "'blk.0.attn_q_norm.weight' is missing");
}
END_TEST

// ---------------------------------------------------------------- memory

// A mistral model of zeros, a hole in the file: one large embedding of 64 MiB and little else.
enum { LARGE_ROWS = 16384, LARGE_COLUMNS = 1024, LARGE_KIB = LARGE_ROWS * 4, STEP_KIB = 24 << 10 };

static kvq_checkpoint *open_large(void) {
    static const model_file LARGE = {
        "mistral",
        "\"num_hidden_layers\": 1, \"hidden_size\": 1024, \"intermediate_size\": 2, \"num_attention_heads\": 1,"
        "\"num_key_value_heads\": 1, \"head_dim\": 2, \"vocab_size\": 16384, \"max_position_embeddings\": 64,"
        "\"tie_word_embeddings\": true",
        "",
        {"model.embed_tokens.weight 16384 1024", "model.norm.weight 0 1024",
         "model.layers.0.input_layernorm.weight 0 1024", "model.layers.0.post_attention_layernorm.weight 0 1024",
         "model.layers.0.self_attn.q_proj.weight 2 1024", "model.layers.0.self_attn.k_proj.weight 2 1024",
         "model.layers.0.self_attn.v_proj.weight 2 1024", "model.layers.0.self_attn.o_proj.weight 1024 2",
         "model.layers.0.mlp.gate_proj.weight 2 1024", "model.layers.0.mlp.up_proj.weight 2 1024",
         "model.layers.0.mlp.down_proj.weight 1024 2"}};
    tensor_list list = {.n = 0};
    for (int i = 0; LARGE.lines[i] != NULL; i++) add_line(&list, "", LARGE.lines[i], 0, 0);
    write_config(LARGE.model_type, LARGE.extra);
    FILE *file = fopen(in_folder("m/model.safetensors"), "wb");
    ck_assert_ptr_nonnull(file);
    int64_t bytes = write_header(file, &list);
    bytes += ftell(file);
    ck_assert_int_eq(fclose(file), 0);
    ck_assert_int_eq(truncate(in_folder("m/model.safetensors"), (off_t)bytes), 0);
    return open_good(in_folder("m"));
}

static void read_large(const kvq_checkpoint *c, int64_t first, int64_t n) {
    static float row[LARGE_COLUMNS];
    kvq_error    err = {0};
    for (int64_t r = first; r < first + n; r++) {
        kvq_test_ok(kvq_checkpoint_read(c, "model.embed_tokens.weight", LARGE_ROWS, LARGE_COLUMNS, r, 1, row, &err),
                    &err);
        ck_assert(row[0] == 0 && row[LARGE_COLUMNS - 1] == 0);
    }
}

// Pages of files that are in this process's memory. Unlike the peak it leaves out what a sanitizer keeps beside them.
static long file_kib(void) {
    long  total = 0, resident = 0, shared = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_eq(fscanf(file, "%ld %ld %ld", &total, &resident, &shared), 3);
    ck_assert_int_eq(fclose(file), 0);
    return shared * (sysconf(_SC_PAGESIZE) / 1024);
}

// Each quarter is 16 MiB; pages at the ends, and what the kernel maps around a page that is asked for, may stay.
// Without forgetting the tensor stays as a whole, as the last lines show.
START_TEST(what_is_forgotten_leaves_memory) {
    kvq_checkpoint *c = open_large();
    long            before = file_kib();
    for (int64_t quarter = 0; quarter < 4; quarter++) {
        read_large(c, quarter * LARGE_ROWS / 4, LARGE_ROWS / 4);
        kvq_checkpoint_forget(c, "model.embed_tokens.weight");
        ck_assert_int_lt(file_kib() - before, 1024);
    }
    kvq_checkpoint_forget(c, "model.norm.weight"); // smaller than a page
    kvq_checkpoint_forget(c, "nothing");
    read_large(c, 0, LARGE_ROWS);
    ck_assert_int_ge(file_kib() - before, LARGE_KIB);
    close_it(c);
}
END_TEST

static long peak_kib(void) {
    struct rusage usage;
    ck_assert_int_eq(getrusage(RUSAGE_SELF, &usage), 0);
    return usage.ru_maxrss;
}

// Each of two threads holds a step of 8 MiB of a tensor at a time; half of that again is for everything else.
START_TEST(hashing_does_not_hold_a_tensor) {
    kvq_context             ctx = kvq_test_context();
    kvq_error               err = {0};
    kvq_checkpoint_identity id;
    kvq_checkpoint         *c = open_large();
    long                    before = peak_kib();
    kvq_test_ok(kvq_checkpoint_identify(&ctx, c, &id, &err), &err);
    ck_assert_int_gt(id.weight_bytes, (int64_t)LARGE_KIB * 1024);
    ck_assert_int_lt(peak_kib() - before, STEP_KIB);
    close_it(c);
}
END_TEST

// ---------------------------------------------------------------- checkpoints made by a framework

static const struct {
    const char *folder, *model_type, *dtype;
    int         n_kv_heads, head_dim, n_rotated, n_experts;
    int64_t     window;
    const char *windows; // "s" slides
    bool        tied, qkv_bias, qk_norm, gemma;
    double      attention_softcap, logit_softcap, query_scalar, theta, local_theta;
} GOLDENS[] = {
    {"mistral_f16", "mistral", "F16", 2, 16, 16, 0, 0, "ff", false, false, false, false, 0, 0, 16, 1e4, 0},
    {"mistral_swa16", "mistral", "F32", 2, 16, 16, 0, 16, "ss", false, false, false, false, 0, 0, 16, 1e4, 0},
    {"qwen2", "qwen2", "F32", 2, 16, 16, 0, 0, "ff", true, true, false, false, 0, 0, 16, 1e6, 0},
    {"qwen3", "qwen3", "F32", 2, 24, 24, 0, 0, "ff", false, false, true, false, 0, 0, 24, 1e6, 0},
    {"phi3", "phi3", "F32", 2, 16, 16, 0, 0, "ff", false, false, false, false, 0, 0, 16, 1e4, 0},
    {"phi3_partial", "phi3", "F32", 2, 16, 8, 0, 0, "ff", true, false, false, false, 0, 0, 16, 1e4, 0},
    {"gemma2", "gemma2", "F32", 2, 24, 24, 0, 16, "sf", true, false, false, true, 20, 15, 32, 1e4, 0},
    {"gemma3", "gemma3_text", "F32", 2, 24, 24, 0, 16, "ssf", true, false, true, true, 0, 0, 32, 1e6, 1e4},
    {"mixtral", "mixtral", "F32", 2, 16, 16, 4, 0, "ff", false, false, false, false, 0, 0, 16, 1e6, 0},
};
enum { N_GOLDENS = sizeof GOLDENS / sizeof *GOLDENS };

// Bytes behind the header of a safetensors file.
static int64_t data_bytes(const char *folder) {
    char            path[600];
    kvq_mapped_file file = {0};
    kvq_error       err = {0};
    uint64_t        header = 0;
    (void)snprintf(path, sizeof path, "%s/model.safetensors", folder);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    memcpy(&header, file.data, sizeof header);
    int64_t bytes = (int64_t)(file.bytes - sizeof header - header);
    kvq_unmap_file(&file);
    return bytes;
}

START_TEST(framework_checkpoints_open) {
    char                    name[64], path[512];
    kvq_context             ctx = kvq_test_context();
    kvq_error               err = {0};
    kvq_checkpoint_identity id;
    (void)snprintf(name, sizeof name, "goldens/tiny/%s", GOLDENS[_i].folder);
    kvq_test_shared_path(path, sizeof path, name);
    kvq_checkpoint         *c = open_good(path);
    const kvq_model_config *m = kvq_checkpoint_config(c);
    ck_assert_str_eq(m->architecture, GOLDENS[_i].model_type);
    ck_assert(m->n_kv_heads == GOLDENS[_i].n_kv_heads && m->head_dim == GOLDENS[_i].head_dim);
    ck_assert(m->rope.n_dims == GOLDENS[_i].n_rotated && m->rope.theta == GOLDENS[_i].theta);
    ck_assert(m->local_rope_theta == GOLDENS[_i].local_theta && m->n_experts == GOLDENS[_i].n_experts);
    ck_assert(m->sliding_window == GOLDENS[_i].window && m->n_layers == (int64_t)strlen(GOLDENS[_i].windows));
    for (int64_t i = 0; i < m->n_layers; i++)
        ck_assert_int_eq(kvq_layer_window(m, i), GOLDENS[_i].windows[i] == 's' ? GOLDENS[_i].window : 0);
    ck_assert(m->tied_head == GOLDENS[_i].tied && m->qkv_bias == GOLDENS[_i].qkv_bias && !m->o_bias);
    ck_assert(m->qk_norm == GOLDENS[_i].qk_norm && m->norm_offset == GOLDENS[_i].gemma);
    ck_assert(m->post_norms == GOLDENS[_i].gemma && m->embedding_scale == (GOLDENS[_i].gemma ? 8 : 1)); // sqrt(64)
    ck_assert(m->attention_scale == (float)(1 / sqrt(GOLDENS[_i].query_scalar)));
    ck_assert(m->attention_softcap == (float)GOLDENS[_i].attention_softcap);
    ck_assert(m->logit_softcap == (float)GOLDENS[_i].logit_softcap);
    kvq_test_ok(kvq_checkpoint_identify(&ctx, c, &id, &err), &err);
    ck_assert_str_eq(id.dtype, GOLDENS[_i].dtype);
    ck_assert_int_eq(id.weight_bytes, data_bytes(path)); // nothing is left unused
    close_it(c);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(names_that_are_canonical_are_read_as_they_are),
    KVQ_CASE(fused_matrices_are_ranges_of_rows),
    KVQ_CASE(mixtral_experts_have_canonical_names),
    KVQ_CASE(the_decoder_of_a_checkpoint_with_pictures),
    KVQ_CASE(every_byte_is_bound_once),
    KVQ_LOOP(other_tensors_are_refused_by_name, N_WRONG),
    KVQ_CASE(claims_cost_no_memory),
    KVQ_LOOP(qwen_gguf_rows_are_not_permuted, 2),
    KVQ_CASE(other_gguf_models_are_refused_by_name),
    KVQ_CASE(what_is_forgotten_leaves_memory),
    KVQ_CASE(hashing_does_not_hold_a_tensor),
    KVQ_GOLDEN_LOOP(framework_checkpoints_open, N_GOLDENS),
};
KVQ_TEST_MAIN("architectures", CASES)
