// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: a small artifact with a different, awkward value in every field, so that a field which is lost
// or swapped on the way through a file shows.
#ifndef SAMPLE_ARTIFACT_H
#define SAMPLE_ARTIFACT_H

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_io.h"
#include "kvq_test.h"

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

static inline void sample_tensor(const kvq_context *ctx, kvq_tensor_quant *t, int bits, kvq_axis axis, int n_groups,
                                 uint32_t stream) {
    t->bits = bits;
    t->axis = axis;
    t->n_groups = n_groups;
    t->dim = 1;
    t->n_levels = 1 << bits;
    t->codebook = sample_floats(ctx, (int64_t)n_groups * t->n_levels, stream, -1, 2.0 / t->n_levels);
    for (int i = t->n_levels; i < n_groups * t->n_levels; i++) t->codebook[i] -= 2; // each table ascends from -1
    if (axis == KVQ_AXIS_CHANNEL) {
        t->lower = sample_floats(ctx, SAMPLE_D, stream + 1, -3, 0.01);
        t->upper = sample_floats(ctx, SAMPLE_D, stream + 2, 0.5, 0.3);
    }
    t->fit = (kvq_fit_report){.n_points = 1000 + stream,
                              .n_outliers = 20 + stream,
                              .n_constant = 3 + stream,
                              .weight_sum = 1.0 / 3 + stream,
                              .effective_samples = 77.7,
                              .objective = 1e-300,
                              .binning_bound = 0.1};
}

// What format 1.1 added; without it the sample is the one in tests/data/format-1.0.kvq.h5.
static inline void sample_additions(const kvq_context *ctx, kvq_tensor_quant *t, uint32_t stream) {
    t->fit.n_clipped = 7 + stream;
    t->fit.lloyd_objective = 1.0 / 7 + stream;
    t->fit.normalised_mse = 2e-3 + stream;
    t->fit.mse = 3e-3 + stream;
    t->fit.energy = 5.5 + stream;
    t->fit.entropy_bits = 1.0 / 9;
    t->heldout = (kvq_heldout_report){100 + stream, 0.25 + stream, 1.0 / 64, 1.0 / 96, 1e-3 + stream};
    if (stream % 10 != 0) t->decode_levels = sample_floats(ctx, (int64_t)t->n_groups * t->n_levels, stream + 3, 1, -.1);
}

// n_layers layers of 2 KV heads; 3 bits for K, 2 for V, one more in the first layer. Format 1.0 holds all of it.
static inline kvq_artifact *sample_artifact_1_0(const kvq_context *ctx, int64_t n_layers) {
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
        sample_tensor(ctx, &a->layers[layer].k, layer == 0 ? 4 : 3, KVQ_AXIS_CHANNEL, 1, stream);
        sample_tensor(ctx, &a->layers[layer].v, layer == 0 ? 3 : 2, KVQ_AXIS_TOKEN, 1, stream + 5);
    }
    a->layers[0].k.codebook[8] = a->layers[0].k.codebook[7]; // levels may repeat
    a->layers[0].k.lower[0] = -FLT_MAX;
    a->layers[0].k.lower[1] = a->layers[0].k.upper[1] = -0.0f; // a constant channel
    a->layers[0].k.upper[2] = FLT_TRUE_MIN;
    a->layers[0].k.lower[2] = -FLT_MIN;
    return a;
}

// The same with everything that format 1.1 added. The third layer has a table per KV head for V, evenly spaced levels
// and ranges per token for K.
static inline kvq_artifact *sample_artifact(const kvq_context *ctx, int64_t n_layers) {
    kvq_artifact *a = sample_artifact_1_0(ctx, n_layers);
    a->quantizer.weighting = KVQ_WEIGHT_RANGE;
    a->quantizer.recent_tokens = 128;
    a->quantizer.threshold_scope = KVQ_SCOPE_MATRIX;
    a->quantizer.sinks_counted = true;
    for (int64_t layer = 0; layer < n_layers; layer++) {
        kvq_layer_quant *l = &a->layers[layer];
        uint32_t         stream = (uint32_t)(10 * layer);
        sample_additions(ctx, &l->k, stream);
        sample_additions(ctx, &l->v, stream + 5);
        l->attention_error = 0.125 + (double)layer;
        l->k.domain = KVQ_KEYS_POST_ROPE;
        l->v.datatype = KVQ_NF;
        if (layer != 2) continue;
        kvq_free(ctx, l->k.lower);
        kvq_free(ctx, l->k.upper);
        l->k.lower = l->k.upper = NULL;
        l->k.axis = KVQ_AXIS_TOKEN;
        l->k.datatype = KVQ_INT_CLAMPED;
        for (int i = 0; i < l->k.n_levels; i++) l->k.codebook[i] = (float)(2.0 * i / (l->k.n_levels - 1) - 1);
        kvq_free(ctx, l->v.codebook);
        kvq_free(ctx, l->v.decode_levels);
        sample_tensor(ctx, &l->v, 2, KVQ_AXIS_TOKEN, SAMPLE_HEADS, stream + 5);
        sample_additions(ctx, &l->v, stream + 5);
    }
    return a;
}

