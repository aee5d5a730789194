// SPDX-License-Identifier: Apache-2.0
// Growing bytes: what observers save, and what travels between processes.
#include <string.h>

#include "calib_impl.h"

void kvq_blob_free(const kvq_context *ctx, kvq_blob *blob) {
    kvq_free(ctx, blob->data);
    *blob = (kvq_blob){0};
}

kvq_status kvq_blob_extend(const kvq_context *ctx, kvq_blob *blob, int64_t bytes, uint8_t **at, kvq_error *err) {
    if (bytes > blob->capacity - blob->bytes) {
        int64_t    capacity = blob->bytes + bytes + blob->bytes / 2;
        uint8_t   *data = NULL;
        kvq_status status = KVQ_NEW(ctx, capacity, "statistics to save", &data, err);
        if (status != KVQ_OK) return status;
        if (blob->bytes > 0) memcpy(data, blob->data, (size_t)blob->bytes);
        kvq_free(ctx, blob->data);
        blob->data = data;
        blob->capacity = capacity;
    }
    *at = blob->data + blob->bytes;
    blob->bytes += bytes;
    return KVQ_OK;
}

kvq_status kvq_blob_append(const kvq_context *ctx, kvq_blob *blob, const void *data, int64_t bytes, kvq_error *err) {
    uint8_t   *at = NULL;
    kvq_status status = kvq_blob_extend(ctx, blob, bytes, &at, err);
    if (status == KVQ_OK && bytes > 0) memcpy(at, data, (size_t)bytes);
    return status;
}

kvq_status blob_take(blob_reader *reader, void *to, int64_t bytes, kvq_error *err) {
    if (bytes > reader->left) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "saved statistics end %lld bytes too early",
                        (long long)(bytes - reader->left));
    }
    if (bytes > 0 && to != NULL) memcpy(to, reader->at, (size_t)bytes);
    reader->at += bytes;
    reader->left -= bytes;
    return KVQ_OK;
}

kvq_status blob_append_sized(const kvq_context *ctx, kvq_blob *blob, int64_t bytes, uint8_t **at, kvq_error *err) {
    kvq_status status = kvq_blob_append(ctx, blob, &bytes, sizeof bytes, err);
    return status == KVQ_OK ? kvq_blob_extend(ctx, blob, bytes, at, err) : status;
}

kvq_status blob_take_sized(blob_reader *reader, const uint8_t **at, int64_t *bytes, kvq_error *err) {
    kvq_status status = blob_take(reader, bytes, sizeof *bytes, err);
    if (status != KVQ_OK) return status;
    if (*bytes < 0) return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "saved statistics of %lld bytes", (long long)*bytes);
    *at = reader->at;
    return blob_take(reader, NULL, *bytes, err);
}
