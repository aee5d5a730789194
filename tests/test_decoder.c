// SPDX-License-Identifier: Apache-2.0
// The packed cache against the codec, the statistics against hand computation, gates, and what belongs together.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_make_model.h"
#include "kvq_test.h"

enum { N_KV_HEADS = 2, HEAD_DIM = 24, D_KV = N_KV_HEADS * HEAD_DIM };

typedef struct rig {
    kvq_context   ctx;
    kvq_backend  *be;
    kvq_artifact *artifact;
} rig;

static void fill_tensor(rig *r, kvq_tensor_quant *t, int bits, kvq_axis axis) {
    t->bits = bits;
    t->axis = axis;
    t->n_groups = t->dim = 1;
    t->n_levels = 1 << bits;
    kvq_test_ok(KVQ_NEW(&r->ctx, t->n_levels, "levels", &t->codebook, NULL), NULL);
    for (int i = 0; i < t->n_levels; i++) t->codebook[i] = -1.0f + 2.0f * (float)i / (float)(t->n_levels - 1);
    if (axis == KVQ_AXIS_TOKEN) return;
    kvq_test_ok(KVQ_NEW(&r->ctx, D_KV, "lower", &t->lower, NULL), NULL);
    kvq_test_ok(KVQ_NEW(&r->ctx, D_KV, "upper", &t->upper, NULL), NULL);
    for (int c = 0; c < D_KV; c++) {
        t->lower[c] = -0.9f - 0.01f * (float)c;
        t->upper[c] = 0.8f + 0.02f * (float)c;
    }
}

static void rig_open(rig *r, int bits, double outliers, int64_t sinks) {
    r->ctx = kvq_test_context();
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, NULL), NULL);
    kvq_test_ok(kvq_artifact_create(&r->ctx, 1, &r->artifact, NULL), NULL);
    r->artifact->model.n_layers = 1;
    r->artifact->model.n_kv_heads = N_KV_HEADS;
    r->artifact->model.head_dim = HEAD_DIM;
    r->artifact->quantizer.outlier_fraction = outliers;
    r->artifact->quantizer.n_side_k = r->artifact->quantizer.n_side_v = kvq_block_n_side(outliers, D_KV);
    r->artifact->quantizer.sink_tokens = sinks;
    fill_tensor(r, &r->artifact->layers[0].k, bits, KVQ_AXIS_CHANNEL);
    fill_tensor(r, &r->artifact->layers[0].v, bits, KVQ_AXIS_TOKEN);
}

static void rig_close(rig *r) {
    kvq_artifact_destroy(&r->ctx, &r->artifact);
    r->be->destroy(&r->be);
}

static float *randoms(int64_t n, uint32_t stream) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(2.4 * kvq_rng_uniform(6, KVQ_RNG_TEST, stream, (uint64_t)i) - 1.2);
    return x;
}

// ---------------------------------------------------------------- packed cache

static const int64_t LENGTHS[] = {1, 2, 15, 16, 17, 127, 128, 129, 1000};

