// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: a context whose allocator fails after a given number of calls and counts what is not released.
// A test raises the number from zero until the call succeeds, so every allocation has failed once.
#ifndef LIMITED_MEMORY_H
#define LIMITED_MEMORY_H

#include "kvq_core.h"

typedef struct limited_memory {
    kvq_context inner;
    int64_t     left;   // allocations that still succeed
    int64_t     n_live; // blocks that were not released
} limited_memory;

static inline void *limited_alloc(void *user, size_t bytes) {
    limited_memory *m = user;
    if (m->left-- <= 0) return NULL;
    void *p = m->inner.alloc(m->inner.user, bytes);
    m->n_live += p != NULL;
    return p;
}

static inline void limited_release(void *user, void *p) {
    limited_memory *m = user;
    m->n_live--;
    m->inner.release(m->inner.user, p);
}

// `memory->inner` must be set; `memory` must live as long as the context.
static inline kvq_context limited_context(limited_memory *memory) {
    kvq_context ctx = memory->inner;
    ctx.user = memory;
    ctx.alloc = limited_alloc;
    ctx.release = limited_release;
    return ctx;
}

#endif
