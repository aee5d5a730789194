// SPDX-License-Identifier: Apache-2.0
//
// For the command-line tests, which must not need a script language: reads one JSON document from standard input and
// prints what lies at a path of keys and indices. Exit 1 when the input is not exactly one document, 2 when the path
// leads nowhere.
//   kvq_json_tool gates 0 verdict < report.json
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_BYTES (64u << 20)

static const cJSON *step(const cJSON *at, const char *key) {
    char *end;
    long  index = strtol(key, &end, 10);
    if (cJSON_IsArray(at) && *end == 0) return cJSON_GetArrayItem(at, (int)index);
    return cJSON_GetObjectItemCaseSensitive(at, key);
}

int main(int argc, char **argv) {
    char *text = malloc(MAX_BYTES + 1);
    if (text == NULL) return 3;
    size_t n = fread(text, 1, MAX_BYTES, stdin);
    text[n] = 0;
    cJSON *root = cJSON_ParseWithOpts(text, NULL, 1); // 1: nothing may follow the document
    free(text);
    if (root == NULL) return 1;

    const cJSON *at = root;
    for (int i = 1; i < argc && at != NULL; i++) at = step(at, argv[i]);
    int result = at != NULL ? 0 : 2;
    if (cJSON_IsArray(at)) {
        printf("%d\n", cJSON_GetArraySize(at));
    } else if (cJSON_IsString(at)) {
        printf("%s\n", at->valuestring);
    } else if (cJSON_IsNumber(at)) {
        printf("%.17g\n", at->valuedouble);
    } else if (at != NULL) {
        printf("%s\n", cJSON_IsNull(at) ? "null" : cJSON_IsTrue(at) ? "true" : cJSON_IsFalse(at) ? "false" : "object");
    }
    cJSON_Delete(root);
    return result;
}
