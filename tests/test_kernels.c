// SPDX-License-Identifier: Apache-2.0
//
// The CPU operations against plain f64 arithmetic over awkward sizes, and their promise that the thread count changes
// nothing. Tolerances: a sum of n products in f32 differs from the exact one by at most n * EPS * sum |a b| (Higham,
// Accuracy and Stability, section 3.1), whatever its order; EPS = 2^-24 is the unit roundoff.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_exp_hd.h"
#include "kvq_kernels.h"
#include "kvq_test.h"

#define EPS 5.9604644775390625e-08

static kvq_context  contexts[2];
static kvq_backend *backends[2]; // one and two threads

static void open_backends(void) {
    for (int i = 0; i < 2; i++) {
        contexts[i] = kvq_test_context();
        contexts[i].n_threads = i + 1;
        kvq_test_ok(kvq_backend_cpu(&contexts[i], KVQ_COMPUTE_F32, &backends[i], NULL), NULL);
    }
}

// Each test is a process of its own, so arrays live until it ends; a leak checker finds them here.
static float *arrays[64];
static int    n_arrays;

static float *floats(int64_t n) {
    ck_assert_int_lt(n_arrays, 64);
    kvq_test_ok(KVQ_NEW(&contexts[0], n, "test array", &arrays[n_arrays], NULL), NULL);
    return arrays[n_arrays++];
}

static float *randoms(int64_t n, uint32_t stream, double scale) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(scale * (2 * kvq_rng_uniform(5, KVQ_RNG_TEST, stream, (uint64_t)i) - 1));
    return x;
}

static void assert_close(double value, double expected, double tolerance, const char *what, int64_t at) {
    ck_assert_msg(fabs(value - expected) <= tolerance, "%s %lld: %.9g instead of %.9g, tolerance %.2g", what,
                  (long long)at, value, expected, tolerance);
}

// ---------------------------------------------------------------- exp

START_TEST(exp_is_accurate_to_two_units) {
    double worst32 = 0, worst64 = 0;
    for (int i = 0; i <= 200000; i++) {
        float x = -87.0f + 175.0f * (float)i / 200000.0f;
        worst32 = fmax(worst32, fabs((double)kvq_exp_f32(x) / exp((double)x) - 1));
        double y = -708.0 + 1416.0 * i / 200000.0;
        worst64 = fmax(worst64, (double)fabsl((long double)kvq_exp_f64(y) / expl((long double)y) - 1));
    }
    ck_assert_double_lt(worst32, 2 * 0x1p-23);
    ck_assert_double_lt(worst64, 2 * 0x1p-52);
    ck_assert(kvq_exp_f32(0) == 1.0f && kvq_exp_f64(0) == 1.0);
    ck_assert(kvq_exp_f32(-1e30f) > 0 && kvq_exp_f32(-1e30f) < 2e-38f);
    ck_assert(kvq_exp_f64(-1e300) > 0 && kvq_exp_f64(-1e300) < 1e-307);
}
END_TEST

// Also where exp(x) - 1 would cancel.
START_TEST(tanh_is_accurate_to_three_units) {
    double worst = 0;
    for (int i = 1; i <= 200000; i++) {
        float x = 25.0f * (float)i / 200000.0f, small = ldexpf(x, -(i % 60));
        worst = fmax(worst, fabs((double)kvq_tanh_f32(x) / tanh((double)x) - 1));
        worst = fmax(worst, fabs((double)kvq_tanh_f32(-small) / -tanh((double)small) - 1));
    }
    ck_assert_double_lt(worst, 3 * 0x1p-23);
    ck_assert(kvq_tanh_f32(0) == 0.0f && kvq_tanh_f32(1e30f) == 1.0f && kvq_tanh_f32(-INFINITY) == -1.0f);
    ck_assert(isnan(kvq_tanh_f32(NAN)));
}
END_TEST

// ---------------------------------------------------------------- linear layers

static const int64_t LINEAR_SIZES[][3] = {{1, 1, 1},     {1, 513, 31},   {3, 7, 33},
                                          {128, 17, 64}, {257, 33, 100}, {300, 4100, 5}};

START_TEST(linear_equals_the_plain_product) {
    int64_t m = LINEAR_SIZES[_i][0], n = LINEAR_SIZES[_i][1], k = LINEAR_SIZES[_i][2];
    open_backends();
    float *x = randoms(m * k, 1, 1), *w = randoms(n * k, 2, 1), *bias = randoms(n, 3, 1), *y = floats(m * n),
          *y2 = floats(m * n);
    backends[0]->linear(backends[0], x, w, bias, y, m, n, k);
    backends[1]->linear(backends[1], x, w, bias, y2, m, n, k);
    ck_assert_mem_eq(y, y2, (size_t)(m * n) * sizeof *y);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = (double)bias[j], magnitude = fabs(sum);
            for (int64_t c = 0; c < k; c++) {
                sum += (double)x[i * k + c] * (double)w[j * k + c];
                magnitude += fabs((double)x[i * k + c] * (double)w[j * k + c]);
            }
            assert_close((double)y[i * n + j], sum, (double)(k + 1) * EPS * magnitude, "y", i * n + j);
        }
    }
}
END_TEST

