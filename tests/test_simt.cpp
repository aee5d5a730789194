// SPDX-License-Identifier: Apache-2.0
// The emulator of the device: kernels that are correct run clean and give the same bits for every seed; each faulty
// kernel is reported, as its kind and with its lines.
#include <stdio.h>
#include <string.h>

#include <string>

#include "emulated_rig.h"
#include "faulty_kernels.h"
#include "sample_kernels.h"

enum { N_SEEDS = 20 };

// Line of a source of the emulator's tests that ends in "// here: `mark`"; 0: none.
static int line_of(const char *file, const std::string &mark) {
    FILE       *source = fopen((std::string(KVQ_SIMT_SOURCE_DIR "/") + file).c_str(), "r");
    std::string end = "// here: " + mark + "\n";
    char        text[512];
    int         found = 0;
    ck_assert_ptr_nonnull(source);
    for (int line = 1; fgets(text, sizeof text, source) != nullptr; line++) {
        size_t length = strlen(text);
        if (length >= end.size() && end == text + length - end.size()) found = line;
    }
    (void)fclose(source);
    return found;
}

// ---------------------------------------------------------------- correct kernels

static std::vector<float> ramp(size_t n) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) x[i] = 0.37f * (float)((i * 7919) % 1001) - 100.0f;
    return x;
}

static std::vector<int> integers(size_t n) {
    std::vector<int> x(n);
    for (size_t i = 0; i < n; i++) x[i] = (int)((i * 7919) % 1001) - 500;
    return x;
}

START_TEST(sums_of_blocks_are_those_of_the_tree) {
    begin((uint64_t)_i);
    std::vector<float>  x = ramp(3 * 256);
    simt::Buffer<float> d_x("x", x), d_sums("sums", 3);
    sample_block_sums(d_x.data(), d_sums.data(), 3, nullptr);
    expect_clean();
    for (size_t b = 0; b < 3; b++) {
        for (size_t half = 128; half > 0; half /= 2) {
            for (size_t i = 0; i < half; i++) x[b * 256 + i] += x[b * 256 + i + half];
        }
        ck_assert_uint_eq(kvq_bits_of_float(x[b * 256]), kvq_bits_of_float(d_sums.values()[b]));
    }
}
END_TEST

START_TEST(scans_of_warps_are_sums_of_the_lanes_before) {
    begin((uint64_t)_i);
    std::vector<int>  x = integers(128);
    simt::Buffer<int> d_x("x", x), d_y("y", 128);
    sample_warp_scan(d_x.data(), d_y.data(), 4, nullptr);
    expect_clean();
    for (int i = 0, sum = 0; i < 128; i++) {
        sum = i % 32 == 0 ? x[(size_t)i] : sum + x[(size_t)i];
        ck_assert_int_eq(d_y.values()[(size_t)i], sum);
    }
}
END_TEST

START_TEST(transposed_through_shared_memory) {
    begin((uint64_t)_i);
    std::vector<float>  x = ramp(64 * 96);
    simt::Buffer<float> d_x("x", x), d_y("y", 64 * 96);
    sample_transpose(d_x.data(), d_y.data(), 64, 96, nullptr);
    sample_transpose(d_y.data(), d_x.data(), 96, 64, nullptr); // a launch is behind all of the one before
    expect_clean();
    ck_assert(d_x.values() == x);
    for (size_t i = 0; i < 64; i++) {
        for (size_t j = 0; j < 96; j++) ck_assert(d_y.values()[j * 64 + i] == x[i * 96 + j]);
    }
}
END_TEST

START_TEST(histogram_by_atomics) {
    begin((uint64_t)_i);
    std::vector<uint8_t>  x(1000);
    std::vector<unsigned> expected(SAMPLE_BINS, 0), zero(SAMPLE_BINS, 0);
    for (size_t i = 0; i < x.size(); i++) x[i] = (uint8_t)(i * i % SAMPLE_BINS), expected[x[i]]++;
    simt::Buffer<uint8_t>  d_x("x", x);
    simt::Buffer<unsigned> d_counts("counts", zero);
    sample_histogram(d_x.data(), d_counts.data(), 1000, nullptr);
    expect_clean();
    ck_assert(d_counts.values() == expected);
}
END_TEST

