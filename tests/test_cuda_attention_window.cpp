// SPDX-License-Identifier: Apache-2.0
//
// Attention of a window on a device, under the emulator, against the definition in f64 and against the CPU backend.
//
// Tolerances of outputs are those of window_oracle.h; with its e_j, p_j, P and n, EPS, c channels:
//   dp_j      f_j = (D + 1) EPS sum_c |dout_c v_jc|; center: g = sum_c (error of out_c) |dout_c| + EPS |center|
//   ds_j      scale slope p_j (P |dp_j - center| + f_j + g + 4 EPS (|dp_j| + |center|)) + scale p_j |dp_j - center| w,
//             w = (16 t^2 + 2) EPS + 2 |t| slope e_j / cap, the error of slope = 1 - t^2, t = tanh
//   dq, dk, dv  the errors of the weights times the magnitudes, and (n + 1) EPS sum of magnitudes for the sum
#include <math.h>

#include "window_oracle.h"

typedef struct attention_case {
    int64_t n_tokens, window;
    int     n_heads, n_kv_heads, head_dim;
    float   softcap;
} attention_case;

// About the tiles of 64 tokens, parts of 32 channels and slices of 128; the caps are low, so that they bend all scores.
static const attention_case CASES[] = {
    {1, 0, 1, 1, 8, 0},    {2, 0, 4, 2, 8, 0},       {31, 0, 3, 1, 24, 0},    {63, 0, 2, 2, 16, 0},
    {64, 0, 3, 3, 8, 0},   {65, 0, 2, 1, 48, 0},     {130, 0, 4, 2, 16, 0},   {129, 16, 2, 1, 16, 0},
    {150, 70, 4, 4, 8, 0}, {40, 1, 2, 1, 8, 0},      {70, 0, 12, 2, 4, 0},    {140, 64, 2, 1, 4, 0},
    {90, 65, 2, 1, 33, 0}, {1, 0, 1, 1, 8, 0.7f},    {129, 0, 4, 2, 16, 1},   {100, 33, 2, 1, 8, 0.5f},
    {67, 0, 2, 1, 130, 0}, {33, 0, 2, 1, 200, 0.9f}, {200, 1000, 1, 1, 5, 0},
};
enum { N_CASES = sizeof CASES / sizeof *CASES };

static kvq_attention_shape shape_of(attention_case a) {
    return {a.n_tokens, a.n_heads, a.n_kv_heads, a.head_dim, a.window, (float)(1 / sqrt(a.head_dim)), a.softcap, {}};
}

static size_t q_floats(const kvq_attention_shape &s) { return (size_t)(s.n_tokens * s.n_heads * s.head_dim); }
static size_t kv_floats(const kvq_attention_shape &s) { return (size_t)(s.n_tokens * s.n_kv_heads * s.head_dim); }

static bounded expected_output(const kvq_attention_shape &s, const Floats &q, const Floats &k, const Floats &v,
                               const Floats &k2, const Floats &v2) {
    bounded out(q.size());
    for (int64_t i = 0; i < s.n_tokens; i++) {
        for (int h = 0; h < s.n_heads; h++) {
            size_t at = (size_t)((i * s.n_heads + h) * s.head_dim);
            add_row_output(s, &q[at], k.data(), v.data(), k2.data(), v2.data(), i, h, at, &out);
        }
    }
    return out;
}

static Floats output_of_cpu(const kvq_attention_shape &s, const Floats &q, const Floats &k, const Floats &v,
                            const Floats &k2, const Floats &v2) {
    Floats out(q.size()), scratch((size_t)cpu->attention_scratch_floats(cpu, &s, false));
    cpu->attention(cpu, &s, q.data(), k.data(), v.data(), k2.data(), v2.data(), out.data(), scratch.data());
    return out;
}

// Without a second set its pointers are NULL: they may not be read.
static Floats output_of_device(const kvq_attention_shape &s, const Floats &q, const Floats &k, const Floats &v,
                               const Floats &k2, const Floats &v2, uint64_t seed) {
    begin(seed);
    bool                used = kvq_second_set_used(&s.second);
    simt::Buffer<float> d_q("q", q), d_k("k", k), d_v("v", v), d_k2("second k", k2), d_v2("second v", v2),
        d_out("out", q.size());
    kvq_test_ok(kvq_cuda_window_attention(&s, d_q.data(), d_k.data(), d_v.data(), used ? d_k2.data() : NULL,
                                          used ? d_v2.data() : NULL, d_out.data(), NULL, NULL),
                NULL);
    expect_clean();
    return d_out.values();
}

