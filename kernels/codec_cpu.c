// SPDX-License-Identifier: Apache-2.0
// The KV codecs over many rows and over many tiles; the rules themselves are in kvq_block_hd.h and kvq_tile_hd.h.
#include <stdatomic.h>

#include "kernels_impl.h"

#define ROWS_PER_ITEM 64

typedef struct codec_job {
    const kvq_block_spec *spec;
    const float          *x;
    float                *out;
    uint8_t              *rows;
    const uint8_t        *coded;
    int64_t               m;
    _Atomic int64_t       first_bad; // smallest row that did not fit into f16, m = none
} codec_job;

static void note_bad_row(_Atomic int64_t *first_bad, int64_t row) {
    int64_t known = atomic_load(first_bad);
    while (row < known && !atomic_compare_exchange_weak(first_bad, &known, row)) {
    }
}

static void encode_rows(void *user, int64_t item, int worker) {
    codec_job        *job = user;
    float             upper_key[KVQ_BLOCK_MAX_SIDE + 1], lower_key[KVQ_BLOCK_MAX_SIDE + 1];
    uint16_t          upper_channel[KVQ_BLOCK_MAX_SIDE + 1], lower_channel[KVQ_BLOCK_MAX_SIDE + 1];
    kvq_block_scratch scratch = {upper_key, lower_key, upper_channel, lower_channel, 0, 0};
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        uint8_t *to = job->rows + row * kvq_block_row_bytes(job->spec);
        if (!kvq_block_encode(job->spec, job->x + row * job->spec->d, &scratch, to)) note_bad_row(&job->first_bad, row);
    }
}

static void decode_rows(void *user, int64_t item, int worker) {
    const codec_job *job = user;
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        kvq_block_decode(job->spec, job->coded + row * kvq_block_row_bytes(job->spec), job->out + row * job->spec->d);
    }
}

int64_t kvq_encode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows) {
    codec_job job = {.spec = spec, .x = x, .rows = rows, .m = m, .first_bad = m};
    kvq_parallel_for(be->ctx, (m + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, encode_rows, &job);
    int64_t first_bad = atomic_load(&job.first_bad);
    return first_bad < m ? first_bad : -1;
}

void kvq_decode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x) {
    codec_job job = {.spec = spec, .coded = rows, .out = x, .m = m};
    kvq_parallel_for(be->ctx, (m + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, decode_rows, &job);
}

// ---------------------------------------------------------------- tiles, one an item

typedef struct tile_job {
    const kvq_tile_spec *spec;
    const float         *x;
    float               *out;
    uint8_t             *tiles;
    const uint8_t       *coded;
    int64_t              first, n_tokens, tile_bytes;
    float               *floats, *keys; // scratch of all workers, each in an array of its own
    uint32_t            *places;
    _Atomic int64_t      first_bad; // n_tokens = none
} tile_job;

// Tokens of a tile, counted from its start: [first, end).
typedef struct tile_tokens {
    int first, end;
} tile_tokens;

static tile_tokens tokens_of_tile(const tile_job *job, int64_t item) {
    int64_t start = item * KVQ_TILE_TOKENS, end = smaller(job->n_tokens - start, KVQ_TILE_TOKENS);
    int64_t first = job->first < start ? 0 : smaller(job->first - start, end);
    return (tile_tokens){(int)first, (int)end};
}

static void encode_tile(void *user, int64_t item, int worker) {
    tile_job            *job = user;
    const kvq_tile_spec *spec = job->spec;
    tile_tokens          tokens = tokens_of_tile(job, item);
    int64_t              n_slots = spec->n_slots + 1, start = item * KVQ_TILE_TOKENS;
    kvq_tile_scratch     scratch = {job->floats + worker * (int64_t)KVQ_TILE_TOKENS * spec->head_dim,
                                    job->keys + worker * n_slots, job->places + worker * n_slots};
    int                  bad = kvq_tile_encode(spec, job->x + start * spec->d, tokens.first, tokens.end, &scratch,
                                               job->tiles + item * job->tile_bytes);
    if (bad >= 0) note_bad_row(&job->first_bad, start + bad);
}

static void decode_tile(void *user, int64_t item, int worker) {
    const tile_job *job = user;
    tile_tokens     tokens = tokens_of_tile(job, item);
    (void)worker;
    kvq_tile_decode(job->spec, job->coded + item * job->tile_bytes, tokens.first, tokens.end,
                    job->out + item * KVQ_TILE_TOKENS * job->spec->d);
}

kvq_status kvq_encode_tiles_cpu(const kvq_backend *be, const kvq_tile_spec *spec, const float *x, int64_t first,
                                int64_t n_tokens, uint8_t *tiles, int64_t *bad, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    n_tiles = (n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS;
    int64_t    n_workers = smaller(smaller(be->ctx->n_threads, KVQ_MAX_THREADS), n_tiles);
    tile_job   job = {.spec = spec,
                      .x = x,
                      .tiles = tiles,
                      .first = first,
                      .n_tokens = n_tokens,
                      .tile_bytes = kvq_tile_bytes(spec),
                      .first_bad = n_tokens};
    KVQ_TRY(KVQ_NEW(be->ctx, n_workers * KVQ_TILE_TOKENS * spec->head_dim, "scratch of tiles", &job.floats, err));
    KVQ_TRY(KVQ_NEW(be->ctx, n_workers * (spec->n_slots + 1), "outliers of tiles", &job.keys, err));
    KVQ_TRY(KVQ_NEW(be->ctx, n_workers * (spec->n_slots + 1), "outliers of tiles", &job.places, err));
    kvq_parallel_for(be->ctx, n_tiles, encode_tile, &job);
    int64_t first_bad = atomic_load(&job.first_bad);
    *bad = first_bad < n_tokens ? first_bad : -1;
done:
    kvq_free(be->ctx, job.floats);
    kvq_free(be->ctx, job.keys);
    kvq_free(be->ctx, job.places);
    return status;
}

void kvq_decode_tiles_cpu(const kvq_backend *be, const kvq_tile_spec *spec, const uint8_t *tiles, int64_t first,
                          int64_t n_tokens, float *x) {
    tile_job job = {.spec = spec,
                    .coded = tiles,
                    .out = x,
                    .first = first,
                    .n_tokens = n_tokens,
                    .tile_bytes = kvq_tile_bytes(spec)};
    kvq_parallel_for(be->ctx, (n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS, decode_tile, &job);
}

// ---------------------------------------------------------------- halves

int64_t kvq_store_halves_cpu(const kvq_backend *be, const float *x, int64_t n, uint16_t *to) {
    (void)be;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half = kvq_half_of_float(x[i]);
        if (!kvq_half_is_finite(half)) return i;
        if (to != NULL) to[i] = half;
    }
    return -1;
}

void kvq_load_halves_cpu(const kvq_backend *be, const uint16_t *from, int64_t n, float *x) {
    (void)be;
    for (int64_t i = 0; i < n; i++) x[i] = kvq_float_of_half(from[i]);
}

void kvq_round_halves_cpu(const kvq_backend *be, float *x, int64_t n) {
    (void)be;
    for (int64_t i = 0; i < n; i++) x[i] = kvq_float_of_half(kvq_half_of_float(x[i]));
}
