// SPDX-License-Identifier: Apache-2.0
//
// Passes over the same windows, side by side: full precision, every K and V through the packed cache, and on some
// windows full precision with noise. Windows go through the model in groups, layer by layer, so that each layer's
// weights are expanded once per group, and nothing of vocabulary size is kept.
#include <math.h>
#include <string.h>

#include "kvq_hd.h"
#include "layer_errors.h"
#include "scores.h"

const char *const kvq_protocol_names[] = {"prefill", "decode", NULL};

enum { BASELINE, QUANTIZED, NOISE, N_PASSES };

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
    float                  *recent[2];        // [S, d] K, V in f16; NULL where no query sees them
    float                  *states[N_PASSES]; // [slots, S, C]; NULL when there is no such pass
    float                  *host_state;       // [S, C] of the noise pass
    double                 *nll;              // [n_scored]
    kvq_position_score     *positions;        // [n_scored]
    scores                  scores;
    range_watch            *watch;  // or NULL
    layer_errors           *errors; // or NULL
    int64_t                 window; // the one that passes
    int64_t                 group, state_floats, first_scored;
} run;

static bool   decodes(const run *r) { return r->result->options.protocol == KVQ_PROTOCOL_DECODE; }
static float *state_of(const run *r, int pass, int64_t slot) { return r->states[pass] + slot * r->state_floats; }

// ---------------------------------------------------------------- what queries see

// The protocol itself. That all tokens of a window pass at once changes nothing: see kvq_packed_layer_prefill.
static kvq_status through_the_cache(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    run       *r = user;
    kvq_status status = KVQ_OK;
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_FORWARD, n_tokens, x->k);
    if (r->watch != NULL)
        range_watch_see(r->watch, r->be, layer, r->window, r->windows->ids + r->window * n_tokens, x->k, n_tokens);
    KVQ_TRY(kvq_packed_layer_prefill(r->be, r->cache, n_tokens, x->k, x->v, r->recent[0], r->recent[1], err));
    x->k_recent = r->recent[0];
    x->v_recent = r->recent[1];
    x->second.recent = r->artifact->quantizer.recent_tokens;
    if (decodes(r)) {
        x->second.prompt = r->result->options.n_prompt;
        x->second.tile = kvq_artifact_is_allocated(r->artifact) ? KVQ_TILE_TOKENS : 0;
    }
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_BACK, n_tokens, x->k);
    kvq_rotate_stored_keys(r->artifact, r->model, r->ws, layer, KVQ_ROTATE_BACK, n_tokens, r->recent[0]);

done:
    return status;
}

// Noise as large as that of a model that keeps its hidden states in bf16.
static void round_state(run *r, float *x) {
    r->be->download(r->be, r->host_state, x, r->state_floats);
    for (int64_t i = 0; i < r->state_floats; i++)
        r->host_state[i] = kvq_float_of_bf16(kvq_bf16_of_float(r->host_state[i]));
    r->be->upload(r->be, x, r->host_state, r->state_floats);
}

// ---------------------------------------------------------------- windows

static bool is_noisy(const run *r, int64_t window) {
    return r->states[NOISE] != NULL && window < r->result->options.noise_windows;
}

static kvq_status run_window(run *r, const kvq_layer *layer, int64_t slot, kvq_error *err) {
    int64_t      S = r->windows->seq_len;
    kvq_status   status = KVQ_OK;
    bool         watched = r->errors != NULL && r->window < r->result->options.layer_windows;
    kvq_qkv_hook watch = watched ? layer_errors_see : NULL;
    if (watched) layer_errors_window(r->errors, r->window);
    KVQ_TRY(kvq_layer_forward(r->model, layer, r->ws, S, state_of(r, BASELINE, slot), watch, r->errors, err));
    if (r->artifact != NULL)
        KVQ_TRY(kvq_layer_forward(r->model, layer, r->ws, S, state_of(r, QUANTIZED, slot), through_the_cache, r, err));
    if (is_noisy(r, r->window)) {
        KVQ_TRY(kvq_layer_forward(r->model, layer, r->ws, S, state_of(r, NOISE, slot), NULL, NULL, err));
        round_state(r, state_of(r, NOISE, slot));
    }

done:
    if (status != KVQ_OK) kvq_error_prefix(err, "window %lld: ", (long long)r->window);
    return status;
}

