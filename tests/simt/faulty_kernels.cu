// SPDX-License-Identifier: Apache-2.0
// Kernels that are wrong in one way each; see faulty_kernels.h. nvcc compiles them: none of this is an error to it.
#include "faulty_kernels.h"

// Kernel `name` on a block of 64 threads, and its launcher.
#define FAULTY_ON(name, grid, block, dynamic_bytes)                                                                    \
    KVQ_KERNEL name(KVQ_GLOBAL(const float) x, KVQ_GLOBAL_ALIASED(float) y);                                           \
    void       faulty_##name(const float *x, float *y, kvq_stream stream) {                                            \
              KVQ_LAUNCH(name, grid, block, dynamic_bytes, stream, x, y);                                              \
    }                                                                                                                  \
    KVQ_KERNEL name([[maybe_unused]] KVQ_GLOBAL(const float) x, [[maybe_unused]] KVQ_GLOBAL_ALIASED(float) y)
#define FAULTY(name) FAULTY_ON(name, 1, 64, 0)

// ---------------------------------------------------------------- races

FAULTY(no_barrier) {
    KVQ_SHARED(float, part, 64);
    int i = (int)threadIdx.x;
    part[i] = 0;
    __syncthreads();
    part[i] = x[i];     // here: no_barrier/first
    y[i] = part[i ^ 1]; // here: no_barrier/second
}

FAULTY(two_writers) {
    KVQ_SHARED(int, last, 1);
    last[0] = (int)threadIdx.x; // here: two_writers/first
    __syncthreads();
    y[threadIdx.x] = (float)last[0];
}

FAULTY(warp_only) {
    KVQ_SHARED(float, part, 64);
    int i = (int)threadIdx.x;
    part[i] = 0;
    __syncthreads();
    part[i] = x[i]; // here: warp_only/first
    __syncwarp();
    y[i] = part[63 - i]; // here: warp_only/second
}

// The buffer is filled again while others still read.
FAULTY(no_second_barrier) {
    KVQ_SHARED(float, part, 64);
    int i = (int)threadIdx.x;
    for (int round = 0; round < 2; round++) {
        part[i] = x[i + 64 * round]; // here: no_second_barrier/first
        __syncthreads();
        y[i + 64 * round] = part[i ^ 32]; // here: no_second_barrier/second
    }
}

FAULTY(lost_update) {
    KVQ_SHARED(int, count, 1);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    count[0] += 1; // here: lost_update/first
    __syncthreads();
    y[threadIdx.x] = (float)count[0];
}

FAULTY_ON(blocks_race, 4, 64, 0) { y[threadIdx.x] = x[threadIdx.x]; } // here: blocks_race/first

// No race, and nothing to rely on all the same.
FAULTY_ON(order_of_blocks, 16, 1, 0) {
    unsigned rank = atomicAdd(kvq_as<unsigned>(y + 255), 1u);
    if (rank == 0) y[0] = (float)blockIdx.x;
}

FAULTY(order_of_threads) {
    KVQ_SHARED(int, count, 1);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    if (atomicAdd(&count[0], 1) == 0) y[0] = (float)threadIdx.x;
}

// The last block reads what no fence has published.
FAULTY_ON(no_fence, 4, 32, 0) {
    KVQ_SHARED(unsigned, before, 1);
    if (threadIdx.x == 0) {
        y[16 * blockIdx.x] = 1; // here: no_fence/first
        before[0] = atomicAdd(kvq_as<unsigned>(y + 255), 1u);
    }
    __syncthreads();
    if (before[0] == gridDim.x - 1 && threadIdx.x < 4)
        y[128 + threadIdx.x] = y[16 * threadIdx.x]; // here: no_fence/second
}

// The thread that fences has nothing to publish; who wrote has not reached a barrier.
FAULTY_ON(no_barrier_before_fence, 4, 32, 0) {
    KVQ_SHARED(unsigned, before, 1);
    if (threadIdx.x == 1) y[16 * blockIdx.x] = 1; // here: no_barrier_before_fence/first
    if (threadIdx.x == 0) {
        __threadfence();
        before[0] = atomicAdd(kvq_as<unsigned>(y + 255), 1u);
    }
    __syncthreads();
    bool last = before[0] == gridDim.x - 1;
    if (last && threadIdx.x < 4) y[128 + threadIdx.x] = y[16 * threadIdx.x]; // here: no_barrier_before_fence/second
}

