// SPDX-License-Identifier: Apache-2.0
//
// Strict JSON input; see json_read.h.
#include <math.h>
#include <string.h>

#include "json_read.h"

#define MAX_EXACT_INTEGER 9007199254740992.0 // 2^53: cJSON keeps numbers as doubles, larger integers would be rounded

// cJSON gets a zero-terminated copy: the 1.7 series reads one byte beyond a text that ends inside an object, and the
// byte behind a mapped file may not exist. The copy is cJSON's memory, like the tree made of it.
kvq_status json_parse(const char *text, size_t n, const char *what, cJSON **out, kvq_error *err) {
    const char *end = NULL, *zero = n > 0 ? memchr(text, 0, n) : NULL;
    if (zero != NULL) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: not JSON: a zero byte at byte %zu", what,
                        (size_t)(zero - text));
    }
    char *copy = cJSON_malloc(n + 1);
    if (copy == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: could not allocate %zu bytes", what, n + 1);
    if (n > 0) memcpy(copy, text, n);
    copy[n] = 0;
    cJSON *tree = cJSON_ParseWithLengthOpts(copy, n + 1, &end, true);
    size_t place = end != NULL ? (size_t)(end - copy) : 0;
    cJSON_free(copy);
    if (tree == NULL)
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: not JSON: syntax error at byte %zu", what, place);
    *out = tree;
    return KVQ_OK;
}

kvq_status json_parse_file(const char *path, cJSON **out, kvq_error *err) {
    kvq_mapped_file file = {0};
    kvq_status      status = kvq_map_file(path, &file, err);
    if (status == KVQ_OK) status = json_parse((const char *)file.data, file.bytes, path, out, err);
    kvq_unmap_file(&file);
    return status;
}

kvq_status json_check_no_zero(const char *text, size_t n, const char *what, kvq_error *err) {
    for (size_t i = 0; i + 6 <= n; i++) {
        if (text[i] != '\\') continue;
        if (memcmp(text + i, "\\u0000", 6) == 0) {
            return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: a string holds a zero character (\\u0000) at byte %zu",
                            what, i);
        }
        i++; // the escaped character, which may be a backslash
    }
    return KVQ_OK;
}

// The member `key`, NULL when it is absent or null. Two of the same name are refused: readers differ in which one
// counts.
static kvq_status find(const cJSON *object, const char *key, const char *what, bool optional, const cJSON **out,
                       kvq_error *err) {
    const cJSON *item, *found = NULL;
    if (!cJSON_IsObject(object)) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: is not a JSON object", what);
    cJSON_ArrayForEach(item, object) {
        if (strcmp(item->string, key) != 0) continue;
        if (found != NULL) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' appears twice", what, key);
        found = item;
    }
    if (cJSON_IsNull(found)) found = NULL;
    if (found == NULL && !optional) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is missing", what, key);
    *out = found;
    return KVQ_OK;
}

static kvq_status wrong_kind(const char *key, const char *what, const char *wanted, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is not %s", what, key, wanted);
}

kvq_status json_get_int(const cJSON *object, const char *key, const char *what, bool optional, int64_t low,
                        int64_t high, int64_t *out, kvq_error *err) {
    const cJSON *item = NULL;
    kvq_status   status = find(object, key, what, optional, &item, err);
    if (status != KVQ_OK || item == NULL) return status;
    if (!cJSON_IsNumber(item)) return wrong_kind(key, what, "an integer", err);
    double x = item->valuedouble;
    if (!(fabs(x) <= MAX_EXACT_INTEGER) || x != floor(x) || (int64_t)x < low || (int64_t)x > high) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is %.17g, must be an integer from %lld to %lld", what,
                        key, x, (long long)low, (long long)high);
    }
    *out = (int64_t)x;
    return KVQ_OK;
}

kvq_status json_get_double(const cJSON *object, const char *key, const char *what, bool optional, double *out,
                           kvq_error *err) {
    const cJSON *item = NULL;
    kvq_status   status = find(object, key, what, optional, &item, err);
    if (status != KVQ_OK || item == NULL) return status;
    if (!cJSON_IsNumber(item) || !isfinite(item->valuedouble)) return wrong_kind(key, what, "a finite number", err);
    *out = item->valuedouble;
    return KVQ_OK;
}

kvq_status json_get_bool(const cJSON *object, const char *key, const char *what, bool optional, bool *out,
                         kvq_error *err) {
    const cJSON *item = NULL;
    kvq_status   status = find(object, key, what, optional, &item, err);
    if (status != KVQ_OK || item == NULL) return status;
    if (!cJSON_IsBool(item)) return wrong_kind(key, what, "true or false", err);
    *out = cJSON_IsTrue(item);
    return KVQ_OK;
}

kvq_status json_get_string(const cJSON *object, const char *key, const char *what, bool optional, const char **out,
                           kvq_error *err) {
    const cJSON *item = NULL;
    kvq_status   status = find(object, key, what, optional, &item, err);
    if (status != KVQ_OK || item == NULL) return status;
    if (!cJSON_IsString(item)) return wrong_kind(key, what, "a string", err);
    *out = item->valuestring;
    return KVQ_OK;
}

kvq_status json_get_object(const cJSON *object, const char *key, const char *what, bool optional, const cJSON **out,
                           kvq_error *err) {
    const cJSON *item = NULL;
    kvq_status   status = find(object, key, what, optional, &item, err);
    if (status != KVQ_OK || item == NULL) return status;
    if (!cJSON_IsObject(item)) return wrong_kind(key, what, "an object", err);
    *out = item;
    return KVQ_OK;
}

kvq_status json_get_doubles(const cJSON *object, const char *key, const char *what, int64_t n, double *out,
                            kvq_error *err) {
    const cJSON *array = NULL, *item;
    int64_t      i = 0;
    kvq_status   status = find(object, key, what, false, &array, err);
    if (status != KVQ_OK) return status;
    if (!cJSON_IsArray(array)) return wrong_kind(key, what, "an array", err);
    if (cJSON_GetArraySize(array) != n) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' has %d numbers, must have %lld", what, key,
                        cJSON_GetArraySize(array), (long long)n);
    }
    cJSON_ArrayForEach(item, array) {
        if (!cJSON_IsNumber(item) || !isfinite(item->valuedouble)) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' has no finite number at %lld", what, key,
                            (long long)i);
        }
        out[i++] = item->valuedouble;
    }
    return KVQ_OK;
}
