// SPDX-License-Identifier: Apache-2.0
//
// The reference model against a framework's numbers (shared goldens), against an independent f64 model with central
// differences, and against itself (decode step == window, threads, residency).
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_make_model.h"
#include "model_rig.h"
#include "reference_model.h"

// ---------------------------------------------------------------- a framework's numbers

// Tolerances of the reference data: its own f32-against-f64 noise times about ten (goldens/README.md).
#define LOGITS_TOLERANCE 5e-5
#define KV_TOLERANCE     2e-5
#define FISHER_TOLERANCE 2e-4

typedef struct golden_model {
    const char *golden, *model; // folders under the shared data; model NULL: the golden's own
} golden_model;

static const golden_model GOLDEN_MODELS[] = {
    {"goldens/tiny/llama_mha", NULL},
    {"goldens/tiny/llama_gqa_llama3", NULL},
    {"goldens/tiny/llama_linear", NULL},
    {"goldens/tiny/llama_yarn", NULL},
    {"goldens/tiny/llama_bias", NULL},
    {"goldens/tiny/llama_sharded", NULL},
    {"goldens/tiny/llama_bf16", NULL},
    {"goldens/tiny/mistral_f16", NULL},
    {"goldens/tiny/mistral_swa16", NULL},
    {"goldens/tiny/qwen2", NULL},
    {"goldens/tiny/qwen3", NULL},
    {"goldens/tiny/phi3", NULL},
    {"goldens/tiny/phi3_partial", NULL},
    {"goldens/tiny/gemma2", NULL},
    {"goldens/tiny/gemma3", NULL},
    {"goldens/tiny/mixtral", NULL},
    {"goldens/real/stories260K", "models/stories260K"},
    {"goldens/real/stories15M", "models/stories15M"},
};
#define N_GOLDEN_MODELS ((int)(sizeof GOLDEN_MODELS / sizeof *GOLDEN_MODELS))

static void square(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= x[i];
}

static double worst_layer_error(const rig *r, const kvq_golden *golden, const char *kind, const float *ours) {
    double  worst = -1;
    int64_t kv = r->S * r->d, n;
    for (int64_t l = 0; l < r->c->n_layers; l++) {
        char name[32];
        (void)snprintf(name, sizeof name, "%s.%d", kind, (int)l);
        const float *theirs = kvq_golden_f32(golden, name, &n);
        if (theirs == NULL) continue;
        ck_assert_int_eq(n, kv);
        worst = fmax(worst, kvq_test_relative_error(ours + l * kv, theirs, kv));
    }
    ck_assert_msg(worst >= 0, "the golden has no '%s'", kind);
    return worst;
}

static double logits_error(rig *r, const kvq_golden *golden) {
    int64_t      n, first = 0;
    const float *theirs = kvq_golden_f32(golden, "logits", &n);
    if (theirs == NULL) {
        theirs = kvq_golden_f32(golden, "logits_last", &n);
        first = r->S - n / r->c->vocab_size;
    }
    float *ours = rig_logits(r, first);
    ck_assert_int_eq(n, (r->S - first) * r->c->vocab_size);
    double error = kvq_test_relative_error(ours, theirs, n);
    free(ours);
    return error;
}

static void compare_with_golden(const char *folder, const char *model_path) {
    kvq_golden    *golden = kvq_golden_open(folder, "golden");
    int64_t        S, kv;
    const int32_t *ids = kvq_golden_i32(golden, "ids", &S);
    rig            r;
    rig_open(&r, model_path, ids, S, 2);
    rig_forward(&r);
    double logits = logits_error(&r, golden), k = worst_layer_error(&r, golden, "k", r.k),
           v = worst_layer_error(&r, golden, "v", r.v);
    (void)rig_backward(&r);
    kv = r.c->n_layers * r.S * r.d;
    square(r.dk, kv);
    square(r.dv, kv);
    double fisher_k = worst_layer_error(&r, golden, "fisher_k", r.dk),
           fisher_v = worst_layer_error(&r, golden, "fisher_v", r.dv);
    printf("%-30s logits %.1e  K %.1e  V %.1e  Fisher K %.1e  V %.1e\n", folder, logits, k, v, fisher_k, fisher_v);
    ck_assert_double_lt(logits, LOGITS_TOLERANCE);
    ck_assert_double_lt(k, KV_TOLERANCE);
    ck_assert_double_lt(v, KV_TOLERANCE);
    ck_assert_double_lt(fisher_k, FISHER_TOLERANCE);
    ck_assert_double_lt(fisher_v, FISHER_TOLERANCE);
    rig_close(&r);
    kvq_golden_close(golden);
}

