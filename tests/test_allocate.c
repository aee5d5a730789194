// SPDX-License-Identifier: Apache-2.0
//
// Measurements for the channel-allocated format and the fits from them, as a whole: the same bytes however a run was
// interrupted or spread, the memory that was planned, and failures.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "counting_memory.h"
#include "limited_memory.h"
#include "played_processes.h"
#include "tile_rig.h"

// By a target, and by means; with all that can be chosen otherwise.
enum { N_FITS = 2 };
static kvq_alloc_options fit_options(int which) {
    kvq_alloc_options o = kvq_alloc_options_default();
    o.outlier_fraction = FRACTION;
    o.target_bits = 4.5;
    o.n_tokens = 512;
    o.v_rates = 1u << 4 | 1u << 6; // tables of more levels take long
    if (which == 0) return o;
    o.outlier_fraction = 0;
    o.target_bits = 0;
    o.k_bits = 2.5;
    o.v_bits = 3.5;
    o.group = 4;
    o.scope = KVQ_BUDGET_LAYER;
    o.tables = KVQ_TABLE_AFFINE;
    o.v_dim = 1;
    o.v_rates = 1u << 3 | 1u << 4;
    return o;
}

// What was measured in each layer, without a model to measure it with.
static void pretend_kl(kvq_artifact *about) {
    for (int l = 0; l < L; l++) {
        about->layers[l].k.kl = 0.01 * (l + 1);
        about->layers[l].v.kl = 0.02 / (l + 1);
    }
}

// ---------------------------------------------------------------- the same bytes

// Of the measurement file, and of artifacts that were fitted from it.
typedef struct outcome {
    char measurement[KVQ_SHA256_HEX], artifacts[N_FITS][KVQ_SHA256_HEX];
} outcome;

static void fit_all(const kvq_context *ctx, const kvq_measured_layers *layers, char hashes[N_FITS][KVQ_SHA256_HEX]) {
    for (int i = 0; i < N_FITS; i++) {
        kvq_alloc_options o = fit_options(i);
        kvq_artifact     *a = NULL;
        kvq_error         err = {0};
        kvq_test_ok(kvq_fit_allocated(ctx, layers, &o, NULL, &a, NULL, &err), &err);
        ck_assert(a->layers[1].k.kl == 0.02 && a->layers[1].v.kl == 0.01);
        kvq_test_ok(kvq_artifact_hash(ctx, a, hashes[i], &err), &err);
        kvq_artifact_destroy(ctx, &a);
    }
}

// From what sweeps left, and from a file that was made of it.
static void conclude(const kvq_context *ctx, kvq_artifact *about, const kvq_sweep_options *sweep,
                     const kvq_processes *processes, outcome *out) {
    kvq_measure_options  o = measure_options();
    kvq_measured_layers *layers = NULL;
    kvq_measurement     *file = NULL;
    char                 path[300], again[N_FITS][KVQ_SHA256_HEX];
    kvq_error            err = {0};
    (void)snprintf(path, sizeof path, "%s/m.kvqm.h5", kvq_test_folder());
    pretend_kl(about);
    kvq_test_ok(kvq_measured_layers_open(ctx, about, &o, sweep, processes, &layers, &err), &err);
    fit_all(ctx, layers, out->artifacts);
    kvq_measured_layers_close(ctx, &layers);
    kvq_test_ok(kvq_measure_write(ctx, about, &o, sweep, processes, path, true, false, out->measurement, &err), &err);
    kvq_test_ok(kvq_measurement_open(ctx, path, &file, &err), &err);
    kvq_test_ok(kvq_measured_layers_of_file(ctx, file, &layers, &err), &err);
    fit_all(ctx, layers, again);
    for (int i = 0; i < N_FITS; i++) ck_assert_str_eq(again[i], out->artifacts[i]);
    kvq_measured_layers_close(ctx, &layers);
    kvq_measurement_close(ctx, &file);
}

