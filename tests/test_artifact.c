// SPDX-License-Identifier: Apache-2.0
//
// Artifact files: everything comes back, equal content gives equal bytes, and no damage, no wrong version and no wrong
// value gets through. With --write-sample FILE and --read FILE it serves check_artifact_hash.py.
#include <dirent.h>
#include <hdf5.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "artifact_schema.h"
#include "kvq_test.h"
#include "limited_memory.h"
#include "sample_artifact.h"

static char *in_folder(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

// HDF5 1.10.8 loses memory when it meets damage. It says so at exit unless its printing is off by then, and a leak
// checker would say so too, but asks the second function before.
static bool expect_leaks;

__attribute__((visibility("default"))) int __lsan_is_turned_off(void);

int __lsan_is_turned_off(void) { return expect_leaks; }

static void expect_hdf5_leaks(void) {
    (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    expect_leaks = true; // in this test's process
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

// ---------------------------------------------------------------- equality, without the schema

static void assert_equal_floats(const float *a, const float *b, int64_t n) {
    ck_assert_int_eq(a != NULL, b != NULL);
    if (a != NULL) ck_assert(memcmp(a, b, (size_t)n * sizeof *a) == 0); // bits, so that -0 counts
}

static void assert_equal_tensors(const kvq_tensor_quant *a, const kvq_tensor_quant *b) {
    ck_assert_int_eq(a->bits, b->bits);
    ck_assert_int_eq(a->axis, b->axis);
    ck_assert_int_eq(a->n_groups, b->n_groups);
    ck_assert_int_eq(a->n_levels, b->n_levels);
    ck_assert_int_eq(a->dim, b->dim);
    assert_equal_floats(a->codebook, b->codebook, a->n_levels);
    assert_equal_floats(a->lower, b->lower, SAMPLE_D);
    assert_equal_floats(a->upper, b->upper, SAMPLE_D);
    ck_assert(memcmp(&a->fit, &b->fit, sizeof a->fit) == 0); // seven fields of eight bytes, no padding
}

#define ASSERT_SAME_TEXT(member)   ck_assert_str_eq(a->member, b->member)
#define ASSERT_SAME_INT(member)    ck_assert_int_eq(a->member, b->member)
#define ASSERT_SAME_DOUBLE(member) ck_assert(a->member == b->member)

static void assert_equal(const kvq_artifact *a, const kvq_artifact *b) {
    ASSERT_SAME_TEXT(model.architecture);
    ASSERT_SAME_TEXT(model.name);
    ASSERT_SAME_TEXT(model.config_sha256);
    ASSERT_SAME_TEXT(model.weights_sha256);
    ASSERT_SAME_INT(model.n_layers);
    ASSERT_SAME_INT(model.hidden_size);
    ASSERT_SAME_INT(model.n_heads);
    ASSERT_SAME_INT(model.n_kv_heads);
    ASSERT_SAME_INT(model.head_dim);
    ASSERT_SAME_INT(model.vocab_size);
    ASSERT_SAME_DOUBLE(model.rope_theta);
    ASSERT_SAME_TEXT(model.rope_type);
    ASSERT_SAME_TEXT(model.dtype);
    ASSERT_SAME_INT(model.n_tensors);
    ASSERT_SAME_TEXT(tokenizer.kind);
    ASSERT_SAME_TEXT(tokenizer.sha256);
    ASSERT_SAME_INT(tokenizer.bos_added);
    ASSERT_SAME_TEXT(dataset.source);
    ASSERT_SAME_TEXT(dataset.source_sha256);
    ASSERT_SAME_TEXT(dataset.token_ids_sha256);
    ASSERT_SAME_INT(dataset.n_available_tokens);
    ASSERT_SAME_INT(dataset.n_samples);
    ASSERT_SAME_INT(dataset.seq_len);
    ck_assert_uint_eq(a->dataset.seed, b->dataset.seed);
    ASSERT_SAME_DOUBLE(quantizer.outlier_fraction);
    ASSERT_SAME_INT(quantizer.n_side_k);
    ASSERT_SAME_INT(quantizer.n_side_v);
    ASSERT_SAME_INT(quantizer.sink_tokens);
    ASSERT_SAME_INT(quantizer.weighting);
    ASSERT_SAME_TEXT(quantizer.scheme);
    ASSERT_SAME_TEXT(provenance.producer_version);
    ASSERT_SAME_TEXT(provenance.matmul);
    ASSERT_SAME_TEXT(provenance.cpu);
    ASSERT_SAME_TEXT(provenance.options_json);
    ASSERT_SAME_DOUBLE(baseline_nll);
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        assert_equal_tensors(&a->layers[layer].k, &b->layers[layer].k);
        assert_equal_tensors(&a->layers[layer].v, &b->layers[layer].v);
    }
}

// ---------------------------------------------------------------- good files

START_TEST(every_field_comes_back) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          written[KVQ_SHA256_HEX], read[KVQ_SHA256_HEX], *path = in_folder("a.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 3), *b = NULL;
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
        kvq_artifact *a = sample_artifact(&ctx, 11);
        (void)snprintf(path[i], sizeof path[i], "%s", in_folder(i == 0 ? "first.kvq.h5" : "second.kvq.h5"));
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
    char          hash[KVQ_SHA256_HEX], *path = in_folder("long.kvq.h5");
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

typedef struct image {
    uint8_t *data;
    size_t   bytes;
} image;

static image sample_image(const kvq_context *ctx, kvq_artifact **a) {
    char      hash[KVQ_SHA256_HEX];
    image     i = {0};
    kvq_error err = {0};
    *a = sample_artifact(ctx, 2);
    kvq_test_ok(artifact_to_image(ctx, *a, &i.data, &i.bytes, hash, &err), &err);
    return i;
}

// Puts the right seal into the last bytes, as somebody would who changes a file on purpose.
static void add_seal(uint8_t *data, size_t bytes) {
    char      hex[KVQ_SHA256_HEX], line[ARTIFACT_SEAL_BYTES + 1];
    kvq_error err = {0};
    kvq_test_ok(kvq_sha256_of(data, bytes - ARTIFACT_SEAL_BYTES, hex, &err), &err);
    (void)snprintf(line, sizeof line, ARTIFACT_SEAL "%s\n", hex);
    memcpy(data + bytes - ARTIFACT_SEAL_BYTES, line, ARTIFACT_SEAL_BYTES);
}

// The application's own setting for HDF5's error messages survives a write and a failing read, and nothing stays open.
START_TEST(hdf5_printing_is_left_as_it_was) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX];
    uint8_t       bytes[600] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n', 2, 8, 8};
    kvq_artifact *a = NULL;
    H5E_auto2_t   before, after;
    void         *data;
    ck_assert_int_ge(H5Eget_auto2(H5E_DEFAULT, &before, &data), 0);
    image i = sample_image(&ctx, &a);
    ck_assert_int_ge(H5Eget_auto2(H5E_DEFAULT, &after, &data), 0);
    ck_assert(before != NULL && after == before);
    kvq_free(&ctx, i.data);
    kvq_artifact_destroy(&ctx, &a);
    add_seal(bytes, sizeof bytes);
    kvq_test_failed(artifact_from_image(&ctx, bytes, sizeof bytes, &a, hash, &err), KVQ_ERR_INTEGRITY, &err, "HDF5: ");
    ck_assert_int_ge(H5Eget_auto2(H5E_DEFAULT, &after, &data), 0);
    ck_assert(after == before);
    ck_assert_int_eq(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
    expect_hdf5_leaks();
}
END_TEST

// ---------------------------------------------------------------- damage

// Reads what may be damaged: any error will do, but a success must be the original.
static bool read_survives(const kvq_context *ctx, const uint8_t *data, size_t bytes, const kvq_artifact *original) {
    kvq_artifact *b = NULL;
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX];
    kvq_status    status = artifact_from_image(ctx, data, bytes, &b, hash, &err);
    if (status == KVQ_OK) assert_equal(original, b);
    if (status != KVQ_OK) ck_assert(b == NULL && err.message[0] != 0);
    kvq_artifact_destroy(ctx, &b);
    return status == KVQ_OK;
}

// One bit of a byte at a time: all of the first and last KiB, every seventh byte between. Once as damage happens, and
// once with a right seal, so that HDF5's checksums and the content hash have to find it; what they miss lies between
// objects and means nothing.
START_TEST(a_flipped_bit_is_never_believed) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a;
    image         i = sample_image(&ctx, &a);
    int           n_believed = 0, n_tried = 0;
    if (_i == 1) expect_hdf5_leaks();
    for (size_t at = 0; at < i.bytes; at += at < 1024 || at + 1024 >= i.bytes ? 1 : 7) {
        uint8_t bit = (uint8_t)(1u << (at % 8));
        i.data[at] ^= bit;
        if (_i == 1 && at < i.bytes - ARTIFACT_SEAL_BYTES) add_seal(i.data, i.bytes);
        n_believed += read_survives(&ctx, i.data, i.bytes, a);
        n_tried++;
        i.data[at] ^= bit;
    }
    add_seal(i.data, i.bytes);
    ck_assert(read_survives(&ctx, i.data, i.bytes, a));
    ck_assert_int_gt(n_tried, 2000);
    ck_assert_int_le(n_believed, _i == 0 ? 0 : n_tried / 4);
    kvq_free(&ctx, i.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(random_damage_is_never_believed) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a;
    image         i = sample_image(&ctx, &a);
    uint8_t      *damaged = malloc(i.bytes);
    if (_i == 1) expect_hdf5_leaks();
    for (uint64_t round = 0; round < 1000; round++) {
        memcpy(damaged, i.data, i.bytes);
        uint64_t n = 1 + kvq_rng_below(1, KVQ_RNG_TEST, 1, round, 64);
        uint64_t from = kvq_rng_below(1, KVQ_RNG_TEST, 2, round, i.bytes - n);
        for (uint64_t k = 0; k < n; k++) {
            damaged[from + k] = (uint8_t)kvq_rng_below(1, KVQ_RNG_TEST, 3, 64 * round + k, 256);
        }
        if (_i == 1) add_seal(damaged, i.bytes);
        (void)read_survives(&ctx, damaged, i.bytes, a);
    }
    free(damaged);
    kvq_free(&ctx, i.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// Copies to blocks of the exact size, so that a sanitizer sees a read beyond the end.
START_TEST(a_truncated_file_is_refused) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a;
    image         i = sample_image(&ctx, &a);
    for (size_t bytes = 0; bytes < i.bytes; bytes += bytes < 600 || bytes + 200 >= i.bytes ? 1 : 97) {
        uint8_t *part = malloc(bytes + 1);
        memcpy(part, i.data, bytes);
        ck_assert(!read_survives(&ctx, part, bytes, a));
        free(part);
    }
    kvq_free(&ctx, i.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// Each of the two hashes finds a changed threshold, the seal first.
START_TEST(a_changed_number_is_reported_as_damage) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = in_folder("changed.kvq.h5");
    kvq_artifact *a, *b = NULL;
    image         i = sample_image(&ctx, &a);
    for (size_t at = 0; at + 4 <= i.bytes; at++) {
        if (memcmp(i.data + at, &a->layers[1].k.upper[5], 4) == 0) i.data[at] ^= 1;
    }
    kvq_test_ok(kvq_write_file(&ctx, path, false, i.data, i.bytes, &err), &err);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &b, hash, &err), KVQ_ERR_INTEGRITY, &err,
                    "changed.kvq.h5: its bytes do not have the SHA-256");
    add_seal(i.data, i.bytes);
    kvq_test_ok(kvq_write_file(&ctx, path, true, i.data, i.bytes, &err), &err);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &b, hash, &err), KVQ_ERR_INTEGRITY, &err,
                    "changed.kvq.h5: the content has the SHA-256");
    ck_assert_ptr_null(b);
    kvq_free(&ctx, i.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(what_is_no_artifact_is_refused) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = in_folder("text.kvq.h5");
    kvq_artifact *a = NULL;
    kvq_test_failed(kvq_artifact_read(&ctx, path, &a, hash, &err), KVQ_ERR_NOT_FOUND, &err, "text.kvq.h5");
    kvq_test_ok(kvq_write_file(&ctx, path, false, "", 0, &err), &err);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &a, hash, &err), KVQ_ERR_INPUT, &err, "not an HDF5 file");
    kvq_test_ok(kvq_write_file(&ctx, path, true, "just text", 9, &err), &err);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &a, hash, &err), KVQ_ERR_INPUT, &err, "not an HDF5 file");
    ck_assert_ptr_null(a);
}
END_TEST

