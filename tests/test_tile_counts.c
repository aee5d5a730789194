// SPDX-License-Identifier: Apache-2.0
//
// What a measurement for the channel-allocated format counts, against a direct computation from everything that a layer
// was shown.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tile_rig.h"

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

static const kvq_test_case CASES[] = {KVQ_LOOP(counts_follow_from_what_is_seen, L)};
KVQ_TEST_MAIN("tile counts", CASES)
