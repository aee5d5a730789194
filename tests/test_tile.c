// SPDX-License-Identifier: Apache-2.0
// The codec of tiles: fp8 against exhaustive search, tiles by hand, bytes and decoded values against a second, slow
// implementation of the rules, what does not fit, and the backend on several threads.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_kernels.h"
#include "kvq_test.h"
#include "limited_memory.h"

enum { TOKENS = 128, MAX_D = 512, MAX_TILE = MAX_D * TOKENS + 4096, MAX_SLOTS = 500, GUARD = 64, MAX_LEVELS = 1 << 14 };

static double uniform(uint32_t stream, int64_t index) {
    return kvq_rng_uniform(77, KVQ_RNG_TEST, stream, (uint64_t)index);
}

// ---------------------------------------------------------------- fp8

static double e4m3_value(int magnitude) { // of a code without its sign
    int exponent = magnitude >> 3, mantissa = magnitude & 7;
    return exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, exponent - 10);
}

static int e4m3_nearest(float x) {
    int    sign = signbit(x) ? 0x80 : 0, best = 0;
    double magnitude = fabs((double)x);
    if (isnan(x)) return sign | 0x7f;
    if (magnitude > 448) return sign | 0x7e;
    for (int code = 1; code < 0x7f; code++) {
        double next = fabs(magnitude - e4m3_value(code)), known = fabs(magnitude - e4m3_value(best));
        if (next < known || (next == known && code % 2 == 0)) best = code;
    }
    return sign | best;
}

// An assertion that holds is a system call in Check, too slow for millions of them.
static void expect_e4m3(uint32_t bits) {
    float x = kvq_float_of_bits(bits);
    int   found = kvq_e4m3_of_float(x), expected = e4m3_nearest(x);
    if (found != expected)
        ck_abort_msg("%08x (%g): %02x, not %02x", bits, (double)x, (unsigned)found, (unsigned)expected);
}

START_TEST(every_fp8_code_goes_there_and_back) {
    for (int code = 0; code < 256; code++) {
        float  x = kvq_float_of_e4m3((uint8_t)code);
        double value = e4m3_value(code & 0x7f);
        if ((code & 0x7f) == 0x7f)
            ck_assert(isnan(x));
        else
            ck_assert((double)x == (code < 128 ? value : -value));
        ck_assert_int_eq(signbit(x) != 0, code >= 128);
        ck_assert_int_eq(kvq_e4m3_of_float(x), code);
    }
    ck_assert(kvq_float_of_e4m3(0x7e) == KVQ_E4M3_MAX);
    ck_assert(kvq_float_of_e4m3(0x08) == 0x1p-6f && kvq_float_of_e4m3(0x01) == 0x1p-9f);
}
END_TEST

// Every f16 number, all f32 numbers around every code and every middle between two of them, and f32 of all magnitudes.
START_TEST(fp8_is_the_nearest_code) {
    for (uint32_t half = 0; half < 1u << 16; half++) expect_e4m3(kvq_bits_of_float(kvq_float_of_half((uint16_t)half)));
    for (int code = 0; code <= 0x7e; code++) {
        double low = e4m3_value(code), high = code < 0x7e ? e4m3_value(code + 1) : 480;
        float  around[2] = {(float)low, (float)((low + high) / 2)}; // both exact
        for (int i = 0; i < 2; i++) {
            uint32_t bits = kvq_bits_of_float(around[i]);
            for (uint32_t near = bits > 200 ? bits - 200 : 0; near <= bits + 200; near++) {
                expect_e4m3(near);
                expect_e4m3(near | 0x80000000u);
            }
        }
    }
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 9973) expect_e4m3((uint32_t)bits);
    ck_assert_int_eq(kvq_e4m3_of_float(HUGE_VALF), 0x7e);
    ck_assert_int_eq(kvq_e4m3_of_float(-HUGE_VALF), 0xfe);
}
END_TEST

// ---------------------------------------------------------------- tiles by hand

