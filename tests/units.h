// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: the reference results of single steps (quant/units.json).
#ifndef KVQ_TEST_UNITS_H
#define KVQ_TEST_UNITS_H

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvq_test.h"

// Release with cJSON_Delete.
static inline cJSON *units_read(void) {
    char path[1024];
    kvq_test_shared_path(path, sizeof path, "goldens/quant/units.json");
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL, "cannot open %s", path);
    ck_assert_int_eq(fseek(file, 0, SEEK_END), 0);
    long size = ftell(file);
    rewind(file);
    char *text = calloc((size_t)size + 1, 1);
    ck_assert_uint_eq(fread(text, 1, (size_t)size, file), (size_t)size);
    (void)fclose(file);
    cJSON *units = cJSON_Parse(text);
    free(text);
    ck_assert_ptr_nonnull(units);
    return units;
}

static inline const cJSON *units_get(const cJSON *object, const char *name) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    ck_assert_msg(item != NULL, "units.json has no '%s'", name);
    return item;
}

static inline double units_number(const cJSON *object, const char *name) {
    return units_get(object, name)->valuedouble;
}

// Release with free.
static inline double *units_array(const cJSON *object, const char *name, int *n) {
    const cJSON *array = units_get(object, name), *item;
    *n = cJSON_GetArraySize(array);
    double *values = calloc((size_t)*n + 1, sizeof *values);
    int     i = 0;
    cJSON_ArrayForEach(item, array) values[i++] = item->valuedouble;
    return values;
}

#endif
