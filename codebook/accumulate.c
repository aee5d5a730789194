// SPDX-License-Identifier: Apache-2.0
//
// Adding elements to a histogram. What costs most is not the adding but the way from f64 to fixed point and the many
// sums (for each weighting two of a bin and two of all elements). So elements are taken by the chunk: conversions
// become loops that compilers vectorise, the sums of all elements are added up in limbs of 32 bits without carries, and
// only the bins are touched one by one. Fixed point makes that the same bits as one element after the other.
#include <math.h>
#include <string.h>

#include "codebook_impl.h"

#define CHUNK        CODEBOOK_CHUNK
#define WEIGHT_LIMIT 0x1p15 // a bin then holds 2^16 of the largest weights

// ---------------------------------------------------------------- fixed point by the chunk

void codebook_to_fixed(const double *x, int n, uint64_t *lo, uint64_t *hi) {
    for (int i = 0; i < n; i++) {
        double   scaled = x[i] * 0x1p32;
        uint64_t whole = (uint64_t)scaled;
        lo[i] = (uint64_t)((scaled - (double)whole) * 0x1p64);
        hi[i] = whole;
    }
}

void codebook_to_signed_fixed(const double *x, int n, uint64_t *lo, uint64_t *hi) {
    for (int i = 0; i < n; i++) {
        double   scaled = fabs(x[i]) * 0x1p32;
        uint64_t whole = (uint64_t)scaled, part = (uint64_t)((scaled - (double)whole) * 0x1p64);
        uint64_t flip = x[i] < 0 ? UINT64_MAX : 0, negated = (part ^ flip) - flip;
        lo[i] = negated;
        hi[i] = (whole ^ flip) + (negated == 0 ? flip & 1u : 0);
    }
}

void codebook_add_sum(kvq_fixed *sum, const double *x, int n) {
    uint64_t limbs[4] = {0}, lo[CHUNK], hi[CHUNK];
    int      n_fit = 0;
    for (int i = 0; i < n; i++) n_fit += x[i] < 0x1p31;
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
        codebook_add_positive(sum, (kvq_fixed){limbs[1] << 32 | (limbs[0] & UINT32_MAX),
                                               (int64_t)(limbs[3] << 32 | (limbs[2] & UINT32_MAX))});
}

// ---------------------------------------------------------------- elements

// Clips to [-1, 1] by the bits, whose order is that of magnitudes: with comparisons of floats the loop would not
// vectorise, since they may trap. x * 2^12 is exact in f32, and so is what floor leaves of it.
static void find_bins(codebook_chunk *c, const float *x) {
    static const float ONE = 1;
    uint32_t           one, bits[CHUNK];
    float              clipped[CHUNK];
    memcpy(&one, &ONE, sizeof one);
    memcpy(bits, x, (size_t)c->n * sizeof *x);
    for (int i = 0; i < c->n; i++) {
        uint32_t magnitude = bits[i] & INT32_MAX, sign = bits[i] & ~(uint32_t)INT32_MAX;
        bits[i] = sign | (magnitude < one ? magnitude : one);
    }
    memcpy(clipped, bits, (size_t)c->n * sizeof *x);
    for (int i = 0; i < c->n; i++) {
        int bin = (int)floorf(clipped[i] * (KVQ_HISTOGRAM_BINS / 2)) + KVQ_HISTOGRAM_BINS / 2;
        c->bin[i] = bin < KVQ_HISTOGRAM_BINS ? bin : KVQ_HISTOGRAM_BINS - 1;
        c->x[i] = (double)clipped[i];
    }
}

static void add_to_bins(codebook_chunk *c, kvq_bin *bins) {
    codebook_to_fixed(c->w, c->n, c->w_lo, c->w_hi);
    codebook_to_signed_fixed(c->wx, c->n, c->wx_lo, c->wx_hi);
    for (int i = 0; i < c->n; i++) {
        kvq_bin  *bin = &bins[c->bin[i]];
        kvq_fixed wx = {c->wx_lo[i], (int64_t)c->wx_hi[i]};
        codebook_add_positive(&bin->w, (kvq_fixed){c->w_lo[i], (int64_t)c->w_hi[i]});
        kvq_fixed_merge(&bin->wx, wx);
    }
}

// Squares of small weights are added by themselves, scaled; a chunk rarely has both kinds.
static void add_squared_weights(codebook_chunk *c, kvq_weight_sums *sums) {
    int n_small = 0;
    for (int i = 0; i < c->n; i++) n_small += c->w[i] < CODEBOOK_SMALL_WEIGHT;
    if (n_small < c->n) {
        for (int i = 0; i < c->n; i++) c->square[i] = c->w[i] < CODEBOOK_SMALL_WEIGHT ? 0 : c->w[i] * c->w[i];
        codebook_add_sum(&sums->w2_large, c->square, c->n);
    }
    if (n_small > 0) {
        for (int i = 0; i < c->n; i++)
            c->square[i] = c->w[i] < CODEBOOK_SMALL_WEIGHT ? c->w[i] * c->w[i] / CODEBOOK_SMALL_SQUARE_UNIT : 0;
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
            if (h->by[w].bins != NULL) add_weighted(&c, &h->by[w], of_chunk, codebook_weight_unit((kvq_weighting)w));
        }
    }
    h->counts.n_points += n;
}

// ---------------------------------------------------------------- what else is counted

bool histogram_weight_fits(kvq_weighting by, double weight) { return weight * codebook_weight_unit(by) < WEIGHT_LIMIT; }

void histogram_add_energy(kvq_histogram *h, const float *x, int64_t n) {
    double squares[CHUNK];
    for (int64_t first = 0; first < n; first += CHUNK) {
        int count = n - first < CHUNK ? (int)(n - first) : CHUNK;
        for (int i = 0; i < count; i++) squares[i] = (double)x[first + i] * (double)x[first + i] * CODEBOOK_SQUARE_UNIT;
        codebook_add_sum(&h->energy, squares, count);
    }
}

void histogram_add_beyond(kvq_histogram *h, bool above, double beyond, double r2) {
    double linear = beyond * r2 * CODEBOOK_SQUARE_UNIT, square = beyond * beyond * r2 * CODEBOOK_SQUARE_UNIT;
    codebook_add_sum(&h->beyond[above], &linear, 1);
    codebook_add_sum(&h->beyond_squared, &square, 1);
}
