// SPDX-License-Identifier: Apache-2.0
//
// The operations of the backend table (kvq_kernels.h, where their formulas are) on a CUDA device, with the arguments of
// the table's entries and in their order. What differs:
//   * all pointers are device memory, also those that the table calls host memory; they are named d_* here
//   * work is put on `stream` (a cudaStream_t), in order; nothing is allocated, copied or waited for
//   * a launch that the device refuses is told by the status and `err` (may be NULL). What goes wrong later is seen by
//     whoever waits for the stream.
// Sizes of 0 are allowed and do nothing. Matrices are row-major and dense, f32. Every operation gives the same bits
// each time, and, unless its comment says otherwise, those of the CPU backend.
#ifndef KVQ_CUDA_OPS_H
#define KVQ_CUDA_OPS_H

#include "kvq_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------- row_ops.cu

// y [n] += x [n]
kvq_status kvq_cuda_add(float *y, const float *x, int64_t n, void *stream, kvq_error *err);
// y [m, n] = x [m, n] / rms * w [n]; y may be x
kvq_status kvq_cuda_rmsnorm(const float *x, const float *w, float eps, float *y, int64_t m, int64_t n, void *stream,
                            kvq_error *err);
// dx [m, n] += d loss / d x, dy [m, n]
kvq_status kvq_cuda_rmsnorm_backward(const float *x, const float *w, float eps, const float *dy, float *dx, int64_t m,
                                     int64_t n, void *stream, kvq_error *err);
// y [m, n] += bias [n], behind a product of a library
kvq_status kvq_cuda_add_bias(float *y, const float *bias, int64_t m, int64_t n, void *stream, kvq_error *err);
// x [m, n_heads, head_dim] in place; cos_table, sin_table [m, rot / 2]; rot <= head_dim
kvq_status kvq_cuda_rope(float *x, const float *cos_table, const float *sin_table, int direction, float scale,
                         int64_t m, int n_heads, int head_dim, int rot, void *stream, kvq_error *err);
// y [n] = activation(gate [n]) * up [n]; y may be gate or up
kvq_status kvq_cuda_gated_mul(kvq_gate_kind kind, const float *gate, const float *up, float *y, int64_t n, void *stream,
                              kvq_error *err);
// gate [n] and up [n] become their gradients, dy [n]
kvq_status kvq_cuda_gated_mul_backward(kvq_gate_kind kind, float *gate, float *up, const float *dy, int64_t n,
                                       void *stream, kvq_error *err);
// x [n] = cap * tanh(x / cap), cap > 0
kvq_status kvq_cuda_softcap(float cap, float *x, int64_t n, void *stream, kvq_error *err);
// y [m, n]: row i is row d_rows[i] of x
kvq_status kvq_cuda_gather_rows(const float *x, const int32_t *d_rows, float *y, int64_t m, int64_t n, void *stream,
                                kvq_error *err);
// Row d_rows[i] of y += d_scales[i] * row i of x [m, n]; no row may occur twice
kvq_status kvq_cuda_scatter_rows(const float *x, const int32_t *d_rows, const float *d_scales, float *y, int64_t m,
                                 int64_t n, void *stream, kvq_error *err);
// *d_first = index of the first element of x [n] that is NaN or infinite, or KVQ_CUDA_ALL_FINITE
#define KVQ_CUDA_ALL_FINITE (~0ull)
kvq_status kvq_cuda_find_nonfinite(const float *x, int64_t n, unsigned long long *d_first, void *stream,
                                   kvq_error *err);
// d_to [n] = x [n] in f16, *d_first = index of the first number that f16 cannot hold, or KVQ_CUDA_ALL_FINITE; d_to
// NULL: only that. And back; and x rounded in place.
kvq_status kvq_cuda_store_halves(const float *x, int64_t n, uint16_t *d_to, unsigned long long *d_first, void *stream,
                                 kvq_error *err);
kvq_status kvq_cuda_load_halves(const uint16_t *d_from, int64_t n, float *x, void *stream, kvq_error *err);
kvq_status kvq_cuda_round_halves(float *x, int64_t n, void *stream, kvq_error *err);
// For products with factors in bf16: y [n] = x [n], to the nearest, ties to even; and back, which is exact.
kvq_status kvq_cuda_bf16_of_float(const float *x, uint16_t *y, int64_t n, void *stream, kvq_error *err);
kvq_status kvq_cuda_float_of_bf16(const uint16_t *x, float *y, int64_t n, void *stream, kvq_error *err);

// ---------------------------------------------------------------- experts.cu; E at most KVQ_CUDA_MAX_EXPERTS

#define KVQ_CUDA_MAX_EXPERTS 1024
// x [m, n], w [E, n]; d_to has arrays in device memory. Always the CPU's bits.
kvq_status kvq_cuda_route(const kvq_route *d_to, const float *x, const float *w, int64_t m, int64_t n, void *stream,
                          kvq_error *err);