START_TEST(linear_backward_is_the_transposed_product) {
    int64_t m = LINEAR_SIZES[_i][0], n = LINEAR_SIZES[_i][1], k = LINEAR_SIZES[_i][2];
    open_backends();
    float *dy = randoms(m * n, 4, 1), *w = randoms(n * k, 5, 1), *dx = floats(m * k), *twice = floats(m * k);
    backends[1]->linear_backward(backends[1], dy, w, dx, m, n, k, false);
    backends[0]->linear_backward(backends[0], dy, w, twice, m, n, k, false);
    ck_assert_mem_eq(dx, twice, (size_t)(m * k) * sizeof *dx);
    backends[0]->linear_backward(backends[0], dy, w, twice, m, n, k, true);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t c = 0; c < k; c++) {
            double sum = 0, magnitude = 0;
            for (int64_t j = 0; j < n; j++) {
                sum += (double)dy[i * n + j] * (double)w[j * k + c];
                magnitude += fabs((double)dy[i * n + j] * (double)w[j * k + c]);
            }
            assert_close((double)dx[i * k + c], sum, (double)n * EPS * magnitude, "dx", i * k + c);
            assert_close((double)twice[i * k + c], 2 * sum, 2 * (double)(n + 1) * EPS * magnitude, "accumulated dx",
                         i * k + c);
        }
    }
}
END_TEST

// ---------------------------------------------------------------- row operations

static double norm_loss(const double *x, const float *w, const float *dy, int64_t n, double eps) {
    double squares = 0, loss = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    for (int64_t i = 0; i < n; i++) loss += x[i] / sqrt(squares / (double)n + eps) * (double)w[i] * (double)dy[i];
    return loss;
}

// Forward against the formula; backward against central differences of the same formula in f64 (step 1e-4: truncation
// 1e-8, rounding 1e-12, both far below the tolerance of f32 results).
START_TEST(rmsnorm_and_its_gradient) {
    enum { M = 37, N = 67 };
    open_backends();
    float *x = randoms(M * N, 6, 2), *w = randoms(N, 7, 1), *dy = randoms(M * N, 8, 1), *y = floats(M * N),
          *dx = floats(M * N);
    backends[1]->rmsnorm(backends[1], x, w, 1e-5f, y, M, N);
    backends[1]->rmsnorm_backward(backends[1], x, w, 1e-5f, dy, dx, M, N);
    for (int row = 0; row < M; row++) {
        double point[N], squares = 0;
        for (int i = 0; i < N; i++) {
            point[i] = (double)x[row * N + i];
            squares += point[i] * point[i];
        }
        double rms = sqrt(squares / N + (double)1e-5f);
        for (int i = 0; i < N; i++) {
            assert_close((double)y[row * N + i], point[i] / rms * (double)w[i], 4 * EPS * 3, "y", row * N + i);
            double saved = point[i];
            point[i] = saved + 1e-4;
            double up = norm_loss(point, w, dy + row * N, N, (double)1e-5f);
            point[i] = saved - 1e-4;
            double down = norm_loss(point, w, dy + row * N, N, (double)1e-5f);
            point[i] = saved;
            assert_close((double)dx[row * N + i], (up - down) / 2e-4, 1e-6, "dx", row * N + i);
        }
    }
}
END_TEST

START_TEST(rope_rotates_pairs_and_back) {
    enum { M = 5, HEADS = 3, D = 10, ROT = 6, HALF = ROT / 2 };
    open_backends();
    float *x = randoms(M * HEADS * D, 9, 1), *y = floats(M * HEADS * D), *c = floats(M * HALF), *s = floats(M * HALF);
    for (int i = 0; i < M * HALF; i++) {
        c[i] = (float)cos(0.7 * i);
        s[i] = (float)sin(0.7 * i);
    }
    memcpy(y, x, M * HEADS * D * sizeof *x);
    backends[0]->rope(backends[0], y, c, s, 1, 1, M, HEADS, D, ROT);
    for (int t = 0; t < M; t++) {
        for (int h = 0; h < HEADS; h++) {
            const float *before = x + (t * HEADS + h) * D, *after = y + (t * HEADS + h) * D;
            for (int i = 0; i < HALF; i++) {
                double angle = 0.7 * (t * HALF + i), a = (double)before[i], b = (double)before[i + HALF];
                assert_close((double)after[i], a * cos(angle) - b * sin(angle), 6 * EPS, "first of pair", i);
                assert_close((double)after[i + HALF], b * cos(angle) + a * sin(angle), 6 * EPS, "second of pair", i);
            }
            for (int i = ROT; i < D; i++) ck_assert(after[i] == before[i]);
        }
    }
    backends[0]->rope(backends[0], y, c, s, -1, 1, M, HEADS, D, ROT);
    for (int i = 0; i < M * HEADS * D; i++) assert_close((double)y[i], (double)x[i], 12 * EPS, "rotated back", i);
}
END_TEST

