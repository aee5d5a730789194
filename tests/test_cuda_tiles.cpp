// SPDX-License-Identifier: Apache-2.0
// Tiles on the emulated device: the same bytes, the same decoded bits and the same first bad token as on the CPU, for
// every order of threads, and nothing for the emulator to report.
#include "cuda_codec_rig.h"

enum Kind { KEYS, VALUES, PAIRS, N_KINDS };

struct Shape {
    int kind, n_heads, head_dim, first, n_tokens;
    int n_side, n_slots; // of keys
    int fill;
    int width; // of all columns; -1: mixed up to 5, -2: up to 8
};

// One problem, and what the CPU makes of it.
struct Example {
    kvq_tile_spec                spec;
    std::vector<uint8_t>         widths, tiles;
    std::vector<kvq_tile_column> columns;
    std::vector<int32_t>         table;
    std::vector<float>           levels, z, r, middle, half, rotation, x, y;
    int                          first_bad, tile_bytes;
};

static int widest_level(const std::vector<float> &levels, int dim) { return (int)levels.size() / dim; }

// Columns of a width share a table, or each third has one of its own; levels on a grid, equal ones among them.
static void choose_columns(Example *e, const Shape &shape, uint32_t stream) {
    int    dim = shape.kind == PAIRS ? 2 : 1, shared[9];
    size_t n_columns = (size_t)(shape.n_heads * shape.head_dim / dim);
    auto   add_table = [&](int width) {
        int first = widest_level(e->levels, dim);
        for (int i = 0; i < dim << width; i++) {
            double u = uniform(stream, e->levels.size());
            e->levels.push_back((float)(shape.fill == HEAVY_TAILS ? 4 * u - 2 : floor(33 * u) / 8 - 2));
        }
        return first;
    };
    for (int width = 0; width <= 8; width++) shared[width] = add_table(width);
    for (size_t c = 0; c < n_columns; c++) {
        int width = shape.width >= 0 ? shape.width : (int)(uniform(stream + 1, c) * (shape.width == -1 ? 6 : 9));
        e->widths.push_back((uint8_t)width);
        e->table.push_back(c % 3 == 0 ? add_table(width) : shared[width]);
    }
    e->columns.resize(n_columns);
    (void)kvq_tile_layout(e->widths.data(), (int)n_columns, shape.head_dim / dim, e->columns.data());
}

// Channels without a range, with a negative one, and such that never have outliers.
static void fill_keys(Example *e, const Shape &shape, uint32_t stream) {
    size_t d = (size_t)(shape.n_heads * shape.head_dim);
    for (size_t c = 0; c < d; c++) {
        e->z.push_back(0.5f * (float)(c % 5) - 1);
        e->r.push_back((c % 3 == 1 ? -1.0f : 1.0f) * (c % 11 == 7 ? 0.0f : (float)(1 << c % 4) / 4));
        e->middle.push_back(e->z[c] + 0.25f * (float)(c % 2));
        e->half.push_back(c % 13 == 5 ? 0.0f : (float)(1 << c % 3));
    }
    for (size_t i = 0; i < d * (size_t)shape.n_tokens; i++) {
        float x = e->z[i % d] + draw(shape.fill, stream, i) * (i / d % 7 == 3 ? 16.0f : 1.0f);
        if (i % 19 == 7) x = e->middle[i % d] + (x < 0 ? -JUST_INSIDE : JUST_INSIDE) * e->half[i % d];
        e->x.push_back(x);
    }
}

