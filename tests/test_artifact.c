// SPDX-License-Identifier: Apache-2.0
//
// Artifact files: everything comes back, equal content gives equal bytes, and what could not be read is not written.
// With --write-sample FILE, --write-alloc FILE and --read FILE it serves check_artifact_hash.py. What must not be read:
// test_artifact_refused.c.
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "artifact_schema.h"
#include "kvq_test.h"
#include "limited_memory.h"
#include "sample_artifact.h"

static int count_files(void) {
    int  n = 0;
    DIR *folder = opendir(kvq_test_folder());
    ck_assert_ptr_nonnull(folder);
    for (const struct dirent *entry = readdir(folder); entry != NULL; entry = readdir(folder))
        n += entry->d_name[0] != '.' || strlen(entry->d_name) > 2;
    (void)closedir(folder);
    return n;
}
// ---------------------------------------------------------------- good files

// The sample of each scheme.
#define N_SCHEMES 2
static kvq_artifact *sample_of(const kvq_context *ctx, int scheme, int64_t n_layers) {
    return scheme == 0 ? sample_artifact(ctx, n_layers) : sample_alloc_artifact(ctx, n_layers);
}

START_TEST(every_field_comes_back) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          written[KVQ_SHA256_HEX], read[KVQ_SHA256_HEX], *path = sample_path("a.kvq.h5");
    kvq_artifact *a = sample_of(&ctx, _i, 3), *b = NULL;
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, false, written, &err), &err);
    ck_assert_int_eq(count_files(), 1);
    kvq_test_ok(kvq_artifact_read(&ctx, path, &b, read, &err), &err);
    ck_assert_str_eq(written, read);
    assert_equal(a, b);
    kvq_artifact_destroy(&ctx, &a);
    kvq_artifact_destroy(&ctx, &b);
}
END_TEST

// HDF5 stores times of the second unless told not to, hence the wait.
START_TEST(equal_artifacts_give_equal_bytes) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    char            hash[KVQ_SHA256_HEX], path[2][256];
    kvq_mapped_file files[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        kvq_artifact *a = sample_of(&ctx, _i, 11);
        (void)snprintf(path[i], sizeof path[i], "%s", sample_path(i == 0 ? "first.kvq.h5" : "second.kvq.h5"));
        kvq_test_ok(kvq_artifact_write(&ctx, a, path[i], false, hash, &err), &err);
        kvq_test_ok(kvq_map_file(path[i], &files[i], &err), &err);
        kvq_artifact_destroy(&ctx, &a);
        (void)sleep(i == 0 ? 1 : 0);
    }
    ck_assert_uint_eq(files[0].bytes, files[1].bytes);
    ck_assert(memcmp(files[0].data, files[1].data, files[0].bytes) == 0);
    kvq_unmap_file(&files[0]);
    kvq_unmap_file(&files[1]);
}
END_TEST

START_TEST(an_artifact_of_a_thousand_layers_comes_back) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = sample_path("long.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, ARTIFACT_MAX_LAYERS), *b = NULL;
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, false, hash, &err), &err);
    kvq_test_ok(kvq_artifact_read(&ctx, path, &b, hash, &err), &err);
    assert_equal(a, b);
    kvq_artifact_destroy(&ctx, &a);
    kvq_artifact_destroy(&ctx, &b);
    a = sample_artifact(&ctx, ARTIFACT_MAX_LAYERS + 1);
    kvq_test_failed(kvq_artifact_write(&ctx, a, path, true, hash, &err), KVQ_ERR_INPUT, &err,
                    "/model@n_layers is 1001");
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

static void hashes_of(const kvq_context *ctx, const kvq_artifact *a, char content[KVQ_SHA256_HEX],
                      char numeric[KVQ_SHA256_HEX]) {
    record_list list = {0};
    kvq_error   err = {0};
    kvq_test_ok(artifact_to_records(ctx, a, &list, &err), &err);
    kvq_test_ok(artifact_content_hash(&list, content, &err), &err);
    kvq_test_ok(artifact_numeric_hash(&list, numeric, &err), &err);
    record_list_free(ctx, &list);
}

