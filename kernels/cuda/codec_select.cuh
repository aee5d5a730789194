// SPDX-License-Identifier: Apache-2.0
//
// Exact selection by a thread block: the largest of many keys, whatever the order in which threads come by.
//
// Keys are integers in whose order the elements rank, all different, so there are no ties: the bits of a number in an
// order-preserving form, and below them the channel. A radix search finds the first key that is too many; the chosen
// ones are those above it. Integer atomics count and hand out places, and the place in the result is the rank, so that
// the same bytes come out of every run.
#ifndef KVQ_CODEC_SELECT_CUH
#define KVQ_CODEC_SELECT_CUH

#include "codec_impl.cuh"

typedef unsigned long long select_key; // 0 = no candidate

enum { SELECT_BINS = 256, UPPER = 0, LOWER = 1 };

// One token's elements beyond the range of their channels, the largest |x'| first, then the lowest channel: outliers of
// a K row, and of a token of a tile of keys.
struct KeyToken {
    enum { ALL_ARE_CANDIDATES = 0, DIGITS = 6 };
    KVQ_GLOBAL(const float) x;
    KVQ_GLOBAL(const float) z;
    KVQ_GLOBAL(const float) r;
};

KVQ_DEVICE select_key key_at(const KeyToken &token, int side, int c) {
    float beyond = kvq_block_normalise(token.x[c], token.z[c], token.r[c], 0.0f);
    if (side == LOWER) beyond = -beyond;
    if (!(beyond > KVQ_OUTLIER_EDGE)) return 0;
    return (select_key)kvq_bits_of_float(beyond) << 16 | (select_key)(0xffff - c); // positive: ordered like its bits
}

// One token's elements in (value, channel) order, from the top and from the bottom: outliers of a V row.
struct ValueToken {
    enum { ALL_ARE_CANDIDATES = 1, DIGITS = 6 };
    KVQ_GLOBAL(const float) x;
};

KVQ_DEVICE select_key key_at(const ValueToken &token, int side, int c) {
    uint32_t u = kvq_bits_of_float(token.x[c] + 0.0f); // -0 and 0 are equal
    uint32_t ordered = (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
    if (side == UPPER) return (select_key)ordered << 16 | (select_key)c;
    return (select_key)~ordered << 16 | (select_key)(0xffff - c);
}

KVQ_DEVICE int channel_of_key(const KeyToken &, int, select_key key) { return 0xffff - (int)(key & 0xffff); }
KVQ_DEVICE int channel_of_key(const ValueToken &, int side, select_key key) {
    return side == UPPER ? (int)(key & 0xffff) : 0xffff - (int)(key & 0xffff);
}

// ---------------------------------------------------------------- radix search

// Where a search stands: the key that is looked for begins with `prefix`, that is key >> shift == prefix; n keys do,
// and `rank` of them are larger. n = 0: there is no such key.
struct Search {
    select_key prefix;
    unsigned   rank, n;
    int        shift;
};

// The next digit, by one warp: lane i has eight of the bins, lane 0 the highest.
KVQ_DEVICE void descend(KVQ_SHARED_PTR(const unsigned) bins, KVQ_SHARED_PTR(Search) search, int shift) {
    int      lane = lane_of_thread(), bin = SELECT_BINS - 1 - 8 * lane;
    Search   s = search[0];
    unsigned sum = 0, before;
    for (int k = 0; k < 8; k++) sum += bins[bin - k];
    before = sum;
    for (int by = 1; by < 32; by *= 2) {
        unsigned higher = __shfl_up_sync((unsigned)ALL_LANES, before, (unsigned)by);
        if (lane >= by) before += higher;
    }
    before -= sum;
    __syncwarp(); // all have read what one of them changes now
    if (s.rank < before || s.rank >= before + sum) return;
    unsigned here = bins[bin];
    while (before + here <= s.rank) {
        before += here;
        here = bins[--bin];
    }
    s.prefix = s.prefix << 8 | (select_key)bin;
    s.rank -= before;
    s.n = here;
    s.shift = shift;
    search[0] = s;
}

// Counts by their next digit the keys that begin as the ones looked for.
template <int SIDES, typename Keys>
KVQ_DEVICE void count_digits(const Keys &keys, int n, int shift, KVQ_SHARED_PTR(const Search) searches,
                             KVQ_SHARED_PTR(unsigned) bins) {
    for (int side = 0; side < SIDES; side++) {
        Search s = searches[side];
        if (s.n < 2) continue;
        for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
            select_key key = key_at(keys, side, i);
            if (key != 0 && key >> (shift + 8) == s.prefix)
                atomicAdd(&bins[side * SELECT_BINS + (int)(key >> shift & 255)], 1u);
        }
    }
}

