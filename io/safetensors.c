// SPDX-License-Identifier: Apache-2.0
//
// safetensors: u64 length of a JSON header, the header, tensor data. The format promises that the tensors tile the data
// without holes or overlaps, so a file that breaks the promise is damaged or hides something, and is refused.
#include <stdlib.h>
#include <string.h>

#include "json_read.h"
#include "safetensors.h"

#define MAX_HEADER 100000000u // bytes; the limit of the reference implementation

struct safetensors_file {
    kvq_mapped_file     map;
    char               *path;
    cJSON              *header; // owns names and dtypes
    safetensors_tensor *tensors;
    int64_t             n_tensors;
};

// Every dtype with a size of whole bytes; `number` is the row of ggml_types.c that expands it, or NONE.
#define NONE UINT32_MAX
static const struct {
    const char *name;
    int         bytes;
    uint32_t    number;
} DTYPES[] = {
    {"F32", 4, GGML_F32}, {"F16", 2, GGML_F16}, {"BF16", 2, GGML_BF16}, {"F64", 8, NONE},
    {"I64", 8, NONE},     {"I32", 4, NONE},     {"I16", 2, NONE},       {"I8", 1, NONE},
    {"U64", 8, NONE},     {"U32", 4, NONE},     {"U16", 2, NONE},       {"U8", 1, NONE},
    {"BOOL", 1, NONE},    {"F8_E4M3", 1, NONE}, {"F8_E5M2", 1, NONE},   {"F8_E8M0", 1, NONE},
};

static int find_dtype(const char *name) {
    for (int i = 0; i < (int)(sizeof DTYPES / sizeof *DTYPES); i++) {
        if (strcmp(DTYPES[i].name, name) == 0) return i;
    }
    return -1;
}

// ---------------------------------------------------------------- one entry of the header

// An exact, non-negative integer element of a JSON array.
static bool get_index(const cJSON *item, int64_t *out) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= 0x1p53)) return false;
    *out = (int64_t)item->valuedouble;
    return (double)*out == item->valuedouble;
}

static kvq_status read_shape(const safetensors_file *f, const cJSON *entry, safetensors_tensor *t, kvq_error *err) {
    const cJSON *item, *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    if (!cJSON_IsArray(shape)) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%s' has no shape", f->path, t->name);
    }
    t->n_dims = 0;
    cJSON_ArrayForEach(item, shape) {
        if (t->n_dims == SAFETENSORS_MAX_DIMS || !get_index(item, &t->dims[t->n_dims])) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                            "%s: tensor '%s' has a shape that is not a list of at most %d sizes", f->path, t->name,
                            (int)SAFETENSORS_MAX_DIMS);
        }
        t->n_dims++;
    }
    return KVQ_OK;
}

// The data range, which must be what dtype and shape ask for and lie inside the data section of `available` bytes.
static kvq_status read_range(const safetensors_file *f, const cJSON *entry, const uint8_t *data, size_t available,
                             int value_bytes, safetensors_tensor *t, kvq_error *err) {
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    int64_t      begin = 0, end = 0, bytes = value_bytes;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !get_index(cJSON_GetArrayItem(offsets, 0), &begin) || !get_index(cJSON_GetArrayItem(offsets, 1), &end) ||
        begin > end) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%s' has no valid data_offsets", f->path, t->name);
    }
    if ((uint64_t)end > available) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, "fetch the file again; it is probably incomplete",
                        "%s: tensor '%s' ends at data byte %lld, the file has %zu", f->path, t->name, (long long)end,
                        available);
    }
    for (int i = 0; i < t->n_dims; i++) {
        if (t->dims[i] != 0 && bytes > INT64_MAX / t->dims[i]) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%s' is impossibly large", f->path, t->name);
        }
        bytes *= t->dims[i];
    }
    if (bytes != end - begin) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%s' occupies %lld bytes, its shape and %s need %lld",
                        f->path, t->name, (long long)(end - begin), t->dtype, (long long)bytes);
    }
    t->data = data + begin;
    t->bytes = (size_t)bytes;
    return KVQ_OK;
}

static kvq_status read_entry(const safetensors_file *f, const cJSON *entry, const uint8_t *data, size_t available,
                             safetensors_tensor *t, kvq_error *err) {
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    t->name = entry->string;
    if (!cJSON_IsString(dtype)) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%s' has no dtype", f->path, t->name);
    }
    t->dtype = dtype->valuestring;
    int row = find_dtype(t->dtype);
    if (row < 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use a checkpoint stored as F32, F16 or BF16",
                        "%s: tensor '%s' has the unknown dtype '%s'", f->path, t->name, t->dtype);
    }
    t->type = DTYPES[row].number != NONE ? ggml_type_find(DTYPES[row].number) : NULL;
    kvq_status status = read_shape(f, entry, t, err);
    if (status == KVQ_OK) status = read_range(f, entry, data, available, DTYPES[row].bytes, t, err);
    return status;
}

