// SPDX-License-Identifier: Apache-2.0
// Statistics of the channel-allocated format: counts of channels and of rotated values against sums by the definition,
// and their bytes.
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "histogram_test.h"
#include "limited_memory.h"

// ---------------------------------------------------------------- data

// More rows than a chunk and a slab; heads and channels that fill neither blocks nor chunks.
enum { N_ROWS = 600, HEADS = 3, DIM = 12, D = HEADS * DIM, CONSTANT = 7 };

typedef struct row_set {
    float          x[N_ROWS * D], gradients[N_ROWS * D], z[D], r[D], rotation[DIM * DIM];
    kvq_block_spec keys;
    kvq_tile_spec  values;
} row_set;

static void make_rotation(int n, float *rotation) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    const char *kind;
    kvq_test_ok(kvq_make_rotation(&ctx, KVQ_ROTATION_ORTHOGONAL, n, rotation, &kind, &err), &err);
}

// Keys with elements beyond their ranges on both sides and a constant channel; a row of zeros; gradients over decades.
static void random_rows(row_set *rows, int n_side) {
    for (int i = 0; i < N_ROWS * D; i++) {
        rows->x[i] = (float)(tan(2.6 * (uniform(1, i) - 0.5)) + i % D);
        if (i % D == CONSTANT) rows->x[i] = 0.25f;
        if (i / D == 11) rows->x[i] = 0;
        rows->gradients[i] = (float)(exp(15 * (uniform(2, i) - 1)) * (uniform(3, i) < 0.5 ? -1 : 1));
    }
    for (int c = 0; c < D; c++) {
        rows->z[c] = c == CONSTANT ? 0.25f : (float)c;
        rows->r[c] = c == CONSTANT ? 0 : 2.0f + 0.01f * (float)c;
    }
    rows->keys = (kvq_block_spec){.d = D, .bits = 3, .n_side = n_side, .z = rows->z, .r = rows->r};
    make_rotation(DIM, rows->rotation);
    rows->values = (kvq_tile_spec){.d = D,
                                   .head_dim = DIM,
                                   .dim = 1,
                                   .rotation = rows->rotation,
                                   .scale_format = n_side % 2 == 0 ? KVQ_SCALE_E4M3 : KVQ_SCALE_F16,
                                   .scale_exponent = 4};
}

static kvq_channel_counts *new_channels(int d) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_channel_counts *counts = NULL;
    kvq_test_ok(kvq_channel_counts_create(&ctx, d, &counts, &err), &err);
    return counts;
}

static kvq_value_counts *new_values(void) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_value_counts *counts = NULL;
    kvq_test_ok(kvq_value_counts_create(&ctx, &counts, &err), &err);
    return counts;
}

static kvq_status count_keys(const row_set *rows, int64_t first, int64_t n, int64_t n_skip, kvq_weighting weighting,
                             int n_threads, kvq_channel_counts *counts, kvq_error *err) {
    kvq_context ctx = kvq_test_context();
    ctx.n_threads = n_threads;
    return kvq_count_channels(&ctx, &rows->keys, rows->x + first * D,
                              kvq_weighting_needs_gradients(weighting) ? rows->gradients + first * D : NULL, weighting,
                              n, n_skip, counts, err);
}

static kvq_status count_values(const row_set *rows, int64_t first, int64_t n, int64_t n_skip, kvq_weighting weighting,
                               int n_threads, kvq_value_counts *counts, kvq_error *err) {
    kvq_context ctx = kvq_test_context();
    ctx.n_threads = n_threads;
    return kvq_count_values(&ctx, &rows->values, rows->x + first * D,
                            kvq_weighting_needs_gradients(weighting) ? rows->gradients + first * D : NULL, weighting, n,
                            n_skip, counts, err);
}

static double weight(kvq_weighting weighting, double g, double r) {
    const double weights[KVQ_N_WEIGHTINGS] = {1, g * g, g * g * (r * r), r * r};
    return weights[weighting];
}

// Taken from counts, by caller's arrays.
typedef struct channel_arrays {
    float                    w[D * KVQ_CHANNEL_BINS], x[D * KVQ_CHANNEL_BINS];
    double                   scatter[D];
    int64_t                  n_points[D], n_outliers[D];
    kvq_channel_distribution all;
} channel_arrays;

static void take_channels(const kvq_channel_counts *counts, channel_arrays *out) {
    kvq_error err = {0};
    out->all = (kvq_channel_distribution){out->w, out->x, out->scatter, out->n_points, out->n_outliers};
    kvq_test_ok(kvq_channel_distribution_take(counts, &out->all, &err), &err);
}

enum { CELLS = KVQ_PAIR_CELLS * KVQ_PAIR_CELLS };
typedef struct value_arrays {
    float                  w[KVQ_HISTOGRAM_BINS], x[KVQ_HISTOGRAM_BINS], pair_w[CELLS], pair_x[CELLS], pair_y[CELLS];
    double                 scatter[2];
    int64_t                n_points, exponent;
    kvq_value_distribution all;
} value_arrays;

