// SPDX-License-Identifier: Apache-2.0
//
// Stands in for the emulator's header (tests/simt/simt.h) in the text of suites that are built for a device: the same
// buffers and reports, of real memory. Only run.sh gives this path. A device finds less than the emulator does: writes
// beyond a buffer that hit one of its guards, and what the CUDA runtime tells; the tools of compute-sanitizer find more
// (KVQ_DEVICE_GUARDS=no makes room for them: without guards they see the end of every buffer).
#ifndef KVQ_DEVICE_SIMT_H
#define KVQ_DEVICE_SIMT_H

#include <cuda_runtime_api.h>
#include <string.h>

#include <string>
#include <vector>

#include "kvq_hd.h"

namespace simt {

// By how many units in the last place log and exp of f64 may differ from the host's.
enum { LIBRARY_UNITS = 1 };

enum { GUARD = 0xa5, GUARD_BYTES = 256 }; // a byte, and how many; CUDA aligns to so many

struct Options {
    uint64_t seed = 1; // a device has orders of its own
};

struct Report {
    std::string text;
};

// Starts a test: forgets reports.
void begin(const Options &options);
// Waits for the device. What was found since.
const std::vector<Report> &reports();
std::string                report_text();

// Device memory between two guards. What is found when it goes, and was not reported before, fails the running case.
class Region {
    std::string    name;
    unsigned char *base = nullptr; // of the first guard
    size_t         bytes;

    void check_guard(const char *where, size_t at) const;

  public:
    Region(const char *called, size_t n_bytes); // all bits set, as undefined memory of the emulator
    Region(const Region &) = delete;
    Region &operator=(const Region &) = delete;
    ~Region();

    void *data() const;
    void  put(size_t at, const void *from, size_t n_bytes);
    void  get(void *to) const; // waits for the device
    void  check() const;       // reports
};

template <typename T> class Buffer {
    Region region;
    size_t n;

  public:
    Buffer(const char *name, size_t n_elements) : region(name, n_elements * sizeof(T)), n(n_elements) {}
    Buffer(const char *name, const std::vector<T> &values) : Buffer(name, values.size()) { set(values); }

    T             *data() { return static_cast<T *>(region.data()); }
    std::vector<T> values() const { // a copy of what is there now
        std::vector<T> copy(n);
        region.get(copy.data());
        return copy;
    }
    void set(const std::vector<T> &values) { put(0, values.data(), values.size()); }
    void put(size_t at, const void *from, size_t n_elements) {
        region.put(at * sizeof(T), from, n_elements * sizeof(T));
    }
};

} // namespace simt

#endif
