// SPDX-License-Identifier: Apache-2.0
// Small random checkpoints; see kvq_make_model.h.
#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kvq_core.h"
#include "kvq_make_model.h"

kvq_make_options kvq_make_options_default(void) {
    return (kvq_make_options){.seed = 1,
                              .model_type = "llama",
                              .n_layers = 2,
                              .hidden_size = 64,
                              .n_heads = 4,
                              .n_kv_heads = 2,
                              .head_dim = 16,
                              .intermediate_size = 96,
                              .vocab_size = KVQ_MAKE_N_TOKENS,
                              .max_positions = 512,
                              .dtype = "F32",
                              .n_shards = 1,
                              .gguf_type = "F32"};
}

static void die(const char *format, ...) KVQ_PRINTF(1, 2);
static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    (void)fprintf(stderr, "kvq_make_model: ");
    (void)vfprintf(stderr, format, args);
    (void)fprintf(stderr, "\n");
    va_end(args);
    exit(EXIT_FAILURE);
}

static void *allocate(size_t bytes) {
    void *p = calloc(1, bytes > 0 ? bytes : 1);
    if (p == NULL) die("no memory");
    return p;
}

static FILE *open_output(const char *path) {
    FILE *file = fopen(path, "wb");
    if (file == NULL) die("%s: %s", path, strerror(errno));
    return file;
}

static void close_output(FILE *file, const char *path) {
    bool failed = ferror(file) != 0;
    if (fclose(file) != 0 || failed) die("%s: writing failed", path);
}

// ---------------------------------------------------------------- architectures

// What decides which tensors there are.
enum {
    UNTIED = 1,
    QKV_BIAS = 2,
    O_BIAS = 4,
    MLP_BIAS = 8,
    QK_NORM = 16,
    FUSED = 32, // q, k, v in one tensor, gate and up in another
    MIXTRAL = 64,
    QWEN_MOE = 128,
    GEMMA = 256, // norms behind attention and MLP, stored less 1
};

typedef struct family {
    const char *model_type;
    unsigned    features;
    int         window_pattern; // every such layer sees all keys, the others slide; 0 = no list of layer types
    const char *config;         // of config.json, beside sizes
} family;

#define EXPERT_COUNT 5

static const family FAMILIES[] = {
    {"llama", 0, 0,
     "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-5, "
     "\"rope_theta\": 10000.0}"},
    {"mistral", 0, 0,
     "{\"architectures\": [\"MistralForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-5, "
     "\"rope_theta\": 10000.0, \"sliding_window\": 5}"},
    {"qwen2", QKV_BIAS, 0,
     "{\"architectures\": [\"Qwen2ForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-6, "
     "\"rope_theta\": 1000000.0, \"use_sliding_window\": false, \"sliding_window\": null}"},
    {"qwen3", QK_NORM, 0,
     "{\"architectures\": [\"Qwen3ForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-6, "
     "\"rope_theta\": 1000000.0, \"use_sliding_window\": false, \"sliding_window\": null}"},
    {"phi3", FUSED, 0,
     "{\"architectures\": [\"Phi3ForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-5, "
     "\"rope_theta\": 10000.0, \"sliding_window\": null, \"partial_rotary_factor\": 0.5, "
     "\"original_max_position_embeddings\": 512}"},
    {"gemma2", GEMMA, 2,
     "{\"architectures\": [\"Gemma2ForCausalLM\"], \"hidden_activation\": \"gelu_pytorch_tanh\", "
     "\"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, \"sliding_window\": 5, \"query_pre_attn_scalar\": 20, "
     "\"attn_logit_softcapping\": 3.0, \"final_logit_softcapping\": 4.0}"},
    {"gemma3_text", GEMMA | QK_NORM, 3,
     "{\"architectures\": [\"Gemma3ForCausalLM\"], \"hidden_activation\": \"gelu_pytorch_tanh\", "
     "\"rms_norm_eps\": 1e-6, \"rope_theta\": 1000000.0, \"rope_local_base_freq\": 10000.0, "
     "\"sliding_window\": 5, \"query_pre_attn_scalar\": 20, \"attn_logit_softcapping\": null, "
     "\"final_logit_softcapping\": null}"},
    {"mixtral", MIXTRAL, 0,
     "{\"architectures\": [\"MixtralForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-5, "
     "\"rope_theta\": 1000000.0, \"sliding_window\": null, \"num_local_experts\": 5, "
     "\"num_experts_per_tok\": 2}"},
    {"qwen3_moe", QWEN_MOE | QK_NORM, 0,
     "{\"architectures\": [\"Qwen3MoeForCausalLM\"], \"hidden_act\": \"silu\", \"rms_norm_eps\": 1e-6, "
     "\"rope_theta\": 1000000.0, \"use_sliding_window\": false, \"num_experts\": 5, "
     "\"num_experts_per_tok\": 2, \"norm_topk_prob\": false, \"decoder_sparse_step\": 1, "
     "\"mlp_only_layers\": []}"},
};

