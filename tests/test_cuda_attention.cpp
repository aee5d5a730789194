// SPDX-License-Identifier: Apache-2.0
//
// Decode attention on a device (kernels/cuda/attention.cu), run by the emulator: against f64 with exact angles within a
// derived bound (attention_oracle.h), over both formats and every kind of token; the same bits for every schedule; and
// no access that the emulator objects to.
#include <stdio.h>
#include <string.h>

#include "attention_device.h"
#include "emulated_rig.h"
#include "kvq_exp_hd.h"
#include "rope.cuh"

// ---------------------------------------------------------------- angles

enum { ROPE_PAIRS = 32 };

KVQ_KERNEL turn(KVQ_GLOBAL(const float2) bases, KVQ_GLOBAL(const float2) offsets, int first, KVQ_GLOBAL(float2) out) {
    int position = first + (int)blockIdx.x, i = (int)threadIdx.x;
    out[(int)blockIdx.x * ROPE_PAIRS + i] = rope_angle(bases, offsets, ROPE_PAIRS, position, i);
}

static const struct {
    double theta, amplitude;
    int    first, n;
} turns[] = {
    {1e4, 1, 0, 4096},
    {5e5, 1, 0, 4096},
    {1e4, 1, 131072 - 64, 200},
    {5e5, 1, 131072 - 64, 200},
    {1e4, 1, 1048576 - 200, 400},
    {5e5, 1.25, 1048576 - 200, 400},
};
enum { N_TURNS = sizeof turns / sizeof *turns };

// Four units of rounding, as rope.cuh derives; the 1 % is for terms in u^2.
START_TEST(angles_are_right_at_any_position) {
    std::vector<double> frequency(ROPE_PAIRS);
    for (int i = 0; i < ROPE_PAIRS; i++) frequency[(size_t)i] = pow(turns[_i].theta, -(double)i / ROPE_PAIRS);
    int                n = turns[_i].n, n_bases = (turns[_i].first + n + 127) / 128;
    std::vector<float> bases((size_t)(2 * n_bases * ROPE_PAIRS)), offsets(2 * 128 * ROPE_PAIRS);
    double             worst = 0;
    kvq_cuda_rope_fill(frequency.data(), ROPE_PAIRS, turns[_i].amplitude, n_bases, bases.data(), offsets.data());
    begin(1);
    Owned                owned;
    simt::Buffer<float2> out("out", (size_t)(n * ROPE_PAIRS));
    const float2        *d_bases = (const float2 *)owned.copy("bases", bases.data(), bases.size());
    const float2        *d_offsets = (const float2 *)owned.copy("offsets", offsets.data(), offsets.size());
    KVQ_LAUNCH(turn, (unsigned)n, ROPE_PAIRS, 0, nullptr, d_bases, d_offsets, turns[_i].first, out.data());
    expect_clean();
    std::vector<float2> angles = out.values();
    for (int i = 0; i < n * ROPE_PAIRS; i++) {
        double angle = (double)(turns[_i].first + i / ROPE_PAIRS) * frequency[(size_t)(i % ROPE_PAIRS)];
        float2 is = angles[(size_t)i];
        worst = fmax(worst, fabs((double)is.x - turns[_i].amplitude * cos(angle)));
        worst = fmax(worst, fabs((double)is.y - turns[_i].amplitude * sin(angle)));
    }
    printf("angles from %d on, theta %g: error %.2f of 4 u\n", turns[_i].first, turns[_i].theta,
           worst / ROUNDING / turns[_i].amplitude);
    ck_assert_double_le(worst, 1.01 * 4 * ROUNDING * turns[_i].amplitude);
}
END_TEST

// ---------------------------------------------------------------- twins

struct Case {
    const char          *name;
    attention_setup      with;
    int                  group;
    bool                 before_rope;
    int                  n_splits;
    int                  window;
    float                softcap;
    std::vector<int64_t> lengths;
    float                steep = 1; // multiplies scores: softmax becomes a choice, and weights end where exp does
};

static attention_setup rows(int heads, int dim, int k_bits, int v_bits, int n_side, int64_t sinks, int64_t recent) {
    attention_setup s = {};
    s.n_kv_heads = heads, s.head_dim = dim, s.k_bits = k_bits, s.v_bits = v_bits;
    s.n_side = n_side, s.sinks = sinks, s.recent = recent, s.spread = 1;
    return s;
}