// Widths 5 1 0 3 2 0 1 4 of 8 channels; level i of the one table is i, so a code is its value. Token 0 is a sink.
START_TEST(a_tile_of_keys_by_hand) {
    static const uint8_t WIDTHS[8] = {5, 1, 0, 3, 2, 0, 1, 4};
    static const float X[3][8] = {{9, 9, 9, 9, 9, 9, 9, 9}, {21, 1, -3, 6, 2, 0, 0, 9}, {10, 0, 0, 3, 1, 2.5f, 1, 15}};
    static const int   AT[8][4] = {{-1, 0, -1, 192},  {-1, -1, -1, 224}, {-1, -1, -1, -1},  {-1, -1, 128, 208},
                                   {-1, -1, 160, -1}, {-1, -1, -1, -1},  {-1, -1, -1, 240}, {-1, 64, -1, -1}};
    static const uint8_t OUTLIERS[12] = {2, 0, 0, 0, 0x02, 0x02, 0x00, 0xC2, 0x05, 0x04, 0x00, 0x41};
    static const struct {
        int at, byte;
    } CODES[] = {{0, 0x50},   {1, 0x0A},   {64, 0x90},  {65, 0x0F},  {128, 0x38},
                 {160, 0x18}, {192, 0x02}, {208, 0x02}, {224, 0x02}, {240, 0x04}};
    const float      z[8] = {0}, r[8] = {1, 1, 1, 1, 1, 1, 1, 1}, half[8] = {99, 99, 1, 99, 99, 1, 99, 99};
    const int32_t    table[8] = {0};
    float            levels[32], floats[8 * TOKENS], keys[3], y[3][8];
    uint32_t         places[3];
    kvq_tile_column  columns[8];
    uint8_t          tile[268], expected[268] = {0};
    kvq_tile_scratch scratch = {floats, keys, places};
    kvq_tile_spec    spec = {.d = 8,
                             .head_dim = 8,
                             .dim = 1,
                             .widths = WIDTHS,
                             .columns = columns,
                             .levels = levels,
                             .table = table,
                             .z = z,
                             .r = r,
                             .middle = z,
                             .half = half,
                             .n_side = 1,
                             .n_slots = 2};
    for (int i = 0; i < 32; i++) levels[i] = (float)i;
    ck_assert_int_eq(kvq_tile_layout(WIDTHS, 8, 8, columns), 256);
    for (int c = 0; c < 8; c++) {
        for (int k = 0; k < 4; k++) ck_assert_int_eq(columns[c].at[k], AT[c][k]);
    }
    ck_assert_int_eq(kvq_tile_bytes(&spec), 268);
    for (size_t i = 0; i < sizeof CODES / sizeof *CODES; i++) expected[CODES[i].at] = (uint8_t)CODES[i].byte;
    memcpy(expected + 256, OUTLIERS, sizeof OUTLIERS);
    ck_assert_int_eq(kvq_tile_encode(&spec, X[0], 1, 3, &scratch, tile), -1);
    ck_assert_mem_eq(tile, expected, sizeof tile);
    memcpy(y[0], X[0], sizeof y[0]);
    kvq_tile_decode(&spec, tile, 1, 3, y[0]);
    ck_assert_mem_eq(y, X, sizeof y);
}
END_TEST

// Two heads of one pair each, rotated by a quarter turn, scales halved before they become fp8.
START_TEST(a_tile_of_values_by_hand) {
    static const uint8_t WIDTHS[2] = {2, 1};
    static const float   X[2][4] = {{4, 4, 0, 0}, {-8, 8, 1, -1}}, DECODED[2][4] = {{4, 4, 0, 0}, {-8, 8, -1, -1}};
    static const float   ROTATION[4] = {0, 1, -1, 0}, LEVELS[8] = {1, 1, -1, 1, 1, -1, -1, -1};
    static const struct { int at, byte; } BYTES[] = {{0, 0x02}, {32, 0x02}, {48, 0x40}, {49, 0x48}, {177, 0x30}};
    const int32_t    table[2] = {0};
    float            floats[2 * TOKENS], y[2][4];
    kvq_tile_column  columns[2];
    uint8_t          tile[304], expected[304] = {0};
    kvq_tile_scratch scratch = {floats, NULL, NULL};
    kvq_tile_spec    spec = {.d = 4,
                             .head_dim = 2,
                             .dim = 2,
                             .widths = WIDTHS,
                             .columns = columns,
                             .levels = LEVELS,
                             .table = table,
                             .rotation = ROTATION,
                             .scale_format = KVQ_SCALE_E4M3,
                             .scale_exponent = 1};
    ck_assert_int_eq(kvq_tile_layout(WIDTHS, 2, 1, columns), 48);
    ck_assert_int_eq(kvq_tile_bytes(&spec), 304);
    for (size_t i = 0; i < sizeof BYTES / sizeof *BYTES; i++) expected[BYTES[i].at] = (uint8_t)BYTES[i].byte;
    ck_assert_int_eq(kvq_tile_encode(&spec, X[0], 0, 2, &scratch, tile), -1);
    ck_assert_mem_eq(tile, expected, sizeof tile);
    kvq_tile_decode(&spec, tile, 0, 2, y[0]);
    for (int i = 0; i < 8; i++) ck_assert(y[i / 4][i % 4] == DECODED[i / 4][i % 4]);
    spec.scale_format = KVQ_SCALE_F16;
    ck_assert_int_eq(kvq_tile_bytes(&spec), 48 + 2 * 256);
}
END_TEST

START_TEST(slots_by_hand) {
    ck_assert_int_eq(kvq_tile_slots(0, 192), 0);
    ck_assert_int_eq(kvq_tile_slots(0.0025, 192), 62); // 61.44
    ck_assert_int_eq(kvq_tile_slots(0.01, 100), 128);  // exact
    ck_assert_int_eq(kvq_tile_slots(0.07, 100), 896);  // exact, though 0.07 * 12800 is above 896 in f64
    ck_assert_int_eq(kvq_tile_slots(0.0625, 2), 16);
    ck_assert_int_eq(kvq_tile_slots(0.0078125, 3), 4); // 3
    ck_assert_int_eq(kvq_tile_slots(1e-6, 2), 2);
    ck_assert_int_eq(kvq_tile_slots(1, 65534), 65534); // more than the counts could hold
}
END_TEST

// ---------------------------------------------------------------- a second implementation, straight from the rules

