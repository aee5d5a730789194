// SPDX-License-Identifier: Apache-2.0
// The packed cache against the codec alone, for both schemes and many shapes: pieces, pages, copies, several sequences,
// what happens when memory ends, and counts of codes.
#include <math.h>

#include "counting_memory.h"
#include "decoder_impl.h"
#include "packed_rig.h"

// Both schemes at the head widths of real models and at one that is neither a power of two nor a multiple of 32; with
// and without sinks (also more than a tile), recent windows (also longer than a page), outliers and tables per head.
static const setup SETUPS[] = {
    {.n_heads = 3, .head_dim = 64, .n_layers = 1, .sinks = 1, .n_side = 2},
    {.n_heads = 2, .head_dim = 80, .n_layers = 1, .sinks = 4, .recent = 16, .n_side = 2, .per_head = true},
    {.n_heads = 1, .head_dim = 96, .n_layers = 1, .recent = 130},
    {.n_heads = 4, .head_dim = 128, .n_layers = 1, .sinks = 130, .recent = 5, .n_side = 3},
    {.n_heads = 1, .head_dim = 256, .n_layers = 1, .n_side = 1, .per_head = true},
    {.n_heads = 3, .head_dim = 24, .n_layers = 1, .sinks = 2, .recent = 1, .n_side = 1},
    {.tiled = true, .n_heads = 3, .head_dim = 64, .n_layers = 1, .sinks = 1, .n_side = 2, .n_slots = 16, .dim = 2},
    {.tiled = true, .n_heads = 2, .head_dim = 80, .n_layers = 1, .sinks = 130, .n_side = 2, .n_slots = 16, .dim = 1},
    {.tiled = true, .n_heads = 1, .head_dim = 96, .n_layers = 1, .dim = 2},
    {.tiled = true, .n_heads = 4, .head_dim = 128, .n_layers = 1, .sinks = 4, .n_side = 3, .n_slots = 200, .dim = 2},
    {.tiled = true, .n_heads = 1, .head_dim = 256, .n_layers = 1, .sinks = 5, .n_side = 1, .n_slots = 2, .dim = 1},
    {.tiled = true, .n_heads = 3, .head_dim = 24, .n_layers = 1, .sinks = 128, .n_side = 1, .n_slots = 6, .dim = 2},
};
enum { N_SETUPS = sizeof SETUPS / sizeof *SETUPS, N_MOST = 1000 };
static const int64_t LENGTHS[] = {1, 15, 16, 17, 127, 128, 129, 300, N_MOST};
enum { N_LENGTHS = sizeof LENGTHS / sizeof *LENGTHS };

static void flush(const rig *r, kvq_packed_layer *cache) {
    kvq_error err = {0};
    kvq_test_ok(kvq_packed_layer_flush(r->be, cache, &err), &err);
}

static void open_tokens(rig *r, const setup *with, float *x[2], int64_t n) {
    rig_open(r, *with);
    for (uint32_t i = 0; i < 2; i++) x[i] = randoms(n * r->d, 1 + i);
}

static void close_tokens(rig *r, float *x[2]) {
    free(x[0]), free(x[1]);
    rig_close(r);
}

// ---------------------------------------------------------------- against the codec

// One by one, at once, and by the codec alone: the same numbers and the same bytes, also after a flush.
START_TEST(any_pieces_are_what_the_codec_makes) {
    rig    r;
    float *x[2];
    open_tokens(&r, &SETUPS[_i], x, N_MOST);
    kvq_packed_layer *one = new_cache(&r, 0, N_MOST);
    for (int i = 0, at = 0; i < N_LENGTHS; i++) {
        int64_t           n = LENGTHS[i];
        kvq_packed_layer *whole = new_cache(&r, 0, n);
        for (; at < n; at++) append(&r, one, x, at, at + 1);
        append(&r, whole, x, 0, n);
        expect_same_bytes(one, whole);
        expect_cache(&r, whole, 0, n, coded_of(&r, n), x);
        kvq_cache_size size = kvq_artifact_cache_size(r.artifact, n);
        ck_assert_int_eq(kvq_packed_layer_bytes(one), size.row_bytes + size.exact_bytes);
        flush(&r, whole);
        expect_cache(&r, whole, 0, n, flushed_of(&r, n), x);
        kvq_packed_layer_destroy(&r.ctx, &whole);
    }
    kvq_packed_layer_destroy(&r.ctx, &one);
    close_tokens(&r, x);
}
END_TEST