static attention_setup tiles(int heads, int dim, int pair, int half_scales, int n_slots, int64_t sinks) {
    attention_setup s = {};
    s.tiled = true;
    s.n_kv_heads = heads, s.head_dim = dim, s.dim = pair, s.half_scales = half_scales;
    s.n_side = n_slots > 0 ? 2 : 0, s.n_slots = n_slots, s.sinks = sinks, s.spread = 1;
    return s;
}

static attention_setup but(attention_setup s, float spread, bool per_head, bool flush) {
    s.spread = spread, s.per_head = per_head, s.flush = flush;
    return s;
}

static attention_setup swapped(attention_setup s) {
    s.swapped = true;
    return s;
}

static const std::vector<int64_t> few = {0, 1, 16, 129}, edges = {15, 17, 127, 128, 129}, far = {300, 512, 1};

// Partial rotary, with an amplitude, where keys are before RoPE and the head is not tiny.
static Query query_of(const Case &c) {
    int   D = c.with.head_dim;
    Query q = {c.group * c.with.n_kv_heads, c.with.n_kv_heads, D, 0, c.softcap, c.window, 0, 1, {}};
    q.scale = c.steep * (float)(1 / sqrt((double)D));
    if (!c.before_rope) return q;
    q.n_pairs = D == 80 ? 16 : D / 2;
    q.amplitude = D == 96 ? 1.2 : 1;
    for (int i = 0; i < q.n_pairs; i++) q.frequency.push_back(pow(1e4, -(double)i / q.n_pairs));
    return q;
}

static std::vector<float> random_queries(const Query &query, size_t n_seqs) {
    std::vector<float> q(n_seqs * (size_t)(query.n_heads * query.head_dim));
    for (size_t i = 0; i < q.size(); i++) q[i] = (float)(8 * kvq_rng_uniform(9, KVQ_RNG_TEST, 77, i) - 4);
    return q;
}

// A filled cache and queries; what a test then does with it.
struct Bench {
    attention_rig                   rig;
    Query                           query;
    std::vector<attention_sequence> sequences;
    std::vector<float>              q;
    Device                          device;
    std::vector<float>              parts; // the workspace after the last run

    explicit Bench(const Case &c) : query(query_of(c)) {
        attention_rig_open(&c.with, &rig);
        sequences.resize(c.lengths.size());
        for (size_t i = 0; i < c.lengths.size(); i++)
            attention_sequence_open(&rig, c.lengths[i], (uint32_t)i, &sequences[i]);
        q = random_queries(query, sequences.size());
        put_spec(&rig, &device);
        put_sequences(&rig, sequences, &device);
        put_query(query, q, &device);
        device.call.n_splits = c.n_splits;
    }
    ~Bench() {
        for (attention_sequence &s : sequences) attention_sequence_close(&s);
        attention_rig_close(&rig);
    }
    std::vector<float> run(uint64_t seed) {
        begin(seed);
        kvq_error               err = {};
        size_t                  bytes = kvq_cuda_attention_workspace(&device.call);
        simt::Buffer<float>     out("out", q.size());
        simt::Buffer<float>     workspace("workspace", bytes / sizeof(float));
        kvq_cuda_attention_call call = device.call;
        call.out = out.data();
        call.workspace = workspace.data();
        kvq_test_ok(kvq_cuda_attention(&call, nullptr, &err), &err);
        expect_clean();
        parts = workspace.values();
        return out.values();
    }
    // Largest share of the bound that an element uses; `largest` error.
    double compare(const std::vector<float> &out, int n_splits, double *largest) {
        double worst = 0;
        size_t size = (size_t)(query.n_heads * query.head_dim);
        for (size_t seq = 0; seq < sequences.size(); seq++) {
            Answer answer = exact_attention(query, tokens_of(&rig, sequences[seq]), q.data() + seq * size, n_splits);
            for (size_t i = 0; i < size; i++) {
                double is = (double)out[seq * size + i], error = fabs(is - answer.out[i]);
                ck_assert_msg(error <= answer.bound[i],
                              "sequence %d of %d tokens, head %d, channel %d: %g, not %g; %g > %g", (int)seq,
                              (int)sequences[seq].length, (int)i / query.head_dim, (int)i % query.head_dim, is,
                              answer.out[i], error, answer.bound[i]);
                if (answer.bound[i] > 0) worst = fmax(worst, error / answer.bound[i]);
                *largest = fmax(*largest, error);
            }
        }
        return worst;
    }
};