static void expect_outcome(const outcome *got, const outcome *expected) {
    ck_assert_str_eq(got->measurement, expected->measurement);
    for (int i = 0; i < N_FITS; i++) ck_assert_str_eq(got->artifacts[i], expected->artifacts[i]);
}

// In one go, on one thread.
static outcome undisturbed(const char *path) {
    char              folder[256];
    int32_t           ids[N * S];
    rig               r;
    outcome           out;
    kvq_windows       w = make_windows(N, S, ids);
    kvq_sweep_options sweep = sweep_in(folder, "undisturbed");
    kvq_processes     alone = kvq_processes_single();
    kvq_artifact     *about = NULL;
    kvq_error         err = {0};
    rig_open(&r, path, 1);
    kvq_test_ok(measure_in(&r, &w, &sweep, &alone, &about, &err), &err);
    conclude(&r.ctx, about, &sweep, &alone, &out);
    kvq_artifact_destroy(&r.ctx, &about);
    rig_close(&r);
    ck_assert_str_ne(out.artifacts[0], out.artifacts[1]);
    return out;
}

// Stops at the first question after an event.
typedef struct stopper {
    bool now;
} stopper;
static void stop_now(void *user, const kvq_progress *p) {
    (void)p;
    ((stopper *)user)->now = true;
}
static bool is_stopped(void *user) { return ((stopper *)user)->now; }

static const struct {
    int  n_threads, stride;
    bool stops;
} WAYS[] = {{2, 1, false}, {3, 1, false}, {1, 2, false}, {2, 3, false}, {1, 1, true}, {3, 2, true}};
enum { N_WAYS = sizeof WAYS / sizeof *WAYS };

START_TEST(no_way_changes_the_bytes) {
    char              path[256], folder[256];
    int32_t           ids[N * S];
    rig               r;
    outcome           got;
    kvq_windows       w = make_windows(N, S, ids);
    kvq_sweep_options sweep = sweep_in(folder, "other");
    kvq_processes     alone = kvq_processes_single();
    kvq_artifact     *about = NULL;
    kvq_error         err = {0};
    kvq_status        status = KVQ_ERR_INTERRUPTED;
    int               n_stops = 0;
    make_model(path);
    outcome expected = undisturbed(path);
    sweep.stride = WAYS[_i].stride;
    rig_open(&r, path, WAYS[_i].n_threads);
    for (; status == KVQ_ERR_INTERRUPTED; n_stops++) {
        stopper s = {false};
        r.ctx.user = &s;
        r.ctx.progress = WAYS[_i].stops ? stop_now : NULL;
        r.ctx.stop = WAYS[_i].stops ? is_stopped : NULL;
        status = measure_in(&r, &w, &sweep, &alone, &about, &err);
        ck_assert_int_lt(n_stops, 200);
    }
    r.ctx.progress = NULL;
    r.ctx.stop = NULL;
    kvq_test_ok(status, &err);
    ck_assert_int_ge(n_stops, WAYS[_i].stops ? (2 * L + 1) * N : 1); // after every window
    conclude(&r.ctx, about, &sweep, &alone, &got);
    expect_outcome(&got, &expected);
    kvq_artifact_destroy(&r.ctx, &about);
    rig_close(&r);
}
END_TEST

typedef struct rank_job {
    const char              *path;
    const kvq_sweep_options *sweep;
    kvq_processes            processes;
    kvq_artifact            *about;
    int                      events_left; // before rank 0 stops; 0 = never
    kvq_status               status;
} rank_job;

static void count_event(void *user, const kvq_progress *p) {
    (void)p;
    ((rank_job *)user)->events_left--;
}
static bool all_events_seen(void *user) { return ((rank_job *)user)->events_left <= 0; }