static const family *family_of(const kvq_make_options *o) {
    for (size_t i = 0; i < sizeof FAMILIES / sizeof *FAMILIES; i++) {
        if (strcmp(FAMILIES[i].model_type, o->model_type) == 0) return &FAMILIES[i];
    }
    die("no model type %s", o->model_type);
    return NULL;
}

static bool is_llama(const kvq_make_options *o) { return strcmp(o->model_type, "llama") == 0; }

static unsigned features_of(const kvq_make_options *o) {
    unsigned f = family_of(o)->features;
    if (!is_llama(o) && (o->attention_bias || o->mlp_bias)) die("biases are for llama");
    if (!o->tied_head) f |= UNTIED;
    if (o->attention_bias) f |= QKV_BIAS | O_BIAS;
    return o->mlp_bias ? f | MLP_BIAS : f;
}

// ---------------------------------------------------------------- tensors

typedef enum fill {
    FILL_EMBEDDING,
    FILL_HEAD,
    FILL_NORM,
    FILL_BIAS,
    FILL_MATRIX,
    FILL_KEY,
    FILL_QKV,
    FILL_ROUTER
} fill;
typedef enum extent { ONE, VOCAB, HIDDEN, FFN, QUERY, KEY, QKV, TWO_FFN, HEAD, EXPERTS } extent;

// Written down a second time on purpose: a reader tested with its own table would find its own mistakes right. New rows
// go to the end: the place in the table is the stream of the random numbers.
static const struct {
    const char *hf, *gguf; // %d is the expert
    bool        per_layer;
    extent      rows, columns;
    fill        fill;
    bool        paired;         // rows are interleaved in a GGUF
    unsigned    needs, without; // features
} TENSORS[] = {
    {"model.embed_tokens.weight", "token_embd.weight", false, VOCAB, HIDDEN, FILL_EMBEDDING, false, 0, 0},
    {"model.norm.weight", "output_norm.weight", false, ONE, HIDDEN, FILL_NORM, false, 0, 0},
    {"lm_head.weight", "output.weight", false, VOCAB, HIDDEN, FILL_HEAD, false, UNTIED, 0},
    {"input_layernorm.weight", "attn_norm.weight", true, ONE, HIDDEN, FILL_NORM, false, 0, 0},
    {"post_attention_layernorm.weight", "ffn_norm.weight", true, ONE, HIDDEN, FILL_NORM, false, 0, 0},
    {"self_attn.q_proj.weight", "attn_q.weight", true, QUERY, HIDDEN, FILL_MATRIX, true, 0, FUSED},
    {"self_attn.k_proj.weight", "attn_k.weight", true, KEY, HIDDEN, FILL_KEY, true, 0, FUSED},
    {"self_attn.v_proj.weight", "attn_v.weight", true, KEY, HIDDEN, FILL_MATRIX, false, 0, FUSED},
    {"self_attn.o_proj.weight", "attn_output.weight", true, HIDDEN, QUERY, FILL_MATRIX, false, 0, 0},
    {"mlp.gate_proj.weight", "ffn_gate.weight", true, FFN, HIDDEN, FILL_MATRIX, false, 0, FUSED | MIXTRAL | QWEN_MOE},
    {"mlp.up_proj.weight", "ffn_up.weight", true, FFN, HIDDEN, FILL_MATRIX, false, 0, FUSED | MIXTRAL | QWEN_MOE},
    {"mlp.down_proj.weight", "ffn_down.weight", true, HIDDEN, FFN, FILL_MATRIX, false, 0, MIXTRAL | QWEN_MOE},
    {"self_attn.q_proj.bias", "attn_q.bias", true, ONE, QUERY, FILL_BIAS, true, QKV_BIAS, 0},
    {"self_attn.k_proj.bias", "attn_k.bias", true, ONE, KEY, FILL_BIAS, true, QKV_BIAS, 0},
    {"self_attn.v_proj.bias", "attn_v.bias", true, ONE, KEY, FILL_BIAS, false, QKV_BIAS, 0},
    {"self_attn.o_proj.bias", "attn_output.bias", true, ONE, HIDDEN, FILL_BIAS, false, O_BIAS, 0},
    {"mlp.gate_proj.bias", "ffn_gate.bias", true, ONE, FFN, FILL_BIAS, false, MLP_BIAS, 0},
    {"mlp.up_proj.bias", "ffn_up.bias", true, ONE, FFN, FILL_BIAS, false, MLP_BIAS, 0},
    {"mlp.down_proj.bias", "ffn_down.bias", true, ONE, HIDDEN, FILL_BIAS, false, MLP_BIAS, 0},
    {"self_attn.q_norm.weight", NULL, true, ONE, HEAD, FILL_NORM, false, QK_NORM, 0},
    {"self_attn.k_norm.weight", NULL, true, ONE, HEAD, FILL_NORM, false, QK_NORM, 0},
    {"self_attn.qkv_proj.weight", NULL, true, QKV, HIDDEN, FILL_QKV, false, FUSED, 0},
    {"mlp.gate_up_proj.weight", NULL, true, TWO_FFN, HIDDEN, FILL_MATRIX, false, FUSED, 0},
    {"pre_feedforward_layernorm.weight", NULL, true, ONE, HIDDEN, FILL_NORM, false, GEMMA, 0},
    {"post_feedforward_layernorm.weight", NULL, true, ONE, HIDDEN, FILL_NORM, false, GEMMA, 0},
    {"block_sparse_moe.gate.weight", NULL, true, EXPERTS, HIDDEN, FILL_ROUTER, false, MIXTRAL, 0},
    {"block_sparse_moe.experts.%d.w1.weight", NULL, true, FFN, HIDDEN, FILL_MATRIX, false, MIXTRAL, 0},
    {"block_sparse_moe.experts.%d.w3.weight", NULL, true, FFN, HIDDEN, FILL_MATRIX, false, MIXTRAL, 0},
    {"block_sparse_moe.experts.%d.w2.weight", NULL, true, HIDDEN, FFN, FILL_MATRIX, false, MIXTRAL, 0},
    {"mlp.gate.weight", NULL, true, EXPERTS, HIDDEN, FILL_ROUTER, false, QWEN_MOE, 0},
    {"mlp.experts.%d.gate_proj.weight", NULL, true, FFN, HIDDEN, FILL_MATRIX, false, QWEN_MOE, 0},
    {"mlp.experts.%d.up_proj.weight", NULL, true, FFN, HIDDEN, FILL_MATRIX, false, QWEN_MOE, 0},
    {"mlp.experts.%d.down_proj.weight", NULL, true, HIDDEN, FFN, FILL_MATRIX, false, QWEN_MOE, 0},
};
enum { N_KINDS = sizeof TENSORS / sizeof *TENSORS, MAX_LAYERS = 1000 };