// ---------------------------------------------------------------- consistent files with wrong content

// A change of one record, after which the hashes are made right again: what a faulty producer would write.
typedef struct forgery {
    const char *path;
    const void *data;  // replaces the content from its beginning; NULL removes the record
    size_t      bytes; // 0 = text
    kvq_status  status;
    const char *message;
} forgery;

static const float   NOT_A_NUMBER[] = {NAN}, DESCENDING[] = {9}, TOO_HIGH[] = {1e30f};
static const int64_t ZERO[] = {0}, NINE[] = {9}, TWO[] = {2}, MANY[] = {1000}, NEGATIVE[] = {-1},
                     HUGE_COUNT[] = {INT64_MAX};
static const double INFINITE[] = {HUGE_VAL}, MINUS_ONE[] = {-1};

#define FORGED_NUMBER(path, value, status, message)                                                                    \
    { path, value, sizeof(value), status, message }
#define FORGED_TEXT(path, text, status, message)                                                                       \
    { path, text, 0, status, message }
#define REMOVED(path)                                                                                                  \
    { path, NULL, 0, KVQ_ERR_INPUT, path " is missing" }

static const forgery FORGERIES[] = {
    FORGED_NUMBER("/layers/000/k/codebook", NOT_A_NUMBER, KVQ_ERR_NUMERICAL, "/layers/000/k/codebook: element 0 is"),
    FORGED_NUMBER("/layers/001/v/codebook", DESCENDING, KVQ_ERR_INPUT, "/layers/001/v/codebook: level 1"),
    FORGED_NUMBER("/layers/001/k/threshold_upper", NOT_A_NUMBER, KVQ_ERR_NUMERICAL, "threshold_upper: element 0"),
    FORGED_NUMBER("/layers/001/k/threshold_lower", TOO_HIGH, KVQ_ERR_INPUT,
                  "/layers/001/k: the thresholds of channel 0, 1.00000002e+30"),
    FORGED_NUMBER("/layers/000/k@bits", ZERO, KVQ_ERR_INPUT, "/layers/000/k@bits is 0, outside of 1 .. 8"),
    FORGED_NUMBER("/layers/000/k@bits", NINE, KVQ_ERR_INPUT, "/layers/000/k@bits is 9"),
    FORGED_NUMBER("/layers/000/k@bits", TWO, KVQ_ERR_INPUT,
                  "/layers/000/k/codebook has the shape [1, 16] instead of [1, 4]"),
    FORGED_NUMBER("/layers/000/k/fit@n_points", NEGATIVE, KVQ_ERR_INPUT, "/layers/000/k/fit@n_points is -1"),
    FORGED_NUMBER("/layers/000/k/fit@weight_sum", INFINITE, KVQ_ERR_NUMERICAL, "/layers/000/k/fit@weight_sum is inf"),
    FORGED_NUMBER("/model@n_layers", ZERO, KVQ_ERR_INPUT, "/model@n_layers is 0"),
    FORGED_NUMBER("/model@n_layers", NINE, KVQ_ERR_INPUT, "/model@n_layers is 9"),
    FORGED_NUMBER("/model@n_layers", HUGE_COUNT, KVQ_ERR_INPUT, "/model@n_layers is 9223372036854775807"),
    FORGED_NUMBER("/model@head_dim", NINE, KVQ_ERR_INPUT, "threshold_lower has the shape [2, 6] instead of [2, 9]"),
    FORGED_NUMBER("/model@vocab_size", HUGE_COUNT, KVQ_ERR_INPUT, "/model@vocab_size"),
    FORGED_NUMBER("/model@rope_theta", MINUS_ONE, KVQ_ERR_INPUT, "/model@rope_theta is -1"),
    FORGED_NUMBER("/quantizer@n_side_v", NINE, KVQ_ERR_INPUT, "9 outliers per side leave nothing of 12 channels"),
    FORGED_NUMBER("/quantizer@n_side_k", MANY, KVQ_ERR_INPUT, "1000 outliers per side"),
    FORGED_NUMBER("/tokenizer@bos_added", TWO, KVQ_ERR_INPUT, "/tokenizer@bos_added is 2"),
    FORGED_TEXT("/quantizer@scheme", "nf4", KVQ_ERR_UNSUPPORTED, "/quantizer@scheme is 'nf4'"),
    FORGED_TEXT("/quantizer@weighting", "magic", KVQ_ERR_UNSUPPORTED, "/quantizer@weighting is 'magic'"),
    FORGED_TEXT("/layers/000/k@axis", "head", KVQ_ERR_UNSUPPORTED, "/layers/000/k@axis is 'head'"),
    FORGED_TEXT("/layers/001/v@axis", "channel", KVQ_ERR_INPUT, "/layers/001/v/threshold_lower is missing"),
    FORGED_TEXT("/layers/001/k@axis", "token", KVQ_ERR_UNSUPPORTED, "/layers/001/k@axis is 'token'"),
    FORGED_TEXT("/layers/000/k@domain", "post_rope", KVQ_ERR_INPUT, "/layers/000/k@domain is 'post_rope'"),
    FORGED_TEXT("/layers/001/k@hf_name", "model.layers.0.self_attn.k_proj", KVQ_ERR_INPUT, "/layers/001/k@hf_name"),
    FORGED_TEXT("/model@config_sha256", "0123", KVQ_ERR_INPUT, "'0123' is not a SHA-256"),
    FORGED_TEXT("/model@name", "\xff\xfe", KVQ_ERR_INPUT, "/model@name: the text is not valid UTF-8"),
    FORGED_TEXT("/@kvq_format", "kvq.capture", KVQ_ERR_INPUT, "kvq_format is 'kvq.capture'"),
    FORGED_TEXT("/@kvq_format_version", "2.0", KVQ_ERR_VERSION, "artifact format 2.0"),
    FORGED_TEXT("/@kvq_format_version", "1.0x", KVQ_ERR_INPUT, "'1.0x'"),
    FORGED_TEXT("/@kvq_min_reader", "1.1", KVQ_ERR_VERSION, "needs a reader of format 1.1"),
    REMOVED("/layers/001/k/threshold_upper"),
    REMOVED("/layers/000/v/fit@objective"),
    REMOVED("/dataset@seed"),
    {"/@kvq_format", NULL, 0, KVQ_ERR_INPUT, "kvq_format is ''"},
    {"/layers/001/v/codebook", NULL, 0, KVQ_ERR_INPUT, "there is no /layers/001/v/codebook"},
};

