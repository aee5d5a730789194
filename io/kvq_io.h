// SPDX-License-Identifier: Apache-2.0
//
// Every byte in and out: checkpoints, tokenizers, text, token ids, artifacts, exports, and files that are either
// written whole or not at all. The only library that sees HDF5, libarchive, cJSON and PCRE2. Knows formats, never runs
// a model.
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

// Adds to the end of a file, which is made when it does not exist. For logs that several programs share; a file of our
// own is written whole. KVQ_ERR_DISK.
kvq_status kvq_append_file(const char *path, const void *data, size_t bytes, kvq_error *err);

const char *kvq_file_name(const char *path); // the part after the last slash; trailing slashes are ignored by callers

// What an HDF5 file of kvq says it is: "kvq.artifact", "kvq.measurement", "kvq.capture", "kvq.partial", or a kind that
// this version does not know. KVQ_ERR_NOT_FOUND; KVQ_ERR_INPUT when it is not one; KVQ_ERR_INTEGRITY when it is
// damaged.
#define KVQ_FORMAT_NAME 32
kvq_status kvq_file_format(const kvq_context *ctx, const char *path, char out[KVQ_FORMAT_NAME], kvq_error *err);

// ---------------------------------------------------------------- named texts

// What a run depends on, or how far it came, as names and texts; a flat JSON object in a file.
typedef struct kvq_field {
    char name[64], value[256];
} kvq_field;
// Replaces the file as a whole.
kvq_status kvq_fields_write(const kvq_context *ctx, const char *path, const kvq_field *fields, int64_t n,
                            kvq_error *err);
// *fields is released with kvq_free. KVQ_ERR_INTEGRITY when the file holds anything else than one flat object of texts.
kvq_status kvq_fields_read(const kvq_context *ctx, const char *path, kvq_field **fields, int64_t *n, kvq_error *err);
// Value of a name, NULL when there is none.
const char *kvq_fields_find(const kvq_field *fields, int64_t n, const char *name);
// KVQ_ERR_MISMATCH when the lists differ; the message shows each field that does, as "name: a, now b".
kvq_status kvq_fields_compare(const kvq_field *before, int64_t n_before, const kvq_field *now, int64_t n_now,
                              kvq_error *err);

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

// The weights of a decoder by canonical names, whatever the file calls them and wherever it puts them: those of Hugging
// Face's Llama ("model.layers.0.self_attn.q_proj.weight") also where q, k, v or gate, up are stored as one matrix; of
// experts "mlp.gate.weight" (the router) and "mlp.experts.0.gate_proj.weight"; norms as Gemma calls them where there
// are post_norms. Values are as stored: norm_offset is not added. Memory-mapped; nothing is expanded before it is asked
// for.
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

// Stored bytes of the largest tensor: what of the mapped file is in memory at most when each tensor is forgotten after
// it was read.
int64_t kvq_checkpoint_largest_tensor(const kvq_checkpoint *checkpoint);

bool kvq_checkpoint_has(const kvq_checkpoint *checkpoint, const char *name);
// Rows [row, row + n_rows) of a matrix [n_total_rows, n_columns] (a vector is one row) as f32, in Hugging Face row
// order (q and k rows of a GGUF are un-permuted from interleaved pairs). Fails when the tensor is missing, has another
// shape, or holds NaN or Inf (KVQ_ERR_NUMERICAL naming tensor, row, column). Safe to call from several threads.
kvq_status kvq_checkpoint_read(const kvq_checkpoint *checkpoint, const char *name, int64_t n_total_rows,
                               int64_t n_columns, int64_t row, int64_t n_rows, float *out, kvq_error *err);

// The pages of this tensor are not needed now: resident memory shrinks by them, and the next read takes them from the
// file again. Does nothing for a name that is not there. Safe to call while other threads read.
void kvq_checkpoint_forget(const kvq_checkpoint *checkpoint, const char *name);

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
// A token as the vocabulary writes it (byte-level vocabularies write "\u010a" for a line feed), cut off to fit; empty
// when it has no such id. For messages: it looks through the whole vocabulary.
void kvq_tokenizer_spelling(const kvq_tokenizer *tokenizer, int64_t id, char *out, size_t size);

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

// A text that arrives in parts of any size, even within a character. The ids do not depend on the parts: they are those
// that kvq_tokenizer_encode gives for all of it as one string. The tokenizer is borrowed.
typedef struct kvq_encoder kvq_encoder;
kvq_status kvq_encoder_create(const kvq_context *ctx, const kvq_tokenizer *tokenizer, bool parse_special,
                              kvq_encoder **out, kvq_error *err);