START_TEST(content_hash_sees_everything_and_numeric_hash_only_numbers) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          content[4][KVQ_SHA256_HEX], numeric[4][KVQ_SHA256_HEX];
    kvq_artifact *a = sample_artifact(&ctx, 2);
    hashes_of(&ctx, a, content[0], numeric[0]);
    kvq_test_ok(kvq_artifact_set_text(&ctx, &a->provenance.cpu, "another processor", &err), &err);
    hashes_of(&ctx, a, content[1], numeric[1]);
    a->layers[1].v.codebook[3] = nextafterf(a->layers[1].v.codebook[3], 2);
    hashes_of(&ctx, a, content[2], numeric[2]);
    a->quantizer.sink_tokens++;
    hashes_of(&ctx, a, content[3], numeric[3]);
    for (int i = 1; i < 4; i++) ck_assert_str_ne(content[i], content[i - 1]);
    ck_assert_str_eq(numeric[1], numeric[0]);
    ck_assert_str_ne(numeric[2], numeric[1]);
    ck_assert_str_ne(numeric[3], numeric[2]);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// Each scheme says the version that brought it, so that older readers keep reading what they understand; a reader of
// 1.1 refuses the other by version.
START_TEST(a_file_says_the_version_of_its_scheme) {
    static const char *const VERSIONS[] = {"1.1", "1.2"}, *const CONVENTIONS[] = {"KVQ-1.1", "KVQ-1.2"};
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    int           minor = 0;
    kvq_artifact *a = sample_of(&ctx, _i, 2);
    record_list   list = {0};
    kvq_test_ok(artifact_to_records(&ctx, a, &list, &err), &err);
    ck_assert_str_eq(record_find(&list, "/@kvq_format_version")->data, VERSIONS[_i]);
    ck_assert_str_eq(record_find(&list, "/@kvq_min_reader")->data, VERSIONS[_i]);
    ck_assert_str_eq(record_find(&list, "/@Conventions")->data, CONVENTIONS[_i]);
    kvq_status status = container_check_version("artifact", record_find(&list, "/@kvq_format_version")->data,
                                                record_find(&list, "/@kvq_min_reader")->data, 1, 1, &minor, &err);
    if (_i == 0) kvq_test_ok(status, &err);
    if (_i == 1) kvq_test_failed(status, KVQ_ERR_VERSION, &err, "artifact format 1.2, which needs a reader of");
    record_list_free(&ctx, &list);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(numeric_hash_sees_what_a_decoder_of_tiles_computes_with) {
    kvq_context   ctx = kvq_test_context();
    char          content[KVQ_SHA256_HEX], before[KVQ_SHA256_HEX], numeric[KVQ_SHA256_HEX];
    kvq_artifact *a = sample_alloc_artifact(&ctx, 2);
    float        *numbers[] = {&a->quantizer.rotation[0], &a->layers[0].k.key_levels[2], &a->layers[1].k.offset[3],
                               &a->layers[1].k.scale[3], &a->layers[0].v.codebook[15]};
    for (int i = 0; i < 5; i++) {
        hashes_of(&ctx, a, content, before);
        *numbers[i] = i == 0 ? nextafterf(*numbers[i], 1) : 2 * *numbers[i];
        hashes_of(&ctx, a, content, numeric);
        ck_assert_str_ne(numeric, before);
    }
    a->layers[1].k.widths[15] = 0; // of affine tables, whose number of levels stays
    hashes_of(&ctx, a, content, before);
    ck_assert_str_ne(numeric, before);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// tests/data/format-1.0.kvq.h5 is what kvq 4a1477e wrote for the sample of three layers. Files of released versions
// stay readable, and what they do not say is zero.
START_TEST(a_file_of_format_1_0_is_read) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], again[KVQ_SHA256_HEX];
    kvq_artifact *a = sample_artifact_1_0(&ctx, 3), *b = NULL;
    kvq_test_ok(kvq_artifact_read(&ctx, KVQ_TEST_DATA "/format-1.0.kvq.h5", &b, hash, &err), &err);
    ck_assert_str_eq(hash, "64b94c3d5d04048dad81644a099e60802c1b1208cc5f9d1679ab5a069f39bfea");
    assert_equal(a, b);
    ck_assert(b->layers[0].k.datatype == KVQ_NUQ && b->layers[0].k.domain == KVQ_KEYS_PRE_ROPE);
    ck_assert(b->quantizer.recent_tokens == 0 && b->quantizer.threshold_scope == KVQ_SCOPE_CHANNEL);
    kvq_test_ok(kvq_artifact_hash(&ctx, b, again, &err), &err); // as 1.1, which says more
    ck_assert_str_ne(again, hash);
    kvq_artifact_destroy(&ctx, &a);
    kvq_artifact_destroy(&ctx, &b);
}
END_TEST

