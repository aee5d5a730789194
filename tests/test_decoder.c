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

typedef struct setup {
    int      bits;
    double   outliers;
    int64_t  sinks, recent;
    kvq_axis k_axis, v_axis;
    bool     per_head; // tables for each KV head, with a second one for decoding
} setup;

static void fill_tensor(rig *r, kvq_tensor_quant *t, const setup *with, kvq_axis axis) {
    t->bits = with->bits;
    t->axis = axis;
    t->n_groups = with->per_head ? N_KV_HEADS : 1;
    t->dim = 1;
    t->n_levels = 1 << with->bits;
    kvq_test_ok(KVQ_NEW(&r->ctx, t->n_groups * t->n_levels, "levels", &t->codebook, NULL), NULL);
    if (with->per_head)
        kvq_test_ok(KVQ_NEW(&r->ctx, t->n_groups * t->n_levels, "decoded levels", &t->decode_levels, NULL), NULL);
    for (int i = 0; i < t->n_groups * t->n_levels; i++) {
        int head = i / t->n_levels;
        t->codebook[i] = -1.0f + 2.0f * (float)(i % t->n_levels) / (float)(t->n_levels - 1) + 0.1f * (float)head;
        if (with->per_head) t->decode_levels[i] = 0.9f * t->codebook[i] - 0.05f;
    }
    if (axis == KVQ_AXIS_TOKEN) return;
    kvq_test_ok(KVQ_NEW(&r->ctx, D_KV, "lower", &t->lower, NULL), NULL);
    kvq_test_ok(KVQ_NEW(&r->ctx, D_KV, "upper", &t->upper, NULL), NULL);
    for (int c = 0; c < D_KV; c++) {
        t->lower[c] = -0.9f - 0.01f * (float)c;
        t->upper[c] = 0.8f + 0.02f * (float)c;
    }
}

static void rig_open_with(rig *r, setup with) {
    r->ctx = kvq_test_context();
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, NULL), NULL);
    kvq_test_ok(kvq_artifact_create(&r->ctx, 1, &r->artifact, NULL), NULL);
    r->artifact->model.n_layers = 1;
    r->artifact->model.n_kv_heads = N_KV_HEADS;
    r->artifact->model.head_dim = HEAD_DIM;
    r->artifact->quantizer.outlier_fraction = with.outliers;
    r->artifact->quantizer.n_side_k = r->artifact->quantizer.n_side_v = kvq_block_n_side(with.outliers, D_KV);
    r->artifact->quantizer.sink_tokens = with.sinks;
    r->artifact->quantizer.recent_tokens = with.recent;
    fill_tensor(r, &r->artifact->layers[0].k, &with, with.k_axis);
    fill_tensor(r, &r->artifact->layers[0].v, &with, with.v_axis);
}