static const Case twins[] = {
    {"rows 3/2 bits", rows(2, 64, 3, 2, 2, 4, 5), 1, true, 1, 0, 0, few},
    {"rows, page edges", rows(2, 64, 4, 4, 1, 0, 0), 1, true, 1, 0, 0, edges},
    {"rows, long", rows(1, 64, 2, 3, 0, 1, 130), 4, true, 2, 0, 0, far},
    {"rows 5/8 bits, group 8", rows(2, 80, 5, 8, 3, 1, 5), 8, true, 1, 0, 0, few},
    {"rows 8/5 bits, group 9", rows(1, 96, 8, 5, 2, 4, 130), 9, true, 2, 0, 0, {1, 129, 140}},
    {"rows, caps exceeded", but(rows(2, 64, 3, 3, 1, 4, 5), 1.6f, false, false), 4, true, 1, 0, 0, few},
    {"rows, tables per head", but(rows(2, 64, 3, 3, 1, 4, 0), 1, true, false), 4, true, 1, 0, 0, {132, 133, 17}},
    {"rows, flushed", but(rows(1, 64, 3, 3, 1, 4, 130), 1, false, true), 4, true, 1, 0, 0, {140, 141, 300}},
    {"rows after RoPE", rows(2, 128, 4, 4, 1, 4, 5), 4, false, 1, 0, 0, {129, 1}},
    {"rows, heads of 256", rows(1, 256, 3, 4, 1, 1, 0), 8, true, 1, 0, 0, {1, 40}},
    {"rows, heads of 8", rows(3, 8, 2, 2, 1, 1, 5), 1, true, 5, 0, 0, edges},
    {"rows, window", rows(2, 64, 3, 3, 1, 4, 5), 4, true, 1, 33, 0, {32, 33, 34, 129}},
    {"rows, capped scores", rows(2, 64, 3, 3, 1, 4, 5), 4, true, 1, 0, 5, few},
    {"rows, some outliers", but(rows(2, 64, 3, 3, 4, 4, 5), 0.83f, false, false), 4, true, 1, 0, 0, {100, 129}},
    {"rows, steep", rows(2, 64, 4, 4, 1, 1, 5), 4, true, 3, 0, 0, {200, 129}, 4},
    {"rows, beyond the end of exp", rows(1, 64, 4, 4, 1, 1, 5), 4, true, 2, 0, 0, {200}, 40},
    {"rows, one token takes all", rows(2, 64, 4, 4, 1, 1, 5), 4, true, 3, 0, 0, {200, 129}, 400},
    {"rows, K per token, V per channel", swapped(rows(2, 64, 4, 3, 1, 4, 5)), 4, true, 1, 0, 0, {129, 16}},
    {"tiles, steep", tiles(2, 64, 2, 0, 16, 4), 4, true, 3, 0, 0, {200, 129}, 4},
    {"tiles", tiles(2, 64, 1, 1, 16, 4), 1, true, 1, 0, 0, few},
    {"tiles, pairs", tiles(2, 64, 2, 0, 16, 1), 4, true, 1, 0, 0, edges},
    {"tiles, long, e4m3", tiles(1, 80, 1, 0, 64, 4), 9, true, 2, 0, 0, far},
    {"tiles, f16 pairs, slots exceeded",
     but(tiles(2, 96, 2, 1, 6, 0), 1.6f, false, false),
     8,
     true,
     1,
     0,
     0,
     {128, 140}},
    {"tiles without outliers", tiles(2, 128, 2, 0, 0, 4), 4, true, 1, 0, 0, {128, 5}},
    {"tiles, flushed", but(tiles(2, 64, 2, 0, 16, 4), 1, false, true), 4, true, 1, 0, 0, {140, 17, 141}},
    {"tiles after RoPE, heads of 256", tiles(1, 256, 1, 0, 16, 4), 1, false, 1, 0, 0, {129}},
    {"tiles, window and cap", tiles(3, 64, 2, 0, 16, 1), 4, true, 2, 33, 5, {150, 33}},
    {"tiles, heads of 8", tiles(3, 8, 2, 0, 16, 1), 1, true, 5, 0, 0, edges},
};
enum { N_TWINS = sizeof twins / sizeof *twins };

START_TEST(output_is_that_of_exact_attention) {
    Bench  bench(twins[_i]);
    double largest = 0, share = bench.compare(bench.run((uint64_t)_i), twins[_i].n_splits, &largest);
    printf("%-34s largest error %.1e, at most %.4f of the bound\n", twins[_i].name, largest, share);
}
END_TEST

// ---------------------------------------------------------------- splits and schedules

