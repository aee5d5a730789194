// SPDX-License-Identifier: Apache-2.0
//
// What is kept of scored positions: sums per window and bucket, from which every mean and its interval follow. Nothing
// of vocabulary size.
#include <math.h>
#include <string.h>

#include "scores.h"

// Positions 0 .. 63, 64 .. 127, 128 .. 255, and so on.
#define FIRST_POSITIONS 64
// By how sure the reference is of its first choice.
static const double CONFIDENCES[] = {0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1};
#define N_CONFIDENCES ((int)(sizeof CONFIDENCES / sizeof *CONFIDENCES) - 1)

enum { SUM_COUNT, SUM_BASELINE, SUM_QUANTIZED, SUM_DIFFERENCE, SUM_KLD, SUM_TOP1, SUM_TOP5, SUM_DP_SQUARE, N_SUMS };

// Groups of positions: all of them, those of each bucket, and what the noise pass scored.
enum { GROUP_ALL, GROUP_POSITIONS, N_POSITIONS = KVQ_MAX_BUCKETS, GROUP_CONFIDENCES = GROUP_POSITIONS + N_POSITIONS };
enum { GROUP_NOISE = GROUP_CONFIDENCES + N_CONFIDENCES, N_GROUPS };

kvq_status scores_create(const kvq_context *ctx, int64_t n_windows, int64_t n_scored, scores *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    *out = (scores){.n_windows = n_windows, .n_scored = n_scored};
    KVQ_TRY(KVQ_NEW(ctx, N_GROUPS * N_SUMS * n_windows, "sums of scores", &out->sums, err));

done:
    if (status != KVQ_OK) scores_free(ctx, out);
    return status;
}

void scores_free(const kvq_context *ctx, scores *s) {
    kvq_free(ctx, s->sums);
    *s = (scores){.sums = NULL};
}

// ---------------------------------------------------------------- adding

static double *sums_of(const scores *s, int group, int sum) {
    return s->sums + ((int64_t)group * N_SUMS + sum) * s->n_windows;
}

static int position_bucket(int64_t position) {
    int bucket = 0;
    for (int64_t end = FIRST_POSITIONS; position >= end && bucket < N_POSITIONS - 1; end *= 2) bucket++;
    return bucket;
}

static int confidence_bucket(double confidence) {
    int bucket = 0;
    while (bucket < N_CONFIDENCES - 1 && confidence >= CONFIDENCES[bucket + 1]) bucket++;
    return bucket;
}

static void add(scores *s, int group, int64_t window, const kvq_position_score *p) {
    double       dp = exp(-p->nll_b) - exp(-p->nll_a);
    const double terms[N_SUMS] = {[SUM_COUNT] = 1,
                                  [SUM_BASELINE] = p->nll_a,
                                  [SUM_QUANTIZED] = p->nll_b,
                                  [SUM_DIFFERENCE] = p->nll_b - p->nll_a,
                                  [SUM_KLD] = p->kl,
                                  [SUM_TOP1] = p->top_a == p->top_b ? 1 : 0,
                                  [SUM_TOP5] = p->top5_common,
                                  [SUM_DP_SQUARE] = dp * dp};
    for (int i = 0; i < N_SUMS; i++) sums_of(s, group, i)[window] += terms[i];
}

void scores_add(scores *s, int64_t window, int64_t first, const kvq_position_score *positions) {
    for (int64_t t = 0; t < s->n_scored; t++) {
        const kvq_position_score *p = &positions[t];
        add(s, GROUP_ALL, window, p);
        add(s, GROUP_POSITIONS + position_bucket(first + t), window, p);
        add(s, GROUP_CONFIDENCES + confidence_bucket(p->confidence_a), window, p);
    }
}

void scores_add_noise(scores *s, int64_t window, const kvq_position_score *positions) {
    for (int64_t t = 0; t < s->n_scored; t++) add(s, GROUP_NOISE, window, &positions[t]);
}

void scores_add_baseline(scores *s, int64_t window, const double *nll) {
    for (int64_t t = 0; t < s->n_scored; t++) {
        sums_of(s, GROUP_ALL, SUM_COUNT)[window] += 1;
        sums_of(s, GROUP_ALL, SUM_BASELINE)[window] += nll[t];
    }
}

// ---------------------------------------------------------------- reading

// Where an interval reaches beyond what such a mean can be, it ends there.
static kvq_estimate mean_of(const scores *s, int group, int sum) {
    double       least = sum == SUM_DIFFERENCE ? -HUGE_VAL : 0;
    double       most = sum == SUM_TOP1 ? 1 : sum == SUM_TOP5 ? s->n_best : HUGE_VAL;
    kvq_estimate x = kvq_estimate_ratio(sums_of(s, group, sum), sums_of(s, group, SUM_COUNT), s->n_windows);
    if (x.low < least) x.low = fmin(least, x.value); // a sum of KL may by rounding be a little below 0
    if (x.high > most) x.high = most;
    return x;
}

