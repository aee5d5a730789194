// SPDX-License-Identifier: Apache-2.0
//
// GGUF v2 and v3: magic, version, counts, key-value pairs, tensor infos, padding, tensor data. Everything is checked at
// open, so that the look-ups below cannot fail on a damaged file.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml_types.h"
#include "gguf.h"

#define MAGIC             "GGUF"
#define DEFAULT_ALIGNMENT 32
#define MAX_NAME          65535 // of keys and tensors: the format's limit for keys, and small enough for a printf precision

typedef struct pair {
    gguf_string    key;
    gguf_type      type;
    const uint8_t *value; // scalars: the bytes; strings: u64 length and text
    gguf_array     array; // when type is GGUF_ARRAY
} pair;

struct gguf_file {
    kvq_mapped_file map;
    char           *path;
    pair           *pairs;
    const pair    **by_key; // sorted
    int64_t         n_pairs;
    gguf_tensor    *tensors;
    int64_t         n_tensors;
    const uint8_t  *metadata;
    size_t          metadata_bytes;
};

int gguf_compare(gguf_string a, gguf_string b) {
    int order = memcmp(a.text, b.text, a.n < b.n ? a.n : b.n);
    return order != 0 ? order : (a.n > b.n) - (a.n < b.n);
}

// ---------------------------------------------------------------- reading with bounds

typedef struct reader {
    const uint8_t *begin, *at, *end;
    const char    *path;
} reader;

// `what` names the thing being read; file positions in messages are bytes from the start.
static kvq_status take(reader *r, uint64_t bytes, const char *what, const uint8_t **out, kvq_error *err) {
    uint64_t left = (uint64_t)(r->end - r->at);
    if (bytes > left) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: ends inside %s at byte %lld: %llu bytes needed, %llu left",
                        r->path, what, (long long)(r->at - r->begin), (unsigned long long)bytes,
                        (unsigned long long)left);
    }
    *out = r->at;
    r->at += bytes;
    return KVQ_OK;
}

static kvq_status take_u32(reader *r, const char *what, uint32_t *out, kvq_error *err) {
    const uint8_t *p = NULL;
    kvq_status     status = take(r, sizeof *out, what, &p, err);
    if (status == KVQ_OK) memcpy(out, p, sizeof *out);
    return status;
}

static kvq_status take_u64(reader *r, const char *what, uint64_t *out, kvq_error *err) {
    const uint8_t *p = NULL;
    kvq_status     status = take(r, sizeof *out, what, &p, err);
    if (status == KVQ_OK) memcpy(out, p, sizeof *out);
    return status;
}

static kvq_status take_string(reader *r, const char *what, gguf_string *out, kvq_error *err) {
    uint64_t       n = 0;
    const uint8_t *p = NULL;
    kvq_status     status = take_u64(r, what, &n, err);
    if (status == KVQ_OK) status = take(r, n, what, &p, err);
    if (status == KVQ_OK) *out = (gguf_string){(const char *)p, (size_t)n};
    return status;
}

static kvq_status take_name(reader *r, const char *what, gguf_string *out, kvq_error *err) {
    gguf_string name = {NULL, 0};
    long long   at = (long long)(r->at - r->begin);
    kvq_status  status = take_string(r, what, &name, err);
    if (status != KVQ_OK) return status;
    if (name.n > MAX_NAME) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: %s at byte %lld has %zu bytes, allowed are %d", r->path,
                        what, at, name.n, MAX_NAME);
    }
    *out = name;
    return KVQ_OK;
}

// Bytes of a value, 0 for those without a fixed size.
static const uint8_t SCALAR_BYTES[] = {
    [GGUF_U8] = 1,  [GGUF_I8] = 1,  [GGUF_U16] = 2,  [GGUF_I16] = 2,    [GGUF_U32] = 4,
    [GGUF_I32] = 4, [GGUF_F32] = 4, [GGUF_BOOL] = 1, [GGUF_STRING] = 0, [GGUF_ARRAY] = 0,
    [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8,
};

static kvq_status check_value_type(const reader *r, uint32_t type, gguf_string key, kvq_error *err) {
    if (type <= GGUF_F64) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: key '%.*s' has value type %u, known are 0 to %d", r->path,
                    (int)key.n, key.text, type, (int)GGUF_F64);
}

