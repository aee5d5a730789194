// SPDX-License-Identifier: Apache-2.0
// The table of export targets and what they share. To add a target: one file with a writer and a checker, one row here,
// one section in docs/export.md.
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "export.h"

static const kvq_export_target TARGETS[] = {
    {"json", "one .json file", "any program that reads JSON",
     "everything: settings, codebooks, thresholds, fit reports, provenance", export_json_write, export_json_check},
    {"safetensors", "one .safetensors file", "any program that reads safetensors",
     "codebooks, thresholds and widths as tensors, everything else as metadata text", export_safetensors_write,
     export_safetensors_check},
};

const kvq_export_target *kvq_export_targets(int *n_targets) {
    *n_targets = (int)(sizeof TARGETS / sizeof *TARGETS);
    return TARGETS;
}

const kvq_export_target *kvq_export_find(const char *name) {
    for (size_t i = 0; i < sizeof TARGETS / sizeof *TARGETS; i++) {
        if (strcmp(TARGETS[i].name, name) == 0) return &TARGETS[i];
    }
    return NULL;
}

kvq_status export_records(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                          record_list *out, kvq_error *err) {
    record_list list = {0};
    kvq_status  status = artifact_to_records(ctx, artifact, &list, err);
    if (status == KVQ_OK) {
        status = record_add(ctx, &list, ARTIFACT_CONTENT_HASH, RECORD_TEXT, 0, NULL, content_sha256, err);
    }
    if (status != KVQ_OK) {
        record_list_free(ctx, &list);
        return status;
    }
    record_sort(&list);
    *out = list;
    return KVQ_OK;
}

// 9 and 17 significant digits are enough for f32 and f64 (Steele and White, PLDI 1990). printf writes the locale's
// decimal point, and everything else it writes is a digit, a sign or an 'e'. A whole number gets ".0": readers that
// take it for an integer would lose the sign of -0.
void export_number(double value, record_type type, char out[EXPORT_NUMBER]) {
    char text[EXPORT_NUMBER];
    int  n = 0;
    (void)snprintf(text, sizeof text, "%.*g", type == RECORD_F32 ? 9 : 17, value);
    for (const char *c = text; *c != 0; c++) {
        bool is_point = strchr("0123456789+-e", *c) == NULL;
        if (is_point && n > 0 && out[n - 1] == '.') continue; // a point of several bytes
        out[n++] = is_point ? '.' : *c;
    }
    strcpy(out + n, strspn(text, "0123456789-") == strlen(text) ? ".0" : "");
}

const char *export_text(const record *r, char storage[EXPORT_NUMBER]) {
    switch (r->type) {
    case RECORD_I64:
        (void)snprintf(storage, EXPORT_NUMBER, "%" PRId64, *(const int64_t *)r->data);
        return storage;
    case RECORD_U64:
        (void)snprintf(storage, EXPORT_NUMBER, "%" PRIu64, *(const uint64_t *)r->data);
        return storage;
    case RECORD_F64:
        export_number(*(const double *)r->data, r->type, storage);
        return storage;
    default:
        return r->data;
    }
}
