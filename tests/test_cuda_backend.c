// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend on the emulated device, beside the model that runs on it (test_cuda_model): packed caches byte for
// byte those of the CPU, memory, weights that arrive while something else is computed, factors in bf16, and calls of
// the device's runtime that fail.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packed_rig.h"
#include "small_model.h"

// Opens the emulated device; variables of the environment set what it is like (tests/simt/simt_runtime.cpp).
static kvq_backend *open_device(const kvq_context *ctx, kvq_compute compute) {
    kvq_error    err = {0};
    kvq_backend *be = NULL;
    kvq_test_ok(kvq_backend_open(ctx, "cuda", compute, &be, &err), &err);
    return be;
}

static float *on_device(const kvq_backend *be, const float *host, int64_t n) {
    kvq_error err = {0};
    float    *x = NULL;
    kvq_test_ok(be->alloc(be, n, "numbers of a test", &x, &err), &err);
    if (host != NULL) be->upload(be, x, host, n);
    return x;
}

static void expect_floats(const kvq_backend *be, const float *x, const float *expected, int64_t n) {
    float *host = malloc((size_t)n * sizeof *host);
    be->download(be, host, x, n);
    ck_assert_mem_eq(host, expected, (size_t)n * sizeof *host);
    free(host);
}

// ---------------------------------------------------------------- packed caches

static const setup CACHES[] = {
    {.n_heads = 2, .head_dim = 16, .n_layers = 1, .sinks = 3, .recent = 0, .n_side = 2},
    {.n_heads = 2, .head_dim = 16, .n_layers = 1, .sinks = 1, .recent = 20, .n_side = 1, .per_head = true},
    {.tiled = true, .n_heads = 2, .head_dim = 16, .n_layers = 1, .sinks = 2, .n_side = 2, .n_slots = 40, .dim = 1},
    {.tiled = true, .n_heads = 2, .head_dim = 16, .n_layers = 1, .sinks = 0, .n_side = 1, .n_slots = 8, .dim = 2},
};
enum { N_CACHES = 4, N_TOKENS = 301 };
static const int64_t PIECES[] = {0, 1, 2, 3, 40, 127, 128, 129, 260, N_TOKENS}; // where they end

static void append_from_device(const rig *r, kvq_packed_layer *cache, float *const x[2], int64_t first, int64_t end) {
    kvq_error err = {0};
    float    *there[2];
    for (int i = 0; i < 2; i++) there[i] = on_device(r->be, x[i] + first * r->d, (end - first) * r->d);
    kvq_test_ok(kvq_packed_layer_append(r->be, cache, there[0], there[1], end - first, &err), &err);
    for (int i = 0; i < 2; i++) r->be->release(r->be, there[i]);
}

START_TEST(caches_have_the_bytes_of_the_cpu) {
    rig       host, device;
    kvq_error err = {0};
    int64_t   bytes[2];
    rig_open(&host, CACHES[_i]);
    device = host;
    device.be = open_device(&host.ctx, KVQ_COMPUTE_F32);
    int64_t           n = N_TOKENS * host.d;
    float            *x[2] = {randoms(n, 1), randoms(n, 2)}, *decoded[2] = {calloc((size_t)n, 4), calloc((size_t)n, 4)};
    kvq_packed_layer *caches[2] = {new_cache(&host, 0, N_TOKENS), new_cache(&host, 0, N_TOKENS)};
    append(&host, caches[0], x, 0, N_TOKENS);
    for (size_t i = 0; i + 1 < sizeof PIECES / sizeof *PIECES; i++)
        append_from_device(&device, caches[1], x, PIECES[i], PIECES[i + 1]);
    for (int flushed = 0; flushed < 2; flushed++) {
        uint8_t *saves[2] = {saved(caches[0], &bytes[0]), saved(caches[1], &bytes[1])};
        ck_assert_int_eq(bytes[0], bytes[1]);
        ck_assert_mem_eq(saves[0], saves[1], (size_t)bytes[0]);
        free(saves[0]), free(saves[1]);

        float *there[2] = {on_device(device.be, NULL, n), on_device(device.be, NULL, n)};
        kvq_packed_layer_decode(host.be, caches[0], decoded[0], decoded[1]);
        kvq_packed_layer_decode(device.be, caches[1], there[0], there[1]);
        for (int i = 0; i < 2; i++) {
            expect_floats(device.be, there[i], decoded[i], n);
            device.be->release(device.be, there[i]);
        }
        kvq_test_ok(kvq_packed_layer_flush(host.be, caches[0], &err), &err);
        kvq_test_ok(kvq_packed_layer_flush(device.be, caches[1], &err), &err);
    }
    for (int i = 0; i < 2; i++) {
        kvq_packed_layer_destroy(&host.ctx, &caches[i]);
        free(x[i]), free(decoded[i]);
    }
    device.be->destroy(&device.be);
    rig_close(&host);
}
END_TEST