// ---------------------------------------------------------------- refusing to write

static void set_nan(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[1].k.lower[4] = NAN; }
static void set_unsorted(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[1].v.codebook[0] = 3; }
static void set_two_dimensions(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.dim = 2; }
static void set_three_groups(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.n_groups = 3; }
static void set_uneven(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].k.datatype = KVQ_INT; }
static void set_value_thresholds(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[0].v.axis = KVQ_AXIS_CHANNEL;
}
static void set_unsorted_group(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[2].v.codebook[7] = -1; }
static void set_infinite_level(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[2].v.decode_levels[6] = INFINITY;
}
static void set_no_datatype(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[0].v.datatype = KVQ_N_DATATYPES;
}
static void set_twelve_bits(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.bits = 12; }
static void set_wide(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->model.n_kv_heads = 65000; }
static void set_broken_name(const kvq_context *ctx, kvq_artifact *a) {
    (void)kvq_artifact_set_text(ctx, &a->model.name, "\xc3(", NULL);
}
static void set_infinite_range(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[0].k.lower[7] = -FLT_MAX, a->layers[0].k.upper[7] = FLT_MAX;
}

static void set_many_outliers(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->quantizer.n_side_v = KVQ_BLOCK_MAX_SIDE + 1;
}

static void drop_codebook(const kvq_context *ctx, kvq_artifact *a) {
    kvq_free(ctx, a->layers[0].v.codebook);
    a->layers[0].v.codebook = NULL;
}
static void set_long_text(const kvq_context *ctx, kvq_artifact *a) {
    static char text[RECORD_MAX_TEXT + 2];
    memset(text, 'x', sizeof text - 1);
    (void)kvq_artifact_set_text(ctx, &a->provenance.options_json, text, NULL);
}

static const struct spoiled {
    void (*spoil)(const kvq_context *ctx, kvq_artifact *a);
    kvq_status  status;
    const char *message;
} SPOILED[] = {
    {set_nan, KVQ_ERR_NUMERICAL, "/layers/001/k/threshold_lower: element 4 is"},
    {set_infinite_range, KVQ_ERR_INPUT, "/layers/000/k: the thresholds of channel 7"},
    {set_many_outliers, KVQ_ERR_INPUT, "/quantizer@n_side_v is 2048, outside of 0 .. 2047"},
    {set_unsorted, KVQ_ERR_INPUT, "/layers/001/v/codebook: level 1"},
    {set_two_dimensions, KVQ_ERR_UNSUPPORTED, "8 levels of 2 dimensions"},
    {set_three_groups, KVQ_ERR_UNSUPPORTED, "/layers/000/v/codebook: 3 groups"},
    {set_unsorted_group, KVQ_ERR_INPUT, "/layers/002/v/codebook: level 7"},
    {set_uneven, KVQ_ERR_INPUT, "/layers/000/k/codebook: element 0 is"},
    {set_infinite_level, KVQ_ERR_NUMERICAL, "/layers/002/v/decode_levels: element 6 is inf"},
    {set_value_thresholds, KVQ_ERR_UNSUPPORTED, "/layers/000/v@axis is 'channel'"},
    {set_no_datatype, KVQ_ERR_INPUT, "/layers/000/v@datatype is 4, outside of 0 .. 3"},
    {set_twelve_bits, KVQ_ERR_UNSUPPORTED, "8 levels of 1 dimensions"},
    {set_wide, KVQ_ERR_UNSUPPORTED, "65000 KV heads of 6 channels"},
    {set_broken_name, KVQ_ERR_INPUT, "/model@name: the text is not valid UTF-8"},
    {drop_codebook, KVQ_ERR_INPUT, "/layers/000/v: the codebook is missing"},
    {set_long_text, KVQ_ERR_UNSUPPORTED, "/provenance@options_json: a text of 60001 bytes"},
};
#define N_SPOILED ((int)(sizeof SPOILED / sizeof *SPOILED))

