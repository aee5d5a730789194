// SPDX-License-Identifier: Apache-2.0
//
// A measurement whose elements are counted on the emulated device, beside one whose entries for it are gone, so that
// the host counts: the same file, also when the run is stopped; the same message for what cannot be counted; and every
// call of the device's runtime failing once.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "limited_memory.h"
#include "small_model.h"

#include "calib_impl.h"

enum { N = 3, S = 20, L = 2, HEADS = 2, DIM = 16, SINKS = 2 };

// What stands between the sweeps and the backend.
typedef struct spy {
    kvq_backend inner;        // its own entries
    int64_t     n_counts;     // calls of count
    int64_t     n_downloaded; // floats
    int64_t     spoil;        // call of count whose third row has a NaN; -1: none
    bool        lies;         // count refuses what is well
} spy;
static spy spied; // entries know nothing but their backend

static int64_t spied_count(const kvq_backend *be, const kvq_count_rule *rule, const float *x, const float *gradients,
                           int64_t m, float *counters, float *scratch) {
    const float bad = NAN;
    if (spied.n_counts++ == spied.spoil) be->upload(be, (float *)(uintptr_t)x + 3 * rule->spec->d + 5, &bad, 1);
    if (spied.lies) return 7;
    return spied.inner.count(be, rule, x, gradients, m, counters, scratch);
}

static void spied_download(const kvq_backend *be, float *host_to, const float *from, int64_t n) {
    spied.n_downloaded += n;
    spied.inner.download(be, host_to, from, n);
}

typedef struct device_rig {
    kvq_context     ctx;
    kvq_backend    *be;
    kvq_checkpoint *checkpoint;
    kvq_model      *model;
    char            folder[256], file[256];
    int32_t         ids[N * S];
} device_rig;

static void make_checkpoint(device_rig *r) {
    kvq_make_options options = kvq_make_options_default();
    kvq_backend     *cpu = NULL;
    options.n_layers = L;
    options.n_kv_heads = HEADS;
    options.head_dim = DIM;
    options.attention_bias = true;
    small_model_open(&r->ctx, &options, false, &cpu, &r->checkpoint, &r->model);
    kvq_model_destroy(&r->ctx, &r->model);
    cpu->destroy(&cpu);
    (void)snprintf(r->folder, sizeof r->folder, "%s/work", kvq_test_folder());
    (void)snprintf(r->file, sizeof r->file, "%s/m.kvqm.h5", kvq_test_folder());
    for (int i = 0; i < N * S; i++) r->ids[i] = (int32_t)kvq_rng_below(2, KVQ_RNG_TEST, 60, (uint64_t)i, 90);
}

static void rig_open(device_rig *r) {
    kvq_error err = {0};
    *r = (device_rig){.ctx = kvq_test_context()};
    make_checkpoint(r);
    kvq_test_ok(kvq_backend_open(&r->ctx, "cuda", KVQ_COMPUTE_F32, &r->be, &err), &err);
    kvq_test_ok(kvq_model_create(&r->ctx, r->be, r->checkpoint, false, &r->model, &err), &err);
    spied = (spy){.inner = *r->be, .spoil = -1};
    r->be->count = spied_count;
    r->be->download = spied_download;
}

static void rig_close(device_rig *r) { small_model_close(&r->ctx, &r->be, &r->checkpoint, &r->model); }

