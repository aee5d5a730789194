// SPDX-License-Identifier: Apache-2.0
//
// Attention of a window on a device, under the emulator, against the definition in f64 and against the CPU backend.
//
// Tolerances follow the error through the formulas, to first order in EPS = 2^-24, the unit roundoff of f32; a sum of n
// products in f32 errs by at most n EPS sum |a b|, whatever its order (Higham, Accuracy and Stability, section 3.1).
// With n visible keys in T <= n tiles, j and k keys, c channels:
//   score     e_j = (D + 2) EPS scale sum_c |q_c k_c|, and 8 EPS |score| more where it is capped (tanh: 6, and its
//             quotient and product; the derivative of the cap is at most 1)
//   p_j       r_j = e_j + EPS |score - maximum| + 4 EPS (exp) relative in the numerator, at most R = max r_j in the
//             denominator, with n + 2 T roundings of its sum: P = 2 R + (3 n + 6) EPS
//   out_c     P + n EPS, times sum_j p_j |v_jc|; scaling by another maximum is in the numerator and the denominator
//   dp_j      f_j = (D + 1) EPS sum_c |dout_c v_jc|; center: g = sum_c (error of out_c) |dout_c| + EPS |center|
//   ds_j      scale slope p_j (P |dp_j - center| + f_j + g + 4 EPS (|dp_j| + |center|)) + scale p_j |dp_j - center| w,
//             w = (16 t^2 + 2) EPS + 2 |t| slope e_j / cap, the error of slope = 1 - t^2, t = tanh
//   dq, dk, dv  the errors of the weights times the magnitudes, and (n + 1) EPS sum of magnitudes for the sum
// The device must be within that of the definition, and within twice that of the CPU, which is as far away.
#include <math.h>

#include "cuda_ops_rig.h"

static const double EPS = 0x1p-24;

typedef std::vector<double> Doubles;

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

// The same words as the header: reads from the second set.
static bool reads_second(const kvq_second_set &s, int64_t i, int64_t j) {
    if (i < s.prompt || i - j < s.recent) return true;
    return s.tile > 0 && j >= i + 1 - (i + 1) % s.tile;
}

// A value and how far one in f32 may be from it.
typedef struct bounded {
    Doubles value, error;
    explicit bounded(size_t n) : value(n, 0.0), error(n, 0.0) {}
    void add(size_t at, double v, double e) { value[at] += v, error[at] += e; }
} bounded;

// What one query sees, keys 0 .. i.
typedef struct seen_row {
    int64_t from;           // the first visible key
    Doubles p, e, t, slope; // probability, error of the score, tanh and derivative of the cap
    double  P;              // relative error of a probability
} seen_row;

static double product(const float *a, const float *b, int D, double *magnitude) {
    double sum = 0;
    *magnitude = 0;
    for (int c = 0; c < D; c++) {
        sum += (double)a[c] * (double)b[c];
        *magnitude += fabs((double)a[c] * (double)b[c]);
    }
    return sum;
}

static seen_row see(const kvq_attention_shape &s, const float *q, const float *k, const float *k2, int64_t i,
                    int head) {
    int64_t  n = i + 1, kv = head / (s.n_heads / s.n_kv_heads);
    int      D = s.head_dim;
    seen_row row = {s.window > 0 && i >= s.window ? i - s.window + 1 : 0,
                    Doubles((size_t)n),
                    Doubles((size_t)n),
                    Doubles((size_t)n),
                    Doubles((size_t)n),
                    0};
    double top = -HUGE_VAL, sum = 0, R = 0;
    for (int64_t j = row.from; j < n; j++) {
        size_t at = (size_t)j;
        double magnitude,
            score = product(q + (i * s.n_heads + head) * D,
                            (reads_second(s.second, i, j) ? k2 : k) + (j * s.n_kv_heads + kv) * D, D, &magnitude);
        score *= (double)s.scale;
        row.e[at] = (D + 2) * EPS * (double)s.scale * magnitude;
        row.t[at] = s.softcap > 0 ? tanh(score / (double)s.softcap) : 0;
        row.slope[at] = 1 - row.t[at] * row.t[at];
        if (s.softcap > 0) score = (double)s.softcap * row.t[at];
        if (s.softcap > 0) row.e[at] += 8 * EPS * fabs(score);
        row.p[at] = score;
        top = fmax(top, score);
    }
    for (int64_t j = row.from; j < n; j++) {
        R = fmax(R, row.e[(size_t)j] + EPS * (top - row.p[(size_t)j]) + 4 * EPS);
        sum += row.p[(size_t)j] = exp(row.p[(size_t)j] - top);
    }
    for (int64_t j = 0; j < n; j++) row.p[(size_t)j] = j < row.from ? 0 : row.p[(size_t)j] / sum;
    row.P = 2 * R + (3 * (double)(n - row.from) + 6) * EPS;
    return row;
}

static bounded expected_output(const kvq_attention_shape &s, const Floats &q, const Floats &k, const Floats &v,
                               const Floats &k2, const Floats &v2) {
    bounded out(q.size());
    int     D = s.head_dim;
    for (int64_t i = 0; i < s.n_tokens; i++) {
        for (int h = 0; h < s.n_heads; h++) {
            seen_row row = see(s, q.data(), k.data(), k2.data(), i, h);
            double   n = (double)(i + 1 - row.from);
            for (int64_t j = row.from; j <= i; j++) {
                const Floats &values = reads_second(s.second, i, j) ? v2 : v;
                for (int c = 0; c < D; c++) {
                    double term = row.p[(size_t)j] *
                                  (double)values[(size_t)((j * s.n_kv_heads + h / (s.n_heads / s.n_kv_heads)) * D + c)];
                    out.add((size_t)((i * s.n_heads + h) * D + c), term, (row.P + n * EPS) * fabs(term));
                }
            }
        }
    }
    return out;
}

static double worst; // error as a part of what is allowed

static void within(const Floats &value, const bounded &expected, const Floats &of_cpu, const char *what) {
    for (size_t i = 0; i < value.size(); i++) {
        double error = fabs((double)value[i] - expected.value[i]);
        ck_assert_msg(error <= expected.error[i], "%s[%zu]: %.9g instead of %.9g, error %.3g of %.3g", what, i,
                      (double)value[i], expected.value[i], error, expected.error[i]);
        ck_assert_msg(fabs((double)value[i] - (double)of_cpu[i]) <= 2 * expected.error[i],
                      "%s[%zu]: %.9g, on the CPU %.9g", what, i, (double)value[i], (double)of_cpu[i]);
        if (expected.error[i] > 0) worst = fmax(worst, error / expected.error[i]);
    }
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
    seen_row row = see(s, q.data(), k.data(), k.data(), i, h);
    size_t   qi = (size_t)((i * s.n_heads + h) * D);
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
