// SPDX-License-Identifier: Apache-2.0
//
// Attention of one new token per sequence on a device, under the emulator, against the definition in f64 and the CPU
// backend. The new token is the last query of a window, so its tolerance is that of window_oracle.h; sums of the device
// are over a warp's lanes and a block's warps, in an order that is in no term of it. What no token may read, positions
// behind the new one and before its window, is NaN, which an output would show.
#include <math.h>

#include "window_oracle.h"

static_assert(KVQ_CUDA_MAX_BLOCKS < 4, "the sizes must exceed a grid");

typedef struct step_case {
    int64_t n_seqs, n_past, spare, window; // spare: positions of the cache behind the new token
    int     n_heads, n_kv_heads, head_dim;
    float   softcap;
} step_case;

// About the 8 warps and 256 threads that share keys, the 32 lanes and slices of 128 that share channels, and more heads
// than a grid has blocks; the caps are low, so that they bend all scores.
static const step_case STEPS[] = {
    {1, 0, 0, 0, 1, 1, 8, 0},    {2, 1, 3, 0, 4, 2, 8, 0},        {3, 6, 0, 0, 3, 1, 24, 0},
    {2, 7, 1, 0, 2, 2, 16, 0},   {1, 8, 9, 0, 3, 3, 31, 0},       {1, 30, 0, 0, 2, 1, 32, 0},
    {2, 31, 2, 0, 4, 4, 33, 0},  {1, 254, 5, 0, 2, 1, 16, 0},     {1, 255, 0, 0, 2, 1, 8, 0},
    {1, 256, 7, 0, 4, 1, 5, 0},  {5, 300, 1, 0, 2, 2, 1, 0},      {2, 20, 4, 1, 2, 1, 8, 0},
    {2, 40, 4, 8, 4, 2, 16, 0},  {2, 40, 0, 9, 4, 2, 16, 0},      {1, 300, 3, 257, 12, 2, 4, 0},
    {2, 15, 3, 16, 2, 1, 8, 0},  {2, 16, 3, 16, 2, 1, 8, 0},      {2, 12, 0, 1000, 2, 1, 8, 0},
    {1, 40, 0, 0, 2, 1, 127, 0}, {1, 40, 2, 0, 2, 1, 128, 0},     {2, 40, 0, 0, 2, 2, 129, 0},
    {1, 19, 1, 0, 3, 1, 300, 0}, {1, 9, 0, 0, 2, 1, 1024, 0},     {1, 0, 0, 0, 1, 1, 8, 0.7f},
    {3, 77, 4, 0, 4, 2, 16, 1},  {2, 60, 4, 33, 4, 1, 130, 0.5f}, {7, 5, 3, 4, 12, 3, 8, 0.9f},
};
enum { N_STEPS = sizeof STEPS / sizeof *STEPS };

// ---------------------------------------------------------------- rig

// A call with its caches, [n_seqs, capacity, Hkv, D].
typedef struct step_call {
    kvq_attention_shape s;
    int64_t             n_seqs, n_past, capacity;
    Floats              q, k, v;
} step_call;

static size_t cache_floats(const step_call &c) { return (size_t)(c.capacity * c.s.n_kv_heads * c.s.head_dim); }
static size_t query_floats(const step_call &c) { return (size_t)(c.s.n_heads * c.s.head_dim); }

static Floats some_cache(const step_call &c, uint32_t stream) {
    Floats  x = rig_randoms((size_t)c.n_seqs * cache_floats(c), stream, 1);
    int64_t from = c.s.window > 0 && c.n_past >= c.s.window ? c.n_past + 1 - c.s.window : 0;
    for (size_t i = 0; i < x.size(); i++) {
        int64_t position = (int64_t)i / (c.s.n_kv_heads * c.s.head_dim) % c.capacity;
        if (position < from || position > c.n_past) x[i] = NAN;
    }
    return x;
}

static step_call call_of(step_case a, uint32_t stream) {
    step_call c = {{0, a.n_heads, a.n_kv_heads, a.head_dim, a.window, (float)(1 / sqrt(a.head_dim)), a.softcap, {}},
                   a.n_seqs,
                   a.n_past,
                   a.n_past + 1 + a.spare,
                   {},
                   {},
                   {}};
    c.q = rig_randoms((size_t)c.n_seqs * query_floats(c), stream, 2);
    c.k = some_cache(c, stream + 1);
    c.v = some_cache(c, stream + 2);
    return c;
}

static bounded expected_output(const step_call &c) {
    bounded out(c.q.size());
    for (int64_t seq = 0; seq < c.n_seqs; seq++) {
        const float *k = &c.k[(size_t)seq * cache_floats(c)], *v = &c.v[(size_t)seq * cache_floats(c)];
        for (int h = 0; h < c.s.n_heads; h++) {
            size_t at = (size_t)(seq * c.s.n_heads + h) * (size_t)c.s.head_dim;
            add_row_output(c.s, &c.q[at], k, v, k, v, c.n_past, h, at, &out);
        }
    }
    return out;
}

