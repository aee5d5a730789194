// SPDX-License-Identifier: Apache-2.0
// Captures that kvq did not write: those of other programs are understood, no wrong value, no foreign storage and no
// damage gets through.
#include <hdf5.h>

#include "hdf5_leaks.h"
#include "sample_capture.h"

// ---------------------------------------------------------------- files of other programs

static hid_t open_file(const char *path, bool create) {
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    (void)H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
    hid_t file = create ? H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access) : H5Fopen(path, H5F_ACC_RDWR, access);
    (void)H5Pclose(access);
    ck_assert_int_ge(file, 0);
    return file;
}

// Replaces an attribute, or without a value removes it. Takes the type over.
static void set_attribute(hid_t file, const char *group, const char *name, hid_t type, const void *value) {
    hid_t object = H5Oopen(file, group, H5P_DEFAULT), space = H5Screate(H5S_SCALAR);
    ck_assert_int_ge(object, 0);
    if (H5Aexists(object, name) > 0) (void)H5Adelete(object, name);
    if (value != NULL) {
        hid_t attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
        ck_assert_int_ge(H5Awrite(attribute, type, value), 0);
        (void)H5Aclose(attribute);
    }
    (void)H5Tclose(type);
    (void)H5Sclose(space);
    (void)H5Oclose(object);
}

static hid_t text_type(size_t bytes) {
    hid_t type = H5Tcopy(H5T_C_S1);
    (void)H5Tset_size(type, bytes);
    return type;
}

static void set_text(hid_t file, const char *group, const char *name, const char *text) {
    set_attribute(file, group, name, text_type(text != NULL ? strlen(text) + 1 : 1), text);
}

static void set_i64(hid_t file, const char *group, const char *name, int64_t value) {
    set_attribute(file, group, name, H5Tcopy(H5T_STD_I64LE), &value);
}

static void set_f64(hid_t file, const char *group, const char *name, double value) {
    set_attribute(file, group, name, H5Tcopy(H5T_IEEE_F64LE), &value);
}

// Replaces an array; data NULL leaves it unwritten.
static void set_array(hid_t file, const char *path, hid_t type, int rank, const hsize_t *shape, hid_t settings,
                      const void *data) {
    hid_t space = H5Screate_simple(rank, shape, NULL);
    if (H5Lexists(file, path, H5P_DEFAULT) > 0) (void)H5Ldelete(file, path, H5P_DEFAULT);
    hid_t array = H5Dcreate2(file, path, type, space, H5P_DEFAULT, settings, H5P_DEFAULT);
    ck_assert_int_ge(array, 0);
    if (data != NULL) ck_assert_int_ge(H5Dwrite(array, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data), 0);
    (void)H5Dclose(array);
    (void)H5Sclose(space);
}

static const hsize_t KV_SHAPE[4] = {WINDOWS, TOKENS, KV, DIM}, IDS_SHAPE[2] = {WINDOWS, TOKENS};
#define KV_ELEMENTS (WINDOWS * TOKENS * KV * DIM)

// IEEE binary16 as numpy has it.
static hid_t half_type(void) {
    hid_t type = H5Tcopy(H5T_IEEE_F32LE);
    (void)H5Tset_fields(type, 15, 10, 5, 0, 10);
    (void)H5Tset_size(type, 2);
    (void)H5Tset_ebias(type, 15);
    return type;
}

