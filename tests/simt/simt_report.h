// SPDX-License-Identifier: Apache-2.0
//
// What the emulator found wrong with a kernel, as data: a test asserts that a correct kernel has no report and that a
// faulty one has exactly the report that names its fault.
#ifndef SIMT_REPORT_H
#define SIMT_REPORT_H

#include <string>

#include "simt_types.h"

namespace simt {

enum Kind {
    RACE,              // two threads touch a byte, one of them writes, and nothing orders them
    OUT_OF_BOUNDS,     // outside of the variable or buffer that the pointer was made from
    UNINITIALISED,     // a byte that nobody wrote was read
    MISALIGNED,        // the address is not a multiple of the size of the type
    DIVERGENT_BARRIER, // __syncthreads that some threads never reach, or reach at another line
    DIVERGENT_WARP,    // __syncwarp, shuffle, vote, ldmatrix or mma that a lane of the mask never reaches
    BAD_LANE,          // a mask without the calling lane, or a value taken from a lane outside of the mask
    EARLY_ASYNC,       // an asynchronous copy was read or overwritten before the wait for it
    DEADLOCK,          // a thread runs on without an end
    BAD_LAUNCH,        // a grid, block or size of shared memory that no device accepts
};

enum Space { SHARED, GLOBAL };

const char *kind_name(Kind kind);

// Where in the source; `file` lives forever.
struct Place {
    const char *file;
    int         line;

    // As a default argument this is where the call stands.
    static constexpr Place here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Actor {
    uint3 block, thread;
    Place at;
};

struct Report {
    Kind        kind;
    Space       space; // of the memory, where it is about memory
    std::string kernel;
    Actor       first; // who was found
    bool        has_second;
    Actor       second; // the other thread of a race, or the one that others wait for
    std::string text;   // one sentence with all of it
    int         count;  // how often the same two lines gave the same report
};

} // namespace simt

#endif
