// SPDX-License-Identifier: Apache-2.0
//
// The case `matmul`: linear layers of several shapes, in both directions and both types. The fastest of the large
// square ones is what "fraction of the machine's rate" refers to everywhere.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "bench.h"

#define MIN_SECONDS     0.05 // of one measurement; small products are repeated
#define ROWS_PER_THREAD 512  // of the square ones: work for every thread, whatever the tiles are
#define USUAL_ROWS      2048 // of the given shapes

static const int64_t SIDES[] = {512, 1024, 2048};

typedef enum direction { FORWARD, BACKWARD, N_DIRECTIONS } direction;
static const char *const DIRECTION_NAMES[] = {[FORWARD] = "forward", [BACKWARD] = "backward"};

typedef struct problem {
    int64_t rows, n_out, n_in;
} problem;

typedef struct arrays {
    float *x, *w, *y; // x [rows, n_in], y [rows, n_out]
} arrays;

void bench_fill(float *x, int64_t n, uint32_t stream) {
    for (int64_t i = 0; i < n; i++) x[i] = (float)(2 * kvq_rng_uniform(0, KVQ_RNG_BENCH, stream, (uint64_t)i) - 1);
}

// ---------------------------------------------------------------- one shape

static kvq_status make_weights(const kvq_backend *be, const problem *p, float **w, kvq_error *err) {
    kvq_status status = KVQ_OK;
    float     *row = NULL;
    KVQ_TRY(be->alloc(be, be->weights_floats(be, p->n_out, p->n_in), "weights", w, err));
    KVQ_TRY(KVQ_NEW(be->ctx, p->n_in, "row of weights", &row, err));
    for (int64_t i = 0; i < p->n_out; i++) {
        if (i < 16) bench_fill(row, p->n_in, 16 + (uint32_t)i); // values do not matter, zeros might
        be->upload_weights(be, *w, p->n_in, i, 1, row);
    }

done:
    kvq_free(be->ctx, row);
    return status;
}

static kvq_status make_arrays(const kvq_backend *be, const problem *p, arrays *a, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(be->alloc(be, p->rows * p->n_in, "factor", &a->x, err));
    KVQ_TRY(be->alloc(be, p->rows * p->n_out, "product", &a->y, err));
    KVQ_TRY(make_weights(be, p, &a->w, err));
    bench_fill(a->x, p->rows * p->n_in, 1);
    bench_fill(a->y, p->rows * p->n_out, 2);

done:
    return status;
}

static void free_arrays(const kvq_backend *be, arrays *a) {
    be->release(be, a->x);
    be->release(be, a->w);
    be->release(be, a->y);
}

static double run(const kvq_backend *be, const problem *p, const arrays *a, direction d, int64_t times) {
    double start = kvq_now_s();
    for (int64_t i = 0; i < times; i++) {
        if (d == FORWARD) {
            be->linear(be, a->x, a->w, NULL, a->y, p->rows, p->n_out, p->n_in);
        } else {
            be->linear_backward(be, a->y, a->w, a->x, p->rows, p->n_out, p->n_in, false);
        }
    }
    return kvq_now_s() - start;
}

// FLOP/s of one measurement.
static double rate(const kvq_backend *be, const problem *p, const arrays *a, direction d) {
    double  flops = 2.0 * (double)p->rows * (double)p->n_out * (double)p->n_in;
    int64_t times = (int64_t)(MIN_SECONDS / run(be, p, a, d, 1)) + 1;
    return flops * (double)times / run(be, p, a, d, times);
}

static kvq_status measure(bench_report *r, const kvq_backend *be, problem p, const bench_reference *reference,
                          bench_series rates[N_DIRECTIONS], bench_series fractions[N_DIRECTIONS], kvq_error *err) {
    arrays     a = {NULL, NULL, NULL};
    kvq_status status = KVQ_OK;
    KVQ_TRY(make_arrays(be, &p, &a, err));
    for (int d = FORWARD; d < N_DIRECTIONS; d++) {
        (void)run(be, &p, &a, (direction)d, 1);
        rates[d].n = fractions[d].n = (int)r->options->repeats;
        for (int i = 0; i < rates[d].n; i++) {
            double best = NAN;
            if (reference != NULL) KVQ_TRY(bench_reference_rate(be, reference, &best, err));
            rates[d].values[i] = rate(be, &p, &a, (direction)d);
            fractions[d].values[i] = rates[d].values[i] / best;
        }
    }

done:
    free_arrays(be, &a);
    return status;
}

// ---------------------------------------------------------------- the fastest

// `type` names the rows that are added, NULL for none.
static kvq_status measure_squares(bench_report *r, const kvq_backend *be, const char *type, bench_reference *fastest,
                                  bench_series *best, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    bench_series rates[N_DIRECTIONS], unused[N_DIRECTIONS];
    best->n = 0;
    for (int i = 0; i < CLI_COUNT_OF(SIDES); i++) {
        problem p = {ROWS_PER_THREAD * be->ctx->n_threads, SIDES[i], SIDES[i]};
        KVQ_TRY(measure(r, be, p, NULL, rates, unused, err));
        for (int d = FORWARD; d < N_DIRECTIONS; d++) {
            bench_series scaled = bench_scaled(&rates[d], 1e-9);
            if (best->n == 0 || bench_summarise(&scaled).median > bench_summarise(best).median) {
                *best = scaled;
                fastest->side = SIDES[i];
                fastest->backward = d == BACKWARD;
            }
            if (type != NULL)
                KVQ_TRY(bench_add(r, &scaled, "GFLOP/s", err, "%s %lldx%lld %s", type, (long long)p.n_out,
                                  (long long)p.n_in, DIRECTION_NAMES[d]));
        }
    }

done:
    return status;
}

