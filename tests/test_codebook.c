// SPDX-License-Identifier: Apache-2.0
// The artifact in memory: ownership, views for the codec, every byte of a cache; names; Fisher weights.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_fisher.h"
#include "kvq_test.h"

START_TEST(texts_are_owned_and_never_null) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *artifact = NULL;
    kvq_test_ok(kvq_artifact_create(&ctx, 3, &artifact, &err), &err);
    char *const *texts[] = {
        &artifact->model.architecture,      &artifact->model.name,
        &artifact->model.rope_type,         &artifact->model.dtype,
        &artifact->tokenizer.kind,          &artifact->dataset.source,
        &artifact->quantizer.scheme,        &artifact->provenance.producer_version,
        &artifact->provenance.matmul,       &artifact->provenance.cpu,
        &artifact->provenance.options_json,
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) ck_assert_str_eq(*texts[i], "");
    char name[] = "llama";
    kvq_test_ok(kvq_artifact_set_text(&ctx, &artifact->model.name, name, &err), &err);
    name[0] = 'x';
    ck_assert_str_eq(artifact->model.name, "llama");
    kvq_test_ok(kvq_artifact_set_text(&ctx, &artifact->model.name, artifact->model.name + 2, &err),
                &err); // part of itself
    ck_assert_str_eq(artifact->model.name, "ama");
    ck_assert_int_eq(artifact->model.n_layers, 3);
    ck_assert_ptr_null(artifact->layers[2].v.codebook);
    kvq_test_ok(KVQ_NEW(&ctx, 4, "codebook", &artifact->layers[1].k.codebook, &err), &err);
    kvq_test_ok(KVQ_NEW(&ctx, 4, "thresholds", &artifact->layers[1].k.lower, &err), &err);
    kvq_artifact_destroy(&ctx, &artifact);
    ck_assert_ptr_null(artifact);
    kvq_artifact_destroy(&ctx, &artifact);
    kvq_test_failed(kvq_artifact_create(&ctx, -1, &artifact, &err), KVQ_ERR_MEMORY, &err, "artifact layers");
}
END_TEST

START_TEST(block_spec_views_the_tensor) {
    float            codebook[4] = {-1, 0, 0.5f, 1}, lower[3] = {-2, 1, 5}, upper[3] = {4, 2, 5}, storage[9];
    kvq_tensor_quant keys = {.bits = 2,
                             .axis = KVQ_AXIS_CHANNEL,
                             .n_groups = 1,
                             .n_levels = 4,
                             .dim = 1,
                             .codebook = codebook,
                             .lower = lower,
                             .upper = upper};
    kvq_block_spec   spec = kvq_tensor_block_spec(&keys, 3, 1, storage);
    ck_assert(spec.d == 3 && spec.bits == 2 && spec.n_side == 1 && spec.levels == codebook);
    const float z[3] = {1, 1.5f, 5}, r[3] = {3, 0.5f, 0};
    ck_assert(memcmp(spec.z, z, sizeof z) == 0 && memcmp(spec.r, r, sizeof r) == 0);
    kvq_tensor_quant values = {
        .bits = 2, .axis = KVQ_AXIS_TOKEN, .n_groups = 1, .n_levels = 4, .dim = 1, .codebook = codebook};
    spec = kvq_tensor_block_spec(&values, 3, 1, NULL);
    ck_assert(spec.z == NULL && spec.r == NULL && spec.levels == codebook);
    ck_assert(spec.decoded == NULL && spec.grid_z == NULL && spec.clamp_zero == 0);

    float decode_levels[4] = {-2, 0, 1, 2};
    keys.datatype = values.datatype = KVQ_INT_CLAMPED;
    keys.decode_levels = decode_levels;
    spec = kvq_tensor_block_spec(&keys, 3, 1, storage);
    // four levels over [-2, 4] are 2 apart and hit 0; over [1, 2], where 0 is not, the lowest one becomes 0
    const float grid_z[3] = {1, 0.5f, 5};
    ck_assert(memcmp(spec.z, z, sizeof z) == 0 && memcmp(spec.grid_z, grid_z, sizeof grid_z) == 0);
    ck_assert(spec.decoded == decode_levels);
    ck_assert(kvq_tensor_block_spec(&values, 3, 1, NULL).clamp_zero == 1);
}
END_TEST

