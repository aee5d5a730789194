// SPDX-License-Identifier: Apache-2.0
//
// From the last hidden state to losses. Logits of the whole window would be S * V numbers; they are made and used for
// LOGIT_ROWS rows at a time.
#include "model_impl.h"

kvq_status kvq_head_apply(const kvq_model *model, const kvq_head *head, const float *x, int64_t first_row,
                          int64_t n_rows, float *normed, float *logits, kvq_error *err) {
    const kvq_model_config *c = model->config;
    const kvq_backend      *be = model->be;
    be->rmsnorm(be, x, head->norm, c->rms_norm_eps, normed, n_rows, c->hidden_size);
    kvq_linear_forward(be, &head->output, normed, logits, n_rows);
    int64_t at = be->find_nonfinite(be, logits, n_rows * c->vocab_size); // a soft cap would hide an infinity
    if (at >= 0) {
        kvq_status status = be->check(be, err);
        if (status != KVQ_OK) return status;
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "output head, row %lld, token %lld: the logit is not finite",
                        (long long)(first_row + at / c->vocab_size), (long long)(at % c->vocab_size));
    }
    if (c->logit_softcap > 0) be->softcap(be, c->logit_softcap, logits, n_rows * c->vocab_size);
    return KVQ_OK;
}

static int64_t block_rows(int64_t n_left) { return n_left < LOGIT_ROWS ? n_left : LOGIT_ROWS; }

kvq_status kvq_head_logits(kvq_model *model, const kvq_head *head, kvq_workspace *ws, const float *x, int64_t n_rows,
                           float *logits, kvq_error *err) {
    int64_t    C = model->config->hidden_size, V = model->config->vocab_size;
    kvq_status status = KVQ_OK;
    for (int64_t t = 0; t < n_rows && status == KVQ_OK; t += LOGIT_ROWS) {
        status = kvq_head_apply(model, head, x + t * C, t, block_rows(n_rows - t), ws->mlp.normed, logits + t * V, err);
    }
    return status;
}

kvq_status kvq_head_loss(kvq_model *model, const kvq_head *head, kvq_workspace *ws, const int32_t *ids,
                         int64_t n_tokens, const float *x, float *dx, double *host_nll, kvq_error *err) {
    const kvq_backend      *be = model->be;
    const kvq_model_config *c = model->config;
    int64_t                 C = c->hidden_size, n_scored = n_tokens - 1;
    double                  scale = dx != NULL ? 1.0 / (double)n_scored : 0.0;
    if (dx != NULL) be->zero(be, dx, n_tokens * C);
    for (int64_t t = 0; t < n_scored; t += LOGIT_ROWS) {
        int64_t    rows = block_rows(n_scored - t);
        kvq_status status = kvq_head_apply(model, head, x + t * C, t, rows, ws->mlp.normed, ws->logits, err);
        if (status != KVQ_OK) return status;
        be->cross_entropy(be, ws->logits, ids + t + 1, rows, c->vocab_size, c->logit_softcap, scale, host_nll + t);
        if (dx == NULL) continue;
        kvq_linear_gradient(be, &head->output, ws->logits, ws->mlp.dnormed, rows, false);
        be->rmsnorm_backward(be, x + t * C, head->norm, c->rms_norm_eps, ws->mlp.dnormed, dx + t * C, rows, C);
    }
    return be->check(be, err);
}

kvq_status kvq_head_compare(kvq_model *model, const kvq_head *head, kvq_workspace *ws, const int32_t *ids,
                            int64_t n_tokens, const float *x_a, const float *x_b, kvq_position_score *host_scores,
                            kvq_error *err) {
    int64_t C = model->config->hidden_size, n_scored = n_tokens - 1;
    float  *normed = ws->mlp.normed;
    if (ws->backward) return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "a backward workspace has no room for two models");
    for (int64_t t = 0; t < n_scored; t += LOGIT_ROWS) {
        int64_t    rows = block_rows(n_scored - t);
        kvq_status status = kvq_head_apply(model, head, x_a + t * C, t, rows, normed, ws->logits, err);
        if (status == KVQ_OK) status = kvq_head_apply(model, head, x_b + t * C, t, rows, normed, ws->logits_b, err);
        if (status != KVQ_OK) return status;
        model->be->compare(model->be, ws->logits, ws->logits_b, ids + t + 1, rows, model->config->vocab_size,
                           host_scores + t);
    }
    return model->be->check(model->be, err);
}
