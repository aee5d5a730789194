// SPDX-License-Identifier: Apache-2.0
//
// Private to io: the two halves of a checkpoint reader. A container (a directory of safetensors, a GGUF) gives a config
// and a list of stored tensors; checkpoint.c binds what the config implies to what is stored, and reads rows.
#ifndef KVQ_IO_CHECKPOINT_H
#define KVQ_IO_CHECKPOINT_H

#include "gguf.h"
#include "safetensors.h"

typedef struct stored_tensor {
    gguf_string      name; // as the container calls it
    const char      *file;
    const char      *type_name;
    const ggml_type *type; // NULL when it cannot be a weight
    int              n_dims;
    int64_t          dims[SAFETENSORS_MAX_DIMS]; // outermost first
    const uint8_t   *data;
    size_t           bytes;
    bool             used;
} stored_tensor;

// A tensor of the model and where it is stored: the whole of a stored tensor or a range of its rows. A vector is one
// row.
typedef struct bound_tensor {
    char                 name[96]; // canonical: Hugging Face's for llama-like models, see architectures.c
    int64_t              rows, columns;
    bool                 is_vector;
    bool                 is_paired; // q and k of a GGUF: rows (of a bias: elements) lie in interleaved pairs
    const stored_tensor *stored;
    const uint8_t       *data; // of the first row
    size_t               bytes;
} bound_tensor;

struct kvq_checkpoint {
    kvq_model_config   config;
    char              *path;
    kvq_mapped_file    config_file; // config.json of a directory
    gguf_file         *gguf;        // or NULL
    safetensors_file **shards;
    int64_t            n_shards;
    stored_tensor     *stored; // sorted by name
    int64_t            n_stored;
    bound_tensor      *bound; // sorted by name
    int64_t            n_bound;
};

// Containers. They fill config, stored and whatever keeps these alive; kvq_checkpoint_close cleans up after a failure.
kvq_status checkpoint_open_directory(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err);
kvq_status checkpoint_open_gguf(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err);
// config.json; `what` names it in messages.
kvq_status hf_config_read(const kvq_context *ctx, const char *text, size_t n, const char *what, kvq_model_config *out,
                          kvq_error *err);

// Relations that hold for every architecture: whole groups of heads, even head width, ids inside the vocabulary.
kvq_status checkpoint_check_config(const kvq_model_config *config, const char *what, kvq_error *err);
// Sorts the stored tensors and refuses two of the same name.
kvq_status     checkpoint_sort_stored(kvq_checkpoint *c, kvq_error *err);
stored_tensor *checkpoint_find_stored(const kvq_checkpoint *c, gguf_string name); // NULL when there is none
// "directory/name" in fresh memory.
kvq_status checkpoint_join_path(const kvq_context *ctx, const char *directory, const char *name, char **out,
                                kvq_error *err);

// Finds what the config implies among what is stored, checks the shapes, and refuses a stored tensor that nothing
// refers to. Fills bound.
kvq_status checkpoint_bind(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err);

// Tells the kernel that the pages which lie wholly inside `bytes` bytes of a mapped file are not needed now. They are
// read from the file again when they are.
void checkpoint_forget_bytes(const uint8_t *data, size_t bytes);

// ---------------------------------------------------------------- architectures

// A size that a tensor's shape refers to.
typedef enum tensor_extent {
    EXTENT_ZERO,
    EXTENT_ONE,
    EXTENT_VOCAB,
    EXTENT_HIDDEN,
    EXTENT_FFN,
    EXTENT_GATE_UP, // both halves of a fused MLP
    EXTENT_HEAD,
    EXTENT_QUERY,
    EXTENT_KEY,
    EXTENT_QUERY_KEY, // of a fused attention: what comes before v
    EXTENT_QKV,
    EXTENT_EXPERTS
} tensor_extent;

// When a tensor must be there.
typedef enum tensor_when { WHEN_ALWAYS, WHEN_UNTIED, WHEN_QKV_BIAS, WHEN_O_BIAS, WHEN_MLP_BIAS } tensor_when;

// How often: names of layer tensors follow "model.layers.N." and "blk.N."; '#' in them stands for the expert.
typedef enum tensor_scope { PER_MODEL, PER_LAYER, PER_EXPERT } tensor_scope;

// One tensor of an architecture.
typedef struct tensor_role {
    const char   *name;          // canonical
    const char   *gguf;          // NULL where no GGUF form is supported
    tensor_extent rows, columns; // a vector has EXTENT_ONE rows
    tensor_scope  scope;
    tensor_when   when;
    bool          is_rotated;   // rows are in the order of rotary channels
    const char   *stored;       // in safetensors when that differs from the canonical name
    tensor_extent first, fused; // it is rows [first, first + rows) of a stored matrix of `fused` rows; 0 = all of it
} tensor_role;

typedef struct tensor_group {
    const tensor_role *roles;
    int                n_roles;
} tensor_group;

enum { MAX_TENSOR_GROUPS = 8 };

typedef struct architecture {
    const char        *name;
    const char        *prefix;  // of the names in safetensors, or NULL
    const char *const *ignored; // beginnings of stored names that are no part of the decoder, NULL at the end; or NULL
    bool               gguf_pairs; // a GGUF stores rotated rows in interleaved pairs
    tensor_group       groups[MAX_TENSOR_GROUPS];
} architecture;

const architecture *architecture_find(const char *name); // NULL when kvq does not know it

#endif