static void take_values(const kvq_value_counts *counts, value_arrays *out) {
    kvq_error err = {0};
    out->exponent = 77;
    out->all = (kvq_value_distribution){out->w,      out->x,       out->pair_w,    out->pair_x,
                                        out->pair_y, out->scatter, &out->n_points, &out->exponent};
    kvq_test_ok(kvq_value_distribution_take(counts, &out->all, &err), &err);
    ck_assert_int_eq(out->exponent, 77); // the caller's
}

// ---------------------------------------------------------------- against the definition

// Sums of a bin or cell by the definition; the second pass adds squares about the means.
typedef struct plain_sums {
    double w, x, y;
} plain_sums;

static int plain_bin(double x, double width, int n) {
    double bin = floor(x / width) + n / 2; // widths are powers of two
    return bin < 0 ? 0 : bin > n - 1 ? n - 1 : (int)bin;
}

static void plain_add(plain_sums *s, double w, double x, double y) {
    s->w += w;
    s->x += w * x;
    s->y += w * y;
}

// f64 sums of N_ROWS * D elements at most are off by 2^-53 * 21600 < 2^-38 relative, what is taken is rounded to f32;
// fixed point loses 2^-86 an element.
static void expect_bin(float w, float x, plain_sums expected, double moment) {
    if (expected.w == 0 && w == 0 && x == 0) return; // most of them; Check is slow
    ck_assert_double_eq_tol((double)w, expected.w, 0x1p-23 * expected.w + 0x1p-70);
    if (expected.w > 0x1p-40) {
        double mean = moment / expected.w;
        ck_assert_double_eq_tol((double)x, mean, 0x1p-22 * fmax(fabs(mean), 1));
    }
    if (expected.w == 0) ck_assert(w == 0 && x == 0);
}

// Which elements of a row are outliers: beyond the edge, by falling |x'| and rising channel, n_side of each side.
static void plain_outliers(const row_set *rows, const float *x, bool *apart) {
    memset(apart, 0, D * sizeof *apart);
    for (int taken = 0; taken < 2 * rows->keys.n_side; taken++) {
        int   best = -1, side = taken % 2 == 0 ? 1 : -1;
        float most = KVQ_OUTLIER_EDGE;
        for (int c = 0; c < D; c++) {
            float beyond = rows->r[c] > 0 ? (float)side * ((x[c] - rows->z[c]) / rows->r[c]) : 0;
            if (apart[c] || !(beyond > most)) continue;
            best = c;
            most = beyond;
        }
        if (best >= 0) apart[best] = true;
    }
}

static void expect_channels(const row_set *rows, kvq_weighting weighting, int64_t n_skip, const channel_arrays *got) {
    static plain_sums sums[D][KVQ_CHANNEL_BINS];
    static bool       apart[N_ROWS][D];
    double            scatter[D] = {0}, squares[D] = {0};
    int64_t           n_points[D] = {0}, n_outliers[D] = {0};
    memset(sums, 0, sizeof sums);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = n_skip * D; i < N_ROWS * D; i++) {
            int64_t row = i / D, c = i % D;
            if (pass == 0 && c == 0) plain_outliers(rows, rows->x + i, apart[row]);
            if (!(rows->r[c] > 0)) continue;
            n_outliers[c] += pass == 0 && apart[row][c];
            if (apart[row][c]) continue;
            double      x = (double)((rows->x[i] - rows->z[c]) / rows->r[c]);
            double      w = weight(weighting, (double)rows->gradients[i], (double)rows->r[c]);
            plain_sums *bin = &sums[c][plain_bin(x, 0x1p-9, KVQ_CHANNEL_BINS)];
            n_points[c] += pass;
            squares[c] += pass * w * x * x;
            if (pass == 0)
                plain_add(bin, w, x, 0);
            else
                scatter[c] += bin->w > 0 ? w * (x - bin->x / bin->w) * (x - bin->x / bin->w) : 0;
        }
    }
    for (int c = 0; c < D; c++) {
        for (int b = 0; b < KVQ_CHANNEL_BINS; b++)
            expect_bin(got->w[c * KVQ_CHANNEL_BINS + b], got->x[c * KVQ_CHANNEL_BINS + b], sums[c][b], sums[c][b].x);
        ck_assert_double_eq_tol(got->scatter[c], scatter[c],
                                0x1p-38 * squares[c] + 0x1p-70); // a difference of what adds up
        ck_assert_int_eq(got->n_points[c], n_points[c]);
        ck_assert_int_eq(got->n_outliers[c], n_outliers[c]);
    }
    ck_assert(got->n_points[CONSTANT] == 0 && got->n_outliers[CONSTANT] == 0 && got->scatter[CONSTANT] == 0);
}

// _i: weighting, and outliers of a row per side
START_TEST(channels_follow_the_definition) {
    static row_set        rows;
    static channel_arrays got;
    kvq_context           ctx = kvq_test_context();
    kvq_error             err = {0};
    kvq_weighting         weighting = (kvq_weighting)(_i % KVQ_N_WEIGHTINGS);
    int                   n_side = _i / KVQ_N_WEIGHTINGS;
    kvq_channel_counts   *counts = new_channels(D);
    random_rows(&rows, n_side);
    kvq_test_ok(count_keys(&rows, 0, N_ROWS, 3, weighting, 2, counts, &err), &err);
    take_channels(counts, &got);
    expect_channels(&rows, weighting, 3, &got);
    int64_t n_outliers = 0;
    for (int c = 0; c < D; c++) n_outliers += got.n_outliers[c];
    ck_assert((n_outliers > 0) == (n_side > 0));
    kvq_channel_counts_destroy(&ctx, &counts);
    ck_assert_ptr_null(counts);
}
END_TEST

