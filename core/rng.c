// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, after J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Checked in the tests against the known answers published with the paper.
#include "kvq_core.h"

void kvq_rng_block(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index, uint32_t out[4]) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t x[4] = {(uint32_t)index, (uint32_t)(index >> 32), stream, purpose};
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x[0], p1 = (uint64_t)0xCD9E8D57u * x[2];
        uint32_t y[4] = {(uint32_t)(p1 >> 32) ^ x[1] ^ key[0], (uint32_t)p1, (uint32_t)(p0 >> 32) ^ x[3] ^ key[1],
                         (uint32_t)p0};
        for (int i = 0; i < 4; i++) x[i] = y[i];
        key[0] += 0x9E3779B9u; // golden ratio
        key[1] += 0xBB67AE85u; // square root of 3
    }
    for (int i = 0; i < 4; i++) out[i] = x[i];
}

static uint64_t first_64_bits(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index) {
    uint32_t x[4];
    kvq_rng_block(seed, purpose, stream, index, x);
    return (uint64_t)x[0] << 32 | x[1];
}

double kvq_rng_uniform(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index) {
    return (double)(first_64_bits(seed, purpose, stream, index) >> 11) * 0x1p-53;
}

// High word of the 64 x 64 bit product, by 32-bit halves (Lemire's multiply-shift without rejection).
uint64_t kvq_rng_below(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index, uint64_t bound) {
    uint64_t r = first_64_bits(seed, purpose, stream, index);
    uint64_t a = r >> 32, b = r & 0xffffffffu, c = bound >> 32, d = bound & 0xffffffffu;
    uint64_t middle = ((b * d) >> 32) + ((a * d) & 0xffffffffu) + ((b * c) & 0xffffffffu);
    return a * c + ((a * d) >> 32) + ((b * c) >> 32) + (middle >> 32);
}
