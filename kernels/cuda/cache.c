// SPDX-License-Identifier: Apache-2.0
//
// What the device's packed cache does with tokens: append and attention. See kvq_cuda_cache.h.
//
// Who goes where is decided on the host, which knows all lengths; the device is told with each launch. Work that may
// fail for want of memory comes first, so that a refused append changes nothing.
#include "cache_impl.h"

// Tokens on their way from f16 to the codec at a time; whole tiles. Tests set a few.
#ifndef KVQ_CUDA_MOST_STAGED
#define KVQ_CUDA_MOST_STAGED 1024
#endif
#define MOST_STAGED ((int64_t)KVQ_CUDA_MOST_STAGED)

// What an append of n tokens means. Tokens [n_coded, coded_end) are coded, [kept, end) stay in f16.
typedef struct arrival {
    int          sequence;
    int64_t      n_new_sinks;
    int64_t      first_new; // number of the first new token that is no sink of rows
    int64_t      n_coded, coded_end, kept, end;
    const float *x[2];      // of all new tokens
    const float *behind[2]; // from first_new on
} arrival;

static arrival arrival_of(const kvq_cuda_cache *c, int sequence, const float *k, const float *v, int64_t n) {
    const cache_sequence *s = &c->sequences[sequence];
    arrival               a = {.sequence = sequence, .n_coded = s->n_coded, .x = {k, v}};
    int64_t               skipped;
    a.n_new_sinks = cache_smaller(n, cache_larger(c->n_sinks - s->length, 0));
    skipped = c->tiled ? 0 : a.n_new_sinks; // they are in tiles as well, without codes
    a.first_new = cache_token(c, s->length);
    a.end = cache_token(c, s->length + n);
    a.coded_end = cache_larger(a.n_coded, c->tiled ? a.end / CACHE_PAGE * CACHE_PAGE : a.end - c->n_recent);
    a.kept = cache_larger(a.first_new, a.coded_end);
    for (int i = 0; i < 2; i++) a.behind[i] = a.x[i] + skipped * c->d;
    return a;
}

// Whether tokens pass through f16 to the codec.
static bool is_staged(const kvq_cuda_cache *c) { return c->tiled || c->n_recent > 0; }

// ---------------------------------------------------------------- pages

static int32_t take_page(kvq_cuda_cache *c) {
    while (c->used[c->first_free] != 0) c->first_free++;
    c->used[c->first_free] = 1;
    c->n_free--;
    return (int32_t)c->first_free;
}

static kvq_status check_pages(const kvq_cuda_cache *c, const arrival *a, kvq_error *err) {
    int64_t wanted = cache_pages_for(a->coded_end) - c->sequences[a->sequence].n_pages;
    if (wanted <= c->n_free) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_MEMORY, "give the cache more pages, or reset sequences that have ended",
                    "sequence %d needs %lld more pages of %d tokens; %lld of %lld are free", a->sequence,
                    (long long)wanted, (int)CACHE_PAGE, (long long)c->n_free, (long long)c->n_pages);
}

// There are as many as it needs. Pages that follow each other are told to the device together.
static kvq_status take_pages(kvq_cuda_cache *c, const arrival *a, void *stream, kvq_error *err) {
    cache_sequence *s = &c->sequences[a->sequence];
    int32_t        *pages = cache_pages_of(c, a->sequence);
    int64_t         told = s->n_pages, end = cache_pages_for(a->coded_end);
    kvq_status      status = KVQ_OK;
    for (; s->n_pages < end; s->n_pages++) pages[s->n_pages] = take_page(c);
    for (int64_t i = told; i < end; i++) {
        if (i + 1 < end && pages[i + 1] == pages[i] + 1) continue;
        KVQ_TRY(cache_map(cache_table(c) + a->sequence * c->max_pages + told, pages[told], i + 1 - told, stream, err));
        told = i + 1;
    }

done:
    return status;
}

// ---------------------------------------------------------------- append

static kvq_status reserve(kvq_cuda_cache *c, const arrival *a, kvq_error *err) {
    int64_t    n = cache_smaller(a->coded_end - a->n_coded, MOST_STAGED);
    kvq_status status = check_pages(c, a, err);
    if (status != KVQ_OK || n == 0 || !is_staged(c)) return status;
    KVQ_TRY(cache_grow(c, CACHE_STAGED, (size_t)(n * c->d) * sizeof(float), err));
    for (int i = 0; i < 2 && c->tiled; i++)
        KVQ_TRY(cache_grow(c, CACHE_SCRATCH, kvq_cuda_tiles_scratch_bytes(&c->tiles[i], n), err));

done:
    return status;
}

