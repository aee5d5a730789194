// SPDX-License-Identifier: Apache-2.0
//
// Which of kvq's HDF5 files a file is. HDF5 sees only what is sealed, or what has checksums of its own (a capture).
#include <stdio.h>
#include <string.h>

#include "arrays.h"

static const container_kind ANY = {"artifacts and measurements", "kvq-calibrate"};

static kvq_status read_format(const kvq_context *ctx, const char *path, bool sealed, char out[KVQ_FORMAT_NAME],
                              kvq_error *err) {
    arrays_reader *r = NULL;
    array_value    value = {0};
    kvq_status     status = KVQ_OK;
    KVQ_TRY(arrays_open(ctx, path, sealed, ANY, &r, err));
    KVQ_TRY(arrays_get(ctx, r, "/", "kvq_format", &value, err));
    if (value.kind != ARRAY_TEXT || strlen(value.text) >= KVQ_FORMAT_NAME) {
        status =
            kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: an HDF5 file without a text /@kvq_format: not made by kvq", path);
        goto done;
    }
    strcpy(out, value.text);
done:
    array_value_free(ctx, &value);
    arrays_close(ctx, &r);
    return status;
}

static kvq_status has_seal(const char *path, bool *out, kvq_error *err) {
    kvq_mapped_file file = {0};
    kvq_status      status = kvq_map_file(path, &file, err);
    if (status != KVQ_OK) return status;
    *out = seal_is_there(file.data, file.bytes);
    kvq_unmap_file(&file);
    return KVQ_OK;
}

// Without a seal it can only be a capture; anything else lost its end, which is what the first error says.
kvq_status kvq_file_format(const kvq_context *ctx, const char *path, char out[KVQ_FORMAT_NAME], kvq_error *err) {
    char       format[KVQ_FORMAT_NAME] = "";
    bool       sealed = false;
    kvq_status status = has_seal(path, &sealed, err);
    if (status != KVQ_OK) return status;
    if (!sealed && read_format(ctx, path, false, format, NULL) == KVQ_OK && strcmp(format, "kvq.capture") == 0) {
        strcpy(out, format);
        return KVQ_OK;
    }
    return read_format(ctx, path, true, out, err);
}