// The least that is a capture, of types and storage that kvq does not write: f64 in one piece, f16,
// chunks across windows with deflate, ids of 64 bits, attributes as h5py makes them of Python's int and bool.
static void write_foreign(const char *path) {
    static double   wide[KV_ELEMENTS];
    static uint16_t half[KV_ELEMENTS];
    int64_t         ids[WINDOWS * TOKENS];
    const hsize_t   chunk[4] = {2, 2, 1, 4};
    const int8_t    no = 0, yes = 1;
    const float     theta = 10000;
    hid_t           file = open_file(path, true), settings = H5Pcreate(H5P_DATASET_CREATE);
    for (int64_t i = 0; i < KV_ELEMENTS; i++) wide[i] = (double)i / 7, half[i] = kvq_half_of_float((float)i / 8);
    for (int64_t i = 0; i < WINDOWS * TOKENS; i++) ids[i] = i;
    (void)H5Pset_chunk(settings, 4, chunk);
    (void)H5Pset_shuffle(settings);
    (void)H5Pset_deflate(settings, 9);
    for (const char *const *g =
             (const char *const[]){"/model", "/tokenizer", "/dataset", "/layers", "/layers/000", NULL};
         *g != NULL; g++)
        (void)H5Gclose(H5Gcreate2(file, *g, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    set_text(file, "/", "kvq_format", "kvq.capture");
    set_text(file, "/", "kvq_format_version", "1.7");
    set_text(file, "/", "something", "else");
    set_attribute(file, "/model", "n_layers", H5Tcopy(H5T_STD_U8LE), &yes);
    set_i64(file, "/model", "n_kv_heads", KV);
    set_i64(file, "/model", "head_dim", DIM);
    set_attribute(file, "/model", "rope_theta", H5Tcopy(H5T_IEEE_F32LE), &theta);
    set_i64(file, "/dataset", "baseline_nll", 3);
    hid_t flag = H5Tenum_create(H5T_STD_I8LE);
    (void)H5Tenum_insert(flag, "FALSE", &no);
    (void)H5Tenum_insert(flag, "TRUE", &yes);
    set_attribute(file, "/tokenizer", "bos_added", flag, &yes);
    hid_t f16 = half_type();
    set_array(file, "/layers/000/k", H5T_IEEE_F64LE, 4, KV_SHAPE, H5P_DEFAULT, wide);
    set_array(file, "/layers/000/v", f16, 4, KV_SHAPE, settings, half);
    set_array(file, "/layers/000/more", H5T_STD_I8LE, 1, KV_SHAPE, H5P_DEFAULT, NULL);
    set_array(file, "/dataset/token_ids", H5T_STD_I64LE, 2, IDS_SHAPE, H5P_DEFAULT, ids);
    (void)H5Tclose(f16);
    (void)H5Pclose(settings);
    ck_assert_int_ge(H5Fclose(file), 0);
}

START_TEST(a_file_of_another_program_is_read) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_capture *c = NULL;
    float        x[KV_ELEMENTS / WINDOWS];
    int32_t      ids[WINDOWS * TOKENS];
    char        *path = sample_path("foreign.kvqc.h5");
    write_foreign(path);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    const kvq_capture_info *info = kvq_capture_describe(c);
    ck_assert_int_eq(info->model.n_layers, 1);
    ck_assert(info->model.rope_theta == 10000 && info->dataset.baseline_nll == 3 && info->tokenizer.bos_added);
    ck_assert(info->dataset.n_windows == WINDOWS && info->dataset.seq_len == TOKENS && info->type == KVQ_ARRAY_F64);
    ck_assert(!info->has_query && !info->has_fisher && info->has_ids && info->model.architecture[0] == 0);
    for (int64_t window = 0; window < WINDOWS; window++) {
        int64_t n = KV_ELEMENTS / WINDOWS;
        kvq_test_ok(kvq_capture_read(c, KVQ_CAPTURE_K, 0, window, x, &err), &err);
        for (int64_t i = 0; i < n; i++) ck_assert(x[i] == (float)((double)(window * n + i) / 7));
        kvq_test_ok(kvq_capture_read(c, KVQ_CAPTURE_V, 0, window, x, &err), &err);
        for (int64_t i = 0; i < n; i++) ck_assert(x[i] == (float)(window * n + i) / 8);
    }
    kvq_test_ok(kvq_capture_read_ids(c, ids, &err), &err);
    for (int64_t i = 0; i < WINDOWS * TOKENS; i++) ck_assert_int_eq(ids[i], i);
    kvq_capture_close(&ctx, &c);
}
END_TEST

// ---------------------------------------------------------------- wrong content

// One attribute replaced: a text, an integer (text NULL), or a float; all NULL and 0 with `remove`.
typedef struct forgery {
    const char *group, *name, *text;
    enum { AS_TEXT, AS_INTEGER, AS_FLOAT, REMOVED } as;
    double      value;
    kvq_status  status;
    const char *message;
} forgery;

#define LONG_TEXT "0123456789012345678901234567890123456789"

static const forgery FORGERIES[] = {
    {"/", "kvq_format", NULL, REMOVED, 0, KVQ_ERR_INPUT, "kvq_format is '' instead of 'kvq.capture'"},
    {"/", "kvq_format", "kvq.artifact", AS_TEXT, 0, KVQ_ERR_INPUT, "kvq_format is 'kvq.artifact'"},
    {"/", "kvq_format", NULL, AS_INTEGER, 7, KVQ_ERR_INPUT, "kvq_format is ''"},
    {"/", "kvq_format_version", NULL, REMOVED, 0, KVQ_ERR_INPUT, "kvq_format_version '' is no version"},
    {"/", "kvq_format_version", "1.0x", AS_TEXT, 0, KVQ_ERR_INPUT, "kvq_format_version '1.0x'"},
    {"/", "kvq_format_version", "2.0", AS_TEXT, 0, KVQ_ERR_VERSION, "capture format 2.0"},
    {"/model", "n_layers", NULL, REMOVED, 0, KVQ_ERR_INPUT, "/model@n_layers is missing"},
    {"/model", "n_layers", NULL, AS_INTEGER, 0, KVQ_ERR_INPUT, "/model@n_layers is 0, outside of 1 .. 1000"},
    {"/model", "n_layers", NULL, AS_INTEGER, 1001, KVQ_ERR_INPUT, "/model@n_layers is 1001"},
    {"/model", "n_layers", NULL, AS_FLOAT, 3, KVQ_ERR_INPUT, "/model@n_layers is not an integer"},
    {"/model", "n_layers", "3", AS_TEXT, 0, KVQ_ERR_INPUT, "/model@n_layers is not an integer"},
    {"/model", "n_kv_heads", NULL, REMOVED, 0, KVQ_ERR_INPUT, "/model@n_kv_heads is missing"},
    {"/model", "n_kv_heads", NULL, AS_INTEGER, 1, KVQ_ERR_INPUT,
     "/layers/000/k has the shape [2, 5, 2, 6] instead of [2, 5, 1, 6]"},
    {"/model", "n_kv_heads", NULL, AS_INTEGER, -2, KVQ_ERR_INPUT, "/model@n_kv_heads is -2"},
    {"/model", "head_dim", NULL, REMOVED, 0, KVQ_ERR_INPUT, "/model@head_dim is missing"},
    {"/model", "head_dim", NULL, AS_INTEGER, 60000, KVQ_ERR_UNSUPPORTED, "4 heads of 60000 channels"},
    {"/model", "n_heads", NULL, REMOVED, 0, KVQ_ERR_INPUT, "there are queries, but /model@n_heads is missing"},
    {"/model", "n_heads", NULL, AS_INTEGER, 3, KVQ_ERR_INPUT, "/layers/000/q has the shape [2, 5, 4, 6]"},
    {"/model", "rope_theta", NULL, AS_FLOAT, -1, KVQ_ERR_INPUT, "/model@rope_theta is -1"},
    {"/model", "rope_theta", NULL, AS_FLOAT, HUGE_VAL, KVQ_ERR_NUMERICAL, "/model@rope_theta is inf"},
    {"/model", "rope_theta", "1e4", AS_TEXT, 0, KVQ_ERR_INPUT, "/model@rope_theta is not a number"},
    {"/model", "vocab_size", NULL, AS_INTEGER, 0x1p60, KVQ_ERR_INPUT, "/model@vocab_size is"},
    {"/model", "hidden_size", NULL, AS_INTEGER, -1, KVQ_ERR_INPUT, "/model@hidden_size is -1"},
    {"/model", "n_tensors", NULL, AS_INTEGER, -1, KVQ_ERR_INPUT, "/model@n_tensors is -1"},
    {"/model", "architecture", NULL, AS_INTEGER, 1, KVQ_ERR_INPUT, "/model@architecture is not a text"},
    {"/model", "rope_type", LONG_TEXT, AS_TEXT, 0, KVQ_ERR_INPUT, "/model@rope_type is a text of 40 bytes; at most 31"},
    {"/model", "name", "\xff\xfe", AS_TEXT, 0, KVQ_ERR_INPUT, "/model@name: it is not UTF-8"},
    {"/model", "config_sha256", "0123", AS_TEXT, 0, KVQ_ERR_INPUT, "/model@config_sha256: '0123' is not a SHA-256"},
    {"/tokenizer", "sha256", LONG_TEXT, AS_TEXT, 0, KVQ_ERR_INPUT, "/tokenizer@sha256"},
    {"/tokenizer", "bos_added", NULL, AS_INTEGER, 2, KVQ_ERR_INPUT, "/tokenizer@bos_added is not a bool"},
    {"/dataset", "seed", NULL, AS_INTEGER, -1, KVQ_ERR_INPUT, "/dataset@seed is not an unsigned integer"},
    {"/dataset", "n_available_tokens", NULL, AS_INTEGER, -1, KVQ_ERR_INPUT, "/dataset@n_available_tokens is -1"},
    {"/dataset", "baseline_nll", NULL, AS_FLOAT, -0.1, KVQ_ERR_INPUT, "/dataset@baseline_nll is -0.1"},
    // these a fit can do without
    {"/model", "architecture", NULL, REMOVED, 0, KVQ_OK, NULL},
    {"/model", "vocab_size", NULL, REMOVED, 0, KVQ_OK, NULL},
    {"/tokenizer", "bos_added", NULL, REMOVED, 0, KVQ_OK, NULL},
    {"/dataset", "seed", NULL, REMOVED, 0, KVQ_OK, NULL},
    {"/dataset", "baseline_nll", NULL, REMOVED, 0, KVQ_OK, NULL},
    {"/", "kvq_format_version", "1.3", AS_TEXT, 0, KVQ_OK, NULL},
};
#define N_FORGERIES ((int)(sizeof FORGERIES / sizeof *FORGERIES))

static void expect(const kvq_context *ctx, const char *path, kvq_status status, const char *message) {
    kvq_capture *c = NULL;
    kvq_error    err = {0};
    if (status == KVQ_OK) {
        kvq_test_ok(kvq_capture_open(ctx, path, &c, &err), &err);
    } else {
        kvq_test_failed(kvq_capture_open(ctx, path, &c, &err), status, &err, message);
        ck_assert_ptr_nonnull(strstr(err.message, path));
        ck_assert_ptr_null(c);
    }
    kvq_capture_close(ctx, &c);
    ck_assert_int_eq(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0); // nothing stays open
}

START_TEST(wrong_attributes_are_refused_by_name) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    const forgery   *f = &FORGERIES[_i];
    kvq_capture_info info = sample_info();
    char            *path = sample_path("forged.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    hid_t file = open_file(path, false);
    if (f->as == AS_TEXT || f->as == REMOVED) set_text(file, f->group, f->name, f->text);
    if (f->as == AS_INTEGER) set_i64(file, f->group, f->name, (int64_t)f->value);
    if (f->as == AS_FLOAT) set_f64(file, f->group, f->name, f->value);
    ck_assert_int_ge(H5Fclose(file), 0);
    expect(&ctx, path, f->status, f->message);
}
END_TEST

// What other programs may put into an HDF5 file and a capture may not have.

#define K0 "/layers/000/k"

static void no_v(hid_t f) { (void)H5Ldelete(f, "/layers/002/v", H5P_DEFAULT); }
static void no_q(hid_t f) { (void)H5Ldelete(f, "/layers/002/q", H5P_DEFAULT); }
static void no_fisher(hid_t f) { (void)H5Ldelete(f, "/layers/002/fisher_v", H5P_DEFAULT); }
static void no_layers(hid_t f) { (void)H5Ldelete(f, "/layers", H5P_DEFAULT); }
static void no_model(hid_t f) { (void)H5Ldelete(f, "/model", H5P_DEFAULT); }
static void unwritten(hid_t f) { set_array(f, K0, H5T_IEEE_F32LE, 4, KV_SHAPE, H5P_DEFAULT, NULL); }
static void big_endian(hid_t f) { set_array(f, K0, H5T_IEEE_F32BE, 4, KV_SHAPE, H5P_DEFAULT, NULL); }
static void eight_bits(hid_t f) {
    static const uint8_t ZEROS[KV_ELEMENTS];
    set_array(f, K0, H5T_STD_U8LE, 4, KV_SHAPE, H5P_DEFAULT, ZEROS);
}
static void half_squares(hid_t f) {
    static const uint16_t ZEROS[KV_ELEMENTS];
    hid_t                 type = half_type();
    set_array(f, "/layers/002/fisher_k", type, 4, KV_SHAPE, H5P_DEFAULT, ZEROS);
    (void)H5Tclose(type);
}
static void of_complex(hid_t f) {
    hid_t type = H5Tcreate(H5T_COMPOUND, 8);
    (void)H5Tinsert(type, "r", 0, H5T_IEEE_F32LE);
    set_array(f, K0, type, 4, KV_SHAPE, H5P_DEFAULT, NULL);
    (void)H5Tclose(type);
}
static void three_dimensions(hid_t f) {
    static const float ZEROS[KV_ELEMENTS];
    set_array(f, K0, H5T_IEEE_F32LE, 3, KV_SHAPE, H5P_DEFAULT, ZEROS);
}
static void five_dimensions(hid_t f) {
    const hsize_t shape[5] = {WINDOWS, TOKENS, KV, DIM, 1};
    set_array(f, K0, H5T_IEEE_F32LE, 5, shape, H5P_DEFAULT, NULL);
}
static void no_windows(hid_t f) {
    const hsize_t shape[4] = {0, TOKENS, KV, DIM};
    set_array(f, K0, H5T_IEEE_F32LE, 4, shape, H5P_DEFAULT, NULL);
}
static void scalar(hid_t f) {
    hid_t space = H5Screate(H5S_SCALAR);
    (void)H5Ldelete(f, K0, H5P_DEFAULT);
    (void)H5Dclose(H5Dcreate2(f, K0, H5T_IEEE_F32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    (void)H5Sclose(space);
}
static void group(hid_t f) {
    (void)H5Ldelete(f, K0, H5P_DEFAULT);
    (void)H5Gclose(H5Gcreate2(f, K0, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
}
static void shorter(hid_t f) {
    static const float ZEROS[KV_ELEMENTS];
    const hsize_t      shape[4] = {WINDOWS, TOKENS - 1, KV, DIM};
    set_array(f, "/layers/002/k", H5T_IEEE_F32LE, 4, shape, H5P_DEFAULT, ZEROS);
}
static void huge(hid_t f) {
    const hsize_t shape[4] = {(hsize_t)1 << 40, (hsize_t)1 << 40, KV, DIM}, chunk[4] = {1, 1, KV, DIM};
    hid_t         settings = H5Pcreate(H5P_DATASET_CREATE);
    (void)H5Pset_chunk(settings, 4, chunk);
    set_array(f, K0, H5T_IEEE_F32LE, 4, shape, settings, NULL);
    (void)H5Pclose(settings);
}
static void missing_chunk(hid_t f) {
    const hsize_t chunk[4] = {1, 3, KV, DIM}, start[4] = {0}, count[4] = {WINDOWS, 3, KV, DIM};
    float         zeros[KV_ELEMENTS] = {0};
    hid_t         settings = H5Pcreate(H5P_DATASET_CREATE);
    (void)H5Pset_chunk(settings, 4, chunk);
    set_array(f, K0, H5T_IEEE_F32LE, 4, KV_SHAPE, settings, NULL);
    hid_t array = H5Dopen2(f, K0, H5P_DEFAULT), space = H5Dget_space(array), memory = H5Screate_simple(4, count, NULL);
    (void)H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL);
    ck_assert_int_ge(H5Dwrite(array, H5T_IEEE_F32LE, memory, space, H5P_DEFAULT, zeros), 0);
    (void)H5Sclose(memory);
    (void)H5Sclose(space);
    (void)H5Dclose(array);
    (void)H5Pclose(settings);
}
static void huge_chunk(hid_t f) {
    const hsize_t chunk[4] = {1, 1 << 20, 8, 32}, limit[4] = {2, H5S_UNLIMITED, 8, 32};
    hid_t         settings = H5Pcreate(H5P_DATASET_CREATE), space = H5Screate_simple(4, KV_SHAPE, limit);
    (void)H5Ldelete(f, K0, H5P_DEFAULT);
    (void)H5Pset_chunk(settings, 4, chunk);
    (void)H5Dclose(H5Dcreate2(f, K0, H5T_IEEE_F32LE, space, H5P_DEFAULT, settings, H5P_DEFAULT));
    (void)H5Sclose(space);
    (void)H5Pclose(settings);
}
static void other_filter(hid_t f) {
    hid_t settings = H5Pcreate(H5P_DATASET_CREATE);
    (void)H5Pset_chunk(settings, 4, KV_SHAPE);
    (void)H5Pset_nbit(settings);
    set_array(f, K0, H5T_IEEE_F32LE, 4, KV_SHAPE, settings, NULL);
    (void)H5Pclose(settings);
}
static void external_storage(hid_t f) {
    hid_t settings = H5Pcreate(H5P_DATASET_CREATE);
    (void)H5Pset_external(settings, "/etc/passwd", 0, KV_ELEMENTS * 4);
    set_array(f, K0, H5T_IEEE_F32LE, 4, KV_SHAPE, settings, NULL);
    (void)H5Pclose(settings);
}
static void soft_link(hid_t f) {
    (void)H5Ldelete(f, K0, H5P_DEFAULT);
    (void)H5Lcreate_soft("/layers/002/k", f, K0, H5P_DEFAULT, H5P_DEFAULT);
}
static void external_link(hid_t f) {
    (void)H5Ldelete(f, "/layers/002", H5P_DEFAULT);
    (void)H5Lcreate_external("/etc/passwd", "/layers/002", f, "/layers/002", H5P_DEFAULT, H5P_DEFAULT);
}
static void variable_text(hid_t f) {
    const char *text = "kvq.capture";
    set_attribute(f, "/", "kvq_format", text_type(H5T_VARIABLE), &text);
}
static void big_endian_attribute(hid_t f) {
    const int64_t value = 3;
    set_attribute(f, "/model", "n_layers", H5Tcopy(H5T_STD_I64BE), &value);
}
static void negative_byte(hid_t f) {
    const int8_t value = -3;
    set_attribute(f, "/model", "n_layers", H5Tcopy(H5T_STD_I8LE), &value);
}
static void reference_attribute(hid_t f) {
    hobj_ref_t value = 0;
    set_attribute(f, "/model", "n_layers", H5Tcopy(H5T_STD_REF_OBJ), &value);
}
static void two_values(hid_t f) {
    const hsize_t two = 2;
    const int64_t values[2] = {3, 3};
    hid_t         model = H5Gopen2(f, "/model", H5P_DEFAULT), space = H5Screate_simple(1, &two, NULL);
    (void)H5Adelete(model, "n_layers");
    hid_t attribute = H5Acreate2(model, "n_layers", H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    (void)H5Awrite(attribute, H5T_STD_I64LE, values);
    (void)H5Aclose(attribute);
    (void)H5Sclose(space);
    (void)H5Gclose(model);
}
static void float_ids(hid_t f) {
    static const float ZEROS[WINDOWS * TOKENS];
    set_array(f, "/dataset/token_ids", H5T_IEEE_F32LE, 2, IDS_SHAPE, H5P_DEFAULT, ZEROS);
}
static void flat_ids(hid_t f) {
    static const int32_t ZEROS[WINDOWS];
    set_array(f, "/dataset/token_ids", H5T_STD_I32LE, 1, IDS_SHAPE, H5P_DEFAULT, ZEROS);
}

static const struct spoiled {
    void (*spoil)(hid_t file);
    const char *message;
} SPOILED[] = {
    {no_v, "/layers/002/v is missing"},
    {no_q, "/layers/002/q is missing"},
    {no_fisher, "/layers/002/fisher_v is missing"},
    {no_layers, "there is no layer"},
    {no_model, "/model@n_layers is missing"},
    {unwritten, K0 ": it was never written"},
    {missing_chunk, K0 ": some of its chunks were never written"},
    {big_endian, K0 ": its type is none of"},
    {of_complex, K0 ": its type is none of"},
    {eight_bits, K0 " is stored as u8; it must be f16, f32 or f64"},
    {half_squares, "/layers/002/fisher_k is stored as f16; it must be f32 or f64"},
    {three_dimensions, K0 " has the shape [2, 5, 2] instead of [windows, tokens, heads, channels]"},
    {five_dimensions, K0 ": it has no value or more than four dimensions"},
    {no_windows, K0 " has the shape [0, 5, 2, 6] instead of"},
    {scalar, K0 ": it has no value or more than four dimensions"},
    {group, K0 ": it is not an array"},
    {shorter, "/layers/002/k has the shape [2, 4, 2, 6] instead of [2, 5, 2, 6]"},
    {huge, K0 ": its shape has more elements"},
    {huge_chunk, K0 ": its chunks have more than 256 MiB"},
    {other_filter, K0 ": it is compressed by a filter other than"},
    {external_storage, K0 ": its storage is in other files"},
    {soft_link, K0 " is missing"},
    {variable_text, "/@kvq_format is a text of variable length"},
    {big_endian_attribute, "/model@n_layers: its type is none of"},
    {negative_byte, "/model@n_layers is -3, outside of 1 .. 1000"},
    {reference_attribute, "/model@n_layers: its type is none of"},
    {two_values, "/model@n_layers: it does not hold exactly one value"},
    {float_ids, "/dataset/token_ids is stored as f32; it must be i32 or i64"},
    {flat_ids, "/dataset/token_ids has the shape [2] instead of [2, 5]"},
};
#define N_SPOILED ((int)(sizeof SPOILED / sizeof *SPOILED))

static void spoil_file(const kvq_context *ctx, const char *path, void (*spoil)(hid_t file)) {
    kvq_error        err = {0};
    kvq_capture_info info = sample_info();
    kvq_test_ok(write_capture(ctx, path, &info, &err), &err);
    hid_t file = open_file(path, false);
    spoil(file);
    ck_assert_int_ge(H5Fclose(file), 0);
}

START_TEST(wrong_arrays_are_refused_by_name) {
    kvq_context ctx = kvq_test_context();
    char       *path = sample_path("spoiled.kvqc.h5");
    spoil_file(&ctx, path, SPOILED[_i].spoil);
    expect(&ctx, path, KVQ_ERR_INPUT, SPOILED[_i].message);
}
END_TEST

// A link into another file is not followed: the layer counts as absent.
START_TEST(links_to_other_files_are_not_followed) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_capture *c = NULL;
    char        *path = sample_path("linked.kvqc.h5");
    spoil_file(&ctx, path, external_link);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    ck_assert(kvq_capture_has_layer(kvq_capture_describe(c), 0) && !kvq_capture_has_layer(kvq_capture_describe(c), 2));
    kvq_capture_close(&ctx, &c);
}
END_TEST

static void write_value(hid_t file, const char *path, hid_t type, const hsize_t *at, int rank, const void *value) {
    const hsize_t one[4] = {1, 1, 1, 1};
    hid_t array = H5Dopen2(file, path, H5P_DEFAULT), space = H5Dget_space(array), memory = H5Screate(H5S_SCALAR);
    (void)rank;
    (void)H5Sselect_hyperslab(space, H5S_SELECT_SET, at, NULL, one, NULL);
    ck_assert_int_ge(H5Dwrite(array, type, memory, space, H5P_DEFAULT, value), 0);
    (void)H5Sclose(memory);
    (void)H5Sclose(space);
    (void)H5Dclose(array);
}

START_TEST(bad_numbers_are_found_when_they_are_read) {
    const float      nan = (float)NAN, negative = -1;
    const double     large = 1e39;
    const int32_t    id = 512;
    const hsize_t    at[4] = {1, 3, 1, 4};
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture     *c = NULL;
    float            x[TOKENS * HEADS * DIM];
    int32_t          ids[WINDOWS * TOKENS];
    kvq_capture_info info = sample_info();
    char            *path = sample_path("numbers.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    hid_t file = open_file(path, false);
    write_value(file, "/layers/002/v", H5T_IEEE_F32LE, at, 4, &nan);
    write_value(file, "/layers/002/fisher_k", H5T_IEEE_F32LE, at, 4, &negative);
    write_value(file, "/dataset/token_ids", H5T_STD_I32LE, at, 2, &id);
    static double wide[KV_ELEMENTS];
    set_array(file, K0, H5T_IEEE_F64LE, 4, KV_SHAPE, H5P_DEFAULT, wide);
    write_value(file, K0, H5T_IEEE_F64LE, at, 4, &large);
    ck_assert_int_ge(H5Fclose(file), 0);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    assert_window(c, KVQ_CAPTURE_V, 2, 0, false);
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_V, 2, 1, x, &err), KVQ_ERR_NUMERICAL, &err,
                    "numbers.kvqc.h5: /layers/002/v: window 1, position 3, channel 10 is ");
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_FISHER_K, 2, 1, x, &err), KVQ_ERR_NUMERICAL, &err,
                    "/layers/002/fisher_k: window 1, position 3, channel 10 is -1, although a square");
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_K, 0, 1, x, &err), KVQ_ERR_NUMERICAL, &err,
                    K0 ": window 1, position 3, channel 10 is 1e+39, more than f32 holds");
    kvq_test_failed(kvq_capture_read_ids(c, ids, &err), KVQ_ERR_INPUT, &err,
                    "/dataset/token_ids: window 1, position 3 is 512, outside of 0 .. 511");
    kvq_capture_close(&ctx, &c);
}
END_TEST

