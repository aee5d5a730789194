// SPDX-License-Identifier: Apache-2.0
// Partial results: names and arrays come back, equal content gives equal bytes, and damage is found before HDF5 sees
// it.
#include <dirent.h>
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kvq_io.h"
#include "kvq_test.h"
#include "limited_memory.h"

static const kvq_field FIELDS[] = {
    {"model", "kleines Modell \xc3\xa4"}, {"seed", "18446744073709551615"}, {"empty", ""}, {"a/b@c", "odd name"}};
static const kvq_count COUNTS[] = {{"round", 1}, {"shard", 0}, {"least", INT64_MIN}, {"most", INT64_MAX}};
#define N_FIELDS 4
#define N_COUNTS 4

static const int64_t SHAPE[] = {2, 3}, EMPTY[] = {0, 3}, ONE[] = {5};
static const float   TAILS[6] = {1, -2.5f, 3e-40f, 0, -0.0f, 6};
static const int64_t SUMS[5] = {1, -2, INT64_MIN, INT64_MAX, 0};
static const uint8_t BYTES[5] = {0, 255, 1, 2, 3};

static char *file_path(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

static int count_files(void) {
    int  n = 0;
    DIR *folder = opendir(kvq_test_folder());
    ck_assert_ptr_nonnull(folder);
    for (const struct dirent *entry = readdir(folder); entry != NULL; entry = readdir(folder))
        n += entry->d_name[0] != '.' || strlen(entry->d_name) > 2;
    (void)closedir(folder);
    return n;
}

static kvq_status write_partial(const kvq_context *ctx, const char *path, kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_partial_writer *w = NULL;
    KVQ_TRY(kvq_partial_create(ctx, path, true, FIELDS, N_FIELDS, COUNTS, N_COUNTS, &w, err));
    KVQ_TRY(kvq_partial_put(w, "layers/0003/k_low", KVQ_ARRAY_F32, 2, SHAPE, TAILS, err));
    KVQ_TRY(kvq_partial_put(w, "layers/0003/none", KVQ_ARRAY_U64, 2, EMPTY, NULL, err));
    KVQ_TRY(kvq_partial_put(w, "sums", KVQ_ARRAY_I64, 1, ONE, SUMS, err));
    KVQ_TRY(kvq_partial_put(w, "raw-bytes", KVQ_ARRAY_U8, 1, ONE, BYTES, err));
    KVQ_TRY(kvq_partial_commit(ctx, &w, err));
done:
    kvq_partial_discard(ctx, &w);
    return status;
}

START_TEST(everything_comes_back) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_partial *p = NULL;
    int64_t      n, value, dims[2];
    float        tails[6];
    int64_t      sums[5];
    uint8_t      raw[5];
    char        *path = file_path("a.kvqp");
    kvq_test_ok(write_partial(&ctx, path, &err), &err);
    ck_assert_int_eq(count_files(), 1);
    kvq_test_ok(kvq_partial_open(&ctx, path, &p, &err), &err);
    const kvq_field *fields = kvq_partial_fields(p, &n);
    ck_assert_int_eq(n, N_FIELDS);
    kvq_test_ok(kvq_fields_compare(FIELDS, N_FIELDS, fields, n, &err), &err);
    for (int i = 0; i < N_COUNTS; i++) {
        kvq_test_ok(kvq_partial_count(p, COUNTS[i].name, INT64_MIN, INT64_MAX, &value, &err), &err);
        ck_assert_int_eq(value, COUNTS[i].value);
    }
    kvq_test_ok(kvq_partial_dims(p, "layers/0003/k_low", KVQ_ARRAY_F32, 2, dims, &err), &err);
    ck_assert(dims[0] == 2 && dims[1] == 3);
    kvq_test_ok(kvq_partial_get(p, "layers/0003/k_low", KVQ_ARRAY_F32, 2, dims, tails, &err), &err);
    ck_assert_mem_eq(tails, TAILS, sizeof TAILS);
    kvq_test_ok(kvq_partial_dims(p, "layers/0003/none", KVQ_ARRAY_U64, 2, dims, &err), &err);
    ck_assert(dims[0] == 0 && dims[1] == 3);
    kvq_test_ok(kvq_partial_get(p, "layers/0003/none", KVQ_ARRAY_U64, 2, dims, NULL, &err), &err);
    kvq_test_ok(kvq_partial_get(p, "sums", KVQ_ARRAY_I64, 1, ONE, sums, &err), &err);
    ck_assert_mem_eq(sums, SUMS, sizeof SUMS);
    kvq_test_ok(kvq_partial_get(p, "raw-bytes", KVQ_ARRAY_U8, 1, ONE, raw, &err), &err);
    ck_assert_mem_eq(raw, BYTES, sizeof BYTES);
    kvq_partial_close(&ctx, &p);
    ck_assert_int_eq(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
}
END_TEST

START_TEST(what_is_asked_wrongly_is_refused) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_partial  *p = NULL;
    int64_t       value, dims[3];
    float         x[6];
    const int64_t other[] = {3, 2};
    char         *path = file_path("a.kvqp");
    kvq_test_ok(write_partial(&ctx, path, &err), &err);
    kvq_test_ok(kvq_partial_open(&ctx, path, &p, &err), &err);
    kvq_test_failed(kvq_partial_count(p, "rounds", 0, 9, &value, &err), KVQ_ERR_INPUT, &err, "count rounds is missing");
    kvq_test_failed(kvq_partial_count(p, "round", 2, 9, &value, &err), KVQ_ERR_INPUT, &err,
                    "round is 1, outside of 2 .. 9");
    kvq_test_failed(kvq_partial_dims(p, "layers/0004/k_low", KVQ_ARRAY_F32, 2, dims, &err), KVQ_ERR_INPUT, &err,
                    "/arrays/layers/0004/k_low is missing");
    kvq_test_failed(kvq_partial_dims(p, "layers/0003", KVQ_ARRAY_F32, 2, dims, &err), KVQ_ERR_INPUT, &err,
                    "not an array");
    kvq_test_failed(kvq_partial_dims(p, "layers/0003/k_low", KVQ_ARRAY_I32, 2, dims, &err), KVQ_ERR_INPUT, &err,
                    "is f32 of 2 dimensions instead of i32 of 2");
    kvq_test_failed(kvq_partial_dims(p, "layers/0003/k_low", KVQ_ARRAY_F32, 3, dims, &err), KVQ_ERR_INPUT, &err,
                    "is f32 of 2 dimensions instead of f32 of 3");
    kvq_test_failed(kvq_partial_get(p, "layers/0003/k_low", KVQ_ARRAY_F32, 2, other, x, &err), KVQ_ERR_INPUT, &err,
                    "a.kvqp: /arrays/layers/0003/k_low has the shape [2, 3] instead of [3, 2]");
    kvq_test_failed(kvq_partial_dims(p, "../fields", KVQ_ARRAY_F32, 2, dims, &err), KVQ_ERR_INTERNAL, &err,
                    "no name of an array");
    kvq_partial_close(&ctx, &p);
}
END_TEST

