// SPDX-License-Identifier: Apache-2.0
//
// Every byte in and out: checkpoints, tokenizers, text, token ids, artifacts, exports, and files that are either
// written whole or not at all. The only library that sees HDF5, cJSON and PCRE2. Knows formats, never runs a model.
//
// Files are not trusted: every offset, size, shape and type is checked against the file before it is used, and a
// rejection names the file, the field or tensor, and the value.
#ifndef KVQ_IO_H
#define KVQ_IO_H

#include "kvq_codebook.h"
#include "kvq_core.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------- files

// A file mapped read-only. `data` is NULL for an empty file.
typedef struct kvq_mapped_file {
    const uint8_t *data;
    size_t         bytes;
} kvq_mapped_file;
kvq_status kvq_map_file(const char *path, kvq_mapped_file *out, kvq_error *err);
void       kvq_unmap_file(kvq_mapped_file *file);

// An output that appears under its name only when complete: written to a temporary name in the same folder, synced,
// then renamed. Anything else, also a crash, leaves the old state; discard removes the temporary file.
typedef struct kvq_output {
    char *path, *temporary; // temporary: where to write; owned
    bool  force;
} kvq_output;
// KVQ_ERR_EXISTS when path exists and force is false; KVQ_ERR_DISK when the folder cannot be written.
kvq_status kvq_output_begin(const kvq_context *ctx, const char *path, bool force, kvq_output *out, kvq_error *err);
kvq_status kvq_output_commit(const kvq_context *ctx, kvq_output *output, kvq_error *err); // also frees
void       kvq_output_discard(const kvq_context *ctx, kvq_output *output);                // harmless after commit
// Fills the temporary file, which must be empty.
kvq_status kvq_output_write(const kvq_output *output, const void *data, size_t bytes, kvq_error *err);
// The whole sequence for a block of memory.
kvq_status kvq_write_file(const kvq_context *ctx, const char *path, bool force, const void *data, size_t bytes,
                          kvq_error *err);

const char *kvq_file_name(const char *path); // the part after the last slash; trailing slashes are ignored by callers

// ---------------------------------------------------------------- checkpoints

typedef enum kvq_rope_type { KVQ_ROPE_DEFAULT, KVQ_ROPE_LINEAR, KVQ_ROPE_LLAMA3, KVQ_ROPE_YARN } kvq_rope_type;
const char *kvq_rope_type_name(kvq_rope_type type);

// A decoder described by data. Everything the reference model needs to know, in Hugging Face terms; a checkpoint whose
// config says anything this struct cannot hold is refused by the reader, which names the field.
typedef enum kvq_activation { KVQ_SILU, KVQ_GELU_TANH } kvq_activation;

#define KVQ_MAX_LAYERS 4096

typedef struct kvq_model_config {
    char    architecture[32]; // "llama", "qwen3", ...
    int64_t n_layers, hidden_size, intermediate_size, vocab_size, max_positions;
    int     n_heads, n_kv_heads, head_dim;
    float   rms_norm_eps;
    bool    tied_head; // the embedding is also the output matrix
    bool    qkv_bias, o_bias, mlp_bias;
    bool    qk_norm;     // every head of q and k goes through an RMS norm with weight [D] before RoPE (qwen3, gemma3)
    bool    post_norms;  // the outputs of attention and MLP are normed before they are added (gemma)
    bool    norm_offset; // norms multiply by 1 + w (gemma)
    kvq_activation activation;        // of the gate
    float          embedding_scale;   // multiplies embedding rows; 1 unless gemma
    float          attention_scale;   // multiplies scores; 1 / sqrt(head_dim) unless the config says otherwise
    float          attention_softcap; // scores become cap * tanh(score / cap); 0 = off (gemma2)
    float          logit_softcap;     // logits likewise; 0 = off
    int64_t        sliding_window;    // keys that a sliding layer sees, the query's own included; 0 = no layer slides
    uint8_t        slides[KVQ_MAX_LAYERS / 8]; // bit per layer; see kvq_layer_window
    double         local_rope_theta;           // base of sliding layers, unscaled; 0 = all layers share `rope` (gemma3)
    int            n_experts, experts_per_token; // 0 = a dense MLP; intermediate_size is that of one expert
    bool           normalize_experts;            // the chosen experts' probabilities are divided by their sum
    struct {
        kvq_rope_type type;
        double        theta;
        int           n_dims; // leading channels of a head that are rotated, = head_dim unless partial
        double        factor; // linear, llama3, yarn
        double        low_freq_factor, high_freq_factor;      // llama3
        double        beta_fast, beta_slow, attention_factor; // yarn; attention_factor 0 = 0.1 ln(factor) + 1
        int64_t       original_max_positions;                 // llama3, yarn
        const float  *frequency_divisors; // [n_dims / 2] given by a GGUF, or NULL; points into the mapping
    } rope;
    int64_t bos_id, eos_id; // -1 = none
} kvq_model_config;
int64_t kvq_layer_window(const kvq_model_config *config, int64_t layer); // 0 = the layer sees all keys

// The weights of a decoder by their Hugging Face names ("model.layers.0.self_attn.q_proj.weight"), whatever the file
// calls them. Memory-mapped; nothing is expanded before it is asked for.
typedef struct kvq_checkpoint kvq_checkpoint;

// path: a Hugging Face directory (config.json with model.safetensors, or shards with model.safetensors.index.json;
// F32, F16, BF16) or one GGUF file (v2, v3; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K .. Q6_K). All headers
// are validated here, and the presence and shape of every tensor the config implies.
kvq_status kvq_checkpoint_open(const kvq_context *ctx, const char *path, kvq_checkpoint **out, kvq_error *err);
void       kvq_checkpoint_close(const kvq_context *ctx, kvq_checkpoint **checkpoint);

