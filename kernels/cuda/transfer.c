// SPDX-License-Identifier: Apache-2.0
//
// Memory of the CUDA backend and what moves between it and the host. Everything passes through pinned memory, which a
// device reads by itself, in pieces: while one travels the next one is copied, or expanded, into the other half.
//
// Order: numbers (upload, download) travel on the stream that computes. Weights do not, so that they can overtake; they
// wait for one thing only, that the memory they go to is no longer used for what it was before, which the clearing of a
// new allocation says.
#include <math.h>
#include <string.h>

#include "cuda_impl.h"

#define HALF_BYTES ((size_t)4 << 20) // of a stage
#define ALIGNMENT  ((size_t)256)

static size_t round_up(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

bool cuda_note(cuda_backend *c, kvq_status status, const kvq_error *err) {
    if (status == KVQ_OK) return !atomic_load(&c->failed);
    (void)pthread_mutex_lock(&c->lock);
    if (!atomic_load(&c->failed)) c->failure = *err;
    atomic_store(&c->failed, true);
    (void)pthread_mutex_unlock(&c->lock);
    return false;
}

// ---------------------------------------------------------------- stages

static kvq_status create_stage(cuda_backend *c, cuda_stage *s, void *stream, kvq_error *err) {
    kvq_status status = KVQ_OK;
    (void)pthread_mutex_init(&s->lock, NULL);
    s->stream = stream;
    if (stream == NULL) KVQ_TRY(kvq_cuda_stream_create(c->device, &s->stream, err));
    for (int i = 0; i < 2; i++) {
        void *pinned = NULL;
        KVQ_TRY(kvq_cuda_alloc_pinned(c->device, HALF_BYTES, &pinned, err));
        s->pinned[i] = pinned;
        KVQ_TRY(kvq_cuda_event_create(c->device, &s->passed[i], err));
    }

done:
    return status;
}

static void destroy_stage(cuda_backend *c, cuda_stage *s) {
    for (int i = 0; i < 2; i++) {
        kvq_cuda_event_destroy(c->device, s->passed[i]);
        kvq_cuda_free_pinned(c->device, s->pinned[i]);
    }
    if (s->stream != c->stream) kvq_cuda_stream_destroy(c->device, s->stream);
    (void)pthread_mutex_destroy(&s->lock);
}

kvq_status cuda_transfer_create(cuda_backend *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    (void)pthread_mutex_init(&c->lock, NULL);
    KVQ_TRY(kvq_cuda_stream_create(c->device, &c->stream, err));
    KVQ_TRY(kvq_cuda_event_create(c->device, &c->cleared, err));
    KVQ_TRY(kvq_cuda_event_create(c->device, &c->area_sent, err));
    KVQ_TRY(create_stage(c, &c->floats, c->stream, err));
    for (int i = 0; i < CUDA_LANES; i++) KVQ_TRY(create_stage(c, &c->lanes[i], NULL, err));

done:
    return status;
}

static void free_unused(cuda_backend *c, bool all) {
    for (cuda_block **at = &c->blocks; *at != NULL;) {
        cuda_block *block = *at;
        if (block->used && !all) {
            at = &block->next;
            continue;
        }
        *at = block->next;
        kvq_cuda_free(c->device, block->memory);
        kvq_free(c->table.ctx, block);
    }
}

void cuda_transfer_destroy(cuda_backend *c) {
    free_unused(c, true);
    kvq_cuda_free(c->device, c->area.device);
    kvq_cuda_free_pinned(c->device, c->area.host);
    kvq_cuda_free(c->device, c->factors);
    destroy_stage(c, &c->floats);
    for (int i = 0; i < CUDA_LANES; i++) destroy_stage(c, &c->lanes[i]);
    kvq_cuda_event_destroy(c->device, c->cleared);
    kvq_cuda_event_destroy(c->device, c->area_sent);
    kvq_cuda_stream_destroy(c->device, c->stream);
    (void)pthread_mutex_destroy(&c->lock);
}

// ---------------------------------------------------------------- allocation

// Asking a device for memory makes it wait for all of its work, so what is released is kept: layers come and go in one
// size.
static cuda_block *take_unused(cuda_backend *c, size_t bytes) {
    for (cuda_block *b = c->blocks; b != NULL; b = b->next) {
        if (!b->used && b->bytes == bytes) return b;
    }
    return NULL;
}

static kvq_status new_block(cuda_backend *c, size_t bytes, const char *what, cuda_block **out, kvq_error *err) {
    cuda_block *block = NULL;
    kvq_status  status = KVQ_NEW(c->table.ctx, 1, "block of device memory", &block, err);
    if (status != KVQ_OK) return status;
    status = kvq_cuda_alloc(c->device, bytes, what, &block->memory, err);
    if (status == KVQ_ERR_MEMORY) { // what is kept for later may be what is missing now
        free_unused(c, false);
        status = kvq_cuda_alloc(c->device, bytes, what, &block->memory, err);
    }
    if (status != KVQ_OK) {
        kvq_free(c->table.ctx, block);
        return status;
    }
    block->bytes = bytes;
    block->next = c->blocks;
    c->blocks = block;
    *out = block;
    return KVQ_OK;
}

kvq_status cuda_alloc(const kvq_backend *be, int64_t n_floats, const char *what, float **out, kvq_error *err) {
    cuda_backend *c = cuda_of(be);
    size_t        bytes = round_up(n_floats > 0 ? (size_t)n_floats * sizeof(float) : 1);
    kvq_status    status = KVQ_OK;
    (void)pthread_mutex_lock(&c->lock);
    cuda_block *block = take_unused(c, bytes);
    if (block == NULL) KVQ_TRY(new_block(c, bytes, what, &block, err));
    KVQ_TRY(kvq_cuda_clear(c->device, block->memory, bytes, c->stream, err));
    KVQ_TRY(kvq_cuda_record(c->device, c->cleared, c->stream, err));
    block->used = true;
    *out = block->memory;

done:
    (void)pthread_mutex_unlock(&c->lock);
    return status;
}

void cuda_release(const kvq_backend *be, float *p) {
    cuda_backend *c = cuda_of(be);
    (void)pthread_mutex_lock(&c->lock);
    for (cuda_block *b = c->blocks; b != NULL && p != NULL; b = b->next) {
        if (b->memory == p) b->used = false;
    }
    (void)pthread_mutex_unlock(&c->lock);
}

bool cuda_grow(cuda_backend *c, void **memory, size_t *held, size_t bytes, const char *what) {
    kvq_error err = {KVQ_OK, "", ""};
    if (atomic_load(&c->failed)) return false;
    if (*held >= bytes) return true;
    kvq_cuda_free(c->device, *memory);
    *memory = NULL;
    *held = 0;
    if (!cuda_note(c, kvq_cuda_alloc(c->device, round_up(bytes), what, memory, &err), &err)) return false;
    *held = round_up(bytes);
    return true;
}

// ---------------------------------------------------------------- arrays of floats

// Copies a piece into the next half, which travels to the device; the caller holds the stage. bf16: rounded to it.
static kvq_status send_half(cuda_backend *c, cuda_stage *s, void *to, const float *from, int64_t n, bool bf16,
                            kvq_error *err) {
    int        half = s->turn;
    kvq_status status = kvq_cuda_await(c->device, s->passed[half], err);
    if (status != KVQ_OK) return status;
    uint16_t *narrow = (uint16_t *)(void *)s->pinned[half];
    for (int64_t i = 0; bf16 && i < n; i++) narrow[i] = kvq_bf16_of_float(from[i]);
    if (!bf16) memcpy(s->pinned[half], from, (size_t)n * sizeof *from);
    size_t bytes = (size_t)n * (bf16 ? sizeof *narrow : sizeof *from);
    KVQ_TRY(kvq_cuda_copy(c->device, KVQ_CUDA_TO_DEVICE, to, s->pinned[half], bytes, s->stream, err));
    KVQ_TRY(kvq_cuda_record(c->device, s->passed[half], s->stream, err));
    s->turn = 1 - half;

done:
    return status;
}

static kvq_status send(cuda_backend *c, cuda_stage *s, void *to, const float *from, int64_t n, bool bf16,
                       kvq_error *err) {
    int64_t    most = (int64_t)(HALF_BYTES / sizeof(float));
    kvq_status status = KVQ_OK;
    for (int64_t at = 0; at < n && status == KVQ_OK; at += most) {
        size_t offset = (size_t)at * (bf16 ? sizeof(uint16_t) : sizeof(float));
        status = send_half(c, s, (uint8_t *)to + offset, from + at, n - at < most ? n - at : most, bf16, err);
    }
    return status;
}

void cuda_upload(const kvq_backend *be, float *to, const float *host_from, int64_t n) {
    cuda_backend *c = cuda_of(be);
    kvq_error     err = {KVQ_OK, "", ""};
    if (atomic_load(&c->failed)) return;
    (void)pthread_mutex_lock(&c->floats.lock);
    (void)cuda_note(c, send(c, &c->floats, to, host_from, n, false, &err), &err);
    (void)pthread_mutex_unlock(&c->floats.lock);
}

// Asks for the next piece before it waits for this one.
static kvq_status receive(cuda_backend *c, cuda_stage *s, float *to, const float *from, int64_t n, kvq_error *err) {
    int64_t    most = (int64_t)(HALF_BYTES / sizeof(float)), asked = 0, done = 0;
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++) KVQ_TRY(kvq_cuda_await(c->device, s->passed[i], err)); // what an upload left there
    while (done < n) {
        for (; asked < n && asked < done + 2 * most; asked += most) {
            int    half = (int)(asked / most % 2);
            size_t bytes = (size_t)(n - asked < most ? n - asked : most) * sizeof *to;
            KVQ_TRY(kvq_cuda_copy(c->device, KVQ_CUDA_TO_HOST, s->pinned[half], from + asked, bytes, s->stream, err));
            KVQ_TRY(kvq_cuda_record(c->device, s->passed[half], s->stream, err));
        }
        int     half = (int)(done / most % 2);
        int64_t count = n - done < most ? n - done : most;
        KVQ_TRY(kvq_cuda_await(c->device, s->passed[half], err));
        memcpy(to + done, s->pinned[half], (size_t)count * sizeof *to);
        done += count;
    }

done:
    return status;
}