// A flush in the middle is forgotten by tiles, and remembered by rows, which start a new window.
START_TEST(a_cache_goes_on_after_a_flush) {
    enum { FIRST = 200, N = 290 };
    rig    r;
    float *x[2];
    open_tokens(&r, &SETUPS[_i], x, N);
    kvq_packed_layer *cache = new_cache(&r, 0, N);
    append(&r, cache, x, 0, FIRST);
    flush(&r, cache);
    flush(&r, cache);
    expect_cache(&r, cache, 0, FIRST, flushed_of(&r, FIRST), x);
    for (int64_t n = FIRST; n < N; n++) {
        append(&r, cache, x, n, n + 1);
        if (n % 30 != 0) continue;
        int64_t before = flushed_of(&r, FIRST), now = coded_of(&r, n + 1);
        expect_cache(&r, cache, 0, n + 1, r.with.tiled || now > before ? now : before, x);
    }
    kvq_packed_layer_destroy(&r.ctx, &cache);
    close_tokens(&r, x);
}
END_TEST

// Beyond the capacity nothing changes; a reset cache is as good as new and keeps its memory.
START_TEST(a_full_cache_refuses_and_a_reset_one_starts_again) {
    enum { N = 260 };
    rig       r;
    float    *x[2];
    kvq_error err = {0};
    open_tokens(&r, &SETUPS[_i], x, N + 1);
    kvq_packed_layer *cache = new_cache(&r, 0, N);
    append(&r, cache, x, 0, 250);
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, x[0], x[1], 11, &err), KVQ_ERR_USAGE, &err,
                    "layer 0: 11 tokens do not fit behind 250 in a cache of 260");
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, x[0], x[1], -1, &err), KVQ_ERR_USAGE, &err, "do not fit");
    expect_cache(&r, cache, 0, 250, coded_of(&r, 250), x);
    append(&r, cache, x, 250, N);
    expect_cache(&r, cache, 0, N, coded_of(&r, N), x);
    flush(&r, cache);
    int64_t held = kvq_packed_layer_held_bytes(cache);
    kvq_packed_layer_reset(cache);
    ck_assert_int_eq(kvq_packed_layer_bytes(cache), 0);
    ck_assert_int_eq(kvq_packed_layer_held_bytes(cache), held);
    expect_cache(&r, cache, 0, 0, 0, x);
    append(&r, cache, x, 0, 150);
    expect_cache(&r, cache, 0, 150, coded_of(&r, 150), x);
    ck_assert_int_eq(kvq_packed_layer_held_bytes(cache), held);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    close_tokens(&r, x);
}
END_TEST

START_TEST(layers_and_capacities_that_are_not_there) {
    rig               r;
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    rig_open(&r, SETUPS[_i]);
    for (int64_t layer = -1; layer < 2; layer += 2)
        kvq_test_failed(kvq_packed_layer_create(&r.ctx, r.artifact, layer, 5, &cache, &err), KVQ_ERR_USAGE, &err,
                        "of an artifact of 1 layers");
    kvq_test_failed(kvq_packed_layer_create(&r.ctx, r.artifact, 0, -1, &cache, &err), KVQ_ERR_USAGE, &err, "-1 tokens");
    ck_assert_ptr_null(cache);
    cache = new_cache(&r, 0, 0);
    flush(&r, cache);
    ck_assert_int_eq(kvq_packed_layer_bytes(cache), 0);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    rig_close(&r);
}
END_TEST

// Keys without any bits and without outliers make tiles of no bytes at all.
START_TEST(keys_may_have_no_bytes) {
    enum { N = 300 };
    rig    r;
    setup  with = {.tiled = true, .n_heads = 1, .head_dim = 8, .n_layers = 1, .sinks = 1, .dim = 1};
    float *x[2];
    open_tokens(&r, &with, x, N);
    memset(r.artifact->layers[0].k.widths, 0, 8);
    kvq_packed_layer *cache = new_cache(&r, 0, N);
    append(&r, cache, x, 0, 100);
    append(&r, cache, x, 100, N);
    expect_cache(&r, cache, 0, N, coded_of(&r, N), x);
    flush(&r, cache);
    expect_cache(&r, cache, 0, N, N, x);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    close_tokens(&r, x);
}
END_TEST

