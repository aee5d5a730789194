// SPDX-License-Identifier: Apache-2.0
//
// Adding elements to a histogram. What costs most is not the adding but the way from f64 to fixed point and the many
// sums (for each weighting two of a bin and two of all elements). So elements are taken by the chunk: conversions
// become loops that compilers vectorise, the sums of all elements are added up in limbs of 32 bits without carries, and
// only the bins are touched one by one. Fixed point makes that the same bits as one element after the other.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define CHUNK CODEBOOK_CHUNK

// ---------------------------------------------------------------- fixed point by the chunk

void codebook_to_fixed(const double *x, int n, uint64_t *lo, uint64_t *hi) {
    for (int i = 0; i < n; i++) {
        kvq_fixed fixed = kvq_fixed_of_positive(x[i]);
        lo[i] = fixed.lo;
        hi[i] = (uint64_t)fixed.hi;
    }
}

void codebook_to_signed_fixed(const double *x, int n, uint64_t *lo, uint64_t *hi) {
    for (int i = 0; i < n; i++) {
        kvq_fixed fixed = kvq_fixed_of(x[i]);
        lo[i] = fixed.lo;
        hi[i] = (uint64_t)fixed.hi;
    }
}

void codebook_add_sum(kvq_fixed *sum, const double *x, int n) {
    uint64_t limbs[4] = {0}, lo[CHUNK], hi[CHUNK];
    int      n_fit = 0;
    for (int i = 0; i < n; i++) n_fit += x[i] < KVQ_FIXED_LIMIT;
    if (n_fit < n) sum->hi = INT64_MIN;
    if (n_fit < n) return;
    codebook_to_fixed(x, n, lo, hi);
    for (int i = 0; i < n; i++) {
        limbs[0] += lo[i] & UINT32_MAX;
        limbs[1] += lo[i] >> 32;
        limbs[2] += hi[i] & UINT32_MAX;
        limbs[3] += hi[i] >> 32;
    }
    for (int i = 0; i < 3; i++) limbs[i + 1] += limbs[i] >> 32;
    if (limbs[3] > INT32_MAX)
        sum->hi = INT64_MIN;
    else
        kvq_fixed_merge_positive(sum, (kvq_fixed){limbs[1] << 32 | (limbs[0] & UINT32_MAX),
                                                  (int64_t)(limbs[3] << 32 | (limbs[2] & UINT32_MAX))});
}

// ---------------------------------------------------------------- elements

static void find_bins(codebook_chunk *c, const float *x) {
    for (int i = 0; i < c->n; i++) {
        float clipped = kvq_count_clip(x[i]);
        c->bin[i] = kvq_count_bin(clipped);
        c->x[i] = (double)clipped;
    }
}

static void add_to_bins(codebook_chunk *c, kvq_bin *bins) {
    codebook_to_fixed(c->w, c->n, c->w_lo, c->w_hi);
    codebook_to_signed_fixed(c->wx, c->n, c->wx_lo, c->wx_hi);
    for (int i = 0; i < c->n; i++) {
        kvq_bin  *bin = &bins[c->bin[i]];
        kvq_fixed wx = {c->wx_lo[i], (int64_t)c->wx_hi[i]};
        kvq_fixed_merge_positive(&bin->w, (kvq_fixed){c->w_lo[i], (int64_t)c->w_hi[i]});
        kvq_fixed_merge(&bin->wx, wx);
    }
}

// A chunk rarely has both kinds of weights.
static void add_squared_weights(codebook_chunk *c, kvq_weight_sums *sums) {
    int n_small = 0;
    for (int i = 0; i < c->n; i++) n_small += c->w[i] < KVQ_COUNT_SMALL_WEIGHT;
    if (n_small < c->n) {
        for (int i = 0; i < c->n; i++) c->square[i] = kvq_count_large_square(c->w[i]);
        codebook_add_sum(&sums->w2_large, c->square, c->n);
    }
    if (n_small > 0) {
        for (int i = 0; i < c->n; i++) c->square[i] = kvq_count_small_square(c->w[i]);
        codebook_add_sum(&sums->w2_small, c->square, c->n);
    }
}

void codebook_add_chunk(codebook_chunk *c, kvq_bin *bins, kvq_fixed *wxx) {
    for (int i = 0; i < c->n; i++) c->wx[i] = c->w[i] * c->x[i];
    add_to_bins(c, bins);
    for (int i = 0; i < c->n; i++) c->square[i] = c->wx[i] * c->x[i];
    codebook_add_sum(wxx, c->square, c->n);
}

// weights NULL: 1 for each.
static void add_weighted(codebook_chunk *c, kvq_weight_sums *sums, const double *weights, double unit) {
    for (int i = 0; i < c->n; i++) c->w[i] = weights != NULL ? weights[i] * unit : unit;
    codebook_add_chunk(c, sums->bins, &sums->wxx);
    add_squared_weights(c, sums);
}

void kvq_histogram_add(kvq_histogram *h, const float *x, const double *const weights[KVQ_N_WEIGHTINGS], int64_t n) {
    codebook_chunk c;
    for (int64_t first = 0; first < n; first += CHUNK) {
        c.n = n - first < CHUNK ? (int)(n - first) : CHUNK;
        find_bins(&c, x + first);
        for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
            const double *of_chunk = weights[w] != NULL ? weights[w] + first : NULL;
            if (h->by[w].bins != NULL) add_weighted(&c, &h->by[w], of_chunk, kvq_count_unit((kvq_weighting)w));
        }
    }
    h->counts.n_points += n;
}

// ---------------------------------------------------------------- what else is counted

void histogram_add_energy(kvq_histogram *h, const float *x, int64_t n) {
    double squares[CHUNK];
    for (int64_t first = 0; first < n; first += CHUNK) {
        int count = n - first < CHUNK ? (int)(n - first) : CHUNK;
        for (int i = 0; i < count; i++) squares[i] = kvq_count_energy(x[first + i]);
        codebook_add_sum(&h->energy, squares, count);
    }
}