// Tokens of very different size, among them zero and tiny ones, and for fp8 some that saturate.
static void fill_values(Example *e, const Shape &shape, uint32_t stream) {
    static const float SIZES[] = {1, 0, 1e-3f, 30, 1e-30f, 1e5f};
    size_t             n = (size_t)shape.head_dim;
    e->spec.scale_format = stream % 2 == 0 ? KVQ_SCALE_E4M3 : KVQ_SCALE_F16;
    e->spec.scale_exponent = (int)(stream % 13) - 6;
    for (size_t i = 0; i < n * n; i++)
        e->rotation.push_back((float)((2 * uniform(stream + 1, i) - 1) / sqrt((double)n)));
    for (size_t i = 0; i < (size_t)shape.n_tokens * (size_t)shape.n_heads; i++) {
        int n_sizes = e->spec.scale_format == KVQ_SCALE_E4M3 ? 6 : 5, at = (int)(uniform(stream + 2, i) * 3 * n_sizes);
        float size = at < n_sizes ? SIZES[at] : 1;
        for (size_t j = 0; j < n; j++) e->x.push_back(size * draw(shape.fill, stream + 3, i * n + j));
    }
}

static void point_spec(Example *e, const Shape &shape) {
    e->spec.d = shape.n_heads * shape.head_dim;
    e->spec.head_dim = shape.head_dim;
    e->spec.dim = shape.kind == PAIRS ? 2 : 1;
    e->spec.widths = pointer_to(e->widths);
    e->spec.columns = pointer_to(e->columns);
    e->spec.levels = pointer_to(e->levels);
    e->spec.table = pointer_to(e->table);
    e->spec.z = pointer_to(e->z);
    e->spec.r = pointer_to(e->r);
    e->spec.middle = pointer_to(e->middle);
    e->spec.half = pointer_to(e->half);
    e->spec.rotation = pointer_to(e->rotation);
    e->spec.n_side = shape.kind == KEYS ? shape.n_side : 0;
    e->spec.n_slots = shape.kind == KEYS ? shape.n_slots : 0;
}

static void make_example(Example *e, const Shape &shape, uint32_t problem) {
    *e = Example();
    choose_columns(e, shape, 8 * problem);
    if (shape.kind == KEYS)
        fill_keys(e, shape, 8 * problem + 3);
    else
        fill_values(e, shape, 8 * problem + 3 + problem / 2 % 2);
    point_spec(e, shape);
}

static int smaller(int a, int b) { return a < b ? a : b; }