// ---------------------------------------------------------------- memory

// Of a capacity of a million tokens only those pages exist that hold something, and what is said to be held is what was
// allocated (which adds up to 64 bytes to each block).
START_TEST(memory_follows_the_tokens) {
    enum { N = 3 * TILE, CAPACITY = 1 << 20 };
    rig             r;
    float          *x[2];
    counting_memory memory = {.inner = kvq_test_context()};
    setup           with = SETUPS[_i];
    with.sinks = with.recent = 0;
    open_tokens(&r, &with, x, N);
    r.ctx = counting_context(&memory);
    kvq_packed_layer *cache = new_cache(&r, 0, CAPACITY);
    int64_t           held = kvq_packed_layer_held_bytes(cache), before = memory.now;
    ck_assert_int_eq(held, with.tiled ? 2 * TILE * r.d * 2 : 0);
    ck_assert_int_lt(before, CAPACITY + 400 * r.d * 4); // tables of pages, and what the codec needs to know
    for (int n = 0; n < N; n++) {
        append(&r, cache, x, n, n + 1);
        int64_t n_pages = with.tiled ? (n + 1) / TILE : n / TILE + 1, page = 0;
        if (n_pages > 0) page = (kvq_packed_layer_held_bytes(cache) - held) / n_pages;
        ck_assert_int_eq(kvq_packed_layer_held_bytes(cache) - held, n_pages * page);
        ck_assert_int_ge(memory.now - before, n_pages * page);
        ck_assert_int_le(memory.now - before, n_pages * (page + 128));
        ck_assert_int_ge(kvq_packed_layer_held_bytes(cache), kvq_packed_layer_bytes(cache));
    }
    kvq_cache_size size = kvq_artifact_cache_size(r.artifact, N);
    ck_assert_int_eq(kvq_packed_layer_held_bytes(cache) - held, size.row_bytes);
    kvq_packed_layer_reset(cache); // pages stay, and a tile that is closed early takes one more
    append(&r, cache, x, 0, 10);
    flush(&r, cache);
    ck_assert_int_eq(kvq_packed_layer_held_bytes(cache) - held, size.row_bytes / 3 * (with.tiled ? 4 : 3));
    kvq_packed_layer_destroy(&r.ctx, &cache);
    ck_assert_int_eq(memory.now, 0);
    r.ctx = memory.inner;
    close_tokens(&r, x);
}
END_TEST

// A rig whose cache and backend take their memory from a limited one; the artifact does not.
static void limit_rig(rig *r, limited_memory *memory, kvq_context *normal) {
    *normal = r->ctx;
    r->be->destroy(&r->be);
    memory->inner = *normal;
    memory->left = INT64_MAX;
    r->ctx = limited_context(memory);
    r->ctx.n_threads = 1;
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, NULL), NULL);
}

static void unlimit_rig(rig *r, limited_memory *memory, const kvq_context *normal) {
    r->be->destroy(&r->be);
    ck_assert_int_eq(memory->n_live, 0);
    r->ctx = *normal;
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, NULL), NULL);
}

