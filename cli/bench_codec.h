// SPDX-License-Identifier: Apache-2.0
//
// Private to the case `codec` of kvq-bench: the formats that it measures (bench_formats.c), on the CPU (bench_codec.c)
// and on a device (bench_device.c).
#ifndef KVQ_BENCH_CODEC_H
#define KVQ_BENCH_CODEC_H

#include "bench.h"

#define CODEC_MIN_SECONDS 0.05 // of one measurement; what is faster is repeated

// Specs of K and V with made-up tables: speed does not depend on what levels are.
typedef struct codec_format {
    const char    *name; // "nuq3"
    bool           tiled;
    int            d;
    kvq_block_spec rows[2];
    kvq_tile_spec  tiles[2];
    // owned, of K and of V
    float           *floats[2];
    uint8_t         *widths[2];
    int32_t         *table[2];
    kvq_tile_column *columns[2];
} codec_format;

enum { CODEC_N_FORMATS = 4 };
kvq_status codec_format_create(const kvq_context *ctx, int index, int n_kv_heads, int head_dim, codec_format *out,
                               kvq_error *err);
void       codec_format_free(const kvq_context *ctx, codec_format *format);
int64_t    codec_bytes(const codec_format *format, int tensor, int64_t n_tokens); // n_tokens whole tiles

// What is coded: K and V of n tokens, whole tiles, and their bytes as the CPU codes them.
typedef struct codec_data {
    int64_t  n;
    float   *x[2];      // [n, d], each number one that f16 has
    uint8_t *packed[2]; // codec_bytes
} codec_data;

// Tokens that are attended to, in whole tiles: what the options say, or the usual ones. KVQ_ERR_USAGE.
#define CODEC_MAX_CONTEXTS 16
kvq_status codec_contexts(const bench_options *o, int64_t contexts[CODEC_MAX_CONTEXTS], int *n, kvq_error *err);

// Prefill, append and attention of one format on a device with packed caches, its bytes compared with `data`.
kvq_status bench_codec_on_device(bench_report *r, const kvq_backend *be, const codec_format *format,
                                 const codec_data *data, kvq_error *err);

#endif