START_TEST(what_is_no_capture_is_refused) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_capture *c = NULL;
    char        *path = sample_path("text.kvqc.h5");
    kvq_test_failed(kvq_capture_open(&ctx, path, &c, &err), KVQ_ERR_NOT_FOUND, &err, "text.kvqc.h5");
    kvq_test_failed(kvq_capture_open(&ctx, kvq_test_folder(), &c, &err), KVQ_ERR_INPUT, &err, "a directory");
    kvq_test_ok(kvq_write_file(&ctx, path, false, "", 0, &err), &err);
    kvq_test_failed(kvq_capture_open(&ctx, path, &c, &err), KVQ_ERR_INPUT, &err, "not an HDF5 file");
    kvq_test_ok(kvq_write_file(&ctx, path, true, "\x89HDF\r\n\x1a\n", 8, &err), &err);
    kvq_test_failed(kvq_capture_open(&ctx, path, &c, &err), KVQ_ERR_INPUT, &err, "before 1.10");
    (void)H5Fclose(H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT));
    kvq_test_failed(kvq_capture_open(&ctx, path, &c, &err), KVQ_ERR_INPUT, &err, "before 1.10");
    ck_assert_ptr_null(c);
}
END_TEST

// ---------------------------------------------------------------- damage

// Everything in a file of ours carries a checksum, so a damaged one is refused or reads as the original.
static int read_damaged(const kvq_context *ctx, const char *path, const uint8_t *data, size_t bytes) {
    kvq_capture *c = NULL;
    kvq_error    err = {0};
    float        x[TOKENS * HEADS * DIM];
    int          n_believed = 0;
    FILE        *file = fopen(path, "wb");
    ck_assert(file != NULL && fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0);
    if (kvq_capture_open(ctx, path, &c, &err) != KVQ_OK) {
        ck_assert(c == NULL && err.message[0] != 0);
        return 0;
    }
    for (int64_t i = 0; i < (int64_t)LAYERS * WINDOWS * KVQ_CAPTURE_N_PARTS; i++) {
        int64_t          layer = i % LAYERS, window = i / LAYERS % WINDOWS;
        kvq_capture_part part = (kvq_capture_part)(i / LAYERS / WINDOWS);
        if (!kvq_capture_has_layer(kvq_capture_describe(c), layer)) continue;
        if (kvq_capture_read(c, part, layer, window, x, &err) != KVQ_OK) continue;
        assert_window(c, part, layer, window, false);
        n_believed++;
    }
    kvq_capture_close(ctx, &c);
    return n_believed;
}

