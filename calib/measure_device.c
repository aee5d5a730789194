// SPDX-License-Identifier: Apache-2.0
//
// Histograms that are counted where K and V are, so that a window is not copied to the host for it. Sums are integers:
// what a device has counted is added to what the host has, whenever somebody wants to see it.
#include "calib_impl.h"

struct device_counts {
    const kvq_context         *ctx;
    const kvq_backend         *be;
    const kvq_measure_options *options;
    measure_shape              shape;
    float                     *counters; // backend: of all histograms
    float                     *scratch;  // backend
    float                     *head;     // host: counters of one head
};

static int64_t head_floats(const kvq_measure_options *o) {
    return kvq_counters_bytes(o->weightings) / (int64_t)sizeof(float);
}

// Percentiles of tokens are for comparisons only, and stay with the host.
bool device_counts_possible(const kvq_backend *be, const kvq_measure_options *options) {
    return be != NULL && be->count != NULL && options->token_range == KVQ_RANGE_EXTREMES;
}

int64_t device_counts_bytes(const kvq_backend *be, const kvq_measure_options *options, measure_shape shape) {
    if (!device_counts_possible(be, options)) return 0;
    int64_t scratch = be->count_scratch_floats(be, shape.seq_len, measure_width(shape));
    return (measure_histograms(options, shape) * head_floats(options) + scratch) * (int64_t)sizeof(float);
}

kvq_status device_counts_create(const kvq_context *ctx, const kvq_backend *be, const kvq_measure_options *options,
                                measure_shape shape, device_counts **out, kvq_error *err) {
    device_counts *c = NULL;
    kvq_status     status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "counters", &c, err));
    *c = (device_counts){.ctx = ctx, .be = be, .options = options, .shape = shape};
    KVQ_TRY(KVQ_NEW(ctx, head_floats(options), "counters", &c->head, err));
    *out = c;
    c = NULL;
done:
    device_counts_destroy(ctx, &c);
    return status;
}

void device_counts_destroy(const kvq_context *ctx, device_counts **counts) {
    device_counts *c = *counts;
    if (c == NULL) return;
    device_counts_drop(c);
    kvq_free(ctx, c->head);
    kvq_free(ctx, c);
    *counts = NULL;
}

kvq_status device_counts_begin(device_counts *c, kvq_error *err) {
    int64_t    counters = measure_histograms(c->options, c->shape) * head_floats(c->options);
    int64_t    scratch = c->be->count_scratch_floats(c->be, c->shape.seq_len, measure_width(c->shape));
    kvq_status status = KVQ_OK;
    device_counts_drop(c);
    KVQ_TRY(c->be->alloc(c->be, counters, "counters", &c->counters, err));
    KVQ_TRY(c->be->alloc(c->be, scratch, "normalised elements", &c->scratch, err));
done:
    return status;
}

void device_counts_drop(device_counts *c) {
    c->be->release(c->be, c->counters);
    c->be->release(c->be, c->scratch);
    c->counters = c->scratch = NULL;
}

bool device_counts_add(device_counts *c, int first, const kvq_block_spec *spec, const float *x, const float *dx) {
    kvq_count_rule rule = {.spec = spec,
                           .n_heads = c->shape.n_kv_heads,
                           .n_skip = c->options->sink_tokens,
                           .weightings = c->options->weightings};
    return kvq_count_check(spec, rule.n_heads, NULL) == KVQ_OK &&
           c->be->count(c->be, &rule, x, dx, c->shape.seq_len, c->counters + first * head_floats(c->options),
                        c->scratch) < 0;
}

kvq_status device_counts_take(device_counts *c, kvq_histogram *const *histograms, kvq_error *err) {
    int64_t n = measure_histograms(c->options, c->shape), floats = head_floats(c->options);
    for (int64_t i = 0; i < n; i++) {
        c->be->download(c->be, c->head, c->counters + i * floats, floats);
        kvq_status status = c->be->check(c->be, err);
        if (status != KVQ_OK) return status;
        kvq_histogram_merge_counters(histograms[i], c->head);
    }
    c->be->zero(c->be, c->counters, n * floats);
    return KVQ_OK;
}