START_TEST(what_could_not_be_read_is_not_written) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX] = "untouched", *path = sample_path("spoiled.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 3);
    SPOILED[_i].spoil(&ctx, a);
    kvq_test_failed(kvq_artifact_write(&ctx, a, path, false, hash, &err), SPOILED[_i].status, &err,
                    SPOILED[_i].message);
    ck_assert_str_eq(hash, "untouched");
    ck_assert_int_eq(count_files(), 0);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

static void add_half_rotation(const kvq_context *ctx, kvq_artifact *a) {
    (void)kvq_artifact_set_text(ctx, &a->quantizer.scheme, "nuq", NULL);
}
static void add_scheme(const kvq_context *ctx, kvq_artifact *a) {
    (void)kvq_artifact_set_text(ctx, &a->quantizer.scheme, "xyz", NULL);
}
static void set_key_bits(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].k.bits = 3; }
static void set_value_bits(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.bits = -1; }
static void set_value_groups(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.n_groups = 2; }
static void set_three_dimensions(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.dim = 3; }
static void set_few_levels(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[1].k.n_key_levels = 62; }
static void set_fitted_elsewhere(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[0].v.datatype = KVQ_NF;
}
static void set_table_kind(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[0].k.table_kind = KVQ_TABLE_AFFINE;
}
static void set_no_table_kind(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[0].k.table_kind = KVQ_N_TABLE_KINDS;
}
static void set_no_scale_format(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->layers[1].v.scale_format = KVQ_N_SCALE_FORMATS;
}
static void set_long_heads(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->model.head_dim = 513; }
static void set_short_heads(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, a->model.head_dim = 1, a->quantizer.n_side_k = 0;
}
static void set_value_outliers(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->quantizer.n_side_v = 1; }
static void set_recent(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->quantizer.recent_tokens = 64; }
static void drop_rotation(const kvq_context *ctx, kvq_artifact *a) {
    kvq_free(ctx, a->quantizer.rotation);
    a->quantizer.rotation = NULL;
}
static void move_to(float **to, float **from) {
    *to = *from;
    *from = NULL;
}
static void drop_widths(const kvq_context *ctx, kvq_artifact *a) {
    kvq_free(ctx, a->layers[1].k.widths);
    a->layers[1].k.widths = NULL;
}
static void drop_lower(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, move_to(&a->layers[0].k.offset, &a->layers[0].k.lower);
}
static void add_offset(const kvq_context *ctx, kvq_artifact *a) {
    (void)ctx, move_to(&a->layers[0].k.offset, &a->layers[1].k.offset);
}
static void add_decode_levels(const kvq_context *ctx, kvq_artifact *a) {
    a->layers[0].v.decode_levels = sample_floats(ctx, 8, 1, 0, 1);
}
static void add_key_codebook(const kvq_context *ctx, kvq_artifact *a) {
    a->layers[0].k.codebook = sample_floats(ctx, 8, 1, 0, 1);
}
static void add_value_thresholds(const kvq_context *ctx, kvq_artifact *a) {
    a->layers[0].v.upper = sample_floats(ctx, SAMPLE_ALLOC_D, 1, 0, 1);
}

