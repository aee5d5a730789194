// SPDX-License-Identifier: Apache-2.0
// The words of the device language in the emulator: bits, lanes, halves and matrices against what CUDA's manuals say,
// written down a second time; and the codec on the device against the codec.
#include <math.h>
#include <string.h>

#include "emulated_rig.h"
#include "sample_kernels.h"

enum { N_SEEDS = 20 };

static uint32_t bits_of(uint32_t stream, uint64_t index) {
    return (uint32_t)kvq_rng_below(5, KVQ_RNG_TEST, stream, index, (uint64_t)1 << 32);
}

// ---------------------------------------------------------------- bits

START_TEST(bits_by_hand) {
    ck_assert_uint_eq(__brev(0x00000001u), 0x80000000u);
    ck_assert_uint_eq(__brev(0x12345678u), 0x1e6a2c48u);
    ck_assert_int_eq(__clz(0), 32);
    ck_assert_int_eq(__clz(1), 31);
    ck_assert_int_eq(__clz(-1), 0);
    ck_assert_int_eq(__clzll(0), 64);
    ck_assert_int_eq(__clzll(1ll << 40), 23);
    ck_assert_int_eq(__ffs(0), 0);
    ck_assert_int_eq(__ffs(8), 4);
    ck_assert_int_eq(__ffsll(1ll << 40), 41);
    ck_assert_int_eq(__popc(0xf0f0u), 8);
    ck_assert_int_eq(__popcll(0xf0f0f0f0f0ull), 20);
    ck_assert_uint_eq(__byte_perm(0x33221100u, 0x77665544u, 0x3210u), 0x33221100u);
    ck_assert_uint_eq(__byte_perm(0x33221100u, 0x77665544u, 0x7044u), 0x77004444u);
    ck_assert_uint_eq(__byte_perm(0x33221100u, 0x77665544u, 0xf8a9u), 0x77002211u); // the fourth bit does not count
    ck_assert_uint_eq(__funnelshift_r(0x89abcdefu, 0x01234567u, 8), 0x6789abcdu);
    ck_assert_uint_eq(__funnelshift_l(0x89abcdefu, 0x01234567u, 8), 0x23456789u);
    ck_assert_uint_eq(__funnelshift_l(0x89abcdefu, 0x01234567u, 32), 0x01234567u);
    ck_assert_int_eq(__float2int_rn(2.5f), 2);
    ck_assert_int_eq(__float2int_rn(-3.5f), -4);
    ck_assert_int_eq(__float2int_rn(3e9f), 2147483647);
    ck_assert_int_eq(__float2int_rn(-3e9f), -2147483647 - 1);
    ck_assert_int_eq(__float2int_rn(nanf("")), 0);
    ck_assert_int_eq(min(-3, 2), -3);
    ck_assert_uint_eq(max(3u, 2u), 3u);
}
END_TEST

// ---------------------------------------------------------------- lanes

// Word i of a lane of the kernel `lanes`, from the manual's words.
static int expected_word(int i, int lane, const int *x) {
    int odd_ballot = 0, positive = 0;
    for (int k = 0; k < 32; k++) {
        if (k % 2 == 1 && k > 16) odd_ballot |= (int)(1u << k);
        if (x[k] > 0) positive |= (int)(1u << k);
    }
    switch (i) {
    case 0:
        return x[lane * 5 % 32];
    case 1:
        return x[lane / 8 * 8 + 3];
    case 2:
        return x[lane < 3 ? lane : lane - 3];
    case 3:
        return x[lane % 4 < 3 ? lane : lane - 3];
    case 4:
        return x[lane > 24 ? lane : lane + 7];
    case 5:
        return x[lane % 16 > 8 ? lane : lane + 7];
    case 6:
        return x[lane ^ 9];
    case 7:
        return x[(lane ^ 9) / 8 <= lane / 8 ? lane ^ 9 : lane]; // earlier sections may be read, later ones not
    case 8:
        return x[lane ^ 1];
    case 9:
        return positive;
    case 10:
        return 2;
    case 11:
        return lane % 2 == 1 ? (int)((unsigned)x[lane ^ 2] + (unsigned)odd_ballot) : 0;
    default:
        return lane % 2;
    }
}