static kvq_status run_layer(run *r, int64_t l, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len, n_steps = r->config->n_layers * r->windows->n_windows;
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_layer_load(r->model, l, &layer, err));
    if (r->artifact != NULL) KVQ_TRY(kvq_packed_layer_create(r->ctx, r->artifact, l, S, &r->cache, err));
    if (r->errors != NULL) KVQ_TRY(layer_errors_open(r->errors, l, err));
    for (int64_t i = 0; i < n; i++) {
        r->window = first + i;
        KVQ_TRY(run_window(r, layer, i, err));
        kvq_report_progress(r->ctx, "score", l, first * r->config->n_layers + l * n + i + 1, n_steps);
    }

done:
    kvq_packed_layer_destroy(r->ctx, &r->cache);
    if (r->errors != NULL) layer_errors_close(r->errors);
    kvq_layer_release(r->model, &layer);
    return status;
}

static kvq_status compare(run *r, const kvq_head *head, int pass, int64_t slot, kvq_error *err) {
    int64_t first = r->first_scored, S = r->windows->seq_len, at = first * r->config->hidden_size;
    return kvq_head_compare(r->model, head, r->ws, r->windows->ids + r->window * S + first, S - first,
                            state_of(r, BASELINE, slot) + at, state_of(r, pass, slot) + at, r->positions, err);
}

static void keep_positions(run *r) {
    const kvq_validation *v = r->result;
    const int32_t        *next = r->windows->ids + r->window * v->seq_len + r->first_scored + 1;
    for (int64_t t = 0; t < v->n_scored; t++) {
        const kvq_position_score *p = &r->positions[t];
        v->position_kld[r->window * v->n_scored + t] = (float)p->kl;
        v->position_hits[r->window * v->n_scored + t] =
            (uint8_t)((p->top_a == next[t] ? KVQ_BASELINE_HIT : 0) | (p->top_b == next[t] ? KVQ_QUANTIZED_HIT : 0));
    }
}

static kvq_status score_window(run *r, const kvq_head *head, int64_t slot, kvq_error *err) {
    int64_t        S = r->windows->seq_len;
    const int32_t *ids = r->windows->ids + r->window * S;
    kvq_status     status = KVQ_OK;
    if (r->artifact == NULL) {
        KVQ_TRY(kvq_head_loss(r->model, head, r->ws, ids, S, state_of(r, BASELINE, slot), NULL, r->nll, err));
        scores_add_baseline(&r->scores, r->window, r->nll);
        return KVQ_OK;
    }
    KVQ_TRY(compare(r, head, QUANTIZED, slot, err));
    keep_positions(r);
    scores_add(&r->scores, r->window, r->first_scored, r->positions);
    if (is_noisy(r, r->window)) {
        KVQ_TRY(compare(r, head, NOISE, slot, err));
        scores_add_noise(&r->scores, r->window, r->positions);
    }

done:
    if (status != KVQ_OK) kvq_error_prefix(err, "window %lld: ", (long long)r->window);
    return status;
}

static kvq_status run_group(run *r, int64_t first, int64_t n, kvq_error *err) {
    int64_t    S = r->windows->seq_len;
    kvq_head  *head = NULL;
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < n; i++) {
        float *x = state_of(r, BASELINE, i);
        KVQ_TRY(kvq_model_embed(r->model, r->windows->ids + (first + i) * S, S, x, err));
        if (r->artifact != NULL) r->be->copy(r->be, state_of(r, QUANTIZED, i), x, r->state_floats);
        if (is_noisy(r, first + i)) r->be->copy(r->be, state_of(r, NOISE, i), x, r->state_floats);
    }
    for (int64_t l = 0; l < r->config->n_layers; l++) KVQ_TRY(run_layer(r, l, first, n, err));
    KVQ_TRY(kvq_head_load(r->model, &head, err));
    for (int64_t i = 0; i < n; i++) {
        r->window = first + i;
        KVQ_TRY(score_window(r, head, i, err));
    }

done:
    kvq_head_release(r->model, &head);
    return status;
}

// ---------------------------------------------------------------- the whole

static kvq_status summarise(run *r, kvq_error *err) {
    kvq_validation *v = r->result;
    kvq_status      status = scores_summarise(r->ctx, &r->scores, v, err);
    if (status != KVQ_OK || r->artifact == NULL) return status;
    for (int64_t l = 0; l < v->n_layers && r->errors != NULL; l++) v->layers[l] = layer_errors_report(r->errors, l);
    v->size = kvq_artifact_cache_size(r->artifact, v->seq_len);
    v->effective_bits = kvq_cache_bits_per_element(v->size, v->n_windows);
    v->has_range = r->watch != NULL;
    if (v->has_range) v->range = range_watch_report(r->watch);
    return KVQ_OK;
}