START_TEST(activations_and_gradients_equal_the_framework) {
    const golden_model *g = &GOLDEN_MODELS[_i];
    char                path[1024];
    kvq_test_shared_path(path, sizeof path, g->model != NULL ? g->model : g->golden);
    compare_with_golden(g->golden, path);
}
END_TEST

START_TEST(smollm2_equals_the_framework) { compare_with_golden("goldens/real/smollm2", kvq_test_smollm2()); }
END_TEST

// ---------------------------------------------------------------- an independent model in f64

// Tolerances as for the framework's numbers: the other side is exact, ours is f32.
START_TEST(forward_equals_the_f64_model) {
    char    path[256];
    int32_t ids[TINY_S];
    rig     r;
    make_tiny(path, sizeof path, _i);
    rig_open(&r, path, ids, TINY_S, 2);
    random_ids(ids, TINY_S, r.c->vocab_size);
    rig_forward(&r);
    int64_t kv = r.c->n_layers * r.S * r.d, n_logits = r.S * r.c->vocab_size;
    double *logits = malloc((size_t)n_logits * sizeof *logits), *k = malloc((size_t)kv * sizeof *k),
           *v = malloc((size_t)kv * sizeof *v);
    float           *ours = rig_logits(&r, 0);
    reference_model *reference = reference_model_open(r.checkpoint);
    double           loss = reference_model_loss(reference, ids, r.S, NULL, logits, k, v);
    double           worst[3] = {0}, scale[3] = {0};
    for (int64_t i = 0; i < n_logits; i++) {
        worst[0] = fmax(worst[0], fabs((double)ours[i] - logits[i]));
        scale[0] = fmax(scale[0], fabs(logits[i]));
    }
    for (int64_t i = 0; i < kv; i++) {
        worst[1] = fmax(worst[1], fabs((double)r.k[i] - k[i]));
        worst[2] = fmax(worst[2], fabs((double)r.v[i] - v[i]));
        scale[1] = fmax(scale[1], fabs(k[i]));
        scale[2] = fmax(scale[2], fabs(v[i]));
    }
    ck_assert_double_lt(worst[0] / scale[0], LOGITS_TOLERANCE);
    ck_assert_double_lt(worst[1] / scale[1], KV_TOLERANCE);
    ck_assert_double_lt(worst[2] / scale[2], KV_TOLERANCE);
    ck_assert_double_eq_tol(rig_backward(&r), loss, 2e-5);
    free(ours);
    reference_model_close(reference);
    free(logits), free(k), free(v);
    rig_close(&r);
}
END_TEST