START_TEST(lanes_exchange_and_vote) {
    begin((uint64_t)_i);
    std::vector<int> x(32);
    for (size_t i = 0; i < 32; i++) x[i] = (int)(i * 37 % 32) * 1000 - 9500;
    simt::Buffer<int> d_x("x", x), d_y("y", SAMPLE_LANE_WORDS * 32);
    sample_lanes(d_x.data(), d_y.data(), nullptr);
    expect_clean();
    for (int i = 0; i < SAMPLE_LANE_WORDS; i++) {
        for (int lane = 0; lane < 32; lane++)
            ck_assert_msg(d_y.values()[(size_t)(i * 32 + lane)] == expected_word(i, lane, x.data()),
                          "word %d of lane %d", i, lane);
    }
}
END_TEST

// ---------------------------------------------------------------- halves

// Halves are multiples of 2^-24, their products of 2^-48: whole numbers of 128 bits.
typedef __int128   whole;
static const whole SCALE = (whole)1 << 24;

static whole whole_of(unsigned half) { // times 2^24
    int   exponent = (int)(half >> 10 & 31u);
    whole mantissa = (whole)(half & 1023u);
    if (exponent > 0) mantissa = (mantissa + 1024) << (exponent - 1);
    return (half & 0x8000u) != 0 ? -mantissa : mantissa;
}

// The half nearest to x * 2^-48, ties to even; 0 is +0.
static unsigned nearest(whole x) {
    whole    magnitude = x < 0 ? -x : x;
    unsigned low = 0, high = 0x7c00; // 0x7c00 would be 65536
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        if (whole_of(middle) << 24 <= magnitude)
            low = middle;
        else
            high = middle;
    }
    whole down = magnitude - (whole_of(low) << 24), up = (whole_of(high) << 24) - magnitude;
    if (up < down || (up == down && low % 2 == 1)) low = high;
    return (x < 0 ? 0x8000u : 0) | low;
}

static bool is_finite(unsigned half) { return (half & 0x7c00u) != 0x7c00u; }

static void expect_half(__half found, whole exact, const char *what, const unsigned h[3]) {
    unsigned expected = nearest(exact);
    if ((found.bits & 0x7fffu) == 0 && (expected & 0x7fffu) == 0) return; // signs of zero are asked for elsewhere
    if (found.bits != expected)
        ck_abort_msg("%s of %04x %04x %04x: %04x, not %04x", what, h[0], h[1], h[2], found.bits, expected);
}

START_TEST(halves_are_rounded_once) {
    for (uint64_t i = 0; i < 300000; i++) {
        unsigned h[3];
        for (unsigned k = 0; k < 3; k++) h[k] = bits_of(k, i) & 0xffffu;
        if (i % 3 == 0) h[2] = (h[2] & 0x83ffu) | (bits_of(4, i) % 6) << 10; // far below the product: ties
        if (i % 5 == 0) h[0] &= 0xffe0u, h[1] &= 0xffe0u;
        if (!is_finite(h[0]) || !is_finite(h[1]) || !is_finite(h[2])) continue;
        __half a = __ushort_as_half((unsigned short)h[0]), b = __ushort_as_half((unsigned short)h[1]),
               c = __ushort_as_half((unsigned short)h[2]);
        whole x = whole_of(h[0]), y = whole_of(h[1]), z = whole_of(h[2]);
        expect_half(__hadd_rn(a, b), (x + y) * SCALE, "sum", h);
        expect_half(__hsub_rn(a, b), (x - y) * SCALE, "difference", h);
        expect_half(__hmul_rn(a, b), x * y, "product", h);
        expect_half(__hfma(a, b, c), x * y + z * SCALE, "fused", h);
    }
}
END_TEST

static unsigned fused(unsigned a, unsigned b, unsigned c) {
    return __hfma(__ushort_as_half((unsigned short)a), __ushort_as_half((unsigned short)b),
                  __ushort_as_half((unsigned short)c))
        .bits;
}

static unsigned greater(unsigned a, unsigned b) {
    return __hmax(__ushort_as_half((unsigned short)a), __ushort_as_half((unsigned short)b)).bits;
}