// Whichever allocation of creation, of an append or of a flush fails: the cache holds what it held, and nothing leaks.
// Pages that were got before the failure stay, so every try has a cache of its own.
START_TEST(memory_that_ends_changes_nothing) {
    enum { FIRST = 100, N = 400, N_TRIES = 60 };
    rig               r;
    float            *x[2];
    limited_memory    memory = {.left = 0};
    kvq_context       normal;
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    int               n_failed[3] = {0};
    open_tokens(&r, &SETUPS[_i], x, N);
    limit_rig(&r, &memory, &normal);
    int64_t n_live = memory.n_live;
    bool    failing = true;
    for (int64_t left = 0; failing && left < N_TRIES; left++) {
        memory.left = left;
        kvq_status status[3] = {kvq_packed_layer_create(&r.ctx, r.artifact, 0, N, &cache, &err), KVQ_OK, KVQ_OK};
        memory.left = INT64_MAX;
        ck_assert_int_eq(cache == NULL, status[0] != KVQ_OK);
        if (cache == NULL) cache = new_cache(&r, 0, N);
        append(&r, cache, x, 0, FIRST);
        memory.left = left;
        status[1] = kvq_packed_layer_append(r.be, cache, x[0] + FIRST * r.d, x[1] + FIRST * r.d, N - FIRST, &err);
        memory.left = INT64_MAX;
        if (status[1] != KVQ_OK) {
            expect_cache(&r, cache, 0, FIRST, coded_of(&r, FIRST), x);
            append(&r, cache, x, FIRST, N);
        }
        expect_cache(&r, cache, 0, N, coded_of(&r, N), x);
        memory.left = left;
        status[2] = kvq_packed_layer_flush(r.be, cache, &err);
        memory.left = INT64_MAX;
        expect_cache(&r, cache, 0, N, status[2] == KVQ_OK ? flushed_of(&r, N) : coded_of(&r, N), x);
        kvq_packed_layer_destroy(&r.ctx, &cache);
        ck_assert_int_eq(memory.n_live, n_live);
        failing = false;
        for (int i = 0; i < 3; i++) {
            ck_assert(status[i] == KVQ_OK || status[i] == KVQ_ERR_MEMORY);
            n_failed[i] += status[i] != KVQ_OK;
            failing = failing || status[i] != KVQ_OK;
        }
    }
    ck_assert(!failing && n_failed[0] > 5 && n_failed[1] > 0);
    ck_assert(n_failed[2] > 0 || r.with.recent == 0); // rows without a window have nothing to flush
    unlimit_rig(&r, &memory, &normal);
    close_tokens(&r, x);
}
END_TEST

// A flush closes the open tile early. An append that would complete this tile and fails in the other tensor must not
// have touched it, although the tokens that it brought would have taken the few slots for outliers.
START_TEST(a_failed_append_leaves_a_closed_tile_alone) {
    enum { FIRST = 100, N = 200 };
    rig   r;
    setup with = {
        .tiled = true, .n_heads = 2, .head_dim = 16, .n_layers = 1, .sinks = 1, .n_side = 2, .n_slots = 4, .dim = 2};
    float    *x[2];
    kvq_error err = {0};
    open_tokens(&r, &with, x, N);
    for (int64_t i = FIRST * r.d; i < N * r.d; i++) x[0][i] *= 3;
    kvq_packed_layer *cache = new_cache(&r, 0, N);
    append(&r, cache, x, 0, FIRST);
    flush(&r, cache);
    float fine = x[1][150 * r.d + 3];
    x[1][150 * r.d + 3] = 1e6f;
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, x[0] + FIRST * r.d, x[1] + FIRST * r.d, N - FIRST, &err),
                    KVQ_ERR_NUMERICAL, &err, "layer 0, V, position 150");
    expect_cache(&r, cache, 0, FIRST, FIRST, x);
    x[1][150 * r.d + 3] = fine;
    append(&r, cache, x, FIRST, N);
    expect_cache(&r, cache, 0, N, TILE, x);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    close_tokens(&r, x);
}
END_TEST

// ---------------------------------------------------------------- copies

static const int64_t FORKS[] = {0, 3, 128, 140, 300};

// A copy has the same bytes, and goes its own way; so does what it was copied from.
START_TEST(copies_are_independent) {
    enum { N = 420 };
    rig       r;
    float    *x[2], *other[2];
    kvq_error err = {0};
    open_tokens(&r, &SETUPS[_i], x, N);
    for (int i = 0; i < 2; i++) other[i] = randoms(N * r.d, 3 + (uint32_t)i);
    for (int f = 0; f < 10; f++) {
        int64_t           n = FORKS[f / 2], coded = coded_of(&r, n);
        kvq_packed_layer *cache = new_cache(&r, 0, N), *copy = NULL;
        append(&r, cache, x, 0, n);
        if (f % 2 == 1) flush(&r, cache), coded = flushed_of(&r, n);
        kvq_test_ok(kvq_packed_layer_copy(&r.ctx, cache, &copy, &err), &err);
        expect_same_bytes(cache, copy);
        expect_cache(&r, copy, 0, n, coded, x);
        for (int i = 0; i < 2; i++) memcpy(other[i], x[i], (size_t)(n * r.d) * sizeof *x[i]);
        append(&r, cache, x, n, N);
        append(&r, copy, other, n, n + 50);
        append(&r, copy, other, n + 50, N);
        coded = coded > coded_of(&r, N) && !r.with.tiled ? coded : coded_of(&r, N);
        expect_cache(&r, cache, 0, N, coded, x);
        expect_cache(&r, copy, 0, N, coded, other);
        kvq_test_failed(kvq_packed_layer_append(r.be, copy, x[0], x[1], 1, &err), KVQ_ERR_USAGE, &err, "do not fit");
        kvq_packed_layer_destroy(&r.ctx, &cache);
        expect_cache(&r, copy, 0, N, coded, other);
        kvq_packed_layer_destroy(&r.ctx, &copy);
    }
    free(other[0]), free(other[1]);
    close_tokens(&r, x);
}
END_TEST

