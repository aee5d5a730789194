// SPDX-License-Identifier: Apache-2.0
//
// The formats that the case `codec` measures: rows of 4, 3 and 2 bits with 1 % of outliers, and the channel-allocated
// format at about 3 bits, keys of 2 and 3 bits with 1 % of outliers and rotated values in pairs.
#include <math.h>

#include "bench_codec.h"

#define OUTLIERS   0.01
#define HALF_RANGE 2.576f // 1 % of a normal distribution lies beyond
#define PAIR_WIDTH 6      // bits of two channels of a value

static const struct {
    const char *name;
    int         bits; // of rows; 0: tiles
} FORMATS[CODEC_N_FORMATS] = {{"nuq4", 4}, {"nuq3", 3}, {"nuq2", 2}, {"alloc3", 0}};

static const uint8_t KEY_WIDTHS[] = {2, 3, 3, 3}; // of channels in turn

// Level i of n, ascending in (-1, 1) and denser around 0.
static float level_of(int i, int n) {
    float at = (float)(2 * i + 1) / (float)n - 1;
    return at * sqrtf(fabsf(at));
}

static kvq_status make_rows(const kvq_context *ctx, int bits, int tensor, codec_format *f, kvq_error *err) {
    int        d = f->d, n_levels = 1 << bits;
    kvq_status status = KVQ_NEW(ctx, n_levels + 2 * d, "tables", &f->floats[tensor], err);
    if (status != KVQ_OK) return status;
    float *levels = f->floats[tensor], *z = levels + n_levels, *r = z + d;
    for (int i = 0; i < n_levels; i++) levels[i] = level_of(i, n_levels);
    for (int c = 0; c < d; c++) {
        z[c] = 0.0625f * (float)(c % 5);
        r[c] = HALF_RANGE;
    }
    kvq_block_spec spec = {.d = d,
                           .bits = bits,
                           .n_side = kvq_block_n_side(OUTLIERS, d),
                           .levels = levels,
                           .z = tensor == 0 ? z : NULL,
                           .r = tensor == 0 ? r : NULL};
    f->rows[tensor] = spec;
    return KVQ_OK;
}

static kvq_status make_columns(const kvq_context *ctx, int tensor, int n_columns, codec_format *f, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, n_columns, "widths", &f->widths[tensor], err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns, "tables", &f->table[tensor], err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns, "planes", &f->columns[tensor], err));

done:
    return status;
}

static kvq_status make_keys(const kvq_context *ctx, int head_dim, codec_format *f, kvq_error *err) {
    int        d = f->d, n_levels = 0;
    kvq_status status = make_columns(ctx, 0, d, f, err);
    if (status != KVQ_OK) return status;
    for (int c = 0; c < d; c++) {
        f->widths[0][c] = KEY_WIDTHS[c % CLI_COUNT_OF(KEY_WIDTHS)];
        f->table[0][c] = n_levels;
        n_levels += 1 << f->widths[0][c];
    }
    status = KVQ_NEW(ctx, n_levels + 2 * d, "tables", &f->floats[0], err);
    if (status != KVQ_OK) return status;
    float *levels = f->floats[0], *z = levels + n_levels, *r = z + d;
    for (int c = 0; c < d; c++) {
        int n = 1 << f->widths[0][c];
        for (int i = 0; i < n; i++) levels[f->table[0][c] + i] = level_of(i, n);
        z[c] = 0.0625f * (float)(c % 5);
        r[c] = HALF_RANGE;
    }
    (void)kvq_tile_layout(f->widths[0], d, head_dim, f->columns[0]);
    kvq_tile_spec spec = {.d = d,
                          .head_dim = head_dim,
                          .dim = 1,
                          .widths = f->widths[0],
                          .columns = f->columns[0],
                          .levels = levels,
                          .table = f->table[0],
                          .z = z,
                          .r = r,
                          .middle = z,
                          .half = r,
                          .n_side = kvq_block_n_side(4 * OUTLIERS, d),
                          .n_slots = kvq_tile_slots(OUTLIERS, d)};
    f->tiles[0] = spec;
    return KVQ_OK;
}

static kvq_status make_values(const kvq_context *ctx, int head_dim, codec_format *f, kvq_error *err) {
    int         n_columns = f->d / 2, side = 1 << PAIR_WIDTH / 2, n_levels = side * side;
    const char *kind = NULL;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(make_columns(ctx, 1, n_columns, f, err));
    KVQ_TRY(KVQ_NEW(ctx, 2 * (int64_t)n_levels + (int64_t)head_dim * head_dim, "tables", &f->floats[1], err));
    float *levels = f->floats[1], *rotation = levels + 2 * n_levels;
    KVQ_TRY(kvq_make_rotation(ctx, KVQ_ROTATION_ORTHOGONAL, head_dim, rotation, &kind, err));
    for (int i = 0; i < 2 * n_levels; i++) levels[i] = 2.5f * level_of(i % 2 == 0 ? i / 2 % side : i / 2 / side, side);
    for (int c = 0; c < n_columns; c++) f->widths[1][c] = PAIR_WIDTH;
    (void)kvq_tile_layout(f->widths[1], n_columns, head_dim / 2, f->columns[1]);
    kvq_tile_spec spec = {.d = f->d,
                          .head_dim = head_dim,
                          .dim = 2,
                          .widths = f->widths[1],
                          .columns = f->columns[1],
                          .levels = levels,
                          .table = f->table[1],
                          .rotation = rotation,
                          .scale_format = KVQ_SCALE_E4M3,
                          .scale_exponent = -4};
    f->tiles[1] = spec;

done:
    return status;
}

kvq_status codec_format_create(const kvq_context *ctx, int index, int n_kv_heads, int head_dim, codec_format *out,
                               kvq_error *err) {
    int        bits = FORMATS[index].bits;
    kvq_status status = KVQ_OK;
    *out = (codec_format){.name = FORMATS[index].name, .tiled = bits == 0, .d = n_kv_heads * head_dim};
    if (bits > 0) {
        for (int i = 0; i < 2; i++) KVQ_TRY(make_rows(ctx, bits, i, out, err));
    } else {
        KVQ_TRY(make_keys(ctx, head_dim, out, err));
        KVQ_TRY(make_values(ctx, head_dim, out, err));
    }

done:
    return status;
}

void codec_format_free(const kvq_context *ctx, codec_format *f) {
    for (int i = 0; i < 2; i++) {
        kvq_free(ctx, f->floats[i]);
        kvq_free(ctx, f->widths[i]);
        kvq_free(ctx, f->table[i]);
        kvq_free(ctx, f->columns[i]);
    }
}

int64_t codec_bytes(const codec_format *f, int tensor, int64_t n_tokens) {
    return f->tiled ? n_tokens / KVQ_TILE_TOKENS * kvq_tile_bytes(&f->tiles[tensor])
                    : n_tokens * kvq_block_row_bytes(&f->rows[tensor]);
}
