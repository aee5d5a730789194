// SPDX-License-Identifier: Apache-2.0
//
// The target `json`: the tree of groups as nested objects, layers as an array, datasets as nested arrays of numbers.
// Numbers are printed so that they read back exactly; u64 are strings, because many readers hold numbers as f64.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "export.h"
#include "json_read.h"

#define JSON_SCHEMA "kvq.artifact/1"

// ---------------------------------------------------------------- places in the tree

// Cuts the next name off a record path: "/layers/000/k@bits" gives "layers", "000", "k", "bits". Returns false at the
// end.
static bool next_name(const char **path, char out[RECORD_MAX_PATH]) {
    *path += strspn(*path, "/@");
    size_t n = strcspn(*path, "/@");
    memcpy(out, *path, n);
    out[n] = 0;
    *path += n;
    return n > 0;
}

// Groups named by a number are elements of an array.
static bool is_index(const char *name) { return strspn(name, "0123456789") == strlen(name); }

static cJSON *child(const cJSON *parent, const char *name) {
    if (cJSON_IsArray(parent)) return cJSON_GetArrayItem(parent, (int)strtol(name, NULL, 10));
    return cJSON_GetObjectItemCaseSensitive(parent, name);
}

// Hangs `item` below `parent` under `name`; false when memory is out. Records are sorted, so elements come in order.
static bool attach(cJSON *parent, const char *name, cJSON *item) {
    if (item == NULL) return false;
    bool ok = cJSON_IsArray(parent) ? cJSON_AddItemToArray(parent, item) : cJSON_AddItemToObject(parent, name, item);
    if (!ok) cJSON_Delete(item);
    return ok;
}

// ---------------------------------------------------------------- writing

// Nested brackets around row-major numbers: a bracket opens where an index is a multiple of its block.
static kvq_status array_text(const kvq_context *ctx, const record *r, char **out, kvq_error *err) {
    int64_t    n = record_n_elements(r);
    char      *text = NULL, *at;
    kvq_status status = KVQ_NEW(ctx, n * (EXPORT_NUMBER + 2 * RECORD_MAX_RANK + 1) + 1, r->path, &text, err);
    if (status != KVQ_OK) return status;
    at = text;
    for (int64_t i = 0; i < n; i++) {
        int64_t block[RECORD_MAX_RANK + 1];
        block[r->rank] = 1;
        for (int k = r->rank - 1; k >= 0; k--) block[k] = block[k + 1] * r->shape[k];
        if (i > 0) *at++ = ',';
        for (int k = 0; k < r->rank; k++) {
            if (i % block[k] == 0) *at++ = '[';
        }
        if (r->type == RECORD_I64)
            (void)snprintf(at, EXPORT_NUMBER, "%" PRId64, ((const int64_t *)r->data)[i]);
        else
            export_number(export_element(r, i), r->type, at);
        at += strlen(at);
        for (int k = 0; k < r->rank; k++) {
            if ((i + 1) % block[k] == 0) *at++ = ']';
        }
    }
    *out = text;
    return KVQ_OK;
}

static bool is_string(const record *r) { return r->type == RECORD_TEXT || r->type == RECORD_U64; }

static kvq_status create_leaf(const kvq_context *ctx, const record *r, cJSON **out, kvq_error *err) {
    char       storage[EXPORT_NUMBER], *text = NULL;
    kvq_status status = export_is_array(r) ? array_text(ctx, r, &text, err) : KVQ_OK;
    if (status != KVQ_OK) return status;
    if (export_is_array(r))
        *out = cJSON_CreateRaw(text);
    else
        *out = is_string(r) ? cJSON_CreateString(export_text(r, storage)) : cJSON_CreateRaw(export_text(r, storage));
    kvq_free(ctx, text);
    return KVQ_OK;
}

static kvq_status add_record(const kvq_context *ctx, cJSON *root, const record *r, kvq_error *err) {
    const char *rest = r->path;
    char        name[RECORD_MAX_PATH], next[RECORD_MAX_PATH];
    cJSON      *at = root, *leaf = NULL;
    (void)next_name(&rest, name);
    while (next_name(&rest, next)) {
        if (child(at, name) == NULL && !attach(at, name, is_index(next) ? cJSON_CreateArray() : cJSON_CreateObject())) {
            return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for its JSON form", r->path);
        }
        at = child(at, name);
        strcpy(name, next);
    }
    kvq_status status = create_leaf(ctx, r, &leaf, err);
    if (status == KVQ_OK && !attach(at, name, leaf)) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for its JSON form", r->path);
    }
    return status;
}

