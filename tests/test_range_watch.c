// SPDX-License-Identifier: Apache-2.0
// Keys beyond the ranges of their channels: what validation reports of them against a count of captured keys.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_test.h"
#include "small_model.h"

enum { L = 3, S = 24, MOST_N = 4, SINKS = 2, DIM = 16, D = 2 * DIM, BITS = 3 };

typedef struct rig {
    kvq_context             ctx;
    kvq_backend            *be;
    kvq_checkpoint         *checkpoint;
    kvq_model              *model;
    const kvq_model_config *c;
    kvq_artifact           *a;
    kvq_windows             windows;
    int32_t                 ids[MOST_N * S];
    float                   keys[L][MOST_N][S * D]; // as they are stored
} rig;

// ---------------------------------------------------------------- an artifact with known ranges

static void fill_tensor(rig *r, kvq_tensor_quant *t, kvq_axis axis) {
    t->bits = BITS;
    t->axis = axis;
    t->n_groups = t->dim = 1;
    t->n_levels = 1 << BITS;
    kvq_test_ok(KVQ_NEW(&r->ctx, t->n_levels, "levels", &t->codebook, NULL), NULL);
    for (int i = 0; i < t->n_levels; i++) t->codebook[i] = -1.0f + 2.0f * (float)i / (float)(t->n_levels - 1);
    if (axis == KVQ_AXIS_TOKEN) return;
    kvq_test_ok(KVQ_NEW(&r->ctx, D, "lower", &t->lower, NULL), NULL);
    kvq_test_ok(KVQ_NEW(&r->ctx, D, "upper", &t->upper, NULL), NULL);
}

// Ranges that are not symmetric and differ among channels and layers; channel 7 of layer 0 is constant.
static void fill_ranges(rig *r) {
    for (int i = 0; i < L * D; i++) {
        kvq_tensor_quant *k = &r->a->layers[i / D].k;
        double            width = 1 + 3 * kvq_rng_uniform(3, KVQ_RNG_TEST, 70, (uint64_t)i);
        k->lower[i % D] = (float)-width;
        k->upper[i % D] = i == 7 ? k->lower[i] : (float)(0.75 * width);
    }
}

static void make_artifact(rig *r, kvq_axis k_axis, kvq_key_domain domain) {
    kvq_error err = {0};
    kvq_test_ok(kvq_artifact_create(&r->ctx, L, &r->a, &err), &err);
    r->a->model.n_layers = L;
    r->a->model.n_kv_heads = r->c->n_kv_heads;
    r->a->model.head_dim = r->c->head_dim;
    r->a->quantizer.sink_tokens = SINKS;
    r->a->quantizer.n_side_k = 1;
    r->a->dataset.n_samples = 50;
    r->a->dataset.seq_len = 12;
    for (int l = 0; l < L; l++) {
        fill_tensor(r, &r->a->layers[l].k, k_axis);
        fill_tensor(r, &r->a->layers[l].v, KVQ_AXIS_TOKEN);
        r->a->layers[l].k.domain = domain;
        r->a->layers[l].k.fit =
            (kvq_fit_report){.n_points = 900 + l, .n_outliers = 60, .n_constant = 30, .n_clipped = 5};
    }
    if (k_axis == KVQ_AXIS_CHANNEL) fill_ranges(r);
}

static void rig_open(rig *r, int64_t n_windows, kvq_axis k_axis, kvq_key_domain domain) {
    kvq_make_options options = kvq_make_options_default();
    memset(r, 0, sizeof *r);
    r->ctx = kvq_test_context();
    options.n_layers = L;
    small_model_open(&r->ctx, &options, false, &r->be, &r->checkpoint, &r->model);
    r->c = kvq_model_describe(r->model);
    ck_assert_int_eq(r->c->n_kv_heads * r->c->head_dim, D);
    r->windows = (kvq_windows){.n_windows = n_windows, .seq_len = S, .ids = r->ids, .source = "test"};
    for (int i = 0; i < MOST_N * S; i++) // few ids, so that most occur again and again
        r->ids[i] = (int32_t)(40 + kvq_rng_below(5, KVQ_RNG_TEST, 71, (uint64_t)i, 9));
    make_artifact(r, k_axis, domain);
}

