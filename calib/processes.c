// SPDX-License-Identifier: Apache-2.0
// One process: everything is agreed upon at once.
#include <string.h>

#include "kvq_calib.h"

static kvq_status agree_alone(const kvq_processes *p, int64_t value, int64_t *smallest, kvq_error *err) {
    (void)p, (void)err;
    *smallest = value;
    return KVQ_OK;
}

static kvq_status exchange_alone(const kvq_processes *p, const kvq_context *ctx, const void *mine, int64_t bytes,
                                 uint8_t **all, int64_t *sizes, kvq_error *err) {
    (void)p;
    kvq_status status = KVQ_NEW(ctx, bytes, "what processes exchange", all, err);
    if (status != KVQ_OK) return status;
    memcpy(*all, mine, (size_t)bytes);
    sizes[0] = bytes;
    return KVQ_OK;
}

kvq_processes kvq_processes_single(void) {
    return (kvq_processes){.n_ranks = 1, .agree = agree_alone, .exchange = exchange_alone};
}