START_TEST(copies_without_memory_leave_nothing) {
    enum { N = 300, N_TRIES = 60 };
    rig            r;
    float         *x[2];
    limited_memory memory = {.left = 0};
    kvq_context    normal;
    kvq_error      err = {0};
    int            n_failed = 0;
    open_tokens(&r, &SETUPS[_i], x, N);
    limit_rig(&r, &memory, &normal);
    kvq_packed_layer *cache = new_cache(&r, 0, N), *copy = NULL;
    append(&r, cache, x, 0, N);
    flush(&r, cache);
    int64_t n_live = memory.n_live;
    for (memory.left = 0; kvq_packed_layer_copy(&r.ctx, cache, &copy, &err) != KVQ_OK; memory.left = ++n_failed) {
        ck_assert_int_eq(err.status, KVQ_ERR_MEMORY);
        ck_assert_ptr_null(copy);
        ck_assert_int_eq(memory.n_live, n_live);
        ck_assert_int_lt(n_failed, N_TRIES);
    }
    ck_assert_int_gt(n_failed, 5);
    expect_same_bytes(cache, copy);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    kvq_packed_layer_destroy(&r.ctx, &copy);
    unlimit_rig(&r, &memory, &normal);
    close_tokens(&r, x);
}
END_TEST

// ---------------------------------------------------------------- several sequences

enum { N_SEQUENCES = 3, N_LAYERS = 3, N_TOKENS = 280 };
static const setup MODELS[] = {
    {.n_heads = 2, .head_dim = 24, .n_layers = N_LAYERS, .sinks = 2, .recent = 20, .n_side = 1},
    {.tiled = true,
     .n_heads = 2,
     .head_dim = 24,
     .n_layers = N_LAYERS,
     .sinks = 2,
     .n_side = 1,
     .n_slots = 6,
     .dim = 2},
};

typedef struct story { // what a sequence of a cache was told
    float  *x[N_LAYERS][2];
    int64_t n;
} story;

static void tell(const rig *r, kvq_packed_cache *cache, int64_t sequence, story *s, int64_t n) {
    for (int64_t l = 0; l < N_LAYERS; l++)
        append(r, kvq_packed_cache_layer(cache, sequence, l), s->x[l], s->n, s->n + n);
    s->n += n;
}

static void retell(const rig *r, story *to, const story *from) {
    for (int64_t i = 0; i < 2 * N_LAYERS; i++)
        memcpy(to->x[i / 2][i % 2], from->x[i / 2][i % 2], (size_t)(from->n * r->d) * sizeof(float));
    to->n = from->n;
}

static void expect_stories(const rig *r, const kvq_packed_cache *cache, const story *s) {
    int64_t bytes = 0, held = 0;
    for (int64_t i = 0; i < N_SEQUENCES; i++) {
        kvq_cache_size size = kvq_artifact_cache_size(r->artifact, s[i].n);
        bytes += size.row_bytes + size.exact_bytes;
        for (int64_t l = 0; l < N_LAYERS; l++) {
            const kvq_packed_layer *layer = kvq_packed_cache_layer(cache, i, l);
            expect_cache(r, layer, l, s[i].n, coded_of(r, s[i].n), s[i].x[l]);
            held += kvq_packed_layer_held_bytes(layer);
        }
    }
    ck_assert_int_eq(kvq_packed_cache_bytes(cache), bytes);
    ck_assert_int_eq(kvq_packed_cache_held_bytes(cache), held);
}

