// SPDX-License-Identifier: Apache-2.0
//
// Measurements for the channel-allocated format and the fits from them, as a whole: the same bytes however a run was
// interrupted or spread, what is counted against a direct computation, the memory that was planned, and failures.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calib_rig.h"
#include "counting_memory.h"
#include "kvq_make_model.h"
#include "kvq_test.h"
#include "limited_memory.h"
#include "played_processes.h"

enum { N = 5, S = 40, L = 3, HEADS = 2, DIM = 16, D = HEADS * DIM, SINKS = 2 };
#define FRACTION 0.05

static void make_model(char path[256]) {
    kvq_make_options options = kvq_make_options_default();
    options.n_layers = L;
    options.attention_bias = true; // with which the exponent of scales is not 0 everywhere
    (void)snprintf(path, 256, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
}

static kvq_windows make_windows(int64_t n, int64_t seq_len, int32_t *ids) {
    for (int64_t i = 0; i < n * seq_len; i++)
        ids[i] = (int32_t)kvq_rng_below(2, KVQ_RNG_TEST, 60, (uint64_t)i, KVQ_MAKE_N_TOKENS);
    return (kvq_windows){.n_windows = n, .seq_len = seq_len, .ids = ids, .source = "test"};
}

// One slot a side, so that some of what lies beyond the thresholds finds none.
static kvq_measure_options measure_options(void) {
    kvq_measure_options o = kvq_calib_options_default().measure;
    o.n_fractions = 2;
    o.fractions[0] = 0;
    o.fractions[1] = FRACTION;
    o.sink_tokens = SINKS;
    o.k_slots = 1;
    kvq_measure_for_tiles(&o);
    return o;
}

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

static kvq_sweep_options sweep_in(char folder[256], const char *name) {
    (void)snprintf(folder, 256, "%s/%s", kvq_test_folder(), name);
    return (kvq_sweep_options){.work_dir = folder, .stride = 1, .n_shards = 1, .prefetch = true};
}

static kvq_status measure_in(rig *r, const kvq_windows *w, const kvq_sweep_options *sweep, const kvq_processes *p,
                             kvq_artifact **about, kvq_error *err) {
    kvq_measure_options o = measure_options();
    return kvq_measure(&r->ctx, r->be, r->model, w, &o, sweep, p, about, err);
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

// ---------------------------------------------------------------- against a direct computation

// Everything that one layer was shown.
typedef struct captured {
    int64_t layer;
    float   k[N][S * D], v[N][S * D], dk[N][S * D], dv[N][S * D];
} captured;

static kvq_status begin_nothing(void *user, kvq_pass pass, int64_t layer, kvq_error *err) {
    (void)user, (void)pass, (void)layer, (void)err;
    return KVQ_OK;
}
static kvq_status finish_nothing(void *user, kvq_pass pass, int64_t layer, kvq_blob *result, kvq_error *err) {
    (void)user, (void)pass, (void)layer, (void)result, (void)err;
    return KVQ_OK;
}
static kvq_status keep_window(void *user, kvq_pass pass, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    captured *c = user;
    (void)err;
    if (layer != c->layer || pass == KVQ_PASS_FORWARD) return KVQ_OK;
    memcpy(c->k[seen->window], seen->k, sizeof c->k[0]);
    memcpy(c->v[seen->window], seen->v, sizeof c->v[0]);
    memcpy(c->dk[seen->window], seen->dk, sizeof c->dk[0]);
    memcpy(c->dv[seen->window], seen->dv, sizeof c->dv[0]);
    return KVQ_OK;
}

static void capture(rig *r, const kvq_windows *w, captured *c) {
    char              folder[256];
    kvq_sweep_options sweep = sweep_in(folder, "captured");
    kvq_processes     alone = kvq_processes_single();
    kvq_loss_sum      loss;
    kvq_error         err = {0};
    kvq_observer      o = {.user = c,
                           .wants_second_pass = true,
                           .wants_gradients = true,
                           .begin = begin_nothing,
                           .window = keep_window,
                           .finish = finish_nothing};
    kvq_test_ok(kvq_sweep(&r->ctx, r->be, r->model, w, &sweep, &alone, &o, &loss, &err), &err);
}

// Bounds of the weight and moments of a bin or cell: an element whose place is not known exactly counts in all that it
// may be in, but only in the upper bound.
typedef struct bounds {
    double surely, maybe;
} bounds;

// A position as computed in f32 is off by at most this: 16 products of a rotation and of numbers of at most 4 scales,
// divided by a rounded scale, make 16 * 2^-24 * 16; keys have less.
#define UNSURE 1.6e-5

// Bins [*first, *last] that a position may be in.
static void places(double x, double reach, int n, int *first, int *last) {
    double low = floor((x - UNSURE + reach) / (2 * reach) * n), high = floor((x + UNSURE + reach) / (2 * reach) * n);
    *first = (int)fmin(fmax(low, 0), n - 1);
    *last = (int)fmin(fmax(high, 0), n - 1);
}

static void put(bounds *bins, double w, double x, double reach, int n) {
    int first, last;
    places(x, reach, n, &first, &last);
    for (int i = first; i <= last; i++) bins[i].maybe += w;
    if (first == last) bins[first].surely += w;
}

static void put_pair(bounds *cells, double w, const double x[2]) {
    int first[2], last[2];
    for (int i = 0; i < 2; i++) places(x[i], (double)KVQ_PAIR_REACH, KVQ_PAIR_CELLS, &first[i], &last[i]);
    for (int i = first[0]; i <= last[0]; i++) {
        for (int j = first[1]; j <= last[1]; j++) cells[i * KVQ_PAIR_CELLS + j].maybe += w;
    }
    if (first[0] == last[0] && first[1] == last[1]) cells[first[0] * KVQ_PAIR_CELLS + first[1]].surely += w;
}

// Weights are squares of gradients that f32 sums of 16 products made, of signs that may cancel: those of a bin are off
// by 1e-4 of themselves, or by what is nothing beside the total.
static void expect_bounds(const float *w, const bounds *expected, int64_t n, double total) {
    for (int64_t i = 0; i < n; i++) {
        if (w[i] == 0 && expected[i].surely == 0) continue; // most of them; Check is slow
        ck_assert_double_ge((double)w[i], expected[i].surely * (1 - 1e-4) - 1e-9 * total);
        ck_assert_double_le((double)w[i], expected[i].maybe * (1 + 1e-4) + 1e-9 * total);
    }
}

static double sum_of(const float *w, const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)w[i] * (x != NULL ? (double)x[i] : 1);
    return sum;
}

// Sylvester's doubling of (1), divided by the square root of its order.
static void make_hadamard(double h[DIM][DIM]) {
    h[0][0] = 1 / sqrt(DIM);
    for (int n = 1; n < DIM; n *= 2) {
        for (int i = 0; i < n * n; i++) {
            double x = h[i / n][i % n];
            h[i / n][i % n + n] = h[i / n + n][i % n] = x;
            h[i / n + n][i % n + n] = -x;
        }
    }
}

// The nearest of all numbers that e4m3 has from 0 up, by its definition; even codes on a tie.
static double round_e4m3(double x) {
    double best = 0, distance = x;
    int    best_code = 0;
    for (int code = 1; code < 127; code++) {
        int    exponent = code / 8, mantissa = code % 8;
        double value = exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, exponent - 10);
        double away = fabs(value - x);
        if (away > distance || (away == distance && best_code % 2 == 0)) continue;
        best = value;
        distance = away;
        best_code = code;
    }
    return best;
}

