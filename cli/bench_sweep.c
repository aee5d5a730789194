// SPDX-License-Identifier: Apache-2.0
//
// The case `sweep`: where the time of a calibration goes. Windows of random token ids go through every layer forward
// and backward, K and V are counted and fitted, with the calls and in the order of magnitude of a real run; a layer's
// backward pass gets a random gradient in place of the one that the layers above would give it.
#include <stdio.h>
#include <string.h>

#include "bench.h"
#include "kvq_fisher.h"

#define USUAL_SEQ_LEN 512
#define OUTLIERS      0.01
#define BITS          3
#define WEIGHTINGS    (KVQ_WEIGHTINGS_BASIC | 1u << KVQ_WEIGHT_FISHER_SCALED) // of a usual calibration

typedef enum stage {
    LOAD,
    EMBED,
    FORWARD,
    THRESHOLDS,
    BACKWARD,
    COUNT,
    FIT,
    LOSS,
    N_STAGES,
    ATTENTION_FORWARD = N_STAGES, // measured once more, alone
    ATTENTION_BACKWARD,
    N_TIMES
} stage;

static const char *const STAGE_NAMES[N_TIMES] = {
    [LOAD] = "load weights",
    [EMBED] = "embed",
    [FORWARD] = "forward",
    [THRESHOLDS] = "thresholds",
    [BACKWARD] = "backward",
    [COUNT] = "count",
    [FIT] = "fit",
    [LOSS] = "loss",
    [ATTENTION_FORWARD] = "attention in forward",
    [ATTENTION_BACKWARD] = "attention in backward",
};

// Arrays of the attention that is measured alone.
typedef struct attention_arrays {
    float *q, *k, *v, *out, *dq, *dk, *dv, *scratch;
} attention_arrays;

typedef struct sweep {
    bench_report           *report;
    const kvq_context      *ctx;
    kvq_backend            *be;
    kvq_checkpoint         *checkpoint;
    const kvq_model_config *config;
    kvq_model              *model;
    kvq_workspace          *ws;
    kvq_layer              *layer;
    kvq_head               *head;
    int64_t                 S, n_windows, n_layers, C, d;
    int32_t                *ids;               // [n_windows, S]
    float                  *x, *y;             // backend [n_windows, S, C]: input and output of the current layer
    float                  *dx, *random;       // backend [S, C]
    float                  *k, *v, *w_k, *w_v; // host [S, d]
    float                  *z_and_r;           // [2 * d]
    float                  *scratch;           // of counting
    float                   levels[1 << BITS];
    double                 *nll;
    kvq_tails              *tails;
    kvq_histogram         **histograms;    // [2, n_kv_heads]: K and V
    kvq_distribution       *distributions; // [n_kv_heads]
    kvq_block_spec          specs[2];      // K, V
    attention_arrays        a;
    double                  started_s;
    bench_reference         reference;
    bench_series            times[N_TIMES], best; // seconds; FLOP/s of the reference beside each repeat
    int                     repeat;
} sweep;

static void start(sweep *s) { s->started_s = kvq_now_s(); }
static void stop(sweep *s, stage at) { s->times[at].values[s->repeat] += kvq_now_s() - s->started_s; }

// ---------------------------------------------------------------- counting, as the backward sweep does it

static kvq_status count_window(sweep *s, kvq_error *err) {
    int                    n_heads = s->config->n_kv_heads;
    const kvq_count_tensor tensors[] = {{"K", &s->specs[0], s->k, s->w_k, s->histograms},
                                        {"V", &s->specs[1], s->v, s->w_v, s->histograms + n_heads}};
    kvq_count_options      options = {.n_heads = n_heads, .n_skip = 1};
    kvq_kv_view            view = kvq_workspace_kv(s->ws);
    int64_t                n = s->S * s->d;
    start(s);
    s->be->download(s->be, s->k, view.k, n);
    s->be->download(s->be, s->v, view.v, n);
    s->be->download(s->be, s->w_k, view.dk, n);
    s->be->download(s->be, s->w_v, view.dv, n);
    kvq_fisher_diagonal(s->w_k, n, s->w_k);
    kvq_fisher_diagonal(s->w_v, n, s->w_v);
    kvq_status status = kvq_count_rows(s->ctx, tensors, 2, s->S, options, s->scratch, err);
    stop(s, COUNT);
    return status;
}

