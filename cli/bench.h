// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-bench: its options, the rows that cases measure, and how they are reported.
#ifndef KVQ_BENCH_H
#define KVQ_BENCH_H

#include "kvq_cli.h"

#define BENCH_MAX_REPEATS 100

typedef struct bench_options {
    kvq_cli_common common;
    kvq_cli_engine engine;
    kvq_cli_list   cases, shapes, contexts;
    const char    *model, *text, *points;
    int64_t        repeats, seq_len, windows, layers, bits; // seq_len, layers, bits: 0 = not given
    int64_t        tokens, kv_heads, head_dim;              // of codec
    bool           csv, json;
} bench_options;

// One value for each repeat.
typedef struct bench_series {
    double values[BENCH_MAX_REPEATS];
    int    n;
} bench_series;

typedef struct bench_summary {
    double median, min, max; // the median of an even number of values is the mean of the two in the middle
} bench_summary;

bench_summary bench_summarise(const bench_series *series);
// a[i] / b[i] * scale: repeats are compared with each other, so that a machine that slows down between them does not
// show.
bench_series bench_ratio(const bench_series *a, const bench_series *b, double scale);
bench_series bench_scaled(const bench_series *a, double scale);
bench_series bench_inverse(const bench_series *a, double scale); // scale / a[i]

// One measured quantity.
typedef struct bench_row {
    const char  *benchmark; // "sweep"
    char         name[64];
    const char  *unit;
    bench_series series;
} bench_row;

typedef struct bench_report {
    kvq_cli             *cli;
    const bench_options *options;
    bench_row           *rows;
    int64_t              n_rows, capacity;
    const char          *benchmark; // case that is running
} bench_report;

// Names are of the form "thing, what about it".
kvq_status bench_add(bench_report *report, const bench_series *series, const char *unit, kvq_error *err,
                     const char *name, ...) KVQ_PRINTF(5, 6);
kvq_status bench_print(const bench_report *report, kvq_error *err);
void       bench_free(bench_report *report);

// ---------------------------------------------------------------- cases

kvq_status bench_matmul(bench_report *report, kvq_error *err);
kvq_status bench_sweep(bench_report *report, kvq_error *err);
kvq_status bench_fit(bench_report *report, kvq_error *err);
kvq_status bench_points(bench_report *report, kvq_error *err); // fit, with --points
kvq_status bench_tokenizer(bench_report *report, kvq_error *err);
kvq_status bench_codec(bench_report *report, kvq_error *err);

// The linear layer that this machine is fastest at, with all threads, among large square ones: "best" in fractions.
typedef struct bench_reference {
    int64_t side;
    bool    backward;
} bench_reference;
kvq_status bench_reference_find(bench_report *report, const kvq_backend *be, bench_reference *out, kvq_error *err);
// FLOP/s now: measured beside each repeat of what is compared with it, because a busy machine is not always as fast.
kvq_status bench_reference_rate(const kvq_backend *be, const bench_reference *reference, double *out, kvq_error *err);

// x [n] uniform in [-1, 1), the same in every run; stream tells arrays apart.
void bench_fill(float *x, int64_t n, uint32_t stream);

#endif
