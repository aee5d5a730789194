// SPDX-License-Identifier: Apache-2.0
//
// The promises of a calibration as a whole: threads, refits, failing disks and memory, bad options. test_reference.c
// compares its numbers with an independent implementation, test_sweeps.c has the promises about resuming.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calib_rig.h"
#include "kvq_make_model.h"
#include "kvq_test.h"
#include "limited_memory.h"

// In one process, from the beginning.
static kvq_status calibrate(rig *r, const kvq_windows *w, const kvq_calib_options *o, kvq_artifact **out,
                            kvq_error *err) {
    kvq_processes     alone = kvq_processes_single();
    kvq_sweep_options sweep = {.work_dir = r->work_dir, .restart = true, .stride = 1, .n_shards = 1};
    return kvq_calibrate(&r->ctx, r->be, r->model, w, o, &sweep, &alone, out, err);
}

// ---------------------------------------------------------------- promises, on a checkpoint of our own

enum { TINY_N = 3, TINY_S = 40 };

static void make_tiny(char *path, size_t size) {
    kvq_make_options options = kvq_make_options_default();
    (void)snprintf(path, size, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
}

static kvq_windows tiny_windows(const rig *r, int32_t ids[TINY_N * TINY_S]) {
    kvq_windows w = {.n_windows = TINY_N, .seq_len = TINY_S, .ids = ids, .source = "test"};
    int64_t     vocab = kvq_model_describe(r->model)->vocab_size;
    for (int i = 0; i < TINY_N * TINY_S; i++)
        ids[i] = (int32_t)kvq_rng_below(2, KVQ_RNG_TEST, 60, (uint64_t)i, (uint64_t)vocab);
    return w;
}

static void assert_equal_tensors(const kvq_tensor_quant *a, const kvq_tensor_quant *b, int64_t d) {
    ck_assert_mem_eq(a->codebook, b->codebook, (size_t)a->n_levels * sizeof *a->codebook);
    ck_assert_mem_eq(&a->fit, &b->fit, sizeof a->fit);
    if (a->lower == NULL) return;
    ck_assert_mem_eq(a->lower, b->lower, (size_t)d * sizeof *a->lower);
    ck_assert_mem_eq(a->upper, b->upper, (size_t)d * sizeof *a->upper);
}

START_TEST(one_and_two_threads_give_the_same_numbers) {
    char          path[256];
    int32_t       ids[TINY_N * TINY_S];
    kvq_artifact *a[2] = {NULL, NULL};
    rig           r[2];
    kvq_error     err = {0};
    make_tiny(path, sizeof path);
    for (int i = 0; i < 2; i++) {
        rig_open(&r[i], path, 1 + i);
        kvq_windows       w = tiny_windows(&r[i], ids);
        kvq_calib_options o = kvq_calib_options_default();
        o.fit.weighting = (kvq_weighting)_i;
        kvq_test_ok(calibrate(&r[i], &w, &o, &a[i], &err), &err);
    }
    for (int64_t l = 0; l < a[0]->model.n_layers; l++) {
        assert_equal_tensors(&a[0]->layers[l].k, &a[1]->layers[l].k, a[0]->model.n_kv_heads * a[0]->model.head_dim);
        assert_equal_tensors(&a[0]->layers[l].v, &a[1]->layers[l].v, 0);
    }
    ck_assert(a[0]->baseline_nll == a[1]->baseline_nll);
    for (int i = 0; i < 2; i++) {
        kvq_artifact_destroy(&r[i].ctx, &a[i]);
        rig_close(&r[i]);
    }
}
END_TEST

// ---------------------------------------------------------------- measure once, fit many

static void measure_tiny(rig *r, const kvq_windows *w, const kvq_measure_options *o, const char *path) {
    kvq_processes     alone = kvq_processes_single();
    kvq_sweep_options sweep = {.work_dir = r->work_dir, .restart = true, .stride = 1, .n_shards = 1};
    kvq_artifact     *about = NULL;
    kvq_error         err = {0};
    char              sha256[KVQ_SHA256_HEX];
    kvq_test_ok(kvq_measure(&r->ctx, r->be, r->model, w, o, &sweep, &alone, &about, &err), &err);
    kvq_test_ok(kvq_measure_write(&r->ctx, about, o, &sweep, &alone, path, true, false, sha256, &err), &err);
    kvq_test_ok(kvq_sweep_forget(&r->ctx, &sweep, &alone, &err), &err);
    kvq_artifact_destroy(&r->ctx, &about);
}

// One measurement, several fits: the bytes of the artifact are those of a calibration with the same options.
START_TEST(a_refit_equals_a_calibration) {
    static const kvq_fit_options FITS[] = {
        {.outlier_fraction = 0.0, .k_bits = 2, .v_bits = 5, .weighting = KVQ_WEIGHT_FISHER_SCALED},
        {.outlier_fraction = 0.1, .k_bits = 3, .v_bits = 3, .weighting = KVQ_WEIGHT_FISHER, .per_head = true},
        {.outlier_fraction = 0.02, .k_bits = 4, .v_bits = 2, .weighting = KVQ_WEIGHT_NONE, .q_norm = true},
        {.outlier_fraction = 0.02, .k_bits = 8, .v_bits = 8, .weighting = KVQ_WEIGHT_RANGE, .recent_tokens = 4},
        {.outlier_fraction = 0.1, .k_bits = 3, .v_bits = 3, .k_datatype = KVQ_NF, .v_datatype = KVQ_INT_CLAMPED},
        {.outlier_fraction = 0.0, .k_bits = 3, .v_bits = 3, .compare_lloyd = true},
    };
    char              path[256], file[300];
    int32_t           ids[TINY_N * TINY_S];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *direct = NULL, *refitted = NULL;
    kvq_measurement  *measurement = NULL;
    kvq_calib_options o = kvq_calib_options_default();
    uint8_t          *bytes[2] = {NULL, NULL};
    size_t            n[2] = {0, 0};
    make_tiny(path, sizeof path);
    rig_open(&r, path, 2);
    kvq_windows w = tiny_windows(&r, ids);
    o.measure.fractions[0] = 0;
    o.measure.fractions[1] = 0.02;
    o.measure.fractions[2] = 0.1;
    o.measure.sink_tokens = 2;
    o.measure.count_sinks = _i == 1;
    o.measure.k_axis = _i == 4 ? KVQ_AXIS_TOKEN : KVQ_AXIS_CHANNEL;
    o.measure.k_domain = _i == 5 ? KVQ_KEYS_POST_ROPE : KVQ_KEYS_PRE_ROPE;
    o.measure.half_thresholds = _i == 2;
    o.measure.moments = _i != 5;
    o.fit = FITS[_i];
    (void)snprintf(file, sizeof file, "%s/m.kvqm.h5", kvq_test_folder());
    measure_tiny(&r, &w, &o.measure, file);
    kvq_test_ok(calibrate(&r, &w, &o, &direct, &err), &err);
    kvq_test_ok(kvq_measurement_open(&r.ctx, file, &measurement, &err), &err);
    kvq_test_ok(kvq_refit(&r.ctx, measurement, &o.fit, &refitted, &err), &err);
    kvq_test_ok(kvq_artifact_pack(&r.ctx, direct, &bytes[0], &n[0], &err), &err);
    kvq_test_ok(kvq_artifact_pack(&r.ctx, refitted, &bytes[1], &n[1], &err), &err);
    ck_assert_uint_eq(n[0], n[1]);
    ck_assert_mem_eq(bytes[0], bytes[1], n[0]);
    for (int i = 0; i < 2; i++) kvq_free(&r.ctx, bytes[i]);
    kvq_measurement_close(&r.ctx, &measurement);
    kvq_artifact_destroy(&r.ctx, &direct);
    kvq_artifact_destroy(&r.ctx, &refitted);
    rig_close(&r);
}
END_TEST

START_TEST(a_refit_says_what_was_not_measured) {
    char              path[256], file[300];
    int32_t           ids[TINY_N * TINY_S];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_measurement  *measurement = NULL;
    kvq_calib_options o = kvq_calib_options_default();
    make_tiny(path, sizeof path);
    rig_open(&r, path, 2);
    kvq_windows w = tiny_windows(&r, ids);
    o.measure.weightings = KVQ_WEIGHTINGS_BASIC;
    (void)snprintf(file, sizeof file, "%s/m.kvqm.h5", kvq_test_folder());
    measure_tiny(&r, &w, &o.measure, file);
    kvq_test_ok(kvq_measurement_open(&r.ctx, file, &measurement, &err), &err);
    kvq_test_failed(kvq_refit(&r.ctx, measurement, &o.fit, &a, &err), KVQ_ERR_USAGE, &err,
                    "--weighting fisher-scaled was not measured; the file has none, range");
    o.fit.outlier_fraction = 0.03;
    kvq_test_failed(kvq_refit(&r.ctx, measurement, &o.fit, &a, &err), KVQ_ERR_USAGE, &err,
                    "--outliers 3% was not measured; the file has 0%, 0.25%, 1%");
    o.fit.outlier_fraction = 0.01;
    o.fit.weighting = KVQ_WEIGHT_NONE;
    o.fit.k_bits = 7;
    kvq_test_failed(kvq_refit(&r.ctx, measurement, &o.fit, &a, &err), KVQ_ERR_USAGE, &err, "--k-bits 7");
    ck_assert_ptr_null(a);
    kvq_measurement_close(&r.ctx, &measurement);
    rig_close(&r);
}
END_TEST

typedef struct bad_options {
    int         k_bits, v_bits;
    double      outliers;
    int64_t     sinks, seq_len;
    kvq_status  status;
    const char *fragment;
    kvq_axis    k_axis;
    int64_t     k_slots;
} bad_options;

static const bad_options BAD[] = {
    {1, 3, 0, 0, TINY_S, KVQ_ERR_USAGE, "--k-bits 1", KVQ_AXIS_CHANNEL, 0},
    {3, 6, 0, 0, TINY_S, KVQ_ERR_USAGE, "--v-bits 6", KVQ_AXIS_CHANNEL, 0},
    {3, 3, -0.1, 0, TINY_S, KVQ_ERR_USAGE, "--outliers", KVQ_AXIS_CHANNEL, 0},
    {3, 3, 0.11, 0, TINY_S, KVQ_ERR_USAGE, "--outliers", KVQ_AXIS_CHANNEL, 0},
    {3, 3, (double)NAN, 0, TINY_S, KVQ_ERR_USAGE, "--outliers", KVQ_AXIS_CHANNEL, 0},
    {3, 3, 0, -1, TINY_S, KVQ_ERR_USAGE, "--sink-tokens", KVQ_AXIS_CHANNEL, 0},
    {3, 3, 0, TINY_S, TINY_S, KVQ_ERR_USAGE, "--sink-tokens", KVQ_AXIS_CHANNEL, 0},
    {3, 3, 0, 0, 1, KVQ_ERR_USAGE, "--seq-len 1", KVQ_AXIS_CHANNEL, 0},
    {3, 3, 0, 0, 1 << 30, KVQ_ERR_USAGE, "positions", KVQ_AXIS_CHANNEL, 0},
    {3, 3, 0, 0, TINY_S, KVQ_ERR_USAGE, "--k-outlier-slots 5000", KVQ_AXIS_CHANNEL, 5000},
    {3, 3, 0, 0, TINY_S, KVQ_ERR_USAGE, "--k-axis token", KVQ_AXIS_TOKEN, 1},
};

START_TEST(bad_options_are_named) {
    char      path[256];
    rig       r;
    kvq_error err = {0};
    make_tiny(path, sizeof path);
    rig_open(&r, path, 1);
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kvq_calib_options o = kvq_calib_options_default();
        o.fit.k_bits = BAD[i].k_bits;
        o.fit.v_bits = BAD[i].v_bits;
        o.fit.outlier_fraction = BAD[i].outliers;
        o.measure.sink_tokens = BAD[i].sinks;
        o.measure.k_axis = BAD[i].k_axis;
        o.measure.k_slots = BAD[i].k_slots;
        kvq_measure_options m = kvq_measure_for_fit(&o);
        kvq_status          status = kvq_fit_options_check(&o.fit, &err);
        if (status == KVQ_OK) status = kvq_measure_options_check(&m, kvq_model_describe(r.model), BAD[i].seq_len, &err);
        kvq_test_failed(status, BAD[i].status, &err, BAD[i].fragment);
    }
    rig_close(&r);
}
END_TEST