// A tile with everything around it.
typedef struct example {
    kvq_tile_spec    spec;
    int              first, n_tokens;
    uint8_t          widths[MAX_D];
    kvq_tile_column  columns[MAX_D];
    int32_t          table[MAX_D];
    float            levels[MAX_LEVELS], z[MAX_D], r[MAX_D], middle[MAX_D], half[MAX_D], rotation[MAX_D * MAX_D];
    float            x[TOKENS * MAX_D], y[(TOKENS + 1) * MAX_D];
    float            floats[TOKENS * MAX_D], keys[MAX_SLOTS + 1];
    uint32_t         places[MAX_SLOTS + 1];
    uint8_t          memory[GUARD + MAX_TILE + GUARD], *tile;
    kvq_tile_scratch scratch;
} example;

typedef struct plain_outlier {
    float beyond; // magnitude
    int   token, channel, head;
} plain_outlier;

typedef struct plain_tile {
    uint8_t       bytes[MAX_TILE];
    float         y[TOKENS * MAX_D];
    uint8_t       codes[MAX_D][TOKENS];
    float         scales[MAX_D][TOKENS], normalised[TOKENS][MAX_D];
    int           n_bytes, n_outliers, n_beyond;
    plain_outlier outliers[TOKENS * MAX_D];
} plain_tile;

// Byte offset of a plane: the sizes of all planes that come before it.
static int plain_plane_at(const kvq_tile_spec *s, int column, int bits) {
    int per_head = s->head_dim / s->dim, at = 0;
    for (int c = 0; c < s->d / s->dim; c++) {
        for (int p = 1; p <= 8; p *= 2) {
            int  head = c / per_head, own = column / per_head;
            bool before = head != own                         ? head < own
                          : p != bits                         ? p > bits
                          : s->widths[c] != s->widths[column] ? s->widths[c] > s->widths[column]
                                                              : c < column;
            if ((s->widths[c] & p) != 0 && before) at += 16 * p;
        }
    }
    return at;
}

static void plain_put_codes(const kvq_tile_spec *s, plain_tile *p, int column) {
    for (int bits = 1; bits <= 8; bits *= 2) {
        if ((s->widths[column] & bits) == 0) continue;
        int at = plain_plane_at(s, column, bits), lowest = 0;
        for (int larger = 2 * bits; larger <= 8; larger *= 2) lowest += s->widths[column] & larger;
        for (int t = 0; t < TOKENS; t++) {
            for (int i = 0; i < bits; i++) {
                int bit = (p->codes[column][t] >> (lowest + i)) & 1, position = t * bits + i;
                p->bytes[at + position / 8] = (uint8_t)(p->bytes[at + position / 8] | bit << position % 8);
            }
        }
    }
}

static const float *plain_level(const kvq_tile_spec *s, int column, int code) {
    return s->levels + (s->table[column] + code) * s->dim;
}

static void plain_keys(const example *e, plain_tile *p) {
    const kvq_tile_spec *s = &e->spec;
    for (int c = 0; c < s->d; c++) {
        for (int t = 0; t < TOKENS; t++) {
            int best = 0;
            for (int i = 1; i < 1 << s->widths[c] && t >= e->first && t < e->n_tokens && s->r[c] != 0; i++) {
                float xn = (e->x[t * s->d + c] - s->z[c]) / s->r[c];
                if (fabsf(xn - *plain_level(s, c, i)) < fabsf(xn - *plain_level(s, c, best))) best = i;
            }
            p->codes[c][t] = (uint8_t)best;
            p->y[t * s->d + c] = s->z[c] + s->r[c] * *plain_level(s, c, best);
        }
    }
}

static int largest_first(const void *a, const void *b) {
    const plain_outlier *x = a, *y = b;
    if (x->beyond != y->beyond) return x->beyond < y->beyond ? 1 : -1;
    return x->token != y->token ? x->token - y->token : x->channel - y->channel;
}

static int by_head_token_channel(const void *a, const void *b) {
    const plain_outlier *x = a, *y = b;
    if (x->head != y->head) return x->head - y->head;
    return x->token != y->token ? x->token - y->token : x->channel - y->channel;
}

// All outliers of a token and side, then the n_side largest of each, then the n_slots largest of all.
static void plain_select(const example *e, plain_tile *p) {
    static plain_outlier side[MAX_D];
    const kvq_tile_spec *s = &e->spec;
    int                  n = 0;
    p->n_beyond = 0;
    for (int i = 2 * e->first; i < 2 * e->n_tokens; i++) {
        int t = i / 2, n_here = 0;
        for (int c = 0; c < s->d; c++) {
            float beyond = s->half[c] > 0 ? (e->x[t * s->d + c] - s->middle[c]) / s->half[c] : 0;
            if (i % 2 == 1) beyond = -beyond;
            if (beyond > 1.00006103515625f) side[n_here++] = (plain_outlier){beyond, t, c, c / s->head_dim};
        }
        p->n_beyond += n_here;
        qsort(side, (size_t)n_here, sizeof *side, largest_first);
        for (int j = 0; j < n_here && j < s->n_side; j++) p->outliers[n++] = side[j];
    }
    qsort(p->outliers, (size_t)n, sizeof *p->outliers, largest_first);
    p->n_outliers = n < s->n_slots ? n : s->n_slots;
    qsort(p->outliers, (size_t)p->n_outliers, sizeof *p->outliers, by_head_token_channel);
}