static void code_on_cpu(Example *e, const Shape &shape) {
    size_t                n_slots = (size_t)e->spec.n_slots + 1, d = (size_t)e->spec.d;
    std::vector<float>    floats((size_t)(KVQ_TILE_TOKENS * e->spec.head_dim)), keys(n_slots);
    std::vector<uint32_t> places(n_slots);
    kvq_tile_scratch      scratch = {floats.data(), keys.data(), places.data()};
    size_t                n_tiles = (size_t)(shape.n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS;
    e->tile_bytes = kvq_tile_bytes(&e->spec);
    e->tiles.assign(n_tiles * (size_t)e->tile_bytes, 0);
    e->y.assign((size_t)shape.n_tokens * d, 0);
    e->first_bad = INT_MAX;
    for (size_t i = 0; i < n_tiles; i++) {
        int      start = (int)i * KVQ_TILE_TOKENS, end = smaller(shape.n_tokens - start, KVQ_TILE_TOKENS);
        int      first = shape.first < start ? 0 : smaller(shape.first - start, end);
        uint8_t *tile = &e->tiles[i * (size_t)e->tile_bytes];
        int      bad = kvq_tile_encode(&e->spec, &e->x[(size_t)start * d], first, end, &scratch, tile);
        if (bad >= 0) e->first_bad = smaller(e->first_bad, start + bad);
        if (e->first_bad == INT_MAX) kvq_tile_decode(&e->spec, tile, first, end, &e->y[(size_t)start * d]);
    }
}

typedef OnDevice<kvq_tile_spec, kvq_cuda_tiles, kvq_cuda_tiles_bytes, kvq_cuda_tiles_pack> DeviceSpec;

static void expect_same(const Example &e, const Shape &s, const char *what, const void *found, const void *expected,
                        size_t bytes) {
    const unsigned char *a = static_cast<const unsigned char *>(found),
                        *b = static_cast<const unsigned char *>(expected);
    for (size_t i = 0; i < bytes; i++) {
        if (a[i] != b[i])
            ck_abort_msg("%s differ at byte %zu (%02x, not %02x; tiles of %d, codes of %d): kind %d, %d heads of %d, "
                         "tokens %d .. %d, n_side %d, n_slots %d, fill %d, width %d",
                         what, i, (unsigned)a[i], (unsigned)b[i], e.tile_bytes, kvq_tile_code_bytes(&e.spec), s.kind,
                         s.n_heads, s.head_dim, s.first, s.n_tokens, s.n_side, s.n_slots, s.fill, s.width);
    }
}

static void encode_on_device(const Example &e, const Shape &shape, const DeviceSpec &on_device, float *x,
                             uint8_t *tiles, int *first_bad) {
    kvq_error                   err;
    size_t                      n = kvq_cuda_tiles_scratch_bytes(&on_device.spec, shape.n_tokens);
    simt::Buffer<unsigned char> scratch("scratch", n);
    kvq_test_ok(kvq_cuda_encode_tiles(&on_device.spec, x, shape.first, shape.n_tokens, tiles, scratch.data(), first_bad,
                                      nullptr, &err),
                &err);
    ck_assert_int_eq((int)(n > 0), e.spec.n_slots > 0);
    expect_clean();
}

// Rows of sinks are poisoned on the device: it may not read them, and may not touch them when it decodes.
static void compare_on_device(const Example &e, const Shape &shape) {
    kvq_error             err;
    DeviceSpec            on_device(e.spec);
    std::vector<float>    poisoned = e.x, expected = e.y;
    simt::Buffer<uint8_t> tiles("tiles", e.tiles.size());
    simt::Buffer<int>     first_bad("first_bad", std::vector<int>(1, INT_MAX));
    size_t                n_poisoned = (size_t)(shape.first * e.spec.d);
    memset(poisoned.data(), 0xff, n_poisoned * sizeof(float));
    memset(expected.data(), 0xff, n_poisoned * sizeof(float));
    simt::Buffer<float> x("x", poisoned), y("y", e.x.size());
    encode_on_device(e, shape, on_device, x.data(), tiles.data(), first_bad.data());
    ck_assert_int_eq(first_bad.values()[0], e.first_bad);
    if (e.first_bad != INT_MAX) return;
    expect_same(e, shape, "tiles", tiles.values().data(), e.tiles.data(), e.tiles.size());
    kvq_test_ok(
        kvq_cuda_decode_tiles(&on_device.spec, tiles.data(), shape.first, shape.n_tokens, y.data(), nullptr, &err),
        &err);
    expect_clean();
    expect_same(e, shape, "decoded tiles", y.values().data(), expected.data(), expected.size() * sizeof(float));
}

static void compare(const Shape &shape, uint32_t problem, uint64_t seed) {
    Example e;
    make_example(&e, shape, problem);
    code_on_cpu(&e, shape);
    begin(seed);
    compare_on_device(e, shape);
}

// ---------------------------------------------------------------- shapes

static const int HEAD_DIMS[] = {2, 8, 48, 64, 80, 96, 128};

// Heads of all sizes, mixed widths, sinks, short tiles; few and many slots.
START_TEST(bytes_are_those_of_the_cpu) {
    static const int SIDES[] = {0, 1, 3, 40}, SLOTS[] = {0, 2, 10, 64, 500};
    int              head_dim = HEAD_DIMS[_i % 7], kind = _i / 7 % N_KINDS, variant = _i / 21;
    Shape            shape = {kind,
                   head_dim > 64  ? 1
                              : head_dim > 8 ? 2
                                             : 3,
                              head_dim,
                              0,
                              128,
                              SIDES[(_i + variant) % 4],
                              SLOTS[(_i + variant) % 5],
                              variant % N_FILLS,
                              variant % 2 - 2};
    if (variant == 1) shape.first = 5;
    if (variant == 2) shape.first = 3, shape.n_tokens = 77;
    compare(shape, 1 + (uint32_t)_i, (uint64_t)_i);
}
END_TEST

START_TEST(every_width_of_columns) {
    for (int kind = 0; kind < N_KINDS; kind++) {
        Shape shape = {kind, 2, 8, 2, 40, 2, 30, kind + _i > 5 ? HEAVY_TAILS : FEW_VALUES, _i};
        compare(shape, 100 + (uint32_t)(10 * _i + kind), 1);
    }
}
END_TEST

// Also a tile of sinks only.
START_TEST(any_number_of_tokens_and_sinks) {
    static const int TOKENS[] = {1, 15, 16, 17, 127, 128, 129, 300}, SINKS[] = {0, 1, 15, 16, 17, 128, 130, 300};
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (int i = 0; i < 8; i += _i == 7 ? 1 : 3) {
            if (SINKS[i] > TOKENS[_i]) continue;
            Shape shape = {kind, 2, 8, SINKS[i], TOKENS[_i], 2, 12, i % N_FILLS, -1};
            compare(shape, 200 + (uint32_t)(100 * _i + 10 * i + kind), 2);
        }
    }
}
END_TEST