static uint8_t *load_sample(const kvq_context *ctx, const char *path, size_t *bytes) {
    kvq_error        err = {0};
    kvq_mapped_file  file = {0};
    kvq_capture_info info = sample_info();
    kvq_test_ok(write_capture(ctx, path, &info, &err), &err);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    uint8_t *data = malloc(file.bytes);
    memcpy(data, file.data, file.bytes);
    *bytes = file.bytes;
    kvq_unmap_file(&file);
    return data;
}

START_TEST(a_flipped_bit_is_never_believed) {
    kvq_context ctx = kvq_test_context();
    size_t      bytes;
    char       *path = sample_path("flipped.kvqc.h5");
    uint8_t    *data = load_sample(&ctx, path, &bytes);
    expect_hdf5_leaks();
    for (size_t at = 0; at < bytes; at += at < 64 ? 1 : 13) {
        data[at] ^= (uint8_t)(1u << (at % 8));
        (void)read_damaged(&ctx, path, data, bytes);
        data[at] ^= (uint8_t)(1u << (at % 8));
    }
    ck_assert_int_eq(read_damaged(&ctx, path, data, bytes), 2 * WINDOWS * KVQ_CAPTURE_N_PARTS);
    free(data);
}
END_TEST

START_TEST(random_damage_is_never_believed) {
    kvq_context ctx = kvq_test_context();
    size_t      bytes;
    char       *path = sample_path("damaged.kvqc.h5");
    uint8_t    *data = load_sample(&ctx, path, &bytes), *damaged = malloc(bytes);
    expect_hdf5_leaks();
    for (uint64_t round = 0; round < 500; round++) {
        memcpy(damaged, data, bytes);
        uint64_t n = 1 + kvq_rng_below(1, KVQ_RNG_TEST, 1, round, 64);
        uint64_t from = kvq_rng_below(1, KVQ_RNG_TEST, 2, round, bytes - n);
        for (uint64_t k = 0; k < n; k++)
            damaged[from + k] = (uint8_t)kvq_rng_below(1, KVQ_RNG_TEST, 3, 64 * round + k, 256);
        (void)read_damaged(&ctx, path, damaged, bytes);
    }
    free(damaged);
    free(data);
}
END_TEST