START_TEST(last_block_sees_what_the_others_published) {
    begin((uint64_t)_i);
    std::vector<int>       x = integers(5 * 256);
    std::vector<unsigned>  zero(1, 0);
    simt::Buffer<int>      d_x("x", x), d_parts("parts", 5), d_total("total", 1);
    simt::Buffer<unsigned> d_arrived("arrived", zero);
    sample_last_block(d_x.data(), d_parts.data(), d_arrived.data(), d_total.data(), 5, nullptr);
    expect_clean();
    int sum = 0;
    for (int v : x) sum += v;
    ck_assert_int_eq(d_total.values()[0], sum);
}
END_TEST

START_TEST(vectors_within_a_warp_need_its_barrier_only) {
    begin((uint64_t)_i);
    std::vector<float>  x = ramp(256);
    simt::Buffer<float> d_x("x", x), d_y("y", 256);
    sample_vectors(d_x.data(), d_y.data(), 256, nullptr);
    expect_clean();
    for (size_t i = 0; i < 256; i++) ck_assert(d_y.values()[i] == x[i] + 1);
}
END_TEST

START_TEST(pipeline_of_asynchronous_copies) {
    begin((uint64_t)_i);
    for (size_t n = 4; n <= 1300; n += 324) {
        std::vector<int>  x = integers(n);
        simt::Buffer<int> d_x("x", x), d_sum("sum", 1);
        sample_pipeline(d_x.data(), d_sum.data(), (int)n, nullptr);
        expect_clean();
        int sum = 0;
        for (int v : x) sum += v;
        ck_assert_int_eq(d_sum.values()[0], sum);
    }
}
END_TEST

// ---------------------------------------------------------------- the order of threads and blocks

static float run_once(faulty_launch launch, uint64_t seed, size_t at) {
    simt::Options options;
    options.seed = seed;
    if (launch == faulty_order_of_threads) options.preempt_every = 1u << 20; // by the order of starting alone
    simt::begin(options);
    simt::Buffer<float> d_x("x", ramp(256)), d_y("y", std::vector<float>(256, 0.0f));
    launch(d_x.data(), d_y.data(), nullptr);
    return d_y.values()[at];
}

// Whether some seed gives another result than seed 0 does.
static bool depends_on_seed(faulty_launch launch, size_t at) {
    float first = run_once(launch, 0, at);
    bool  differs = false;
    for (uint64_t seed = 1; seed < N_SEEDS; seed++) differs |= run_once(launch, seed, at) != first;
    return differs;
}

// What a fault does to results shows, even if nobody looked at the reports.
START_TEST(order_is_drawn) {
    ck_assert(depends_on_seed(faulty_two_writers, 0));
    ck_assert(depends_on_seed(faulty_lost_update, 0));
    ck_assert(depends_on_seed(faulty_atomic_and_plain, 0));
    ck_assert(depends_on_seed(faulty_order_of_blocks, 0));
    ck_assert(depends_on_seed(faulty_order_of_threads, 0));
}
END_TEST

START_TEST(same_seed_gives_the_same_run) {
    for (uint64_t seed = 0; seed < 5; seed++) {
        std::string text;
        float       first = run_once(faulty_two_writers, seed, 0);
        text = simt::report_text();
        ck_assert(run_once(faulty_two_writers, seed, 0) == first);
        ck_assert(simt::report_text() == text);
    }
}
END_TEST

// ---------------------------------------------------------------- faulty kernels

struct Fault {
    const char   *name;
    faulty_launch launch;
    simt::Kind    kind;
    simt::Space   space;
    bool          has_second; // another thread is named
};