// ---------------------------------------------------------------- one layer

static kvq_status see_keys(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    sweep *s = user;
    (void)layer, (void)err;
    s->be->download(s->be, s->k, x->k, n_tokens * s->d);
    return KVQ_OK;
}

static kvq_status forward_layer(sweep *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    keep = kvq_tails_needed(OUTLIERS, KVQ_SCOPE_CHANNEL, s->d, s->n_windows * s->S);
    KVQ_TRY(kvq_tails_create(s->ctx, s->d, keep, &s->tails, err));
    for (int64_t i = 0; i < s->n_windows; i++) {
        float *y = s->y + i * s->S * s->C;
        s->be->copy(s->be, y, s->x + i * s->S * s->C, s->S * s->C);
        start(s);
        KVQ_TRY(kvq_layer_forward(s->model, s->layer, s->ws, s->S, y, see_keys, s, err));
        stop(s, FORWARD);
        start(s);
        KVQ_TRY(kvq_tails_push(s->ctx, s->tails, s->k, s->S, err));
        stop(s, THRESHOLDS);
    }
    start(s);
    KVQ_TRY(kvq_tails_thresholds(s->ctx, s->tails, OUTLIERS, KVQ_SCOPE_CHANNEL, s->z_and_r, s->z_and_r + s->d,
                                 err)); // lower, upper for now
    for (int64_t c = 0; c < s->d; c++) {
        float lower = s->z_and_r[c], upper = s->z_and_r[s->d + c];
        s->z_and_r[c] = kvq_range_middle(lower, upper);
        s->z_and_r[s->d + c] = kvq_range_half(lower, upper);
    }
    stop(s, THRESHOLDS);

done:
    kvq_tails_destroy(s->ctx, &s->tails);
    return status;
}

static kvq_status backward_layer(sweep *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < s->n_windows; i++) {
        s->be->copy(s->be, s->dx, s->random, s->S * s->C);
        start(s);
        KVQ_TRY(kvq_layer_backward(s->model, s->layer, s->ws, s->S, s->x + i * s->S * s->C, s->dx, err));
        stop(s, BACKWARD);
        KVQ_TRY(count_window(s, err));
    }

done:
    return status;
}

static kvq_status fit_layer(sweep *s, kvq_error *err) {
    kvq_status      status = KVQ_OK;
    int             n_heads = s->config->n_kv_heads;
    kvq_fit_options options = {.weighting = KVQ_WEIGHT_FISHER_SCALED};
    start(s);
    for (int i = 0; i < 2; i++) {
        kvq_fit_report fit;
        for (int h = 0; h < n_heads; h++)
            KVQ_TRY(kvq_distribution_take(s->histograms[i * n_heads + h], &s->distributions[h], err));
        KVQ_TRY(kvq_fit_table(s->ctx, s->distributions, n_heads, KVQ_NUQ, BITS, &options, s->levels, NULL, &fit, err));
    }
    for (int i = 0; i < 2 * n_heads; i++) kvq_histogram_clear(s->histograms[i]);
    stop(s, FIT);

done:
    return status;
}

static kvq_status run_layer(sweep *s, int64_t index, kvq_error *err) {
    kvq_status status = KVQ_OK;
    start(s);
    KVQ_TRY(kvq_layer_load(s->model, index, &s->layer, err));
    stop(s, LOAD);
    KVQ_TRY(forward_layer(s, err));
    KVQ_TRY(backward_layer(s, err));
    KVQ_TRY(fit_layer(s, err));
    float *finished = s->x;
    s->x = s->y;
    s->y = finished;

done:
    kvq_layer_release(s->model, &s->layer);
    return status;
}

// ---------------------------------------------------------------- one repeat

static kvq_status run_loss(sweep *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    start(s);
    KVQ_TRY(kvq_head_load(s->model, &s->head, err));
    stop(s, LOAD);
    for (int64_t i = 0; i < s->n_windows; i++) {
        start(s);
        KVQ_TRY(kvq_head_loss(s->model, s->head, s->ws, s->ids + i * s->S, s->S, s->x + i * s->S * s->C, s->dx, s->nll,
                              err));
        stop(s, LOSS);
    }

done:
    kvq_head_release(s->model, &s->head);
    return status;
}

