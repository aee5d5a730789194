// SPDX-License-Identifier: Apache-2.0
//
// Tokens in tiles of 128 positions. Tile i holds positions [128 i, 128 i + 128), also those of sinks, which are not
// coded there, so that pages and tiles are the same thing. The tokens of the last, incomplete tile wait in f16 and are
// encoded, from those values, when it is full.
#include "packed_impl.h"

#define TILE         KVQ_TILE_TOKENS
#define STAGED_TILES 8 // encoded together

kvq_status packed_tiles_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err) {
    const kvq_layer_quant  *layer = &artifact->layers[cache->layer];
    const kvq_tensor_quant *quants[2] = {&layer->k, &layer->v};
    packed_tiles           *t = &cache->tiles;
    int64_t                 n_tiles = (cache->capacity + TILE - 1) / TILE;
    kvq_status              status = KVQ_OK;
    for (int i = 0; i < 2; i++) {
        KVQ_TRY(kvq_tile_view_create(cache->ctx, artifact, quants[i], &t->views[i], err));
        KVQ_TRY(KVQ_NEW(cache->ctx, n_tiles * kvq_tile_bytes(&t->views[i].spec), "tiles", &t->tiles[i], err));
        KVQ_TRY(KVQ_NEW(cache->ctx, (int64_t)TILE * cache->d, "open tile", &t->open[i], err));
        KVQ_TRY(KVQ_NEW(cache->ctx, cache->d, "a token", &t->row[i], err));
    }

done:
    return status;
}

void packed_tiles_destroy(kvq_packed_layer *cache) {
    packed_tiles *t = &cache->tiles;
    for (int i = 0; i < 2; i++) {
        kvq_tile_view_free(cache->ctx, &t->views[i]);
        kvq_free(cache->ctx, t->tiles[i]);
        kvq_free(cache->ctx, t->open[i]);
        kvq_free(cache->ctx, t->row[i]);
    }
}

static int64_t whole(int64_t n_tokens) { return n_tokens / TILE * TILE; }

// ---------------------------------------------------------------- append

// Encodes the positions [first, end), first at the start of a tile; those before `length` are in the open tile, the
// others in x.
static kvq_status encode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                         int64_t first, int64_t end, kvq_error *err) {
    const packed_tiles *t = &cache->tiles;
    int64_t             d = cache->d, bytes = kvq_tile_bytes(&t->views[tensor].spec), bad = -1, n;
    float              *staged = NULL;
    kvq_status          status = KVQ_OK;
    if (first >= end) return KVQ_OK;
    KVQ_TRY(be->alloc(be, packed_smaller(STAGED_TILES * TILE, end - first) * d, "tokens of tiles", &staged, err));
    for (; first < end; first += n) {
        n = packed_smaller(end - first, STAGED_TILES * TILE);
        int64_t waiting = cache->length > first ? packed_smaller(cache->length - first, n) : 0; // in the open tile
        int64_t sinks = cache->n_sinks > first ? packed_smaller(cache->n_sinks - first, n) : 0;
        packed_load_halves(be, t->open[tensor], waiting * d, staged);
        if (n > waiting)
            be->copy(be, staged + waiting * d, x + (first + waiting - cache->length) * d, (n - waiting) * d);
        packed_round_to_half(be, staged, n * d);
        KVQ_TRY(be->encode_tiles(be, &t->views[tensor].spec, staged, sinks, n, t->tiles[tensor] + first / TILE * bytes,
                                 &bad, err));
        if (bad >= 0) KVQ_TRY(packed_does_not_fit(cache, tensor, first + bad, err));
    }

done:
    be->release(be, staged);
    return status;
}

kvq_status packed_tiles_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                                int64_t n, kvq_error *err) {
    int64_t bad = packed_store_halves(be, x, n * cache->d, NULL);
    if (bad >= 0) return packed_does_not_fit(cache, tensor, cache->length + bad / cache->d, err);
    return encode(be, cache, tensor, x, whole(cache->length), whole(cache->length + n), err);
}

void packed_tiles_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n) {
    int64_t open = whole(cache->length + n), from = cache->length > open ? cache->length : open;
    int64_t d = cache->d;
    (void)packed_store_halves(be, x + (from - cache->length) * d, (cache->length + n - from) * d,
                              cache->tiles.open[tensor] + (from - open) * d);
}

kvq_status packed_tiles_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++) KVQ_TRY(encode(be, cache, i, NULL, whole(cache->length), cache->length, err));
    cache->tiles.flushed = true;

done:
    return status;
}

// ---------------------------------------------------------------- read

static int64_t coded(const kvq_packed_layer *cache) {
    return cache->tiles.flushed ? cache->length : whole(cache->length);
}

void packed_tiles_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x) {
    const packed_tiles *t = &cache->tiles;
    int64_t             end = coded(cache), first = packed_smaller(end, cache->n_sinks), d = cache->d;
    int64_t             behind = end > cache->n_sinks ? end : packed_smaller(cache->length, cache->n_sinks);
    be->decode_tiles(be, &t->views[tensor].spec, t->tiles[tensor], first, end, x);
    packed_load_halves(be, t->open[tensor] + (behind - whole(cache->length)) * d, (cache->length - behind) * d,
                       x + behind * d);
}

// Sinks are in f16 already when they lie in the open tile.
int64_t packed_tiles_bytes(const kvq_packed_layer *cache) {
    const packed_tiles *t = &cache->tiles;
    int64_t             end = coded(cache), sinks = packed_smaller(cache->length, cache->n_sinks);
    int64_t             open = cache->length - (end > sinks ? end : sinks);
    int64_t             tile = kvq_tile_bytes(&t->views[0].spec) + kvq_tile_bytes(&t->views[1].spec);
    return (end + TILE - 1) / TILE * tile + open * 2 * cache->d * (int64_t)sizeof(uint16_t);
}

static int count_beyond(const kvq_packed_layer *cache, int tensor, const float *x) {
    float *row = cache->tiles.row[tensor];
    for (int c = 0; c < cache->d; c++) row[c] = kvq_float_of_half(kvq_half_of_float(x[c]));
    return kvq_tile_count_beyond(&cache->tiles.views[tensor].spec, row, 0, 1);
}

kvq_row_counts packed_tiles_count(const kvq_packed_layer *cache, int tensor, const float *host_x) {
    const packed_tiles  *t = &cache->tiles;
    const kvq_tile_spec *spec = &t->views[tensor].spec;
    int64_t              end = coded(cache), first = packed_smaller(end, cache->n_sinks);
    kvq_row_counts       counts = {.n_elements = (end - first) * cache->d};
    for (int64_t i = 0; i < (end + TILE - 1) / TILE; i++)
        counts.n_outliers += kvq_tile_count_outliers(spec, t->tiles[tensor] + i * kvq_tile_bytes(spec));
    for (int64_t p = first; p < end; p++) counts.n_clipped += count_beyond(cache, tensor, host_x + p * cache->d);
    counts.n_clipped -= counts.n_outliers;
    return counts;
}