void cuda_download(const kvq_backend *be, float *host_to, const float *from, int64_t n) {
    cuda_backend *c = cuda_of(be);
    kvq_error     err = {KVQ_OK, "", ""};
    bool          arrived = false;
    if (!atomic_load(&c->failed)) {
        (void)pthread_mutex_lock(&c->floats.lock);
        arrived = cuda_note(c, receive(c, &c->floats, host_to, from, n, &err), &err);
        (void)pthread_mutex_unlock(&c->floats.lock);
    }
    for (int64_t i = 0; !arrived && i < n; i++) host_to[i] = NAN;
}

// ---------------------------------------------------------------- weights

static cuda_stage *enter_lane(cuda_backend *c, int64_t row) {
    for (int i = 0; i < CUDA_LANES; i++) {
        if (pthread_mutex_trylock(&c->lanes[i].lock) == 0) return &c->lanes[i];
    }
    cuda_stage *lane = &c->lanes[row % CUDA_LANES];
    (void)pthread_mutex_lock(&lane->lock);
    return lane;
}

void cuda_upload_weights(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                         const float *host_from) {
    cuda_backend *c = cuda_of(be);
    bool          bf16 = c->compute == KVQ_COMPUTE_BF16;
    size_t        offset = (size_t)(row * n_in) * (bf16 ? sizeof(uint16_t) : sizeof(float));
    kvq_error     err = {KVQ_OK, "", ""};
    if (atomic_load(&c->failed)) return;
    cuda_stage *lane = enter_lane(c, row);
    if (cuda_note(c, kvq_cuda_follow(c->device, lane->stream, c->cleared, &err), &err))
        (void)cuda_note(c, send(c, lane, (uint8_t *)w + offset, host_from, n_rows * n_in, bf16, &err), &err);
    (void)pthread_mutex_unlock(&lane->lock);
}

