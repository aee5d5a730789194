// SPDX-License-Identifier: Apache-2.0
//
// The Mersenne Twister MT19937 with its initialisation by an array (Matsumoto and Nishimura, "Mersenne Twister", ACM
// TOMACS 8/1, 1998, and the authors' revision of the initialisation of 2002), and Python's way from its words to whole
// numbers: the seed's 32-bit digits, lowest first, are the array; k bits are words from the lowest up, of the last one
// its highest bits; a number below n is bit_length(n) bits, drawn again until they are below n.
#include "python_random.h"

#define N     PYTHON_RANDOM_WORDS
#define SHIFT 397 // words between the two that are mixed

static void seed_word(python_random *r, uint32_t seed) {
    r->words[0] = seed;
    for (uint32_t i = 1; i < N; i++) {
        uint32_t before = r->words[i - 1];
        r->words[i] = 1812433253u * (before ^ (before >> 30)) + i;
    }
}

// Word i from its neighbour, multiplied; word 0 takes the place of the one behind the last.
static uint32_t stirred(const python_random *r, int i, uint32_t factor) {
    uint32_t before = r->words[i - 1];
    return r->words[i] ^ ((before ^ (before >> 30)) * factor);
}

static int next_word(python_random *r, int i) {
    if (i + 1 < N) return i + 1;
    r->words[0] = r->words[N - 1];
    return 1;
}

void python_random_seed(python_random *r, uint64_t seed) {
    uint32_t digits[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t n_digits = digits[1] != 0 ? 2 : 1;
    int      i = 1;
    seed_word(r, 19650218u);
    for (uint32_t k = 0; k < N; k++) { // N is more than the digits
        r->words[i] = stirred(r, i, 1664525u) + digits[k % n_digits] + k % n_digits;
        i = next_word(r, i);
    }
    for (int k = 0; k < N - 1; k++) {
        r->words[i] = stirred(r, i, 1566083941u) - (uint32_t)i;
        i = next_word(r, i);
    }
    r->words[0] = 0x80000000u;
    r->n_used = N;
}

static void make_words(python_random *r) {
    for (int i = 0; i < N; i++) {
        uint32_t mixed = (r->words[i] & 0x80000000u) | (r->words[(i + 1) % N] & 0x7fffffffu);
        r->words[i] = r->words[(i + SHIFT) % N] ^ (mixed >> 1) ^ ((mixed & 1u) != 0 ? 0x9908b0dfu : 0u);
    }
    r->n_used = 0;
}

static uint32_t draw_word(python_random *r) {
    if (r->n_used == N) make_words(r);
    uint32_t y = r->words[r->n_used++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

// 1 to 64 bits.
static uint64_t draw_bits(python_random *r, int n_bits) {
    if (n_bits <= 32) return draw_word(r) >> (32 - n_bits);
    uint64_t low = draw_word(r);
    return low | (uint64_t)(draw_word(r) >> (64 - n_bits)) << 32;
}

int64_t python_random_up_to(python_random *r, int64_t last) {
    uint64_t n = (uint64_t)last + 1, drawn;
    int      n_bits = 1;
    while (n >> 1 >> (n_bits - 1) != 0) n_bits++;
    do drawn = draw_bits(r, n_bits);
    while (drawn >= n);
    return (int64_t)drawn;
}