// ---------------------------------------------------------------- scheme "alloc"

#define SAMPLE_ALLOC_HEAD_DIM 8
#define SAMPLE_ALLOC_D        (SAMPLE_HEADS * SAMPLE_ALLOC_HEAD_DIM)

static const uint8_t SAMPLE_WIDTHS[SAMPLE_ALLOC_D] = {0, 1, 2, 3, 4, 5, 2, 3, 1, 1, 2, 2, 3, 3, 0, 4};

// f16 numbers.
static inline float *sample_halves(const kvq_context *ctx, int64_t n, uint32_t stream, double low, double step) {
    float *x = sample_floats(ctx, n, stream, low, step);
    for (int64_t i = 0; i < n; i++) x[i] = kvq_float_of_half(kvq_half_of_float(x[i]));
    return x;
}

// Each table ascends from -1.
static inline int64_t sample_key_table(float *levels, int64_t at, int width) {
    for (int i = 0; i < 1 << width; i++)
        levels[at + i] = kvq_float_of_half(kvq_half_of_float((float)(-1 + (2 * i + 0.3) / (1 << width))));
    return at + (1 << width);
}

static inline void sample_alloc_keys(const kvq_context *ctx, kvq_tensor_quant *t, kvq_table_kind kind,
                                     uint32_t stream) {
    kvq_error err = {0};
    int64_t   n = 0, at = 0;
    bool      is_affine = kind == KVQ_TABLE_AFFINE;
    t->n_groups = t->dim = 1;
    t->axis = KVQ_AXIS_CHANNEL;
    t->domain = KVQ_KEYS_POST_ROPE;
    t->table_kind = kind;
    t->kl = 0.015625 + stream;
    sample_require(KVQ_NEW(ctx, SAMPLE_ALLOC_D, "sample", &t->widths, &err));
    memcpy(t->widths, SAMPLE_WIDTHS, sizeof SAMPLE_WIDTHS);
    for (int i = 0; i < (is_affine ? KVQ_MAX_KEY_WIDTH + 1 : SAMPLE_ALLOC_D); i++)
        n += 1 << (is_affine ? i : SAMPLE_WIDTHS[i]);
    t->n_key_levels = n;
    sample_require(KVQ_NEW(ctx, n, "sample", &t->key_levels, &err));
    for (int i = 0; at < n; i++) at = sample_key_table(t->key_levels, at, is_affine ? i : SAMPLE_WIDTHS[i]);
    t->lower = sample_halves(ctx, SAMPLE_ALLOC_D, stream + 1, -3, 0.01);
    t->upper = sample_halves(ctx, SAMPLE_ALLOC_D, stream + 2, 0.5, 0.3);
    if (!is_affine) return;
    t->offset = sample_halves(ctx, SAMPLE_ALLOC_D, stream + 3, -2, 0.2);
    t->scale = sample_halves(ctx, SAMPLE_ALLOC_D, stream + 4, 1, -0.3); // some are negative
}

static inline void sample_alloc_values(const kvq_context *ctx, kvq_tensor_quant *t, int bits, int dim,
                                       uint32_t stream) {
    t->bits = bits;
    t->n_groups = 1;
    t->n_levels = 1 << bits;
    t->dim = dim;
    t->axis = KVQ_AXIS_TOKEN;
    t->scale_format = dim == 2 ? KVQ_SCALE_E4M3 : KVQ_SCALE_F16;
    t->scale_exponent = -3 - (int)stream;
    t->kl = 0.25 + stream;
    t->codebook = sample_floats(ctx, (int64_t)t->n_levels * dim, stream, 1, -0.2); // in no order
}