static const struct spoiled SPOILED_ALLOC[] = {
    {add_half_rotation, KVQ_ERR_INPUT, "/quantizer@scheme is 'nuq', but there is a rotation"},
    {add_scheme, KVQ_ERR_UNSUPPORTED, "/quantizer@scheme is 'xyz'; format 1.2 knows 'nuq', 'alloc'"},
    {set_key_bits, KVQ_ERR_INPUT, "/layers/000/k: 3 bits and 0 levels"},
    {set_value_bits, KVQ_ERR_INPUT, "/layers/000/v@bits is -1, outside of 1 .. 8"},
    {set_value_groups, KVQ_ERR_UNSUPPORTED, "/layers/000/v/codebook: 2 groups of 8 levels of 2 dimensions"},
    {set_three_dimensions, KVQ_ERR_UNSUPPORTED, "/layers/000/v/codebook: 1 groups of 8 levels of 3 dimensions"},
    {set_few_levels, KVQ_ERR_INPUT, "/layers/001/k/key_levels: 62 levels; the tables of every width have 63"},
    {set_fitted_elsewhere, KVQ_ERR_UNSUPPORTED, "/layers/000/v@datatype: scheme 'alloc' knows 'nuq' only"},
    {set_table_kind, KVQ_ERR_INPUT, "/layers/000/k/offset is missing"},
    {set_no_table_kind, KVQ_ERR_INPUT, "/layers/000/k@table_kind is 2, outside of 0 .. 1"},
    {set_no_scale_format, KVQ_ERR_INPUT, "/layers/001/v@scale_format is 2, outside of 0 .. 1"},
    {set_long_heads, KVQ_ERR_UNSUPPORTED, "/model@head_dim is 513, outside of 2 .. 512"},
    {set_short_heads, KVQ_ERR_UNSUPPORTED, "/model@head_dim is 1, outside of 2 .. 512"},
    {set_value_outliers, KVQ_ERR_INPUT, "/quantizer: n_side_v is 1"},
    {set_recent, KVQ_ERR_INPUT, "recent_tokens is 64; scheme 'alloc' has neither"},
    {drop_rotation, KVQ_ERR_INPUT, "/quantizer/rotation is missing"},
    {drop_widths, KVQ_ERR_INPUT, "/layers/001/k/widths is missing"},
    {drop_lower, KVQ_ERR_INPUT, "/layers/000/k/threshold_lower is missing"},
    {add_offset, KVQ_ERR_INPUT, "/layers/000/k/offset is there, which"},
    {add_decode_levels, KVQ_ERR_INPUT, "/layers/000/v/decode_levels is there, which"},
    {add_key_codebook, KVQ_ERR_INPUT, "/layers/000/k/codebook is there, which"},
    {add_value_thresholds, KVQ_ERR_INPUT, "/layers/000/v/threshold_upper is there, which"},
};

START_TEST(what_could_not_be_read_of_alloc_is_not_written) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX] = "untouched", *path = sample_path("spoiled.kvq.h5");
    kvq_artifact *a = sample_alloc_artifact(&ctx, 2);
    SPOILED_ALLOC[_i].spoil(&ctx, a);
    kvq_test_failed(kvq_artifact_write(&ctx, a, path, false, hash, &err), SPOILED_ALLOC[_i].status, &err,
                    SPOILED_ALLOC[_i].message);
    ck_assert_int_eq(count_files(), 0);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(the_longest_text_fits) {
    static char   text[RECORD_MAX_TEXT + 1];
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = sample_path("text.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 1), *b = NULL;
    memset(text, 'x', RECORD_MAX_TEXT);
    kvq_test_ok(kvq_artifact_set_text(&ctx, &a->provenance.options_json, text, &err), &err);
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, false, hash, &err), &err);
    kvq_test_ok(kvq_artifact_read(&ctx, path, &b, hash, &err), &err);
    assert_equal(a, b);
    kvq_artifact_destroy(&ctx, &a);
    kvq_artifact_destroy(&ctx, &b);
}
END_TEST

START_TEST(an_existing_file_needs_force) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = sample_path("a.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 1);
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, false, hash, &err), &err);
    kvq_test_failed(kvq_artifact_write(&ctx, a, path, false, hash, &err), KVQ_ERR_EXISTS, &err, "a.kvq.h5");
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, true, hash, &err), &err);
    ck_assert_int_eq(count_files(), 1);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// A limit on the size of files is a full disk that needs no disk.