static void plain_put_outliers(const example *e, plain_tile *p, int at) {
    const kvq_tile_spec *s = &e->spec;
    int                  n_heads = s->d / s->head_dim, entries = at + 2 * n_heads;
    p->n_bytes = at;
    if (s->n_slots == 0) return;
    while (entries % 4 != 0) entries++;
    p->n_bytes = entries + 4 * s->n_slots;
    for (int i = 0; i < p->n_outliers; i++) {
        plain_outlier o = p->outliers[i];
        float        *y = &p->y[o.token * s->d + o.channel];
        uint16_t      count, name = (uint16_t)(o.token * 512 + o.channel % s->head_dim);
        uint16_t      residual = kvq_half_of_float(e->x[o.token * s->d + o.channel] - *y);
        memcpy(&count, p->bytes + at + 2 * o.head, 2); // the tests run on little-endian machines
        count++;
        memcpy(p->bytes + at + 2 * o.head, &count, 2);
        memcpy(p->bytes + entries + 4 * i, &name, 2);
        memcpy(p->bytes + entries + 4 * i + 2, &residual, 2);
        *y += kvq_float_of_half(residual);
    }
}

// One head of one token: rounded scale, its code, and codes of the columns.
static uint16_t plain_value_head(const example *e, plain_tile *p, int head, int t) {
    const kvq_tile_spec *s = &e->spec;
    const float         *x = e->x + t * s->d + head * s->head_dim;
    float                y[MAX_D], squares = 0, scale;
    uint16_t             code;
    for (int i = 0; i < s->head_dim; i++) {
        y[i] = 0;
        for (int j = 0; j < s->head_dim; j++) y[i] += s->rotation[i * s->head_dim + j] * x[j];
        squares += y[i] * y[i];
    }
    scale = sqrtf(squares / (float)s->head_dim);
    if (s->scale_format == KVQ_SCALE_F16) {
        code = kvq_half_of_float(scale);
        scale = kvq_float_of_half(code);
    } else {
        code = (uint16_t)e4m3_nearest((float)ldexp((double)scale, -s->scale_exponent));
        scale = (float)ldexp(e4m3_value(code), s->scale_exponent);
    }
    p->scales[head][t] = scale;
    for (int i = 0; i < s->head_dim; i++) p->normalised[t][head * s->head_dim + i] = scale == 0 ? 0 : y[i] / scale;
    for (int c = head * s->head_dim / s->dim; c < (head + 1) * s->head_dim / s->dim; c++) {
        float nearest = HUGE_VALF;
        for (int i = 0; i < 1 << s->widths[c]; i++) {
            float distance = 0;
            for (int k = 0; k < s->dim; k++) {
                float delta = p->normalised[t][c * s->dim + k] - plain_level(s, c, i)[k];
                distance += delta * delta;
            }
            if (distance < nearest) {
                nearest = distance;
                p->codes[c][t] = (uint8_t)i;
            }
        }
    }
    return code;
}

static void plain_values(const example *e, plain_tile *p, int at) {
    const kvq_tile_spec *s = &e->spec;
    int                  n_heads = s->d / s->head_dim, size = s->scale_format == KVQ_SCALE_F16 ? 2 : 1, n = s->head_dim;
    p->n_bytes = at + n_heads * TOKENS * size;
    for (int i = e->first * n_heads; i < e->n_tokens * n_heads; i++) {
        int      t = i / n_heads, head = i % n_heads;
        uint16_t code = plain_value_head(e, p, head, t);
        memcpy(p->bytes + at + (head * TOKENS + t) * size, &code, (size_t)size);
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int k = 0; k < n; k++) {
                int   c = (head * n + k) / s->dim;
                float y = p->scales[head][t] * plain_level(s, c, p->codes[c][t])[k % s->dim];
                sum += s->rotation[k * n + j] * y;
            }
            p->y[t * s->d + head * n + j] = sum;
        }
    }
}

static void plain_encode(const example *e, plain_tile *p) {
    const kvq_tile_spec *s = &e->spec;
    int                  at = 0;
    memset(p, 0, sizeof *p);
    for (int c = 0; c < s->d / s->dim; c++) at += 16 * s->widths[c];
    if (s->r == NULL) {
        plain_values(e, p, at);
    } else {
        plain_keys(e, p);
        plain_select(e, p);
        plain_put_outliers(e, p, at);
    }
    for (int c = 0; c < s->d / s->dim; c++) plain_put_codes(s, p, c);
}

// ---------------------------------------------------------------- examples

static int choose(uint32_t stream, int index, const int *from, int n) {
    return from[(int)(uniform(stream, index) * n)];
}

// Mixtures of widths: 0 .. 5, 0 .. 8, or all the same. Columns of a width share a table, or each has one of its own.
static void choose_widths(example *e, uint32_t problem) {
    const int style = (int)(uniform(problem, 1) * 3), n_columns = e->spec.d / e->spec.dim, widest = style == 0 ? 5 : 8;
    const int same = (int)(uniform(problem, 2) * 9);
    int       n_vectors = 0, shared[9], most = MAX_LEVELS / e->spec.dim;
    for (int w = 0; w <= 8; w++) {
        shared[w] = n_vectors;
        n_vectors += 1 << w;
    }
    for (int c = 0; c < n_columns; c++) {
        int width = style == 2 ? same : (int)(uniform(problem + 1, c) * (widest + 1));
        e->widths[c] = (uint8_t)width;
        e->table[c] = shared[width];
        if (c % 3 == 0 || n_vectors + (1 << width) > most) continue;
        e->table[c] = n_vectors;
        n_vectors += 1 << width;
    }
    for (int i = 0; i < n_vectors * e->spec.dim; i++) // a grid, so that there are ties and equal levels
        e->levels[i] =
            (float)(problem % 2 == 0 ? floor(33 * uniform(problem + 2, i)) / 8 - 2 : 4 * uniform(problem + 2, i) - 2);
}