void       kvq_encoder_destroy(const kvq_context *ctx, kvq_encoder **encoder);
// Appends the ids that nothing behind this part can change; the rest of the text is kept, usually a word. last: the
// text ends here, and the next part begins another one. KVQ_ERR_UNSUPPORTED when 64 MiB would have to be kept, because
// the text has no place there where this tokenizer's rules allow to part it. After a failure only destroy.
kvq_status kvq_encoder_push(kvq_encoder *encoder, const char *text, size_t n, bool last, kvq_ids *ids, kvq_error *err);

// How many leading bytes are well-formed UTF-8; n when all are.
size_t kvq_utf8_valid_prefix(const char *text, size_t n);

// ---------------------------------------------------------------- text

typedef enum kvq_text_format { KVQ_TEXT_AUTO, KVQ_TEXT_RAW, KVQ_TEXT_JSONL } kvq_text_format;

// A text file, read from its start in parts of at most 1 MiB, plain or compressed by gzip, zstd, xz or bzip2 (told by
// content). raw: the whole file is one document. jsonl: each line that is not blank is a JSON object, and the string in
// its member `field` (NULL = "text") is a document. auto: jsonl when the name ends in .jsonl or .ndjson, with .gz,
// .zst, .xz or .bz2 behind or not; raw otherwise. The path - is standard input.
typedef struct kvq_text kvq_text;
kvq_status kvq_text_open(const kvq_context *ctx, const char *path, kvq_text_format format, const char *field,
                         kvq_text **out, kvq_error *err); // the context is borrowed
void       kvq_text_close(const kvq_context *ctx, kvq_text **text);

typedef struct kvq_text_part {
    const char *data; // [n], valid until the next call
    size_t      n;
    bool        ends_document;
} kvq_text_part;
// The next part; *found is false behind the last one. KVQ_ERR_INTEGRITY: what is compressed is damaged, truncated, or
// not all there is in the file. KVQ_ERR_UNSUPPORTED: another format, or a line of more than 64 MiB. KVQ_ERR_INPUT: a
// zero byte, or a line that is no JSON object or lacks the member, with its number. Bytes that are not UTF-8 are given
// as they are, after a warning.
kvq_status kvq_text_next(kvq_text *text, kvq_text_part *part, bool *found, kvq_error *err);
// Bytes of the file read since the start, and how many it has; 0 = not known.
void kvq_text_position(const kvq_text *text, int64_t *done, int64_t *total);
bool kvq_text_can_rewind(const kvq_text *text); // a regular file
// To the start. KVQ_ERR_UNSUPPORTED for pipes, KVQ_ERR_INTEGRITY when the file was changed since it was opened.
kvq_status kvq_text_rewind(kvq_text *text, kvq_error *err);
// Of the file as it is stored. To be called behind the last part wanted, because it reads on to the end of the file.
kvq_status kvq_text_sha256(kvq_text *text, char sha256[KVQ_SHA256_HEX], kvq_error *err);

// Token ids from a .npy file (version 1 or 2, little-endian i2, i4, i8, u2 or u4, one dimension, C order).
// Ids must lie in [0, vocab_size): the first that does not is named with its index.
kvq_status kvq_ids_read_npy(const kvq_context *ctx, const char *path, int64_t vocab_size, kvq_ids *ids, kvq_error *err);

// ---------------------------------------------------------------- artifacts

// HDF5, format 1.1, layout in docs/format.md. Written by temporary file and rename, read back and its content hash
// compared before the rename. Identical content gives identical bytes. content_sha256 receives the hash.
kvq_status kvq_artifact_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *path, bool force,
                              char content_sha256[KVQ_SHA256_HEX], kvq_error *err);
// Reads and verifies: format name, version, every shape and value range, content hash (KVQ_ERR_INTEGRITY). What a file
// of format 1.0 does not say is 0: plain nuq tables of pre-RoPE keys, and "not measured".
kvq_status kvq_artifact_read(const kvq_context *ctx, const char *path, kvq_artifact **out,
                             char content_sha256[KVQ_SHA256_HEX], kvq_error *err);

// ---------------------------------------------------------------- arrays in files

