// SPDX-License-Identifier: Apache-2.0
// Counting on the emulated device: histograms byte for byte those of the host, for every order of threads, and the
// first element that cannot be counted.
#include <algorithm>

#include "cuda_codec_rig.h"
#include "kvq_codebook.h"
#include "kvq_cuda_ops.h"

typedef std::vector<float> Floats;

struct Shape {
    bool is_key;
    int  d, n_heads, n_side, m, n_skip;
    bool has_gradients, clamped;
    int  fill;
};

// Rows of one tensor, and by which rule they are counted.
struct Example {
    Shape             shape;
    kvq_weighting_set weightings;
    Floats            x, gradients, z, r;
};

// Gradients of both signs from 1e-30 to where squares of weights, with the largest r^2 of an example, still add up.
static float draw_gradient(const Shape &shape, uint32_t stream, size_t i) {
    double end = shape.is_key ? 8 : 1.5, u = uniform(stream, i);
    return (float)(exp(log(1e-30) + uniform(stream + 1, i) * log(end / 1e-30)) * (u < 0.5 ? -1 : 1));
}

// Every ninth channel of keys is constant, every fifth token of values; some keys equal a threshold, or nearly.
static Example make_example(const Shape &shape, kvq_weighting_set weightings, uint32_t stream) {
    Example e = {shape, weightings, {}, {}, {}, {}};
    size_t  d = (size_t)shape.d;
    for (size_t c = 0; c < d && shape.is_key; c++) {
        e.z.push_back(0.5f * (float)(c % 5) - 1);
        e.r.push_back(c % 9 == 8 ? 0.0f : 1 + 0.125f * (float)(c % 7));
    }
    for (size_t i = 0; i < d * (size_t)shape.m; i++) {
        float x = draw(shape.fill, stream, shape.is_key || i / d % 5 != 4 ? i : i / d);
        if (shape.is_key && i % 19 == 7) x = x < 0 ? -JUST_INSIDE : JUST_INSIDE;
        if (shape.is_key && i % 23 == 5) x = x < 0 ? -1.0f : 1.0f;
        e.x.push_back(shape.is_key ? x * e.r[i % d] + e.z[i % d] + (i % 27 == 8 ? 0.25f : 0) : x);
        if (shape.has_gradients) e.gradients.push_back(draw_gradient(shape, stream + 50, i));
    }
    return e;
}

static kvq_block_spec spec_of(const Example &e, const float *z, const float *r) {
    kvq_block_spec spec = {};
    spec.d = e.shape.d;
    spec.n_side = e.shape.n_side;
    spec.bits = 3;
    spec.clamp_zero = !e.shape.is_key && e.shape.clamped;
    spec.z = e.shape.is_key ? z : nullptr;
    spec.r = e.shape.is_key ? r : nullptr;
    return spec;
}

// ---------------------------------------------------------------- both sides

struct Histograms {
    std::vector<kvq_histogram *> heads;

    Histograms(const Shape &shape, kvq_weighting_set weightings) : heads((size_t)shape.n_heads, nullptr) {
        kvq_context ctx = kvq_test_context();
        for (kvq_histogram *&h : heads) kvq_test_ok(kvq_histogram_create(&ctx, weightings, &h, nullptr), nullptr);
    }
    ~Histograms() {
        kvq_context ctx = kvq_test_context();
        for (kvq_histogram *&h : heads) kvq_histogram_destroy(&ctx, &h);
    }
    Histograms(const Histograms &) = delete;
    Histograms &operator=(const Histograms &) = delete;
};

static kvq_status count_on_host(const Example &e, Histograms *to, kvq_error *err) {
    kvq_context    ctx = kvq_test_context();
    kvq_block_spec spec = spec_of(e, e.z.data(), e.r.data());
    Floats         scratch((size_t)kvq_count_scratch_floats(e.shape.m, e.shape.d) + 1), squares;
    for (float g : e.gradients) squares.push_back(g * g);
    kvq_count_tensor  tensor = {"K", &spec, e.x.data(), e.shape.has_gradients ? squares.data() : nullptr,
                                to->heads.data()};
    kvq_count_options options = {e.shape.n_heads, e.shape.n_skip, KVQ_RANGE_EXTREMES, 0};
    return kvq_count_rows(&ctx, &tensor, 1, e.shape.m, options, scratch.data(), err);
}

// Counters of all heads on the device, which several calls may add to.
struct Counters {
    kvq_weighting_set   weightings;
    size_t              floats_of_head;
    simt::Buffer<float> memory;

    Counters(const Shape &shape, kvq_weighting_set set)
        : weightings(set), floats_of_head((size_t)kvq_counters_bytes(set) / sizeof(float)),
          memory("counters", Floats(floats_of_head * (size_t)shape.n_heads, 0.0f)) {}