static void fill_keys(example *e, uint32_t problem) {
    static const int SIDES[] = {0, 1, 3, 40}, SLOTS[] = {0, 2, 10, 64, MAX_SLOTS};
    e->spec.z = e->z, e->spec.r = e->r, e->spec.middle = e->middle, e->spec.half = e->half;
    e->spec.n_side = choose(problem, 3, SIDES, 4);
    e->spec.n_slots = choose(problem, 4, SLOTS, 5);
    for (int c = 0; c < e->spec.d; c++) {
        e->z[c] = 0.5f * (float)(c % 5) - 1;
        e->r[c] = (c % 3 == 1 ? -1.0f : 1.0f) * (c % 11 == 7 ? 0.0f : (float)(1 << c % 4) / 4);
        e->middle[c] = e->z[c] + 0.25f * (float)(c % 2);
        e->half[c] = c % 13 == 5 ? 0.0f : (float)(1 << c % 3);
        for (int t = 0; t < e->n_tokens; t++) { // heavy tails, or a grid on which many are equally far beyond
            double u = uniform(problem + 3, t * e->spec.d + c) - 0.5;
            e->x[t * e->spec.d + c] =
                e->z[c] + (float)(problem % 2 == 1 ? tan(2.9 * u) : floor(24 * u * u * u * 8) / 8);
        }
    }
}

// Tokens of very different size, among them zero, tiny ones, and for fp8 some that saturate.
static void fill_values(example *e, uint32_t problem) {
    static const double SIZES[] = {1, 0, 1e-3, 30, 1e-30, 1e5};
    int                 n = e->spec.head_dim, n_heads = e->spec.d / n;
    e->spec.rotation = e->rotation;
    e->spec.scale_format = uniform(problem, 5) < 0.5 ? KVQ_SCALE_E4M3 : KVQ_SCALE_F16;
    e->spec.scale_exponent = (int)(uniform(problem, 6) * 13) - 6;
    for (int i = 0; i < n * n; i++) e->rotation[i] = (float)((2 * uniform(problem + 3, i) - 1) / sqrt(n));
    for (int i = 0; i < e->n_tokens * n_heads; i++) {
        int n_sizes = e->spec.scale_format == KVQ_SCALE_E4M3 ? 6 : 5, at = (int)(uniform(problem + 4, i) * 3 * n_sizes);
        double size = at < n_sizes ? SIZES[at] : 1;
        for (int j = 0; j < n; j++) {
            double u = 2 * uniform(problem + 5, i * n + j) - 1;
            e->x[i * n + j] = (float)(size * (problem % 2 == 0 ? floor(4 * u) : u));
        }
    }
}

enum { KEYS, VALUES, PAIRS, N_KINDS };

static void init_example(example *e, int kind, int n_heads, int head_dim, int first, int n_tokens, uint32_t problem) {
    memset(e->memory, 0xA5, sizeof e->memory);
    memset(e->y, 0xA5, sizeof e->y);
    memset(e->floats, 0xFF, sizeof e->floats);
    memset(e->keys, 0xFF, sizeof e->keys);
    memset(e->places, 0xFF, sizeof e->places);
    e->tile = e->memory + GUARD;
    e->first = first;
    e->n_tokens = n_tokens;
    e->spec = (kvq_tile_spec){.d = n_heads * head_dim,
                              .head_dim = head_dim,
                              .dim = kind == PAIRS ? 2 : 1,
                              .widths = e->widths,
                              .columns = e->columns,
                              .levels = e->levels,
                              .table = e->table};
    e->scratch = (kvq_tile_scratch){e->floats, e->keys, e->places};
    choose_widths(e, 16 * problem);
    if (kind == KEYS)
        fill_keys(e, 16 * problem);
    else
        fill_values(e, 16 * problem);
    (void)kvq_tile_layout(e->widths, e->spec.d / e->spec.dim, head_dim / e->spec.dim, e->columns);
}

static void expect_untouched(const void *p, size_t bytes) {
    size_t n_touched = 0;
    for (size_t i = 0; i < bytes; i++) n_touched += ((const uint8_t *)p)[i] != 0xA5;
    ck_assert_uint_eq(n_touched, 0);
}

// Rows [first, n_tokens) are decoded as expected and nothing else is written.
static void expect_decoded(example *e, const plain_tile *p, int first, int n_tokens) {
    size_t row = (size_t)e->spec.d * sizeof *e->y;
    memset(e->y, 0xA5, sizeof e->y);
    kvq_tile_decode(&e->spec, e->tile, first, n_tokens, e->y);
    expect_untouched(e->y, (size_t)first * row);
    expect_untouched((const uint8_t *)e->y + (size_t)n_tokens * row, row);
    ck_assert_msg(memcmp(e->y + first * e->spec.d, p->y + first * e->spec.d, (size_t)(n_tokens - first) * row) == 0,
                  "head_dim %d, dim %d, tokens %d .. %d: decodes otherwise", e->spec.head_dim, e->spec.dim, first,
                  n_tokens);
}

