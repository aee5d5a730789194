// SPDX-License-Identifier: Apache-2.0
//
// Measurement files: every number comes back, equal content gives equal bytes, and no damaged, incomplete or senseless
// file is believed. With --write-sample and --write-allocated FILE it serves check_measurement_h5py.py.
#include <dirent.h>
#include <hdf5.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "limited_memory.h"
#include "sample_measurement.h"

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

static void assert_equal_parts(const kvq_measured_layer *a, const kvq_measured_layer *b) {
    kvq_measured_part p, q;
    int               i = 0;
    for (; kvq_measured_layer_parts(a, i, &p) != 0; i++) {
        ck_assert_int_ne(kvq_measured_layer_parts(b, i, &q), 0);
        ck_assert_str_eq(p.name, q.name);
        array_spec spec = measurement_part_spec(&p);
        ck_assert_mem_eq(p.data, q.data, (size_t)array_elements(&spec) * kvq_array_type_bytes(spec.type));
    }
    ck_assert_int_eq(kvq_measured_layer_parts(b, i, &q), 0);
    ck_assert_int_gt(i, 10);
}

static void assert_equal_options(const kvq_measure_options *a, const kvq_measure_options *b) {
    ck_assert_int_eq(a->n_fractions, b->n_fractions);
    ck_assert_mem_eq(a->fractions, b->fractions, (size_t)a->n_fractions * sizeof *a->fractions);
    ck_assert_uint_eq(a->weightings, b->weightings);
    ck_assert_int_eq(a->sink_tokens, b->sink_tokens);
    ck_assert_int_eq(a->count_sinks, b->count_sinks);
    ck_assert_int_eq(a->k_axis, b->k_axis);
    ck_assert_int_eq(a->k_domain, b->k_domain);
    ck_assert_int_eq(a->threshold_scope, b->threshold_scope);
    ck_assert_int_eq(a->k_slots, b->k_slots);
    ck_assert_int_eq(a->token_range, b->token_range);
    ck_assert_int_eq(a->moments, b->moments);
    ck_assert_int_eq(a->allocated, b->allocated);
    ck_assert_int_eq(a->channel_weighting, b->channel_weighting);
    ck_assert_int_eq(a->tile_side, b->tile_side);
    ck_assert_int_eq(a->rotation, b->rotation);
    ck_assert_int_eq(a->scale_format, b->scale_format);
}

// The quantizer is the fit's and not in the file.
static void assert_equal_about(const kvq_artifact *a, const kvq_artifact *b) {
    ASSERT_SAME_TEXT(model.architecture);
    ASSERT_SAME_TEXT(model.name);
    ASSERT_SAME_TEXT(model.config_sha256);
    ASSERT_SAME_INT(model.n_layers);
    ASSERT_SAME_INT(model.n_heads);
    ASSERT_SAME_DOUBLE(model.rope_theta);
    ASSERT_SAME_TEXT(tokenizer.sha256);
    ASSERT_SAME_INT(tokenizer.bos_added);
    ASSERT_SAME_TEXT(dataset.source);
    ck_assert_uint_eq(a->dataset.seed, b->dataset.seed);
    ASSERT_SAME_TEXT(provenance.options_json);
    ASSERT_SAME_DOUBLE(baseline_nll);
    ck_assert_str_eq(b->quantizer.scheme, "");
}

static void assert_comes_back(kvq_measure_options options) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measurement    *m = NULL;
    char                sha256[KVQ_SHA256_HEX], *path = sample_path("a.kvqm.h5");
    double              read[4 * SAMPLE_HEAD_DIM], values[4 * SAMPLE_HEAD_DIM];
    double              vectors[4 * SAMPLE_HEAD_DIM * SAMPLE_HEAD_DIM];
    kvq_artifact       *about = sample_artifact(&ctx, SAMPLE_LAYERS);
    kvq_measured_layer *l = NULL;
    kvq_test_ok(write_measurement(&ctx, &ctx, path, options, NULL, sha256, &err), &err);
    ck_assert_int_eq(count_files(), 1);
    kvq_test_ok(kvq_measurement_open(&ctx, path, &m, &err), &err);
    ck_assert_str_eq(kvq_measurement_sha256(m), sha256);
    assert_equal_options(&options, kvq_measurement_options(m));
    assert_equal_about(about, kvq_measurement_about(m));
    for (int64_t layer = SAMPLE_LAYERS - 1; layer >= 0; layer--) {
        kvq_measured_layer *made = sample_layer(&ctx, &options, layer);
        kvq_test_ok(kvq_measurement_read(&ctx, m, layer, &l, &err), &err);
        assert_equal_parts(made, l);
        kvq_measured_layer_destroy(&ctx, &l);
        const double *moments[] = {made->moments.q, made->moments.k, made->moments.v};
        for (int i = 0; i < 3 && options.moments; i++) {
            int n_heads = i == 0 ? 4 : SAMPLE_HEADS;
            kvq_test_ok(kvq_measurement_spectrum(&ctx, m, layer, "qkv"[i], read, &err), &err);
            // with vectors as the writer: LAPACK takes another way without them
            kvq_test_ok(kvq_spectrum(&ctx, moments[i], n_heads, SAMPLE_HEAD_DIM, values, vectors, &err), &err);
            ck_assert_mem_eq(read, values, (size_t)(n_heads * SAMPLE_HEAD_DIM) * sizeof *read);
        }
        kvq_measured_layer_destroy(&ctx, &made);
    }
    kvq_test_failed(kvq_measurement_read(&ctx, m, SAMPLE_LAYERS, &l, &err), KVQ_ERR_INPUT, &err, "there is no layer 2");
    kvq_test_failed(kvq_measurement_read(&ctx, m, -1, &l, &err), KVQ_ERR_INPUT, &err, "there is no layer -1");
    kvq_test_failed(kvq_measurement_spectrum(&ctx, m, 0, 'x', read, &err), KVQ_ERR_INPUT, &err, "no spectrum of 'x'");
    if (!options.moments)
        kvq_test_failed(kvq_measurement_spectrum(&ctx, m, 0, 'k', read, &err), KVQ_ERR_INPUT, &err, "no spectrum");
    kvq_measurement_close(&ctx, &m);
    kvq_artifact_destroy(&ctx, &about);
    ck_assert_int_eq(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
}

