// SPDX-License-Identifier: Apache-2.0
// The codec: bytes against a second, slow implementation of the rules; packing; outliers; error bounds; fixed points.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_block_hd.h"
#include "units.h"

enum { MAX_D = 640, MAX_ROW = 4096, GUARD = 64, MAX_SIDE = 150, MAX_TABLES = 8, MAX_LEVELS = 1 << KVQ_MAX_BITS };

static double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(31, KVQ_RNG_TEST, stream, (uint64_t)index);
}

// One row with everything around it.
typedef struct example {
    kvq_block_spec    spec;
    float             x[MAX_D], y[MAX_D], z[MAX_D], r[MAX_D], grid_z[MAX_D];
    float             levels[MAX_TABLES * MAX_LEVELS], decoded[MAX_TABLES * MAX_LEVELS];
    float             keys[2][MAX_SIDE];
    uint16_t          channels[2][MAX_SIDE];
    kvq_block_scratch scratch;
    uint8_t           memory[GUARD + MAX_ROW + GUARD], *row;
} example;

static void init_example(example *e, bool is_key, int d, int bits, int n_side) {
    memset(e, 0xA5, sizeof *e);
    e->row = e->memory + GUARD;
    kvq_block_spec    spec = {.d = d, .bits = bits, .n_side = n_side, .levels = e->levels};
    kvq_block_scratch scratch = {e->keys[0], e->keys[1], e->channels[0], e->channels[1], 0, 0};
    if (is_key) spec.z = e->z, spec.r = e->r;
    e->spec = spec;
    e->scratch = scratch;
    for (int i = 0; i < 1 << bits; i++) e->levels[i] = (float)(2.0 * i / ((1 << bits) - 1) - 1);
    for (int c = 0; c < d; c++) {
        e->z[c] = 0.5f * (float)(c % 5) - 1;
        e->r[c] = 1 + 0.125f * (float)(c % 7);
    }
}

// Row number `problem`: heavy tails, or a grid that makes ties and elements exactly on edges; every ninth key channel
// constant.
static void fill_example(example *e, int problem) {
    bool is_key = e->spec.r != NULL;
    for (int c = 0; c < e->spec.d; c++) {
        double u = uniform((uint32_t)problem, c) - 0.5;
        double shape = problem % 2 == 0 ? tan(2.9 * u) : floor(9 * u) / 2;
        if (is_key && c % 9 == 8) e->r[c] = 0;
        e->x[c] = is_key ? (float)(shape * (double)e->r[c]) + e->z[c] : (float)shape;
        if (is_key && c % 27 == 8) e->x[c] += 0.25f; // a channel that was constant only during calibration
    }
}

static void expect_guards(const example *e) {
    int row_bytes = kvq_block_row_bytes(&e->spec);
    for (int i = 0; i < GUARD; i++) {
        ck_assert_uint_eq(e->memory[i], 0xA5);
        ck_assert_uint_eq(e->row[row_bytes + i], 0xA5);
    }
    for (int i = 0; i + e->spec.d < MAX_D && i < 8; i++)
        ck_assert_uint_eq(kvq_bits_of_float(e->y[e->spec.d + i]), 0xA5A5A5A5u);
}

static void encode(example *e) {
    ck_assert_int_eq(kvq_block_encode(&e->spec, e->x, &e->scratch, e->row), 1);
    kvq_block_decode(&e->spec, e->row, e->y);
    expect_guards(e);
}

// ---------------------------------------------------------------- a second implementation, straight from the rules

typedef struct ranked {
    float key;
    int   channel;
} ranked;

static int descending_then_low_channel(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? 1 : -1;
    return x->channel - y->channel;
}

static int ascending_value_then_channel(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->key != y->key) return x->key > y->key ? 1 : -1;
    return x->channel - y->channel;
}

typedef struct plain_row {
    float    z[MAX_D], r[MAX_D];
    int      codes[MAX_D], channels[2][MAX_SIDE], n[2]; // upper side first
    uint16_t half_z, half_r;
} plain_row;