// The rule of kvq_tile_hd.h: sums in f32 in the order of the channels.
static float plain_rotate(const row_set *rows, const float *x, float *y) {
    float squares = 0;
    for (int i = 0; i < DIM; i++) {
        y[i] = 0;
        for (int j = 0; j < DIM; j++) y[i] += rows->rotation[i * DIM + j] * x[j];
        squares += y[i] * y[i];
    }
    return sqrtf(squares / (float)DIM);
}

static float plain_scale(const row_set *rows, float rms) {
    const kvq_tile_spec *s = &rows->values;
    if (s->scale_format == KVQ_SCALE_F16) return kvq_float_of_half(kvq_half_of_float(rms));
    return ldexpf(kvq_float_of_e4m3(kvq_e4m3_of_float(ldexpf(rms, -s->scale_exponent))), s->scale_exponent);
}

typedef struct plain_values {
    plain_sums bins[KVQ_HISTOGRAM_BINS], cells[KVQ_PAIR_CELLS][KVQ_PAIR_CELLS];
    double     scatter[2], squares[2];
    int64_t    n_points;
} plain_values;

static double about_mean(plain_sums s, double w, double x, double y) {
    if (!(s.w > 0)) return 0;
    return w * ((x - s.x / s.w) * (x - s.x / s.w) + (y - s.y / s.w) * (y - s.y / s.w));
}

static void plain_head(const row_set *rows, kvq_weighting weighting, int64_t at, int pass, plain_values *v) {
    float  y[DIM], g[DIM], s = plain_scale(rows, plain_rotate(rows, rows->x + at, y));
    double w[DIM], x[DIM];
    (void)plain_rotate(rows, rows->gradients + at, g);
    for (int i = 0; i < DIM && s > 0; i++) {
        w[i] = weight(weighting, (double)g[i], (double)s);
        x[i] = (double)(y[i] / s);
        plain_sums *bin = &v->bins[plain_bin(x[i], 0x1p-9, KVQ_HISTOGRAM_BINS)];
        v->squares[0] += pass * w[i] * x[i] * x[i];
        v->n_points += pass;
        if (pass == 0) plain_add(bin, w[i], x[i], 0);
        if (pass == 1) v->scatter[0] += about_mean(*bin, w[i], x[i], 0);
        if (i % 2 == 0) continue;
        double      mean = (w[i - 1] + w[i]) / 2;
        plain_sums *cell =
            &v->cells[plain_bin(x[i - 1], 0x1p-5, KVQ_PAIR_CELLS)][plain_bin(x[i], 0x1p-5, KVQ_PAIR_CELLS)];
        v->squares[1] += pass * mean * (x[i - 1] * x[i - 1] + x[i] * x[i]);
        if (pass == 0) plain_add(cell, mean, x[i - 1], x[i]);
        if (pass == 1) v->scatter[1] += about_mean(*cell, mean, x[i - 1], x[i]);
    }
}

// _i: weighting, and e4m3 or f16 scales
START_TEST(values_follow_the_definition) {
    static row_set      rows;
    static value_arrays got;
    static plain_values expected;
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_weighting       weighting = (kvq_weighting)(_i % KVQ_N_WEIGHTINGS);
    kvq_value_counts   *counts = new_values();
    random_rows(&rows, _i / KVQ_N_WEIGHTINGS);
    kvq_test_ok(count_values(&rows, 0, N_ROWS, 3, weighting, 2, counts, &err), &err);
    take_values(counts, &got);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t at = 3 * D; at < N_ROWS * D; at += DIM) plain_head(&rows, weighting, at, pass, &expected);
    }
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) expect_bin(got.w[i], got.x[i], expected.bins[i], expected.bins[i].x);
    for (int i = 0; i < CELLS; i++) {
        plain_sums cell = expected.cells[i / KVQ_PAIR_CELLS][i % KVQ_PAIR_CELLS];
        expect_bin(got.pair_w[i], got.pair_x[i], cell, cell.x);
        expect_bin(got.pair_w[i], got.pair_y[i], cell, cell.y);
    }
    for (int i = 0; i < 2; i++)
        ck_assert_double_eq_tol(got.scatter[i], expected.scatter[i], 0x1p-38 * expected.squares[i]);
    ck_assert_int_eq(got.n_points, expected.n_points);
    ck_assert_int_eq(got.n_points, (N_ROWS - 3 - 1) * D); // without the row of zeros
    kvq_value_counts_destroy(&ctx, &counts);
    ck_assert_ptr_null(counts);
}
END_TEST

// ---------------------------------------------------------------- by hand

static float weight_at(const kvq_channel_counts *counts, int c, int bin) {
    return (float)kvq_fixed_to_double(counts->bins[c * KVQ_CHANNEL_BINS + bin].w) * 1024;
}

