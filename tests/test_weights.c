// SPDX-License-Identifier: Apache-2.0
//
// Weights on their way from the checkpoint: what is in memory against what was announced, layers expanded in the
// background, experts one by one, damage.
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_make_model.h"
#include "model_rig.h"

// ---------------------------------------------------------------- memory

// A context that knows how much it has given out, and can refuse threads other than the first.
typedef struct ledger {
    _Atomic int64_t bytes, blocks, calls;
    bool            first_thread_only;
    pthread_t       first;
} ledger;

enum { LEDGER_HEAD = 64 }; // where a block's size stands; keeps the alignment

static void *ledger_alloc(void *user, size_t bytes) {
    ledger *l = user;
    if (l->first_thread_only && pthread_equal(pthread_self(), l->first) == 0) return NULL;
    char *p = aligned_alloc(64, bytes + LEDGER_HEAD);
    ck_assert_ptr_nonnull(p);
    memcpy(p, &bytes, sizeof bytes);
    atomic_fetch_add(&l->bytes, (int64_t)bytes);
    atomic_fetch_add(&l->blocks, 1);
    atomic_fetch_add(&l->calls, 1);
    return p + LEDGER_HEAD;
}

static void ledger_release(void *user, void *p) {
    ledger *l = user;
    char   *block = (char *)p - LEDGER_HEAD;
    size_t  bytes;
    memcpy(&bytes, block, sizeof bytes);
    atomic_fetch_sub(&l->bytes, (int64_t)bytes);
    atomic_fetch_sub(&l->blocks, 1);
    free(block);
}

static kvq_context ledger_context(ledger *l) {
    kvq_context ctx = kvq_test_context();
    *l = (ledger){.first = pthread_self()};
    ctx.alloc = ledger_alloc;
    ctx.release = ledger_release;
    ctx.user = l;
    return ctx;
}

// What was allocated since `before` are the announced floats, the structs behind the handles (less than `structs`
// bytes), and up to 64 bytes of padding for each block.
static void assert_announced(const ledger *l, const ledger *before, int64_t n_floats, int64_t structs) {
    int64_t bytes = l->bytes - before->bytes, more = 64 * (l->blocks - before->blocks) + structs;
    ck_assert_msg(bytes >= 4 * n_floats && bytes <= 4 * n_floats + more, "%lld bytes for %lld floats", (long long)bytes,
                  (long long)n_floats);
}

typedef struct ledger_model {
    ledger          ledger;
    kvq_context     ctx;
    kvq_backend    *be;
    kvq_checkpoint *checkpoint;
    kvq_model      *model;
} ledger_model;

