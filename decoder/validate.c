// SPDX-License-Identifier: Apache-2.0
//
// Two passes over the same windows, side by side: full precision, and every K and V through the packed cache. Windows
// go through the model in groups, layer by layer, so that each layer's weights are expanded once per group, and nothing
// of vocabulary size is kept.
#include <math.h>
#include <string.h>

#include "decoder_impl.h"

typedef struct run {
    const kvq_context      *ctx;
    const kvq_backend      *be;
    kvq_model              *model;
    const kvq_model_config *config;
    const kvq_artifact     *artifact; // or NULL
    const kvq_windows      *windows;
    kvq_validation         *result;
    kvq_workspace          *ws;
    kvq_packed_layer       *cache;
    float                  *recent[2]; // [S, d] K, V in f16; NULL without a recent window
    float                  *states[2]; // [group, S, C] baseline, quantised
    double                 *nll;       // [S - 1]
    kvq_position_score     *scores;    // [S - 1]
    range_watch            *watch;     // or NULL
    int64_t                 window;    // the one that passes
    int64_t                 group, state_floats;
} run;

// The protocol itself: what attention sees is what the cache gives back, for every token of the window.
static kvq_status through_the_cache(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    run       *r = user;
    kvq_status status = KVQ_OK;
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, x->k);
    if (r->watch != NULL)
        range_watch_see(r->watch, r->be, layer, r->window, r->windows->ids + r->window * n_tokens, x->k, n_tokens);
    KVQ_TRY(kvq_packed_layer_prefill(r->be, r->cache, n_tokens, x->k, x->v, r->recent[0], r->recent[1], err));
    x->k_recent = r->recent[0];
    x->v_recent = r->recent[1];
    x->recent = r->artifact->quantizer.recent_tokens;
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_BACK, n_tokens, x->k);
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_BACK, n_tokens, r->recent[0]);

done:
    return status;
}

static kvq_status name_window(kvq_status status, int64_t window, kvq_error *err) {
    if (status != KVQ_OK) kvq_error_prefix(err, "window %lld: ", (long long)window);
    return status;
}

static kvq_status run_layer(run *r, int64_t l, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len, n_steps = r->config->n_layers * r->windows->n_windows;
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_layer_load(r->model, l, &layer, err));
    if (r->artifact != NULL) KVQ_TRY(kvq_packed_layer_create(r->ctx, r->artifact, l, S, &r->cache, err));
    for (int64_t i = 0; i < n; i++) {
        float *baseline = r->states[0] + i * r->state_floats;
        KVQ_TRY(name_window(kvq_layer_forward(r->model, layer, r->ws, S, baseline, NULL, NULL, err), first + i, err));
        if (r->artifact != NULL) {
            float *quantized = r->states[1] + i * r->state_floats;
            r->window = first + i;
            KVQ_TRY(name_window(kvq_layer_forward(r->model, layer, r->ws, S, quantized, through_the_cache, r, err),
                                first + i, err));
        }
        kvq_report_progress(r->ctx, "score", l, first * r->config->n_layers + l * n + i + 1, n_steps);
    }

done:
    kvq_packed_layer_destroy(r->ctx, &r->cache);
    kvq_layer_release(r->model, &layer);
    return status;
}

static void keep_scores(run *r, int64_t window) {
    kvq_validation *v = r->result;
    int64_t         n = r->windows->seq_len - 1;
    double          nll_a = 0, nll_b = 0, kl = 0, same = 0;
    for (int64_t t = 0; t < n; t++) {
        nll_a += r->scores[t].nll_a;
        nll_b += r->scores[t].nll_b;
        kl += r->scores[t].kl;
        same += r->scores[t].top_a == r->scores[t].top_b ? 1 : 0;
    }
    v->window_baseline_nll[window] = nll_a / (double)n;
    v->window_quantized_nll[window] = nll_b / (double)n;
    v->window_kld[window] = kl / (double)n;
    v->window_top1[window] = same / (double)n;
}

