// SPDX-License-Identifier: Apache-2.0
//
// Counting elements of K and V for a fit, in the arithmetic of kvq_count_hd.h. In two steps, as on the host: a block
// normalises a row and marks its outliers, which concerns all channels together; then pieces of a head's rows are added
// to its counters. All of what is added is checked in the first step, so that a bad element leaves them as they are.
//
// Sums are 128-bit integers. One is added to another by two atomic additions: the low half first, whose carry goes with
// the high half. Integers in any order are the same bytes on every run.
#include "kvq_cuda_ops.h"
#include "launch.cuh"
#include "row_ranges.cuh"

typedef unsigned long long count_word; // counters are words of 64 bits, of sums the low half first

enum { COUNT_ROWS = 32 }; // of a head, added by one block

// ---------------------------------------------------------------- rows

struct CountRows {
    int               d, n_side, clamp_zero, bits;
    kvq_weighting_set weightings;
    bool              has_gradients;
    int64_t           n_skip;
    KVQ_GLOBAL(const float) x;
    KVQ_GLOBAL(const float) gradients;
    KVQ_GLOBAL(const float) z;
    KVQ_GLOBAL(const float) r;
    KVQ_GLOBAL(float) normalised; // [m, d]
    KVQ_GLOBAL(float) row_r;      // [m], of V
};

KVQ_DEVICE double squared_gradient(bool has, KVQ_GLOBAL(const float) gradients, int64_t at) {
    return has ? (double)kvq_count_squared_gradient(gradients[at]) : 0;
}

// Nothing to find in a K row; returns 1.
KVQ_DEVICE int find_range(const CountRows &, FixedRanges *, const Chosen &, int64_t) { return 1; }

// Returns 0 when the range does not fit into f16.
KVQ_DEVICE int find_range(const CountRows &s, TokenRange *row, const Chosen &chosen, int64_t at) {
    HalfRange range = find_token_range(row, chosen, s.clamp_zero, s.bits);
    if (threadIdx.x == 0) s.row_r[at] = row->range.r;
    return fits_halves(range);
}

// Whether an element can be counted; the weights only of one that comes into the bins.
KVQ_DEVICE bool can_be_counted(const CountRows &s, float x, float normalised, double gradient, float r) {
    if ((kvq_bits_of_float(x) & 0x7f800000u) == 0x7f800000u || !kvq_count_gradient_fits(gradient)) return false;
    bool fit = true;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        kvq_weighting by = (kvq_weighting)w;
        if (kvq_weightings_have(s.weightings, by))
            fit = fit && kvq_count_weight_fits(by, kvq_count_weight(by, gradient, (double)r));
    }
    return fit || normalised == KVQ_COUNT_APART || normalised == KVQ_COUNT_CONSTANT;
}

template <typename Row>
KVQ_DEVICE void normalise_row(const CountRows &s, Row row, int64_t at, KVQ_GLOBAL_ALIASED(count_word) first_bad) {
    KVQ_DYNAMIC_SHARED(select_key, list);
    KVQ_SHARED(unsigned, n_chosen, 2);
    KVQ_SHARED(select_key, limit, 2);
    Chosen  chosen = {list, n_chosen, limit};
    int64_t first = at * s.d;
    if (Row::HAS_LIMITS || s.n_side > 0) choose_outliers(row.keys, s.d, s.n_side, chosen);
    if (find_range(s, &row, chosen, at) == 0) atomicMin(first_bad, (count_word)first);
    for (int c = (int)threadIdx.x; c < s.d; c += (int)blockDim.x) {
        float x = row.keys.x[c];
        Range range = range_of(row, c);
        float normalised =
            is_chosen(row.keys, s.n_side, chosen, c) ? KVQ_COUNT_APART : kvq_count_normalise(x, range.z, range.r);
        double gradient = squared_gradient(s.has_gradients, s.gradients, first + c);
        s.normalised[first + c] = normalised;
        if (!can_be_counted(s, x, normalised, gradient, range.r)) atomicMin(first_bad, (count_word)(first + c));
    }
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS, MIN_BLOCKS)
    normalise_key_rows(CountRows s, KVQ_GLOBAL_ALIASED(count_word) first_bad) {
    int64_t     at = s.n_skip + blockIdx.x;
    FixedRanges row = {{s.x + at * s.d, s.z, s.r}, s.z};
    normalise_row(s, row, at, first_bad);
}