// One block publishes nothing, and learns nothing.
FAULTY_ON(one_without_fence, 8, 32, 0) {
    KVQ_SHARED(unsigned, before, 1);
    if (threadIdx.x == 0) {
        y[16 * blockIdx.x] = 1; // here: one_without_fence/first
        if (blockIdx.x != 1) __threadfence();
        before[0] = atomicAdd(kvq_as<unsigned>(y + 255), 1u);
    }
    __syncthreads();
    bool last = before[0] == gridDim.x - 1;
    if (last && threadIdx.x < 8) y[128 + threadIdx.x] = y[16 * threadIdx.x]; // here: one_without_fence/second
}

FAULTY_ON(reads_without_fence, 8, 1, 0) {
    if (blockIdx.x == 0) y[0] = 1; // here: reads_without_fence/first
    if (blockIdx.x != 3) __threadfence();
    atomicAdd(kvq_as<unsigned>(y + 255), 1u);
    if (blockIdx.x == 3) y[1] = y[0]; // here: reads_without_fence/second
}

FAULTY(atomic_and_plain) {
    KVQ_SHARED(int, count, 1);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    atomicAdd(&count[0], 1);                       // here: atomic_and_plain/first
    if (threadIdx.x == 40) y[0] = (float)count[0]; // here: atomic_and_plain/second
}

// Votes give an order in time here, so that only one of the two accesses can find the other; none in memory.
FAULTY_ON(atomic_then_plain, 1, 32, 0) {
    KVQ_SHARED(int, count, 1);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    if (threadIdx.x == 1) atomicAdd(&count[0], 1); // here: atomic_then_plain/first
    (void)__any_sync(0xffffffffu, 1);
    if (threadIdx.x == 0) y[0] = (float)count[0]; // here: atomic_then_plain/second
}

FAULTY_ON(plain_then_atomic, 1, 32, 0) {
    KVQ_SHARED(int, count, 1);
    if (threadIdx.x == 0) count[0] = 0; // here: plain_then_atomic/first
    (void)__any_sync(0xffffffffu, 1);
    if (threadIdx.x == 1) atomicAdd(&count[0], 1); // here: plain_then_atomic/second
}

FAULTY_ON(vote_is_no_barrier, 1, 32, 0) {
    KVQ_SHARED(int, part, 1);
    if (threadIdx.x == 0) part[0] = 1; // here: vote_is_no_barrier/first
    (void)__any_sync(0xffffffffu, 1);
    if (threadIdx.x == 1) y[0] = (float)part[0]; // here: vote_is_no_barrier/second
}

FAULTY_ON(after_syncwarp, 1, 32, 0) {
    KVQ_SHARED(int, part, 1);
    __syncwarp();
    if (threadIdx.x == 1) part[0] = 1; // here: after_syncwarp/first
    (void)__any_sync(0xffffffffu, 1);
    if (threadIdx.x == 0) y[0] = (float)part[0]; // here: after_syncwarp/second
}

// The writer is behind all readers of its own warp, and not behind the one of the other.
FAULTY(second_reader) {
    KVQ_SHARED(float, part, 1);
    if (threadIdx.x == 0) part[0] = x[0];
    __syncthreads();
    if (threadIdx.x <= 32) y[threadIdx.x] = part[0]; // here: second_reader/first
    __syncwarp();
    if (threadIdx.x == 2) part[0] = 0; // here: second_reader/second
}

// ---------------------------------------------------------------- bounds

FAULTY(shared_read) {
    KVQ_SHARED(float, part, 64);
    int i = (int)threadIdx.x;
    part[i] = x[i];
    __syncthreads();
    y[i] = part[i + 1]; // here: shared_read/first
}

