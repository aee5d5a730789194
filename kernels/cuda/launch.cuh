// SPDX-License-Identifier: Apache-2.0
//
// How the operations start their kernels: grids that a device takes at any size, and what became of a launch. The
// kernels loop over what a grid does not cover, so results do not depend on the size of a grid.
#ifndef KVQ_LAUNCH_CUH
#define KVQ_LAUNCH_CUH

#include "device.cuh"
#include "kvq_core.h"

// A stream as the headers for C have it.
static inline kvq_stream op_stream(void *stream) { return static_cast<kvq_stream>(stream); }

// As many blocks as the largest devices run at a time; more would only be started later. Tests set a few, so that small
// sizes make blocks go round their loops.
#ifndef KVQ_CUDA_MAX_BLOCKS
#define KVQ_CUDA_MAX_BLOCKS 1024
#endif

enum { OP_THREADS = 256, OP_MAX_BLOCKS = KVQ_CUDA_MAX_BLOCKS }; // threads of a block of every operation

// Bounds of a kernel with long chains or many sums: without the second number, the assembler aims at more blocks beside
// each other and keeps values in memory for it.
#ifdef __CUDACC__
#define OP_BOUNDS __launch_bounds__(OP_THREADS, 1)
#else
#define OP_BOUNDS
#endif

static inline unsigned op_blocks(int64_t n_items) {
    return n_items < OP_MAX_BLOCKS ? (unsigned)n_items : (unsigned)OP_MAX_BLOCKS;
}
static inline unsigned op_blocks_of_elements(int64_t n) { return op_blocks((n + OP_THREADS - 1) / OP_THREADS); }

// Elements of a thread: the first, and from one to the next.
KVQ_DEVICE int64_t op_first() { return (int64_t)blockIdx.x * OP_THREADS + threadIdx.x; }
KVQ_DEVICE int64_t op_stride() { return (int64_t)gridDim.x * OP_THREADS; }

// Whether the launch before was taken. What goes wrong while it runs is seen where somebody waits for it.
static inline kvq_status op_launched(const char *what, kvq_error *err) {
    const char *failure = kvq_launch_error();
    if (failure == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "the device refuses %s: %s", what, failure);
}

#endif
