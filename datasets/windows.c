// SPDX-License-Identifier: Apache-2.0
//
// Windows of a token list: all of it in order, for scoring, or a few spread over it, for calibration.
#include <string.h>

#include "kvq_datasets.h"
#include "windows_impl.h"

void kvq_windows_free(const kvq_context *ctx, kvq_windows *windows) {
    kvq_free(ctx, windows->ids);
    *windows = (kvq_windows){0};
}

kvq_status windows_create(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, int64_t bos_id, kvq_windows *out,
                          kvq_error *err) {
    int64_t shortest = bos_id >= 0 ? 2 : 1; // a window that is only BOS would never advance
    if (seq_len < shortest)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "windows of %lld tokens; the shortest is %lld", (long long)seq_len,
                        (long long)shortest);
    if (n_windows < 1 || n_windows > INT32_MAX || n_windows > INT64_MAX / seq_len) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld windows of %lld tokens", (long long)n_windows,
                        (long long)seq_len);
    }
    if (bos_id > INT32_MAX) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "beginning-of-text id %lld", (long long)bos_id);
    kvq_windows w = {.n_windows = n_windows, .seq_len = seq_len, .bos_added = bos_id >= 0};
    kvq_status  status = KVQ_NEW(ctx, n_windows * seq_len, "windows", &w.ids, err);
    if (status == KVQ_OK) *out = w;
    return status;
}

kvq_status windows_hash(kvq_windows *w, kvq_error *err) {
    return kvq_sha256_of(w->ids, (size_t)(w->n_windows * w->seq_len) * sizeof *w->ids, w->ids_sha256, err);
}

// Tokens of the text in one window, and whether the text has that many.
static kvq_status tokens_per_window(const kvq_ids *ids, int64_t seq_len, int64_t bos_id, int64_t *out, kvq_error *err) {
    *out = bos_id >= 0 ? seq_len - 1 : seq_len;
    if (*out < 1 || ids->count >= *out) return KVQ_OK; // a length below 1 is for windows_create to refuse
    return kvq_fail(err, KVQ_ERR_INPUT, "use a longer text or shorter windows",
                    "the text has %lld tokens, but one window needs %lld%s", (long long)ids->count, (long long)*out,
                    bos_id >= 0 ? " and a beginning-of-text token" : "");
}

static void fill_window(kvq_windows *w, int64_t window, const int32_t *ids, int64_t bos_id) {
    int32_t *to = w->ids + window * w->seq_len;
    int64_t  n = w->seq_len;
    if (w->bos_added) {
        *to++ = (int32_t)bos_id;
        n--;
    }
    memcpy(to, ids, (size_t)n * sizeof *ids);
}

kvq_status kvq_windows_consecutive(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_max,
                                   int64_t bos_id, kvq_windows *out, kvq_error *err) {
    kvq_windows w = {0};
    int64_t     step = 0;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(tokens_per_window(ids, seq_len, bos_id, &step, err));
    int64_t n_windows = step > 0 ? ids->count / step : 1;
    if (n_max > 0 && n_windows > n_max) n_windows = n_max;
    KVQ_TRY(windows_create(ctx, seq_len, n_windows, bos_id, &w, err));
    w.n_available = ids->count;
    for (int64_t i = 0; i < n_windows; i++) fill_window(&w, i, ids->data + i * step, bos_id);
    KVQ_TRY(windows_hash(&w, err));
    *out = w;
    w.ids = NULL;
done:
    kvq_free(ctx, w.ids);
    return status;
}

// One of `n_starts` places from stratum i of n. The strata differ by at most one place; with fewer places than strata
// some are empty and take the place they begin at.
static int64_t draw_start(uint64_t seed, int64_t i, int64_t n, int64_t n_starts) {
    int64_t whole = n_starts / n, rest = n_starts % n; // n is below 2^32, so nothing overflows
    int64_t low = whole * i + rest * i / n, high = whole * (i + 1) + rest * (i + 1) / n;
    if (high <= low) return low;
    return low + (int64_t)kvq_rng_below(seed, KVQ_RNG_WINDOWS, 0, (uint64_t)i, (uint64_t)(high - low));
}

kvq_status kvq_windows_drawn(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_windows,
                             uint64_t seed, int64_t bos_id, kvq_windows *out, kvq_error *err) {
    kvq_windows w = {0};
    int64_t     step = 0;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(tokens_per_window(ids, seq_len, bos_id, &step, err));
    KVQ_TRY(windows_create(ctx, seq_len, n_windows, bos_id, &w, err));
    w.n_available = ids->count;
    // When all windows fit side by side, what is drawn is how much of the spare text lies before each; otherwise starts
    // are drawn as they are, and windows share tokens.
    bool    fit = ids->count / step >= n_windows;
    int64_t spare = ids->count - (fit ? n_windows * step : step);
    for (int64_t i = 0; i < n_windows; i++) {
        int64_t start = draw_start(seed, i, n_windows, spare + 1) + (fit ? i * step : 0);
        fill_window(&w, i, ids->data + start, bos_id);
    }
    KVQ_TRY(windows_hash(&w, err));
    *out = w;
    w.ids = NULL;
done:
    kvq_free(ctx, w.ids);
    return status;
}
