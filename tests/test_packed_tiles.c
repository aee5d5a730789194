// SPDX-License-Identifier: Apache-2.0
// The packed cache of an artifact with channel-allocated keys: tiles by absolute position, an open tile in f16.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_test.h"

enum { N_KV_HEADS = 2, HEAD_DIM = 24, D_KV = N_KV_HEADS * HEAD_DIM, TILE = KVQ_TILE_TOKENS };

typedef struct rig {
    kvq_context   ctx;
    kvq_backend  *be;
    kvq_artifact *artifact;
} rig;

static void *array(rig *r, int64_t n, size_t size) {
    void *p = NULL;
    kvq_test_ok(kvq_alloc(&r->ctx, n, size, "part of an artifact", &p, NULL), NULL);
    return p;
}

static float half_of(float x) { return kvq_float_of_half(kvq_half_of_float(x)); }

// Widths 0 to 5 in turn, a table for each channel.
static void fill_keys(rig *r, kvq_tensor_quant *k) {
    k->axis = KVQ_AXIS_CHANNEL;
    k->dim = 1;
    k->widths = array(r, D_KV, sizeof *k->widths);
    k->lower = array(r, D_KV, sizeof *k->lower);
    k->upper = array(r, D_KV, sizeof *k->upper);
    for (int c = 0; c < D_KV; c++) {
        k->widths[c] = (uint8_t)((c * 5 + c / 7) % (KVQ_MAX_KEY_WIDTH + 1));
        k->n_key_levels += 1 << k->widths[c];
        k->lower[c] = half_of(-0.9f - 0.01f * (float)(c % 5));
        k->upper[c] = half_of(0.8f + 0.02f * (float)(c % 9));
    }
    k->key_levels = array(r, k->n_key_levels, sizeof *k->key_levels);
    for (int64_t c = 0, at = 0; c < D_KV; at += 1 << k->widths[c++]) {
        int n = 1 << k->widths[c];
        for (int i = 0; i < n; i++)
            k->key_levels[at + i] = half_of(n > 1 ? -0.95f + 1.9f * (float)i / (float)(n - 1) : 0.1f);
    }
}

static void fill_values(rig *r, kvq_tensor_quant *v, int dim) {
    v->axis = KVQ_AXIS_TOKEN;
    v->bits = dim == 2 ? 5 : 3;
    v->dim = dim;
    v->n_groups = 1;
    v->n_levels = 1 << v->bits;
    v->scale_exponent = -1;
    v->codebook = array(r, (int64_t)v->n_levels * dim, sizeof *v->codebook);
    for (int i = 0; i < v->n_levels * dim; i++)
        v->codebook[i] = half_of((float)(4 * kvq_rng_uniform(3, KVQ_RNG_TEST, 9, (uint64_t)i) - 2));
}

static void rig_open(rig *r, int64_t sinks, int dim, int n_slots) {
    const char *kind;
    r->ctx = kvq_test_context();
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, NULL), NULL);
    kvq_test_ok(kvq_artifact_create(&r->ctx, 1, &r->artifact, NULL), NULL);
    r->artifact->model.n_layers = 1;
    r->artifact->model.n_kv_heads = N_KV_HEADS;
    r->artifact->model.head_dim = HEAD_DIM;
    r->artifact->quantizer.sink_tokens = sinks;
    r->artifact->quantizer.n_side_k = n_slots > 0 ? 2 : 0;
    r->artifact->quantizer.n_slots = n_slots;
    r->artifact->quantizer.rotation = array(r, (int64_t)HEAD_DIM * HEAD_DIM, sizeof(float));
    kvq_test_ok(
        kvq_make_rotation(&r->ctx, KVQ_ROTATION_ORTHOGONAL, HEAD_DIM, r->artifact->quantizer.rotation, &kind, NULL),
        NULL);
    kvq_test_ok(kvq_artifact_set_text(&r->ctx, &r->artifact->quantizer.rotation_kind, kind, NULL), NULL);
    fill_keys(r, &r->artifact->layers[0].k);
    fill_values(r, &r->artifact->layers[0].v, dim);
}

static void rig_close(rig *r) {
    kvq_artifact_destroy(&r->ctx, &r->artifact);
    r->be->destroy(&r->be);
}

static float *randoms(int64_t n, uint32_t stream) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(2.0 * kvq_rng_uniform(6, KVQ_RNG_TEST, stream, (uint64_t)i) - 1.0);
    return x;
}

// What positions [0, n) must give back when `coded` of them are in tiles: each tile coded by itself, straight by the
// codec, sinks and the rest in f16.
static void expect_tensor(const rig *r, int tensor, int64_t n, int64_t coded, const float *x, float *expected) {
    const kvq_layer_quant *layer = &r->artifact->layers[0];
    kvq_tile_view          view = {.columns = NULL};
    int64_t                sinks = r->artifact->quantizer.sink_tokens;
    kvq_test_ok(kvq_tile_view_create(&r->ctx, r->artifact, tensor == 0 ? &layer->k : &layer->v, &view, NULL), NULL);
    float           *halves = malloc((size_t)(TILE * D_KV) * sizeof *halves);
    float           *floats = malloc((size_t)(TILE * HEAD_DIM) * sizeof *floats), keys[256];
    uint32_t         places[256];
    uint8_t         *tile = malloc((size_t)kvq_tile_bytes(&view.spec));
    kvq_tile_scratch scratch = {floats, keys, places};
    for (int64_t i = 0; i < n * D_KV; i++) expected[i] = half_of(x[i]);
    for (int64_t at = 0; at < coded; at += TILE) {
        int m = (int)(coded - at < TILE ? coded - at : TILE), skip = (int)(sinks - at > m ? m : sinks - at);
        for (int i = 0; i < m * D_KV; i++) halves[i] = half_of(x[at * D_KV + i]);
        ck_assert_int_eq(kvq_tile_encode(&view.spec, halves, skip > 0 ? skip : 0, m, &scratch, tile), -1);
        kvq_tile_decode(&view.spec, tile, skip > 0 ? skip : 0, m, expected + at * D_KV);
    }
    kvq_tile_view_free(&r->ctx, &view);
    free(halves), free(floats), free(tile);
}