// found[side] = the key with `rank` larger ones, of the n_keys[side] keys of that side; 0 when there are not so many.
// For whole blocks; `n_keys` must be behind a barrier, `found` is.
template <int SIDES, typename Keys>
KVQ_DEVICE void find_rank(const Keys &keys, int n, unsigned rank, KVQ_SHARED_PTR(const unsigned) n_keys,
                          KVQ_SHARED_PTR(select_key) found) {
    KVQ_SHARED(unsigned, bins, SIDES *SELECT_BINS);
    KVQ_SHARED(Search, searches, SIDES);
    int thread = (int)threadIdx.x, warp = thread / 32, n_warps = (int)blockDim.x / 32;
    if (thread < SIDES) {
        unsigned all = n_keys[thread];
        Search   s = {0, rank, all > rank ? all : 0, 8 * Keys::DIGITS};
        searches[thread] = s;
        found[thread] = 0;
    }
    __syncthreads();
    for (int shift = 8 * (Keys::DIGITS - 1); shift >= 0; shift -= 8) {
        bool open = false; // one key left is the one: most searches end after three digits
        for (int side = 0; side < SIDES; side++) {
            Search s = searches[side];
            open = open || s.n > 1;
        }
        if (!open) break;
        for (int i = thread; i < SIDES * SELECT_BINS; i += (int)blockDim.x) bins[i] = 0;
        __syncthreads();
        count_digits<SIDES>(keys, n, shift, searches, bins);
        __syncthreads();
        for (int side = warp; side < SIDES; side += n_warps) {
            Search s = searches[side];
            if (s.n > 1) descend(bins + side * SELECT_BINS, searches + side, shift);
        }
        __syncthreads();
    }
    for (int side = 0; side < SIDES; side++) {
        Search s = searches[side];
        for (int i = thread; i < n && s.n > 0; i += (int)blockDim.x) {
            select_key key = key_at(keys, side, i);
            if (key != 0 && key >> s.shift == s.prefix) found[side] = key; // one thread's
        }
    }
    __syncthreads();
}

// ---------------------------------------------------------------- outliers of a token

// Outliers of a token while its block chooses them: list [2, n_side], n of each side, and the first keys that are none
// (K: 0 unless a side has too many).
struct Chosen {
    KVQ_SHARED_PTR(select_key) list;
    KVQ_SHARED_PTR(unsigned) n;
    KVQ_SHARED_PTR(select_key) limit;
};

// Lists the keys above the limits, in no order, and counts them; no more than fit are listed.
template <typename Keys> KVQ_DEVICE void list_keys(const Keys &keys, int d, int n_side, const Chosen &chosen) {
    for (int side = UPPER; side <= LOWER; side++) {
        select_key limit = chosen.limit[side];
        for (int c = (int)threadIdx.x; c < d; c += (int)blockDim.x) {
            select_key key = key_at(keys, side, c);
            if (key <= limit) continue;
            unsigned at = atomicAdd(&chosen.n[side], 1u);
            if (at < (unsigned)n_side) chosen.list[side * n_side + (int)at] = key;
        }
    }
}

// Chooses the n_side largest keys of each side, by the whole block; the result is behind a barrier. Few tokens have too
// many candidates, so they are listed before anything is searched, unless every element is one.
template <typename Keys> KVQ_DEVICE void choose_outliers(const Keys &keys, int d, int n_side, const Chosen &chosen) {
    if (threadIdx.x < 2) {
        chosen.limit[threadIdx.x] = 0;
        chosen.n[threadIdx.x] = Keys::ALL_ARE_CANDIDATES ? (unsigned)d : 0u;
    }
    __syncthreads();
    if (!Keys::ALL_ARE_CANDIDATES) {
        list_keys(keys, d, n_side, chosen);
        __syncthreads();
    }
    if (chosen.n[UPPER] <= (unsigned)n_side && chosen.n[LOWER] <= (unsigned)n_side) return;
    find_rank<2>(keys, d, (unsigned)n_side, chosen.n, chosen.limit);
    if (threadIdx.x < 2) chosen.n[threadIdx.x] = 0;
    __syncthreads();
    list_keys(keys, d, n_side, chosen);
    __syncthreads();
}

// Whether channel c is among the chosen ones; n_side 0: none is, and nothing need have been chosen.
template <typename Keys> KVQ_DEVICE bool is_chosen(const Keys &keys, int n_side, const Chosen &chosen, int c) {
    if (n_side == 0) return false;
    return key_at(keys, UPPER, c) > chosen.limit[UPPER] || key_at(keys, LOWER, c) > chosen.limit[LOWER];
}

// How many of n keys are larger: the place of a key among the chosen ones.
KVQ_DEVICE int rank_of_key(KVQ_SHARED_PTR(const select_key) list, int n, select_key key) {
    int rank = 0;
    for (int i = 0; i < n; i++) rank += list[i] > key;
    return rank;
}

#endif
