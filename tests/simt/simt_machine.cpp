// SPDX-License-Identifier: Apache-2.0
// The scheduler: grids, blocks, barriers and what warps do together; see simt_machine.h.
#include <stdio.h>

#include "simt_impl.h"

namespace simt {

Machine machine;
Hooks   hooks;
Thread *self;
dim3    grid_dim, block_dim;

void begin(const Options &options) {
    machine.options = options;
    machine.reports.clear();
    machine.countdown = 1;
    machine.allowed.clear();
    machine.refused = false;
    machine.random = options.seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u;
}

// xorshift64*
uint32_t draw(uint32_t below) {
    machine.random ^= machine.random >> 12;
    machine.random ^= machine.random << 25;
    machine.random ^= machine.random >> 27;
    uint32_t bits = static_cast<uint32_t>((machine.random * 0x2545f4914f6cdd1du) >> 32);
    return static_cast<uint32_t>((static_cast<uint64_t>(bits) * below) >> 32);
}

uint3 index_of(unsigned number, dim3 size) {
    return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

void go_on(Thread *thread) {
    thread->state = READY;
    machine.ready.push_back(thread);
}

void yield() { fiber_leave(self->fiber); }

void abandon() {
    machine.abandoned = true;
    for (;;) yield(); // the scheduler does not come back
}

static void wait_in(State state, const char *what, Place at) {
    self->state = state;
    self->waits_in = what;
    self->at = at;
    yield();
}

// ---------------------------------------------------------------- barriers

// All are there. Where they stand at two lines, hardware would let them pass, and the kernel is wrong all the same.
static void open_barrier(Place at) {
    for (unsigned i = 0; i < machine.n_threads; i++) {
        Thread *t = machine.threads[i].get();
        if (t == self) continue;
        Actor other = actor_of(*t);
        if (!same_place(t->at, at))
            report(DIVERGENT_BARRIER, SHARED, at, &other, "is in __syncthreads while another is in another one");
        go_on(t);
    }
    machine.n_at_barrier = 0;
    machine.epoch++;
}

void sync_threads(Place at) {
    if (++machine.n_at_barrier == machine.n_threads)
        open_barrier(at);
    else
        wait_in(AT_BARRIER, "__syncthreads", at);
}

static Gathering *join(const char *operation, unsigned mask, Place at) {
    std::vector<Gathering> &all = machine.gatherings[self->warp];
    for (Gathering &g : all) {
        if (g.operation == operation && g.mask == mask && same_place(g.at, at)) return &g;
    }
    all.push_back({operation, mask, 0, at, {}});
    return &all.back();
}

void sync_lanes(const char *operation, unsigned mask, void *payload, void (*complete)(void **, unsigned), Place at) {
    if ((mask >> self->lane & 1u) == 0) {
        report(BAD_LANE, SHARED, at, nullptr, std::string("calls ") + operation + " with a mask that it is not in");
        abandon();
    }
    Gathering *g = join(operation, mask, at);
    g->payload[self->lane] = payload;
    g->arrived |= 1u << self->lane;
    if (g->arrived != mask) {
        wait_in(IN_WARP, operation, at);
        return;
    }
    Gathering               done = *g;
    std::vector<Gathering> &all = machine.gatherings[self->warp];
    *g = all.back();
    all.pop_back();
    complete(done.payload, mask);
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1u) != 0 && lane != self->lane) go_on(machine.threads[self->warp * 32 + lane].get());
    }
}

// What one lane has seen, all have seen now; and each begins a new stretch of its own.
static void merge_known(void **payload, unsigned mask) {
    uint32_t all[32] = {0};
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1u) == 0) continue;
        const Thread *t = static_cast<Thread *>(payload[lane]);
        for (int i = 0; i < 32; i++) all[i] = t->known[i] > all[i] ? t->known[i] : all[i];
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1u) == 0) continue;
        Thread *t = static_cast<Thread *>(payload[lane]);
        for (int i = 0; i < 32; i++) t->known[i] = all[i];
        t->known[lane]++;
    }
}

void sync_warp(unsigned mask, Place at) { sync_lanes("__syncwarp", mask, self, merge_known, at); }

// ---------------------------------------------------------------- threads that can never go on

// A lane that `t` waits for in its warp operation, and that is somewhere else or at its end. NULL: none.
static const Thread *missing_lane(const Thread &t) {
    for (const Gathering &g : machine.gatherings[t.warp]) {
        if ((g.arrived >> t.lane & 1u) == 0) continue;
        for (unsigned lane = 0; lane < 32; lane++) {
            if (((g.mask & ~g.arrived) >> lane & 1u) == 0) continue;
            unsigned number = t.warp * 32 + lane;
            return number < machine.n_threads ? machine.threads[number].get() : &t; // itself: there is no such thread
        }
    }
    return nullptr;
}

