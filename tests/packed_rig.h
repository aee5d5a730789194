// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites of the packed cache: artifacts of both schemes and any shape, what a cache must give back, and
// its saved bytes as docs/packed-cache.md draws them, both straight by the codec, token by token and tile by tile.
#ifndef PACKED_RIG_H
#define PACKED_RIG_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_test.h"
#include "limited_memory.h"

enum { TILE = KVQ_TILE_TOKENS, HEADER = 144, SEAL = 64, IDENTITY_AT = 80, MAX_ROW = 16384, MAX_SLOTS = 256 };

typedef struct setup {
    bool    tiled;
    int     n_heads, head_dim, n_layers;
    int64_t sinks, recent; // recent: of rows
    int     n_side;        // outliers of a row per side
    int     n_slots;       // of a tile
    int     dim;           // channels of a column of values in tiles
    bool    per_head;      // rows: tables for each KV head, with a second one for decoding
} setup;

typedef struct rig {
    setup         with;
    int           d;
    kvq_context   ctx;
    kvq_backend  *be;
    kvq_artifact *artifact;
} rig;

static inline float half_of(float x) { return kvq_float_of_half(kvq_half_of_float(x)); }

// ---------------------------------------------------------------- artifacts

static inline void *rig_array(const rig *r, int64_t n, size_t size) {
    void *p = NULL;
    kvq_test_ok(kvq_alloc(&r->ctx, n, size, "part of an artifact", &p, NULL), NULL);
    return p;
}

static inline void fill_ranges(const rig *r, kvq_tensor_quant *t) {
    t->lower = rig_array(r, r->d, sizeof *t->lower);
    t->upper = rig_array(r, r->d, sizeof *t->upper);
    for (int c = 0; c < r->d; c++) {
        t->lower[c] = half_of(-0.9f - 0.01f * (float)(c % 5));
        t->upper[c] = half_of(0.8f + 0.02f * (float)(c % 9));
    }
}

static inline void fill_rows(const rig *r, kvq_tensor_quant *t, int bits, kvq_axis axis, int layer) {
    t->bits = bits;
    t->axis = axis;
    t->n_groups = r->with.per_head ? r->with.n_heads : 1;
    t->dim = 1;
    t->n_levels = 1 << bits;
    t->codebook = rig_array(r, t->n_groups * t->n_levels, sizeof *t->codebook);
    if (r->with.per_head) t->decode_levels = rig_array(r, t->n_groups * t->n_levels, sizeof *t->decode_levels);
    for (int i = 0; i < t->n_groups * t->n_levels; i++) {
        float at = (float)(i % t->n_levels) / (float)(t->n_levels - 1), head = (float)(i / t->n_levels);
        t->codebook[i] = -1.0f + (2.0f + 0.01f * (float)layer) * at + 0.1f * head;
        if (r->with.per_head) t->decode_levels[i] = 0.9f * t->codebook[i] - 0.05f;
    }
    if (axis == KVQ_AXIS_CHANNEL) fill_ranges(r, t);
}

// Widths 0 to 5 in turn, a table for each channel.
static inline void fill_tile_keys(const rig *r, kvq_tensor_quant *k, int layer) {
    k->axis = KVQ_AXIS_CHANNEL;
    k->dim = 1;
    k->widths = rig_array(r, r->d, sizeof *k->widths);
    fill_ranges(r, k);
    for (int c = 0; c < r->d; c++) {
        k->widths[c] = (uint8_t)((c * 5 + c / 7) % (KVQ_MAX_KEY_WIDTH + 1));
        k->n_key_levels += 1 << k->widths[c];
    }
    k->key_levels = rig_array(r, k->n_key_levels, sizeof *k->key_levels);
    for (int64_t c = 0, at = 0; c < r->d; at += 1 << k->widths[c++]) {
        int n = 1 << k->widths[c];
        for (int i = 0; i < n; i++)
            k->key_levels[at + i] =
                half_of(n > 1 ? -0.95f + (1.9f - 0.01f * (float)layer) * (float)i / (float)(n - 1) : 0.1f);
    }
}