kvq_status export_json_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                             const char *path, bool force, kvq_error *err) {
    record_list list = {0};
    cJSON      *root = cJSON_CreateObject();
    char       *text = NULL;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(export_records(ctx, artifact, content_sha256, &list, err));
    if (cJSON_AddStringToObject(root, "schema", JSON_SCHEMA) == NULL) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for its JSON form", path));
    }
    for (int64_t i = 0; i < list.count; i++) KVQ_TRY(add_record(ctx, root, &list.items[i], err));
    text = cJSON_Print(root);
    if (text == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for its text", path));
    KVQ_TRY(kvq_write_file(ctx, path, force, text, strlen(text), err));
done:
    cJSON_free(text);
    cJSON_Delete(root);
    record_list_free(ctx, &list);
    return status;
}

// ---------------------------------------------------------------- checking

static kvq_status differs(const record *r, const char *how, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTEGRITY, "export again", "%s %s", r->path, how);
}

static bool equal_element(const cJSON *json, const record *r, int64_t i) {
    double expected = export_element(r, i);
    if (!cJSON_IsNumber(json)) return false;
    if (r->type == RECORD_I64) return json->valuedouble == expected;
    return kvq_bits_of_float((float)json->valuedouble) == kvq_bits_of_float((float)expected);
}

// Compares a nested array with the elements of r from *at on, which it moves on.
static bool equal_array(const cJSON *json, const record *r, int rank, const int64_t *shape, int64_t *at) {
    const cJSON *element;
    if (rank == 0) return equal_element(json, r, (*at)++);
    if (!cJSON_IsArray(json) || cJSON_GetArraySize(json) != shape[0]) return false;
    cJSON_ArrayForEach(element, json) {
        if (!equal_array(element, r, rank - 1, shape + 1, at)) return false;
    }
    return true;
}

static bool equal_number(const cJSON *json, const record *r) {
    double expected = r->type == RECORD_I64 ? (double)*(const int64_t *)r->data : *(const double *)r->data;
    return cJSON_IsNumber(json) && json->valuedouble == expected;
}

static kvq_status check_record(const cJSON *root, const record *r, kvq_error *err) {
    const char  *rest = r->path;
    char         name[RECORD_MAX_PATH], storage[EXPORT_NUMBER], how[96];
    const cJSON *at = root;
    int64_t      element = 0;
    while (at != NULL && next_name(&rest, name)) at = child(at, name);
    if (at == NULL) return differs(r, "is missing in the export", err);
    if (is_string(r)) {
        bool equal = cJSON_IsString(at) && strcmp(at->valuestring, export_text(r, storage)) == 0;
        return equal ? KVQ_OK : differs(r, "has another text in the export", err);
    }
    if (!export_is_array(r)) return equal_number(at, r) ? KVQ_OK : differs(r, "has another value in the export", err);
    if (equal_array(at, r, r->rank, r->shape, &element)) return KVQ_OK;
    (void)snprintf(how, sizeof how, "has another shape, or another value near element %" PRId64 ", in the export",
                   element);
    return differs(r, how, err);
}

// Values in a tree, an array of numbers being one, so that nothing can be in the file that was not looked up.
static int64_t count_values(const cJSON *json) {
    const cJSON *element;
    int64_t      n = 0;
    if (!cJSON_IsObject(json) && !(cJSON_IsArray(json) && cJSON_IsObject(json->child))) return 1;
    cJSON_ArrayForEach(element, json) n += count_values(element);
    return n;
}

kvq_status export_json_check(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                             const char *path, double *max_error, kvq_error *err) {
    record_list list = {0};
    cJSON      *root = NULL;
    const char *schema = NULL;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(export_records(ctx, artifact, content_sha256, &list, err));
    KVQ_TRY(json_parse_file(path, &root, err));
    KVQ_TRY(json_get_string(root, "schema", path, false, &schema, err));
    if (strcmp(schema, JSON_SCHEMA) != 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_VERSION, NULL, "%s: its schema is '%.80s' instead of '%s'", path, schema,
                         JSON_SCHEMA));
    }
    for (int64_t i = 0; status == KVQ_OK && i < list.count; i++) status = check_record(root, &list.items[i], err);
    int64_t n_values = count_values(root), n_expected = list.count + 1; // and the schema
    if (status == KVQ_OK && n_values != n_expected) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, "export again", "%" PRId64 " values instead of %" PRId64, n_values,
                          n_expected);
    }
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", path);
        goto done;
    }
    *max_error = 0; // anything else has been refused
done:
    cJSON_Delete(root);
    record_list_free(ctx, &list);
    return status;
}
