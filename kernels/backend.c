// SPDX-License-Identifier: Apache-2.0
// Which backend a device is.
#include <stdio.h>
#include <string.h>

#include "kvq_kernels.h"

#define MAX_INDEX 1023

// "cuda" -> 0, "cuda:N" -> N, anything else -> -1
static int cuda_index(const char *device) {
    int index = 0, end = 0;
    if (strcmp(device, "cuda") == 0) return 0;
    if (sscanf(device, "cuda:%4d%n", &index, &end) != 1 || device[end] != 0) return -1;
    return device[5] >= '0' && device[5] <= '9' && index <= MAX_INDEX ? index : -1;
}

// The first CUDA device; whatever speaks against it is a reason to take the CPU, and is told.
static kvq_status open_fastest(const kvq_context *ctx, kvq_compute compute, kvq_backend **out, kvq_error *err) {
    kvq_error why = {KVQ_OK, "", ""};
    if (kvq_backend_cuda(ctx, 0, compute, out, &why) == KVQ_OK) return KVQ_OK;
    kvq_status status = kvq_backend_cpu(ctx, compute, out, err);
    if (status != KVQ_OK) return status;
    (void)snprintf((*out)->fallback, sizeof(*out)->fallback, "%.*s", (int)sizeof(*out)->fallback - 1, why.message);
    return KVQ_OK;
}

kvq_status kvq_backend_open(const kvq_context *ctx, const char *device, kvq_compute compute, kvq_backend **out,
                            kvq_error *err) {
    if (strcmp(device, "cpu") == 0) return kvq_backend_cpu(ctx, compute, out, err);
    if (strcmp(device, "auto") == 0) return open_fastest(ctx, compute, out, err);
    int index = cuda_index(device);
    if (index < 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "take cpu, cuda, cuda:N or auto", "--device %s: there is no such device",
                        device);
    }
    kvq_status status = kvq_backend_cuda(ctx, index, compute, out, err);
    if (status != KVQ_OK) kvq_error_prefix(err, "--device %s: ", device);
    return status;
}