// A list like `from` with one record replaced, removed or added.
static record_list forge(const kvq_context *ctx, const record_list *from, const forgery *f) {
    record_list list = {0};
    kvq_error   err = {0};
    bool        found = false;
    for (int64_t i = 0; i < from->count; i++) {
        const record *r = &from->items[i];
        bool          hit = strcmp(r->path, f->path) == 0;
        found |= hit;
        if (hit && f->data == NULL) continue;
        kvq_test_ok(
            record_add(ctx, &list, r->path, r->type, r->rank, r->shape, hit && f->bytes == 0 ? f->data : r->data, &err),
            &err);
        if (hit && f->bytes > 0) memcpy(list.items[list.count - 1].data, f->data, f->bytes);
    }
    if (!found) kvq_test_ok(record_add(ctx, &list, f->path, RECORD_TEXT, 0, NULL, f->data, &err), &err);
    return list;
}

static kvq_status read_list(const kvq_context *ctx, record_list *list, kvq_error *err) {
    char          hash[KVQ_SHA256_HEX], numeric[KVQ_SHA256_HEX];
    image         i = {0};
    kvq_artifact *a = NULL;
    record_sort(list);
    kvq_test_ok(artifact_content_hash(list, hash, err), err);
    kvq_test_ok(artifact_numeric_hash(list, numeric, err), err);
    kvq_test_ok(record_add(ctx, list, ARTIFACT_CONTENT_HASH, RECORD_TEXT, 0, NULL, hash, err), err);
    kvq_test_ok(record_add(ctx, list, ARTIFACT_NUMERIC_HASH, RECORD_TEXT, 0, NULL, numeric, err), err);
    record_sort(list);
    kvq_test_ok(records_to_hdf5(ctx, list, ARTIFACT_SEAL_BYTES, &i.data, &i.bytes, err), err);
    i.bytes += ARTIFACT_SEAL_BYTES;
    add_seal(i.data, i.bytes);
    kvq_status status = artifact_from_image(ctx, i.data, i.bytes, &a, hash, err);
    kvq_artifact_destroy(ctx, &a);
    kvq_free(ctx, i.data);
    return status;
}