typedef struct tensor {
    char     hf[96], gguf[80];
    int64_t  rows, columns; // a vector has one row
    bool     is_vector, paired;
    fill     fill;
    uint32_t stream; // of the random generator
} tensor;

static int64_t extent_of(const kvq_make_options *o, extent e) {
    const int64_t sizes[] = {1,
                             o->vocab_size,
                             o->hidden_size,
                             o->intermediate_size,
                             (int64_t)o->n_heads * o->head_dim,
                             (int64_t)o->n_kv_heads * o->head_dim,
                             (int64_t)(o->n_heads + 2 * o->n_kv_heads) * o->head_dim,
                             2 * (int64_t)o->intermediate_size,
                             o->head_dim,
                             EXPERT_COUNT};
    return sizes[e];
}

static tensor tensor_of(const kvq_make_options *o, int kind, int layer, int expert) {
    char        name[96];
    tensor      t = {.rows = extent_of(o, TENSORS[kind].rows),
                     .columns = extent_of(o, TENSORS[kind].columns),
                     .is_vector = TENSORS[kind].rows == ONE,
                     .paired = TENSORS[kind].paired,
                     .fill = TENSORS[kind].fill,
                     .stream = (uint32_t)(kind * MAX_LAYERS + layer) + ((uint32_t)expert << 20)};
    const char *number = strstr(TENSORS[kind].hf, "%d");
    if (number == NULL)
        (void)snprintf(name, sizeof name, "%s", TENSORS[kind].hf);
    else
        (void)snprintf(name, sizeof name, "%.*s%d%s", (int)(number - TENSORS[kind].hf), TENSORS[kind].hf, expert,
                       number + 2);
    if (TENSORS[kind].per_layer) {
        (void)snprintf(t.hf, sizeof t.hf, "model.layers.%d.%.60s", layer, name);
        (void)snprintf(t.gguf, sizeof t.gguf, "blk.%d.%s", layer, TENSORS[kind].gguf != NULL ? TENSORS[kind].gguf : "");
    } else {
        (void)snprintf(t.hf, sizeof t.hf, "%s", name);
        (void)snprintf(t.gguf, sizeof t.gguf, "%s", TENSORS[kind].gguf);
    }
    return t;
}

static tensor *list_tensors(const kvq_make_options *o, int *n) {
    if (o->n_layers < 1 || o->n_layers > MAX_LAYERS) die("%d layers", o->n_layers);
    if (o->vocab_size < KVQ_MAKE_N_TOKENS) die("the tokenizer needs a vocabulary of %d", KVQ_MAKE_N_TOKENS);
    unsigned features = features_of(o);
    tensor  *list = allocate((size_t)(N_KINDS * o->n_layers * EXPERT_COUNT) * sizeof *list);
    *n = 0;
    for (int kind = 0; kind < N_KINDS; kind++) {
        int n_layers = TENSORS[kind].per_layer ? o->n_layers : 1;
        int n_experts = strstr(TENSORS[kind].hf, "%d") != NULL ? EXPERT_COUNT : 1;
        if ((features & TENSORS[kind].needs) != TENSORS[kind].needs || (features & TENSORS[kind].without) != 0)
            continue;
        for (int i = 0; i < n_layers * n_experts; i++) list[(*n)++] = tensor_of(o, kind, i / n_experts, i % n_experts);
    }
    return list;
}