START_TEST(everything_comes_back) { assert_comes_back(sample_options()); }
END_TEST

START_TEST(channels_and_rotated_values_come_back) { assert_comes_back(allocated_options()); }
END_TEST

START_TEST(the_least_that_can_be_measured_comes_back) {
    assert_comes_back((kvq_measure_options){
        .n_fractions = 1, .fractions = {0.5}, .weightings = KVQ_WEIGHTINGS_BASIC, .k_axis = KVQ_AXIS_TOKEN});
}
END_TEST

// HDF5 stores times of the second unless told not to, hence the wait.
START_TEST(equal_content_gives_equal_bytes) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_mapped_file files[2] = {{0}};
    char            sha256[2][KVQ_SHA256_HEX];
    for (int i = 0; i < 2; i++) {
        char *path = sample_path(i == 0 ? "first.kvqm.h5" : "second.kvqm.h5");
        kvq_test_ok(write_measurement(&ctx, &ctx, path, sample_options(), NULL, sha256[i], &err), &err);
        kvq_test_ok(kvq_map_file(path, &files[i], &err), &err);
        (void)sleep(i == 0 ? 1 : 0);
    }
    ck_assert_uint_eq(files[0].bytes, files[1].bytes);
    ck_assert_mem_eq(files[0].data, files[1].data, files[0].bytes);
    ck_assert_str_eq(sha256[0], sha256[1]);
    kvq_unmap_file(&files[0]);
    kvq_unmap_file(&files[1]);
}
END_TEST

START_TEST(the_kind_of_every_file_is_told) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    char             sha256[KVQ_SHA256_HEX], format[KVQ_FORMAT_NAME] = "untouched", *path = sample_path("a.kvqm.h5");
    kvq_artifact    *a = sample_artifact(&ctx, 1), *b = NULL;
    kvq_measurement *m = NULL;
    kvq_test_ok(write_measurement(&ctx, &ctx, path, sample_options(), NULL, sha256, &err), &err);
    kvq_test_failed(kvq_artifact_read(&ctx, path, &b, sha256, &err), KVQ_ERR_INPUT, &err,
                    "a.kvqm.h5: an HDF5 file, but its attribute kvq_format is 'kvq.measurement'");
    ck_assert_ptr_nonnull(strstr(err.next, "kvq-inspect"));
    kvq_test_ok(kvq_file_format(&ctx, path, format, &err), &err);
    ck_assert_str_eq(format, "kvq.measurement");
    path = sample_path("a.kvq.h5");
    kvq_test_ok(kvq_artifact_write(&ctx, a, path, false, sha256, &err), &err);
    kvq_test_ok(kvq_file_format(&ctx, path, format, &err), &err);
    ck_assert_str_eq(format, "kvq.artifact");
    kvq_test_failed(kvq_measurement_open(&ctx, path, &m, &err), KVQ_ERR_INPUT, &err,
                    "a.kvq.h5: an HDF5 file, but its attribute kvq_format is 'kvq.artifact'");
    ck_assert_ptr_nonnull(strstr(err.next, "kvq-validate"));
    ck_assert_int_eq(truncate(path, 5000), 0);
    kvq_test_failed(kvq_file_format(&ctx, path, format, &err), KVQ_ERR_INTEGRITY, &err, "its last line is not");
    kvq_test_ok(kvq_write_file(&ctx, path, true, "text", 4, &err), &err);
    kvq_test_failed(kvq_file_format(&ctx, path, format, &err), KVQ_ERR_INPUT, &err, "not an HDF5 file");
    kvq_test_failed(kvq_file_format(&ctx, sample_path("none"), format, &err), KVQ_ERR_NOT_FOUND, &err, "none");
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(a_capture_is_told_although_it_has_no_seal) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_capture_writer *w = NULL;
    kvq_capture_info    info = {.type = KVQ_ARRAY_F32};
    const float         x[2] = {1, 2};
    char                format[KVQ_FORMAT_NAME], *path = sample_path("a.kvqc.h5");
    info.model.n_layers = info.model.n_kv_heads = info.dataset.n_windows = info.dataset.seq_len = 1;
    info.model.head_dim = 2;
    kvq_capture_add_layer(&info, 0);
    kvq_test_ok(kvq_capture_create(&ctx, path, false, &info, NULL, &w, &err), &err);
    for (kvq_capture_part part = KVQ_CAPTURE_K; part <= KVQ_CAPTURE_V; part++)
        kvq_test_ok(kvq_capture_put(w, part, 0, 0, x, &err), &err);
    kvq_test_ok(kvq_capture_commit(&ctx, &w, 0, &err), &err);
    kvq_test_ok(kvq_file_format(&ctx, path, format, &err), &err);
    ck_assert_str_eq(format, "kvq.capture");
}
END_TEST