static kvq_status take_array(reader *r, gguf_string key, gguf_array *out, kvq_error *err) {
    kvq_status     status;
    uint32_t       type = 0;
    gguf_array     array = {.type = GGUF_U8};
    const uint8_t *p = NULL;
    KVQ_TRY(take_u32(r, "an array's type", &type, err));
    KVQ_TRY(check_value_type(r, type, key, err));
    KVQ_TRY(take_u64(r, "an array's length", &array.count, err));
    if (type == GGUF_ARRAY) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: key '%.*s' is an array of arrays", r->path, (int)key.n,
                        key.text);
    }
    array.type = (gguf_type)type;
    array.data = r->at;
    if (type == GGUF_STRING) {
        gguf_string s;
        for (uint64_t i = 0; i < array.count; i++) KVQ_TRY(take_string(r, "an array of strings", &s, err));
    } else if (array.count > (uint64_t)(r->end - r->at) / SCALAR_BYTES[type]) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: the array '%.*s' of %llu elements goes beyond the end",
                          r->path, (int)key.n, key.text, (unsigned long long)array.count);
        goto done;
    } else {
        KVQ_TRY(take(r, array.count * SCALAR_BYTES[type], "an array", &p, err));
    }
    array.end = r->at;
    *out = array;
done:
    return status;
}

static kvq_status take_pair(reader *r, pair *out, kvq_error *err) {
    kvq_status  status;
    uint32_t    type = 0;
    gguf_string text;
    KVQ_TRY(take_name(r, "a key", &out->key, err));
    KVQ_TRY(take_u32(r, "a value's type", &type, err));
    KVQ_TRY(check_value_type(r, type, out->key, err));
    out->type = (gguf_type)type;
    out->value = r->at;
    if (type == GGUF_ARRAY) {
        KVQ_TRY(take_array(r, out->key, &out->array, err));
    } else if (type == GGUF_STRING) {
        KVQ_TRY(take_string(r, "a string", &text, err));
    } else {
        KVQ_TRY(take(r, SCALAR_BYTES[type], "a value", &out->value, err));
    }
    if (type == GGUF_BOOL && out->value[0] > 1) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: key '%.*s' is the boolean %u", r->path, (int)out->key.n,
                          out->key.text, out->value[0]);
    }
done:
    return status;
}

// ---------------------------------------------------------------- tensors

// Bytes of a tensor from type and dimensions; every product is checked.
static kvq_status tensor_bytes(const reader *r, gguf_tensor *t, kvq_error *err) {
    const ggml_type *type = ggml_type_find(t->type);
    if (type == NULL) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                        "use a file quantised to F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K .. Q6_K",
                        "%s: tensor '%.*s' has type %s (%u), which kvq cannot expand", r->path, (int)t->name.n,
                        t->name.text, ggml_type_name(t->type), t->type);
    }
    uint64_t values = (uint64_t)type->values, total;
    if (t->dims[0] % values != 0) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                        "%s: tensor '%.*s' has rows of %llu values, not a multiple of %llu (%s)", r->path,
                        (int)t->name.n, t->name.text, (unsigned long long)t->dims[0], (unsigned long long)values,
                        type->name);
    }
    total = t->dims[0] / values;
    for (int i = 0; i < 4; i++) {
        uint64_t factor = i == 0 ? (uint64_t)type->bytes : t->dims[i];
        if (factor == 0 || t->dims[i] > INT64_MAX || total == 0 || total > INT64_MAX / factor) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                            "%s: tensor '%.*s' is empty or impossibly large (dimension %d is %llu)", r->path,
                            (int)t->name.n, t->name.text, i, (unsigned long long)t->dims[i]);
        }
        total *= factor;
    }
    t->bytes = (size_t)total;
    return KVQ_OK;
}

// Reads one tensor info. The data offset is relative to a place that is known only after the last info, so it stays in
// *offset until then.
static kvq_status take_tensor(reader *r, gguf_tensor *t, uint64_t *offset, kvq_error *err) {
    kvq_status status;
    uint32_t   n_dims = 0;
    KVQ_TRY(take_name(r, "a tensor's name", &t->name, err));
    KVQ_TRY(take_u32(r, "a tensor's rank", &n_dims, err));
    if (n_dims < 1 || n_dims > 4) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%.*s' has %u dimensions, possible are 1 to 4",
                          r->path, (int)t->name.n, t->name.text, n_dims);
        goto done;
    }
    t->n_dims = (int)n_dims;
    for (uint32_t i = 0; i < 4; i++) t->dims[i] = 1;
    for (uint32_t i = 0; i < n_dims; i++) KVQ_TRY(take_u64(r, "a tensor's shape", &t->dims[i], err));
    KVQ_TRY(take_u32(r, "a tensor's type", &t->type, err));
    KVQ_TRY(take_u64(r, "a tensor's offset", offset, err));
    KVQ_TRY(tensor_bytes(r, t, err));
