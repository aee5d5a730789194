// SPDX-License-Identifier: Apache-2.0
//
// The case `codec` on a device with packed caches (kernels/kvq_device_cache.h): packing a prompt, appending one token,
// and attention of one token over contexts of several lengths, of one layer and one sequence. Times are those of a
// host that waits once at the end of a measurement. Bytes are compared with the CPU's.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench_codec.h"

#define GROUP         4   // query heads of a KV head
#define STEPS         256 // tokens that are appended one by one: tiles are completed on the way
#define MAX_TIMES     1000
#define FIRST_CONTEXT 4096 // and 4 and 16 times as many, unless others are given
#define N_USUAL       3
#define MAX_CONTEXT   (1 << 24)

typedef struct device_case {
    bench_report       *report;
    const kvq_backend  *be;
    const codec_format *format;
    const codec_data   *data;
    int64_t             contexts[CODEC_MAX_CONTEXTS], capacity;
    int                 n_contexts;
    kvq_device_cache   *cache;
    float              *k, *v, *q, *out; // of the device
    uint8_t            *read;            // of one tensor
} device_case;

// ---------------------------------------------------------------- lengths

static int64_t whole_tiles(int64_t n) { return (n + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS * KVQ_TILE_TOKENS; }

kvq_status codec_contexts(const bench_options *o, int64_t contexts[CODEC_MAX_CONTEXTS], int *n, kvq_error *err) {
    const kvq_cli_list *given = &o->contexts;
    for (int i = 0; i < N_USUAL; i++) contexts[i] = (int64_t)FIRST_CONTEXT << 2 * i;
    *n = given->count > 0 ? given->count : N_USUAL;
    if (given->count > CODEC_MAX_CONTEXTS)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--context: more than %d of them", CODEC_MAX_CONTEXTS);
    for (int i = 0; i < given->count; i++) {
        char     *end;
        long long tokens = strtoll(given->items[i], &end, 10);
        if (*end != 0 || tokens < 1 || tokens > MAX_CONTEXT)
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--context: '%s' is not a number of tokens from 1 to %d",
                            given->items[i], MAX_CONTEXT);
        contexts[i] = whole_tiles(tokens);
    }
    return KVQ_OK;
}

static int64_t longest(const device_case *c) {
    int64_t n = c->data->n > STEPS ? c->data->n : STEPS;
    for (int i = 0; i < c->n_contexts; i++) n = c->contexts[i] > n ? c->contexts[i] : n;
    return n;
}

// The longest context goes.
static void drop_longest(device_case *c) {
    int     at = 0;
    int64_t n = 0;
    for (int i = 0; i < c->n_contexts; i++) {
        if (c->contexts[i] > n) n = c->contexts[i], at = i;
    }
    kvq_cli_say(c->report->cli, "codec      %s: %lld tokens do not fit into the device's memory", c->format->name,
                (long long)n);
    memmove(c->contexts + at, c->contexts + at + 1, (size_t)(c->n_contexts - at - 1) * sizeof *c->contexts);
    c->n_contexts--;
}

// ---------------------------------------------------------------- the cache

static kvq_status create(device_case *c, kvq_error *err) {
    const codec_format  *f = c->format;
    const bench_options *o = c->report->options;
    kvq_cache_layer      layer = {.tiled = f->tiled,
                                  .rows = {f->rows[0], f->rows[1]},
                                  .tiles = {f->tiles[0], f->tiles[1]},
                                  .n_kv_heads = (int)o->kv_heads,
                                  .head_dim = (int)o->head_dim,
                                  .n_seqs = 1,
                                  .amplitude = 1};
    double              *frequency = NULL;
    kvq_status           status = KVQ_NEW(c->be->ctx, o->head_dim / 2, "rotary frequencies", &frequency, err);
    if (status != KVQ_OK) return status;
    layer.n_pairs = (int)o->head_dim / 2;
    layer.frequency = frequency;
    for (int i = 0; i < layer.n_pairs; i++) frequency[i] = pow(1e4, -(double)i / layer.n_pairs);
    layer.capacity = c->capacity = longest(c);
    status = c->be->cache->create(c->be, &layer, &c->cache, err);
    kvq_free(c->be->ctx, frequency);
    return status;
}