// What finds no slot is in the end bin, at its own position; the largest are apart, the lower channel on a tie.
START_TEST(outliers_by_hand) {
    static channel_arrays got;
    kvq_context           ctx = kvq_test_context();
    kvq_error             err = {0};
    const float           z[6] = {0, 0, 0, 0, 0, 5}, r[6] = {1, 1, 1, 1, 2, 0};
    const float           x[6] = {3, -2, 3, 1.00005f, -0.5f, 9}; // 1.00005 is below the edge, the last one constant
    for (int n_side = 0; n_side < 3; n_side++) {
        kvq_block_spec      spec = {.d = 6, .n_side = n_side, .z = z, .r = r};
        kvq_channel_counts *counts = new_channels(6);
        kvq_test_ok(kvq_count_channels(&ctx, &spec, x, NULL, KVQ_WEIGHT_RANGE, 1, 0, counts, &err), &err);
        take_channels(counts, &got);
        const int64_t outliers[3][6] = {{0, 0, 0, 0, 0, 0}, {1, 1, 0, 0, 0, 0}, {1, 1, 1, 0, 0, 0}};
        for (int c = 0; c < 6; c++) {
            ck_assert_int_eq(got.n_outliers[c], outliers[n_side][c]);
            ck_assert_int_eq(got.n_points[c], c == 5 ? 0 : 1 - outliers[n_side][c]);
        }
        const int END = KVQ_CHANNEL_BINS - 1;
        ck_assert(weight_at(counts, 2, END) == (n_side < 2 ? 1.0f : 0.0f));
        ck_assert(got.x[2 * KVQ_CHANNEL_BINS + END] == (n_side < 2 ? 3.0f : 0.0f));
        ck_assert(weight_at(counts, 1, 0) == (n_side == 0 ? 1.0f : 0.0f));
        ck_assert(got.x[1 * KVQ_CHANNEL_BINS] == (n_side == 0 ? -2.0f : 0.0f));
        ck_assert(weight_at(counts, 3, END) == 1 && got.x[3 * KVQ_CHANNEL_BINS + END] == 1.00005f);
        ck_assert(weight_at(counts, 4, 384) == 4 && got.w[4 * KVQ_CHANNEL_BINS + 384] == 4); // -0.25, r^2 = 4
        kvq_channel_counts_destroy(&ctx, &counts);
    }
}
END_TEST

// Head (6, 8) has rms sqrt(50), in e4m3 with exponent 0: 7; (0.6, 0.8) has 0.6875 (between 0.6875 and 0.75 it is
// 0.7071). The rotation exchanges the channels, of gradients too.
START_TEST(values_by_hand) {
    static value_arrays got;
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    const float         rotation[4] = {0, 1, 1, 0}, x[6] = {6, 8, 0, 0, 0.6f, 0.8f}, g[6] = {2, -1, 5, 5, 0, 1};
    kvq_tile_spec       spec = {.d = 6, .head_dim = 2, .dim = 2, .rotation = rotation};
    kvq_value_counts   *counts = new_values();
    kvq_test_ok(kvq_count_values(&ctx, &spec, x, g, KVQ_WEIGHT_FISHER_SCALED, 1, 0, counts, &err), &err);
    take_values(counts, &got);
    const float  y[4] = {8.0f / 7, 6.0f / 7, 0.8f / 0.6875f, 0.6f / 0.6875f};
    const double w[4] = {49, 4 * 49, 0.6875 * 0.6875, 0};
    for (int i = 0; i < 4; i++) {
        int bin = plain_bin((double)y[i], 0x1p-9, KVQ_HISTOGRAM_BINS);
        ck_assert(got.w[bin] == (float)w[i] && (w[i] == 0 || got.x[bin] == y[i]));
    }
    for (int i = 0; i < 4; i += 2) {
        int cell = plain_bin((double)y[i], 0x1p-5, KVQ_PAIR_CELLS) * KVQ_PAIR_CELLS +
                   plain_bin((double)y[i + 1], 0x1p-5, KVQ_PAIR_CELLS);
        ck_assert(got.pair_w[cell] == (float)((w[i] + w[i + 1]) / 2));
        ck_assert(got.pair_x[cell] == y[i] && got.pair_y[cell] == y[i + 1]);
    }
    ck_assert_int_eq(got.n_points, 4);
    kvq_value_counts_destroy(&ctx, &counts);
}
END_TEST

// Beyond the reach of bins and cells: a scale that e4m3 cannot hold makes 16 of what should be about 1.
START_TEST(values_beyond_the_reach) {
    static value_arrays got;
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    const float         rotation[4] = {1, 0, 0, 1}, x[2] = {-448 * 16, 448 * 16};
    kvq_tile_spec       spec = {.d = 2, .head_dim = 2, .dim = 2, .rotation = rotation};
    kvq_value_counts   *counts = new_values();
    kvq_test_ok(kvq_count_values(&ctx, &spec, x, NULL, KVQ_WEIGHT_NONE, 1, 0, counts, &err), &err);
    take_values(counts, &got);
    ck_assert(got.w[0] == 1 && got.x[0] == -16 && got.w[KVQ_HISTOGRAM_BINS - 1] == 1);
    ck_assert(got.x[KVQ_HISTOGRAM_BINS - 1] == 16);
    ck_assert(got.pair_w[KVQ_PAIR_CELLS - 1] == 1); // lowest x, highest y
    ck_assert(got.pair_x[KVQ_PAIR_CELLS - 1] == -16 && got.pair_y[KVQ_PAIR_CELLS - 1] == 16);
    ck_assert(got.scatter[0] == 0 && got.scatter[1] == 0);
    kvq_value_counts_destroy(&ctx, &counts);
}
END_TEST