// The activation and its derivative, exactly as their definitions say; for gelu the derivative by a difference quotient
// of 1e-5 (truncation 1e-10).
static double activation(kvq_gate_kind kind, double g) {
    if (kind == KVQ_GATE_SILU) return g / (1 + exp(-g));
    return 0.5 * g * (1 + tanh(sqrt(2 / acos(-1)) * (g + 0.044715 * g * g * g)));
}

static double activation_slope(kvq_gate_kind kind, double g) {
    if (fabs(g) > 30) return g > 0; // where both are flat
    return (activation(kind, g + 1e-5) - activation(kind, g - 1e-5)) / 2e-5;
}

// Both are g * sigmoid(a). A relative error of e EPS in a becomes |a| (1 - s) e EPS in the sigmoid s; |a| s (1 - s) is
// at most 0.23 and a^2 s (1 - s) at most 0.44. With the 2 units of exp, 4 roundings in a and those of the products this
// is 12 EPS |g u| for the value, and 30 EPS |d u| for its derivative, whose largest term has the factor |g a'| <= 3
// |a|.
START_TEST(gated_activations_and_their_gradients_in_place) {
    enum { N = 16384 + 77 };
    kvq_gate_kind kind = _i == 0 ? KVQ_GATE_SILU : KVQ_GATE_GELU_TANH;
    open_backends();
    float      *gate = randoms(N, 10, 20), *up = randoms(N, 11, 2), *dy = randoms(N, 12, 1), *y = floats(N);
    const float extremes[] = {-500, 500, -1e19f, 1e19f, 0, -16, 16};
    memcpy(gate, extremes, sizeof extremes);
    memcpy(y, gate, N * sizeof *y);
    backends[1]->gated_mul(backends[1], kind, y, up, y, N); // over its own input
    float *dgate = floats(N), *dup = floats(N);
    memcpy(dgate, gate, N * sizeof *y);
    memcpy(dup, up, N * sizeof *y);
    backends[1]->gated_mul_backward(backends[1], kind, dgate, dup, dy, N);
    for (int i = 0; i < N; i++) {
        double g = (double)gate[i], u = (double)up[i], d = (double)dy[i], value = activation(kind, g);
        assert_close((double)y[i], value * u, 12 * EPS * fabs(g * u), "y", i);
        assert_close((double)dgate[i], d * u * activation_slope(kind, g), 30 * EPS * fabs(d * u) + 1e-9, "dgate", i);
        assert_close((double)dup[i], d * value, 12 * EPS * fabs(g * d), "dup", i);
    }
}
END_TEST

START_TEST(soft_caps_bound_without_moving_small_numbers) {
    enum { N = 16384 + 5 };
    open_backends();
    float *x = randoms(N, 13, 100), *y = floats(N);
    x[0] = 1e-20f;
    x[1] = 1e30f;
    memcpy(y, x, N * sizeof *x);
    backends[1]->softcap(backends[1], 30, y, N);
    for (int i = 0; i < N; i++) { // tanh, a quotient and a product
        double expected = 30 * tanh((double)x[i] / 30);
        assert_close((double)y[i], expected, (6 + 2) * EPS * fabs(expected), "y", i);
    }
    ck_assert(y[0] == 1e-20f && y[1] == 30.0f);
}
END_TEST

// ---------------------------------------------------------------- attention

typedef struct attention_case {
    int64_t n_tokens, window;
    int     n_heads, n_kv_heads, head_dim;
    float   softcap;
} attention_case;

// Sizes about the block of 128 queries; groups of heads that share a KV head alone (1), in two parts and in many; the
// caps are low, so that they bend all scores.
static const attention_case ATTENTION_CASES[] = {
    {1, 0, 1, 1, 8, 0},     {2, 0, 4, 2, 8, 0},    {31, 0, 3, 1, 24, 0},     {127, 0, 2, 2, 16, 0},
    {128, 0, 9, 3, 8, 0},   {129, 0, 2, 1, 48, 0}, {300, 0, 4, 2, 16, 0},    {129, 16, 2, 1, 16, 0},
    {300, 130, 4, 4, 8, 0}, {40, 1, 2, 1, 8, 0},   {130, 0, 24, 8, 4, 0},    {150, 0, 17, 1, 4, 0},
    {1, 0, 1, 1, 8, 0.7f},  {129, 0, 4, 2, 16, 1}, {300, 70, 2, 1, 8, 0.5f},
};
#define N_ATTENTION_CASES ((int)(sizeof ATTENTION_CASES / sizeof *ATTENTION_CASES))

static kvq_attention_shape shape_of(attention_case a) {
    return (kvq_attention_shape){
        a.n_tokens, a.n_heads, a.n_kv_heads, a.head_dim, a.window, (float)(1 / sqrt(a.head_dim)), a.softcap, {0, 0, 0}};
}

static bool reads_second(const kvq_second_set *s, int64_t i, int64_t j) {
    if (i < s->prompt || i - j < s->recent) return true;
    return s->tile > 0 && j >= i + 1 - (i + 1) % s->tile;
}