// A limit on file size stands in for a full disk: the write fails in the middle of the forward sweep.
START_TEST(a_full_disk_ends_the_run) {
    char          path[256];
    int32_t       ids[TINY_N * TINY_S];
    rig           r;
    kvq_error     err = {0};
    kvq_artifact *a = NULL;
    make_tiny(path, sizeof path);
    rig_open(&r, path, 1);
    kvq_windows       w = tiny_windows(&r, ids);
    kvq_calib_options o = kvq_calib_options_default();
    kvq_test_limit_files(8192);
    kvq_status status = calibrate(&r, &w, &o, &a, &err);
    kvq_test_limit_files(KVQ_TEST_NO_LIMIT);
    kvq_test_failed(status, KVQ_ERR_DISK, &err, "x.0000");
    ck_assert_ptr_null(a);
    rig_close(&r);
}
END_TEST

// Memory that runs out at the n-th allocation, for every n: an error, and nothing that is not released.
START_TEST(every_failing_allocation_is_survived) {
    char          path[256];
    int32_t       ids[TINY_N * TINY_S];
    rig           r;
    kvq_error     err = {0};
    kvq_artifact *a = NULL;
    make_tiny(path, sizeof path);
    rig_open(&r, path, 1);
    kvq_windows       w = tiny_windows(&r, ids);
    kvq_calib_options o = kvq_calib_options_default();
    kvq_context       normal = r.ctx;
    kvq_status        status = KVQ_ERR_MEMORY;
    int64_t           n = 0;
    for (; status != KVQ_OK; n += n < 60 ? 1 : 29) {
        limited_memory memory = {.inner = normal, .left = n};
        r.ctx = limited_context(&memory); // the backend and the model see it too
        status = calibrate(&r, &w, &o, &a, &err);
        if (status == KVQ_OK) kvq_artifact_destroy(&r.ctx, &a);
        r.ctx = normal;
        ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
        ck_assert_int_eq(memory.n_live, 0);
        ck_assert_ptr_null(a);
    }
    ck_assert_int_gt(n, 30);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(a_refit_equals_a_calibration, 6),
    KVQ_CASE(a_refit_says_what_was_not_measured),
    KVQ_LOOP(one_and_two_threads_give_the_same_numbers, KVQ_N_WEIGHTINGS),
    KVQ_CASE(bad_options_are_named),
    KVQ_CASE(a_full_disk_ends_the_run),
    KVQ_CASE(every_failing_allocation_is_survived),
};
KVQ_TEST_MAIN("calib", CASES)
