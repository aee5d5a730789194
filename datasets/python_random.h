// SPDX-License-Identifier: Apache-2.0
//
// Private to datasets: whole numbers as Python's module `random` draws them, so that windows can be those of programs
// that are written in it.
#ifndef KVQ_DATASETS_PYTHON_RANDOM_H
#define KVQ_DATASETS_PYTHON_RANDOM_H

#include <stdint.h>

#define PYTHON_RANDOM_WORDS 624

typedef struct python_random {
    uint32_t words[PYTHON_RANDOM_WORDS];
    int      n_used; // of these words
} python_random;

// random.Random(seed)
void python_random_seed(python_random *r, uint64_t seed);
// randint(0, last), last >= 0
int64_t python_random_up_to(python_random *r, int64_t last);

#endif
