// SPDX-License-Identifier: Apache-2.0
// The list of records: growth, order, look-up and the content hash. See records.h.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "records.h"

const char *const RECORD_TYPE_NAMES[RECORD_N_TYPES] = {"utf8", "i64", "u64", "f64", "f32"};
const size_t      RECORD_TYPE_BYTES[RECORD_N_TYPES] = {1, 8, 8, 8, 4};

void record_list_free(const kvq_context *ctx, record_list *list) {
    for (int64_t i = 0; i < list->count; i++) kvq_free(ctx, list->items[i].data); // the path lies in the same block
    kvq_free(ctx, list->items);
    *list = (record_list){0};
}

static kvq_status grow(const kvq_context *ctx, record_list *list, kvq_error *err) {
    if (list->count < list->capacity) return KVQ_OK;
    int64_t    capacity = list->capacity == 0 ? 128 : 2 * list->capacity;
    record    *items = NULL;
    kvq_status status = KVQ_NEW(ctx, capacity, "list of records", &items, err);
    if (status != KVQ_OK) return status;
    if (list->count > 0) memcpy(items, list->items, (size_t)list->count * sizeof *items);
    kvq_free(ctx, list->items);
    list->items = items;
    list->capacity = capacity;
    return KVQ_OK;
}

kvq_status record_reserve(const kvq_context *ctx, record_list *list, const char *path, record_type type, int rank,
                          const int64_t *shape, size_t bytes, void **data, kvq_error *err) {
    size_t path_bytes = strlen(path) + 1;
    if (path_bytes > RECORD_MAX_PATH || bytes > (size_t)INT64_MAX / 2) {
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%.64s...: a path of %zu or content of %zu bytes is too long", path,
                        path_bytes, bytes);
    }
    kvq_status status = grow(ctx, list, err);
    uint8_t   *block = NULL;
    // Data first, for its alignment; one more zero ends a text.
    if (status == KVQ_OK) status = KVQ_NEW(ctx, (int64_t)(bytes + 1 + path_bytes), path, &block, err);
    if (status != KVQ_OK) return status;
    record r = {.path = (char *)block + bytes + 1, .type = type, .rank = rank, .data = block, .bytes = bytes};
    memcpy(r.path, path, path_bytes);
    for (int i = 0; i < rank; i++) r.shape[i] = shape[i];
    list->items[list->count++] = r;
    *data = r.data;
    return KVQ_OK;
}

static int64_t product(int rank, const int64_t *shape) {
    int64_t n = 1;
    for (int i = 0; i < rank; i++) n *= shape[i];
    return n;
}

int64_t record_n_elements(const record *r) { return product(r->rank, r->shape); }

kvq_status record_add(const kvq_context *ctx, record_list *list, const char *path, record_type type, int rank,
                      const int64_t *shape, const void *data, kvq_error *err) {
    void      *copy = NULL;
    size_t     bytes = type == RECORD_TEXT ? strlen(data) : (size_t)product(rank, shape) * RECORD_TYPE_BYTES[type];
    kvq_status status = record_reserve(ctx, list, path, type, rank, shape, bytes, &copy, err);
    if (status == KVQ_OK) memcpy(copy, data, bytes);
    return status;
}

static int compare_paths(const void *a, const void *b) {
    return strcmp(((const record *)a)->path, ((const record *)b)->path);
}

void record_sort(record_list *list) {
    if (list->count > 0) qsort(list->items, (size_t)list->count, sizeof *list->items, compare_paths);
}

static record *find(const record_list *list, const char *path) {
    for (int64_t low = 0, high = list->count; low < high;) {
        int64_t middle = low + (high - low) / 2;
        int     order = strcmp(path, list->items[middle].path);
        if (order == 0) return &list->items[middle];
        if (order < 0) high = middle;
        if (order > 0) low = middle + 1;
    }
    return NULL;
}

const record *record_find(const record_list *list, const char *path) { return find(list, path); }

const record *record_take(record_list *list, const char *path) {
    record *r = find(list, path);
    if (r != NULL) r->taken = true;
    return r;
}

const record *record_first_untaken(const record_list *list) {
    for (int64_t i = 0; i < list->count; i++) {
        if (!list->items[i].taken) return &list->items[i];
    }
    return NULL;
}

static void push_record(kvq_sha256 *hash, const record *r) {
    char line[RECORD_MAX_PATH + 128];
    int  n = snprintf(line, sizeof line, "%s\t%s\t", r->path, RECORD_TYPE_NAMES[r->type]);
    for (int i = 0; i < r->rank; i++) {
        n += snprintf(line + n, sizeof line - (size_t)n, "%s%" PRId64, i > 0 ? "," : "", r->shape[i]);
    }
    n += snprintf(line + n, sizeof line - (size_t)n, "\t%zu\n", r->bytes);
    kvq_sha256_push(hash, line, (size_t)n);
    kvq_sha256_push(hash, r->data, r->bytes);
}

kvq_status record_hash(const record_list *list, bool (*covers)(const char *path), char hex[KVQ_SHA256_HEX],
                       kvq_error *err) {
    kvq_sha256 *hash = NULL;
    kvq_status  status = kvq_sha256_create(&hash, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < list->count; i++) {
        if (covers(list->items[i].path)) push_record(hash, &list->items[i]);
    }
    kvq_sha256_finalize(&hash, hex);
    return KVQ_OK;
}