// What the passes with an artifact need beside the two rows of states.
static kvq_status allocate_for_artifact(run *r, kvq_error *err) {
    const kvq_backend          *be = r->be;
    kvq_validation             *v = r->result;
    const kvq_validate_options *o = &v->options;
    int64_t                     S = v->seq_len, d = (int64_t)r->config->n_kv_heads * r->config->head_dim;
    kvq_status                  status = KVQ_OK;
    for (int i = 0; i < 2 && (decodes(r) || r->artifact->quantizer.recent_tokens > 0); i++)
        KVQ_TRY(be->alloc(be, S * d, "recent keys and values", &r->recent[i], err));
    if (o->noise_windows > 0) {
        int64_t slots = o->noise_windows < r->group ? o->noise_windows : r->group;
        KVQ_TRY(be->alloc(be, slots * r->state_floats, "hidden states", &r->states[NOISE], err));
        KVQ_TRY(KVQ_NEW(r->ctx, r->state_floats, "a hidden state", &r->host_state, err));
    }
    if (o->layer_windows > 0) {
        v->n_layers = r->config->n_layers;
        KVQ_TRY(KVQ_NEW(r->ctx, v->n_layers, "errors of layers", &v->layers, err));
        KVQ_TRY(layer_errors_create(r->ctx, be, r->model, r->artifact, r->ws, S, o->layer_windows, &r->errors, err));
    }
    KVQ_TRY(KVQ_NEW(r->ctx, v->tokens_scored, "KL of positions", &v->position_kld, err));
    KVQ_TRY(KVQ_NEW(r->ctx, v->tokens_scored, "hits of positions", &v->position_hits, err));
    KVQ_TRY(range_watch_create(r->ctx, r->artifact, r->config->vocab_size, r->windows, &r->watch, err));

done:
    return status;
}

static kvq_status allocate(run *r, kvq_error *err) {
    kvq_validation *v = r->result;
    int64_t         S = v->seq_len, N = v->n_windows, n_states = r->artifact != NULL ? 2 : 1;
    kvq_status      status = KVQ_OK;
    r->state_floats = S * r->config->hidden_size;
    r->group = kvq_group_size(n_states * r->state_floats, N);
    for (int i = 0; i < n_states; i++)
        KVQ_TRY(r->be->alloc(r->be, r->group * r->state_floats, "hidden states", &r->states[i], err));
    KVQ_TRY(kvq_workspace_create(r->model, S, false, &r->ws, err));
    KVQ_TRY(KVQ_NEW(r->ctx, v->n_scored, "losses", &r->nll, err));
    KVQ_TRY(KVQ_NEW(r->ctx, v->n_scored, "scores", &r->positions, err));
    KVQ_TRY(scores_create(r->ctx, N, v->n_scored, &r->scores, err));
    r->scores.n_best = r->config->vocab_size < 5 ? (int)r->config->vocab_size : 5;
    double **per_window[] = {&v->window_baseline_nll, &v->window_quantized_nll, &v->window_kld, &v->window_top1};
    for (int i = 0; i < 4; i++) KVQ_TRY(KVQ_NEW(r->ctx, N, "window results", per_window[i], err));
    if (r->artifact != NULL) KVQ_TRY(allocate_for_artifact(r, err));

done:
    return status;
}

static void release(run *r) {
    range_watch_destroy(r->ctx, &r->watch);
    layer_errors_destroy(r->ctx, &r->errors);
    kvq_workspace_destroy(r->model, &r->ws);
    for (int i = 0; i < N_PASSES; i++) r->be->release(r->be, r->states[i]);
    for (int i = 0; i < 2; i++) r->be->release(r->be, r->recent[i]);
    scores_free(r->ctx, &r->scores);
    kvq_free(r->ctx, r->host_state);
    kvq_free(r->ctx, r->nll);
    kvq_free(r->ctx, r->positions);
}

void kvq_validation_free(const kvq_context *ctx, kvq_validation *v) {
    kvq_free(ctx, v->window_baseline_nll);
    kvq_free(ctx, v->window_quantized_nll);
    kvq_free(ctx, v->window_kld);
    kvq_free(ctx, v->window_top1);
    kvq_free(ctx, v->position_kld);
    kvq_free(ctx, v->position_hits);
    kvq_free(ctx, v->layers);
    memset(v, 0, sizeof *v);
}