// d loss / d element by central differences of the f64 model, for every element of K and V of every layer. With step
// h = 1e-4 the truncation error is about h^2 = 1e-8 of the third derivative and rounding about 1e-12: the difference is
// what f32 adds, 1e-4 of the largest gradient at most (tolerance of the reference data).
START_TEST(backward_equals_central_differences) {
    char    path[256];
    int32_t ids[TINY_S];
    rig     r;
    make_tiny(path, sizeof path, _i);
    rig_open(&r, path, ids, TINY_S, 2);
    random_ids(ids, TINY_S, r.c->vocab_size);
    rig_forward(&r);
    (void)rig_backward(&r);
    reference_model *reference = reference_model_open(r.checkpoint);
    const double     h = 1e-4;
    for (int is_v = 0; is_v < 2; is_v++) {
        const float *ours = is_v ? r.dv : r.dk;
        double       worst = 0, scale = 0;
        for (int64_t i = 0; i < r.c->n_layers * r.S * r.d; i++) {
            reference_nudge nudge = {i / (r.S * r.d), i / r.d % r.S, i % r.d, is_v == 1, h};
            double          up = reference_model_loss(reference, ids, r.S, &nudge, NULL, NULL, NULL);
            nudge.delta = -h;
            double slope = (up - reference_model_loss(reference, ids, r.S, &nudge, NULL, NULL, NULL)) / (2 * h);
            worst = fmax(worst, fabs((double)ours[i] - slope));
            scale = fmax(scale, fabs(slope));
        }
        ck_assert_double_gt(scale, 1e-4); // a flat loss would prove nothing
        ck_assert_double_lt(worst / scale, 1e-4);
    }
    reference_model_close(reference);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- the model against itself

// Windows that are one block of rows for eight threads and several for one; of the experts, at least one has tokens for
// several blocks too.
START_TEST(threads_do_not_change_a_bit) {
    static const int     WHICH[] = {TINY_BIASES, TINY_BIASES, TINY_GEMMA3, TINY_MIXTRAL};
    static const int64_t LENGTH[] = {TINY_S, 1100, 1100, 2100};
    char                 path[256];
    int32_t              ids[2100];
    rig                  r[2];
    double               loss[2];
    make_tiny(path, sizeof path, WHICH[_i]);
    random_ids(ids, (int)LENGTH[_i], KVQ_MAKE_N_TOKENS);
    for (int i = 0; i < 2; i++) {
        rig_open(&r[i], path, ids, LENGTH[_i], i == 0 ? 1 : 8);
        rig_forward(&r[i]);
        loss[i] = rig_backward(&r[i]);
    }
    size_t bytes = (size_t)(r[0].c->n_layers * r[0].S * r[0].d) * sizeof(float);
    ck_assert(loss[0] == loss[1]);
    ck_assert_mem_eq(r[0].k, r[1].k, bytes);
    ck_assert_mem_eq(r[0].v, r[1].v, bytes);
    ck_assert_mem_eq(r[0].dk, r[1].dk, bytes);
    ck_assert_mem_eq(r[0].dv, r[1].dv, bytes);
    rig_close(&r[0]);
    rig_close(&r[1]);
}
END_TEST

// Two sequences fed token by token give the logits of their windows. The products are the same, their order is not.
START_TEST(decoding_equals_the_window) {
    char         path[256];
    int32_t      ids[2][TINY_S];
    rig          r[2];
    kvq_error    err = {0};
    kvq_model   *model = NULL;
    kvq_decode  *decode = NULL;
    const float *step = NULL;
    make_tiny(path, sizeof path, _i);
    for (int i = 0; i < 2; i++) {
        rig_open(&r[i], path, ids[i], TINY_S, 2);
        for (int t = 0; t < TINY_S; t++)
            ids[i][t] = (int32_t)kvq_rng_below(9, KVQ_RNG_TEST, (uint32_t)i, (uint64_t)t, (uint64_t)r[i].c->vocab_size);
        rig_forward(&r[i]);
    }
    int64_t V = r[0].c->vocab_size;
    kvq_test_ok(kvq_model_create(&r[0].ctx, r[0].be, r[0].checkpoint, _i != TINY_MIXTRAL, &model, &err), &err);
    kvq_test_ok(kvq_decode_create(model, 2, TINY_S, &decode, &err), &err);
    float *window[2] = {rig_logits(&r[0], 0), rig_logits(&r[1], 0)};
    for (int t = 0; t < TINY_S; t++) {
        int32_t now[2] = {ids[0][t], ids[1][t]};
        kvq_test_ok(kvq_decode_step(model, decode, now, &step, &err), &err);
        float *logits = rig_host(&r[0], step, 2 * V);
        for (int i = 0; i < 2; i++)
            ck_assert_double_lt(kvq_test_relative_error(logits + i * V, window[i] + t * V, V), LOGITS_TOLERANCE);
        free(logits);
    }
    int32_t now[2] = {0, 0};
    kvq_test_failed(kvq_decode_step(model, decode, now, &step, &err), KVQ_ERR_USAGE, &err, "capacity");
    kvq_decode_destroy(model, &decode);
    kvq_model_destroy(&r[0].ctx, &model);
    for (int i = 0; i < 2; i++) {
        free(window[i]);
        rig_close(&r[i]);
    }
}
END_TEST

// ---------------------------------------------------------------- what is refused

START_TEST(ids_outside_the_vocabulary_are_refused) {
    char      path[256];
    int32_t   ids[3] = {0, 1, 1 << 20};
    kvq_error err = {0};
    rig       r;
    make_tiny(path, sizeof path, TINY_LLAMA);
    rig_open(&r, path, ids, 3, 1);
    kvq_test_failed(kvq_model_embed(r.model, ids, 3, r.states, &err), KVQ_ERR_INPUT, &err,
                    "position 2: token id 1048576");
    rig_close(&r);
}
END_TEST

// An activation that overflows is named by layer, tensor, position and channel.
START_TEST(nonfinite_activations_are_located) {
    char        path[256];
    int32_t     ids[TINY_S];
    kvq_error   err = {0};
    rig         r = {0};
    kvq_layer  *layer = NULL;
    const float nan = NAN;
    make_tiny(path, sizeof path, TINY_LLAMA);
    rig_open(&r, path, ids, TINY_S, 1);
    random_ids(ids, TINY_S, r.c->vocab_size);
    kvq_test_ok(kvq_model_embed(r.model, ids, TINY_S, r.states, &err), &err);
    r.be->upload(r.be, r.states + 7 * r.C + 3, &nan, 1);
    kvq_test_ok(kvq_layer_load(r.model, 1, &layer, &err), &err);
    kvq_test_failed(kvq_layer_forward(r.model, layer, r.ws, TINY_S, r.states, NULL, NULL, &err), KVQ_ERR_NUMERICAL,
                    &err, "layer 1, K, position 7, channel 0");
    kvq_layer_release(r.model, &layer);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- perplexities of the reference data

typedef struct ppl_case {
    const char *name, *model;
    int         n_windows; // of those recorded; all of them take minutes
} ppl_case;

static const ppl_case PPL_CASES[] = {{"stories260K", "models/stories260K", 64},
                                     {"stories15M", "models/stories15M", 32}};

// Sum of the losses of each window, 2e-5 per token (goldens/README.md: torch's f32 log-softmax is low by up to 8e-6).
START_TEST(window_losses_equal_the_framework) {
    const ppl_case *p = &PPL_CASES[_i];
    char            path[1024];
    kvq_error       err = {0};
    kvq_context     ctx = kvq_test_context();
    kvq_mapped_file text = {0}, json = {0};
    kvq_tokenizer  *tokenizer = NULL;
    kvq_ids         ids = {0};
    kvq_test_shared_path(path, sizeof path, "goldens/ppl/ppl.json");
    kvq_test_ok(kvq_map_file(path, &json, &err), &err);
    cJSON       *all = cJSON_ParseWithLength((const char *)json.data, json.bytes);
    const cJSON *entry = cJSON_GetObjectItem(all, p->name), *expected = cJSON_GetObjectItem(entry, "window_nll_sum");
    int          S = cJSON_GetObjectItem(entry, "ctx")->valueint;
    char         file[256];
    (void)snprintf(file, sizeof file, "data/%s", cJSON_GetObjectItem(entry, "file")->valuestring);
    kvq_test_shared_path(path, sizeof path, file);
    kvq_test_ok(kvq_map_file(path, &text, &err), &err);
    kvq_test_shared_path(path, sizeof path, p->model);
    kvq_test_ok(kvq_tokenizer_open(&ctx, path, &tokenizer, &err), &err);
    kvq_test_ok(kvq_tokenizer_encode(&ctx, tokenizer, (const char *)text.data, text.bytes, true, &ids, &err), &err);
    ck_assert_int_eq(ids.count, cJSON_GetObjectItem(entry, "tokens")->valueint);
    for (int i = 0; i < (KVQ_RIG_SLOW ? 1 : p->n_windows); i++) {
        rig    r;
        double nll[2048], sum = 0;
        rig_open(&r, path, ids.data + (int64_t)i * S, S, 2);
        rig_forward(&r);
        kvq_test_ok(kvq_head_loss(r.model, r.head, r.ws, r.ids, S, r.states + r.c->n_layers * S * r.C, NULL, nll, &err),
                    &err);
        for (int t = 0; t + 1 < S; t++) sum += nll[t];
        ck_assert_double_eq_tol(sum, cJSON_GetArrayItem(expected, i)->valuedouble, 2e-5 * (S - 1));
        rig_close(&r);
    }
    kvq_ids_free(&ctx, &ids);
    kvq_tokenizer_close(&ctx, &tokenizer);
    kvq_unmap_file(&text);
    kvq_unmap_file(&json);
    cJSON_Delete(all);
}
END_TEST

// ---------------------------------------------------------------- keys before and after RoPE

static float *uniforms(int64_t n, uint32_t stream) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(2 * kvq_rng_uniform(8, KVQ_RNG_TEST, stream, (uint64_t)i) - 1);
    return x;
}

// A copy of x rotated.
static float *rotated(const rig *r, int64_t layer, kvq_rotation rotation, const float *x) {
    int64_t n = TINY_S * r->d;
    float  *there = rig_backend(r, x, n);
    kvq_rotate_keys(r->model, r->ws, layer, rotation, TINY_S, there);
    float *host = rig_host(r, there, n);
    r->be->release(r->be, there);
    return host;
}

static double dot(const float *x, const float *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)y[i];
    return sum;
}

