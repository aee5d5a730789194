// SPDX-License-Identifier: Apache-2.0
//
// The router of a mixture of experts, its gradient and dot products of rows, under the emulator, against the CPU
// backend: bit for bit, with several orders of threads and blocks. Sums in f64 that are rounded to f32 seldom show in
// which order they were added, so some rows consist of large numbers that cancel: what is left of them is rounding.
#include <math.h>

#include "cuda_ops_rig.h"

static_assert(KVQ_CUDA_MAX_BLOCKS < 4, "the sizes must exceed a grid");

typedef std::vector<int32_t> Ids;

typedef struct route_case {
    int64_t m, n; // tokens, channels
    int     n_experts, k;
} route_case;

// About the 8 lanes of a dot product, the 32 that a block has at a time, a warp and a block; and the largest router.
static const route_case ROUTES[] = {
    {0, 5, 4, 2},    {1, 1, 1, 1},    {3, 0, 4, 2},     {4, 7, 3, 2},    {5, 8, 3, 3},    {257, 9, 3, 1},
    {257, 31, 8, 2}, {31, 33, 8, 8},  {1, 257, 65, 6},  {9, 64, 65, 1},  {4, 65, 65, 64}, {8, 257, 65, 65},
    {4, 2049, 8, 4}, {31, 16, 31, 5}, {12, 40, 128, 8}, {5, 16, 257, 3}, {4, 9, 1024, 7}, {1, 8, 1024, 1024},
};
enum { N_ROUTES = sizeof ROUTES / sizeof *ROUTES };

static std::string named(const route_case &c, const char *what) {
    return std::string(what) + " of " + std::to_string(c.m) + " x " + std::to_string(c.n) + ", " + std::to_string(c.k) +
           " of " + std::to_string(c.n_experts) + " experts";
}

// ---------------------------------------------------------------- numbers

// Weights of a router: both halves of a row are the same, and its first channel is a multiple of a half, so that x can
// be made to cancel and to tie.
static Floats router_weights(const route_case &c, uint32_t stream) {
    Floats w = rig_randoms((size_t)c.n_experts * (size_t)c.n, stream, 1);
    for (size_t i = 0, n = (size_t)c.n; i < w.size(); i++) {
        size_t channel = i % n, half = n / 2;
        if (channel >= half && channel < 2 * half) w[i] = w[i - half];
        if (channel == 0 || channel == half) w[i] = rintf(w[i - channel] * 2) / 2;
    }
    return w;
}

// Rows in turn: of all magnitudes; ties; ordinary ones; and such as cancel, of which some units are left.
static Floats router_inputs(int64_t m, int64_t n, uint32_t stream) {
    Floats x = rig_wide_randoms((size_t)(m * n), stream);
    for (int64_t i = 0; i < m * n; i++) {
        int64_t kind = i / n % 4, channel = i % n, half = n / 2;
        float  *value = &x[(size_t)i];
        if (kind == 0) *value *= 0x1p-8f;
        if (kind == 1) *value = channel == 0 ? 1.0f : 0;
        if (kind == 2) *value = (float)(2 * rig_uniform(stream + 1, (size_t)i) - 1);
        if (kind != 3) continue;
        *value *= 0x1p40f;
        if (channel >= half) *value = channel < 2 * half ? -value[-half] : 1;
    }
    return x;
}

// What a router gives, on the host.
typedef struct routed {
    Floats probability, weight;
    Ids    expert;
} routed;

static routed room_for(const route_case &c) {
    size_t chosen = (size_t)c.m * (size_t)c.k;
    return {Floats((size_t)c.m * (size_t)c.n_experts), Floats(chosen), Ids(chosen)};
}

static kvq_route route_to(const route_case &c, bool normalize, routed *r) {
    return {c.n_experts, c.k, normalize, r->probability.data(), r->expert.data(), r->weight.data()};
}

static routed routed_by_cpu(const route_case &c, bool normalize, const Floats &x, const Floats &w) {
    routed    r = room_for(c);
    kvq_route to = route_to(c, normalize, &r);
    cpu->route(cpu, &to, x.data(), w.data(), c.m, c.n);
    return r;
}

static routed routed_by_device(const route_case &c, bool normalize, const Floats &x, const Floats &w, uint64_t seed) {
    begin(seed);
    routed              room = room_for(c);
    simt::Buffer<float> d_x("x", x), d_w("w", w), d_p("probability", room.probability.size()),
        d_weight("weight", room.weight.size());
    simt::Buffer<int32_t> d_expert("expert", room.expert.size());
    kvq_route             to = {c.n_experts, c.k, normalize, d_p.data(), d_expert.data(), d_weight.data()};
    kvq_test_ok(kvq_cuda_route(&to, d_x.data(), d_w.data(), c.m, c.n, NULL, NULL), NULL);
    expect_clean();
    return {d_p.values(), d_weight.values(), d_expert.values()};
}