// One query row in f64: probabilities p [i + 1], and the derivative of the capped scores. recent_k: NULL without.
static void reference_row(const kvq_attention_shape *s, const float *q, const float *k, const float *recent_k,
                          int64_t i, int head, double *p, double *slope) {
    int64_t kv = head / (s->n_heads / s->n_kv_heads), from = s->window > 0 && i >= s->window ? i - s->window + 1 : 0;
    double  top = -HUGE_VAL, sum = 0;
    for (int64_t j = 0; j <= i; j++) {
        p[j] = 0;
        for (int c = 0; c < s->head_dim; c++) {
            p[j] += (double)q[(i * s->n_heads + head) * s->head_dim + c] *
                    (double)(reads_second(&s->second, i, j) ? recent_k : k)[(j * s->n_kv_heads + kv) * s->head_dim + c];
        }
        p[j] *= (double)s->scale;
        double t = s->softcap > 0 ? tanh(p[j] / (double)s->softcap) : 0;
        slope[j] = 1 - t * t;
        if (s->softcap > 0) p[j] = (double)s->softcap * t;
        if (j < from) p[j] = -HUGE_VAL;
        top = fmax(top, p[j]);
    }
    for (int64_t j = 0; j <= i; j++) sum += p[j] = exp(p[j] - top);
    for (int64_t j = 0; j <= i; j++) p[j] /= sum;
}

// Inputs are of size 1, so scores are of size sqrt(D) and an f32 forward errs by a few D * EPS; 1e-5 leaves room for
// the sum over 300 keys and is 1e-5 of the values themselves.
START_TEST(attention_equals_the_definition) {
    kvq_attention_shape s = shape_of(ATTENTION_CASES[_i]);
    int64_t             S = s.n_tokens, D = s.head_dim, nq = S * s.n_heads * D, nk = S * s.n_kv_heads * D;
    open_backends();
    float *q = randoms(nq, 20, 1), *k = randoms(nk, 21, 1), *v = randoms(nk, 22, 1), *out = floats(nq),
          *out2 = floats(nq), *step = floats(s.n_heads * D);
    for (int b = 0; b < 2; b++) {
        float *scratch = floats(backends[b]->attention_scratch_floats(backends[b], &s, false));
        backends[b]->attention(backends[b], &s, q, k, v, NULL, NULL, b == 0 ? out : out2, scratch);
    }
    ck_assert_mem_eq(out, out2, (size_t)nq * sizeof *out);
    double *p = malloc((size_t)(2 * S) * sizeof *p), *slope = p + S;
    for (int64_t i = 0; i < S; i++) {
        for (int h = 0; h < s.n_heads; h++) {
            reference_row(&s, q, k, NULL, i, h, p, slope);
            for (int64_t c = 0; c < D; c++) {
                double sum = 0;
                for (int64_t j = 0; j <= i; j++)
                    sum += p[j] * (double)v[(j * s.n_kv_heads + h / (s.n_heads / s.n_kv_heads)) * D + c];
                assert_close((double)out[(i * s.n_heads + h) * D + c], sum, 1e-5, "out", (i * s.n_heads + h) * D + c);
            }
        }
    }
    // a decode step over the same keys is the last row
    float *scores = floats(s.n_heads * S);
    backends[1]->attention_step(backends[1], &s, 1, S - 1, S, q + (S - 1) * s.n_heads * D, k, v, step, scores);
    for (int64_t c = 0; c < s.n_heads * D; c++)
        assert_close((double)step[c], (double)out[(S - 1) * s.n_heads * D + c], 1e-5, "step", c);
    free(p);
}
END_TEST

static const int64_t        RECENT_TOKENS[] = {1, 2, 127, 128, 129, 200, 300}, RECENT_WINDOWS[] = {0, 1, 64, 129, 150};
static const kvq_second_set RECENTS[] = {
    {1, 0, 0}, {5, 0, 0},   {128, 0, 0},  {130, 0, 0}, {1000, 0, 0}, {0, 128, 0}, {0, 48, 0},    {3, 16, 0},
    {0, 0, 1}, {0, 0, 128}, {0, 0, 1000}, {4, 0, 100}, {0, 128, 7},  {1, 0, 129}, {0, 128, 130}, {0, 128, 128}};
enum { N_RECENT_TOKENS = 7, N_RECENTS = 16, N_RECENT_WINDOWS = 5 };

