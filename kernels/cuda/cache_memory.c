// SPDX-License-Identifier: Apache-2.0
// How the device's packed cache comes to be, and how the host looks at it. See kvq_cuda_cache.h.
#include <limits.h>
#include <string.h>

#include "cache_impl.h"

#define PINNED_BYTES ((size_t)1 << 20)

static const char *const AREA_NAMES[CACHE_N_AREAS] = {
    [CACHE_TABLES] = "tables of a packed cache",
    [CACHE_STATE] = "lengths and pages of a packed cache",
    [CACHE_BASES] = "rotary angles",
    [CACHE_OFFSETS] = "rotary angles",
    [CACHE_PAGES] = "pages of packed keys",
    [CACHE_PAGES + 1] = "pages of packed values",
    [CACHE_SINKS] = "sink tokens",
    [CACHE_SINKS + 1] = "sink tokens",
    [CACHE_RECENT] = "recent tokens",
    [CACHE_RECENT + 1] = "recent tokens",
    [CACHE_STAGED] = "tokens on their way to the codec",
    [CACHE_SCRATCH] = "scratch of the codec",
    [CACHE_WORKSPACE] = "workspace of attention",
};

kvq_status cache_grow(kvq_cuda_cache *c, cache_area area, size_t bytes, kvq_error *err) {
    void *memory = NULL;
    if (c->areas[area].memory != NULL && c->areas[area].bytes >= bytes) return KVQ_OK;
    bytes = bytes > 16 ? bytes : 16; // an area of nothing still has an address
    kvq_status status = kvq_cuda_alloc(c->device, bytes, AREA_NAMES[area], &memory, err);
    if (status != KVQ_OK) return status;
    kvq_cuda_free(c->device, c->areas[area].memory);
    c->areas[area].memory = memory;
    c->areas[area].bytes = bytes;
    return KVQ_OK;
}

// ---------------------------------------------------------------- host and device

// Both wait.
static kvq_status send(kvq_cuda_cache *c, void *to, const void *host_from, size_t bytes, void *stream, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < PINNED_BYTES ? bytes - at : PINNED_BYTES;
        memcpy(c->pinned, (const uint8_t *)host_from + at, n);
        KVQ_TRY(kvq_cuda_copy(c->device, KVQ_CUDA_TO_DEVICE, (uint8_t *)to + at, c->pinned, n, stream, err));
        KVQ_TRY(kvq_cuda_finish(c->device, stream, err));
    }

done:
    return status;
}

static kvq_status fetch(kvq_cuda_cache *c, void *host_to, const void *from, size_t bytes, void *stream,
                        kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < PINNED_BYTES ? bytes - at : PINNED_BYTES;
        KVQ_TRY(kvq_cuda_copy(c->device, KVQ_CUDA_TO_HOST, c->pinned, (const uint8_t *)from + at, n, stream, err));
        KVQ_TRY(kvq_cuda_finish(c->device, stream, err));
        memcpy((uint8_t *)host_to + at, c->pinned, n);
    }

done:
    return status;
}

// ---------------------------------------------------------------- checks

static kvq_status wrong(kvq_error *err, const char *what, int64_t is) {
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a packed cache on a device: %s %lld", what, (long long)is);
}

static kvq_status check_sizes(const kvq_cache_layer *l, kvq_error *err) {
    if (l->n_seqs < 1 || l->n_seqs > UINT16_MAX) return wrong(err, "sequences, not 1 .. 65535:", l->n_seqs);
    if (l->capacity < 1 || l->capacity > 1 << 30) return wrong(err, "capacity, not 1 .. 2^30:", l->capacity);
    if (l->n_kv_heads < 1 || l->n_kv_heads > UINT16_MAX) return wrong(err, "KV heads:", l->n_kv_heads);
    if (l->head_dim < 1 || l->head_dim > UINT16_MAX) return wrong(err, "channels of a head:", l->head_dim);
    if (l->n_sinks < 0) return wrong(err, "sinks:", l->n_sinks);
    if (l->n_recent < 0 || (l->tiled && l->n_recent > 0))
        return wrong(err, l->tiled ? "tiles with recent tokens:" : "recent tokens:", l->n_recent);
    if (l->n_pages < 0 || l->n_pages > INT32_MAX) return wrong(err, "pages, not 0 .. 2^31 - 1:", l->n_pages);
    if (l->n_pairs < 0 || 2 * (int64_t)l->n_pairs > l->head_dim || (l->n_pairs > 0 && l->frequency == NULL))
        return wrong(err, "rotated pairs, more than a head has or without frequencies:", l->n_pairs);
    return KVQ_OK;
}