static void rig_close(rig *r) {
    kvq_artifact_destroy(&r->ctx, &r->a);
    small_model_close(&r->ctx, &r->be, &r->checkpoint, &r->model);
}

// ---------------------------------------------------------------- the keys

typedef struct capture {
    rig              *r;
    kvq_workspace    *ws;
    kvq_packed_layer *cache;
    int64_t           window;
} capture;

// Keeps the keys, then quantises as validation does: keys of later layers depend on it.
static kvq_status keep_keys(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    capture *c = user;
    bool     post = c->r->a->layers[layer].k.domain == KVQ_KEYS_POST_ROPE;
    if (post) kvq_rotate_keys(c->r->model, c->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, x->k);
    memcpy(c->r->keys[layer][c->window], x->k, sizeof c->r->keys[layer][c->window]);
    kvq_test_ok(kvq_packed_layer_prefill(c->r->be, c->cache, n_tokens, x->k, x->v, NULL, NULL, err), err);
    if (post) kvq_rotate_keys(c->r->model, c->ws, layer, KVQ_ROTATE_BACK, n_tokens, x->k);
    return KVQ_OK;
}

static void capture_keys(rig *r) {
    kvq_error err = {0};
    capture   c = {.r = r};
    float    *x = NULL;
    kvq_test_ok(kvq_workspace_create(r->model, S, false, &c.ws, &err), &err);
    kvq_test_ok(r->be->alloc(r->be, S * r->c->hidden_size, "state", &x, &err), &err);
    for (; c.window < r->windows.n_windows; c.window++) {
        kvq_test_ok(kvq_model_embed(r->model, r->ids + c.window * S, S, x, &err), &err);
        for (int64_t l = 0; l < L; l++) {
            kvq_layer *layer = NULL;
            kvq_test_ok(kvq_layer_load(r->model, l, &layer, &err), &err);
            kvq_test_ok(kvq_packed_layer_create(&r->ctx, r->a, l, S, &c.cache, &err), &err);
            kvq_test_ok(kvq_layer_forward(r->model, layer, c.ws, S, x, keep_keys, &c, &err), &err);
            kvq_packed_layer_destroy(&r->ctx, &c.cache);
            kvq_layer_release(r->model, &layer);
        }
    }
    r->be->release(r->be, x);
    kvq_workspace_destroy(r->model, &c.ws);
}

// ---------------------------------------------------------------- counted by hand

typedef struct counts {
    double of_layer[L], of_channel[L][D], of_token[KVQ_MAKE_N_TOKENS], of_window[MOST_N], all, elements;
} counts;

// Beyond the range: farther from its middle than half of it, by more than the codec's tolerance. In f32, as the codec.
static bool is_beyond(const rig *r, int64_t l, int64_t c, float x) {
    const kvq_tensor_quant *k = &r->a->layers[l].k;
    float                   middle = (k->upper[c] + k->lower[c]) / 2, half = (k->upper[c] - k->lower[c]) / 2;
    return half > 0 && fabsf((x - middle) / half) > KVQ_OUTLIER_EDGE;
}

static void count(const rig *r, int64_t sinks, counts *n) {
    memset(n, 0, sizeof *n);
    for (int64_t w = 0; w < r->windows.n_windows; w++) {
        for (int64_t i = 0; i < (int64_t)L * S * D; i++) {
            int64_t l = i / (S * D), t = i / D % S, c = i % D;
            if (t < sinks) continue;
            n->elements++;
            if (!is_beyond(r, l, c, r->keys[l][w][t * D + c])) continue;
            n->all++;
            n->of_layer[l]++;
            n->of_channel[l][c]++;
            n->of_window[w]++;
            n->of_token[r->ids[w * S + t]]++;
        }
    }
}

static int64_t first_largest(const double *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = n - 1; i >= 0; i--) best = x[i] >= x[best] ? i : best;
    return best;
}

static kvq_validation validate(const rig *r) {
    kvq_validation v = {0};
    kvq_error      err = {0};
    kvq_test_ok(kvq_validate(&r->ctx, r->be, r->model, r->a, &r->windows, NULL, &v, &err), &err);
    return v;
}

