// SPDX-License-Identifier: Apache-2.0
//
// What a measurement keeps for the channel-allocated format: in the forward pass the mean square of V, which places the
// exponent of its scales; in the backward pass each channel of K by itself, and V after its rotation.
#include <string.h>

#include "calib_impl.h"

struct tile_measure {
    const kvq_context         *ctx;
    const kvq_measure_options *options;
    measure_shape              shape;
    int                        d;
    float                     *rotation;  // [D, D]
    int64_t                   *exponents; // [n_layers]
    kvq_fixed                  squares;   // forward: sum over windows of the mean square of V
    kvq_channel_counts       **channels;  // backward: [n_fractions]
    kvq_value_counts          *values;    // backward
};

kvq_status measure_tiles_create(const kvq_context *ctx, const kvq_measure_options *options, measure_shape shape,
                                tile_measure **out, kvq_error *err) {
    tile_measure *t = NULL;
    const char   *kind;
    int64_t       D = shape.head_dim;
    kvq_status    status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "measurement for tiles", &t, err));
    t->ctx = ctx;
    t->options = options;
    t->shape = shape;
    t->d = shape.n_kv_heads * shape.head_dim;
    KVQ_TRY(KVQ_NEW(ctx, D * D, "rotation of values", &t->rotation, err));
    KVQ_TRY(KVQ_NEW(ctx, shape.n_layers, "exponents of scales", &t->exponents, err));
    KVQ_TRY(KVQ_NEW(ctx, options->n_fractions, "counts of channels", &t->channels, err));
    KVQ_TRY(kvq_make_rotation(ctx, options->rotation, shape.head_dim, t->rotation, &kind, err));
    *out = t;
    t = NULL;
done:
    measure_tiles_destroy(ctx, &t);
    return status;
}

void measure_tiles_drop(tile_measure *t) {
    for (int f = 0; t->channels != NULL && f < t->options->n_fractions; f++)
        kvq_channel_counts_destroy(t->ctx, &t->channels[f]);
    kvq_value_counts_destroy(t->ctx, &t->values);
}

void measure_tiles_destroy(const kvq_context *ctx, tile_measure **tiles) {
    tile_measure *t = *tiles;
    if (t == NULL) return;
    measure_tiles_drop(t);
    kvq_free(ctx, t->channels);
    kvq_free(ctx, t->rotation);
    kvq_free(ctx, t->exponents);
    kvq_free(ctx, t);
    *tiles = NULL;
}

// Scratch of counting is small beside them: 2 KiB a channel instead of 32.
int64_t measure_tiles_bytes(const kvq_measure_options *options, measure_shape shape) {
    int d = shape.n_kv_heads * shape.head_dim;
    return options->n_fractions * kvq_channel_counts_bytes(d) + kvq_value_counts_bytes();
}

// ---------------------------------------------------------------- forward

void measure_tiles_begin_forward(tile_measure *t) {
    measure_tiles_drop(t);
    memset(&t->squares, 0, sizeof t->squares);
}

// The mean of a window is a sum in a fixed order; those of windows add up exactly.
void measure_tiles_see_forward(tile_measure *t, const float *v) {
    int64_t skip = t->options->sink_tokens * t->d, n = t->shape.seq_len * t->d - skip;
    double  sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)v[skip + i] * (double)v[skip + i];
    kvq_fixed_add(&t->squares, sum / (double)n);
}

void measure_tiles_finish_forward(tile_measure *t, int64_t layer) {
    t->exponents[layer] = kvq_scale_exponent(kvq_fixed_to_double(t->squares) / (double)t->shape.n_windows);
}

kvq_fixed *measure_tiles_squares(tile_measure *t) { return &t->squares; }
int64_t   *measure_tiles_exponent(tile_measure *t, int64_t layer) { return &t->exponents[layer]; }

// ---------------------------------------------------------------- backward

kvq_status measure_tiles_begin_backward(tile_measure *t, kvq_error *err) {
    kvq_status status = KVQ_OK;
    measure_tiles_drop(t);
    for (int f = 0; f < t->options->n_fractions; f++)
        KVQ_TRY(kvq_channel_counts_create(t->ctx, t->d, &t->channels[f], err));
    KVQ_TRY(kvq_value_counts_create(t->ctx, &t->values, err));
done:
    return status;
}

kvq_status measure_tiles_see_keys(tile_measure *t, int fraction, const kvq_block_spec *spec, const float *k,
                                  const float *dk, kvq_error *err) {
    return kvq_count_channels(t->ctx, spec, k, dk, t->options->channel_weighting, t->shape.seq_len,
                              t->options->sink_tokens, t->channels[fraction], err);
}

kvq_status measure_tiles_see_values(tile_measure *t, int64_t layer, const float *v, const float *dv, kvq_error *err) {
    kvq_tile_spec spec = {.d = t->d,
                          .head_dim = t->shape.head_dim,
                          .rotation = t->rotation,
                          .scale_format = t->options->scale_format,
                          .scale_exponent = (int)t->exponents[layer]};
    return kvq_count_values(t->ctx, &spec, v, dv, t->options->channel_weighting, t->shape.seq_len,
                            t->options->sink_tokens, t->values, err);
}

kvq_status measure_tiles_save(const tile_measure *t, kvq_blob *out, kvq_error *err) {
    uint8_t   *at = NULL;
    kvq_status status = KVQ_OK;
    for (int f = 0; f < t->options->n_fractions; f++) {
        KVQ_TRY(blob_append_sized(t->ctx, out, kvq_channel_counts_packed_bytes(t->channels[f]), &at, err));
        kvq_channel_counts_pack(t->channels[f], at);
    }
    KVQ_TRY(blob_append_sized(t->ctx, out, kvq_value_counts_packed_bytes(t->values), &at, err));
    kvq_value_counts_pack(t->values, at);
done:
    return status;
}

kvq_status measure_tiles_merge(tile_measure *t, blob_reader *in, kvq_error *err) {
    const uint8_t *at = NULL;
    int64_t        bytes = 0;
    kvq_status     status = KVQ_OK;
    for (int f = 0; f < t->options->n_fractions; f++) {
        KVQ_TRY(blob_take_sized(in, &at, &bytes, err));
        KVQ_TRY(kvq_channel_counts_merge_packed(t->channels[f], at, bytes, err));
    }
    KVQ_TRY(blob_take_sized(in, &at, &bytes, err));
    KVQ_TRY(kvq_value_counts_merge_packed(t->values, at, bytes, err));
done:
    return status;
}

kvq_status measure_tiles_fill(const tile_measure *t, int64_t layer, kvq_measured_layer *to, kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int f = 0; f < t->options->n_fractions; f++)
        KVQ_TRY(kvq_channel_distribution_take(t->channels[f], &to->k[f].channels, err));
    KVQ_TRY(kvq_value_distribution_take(t->values, &to->rotated, err));
    *to->rotated.scale_exponent = t->exponents[layer];
done:
    if (status != KVQ_OK) kvq_error_prefix(err, "layer %lld: ", (long long)layer);
    return status;
}
