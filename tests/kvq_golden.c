// SPDX-License-Identifier: Apache-2.0
// Reference arrays; see kvq_test.h. Apart from kvq_test.c, which a build without cJSON (tests/device) needs as well.
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_test.h"

struct kvq_golden {
    cJSON *index;
    char  *bytes;
};

static char *read_all(const char *path) {
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL, "cannot open %s", path);
    ck_assert_int_eq(fseek(file, 0, SEEK_END), 0);
    long  size = ftell(file);
    char *data = malloc((size_t)size + 1);
    rewind(file);
    ck_assert_uint_eq(fread(data, 1, (size_t)size, file), (size_t)size);
    data[size] = 0;
    (void)fclose(file);
    return data;
}

kvq_golden *kvq_golden_open(const char *folder_under_shared, const char *stem) {
    char        path[1024];
    kvq_golden *golden = calloc(1, sizeof *golden);
    (void)snprintf(path, sizeof path, "%s/%s/%s.json", kvq_test_shared(), folder_under_shared, stem);
    char *text = read_all(path);
    golden->index = cJSON_Parse(text);
    free(text);
    ck_assert_msg(golden->index != NULL, "%s is not JSON", path);
    (void)snprintf(path, sizeof path, "%s/%s/%s.bin", kvq_test_shared(), folder_under_shared, stem);
    golden->bytes = read_all(path);
    return golden;
}

void kvq_golden_close(kvq_golden *golden) {
    cJSON_Delete(golden->index);
    free(golden->bytes);
    free(golden);
}

static const void *golden_find(const kvq_golden *golden, const char *name, const char *dtype, int64_t *n_elements) {
    const cJSON *entry;
    cJSON_ArrayForEach(entry, cJSON_GetObjectItemCaseSensitive(golden->index, "tensors")) {
        if (strcmp(cJSON_GetObjectItem(entry, "name")->valuestring, name) != 0) continue;
        ck_assert_str_eq(cJSON_GetObjectItem(entry, "dtype")->valuestring, dtype);
        if (n_elements != NULL) *n_elements = (int64_t)cJSON_GetObjectItem(entry, "nbytes")->valuedouble / 4;
        return golden->bytes + (size_t)cJSON_GetObjectItem(entry, "offset")->valuedouble;
    }
    return NULL;
}

const float *kvq_golden_f32(const kvq_golden *golden, const char *name, int64_t *n_elements) {
    return golden_find(golden, name, "f32", n_elements);
}

const int32_t *kvq_golden_i32(const kvq_golden *golden, const char *name, int64_t *n_elements) {
    return golden_find(golden, name, "i32", n_elements);
}