static kvq_estimate scaled(kvq_estimate x, double by) {
    return (kvq_estimate){x.value * by, x.stderr_ * by, x.low * by, x.high * by};
}

static double total(const double *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

static void add_bucket(const scores *s, int group, double from, double to, kvq_bucket *buckets, int *n) {
    double count = total(sums_of(s, group, SUM_COUNT), s->n_windows);
    if (!(count > 0)) return;
    buckets[(*n)++] = (kvq_bucket){.from = from,
                                   .to = to,
                                   .n = (int64_t)count,
                                   .baseline_nll = total(sums_of(s, group, SUM_BASELINE), s->n_windows) / count,
                                   .quantized_nll = total(sums_of(s, group, SUM_QUANTIZED), s->n_windows) / count,
                                   .difference_nll = mean_of(s, group, SUM_DIFFERENCE),
                                   .kld = mean_of(s, group, SUM_KLD),
                                   .top1 = mean_of(s, group, SUM_TOP1)};
}

static void set_buckets(const scores *s, kvq_validation *v) {
    double from = 0;
    for (int i = 0; i < N_POSITIONS; i++) {
        double to = FIRST_POSITIONS * (double)((int64_t)1 << i);
        add_bucket(s, GROUP_POSITIONS + i, from, to < (double)v->seq_len ? to : (double)v->seq_len, v->positions,
                   &v->n_positions);
        from = to;
    }
    for (int i = 0; i < N_CONFIDENCES; i++)
        add_bucket(s, GROUP_CONFIDENCES + i, CONFIDENCES[i], CONFIDENCES[i + 1], v->confidences, &v->n_confidences);
}

static void set_distribution(const scores *s, kvq_validation *v) {
    for (int64_t i = 0; i < s->n_windows * s->n_scored; i++) {
        double kl = (double)v->position_kld[i], bin = kl > 0 ? floor(4 * (log10(kl) + 8)) : 0;
        v->kld_max = kl > v->kld_max || isnan(kl) ? kl : v->kld_max; // NaN stays, so that no gate passes on it
        v->kld_histogram[bin < 0 ? 0 : bin >= KVQ_KLD_BINS ? KVQ_KLD_BINS - 1 : (int)bin]++;
    }
}

kvq_status scores_summarise(const kvq_context *ctx, const scores *s, kvq_validation *v, kvq_error *err) {
    static const double QUANTILES[KVQ_N_KLD_QUANTILES] = {
        [KVQ_KLD_MEDIAN] = 0.5, [KVQ_KLD_P90] = 0.9, [KVQ_KLD_P99] = 0.99, [KVQ_KLD_P999] = 0.999};
    double *const windows[] = {v->window_baseline_nll, v->window_quantized_nll, v->window_kld, v->window_top1};
    const int     sums[] = {SUM_BASELINE, SUM_QUANTIZED, SUM_KLD, SUM_TOP1};
    for (int i = 0; i < 4; i++) {
        for (int64_t w = 0; w < s->n_windows; w++)
            windows[i][w] = sums_of(s, GROUP_ALL, sums[i])[w] / (double)s->n_scored;
    }
    v->baseline_nll = mean_of(s, GROUP_ALL, SUM_BASELINE);
    v->baseline_ppl = estimate_map(v->baseline_nll, exp, exp(v->baseline_nll.value));
    if (!v->has_artifact) return KVQ_OK;
    v->quantized_nll = mean_of(s, GROUP_ALL, SUM_QUANTIZED);
    v->quantized_ppl = estimate_map(v->quantized_nll, exp, exp(v->quantized_nll.value));
    v->difference_nll = mean_of(s, GROUP_ALL, SUM_DIFFERENCE);
    v->dppl = estimate_map(v->difference_nll, expm1, exp(v->difference_nll.value));
    v->kld = mean_of(s, GROUP_ALL, SUM_KLD);
    v->top1 = mean_of(s, GROUP_ALL, SUM_TOP1);
    v->top5 = scaled(mean_of(s, GROUP_ALL, SUM_TOP5), 1.0 / s->n_best);
    v->dp_rms = estimate_root(mean_of(s, GROUP_ALL, SUM_DP_SQUARE));
    v->noise_kld = mean_of(s, GROUP_NOISE, SUM_KLD);
    v->noise_top1 = mean_of(s, GROUP_NOISE, SUM_TOP1);
    v->has_noise = !isnan(v->noise_kld.value);
    set_buckets(s, v);
    set_distribution(s, v);
    return kvq_estimate_quantiles(ctx, v->position_kld, s->n_windows, s->n_scored, QUANTILES, KVQ_N_KLD_QUANTILES,
                                  v->kld_quantiles, err);
}