const kvq_model_config *kvq_checkpoint_config(const kvq_checkpoint *checkpoint);

typedef struct kvq_checkpoint_identity {
    char    name[256];                      // directory or file name, no path
    char    config_sha256[KVQ_SHA256_HEX];  // of config.json, or of the GGUF's metadata section
    char    weights_sha256[KVQ_SHA256_HEX]; // over name, type, shape and stored bytes of every used tensor, by name
    char    dtype[16];                      // stored type of most weight bytes, "BF16", "Q4_1"
    int64_t n_tensors, weight_bytes;
} kvq_checkpoint_identity;
// Reads all weights once to hash them.
kvq_status kvq_checkpoint_identify(const kvq_context *ctx, const kvq_checkpoint *checkpoint,
                                   kvq_checkpoint_identity *out, kvq_error *err);

bool kvq_checkpoint_has(const kvq_checkpoint *checkpoint, const char *name);
// Rows [row, row + n_rows) of a matrix [n_total_rows, n_columns] (a vector is one row) as f32, in Hugging Face row
// order (q and k rows of a GGUF are un-permuted from interleaved pairs). Fails when the tensor is missing, has another
// shape, or holds NaN or Inf (KVQ_ERR_NUMERICAL naming tensor, row, column). Safe to call from several threads.
kvq_status kvq_checkpoint_read(const kvq_checkpoint *checkpoint, const char *name, int64_t n_total_rows,
                               int64_t n_columns, int64_t row, int64_t n_rows, float *out, kvq_error *err);

// Where the tokenizer of this checkpoint lives: the same path (kvq_tokenizer_open knows both forms).

// ---------------------------------------------------------------- tokenizers

typedef struct kvq_tokenizer kvq_tokenizer;

// path: a directory with tokenizer.json (byte-level BPE, or SentencePiece-style BPE with byte fallback; the
// normalizers, pre-tokenizers and patterns are taken from the file), a tokenizer.json itself, or a GGUF (models `llama`
// and `gpt2`). Anything the file asks for that is not implemented is refused by name.
kvq_status kvq_tokenizer_open(const kvq_context *ctx, const char *path, kvq_tokenizer **out, kvq_error *err);
void       kvq_tokenizer_close(const kvq_context *ctx, kvq_tokenizer **tokenizer);

typedef struct kvq_tokenizer_info {
    const char *kind;                   // "bpe-bytelevel", "bpe-sentencepiece"
    char        sha256[KVQ_SHA256_HEX]; // of tokenizer.json, or of the GGUF's tokenizer.* metadata values
    int64_t     vocab_size;             // largest id + 1
    int64_t     bos_id, eos_id;         // -1 = none known
    bool        adds_bos;               // the tokenizer's own policy for a new text
} kvq_tokenizer_info;
kvq_tokenizer_info kvq_tokenizer_describe(const kvq_tokenizer *tokenizer);

// A growing list of token ids.
typedef struct kvq_ids {
    int32_t *data;
    int64_t  count, capacity;
} kvq_ids;
void kvq_ids_free(const kvq_context *ctx, kvq_ids *ids);

// Appends the ids of `text` (n bytes, UTF-8; malformed bytes become U+FFFD as the respective framework does it) taken
// as one string. Nothing is added in front or behind. parse_special: special tokens written out in the text become
// their ids, as frameworks do by default; otherwise they are ordinary text.
kvq_status kvq_tokenizer_encode(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const char *text, size_t n,
                                bool parse_special, kvq_ids *ids, kvq_error *err);

// How many leading bytes are well-formed UTF-8; n when all are.
size_t kvq_utf8_valid_prefix(const char *text, size_t n);

// Token ids from a .npy file (version 1 or 2, little-endian i2, i4, i8, u2 or u4, one dimension, C order).
// Ids must lie in [0, vocab_size): the first that does not is named with its index.
kvq_status kvq_ids_read_npy(const kvq_context *ctx, const char *path, int64_t vocab_size, kvq_ids *ids, kvq_error *err);

// ---------------------------------------------------------------- artifacts

// HDF5, format 1.0, layout in docs/format.md. Written by temporary file and rename, read back and its content hash
// compared before the rename. Identical content gives identical bytes. content_sha256 receives the hash.
kvq_status kvq_artifact_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *path, bool force,
                              char content_sha256[KVQ_SHA256_HEX], kvq_error *err);
// Reads and verifies: format name, version, every shape and value range, content hash (KVQ_ERR_INTEGRITY).
kvq_status kvq_artifact_read(const kvq_context *ctx, const char *path, kvq_artifact **out,
                             char content_sha256[KVQ_SHA256_HEX], kvq_error *err);

// ---------------------------------------------------------------- exports

// One row per target: name, what loads the result, what it carries, how to write it and how
// to check it. kvq_export_targets returns the table; *n_targets receives its length.
typedef struct kvq_export_target {
    const char *name, *files, *consumer, *carries;
    kvq_status (*write)(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                        const char *path, bool force, kvq_error *err);
    // Reads the file back with an independent reader and compares it with the artifact. *max_error receives the
    // largest absolute difference of any number; KVQ_ERR_INTEGRITY names the first field that differs in kind.
    kvq_status (*check)(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                        const char *path, double *max_error, kvq_error *err);
} kvq_export_target;
const kvq_export_target *kvq_export_targets(int *n_targets);
const kvq_export_target *kvq_export_find(const char *name); // NULL when there is none

#ifdef __cplusplus
}
#endif
#endif
