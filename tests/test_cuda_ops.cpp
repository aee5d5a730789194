// SPDX-License-Identifier: Apache-2.0
//
// CUDA operations on rows and elements, losses and linear layers, under the emulator, against the CPU backend over
// awkward sizes. All but linear layers claim the CPU's bits, those with sums as well (they add in f64 in its order), so
// they have no tolerance; but losses on a real device (tests/device) have one for the log and exp of its library. Each
// case runs with several orders of threads and blocks: that they all give the same bits shows that no order matters.
#include <math.h>

#include "cuda_ops_rig.h"

// About the 8 lanes of a sum, a warp, a block, and the tile of 2048; also more rows than the KVQ_CUDA_MAX_BLOCKS of the
// build of this suite.
static const int64_t SIZES[][2] = {{1, 1},   {3, 7},   {2, 8},    {5, 9},    {1, 31},   {2, 33},   {2, 255}, {7, 256},
                                   {2, 257}, {4, 333}, {2, 2047}, {2, 2048}, {2, 2049}, {5, 4103}, {17, 3},  {257, 31}};
enum { N_SIZES = sizeof SIZES / sizeof *SIZES };

// Also more elements than so many blocks have threads.
static const int64_t LENGTHS[] = {0, 1, 255, 256, 257, 768, 1000, 5000};
enum { N_LENGTHS = sizeof LENGTHS / sizeof *LENGTHS };
static_assert(KVQ_CUDA_MAX_BLOCKS * 256 < 1000 && KVQ_CUDA_MAX_BLOCKS < 4, "the sizes must exceed a grid");

static std::string named(const char *what, int64_t m, int64_t n) {
    return std::string(what) + " of " + std::to_string(m) + " x " + std::to_string(n);
}

// ---------------------------------------------------------------- norms

START_TEST(rmsnorm_has_the_bits_of_the_cpu) {
    int64_t m = SIZES[_i][0], n = SIZES[_i][1];
    rig_open();
    Floats x = rig_wide_randoms((size_t)(m * n), 1), w = rig_randoms((size_t)n, 2, 2), expected(x.size());
    cpu->rmsnorm(cpu, x.data(), w.data(), 1e-5f, expected.data(), m, n);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_x("x", x), d_w("w", w), d_y("y", x.size());
        kvq_test_ok(kvq_cuda_rmsnorm(d_x.data(), d_w.data(), 1e-5f, d_y.data(), m, n, NULL, NULL), NULL);
        rig_same_bits(d_y.values(), expected, named("y", m, n));
        kvq_test_ok(kvq_cuda_rmsnorm(d_x.data(), d_w.data(), 1e-5f, d_x.data(), m, n, NULL, NULL), NULL);
        expect_clean();
        rig_same_bits(d_x.values(), expected, named("y in place", m, n));
    }
    rig_close();
}
END_TEST