static double mean_of(const double *x, int64_t n, double *error) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) mean += x[i] / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    *error = n > 1 ? sqrt(squares / (double)(n * (n - 1))) : 0;
    return mean;
}

// Counts are integers and shares their quotients in f64: sums of some thousands of them are exact to 1e-13.
static void expect_range(const rig *r, const kvq_range_report *range) {
    static counts n;
    count(r, SINKS, &n);
    int64_t N = r->windows.n_windows, layer = first_largest(n.of_layer, L);
    double  share[MOST_N], error, mean, rows = 50 * (12 - SINKS);
    for (int64_t w = 0; w < N; w++) share[w] = n.of_window[w] / (n.elements / (double)N);
    mean = mean_of(share, N, &error);
    ck_assert_double_gt(mean, 0.005);
    ck_assert_double_eq_tol(range->share.value, mean, 1e-13);
    if (N == 1) ck_assert(isnan(range->share.stderr_));
    if (N > 1) ck_assert_double_eq_tol(range->share.stderr_, error, 1e-13);
    ck_assert_int_eq(range->layer, layer);
    ck_assert_double_eq_tol(range->layer_share, n.of_layer[layer] / (n.elements / L), 1e-13);
    ck_assert_int_eq(range->channel, first_largest(n.of_channel[layer], D));
    ck_assert_double_eq_tol(range->channel_share, n.of_channel[layer][range->channel] / (n.elements / L / D), 1e-13);
    ck_assert_int_eq(range->token, first_largest(n.of_token, KVQ_MAKE_N_TOKENS));
    ck_assert_double_eq_tol(range->token_part, n.of_token[range->token] / n.all, 1e-13);
    // 3 * (60 + 5) of (990 + 991 + 992) elements in calibration; of 500 values two ends leave 2 / 501 outside
    ck_assert_double_eq_tol(range->expected, 195.0 / 2973 + 2 / (rows + 1), 1e-13);
}

// _i: one window or several, and the domain of keys
START_TEST(reports_are_as_counted) {
    static rig    r;
    static counts with, without;
    rig_open(&r, _i % 2 == 0 ? MOST_N : 1, KVQ_AXIS_CHANNEL, _i / 2 == 0 ? KVQ_KEYS_PRE_ROPE : KVQ_KEYS_POST_ROPE);
    capture_keys(&r);
    kvq_validation v = validate(&r);
    ck_assert(v.has_range);
    expect_range(&r, &v.range);
    count(&r, 0, &with);
    count(&r, SINKS, &without);
    ck_assert_double_gt(with.all, without.all); // sinks would have been seen
    ck_assert(without.of_channel[0][7] == 0);   // and a constant channel has no range
    ck_assert(without.of_layer[0] != without.of_layer[1]);
    kvq_validation_free(&r.ctx, &v);
    rig_close(&r);
}
END_TEST

// Keys before and after RoPE are different numbers: a watch on the wrong ones would count something else.
START_TEST(domains_are_told_apart) {
    static rig r;
    double     share[2];
    for (int i = 0; i < 2; i++) {
        rig_open(&r, MOST_N, KVQ_AXIS_CHANNEL, i == 0 ? KVQ_KEYS_PRE_ROPE : KVQ_KEYS_POST_ROPE);
        kvq_validation v = validate(&r);
        share[i] = v.range.share.value;
        kvq_validation_free(&r.ctx, &v);
        rig_close(&r);
    }
    ck_assert(share[0] != share[1]);
}
END_TEST

// What is stored in the recent window is watched before it is quantised as well.
START_TEST(a_recent_window_changes_nothing_of_the_first_layer) {
    static rig r;
    rig_open(&r, MOST_N, KVQ_AXIS_CHANNEL, KVQ_KEYS_POST_ROPE);
    static counts n;
    capture_keys(&r);
    count(&r, SINKS, &n);
    r.a->quantizer.recent_tokens = 5;
    for (int i = D; i < L * D; i++) r.a->layers[i / D].k.upper[i % D] = r.a->layers[i / D].k.lower[i % D];
    kvq_validation v = validate(&r);
    ck_assert_int_eq(v.range.layer, 0);
    ck_assert_double_eq_tol(v.range.layer_share, n.of_layer[0] / (n.elements / L), 1e-13);
    ck_assert_double_eq_tol(v.range.share.value, n.of_layer[0] / n.elements, 1e-13);
    kvq_validation_free(&r.ctx, &v);
    rig_close(&r);
}
END_TEST