static void plain_key_outliers(const kvq_block_spec *s, const float *x, plain_row *p) {
    ranked beyond[MAX_D];
    for (int side = 0; side < 2; side++) {
        int n = 0;
        for (int c = 0; c < s->d; c++) {
            float xn = s->r[c] > 0 ? (x[c] - s->z[c]) / s->r[c] : 0;
            if (side == 1) xn = -xn;
            if (xn > 1.00006103515625f) beyond[n++] = (ranked){xn, c};
        }
        qsort(beyond, (size_t)n, sizeof *beyond, descending_then_low_channel);
        p->n[side] = n < s->n_side ? n : s->n_side;
        for (int i = 0; i < p->n[side]; i++) p->channels[side][i] = beyond[i].channel;
    }
    memcpy(p->z, s->grid_z != NULL ? s->grid_z : s->z, (size_t)s->d * sizeof *p->z);
    memcpy(p->r, s->r, (size_t)s->d * sizeof *p->r);
}

// The clamped zero point as an integer quantiser finds it: the code of 0 rounded half to even, within the codes there
// are, and the middle of the grid on which that code decodes to 0.
static float plain_clamped(float z, float r, int bits) {
    if (r == 0) return z;
    int   last = (1 << bits) - 1, code;
    float step = 2 * r / (float)last, exact = (r - z) / step, below = floorf(exact);
    if (exact <= 0)
        code = 0;
    else if (exact >= (float)last)
        code = last;
    else
        code = (int)below + (exact - below > 0.5f || (exact - below == 0.5f && (int)below % 2 == 1));
    return r - (float)code * step;
}

static void plain_value_outliers(const kvq_block_spec *s, const float *x, plain_row *p) {
    ranked sorted[MAX_D];
    for (int c = 0; c < s->d; c++) sorted[c] = (ranked){x[c], c};
    qsort(sorted, (size_t)s->d, sizeof *sorted, ascending_value_then_channel);
    for (int i = 0; i < s->n_side; i++) {
        p->channels[0][i] = sorted[s->d - 1 - i].channel;
        p->channels[1][i] = sorted[i].channel;
    }
    p->n[0] = p->n[1] = s->n_side;
    float low = sorted[s->n_side].key, high = sorted[s->d - 1 - s->n_side].key;
    float middle = (high + low) / 2, half = (high - low) / 2;
    p->half_z = kvq_half_of_float(s->clamp_zero ? plain_clamped(middle, half, s->bits) : middle);
    p->half_r = kvq_half_of_float(half);
    for (int c = 0; c < s->d; c++) {
        p->z[c] = kvq_float_of_half(p->half_z);
        p->r[c] = kvq_float_of_half(p->half_r);
    }
}

static int plain_nearest(float x, const float *levels, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (fabsf(x - levels[i]) < fabsf(x - levels[best])) best = i;
    }
    return best;
}

// Level `code` of channel c in one of the two sets of tables.
static const float *plain_table(const kvq_block_spec *s, const float *tables, int c) {
    int groups = s->n_groups > 0 ? s->n_groups : 1;
    return tables + (c / (s->d / groups)) * (1 << s->bits);
}