static kvq_status run_repeat(sweep *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(bench_reference_rate(s->be, &s->reference, &s->best.values[s->repeat], err));
    for (int64_t i = 0; i < s->n_windows; i++) {
        start(s);
        KVQ_TRY(kvq_model_embed(s->model, s->ids + i * s->S, s->S, s->x + i * s->S * s->C, err));
        stop(s, EMBED);
    }
    for (int64_t l = 0; l < s->n_layers; l++) {
        KVQ_TRY(run_layer(s, l, err));
        kvq_report_progress(s->ctx, "sweep", l, s->repeat * s->n_layers + l + 1,
                            s->report->options->repeats * s->n_layers);
    }
    KVQ_TRY(run_loss(s, err));

done:
    return status;
}

// ---------------------------------------------------------------- attention alone

static kvq_attention_shape shape_of(const sweep *s, int64_t layer) {
    const kvq_model_config *c = s->config;
    kvq_attention_shape     shape = {.n_tokens = s->S,
                                     .n_heads = c->n_heads,
                                     .n_kv_heads = c->n_kv_heads,
                                     .head_dim = c->head_dim,
                                     .window = kvq_layer_window(c, layer),
                                     .scale = c->attention_scale,
                                     .softcap = c->attention_softcap};
    return shape;
}

static kvq_status make_attention(sweep *s, kvq_error *err) {
    int64_t n_q = s->S * s->config->n_heads * s->config->head_dim, n_kv = s->S * s->d, n_scratch = 0;
    for (int64_t l = 0; l < s->n_layers; l++) {
        kvq_attention_shape shape = shape_of(s, l);
        for (int backward = 0; backward < 2; backward++) {
            int64_t n = s->be->attention_scratch_floats(s->be, &shape, backward != 0);
            n_scratch = n > n_scratch ? n : n_scratch;
        }
    }
    const struct {
        float **array;
        int64_t n;
    } wanted[] = {{&s->a.q, n_q},  {&s->a.k, n_kv},  {&s->a.v, n_kv},  {&s->a.out, n_q},
                  {&s->a.dq, n_q}, {&s->a.dk, n_kv}, {&s->a.dv, n_kv}, {&s->a.scratch, n_scratch}};
    for (int i = 0; i < CLI_COUNT_OF(wanted); i++) {
        kvq_status status = s->be->alloc(s->be, wanted[i].n, "attention to be measured", wanted[i].array, err);
        if (status != KVQ_OK) return status;
    }
    bench_fill(s->a.q, n_q, 3);
    bench_fill(s->a.k, n_kv, 4);
    bench_fill(s->a.v, n_kv, 5);
    return KVQ_OK;
}

static void free_attention(sweep *s) {
    float *const arrays[] = {s->a.q, s->a.k, s->a.v, s->a.out, s->a.dq, s->a.dk, s->a.dv, s->a.scratch};
    for (int i = 0; i < CLI_COUNT_OF(arrays); i++) s->be->release(s->be, arrays[i]);
}

// q stands in for the gradient of the output.
static void run_attention(sweep *s) {
    const attention_arrays *a = &s->a;
    for (int64_t i = 0; i < s->n_layers * s->n_windows; i++) {
        kvq_attention_shape shape = shape_of(s, i / s->n_windows);
        start(s);
        s->be->attention(s->be, &shape, a->q, a->k, a->v, NULL, NULL, a->out, a->scratch);
        stop(s, ATTENTION_FORWARD);
        start(s);
        s->be->attention_backward(s->be, &shape, a->q, a->k, a->v, a->out, a->q, a->dq, a->dk, a->dv, a->scratch);
        stop(s, ATTENTION_BACKWARD);
    }
}

// ---------------------------------------------------------------- report

// Operations of products that the definition asks for; softmax, norms and what a kernel does in vain are left out.
static void count_flops(const sweep *s, double flops[N_TIMES]) {
    const kvq_model_config *c = s->config;
    double S = (double)s->S, windows = (double)s->n_windows, product = 0; // of q with k, or of p with v, all layers
    for (int64_t l = 0; l < s->n_layers; l++) {
        double seen = (double)kvq_layer_window(c, l);
        double pairs = seen > 0 && seen < S ? seen * (seen + 1) / 2 + (S - seen) * seen : S * (S + 1) / 2;
        product += 2 * pairs * c->n_heads * c->head_dim * windows;
    }
    double linear = 2 * S * (double)kvq_layer_products(c) * (double)s->n_layers * windows;
    for (int i = 0; i < N_TIMES; i++) flops[i] = 0;
    flops[ATTENTION_FORWARD] = 2 * product;
    flops[ATTENTION_BACKWARD] = 5 * product; // scores again, and one each for dP, dV, dQ, dK
    flops[FORWARD] = linear + 2 * product;
    flops[BACKWARD] = 2 * linear + 7 * product; // a forward pass comes first
    flops[LOSS] = 4 * (S - 1) * (double)c->vocab_size * (double)s->C * windows;
}

