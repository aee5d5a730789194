// SPDX-License-Identifier: Apache-2.0
// Device memory and what is found about it; see simt.h.
#include "simt.h"

#include <stdlib.h>

#include <algorithm>
#include <exception>

#include "check.h"

namespace simt {

namespace {

std::vector<Report>         found;
std::vector<const Region *> living;

size_t guard_bytes() {
    const char *wanted = getenv("KVQ_DEVICE_GUARDS");
    return wanted != nullptr && strcmp(wanted, "no") == 0 ? 0 : static_cast<size_t>(GUARD_BYTES);
}

void need(cudaError_t status, const char *what, const std::string &name) {
    if (status != cudaSuccess) ck_abort_msg("%s %s: %s", what, name.c_str(), cudaGetErrorString(status));
}

// Waits. False: the device takes no more work from this process.
bool device_is_sound() {
    cudaError_t status = cudaDeviceSynchronize();
    if (status == cudaSuccess) status = cudaGetLastError(); // a launch that nobody asked about
    if (status != cudaSuccess) found.push_back({std::string("the device: ") + cudaGetErrorString(status)});
    return status == cudaSuccess;
}

} // namespace

void begin(const Options &) { found.clear(); }

const std::vector<Report> &reports() {
    if (device_is_sound()) {
        for (const Region *region : living) region->check();
    }
    return found;
}

std::string report_text() {
    std::string text;
    for (const Report &report : found) text += report.text + "\n";
    return text;
}

Region::Region(const char *called, size_t n_bytes) : name(called), bytes(n_bytes) {
    void  *memory = nullptr;
    size_t guard = guard_bytes(), all = bytes + 2 * guard;
    if (all > 0) need(cudaMalloc(&memory, all), "memory for", name);
    base = static_cast<unsigned char *>(memory);
    if (all > 0) need(cudaMemset(base, GUARD, all), "guards of", name);
    if (bytes > 0) need(cudaMemset(base + guard, 0xff, bytes), "memory of", name);
    living.push_back(this);
}

// Nothing is said about a case that is failing already.
Region::~Region() {
    size_t before = found.size();
    if (std::uncaught_exceptions() == 0 && before == 0 && device_is_sound()) check();
    if (std::uncaught_exceptions() == 0 && found.size() > before)
        ck_note_failed(__FILE__, __LINE__, "%s", report_text().c_str());
    living.erase(std::find(living.begin(), living.end(), this));
    (void)cudaFree(base);
}

void *Region::data() const { return base + guard_bytes(); }

void Region::put(size_t at, const void *from, size_t n_bytes) {
    if (at > bytes || n_bytes > bytes - at) ck_abort_msg("the test writes beyond the end of %s", name.c_str());
    if (n_bytes == 0) return;
    need(cudaMemcpy(base + guard_bytes() + at, from, n_bytes, cudaMemcpyHostToDevice), "copy to", name);
}

void Region::get(void *to) const {
    if (bytes == 0) return;
    need(cudaMemcpy(to, data(), bytes, cudaMemcpyDeviceToHost), "copy from", name);
}

void Region::check_guard(const char *where, size_t at) const {
    unsigned char guard[GUARD_BYTES];
    if (cudaMemcpy(guard, base + at, sizeof guard, cudaMemcpyDeviceToHost) != cudaSuccess) return; // said elsewhere
    for (size_t i = 0; i < sizeof guard; i++) {
        if (guard[i] == GUARD) continue;
        size_t away = at == 0 ? sizeof guard - i : i + 1;
        found.push_back({"a write " + std::to_string(away) + " bytes " + where + name});
        return;
    }
}

void Region::check() const {
    if (guard_bytes() == 0) return;
    check_guard("before ", 0);
    check_guard("behind the end of ", guard_bytes() + bytes);
}

} // namespace simt
