// SPDX-License-Identifier: Apache-2.0
// The first windows with and without a BOS token: the losses agree with those that validation measures, for windows
// that have one and windows that have none, and nothing else about the windows matters.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_make_model.h"
#include "kvq_test.h"

typedef struct rig {
    kvq_context     ctx;
    kvq_checkpoint *checkpoint;
    kvq_backend    *be;
    kvq_model      *model;
} rig;

// The rig must stay where it is: backend and model borrow its context.
static void open_rig(rig *r, int max_positions) {
    kvq_error err = {0};
    *r = (rig){.ctx = kvq_test_context()};
    char             path[256];
    kvq_make_options options = kvq_make_options_default();
    if (max_positions > 0) options.max_positions = max_positions;
    (void)snprintf(path, sizeof path, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
    kvq_test_ok(kvq_checkpoint_open(&r->ctx, path, &r->checkpoint, &err), &err);
    kvq_test_ok(kvq_backend_cpu(&r->ctx, KVQ_COMPUTE_F32, &r->be, &err), &err);
    kvq_test_ok(kvq_model_create(&r->ctx, r->be, r->checkpoint, false, &r->model, &err), &err);
}

static void close_rig(rig *r) {
    kvq_model_destroy(&r->ctx, &r->model);
    r->be->destroy(&r->be);
    kvq_checkpoint_close(&r->ctx, &r->checkpoint);
}

// Windows of n_text tokens of one text, with BOS or without; the text of window i starts at i * 40.
static kvq_windows make_windows(rig *r, int64_t n_windows, int64_t n_text, bool bos) {
    kvq_windows w = {.n_windows = n_windows, .seq_len = n_text + bos, .bos_added = bos};
    kvq_error   err = {0};
    kvq_test_ok(KVQ_NEW(&r->ctx, n_windows * w.seq_len, "windows", &w.ids, &err), &err);
    for (int64_t i = 0; i < n_windows; i++) {
        int32_t *to = w.ids + i * w.seq_len;
        if (bos) *to++ = KVQ_MAKE_BOS;
        for (int64_t t = 0; t < n_text; t++)
            to[t] = (int32_t)kvq_rng_below(1, KVQ_RNG_TEST, 0, (uint64_t)(i * 40 + t), KVQ_MAKE_N_TOKENS);
    }
    return w;
}

// Mean loss in nats per token, over the first two windows.
static double loss(rig *r, int64_t n_text, bool bos) {
    kvq_windows    w = make_windows(r, 2, n_text, bos);
    kvq_validation v = {0};
    kvq_error      err = {0};
    kvq_test_ok(kvq_validate(&r->ctx, r->be, r->model, NULL, &w, NULL, &v, &err), &err);
    double mean = v.baseline_nll.value;
    kvq_validation_free(&r->ctx, &v);
    kvq_windows_free(&r->ctx, &w);
    return mean;
}

START_TEST(losses_are_those_of_validation) {
    enum { N_TEXT = 37 };
    rig       r;
    kvq_error err = {0};
    open_rig(&r, 0);
    double without = loss(&r, N_TEXT, false);
    // with BOS, validation scores the first token of the text as well, which is known alone from windows of two tokens
    double with = (loss(&r, N_TEXT, true) * N_TEXT - loss(&r, 1, true)) / (N_TEXT - 1);
    ck_assert(fabs(with - without) > 1e-3); // or mixing them up would not be noticed
    for (int bos = 0; bos < 2; bos++) {
        kvq_windows   w = make_windows(&r, 3, N_TEXT, bos);
        kvq_bos_trial trial = {0};
        kvq_test_ok(kvq_bos_trial_run(&r.ctx, r.be, r.model, &w, KVQ_MAKE_BOS, &trial, &err), &err);
        ck_assert_int_eq(trial.n_windows, 2);
        ck_assert_int_eq(trial.n_tokens, N_TEXT);
        // sums in f64 of losses from f32 logits: below 2e-5 per token whatever the shapes
        ck_assert_double_eq_tol(trial.without_bos, without, 2e-5);
        ck_assert_double_eq_tol(trial.with_bos, with, 2e-5);
        ck_assert(trial.tera_flops > 0);
        kvq_windows_free(&r.ctx, &w);
    }
    close_rig(&r);
}
END_TEST

START_TEST(the_trial_is_short) {
    static const struct {
        int64_t n_windows, n_text, max_positions, planned_windows, planned_tokens;
    } PLANS[] = {
        {5, 600, 2048, 2, 512}, {1, 600, 2048, 1, 512},
        {5, 500, 2048, 2, 500}, {5, 100, 64, 2, 63}, // room for the BOS token
        {5, 1, 64, 0, 1},                            // nothing that both ways predict
    };
    for (size_t i = 0; i < sizeof PLANS / sizeof *PLANS; i++) {
        rig r;
        open_rig(&r, (int)PLANS[i].max_positions);
        kvq_windows   w = make_windows(&r, PLANS[i].n_windows, PLANS[i].n_text, i % 2);
        kvq_bos_trial plan = kvq_bos_trial_plan(r.model, &w), trial = {.n_windows = -1};
        kvq_error     err = {0};
        ck_assert_int_eq(plan.n_windows, PLANS[i].planned_windows);
        ck_assert_int_eq(plan.n_tokens, PLANS[i].planned_tokens);
        if (plan.n_windows == 0) {
            kvq_test_ok(kvq_bos_trial_run(&r.ctx, r.be, r.model, &w, KVQ_MAKE_BOS, &trial, &err), &err);
            ck_assert_int_eq(trial.n_windows, 0);
        }
        kvq_windows_free(&r.ctx, &w);
        close_rig(&r);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(losses_are_those_of_validation),
    KVQ_CASE(the_trial_is_short),
};
KVQ_TEST_MAIN("bos trial", CASES)
