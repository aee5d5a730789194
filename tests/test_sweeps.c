// SPDX-License-Identifier: Apache-2.0
//
// What the sweeps promise beyond their numbers: a run that is stopped, killed, spread over processes or shards, or
// short of disk ends in the same artifact; a work directory of another run, in use, or damaged is refused.
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "calib_impl.h"
#include "kvq_make_model.h"
#include "kvq_test.h"
#include "played_processes.h"

enum { N = 5, S = 40, L = 3 };

typedef struct rig {
    kvq_context       ctx;
    kvq_backend      *be;
    kvq_checkpoint   *checkpoint;
    kvq_model        *model;
    int32_t           ids[N * S];
    kvq_windows       windows;
    kvq_calib_options options;
} rig;

static void make_model(char path[256]) {
    kvq_make_options options = kvq_make_options_default();
    options.n_layers = L;
    (void)snprintf(path, 256, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
}

static void rig_open(rig *r, const char *path) {
    kvq_error err = {0};
    r->ctx = kvq_test_context();
    r->options = kvq_calib_options_default();
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(&r->ctx, path, &r->checkpoint, &err), &err);
    kvq_test_ok(kvq_model_create(&r->ctx, r->be, r->checkpoint, false, &r->model, &err), &err);
    r->windows = (kvq_windows){.n_windows = N, .seq_len = S, .ids = r->ids, .source = "test"};
    int64_t vocab = kvq_model_describe(r->model)->vocab_size;
    for (int i = 0; i < N * S; i++)
        r->ids[i] = (int32_t)kvq_rng_below(2, KVQ_RNG_TEST, 60, (uint64_t)i, (uint64_t)vocab);
}

static void rig_close(rig *r) {
    kvq_model_destroy(&r->ctx, &r->model);
    kvq_checkpoint_close(&r->ctx, &r->checkpoint);
    r->be->destroy(&r->be);
}

static const kvq_field FINGERPRINT[] = {{"model", "test"}, {"bits", "3"}};

static kvq_sweep_options sweep_in(char folder[256], const char *name) {
    (void)snprintf(folder, 256, "%s/%s", kvq_test_folder(), name);
    return (kvq_sweep_options){.work_dir = folder,
                               .stride = 1,
                               .n_shards = 1,
                               .prefetch = true,
                               .fingerprint = FINGERPRINT,
                               .n_fingerprint = 2};
}

static kvq_status calibrate(rig *r, const kvq_sweep_options *sweep, kvq_artifact **out, kvq_error *err) {
    kvq_processes alone = kvq_processes_single();
    return kvq_calibrate(&r->ctx, r->be, r->model, &r->windows, &r->options, sweep, &alone, out, err);
}

// The bytes that kvq_artifact_write would write.
static kvq_blob bytes_of(rig *r, const kvq_artifact *a) {
    kvq_blob  blob = {0};
    size_t    n = 0;
    kvq_error err = {0};
    kvq_test_ok(kvq_artifact_pack(&r->ctx, a, &blob.data, &n, &err), &err);
    blob.bytes = (int64_t)n;
    return blob;
}

static kvq_blob undisturbed(rig *r) {
    char              folder[256];
    kvq_sweep_options sweep = sweep_in(folder, "undisturbed");
    kvq_processes     alone = kvq_processes_single();
    kvq_artifact     *a = NULL;
    kvq_error         err = {0};
    kvq_test_ok(calibrate(r, &sweep, &a, &err), &err);
    kvq_blob blob = bytes_of(r, a);
    kvq_artifact_destroy(&r->ctx, &a);
    kvq_test_ok(kvq_sweep_forget(&r->ctx, &sweep, &alone, &err), &err);
    ck_assert_int_ne(access(folder, F_OK), 0); // nothing is left behind
    return blob;
}

static void expect_artifact(rig *r, kvq_artifact **a, const kvq_blob *expected) {
    kvq_blob got = bytes_of(r, *a);
    ck_assert_int_eq(got.bytes, expected->bytes);
    ck_assert_mem_eq(got.data, expected->data, (size_t)got.bytes);
    kvq_blob_free(&r->ctx, &got);
    kvq_artifact_destroy(&r->ctx, a);
}