START_TEST(rmsnorm_backward_has_the_bits_of_the_cpu) {
    int64_t m = SIZES[_i][0], n = SIZES[_i][1];
    rig_open();
    Floats x = rig_wide_randoms((size_t)(m * n), 3), w = rig_randoms((size_t)n, 4, 2),
           dy = rig_wide_randoms(x.size(), 5), dx = rig_randoms(x.size(), 6, 1), expected = dx;
    cpu->rmsnorm_backward(cpu, x.data(), w.data(), 1e-5f, dy.data(), expected.data(), m, n);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_x("x", x), d_w("w", w), d_dy("dy", dy), d_dx("dx", dx);
        kvq_test_ok(
            kvq_cuda_rmsnorm_backward(d_x.data(), d_w.data(), 1e-5f, d_dy.data(), d_dx.data(), m, n, NULL, NULL), NULL);
        expect_clean();
        rig_same_bits(d_dx.values(), expected, named("dx", m, n));
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- rotary embedding

typedef struct rope_case {
    int64_t m;
    int     n_heads, head_dim, rot, direction;
    float   scale;
} rope_case;
static const rope_case ROPES[] = {{1, 1, 2, 2, 1, 1},   {5, 3, 10, 6, 1, 0.7f},   {3, 4, 128, 128, -1, 1},
                                  {2, 9, 64, 64, 1, 1}, {4, 2, 16, 16, -1, 1.3f}, {13, 1, 4, 2, 1, 1},
                                  {7, 5, 24, 20, -1, 2}};
enum { N_ROPES = sizeof ROPES / sizeof *ROPES };

START_TEST(rope_has_the_bits_of_the_cpu) {
    rope_case r = ROPES[_i];
    size_t    half = (size_t)r.rot / 2, m = (size_t)r.m;
    rig_open();
    Floats x = rig_randoms(m * (size_t)(r.n_heads * r.head_dim), 7, 3), c(m * half), s(m * half), expected = x;
    for (size_t i = 0; i < m * half; i++) c[i] = (float)cos(0.7 * (double)i), s[i] = (float)sin(0.7 * (double)i);
    cpu->rope(cpu, expected.data(), c.data(), s.data(), r.direction, r.scale, r.m, r.n_heads, r.head_dim, r.rot);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_x("x", x), d_c("cos", c), d_s("sin", s);
        kvq_test_ok(kvq_cuda_rope(d_x.data(), d_c.data(), d_s.data(), r.direction, r.scale, r.m, r.n_heads, r.head_dim,
                                  r.rot, NULL, NULL),
                    NULL);
        expect_clean();
        rig_same_bits(d_x.values(), expected, "x");
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- elements

START_TEST(sums_and_caps_have_the_bits_of_the_cpu) {
    size_t n = (size_t)LENGTHS[_i];
    rig_open();
    Floats x = rig_wide_randoms(n, 8), y = rig_randoms(n, 9, 100), sum = y, capped = y;
    if (n > 3) capped[0] = y[0] = 1e30f, capped[1] = y[1] = -1e-20f, capped[2] = y[2] = -INFINITY, sum = y;
    cpu->add(cpu, sum.data(), x.data(), (int64_t)n);
    cpu->softcap(cpu, 30, capped.data(), (int64_t)n);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_x("x", x), d_y("y", y), d_z("z", y);
        kvq_test_ok(kvq_cuda_add(d_y.data(), d_x.data(), (int64_t)n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_softcap(30, d_z.data(), (int64_t)n, NULL, NULL), NULL);
        expect_clean();
        rig_same_bits(d_y.values(), sum, "y + x");
        rig_same_bits(d_z.values(), capped, "capped");
    }
    rig_close();
}
END_TEST

// _i: both kinds for each length
START_TEST(gates_have_the_bits_of_the_cpu) {
    size_t        n = (size_t)LENGTHS[_i / 2];
    kvq_gate_kind kind = _i % 2 == 0 ? KVQ_GATE_SILU : KVQ_GATE_GELU_TANH;
    const float   extremes[] = {-500, 500, -1e19f, 1e19f, 0, -16, 16};
    rig_open();
    Floats gate = rig_randoms(n, 10, 20), up = rig_randoms(n, 11, 2), dy = rig_randoms(n, 12, 1), y(n);
    for (size_t i = 0; i < 7 && n > 7; i++) gate[i] = extremes[i];
    Floats dgate = gate, dup = up;
    cpu->gated_mul(cpu, kind, gate.data(), up.data(), y.data(), (int64_t)n);
    cpu->gated_mul_backward(cpu, kind, dgate.data(), dup.data(), dy.data(), (int64_t)n);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_gate("gate", gate), d_up("up", up), d_dy("dy", dy), d_y("y", n), d_over("over", gate);
        kvq_test_ok(kvq_cuda_gated_mul(kind, d_gate.data(), d_up.data(), d_y.data(), (int64_t)n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_gated_mul(kind, d_over.data(), d_up.data(), d_over.data(), (int64_t)n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_gated_mul_backward(kind, d_gate.data(), d_up.data(), d_dy.data(), (int64_t)n, NULL, NULL),
                    NULL);
        expect_clean();
        rig_same_bits(d_y.values(), y, "y");
        rig_same_bits(d_over.values(), y, "y in place");
        rig_same_bits(d_gate.values(), dgate, "dgate");
        rig_same_bits(d_up.values(), dup, "dup");
    }
    rig_close();
}
END_TEST

START_TEST(bf16_is_rounded_as_on_the_host) {
    Floats x = rig_wide_randoms(1000, 13);
    for (size_t i = 0; i < 256; i++) x[i] = kvq_float_of_bits((uint32_t)(0x3f800000u + (i << 8))); // ties among them
    x[300] = INFINITY, x[301] = 3.4e38f, x[302] = -0.0f;
    simt::Buffer<float>    d_x("x", x), d_z("z", x.size());
    simt::Buffer<uint16_t> d_y("y", x.size());
    begin(1);
    kvq_test_ok(kvq_cuda_bf16_of_float(d_x.data(), d_y.data(), 1000, NULL, NULL), NULL);
    kvq_test_ok(kvq_cuda_float_of_bf16(d_y.data(), d_z.data(), 1000, NULL, NULL), NULL);
    expect_clean();
    std::vector<uint16_t> y = d_y.values();
    Floats                z = d_z.values();
    for (size_t i = 0; i < x.size(); i++) {
        ck_assert_uint_eq(y[i], kvq_bf16_of_float(x[i]));
        ck_assert_uint_eq(kvq_bits_of_float(z[i]), (uint32_t)kvq_bf16_of_float(x[i]) << 16);
    }
}
END_TEST

// ---------------------------------------------------------------- halves

// Everything about the edges of f16: overflow at 65520, the largest one, the smallest normal and subnormal ones and
// what rounds to them or away, ties, zeros with signs, numbers beyond, and those that are none.
static const float EDGES[] = {65504,           65519.996f,   65520,      65536,      3e38f,       0x1p-14f,
                              0x1.ffcp-15f,    0x1.ffep-15f, 0x1p-24f,   0x1p-25f,   0x1.8p-25f,  0x1p-149f,
                              0x1.000002p-25f, 1.5f,         0x1.002p0f, 0x1.006p0f, 0x1.0021p0f, 0,
                              1e-40f,          INFINITY,     NAN};
enum { N_EDGES = sizeof EDGES / sizeof *EDGES };

// The edges with both signs, and numbers of all magnitudes that f16 has; n below twice the edges has the first of them.
static Floats numbers_about_f16(size_t n) {
    Floats x = rig_randoms(n, 50, 1);
    for (size_t i = 0; i < n; i++) x[i] = ldexpf(x[i], (int)(44 * rig_uniform(51, i)) - 28);
    for (size_t i = 0; i < 2 * N_EDGES && i < n; i++) x[i] = i % 2 == 0 ? EDGES[i / 2] : -EDGES[i / 2];
    return x;
}

START_TEST(halves_are_rounded_as_on_the_cpu) {
    size_t n = (size_t)LENGTHS[_i];
    rig_open();
    Floats                x = numbers_about_f16(n), rounded = x, loaded(n);
    std::vector<uint16_t> halves(n);
    cpu->round_halves(cpu, rounded.data(), (int64_t)n);
    for (size_t i = 0; i < n; i++) halves[i] = kvq_half_of_float(x[i]); // the table's stops at the first bad one
    cpu->load_halves(cpu, halves.data(), (int64_t)n, loaded.data());
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float>              d_x("x", x), d_loaded("loaded", n);
        simt::Buffer<uint16_t>           d_halves("halves", n);
        simt::Buffer<unsigned long long> d_first("first", 1);
        kvq_test_ok(kvq_cuda_store_halves(d_x.data(), (int64_t)n, d_halves.data(), d_first.data(), NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_load_halves(d_halves.data(), (int64_t)n, d_loaded.data(), NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_round_halves(d_x.data(), (int64_t)n, NULL, NULL), NULL);
        expect_clean();
        ck_assert(d_halves.values() == halves);
        ck_assert(d_first.values()[0] == (unsigned long long)cpu->store_halves(cpu, x.data(), (int64_t)n, NULL));
        rig_same_bits(d_loaded.values(), loaded, "loaded");
        rig_same_bits(d_x.values(), rounded, "rounded");
    }
    rig_close();
}
END_TEST

// All 65536, of which the encoder above makes few; NaN keeps its payload.
START_TEST(every_half_is_loaded_as_on_the_cpu) {
    std::vector<uint16_t> halves(65536);
    for (size_t i = 0; i < halves.size(); i++) halves[i] = (uint16_t)i;
    rig_open();
    Floats expected(halves.size());
    cpu->load_halves(cpu, halves.data(), (int64_t)halves.size(), expected.data());
    begin(1);
    simt::Buffer<uint16_t> d_halves("halves", halves);
    simt::Buffer<float>    d_x("x", halves.size());
    kvq_test_ok(kvq_cuda_load_halves(d_halves.data(), (int64_t)halves.size(), d_x.data(), NULL, NULL), NULL);
    expect_clean();
    rig_same_bits(d_x.values(), expected, "x");
    rig_close();
}
END_TEST

// From the last place to the first one, so that each has bad numbers behind it; with and without storing, and of the
// numbers before it.
START_TEST(the_first_number_beyond_f16_is_found) {
    const size_t places[] = {0, 1, 255, 256, 767, 768, 4095, 5300};
    const float  bad[] = {65520, -INFINITY, NAN, -65520};
    const size_t n = 5301;
    rig_open();
    Floats x = rig_randoms(n, 52, 65504);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        Floats                           with_bad = x;
        simt::Buffer<unsigned long long> d_first("first", 1);
        simt::Buffer<uint16_t>           d_to("to", n);
        simt::Buffer<float>              d_x("x", x);
        for (size_t i = 8; i-- > 0;) {
            with_bad[places[i]] = bad[i % 4];
            d_x.set(with_bad);
            for (int stores = 0; stores < 2; stores++) {
                uint16_t *to = stores ? d_to.data() : NULL;
                kvq_test_ok(kvq_cuda_store_halves(d_x.data(), (int64_t)n, to, d_first.data(), NULL, NULL), NULL);
                ck_assert_uint_eq(d_first.values()[0], places[i]);
                ck_assert_int_eq(cpu->store_halves(cpu, with_bad.data(), (int64_t)n, NULL), (int64_t)places[i]);
                kvq_test_ok(kvq_cuda_store_halves(d_x.data(), (int64_t)places[i], to, d_first.data(), NULL, NULL),
                            NULL);
                ck_assert(d_first.values()[0] == KVQ_CUDA_ALL_FINITE);
                expect_clean();
            }
        }
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- rows

// The product of a library has no bias yet: y + bias, rounded once.
START_TEST(a_bias_is_added_to_every_row) {
    int64_t m = SIZES[_i][0], n = SIZES[_i][1];
    Floats  y = rig_wide_randoms((size_t)(m * n), 53), bias = rig_wide_randoms((size_t)n, 54), expected = y;
    for (size_t i = 0; i < expected.size(); i++) expected[i] += bias[i % (size_t)n];
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_y("y", y), d_bias("bias", bias);
        kvq_test_ok(kvq_cuda_add_bias(d_y.data(), d_bias.data(), 0, n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_add_bias(d_y.data(), d_bias.data(), m, 0, NULL, NULL), NULL);
        rig_same_bits(d_y.values(), y, "y without a row");
        kvq_test_ok(kvq_cuda_add_bias(d_y.data(), d_bias.data(), m, n, NULL, NULL), NULL);
        expect_clean();
        rig_same_bits(d_y.values(), expected, named("y + bias", m, n));
    }
}
END_TEST

START_TEST(rows_are_gathered_and_scattered_as_on_the_cpu) {
    int64_t m = SIZES[_i][0], n = SIZES[_i][1], all = m + 5;
    while (all % 7 == 0) all++; // then i * 7 + 3 are different rows
    rig_open();
    Floats x = rig_randoms((size_t)(all * n), 14, 1), y((size_t)(m * n)), sum = rig_randoms(x.size(), 15, 1),
           expected = sum, scales = rig_randoms((size_t)m, 16, 1);
    std::vector<int32_t> rows((size_t)m);
    for (int64_t i = 0; i < m; i++) rows[(size_t)i] = (int32_t)((i * 7 + 3) % all);
    cpu->gather_rows(cpu, x.data(), rows.data(), y.data(), m, n);
    cpu->scatter_rows(cpu, y.data(), rows.data(), scales.data(), expected.data(), m, n);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float>   d_x("x", x), d_y("y", y.size()), d_sum("sum", sum), d_scales("scales", scales);
        simt::Buffer<int32_t> d_rows("rows", rows);
        kvq_test_ok(kvq_cuda_gather_rows(d_x.data(), d_rows.data(), d_y.data(), m, n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_scatter_rows(d_y.data(), d_rows.data(), d_scales.data(), d_sum.data(), m, n, NULL, NULL),
                    NULL);
        expect_clean();
        rig_same_bits(d_y.values(), y, named("gathered", m, n));
        rig_same_bits(d_sum.values(), expected, named("scattered", m, n));
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- finite numbers

START_TEST(the_first_nonfinite_value_is_found) {
    const size_t places[] = {0, 1, 255, 256, 767, 768, 4095, 5300};
    size_t       n = 5301;
    Floats       x = rig_randoms(n, 17, 1e30);
    begin(1);
    simt::Buffer<unsigned long long> d_first("first", 1);
    simt::Buffer<float>              d_x("x", x);
    for (size_t i = 8; i-- > 0;) {
        x[places[i]] = i % 2 == 0 ? NAN : -INFINITY;
        d_x.set(x);
        kvq_test_ok(kvq_cuda_find_nonfinite(d_x.data(), (int64_t)n, d_first.data(), NULL, NULL), NULL);
        ck_assert_uint_eq(d_first.values()[0], places[i]);
        kvq_test_ok(kvq_cuda_find_nonfinite(d_x.data(), (int64_t)places[i], d_first.data(), NULL, NULL), NULL);
        ck_assert(d_first.values()[0] == KVQ_CUDA_ALL_FINITE);
        expect_clean();
    }
}
END_TEST

// ---------------------------------------------------------------- losses

// About five, the lanes, a block and the tile.
static const int64_t LOGITS[][2] = {{1, 1},  {3, 2},   {2, 3},    {3, 5},    {4, 7},    {2, 8},    {3, 9},
                                    {5, 40}, {3, 257}, {5, 1003}, {2, 2048}, {3, 2049}, {5, 4103}, {17, 3}};
enum { N_LOGITS = sizeof LOGITS / sizeof *LOGITS };

// Half of the rows in steps of a half, so that they have ties; one row of a single value, one with tokens of no weight.
static Floats some_logits(int64_t m, int64_t n, uint32_t stream) {
    Floats x = rig_randoms((size_t)(m * n), stream, 12);
    for (int64_t i = 0; i < m * n; i++) {
        float *value = &x[(size_t)i];
        if (i / n % 2 == 1) *value = rintf(*value / 2) / 2;
        if (i / n == 2) *value = 1.5f;
        if (i / n == 3 && i % 3 == 0) *value = -1e9f;
    }
    return x;
}

static std::vector<int32_t> some_targets(int64_t m, int64_t n) {
    std::vector<int32_t> targets((size_t)m);
    for (int64_t i = 0; i < m; i++) targets[(size_t)i] = (int32_t)((i * 7919 + n - 1) % n);
    return targets;
}

// Losses have the CPU's bits as far as log and exp of f64 have them, which are the host's in the emulator: there
// nothing below is allowed to differ.
static double units(double x) { return simt::LIBRARY_UNITS * 0x1p-52 * fabs(x); }

template <typename T> static bool near(T a, T b, double allowed) {
    return memcmp(&a, &b, sizeof a) == 0 || (simt::LIBRARY_UNITS > 0 && fabs((double)a - (double)b) <= allowed);
}

// A log-sum-exp of x [n] is maximum + log(sum) with 1 <= sum <= n: a unit of the log, and the rounding of the addition
// of at most that.
static double lse_error(const float *x, int64_t n) {
    double top = (double)x[0], of_sum = log((double)n);
    for (int64_t i = 1; i < n; i++) top = fmax(top, (double)x[i]);
    return units(2 * of_sum) + units(fabs(top) + of_sum);
}

// Probabilities p differ by p times the error of log-sum-exp and of exp; the target's gradient has 1 - p, which may be
// as small, so that is absolute. Then a last bit of f32 may be rounded otherwise.
static void same_gradient(const Floats &value, const Floats &expected, const Floats &logits, int64_t n, double scale,
                          const std::string &what) {
    for (size_t i = 0; i < value.size(); i++) {
        double of_p = lse_error(&logits[i / (size_t)n * (size_t)n], n) + units(2);
        double of_bit = 0x1p-23 * fabs((double)expected[i]), allowed = scale > 0 ? scale * of_p + of_bit : 0;
        ck_assert_msg(near(value[i], expected[i], allowed), "%s[%zu]: %.9g instead of %.9g", what.c_str(), i,
                      (double)value[i], (double)expected[i]);
    }
}

// _i: without and with a gradient, and with one through a cap
START_TEST(cross_entropy_has_the_bits_of_the_cpu) {
    int64_t m = LOGITS[_i / 3][0], n = LOGITS[_i / 3][1];
    float   cap = _i % 3 == 2 ? 14 : 0;
    double  scale = _i % 3 == 0 ? 0 : 0.25;
    rig_open();
    Floats               logits = some_logits(m, n, 20), gradient = logits;
    std::vector<int32_t> targets = some_targets(m, n);
    std::vector<double>  nll((size_t)m);
    cpu->cross_entropy(cpu, gradient.data(), targets.data(), m, n, cap, scale, nll.data());
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float>   d_logits("logits", logits);
        simt::Buffer<int32_t> d_targets("targets", targets);
        simt::Buffer<double>  d_nll("nll", nll.size());
        kvq_test_ok(
            kvq_cuda_cross_entropy(d_logits.data(), d_targets.data(), m, n, cap, scale, d_nll.data(), NULL, NULL),
            NULL);
        expect_clean();
        same_gradient(d_logits.values(), gradient, logits, n, scale, named("gradient", m, n));
        std::vector<double> out = d_nll.values();
        for (size_t i = 0; i < nll.size(); i++) {
            double allowed = lse_error(&logits[i * (size_t)n], n) + units(nll[i]);
            ck_assert_msg(near(out[i], nll[i], allowed), "nll[%zu]: %.17g instead of %.17g", i, out[i], nll[i]);
        }
    }
    rig_close();
}
END_TEST

static double largest_difference(const float *a, const float *b, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)a[i] - (double)b[i]));
    return largest;
}

// Of logits a, b [n]. KL is a sum of p (log p - log q), where |log p - log q| <= D = 2 max |a - b|, and the sum of its
// magnitudes is at most KL + 2: the logs move by the errors of both log-sum-exps, p by that of the first, relatively;
// then each term and the n / 8 additions of a lane may round otherwise.
static void same_score(const kvq_position_score &value, const kvq_position_score &expected, const float *a,
                       const float *b, int64_t n, const std::string &what) {
    double of_a = lse_error(a, n), of_b = lse_error(b, n);
    double of_kl = (of_a + of_b) * (2 + 2 * largest_difference(a, b, n)) + units((double)n / 8 + 4) * (expected.kl + 2);
    ck_assert_msg(near(value.nll_a, expected.nll_a, of_a + units(expected.nll_a)) &&
                      near(value.nll_b, expected.nll_b, of_b + units(expected.nll_b)) &&
                      near(value.kl, expected.kl, of_kl) &&
                      near(value.confidence_a, expected.confidence_a, of_a + units(2)),
                  "%s: nll %.17g %.17g, kl %.17g, confidence %.17g instead of %.17g %.17g, %.17g, %.17g", what.c_str(),
                  value.nll_a, value.nll_b, value.kl, value.confidence_a, expected.nll_a, expected.nll_b, expected.kl,
                  expected.confidence_a);
    ck_assert_msg(value.top_a == expected.top_a && value.top_b == expected.top_b &&
                      value.top5_common == expected.top5_common,
                  "%s: top %d %d, common %d instead of %d %d, %d", what.c_str(), value.top_a, value.top_b,
                  value.top5_common, expected.top_a, expected.top_b, expected.top5_common);
}

// The second model is close to the first, so that some of its five are the same.
START_TEST(comparisons_have_the_bits_of_the_cpu) {
    int64_t m = LOGITS[_i][0], n = LOGITS[_i][1];
    rig_open();
    Floats a = some_logits(m, n, 21), noise = rig_randoms(a.size(), 22, 2), b = a;
    for (size_t i = 0; i < b.size(); i++) b[i] += (int64_t)i / n % 2 == 1 ? rintf(noise[i]) / 2 : noise[i];
    std::vector<int32_t>            targets = some_targets(m, n);
    std::vector<kvq_position_score> expected((size_t)m), same((size_t)m);
    cpu->compare(cpu, a.data(), b.data(), targets.data(), m, n, expected.data());
    cpu->compare(cpu, a.data(), a.data(), targets.data(), m, n, same.data());
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float>              d_a("a", a), d_b("b", b);
        simt::Buffer<int32_t>            d_targets("targets", targets);
        simt::Buffer<kvq_position_score> d_out("scores", expected.size()), d_same("scores of equals", same.size());
        kvq_test_ok(kvq_cuda_compare(d_a.data(), d_b.data(), d_targets.data(), m, n, d_out.data(), NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_compare(d_a.data(), d_a.data(), d_targets.data(), m, n, d_same.data(), NULL, NULL), NULL);
        expect_clean();
        std::vector<kvq_position_score> out = d_out.values(), out_same = d_same.values();
        for (size_t i = 0; i < expected.size(); i++) {
            const float *row_a = &a[i * (size_t)n], *row_b = &b[i * (size_t)n];
            same_score(out[i], expected[i], row_a, row_b, n, named("scores", m, n));
            same_score(out_same[i], same[i], row_a, row_a, n, named("scores of equals", m, n));
        }
    }
    rig_close();
}
END_TEST

// Ties at the border of the five, among lanes, warps and within a thread: the lower id is in. Of b the ids below 300
// are the first five in their order, so the score counts those of a's that are below.
START_TEST(ties_go_to_lower_ids_across_threads) {
    enum { N = 1500 };
    const int places[][7] = {{299, 298, 297, 296, 0, 1, 1499},
                             {700, 31, 32, 287, 543, 288, 799},
                             {40, 296, 552, 808, 1064, 1320, 1499},
                             {5, 4, 3, 2, 1, 0, 6}};
    rig_open();
    for (int c = 0; c < 4; c++) {
        Floats a(N, -1.0f), b(N, -2.0f);
        for (int j = 0; j < 7; j++) a[(size_t)places[c][j]] = 3.0f;
        for (int j = 0; j < 7; j++) b[(size_t)places[c][j]] = (float)places[c][j];
        int32_t            target = places[c][3];
        kvq_position_score expected;
        cpu->compare(cpu, a.data(), b.data(), &target, 1, N, &expected);
        begin((uint64_t)c);
        simt::Buffer<float>              d_a("a", a), d_b("b", b);
        simt::Buffer<int32_t>            d_target("target", std::vector<int32_t>(1, target));
        simt::Buffer<kvq_position_score> d_out("score", 1);
        kvq_test_ok(kvq_cuda_compare(d_a.data(), d_b.data(), d_target.data(), 1, N, d_out.data(), NULL, NULL), NULL);
        expect_clean();
        same_score(d_out.values()[0], expected, a.data(), b.data(), N, "ties");
    }
    rig_close();
}
END_TEST

// Numbers about the borders of the tokens: there another order of the sum would choose another token.
START_TEST(the_same_tokens_are_drawn) {
    int64_t m = LOGITS[_i][0], n = LOGITS[_i][1];
    rig_open();
    Floats               logits = some_logits(m, n, 23);
    std::vector<double>  u((size_t)m);
    std::vector<int32_t> expected((size_t)m);
    for (int round = 0; round < 4; round++) {
        for (int64_t i = 0; i < m; i++) {
            const float *x = &logits[(size_t)(i * n)];
            double       top = (double)x[0], total = 0, sum = 0;
            for (int64_t j = 1; j < n; j++) top = fmax(top, (double)x[j]);
            for (int64_t j = 0; j < n; j++) total += exp((double)x[j] - top);
            for (int64_t j = 0; j < (i * 31 + n * 2 / 3) % n; j++) sum += exp((double)x[j] - top);
            double border = sum / total + (round - 1) * 0x1p-53;
            u[(size_t)i] = round == 3 ? 1 - 0x1p-53 : fmin(fmax(border, 0), 1 - 0x1p-53);
        }
        cpu->sample(cpu, logits.data(), u.data(), m, n, expected.data());
        begin((uint64_t)round);
        simt::Buffer<float>   d_logits("logits", logits);
        simt::Buffer<double>  d_u("u", u);
        simt::Buffer<int32_t> d_ids("ids", expected.size());
        kvq_test_ok(kvq_cuda_sample(d_logits.data(), d_u.data(), m, n, d_ids.data(), NULL, NULL), NULL);
        expect_clean();
        std::vector<int32_t> ids = d_ids.values();
        for (size_t i = 0; i < expected.size(); i++) ck_assert_int_eq(ids[i], expected[i]);
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- linear layers

// m, n_out, n_in about tiles of 64, parts of 32 and slices of 128.
static const int64_t PRODUCTS[][3] = {{1, 1, 1},     {3, 7, 33},    {64, 64, 32},  {65, 63, 31},
                                      {5, 130, 129}, {70, 65, 128}, {2, 300, 257}, {130, 3, 64}};
enum { N_PRODUCTS = sizeof PRODUCTS / sizeof *PRODUCTS };
static const double EPS = 0x1p-24;

// A sum of n products in f32 differs from the exact one by at most n EPS sum |a b|, whatever its order (Higham,
// Accuracy and Stability, section 3.1); so from the CPU's by at most twice that.
static void close_to(const Floats &value, const Floats &of_cpu, const std::vector<double> &exact,
                     const std::vector<double> &magnitude, double n, const char *what) {
    for (size_t i = 0; i < value.size(); i++) {
        double allowed = n * EPS * magnitude[i];
        ck_assert_msg(fabs((double)value[i] - exact[i]) <= allowed &&
                          fabs((double)value[i] - (double)of_cpu[i]) <= 2 * allowed,
                      "%s[%zu]: %.9g instead of %.9g (CPU %.9g), tolerance %.3g", what, i, (double)value[i], exact[i],
                      (double)of_cpu[i], allowed);
    }
}

// _i: with and without a bias
START_TEST(linear_equals_the_product) {
    size_t m = (size_t)PRODUCTS[_i / 2][0], n = (size_t)PRODUCTS[_i / 2][1], k = (size_t)PRODUCTS[_i / 2][2];
    rig_open();
    Floats x = rig_randoms(m * k, 40, 1), w = rig_randoms(n * k, 41, 1), bias = rig_randoms(n, 42, 1), of_cpu(m * n),
           first;
    std::vector<double> exact(m * n), magnitude(m * n);
    cpu->linear(cpu, x.data(), w.data(), _i % 2 == 0 ? bias.data() : NULL, of_cpu.data(), (int64_t)m, (int64_t)n,
                (int64_t)k);
    for (size_t at = 0; at < m * n; at++) {
        exact[at] = _i % 2 == 0 ? (double)bias[at % n] : 0;
        magnitude[at] = fabs(exact[at]);
        for (size_t c = 0; c < k; c++) {
            double term = (double)x[at / n * k + c] * (double)w[at % n * k + c];
            exact[at] += term, magnitude[at] += fabs(term);
        }
    }
    for (uint64_t seed = 0; seed < 2; seed++) {
        begin(seed);
        simt::Buffer<float> d_x("x", x), d_w("w", w), d_bias("bias", bias), d_y("y", m * n);
        kvq_test_ok(kvq_cuda_linear_plain(d_x.data(), d_w.data(), _i % 2 == 0 ? d_bias.data() : NULL, d_y.data(),
                                          (int64_t)m, (int64_t)n, (int64_t)k, NULL, NULL),
                    NULL);
        expect_clean();
        close_to(d_y.values(), of_cpu, exact, magnitude, (double)k + 1, "y");
        if (seed > 0) rig_same_bits(d_y.values(), first, "y in another order of threads");
        first = d_y.values();
    }
    rig_close();
}
END_TEST

// _i: overwriting and adding to what is there
START_TEST(linear_backward_equals_the_product) {
    size_t m = (size_t)PRODUCTS[_i / 2][0], n = (size_t)PRODUCTS[_i / 2][1], k = (size_t)PRODUCTS[_i / 2][2];
    bool   adds = _i % 2 == 1;
    rig_open();
    Floats dy = rig_randoms(m * n, 43, 1), w = rig_randoms(n * k, 44, 1), dx = rig_randoms(m * k, 45, 1), of_cpu = dx,
           first;
    std::vector<double> exact(m * k), magnitude(m * k);
    cpu->linear_backward(cpu, dy.data(), w.data(), of_cpu.data(), (int64_t)m, (int64_t)n, (int64_t)k, adds);
    for (size_t at = 0; at < m * k; at++) {
        exact[at] = adds ? (double)dx[at] : 0;
        magnitude[at] = fabs(exact[at]);
        for (size_t j = 0; j < n; j++) {
            double term = (double)dy[at / k * n + j] * (double)w[j * k + at % k];
            exact[at] += term, magnitude[at] += fabs(term);
        }
    }
    for (uint64_t seed = 0; seed < 2; seed++) {
        begin(seed);
        simt::Buffer<float>  d_dy("dy", dy), d_w("w", w), d_new("dx", m * k), d_old("dx", dx);
        simt::Buffer<float> &d_dx = adds ? d_old : d_new;
        kvq_test_ok(kvq_cuda_linear_backward_plain(d_dy.data(), d_w.data(), d_dx.data(), (int64_t)m, (int64_t)n,
                                                   (int64_t)k, adds, NULL, NULL),
                    NULL);
        expect_clean();
        close_to(d_dx.values(), of_cpu, exact, magnitude, (double)n + 1, "dx");
        if (seed > 0) rig_same_bits(d_dx.values(), first, "dx in another order of threads");
        first = d_dx.values();
    }
    rig_close();
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(rmsnorm_has_the_bits_of_the_cpu, N_SIZES),
    KVQ_LOOP(rmsnorm_backward_has_the_bits_of_the_cpu, N_SIZES),
    KVQ_LOOP(rope_has_the_bits_of_the_cpu, N_ROPES),
    KVQ_LOOP(sums_and_caps_have_the_bits_of_the_cpu, N_LENGTHS),
    KVQ_LOOP(gates_have_the_bits_of_the_cpu, 2 * N_LENGTHS),
    KVQ_CASE(bf16_is_rounded_as_on_the_host),
    KVQ_LOOP(halves_are_rounded_as_on_the_cpu, N_LENGTHS),
    KVQ_CASE(every_half_is_loaded_as_on_the_cpu),
    KVQ_CASE(the_first_number_beyond_f16_is_found),
    KVQ_LOOP(a_bias_is_added_to_every_row, N_SIZES),
    KVQ_LOOP(rows_are_gathered_and_scattered_as_on_the_cpu, N_SIZES),
    KVQ_CASE(the_first_nonfinite_value_is_found),
    KVQ_LOOP(cross_entropy_has_the_bits_of_the_cpu, 3 * N_LOGITS),
    KVQ_LOOP(comparisons_have_the_bits_of_the_cpu, N_LOGITS),
    KVQ_CASE(ties_go_to_lower_ids_across_threads),
    KVQ_LOOP(the_same_tokens_are_drawn, N_LOGITS),
    KVQ_LOOP(linear_equals_the_product, 2 * N_PRODUCTS),
    KVQ_LOOP(linear_backward_equals_the_product, 2 * N_PRODUCTS),
};
KVQ_TEST_MAIN("test_cuda_ops", cases)
