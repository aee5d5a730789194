// SPDX-License-Identifier: Apache-2.0
//
// What the suites of the device codecs share: emulated memory with a spec in it, and numbers that are awkward on
// purpose.
#ifndef CUDA_CODEC_RIG_H
#define CUDA_CODEC_RIG_H

#include <limits.h>
#include <math.h>

#include <vector>

#include "emulated_rig.h"
#include "kvq_cuda_codec.h"

static inline double uniform(uint32_t stream, size_t index) {
    return kvq_rng_uniform(53, KVQ_RNG_TEST, stream, (uint64_t)index);
}

// A spec of the device and the memory it points to.
template <typename Spec, typename Packed, auto bytes_of, auto pack> struct OnDevice {
    std::vector<unsigned char>  host;
    simt::Buffer<unsigned char> memory;
    Packed                      spec;

    explicit OnDevice(const Spec &from) : host(bytes_of(&from)), memory("tables", host.size()) {
        kvq_error err;
        kvq_test_ok(pack(&from, host.data(), memory.data(), &spec, &err), &err);
        memory.set(host);
    }
};

template <typename T> static const T *pointer_to(const std::vector<T> &values) {
    return values.empty() ? nullptr : values.data();
}

// How the numbers of a test are spread.
enum Fill {
    HEAVY_TAILS, // many beyond any range
    FEW_VALUES,  // a grid of halves, so that ties abound, among values and between levels
    ZEROS,       // of both signs, and little else
    LAST_BITS,   // sixteen neighbours of 2, so that every bit of a key decides
    N_FILLS
};

static inline float draw(int fill, uint32_t stream, size_t index) {
    double u = uniform(stream, index) - 0.5;
    if (fill == HEAVY_TAILS) return (float)tan(2.9 * u);
    if (fill == FEW_VALUES) return (float)floor(9 * u) / 2;
    if (fill == LAST_BITS) return kvq_float_of_bits(kvq_bits_of_float(2) + (uint32_t)(16 * (u + 0.5)));
    return u < -0.45 ? -1.0f : u > 0.45 ? 1.0f : u < 0 ? -0.0f : 0.0f;
}

// Beyond the range of a channel, but not beyond KVQ_OUTLIER_EDGE; exact.
#define JUST_INSIDE 1.000030517578125f // 1 + 2^-15

#endif
