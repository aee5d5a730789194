// SPDX-License-Identifier: Apache-2.0
//
// From logits to losses: cross entropy with its gradient, the comparison of two models at one position, sampling.
// Log-sum-exp is taken in f64 from the f32 logits: in f32 the gradients of a 49k-vocabulary model lose a factor 30 in
// accuracy and every loss is biased by about 8e-6 nats.
#include <math.h>

#include "kernels_impl.h"
#include "kvq_exp_hd.h"

static float maximum_of(const float *x, int64_t n, int *index) {
    int best = 0;
    for (int64_t i = 1; i < n; i++) {
        if (x[i] > x[best]) best = (int)i;
    }
    *index = best;
    return x[best];
}

static double log_sum_exp(const float *x, int64_t n, float maximum) {
    double  lane[LANES] = {0}, top = (double)maximum;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) lane[j] += kvq_exp_f64((double)x[i + j] - top);
    }
    for (; i < n; i++) lane[0] += kvq_exp_f64((double)x[i] - top);
    return top + log(sum_lanes(lane));
}

// ---------------------------------------------------------------- cross entropy

typedef struct entropy_job {
    float         *logits;
    const int32_t *targets;
    int64_t        n_vocab;
    double         inverse_cap, scale, *nll; // 0 = the logits are not capped
} entropy_job;

// d (cap tanh(z / cap)) / dz at the result x; 1 without a cap
static double cap_slope(const entropy_job *job, float x) {
    double t = (double)x * job->inverse_cap;
    return 1.0 - t * t;
}

static void cross_entropy_row(void *user, int64_t row, int worker) {
    const entropy_job *job = user;
    int32_t            target = job->targets[row];
    float             *x = job->logits + row * job->n_vocab, expected = x[target];
    int                top;
    double             lse = log_sum_exp(x, job->n_vocab, maximum_of(x, job->n_vocab, &top));
    (void)worker;
    job->nll[row] = lse - (double)expected;
    if (job->scale == 0) return;
    for (int64_t i = 0; i < job->n_vocab; i++)
        x[i] = (float)(job->scale * kvq_exp_f64((double)x[i] - lse) * cap_slope(job, x[i]));
    double p = exp(-job->nll[row]);
    x[target] = (float)(job->scale * (p - 1.0) * cap_slope(job, expected));
}

void kvq_cross_entropy_cpu(const kvq_backend *be, float *logits, const int32_t *targets, int64_t m, int64_t n_vocab,
                           float cap, double scale, double *nll) {
    entropy_job job = {logits, targets, n_vocab, cap > 0 ? 1.0 / (double)cap : 0, scale, nll};
    kvq_parallel_for(be->ctx, m, cross_entropy_row, &job);
}

// ---------------------------------------------------------------- two models at one position

typedef struct compare_job {
    const float        *a, *b;
    const int32_t      *targets;
    int64_t             n_vocab;
    kvq_position_score *out;
} compare_job;

// KL(a || b) = sum p_a (log p_a - log p_b)
static double divergence(const float *a, const float *b, int64_t n, double lse_a, double lse_b) {
    double  lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            double log_p = (double)a[i + j] - lse_a, log_q = (double)b[i + j] - lse_b;
            lane[j] += kvq_exp_f64(log_p) * (log_p - log_q);
        }
    }
    for (; i < n; i++) {
        double log_p = (double)a[i] - lse_a, log_q = (double)b[i] - lse_b;
        lane[0] += kvq_exp_f64(log_p) * (log_p - log_q);
    }
    return sum_lanes(lane);
}

// Indices of the `wanted` largest of x [n], largest first, the lower index on a tie; fewer when n is smaller. Returns
// how many.
static int largest_of(const float *x, int64_t n, int wanted, int *best) {
    int n_best = 0;
    for (int64_t i = 0; i < n; i++) {
        if (n_best == wanted && !(x[i] > x[best[n_best - 1]])) continue;
        int at = n_best < wanted ? n_best++ : n_best - 1;
        for (; at > 0 && x[i] > x[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = (int)i;
    }
    return n_best;
}

static int common_of_largest(const float *a, const float *b, int64_t n) {
    int best_a[5], best_b[5], n_common = 0;
    int n_best = largest_of(a, n, 5, best_a);
    (void)largest_of(b, n, 5, best_b);
    for (int i = 0; i < n_best * n_best; i++) n_common += best_a[i / n_best] == best_b[i % n_best];
    return n_common;
}

static void compare_row(void *user, int64_t row, int worker) {
    const compare_job *job = user;
    const float       *a = job->a + row * job->n_vocab, *b = job->b + row * job->n_vocab;
    int32_t            target = job->targets[row];
    kvq_position_score score;
    double             lse_a = log_sum_exp(a, job->n_vocab, maximum_of(a, job->n_vocab, &score.top_a));
    double             lse_b = log_sum_exp(b, job->n_vocab, maximum_of(b, job->n_vocab, &score.top_b));
    (void)worker;
    score.nll_a = lse_a - (double)a[target];
    score.nll_b = lse_b - (double)b[target];
    score.confidence_a = exp((double)a[score.top_a] - lse_a);
    score.top5_common = common_of_largest(a, b, job->n_vocab);
    score.kl = divergence(a, b, job->n_vocab, lse_a, lse_b);
    job->out[row] = score;
}

void kvq_compare_cpu(const kvq_backend *be, const float *logits_a, const float *logits_b, const int32_t *targets,
                     int64_t m, int64_t n_vocab, kvq_position_score *out) {
    compare_job job = {logits_a, logits_b, targets, n_vocab, out};
    kvq_parallel_for(be->ctx, m, compare_row, &job);
}

// ---------------------------------------------------------------- sampling

typedef struct sample_job {
    const float  *logits;
    const double *u;
    int64_t       n_vocab;
    int32_t      *ids;
} sample_job;

// The first token whose cumulative weight exceeds u times the total; the sums run in token order.
static void sample_row(void *user, int64_t row, int worker) {
    const sample_job *job = user;
    const float      *x = job->logits + row * job->n_vocab;
    int               top;
    double            maximum = (double)maximum_of(x, job->n_vocab, &top), total = 0, sum = 0;
    (void)worker;
    for (int64_t i = 0; i < job->n_vocab; i++) total += kvq_exp_f64((double)x[i] - maximum);
    double goal =
        (job->u[row] + 0x1p-54) * total; // the middle of the cell of u, so that u = 0 cannot pick what has no weight
    job->ids[row] = (int32_t)top;        // if rounding keeps the second sum below the goal
    for (int64_t i = 0; i < job->n_vocab; i++) {
        sum += kvq_exp_f64((double)x[i] - maximum);
        if (sum > goal) {
            job->ids[row] = (int32_t)i;
            return;
        }
    }
}

void kvq_sample_cpu(const kvq_backend *be, const float *logits, const double *u, int64_t m, int64_t n_vocab,
                    int32_t *ids) {
    sample_job job = {logits, u, n_vocab, ids};
    kvq_parallel_for(be->ctx, m, sample_row, &job);
}