// Two sets of unrelated keys and values; the tolerance is that of one set, for there is one softmax over as many keys.
// _i: the length; three query heads share a KV head.
START_TEST(keys_come_from_the_second_set_where_it_says) {
    enum { H = 6, HKV = 2, D = 8 };
    int64_t S = RECENT_TOKENS[_i], nq = S * H * D, nk = S * HKV * D;
    open_backends();
    float *q = randoms(nq, 30, 1), *k = randoms(nk, 31, 1), *v = randoms(nk, 32, 1), *k2 = randoms(nk, 33, 2),
          *v2 = randoms(nk, 34, 2), *out = floats(nq), *out2 = floats(nq), *scratch = floats(4 * 128 * (S + 128));
    double *p = malloc((size_t)(2 * S) * sizeof *p), *slope = p + S;
    for (int example = 0; example < N_RECENTS * N_RECENT_WINDOWS; example++) {
        kvq_attention_shape s = {S,
                                 H,
                                 HKV,
                                 D,
                                 RECENT_WINDOWS[example / N_RECENTS],
                                 0.35f,
                                 example % 2 == 0 ? 0 : 0.7f,
                                 RECENTS[example % N_RECENTS]};
        ck_assert_int_le(backends[1]->attention_scratch_floats(backends[1], &s, false), 4 * 128 * (S + 128));
        memset(scratch, 0xFF, (size_t)(4 * 128 * (S + 128)) * sizeof *scratch); // NaN
        backends[0]->attention(backends[0], &s, q, k, v, k2, v2, out, scratch);
        backends[1]->attention(backends[1], &s, q, k, v, k2, v2, out2, scratch);
        ck_assert_mem_eq(out, out2, (size_t)nq * sizeof *out);
        for (int64_t i = 0; i < S * H; i++) {
            int64_t at = i / H, h = i % H;
            reference_row(&s, q, k, k2, at, (int)h, p, slope);
            for (int64_t c = 0; c < D; c++) {
                double sum = 0;
                for (int64_t j = 0; j <= at; j++)
                    sum += p[j] * (double)(reads_second(&s.second, at, j) ? v2 : v)[(j * HKV + h / (H / HKV)) * D + c];
                assert_close((double)out[i * D + c], sum, 1e-5, "out", i * D + c);
            }
        }
        if (s.second.recent < S && s.second.prompt < S) continue;
        s.second = (kvq_second_set){0, 0, 0}; // nothing is left of the first set: plain attention, to the bit
        backends[0]->attention(backends[0], &s, q, k2, v2, NULL, NULL, out2, scratch);
        ck_assert_mem_eq(out, out2, (size_t)nq * sizeof *out);
    }
    free(p);
}
END_TEST

// A forward call takes no more scratch than a backward call of the same window, as the header promises.
START_TEST(backward_scratch_is_enough_for_recent_keys) {
    open_backends();
    for (int64_t S = 1; S < 400; S += 3) {
        kvq_attention_shape s = {S, 4, 2, 8, 0, 1, 0, {0, 0, 0}}, recent = s;
        recent.second.recent = 7;
        ck_assert_int_le(backends[1]->attention_scratch_floats(backends[1], &recent, false),
                         backends[1]->attention_scratch_floats(backends[1], &s, true));
    }
}
END_TEST

START_TEST(attention_backward_equals_the_definition) {
    kvq_attention_shape s = shape_of(ATTENTION_CASES[_i]);
    int64_t             S = s.n_tokens, D = s.head_dim, H = s.n_heads, nq = S * H * D, nk = S * s.n_kv_heads * D;
    open_backends();
    float *q = randoms(nq, 23, 1), *k = randoms(nk, 24, 1), *v = randoms(nk, 25, 1), *dout = randoms(nq, 26, 1),
          *out = floats(nq);
    float *result[2][3];
    for (int b = 0; b < 2; b++) {
        for (int i = 0; i < 3; i++) result[b][i] = floats(i == 0 ? nq : nk);
        float *scratch = floats(backends[b]->attention_scratch_floats(backends[b], &s, true));
        backends[b]->attention(backends[b], &s, q, k, v, NULL, NULL, out, scratch);
        backends[b]->attention_backward(backends[b], &s, q, k, v, out, dout, result[b][0], result[b][1], result[b][2],
                                        scratch);
    }
    for (int i = 0; i < 3; i++)
        ck_assert_mem_eq(result[0][i], result[1][i], (size_t)(i == 0 ? nq : nk) * sizeof(float));

    double *dq = calloc((size_t)nq, sizeof *dq), *dk = calloc((size_t)nk, sizeof *dk),
           *dv = calloc((size_t)nk, sizeof *dv), *p = malloc((size_t)S * sizeof *p),
           *dp = malloc((size_t)S * sizeof *dp), *slope = malloc((size_t)S * sizeof *slope);
    for (int64_t i = 0; i < S; i++) {
        for (int64_t h = 0; h < H; h++) {
            int64_t kv = h / (H / s.n_kv_heads), qi = (i * H + h) * D;
            double  mean = 0;
            reference_row(&s, q, k, NULL, i, (int)h, p, slope);
            for (int64_t j = 0; j <= i; j++) {
                int64_t kj = (j * s.n_kv_heads + kv) * D;
                dp[j] = 0;
                for (int64_t c = 0; c < D; c++) {
                    dp[j] += (double)dout[qi + c] * (double)v[kj + c];
                    dv[kj + c] += p[j] * (double)dout[qi + c];
                }
                mean += p[j] * dp[j];
            }
            for (int64_t j = 0; j <= i; j++) {
                int64_t kj = (j * s.n_kv_heads + kv) * D;
                double  ds = p[j] * (dp[j] - mean) * (double)s.scale * slope[j];
                for (int64_t c = 0; c < D; c++) {
                    dq[qi + c] += ds * (double)k[kj + c];
                    dk[kj + c] += ds * (double)q[qi + c];
                }
            }
        }
    }
    // sums of up to 300 * group terms of size below 1, each good to about 1e-6 relative
    for (int64_t i = 0; i < nq; i++) assert_close((double)result[0][0][i], dq[i], 1e-5, "dq", i);
    for (int64_t i = 0; i < nk; i++) assert_close((double)result[0][1][i], dk[i], 3e-5, "dk", i);
    for (int64_t i = 0; i < nk; i++) assert_close((double)result[0][2][i], dv[i], 3e-5, "dv", i);
    free(dq), free(dk), free(dv), free(p), free(dp), free(slope);
}
END_TEST

