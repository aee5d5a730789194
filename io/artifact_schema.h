// SPDX-License-Identifier: Apache-2.0
//
// Private to io: the layout of an artifact, defined once. Writing, reading and both exports go through the record list
// that this schema makes; docs/format.md describes the same layout for people. Messages name the field; callers put the
// file's name in front.
#ifndef KVQ_IO_ARTIFACT_SCHEMA_H
#define KVQ_IO_ARTIFACT_SCHEMA_H

#include "artifact_fields.h"
#include "container.h"

#define ARTIFACT_FORMAT       "kvq.artifact"
#define ARTIFACT_MAJOR        1 // other numbers are refused
#define ARTIFACT_MINOR        2 // larger ones are read when the file's kvq_min_reader allows it
#define ARTIFACT_CONTENT_HASH "/@content_sha256"
#define ARTIFACT_NUMERIC_HASH "/@numeric_sha256"

// All records of an artifact, sorted, without the two hashes. Every range is checked: an artifact that could not be
// read again is not written.
kvq_status artifact_to_records(const kvq_context *ctx, const kvq_artifact *artifact, record_list *out, kvq_error *err);
// The artifact that a sorted list of this minor version describes. Checks the same ranges; marks the records it
// understood.
kvq_status artifact_from_records(const kvq_context *ctx, record_list *list, int minor, kvq_artifact **out,
                                 kvq_error *err);

// The two hashes of docs/format.md over a sorted list.
kvq_status artifact_content_hash(const record_list *list, char hex[KVQ_SHA256_HEX], kvq_error *err);
kvq_status artifact_numeric_hash(const record_list *list, char hex[KVQ_SHA256_HEX], kvq_error *err);

// A whole artifact file in memory; `image` is released with kvq_free. Reading does all the checks of kvq_artifact_read.
kvq_status artifact_to_image(const kvq_context *ctx, const kvq_artifact *artifact, uint8_t **image, size_t *bytes,
                             char content_sha256[KVQ_SHA256_HEX], kvq_error *err);
kvq_status artifact_from_image(const kvq_context *ctx, const uint8_t *image, size_t bytes, kvq_artifact **out,
                               char content_sha256[KVQ_SHA256_HEX], kvq_error *err);

#endif