START_TEST(what_is_put_wrongly_is_refused_and_leaves_nothing) {
    static const char *const BAD_NAMES[] = {"", "/x", "x/", "a//b", "a b", "a.b", "a@b", "..", "sums"};
    const int64_t            many[] = {1, 1, 1, 1, 1};
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    kvq_partial_writer      *w = NULL;
    kvq_test_ok(kvq_partial_create(&ctx, file_path("a.kvqp"), false, FIELDS, N_FIELDS, NULL, 0, &w, &err), &err);
    kvq_test_ok(kvq_partial_put(w, "sums", KVQ_ARRAY_I64, 1, ONE, SUMS, &err), &err);
    for (size_t i = 0; i < sizeof BAD_NAMES / sizeof *BAD_NAMES; i++)
        ck_assert_int_ne(kvq_partial_put(w, BAD_NAMES[i], KVQ_ARRAY_I64, 1, ONE, SUMS, &err), KVQ_OK);
    kvq_test_failed(kvq_partial_put(w, "x", KVQ_ARRAY_U8, 5, many, BYTES, &err), KVQ_ERR_INTERNAL, &err,
                    "5 dimensions");
    kvq_test_failed(kvq_partial_put(w, "x", KVQ_ARRAY_U8, 0, many, BYTES, &err), KVQ_ERR_INTERNAL, &err,
                    "0 dimensions");
    kvq_partial_discard(&ctx, &w);
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

// HDF5 stores times of the second unless told not to, hence the wait.
START_TEST(equal_content_gives_equal_bytes) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_mapped_file files[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        char *path = file_path(i == 0 ? "first.kvqp" : "second.kvqp");
        kvq_test_ok(write_partial(&ctx, path, &err), &err);
        kvq_test_ok(kvq_map_file(path, &files[i], &err), &err);
        (void)sleep(i == 0 ? 1 : 0);
    }
    ck_assert_uint_eq(files[0].bytes, files[1].bytes);
    ck_assert_mem_eq(files[0].data, files[1].data, files[0].bytes);
    kvq_unmap_file(&files[0]);
    kvq_unmap_file(&files[1]);
}
END_TEST