static void compare_with_plain(example *e) {
    static plain_tile    p;
    const kvq_tile_spec *s = &e->spec;
    plain_encode(e, &p);
    ck_assert_int_eq(kvq_tile_bytes(s), p.n_bytes);
    ck_assert_int_eq(kvq_tile_encode(s, e->x, e->first, e->n_tokens, &e->scratch, e->tile), -1);
    expect_untouched(e->memory, GUARD);
    expect_untouched(e->tile + p.n_bytes, GUARD);
    ck_assert_msg(memcmp(e->tile, p.bytes, (size_t)p.n_bytes) == 0,
                  "d %d, head_dim %d, dim %d, tokens %d .. %d, n_side %d, n_slots %d: other bytes", s->d, s->head_dim,
                  s->dim, e->first, e->n_tokens, s->n_side, s->n_slots);
    int n_other_codes = 0, n_heads = s->d / s->head_dim;
    for (int i = 0; i < s->d / s->dim * TOKENS; i++)
        n_other_codes +=
            kvq_tile_get_code(&e->columns[i / TOKENS], e->tile, i % TOKENS) != p.codes[i / TOKENS][i % TOKENS];
    ck_assert_int_eq(n_other_codes, 0);
    expect_decoded(e, &p, e->first, e->n_tokens);
    if (e->first + 3 < e->n_tokens) expect_decoded(e, &p, e->first + 2, e->n_tokens - 1);
    ck_assert_int_eq(kvq_tile_count_outliers(s, e->tile), p.n_outliers);
    ck_assert_int_eq(kvq_tile_count_beyond(s, e->x, e->first, e->n_tokens), p.n_beyond);
    for (int i = e->first * n_heads; s->r == NULL && i < e->n_tokens * n_heads; i++) {
        int   t = i / n_heads, head = i % n_heads;
        float y[MAX_D], scale;
        if (kvq_tile_normalise_values(s, e->x + i * s->head_dim, y, &scale) != 1 || scale != p.scales[head][t] ||
            memcmp(y, p.normalised[t] + head * s->head_dim, (size_t)s->head_dim * sizeof *y) != 0)
            ck_abort_msg("token %d, head %d: normalised otherwise", t, head);
    }
}

static const int HEAD_DIMS[] = {2, 6, 8, 48, 64, 80, 96, 128, 512};
enum { N_HEAD_DIMS = sizeof HEAD_DIMS / sizeof *HEAD_DIMS };

// Keys, values and pairs, every number of tokens with every number of sinks. _i: head_dim
START_TEST(tiles_equal_the_plain_implementation) {
    static const int N_TOKENS[] = {1, 15, 16, 17, 127, 128}, FIRST[] = {0, 1, 5};
    static example   e;
    const int        head_dim = HEAD_DIMS[_i], most = head_dim < 64 ? 3 : MAX_D / head_dim < 2 ? 1 : 2;
    for (int problem = 0; problem < N_KINDS * 18 * 4; problem++) {
        int kind = problem % N_KINDS, n_tokens = N_TOKENS[problem / N_KINDS % 6],
            first = FIRST[problem / N_KINDS / 6 % 3];
        if (head_dim == 512 && problem % 13 != 0) continue; // slow
        init_example(&e, kind, 1 + problem % most, head_dim, first < n_tokens ? first : n_tokens, n_tokens,
                     (uint32_t)(1000 * _i + problem));
        compare_with_plain(&e);
    }
}
END_TEST

// ---------------------------------------------------------------- outliers and ranges by hand

// One head of 4 channels at 1 bit, levels -1 and 1, all ranges [-1, 1], everything 0.
static void init_simple(example *e, int kind, int n_tokens) {
    init_example(e, kind, 1, 4, 0, n_tokens, 3);
    e->spec.n_side = 2;
    e->spec.n_slots = 4;
    e->spec.scale_exponent = 0;
    memset(e->x, 0, sizeof e->x);
    memset(e->rotation, 0, sizeof e->rotation);
    for (int c = 0; c < 4; c++) {
        e->widths[c] = 1;
        e->table[c] = 0;
        e->z[c] = e->middle[c] = 0;
        e->r[c] = e->half[c] = 1;
        e->rotation[5 * c] = 1;
    }
    e->levels[0] = -1;
    e->levels[1] = 1;
    (void)kvq_tile_layout(e->widths, 4, 4, e->columns);
}

static int name_of_entry(const example *e, int i) { return kvq_block_load_half(e->tile + 64 + 4 + 4 * i); }

