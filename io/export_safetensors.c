// SPDX-License-Identifier: Apache-2.0
//
// The target `safetensors`: datasets as F32 and I64 tensors, everything else as the text map __metadata__. The format:
// an 8-byte little-endian length, that many bytes of JSON padded with spaces, then the tensors without gaps
// (https://github.com/huggingface/safetensors, section "Format").
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "export.h"
#include "json_read.h"

#define METADATA     "__metadata__"
#define LENGTH_BYTES 8u // of the header's length, and its alignment

// A record under the name it has in the file.
typedef struct entry {
    char          name[RECORD_MAX_PATH]; // "/layers/000/k@bits" is "layers.0.k.bits"
    const record *record;
} entry;

// Separators become dots; numbers lose their leading zeros, as models name their layers.
static void flat_name(const char *path, char out[RECORD_MAX_PATH]) {
    const char *from = path + strspn(path, "/@");
    while (*from != 0) {
        bool starts = from[-1] == '/' || from[-1] == '@';
        if (starts && from[0] == '0' && isdigit((unsigned char)from[1])) {
            from++;
            while (from[0] == '0' && isdigit((unsigned char)from[1])) from++;
        }
        *out++ = *from == '/' || *from == '@' ? '.' : *from;
        from++;
    }
    *out = 0;
}

static bool is_tensor(const entry *e) { return export_is_array(e->record); }
static bool is_wide(const entry *e) { return is_tensor(e) && e->record->type == RECORD_I64; }

// By name, wide numbers first so that all are aligned.
static int compare_entries(const void *a, const void *b) {
    const entry *x = a, *y = b;
    int          narrower = is_wide(y) - is_wide(x);
    return narrower != 0 ? narrower : strcmp(x->name, y->name);
}

static kvq_status list_entries(const kvq_context *ctx, const record_list *list, entry **out, kvq_error *err) {
    entry     *entries = NULL;
    kvq_status status = KVQ_NEW(ctx, list->count, "tensor names", &entries, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < list->count; i++) {
        flat_name(list->items[i].path, entries[i].name);
        entries[i].record = &list->items[i];
    }
    qsort(entries, (size_t)list->count, sizeof *entries, compare_entries);
    *out = entries;
    return KVQ_OK;
}

static const char *dtype_of(const entry *e) { return e->record->type == RECORD_I64 ? "I64" : "F32"; }

// ---------------------------------------------------------------- writing

static bool add_numbers(cJSON *object, const char *key, const int64_t *values, int n) {
    cJSON *array = cJSON_AddArrayToObject(object, key);
    bool   ok = array != NULL;
    for (int i = 0; ok && i < n; i++) ok = cJSON_AddItemToArray(array, cJSON_CreateNumber((double)values[i]));
    return ok;
}

static bool add_tensor(cJSON *root, const entry *e, int64_t begin) {
    int64_t offsets[2] = {begin, begin + (int64_t)e->record->bytes};
    cJSON  *tensor = cJSON_AddObjectToObject(root, e->name);
    return tensor != NULL && cJSON_AddStringToObject(tensor, "dtype", dtype_of(e)) != NULL &&
           add_numbers(tensor, "shape", e->record->shape, e->record->rank) &&
           add_numbers(tensor, "data_offsets", offsets, 2);
}

// The header's JSON, or NULL without memory; *data_bytes receives the size of all tensors. Release with cJSON_free.
static char *header_text(const entry *entries, int64_t n, int64_t *data_bytes) {
    char    storage[EXPORT_NUMBER], *text = NULL;
    cJSON  *root = cJSON_CreateObject(), *metadata = cJSON_AddObjectToObject(root, METADATA);
    int64_t at = 0;
    bool    ok = metadata != NULL;
    for (int64_t i = 0; ok && i < n; i++) {
        if (is_tensor(&entries[i])) {
            ok = add_tensor(root, &entries[i], at);
            at += (int64_t)entries[i].record->bytes;
        } else {
            ok = cJSON_AddStringToObject(metadata, entries[i].name, export_text(entries[i].record, storage)) != NULL;
        }
    }
    if (ok) text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    *data_bytes = at;
    return text;
}

kvq_status export_safetensors_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                                    const char *path, bool force, kvq_error *err) {
    record_list list = {0};
    entry      *entries = NULL;
    char       *header = NULL;
    uint8_t    *file = NULL;
    int64_t     data_bytes = 0;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(export_records(ctx, artifact, content_sha256, &list, err));
    KVQ_TRY(list_entries(ctx, &list, &entries, err));
    header = header_text(entries, list.count, &data_bytes);
    if (header == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for its header", path));
    size_t   header_bytes = strlen(header);
    uint64_t padded = (header_bytes + LENGTH_BYTES - 1) / LENGTH_BYTES * LENGTH_BYTES;
    size_t   bytes = LENGTH_BYTES + padded + (size_t)data_bytes;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)bytes, path, &file, err));
    memcpy(file, &padded, LENGTH_BYTES);
    memset(file + LENGTH_BYTES, ' ', padded);
    memcpy(file + LENGTH_BYTES, header, header_bytes);
    uint8_t *at = file + LENGTH_BYTES + padded;
    for (int64_t i = 0; i < list.count; i++) {
        if (!is_tensor(&entries[i])) continue;
        memcpy(at, entries[i].record->data, entries[i].record->bytes);
        at += entries[i].record->bytes;
    }
    KVQ_TRY(kvq_write_file(ctx, path, force, file, bytes, err));
done:
    kvq_free(ctx, file);
    cJSON_free(header);
    kvq_free(ctx, entries);
    record_list_free(ctx, &list);
    return status;
}

// ---------------------------------------------------------------- checking

