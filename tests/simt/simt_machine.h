// SPDX-License-Identifier: Apache-2.0
//
// The emulated device: blocks, threads, barriers and the memory they share. One block runs at a time, and of a block
// one thread at a time, until it waits or is preempted at an access to memory; who comes next is drawn. So a run is a
// function of the seed, and a kernel that depends on the order of threads or blocks gives other bits for another seed.
#ifndef SIMT_MACHINE_H
#define SIMT_MACHINE_H

#include <functional>
#include <string>
#include <vector>

#include "simt_fiber.h"
#include "simt_report.h"

namespace simt {

// By how many units in the last place log and exp of f64 may differ from the host's; a device has another number.
enum { LIBRARY_UNITS = 0 };

struct Options {
    uint64_t seed = 1;
    unsigned preempt_every = 12;                 // accesses to memory between two preemptions, on average
    uint64_t max_accesses = 1u << 26;            // of one thread; beyond is a DEADLOCK
    size_t   max_shared_bytes = 232448;          // of one block: sm_90; 166912 on sm_80, 101376 on sm_86 and sm_89
    size_t   max_traced_bytes = (size_t)4 << 20; // larger global buffers are not searched for races
};

// Starts a test: forgets reports. Memory stays.
void begin(const Options &options);
// What was found since.
const std::vector<Report> &reports();
// All of it as text, for the message of a failed assertion.
std::string report_text();

// ---------------------------------------------------------------- memory

enum { ATOMIC = 1u << 16, PENDING = 1u << 17, THREAD_MASK = 0xffff };

// An access: when, by whom, from which line. `epoch` counts the barriers of all blocks, `clock` the __syncwarp of the
// thread; 0 = never.
struct Access {
    uint32_t epoch, clock, who, place;
};

// What is remembered of a byte: the last write and two reads. Two are enough to find a writer that no barrier separates
// from some reader, see remember_reader.
struct Cell {
    Access writer, readers[2];
};

// A variable in shared memory or a buffer in global memory. Pointers carry it with them, so that running from one into
// another is noticed.
struct Memory {
    Space          space;
    std::string    name;
    unsigned char *base;
    size_t         bytes;
    Cell          *cells;   // [bytes], or NULL: races are not looked for
    uint8_t       *defined; // [bytes]; pages of it that nobody asks about cost nothing

    Memory(Space in, const char *called, void *address, size_t size, bool traced, bool is_defined);
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory(); // shared memory goes with it
};

enum Use { READ, WRITE, UPDATE }; // UPDATE: atomic

// The one way to memory: checks an access of the running thread and gives the address, or NULL out of bounds.
void *touch(Memory *memory, ptrdiff_t offset, size_t bytes, size_t align, Use use, Place at);

// Global memory. What is added as undefined may not be read before a kernel wrote it.
Memory *add_memory(const char *name, void *base, size_t bytes, bool defined);
void    remove_memory(const void *base);
Memory *find_memory(const void *address); // NULL: none
// The variable of the running block that `tag` stands for, made when its first thread comes by.
Memory *shared_variable(const char *name, size_t bytes, const void *tag, Place at);
Memory *dynamic_shared();

// ---------------------------------------------------------------- threads

enum State { READY, AT_BARRIER, IN_WARP, DONE };

// An asynchronous copy on its way; it lands when its thread waits for its group.
struct Copy {
    Memory   *to, *from;
    ptrdiff_t to_offset, from_offset;
    size_t    valid_bytes; // of 16, the rest is 0
    unsigned  group;
};

struct Thread {
    uint3             index, block;
    unsigned          number, lane, warp; // `number` in the block
    State             state = READY;
    Place             at; // where it waits
    const char       *waits_in;
    uint32_t          known[32]; // of each lane of the warp: which of its clocks this thread is ordered behind
    bool              fenced;
    uint64_t          n_accesses;
    Fiber            *fiber;
    std::vector<Copy> copies;
    unsigned          n_groups;

    Thread() : fiber(fiber_create()) {}
    Thread(const Thread &) = delete;
    Thread &operator=(const Thread &) = delete;
    ~Thread() { fiber_destroy(fiber); }
};

extern Thread *self; // who runs
extern dim3    grid_dim, block_dim;

void sync_threads(Place at);

// Waits until all lanes of `mask` are at the same place with the same mask. The last one calls `complete` with what
// each lane brought; it lies on the lanes' stacks and may be changed.
void sync_lanes(const char *operation, unsigned mask, void *payload, void (*complete)(void **, unsigned), Place at);
void sync_warp(unsigned mask, Place at);

// Global atomics order what blocks did before and after them, when the thread has fenced.
void fence();
void publish(Memory *memory, ptrdiff_t offset);

void copy_async(Memory *to, ptrdiff_t to_offset, Memory *from, ptrdiff_t from_offset, size_t valid_bytes, Place at);
void commit_copies();
void wait_copies(unsigned groups_left);

// Notes something about the running thread; `text` says what it did. Thread `other` as well when it is not NULL.
void report(Kind kind, Space space, Place at, const Actor *other, const std::string &text);
// The running thread cannot go on, nor the launch.
[[noreturn]] void abandon();

// Called around every launch, for whoever has streams and other threads (simt_runtime.cpp); NULL: nobody has.
struct Hooks {
    void (*before)(void *stream), (*after)();
};
extern Hooks hooks;

// Kernels are told apart by their address.
void run_grid(const char *name, const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
              const std::function<void()> &body);
bool allow_shared(const void *kernel, size_t bytes); // false: more than a block may have
// What the last launch was refused for, or NULL.
const char *launch_error();

} // namespace simt

#endif