// ---------------------------------------------------------------- steps

// Plays all steps over a set of boundaries: each must find what it reads, and the disk never holds more than promised.
static void play(const step_plan *plan) {
    bool    boundary[32] = {false}, gradient[32] = {false};
    int     forward[32] = {0}, backward[32] = {0};
    int64_t most = 0;
    for (int64_t i = 0; i < step_count(plan); i++) {
        step at = step_at(plan, i);
        if (at.kind != STEP_EMBED) ck_assert(boundary[at.layer]);
        if (at.kind == STEP_EMBED) boundary[0] = true;
        if (at.kind == STEP_FORWARD || at.kind == STEP_REFILL) boundary[at.layer + 1] = true;
        if (at.kind == STEP_LOSS) gradient[at.layer] = plan->gradients;
        if (at.kind == STEP_BACKWARD && plan->gradients) {
            ck_assert(gradient[at.layer + 1]);
            gradient[at.layer] = at.layer > 0;
        }
        int64_t n = 0;
        for (int b = 0; b <= plan->n_layers; b++) n += boundary[b] + gradient[b];
        most = n > most ? n : most;
        forward[at.layer] += at.kind == STEP_FORWARD;
        backward[at.layer] += at.kind == STEP_BACKWARD;
        if (at.kind == STEP_FORWARD && !step_keeps_boundary(plan, at.layer)) boundary[at.layer] = false;
        if (at.kind == STEP_LOSS || at.kind == STEP_BACKWARD) boundary[at.layer] = false;
        if (at.kind == STEP_BACKWARD) gradient[at.layer + 1] = false;
    }
    for (int l = 0; l < plan->n_layers; l++) ck_assert(forward[l] == 1 && backward[l] == plan->second_pass);
    ck_assert_int_le(most, step_peak_states(plan));
    if (plan->gradients && plan->n_layers > plan->stride) ck_assert_int_ge(most, step_peak_states(plan) - 1);
}

START_TEST(every_step_finds_what_it_reads) {
    for (int64_t n_layers = 1; n_layers <= 12; n_layers++) {
        for (int64_t stride = 1; stride <= n_layers; stride++) {
            for (int way = 0; way < 3; way++) {
                step_plan plan = {n_layers, stride, way > 0, way > 1};
                play(&plan);
            }
        }
    }
}
END_TEST

// ---------------------------------------------------------------- stopping

typedef struct stopper {
    _Atomic int64_t calls_left; // allocations come from the thread that prefetches, too
} stopper;

static bool stop_after_some_calls(void *user) { return ((stopper *)user)->calls_left-- <= 0; }