// ---------------------------------------------------------------- what is not written

static bool miss_layer_1(kvq_measured_layer *m, int64_t layer) { return (void)m, layer != 1; }
static bool set_nan(kvq_measured_layer *m, int64_t layer) { return m->k[1].heads[1].sums->energy = NAN, layer >= 0; }
static bool set_weight(kvq_measured_layer *m, int64_t layer) {
    return m->v[0].heads[1].by[KVQ_WEIGHT_FISHER].w[7] = -1e-9f, layer >= 0;
}
static bool set_mean(kvq_measured_layer *m, int64_t layer) {
    kvq_weighted_bins *bins = &m->v[1].heads[0].by[KVQ_WEIGHT_RANGE];
    bins->w[4000] = 1;
    bins->x[4000] = nextafterf(bins->x[4000] + 2.0f / KVQ_HISTOGRAM_BINS, 1);
    return layer >= 0;
}
static bool set_threshold(kvq_measured_layer *m, int64_t layer) {
    return m->k[0].lower[3] = m->k[0].upper[3] + 1, layer >= 0;
}
static bool set_count(kvq_measured_layer *m, int64_t layer) {
    return m->k[0].heads[1].counts->n_clipped = -1, layer >= 0;
}
// Of allocated options.
static bool set_channel_weight(kvq_measured_layer *m, int64_t layer) {
    return m->k[1].channels.w[KVQ_CHANNEL_BINS + 3] = -0.5f, layer >= 0;
}
static bool set_channel_mean(kvq_measured_layer *m, int64_t layer) {
    float *x = m->k[0].channels.x + 2 * KVQ_CHANNEL_BINS;
    return x[9] = -1.5f, layer >= 0;
}
static bool set_channel_scatter(kvq_measured_layer *m, int64_t layer) {
    return m->k[0].channels.scatter[4] = -1, layer >= 0;
}
static bool set_channel_count(kvq_measured_layer *m, int64_t layer) {
    return m->k[0].channels.n_outliers[11] = -1, layer >= 0;
}
static bool set_value_weight(kvq_measured_layer *m, int64_t layer) { return m->rotated.w[5] = -1, layer >= 0; }
static bool set_value_mean(kvq_measured_layer *m, int64_t layer) { return m->rotated.x[3] = 0, layer >= 0; }
static bool set_pair_weight(kvq_measured_layer *m, int64_t layer) { return m->rotated.pair_w[300] = -1, layer >= 0; }
static bool set_pair_x(kvq_measured_layer *m, int64_t layer) { return m->rotated.pair_x[7 * 256] = 1, layer >= 0; }
static bool set_pair_y(kvq_measured_layer *m, int64_t layer) { return m->rotated.pair_y[7] = 1, layer >= 0; }
static bool set_scatter(kvq_measured_layer *m, int64_t layer) { return m->rotated.scatter[1] = -1, layer >= 0; }
static bool set_points(kvq_measured_layer *m, int64_t layer) { return *m->rotated.n_points = -1, layer >= 0; }
static bool set_exponent(kvq_measured_layer *m, int64_t layer) { return *m->rotated.scale_exponent = -201, layer >= 0; }
static bool set_kl(kvq_measured_layer *m, int64_t layer) { return m->kl[0] = -1e-9, layer >= 0; }
static bool set_infinite_kl(kvq_measured_layer *m, int64_t layer) { return m->kl[1] = INFINITY, layer >= 0; }

static bool set_moment(kvq_measured_layer *m, int64_t layer) { return m->moments.q[11] = INFINITY, layer >= 0; }

static const struct spoiled {
    spoil_fn    spoil;
    kvq_status  status;
    const char *message;
} SPOILED[] = {
    {miss_layer_1, KVQ_ERR_INTERNAL, "a.kvqm.h5: layer 1 was never put"},
    {set_nan, KVQ_ERR_NUMERICAL, "a.kvqm.h5: /layers/000/k/1/sums: element 12 is nan"},
    {set_weight, KVQ_ERR_NUMERICAL,
     "/layers/000/v/0/weight_fisher: element 8199 is -9.99999972e-10, a negative weight"},
    {set_mean, KVQ_ERR_NUMERICAL, "/layers/000/v/1/mean_range: element 4000 is "},
    {set_threshold, KVQ_ERR_NUMERICAL, "/layers/000/k/0/threshold_lower: element 3 is "},
    {set_count, KVQ_ERR_NUMERICAL, "/layers/000/k/0/counts: element 7 is -1, a negative count"},
    {set_moment, KVQ_ERR_NUMERICAL, "/layers/000/moments/q: element 11 is inf"},
};

static const struct spoiled SPOILED_ALLOCATED[] = {
    {set_channel_weight, KVQ_ERR_NUMERICAL, "/layers/000/k/1/channel_weight: element 1027 is -0.5, a negative weight"},
    {set_channel_mean, KVQ_ERR_NUMERICAL, "element 2057 is -1.5, a mean outside of its bin"},
    {set_channel_scatter, KVQ_ERR_NUMERICAL, "element 4 is -1, a negative sum"},
    {set_channel_count, KVQ_ERR_NUMERICAL, "element 11 is -1, a negative count"},
    {set_value_weight, KVQ_ERR_NUMERICAL, "element 5 is -1, a negative weight"},
    {set_value_mean, KVQ_ERR_NUMERICAL, "element 3 is 0, a mean outside of its bin"},
    {set_pair_weight, KVQ_ERR_NUMERICAL, "element 300 is -1, a negative weight"},
    {set_pair_x, KVQ_ERR_NUMERICAL, "element 1792 is 1, a mean outside of its cell"},
    {set_pair_y, KVQ_ERR_NUMERICAL, "element 7 is 1, a mean outside of its cell"},
    {set_scatter, KVQ_ERR_NUMERICAL, "element 1 is -1, a negative sum"},
    {set_points, KVQ_ERR_NUMERICAL, "element 0 is -1, a negative count"},
    {set_exponent, KVQ_ERR_NUMERICAL, "element 0 is -201, beyond what a scale may have"},
    {set_kl, KVQ_ERR_NUMERICAL, "kl: element 0 is -1e-09, a negative divergence"},
    {set_infinite_kl, KVQ_ERR_NUMERICAL, "kl: element 1 is inf"},
};