static kvq_status add_rates(sweep *s, const bench_series *seconds, double flops, const char *name, kvq_error *err) {
    bench_series rate = bench_inverse(seconds, flops * 1e-9), fraction = bench_ratio(&rate, &s->best, 1e9);
    kvq_status   status = bench_add(s->report, &rate, "GFLOP/s", err, "%s", name);
    return status == KVQ_OK ? bench_add(s->report, &fraction, "of best", err, "%s", name) : status;
}

static kvq_status report_stages(sweep *s, double peak_bytes, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    double       flops[N_TIMES], all_flops = 0;
    bench_series total = {.n = s->times[0].n}, best = bench_scaled(&s->best, 1e-9);
    count_flops(s, flops);
    for (int i = 0; i < N_STAGES; i++) {
        all_flops += flops[i];
        for (int r = 0; r < total.n; r++) total.values[r] += s->times[i].values[r];
    }
    for (int i = 0; i < N_TIMES; i++) {
        bench_series share = bench_ratio(&s->times[i], &total, 1);
        KVQ_TRY(bench_add(s->report, &s->times[i], "s", err, "%s", STAGE_NAMES[i]));
        KVQ_TRY(bench_add(s->report, &share, "of total", err, "%s", STAGE_NAMES[i]));
        if (flops[i] > 0) KVQ_TRY(add_rates(s, &s->times[i], flops[i], STAGE_NAMES[i], err));
    }
    KVQ_TRY(bench_add(s->report, &total, "s", err, "total"));
    KVQ_TRY(add_rates(s, &total, all_flops, "total", err));
    KVQ_TRY(bench_add(s->report, &best, "GFLOP/s", err, "best product of this machine, %s",
                      kvq_compute_names[s->report->options->engine.compute]));
    bench_series peak = {.values = {peak_bytes / 0x1p20}, .n = 1};
    if (peak_bytes >= 0) KVQ_TRY(bench_add(s->report, &peak, "MiB", err, "peak memory of the process until then"));

done:
    return status;
}

// ---------------------------------------------------------------- the case

static kvq_status open_model(sweep *s, kvq_error *err) {
    const bench_options *o = s->report->options;
    kvq_status           status = KVQ_OK;
    KVQ_TRY(kvq_checkpoint_open(s->ctx, o->model, &s->checkpoint, err));
    s->config = kvq_checkpoint_config(s->checkpoint);
    s->report->cli->n_layers = s->config->n_layers;
    KVQ_TRY(kvq_cli_seq_len(s->report->cli, s->config, o->seq_len, USUAL_SEQ_LEN, &s->S, err));
    KVQ_TRY(kvq_backend_cpu(s->ctx, (kvq_compute)o->engine.compute, &s->be, err));
    KVQ_TRY(kvq_model_create(s->ctx, s->be, s->checkpoint, false, &s->model, err));
    KVQ_TRY(kvq_workspace_create(s->model, s->S, true, &s->ws, err));
    s->n_windows = o->windows;
    s->n_layers = o->layers > 0 && o->layers < s->config->n_layers ? o->layers : s->config->n_layers;
    s->C = s->config->hidden_size;
    s->d = (int64_t)s->config->n_kv_heads * s->config->head_dim;

done:
    return status;
}

