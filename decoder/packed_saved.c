// SPDX-License-Identifier: Apache-2.0
//
// One layer's packed cache as bytes and back; docs/packed-cache.md draws them. The last bytes are a hash of all others
// and are looked at first: what was damaged by accident is never parsed. What was sealed by somebody else is parsed
// with suspicion, so that a cache which was loaded is safe to use whatever its bytes say.
//
// The bytes do not depend on the capacity of the cache nor on how its tokens came: recent tokens are in the order of
// their positions, not of the ring, and sinks are not repeated in the open tile, where no codec looks at them.
#include <string.h>

#include "packed_impl.h"

static const char MAGIC[8] = {'k', 'v', 'q', 'l', 'a', 'y', 'e', 'r'};

// Behind the magic, 8 bytes each. From SCHEME to RECENT they tell what the cache belongs to, as does the identity.
enum number { VERSION, SCHEME, LAYER, CHANNELS, HEAD_DIM, SINKS, RECENT, LENGTH, CODED, N_NUMBERS };
static const char *const NUMBER_NAMES[N_NUMBERS] = {"version",     "scheme",        "layer",  "d",           "head_dim",
                                                    "sink_tokens", "recent_tokens", "length", "coded tokens"};

#define LAYOUT_VERSION 1
#define HASH_BYTES     (KVQ_SHA256_HEX - 1)
#define IDENTITY_AT    ((int64_t)sizeof MAGIC + (int64_t)8 * N_NUMBERS)
#define HEADER_BYTES   (IDENTITY_AT + HASH_BYTES)

static void describe(const kvq_packed_layer *cache, int64_t numbers[N_NUMBERS]) {
    numbers[VERSION] = LAYOUT_VERSION;
    numbers[SCHEME] = cache->tiled;
    numbers[LAYER] = cache->layer;
    numbers[CHANNELS] = cache->d;
    numbers[HEAD_DIM] = cache->artifact->model.head_dim;
    numbers[SINKS] = cache->artifact->quantizer.sink_tokens;
    numbers[RECENT] = cache->artifact->quantizer.recent_tokens;
    numbers[LENGTH] = cache->length;
    numbers[CODED] = cache->tiled ? packed_tiles_coded(cache) : cache->rows.n_rows;
}

// ---------------------------------------------------------------- parts of a tensor

static int64_t coded_bytes(const kvq_packed_layer *cache, int tensor) {
    if (!cache->tiled) return cache->rows.n_rows * kvq_block_row_bytes(&cache->rows.specs[tensor]);
    return packed_pages_for(packed_tiles_coded(cache)) * kvq_tile_bytes(&cache->tiles.views[tensor].spec);
}

// Bytes of them that are in pages; the rest is a closed tile.
static int64_t paged_bytes(const kvq_packed_layer *cache, int tensor) {
    if (!cache->tiled) return coded_bytes(cache, tensor);
    return cache->length / KVQ_TILE_TOKENS * kvq_tile_bytes(&cache->tiles.views[tensor].spec);
}

// The first position that waits in f16 to be coded; all that follow do, too. Those of a closed tile still do.
static int64_t first_waiting(const kvq_packed_layer *cache) {
    int64_t sinks = packed_sinks(cache, 0, cache->length), whole = cache->length / KVQ_TILE_TOKENS * KVQ_TILE_TOKENS;
    if (!cache->tiled) return sinks + cache->rows.n_rows;
    return whole > sinks ? whole : sinks;
}

static uint16_t *waiting_token(const kvq_packed_layer *cache, int tensor, int64_t position) {
    if (!cache->tiled) return packed_rows_recent(cache, tensor, position - cache->n_sinks);
    return cache->tiles.open[tensor] + position % KVQ_TILE_TOKENS * cache->d;
}

int64_t kvq_packed_layer_saved_bytes(const kvq_packed_layer *cache) {
    int64_t n_halves = packed_sinks(cache, 0, cache->length) + cache->length - first_waiting(cache);
    return HEADER_BYTES + 2 * packed_half_bytes(cache, n_halves) + coded_bytes(cache, 0) + coded_bytes(cache, 1) +
           HASH_BYTES;
}

// ---------------------------------------------------------------- save

static uint8_t *put_number(uint8_t *out, int64_t number) {
    kvq_block_store_word(out, (uint32_t)((uint64_t)number & 0xffffffffu));
    kvq_block_store_word(out + 4, (uint32_t)((uint64_t)number >> 32));
    return out + 8;
}