// ---------------------------------------------------------------- experts

enum { ROUTE_M = 37, ROUTE_N = 19, ROUTE_E = 6, ROUTE_K = 3 };

static kvq_route route_of(bool normalize) {
    static int32_t expert[ROUTE_M * ROUTE_K];
    return (kvq_route){ROUTE_E, ROUTE_K, normalize, floats(ROUTE_M * ROUTE_E), expert, floats(ROUTE_M * ROUTE_K)};
}

// Weights of the chosen experts of one row in f64.
static void route_weights(const double *x, const float *w, const int32_t *chosen, bool normalize, double *p,
                          double *weight) {
    double all = 0, sum = 0;
    for (int e = 0; e < ROUTE_E; e++) {
        double z = 0;
        for (int i = 0; i < ROUTE_N; i++) z += x[i] * (double)w[e * ROUTE_N + i];
        all += p[e] = exp(z);
    }
    for (int j = 0; j < ROUTE_K; j++) sum += p[chosen[j]];
    for (int j = 0; j < ROUTE_K; j++) weight[j] = p[chosen[j]] / (normalize ? sum : all);
    for (int e = 0; e < ROUTE_E; e++) p[e] /= all;
}

// Logits are exact to f32's last unit (f64 sums of 19 products of size 1, rounded: 8 EPS at most), the softmax adds as
// much again.
START_TEST(routes_are_the_most_probable_experts) {
    bool normalize = _i == 1;
    open_backends();
    float    *x = randoms(ROUTE_M * ROUTE_N, 50, 1), *w = randoms(ROUTE_E * ROUTE_N, 51, 1);
    kvq_route r = route_of(normalize);
    backends[1]->route(backends[1], &r, x, w, ROUTE_M, ROUTE_N);
    for (int t = 0; t < ROUTE_M; t++) {
        const int32_t *chosen = r.expert + t * ROUTE_K;
        double         row[ROUTE_N], p[ROUTE_E], weight[ROUTE_K];
        for (int i = 0; i < ROUTE_N; i++) row[i] = (double)x[t * ROUTE_N + i];
        route_weights(row, w, chosen, normalize, p, weight);
        for (int e = 0; e < ROUTE_E; e++) {
            assert_close((double)r.probability[t * ROUTE_E + e], p[e], 16 * EPS, "probability", t * ROUTE_E + e);
            int n_better = 0;
            for (int i = 0; i < ROUTE_E; i++) n_better += p[i] > p[e];
            if (n_better < ROUTE_K) ck_assert_int_eq(chosen[n_better], e);
        }
        for (int j = 0; j < ROUTE_K; j++)
            assert_close((double)r.weight[t * ROUTE_K + j], weight[j], 16 * EPS, "weight", t * ROUTE_K + j);
    }
}
END_TEST

START_TEST(routes_break_ties_by_the_lower_index) {
    enum { E = 5 };
    open_backends();
    const float x = 1, w[E] = {1, 2, 1, 2, 1};
    float       probability[E], weight[3];
    int32_t     expert[3];
    kvq_route   r = {E, 3, true, probability, expert, weight};
    backends[0]->route(backends[0], &r, &x, w, 1, 1);
    ck_assert_int_eq(expert[0], 1);
    ck_assert_int_eq(expert[1], 3);
    ck_assert_int_eq(expert[2], 0);
    ck_assert(weight[0] == weight[1] && weight[2] < weight[1]);
}
END_TEST

// Central differences in f64 with the choice held (step 1e-4: truncation 1e-8), against sums of up to 6 terms in f32
// on top of what dx held.
START_TEST(router_gradient_equals_differences) {
    bool normalize = _i == 1;
    open_backends();
    float *x = randoms(ROUTE_M * ROUTE_N, 52, 1), *w = randoms(ROUTE_E * ROUTE_N, 53, 1),
          *dweight = randoms(ROUTE_M * ROUTE_K, 54, 1), *dx = floats(ROUTE_M * ROUTE_N);
    kvq_route r = route_of(normalize);
    for (int i = 0; i < ROUTE_M * ROUTE_N; i++) dx[i] = 1;
    backends[0]->route(backends[0], &r, x, w, ROUTE_M, ROUTE_N);
    backends[1]->route_backward(backends[1], &r, dweight, w, dx, ROUTE_M, ROUTE_N);
    for (int at = 0; at < ROUTE_M * ROUTE_N; at++) {
        int    t = at / ROUTE_N;
        double loss[2] = {0, 0};
        for (int side = 0; side < 2; side++) {
            double row[ROUTE_N], p[ROUTE_E], weight[ROUTE_K];
            for (int i = 0; i < ROUTE_N; i++) row[i] = (double)x[t * ROUTE_N + i];
            row[at % ROUTE_N] += side == 0 ? 1e-4 : -1e-4;
            route_weights(row, w, r.expert + t * ROUTE_K, normalize, p, weight);
            for (int j = 0; j < ROUTE_K; j++) loss[side] += weight[j] * (double)dweight[t * ROUTE_K + j];
        }
        assert_close((double)dx[at], 1 + (loss[0] - loss[1]) / 2e-4, 1e-6, "dx", at);
    }
}
END_TEST

