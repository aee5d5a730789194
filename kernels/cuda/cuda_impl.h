// SPDX-License-Identifier: Apache-2.0
//
// Private to the CUDA backend: what its three files share. Its kernels and what they are asked for in are in
// kvq_cuda_ops.h, kvq_cuda_codec.h and kvq_cuda_runtime.h.
//
// Everything is computed on one stream, in the order in which the table's functions are called, and nobody waits until
// a number is wanted on the host. Weights come by other streams, so that the next layer arrives while this one is used.
#ifndef KVQ_CUDA_IMPL_H
#define KVQ_CUDA_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "kvq_cuda_runtime.h"
#include "kvq_kernels.h"

// Two halves of pinned memory that take turns: one is filled while the other one travels.
typedef struct cuda_stage {
    pthread_mutex_t lock;
    void           *stream;
    uint8_t        *pinned[2];
    void           *passed[2]; // events: the half may be filled again
    int             turn;
} cuda_stage;

// Device memory that was allocated; kept for the next one who wants as much when it is released.
typedef struct cuda_block cuda_block;
struct cuda_block {
    void       *memory;
    size_t      bytes;
    bool        used;
    cuda_block *next;
};

// A piece of the area in which arguments and results travel between host and device.
typedef struct cuda_piece {
    size_t bytes;
    void  *host, *device;
} cuda_piece;

enum { CUDA_LANES = 2 };

typedef struct cuda_backend {
    kvq_backend      table; // the first member
    char             device_text[192], matmul_text[160];
    kvq_cuda_device *device;
    kvq_compute      compute;
    void            *stream;            // of everything but weights
    cuda_stage       floats;            // upload and download, on that stream
    cuda_stage       lanes[CUDA_LANES]; // weights, each on a stream of its own
    pthread_mutex_t  lock;              // of the blocks and the failure
    cuda_block      *blocks;
    void            *cleared; // event: the last allocation is ready to be filled
    atomic_bool      failed;
    kvq_error        failure; // the first one
    // of the computing thread alone
    cuda_piece area;
    void      *area_sent; // event: what is in area.host has been copied
    void      *factors;   // scratch of products in bf16
    size_t     factor_bytes;
} cuda_backend;

static inline cuda_backend *cuda_of(const kvq_backend *be) {
    return (cuda_backend *)(uintptr_t)be; // the table belongs to it, and is const for others only
}

// Keeps the first failure. Returns whether there was none so far.
bool cuda_note(cuda_backend *c, kvq_status status, const kvq_error *err);

// Starts one of the functions of kvq_cuda_ops.h and its like, whose last arguments are a stream and an error.
#define CUDA_RUN(c, function, ...)                                                                                     \
    do {                                                                                                               \
        kvq_error cuda_run_error = {KVQ_OK, "", ""};                                                                   \
        if (!atomic_load(&(c)->failed))                                                                                \
            (void)cuda_note(c, function(__VA_ARGS__, (c)->stream, &cuda_run_error), &cuda_run_error);                  \
    } while (0)

// ---------------------------------------------------------------- memory and transfers (transfer.c)

kvq_status cuda_transfer_create(cuda_backend *c, kvq_error *err);
void       cuda_transfer_destroy(cuda_backend *c);

kvq_status cuda_alloc(const kvq_backend *be, int64_t n_floats, const char *what, float **out, kvq_error *err);
void       cuda_release(const kvq_backend *be, float *p);
void       cuda_upload(const kvq_backend *be, float *to, const float *host_from, int64_t n);
void       cuda_download(const kvq_backend *be, float *host_to, const float *from, int64_t n); // NaN after a failure
void       cuda_upload_weights(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                               const float *host_from);

// Device memory of at least `bytes` that grows and is never given back; false after a failure.
bool cuda_grow(cuda_backend *c, void **memory, size_t *held, size_t bytes, const char *what);

// Lays out n pieces, whose bytes are set, in the area; what was there before is gone. False after a failure.
bool cuda_area(cuda_backend *c, cuda_piece *pieces, int n);
void cuda_send(cuda_backend *c, const cuda_piece *piece); // from host to device, in order with the kernels
void cuda_put(cuda_backend *c, const cuda_piece *piece, const void *host_from);
void cuda_fetch(cuda_backend *c, const cuda_piece *piece); // from device to host; there when cuda_arrived
bool cuda_arrived(cuda_backend *c);                        // waits; false after a failure

// ---------------------------------------------------------------- codec (codec_cuda.c)

int64_t    cuda_encode(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows);
void       cuda_decode(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x);
kvq_status cuda_encode_tiles(const kvq_backend *be, const kvq_tile_spec *spec, const float *x, int64_t first,
                             int64_t n_tokens, uint8_t *tiles, int64_t *bad, kvq_error *err);
void       cuda_decode_tiles(const kvq_backend *be, const kvq_tile_spec *spec, const uint8_t *tiles, int64_t first,
                             int64_t n_tokens, float *x);
int64_t    cuda_store_halves(const kvq_backend *be, const float *x, int64_t n, uint16_t *host_to);
void       cuda_load_halves(const kvq_backend *be, const uint16_t *host_from, int64_t n, float *x);
void       cuda_round_halves(const kvq_backend *be, float *x, int64_t n);
int64_t    cuda_find_nonfinite(const kvq_backend *be, const float *x, int64_t n); // 0 after a failure
int64_t    cuda_count_scratch_floats(const kvq_backend *be, int64_t m, int64_t d);
int64_t cuda_count(const kvq_backend *be, const kvq_count_rule *rule, const float *x, const float *gradients, int64_t m,
                   float *counters, float *scratch); // 0 after a failure

// ---------------------------------------------------------------- packed caches (cache_cuda.c)

extern const kvq_cache_functions cuda_cache_functions;

#endif