// A number that f16 cannot hold is named, and the cache stays as it was.
START_TEST(numbers_beyond_f16_are_refused) {
    rig         r;
    kvq_error   err = {0};
    int64_t     bytes[2];
    const float large = -70000;
    rig_open(&r, CACHES[_i]);
    kvq_backend *host = r.be;
    r.be = open_device(&r.ctx, KVQ_COMPUTE_F32);
    float            *x[2] = {randoms(N_TOKENS * r.d, 1), randoms(N_TOKENS * r.d, 2)};
    float            *k = on_device(r.be, x[0], N_TOKENS * r.d), *v = on_device(r.be, x[1], N_TOKENS * r.d);
    kvq_packed_layer *cache = new_cache(&r, 0, N_TOKENS);
    append_from_device(&r, cache, x, 0, 10);
    uint8_t *before = saved(cache, &bytes[0]);
    r.be->upload(r.be, v + 150 * r.d + 7, &large, 1);
    kvq_test_failed(kvq_packed_layer_append(r.be, cache, k, v, 200, &err), KVQ_ERR_NUMERICAL, &err, "V, position 160");
    uint8_t *after = saved(cache, &bytes[1]);
    ck_assert_int_eq(bytes[0], bytes[1]);
    ck_assert_mem_eq(before, after, (size_t)bytes[0]);
    free(before), free(after), free(x[0]), free(x[1]);
    r.be->release(r.be, k);
    r.be->release(r.be, v);
    kvq_packed_layer_destroy(&r.ctx, &cache);
    r.be->destroy(&r.be);
    r.be = host;
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- memory

// Kept memory comes back cleared, to whoever wants as much; what is kept is given up when memory runs out.
START_TEST(released_memory_is_used_again) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    float       ones[100], zeros[100] = {0}, *a = NULL, *b = NULL;
    (void)setenv("KVQ_SIMT_MEMORY", "4000000", 1);
    kvq_backend *be = open_device(&ctx, KVQ_COMPUTE_F32);
    for (int i = 0; i < 100; i++) ones[i] = 1;
    a = on_device(be, ones, 100);
    expect_floats(be, a, ones, 100);
    float *first = a;
    be->release(be, a);
    a = on_device(be, NULL, 100);
    ck_assert_ptr_eq(a, first);
    expect_floats(be, a, zeros, 100);
    kvq_test_ok(be->alloc(be, 700000, "large", &b, &err), &err);
    be->release(be, b);
    kvq_test_ok(be->alloc(be, 800000, "larger", &b, &err), &err);
    float *none = NULL;
    kvq_test_failed(be->alloc(be, 300000, "too much", &none, &err), KVQ_ERR_MEMORY, &err, "too much");
    kvq_test_ok(be->check(be, &err), &err); // a failed allocation is no failure of the device
    be->release(be, a);
    be->release(be, b);
    be->destroy(&be);
}
END_TEST

// More than fits into the memory that travels, at sizes around its pieces; empty arrays.
START_TEST(long_arrays_travel_whole) {
    static const int64_t SIZES[] = {0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20, (5 << 20) + 77};
    kvq_context          ctx = kvq_test_context();
    kvq_backend         *be = open_device(&ctx, KVQ_COMPUTE_F32);
    int64_t              n = SIZES[_i];
    float               *host = randoms(n + 1, 5), *back = malloc((size_t)(n + 1) * sizeof *back);
    float               *x = on_device(be, host, n), *y = on_device(be, NULL, n + 1);
    be->copy(be, y, x, n);
    be->upload(be, y + n, host + n, 1);
    be->download(be, back, y, n + 1);
    ck_assert_mem_eq(back, host, (size_t)(n + 1) * sizeof *back);
    free(host), free(back);
    be->destroy(&be);
}
END_TEST

// ---------------------------------------------------------------- weights