// Partial rotation, two bases in one model, and (the last one) an amplitude of 0.1 log 4 + 1 = 1.139.
static const int ROTATED[] = {TINY_LLAMA, TINY_PHI3, TINY_GEMMA3, TINY_LLAMA};
enum { N_ROTATED = 4 };

// There and back is the identity, and the gradient keeps every directional derivative: <g before, x> = <g after, x
// after> for any x. A product of a table entry (half a unit), the factor 1 / a^2 (half a unit) and a number of at most
// 2 errs by 2 units at most, a rotated number by 5, there and back by 12, of 2^-24 times 2.
START_TEST(keys_are_rotated_and_back) {
    char             path[256];
    int32_t          ids[TINY_S];
    rig              r;
    kvq_make_options options = kvq_make_options_default();
    options.rope_scaling = "{\"rope_type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 32}";
    (void)snprintf(path, sizeof path, "%s/yarn", kvq_test_folder());
    if (_i == N_ROTATED - 1)
        kvq_make_model_hf(&options, path);
    else
        make_tiny(path, sizeof path, ROTATED[_i]);
    rig_open(&r, path, ids, TINY_S, 2);
    int64_t n = TINY_S * r.d, D = r.c->head_dim;
    float  *x = uniforms(n, 60), *g = uniforms(n, 61);
    for (int64_t l = 0; l < r.c->n_layers; l++) {
        float *after = rotated(&r, l, KVQ_ROTATE_FORWARD, x), *back = rotated(&r, l, KVQ_ROTATE_BACK, after),
              *g_after = rotated(&r, l, KVQ_ROTATE_GRADIENT, g);
        for (int64_t i = 0; i < n; i++) ck_assert_double_le(fabs((double)back[i] - (double)x[i]), 24 * 0x1p-24);
        for (int64_t i = 0; i < n; i += D)
            ck_assert_double_le(fabs(dot(g + i, x + i, D) - dot(g_after + i, after + i, D)), (double)D * 48 * 0x1p-24);
        double amplitude = _i == N_ROTATED - 1 ? 0.1 * log(4) + 1 : 1;
        ck_assert_double_eq_tol(sqrt(dot(after, after, n) / dot(x, x, n)), amplitude, 1e-6);
        if (_i != N_ROTATED - 1) {
            ck_assert_mem_eq(after, x, (size_t)r.d * sizeof *x); // attention alone would not see all positions shifted
            ck_assert_mem_ne(after + r.d, x + r.d, (size_t)r.d * sizeof *x);
        }
        free(after), free(back), free(g_after);
    }
    free(x), free(g);
    rig_close(&r);
}
END_TEST