// Each element fits, but the position of one times the weight of the other does not: 2^13 * 2^28 = 2^41.
START_TEST(pairs_must_fit_too) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    const float       rotation[4] = {1, 0, 0, 1}, x[2] = {448 * 0x1p14f, 0};
    float             g[2] = {0, 0x1p7f};
    kvq_tile_spec     spec = {.d = 2, .head_dim = 2, .dim = 2, .rotation = rotation};
    kvq_value_counts *counts = new_values();
    kvq_test_failed(kvq_count_values(&ctx, &spec, x, g, KVQ_WEIGHT_FISHER, 1, 0, counts, &err), KVQ_ERR_NUMERICAL, &err,
                    "V, position 0, channel 1");
    g[1] /= 2;
    kvq_test_ok(kvq_count_values(&ctx, &spec, x, g, KVQ_WEIGHT_FISHER, 1, 0, counts, &err), &err);
    kvq_value_counts_destroy(&ctx, &counts);
}
END_TEST

START_TEST(odd_heads_have_no_pairs) {
    static value_arrays got;
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    float               rotation[9];
    const float         x[6] = {1, 2, 3, -1, 4, 2};
    kvq_tile_spec       spec = {.d = 6, .head_dim = 3, .dim = 1, .rotation = rotation};
    kvq_value_counts   *counts = new_values();
    make_rotation(3, rotation);
    kvq_test_ok(kvq_count_values(&ctx, &spec, x, NULL, KVQ_WEIGHT_NONE, 1, 0, counts, &err), &err);
    take_values(counts, &got);
    ck_assert_int_eq(got.n_points, 6);
    for (int i = 0; i < CELLS; i++) ck_assert(got.pair_w[i] == 0);
    kvq_value_counts_destroy(&ctx, &counts);
}
END_TEST

// ---------------------------------------------------------------- bytes

// Counts of either kind, so that what holds for both is said once.
typedef struct either {
    kvq_channel_counts *keys;
    kvq_value_counts   *values;
} either;

static either new_either(bool keys) { return (either){keys ? new_channels(D) : NULL, keys ? NULL : new_values()}; }

static void drop_either(either *e) {
    kvq_context ctx = kvq_test_context();
    kvq_channel_counts_destroy(&ctx, &e->keys);
    kvq_value_counts_destroy(&ctx, &e->values);
}

static kvq_status try_count(const row_set *rows, int64_t first, int64_t n, kvq_weighting weighting, int n_threads,
                            either e, kvq_error *err) {
    if (e.keys != NULL) return count_keys(rows, first, n, 0, weighting, n_threads, e.keys, err);
    return count_values(rows, first, n, 0, weighting, n_threads, e.values, err);
}

static void count(const row_set *rows, int64_t first, int64_t n, int n_threads, either e) {
    kvq_error err = {0};
    kvq_test_ok(try_count(rows, first, n, KVQ_WEIGHT_FISHER_SCALED, n_threads, e, &err), &err);
}

typedef struct bytes {
    uint8_t *at;
    int64_t  n;
} bytes;

static bytes pack(either e) {
    bytes b;
    b.n = e.keys != NULL ? kvq_channel_counts_packed_bytes(e.keys) : kvq_value_counts_packed_bytes(e.values);
    b.at = malloc((size_t)b.n + 1); // a byte more, for those that are too long
    ck_assert_ptr_nonnull(b.at);
    if (e.keys != NULL)
        kvq_channel_counts_pack(e.keys, b.at);
    else
        kvq_value_counts_pack(e.values, b.at);
    return b;
}

static kvq_status merge(either into, const uint8_t *at, int64_t n, kvq_error *err) {
    if (into.keys != NULL) return kvq_channel_counts_merge_packed(into.keys, at, n, err);
    return kvq_value_counts_merge_packed(into.values, at, n, err);
}

static void expect_same(either a, either b) {
    bytes x = pack(a), y = pack(b);
    ck_assert_int_eq(x.n, y.n);
    ck_assert_mem_eq(x.at, y.at, (size_t)x.n);
    if (a.keys != NULL)
        ck_assert_mem_eq(a.keys->bins, b.keys->bins, D * KVQ_CHANNEL_BINS * sizeof *a.keys->bins);
    else
        ck_assert_mem_eq(a.values->cells, b.values->cells, CELLS * sizeof *a.values->cells);
    free(x.at);
    free(y.at);
}

