// SPDX-License-Identifier: Apache-2.0
//
// JSON results. cJSON holds and prints the document; numbers are handed to it as text, because its own number printing
// treats neighbouring doubles as equal and drops the last bit.
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_cli.h"

#define EXACT_INTEGERS 9007199254740992u // 2^53: JSON readers that use doubles know every integer up to here

// Puts `item` (NULL: out of memory) where it belongs.
static cJSON *add(kvq_json *json, cJSON *parent, const char *key, cJSON *item) {
    bool added = item != NULL && parent != NULL;
    if (added && key != NULL) added = cJSON_AddItemToObject(parent, key, item);
    if (added && key == NULL) added = cJSON_AddItemToArray(parent, item);
    if (added) return item;
    cJSON_Delete(item);
    json->failed = true;
    return NULL;
}

void kvq_json_init(kvq_json *json) {
    json->root = cJSON_CreateObject();
    json->failed = json->root == NULL;
}

void kvq_json_free(kvq_json *json) {
    cJSON_Delete(json->root);
    json->root = NULL;
}

cJSON *kvq_json_object(kvq_json *json, cJSON *parent, const char *key) {
    return add(json, parent, key, cJSON_CreateObject());
}

cJSON *kvq_json_array(kvq_json *json, cJSON *parent, const char *key) {
    return add(json, parent, key, cJSON_CreateArray());
}

char *kvq_cli_valid_text(const char *value) {
    size_t n = strlen(value);
    char  *repaired = malloc(3 * n + 1), *to = repaired;
    if (repaired == NULL) return NULL;
    while (n > 0) {
        size_t valid = kvq_utf8_valid_prefix(value, n);
        memcpy(to, value, valid);
        to += valid;
        if (valid < n) {
            memcpy(to, "\xef\xbf\xbd", 3);
            to += 3;
            valid++;
        }
        value += valid;
        n -= valid;
    }
    *to = 0;
    return repaired;
}

static cJSON *create_text(const char *value) {
    char  *text = kvq_cli_valid_text(value);
    cJSON *item = text != NULL ? cJSON_CreateString(text) : NULL;
    free(text);
    return item;
}

void kvq_json_text(kvq_json *json, cJSON *parent, const char *key, const char *value) {
    (void)add(json, parent, key, create_text(value));
}

void kvq_json_null(kvq_json *json, cJSON *parent, const char *key) { (void)add(json, parent, key, cJSON_CreateNull()); }

void kvq_json_bool(kvq_json *json, cJSON *parent, const char *key, bool value) {
    (void)add(json, parent, key, cJSON_CreateBool(value));
}

void kvq_cli_format_exact(double x, char out[CLI_EXACT_NUMBER]) {
    out[0] = 0;
    for (int digits = 15; digits <= 17 && isfinite(x); digits++) {
        (void)snprintf(out, CLI_EXACT_NUMBER, "%.*g", digits, x);
        if (strtod(out, NULL) == x) return;
    }
}

void kvq_json_number(kvq_json *json, cJSON *parent, const char *key, double value) {
    char text[CLI_EXACT_NUMBER];
    kvq_cli_format_exact(value, text);
    (void)add(json, parent, key, cJSON_CreateRaw(text[0] != 0 ? text : "null"));
}

static void add_float(kvq_json *json, cJSON *parent, float value) {
    char text[32] = "null";
    if (isfinite(value)) {
        for (int digits = 6; digits <= 9; digits++) {
            (void)snprintf(text, sizeof text, "%.*g", digits, (double)value);
            if (strtof(text, NULL) == value) break;
        }
    }
    (void)add(json, parent, NULL, cJSON_CreateRaw(text));
}

void kvq_json_count(kvq_json *json, cJSON *parent, const char *key, int64_t value) {
    char text[32];
    (void)snprintf(text, sizeof text, "%lld", (long long)value);
    (void)add(json, parent, key, cJSON_CreateRaw(text));
}

void kvq_json_seed(kvq_json *json, cJSON *parent, const char *key, uint64_t value) {
    char text[32];
    (void)snprintf(text, sizeof text, "%llu", (unsigned long long)value);
    (void)add(json, parent, key, value <= EXACT_INTEGERS ? cJSON_CreateRaw(text) : cJSON_CreateString(text));
}

void kvq_json_doubles(kvq_json *json, cJSON *parent, const char *key, const double *values, int64_t n) {
    cJSON *array = kvq_json_array(json, parent, key);
    for (int64_t i = 0; i < n && !json->failed; i++) kvq_json_number(json, array, NULL, values[i]);
}

void kvq_json_floats(kvq_json *json, cJSON *parent, const char *key, const float *values, int64_t n) {
    if (values == NULL) {
        (void)add(json, parent, key, cJSON_CreateNull());
        return;
    }
    cJSON *array = kvq_json_array(json, parent, key);
    for (int64_t i = 0; i < n && !json->failed; i++) add_float(json, array, values[i]);
}

static kvq_status render(const kvq_json *json, bool indented, char **out, kvq_error *err) {
    char *text = json->failed ? NULL : indented ? cJSON_Print(json->root) : cJSON_PrintUnformatted(json->root);
    if (text == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "JSON report: could not allocate it");
    *out = text;
    return KVQ_OK;
}

kvq_status kvq_json_line(const kvq_json *json, char **out, kvq_error *err) { return render(json, false, out, err); }

kvq_status kvq_json_print(const kvq_json *json, kvq_error *err) { return kvq_json_write(json, stdout, err); }

kvq_status kvq_json_write(const kvq_json *json, FILE *out, kvq_error *err) {
    char      *text = NULL;
    kvq_status status = render(json, true, &text, err);
    if (status == KVQ_OK) (void)fprintf(out, "%s\n", text);
    free(text);
    return status;
}