START_TEST(outliers_that_find_no_slot_are_clipped) {
    static example e;
    init_simple(&e, KEYS, 3);
    static const float X[12] = {3, -3, 3, 3, /**/ 2, 5, -3, -3, /**/ -3, KVQ_OUTLIER_EDGE, -3, -3};
    memcpy(e.x, X, sizeof X);
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 3, &e.scratch, e.tile), -1);
    // Of token 0 channel 3 is the third of its side; 5 is the largest, the others equal: the lower tokens and channels.
    ck_assert_int_eq(kvq_tile_count_outliers(&e.spec, e.tile), 4);
    ck_assert_int_eq(kvq_tile_count_beyond(&e.spec, e.x, 0, 3), 11);
    ck_assert_int_eq(name_of_entry(&e, 0), 0);
    ck_assert_int_eq(name_of_entry(&e, 1), 1);
    ck_assert_int_eq(name_of_entry(&e, 2), 2);
    ck_assert_int_eq(name_of_entry(&e, 3), 512 + 1);
    kvq_tile_decode(&e.spec, e.tile, 0, 3, e.y);
    static const float DECODED[12] = {3, -3, 3, 1, /**/ 1, 5, -1, -1, /**/ -1, 1, -1, -1};
    for (int i = 0; i < 12; i++) ck_assert(e.y[i] == DECODED[i]);
    memcpy(e.x, (const float[4]){-3, 3, 3, -3}, 4 * sizeof *e.x); // equal on both sides: still the lowest channel
    e.spec.n_slots = 1;
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 1, &e.scratch, e.tile), -1);
    ck_assert_int_eq(name_of_entry(&e, 0), 0);
    memcpy(e.x, X, sizeof X);
    e.spec.n_slots = 0;
    ck_assert_int_eq(kvq_tile_bytes(&e.spec), 64);
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 3, &e.scratch, e.tile), -1);
    ck_assert_int_eq(kvq_tile_count_outliers(&e.spec, e.tile), 0);
    kvq_tile_decode(&e.spec, e.tile, 0, 3, e.y);
    for (int i = 0; i < 12; i++) ck_assert(e.y[i] == (X[i] > 0 ? 1 : -1));
}
END_TEST

START_TEST(negative_zero_and_missing_ranges) {
    static example e;
    init_simple(&e, KEYS, 1);
    static const float X[4] = {-0.75f, 0.75f, 0.75f, 50}, DECODED[4] = {-1.5f, 0.25f, 0.75f, -1};
    memcpy(e.x, X, sizeof X);
    e.r[0] = -1.5f;                 // level 1 is the lower end
    e.r[1] = 0, e.z[1] = 0.25f;     // constant, and inside its range
    e.r[2] = 0, e.half[2] = 0.125f; // constant when fitted, an outlier now
    e.half[3] = 0;                  // never one; 50 / -1 is nearest to level -1, which decodes to 1
    e.r[3] = -1, e.z[3] = 0, e.levels[0] = 1, e.levels[1] = 1;
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 1, &e.scratch, e.tile), -1);
    ck_assert_int_eq(kvq_tile_get_code(&e.columns[3], e.tile, 0), 0); // equal levels: the lower
    ck_assert_int_eq(kvq_tile_count_outliers(&e.spec, e.tile), 1);
    ck_assert_int_eq(name_of_entry(&e, 0), 2);
    kvq_tile_decode(&e.spec, e.tile, 0, 1, e.y);
    for (int i = 0; i < 4; i++) ck_assert(e.y[i] == DECODED[i]);
}
END_TEST

START_TEST(what_f16_cannot_hold_is_reported) {
    static example e;
    init_simple(&e, KEYS, 20);
    e.x[9 * 4 + 2] = 65520.0f; // residual 65519
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 20, &e.scratch, e.tile), -1);
    e.x[9 * 4 + 2] = 65521.0f;
    e.x[7 * 4 + 3] = -70000;
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 20, &e.scratch, e.tile), 7);
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 8, 20, &e.scratch, e.tile), 9);
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 10, 20, &e.scratch, e.tile), -1);

    init_simple(&e, VALUES, 20);
    for (int i = 0; i < 4; i++) e.x[5 * 4 + i] = e.x[17 * 4 + i] = i % 2 == 0 ? 65520.0f : -65520.0f;
    e.spec.scale_format = KVQ_SCALE_F16;
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 20, &e.scratch, e.tile), 5);
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 6, 20, &e.scratch, e.tile), 17);
    e.spec.scale_format = KVQ_SCALE_E4M3;
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 20, &e.scratch, e.tile), -1);
    ck_assert_uint_eq(e.tile[64 + 5], 0x7e);
    kvq_tile_decode(&e.spec, e.tile, 0, 20, e.y);
    ck_assert(e.y[5 * 4] == 448 && e.y[5 * 4 + 1] == -448);
    e.rotation[1] = -1; // the difference of two infinite products is not a number
    e.rotation[0] = e.rotation[1] = 3;
    e.x[2 * 4] = 3e38f, e.x[2 * 4 + 1] = -3e38f;
    ck_assert_int_eq(kvq_tile_encode(&e.spec, e.x, 0, 20, &e.scratch, e.tile), 2);
}
END_TEST

// ---------------------------------------------------------------- the backend

enum { N_TILES = 5, N_LONG = (N_TILES - 1) * TOKENS + 17, LONG_D = 48 };

static void fill_long(example *e, int kind, float *x) {
    init_example(e, kind, 3, LONG_D / 3, 0, TOKENS, (uint32_t)(90000 + kind));
    for (int64_t i = 0; i < (int64_t)N_LONG * LONG_D; i++) x[i] = (float)tan(2.9 * (uniform(12, i) - 0.5));
}

static kvq_backend *backend_on(kvq_context *ctx, int n_threads) {
    kvq_error    err = {0};
    kvq_backend *be = NULL;
    ctx->n_threads = n_threads;
    kvq_test_ok(kvq_backend_cpu(ctx, KVQ_COMPUTE_F32, &be, &err), &err);
    return be;
}