// Appending in uneven pieces, at once, and coding each row alone give the same numbers; sinks come back as f16; the
// bytes are what the accounting says.
START_TEST(cache_equals_the_codec_for_any_pieces) {
    rig       r;
    int64_t   n = LENGTHS[_i];
    kvq_error err = {0};
    rig_open(&r, 2 + _i % 3, _i % 2 == 0 ? 0.05 : 0, _i % 4);
    int64_t sinks = r.artifact->quantizer.sink_tokens < n ? r.artifact->quantizer.sink_tokens : n;
    float  *k = randoms(n * D_KV, 1), *v = randoms(n * D_KV, 2), *k1 = randoms(n * D_KV, 3), *v1 = randoms(n * D_KV, 3),
          *k2 = randoms(n * D_KV, 4), *v2 = randoms(n * D_KV, 4);
    kvq_packed_layer *whole = NULL, *pieces = NULL;
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, n, &whole, &err), &err);
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, n + 5, &pieces, &err), &err);
    kvq_test_ok(kvq_packed_layer_append(r.be, whole, k, v, n, &err), &err);
    for (int64_t at = 0, piece = 1; at < n; at += piece, piece = piece % 7 + 1) {
        int64_t m = piece < n - at ? piece : n - at;
        kvq_test_ok(kvq_packed_layer_append(r.be, pieces, k + at * D_KV, v + at * D_KV, m, &err), &err);
    }
    kvq_packed_layer_decode(r.be, whole, k1, v1);
    kvq_packed_layer_decode(r.be, pieces, k2, v2);
    ck_assert_mem_eq(k1, k2, (size_t)(n * D_KV) * sizeof *k1);
    ck_assert_mem_eq(v1, v2, (size_t)(n * D_KV) * sizeof *v1);
    for (int64_t i = 0; i < sinks * D_KV; i++) {
        ck_assert(k1[i] == kvq_float_of_half(kvq_half_of_float(k[i])));
        ck_assert(v1[i] == kvq_float_of_half(kvq_half_of_float(v[i])));
    }
    float          storage[2 * D_KV], expected[D_KV], keys[2][8];
    uint16_t       channels[2][8];
    uint8_t        row[512];
    kvq_block_spec specs[2] = {
        kvq_tensor_block_spec(&r.artifact->layers[0].k, D_KV, r.artifact->quantizer.n_side_k, storage),
        kvq_tensor_block_spec(&r.artifact->layers[0].v, D_KV, r.artifact->quantizer.n_side_v, NULL)};
    for (int64_t t = sinks; t < n; t++) {
        kvq_block_scratch scratch = {keys[0], keys[1], channels[0], channels[1], 0, 0};
        for (int tensor = 0; tensor < 2; tensor++) {
            ck_assert_int_eq(kvq_block_encode(&specs[tensor], (tensor == 0 ? k : v) + t * D_KV, &scratch, row), 1);
            kvq_block_decode(&specs[tensor], row, expected);
            ck_assert_mem_eq((tensor == 0 ? k1 : v1) + t * D_KV, expected, sizeof expected);
        }
    }
    kvq_cache_size size = kvq_artifact_cache_size(r.artifact, n);
    ck_assert_int_eq(kvq_packed_layer_bytes(whole), size.row_bytes + size.sink_bytes);
    ck_assert_int_eq(kvq_packed_layer_length(pieces), n);
    kvq_packed_layer_reset(whole);
    ck_assert_int_eq(kvq_packed_layer_bytes(whole), 0);
    kvq_test_failed(kvq_packed_layer_append(r.be, whole, k, v, n + 1, &err), KVQ_ERR_USAGE, &err, "do not fit");
    kvq_packed_layer_destroy(&r.ctx, &whole);
    kvq_packed_layer_destroy(&r.ctx, &pieces);
    float *all[] = {k, v, k1, v1, k2, v2};
    for (int i = 0; i < 6; i++) free(all[i]);
    rig_close(&r);
}
END_TEST

// What f16 cannot hold is an error that names the place, in a sink and in a row.
START_TEST(numbers_beyond_f16_are_located) {
    rig               r;
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    float            *k = randoms(10 * D_KV, 1), *v = randoms(10 * D_KV, 2);
    rig_open(&r, 3, 0.05, 2);
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, 10, &cache, &err), &err);
    k[1 * D_KV + 3] = 1e6f;
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, k, v, 10, &err), KVQ_ERR_NUMERICAL, &err,
                    "layer 0, K, position 1");
    k[1 * D_KV + 3] = 0;
    v[7 * D_KV + 3] = -1e6f;
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, k, v, 10, &err), KVQ_ERR_NUMERICAL, &err,
                    "layer 0, V, position 7");
    ck_assert_int_eq(kvq_packed_layer_length(cache), 0);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    free(k), free(v);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- statistics

START_TEST(mean_and_standard_error_by_hand) {
    const double x[] = {1, 2, 4, 5};
    kvq_mean     m = kvq_mean_of(x, 4);
    ck_assert_double_eq_tol(m.mean, 3, 1e-15);
    ck_assert_double_eq_tol(m.stderr_, sqrt(10.0 / 3 / 4), 1e-15); // sample variance 10/3
    ck_assert(isnan(kvq_mean_of(x, 1).stderr_));                   // one window says nothing about its scatter
}
END_TEST

static void tiny_windows(kvq_windows *w, int64_t n, int64_t S, int64_t vocab, int32_t *ids) {
    memset(w, 0, sizeof *w);
    for (int64_t i = 0; i < n * S; i++)
        ids[i] = (int32_t)kvq_rng_below(4, KVQ_RNG_TEST, 9, (uint64_t)i, (uint64_t)vocab);
    w->n_windows = n;
    w->seq_len = S;
    w->ids = ids;
}