    // The first element that cannot be counted, or -1.
    int64_t count(const Example &e) {
        kvq_error           err;
        simt::Buffer<float> x("x", e.x), gradients("gradients", e.gradients), z("z", e.z), r("r", e.r);
        simt::Buffer<float> scratch("scratch", (size_t)kvq_cuda_count_scratch_floats(e.shape.m, e.shape.d));
        simt::Buffer<unsigned long long> first("first", 1);
        kvq_block_spec                   spec = spec_of(e, z.data(), r.data());
        kvq_count_rule                   rule = {&spec, e.shape.n_heads, e.shape.n_skip, weightings};
        kvq_test_ok(kvq_cuda_count(&rule, x.data(), e.shape.has_gradients ? gradients.data() : nullptr, e.shape.m,
                                   memory.data(), scratch.data(), first.data(), nullptr, &err),
                    &err);
        expect_clean();
        unsigned long long bad = first.values()[0];
        return bad == KVQ_CUDA_ALL_FINITE ? -1 : (int64_t)bad;
    }

    void take(Histograms *to) const {
        Floats all = memory.values();
        for (size_t h = 0; h < to->heads.size(); h++)
            kvq_histogram_merge_counters(to->heads[h], all.data() + h * floats_of_head);
    }
};

static std::vector<uint8_t> packed(const kvq_histogram *h) {
    std::vector<uint8_t> bytes((size_t)kvq_histogram_packed_bytes(h));
    kvq_histogram_pack(h, bytes.data());
    return bytes;
}

static void expect_same(const Shape &s, const Histograms &found, const Histograms &expected) {
    for (size_t h = 0; h < found.heads.size(); h++) {
        if (packed(found.heads[h]) == packed(expected.heads[h])) continue;
        const kvq_element_counts &a = found.heads[h]->counts, &b = expected.heads[h]->counts;
        ck_abort_msg("head %zu differs: %s, d %d, %d heads, n_side %d, rows %d .. %d, fill %d; points %lld not %lld, "
                     "outliers %lld not %lld, constant %lld not %lld, clipped %lld not %lld",
                     h, s.is_key ? "keys" : "values", s.d, s.n_heads, s.n_side, s.n_skip, s.m, s.fill,
                     (long long)a.n_points, (long long)b.n_points, (long long)a.n_outliers, (long long)b.n_outliers,
                     (long long)a.n_constant, (long long)b.n_constant, (long long)a.n_clipped, (long long)b.n_clipped);
    }
}

static void compare(const Shape &shape, kvq_weighting_set weightings, int n_calls, uint32_t stream, uint64_t seed) {
    Histograms expected(shape, weightings), found(shape, weightings);
    begin(seed);
    Counters counters(shape, weightings);
    for (int call = 0; call < n_calls; call++) {
        kvq_error err;
        Example   e = make_example(shape, weightings, stream + 100 * (uint32_t)call);
        kvq_test_ok(count_on_host(e, &expected, &err), &err);
        ck_assert_int_eq(counters.count(e), -1);
    }
    counters.take(&found);
    expect_same(shape, found, expected);
}

// ---------------------------------------------------------------- bytes

static const struct {
    int d, n_heads, n_side;
} WIDTHS[] = {{1, 1, 0},   {3, 3, 1},   {3, 1, 0},    {64, 2, 3}, {65, 1, 31},
              {195, 3, 2}, {195, 3, 0}, {195, 1, 40}, {600, 4, 5}};
static const struct { int m, n_skip; } ROWS[] = {{129, 0}, {33, 1}, {1, 0}, {0, 0}, {3, 3}, {2, 5}, {97, 1}};
enum { N_WIDTHS = sizeof WIDTHS / sizeof *WIDTHS, N_ROWS = sizeof ROWS / sizeof *ROWS };

static Shape shape_of(bool is_key, int width, int rows, int fill) {
    return {is_key,
            WIDTHS[width].d,
            WIDTHS[width].n_heads,
            WIDTHS[width].n_side,
            ROWS[rows].m,
            ROWS[rows].n_skip,
            true,
            fill % 2 == 1,
            fill};
}

// All shapes and kinds of numbers, of K and of V.
START_TEST(bytes_are_those_of_the_host) {
    for (int rows = 0; rows < N_ROWS; rows++) {
        int fill = (rows + _i / 2) % N_FILLS;
        if (WIDTHS[_i / 2].d > 65 && ROWS[rows].m > 33 && _i / 2 != 5) continue;
        compare(shape_of(_i % 2 == 0, _i / 2, rows, fill), KVQ_WEIGHTINGS_ALL, 1, 7 * (uint32_t)_i, (uint64_t)rows);
    }
}
END_TEST

