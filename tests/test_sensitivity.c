// SPDX-License-Identifier: Apache-2.0
// KL of single tensors against one slow pass through the whole model for each of them. The suite has a copy of
// sensitivity.c whose groups of states are small (KVQ_GROUP_BYTES), so that a model of three layers needs several.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "counting_memory.h"
#include "limited_memory.h"
#include "scored_model.h"

// ---------------------------------------------------------------- the slow way

typedef struct alone {
    rig           *r;
    kvq_workspace *ws;
    int64_t        layer, n_tokens;
    int            tensor; // 0 = K, 1 = V of the layer is quantised; -1 = nothing
    float          k[MOST_T * D], v[MOST_T * D];
} alone;

static kvq_status quantise_alone(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    alone            *a = user;
    rig              *r = a->r;
    kvq_packed_layer *cache = NULL;
    bool              post = r->artifact->layers[layer].k.domain == KVQ_KEYS_POST_ROPE;
    size_t            bytes = (size_t)(n_tokens * D) * sizeof(float);
    if (a->tensor < 0 || layer != a->layer) return KVQ_OK;
    memcpy(a->k, x->k, bytes);
    memcpy(a->v, x->v, bytes);
    if (post) kvq_rotate_keys(r->model, a->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, a->k);
    kvq_test_ok(kvq_packed_layer_create(&r->ctx, r->artifact, layer, n_tokens, &cache, err), err);
    kvq_test_ok(kvq_packed_layer_prefill(r->be, cache, n_tokens, a->k, a->v, NULL, NULL, err), err);
    kvq_packed_layer_destroy(&r->ctx, &cache);
    if (post) kvq_rotate_keys(r->model, a->ws, layer, KVQ_ROTATE_BACK, n_tokens, a->k);
    if (a->tensor == 0) memcpy(x->k, a->k, bytes);
    if (a->tensor == 1) memcpy(x->v, a->v, bytes);
    return KVQ_OK;
}

// Logits [n_tokens, V] of one window.
static void logits_of(alone *a, const int32_t *ids, float *logits) {
    rig      *r = a->r;
    kvq_error err = {0};
    kvq_head *head = NULL;
    float    *x = NULL;
    kvq_test_ok(r->be->alloc(r->be, a->n_tokens * C, "state", &x, &err), &err);
    kvq_test_ok(kvq_model_embed(r->model, ids, a->n_tokens, x, &err), &err);
    for (int64_t l = 0; l < L; l++) {
        kvq_layer *layer = NULL;
        kvq_test_ok(kvq_layer_load(r->model, l, &layer, &err), &err);
        kvq_test_ok(kvq_layer_forward(r->model, layer, a->ws, a->n_tokens, x, quantise_alone, a, &err), &err);
        kvq_layer_release(r->model, &layer);
    }
    kvq_test_ok(kvq_head_load(r->model, &head, &err), &err);
    kvq_test_ok(kvq_head_logits(r->model, head, a->ws, x, a->n_tokens, logits, &err), &err);
    kvq_head_release(r->model, &head);
    r->be->release(r->be, x);
}

static void log_softmax(const float *logits, double *log_p) {
    double sum = 0;
    for (int i = 0; i < V; i++) sum += exp((double)logits[i]);
    for (int i = 0; i < V; i++) log_p[i] = (double)logits[i] - log(sum);
}

static double divergence(const float *exact, const float *other) {
    double p[V], q[V], sum = 0;
    log_softmax(exact, p);
    log_softmax(other, q);
    for (int i = 0; i < V; i++) sum += exp(p[i]) * (p[i] - q[i]);
    return sum;
}

// The mean over every fourth position of the beginnings of `count` windows, spread over all.
static void slow(rig *r, int64_t count, double kl[2 * L]) {
    static float exact[MOST_T * V], other[MOST_T * V];
    static alone a;
    kvq_error    err = {0};
    int64_t      T = r->windows.seq_len < MOST_T ? r->windows.seq_len : MOST_T;
    int          n_scored = 0;
    memset(&a, 0, sizeof a);
    a.r = r;
    a.n_tokens = T;
    memset(kl, 0, 2 * L * sizeof *kl);
    kvq_test_ok(kvq_workspace_create(r->model, T, false, &a.ws, &err), &err);
    for (int64_t w = 0; w < count; w++) {
        const int32_t *ids = r->ids + w * r->windows.n_windows / count * r->windows.seq_len;
        a.tensor = -1;
        logits_of(&a, ids, exact);
        for (int i = 0; i < 2 * L; i++) {
            a.layer = i / 2;
            a.tensor = i % 2;
            logits_of(&a, ids, other);
            for (int64_t t = T - 1; t >= 0; t -= 4) kl[i] += divergence(exact + t * V, other + t * V);
        }
        for (int64_t t = T - 1; t >= 0; t -= 4) n_scored++;
    }
    for (int i = 0; i < 2 * L; i++) kl[i] /= n_scored;
    kvq_workspace_destroy(r->model, &a.ws);
}