static kvq_status make_numbers(device_case *c, kvq_error *err) {
    const kvq_backend *be = c->be;
    int64_t            n = c->data->n * c->format->d, n_q = (int64_t)GROUP * c->format->d;
    kvq_status         status = KVQ_OK;
    int64_t            bytes[2] = {codec_bytes(c->format, 0, c->capacity), codec_bytes(c->format, 1, c->capacity)};
    KVQ_TRY(KVQ_NEW(be->ctx, bytes[0] > bytes[1] ? bytes[0] : bytes[1], "packed tokens", &c->read, err));
    KVQ_TRY(be->alloc(be, n, "keys", &c->k, err));
    KVQ_TRY(be->alloc(be, n, "values", &c->v, err));
    KVQ_TRY(be->alloc(be, n_q, "queries", &c->q, err));
    KVQ_TRY(be->alloc(be, n_q, "outputs of attention", &c->out, err));
    be->upload(be, c->k, c->data->x[0], n);
    be->upload(be, c->v, c->data->x[1], n);
    be->upload(be, c->q, c->data->x[0], n_q < n ? n_q : n);
    KVQ_TRY(be->check(be, err));

done:
    return status;
}

// All tokens in pieces of `piece`: those of the data, over and over.
static kvq_status fill(const device_case *c, int64_t n, int64_t piece, kvq_error *err) {
    kvq_status status = c->be->cache->reset(c->be, c->cache, 0, err);
    for (int64_t at = 0, m; at < n && status == KVQ_OK; at += m) {
        int64_t from = at % c->data->n, left = c->data->n - from;
        m = n - at < piece ? n - at : piece;
        m = m < left ? m : left;
        status =
            c->be->cache->append(c->be, c->cache, 0, c->k + from * c->format->d, c->v + from * c->format->d, m, err);
    }
    return status == KVQ_OK ? c->be->cache->check(c->be, c->cache, err) : status;
}

// n tokens, as `fill` leaves them, have the bytes that the CPU has for those of the data.
static kvq_status compare(const device_case *c, int64_t n, const char *what, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++) {
        int64_t period = codec_bytes(c->format, i, c->data->n), bytes = codec_bytes(c->format, i, n);
        bool    equal = c->be->cache->part_bytes(c->cache, 0, i, KVQ_CACHE_CODED) == bytes;
        if (equal) KVQ_TRY(c->be->cache->read(c->be, c->cache, 0, i, KVQ_CACHE_CODED, c->read, err));
        for (int64_t at = 0; at < bytes && equal; at += period)
            equal = memcmp(c->read + at, c->data->packed[i], (size_t)(bytes - at < period ? bytes - at : period)) == 0;
        if (!equal)
            return kvq_fail(err, KVQ_ERR_INTERNAL, "please report it, with the device and its driver",
                            "codec: %s %s: %s on %s has other bytes than the CPU", c->format->name, i == 0 ? "K" : "V",
                            what, c->be->device);
    }

done:
    return status;
}

// ---------------------------------------------------------------- measurements

static double packed_bytes(const device_case *c, int64_t n) {
    return (double)(codec_bytes(c->format, 0, n) + codec_bytes(c->format, 1, n));
}

static kvq_status measure_prefill(const device_case *c, kvq_error *err) {
    bench_report *r = c->report;
    int64_t       n = c->data->n;
    double        f16 = 4.0 * (double)(n * c->format->d); // K and V
    bench_series  series = {.n = (int)r->options->repeats};
    kvq_status    status = KVQ_OK;
    for (int i = 0; i < series.n; i++) {
        double start = kvq_now_s();
        KVQ_TRY(fill(c, n, n, err));
        series.values[i] = f16 * 1e-9 / (kvq_now_s() - start);
    }
    bench_series packed = bench_scaled(&series, packed_bytes(c, n) / f16);
    KVQ_TRY(bench_add(r, &series, "GB/s f16", err, "%s on device, prompt of %lld", c->format->name, (long long)n));
    KVQ_TRY(bench_add(r, &packed, "GB/s packed", err, "%s on device, prompt of %lld", c->format->name, (long long)n));
    KVQ_TRY(compare(c, n, "a prompt", err));

done:
    return status;
}

