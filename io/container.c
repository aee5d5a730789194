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

bool seal_is_there(const uint8_t *image, size_t bytes) {
    return bytes > SEAL_BYTES && memcmp(image + bytes - SEAL_BYTES, SEAL, strlen(SEAL)) == 0;
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
    if (!seal_is_there(image, *bytes)) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NO_SEAL,
                        "its last line is not '" SEAL
                        "...': truncated, rewritten by another program, or no file of kvq");
    }
    size_t before = *bytes - SEAL_BYTES;
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

// ---------------------------------------------------------------- what kind of file

static const struct {
    const char *format, *advice;
} FORMATS[] = {
    {"kvq.artifact", "this is an artifact (.kvq.h5): kvq-inspect, kvq-validate and kvq-export read it"},
    {"kvq.capture", "this is a capture (.kvqc.h5): it is for kvq-calibrate --capture"},
    {"kvq.partial", "this is the result of a shard (.kvqp): kvq-merge reads it"},
    {"kvq.measurement", "this is a measurement (.kvqm.h5): kvq-inspect and kvq-calibrate --from read it"},
};

kvq_status container_check_format(const char *found, const char *wanted, kvq_error *err) {
    const char *advice = NULL;
    if (strcmp(found, wanted) == 0) return KVQ_OK;
    for (size_t i = 0; i < sizeof FORMATS / sizeof *FORMATS; i++) {
        if (strcmp(found, FORMATS[i].format) == 0) advice = FORMATS[i].advice;
    }
    return kvq_fail(err, KVQ_ERR_INPUT, advice, "an HDF5 file, but its attribute kvq_format is '%.80s' instead of '%s'",
                    found, wanted);
}

kvq_status container_check_version(const char *what, const char *version, const char *min_reader, int major, int minor,
                                   int *file_minor, kvq_error *err) {
    int file_major = 0, parsed_minor = 0, reader_major = 0, reader_minor = 0;
    if (!container_parse_version(version, &file_major, &parsed_minor) ||
        !container_parse_version(min_reader, &reader_major, &reader_minor)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "the versions '%.80s' (kvq_format_version) and '%.80s' (kvq_min_reader) cannot be read",
                        version, min_reader);
    }
    if (file_major != major || reader_major != major || reader_minor > minor) {
        return kvq_fail(err, KVQ_ERR_VERSION, NULL,
                        "%s format %s, which needs a reader of format %s; this is kvq " KVQ_VERSION
                        ", which reads %d.%d",
                        what, version, min_reader, major, minor);
    }
    *file_minor = parsed_minor;
    return KVQ_OK;
}