static kvq_status read_forged(const kvq_context *ctx, const forgery *forgeries, int n, kvq_error *err) {
    record_list   list = {0};
    kvq_artifact *a = sample_artifact(ctx, 2);
    kvq_test_ok(artifact_to_records(ctx, a, &list, err), err);
    for (int i = 0; i < n; i++) {
        record_list forged = forge(ctx, &list, &forgeries[i]);
        record_list_free(ctx, &list);
        list = forged;
    }
    kvq_status status = read_list(ctx, &list, err);
    record_list_free(ctx, &list);
    kvq_artifact_destroy(ctx, &a);
    return status;
}

START_TEST(wrong_content_is_refused_by_name) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_test_failed(read_forged(&ctx, &FORGERIES[_i], 1, &err), FORGERIES[_i].status, &err, FORGERIES[_i].message);
}
END_TEST

// An additive version may hold what this reader does not know, the same version may not.
START_TEST(unknown_fields_are_for_newer_versions_only) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    const forgery newer[] = {FORGED_TEXT("/layers/000/k@basis", "hadamard:64", KVQ_OK, ""),
                             FORGED_TEXT("/@kvq_format_version", "1.1", KVQ_OK, "")};
    kvq_test_failed(read_forged(&ctx, newer, 1, &err), KVQ_ERR_INPUT, &err,
                    "/layers/000/k@basis is not part of format 1.0");
    kvq_test_ok(read_forged(&ctx, newer, 2, &err), &err);
}
END_TEST