START_TEST(attention_equals_the_definition) {
    kvq_attention_shape s = shape_of(CASES[_i]);
    rig_open();
    Floats q = rig_randoms(q_floats(s), 1, 1), k = rig_randoms(kv_floats(s), 2, 1), v = rig_randoms(kv_floats(s), 3, 1);
    bounded expected = expected_output(s, q, k, v, k, v);
    Floats  of_cpu = output_of_cpu(s, q, k, v, k, v), first = output_of_device(s, q, k, v, k, v, 0);
    within(first, expected, of_cpu, "out");
    rig_same_bits(output_of_device(s, q, k, v, k, v, 1), first, "out in another order of threads");
    rig_close();
}
END_TEST

// Scores of hundreds, whose exponentials f32 has only relative to the maximum; the largest keys come late, so that what
// was summed before is scaled down.
START_TEST(large_scores_do_not_overflow) {
    kvq_attention_shape s = {140, 2, 1, 8, 0, 40, 0, {}};
    rig_open();
    Floats q = rig_randoms(q_floats(s), 4, 1), k = rig_randoms(kv_floats(s), 5, 1), v = rig_randoms(kv_floats(s), 6, 1);
    for (size_t i = 0; i < k.size(); i++) k[i] *= 1 + (float)i / 200;
    bounded expected = expected_output(s, q, k, v, k, v);
    within(output_of_device(s, q, k, v, k, v, 2), expected, output_of_cpu(s, q, k, v, k, v), "out");
    rig_close();
}
END_TEST

static const kvq_second_set SECONDS[] = {{1, 0, 0},   {5, 0, 0},   {64, 0, 0},    {70, 0, 0}, {1000, 0, 0}, {0, 64, 0},
                                         {0, 48, 0},  {3, 16, 0},  {0, 0, 1},     {0, 0, 64}, {0, 0, 1000}, {4, 0, 70},
                                         {0, 128, 7}, {1, 0, 129}, {0, 128, 130}, {0, 64, 64}};
enum { N_SECONDS = sizeof SECONDS / sizeof *SECONDS };
static const int64_t SECOND_TOKENS[] = {130, 65, 64}, SECOND_WINDOWS[] = {0, 1, 40, 100};

// Two sets of unrelated keys and values.
START_TEST(keys_come_from_the_second_set_where_it_says) {
    kvq_attention_shape s = {SECOND_TOKENS[_i % 3],  2,          1, 8, SECOND_WINDOWS[_i % 4], 0.35f,
                             _i % 5 == 0 ? 0.7f : 0, SECONDS[_i]};
    rig_open();
    Floats q = rig_randoms(q_floats(s), 30, 1), k = rig_randoms(kv_floats(s), 31, 1),
           v = rig_randoms(kv_floats(s), 32, 1), k2 = rig_randoms(kv_floats(s), 33, 2),
           v2 = rig_randoms(kv_floats(s), 34, 2);
    bounded expected = expected_output(s, q, k, v, k2, v2);
    within(output_of_device(s, q, k, v, k2, v2, (uint64_t)_i), expected, output_of_cpu(s, q, k, v, k2, v2), "out");
    rig_close();
}
END_TEST

// ---------------------------------------------------------------- backward

typedef struct gradients {
    bounded dq, dk, dv;
} gradients;

