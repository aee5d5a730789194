// SPDX-License-Identifier: Apache-2.0
//
// One layer's packed cache of one sequence; see kvq_decoder.h. Its tokens, oldest first: sinks, rows, and the recent
// window. The window is a ring: a token's place in it depends on its position alone, so nothing moves when it leaves.
//
// An append first does all that can fail: it looks at every number, and encodes the tokens that will leave the window,
// some of which may be among those that come, into rows that are not in use yet. Only then it changes the window.
#include "decoder_impl.h"

#define STAGED_TOKENS 1024 // encoded together when they leave the window
#define STAGED_FLOATS 1024

struct kvq_packed_layer {
    const kvq_context *ctx;
    int64_t            layer, capacity, length;
    int64_t            n_sinks, n_recent; // what there is room for
    int64_t            n_rows;            // tokens stored as rows
    int                d;
    kvq_block_spec     specs[2];  // K, V
    float             *ranges[2]; // what belongs to channels, [3 d]
    uint16_t          *sinks[2];  // [n_sinks, d] f16
    uint16_t          *recent[2]; // [n_recent, d] f16
    uint8_t           *rows[2];   // [capacity - n_sinks, row_bytes]
};

static const char *const TENSOR_NAME[2] = {"K", "V"};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

kvq_status kvq_packed_layer_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t layer,
                                   int64_t capacity, kvq_packed_layer **out, kvq_error *err) {
    const kvq_tensor_quant *quants[2] = {&artifact->layers[layer].k, &artifact->layers[layer].v};
    const int               n_side[2] = {artifact->quantizer.n_side_k, artifact->quantizer.n_side_v};
    kvq_packed_layer       *cache = NULL;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "packed cache", &cache, err));
    cache->ctx = ctx;
    cache->layer = layer;
    cache->capacity = capacity;
    cache->d = (int)(artifact->model.n_kv_heads * artifact->model.head_dim);
    cache->n_sinks = smaller(artifact->quantizer.sink_tokens, capacity);
    cache->n_recent = smaller(artifact->quantizer.recent_tokens, capacity - cache->n_sinks);
    for (int i = 0; i < 2; i++) {
        KVQ_TRY(KVQ_NEW(ctx, 3 * (int64_t)cache->d, "offsets and ranges", &cache->ranges[i], err));
        cache->specs[i] = kvq_tensor_block_spec(quants[i], cache->d, n_side[i], cache->ranges[i]);
        KVQ_TRY(KVQ_NEW(ctx, cache->n_sinks * cache->d, "sink tokens", &cache->sinks[i], err));
        KVQ_TRY(KVQ_NEW(ctx, cache->n_recent * cache->d, "recent tokens", &cache->recent[i], err));
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
        kvq_free(ctx, (*cache)->ranges[i]);
        kvq_free(ctx, (*cache)->sinks[i]);
        kvq_free(ctx, (*cache)->recent[i]);
        kvq_free(ctx, (*cache)->rows[i]);
    }
    kvq_free(ctx, *cache);
    *cache = NULL;
}

void kvq_packed_layer_reset(kvq_packed_layer *cache) { cache->length = cache->n_rows = 0; }

static kvq_status does_not_fit(const kvq_packed_layer *cache, int tensor, int64_t position, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_NUMERICAL,
                    "this model's activations need more than 16-bit floats; kvq cannot store them",
                    "layer %lld, %s, position %lld: a number does not fit into f16", (long long)cache->layer,
                    TENSOR_NAME[tensor], (long long)position);
}

// ---------------------------------------------------------------- f16

// x [n] of the backend -> f16 on the host (`to` may be NULL: only looked at). Returns the index of the first number
// that does not fit, or -1.
static int64_t store_halves(const kvq_backend *be, const float *x, int64_t n, uint16_t *to) {
    float staged[STAGED_FLOATS];
    for (int64_t first = 0, count; first < n; first += count) {
        count = smaller(n - first, STAGED_FLOATS);
        be->download(be, staged, x + first, count);
        for (int64_t i = 0; i < count; i++) {
            uint16_t half = kvq_half_of_float(staged[i]);
            if ((half & 0x7c00u) == 0x7c00u) return first + i;
            if (to != NULL) to[first + i] = half;
        }
    }
    return -1;
}