// Packing without memory is only a check.
static kvq_status check_specs(const kvq_cache_layer *l, kvq_error *err) {
    kvq_block_spec rows;
    kvq_cuda_tiles tiles;
    int64_t        d = (int64_t)l->n_kv_heads * l->head_dim;
    kvq_status     status = KVQ_OK;
    for (int i = 0; i < 2; i++) {
        int64_t spec_d = l->tiled ? l->tiles[i].d : l->rows[i].d;
        if (spec_d != d)
            return wrong(err, i == 0 ? "channels in the spec of K:" : "channels in the spec of V:", spec_d);
        if (l->tiled)
            KVQ_TRY(kvq_cuda_tiles_pack(&l->tiles[i], NULL, NULL, &tiles, err));
        else
            KVQ_TRY(kvq_cuda_rows_pack(&l->rows[i], NULL, NULL, &rows, err));
        if (l->tiled && l->tiles[i].head_dim != l->head_dim)
            return wrong(err, "channels of a head in a spec of tiles:", l->tiles[i].head_dim);
        if (l->tiled && (l->tiles[i].r != NULL) != (i == 0))
            return wrong(err, "a spec of tiles for the other tensor than", i);
    }

done:
    return status;
}

kvq_status cache_check_sequence(const kvq_cuda_cache *c, int sequence, kvq_error *err) {
    if (sequence >= 0 && sequence < c->n_seqs) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "sequence %d of a packed cache of %d", sequence, c->n_seqs);
}

// ---------------------------------------------------------------- creation

static void set_sizes(kvq_cuda_cache *c, const kvq_cache_layer *l) {
    c->tiled = l->tiled;
    c->n_kv_heads = l->n_kv_heads;
    c->head_dim = l->head_dim;
    c->d = l->n_kv_heads * l->head_dim;
    c->n_seqs = l->n_seqs;
    c->n_pairs = l->n_pairs;
    c->capacity = l->capacity;
    c->n_sinks = cache_smaller(l->n_sinks, l->capacity);
    c->n_recent = cache_smaller(l->n_recent, l->capacity - c->n_sinks);
    c->n_places = l->tiled ? CACHE_PAGE : c->n_recent;
    c->max_pages = l->tiled ? l->capacity / CACHE_PAGE : cache_pages_for(l->capacity - c->n_sinks - c->n_recent);
    c->n_pages = l->n_pages > 0 ? l->n_pages : c->n_seqs * c->max_pages;
    c->n_free = c->n_pages;
    for (int i = 0; i < 2; i++) {
        c->row_bytes[i] = l->tiled ? kvq_tile_bytes(&l->tiles[i]) : kvq_block_row_bytes(&l->rows[i]);
        c->page_bytes[i] = l->tiled ? c->row_bytes[i] : CACHE_PAGE * c->row_bytes[i];
    }
}

static kvq_status make_host_arrays(kvq_cuda_cache *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (c->n_pages > INT32_MAX) return wrong(err, "pages, more than 2^31 - 1:", c->n_pages);
    KVQ_TRY(KVQ_NEW(c->ctx, c->n_seqs, "sequences", &c->sequences, err));
    KVQ_TRY(KVQ_NEW(c->ctx, c->n_seqs * c->max_pages, "table of pages", &c->table, err));
    KVQ_TRY(KVQ_NEW(c->ctx, c->n_pages, "pages in use", &c->used, err));

done:
    return status;
}

