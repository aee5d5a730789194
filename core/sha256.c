// SPDX-License-Identifier: Apache-2.0
// SHA-256 through OpenSSL, which uses the processor's instructions for it.
#include <openssl/evp.h>
#include <stdio.h>

#include "kvq_core.h"

// kvq_sha256 is OpenSSL's digest context under another name: one pointer, no wrapper allocation.
static EVP_MD_CTX *digest_of(kvq_sha256 *hash) { return (EVP_MD_CTX *)(void *)hash; }

kvq_status kvq_sha256_create(kvq_sha256 **out, kvq_error *err) {
    EVP_MD_CTX *digest = EVP_MD_CTX_new();
    if (digest == NULL || EVP_DigestInit_ex(digest, EVP_sha256(), NULL) != 1) {
        EVP_MD_CTX_free(digest);
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "SHA-256: the crypto library gave no digest context");
    }
    *out = (kvq_sha256 *)(void *)digest;
    return KVQ_OK;
}

void kvq_sha256_push(kvq_sha256 *hash, const void *data, size_t bytes) {
    (void)EVP_DigestUpdate(digest_of(hash), data, bytes); // cannot fail for an initialised digest
}

void kvq_sha256_finalize(kvq_sha256 **hash, char hex[KVQ_SHA256_HEX]) {
    unsigned char sum[EVP_MAX_MD_SIZE] = {0};
    (void)EVP_DigestFinal_ex(digest_of(*hash), sum, NULL);
    EVP_MD_CTX_free(digest_of(*hash));
    *hash = NULL;
    for (int i = 0; i < 32; i++) (void)snprintf(hex + 2 * i, 3, "%02x", sum[i]);
}

kvq_status kvq_sha256_of(const void *data, size_t bytes, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_sha256 *hash = NULL;
    kvq_status  status = kvq_sha256_create(&hash, err);
    if (status != KVQ_OK) return status;
    kvq_sha256_push(hash, data, bytes);
    kvq_sha256_finalize(&hash, hex);
    return KVQ_OK;
}