// Nearly normal, variance 1: the sum of eight uniforms of 16 bits (variance 1/12 each), shifted and scaled. Unlike
// Box-Muller it needs no function of libm, so that every machine makes the same bits.
static double bell(uint64_t seed, uint32_t stream, uint64_t index) {
    uint32_t words[4], sum = 0;
    kvq_rng_block(seed, KVQ_RNG_TEST, stream, index, words);
    for (int i = 0; i < 4; i++) sum += (words[i] & 0xffffu) + (words[i] >> 16);
    return ((double)sum / 65536 - 4) * 1.2247448713915890; // sqrt(12 / 8)
}

// Scales at which logits are far from flat, with some large key channels, as real models have them.
static double key_scale(int64_t row) { return (row % 11 == 3 ? 4 : 1) * (row == 5 ? 6 : 1); }

static float element(const kvq_make_options *o, const tensor *t, int64_t row, int64_t column) {
    double  r = bell(o->seed, t->stream, (uint64_t)(row * t->columns + column)), scale = 1.3 / sqrt((double)t->columns);
    int64_t key_row = row - extent_of(o, QUERY);
    if (o->not_finite != NULL && strcmp(o->not_finite, t->hf) == 0 && column == 2 && (t->is_vector || row == 1))
        return NAN;
    switch (t->fill) {
    case FILL_EMBEDDING:
        return (float)(r * (o->tied_head ? 0.35 : 1.0));
    case FILL_HEAD:
        return (float)(r * 0.35);
    case FILL_NORM:
        return (float)((family_of(o)->features & GEMMA ? 0 : 1) + 0.15 * r);
    case FILL_BIAS:
        return (float)(0.5 * r);
    case FILL_KEY:
        return (float)(r * scale * key_scale(row));
    case FILL_QKV:
        return (float)(r * scale * (key_row >= 0 && key_row < extent_of(o, KEY) ? key_scale(key_row) : 1));
    case FILL_ROUTER:
        return (float)(r * scale * 2);
    case FILL_MATRIX:
        break;
    }
    return (float)(r * scale);
}

float kvq_make_weight(const kvq_make_options *options, const char *hf_name, int64_t row, int64_t column) {
    int     n = 0, i = 0;
    tensor *list = list_tensors(options, &n);
    while (i < n && strcmp(list[i].hf, hf_name) != 0) i++;
    if (i == n) die("no tensor %s", hf_name);
    float value = element(options, &list[i], row, column);
    free(list);
    return value;
}

// ---------------------------------------------------------------- stored types

static void pack_f32(const float *x, uint8_t *out) { memcpy(out, x, sizeof *x); }

static void store_u16(uint8_t *out, uint16_t h) { memcpy(out, &h, sizeof h); }

static void pack_f16(const float *x, uint8_t *out) { store_u16(out, kvq_half_of_float(*x)); }

static void pack_bf16(const float *x, uint8_t *out) { // nearest, ties to even; NaN stays NaN
    uint32_t u = kvq_bits_of_float(*x);
    if (isnan(*x))
        u |= 0x400000u;
    else
        u += 0x7fffu + (u >> 16 & 1u);
    store_u16(out, (uint16_t)(u >> 16));
}

static int nearest(float x, float step, int low, int high) {
    float q = step != 0 ? roundf(x / step) : 0;
    return q < (float)low ? low : q > (float)high ? high : (int)q;
}

static void pack_q8_0(const float *x, uint8_t *out) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[i]));
    uint16_t d = kvq_half_of_float(largest / 127);
    store_u16(out, d);
    for (int i = 0; i < 32; i++) out[2 + i] = (uint8_t)nearest(x[i], kvq_float_of_half(d), -127, 127);
}

static void pack_q4_0(const float *x, uint8_t *out) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fabsf(x[i]) > fabsf(largest) ? x[i] : largest;
    uint16_t d = kvq_half_of_float(largest / -8);
    float    step = kvq_float_of_half(d);
    store_u16(out, d);
    for (int i = 0; i < 16; i++) {
        out[2 + i] = (uint8_t)((nearest(x[i], step, -8, 7) + 8) | (nearest(x[i + 16], step, -8, 7) + 8) << 4);
    }
}