static kvq_status make_areas(kvq_cuda_cache *c, kvq_error *err) {
    size_t     halves = (size_t)c->n_seqs * (size_t)c->d * sizeof(uint16_t);
    kvq_status status = KVQ_OK;
    KVQ_TRY(cache_grow(c, CACHE_STATE, (size_t)cache_state_count(c) * sizeof(int32_t), err));
    for (unsigned i = 0; i < 2; i++) {
        KVQ_TRY(cache_grow(c, CACHE_PAGES + i, (size_t)(c->n_pages * c->page_bytes[i]), err));
        KVQ_TRY(cache_grow(c, CACHE_SINKS + i, halves * (size_t)c->n_sinks, err));
        KVQ_TRY(cache_grow(c, CACHE_RECENT + i, halves * (size_t)c->n_places, err));
    }

done:
    return status;
}

static kvq_status send_tables(kvq_cuda_cache *c, const kvq_cache_layer *l, void *stream, kvq_error *err) {
    size_t     bytes[2];
    uint8_t   *host = NULL;
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++)
        bytes[i] = l->tiled ? kvq_cuda_tiles_bytes(&l->tiles[i]) : kvq_cuda_rows_bytes(&l->rows[i]);
    KVQ_TRY(KVQ_NEW(c->ctx, (int64_t)(bytes[0] + bytes[1]), "tables", &host, err));
    KVQ_TRY(cache_grow(c, CACHE_TABLES, bytes[0] + bytes[1], err));
    uint8_t *device = c->areas[CACHE_TABLES].memory;
    for (int i = 0; i < 2; i++) {
        size_t at = i == 0 ? 0 : bytes[0];
        if (l->tiled)
            KVQ_TRY(kvq_cuda_tiles_pack(&l->tiles[i], host + at, device + at, &c->tiles[i], err));
        else
            KVQ_TRY(kvq_cuda_rows_pack(&l->rows[i], host + at, device + at, &c->rows[i], err));
    }
    KVQ_TRY(send(c, device, host, bytes[0] + bytes[1], stream, err));

done:
    kvq_free(c->ctx, host);
    return status;
}

static kvq_status send_angles(kvq_cuda_cache *c, const kvq_cache_layer *l, void *stream, kvq_error *err) {
    int64_t    n_bases = cache_pages_for(c->capacity), of_base = 2 * (int64_t)l->n_pairs;
    float     *bases = NULL, *offsets = NULL;
    size_t     bytes[2] = {(size_t)(n_bases * of_base) * sizeof(float), (size_t)(CACHE_PAGE * of_base) * sizeof(float)};
    kvq_status status = KVQ_OK;
    if (l->n_pairs == 0) return KVQ_OK;
    KVQ_TRY(KVQ_NEW(c->ctx, n_bases * of_base, "rotary angles", &bases, err));
    KVQ_TRY(KVQ_NEW(c->ctx, CACHE_PAGE * of_base, "rotary angles", &offsets, err));
    kvq_cuda_rope_fill(l->frequency, l->n_pairs, l->amplitude, n_bases, bases, offsets);
    KVQ_TRY(cache_grow(c, CACHE_BASES, bytes[0], err));
    KVQ_TRY(cache_grow(c, CACHE_OFFSETS, bytes[1], err));
    KVQ_TRY(send(c, c->areas[CACHE_BASES].memory, bases, bytes[0], stream, err));
    KVQ_TRY(send(c, c->areas[CACHE_OFFSETS].memory, offsets, bytes[1], stream, err));

done:
    kvq_free(c->ctx, bases);
    kvq_free(c->ctx, offsets);
    return status;
}

// Empty sequences, and no number that does not fit.
static kvq_status send_state(kvq_cuda_cache *c, void *stream, kvq_error *err) {
    int64_t    n = cache_state_count(c);
    int32_t   *state = NULL;
    kvq_status status = KVQ_NEW(c->ctx, n, "lengths and pages", &state, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = cache_bad(c) - cache_lengths(c); i < cache_table(c) - cache_lengths(c); i++) state[i] = INT_MAX;
    status = send(c, c->areas[CACHE_STATE].memory, state, (size_t)n * sizeof *state, stream, err);
    kvq_free(c->ctx, state);
    return status;
}

