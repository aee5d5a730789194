// SPDX-License-Identifier: Apache-2.0
// Artifact files: versions, hashes, and the way between a file and kvq_artifact. See artifact_schema.h and
// docs/format.md.
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "artifact_schema.h"

// ---------------------------------------------------------------- in memory

static const container_kind ARTIFACTS = {"kvq artifacts", "kvq-calibrate"};

kvq_status artifact_to_image(const kvq_context *ctx, const kvq_artifact *artifact, uint8_t **image, size_t *bytes,
                             char content_sha256[KVQ_SHA256_HEX], kvq_error *err) {
    record_list list = {0};
    uint8_t    *made = NULL;
    size_t      n = 0;
    kvq_status  status = KVQ_OK;
    char        content[KVQ_SHA256_HEX], numeric[KVQ_SHA256_HEX], line[SEAL_BYTES + 1];
    KVQ_TRY(artifact_to_records(ctx, artifact, &list, err));
    KVQ_TRY(artifact_content_hash(&list, content, err));
    KVQ_TRY(artifact_numeric_hash(&list, numeric, err));
    KVQ_TRY(record_add(ctx, &list, ARTIFACT_CONTENT_HASH, RECORD_TEXT, 0, NULL, content, err));
    KVQ_TRY(record_add(ctx, &list, ARTIFACT_NUMERIC_HASH, RECORD_TEXT, 0, NULL, numeric, err));
    record_sort(&list);
    KVQ_TRY(records_to_hdf5(ctx, &list, SEAL_BYTES, &made, &n, err));
    KVQ_TRY(seal_make(made, n, line, err));
    memcpy(made + n, line, SEAL_BYTES);
    *image = made;
    *bytes = n + SEAL_BYTES;
    made = NULL;
    strcpy(content_sha256, content);
done:
    kvq_free(ctx, made);
    record_list_free(ctx, &list);
    return status;
}

static const char *take_text(record_list *list, const char *path) {
    const record *r = record_take(list, path);
    return r != NULL && r->type == RECORD_TEXT ? r->data : "";
}

// Comes before everything else: a newer format may define the hash itself differently.
static kvq_status check_version(record_list *list, int *minor, kvq_error *err) {
    kvq_status status = container_check_format(take_text(list, "/@kvq_format"), ARTIFACT_FORMAT, err);
    if (status != KVQ_OK) return status;
    return container_check_version("artifact", take_text(list, "/@kvq_format_version"),
                                   take_text(list, "/@kvq_min_reader"), ARTIFACT_MAJOR, ARTIFACT_MINOR, minor, err);
}

static kvq_status check_hashes(record_list *list, char content[KVQ_SHA256_HEX], kvq_error *err) {
    char        numeric[KVQ_SHA256_HEX];
    const char *stored = take_text(list, ARTIFACT_CONTENT_HASH),
               *stored_numeric = take_text(list, ARTIFACT_NUMERIC_HASH);
    kvq_status status = artifact_content_hash(list, content, err);
    if (status == KVQ_OK) status = artifact_numeric_hash(list, numeric, err);
    if (status != KVQ_OK) return status;
    if (strcmp(stored, content) != 0 || strcmp(stored_numeric, numeric) != 0) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                        "the content has the SHA-256 %.12s..., but the file says %.12s...", content,
                        strcmp(stored, content) != 0 ? stored : stored_numeric);
    }
    return KVQ_OK;
}

kvq_status artifact_from_image(const kvq_context *ctx, const uint8_t *image, size_t bytes, kvq_artifact **out,
                               char content_sha256[KVQ_SHA256_HEX], kvq_error *err) {
    record_list   list = {0};
    kvq_artifact *artifact = NULL;
    char          content[KVQ_SHA256_HEX];
    int           minor = 0;
    kvq_status    status = KVQ_OK;
    KVQ_TRY(seal_check(image, &bytes, ARTIFACTS, err));
    KVQ_TRY(records_from_hdf5(ctx, image, bytes, &list, err));
    KVQ_TRY(check_version(&list, &minor, err));
    KVQ_TRY(check_hashes(&list, content, err));
    KVQ_TRY(artifact_from_records(ctx, &list, minor, &artifact, err));
    const record *unknown = record_first_untaken(&list);
    if (unknown != NULL && minor <= ARTIFACT_MINOR) { // ignoring it could change what the numbers mean
        status =
            kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is not part of format %d.%d", unknown->path, ARTIFACT_MAJOR, minor);
        goto done;
    }
    *out = artifact;
    artifact = NULL;
    strcpy(content_sha256, content);
done:
    kvq_artifact_destroy(ctx, &artifact);
    record_list_free(ctx, &list);
    return status;
}