static kvq_status measure_append(const device_case *c, kvq_error *err) {
    bench_series series = {.n = (int)c->report->options->repeats};
    kvq_status   status = KVQ_OK;
    KVQ_TRY(fill(c, STEPS, 1, err));
    for (int i = 0; i < series.n; i++) {
        double start = kvq_now_s();
        KVQ_TRY(fill(c, STEPS, 1, err));
        series.values[i] = 1e6 * (kvq_now_s() - start) / STEPS;
    }
    KVQ_TRY(bench_add(c->report, &series, "us", err, "%s on device, append of a token", c->format->name));
    KVQ_TRY(compare(c, STEPS, "a token after the other", err));

done:
    return status;
}

static kvq_status attend(const device_case *c, int64_t times, double *seconds, kvq_error *err) {
    const bench_options *o = c->report->options;
    kvq_cache_query      query = {.n_heads = GROUP * (int)o->kv_heads, .scale = 1 / sqrtf((float)o->head_dim)};
    kvq_status           status = KVQ_OK;
    double               start = kvq_now_s();
    for (int64_t i = 0; i < times; i++) KVQ_TRY(c->be->cache->attend(c->be, c->cache, &query, c->q, c->out, err));
    KVQ_TRY(c->be->check(c->be, err));
    *seconds = kvq_now_s() - start;

done:
    return status;
}

static kvq_status measure_attention(const device_case *c, int64_t context, kvq_error *err) {
    bench_series series = {.n = (int)c->report->options->repeats};
    const char  *name = c->format->name;
    double       seconds = 0;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(fill(c, context, c->data->n, err));
    KVQ_TRY(compare(c, context, "a context", err));
    KVQ_TRY(attend(c, 1, &seconds, err));
    int64_t times = (int64_t)(CODEC_MIN_SECONDS / fmax(seconds, CODEC_MIN_SECONDS / MAX_TIMES)) + 1;
    for (int i = 0; i < series.n; i++) {
        KVQ_TRY(attend(c, times, &seconds, err));
        series.values[i] = 1e6 * seconds / (double)times;
    }
    bench_series rate = bench_inverse(&series, packed_bytes(c, context) * 1e-3);
    KVQ_TRY(bench_add(c->report, &series, "us", err, "%s on device, attention over %lld", name, (long long)context));
    KVQ_TRY(
        bench_add(c->report, &rate, "GB/s packed", err, "%s on device, attention over %lld", name, (long long)context));

done:
    return status;
}

// ---------------------------------------------------------------- all of them

static void release(device_case *c) {
    float **numbers[] = {&c->k, &c->v, &c->q, &c->out};
    c->be->cache->destroy(c->be, &c->cache);
    for (int i = 0; i < CLI_COUNT_OF(numbers); i++) {
        c->be->release(c->be, *numbers[i]);
        *numbers[i] = NULL;
    }
    kvq_free(c->be->ctx, c->read);
    c->read = NULL;
}

// All memory that is used later, also what the cache takes when it is needed first.
static kvq_status prepare(device_case *c, kvq_error *err) {
    double     seconds = 0;
    kvq_status status = KVQ_OK;
    KVQ_TRY(create(c, err));
    KVQ_TRY(make_numbers(c, err));
    KVQ_TRY(fill(c, c->data->n, c->data->n, err));
    KVQ_TRY(attend(c, 1, &seconds, err));

done:
    return status;
}

kvq_status bench_codec_on_device(bench_report *r, const kvq_backend *be, const codec_format *format,
                                 const codec_data *data, kvq_error *err) {
    device_case c = {.report = r, .be = be, .format = format, .data = data};
    kvq_status  status = KVQ_OK;
    KVQ_TRY(codec_contexts(r->options, c.contexts, &c.n_contexts, err));
    while ((status = prepare(&c, err)) == KVQ_ERR_MEMORY && c.n_contexts > 0) {
        release(&c);
        drop_longest(&c);
    }
    if (status != KVQ_OK) goto done;
    KVQ_TRY(measure_prefill(&c, err));
    KVQ_TRY(measure_append(&c, err));
    for (int i = 0; i < c.n_contexts; i++) KVQ_TRY(measure_attention(&c, c.contexts[i], err));

done:
    release(&c);
    return status;
}