// Layers alternate between a table for each channel with values in pairs, and affine tables with single values.
static inline kvq_artifact *sample_alloc_artifact(const kvq_context *ctx, int64_t n_layers) {
    const int     D = SAMPLE_ALLOC_HEAD_DIM;
    kvq_artifact *a = sample_artifact_1_0(ctx, 1), *alloc = NULL;
    kvq_error     err = {0};
    // only the layers differ, and these are few: those of the other scheme go, the rest stays
    sample_require(kvq_artifact_create(ctx, n_layers, &alloc, &err));
    kvq_layer_quant *layers = alloc->layers;
    alloc->layers = a->layers;
    a->layers = layers;
    a->model.n_layers = n_layers;
    alloc->model.n_layers = 1;
    kvq_artifact_destroy(ctx, &alloc);
    a->model.head_dim = D;
    a->quantizer.n_side_v = 0;
    a->quantizer.n_slots = 6;
    a->quantizer.budget_tokens = 2048;
    a->quantizer.budget_sequences = 8;
    a->quantizer.target_bits = 3.1;
    sample_require(kvq_artifact_set_text(ctx, &a->quantizer.scheme, "alloc", &err));
    sample_require(kvq_artifact_set_text(ctx, &a->quantizer.rotation_kind, "hadamard", &err));
    sample_require(KVQ_NEW(ctx, (int64_t)D * D, "sample", &a->quantizer.rotation, &err));
    for (int i = 0; i < D * D; i++) { // Sylvester's: the parity of the common bits of row and column
        int common = (i / D) & (i % D), parity = (common ^ common >> 1 ^ common >> 2) & 1;
        a->quantizer.rotation[i] = (parity != 0 ? -1.0f : 1.0f) / sqrtf((float)D);
    }
    for (int64_t layer = 0; layer < n_layers; layer++) {
        kvq_layer_quant *l = &a->layers[layer];
        uint32_t         stream = (uint32_t)(10 * layer);
        bool             is_affine = layer % 2 != 0;
        sample_alloc_keys(ctx, &l->k, is_affine ? KVQ_TABLE_AFFINE : KVQ_TABLE_CHANNEL, stream);
        sample_alloc_values(ctx, &l->v, is_affine ? 2 : 3, is_affine ? 1 : 2, stream + 5);
        l->k.fit = (kvq_fit_report){.n_points = 900 + stream, .n_outliers = 3, .mse = 1e-3, .energy = 2.5 + stream};
        l->v.fit = (kvq_fit_report){.n_points = 903 + stream, .mse = 2e-3, .energy = 1.5 + stream};
        l->v.heldout = (kvq_heldout_report){100 + stream, 0.25 + stream, 1.0 / 64, 1.0 / 96, 1e-3 + stream};
        l->attention_error = 0.125 + (double)layer;
    }
    return a;
}

// ---------------------------------------------------------------- equality

// Field by field and not through the schema, which could forget one.

static inline void assert_equal_floats(const float *a, const float *b, int64_t n) {
    ck_assert_int_eq(a != NULL, b != NULL);
    if (a != NULL) ck_assert(memcmp(a, b, (size_t)n * sizeof *a) == 0); // bits, so that -0 counts
}

static inline void assert_equal_tensors(const kvq_tensor_quant *a, const kvq_tensor_quant *b, int64_t d) {
    ck_assert_int_eq(a->bits, b->bits);
    ck_assert_int_eq(a->axis, b->axis);
    ck_assert_int_eq(a->n_groups, b->n_groups);
    ck_assert_int_eq(a->n_levels, b->n_levels);
    ck_assert_int_eq(a->dim, b->dim);
    ck_assert_int_eq(a->datatype, b->datatype);
    ck_assert_int_eq(a->domain, b->domain);
    assert_equal_floats(a->codebook, b->codebook, (int64_t)a->n_groups * a->n_levels * a->dim);
    assert_equal_floats(a->decode_levels, b->decode_levels, (int64_t)a->n_groups * a->n_levels);
    assert_equal_floats(a->lower, b->lower, d);
    assert_equal_floats(a->upper, b->upper, d);
    ck_assert_int_eq(a->widths != NULL, b->widths != NULL);
    if (a->widths != NULL) ck_assert_mem_eq(a->widths, b->widths, (size_t)d);
    ck_assert_int_eq(a->table_kind, b->table_kind);
    ck_assert_int_eq(a->n_key_levels, b->n_key_levels);
    assert_equal_floats(a->key_levels, b->key_levels, a->n_key_levels);
    assert_equal_floats(a->offset, b->offset, d);
    assert_equal_floats(a->scale, b->scale, d);
    ck_assert_int_eq(a->scale_format, b->scale_format);
    ck_assert_int_eq(a->scale_exponent, b->scale_exponent);
    ck_assert(a->kl == b->kl);
    ck_assert(memcmp(&a->fit, &b->fit, sizeof a->fit) == 0);             // fields of eight bytes, no padding
    ck_assert(memcmp(&a->heldout, &b->heldout, sizeof a->heldout) == 0); // the same
}

