// SPDX-License-Identifier: Apache-2.0
//
// One layer's packed cache of one sequence; see kvq_decoder.h. Its first tokens are sinks; how the others are stored,
// as rows or in tiles, is a matter of packed_rows.c and packed_tiles.c.
//
// An append first does all that can fail, for K and for V: it makes room, looks at every number, and encodes what will
// be encoded into places that are not in use yet. Only then it changes what is there.
#include <string.h>

#include "packed_impl.h"

static kvq_status check_place(const kvq_artifact *artifact, int64_t layer, int64_t capacity, kvq_error *err) {
    if (layer < 0 || layer >= artifact->model.n_layers) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "layer %lld of an artifact of %lld layers", (long long)layer,
                        (long long)artifact->model.n_layers);
    }
    if (capacity >= 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "layer %lld: a cache of %lld tokens", (long long)layer,
                    (long long)capacity);
}

kvq_status kvq_packed_layer_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t layer,
                                   int64_t capacity, kvq_packed_layer **out, kvq_error *err) {
    kvq_packed_layer *cache = NULL;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(check_place(artifact, layer, capacity, err));
    KVQ_TRY(KVQ_NEW(ctx, 1, "packed cache", &cache, err));
    cache->ctx = ctx;
    cache->artifact = artifact;
    cache->layer = layer;
    cache->capacity = capacity;
    cache->d = (int)(artifact->model.n_kv_heads * artifact->model.head_dim);
    cache->n_sinks = packed_smaller(artifact->quantizer.sink_tokens, capacity);
    cache->tiled = kvq_artifact_is_allocated(artifact);
    for (int i = 0; i < 2; i++) KVQ_TRY(KVQ_NEW(ctx, cache->n_sinks * cache->d, "sink tokens", &cache->sinks[i], err));
    KVQ_TRY(cache->tiled ? packed_tiles_create(cache, artifact, err) : packed_rows_create(cache, artifact, err));
    *out = cache;
    cache = NULL;

done:
    kvq_packed_layer_destroy(ctx, &cache);
    return status;
}

void kvq_packed_layer_destroy(const kvq_context *ctx, kvq_packed_layer **cache) {
    if (*cache == NULL) return;
    for (int i = 0; i < 2; i++) {
        kvq_free(ctx, (*cache)->sinks[i]);
        packed_pages_destroy(ctx, &(*cache)->pages[i]);
    }
    packed_rows_destroy(*cache);
    packed_tiles_destroy(*cache);
    kvq_free(ctx, *cache);
    *cache = NULL;
}

void kvq_packed_layer_reset(kvq_packed_layer *cache) {
    cache->length = cache->rows.n_rows = 0;
    cache->tiles.flushed = false;
}

// ---------------------------------------------------------------- append

kvq_status packed_does_not_fit(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, int64_t position,
                               kvq_error *err) {
    kvq_status status = be->check(be, err);
    if (status != KVQ_OK) return status;
    return kvq_fail(err, KVQ_ERR_NUMERICAL,
                    "this model's activations need more than 16-bit floats; kvq cannot store them",
                    "layer %lld, %s, position %lld: a number does not fit into f16", (long long)cache->layer,
                    tensor == 0 ? "K" : "V", (long long)position);
}

static kvq_status prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x, int64_t n,
                          kvq_error *err) {
    int64_t bad = be->store_halves(be, x, packed_sinks(cache, cache->length, n) * cache->d, NULL);
    if (bad >= 0) return packed_does_not_fit(be, cache, tensor, cache->length + bad / cache->d, err);
    return cache->tiled ? packed_tiles_prepare(be, cache, tensor, x, n, err)
                        : packed_rows_prepare(be, cache, tensor, x, n, err);
}

static void commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n) {
    int64_t d = cache->d;
    (void)be->store_halves(be, x, packed_sinks(cache, cache->length, n) * d,
                           cache->sinks[tensor] + packed_smaller(cache->length, cache->n_sinks) * d);
    if (cache->tiled)
        packed_tiles_commit(be, cache, tensor, x, n);
    else
        packed_rows_commit(be, cache, tensor, x, n);
}

kvq_status kvq_packed_layer_append(const kvq_backend *be, kvq_packed_layer *cache, const float *k, const float *v,
                                   int64_t n, kvq_error *err) {
    if (n < 0 || n > cache->capacity - cache->length) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "layer %lld: %lld tokens do not fit behind %lld in a cache of %lld",
                        (long long)cache->layer, (long long)n, (long long)cache->length, (long long)cache->capacity);
    }
    kvq_status status = KVQ_OK;
    KVQ_TRY(cache->tiled ? packed_tiles_reserve(cache, n, err) : packed_rows_reserve(cache, n, err));
    KVQ_TRY(prepare(be, cache, 0, k, n, err));
    KVQ_TRY(prepare(be, cache, 1, v, n, err));
    commit(be, cache, 0, k, n);
    commit(be, cache, 1, v, n);
    if (!cache->tiled) packed_rows_advance(cache, n);
    if (n > 0) cache->tiles.flushed = false; // a tile that was closed early is open again
    cache->length += n;

