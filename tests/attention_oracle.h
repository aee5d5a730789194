// SPDX-License-Identifier: Apache-2.0
//
// Decode attention in f64 with exact angles, and how far the exact-mode kernel (kernels/cuda/attention.cu) may be from
// it. The bound is derived, not measured. u = 2^-24 is the largest relative error of one rounded operation.
//
// Keys. What the kernel decodes is bit for bit what the CPU decodes. Cosine and sine have an absolute error of 4 u A
// (kernels/cuda/rope.cuh; A the amplitude), a rotated channel a c - b s has two products and a difference more: its
// error is at most (|a| + |b|) A (4 u + 2 u). The dot product of D terms in order, with q rounded once when it is
// scaled, has an error of (D + 1) u sum |q_i k_i|. Together, times the scale, this is e_t for the score x_t. A cap adds
// |x| u of the division (the slope of tanh is at most 1), 6 u |x'| of tanh and u |x'| of the product.
//
// Weights. A token's weight is exp(x_t - m1) exp(m1 - m2) .. exp(mk - m), m the final maximum of all splits. The
// differences telescope, so their roundings together are u (m - x_t); each exp has 4 u. The relative error of the
// weight, common to the sum of weights and to the sum of values, is
//     rho_t = expm1(e_t + u (m - x_t + 2 max e)) + 4 u E,     E = C + 2 exps
// with C chunks in a split (a rescaling by exp(0) = 1 is exact, but we count all). Since weights enter as a ratio, the
// output moves by at most sum_t p_t rho_t (|v_t| + |out|) / (1 - sum_t p_t rho_t).
//
// Sums. A term of the sum of values passes through 1 product, 32 additions in its chunk, 2 roundings (rescale, add) for
// every chunk, and a factor and S additions in the combination of S splits:
//     (34 + 2 C + S) u sum_t p_t |v_t|; that of weights, through 5 levels of shuffles: (6 + 2 C + S) u |out|.
// The division at the end is u |out|.
//
// Values in tiles are summed in the rotated space: a product with the scale, and a rotation back (D + 2 roundings); and
// the CPU, whose decoded values the oracle starts from, rotated each with D + 1. R is orthogonal, so sum_i |R_ij| |y_i|
// is at most |y| = |v_t|, the norm over the head, which replaces |v_tj| above; (2 D + 4) u is added to the factor.
//
// exp ends at exp(-87) = 1.6e-38, not at 0, which adds at most n 2e-38 max |v|. All is multiplied by 1.01 for terms in
// u^2, of which the largest is (D u)^2.
#ifndef ATTENTION_ORACLE_H
#define ATTENTION_ORACLE_H

#include <math.h>

#include <vector>

struct Query {
    int                 n_heads, n_kv_heads, head_dim;
    float               scale, softcap;
    int64_t             window;
    int                 n_pairs;
    double              amplitude;
    std::vector<double> frequency; // [n_pairs]
};

// One sequence: decoded keys and values [length, d], and which values were coded in a tile.
struct Tokens {
    int64_t              length;
    const float         *k, *v;
    std::vector<uint8_t> rotated; // [length]
};

struct Answer {
    std::vector<double> out, bound; // [n_heads, head_dim]
};

static const double ROUNDING = 5.9604644775390625e-08; // u

// A score and how wrong the kernel's may be.
struct Score {
    double value, error;
};