// Element types of the arrays of captures and partial results; little-endian.
typedef enum kvq_array_type {
    KVQ_ARRAY_U8,
    KVQ_ARRAY_I32,
    KVQ_ARRAY_I64,
    KVQ_ARRAY_U64,
    KVQ_ARRAY_F16,
    KVQ_ARRAY_F32,
    KVQ_ARRAY_F64,
    KVQ_ARRAY_N_TYPES
} kvq_array_type;
const char *kvq_array_type_name(kvq_array_type type); // "f16"
size_t      kvq_array_type_bytes(kvq_array_type type);

// ---------------------------------------------------------------- captures

// What a model computed over windows of tokens, in an HDF5 file (docs/format.md): K before RoPE and V, and with them or
// not the queries before RoPE and the squared gradients. Written by kvq-capture or by any framework; kvq-calibrate
// --capture fits from one without a model. The files are as large as what they hold, so everything goes by window.
// No function here may be called by two threads at a time, also on different files: HDF5 is not made for it.
typedef enum kvq_capture_part {
    KVQ_CAPTURE_K,        // [N, S, Hkv, D], pre-RoPE
    KVQ_CAPTURE_V,        // [N, S, Hkv, D]
    KVQ_CAPTURE_Q,        // [N, S, H, D], pre-RoPE
    KVQ_CAPTURE_FISHER_K, // [N, S, Hkv, D]: (d loss / d K)^2, loss = mean over the window's predicted tokens
    KVQ_CAPTURE_FISHER_V, // the same of V
    KVQ_CAPTURE_N_PARTS
} kvq_capture_part;
extern const char *const kvq_capture_part_names[KVQ_CAPTURE_N_PARTS]; // "k", "v", "q", "fisher_k", "fisher_v"

#define KVQ_CAPTURE_MAX_LAYERS 1000

// "" and 0 mean "not known" wherever a fit can do without. Texts and hashes as in kvq_artifact.
typedef struct kvq_capture_info {
    struct {
        char    architecture[64], name[256], config_sha256[KVQ_SHA256_HEX], weights_sha256[KVQ_SHA256_HEX];
        int64_t n_layers, n_kv_heads, head_dim; // always known
        int64_t n_heads;                        // known when queries are there
        int64_t hidden_size, vocab_size, n_tensors;
        double  rope_theta;
        char    rope_type[32], dtype[16];
    } model;
    struct {
        char kind[32], sha256[KVQ_SHA256_HEX];
        bool bos_added;
    } tokenizer;
    struct {
        char     source[256], source_sha256[KVQ_SHA256_HEX];
        int64_t  n_available_tokens, n_windows, seq_len; // N and S are always known
        uint64_t seed;
        double   baseline_nll; // of the unquantised model over the windows, nats per token
    } dataset;
    bool           has_query, has_fisher, has_ids;
    uint8_t        layers[(KVQ_CAPTURE_MAX_LAYERS + 7) / 8]; // bit per layer: is it there; see kvq_capture_has_layer
    kvq_array_type type;                                     // of K, V and Q in the file; F16 or F32 when written
} kvq_capture_info;
bool    kvq_capture_has_layer(const kvq_capture_info *info, int64_t layer);
void    kvq_capture_add_layer(kvq_capture_info *info, int64_t layer); // 0 <= layer < KVQ_CAPTURE_MAX_LAYERS
int64_t kvq_capture_bytes(const kvq_capture_info *info);              // of all arrays; the file has some KiB more

typedef struct kvq_capture_writer kvq_capture_writer;

// ids [N, S] int32, or NULL when they are not known; info->has_ids follows from that. The same info and the same puts
// in the same order give the same bytes. KVQ_ERR_EXISTS without force; KVQ_ERR_INPUT names what could not be read back.
kvq_status kvq_capture_create(const kvq_context *ctx, const char *path, bool force, const kvq_capture_info *info,
                              const int32_t *ids, kvq_capture_writer **out, kvq_error *err);
// x: one window, [S, heads * D]. KVQ_ERR_NUMERICAL for a value that is not finite, negative though squared, or beyond
// f16 where that is stored.
kvq_status kvq_capture_put(kvq_capture_writer *writer, kvq_capture_part part, int64_t layer, int64_t window,
                           const float *x, kvq_error *err);
// Completes the file and moves it into place; the writer is gone afterwards, also on failure. Everything that info
// promises must have been put: KVQ_ERR_INTERNAL names the first piece that was not.
kvq_status kvq_capture_commit(const kvq_context *ctx, kvq_capture_writer **writer, double baseline_nll, kvq_error *err);
void       kvq_capture_discard(const kvq_context *ctx, kvq_capture_writer **writer); // NULL is fine; leaves nothing