// Writes the expected row, bit by bit where the codec works with words, and what it decodes to.
static void plain_encode(const kvq_block_spec *s, const float *x, uint8_t *row, float *y) {
    static plain_row p;
    const float     *decoded = s->decoded != NULL ? s->decoded : s->levels;
    int              at = (s->d * s->bits + 31) / 32 * 4;
    memset(row, 0, (size_t)kvq_block_row_bytes(s));
    if (s->r != NULL)
        plain_key_outliers(s, x, &p);
    else
        plain_value_outliers(s, x, &p);
    for (int c = 0; c < s->d; c++) {
        p.codes[c] =
            p.r[c] > 0 ? plain_nearest((x[c] - p.z[c]) / p.r[c], plain_table(s, s->levels, c), 1 << s->bits) : 0;
        for (int bit = 0; bit < s->bits; bit++) {
            int position = c * s->bits + bit;
            row[position / 8] = (uint8_t)(row[position / 8] | (((unsigned)p.codes[c] >> bit & 1u) << position % 8));
        }
        y[c] = plain_table(s, decoded, c)[p.codes[c]] * p.r[c] + p.z[c];
    }
    if (s->r == NULL) {
        memcpy(row + at, &p.half_z, 2);
        memcpy(row + at + 2, &p.half_r, 2);
        at += 4;
    }
    for (int side = 0; side < 2; side++) {
        for (int i = 0; i < s->n_side; i++, at += 4) {
            uint16_t slot[2] = {0xFFFF, 0};
            if (i < p.n[side]) {
                int c = p.channels[side][i];
                slot[0] = (uint16_t)c;
                slot[1] = kvq_half_of_float(x[c] - y[c]);
                y[c] += kvq_float_of_half(slot[1]); // a channel is an outlier of one side only
            }
            memcpy(row + at, slot, 4);
        }
    }
}

// Codes the row, and compares it and what comes back with the plain implementation.
static void compare_with_plain(example *e, int problem) {
    static float   y[MAX_D];
    static uint8_t expected[MAX_ROW];
    encode(e);
    plain_encode(&e->spec, e->x, expected, y);
    ck_assert_msg(memcmp(e->row, expected, (size_t)kvq_block_row_bytes(&e->spec)) == 0,
                  "problem %d: d %d, n_side %d, %d tables: other bytes", problem, e->spec.d, e->spec.n_side,
                  e->spec.n_groups);
    ck_assert_msg(memcmp(e->y, y, (size_t)e->spec.d * sizeof *y) == 0, "problem %d: d %d, %d tables: decodes otherwise",
                  problem, e->spec.d, e->spec.n_groups);
}

static const int WIDTHS[] = {1, 3, 8, 31, 32, 33, 64, 192, 288};
enum { N_WIDTHS = sizeof WIDTHS / sizeof *WIDTHS };

// _i = bits - 1
START_TEST(bytes_equal_the_plain_implementation) {
    static example e;
    for (int problem = 0; problem < 40 * N_WIDTHS; problem++) {
        int d = WIDTHS[problem % N_WIDTHS], n_side = (int)(uniform(7, problem) * 4);
        if (problem % 5 == 0) n_side = (d - 1) / 2;
        if (2 * n_side >= d) n_side = 0;
        init_example(&e, problem % 2 == 0, d, _i + 1, n_side);
        fill_example(&e, problem / 2);
        compare_with_plain(&e, problem);
    }
}
END_TEST

// Tables of random levels in ascending order.
static void random_tables(float *tables, int n_tables, int bits, uint32_t stream) {
    int n = 1 << bits;
    for (int t = 0; t < n_tables; t++) {
        double at = -1.2 + 0.4 * uniform(stream, t);
        for (int i = 0; i < n; i++) {
            tables[t * n + i] = (float)at;
            at += 2.4 * uniform(stream + 1, t * n + i + 1) / n;
        }
    }
}

static const int HEAD_DIMS[] = {6, 8, 24, 48, 64, 80}, TABLES[] = {1, 2, 3, 4, 8};
enum { N_HEAD_DIMS = 6, N_TABLES = 5, N_SHAPES = N_HEAD_DIMS * N_TABLES };