// Logits of the same states, in products of other shapes: they differ by at most C * 2^-24 of their size, 4, which is
// e = 2e-5. The gradient of KL in the second logits is q - p, at most sqrt(2 KL) in sum (Pinsker), and KL is of second
// order in a difference that is common to both: 2 e sqrt(2 KL) + e^2.
static double tolerance(double kl) { return 4e-5 * sqrt(2 * kl) + 4e-10; }

static void expect_kl(const double *kl, const double *expected) {
    for (int i = 0; i < 2 * L; i++) ck_assert_double_eq_tol(kl[i], expected[i], tolerance(expected[i]));
}

// ---------------------------------------------------------------- tests

typedef struct sensitivity_case {
    int            scheme, bits;
    kvq_key_domain domain;
    int64_t        n_windows, seq_len, n_tokens; // given
    int64_t        count, batch;                 // windows that are measured, and layers that are carried together
} sensitivity_case;
// Variants of one layer take 512 bytes a token, and KVQ_GROUP_BYTES of them are carried together.
static const sensitivity_case CASES_OF[] = {
    {NUQ, 2, KVQ_KEYS_PRE_ROPE, 3, 40, 40, 1, 3},    {NUQ, 2, KVQ_KEYS_PRE_ROPE, 5, 41, 130, 3, 1},
    {NUQ, 3, KVQ_KEYS_POST_ROPE, 3, 40, 100, 2, 2},  {NUQ, 2, KVQ_KEYS_POST_ROPE, 8, 42, 1000, 8, 1},
    {ALLOC, 0, KVQ_KEYS_PRE_ROPE, 3, 43, 90, 2, 2},  {ALLOC, 0, KVQ_KEYS_PRE_ROPE, 2, 600, 3, 1, 1},
    {ALLOC, 0, KVQ_KEYS_PRE_ROPE, 7, 90, 199, 2, 1}, {NUQ, 2, KVQ_KEYS_PRE_ROPE, 2, 2, 4, 2, 3},
};
enum { N_CASES_OF = sizeof CASES_OF / sizeof *CASES_OF };

START_TEST(kl_is_that_of_one_tensor_alone) {
    static rig              r;
    const sensitivity_case *example = &CASES_OF[_i];
    double                  kl[2 * L], expected[2 * L], least = 1;
    kvq_error               err = {0};
    rig_open(&r, example->n_windows, example->seq_len);
    make_artifact(&r, example->scheme, example->bits, example->domain, 3);
    kvq_sensitivity_cost plan = kvq_sensitivity_plan(r.model, example->seq_len, example->n_windows, example->n_tokens);
    ck_assert_int_eq(plan.n_windows, example->count);
    ck_assert_int_eq(plan.n_tokens, example->seq_len < 512 ? example->seq_len : 512);
    int64_t batch = KVQ_GROUP_BYTES / (plan.n_windows * plan.n_tokens * 512); // that the case is what it says
    ck_assert_int_eq(batch < 1 ? 1 : batch < L ? batch : L, example->batch);
    kvq_test_ok(
        kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, example->n_tokens, 0, L, kl, &err),
        &err);
    slow(&r, example->count, expected);
    expect_kl(kl, expected);
    for (int i = 0; i < 2 * L; i++) least = fmin(least, expected[i]);
    if (example->seq_len > 2) ck_assert_double_gt(least, 1e-6); // or the tolerance would be all there is
    rig_close(&r);
}
END_TEST

START_TEST(fine_levels_are_hardly_felt) {
    static rig r;
    double     fine[2 * L], coarse[2 * L];
    kvq_error  err = {0};
    rig_open(&r, 3, 60);
    make_artifact(&r, NUQ, 8, KVQ_KEYS_PRE_ROPE, 3);
    kvq_test_ok(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 180, 0, L, fine, &err), &err);
    kvq_artifact_destroy(&r.ctx, &r.artifact);
    make_artifact(&r, NUQ, 2, KVQ_KEYS_PRE_ROPE, 3);
    kvq_test_ok(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 180, 0, L, coarse, &err), &err);
    for (int i = 0; i < 2 * L; i++) ck_assert_double_lt(fabs(fine[i]), 1e-3 * coarse[i]); // steps are 85 times smaller
    rig_close(&r);
}
END_TEST

// Threads, and pieces, change no bit of it.
START_TEST(threads_change_nothing) {
    static rig r;
    double     kl[2][2 * L];
    kvq_error  err = {0};
    rig_open(&r, 3, 50);
    make_artifact(&r, ALLOC, 0, KVQ_KEYS_PRE_ROPE, 3);
    for (int i = 0; i < 2; i++) {
        r.ctx.n_threads = 1 + 2 * i;
        kvq_test_ok(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 150, 0, L, kl[i], &err),
                    &err);
    }
    ck_assert_mem_eq(kl[0], kl[1], sizeof kl[0]);
    // nor does it matter which layers are measured together, and the others' numbers stay as they are
    memset(kl[1], 0, sizeof kl[1]);
    for (int64_t l = L - 1; l >= 0; l--) {
        kvq_test_ok(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 150, l, l + 1, kl[1], &err),
                    &err);
        for (int64_t other = 0; other < l; other++) ck_assert(kl[1][2 * other] == 0);
    }
    ck_assert_mem_eq(kl[0], kl[1], sizeof kl[0]);
    rig_close(&r);
}
END_TEST

