// SPDX-License-Identifier: Apache-2.0
//
// Tokens in tiles of 128 positions. Tile i holds positions [128 i, 128 i + 128), also those of sinks, which are not
// coded there, so that pages and tiles are the same thing. The tokens of the last, incomplete tile wait in f16 and are
// encoded, from those values, when it is full.
#include <string.h>

#include "packed_impl.h"

#define TILE         KVQ_TILE_TOKENS
#define STAGED_TILES 8 // encoded together

static int64_t tile_bytes(const kvq_packed_layer *cache, int tensor) {
    return kvq_tile_bytes(&cache->tiles.views[tensor].spec);
}

kvq_status packed_tiles_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err) {
    const kvq_layer_quant  *layer = &artifact->layers[cache->layer];
    const kvq_tensor_quant *quants[2] = {&layer->k, &layer->v};
    packed_tiles           *t = &cache->tiles;
    kvq_status              status = KVQ_OK;
    for (int i = 0; i < 2; i++) {
        KVQ_TRY(kvq_tile_view_create(cache->ctx, artifact, quants[i], &t->views[i], err));
        int64_t bytes = tile_bytes(cache, i); // 0 where keys have neither codes nor outliers, which a page cannot
        KVQ_TRY(packed_pages_create(cache->ctx, bytes > 0 ? bytes : 1, packed_pages_for(cache->capacity),
                                    &cache->pages[i], err));
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
        kvq_free(cache->ctx, t->open[i]);
        kvq_free(cache->ctx, t->closed[i]);
        kvq_free(cache->ctx, t->row[i]);
    }
}

static int64_t whole(int64_t n_tokens) { return n_tokens / TILE * TILE; }

// Pages of tiles [first, first + *n) that lie in one piece, *n up to n_wanted.
static uint8_t *pages_at(const kvq_packed_layer *cache, int tensor, int64_t first, int64_t n_wanted, int64_t *n) {
    const packed_pages *pages = &cache->pages[tensor];
    int64_t             run;
    uint8_t            *tiles = packed_pages_at(pages, first * pages->page_bytes, n_wanted * pages->page_bytes, &run);
    *n = run / pages->page_bytes;
    return tiles;
}

uint8_t *packed_tiles_at(const kvq_packed_layer *cache, int tensor, int64_t i) {
    int64_t n;
    return i < cache->length / TILE ? pages_at(cache, tensor, i, 1, &n) : cache->tiles.closed[tensor];
}

// ---------------------------------------------------------------- append

kvq_status packed_tiles_reserve(kvq_packed_layer *cache, int64_t n, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++)
        KVQ_TRY(packed_pages_reserve(cache->ctx, &cache->pages[i], (cache->length + n) / TILE, err));

done:
    return status;
}

// Encodes the positions [first, end), first at the start of a tile, into tiles that lie in one piece; those before
// `length` are in the open tile, the others in x. staged [end - first, d]
static kvq_status encode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                         int64_t first, int64_t end, float *staged, uint8_t *tiles, kvq_error *err) {
    int64_t    d = cache->d, n = end - first, bad = -1;
    int64_t    waiting = cache->length > first ? packed_smaller(cache->length - first, n) : 0; // in the open tile
    kvq_status status = KVQ_OK;
    be->load_halves(be, cache->tiles.open[tensor], waiting * d, staged);
    if (n > waiting) be->copy(be, staged + waiting * d, x + (first + waiting - cache->length) * d, (n - waiting) * d);
    be->round_halves(be, staged, n * d);
    KVQ_TRY(be->encode_tiles(be, &cache->tiles.views[tensor].spec, staged, packed_sinks(cache, first, n), n, tiles,
                             &bad, err));
    if (bad >= 0) KVQ_TRY(packed_does_not_fit(be, cache, tensor, first + bad, err));

done:
    return status;
}

// All tiles that n tokens x behind the `length` complete.
static kvq_status encode_completed(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                                   int64_t n, kvq_error *err) {
    int64_t    tile = cache->length / TILE, end = (cache->length + n) / TILE;
    float     *staged = NULL;
    kvq_status status = KVQ_OK;
    if (tile >= end) return KVQ_OK;
    KVQ_TRY(be->alloc(be, packed_smaller(STAGED_TILES, end - tile) * TILE * cache->d, "tokens of tiles", &staged, err));
    for (int64_t run; tile < end; tile += run) {
        uint8_t *tiles = pages_at(cache, tensor, tile, packed_smaller(end - tile, STAGED_TILES), &run);
        KVQ_TRY(encode(be, cache, tensor, x, tile * TILE, (tile + run) * TILE, staged, tiles, err));
    }

done:
    be->release(be, staged);
    return status;
}

kvq_status packed_tiles_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                                int64_t n, kvq_error *err) {
    int64_t bad = be->store_halves(be, x, n * cache->d, NULL);
    if (bad >= 0) return packed_does_not_fit(be, cache, tensor, cache->length + bad / cache->d, err);
    return encode_completed(be, cache, tensor, x, n, err);
}