kvq_status bench_reference_find(bench_report *r, const kvq_backend *be, bench_reference *out, kvq_error *err) {
    bench_series unused;
    return measure_squares(r, be, NULL, out, &unused, err);
}

kvq_status bench_reference_rate(const kvq_backend *be, const bench_reference *reference, double *out, kvq_error *err) {
    problem    p = {ROWS_PER_THREAD * be->ctx->n_threads, reference->side, reference->side};
    arrays     a = {NULL, NULL, NULL};
    direction  d = reference->backward ? BACKWARD : FORWARD;
    kvq_status status = make_arrays(be, &p, &a, err);
    if (status == KVQ_OK) (void)run(be, &p, &a, d, 1);
    if (status == KVQ_OK) *out = rate(be, &p, &a, d);
    free_arrays(be, &a);
    return status;
}

// ---------------------------------------------------------------- given shapes

// "OUTxIN" or "OUTxINxROWS"
static kvq_status parse_shape(const char *text, int64_t usual_rows, problem *out, kvq_error *err) {
    int64_t     sizes[3] = {0, 0, usual_rows};
    const char *at = text;
    int         n = 0;
    while (n < 3 && *at >= '1' && *at <= '9') {
        char *end;
        sizes[n++] = strtoll(at, &end, 10);
        at = *end == 'x' && end[1] != 0 ? end + 1 : end;
        if (*end != 'x') break;
    }
    bool valid = n >= 2 && *at == 0;
    for (int i = 0; i < 3; i++) valid = valid && sizes[i] <= (int64_t)CLI_MAX_TOKENS;
    if (!valid) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--shape: '%s' is not OUTxIN or OUTxINxROWS with whole numbers up to %.0f", text,
                        CLI_MAX_TOKENS);
    }
    problem p = {sizes[2], sizes[0], sizes[1]};
    *out = p;
    return KVQ_OK;
}

static kvq_status measure_shape(bench_report *r, const kvq_backend *be, const char *type, problem p,
                                const bench_reference *reference, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    bench_series rates[N_DIRECTIONS], fractions[N_DIRECTIONS];
    KVQ_TRY(measure(r, be, p, reference, rates, fractions, err));
    for (int d = FORWARD; d < N_DIRECTIONS; d++) {
        char         name[64];
        bench_series scaled = bench_scaled(&rates[d], 1e-9);
        (void)snprintf(name, sizeof name, "%s %lldx%lld %s, %lld rows", type, (long long)p.n_out, (long long)p.n_in,
                       DIRECTION_NAMES[d], (long long)p.rows);
        KVQ_TRY(bench_add(r, &scaled, "GFLOP/s", err, "%s", name));
        KVQ_TRY(bench_add(r, &fractions[d], "of best", err, "%s", name));
    }

done:
    return status;
}

// ---------------------------------------------------------------- the case

static kvq_status measure_type(bench_report *r, kvq_compute compute, bench_series *best, kvq_error *err) {
    const bench_options *o = r->options;
    const char          *type = kvq_compute_names[compute];
    kvq_backend         *be = NULL;
    bench_reference      reference;
    kvq_status           status = KVQ_OK;
    KVQ_TRY(kvq_backend_cpu(&r->cli->ctx, compute, &be, err));
    KVQ_TRY(measure_squares(r, be, type, &reference, best, err));
    KVQ_TRY(bench_add(r, best, "GFLOP/s", err, "%s best", type));
    for (int i = 0; i < o->shapes.count; i++) {
        problem p;
        KVQ_TRY(parse_shape(o->shapes.items[i], o->seq_len > 0 ? o->seq_len : USUAL_ROWS, &p, err));
        KVQ_TRY(measure_shape(r, be, type, p, &reference, err));
    }

done:
    if (be != NULL) be->destroy(&be);
    return status;
}

kvq_status bench_matmul(bench_report *r, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    bench_series best[2];
    kvq_backend *be = NULL;
    kvq_error    why;
    problem      p;
    for (int i = 0; i < r->options->shapes.count; i++) KVQ_TRY(parse_shape(r->options->shapes.items[i], 1, &p, err));
    bool has_bf16 = kvq_backend_cpu(&r->cli->ctx, KVQ_COMPUTE_BF16, &be, &why) == KVQ_OK;
    if (be != NULL) be->destroy(&be);
    if (!has_bf16 && r->options->engine.compute == KVQ_COMPUTE_BF16) {
        *err = why;
        return why.status;
    }
    KVQ_TRY(measure_type(r, KVQ_COMPUTE_F32, &best[0], err));
    if (!has_bf16) {
        kvq_cli_say(r->cli, "matmul     without bf16: %s", why.message);
        return KVQ_OK;
    }
    KVQ_TRY(measure_type(r, KVQ_COMPUTE_BF16, &best[1], err));
    bench_series gain = bench_ratio(&best[1], &best[0], 1);
    KVQ_TRY(bench_add(r, &gain, "x", err, "bf16 best / f32 best"));

done:
    return status;
}
