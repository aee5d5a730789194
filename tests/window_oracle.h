// SPDX-License-Identifier: Apache-2.0
//
// Causal attention over keys and values in f32, by its definition in f64, and how far one in f32 may be from it.
//
// Tolerances follow the error through the formulas, to first order in EPS = 2^-24, the unit roundoff of f32; a sum of n
// products in f32 errs by at most n EPS sum |a b|, whatever its order (Higham, Accuracy and Stability, section 3.1).
// With n visible keys in T <= n tiles, j and k keys, c channels:
//   score     e_j = (D + 2) EPS scale sum_c |q_c k_c|, and 8 EPS |score| more where it is capped (tanh: 6, and its
//             quotient and product; the derivative of the cap is at most 1)
//   p_j       r_j = e_j + EPS |score - maximum| + 4 EPS (exp) relative in the numerator, at most R = max r_j in the
//             denominator, with n + 2 T roundings of its sum: P = 2 R + (3 n + 6) EPS
//   out_c     P + n EPS, times sum_j p_j |v_jc|; scaling by another maximum is in the numerator and the denominator
// The device must be within that of the definition, and within twice that of the CPU, which is as far away.
#ifndef WINDOW_ORACLE_H
#define WINDOW_ORACLE_H

#include <math.h>

#include "cuda_ops_rig.h"

static const double EPS = 0x1p-24;

typedef std::vector<double> Doubles;

// The same words as the header: reads from the second set.
static inline bool reads_second(const kvq_second_set &s, int64_t i, int64_t j) {
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

static inline double product(const float *a, const float *b, int D, double *magnitude) {
    double sum = 0;
    *magnitude = 0;
    for (int c = 0; c < D; c++) {
        sum += (double)a[c] * (double)b[c];
        *magnitude += fabs((double)a[c] * (double)b[c]);
    }
    return sum;
}

// q: the channels of this head of query i
static inline seen_row see(const kvq_attention_shape &s, const float *q, const float *k, const float *k2, int64_t i,
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
            score = product(q, (reads_second(s.second, i, j) ? k2 : k) + (j * s.n_kv_heads + kv) * D, D, &magnitude);
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

// A row of the output, of query i and a head, at [at] of `out`.
static inline void add_row_output(const kvq_attention_shape &s, const float *q, const float *k, const float *v,
                                  const float *k2, const float *v2, int64_t i, int head, size_t at, bounded *out) {
    int      D = s.head_dim;
    seen_row row = see(s, q, k, k2, i, head);
    double   n = (double)(i + 1 - row.from);
    for (int64_t j = row.from; j <= i; j++) {
        const float *value =
            (reads_second(s.second, i, j) ? v2 : v) + (j * s.n_kv_heads + head / (s.n_heads / s.n_kv_heads)) * D;
        for (int c = 0; c < D; c++) {
            double term = row.p[(size_t)j] * (double)value[c];
            out->add(at + (size_t)c, term, (row.P + n * EPS) * fabs(term));
        }
    }
}

static double worst; // error as a part of what is allowed

static inline void within(const Floats &value, const bounded &expected, const Floats &of_cpu, const char *what) {
    for (size_t i = 0; i < value.size(); i++) {
        double error = fabs((double)value[i] - expected.value[i]);
        ck_assert_msg(error <= expected.error[i], "%s[%zu]: %.9g instead of %.9g, error %.3g of %.3g", what, i,
                      (double)value[i], expected.value[i], error, expected.error[i]);
        ck_assert_msg(fabs((double)value[i] - (double)of_cpu[i]) <= 2 * expected.error[i],
                      "%s[%zu]: %.9g, on the CPU %.9g", what, i, (double)value[i], (double)of_cpu[i]);
        if (expected.error[i] > 0) worst = fmax(worst, error / expected.error[i]);
    }
}

#endif