// The seal covers every byte, so HDF5 never sees a damaged one: no leak has to be expected here.
START_TEST(damage_is_found_before_anything_is_parsed) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_partial    *p = NULL;
    kvq_mapped_file file = {0};
    char           *path = file_path("a.kvqp");
    kvq_test_ok(write_partial(&ctx, path, &err), &err);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    uint8_t *data = malloc(file.bytes);
    size_t   bytes = file.bytes;
    memcpy(data, file.data, bytes);
    kvq_unmap_file(&file);
    for (size_t at = 8; at < bytes; at += 37) {
        data[at] ^= (uint8_t)(1u << (at % 8));
        kvq_test_ok(kvq_write_file(&ctx, path, true, data, bytes, &err), &err);
        kvq_test_failed(kvq_partial_open(&ctx, path, &p, &err), KVQ_ERR_INTEGRITY, &err, "a.kvqp: its ");
        data[at] ^= (uint8_t)(1u << (at % 8));
    }
    for (size_t n = 0; n<bytes; n += n + 80> bytes ? 1 : 251) {
        kvq_test_ok(kvq_write_file(&ctx, path, true, data, n, &err), &err);
        ck_assert_int_ne(kvq_partial_open(&ctx, path, &p, &err), KVQ_OK);
    }
    ck_assert_ptr_null(p);
    kvq_test_ok(kvq_write_file(&ctx, path, true, data, bytes, &err), &err);
    kvq_test_ok(kvq_partial_open(&ctx, path, &p, &err), &err);
    kvq_partial_close(&ctx, &p);
    free(data);
}
END_TEST

START_TEST(a_capture_is_no_partial_result) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_partial        *p = NULL;
    kvq_capture_writer *w = NULL;
    kvq_capture_info    info = {.type = KVQ_ARRAY_F32};
    const float         x[2] = {1, 2};
    char               *path = file_path("a.kvqc.h5");
    info.model.n_layers = info.model.n_kv_heads = info.dataset.n_windows = info.dataset.seq_len = 1;
    info.model.head_dim = 2;
    kvq_capture_add_layer(&info, 0);
    kvq_test_ok(kvq_capture_create(&ctx, path, false, &info, NULL, &w, &err), &err);
    for (kvq_capture_part part = KVQ_CAPTURE_K; part <= KVQ_CAPTURE_V; part++)
        kvq_test_ok(kvq_capture_put(w, part, 0, 0, x, &err), &err);
    kvq_test_ok(kvq_capture_commit(&ctx, &w, 0, &err), &err);
    kvq_test_failed(kvq_partial_open(&ctx, path, &p, &err), KVQ_ERR_INTEGRITY, &err, "its last line is not");
    path = file_path("b.kvqp");
    kvq_test_ok(write_partial(&ctx, path, &err), &err);
    kvq_capture *c = NULL;
    kvq_test_failed(kvq_capture_open(&ctx, path, &c, &err), KVQ_ERR_INPUT, &err, "kvq_format is 'kvq.partial'");
    kvq_test_failed(kvq_partial_open(&ctx, file_path("none.kvqp"), &p, &err), KVQ_ERR_NOT_FOUND, &err, "none.kvqp");
}
END_TEST

START_TEST(a_full_disk_is_an_error_at_every_size) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_mapped_file file = {0};
    char           *path = file_path("full.kvqp");
    kvq_test_ok(write_partial(&ctx, path, &err), &err);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    size_t bytes = file.bytes;
    kvq_unmap_file(&file);
    ck_assert_int_eq(unlink(path), 0);
    for (size_t limit = 0; limit<bytes; limit += limit + 80> bytes ? 9 : 1 + bytes / 23) {
        kvq_test_limit_files(limit);
        kvq_status status = write_partial(&ctx, path, &err);
        kvq_test_limit_files(KVQ_TEST_NO_LIMIT);
        kvq_test_failed(status, KVQ_ERR_DISK, &err, "full.kvqp: ");
        ck_assert_int_eq(count_files(), 0);
    }
}
END_TEST

static kvq_status write_and_open(const kvq_context *ctx, const char *path, kvq_error *err) {
    kvq_partial *p = NULL;
    kvq_status   status = write_partial(ctx, path, err);
    if (status == KVQ_OK) status = kvq_partial_open(ctx, path, &p, err);
    kvq_partial_close(ctx, &p);
    return status;
}

START_TEST(every_allocation_may_fail) {
    limited_memory memory = {.inner = kvq_test_context()};
    kvq_context    ctx = limited_context(&memory);
    kvq_error      err = {0};
    char          *path = file_path("a.kvqp");
    kvq_status     status = KVQ_ERR_MEMORY;
    int64_t        n = 0;
    for (; status != KVQ_OK && n < 1000; n++) {
        memory.left = n;
        status = write_and_open(&ctx, path, &err);
        if (status != KVQ_OK) ck_assert_int_eq(status, KVQ_ERR_MEMORY);
        ck_assert_int_eq(memory.n_live, 0);
    }
    kvq_test_ok(status, &err);
    ck_assert_int_gt(n, 10);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(everything_comes_back),
    KVQ_CASE(what_is_asked_wrongly_is_refused),
    KVQ_CASE(what_is_put_wrongly_is_refused_and_leaves_nothing),
    KVQ_CASE(equal_content_gives_equal_bytes),
    KVQ_CASE(damage_is_found_before_anything_is_parsed),
    KVQ_CASE(a_capture_is_no_partial_result),
    KVQ_CASE(a_full_disk_is_an_error_at_every_size),
    KVQ_CASE(every_allocation_may_fail),
};
KVQ_TEST_MAIN("partial", CASES)
