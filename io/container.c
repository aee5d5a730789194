// SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include "container.h"

static const uint8_t HDF5_SIGNATURE[8] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
static const char NO_SEAL[] = "fetch it again; a capture (.kvqc.h5) is for kvq-calibrate --capture; a rewritten file "
                              "lost its seal (docs/format.md)";

kvq_status container_is_hdf5(const uint8_t *image, size_t bytes, container_kind kind, kvq_error *err) {
    char advice[200];
    if (bytes >= sizeof HDF5_SIGNATURE && memcmp(image, HDF5_SIGNATURE, sizeof HDF5_SIGNATURE) == 0) return KVQ_OK;
    (void)snprintf(advice, sizeof advice, "%s are HDF5 files, made by %s", kind.are, kind.made_by);
    return kvq_fail(err, KVQ_ERR_INPUT, advice, "this is not an HDF5 file");
}

kvq_status seal_make(const uint8_t *image, size_t bytes, char line[SEAL_BYTES + 1], kvq_error *err) {
    char       hex[KVQ_SHA256_HEX];
    kvq_status status = kvq_sha256_of(image, bytes, hex, err);
    if (status == KVQ_OK) (void)snprintf(line, SEAL_BYTES + 1, SEAL "%s\n", hex);
    return status;
}

kvq_status seal_check(const uint8_t *image, size_t *bytes, container_kind kind, kvq_error *err) {
    char       line[SEAL_BYTES + 1];
    kvq_status status = container_is_hdf5(image, *bytes, kind, err);
    if (status != KVQ_OK) return status;
    size_t before = *bytes < SEAL_BYTES ? 0 : *bytes - SEAL_BYTES;
    if (before == 0 || memcmp(image + before, SEAL, strlen(SEAL)) != 0) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NO_SEAL,
                        "its last line is not '" SEAL
                        "...': truncated, rewritten by another program, or no file of kvq");
    }
    status = seal_make(image, before, line, err);
    if (status == KVQ_OK && memcmp(image + before, line, SEAL_BYTES) != 0) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "its bytes do not have the SHA-256 that its last line says");
    }
    if (status == KVQ_OK) *bytes = before;
    return status;
}

bool container_parse_version(const char *text, int *major, int *minor) {
    char again[32];
    if (sscanf(text, "%4d.%4d", major, minor) != 2) return false;
    (void)snprintf(again, sizeof again, "%d.%d", *major, *minor);
    return *major >= 0 && *minor >= 0 && strcmp(again, text) == 0;
}
