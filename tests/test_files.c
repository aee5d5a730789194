// SPDX-License-Identifier: Apache-2.0
// Files that appear whole or not at all, mapped files, strict JSON.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json_read.h"
#include "kvq_io.h"
#include "kvq_test.h"

static const char *in_folder(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

static int entries_in_folder(void) {
    int  n = 0;
    DIR *directory = opendir(kvq_test_folder());
    ck_assert_ptr_nonnull(directory);
    while (readdir(directory) != NULL) n++;
    (void)closedir(directory);
    return n - 2; // . and ..
}

static void assert_content(const char *path, const char *text) {
    kvq_mapped_file file = {0};
    kvq_error       err = {0};
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    ck_assert_uint_eq(file.bytes, strlen(text));
    if (file.bytes > 0) ck_assert_mem_eq(file.data, text, file.bytes);
    kvq_unmap_file(&file);
}

START_TEST(a_file_is_not_replaced_without_force) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_output  output = {0};
    const char *path = in_folder("out");
    kvq_test_ok(kvq_write_file(&ctx, path, false, "one", 3, &err), &err);
    assert_content(path, "one");
    // known before the work that would be lost
    kvq_test_failed(kvq_output_begin(&ctx, path, false, &output, &err), KVQ_ERR_EXISTS, &err, path);
    kvq_test_failed(kvq_write_file(&ctx, path, false, "two", 3, &err), KVQ_ERR_EXISTS, &err, path);
    assert_content(path, "one");
    kvq_test_ok(kvq_write_file(&ctx, path, true, "two", 3, &err), &err);
    assert_content(path, "two");
    ck_assert_int_eq(entries_in_folder(), 1);
}
END_TEST

START_TEST(an_output_appears_at_commit_and_never_otherwise) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_output  output = {0};
    const char *path = in_folder("out");
    kvq_test_ok(kvq_output_begin(&ctx, path, false, &output, &err), &err);
    ck_assert_int_ne(access(path, F_OK), 0);
    ck_assert_int_eq(entries_in_folder(), 1); // the temporary file, in the same folder
    kvq_output_discard(&ctx, &output);
    kvq_output_discard(&ctx, &output);
    ck_assert_int_eq(entries_in_folder(), 0);
    kvq_test_ok(kvq_output_begin(&ctx, path, false, &output, &err), &err);
    kvq_test_ok(kvq_output_commit(&ctx, &output, &err), &err);
    kvq_output_discard(&ctx, &output);
    assert_content(path, "");
}
END_TEST

// Two writers of one name: the first to finish wins, the other is told and leaves nothing.
START_TEST(a_name_taken_meanwhile_is_not_overwritten) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_output  output = {0};
    const char *path = in_folder("out");
    kvq_test_ok(kvq_output_begin(&ctx, path, false, &output, &err), &err);
    kvq_test_ok(kvq_write_file(&ctx, path, false, "first", 5, &err), &err);
    kvq_test_failed(kvq_output_commit(&ctx, &output, &err), KVQ_ERR_EXISTS, &err, path);
    assert_content(path, "first");
    ck_assert_int_eq(entries_in_folder(), 1);
}
END_TEST

START_TEST(an_output_that_is_no_file_is_refused) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_test_failed(kvq_write_file(&ctx, "/dev/null", true, "x", 1, &err), KVQ_ERR_USAGE, &err, "device");
    kvq_test_failed(kvq_write_file(&ctx, kvq_test_folder(), true, "x", 1, &err), KVQ_ERR_USAGE, &err, "directory");
    kvq_test_failed(kvq_write_file(&ctx, "a/", true, "x", 1, &err), KVQ_ERR_USAGE, &err, "'a/'");
    kvq_test_failed(kvq_write_file(&ctx, in_folder("none/out"), false, "x", 1, &err), KVQ_ERR_DISK, &err, "none");
}
END_TEST

// A limit on file sizes stands in for a full disk; the signal that goes with it is what a real full disk does not send.
START_TEST(a_full_disk_leaves_nothing) {
    static char big[1 << 16];
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    const char *path = in_folder("out");
    kvq_test_limit_files(1000);
    kvq_status status = kvq_write_file(&ctx, path, false, big, sizeof big, &err);
    kvq_test_limit_files(KVQ_TEST_NO_LIMIT);
    kvq_test_failed(status, KVQ_ERR_DISK, &err, "byte 1000 of 65536");
    ck_assert_int_eq(entries_in_folder(), 0);
}
END_TEST

START_TEST(what_cannot_be_mapped_is_named) {
    kvq_error       err = {0};
    kvq_mapped_file file = {0};
    kvq_test_failed(kvq_map_file(in_folder("none"), &file, &err), KVQ_ERR_NOT_FOUND, &err, "none");
    kvq_test_failed(kvq_map_file(kvq_test_folder(), &file, &err), KVQ_ERR_INPUT, &err, "directory");
    kvq_test_failed(kvq_map_file("/dev/null", &file, &err), KVQ_ERR_INPUT, &err, "device");
    ck_assert_ptr_null(file.data);
    ck_assert_str_eq(kvq_file_name("a/b/c"), "c");
    ck_assert_str_eq(kvq_file_name("c"), "c");
}
END_TEST