static kvq_status score_group(run *r, const kvq_head *head, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len;
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < n && status == KVQ_OK; i++) {
        const int32_t *ids = r->windows->ids + (first + i) * S;
        const float   *a = r->states[0] + i * r->state_floats, *b = r->states[1] + i * r->state_floats;
        if (r->artifact != NULL) {
            status = kvq_head_compare(r->model, head, r->ws, ids, S, a, b, r->scores, err);
            if (status == KVQ_OK) keep_scores(r, first + i);
        } else {
            double sum = 0;
            status = kvq_head_loss(r->model, head, r->ws, ids, S, a, NULL, r->nll, err);
            for (int64_t t = 0; t < S - 1; t++) sum += r->nll[t];
            r->result->window_baseline_nll[first + i] = sum / (double)(S - 1);
        }
        status = name_window(status, first + i, err);
    }
    return status;
}

static kvq_status run_group(run *r, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len;
    kvq_head  *head = NULL;
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < n; i++) {
        float *x = r->states[0] + i * r->state_floats;
        KVQ_TRY(name_window(kvq_model_embed(r->model, r->windows->ids + (first + i) * S, S, x, err), first + i, err));
        if (r->artifact != NULL) r->be->copy(r->be, r->states[1] + i * r->state_floats, x, r->state_floats);
    }
    for (int64_t l = 0; l < r->config->n_layers; l++) KVQ_TRY(run_layer(r, l, first, n, err));
    KVQ_TRY(kvq_head_load(r->model, &head, err));
    KVQ_TRY(score_group(r, head, first, n, err));

done:
    kvq_head_release(r->model, &head);
    return status;
}

// ---------------------------------------------------------------- summary

static kvq_status summarise(run *r, kvq_error *err) {
    kvq_validation *v = r->result;
    int64_t         n = v->n_windows;
    double         *difference = NULL;
    v->baseline_nll = kvq_mean_of(v->window_baseline_nll, n);
    v->baseline_ppl = exp(v->baseline_nll.mean);
    if (r->artifact == NULL) return KVQ_OK;
    kvq_status status = KVQ_NEW(r->ctx, n, "differences", &difference, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < n; i++) difference[i] = v->window_quantized_nll[i] - v->window_baseline_nll[i];
    v->quantized_nll = kvq_mean_of(v->window_quantized_nll, n);
    v->quantized_ppl = exp(v->quantized_nll.mean);
    v->difference_nll = kvq_mean_of(difference, n);
    v->dppl.mean = expm1(v->difference_nll.mean);
    v->dppl.stderr_ = exp(v->difference_nll.mean) * v->difference_nll.stderr_;
    v->kld = kvq_mean_of(v->window_kld, n);
    v->top1 = kvq_mean_of(v->window_top1, n);
    v->size = kvq_artifact_cache_size(r->artifact, v->seq_len);
    v->effective_bits = kvq_cache_bits_per_element(v->size, v->n_windows);
    v->has_range = r->watch != NULL;
    if (v->has_range) v->range = range_watch_report(r->watch);
    kvq_free(r->ctx, difference);
    return KVQ_OK;
}

static kvq_status allocate(run *r, kvq_error *err) {
    int64_t    S = r->windows->seq_len, N = r->windows->n_windows, n_states = r->artifact != NULL ? 2 : 1;
    kvq_status status = KVQ_OK;
    r->state_floats = S * r->config->hidden_size;
    r->group = kvq_group_size(n_states * r->state_floats, N);
    for (int i = 0; i < n_states; i++)
        KVQ_TRY(r->be->alloc(r->be, r->group * r->state_floats, "hidden states", &r->states[i], err));
    for (int i = 0; i < 2 && r->artifact != NULL && r->artifact->quantizer.recent_tokens > 0; i++)
        KVQ_TRY(r->be->alloc(r->be, S * r->config->n_kv_heads * r->config->head_dim, "recent keys and values",
                             &r->recent[i], err));
    KVQ_TRY(kvq_workspace_create(r->model, S, false, &r->ws, err));
    KVQ_TRY(KVQ_NEW(r->ctx, S - 1, "losses", &r->nll, err));
    KVQ_TRY(KVQ_NEW(r->ctx, S - 1, "scores", &r->scores, err));
    double **per_window[] = {&r->result->window_baseline_nll, &r->result->window_quantized_nll, &r->result->window_kld,
                             &r->result->window_top1};
    for (int i = 0; i < 4; i++) KVQ_TRY(KVQ_NEW(r->ctx, N, "window results", per_window[i], err));

done:
    return status;
}

