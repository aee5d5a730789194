// SPDX-License-Identifier: Apache-2.0
//
// Everything that kernels and their tests need of the emulator, and the words of kernels/cuda/device.cuh.
#ifndef SIMT_H
#define SIMT_H

#include "kvq_hd.h"
#include "simt_half.h"
#include "simt_intrinsics.h"
#include "simt_tensor.h"

#define KVQ_KERNEL [[maybe_unused]] static void
#define KVQ_BOUNDS(...)
#define KVQ_DEVICE [[maybe_unused]] static inline
#define KVQ_UNROLL
#define KVQ_GLOBAL(T)         ::simt::Pointer<T, ::simt::GLOBAL>
#define KVQ_GLOBAL_ALIASED(T) ::simt::Pointer<T, ::simt::GLOBAL>
#define KVQ_SHARED_PTR(T)     ::simt::Pointer<T, ::simt::SHARED>

// A tag for each place, and for each instance of a template there.
#define KVQ_SHARED(T, name, n)                                                                                         \
    const ::simt::Pointer<T, ::simt::SHARED> name(::simt::shared_variable(                                             \
                                                      #name, sizeof(T) * (n),                                          \
                                                      []() {                                                           \
                                                          static const char tag = 0;                                   \
                                                          return static_cast<const void *>(&tag);                      \
                                                      }(),                                                             \
                                                      ::simt::Place::here()),                                          \
                                                  0)
#define KVQ_DYNAMIC_SHARED(T, name) const ::simt::Pointer<T, ::simt::SHARED> name(::simt::dynamic_shared(), 0)

#define KVQ_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...)                                                    \
    ::simt::launch(#kernel, grid, block, dynamic_bytes, stream, kernel, __VA_ARGS__)

#define KVQ_ALLOW_SHARED(kernel, bytes) ::simt::allow_shared(reinterpret_cast<const void *>(kernel), bytes)

typedef void *kvq_stream;

static inline const char *kvq_launch_error() { return simt::launch_error(); }

template <typename T, typename P> static inline auto kvq_as(P p) { return simt::cast<T>(p); }

template <typename T, simt::Space S>
static inline T *kvq_raw(simt::Pointer<T, S> p, ptrdiff_t n, Place at = Place::here()) {
    return simt::raw(p, n, at);
}

#endif