START_TEST(a_truncated_file_is_refused) {
    kvq_context ctx = kvq_test_context();
    size_t      bytes;
    char       *path = sample_path("short.kvqc.h5");
    uint8_t    *data = load_sample(&ctx, path, &bytes);
    expect_hdf5_leaks();
    for (size_t n = 0; n < bytes; n += n < 64 || n + 64 >= bytes ? 1 : 101)
        ck_assert_int_eq(read_damaged(&ctx, path, data, n), 0);
    free(data);
}
END_TEST

// The application's own setting for HDF5's error messages survives a write and a failing read.
START_TEST(hdf5_printing_is_left_as_it_was) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture     *c = NULL;
    kvq_capture_info info = sample_info();
    H5E_auto2_t      before, after;
    void            *data;
    char            *path = sample_path("a.kvqc.h5");
    ck_assert_int_ge(H5Eget_auto2(H5E_DEFAULT, &before, &data), 0);
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    kvq_capture_close(&ctx, &c);
    spoil_file(&ctx, path, no_v);
    expect(&ctx, path, KVQ_ERR_INPUT, "is missing");
    ck_assert_int_ge(H5Eget_auto2(H5E_DEFAULT, &after, &data), 0);
    ck_assert(before != NULL && after == before);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(a_file_of_another_program_is_read),
    KVQ_LOOP(wrong_attributes_are_refused_by_name, N_FORGERIES),
    KVQ_LOOP(wrong_arrays_are_refused_by_name, N_SPOILED),
    KVQ_CASE(links_to_other_files_are_not_followed),
    KVQ_CASE(bad_numbers_are_found_when_they_are_read),
    KVQ_CASE(what_is_no_capture_is_refused),
    KVQ_CASE(a_flipped_bit_is_never_believed),
    KVQ_CASE(random_damage_is_never_believed),
    KVQ_CASE(a_truncated_file_is_refused),
    KVQ_CASE(hdf5_printing_is_left_as_it_was),
};
KVQ_TEST_MAIN("capture_refused", CASES)