static const Case split[] = {
    {"rows", rows(2, 64, 3, 3, 1, 4, 5), 4, true, 1, 0, 0, {0, 1, 33, 300}},
    {"tiles", tiles(2, 64, 2, 0, 16, 4), 9, true, 1, 0, 0, {0, 1, 140, 300}},
};
static const int N_SPLITS[] = {1, 2, 5, 0};
enum { N_SEEDS = 6 };

// Each number of splits is within the bound, so they differ by no more than twice that; most differ in some bit.
START_TEST(splits_differ_by_rounding_only) {
    Bench              bench(split[_i]);
    std::vector<float> first;
    double             largest = 0, between = 0;
    for (int n : N_SPLITS) {
        bench.device.call.n_splits = n;
        std::vector<float> out = bench.run(3);
        (void)bench.compare(out, n > 0 ? n : 1, &largest); // a bound of more splits is larger: 1 is the strictest
        if (first.empty()) first = out;
        for (size_t i = 0; i < out.size(); i++) between = fmax(between, fabs((double)(out[i] - first[i])));
    }
    printf("%-34s splits differ by %.1e\n", split[_i].name, between);
    ck_assert_double_gt(between, 0);
    ck_assert_double_lt(between, 4e-6);
}
END_TEST

START_TEST(any_schedule_gives_the_same_bits) {
    Bench              bench(split[_i / 2]);
    std::vector<float> first;
    bench.device.call.n_splits = _i % 2 == 0 ? 1 : 5;
    for (uint64_t seed = 1; seed <= N_SEEDS; seed++) {
        std::vector<float> out = bench.run(seed);
        if (first.empty()) first = out;
        ck_assert_msg(memcmp(out.data(), first.data(), out.size() * sizeof(float)) == 0, "seed %d", (int)seed);
    }
}
END_TEST

// The combination of splits for one head by the rule: relative to the largest score of all, in the order of splits, the
// rotated sum turned back behind that, in f32. parts: {largest, sum} of all splits, then their sums of channels.
static void combine_in_order(const Bench &b, size_t head, int n_splits, float *out) {
    size_t             D = (size_t)b.query.head_dim, width = (b.rig.with.tiled ? 2 : 1) * D, n = (size_t)n_splits;
    size_t             n_parts = b.sequences.size() * (size_t)b.query.n_heads * n;
    const float       *stats = b.parts.data() + 2 * head * n, *sums = b.parts.data() + 2 * n_parts + head * n * width;
    const float       *rotation = b.rig.with.tiled ? b.rig.tiles[1].rotation : nullptr;
    float              largest = stats[0], total = 0, factor[8];
    std::vector<float> all(width, 0.0f);
    for (size_t i = 0; i < n; i++) largest = stats[2 * i] > largest ? stats[2 * i] : largest;
    for (size_t i = 0; i < n; i++) {
        factor[i] = kvq_exp_f32(stats[2 * i] - largest);
        total += factor[i] * stats[2 * i + 1];
        for (size_t c = 0; c < width; c++) all[c] += factor[i] * sums[i * width + c];
    }
    for (size_t j = 0; j < D; j++) {
        float back = 0;
        for (size_t i = 0; i < D && rotation != nullptr; i++) back += rotation[i * D + j] * all[D + i];
        out[j] = (back + all[j]) / total;
    }
}

START_TEST(splits_are_added_up_in_their_order) {
    Case c = split[_i];
    c.n_splits = 5;
    c.lengths = {300, 140};
    Bench              bench(c);
    std::vector<float> out = bench.run(7), expected((size_t)bench.query.head_dim);
    for (size_t head = 0; head < bench.sequences.size() * (size_t)bench.query.n_heads; head++) {
        combine_in_order(bench, head, c.n_splits, expected.data());
        for (size_t j = 0; j < expected.size(); j++)
            ck_assert_uint_eq(kvq_bits_of_float(out[head * expected.size() + j]), kvq_bits_of_float(expected[j]));
    }
}
END_TEST

// What other sequences of a call are, and where pages lie, is of no consequence.
START_TEST(a_sequence_does_not_see_the_others) {
    Case               c = split[_i];
    std::vector<float> together, alone;
    c.n_splits = 3;
    c.lengths = {140, 33, 1};
    {
        Bench bench(c);
        together = bench.run(1);
    }
    c.lengths = {140};
    Bench bench(c);
    alone = bench.run(2);
    ck_assert(memcmp(alone.data(), together.data(), alone.size() * sizeof(float)) == 0);
}
END_TEST

// ---------------------------------------------------------------- refusals

typedef kvq_cuda_attention_call Call_;

