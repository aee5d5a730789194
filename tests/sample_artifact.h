// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: a small artifact with a different, awkward value in every field, so that a field which is lost
// or swapped on the way through a file shows.
#ifndef SAMPLE_ARTIFACT_H
#define SAMPLE_ARTIFACT_H

#include <float.h>
#include <stdlib.h>

#include "kvq_io.h"

#define SAMPLE_HEADS    2
#define SAMPLE_HEAD_DIM 6
#define SAMPLE_D        (SAMPLE_HEADS * SAMPLE_HEAD_DIM)

// Not Check's assertions: those work inside of its tests only, and the artifact is also made outside.
static inline void sample_require(kvq_status status) {
    if (status != KVQ_OK) abort();
}

static inline float *sample_floats(const kvq_context *ctx, int64_t n, uint32_t stream, double low, double step) {
    float    *x = NULL;
    kvq_error err = {0};
    sample_require(KVQ_NEW(ctx, n, "sample", &x, &err));
    for (int64_t i = 0; i < n; i++) {
        double u = kvq_rng_uniform(5, KVQ_RNG_TEST, stream, (uint64_t)i);
        x[i] = (float)(low + step * ((double)i + u));
    }
    return x;
}

static inline void sample_tensor(const kvq_context *ctx, kvq_tensor_quant *t, int bits, kvq_axis axis,
                                 uint32_t stream) {
    t->bits = bits;
    t->axis = axis;
    t->n_groups = t->dim = 1;
    t->n_levels = 1 << bits;
    t->codebook = sample_floats(ctx, t->n_levels, stream, -1, 2.0 / t->n_levels);
    if (axis == KVQ_AXIS_CHANNEL) {
        t->lower = sample_floats(ctx, SAMPLE_D, stream + 1, -3, 0.01);
        t->upper = sample_floats(ctx, SAMPLE_D, stream + 2, 0.5, 0.3);
    }
    t->fit = (kvq_fit_report){1000 + stream, 20 + stream, 3 + stream, 1.0 / 3 + stream, 77.7, 1e-300, 0.1};
}

// n_layers layers of 2 KV heads; 3 bits for K, 2 for V, one more in the first layer.
static inline kvq_artifact *sample_artifact(const kvq_context *ctx, int64_t n_layers) {
    kvq_artifact *a = NULL;
    kvq_error     err = {0};
    sample_require(kvq_artifact_create(ctx, n_layers, &a, &err));
    struct {
        char      **field;
        const char *text;
    } texts[] = {
        {&a->model.architecture, "llama"},
        {&a->model.name, "kleines Modell \xc3\xa4\xe2\x82\xac"},
        {&a->model.rope_type, "llama3"},
        {&a->model.dtype, "BF16"},
        {&a->tokenizer.kind, "bpe-bytelevel"},
        {&a->dataset.source, "a \"quoted\"\tname.txt"},
        {&a->quantizer.scheme, "nuq"},
        {&a->provenance.producer_version, KVQ_VERSION},
        {&a->provenance.matmul, "cblas"},
        {&a->provenance.options_json, "{\"bits\": 3, \"weighting\": \"fisher-scaled\"}"}, // cpu stays ""
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        sample_require(kvq_artifact_set_text(ctx, texts[i].field, texts[i].text, &err));
    }
    sample_require(kvq_sha256_of("config", 6, a->model.config_sha256, &err));
    sample_require(kvq_sha256_of("weights", 7, a->model.weights_sha256, &err));
    sample_require(kvq_sha256_of("tokenizer", 9, a->tokenizer.sha256, &err));
    sample_require(kvq_sha256_of("ids", 3, a->dataset.token_ids_sha256, &err)); // source_sha256 stays ""
    a->model.hidden_size = 48;
    a->model.n_heads = 4;
    a->model.n_kv_heads = SAMPLE_HEADS;
    a->model.head_dim = SAMPLE_HEAD_DIM;
    a->model.vocab_size = 512;
    a->model.rope_theta = 500000.1;
    a->model.n_tensors = 39;
    a->tokenizer.bos_added = true;
    a->dataset.n_available_tokens = (int64_t)1 << 40;
    a->dataset.n_samples = 16;
    a->dataset.seq_len = 2048;
    a->dataset.seed = UINT64_MAX - 7; // needs all 64 bits
    a->quantizer.outlier_fraction = 0.01;
    a->quantizer.n_side_k = 1;
    a->quantizer.n_side_v = 2;
    a->quantizer.sink_tokens = 5;
    a->quantizer.weighting = KVQ_WEIGHT_FISHER_SCALED;
    a->baseline_nll = 2.0 / 3;
    for (int64_t layer = 0; layer < n_layers; layer++) {
        uint32_t stream = (uint32_t)(10 * layer);
        sample_tensor(ctx, &a->layers[layer].k, layer == 0 ? 4 : 3, KVQ_AXIS_CHANNEL, stream);
        sample_tensor(ctx, &a->layers[layer].v, layer == 0 ? 3 : 2, KVQ_AXIS_TOKEN, stream + 5);
    }
    a->layers[0].k.codebook[8] = a->layers[0].k.codebook[7]; // levels may repeat
    a->layers[0].k.lower[0] = -FLT_MAX;
    a->layers[0].k.lower[1] = a->layers[0].k.upper[1] = -0.0f; // a constant channel
    a->layers[0].k.upper[2] = FLT_TRUE_MIN;
    a->layers[0].k.lower[2] = -FLT_MIN;
    return a;
}

#endif
