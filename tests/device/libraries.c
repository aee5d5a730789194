// SPDX-License-Identifier: Apache-2.0
//
// Stands in for what needs OpenSSL (core/sha256.c) and LAPACK (codebook/spectrum.c) in the device suites. Their caches
// are sealed, and nobody looks at the seal: it is no hash at all, so that none can pass for one.
#include <string.h>

#include "codebook_impl.h"

static char nothing; // what a hash points to

kvq_status kvq_sha256_create(kvq_sha256 **out, kvq_error *err) {
    (void)err;
    *out = (kvq_sha256 *)(void *)&nothing;
    return KVQ_OK;
}

void kvq_sha256_push(kvq_sha256 *hash, const void *data, size_t bytes) { (void)hash, (void)data, (void)bytes; }

void kvq_sha256_finalize(kvq_sha256 **hash, char hex[KVQ_SHA256_HEX]) {
    *hash = NULL;
    memset(hex, '-', KVQ_SHA256_HEX - 1);
    hex[KVQ_SHA256_HEX - 1] = 0;
}

kvq_status kvq_sha256_of(const void *data, size_t bytes, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_sha256 *hash = NULL;
    (void)data, (void)bytes, (void)err;
    kvq_sha256_finalize(&hash, hex);
    return KVQ_OK;
}

void codebook_keep_lapack_to_one_thread(void) {}