// Layers that were fetched in the background give the bits of layers that were waited for.
START_TEST(layers_arrive_while_others_are_used) {
    enum { S = 40 };
    kvq_context      ctx = kvq_test_context();
    kvq_make_options options = kvq_make_options_default();
    kvq_checkpoint  *checkpoint = NULL;
    kvq_backend     *be = NULL;
    kvq_model       *model = NULL;
    kvq_workspace   *ws = NULL;
    kvq_error        err = {0};
    int32_t          ids[S];
    float           *result[2];
    options.n_layers = 5;
    small_model_open(&ctx, &options, false, &be, &checkpoint, &model);
    kvq_model_destroy(&ctx, &model);
    be->destroy(&be);
    be = open_device(&ctx, KVQ_COMPUTE_F32);
    kvq_test_ok(kvq_model_create(&ctx, be, checkpoint, false, &model, &err), &err);
    kvq_test_ok(kvq_workspace_create(model, S, false, &ws, &err), &err);
    int64_t n = S * kvq_model_describe(model)->hidden_size;
    for (int i = 0; i < S; i++) ids[i] = (7 * i) % 90;
    for (int prefetch = 0; prefetch < 2; prefetch++) {
        float *x = on_device(be, NULL, n);
        kvq_test_ok(kvq_model_embed(model, ids, S, x, &err), &err);
        for (int64_t l = 0; l < options.n_layers; l++) {
            kvq_layer *layer = NULL;
            kvq_test_ok(kvq_layer_load(model, l, &layer, &err), &err);
            if (prefetch) kvq_layer_prefetch(model, l + 1);
            for (int i = 0; i < 3; i++) kvq_test_ok(kvq_layer_forward(model, layer, ws, S, x, NULL, NULL, &err), &err);
            kvq_layer_release(model, &layer);
        }
        result[prefetch] = malloc((size_t)n * sizeof(float));
        be->download(be, result[prefetch], x, n);
        be->release(be, x);
    }
    ck_assert_mem_eq(result[0], result[1], (size_t)n * sizeof(float));
    free(result[0]), free(result[1]);
    kvq_workspace_destroy(model, &ws);
    small_model_close(&ctx, &be, &checkpoint, &model);
}
END_TEST

// With factors in bf16: both are rounded, sums are f32. Against f64 of the rounded factors, n_in + 1 roundings.
START_TEST(products_of_bf16) {
    enum { M = 5, OUT = 7, IN = 33 };
    kvq_context  ctx = kvq_test_context();
    kvq_backend *be = open_device(&ctx, KVQ_COMPUTE_BF16);
    float       *x = randoms(M * IN, 1), *w = randoms(OUT * IN, 2), *bias = randoms(OUT, 3), y[M * OUT];
    ck_assert_ptr_nonnull(strstr(be->matmul, "bf16"));
    float *d_w = on_device(be, NULL, be->weights_floats(be, OUT, IN)), *d_x = on_device(be, x, M * IN);
    float *d_bias = on_device(be, bias, OUT), *d_y = on_device(be, NULL, M * OUT);
    for (int row = 0; row < OUT; row++) be->upload_weights(be, d_w, IN, row, 1, w + row * IN);
    kvq_test_ok(be->check(be, NULL), NULL);
    be->linear(be, d_x, d_w, d_bias, d_y, M, OUT, IN);
    be->download(be, y, d_y, M * OUT);
    for (int i = 0; i < M * OUT; i++) {
        double sum = (double)bias[i % OUT], size = fabs(sum);
        for (int k = 0; k < IN; k++) {
            double a = (double)kvq_float_of_bf16(kvq_bf16_of_float(x[i / OUT * IN + k]));
            double term = a * (double)kvq_float_of_bf16(kvq_bf16_of_float(w[i % OUT * IN + k]));
            sum += term;
            size += fabs(term);
        }
        ck_assert_double_le(fabs((double)y[i] - sum), (IN + 1) * 0x1p-24 * size);
    }
    free(x), free(w), free(bias);
    be->destroy(&be);
}
END_TEST

// ---------------------------------------------------------------- failures

enum { FAIL_S = 12 };