// With gradients and without.
START_TEST(every_set_of_weightings) {
    for (int k = 0; k < 4; k++) {
        Shape shape = shape_of(k % 2 == 0, 5, 1, HEAVY_TAILS);
        shape.has_gradients = k < 2;
        compare(shape, (kvq_weighting_set)_i, 1, 2000 + (uint32_t)_i, 3);
    }
}
END_TEST

START_TEST(calls_add_up_in_any_schedule) {
    for (uint64_t seed = 0; seed < 6; seed++)
        compare(shape_of(seed % 2 == 0, 5, 1, (int)seed % N_FILLS), KVQ_WEIGHTINGS_ALL, 3, 3000, seed);
}
END_TEST

// ---------------------------------------------------------------- what cannot be counted

enum { BAD_D = 40, BAD_HEADS = 2, BAD_M = 9, BAD_ROW = 5, BAD_CHANNEL = 23, BAD_AT = BAD_ROW * BAD_D + BAD_CHANNEL };

// Of that element; r of its channel. Elements lie inside of their ranges, weights fit.
static const struct Bad {
    bool  is_key;
    float x, gradient, r;
    int   first; // -1: it can be counted
} BAD[] = {
    {true, 0.5f, 1, 1, -1},
    {true, NAN, 1, 1, BAD_AT},
    {true, INFINITY, 1, 1, BAD_AT},
    {true, -INFINITY, 1, 1, BAD_AT},
    {true, 0.5f, NAN, 1, BAD_AT},
    {true, 0.5f, -INFINITY, 1, BAD_AT},
    {true, 0.5f, 2e19f, 1, BAD_AT},    // whose square leaves f32
    {true, 0.5f, -181.02f, 1, BAD_AT}, // .. the range of the sums
    {true, 0.5f, -181.01f, 1, -1},     // and nearly so
    {true, 0.5f, 100, 2, BAD_AT},      // fits, but not times r^2
    {true, 0.5f, 0, 180000, -1},       // squares of ranges are counted in smaller units
    {true, 9, 1000, 1, -1},            // an outlier has no weight
    {true, 9, NAN, 1, BAD_AT},         // but must have a gradient
    {true, 9, 1000, 0, -1},            // nor has an element of a constant channel
    {true, 1e30f, 0, 1, -1},           // an outlier, whose square no sum can hold: another test
    {false, 0.5f, 1, 0, -1},
    {false, NAN, 1, 0, BAD_AT},
    {false, 0.5f, NAN, 0, BAD_AT},
    {false, 0.1f, -181.02f, 0, BAD_AT},
    {false, 1e30f, 0, 0, -1}, // an outlier does not count for the range of its token
};
enum { N_BAD = sizeof BAD / sizeof *BAD };

static Example make_bad(const Bad &bad) {
    Example e = {{bad.is_key, BAD_D, BAD_HEADS, 1, BAD_M, 0, true, false, 0}, KVQ_WEIGHTINGS_ALL, {}, {}, {}, {}};
    for (size_t i = 0; i < BAD_D * BAD_M; i++) {
        e.x.push_back((float)(uniform(60, i) - 0.5));
        e.gradients.push_back((float)uniform(61, i));
    }
    for (size_t t = 0; t < BAD_M && bad.r > 2; t++) e.gradients[t * BAD_D + BAD_CHANNEL] = 0;
    if (bad.is_key) e.z.assign(BAD_D, 0), e.r.assign(BAD_D, 1), e.r[BAD_CHANNEL] = bad.r;
    e.x[BAD_AT] = bad.x;
    e.gradients[BAD_AT] = bad.gradient;
    return e;
}

static void expect_first_bad(const Example &e, int64_t first, uint64_t seed) {
    kvq_error  err;
    Histograms host(e.shape, e.weightings);
    ck_assert_int_eq(count_on_host(e, &host, &err), first < 0 ? KVQ_OK : KVQ_ERR_NUMERICAL);
    begin(seed);
    Counters counters(e.shape, e.weightings);
    Floats   before = counters.memory.values();
    ck_assert_int_eq(counters.count(e), first);
    Floats after = counters.memory.values();
    bool   same = memcmp(before.data(), after.data(), before.size() * sizeof(float)) == 0;
    ck_assert_msg(same == (first >= 0), "element %lld is bad, but something was counted", (long long)first);
}

START_TEST(the_first_bad_element_is_found) {
    Example e = make_bad(BAD[_i]);
    expect_first_bad(e, BAD[_i].first, (uint64_t)_i);
    if (BAD[_i].first < 0) return;
    e.gradients[BAD_AT + 90] = NAN; // the first of several
    expect_first_bad(e, BAD[_i].first, 1);
    e.gradients[BAD_AT - 90] = NAN;
    expect_first_bad(e, BAD_AT - 90, 2);
    e.gradients[BAD_AT + 90] = e.gradients[BAD_AT - 90] = 1;
    e.shape.n_skip = BAD_ROW + 1; // what is skipped is not looked at
    expect_first_bad(e, -1, 3);
}
END_TEST