static void *run_rank(void *user) {
    rank_job   *job = user;
    rig         r;
    int32_t     ids[N * S];
    kvq_windows w = make_windows(N, S, ids);
    rig_open(&r, job->path, 1);
    r.ctx.user = job;
    r.ctx.progress = job->events_left > 0 ? count_event : NULL;
    r.ctx.stop = job->events_left > 0 ? all_events_seen : NULL;
    job->status = measure_in(&r, &w, job->sweep, &job->processes, &job->about, NULL);
    rig_close(&r);
    return NULL;
}

static kvq_status run_ranks(const char *path, const kvq_sweep_options *sweep, int n_ranks, int n_events,
                            rank_job jobs[MOST_RANKS]) {
    meeting   m = {.n_ranks = n_ranks};
    pthread_t threads[MOST_RANKS];
    ck_assert_int_eq(pthread_barrier_init(&m.barrier, NULL, (unsigned)n_ranks), 0);
    for (int i = 0; i < n_ranks; i++) {
        jobs[i] = (rank_job){
            .path = path, .sweep = sweep, .processes = meeting_rank(&m, i), .events_left = i == 0 ? n_events : 0};
        ck_assert_int_eq(pthread_create(&threads[i], NULL, run_rank, &jobs[i]), 0);
    }
    for (int i = 0; i < n_ranks; i++) (void)pthread_join(threads[i], NULL);
    (void)pthread_barrier_destroy(&m.barrier);
    for (int i = 1; i < n_ranks; i++) ck_assert_int_eq(jobs[i].status, jobs[0].status);
    return jobs[0].status;
}

// _i / 2 + 2 processes; every second time one of them is stopped again and again, which stops all.
START_TEST(processes_give_the_same_bytes) {
    char              path[256], folder[256];
    rank_job          jobs[MOST_RANKS];
    outcome           got;
    int               n_ranks = _i / 2 + 2, n_stops = 0;
    kvq_context       ctx = kvq_test_context();
    kvq_sweep_options sweep = sweep_in(folder, "ranks");
    make_model(path);
    outcome expected = undisturbed(path);
    while (run_ranks(path, &sweep, n_ranks, _i % 2 == 0 ? 0 : 2, jobs) == KVQ_ERR_INTERRUPTED)
        ck_assert_int_lt(++n_stops, 100);
    ck_assert_int_ge(n_stops, _i % 2 == 0 ? 0 : L);
    for (int i = 0; i < n_ranks; i++) {
        ck_assert_int_eq(jobs[i].status, KVQ_OK);
        conclude(&ctx, jobs[i].about, &sweep, &jobs[i].processes, &got);
        expect_outcome(&got, &expected);
        kvq_artifact_destroy(&ctx, &jobs[i].about);
    }
}
END_TEST

// ---------------------------------------------------------------- memory

typedef struct watched {
    counting_memory memory; // first, for the allocator finds it by its address
    int64_t         n_windows;
    bool            now;
} watched;

// A stop before the last window of each layer: what was seen is saved, and read when the run goes on.
static void stop_before_the_last(void *user, const kvq_progress *p) {
    watched *w = user;
    w->now = p->layer >= 0 && p->done % w->n_windows == w->n_windows - 1;
}
static bool watched_stops(void *user) { return ((watched *)user)->now; }

typedef struct memory_case {
    int               n_fractions;
    kvq_weighting_set weightings;
    bool              moments, stops, allocated;
    kvq_scope         scope; // of a matrix: so many ends are kept that the forward pass needs most
} memory_case;
static const memory_case MEMORY[] = {
    {1, KVQ_WEIGHTINGS_BASIC, false, false, true, KVQ_SCOPE_CHANNEL},
    {1, KVQ_WEIGHTINGS_BASIC, false, true, true, KVQ_SCOPE_CHANNEL},
    {2, KVQ_WEIGHTINGS_ALL, true, false, true, KVQ_SCOPE_CHANNEL},
    {2, KVQ_WEIGHTINGS_ALL, true, true, true, KVQ_SCOPE_CHANNEL},
    {2, KVQ_WEIGHTINGS_ALL, false, true, false, KVQ_SCOPE_CHANNEL},
    {1, KVQ_WEIGHTINGS_BASIC, true, true, false, KVQ_SCOPE_MATRIX},
};

