// SPDX-License-Identifier: Apache-2.0
// Stands in for processes_mpi.c in a build without MPI.
#include "kvq_calib.h"

kvq_status kvq_processes_start(kvq_processes *out, kvq_error *err) {
    *out = kvq_processes_single();
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                    "build with MPI (Debian: libopenmpi-dev), or run shards (--shard) and kvq-merge",
                    "several processes were started, but this kvq was built without MPI");
}

void kvq_processes_finish(kvq_processes *p) { (void)p; }
