// SPDX-License-Identifier: Apache-2.0
//
// Datatypes that need no fit.
#include <math.h>

#include "kvq_codebook.h"

const char *const kvq_datatype_names[] = {"nuq", "nf", "int", "int-clamped", NULL};

// ---------------------------------------------------------------- NormalFloat

// The outermost probability on either side (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3): half a step of
// 16 levels and of 15, averaged; it stays that at every width.
#define NF_DELTA (0.5 * (1.0 / 32 + 1.0 / 30))

#define SQRT_HALF   0.70710678118654752440
#define SQRT_TWO_PI 2.50662827463100050242

// The x with P(X < x) = p of a normal variable, 0 < p <= 1/2. Begins with a rational function that is right to 4.5e-4
// (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23). Each of Halley's steps cubes an error of that
// size, so two reach the limit of f64 and the third is spare.
static double normal_quantile(double p) {
    double t = sqrt(-2 * log(p));
    double x = (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308))) - t;
    for (int i = 0; i < 3; i++) {
        double error = 0.5 * erfc(-x * SQRT_HALF) - p, newton = error * SQRT_TWO_PI * exp(x * x / 2);
        x -= newton / (1 + x * newton / 2);
    }
    return x;
}

// Half of a table: magnitude of level i of 1 .. n, whose probabilities go evenly from the middle to NF_DELTA.
static double nf_magnitude(int i, int n) {
    return normal_quantile(0.5 - i * (0.5 - NF_DELTA) / n) / normal_quantile(NF_DELTA);
}

// Zero, 2^(b-1) - 1 levels below it and 2^(b-1) above. One bit leaves none below; its levels are the two ends.
static void fill_nf(int bits, float *levels) {
    int n_above = 1 << (bits - 1), n_below = n_above - 1;
    for (int i = 1; i <= n_below; i++) levels[n_below - i] = (float)-nf_magnitude(i, n_below);
    levels[n_below] = n_below > 0 ? 0.0f : -1.0f;
    for (int i = 1; i <= n_above; i++) levels[n_below + i] = (float)nf_magnitude(i, n_above);
}

// ---------------------------------------------------------------- integers

// What is clamped, the zero point, moves with each range and so is the codec's concern; the levels are the same.
static void fill_int(int bits, float *levels) {
    int last = (1 << bits) - 1;
    for (int i = 0; i <= last; i++) levels[i] = (float)((double)(2 * i - last) / last); // exactly symmetric
}

kvq_status kvq_fixed_levels(kvq_datatype datatype, int bits, float *levels, kvq_error *err) {
    if (bits < 1 || bits > KVQ_MAX_BITS) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a table of %d bits; widths are 1 to %d", bits, KVQ_MAX_BITS);
    }
    switch (datatype) {
    case KVQ_NF:
        fill_nf(bits, levels);
        return KVQ_OK;
    case KVQ_INT:
    case KVQ_INT_CLAMPED:
        fill_int(bits, levels);
        return KVQ_OK;
    case KVQ_NUQ:
    case KVQ_N_DATATYPES:
        break;
    }
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "datatype '%s' has no levels before it is fitted",
                    datatype == KVQ_NUQ ? kvq_datatype_names[KVQ_NUQ] : "?");
}