START_TEST(what_could_not_be_read_of_channels_is_not_written) {
    const struct spoiled *s = &SPOILED_ALLOCATED[_i];
    kvq_context           ctx = kvq_test_context();
    kvq_error             err = {0};
    char                  sha256[KVQ_SHA256_HEX], *path = sample_path("a.kvqm.h5");
    kvq_test_failed(write_measurement(&ctx, &ctx, path, allocated_options(), s->spoil, sha256, &err), s->status, &err,
                    s->message);
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

START_TEST(what_could_not_be_read_is_not_written) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    char        sha256[KVQ_SHA256_HEX] = "untouched", *path = sample_path("a.kvqm.h5");
    kvq_test_failed(write_measurement(&ctx, &ctx, path, sample_options(), SPOILED[_i].spoil, sha256, &err),
                    SPOILED[_i].status, &err, SPOILED[_i].message);
    ck_assert_str_eq(sha256, "untouched");
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

START_TEST(options_without_sense_are_refused) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    char                sha256[KVQ_SHA256_HEX], *path = sample_path("a.kvqm.h5");
    kvq_measure_options o[9] = {sample_options(),    sample_options(),    sample_options(),
                                sample_options(),    sample_options(),    sample_options(),
                                allocated_options(), allocated_options(), allocated_options()};
    const char         *messages[9] = {"0 fractions",
                                       "element 1 is 0;",
                                       "element 1 is 1;",
                                       "has none and range",
                                       "k_slots is -2",
                                       "/measurement@k_axis is 2",
                                       "/measurement@allocated is 1, which needs the k_axis 'channel' instead of 'token'",
                                       "/measurement@rotation is 2",
                                       "/measurement@channel_weighting is 4"};
    o[0].n_fractions = 0;
    o[1].fractions[1] = 0;
    o[2].fractions[1] = 1;
    o[3].weightings = 1;
    o[4].k_slots = -2;
    o[5].k_axis = (kvq_axis)2;
    o[6].k_axis = KVQ_AXIS_TOKEN;
    o[7].rotation = (kvq_rotation_kind)2;
    o[8].channel_weighting = KVQ_N_WEIGHTINGS;
    for (int i = 0; i < 9; i++) {
        kvq_test_failed(write_measurement(&ctx, &ctx, path, o[i], NULL, sha256, &err), KVQ_ERR_INPUT, &err,
                        messages[i]);
        ck_assert_int_eq(count_files(), 0);
    }
}
END_TEST

START_TEST(a_layer_is_put_once_and_as_announced) {
    kvq_context             ctx = kvq_test_context();
    kvq_error               err = {0};
    kvq_measure_options     options = sample_options(), other = sample_options();
    kvq_measurement_writer *w = NULL;
    kvq_artifact           *about = sample_artifact(&ctx, SAMPLE_LAYERS);
    other.weightings = KVQ_WEIGHTINGS_BASIC;
    kvq_measured_layer *m = sample_layer(&ctx, &options, 0), *wrong = sample_layer(&ctx, &other, 0);
    kvq_test_ok(kvq_measurement_create(&ctx, sample_path("a.kvqm.h5"), false, about, &options, false, &w, &err), &err);
    kvq_test_failed(kvq_measurement_put(&ctx, w, 0, wrong, &err), KVQ_ERR_INTERNAL, &err, "layer 0 is put twice, or");
    kvq_test_ok(kvq_measurement_put(&ctx, w, 0, m, &err), &err);
    kvq_test_failed(kvq_measurement_put(&ctx, w, 0, m, &err), KVQ_ERR_INTERNAL, &err, "layer 0 is put twice");
    kvq_test_failed(kvq_measurement_put(&ctx, w, SAMPLE_LAYERS, m, &err), KVQ_ERR_INTERNAL, &err, "layer 2");
    kvq_measurement_discard(&ctx, &w);
    ck_assert_int_eq(count_files(), 0);
    kvq_measured_layer_destroy(&ctx, &m);
    kvq_measured_layer_destroy(&ctx, &wrong);
    kvq_artifact_destroy(&ctx, &about);
}
END_TEST

// ---------------------------------------------------------------- damage

