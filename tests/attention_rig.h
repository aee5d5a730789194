// SPDX-License-Identifier: Apache-2.0
//
// Between test_cuda_attention.cpp and the packed cache: artifacts of any shape, and sequences that were appended to a
// kvq_packed_layer, as its saved bytes (docs/packed-cache.md) and as it decodes them. In C, as the rig of the packed
// cache is.
#ifndef ATTENTION_RIG_H
#define ATTENTION_RIG_H

#include "kvq_decoder.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attention_setup {
    bool    tiled;
    int     n_kv_heads, head_dim;
    int     k_bits, v_bits; // rows
    int     n_side;         // outliers of a token and side
    int     n_slots;        // of a tile
    int     dim;            // channels of a column of values in tiles
    int     half_scales;    // f16 scales of values in tiles, otherwise e4m3
    bool    per_head;       // rows: tables for each KV head, with a second one for decoding
    bool    swapped;        // rows: ranges of keys per token, of values per channel
    int64_t sinks, recent;  // recent: of rows
    float   spread;         // of keys and values; ranges of channels reach to about 0.9
    bool    flush;          // what is open or recent is coded after half of the tokens, or after all
} attention_setup;

// What the codec needs of a layer of an artifact.
typedef struct attention_rig {
    attention_setup with;
    kvq_block_spec  rows[2];
    kvq_tile_spec   tiles[2];
    int             n_key_levels; // of tiles[0].levels
    void           *owner;
} attention_rig;
// An artifact of one layer, and it.
void attention_rig_open(const attention_setup *with, attention_rig *out);
// A layer of somebody else's artifact, which is borrowed.
void attention_rig_describe(const kvq_artifact *artifact, const attention_setup *with, int64_t layer,
                            attention_rig *out);
void attention_rig_close(attention_rig *rig);
// An empty cache of an artifact of our own (kvq_packed_layer_destroy), and who appends to it.
kvq_packed_layer  *attention_rig_cache(const attention_rig *rig, int64_t capacity);
const kvq_backend *attention_rig_backend(const attention_rig *rig);
// n numbers in [-spread, spread] or so, the same for the same stream; release with free
float *attention_rig_numbers(const attention_rig *rig, int64_t n, uint32_t stream);

typedef struct attention_sequence {
    int64_t  length, coded;
    int64_t  n_waiting;   // f16 tokens behind rows or tiles
    uint8_t *parts[3][2]; // sinks, rows or tiles, waiting, each of K and V: point into `saved`
    uint8_t *saved;
    float   *k, *v; // [length, d] decoded
} attention_sequence;
// n random tokens, in several pieces.
void attention_sequence_open(const attention_rig *rig, int64_t n, uint32_t stream, attention_sequence *out);
// What a cache holds.
void attention_sequence_of(const attention_rig *rig, const kvq_backend *be, const kvq_packed_layer *cache,
                           attention_sequence *out);
void attention_sequence_close(attention_sequence *sequence);

#ifdef __cplusplus
}
#endif
#endif