static uint8_t *put_halves(uint8_t *out, const uint16_t *halves, int64_t n) {
    for (int64_t i = 0; i < n; i++) kvq_block_store_half(out + 2 * i, halves[i]);
    return out + 2 * n;
}

static uint8_t *put_tensor(const kvq_packed_layer *cache, int tensor, uint8_t *out) {
    int64_t paged = paged_bytes(cache, tensor), closed = coded_bytes(cache, tensor) - paged;
    out = put_halves(out, cache->sinks[tensor], packed_sinks(cache, 0, cache->length) * cache->d);
    packed_pages_get(&cache->pages[tensor], paged, out);
    if (closed > 0) memcpy(out + paged, cache->tiles.closed[tensor], (size_t)closed);
    out += paged + closed;
    for (int64_t p = first_waiting(cache); p < cache->length; p++)
        out = put_halves(out, waiting_token(cache, tensor, p), cache->d);
    return out;
}

kvq_status kvq_packed_layer_save(const kvq_packed_layer *cache, uint8_t *out, kvq_error *err) {
    int64_t    numbers[N_NUMBERS];
    char       hex[KVQ_SHA256_HEX];
    uint8_t   *at = out;
    kvq_status status = packed_identity(cache, hex, err);
    if (status != KVQ_OK) return status;
    describe(cache, numbers);
    memcpy(at, MAGIC, sizeof MAGIC);
    at += sizeof MAGIC;
    for (int i = 0; i < N_NUMBERS; i++) at = put_number(at, numbers[i]);
    memcpy(at, hex, HASH_BYTES);
    at += HASH_BYTES;
    for (int tensor = 0; tensor < 2; tensor++) at = put_tensor(cache, tensor, at);
    status = kvq_sha256_of(out, (size_t)(at - out), hex, err);
    if (status == KVQ_OK) memcpy(at, hex, HASH_BYTES);
    return status;
}

// ---------------------------------------------------------------- load

static int64_t number_at(const uint8_t *bytes, enum number number) {
    uint64_t value = 0;
    bytes += sizeof MAGIC + 8 * (size_t)number;
    for (int i = 7; i >= 0; i--) value = value << 8 | bytes[i];
    int64_t result;
    memcpy(&result, &value, sizeof result);
    return result;
}

static kvq_status check_seal(const uint8_t *data, int64_t bytes, kvq_error *err) {
    char       hex[KVQ_SHA256_HEX];
    kvq_status status = KVQ_OK;
    if (bytes < HEADER_BYTES + HASH_BYTES) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "a saved cache of %lld bytes is shorter than its header",
                        (long long)bytes);
    }
    if (memcmp(data, MAGIC, sizeof MAGIC) != 0)
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "these bytes do not begin like a saved cache");
    KVQ_TRY(kvq_sha256_of(data, (size_t)(bytes - HASH_BYTES), hex, err));
    if (memcmp(data + bytes - HASH_BYTES, hex, HASH_BYTES) != 0) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                        "a saved cache of %lld bytes was damaged: they do not have the hash at their end",
                        (long long)bytes);
    }
    if (number_at(data, VERSION) != LAYOUT_VERSION) {
        return kvq_fail(err, KVQ_ERR_VERSION, NULL, "a saved cache of version %lld; this is version %d",
                        (long long)number_at(data, VERSION), LAYOUT_VERSION);
    }

done:
    return status;
}

static kvq_status check_owner(const kvq_packed_layer *cache, const uint8_t *data, kvq_error *err) {
    int64_t    numbers[N_NUMBERS];
    char       identity[KVQ_SHA256_HEX];
    kvq_status status = packed_identity(cache, identity, err);
    if (status != KVQ_OK) return status;
    describe(cache, numbers);
    for (int i = SCHEME; i <= RECENT; i++) {
        int64_t saved = number_at(data, (enum number)i);
        if (saved == numbers[i]) continue;
        return kvq_fail(err, KVQ_ERR_MISMATCH, NULL, "layer %lld: the saved cache has %s %lld instead of %lld",
                        (long long)cache->layer, NUMBER_NAMES[i], (long long)saved, (long long)numbers[i]);
    }
    if (memcmp(data + IDENTITY_AT, identity, HASH_BYTES) == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_MISMATCH, NULL,
                    "layer %lld: the saved cache is of another model, or was coded with other tables",
                    (long long)cache->layer);
}

static kvq_status does_not_fit_together(const kvq_packed_layer *cache, const uint8_t *data, int64_t bytes,
                                        kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                    "layer %lld: a saved cache of %lld tokens, %lld of them coded, cannot have %lld bytes",
                    (long long)cache->layer, (long long)number_at(data, LENGTH), (long long)number_at(data, CODED),
                    (long long)bytes);
}

