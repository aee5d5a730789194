// SPDX-License-Identifier: Apache-2.0
// Checksums against damage, for data that is read again by the run that wrote it; what leaves kvq has SHA-256.
#include <xxhash.h>

#include "kvq_core.h"

uint64_t kvq_checksum(const void *data, size_t bytes) { return XXH3_64bits(data, bytes); }
