// SPDX-License-Identifier: Apache-2.0
//
// What a warp does with 8 x 8 and 16 x 16 matrices, and asynchronous copies. Fragments are laid out as PTX says; with
// g = lane / 4 and t = lane % 4 a register of an 8 x 8 matrix of halves holds elements (g, 2 t) and (g, 2 t + 1).
#ifndef SIMT_TENSOR_H
#define SIMT_TENSOR_H

#include "simt_pointer.h"

namespace simt {

void mma_m16n8k16(float d[4], const unsigned a[4], const unsigned b[2], Place at);
// `row`: 16 bytes read by this lane, if its row is asked for.
void     load_matrices(int n, bool transposed, unsigned *r, const uint16_t row[8], Place at);
unsigned transpose_matrix(unsigned r, Place at);

template <int N, typename T> void ldmatrix(bool transposed, unsigned (&r)[N], Pointer<T, SHARED> row, Place at) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    uint16_t halves[8] = {0};
    if (self->lane < 8 * N) { // the others' addresses are not looked at
        const void *from = touch(row.memory, row.offset, sizeof halves, sizeof halves, READ, at);
        if (from != nullptr) memcpy(halves, from, sizeof halves);
    }
    load_matrices(N, transposed, r, halves, at);
}

} // namespace simt

// d [16, 8] += a [16, 16] b [16, 8], a and b halves, d floats. The device's order of summation is its secret; here each
// element is summed in f64 and rounded once, so only exact sums agree to the bit.
static inline void kvq_mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    Place at = Place::here()) {
    simt::mma_m16n8k16(d, a, b, at);
}

template <int N, typename T>
static inline void kvq_ldmatrix(unsigned (&r)[N], simt::Pointer<T, simt::SHARED> row, Place at = Place::here()) {
    simt::ldmatrix(false, r, row, at);
}
template <int N, typename T>
static inline void kvq_ldmatrix_trans(unsigned (&r)[N], simt::Pointer<T, simt::SHARED> row, Place at = Place::here()) {
    simt::ldmatrix(true, r, row, at);
}
static inline unsigned kvq_movmatrix_trans(unsigned r, Place at = Place::here()) {
    return simt::transpose_matrix(r, at);
}

template <typename T, typename U>
static inline void kvq_copy_async_16(simt::Pointer<T, simt::SHARED> to, simt::Pointer<U, simt::GLOBAL> from,
                                     unsigned valid_bytes = 16, Place at = Place::here()) {
    simt::copy_async(to.memory, to.offset, from.memory, from.offset, valid_bytes, at);
}
static inline void                       kvq_copy_commit() { simt::commit_copies(); }
template <int N_LEFT> static inline void kvq_copy_wait() { simt::wait_copies(N_LEFT); }

#endif
