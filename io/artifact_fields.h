// SPDX-License-Identifier: Apache-2.0
//
// Private to io: the attributes of files as tables of members of structs, and the one way to check, print and set such
// a member. Artifacts (as records) and measurements (as attributes of an array file) use the same tables, so that a
// model or a text is described by the same names in both. Messages name the field; callers put the file in front.
#ifndef KVQ_IO_ARTIFACT_FIELDS_H
#define KVQ_IO_ARTIFACT_FIELDS_H

#include "kvq_io.h"
#include "records.h"

// Whom a field or an array is about, as a set: K or V of a scheme of the quantizer. Of what belongs to no tensor the
// scheme alone counts.
enum field_of {
    OF_NUQ_K = 1,
    OF_NUQ_V = 2,
    OF_ALLOC_K = 4,
    OF_ALLOC_V = 8,
    OF_NUQ = OF_NUQ_K | OF_NUQ_V,
    OF_ALLOC = OF_ALLOC_K | OF_ALLOC_V,
    OF_K = OF_NUQ_K | OF_ALLOC_K,
    OF_V = OF_NUQ_V | OF_ALLOC_V,
    OF_ALL = OF_NUQ | OF_ALLOC,
};

typedef enum field_kind {
    FIELD_TEXT,   // char *
    FIELD_HASH,   // char[KVQ_SHA256_HEX]: "" or 64 digits
    FIELD_I64,    // int64_t
    FIELD_INT,    // int, stored as i64
    FIELD_BOOL,   // bool, stored as i64 0 or 1
    FIELD_U64,    // uint64_t
    FIELD_F64,    // double
    FIELD_CHOICE, // an enumeration from 0 up, stored by name
} field_kind;

typedef struct field {
    const char        *group; // from the root, or below the group of a tensor or layer
    const char        *name;
    field_kind         kind;
    size_t             offset;    // in the struct
    double             low, high; // legal range of i64, int, bool and f64
    const char *const *names;     // of a choice, NULL at the end
    // The minor version that brought the field. Files of an older one lack it and mean the zero of its kind (of a
    // choice the first name): what those versions did, or "not known".
    int      since;
    unsigned of; // field_of: files and tensors that have it
} field;

#define FIELD_NUMBER(type, group, name, kind, member, low, high, since, of)                                            \
    { group, name, kind, offsetof(type, member), low, high, NULL, since, of }
#define FIELD_WORDS(type, group, name, kind, member, since, of)                                                        \
    { group, name, kind, offsetof(type, member), 0, 0, NULL, since, of }
#define FIELD_NAMED(type, group, name, member, names, since, of)                                                       \
    { group, name, FIELD_CHOICE, offsetof(type, member), 0, 0, names, since, of }

#define FIELD_TOKENS_MAX    0x1p31 // of one window and of one sequence; products with sizes of a model stay in 63 bits
#define FIELD_COUNT_MAX     0x1p53 // counts beyond are damage; and every JSON reader holds integers up to here
#define ARTIFACT_MAX_LAYERS 1000   // three digits name a layer
#define QUANTIZER_GROUP     "/quantizer"
#define QUANTIZER_SCHEME    QUANTIZER_GROUP "@scheme"
#define TARGET_BITS_MAX     32  // more than nothing at all saves
#define SCALE_EXPONENT_MAX  200 // powers of two of f32 and their inverses, with room for e4m3

// Members of kvq_artifact, all but its layers.
extern const field  ARTIFACT_FIELDS[];
extern const size_t N_ARTIFACT_FIELDS;

// A member's value as it is stored.
typedef struct field_value {
    record_type type; // text, i64, u64 or f64
    const char *text; // borrowed
    union {
        int64_t  i;
        uint64_t u;
        double   f;
    } number;
} field_value;

record_type field_stored_as(const field *f);

// Of `base`, the struct that the table is about; `path` is the field's name in messages. Both refuse what is out of
// range (KVQ_ERR_INPUT), not finite (KVQ_ERR_NUMERICAL), or a name that is not known (KVQ_ERR_UNSUPPORTED).
kvq_status field_get(const field *f, const char *path, const void *base, field_value *out, kvq_error *err);
// `value` has the type that field_stored_as gives.
kvq_status field_set(const kvq_context *ctx, const field *f, const char *path, void *base, const field_value *value,
                     kvq_error *err);

// d = Hkv * D, the width of a row; each factor was checked to be small. KVQ_ERR_UNSUPPORTED for rows that the codec
// cannot number.
static inline int64_t artifact_row_width(const kvq_artifact *a) { return a->model.n_kv_heads * a->model.head_dim; }
kvq_status            artifact_check_row_width(const kvq_artifact *a, kvq_error *err);

#endif