START_TEST(what_cannot_be_measured_is_refused) {
    static rig r;
    double     kl[2 * L] = {7};
    kvq_error  err = {0};
    rig_open(&r, 3, 50);
    make_artifact(&r, NUQ, 2, KVQ_KEYS_PRE_ROPE, 3);
    r.windows.n_windows = 0;
    kvq_test_failed(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 150, 0, L, kl, &err),
                    KVQ_ERR_INPUT, &err, "no token can be scored");
    r.windows.n_windows = 3;
    r.artifact->model.vocab_size++;
    kvq_test_failed(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 150, 0, L, kl, &err),
                    KVQ_ERR_MISMATCH, &err, "vocabulary");
    ck_assert(kl[0] == 7);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- stops and memory

typedef struct limits {
    limited_memory memory; // first, for the allocator finds it by its address
    int64_t        calls_left;
} limits;

static bool stop_after_some_calls(void *user) { return ((limits *)user)->calls_left-- <= 0; }

// Stopped, or out of memory, at every place in turn: nothing that is not released, and kl as before. Batches of one
// layer, so that some are complete by then. _i: stopped
START_TEST(every_end_in_the_middle_is_survived) {
    static rig r;
    double     kl[2 * L], expected[2 * L], before[2 * L];
    kvq_error  err = {0};
    rig_open(&r, 4, 40);
    make_artifact(&r, _i == 0 ? NUQ : ALLOC, 2, KVQ_KEYS_PRE_ROPE, 3);
    kvq_test_ok(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 160, 0, L, expected, &err),
                &err);
    kvq_context normal = r.ctx;
    kvq_status  status = KVQ_ERR_MEMORY, failure = _i < 2 ? KVQ_ERR_MEMORY : KVQ_ERR_INTERRUPTED;
    int64_t     n = 0;
    for (int i = 0; i < 2 * L; i++) kl[i] = before[i] = -1 - i;
    for (; status != KVQ_OK; n++) {
        limits l = {.memory = {.inner = normal, .left = _i < 2 ? n : INT64_MAX}, .calls_left = n};
        r.ctx = limited_context(&l.memory); // the backend and the model see it too
        r.ctx.stop = _i < 2 ? NULL : stop_after_some_calls;
        status = kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 160, 0, L, kl, &err);
        r.ctx = normal;
        ck_assert(status == KVQ_OK || status == failure);
        ck_assert_int_eq(l.memory.n_live, 0);
        if (status != KVQ_OK) ck_assert_mem_eq(kl, before, sizeof kl);
    }
    ck_assert_mem_eq(kl, expected, sizeof kl);
    ck_assert_int_gt(n, _i < 2 ? 60 : 2 * L); // a stop is asked for after each tensor
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- memory

// What is allocated at the worst moment, beside one layer's weights or the head, is what was planned. Not counted are a
// token more in the workspace, padding to 64 bytes and structures (16 KiB), and the 256 KiB through which weights are
// expanded, which are part of what a program needs in any case.
START_TEST(the_plan_has_room_for_all) {
    static rig r;
    double     kl[2 * L];
    kvq_error  err = {0};
    rig_open(&r, 4, _i < 2 ? 300 : 40);
    make_artifact(&r, _i % 2 == 0 ? NUQ : ALLOC, 3, KVQ_KEYS_PRE_ROPE, 3);
    r.ctx.n_threads = 1; // the count is not made for several
    kvq_sensitivity_cost plan = kvq_sensitivity_plan(r.model, r.windows.seq_len, 4, 1200);
    kvq_context          normal = r.ctx;
    counting_memory      c = {.inner = normal};
    r.ctx = counting_context(&c);
    kvq_test_ok(kvq_measure_sensitivity(&r.ctx, r.be, r.model, r.artifact, &r.windows, 1200, 0, L, kl, &err), &err);
    r.ctx = normal;
    int64_t layer = 4 * kvq_layer_floats(r.model), head = 4 * kvq_head_floats(r.model);
    ck_assert_int_eq(c.now, 0);
    ck_assert_int_le(c.most, plan.bytes + (layer > head ? layer : head) + (272 << 10));
    ck_assert_int_ge(c.most, plan.bytes / 2); // a plan that is far too large would pass
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(kl_is_that_of_one_tensor_alone, N_CASES_OF),
    KVQ_CASE(fine_levels_are_hardly_felt),
    KVQ_CASE(threads_change_nothing),
    KVQ_CASE(what_cannot_be_measured_is_refused),
    KVQ_LOOP(every_end_in_the_middle_is_survived, 3),
    KVQ_LOOP(the_plan_has_room_for_all, 4),
};
KVQ_TEST_MAIN("sensitivity", CASES)
