// SPDX-License-Identifier: Apache-2.0
//
// Validation against the slow way: an engine that appends one token after the other to its packed cache and lets the
// query of that token see what the cache then gives back.
#include <math.h>

#include "scored_model.h"

// A prompt that ends inside of the first tile, at its end, behind it; more than a tile follows.
enum { S = 270, N = 2 };

typedef struct engine {
    rig              *r;
    kvq_workspace    *ws;
    kvq_packed_layer *cache;
    int64_t           prompt; // the first queries see all of their keys in f16; 0: the protocol prefill
    float             k[S * D], v[S * D];
} engine;

static float half_of(float x) { return kvq_float_of_half(kvq_half_of_float(x)); }

static void rotate_stored(engine *e, int64_t layer, kvq_rotation rotation, int64_t n, float *k) {
    if (e->r->artifact->layers[layer].k.domain == KVQ_KEYS_POST_ROPE)
        kvq_rotate_keys(e->r->model, e->ws, layer, rotation, n, k);
}

// The last of the n tokens is new to the cache. Of the layer's result only its row is of use.
static kvq_status see_the_cache(void *user, int64_t layer, kvq_qkv *x, int64_t n, kvq_error *err) {
    engine            *e = user;
    const kvq_backend *be = e->r->be;
    rotate_stored(e, layer, KVQ_ROTATE_FORWARD, n, x->k);
    kvq_test_ok(kvq_packed_layer_append(be, e->cache, x->k + (n - 1) * D, x->v + (n - 1) * D, 1, err), err);
    if (n <= e->prompt) {
        for (int64_t i = 0; i < n * D; i++) {
            x->k[i] = half_of(x->k[i]);
            x->v[i] = half_of(x->v[i]);
        }
    } else if (e->prompt > 0) {
        kvq_packed_layer_decode(be, e->cache, x->k, x->v);
    } else { // every token that is not recent is quantised, whether its tile is full or not
        kvq_packed_layer_flush(be, e->cache, err);
        kvq_packed_layer_decode(be, e->cache, e->k, e->v);
        int64_t quantised = n - e->r->artifact->quantizer.recent_tokens;
        for (int64_t i = 0; i < n * D; i++) {
            x->k[i] = i < quantised * D ? e->k[i] : half_of(x->k[i]);
            x->v[i] = i < quantised * D ? e->v[i] : half_of(x->v[i]);
        }
    }
    rotate_stored(e, layer, KVQ_ROTATE_BACK, n, x->k);
    return KVQ_OK;
}

// states [S, C] of the whole window, in place.
static void decode_layer(engine *e, int64_t l, float *states) {
    rig       *r = e->r;
    kvq_error  err = {0};
    kvq_layer *layer = NULL;
    float     *x = malloc(sizeof(float) * S * C), *result = malloc(sizeof(float) * S * C);
    kvq_test_ok(kvq_layer_load(r->model, l, &layer, &err), &err);
    kvq_test_ok(kvq_packed_layer_create(&r->ctx, r->artifact, l, S, &e->cache, &err), &err);
    for (int64_t n = 1; n <= S; n++) {
        memcpy(x, states, sizeof(float) * (size_t)(n * C));
        kvq_test_ok(kvq_layer_forward(r->model, layer, e->ws, n, x, see_the_cache, e, &err), &err);
        memcpy(result + (n - 1) * C, x + (n - 1) * C, sizeof(float) * C);
    }
    memcpy(states, result, sizeof(float) * S * C);
    kvq_packed_layer_destroy(&r->ctx, &e->cache);
    kvq_layer_release(r->model, &layer);
    free(x), free(result);
}