// A file taken apart by the format's own rules, not by what the writer does.
typedef struct parsed {
    cJSON         *header;
    const uint8_t *data;
    int64_t        data_bytes;
} parsed;

static kvq_status parse(const kvq_mapped_file *file, const char *path, parsed *out, kvq_error *err) {
    uint64_t header_bytes = 0;
    if (file->bytes >= LENGTH_BYTES) memcpy(&header_bytes, file->data, LENGTH_BYTES);
    if (header_bytes == 0 || header_bytes > file->bytes - LENGTH_BYTES) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, "export again", "%s: a header of %" PRIu64 " bytes in a file of %zu",
                        path, header_bytes, file->bytes);
    }
    out->data = file->data + LENGTH_BYTES + header_bytes;
    out->data_bytes = (int64_t)(file->bytes - LENGTH_BYTES - header_bytes);
    return json_parse((const char *)file->data + LENGTH_BYTES, (size_t)header_bytes, path, &out->header, err);
}

static bool equal_numbers(const cJSON *array, const int64_t *expected, int n) {
    bool equal = cJSON_IsArray(array) && cJSON_GetArraySize(array) == n;
    for (int i = 0; equal && i < n; i++) {
        const cJSON *item = cJSON_GetArrayItem(array, i);
        equal = cJSON_IsNumber(item) && item->valuedouble == (double)expected[i];
    }
    return equal;
}

static bool equal_text(const cJSON *item, const char *expected) {
    return cJSON_IsString(item) && strcmp(item->valuestring, expected) == 0;
}

// Where the header says that the tensor's bytes lie; NULL when its description does not fit the record or the file.
static const uint8_t *find_data(const parsed *file, const entry *e) {
    const cJSON *tensor = cJSON_GetObjectItemCaseSensitive(file->header, e->name);
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(tensor, "data_offsets");
    const cJSON *begin = cJSON_GetArrayItem(offsets, 0);
    if (!equal_text(cJSON_GetObjectItemCaseSensitive(tensor, "dtype"), dtype_of(e)) || !cJSON_IsNumber(begin))
        return NULL;
    if (!equal_numbers(cJSON_GetObjectItemCaseSensitive(tensor, "shape"), e->record->shape, e->record->rank))
        return NULL;
    if (begin->valuedouble < 0 || begin->valuedouble > (double)file->data_bytes) return NULL;
    int64_t range[2] = {(int64_t)begin->valuedouble, (int64_t)begin->valuedouble + (int64_t)e->record->bytes};
    return equal_numbers(offsets, range, 2) && range[1] <= file->data_bytes ? file->data + range[0] : NULL;
}

static kvq_status check_tensor(const parsed *file, const entry *e, kvq_error *err) {
    const uint8_t *data = find_data(file, e);
    if (data == NULL) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, "export again",
                        "tensor %s is missing, or has another type, shape or place", e->name);
    }
    size_t size = RECORD_TYPE_BYTES[e->record->type];
    for (int64_t i = 0; i < record_n_elements(e->record); i++) {
        int64_t bits = 0; // of either type: the header's length need not be a multiple of 4
        record  found = {.type = e->record->type, .data = &bits};
        memcpy(&bits, data + (size_t)i * size, size);
        if (memcmp(&bits, (const uint8_t *)e->record->data + (size_t)i * size, size) == 0) continue;
        return kvq_fail(err, KVQ_ERR_INTEGRITY, "export again",
                        "tensor %s: element %" PRId64 " is %.9g instead of %.9g", e->name, i, export_element(&found, 0),
                        export_element(e->record, i));
    }
    return KVQ_OK;
}

static kvq_status check_entry(const parsed *file, const entry *e, kvq_error *err) {
    char storage[EXPORT_NUMBER];
    if (is_tensor(e)) return check_tensor(file, e, err);
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(file->header, METADATA);
    if (equal_text(cJSON_GetObjectItemCaseSensitive(metadata, e->name), export_text(e->record, storage))) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, "export again", "metadata %s is missing or has another text", e->name);
}

// Neither a tensor nor a text nor a byte that was not looked up.
static kvq_status check_extent(const parsed *file, const record_list *list, kvq_error *err) {
    int64_t n_names = cJSON_GetArraySize(file->header) - 1 +
                      cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(file->header, METADATA));
    int64_t data_bytes = 0;
    for (int64_t i = 0; i < list->count; i++)
        data_bytes += export_is_array(&list->items[i]) ? (int64_t)list->items[i].bytes : 0;
    if (n_names == list->count && data_bytes == file->data_bytes) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, "export again",
                    "%" PRId64 " names and %" PRId64 " bytes of tensors instead of %" PRId64 " and %" PRId64, n_names,
                    file->data_bytes, list->count, data_bytes);
}

kvq_status export_safetensors_check(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                                    const char *path, double *max_error, kvq_error *err) {
    record_list     list = {0};
    entry          *entries = NULL;
    kvq_mapped_file file = {0};
    parsed          p = {0};
    kvq_status      status = KVQ_OK;
    KVQ_TRY(export_records(ctx, artifact, content_sha256, &list, err));
    KVQ_TRY(list_entries(ctx, &list, &entries, err));
    KVQ_TRY(kvq_map_file(path, &file, err));
    KVQ_TRY(parse(&file, path, &p, err));
    for (int64_t i = 0; status == KVQ_OK && i < list.count; i++) status = check_entry(&p, &entries[i], err);
    if (status == KVQ_OK) status = check_extent(&p, &list, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", path);
        goto done;
    }
    *max_error = 0; // anything else has been refused
done:
    cJSON_Delete(p.header);
    kvq_unmap_file(&file);
    kvq_free(ctx, entries);
    record_list_free(ctx, &list);
    return status;
}
