// SPDX-License-Identifier: Apache-2.0
//
// Private to io: how stored weights become f32. The numbers are those of GGUF tensors; safetensors files use the first
// few of the same table, so that there is one list of everything kvq can expand.
#ifndef KVQ_IO_GGML_TYPES_H
#define KVQ_IO_GGML_TYPES_H

#include <stdint.h>

enum { GGML_F32 = 0, GGML_F16 = 1, GGML_BF16 = 30, GGML_TYPE_LIMIT = 31 }; // the limit is above every type in the list

// A row of n values (a multiple of `values`) is stored as n / values blocks of `bytes` bytes, one after the other.
typedef struct ggml_type {
    uint32_t    number;
    const char *name;
    int         values, bytes;
    void (*expand)(const uint8_t *in, int64_t n_blocks, float *out); // `in` needs no alignment
} ggml_type;

const ggml_type *ggml_type_find(uint32_t number); // NULL when kvq cannot expand it
const char      *ggml_type_name(uint32_t number); // also of types that kvq cannot expand; "unknown" beyond the list

#endif
