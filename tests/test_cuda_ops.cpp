// SPDX-License-Identifier: Apache-2.0
//
// CUDA operations on rows and elements, under the emulator, against the CPU backend over awkward sizes. All of them
// claim the CPU's bits, those with sums as well (they add in f64 in its order), so nothing here has a tolerance. Each
// case runs with several orders of threads and blocks: that they all give the CPU's bits shows that no order matters.
#include <math.h>

#include "cuda_rig.h"

// About the 8 lanes of a sum, a warp, a block, and the tile of 2048; rows beyond the 1024 blocks of a grid.
static const int64_t SIZES[][2] = {{1, 1},   {3, 7},    {2, 8},    {5, 9},    {1, 31},   {2, 33},   {2, 255}, {2, 256},
                                   {2, 257}, {2, 2047}, {2, 2048}, {2, 2049}, {2, 4103}, {1030, 3}, {2051, 2}};
enum { N_SIZES = sizeof SIZES / sizeof *SIZES };

// Elements beyond the 1024 * 256 of a grid.
static const int64_t LENGTHS[] = {0, 1, 255, 256, 257, 1000, 262144 + 300};
enum { N_LENGTHS = sizeof LENGTHS / sizeof *LENGTHS };

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
        rig_begin(seed);
        simt::Buffer<float> d_x("x", x), d_w("w", w), d_y("y", x.size());
        kvq_test_ok(kvq_cuda_rmsnorm(d_x.data(), d_w.data(), 1e-5f, d_y.data(), m, n, NULL, NULL), NULL);
        rig_same_bits(d_y.values(), expected, named("y", m, n));
        kvq_test_ok(kvq_cuda_rmsnorm(d_x.data(), d_w.data(), 1e-5f, d_x.data(), m, n, NULL, NULL), NULL);
        rig_expect_clean();
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
        rig_begin(seed);
        simt::Buffer<float> d_x("x", x), d_w("w", w), d_dy("dy", dy), d_dx("dx", dx);
        kvq_test_ok(
            kvq_cuda_rmsnorm_backward(d_x.data(), d_w.data(), 1e-5f, d_dy.data(), d_dx.data(), m, n, NULL, NULL), NULL);
        rig_expect_clean();
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
                                  {2, 9, 64, 64, 1, 1}, {4, 2, 16, 16, -1, 1.3f}, {1027, 1, 4, 2, 1, 1},
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
        rig_begin(seed);
        simt::Buffer<float> d_x("x", x), d_c("cos", c), d_s("sin", s);
        kvq_test_ok(kvq_cuda_rope(d_x.data(), d_c.data(), d_s.data(), r.direction, r.scale, r.m, r.n_heads, r.head_dim,
                                  r.rot, NULL, NULL),
                    NULL);
        rig_expect_clean();
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
    for (uint64_t seed = 0; seed < (n > 10000 ? 1 : RIG_SEEDS); seed++) {
        rig_begin(seed);
        simt::Buffer<float> d_x("x", x), d_y("y", y), d_z("z", y);
        kvq_test_ok(kvq_cuda_add(d_y.data(), d_x.data(), (int64_t)n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_softcap(30, d_z.data(), (int64_t)n, NULL, NULL), NULL);
        rig_expect_clean();
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
    for (uint64_t seed = 0; seed < (n > 10000 ? 1 : RIG_SEEDS); seed++) {
        rig_begin(seed);
        simt::Buffer<float> d_gate("gate", gate), d_up("up", up), d_dy("dy", dy), d_y("y", n), d_over("over", gate);
        kvq_test_ok(kvq_cuda_gated_mul(kind, d_gate.data(), d_up.data(), d_y.data(), (int64_t)n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_gated_mul(kind, d_over.data(), d_up.data(), d_over.data(), (int64_t)n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_gated_mul_backward(kind, d_gate.data(), d_up.data(), d_dy.data(), (int64_t)n, NULL, NULL),
                    NULL);
        rig_expect_clean();
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
    rig_begin(1);
    kvq_test_ok(kvq_cuda_bf16_of_float(d_x.data(), d_y.data(), 1000, NULL, NULL), NULL);
    kvq_test_ok(kvq_cuda_float_of_bf16(d_y.data(), d_z.data(), 1000, NULL, NULL), NULL);
    rig_expect_clean();
    for (size_t i = 0; i < x.size(); i++) {
        ck_assert_uint_eq(d_y.values()[i], kvq_bf16_of_float(x[i]));
        ck_assert_uint_eq(kvq_bits_of_float(d_z.values()[i]), (uint32_t)kvq_bf16_of_float(x[i]) << 16);
    }
}
END_TEST

// ---------------------------------------------------------------- rows

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
        rig_begin(seed);
        simt::Buffer<float>   d_x("x", x), d_y("y", y.size()), d_sum("sum", sum), d_scales("scales", scales);
        simt::Buffer<int32_t> d_rows("rows", rows);
        kvq_test_ok(kvq_cuda_gather_rows(d_x.data(), d_rows.data(), d_y.data(), m, n, NULL, NULL), NULL);
        kvq_test_ok(kvq_cuda_scatter_rows(d_y.data(), d_rows.data(), d_scales.data(), d_sum.data(), m, n, NULL, NULL),
                    NULL);
        rig_expect_clean();
        rig_same_bits(d_y.values(), y, named("gathered", m, n));
        rig_same_bits(d_sum.values(), expected, named("scattered", m, n));
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- finite numbers

START_TEST(the_first_nonfinite_value_is_found) {
    const size_t places[] = {0, 1, 255, 256, 4095, 262143, 262144, 262500};
    size_t       n = 262144 + 400;
    Floats       x = rig_randoms(n, 17, 1e30);
    rig_begin(1);
    simt::Buffer<unsigned long long> d_first("first", 1);
    simt::Buffer<float>              d_x("x", x);
    for (size_t i = 8; i-- > 0;) {
        x[places[i]] = i % 2 == 0 ? NAN : -INFINITY;
        d_x.set(x);
        kvq_test_ok(kvq_cuda_find_nonfinite(d_x.data(), (int64_t)n, d_first.data(), NULL, NULL), NULL);
        ck_assert_uint_eq(d_first.values()[0], places[i]);
        kvq_test_ok(kvq_cuda_find_nonfinite(d_x.data(), (int64_t)places[i], d_first.data(), NULL, NULL), NULL);
        ck_assert(d_first.values()[0] == KVQ_CUDA_ALL_FINITE);
        rig_expect_clean();
    }
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(rmsnorm_has_the_bits_of_the_cpu, N_SIZES),
    KVQ_LOOP(rmsnorm_backward_has_the_bits_of_the_cpu, N_SIZES),
    KVQ_LOOP(rope_has_the_bits_of_the_cpu, N_ROPES),
    KVQ_LOOP(sums_and_caps_have_the_bits_of_the_cpu, N_LENGTHS),
    KVQ_LOOP(gates_have_the_bits_of_the_cpu, 2 * N_LENGTHS),
    KVQ_CASE(bf16_is_rounded_as_on_the_host),
    KVQ_LOOP(rows_are_gathered_and_scattered_as_on_the_cpu, N_SIZES),
    KVQ_CASE(the_first_nonfinite_value_is_found),
};
KVQ_TEST_MAIN("test_cuda_ops", cases)