static void ledger_open(ledger_model *m, const char *path, bool resident) {
    kvq_error err = {0};
    *m = (ledger_model){.be = NULL};
    m->ctx = ledger_context(&m->ledger);
    kvq_test_ok(kvq_backend_cpu(&m->ctx, KVQ_COMPUTE_F32, &m->be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(&m->ctx, path, &m->checkpoint, &err), &err);
    kvq_test_ok(kvq_model_create(&m->ctx, m->be, m->checkpoint, resident, &m->model, &err), &err);
}

static void ledger_close(ledger_model *m) {
    kvq_model_destroy(&m->ctx, &m->model);
    kvq_checkpoint_close(&m->ctx, &m->checkpoint);
    m->be->destroy(&m->be);
    ck_assert_int_eq(m->ledger.blocks, 0);
}

// One window through layer 0, so that experts are there.
static void run_a_layer(ledger_model *m, kvq_workspace *ws, int64_t S) {
    kvq_error  err = {0};
    float     *x = NULL;
    kvq_layer *layer = NULL;
    int32_t    ids[128];
    random_ids(ids, (int)S, KVQ_MAKE_N_TOKENS);
    kvq_test_ok(m->be->alloc(m->be, S * kvq_model_describe(m->model)->hidden_size, "x", &x, &err), &err);
    kvq_test_ok(kvq_model_embed(m->model, ids, S, x, &err), &err);
    kvq_test_ok(kvq_layer_load(m->model, 0, &layer, &err), &err);
    kvq_test_ok(kvq_layer_forward(m->model, layer, ws, S, x, NULL, NULL, &err), &err);
    kvq_layer_release(m->model, &layer);
    m->be->release(m->be, x);
}

START_TEST(memory_is_what_is_announced) {
    enum { S = 100 };
    char         path[256];
    kvq_error    err = {0};
    ledger_model m;
    make_tiny(path, sizeof path, _i);
    for (int backward = 0; backward < 2; backward++) {
        kvq_workspace *ws = NULL;
        kvq_layer     *layer = NULL;
        kvq_head      *head = NULL;
        ledger_open(&m, path, false);
        ledger before = m.ledger;
        kvq_test_ok(kvq_workspace_create(m.model, S, backward == 1, &ws, &err), &err);
        assert_announced(&m.ledger, &before, kvq_workspace_floats(m.model, S, backward == 1), 1024);
        before = m.ledger;
        run_a_layer(&m, ws, S);
        kvq_test_ok(kvq_layer_load(m.model, 1, &layer, &err), &err);
        assert_announced(&m.ledger, &before, kvq_layer_floats(m.model), 1024);
        before = m.ledger;
        kvq_test_ok(kvq_head_load(m.model, &head, &err), &err);
        assert_announced(&m.ledger, &before, kvq_head_floats(m.model), 128);
        kvq_head_release(m.model, &head);
        kvq_layer_release(m.model, &layer);
        kvq_workspace_destroy(m.model, &ws);
        ledger_close(&m);
    }
    kvq_decode  *decode = NULL;
    const float *logits = NULL;
    int32_t      ids[3] = {0, 1, 2};
    ledger_open(&m, path, true);
    ledger before = m.ledger;
    kvq_test_ok(kvq_decode_create(m.model, 3, 50, &decode, &err), &err);
    kvq_test_ok(kvq_decode_step(m.model, decode, ids, &logits, &err), &err);
    assert_announced(&m.ledger, &before, kvq_decode_floats(m.model, 3, 50), 5 * 1024);
    kvq_decode_destroy(m.model, &decode);
    ledger_close(&m);
}
END_TEST

// ---------------------------------------------------------------- in the background

// A run with every next layer expanded in the background, forward and backward.
START_TEST(layers_from_the_background_are_the_same) {
    char      path[256];
    int32_t   ids[TINY_S];
    kvq_error err = {0};
    rig       r;
    make_tiny(path, sizeof path, _i);
    rig_open(&r, path, ids, TINY_S, 2);
    random_ids(ids, TINY_S, r.c->vocab_size);
    rig_forward(&r);
    int64_t n = r.S * r.C;
    float  *x = NULL;
    kvq_test_ok(r.be->alloc(r.be, n, "x", &x, &err), &err);
    for (int64_t l = 0; l < r.c->n_layers; l++) {
        kvq_layer *layer = NULL;
        kvq_test_ok(kvq_layer_load(r.model, l, &layer, &err), &err);
        kvq_layer_prefetch(r.model, l + 1); // of the last layer: nothing
        r.be->copy(r.be, x, r.states + l * n, n);
        kvq_test_ok(kvq_layer_forward(r.model, layer, r.ws, r.S, x, NULL, NULL, &err), &err);
        ck_assert_mem_eq(x, r.states + (l + 1) * n, (size_t)n * sizeof *x);
        kvq_layer_release(r.model, &layer);
    }
    r.be->release(r.be, x);
    rig_close(&r);
}
END_TEST

START_TEST(a_layer_is_expanded_once) {
    char         path[256];
    kvq_error    err = {0};
    kvq_layer   *layer = NULL;
    ledger_model m;
    make_tiny(path, sizeof path, TINY_LLAMA);
    ledger_open(&m, path, false);
    int64_t calls = m.ledger.calls;
    kvq_test_ok(kvq_layer_load(m.model, 1, &layer, &err), &err);
    kvq_layer_release(m.model, &layer);
    int64_t once = m.ledger.calls - calls;
    calls = m.ledger.calls;
    kvq_layer_prefetch(m.model, 1);
    kvq_layer_prefetch(m.model, 1);
    kvq_test_ok(kvq_layer_load(m.model, 1, &layer, &err), &err);
    ck_assert_int_eq(m.ledger.calls - calls, once);
    kvq_layer_release(m.model, &layer);
    ledger_close(&m);
}
END_TEST

START_TEST(layers_that_nobody_asks_for_are_dropped) {
    char         path[256];
    kvq_error    err = {0};
    kvq_layer   *layer = NULL;
    ledger_model m;
    make_tiny(path, sizeof path, TINY_LLAMA);
    ledger_open(&m, path, false);
    int64_t blocks = m.ledger.blocks;
    kvq_test_ok(kvq_layer_load(m.model, 0, &layer, &err), &err);
    int64_t one = m.ledger.blocks - blocks;
    kvq_layer_release(m.model, &layer);
    kvq_layer_prefetch(m.model, -1);
    kvq_layer_prefetch(m.model, kvq_model_describe(m.model)->n_layers);
    ck_assert_int_eq(m.ledger.blocks, blocks);
    kvq_layer_prefetch(m.model, 1);
    kvq_test_ok(kvq_layer_load(m.model, 0, &layer, &err), &err);
    ck_assert_int_eq(m.ledger.blocks - blocks, one);
    kvq_layer_release(m.model, &layer);
    kvq_layer_prefetch(m.model, 0);
    kvq_layer_prefetch(m.model, 1); // instead
    ledger_close(&m);               // while it comes
}
END_TEST

// Here: no memory in other threads.
START_TEST(a_failure_in_the_background_is_no_failure) {
    char         path[256];
    kvq_error    err = {0};
    kvq_layer   *layer = NULL;
    ledger_model m;
    make_tiny(path, sizeof path, TINY_LLAMA);
    ledger_open(&m, path, false);
    m.ledger.first_thread_only = true;
    kvq_layer_prefetch(m.model, 1);
    kvq_test_ok(kvq_layer_load(m.model, 1, &layer, &err), &err);
    kvq_layer_release(m.model, &layer);
    ledger_close(&m);
}
END_TEST

// ---------------------------------------------------------------- experts

START_TEST(streamed_experts_equal_resident_ones) {
    char       path[256];
    int32_t    ids[TINY_S];
    kvq_error  err = {0};
    kvq_model *resident = NULL;
    rig        r;
    make_tiny(path, sizeof path, TINY_MIXTRAL + _i);
    rig_open(&r, path, ids, TINY_S, 2);
    random_ids(ids, TINY_S, r.c->vocab_size);
    rig_forward(&r);
    kvq_test_ok(kvq_model_create(&r.ctx, r.be, r.checkpoint, true, &resident, &err), &err);
    int64_t n = r.S * r.C;
    for (int64_t l = 0; l < r.c->n_layers; l++) {
        kvq_layer *layer = NULL;
        kvq_test_ok(kvq_layer_load(resident, l, &layer, &err), &err);
        kvq_test_ok(kvq_layer_forward(resident, layer, r.ws, r.S, r.states + l * n, NULL, NULL, &err), &err);
        ck_assert_mem_eq(r.states + l * n, r.states + (l + 1) * n, (size_t)n * sizeof(float));
        kvq_layer_release(resident, &layer);
    }
    kvq_model_destroy(&r.ctx, &resident);
    rig_close(&r);
}
END_TEST

// Written down as a config that the reader does not make.
START_TEST(experts_with_norms_behind_are_refused) {
    char            path[256];
    kvq_error       err = {0};
    kvq_context     ctx = kvq_test_context();
    kvq_backend    *be = NULL;
    kvq_checkpoint *checkpoint = NULL;
    kvq_model      *model = NULL;
    make_tiny(path, sizeof path, TINY_MIXTRAL);
    kvq_test_ok(kvq_backend_cpu(&ctx, KVQ_COMPUTE_F32, &be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(&ctx, path, &checkpoint, &err), &err);
    ((kvq_model_config *)kvq_checkpoint_config(checkpoint))->post_norms = true;
    kvq_test_failed(kvq_model_create(&ctx, be, checkpoint, false, &model, &err), KVQ_ERR_UNSUPPORTED, &err,
                    "mixtral with experts and with norms behind them");
    ck_assert_ptr_null(model);
    kvq_checkpoint_close(&ctx, &checkpoint);
    be->destroy(&be);
}
END_TEST

// ---------------------------------------------------------------- damage

// _i: a layer from the background; an expert, which nobody needs before a window is there; the same in a resident
// model.
START_TEST(damaged_weights_are_named_when_they_are_needed) {
    static const char *const DAMAGED[] = {"model.layers.1.mlp.up_proj.weight",
                                          "model.layers.0.block_sparse_moe.experts.3.w2.weight",
                                          "model.layers.0.block_sparse_moe.experts.3.w2.weight"};
    static const char *const MESSAGE[] = {
        "'model.layers.1.mlp.up_proj.weight' holds nan at row 1, column 2",
        "'model.layers.0.mlp.experts.3.down_proj.weight' holds nan at row 1, column 2",
        "'model.layers.0.mlp.experts.3.down_proj.weight' holds nan at row 1, column 2"};
    enum { S = 64 }; // enough for each expert to have a token
    char             path[256];
    int32_t          ids[S];
    kvq_error        err = {0};
    kvq_layer       *layer = NULL;
    kvq_make_options options = kvq_make_options_default();
    rig              r;
    options.model_type = _i == 0 ? "llama" : "mixtral";
    options.not_finite = DAMAGED[_i];
    (void)snprintf(path, sizeof path, "%s/damaged", kvq_test_folder());
    kvq_make_model_hf(&options, path);
    rig_open(&r, path, ids, S, 2);
    random_ids(ids, S, r.c->vocab_size);
    kvq_test_ok(kvq_model_embed(r.model, ids, S, r.states, &err), &err);
    if (_i == 2) {
        kvq_model_destroy(&r.ctx, &r.model);
        kvq_test_ok(kvq_model_create(&r.ctx, r.be, r.checkpoint, true, &r.model, &err), &err);
    }
    kvq_status status = KVQ_OK;
    if (_i == 0) {
        kvq_layer_prefetch(r.model, 1);
        status = kvq_layer_load(r.model, 1, &layer, &err);
    } else if (_i == 1) {
        kvq_test_ok(kvq_layer_load(r.model, 0, &layer, &err), &err);
        status = kvq_layer_forward(r.model, layer, r.ws, S, r.states, NULL, NULL, &err);
        kvq_layer_release(r.model, &layer);
    } else {
        status = kvq_layer_load(r.model, 0, &layer, &err);
    }
    kvq_test_failed(status, KVQ_ERR_NUMERICAL, &err, MESSAGE[_i]);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(memory_is_what_is_announced, N_TINY),
    KVQ_LOOP(layers_from_the_background_are_the_same, N_TINY),
    KVQ_CASE(a_layer_is_expanded_once),
    KVQ_CASE(layers_that_nobody_asks_for_are_dropped),
    KVQ_CASE(a_failure_in_the_background_is_no_failure),
    KVQ_LOOP(streamed_experts_equal_resident_ones, 2),
    KVQ_CASE(experts_with_norms_behind_are_refused),
    KVQ_LOOP(damaged_weights_are_named_when_they_are_needed, 3),
};
KVQ_TEST_MAIN("weights", CASES)
