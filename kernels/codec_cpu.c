// SPDX-License-Identifier: Apache-2.0
// The KV codec over many rows; the rules themselves are in kvq_block_hd.h.
#include <stdatomic.h>

#include "kernels_impl.h"

#define ROWS_PER_ITEM 64

typedef struct codec_job {
    const kvq_block_spec *spec;
    const float          *x;
    float                *out;
    uint8_t              *rows;
    const uint8_t        *coded;
    int64_t               m;
    _Atomic int64_t       first_bad; // smallest row that did not fit into f16, m = none
} codec_job;

static void note_bad_row(codec_job *job, int64_t row) {
    int64_t known = atomic_load(&job->first_bad);
    while (row < known && !atomic_compare_exchange_weak(&job->first_bad, &known, row)) {
    }
}

static void encode_rows(void *user, int64_t item, int worker) {
    codec_job        *job = user;
    float             upper_key[KVQ_BLOCK_MAX_SIDE + 1], lower_key[KVQ_BLOCK_MAX_SIDE + 1];
    uint16_t          upper_channel[KVQ_BLOCK_MAX_SIDE + 1], lower_channel[KVQ_BLOCK_MAX_SIDE + 1];
    kvq_block_scratch scratch = {upper_key, lower_key, upper_channel, lower_channel, 0, 0};
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        uint8_t *to = job->rows + row * kvq_block_row_bytes(job->spec);
        if (!kvq_block_encode(job->spec, job->x + row * job->spec->d, &scratch, to)) note_bad_row(job, row);
    }
}

static void decode_rows(void *user, int64_t item, int worker) {
    const codec_job *job = user;
    (void)worker;
    for (int64_t row = item * ROWS_PER_ITEM; row < (item + 1) * ROWS_PER_ITEM && row < job->m; row++) {
        kvq_block_decode(job->spec, job->coded + row * kvq_block_row_bytes(job->spec), job->out + row * job->spec->d);
    }
}

int64_t kvq_encode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows) {
    codec_job job = {.spec = spec, .x = x, .rows = rows, .m = m, .first_bad = m};
    kvq_parallel_for(be->ctx, (m + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, encode_rows, &job);
    int64_t first_bad = atomic_load(&job.first_bad);
    return first_bad < m ? first_bad : -1;
}

void kvq_decode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x) {
    codec_job job = {.spec = spec, .coded = rows, .out = x, .m = m};
    kvq_parallel_for(be->ctx, (m + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, decode_rows, &job);
}
