// SPDX-License-Identifier: Apache-2.0
//
// A packed cache on the emulated device as an engine has it: a device, a stream, numbers that travel, and the cache of
// an attention_rig's layer. What the emulator objects to fails the test, where a result is waited for.
#ifndef DEVICE_CACHE_RIG_H
#define DEVICE_CACHE_RIG_H

#include <string.h>

#include <vector>

#include "attention_device.h"
#include "kvq_cuda_cache.h"
#include "kvq_test.h"

static inline void expect_ok(kvq_status status, const kvq_error &err) { kvq_test_ok(status, &err); }

struct CudaDevice {
    kvq_context      ctx = kvq_test_context();
    kvq_cuda_device *device = nullptr;
    void            *stream = nullptr;
    void            *pinned = nullptr;
    enum { MOST = 1 << 20 }; // bytes that travel at once

    CudaDevice() {
        kvq_error err = {};
        expect_ok(kvq_cuda_open(&ctx, 0, &device, &err), err);
        expect_ok(kvq_cuda_stream_create(device, &stream, &err), err);
        expect_ok(kvq_cuda_alloc_pinned(device, MOST, &pinned, &err), err);
    }
    ~CudaDevice() {
        kvq_cuda_stream_destroy(device, stream);
        kvq_cuda_free_pinned(device, pinned);
        kvq_cuda_close(&ctx, &device);
    }
    CudaDevice(const CudaDevice &) = delete;
    CudaDevice &operator=(const CudaDevice &) = delete;
};

// Floats on the device.
struct CudaFloats {
    CudaDevice *on;
    float      *at = nullptr;
    size_t      n;

    CudaFloats(CudaDevice *device, size_t count) : on(device), n(count) {
        kvq_error err = {};
        void     *memory = nullptr;
        expect_ok(kvq_cuda_alloc(on->device, n * sizeof(float) + 4, "numbers of a test", &memory, &err), err);
        at = static_cast<float *>(memory);
    }
    ~CudaFloats() { kvq_cuda_free(on->device, at); }
    CudaFloats(const CudaFloats &) = delete;
    CudaFloats &operator=(const CudaFloats &) = delete;

    void put(const float *from, size_t count) {
        kvq_error err = {};
        ck_assert(count <= n && count * sizeof(float) <= CudaDevice::MOST);
        memcpy(on->pinned, from, count * sizeof(float));
        expect_ok(
            kvq_cuda_copy(on->device, KVQ_CUDA_TO_DEVICE, at, on->pinned, count * sizeof(float), on->stream, &err),
            err);
        expect_ok(kvq_cuda_finish(on->device, on->stream, &err), err);
    }
    std::vector<float> values() {
        kvq_error          err = {};
        std::vector<float> to(n);
        expect_ok(kvq_cuda_copy(on->device, KVQ_CUDA_TO_HOST, on->pinned, at, n * sizeof(float), on->stream, &err),
                  err);
        expect_ok(kvq_cuda_finish(on->device, on->stream, &err), err);
        memcpy(to.data(), on->pinned, n * sizeof(float));
        return to;
    }
};

// The layer of a rig; keys before RoPE where the query has pairs.
static inline kvq_cache_layer layer_of(const attention_rig &rig, int n_seqs, int64_t capacity, const Query &query) {
    kvq_cache_layer layer = {};
    layer.tiled = rig.with.tiled;
    for (int i = 0; i < 2; i++) layer.rows[i] = rig.rows[i], layer.tiles[i] = rig.tiles[i];
    layer.n_kv_heads = rig.with.n_kv_heads, layer.head_dim = rig.with.head_dim;
    layer.n_seqs = n_seqs, layer.capacity = capacity;
    layer.n_sinks = rig.with.sinks, layer.n_recent = rig.with.tiled ? 0 : rig.with.recent;
    layer.n_pairs = query.n_pairs;
    layer.frequency = query.frequency.data();
    layer.amplitude = query.amplitude;
    return layer;
}

struct CudaCache {
    CudaDevice     *on;
    kvq_cuda_cache *cache = nullptr;
    size_t          d;
    int             n_seqs;

    CudaCache(CudaDevice *device, const kvq_cache_layer &layer)
        : on(device), d((size_t)(layer.n_kv_heads * layer.head_dim)), n_seqs(layer.n_seqs) {
        kvq_error err = {};
        expect_ok(kvq_cuda_cache_create(on->device, &on->ctx, &layer, &cache, &err), err);
    }
    ~CudaCache() { kvq_cuda_cache_destroy(&cache); }
    CudaCache(const CudaCache &) = delete;
    CudaCache &operator=(const CudaCache &) = delete;

    kvq_status append(int sequence, const float *k, const float *v, int64_t n, kvq_error *err) {
        CudaFloats there_k(on, (size_t)n * d), there_v(on, (size_t)n * d);
        there_k.put(k, (size_t)n * d);
        there_v.put(v, (size_t)n * d);
        return kvq_cuda_cache_append(cache, sequence, there_k.at, there_v.at, n, on->stream, err);
    }
    // q [n_seqs, n_heads, head_dim]
    std::vector<float> attend(const Query &query, int n_splits, const std::vector<float> &q) {
        kvq_error       err = {};
        CudaFloats      there(on, q.size()), out(on, q.size());
        kvq_cache_query asked = {query.n_heads, query.scale, query.softcap, query.window, n_splits};
        there.put(q.data(), q.size());
        expect_ok(kvq_cuda_cache_attend(cache, &asked, there.at, out.at, on->stream, &err), err);
        return out.values();
    }
    std::vector<uint8_t> read(int sequence, int tensor, kvq_cache_part part) {
        kvq_error            err = {};
        int64_t              n = kvq_cuda_cache_part_bytes(cache, sequence, tensor, part);
        std::vector<uint8_t> bytes((size_t)n + 1, 0xa5);
        expect_ok(kvq_cuda_cache_read(cache, sequence, tensor, part, bytes.data(), on->stream, &err), err);
        ck_assert_uint_eq(bytes[(size_t)n], 0xa5);
        bytes.pop_back();
        return bytes;
    }
};

// All parts of a sequence are those of the CPU's cache.
static inline void expect_sequence(CudaCache *cache, int sequence, const attention_rig &rig,
                                   const kvq_packed_layer *host) {
    static const char *const NAMES[] = {"sinks", "codes", "waiting tokens"};
    attention_sequence       s;
    attention_sequence_of(&rig, attention_rig_backend(&rig), host, &s);
    if (kvq_cuda_cache_length(cache->cache, sequence) != s.length) ck_abort_msg("length");
    if (kvq_cuda_cache_bytes(cache->cache, sequence) != kvq_packed_layer_bytes(host)) ck_abort_msg("bytes in all");
    for (int i = 0; i < 2 * KVQ_N_CACHE_PARTS; i++) {
        int                  part = i / 2, tensor = i % 2;
        std::vector<uint8_t> is = cache->read(sequence, tensor, (kvq_cache_part)part);
        const uint8_t       *end = part < 2 ? s.parts[part + 1][tensor] : s.parts[part][tensor] + is.size();
        const uint8_t       *from = s.parts[part][tensor];
        int64_t waiting = s.n_waiting * rig.with.n_kv_heads * rig.with.head_dim * (int64_t)sizeof(uint16_t);
        if ((int64_t)is.size() != (part < 2 ? end - from : waiting) || memcmp(is.data(), from, is.size()) != 0)
            ck_abort_msg("%s of %s of sequence %d of %d tokens", NAMES[part], tensor == 0 ? "K" : "V", sequence,
                         (int)s.length);
    }
    attention_sequence_close(&s);
}

#endif
