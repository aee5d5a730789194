// SPDX-License-Identifier: Apache-2.0
//
// The activations of gated MLPs with their derivatives, one number at a time: the one definition of what the CPU and a
// device compute, so that both give the same bits.
#ifndef KVQ_GATE_HD_H
#define KVQ_GATE_HD_H

#include "kvq_exp_hd.h"

// s = sigmoid(x), and *rest = 1 - s without its cancellation. exp's argument is bounded so that it neither overflows
// nor leaves its domain; the sigmoid is exact to f32 beyond.
KVQ_HD float kvq_sigmoid_f32(float x, float *rest) {
    float e = kvq_exp_f32(x < -80.0f ? 80.0f : -x), s = 1.0f / (1.0f + e);
    *rest = e * s;
    return s;
}

// silu(g) = g s, silu'(g) = s + g s (1 - s), s = sigmoid(g)
KVQ_HD float kvq_silu_f32(float g, float *slope) {
    float rest, s = kvq_sigmoid_f32(g, &rest);
    *slope = s + g * s * rest;
    return g * s;
}

// (1 + tanh u) / 2 = sigmoid(2 u), which does not cancel for negative u. With 2 u = g (c + d g^2):
// gelu'(g) = s + g s (1 - s) (c + 3 d g^2). Beyond |g| = 16 the sigmoid is 0 or 1 to f32, and the bound keeps g^2
// finite.
KVQ_HD float kvq_gelu_tanh_f32(float g, float *slope) {
    const float c = 1.59576912f, d = 0.0713548163f; // 2 sqrt(2 / pi), 0.044715 times that
    float       bounded = g < -16.0f ? -16.0f : g > 16.0f ? 16.0f : g;
    float       square = bounded * bounded, rest, s = kvq_sigmoid_f32(bounded * (c + d * square), &rest);
    *slope = s + bounded * s * rest * (c + 3.0f * d * square);
    return g * s;
}

#endif