START_TEST(rows_are_gathered_scattered_and_multiplied) {
    enum { M = 33, N = 21, ALL = 50 };
    open_backends();
    float *x = randoms(ALL * N, 55, 1), *y = floats(M * N), *sum = randoms(ALL * N, 56, 1), *before = floats(ALL * N),
          *scales = randoms(M, 57, 1), *dots = floats(M), *other = randoms(M * N, 58, 1);
    int32_t rows[M];
    for (int i = 0; i < M; i++) rows[i] = (i * 7 + 3) % ALL; // 7 and 50 have no common divisor: all different
    backends[1]->gather_rows(backends[1], x, rows, y, M, N);
    for (int i = 0; i < M; i++) ck_assert_mem_eq(y + i * N, x + rows[i] * N, N * sizeof *x);
    memcpy(before, sum, ALL * N * sizeof *sum);
    backends[1]->scatter_rows(backends[1], y, rows, scales, sum, M, N);
    for (int i = 0; i < M; i++) {
        for (int c = 0; c < N; c++) {
            before[rows[i] * N + c] += scales[i] * x[rows[i] * N + c];
        }
    }
    ck_assert_mem_eq(sum, before, ALL * N * sizeof *sum);
    backends[1]->row_dots(backends[1], y, other, dots, M, N);
    for (int i = 0; i < M; i++) {
        double expected = 0;
        for (int c = 0; c < N; c++) expected += (double)y[i * N + c] * (double)other[i * N + c];
        assert_close((double)dots[i], expected, EPS * fabs(expected) + 1e-14, "dot", i);
    }
}
END_TEST

// ---------------------------------------------------------------- losses

START_TEST(cross_entropy_and_its_gradient) {
    enum { M = 5, V = 1003 };
    open_backends();
    float  *logits = randoms(M * V, 30, 12), *gradient = floats(M * V);
    int32_t targets[M] = {0, 1002, 17, 500, 3};
    double  nll[M];
    memcpy(gradient, logits, M * V * sizeof *logits);
    backends[1]->cross_entropy(backends[1], gradient, targets, M, V, 0, 0.25, nll);
    for (int i = 0; i < M; i++) {
        long double sum = 0;
        for (int j = 0; j < V; j++) sum += expl((long double)logits[i * V + j]);
        double expected = (double)(logl(sum) - (long double)logits[i * V + targets[i]]), total = 0;
        assert_close(nll[i], expected, 1e-13 * V, "nll", i);
        for (int j = 0; j < V; j++) {
            double p = (double)(expl((long double)logits[i * V + j]) / sum);
            assert_close((double)gradient[i * V + j], 0.25 * (p - (j == targets[i] ? 1 : 0)), 0.25 * EPS + 1e-12,
                         "gradient", i * V + j);
            total += (double)gradient[i * V + j];
        }
        assert_close(total, 0, 1e-6, "sum of the gradient", i); // probabilities add to one
    }
    memcpy(gradient, logits, M * V * sizeof *logits);
    backends[0]->cross_entropy(backends[0], gradient, targets, M, V, 0, 0, nll);
    ck_assert_mem_eq(gradient, logits, M * V * sizeof *logits); // no scale: the logits stay
}
END_TEST

// With z = cap atanh(x / cap) behind the logits, the gradient with respect to z by central differences of the loss
// (step 1e-4: truncation 1e-8 of numbers of size 1).
START_TEST(cross_entropy_goes_through_the_cap) {
    enum { V = 7 };
    const double cap = 2, h = 1e-4;
    const double z[V] = {-3, -1, -0.1, 0, 0.4, 2, 5};
    float        logits[V];
    int32_t      target = 4;
    double       nll;
    open_backends();
    for (int i = 0; i < V; i++) logits[i] = (float)(cap * tanh(z[i] / cap));
    backends[0]->cross_entropy(backends[0], logits, &target, 1, V, (float)cap, 0.5, &nll);
    for (int i = 0; i < V; i++) {
        double loss[2];
        for (int side = 0; side < 2; side++) {
            double sum = 0, own = 0;
            for (int j = 0; j < V; j++) {
                double x = cap * tanh((z[j] + (j == i ? (side == 0 ? h : -h) : 0)) / cap);
                sum += exp(x);
                own = j == target ? x : own;
            }
            loss[side] = log(sum) - own;
        }
        assert_close((double)logits[i], 0.5 * (loss[0] - loss[1]) / (2 * h), 1e-7, "gradient", i);
    }
}
END_TEST

