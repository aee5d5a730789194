// SPDX-License-Identifier: Apache-2.0
//
// What every suite of device code does around a kernel: an order of threads and blocks before it, no report after it.
#ifndef EMULATED_RIG_H
#define EMULATED_RIG_H

#include "kvq_test.h"
#include "simt.h"

// Another order of threads and blocks; what was found before is forgotten.
static inline void begin(uint64_t seed) {
    simt::Options options;
    options.seed = seed;
    simt::begin(options);
}

// An assertion that holds is a system call in Check; this is one only when it does not.
static inline void expect_clean() {
    if (!simt::reports().empty()) ck_abort_msg("%s", simt::report_text().c_str());
}

#endif