// Heads and tables in all combinations (tables that begin and end inside of a group of 32, and shorter ones than that),
// with and without a second table, with and without a clamped zero point, over ranges that do and do not contain 0,
// constant channels and constant tokens. _i = bits - 1
START_TEST(every_kind_of_table_equals_the_plain_implementation) {
    static example e;
    for (int problem = 0; problem < N_SHAPES * 48; problem++) {
        int  shape = problem % N_SHAPES, kind = problem / N_SHAPES, n = TABLES[shape / N_HEAD_DIMS];
        int  d = HEAD_DIMS[shape % N_HEAD_DIMS] * n, n_side = kind / 8 % 3 < d / 2 ? kind / 8 % 3 : 0;
        bool is_key = kind % 2 == 0, clamped = kind / 4 % 2 == 1;
        init_example(&e, is_key, d, _i + 1, n_side);
        random_tables(e.levels, n, _i + 1, (uint32_t)(2000 + problem));
        random_tables(e.decoded, n, _i + 1, (uint32_t)(2000 + 7 * problem));
        e.spec.n_groups = n == 1 && problem % 4 < 2 ? 0 : n;
        if (kind / 2 % 2 == 1) e.spec.decoded = e.decoded;
        fill_example(&e, problem);
        for (int c = 0; c < d; c++) {
            float shift = (float)(problem % 5 - 2) * 3; // ranges below, about and above 0
            e.x[c] = !is_key && problem % 41 == 0 ? shift : e.x[c] + shift;
            if (is_key) e.z[c] += shift;
            e.grid_z[c] = plain_clamped(e.z[c], e.r[c], _i + 1);
        }
        if (clamped && is_key) e.spec.grid_z = e.grid_z;
        if (clamped && !is_key) e.spec.clamp_zero = 1;
        compare_with_plain(&e, problem);
    }
}
END_TEST

// By hand, two bits: the steps are 2 r / 3.
START_TEST(zero_points_are_clamped_as_integers) {
    ck_assert(kvq_block_clamped_middle(0, 3, 4) == 3 - 2 * 2.0f);     // exact code 1.5, half to even: 2
    ck_assert(kvq_block_clamped_middle(2, 3, 4) == 3 - 0 * 2.0f);     // 0.5: 0
    ck_assert(kvq_block_clamped_middle(-0.5f, 3, 4) == 3 - 2 * 2.0f); // 1.75: 2
    ck_assert(kvq_block_clamped_middle(5, 3, 4) == 3);                // [2, 8]: code 0 is 0
    ck_assert(kvq_block_clamped_middle(-50, 3, 4) == -3);             // [-53, -47]: code 3 is 0
    ck_assert(kvq_block_clamped_middle(7, 0, 4) == 7);                // a constant stays what it is
    for (int i = 0; i < 1000; i++) {
        float z = (float)(8 * uniform(40, i) - 4), r = (float)(4 * uniform(41, i) + 0.01);
        int   bits = 1 + i % KVQ_MAX_BITS, last = (1 << bits) - 1;
        float middle = kvq_block_clamped_middle(z, r, last + 1), nearest = HUGE_VALF;
        for (int code = 0; code <= last; code++) // a level is 0 up to the roundings of r - code * step
            nearest = fminf(nearest, fabsf((2.0f * (float)code / (float)last - 1) * r + middle));
        ck_assert(nearest <= 8 * 0x1p-24f * r);
        if (fabsf(z) <= r) ck_assert(fabsf(middle - z) <= r / (float)last * (1 + 0x1p-20f)); // half a step
    }
}
END_TEST

// What is beyond a key's range is an outlier or clipped; a value row clips nothing.
START_TEST(what_became_of_the_elements_is_counted) {
    static example e;
    for (int problem = 0; problem < 60; problem++) {
        int n_beyond = 0, n_upper = 0, n_lower = 0, n_side = problem % 4;
        init_example(&e, problem % 2 == 0, 64, 3, n_side);
        fill_example(&e, problem);
        encode(&e);
        for (int c = 0; c < 64 && problem % 2 == 0; c++) {
            double xn = e.r[c] > 0 ? ((double)e.x[c] - (double)e.z[c]) / (double)e.r[c] : 0;
            n_upper += xn > 1 + 0x1p-13, n_lower += xn < -1 - 0x1p-13; // no example has elements so near the edge
        }
        n_beyond = n_upper + n_lower;
        int kept = (n_upper < n_side ? n_upper : n_side) + (n_lower < n_side ? n_lower : n_side);
        ck_assert_int_eq(kvq_block_count_beyond(&e.spec, e.x), n_beyond);
        ck_assert_int_eq(kvq_block_count_outliers(&e.spec, e.row), problem % 2 == 0 ? kept : 2 * n_side);
    }
}
END_TEST