struct Refusal {
    bool tiled;
    void (*change)(Call_ *call);
    kvq_status  status;
    const char *fragment;
};
static const Refusal refusals[] = {
    {false, [](Call_ *c) { c->head_dim = 63; }, KVQ_ERR_UNSUPPORTED, "63 channels"},
    {false, [](Call_ *c) { c->head_dim = 258; }, KVQ_ERR_UNSUPPORTED, "258 channels"},
    {false, [](Call_ *c) { c->head_dim = 6; }, KVQ_ERR_UNSUPPORTED, "6 channels"},
    {false, [](Call_ *c) { c->n_splits = 257; }, KVQ_ERR_UNSUPPORTED, "splits 257"},
    {false, [](Call_ *c) { c->n_seqs = 65536; }, KVQ_ERR_UNSUPPORTED, "sequences 65536"},
    {false, [](Call_ *c) { c->max_length = (int64_t)1 << 31; }, KVQ_ERR_UNSUPPORTED, "tokens 2147483648"},
    {false, [](Call_ *c) { c->n_heads = 7; }, KVQ_ERR_USAGE, "do not divide"},
    {false, [](Call_ *c) { c->window = -1; }, KVQ_ERR_USAGE, "window"},
    {false, [](Call_ *c) { c->rope.n_pairs = 33; }, KVQ_ERR_USAGE, "rotated"},
    {false, [](Call_ *c) { c->rope.n_bases = 0; }, KVQ_ERR_USAGE, "rotary tables end"},
    {false, [](Call_ *c) { c->k_rows.bits = 9; }, KVQ_ERR_USAGE, "keys or values"},
    {false, [](Call_ *c) { c->v_rows.n_side = 64; }, KVQ_ERR_USAGE, "keys or values"},
    {false, [](Call_ *c) { c->k_page_bytes = 128; }, KVQ_ERR_USAGE, "pages are smaller"},
    {false, [](Call_ *c) { c->v_page_bytes += 2; }, KVQ_ERR_USAGE, "aligned"},
    {false, [](Call_ *c) { c->max_pages = 0; }, KVQ_ERR_USAGE, "table of pages ends"},
    {true, [](Call_ *c) { c->v_tiles.dim = 3; }, KVQ_ERR_USAGE, "keys or values"},
    {true, [](Call_ *c) { c->v_tiles.scale_exponent = 101; }, KVQ_ERR_USAGE, "keys or values"},
    {true, [](Call_ *c) { c->k_tiles.table = NULL; }, KVQ_ERR_USAGE, "keys or values"},
    {true, [](Call_ *c) { c->n_recent = 64; }, KVQ_ERR_USAGE, "recent tokens"},
};
enum { N_REFUSALS = sizeof refusals / sizeof *refusals };

START_TEST(what_there_is_no_kernel_for_is_refused) {
    const Refusal &r = refusals[_i];
    Case           c = split[r.tiled ? 1 : 0];
    kvq_error      err = {};
    c.lengths = {140};
    Bench bench(c);
    begin(1);
    r.change(&bench.device.call);
    kvq_test_failed(kvq_cuda_attention(&bench.device.call, nullptr, &err), r.status, &err, r.fragment);
    expect_clean();
}
END_TEST

START_TEST(no_sequences_are_no_work) {
    kvq_cuda_attention_call call = {};
    kvq_error               err = {};
    call.n_heads = call.n_kv_heads = 1;
    call.head_dim = 8;
    call.v_rows.bits = call.k_rows.bits = 4;
    call.v_rows.n_groups = call.k_rows.n_groups = 1;
    static const float level[16] = {0};
    call.v_rows.levels = call.k_rows.levels = level;
    call.k_page_bytes = call.v_page_bytes = 128 * 8;
    begin(1);
    ck_assert_uint_eq(kvq_cuda_attention_workspace(&call), 0);
    kvq_test_ok(kvq_cuda_attention(&call, nullptr, &err), &err);
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(angles_are_right_at_any_position, N_TURNS),
    KVQ_LOOP(output_is_that_of_exact_attention, N_TWINS),
    KVQ_LOOP(splits_differ_by_rounding_only, 2),
    KVQ_LOOP(any_schedule_gives_the_same_bits, 4),
    KVQ_LOOP(splits_are_added_up_in_their_order, 2),
    KVQ_LOOP(a_sequence_does_not_see_the_others, 2),
    KVQ_LOOP(what_there_is_no_kernel_for_is_refused, N_REFUSALS),
    KVQ_CASE(no_sequences_are_no_work),
};
KVQ_TEST_MAIN("test_cuda_attention", cases)
