// SPDX-License-Identifier: Apache-2.0
//
// See attention_model.h. The backend's attention_step is replaced by one that moves the new token into the packed cache
// of its layer and asks somebody else to attend to it.
#include "attention_model.h"

#include <math.h>

#include "kvq_model.h"
#include "packed_rig.h"

enum { LAYERS = 6, HEADS = 6, DIM = 48, D_MODEL = HEADS * DIM, MOST = 512 };

typedef struct loop {
    rig               packed; // its artifact
    attention_setup   with;
    kvq_backend      *be;
    kvq_model        *model;
    kvq_checkpoint   *checkpoint;
    double            frequency[DIM / 2];
    float             lower[LAYERS][D_MODEL], upper[LAYERS][D_MODEL]; // of keys before RoPE
    kvq_packed_layer *caches[LAYERS];
    attention_rig     layers[LAYERS];
    attention_attend  attend; // NULL: ranges are being measured
    void             *user;
    int64_t           calls; // of attention_step: one for each layer, in order
    void (*full_step)(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                      int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                      float *scratch);
} loop;

static loop *running; // the backend's functions carry no user pointer

// k [HEADS, DIM] at a position; direction -1 takes RoPE back.
static void rotate(const loop *l, float *k, int64_t position, double direction) {
    for (int i = 0; i < D_MODEL; i++) {
        if (i % DIM >= DIM / 2) continue;
        double angle = direction * (double)position * l->frequency[i % DIM], a = (double)k[i];
        double b = (double)k[i + DIM / 2];
        k[i] = (float)(a * cos(angle) - b * sin(angle));
        k[i + DIM / 2] = (float)(b * cos(angle) + a * sin(angle));
    }
}

static void watch_ranges(loop *l, int64_t layer, const float *k) {
    for (int c = 0; c < D_MODEL; c++) {
        l->lower[layer][c] = fminf(l->lower[layer][c], k[c]);
        l->upper[layer][c] = fmaxf(l->upper[layer][c], k[c]);
    }
}

static void step(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                 int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                 float *scratch) {
    loop              *l = running;
    int64_t            layer = l->calls++ % LAYERS;
    float              k[D_MODEL];
    kvq_error          err = {0};
    attention_sequence sequence;
    memcpy(k, k_cache + n_past * D_MODEL, sizeof k);
    rotate(l, k, n_past, -1);
    if (l->attend == NULL) {
        watch_ranges(l, layer, k);
        l->full_step(be, shape, n_seqs, n_past, capacity, q, k_cache, v_cache, out, scratch);
        return;
    }
    const float *v = v_cache + n_past * D_MODEL;
    kvq_test_ok(kvq_packed_layer_append(be, l->caches[layer], k, v, 1, &err), &err);
    attention_sequence_of(&l->layers[layer], be, l->caches[layer], &sequence);
    attention_step now = {.rig = &l->layers[layer],
                          .sequence = &sequence,
                          .frequency = l->frequency,
                          .layer = (int)layer,
                          .n_heads = shape->n_heads,
                          .scale = shape->scale,
                          .q = q,
                          .k = k,
                          .v = v};
    l->attend(l->user, &now, out);
    attention_sequence_close(&sequence);
}

void attention_on_cpu(void *user, const attention_step *s, float *out) {
    loop               *l = running;
    int64_t             n = s->sequence->length;
    kvq_attention_shape shape = {
        .n_tokens = 1, .n_heads = s->n_heads, .n_kv_heads = HEADS, .head_dim = DIM, .scale = s->scale};
    float *scores = malloc((size_t)(s->n_heads * n) * sizeof *scores);
    (void)user;
    for (int64_t t = 0; t < n; t++) rotate(l, s->sequence->k + t * D_MODEL, t, 1);
    l->full_step(l->be, &shape, 1, n - 1, n, s->q, s->sequence->k, s->sequence->v, out, scores);
    for (int64_t t = 0; t < n; t++) rotate(l, s->sequence->k + t * D_MODEL, t, -1);
    free(scores);
}

// ---------------------------------------------------------------- artifact

static void even_levels(float *levels, int n, float end) {
    for (int i = 0; i < n; i++) levels[i] = half_of(end * (2.0f * (float)i / (float)(n - 1) - 1));
}

// 4 bits for every channel of K between thresholds a tenth inside of its range, 3 or 4 for values.
static void set_tables(loop *l, int64_t layer) {
    static const float gauss[8] = {-2.152f, -1.344f, -0.756f, -0.245f, 0.245f, 0.756f, 1.344f, 2.152f};
    kvq_tensor_quant  *k = &l->packed.artifact->layers[layer].k, *v = &l->packed.artifact->layers[layer].v;
    for (int c = 0; c < D_MODEL; c++) {
        float low = l->lower[layer][c], high = l->upper[layer][c], inside = 0.1f * (high - low);
        k->lower[c] = half_of(low + inside);
        k->upper[c] = half_of(high - inside);
    }
    if (!l->with.tiled) {
        kvq_free(&l->packed.ctx, k->codebook);
        kvq_free(&l->packed.ctx, v->codebook);
        k->bits = v->bits = 4;
        k->n_levels = v->n_levels = 16;
        k->codebook = rig_array(&l->packed, 16, sizeof(float));
        v->codebook = rig_array(&l->packed, 16, sizeof(float));
        even_levels(k->codebook, 16, 0.97f);
        even_levels(v->codebook, 16, 0.97f);
        return;
    }
    kvq_free(&l->packed.ctx, k->key_levels);
    k->n_key_levels = (int64_t)16 * D_MODEL;
    k->key_levels = rig_array(&l->packed, k->n_key_levels, sizeof(float));
    for (int c = 0; c < D_MODEL; c++) {
        k->widths[c] = 4;
        even_levels(k->key_levels + 16 * c, 16, 0.97f);
    }
    for (int i = 0; i < 8; i++) v->codebook[i] = half_of(gauss[i]);
}

