// SPDX-License-Identifier: Apache-2.0
// Rows on the emulated device: the same bytes, the same decoded bits and the same first bad token as on the CPU, for
// every order of threads, and nothing for the emulator to report.
#include "cuda_codec_rig.h"

// One problem, and what the CPU makes of it.
struct Example {
    kvq_block_spec       spec;
    std::vector<float>   z, r, grid_z, levels, decoded, x, y;
    std::vector<uint8_t> rows;
    int                  m, first_bad;
    size_t               row_bytes;
};

struct Shape {
    bool is_key;
    int  d, bits, n_side, m;
    int  n_groups;          // 0: one table
    bool decodes_otherwise; // by a second table
    bool clamped;           // zero points
    int  fill;
};

// Ascending levels; of even problems on a grid, so that elements lie in the middle of two.
static std::vector<float> make_levels(const Shape &shape, uint32_t stream, bool on_grid) {
    int                n = 1 << shape.bits;
    std::vector<float> levels;
    for (int table = 0; table < (shape.n_groups > 1 ? shape.n_groups : 1); table++) {
        double at = -1.2 + 0.4 * uniform(stream, (size_t)table);
        for (int i = 0; i < n; i++) {
            levels.push_back((float)(on_grid ? 2.0 * i / (n - 1) - 1 : at));
            at += 2.4 * uniform(stream + 1, levels.size()) / n;
        }
    }
    return levels;
}

// Every ninth channel of keys is constant, but not in all of the tokens; every fifth token of values is.
static void fill_example(Example *e, const Shape &shape, uint32_t problem) {
    size_t d = (size_t)shape.d;
    for (size_t c = 0; c < d && shape.is_key; c++) {
        e->z.push_back(0.5f * (float)(c % 5) - 1);
        e->r.push_back(c % 9 == 8 ? 0.0f : 1 + 0.125f * (float)(c % 7));
        if (shape.clamped) e->grid_z.push_back(kvq_block_clamped_middle(e->z[c], e->r[c], 1 << shape.bits));
    }
    for (size_t i = 0; i < d * (size_t)shape.m; i++) {
        float x = draw(shape.fill, problem, shape.is_key || i / d % 5 != 4 ? i : i / d);
        if (shape.is_key && i % 19 == 7) x = x < 0 ? -JUST_INSIDE : JUST_INSIDE;
        if (shape.is_key) x = x * e->r[i % d] + e->z[i % d] + (i % 27 == 8 ? 0.25f : 0);
        e->x.push_back(x);
    }
}

static void code_on_cpu(Example *e) {
    std::vector<float>    keys(2 * (KVQ_BLOCK_MAX_SIDE + 1));
    std::vector<uint16_t> channels(keys.size());
    size_t                d = (size_t)e->spec.d, half = keys.size() / 2;
    kvq_block_scratch     scratch = {&keys[0], &keys[half], &channels[0], &channels[half], 0, 0};
    e->row_bytes = (size_t)kvq_block_row_bytes(&e->spec);
    e->rows.assign((size_t)e->m * e->row_bytes, 0);
    e->y.assign((size_t)e->m * d, 0);
    e->first_bad = INT_MAX;
    for (size_t t = 0; t < (size_t)e->m; t++) {
        uint8_t *row = &e->rows[t * e->row_bytes];
        if (!kvq_block_encode(&e->spec, &e->x[t * d], &scratch, row) && e->first_bad == INT_MAX) e->first_bad = (int)t;
        kvq_block_decode(&e->spec, row, &e->y[t * d]);
    }
}

static Example make_example(const Shape &shape, uint32_t problem) {
    Example e = {};
    e.m = shape.m;
    e.levels = make_levels(shape, 1000 + problem, problem % 2 == 0);
    if (shape.decodes_otherwise) e.decoded = make_levels(shape, 3000 + problem, false);
    fill_example(&e, shape, 5000 + problem);
    return e;
}

// Of a spec only after the last change of the vectors: it points to them.
static void point_spec(Example *e, const Shape &shape) {
    e->spec.d = shape.d;
    e->spec.bits = shape.bits;
    e->spec.n_side = shape.n_side;
    e->spec.n_groups = shape.n_groups;
    e->spec.levels = pointer_to(e->levels);
    e->spec.decoded = pointer_to(e->decoded);
    e->spec.z = pointer_to(e->z);
    e->spec.r = pointer_to(e->r);
    e->spec.grid_z = pointer_to(e->grid_z);
    e->spec.clamp_zero = !shape.is_key && shape.clamped;
}

typedef OnDevice<kvq_block_spec, kvq_block_spec, kvq_cuda_rows_bytes, kvq_cuda_rows_pack> DeviceSpec;