KVQ_KERNEL KVQ_BOUNDS(OP_THREADS, MIN_BLOCKS)
    normalise_value_rows(CountRows s, KVQ_GLOBAL_ALIASED(count_word) first_bad) {
    int64_t    at = s.n_skip + blockIdx.x;
    TokenRange row = {{s.x + at * s.d}, {0, 0}};
    normalise_row(s, row, at, first_bad);
}

KVQ_KERNEL KVQ_BOUNDS(1) store_none_bad(KVQ_GLOBAL(count_word) first_bad) { first_bad[0] = KVQ_CUDA_ALL_FINITE; }

// ---------------------------------------------------------------- sums

// To a sum in memory that others add to as well. What adds nothing to a half does not touch it. Returns the bits that
// the high half had before or has now, 0 when it was not touched.
KVQ_DEVICE count_word add_fixed(KVQ_GLOBAL_ALIASED(count_word) sum, kvq_fixed x) {
    count_word lo = x.lo, hi = (count_word)x.hi;
    if (lo != 0) hi += atomicAdd(sum, lo) + lo < lo ? 1u : 0u;
    if (hi == 0) return 0;
    count_word before = atomicAdd(sum + 1, hi);
    return before | (before + hi);
}

// As kvq_fixed_merge_positive does: a sum that has left its range stays negative. Whoever sees it so, before or after
// its own addition, makes it so again, for the addition may have taken the sign away.
KVQ_DEVICE void add_positive(KVQ_GLOBAL_ALIASED(count_word) sum, kvq_fixed x) {
    const count_word sign = 1ull << 63;
    count_word       seen = x.hi < 0 ? sign : add_fixed(sum, x);
    if ((seen & sign) != 0) atomicOr(sum + 1, sign);
}

// The sum of a warp's lanes, in integers, and from its first lane into memory: few threads meet at one address.
KVQ_DEVICE void add_of_warp(KVQ_GLOBAL_ALIASED(count_word) sum, kvq_fixed x) {
    for (int by = 16; by > 0; by /= 2) {
        kvq_fixed other = {__shfl_xor_sync((unsigned)ALL_LANES, (count_word)x.lo, by),
                           (int64_t)__shfl_xor_sync((unsigned)ALL_LANES, (count_word)x.hi, by)};
        kvq_fixed_merge_positive(&x, other);
    }
    if (lane_of_thread() == 0 && (x.lo != 0 || x.hi != 0)) add_positive(sum, x);
}

KVQ_DEVICE void count_of_warp(KVQ_GLOBAL_ALIASED(count_word) count, unsigned n) {
    for (int by = 16; by > 0; by /= 2) n += __shfl_xor_sync((unsigned)ALL_LANES, n, by);
    if (lane_of_thread() == 0 && n != 0) atomicAdd(count, (count_word)n);
}

// ---------------------------------------------------------------- heads

struct CountHeads {
    int     d, width, n_heads;
    bool    has_gradients, of_channel; // whose ranges are per channel
    int64_t m, n_skip, n_pieces;       // pieces of all heads
    int64_t head_words, bins;          // of a head's counters; where the bins of the weighting begin
    KVQ_GLOBAL(const float) x;
    KVQ_GLOBAL(const float) gradients;
    KVQ_GLOBAL(const float) r; // [d], or [m] of rows
    KVQ_GLOBAL(const float) normalised;
};

// Elements [0, n) of some rows of a head.
struct CountPiece {
    int64_t row;
    int     head, n;
};

KVQ_DEVICE CountPiece piece_at(const CountHeads &s, int64_t i) {
    CountPiece piece;
    piece.head = (int)(i % s.n_heads);
    piece.row = s.n_skip + i / s.n_heads * COUNT_ROWS;
    piece.n = s.width * (s.m - piece.row < COUNT_ROWS ? (int)(s.m - piece.row) : (int)COUNT_ROWS);
    return piece;
}

// Where an element is in the tensor, and its half range.
struct CountPlace {
    int64_t at;
    float   r;
};

KVQ_DEVICE CountPlace place_of(const CountHeads &s, const CountPiece &piece, int i) {
    int        c = piece.head * s.width + i % s.width;
    int64_t    row = piece.row + i / s.width;
    CountPlace place = {row * s.d + c, s.of_channel ? s.r[c] : s.r[row]};
    return place;
}