// ---------------------------------------------------------------- packing

START_TEST(packed_words_are_as_published) {
    static const uint32_t EXPECTED[][3] = {
        {0x88FAC688u, 0xC688FAC6u, 0xFAC688FAu}, {0x76543210u, 0, 0}, {0xE4E4E4E4u, 0, 0}};
    static const struct { int bits, n, modulus; } EXAMPLES[] = {{3, 32, 8}, {4, 8, 8}, {2, 16, 4}};
    for (int i = 0; i < 3; i++) {
        int      codes[KVQ_BLOCK_GROUP];
        uint32_t words[3] = {0};
        for (int j = 0; j < EXAMPLES[i].n; j++) codes[j] = j % EXAMPLES[i].modulus;
        kvq_block_pack_group(codes, EXAMPLES[i].n, EXAMPLES[i].bits, (uint8_t *)words);
        ck_assert(memcmp(words, EXPECTED[i], sizeof words) == 0);
        for (int j = 0; j < EXAMPLES[i].n; j++) {
            ck_assert_int_eq(kvq_block_get_code((const uint8_t *)words, j, EXAMPLES[i].bits), codes[j]);
        }
    }
}
END_TEST

START_TEST(row_sizes_by_hand) {
    kvq_block_spec spec = {.d = 4096, .bits = 3, .n_side = 21};
    ck_assert_int_eq(kvq_block_row_bytes(&spec), 1708); // no ranges of channels: a value row
    spec.r = &(float){1};
    ck_assert_int_eq(kvq_block_row_bytes(&spec), 1704);
    ck_assert_int_eq(kvq_block_code_bytes(1, 1), 4);
    ck_assert_int_eq(kvq_block_code_bytes(33, 3), 16);
}
END_TEST

// ---------------------------------------------------------------- reference results

START_TEST(steps_equal_the_reference) {
    cJSON       *units = units_read();
    const cJSON *item, *nuq = units_get(units, "nuq"), *half = units_get(units, "half");
    int          n, n_levels;
    double      *x = units_array(nuq, "x", &n), *levels = units_array(nuq, "levels", &n_levels),
           *codes = units_array(nuq, "codes", &n);
    float table[8];
    for (int i = 0; i < n_levels; i++) table[i] = (float)levels[i];
    for (int i = 0; i < n; i++) ck_assert_int_eq(kvq_block_nearest((float)x[i], table, n_levels), (int)codes[i]);
    free(x);
    free(levels);
    free(codes);
    x = units_array(half, "x", &n);
    double *bits = units_array(half, "bits", &n);
    for (int i = 0; i < n; i++) ck_assert_int_eq(kvq_half_of_float((float)x[i]), (int)bits[i]);
    free(x);
    free(bits);
    cJSON_ArrayForEach(item, units_get(units, "n_side")) {
        ck_assert_int_eq(kvq_block_n_side(units_number(item, "outliers"), (int)units_number(item, "d")),
                         (int)units_number(item, "n"));
    }
    cJSON_Delete(units);
}
END_TEST

