// SPDX-License-Identifier: Apache-2.0
//
// How often keys leave the ranges that calibration found, and where: a text of another kind may do so far more often,
// often in a few channels and at a single token, and nothing else would say why the cache loses more on it.
#include <math.h>

#include "decoder_impl.h"

struct range_watch {
    const kvq_artifact *artifact;
    int64_t             n_layers, d, vocab_size, n_windows, n_tokens; // n_tokens: watched of a window
    float              *middle, *half;                                // [L, d]
    int64_t            *channels;                                     // [L, d] elements beyond the range
    int64_t            *tokens;                                       // [V] the same by token
    double             *windows;                                      // [N] share of elements
    float              *host;                                         // [S, d]
};

// The share of elements that was beyond the thresholds in calibration, and what new text adds to it by chance: of n
// values the two outermost quantile ends leave about 2 / (n + 1) of the distribution outside.
static double expected_share(const kvq_artifact *a) {
    double beyond = 0, all = 0;
    for (int64_t l = 0; l < a->model.n_layers; l++) {
        const kvq_fit_report *fit = &a->layers[l].k.fit;
        beyond += (double)(fit->n_outliers + fit->n_clipped);
        all += (double)(fit->n_points + fit->n_outliers + fit->n_constant);
    }
    double rows = (double)a->dataset.n_samples * (double)(a->dataset.seq_len - a->quantizer.sink_tokens);
    return all > 0 ? beyond / all + 2 / (rows + 1) : 0;
}

void range_watch_destroy(const kvq_context *ctx, range_watch **watch) {
    range_watch *w = *watch;
    if (w == NULL) return;
    void *all[] = {w->middle, w->half, w->channels, w->tokens, w->windows, w->host};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvq_free(ctx, all[i]);
    kvq_free(ctx, w);
    *watch = NULL;
}

kvq_status range_watch_create(const kvq_context *ctx, const kvq_artifact *artifact, int64_t vocab_size,
                              const kvq_windows *windows, range_watch **out, kvq_error *err) {
    range_watch *w = NULL;
    int64_t      L = artifact->model.n_layers, d = artifact->model.n_kv_heads * artifact->model.head_dim;
    kvq_status   status = KVQ_OK;
    *out = NULL;
    if (artifact->layers[0].k.lower == NULL || expected_share(artifact) == 0) return KVQ_OK; // nothing is known
    if (windows->seq_len <= artifact->quantizer.sink_tokens) return KVQ_OK;                  // nothing is watched
    KVQ_TRY(KVQ_NEW(ctx, 1, "range watch", &w, err));
    w->artifact = artifact;
    w->n_layers = L;
    w->d = d;
    w->vocab_size = vocab_size;
    w->n_windows = windows->n_windows;
    w->n_tokens = windows->seq_len - artifact->quantizer.sink_tokens;
    KVQ_TRY(KVQ_NEW(ctx, L * d, "ranges", &w->middle, err));
    KVQ_TRY(KVQ_NEW(ctx, L * d, "ranges", &w->half, err));
    KVQ_TRY(KVQ_NEW(ctx, L * d, "elements beyond their range", &w->channels, err));
    KVQ_TRY(KVQ_NEW(ctx, vocab_size, "elements beyond their range", &w->tokens, err));
    KVQ_TRY(KVQ_NEW(ctx, w->n_windows, "elements beyond their range", &w->windows, err));
    KVQ_TRY(KVQ_NEW(ctx, windows->seq_len * d, "keys", &w->host, err));
    for (int64_t i = 0; i < L * d; i++) {
        const kvq_tensor_quant *k = &artifact->layers[i / d].k;
        w->middle[i] = kvq_range_middle(k->lower[i % d], k->upper[i % d]);
        w->half[i] = kvq_range_half(k->lower[i % d], k->upper[i % d]);
    }
    *out = w;
    w = NULL;

done:
    range_watch_destroy(ctx, &w);
    return status;
}

void range_watch_see(range_watch *w, const kvq_backend *be, int64_t layer, int64_t window, const int32_t *ids,
                     const float *k, int64_t n_tokens) {
    const float *middle = w->middle + layer * w->d, *half = w->half + layer * w->d;
    int64_t      beyond = 0;
    be->download(be, w->host, k, n_tokens * w->d);
    for (int64_t t = n_tokens - w->n_tokens; t < n_tokens; t++) {
        const float *row = w->host + t * w->d;
        int64_t      of_token = 0;
        for (int64_t c = 0; c < w->d; c++) {
            bool out = fabsf(kvq_block_normalise(row[c], middle[c], half[c], 0.0f)) > KVQ_OUTLIER_EDGE;
            w->channels[layer * w->d + c] += out;
            of_token += out;
        }
        w->tokens[ids[t]] += of_token;
        beyond += of_token;
    }
    w->windows[window] += (double)beyond / (double)(w->n_layers * w->n_tokens * w->d);
}

static int64_t largest(const int64_t *x, int64_t n) {
    int64_t at = 0;
    for (int64_t i = 1; i < n; i++) at = x[i] > x[at] ? i : at;
    return at;
}

kvq_range_report range_watch_report(const range_watch *w) {
    kvq_range_report r = {.expected = expected_share(w->artifact),
                          .share = kvq_estimate_ratio(w->windows, NULL, w->n_windows)};
    double           elements = (double)(w->n_windows * w->n_tokens), all = 0, most = -1;
    for (int64_t l = 0; l < w->n_layers; l++) {
        double sum = 0;
        for (int64_t c = 0; c < w->d; c++) sum += (double)w->channels[l * w->d + c];
        all += sum;
        if (sum > most) r.layer = l;
        most = sum > most ? sum : most;
    }
    r.channel = largest(w->channels + r.layer * w->d, w->d);
    r.token = largest(w->tokens, w->vocab_size);
    if (elements > 0) {
        r.layer_share = most / (elements * (double)w->d);
        r.channel_share = (double)w->channels[r.layer * w->d + r.channel] / elements;
    }
    if (all > 0) r.token_part = (double)w->tokens[r.token] / all;
    double spread = isnan(r.share.stderr_) ? 0 : 2 * r.share.stderr_;
    r.exceeds = r.share.value - spread > KVQ_RANGE_MARGIN * r.expected;
    return r;
}