// The baseline alone has no protocol and no passes beside it; counts of windows end at those that there are.
static kvq_validate_options options_for(const kvq_validate_options *wanted, bool has_artifact, int64_t n_windows) {
    kvq_validate_options o = {.protocol = KVQ_PROTOCOL_PREFILL};
    if (!has_artifact || wanted == NULL) return o;
    o = *wanted;
    if (o.protocol == KVQ_PROTOCOL_PREFILL) o.n_prompt = 0;
    if (o.layer_windows > n_windows) o.layer_windows = n_windows;
    if (o.noise_windows > n_windows) o.noise_windows = n_windows;
    return o;
}

// Code and data of the libraries and buffers of the matrix library, measured as what is left of a peak.
#define PROGRAM_BYTES      ((int64_t)60 << 20)
#define WATCHED_ATTENTIONS 4 // of layer_errors.c: exact, and three of what is quantised

kvq_validate_cost kvq_validate_plan(const kvq_model *model, bool has_artifact, int64_t n_windows, int64_t seq_len,
                                    const kvq_validate_options *options) {
    const kvq_model_config *c = kvq_model_describe(model);
    kvq_validate_options    o = options_for(options, has_artifact, n_windows);
    int64_t                 S = seq_len, state = S * c->hidden_size, d = (int64_t)c->n_kv_heads * c->head_dim;
    int64_t n_states = has_artifact ? 2 : 1, group = kvq_group_size(n_states * state, n_windows), n_scored = S - 1;
    int64_t layer = kvq_layer_floats(model), head = kvq_head_floats(model);
    int64_t floats = (layer > head ? layer : head) + kvq_workspace_floats(model, S, false) + n_states * group * state;
    double  passes = (double)(n_states * n_windows + o.noise_windows), scored = (double)(n_scored - o.n_prompt);
    double  compared = has_artifact ? 2 * (double)(n_windows + o.noise_windows) : (double)n_windows;
    if (has_artifact) floats += 3 * S * d; // K and V in f16 as floats, and coded
    if (o.layer_windows > 0) floats += layer_errors_floats(c, S);
    if (o.noise_windows > 0) floats += ((o.noise_windows < group ? o.noise_windows : group) + 1) * state;
    double layers = passes * (double)S * kvq_layer_flops(c, S) +
                    WATCHED_ATTENTIONS * (double)(o.layer_windows * S) * kvq_attention_flops(c, S);
    double flops =
        (double)c->n_layers * layers + 2 * compared * scored * (double)c->vocab_size * (double)c->hidden_size;
    return (kvq_validate_cost){.bytes = (int64_t)sizeof(float) * floats + kvq_model_mapped_bytes(model) + PROGRAM_BYTES,
                               .tera_flops = flops * 1e-12};
}

static kvq_status check_tokens(const kvq_validation *v, const kvq_windows *windows, kvq_error *err) {
    if (v->n_windows < 1 || v->seq_len < 2)
        return kvq_fail(err, KVQ_ERR_INPUT, "give a longer text", "%s: no token can be scored", windows->source);
    if (v->options.protocol == KVQ_PROTOCOL_DECODE && (v->options.n_prompt < 1 || v->n_scored < 1)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "take 1 to seq_len - 2 tokens as the prompt",
                        "a prompt of %lld tokens: none of %lld is left to be scored", (long long)v->options.n_prompt,
                        (long long)v->seq_len);
    }
    return KVQ_OK;
}

kvq_status kvq_validate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_artifact *artifact,
                        const kvq_windows *windows, const kvq_validate_options *options, kvq_validation *out,
                        kvq_error *err) {
    const kvq_model_config *config = kvq_model_describe(model);
    kvq_validation          result = {.has_artifact = artifact != NULL,
                                      .n_windows = windows->n_windows,
                                      .seq_len = windows->seq_len,
                                      .options = options_for(options, artifact != NULL, windows->n_windows)};
    run                     r = {.ctx = ctx,
                                 .be = be,
                                 .model = model,
                                 .config = config,
                                 .artifact = artifact,
                                 .windows = windows,
                                 .first_scored = result.options.n_prompt,
                                 .result = &result};
    kvq_status              status = KVQ_OK;
    result.n_scored = result.seq_len - 1 - r.first_scored;
    result.tokens_scored = result.n_windows * result.n_scored;
    KVQ_TRY(check_tokens(&result, windows, err));
    if (artifact != NULL) KVQ_TRY(kvq_artifact_matches(artifact, config, NULL, err));
    KVQ_TRY(allocate(&r, err));
    for (int64_t first = 0; first < windows->n_windows; first += r.group) {
        int64_t left = windows->n_windows - first;
        KVQ_TRY(run_group(&r, first, left < r.group ? left : r.group, err));
    }
    KVQ_TRY(summarise(&r, err));
    *out = result;
    memset(&result, 0, sizeof result);

done:
    release(&r);
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