static void load_halves(const kvq_backend *be, const uint16_t *from, int64_t n, float *x) {
    float staged[STAGED_FLOATS];
    for (int64_t first = 0, count; first < n; first += count) {
        count = smaller(n - first, STAGED_FLOATS);
        for (int64_t i = 0; i < count; i++) staged[i] = kvq_float_of_half(from[first + i]);
        be->upload(be, x + first, staged, count);
    }
}

static void round_to_half(const kvq_backend *be, float *x, int64_t n) {
    uint16_t staged[STAGED_FLOATS];
    for (int64_t first = 0, count; first < n; first += count) {
        count = smaller(n - first, STAGED_FLOATS);
        (void)store_halves(be, x + first, count, staged);
        load_halves(be, staged, count, x + first);
    }
}

// ---------------------------------------------------------------- append

// Tokens behind the sinks are counted from the first of them.
static int64_t behind_sinks(const kvq_packed_layer *cache, int64_t length) {
    return length > cache->n_sinks ? length - cache->n_sinks : 0;
}

static uint16_t *ring_place(const kvq_packed_layer *cache, int tensor, int64_t token) {
    return cache->recent[tensor] + token % cache->n_recent * cache->d;
}

static kvq_status encode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                         int64_t first, int64_t n, kvq_error *err) {
    const kvq_block_spec *spec = &cache->specs[tensor];
    int64_t               bad = be->encode(be, spec, x, n, cache->rows[tensor] + first * kvq_block_row_bytes(spec));
    return bad < 0 ? KVQ_OK : does_not_fit(cache, tensor, cache->n_sinks + first + bad, err);
}

// Encodes the tokens [n_rows, end) from their f16 values. From token first_new on they are in x and not in the window
// yet.
static kvq_status encode_leaving(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, int64_t end,
                                 int64_t first_new, const float *x, kvq_error *err) {
    int64_t    d = cache->d, n = smaller(end - cache->n_rows, STAGED_TOKENS);
    float     *staged = NULL;
    kvq_status status = KVQ_OK;
    if (n <= 0) return KVQ_OK;
    KVQ_TRY(be->alloc(be, n * d, "tokens that leave the recent window", &staged, err));
    for (int64_t first = cache->n_rows; first < end; first += n) {
        n = smaller(end - first, STAGED_TOKENS);
        for (int64_t i = 0; i < n; i++) {
            if (first + i < first_new)
                load_halves(be, ring_place(cache, tensor, first + i), d, staged + i * d);
            else
                be->copy(be, staged + i * d, x + (first + i - first_new) * d, d);
        }
        round_to_half(be, staged, n * d); // what came from the window stays as it is
        KVQ_TRY(encode(be, cache, tensor, staged, first, n, err));
    }

done:
    be->release(be, staged);
    return status;
}

// All that can fail of an append of one tensor. The first n_sinks of the n tokens are sinks; n_rows of all tokens
// behind the sinks will be rows.
static kvq_status prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x, int64_t n,
                          int64_t n_sinks, int64_t n_rows, kvq_error *err) {
    int64_t      old = behind_sinks(cache, cache->length), n_exact = cache->n_recent > 0 ? n : n_sinks;
    const float *behind = x + n_sinks * cache->d;
    int64_t      bad = store_halves(be, x, n_exact * cache->d, NULL);
    if (bad >= 0) return does_not_fit(cache, tensor, cache->length + bad / cache->d, err);
    if (cache->n_recent > 0) return encode_leaving(be, cache, tensor, n_rows, old, behind, err);
    return n > n_sinks ? encode(be, cache, tensor, behind, old, n - n_sinks, err) : KVQ_OK;
}