kvq_status kvq_artifact_pack(const kvq_context *ctx, const kvq_artifact *artifact, uint8_t **data, size_t *bytes,
                             kvq_error *err) {
    char content[KVQ_SHA256_HEX];
    return artifact_to_image(ctx, artifact, data, bytes, content, err);
}

kvq_status kvq_artifact_hash(const kvq_context *ctx, const kvq_artifact *artifact, char content_sha256[KVQ_SHA256_HEX],
                             kvq_error *err) {
    uint8_t   *data = NULL;
    size_t     bytes = 0;
    kvq_status status = artifact_to_image(ctx, artifact, &data, &bytes, content_sha256, err);
    kvq_free(ctx, data);
    return status;
}

kvq_status kvq_artifact_unpack(const kvq_context *ctx, const uint8_t *data, size_t bytes, kvq_artifact **out,
                               kvq_error *err) {
    char content[KVQ_SHA256_HEX];
    return artifact_from_image(ctx, data, bytes, out, content, err);
}

// ---------------------------------------------------------------- files

kvq_status kvq_artifact_read(const kvq_context *ctx, const char *path, kvq_artifact **out,
                             char content_sha256[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_mapped_file file = {0};
    char            format[KVQ_FORMAT_NAME];
    kvq_status      status = kvq_map_file(path, &file, err);
    if (status != KVQ_OK) return status;
    status = artifact_from_image(ctx, file.data, file.bytes, out, content_sha256, err);
    kvq_unmap_file(&file);
    // a sound file of another kind fails in many ways, none of which says so
    if (status != KVQ_OK && status != KVQ_ERR_MEMORY && kvq_file_format(ctx, path, format, NULL) == KVQ_OK &&
        strcmp(format, ARTIFACT_FORMAT) != 0) {
        status = container_check_format(format, ARTIFACT_FORMAT, err);
    }
    if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", path);
    return status;
}

// What lies on the disk is read with all checks, and must be what lies in memory.
static kvq_status read_back(const kvq_context *ctx, const char *path, const char *content_sha256, kvq_error *err) {
    kvq_artifact *again = NULL;
    char          hash[KVQ_SHA256_HEX] = "";
    kvq_status    status = kvq_artifact_read(ctx, path, &again, hash, err);
    kvq_artifact_destroy(ctx, &again);
    if (status == KVQ_OK && strcmp(hash, content_sha256) != 0) {
        status =
            kvq_fail(err, KVQ_ERR_DISK, NULL, "%s: reading back gives the content hash %.12s... instead of %.12s...",
                     path, hash, content_sha256);
    }
    return status;
}

kvq_status kvq_artifact_write(const kvq_context *ctx, const kvq_artifact *artifact, const char *path, bool force,
                              char content_sha256[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_output output = {0};
    uint8_t   *image = NULL;
    size_t     bytes = 0;
    char       content[KVQ_SHA256_HEX];
    kvq_status status = artifact_to_image(ctx, artifact, &image, &bytes, content, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", path);
        return status;
    }
    KVQ_TRY(kvq_output_begin(ctx, path, force, &output, err));
    KVQ_TRY(kvq_output_write(&output, image, bytes, err));
    KVQ_TRY(read_back(ctx, output.temporary, content, err));
    KVQ_TRY(kvq_output_commit(ctx, &output, err));
    strcpy(content_sha256, content);
done:
    kvq_output_discard(ctx, &output);
    kvq_free(ctx, image);
    return status;
}
