// SPDX-License-Identifier: Apache-2.0
//
// Giving back pages of a mapped file. POSIX has the call (posix_madvise), but glibc's does nothing; the one that works
// is outside POSIX, which is why this file is compiled with declarations of its own.
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkpoint.h"

// The mapping is private and never written, so that dropping a page loses nothing. That the kernel may refuse only
// costs memory.
void checkpoint_forget_bytes(const uint8_t *data, size_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data, end = begin + bytes;
    size_t    skipped = (size_t)((page - begin % page) % page);
    end -= end % page;
    if (begin + skipped < end) (void)madvise((void *)(data + skipped), end - (begin + skipped), MADV_DONTNEED);
}