// The rest of it.
static void store_exact(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n,
                        int64_t n_sinks, int64_t n_rows) {
    int64_t old = behind_sinks(cache, cache->length), d = cache->d;
    (void)store_halves(be, x, n_sinks * d, cache->sinks[tensor] + cache->length * d);
    for (int64_t token = old > n_rows ? old : n_rows; token < old + n - n_sinks; token++)
        (void)store_halves(be, x + (n_sinks + token - old) * d, d, ring_place(cache, tensor, token));
}

kvq_status kvq_packed_layer_append(const kvq_backend *be, kvq_packed_layer *cache, const float *k, const float *v,
                                   int64_t n, kvq_error *err) {
    if (n < 0 || n > cache->capacity - cache->length) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "layer %lld: %lld tokens do not fit behind %lld in a cache of %lld",
                        (long long)cache->layer, (long long)n, (long long)cache->length, (long long)cache->capacity);
    }
    int64_t    room = cache->length < cache->n_sinks ? cache->n_sinks - cache->length : 0, n_sinks = smaller(n, room);
    int64_t    n_rows = behind_sinks(cache, cache->length + n) - cache->n_recent;
    kvq_status status = KVQ_OK;
    if (n_rows < cache->n_rows) n_rows = cache->n_rows;
    KVQ_TRY(prepare(be, cache, 0, k, n, n_sinks, n_rows, err));
    KVQ_TRY(prepare(be, cache, 1, v, n, n_sinks, n_rows, err));
    store_exact(be, cache, 0, k, n, n_sinks, n_rows);
    store_exact(be, cache, 1, v, n, n_sinks, n_rows);
    cache->n_rows = n_rows;
    cache->length += n;

done:
    return status;
}

kvq_status kvq_packed_layer_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err) {
    int64_t    end = behind_sinks(cache, cache->length);
    kvq_status status = KVQ_OK;
    for (int tensor = 0; tensor < 2; tensor++) KVQ_TRY(encode_leaving(be, cache, tensor, end, end, NULL, err));
    cache->n_rows = end;

done:
    return status;
}

// ---------------------------------------------------------------- read

static void decode_tensor(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x) {
    int64_t n_sinks = smaller(cache->length, cache->n_sinks), end = behind_sinks(cache, cache->length), d = cache->d;
    load_halves(be, cache->sinks[tensor], n_sinks * d, x);
    be->decode(be, &cache->specs[tensor], cache->rows[tensor], cache->n_rows, x + n_sinks * d);
    for (int64_t token = cache->n_rows; token < end; token++)
        load_halves(be, ring_place(cache, tensor, token), d, x + (n_sinks + token) * d);
}

void kvq_packed_layer_decode(const kvq_backend *be, const kvq_packed_layer *cache, float *k, float *v) {
    decode_tensor(be, cache, 0, k);
    decode_tensor(be, cache, 1, v);
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
        round_to_half(be, k_recent, n * cache->d);
        round_to_half(be, v_recent, n * cache->d);
    }
    kvq_packed_layer_decode(be, cache, k, v);

done:
    return status;
}

int64_t kvq_packed_layer_length(const kvq_packed_layer *cache) { return cache->length; }

int64_t kvq_packed_layer_bytes(const kvq_packed_layer *cache) {
    int64_t per_row = kvq_block_row_bytes(&cache->specs[0]) + kvq_block_row_bytes(&cache->specs[1]);
    return (cache->length - cache->n_rows) * 2 * cache->d * (int64_t)sizeof(uint16_t) + cache->n_rows * per_row;
}

kvq_row_counts kvq_packed_layer_count(const kvq_packed_layer *cache, int tensor, const float *host_x) {
    const kvq_block_spec *spec = &cache->specs[tensor];
    kvq_row_counts        counts = {.n_elements = cache->n_rows * cache->d};
    for (int64_t token = 0; token < cache->n_rows; token++) {
        const float *x = host_x + (smaller(cache->length, cache->n_sinks) + token) * cache->d;
        int n_outliers = kvq_block_count_outliers(spec, cache->rows[tensor] + token * kvq_block_row_bytes(spec));
        counts.n_outliers += n_outliers;
        if (spec->r != NULL) counts.n_clipped += kvq_block_count_beyond(spec, x) - n_outliers;
    }
    return counts;
}