// ---------------------------------------------------------------- the whole

static int by_place(const void *a, const void *b) {
    const safetensors_tensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); // empty tensors first, so that they do not look like overlaps
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const safetensors_tensor *)a)->name, ((const safetensors_tensor *)b)->name);
}

static kvq_status check_tiling(safetensors_file *f, const uint8_t *data, size_t available, kvq_error *err) {
    size_t at = 0;
    qsort(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_place);
    for (int64_t i = 0; i < f->n_tensors; i++) {
        const safetensors_tensor *t = &f->tensors[i];
        size_t                    begin = (size_t)(t->data - data);
        if (begin < at) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensors '%s' and '%s' overlap at data byte %zu", f->path,
                            f->tensors[i - 1].name, t->name, begin);
        }
        if (begin > at) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                            "%s: data bytes %zu to %zu in front of tensor '%s' belong to nothing", f->path, at, begin,
                            t->name);
        }
        at = begin + t->bytes;
    }
    if (at == available) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: the last %zu bytes belong to no tensor", f->path,
                    available - at);
}

static kvq_status read_tensors(const kvq_context *ctx, safetensors_file *f, const uint8_t *data, size_t available,
                               kvq_error *err) {
    kvq_status   status;
    const cJSON *entry;
    KVQ_TRY(KVQ_NEW(ctx, cJSON_GetArraySize(f->header), "safetensors header", &f->tensors, err));
    cJSON_ArrayForEach(entry, f->header) {
        if (strcmp(entry->string, "__metadata__") == 0) continue;
        KVQ_TRY(read_entry(f, entry, data, available, &f->tensors[f->n_tensors], err));
        f->n_tensors++;
    }
    KVQ_TRY(check_tiling(f, data, available, err));
    qsort(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_name);
    for (int64_t i = 1; i < f->n_tensors; i++) {
        if (by_name(&f->tensors[i - 1], &f->tensors[i]) != 0) continue;
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%s' appears twice", f->path, f->tensors[i].name);
        goto done;
    }
done:
    return status;
}

// __metadata__ is free text that kvq does not use; the format allows strings only.
static kvq_status check_metadata(const safetensors_file *f, kvq_error *err) {
    const cJSON *item, *metadata = cJSON_GetObjectItemCaseSensitive(f->header, "__metadata__");
    if (metadata == NULL) return KVQ_OK;
    bool good = cJSON_IsObject(metadata);
    cJSON_ArrayForEach(item, metadata) good = good && cJSON_IsString(item);
    return good ? KVQ_OK : kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: __metadata__ is not a map of strings", f->path);
}

kvq_status safetensors_open(const kvq_context *ctx, const char *path, safetensors_file **out, kvq_error *err) {
    kvq_status        status;
    safetensors_file *f = NULL;
    uint64_t          n_header = 0;
    KVQ_TRY(KVQ_NEW(ctx, 1, "safetensors file", &f, err));
    f->path = kvq_strdup(ctx, path);
    if (f->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: could not allocate its name", path);
        goto done;
    }
    KVQ_TRY(kvq_map_file(path, &f->map, err));
    if (f->map.bytes >= sizeof n_header) memcpy(&n_header, f->map.data, sizeof n_header);
    if (f->map.bytes < sizeof n_header || n_header > f->map.bytes - sizeof n_header || n_header > MAX_HEADER) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY,
                          "fetch the file again; a Git LFS pointer or a broken download looks like this",
                          "%s: is no safetensors file: %zu bytes, of which %llu would be the header", path,
                          f->map.bytes, (unsigned long long)n_header);
        goto done;
    }
    const uint8_t *data = f->map.data + sizeof n_header + n_header;
    KVQ_TRY(json_parse((const char *)f->map.data + sizeof n_header, (size_t)n_header, path, &f->header, err));
    if (!cJSON_IsObject(f->header)) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: the header is not a JSON object", path);
        goto done;
    }
    KVQ_TRY(check_metadata(f, err));
    KVQ_TRY(read_tensors(ctx, f, data, f->map.bytes - sizeof n_header - (size_t)n_header, err));
    *out = f;
    f = NULL;
done:
    safetensors_close(ctx, &f);
    return status;
}

void safetensors_close(const kvq_context *ctx, safetensors_file **file) {
    safetensors_file *f = *file;
    if (f == NULL) return;
    cJSON_Delete(f->header);
    kvq_unmap_file(&f->map);
    kvq_free(ctx, f->path);
    kvq_free(ctx, f->tensors);
    kvq_free(ctx, f);
    *file = NULL;
}

const char *safetensors_path(const safetensors_file *file) { return file->path; }

const safetensors_tensor *safetensors_tensors(const safetensors_file *file, int64_t *n) {
    *n = file->n_tensors;
    return file->tensors;
}
