// SPDX-License-Identifier: Apache-2.0
//
// Private to the emulator: the state of the device, shared by its scheduler, memory and reports.
#ifndef SIMT_IMPL_H
#define SIMT_IMPL_H

#include <map>
#include <memory>
#include <utility>

#include "simt_machine.h"

namespace simt {

// Threads of a warp that are on their way to the same operation.
struct Gathering {
    const char *operation;
    unsigned    mask, arrived;
    Place       at;
    void       *payload[32];
};

// Up to where another block's accesses are behind us: all before `epoch`, and in it those of `thread`.
struct Published {
    size_t   block; // in the order of running
    uint32_t epoch;
    unsigned thread;
};

struct Machine {
    Options             options;
    uint64_t            random = 1;
    std::vector<Report> reports;

    // a launch
    std::string                                                      kernel;
    std::function<void()>                                            body;
    bool                                                             abandoned = false, refused = false;
    std::map<const void *, size_t>                                   allowed; // dynamic shared memory of kernels
    uint32_t                                                         epoch = 1, launch_first = 1, block_first = 1;
    std::vector<uint32_t>                                            block_starts; // first epoch of each block that ran
    std::vector<uint3>                                               block_ids;
    std::map<std::pair<Memory *, ptrdiff_t>, std::vector<Published>> published;

    // a block
    std::vector<std::unique_ptr<Thread>> threads; // all that ever were
    unsigned                             n_threads = 0;
    std::vector<Thread *>                ready;
    std::vector<std::vector<Gathering>>  gatherings; // of each warp
    unsigned                             n_at_barrier = 0, n_done = 0;
    std::vector<Published>               acquired;
    unsigned                             countdown = 1; // accesses until the next preemption

    // memory
    std::map<uintptr_t, std::unique_ptr<Memory>>    global;   // by the end of the buffer
    std::map<const void *, std::unique_ptr<Memory>> shared;   // by tag
    std::vector<Memory *>                           of_block; // shared memory that the running block has
    size_t                                          shared_bytes = 0, dynamic_bytes = 0;
};

extern Machine machine;

uint32_t draw(uint32_t below);
void     go_on(Thread *thread); // makes it ready
void     yield();               // back to the scheduler
void     start_memory_of_block();
uint3    index_of(unsigned number, dim3 size);
Access   access_now(uint32_t flags, Place at);
bool     same_place(Place a, Place b);
Place    place_of(uint32_t number);
Actor    actor_of(const Access &access);
Actor    actor_of(const Thread &thread);

} // namespace simt

#endif