static void pack_q4_1(const float *x, uint8_t *out) {
    float low = x[0], high = x[0];
    for (int i = 0; i < 32; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    uint16_t d = kvq_half_of_float((high - low) / 15), m = kvq_half_of_float(low);
    float    step = kvq_float_of_half(d), base = kvq_float_of_half(m);
    store_u16(out, d);
    store_u16(out + 2, m);
    for (int i = 0; i < 16; i++) {
        out[4 + i] = (uint8_t)(nearest(x[i] - base, step, 0, 15) | nearest(x[i + 16] - base, step, 0, 15) << 4);
    }
}

typedef struct packing {
    const char *name;
    uint32_t    number; // in a GGUF
    int         values, bytes;
    void (*pack)(const float *x, uint8_t *out);
} packing;

static const packing PACKINGS[] = {
    {"F32", 0, 1, 4, pack_f32},     {"F16", 1, 1, 2, pack_f16},     {"BF16", 30, 1, 2, pack_bf16},
    {"Q4_0", 2, 32, 18, pack_q4_0}, {"Q4_1", 3, 32, 20, pack_q4_1}, {"Q8_0", 8, 32, 34, pack_q8_0},
};

static const packing *find_packing(const char *name) {
    for (size_t i = 0; i < sizeof PACKINGS / sizeof *PACKINGS; i++) {
        if (strcmp(PACKINGS[i].name, name) == 0) return &PACKINGS[i];
    }
    die("no type %s", name);
    return NULL;
}

static size_t packed_bytes(const tensor *t, const packing *p) {
    return (size_t)(t->rows * t->columns / p->values) * (size_t)p->bytes;
}

// Where row (or bias element) i of a GGUF lies in Hugging Face order: the file interleaves the two halves of a head.
static int64_t interleaved(const kvq_make_options *o, int64_t i) {
    int64_t head = i / o->head_dim, at = i % o->head_dim;
    return head * o->head_dim + at / 2 + at % 2 * (o->head_dim / 2);
}

static void write_tensor(const kvq_make_options *o, const tensor *t, const packing *p, bool interleave, FILE *file) {
    float   *row = allocate((size_t)t->columns * sizeof *row);
    uint8_t *packed = allocate((size_t)p->bytes);
    for (int64_t r = 0; r < t->rows; r++) {
        for (int64_t c = 0; c < t->columns; c++) {
            bool bias = interleave && t->is_vector;
            row[c] = element(o, t, interleave && !bias ? interleaved(o, r) : r, bias ? interleaved(o, c) : c);
        }
        for (int64_t c = 0; c < t->columns; c += p->values) {
            p->pack(row + c, packed);
            (void)fwrite(packed, 1, (size_t)p->bytes, file);
        }
    }
    free(row);
    free(packed);
}

// ---------------------------------------------------------------- tokenizer

// In the alphabet of byte-level BPE, where a blank is written as U+0120.
#define SPACE "\xc4\xa0"
static const char *const MERGES[KVQ_MAKE_N_MERGES] = {
    SPACE " t", "h e",      SPACE " a", "i n",  SPACE "t he", "o u", "r e",      SPACE " s",   "a t",      "e r",
    "o n",      SPACE " w", "n d",      "i s",  SPACE " o",   "e n", "i t",      SPACE " b",   SPACE " c", "a n",
    "o r",      "e s",      SPACE " h", "in g", "e d",        "a r", SPACE " f", SPACE "a nd", "l l",      "a s",
};

// The printable character that stands for a byte: itself where it is printable, otherwise the next one from U+0100 on.
static void byte_token(int byte, char out[16]) {
    int code = 256;
    for (int b = 0; b <= byte; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b < byte)
            code += printable ? 0 : 1;
        else
            code = printable ? b : code;
    }
    if (code < 128)
        (void)snprintf(out, 16, "%c", code);
    else
        (void)snprintf(out, 16, "%c%c", 0xc0 | code >> 6, 0x80 | (code & 63));
}

static void token_text(int id, char out[16]) {
    if (id == KVQ_MAKE_BOS)
        strcpy(out, "<|bos|>");
    else if (id == KVQ_MAKE_EOS)
        strcpy(out, "<|eos|>");
    else if (id < KVQ_MAKE_FIRST_BYTE + 256)
        byte_token(id - KVQ_MAKE_FIRST_BYTE, out);
    else if (id < KVQ_MAKE_N_TOKENS) {
        const char *merge = MERGES[id - KVQ_MAKE_FIRST_BYTE - 256], *blank = strchr(merge, ' ');
        (void)snprintf(out, 16, "%.*s%s", (int)(blank - merge), merge, blank + 1);
    } else
        (void)snprintf(out, 16, "[PAD%d]", id % 1000000);
}

static void write_json(cJSON *tree, const char *directory, const char *name) {
    char path[1024];
    (void)snprintf(path, sizeof path, "%s/%s", directory, name);
    char *text = cJSON_Print(tree);
    FILE *file = open_output(path);
    (void)fputs(text, file);
    close_output(file, path);
    cJSON_free(text);
    cJSON_Delete(tree);
}

static cJSON *parse(const char *text) {
    cJSON *tree = cJSON_Parse(text);
    if (tree == NULL) die("not JSON: %s", text);
    return tree;
}

