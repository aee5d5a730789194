// SPDX-License-Identifier: Apache-2.0
// The packed cache against the codec, validation by both protocols, held-out errors, and what belongs together.
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
    kvq_attention_shape shape = {PREFILL_S, PREFILL_H, N_KV_HEADS, HEAD_DIM, window, 0.2f, 0, {.recent = recent}};
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
        shape.second.recent = 0;
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

// ---------------------------------------------------------------- validation

static void tiny_windows(kvq_windows *w, int64_t n, int64_t S, int64_t vocab, int32_t *ids) {
    memset(w, 0, sizeof *w);
    for (int64_t i = 0; i < n * S; i++)
        ids[i] = (int32_t)kvq_rng_below(4, KVQ_RNG_TEST, 9, (uint64_t)i, (uint64_t)vocab);
    w->n_windows = n;
    w->seq_len = S;
    w->ids = ids;
}

// A model of one layer whose KV heads are those of the rig's artifact.
typedef struct tiny {
    kvq_checkpoint         *checkpoint;
    kvq_model              *model;
    const kvq_model_config *c;
} tiny;

// half_width: of the ranges of all channels of tensors that have them.
static void open_tiny(rig *r, tiny *m, setup with, float half_width) {
    kvq_error        err = {0};
    char             path[256];
    kvq_make_options options = kvq_make_options_default();
    options.n_layers = 1;
    options.n_heads = 4;
    options.n_kv_heads = N_KV_HEADS;
    options.head_dim = HEAD_DIM;
    (void)snprintf(path, sizeof path, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
    rig_open_with(r, with);
    kvq_test_ok(kvq_checkpoint_open(&r->ctx, path, &m->checkpoint, &err), &err);
    kvq_test_ok(kvq_model_create(&r->ctx, r->be, m->checkpoint, false, &m->model, &err), &err);
    m->c = kvq_model_describe(m->model);
    for (int c = 0; c < D_KV; c++) {
        r->artifact->layers[0].k.lower[c] = -half_width;
        r->artifact->layers[0].k.upper[c] = half_width;
    }
    kvq_test_ok(kvq_artifact_set_text(&r->ctx, &r->artifact->model.architecture, m->c->architecture, &err), &err);
    r->artifact->model.hidden_size = m->c->hidden_size;
    r->artifact->model.n_heads = m->c->n_heads;
    r->artifact->model.vocab_size = m->c->vocab_size;
}

static void close_tiny(rig *r, tiny *m) {
    kvq_model_destroy(&r->ctx, &m->model);
    kvq_checkpoint_close(&r->ctx, &m->checkpoint);
    rig_close(r);
}

typedef struct damage {
    int            bits;
    int64_t        recent;
    kvq_key_domain domain;
} damage;
static const damage DAMAGES[] = {{8, 0, KVQ_KEYS_PRE_ROPE},  {1, 0, KVQ_KEYS_PRE_ROPE},   {8, 0, KVQ_KEYS_POST_ROPE},
                                 {1, 0, KVQ_KEYS_POST_ROPE}, {1, 100, KVQ_KEYS_PRE_ROPE}, {1, 100, KVQ_KEYS_POST_ROPE},
                                 {1, 10, KVQ_KEYS_POST_ROPE}};
enum { N_DAMAGES = 7 };

// An artifact of 8-bit evenly spaced levels over wide ranges changes almost nothing; a 1-bit one ruins the model,
// unless all that queries see is recent. All through the whole of kvq_validate, whose pieces must agree with each
// other.
START_TEST(validation_sees_small_and_large_damage) {
    enum { N = 3, S = 20 };
    kvq_error   err = {0};
    kvq_windows windows;
    int32_t     ids[N * S];
    double      kld[N_DAMAGES], baseline[N_DAMAGES];
    for (int i = 0; i < N_DAMAGES; i++) {
        rig            r;
        tiny           m;
        kvq_validation v;
        setup          with = {.bits = DAMAGES[i].bits, .recent = DAMAGES[i].recent, .v_axis = KVQ_AXIS_TOKEN};
        open_tiny(&r, &m, with, 40); // covers the data
        r.artifact->layers[0].k.domain = DAMAGES[i].domain;
        tiny_windows(&windows, N, S, m.c->vocab_size, ids);
        kvq_test_ok(kvq_validate(&r.ctx, r.be, m.model, r.artifact, &windows, NULL, &v, &err), &err);
        ck_assert_int_eq(v.tokens_scored, N * (S - 1));
        ck_assert_double_eq_tol(log(v.quantized_ppl.value) - log(v.baseline_ppl.value), v.difference_nll.value, 1e-12);
        ck_assert_double_eq_tol(v.dppl.value, v.quantized_ppl.value / v.baseline_ppl.value - 1, 1e-12);
        ck_assert_double_ge(v.kld.value, 0);
        kld[i] = v.kld.value;
        baseline[i] = v.baseline_nll.value;
        kvq_validation_free(&r.ctx, &v);
        // the full-precision pass alone gives the same baseline
        kvq_test_ok(kvq_validate(&r.ctx, r.be, m.model, NULL, &windows, NULL, &v, &err), &err);
        ck_assert_double_eq_tol(v.baseline_nll.value, baseline[i], 1e-12);
        ck_assert(!v.has_artifact);
        kvq_validation_free(&r.ctx, &v);
        // an artifact of another shape is refused before any work
        r.artifact->model.vocab_size++;
        kvq_test_failed(kvq_validate(&r.ctx, r.be, m.model, r.artifact, &windows, NULL, &v, &err), KVQ_ERR_MISMATCH,
                        &err, "vocabulary");
        close_tiny(&r, &m);
        ck_assert(baseline[0] == baseline[i]);
    }
    ck_assert_double_lt(kld[0], 0.05);
    ck_assert_double_gt(kld[1], 5 * kld[0]);
    ck_assert_double_lt(kld[2], 0.05);
    ck_assert_double_gt(kld[3], 5 * kld[2]);
    ck_assert_double_lt(kld[4], 1e-6); // f16: 2^-11 of a number, and KL is of second order
    ck_assert_double_lt(kld[5], 1e-6);
    ck_assert_double_gt(kld[6], 10 * kld[5]);
    ck_assert_double_lt(kld[6], kld[3]);
}
END_TEST

// ---------------------------------------------------------------- held-out errors

enum { HELD_N = 3, HELD_S = 21, HELD_H = 4, HELD_Q = HELD_H * HEAD_DIM };

// What one layer shows, rotated and not, of every window.
typedef struct shown {
    const tiny    *m;
    kvq_workspace *ws;
    int            window;
    float          q[HELD_N][HELD_S * HELD_Q]; // rotated
    float          k[2][HELD_N][HELD_S * D_KV], v[HELD_N][HELD_S * D_KV];
} shown;

static kvq_status show(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    shown *s = user;
    int    w = s->window++;
    (void)err;
    memcpy(s->q[w], x->q, sizeof s->q[w]);
    memcpy(s->k[0][w], x->k, sizeof s->k[0][w]);
    memcpy(s->k[1][w], x->k, sizeof s->k[1][w]);
    memcpy(s->v[w], x->v, sizeof s->v[w]);
    kvq_rotate_queries(s->m->model, s->ws, layer, n_tokens, s->q[w]);
    kvq_rotate_keys(s->m->model, s->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, s->k[1][w]);
    return KVQ_OK;
}

static void show_all(const tiny *m, const kvq_windows *windows, shown *s) {
    kvq_error  err = {0};
    kvq_layer *layer = NULL;
    float     *x = malloc((size_t)(HELD_S * m->c->hidden_size) * sizeof *x);
    *s = (shown){.m = m};
    kvq_test_ok(kvq_workspace_create(m->model, HELD_S, false, &s->ws, &err), &err);
    kvq_test_ok(kvq_layer_load(m->model, 0, &layer, &err), &err);
    for (int w = 0; w < HELD_N; w++) {
        kvq_test_ok(kvq_model_embed(m->model, windows->ids + w * HELD_S, HELD_S, x, &err), &err);
        kvq_test_ok(kvq_layer_forward(m->model, layer, s->ws, HELD_S, x, show, s, &err), &err);
    }
    kvq_layer_release(m->model, &layer);
    free(x);
}

// Attention of query i of one head in f64; keys and values of what the cache would give back right after token i.
static void attend(const float *q, const float *k, const float *v, int64_t i, int head, float scale, double *out) {
    double p[HELD_S], sum = 0;
    int    at = head / (HELD_H / N_KV_HEADS) * HEAD_DIM;
    for (int c = 0; c < HEAD_DIM; c++) out[c] = 0;
    for (int64_t j = 0; j <= i; j++) {
        p[j] = 0;
        for (int c = 0; c < HEAD_DIM; c++)
            p[j] += (double)q[i * HELD_Q + head * HEAD_DIM + c] * (double)k[j * D_KV + at + c];
        sum += p[j] = exp(p[j] * (double)scale);
    }
    for (int64_t j = 0; j <= i; j++) {
        for (int c = 0; c < HEAD_DIM; c++) out[c] += p[j] / sum * (double)v[j * D_KV + at + c];
    }
}

static void rotate_for(const shown *s, const rig *r, float *k) {
    if (r->artifact->layers[0].k.domain == KVQ_KEYS_POST_ROPE) return;
    kvq_rotate_keys(s->m->model, s->ws, 0, KVQ_ROTATE_FORWARD, HELD_S, k);
}

// Relative error of the outputs with the tensors in `which` (bit 0 K, bit 1 V) quantised.
static double attention_error(const rig *r, const shown *s, int which) {
    static float k[HELD_S * D_KV], v[HELD_S * D_KV];
    double       error = 0, energy = 0, exact[HEAD_DIM], other[HEAD_DIM];
    int          post = r->artifact->layers[0].k.domain == KVQ_KEYS_POST_ROPE;
    for (int w = 0; w < HELD_N; w++) {
        for (int64_t i = 0; i < HELD_S; i++) {
            memcpy(k, s->k[1][w], sizeof k);
            memcpy(v, s->v[w], sizeof v);
            if (which & 1) { // the cache right after token i; what follows is not looked at
                expect_tensor(r, 0, i + 1, s->k[post][w], k);
                rotate_for(s, r, k);
            }
            if (which & 2) expect_tensor(r, 1, i + 1, s->v[w], v);
            for (int h = 0; h < HELD_H; h++) {
                attend(s->q[w], s->k[1][w], s->v[w], i, h, s->m->c->attention_scale, exact);
                attend(s->q[w], k, v, i, h, s->m->c->attention_scale, other);
                for (int c = 0; c < HEAD_DIM; c++) {
                    error += (exact[c] - other[c]) * (exact[c] - other[c]);
                    energy += exact[c] * exact[c];
                }
            }
        }
    }
    return sqrt(error / energy);
}

// The report of one tensor straight from its definition: every element looked at by itself. x: [HELD_N] windows.
static kvq_heldout_report plain_report(const rig *r, int tensor, float (*x)[HELD_S * D_KV]) {
    static float            y[(HELD_S + 60) * D_KV], padded[(HELD_S + 60) * D_KV];
    const kvq_tensor_quant *t = tensor == 0 ? &r->artifact->layers[0].k : &r->artifact->layers[0].v;
    int64_t sinks = r->artifact->quantizer.sink_tokens, n_rows = 0, n_side = r->artifact->quantizer.n_side_k;
    double  error = 0, energy = 0, outliers = 0, clipped = 0;
    for (int w = 0; w < HELD_N; w++) {
        memcpy(padded, x[w], sizeof x[w]); // zeros behind it fill the recent window, so that the window is rows only
        expect_tensor(r, tensor, HELD_S + r->artifact->quantizer.recent_tokens, padded, y);
        for (int64_t i = sinks; i < HELD_S; i++) {
            int64_t beyond[2] = {0};
            n_rows++;
            for (int c = 0; c < D_KV; c++) {
                double value = (double)x[w][i * D_KV + c], back = (double)y[i * D_KV + c];
                error += (value - back) * (value - back);
                energy += value * value;
                if (t->axis == KVQ_AXIS_TOKEN) continue;
                bool   rounded = r->artifact->quantizer.recent_tokens > 0;
                double xn =
                    (rounded ? (double)half_of(x[w][i * D_KV + c]) : value) / (double)t->upper[c]; // lower = -upper
                beyond[0] += xn > 1 + 0x1p-14, beyond[1] += xn < -1 - 0x1p-14;
            }
            for (int side = 0; side < 2; side++) {
                int64_t kept = t->axis == KVQ_AXIS_TOKEN || beyond[side] > n_side ? n_side : beyond[side];
                outliers += (double)kept;
                if (t->axis == KVQ_AXIS_CHANNEL) clipped += (double)(beyond[side] - kept);
            }
        }
    }
    return (kvq_heldout_report){.n_tokens = n_rows,
                                .nmse = error / energy,
                                .clipped_share = clipped / (double)(n_rows * D_KV),
                                .outlier_share = outliers / (double)(n_rows * D_KV),
                                .attention_error = 0};
}

static void expect_report(const kvq_heldout_report *report, const kvq_heldout_report *expected) {
    ck_assert_int_eq(report->n_tokens, expected->n_tokens);
    ck_assert_double_eq_tol(report->nmse, expected->nmse, 1e-12); // f64 sums of the same numbers
    ck_assert_double_eq_tol(report->clipped_share, expected->clipped_share, 1e-15);
    ck_assert_double_eq_tol(report->outlier_share, expected->outlier_share, 1e-15);
}

typedef struct heldout_case {
    setup          with;
    kvq_key_domain domain;
} heldout_case;
static const heldout_case HELDOUT_CASES[] = {
    {{.bits = 3, .v_axis = KVQ_AXIS_TOKEN}, KVQ_KEYS_PRE_ROPE},
    {{.bits = 2, .outliers = 0.05, .sinks = 3, .v_axis = KVQ_AXIS_TOKEN, .per_head = true}, KVQ_KEYS_POST_ROPE},
    {{.bits = 2, .outliers = 0.02, .sinks = 2, .recent = 4, .v_axis = KVQ_AXIS_TOKEN}, KVQ_KEYS_PRE_ROPE},
    {{.bits = 4, .outliers = 0.02, .sinks = 1, .recent = 60, .v_axis = KVQ_AXIS_TOKEN}, KVQ_KEYS_POST_ROPE},
};
enum { N_HELDOUT_CASES = 4 };

// Reports against their definitions over what a hook is shown, with ranges narrow enough for outliers and clipping.
// Attention in f32 errs by about 1e-6 of the outputs, and the errors measured are of 1e-3 of them at least (f16) or
// 1e-2: 1e-5 is ten times what is to be expected.
START_TEST(heldout_reports_equal_their_definitions) {
    static shown        s;
    const heldout_case *example = &HELDOUT_CASES[_i];
    kvq_error           err = {0};
    kvq_windows         windows;
    int32_t             ids[HELD_N * HELD_S];
    rig                 r;
    tiny                m;
    open_tiny(&r, &m, example->with, 4);
    kvq_layer_quant *layer = &r.artifact->layers[0];
    layer->k.domain = example->domain;
    tiny_windows(&windows, HELD_N, HELD_S, m.c->vocab_size, ids);
    show_all(&m, &windows, &s);
    kvq_test_ok(kvq_measure_heldout(&r.ctx, r.be, m.model, r.artifact, &windows, &err), &err);
    kvq_heldout_report k = plain_report(&r, 0, s.k[example->domain == KVQ_KEYS_POST_ROPE]),
                       v = plain_report(&r, 1, s.v);
    expect_report(&layer->k.heldout, &k);
    expect_report(&layer->v.heldout, &v);
    ck_assert_double_gt(k.clipped_share, 0);
    ck_assert(v.clipped_share == 0);
    ck_assert((k.outlier_share > 0) == (example->with.outliers > 0));
    ck_assert_double_eq_tol(layer->k.heldout.attention_error, attention_error(&r, &s, 1), 1e-5);
    ck_assert_double_eq_tol(layer->v.heldout.attention_error, attention_error(&r, &s, 2), 1e-5);
    ck_assert_double_eq_tol(layer->attention_error, attention_error(&r, &s, 3), 1e-5);
    kvq_workspace_destroy(m.model, &s.ws);
    close_tiny(&r, &m);
}
END_TEST

// Errors fall with bits; threads change nothing; too little text and artifacts of other models are refused, and leave
// the reports as they were.
START_TEST(heldout_errors_fall_with_bits) {
    kvq_error       err = {0};
    kvq_windows     windows;
    int32_t         ids[HELD_N * HELD_S];
    kvq_layer_quant result[2][2]; // 8 and 2 bits, one and two threads
    for (int i = 0; i < 4; i++) {
        rig  r;
        tiny m;
        open_tiny(&r, &m, (setup){.bits = i / 2 == 0 ? 8 : 2, .v_axis = KVQ_AXIS_TOKEN}, 40);
        tiny_windows(&windows, HELD_N, HELD_S, m.c->vocab_size, ids);
        r.ctx.n_threads = 1 + i % 2;
        kvq_test_ok(kvq_measure_heldout(&r.ctx, r.be, m.model, r.artifact, &windows, &err), &err);
        result[i / 2][i % 2] = r.artifact->layers[0];
        windows.n_windows = 0;
        kvq_test_failed(kvq_measure_heldout(&r.ctx, r.be, m.model, r.artifact, &windows, &err), KVQ_ERR_INPUT, &err,
                        "no token is left");
        windows.n_windows = HELD_N;
        r.artifact->model.n_heads++;
        kvq_test_failed(kvq_measure_heldout(&r.ctx, r.be, m.model, r.artifact, &windows, &err), KVQ_ERR_MISMATCH, &err,
                        "query heads");
        ck_assert(r.artifact->layers[0].k.heldout.nmse == result[i / 2][i % 2].k.heldout.nmse);
        close_tiny(&r, &m);
    }
    for (int i = 0; i < 2; i++) {
        const kvq_layer_quant *one = &result[i][0], *two = &result[i][1];
        ck_assert_mem_eq(&one->k.heldout, &two->k.heldout, sizeof one->k.heldout);
        ck_assert_mem_eq(&one->v.heldout, &two->v.heldout, sizeof one->v.heldout);
        ck_assert(one->attention_error == two->attention_error);
    }
    const kvq_layer_quant *fine = &result[0][0], *coarse = &result[1][0];
    ck_assert_double_lt(fine->k.heldout.nmse, 1e-2 * coarse->k.heldout.nmse); // steps are 85 times smaller
    ck_assert_double_lt(fine->v.heldout.nmse, 1e-2 * coarse->v.heldout.nmse);
    ck_assert_double_lt(fine->k.heldout.attention_error, 0.1 * coarse->k.heldout.attention_error);
    ck_assert_double_lt(fine->v.heldout.attention_error, 0.1 * coarse->v.heldout.attention_error);
    ck_assert_double_lt(fine->attention_error, 0.1 * coarse->attention_error);
}
END_TEST

// What a validation says of layers is what held-out reports say of the same windows, and it changes no score; noise is
// small beside what two bits do, and not nothing.
START_TEST(validation_measures_layers_and_noise_beside_it) {
    enum { N = 3, S = 40 };
    rig            r;
    tiny           m;
    kvq_error      err = {0};
    kvq_windows    windows, first;
    kvq_validation plain, v;
    int32_t        ids[N * S];
    open_tiny(&r, &m, (setup){.bits = 2, .sinks = 1, .recent = 3, .v_axis = KVQ_AXIS_TOKEN}, 40);
    tiny_windows(&windows, N, S, m.c->vocab_size, ids);
    first = windows;
    first.n_windows = 2;
    kvq_validate_options options = {.layer_windows = 2, .noise_windows = 1};
    kvq_test_ok(kvq_validate(&r.ctx, r.be, m.model, r.artifact, &windows, NULL, &plain, &err), &err);
    kvq_test_ok(kvq_validate(&r.ctx, r.be, m.model, r.artifact, &windows, &options, &v, &err), &err);
    kvq_test_ok(kvq_measure_heldout(&r.ctx, r.be, m.model, r.artifact, &first, &err), &err);
    ck_assert(!plain.has_noise && plain.layers == NULL);
    ck_assert_mem_eq(plain.position_kld, v.position_kld, (size_t)v.tokens_scored * sizeof(float));
    ck_assert_mem_eq(plain.position_hits, v.position_hits, (size_t)v.tokens_scored);
    ck_assert_mem_eq(&v.layers[0].k, &r.artifact->layers[0].k.heldout, sizeof v.layers[0].k);
    ck_assert_mem_eq(&v.layers[0].v, &r.artifact->layers[0].v.heldout, sizeof v.layers[0].v);
    ck_assert(v.layers[0].attention_error.value == r.artifact->layers[0].attention_error);
    ck_assert_double_gt(v.layers[0].attention_error.high, v.layers[0].attention_error.value);
    ck_assert(v.has_noise);
    ck_assert_double_gt(v.noise_kld.value, 0);
    ck_assert_double_lt(v.noise_kld.value, 0.1 * v.kld.value);
    kvq_validation_free(&r.ctx, &plain);
    kvq_validation_free(&r.ctx, &v);
    options = (kvq_validate_options){.protocol = KVQ_PROTOCOL_DECODE, .n_prompt = S - 1}; // nothing behind it is scored
    kvq_test_failed(kvq_validate(&r.ctx, r.be, m.model, r.artifact, &windows, &options, &v, &err), KVQ_ERR_USAGE, &err,
                    "a prompt of 39 tokens");
    close_tiny(&r, &m);
}
END_TEST

// ---------------------------------------------------------------- belonging together

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
    KVQ_CASE(validation_sees_small_and_large_damage),
    KVQ_LOOP(heldout_reports_equal_their_definitions, N_HELDOUT_CASES),
    KVQ_CASE(heldout_errors_fall_with_bits),
    KVQ_CASE(validation_measures_layers_and_noise_beside_it),
};
KVQ_TEST_MAIN("decoder", CASES)
