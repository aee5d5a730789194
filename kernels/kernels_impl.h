// SPDX-License-Identifier: Apache-2.0
//
// Private to kernels: the CPU operations that backend_cpu.c puts into the table, and the one matrix product they share.
// Contracts are those of the table's fields in kvq_kernels.h.
#ifndef KVQ_KERNELS_IMPL_H
#define KVQ_KERNELS_IMPL_H

#include "kvq_kernels.h"

// f64 sums of a row run over this many partial sums in a fixed order, which a compiler can turn into vector code
// without reordering anything.
#define LANES 8

static inline double sum_lanes(const double lane[LANES]) {
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// c [m, n] = alpha * op(a) op(b) + beta * c on the calling thread, by one library call; row strides lda, ldb, ldc.
// transpose_a: a is stored [k, m]; transpose_b: b is stored [n, k].
void        kvq_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                     int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
const char *kvq_gemm_prepare(void); // keeps the library on the calling thread; returns its name

void kvq_linear_cpu(const kvq_backend *be, const float *x, const float *w, const float *bias, float *y, int64_t m,
                    int64_t n_out, int64_t n_in);
void kvq_linear_backward_cpu(const kvq_backend *be, const float *dy, const float *w, float *dx, int64_t m,
                             int64_t n_out, int64_t n_in, bool accumulate);

void kvq_rmsnorm_cpu(const kvq_backend *be, const float *x, const float *w, float eps, float *y, int64_t m, int64_t n);
void kvq_rmsnorm_backward_cpu(const kvq_backend *be, const float *x, const float *w, float eps, const float *dy,
                              float *dx, int64_t m, int64_t n);
void kvq_rope_cpu(const kvq_backend *be, float *x, const float *cos_table, const float *sin_table, int direction,
                  int64_t m, int n_heads, int head_dim, int rot);
int64_t kvq_weights_floats_cpu(const kvq_backend *be, int64_t n_out, int64_t n_in);
void    kvq_upload_weights_cpu(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                               const float *host_from);
void    kvq_silu_mul_cpu(const kvq_backend *be, const float *gate, const float *up, float *y, int64_t n);
void    kvq_silu_mul_backward_cpu(const kvq_backend *be, float *gate, float *up, const float *dy, int64_t n);

int64_t kvq_attention_scratch_floats_cpu(const kvq_backend *be, const kvq_attention_shape *shape, bool backward);
void    kvq_attention_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                          const float *v, float *out, float *scratch);
void kvq_attention_backward_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                                const float *v, const float *out, const float *dout, float *dq, float *dk, float *dv,
                                float *scratch);
void kvq_attention_step_cpu(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                            int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                            float *scratch);

void kvq_cross_entropy_cpu(const kvq_backend *be, float *logits, const int32_t *targets, int64_t m, int64_t n_vocab,
                           double scale, double *nll);
void kvq_compare_cpu(const kvq_backend *be, const float *logits_a, const float *logits_b, const int32_t *targets,
                     int64_t m, int64_t n_vocab, kvq_position_score *out);
void kvq_sample_cpu(const kvq_backend *be, const float *logits, const double *u, int64_t m, int64_t n_vocab,
                    int32_t *ids);

int64_t kvq_encode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows);
void    kvq_decode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x);

#endif