static void expect_same(const Example &e, const Shape &s, const char *what, const void *found, const void *expected,
                        size_t bytes) {
    const unsigned char *a = static_cast<const unsigned char *>(found),
                        *b = static_cast<const unsigned char *>(expected);
    for (size_t i = 0; i < bytes; i++) {
        if (a[i] != b[i])
            ck_abort_msg(
                "%s differ at byte %zu (%02x, not %02x; rows of %zu): %s, d %d, %d bits, n_side %d, %d tokens, "
                "%d tables%s%s, fill %d",
                what, i, (unsigned)a[i], (unsigned)b[i], e.row_bytes, s.is_key ? "keys" : "values", s.d, s.bits,
                s.n_side, s.m, s.n_groups, s.decodes_otherwise ? ", decoded otherwise" : "",
                s.clamped ? ", clamped" : "", s.fill);
    }
}

static void compare_on_device(const Example &e, const Shape &shape) {
    kvq_error             err;
    DeviceSpec            on_device(e.spec);
    simt::Buffer<float>   x("x", e.x), y("y", e.x.size());
    simt::Buffer<uint8_t> rows("rows", e.rows.size());
    simt::Buffer<int>     first_bad("first_bad", std::vector<int>(1, INT_MAX));
    kvq_test_ok(kvq_cuda_encode_rows(&on_device.spec, x.data(), e.m, rows.data(), first_bad.data(), nullptr, &err),
                &err);
    expect_clean();
    ck_assert_int_eq(first_bad.values()[0], e.first_bad);
    size_t sound = e.first_bad == INT_MAX ? (size_t)e.m : (size_t)e.first_bad;
    expect_same(e, shape, "rows", rows.values().data(), e.rows.data(), sound * e.row_bytes);
    kvq_test_ok(kvq_cuda_decode_rows(&on_device.spec, rows.data(), (int64_t)sound, y.data(), nullptr, &err), &err);
    expect_clean();
    expect_same(e, shape, "decoded rows", y.values().data(), e.y.data(), sound * (size_t)e.spec.d * sizeof(float));
}

static void compare(const Shape &shape, uint32_t problem, uint64_t seed) {
    Example e = make_example(shape, problem);
    point_spec(&e, shape);
    code_on_cpu(&e);
    begin(seed);
    compare_on_device(e, shape);
}

// ---------------------------------------------------------------- shapes

static const int WIDTHS[] = {1, 3, 8, 31, 48, 65, 192, 1024}, BITS[] = {1, 2, 3, 4, 5, 7, 8};
enum { N_WIDTHS = sizeof WIDTHS / sizeof *WIDTHS, N_BITS = sizeof BITS / sizeof *BITS };

// All widths of rows and codes, K and V, with none, few, several and as many outliers as there may be.
START_TEST(bytes_are_those_of_the_cpu) {
    int bits = BITS[_i % N_BITS], d = WIDTHS[_i / N_BITS];
    for (uint32_t problem = 0; problem < (d < 1000 ? 24 : 4); problem++) {
        static const int SIDES[] = {0, 1, 3, 1000};
        Shape            shape = {problem % 2 == 0, d, bits, SIDES[problem / 2 % 4], 3, 0, false, false, 0};
        if (d >= 1000) shape.n_side = problem < 2 ? 6 : 40, shape.m = 2;
        if (2 * shape.n_side >= d) shape.n_side = (d - 1) / 2;
        shape.fill = (int)(problem / 2 + problem / 8) % N_FILLS;
        compare(shape, problem + 100 * (uint32_t)_i, problem);
    }
}
END_TEST

// Tables that begin and end inside of a group of 32 channels; second tables; clamped zero points.
START_TEST(every_kind_of_table) {
    static const int HEADS[] = {6, 8, 24, 48, 64, 80}, TABLES[] = {1, 2, 3, 4, 8};
    for (uint32_t kind = 0; kind < 8; kind++) {
        int   n = TABLES[_i % 5];
        Shape shape = {kind % 2 == 0,     HEADS[_i / 5] * n, BITS[(kind + (uint32_t)_i) % 5], 2, 2, n,
                       kind / 2 % 2 == 1, kind / 4 % 2 == 1, (int)kind / 2 % N_FILLS};
        compare(shape, 7000 + kind + 10 * (uint32_t)_i, kind);
    }
}
END_TEST

START_TEST(any_number_of_tokens) {
    static const int TOKENS[] = {1, 15, 16, 17, 127, 128, 129, 300};
    for (int kind = 0; kind < 4; kind++) {
        Shape shape = {kind % 2 == 0, kind < 2 ? 48 : 8, 3, 1 + kind / 2, TOKENS[_i], 0, false, false, HEAVY_TAILS};
        compare(shape, 8000 + (uint32_t)(kind + 10 * _i), (uint64_t)kind);
    }
}
END_TEST

// The order of threads leaves no trace, where many elements compete for few slots.
START_TEST(every_schedule_gives_the_same_bytes) {
    for (uint32_t problem = 0; problem < 6; problem++) {
        Shape shape = {problem % 2 == 0, 192, 3, 2, 2, 3, false, problem == 3, (int)(problem / 2)};
        compare(shape, 9000 + problem, 1000 + (uint64_t)_i);
    }
}
END_TEST