kvq_status kvq_cuda_cache_create(kvq_cuda_device *device, const kvq_context *ctx, const kvq_cache_layer *layer,
                                 kvq_cuda_cache **out, kvq_error *err) {
    kvq_cuda_cache *c = NULL;
    void           *stream = NULL;
    kvq_status      status = KVQ_OK;
    KVQ_TRY(check_sizes(layer, err));
    KVQ_TRY(check_specs(layer, err));
    KVQ_TRY(KVQ_NEW(ctx, 1, "packed cache on a device", &c, err));
    c->device = device;
    c->ctx = ctx;
    set_sizes(c, layer);
    KVQ_TRY(make_host_arrays(c, err));
    KVQ_TRY(make_areas(c, err));
    KVQ_TRY(kvq_cuda_alloc_pinned(device, PINNED_BYTES, &c->pinned, err));
    KVQ_TRY(kvq_cuda_stream_create(device, &stream, err));
    KVQ_TRY(send_tables(c, layer, stream, err));
    KVQ_TRY(send_angles(c, layer, stream, err));
    KVQ_TRY(send_state(c, stream, err));
    *out = c;
    c = NULL;

done:
    kvq_cuda_stream_destroy(device, stream);
    kvq_cuda_cache_destroy(&c);
    return status;
}

void kvq_cuda_cache_destroy(kvq_cuda_cache **cache) {
    kvq_cuda_cache *c = *cache;
    if (c == NULL) return;
    for (int i = 0; i < CACHE_N_AREAS; i++) kvq_cuda_free(c->device, c->areas[i].memory);
    kvq_cuda_free_pinned(c->device, c->pinned);
    kvq_free(c->ctx, c->sequences);
    kvq_free(c->ctx, c->table);
    kvq_free(c->ctx, c->used);
    kvq_free(c->ctx, c);
    *cache = NULL;
}

// ---------------------------------------------------------------- what there is

uint8_t *cache_codes_at(const kvq_cuda_cache *c, int sequence, int tensor, int64_t first, int64_t n_wanted,
                        int64_t *n) {
    const int32_t *pages = cache_pages_of(c, sequence);
    int64_t        page = first / CACHE_PAGE, end = page + 1;
    *n = n_wanted;
    if (n_wanted <= 0) return NULL;
    while (end * CACHE_PAGE < first + n_wanted && pages[end] == pages[end - 1] + 1) end++;
    *n = cache_smaller(n_wanted, end * CACHE_PAGE - first);
    return (uint8_t *)c->areas[CACHE_PAGES + tensor].memory + pages[page] * c->page_bytes[tensor] +
           (c->tiled ? 0 : first % CACHE_PAGE * c->row_bytes[tensor]);
}

static int64_t n_sinks_of(const kvq_cuda_cache *c, int sequence) {
    return cache_smaller(c->sequences[sequence].length, c->n_sinks);
}

// Numbers of the tokens that wait: [first, end).
static int64_t first_waiting(const kvq_cuda_cache *c, int sequence) {
    int64_t n_coded = c->sequences[sequence].n_coded;
    return c->tiled ? cache_larger(n_coded, n_sinks_of(c, sequence)) : n_coded;
}

static int64_t end_waiting(const kvq_cuda_cache *c, int sequence) {
    return cache_token(c, c->sequences[sequence].length);
}

static int64_t coded_bytes(const kvq_cuda_cache *c, int tensor, int64_t n_tokens) {
    return n_tokens / (c->tiled ? CACHE_PAGE : 1) * c->row_bytes[tensor];
}

int64_t kvq_cuda_cache_part_bytes(const kvq_cuda_cache *c, int sequence, int tensor, kvq_cache_part part) {
    int64_t of_token = c->d * (int64_t)sizeof(uint16_t);
    int64_t bytes[KVQ_N_CACHE_PARTS] = {
        [KVQ_CACHE_SINKS] = n_sinks_of(c, sequence) * of_token,
        [KVQ_CACHE_CODED] = coded_bytes(c, tensor, c->sequences[sequence].n_coded),
        [KVQ_CACHE_WAITING] = (end_waiting(c, sequence) - first_waiting(c, sequence)) * of_token,
    };
    return bytes[part];
}

