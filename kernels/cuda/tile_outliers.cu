// SPDX-License-Identifier: Apache-2.0
//
// Outliers of tiles of keys on the device, in three kernels, because each choice is made among more than the one
// before: a block a token lists its candidates (n_side per side), a block a tile cuts them to n_slots, and as many
// blocks as there are slots sort what is left and store it. Between them the candidates lie in scratch, in no order:
// each carries its rank in its key.
#include "codec_select.cuh"
#include "tiles_impl.cuh"

enum {
    TOKEN_THREADS = 256,
    TILE_THREADS = 256,
    SLOT_THREADS = 256,
    PLACE_BITS = 23, // of token * d + channel in a tile, with d below 2^16
};

// Scratch of all tiles.
struct Scratch {
    KVQ_GLOBAL(select_key) keys;       // [tokens, per_token] candidates
    KVQ_GLOBAL(unsigned) n_candidates; // [tokens]
    KVQ_GLOBAL(unsigned) chosen;       // [tiles, n_slots] places in the order of storage, see sorted_place
    KVQ_GLOBAL(unsigned) n_chosen;     // [tiles]
    int per_token;
};

// ---------------------------------------------------------------- a token

// A candidate among those of its tile: the largest |x'| first, then the lowest place.
KVQ_DEVICE select_key key_in_tile(const TileSpec &s, select_key key, int t) {
    int place = t * s.d + channel_of_key(KeyToken(), UPPER, key);
    return key >> 16 << PLACE_BITS | (select_key)((1 << PLACE_BITS) - 1 - place);
}

KVQ_KERNEL KVQ_BOUNDS(TOKEN_THREADS, MIN_BLOCKS)
    list_candidates(TileSpec s, Tokens tokens, KVQ_GLOBAL(const float) x, Scratch scratch) {
    KVQ_DYNAMIC_SHARED(select_key, list);
    KVQ_SHARED(unsigned, n_listed, 2);
    KVQ_SHARED(select_key, limit, 2);
    int64_t token = blockIdx.x;
    int     thread = (int)threadIdx.x;
    if (!is_coded(tokens, token)) { // of all threads
        if (thread == 0) scratch.n_candidates[token] = 0;
        return;
    }
    KeyToken keys = {x + token * s.d, s.middle, s.half};
    Chosen   chosen = {list, n_listed, limit};
    choose_outliers(keys, s.d, s.n_side, chosen);
    int n_upper = (int)chosen.n[UPPER], n = n_upper + (int)chosen.n[LOWER];
    for (int i = thread; i < n; i += (int)blockDim.x) {
        select_key key = list[i < n_upper ? i : s.n_side + i - n_upper];
        scratch.keys[token * scratch.per_token + i] = key_in_tile(s, key, (int)(token % KVQ_TILE_TOKENS));
    }
    if (thread == 0) scratch.n_candidates[token] = (unsigned)n;
}

// ---------------------------------------------------------------- a tile

// Candidates of a tile.
struct TileCandidates {
    enum { DIGITS = 7 }; // 31 bits of |x'| and a place
    KVQ_GLOBAL(const select_key) keys;
    KVQ_GLOBAL(const unsigned) n;
    int per_token;
};

KVQ_DEVICE select_key key_at(const TileCandidates &tile, int, int i) {
    return i % tile.per_token < (int)tile.n[i / tile.per_token] ? (select_key)tile.keys[i] : 0;
}

// (head, token, channel) as one number, ordered as entries are stored.
KVQ_DEVICE unsigned sorted_place(const TileSpec &s, select_key key) {
    int place = (1 << PLACE_BITS) - 1 - (int)(key & ((1 << PLACE_BITS) - 1));
    int t = place / s.d, c = place % s.d, head = c / s.head_dim;
    return (unsigned)((head * KVQ_TILE_TOKENS + t) * s.head_dim + c % s.head_dim);
}

KVQ_KERNEL KVQ_BOUNDS(TILE_THREADS, MIN_BLOCKS) cut_candidates(TileSpec s, Scratch scratch) {
    KVQ_SHARED(unsigned, count, 2); // of candidates, of chosen ones
    KVQ_SHARED(select_key, limit, 1);
    ptrdiff_t      tile = blockIdx.x;
    int            thread = (int)threadIdx.x, n = KVQ_TILE_TOKENS * scratch.per_token;
    TileCandidates keys = {scratch.keys + tile * n, scratch.n_candidates + tile * KVQ_TILE_TOKENS, scratch.per_token};
    if (thread < 2) count[thread] = 0;
    if (thread == 0) limit[0] = 0;
    __syncthreads();
    for (int t = thread; t < KVQ_TILE_TOKENS; t += TILE_THREADS) atomicAdd(&count[0], keys.n[t]);
    __syncthreads();
    if (count[0] > (unsigned)s.n_slots) find_rank<1>(keys, n, (unsigned)s.n_slots, count, limit);
    select_key lowest = limit[0];
    for (int i = thread; i < n; i += TILE_THREADS) {
        select_key key = key_at(keys, 0, i);
        if (key > lowest) scratch.chosen[tile * s.n_slots + (int)atomicAdd(&count[1], 1u)] = sorted_place(s, key);
    }
    __syncthreads();
    if (thread == 0) scratch.n_chosen[tile] = count[1];
}

// ---------------------------------------------------------------- slots