typedef struct second_set {
    const rig *r;
    float     *k, *v, *wrong; // backend memory; wrong [S, d] are numbers that spoil a result
    int64_t    recent;
} second_set;

// The second set is the truth; the first keeps it only where no query should look.
static kvq_status offer_second_set(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    second_set *set = user;
    int64_t     n = n_tokens * set->r->d, n_wrong = set->recent * set->r->d;
    (void)layer, (void)err;
    set->r->be->copy(set->r->be, set->k, x->k, n);
    set->r->be->copy(set->r->be, set->v, x->v, n);
    set->r->be->copy(set->r->be, x->k + n - n_wrong, set->wrong, n_wrong);
    set->r->be->copy(set->r->be, x->v + n - n_wrong, set->wrong, n_wrong);
    x->k_recent = set->k;
    x->v_recent = set->v;
    x->second.recent = set->recent;
    return KVQ_OK;
}

// With sliding windows of 5 tokens, two rotary bases, soft caps. When all is recent the layer's result keeps every bit;
// with 3 recent tokens two sums are added, which is another order of the same terms (tolerance of the model's numbers).
START_TEST(hooks_give_recent_keys_of_their_own) {
    static const int WHICH[] = {TINY_LLAMA, TINY_MISTRAL, TINY_GEMMA2, TINY_GEMMA3};
    char             path[256];
    int32_t          ids[TINY_S];
    rig              r;
    kvq_error        err = {0};
    make_tiny(path, sizeof path, WHICH[_i]);
    rig_open(&r, path, ids, TINY_S, 2);
    random_ids(ids, TINY_S, r.c->vocab_size);
    rig_forward(&r);
    int64_t    n = r.S * r.C, kv = r.S * r.d;
    second_set set = {.r = &r};
    float     *large = malloc((size_t)kv * sizeof *large), *states = rig_host(&r, r.states, (r.c->n_layers + 1) * n);
    for (int64_t i = 0; i < kv; i++) large[i] = 1e4f;
    float **memory[] = {&set.k, &set.v, &set.wrong};
    for (int i = 0; i < 3; i++) *memory[i] = rig_backend(&r, large, kv);
    float *x = rig_backend(&r, states, n);
    for (int64_t l = 0; l < r.c->n_layers; l++) {
        kvq_layer   *layer = NULL;
        const float *expected = states + (l + 1) * n;
        kvq_test_ok(kvq_layer_load(r.model, l, &layer, &err), &err);
        for (int all = 0; all < 2; all++) {
            set.recent = all ? r.S : 3;
            r.be->copy(r.be, x, r.states + l * n, n);
            kvq_test_ok(kvq_layer_forward(r.model, layer, r.ws, r.S, x, offer_second_set, &set, &err), &err);
            float *result = rig_host(&r, x, n);
            if (all) ck_assert_mem_eq(result, expected, (size_t)n * sizeof *result);
            ck_assert_double_lt(kvq_test_relative_error(result, expected, n), LOGITS_TOLERANCE);
            free(result);
        }
        kvq_layer_release(r.model, &layer);
    }
    for (int i = 0; i < 3; i++) r.be->release(r.be, *memory[i]);
    r.be->release(r.be, x);
    free(large), free(states);
    rig_close(&r);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_GOLDEN_LOOP(activations_and_gradients_equal_the_framework, N_GOLDEN_MODELS),
    KVQ_SMOLLM2_CASE(smollm2_equals_the_framework),
    KVQ_LOOP(threads_do_not_change_a_bit, KVQ_RIG_SLOW ? 1 : 4),
    KVQ_LOOP(forward_equals_the_f64_model, N_TINY),
    KVQ_LOOP(backward_equals_central_differences, N_TINY),
    KVQ_LOOP(decoding_equals_the_window, N_TINY),
    KVQ_LOOP(keys_are_rotated_and_back, N_ROTATED),
    KVQ_LOOP(hooks_give_recent_keys_of_their_own, 4),
    KVQ_CASE(ids_outside_the_vocabulary_are_refused),
    KVQ_CASE(nonfinite_activations_are_located),
    KVQ_GOLDEN_LOOP(window_losses_equal_the_framework, 2),
};

int main(void) {
    const int n_cases = (int)(sizeof CASES / sizeof *CASES);
    char      why[512];
    if (rig_has_device(why, sizeof why)) return kvq_test_run("model on " KVQ_RIG_DEVICE, CASES, n_cases);
    printf("skipped: %s\nmodel on " KVQ_RIG_DEVICE ": 0 passed, 0 failed, %d skipped\n", why, n_cases);
    return 0;
}
