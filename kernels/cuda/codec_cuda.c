// SPDX-License-Identifier: Apache-2.0
//
// The codec entries of the table on a device, and counting by their rule: tokens are there, specs and codes on the
// host. A spec's tables travel with each call; they are small beside what is coded.
#include <limits.h>
#include <string.h>

#include "cuda_impl.h"
#include "kvq_cuda_codec.h"
#include "kvq_cuda_ops.h"

static int64_t n_tiles(int64_t n_tokens) { return (n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS; }

// Index of the first token that could not be coded, as the kernels left it, or -1; 0 when nothing came back.
static int64_t first_bad(cuda_backend *c, const cuda_piece *bad) {
    int index;
    if (!cuda_arrived(c)) return 0;
    memcpy(&index, bad->host, sizeof index);
    return index == INT_MAX ? -1 : index;
}

static void put_no_bad(cuda_backend *c, const cuda_piece *bad) {
    int none = INT_MAX;
    cuda_put(c, bad, &none);
}

// ---------------------------------------------------------------- rows

static bool send_rows_spec(cuda_backend *c, const cuda_piece *tables, const kvq_block_spec *spec, kvq_block_spec *out) {
    kvq_error err = {KVQ_OK, "", ""};
    if (!cuda_note(c, kvq_cuda_rows_pack(spec, tables->host, tables->device, out, &err), &err)) return false;
    cuda_send(c, tables);
    return true;
}

int64_t cuda_encode(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows) {
    enum { TABLES, BAD, ROWS, N };
    cuda_backend  *c = cuda_of(be);
    kvq_block_spec on_device;
    cuda_piece     p[N] = {[TABLES] = {.bytes = kvq_cuda_rows_bytes(spec)},
                           [BAD] = {.bytes = sizeof(int)},
                           [ROWS] = {.bytes = (size_t)m * (size_t)kvq_block_row_bytes(spec)}};
    if (m == 0) return -1;
    if (!cuda_area(c, p, N) || !send_rows_spec(c, &p[TABLES], spec, &on_device)) return 0;
    put_no_bad(c, &p[BAD]);
    CUDA_RUN(c, kvq_cuda_encode_rows, &on_device, x, m, p[ROWS].device, p[BAD].device);
    cuda_fetch(c, &p[BAD]);
    cuda_fetch(c, &p[ROWS]);
    int64_t bad = first_bad(c, &p[BAD]);
    if (bad < 0) memcpy(rows, p[ROWS].host, p[ROWS].bytes);
    return bad;
}

void cuda_decode(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x) {
    enum { TABLES, ROWS, N };
    cuda_backend  *c = cuda_of(be);
    kvq_block_spec on_device;
    cuda_piece     p[N] = {[TABLES] = {.bytes = kvq_cuda_rows_bytes(spec)},
                           [ROWS] = {.bytes = (size_t)m * (size_t)kvq_block_row_bytes(spec)}};
    if (m == 0 || !cuda_area(c, p, N) || !send_rows_spec(c, &p[TABLES], spec, &on_device)) return;
    cuda_put(c, &p[ROWS], rows);
    CUDA_RUN(c, kvq_cuda_decode_rows, &on_device, p[ROWS].device, m, x);
}

// ---------------------------------------------------------------- tiles

static bool send_tiles_spec(cuda_backend *c, const cuda_piece *tables, const kvq_tile_spec *spec, kvq_cuda_tiles *out) {
    kvq_error err = {KVQ_OK, "", ""};
    if (!cuda_note(c, kvq_cuda_tiles_pack(spec, tables->host, tables->device, out, &err), &err)) return false;
    cuda_send(c, tables);
    return true;
}

kvq_status cuda_encode_tiles(const kvq_backend *be, const kvq_tile_spec *spec, const float *x, int64_t first,
                             int64_t n_tokens, uint8_t *tiles, int64_t *bad, kvq_error *err) {
    enum { TABLES, BAD, TILES, SCRATCH, N };
    cuda_backend  *c = cuda_of(be);
    kvq_cuda_tiles on_device = {.spec = *spec};
    cuda_piece     p[N] = {[TABLES] = {.bytes = kvq_cuda_tiles_bytes(spec)},
                           [BAD] = {.bytes = sizeof(int)},
                           [TILES] = {.bytes = (size_t)n_tiles(n_tokens) * (size_t)kvq_tile_bytes(spec)},
                           [SCRATCH] = {.bytes = kvq_cuda_tiles_scratch_bytes(&on_device, n_tokens)}};
    *bad = -1;
    if (n_tokens == 0) return KVQ_OK;
    if (!cuda_area(c, p, N) || !send_tiles_spec(c, &p[TABLES], spec, &on_device)) return be->check(be, err);
    put_no_bad(c, &p[BAD]);
    CUDA_RUN(c, kvq_cuda_encode_tiles, &on_device, x, first, n_tokens, p[TILES].device, p[SCRATCH].device,
             p[BAD].device);
    cuda_fetch(c, &p[BAD]);
    cuda_fetch(c, &p[TILES]);
    *bad = first_bad(c, &p[BAD]);
    if (*bad < 0) memcpy(tiles, p[TILES].host, p[TILES].bytes);
    return atomic_load(&c->failed) ? be->check(be, err) : KVQ_OK;
}

void cuda_decode_tiles(const kvq_backend *be, const kvq_tile_spec *spec, const uint8_t *tiles, int64_t first,
                       int64_t n_tokens, float *x) {
    enum { TABLES, TILES, N };
    cuda_backend  *c = cuda_of(be);
    kvq_cuda_tiles on_device;
    cuda_piece     p[N] = {[TABLES] = {.bytes = kvq_cuda_tiles_bytes(spec)},
                           [TILES] = {.bytes = (size_t)n_tiles(n_tokens) * (size_t)kvq_tile_bytes(spec)}};
    if (n_tokens == 0 || !cuda_area(c, p, N) || !send_tiles_spec(c, &p[TABLES], spec, &on_device)) return;
    cuda_put(c, &p[TILES], tiles);
    CUDA_RUN(c, kvq_cuda_decode_tiles, &on_device, p[TILES].device, first, n_tokens, x);
}

// ---------------------------------------------------------------- halves, and numbers that are none

// What find_nonfinite and store_halves leave behind as the first index.
static int64_t first_index(cuda_backend *c, const cuda_piece *first) {
    unsigned long long index;
    if (!cuda_arrived(c)) return 0;
    memcpy(&index, first->host, sizeof index);
    return index == KVQ_CUDA_ALL_FINITE ? -1 : (int64_t)index;
}

int64_t cuda_store_halves(const kvq_backend *be, const float *x, int64_t n, uint16_t *host_to) {
    enum { FIRST, HALVES, N };
    cuda_backend *c = cuda_of(be);
    cuda_piece    p[N] = {[FIRST] = {.bytes = sizeof(unsigned long long)},
                          [HALVES] = {.bytes = host_to != NULL ? (size_t)n * sizeof *host_to : 0}};
    if (n == 0) return -1;
    if (!cuda_area(c, p, N)) return 0;
    CUDA_RUN(c, kvq_cuda_store_halves, x, n, host_to != NULL ? p[HALVES].device : NULL, p[FIRST].device);
    cuda_fetch(c, &p[FIRST]);
    if (host_to != NULL) cuda_fetch(c, &p[HALVES]);
    int64_t bad = first_index(c, &p[FIRST]);
    if (bad < 0 && host_to != NULL) memcpy(host_to, p[HALVES].host, p[HALVES].bytes);
    return bad;
}

void cuda_load_halves(const kvq_backend *be, const uint16_t *host_from, int64_t n, float *x) {
    cuda_backend *c = cuda_of(be);
    cuda_piece    halves = {.bytes = (size_t)n * sizeof *host_from};
    if (n == 0 || !cuda_area(c, &halves, 1)) return;
    cuda_put(c, &halves, host_from);
    CUDA_RUN(c, kvq_cuda_load_halves, halves.device, n, x);
}

void cuda_round_halves(const kvq_backend *be, float *x, int64_t n) {
    CUDA_RUN(cuda_of(be), kvq_cuda_round_halves, x, n);
}

int64_t cuda_find_nonfinite(const kvq_backend *be, const float *x, int64_t n) {
    cuda_backend *c = cuda_of(be);
    cuda_piece    first = {.bytes = sizeof(unsigned long long)};
    if (n == 0) return -1;
    if (!cuda_area(c, &first, 1)) return 0;
    CUDA_RUN(c, kvq_cuda_find_nonfinite, x, n, first.device);
    cuda_fetch(c, &first);
    return first_index(c, &first);
}

// ---------------------------------------------------------------- counting

int64_t cuda_count_scratch_floats(const kvq_backend *be, int64_t m, int64_t d) {
    (void)be;
    return kvq_cuda_count_scratch_floats(m, d);
}

int64_t cuda_count(const kvq_backend *be, const kvq_count_rule *rule, const float *x, const float *gradients, int64_t m,
                   float *counters, float *scratch) {
    enum { FIRST, Z, R, N };
    cuda_backend  *c = cuda_of(be);
    kvq_block_spec spec = *rule->spec;
    kvq_count_rule there = *rule;
    size_t         ranges = spec.r != NULL ? (size_t)spec.d * sizeof *spec.r : 0;
    cuda_piece     p[N] = {
            [FIRST] = {.bytes = sizeof(unsigned long long)}, [Z] = {.bytes = ranges}, [R] = {.bytes = ranges}};
    if (!cuda_area(c, p, N)) return 0;
    if (ranges > 0) {
        cuda_put(c, &p[Z], spec.z);
        cuda_put(c, &p[R], spec.r);
        spec.z = p[Z].device;
        spec.r = p[R].device;
    }
    there.spec = &spec;
    CUDA_RUN(c, kvq_cuda_count, &there, x, gradients, m, counters, scratch, p[FIRST].device);
    cuda_fetch(c, &p[FIRST]);
    return first_index(c, &p[FIRST]);
}