static void same_route(const routed &value, const routed &expected, const route_case &c) {
    for (size_t i = 0; i < expected.expert.size(); i++)
        ck_assert_msg(value.expert[i] == expected.expert[i], "%s[%zu]: %d instead of %d", named(c, "expert").c_str(), i,
                      value.expert[i], expected.expert[i]);
    rig_same_bits(value.probability, expected.probability, named(c, "probability"));
    rig_same_bits(value.weight, expected.weight, named(c, "weight"));
}

// ---------------------------------------------------------------- router

static void same_in_every_order(const route_case &c, bool normalize, const Floats &x, const Floats &w) {
    routed expected = routed_by_cpu(c, normalize, x, w);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++)
        same_route(routed_by_device(c, normalize, x, w, seed), expected, c);
}

// _i: without and with normalisation
START_TEST(routes_have_the_bits_of_the_cpu) {
    route_case c = ROUTES[_i / 2];
    bool       normalize = _i % 2 == 1;
    rig_open();
    Floats x = router_inputs(c.m, c.n, 60), w = router_weights(c, 62);
    same_in_every_order(c, normalize, x, w);
    rig_close();
}
END_TEST

// One channel of 1, so that weights are the logits: few different ones in many places, all the same, zeros of both
// signs (which are equal), ascending and descending.
START_TEST(ties_go_to_the_lower_index) {
    const int experts[] = {1, 3, 8, 65};
    int       E = experts[_i];
    rig_open();
    for (int kind = 0; kind < 5; kind++) {
        Floats w((size_t)E), x(1, 1.0f);
        for (int e = 0; e < E; e++) {
            const float logits[] = {(float)(e * 7 % 3), -2.5f, e % 3 == 0 ? 0.0f : -0.0f, (float)(e / 2),
                                    -(float)(e / 2)};
            w[(size_t)e] = logits[kind];
        }
        for (int k = 1; k <= E; k++) {
            route_case c = {1, 1, E, k};
            same_route(routed_by_device(c, k % 2 == 0, x, w, (uint64_t)k), routed_by_cpu(c, k % 2 == 0, x, w), c);
        }
    }
    rig_close();
}
END_TEST

// _i: E
START_TEST(any_number_of_experts_is_chosen) {
    const int experts[] = {1, 3, 8, 65};
    for (int k = 1; k <= experts[_i]; k++) {
        route_case c = {5, 31, experts[_i], k};
        bool       normalize = k % 2 == 0;
        rig_open();
        Floats x = router_inputs(c.m, c.n, 63), w = router_weights(c, 65);
        same_route(routed_by_device(c, normalize, x, w, (uint64_t)k), routed_by_cpu(c, normalize, x, w), c);
        rig_close();
    }
}
END_TEST

// Logits whose exponentials f64 has only relative to the largest, subnormal inputs, and a number that is none: its
// token has no probabilities, but chosen experts all the same, and others do not see it.
START_TEST(extreme_tokens_are_routed_as_on_the_cpu) {
    route_case c = {8, 16, 8, 3};
    rig_open();
    Floats x = router_inputs(c.m, c.n, 66), w = router_weights(c, 68);
    for (size_t i = 0; i < 16; i++) {
        x[i] *= 1e30f;
        x[16 + i] = 1e-42f * (float)i;
        x[48 + i] *= 1e-38f;
    }
    x[5 * 16 + 3] = NAN, x[6 * 16 + 7] = INFINITY;
    for (int normalize = 0; normalize < 2; normalize++) same_in_every_order(c, normalize, x, w);
    rig_close();
}
END_TEST