static void expect_cache(const rig *r, const kvq_packed_layer *cache, int64_t n, int64_t coded, const float *k,
                         const float *v) {
    size_t bytes = (size_t)(n * D_KV) * sizeof(float);
    float *k1 = malloc(bytes), *v1 = malloc(bytes), *expected = malloc(bytes);
    kvq_packed_layer_decode(r->be, cache, k1, v1);
    expect_tensor(r, 0, n, coded, k, expected);
    ck_assert_mem_eq(k1, expected, bytes);
    expect_tensor(r, 1, n, coded, v, expected);
    ck_assert_mem_eq(v1, expected, bytes);
    ck_assert_int_eq(kvq_packed_layer_length(cache), n);
    free(k1), free(v1), free(expected);
}

static const int64_t LENGTHS[] = {1, 15, 16, 17, 127, 128, 129, 300, 1000};
static const int64_t SINKS[] = {0, 1, 5, 130};

// In one piece, in uneven pieces and tile by tile through the codec: the same numbers, and the bytes that the
// accounting says.
START_TEST(cache_equals_the_codec_for_any_pieces) {
    int64_t n = LENGTHS[_i];
    float  *k = randoms(n * D_KV, 1), *v = randoms(n * D_KV, 2);
    for (int example = 0; example < 8; example++) {
        rig               r;
        kvq_error         err = {0};
        kvq_packed_layer *whole = NULL, *pieces = NULL;
        int64_t           sinks = SINKS[example % 4], coded = n / TILE * TILE;
        rig_open(&r, sinks, 1 + example / 4, example % 3 == 0 ? 0 : 16);
        kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, n, &whole, &err), &err);
        kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, n + 5, &pieces, &err), &err);
        kvq_test_ok(kvq_packed_layer_append(r.be, whole, k, v, n, &err), &err);
        for (int64_t at = 0, piece = 1; at < n; at += piece, piece = piece * 3 % 200 + 1) {
            int64_t m = piece < n - at ? piece : n - at;
            kvq_test_ok(kvq_packed_layer_append(r.be, pieces, k + at * D_KV, v + at * D_KV, m, &err), &err);
            if (at < 200) expect_cache(&r, pieces, at + m, (at + m) / TILE * TILE, k, v);
        }
        expect_cache(&r, whole, n, coded, k, v);
        expect_cache(&r, pieces, n, coded, k, v);
        kvq_cache_size size = kvq_artifact_cache_size(r.artifact, n);
        ck_assert_int_eq(kvq_packed_layer_bytes(whole), size.row_bytes + size.exact_bytes);
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

// A flush codes the open tile as it is; what follows opens it again with the values that were in it.
START_TEST(a_flushed_tile_opens_again) {
    enum { N = 200, FIRST = 150 };
    rig               r;
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    float            *k = randoms(N * D_KV, 1), *v = randoms(N * D_KV, 2);
    rig_open(&r, 1, 2, 16);
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, 2 * N, &cache, &err), &err);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k, v, FIRST, &err), &err);
    kvq_test_ok(kvq_packed_layer_flush(r.be, cache, &err), &err);
    expect_cache(&r, cache, FIRST, FIRST, k, v);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k + FIRST * D_KV, v + FIRST * D_KV, N - FIRST, &err), &err);
    expect_cache(&r, cache, N, TILE, k, v);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    rig_close(&r);
    free(k), free(v);
}
END_TEST

// What f16 cannot hold is located, in a sink, in the open tile and in a full one, and leaves the cache as it was.
START_TEST(failed_appends_change_nothing) {
    static const int64_t BAD[] = {0, 70, 100, 140};
    enum { N = 160, FIRST = 60 };
    rig               r;
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    int64_t           bad = BAD[_i], first = bad == 0 ? 0 : FIRST;
    float            *k = randoms(N * D_KV, 1), *v = randoms(N * D_KV, 2), *worse = randoms(N * D_KV, 2);
    rig_open(&r, 1, 2, 16);
    kvq_test_ok(kvq_packed_layer_create(&r.ctx, r.artifact, 0, N, &cache, &err), &err);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k, v, first, &err), &err);
    worse[bad * D_KV + 3] = 1e6f;
    char where[40];
    (void)snprintf(where, sizeof where, "layer 0, V, position %d", (int)bad);
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, k + first * D_KV, worse + first * D_KV, N - first, &err),
                    KVQ_ERR_NUMERICAL, &err, where);
    expect_cache(&r, cache, first, 0, k, v);
    kvq_test_ok(kvq_packed_layer_append(r.be, cache, k + first * D_KV, v + first * D_KV, N - first, &err), &err);
    expect_cache(&r, cache, N, TILE, k, v);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    rig_close(&r);
    free(k), free(v), free(worse);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(cache_equals_the_codec_for_any_pieces, (int)(sizeof LENGTHS / sizeof *LENGTHS)),
    KVQ_CASE(a_flushed_tile_opens_again),
    KVQ_LOOP(failed_appends_change_nothing, 4),
};
KVQ_TEST_MAIN("packed tiles", CASES)
