// SPDX-License-Identifier: Apache-2.0
//
// Rotary frequencies of the supported kinds and their cosine and sine tables. Angles are f64: an f32 angle at position
// 131072 is already wrong by 0.008.
#include <math.h>

#include "model_impl.h"

#define PI 3.14159265358979323846

static double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// Llama 3.1: long wavelengths are divided by the factor, short ones kept, a ramp in between.
static double llama3_frequency(const kvq_model_config *c, double f) {
    double turns = (double)c->rope.original_max_positions * f / (2 * PI);
    double keep = clamp((turns - c->rope.low_freq_factor) / (c->rope.high_freq_factor - c->rope.low_freq_factor), 0, 1);
    return (1 - keep) * f / c->rope.factor + keep * f;
}

// YaRN (Peng et al., arXiv 2309.00071): the channel pair at which `rotations` full turns fit into the original context.
static double yarn_pair(const kvq_model_config *c, double rotations) {
    return c->rope.n_dims * log((double)c->rope.original_max_positions / (rotations * 2 * PI)) /
           (2 * log(c->rope.theta));
}

static double yarn_frequency(const kvq_model_config *c, int pair, double f) {
    double low = fmax(floor(yarn_pair(c, c->rope.beta_fast)), 0);
    double high = fmin(ceil(yarn_pair(c, c->rope.beta_slow)), c->rope.n_dims - 1);
    double ramp = clamp((pair - low) / fmax(high - low, 0.001), 0, 1);
    return (1 - ramp) * f + ramp * f / c->rope.factor;
}

static double scaled_frequency(const kvq_model_config *c, int pair) {
    double f = pow(c->rope.theta, -2.0 * pair / c->rope.n_dims);
    if (c->rope.frequency_divisors != NULL) f /= (double)c->rope.frequency_divisors[pair];
    switch (c->rope.type) {
    case KVQ_ROPE_DEFAULT:
        return f;
    case KVQ_ROPE_LINEAR:
        return f / c->rope.factor;
    case KVQ_ROPE_LLAMA3:
        return llama3_frequency(c, f);
    case KVQ_ROPE_YARN:
        return yarn_frequency(c, pair, f);
    }
    return f;
}

static double amplitude(const kvq_model_config *c) {
    if (c->rope.type != KVQ_ROPE_YARN) return 1;
    if (c->rope.attention_factor > 0) return c->rope.attention_factor;
    return c->rope.factor > 1 ? 0.1 * log(c->rope.factor) + 1 : 1;
}

int kvq_rope_count(const kvq_model_config *c) { return c->local_rope_theta > 0 ? 2 : 1; }

int kvq_rope_of_layer(const kvq_model_config *c, int64_t layer) {
    return c->local_rope_theta > 0 && kvq_layer_window(c, layer) > 0 ? 1 : 0;
}

kvq_status kvq_rope_prepare(kvq_model *model, kvq_error *err) {
    const kvq_model_config *c = model->config;
    int                     half = c->rope.n_dims / 2;
    kvq_status              status = KVQ_OK;
    for (int i = 0; i < kvq_rope_count(c); i++)
        KVQ_TRY(KVQ_NEW(model->ctx, half, "rotary frequencies", &model->rope[i].frequency, err));
    model->rope[0].amplitude = amplitude(c);
    model->rope[1].amplitude = 1; // sliding layers are never scaled
    for (int pair = 0; pair < half; pair++) {
        model->rope[0].frequency[pair] = scaled_frequency(c, pair);
        if (kvq_rope_count(c) == 1) continue;
        model->rope[1].frequency[pair] = pow(c->local_rope_theta, -2.0 * pair / c->rope.n_dims);
    }

done:
    return status;
}

void kvq_rope_fill(const kvq_model *model, int which, int64_t first, int64_t n, float *cos_table, float *sin_table) {
    const rope_frequencies *rope = &model->rope[which];
    int                     half = model->config->rope.n_dims / 2;
    for (int64_t t = 0; t < n; t++) {
        for (int pair = 0; pair < half; pair++) {
            double angle = (double)(first + t) * rope->frequency[pair];
            cos_table[t * half + pair] = (float)(cos(angle) * rope->amplitude);
            sin_table[t * half + pair] = (float)(sin(angle) * rope->amplitude);
        }
    }
}
