// SPDX-License-Identifier: Apache-2.0
// The CUDA backend of a build without CUDA.
#include "kvq_kernels.h"

kvq_status kvq_backend_cuda(const kvq_context *ctx, int index, kvq_compute compute, kvq_backend **out, kvq_error *err) {
    (void)ctx, (void)index, (void)compute, (void)out;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                    "install the CUDA Toolkit (12.4 or later: nvcc, cudart, cuBLAS) and build with -DKVQ_CUDA=ON, or "
                    "take --device cpu",
                    "this kvq was built without CUDA");
}