done:
    return status;
}

static int by_name(const void *a, const void *b) {
    return gguf_compare((*(const gguf_tensor *const *)a)->name, (*(const gguf_tensor *const *)b)->name);
}

static int by_place(const void *a, const void *b) {
    const uint8_t *x = (*(const gguf_tensor *const *)a)->data, *y = (*(const gguf_tensor *const *)b)->data;
    return (x > y) - (x < y);
}

// No two tensors share a name or bytes.
static kvq_status check_tensors_distinct(const kvq_context *ctx, const gguf_file *f, kvq_error *err) {
    const gguf_tensor **sorted = NULL;
    kvq_status          status = KVQ_NEW(ctx, f->n_tensors, "GGUF tensor order", &sorted, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < f->n_tensors; i++) sorted[i] = &f->tensors[i];
    qsort(sorted, (size_t)f->n_tensors, sizeof(const gguf_tensor *), by_name);
    for (int64_t i = 1; i < f->n_tensors && status == KVQ_OK; i++) {
        if (gguf_compare(sorted[i - 1]->name, sorted[i]->name) != 0) continue;
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%.*s' appears twice", f->path,
                          (int)sorted[i]->name.n, sorted[i]->name.text);
    }
    qsort(sorted, (size_t)f->n_tensors, sizeof(const gguf_tensor *), by_place);
    for (int64_t i = 1; i < f->n_tensors && status == KVQ_OK; i++) {
        if (sorted[i - 1]->data + sorted[i - 1]->bytes <= sorted[i]->data) continue;
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensors '%.*s' and '%.*s' overlap", f->path,
                          (int)sorted[i - 1]->name.n, sorted[i - 1]->name.text, (int)sorted[i]->name.n,
                          sorted[i]->name.text);
    }
    kvq_free(ctx, sorted);
    return status;
}

// Turns the offset of a tensor into a pointer.
static kvq_status place_tensor(const reader *r, const uint8_t *data, uint64_t alignment, uint64_t offset,
                               gguf_tensor *t, kvq_error *err) {
    uint64_t available = (uint64_t)(r->end - data);
    if (offset % alignment != 0) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%.*s' starts at %llu, not a multiple of %llu",
                        r->path, (int)t->name.n, t->name.text, (unsigned long long)offset,
                        (unsigned long long)alignment);
    }
    if (offset > available || t->bytes > available - offset) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, "fetch the file again; it is probably incomplete",
                        "%s: tensor '%.*s' (%zu bytes at %llu) goes beyond the end of the %llu data bytes", r->path,
                        (int)t->name.n, t->name.text, t->bytes, (unsigned long long)offset,
                        (unsigned long long)available);
    }
    t->data = data + offset;
    return KVQ_OK;
}

static kvq_status read_alignment(const gguf_file *f, uint64_t *alignment, kvq_error *err) {
    int64_t value = DEFAULT_ALIGNMENT;
    bool    given = gguf_has(f, "general.alignment");
    if (given && (!gguf_get_int(f, "general.alignment", &value) || value < 8 || value > 1 << 20 || value % 8 != 0)) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: general.alignment is not a multiple of 8 (%lld)", f->path,
                        (long long)value);
    }
    *alignment = (uint64_t)value;
    return KVQ_OK;
}

static kvq_status read_tensors(const kvq_context *ctx, reader *r, gguf_file *f, kvq_error *err) {
    kvq_status     status;
    uint64_t      *offsets = NULL, alignment = 0, padding;
    const uint8_t *data = NULL;
    KVQ_TRY(read_alignment(f, &alignment, err));
    KVQ_TRY(KVQ_NEW(ctx, f->n_tensors, "GGUF tensor offsets", &offsets, err));
    KVQ_TRY(KVQ_NEW(ctx, f->n_tensors, "GGUF tensors", &f->tensors, err));
    for (int64_t i = 0; i < f->n_tensors; i++) KVQ_TRY(take_tensor(r, &f->tensors[i], &offsets[i], err));
    if (f->n_tensors > 0) { // a file that holds a vocabulary alone may end here
        padding = (alignment - (uint64_t)(r->at - r->begin) % alignment) % alignment;
        KVQ_TRY(take(r, padding, "the padding in front of the data", &data, err));
    }
    data = r->at;
    for (int64_t i = 0; i < f->n_tensors; i++)
        KVQ_TRY(place_tensor(r, data, alignment, offsets[i], &f->tensors[i], err));
    KVQ_TRY(check_tensors_distinct(ctx, f, err));
done:
    kvq_free(ctx, offsets);
    return status;
}