#define ASSERT_SAME_TEXT(member)   ck_assert_str_eq(a->member, b->member)
#define ASSERT_SAME_INT(member)    ck_assert_int_eq(a->member, b->member)
#define ASSERT_SAME_DOUBLE(member) ck_assert(a->member == b->member)

static inline void assert_equal(const kvq_artifact *a, const kvq_artifact *b) {
    ASSERT_SAME_TEXT(model.architecture);
    ASSERT_SAME_TEXT(model.name);
    ASSERT_SAME_TEXT(model.config_sha256);
    ASSERT_SAME_TEXT(model.weights_sha256);
    ASSERT_SAME_INT(model.n_layers);
    ASSERT_SAME_INT(model.hidden_size);
    ASSERT_SAME_INT(model.n_heads);
    ASSERT_SAME_INT(model.n_kv_heads);
    ASSERT_SAME_INT(model.head_dim);
    ASSERT_SAME_INT(model.vocab_size);
    ASSERT_SAME_DOUBLE(model.rope_theta);
    ASSERT_SAME_TEXT(model.rope_type);
    ASSERT_SAME_TEXT(model.dtype);
    ASSERT_SAME_INT(model.n_tensors);
    ASSERT_SAME_TEXT(tokenizer.kind);
    ASSERT_SAME_TEXT(tokenizer.sha256);
    ASSERT_SAME_INT(tokenizer.bos_added);
    ASSERT_SAME_TEXT(dataset.source);
    ASSERT_SAME_TEXT(dataset.source_sha256);
    ASSERT_SAME_TEXT(dataset.token_ids_sha256);
    ASSERT_SAME_INT(dataset.n_available_tokens);
    ASSERT_SAME_INT(dataset.n_samples);
    ASSERT_SAME_INT(dataset.seq_len);
    ck_assert_uint_eq(a->dataset.seed, b->dataset.seed);
    ASSERT_SAME_DOUBLE(quantizer.outlier_fraction);
    ASSERT_SAME_INT(quantizer.n_side_k);
    ASSERT_SAME_INT(quantizer.n_side_v);
    ASSERT_SAME_INT(quantizer.sink_tokens);
    ASSERT_SAME_INT(quantizer.recent_tokens);
    ASSERT_SAME_INT(quantizer.weighting);
    ASSERT_SAME_INT(quantizer.threshold_scope);
    ASSERT_SAME_INT(quantizer.sinks_counted);
    ASSERT_SAME_TEXT(quantizer.scheme);
    ASSERT_SAME_INT(quantizer.n_slots);
    ASSERT_SAME_INT(quantizer.budget_tokens);
    ASSERT_SAME_INT(quantizer.budget_sequences);
    ASSERT_SAME_DOUBLE(quantizer.target_bits);
    ASSERT_SAME_TEXT(quantizer.rotation_kind);
    assert_equal_floats(a->quantizer.rotation, b->quantizer.rotation, a->model.head_dim * a->model.head_dim);
    ASSERT_SAME_TEXT(provenance.producer_version);
    ASSERT_SAME_TEXT(provenance.matmul);
    ASSERT_SAME_TEXT(provenance.cpu);
    ASSERT_SAME_TEXT(provenance.options_json);
    ASSERT_SAME_DOUBLE(baseline_nll);
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        int64_t d = a->model.n_kv_heads * a->model.head_dim;
        assert_equal_tensors(&a->layers[layer].k, &b->layers[layer].k, d);
        assert_equal_tensors(&a->layers[layer].v, &b->layers[layer].v, d);
        ck_assert(a->layers[layer].attention_error == b->layers[layer].attention_error);
    }
}

// "<folder of the test>/name", valid until the next call.
static inline char *sample_path(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

#endif