static void add_row_gradients(const kvq_attention_shape &s, const Floats &q, const Floats &k, const Floats &v,
                              const bounded &out, const Floats &dout, int64_t i, int h, gradients *g) {
    int      D = s.head_dim, kv = h / (s.n_heads / s.n_kv_heads);
    size_t   qi = (size_t)((i * s.n_heads + h) * D);
    seen_row row = see(s, &q[qi], k.data(), k.data(), i, h);
    double   n = (double)(i + 1 - row.from), center = 0, center_error = 0, scale = (double)s.scale;
    // terms of a sum over the queries and heads that see one key
    double n_terms = (double)(s.n_tokens * (s.n_heads / s.n_kv_heads));
    for (size_t c = 0; c < (size_t)D; c++) {
        center += out.value[qi + c] * (double)dout[qi + c];
        center_error += out.error[qi + c] * fabs((double)dout[qi + c]);
    }
    center_error += EPS * fabs(center);
    for (int64_t j = row.from; j <= i; j++) {
        size_t kj = (size_t)((j * s.n_kv_heads + kv) * D), at = (size_t)j;
        double magnitude, dp = product(&dout[qi], &v[kj], D, &magnitude), apart = fabs(dp - center), p = row.p[at];
        double slope_error = s.softcap > 0 ? (16 * row.t[at] * row.t[at] + 2) * EPS +
                                                 2 * fabs(row.t[at]) * row.slope[at] * row.e[at] / (double)s.softcap
                                           : 0;
        double ds = p * (dp - center) * scale * row.slope[at];
        double ds_error = scale * p *
                          (row.slope[at] * (row.P * apart + (D + 1) * EPS * magnitude + center_error +
                                            4 * EPS * (fabs(dp) + fabs(center))) +
                           apart * slope_error);
        for (size_t c = 0; c < (size_t)D; c++) {
            double key = (double)k[kj + c], query = (double)q[qi + c], d = (double)dout[qi + c];
            g->dq.add(qi + c, ds * key, (ds_error + (n + 1) * EPS * fabs(ds)) * fabs(key));
            g->dk.add(kj + c, ds * query, (ds_error + (n_terms + 1) * EPS * fabs(ds)) * fabs(query));
            g->dv.add(kj + c, p * d, (row.P + (n_terms + 1) * EPS) * p * fabs(d));
        }
    }
}

typedef struct three {
    Floats dq, dk, dv;
} three;

static three gradients_of_device(const kvq_attention_shape &s, const Floats &q, const Floats &k, const Floats &v,
                                 const Floats &out, const Floats &dout, uint64_t seed) {
    begin(seed);
    simt::Buffer<float> d_q("q", q), d_k("k", k), d_v("v", v), d_out("out", out), d_dout("dout", dout),
        d_dq("dq", q.size()), d_dk("dk", k.size()), d_dv("dv", v.size()),
        d_scratch("scratch", (size_t)kvq_cuda_window_scratch_floats(&s, true));
    kvq_test_ok(kvq_cuda_window_attention_backward(&s, d_q.data(), d_k.data(), d_v.data(), d_out.data(), d_dout.data(),
                                                   d_dq.data(), d_dk.data(), d_dv.data(), d_scratch.data(), NULL, NULL),
                NULL);
    expect_clean();
    return {d_dq.values(), d_dk.values(), d_dv.values()};
}

START_TEST(gradients_equal_the_definition) {
    kvq_attention_shape s = shape_of(CASES[_i]);
    rig_open();
    Floats q = rig_randoms(q_floats(s), 23, 1), k = rig_randoms(kv_floats(s), 24, 1),
           v = rig_randoms(kv_floats(s), 25, 1), dout = rig_randoms(q_floats(s), 26, 1),
           out = output_of_cpu(s, q, k, v, k, v);
    three  of_cpu = {Floats(q.size()), Floats(k.size()), Floats(v.size())};
    Floats scratch((size_t)cpu->attention_scratch_floats(cpu, &s, true));
    cpu->attention_backward(cpu, &s, q.data(), k.data(), v.data(), out.data(), dout.data(), of_cpu.dq.data(),
                            of_cpu.dk.data(), of_cpu.dv.data(), scratch.data());
    gradients g = {bounded(q.size()), bounded(k.size()), bounded(v.size())};
    bounded   exact_out = expected_output(s, q, k, v, k, v);
    for (int64_t i = 0; i < s.n_tokens; i++) {
        for (int h = 0; h < s.n_heads; h++) add_row_gradients(s, q, k, v, exact_out, dout, i, h, &g);
    }
    three first = gradients_of_device(s, q, k, v, out, dout, 0), second = gradients_of_device(s, q, k, v, out, dout, 1);
    within(first.dq, g.dq, of_cpu.dq, "dq");
    within(first.dk, g.dk, of_cpu.dk, "dk");
    within(first.dv, g.dv, of_cpu.dv, "dv");
    rig_same_bits(second.dq, first.dq, "dq in another order of threads");
    rig_same_bits(second.dk, first.dk, "dk in another order of threads");
    rig_same_bits(second.dv, first.dv, "dv in another order of threads");
    rig_close();
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(attention_equals_the_definition, N_CASES),
    KVQ_CASE(large_scores_do_not_overflow),
    KVQ_LOOP(keys_come_from_the_second_set_where_it_says, N_SECONDS),
    KVQ_LOOP(gradients_equal_the_definition, N_CASES),
};
KVQ_TEST_MAIN("test_cuda_attention_window", cases)
