// SPDX-License-Identifier: Apache-2.0
// Artifacts and filled caches for test_cuda_attention.cpp; see attention_rig.h.
#include "attention_rig.h"

#include "packed_rig.h"

// `rig` is that of an artifact of our own; its artifact is NULL where another one is described.
typedef struct owned {
    rig           rig;
    float        *ranges[2];
    kvq_tile_view views[2];
} owned;

static void refill(const rig *r, kvq_tensor_quant *t, int bits) {
    kvq_free(&r->ctx, t->codebook);
    kvq_free(&r->ctx, t->decode_levels);
    kvq_free(&r->ctx, t->lower);
    kvq_free(&r->ctx, t->upper);
    t->codebook = t->decode_levels = t->lower = t->upper = NULL;
    fill_rows(r, t, bits, t->axis, 0);
}

static void describe(const kvq_artifact *artifact, int64_t layer, owned *o, attention_rig *out) {
    const kvq_layer_quant  *l = &artifact->layers[layer];
    const kvq_tensor_quant *t[2] = {&l->k, &l->v};
    kvq_context             ctx = kvq_test_context();
    int                     d = out->with.n_kv_heads * out->with.head_dim;
    for (int i = 0; i < 2 && out->with.tiled; i++) {
        kvq_test_ok(kvq_tile_view_create(&ctx, artifact, t[i], &o->views[i], NULL), NULL);
        out->tiles[i] = o->views[i].spec;
        out->n_key_levels = (int)l->k.n_key_levels;
    }
    for (int i = 0; i < 2 && !out->with.tiled; i++) {
        o->ranges[i] = malloc((size_t)(3 * d) * sizeof(float));
        out->rows[i] = kvq_tensor_block_spec(t[i], d, out->with.n_side, o->ranges[i]);
    }
}

void attention_rig_open(const attention_setup *with, attention_rig *out) {
    owned *o = calloc(1, sizeof *o);
    setup  s = {.tiled = with->tiled,
                .n_heads = with->n_kv_heads,
                .head_dim = with->head_dim,
                .n_layers = 1,
                .sinks = with->sinks,
                .recent = with->recent,
                .n_side = with->n_side,
                .n_slots = with->n_slots,
                .dim = with->dim,
                .per_head = with->per_head};
    *out = (attention_rig){.with = *with, .owner = o};
    rig_open(&o->rig, s);
    kvq_layer_quant *l = &o->rig.artifact->layers[0];
    if (with->tiled) {
        l->v.scale_format = with->half_scales ? KVQ_SCALE_F16 : KVQ_SCALE_E4M3;
    } else {
        l->k.axis = with->swapped ? KVQ_AXIS_TOKEN : KVQ_AXIS_CHANNEL;
        l->v.axis = with->swapped ? KVQ_AXIS_CHANNEL : KVQ_AXIS_TOKEN;
        refill(&o->rig, &l->k, with->k_bits);
        refill(&o->rig, &l->v, with->v_bits);
    }
    describe(o->rig.artifact, 0, o, out);
}

void attention_rig_describe(const kvq_artifact *artifact, const attention_setup *with, int64_t layer,
                            attention_rig *out) {
    owned *o = calloc(1, sizeof *o);
    *out = (attention_rig){.with = *with, .owner = o};
    describe(artifact, layer, o, out);
}

void attention_rig_close(attention_rig *r) {
    owned      *o = r->owner;
    kvq_context ctx = kvq_test_context();
    for (int i = 0; i < 2; i++) {
        kvq_tile_view_free(&ctx, &o->views[i]);
        free(o->ranges[i]);
    }
    if (o->rig.artifact != NULL) rig_close(&o->rig);
    free(o);
}

kvq_packed_layer *attention_rig_cache(const attention_rig *r, int64_t capacity) {
    return new_cache(&((const owned *)r->owner)->rig, 0, capacity);
}

const kvq_backend *attention_rig_backend(const attention_rig *r) { return ((const owned *)r->owner)->rig.be; }

float *attention_rig_numbers(const attention_rig *r, int64_t n, uint32_t stream) {
    float *x = randoms(n, stream);
    for (int64_t i = 0; i < n; i++) x[i] *= r->with.spread;
    return x;
}

static int64_t number_at(const uint8_t *saved, int index) {
    uint64_t x = 0;
    for (int i = 0; i < 8; i++) x |= (uint64_t)saved[8 + 8 * index + i] << 8 * i;
    return (int64_t)x;
}

// Finds the parts of a saved cache, and that they are all of it.
static void find_parts(const attention_rig *r, int64_t n_bytes, attention_sequence *s) {
    int64_t  d = r->with.n_kv_heads * r->with.head_dim, n = s->length, sinks = r->with.sinks < n ? r->with.sinks : n;
    uint8_t *at = s->saved + HEADER;
    int64_t  whole = n / TILE * TILE, behind = whole > sinks ? whole : sinks;
    s->n_waiting = r->with.tiled ? n - behind : n - sinks - s->coded;
    for (int i = 0; i < 2; i++) {
        int64_t coded = r->with.tiled ? (s->coded + TILE - 1) / TILE * kvq_tile_bytes(&r->tiles[i])
                                      : s->coded * kvq_block_row_bytes(&r->rows[i]);
        s->parts[0][i] = at;
        s->parts[1][i] = s->parts[0][i] + sinks * d * 2;
        s->parts[2][i] = s->parts[1][i] + coded;
        at = s->parts[2][i] + s->n_waiting * d * 2;
    }
    ck_assert_int_eq(at + SEAL - s->saved, n_bytes);
}

void attention_sequence_of(const attention_rig *r, const kvq_backend *be, const kvq_packed_layer *cache,
                           attention_sequence *out) {
    size_t  size = (size_t)(kvq_packed_layer_length(cache) * r->with.n_kv_heads * r->with.head_dim) * sizeof(float);
    int64_t n_bytes;
    *out = (attention_sequence){.saved = saved(cache, &n_bytes), .k = malloc(size + 1), .v = malloc(size + 1)};
    kvq_packed_layer_decode(be, cache, out->k, out->v);
    out->length = number_at(out->saved, 7);
    out->coded = number_at(out->saved, 8);
    find_parts(r, n_bytes, out);
}

void attention_sequence_open(const attention_rig *r, int64_t n, uint32_t stream, attention_sequence *out) {
    const rig        *own = &((const owned *)r->owner)->rig;
    kvq_error         err = {0};
    kvq_packed_layer *cache = new_cache(own, 0, n);
    float            *x[2] = {attention_rig_numbers(r, n * own->d + 1, 2 * stream),
                              attention_rig_numbers(r, n * own->d + 1, 2 * stream + 1)};
    append(own, cache, x, 0, n / 3);
    append(own, cache, x, n / 3, n / 2);
    if (r->with.flush && stream % 2 == 0) kvq_test_ok(kvq_packed_layer_flush(own->be, cache, &err), &err);
    append(own, cache, x, n / 2, n);
    if (r->with.flush && stream % 2 == 1) kvq_test_ok(kvq_packed_layer_flush(own->be, cache, &err), &err);
    attention_sequence_of(r, own->be, cache, out);
    kvq_packed_layer_destroy(&own->ctx, &cache);
    free(x[0]), free(x[1]);
}

void attention_sequence_close(attention_sequence *sequence) {
    free(sequence->saved);
    free(sequence->k);
    free(sequence->v);
}