static inline void fill_tile_values(const rig *r, kvq_tensor_quant *v, int layer) {
    v->axis = KVQ_AXIS_TOKEN;
    v->bits = r->with.dim == 2 ? 6 : 3;
    v->dim = r->with.dim;
    v->n_groups = 1;
    v->n_levels = 1 << v->bits;
    v->scale_format = r->with.dim == 2 ? KVQ_SCALE_E4M3 : KVQ_SCALE_F16;
    v->scale_exponent = -1;
    v->codebook = rig_array(r, (int64_t)v->n_levels * v->dim, sizeof *v->codebook);
    for (int i = 0; i < v->n_levels * v->dim; i++)
        v->codebook[i] = half_of((float)(4 * kvq_rng_uniform(3, KVQ_RNG_TEST, 90 + (uint32_t)layer, (uint64_t)i) - 2));
}

static inline void fill_tiles(rig *r) {
    const char *kind;
    int64_t     n = r->with.head_dim;
    r->artifact->quantizer.n_slots = r->with.n_slots;
    r->artifact->quantizer.rotation = rig_array(r, n * n, sizeof(float));
    kvq_test_ok(
        kvq_make_rotation(&r->ctx, KVQ_ROTATION_ORTHOGONAL, (int)n, r->artifact->quantizer.rotation, &kind, NULL),
        NULL);
    kvq_test_ok(kvq_artifact_set_text(&r->ctx, &r->artifact->quantizer.rotation_kind, kind, NULL), NULL);
}

static inline void rig_open(rig *r, setup with) {
    *r = (rig){.with = with, .d = with.n_heads * with.head_dim, .ctx = kvq_test_context()};
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, NULL), NULL);
    kvq_test_ok(kvq_artifact_create(&r->ctx, with.n_layers, &r->artifact, NULL), NULL);
    kvq_artifact *a = r->artifact;
    a->model.n_layers = with.n_layers;
    a->model.n_kv_heads = with.n_heads;
    a->model.head_dim = with.head_dim;
    a->quantizer.sink_tokens = with.sinks;
    a->quantizer.recent_tokens = with.tiled ? 0 : with.recent;
    a->quantizer.n_side_k = with.n_side;
    a->quantizer.n_side_v = with.tiled ? 0 : with.n_side;
    if (with.tiled) fill_tiles(r);
    for (int layer = 0; layer < with.n_layers; layer++) {
        kvq_layer_quant *l = &a->layers[layer];
        if (with.tiled) {
            fill_tile_keys(r, &l->k, layer);
            fill_tile_values(r, &l->v, layer);
        } else {
            fill_rows(r, &l->k, 3 + layer % 2, KVQ_AXIS_CHANNEL, layer);
            fill_rows(r, &l->v, 2 + layer % 2, KVQ_AXIS_TOKEN, layer);
        }
    }
}

static inline void rig_close(rig *r) {
    kvq_artifact_destroy(&r->ctx, &r->artifact);
    r->be->destroy(&r->be);
}

static inline float *randoms(int64_t n, uint32_t stream) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(2.2 * kvq_rng_uniform(6, KVQ_RNG_TEST, stream, (uint64_t)i) - 1.1);
    return x;
}

static inline kvq_packed_layer *new_cache(const rig *r, int64_t layer, int64_t capacity) {
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    kvq_test_ok(kvq_packed_layer_create(&r->ctx, r->artifact, layer, capacity, &cache, &err), &err);
    return cache;
}

// Appends the tokens [first, end) of x[0], x[1].
static inline void append(const rig *r, kvq_packed_layer *cache, float *const x[2], int64_t first, int64_t end) {
    kvq_error err = {0};
    kvq_test_ok(kvq_packed_layer_append(r->be, cache, x[0] + first * r->d, x[1] + first * r->d, end - first, &err),
                &err);
}