void kvq_validation_free(const kvq_context *ctx, kvq_validation *v) {
    kvq_free(ctx, v->window_baseline_nll);
    kvq_free(ctx, v->window_quantized_nll);
    kvq_free(ctx, v->window_kld);
    kvq_free(ctx, v->window_top1);
    memset(v, 0, sizeof *v);
}

kvq_status kvq_validate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_artifact *artifact,
                        const kvq_windows *windows, kvq_validation *out, kvq_error *err) {
    const kvq_model_config *config = kvq_model_describe(model);
    kvq_validation          result = {
                 .has_artifact = artifact != NULL, .n_windows = windows->n_windows, .seq_len = windows->seq_len};
    run        r = {.ctx = ctx,
                    .be = be,
                    .model = model,
                    .config = config,
                    .artifact = artifact,
                    .windows = windows,
                    .result = &result};
    kvq_status status = KVQ_OK;
    if (windows->n_windows < 1 || windows->seq_len < 2) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INPUT, "give a longer text", "%s: no token can be scored", windows->source));
    }
    if (artifact != NULL) KVQ_TRY(kvq_artifact_matches(artifact, config, NULL, err));
    result.tokens_scored = windows->n_windows * (windows->seq_len - 1);
    KVQ_TRY(allocate(&r, err));
    if (artifact != NULL) KVQ_TRY(range_watch_create(ctx, artifact, config->vocab_size, windows, &r.watch, err));
    for (int64_t first = 0; first < windows->n_windows; first += r.group) {
        int64_t left = windows->n_windows - first;
        KVQ_TRY(run_group(&r, first, left < r.group ? left : r.group, err));
    }
    KVQ_TRY(summarise(&r, err));
    *out = result;
    memset(&result, 0, sizeof result);

done:
    range_watch_destroy(ctx, &r.watch);
    kvq_workspace_destroy(model, &r.ws);
    for (int i = 0; i < 2; i++) {
        be->release(be, r.states[i]);
        be->release(be, r.recent[i]);
    }
    kvq_free(ctx, r.nll);
    kvq_free(ctx, r.scores);
    kvq_validation_free(ctx, &result);
    return status;
}

// ---------------------------------------------------------------- belonging together

// What an artifact does not know (0 or "", from a capture that somebody else wrote) cannot differ.
static kvq_status compare_size(const char *what, int64_t artifact, int64_t model, kvq_error *err) {
    if (artifact == model || artifact == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_MISMATCH, NULL, "%s: the artifact was made for a model with %lld, this one has %lld",
                    what, (long long)artifact, (long long)model);
}

kvq_status kvq_artifact_matches(const kvq_artifact *artifact, const kvq_model_config *c,
                                const kvq_checkpoint_identity *identity, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (artifact->model.architecture[0] != 0 && strcmp(artifact->model.architecture, c->architecture) != 0) {
        return kvq_fail(err, KVQ_ERR_MISMATCH, NULL, "architecture: the artifact was made for '%s', this model is '%s'",
                        artifact->model.architecture, c->architecture);
    }
    KVQ_TRY(compare_size("layers", artifact->model.n_layers, c->n_layers, err));
    KVQ_TRY(compare_size("hidden_size", artifact->model.hidden_size, c->hidden_size, err));
    KVQ_TRY(compare_size("query heads", artifact->model.n_heads, c->n_heads, err));
    KVQ_TRY(compare_size("KV heads", artifact->model.n_kv_heads, c->n_kv_heads, err));
    KVQ_TRY(compare_size("head_dim", artifact->model.head_dim, c->head_dim, err));
    KVQ_TRY(compare_size("vocabulary", artifact->model.vocab_size, c->vocab_size, err));
    if (identity != NULL && strcmp(artifact->model.weights_sha256, identity->weights_sha256) != 0) {
        status = kvq_fail(
            err, KVQ_ERR_MISMATCH,
            "use the checkpoint the artifact was made from (kvq-validate --allow-other-weights measures all the same)",
            "weights: the artifact was made for '%s' (sha256 %.12s), '%s' has %.12s", artifact->model.name,
            artifact->model.weights_sha256, identity->name, identity->weights_sha256);
    }

done:
    return status;
}