// An artifact of 8-bit evenly spaced levels over wide ranges changes almost nothing; a 1-bit one ruins the model. Both
// through the whole of kvq_validate, whose pieces must agree with each other.
START_TEST(validation_sees_small_and_large_damage) {
    enum { N = 3, S = 20 };
    rig              r;
    kvq_error        err = {0};
    kvq_checkpoint  *checkpoint = NULL;
    kvq_model       *model = NULL;
    kvq_windows      windows;
    int32_t          ids[N * S];
    char             path[256];
    kvq_make_options options = kvq_make_options_default();
    options.n_layers = 1;
    options.n_heads = 4;
    options.n_kv_heads = N_KV_HEADS;
    options.head_dim = HEAD_DIM;
    (void)snprintf(path, sizeof path, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
    double kld[2], baseline[2];
    for (int i = 0; i < 2; i++) {
        kvq_validation v;
        rig_open(&r, i == 0 ? 8 : 1, 0, 0);
        kvq_test_ok(kvq_checkpoint_open(&r.ctx, path, &checkpoint, &err), &err);
        kvq_test_ok(kvq_model_create(&r.ctx, r.be, checkpoint, false, &model, &err), &err);
        const kvq_model_config *c = kvq_model_describe(model);
        for (int j = 0; j < D_KV; j++) { // cover the data
            r.artifact->layers[0].k.lower[j] = -40;
            r.artifact->layers[0].k.upper[j] = 40;
        }
        kvq_test_ok(kvq_artifact_set_text(&r.ctx, &r.artifact->model.architecture, c->architecture, &err), &err);
        r.artifact->model.hidden_size = c->hidden_size;
        r.artifact->model.n_heads = c->n_heads;
        r.artifact->model.vocab_size = c->vocab_size;
        tiny_windows(&windows, N, S, c->vocab_size, ids);
        kvq_test_ok(kvq_validate(&r.ctx, r.be, model, r.artifact, &windows, &v, &err), &err);
        ck_assert_int_eq(v.tokens_scored, N * (S - 1));
        ck_assert_double_eq_tol(log(v.quantized_ppl) - log(v.baseline_ppl), v.difference_nll.mean, 1e-12);
        ck_assert_double_eq_tol(v.dppl.mean, v.quantized_ppl / v.baseline_ppl - 1, 1e-12);
        ck_assert_double_ge(v.kld.mean, 0);
        kld[i] = v.kld.mean;
        baseline[i] = v.baseline_nll.mean;
        kvq_validation_free(&r.ctx, &v);
        // the full-precision pass alone gives the same baseline
        kvq_test_ok(kvq_validate(&r.ctx, r.be, model, NULL, &windows, &v, &err), &err);
        ck_assert_double_eq_tol(v.baseline_nll.mean, baseline[i], 1e-12);
        ck_assert(!v.has_artifact);
        kvq_validation_free(&r.ctx, &v);
        // an artifact of another shape is refused before any work
        r.artifact->model.vocab_size++;
        kvq_test_failed(kvq_validate(&r.ctx, r.be, model, r.artifact, &windows, &v, &err), KVQ_ERR_MISMATCH, &err,
                        "vocabulary");
        kvq_model_destroy(&r.ctx, &model);
        kvq_checkpoint_close(&r.ctx, &checkpoint);
        rig_close(&r);
    }
    ck_assert_double_lt(kld[0], 0.05);
    ck_assert_double_gt(kld[1], 5 * kld[0]);
    ck_assert(baseline[0] == baseline[1]);
}
END_TEST

// ---------------------------------------------------------------- gates

typedef struct gate_case {
    const char *expression;
    double      limit;
    bool        at_most;
    kvq_verdict verdict; // for dppl 0.05, kld 0.02, top1 0.9, ppl 21, bits 3.4
} gate_case;

static const gate_case GATES[] = {
    {"dppl<=10%", 0.1, true, KVQ_PASS},           {"dppl<=4%", 0.04, true, KVQ_FAIL},
    {"dppl <= 0.05 ", 0.05, true, KVQ_PASS},      {"kld.mean<=0.02", 0.02, true, KVQ_PASS},
    {"kld.mean<=1e-3", 0.001, true, KVQ_FAIL},    {"top1>=97%", 0.97, false, KVQ_FAIL},
    {"top1>=0.9", 0.9, false, KVQ_PASS},          {"ppl<=20", 20, true, KVQ_FAIL},
    {"effective_bits<=3.5", 3.5, true, KVQ_PASS},
};

START_TEST(gates_are_read_and_judged) {
    kvq_validation v = {.has_artifact = true,
                        .quantized_ppl = 21,
                        .dppl = {0.05, 0},
                        .kld = {0.02, 0},
                        .top1 = {0.9, 0},
                        .effective_bits = 3.4};
    kvq_error      err = {0};
    for (size_t i = 0; i < sizeof GATES / sizeof *GATES; i++) {
        kvq_gate gate;
        double   value;
        kvq_test_ok(kvq_gate_parse(GATES[i].expression, &gate, &err), &err);
        ck_assert_double_eq_tol(gate.limit, GATES[i].limit, 1e-15);
        ck_assert_int_eq(gate.at_most, GATES[i].at_most);
        ck_assert_int_eq(kvq_gate_judge(&gate, &v, &value), GATES[i].verdict);
    }
    const char *bad[] = {"",          "dppl",     "dppl<1%",   "dppl=1",       "speed<=1",
                         "dppl<=",    "dppl<=x",  "dppl<=1%%", "dppl<=nan",    "<=3",
                         "dppl<=1 2", "dppl<=10", "top1>=97",  "kld.mean<=2%", "ppl<=500%"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvq_gate gate;
        kvq_test_failed(kvq_gate_parse(bad[i], &gate, &err), KVQ_ERR_USAGE, &err, "--gate");
    }
}
END_TEST

// Without an artifact nothing was compared, so a gate on a comparison cannot pass.
START_TEST(a_gate_on_nothing_fails) {
    kvq_validation v = {.has_artifact = false, .baseline_ppl = 5};
    kvq_gate       gate;
    double         value;
    kvq_test_ok(kvq_gate_parse("dppl<=10%", &gate, NULL), NULL);
    ck_assert_int_eq(kvq_gate_judge(&gate, &v, &value), KVQ_FAIL);
    ck_assert(isnan(value));
    kvq_test_ok(kvq_gate_parse("ppl<=10", &gate, NULL), NULL);
    ck_assert_int_eq(kvq_gate_judge(&gate, &v, &value), KVQ_PASS);
}
END_TEST

// What an artifact knows of its model must be true; what it does not know (from a capture) is not held against it.
START_TEST(artifacts_match_models_by_what_they_know) {
    char             architecture[] = "qwen3", unknown[] = "";
    kvq_artifact     a = {.model = {.architecture = architecture, .n_layers = 2, .n_kv_heads = 2, .head_dim = 8}};
    kvq_model_config c = {.n_layers = 2, .n_kv_heads = 2, .head_dim = 8, .hidden_size = 64, .n_heads = 4};
    kvq_error        err = {0};
    (void)snprintf(c.architecture, sizeof c.architecture, "llama");
    kvq_test_failed(kvq_artifact_matches(&a, &c, NULL, &err), KVQ_ERR_MISMATCH, &err, "'qwen3', this model is 'llama'");
    a.model.architecture = unknown;
    kvq_test_ok(kvq_artifact_matches(&a, &c, NULL, &err), &err);
    a.model.hidden_size = 65;
    kvq_test_failed(kvq_artifact_matches(&a, &c, NULL, &err), KVQ_ERR_MISMATCH, &err, "hidden_size");
    a.model.hidden_size = 64;
    a.model.head_dim = 16;
    kvq_test_failed(kvq_artifact_matches(&a, &c, NULL, &err), KVQ_ERR_MISMATCH, &err, "head_dim");
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(artifacts_match_models_by_what_they_know),
    KVQ_LOOP(cache_equals_the_codec_for_any_pieces, (int)(sizeof LENGTHS / sizeof *LENGTHS)),
    KVQ_CASE(numbers_beyond_f16_are_located),
    KVQ_CASE(mean_and_standard_error_by_hand),
    KVQ_CASE(validation_sees_small_and_large_damage),
    KVQ_CASE(gates_are_read_and_judged),
    KVQ_CASE(a_gate_on_nothing_fails),
};
KVQ_TEST_MAIN("decoder", CASES)
