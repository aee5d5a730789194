// SPDX-License-Identifier: Apache-2.0
// Flat lists of names and texts: fingerprints and manifests.
#include <stdio.h>
#include <string.h>

#include "json_read.h"

kvq_status kvq_fields_write(const kvq_context *ctx, const char *path, const kvq_field *fields, int64_t n,
                            kvq_error *err) {
    kvq_status status = KVQ_OK;
    char      *text = NULL;
    cJSON     *object = cJSON_CreateObject();
    bool       made = object != NULL;
    for (int64_t i = 0; i < n && made; i++)
        made = cJSON_AddStringToObject(object, fields[i].name, fields[i].value) != NULL;
    if (made) text = cJSON_Print(object);
    if (text == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: no memory for its text", path);
    } else {
        status = kvq_write_file(ctx, path, true, text, strlen(text), err);
    }
    cJSON_free(text);
    cJSON_Delete(object);
    return status;
}

static kvq_status take_field(const cJSON *item, const char *path, kvq_field *out, kvq_error *err) {
    if (!cJSON_IsString(item) || strlen(item->string) >= sizeof out->name ||
        strlen(item->valuestring) >= sizeof out->value) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: the field '%.64s' is no text, or too long", path,
                        item->string != NULL ? item->string : "");
    }
    (void)snprintf(out->name, sizeof out->name, "%s", item->string);
    (void)snprintf(out->value, sizeof out->value, "%s", item->valuestring);
    return KVQ_OK;
}

kvq_status kvq_fields_read(const kvq_context *ctx, const char *path, kvq_field **fields, int64_t *n, kvq_error *err) {
    cJSON       *object = NULL;
    const cJSON *item;
    kvq_field   *list = NULL;
    int64_t      count = 0;
    kvq_status   status = json_parse_file(path, &object, err);
    if (status == KVQ_ERR_INPUT) status = KVQ_ERR_INTEGRITY;
    if (status == KVQ_ERR_INTEGRITY && err != NULL) err->status = status;
    if (status != KVQ_OK) return status;
    if (!cJSON_IsObject(object)) KVQ_TRY(kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: holds no JSON object", path));
    KVQ_TRY(KVQ_NEW(ctx, cJSON_GetArraySize(object), "list of fields", &list, err));
    cJSON_ArrayForEach(item, object) KVQ_TRY(take_field(item, path, &list[count++], err));
    *fields = list;
    *n = count;
    list = NULL;
done:
    kvq_free(ctx, list);
    cJSON_Delete(object);
    return status;
}

const char *kvq_fields_find(const kvq_field *fields, int64_t n, const char *name) {
    for (int64_t i = 0; i < n; i++) {
        if (strcmp(fields[i].name, name) == 0) return fields[i].value;
    }
    return NULL;
}

// Appends "name: a, now b" to a text of differences.
static size_t say_difference(char *text, size_t used, size_t size, const char *name, const char *a, const char *b) {
    if (used >= size) return used;
    a = a != NULL ? a : "(nothing)";
    b = b != NULL ? b : "(nothing)";
    size_t same = 0;
    while (a[same] != 0 && a[same] == b[same]) same++;
    size_t skip = same > 40 ? same - 20 : 0; // long texts that differ late: their ends matter
    int    n = snprintf(text + used, size - used, "%s%s: %s%.70s, now %s%.70s", used > 0 ? "; " : "", name,
                     skip > 0 ? "..." : "", a + skip, skip > 0 ? "..." : "", b + skip);
    return used + (size_t)n;
}

kvq_status kvq_fields_compare(const kvq_field *before, int64_t n_before, const kvq_field *now, int64_t n_now,
                              kvq_error *err) {
    char   text[640] = "";
    size_t used = 0;
    for (int64_t i = 0; i < n_before; i++) {
        const char *value = kvq_fields_find(now, n_now, before[i].name);
        if (value != NULL && strcmp(value, before[i].value) == 0) continue;
        used = say_difference(text, used, sizeof text, before[i].name, before[i].value, value);
    }
    for (int64_t i = 0; i < n_now; i++) {
        if (kvq_fields_find(before, n_before, now[i].name) != NULL) continue;
        used = say_difference(text, used, sizeof text, now[i].name, NULL, now[i].value);
    }
    return used == 0 ? KVQ_OK : kvq_fail(err, KVQ_ERR_MISMATCH, NULL, "%s", text);
}
