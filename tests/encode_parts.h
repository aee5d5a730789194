// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: a text encoded in parts of random sizes must have the ids it has as a whole.
#ifndef ENCODE_PARTS_H
#define ENCODE_PARTS_H

#include "kvq_io.h"
#include "kvq_test.h"

// Sizes are 0 .. largest bytes and follow the seed. *early (may be NULL) receives how many ids came before the last
// part.
static inline void encode_parts(const kvq_tokenizer *t, const char *text, size_t n, bool parse_special, size_t largest,
                                uint64_t seed, kvq_ids *ids, int64_t *early) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_encoder *e = NULL;
    kvq_test_ok(kvq_encoder_create(&ctx, t, parse_special, &e, &err), &err);
    for (uint64_t i = 0; n > 0; i++) {
        size_t size = (size_t)kvq_rng_below(seed, KVQ_RNG_TEST, 0, i, largest + 1);
        if (size > n) size = n;
        kvq_test_ok(kvq_encoder_push(e, text, size, false, ids, &err), &err);
        text += size;
        n -= size;
    }
    if (early != NULL) *early = ids->count;
    kvq_test_ok(kvq_encoder_push(e, text, 0, true, ids, &err), &err);
    kvq_encoder_destroy(&ctx, &e);
    ck_assert_ptr_null(e);
}

static inline void check_parts(const kvq_tokenizer *t, const char *text, size_t n, bool parse_special,
                               const kvq_ids *whole, const char *name) {
    static const size_t LARGEST[] = {1, 2, 3, 5, 9, 40, 1000};
    kvq_context         ctx = kvq_test_context();
    for (size_t k = 0; k < sizeof LARGEST / sizeof *LARGEST; k++) {
        kvq_ids parts = {0};
        encode_parts(t, text, n, parse_special, LARGEST[k], n + k, &parts, NULL);
        ck_assert_msg(parts.count == whole->count, "%s in parts of up to %zu bytes: %lld ids instead of %lld", name,
                      LARGEST[k], (long long)parts.count, (long long)whole->count);
        for (int64_t i = 0; i < whole->count; i++)
            ck_assert_msg(parts.data[i] == whole->data[i],
                          "%s in parts of up to %zu bytes: id %lld is %d instead of %d", name, LARGEST[k], (long long)i,
                          parts.data[i], whole->data[i]);
        kvq_ids_free(&ctx, &parts);
    }
}

#endif
