// SPDX-License-Identifier: Apache-2.0
// The packed caches of all layers of several sequences.
#include "packed_impl.h"

struct kvq_packed_cache {
    int64_t            n_sequences, n_layers;
    kvq_packed_layer **layers; // [n_sequences, n_layers]
};

kvq_status kvq_packed_cache_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t n_sequences,
                                   int64_t capacity, kvq_packed_cache **out, kvq_error *err) {
    kvq_packed_cache *cache = NULL;
    kvq_status        status = KVQ_OK;
    if (n_sequences < 0) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a cache of %lld sequences", (long long)n_sequences);
    KVQ_TRY(KVQ_NEW(ctx, 1, "packed cache", &cache, err));
    cache->n_layers = artifact->model.n_layers;
    KVQ_TRY(kvq_alloc(ctx, n_sequences, (size_t)cache->n_layers * sizeof *cache->layers, "layers of sequences",
                      &cache->layers, err));
    cache->n_sequences = n_sequences;
    for (int64_t i = 0; i < n_sequences * cache->n_layers; i++)
        KVQ_TRY(kvq_packed_layer_create(ctx, artifact, i % cache->n_layers, capacity, &cache->layers[i], err));
    *out = cache;
    cache = NULL;

done:
    kvq_packed_cache_destroy(ctx, &cache);
    return status;
}

void kvq_packed_cache_destroy(const kvq_context *ctx, kvq_packed_cache **cache) {
    if (*cache == NULL) return;
    for (int64_t i = 0; i < (*cache)->n_sequences * (*cache)->n_layers; i++)
        kvq_packed_layer_destroy(ctx, &(*cache)->layers[i]);
    kvq_free(ctx, (*cache)->layers);
    kvq_free(ctx, *cache);
    *cache = NULL;
}

kvq_packed_layer *kvq_packed_cache_layer(const kvq_packed_cache *cache, int64_t sequence, int64_t layer) {
    if (sequence < 0 || sequence >= cache->n_sequences || layer < 0 || layer >= cache->n_layers) return NULL;
    return cache->layers[sequence * cache->n_layers + layer];
}

static kvq_status check_sequence(const kvq_packed_cache *cache, int64_t sequence, kvq_error *err) {
    if (sequence >= 0 && sequence < cache->n_sequences) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "sequence %lld of a cache of %lld sequences", (long long)sequence,
                    (long long)cache->n_sequences);
}

kvq_status kvq_packed_cache_reset(kvq_packed_cache *cache, int64_t sequence, kvq_error *err) {
    kvq_status status = check_sequence(cache, sequence, err);
    for (int64_t l = 0; l < cache->n_layers && status == KVQ_OK; l++)
        kvq_packed_layer_reset(kvq_packed_cache_layer(cache, sequence, l));
    return status;
}

kvq_status kvq_packed_cache_copy(kvq_packed_cache *cache, int64_t from, int64_t to, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(check_sequence(cache, from, err));
    KVQ_TRY(check_sequence(cache, to, err));
    if (from == to) return KVQ_OK;
    for (int64_t l = 0; l < cache->n_layers; l++)
        KVQ_TRY(packed_layer_reserve_like(kvq_packed_cache_layer(cache, to, l), kvq_packed_cache_layer(cache, from, l),
                                          err));
    for (int64_t l = 0; l < cache->n_layers; l++)
        packed_layer_assign(kvq_packed_cache_layer(cache, to, l), kvq_packed_cache_layer(cache, from, l));

done:
    return status;
}

int64_t kvq_packed_cache_bytes(const kvq_packed_cache *cache) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < cache->n_sequences * cache->n_layers; i++)
        bytes += kvq_packed_layer_bytes(cache->layers[i]);
    return bytes;
}

int64_t kvq_packed_cache_held_bytes(const kvq_packed_cache *cache) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < cache->n_sequences * cache->n_layers; i++)
        bytes += kvq_packed_layer_held_bytes(cache->layers[i]);
    return bytes;
}