static void write_tokenizer(const char *directory) {
    char   text[16];
    cJSON *tree = parse(
        "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null, \"added_tokens\": [], \"normalizer\": null,"
        "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
        "\"use_regex\": true},"
        "\"post_processor\": null,"
        "\"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, \"use_regex\": "
        "true},"
        "\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, \"continuing_subword_prefix\": null,"
        "\"end_of_word_suffix\": null, \"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false}}");
    cJSON *model = cJSON_GetObjectItem(tree, "model"), *added = cJSON_GetObjectItem(tree, "added_tokens");
    cJSON *vocab = cJSON_AddObjectToObject(model, "vocab"), *merges = cJSON_AddArrayToObject(model, "merges");
    for (int id = KVQ_MAKE_BOS; id <= KVQ_MAKE_EOS; id++) {
        cJSON *token = parse(
            "{\"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}");
        token_text(id, text);
        cJSON_AddNumberToObject(token, "id", id);
        cJSON_AddStringToObject(token, "content", text);
        cJSON_AddItemToArray(added, token);
    }
    for (int id = 0; id < KVQ_MAKE_N_TOKENS; id++) {
        token_text(id, text);
        cJSON_AddNumberToObject(vocab, text, id);
    }
    for (int i = 0; i < KVQ_MAKE_N_MERGES; i++) cJSON_AddItemToArray(merges, cJSON_CreateString(MERGES[i]));
    write_json(tree, directory, "tokenizer.json");
    write_json(
        parse(
            "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", \"bos_token\": \"<|bos|>\", \"eos_token\": \"<|eos|>\","
            "\"add_bos_token\": false, \"add_eos_token\": false}"),
        directory, "tokenizer_config.json");
}

// ---------------------------------------------------------------- Hugging Face directory

static void add_layer_types(const kvq_make_options *o, cJSON *config) {
    int    pattern = family_of(o)->window_pattern;
    cJSON *list = pattern > 0 ? cJSON_AddArrayToObject(config, "layer_types") : NULL;
    for (int layer = 0; list != NULL && layer < o->n_layers; layer++) {
        cJSON_AddItemToArray(list,
                             cJSON_CreateString((layer + 1) % pattern == 0 ? "full_attention" : "sliding_attention"));
    }
}

