// SPDX-License-Identifier: Apache-2.0
//
// Private to io: a validated view of one .safetensors file. Everything returned lives as long as the file is open.
#ifndef KVQ_IO_SAFETENSORS_H
#define KVQ_IO_SAFETENSORS_H

#include "ggml_types.h"
#include "kvq_io.h"

enum { SAFETENSORS_MAX_DIMS = 8 };

typedef struct safetensors_tensor {
    const char      *name;
    const char      *dtype; // as the file calls it
    const ggml_type *type;  // how to expand it; NULL for dtypes that cannot be weights, such as I64
    int              n_dims;
    int64_t          dims[SAFETENSORS_MAX_DIMS]; // outermost first
    const uint8_t   *data;                       // inside the mapping, length checked
    size_t           bytes;
} safetensors_tensor;

typedef struct safetensors_file safetensors_file;

kvq_status safetensors_open(const kvq_context *ctx, const char *path, safetensors_file **out, kvq_error *err);
void       safetensors_close(const kvq_context *ctx, safetensors_file **file);

const char *safetensors_path(const safetensors_file *file);
// Sorted by name, names are distinct.
const safetensors_tensor *safetensors_tensors(const safetensors_file *file, int64_t *n);

#endif