// Both formats of scales and all of their exponents in the test, values that saturate among them.
START_TEST(both_formats_of_scales) {
    for (uint32_t problem = 0; problem < 4; problem++) {
        Shape shape = {problem < 2 ? VALUES : PAIRS, 1, 16, 0, 64, 0, 0, (int)problem % 2, 3};
        compare(shape, 2000 + (uint32_t)(13 * _i) + problem, problem);
    }
}
END_TEST

// More candidates than slots, equal ones among them, and several blocks of slots.
START_TEST(slots_run_out) {
    static const int SLOTS[] = {1, 2, 33, 256, 257, 700};
    for (int fill = 0; fill < N_FILLS; fill++) {
        Shape shape = {KEYS, 3, 16, fill, 128, 2 + 10 * fill, SLOTS[_i], fill, -1};
        compare(shape, 3000 + (uint32_t)(10 * _i + fill), 3);
    }
}
END_TEST

START_TEST(every_schedule_gives_the_same_bytes) {
    for (int kind = 0; kind < N_KINDS; kind++) {
        Shape shape = {kind, 2, 24, 1, 40, 3, 20, kind == KEYS ? FEW_VALUES : HEAVY_TAILS, -1};
        compare(shape, 4000 + (uint32_t)kind, 100 + (uint64_t)_i);
    }
}
END_TEST

// The longest head there is, and a row longer than a block has threads.
START_TEST(large_heads) {
    Shape shape = {_i, 1, 512, 0, 18, 3, 20, FEW_VALUES, -1};
    if (_i == 3) shape = {KEYS, 8, 128, 0, 40, 5, 64, HEAVY_TAILS, 2};
    compare(shape, 5000 + (uint32_t)_i, 4);
}
END_TEST

// ---------------------------------------------------------------- limits

// Residuals of keys and scales of values beyond f16, in several tiles: the first token is found. What was cut is not
// looked at.
START_TEST(first_token_beyond_f16_is_reported) {
    for (int kind = 0; kind < N_KINDS; kind++) {
        Shape   shape = {kind, 2, 16, 1, 150, 1, _i == 4 ? 2 : 10, FEW_VALUES, 3};
        int     bad = 3 + 21 * _i;
        Example e;
        make_example(&e, shape, 6000 + (uint32_t)(10 * _i + 2 * kind));
        e.spec.scale_format = KVQ_SCALE_F16;
        for (int t = bad; t < 150; t += 17) e.x[(size_t)t * 32 + 19 + (size_t)_i] = t % 2 == 0 ? 3e6f : -1e7f;
        code_on_cpu(&e, shape);
        ck_assert_int_ne(e.first_bad, INT_MAX);
        begin((uint64_t)_i);
        compare_on_device(e, shape);
    }
}
END_TEST

static void expect_refused(const kvq_tile_spec &spec, const char *fragment) {
    unsigned char  host[8192];
    kvq_cuda_tiles out;
    kvq_error      err;
    kvq_test_failed(kvq_cuda_tiles_pack(&spec, host, nullptr, &out, &err), KVQ_ERR_USAGE, &err, fragment);
}

