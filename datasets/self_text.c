// SPDX-License-Identifier: Apache-2.0
//
// Text that a model writes itself, for calibration without any text. All windows are written side by side, one position
// after the other, because a model is much faster on a batch of sequences than on one.
#include <string.h>

#include "kvq_datasets.h"
#include "windows_impl.h"

// The token at `position` of each window, from those before it.
static kvq_status write_position(kvq_windows *w, int64_t position, uint64_t seed, int64_t bos_id, int64_t eos_id,
                                 kvq_next_token_fn step, void *user, int32_t *newest, double *u, int32_t *next,
                                 kvq_error *err) {
    for (int64_t i = 0; i < w->n_windows; i++) {
        newest[i] = w->ids[i * w->seq_len + position - 1];
        u[i] = kvq_rng_uniform(seed, KVQ_RNG_SELF_TEXT, (uint32_t)i, (uint64_t)position);
    }
    kvq_status status = step(user, w->n_windows, newest, u, next, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < w->n_windows; i++) {
        if (next[i] < 0)
            return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "the model wrote token id %d at position %lld of window %lld",
                            (int)next[i], (long long)position, (long long)i);
        // A model with one token for both ends begins anew by itself.
        bool ended = newest[i] == eos_id && eos_id != bos_id;
        w->ids[i * w->seq_len + position] = ended ? (int32_t)bos_id : next[i];
    }
    return KVQ_OK;
}

kvq_status kvq_windows_self(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, uint64_t seed, int64_t bos_id,
                            int64_t eos_id, kvq_next_token_fn step, void *user, kvq_windows *out, kvq_error *err) {
    kvq_windows w = {0};
    int32_t    *newest = NULL, *next = NULL;
    double     *u = NULL;
    kvq_status  status = KVQ_OK;
    if (bos_id < 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_UNSUPPORTED, "calibrate with a text instead",
                         "self-generated text needs a beginning-of-text token to begin with, and none is known"));
    }
    KVQ_TRY(windows_create(ctx, seq_len, n_windows, bos_id, &w, err));
    KVQ_TRY(KVQ_NEW(ctx, n_windows, "newest tokens", &newest, err));
    KVQ_TRY(KVQ_NEW(ctx, n_windows, "next tokens", &next, err));
    KVQ_TRY(KVQ_NEW(ctx, n_windows, "random numbers", &u, err));
    for (int64_t i = 0; i < n_windows; i++) w.ids[i * seq_len] = (int32_t)bos_id;
    for (int64_t position = 1; position < seq_len; position++) {
        KVQ_TRY(write_position(&w, position, seed, bos_id, eos_id, step, user, newest, u, next, err));
    }
    w.n_available = n_windows * seq_len;
    strcpy(w.source, "self");
    KVQ_TRY(windows_hash(&w, err));
    *out = w;
    w.ids = NULL;
done:
    kvq_free(ctx, w.ids);
    kvq_free(ctx, newest);
    kvq_free(ctx, next);
    kvq_free(ctx, u);
    return status;
}