// ---------------------------------------------------------------- arguments and results

static bool grow_area(cuda_backend *c, size_t bytes) {
    kvq_error err = {KVQ_OK, "", ""};
    if (c->area.bytes >= bytes) return true;
    if (!cuda_grow(c, &c->area.device, &c->area.bytes, bytes, "arguments and results")) return false;
    kvq_cuda_free_pinned(c->device, c->area.host);
    c->area.host = NULL;
    if (cuda_note(c, kvq_cuda_alloc_pinned(c->device, c->area.bytes, &c->area.host, &err), &err)) return true;
    c->area.bytes = 0;
    return false;
}

bool cuda_area(cuda_backend *c, cuda_piece *pieces, int n) {
    kvq_error err = {KVQ_OK, "", ""};
    size_t    bytes = 0, at = 0;
    if (atomic_load(&c->failed)) return false;
    for (int i = 0; i < n; i++) bytes += round_up(pieces[i].bytes);
    if (!cuda_note(c, kvq_cuda_await(c->device, c->area_sent, &err), &err) || !grow_area(c, bytes)) return false;
    for (int i = 0; i < n; at += round_up(pieces[i++].bytes)) {
        pieces[i].host = (uint8_t *)c->area.host + at;
        pieces[i].device = (uint8_t *)c->area.device + at;
    }
    return true;
}

void cuda_send(cuda_backend *c, const cuda_piece *piece) {
    kvq_error err = {KVQ_OK, "", ""};
    if (cuda_note(
            c, kvq_cuda_copy(c->device, KVQ_CUDA_TO_DEVICE, piece->device, piece->host, piece->bytes, c->stream, &err),
            &err))
        (void)cuda_note(c, kvq_cuda_record(c->device, c->area_sent, c->stream, &err), &err);
}

void cuda_put(cuda_backend *c, const cuda_piece *piece, const void *host_from) {
    memcpy(piece->host, host_from, piece->bytes);
    cuda_send(c, piece);
}

void cuda_fetch(cuda_backend *c, const cuda_piece *piece) {
    kvq_error err = {KVQ_OK, "", ""};
    (void)cuda_note(
        c, kvq_cuda_copy(c->device, KVQ_CUDA_TO_HOST, piece->host, piece->device, piece->bytes, c->stream, &err), &err);
}

bool cuda_arrived(cuda_backend *c) {
    kvq_error err = {KVQ_OK, "", ""};
    if (atomic_load(&c->failed)) return false;
    return cuda_note(c, kvq_cuda_finish(c->device, c->stream, &err), &err);
}