// ---------------------------------------------------------------- metadata

static int by_pair_key(const void *a, const void *b) {
    return gguf_compare((*(const pair *const *)a)->key, (*(const pair *const *)b)->key);
}

static kvq_status read_pairs(const kvq_context *ctx, reader *r, gguf_file *f, kvq_error *err) {
    kvq_status status;
    KVQ_TRY(KVQ_NEW(ctx, f->n_pairs, "GGUF metadata", &f->pairs, err));
    KVQ_TRY(KVQ_NEW(ctx, f->n_pairs, "GGUF key order", &f->by_key, err));
    f->metadata = r->at;
    for (int64_t i = 0; i < f->n_pairs; i++) {
        KVQ_TRY(take_pair(r, &f->pairs[i], err));
        f->by_key[i] = &f->pairs[i];
    }
    f->metadata_bytes = (size_t)(r->at - f->metadata);
    qsort(f->by_key, (size_t)f->n_pairs, sizeof(const pair *), by_pair_key);
    for (int64_t i = 1; i < f->n_pairs; i++) {
        gguf_string key = f->by_key[i]->key;
        if (gguf_compare(f->by_key[i - 1]->key, key) != 0) continue;
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: key '%.*s' appears twice", f->path, (int)key.n, key.text);
        goto done;
    }
done:
    return status;
}

// Counts are compared with what the rest of the file could hold at most, so that a damaged count is named here and not
// by an allocation. Smallest pair: empty key (8), type (4), one byte; smallest tensor info: 8 + 4 + 8 + 4 + 8.
static kvq_status read_header(reader *r, gguf_file *f, kvq_error *err) {
    kvq_status     status;
    const uint8_t *magic = NULL;
    uint32_t       version = 0;
    uint64_t       n_tensors = 0, n_pairs = 0, left;
    KVQ_TRY(take(r, 4, "the magic", &magic, err));
    if (memcmp(magic, MAGIC, 4) != 0) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: is not a GGUF file", r->path);
    KVQ_TRY(take_u32(r, "the version", &version, err));
    if ((version & 0xffffu) == 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "convert it to little-endian", "%s: is a big-endian GGUF", r->path);
    }
    if (version != 2 && version != 3) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "convert the model again with a current converter",
                        "%s: is GGUF version %u; supported are 2 and 3", r->path, version);
    }
    KVQ_TRY(take_u64(r, "the tensor count", &n_tensors, err));
    KVQ_TRY(take_u64(r, "the key count", &n_pairs, err));
    left = (uint64_t)(r->end - r->at);
    if (n_pairs > left / 13 || n_tensors > left / 32) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: announces %llu keys and %llu tensors in %llu bytes", r->path,
                        (unsigned long long)n_pairs, (unsigned long long)n_tensors, (unsigned long long)left);
    }
    f->n_pairs = (int64_t)n_pairs;
    f->n_tensors = (int64_t)n_tensors;
done:
    return status;
}

kvq_status gguf_open(const kvq_context *ctx, const char *path, gguf_file **out, kvq_error *err) {
    kvq_status status;
    gguf_file *f = NULL;
    reader     r = {.path = path};
    KVQ_TRY(KVQ_NEW(ctx, 1, "GGUF file", &f, err));
    f->path = kvq_strdup(ctx, path);
    if (f->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: could not allocate its name", path);
        goto done;
    }
    KVQ_TRY(kvq_map_file(path, &f->map, err));
    if (f->map.bytes == 0) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: is an empty file", path);
        goto done;
    }
    r.begin = r.at = f->map.data;
    r.end = r.begin + f->map.bytes;
    KVQ_TRY(read_header(&r, f, err));
    KVQ_TRY(read_pairs(ctx, &r, f, err));
    KVQ_TRY(read_tensors(ctx, &r, f, err));
    *out = f;
    f = NULL;
done:
    gguf_close(ctx, &f);
    return status;
}

void gguf_close(const kvq_context *ctx, gguf_file **file) {
    gguf_file *f = *file;
    if (f == NULL) return;
    kvq_unmap_file(&f->map);
    kvq_free(ctx, f->path);
    kvq_free(ctx, f->pairs);
    kvq_free(ctx, f->by_key);
    kvq_free(ctx, f->tensors);
    kvq_free(ctx, f);
    *file = NULL;
}