typedef struct plain_values {
    bounds  bins[KVQ_HISTOGRAM_BINS], cells[KVQ_PAIR_CELLS * KVQ_PAIR_CELLS];
    double  w, wx, wxx, pair_w, pair_wxx; // sums
    int64_t n_points;
    int     exponent;
} plain_values;

// The power of two nearest to the root of the mean square, by ratio.
static int plain_exponent(const captured *c) {
    double sum = 0;
    for (int i = 0; i < N * S * D; i++) {
        double x = (double)c->v[i / (S * D)][i % (S * D)];
        sum += i % (S * D) >= SINKS * D ? x * x : 0;
    }
    return (int)lround(log2(sqrt(sum / (N * (S - SINKS) * D))));
}

static void add_head(double h[DIM][DIM], const float *v, const float *dv, plain_values *out) {
    double y[DIM] = {0}, g[DIM] = {0}, squares = 0, w[DIM];
    for (int i = 0; i < DIM * DIM; i++) {
        y[i / DIM] += h[i / DIM][i % DIM] * (double)v[i % DIM];
        g[i / DIM] += h[i / DIM][i % DIM] * (double)dv[i % DIM];
    }
    for (int i = 0; i < DIM; i++) squares += y[i] * y[i];
    double scale = ldexp(round_e4m3(ldexp(sqrt(squares / DIM), -out->exponent)), out->exponent);
    for (int i = 0; i < DIM; i++) {
        w[i] = g[i] * g[i] * scale * scale;
        y[i] /= scale;
        put(out->bins, w[i], y[i], (double)KVQ_VALUE_REACH, KVQ_HISTOGRAM_BINS);
        out->w += w[i];
        out->wx += w[i] * y[i];
        out->wxx += w[i] * y[i] * y[i];
        out->n_points++;
        if (i % 2 == 0) continue;
        double pair = (w[i - 1] + w[i]) / 2;
        put_pair(out->cells, pair, &y[i - 1]);
        out->pair_w += pair;
        out->pair_wxx += pair * (y[i - 1] * y[i - 1] + y[i] * y[i]);
    }
}