static kvq_status store_sinks(const kvq_cuda_cache *c, const arrival *a, void *stream, kvq_error *err) {
    int64_t         length = c->sequences[a->sequence].length;
    cache_tokens    tokens = {c->d, length, a->n_new_sinks, 0, c->n_sinks};
    uint16_t *const places[2] = {cache_halves(c, CACHE_SINKS, 0, a->sequence),
                                 cache_halves(c, CACHE_SINKS, 1, a->sequence)};
    return cache_store(&tokens, a->x, places, cache_bad(c) + 2 * a->sequence, stream, err);
}

// Behind the codec: a token that leaves the ring makes place for one that comes.
static kvq_status store_kept(const kvq_cuda_cache *c, const arrival *a, void *stream, kvq_error *err) {
    int64_t            skipped = (a->kept - a->first_new) * c->d;
    cache_tokens       tokens = {c->d, a->kept, a->end - a->kept, cache_shift(c), c->n_places};
    const float *const x[2] = {a->behind[0] + skipped, a->behind[1] + skipped};
    uint16_t *const    places[2] = {cache_halves(c, CACHE_RECENT, 0, a->sequence),
                                    cache_halves(c, CACHE_RECENT, 1, a->sequence)};
    return cache_store(&tokens, x, places, cache_bad(c) + 2 * a->sequence, stream, err);
}

static kvq_status encode_tensor(const kvq_cuda_cache *c, const arrival *a, int tensor, int64_t first, int64_t n,
                                void *stream, kvq_error *err) {
    int64_t      in_piece, skip = cache_smaller(cache_larger(c->n_sinks - first, 0), n); // sinks, in tiles
    uint8_t     *codes = cache_codes_at(c, a->sequence, tensor, first, n, &in_piece);
    int32_t     *bad = cache_bad(c) + 2 * a->sequence + tensor, *codec_bad = cache_codec_bad(c) + tensor;
    const float *x = a->behind[tensor] + (first - a->first_new) * c->d;
    kvq_status   status = KVQ_OK;
    if (is_staged(c)) {
        float       *staged = c->areas[CACHE_STAGED].memory;
        cache_tokens tokens = {c->d, first, n, cache_shift(c), c->n_places};
        KVQ_TRY(cache_stage(&tokens, cache_halves(c, CACHE_RECENT, tensor, a->sequence), a->behind[tensor],
                            a->first_new, staged, bad, stream, err));
        x = staged;
    }
    if (c->tiled)
        KVQ_TRY(kvq_cuda_encode_tiles(&c->tiles[tensor], x, skip, n, codes, c->areas[CACHE_SCRATCH].memory, codec_bad,
                                      stream, err));
    else
        KVQ_TRY(kvq_cuda_encode_rows(&c->rows[tensor], x, n, codes, codec_bad, stream, err));

done:
    return status;
}

// Also tells the device the lengths; what is on the stream behind it sees the sequence as it will be.
static kvq_status encode(const kvq_cuda_cache *c, const arrival *a, int64_t length, void *stream, kvq_error *err) {
    cache_state state = {cache_lengths(c) + a->sequence, cache_coded(c) + a->sequence, cache_bad(c) + 2 * a->sequence,
                         cache_codec_bad(c)};
    int64_t     n, first = a->n_coded;
    kvq_status  status = KVQ_OK;
    do {
        (void)cache_codes_at(c, a->sequence, 0, first, a->coded_end - first, &n);
        if (is_staged(c)) n = cache_smaller(n, MOST_STAGED);
        for (int i = 0; i < 2 && n > 0; i++) KVQ_TRY(encode_tensor(c, a, i, first, n, stream, err));
        KVQ_TRY(cache_advance(&state, cache_shift(c) + first, length, a->coded_end, stream, err));
        first += n;
    } while (first < a->coded_end);

done:
    return status;
}

kvq_status kvq_cuda_cache_append(kvq_cuda_cache *c, int sequence, const float *k, const float *v, int64_t n,
                                 void *stream, kvq_error *err) {
    kvq_status status = cache_check_sequence(c, sequence, err);
    if (status != KVQ_OK) return status;
    cache_sequence *s = &c->sequences[sequence];
    if (n < 0 || n > c->capacity - s->length)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "sequence %d: %lld tokens do not fit behind %lld in a cache of %lld",
                        sequence, (long long)n, (long long)s->length, (long long)c->capacity);
    if (n == 0) return KVQ_OK;
    arrival a = arrival_of(c, sequence, k, v, n);
    KVQ_TRY(reserve(c, &a, err));
    KVQ_TRY(take_pages(c, &a, stream, err));
    KVQ_TRY(store_sinks(c, &a, stream, err));
    KVQ_TRY(encode(c, &a, s->length + n, stream, err));
    KVQ_TRY(store_kept(c, &a, stream, err));
    s->length += n;
    s->n_coded = a.coded_end;

done:
    return status;
}