int64_t kvq_cuda_cache_length(const kvq_cuda_cache *c, int sequence) { return c->sequences[sequence].length; }

int64_t kvq_cuda_cache_bytes(const kvq_cuda_cache *c, int sequence) {
    int64_t bytes = 0;
    for (int i = 0; i < 2 * KVQ_N_CACHE_PARTS; i++)
        bytes += kvq_cuda_cache_part_bytes(c, sequence, i % 2, (kvq_cache_part)(i / 2));
    return bytes;
}

int64_t kvq_cuda_cache_held_bytes(const kvq_cuda_cache *c) {
    int64_t bytes = 0;
    for (int i = 0; i < CACHE_N_AREAS; i++) bytes += (int64_t)c->areas[i].bytes;
    return bytes;
}

// ---------------------------------------------------------------- reading

static kvq_status read_coded(kvq_cuda_cache *c, int sequence, int tensor, uint8_t *host, void *stream, kvq_error *err) {
    int64_t    end = c->sequences[sequence].n_coded;
    kvq_status status = KVQ_OK;
    for (int64_t first = 0, n; first < end; first += n) {
        const uint8_t *codes = cache_codes_at(c, sequence, tensor, first, end - first, &n);
        int64_t        bytes = coded_bytes(c, tensor, n);
        KVQ_TRY(fetch(c, host, codes, (size_t)bytes, stream, err));
        host += bytes;
    }

done:
    return status;
}

static kvq_status read_waiting(kvq_cuda_cache *c, int sequence, int tensor, uint8_t *host, void *stream,
                               kvq_error *err) {
    const uint16_t *places = cache_halves(c, CACHE_RECENT, tensor, sequence);
    int64_t         end = end_waiting(c, sequence);
    kvq_status      status = KVQ_OK;
    for (int64_t first = first_waiting(c, sequence), n; first < end; first += n) {
        int64_t place = first % c->n_places;
        n = cache_smaller(end - first, c->n_places - place);
        size_t bytes = (size_t)(n * c->d) * sizeof *places;
        KVQ_TRY(fetch(c, host, places + place * c->d, bytes, stream, err));
        host += bytes;
    }

done:
    return status;
}

kvq_status kvq_cuda_cache_read(kvq_cuda_cache *c, int sequence, int tensor, kvq_cache_part part, void *host,
                               void *stream, kvq_error *err) {
    kvq_status status = cache_check_sequence(c, sequence, err);
    if (status != KVQ_OK) return status;
    if (part == KVQ_CACHE_CODED) return read_coded(c, sequence, tensor, host, stream, err);
    if (part == KVQ_CACHE_WAITING) return read_waiting(c, sequence, tensor, host, stream, err);
    return fetch(c, host, cache_halves(c, CACHE_SINKS, tensor, sequence),
                 (size_t)kvq_cuda_cache_part_bytes(c, sequence, tensor, part), stream, err);
}

kvq_status kvq_cuda_cache_check(kvq_cuda_cache *c, kvq_cuda_cache_bad *where, void *stream, kvq_error *err) {
    const int32_t *bad = c->pinned; // [n_seqs, 2]
    size_t         bytes = 2 * (size_t)c->n_seqs * sizeof *bad;
    kvq_status     status = kvq_cuda_copy(c->device, KVQ_CUDA_TO_HOST, c->pinned, cache_bad(c), bytes, stream, err);
    if (status == KVQ_OK) status = kvq_cuda_finish(c->device, stream, err);
    if (status != KVQ_OK) return status;
    for (int i = 0; i < c->n_seqs; i++) {
        int                tensor = bad[2 * i + 1] < bad[2 * i];
        kvq_cuda_cache_bad found = {i, tensor, bad[2 * i + tensor]};
        if (found.position == INT_MAX) continue;
        if (where != NULL) *where = found;
        return kvq_fail(err, KVQ_ERR_NUMERICAL,
                        "this model's activations need more than 16-bit floats; kvq cannot store them",
                        "sequence %d, %s, position %lld: a number does not fit into f16", i, tensor == 0 ? "K" : "V",
                        (long long)found.position);
    }
    return KVQ_OK;
}