// Sums of w x^2 from what was stored: means of bins and what scatters about them.
static double squares_of(const float *w, const float *x, int64_t n, double scatter) {
    for (int64_t i = 0; i < n; i++) scatter += (double)w[i] * (double)x[i] * (double)x[i];
    return scatter;
}

static void expect_values(const captured *c, const kvq_value_distribution *got) {
    static plain_values expected;
    enum { CELLS = KVQ_PAIR_CELLS * KVQ_PAIR_CELLS };
    double h[DIM][DIM];
    memset(&expected, 0, sizeof expected);
    make_hadamard(h);
    expected.exponent = plain_exponent(c);
    for (int w = 0; w < N; w++) {
        for (int at = SINKS * D; at < S * D; at += DIM) add_head(h, &c->v[w][at], &c->dv[w][at], &expected);
    }
    ck_assert_int_eq(*got->scale_exponent, expected.exponent);
    ck_assert_int_eq(*got->n_points, expected.n_points);
    ck_assert_double_gt(expected.w, 0);
    expect_bounds(got->w, expected.bins, KVQ_HISTOGRAM_BINS, expected.w);
    expect_bounds(got->pair_w, expected.cells, CELLS, expected.pair_w);
    // f32 before the sums, 1e-6 of each, and f32 as stored
    ck_assert_double_eq_tol(sum_of(got->w, NULL, KVQ_HISTOGRAM_BINS), expected.w, 1e-5 * expected.w);
    ck_assert_double_eq_tol(sum_of(got->w, got->x, KVQ_HISTOGRAM_BINS), expected.wx,
                            1e-5 * sqrt(expected.w * expected.wxx));
    ck_assert_double_eq_tol(squares_of(got->w, got->x, KVQ_HISTOGRAM_BINS, got->scatter[0]), expected.wxx,
                            1e-5 * expected.wxx);
    ck_assert_double_eq_tol(sum_of(got->pair_w, NULL, CELLS), expected.pair_w, 1e-5 * expected.pair_w);
    ck_assert_double_eq_tol(squares_of(got->pair_w, got->pair_x, CELLS, 0) +
                                squares_of(got->pair_w, got->pair_y, CELLS, got->scatter[1]),
                            expected.pair_wxx, 1e-5 * expected.pair_wxx);
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// The quantile q of a sorted sample by linear interpolation, as f16.
static float plain_quantile(const float *sorted, int n, double q) {
    double at = q * (n - 1);
    int    low = (int)floor(at), high = low + 1 < n ? low + 1 : n - 1;
    double x = (double)sorted[low] + (at - low) * ((double)sorted[high] - (double)sorted[low]);
    return kvq_float_of_half(kvq_half_of_float((float)x));
}

static void plain_thresholds(const captured *c, int channel, double fraction, float *lower, float *upper) {
    float sample[N * (S - SINKS)];
    int   n = 0;
    for (int i = 0; i < N * S; i++) {
        if (i % S >= SINKS) sample[n++] = c->k[i / S][i % S * D + channel];
    }
    qsort(sample, (size_t)n, sizeof *sample, compare_floats);
    *lower = plain_quantile(sample, n, fraction / 2);
    *upper = plain_quantile(sample, n, 1 - fraction / 2);
}

// The one element of a row that lies farthest beyond on a side, or -1.
static int farthest(const float *x, const float *lower, const float *upper, int side) {
    int    best = -1;
    double most = (double)KVQ_OUTLIER_EDGE;
    for (int c = 0; c < D; c++) {
        double middle = ((double)upper[c] + (double)lower[c]) / 2, half = ((double)upper[c] - (double)lower[c]) / 2;
        double beyond = side * ((double)x[c] - middle) / half;
        if (!(beyond > most)) continue;
        best = c;
        most = beyond;
    }
    return best;
}

static void expect_keys(const captured *c, double fraction, const kvq_measured_tensor *got) {
    static bounds bins[D][KVQ_CHANNEL_BINS];
    double        total[D] = {0}, squares[D] = {0};
    int64_t       n_points[D] = {0}, n_outliers[D] = {0};
    memset(bins, 0, sizeof bins);
    for (int i = 0; i < D; i++) {
        float lower, upper;
        plain_thresholds(c, i, fraction, &lower, &upper);
        ck_assert(got->lower[i] == lower && got->upper[i] == upper);
    }
    for (int row = 0; row < N * S; row++) {
        const float *x = &c->k[row / S][row % S * D], *g = &c->dk[row / S][row % S * D];
        int          high = farthest(x, got->lower, got->upper, 1), low = farthest(x, got->lower, got->upper, -1);
        for (int i = 0; i < D && row % S >= SINKS; i++) {
            double r = ((double)got->upper[i] - (double)got->lower[i]) / 2;
            double at = ((double)x[i] - ((double)got->upper[i] + (double)got->lower[i]) / 2) / r;
            double w = (double)g[i] * (double)g[i] * r * r;
            bool   apart = fraction > 0 && (i == high || i == low);
            n_outliers[i] += apart;
            if (apart) continue;
            n_points[i]++;
            total[i] += w;
            squares[i] += w * at * at;
            put(bins[i], w, at, 1, KVQ_CHANNEL_BINS);
        }
    }
    for (int i = 0; i < D; i++) {
        const kvq_channel_distribution *ch = &got->channels;
        const float                    *w = ch->w + i * KVQ_CHANNEL_BINS, *x = ch->x + i * KVQ_CHANNEL_BINS;
        ck_assert_int_eq(ch->n_points[i], n_points[i]);
        ck_assert_int_eq(ch->n_outliers[i], n_outliers[i]);
        expect_bounds(w, bins[i], KVQ_CHANNEL_BINS, total[i]);
        ck_assert_double_eq_tol(sum_of(w, NULL, KVQ_CHANNEL_BINS), total[i], 1e-5 * total[i]);
        // means of the end bins are stored as they are, also beyond the range
        ck_assert_double_eq_tol(squares_of(w, x, KVQ_CHANNEL_BINS, ch->scatter[i]), squares[i], 1e-5 * squares[i]);
    }
}

// _i: the layer
START_TEST(counts_follow_from_what_is_seen) {
    static captured     c;
    char                path[256], folder[256], file[300], sha256[KVQ_SHA256_HEX];
    int32_t             ids[N * S];
    rig                 r;
    kvq_windows         w = make_windows(N, S, ids);
    kvq_measure_options o = measure_options();
    kvq_sweep_options   sweep = sweep_in(folder, "measured");
    kvq_processes       alone = kvq_processes_single();
    kvq_artifact       *about = NULL;
    kvq_measurement    *measurement = NULL;
    kvq_measured_layer *layer = NULL;
    kvq_error           err = {0};
    make_model(path);
    rig_open(&r, path, 2);
    (void)snprintf(file, sizeof file, "%s/m.kvqm.h5", kvq_test_folder());
    kvq_test_ok(measure_in(&r, &w, &sweep, &alone, &about, &err), &err);
    kvq_test_ok(kvq_measure_write(&r.ctx, about, &o, &sweep, &alone, file, true, false, sha256, &err), &err);
    kvq_test_ok(kvq_measurement_open(&r.ctx, file, &measurement, &err), &err);
    kvq_test_ok(kvq_measurement_read(&r.ctx, measurement, _i, &layer, &err), &err);
    c.layer = _i;
    capture(&r, &w, &c);
    expect_values(&c, &layer->rotated);
    for (int f = 0; f < 2; f++) expect_keys(&c, o.fractions[f], &layer->k[f]);
    kvq_measured_layer_destroy(&r.ctx, &layer);
    kvq_measurement_close(&r.ctx, &measurement);
    kvq_artifact_destroy(&r.ctx, &about);
    rig_close(&r);
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
    KVQ_LOOP(counts_follow_from_what_is_seen, L),
    KVQ_LOOP(the_plan_has_room_for_all, (int)(sizeof MEMORY / sizeof *MEMORY)),
    KVQ_CASE(widths_of_another_artifact),
    KVQ_CASE(fits_that_cannot_be_are_refused),
    KVQ_LOOP(every_failing_allocation_is_survived, 2),
};
KVQ_TEST_MAIN("allocate", CASES)
