// SPDX-License-Identifier: Apache-2.0
// Findings as data and as sentences; see simt_report.h.
#include <stdio.h>
#include <string.h>

#include "simt_impl.h"

namespace simt {

const char *kind_name(Kind kind) {
    static const char *const names[] = {"race",
                                        "out of bounds",
                                        "uninitialised",
                                        "misaligned",
                                        "divergent barrier",
                                        "divergent warp",
                                        "bad lane",
                                        "early read of an asynchronous copy",
                                        "deadlock",
                                        "bad launch"};
    return names[kind];
}

// Files are few and most accesses come from the one before, so a place is a number: file << 20 | line.
static std::vector<const char *> files;

static uint32_t number_of(Place at) {
    static size_t last;
    if (last >= files.size() || files[last] != at.file) {
        for (last = 0; last < files.size() && strcmp(files[last], at.file) != 0; last++) {
        }
        if (last == files.size()) files.push_back(at.file);
    }
    return static_cast<uint32_t>(last << 20 | static_cast<unsigned>(at.line));
}

Place place_of(uint32_t number) { return {files[number >> 20], static_cast<int>(number & 0xfffffu)}; }

Access access_now(uint32_t flags, Place at) {
    return {machine.epoch, self->known[self->lane], self->number | flags, number_of(at)};
}

Actor actor_of(const Access &access) {
    size_t block = machine.block_starts.size() - 1;
    while (block > 0 && machine.block_starts[block] > access.epoch) block--;
    return {machine.block_ids[block], index_of(access.who & THREAD_MASK, block_dim), place_of(access.place)};
}

Actor actor_of(const Thread &thread) { return {thread.block, thread.index, thread.at}; }

static std::string describe(const Actor &actor) {
    char        text[256];
    const char *slash = strrchr(actor.at.file, '/');
    (void)snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u) at %s:%d", actor.thread.x, actor.thread.y,
                   actor.thread.z, actor.block.x, actor.block.y, actor.block.z,
                   slash != nullptr ? slash + 1 : actor.at.file, actor.at.line);
    return text;
}

bool same_place(Place a, Place b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

static Report *find(const Report &like) {
    for (Report &r : machine.reports) {
        if (r.kind == like.kind && r.kernel == like.kernel && same_place(r.first.at, like.first.at) &&
            r.has_second == like.has_second && (!like.has_second || same_place(r.second.at, like.second.at)))
            return &r;
    }
    return nullptr;
}

void report(Kind kind, Space space, Place at, const Actor *other, const std::string &text) {
    Report r = {kind, space, machine.kernel, {{0, 0, 0}, {0, 0, 0}, at}, other != nullptr, {}, "", 1};
    if (self != nullptr) r.first.block = self->block, r.first.thread = self->index;
    if (other != nullptr) r.second = *other;
    Report *known = find(r);
    if (known != nullptr) {
        known->count++;
        return;
    }
    r.text = machine.kernel + ": " + kind_name(kind) + ": " + describe(r.first) + " " + text;
    if (other != nullptr) r.text += ": " + describe(*other);
    machine.reports.push_back(r);
}

const std::vector<Report> &reports() { return machine.reports; }

std::string report_text() {
    std::string text;
    for (const Report &r : machine.reports) text += r.text + " (" + std::to_string(r.count) + " times)\n";
    return text;
}

} // namespace simt