// The seal covers every byte, so HDF5 never sees a damaged one: no leak has to be expected here.
START_TEST(damage_is_found_before_anything_is_parsed) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_measurement *m = NULL;
    kvq_mapped_file  file = {0};
    char             sha256[KVQ_SHA256_HEX], *path = sample_path("a.kvqm.h5");
    kvq_test_ok(write_measurement(&ctx, &ctx, path, sample_options(), NULL, sha256, &err), &err);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    uint8_t *data = malloc(file.bytes);
    size_t   bytes = file.bytes;
    memcpy(data, file.data, bytes);
    kvq_unmap_file(&file);
    for (size_t at = 8; at < bytes; at += bytes / 61) {
        data[at] ^= (uint8_t)(1u << (at % 8));
        kvq_test_ok(kvq_write_file(&ctx, path, true, data, bytes, &err), &err);
        kvq_test_failed(kvq_measurement_open(&ctx, path, &m, &err), KVQ_ERR_INTEGRITY, &err, "a.kvqm.h5: its ");
        data[at] ^= (uint8_t)(1u << (at % 8));
    }
    for (size_t n = bytes - 1; n > 0; n -= n > bytes - 80 ? 1 : n / 7 + 1) {
        ck_assert_int_eq(truncate(path, (off_t)n), 0);
        ck_assert_int_ne(kvq_measurement_open(&ctx, path, &m, &err), KVQ_OK);
    }
    ck_assert_ptr_null(m);
    kvq_test_ok(kvq_write_file(&ctx, path, true, data, bytes, &err), &err);
    kvq_test_ok(kvq_measurement_open(&ctx, path, &m, &err), &err);
    kvq_measurement_close(&ctx, &m);
    free(data);
}
END_TEST

// ---------------------------------------------------------------- sealed files with wrong content

static void remove_object(hid_t file, const char *path) { (void)H5Ldelete(file, path, H5P_DEFAULT); }

static void set_text(hid_t file, const char *group, const char *name, const char *text) {
    hid_t object = H5Oopen(file, group, H5P_DEFAULT), type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    (void)H5Adelete(object, name);
    (void)H5Tset_size(type, strlen(text));
    (void)H5Tset_strpad(type, H5T_STR_NULLPAD);
    hid_t attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    (void)H5Awrite(attribute, type, text);
    (void)H5Aclose(attribute);
    (void)H5Sclose(space);
    (void)H5Tclose(type);
    (void)H5Oclose(object);
}

static void set_integer(hid_t file, const char *group, const char *name, int64_t value) {
    hid_t object = H5Oopen(file, group, H5P_DEFAULT), attribute = H5Aopen(object, name, H5P_DEFAULT);
    (void)H5Awrite(attribute, H5T_NATIVE_INT64, &value);
    (void)H5Aclose(attribute);
    (void)H5Oclose(object);
}

static void replace_array(hid_t file, const char *path, hid_t type, int rank, const hsize_t *shape) {
    static const double zeros[1 << 15];
    remove_object(file, path);
    hid_t space = H5Screate_simple(rank, shape, NULL);
    hid_t dataset = H5Dcreate2(file, path, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    (void)H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros);
    (void)H5Dclose(dataset);
    (void)H5Sclose(space);
}

static void set_number(hid_t file, const char *path, hsize_t at, double value) {
    hid_t   dataset = H5Dopen2(file, path, H5P_DEFAULT), space = H5Dget_space(dataset), type = H5Dget_type(dataset);
    hsize_t one = 1, shape[3] = {0}, start[3] = {0}, count[3] = {1, 1, 1};
    int     rank = H5Sget_simple_extent_dims(space, shape, NULL);
    float   narrow = (float)value;
    for (int i = rank - 1; i >= 0; at /= shape[i], i--) start[i] = at % shape[i];
    hid_t memory = H5Screate_simple(1, &one, NULL);
    (void)H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL);
    const void *from = H5Tget_size(type) == sizeof narrow ? (const void *)&narrow : &value;
    ck_assert_int_ge(H5Dwrite(dataset, type, memory, space, H5P_DEFAULT, from), 0);
    (void)H5Sclose(memory);
    (void)H5Tclose(type);
    (void)H5Sclose(space);
    (void)H5Dclose(dataset);
}

static void other_format(hid_t f) { set_text(f, "/", "kvq_format", "kvq.partial"); }
static void other_version(hid_t f) { set_text(f, "/", "kvq_format_version", "2.0"); }
static void newer_reader(hid_t f) { set_text(f, "/", "kvq_min_reader", "1.2"); }
static void newer_version(hid_t f) { set_text(f, "/", "kvq_format_version", "1.3"); }
static void no_layers(hid_t f) { set_integer(f, "/model", "n_layers", 0); }
static void more_layers(hid_t f) { set_integer(f, "/model", "n_layers", 3); }
static void more_heads(hid_t f) { set_integer(f, "/model", "n_heads", 5); }
static void no_query_heads(hid_t f) { set_integer(f, "/model", "n_heads", 0); }
static void huge_heads(hid_t f) { set_integer(f, "/model", "head_dim", 60000); }
static void other_bins(hid_t f) { set_integer(f, "/measurement", "bins", 4096); }
static void negative_slots(hid_t f) { set_integer(f, "/measurement", "k_slots", -2); }
static void other_axis(hid_t f) { set_text(f, "/measurement", "k_axis", "head"); }
static void other_weightings(hid_t f) { set_text(f, "/measurement", "weightings", "range,none"); }
static void no_source(hid_t f) {
    hid_t group = H5Oopen(f, "/dataset", H5P_DEFAULT);
    (void)H5Adelete(group, "source");
    (void)H5Oclose(group);
}
static void no_part(hid_t f) { remove_object(f, "/layers/001/v/1/weight_range"); }
static void no_layer(hid_t f) { remove_object(f, "/layers/001"); }
static void no_spectrum(hid_t f) { remove_object(f, "/layers/001/spectrum/v"); }
static void no_vectors(hid_t f) { remove_object(f, "/layers/001/spectrum/v_vectors"); }
static void descending(hid_t f) { set_number(f, FRACTIONS_PATH, 1, -0.5); }
static void no_fractions(hid_t f) { replace_array(f, FRACTIONS_PATH, H5T_IEEE_F64LE, 1, (hsize_t[]){9}); }
static void wrong_shape(hid_t f) {
    replace_array(f, "/layers/001/k/0/weight_none", H5T_IEEE_F32LE, 2, (hsize_t[]){SAMPLE_HEADS, 99});
}
static void wrong_type(hid_t f) {
    replace_array(f, "/layers/000/k/0/threshold_lower", H5T_IEEE_F64LE, 1, (hsize_t[]){SAMPLE_D});
}
static void no_pairs(hid_t f) { remove_object(f, "/layers/001/rotated/pair_x"); }
static void flat_pairs(hid_t f) {
    replace_array(f, "/layers/001/rotated/pair_weight", H5T_IEEE_F32LE, 2, (hsize_t[]){128, 128});
}
static void other_cells(hid_t f) { set_integer(f, "/measurement", "pair_cells", 128); }
static void other_reach(hid_t f) { set_integer(f, "/measurement", "value_reach", 6); }
static void other_rotation(hid_t f) { set_text(f, "/measurement", "rotation", "haar"); }
static void other_scale(hid_t f) { set_text(f, "/measurement", "scale_format", "e5m2"); }
static void doubly_allocated(hid_t f) { set_integer(f, "/measurement", "allocated", 2); }
static void wide_channels(hid_t f) { set_integer(f, "/model", "head_dim", 512); }
static void wider_channels(hid_t f) { set_integer(f, "/model", "head_dim", 513); }
static void old_version(hid_t f) { set_text(f, "/", "kvq_format_version", "1.0"); } // then the additions are ignored
static void linked(hid_t f) {
    remove_object(f, "/layers/000/k/0/sums");
    (void)H5Lcreate_soft("/layers/001/k/0/sums", f, "/layers/000/k/0/sums", H5P_DEFAULT, H5P_DEFAULT);
}

