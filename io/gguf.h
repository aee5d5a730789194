// SPDX-License-Identifier: Apache-2.0
//
// Private to io: a validated view of one GGUF file (v2, v3, little-endian), shared by the checkpoint and the tokenizer
// readers. Everything returned points into the mapping and lives as long as the file is open.
#ifndef KVQ_IO_GGUF_H
#define KVQ_IO_GGUF_H

#include "kvq_io.h"

typedef enum gguf_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
} gguf_type;

typedef struct gguf_string { // not zero-terminated
    const char *text;
    size_t      n;
} gguf_string;
int gguf_compare(gguf_string a, gguf_string b); // order of the bytes, as strcmp

typedef struct gguf_array {
    gguf_type      type; // of the elements; never GGUF_ARRAY (nested arrays are refused at open)
    uint64_t       count;
    const uint8_t *data; // count elements; of strings: u64 length and bytes each, bounds already checked
    const uint8_t *end;
} gguf_array;

typedef struct gguf_tensor {
    gguf_string    name;
    uint32_t       type;    // ggml type number
    int            n_dims;  // 1 .. 4
    uint64_t       dims[4]; // innermost first; a matrix of a linear layer is [n_in, n_out]
    const uint8_t *data;    // inside the mapping, length checked
    size_t         bytes;
} gguf_tensor;

typedef struct gguf_file gguf_file;

kvq_status gguf_open(const kvq_context *ctx, const char *path, gguf_file **out, kvq_error *err);
void       gguf_close(const kvq_context *ctx, gguf_file **file);
bool       gguf_is_gguf(const char *path); // a regular file that begins with the magic

const char        *gguf_path(const gguf_file *file);
const gguf_tensor *gguf_tensors(const gguf_file *file, int64_t *n);
// The bytes of the metadata section (key-value pairs), for hashing.
const uint8_t *gguf_metadata(const gguf_file *file, size_t *bytes);

// Typed look-ups: true when the key exists with a type that converts without loss (any integer type to i64, f32 to
// f64).
bool gguf_get_int(const gguf_file *file, const char *key, int64_t *out);
bool gguf_get_float(const gguf_file *file, const char *key, double *out); // integers too
bool gguf_get_bool(const gguf_file *file, const char *key, bool *out);
bool gguf_get_string(const gguf_file *file, const char *key, gguf_string *out);
bool gguf_get_array(const gguf_file *file, const char *key, gguf_type type, gguf_array *out);
bool gguf_has(const gguf_file *file, const char *key);
// Keys in file order, for messages about what is not supported. NULL text beyond the last.
gguf_string gguf_key(const gguf_file *file, int64_t index);

// Steps through an array of strings: *cursor starts as array->data.
gguf_string gguf_next_string(const gguf_array *array, const uint8_t **cursor);

#endif