// ---------------------------------------------------------------- JSON

START_TEST(json_errors_give_the_place) {
    static const struct {
        const char *text;
        size_t      n;
        const char *fragment;
    } cases[] = {
        {"{\"a\": 1,}", 9, "byte"}, {"{\"a\": 1", 7, "byte"},     {"", 0, "f.json"},
        {"{} x", 4, "byte 3"},      {"{\"a\":1\0}", 8, "byte 6"}, {"nul", 3, "byte"},
    };
    kvq_error err = {0};
    cJSON    *tree = NULL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvq_test_failed(json_parse(cases[i].text, cases[i].n, "f.json", &tree, &err), KVQ_ERR_INTEGRITY, &err,
                        cases[i].fragment);
        ck_assert_ptr_null(tree);
    }
}
END_TEST

// A text that ends inside an object is read up to its last byte and no further: it lies at the end of a heap block,
// where the address sanitizer would see one byte more.
START_TEST(json_reads_exactly_n_bytes) {
    static const char TEXT[] = "{\"1\":1,";
    kvq_error         err = {0};
    cJSON            *tree = NULL;
    char             *exact = malloc(sizeof TEXT - 1);
    memcpy(exact, TEXT, sizeof TEXT - 1);
    kvq_test_failed(json_parse(exact, sizeof TEXT - 1, "f", &tree, &err), KVQ_ERR_INTEGRITY, &err, "byte 7");
    free(exact);
}
END_TEST

START_TEST(json_fields_are_checked) {
    static const char TEXT[] =
        "{\"i\": 7, \"x\": 0.5, \"s\": \"t\", \"b\": true, \"n\": null, \"big\": 9007199254740994,"
        "\"inf\": 1e999, \"two\": 1, \"two\": 2}";
    kvq_error   err = {0};
    cJSON      *tree = NULL;
    int64_t     i = -5;
    double      x = -5;
    bool        b = false;
    const char *s = NULL;
    kvq_test_ok(json_parse(TEXT, sizeof TEXT - 1, "f", &tree, &err), &err);
    kvq_test_ok(json_get_int(tree, "i", "f", false, 0, 7, &i, &err), &err);
    kvq_test_ok(json_get_double(tree, "x", "f", false, &x, &err), &err);
    kvq_test_ok(json_get_bool(tree, "b", "f", false, &b, &err), &err);
    kvq_test_ok(json_get_string(tree, "s", "f", false, &s, &err), &err);
    ck_assert(i == 7 && x == 0.5 && b);
    ck_assert_str_eq(s, "t");
    kvq_test_ok(json_get_int(tree, "n", "f", true, 0, 9, &i, &err), &err); // null counts as missing
    kvq_test_ok(json_get_int(tree, "none", "f", true, 0, 9, &i, &err), &err);
    ck_assert(i == 7);
    kvq_test_failed(json_get_int(tree, "none", "f", false, 0, 9, &i, &err), KVQ_ERR_INPUT, &err, "'none' is missing");
    kvq_test_failed(json_get_int(tree, "i", "f", false, 0, 6, &i, &err), KVQ_ERR_INPUT, &err, "'i' is 7");
    kvq_test_failed(json_get_int(tree, "x", "f", false, 0, 6, &i, &err), KVQ_ERR_INPUT, &err, "0.5");
    kvq_test_failed(json_get_int(tree, "big", "f", false, 0, INT64_MAX, &i, &err), KVQ_ERR_INPUT, &err, "'big'");
    kvq_test_failed(json_get_int(tree, "s", "f", false, 0, 6, &i, &err), KVQ_ERR_INPUT, &err, "not an integer");
    kvq_test_failed(json_get_int(tree, "two", "f", false, 0, 6, &i, &err), KVQ_ERR_INPUT, &err, "twice");
    kvq_test_failed(json_get_double(tree, "inf", "f", false, &x, &err), KVQ_ERR_INPUT, &err, "finite");
    kvq_test_failed(json_get_bool(tree, "i", "f", false, &b, &err), KVQ_ERR_INPUT, &err, "'i'");
    kvq_test_failed(json_get_string(tree, "i", "f", false, &s, &err), KVQ_ERR_INPUT, &err, "string");
    ck_assert(i == 7 && x == 0.5);
    cJSON_Delete(tree);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(a_file_is_not_replaced_without_force),
    KVQ_CASE(an_output_appears_at_commit_and_never_otherwise),
    KVQ_CASE(a_name_taken_meanwhile_is_not_overwritten),
    KVQ_CASE(an_output_that_is_no_file_is_refused),
    KVQ_CASE(a_full_disk_leaves_nothing),
    KVQ_CASE(what_cannot_be_mapped_is_named),
    KVQ_CASE(json_errors_give_the_place),
    KVQ_CASE(json_reads_exactly_n_bytes),
    KVQ_CASE(json_fields_are_checked),
};
KVQ_TEST_MAIN("files", CASES)