// positions [S - 1] of one window
static void score(engine *e, const int32_t *ids, kvq_position_score *positions) {
    rig      *r = e->r;
    kvq_error err = {0};
    kvq_head *head = NULL;
    float    *a = malloc(sizeof(float) * S * C), *b = malloc(sizeof(float) * S * C);
    kvq_test_ok(kvq_model_embed(r->model, ids, S, a, &err), &err);
    memcpy(b, a, sizeof(float) * S * C);
    for (int64_t l = 0; l < L; l++) {
        kvq_layer *layer = NULL;
        kvq_test_ok(kvq_layer_load(r->model, l, &layer, &err), &err);
        kvq_test_ok(kvq_layer_forward(r->model, layer, e->ws, S, a, NULL, NULL, &err), &err);
        kvq_layer_release(r->model, &layer);
        decode_layer(e, l, b);
    }
    kvq_test_ok(kvq_head_load(r->model, &head, &err), &err);
    kvq_test_ok(kvq_head_compare(r->model, head, e->ws, ids, S, a, b, positions, &err), &err);
    kvq_head_release(r->model, &head);
    free(a), free(b);
}

typedef struct protocol_case {
    int            scheme;
    kvq_key_domain domain;
    int64_t        recent, prompt;
} protocol_case;
static const protocol_case PROTOCOL_CASES[] = {
    {NUQ, KVQ_KEYS_PRE_ROPE, 0, 1},     {NUQ, KVQ_KEYS_PRE_ROPE, 5, 100},   {NUQ, KVQ_KEYS_POST_ROPE, 5, 200},
    {NUQ, KVQ_KEYS_PRE_ROPE, 5, 0},     {ALLOC, KVQ_KEYS_PRE_ROPE, 0, 1},   {ALLOC, KVQ_KEYS_PRE_ROPE, 0, 100},
    {ALLOC, KVQ_KEYS_PRE_ROPE, 0, 127}, {ALLOC, KVQ_KEYS_PRE_ROPE, 0, 128}, {ALLOC, KVQ_KEYS_PRE_ROPE, 0, 200}};
enum { N_PROTOCOL_CASES = 9 };

// Keys and values that a query sees are the same bits; the order of sums in attention differs, and now and then a last
// bit decides for another code in the next layer. KL is about 1 here, and single positions differ by 1e-6, or by 1e-3
// behind such a code; a query that sees a single key from the other set differs by 1e-2.
START_TEST(validation_equals_an_engine_token_by_token) {
    const protocol_case       *p = &PROTOCOL_CASES[_i];
    static engine              e;
    static rig                 r;
    kvq_error                  err = {0};
    kvq_validation             v = {0};
    kvq_position_score         positions[S - 1];
    const kvq_validate_options options = {.protocol = p->prompt > 0 ? KVQ_PROTOCOL_DECODE : KVQ_PROTOCOL_PREFILL,
                                          .n_prompt = p->prompt};
    rig_open(&r, N, S);
    make_artifact(&r, p->scheme, 2, p->domain, p->recent);
    kvq_test_ok(kvq_validate(&r.ctx, r.be, r.model, r.artifact, &r.windows, &options, &v, &err), &err);
    ck_assert_int_eq(v.n_scored, S - 1 - p->prompt);
    e = (engine){.r = &r, .prompt = p->prompt};
    kvq_test_ok(kvq_workspace_create(r.model, S, false, &e.ws, &err), &err);
    for (int w = 0; w < N; w++) {
        double sum = 0, difference = 0;
        score(&e, r.ids + w * S, positions);
        for (int64_t t = 0; t < v.n_scored; t++) {
            const kvq_position_score *expected = &positions[p->prompt + t];
            double                    kl = (double)v.position_kld[w * v.n_scored + t];
            difference += fabs(kl - expected->kl);
            sum += expected->kl;
        }
        ck_assert_double_gt(sum / (double)v.n_scored, 0.5);
        ck_assert_double_lt(difference / (double)v.n_scored, 2e-3);
    }
    kvq_workspace_destroy(r.model, &e.ws);
    kvq_validation_free(&r.ctx, &v);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(validation_equals_an_engine_token_by_token, N_PROTOCOL_CASES),
};
KVQ_TEST_MAIN("protocols", CASES)
