// SPDX-License-Identifier: Apache-2.0
//
// What the suites of CUDA operations share: the CPU backend as their specification, numbers, and runs of a kernel under
// the emulator with several orders of threads and blocks, of which each must be free of reports.
#ifndef CUDA_OPS_RIG_H
#define CUDA_OPS_RIG_H

#include <string.h>

#include <string>
#include <vector>

#include "emulated_rig.h"
#include "kvq_cuda_ops.h"

typedef std::vector<float> Floats;

enum { RIG_SEEDS = 3 }; // orders of threads and blocks

static kvq_context  rig_context;
static kvq_backend *cpu;

static inline void rig_open() {
    rig_context = kvq_test_context();
    kvq_test_ok(kvq_backend_cpu(&rig_context, KVQ_COMPUTE_F32, &cpu, NULL), NULL);
}
static inline void rig_close() { cpu->destroy(&cpu); }

static inline double rig_uniform(uint32_t stream, size_t i) { return kvq_rng_uniform(5, KVQ_RNG_TEST, stream, i); }

// Uniform in [-scale, scale].
static inline Floats rig_randoms(size_t n, uint32_t stream, double scale) {
    Floats x(n);
    for (size_t i = 0; i < n; i++) x[i] = (float)(scale * (2 * rig_uniform(stream, i) - 1));
    return x;
}

// The same with magnitudes from 2^-12 to 2^12: sums of such numbers show in which order and width they were added.
static inline Floats rig_wide_randoms(size_t n, uint32_t stream) {
    Floats x = rig_randoms(n, stream, 1);
    for (size_t i = 0; i < n; i++) x[i] = ldexpf(x[i], (int)(25 * rig_uniform(stream + 1000, i)) - 12);
    return x;
}

static inline void rig_same_bits(const Floats &value, const Floats &expected, const std::string &what) {
    ck_assert_uint_eq(value.size(), expected.size());
    for (size_t i = 0; i < value.size(); i++)
        ck_assert_msg(memcmp(&value[i], &expected[i], sizeof(float)) == 0, "%s[%zu]: %.9g instead of %.9g",
                      what.c_str(), i, (double)value[i], (double)expected[i]);
}

#endif