static void write_config(const kvq_make_options *o, const char *directory) {
    cJSON *c = parse(family_of(o)->config);
    bool   qwen_moe = (family_of(o)->features & QWEN_MOE) != 0;
    const struct {
        const char *name;
        int         value;
    } numbers[] = {
        {"hidden_size", o->hidden_size},
        {qwen_moe ? "moe_intermediate_size" : "intermediate_size", o->intermediate_size},
        {"num_hidden_layers", o->n_layers},
        {"num_attention_heads", o->n_heads},
        {"num_key_value_heads", o->n_kv_heads},
        {"head_dim", o->head_dim},
        {"vocab_size", o->vocab_size},
        {"max_position_embeddings", o->max_positions},
        {"bos_token_id", KVQ_MAKE_BOS},
        {"eos_token_id", KVQ_MAKE_EOS},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        cJSON_AddNumberToObject(c, numbers[i].name, numbers[i].value);
    cJSON_AddStringToObject(c, "model_type", o->model_type);
    cJSON_AddNumberToObject(c, "attention_dropout", 0);
    cJSON_AddBoolToObject(c, "use_cache", true);
    cJSON_AddBoolToObject(c, "tie_word_embeddings", o->tied_head);
    if (is_llama(o)) {
        cJSON_AddBoolToObject(c, "attention_bias", o->attention_bias);
        cJSON_AddBoolToObject(c, "mlp_bias", o->mlp_bias);
    }
    add_layer_types(o, c);
    cJSON_AddItemToObject(c, "rope_scaling", parse(o->rope_scaling != NULL ? o->rope_scaling : "null"));
    cJSON *extra = parse(o->extra_config != NULL ? o->extra_config : "{}");
    while (extra->child != NULL) {
        cJSON *item = cJSON_DetachItemViaPointer(extra, extra->child);
        cJSON_DeleteItemFromObjectCaseSensitive(c, item->string);
        char *name = item->string; // AddItem copies the name before it frees this one
        cJSON_AddItemToObject(c, name, item);
    }
    cJSON_Delete(extra);
    write_json(c, directory, "config.json");
}

static void write_safetensors(const kvq_make_options *o, const tensor *list, int n, const char *path) {
    const packing *p = find_packing(o->dtype);
    size_t         at = 0;
    if (p->values != 1) die("%s is no safetensors type", o->dtype);
    cJSON *header = parse("{\"__metadata__\": {\"format\": \"pt\"}}");
    for (int i = 0; i < n; i++) {
        cJSON *entry = cJSON_AddObjectToObject(header, list[i].hf);
        double shape[2] = {(double)list[i].rows, (double)list[i].columns};
        size_t end = at + packed_bytes(&list[i], p);
        double range[2] = {(double)at, (double)end};
        at = end;
        cJSON_AddStringToObject(entry, "dtype", p->name);
        cJSON_AddItemToObject(entry, "shape",
                              cJSON_CreateDoubleArray(shape + list[i].is_vector, 2 - list[i].is_vector));
        cJSON_AddItemToObject(entry, "data_offsets", cJSON_CreateDoubleArray(range, 2));
    }
    char    *text = cJSON_PrintUnformatted(header);
    size_t   padding = (8 - strlen(text) % 8) % 8;
    uint64_t n_header = strlen(text) + padding;
    FILE    *file = open_output(path);
    (void)fwrite(&n_header, sizeof n_header, 1, file);
    (void)fprintf(file, "%s%*s", text, (int)padding, "");
    for (int i = 0; i < n; i++) write_tensor(o, &list[i], p, false, file);
    close_output(file, path);
    cJSON_free(text);
    cJSON_Delete(header);
}

static void write_shards(const kvq_make_options *o, const tensor *list, int n, const char *directory) {
    char   name[64], path[1024];
    cJSON *index = parse("{\"metadata\": {}}"), *map = cJSON_AddObjectToObject(index, "weight_map");
    for (int shard = 0; shard < o->n_shards; shard++) {
        int first = n * shard / o->n_shards, last = n * (shard + 1) / o->n_shards;
        (void)snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", shard + 1, o->n_shards);
        (void)snprintf(path, sizeof path, "%s/%s", directory, name);
        write_safetensors(o, list + first, last - first, path);
        for (int i = first; i < last; i++) cJSON_AddStringToObject(map, list[i].hf, name);
    }
    write_json(index, directory, "model.safetensors.index.json");
}

void kvq_make_model_hf(const kvq_make_options *options, const char *directory) {
    char    path[1024];
    int     n = 0;
    tensor *list = list_tensors(options, &n);
    if (mkdir(directory, 0777) != 0 && errno != EEXIST) die("%s: %s", directory, strerror(errno));
    write_config(options, directory);
    write_tokenizer(directory);
    (void)snprintf(path, sizeof path, "%s/model.safetensors", directory);
    if (options->n_shards > 1)
        write_shards(options, list, n, directory);
    else
        write_safetensors(options, list, n, path);
    free(list);
}

// ---------------------------------------------------------------- GGUF

enum { TYPE_U32 = 4, TYPE_I32 = 5, TYPE_F32 = 6, TYPE_BOOL = 7, TYPE_STRING = 8, TYPE_ARRAY = 9, ALIGNMENT = 32 };

// Key-value pairs gather in memory because their count stands in front of them.
typedef struct metadata {
    FILE    *stream;
    char    *text;
    size_t   bytes;
    uint64_t count;
} metadata;

static void put(FILE *file, const void *p, size_t n) { (void)fwrite(p, 1, n, file); }
static void put_u32(FILE *file, uint32_t x) { put(file, &x, sizeof x); }
static void put_u64(FILE *file, uint64_t x) { put(file, &x, sizeof x); }

static void put_string(FILE *file, const char *text) {
    put_u64(file, strlen(text));
    put(file, text, strlen(text));
}

static FILE *put_key(metadata *m, const char *key, uint32_t type) {
    put_string(m->stream, key);
    put_u32(m->stream, type);
    m->count++;
    return m->stream;
}

static void put_int(metadata *m, const char *key, int value) { put_u32(put_key(m, key, TYPE_U32), (uint32_t)value); }

static void put_float(metadata *m, const char *key, double value) {
    float narrow = (float)value;
    put(put_key(m, key, TYPE_F32), &narrow, sizeof narrow);
}

static void put_text(metadata *m, const char *key, const char *text) { put_string(put_key(m, key, TYPE_STRING), text); }

static FILE *put_array(metadata *m, const char *key, uint32_t type, int n) {
    put_u32(put_key(m, key, TYPE_ARRAY), type);
    put_u64(m->stream, (uint64_t)n);
    return m->stream;
}

static void put_tokenizer(const kvq_make_options *o, metadata *m) {
    char text[16];
    put_text(m, "tokenizer.ggml.model", "gpt2");
    put_text(m, "tokenizer.ggml.pre", "gpt-2");
    (void)put_array(m, "tokenizer.ggml.tokens", TYPE_STRING, o->vocab_size);
    for (int id = 0; id < o->vocab_size; id++) {
        token_text(id, text);
        put_string(m->stream, text);
    }
    (void)put_array(m, "tokenizer.ggml.token_type", TYPE_I32, o->vocab_size);
    for (int id = 0; id < o->vocab_size; id++) { // 1 normal, 3 control, 5 unused
        put_u32(m->stream, id <= KVQ_MAKE_EOS ? 3 : id < KVQ_MAKE_N_TOKENS ? 1 : 5);
    }
    (void)put_array(m, "tokenizer.ggml.merges", TYPE_STRING, KVQ_MAKE_N_MERGES);
    for (int i = 0; i < KVQ_MAKE_N_MERGES; i++) put_string(m->stream, MERGES[i]);
    put_int(m, "tokenizer.ggml.bos_token_id", KVQ_MAKE_BOS);
    put_int(m, "tokenizer.ggml.eos_token_id", KVQ_MAKE_EOS);
    put(put_key(m, "tokenizer.ggml.add_bos_token", TYPE_BOOL), "", 1);
}

static double rope_number(const cJSON *rope, const char *name) {
    const cJSON *item = cJSON_GetObjectItem(rope, name);
    return cJSON_IsNumber(item) ? item->valuedouble : 0;
}

static bool rope_is(const cJSON *rope, const char *type) {
    const cJSON *item = cJSON_GetObjectItem(rope, "rope_type");
    return cJSON_IsString(item) && strcmp(item->valuestring, type) == 0;
}

static void put_rope(const cJSON *rope, metadata *m) {
    if (!rope_is(rope, "linear") && !rope_is(rope, "yarn")) return;
    put_text(m, "llama.rope.scaling.type", cJSON_GetObjectItem(rope, "rope_type")->valuestring);
    put_float(m, "llama.rope.scaling.factor", rope_number(rope, "factor"));
    if (rope_number(rope, "original_max_position_embeddings") > 0) {
        put_int(m, "llama.rope.scaling.original_context_length",
                (int)rope_number(rope, "original_max_position_embeddings"));
    }
}

// llama3 scaling reaches a GGUF as divisors of the frequencies f_i = theta^(-2 i / D): with the wavelength w = 2 pi / f
// and mix = clamp((original / w - low) / (high - low), 0, 1), the frequency becomes ((1 - mix) / factor + mix) f.
static void write_divisors(const kvq_make_options *o, const cJSON *rope, FILE *file) {
    double low = rope_number(rope, "low_freq_factor"), high = rope_number(rope, "high_freq_factor");
    for (int i = 0; i < o->head_dim / 2; i++) {
        double turns = rope_number(rope, "original_max_position_embeddings") * pow(10000, -2.0 * i / o->head_dim) /
                       6.283185307179586;
        double mix = fmin(fmax((turns - low) / (high - low), 0), 1);
        float  divisor = (float)(1 / ((1 - mix) / rope_number(rope, "factor") + mix));
        put(file, &divisor, sizeof divisor);
    }
}

static metadata make_metadata(const kvq_make_options *o, const cJSON *rope) {
    metadata m = {.count = 0};
    m.stream = open_memstream(&m.text, &m.bytes);
    if (m.stream == NULL) die("no memory");
    put_text(&m, "general.architecture", "llama");
    put_text(&m, "general.name", "random llama");
    put_int(&m, "llama.block_count", o->n_layers);
    put_int(&m, "llama.context_length", o->max_positions);
    put_int(&m, "llama.embedding_length", o->hidden_size);
    put_int(&m, "llama.feed_forward_length", o->intermediate_size);
    put_int(&m, "llama.attention.head_count", o->n_heads);
    put_int(&m, "llama.attention.head_count_kv", o->n_kv_heads);
    put_int(&m, "llama.attention.key_length", o->head_dim);
    put_int(&m, "llama.attention.value_length", o->head_dim);
    put_int(&m, "llama.rope.dimension_count", o->head_dim);
    put_int(&m, "llama.vocab_size", o->vocab_size);
    put_float(&m, "llama.rope.freq_base", 10000);
    put_float(&m, "llama.attention.layer_norm_rms_epsilon", 1e-5);
    put_rope(rope, &m);
    put_tokenizer(o, &m);
    if (fclose(m.stream) != 0) die("no memory");
    return m;
}

static void put_info(FILE *file, const char *name, const int64_t *dims, int n_dims, uint32_t type, uint64_t offset) {
    put_string(file, name);
    put_u32(file, (uint32_t)n_dims);
    for (int i = n_dims - 1; i >= 0; i--) put_u64(file, (uint64_t)dims[i]); // innermost first
    put_u32(file, type);
    put_u64(file, offset);
}

static uint64_t aligned(uint64_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static void pad(FILE *file) {
    while (ftell(file) % ALIGNMENT != 0) (void)fputc(0, file);
}

static const packing *packing_in_gguf(const kvq_make_options *o, const tensor *t) {
    const packing *p = find_packing(o->gguf_type);
    return t->is_vector || t->columns % p->values != 0 ? find_packing("F32") : p;
}

void kvq_make_model_gguf(const kvq_make_options *options, const char *path) {
    int           n = 0;
    uint64_t      at = 0;
    const int64_t n_divisors = options->head_dim / 2;
    tensor       *list = list_tensors(options, &n);
    cJSON        *rope = parse(options->rope_scaling != NULL ? options->rope_scaling : "null");
    metadata      m = make_metadata(options, rope);
    bool          divisors = rope_is(rope, "llama3");
    if (!is_llama(options)) die("a GGUF of %s", options->model_type);
    FILE *file = open_output(path);
    put(file, "GGUF", 4);
    put_u32(file, 3);
    put_u64(file, (uint64_t)n + divisors);
    put_u64(file, m.count);
    put(file, m.text, m.bytes);
    for (int i = 0; i < n; i++) {
        const packing *p = packing_in_gguf(options, &list[i]);
        const int64_t  shape[2] = {list[i].rows, list[i].columns};
        put_info(file, list[i].gguf, shape + list[i].is_vector, 2 - list[i].is_vector, p->number, at);
        at = aligned(at + packed_bytes(&list[i], p));
    }
    if (divisors) put_info(file, "rope_freqs.weight", &n_divisors, 1, 0, at);
    for (int i = 0; i < n; i++) {
        pad(file);
        write_tensor(options, &list[i], packing_in_gguf(options, &list[i]), list[i].paired, file);
    }
    pad(file);
    if (divisors) write_divisors(options, rope, file);
    close_output(file, path);
    free(m.text);
    free(list);
    cJSON_Delete(rope);
}