// What is allocated at the worst moment is what the plan counts, beside the program: weights, activations, statistics.
// That moment is when statistics are saved, once a minute and before a stop.
START_TEST(the_plan_has_room_for_all) {
    enum { MANY = 30, LONG = 400 };
    static int32_t      ids[MANY * LONG];
    char                path[256], folder[256];
    rig                 r;
    kvq_windows         w = make_windows(MANY, LONG, ids);
    kvq_measure_options o = measure_options();
    kvq_sweep_options   sweep = sweep_in(folder, "counted");
    kvq_processes       alone = kvq_processes_single();
    kvq_calib_plan      plan;
    kvq_artifact       *about = NULL;
    kvq_error           err = {0};
    kvq_status          status = KVQ_ERR_INTERRUPTED;
    make_model(path);
    o.n_fractions = MEMORY[_i].n_fractions;
    o.weightings = MEMORY[_i].weightings;
    o.moments = MEMORY[_i].moments;
    o.allocated = MEMORY[_i].allocated;
    o.threshold_scope = MEMORY[_i].scope;
    if (o.n_fractions == 1) o.fractions[0] = FRACTION;
    rig_open(&r, path, 1);
    kvq_test_ok(kvq_calib_plan_make(&r.ctx, r.model, &o, MANY, LONG, 1, (kvq_calib_limits){0, 0}, &plan, &err), &err);
    kvq_context normal = r.ctx;
    watched     all = {.memory = {.inner = normal}, .n_windows = MANY};
    for (; status == KVQ_ERR_INTERRUPTED;) {
        r.ctx = counting_context(&all.memory);
        r.ctx.progress = MEMORY[_i].stops ? stop_before_the_last : NULL;
        r.ctx.stop = MEMORY[_i].stops ? watched_stops : NULL;
        all.now = false;
        status = kvq_measure(&r.ctx, r.be, r.model, &w, &o, &sweep, &alone, &about, &err);
        if (status == KVQ_OK) kvq_artifact_destroy(&r.ctx, &about);
        r.ctx = normal;
        ck_assert_int_eq(all.memory.now, 0);
    }
    kvq_test_ok(status, &err);
    int64_t planned = plan.memory_bytes - plan.program_bytes;
    ck_assert_int_le(all.memory.most, planned);
    if (MEMORY[_i].stops) ck_assert_int_ge(all.memory.most, planned / 2); // a plan that is far too large would pass
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- fits

typedef struct fitting {
    rig                  r;
    char                 folder[256];
    int32_t              ids[N * S];
    kvq_measure_options  o;
    kvq_sweep_options    sweep;
    kvq_artifact        *about;
    kvq_measured_layers *layers;
} fitting;

static void fitting_open(fitting *f) {
    char          path[256];
    kvq_processes alone = kvq_processes_single();
    kvq_windows   w = make_windows(N, S, f->ids);
    kvq_error     err = {0};
    make_model(path);
    f->about = NULL;
    f->o = measure_options();
    f->sweep = sweep_in(f->folder, "fits");
    rig_open(&f->r, path, 1);
    kvq_test_ok(measure_in(&f->r, &w, &f->sweep, &alone, &f->about, &err), &err);
    kvq_test_ok(kvq_measured_layers_open(&f->r.ctx, f->about, &f->o, &f->sweep, &alone, &f->layers, &err), &err);
}

static void fitting_close(fitting *f) {
    kvq_measured_layers_close(&f->r.ctx, &f->layers);
    kvq_artifact_destroy(&f->r.ctx, &f->about);
    rig_close(&f->r);
}

// Widths and rates of another artifact, also with other tables; and of one that was fitted with its own, the same
// numbers.
START_TEST(widths_of_another_artifact) {
    static fitting    f;
    kvq_alloc_options by_target = fit_options(0), means = fit_options(1);
    kvq_artifact     *like = NULL, *a = NULL;
    kvq_allocation    chosen = {.widths = NULL};
    kvq_error         err = {0};
    double            k_bits = 0, v_bits = 0;
    fitting_open(&f);
    kvq_test_ok(kvq_fit_allocated(&f.r.ctx, f.layers, &by_target, NULL, &like, NULL, &err), &err);
    means.v_bits = 2.5;
    means.v_dim = by_target.v_dim;
    means.v_rates = by_target.v_rates;
    means.outlier_fraction = by_target.outlier_fraction;
    kvq_test_ok(kvq_fit_allocated(&f.r.ctx, f.layers, &means, like, &a, &chosen, &err), &err);
    for (int l = 0; l < L; l++) {
        ck_assert_mem_eq(a->layers[l].k.widths, like->layers[l].k.widths, D);
        ck_assert_mem_eq(chosen.widths + l * D, like->layers[l].k.widths, D);
        ck_assert_int_eq(a->layers[l].v.bits, like->layers[l].v.bits);
        ck_assert_int_eq(chosen.rates[l], like->layers[l].v.bits);
        ck_assert_int_eq(a->layers[l].k.table_kind, KVQ_TABLE_AFFINE);
        for (int c = 0; c < D; c++) k_bits += like->layers[l].k.widths[c] / (double)(L * D);
        v_bits += like->layers[l].v.bits / 2.0 / L;
    }
    ck_assert_double_eq_tol(chosen.chosen.k_bits, k_bits, 1e-12);
    ck_assert_double_eq_tol(chosen.chosen.v_bits, v_bits, 1e-12);
    ck_assert(a->quantizer.target_bits == 0);
    kvq_allocation_free(&f.r.ctx, &chosen);
    kvq_artifact_destroy(&f.r.ctx, &a);
    kvq_test_ok(kvq_fit_allocated(&f.r.ctx, f.layers, &by_target, like, &a, NULL, &err), &err);
    for (int l = 0; l < L; l++) {
        const kvq_layer_quant *x = &a->layers[l], *y = &like->layers[l];
        ck_assert_int_eq(x->k.n_key_levels, y->k.n_key_levels);
        ck_assert_mem_eq(x->k.key_levels, y->k.key_levels, (size_t)y->k.n_key_levels * sizeof(float));
        ck_assert_mem_eq(x->v.codebook, y->v.codebook, (size_t)(y->v.n_levels * 2) * sizeof(float));
    }
    kvq_artifact_destroy(&f.r.ctx, &a);
    kvq_artifact_destroy(&f.r.ctx, &like);
    fitting_close(&f);
}
END_TEST

START_TEST(fits_that_cannot_be_are_refused) {
    static fitting    f;
    kvq_alloc_options o = fit_options(1), other;
    kvq_artifact     *like = NULL, *a = NULL, sentinel, *untouched = &sentinel;
    kvq_allocation    chosen = {.n_neighbours = 77};
    kvq_error         err = {0};
    fitting_open(&f);
    kvq_test_ok(kvq_fit_allocated(&f.r.ctx, f.layers, &o, NULL, &like, NULL, &err), &err);
    int64_t *sizes[] = {&like->model.n_layers, &like->model.n_kv_heads, &like->model.head_dim};
    for (int i = 0; i < 4; i++) {
        other = o;
        if (i < 3) {
            ++*sizes[i];
        } else {
            other.v_dim = 2;
            other.v_rates = 1u << 6 | 1u << 7 | 1u << 8;
        }
        kvq_test_failed(kvq_fit_allocated(&f.r.ctx, f.layers, &other, like, &untouched, &chosen, &err),
                        KVQ_ERR_MISMATCH, &err, "of another shape");
        if (i < 3) --*sizes[i];
    }
    float *rotation = like->quantizer.rotation;
    like->quantizer.rotation = NULL; // as of scheme nuq
    kvq_test_failed(kvq_fit_allocated(&f.r.ctx, f.layers, &o, like, &untouched, &chosen, &err), KVQ_ERR_MISMATCH, &err,
                    "not channel-allocated");
    like->quantizer.rotation = rotation;
    other = o;
    other.outlier_fraction = 0.01;
    kvq_test_failed(kvq_fit_allocated(&f.r.ctx, f.layers, &other, NULL, &untouched, &chosen, &err), KVQ_ERR_USAGE, &err,
                    "--outliers 1% was not measured");
    other = fit_options(0);
    other.target_bits = 1;
    kvq_test_failed(kvq_fit_allocated(&f.r.ctx, f.layers, &other, NULL, &untouched, &chosen, &err), KVQ_ERR_USAGE, &err,
                    "");
    f.o.allocated = false;
    kvq_test_failed(kvq_fit_allocated(&f.r.ctx, f.layers, &o, NULL, &untouched, &chosen, &err), KVQ_ERR_USAGE, &err,
                    "does not have what the channel-allocated format needs");
    f.o.allocated = true;
    ck_assert_ptr_eq(untouched, &sentinel);
    ck_assert_int_eq(chosen.n_neighbours, 77);
    kvq_test_ok(kvq_fit_allocated(&f.r.ctx, f.layers, &o, like, &a, NULL, &err), &err); // as it is
    kvq_artifact_destroy(&f.r.ctx, &a);
    kvq_artifact_destroy(&f.r.ctx, &like);
    fitting_close(&f);
}
END_TEST

// Memory that runs out at the n-th allocation, for every n. _i: with the widths of another artifact
START_TEST(every_failing_allocation_is_survived) {
    static fitting    f;
    kvq_alloc_options o = fit_options(1);
    kvq_artifact     *like = NULL, sentinel, *a = &sentinel;
    kvq_allocation    chosen = {.n_neighbours = 77};
    kvq_error         err = {0};
    kvq_status        status = KVQ_ERR_MEMORY;
    int64_t           n = 0;
    o.k_widths = 1u << 2 | 1u << 3;            // curves of few widths are fast,
    if (_i == 0) o.tables = KVQ_TABLE_CHANNEL; // and so are tables without maps
    fitting_open(&f);
    if (_i == 1) kvq_test_ok(kvq_fit_allocated(&f.r.ctx, f.layers, &o, NULL, &like, NULL, &err), &err);
    for (; status != KVQ_OK; n++) {
        limited_memory memory = {.inner = f.r.ctx, .left = n};
        kvq_context    limited = limited_context(&memory);
        status = kvq_fit_allocated(&limited, f.layers, &o, like, &a, &chosen, &err);
        ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
        if (status == KVQ_OK) {
            kvq_artifact_destroy(&limited, &a);
            kvq_allocation_free(&limited, &chosen);
        } else {
            ck_assert(a == &sentinel && chosen.n_neighbours == 77);
        }
        ck_assert_int_eq(memory.n_live, 0);
    }
    ck_assert_int_gt(n, 60);
    kvq_artifact_destroy(&f.r.ctx, &like);
    fitting_close(&f);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(no_way_changes_the_bytes, N_WAYS),
    KVQ_LOOP(processes_give_the_same_bytes, 4),
    KVQ_LOOP(the_plan_has_room_for_all, (int)(sizeof MEMORY / sizeof *MEMORY)),
    KVQ_CASE(widths_of_another_artifact),
    KVQ_CASE(fits_that_cannot_be_are_refused),
    KVQ_LOOP(every_failing_allocation_is_survived, 2),
};
KVQ_TEST_MAIN("allocate", CASES)
