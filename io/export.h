// SPDX-License-Identifier: Apache-2.0
//
// Private to io: what the export targets share. A target prints the record list of an artifact (records.h), so it
// carries every field without naming one; a check reads the file by other code and looks every record up.
#ifndef KVQ_IO_EXPORT_H
#define KVQ_IO_EXPORT_H

#include "artifact_schema.h"

// The sorted records of an artifact with its content hash among them.
kvq_status export_records(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                          record_list *out, kvq_error *err);

// A number as text that reads back as the same f32 or f64, in the notation of JSON whatever the locale is.
#define EXPORT_NUMBER 40
void export_number(double value, record_type type, char out[EXPORT_NUMBER]);
// Datasets have at least one dimension and are f32 or i64; an element is exact as a double.
static inline bool   export_is_array(const record *r) { return r->rank > 0; }
static inline double export_element(const record *r, int64_t i) {
    return r->type == RECORD_I64 ? (double)((const int64_t *)r->data)[i] : (double)((const float *)r->data)[i];
}
// The text of a record of rank 0; numbers are printed into `storage`.
const char *export_text(const record *r, char storage[EXPORT_NUMBER]);

kvq_status export_json_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                             const char *path, bool force, kvq_error *err);
kvq_status export_json_check(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                             const char *path, double *max_error, kvq_error *err);
kvq_status export_safetensors_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                                    const char *path, bool force, kvq_error *err);
kvq_status export_safetensors_check(const kvq_context *ctx, const kvq_artifact *artifact, const char *content_sha256,
                                    const char *path, double *max_error, kvq_error *err);

#endif