static inline Score exact_score(const Query &a, const float *q, const float *k, int64_t position) {
    double sum = 0, products = 0, turned = 0;
    for (int i = 0; i < a.head_dim; i++) {
        double key = (double)k[i];
        if (i < 2 * a.n_pairs) {
            int    pair = i % a.n_pairs;
            double angle = (double)position * a.frequency[(size_t)pair];
            double x = (double)k[pair], y = (double)k[pair + a.n_pairs], c = cos(angle), s = sin(angle);
            key = (i < a.n_pairs ? x * c - y * s : y * c + x * s) * a.amplitude;
            turned += fabs((double)q[i]) * (fabs(x) + fabs(y)) * a.amplitude;
        }
        sum += (double)q[i] * key;
        products += fabs((double)q[i] * key);
    }
    double x = sum * (double)a.scale;
    double e = fabs((double)a.scale) * ROUNDING * (6 * turned + (a.head_dim + 1) * products);
    if (!(a.softcap > 0)) return {x, e};
    double capped = (double)a.softcap * tanh(x / (double)a.softcap);
    return {capped, e + ROUNDING * (fabs(x) + 7 * fabs(capped))};
}

static inline double norm_of(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

// Output and bound of one head; scores of tokens [first, length), v their values of the KV head, `stride` apart.
static inline void exact_head(const Query &a, const Tokens &tokens, int64_t first, const std::vector<Score> &scores,
                              const float *v, int64_t stride, int n_splits, double *out, double *bound) {
    const double u = ROUNDING;
    double       m = -HUGE_VAL, worst = 0, total = 0, moved = 0;
    int64_t      n_chunks = (tokens.length + 31) / 32 - first / 32, per_split = (n_chunks + n_splits - 1) / n_splits;
    for (const Score &s : scores) m = fmax(m, s.value), worst = fmax(worst, s.error);
    std::vector<double> p, rho;
    for (const Score &s : scores) {
        p.push_back(exp(s.value - m));
        rho.push_back(expm1(s.error + u * (m - s.value + 2 * worst)) + 4 * u * (double)(per_split + 2));
        total += p.back();
    }
    for (size_t t = 0; t < p.size(); t++) p[t] /= total, moved += p[t] * rho[t];
    double of_values = u * (double)(34 + 2 * per_split + n_splits),
           of_weights = u * (double)(7 + 2 * per_split + n_splits);
    for (int j = 0; j < a.head_dim; j++) {
        double sum = 0, error = 0, largest = 0;
        for (size_t t = 0; t < p.size(); t++) sum += p[t] * (double)v[(first + (int64_t)t) * stride + j];
        for (size_t t = 0; t < p.size(); t++) {
            const float *x = v + (first + (int64_t)t) * stride;
            bool         rotated = tokens.rotated[(size_t)first + t] != 0;
            double       size = rotated ? norm_of(x, a.head_dim) : fabs((double)x[j]);
            double       sums = of_values + (rotated ? (2 * a.head_dim + 4) * u : 0);
            error += p[t] * (rho[t] / (1 - moved) * (fabs((double)x[j]) + fabs(sum)) + sums * size);
            largest = fmax(largest, size);
        }
        out[j] = sum;
        bound[j] = 1.01 * (error + of_weights * fabs(sum)) + (double)p.size() * 2e-38 * largest;
    }
}

// q [n_heads, head_dim]
static inline Answer exact_attention(const Query &a, const Tokens &tokens, const float *q, int n_splits) {
    size_t  size = (size_t)(a.n_heads * a.head_dim);
    Answer  answer = {std::vector<double>(size, 0.0), std::vector<double>(size, 0.0)};
    int64_t d = (int64_t)a.n_kv_heads * a.head_dim;
    int64_t first = a.window > 0 && tokens.length > a.window ? tokens.length - a.window : 0;
    for (int h = 0; h < a.n_heads && tokens.length > 0; h++) {
        std::vector<Score> scores;
        int64_t            at = (int64_t)(h / (a.n_heads / a.n_kv_heads)) * a.head_dim;
        for (int64_t t = first; t < tokens.length; t++)
            scores.push_back(exact_score(a, q + h * a.head_dim, tokens.k + t * d + at, t));
        exact_head(a, tokens, first, scores, tokens.v + at, d, n_splits, answer.out.data() + h * a.head_dim,
                   answer.bound.data() + h * a.head_dim);
    }
    return answer;
}

#endif