// Stopped again and again, after a few questions each time, until it is through.
START_TEST(a_stopped_run_ends_in_the_same_bytes) {
    char              path[256], folder[256];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    int               n_stops = 0;
    static const int  STEP[] = {1, 2, 3, 7, 11};
    kvq_sweep_options sweep = sweep_in(folder, "stopped");
    make_model(path);
    rig_open(&r, path);
    kvq_blob   expected = undisturbed(&r);
    kvq_status status = KVQ_ERR_INTERRUPTED;
    sweep.stride = 1 + _i % 2;
    for (; status != KVQ_OK; n_stops++) {
        stopper s = {.calls_left = STEP[_i]};
        r.ctx.stop = stop_after_some_calls;
        r.ctx.user = &s;
        status = calibrate(&r, &sweep, &a, &err);
        r.ctx.stop = NULL;
        ck_assert(status == KVQ_OK || status == KVQ_ERR_INTERRUPTED);
        ck_assert_int_lt(n_stops, 200);
    }
    ck_assert_int_ge(n_stops, 3);
    expect_artifact(&r, &a, &expected);
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

static void die_at_some_event(void *user, const kvq_progress *p) {
    (void)p;
    if (--((stopper *)user)->calls_left <= 0) (void)raise(SIGKILL);
}

static void *die_at_some_allocation(void *user, size_t bytes) {
    if (--((stopper *)user)->calls_left <= 0) (void)raise(SIGKILL);
    return aligned_alloc(64, bytes);
}

static void release_memory(void *user, void *p) {
    (void)user;
    free(p);
}

// Killed again and again, each time a little later than the time before: at a progress event, which is between two
// windows, or at an allocation, which is also while results are made, written and committed.
START_TEST(a_killed_run_ends_in_the_same_bytes) {
    char              path[256], folder[256];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    int               n_kills = 0, result = 0;
    kvq_sweep_options sweep = sweep_in(folder, "killed");
    make_model(path);
    rig_open(&r, path);
    kvq_blob expected = undisturbed(&r);
    for (;; n_kills++) {
        pid_t child = fork();
        if (child == 0) {
            stopper s = {.calls_left = _i == 0 ? 1 + n_kills % 9 : 20 + 3 * n_kills};
            r.ctx.user = &s;
            r.ctx.progress = _i == 0 ? die_at_some_event : NULL;
            r.ctx.alloc = _i == 0 ? r.ctx.alloc : die_at_some_allocation;
            r.ctx.release = _i == 0 ? r.ctx.release : release_memory;
            _exit(calibrate(&r, &sweep, &a, NULL) == KVQ_OK ? 0 : 1);
        }
        ck_assert_int_eq(waitpid(child, &result, 0), child);
        if (!WIFSIGNALED(result)) break;
        ck_assert_int_lt(n_kills, 200);
    }
    ck_assert_int_eq(result, 0);
    ck_assert_int_ge(n_kills, 5);
    kvq_test_ok(calibrate(&r, &sweep, &a, &err), &err); // all steps are there: only the artifact is made again
    expect_artifact(&r, &a, &expected);
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

// A measurement that is stopped over and over is the same file as one that is not.
START_TEST(a_stopped_measurement_ends_in_the_same_bytes) {
    char                path[256], folder[256], files[2][300], sha256[2][KVQ_SHA256_HEX];
    rig                 r;
    kvq_error           err = {0};
    kvq_processes       alone = kvq_processes_single();
    kvq_measure_options o = kvq_calib_options_default().measure;
    make_model(path);
    rig_open(&r, path);
    for (int i = 0; i < 2; i++) {
        kvq_sweep_options sweep = sweep_in(folder, i == 0 ? "whole" : "stopped");
        kvq_artifact     *about = NULL;
        kvq_status        status = KVQ_ERR_INTERRUPTED;
        int               n_stops = 0;
        for (; status != KVQ_OK; n_stops++) {
            stopper s = {.calls_left = 11};
            r.ctx.stop = i == 1 ? stop_after_some_calls : NULL;
            r.ctx.user = &s;
            status = kvq_measure(&r.ctx, r.be, r.model, &r.windows, &o, &sweep, &alone, &about, &err);
            r.ctx.stop = NULL;
            ck_assert(status == KVQ_OK || status == KVQ_ERR_INTERRUPTED);
            ck_assert_int_lt(n_stops, 200);
        }
        ck_assert((n_stops > 3) == (i == 1));
        (void)snprintf(files[i], sizeof files[i], "%s/%d.kvqm.h5", kvq_test_folder(), i);
        kvq_test_ok(kvq_measure_write(&r.ctx, about, &o, &sweep, &alone, files[i], false, true, sha256[i], &err), &err);
        kvq_test_ok(kvq_sweep_forget(&r.ctx, &sweep, &alone, &err), &err);
        kvq_artifact_destroy(&r.ctx, &about);
    }
    ck_assert_str_eq(sha256[0], sha256[1]);
    rig_close(&r);
}
END_TEST

static kvq_status stop_in_the_middle(rig *r, const kvq_sweep_options *sweep, int64_t calls) {
    stopper       s = {.calls_left = calls};
    kvq_artifact *a = NULL;
    r->ctx.stop = stop_after_some_calls;
    r->ctx.user = &s;
    kvq_status status = calibrate(r, sweep, &a, NULL);
    r->ctx.stop = NULL;
    return status;
}

// A kill between a commit and the removal of what the finished step had saved leaves the latter behind.
START_TEST(what_another_step_saw_is_not_believed) {
    char              path[256], folder[256], partial[300], old[300];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_sweep_options sweep = sweep_in(folder, "outdated");
    make_model(path);
    rig_open(&r, path);
    kvq_blob expected = undisturbed(&r);
    (void)snprintf(partial, sizeof partial, "%s/kvq-partial", folder);
    (void)snprintf(old, sizeof old, "%s/old", folder);
    ck_assert_int_eq(stop_in_the_middle(&r, &sweep, 9), KVQ_ERR_INTERRUPTED); // in the first forward layer
    ck_assert_int_eq(rename(partial, old), 0);
    ck_assert_int_eq(stop_in_the_middle(&r, &sweep, 9), KVQ_ERR_INTERRUPTED); // in the second one
    ck_assert_int_eq(access(partial, F_OK), 0);
    ck_assert_int_eq(rename(old, partial), 0);
    kvq_test_ok(calibrate(&r, &sweep, &a, &err), &err);
    expect_artifact(&r, &a, &expected);
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

START_TEST(recomputing_layers_changes_no_bit) {
    char              path[256], folder[256];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_sweep_options sweep = sweep_in(folder, "sparse");
    make_model(path);
    rig_open(&r, path);
    kvq_blob expected = undisturbed(&r);
    sweep.stride = 2 + _i;
    sweep.prefetch = _i == 0;
    kvq_test_ok(calibrate(&r, &sweep, &a, &err), &err);
    expect_artifact(&r, &a, &expected);
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- spreading

typedef struct rank_job {
    const char              *path;
    const kvq_sweep_options *sweep;
    kvq_processes            processes;
    kvq_blob                 bytes;
    stopper                  stop; // rank 0 stops after some questions; 0 = never
    kvq_status               status;
} rank_job;

static void *run_rank(void *user) {
    rank_job         *job = user;
    rig               r;
    kvq_artifact     *a = NULL;
    kvq_calib_options o = kvq_calib_options_default();
    rig_open(&r, job->path);
    if (job->stop.calls_left > 0) {
        r.ctx.stop = stop_after_some_calls;
        r.ctx.user = &job->stop;
    }
    job->status = kvq_calibrate(&r.ctx, r.be, r.model, &r.windows, &o, job->sweep, &job->processes, &a, NULL);
    if (job->status == KVQ_OK) job->bytes = bytes_of(&r, a);
    kvq_artifact_destroy(&r.ctx, &a);
    rig_close(&r);
    return NULL;
}

static kvq_status run_ranks(const char *path, const kvq_sweep_options sweeps[4], int n_ranks, int64_t stop_after,
                            rank_job jobs[4]) {
    meeting   m = {.n_ranks = n_ranks};
    pthread_t threads[4];
    ck_assert_int_eq(pthread_barrier_init(&m.barrier, NULL, (unsigned)n_ranks), 0);
    for (int i = 0; i < n_ranks; i++) {
        jobs[i] = (rank_job){
            .path = path, .sweep = &sweeps[i], .processes = meeting_rank(&m, i), .stop = {i == 0 ? stop_after : 0}};
        ck_assert_int_eq(pthread_create(&threads[i], NULL, run_rank, &jobs[i]), 0);
    }
    for (int i = 0; i < n_ranks; i++) (void)pthread_join(threads[i], NULL);
    (void)pthread_barrier_destroy(&m.barrier);
    for (int i = 1; i < n_ranks; i++) ck_assert_int_eq(jobs[i].status, jobs[0].status);
    return jobs[0].status;
}

// _i + 1 processes; one of them is stopped again and again, which stops all.
START_TEST(processes_give_the_same_bytes) {
    char              path[256], folder[256];
    rig               r;
    rank_job          jobs[4];
    int               n_ranks = _i + 1, n_stops = 0;
    kvq_sweep_options sweep = sweep_in(folder, "ranks"), sweeps[4] = {sweep, sweep, sweep, sweep};
    make_model(path);
    rig_open(&r, path);
    kvq_blob expected = undisturbed(&r);
    while (run_ranks(path, sweeps, n_ranks, 4, jobs) == KVQ_ERR_INTERRUPTED) ck_assert_int_lt(++n_stops, 100);
    ck_assert_int_ge(n_stops, 2);
    for (int i = 0; i < n_ranks; i++) {
        ck_assert_int_eq(jobs[i].status, KVQ_OK);
        ck_assert_int_eq(jobs[i].bytes.bytes, expected.bytes);
        ck_assert_mem_eq(jobs[i].bytes.data, expected.data, (size_t)expected.bytes);
        kvq_blob_free(&r.ctx, &jobs[i].bytes);
    }
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

// One process with another text, or without a place to work: all of them end, in the same way.
START_TEST(processes_that_cannot_work_together_end_together) {
    char              path[256], folder[256], nowhere[256];
    rank_job          jobs[4];
    const kvq_field   changed[] = {{"model", "test"}, {"bits", "4"}};
    kvq_sweep_options sweep = sweep_in(folder, "ranks"), sweeps[4] = {sweep, sweep, sweep, sweep};
    make_model(path);
    sweeps[1].fingerprint = changed;
    ck_assert_int_eq(run_ranks(path, sweeps, 3, 0, jobs), KVQ_ERR_MISMATCH);
    sweeps[1] = sweep_in(nowhere, "nowhere/at/all");
    ck_assert_int_eq(run_ranks(path, sweeps, 3, 0, jobs), KVQ_ERR_DISK);
}
END_TEST

// Different disks make different plans; the sparsest is taken by all.
START_TEST(processes_agree_on_the_layers_they_recompute) {
    char              path[256], folder[256];
    rig               r;
    rank_job          jobs[4];
    kvq_sweep_options sweep = sweep_in(folder, "ranks"), sweeps[4] = {sweep, sweep, sweep, sweep};
    make_model(path);
    rig_open(&r, path);
    kvq_blob expected = undisturbed(&r);
    sweeps[1].stride = 3;
    ck_assert_int_eq(run_ranks(path, sweeps, 2, 0, jobs), KVQ_OK);
    for (int i = 0; i < 2; i++) {
        ck_assert_mem_eq(jobs[i].bytes.data, expected.data, (size_t)expected.bytes);
        kvq_blob_free(&r.ctx, &jobs[i].bytes);
    }
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- shards

typedef struct shard_files {
    char        names[4][300];
    const char *paths[4];
} shard_files;

static void run_round(rig *r, int n_shards, kvq_round round, const char *thresholds, shard_files *out) {
    kvq_error err = {0};
    for (int i = 0; i < n_shards; i++) {
        char          folder[256], name[32];
        kvq_artifact *a = NULL;
        (void)snprintf(name, sizeof name, "shard-%d", i);
        kvq_sweep_options sweep = sweep_in(folder, name);
        sweep.shard = i;
        sweep.n_shards = n_shards;
        kvq_test_ok(
            kvq_calibrate_shard(&r->ctx, r->be, r->model, &r->windows, &r->options, &sweep, thresholds, &a, &err),
            &err);
        int at = n_shards - 1 - i; // given to the merge in another order
        (void)snprintf(out->names[at], sizeof out->names[at], "%s/%d.%d.kvqp", kvq_test_folder(), i, (int)round);
        out->paths[at] = out->names[at];
        kvq_test_ok(kvq_shard_write(&r->ctx, a, &r->options, &sweep, round, out->names[at], false, &err), &err);
        kvq_artifact_destroy(&r->ctx, &a);
    }
}

// Everything that a merge has to learn from what shards wrote.
static void choose_unusual(kvq_calib_options *o, int way) {
    if (way == 0) return;
    o->fit.k_bits = 2;
    o->fit.v_bits = 5;
    o->fit.per_head = o->fit.q_norm = o->fit.compare_lloyd = o->measure.half_thresholds = true;
    o->fit.recent_tokens = 7;
    o->fit.weighting = way == 1 ? KVQ_WEIGHT_FISHER : KVQ_WEIGHT_NONE;
    o->fit.v_datatype = way == 1 ? KVQ_NF : KVQ_INT;
    o->measure.count_sinks = way == 1;
    o->measure.k_domain = way == 1 ? KVQ_KEYS_POST_ROPE : KVQ_KEYS_PRE_ROPE;
    o->measure.threshold_scope = way == 1 ? KVQ_SCOPE_MATRIX : KVQ_SCOPE_CHANNEL;
    o->measure.k_slots = way == 1 ? 3 : 0;
    o->measure.k_axis = way == 2 ? KVQ_AXIS_TOKEN : KVQ_AXIS_CHANNEL;
    o->measure.token_range = way == 2 ? KVQ_RANGE_PERCENTILES : KVQ_RANGE_EXTREMES;
}

START_TEST(shards_merge_into_the_same_bytes) {
    char            path[256], thresholds[300], out[300], sha256[KVQ_SHA256_HEX];
    rig             r;
    kvq_error       err = {0};
    shard_files     files;
    kvq_round       round;
    kvq_mapped_file file;
    int             n_shards = 1 + _i % 3;
    make_model(path);
    rig_open(&r, path);
    choose_unusual(&r.options, _i / 3);
    kvq_blob expected = undisturbed(&r);
    (void)snprintf(thresholds, sizeof thresholds, "%s/thresholds.kvqp", kvq_test_folder());
    (void)snprintf(out, sizeof out, "%s/out.kvq.h5", kvq_test_folder());
    run_round(&r, n_shards, KVQ_ROUND_ENDS, NULL, &files);
    kvq_test_ok(kvq_merge(&r.ctx, files.paths, n_shards, thresholds, false, &round, sha256, &err), &err);
    ck_assert_int_eq(round, KVQ_ROUND_ENDS);
    run_round(&r, n_shards, KVQ_ROUND_HISTOGRAMS, thresholds, &files);
    kvq_test_ok(kvq_merge(&r.ctx, files.paths, n_shards, out, false, &round, sha256, &err), &err);
    ck_assert_int_eq(round, KVQ_ROUND_HISTOGRAMS);
    kvq_test_ok(kvq_map_file(out, &file, &err), &err);
    ck_assert_uint_eq(file.bytes, (size_t)expected.bytes);
    ck_assert_mem_eq(file.data, expected.data, file.bytes);
    kvq_unmap_file(&file);
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

START_TEST(shards_that_do_not_belong_together_are_refused) {
    char        path[256], out[300], sha256[KVQ_SHA256_HEX];
    rig         r;
    kvq_error   err = {0};
    shard_files files, other;
    kvq_round   round;
    make_model(path);
    rig_open(&r, path);
    (void)snprintf(out, sizeof out, "%s/out.kvqp", kvq_test_folder());
    run_round(&r, 2, KVQ_ROUND_ENDS, NULL, &files);
    kvq_test_failed(kvq_merge(&r.ctx, files.paths, 1, out, false, &round, sha256, &err), KVQ_ERR_INPUT, &err,
                    "but 1 files are given");
    const char *twice[] = {files.paths[0], files.paths[0]};
    kvq_test_failed(kvq_merge(&r.ctx, twice, 2, out, false, &round, sha256, &err), KVQ_ERR_INPUT, &err, "given twice");
    kvq_test_ok(kvq_merge(&r.ctx, files.paths, 2, out, false, &round, sha256, &err), &err);
    run_round(&r, 2, KVQ_ROUND_HISTOGRAMS, out, &other);
    const char *mixed[] = {files.paths[0], other.paths[1]};
    kvq_test_failed(kvq_merge(&r.ctx, mixed, 2, out, true, &round, sha256, &err), KVQ_ERR_MISMATCH, &err, "of round 2");
    const char *merged[] = {out};
    kvq_test_failed(kvq_merge(&r.ctx, merged, 1, out, true, &round, sha256, &err), KVQ_ERR_INPUT, &err, "round");
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- refusals

START_TEST(a_work_directory_of_another_run_is_refused) {
    char              path[256], folder[256];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    const kvq_field   changed[] = {{"model", "test"}, {"bits", "4"}};
    kvq_sweep_options sweep = sweep_in(folder, "other");
    make_model(path);
    rig_open(&r, path);
    ck_assert_int_eq(stop_in_the_middle(&r, &sweep, 9), KVQ_ERR_INTERRUPTED);
    sweep.fingerprint = changed;
    kvq_test_failed(calibrate(&r, &sweep, &a, &err), KVQ_ERR_MISMATCH, &err, "bits: 3, now 4");
    sweep.fingerprint = FINGERPRINT;
    sweep.n_shards = 2;
    kvq_test_failed(calibrate(&r, &sweep, &a, &err), KVQ_ERR_MISMATCH, &err, "shard 0 of 1");
    sweep.n_shards = 1;
    sweep.fingerprint = changed;
    sweep.restart = true;
    kvq_test_ok(calibrate(&r, &sweep, &a, &err), &err);
    kvq_artifact_destroy(&r.ctx, &a);
    rig_close(&r);
}
END_TEST

// Killed while it was being emptied: what is left of another run must not be believed.
START_TEST(files_without_a_manifest_are_not_believed) {
    char              path[256], folder[256], manifest[300];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_sweep_options sweep = sweep_in(folder, "leftovers");
    make_model(path);
    rig_open(&r, path);
    ck_assert_int_eq(stop_in_the_middle(&r, &sweep, 2 + 6 * _i), KVQ_ERR_INTERRUPTED);
    (void)snprintf(manifest, sizeof manifest, "%s/kvq-manifest.json", folder);
    ck_assert_int_eq(unlink(manifest), 0);
    for (int i = 0; i < N * S; i++) r.ids[i] = (r.ids[i] + 1) % 256; // another text
    kvq_blob expected = undisturbed(&r);
    kvq_test_ok(calibrate(&r, &sweep, &a, &err), &err);
    expect_artifact(&r, &a, &expected);
    kvq_blob_free(&r.ctx, &expected);
    rig_close(&r);
}
END_TEST

// Files in the directory that a user put there, with names as a user might give them.
START_TEST(files_of_others_are_left_alone) {
    static const char *const NAMES[] = {"x.py", "loss_curve.csv", "lockfile", "partial_results.tsv", "manifest.json"};
    enum { N_NAMES = sizeof NAMES / sizeof *NAMES };
    char              path[256], folder[256], file[300];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_sweep_options sweep = sweep_in(folder, "shared");
    kvq_processes     alone = kvq_processes_single();
    make_model(path);
    rig_open(&r, path);
    ck_assert_int_eq(mkdir(folder, 0777), 0);
    for (int i = 0; i < N_NAMES; i++) {
        (void)snprintf(file, sizeof file, "%s/%s", folder, NAMES[i]);
        ck_assert_int_eq(fclose(fopen(file, "w")), 0);
    }
    sweep.restart = true;
    kvq_test_ok(calibrate(&r, &sweep, &a, &err), &err);
    kvq_artifact_destroy(&r.ctx, &a);
    kvq_test_ok(kvq_sweep_forget(&r.ctx, &sweep, &alone, &err), &err);
    for (int i = 0; i < N_NAMES; i++) {
        (void)snprintf(file, sizeof file, "%s/%s", folder, NAMES[i]);
        ck_assert_int_eq(unlink(file), 0);
    }
    ck_assert_int_eq(rmdir(folder), 0); // and nothing else is there
    rig_close(&r);
}
END_TEST

START_TEST(a_work_directory_in_use_is_refused) {
    char              path[256], folder[256];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_sweep_options sweep = sweep_in(folder, "busy");
    struct work_dir  *busy = NULL;
    make_model(path);
    rig_open(&r, path);
    kvq_test_ok(work_open(&r.ctx, folder, NULL, 0, false, &busy, &err), &err);
    kvq_test_failed(calibrate(&r, &sweep, &a, &err), KVQ_ERR_EXISTS, &err, "another run (process");
    work_close(&r.ctx, &busy, true);
    rig_close(&r);
}
END_TEST

// Files of an interrupted run, and how each may be hurt.
static const struct {
    const char *file;
    bool        truncate; // otherwise one byte is changed
    const char *fragment;
} DAMAGE[] = {
    {"kvq-x.0001", false, "x.0001: is truncated or damaged"}, {"kvq-x.0001", true, "x.0001: is truncated or damaged"},
    {"kvq-forward.0000", false, "forward.0000: is damaged"},  {"kvq-forward.0000", true, "forward.0000: is damaged"},
    {"kvq-partial", false, "kvq-partial: is damaged"},        {"kvq-manifest.json", true, "kvq-manifest.json"},
};

static void hurt(const char *path, bool cut) {
    struct stat info;
    ck_assert_int_eq(stat(path, &info), 0);
    if (cut) {
        ck_assert_int_eq(truncate(path, info.st_size / 2), 0);
        return;
    }
    FILE *file = fopen(path, "r+b");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_eq(fseek(file, (long)info.st_size / 2, SEEK_SET), 0);
    int byte = fgetc(file);
    ck_assert_int_eq(fseek(file, (long)info.st_size / 2, SEEK_SET), 0);
    ck_assert_int_ne(fputc(byte ^ 16, file), EOF);
    ck_assert_int_eq(fclose(file), 0);
}

START_TEST(a_damaged_work_directory_is_refused) {
    char              path[256], folder[256], file[512];
    rig               r;
    kvq_error         err = {0};
    kvq_artifact     *a = NULL;
    kvq_sweep_options sweep = sweep_in(folder, "damaged");
    make_model(path);
    rig_open(&r, path);
    ck_assert_int_eq(stop_in_the_middle(&r, &sweep, 15), KVQ_ERR_INTERRUPTED);
    (void)snprintf(file, sizeof file, "%s/%s", folder, DAMAGE[_i].file);
    hurt(file, DAMAGE[_i].truncate);
    kvq_test_failed(calibrate(&r, &sweep, &a, &err), KVQ_ERR_INTEGRITY, &err, DAMAGE[_i].fragment);
    ck_assert_ptr_null(a);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(a_stopped_measurement_ends_in_the_same_bytes),
    KVQ_CASE(every_step_finds_what_it_reads),
    KVQ_LOOP(a_stopped_run_ends_in_the_same_bytes, 5),
    KVQ_LOOP(a_killed_run_ends_in_the_same_bytes, 2),
    KVQ_CASE(what_another_step_saw_is_not_believed),
    KVQ_LOOP(recomputing_layers_changes_no_bit, 2),
    KVQ_LOOP(processes_give_the_same_bytes, 3),
    KVQ_CASE(processes_that_cannot_work_together_end_together),
    KVQ_CASE(processes_agree_on_the_layers_they_recompute),
    KVQ_LOOP(shards_merge_into_the_same_bytes, 9),
    KVQ_CASE(shards_that_do_not_belong_together_are_refused),
    KVQ_CASE(a_work_directory_of_another_run_is_refused),
    KVQ_LOOP(files_without_a_manifest_are_not_believed, 3),
    KVQ_CASE(files_of_others_are_left_alone),
    KVQ_CASE(a_work_directory_in_use_is_refused),
    KVQ_LOOP(a_damaged_work_directory_is_refused, (int)(sizeof DAMAGE / sizeof *DAMAGE)),
};
KVQ_TEST_MAIN("sweeps", CASES)
