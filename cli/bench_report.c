// SPDX-License-Identifier: Apache-2.0
//
// What kvq-bench measured, as a table, CSV or JSON. Every row has the same form: a quantity, its unit, the median over
// the repeats and the extremes; ratios are rows like any other.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

#define FIRST_CAPACITY 64

// ---------------------------------------------------------------- series

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bench_summary bench_summarise(const bench_series *series) {
    bench_series s = *series;
    qsort(s.values, (size_t)s.n, sizeof *s.values, by_value);
    bench_summary summary = {(s.values[(s.n - 1) / 2] + s.values[s.n / 2]) / 2, s.values[0], s.values[s.n - 1]};
    return summary;
}

bench_series bench_ratio(const bench_series *a, const bench_series *b, double scale) {
    bench_series s = {.n = a->n < b->n ? a->n : b->n};
    for (int i = 0; i < s.n; i++) s.values[i] = a->values[i] / b->values[i] * scale;
    return s;
}

bench_series bench_scaled(const bench_series *a, double scale) {
    bench_series s = *a;
    for (int i = 0; i < s.n; i++) s.values[i] *= scale;
    return s;
}

bench_series bench_inverse(const bench_series *a, double scale) {
    bench_series s = *a;
    for (int i = 0; i < s.n; i++) s.values[i] = scale / s.values[i];
    return s;
}

// ---------------------------------------------------------------- rows

static kvq_status grow(bench_report *r, kvq_error *err) {
    bench_row *rows;
    int64_t    capacity = r->capacity > 0 ? 2 * r->capacity : FIRST_CAPACITY;
    kvq_status status = KVQ_NEW(&r->cli->ctx, capacity, "measurements", &rows, err);
    if (status != KVQ_OK) return status;
    if (r->n_rows > 0) memcpy(rows, r->rows, (size_t)r->n_rows * sizeof *rows);
    kvq_free(&r->cli->ctx, r->rows);
    r->rows = rows;
    r->capacity = capacity;
    return KVQ_OK;
}

kvq_status bench_add(bench_report *r, const bench_series *series, const char *unit, kvq_error *err, const char *name,
                     ...) {
    kvq_status status = r->n_rows == r->capacity ? grow(r, err) : KVQ_OK;
    if (status != KVQ_OK) return status;
    bench_row *row = &r->rows[r->n_rows++];
    row->benchmark = r->benchmark;
    row->unit = unit;
    row->series = *series;
    va_list args;
    va_start(args, name);
    (void)vsnprintf(row->name, sizeof row->name, name, args);
    va_end(args);
    return KVQ_OK;
}

void bench_free(bench_report *r) {
    kvq_free(&r->cli->ctx, r->rows);
    r->rows = NULL;
}

// ---------------------------------------------------------------- three forms

// Rows of one name stand on one line: the first with its extremes, the others behind it.
static void print_table(const bench_report *r, const char *cpu) {
    printf("kvq %s  %s  %d threads  %lld repeats\n", KVQ_VERSION, cpu, r->cli->ctx.n_threads,
           (long long)r->options->repeats);
    for (int64_t i = 0; i < r->n_rows; i++) {
        const bench_row *row = &r->rows[i], *before = i > 0 ? row - 1 : NULL;
        bench_summary    s = bench_summarise(&row->series);
        bool             new_case = before == NULL || strcmp(row->benchmark, before->benchmark) != 0;
        if (!new_case && strcmp(row->name, before->name) == 0) {
            printf("  %8.4g %s", s.median, row->unit);
            continue;
        }
        if (i > 0) printf("\n");
        if (new_case) printf("\n%-38s %10s %-11s %10s %10s\n", row->benchmark, "median", "", "min", "max");
        printf("  %-36s %10.4g %-11s %10.4g %10.4g", row->name, s.median, row->unit, s.min, s.max);
    }
    printf("\n");
}

static void print_csv(const bench_report *r) {
    printf("case,name,unit,median,min,max,repeats\n");
    for (int64_t i = 0; i < r->n_rows; i++) {
        const bench_row *row = &r->rows[i];
        bench_summary    s = bench_summarise(&row->series);
        printf("%s,\"%s\",%s,%.9g,%.9g,%.9g,%d\n", row->benchmark, row->name, row->unit, s.median, s.min, s.max,
               row->series.n);
    }
}

static kvq_status print_json(const bench_report *r, const char *cpu, kvq_error *err) {
    kvq_json json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "schema", "kvq.bench/1");
    kvq_json_text(&json, json.root, "kvq_version", KVQ_VERSION);
    kvq_json_text(&json, json.root, "cpu", cpu);
    kvq_json_count(&json, json.root, "threads", r->cli->ctx.n_threads);
    cJSON *results = kvq_json_array(&json, json.root, "results");
    for (int64_t i = 0; i < r->n_rows; i++) {
        const bench_row *row = &r->rows[i];
        bench_summary    s = bench_summarise(&row->series);
        cJSON           *result = kvq_json_object(&json, results, NULL);
        kvq_json_text(&json, result, "case", row->benchmark);
        kvq_json_text(&json, result, "name", row->name);
        kvq_json_text(&json, result, "unit", row->unit);
        kvq_json_number(&json, result, "median", s.median);
        kvq_json_number(&json, result, "min", s.min);
        kvq_json_number(&json, result, "max", s.max);
        kvq_json_doubles(&json, result, "values", row->series.values, row->series.n);
    }
    kvq_status status = kvq_json_print(&json, err);
    kvq_json_free(&json);
    return status;
}

kvq_status bench_print(const bench_report *r, kvq_error *err) {
    char cpu[256];
    kvq_cli_describe_cpu(cpu, sizeof cpu);
    if (r->options->json) return print_json(r, cpu, err);
    if (r->options->csv) {
        print_csv(r);
    } else {
        print_table(r, cpu);
    }
    return KVQ_OK;
}
