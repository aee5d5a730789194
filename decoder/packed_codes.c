// SPDX-License-Identifier: Apache-2.0
// How often a packed cache uses each of its codes, and how much of their bits that makes use of.
#include <math.h>

#include "packed_impl.h"

static void count_rows(const kvq_packed_layer *cache, int tensor, kvq_code_counts *counts) {
    const kvq_block_spec *spec = &cache->rows.specs[tensor];
    int64_t               row_bytes = kvq_block_row_bytes(spec), run;
    int64_t              *n = counts->n[spec->bits];
    for (int64_t token = 0; token < cache->rows.n_rows; token++) {
        const uint8_t *row = packed_pages_at(&cache->pages[tensor], token * row_bytes, row_bytes, &run);
        for (int c = 0; c < spec->d; c++) n[kvq_block_get_code(row, c, spec->bits)]++;
    }
}

// Tokens [first, end) of one tile.
static void count_tile(const kvq_tile_spec *spec, const uint8_t *tile, int64_t first, int64_t end,
                       kvq_code_counts *counts) {
    uint8_t codes[KVQ_TILE_TOKENS];
    for (int c = 0; c < spec->d / spec->dim; c++) {
        int64_t *n = counts->n[spec->widths[c]];
        kvq_tile_get_codes(&spec->columns[c], tile, 0, KVQ_TILE_TOKENS, codes);
        for (int64_t t = first; t < end; t++) n[codes[t]]++;
    }
}

void kvq_packed_layer_count_codes(const kvq_packed_layer *cache, int tensor, kvq_code_counts *counts) {
    if (!cache->tiled) {
        count_rows(cache, tensor, counts);
        return;
    }
    int64_t coded = packed_tiles_coded(cache);
    for (int64_t i = 0; i < packed_pages_for(coded); i++) {
        int64_t start = i * KVQ_TILE_TOKENS, end = packed_smaller(coded - start, KVQ_TILE_TOKENS);
        count_tile(&cache->tiles.views[tensor].spec, packed_tiles_at(cache, tensor, i), packed_sinks(cache, start, end),
                   end, counts);
    }
}

double kvq_code_use(const kvq_code_counts *counts) {
    double used = 0, bits = 0;
    for (int width = 1; width <= KVQ_MAX_BITS; width++) {
        int64_t n = 0;
        for (int code = 0; code < 1 << width; code++) n += counts->n[width][code];
        for (int code = 0; code < 1 << width; code++) {
            double share = n > 0 ? (double)counts->n[width][code] / (double)n : 0;
            if (share > 0) used -= (double)counts->n[width][code] * log2(share);
        }
        bits += (double)n * width;
    }
    return bits > 0 ? used / bits : (double)NAN;
}
