// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: processes played by threads; what they exchange meets in a table between two barriers.
#ifndef PLAYED_PROCESSES_H
#define PLAYED_PROCESSES_H

#include <pthread.h>
#include <string.h>

#include "kvq_calib.h"
#include "kvq_test.h"

enum { MOST_RANKS = 4 };

typedef struct meeting {
    pthread_barrier_t barrier;
    int               n_ranks;
    int64_t           values[MOST_RANKS], sizes[MOST_RANKS];
    const uint8_t    *data[MOST_RANKS];
} meeting;

static inline kvq_status meet_and_agree(const kvq_processes *p, int64_t value, int64_t *smallest, kvq_error *err) {
    meeting *m = p->user;
    (void)err;
    m->values[p->rank] = value;
    (void)pthread_barrier_wait(&m->barrier);
    *smallest = value;
    for (int i = 0; i < m->n_ranks; i++) *smallest = m->values[i] < *smallest ? m->values[i] : *smallest;
    (void)pthread_barrier_wait(&m->barrier);
    return KVQ_OK;
}

static inline kvq_status meet_and_exchange(const kvq_processes *p, const kvq_context *ctx, const void *mine,
                                           int64_t bytes, uint8_t **all, int64_t *sizes, kvq_error *err) {
    meeting *m = p->user;
    int64_t  total = 0;
    m->data[p->rank] = mine;
    m->sizes[p->rank] = bytes;
    (void)pthread_barrier_wait(&m->barrier);
    for (int i = 0; i < m->n_ranks; i++) total += sizes[i] = m->sizes[i];
    kvq_test_ok(KVQ_NEW(ctx, total, "exchange", all, err), err);
    total = 0;
    for (int i = 0; i < m->n_ranks; total += m->sizes[i++]) memcpy(*all + total, m->data[i], (size_t)m->sizes[i]);
    (void)pthread_barrier_wait(&m->barrier);
    return KVQ_OK;
}

static inline kvq_processes meeting_rank(meeting *m, int rank) {
    return (kvq_processes){rank, m->n_ranks, m, meet_and_agree, meet_and_exchange};
}

#endif
