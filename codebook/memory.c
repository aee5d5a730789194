// SPDX-License-Identifier: Apache-2.0
//
// Memory of long contexts, as this project counts it and as it is published.
#include "kvq_codebook.h"

const kvq_memory_length kvq_memory_lengths[KVQ_N_MEMORY_LENGTHS] = {
    {"32K", 1 << 15}, {"128K", 1 << 17}, {"1M", 1 << 20}, {"10M", 10000000}};

static bool formula_applies(const kvq_artifact *a) {
    if (kvq_artifact_is_allocated(a)) return false;
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        if (a->layers[layer].k.axis != KVQ_AXIS_CHANNEL || a->layers[layer].v.axis != KVQ_AXIS_TOKEN) return false;
    }
    return true;
}

// In the form of its authors, and not simplified: 32 f is the 0.01 * (16 + 16) of their 1 %.
static double formula_bytes(const kvq_artifact *a, int64_t n_tokens) {
    double d = (double)(a->model.n_kv_heads * a->model.head_dim), f = a->quantizer.outlier_fraction, bits = 0;
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        double b = (a->layers[layer].k.bits + a->layers[layer].v.bits) / 2.0;
        bits += b + 16 / d + (f > 0 ? 32 * f + 16 / d : 0);
    }
    return (double)n_tokens * 2 * d * bits / 8;
}

kvq_memory kvq_artifact_memory(const kvq_artifact *artifact, int64_t n_tokens) {
    kvq_cache_size size = kvq_artifact_cache_size(artifact, n_tokens);
    return (kvq_memory){.n_tokens = n_tokens,
                        .fp16_bytes = 2.0 * (double)size.n_elements,
                        .bytes = (double)(size.row_bytes + size.exact_bytes + size.tables_bytes),
                        .formula_bytes = formula_applies(artifact) ? formula_bytes(artifact, n_tokens) : 0};
}
