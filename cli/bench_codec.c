// SPDX-License-Identifier: Apache-2.0
//
// The case `codec`: keys and values of one layer into the two formats of the cache and back. Rates are bytes of the f16
// cache that is replaced, 2 for each element, and beside them bytes of codes, outliers, ranges and scales. What was
// measured is compared with what one thread makes of the same tokens, byte for byte.
#include <math.h>
#include <string.h>

#include "bench_codec.h"

static const char *const TENSORS[2] = {"K", "V"};

typedef struct codec_case {
    bench_report *report;
    kvq_backend  *be, *single; // all threads, one
    kvq_context   one;         // of the single one
    codec_format  format;
    codec_data    data;
    uint8_t      *packed; // of what is measured
    float        *decoded[2];
} codec_case;

// ---------------------------------------------------------------- numbers

// Normal by Box and Muller, rounded to f16, as activations of a model in f16 are.
static float normal_of(uint32_t stream, uint64_t i) {
    double u = kvq_rng_uniform(0, KVQ_RNG_BENCH, stream, 2 * i),
           v = kvq_rng_uniform(0, KVQ_RNG_BENCH, stream, 2 * i + 1);
    double x = sqrt(-2 * log(1 - u)) * cos(6.283185307179586 * v);
    return kvq_float_of_half(kvq_half_of_float((float)x));
}

static kvq_status make_data(const kvq_context *ctx, int64_t n, int d, codec_data *data, kvq_error *err) {
    kvq_status status = KVQ_OK;
    data->n = n;
    for (int i = 0; i < 2; i++) {
        KVQ_TRY(KVQ_NEW(ctx, n * d, "keys and values", &data->x[i], err));
        for (int64_t j = 0; j < n * d; j++) data->x[i][j] = normal_of(32 + (uint32_t)i, (uint64_t)j);
    }

done:
    return status;
}

// ---------------------------------------------------------------- the codec

static kvq_status encode(const kvq_backend *be, const codec_case *c, int tensor, uint8_t *out, kvq_error *err) {
    int64_t    bad = -1;
    kvq_status status = KVQ_OK;
    if (c->format.tiled)
        status = be->encode_tiles(be, &c->format.tiles[tensor], c->data.x[tensor], 0, c->data.n, out, &bad, err);
    else
        bad = be->encode(be, &c->format.rows[tensor], c->data.x[tensor], c->data.n, out);
    if (status == KVQ_OK && bad >= 0)
        status = kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "codec: token %lld does not fit into f16", (long long)bad);
    return status;
}

static kvq_status decode(const kvq_backend *be, const codec_case *c, int tensor, float *out, kvq_error *err) {
    (void)err;
    if (c->format.tiled)
        be->decode_tiles(be, &c->format.tiles[tensor], c->data.packed[tensor], 0, c->data.n, out);
    else
        be->decode(be, &c->format.rows[tensor], c->data.packed[tensor], c->data.n, out);
    return KVQ_OK;
}

// What is measured goes to memory of its own.
static kvq_status run(const codec_case *c, int tensor, bool decodes, int64_t times, double *seconds, kvq_error *err) {
    kvq_status status = KVQ_OK;
    double     start = kvq_now_s();
    for (int64_t i = 0; i < times && status == KVQ_OK; i++)
        status = decodes ? decode(c->be, c, tensor, c->decoded[0], err) : encode(c->be, c, tensor, c->packed, err);
    *seconds = kvq_now_s() - start;
    return status;
}

static kvq_status differs(const codec_case *c, int tensor, const char *what, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTERNAL, "please report it, with the processor and the compiler",
                    "codec: %s %s: what was measured has other %s than one thread gives", c->format.name,
                    TENSORS[tensor], what);
}

static kvq_status compare(const codec_case *c, int tensor, kvq_error *err) {
    int64_t    bytes = codec_bytes(&c->format, tensor, c->data.n);
    size_t     floats = (size_t)(c->data.n * c->format.d) * sizeof(float);
    kvq_status status = KVQ_OK;
    if (memcmp(c->packed, c->data.packed[tensor], (size_t)bytes) != 0) return differs(c, tensor, "bytes", err);
    KVQ_TRY(decode(c->single, c, tensor, c->decoded[1], err));
    if (memcmp(c->decoded[0], c->decoded[1], floats) != 0) return differs(c, tensor, "decoded values", err);

done:
    return status;
}

static kvq_status measure(codec_case *c, int tensor, bool decodes, kvq_error *err) {
    static const char *const WAYS[2] = {"encode", "decode"};
    bench_report            *r = c->report;
    double                   bytes = (double)codec_bytes(&c->format, tensor, c->data.n);
    double                   f16 = (double)(c->data.n * c->format.d) * 2, seconds = 0;
    bench_series             series = {.n = (int)r->options->repeats};
    kvq_status               status = KVQ_OK;
    KVQ_TRY(run(c, tensor, decodes, 1, &seconds, err));
    int64_t times = (int64_t)(CODEC_MIN_SECONDS / fmax(seconds, 1e-6)) + 1;
    for (int i = 0; i < series.n; i++) {
        KVQ_TRY(run(c, tensor, decodes, times, &seconds, err));
        series.values[i] = f16 * 1e-9 * (double)times / seconds;
    }
    bench_series packed = bench_scaled(&series, bytes / f16);
    const char  *name = c->format.name, *way = WAYS[decodes];
    KVQ_TRY(bench_add(r, &series, "GB/s f16", err, "%s %s %s", name, TENSORS[tensor], way));
    KVQ_TRY(bench_add(r, &packed, "GB/s packed", err, "%s %s %s", name, TENSORS[tensor], way));

done:
    return status;
}