typedef struct kvq_capture kvq_capture;

// Checks every attribute and every array's type, shape and storage, of all layers that are there; reads no array.
// KVQ_ERR_NOT_FOUND, KVQ_ERR_INPUT (names what is missing or wrong), KVQ_ERR_INTEGRITY (HDF5 finds damage),
// KVQ_ERR_VERSION.
kvq_status              kvq_capture_open(const kvq_context *ctx, const char *path, kvq_capture **out, kvq_error *err);
void                    kvq_capture_close(const kvq_context *ctx, kvq_capture **capture);
const kvq_capture_info *kvq_capture_describe(const kvq_capture *capture);
// One window as f32, [S, heads * D]. KVQ_ERR_INPUT when layer or part are not there; KVQ_ERR_NUMERICAL, naming window,
// position and channel, for a value that is not finite, is too large for f32, or negative though squared.
kvq_status kvq_capture_read(const kvq_capture *capture, kvq_capture_part part, int64_t layer, int64_t window, float *x,
                            kvq_error *err);
// ids [N, S]. KVQ_ERR_INPUT when there are none, or one lies outside of the vocabulary (where its size is known).
kvq_status kvq_capture_read_ids(const kvq_capture *capture, int32_t *ids, kvq_error *err);

// ---------------------------------------------------------------- partial results

// What one of several independent runs hands to the next: named texts, named integers, and named arrays, in a sealed
// HDF5 file (docs/format.md). What they mean is the caller's business. Not for two threads at a time, as captures.
typedef struct kvq_count {
    char    name[64];
    int64_t value;
} kvq_count;

typedef struct kvq_partial_writer kvq_partial_writer;

// fields, counts: each name once, not empty. KVQ_ERR_EXISTS without force.
kvq_status kvq_partial_create(const kvq_context *ctx, const char *path, bool force, const kvq_field *fields,
                              int64_t n_fields, const kvq_count *counts, int64_t n_counts, kvq_partial_writer **out,
                              kvq_error *err);
// name: parts of letters, digits, '_' and '-' with '/' between them ("layers/0003/k_low"), used once. dims [n_dims],
// 1 .. 4 of them, each 0 or more.
kvq_status kvq_partial_put(kvq_partial_writer *writer, const char *name, kvq_array_type type, int n_dims,
                           const int64_t *dims, const void *data, kvq_error *err);
// The writer is gone afterwards, also on failure.
kvq_status kvq_partial_commit(const kvq_context *ctx, kvq_partial_writer **writer, kvq_error *err);
void       kvq_partial_discard(const kvq_context *ctx, kvq_partial_writer **writer); // NULL is fine; leaves nothing

typedef struct kvq_partial kvq_partial;

// Verifies the seal over the whole file before anything is parsed (KVQ_ERR_INTEGRITY), then format and version.
kvq_status kvq_partial_open(const kvq_context *ctx, const char *path, kvq_partial **out, kvq_error *err);
void       kvq_partial_close(const kvq_context *ctx, kvq_partial **partial);
// All fields by name, *n of them; for kvq_fields_find and kvq_fields_compare.
const kvq_field *kvq_partial_fields(const kvq_partial *partial, int64_t *n);
// KVQ_ERR_INPUT when there is no such count, or it lies outside of low .. high.
kvq_status kvq_partial_count(const kvq_partial *partial, const char *name, int64_t low, int64_t high, int64_t *out,
                             kvq_error *err);
// dims [n_dims] of an array. KVQ_ERR_INPUT when it is missing, or has another type or number of dimensions.
kvq_status kvq_partial_dims(const kvq_partial *partial, const char *name, kvq_array_type type, int n_dims,
                            int64_t *dims, kvq_error *err);
// The whole array into data, after the same checks; its shape must be dims. Values are not looked at.
kvq_status kvq_partial_get(const kvq_partial *partial, const char *name, kvq_array_type type, int n_dims,
                           const int64_t *dims, void *data, kvq_error *err);

// ---------------------------------------------------------------- measurements

// What kvq-calibrate --measure-only saw of a model, in a sealed HDF5 file (docs/format.md): everything a fit needs,
// layer by layer, so that many fits can follow without model and text. Readable by any HDF5 program. Not for two
// threads at a time, as captures.

typedef struct kvq_measurement_writer kvq_measurement_writer;