// Weights are looked at only where they are counted.
START_TEST(weights_that_nobody_counts_need_not_fit) {
    Example e = make_bad({true, 0.5f, 1000, 1, -1});
    e.weightings = KVQ_WEIGHTINGS_BASIC;
    expect_first_bad(e, -1, 1);
    e.weightings = KVQ_WEIGHTINGS_BASIC | 1u << KVQ_WEIGHT_FISHER_SCALED;
    expect_first_bad(e, BAD_AT, 1);
}
END_TEST

START_TEST(ranges_beyond_the_sums) { expect_first_bad(make_bad({true, 0.5f, 0, 190000, 0}), BAD_CHANNEL, 1); }
END_TEST

START_TEST(ranges_of_tokens_beyond_f16) {
    Example e = make_bad({false, 0.5f, 0, 0, 0});
    for (size_t c = 0; c < BAD_D; c += 2) e.x[BAD_ROW * BAD_D + c] = 2e5f; // a half width of 10^5
    e.gradients.assign(e.x.size(), 0);
    expect_first_bad(e, BAD_ROW * BAD_D, 1);
    for (size_t c = 0; c < BAD_D; c++) e.x[BAD_ROW * BAD_D + c] = 1e5f + (float)c; // only the middle is too large
    expect_first_bad(e, BAD_ROW * BAD_D, 1);
}
END_TEST

// ---------------------------------------------------------------- sums that leave their range

// Every sum of a histogram that cannot be negative, but for the bins.
static std::vector<bool> signs(const kvq_histogram *h) {
    std::vector<bool> left = {h->energy.hi < 0, h->beyond[0].hi < 0, h->beyond[1].hi < 0, h->beyond_squared.hi < 0};
    for (const kvq_weight_sums &s : h->by) {
        left.push_back(s.wxx.hi < 0);
        left.push_back(s.w2_large.hi < 0);
        left.push_back(s.w2_small.hi < 0);
    }
    return left;
}

static void expect_same_signs(const Example &e, int n_calls, size_t n_left) {
    Histograms expected(e.shape, e.weightings), found(e.shape, e.weightings);
    kvq_error  err;
    begin(1);
    Counters counters(e.shape, e.weightings);
    for (int i = 0; i < n_calls; i++) {
        kvq_test_ok(count_on_host(e, &expected, &err), &err);
        ck_assert_int_eq(counters.count(e), -1);
    }
    counters.take(&found);
    std::vector<bool> left = signs(expected.heads[0]);
    ck_assert(signs(found.heads[0]) == left);
    ck_assert_uint_eq((size_t)std::count(left.begin(), left.end(), true), n_left);
}

// One term of 2^30 a call: two of them leave the range, and four would bring the sum back to 0.
START_TEST(a_sum_that_left_its_range_stays_refused) {
    Example e = {{true, 1, 1, 0, 1, 0, false, false, 0}, KVQ_WEIGHTINGS_ALL, {0x1p25f}, {}, {0}, {0x1p17f}};
    expect_same_signs(e, 1, 0);
    expect_same_signs(e, 2, 1); // the energy; squares of what is beyond are a little smaller
    expect_same_signs(e, 4, 2);
    expect_same_signs(e, 5, 2);
}
END_TEST

// The same within the lanes of a warp, and terms that are too large by themselves.
START_TEST(large_elements_leave_the_range_at_once) {
    Example e = {{true, 1, 1, 0, 32, 0, false, false, 0}, KVQ_WEIGHTINGS_ALL, Floats(32, 0x1p25f), {}, {0}, {0x1p17f}};
    expect_same_signs(e, 1, 3); // squared weights as well
    e.x.assign(32, -1e30f);
    e.r[0] = 1;
    expect_same_signs(e, 1, 3);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(bytes_are_those_of_the_host, 2 * N_WIDTHS),
    KVQ_LOOP(every_set_of_weightings, 1 << KVQ_N_WEIGHTINGS),
    KVQ_CASE(calls_add_up_in_any_schedule),
    KVQ_LOOP(the_first_bad_element_is_found, N_BAD),
    KVQ_CASE(weights_that_nobody_counts_need_not_fit),
    KVQ_CASE(ranges_beyond_the_sums),
    KVQ_CASE(ranges_of_tokens_beyond_f16),
    KVQ_CASE(a_sum_that_left_its_range_stays_refused),
    KVQ_CASE(large_elements_leave_the_range_at_once),
};
KVQ_TEST_MAIN("cuda count", CASES)
