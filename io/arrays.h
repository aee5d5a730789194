// SPDX-License-Identifier: Apache-2.0
//
// Private to io: HDF5 files that are larger than memory: named arrays written and read row by row, and attributes of
// groups. Captures and partial results are such files; what their names mean is theirs to know.
//
// Names: "/layers/003/k" is an array, groups above it are made when needed; "/" is the root. No function is safe to be
// called by two threads at a time, also on different files: HDF5 is not. A name that does not exist is no failure where
// a function has a way to say so.
#ifndef KVQ_IO_ARRAYS_H
#define KVQ_IO_ARRAYS_H

#include "container.h"
#include "kvq_io.h"

#define ARRAYS_MAX_RANK 4
#define ARRAYS_MAX_PATH 256
#define ARRAYS_MAX_TEXT 60000 // HDF5 keeps an attribute in one object header message of at most 64 KiB

typedef struct array_spec {
    kvq_array_type type;
    int            rank; // 1 .. ARRAYS_MAX_RANK
    int64_t        shape[ARRAYS_MAX_RANK];
    int64_t        chunk[ARRAYS_MAX_RANK]; // for writing; all 0 = in one piece, without checksums
    bool           deflate;                // chunks are compressed
} array_spec;
int64_t array_elements(const array_spec *spec);
int64_t array_row_bytes(const array_spec *spec);                 // of one index of the first axis
void    array_shape_text(const array_spec *spec, char out[128]); // "[2, 8, 4]"

// ---------------------------------------------------------------- writing

// The same calls in the same order give the same bytes. Chunked arrays carry a Fletcher-32 sum per chunk.
typedef struct arrays_writer arrays_writer;

// As kvq_output_begin; nothing appears under `path` before the commit.
kvq_status arrays_begin(const kvq_context *ctx, const char *path, bool force, arrays_writer **out, kvq_error *err);
void       arrays_discard(const kvq_context *ctx, arrays_writer **writer); // NULL is fine

kvq_status arrays_put_text(arrays_writer *w, const char *group, const char *name, const char *text, kvq_error *err);
kvq_status arrays_put_i64(arrays_writer *w, const char *group, const char *name, int64_t value, kvq_error *err);
kvq_status arrays_put_u64(arrays_writer *w, const char *group, const char *name, uint64_t value, kvq_error *err);
kvq_status arrays_put_f64(arrays_writer *w, const char *group, const char *name, double value, kvq_error *err);

kvq_status arrays_create(arrays_writer *w, const char *path, const array_spec *spec, kvq_error *err);
// Rows [row, row + n_rows) of the first axis, in the array's own type.
kvq_status arrays_write(arrays_writer *w, const char *path, int64_t row, int64_t n_rows, const void *data,
                        kvq_error *err);
// Completes the file and moves it into place. With `sha256` it is sealed: the line of container.h is put behind it, and
// sha256 receives the digits of that line. Frees the writer in any case.
kvq_status arrays_commit(const kvq_context *ctx, arrays_writer **writer, char *sha256, kvq_error *err);

// ---------------------------------------------------------------- reading

// The file is not trusted. Messages start with its path.
typedef struct arrays_reader arrays_reader;

// KVQ_ERR_NOT_FOUND, KVQ_ERR_INPUT (no HDF5 file), KVQ_ERR_INTEGRITY. With `sealed` the seal is checked before HDF5
// sees a byte.
kvq_status  arrays_open(const kvq_context *ctx, const char *path, bool sealed, container_kind kind, arrays_reader **out,
                        kvq_error *err);
void        arrays_close(const kvq_context *ctx, arrays_reader **reader);
const char *arrays_path(const arrays_reader *r);
const char *arrays_sha256(const arrays_reader *r); // of a sealed file, the digits of its seal

// An attribute with one value: text of fixed length, any integer of up to 64 bits (an h5py bool is one), f32 or f64;
// numbers little-endian.
typedef enum array_value_kind { ARRAY_ABSENT, ARRAY_TEXT, ARRAY_INTEGER, ARRAY_UNSIGNED, ARRAY_REAL } array_value_kind;
typedef struct array_value {
    array_value_kind kind;
    char            *text;             // ARRAY_TEXT
    int64_t          integer;          // ARRAY_INTEGER
    uint64_t         unsigned_integer; // ARRAY_UNSIGNED: beyond INT64_MAX
    double           real;             // ARRAY_REAL
} array_value;
void array_value_free(const kvq_context *ctx, array_value *value);

// ARRAY_ABSENT when group or attribute do not exist.
kvq_status arrays_get(const kvq_context *ctx, const arrays_reader *r, const char *group, const char *name,
                      array_value *out, kvq_error *err);
// Calls visit for every attribute of a group, by name; for none when there is no such group.
typedef kvq_status (*arrays_visit_fn)(void *user, const char *name, const array_value *value, kvq_error *err);
kvq_status arrays_each(const kvq_context *ctx, const arrays_reader *r, const char *group, arrays_visit_fn visit,
                       void *user, kvq_error *err);

// Whether the name leads to something by plain hard links.
bool arrays_has(const arrays_reader *r, const char *path);
// Type and shape of an array (no chunk), after these checks: a supported type, rank 1 .. ARRAYS_MAX_RANK, stored in
// this file, by filters that need no plugin, in chunks that memory can hold, and all of it really there.
kvq_status arrays_describe(const arrays_reader *r, const char *path, array_spec *out, kvq_error *err);
// Rows as they are stored. `spec` is what arrays_describe said about this path.
kvq_status arrays_read(const arrays_reader *r, const char *path, const array_spec *spec, int64_t row, int64_t n_rows,
                       void *data, kvq_error *err);

#endif
