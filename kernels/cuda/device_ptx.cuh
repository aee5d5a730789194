// SPDX-License-Identifier: Apache-2.0
//
// Instructions that CUDA has no function for, as inline assembly; part of device.cuh under nvcc. The emulator's twins
// are in tests/simt/simt_tensor.h and simt_half.h. With g = lane / 4 and t = lane % 4 a register of an 8 x 8 matrix of
// halves holds elements (g, 2 t) and (g, 2 t + 1).
#ifndef KVQ_DEVICE_PTX_CUH
#define KVQ_DEVICE_PTX_CUH

// The register that holds two halves, the first in the low bits.
KVQ_DEVICE unsigned kvq_uint_of_half2(__half2 h) {
    return __half_as_ushort(__low2half(h)) | (unsigned)__half_as_ushort(__high2half(h)) << 16;
}
KVQ_DEVICE __half2 kvq_half2_of_uint(unsigned u) {
    return __halves2half2(__ushort_as_half((unsigned short)(u & 0xffffu)), __ushort_as_half((unsigned short)(u >> 16)));
}

KVQ_DEVICE unsigned kvq_shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// d [16, 8] += a [16, 16] b [16, 8], a and b halves, d floats. a[h + 2 k]: rows g + 8 h, columns 2 t + 8 k and the
// next; b[k]: rows 2 t + 8 k and the next, column g; d[2 h], d[2 h + 1]: row g + 8 h, columns 2 t, 2 t + 1.
KVQ_DEVICE void kvq_mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// N 8 x 8 matrices of halves from shared memory. Lane 8 m + i gives the address of row i of matrix m, a multiple of 16
// bytes; what the other lanes give is not looked at.
template <int N, typename T> KVQ_DEVICE void kvq_ldmatrix(unsigned (&r)[N], const T *row) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    unsigned at = kvq_shared_address(row);
    if constexpr (N == 1)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
}

// The same, each matrix transposed.
template <int N, typename T> KVQ_DEVICE void kvq_ldmatrix_trans(unsigned (&r)[N], const T *row) {
    static_assert(N == 1 || N == 2 || N == 4, "one, two or four matrices");
    unsigned at = kvq_shared_address(row);
    if constexpr (N == 1)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
}

// Transposes an 8 x 8 matrix of halves that lies in the registers of the warp.
KVQ_DEVICE unsigned kvq_movmatrix_trans(unsigned r) {
    unsigned result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(r));
    return result;
}

// Copies 16 bytes from global to shared memory while the thread goes on; of the source only valid_bytes are read, the
// rest becomes 0. Both addresses are multiples of 16. The bytes are there for this thread after it has waited for the
// group that they were committed in, for others after a barrier behind that.
KVQ_DEVICE void kvq_copy_async_16(void *to, const void *from, unsigned valid_bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(kvq_shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid_bytes)
                 : "memory");
}
KVQ_DEVICE void                       kvq_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N_LEFT> KVQ_DEVICE void kvq_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N_LEFT) : "memory");
}

#endif