// Long lists of outliers and rows longer than a block has threads, many times over.
START_TEST(long_rows) {
    Shape shape = {_i % 2 == 0, _i < 2 ? 4099 : 65534, 2, _i < 2 ? 100 : 7, 1, 0, false, false, _i == 3 ? 1 : 0};
    compare(shape, 9500 + (uint32_t)_i, 3);
}
END_TEST

// ---------------------------------------------------------------- limits

// Numbers beyond f16 in some tokens: the first of them is found, whoever comes first; the ones before it are sound.
START_TEST(first_token_beyond_f16_is_reported) {
    for (int kind = 0; kind < 5; kind++) {
        static const int SIDES[] = {1, 1, 2, 2, 0}; // without outliers only a range can be beyond
        Shape            shape = {kind % 2 == 0 && kind < 4, 48, 3, SIDES[kind], 20, 0, false, false, FEW_VALUES};
        Example          e = make_example(shape, 9600 + (uint32_t)kind);
        int              bad = 3 + _i;
        point_spec(&e, shape);
        for (int t = bad; t < 20; t += 1 + kind) {
            for (size_t c = 0; c < 48; c++) { // keys: a residual; values: a residual, or the range of the rest
                if (c % 24 == 3 || (kind == 3 && c % 4 == 1)) e.x[(size_t)t * 48 + c] = c % 8 == 3 ? 1e9f : -3e38f;
            }
        }
        code_on_cpu(&e);
        ck_assert_int_eq(e.first_bad, bad);
        begin((uint64_t)(10 * _i + kind));
        compare_on_device(e, shape);
    }
}
END_TEST

static void expect_refused(kvq_block_spec spec, const char *fragment) {
    unsigned char  host[4096];
    kvq_block_spec out;
    kvq_error      err;
    kvq_test_failed(kvq_cuda_rows_pack(&spec, host, nullptr, &out, &err), KVQ_ERR_USAGE, &err, fragment);
}

START_TEST(what_the_contract_does_not_allow_is_refused) {
    Shape   shape = {true, 8, 2, 1, 1, 0, false, false, 0};
    Example e = make_example(shape, 1);
    point_spec(&e, shape);
    kvq_block_spec spec = e.spec, out;
    unsigned char  host[4096];
    kvq_error      err;
    spec.d = 0, expect_refused(spec, "0 channels"), spec = e.spec;
    spec.d = 65535, expect_refused(spec, "65535 channels"), spec = e.spec;
    spec.bits = 0, expect_refused(spec, "0 bits"), spec = e.spec;
    spec.bits = 9, expect_refused(spec, "9 bits"), spec = e.spec;
    spec.n_side = -1, expect_refused(spec, "-1 outliers"), spec = e.spec;
    spec.n_side = 4, expect_refused(spec, "4 outliers per side of 8"), spec = e.spec;
    spec.n_groups = 3, expect_refused(spec, "3 tables"), spec = e.spec;
    spec.levels = nullptr, expect_refused(spec, "without levels"), spec = e.spec;
    spec.z = nullptr, expect_refused(spec, "one of z and r"), spec = e.spec;
    spec.grid_z = spec.z, spec.z = spec.r = nullptr, expect_refused(spec, "without ranges");
    kvq_test_failed(kvq_cuda_rows_pack(&e.spec, host, (void *)8, &out, &err), KVQ_ERR_USAGE, &err, "multiple of 16");
    kvq_test_failed(kvq_cuda_encode_rows(&e.spec, nullptr, -1, nullptr, nullptr, nullptr, &err), KVQ_ERR_USAGE, &err,
                    "-1 rows");
    kvq_test_failed(kvq_cuda_decode_rows(&e.spec, host, (int64_t)1 << 31, nullptr, nullptr, &err), KVQ_ERR_USAGE, &err,
                    "2147483648 rows");
    kvq_test_failed(kvq_cuda_decode_rows(&e.spec, (uint8_t *)6, 1, nullptr, nullptr, &err), KVQ_ERR_USAGE, &err,
                    "multiple of 4");
    kvq_test_ok(kvq_cuda_encode_rows(&e.spec, nullptr, 0, nullptr, nullptr, nullptr, &err), &err); // nothing to do
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(bytes_are_those_of_the_cpu, N_WIDTHS *N_BITS),
    KVQ_LOOP(every_kind_of_table, 30),
    KVQ_LOOP(any_number_of_tokens, 8),
    KVQ_LOOP(every_schedule_gives_the_same_bytes, 20),
    KVQ_LOOP(long_rows, 4),
    KVQ_LOOP(first_token_beyond_f16_is_reported, 5),
    KVQ_CASE(what_the_contract_does_not_allow_is_refused),
};
KVQ_TEST_MAIN("test_cuda_rows", cases)
