// SPDX-License-Identifier: Apache-2.0
// Files that are no sound artifact: no damage, no wrong version, no wrong value and nothing foreign gets through.
#include <hdf5.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "artifact_schema.h"
#include "hdf5_leaks.h"
#include "kvq_test.h"
#include "sample_artifact.h"

typedef struct image {
    uint8_t *data;
    size_t   bytes;
} image;

static image image_of(const kvq_context *ctx, const kvq_artifact *a) {
    char      hash[KVQ_SHA256_HEX];
    image     i = {0};
    kvq_error err = {0};
    kvq_test_ok(artifact_to_image(ctx, a, &i.data, &i.bytes, hash, &err), &err);
    return i;
}

static image sample_image(const kvq_context *ctx, kvq_artifact **a) {
    *a = sample_artifact(ctx, 2);
    return image_of(ctx, *a);
}

// Puts the right seal into the last bytes, as somebody would who changes a file on purpose.
static void add_seal(uint8_t *data, size_t bytes) {
    char      hex[KVQ_SHA256_HEX], line[SEAL_BYTES + 1];
    kvq_error err = {0};
    kvq_test_ok(kvq_sha256_of(data, bytes - SEAL_BYTES, hex, &err), &err);
    (void)snprintf(line, sizeof line, SEAL "%s\n", hex);
    memcpy(data + bytes - SEAL_BYTES, line, SEAL_BYTES);
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
        if (_i == 1 && at < i.bytes - SEAL_BYTES) add_seal(i.data, i.bytes);
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

// Of both schemes, as damage happens and with a right seal.
START_TEST(random_damage_is_never_believed) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a = _i < 2 ? sample_artifact(&ctx, 2) : sample_alloc_artifact(&ctx, 2);
    image         i = image_of(&ctx, a);
    uint8_t      *damaged = malloc(i.bytes);
    if (_i % 2 == 1) expect_hdf5_leaks();
    for (uint64_t round = 0; round < 1000; round++) {
        memcpy(damaged, i.data, i.bytes);
        uint64_t n = 1 + kvq_rng_below(1, KVQ_RNG_TEST, 1, round, 64);
        uint64_t from = kvq_rng_below(1, KVQ_RNG_TEST, 2, round, i.bytes - n);
        for (uint64_t k = 0; k < n; k++) {
            damaged[from + k] = (uint8_t)kvq_rng_below(1, KVQ_RNG_TEST, 3, 64 * round + k, 256);
        }
        if (_i % 2 == 1) add_seal(damaged, i.bytes);
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
    char          hash[KVQ_SHA256_HEX], *path = sample_path("changed.kvq.h5");
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
    char          hash[KVQ_SHA256_HEX], *path = sample_path("text.kvq.h5");
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
    FORGED_TEXT("/quantizer@scheme", "nf4", KVQ_ERR_UNSUPPORTED, "/quantizer@scheme is 'nf4'; format 1.1 knows 'nuq'"),
    FORGED_TEXT("/quantizer@scheme", "alloc", KVQ_ERR_UNSUPPORTED,
                "/quantizer@scheme is 'alloc'; format 1.1 knows 'nuq'"),
    FORGED_TEXT("/quantizer@rotation_kind", "none", KVQ_ERR_INPUT,
                "/quantizer@rotation_kind is not part of format 1.1"),
    FORGED_TEXT("/layers/000/k/widths", "", KVQ_ERR_INPUT, "/layers/000/k/widths is not part of format 1.1"),
    FORGED_TEXT("/quantizer@weighting", "magic", KVQ_ERR_UNSUPPORTED, "/quantizer@weighting is 'magic'"),
    FORGED_TEXT("/layers/000/k@axis", "head", KVQ_ERR_UNSUPPORTED, "/layers/000/k@axis is 'head'"),
    FORGED_TEXT("/layers/001/v@axis", "channel", KVQ_ERR_INPUT, "/layers/001/v/threshold_lower is missing"),
    FORGED_TEXT("/layers/001/k@axis", "token", KVQ_ERR_INPUT, "/layers/001/k/threshold_lower is not part of"),
    FORGED_TEXT("/layers/002/k@axis", "channel", KVQ_ERR_INPUT, "/layers/002/k/threshold_lower is missing"),
    FORGED_TEXT("/layers/000/k@domain", "projection", KVQ_ERR_UNSUPPORTED,
                "/layers/000/k@domain is 'projection', none of 'pre_rope', 'post_rope'"),
    FORGED_TEXT("/layers/000/v@domain", "post_rope", KVQ_ERR_INPUT, "/layers/000/v@domain is 'post_rope' instead of"),
    FORGED_TEXT("/layers/000/v@datatype", "fp4", KVQ_ERR_UNSUPPORTED, "/layers/000/v@datatype is 'fp4', none of 'nuq'"),
    FORGED_TEXT("/layers/000/v@datatype", "int", KVQ_ERR_INPUT, "/layers/000/v/codebook: element 0 is"),
    FORGED_TEXT("/quantizer@threshold_scope", "layer", KVQ_ERR_UNSUPPORTED, "/quantizer@threshold_scope is 'layer'"),
    FORGED_NUMBER("/quantizer@recent_tokens", NEGATIVE, KVQ_ERR_INPUT, "/quantizer@recent_tokens is -1"),
    FORGED_NUMBER("/quantizer@sinks_counted", TWO, KVQ_ERR_INPUT, "/quantizer@sinks_counted is 2"),
    FORGED_NUMBER("/layers/000/k/heldout@n_tokens", NEGATIVE, KVQ_ERR_INPUT, "/layers/000/k/heldout@n_tokens is -1"),
    FORGED_NUMBER("/layers/000/v/heldout@clipped_share", MINUS_ONE, KVQ_ERR_INPUT, "heldout@clipped_share is -1"),
    FORGED_NUMBER("/layers/001@attention_error", INFINITE, KVQ_ERR_NUMERICAL, "/layers/001@attention_error is inf"),
    FORGED_NUMBER("/layers/000/v/decode_levels", NOT_A_NUMBER, KVQ_ERR_NUMERICAL, "/layers/000/v/decode_levels: el"),
    FORGED_TEXT("/layers/001/k@hf_name", "model.layers.0.self_attn.k_proj", KVQ_ERR_INPUT, "/layers/001/k@hf_name"),
    FORGED_TEXT("/model@config_sha256", "0123", KVQ_ERR_INPUT, "'0123' is not a SHA-256"),
    FORGED_TEXT("/model@name", "\xff\xfe", KVQ_ERR_INPUT, "/model@name: the text is not valid UTF-8"),
    FORGED_TEXT("/@kvq_format", "kvq.capture", KVQ_ERR_INPUT, "kvq_format is 'kvq.capture'"),
    FORGED_TEXT("/@kvq_format_version", "2.0", KVQ_ERR_VERSION, "artifact format 2.0"),
    FORGED_TEXT("/@kvq_format_version", "1.0x", KVQ_ERR_INPUT, "'1.0x'"),
    FORGED_TEXT("/@kvq_min_reader", "1.3", KVQ_ERR_VERSION, "needs a reader of format 1.3"),
    FORGED_TEXT("/@kvq_format_version", "1.0", KVQ_ERR_INPUT,
                "/layers/002/v/codebook has the shape [2, 4] instead of [1, 4]"),
    REMOVED("/layers/001/k/threshold_upper"),
    REMOVED("/layers/000/v/fit@objective"),
    REMOVED("/dataset@seed"),
    REMOVED("/layers/000/v@datatype"),
    REMOVED("/layers/001/k/heldout@nmse"),
    REMOVED("/layers/001@attention_error"),
    REMOVED("/quantizer@sinks_counted"),
    {"/@kvq_format", NULL, 0, KVQ_ERR_INPUT, "kvq_format is ''"},
    {"/layers/002/v/codebook", NULL, 0, KVQ_ERR_INPUT, "there is no /layers/002/v/codebook"},
};

static const float   TENTH[] = {0.1f}, HALF[] = {0.5f}, DOWN[] = {0, 1, -1};
static const int64_t WIDER[] = {1}, SIX[] = {2, 6}, WIDE[] = {0, 300}, ODD[] = {3}, MANY_SLOTS[] = {65536},
                     FAR[] = {201}, FAR_BELOW[] = {-201};
static const double BEYOND[] = {33};

// The same of scheme "alloc": layer 0 has a table for each channel and values in pairs, layer 1 affine tables.
static const forgery ALLOC_FORGERIES[] = {
    FORGED_TEXT("/quantizer@scheme", "xyz", KVQ_ERR_UNSUPPORTED,
                "/quantizer@scheme is 'xyz'; format 1.2 knows 'nuq', 'alloc'"),
    FORGED_TEXT("/quantizer@scheme", "nuq", KVQ_ERR_INPUT, "/quantizer@n_side_v is missing"),
    REMOVED("/quantizer@scheme"),
    FORGED_TEXT("/@kvq_format_version", "1.1", KVQ_ERR_UNSUPPORTED,
                "/quantizer@scheme is 'alloc'; format 1.1 knows 'nuq'"),
    FORGED_TEXT("/@kvq_format_version", "1.3", KVQ_OK, ""),
    FORGED_TEXT("/layers/000/k@table_kind", "lattice", KVQ_ERR_UNSUPPORTED,
                "/layers/000/k@table_kind is 'lattice', none of 'channel', 'affine'"),
    FORGED_TEXT("/layers/001/v@scale_format", "e5m2", KVQ_ERR_UNSUPPORTED,
                "/layers/001/v@scale_format is 'e5m2', none of 'e4m3', 'f16'"),
    FORGED_TEXT("/quantizer@rotation_kind", "haar", KVQ_ERR_UNSUPPORTED,
                "/quantizer@rotation_kind is 'haar', none of 'hadamard', 'random', 'none'"),
    FORGED_TEXT("/quantizer@rotation_kind", "none", KVQ_ERR_INPUT,
                "/quantizer/rotation: element 0 is 0.353553385, which rotation_kind 'none' does not have"),
    FORGED_TEXT("/quantizer@rotation_kind", "random", KVQ_OK, ""), // any orthogonal matrix is
    FORGED_NUMBER("/quantizer/rotation", HALF, KVQ_ERR_INPUT, "/quantizer/rotation: rows 0 and 0 have the product"),
    FORGED_NUMBER("/quantizer/rotation", NOT_A_NUMBER, KVQ_ERR_NUMERICAL, "/quantizer/rotation: element 0 is"),
    FORGED_NUMBER("/model@head_dim", NINE, KVQ_ERR_INPUT, "/quantizer/rotation has the shape [8, 8] instead of [9, 9]"),
    FORGED_NUMBER("/quantizer@n_slots", ODD, KVQ_ERR_INPUT, "/quantizer@n_slots is 3, an odd number"),
    FORGED_NUMBER("/quantizer@n_slots", MANY_SLOTS, KVQ_ERR_INPUT,
                  "/quantizer@n_slots is 65536, outside of 0 .. 65534"),
    FORGED_NUMBER("/quantizer@n_side_k", NINE, KVQ_ERR_INPUT, "9 outliers per side leave nothing of 16 channels"),
    FORGED_NUMBER("/quantizer@budget_tokens", NEGATIVE, KVQ_ERR_INPUT, "/quantizer@budget_tokens is -1"),
    FORGED_NUMBER("/quantizer@target_bits", BEYOND, KVQ_ERR_INPUT, "/quantizer@target_bits is 33"),
    FORGED_NUMBER("/layers/000/k/widths", SIX, KVQ_ERR_INPUT,
                  "/layers/000/k/widths: element 1 is 6, outside of 0 .. 5"),
    FORGED_NUMBER("/layers/001/k/widths", SIX, KVQ_ERR_INPUT,
                  "/layers/001/k/widths: element 1 is 6, outside of 0 .. 5"),
    FORGED_NUMBER("/layers/000/k/widths", WIDE, KVQ_ERR_INPUT, "/layers/000/k/widths: element 1 is 300, outside of"),
    FORGED_NUMBER("/layers/000/k/widths", NEGATIVE, KVQ_ERR_INPUT, "/layers/000/k/widths: element 0 is -1, outside of"),
    FORGED_NUMBER("/layers/000/k/widths", WIDER, KVQ_ERR_INPUT,
                  "/layers/000/k/key_levels: 120 levels; the tables of these widths have 121"),
    FORGED_NUMBER("/layers/001/k/widths", WIDER, KVQ_OK, ""), // every width has a table
    FORGED_NUMBER("/layers/000/k/key_levels", NOT_A_NUMBER, KVQ_ERR_NUMERICAL,
                  "/layers/000/k/key_levels: element 0 is"),
    FORGED_NUMBER("/layers/000/k/key_levels", TENTH, KVQ_ERR_INPUT,
                  "/layers/000/k/key_levels: element 0 is 0.100000001, not a number of f16"),
    FORGED_NUMBER("/layers/001/k/key_levels", TOO_HIGH, KVQ_ERR_INPUT,
                  "/layers/001/k/key_levels: element 0 is 1.00000002e+30, not a number of f16"),
    FORGED_NUMBER("/layers/000/k/key_levels", DOWN, KVQ_ERR_INPUT,
                  "/layers/000/k/key_levels: level 2, -1, is below level 1, 1, of its table"),
    FORGED_NUMBER("/layers/001/k/key_levels", DOWN, KVQ_ERR_INPUT, "/layers/001/k/key_levels: level 2, -1, is below"),
    FORGED_NUMBER("/layers/000/k/threshold_lower", DESCENDING, KVQ_ERR_INPUT,
                  "/layers/000/k: the thresholds of channel 0"),
    FORGED_NUMBER("/layers/000/k/threshold_lower", TENTH, KVQ_ERR_INPUT,
                  "/layers/000/k/threshold_lower: element 0 is 0.100000001, not a number of f16"),
    FORGED_NUMBER("/layers/001/k/threshold_upper", TENTH, KVQ_ERR_INPUT,
                  "/layers/001/k/threshold_upper: element 0 is 0.100000001, not a number of f16"),
    FORGED_NUMBER("/layers/001/k/offset", NOT_A_NUMBER, KVQ_ERR_NUMERICAL, "/layers/001/k/offset: element 0 is"),
    FORGED_NUMBER("/layers/001/k/offset", TENTH, KVQ_ERR_INPUT, "/layers/001/k/offset: element 0 is 0.1"),
    FORGED_NUMBER("/layers/001/k/scale", TENTH, KVQ_ERR_INPUT, "/layers/001/k/scale: element 0 is 0.1"),
    FORGED_NUMBER("/layers/000/v/codebook", NOT_A_NUMBER, KVQ_ERR_NUMERICAL, "/layers/000/v/codebook: element 0 is"),
    FORGED_NUMBER("/layers/000/v/codebook", TENTH, KVQ_OK, ""), // in no order, f32
    FORGED_NUMBER("/layers/000/v@bits", TWO, KVQ_ERR_INPUT,
                  "/layers/000/v/codebook has the shape [1, 8, 2] instead of [1, 4, 2]"),
    FORGED_NUMBER("/layers/000/v@bits", NINE, KVQ_ERR_INPUT, "/layers/000/v@bits is 9, outside of 1 .. 8"),
    FORGED_NUMBER("/layers/000/v@scale_exponent", FAR, KVQ_ERR_INPUT, "/layers/000/v@scale_exponent is 201"),
    FORGED_NUMBER("/layers/000/v@scale_exponent", FAR_BELOW, KVQ_ERR_INPUT, "/layers/000/v@scale_exponent is -201"),
    FORGED_NUMBER("/layers/001/k@kl", MINUS_ONE, KVQ_ERR_INPUT, "/layers/001/k@kl is -1"),
    FORGED_NUMBER("/layers/001/v@kl", INFINITE, KVQ_ERR_NUMERICAL, "/layers/001/v@kl is inf"),
    FORGED_TEXT("/layers/000/k@axis", "token", KVQ_ERR_UNSUPPORTED,
                "/layers/000/k@axis: scheme 'alloc' knows 'channel'"),
    FORGED_TEXT("/layers/000/v@axis", "channel", KVQ_ERR_UNSUPPORTED,
                "/layers/000/v@axis: scheme 'alloc' knows 'token'"),
    FORGED_TEXT("/layers/000/k@table_kind", "affine", KVQ_ERR_INPUT, "/layers/000/k/offset is missing"),
    FORGED_TEXT("/layers/000/k/offset", "", KVQ_ERR_INPUT, "/layers/000/k/offset is not part of format 1.2"),
    FORGED_TEXT("/layers/000/k/codebook", "", KVQ_ERR_INPUT, "/layers/000/k/codebook is not part of format 1.2"),
    FORGED_TEXT("/layers/000/k@datatype", "nuq", KVQ_ERR_INPUT, "/layers/000/k@datatype is not part of format 1.2"),
    FORGED_TEXT("/layers/000/v@table_kind", "channel", KVQ_ERR_INPUT, "/layers/000/v@table_kind is not part of"),
    FORGED_TEXT("/layers/000/v/decode_levels", "", KVQ_ERR_INPUT, "/layers/000/v/decode_levels is not part of"),
    FORGED_TEXT("/quantizer@recent_tokens", "", KVQ_ERR_INPUT, "/quantizer@recent_tokens is not part of format 1.2"),
    FORGED_TEXT("/quantizer@n_side_v", "", KVQ_ERR_INPUT, "/quantizer@n_side_v is not part of format 1.2"),
    REMOVED("/quantizer/rotation"),
    REMOVED("/quantizer@rotation_kind"),
    REMOVED("/quantizer@target_bits"),
    REMOVED("/layers/000/k/widths"),
    REMOVED("/layers/000/k/key_levels"),
    REMOVED("/layers/000/k/threshold_lower"),
    REMOVED("/layers/001/k/offset"),
    REMOVED("/layers/001/k/scale"),
    REMOVED("/layers/001/k@kl"),
    REMOVED("/layers/001/v@scale_exponent"),
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
    kvq_test_ok(records_to_hdf5(ctx, list, SEAL_BYTES, &i.data, &i.bytes, err), err);
    i.bytes += SEAL_BYTES;
    add_seal(i.data, i.bytes);
    kvq_status status = artifact_from_image(ctx, i.data, i.bytes, &a, hash, err);
    kvq_artifact_destroy(ctx, &a);
    kvq_free(ctx, i.data);
    return status;
}

// Destroys the artifact.
static kvq_status read_forged(const kvq_context *ctx, kvq_artifact *a, const forgery *forgeries, int n,
                              kvq_error *err) {
    record_list list = {0};
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
    kvq_test_failed(read_forged(&ctx, sample_artifact(&ctx, 3), &FORGERIES[_i], 1, &err), FORGERIES[_i].status, &err,
                    FORGERIES[_i].message);
}
END_TEST

START_TEST(wrong_content_of_alloc_is_refused_by_name) {
    const forgery *f = &ALLOC_FORGERIES[_i];
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_status     status = read_forged(&ctx, sample_alloc_artifact(&ctx, 2), f, 1, &err);
    if (f->status == KVQ_OK)
        kvq_test_ok(status, &err);
    else
        kvq_test_failed(status, f->status, &err, f->message);
}
END_TEST

// An additive version may hold what this reader does not know, the same version may not.
START_TEST(unknown_fields_are_for_newer_versions_only) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    const forgery newer[] = {FORGED_TEXT("/layers/000/k@basis", "hadamard:64", KVQ_OK, ""),
                             FORGED_TEXT("/@kvq_format_version", "1.3", KVQ_OK, "")};
    kvq_test_failed(read_forged(&ctx, sample_artifact(&ctx, 3), newer, 1, &err), KVQ_ERR_INPUT, &err,
                    "/layers/000/k@basis is not part of format 1.1");
    kvq_test_ok(read_forged(&ctx, sample_artifact(&ctx, 3), newer, 2, &err), &err);
}
END_TEST