FAULTY(shared_write) {
    KVQ_SHARED(float, part, 63);
    KVQ_SHARED(float, next, 64); // behind it on a device, which would take the write
    int i = (int)threadIdx.x;
    next[i] = 0;
    part[i] = x[i]; // here: shared_write/first
    __syncthreads();
    y[i] = next[i] + part[0];
}

FAULTY(global_read) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; } // here: global_read/first

FAULTY(global_write) { y[threadIdx.x + 200] = x[threadIdx.x]; } // here: global_write/first

KVQ_KERNEL store_zero(KVQ_GLOBAL(float) y) { y[threadIdx.x] = 0; } // here: host_pointer/first

void faulty_host_pointer(const float *, float *, kvq_stream stream) {
    float local[64] = {0};
    KVQ_LAUNCH(store_zero, 1, 64, 0, stream, local);
}

FAULTY(raw_range) {
    if (threadIdx.x != 0) return;
    const float *row = kvq_raw(x + 250, 7); // here: raw_range/first
    y[0] = row[6];
}

// ---------------------------------------------------------------- initialisation, alignment

FAULTY(uninitialised) {
    KVQ_SHARED(float, part, 64);
    if (threadIdx.x != 7) part[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = part[threadIdx.x]; // here: uninitialised/first
}

// What another block left there.
FAULTY_ON(stale_shared, 4, 64, 0) {
    KVQ_SHARED(float, part, 64);
    if (blockIdx.x == 0) part[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = part[threadIdx.x]; // here: stale_shared/first
}

FAULTY(uninitialised_global) { y[threadIdx.x] += 1.0f; } // here: uninitialised_global/first

FAULTY(misaligned) {
    if (threadIdx.x != 3) return;
    uint4 v = kvq_as<uint4>(x + 2)[0]; // here: misaligned/first
    kvq_as<uint4>(y)[0] = v;
}

// ---------------------------------------------------------------- divergence

FAULTY(exit_before_barrier) {
    if (threadIdx.x >= 48) return;
    __syncthreads(); // here: exit_before_barrier/first
    y[threadIdx.x] = x[threadIdx.x];
}

FAULTY(two_barriers) {
    if (threadIdx.x < 32)
        __syncthreads(); // here: two_barriers/first
    else
        __syncthreads(); // here: two_barriers/second
    y[threadIdx.x] = x[threadIdx.x];
}

FAULTY(missing_lane) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 31) v += __shfl_xor_sync(0xffffffffu, v, 1); // here: missing_lane/first
    y[threadIdx.x] = v;
}

FAULTY(missing_lane_of_barrier) {
    if (threadIdx.x == 5) __syncthreads(); // here: missing_lane_of_barrier/second
    __syncwarp();                          // here: missing_lane_of_barrier/first
    y[threadIdx.x] = x[threadIdx.x];
}

FAULTY(two_shuffles) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 2 == 0)
        v += __shfl_xor_sync(0xffffffffu, v, 1); // here: two_shuffles/first
    else
        v -= __shfl_xor_sync(0xffffffffu, v, 1); // here: two_shuffles/second
    y[threadIdx.x] = v;
}

FAULTY(two_masks) {
    unsigned mask = threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u;
    y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1); // here: two_masks/first
}

FAULTY_ON(no_such_lane, 1, 16, 0) {
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1); // here: no_such_lane/first
}

FAULTY(not_in_mask) {
    unsigned yes = __ballot_sync(0x0000ffffu, x[threadIdx.x] > 0); // here: not_in_mask/first
    y[threadIdx.x] = (float)yes;
}

FAULTY(lane_outside) {
    if (threadIdx.x % 32 >= 16) return;
    y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 16); // here: lane_outside/first
}

FAULTY(spin) {
    KVQ_SHARED(int, flag, 1);
    if (threadIdx.x == 0) flag[0] = 0;
    __syncthreads();
    while (threadIdx.x == 9) atomicAdd(&flag[0], 1); // here: spin/first
    y[threadIdx.x] = 0;
}

// ---------------------------------------------------------------- launches

