// SPDX-License-Identifier: Apache-2.0
//
// Tokens behind the sinks as rows, and the last of them in full precision. Rows are fixed in length and in place, so an
// append moves nothing.
#include <string.h>

#include "packed_impl.h"

#define STAGED_TOKENS 1024 // encoded together when they leave the window

kvq_status packed_rows_create(kvq_packed_layer *cache, const kvq_artifact *artifact, kvq_error *err) {
    const kvq_layer_quant  *layer = &artifact->layers[cache->layer];
    const kvq_tensor_quant *quants[2] = {&layer->k, &layer->v};
    const int               n_side[2] = {artifact->quantizer.n_side_k, artifact->quantizer.n_side_v};
    packed_rows            *r = &cache->rows;
    int64_t                 n_behind = cache->capacity - cache->n_sinks;
    kvq_status              status = KVQ_OK;
    r->n_recent = packed_smaller(artifact->quantizer.recent_tokens, n_behind);
    for (int i = 0; i < 2; i++) {
        KVQ_TRY(KVQ_NEW(cache->ctx, 3 * (int64_t)cache->d, "offsets and ranges", &r->ranges[i], err));
        r->specs[i] = kvq_tensor_block_spec(quants[i], cache->d, n_side[i], r->ranges[i]);
        KVQ_TRY(KVQ_NEW(cache->ctx, r->n_recent * cache->d, "recent tokens", &r->recent[i], err));
        KVQ_TRY(packed_pages_create(cache->ctx, KVQ_TILE_TOKENS * (int64_t)kvq_block_row_bytes(&r->specs[i]),
                                    packed_pages_for(n_behind), &cache->pages[i], err));
    }

done:
    return status;
}

void packed_rows_destroy(kvq_packed_layer *cache) {
    for (int i = 0; i < 2; i++) {
        kvq_free(cache->ctx, cache->rows.ranges[i]);
        kvq_free(cache->ctx, cache->rows.recent[i]);
    }
}

// ---------------------------------------------------------------- append

// Tokens behind the sinks are counted from the first of them.
static int64_t behind_sinks(const kvq_packed_layer *cache, int64_t length) {
    return length > cache->n_sinks ? length - cache->n_sinks : 0;
}

uint16_t *packed_rows_recent(const kvq_packed_layer *cache, int tensor, int64_t token) {
    return cache->rows.recent[tensor] + token % cache->rows.n_recent * cache->d;
}

// Rows [first, first + *n) that lie in one piece, *n up to n_wanted.
static uint8_t *rows_at(const kvq_packed_layer *cache, int tensor, int64_t first, int64_t n_wanted, int64_t *n) {
    int64_t  row_bytes = kvq_block_row_bytes(&cache->rows.specs[tensor]), run;
    uint8_t *rows = packed_pages_at(&cache->pages[tensor], first * row_bytes, n_wanted * row_bytes, &run);
    *n = run / row_bytes; // pages hold whole rows
    return rows;
}

static kvq_status encode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                         int64_t first, int64_t n, kvq_error *err) {
    for (int64_t done = 0, run; done < n; done += run) {
        uint8_t *rows = rows_at(cache, tensor, first + done, n - done, &run);
        int64_t  bad = be->encode(be, &cache->rows.specs[tensor], x + done * cache->d, run, rows);
        if (bad >= 0) return packed_does_not_fit(be, cache, tensor, cache->n_sinks + first + done + bad, err);
    }
    return KVQ_OK;
}

// Encodes the tokens [n_rows, end) from their f16 values. From token first_new on they are in x and not in the window
// yet.
static kvq_status encode_leaving(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, int64_t end,
                                 int64_t first_new, const float *x, kvq_error *err) {
    int64_t    d = cache->d, n = packed_smaller(end - cache->rows.n_rows, STAGED_TOKENS);
    float     *staged = NULL;
    kvq_status status = KVQ_OK;
    if (n <= 0) return KVQ_OK;
    KVQ_TRY(be->alloc(be, n * d, "tokens that leave the recent window", &staged, err));
    for (int64_t first = cache->rows.n_rows; first < end; first += n) {
        n = packed_smaller(end - first, STAGED_TOKENS);
        for (int64_t i = 0; i < n; i++) {
            if (first + i < first_new)
                be->load_halves(be, packed_rows_recent(cache, tensor, first + i), d, staged + i * d);
            else
                be->copy(be, staged + i * d, x + (first + i - first_new) * d, d);
        }
        be->round_halves(be, staged, n * d); // what came from the window stays as it is
        KVQ_TRY(encode(be, cache, tensor, staged, first, n, err));
    }

done:
    be->release(be, staged);
    return status;
}

// What an append of n tokens means: the first n_sinks are sinks, `old` tokens are behind the sinks before it, and
// n_rows of all tokens will be rows after it.
typedef struct arrival {
    int64_t n_sinks, old, n_rows;
} arrival;