static kvq_status run_measure(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, device_rig *r,
                              const kvq_measure_options *o, bool restart, char sha256[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_windows       w = {.n_windows = N, .seq_len = S, .ids = r->ids, .source = "test"};
    kvq_sweep_options sweep = {.work_dir = r->folder, .restart = restart, .stride = 1, .n_shards = 1};
    kvq_processes     alone = kvq_processes_single();
    kvq_artifact     *about = NULL;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(kvq_measure(ctx, be, model, &w, o, &sweep, &alone, &about, err));
    KVQ_TRY(kvq_measure_write(ctx, about, o, &sweep, &alone, r->file, true, false, sha256, err));
done:
    kvq_artifact_destroy(ctx, &about);
    return status;
}

// ---------------------------------------------------------------- the same bytes

typedef struct example {
    bool              allocated, rotated;
    kvq_axis          k_axis;
    kvq_token_range   token_range;
    kvq_weighting_set weightings;
} example;
static const example EXAMPLES[] = {
    {.weightings = KVQ_WEIGHTINGS_ALL},
    {.weightings = KVQ_WEIGHTINGS_ALL, .rotated = true},
    {.weightings = KVQ_WEIGHTINGS_ALL, .allocated = true},
    {.weightings = KVQ_WEIGHTINGS_ALL, .k_axis = KVQ_AXIS_TOKEN},
    {.weightings = KVQ_WEIGHTINGS_ALL, .token_range = KVQ_RANGE_PERCENTILES},
    {.weightings = KVQ_WEIGHTINGS_BASIC}, // without gradients
    {.weightings = KVQ_WEIGHTINGS_BASIC | 1u << KVQ_WEIGHT_FISHER, .rotated = true},
};
enum { N_EXAMPLES = sizeof EXAMPLES / sizeof *EXAMPLES };

// One slot a side where there are thresholds, so that some of what lies beyond finds none.
static kvq_measure_options options_of(const example *e) {
    kvq_measure_options o = kvq_calib_options_default().measure;
    o.n_fractions = 2;
    o.fractions[0] = 0;
    o.fractions[1] = 0.1;
    o.sink_tokens = SINKS;
    o.k_slots = e->k_axis == KVQ_AXIS_CHANNEL ? 1 : 0;
    o.weightings = e->weightings;
    o.k_axis = e->k_axis;
    o.token_range = e->token_range;
    o.k_domain = e->rotated ? KVQ_KEYS_POST_ROPE : KVQ_KEYS_PRE_ROPE;
    o.moments = !e->rotated;
    if (e->allocated) kvq_measure_for_tiles(&o);
    return o;
}

START_TEST(device_and_host_count_the_same_bytes) {
    device_rig          r;
    kvq_error           err = {0};
    char                hash[2][KVQ_SHA256_HEX];
    int64_t             downloaded[2];
    kvq_measure_options o = options_of(&EXAMPLES[_i]);
    bool                on_device = o.token_range == KVQ_RANGE_EXTREMES;
    rig_open(&r);
    for (int by_host = 0; by_host < 2; by_host++) {
        if (by_host) r.be->count = NULL;
        spied.n_downloaded = 0;
        kvq_test_ok(run_measure(&r.ctx, r.be, r.model, &r, &o, true, hash[by_host], &err), &err);
        downloaded[by_host] = spied.n_downloaded;
    }
    ck_assert_str_eq(hash[0], hash[1]);
    ck_assert_int_eq(spied.n_counts, on_device ? L * N * o.n_fractions * 2 : 0);
    // K, V and their gradients of each window and layer stay where they are; counters come once a layer
    int64_t window = (int64_t)S * HEADS * DIM * (kvq_weightings_need_gradients(o.weightings) ? 4 : 2);
    int64_t counters = kvq_counters_bytes(o.weightings) / 4 * HEADS * 2 * o.n_fractions;
    int64_t copies = on_device && !o.allocated ? L * N * window : 0;
    ck_assert_int_eq(downloaded[1] - downloaded[0], copies - (on_device ? L * counters : 0));
    rig_close(&r);
}
END_TEST

static bool stop_now_and_then(void *user) {
    int *calls_left = user;
    return (*calls_left)-- <= 0;
}

START_TEST(a_stopped_run_ends_in_the_same_bytes) {
    device_rig          r;
    kvq_error           err = {0};
    char                whole[KVQ_SHA256_HEX], stopped[KVQ_SHA256_HEX];
    kvq_measure_options o = options_of(&EXAMPLES[0]);
    kvq_status          status = KVQ_ERR_INTERRUPTED;
    int                 n_stops = 0;
    rig_open(&r);
    kvq_test_ok(run_measure(&r.ctx, r.be, r.model, &r, &o, true, whole, &err), &err);
    (void)snprintf(r.folder, sizeof r.folder, "%s/stopped", kvq_test_folder());
    for (; status != KVQ_OK; n_stops++) {
        kvq_context ctx = r.ctx;
        int         calls_left = 2;
        ctx.stop = stop_now_and_then;
        ctx.user = &calls_left;
        status = run_measure(&ctx, r.be, r.model, &r, &o, false, stopped, &err);
        ck_assert(status == KVQ_OK || status == KVQ_ERR_INTERRUPTED);
        if (n_stops % 2 == 0) r.be->count = r.be->count == NULL ? spied_count : NULL; // they go on where others stopped
    }
    ck_assert_int_ge(n_stops, 5);
    ck_assert_str_eq(whole, stopped);
    rig_close(&r);
}
END_TEST

// A measurement that is asked for all it has seen after every window, and what it was shown.
typedef struct asked {
    kvq_context       *ctx;
    const kvq_backend *be;
    kvq_observer       inner;
    kvq_blob           saved, result;
    float              k[L][N][S * HEADS * DIM]; // of the forward pass
} asked;

static kvq_status ask_begin(void *user, kvq_pass pass, int64_t layer, kvq_error *err) {
    asked *a = user;
    return a->inner.begin(a->inner.user, pass, layer, err);
}

// Keys are the same in both passes, on the device and as copied.
static kvq_status ask_window(void *user, kvq_pass pass, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    static float there[S * HEADS * DIM];
    asked       *a = user;
    float       *k = a->k[layer][seen->window];
    kvq_status   status = KVQ_OK;
    a->be->download(a->be, there, seen->there.k, S * HEADS * DIM);
    if (seen->k != NULL) ck_assert_mem_eq(seen->k, there, sizeof there);
    if (pass == KVQ_PASS_FORWARD) memcpy(k, there, sizeof there);
    if (pass == KVQ_PASS_BACKWARD) ck_assert_mem_eq(k, there, sizeof there);
    KVQ_TRY(a->inner.window(a->inner.user, pass, layer, seen, err));
    a->saved.bytes = 0;
    KVQ_TRY(a->inner.save(a->inner.user, pass, layer, &a->saved, err));
done:
    return status;
}

static kvq_status ask_finish(void *user, kvq_pass pass, int64_t layer, kvq_blob *result, kvq_error *err) {
    asked     *a = user;
    int64_t    before = result->bytes;
    kvq_status status = a->inner.finish(a->inner.user, pass, layer, result, err);
    if (status != KVQ_OK) return status;
    return kvq_blob_append(a->ctx, &a->result, result->data + before, result->bytes - before, err);
}

static void sweep_asked(device_rig *r, const kvq_measure_options *o, asked *a) {
    kvq_windows       w = {.n_windows = N, .seq_len = S, .ids = r->ids, .source = "test"};
    kvq_sweep_options sweep = {.work_dir = r->folder, .restart = true, .stride = 1, .n_shards = 1};
    kvq_processes     alone = kvq_processes_single();
    kvq_error         err = {0};
    kvq_loss_sum      loss;
    measure          *m = NULL;
    measure_shape     shape = measure_shape_of(kvq_model_describe(r->model), S, N);
    *a = (asked){.ctx = &r->ctx, .be = r->be};
    kvq_test_ok(measure_create(&r->ctx, r->be, o, shape, NULL, NULL, &m, &err), &err);
    a->inner = measure_observer(m);
    kvq_observer o_asked = a->inner;
    o_asked.user = a;
    o_asked.begin = ask_begin;
    o_asked.window = ask_window;
    o_asked.finish = ask_finish;
    o_asked.save = NULL; // no run to go on with
    kvq_test_ok(kvq_sweep(&r->ctx, r->be, r->model, &w, &sweep, &alone, &o_asked, &loss, &err), &err);
    measure_destroy(&r->ctx, &m);
}

START_TEST(what_was_seen_can_be_asked_for_at_any_time) {
    static asked        a[2];
    device_rig          r;
    kvq_measure_options o = options_of(&EXAMPLES[_i]);
    rig_open(&r);
    for (int by_host = 0; by_host < 2; by_host++) {
        if (by_host) r.be->count = NULL;
        sweep_asked(&r, &o, &a[by_host]);
    }
    ck_assert_int_eq(a[0].result.bytes, a[1].result.bytes);
    ck_assert_int_eq(a[0].saved.bytes, a[1].saved.bytes);
    ck_assert(memcmp(a[0].result.data, a[1].result.data, (size_t)a[0].result.bytes) == 0);
    ck_assert(memcmp(a[0].saved.data, a[1].saved.data, (size_t)a[0].saved.bytes) == 0);
    for (int i = 0; i < 2; i++) {
        kvq_blob_free(&r.ctx, &a[i].saved);
        kvq_blob_free(&r.ctx, &a[i].result);
    }
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- what cannot be counted

START_TEST(the_host_says_what_the_device_refuses) {
    device_rig          r;
    kvq_error           err = {0};
    char                hash[KVQ_SHA256_HEX];
    kvq_measure_options o = options_of(&EXAMPLES[0]);
    rig_open(&r);
    spied.spoil = 1; // V of the first window, layer 1 being passed first
    kvq_test_failed(run_measure(&r.ctx, r.be, r.model, &r, &o, true, hash, &err), KVQ_ERR_NUMERICAL, &err,
                    "calibration window 0: layer 1, V, position 3: channel 5 is nan");
    ck_assert_int_eq(spied.n_counts, 2);
    spied.spoil = -1;
    spied.lies = true;
    kvq_test_failed(run_measure(&r.ctx, r.be, r.model, &r, &o, true, hash, &err), KVQ_ERR_INTERNAL, &err,
                    "layer 1: the device could not count what the host could");
    rig_close(&r);
}
END_TEST

// After n calls of its runtime the device stops to work, for growing n, and after each n-th allocation memory is out:
// each time the run says so, and releases all it has.
START_TEST(every_failure_of_the_device_is_told) {
    device_rig          r;
    kvq_error           err = {0};
    char                hash[KVQ_SHA256_HEX], calls[32];
    kvq_measure_options o = options_of(&EXAMPLES[_i]);
    limited_memory      memory = {.inner = kvq_test_context(), .left = INT64_MAX};
    kvq_context         ctx = limited_context(&memory);
    kvq_status          status = KVQ_ERR_INTERNAL;
    int                 n_failed = 0;
    rig_open(&r);
    rig_close(&r);
    make_checkpoint(&r);
    for (int64_t n = 0; status != KVQ_OK; n += 1 + n / 6, n_failed++) {
        kvq_backend *be = NULL;
        kvq_model   *model = NULL;
        (void)snprintf(calls, sizeof calls, "%lld", (long long)n);
        (void)setenv("KVQ_SIMT_CALLS", calls, 1);
        err = (kvq_error){KVQ_OK, "", ""};
        status = kvq_backend_open(&ctx, "cuda", KVQ_COMPUTE_F32, &be, &err);
        if (status == KVQ_OK) status = kvq_model_create(&ctx, be, r.checkpoint, false, &model, &err);
        if (status == KVQ_OK) status = run_measure(&ctx, be, model, &r, &o, true, hash, &err);
        kvq_model_destroy(&ctx, &model);
        if (be != NULL) be->destroy(&be);
        ck_assert_int_eq(memory.n_live, 0);
        if (status != KVQ_OK) kvq_test_failed(status, KVQ_ERR_INTERNAL, &err, "stopped working");
    }
    ck_assert_int_gt(n_failed, 20);
    kvq_checkpoint_close(&r.ctx, &r.checkpoint);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(device_and_host_count_the_same_bytes, N_EXAMPLES), KVQ_CASE(a_stopped_run_ends_in_the_same_bytes),
    KVQ_LOOP(what_was_seen_can_be_asked_for_at_any_time, 2),    KVQ_CASE(the_host_says_what_the_device_refuses),
    KVQ_LOOP(every_failure_of_the_device_is_told, 1),
};
KVQ_TEST_MAIN("cuda counting", CASES)
