// SPDX-License-Identifier: Apache-2.0
//
// Private to io: what kvq's own HDF5 files have in common around their content (docs/format.md): the seal behind the
// last byte and the spelling of versions.
#ifndef KVQ_IO_CONTAINER_H
#define KVQ_IO_CONTAINER_H

#include "kvq_core.h"

// Behind the end of the HDF5 file one line of text: this, the SHA-256 of all bytes before it, a line feed. A file of
// ours without it is not read: HDF5 1.10.8 crashes on damaged structures that have no checksums of their own, and loses
// memory on those that have, so damage must be found before HDF5 sees it.
#define SEAL       "kvq-sha256:"
#define SEAL_BYTES (sizeof SEAL - 1 + KVQ_SHA256_HEX)

// A kind of file, for messages: "kvq artifacts are HDF5 files, made by kvq-calibrate".
typedef struct container_kind {
    const char *are, *made_by;
} container_kind;

// KVQ_ERR_INPUT when the bytes do not begin as HDF5 does.
kvq_status container_is_hdf5(const uint8_t *image, size_t bytes, container_kind kind, kvq_error *err);

bool seal_is_there(const uint8_t *image, size_t bytes); // right or wrong
// The line for these bytes.
kvq_status seal_make(const uint8_t *image, size_t bytes, char line[SEAL_BYTES + 1], kvq_error *err);
// Checks the seal and takes it off *bytes. KVQ_ERR_INPUT for what is no HDF5 file, KVQ_ERR_INTEGRITY for what is
// damaged.
kvq_status seal_check(const uint8_t *image, size_t *bytes, container_kind kind, kvq_error *err);

// "MAJOR.MINOR" in its one spelling.
bool container_parse_version(const char *text, int *major, int *minor);

// `found` is what a file's /@kvq_format says, "" for nothing. KVQ_ERR_INPUT when it is not `wanted`; the advice tells
// what reads the kind of file that was found.
kvq_status container_check_format(const char *found, const char *wanted, kvq_error *err);

// The two versions of a file against what this reader reads, major.minor. *file_minor may be larger than minor, in a
// file that allows its older readers. KVQ_ERR_INPUT, KVQ_ERR_VERSION; `what` as in "artifact format 2.0".
kvq_status container_check_version(const char *what, const char *version, const char *min_reader, int major, int minor,
                                   int *file_minor, kvq_error *err);

#endif