done:
    return status;
}

kvq_status kvq_packed_layer_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err) {
    return cache->tiled ? packed_tiles_flush(be, cache, err) : packed_rows_flush(be, cache, err);
}

// ---------------------------------------------------------------- copy

// Pages in use.
static int64_t used_pages(const kvq_packed_layer *cache) {
    return cache->tiled ? cache->length / KVQ_TILE_TOKENS : packed_pages_for(cache->rows.n_rows);
}

kvq_status packed_layer_reserve_like(kvq_packed_layer *to, const kvq_packed_layer *of, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++) KVQ_TRY(packed_pages_reserve(to->ctx, &to->pages[i], used_pages(of), err));
    if (of->tiles.flushed) KVQ_TRY(packed_tiles_reserve_closed(to, err));

done:
    return status;
}

void packed_layer_assign(kvq_packed_layer *to, const kvq_packed_layer *from) {
    to->length = from->length;
    for (int i = 0; i < 2; i++) {
        int64_t bytes = used_pages(from) * from->pages[i].page_bytes;
        memcpy(to->sinks[i], from->sinks[i], (size_t)packed_half_bytes(to, packed_sinks(to, 0, to->length)));
        for (int64_t at = 0, run; at < bytes; at += run) {
            const uint8_t *piece = packed_pages_at(&from->pages[i], at, bytes - at, &run);
            packed_pages_put(&to->pages[i], at, run, piece);
        }
    }
    if (to->tiled)
        packed_tiles_copied(to, from);
    else
        packed_rows_copied(to, from);
}

kvq_status kvq_packed_layer_copy(const kvq_context *ctx, const kvq_packed_layer *cache, kvq_packed_layer **out,
                                 kvq_error *err) {
    kvq_packed_layer *copy = NULL;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(kvq_packed_layer_create(ctx, cache->artifact, cache->layer, cache->capacity, &copy, err));
    KVQ_TRY(packed_layer_reserve_like(copy, cache, err));
    packed_layer_assign(copy, cache);
    *out = copy;
    copy = NULL;

done:
    kvq_packed_layer_destroy(ctx, &copy);
    return status;
}

// ---------------------------------------------------------------- read

void kvq_packed_layer_decode(const kvq_backend *be, const kvq_packed_layer *cache, float *k, float *v) {
    float *const to[2] = {k, v};
    for (int i = 0; i < 2; i++) {
        be->load_halves(be, cache->sinks[i], packed_smaller(cache->length, cache->n_sinks) * cache->d, to[i]);
        if (cache->tiled)
            packed_tiles_decode(be, cache, i, to[i]);
        else
            packed_rows_decode(be, cache, i, to[i]);
    }
}

kvq_status kvq_packed_layer_prefill(const kvq_backend *be, kvq_packed_layer *cache, int64_t n, float *k, float *v,
                                    float *k_recent, float *v_recent, kvq_error *err) {
    kvq_status status = KVQ_OK;
    kvq_packed_layer_reset(cache);
    KVQ_TRY(kvq_packed_layer_append(be, cache, k, v, n, err));
    KVQ_TRY(kvq_packed_layer_flush(be, cache, err));
    if (k_recent != NULL) {
        be->copy(be, k_recent, k, n * cache->d);
        be->copy(be, v_recent, v, n * cache->d);
        be->round_halves(be, k_recent, n * cache->d);
        be->round_halves(be, v_recent, n * cache->d);
    }
    kvq_packed_layer_decode(be, cache, k, v);

done:
    return status;
}

int64_t kvq_packed_layer_length(const kvq_packed_layer *cache) { return cache->length; }

int64_t kvq_packed_layer_bytes(const kvq_packed_layer *cache) {
    int64_t sinks = 2 * packed_half_bytes(cache, packed_sinks(cache, 0, cache->length));
    return sinks + (cache->tiled ? packed_tiles_bytes(cache) : packed_rows_bytes(cache));
}

int64_t kvq_packed_layer_held_bytes(const kvq_packed_layer *cache) {
    int64_t bytes =
        2 * packed_half_bytes(cache, cache->n_sinks + (cache->tiled ? KVQ_TILE_TOKENS : cache->rows.n_recent));
    for (int i = 0; i < 2; i++) {
        bytes += cache->pages[i].n_pages * cache->pages[i].page_bytes;
        if (cache->tiles.closed[i] != NULL) bytes += kvq_tile_bytes(&cache->tiles.views[i].spec);
    }
    return bytes;
}

kvq_row_counts kvq_packed_layer_count(const kvq_packed_layer *cache, int tensor, const float *host_x) {
    return cache->tiled ? packed_tiles_count(cache, tensor, host_x) : packed_rows_count(cache, tensor, host_x);
}
