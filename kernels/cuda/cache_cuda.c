// SPDX-License-Identifier: Apache-2.0
//
// The packed caches of the backend's table: those of kvq_cuda_cache.h on the backend's stream. A refused launch, or a
// device that fails, is kept as the backend's failure, as for every other entry.
#include "cuda_impl.h"
#include "kvq_cuda_cache.h"

static kvq_cuda_cache *inner(kvq_device_cache *cache) { return (kvq_cuda_cache *)cache; }

static const kvq_cuda_cache *inner_const(const kvq_device_cache *cache) { return (const kvq_cuda_cache *)cache; }

// Starts something unless the backend has failed before.
#define CACHE_RUN(c, function, ...)                                                                                    \
    (atomic_load(&(c)->failed) ? (c)->table.check(&(c)->table, err)                                                    \
                               : noted((c), function(__VA_ARGS__, (c)->stream, err), err))

// err may be NULL, the backend's record of a failure may not be empty.
static kvq_status noted(cuda_backend *c, kvq_status status, const kvq_error *err) {
    kvq_error unnamed = {KVQ_ERR_INTERNAL, "the device failed in a packed cache", ""};
    if (status == KVQ_ERR_INTERNAL) (void)cuda_note(c, status, err != NULL ? err : &unnamed);
    return status;
}

static kvq_status create(const kvq_backend *be, const kvq_cache_layer *layer, kvq_device_cache **out, kvq_error *err) {
    cuda_backend   *c = cuda_of(be);
    kvq_cuda_cache *cache = NULL;
    kvq_status      status = kvq_cuda_cache_create(c->device, be->ctx, layer, &cache, err);
    if (status == KVQ_OK) *out = (kvq_device_cache *)cache;
    return noted(c, status, err);
}

static void destroy(const kvq_backend *be, kvq_device_cache **cache) {
    kvq_cuda_cache *own = inner(*cache);
    (void)be;
    kvq_cuda_cache_destroy(&own);
    *cache = NULL;
}

static kvq_status append(const kvq_backend *be, kvq_device_cache *cache, int sequence, const float *k, const float *v,
                         int64_t n, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    return CACHE_RUN(c, kvq_cuda_cache_append, inner(cache), sequence, k, v, n);
}

static kvq_status reset(const kvq_backend *be, kvq_device_cache *cache, int sequence, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    return CACHE_RUN(c, kvq_cuda_cache_reset, inner(cache), sequence);
}

static kvq_status attend(const kvq_backend *be, kvq_device_cache *cache, const kvq_cache_query *query, const float *q,
                         float *out, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    return CACHE_RUN(c, kvq_cuda_cache_attend, inner(cache), query, q, out);
}

static kvq_status check(const kvq_backend *be, kvq_device_cache *cache, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    return CACHE_RUN(c, kvq_cuda_cache_check, inner(cache), NULL);
}

static int64_t part_bytes(const kvq_device_cache *cache, int sequence, int tensor, kvq_cache_part part) {
    return kvq_cuda_cache_part_bytes(inner_const(cache), sequence, tensor, part);
}

static kvq_status read_part(const kvq_backend *be, kvq_device_cache *cache, int sequence, int tensor,
                            kvq_cache_part part, void *host, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    return CACHE_RUN(c, kvq_cuda_cache_read, inner(cache), sequence, tensor, part, host);
}

static int64_t held_bytes(const kvq_device_cache *cache) { return kvq_cuda_cache_held_bytes(inner_const(cache)); }

const kvq_cache_functions cuda_cache_functions = {
    .create = create,
    .destroy = destroy,
    .append = append,
    .reset = reset,
    .attend = attend,
    .check = check,
    .part_bytes = part_bytes,
    .read = read_part,
    .held_bytes = held_bytes,
};