static void report_stuck(Thread *t, Kind kind, const Thread &other) {
    std::string text = std::string("waits in ") + t->waits_in;
    Actor       actor = actor_of(other);
    self = t;
    if (&other == t)
        report(kind, SHARED, t->at, nullptr, text + " for a lane that the block does not have");
    else if (other.state == DONE)
        report(kind, SHARED, t->at, &actor, text + " for one that has ended, last seen");
    else
        report(kind, SHARED, t->at, &actor, text + " for one that waits in " + other.waits_in);
    self = nullptr;
}

// Nobody can go on: says why, for every line at which somebody waits.
static void report_all_stuck() {
    const Thread *done = nullptr;
    bool          found = false;
    for (unsigned i = 0; i < machine.n_threads; i++) {
        Thread       *t = machine.threads[i].get();
        const Thread *missing = t->state == IN_WARP ? missing_lane(*t) : nullptr;
        if (t->state == DONE && done == nullptr) done = t;
        if (missing != nullptr) report_stuck(t, DIVERGENT_WARP, *missing), found = true;
    }
    bool root = found; // behind a warp that diverged others wait in vain, which is no fault of theirs
    for (unsigned i = 0; i < machine.n_threads && done != nullptr && !root; i++) {
        Thread *t = machine.threads[i].get();
        if (t->state == AT_BARRIER) report_stuck(t, DIVERGENT_BARRIER, *done), found = true;
    }
    if (!found) report(DEADLOCK, SHARED, machine.threads[0]->at, nullptr, "waits, as all others do");
}

// ---------------------------------------------------------------- blocks and grids

// Of one block after another.
static void run_thread() {
    for (;;) {
        machine.body();
        self->state = DONE;
        machine.n_done++;
        yield();
    }
}

static void start_thread(unsigned number, uint3 block) {
    if (machine.threads.size() <= number) machine.threads.emplace_back(new Thread());
    Thread *t = machine.threads[number].get();
    t->index = index_of(number, block_dim);
    t->block = block;
    t->number = number;
    t->lane = number % 32;
    t->warp = number / 32;
    t->at = Place{"start", 0};
    t->waits_in = "nothing";
    for (uint32_t &clock : t->known) clock = 0;
    t->known[t->lane] = 1;
    t->fenced = false;
    t->n_accesses = 0;
    t->copies.clear();
    t->n_groups = 0;
    if (t->state != DONE) fiber_prepare(t->fiber, run_thread); // new, or abandoned in the middle of something
    go_on(t);
}

static void run_block(uint3 block) {
    machine.block_first = ++machine.epoch;
    machine.block_starts.push_back(machine.epoch);
    machine.block_ids.push_back(block);
    machine.acquired.clear();
    machine.n_at_barrier = machine.n_done = 0;
    machine.ready.clear();
    machine.gatherings.assign((machine.n_threads + 31) / 32, {});
    start_memory_of_block();
    for (unsigned i = 0; i < machine.n_threads; i++) start_thread(i, block);
    while (machine.n_done < machine.n_threads && !machine.abandoned) {
        if (machine.ready.empty()) {
            report_all_stuck();
            machine.abandoned = true;
            break;
        }
        uint32_t next = draw(static_cast<uint32_t>(machine.ready.size()));
        self = machine.ready[next];
        machine.ready[next] = machine.ready.back();
        machine.ready.pop_back();
        fiber_enter(self->fiber);
    }
    self = nullptr;
}

bool allow_shared(const void *kernel, size_t bytes) {
    if (bytes > machine.options.max_shared_bytes) return false;
    machine.allowed[kernel] = bytes;
    return true;
}

const char *launch_error() { return machine.refused ? "the launch was refused" : nullptr; }

static bool launch_fits(const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
    uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    size_t   allowed = machine.allowed.count(kernel) > 0 ? machine.allowed[kernel] : 48u << 10;
    char     text[160];
    if (threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
        grid.x < 1u << 31 && grid.y < 65536 && grid.z < 65536 && dynamic_bytes <= allowed)
        return true;
    (void)snprintf(text, sizeof text, "grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic shared memory", grid.x,
                   grid.y, grid.z, block.x, block.y, block.z, dynamic_bytes);
    report(BAD_LAUNCH, SHARED, Place{"launch", 0}, nullptr, text);
    return false;
}

void run_grid(const char *name, const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
              const std::function<void()> &body) {
    machine.kernel = name;
    machine.block_starts.clear();
    machine.block_ids.clear();
    machine.published.clear();
    machine.abandoned = false;
    machine.launch_first = machine.epoch + 1;
    grid_dim = grid;
    block_dim = block;
    machine.refused = !launch_fits(kernel, grid, block, dynamic_bytes);
    if (machine.refused) return;
    machine.n_threads = block.x * block.y * block.z;
    machine.dynamic_bytes = dynamic_bytes;
    machine.body = body;
    std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < order.size(); i++) { // a shuffle as it grows
        size_t j = draw(static_cast<uint32_t>(i + 1));
        order[i] = order[j];
        order[j] = static_cast<unsigned>(i);
    }
    for (size_t i = 0; i < order.size() && !machine.abandoned; i++) run_block(index_of(order[i], grid));
}

} // namespace simt