// Sinks end in the second tile, the last tile is short. _i: kind
START_TEST(threads_leave_no_trace) {
    static example e;
    static float   x[N_LONG * LONG_D], y[N_LONG * LONG_D], expected_y[N_LONG * LONG_D];
    static uint8_t tiles[N_TILES * MAX_TILE], expected[N_TILES * MAX_TILE];
    const int      first = TOKENS + 5;
    kvq_error      err = {0};
    fill_long(&e, _i, x);
    const size_t tile_bytes = (size_t)kvq_tile_bytes(&e.spec);
    memset(expected_y, 0xA5, sizeof expected_y);
    for (int i = 0; i < N_TILES; i++) {
        static const int FIRST[N_TILES] = {TOKENS, 5, 0, 0, 0}, END[N_TILES] = {TOKENS, TOKENS, TOKENS, TOKENS, 17};
        ck_assert_int_eq(kvq_tile_encode(&e.spec, x + i * TOKENS * LONG_D, FIRST[i], END[i], &e.scratch,
                                         expected + (size_t)i * tile_bytes),
                         -1);
        kvq_tile_decode(&e.spec, expected + (size_t)i * tile_bytes, FIRST[i], END[i], expected_y + i * TOKENS * LONG_D);
    }
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        kvq_context  ctx = kvq_test_context();
        kvq_backend *be = backend_on(&ctx, n_threads);
        int64_t      bad = 99;
        memset(tiles, 0xA5, sizeof tiles);
        memset(y, 0xA5, sizeof y);
        kvq_test_ok(be->encode_tiles(be, &e.spec, x, first, N_LONG, tiles, &bad, &err), &err);
        ck_assert_int_eq(bad, -1);
        ck_assert_mem_eq(tiles, expected, N_TILES * tile_bytes);
        expect_untouched(tiles + N_TILES * tile_bytes, GUARD);
        be->decode_tiles(be, &e.spec, tiles, first, N_LONG, y);
        ck_assert_mem_eq(y, expected_y, sizeof y);
        kvq_test_ok(be->encode_tiles(be, &e.spec, x, 0, 0, tiles, &bad, &err), &err);
        ck_assert_int_eq(bad, -1);
        be->destroy(&be);
    }
}
END_TEST

START_TEST(the_first_bad_token_of_all_tiles) {
    static example e;
    static float   x[N_LONG * LONG_D];
    static uint8_t tiles[N_TILES * MAX_TILE];
    kvq_error      err = {0};
    fill_long(&e, KEYS, x);
    e.spec.n_side = 3;
    e.spec.n_slots = 64;
    x[(4 * TOKENS + 3) * LONG_D] = x[(2 * TOKENS + 77) * LONG_D] = x[3 * TOKENS * LONG_D] = 1e6f;
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        kvq_context  ctx = kvq_test_context();
        kvq_backend *be = backend_on(&ctx, n_threads);
        int64_t      bad = -1;
        kvq_test_ok(be->encode_tiles(be, &e.spec, x, 0, N_LONG, tiles, &bad, &err), &err);
        ck_assert_int_eq(bad, 2 * TOKENS + 77);
        kvq_test_ok(be->encode_tiles(be, &e.spec, x, 3 * TOKENS + 1, N_LONG, tiles, &bad, &err), &err);
        ck_assert_int_eq(bad, 4 * TOKENS + 3);
        be->destroy(&be);
    }
}
END_TEST

START_TEST(no_memory_for_scratch_is_an_error) {
    static example e;
    static float   x[N_LONG * LONG_D];
    static uint8_t tiles[N_TILES * MAX_TILE];
    kvq_error      err = {0};
    fill_long(&e, KEYS, x);
    for (int allowed = 0; allowed <= 3; allowed++) {
        limited_memory memory = {.inner = kvq_test_context(), .left = 10};
        kvq_context    ctx = limited_context(&memory);
        kvq_backend   *be = backend_on(&ctx, 2);
        int64_t        n_live = memory.n_live, bad = 99;
        memory.left = allowed;
        kvq_status status = be->encode_tiles(be, &e.spec, x, 0, N_LONG, tiles, &bad, &err);
        if (allowed < 3)
            kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "of tiles");
        else
            kvq_test_ok(status, &err);
        ck_assert_int_eq(bad, allowed < 3 ? 99 : -1);
        ck_assert_int_eq(memory.n_live, n_live);
        be->destroy(&be);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(every_fp8_code_goes_there_and_back),
    KVQ_CASE(fp8_is_the_nearest_code),
    KVQ_CASE(a_tile_of_keys_by_hand),
    KVQ_CASE(a_tile_of_values_by_hand),
    KVQ_CASE(slots_by_hand),
    KVQ_LOOP(tiles_equal_the_plain_implementation, N_HEAD_DIMS),
    KVQ_CASE(outliers_that_find_no_slot_are_clipped),
    KVQ_CASE(negative_zero_and_missing_ranges),
    KVQ_CASE(what_f16_cannot_hold_is_reported),
    KVQ_LOOP(threads_leave_no_trace, N_KINDS),
    KVQ_CASE(the_first_bad_token_of_all_tiles),
    KVQ_CASE(no_memory_for_scratch_is_an_error),
};
KVQ_TEST_MAIN("tile", CASES)