// ---------------------------------------------------------------- foreign HDF5

// What other programs may put into an HDF5 file and an artifact may not have.
static void add_soft_link(hid_t file) { (void)H5Lcreate_soft("/model", file, "/link", H5P_DEFAULT, H5P_DEFAULT); }
static void add_external_link(hid_t file) {
    (void)H5Lcreate_external("/etc/passwd", "/", file, "/out", H5P_DEFAULT, H5P_DEFAULT);
}
static void add_cycle(hid_t file) { (void)H5Lcreate_hard(file, "/", file, "/again", H5P_DEFAULT, H5P_DEFAULT); }
static void add_type(hid_t file) {
    hid_t type = H5Tcopy(H5T_STD_I64LE);
    (void)H5Tcommit2(file, "/type", type, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    (void)H5Tclose(type);
}

static void add_dataset(hid_t file, const char *name, hid_t type, int rank, const hsize_t *shape, hid_t settings) {
    hid_t space = H5Screate_simple(rank, shape, NULL);
    hid_t dataset = H5Dcreate2(file, name, type, space, H5P_DEFAULT, settings, H5P_DEFAULT);
    ck_assert_int_ge(dataset, 0);
    (void)H5Dclose(dataset);
    (void)H5Sclose(space);
}

static const hsize_t SHAPE[4] = {2, 2, 2, 2}, HUGE_SHAPE[1] = {(hsize_t)1 << 50};

static void add_big_endian(hid_t file) { add_dataset(file, "/be", H5T_IEEE_F32BE, 2, SHAPE, H5P_DEFAULT); }
static void add_four_dimensions(hid_t file) { add_dataset(file, "/four", H5T_IEEE_F32LE, 4, SHAPE, H5P_DEFAULT); }
static void add_at_sign(hid_t file) { add_dataset(file, "/a@b", H5T_IEEE_F32LE, 1, SHAPE, H5P_DEFAULT); }

// A terabyte of zeros that takes no room in the file.
static void add_huge(hid_t file) {
    hid_t   settings = H5Pcreate(H5P_DATASET_CREATE);
    hsize_t chunk = 1024;
    (void)H5Pset_chunk(settings, 1, &chunk);
    add_dataset(file, "/huge", H5T_IEEE_F32LE, 1, HUGE_SHAPE, settings);
    (void)H5Pclose(settings);
}

// A chunk of a gigabyte that HDF5 would allocate to read two numbers.
static void add_huge_chunk(hid_t file) {
    const hsize_t shape = 2, limit = H5S_UNLIMITED, chunk = (hsize_t)1 << 28;
    hid_t         settings = H5Pcreate(H5P_DATASET_CREATE), space = H5Screate_simple(1, &shape, &limit);
    (void)H5Pset_chunk(settings, 1, &chunk);
    (void)H5Dclose(H5Dcreate2(file, "/chunk", H5T_IEEE_F32LE, space, H5P_DEFAULT, settings, H5P_DEFAULT));
    (void)H5Sclose(space);
    (void)H5Pclose(settings);
}

static void add_filter(hid_t file) {
    hid_t settings = H5Pcreate(H5P_DATASET_CREATE);
    (void)H5Pset_chunk(settings, 2, SHAPE);
    (void)H5Pset_nbit(settings);
    add_dataset(file, "/nbit", H5T_IEEE_F32LE, 2, SHAPE, settings);
    (void)H5Pclose(settings);
}

static void add_external_storage(hid_t file) {
    hid_t settings = H5Pcreate(H5P_DATASET_CREATE);
    (void)H5Pset_external(settings, "/etc/passwd", 0, 16);
    add_dataset(file, "/stolen", H5T_IEEE_F32LE, 2, SHAPE, settings);
    (void)H5Pclose(settings);
}

static void add_variable_text(hid_t file) {
    const char *text = "text";
    hid_t       type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    (void)H5Tset_size(type, H5T_VARIABLE);
    hid_t attribute = H5Acreate2(file, "text", type, space, H5P_DEFAULT, H5P_DEFAULT);
    (void)H5Awrite(attribute, type, &text);
    (void)H5Aclose(attribute);
    (void)H5Sclose(space);
    (void)H5Tclose(type);
}

static const struct foreign {
    void (*add)(hid_t file);
    const char *message;
} FOREIGN[] = {
    {add_soft_link, "/link: soft and external links"},
    {add_external_link, "/out: soft and external links"},
    {add_cycle, "a cycle of links"},
    {add_type, "/type: it is neither a group nor a dataset"},
    {add_big_endian, "/be: its type is none of"},
    {add_four_dimensions, "/four: it has no value or more than three"},
    {add_at_sign, "a name below it has '@'"},
    {add_huge, "/huge: its shape has more elements"},
    {add_variable_text, "/@text: its type is none of"},
    {add_external_storage, "/stolen: its storage is in other files"},
    {add_huge_chunk, "/chunk: its chunks are larger than the file"},
    {add_filter, "/nbit: it is compressed by a filter other than"},
};
#define N_FOREIGN ((int)(sizeof FOREIGN / sizeof *FOREIGN))

static void append_seal(const kvq_context *ctx, const char *path) {
    kvq_mapped_file file = {0};
    kvq_error       err = {0};
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    size_t   bytes = file.bytes + ARTIFACT_SEAL_BYTES;
    uint8_t *sealed = malloc(bytes);
    memcpy(sealed, file.data, file.bytes);
    kvq_unmap_file(&file);
    add_seal(sealed, bytes);
    kvq_test_ok(kvq_write_file(ctx, path, true, sealed, bytes, &err), &err);
    free(sealed);
}

START_TEST(foreign_objects_are_refused_by_name) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = in_folder("foreign.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 1), *b = NULL;
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, false, hash, &err), &err);
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    ck_assert_int_ge(file, 0);
    FOREIGN[_i].add(file);
    ck_assert_int_ge(H5Fclose(file), 0);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &b, hash, &err), KVQ_ERR_INTEGRITY, &err,
                    "its last line is not 'kvq-sha256:");
    append_seal(&ctx, path);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &b, hash, &err), KVQ_ERR_INPUT, &err, FOREIGN[_i].message);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// ---------------------------------------------------------------- refusing to write

