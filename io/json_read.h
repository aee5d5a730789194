// SPDX-License-Identifier: Apache-2.0
//
// Private to io: strict JSON input through cJSON, with errors that name the file and the place.
#ifndef KVQ_IO_JSON_READ_H
#define KVQ_IO_JSON_READ_H

#include <cjson/cJSON.h>

#include "kvq_io.h"

// Parses exactly n bytes; `what` is the file name used in messages. Errors give the byte offset.
// Release with cJSON_Delete.
kvq_status json_parse(const char *text, size_t n, const char *what, cJSON **out, kvq_error *err);
kvq_status json_parse_file(const char *path, cJSON **out, kvq_error *err);

// cJSON ends a string at an escaped zero character without a word, so that "a\u0000b" would become "a".
// KVQ_ERR_UNSUPPORTED gives the byte offset of such an escape.
kvq_status json_check_no_zero(const char *text, size_t n, const char *what, kvq_error *err);

// An integer stored as a JSON number with an exact value in [low, high]. Missing: *out untouched, KVQ_OK when optional.
kvq_status json_get_int(const cJSON *object, const char *key, const char *what, bool optional, int64_t low,
                        int64_t high, int64_t *out, kvq_error *err);
// A finite number.
kvq_status json_get_double(const cJSON *object, const char *key, const char *what, bool optional, double *out,
                           kvq_error *err);
kvq_status json_get_bool(const cJSON *object, const char *key, const char *what, bool optional, bool *out,
                         kvq_error *err);
// A string; *out points into the tree. JSON null counts as missing in all of these.
kvq_status json_get_string(const cJSON *object, const char *key, const char *what, bool optional, const char **out,
                           kvq_error *err);
kvq_status json_get_object(const cJSON *object, const char *key, const char *what, bool optional, const cJSON **out,
                           kvq_error *err);
// Exactly n finite numbers.
kvq_status json_get_doubles(const cJSON *object, const char *key, const char *what, int64_t n, double *out,
                            kvq_error *err);

#endif