static void rig_open(rig *r, int bits, double outliers, int64_t sinks) {
    rig_open_with(
        r,
        (setup){
            .bits = bits, .outliers = outliers, .sinks = sinks, .k_axis = KVQ_AXIS_CHANNEL, .v_axis = KVQ_AXIS_TOKEN});
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

static float half_of(float x) { return kvq_float_of_half(kvq_half_of_float(x)); }

// What a cache of n tokens must give back: sinks and the last `recent` tokens in f16, all others through the codec, one
// row at a time, from f16 where there is a recent window. x [n, D_KV]
static void expect_tensor(const rig *r, int tensor, int64_t n, const float *x, float *expected) {
    const kvq_tensor_quant *t = tensor == 0 ? &r->artifact->layers[0].k : &r->artifact->layers[0].v;
    int64_t                 sinks = r->artifact->quantizer.sink_tokens, recent = r->artifact->quantizer.recent_tokens;
    float                   storage[3 * D_KV], exact[D_KV], keys[2][8];
    uint16_t                channels[2][8];
    uint8_t                 row[512];
    kvq_block_scratch       scratch = {keys[0], keys[1], channels[0], channels[1], 0, 0};
    kvq_block_spec          spec = kvq_tensor_block_spec(t, D_KV, r->artifact->quantizer.n_side_k, storage);
    for (int64_t i = 0; i < n; i++) {
        for (int c = 0; c < D_KV; c++) exact[c] = half_of(x[i * D_KV + c]);
        memcpy(expected + i * D_KV, exact, sizeof exact);
        if (i < sinks || i >= n - recent) continue;
        ck_assert_int_eq(kvq_block_encode(&spec, recent > 0 ? exact : x + i * D_KV, &scratch, row), 1);
        kvq_block_decode(&spec, row, expected + i * D_KV);
    }
}

static void expect_cache(const rig *r, const kvq_packed_layer *cache, int64_t n, const float *k, const float *v) {
    size_t         bytes = (size_t)(n * D_KV) * sizeof(float);
    float         *k1 = malloc(bytes), *v1 = malloc(bytes), *expected = malloc(bytes);
    kvq_cache_size size = kvq_artifact_cache_size(r->artifact, n);
    kvq_packed_layer_decode(r->be, cache, k1, v1);
    expect_tensor(r, 0, n, k, expected);
    ck_assert_mem_eq(k1, expected, bytes);
    expect_tensor(r, 1, n, v, expected);
    ck_assert_mem_eq(v1, expected, bytes);
    ck_assert_int_eq(kvq_packed_layer_bytes(cache), size.row_bytes + size.exact_bytes);
    ck_assert_int_eq(kvq_packed_layer_length(cache), n);
    free(k1), free(v1), free(expected);
}

static const int64_t RECENTS[] = {0, 1, 2, 5, 128, 2000};
enum { N_RECENTS = 6 };

// Appending in uneven pieces, at once, and coding each row alone give the same numbers, whatever the axes, the tables
// and the recent window; the bytes are what the accounting says.
START_TEST(cache_equals_the_codec_for_any_pieces) {
    int64_t n = LENGTHS[_i];
    float  *k = randoms(n * D_KV, 1), *v = randoms(n * D_KV, 2);
    for (int example = 0; example < 4 * N_RECENTS; example++) {
        rig               r;
        kvq_error         err = {0};
        kvq_packed_layer *whole = NULL, *pieces = NULL;
        setup             with = {2 + _i % 3,
                      example % 2 == 0 ? 0.05 : 0,
                                  (_i + example) % 4,
                                  RECENTS[example / 4],
                      example % 4 < 3 ? KVQ_AXIS_CHANNEL : KVQ_AXIS_TOKEN,
                      example % 4 < 2 ? KVQ_AXIS_TOKEN : KVQ_AXIS_CHANNEL,
                                  example % 4 == 1};
        rig_open_with(&r, with);
        kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, n, &whole, &err), &err);
        kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, n + 5, &pieces, &err), &err);
        kvq_test_ok(kvq_packed_layer_append(r.be, whole, k, v, n, &err), &err);
        for (int64_t at = 0, piece = 1; at < n; at += piece, piece = piece % 7 + 1) {
            int64_t m = piece < n - at ? piece : n - at;
            kvq_test_ok(kvq_packed_layer_append(r.be, pieces, k + at * D_KV, v + at * D_KV, m, &err), &err);
            if (at < 30) expect_cache(&r, pieces, at + m, k, v);
        }
        expect_cache(&r, whole, n, k, v);
        expect_cache(&r, pieces, n, k, v);
        kvq_packed_layer_reset(whole);
        ck_assert_int_eq(kvq_packed_layer_bytes(whole), 0);
        kvq_test_failed(kvq_packed_layer_append(r.be, whole, k, v, n + 1, &err), KVQ_ERR_USAGE, &err, "do not fit");
        kvq_packed_layer_destroy(&r.ctx, &whole);
        kvq_packed_layer_destroy(&r.ctx, &pieces);
        rig_close(&r);
    }
    free(k), free(v);
}
END_TEST

enum { PREFILL_S = 41, PREFILL_H = 6, PREFILL_Q = PREFILL_H * HEAD_DIM };
static const int64_t PREFILL_RECENTS[] = {0, 1, 5, 60};