START_TEST(comparison_by_hand) {
    open_backends();
    // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL(p || q) = 1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2
    float              a[3] = {(float)log(2.0), 0, 0}, b[3] = {0, (float)log(2.0), 0};
    int32_t            target = 1;
    kvq_position_score score;
    backends[0]->compare(backends[0], a, b, &target, 1, 3, &score);
    assert_close(score.kl, 0.25 * log(2.0), 1e-7, "kl", 0);
    assert_close(score.nll_a, log(4.0), 1e-7, "nll a", 0);
    assert_close(score.nll_b, log(2.0), 1e-7, "nll b", 0);
    ck_assert_int_eq(score.top_a, 0);
    ck_assert_int_eq(score.top_b, 1);
    float equal[3] = {1, 1, 1};
    backends[0]->compare(backends[0], equal, equal, &target, 1, 3, &score);
    ck_assert(score.kl == 0);         // exactly: the same bits are compared
    ck_assert_int_eq(score.top_a, 0); // a tie goes to the lowest id
}
END_TEST

// The first five of a are 3, 0, 1, 2, 4 (5 has the same logit as 4, and a higher id), of b 6, 5, 4, 2, 3.
START_TEST(the_first_five_are_compared) {
    open_backends();
    float              a[7] = {2, 1, 1, 3, 0, 0, -9}, b[7] = {-9, -8, 1, 1, 2, 3, 4}, flat[3] = {1, 1, 1};
    int32_t            target = 0;
    double             sum = 0;
    kvq_position_score score;
    backends[0]->compare(backends[0], a, b, &target, 1, 7, &score);
    ck_assert_int_eq(score.top5_common, 3);
    for (int i = 0; i < 7; i++) sum += exp((double)a[i]);
    ck_assert_double_eq_tol(score.confidence_a, exp(3) / sum, 1e-14);
    backends[0]->compare(backends[0], flat, flat, &target, 1, 3, &score); // a vocabulary of three
    ck_assert_int_eq(score.top5_common, 3);
    ck_assert_double_eq_tol(score.confidence_a, 1.0 / 3, 1e-14);
}
END_TEST

START_TEST(sampling_inverts_the_cumulative_distribution) {
    open_backends();
    float   logits[4] = {-1e9f, (float)log(1.0), (float)log(2.0), (float)log(5.0)}; // 0, 1/8, 2/8, 5/8
    double  u[] = {0.0, 0.1249, 0.1251, 0.3749, 0.3751, 0.99999999};
    int32_t expected[] = {1, 1, 2, 2, 3, 3}, id;
    for (int i = 0; i < 6; i++) {
        backends[0]->sample(backends[0], logits, &u[i], 1, 4, &id);
        ck_assert_int_eq(id, expected[i]);
    }
}
END_TEST

START_TEST(nonfinite_values_are_found_wherever_they_are) {
    enum { N = 10001 };
    open_backends();
    float *x = randoms(N, 40, 1e30);
    ck_assert_int_eq(backends[0]->find_nonfinite(backends[0], x, N), -1);
    const int places[] = {0, 1, 4095, 4096, 8191, 10000};
    for (int i = 5; i >= 0; i--) {
        x[places[i]] = i % 2 == 0 ? NAN : -INFINITY;
        ck_assert_int_eq(backends[0]->find_nonfinite(backends[0], x, N), places[i]);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(exp_is_accurate_to_two_units),
    KVQ_CASE(tanh_is_accurate_to_three_units),
    KVQ_LOOP(linear_equals_the_plain_product, 6),
    KVQ_LOOP(linear_backward_is_the_transposed_product, 6),
    KVQ_CASE(rmsnorm_and_its_gradient),
    KVQ_CASE(rope_rotates_pairs_and_back),
    KVQ_LOOP(gated_activations_and_their_gradients_in_place, 2),
    KVQ_CASE(soft_caps_bound_without_moving_small_numbers),
    KVQ_LOOP(attention_equals_the_definition, N_ATTENTION_CASES),
    KVQ_LOOP(keys_come_from_the_second_set_where_it_says, N_RECENT_TOKENS),
    KVQ_CASE(backward_scratch_is_enough_for_recent_keys),
    KVQ_LOOP(attention_backward_equals_the_definition, N_ATTENTION_CASES),
    KVQ_LOOP(routes_are_the_most_probable_experts, 2),
    KVQ_CASE(routes_break_ties_by_the_lower_index),
    KVQ_LOOP(router_gradient_equals_differences, 2),
    KVQ_CASE(rows_are_gathered_scattered_and_multiplied),
    KVQ_CASE(cross_entropy_and_its_gradient),
    KVQ_CASE(cross_entropy_goes_through_the_cap),
    KVQ_CASE(comparison_by_hand),
    KVQ_CASE(the_first_five_are_compared),
    KVQ_CASE(sampling_inverts_the_cumulative_distribution),
    KVQ_CASE(nonfinite_values_are_found_wherever_they_are),
};
KVQ_TEST_MAIN("kernels", CASES)
