// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites about checkpoints: files in the test's folder, and checkpoints that open or are refused.
#ifndef KVQ_CHECKPOINT_TEST_H
#define KVQ_CHECKPOINT_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_io.h"
#include "kvq_test.h"

// Paths in the test's folder; four may be in use at once.
static inline const char *in_folder(const char *name) {
    static char paths[4][256];
    static int  turn;
    char       *path = paths[turn = (turn + 1) % 4];
    (void)snprintf(path, sizeof paths[0], "%s/%s", kvq_test_folder(), name);
    return path;
}

static inline void write_bytes(const char *path, const void *data, size_t n) {
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(data, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
}

static inline char *read_bytes(const char *path, size_t *n) {
    kvq_mapped_file file = {0};
    kvq_error       err = {0};
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    char *copy = malloc(file.bytes);
    memcpy(copy, file.data, file.bytes);
    *n = file.bytes;
    kvq_unmap_file(&file);
    return copy;
}

static inline kvq_checkpoint *open_good(const char *path) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_checkpoint *c = NULL;
    kvq_test_ok(kvq_checkpoint_open(&ctx, path, &c, &err), &err);
    return c;
}

static inline void close_it(kvq_checkpoint *c) {
    kvq_context ctx = kvq_test_context();
    kvq_checkpoint_close(&ctx, &c);
}

// Opening fails with this status, the message holds `fragment`, and nothing is returned.
static inline void refused(const char *path, kvq_status expected, const char *fragment) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_checkpoint *c = NULL;
    kvq_status      status = kvq_checkpoint_open(&ctx, path, &c, &err);
    kvq_test_failed(status, expected, &err, fragment);
    ck_assert_ptr_null(c);
    ck_assert_int_ne(err.next[0], 0);
}

#endif