START_TEST(too_many_experts_are_refused) {
    rig_open();
    kvq_error error = {};
    kvq_route to = {KVQ_CUDA_MAX_EXPERTS + 1, 1, false, NULL, NULL, NULL};
    begin(1);
    ck_assert_int_eq(kvq_cuda_route(&to, NULL, NULL, 1, 1, NULL, &error), KVQ_ERR_UNSUPPORTED);
    ck_assert(strstr(error.message, "1025 experts") != NULL);
    ck_assert_int_eq(kvq_cuda_route_backward(&to, NULL, NULL, NULL, 1, 1, NULL, NULL), KVQ_ERR_UNSUPPORTED);
    expect_clean();
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- gradient of the router

static Floats gradient_of_device(const route_case &c, bool normalize, const routed &r, const Floats &dweight,
                                 const Floats &w, const Floats &dx, uint64_t seed) {
    begin(seed);
    simt::Buffer<float> d_p("probability", r.probability), d_weight("weight", r.weight), d_dweight("dweight", dweight),
        d_w("w", w), d_dx("dx", dx);
    simt::Buffer<int32_t> d_expert("expert", r.expert);
    kvq_route             from = {c.n_experts, c.k, normalize, d_p.data(), d_expert.data(), d_weight.data()};
    kvq_test_ok(kvq_cuda_route_backward(&from, d_dweight.data(), d_w.data(), d_dx.data(), c.m, c.n, NULL, NULL), NULL);
    expect_clean();
    return d_dx.values();
}

static void gradient_is_that_of_the_cpu(const route_case &c, bool normalize, uint64_t n_seeds) {
    Floats    x = router_inputs(c.m, c.n, 70), w = router_weights(c, 72);
    routed    r = routed_by_cpu(c, normalize, x, w);
    Floats    dweight = rig_wide_randoms(r.weight.size(), 73), dx = rig_randoms(x.size(), 74, 1), expected = dx;
    kvq_route from = route_to(c, normalize, &r);
    for (size_t i = 0; i < dx.size(); i += 5) expected[i] = dx[i] = -0.0f;
    cpu->route_backward(cpu, &from, dweight.data(), w.data(), expected.data(), c.m, c.n);
    for (uint64_t seed = 0; seed < n_seeds; seed++)
        rig_same_bits(gradient_of_device(c, normalize, r, dweight, w, dx, seed), expected, named(c, "dx"));
}

// _i: without and with normalisation
START_TEST(router_gradients_have_the_bits_of_the_cpu) {
    rig_open();
    gradient_is_that_of_the_cpu(ROUTES[_i / 2], _i % 2 == 1, RIG_SEEDS);
    rig_close();
}
END_TEST

START_TEST(gradients_of_any_number_of_chosen) {
    const int experts[] = {1, 3, 8, 65};
    rig_open();
    for (int k = 1; k <= experts[_i]; k++) {
        route_case c = {4, 31, experts[_i], k};
        gradient_is_that_of_the_cpu(c, k % 2 == 1, 1);
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- dot products of rows

static const int64_t ROWS[][2] = {{0, 3},   {3, 0},   {1, 1},    {2, 7},   {3, 8},    {5, 9},    {31, 15},
                                  {32, 16}, {33, 31}, {257, 33}, {95, 64}, {97, 257}, {4, 2049}, {129, 20}};
enum { N_ROWS = sizeof ROWS / sizeof *ROWS };

// b's halves are the same, and a's rows those of a router's inputs.
START_TEST(row_dots_have_the_bits_of_the_cpu) {
    int64_t m = ROWS[_i][0], n = ROWS[_i][1], half = n / 2;
    rig_open();
    Floats a = router_inputs(m, n, 80), b = rig_wide_randoms(a.size(), 82), expected((size_t)m);
    for (int64_t i = 0; i < m * n; i++) {
        if (i % n >= half && i % n < 2 * half) b[(size_t)i] = b[(size_t)(i - half)];
    }
    cpu->row_dots(cpu, a.data(), b.data(), expected.data(), m, n);
    for (uint64_t seed = 0; seed < RIG_SEEDS; seed++) {
        begin(seed);
        simt::Buffer<float> d_a("a", a), d_b("b", b), d_out("out", (size_t)m);
        kvq_test_ok(kvq_cuda_row_dots(d_a.data(), d_b.data(), d_out.data(), m, n, NULL, NULL), NULL);
        expect_clean();
        rig_same_bits(d_out.values(), expected, "dot");
    }
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- grids

// One token, or row, at a time is a grid of one block; all of them are more than a grid holds.
START_TEST(any_grid_gives_the_same_bits) {
    route_case all = {38, 21, 8, 3}, one = {1, 21, 8, 3};
    rig_open();
    Floats x = router_inputs(all.m, all.n, 90), w = router_weights(all, 92), dx = rig_randoms(x.size(), 93, 1);
    routed r = routed_by_device(all, true, x, w, 1);
    Floats dweight = rig_randoms(r.weight.size(), 94, 1),
           gradient = gradient_of_device(all, true, r, dweight, w, dx, 1);
    for (int64_t t = 0; t < all.m; t++) {
        auto part = [t](const auto &whole, int64_t width) {
            return std::decay_t<decltype(whole)>(whole.begin() + t * width, whole.begin() + (t + 1) * width);
        };
        routed row = {part(r.probability, 8), part(r.weight, 3), part(r.expert, 3)};
        same_route(routed_by_device(one, true, part(x, 21), w, 2), row, one);
        rig_same_bits(gradient_of_device(one, true, row, part(dweight, 3), w, part(dx, 21), 2), part(gradient, 21),
                      "dx of one token");
    }
    rig_close();
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(routes_have_the_bits_of_the_cpu, 2 * N_ROUTES),
    KVQ_LOOP(ties_go_to_the_lower_index, 4),
    KVQ_LOOP(any_number_of_experts_is_chosen, 4),
    KVQ_CASE(extreme_tokens_are_routed_as_on_the_cpu),
    KVQ_CASE(too_many_experts_are_refused),
    KVQ_LOOP(router_gradients_have_the_bits_of_the_cpu, 2 * N_ROUTES),
    KVQ_LOOP(gradients_of_any_number_of_chosen, 4),
    KVQ_LOOP(row_dots_have_the_bits_of_the_cpu, N_ROWS),
    KVQ_CASE(any_grid_gives_the_same_bits),
};
KVQ_TEST_MAIN("test_cuda_experts", cases)