static void open_stories(const rig *r, story *s) {
    for (uint32_t i = 0; i < N_SEQUENCES * N_LAYERS * 2; i++)
        s[i / (2 * N_LAYERS)].x[i / 2 % N_LAYERS][i % 2] = randoms(N_TOKENS * r->d, 50 + i);
}

static void close_stories(story *s) {
    for (int i = 0; i < N_SEQUENCES * N_LAYERS * 2; i++) free(s[i / (2 * N_LAYERS)].x[i / 2 % N_LAYERS][i % 2]);
}

// Sequences that grow in turn, one that is reset, and one that becomes a copy of a longer and then of a shorter one.
START_TEST(sequences_know_nothing_of_each_other) {
    rig               r;
    story             s[N_SEQUENCES] = {{.n = 0}};
    kvq_error         err = {0};
    kvq_packed_cache *cache = NULL;
    rig_open(&r, MODELS[_i]);
    open_stories(&r, s);
    kvq_test_ok(kvq_packed_cache_create(&r.ctx, r.artifact, N_SEQUENCES, N_TOKENS, &cache, &err), &err);
    expect_stories(&r, cache, s);
    tell(&r, cache, 0, &s[0], 17);
    tell(&r, cache, 1, &s[1], 150);
    tell(&r, cache, 0, &s[0], 120);
    tell(&r, cache, 2, &s[2], 1);
    expect_stories(&r, cache, s);
    kvq_test_ok(kvq_packed_cache_copy(cache, 1, 2, &err), &err);
    retell(&r, &s[2], &s[1]);
    expect_stories(&r, cache, s);
    tell(&r, cache, 1, &s[1], 100);
    for (int i = 0; i < 3; i++) tell(&r, cache, 2, &s[2], 40);
    expect_stories(&r, cache, s);
    kvq_test_ok(kvq_packed_cache_reset(cache, 1, &err), &err);
    s[1].n = 0;
    expect_stories(&r, cache, s);
    tell(&r, cache, 1, &s[1], 9);
    kvq_test_ok(kvq_packed_cache_copy(cache, 1, 2, &err), &err);
    kvq_test_ok(kvq_packed_cache_copy(cache, 0, 0, &err), &err);
    retell(&r, &s[2], &s[1]);
    tell(&r, cache, 2, &s[2], 200);
    expect_stories(&r, cache, s);
    kvq_packed_cache_destroy(&r.ctx, &cache);
    kvq_packed_cache_destroy(&r.ctx, &cache);
    close_stories(s);
    rig_close(&r);
}
END_TEST

START_TEST(sequences_that_are_not_there) {
    rig               r;
    kvq_error         err = {0};
    kvq_packed_cache *cache = NULL;
    rig_open(&r, MODELS[_i]);
    kvq_test_failed(kvq_packed_cache_create(&r.ctx, r.artifact, -1, 5, &cache, &err), KVQ_ERR_USAGE, &err, "-1 seq");
    kvq_test_failed(kvq_packed_cache_create(&r.ctx, r.artifact, 1, -5, &cache, &err), KVQ_ERR_USAGE, &err, "-5 tokens");
    kvq_test_failed(kvq_packed_cache_create(&r.ctx, r.artifact, INT64_MAX / 2, 5, &cache, &err), KVQ_ERR_MEMORY, &err,
                    "layers of sequences");
    ck_assert_ptr_null(cache);
    kvq_test_ok(kvq_packed_cache_create(&r.ctx, r.artifact, 2, 5, &cache, &err), &err);
    for (int64_t i = -1; i < 3; i += 3) {
        ck_assert_ptr_null(kvq_packed_cache_layer(cache, i, 0));
        kvq_test_failed(kvq_packed_cache_reset(cache, i, &err), KVQ_ERR_USAGE, &err, "of a cache of 2 sequences");
        kvq_test_failed(kvq_packed_cache_copy(cache, i, 0, &err), KVQ_ERR_USAGE, &err, "of a cache of 2 sequences");
        kvq_test_failed(kvq_packed_cache_copy(cache, 1, i, &err), KVQ_ERR_USAGE, &err, "of a cache of 2 sequences");
    }
    ck_assert_ptr_null(kvq_packed_cache_layer(cache, 1, -1));
    ck_assert_ptr_null(kvq_packed_cache_layer(cache, 1, N_LAYERS));
    ck_assert_ptr_null(kvq_packed_cache_layer(cache, 2, 0));
    kvq_packed_cache_destroy(&r.ctx, &cache);
    rig_close(&r);
}
END_TEST