FAULTY_ON(too_many_threads, 1, 1025, 0) { y[0] = x[0]; }
FAULTY_ON(too_much_shared, 1, 64, 300000) { y[0] = x[0]; }
FAULTY_ON(not_allowed, 1, 64, 50000) { y[0] = x[0]; }

// ---------------------------------------------------------------- asynchronous copies and matrices

FAULTY(early_read) {
    KVQ_SHARED(float, part, 256);
    int i = (int)threadIdx.x;
    kvq_copy_async_16(part + 4 * i, x + 4 * i); // here: early_read/second
    kvq_copy_commit();
    y[i] = part[4 * i]; // here: early_read/first
    kvq_copy_wait<0>();
}

FAULTY(group_too_new) {
    KVQ_SHARED(float, part, 512);
    int i = (int)threadIdx.x;
    kvq_copy_async_16(part + 4 * i, x + 4 * i);
    kvq_copy_commit();
    kvq_copy_async_16(part + 256 + 4 * i, x + 4 * i); // here: group_too_new/second
    kvq_copy_commit();
    kvq_copy_wait<1>();
    y[i] = part[4 * i];
    y[i + 64] = part[256 + 4 * i]; // here: group_too_new/first
}

FAULTY(overwritten_copy) {
    KVQ_SHARED(float, part, 256);
    int i = (int)threadIdx.x;
    kvq_copy_async_16(part + 4 * i, x + 4 * i); // here: overwritten_copy/second
    kvq_copy_commit();
    part[4 * i] = 0; // here: overwritten_copy/first
    kvq_copy_wait<0>();
    y[i] = part[4 * i + 1];
}

// Each thread has waited for its own copy, and reads another's.
FAULTY(copy_without_barrier) {
    KVQ_SHARED(float, part, 256);
    int i = (int)threadIdx.x;
    for (int j = 0; j < 4; j++) part[4 * i + j] = 0;
    __syncthreads();
    kvq_copy_async_16(part + 4 * i, x + 4 * i); // here: copy_without_barrier/first
    kvq_copy_commit();
    kvq_copy_wait<0>();
    y[i] = part[4 * (63 - i)]; // here: copy_without_barrier/second
}

// A barrier in front of the wait is none behind it.
FAULTY_ON(barrier_before_wait, 1, 32, 0) {
    KVQ_SHARED(float, part, 128);
    int i = (int)threadIdx.x;
    kvq_copy_async_16(part + 4 * i, x + 4 * i); // here: barrier_before_wait/first
    kvq_copy_commit();
    __syncthreads();
    kvq_copy_wait<0>();
    (void)__any_sync(0xffffffffu, 1);
    y[i] = part[4 * (31 - i)]; // here: barrier_before_wait/second
}

// The copy is begun while others may still read what was there.
FAULTY(copy_over_readers) {
    KVQ_SHARED(float, part, 256);
    int i = (int)threadIdx.x;
    for (int j = 0; j < 4; j++) part[4 * i + j] = 0;
    __syncthreads();
    y[i] = part[4 * (63 - i)]; // here: copy_over_readers/first
    __syncwarp();
    kvq_copy_async_16(part + 4 * i, x + 4 * i); // here: copy_over_readers/second
    kvq_copy_commit();
    kvq_copy_wait<0>();
}

FAULTY(misaligned_copy) {
    KVQ_SHARED(float, part, 260);
    kvq_copy_async_16(part + 4 * threadIdx.x + 2, x + 4 * threadIdx.x); // here: misaligned_copy/first
    kvq_copy_commit();
    kvq_copy_wait<0>();
    y[threadIdx.x] = part[4 * threadIdx.x + 2];
}

FAULTY(misaligned_row) {
    KVQ_SHARED(float, part, 256);
    unsigned fragment[1];
    for (int j = 0; j < 4; j++) part[4 * threadIdx.x + j] = 0;
    __syncthreads();
    kvq_ldmatrix<1>(fragment, part + 6 * (threadIdx.x % 8)); // here: misaligned_row/first
    y[threadIdx.x] = x[fragment[0]];
}

FAULTY(half_a_warp) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = (float)kvq_movmatrix_trans(threadIdx.x); // here: half_a_warp/first
}