// Words of a kvq_histogram.
#define COUNT_WORD(field) (offsetof(kvq_histogram, field) / sizeof(count_word))

// Bins and sums of one weighting.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS, MIN_BLOCKS)
    count_weighting(CountHeads s, int weighting, KVQ_GLOBAL_ALIASED(count_word) counters,
                    KVQ_GLOBAL(const count_word) first_bad) {
    kvq_weighting by = (kvq_weighting)weighting;
    if (first_bad[0] != KVQ_CUDA_ALL_FINITE) return;
    for (int64_t i = blockIdx.x; i < s.n_pieces; i += gridDim.x) {
        CountPiece piece = piece_at(s, i);
        KVQ_GLOBAL_ALIASED(count_word) head = counters + piece.head * s.head_words;
        KVQ_GLOBAL_ALIASED(count_word)
        sums = head + weighting * (int64_t)(sizeof(kvq_weight_sums) / sizeof(count_word));
        kvq_fixed wxx = {0, 0}, large = {0, 0}, small = {0, 0};
        for (int k = (int)threadIdx.x; k < piece.n; k += OP_THREADS) {
            CountPlace place = place_of(s, piece, k);
            float      normalised = s.normalised[place.at];
            if (normalised == KVQ_COUNT_APART || normalised == KVQ_COUNT_CONSTANT) continue;
            double gradient = squared_gradient(s.has_gradients, s.gradients, place.at);
            double w = kvq_count_weight(by, gradient, (double)place.r) * kvq_count_unit(by);
            float  clipped = kvq_count_clip(normalised);
            double wx = w * (double)clipped;
            KVQ_GLOBAL_ALIASED(count_word)
            bin = head + s.bins + kvq_count_bin(clipped) * (int64_t)(sizeof(kvq_bin) / sizeof(count_word));
            add_positive(bin, kvq_fixed_of_positive(w));
            (void)add_fixed(bin + 2, kvq_fixed_of(wx));
            kvq_fixed_add_positive(&wxx, wx * (double)clipped);
            kvq_fixed_add_positive(&large, kvq_count_large_square(w));
            kvq_fixed_add_positive(&small, kvq_count_small_square(w));
        }
        add_of_warp(sums + COUNT_WORD(by[0].wxx), wxx);
        add_of_warp(sums + COUNT_WORD(by[0].w2_large), large);
        add_of_warp(sums + COUNT_WORD(by[0].w2_small), small);
    }
}

// What became of elements, and what concerns all of them.
KVQ_KERNEL KVQ_BOUNDS(OP_THREADS, MIN_BLOCKS)
    count_elements(CountHeads s, KVQ_GLOBAL_ALIASED(count_word) counters, KVQ_GLOBAL(const count_word) first_bad) {
    if (first_bad[0] != KVQ_CUDA_ALL_FINITE) return;
    for (int64_t i = blockIdx.x; i < s.n_pieces; i += gridDim.x) {
        CountPiece piece = piece_at(s, i);
        KVQ_GLOBAL_ALIASED(count_word) head = counters + piece.head * s.head_words;
        kvq_fixed energy = {0, 0}, below = {0, 0}, above = {0, 0}, squared = {0, 0};
        unsigned  n_points = 0, n_outliers = 0, n_constant = 0, n_clipped = 0;
        for (int k = (int)threadIdx.x; k < piece.n; k += OP_THREADS) {
            CountPlace place = place_of(s, piece, k);
            float      normalised = s.normalised[place.at];
            bool       apart = normalised == KVQ_COUNT_APART, constant = normalised == KVQ_COUNT_CONSTANT;
            kvq_fixed_add_positive(&energy, kvq_count_energy(s.x[place.at]));
            n_outliers += apart;
            n_constant += constant;
            if (apart || constant) continue;
            n_points++;
            n_clipped += s.of_channel && kvq_count_is_clipped(normalised);
            if (!kvq_count_is_beyond(normalised)) continue;
            double beyond = kvq_count_beyond(normalised), r2 = kvq_count_weight(KVQ_WEIGHT_RANGE, 0, (double)place.r);
            if (normalised > 0) kvq_fixed_add_positive(&above, kvq_count_lost(beyond, r2));
            if (normalised < 0) kvq_fixed_add_positive(&below, kvq_count_lost(beyond, r2));
            kvq_fixed_add_positive(&squared, kvq_count_lost_square(beyond, r2));
        }
        add_of_warp(head + COUNT_WORD(energy), energy);
        add_of_warp(head + COUNT_WORD(beyond[0]), below);
        add_of_warp(head + COUNT_WORD(beyond[1]), above);
        add_of_warp(head + COUNT_WORD(beyond_squared), squared);
        count_of_warp(head + COUNT_WORD(counts.n_points), n_points);
        count_of_warp(head + COUNT_WORD(counts.n_outliers), n_outliers);
        count_of_warp(head + COUNT_WORD(counts.n_constant), n_constant);
        count_of_warp(head + COUNT_WORD(counts.n_clipped), n_clipped);
    }
}