// One query per token over what the cache holds right after that token, against all queries at once over the pairs that
// `prefill` gives. Keys and values are the same to the bit; outputs differ by the order of sums over at most 41 keys of
// size 1.2: within 41 * 2^-24 of their size by Higham's bound, and as much again for softmax.
START_TEST(prefill_sees_what_single_tokens_see) {
    enum { N = PREFILL_S * D_KV };
    rig                 r;
    kvq_error           err = {0};
    kvq_packed_layer   *cache = NULL;
    int64_t             recent = PREFILL_RECENTS[_i % 4], window = _i < 4 ? 0 : 7;
    kvq_attention_shape shape = {PREFILL_S, PREFILL_H, N_KV_HEADS, HEAD_DIM, window, 0.2f, 0, recent};
    rig_open_with(&r, (setup){3, 0.05, 2, recent, KVQ_AXIS_CHANNEL, KVQ_AXIS_TOKEN, true});
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, PREFILL_S, &cache, &err), &err);
    float *given[2] = {randoms(N, 1), randoms(N, 2)}, *first[2] = {randoms(N, 1), randoms(N, 2)},
          *second[2] = {randoms(N, 3), randoms(N, 3)}, *now[2] = {randoms(N, 3), randoms(N, 3)};
    float *q = randoms(PREFILL_S * PREFILL_Q, 5), *out = randoms(PREFILL_S * PREFILL_Q, 3),
          *step = randoms(PREFILL_S * PREFILL_Q, 3);
    float *scratch = malloc((size_t)r.be->attention_scratch_floats(r.be, &shape, false) * sizeof *scratch);
    kvq_test_ok(kvq_packed_layer_prefill(r.be, cache, PREFILL_S, first[0], first[1], recent > 0 ? second[0] : NULL,
                                         recent > 0 ? second[1] : NULL, &err),
                &err);
    r.be->attention(r.be, &shape, q, first[0], first[1], second[0], second[1], out, scratch);
    kvq_packed_layer_reset(cache);
    for (int64_t t = 0; t < PREFILL_S; t++) {
        kvq_test_ok(kvq_packed_layer_append(r.be, cache, given[0] + t * D_KV, given[1] + t * D_KV, 1, &err), &err);
        kvq_packed_layer_decode(r.be, cache, now[0], now[1]);
        for (int64_t i = 0; i < 2 * (t + 1); i++) {
            const float *from = t - i / 2 < recent ? second[i % 2] : first[i % 2];
            ck_assert_mem_eq(now[i % 2] + i / 2 * D_KV, from + i / 2 * D_KV, D_KV * sizeof(float));
        }
        shape.n_tokens = t + 1;
        shape.recent = 0;
        r.be->attention(r.be, &shape, q, now[0], now[1], NULL, NULL, step, scratch);
        for (int64_t c = t * PREFILL_Q; c < (t + 1) * PREFILL_Q; c++)
            ck_assert_double_eq_tol((double)step[c], (double)out[c], 2 * 41 * 0x1p-24 * 1.2);
    }
    kvq_packed_layer_destroy(&r.ctx, &cache);
    for (int i = 0; i < 2; i++) free(given[i]), free(first[i]), free(second[i]), free(now[i]);
    free(q), free(out), free(step), free(scratch);
    rig_close(&r);
}
END_TEST

// A failed append leaves the cache as it was, also where the window had to move; what follows is stored as if nothing
// had happened. A flushed cache goes on with an empty window.
START_TEST(failed_appends_change_nothing) {
    enum { N = 30 };
    rig               r;
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    float            *k = randoms(N * D_KV, 1), *v = randoms(N * D_KV, 2), *bad = randoms(N * D_KV, 4);
    float            *k1 = randoms(N * D_KV, 3), *v1 = randoms(N * D_KV, 3), *k2 = randoms(N * D_KV, 3);
    rig_open_with(&r, (setup){3, 0.05, 2, 4, KVQ_AXIS_CHANNEL, KVQ_AXIS_TOKEN, false});
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, N, &cache, &err), &err);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k, v, 9, &err), &err);
    bad[7 * D_KV] = 1e6f;
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, bad, v, 12, &err), KVQ_ERR_NUMERICAL, &err,
                    "layer 0, K, position 16");
    expect_cache(&r, cache, 9, k, v);
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, k, bad, 12, &err), KVQ_ERR_NUMERICAL, &err,
                    "layer 0, V, position 16");
    expect_cache(&r, cache, 9, k, v);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k + 9 * D_KV, v + 9 * D_KV, 6, &err), &err);
    expect_cache(&r, cache, 15, k, v);
    kvq_test_ok(kvq_packed_layer_flush(r.be, cache, &err), &err);
    kvq_packed_layer_decode(r.be, cache, k1, v1);
    r.artifact->quantizer.recent_tokens = 0; // all 15 are rows, from f16
    memcpy(k2, k, N * D_KV * sizeof *k2);
    for (int i = 0; i < N * D_KV; i++) k2[i] = half_of(k2[i]);
    expect_tensor(&r, 0, 15, k2, bad);
    ck_assert_mem_eq(k1, bad, 15 * D_KV * sizeof *k1);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k + 15 * D_KV, v + 15 * D_KV, 3, &err), &err);
    kvq_packed_layer_decode(r.be, cache, k1, v1);
    ck_assert_mem_eq(k1, bad, 15 * D_KV * sizeof *k1);
    ck_assert_mem_eq(k1 + 15 * D_KV, k2 + 15 * D_KV, 3 * D_KV * sizeof *k1); // the new window
    kvq_packed_layer_destroy(&r.ctx, &cache);
    float *all[] = {k, v, bad, k1, v1, k2};
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
    KVQ_LOOP(prefill_sees_what_single_tokens_see, 8),
    KVQ_CASE(failed_appends_change_nothing),
    KVQ_CASE(numbers_beyond_f16_are_located),
    KVQ_CASE(mean_and_standard_error_by_hand),
    KVQ_CASE(validation_sees_small_and_large_damage),
    KVQ_CASE(gates_are_read_and_judged),
    KVQ_CASE(a_gate_on_nothing_fails),
};
KVQ_TEST_MAIN("decoder", CASES)