// A layer forward and backward, the head, and a packed cache: what the programs do.
static kvq_status work(const kvq_context *ctx, const kvq_backend *be, const kvq_checkpoint *checkpoint, const rig *r,
                       kvq_error *err) {
    kvq_model        *model = NULL;
    kvq_workspace    *ws = NULL;
    kvq_layer        *layer = NULL;
    kvq_head         *head = NULL;
    kvq_packed_layer *cache = NULL;
    float            *x = NULL, *dx = NULL, *k = NULL;
    double            nll[FAIL_S];
    int32_t           ids[FAIL_S] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    kvq_status        status = KVQ_OK;
    KVQ_TRY(kvq_model_create(ctx, be, checkpoint, false, &model, err));
    int64_t n = FAIL_S * kvq_model_describe(model)->hidden_size;
    KVQ_TRY(kvq_workspace_create(model, FAIL_S, true, &ws, err));
    KVQ_TRY(be->alloc(be, n, "x", &x, err));
    KVQ_TRY(be->alloc(be, n, "dx", &dx, err));
    KVQ_TRY(kvq_model_embed(model, ids, FAIL_S, x, err));
    KVQ_TRY(kvq_layer_load(model, 0, &layer, err));
    KVQ_TRY(kvq_layer_forward(model, layer, ws, FAIL_S, x, NULL, NULL, err));
    KVQ_TRY(kvq_head_load(model, &head, err));
    KVQ_TRY(kvq_head_loss(model, head, ws, ids, FAIL_S, x, dx, nll, err));
    for (int i = 0; i + 1 < FAIL_S; i++) ck_assert(isfinite(nll[i])); // nothing passes for a result that is none
    KVQ_TRY(kvq_layer_backward(model, layer, ws, FAIL_S, x, dx, err));
    KVQ_TRY(be->alloc(be, 200 * r->d, "k", &k, err));
    KVQ_TRY(kvq_packed_layer_create(ctx, r->artifact, 0, 200, &cache, err));
    KVQ_TRY(kvq_packed_layer_append(be, cache, k, k, 200, err));
    kvq_packed_layer_decode(be, cache, k, k);
    KVQ_TRY(be->check(be, err));

done:
    kvq_packed_layer_destroy(ctx, &cache);
    kvq_layer_release(model, &layer);
    if (model != NULL) kvq_head_release(model, &head);
    if (model != NULL) kvq_workspace_destroy(model, &ws);
    be->release(be, x);
    be->release(be, dx);
    be->release(be, k);
    kvq_model_destroy(ctx, &model);
    return status;
}

// The device stops to work after n calls of its runtime, for each n at first and then in growing steps: each time the
// run ends with that error, releases all it has, and gives no number that was not computed.
START_TEST(every_failure_of_the_device_is_told) {
    rig              r;
    limited_memory   memory = {.inner = kvq_test_context(), .left = INT64_MAX};
    kvq_context      ctx = limited_context(&memory);
    kvq_make_options options = kvq_make_options_default();
    kvq_checkpoint  *checkpoint = NULL;
    kvq_backend     *be = NULL;
    kvq_model       *model = NULL;
    kvq_error        err = {0};
    kvq_status       status = KVQ_ERR_INTERNAL;
    char             calls[32];
    rig_open(&r, CACHES[_i]);
    options.n_layers = 1;
    small_model_open(&r.ctx, &options, false, &be, &checkpoint, &model);
    kvq_model_destroy(&r.ctx, &model);
    be->destroy(&be);
    int n_failed = 0;
    for (int64_t n = 0; status != KVQ_OK; n += 1 + n / 40, n_failed++) {
        (void)snprintf(calls, sizeof calls, "%lld", (long long)n);
        (void)setenv("KVQ_SIMT_CALLS", calls, 1);
        err = (kvq_error){KVQ_OK, "", ""};
        status = kvq_backend_open(&ctx, "cuda", KVQ_COMPUTE_F32, &be, &err);
        if (status == KVQ_OK) {
            status = work(&ctx, be, checkpoint, &r, &err);
            be->destroy(&be);
        }
        ck_assert_int_eq(memory.n_live, 0);
        if (status != KVQ_OK) kvq_test_failed(status, KVQ_ERR_INTERNAL, &err, "stopped working");
    }
    ck_assert_int_gt(n_failed, 50);
    kvq_checkpoint_close(&r.ctx, &checkpoint);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(caches_have_the_bytes_of_the_cpu, N_CACHES),
    KVQ_LOOP(numbers_beyond_f16_are_refused, N_CACHES),
    KVQ_CASE(released_memory_is_used_again),
    KVQ_LOOP(long_arrays_travel_whole, 7),
    KVQ_CASE(layers_arrive_while_others_are_used),
    KVQ_CASE(products_of_bf16),
    KVQ_LOOP(every_failure_of_the_device_is_told, N_CACHES),
};
KVQ_TEST_MAIN("cuda backend", CASES)