// ---------------------------------------------------------------- what is expected

// One tensor of a cache as the codec alone makes it: `coded` as in docs/packed-cache.md. Fills decoded [n, d] (what is
// in f16 is decoded already) and returns where the bytes end.
static inline uint8_t *expect_rows(const rig *r, const kvq_tensor_quant *t, int n_side, int64_t coded, const float *x,
                                   float *decoded, uint8_t *out) {
    float            *storage = malloc((size_t)(3 * r->d) * sizeof *storage), keys[2][64];
    uint16_t          channels[2][64];
    kvq_block_scratch scratch = {keys[0], keys[1], channels[0], channels[1], 0, 0};
    kvq_block_spec    spec = kvq_tensor_block_spec(t, r->d, n_side, storage);
    for (int64_t i = r->with.sinks; i < r->with.sinks + coded; i++) {
        const float *from = r->with.recent > 0 ? decoded + i * r->d : x + i * r->d; // through f16 or not
        ck_assert_int_eq(kvq_block_encode(&spec, from, &scratch, out), 1);
        kvq_block_decode(&spec, out, decoded + i * r->d);
        out += kvq_block_row_bytes(&spec);
    }
    free(storage);
    return out;
}

static inline uint8_t *expect_tiles(const rig *r, const kvq_tensor_quant *t, int64_t coded, float *decoded,
                                    uint8_t *out) {
    kvq_tile_view view = {.columns = NULL};
    kvq_test_ok(kvq_tile_view_create(&r->ctx, r->artifact, t, &view, NULL), NULL);
    float           *floats = malloc((size_t)(TILE * r->with.head_dim) * sizeof *floats), keys[MAX_SLOTS + 1];
    uint32_t         places[MAX_SLOTS + 1];
    kvq_tile_scratch scratch = {floats, keys, places};
    for (int64_t at = 0; at < coded; at += TILE) {
        int m = (int)(coded - at < TILE ? coded - at : TILE);
        int skip = (int)(r->with.sinks < at ? 0 : r->with.sinks - at < m ? r->with.sinks - at : m);
        ck_assert_int_eq(kvq_tile_encode(&view.spec, decoded + at * r->d, skip, m, &scratch, out), -1);
        kvq_tile_decode(&view.spec, out, skip, m, decoded + at * r->d);
        out += kvq_tile_bytes(&view.spec);
    }
    kvq_tile_view_free(&r->ctx, &view);
    free(floats);
    return out;
}

static inline uint8_t *expect_halves(const rig *r, const float *x, int64_t first, int64_t end, uint8_t *out) {
    for (int64_t i = first * r->d; i < end * r->d; i++, out += 2) {
        uint16_t half = kvq_half_of_float(x[i]);
        out[0] = (uint8_t)half;
        out[1] = (uint8_t)(half >> 8);
    }
    return out;
}

static inline uint8_t *expect_tensor(const rig *r, int tensor, int64_t layer, int64_t n, int64_t coded, const float *x,
                                     float *decoded, uint8_t *out) {
    const kvq_layer_quant  *l = &r->artifact->layers[layer];
    const kvq_tensor_quant *t = tensor == 0 ? &l->k : &l->v;
    int64_t                 sinks = r->with.sinks < n ? r->with.sinks : n, waiting = sinks + coded;
    for (int64_t i = 0; i < n * r->d; i++) decoded[i] = half_of(x[i]);
    out = expect_halves(r, x, 0, sinks, out);
    if (r->with.tiled) {
        out = expect_tiles(r, t, coded, decoded, out);
        waiting = n / TILE * TILE > sinks ? n / TILE * TILE : sinks;
    } else {
        out = expect_rows(r, t, r->with.n_side, coded, x, decoded, out);
    }
    return expect_halves(r, x, waiting, n, out);
}

