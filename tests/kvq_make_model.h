// SPDX-License-Identifier: Apache-2.0
//
// Private to the tests: writes small random checkpoints of every architecture, so that a fresh clone can test
// everything from reading a checkpoint to validating an artifact without any download. The same options give the same
// bytes on every machine. A mistake in the arguments or a full disk ends the program: there is nothing a test could do
// about it.
#ifndef KVQ_MAKE_MODEL_H
#define KVQ_MAKE_MODEL_H

#include <stdbool.h>
#include <stdint.h>

// Ids of the tokenizer that comes with every checkpoint: two special tokens, 256 bytes, then merged pieces of English.
enum { KVQ_MAKE_BOS = 0, KVQ_MAKE_EOS = 1, KVQ_MAKE_FIRST_BYTE = 2, KVQ_MAKE_N_MERGES = 30, KVQ_MAKE_N_TOKENS = 288 };

typedef struct kvq_make_options {
    uint64_t seed;
    const char
        *model_type; // "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"
    int  n_layers, hidden_size, n_heads, n_kv_heads, head_dim, intermediate_size;
    int  vocab_size; // KVQ_MAKE_N_TOKENS or more
    int  max_positions;
    bool attention_bias, mlp_bias; // llama
    bool tied_head;
    const char *rope_scaling; // JSON object as in config.json, or NULL; yarn, linear and llama3 also reach the GGUF
    const char *extra_config; // JSON object whose members replace or extend those of config.json, or NULL
    const char *dtype;        // of the safetensors: "F32", "F16", "BF16"
    int         n_shards;     // 1 = model.safetensors, more = an index and shards
    const char *gguf_type;  // of the matrices of a GGUF: "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"; vectors are F32
    const char *not_finite; // Hugging Face name of a tensor whose element in row 1, column 2 (vector: element 2) is NaN
} kvq_make_options;

kvq_make_options kvq_make_options_default(void); // two layers of width 64, four heads on two, F32

// A Hugging Face directory, created when it does not exist: config.json, weights, tokenizer.json,
// tokenizer_config.json. Sliding windows are 5 tokens; 5 experts, of which a token uses 2.
void kvq_make_model_hf(const kvq_make_options *options, const char *directory);
// The same weights and tokenizer of a llama as one GGUF v3. Matrices whose rows do not fill whole blocks stay F32.
void kvq_make_model_gguf(const kvq_make_options *options, const char *path);

// The f32 value of one element before it is stored, in Hugging Face order: what a reader of an F32 checkpoint must
// give.
float kvq_make_weight(const kvq_make_options *options, const char *hf_name, int64_t row, int64_t column);

#endif