static kvq_status make_buffers(sweep *s, kvq_error *err) {
    kvq_status         status = KVQ_OK;
    const kvq_context *ctx = s->ctx;
    int64_t            n_ids = s->n_windows * s->S, n_x = s->S * s->C, n_kv = s->S * s->d;
    KVQ_TRY(KVQ_NEW(ctx, n_ids, "token ids", &s->ids, err));
    for (int64_t i = 0; i < n_ids; i++)
        s->ids[i] = (int32_t)kvq_rng_below(0, KVQ_RNG_BENCH, 0, (uint64_t)i, (uint64_t)s->config->vocab_size);
    KVQ_TRY(s->be->alloc(s->be, s->n_windows * n_x, "hidden states", &s->x, err));
    KVQ_TRY(s->be->alloc(s->be, s->n_windows * n_x, "hidden states", &s->y, err));
    KVQ_TRY(s->be->alloc(s->be, n_x, "gradients", &s->dx, err));
    KVQ_TRY(s->be->alloc(s->be, n_x, "gradients", &s->random, err));
    bench_fill(s->random, n_x, 6);
    for (int64_t i = 0; i < n_x; i++)
        s->random[i] *= 1e-6f; // small as gradients of a mean are: sums of squares must fit
    KVQ_TRY(KVQ_NEW(ctx, n_kv, "keys", &s->k, err));
    KVQ_TRY(KVQ_NEW(ctx, n_kv, "values", &s->v, err));
    KVQ_TRY(KVQ_NEW(ctx, n_kv, "weights of keys", &s->w_k, err));
    KVQ_TRY(KVQ_NEW(ctx, n_kv, "weights of values", &s->w_v, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * s->d, "thresholds", &s->z_and_r, err));
    KVQ_TRY(KVQ_NEW(ctx, s->S, "losses", &s->nll, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * kvq_count_scratch_floats(s->S, s->d), "normalised elements", &s->scratch, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * s->config->n_kv_heads, "histograms", &s->histograms, err));
    for (int i = 0; i < 2 * s->config->n_kv_heads; i++)
        KVQ_TRY(kvq_histogram_create(ctx, WEIGHTINGS, &s->histograms[i], err));
    KVQ_TRY(kvq_distributions_create(ctx, WEIGHTINGS, s->config->n_kv_heads, &s->distributions, err));
    for (int i = 0; i < 2; i++) {
        kvq_block_spec spec = {.d = (int)s->d, .bits = BITS, .n_side = kvq_block_n_side(OUTLIERS, (int)s->d)};
        s->specs[i] = spec;
    }
    s->specs[0].z = s->z_and_r;
    s->specs[0].r = s->z_and_r + s->d;

done:
    return status;
}

static void free_sweep(sweep *s) {
    for (int i = 0; s->histograms != NULL && i < 2 * s->config->n_kv_heads; i++)
        kvq_histogram_destroy(s->ctx, &s->histograms[i]);
    kvq_distributions_free(s->ctx, &s->distributions);
    void *const host[] = {s->histograms, s->scratch, s->ids, s->k, s->v, s->w_k, s->w_v, s->z_and_r, s->nll};
    for (int i = 0; i < CLI_COUNT_OF(host); i++) kvq_free(s->ctx, host[i]);
    if (s->be != NULL) {
        float *const arrays[] = {s->x, s->y, s->dx, s->random};
        for (int i = 0; i < CLI_COUNT_OF(arrays); i++) s->be->release(s->be, arrays[i]);
        free_attention(s);
    }
    if (s->model != NULL) kvq_workspace_destroy(s->model, &s->ws);
    kvq_model_destroy(s->ctx, &s->model);
    if (s->be != NULL) s->be->destroy(&s->be);
    kvq_checkpoint_close(s->ctx, &s->checkpoint);
}

kvq_status bench_sweep(bench_report *r, kvq_error *err) {
    kvq_status status = KVQ_OK;
    sweep     *s = NULL;
    KVQ_TRY(KVQ_NEW(&r->cli->ctx, 1, "benchmark", &s, err));
    s->report = r;
    s->ctx = &r->cli->ctx;
    for (int i = 0; i < N_TIMES; i++) s->times[i].n = (int)r->options->repeats;
    s->best.n = (int)r->options->repeats;
    KVQ_TRY(open_model(s, err));
    KVQ_TRY(bench_reference_find(r, s->be, &s->reference, err));
    KVQ_TRY(make_buffers(s, err));
    for (s->repeat = 0; s->repeat < r->options->repeats; s->repeat++) KVQ_TRY(run_repeat(s, err));
    double peak = (double)kvq_peak_memory();
    KVQ_TRY(make_attention(s, err));
    for (s->repeat = 0; s->repeat < r->options->repeats; s->repeat++) run_attention(s);
    KVQ_TRY(report_stages(s, peak, err));

done:
    if (s != NULL) free_sweep(s);
    kvq_free(&r->cli->ctx, s);
    return status;
}
