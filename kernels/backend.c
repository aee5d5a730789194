// SPDX-License-Identifier: Apache-2.0
// Which backend a device is.
#include <ctype.h>
#include <string.h>

#include "kvq_kernels.h"

static bool names_cuda(const char *device) {
    if (strncmp(device, "cuda", 4) != 0) return false;
    const char *index = device + 4;
    if (*index == 0) return true;
    if (*index++ != ':' || *index == 0) return false;
    while (isdigit((unsigned char)*index)) index++;
    return *index == 0;
}

kvq_status kvq_backend_open(const kvq_context *ctx, const char *device, kvq_compute compute, kvq_backend **out,
                            kvq_error *err) {
    if (strcmp(device, "cpu") == 0 || strcmp(device, "auto") == 0) return kvq_backend_cpu(ctx, compute, out, err);
    if (names_cuda(device)) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "leave --device out, or take --device cpu",
                        "--device %s: this version of kvq runs models on the CPU only", device);
    }
    return kvq_fail(err, KVQ_ERR_USAGE, "take cpu, cuda, cuda:N or auto", "--device %s: there is no such device",
                    device);
}