static kvq_status measure_tensor(codec_case *c, int tensor, kvq_error *err) {
    double       elements = (double)(c->data.n * c->format.d);
    bench_series bits = {{8 * (double)codec_bytes(&c->format, tensor, c->data.n) / elements}, 1};
    kvq_status   status = KVQ_OK;
    KVQ_TRY(bench_add(c->report, &bits, "bits", err, "%s %s, of an element", c->format.name, TENSORS[tensor]));
    KVQ_TRY(measure(c, tensor, false, err));
    KVQ_TRY(encode(c->single, c, tensor, c->data.packed[tensor], err));
    KVQ_TRY(measure(c, tensor, true, err));
    KVQ_TRY(compare(c, tensor, err));

done:
    return status;
}

// ---------------------------------------------------------------- the case

static kvq_status make_room(const kvq_context *ctx, codec_case *c, kvq_error *err) {
    int64_t    n_floats = c->data.n * c->format.d, bytes[2];
    kvq_status status = KVQ_OK;
    for (int i = 0; i < 2; i++) {
        bytes[i] = codec_bytes(&c->format, i, c->data.n);
        KVQ_TRY(KVQ_NEW(ctx, bytes[i], "packed tokens", &c->data.packed[i], err));
        KVQ_TRY(KVQ_NEW(ctx, n_floats, "decoded tokens", &c->decoded[i], err));
    }
    KVQ_TRY(KVQ_NEW(ctx, bytes[0] > bytes[1] ? bytes[0] : bytes[1], "packed tokens", &c->packed, err));

done:
    return status;
}

static void free_room(const kvq_context *ctx, codec_case *c) {
    for (int i = 0; i < 2; i++) {
        kvq_free(ctx, c->data.packed[i]);
        kvq_free(ctx, c->decoded[i]);
        c->data.packed[i] = NULL;
        c->decoded[i] = NULL;
    }
    kvq_free(ctx, c->packed);
    c->packed = NULL;
    codec_format_free(ctx, &c->format);
}

static kvq_status measure_format(codec_case *c, int index, const kvq_backend *device, kvq_error *err) {
    const bench_options *o = c->report->options;
    const kvq_context   *ctx = &c->report->cli->ctx;
    kvq_status           status = KVQ_OK;
    KVQ_TRY(codec_format_create(ctx, index, (int)o->kv_heads, (int)o->head_dim, &c->format, err));
    KVQ_TRY(make_room(ctx, c, err));
    for (int i = 0; i < 2; i++) KVQ_TRY(measure_tensor(c, i, err));
    if (device->cache != NULL) KVQ_TRY(bench_codec_on_device(c->report, device, &c->format, &c->data, err));

done:
    free_room(ctx, c);
    return status;
}

static kvq_status check_shape(const bench_options *o, kvq_error *err) {
    int64_t contexts[CODEC_MAX_CONTEXTS];
    int     n = 0;
    if (o->head_dim % 2 != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--head-dim %lld is odd: values are coded in pairs of channels",
                        (long long)o->head_dim);
    if (o->kv_heads * o->head_dim >= (int64_t)KVQ_NO_CHANNEL)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld KV heads of %lld channels are more than %d channels",
                        (long long)o->kv_heads, (long long)o->head_dim, (int)KVQ_NO_CHANNEL - 1);
    return codec_contexts(o, contexts, &n, err);
}

// What a person may take for a speed, or expect.
static void tell_device(bench_report *r, const kvq_backend *device) {
    const bench_options *o = r->options;
    if (device->cache == NULL) {
        if (o->engine.device == NULL && device->fallback[0] != 0)
            kvq_cli_say(r->cli, "codec      on the CPU alone: %s", device->fallback);
        return;
    }
    kvq_cli_say(r->cli, "codec      also on %s", device->device);
    if (strstr(device->device, "emulated") != NULL)
        kvq_cli_say(r->cli, "codec      an emulated device: its bytes are compared, its times mean nothing");
}

kvq_status bench_codec(bench_report *r, kvq_error *err) {
    const bench_options *o = r->options;
    codec_case           c = {.report = r, .one = r->cli->ctx};
    kvq_backend         *device = NULL;
    int64_t              n = (o->tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS * KVQ_TILE_TOKENS;
    kvq_status           status = KVQ_OK;
    c.one.n_threads = 1;
    KVQ_TRY(check_shape(o, err));
    KVQ_TRY(kvq_backend_cpu(&r->cli->ctx, KVQ_COMPUTE_F32, &c.be, err));
    KVQ_TRY(kvq_backend_cpu(&c.one, KVQ_COMPUTE_F32, &c.single, err));
    KVQ_TRY(kvq_cli_backend(r->cli, &o->engine, &device, err));
    tell_device(r, device);
    KVQ_TRY(make_data(&r->cli->ctx, n, (int)(o->kv_heads * o->head_dim), &c.data, err));
    for (int i = 0; i < CODEC_N_FORMATS; i++) KVQ_TRY(measure_format(&c, i, device, err));

done:
    for (int i = 0; i < 2; i++) kvq_free(&r->cli->ctx, c.data.x[i]);
    if (device != NULL) device->destroy(&device);
    if (c.single != NULL) c.single->destroy(&c.single);
    if (c.be != NULL) c.be->destroy(&c.be);
    return status;
}
