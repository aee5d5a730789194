// SPDX-License-Identifier: Apache-2.0
// One layer's packed cache of one sequence; see kvq_decoder.h.
#include "kvq_decoder.h"

struct kvq_packed_layer {
    const kvq_context *ctx;
    int64_t            layer, capacity, length, n_sinks;
    int                d;
    kvq_block_spec     specs[2]; // K, V
    float             *z_and_r;  // of K, [2 d]
    uint16_t          *sinks[2]; // [n_sinks, d] f16
    uint8_t           *rows[2];  // [capacity - n_sinks, row_bytes]
    float             *staging;  // [n_sinks, d], between f16 and the backend
};

static const char *const TENSOR_NAME[2] = {"K", "V"};

kvq_status kvq_packed_layer_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t layer,
                                   int64_t capacity, kvq_packed_layer **out, kvq_error *err) {
    const kvq_layer_quant *quant = &artifact->layers[layer];
    kvq_packed_layer      *cache = NULL;
    kvq_status             status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "packed cache", &cache, err));
    cache->ctx = ctx;
    cache->layer = layer;
    cache->capacity = capacity;
    cache->d = (int)(artifact->model.n_kv_heads * artifact->model.head_dim);
    cache->n_sinks = artifact->quantizer.sink_tokens < capacity ? artifact->quantizer.sink_tokens : capacity;
    KVQ_TRY(KVQ_NEW(ctx, 2 * cache->d, "offsets and ranges", &cache->z_and_r, err));
    KVQ_TRY(KVQ_NEW(ctx, cache->n_sinks * cache->d, "sink staging", &cache->staging, err));
    cache->specs[0] = kvq_tensor_block_spec(&quant->k, cache->d, artifact->quantizer.n_side_k, cache->z_and_r);
    cache->specs[1] = kvq_tensor_block_spec(&quant->v, cache->d, artifact->quantizer.n_side_v, NULL);
    for (int i = 0; i < 2; i++) {
        KVQ_TRY(KVQ_NEW(ctx, cache->n_sinks * cache->d, "sink tokens", &cache->sinks[i], err));
        KVQ_TRY(KVQ_NEW(ctx, (capacity - cache->n_sinks) * kvq_block_row_bytes(&cache->specs[i]), "packed rows",
                        &cache->rows[i], err));
    }
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
        kvq_free(ctx, (*cache)->rows[i]);
    }
    kvq_free(ctx, (*cache)->z_and_r);
    kvq_free(ctx, (*cache)->staging);
    kvq_free(ctx, *cache);
    *cache = NULL;
}

void kvq_packed_layer_reset(kvq_packed_layer *cache) { cache->length = 0; }

static kvq_status does_not_fit(const kvq_packed_layer *cache, int tensor, int64_t position, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_NUMERICAL,
                    "this model's activations need more than 16-bit floats; kvq cannot store them",
                    "layer %lld, %s, position %lld: a number does not fit into f16", (long long)cache->layer,
                    TENSOR_NAME[tensor], (long long)position);
}

static kvq_status append_sinks(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n,
                               kvq_error *err) {
    uint16_t *to = cache->sinks[tensor] + cache->length * cache->d;
    be->download(be, cache->staging, x, n * cache->d);
    for (int64_t i = 0; i < n * cache->d; i++) {
        to[i] = kvq_half_of_float(cache->staging[i]);
        if ((to[i] & 0x7c00u) == 0x7c00u) return does_not_fit(cache, tensor, cache->length + i / cache->d, err);
    }
    return KVQ_OK;
}

static kvq_status append_tensor(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n,
                                kvq_error *err) {
    int64_t room = cache->n_sinks > cache->length ? cache->n_sinks - cache->length : 0;
    int64_t n_sinks = n < room ? n : room, first_row = cache->length + n_sinks - cache->n_sinks;
    if (n_sinks > 0) {
        kvq_status status = append_sinks(be, cache, tensor, x, n_sinks, err);
        if (status != KVQ_OK) return status;
    }
    if (n == n_sinks) return KVQ_OK;
    const kvq_block_spec *spec = &cache->specs[tensor];
    int64_t               bad = be->encode(be, spec, x + n_sinks * cache->d, n - n_sinks,
                                           cache->rows[tensor] + first_row * kvq_block_row_bytes(spec));
    return bad < 0 ? KVQ_OK : does_not_fit(cache, tensor, cache->length + n_sinks + bad, err);
}

kvq_status kvq_packed_layer_append(const kvq_backend *be, kvq_packed_layer *cache, const float *k, const float *v,
                                   int64_t n, kvq_error *err) {
    if (n < 0 || n > cache->capacity - cache->length) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "layer %lld: %lld tokens do not fit behind %lld in a cache of %lld",
                        (long long)cache->layer, (long long)n, (long long)cache->length, (long long)cache->capacity);
    }
    kvq_status status = append_tensor(be, cache, 0, k, n, err);
    if (status == KVQ_OK) status = append_tensor(be, cache, 1, v, n, err);
    if (status == KVQ_OK) cache->length += n;
    return status;
}

static void decode_tensor(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x) {
    int64_t n_sinks = cache->length < cache->n_sinks ? cache->length : cache->n_sinks;
    for (int64_t i = 0; i < n_sinks * cache->d; i++) cache->staging[i] = kvq_float_of_half(cache->sinks[tensor][i]);
    be->upload(be, x, cache->staging, n_sinks * cache->d);
    be->decode(be, &cache->specs[tensor], cache->rows[tensor], cache->length - n_sinks, x + n_sinks * cache->d);
}

void kvq_packed_layer_decode(const kvq_backend *be, const kvq_packed_layer *cache, float *k, float *v) {
    decode_tensor(be, cache, 0, k);
    decode_tensor(be, cache, 1, v);
}

int64_t kvq_packed_layer_length(const kvq_packed_layer *cache) { return cache->length; }

int64_t kvq_packed_layer_bytes(const kvq_packed_layer *cache) {
    int64_t n_sinks = cache->length < cache->n_sinks ? cache->length : cache->n_sinks;
    int64_t per_row = kvq_block_row_bytes(&cache->specs[0]) + kvq_block_row_bytes(&cache->specs[1]);
    return n_sinks * 2 * cache->d * (int64_t)sizeof(uint16_t) + (cache->length - n_sinks) * per_row;
}