static void set_nan(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[1].k.lower[4] = NAN; }
static void set_unsorted(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[1].v.codebook[0] = 3; }
static void set_two_dimensions(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.dim = 2; }
static void set_two_groups(const kvq_context *ctx, kvq_artifact *a) { (void)ctx, a->layers[0].v.n_groups = 2; }
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
    {set_two_groups, KVQ_ERR_UNSUPPORTED, "/layers/000/v/codebook: 2 groups"},
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
    char          hash[KVQ_SHA256_HEX] = "untouched", *path = in_folder("spoiled.kvq.h5");
    kvq_artifact *a = sample_artifact(&ctx, 2);
    SPOILED[_i].spoil(&ctx, a);
    kvq_test_failed(kvq_artifact_write(&ctx, a, path, false, hash, &err), SPOILED[_i].status, &err,
                    SPOILED[_i].message);
    ck_assert_str_eq(hash, "untouched");
    ck_assert_int_eq(count_files(), 0);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(the_longest_text_fits) {
    static char   text[RECORD_MAX_TEXT + 1];
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char          hash[KVQ_SHA256_HEX], *path = in_folder("text.kvq.h5");
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
    char          hash[KVQ_SHA256_HEX], *path = in_folder("a.kvq.h5");
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
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    char                hash[KVQ_SHA256_HEX], *path = in_folder("a.kvq.h5");
    kvq_artifact       *a = sample_artifact(&ctx, 4);
    const struct rlimit limit = {8192, 8192};
    (void)signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    kvq_test_failed(kvq_artifact_write(&ctx, a, path, false, hash, &err), KVQ_ERR_DISK, &err, "failed");
    ck_assert_int_eq(count_files(), 0);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// ---------------------------------------------------------------- failing allocations

START_TEST(a_failing_allocation_leaves_nothing) {
    limited_memory limit = {.inner = kvq_test_context()};
    kvq_context    good = limit.inner, bad = limited_context(&limit);
    kvq_error      err = {0};
    char           hash[KVQ_SHA256_HEX], *path = in_folder("a.kvq.h5");
    kvq_artifact  *a = sample_artifact(&good, 2), *b = NULL;
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
    KVQ_CASE(every_field_comes_back),
    KVQ_CASE(equal_artifacts_give_equal_bytes),
    KVQ_CASE(an_artifact_of_a_thousand_layers_comes_back),
    KVQ_CASE(content_hash_sees_everything_and_numeric_hash_only_numbers),
    KVQ_CASE(hdf5_printing_is_left_as_it_was),
    KVQ_LOOP(a_flipped_bit_is_never_believed, 2),
    KVQ_LOOP(random_damage_is_never_believed, 2),
    KVQ_CASE(a_truncated_file_is_refused),
    KVQ_CASE(a_changed_number_is_reported_as_damage),
    KVQ_CASE(what_is_no_artifact_is_refused),
    KVQ_LOOP(wrong_content_is_refused_by_name, (int)(sizeof FORGERIES / sizeof *FORGERIES)),
    KVQ_CASE(unknown_fields_are_for_newer_versions_only),
    KVQ_LOOP(foreign_objects_are_refused_by_name, N_FOREIGN),
    KVQ_LOOP(what_could_not_be_read_is_not_written, N_SPOILED),
    KVQ_CASE(the_longest_text_fits),
    KVQ_CASE(an_existing_file_needs_force),
    KVQ_CASE(a_full_disk_leaves_nothing),
    KVQ_CASE(a_failing_allocation_leaves_nothing),
};

// The two services for check_artifact_hash.py; both print the content hash.
static int serve(const char *service, const char *path) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *a = NULL;
    char          hash[KVQ_SHA256_HEX] = "";
    kvq_status    status = KVQ_OK;
    if (strcmp(service, "--write-sample") == 0) {
        a = sample_artifact(&ctx, 3);
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