// _i: keys or values. Windows counted one after the other, by any number of threads, or merged from bytes in another
// order.
START_TEST(order_partition_and_threads_do_not_matter) {
    static row_set       rows;
    static const int64_t CUTS[] = {0, 1, 63, 330, 331, 590, N_ROWS};
    enum { N_PARTS = sizeof CUTS / sizeof *CUTS - 1 };
    kvq_error err = {0};
    either    whole = new_either(_i == 0), merged = new_either(_i == 0);
    random_rows(&rows, 1);
    count(&rows, 0, N_ROWS, 1, whole);
    for (int n_threads = 2; n_threads <= 3; n_threads++) {
        either threads = new_either(_i == 0);
        count(&rows, 0, N_ROWS, n_threads, threads);
        expect_same(whole, threads);
        drop_either(&threads);
    }
    for (int i = N_PARTS - 1; i >= 0; i--) {
        int    part = (i + 4) % N_PARTS;
        either e = new_either(_i == 0);
        count(&rows, CUTS[part], CUTS[part + 1] - CUTS[part], 1 + i % 3, e);
        bytes b = pack(e);
        kvq_test_ok(merge(merged, b.at, b.n, &err), &err);
        free(b.at);
        drop_either(&e);
    }
    expect_same(whole, merged);
    drop_either(&whole);
    drop_either(&merged);
}
END_TEST

// Where the numbers lie that damage is done to.
static void put_number(const bytes *b, int64_t at, int64_t value) { memcpy(b->at + at, &value, sizeof value); }

START_TEST(damaged_bytes_are_refused) {
    static row_set rows;
    bool           keys = _i == 0;
    kvq_error      err = {0};
    either         e = new_either(keys), other = new_either(keys);
    random_rows(&rows, 1);
    count(&rows, 20, 40, 1, e);
    // what stands before the bins; a bin is two sums and its index
    int64_t header = keys ? 8 + D * (16 + 8 + 8) : 2 * 16 + 8, points = keys ? 8 + D * 16 : 2 * 16, bin = 2 * 16 + 8;
    bytes   b = pack(e);
    const struct {
        int64_t     at, value, n; // at < 0: only the length is wrong
        const char *message;
    } DAMAGES[] = {
        {-1, 0, b.n - 1, "does not fit together"},
        {-1, 0, b.n + 1, "does not fit together"},
        {-1, 0, 5, "of 5 bytes does not fit together"},
        {-1, 0, 0, "of 0 bytes does not fit together"},
        {-1, 0, header + 4, "does not fit together"},
        {points, -1, b.n, "does not fit together"},
        {header, -1, b.n, "does not fit together"},
        {header, INT64_MAX, b.n, "does not fit together"},
        {header + 8 + 32, -1, b.n, "speaks of bin -1"},
        {header + 8 + 32, INT64_MAX, b.n, "speaks of bin 9223372036854775807"},
        {header + 8 + bin + 32, 0, b.n, "speaks of bin 0"}, // the second one, which cannot be the first
    };
    for (size_t i = 0; i < sizeof DAMAGES / sizeof *DAMAGES; i++) {
        if (DAMAGES[i].at >= 0) put_number(&b, DAMAGES[i].at, DAMAGES[i].value);
        kvq_test_failed(merge(other, b.at, DAMAGES[i].n, &err), KVQ_ERR_INTEGRITY, &err, DAMAGES[i].message);
        free(b.at);
        b = pack(e);
    }
    memset(b.at + header + 8, 0, 32); // a bin that would not have been packed
    kvq_test_failed(merge(other, b.at, b.n, &err), KVQ_ERR_INTEGRITY, &err, "speaks of bin");
    free(b.at);
    b = pack(e);
    if (keys) put_number(&b, 0, D + 1);
    if (keys)
        kvq_test_failed(merge(other, b.at, b.n, &err), KVQ_ERR_INTEGRITY, &err, "is of 37 channels instead of 36");
    free(b.at);
    drop_either(&e);
    drop_either(&other);
}
END_TEST

// Any number of doublings of what left the range stays refused.
START_TEST(sums_beyond_their_range_are_refused) {
    static row_set        rows;
    static channel_arrays channels;
    static value_arrays   values;
    kvq_error             err = {0};
    either                e = new_either(_i == 0);
    int                   n_refused = 0;
    random_rows(&rows, 1);
    kvq_test_ok(try_count(&rows, 0, N_ROWS, KVQ_WEIGHT_RANGE, 2, e, &err), &err);
    if (e.keys != NULL) take_channels(e.keys, &channels);
    if (e.values != NULL) take_values(e.values, &values);
    for (int doubling = 0; doubling < 45; doubling++) {
        bytes b = pack(e);
        kvq_test_ok(merge(e, b.at, b.n, &err), &err);
        free(b.at);
        kvq_status status = e.keys != NULL ? kvq_channel_distribution_take(e.keys, &channels.all, &err)
                                           : kvq_value_distribution_take(e.values, &values.all, &err);
        if (status == KVQ_OK) ck_assert_int_eq(n_refused, 0);
        if (status == KVQ_OK) continue;
        n_refused++;
        kvq_test_failed(status, KVQ_ERR_NUMERICAL, &err, _i == 0 ? "K, channel" : "V: ");
        kvq_test_failed(status, KVQ_ERR_NUMERICAL, &err, "add up to more than 2^41");
    }
    ck_assert_int_gt(n_refused, 10);
    drop_either(&e);
}
END_TEST

// ---------------------------------------------------------------- bad input

