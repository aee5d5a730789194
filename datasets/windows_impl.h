// SPDX-License-Identifier: Apache-2.0
//
// Private to datasets: how every kind of windows begins and ends.
#ifndef KVQ_DATASETS_WINDOWS_IMPL_H
#define KVQ_DATASETS_WINDOWS_IMPL_H

#include "kvq_datasets.h"

// Checks the numbers (KVQ_ERR_USAGE) and allocates; everything else of *out is zero.
kvq_status windows_create(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, int64_t bos_id, kvq_windows *out,
                          kvq_error *err);
// Fills ids_sha256.
kvq_status windows_hash(kvq_windows *windows, kvq_error *err);

#endif