// A copy that fails in some layer leaves all layers of its target as they were.
START_TEST(a_sequence_is_copied_as_a_whole_or_not_at_all) {
    rig               r;
    story             s[N_SEQUENCES] = {{.n = 0}};
    limited_memory    memory = {.left = 0};
    kvq_context       normal;
    kvq_error         err = {0};
    kvq_packed_cache *cache = NULL;
    int               n_failed = 0;
    rig_open(&r, MODELS[_i]);
    open_stories(&r, s);
    limit_rig(&r, &memory, &normal);
    int64_t n_live = memory.n_live;
    for (memory.left = 0; kvq_packed_cache_create(&r.ctx, r.artifact, N_SEQUENCES, N_TOKENS, &cache, &err) != KVQ_OK;
         memory.left = ++n_failed) {
        ck_assert_int_eq(err.status, KVQ_ERR_MEMORY);
        ck_assert_ptr_null(cache);
        ck_assert_int_eq(memory.n_live, n_live);
    }
    ck_assert_int_gt(n_failed, 30);
    memory.left = INT64_MAX;
    tell(&r, cache, 0, &s[0], 200);
    tell(&r, cache, 1, &s[1], 10);
    // pages that were got before a failure stay, so two blocks at a time will do it in the end
    kvq_status status = KVQ_ERR_MEMORY;
    for (n_failed = 0; status != KVQ_OK; n_failed += status != KVQ_OK) {
        memory.left = n_failed == 0 ? 0 : 2;
        status = kvq_packed_cache_copy(cache, 0, 1, &err);
        memory.left = INT64_MAX;
        ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
        ck_assert_int_lt(n_failed, 20);
        if (status != KVQ_OK) expect_stories(&r, cache, s);
    }
    ck_assert_int_gt(n_failed, 1);
    retell(&r, &s[1], &s[0]);
    expect_stories(&r, cache, s);
    kvq_packed_cache_destroy(&r.ctx, &cache);
    unlimit_rig(&r, &memory, &normal);
    close_stories(s);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- codes

START_TEST(use_of_codes_by_hand) {
    static kvq_code_counts c;
    ck_assert(isnan(kvq_code_use(&c)));
    c.n[0][0] = 7; // columns without bits count for nothing
    ck_assert(isnan(kvq_code_use(&c)));
    for (int code = 0; code < 4; code++) c.n[2][code] = 5;
    ck_assert_double_eq_tol(kvq_code_use(&c), 1, 1e-15);
    c.n[1][0] = 3;
    c.n[1][1] = 1; // -(3/4 log2 3/4 + 1/4 log2 1/4) = 2 - 3/4 log2 3 bits
    ck_assert_double_eq_tol(kvq_code_use(&c), (20 * 2 + 4 * (2 - 0.75 * log2(3))) / (20 * 2 + 4), 1e-15);
    c.n[8][255] = 10; // always the same code
    ck_assert_double_eq_tol(kvq_code_use(&c), (20 * 2 + 4 * (2 - 0.75 * log2(3))) / (20 * 2 + 4 + 80), 1e-15);
}
END_TEST

// Codes of one tensor from saved bytes, bit by bit as the formats are drawn.
static void count_saved_rows(const uint8_t *rows, int64_t n, int d, int bits, int row_bytes, kvq_code_counts *counts) {
    for (int64_t i = 0; i < n * d; i++) {
        int code = 0;
        for (int b = 0; b < bits; b++) {
            int64_t at = i % d * bits + b;
            code |= (rows[i / d * row_bytes + at / 8] >> at % 8 & 1) << b;
        }
        counts->n[bits][code]++;
    }
}

static void count_saved_tiles(const kvq_tile_spec *s, const uint8_t *tiles, int64_t first, int64_t n,
                              kvq_code_counts *counts) {
    for (int64_t p = first; p < n; p++) {
        for (int c = 0; c < s->d / s->dim; c++) {
            const uint8_t *tile = tiles + p / TILE * kvq_tile_bytes(s);
            counts->n[s->widths[c]][kvq_tile_get_code(&s->columns[c], tile, (int)(p % TILE))]++;
        }
    }
}

static void expect_counts(const rig *r, const kvq_packed_layer *cache, int64_t n, int64_t coded) {
    static kvq_code_counts counts[2], expected;
    const kvq_layer_quant *l = &r->artifact->layers[0];
    int64_t                n_bytes, sinks = n < r->with.sinks ? n : r->with.sinks;
    uint8_t               *bytes = saved(cache, &n_bytes);
    const uint8_t         *at = bytes + HEADER;
    memset(counts, 0, sizeof counts);
    for (int tensor = 0; tensor < 2; tensor++) {
        const kvq_tensor_quant *t = tensor == 0 ? &l->k : &l->v;
        memset(&expected, 0, sizeof expected);
        at += 2 * sinks * r->d;
        if (r->with.tiled) {
            kvq_tile_view view = {.columns = NULL};
            kvq_test_ok(kvq_tile_view_create(&r->ctx, r->artifact, t, &view, NULL), NULL);
            count_saved_tiles(&view.spec, at, sinks, coded, &expected);
            int64_t whole = n / TILE * TILE;
            at += (coded + TILE - 1) / TILE * kvq_tile_bytes(&view.spec) +
                  2 * (n - (whole > sinks ? whole : sinks)) * r->d;
            kvq_tile_view_free(&r->ctx, &view);
        } else {
            float          storage[3 * 512];
            kvq_block_spec spec = kvq_tensor_block_spec(t, r->d, r->with.n_side, storage);
            count_saved_rows(at, coded, r->d, t->bits, kvq_block_row_bytes(&spec), &expected);
            at += coded * kvq_block_row_bytes(&spec) + 2 * (n - sinks - coded) * r->d;
        }
        kvq_packed_layer_count_codes(cache, tensor, &counts[tensor]);
        ck_assert_mem_eq(&counts[tensor], &expected, sizeof expected);
        kvq_packed_layer_count_codes(cache, tensor, &counts[tensor]); // adds
        for (int i = 0; i < 9 * 256; i++) expected.n[i / 256][i % 256] *= 2;
        ck_assert_mem_eq(&counts[tensor], &expected, sizeof expected);
    }
    ck_assert_int_eq(at - bytes, n_bytes - SEAL);
    free(bytes);
}

START_TEST(codes_are_those_in_the_bytes) {
    rig    r;
    float *x[2];
    open_tokens(&r, &SETUPS[_i], x, 300);
    for (int i = 0; i < N_LENGTHS && LENGTHS[i] <= 300; i++) {
        kvq_packed_layer *cache = new_cache(&r, 0, 300);
        append(&r, cache, x, 0, LENGTHS[i]);
        expect_counts(&r, cache, LENGTHS[i], coded_of(&r, LENGTHS[i]));
        flush(&r, cache);
        expect_counts(&r, cache, LENGTHS[i], flushed_of(&r, LENGTHS[i]));
        kvq_packed_layer_destroy(&r.ctx, &cache);
    }
    close_tokens(&r, x);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(any_pieces_are_what_the_codec_makes, N_SETUPS),
    KVQ_LOOP(a_cache_goes_on_after_a_flush, N_SETUPS),
    KVQ_LOOP(a_full_cache_refuses_and_a_reset_one_starts_again, N_SETUPS),
    KVQ_LOOP(layers_and_capacities_that_are_not_there, N_SETUPS),
    KVQ_CASE(keys_may_have_no_bytes),
    KVQ_LOOP(memory_follows_the_tokens, N_SETUPS),
    KVQ_LOOP(memory_that_ends_changes_nothing, N_SETUPS),
    KVQ_CASE(a_failed_append_leaves_a_closed_tile_alone),
    KVQ_LOOP(copies_are_independent, N_SETUPS),
    KVQ_LOOP(copies_without_memory_leave_nothing, N_SETUPS),
    KVQ_LOOP(sequences_know_nothing_of_each_other, 2),
    KVQ_LOOP(sequences_that_are_not_there, 2),
    KVQ_LOOP(a_sequence_is_copied_as_a_whole_or_not_at_all, 2),
    KVQ_CASE(use_of_codes_by_hand),
    KVQ_LOOP(codes_are_those_in_the_bytes, N_SETUPS),
};
KVQ_TEST_MAIN("packed cache", CASES)