// What format 1.1 added is unknown to a file that says it is of 1.0.
START_TEST(an_older_file_has_no_newer_field) {
    const forgery   edits[] = {{ARTIFACT_CONTENT_HASH, NULL, 0, KVQ_OK, ""},
                               {ARTIFACT_NUMERIC_HASH, NULL, 0, KVQ_OK, ""},
                               FORGED_TEXT("/layers/001/k@datatype", "nuq", KVQ_OK, "")};
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_mapped_file file = {0};
    for (int with = 0; with < 2; with++) {
        record_list list = {0};
        kvq_test_ok(kvq_map_file(KVQ_TEST_DATA "/format-1.0.kvq.h5", &file, &err), &err);
        kvq_test_ok(records_from_hdf5(&ctx, file.data, file.bytes - SEAL_BYTES, &list, &err), &err);
        kvq_unmap_file(&file);
        for (int i = 0; i < 2 + with; i++) {
            record_list forged = forge(&ctx, &list, &edits[i]);
            record_list_free(&ctx, &list);
            list = forged;
        }
        kvq_status status = read_list(&ctx, &list, &err);
        if (with == 0) kvq_test_ok(status, &err);
        if (with == 1) kvq_test_failed(status, KVQ_ERR_INPUT, &err, "/layers/001/k@datatype is not part of format 1.0");
        record_list_free(&ctx, &list);
    }
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
    size_t   bytes = file.bytes + SEAL_BYTES;
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
    char          hash[KVQ_SHA256_HEX], *path = sample_path("foreign.kvq.h5");
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
static const kvq_test_case CASES[] = {
    KVQ_CASE(hdf5_printing_is_left_as_it_was),
    KVQ_LOOP(a_flipped_bit_is_never_believed, 2),
    KVQ_LOOP(random_damage_is_never_believed, 4),
    KVQ_CASE(a_truncated_file_is_refused),
    KVQ_CASE(a_changed_number_is_reported_as_damage),
    KVQ_CASE(what_is_no_artifact_is_refused),
    KVQ_LOOP(wrong_content_is_refused_by_name, (int)(sizeof FORGERIES / sizeof *FORGERIES)),
    KVQ_LOOP(wrong_content_of_alloc_is_refused_by_name, (int)(sizeof ALLOC_FORGERIES / sizeof *ALLOC_FORGERIES)),
    KVQ_CASE(unknown_fields_are_for_newer_versions_only),
    KVQ_CASE(an_older_file_has_no_newer_field),
    KVQ_LOOP(foreign_objects_are_refused_by_name, N_FOREIGN),
};
KVQ_TEST_MAIN("artifact_refused", CASES)
