// SPDX-License-Identifier: Apache-2.0
//
// Processes started by mpirun. Only what is seen travels, as bytes, so nothing here knows what it means: ranks send all
// they have to all others, and each merges by the same exact rules.
#include <mpi.h>
#include <string.h>

#include "kvq_calib.h"

static kvq_status mpi_failure(int code, const char *what, kvq_error *err) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int  n = 0;
    (void)MPI_Error_string(code, text, &n);
    return kvq_fail(err, KVQ_ERR_INTERNAL, "run the same command again to continue", "MPI: %s: %s", what, text);
}

static kvq_status agree(const kvq_processes *p, int64_t value, int64_t *smallest, kvq_error *err) {
    long long mine = value, least = 0;
    (void)p;
    int code = MPI_Allreduce(&mine, &least, 1, MPI_LONG_LONG, MPI_MIN, MPI_COMM_WORLD);
    *smallest = least;
    return code == MPI_SUCCESS ? KVQ_OK : mpi_failure(code, "the ranks cannot agree", err);
}

// MPI counts with int, so ranks send one after the other in pieces that fit.
#define PIECE (1 << 30)

static int broadcast(uint8_t *data, int64_t bytes, int root) {
    int code = MPI_SUCCESS;
    for (int64_t at = 0; at < bytes && code == MPI_SUCCESS; at += PIECE) {
        int n = bytes - at < PIECE ? (int)(bytes - at) : PIECE;
        code = MPI_Bcast(data + at, n, MPI_BYTE, root, MPI_COMM_WORLD);
    }
    return code;
}

static kvq_status exchange(const kvq_processes *p, const kvq_context *ctx, const void *mine, int64_t bytes,
                           uint8_t **all, int64_t *sizes, kvq_error *err) {
    uint8_t *data = NULL;
    int64_t  total = 0, at = 0, least = 0;
    int      code = MPI_Allgather(&bytes, 1, MPI_INT64_T, sizes, 1, MPI_INT64_T, MPI_COMM_WORLD);
    for (int rank = 0; rank < p->n_ranks; rank++) total += sizes[rank];
    kvq_status status = KVQ_NEW(ctx, total, "what ranks exchange", &data, NULL);
    // nobody waits for a rank that has no memory
    kvq_status agreed = agree(p, status == KVQ_OK && code == MPI_SUCCESS, &least, err);
    if (agreed == KVQ_OK && least == 0) agreed = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "a rank cannot hold what all saw");
    if (agreed == KVQ_OK) {
        for (int rank = 0; rank < p->n_ranks && code == MPI_SUCCESS; rank++) {
            if (rank == p->rank) memcpy(data + at, mine, (size_t)bytes);
            code = broadcast(data + at, sizes[rank], rank);
            at += sizes[rank];
        }
        if (code != MPI_SUCCESS) agreed = mpi_failure(code, "the ranks cannot exchange what they saw", err);
    }
    if (agreed == KVQ_OK) {
        *all = data;
    } else {
        kvq_free(ctx, data);
    }
    return agreed;
}

kvq_status kvq_processes_start(kvq_processes *out, kvq_error *err) {
    *out = kvq_processes_single();
    int provided = 0, code = MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    if (code != MPI_SUCCESS) return mpi_failure(code, "cannot start", err);
    (void)MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    (void)MPI_Comm_size(MPI_COMM_WORLD, &out->n_ranks);
    (void)MPI_Comm_rank(MPI_COMM_WORLD, &out->rank);
    out->agree = agree;
    out->exchange = exchange;
    return KVQ_OK;
}

void kvq_processes_finish(kvq_processes *p) {
    (void)p;
    (void)MPI_Finalize();
}