static int ascending_int(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// The reference keeps z and r in f32; half a unit of f16 is 2^-11 relative.
START_TEST(value_ranges_equal_the_reference) {
    static example e;
    cJSON         *units = units_read();
    const cJSON   *item;
    cJSON_ArrayForEach(item, units_get(units, "vrange")) {
        int      n, n_outliers, found[MAX_D];
        double  *x = units_array(item, "x", &n), *expected = units_array(item, "outlier_channels", &n_outliers);
        uint16_t z, r;
        init_example(&e, false, n, 3, n_outliers / 2);
        for (int c = 0; c < n; c++) e.x[c] = (float)x[c];
        kvq_block_select_v(&e.spec, e.x, &e.scratch, &z, &r);
        for (int i = 0; i < n_outliers; i++) found[i] = e.channels[i % 2][i / 2];
        qsort(found, (size_t)n_outliers, sizeof *found, ascending_int);
        for (int i = 0; i < n_outliers; i++) ck_assert_int_eq(found[i], (int)expected[i]);
        ck_assert_double_eq_tol((double)kvq_float_of_half(z), units_number(item, "z"),
                                0x1p-11 * fabs(units_number(item, "z")) + 0x1p-25);
        ck_assert_double_eq_tol((double)kvq_float_of_half(r), units_number(item, "r"),
                                0x1p-11 * fabs(units_number(item, "r")) + 0x1p-25);
        free(x);
        free(expected);
    }
    cJSON_Delete(units);
}
END_TEST

// ---------------------------------------------------------------- what comes back

// An outlier comes back with at most half an f16 unit of its residual (2^-11 relative, 2^-25 for subnormals), and the
// roundings of the residual and of the last addition to f32 (2^-24 of what they round).
START_TEST(outliers_come_back_to_half_a_unit_of_their_residual) {
    static example e;
    for (int problem = 0; problem < 400; problem++) {
        init_example(&e, problem % 2 == 0, 192, 3, 3);
        fill_example(&e, problem);
        encode(&e);
        const uint8_t *slots = e.row + kvq_block_row_bytes(&e.spec) - 4 * 6;
        for (int i = 0; i < 6; i++) {
            int c = kvq_block_load_half(slots + 4 * i);
            if (c == (int)KVQ_NO_CHANNEL) continue;
            double residual = fabs((double)kvq_float_of_half(kvq_block_load_half(slots + 4 * i + 2))),
                   x = (double)e.x[c];
            double bound = 0x1p-11 * residual * (1 + 0x1p-10) + 0x1p-25 + 0x1p-24 * (fabs(x) + residual);
            ck_assert_double_le(fabs((double)e.y[c] - x), bound);
        }
    }
}
END_TEST

// Everything else comes back within half the largest gap between levels, when it lies inside the range.
START_TEST(dense_elements_come_back_within_half_a_gap) {
    static example e;
    for (int problem = 0; problem < 200; problem++) {
        init_example(&e, true, 192, 1 + problem % 4, 0);
        for (int c = 0; c < 192; c++) e.x[c] = e.z[c] + e.r[c] * (float)(2 * uniform((uint32_t)problem, c) - 1);
        encode(&e);
        double gap = 2.0 / ((1 << e.spec.bits) - 1);
        for (int c = 0; c < 192; c++)
            ck_assert_double_le(fabs((double)e.y[c] - (double)e.x[c]), (gap / 2 + 1e-6) * (double)e.r[c]);
    }
}
END_TEST

// Keys: coding what was decoded gives the same codes, because level * r + z is off by a few 2^-24 of |z| + r, far less
// than half a gap times r. It gives the same row as long as the outliers are far enough outside to be outliers again,
// far enough apart to keep their order, and their residuals exceed 2^-11 of the element, so that f32 rounding of the
// sum cannot move them to another f16.
START_TEST(coding_decoded_keys_again_changes_nothing) {
    static example e;
    uint8_t        first[MAX_ROW];
    int            n_outliers = 0;
    for (int problem = 0; problem < 300; problem++) {
        init_example(&e, true, WIDTHS[problem % N_WIDTHS], 1 + problem % 4, problem % 3);
        if (2 * e.spec.n_side >= e.spec.d) e.spec.n_side = 0;
        for (int c = 0; c < e.spec.d; c++) {
            double u = uniform((uint32_t)problem, c) - 0.5, shape = 1.9 * u;
            if (fabs(u) > 0.48 && e.spec.n_side > 0) shape = (u > 0 ? 4.0 : -4.0) * (2 + c);
            e.x[c] = (float)(shape * (double)e.r[c]) + e.z[c];
        }
        encode(&e);
        n_outliers += e.scratch.n_upper + e.scratch.n_lower;
        memcpy(first, e.row, MAX_ROW);
        memcpy(e.x, e.y, sizeof e.x);
        encode(&e);
        ck_assert(memcmp(first, e.row, (size_t)kvq_block_row_bytes(&e.spec)) == 0);
    }
    ck_assert_int_gt(n_outliers, 100);
}
END_TEST

// Values find their range anew, so it must come back: end levels of exactly -1 and 1, both in use, and z, r of at most
// ten significant bits, for z - r and z + r are then exact in f32. Outliers stay outside because they were far outside.
START_TEST(coding_decoded_values_again_changes_nothing) {
    static example e;
    uint8_t        first[MAX_ROW];
    for (int problem = 0; problem < 300; problem++) {
        int d = 8 + problem % 280, n_side = problem % 3;
        init_example(&e, false, d, 1 + problem % 4, n_side);
        double z = floor(200 * uniform(1000, problem)) / 64, r = (1 + floor(200 * uniform(1001, problem))) / 64;
        for (int c = 0; c < d; c++) e.x[c] = (float)(z + r * (2 * uniform((uint32_t)problem, c) - 1));
        e.x[0] = (float)(z - r);
        e.x[d - 1] = (float)(z + r);
        for (int i = 0; i < n_side; i++) {
            e.x[2 + 2 * i] = (float)(z + r * (8 + i));
            e.x[3 + 2 * i] = (float)(z - r * (8 + i));
        }
        encode(&e);
        memcpy(first, e.row, MAX_ROW);
        memcpy(e.x, e.y, sizeof e.x);
        encode(&e);
        ck_assert(memcmp(first, e.row, (size_t)kvq_block_row_bytes(&e.spec)) == 0);
    }
}
END_TEST

// ---------------------------------------------------------------- rules one by one

// Four elements beyond the upper edge and two slots: the largest two are kept, of equals the lower channel; the others
// take the end level. Slots without an outlier hold 0xFFFF and 0.
START_TEST(more_outliers_than_slots) {
    static example     e;
    static const float X[8] = {3, 5, 3, 4, 5, -2, 0, 1};
    init_example(&e, true, 8, 2, 2);
    for (int c = 0; c < 8; c++) {
        e.z[c] = 0;
        e.r[c] = 1;
        e.x[c] = X[c];
    }
    encode(&e);
    static const float    EXPECTED[8] = {1, 5, 1, 1, 5, -2, -1.0f / 3, 1};
    static const uint16_t CHANNELS[4] = {1, 4, 5, 0xFFFF};
    for (int i = 0; i < 4; i++) ck_assert_uint_eq(kvq_block_load_half(e.row + 4 + 4 * i), CHANNELS[i]);
    ck_assert_uint_eq(kvq_block_load_half(e.row + 4 + 4 * 3 + 2), 0);
    for (int c = 0; c < 8; c++) ck_assert(fabsf(e.y[c] - EXPECTED[c]) < 1e-7f);
}
END_TEST

START_TEST(the_edge_belongs_to_the_inside) {
    static example e;
    init_example(&e, true, 4, 2, 1);
    for (int c = 0; c < 4; c++) {
        e.z[c] = 0;
        e.r[c] = 1;
        e.x[c] = 0;
    }
    e.x[1] = 0x1.0004p0f; // 1 + 2^-14
    e.x[2] = nextafterf(-0x1.0004p0f, -2);
    encode(&e);
    ck_assert_int_eq(e.scratch.n_upper, 0);
    ck_assert_int_eq(e.scratch.n_lower, 1);
    ck_assert_uint_eq(e.channels[1][0], 2);
}
END_TEST

START_TEST(nearest_takes_the_lower_index_on_a_tie) {
    static const float LEVELS[4] = {-1, 0, 0.5f, 0.5f};
    ck_assert_int_eq(kvq_block_nearest(-0.5f, LEVELS, 4), 0);
    ck_assert_int_eq(kvq_block_nearest(0.25f, LEVELS, 4), 1);
    ck_assert_int_eq(kvq_block_nearest(9, LEVELS, 4), 2); // equal levels: the first
    ck_assert_int_eq(kvq_block_nearest(-9, LEVELS, 4), 0);
}
END_TEST

START_TEST(constant_rows_and_channels_decode_to_themselves) {
    static example e;
    init_example(&e, false, 33, 3, 1);
    for (int c = 0; c < 33; c++) e.x[c] = 0.75f;
    encode(&e);
    for (int c = 0; c < 33; c++) ck_assert(e.y[c] == 0.75f && kvq_block_get_code(e.row, c, 3) == 0);

    init_example(&e, false, 3, 3, 1); // a single element between the outliers
    e.x[0] = 8;
    e.x[1] = -4;
    e.x[2] = 1.5f;
    encode(&e);
    ck_assert(e.y[0] == 8 && e.y[1] == -4 && e.y[2] == 1.5f);

    init_example(&e, true, 33, 3, 1);
    for (int c = 0; c < 33; c++) {
        e.r[c] = 0;
        e.x[c] = e.z[c];
    }
    e.x[4] += 1; // differs from its calibration: nothing can be stored, and nothing else is disturbed
    encode(&e);
    for (int c = 0; c < 33; c++) ck_assert(e.y[c] == e.z[c]);
    ck_assert(e.scratch.n_upper == 0 && e.scratch.n_lower == 0);
}
END_TEST

START_TEST(what_f16_cannot_hold_is_reported) {
    static example e;
    init_example(&e, true, 8, 3, 1);
    for (int c = 0; c < 8; c++) e.x[c] = e.z[c];
    e.x[3] = 65000;
    ck_assert_int_eq(kvq_block_encode(&e.spec, e.x, &e.scratch, e.row), 1);
    e.x[3] = -70000;
    ck_assert_int_eq(kvq_block_encode(&e.spec, e.x, &e.scratch, e.row), 0);
    init_example(&e, false, 8, 3, 0);
    for (int c = 0; c < 8; c++) e.x[c] = c % 2 == 0 ? 70000.0f : -70000.0f; // half width
    ck_assert_int_eq(kvq_block_encode(&e.spec, e.x, &e.scratch, e.row), 0);
    for (int c = 0; c < 8; c++) e.x[c] = 70000; // middle
    ck_assert_int_eq(kvq_block_encode(&e.spec, e.x, &e.scratch, e.row), 0);
    expect_guards(&e);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(bytes_equal_the_plain_implementation, KVQ_MAX_BITS),
    KVQ_LOOP(every_kind_of_table_equals_the_plain_implementation, KVQ_MAX_BITS),
    KVQ_CASE(zero_points_are_clamped_as_integers),
    KVQ_CASE(what_became_of_the_elements_is_counted),
    KVQ_CASE(packed_words_are_as_published),
    KVQ_CASE(row_sizes_by_hand),
    KVQ_GOLDEN_CASE(steps_equal_the_reference),
    KVQ_GOLDEN_CASE(value_ranges_equal_the_reference),
    KVQ_CASE(outliers_come_back_to_half_a_unit_of_their_residual),
    KVQ_CASE(dense_elements_come_back_within_half_a_gap),
    KVQ_CASE(coding_decoded_keys_again_changes_nothing),
    KVQ_CASE(coding_decoded_values_again_changes_nothing),
    KVQ_CASE(more_outliers_than_slots),
    KVQ_CASE(the_edge_belongs_to_the_inside),
    KVQ_CASE(nearest_takes_the_lower_index_on_a_tie),
    KVQ_CASE(constant_rows_and_channels_decode_to_themselves),
    KVQ_CASE(what_f16_cannot_hold_is_reported),
};
KVQ_TEST_MAIN("block", CASES)