// Sets the counts of calibration such that `share` of elements was beyond the ranges there; chance adds nothing.
static void calibrated_with(rig *r, double share) {
    r->a->dataset.n_samples = (int64_t)1 << 40;
    for (int l = 0; l < L; l++) {
        int64_t all = (int64_t)1 << 40, beyond = (int64_t)(share * (double)all);
        r->a->layers[l].k.fit =
            (kvq_fit_report){.n_points = all - beyond / 2, .n_outliers = beyond / 2, .n_clipped = beyond - beyond / 2};
    }
}

// The share must be larger by a quarter, and by two standard errors; of one window there is no error.
START_TEST(exceeding_has_a_margin) {
    static rig r;
    for (int64_t n = 1; n <= MOST_N; n += MOST_N - 1) {
        rig_open(&r, n, KVQ_AXIS_CHANNEL, KVQ_KEYS_PRE_ROPE);
        kvq_validation v = validate(&r);
        double         least = v.range.share.value - (n > 1 ? 2 * v.range.share.stderr_ : 0);
        kvq_validation_free(&r.ctx, &v);
        ck_assert_double_gt(least, 0);
        for (int i = 0; i < 2; i++) {
            calibrated_with(&r, least / 1.25 * (i == 0 ? 1 - 1e-6 : 1 + 1e-6));
            v = validate(&r);
            ck_assert_int_eq(v.range.exceeds, i == 0);
            kvq_validation_free(&r.ctx, &v);
        }
        rig_close(&r);
    }
}
END_TEST

// Ranges per token cannot be left; an artifact that does not know how often ranges were left has nothing to compare
// with; and where all tokens are sinks none is watched.
START_TEST(nothing_is_reported_where_nothing_is_known) {
    static rig r;
    rig_open(&r, 2, _i == 0 ? KVQ_AXIS_TOKEN : KVQ_AXIS_CHANNEL, KVQ_KEYS_PRE_ROPE);
    if (_i == 1) {
        for (int l = 0; l < L; l++) r.a->layers[l].k.fit = (kvq_fit_report){.n_points = 0};
    }
    if (_i == 2) r.a->quantizer.sink_tokens = S;
    if (_i == 3) r.a->quantizer.sink_tokens = S + 1;
    kvq_validation v = validate(&r);
    ck_assert(!v.has_range);
    ck_assert(!v.range.exceeds);
    kvq_validation_free(&r.ctx, &v);
    rig_close(&r);
}
END_TEST

// Nothing beyond its range is a report too.
START_TEST(wide_ranges_are_never_left) {
    static rig r;
    rig_open(&r, 2, KVQ_AXIS_CHANNEL, KVQ_KEYS_PRE_ROPE);
    for (int i = 0; i < L * D; i++) {
        r.a->layers[i / D].k.lower[i % D] = -1000;
        r.a->layers[i / D].k.upper[i % D] = 1000;
    }
    kvq_validation v = validate(&r);
    ck_assert(v.has_range && !v.range.exceeds);
    ck_assert(v.range.share.value == 0 && v.range.share.stderr_ == 0);
    ck_assert(v.range.layer_share == 0 && v.range.channel_share == 0 && v.range.token_part == 0);
    kvq_validation_free(&r.ctx, &v);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(reports_are_as_counted, 4),
    KVQ_CASE(domains_are_told_apart),
    KVQ_CASE(a_recent_window_changes_nothing_of_the_first_layer),
    KVQ_CASE(exceeding_has_a_margin),
    KVQ_LOOP(nothing_is_reported_where_nothing_is_known, 4),
    KVQ_CASE(wide_ranges_are_never_left),
};
KVQ_TEST_MAIN("range watch", CASES)
