// SPDX-License-Identifier: Apache-2.0
//
// Private to io: what an artifact says, as a flat sorted list of typed records. The list is the one place where memory,
// file and exports meet: artifact_schema.c makes it from an artifact and back, records_hdf5.c stores and loads it, the
// exports print it, and the content hash is defined over it. None of them knows the others.
#ifndef KVQ_IO_RECORDS_H
#define KVQ_IO_RECORDS_H

#include "kvq_core.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records hold little-endian bytes as they lie in memory"
#endif

#define RECORD_MAX_RANK 3
#define RECORD_MAX_PATH 256
#define RECORD_MAX_TEXT 60000 // HDF5 keeps an attribute in one object header message of at most 64 KiB

typedef enum record_type { RECORD_TEXT, RECORD_I64, RECORD_U64, RECORD_F64, RECORD_F32, RECORD_N_TYPES } record_type;

extern const char *const RECORD_TYPE_NAMES[RECORD_N_TYPES]; // "utf8", "i64", "u64", "f64", "f32"
extern const size_t      RECORD_TYPE_BYTES[RECORD_N_TYPES]; // of one element

typedef struct record {
    char
        *path; // "/layers/000/k/codebook" is a dataset, "/layers/000/k@bits" an attribute of a group, "/@x" of the root
    record_type type;
    int         rank;                   // 0 = one value, as all text is
    int64_t     shape[RECORD_MAX_RANK]; // the first `rank` are used
    void       *data;                   // row-major; text has a final zero that `bytes` leaves out
    size_t      bytes;
    bool        taken; // by record_take
} record;

typedef struct record_list {
    record *items;
    int64_t count, capacity;
} record_list;

void record_list_free(const kvq_context *ctx, record_list *list);

// Appends a zeroed record; the caller fills `bytes` bytes of *data.
kvq_status record_reserve(const kvq_context *ctx, record_list *list, const char *path, record_type type, int rank,
                          const int64_t *shape, size_t bytes, void **data, kvq_error *err);
// Appends a copy. The size of numbers follows from the shape, that of text from its final zero.
kvq_status record_add(const kvq_context *ctx, record_list *list, const char *path, record_type type, int rank,
                      const int64_t *shape, const void *data, kvq_error *err);

void          record_sort(record_list *list);                         // by the bytes of the path
const record *record_find(const record_list *list, const char *path); // in a sorted list; NULL = absent
const record *record_take(record_list *list, const char *path);       // the same, and marks it as understood
const record *record_first_untaken(const record_list *list);          // NULL when everything was understood
int64_t       record_n_elements(const record *r);

// SHA-256 over the records of a sorted list whose path `covers` accepts: for each the line
// "path TAB type TAB shape TAB bytes LF", the shape as decimal numbers with commas, then the bytes themselves.
kvq_status record_hash(const record_list *list, bool (*covers)(const char *path), char hex[KVQ_SHA256_HEX],
                       kvq_error *err);

// ---------------------------------------------------------------- as an HDF5 file in memory

// The list as the bytes of an HDF5 file, the same bytes for the same list, with `room` zeros behind it that *bytes
// leaves out. Release with kvq_free.
kvq_status records_to_hdf5(const kvq_context *ctx, const record_list *list, size_t room, uint8_t **image, size_t *bytes,
                           kvq_error *err);
// All datasets and attributes of an HDF5 file, sorted. Refuses, naming the object, whatever is not a plain hard link to
// a group or a dataset of one of the record types.
kvq_status records_from_hdf5(const kvq_context *ctx, const uint8_t *image, size_t bytes, record_list *out,
                             kvq_error *err);

#endif