START_TEST(bad_rows_are_refused_with_their_place) {
    static row_set rows;
    kvq_error      err = {0};
    static const struct {
        bool          in_gradients;
        float         value;
        kvq_weighting weighting;
        const char   *keys, *values; // messages; NULL: fine
    } EXAMPLES[] = {
        {false, (float)NAN, KVQ_WEIGHT_NONE, "K, position 305: channel 3 is nan", "V, position 305: channel 3 is nan"},
        {false, -(float)INFINITY, KVQ_WEIGHT_NONE, "K, position 305: channel 3 is -inf", "position 305: channel 3 is"},
        {true, (float)NAN, KVQ_WEIGHT_FISHER, "K, position 305, channel 3 has the gradient nan",
         "V, position 305, channel 3 has the gradient nan"},
        {true, (float)INFINITY, KVQ_WEIGHT_FISHER, "K, position 305, channel 3 has the gradient inf", "gradient inf"},
        {true, 1e6f, KVQ_WEIGHT_FISHER, "K, position 305, channel 3 has weight 1e+12, which is beyond",
         "V, position 305, channel 0 has weight"},        // the rotation spreads it over the head
        {true, (float)NAN, KVQ_WEIGHT_RANGE, NULL, NULL}, // not looked at
        {false, 1e8f, KVQ_WEIGHT_NONE, "K, position 305, channel 3 lies 4.9", NULL},
        {false, FLT_MAX, KVQ_WEIGHT_NONE, "K, position 305, channel 3 lies", "V, position 305, channel 0 lies"},
    };
    for (size_t i = 0; i < 2 * sizeof EXAMPLES / sizeof *EXAMPLES; i++) {
        bool        keys = i % 2 == 0;
        const char *message = keys ? EXAMPLES[i / 2].keys : EXAMPLES[i / 2].values;
        either      e = new_either(keys), empty = new_either(keys);
        random_rows(&rows, 0);
        (EXAMPLES[i / 2].in_gradients ? rows.gradients : rows.x)[305 * D + 3] = EXAMPLES[i / 2].value;
        kvq_status status = try_count(&rows, 0, N_ROWS, EXAMPLES[i / 2].weighting, 1 + (int)i % 3, e, &err);
        if (message == NULL) kvq_test_ok(status, &err);
        if (message != NULL) kvq_test_failed(status, KVQ_ERR_NUMERICAL, &err, message);
        if (message != NULL && keys) expect_same(e, empty);
        // rows that are skipped are not looked at
        status = keys ? count_keys(&rows, 0, N_ROWS, 306, EXAMPLES[i / 2].weighting, 1, e.keys, &err)
                      : count_values(&rows, 0, N_ROWS, 306, EXAMPLES[i / 2].weighting, 1, e.values, &err);
        kvq_test_ok(status, &err);
        drop_either(&e);
        drop_either(&empty);
    }
}
END_TEST

START_TEST(bad_arguments_are_refused) {
    static row_set rows;
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    either         keys = new_either(true), values = new_either(false);
    random_rows(&rows, 1);
    kvq_test_failed(try_count(&rows, 0, -1, KVQ_WEIGHT_NONE, 1, keys, &err), KVQ_ERR_USAGE, &err, "K: -1 rows");
    kvq_test_failed(count_values(&rows, 0, 4, -2, KVQ_WEIGHT_NONE, 1, values.values, &err), KVQ_ERR_USAGE, &err,
                    "V: 4 rows of which -2 are skipped");
    kvq_test_failed(kvq_count_channels(&ctx, &rows.keys, rows.x, NULL, KVQ_WEIGHT_FISHER, 4, 0, keys.keys, &err),
                    KVQ_ERR_USAGE, &err, "K: weights \"fisher\" without gradients");
    kvq_test_failed(
        kvq_count_values(&ctx, &rows.values, rows.x, NULL, KVQ_WEIGHT_FISHER_SCALED, 4, 0, values.values, &err),
        KVQ_ERR_USAGE, &err, "V: weights \"fisher-scaled\" without gradients");
    rows.values.head_dim = 5;
    kvq_test_failed(try_count(&rows, 0, 4, KVQ_WEIGHT_NONE, 1, values, &err), KVQ_ERR_USAGE, &err,
                    "36 channels of heads of 5");
    random_rows(&rows, D / 2);
    kvq_test_failed(try_count(&rows, 0, 4, KVQ_WEIGHT_NONE, 1, keys, &err), KVQ_ERR_USAGE, &err,
                    "K: rows of 36 channels cannot have 18 outliers on each side");
    random_rows(&rows, 1);
    rows.r[9] = -1;
    kvq_test_failed(try_count(&rows, 0, 4, KVQ_WEIGHT_NONE, 1, keys, &err), KVQ_ERR_NUMERICAL, &err, "K, channel 9");
    random_rows(&rows, 1); // f16 scales
    for (int c = 0; c < DIM; c++) rows.x[5 * D + DIM + c] = 1e5f;
    kvq_test_failed(try_count(&rows, 0, N_ROWS, KVQ_WEIGHT_NONE, 2, values, &err), KVQ_ERR_NUMERICAL, &err,
                    "V, position 5, head 1: the scale of its values exceeds f16");
    random_rows(&rows, 0); // e4m3 scales
    for (int c = 0; c < DIM; c++) rows.x[5 * D + c] = FLT_MAX;
    kvq_test_failed(try_count(&rows, 0, N_ROWS, KVQ_WEIGHT_NONE, 2, values, &err), KVQ_ERR_NUMERICAL, &err,
                    "V, position 5, head 0: rotated, it leaves the range of f32");
    kvq_test_ok(try_count(&rows, 0, 0, KVQ_WEIGHT_NONE, 1, keys, &err), &err); // no rows are fine
    kvq_test_ok(count_values(&rows, 0, 4, 9, KVQ_WEIGHT_NONE, 1, values.values, &err), &err);
    drop_either(&keys);
    drop_either(&values);
}
END_TEST