START_TEST(a_full_disk_leaves_nothing) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = sample_path("a.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 4);
    kvq_test_limit_files(8192);
    kvq_status status = kvq_artifact_write(&ctx, a, path, false, hash, &err);
    kvq_test_limit_files(KVQ_TEST_NO_LIMIT);
    kvq_test_failed(status, KVQ_ERR_DISK, &err, "failed");
    ck_assert_int_eq(count_files(), 0);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// ---------------------------------------------------------------- failing allocations

START_TEST(a_failing_allocation_leaves_nothing) {
    limited_memory limit = {.inner = kvq_test_context()};
    kvq_context    good = limit.inner, bad = limited_context(&limit);
    kvq_error      err = {0};
    char           hash[KVQ_SHA256_HEX], *path = sample_path("a.kvq.h5");
    kvq_artifact  *a = sample_of(&good, _i, 2), *b = NULL;
    kvq_status     status = KVQ_ERR_MEMORY;
    int64_t        n = 0;
    for (; status != KVQ_OK; n++) {
        limit.left = n;
        status = kvq_artifact_write(&bad, a, path, false, hash, &err);
        ck_assert_int_eq(limit.n_live, 0);
        ck_assert_int_eq(count_files(), status == KVQ_OK ? 1 : 0);
        if (status != KVQ_OK) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
    }
    ck_assert_int_gt(n, 100);
    status = KVQ_ERR_MEMORY;
    for (n = 0; status != KVQ_OK; n++) {
        limit.left = n;
        status = kvq_artifact_read(&bad, path, &b, hash, &err);
        if (status != KVQ_OK) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
        ck_assert((status == KVQ_OK) == (limit.n_live > 0) && (status == KVQ_OK) == (b != NULL));
    }
    assert_equal(a, b);
    kvq_artifact_destroy(&bad, &b);
    ck_assert_int_eq(limit.n_live, 0);
    kvq_artifact_destroy(&good, &a);
}
END_TEST

// ---------------------------------------------------------------- main
static const kvq_test_case CASES[] = {
    KVQ_LOOP(every_field_comes_back, N_SCHEMES),
    KVQ_LOOP(equal_artifacts_give_equal_bytes, N_SCHEMES),
    KVQ_CASE(an_artifact_of_a_thousand_layers_comes_back),
    KVQ_CASE(content_hash_sees_everything_and_numeric_hash_only_numbers),
    KVQ_CASE(numeric_hash_sees_what_a_decoder_of_tiles_computes_with),
    KVQ_LOOP(a_file_says_the_version_of_its_scheme, N_SCHEMES),
    KVQ_CASE(a_file_of_format_1_0_is_read),
    KVQ_LOOP(what_could_not_be_read_is_not_written, N_SPOILED),
    KVQ_LOOP(what_could_not_be_read_of_alloc_is_not_written, (int)(sizeof SPOILED_ALLOC / sizeof *SPOILED_ALLOC)),
    KVQ_CASE(the_longest_text_fits),
    KVQ_CASE(an_existing_file_needs_force),
    KVQ_CASE(a_full_disk_leaves_nothing),
    KVQ_LOOP(a_failing_allocation_leaves_nothing, N_SCHEMES),
};
// The two services for check_artifact_hash.py; both print the content hash.
static int serve(const char *service, const char *path) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *a = NULL;
    char          hash[KVQ_SHA256_HEX] = "";
    kvq_status    status = KVQ_OK;
    if (strncmp(service, "--write-", 8) == 0) { // sample or alloc
        a = sample_of(&ctx, strcmp(service, "--write-alloc") == 0, 3);
        status = kvq_artifact_write(&ctx, a, path, true, hash, &err);
    } else {
        status = kvq_artifact_read(&ctx, path, &a, hash, &err);
    }
    kvq_artifact_destroy(&ctx, &a);
    printf("%s\n", status == KVQ_OK ? hash : err.message);
    return status == KVQ_OK ? EXIT_SUCCESS : EXIT_FAILURE;
}

int main(int argc, char **argv) {
    if (argc == 3) return serve(argv[1], argv[2]);
    return kvq_test_run("artifact", CASES, (int)(sizeof CASES / sizeof *CASES));
}