// Stores an entry. Returns 0 when its residual does not fit into f16.
KVQ_DEVICE int store_entry(const TileSpec &s, KVQ_GLOBAL(const float) x, int64_t token, int c, int within, int rank,
                           KVQ_GLOBAL(uint8_t) entries) {
    float    value = x[token * s.d + c];
    uint32_t t = (uint32_t)(token % KVQ_TILE_TOKENS);
    uint32_t residual = kvq_half_of_float(value - decoded_key(s, code_of_key(s, value, c), c));
    kvq_as<uint32_t>(entries)[rank] = t << 9 | (uint32_t)within | residual << 16;
    return kvq_half_is_finite((uint16_t)residual);
}

// Thread i has entry i and count i of its tile: it finds the rank of the one and adds up the other. What is not used is
// zero.
KVQ_KERNEL KVQ_BOUNDS(SLOT_THREADS, MIN_BLOCKS)
    store_outliers(TileSpec s, Scratch scratch, KVQ_GLOBAL(const float) x, KVQ_GLOBAL(uint8_t) tiles,
                   KVQ_GLOBAL_ALIASED(int) first_bad) {
    ptrdiff_t tile = blockIdx.x;
    int       i = (int)blockIdx.y * (int)blockDim.x + (int)threadIdx.x, n = (int)scratch.n_chosen[tile];
    KVQ_GLOBAL(const unsigned) places = scratch.chosen + tile * s.n_slots;
    KVQ_GLOBAL(uint8_t) counts = tiles + (tile * s.tile_bytes + s.code_bytes);
    KVQ_GLOBAL(uint8_t) entries = counts + s.count_bytes;
    unsigned place = i < n ? (unsigned)places[i] : 0, per_head = (unsigned)(KVQ_TILE_TOKENS * s.head_dim);
    int      rank = 0, count = 0;
    for (int j = 0; j < n; j++) {
        unsigned other = places[j];
        rank += other < place;
        count += other / per_head == (unsigned)i;
    }
    if (2 * i < s.count_bytes) kvq_as<uint16_t>(counts)[i] = (uint16_t)count;
    if (i < n) {
        int     within = (int)place % s.head_dim, row = (int)place / s.head_dim, head = row / KVQ_TILE_TOKENS;
        int64_t token = (int64_t)tile * KVQ_TILE_TOKENS + row % KVQ_TILE_TOKENS;
        if (store_entry(s, x, token, head * s.head_dim + within, within, rank, entries) == 0)
            atomicMin(first_bad, (int)token);
    } else if (i < s.n_slots) {
        kvq_as<uint32_t>(entries)[i] = 0;
    }
}

// ---------------------------------------------------------------- host

// Lays the arrays out in `memory` and returns their size.
static size_t lay_out(const kvq_tile_spec *s, int64_t n_tokens, unsigned char *memory, Scratch *out) {
    size_t n_tiles = (size_t)((n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS), tokens = n_tiles * KVQ_TILE_TOKENS;
    size_t per_token = (size_t)(2 * s->n_side < s->d ? 2 * s->n_side : s->d), n_slots = (size_t)s->n_slots;
    size_t keys = tokens * per_token * sizeof(select_key), counts = tokens * sizeof(unsigned);
    size_t chosen = n_tiles * n_slots * sizeof(unsigned);
    if (out != NULL) {
        out->keys = reinterpret_cast<select_key *>(memory);
        out->n_candidates = reinterpret_cast<unsigned *>(memory + keys);
        out->chosen = reinterpret_cast<unsigned *>(memory + keys + counts);
        out->n_chosen = reinterpret_cast<unsigned *>(memory + keys + counts + chosen);
        out->per_token = (int)per_token;
    }
    return keys + counts + chosen + n_tiles * sizeof(unsigned);
}

size_t kvq_cuda_tiles_scratch_bytes(const kvq_cuda_tiles *spec, int64_t n_tokens) {
    return spec->spec.r == NULL || spec->spec.n_slots == 0 ? 0 : lay_out(&spec->spec, n_tokens, NULL, NULL);
}

kvq_status kvq_cuda_encode_outliers(const kvq_tile_spec *spec, const TileSpec &s, const Tokens &tokens, const float *x,
                                    uint8_t *tiles, void *memory, int *first_bad, kvq_stream stream, kvq_error *err) {
    Scratch  scratch = {};
    unsigned n_tiles = (unsigned)((tokens.end + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS);
    unsigned block = s.d < TOKEN_THREADS ? round_up(s.d, 32) : (unsigned)TOKEN_THREADS;
    int      n_items = s.n_slots > s.count_bytes / 2 ? s.n_slots : s.count_bytes / 2;
    unsigned slot_block = n_items < SLOT_THREADS ? round_up(n_items, 32) : (unsigned)SLOT_THREADS;
    (void)lay_out(spec, tokens.end, static_cast<unsigned char *>(memory), &scratch);
    KVQ_LAUNCH(list_candidates, n_tiles * KVQ_TILE_TOKENS, block, 2 * (size_t)s.n_side * sizeof(select_key), stream, s,
               tokens, x, scratch);
    KVQ_LAUNCH(cut_candidates, n_tiles, TILE_THREADS, 0, stream, s, scratch);
    KVQ_LAUNCH(store_outliers, dim3(n_tiles, ((unsigned)n_items + slot_block - 1) / slot_block), slot_block, 0, stream,
               s, scratch, x, tiles, first_bad);
    return op_launched("a kernel of the codec", err);
}