START_TEST(halves_by_hand) {
    ck_assert_uint_eq(__float2half_rn(1.0f).bits, 0x3c00);
    ck_assert_uint_eq(__float2half_rn(65520.0f).bits, 0x7c00);
    ck_assert_uint_eq(__float2half_rn(nanf("")).bits, 0x7fff);
    ck_assert_uint_eq(fused(0x3c01, 0x3c01, 0x0001), 0x3c02); // (1 + e)^2 + 2^-24: no tie, and rounds to 1 + 2 e
    ck_assert_uint_eq(fused(0x7bff, 0x4000, 0x0000), 0x7c00);
    ck_assert_uint_eq(fused(0x7c00, 0x0000, 0x3c00), 0x7fff); // infinity times 0
    ck_assert_uint_eq(fused(0x8000, 0x3c00, 0x8000), 0x8000); // -0 + -0
    ck_assert_uint_eq(fused(0x3c00, 0x3c00, 0xbc00), 0x0000); // 1 - 1
    // 1 + 2^-11 is a tie; the product's last bits decide: 1 + 2^-11 (1 + 2^-10) is above it, 1 + 2^-11 (1 - 2^-11)
    // below
    ck_assert_uint_eq(fused(0x1000, 0x3c01, 0x3c00), 0x3c01);
    ck_assert_uint_eq(fused(0x1000, 0x3bff, 0x3c00), 0x3c00);
    ck_assert_uint_eq(fused(0x1000, 0x3c00, 0x3c00), 0x3c00);
    ck_assert_uint_eq(greater(0x8000, 0x0000), 0x0000);
    ck_assert_uint_eq(greater(0x7e00, 0xc000), 0xc000);
    ck_assert_uint_eq(greater(0x7e00, 0xfe00), 0x7fff);
    ck_assert_uint_eq(greater(0xc000, 0xc400), 0xc000);
    ck_assert_uint_eq(__hmin(__float2half(2), __float2half(-3)).bits, 0xc200);
    __half2 v = __floats2half2_rn(1.5f, -2);
    ck_assert_uint_eq(kvq_uint_of_half2(v), 0xc0003e00u);
    ck_assert_uint_eq(kvq_uint_of_half2(__lowhigh2highlow(kvq_half2_of_uint(0xc0003e00u))), 0x3e00c000u);
    ck_assert_uint_eq(kvq_uint_of_half2(__hfma2(v, v, __half2half2(__float2half(1)))), 0x45004280u); // 5, 3.25
    ck_assert_uint_eq(kvq_uint_of_half2(__hmul2_rn(v, v)), 0x44004080u);                             // 4, 2.25
    ck_assert_uint_eq(kvq_uint_of_half2(__hsub2_rn(v, __hneg2(v))), 0xc4004200u);                    // -4, 3
    ck_assert_uint_eq(kvq_uint_of_half2(__hadd2_rn(v, __habs2(v))), 0x00004200u);                    // 0, 3
    ck_assert(__low2float(v) == 1.5f && __high2float(v) == -2);
}
END_TEST

// ---------------------------------------------------------------- matrices

// Small multiples of 1/4, so that sums are exact in any order.
START_TEST(mma_is_the_scalar_product) {
    begin((uint64_t)_i);
    std::vector<uint16_t> a(256), b(128);
    for (size_t i = 0; i < 256; i++) a[i] = kvq_half_of_float(0.25f * (float)((int)(bits_of(8, i) % 65) - 32));
    for (size_t i = 0; i < 128; i++) b[i] = kvq_half_of_float(0.25f * (float)((int)(bits_of(9, i) % 65) - 32));
    simt::Buffer<uint16_t> d_a("a", a), d_b("b", b), d_t("t", 64);
    simt::Buffer<float>    d_d("d", 128);
    sample_mma(d_a.data(), d_b.data(), d_d.data(), d_t.data(), nullptr);
    expect_clean();
    for (size_t i = 0; i < 16; i++) {
        for (size_t j = 0; j < 8; j++) {
            float sum = 0;
            for (size_t k = 0; k < 16; k++) sum += kvq_float_of_half(a[i * 16 + k]) * kvq_float_of_half(b[k * 8 + j]);
            ck_assert_msg(d_d.values()[i * 8 + j] == sum, "element (%zu, %zu)", i, j);
            if (i < 8) ck_assert_uint_eq(d_t.values()[j * 8 + i], a[i * 16 + j]);
        }
    }
}
END_TEST

// ---------------------------------------------------------------- the codec

static std::vector<float> numbers(uint32_t stream, size_t n, float scale) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) x[i] = scale * (float)tan(2.8 * (bits_of(stream, i) / 4294967296.0 - 0.5));
    return x;
}

static std::vector<float> even_levels(int n) {
    std::vector<float> levels((size_t)n);
    for (int i = 0; i < n; i++) levels[(size_t)i] = 2.0f * (float)i / (float)(n - 1) - 1.0f;
    return levels;
}