static void make_caches(loop *l, int64_t n) {
    kvq_error err = {0};
    setup     with = {.tiled = l->with.tiled,
                      .n_heads = HEADS,
                      .head_dim = DIM,
                      .n_layers = LAYERS,
                      .sinks = 1,
                      .recent = l->with.recent,
                      .n_side = l->with.n_side,
                      .n_slots = l->with.n_slots,
                      .dim = 1};
    rig_open(&l->packed, with);
    for (int64_t i = 0; i < LAYERS; i++) {
        set_tables(l, i);
        kvq_test_ok(kvq_packed_layer_create(&l->packed.ctx, l->packed.artifact, i, n, &l->caches[i], &err), &err);
        attention_rig_describe(l->packed.artifact, &l->with, i, &l->layers[i]);
    }
}

static void free_caches(loop *l) {
    for (int i = 0; i < LAYERS; i++) {
        kvq_packed_layer_destroy(&l->packed.ctx, &l->caches[i]);
        attention_rig_close(&l->layers[i]);
    }
    rig_close(&l->packed);
}

// ---------------------------------------------------------------- the loop

static void read_ids(const kvq_context *ctx, const char *model, int64_t n, int32_t *ids) {
    char            path[1024];
    kvq_error       err = {0};
    kvq_mapped_file text = {0};
    kvq_tokenizer  *tokenizer = NULL;
    kvq_ids         all = {NULL, 0, 0};
    kvq_test_shared_path(path, sizeof path, "data/tinystories_val_head.txt");
    kvq_test_ok(kvq_map_file(path, &text, &err), &err);
    kvq_test_ok(kvq_tokenizer_open(ctx, model, &tokenizer, &err), &err);
    kvq_test_ok(kvq_tokenizer_encode(ctx, tokenizer, (const char *)text.data, 4096, true, &all, &err), &err);
    ck_assert_int_ge(all.count, n);
    ids[0] = 1; // beginning of a text
    memcpy(ids + 1, all.data, (size_t)(n - 1) * sizeof *ids);
    kvq_ids_free(ctx, &all);
    kvq_tokenizer_close(ctx, &tokenizer);
    kvq_unmap_file(&text);
}

static double nll_of(const float *logits, int64_t vocabulary, int32_t id) {
    double largest = (double)logits[0], sum = 0;
    for (int64_t i = 1; i < vocabulary; i++) largest = fmax(largest, (double)logits[i]);
    for (int64_t i = 0; i < vocabulary; i++) sum += exp((double)logits[i] - largest);
    return largest + log(sum) - (double)logits[id];
}

static double run(loop *l, const int32_t *ids, int64_t n) {
    kvq_error    err = {0};
    kvq_decode  *decode = NULL;
    const float *logits = NULL;
    double       sum = 0;
    l->calls = 0;
    kvq_test_ok(kvq_decode_create(l->model, 1, n, &decode, &err), &err);
    for (int64_t t = 0; t + 1 < n; t++) {
        kvq_test_ok(kvq_decode_step(l->model, decode, ids + t, &logits, &err), &err);
        sum += nll_of(logits, kvq_model_describe(l->model)->vocab_size, ids[t + 1]);
    }
    kvq_decode_destroy(l->model, &decode);
    return sum / (double)(n - 1);
}

double attention_model_nll(bool tiled, int64_t n, attention_attend attend, void *user) {
    static loop l;
    char        path[1024];
    int32_t     ids[MOST];
    kvq_error   err = {0};
    kvq_context ctx = kvq_test_context();
    l = (loop){.with = {.tiled = tiled,
                        .n_kv_heads = HEADS,
                        .head_dim = DIM,
                        .sinks = 1,
                        .recent = 8,
                        .n_side = 3,
                        .n_slots = 256,
                        .dim = 1}};
    running = &l;
    kvq_test_shared_path(path, sizeof path, "models/stories15M");
    kvq_test_ok(kvq_backend_cpu(&ctx, KVQ_COMPUTE_F32, &l.be, &err), &err);
    kvq_test_ok(kvq_checkpoint_open(&ctx, path, &l.checkpoint, &err), &err);
    kvq_test_ok(kvq_model_create(&ctx, l.be, l.checkpoint, true, &l.model, &err), &err);
    for (int i = 0; i < DIM / 2; i++) l.frequency[i] = pow(kvq_model_describe(l.model)->rope.theta, -2.0 * i / DIM);
    l.full_step = l.be->attention_step;
    l.be->attention_step = step;
    read_ids(&ctx, path, n, ids);
    double nll = run(&l, ids, n);
    if (attend != NULL) {
        make_caches(&l, n);
        l.attend = attend;
        l.user = user;
        nll = run(&l, ids, n);
        free_caches(&l);
    }
    kvq_model_destroy(&ctx, &l.model);
    kvq_checkpoint_close(&ctx, &l.checkpoint);
    l.be->destroy(&l.be);
    return nll;
}