static arrival arrival_of(const kvq_packed_layer *cache, int64_t n) {
    int64_t room = cache->length < cache->n_sinks ? cache->n_sinks - cache->length : 0;
    arrival a = {packed_smaller(n, room), behind_sinks(cache, cache->length),
                 behind_sinks(cache, cache->length + n) - cache->rows.n_recent};
    if (a.n_rows < cache->rows.n_rows) a.n_rows = cache->rows.n_rows;
    return a;
}

static kvq_status reserve(kvq_packed_layer *cache, int64_t n_rows, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++)
        KVQ_TRY(packed_pages_reserve(cache->ctx, &cache->pages[i], packed_pages_for(n_rows), err));

done:
    return status;
}

kvq_status packed_rows_reserve(kvq_packed_layer *cache, int64_t n, kvq_error *err) {
    return reserve(cache, arrival_of(cache, n).n_rows, err);
}

kvq_status packed_rows_prepare(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, const float *x,
                               int64_t n, kvq_error *err) {
    arrival      a = arrival_of(cache, n);
    const float *behind = x + a.n_sinks * cache->d;
    if (cache->rows.n_recent > 0) {
        int64_t bad = be->store_halves(be, x, n * cache->d, NULL);
        if (bad >= 0) return packed_does_not_fit(be, cache, tensor, cache->length + bad / cache->d, err);
        return encode_leaving(be, cache, tensor, a.n_rows, a.old, behind, err);
    }
    return n > a.n_sinks ? encode(be, cache, tensor, behind, a.old, n - a.n_sinks, err) : KVQ_OK;
}

void packed_rows_commit(const kvq_backend *be, kvq_packed_layer *cache, int tensor, const float *x, int64_t n) {
    arrival a = arrival_of(cache, n);
    int64_t d = cache->d;
    for (int64_t token = a.old > a.n_rows ? a.old : a.n_rows; token < a.old + n - a.n_sinks; token++)
        (void)be->store_halves(be, x + (a.n_sinks + token - a.old) * d, d, packed_rows_recent(cache, tensor, token));
}

void packed_rows_advance(kvq_packed_layer *cache, int64_t n) { cache->rows.n_rows = arrival_of(cache, n).n_rows; }

kvq_status packed_rows_flush(const kvq_backend *be, kvq_packed_layer *cache, kvq_error *err) {
    int64_t    end = behind_sinks(cache, cache->length);
    kvq_status status = KVQ_OK;
    KVQ_TRY(reserve(cache, end, err));
    for (int tensor = 0; tensor < 2; tensor++) KVQ_TRY(encode_leaving(be, cache, tensor, end, end, NULL, err));
    cache->rows.n_rows = end;

done:
    return status;
}

void packed_rows_copied(kvq_packed_layer *to, const kvq_packed_layer *from) {
    for (int i = 0; i < 2; i++)
        memcpy(to->rows.recent[i], from->rows.recent[i], (size_t)packed_half_bytes(to, to->rows.n_recent));
    to->rows.n_rows = from->rows.n_rows;
}

// ---------------------------------------------------------------- read

void packed_rows_decode(const kvq_backend *be, const kvq_packed_layer *cache, int tensor, float *x) {
    const packed_rows *r = &cache->rows;
    int64_t n_sinks = packed_smaller(cache->length, cache->n_sinks), end = behind_sinks(cache, cache->length);
    int64_t d = cache->d;
    for (int64_t first = 0, run; first < r->n_rows; first += run) {
        const uint8_t *rows = rows_at(cache, tensor, first, r->n_rows - first, &run);
        be->decode(be, &r->specs[tensor], rows, run, x + (n_sinks + first) * d);
    }
    for (int64_t token = r->n_rows; token < end; token++)
        be->load_halves(be, packed_rows_recent(cache, tensor, token), d, x + (n_sinks + token) * d);
}

int64_t packed_rows_bytes(const kvq_packed_layer *cache) {
    const packed_rows *r = &cache->rows;
    int64_t            per_row = kvq_block_row_bytes(&r->specs[0]) + kvq_block_row_bytes(&r->specs[1]);
    int64_t            n_recent = behind_sinks(cache, cache->length) - r->n_rows;
    return 2 * packed_half_bytes(cache, n_recent) + r->n_rows * per_row;
}

kvq_row_counts packed_rows_count(const kvq_packed_layer *cache, int tensor, const float *host_x) {
    const packed_rows    *r = &cache->rows;
    const kvq_block_spec *spec = &r->specs[tensor];
    kvq_row_counts        counts = {.n_elements = r->n_rows * cache->d};
    for (int64_t token = 0, run; token < r->n_rows; token++) {
        const float *x = host_x + (packed_smaller(cache->length, cache->n_sinks) + token) * cache->d;
        int          n_outliers = kvq_block_count_outliers(spec, rows_at(cache, tensor, token, 1, &run));
        counts.n_outliers += n_outliers;
        if (spec->r != NULL) counts.n_clipped += kvq_block_count_beyond(spec, x) - n_outliers;
    }
    return counts;
}