#define FAULT(name, kind, space, has_second)                                                                           \
    { #name, faulty_##name, simt::kind, simt::space, has_second }

static const Fault faults[] = {
    FAULT(no_barrier, RACE, SHARED, true),
    FAULT(two_writers, RACE, SHARED, true),
    FAULT(warp_only, RACE, SHARED, true),
    FAULT(no_second_barrier, RACE, SHARED, true),
    FAULT(lost_update, RACE, SHARED, true),
    FAULT(blocks_race, RACE, GLOBAL, true),
    FAULT(no_fence, RACE, GLOBAL, true),
    FAULT(atomic_and_plain, RACE, SHARED, true),
    FAULT(atomic_then_plain, RACE, SHARED, true),
    FAULT(plain_then_atomic, RACE, SHARED, true),
    FAULT(second_reader, RACE, SHARED, true),
    FAULT(vote_is_no_barrier, RACE, SHARED, true),
    FAULT(stale_shared, UNINITIALISED, SHARED, false),
    FAULT(no_barrier_before_fence, RACE, GLOBAL, true),
    FAULT(one_without_fence, RACE, GLOBAL, true),
    FAULT(reads_without_fence, RACE, GLOBAL, true),
    FAULT(barrier_before_wait, RACE, SHARED, true),
    FAULT(after_syncwarp, RACE, SHARED, true),
    FAULT(two_shuffles, DIVERGENT_WARP, SHARED, true),
    FAULT(two_masks, DIVERGENT_WARP, SHARED, true),
    FAULT(no_such_lane, DIVERGENT_WARP, SHARED, false),
    FAULT(shared_read, OUT_OF_BOUNDS, SHARED, false),
    FAULT(shared_write, OUT_OF_BOUNDS, SHARED, false),
    FAULT(global_read, OUT_OF_BOUNDS, GLOBAL, false),
    FAULT(global_write, OUT_OF_BOUNDS, GLOBAL, false),
    FAULT(host_pointer, OUT_OF_BOUNDS, GLOBAL, false),
    FAULT(raw_range, OUT_OF_BOUNDS, GLOBAL, false),
    FAULT(uninitialised, UNINITIALISED, SHARED, false),
    FAULT(uninitialised_global, UNINITIALISED, GLOBAL, false),
    FAULT(misaligned, MISALIGNED, GLOBAL, false),
    FAULT(exit_before_barrier, DIVERGENT_BARRIER, SHARED, true),
    FAULT(two_barriers, DIVERGENT_BARRIER, SHARED, true),
    FAULT(missing_lane, DIVERGENT_WARP, SHARED, true),
    FAULT(missing_lane_of_barrier, DIVERGENT_WARP, SHARED, true),
    FAULT(not_in_mask, BAD_LANE, SHARED, false),
    FAULT(lane_outside, BAD_LANE, SHARED, false),
    FAULT(spin, DEADLOCK, SHARED, false),
    FAULT(early_read, EARLY_ASYNC, SHARED, true),
    FAULT(group_too_new, EARLY_ASYNC, SHARED, true),
    FAULT(overwritten_copy, EARLY_ASYNC, SHARED, true),
    FAULT(copy_without_barrier, RACE, SHARED, true),
    FAULT(copy_over_readers, RACE, SHARED, true),
    FAULT(misaligned_copy, MISALIGNED, SHARED, false),
    FAULT(misaligned_row, MISALIGNED, SHARED, false),
    FAULT(half_a_warp, DIVERGENT_WARP, SHARED, true),
    FAULT(not_allowed, BAD_LAUNCH, SHARED, false),
    FAULT(too_many_threads, BAD_LAUNCH, SHARED, false),
    FAULT(too_much_shared, BAD_LAUNCH, SHARED, false),
};
enum { N_FAULTS = sizeof faults / sizeof *faults };

// Whether a report names the lines of the fault: `first` and, where there is one, `second`, in any order.
static bool names_lines(const simt::Report &r, int first, int second) {
    if (first == 0) return true;
    if (second == 0) return r.first.at.line == first;
    return (r.first.at.line == first && r.second.at.line == second) ||
           (r.first.at.line == second && r.second.at.line == first);
}

static bool same(uint3 a, uint3 b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

// Threads of a race: of two blocks in global memory, two of one block in shared memory.
static bool names_threads(const simt::Report &r) {
    if (r.kind != simt::RACE) return true;
    bool same_block = same(r.first.block, r.second.block), same_thread = same(r.first.thread, r.second.thread);
    return r.space == simt::GLOBAL ? !same_block : same_block && !same_thread;
}

// Every report of a faulty kernel is of its kind and names its lines: nothing else is wrong with it.
START_TEST(fault_is_reported_with_its_lines) {
    const Fault &fault = faults[_i / 5];
    int          first = line_of("faulty_kernels.cu", std::string(fault.name) + "/first"),
        second = line_of("faulty_kernels.cu", std::string(fault.name) + "/second");
    simt::Options options;
    options.seed = 100 + (uint64_t)(_i % 5);
    options.max_accesses = 20000;
    simt::begin(options);
    simt::Buffer<float> d_x("x", ramp(256)), d_y("y", 256);
    if (fault.launch != faulty_uninitialised_global) d_y.set(std::vector<float>(256, 0.0f));
    fault.launch(d_x.data(), d_y.data(), nullptr);
    ck_assert_msg(!simt::reports().empty(), "%s: nothing was reported", fault.name);
    for (const simt::Report &r : simt::reports()) {
        ck_assert_msg(r.kind == fault.kind && r.space == fault.space && r.has_second == fault.has_second &&
                          names_lines(r, first, second) && names_threads(r) &&
                          r.kernel.find(fault.name == std::string("host_pointer") ? "store_zero" : fault.name) == 0,
                      "%s (lines %d, %d): %s", fault.name, first, second, simt::report_text().c_str());
    }
}
END_TEST

START_TEST(both_threads_of_a_race_are_named) {
    (void)run_once(faulty_no_barrier, 1, 0);
    for (const simt::Report &r : simt::reports()) ck_assert_uint_eq(r.first.thread.x ^ r.second.thread.x, 1);
    ck_assert_uint_le(simt::reports().size(), 2); // who came later read, or wrote
    ck_assert_int_gt(simt::reports()[0].count, 1);
    (void)run_once(faulty_reads_without_fence, 1, 0);
    for (const simt::Report &r : simt::reports()) ck_assert_uint_eq(r.first.block.x + r.second.block.x, 3);
}
END_TEST

START_TEST(launch_after_a_broken_one_runs) {
    begin(1);
    simt::Buffer<float> d_x("x", ramp(256)), d_y("y", 256);
    faulty_exit_before_barrier(d_x.data(), d_y.data(), nullptr);
    begin(2);
    sample_vectors(d_x.data(), d_y.data(), 256, nullptr);
    expect_clean();
    ck_assert(d_y.values()[9] == d_x.values()[9] + 1);
}
END_TEST

START_TEST(copies_end_with_their_block) {
    begin(1);
    std::vector<int>  x(4, 5);
    simt::Buffer<int> d_x("x", x), d_y("y", 1);
    sample_unfinished_copy(d_x.data(), d_y.data(), nullptr);
    expect_clean();
    ck_assert_int_eq(d_y.values()[0], 7);
}
END_TEST

START_TEST(addresses_belong_to_their_buffer) {
    static char bytes[64];
    begin(1);
    simt::Memory *m = simt::add_memory("middle", bytes + 16, 16, true);
    ck_assert_ptr_null(simt::find_memory(bytes + 15));
    ck_assert_ptr_eq(simt::find_memory(bytes + 16), m);
    ck_assert_ptr_eq(simt::find_memory(bytes + 32), m); // its end
    ck_assert_ptr_null(simt::find_memory(bytes + 33));
    simt::remove_memory(bytes + 16);
    ck_assert_ptr_null(simt::find_memory(bytes + 16));
}
END_TEST

// nvcc refuses what is too large by itself, so these are only here.
KVQ_KERNEL too_much_static(KVQ_GLOBAL(float) y) {
    KVQ_SHARED(float, part, 12289);
    part[threadIdx.x] = 0;
    y[threadIdx.x] = part[threadIdx.x];
}

KVQ_KERNEL both_kinds(KVQ_GLOBAL(float) y) {
    KVQ_SHARED(float, part, 4);
    part[0] = 0;
    y[0] = part[0];
}

START_TEST(shared_memory_has_two_limits) {
    simt::Buffer<float> d_y("y", 32);
    begin(1);
    KVQ_LAUNCH(too_much_static, 1, 32, 0, nullptr, d_y.data());
    ck_assert_int_eq(simt::reports().at(0).kind, simt::BAD_LAUNCH);
    begin(1);
    ck_assert(KVQ_ALLOW_SHARED(both_kinds, 232448));
    KVQ_LAUNCH(both_kinds, 1, 1, 232432, nullptr, d_y.data());
    expect_clean();
    KVQ_LAUNCH(both_kinds, 1, 1, 232448, nullptr, d_y.data());
    ck_assert_int_eq(simt::reports().at(0).kind, simt::BAD_LAUNCH);
}
END_TEST

START_TEST(launches_know_the_limits_of_a_block) {
    simt::Buffer<float> d_x("x", ramp(256)), d_y("y", 256);
    begin(1);
    faulty_too_many_threads(d_x.data(), d_y.data(), nullptr);
    ck_assert_ptr_nonnull(kvq_launch_error());
    begin(1);
    ck_assert(!sample_large_shared(d_y.data(), 232452, nullptr));
    expect_clean();
    ck_assert(sample_large_shared(d_y.data(), 232448, nullptr));
    ck_assert_ptr_null(kvq_launch_error());
    expect_clean();
    ck_assert(d_y.values()[0] == 58112);
}
END_TEST

// Blocks and threads of three dimensions, each exactly once; and a warp whose last lanes do not exist.
START_TEST(indices_of_three_dimensions) {
    begin(2);
    std::vector<unsigned>  zero(2 * 3 * 2 * 5 * 3 * 2, 0);
    simt::Buffer<unsigned> d_counts("counts", zero);
    sample_indices(d_counts.data(), nullptr);
    expect_clean();
    for (size_t i = 0; i < zero.size(); i++) ck_assert_uint_eq(d_counts.values()[i], i + 1);
}
END_TEST

// A buffer too large to be searched for races is still checked for all else.
START_TEST(large_buffers_are_checked_without_races) {
    for (int is_large = 0; is_large < 2; is_large++) {
        simt::Options options;
        options.max_traced_bytes = is_large ? 1023 : 1024;
        simt::begin(options);
        simt::Buffer<float> d_x("x", ramp(256)), d_y("y", 256);
        faulty_blocks_race(d_x.data(), d_y.data(), nullptr);
        ck_assert_int_eq(simt::reports().empty(), is_large);
        faulty_global_write(d_x.data(), d_y.data(), nullptr);
        ck_assert_int_eq(simt::reports().back().kind, simt::OUT_OF_BOUNDS);
    }
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(sums_of_blocks_are_those_of_the_tree, N_SEEDS),
    KVQ_LOOP(scans_of_warps_are_sums_of_the_lanes_before, N_SEEDS),
    KVQ_LOOP(transposed_through_shared_memory, N_SEEDS),
    KVQ_LOOP(histogram_by_atomics, N_SEEDS),
    KVQ_LOOP(last_block_sees_what_the_others_published, N_SEEDS),
    KVQ_LOOP(vectors_within_a_warp_need_its_barrier_only, N_SEEDS),
    KVQ_LOOP(pipeline_of_asynchronous_copies, N_SEEDS),
    KVQ_CASE(order_is_drawn),
    KVQ_CASE(same_seed_gives_the_same_run),
    KVQ_CASE(both_threads_of_a_race_are_named),
    KVQ_CASE(launch_after_a_broken_one_runs),
    KVQ_CASE(copies_end_with_their_block),
    KVQ_CASE(addresses_belong_to_their_buffer),
    KVQ_CASE(shared_memory_has_two_limits),
    KVQ_CASE(launches_know_the_limits_of_a_block),
    KVQ_CASE(indices_of_three_dimensions),
    KVQ_CASE(large_buffers_are_checked_without_races),
    KVQ_LOOP(fault_is_reported_with_its_lines, 5 * N_FAULTS),
};
KVQ_TEST_MAIN("test_simt", cases)
