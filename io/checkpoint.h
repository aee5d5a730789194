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

// A tensor of the model and where it is stored. A vector is one row.
typedef struct bound_tensor {
    char                 name[96]; // Hugging Face name
    int64_t              rows, columns;
    bool                 is_vector;
    bool                 is_paired; // q and k of a GGUF: rows (of a bias: elements) lie in interleaved pairs
    const stored_tensor *stored;
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

// ---------------------------------------------------------------- architectures

// A size that a tensor's shape refers to.
typedef enum tensor_extent {
    EXTENT_ONE,
    EXTENT_VOCAB,
    EXTENT_HIDDEN,
    EXTENT_FFN,
    EXTENT_QUERY,
    EXTENT_KEY
} tensor_extent;

// When a tensor must be there.
typedef enum tensor_when { WHEN_ALWAYS, WHEN_UNTIED, WHEN_QKV_BIAS, WHEN_O_BIAS, WHEN_MLP_BIAS } tensor_when;

// One tensor of an architecture. Names of layer tensors follow "model.layers.N." and "blk.N.".
typedef struct tensor_role {
    const char   *hf, *gguf;
    bool          per_layer, is_paired;
    tensor_extent rows, columns; // a vector has EXTENT_ONE rows
    tensor_when   when;
} tensor_role;

// Tensors of the architecture called `name`, NULL when kvq does not know it.
const tensor_role *architecture_tensors(const char *name, int *n_roles);
// Names of all architectures, for messages.
extern const char ARCHITECTURE_NAMES[];

#endif