// ---------------------------------------------------------------- memory

static kvq_status whole_stage(const kvq_context *ctx, const row_set *rows, kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_measure_options o = {.n_fractions = 2, .weightings = KVQ_WEIGHTINGS_BASIC, .moments = true, .allocated = true};
    kvq_measured_layer *layer = NULL;
    kvq_channel_counts *keys = NULL;
    kvq_value_counts   *values = NULL;
    const char         *kind;
    float               rotation[7 * 7];
    KVQ_TRY(kvq_measured_layer_create(ctx, &o, HEADS, HEADS, DIM, &layer, err));
    KVQ_TRY(kvq_make_rotation(ctx, KVQ_ROTATION_ORTHOGONAL, 7, rotation, &kind, err));
    KVQ_TRY(kvq_channel_counts_create(ctx, D, &keys, err));
    KVQ_TRY(kvq_value_counts_create(ctx, &values, err));
    KVQ_TRY(kvq_count_channels(ctx, &rows->keys, rows->x, rows->gradients, KVQ_WEIGHT_FISHER, 9, 0, keys, err));
    KVQ_TRY(kvq_count_values(ctx, &rows->values, rows->x, rows->gradients, KVQ_WEIGHT_FISHER, 9, 0, values, err));
    KVQ_TRY(kvq_channel_distribution_take(keys, &layer->k[0].channels, err));
    KVQ_TRY(kvq_value_distribution_take(values, &layer->rotated, err));
done:
    kvq_value_counts_destroy(ctx, &values);
    kvq_channel_counts_destroy(ctx, &keys);
    kvq_measured_layer_destroy(ctx, &layer);
    return status;
}

// Every allocation in turn is made to fail: the status says so and nothing is left behind.
START_TEST(no_allocation_failure_leaks) {
    static row_set rows;
    kvq_status     status = KVQ_ERR_MEMORY;
    int            n_failures = 0;
    random_rows(&rows, 1);
    for (; status != KVQ_OK; n_failures++) {
        limited_memory memory = {kvq_test_context(), n_failures, 0};
        kvq_context    ctx = limited_context(&memory);
        kvq_error      err = {0};
        ctx.n_threads = 1;
        status = whole_stage(&ctx, &rows, &err);
        ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
        ck_assert_int_eq(memory.n_live, 0);
    }
    ck_assert_int_gt(n_failures, 50);
}
END_TEST

// What a plan of memory counts on is what is asked for; allocations are rounded up to 64 bytes.
static void *counting_alloc(void *user, size_t n) {
    *(int64_t *)user += (int64_t)n;
    return aligned_alloc(64, n);
}
static void counting_release(void *user, void *p) {
    (void)user;
    free(p);
}

START_TEST(bytes_are_those_in_memory) {
    int64_t             n_bytes = 0;
    kvq_context         ctx = {.n_threads = 1, .alloc = counting_alloc, .release = counting_release, .user = &n_bytes};
    kvq_channel_counts *keys = NULL;
    kvq_value_counts   *values = NULL;
    kvq_error           err = {0};
    kvq_test_ok(kvq_channel_counts_create(&ctx, 37, &keys, &err), &err);
    ck_assert(n_bytes >= kvq_channel_counts_bytes(37) && n_bytes < kvq_channel_counts_bytes(37) + 5 * 64);
    n_bytes = 0;
    kvq_test_ok(kvq_value_counts_create(&ctx, &values, &err), &err);
    ck_assert(n_bytes >= kvq_value_counts_bytes() && n_bytes < kvq_value_counts_bytes() + 3 * 64);
    kvq_channel_counts_destroy(&ctx, &keys);
    kvq_value_counts_destroy(&ctx, &values);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(channels_follow_the_definition, 3 * KVQ_N_WEIGHTINGS),
    KVQ_LOOP(values_follow_the_definition, 2 * KVQ_N_WEIGHTINGS),
    KVQ_CASE(outliers_by_hand),
    KVQ_CASE(values_by_hand),
    KVQ_CASE(values_beyond_the_reach),
    KVQ_CASE(pairs_must_fit_too),
    KVQ_CASE(odd_heads_have_no_pairs),
    KVQ_LOOP(order_partition_and_threads_do_not_matter, 2),
    KVQ_LOOP(damaged_bytes_are_refused, 2),
    KVQ_LOOP(sums_beyond_their_range_are_refused, 2),
    KVQ_CASE(bad_rows_are_refused_with_their_place),
    KVQ_CASE(bad_arguments_are_refused),
    KVQ_CASE(no_allocation_failure_leaks),
    KVQ_CASE(bytes_are_those_in_memory),
};
KVQ_TEST_MAIN("channels", CASES)