// Sets how many tokens the cache has, and of which kind, once it is certain that the bytes are there.
static kvq_status set_lengths(kvq_packed_layer *cache, const uint8_t *data, int64_t bytes, kvq_error *err) {
    int64_t length = number_at(data, LENGTH), coded = number_at(data, CODED);
    if (length < 0 || length > bytes) return does_not_fit_together(cache, data, bytes, err); // each has a byte or more
    if (length > cache->capacity) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "layer %lld: %lld saved tokens do not fit into a cache of %lld",
                        (long long)cache->layer, (long long)length, (long long)cache->capacity);
    }
    int64_t behind = length - packed_sinks(cache, 0, length), whole = length / KVQ_TILE_TOKENS * KVQ_TILE_TOKENS;
    bool    possible = cache->tiled ? coded == whole || coded == length
                                    : coded >= 0 && coded <= behind && behind - coded <= cache->rows.n_recent;
    if (!possible) return does_not_fit_together(cache, data, bytes, err);
    cache->length = length;
    cache->rows.n_rows = cache->tiled ? 0 : coded;
    cache->tiles.flushed = cache->tiled && coded > whole;
    if (kvq_packed_layer_saved_bytes(cache) != bytes) return does_not_fit_together(cache, data, bytes, err);
    return KVQ_OK;
}

static kvq_status get_token(const kvq_packed_layer *cache, int tensor, int64_t position, const uint8_t *from,
                            uint16_t *to, kvq_error *err) {
    for (int c = 0; c < cache->d; c++) {
        to[c] = kvq_block_load_half(from + 2 * c);
        if (kvq_half_is_finite(to[c])) continue;
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                        "layer %lld, %s, position %lld: the saved cache has a number that is not finite",
                        (long long)cache->layer, tensor == 0 ? "K" : "V", (long long)position);
    }
    return KVQ_OK;
}

// Decoding trusts counts and places of outliers in tiles; rows and codes can be nothing wrong.
static kvq_status check_tiles(const kvq_packed_layer *cache, int tensor, kvq_error *err) {
    for (int64_t i = 0; cache->tiled && i < packed_pages_for(packed_tiles_coded(cache)); i++) {
        if (kvq_tile_outliers_fit(&cache->tiles.views[tensor].spec, packed_tiles_at(cache, tensor, i))) continue;
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                        "layer %lld: tile %lld of the saved cache has impossible outliers", (long long)cache->layer,
                        (long long)i);
    }
    return KVQ_OK;
}

static kvq_status get_tensor(kvq_packed_layer *cache, int tensor, const uint8_t **from, kvq_error *err) {
    int64_t    paged = paged_bytes(cache, tensor), closed = coded_bytes(cache, tensor) - paged;
    int64_t    n_sinks = packed_sinks(cache, 0, cache->length), d = cache->d;
    kvq_status status = KVQ_OK;
    for (int64_t p = 0; p < n_sinks; p++, *from += 2 * d)
        KVQ_TRY(get_token(cache, tensor, p, *from, cache->sinks[tensor] + p * d, err));
    packed_pages_put(&cache->pages[tensor], 0, paged, *from);
    if (closed > 0) memcpy(cache->tiles.closed[tensor], *from + paged, (size_t)closed);
    *from += paged + closed;
    KVQ_TRY(check_tiles(cache, tensor, err));
    for (int64_t p = first_waiting(cache); p < cache->length; p++, *from += 2 * d)
        KVQ_TRY(get_token(cache, tensor, p, *from, waiting_token(cache, tensor, p), err));

done:
    return status;
}

kvq_status kvq_packed_layer_load(const kvq_context *ctx, const kvq_artifact *artifact, int64_t layer, int64_t capacity,
                                 const uint8_t *data, int64_t bytes, kvq_packed_layer **out, kvq_error *err) {
    kvq_packed_layer *cache = NULL;
    const uint8_t    *from;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(check_seal(data, bytes, err));
    from = data + HEADER_BYTES;
    KVQ_TRY(kvq_packed_layer_create(ctx, artifact, layer, capacity, &cache, err));
    KVQ_TRY(check_owner(cache, data, err));
    KVQ_TRY(set_lengths(cache, data, bytes, err));
    KVQ_TRY(packed_layer_reserve_like(cache, cache, err));
    for (int tensor = 0; tensor < 2; tensor++) KVQ_TRY(get_tensor(cache, tensor, &from, err));
    *out = cache;
    cache = NULL;

done:
    kvq_packed_layer_destroy(ctx, &cache);
    return status;
}
