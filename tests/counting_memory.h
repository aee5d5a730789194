// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: an allocator that knows how many bytes are in use and how many were at most.
#ifndef COUNTING_MEMORY_H
#define COUNTING_MEMORY_H

#include <stdatomic.h>
#include <string.h>

#include "kvq_core.h"

typedef struct counting_memory {
    kvq_context     inner;
    _Atomic int64_t now, most;
} counting_memory;

// The size stands in front of a block, which keeps its alignment.
static inline void *counting_alloc(void *user, size_t bytes) {
    counting_memory *m = user;
    char            *p = m->inner.alloc(m->inner.user, bytes + 64);
    if (p == NULL) return NULL;
    memcpy(p, &bytes, sizeof bytes);
    int64_t now = (m->now += (int64_t)bytes), most = m->most;
    while (now > most && !atomic_compare_exchange_weak(&m->most, &most, now)) {
    }
    return p + 64;
}

static inline void counting_release(void *user, void *p) {
    counting_memory *m = user;
    size_t           bytes;
    memcpy(&bytes, (char *)p - 64, sizeof bytes);
    m->now -= (int64_t)bytes;
    m->inner.release(m->inner.user, (char *)p - 64);
}

// `memory->inner` must be set; `memory` must live as long as the context, and so must its callbacks' user.
static inline kvq_context counting_context(counting_memory *memory) {
    kvq_context ctx = memory->inner;
    ctx.user = memory;
    ctx.alloc = counting_alloc;
    ctx.release = counting_release;
    return ctx;
}

#endif