static size_t scratch_floats(const step_call &c) { return (size_t)(c.n_seqs * c.s.n_heads * c.capacity); }

static Floats output_of_cpu(const step_call &c) {
    Floats out(c.q.size()), scratch(scratch_floats(c));
    cpu->attention_step(cpu, &c.s, c.n_seqs, c.n_past, c.capacity, c.q.data(), c.k.data(), c.v.data(), out.data(),
                        scratch.data());
    return out;
}

static Floats output_of_device(const step_call &c, uint64_t seed) {
    begin(seed);
    simt::Buffer<float> d_q("q", c.q), d_k("k", c.k), d_v("v", c.v), d_out("out", c.q.size()),
        d_scratch("scratch", scratch_floats(c));
    kvq_test_ok(kvq_cuda_attention_step(&c.s, c.n_seqs, c.n_past, c.capacity, d_q.data(), d_k.data(), d_v.data(),
                                        d_out.data(), d_scratch.data(), NULL, NULL),
                NULL);
    expect_clean();
    return d_out.values();
}

// ---------------------------------------------------------------- tests

START_TEST(a_step_equals_the_definition) {
    rig_open();
    step_call c = call_of(STEPS[_i], 100);
    Floats    first = output_of_device(c, 0);
    within(first, expected_output(c), output_of_cpu(c), "out");
    for (uint64_t seed = 1; seed < RIG_SEEDS; seed++)
        rig_same_bits(output_of_device(c, seed), first, "out in another order of threads");
    rig_close();
}
END_TEST

// A sequence alone is a grid of its heads, all of them are more than a grid holds; and none sees another.
START_TEST(any_grid_gives_the_same_bits) {
    step_call all = call_of({7, 37, 3, 20, 4, 2, 40, 3}, 110), one = all;
    Floats    out = output_of_device(all, 1);
    one.n_seqs = 1;
    for (int64_t seq = 0; seq < all.n_seqs; seq++) {
        auto part = [seq](const Floats &x, size_t n) {
            return Floats(x.begin() + seq * (int64_t)n, x.begin() + (seq + 1) * (int64_t)n);
        };
        one.q = part(all.q, query_floats(all));
        one.k = part(all.k, cache_floats(all));
        one.v = part(all.v, cache_floats(all));
        rig_same_bits(output_of_device(one, 2), part(out, query_floats(all)), "out of one sequence");
    }
}
END_TEST

// Scores of hundreds, of either sign, whose exponentials f32 has only relative to the maximum. That is far above the
// others and at another key for each head, so that every warp and every turn of one has it in some head.
START_TEST(large_scores_do_not_overflow) {
    enum { HEADS = 100, EVERY = 3 };
    rig_open();
    for (int sign = -1; sign <= 1; sign += 2) {
        step_call c = call_of({1, HEADS * EVERY - 1, 0, 0, HEADS, 1, HEADS, 0}, 120);
        c.s.scale = 100;
        for (size_t i = 0; i < c.q.size(); i++) c.q[i] = i / HEADS == i % HEADS ? 1.0f : 0.0f;
        for (size_t i = 0; i < c.k.size(); i++) {
            size_t position = i / HEADS, head = i % HEADS;
            c.k[i] = (float)(2 * sign) + (position == EVERY * head + head % EVERY ? 1.0f : 0.0f);
        }
        within(output_of_device(c, 3), expected_output(c), output_of_cpu(c), "out");
    }
    rig_close();
}
END_TEST

START_TEST(nothing_to_do_and_too_wide_heads) {
    kvq_attention_shape s = {0, 2, 1, 1025, 0, 1, 0, {}};
    kvq_error           error = {};
    begin(1);
    ck_assert_int_eq(kvq_cuda_attention_step(&s, 1, 0, 1, NULL, NULL, NULL, NULL, NULL, NULL, &error),
                     KVQ_ERR_UNSUPPORTED);
    ck_assert(strstr(error.message, "1025 channels") != NULL);
    s.head_dim = 8;
    kvq_test_ok(kvq_cuda_attention_step(&s, 0, 0, 1, NULL, NULL, NULL, NULL, NULL, NULL, NULL), NULL);
    expect_clean();
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(a_step_equals_the_definition, N_STEPS),
    KVQ_CASE(any_grid_gives_the_same_bits),
    KVQ_CASE(large_scores_do_not_overflow),
    KVQ_CASE(nothing_to_do_and_too_wide_heads),
};
KVQ_TEST_MAIN("test_cuda_attention_step", cases)