START_TEST(what_the_contract_does_not_allow_is_refused) {
    Example e[2];
    for (int kind = KEYS; kind <= VALUES; kind++) make_example(&e[kind], {kind, 2, 8, 0, 4, 1, 2, 0, 3}, 1);
    kvq_tile_spec spec = e[KEYS].spec;
    spec.head_dim = 1, expect_refused(spec, "heads of 1"), spec.head_dim = 513, expect_refused(spec, "heads of 513");
    spec.head_dim = 3, expect_refused(spec, "16 channels in heads of 3"), spec = e[KEYS].spec;
    spec.d = 65536, expect_refused(spec, "65536 channels"), spec = e[KEYS].spec;
    spec.dim = 2, expect_refused(spec, "2 channels of keys"), spec.dim = 3, expect_refused(spec, "3 channels");
    spec = e[KEYS].spec, spec.n_side = 2048, expect_refused(spec, "2048 outliers per side"), spec = e[KEYS].spec;
    spec.n_slots = 65535, expect_refused(spec, "65535 per tile"), spec = e[KEYS].spec;
    spec.middle = nullptr, expect_refused(spec, "keys without all"), spec = e[KEYS].spec;
    spec.z = nullptr, expect_refused(spec, "keys without all"), spec = e[VALUES].spec;
    spec.rotation = nullptr, expect_refused(spec, "values without all"), spec = e[VALUES].spec;
    spec.scale_format = KVQ_N_SCALE_FORMATS, expect_refused(spec, "format of scales"), spec = e[VALUES].spec;
    e[VALUES].widths[3] = 9, expect_refused(spec, "column 3: width 9"), e[VALUES].widths[3] = 3;
    e[VALUES].columns[2].at[2] = 1 << 20, expect_refused(spec, "column 2 of width 3: a plane of 2 bits");
}
END_TEST

START_TEST(calls_that_the_contract_does_not_allow_are_refused) {
    kvq_error err;
    Example   e;
    make_example(&e, {KEYS, 2, 8, 0, 4, 1, 2, 0, 3}, 1);
    kvq_cuda_tiles tiles = {e.spec, nullptr, kvq_tile_code_bytes(&e.spec), kvq_tile_bytes(&e.spec)};
    kvq_test_failed(kvq_cuda_encode_tiles(&tiles, nullptr, 5, 4, nullptr, nullptr, nullptr, nullptr, &err),
                    KVQ_ERR_USAGE, &err, "tokens 5 .. 4");
    kvq_test_failed(kvq_cuda_decode_tiles(&tiles, nullptr, 0, INT32_MAX, nullptr, nullptr, &err), KVQ_ERR_USAGE, &err,
                    "tokens 0 .. 2147483647");
    kvq_test_failed(kvq_cuda_decode_tiles(&tiles, (uint8_t *)2, 0, 4, nullptr, nullptr, &err), KVQ_ERR_USAGE, &err,
                    "multiple of 4");
    kvq_test_failed(kvq_cuda_encode_tiles(&tiles, nullptr, 0, 4, nullptr, (void *)4, nullptr, nullptr, &err),
                    KVQ_ERR_USAGE, &err, "multiple of 8");
    kvq_test_ok(kvq_cuda_encode_tiles(&tiles, nullptr, 0, 0, nullptr, nullptr, nullptr, nullptr, &err), &err);
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(bytes_are_those_of_the_cpu, 63),
    KVQ_LOOP(every_width_of_columns, 9),
    KVQ_LOOP(any_number_of_tokens_and_sinks, 8),
    KVQ_LOOP(both_formats_of_scales, 7),
    KVQ_LOOP(slots_run_out, 6),
    KVQ_LOOP(every_schedule_gives_the_same_bytes, 10),
    KVQ_LOOP(large_heads, 4),
    KVQ_LOOP(first_token_beyond_f16_is_reported, 7),
    KVQ_CASE(what_the_contract_does_not_allow_is_refused),
    KVQ_CASE(calls_that_the_contract_does_not_allow_are_refused),
};
KVQ_TEST_MAIN("test_cuda_tiles", cases)