static const struct forgery {
    void (*forge)(hid_t file);
    kvq_status  status;
    const char *message;
} FORGERIES[] = {
    {other_format, KVQ_ERR_INPUT, "a.kvqm.h5: an HDF5 file, but its attribute kvq_format is 'kvq.partial'"},
    {other_version, KVQ_ERR_VERSION, "a.kvqm.h5: measurement format 2.0"},
    {newer_reader, KVQ_ERR_VERSION, "needs a reader of format 1.2"},
    {newer_version, KVQ_OK, ""},
    {no_layers, KVQ_ERR_INPUT, "a.kvqm.h5: /model@n_layers is 0"},
    {more_layers, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/002/k/0/threshold_lower is missing"},
    {more_heads, KVQ_ERR_INPUT, "/layers/000/moments/q is f64 of the shape [4, 6, 6] instead of f64 of [5, 6, 6]"},
    {no_query_heads, KVQ_ERR_INPUT, "a.kvqm.h5: /model@n_heads is 0"},
    {huge_heads, KVQ_ERR_UNSUPPORTED, "a.kvqm.h5: /model: 2 KV heads of 60000 channels"},
    {other_bins, KVQ_ERR_UNSUPPORTED, "a.kvqm.h5: /measurement@bins is 4096"},
    {negative_slots, KVQ_ERR_INPUT, "a.kvqm.h5: /measurement@k_slots is -2"},
    {other_axis, KVQ_ERR_UNSUPPORTED, "a.kvqm.h5: /measurement@k_axis is 'head', none of 'channel', 'token'"},
    {other_weightings, KVQ_ERR_UNSUPPORTED, "/measurement@weightings is 'range,none'"},
    {no_source, KVQ_ERR_INPUT, "a.kvqm.h5: /dataset@source is missing"},
    {no_part, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/001/v/1/weight_range is missing"},
    {no_layer, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/001/k/0/threshold_lower is missing"},
    {no_spectrum, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/001/spectrum/v is missing"},
    {no_vectors, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/001/spectrum/v_vectors is missing"},
    {descending, KVQ_ERR_INPUT, "a.kvqm.h5: /measurement/fractions: element 1 is -0.5"},
    {no_fractions, KVQ_ERR_INPUT, "a.kvqm.h5: /measurement/fractions is not a list of 1 to 8"},
    {wrong_shape, KVQ_ERR_INPUT, "/layers/001/k/0/weight_none is f32 of the shape [2, 99] instead of f32 of [2, 8192]"},
    {wrong_type, KVQ_ERR_INPUT, "/layers/000/k/0/threshold_lower is f64 of the shape"},
    {linked, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/000/k/0/sums is missing"},
};

static const struct forgery ALLOCATED_FORGERIES[] = {
    {no_pairs, KVQ_ERR_INPUT, "a.kvqm.h5: /layers/001/rotated/pair_x is missing"},
    {flat_pairs, KVQ_ERR_INPUT,
     "/layers/001/rotated/pair_weight is f32 of the shape [128, 128] instead of f32 of [256, 256]"},
    {other_cells, KVQ_ERR_UNSUPPORTED, "a.kvqm.h5: /measurement@pair_cells is 128"},
    {other_reach, KVQ_ERR_UNSUPPORTED, "a.kvqm.h5: /measurement@value_reach is 6"},
    {other_rotation, KVQ_ERR_UNSUPPORTED, "/measurement@rotation is 'haar', none of 'orthogonal', 'none'"},
    {other_scale, KVQ_ERR_UNSUPPORTED, "/measurement@scale_format is 'e5m2', none of 'e4m3', 'f16'"},
    {doubly_allocated, KVQ_ERR_INPUT, "a.kvqm.h5: /measurement@allocated is 2"},
    {wide_channels, KVQ_ERR_INPUT, "/layers/000/k/0/threshold_lower is f32 of the shape [12] instead of f32 of [1024]"},
    {wider_channels, KVQ_ERR_UNSUPPORTED, "a.kvqm.h5: /model@head_dim is 513, outside of 2 .. 512"},
    {old_version, KVQ_OK, ""},
};

static void seal(const char *path) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_mapped_file file = {0};
    char            line[SEAL_BYTES + 1];
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    uint8_t *data = malloc(file.bytes + SEAL_BYTES);
    size_t   bytes = file.bytes;
    memcpy(data, file.data, bytes);
    kvq_unmap_file(&file);
    kvq_test_ok(seal_make(data, bytes, line, &err), &err);
    memcpy(data + bytes, line, SEAL_BYTES);
    kvq_test_ok(kvq_write_file(&ctx, path, true, data, bytes + SEAL_BYTES, &err), &err);
    free(data);
}

static void forge_file(const char *path, kvq_measure_options options, void (*forge)(hid_t file)) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    char        sha256[KVQ_SHA256_HEX];
    kvq_test_ok(write_measurement(&ctx, &ctx, path, options, NULL, sha256, &err), &err);
    hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    ck_assert_int_ge(file, 0);
    forge(file);
    ck_assert_int_ge(H5Fclose(file), 0);
    seal(path);
}

static void assert_refused(const struct forgery *f, kvq_measure_options options) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_measurement *m = NULL;
    char            *path = sample_path("a.kvqm.h5");
    forge_file(path, options, f->forge);
    kvq_status status = kvq_measurement_open(&ctx, path, &m, &err);
    if (f->status == KVQ_OK)
        kvq_test_ok(status, &err);
    else
        kvq_test_failed(status, f->status, &err, f->message);
    if (status == KVQ_OK && f->forge == old_version) ck_assert(!kvq_measurement_options(m)->allocated);
    kvq_measurement_close(&ctx, &m);
    ck_assert_int_eq(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
}

START_TEST(a_sealed_file_with_wrong_content_is_refused_by_name) { assert_refused(&FORGERIES[_i], sample_options()); }
END_TEST

START_TEST(a_sealed_file_with_wrong_channels_is_refused_by_name) {
    assert_refused(&ALLOCATED_FORGERIES[_i], allocated_options());
}
END_TEST

static void forged_weight(hid_t f) { set_number(f, "/layers/001/v/1/weight_fisher-scaled", 8192 + 3, -1); }
static void forged_mean(hid_t f) { set_number(f, "/layers/001/v/1/mean_none", 4000, 0.5); }
static void forged_nan(hid_t f) { set_number(f, "/layers/001/moments/v", 37, NAN); }
static void forged_order(hid_t f) { set_number(f, "/layers/001/k/1/threshold_upper", 11, -9); }
static void forged_value(hid_t f) { set_number(f, "/layers/001/spectrum/k", 7, 1e9); }

static const struct forgery FORGED_NUMBERS[] = {
    {forged_weight, KVQ_ERR_NUMERICAL,
     "a.kvqm.h5: /layers/001/v/1/weight_fisher-scaled: element 8195 is -1, a negative weight"},
    {forged_mean, KVQ_ERR_NUMERICAL, "a.kvqm.h5: /layers/001/v/1/mean_none: element 4000 is 0.5, a mean outside"},
    {forged_nan, KVQ_ERR_NUMERICAL, "a.kvqm.h5: /layers/001/moments/v: element 37 is nan"},
    {forged_order, KVQ_ERR_NUMERICAL, "a.kvqm.h5: /layers/001/k/1/threshold_lower: element 11 is "},
    {forged_value, KVQ_ERR_NUMERICAL, "a.kvqm.h5: /layers/001/spectrum/k: element 7 is 1e+09"},
};

START_TEST(a_sealed_file_with_wrong_numbers_is_refused_when_they_are_read) {
    const struct forgery *f = &FORGED_NUMBERS[_i];
    kvq_context           ctx = kvq_test_context();
    kvq_error             err = {0};
    kvq_measurement      *m = NULL;
    kvq_measured_layer   *l = NULL;
    double                values[SAMPLE_D];
    char                 *path = sample_path("a.kvqm.h5");
    forge_file(path, sample_options(), f->forge);
    kvq_test_ok(kvq_measurement_open(&ctx, path, &m, &err), &err);
    kvq_test_ok(kvq_measurement_read(&ctx, m, 0, &l, &err), &err);
    kvq_measured_layer_destroy(&ctx, &l);
    kvq_status status = f->forge == forged_value ? kvq_measurement_spectrum(&ctx, m, 1, 'k', values, &err)
                                                 : kvq_measurement_read(&ctx, m, 1, &l, &err);
    kvq_test_failed(status, f->status, &err, f->message);
    ck_assert_ptr_null(l);
    kvq_measurement_close(&ctx, &m);
}
END_TEST

// ---------------------------------------------------------------- failing machines

START_TEST(an_existing_file_needs_force) {
    kvq_context             ctx = kvq_test_context();
    kvq_error               err = {0};
    kvq_measure_options     options = sample_options();
    kvq_measurement_writer *w = NULL;
    kvq_artifact           *about = sample_artifact(&ctx, SAMPLE_LAYERS);
    char                    sha256[KVQ_SHA256_HEX], *path = sample_path("a.kvqm.h5");
    kvq_test_ok(write_measurement(&ctx, &ctx, path, options, NULL, sha256, &err), &err);
    kvq_test_failed(kvq_measurement_create(&ctx, path, false, about, &options, false, &w, &err), KVQ_ERR_EXISTS, &err,
                    "a.kvqm.h5");
    ck_assert_int_eq(count_files(), 1);
    kvq_artifact_destroy(&ctx, &about);
}
END_TEST

START_TEST(a_full_disk_is_an_error_at_every_size) {
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    kvq_mapped_file file = {0};
    char            sha256[KVQ_SHA256_HEX], *path = sample_path("full.kvqm.h5");
    kvq_test_ok(write_measurement(&ctx, &ctx, path, small_options(), NULL, sha256, &err), &err);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    size_t bytes = file.bytes;
    kvq_unmap_file(&file);
    ck_assert_int_eq(unlink(path), 0);
    for (size_t limit = 0; limit<bytes; limit += limit + 80> bytes ? 9 : 1 + bytes / 23) {
        kvq_test_limit_files(limit);
        kvq_status status = write_measurement(&ctx, &ctx, path, small_options(), NULL, sha256, &err);
        kvq_test_limit_files(KVQ_TEST_NO_LIMIT);
        kvq_test_failed(status, KVQ_ERR_DISK, &err, "full.kvqm.h5: ");
        ck_assert_int_eq(count_files(), 0);
    }
}
END_TEST

static kvq_status write_and_read(const kvq_context *good, const kvq_context *ctx, const char *path, kvq_error *err) {
    kvq_measurement    *m = NULL;
    kvq_measured_layer *l = NULL;
    char                sha256[KVQ_SHA256_HEX], format[KVQ_FORMAT_NAME];
    double              values[SAMPLE_D];
    kvq_status          status = KVQ_OK;
    KVQ_TRY(write_measurement(good, ctx, path, small_options(), NULL, sha256, err));
    KVQ_TRY(kvq_file_format(ctx, path, format, err));
    KVQ_TRY(kvq_measurement_open(ctx, path, &m, err));
    KVQ_TRY(kvq_measurement_read(ctx, m, 1, &l, err));
    KVQ_TRY(kvq_measurement_spectrum(ctx, m, 1, 'k', values, err));
done:
    kvq_measured_layer_destroy(ctx, &l);
    kvq_measurement_close(ctx, &m);
    return status;
}

START_TEST(every_allocation_may_fail) {
    limited_memory memory = {.inner = kvq_test_context()};
    kvq_context    good = memory.inner, ctx = limited_context(&memory);
    kvq_error      err = {0};
    char          *path = sample_path("a.kvqm.h5");
    kvq_status     status = KVQ_ERR_MEMORY;
    int64_t        n = 0;
    for (; status != KVQ_OK && n < 1000; n++) {
        memory.left = n;
        status = write_and_read(&good, &ctx, path, &err);
        if (status != KVQ_OK) ck_assert_int_eq(status, KVQ_ERR_MEMORY);
        ck_assert_int_eq(memory.n_live, 0);
        ck_assert_int_le(count_files(), 1); // nothing temporary
    }
    kvq_test_ok(status, &err);
    ck_assert_int_gt(n, 30);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(everything_comes_back),
    KVQ_CASE(channels_and_rotated_values_come_back),
    KVQ_CASE(the_least_that_can_be_measured_comes_back),
    KVQ_CASE(equal_content_gives_equal_bytes),
    KVQ_CASE(the_kind_of_every_file_is_told),
    KVQ_CASE(a_capture_is_told_although_it_has_no_seal),
    KVQ_LOOP(what_could_not_be_read_is_not_written, (int)(sizeof SPOILED / sizeof *SPOILED)),
    KVQ_LOOP(what_could_not_be_read_of_channels_is_not_written,
             (int)(sizeof SPOILED_ALLOCATED / sizeof *SPOILED_ALLOCATED)),
    KVQ_CASE(options_without_sense_are_refused),
    KVQ_CASE(a_layer_is_put_once_and_as_announced),
    KVQ_CASE(damage_is_found_before_anything_is_parsed),
    KVQ_LOOP(a_sealed_file_with_wrong_content_is_refused_by_name, (int)(sizeof FORGERIES / sizeof *FORGERIES)),
    KVQ_LOOP(a_sealed_file_with_wrong_channels_is_refused_by_name,
             (int)(sizeof ALLOCATED_FORGERIES / sizeof *ALLOCATED_FORGERIES)),
    KVQ_LOOP(a_sealed_file_with_wrong_numbers_is_refused_when_they_are_read,
             (int)(sizeof FORGED_NUMBERS / sizeof *FORGED_NUMBERS)),
    KVQ_CASE(an_existing_file_needs_force),
    KVQ_CASE(a_full_disk_is_an_error_at_every_size),
    KVQ_CASE(every_allocation_may_fail),
};

// The service for check_measurement_h5py.py; prints the hash.
static int write_sample(const char *path, kvq_measure_options options) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    char        sha256[KVQ_SHA256_HEX] = "";
    kvq_status  status = write_measurement(&ctx, &ctx, path, options, NULL, sha256, &err);
    printf("%s\n", status == KVQ_OK ? sha256 : err.message);
    return status == KVQ_OK ? EXIT_SUCCESS : EXIT_FAILURE;
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--write-sample") == 0) return write_sample(argv[2], sample_options());
    if (argc == 3 && strcmp(argv[1], "--write-allocated") == 0) return write_sample(argv[2], allocated_options());
    return kvq_test_run("measurement", CASES, (int)(sizeof CASES / sizeof *CASES));
}
