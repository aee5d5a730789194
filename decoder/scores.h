// SPDX-License-Identifier: Apache-2.0
// Private to decoder: what is kept of scored positions.
#ifndef KVQ_SCORES_H
#define KVQ_SCORES_H

#include "decoder_impl.h"

typedef struct scores {
    int64_t n_windows, n_scored; // scored positions of a window
    int     n_best;              // 5, or the vocabulary if that is smaller
    double *sums;                // [groups, sums, n_windows]
} scores;

kvq_status scores_create(const kvq_context *ctx, int64_t n_windows, int64_t n_scored, scores *out, kvq_error *err);
void       scores_free(const kvq_context *ctx, scores *s);
// positions [n_scored]; the first of them has number `first` in its window.
void scores_add(scores *s, int64_t window, int64_t first, const kvq_position_score *positions);
// Full precision against itself with noise.
void scores_add_noise(scores *s, int64_t window, const kvq_position_score *positions);
void scores_add_baseline(scores *s, int64_t window, const double *nll); // without an artifact
// Every estimate of a validation that comes from scored positions; its position_kld are set already.
kvq_status scores_summarise(const kvq_context *ctx, const scores *s, kvq_validation *v, kvq_error *err);

#endif
