// SPDX-License-Identifier: Apache-2.0
//
// One kernel for each fault that the emulator finds. A line that a report must name ends in a comment "// here: NAME",
// by which the test finds its number.
#ifndef FAULTY_KERNELS_H
#define FAULTY_KERNELS_H

#include "device.cuh"

typedef void (*faulty_launch)(const float *x, float *y, kvq_stream stream); // 256 elements each

void faulty_no_barrier(const float *x, float *y, kvq_stream stream);
void faulty_two_writers(const float *x, float *y, kvq_stream stream);
void faulty_warp_only(const float *x, float *y, kvq_stream stream);
void faulty_no_second_barrier(const float *x, float *y, kvq_stream stream);
void faulty_lost_update(const float *x, float *y, kvq_stream stream);
void faulty_shared_read(const float *x, float *y, kvq_stream stream);
void faulty_shared_write(const float *x, float *y, kvq_stream stream);
void faulty_global_read(const float *x, float *y, kvq_stream stream);
void faulty_global_write(const float *x, float *y, kvq_stream stream);
void faulty_host_pointer(const float *x, float *y, kvq_stream stream);
void faulty_raw_range(const float *x, float *y, kvq_stream stream);
void faulty_exit_before_barrier(const float *x, float *y, kvq_stream stream);
void faulty_two_barriers(const float *x, float *y, kvq_stream stream);
void faulty_missing_lane(const float *x, float *y, kvq_stream stream);
void faulty_missing_lane_of_barrier(const float *x, float *y, kvq_stream stream);
void faulty_not_in_mask(const float *x, float *y, kvq_stream stream);
void faulty_lane_outside(const float *x, float *y, kvq_stream stream);
void faulty_uninitialised(const float *x, float *y, kvq_stream stream);
void faulty_uninitialised_global(const float *x, float *y, kvq_stream stream);
void faulty_misaligned(const float *x, float *y, kvq_stream stream);
void faulty_spin(const float *x, float *y, kvq_stream stream);
void faulty_blocks_race(const float *x, float *y, kvq_stream stream);
void faulty_order_of_blocks(const float *x, float *y, kvq_stream stream);
void faulty_no_fence(const float *x, float *y, kvq_stream stream);
void faulty_atomic_and_plain(const float *x, float *y, kvq_stream stream);
void faulty_atomic_then_plain(const float *x, float *y, kvq_stream stream);
void faulty_plain_then_atomic(const float *x, float *y, kvq_stream stream);
void faulty_second_reader(const float *x, float *y, kvq_stream stream);
void faulty_vote_is_no_barrier(const float *x, float *y, kvq_stream stream);
void faulty_stale_shared(const float *x, float *y, kvq_stream stream);
void faulty_no_barrier_before_fence(const float *x, float *y, kvq_stream stream);
void faulty_one_without_fence(const float *x, float *y, kvq_stream stream);
void faulty_reads_without_fence(const float *x, float *y, kvq_stream stream);
void faulty_barrier_before_wait(const float *x, float *y, kvq_stream stream);
void faulty_two_shuffles(const float *x, float *y, kvq_stream stream);
void faulty_two_masks(const float *x, float *y, kvq_stream stream);
void faulty_after_syncwarp(const float *x, float *y, kvq_stream stream);
void faulty_no_such_lane(const float *x, float *y, kvq_stream stream);
void faulty_order_of_threads(const float *x, float *y, kvq_stream stream);
void faulty_too_many_threads(const float *x, float *y, kvq_stream stream);
void faulty_too_much_shared(const float *x, float *y, kvq_stream stream);
void faulty_early_read(const float *x, float *y, kvq_stream stream);
void faulty_group_too_new(const float *x, float *y, kvq_stream stream);
void faulty_overwritten_copy(const float *x, float *y, kvq_stream stream);
void faulty_copy_without_barrier(const float *x, float *y, kvq_stream stream);
void faulty_copy_over_readers(const float *x, float *y, kvq_stream stream);
void faulty_misaligned_copy(const float *x, float *y, kvq_stream stream);
void faulty_misaligned_row(const float *x, float *y, kvq_stream stream);
void faulty_half_a_warp(const float *x, float *y, kvq_stream stream);
void faulty_not_allowed(const float *x, float *y, kvq_stream stream);

#endif