// dx [m, n] += d loss / d x; d_dweight [m, k]
kvq_status kvq_cuda_route_backward(const kvq_route *d_from, const float *d_dweight, const float *w, float *dx,
                                   int64_t m, int64_t n, void *stream, kvq_error *err);
// d_out [m] = dot products of the rows of a and b [m, n], summed in f64 in the CPU's order
kvq_status kvq_cuda_row_dots(const float *a, const float *b, float *d_out, int64_t m, int64_t n, void *stream,
                             kvq_error *err);

// ---------------------------------------------------------------- loss.cu; logits [m, n_vocab], finite, n_vocab >= 1
// The CPU's bits as far as log and exp of f64 have them, which on a device differ by one unit in the last place: nll by
// at most that of log-sum-exp, a gradient by one unit of f32 where it lies that close to a boundary of rounding.

// d_targets [m]; d_nll [m], nats; the logits become the gradient of scale * nll unless scale is 0
kvq_status kvq_cuda_cross_entropy(float *logits, const int32_t *d_targets, int64_t m, int64_t n_vocab, float cap,
                                  double scale, double *d_nll, void *stream, kvq_error *err);
// d_targets, d_out [m]; logits_a may be logits_b
kvq_status kvq_cuda_compare(const float *logits_a, const float *logits_b, const int32_t *d_targets, int64_t m,
                            int64_t n_vocab, kvq_position_score *d_out, void *stream, kvq_error *err);
// d_u [m] in [0, 1), d_ids [m]; always the CPU's bits
kvq_status kvq_cuda_sample(const float *logits, const double *d_u, int64_t m, int64_t n_vocab, int32_t *d_ids,
                           void *stream, kvq_error *err);

// ---------------------------------------------------------------- attention_window.cu; q, out [S, H, D], k, v [S, Hkv,
// D] Sums of f32 as on the CPU, in another order: results differ by rounding. S < 2^31, any D; heads wider than 128
// cost their scores once per 128 channels. Memory beside the arguments is the scratch of backward.

int64_t kvq_cuda_window_scratch_floats(const kvq_attention_shape *shape, bool backward); // 3 S H, or 0 for forward
// k_recent, v_recent: the second set, not read when shape->second is not used
kvq_status kvq_cuda_window_attention(const kvq_attention_shape *shape, const float *q, const float *k, const float *v,
                                     const float *k_recent, const float *v_recent, float *out, void *stream,
                                     kvq_error *err);
// dq [S, H, D], dk, dv [S, Hkv, D] are overwritten; shape->second is not used
kvq_status kvq_cuda_window_attention_backward(const kvq_attention_shape *shape, const float *q, const float *k,
                                              const float *v, const float *out, const float *dout, float *dq, float *dk,
                                              float *dv, float *scratch, void *stream, kvq_error *err);

// ---------------------------------------------------------------- attention_step.cu

// One new token of n_seqs sequences over caches in f32, as attention_step of the table; scratch [n_seqs * H, capacity].
// D at most 1024. Sums of f32 in another order than the CPU's.
kvq_status kvq_cuda_attention_step(const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past, int64_t capacity,
                                   const float *q, const float *k_cache, const float *v_cache, float *out,
                                   float *scratch, void *stream, kvq_error *err);

// ---------------------------------------------------------------- linear.cu; x [m, n_in], w [n_out, n_in], y [m,
// n_out] Products without a library, w and factors in f32, n_out and n_in below 2^22. Sums run in the order of the
// index, fused: they err by at most n * 2^-24 times the sum of magnitudes, as the CPU's do, in another order.

// bias [n_out], NULL = none
kvq_status kvq_cuda_linear_plain(const float *x, const float *w, const float *bias, float *y, int64_t m, int64_t n_out,
                                 int64_t n_in, void *stream, kvq_error *err);
// dx [m, n_in] (+)= dy [m, n_out] w
kvq_status kvq_cuda_linear_backward_plain(const float *dy, const float *w, float *dx, int64_t m, int64_t n_out,
                                          int64_t n_in, bool accumulate, void *stream, kvq_error *err);

// ---------------------------------------------------------------- count.cu; always the CPU's bits

// As count of the table; z and r of rule->spec are device memory, rule and spec themselves are not. counters begin at a
// multiple of 8. *d_first = index of the first element that cannot be counted, or KVQ_CUDA_ALL_FINITE. m < 2^31.
int64_t    kvq_cuda_count_scratch_floats(int64_t m, int64_t d);
kvq_status kvq_cuda_count(const kvq_count_rule *rule, const float *x, const float *gradients, int64_t m,
                          float *counters, float *scratch, unsigned long long *d_first, void *stream, kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