START_TEST(device_encodes_rows_as_the_codec_does) {
    enum { D = 100, SIDE = 3 };
    for (int bits = 2; bits <= 4; bits++) {
        for (int is_key = 0; is_key < 2; is_key++) {
            std::vector<float> levels = even_levels(1 << bits), z(D, 0.25f), r(D, 1.5f), x = numbers(20, D, 1);
            float              keys[2][SIDE + 1];
            uint16_t           channels[2][SIDE + 1];
            kvq_block_scratch  scratch = {keys[0], keys[1], channels[0], channels[1], 0, 0};
            kvq_block_spec     spec = {};
            spec.d = D, spec.bits = bits, spec.n_side = SIDE, spec.levels = levels.data();
            if (is_key) spec.z = z.data(), spec.r = r.data();
            std::vector<uint8_t> row((size_t)kvq_block_row_bytes(&spec));
            ck_assert_int_eq(kvq_block_encode(&spec, x.data(), &scratch, row.data()), 1);
            begin(3);
            simt::Buffer<float>   d_x("x", x);
            simt::Buffer<uint8_t> d_row("row", row.size());
            simt::Buffer<int>     d_status("status", 1);
            sample_encode_row(&spec, d_x.data(), &scratch, d_row.data(), d_status.data(), nullptr);
            expect_clean();
            ck_assert_int_eq(d_status.values()[0], 1);
            ck_assert(d_row.values() == row);
        }
    }
}
END_TEST

START_TEST(device_encodes_tiles_as_the_codec_does) {
    enum { D = 16, TOKENS = 100, SLOTS = 40 };
    for (int is_key = 0; is_key < 2; is_key++) {
        std::vector<uint8_t> widths = {5, 1, 0, 3, 2, 4, 1, 4, 3, 3, 3, 3, 2, 2, 2, 8};
        std::vector<int32_t> table(D, 0);
        std::vector<float>   levels = even_levels(256), z(D, 0), r(D, 2), half(D, 3), x = numbers(30, TOKENS * D, 1),
                           rotation(64, 0), floats(KVQ_TILE_TOKENS * 8), keys(SLOTS + 1);
        std::vector<uint32_t> places(SLOTS + 1);
        kvq_tile_column       columns[D];
        kvq_tile_scratch      scratch = {floats.data(), keys.data(), places.data()};
        kvq_tile_spec         spec = {};
        for (size_t i = 0; i < 8; i++) rotation[i * 8 + 7 - i] = i % 2 == 0 ? 1.0f : -1.0f;
        (void)kvq_tile_layout(widths.data(), D, 8, columns);
        spec.d = D, spec.head_dim = 8, spec.dim = 1, spec.widths = widths.data(), spec.columns = columns;
        spec.levels = levels.data(), spec.table = table.data(), spec.rotation = rotation.data();
        spec.scale_format = KVQ_SCALE_F16;
        if (is_key) {
            spec.z = spec.middle = z.data(), spec.r = r.data(), spec.half = half.data();
            spec.n_side = 1, spec.n_slots = SLOTS;
        }
        std::vector<uint8_t> tile((size_t)kvq_tile_bytes(&spec));
        ck_assert_int_eq(kvq_tile_encode(&spec, x.data(), 0, TOKENS, &scratch, tile.data()), -1);
        begin(4);
        simt::Buffer<float>   d_x("x", x);
        simt::Buffer<uint8_t> d_tile("tile", tile.size());
        simt::Buffer<int>     d_status("status", 1);
        sample_encode_tile(&spec, d_x.data(), TOKENS, &scratch, d_tile.data(), d_status.data(), nullptr);
        expect_clean();
        ck_assert_int_eq(d_status.values()[0], -1);
        ck_assert(d_tile.values() == tile);
    }
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_CASE(bits_by_hand),
    KVQ_LOOP(lanes_exchange_and_vote, N_SEEDS),
    KVQ_CASE(halves_are_rounded_once),
    KVQ_CASE(halves_by_hand),
    KVQ_LOOP(mma_is_the_scalar_product, N_SEEDS),
    KVQ_CASE(device_encodes_rows_as_the_codec_does),
    KVQ_CASE(device_encodes_tiles_as_the_codec_does),
};
KVQ_TEST_MAIN("test_simt_words", cases)