void packed_tiles_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n) {
    int64_t open = whole(cache->length + n), from = cache->length > open ? cache->length : open;
    int64_t d = cache->d;
    (void)be->store_halves(be, x + (from - cache->length) * d, (cache->length + n - from) * d,
                           cache->tiles.open[tensor] + (from - open) * d);
}

kvq_status packed_tiles_reserve_closed(kvq_packed_layer *cache, kvq_error *err) {
    packed_tiles *t = &cache->tiles;
    kvq_status    status = KVQ_OK;
    for (int i = 0; i < 2; i++) {
        if (t->closed[i] == NULL) KVQ_TRY(KVQ_NEW(cache->ctx, tile_bytes(cache, i), "closed tile", &t->closed[i], err));
    }

done:
    return status;
}

// Coding a tile that is closed already gives the bytes that it has.
kvq_status packed_tiles_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err) {
    int64_t    first = whole(cache->length), n = cache->length - first;
    float     *staged = NULL;
    kvq_status status = KVQ_OK;
    if (n == 0) return KVQ_OK;
    KVQ_TRY(packed_tiles_reserve_closed(cache, err));
    KVQ_TRY(be->alloc(be, n * cache->d, "tokens of a tile", &staged, err));
    for (int i = 0; i < 2; i++)
        KVQ_TRY(encode(be, cache, i, NULL, first, cache->length, staged, cache->tiles.closed[i], err));
    cache->tiles.flushed = true;

done:
    be->release(be, staged);
    return status;
}

void packed_tiles_copied(kvq_packed_layer *to, const kvq_packed_layer *from) {
    int64_t n_open = from->length - whole(from->length);
    to->tiles.flushed = from->tiles.flushed;
    for (int i = 0; i < 2; i++) {
        memcpy(to->tiles.open[i], from->tiles.open[i], (size_t)packed_half_bytes(to, n_open));
        if (to->tiles.flushed) memcpy(to->tiles.closed[i], from->tiles.closed[i], (size_t)tile_bytes(to, i));
    }
}

// ---------------------------------------------------------------- read

int64_t packed_tiles_coded(const kvq_packed_layer *cache) {
    return cache->tiles.flushed ? cache->length : whole(cache->length);
}

void packed_tiles_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x) {
    const packed_tiles  *t = &cache->tiles;
    const kvq_tile_spec *spec = &t->views[tensor].spec;
    int64_t              end = whole(cache->length), n_open = cache->length - end, d = cache->d;
    for (int64_t tile = 0, run; tile < end / TILE; tile += run) {
        const uint8_t *tiles = pages_at(cache, tensor, tile, end / TILE - tile, &run);
        int64_t        first = tile * TILE;
        be->decode_tiles(be, spec, tiles, packed_sinks(cache, first, run * TILE), run * TILE, x + first * d);
    }
    int64_t sinks = packed_sinks(cache, end, n_open);
    if (t->flushed)
        be->decode_tiles(be, spec, t->closed[tensor], sinks, n_open, x + end * d);
    else
        be->load_halves(be, t->open[tensor] + sinks * d, (n_open - sinks) * d, x + (end + sinks) * d);
}

// Sinks are in f16 already when they lie in the open tile.
int64_t packed_tiles_bytes(const kvq_packed_layer *cache) {
    int64_t end = packed_tiles_coded(cache), sinks = packed_smaller(cache->length, cache->n_sinks);
    int64_t open = cache->length - (end > sinks ? end : sinks);
    return packed_pages_for(end) * (tile_bytes(cache, 0) + tile_bytes(cache, 1)) + 2 * packed_half_bytes(cache, open);
}

static int count_beyond(const kvq_packed_layer *cache, int tensor, const float *x) {
    float *row = cache->tiles.row[tensor];
    for (int c = 0; c < cache->d; c++) row[c] = kvq_float_of_half(kvq_half_of_float(x[c]));
    return kvq_tile_count_beyond(&cache->tiles.views[tensor].spec, row, 0, 1);
}

kvq_row_counts packed_tiles_count(const kvq_packed_layer *cache, int tensor, const float *host_x) {
    const kvq_tile_spec *spec = &cache->tiles.views[tensor].spec;
    int64_t              end = packed_tiles_coded(cache), first = packed_smaller(end, cache->n_sinks);
    kvq_row_counts       counts = {.n_elements = (end - first) * cache->d};
    for (int64_t i = 0; i < packed_pages_for(end); i++)
        counts.n_outliers += kvq_tile_count_outliers(spec, packed_tiles_at(cache, tensor, i));
    for (int64_t p = first; p < end; p++) counts.n_clipped += count_beyond(cache, tensor, host_x + p * cache->d);
    counts.n_clipped -= counts.n_outliers;
    return counts;
}