kvq_status kvq_cuda_cache_reset(kvq_cuda_cache *c, int sequence, void *stream, kvq_error *err) {
    kvq_status status = cache_check_sequence(c, sequence, err);
    if (status != KVQ_OK) return status;
    cache_sequence *s = &c->sequences[sequence];
    cache_state     state = {cache_lengths(c) + sequence, cache_coded(c) + sequence, cache_bad(c) + 2 * sequence,
                             cache_codec_bad(c)};
    for (int64_t i = 0; i < s->n_pages; i++) {
        int64_t page = cache_pages_of(c, sequence)[i];
        c->used[page] = 0;
        c->first_free = cache_smaller(c->first_free, page);
    }
    c->n_free += s->n_pages;
    *s = (cache_sequence){0, 0, 0};
    return cache_forget(&state, stream, err);
}

// ---------------------------------------------------------------- attention

static kvq_cuda_rows describe_rows(const kvq_block_spec *s) {
    kvq_cuda_rows rows = {.bits = s->bits,
                          .n_side = s->n_side,
                          .n_groups = s->n_groups > 1 ? s->n_groups : 1,
                          .levels = kvq_block_decode_levels(s),
                          .z = s->grid_z != NULL ? s->grid_z : s->z,
                          .r = s->r};
    return rows;
}

static kvq_cuda_tile_keys describe_keys(const kvq_cuda_tiles *t) {
    kvq_cuda_tile_keys keys = {.columns = t->spec.columns,
                               .table = t->spec.table,
                               .levels = t->spec.levels,
                               .z = t->spec.z,
                               .r = t->spec.r,
                               .code_bytes = t->code_bytes,
                               .n_slots = t->spec.n_slots};
    return keys;
}

static kvq_cuda_tile_values describe_values(const kvq_cuda_tiles *t) {
    kvq_cuda_tile_values values = {.dim = t->spec.dim,
                                   .columns = t->spec.columns,
                                   .table = t->spec.table,
                                   .levels = t->spec.levels,
                                   .rotation = t->spec.rotation,
                                   .scale_format = t->spec.scale_format,
                                   .scale_exponent = t->spec.scale_exponent,
                                   .code_bytes = t->code_bytes};
    return values;
}

static void describe_tensors(const kvq_cuda_cache *c, kvq_cuda_attention_call *call) {
    if (c->tiled) {
        call->k_tiles = describe_keys(&c->tiles[0]);
        call->v_tiles = describe_values(&c->tiles[1]);
    } else {
        call->k_rows = describe_rows(&c->rows[0]);
        call->v_rows = describe_rows(&c->rows[1]);
    }
    call->k_pages = c->areas[CACHE_PAGES].memory;
    call->v_pages = c->areas[CACHE_PAGES + 1].memory;
    call->k_page_bytes = c->page_bytes[0];
    call->v_page_bytes = c->page_bytes[1];
    call->k_sinks = cache_halves(c, CACHE_SINKS, 0, 0);
    call->v_sinks = cache_halves(c, CACHE_SINKS, 1, 0);
    call->k_recent = cache_halves(c, CACHE_RECENT, 0, 0);
    call->v_recent = cache_halves(c, CACHE_RECENT, 1, 0);
}

static kvq_cuda_attention_call describe_call(const kvq_cuda_cache *c, const kvq_cache_query *query, const float *q,
                                             float *out) {
    kvq_cuda_attention_call call = {.n_seqs = c->n_seqs,
                                    .n_heads = query->n_heads,
                                    .n_kv_heads = c->n_kv_heads,
                                    .head_dim = c->head_dim,
                                    .scale = query->scale,
                                    .softcap = query->softcap,
                                    .window = query->window,
                                    .n_splits = query->n_splits,
                                    .tiled = c->tiled,
                                    .rope = {c->n_pairs, cache_pages_for(c->capacity), c->areas[CACHE_BASES].memory,
                                             c->areas[CACHE_OFFSETS].memory},
                                    .page_table = cache_table(c),
                                    .max_pages = (int)c->max_pages,
                                    .n_sinks = (int)c->n_sinks,
                                    .n_recent = (int)(c->tiled ? c->n_places : c->n_recent),
                                    .lengths = cache_lengths(c),
                                    .coded = cache_coded(c),
                                    .q = q,
                                    .out = out};
    describe_tensors(c, &call);
    return call;
}

kvq_status kvq_cuda_cache_attend(kvq_cuda_cache *c, const kvq_cache_query *query, const float *q, float *out,
                                 void *stream, kvq_error *err) {
    kvq_cuda_attention_call call = describe_call(c, query, q, out), longest = call;
    longest.max_length = c->capacity; // so that a growing sequence does not need more
    longest.window = 0;
    kvq_status status = cache_grow(c, CACHE_WORKSPACE, kvq_cuda_attention_workspace(&longest), err);
    if (status != KVQ_OK) return status;
    for (int i = 0; i < c->n_seqs; i++) call.max_length = cache_larger(call.max_length, c->sequences[i].length);
    call.workspace = c->areas[CACHE_WORKSPACE].memory;
    return kvq_cuda_attention(&call, stream, err);
}