// about: identity, dataset and provenance of the run; its quantizer and layers are not looked at. eigenvectors: of the
// second moments, which options then include. KVQ_ERR_EXISTS without force.
kvq_status kvq_measurement_create(const kvq_context *ctx, const char *path, bool force, const kvq_artifact *about,
                                  const kvq_measure_options *options, bool eigenvectors, kvq_measurement_writer **out,
                                  kvq_error *err);
// Layers in any order, each once. Computes and stores the spectrum of the moments.
kvq_status kvq_measurement_put(const kvq_context *ctx, kvq_measurement_writer *writer, int64_t layer,
                               const kvq_measured_layer *measured, kvq_error *err);
// The writer is gone afterwards, also on failure. KVQ_ERR_INTERNAL names the first layer that was not put. sha256: of
// the file before its seal, by which artifacts remember it.
kvq_status kvq_measurement_commit(const kvq_context *ctx, kvq_measurement_writer **writer, char sha256[KVQ_SHA256_HEX],
                                  kvq_error *err);
void kvq_measurement_discard(const kvq_context *ctx, kvq_measurement_writer **writer); // NULL is fine; leaves nothing

typedef struct kvq_measurement kvq_measurement;

// Verifies the seal, format and version, every attribute, and every array's type and shape.
kvq_status kvq_measurement_open(const kvq_context *ctx, const char *path, kvq_measurement **out, kvq_error *err);
void       kvq_measurement_close(const kvq_context *ctx, kvq_measurement **measurement);
const kvq_artifact        *kvq_measurement_about(const kvq_measurement *measurement); // tensors are empty
const kvq_measure_options *kvq_measurement_options(const kvq_measurement *measurement);
const char                *kvq_measurement_sha256(const kvq_measurement *measurement);
// KVQ_ERR_NUMERICAL for values that are not finite, weights and counts below 0, means outside of their bin, or
// thresholds that do not ascend, with the layer and array.
kvq_status kvq_measurement_read(const kvq_context *ctx, const kvq_measurement *measurement, int64_t layer,
                                kvq_measured_layer **out, kvq_error *err);
// Eigenvalues of 'q', 'k' or 'v' [H or Hkv, D], descending. KVQ_ERR_INPUT when there are none.
kvq_status kvq_measurement_spectrum(const kvq_context *ctx, const kvq_measurement *measurement, int64_t layer,
                                    char tensor, double *values, kvq_error *err);

// ---------------------------------------------------------------- artifacts in memory

// The content hash that a file of this artifact will have.
kvq_status kvq_artifact_hash(const kvq_context *ctx, const kvq_artifact *artifact, char content_sha256[KVQ_SHA256_HEX],
                             kvq_error *err);

// The same as bytes in memory, to be stored inside something else; *data is released with kvq_free.
kvq_status kvq_artifact_pack(const kvq_context *ctx, const kvq_artifact *artifact, uint8_t **data, size_t *bytes,
                             kvq_error *err);
kvq_status kvq_artifact_unpack(const kvq_context *ctx, const uint8_t *data, size_t bytes, kvq_artifact **out,
                               kvq_error *err);

// ---------------------------------------------------------------- earlier reports

// What two reports of kvq-validate must have in common before their windows can be compared one by one.
typedef struct kvq_report_terms {
    char    ids_sha256[KVQ_SHA256_HEX]; // of the token ids
    int64_t seq_len, n_windows;
    char    protocol[16];
    int64_t n_prompt;
} kvq_report_terms;

typedef struct kvq_report_baseline {
    char             kvq_version[32]; // of the program that measured it
    kvq_report_terms terms;
    double          *window_nll, *window_kld; // [terms.n_windows] of the quantised model, nats per token
} kvq_report_baseline;

// Reads what a comparison needs from a kvq.validate/1 document. KVQ_ERR_NOT_FOUND; KVQ_ERR_INTEGRITY when it is no
// JSON; KVQ_ERR_INPUT when it is no such report, nothing quantised was measured, or a number is missing (it is named);
// KVQ_ERR_VERSION for a later schema.
kvq_status kvq_report_baseline_read(const kvq_context *ctx, const char *path, kvq_report_baseline *out, kvq_error *err);
void       kvq_report_baseline_free(const kvq_context *ctx, kvq_report_baseline *baseline);
// KVQ_ERR_MISMATCH names the first of the terms that differs; path is for the message.
kvq_status kvq_report_baseline_matches(const kvq_report_baseline *baseline, const char *path,
                                       const kvq_report_terms *now, kvq_error *err);

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