static inline void put_number(uint8_t *out, int index, int64_t number) {
    for (int i = 0; i < 8; i++) out[8 + 8 * index + i] = (uint8_t)((uint64_t)number >> 8 * i);
}

// Puts the right hash at the end of bytes.
static inline void seal(uint8_t *bytes, int64_t n) {
    char hex[KVQ_SHA256_HEX];
    kvq_test_ok(kvq_sha256_of(bytes, (size_t)(n - SEAL), hex, NULL), NULL);
    memcpy(bytes + n - SEAL, hex, SEAL);
}

// How many are coded when no flush came.
static inline int64_t coded_of(const rig *r, int64_t n) {
    int64_t rows = n - r->with.sinks - r->with.recent;
    return r->with.tiled ? n / TILE * TILE : rows > 0 ? rows : 0;
}

// The same right after a flush.
static inline int64_t flushed_of(const rig *r, int64_t n) {
    return r->with.tiled ? n : n > r->with.sinks ? n - r->with.sinks : 0;
}

// release with free
static inline uint8_t *saved(const kvq_packed_layer *cache, int64_t *n) {
    kvq_error err = {0};
    *n = kvq_packed_layer_saved_bytes(cache);
    uint8_t *bytes = malloc((size_t)*n + 1);
    bytes[*n] = 0xa5;
    kvq_test_ok(kvq_packed_layer_save(cache, bytes, &err), &err);
    ck_assert_uint_eq(bytes[*n], 0xa5);
    return bytes;
}

static inline void expect_same_bytes(const kvq_packed_layer *a, const kvq_packed_layer *b) {
    int64_t  n[2];
    uint8_t *bytes[2] = {saved(a, &n[0]), saved(b, &n[1])};
    ck_assert_int_eq(n[0], n[1]);
    ck_assert(memcmp(bytes[0], bytes[1], (size_t)n[0]) == 0);
    free(bytes[0]), free(bytes[1]);
}

// The cache of `layer` holds the first n tokens of x, `coded` of them coded: what it decodes to, and its bytes.
static inline void expect_cache(const rig *r, const kvq_packed_layer *cache, int64_t layer, int64_t n, int64_t coded,
                                float *const x[2]) {
    size_t   size = (size_t)(n * r->d) * sizeof(float);
    int64_t  n_bytes;
    uint8_t *bytes = saved(cache, &n_bytes), *expected = calloc(1, (size_t)n_bytes + 64 * MAX_ROW), *out;
    float   *decoded[2] = {malloc(size + 1), malloc(size + 1)}, *wanted = malloc(size + 1);
    int64_t  numbers[] = {
         1, r->with.tiled, layer, r->d, r->with.head_dim, r->with.sinks, r->artifact->quantizer.recent_tokens, n, coded};
    ck_assert_int_eq(kvq_packed_layer_length(cache), n);
    kvq_packed_layer_decode(r->be, cache, decoded[0], decoded[1]);
    memcpy(expected, "kvqlayer", 8);
    for (int i = 0; i < 9; i++) put_number(expected, i, numbers[i]);
    memcpy(expected + IDENTITY_AT, bytes + IDENTITY_AT, 64);
    out = expected + HEADER;
    for (int i = 0; i < 2; i++) {
        out = expect_tensor(r, i, layer, n, coded, x[i], wanted, out);
        ck_assert_msg(memcmp(decoded[i], wanted, size) == 0, "tensor %d of %d tokens", i, (int)n);
    }
    ck_assert_int_eq(n_bytes, out - expected + SEAL);
    seal(expected, n_bytes);
    ck_assert_msg(memcmp(bytes, expected, (size_t)n_bytes) == 0, "bytes of %d tokens", (int)n);
    free(bytes), free(expected), free(decoded[0]), free(decoded[1]), free(wanted);
}

#endif
