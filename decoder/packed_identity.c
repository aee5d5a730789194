// SPDX-License-Identifier: Apache-2.0
//
// What the bytes of a packed cache mean depends on the model and on the tables of its layer. A hash over both says
// which ones they were, so that a cache is not read with others. docs/packed-cache.md lists what is hashed; numbers are
// little-endian, an array is its count and its elements, and one that is not there has none.
#include <string.h>

#include "packed_impl.h"

#define STAGED_WORDS 256

static void push_number(kvq_sha256 *hash, int64_t number) {
    uint8_t bytes[8];
    kvq_block_store_word(bytes, (uint32_t)((uint64_t)number & 0xffffffffu));
    kvq_block_store_word(bytes + 4, (uint32_t)((uint64_t)number >> 32));
    kvq_sha256_push(hash, bytes, sizeof bytes);
}

static void push_text(kvq_sha256 *hash, const char *text) {
    push_number(hash, (int64_t)strlen(text));
    kvq_sha256_push(hash, text, strlen(text));
}

// n numbers of 32 bits, of any kind; words may be NULL.
static void push_words(kvq_sha256 *hash, const void *words, int64_t n) {
    const unsigned char *from = words;
    uint8_t              bytes[4 * STAGED_WORDS];
    n = words != NULL ? n : 0;
    push_number(hash, n);
    for (int64_t first = 0, count; first < n; first += count) {
        count = packed_smaller(n - first, STAGED_WORDS);
        for (int64_t i = 0; i < count; i++) {
            uint32_t word;
            memcpy(&word, from + 4 * (first + i), sizeof word);
            kvq_block_store_word(bytes + 4 * i, word);
        }
        kvq_sha256_push(hash, bytes, (size_t)(4 * count));
    }
}

static void push_rows(kvq_sha256 *hash, const kvq_block_spec *s) {
    int64_t n_levels = (int64_t)(s->n_groups > 0 ? s->n_groups : 1) << s->bits;
    push_number(hash, s->bits);
    push_number(hash, s->n_side);
    push_number(hash, s->clamp_zero);
    push_words(hash, s->levels, n_levels);
    push_words(hash, s->decoded, n_levels);
    push_words(hash, s->z, s->d);
    push_words(hash, s->r, s->d);
    push_words(hash, s->grid_z, s->d);
}

static void push_tiles(kvq_sha256 *hash, const kvq_tile_spec *s) {
    int64_t n_columns = s->d / s->dim, n_levels = 0;
    for (int64_t c = 0; c < n_columns; c++) {
        int64_t end = s->table[c] + ((int64_t)1 << s->widths[c]);
        n_levels = end > n_levels ? end : n_levels;
    }
    push_number(hash, s->dim);
    push_number(hash, s->n_side);
    push_number(hash, s->n_slots);
    push_number(hash, (int64_t)s->scale_format);
    push_number(hash, s->scale_exponent);
    push_number(hash, n_columns);
    kvq_sha256_push(hash, s->widths, (size_t)n_columns);
    push_words(hash, s->table, n_columns);
    push_words(hash, s->levels, n_levels * s->dim);
    push_words(hash, s->z, s->d);
    push_words(hash, s->r, s->d);
    push_words(hash, s->middle, s->d);
    push_words(hash, s->half, s->d);
    push_words(hash, s->rotation, (int64_t)s->head_dim * s->head_dim);
}

kvq_status packed_identity(const kvq_packed_layer *cache, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    const kvq_artifact *a = cache->artifact;
    kvq_sha256         *hash = NULL;
    kvq_status          status = kvq_sha256_create(&hash, err);
    if (status != KVQ_OK) return status;
    push_text(hash, a->model.architecture);
    push_text(hash, a->model.config_sha256);
    push_text(hash, a->model.weights_sha256);
    push_number(hash, (int64_t)a->layers[cache->layer].k.domain);
    for (int i = 0; i < 2; i++) {
        if (cache->tiled)
            push_tiles(hash, &cache->tiles.views[i].spec);
        else
            push_rows(hash, &cache->rows.specs[i]);
    }
    kvq_sha256_finalize(&hash, hex);
    return KVQ_OK;
}
