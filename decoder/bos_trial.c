// SPDX-License-Identifier: Apache-2.0
//
// Does a model need a BOS token in front of its text? The first windows are scored both ways, side by side, so that
// each layer's weights are expanded once.
#include "kvq_decoder.h"

#define TRIAL_WINDOWS 2
#define TRIAL_TOKENS  512 // of the text; what lies further on hardly notices the BOS token

kvq_bos_trial kvq_bos_trial_plan(const kvq_model *model, const kvq_windows *windows) {
    const kvq_model_config *c = kvq_model_describe(model);
    int64_t                 n = windows->seq_len - (windows->bos_added ? 1 : 0);
    if (n > TRIAL_TOKENS) n = TRIAL_TOKENS;
    if (c->max_positions > 0 && n > c->max_positions - 1) n = c->max_positions - 1;
    kvq_bos_trial plan = {.n_windows = windows->n_windows < TRIAL_WINDOWS ? windows->n_windows : TRIAL_WINDOWS,
                          .n_tokens = n};
    if (n < 2) plan.n_windows = 0; // nothing is scored both ways
    double tokens = 2.0 * (double)plan.n_windows * (double)n;
    double weights =
        (double)c->n_layers * (double)kvq_layer_floats(model) + (double)c->vocab_size * (double)c->hidden_size;
    plan.tera_flops = 2 * weights * tokens * 1e-12;
    return plan;
}

typedef struct trial {
    const kvq_backend *be;
    kvq_model         *model;
    const kvq_windows *windows;
    kvq_bos_trial     *result;
    int32_t           *ids;    // [n_tokens + 1], BOS and text
    float             *states; // [2, n_windows, n_tokens + 1, C], with BOS first
    double            *nll;    // [n_tokens]
    kvq_workspace     *ws;
    int64_t            state_floats;
} trial;

// Sequence s of 2 * n_windows: ids and their number.
static const int32_t *sequence(const trial *t, int64_t s, int64_t bos_id, int64_t *n) {
    int64_t        window = s % t->result->n_windows, n_text = t->result->n_tokens;
    const int32_t *text = t->windows->ids + window * t->windows->seq_len + (t->windows->bos_added ? 1 : 0);
    bool           with_bos = s < t->result->n_windows;
    t->ids[0] = (int32_t)bos_id;
    for (int64_t i = 0; i < n_text; i++) t->ids[1 + i] = text[i];
    *n = n_text + with_bos;
    return with_bos ? t->ids : t->ids + 1;
}

static kvq_status run_layers(trial *t, int64_t bos_id, kvq_error *err) {
    int64_t    n_seqs = 2 * t->result->n_windows, n = 0;
    kvq_layer *layer = NULL;
    kvq_status status = KVQ_OK;
    for (int64_t s = 0; s < n_seqs; s++) {
        const int32_t *ids = sequence(t, s, bos_id, &n);
        KVQ_TRY(kvq_model_embed(t->model, ids, n, t->states + s * t->state_floats, err));
    }
    for (int64_t l = 0; l < kvq_model_describe(t->model)->n_layers; l++) {
        KVQ_TRY(kvq_layer_load(t->model, l, &layer, err));
        for (int64_t s = 0; s < n_seqs; s++) {
            (void)sequence(t, s, bos_id, &n);
            KVQ_TRY(kvq_layer_forward(t->model, layer, t->ws, n, t->states + s * t->state_floats, NULL, NULL, err));
        }
        kvq_layer_release(t->model, &layer);
    }
done:
    kvq_layer_release(t->model, &layer);
    return status;
}

// Only what both ways predict counts: all tokens of the text but the first.
static kvq_status score(trial *t, int64_t bos_id, kvq_error *err) {
    double     sums[2] = {0, 0};
    kvq_head  *head = NULL;
    kvq_status status = KVQ_OK;
    int64_t    n_windows = t->result->n_windows, n = 0;
    KVQ_TRY(kvq_head_load(t->model, &head, err));
    for (int64_t s = 0; s < 2 * n_windows; s++) {
        const int32_t *ids = sequence(t, s, bos_id, &n);
        KVQ_TRY(kvq_head_loss(t->model, head, t->ws, ids, n, t->states + s * t->state_floats, NULL, t->nll, err));
        for (int64_t i = n - t->result->n_tokens; i < n - 1; i++) sums[s / n_windows] += t->nll[i];
    }
    double n_scored = (double)(n_windows * (t->result->n_tokens - 1));
    t->result->with_bos = sums[0] / n_scored;
    t->result->without_bos = sums[1] / n_scored;
done:
    kvq_head_release(t->model, &head);
    return status;
}

kvq_status kvq_bos_trial_run(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                             const kvq_windows *windows, int64_t bos_id, kvq_bos_trial *out, kvq_error *err) {
    kvq_bos_trial result = kvq_bos_trial_plan(model, windows);
    trial         t = {.be = be, .model = model, .windows = windows, .result = &result};
    kvq_status    status = KVQ_OK;
    t.state_floats = (result.n_tokens + 1) * kvq_model_describe(model)->hidden_size;
    if (result.n_windows > 0) {
        KVQ_TRY(be->alloc(be, 2 * result.n_windows * t.state_floats, "hidden states", &t.states, err));
        KVQ_TRY(kvq_workspace_create(model, result.n_tokens + 1, false, &t.ws, err));
        KVQ_TRY(KVQ_NEW(ctx, result.n_tokens + 1, "tokens", &t.ids, err));
        KVQ_TRY(KVQ_NEW(ctx, result.n_tokens, "losses", &t.nll, err));
        KVQ_TRY(run_layers(&t, bos_id, err));
        KVQ_TRY(score(&t, bos_id, err));
    }
    *out = result;
done:
    kvq_workspace_destroy(model, &t.ws);
    be->release(be, t.states);
    kvq_free(ctx, t.ids);
    kvq_free(ctx, t.nll);
    return status;
}