bool gguf_is_gguf(const char *path) {
    kvq_mapped_file map = {0};
    if (kvq_map_file(path, &map, NULL) != KVQ_OK) return false;
    bool yes = map.bytes >= 4 && memcmp(map.data, MAGIC, 4) == 0;
    kvq_unmap_file(&map);
    return yes;
}

// ---------------------------------------------------------------- look-ups

const char *gguf_path(const gguf_file *file) { return file->path; }

const gguf_tensor *gguf_tensors(const gguf_file *file, int64_t *n) {
    *n = file->n_tensors;
    return file->tensors;
}

const uint8_t *gguf_metadata(const gguf_file *file, size_t *bytes) {
    *bytes = file->metadata_bytes;
    return file->metadata;
}

static const pair *find(const gguf_file *file, const char *key) {
    pair        wanted = {.key = {key, strlen(key)}};
    const pair *pointer = &wanted;
    if (file->n_pairs == 0) return NULL;
    const pair **found = bsearch(&pointer, file->by_key, (size_t)file->n_pairs, sizeof(const pair *), by_pair_key);
    return found != NULL ? *found : NULL;
}

bool gguf_has(const gguf_file *file, const char *key) { return find(file, key) != NULL; }

gguf_string gguf_key(const gguf_file *file, int64_t index) {
    return index >= 0 && index < file->n_pairs ? file->pairs[index].key : (gguf_string){NULL, 0};
}

// One case per stored type: a table could not express the sign extension.
static bool int_of(const pair *p, int64_t *out) {
    uint64_t raw = 0;
    if (p == NULL) return false;
    switch (p->type) {
    case GGUF_U8:
        *out = p->value[0];
        return true;
    case GGUF_I8:
        *out = (int8_t)p->value[0];
        return true;
    case GGUF_U16:
        memcpy(&raw, p->value, 2);
        *out = (int64_t)raw;
        return true;
    case GGUF_I16:
        memcpy(&raw, p->value, 2);
        *out = (int16_t)raw;
        return true;
    case GGUF_U32:
        memcpy(&raw, p->value, 4);
        *out = (int64_t)raw;
        return true;
    case GGUF_I32:
        memcpy(&raw, p->value, 4);
        *out = (int32_t)raw;
        return true;
    case GGUF_U64:
        memcpy(&raw, p->value, 8);
        *out = (int64_t)raw;
        return raw <= INT64_MAX;
    case GGUF_I64:
        memcpy(&raw, p->value, 8);
        *out = (int64_t)raw;
        return true;
    default:
        return false;
    }
}

bool gguf_get_int(const gguf_file *file, const char *key, int64_t *out) {
    int64_t value = 0;
    if (!int_of(find(file, key), &value)) return false;
    *out = value;
    return true;
}

bool gguf_get_float(const gguf_file *file, const char *key, double *out) {
    const pair *p = find(file, key);
    int64_t     integer = 0;
    float       narrow = 0;
    if (p == NULL) return false;
    if (p->type == GGUF_F64) {
        memcpy(out, p->value, sizeof *out);
    } else if (p->type == GGUF_F32) {
        memcpy(&narrow, p->value, sizeof narrow);
        *out = (double)narrow;
    } else if (int_of(p, &integer)) {
        *out = (double)integer;
    } else {
        return false;
    }
    return true;
}

bool gguf_get_bool(const gguf_file *file, const char *key, bool *out) {
    const pair *p = find(file, key);
    if (p == NULL || p->type != GGUF_BOOL) return false;
    *out = p->value[0] != 0;
    return true;
}

bool gguf_get_string(const gguf_file *file, const char *key, gguf_string *out) {
    const pair *p = find(file, key);
    uint64_t    n = 0;
    if (p == NULL || p->type != GGUF_STRING) return false;
    memcpy(&n, p->value, sizeof n);
    *out = (gguf_string){(const char *)p->value + sizeof n, (size_t)n};
    return true;
}

bool gguf_get_array(const gguf_file *file, const char *key, gguf_type type, gguf_array *out) {
    const pair *p = find(file, key);
    if (p == NULL || p->type != GGUF_ARRAY || p->array.type != type) return false;
    *out = p->array;
    return true;
}

gguf_string gguf_next_string(const gguf_array *array, const uint8_t **cursor) {
    uint64_t n = 0;
    if (*cursor >= array->end) return (gguf_string){NULL, 0};
    memcpy(&n, *cursor, sizeof n);
    gguf_string s = {(const char *)*cursor + sizeof n, (size_t)n};
    *cursor += sizeof n + n;
    return s;
}
