// SPDX-License-Identifier: Apache-2.0
//
// --mix NAME=WEIGHT,NAME=WEIGHT: each text under its file name or as --text has it. Names may hold commas and equals
// signs: a name is recognised, not cut out.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_cli.h"

// Length of `name` when text begins with it and an equals sign, else 0.
static size_t named(const char *text, const char *name) {
    size_t n = strlen(name);
    return strncmp(text, name, n) == 0 && text[n] == '=' ? n : 0;
}

// Which text an entry means: the longest name wins, the path over the file name. -1 = none, -2 = several.
static int find_text(const char *entry, const kvq_cli_list *texts, size_t *length) {
    int found = -1;
    *length = 0;
    for (int i = 0; i < texts->count; i++) {
        const char *path = texts->items[i];
        size_t      by_path = named(entry, path), by_name = named(entry, kvq_file_name(path));
        size_t      n = by_path > by_name ? by_path : by_name;
        if (n > *length) {
            found = i;
            *length = n;
        } else if (n > 0 && n == *length) {
            found = -2;
        }
    }
    return found;
}

static kvq_status parse_weight(const char *entry, const char *text, double *weight, size_t *length, kvq_error *err) {
    char *end;
    *weight = strtod(text, &end);
    *length = (size_t)(end - text);
    bool digits = strspn(text, "+-.0123456789eE") >= *length; // no hexadecimal numbers, "inf" or "nan"
    if (end != text && digits && (*end == 0 || *end == ',') && *weight >= 0 && isfinite(*weight)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--mix: '%.*s' has no weight of 0 or more, like NAME=0.6",
                    (int)(strcspn(text, ",") + (size_t)(text - entry)), entry);
}

static kvq_status check_all(const kvq_cli_list *texts, const double *weights, kvq_error *err) {
    double sum = 0;
    for (int i = 0; i < texts->count; i++) {
        if (weights[i] < 0) {
            return kvq_fail(err, KVQ_ERR_USAGE, "name every text; 0 leaves one out", "--mix: no weight for %s",
                            kvq_file_name(texts->items[i]));
        }
        sum += weights[i];
    }
    if (sum > 0 && isfinite(sum)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--mix: the weights add up to %g", sum);
}

kvq_status kvq_cli_parse_mix(const char *mix, const kvq_cli_list *texts, double *weights, kvq_error *err) {
    if (texts->count < 2)
        return kvq_fail(err, KVQ_ERR_USAGE, "give several --text, or leave --mix out", "--mix: there is only one text");
    for (int i = 0; i < texts->count; i++) weights[i] = -1;
    for (const char *entry = mix;;) {
        size_t n_name = 0, n_weight = 0;
        double weight = 0;
        int    i = find_text(entry, texts, &n_name);
        if (i < 0) {
            return kvq_fail(err, KVQ_ERR_USAGE,
                            i == -1 ? "use the file names given with --text" : "use the paths given with --text",
                            i == -1 ? "--mix: '%.*s' names none of the texts" : "--mix: '%.*s' names several texts",
                            (int)strcspn(entry, "=,"), entry);
        }
        kvq_status status = parse_weight(entry, entry + n_name + 1, &weight, &n_weight, err);
        if (status != KVQ_OK) return status;
        if (weights[i] >= 0)
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--mix: %s is named twice", kvq_file_name(texts->items[i]));
        weights[i] = weight;
        entry += n_name + 1 + n_weight;
        if (*entry == 0) break;
        entry++;
    }
    return check_all(texts, weights, err);
}
