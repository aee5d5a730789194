// SPDX-License-Identifier: Apache-2.0
// Memory: what exists, who touched it last, and what is on its way; see simt_machine.h.
#include <stdlib.h>
#include <string.h>

#include "simt_impl.h"

namespace simt {

// ---------------------------------------------------------------- what exists

static unsigned char *aligned_bytes(size_t bytes) {
    void *base = nullptr;
    if (posix_memalign(&base, 256, bytes > 0 ? bytes : 1) != 0) abort();
    return static_cast<unsigned char *>(base);
}

template <typename T> static T *zeros(size_t n) {
    T *all = static_cast<T *>(calloc(n > 0 ? n : 1, sizeof(T)));
    if (all == nullptr) abort();
    return all;
}

Memory::Memory(Space in, const char *called, void *address, size_t size, bool traced, bool is_defined)
    : space(in), name(called), base(static_cast<unsigned char *>(address)), bytes(size),
      cells(traced ? zeros<Cell>(size) : nullptr), defined(zeros<uint8_t>(size)) {
    if (is_defined) memset(defined, 1, size);
}

Memory::~Memory() {
    free(cells);
    free(defined);
    if (space == SHARED) free(base);
}

Memory *add_memory(const char *name, void *base, size_t bytes, bool defined) {
    remove_memory(base);
    std::unique_ptr<Memory> m(
        new Memory(GLOBAL, name, base, bytes, bytes <= machine.options.max_traced_bytes, defined));
    Memory *result = m.get();
    machine.global[reinterpret_cast<uintptr_t>(base) + bytes] = std::move(m);
    return result;
}

void remove_memory(const void *base) {
    for (auto i = machine.global.begin(); i != machine.global.end(); ++i) {
        if (i->second->base != base) continue;
        machine.global.erase(i);
        return;
    }
}

// One beyond the end belongs to a buffer as well: kernels with nothing to do get such pointers.
Memory *find_memory(const void *address) {
    auto i = machine.global.lower_bound(reinterpret_cast<uintptr_t>(address));
    return i != machine.global.end() && i->second->base <= address ? i->second.get() : nullptr;
}

// Contents of shared memory are what the last block left, on a device; here they are drawn, so that who reads them gets
// other bits with another seed.
static Memory *shared_memory(const char *name, size_t bytes, const void *tag) {
    std::unique_ptr<Memory> &m = machine.shared[tag];
    if (m == nullptr || m->bytes != bytes) m.reset(new Memory(SHARED, name, aligned_bytes(bytes), bytes, true, false));
    memset(m->base, static_cast<int>(draw(256)), bytes);
    memset(m->defined, 0, bytes);
    machine.of_block.push_back(m.get());
    machine.shared_bytes += (bytes + 15) / 16 * 16;
    return m.get();
}

void start_memory_of_block() {
    machine.of_block.clear();
    machine.shared_bytes = 0;
    (void)shared_memory("dynamic shared memory", machine.dynamic_bytes, &machine);
}

Memory *dynamic_shared() { return machine.of_block[0]; }

Memory *shared_variable(const char *name, size_t bytes, const void *tag, Place at) {
    auto found = machine.shared.find(tag);
    for (Memory *m : machine.of_block) {
        if (found != machine.shared.end() && found->second.get() == m && m->bytes == bytes) return m;
    }
    Memory *m = shared_memory(name, bytes, tag);
    if (machine.shared_bytes > machine.options.max_shared_bytes ||
        machine.shared_bytes - machine.dynamic_bytes > (48u << 10) + 15) {
        report(BAD_LAUNCH, SHARED, at, nullptr, "has more shared memory than a block may");
        abandon();
    }
    return m;
}

// ---------------------------------------------------------------- who touched it last

// Whether another block published an access before this one looked.
static bool acquired(const Access &a) {
    size_t block = machine.block_starts.size() - 1;
    while (block > 0 && machine.block_starts[block] > a.epoch) block--;
    for (const Published &p : machine.acquired) {
        if (p.block == block && (a.epoch < p.epoch || (a.epoch == p.epoch && (a.who & THREAD_MASK) == p.thread)))
            return true;
    }
    return false;
}

// Whether the running thread comes after an access: a barrier of the block lies between, or a __syncwarp that both
// took part in (perhaps by way of others), or it is the thread's own (whose clock it knows best).
static bool ordered(const Access &a, Space space) {
    if (a.epoch < machine.launch_first) return true; // never, or another launch
    if (a.epoch < machine.block_first) return space == SHARED || acquired(a);
    if (a.epoch < machine.epoch) return true;
    unsigned who = a.who & THREAD_MASK;
    return who / 32 == self->warp && self->known[who % 32] >= a.clock;
}

// A read that is ordered before this one need not be remembered: who comes after this one comes after both. Of the
// others two are kept, if possible of different warps: no thread is then ordered behind both without a barrier.
static void remember_reader(Cell *cell, const Access &now) {
    Access *slot = cell->readers;
    if (ordered(slot[0], GLOBAL)) {
        slot[0] = now;
    } else if (ordered(slot[1], GLOBAL) || (slot[0].who & THREAD_MASK) / 32 == (slot[1].who & THREAD_MASK) / 32) {
        slot[1] = now;
    }
}

static const char *verb(Use use) {
    static const char *const verbs[] = {"reads", "writes", "updates"};
    return verbs[use];
}

static std::string where(const Memory *m, ptrdiff_t offset, size_t bytes) {
    return std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of " +
           (m->space == SHARED ? "shared" : "global") + " '" + m->name + "' (" + std::to_string(m->bytes) + " bytes)";
}

static bool pending(const Access &a) { return (a.who & PENDING) != 0 && a.epoch >= machine.block_first; }

// The earlier access that this one conflicts with, or NULL.
static const Access *conflict(const Memory *m, const Cell &cell, Use use) {
    bool both_atomic = use == UPDATE && (cell.writer.who & ATOMIC) != 0;
    if (!both_atomic && !ordered(cell.writer, m->space)) return &cell.writer;
    for (int i = 0; i < 2 && use != READ; i++) {
        if (!ordered(cell.readers[i], m->space)) return &cell.readers[i];
    }
    return nullptr;
}

static void trace(Memory *m, ptrdiff_t offset, size_t bytes, Use use, uint32_t flags, Place at) {
    Access now = access_now(flags, at);
    bool   told = false;
    for (Cell *cell = m->cells + offset; cell < m->cells + offset + bytes; cell++) {
        const Access *other = nullptr;
        Kind          kind = RACE;
        if (pending(cell->writer))
            other = &cell->writer, kind = EARLY_ASYNC;
        else
            other = conflict(m, *cell, use);
        if (other != nullptr && !told) {
            Actor actor = actor_of(*other);
            report(kind, m->space, at, &actor,
                   std::string(verb(use)) + " " + where(m, offset, bytes) +
                       (kind == RACE ? ", and nothing orders it behind" : ", which is being copied there by"));
            told = true;
        }
        if (use == READ)
            remember_reader(cell, now);
        else
            cell->writer = now;
    }
}

// ---------------------------------------------------------------- an access

static void preempt() {
    if (++self->n_accesses > machine.options.max_accesses) {
        report(DEADLOCK, SHARED, self->at, nullptr, "runs on without an end");
        abandon();
    }
    if (--machine.countdown > 0) return;
    machine.countdown = 1 + draw(2 * machine.options.preempt_every);
    go_on(self);
    yield();
}

static bool within(const Memory *m, ptrdiff_t offset, size_t bytes) {
    return m != nullptr && static_cast<size_t>(offset) <= m->bytes && // a negative one is huge
           bytes <= m->bytes - static_cast<size_t>(offset);
}

static bool in_bounds(const Memory *m, ptrdiff_t offset, size_t bytes, Use use, Place at) {
    if (within(m, offset, bytes)) return true;
    report(OUT_OF_BOUNDS, m != nullptr ? m->space : GLOBAL, at, nullptr,
           std::string(verb(use)) + " " +
               (m != nullptr ? where(m, offset, bytes) : std::string("memory that the device does not have")));
    return false;
}

void *touch(Memory *m, ptrdiff_t offset, size_t bytes, size_t align, Use use, Place at) {
    self->at = at;
    preempt();
    if (!in_bounds(m, offset, bytes, use, at)) return nullptr;
    if (reinterpret_cast<uintptr_t>(m->base + offset) % align != 0)
        report(MISALIGNED, m->space, at, nullptr, std::string(verb(use)) + " " + where(m, offset, bytes));
    uint8_t *defined = m->defined + offset;
    if (use != WRITE && memchr(defined, 0, bytes) != nullptr)
        report(UNINITIALISED, m->space, at, nullptr, std::string(verb(use)) + " " + where(m, offset, bytes));
    memset(defined, 1, bytes); // a fault is told once
    if (m->cells != nullptr) trace(m, offset, bytes, use, use == UPDATE ? ATOMIC : 0, at);
    return m->base + offset;
}

// ---------------------------------------------------------------- other blocks

void fence() { self->fenced = true; }

// An atomic of a thread that has fenced tells whoever comes to it later of everything before; and the block learns what
// was told there. Coarser than hardware, where each thread learns for itself.
void publish(Memory *memory, ptrdiff_t offset) {
    if (memory == nullptr || memory->space != GLOBAL || !self->fenced) return;
    std::vector<Published> &told = machine.published[{memory, offset}];
    machine.acquired.insert(machine.acquired.end(), told.begin(), told.end());
    told.push_back({machine.block_starts.size() - 1, machine.epoch, self->number});
}

// ---------------------------------------------------------------- asynchronous copies

// The bytes are taken and put when the copy is waited for, as late as hardware may. From now on they are neither the
// old ones nor the new ones.
void copy_async(Memory *to, ptrdiff_t to_offset, Memory *from, ptrdiff_t from_offset, size_t valid, Place at) {
    if (valid > 0) (void)touch(from, from_offset, valid, 16, READ, at);
    self->at = at;
    preempt();
    if (!in_bounds(to, to_offset, 16, WRITE, at) || !within(from, from_offset, valid)) return;
    if (reinterpret_cast<uintptr_t>(to->base + to_offset) % 16 != 0)
        report(MISALIGNED, to->space, at, nullptr, "copies to " + where(to, to_offset, 16));
    trace(to, to_offset, 16, WRITE, PENDING, at);
    memset(to->defined + to_offset, 1, 16); // whoever reads too early is told so
    self->copies.push_back({to, from, to_offset, from_offset, valid, self->n_groups});
}

void commit_copies() { self->n_groups++; }

void wait_copies(unsigned groups_left) {
    std::vector<Copy> left;
    for (const Copy &c : self->copies) {
        if (c.group + groups_left >= self->n_groups) {
            left.push_back(c);
            continue;
        }
        unsigned char *to = c.to->base + c.to_offset;
        memset(to, 0, 16);
        if (c.valid_bytes > 0) memcpy(to, c.from->base + c.from_offset, c.valid_bytes);
        for (int i = 0; i < 16; i++) { // its own line stays
            Access *writer = &c.to->cells[c.to_offset + i].writer;
            Access  now = access_now(0, place_of(writer->place));
            *writer = now;
        }
    }
    self->copies.swap(left);
}

} // namespace simt