// ---------------------------------------------------------------- host

int64_t kvq_cuda_count_scratch_floats(int64_t m, int64_t d) { return m * d + m; }

static void launch_rows(const kvq_count_rule *rule, const float *x, const float *gradients, int64_t m, float *scratch,
                        unsigned long long *d_first, void *stream) {
    const kvq_block_spec *spec = rule->spec;
    CountRows             s = {};
    s.d = spec->d;
    s.n_side = spec->n_side;
    s.clamp_zero = spec->clamp_zero;
    s.bits = spec->bits;
    s.weightings = rule->weightings;
    s.has_gradients = gradients != NULL;
    s.n_skip = rule->n_skip;
    s.x = x;
    s.gradients = gradients;
    s.z = spec->z;
    s.r = spec->r;
    s.normalised = scratch;
    s.row_r = scratch + m * spec->d;
    unsigned grid = (unsigned)(m - rule->n_skip), block = s.d < OP_THREADS ? round_up(s.d, 32) : (unsigned)OP_THREADS;
    size_t   list = 2 * (size_t)s.n_side * sizeof(select_key);
    if (spec->r != NULL)
        KVQ_LAUNCH(normalise_key_rows, grid, block, list, op_stream(stream), s, d_first);
    else
        KVQ_LAUNCH(normalise_value_rows, grid, block, list, op_stream(stream), s, d_first);
}

static void launch_heads(const kvq_count_rule *rule, const float *x, const float *gradients, int64_t m, float *counters,
                         const float *scratch, const unsigned long long *d_first, void *stream) {
    const kvq_block_spec *spec = rule->spec;
    count_word           *words = reinterpret_cast<count_word *>(counters);
    CountHeads            s = {};
    s.d = spec->d;
    s.n_heads = rule->n_heads;
    s.width = spec->d / rule->n_heads;
    s.has_gradients = gradients != NULL;
    s.of_channel = spec->r != NULL;
    s.m = m;
    s.n_skip = rule->n_skip;
    s.n_pieces = (m - rule->n_skip + COUNT_ROWS - 1) / COUNT_ROWS * rule->n_heads;
    s.head_words = kvq_counters_bytes(rule->weightings) / (int64_t)sizeof(count_word);
    s.x = x;
    s.gradients = gradients;
    s.r = s.of_channel ? spec->r : scratch + m * spec->d;
    s.normalised = scratch;
    unsigned grid = op_blocks(s.n_pieces);
    KVQ_LAUNCH(count_elements, grid, OP_THREADS, 0, op_stream(stream), s, words, d_first);
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (!kvq_weightings_have(rule->weightings, (kvq_weighting)w)) continue;
        s.bins = kvq_counters_bins(rule->weightings, (kvq_weighting)w) / (int64_t)sizeof(count_word);
        KVQ_LAUNCH(count_weighting, grid, OP_THREADS, 0, op_stream(stream), s, w, words, d_first);
    }
}

kvq_status kvq_cuda_count(const kvq_count_rule *rule, const float *x, const float *gradients, int64_t m,
                          float *counters, float *scratch, unsigned long long *d_first, void *stream, kvq_error *err) {
    if (m < 0 || m > INT32_MAX || rule->n_skip < 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld rows at once of which %lld are skipped, not 0 .. 2^31 - 1",
                        (long long)m, (long long)rule->n_skip);
    KVQ_LAUNCH(store_none_bad, 1, 1, 0, op_stream(stream), d_first);
    if (m > rule->n_skip) {
        launch_rows(rule, x, gradients, m, scratch, d_first, stream);
        launch_heads(rule, x, gradients, m, counters, scratch, d_first, stream);
    }
    return op_launched("count", err);
}
