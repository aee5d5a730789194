// SPDX-License-Identifier: Apache-2.0
//
// Parallel loops on threads that live for one loop. Starting a thread costs some ten microseconds, which is nothing
// beside the work of an item; in return nobody spins while waiting (a spinning pool takes the processor away from
// whoever has work, and a loaded machine slows down twentyfold), no state outlives the call, and the thread sanitizer
// sees everything.
#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>

#include "kvq_core.h"

typedef struct loop {
    kvq_parallel_fn body;
    void           *user;
    int64_t         n_items;
    _Atomic int64_t next;
} loop;

typedef struct loop_worker {
    loop     *loop;
    int       index;
    pthread_t thread;
} loop_worker;

// Libraries that bring their own OpenMP threads (oneDNN) must use one here: the items are what is parallel,
// and a library that splits its sums by its thread count would give other bits.
static void *run_items(void *argument) {
    const loop_worker *worker = argument;
    loop              *l = worker->loop;
    omp_set_num_threads(1);
    for (int64_t item; (item = atomic_fetch_add(&l->next, 1)) < l->n_items;) l->body(l->user, item, worker->index);
    return NULL;
}

void kvq_parallel_for(const kvq_context *ctx, int64_t n_items, kvq_parallel_fn body, void *user) {
    loop        l = {.body = body, .user = user, .n_items = n_items};
    loop_worker workers[KVQ_MAX_THREADS];
    int         n_threads = ctx->n_threads < KVQ_MAX_THREADS ? ctx->n_threads : KVQ_MAX_THREADS, n_started = 1;
    if (n_items < n_threads) n_threads = (int)n_items;
    for (int i = 1; i < n_threads; i++) {
        workers[n_started] = (loop_worker){.loop = &l, .index = n_started};
        if (pthread_create(&workers[n_started].thread, NULL, run_items, &workers[n_started]) != 0)
            break; // fewer will do
        n_started++;
    }
    int saved = omp_get_max_threads();
    workers[0] = (loop_worker){.loop = &l, .index = 0};
    (void)run_items(&workers[0]);
    omp_set_num_threads(saved);
    for (int i = 1; i < n_started; i++) (void)pthread_join(workers[i].thread, NULL);
}