// 4096 channels, 3 bits, 1 % outliers: 1536 bytes of codes, 42 outliers of 4 bytes, 4 bytes of f16 range for V; the row
// sizes of a compact layout as published for this setting.
START_TEST(cache_size_counts_every_byte) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *artifact = NULL;
    kvq_test_ok(kvq_artifact_create(&ctx, 2, &artifact, &err), &err);
    artifact->model.n_kv_heads = 32;
    artifact->model.head_dim = 128;
    artifact->quantizer.n_side_k = artifact->quantizer.n_side_v = kvq_block_n_side(0.01, 4096);
    artifact->quantizer.sink_tokens = 4;
    for (int layer = 0; layer < 2; layer++) {
        kvq_tensor_quant keys = {.bits = 3, .axis = KVQ_AXIS_CHANNEL, .n_groups = 1, .n_levels = 8, .dim = 1},
                         values = keys;
        values.axis = KVQ_AXIS_TOKEN;
        artifact->layers[layer].k = keys;
        artifact->layers[layer].v = values;
    }
    kvq_cache_size size = kvq_artifact_cache_size(artifact, 100);
    ck_assert_int_eq(size.n_elements, 2 * 2 * 4096 * 100);
    ck_assert_int_eq(size.row_bytes, 2 * (1704 + 1708) * 96);
    ck_assert_int_eq(size.exact_bytes, 2 * 2 * 4096 * 2 * 4);
    ck_assert_int_eq(size.tables_bytes, 2 * (2 * 4096 * 4 + 8 * 4 + 8 * 4));
    double bits = 8.0 * (2 * 3412 * 96 + 131072 + 65664) / 1638400;
    ck_assert(kvq_cache_bits_per_element(size, 1) == bits);

    size = kvq_artifact_cache_size(artifact, 3); // fewer tokens than sinks
    ck_assert(size.row_bytes == 0 && size.exact_bytes == 2 * 2 * 4096 * 2 * 3);
    ck_assert(kvq_cache_bits_per_element(kvq_artifact_cache_size(artifact, 0), 1) == 0);

    float decode_levels[8]; // a second table, and the last 10 tokens in f16 as well
    artifact->layers[1].k.decode_levels = decode_levels;
    artifact->quantizer.recent_tokens = 10;
    size = kvq_artifact_cache_size(artifact, 100);
    ck_assert_int_eq(size.row_bytes, 2 * (1704 + 1708) * 86);
    ck_assert_int_eq(size.exact_bytes, 2 * 2 * 4096 * 2 * 14);
    ck_assert_int_eq(size.tables_bytes, 2 * (2 * 4096 * 4 + 8 * 4 + 8 * 4) + 8 * 4);
    size = kvq_artifact_cache_size(artifact, 12);
    ck_assert(size.row_bytes == 0 && size.exact_bytes == 2 * 2 * 4096 * 2 * 12);
    artifact->layers[1].k.decode_levels = NULL;
    kvq_artifact_destroy(&ctx, &artifact);
}
END_TEST

START_TEST(fisher_weights_are_squared_gradients) {
    float gradient[4] = {-3, 0, 1e-20f, 0.1f};
    kvq_fisher_diagonal(gradient, 4, gradient);
    ck_assert(gradient[0] == 9 && gradient[1] == 0 && gradient[2] == 1e-20f * 1e-20f && gradient[3] == 0.1f * 0.1f);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(texts_are_owned_and_never_null),
    KVQ_CASE(block_spec_views_the_tensor),
    KVQ_CASE(cache_size_counts_every_byte),
    KVQ_CASE(fisher_weights_are_squared_gradients),
};
KVQ_TEST_MAIN("codebook", CASES)
