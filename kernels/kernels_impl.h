// SPDX-License-Identifier: Apache-2.0
//
// Private to kernels: the CPU operations that backend_cpu.c puts into the table, and the one matrix product they share.
// Contracts are those of the table's fields in kvq_kernels.h.
#ifndef KVQ_KERNELS_IMPL_H
#define KVQ_KERNELS_IMPL_H

#include <math.h>

#include "kvq_kernels.h"

// f64 sums of a row run over this many partial sums in a fixed order, which a compiler can turn into vector code
// without reordering anything.
#define LANES 8

static inline double sum_lanes(const double lane[LANES]) {
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// A product cut into tiles of at most rows x columns results; item i of a parallel loop is tile i.
typedef struct tiling {
    int64_t rows, columns, n_column_tiles, n_tiles;
} tiling;

typedef struct tile {
    int64_t row, column, rows, columns; // origin and size
} tile;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline tiling cut_into_tiles(int64_t m, int64_t n, int64_t rows, int64_t columns) {
    tiling t = {.rows = rows, .columns = columns, .n_column_tiles = (n + columns - 1) / columns};
    t.n_tiles = (m + rows - 1) / rows * t.n_column_tiles;
    return t;
}

// Columns of a tile when n are cut into as few equal parts as `widest` allows; a multiple of 16.
static inline int64_t equal_columns(int64_t n, int64_t widest) {
    int64_t parts = (n + widest - 1) / widest;
    return ((n + parts - 1) / parts + 15) / 16 * 16;
}

// Few rows (a decode step, a block of logits) make one row of tiles: columns that give several threads work.
#define FEW_ROWS 128
static inline int64_t columns_for_few_rows(int64_t n) {
    int64_t quarter = n / 4;
    return equal_columns(n, quarter < 144 ? 144 : quarter > 512 ? 512 : quarter);
}

static inline tile tile_of(const tiling *t, int64_t m, int64_t n, int64_t item) {
    int64_t row = item / t->n_column_tiles * t->rows, column = item % t->n_column_tiles * t->columns;
    tile    x = {row, column, smaller(t->rows, m - row), smaller(t->columns, n - column)};
    return x;
}

// The library could not compute y [rows, columns], most likely for want of memory. What was in y must not pass for a
// result: the next check for finite numbers ends the run.
static inline void spoil(float *y, int64_t y_stride, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) y[i * y_stride + j] = NAN;
    }
}

// c [m, n] = alpha * op(a) op(b) + beta * c on the calling thread, by one library call; row strides lda, ldb, ldc.
// transpose_a: a is stored [k, m]; transpose_b: b is stored [n, k].
void        kvq_gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                     int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
const char *kvq_gemm_prepare(void); // keeps the library on the calling thread; returns its name

int64_t kvq_weights_floats_cpu(const kvq_backend *be, int64_t n_out, int64_t n_in);
void    kvq_upload_weights_cpu(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                               const float *host_from);
void    kvq_linear_cpu(const kvq_backend *be, const float *x, const float *w, const float *bias, float *y, int64_t m,
                       int64_t n_out, int64_t n_in);
void    kvq_linear_backward_cpu(const kvq_backend *be, const float *dy, const float *w, float *dx, int64_t m,
                                int64_t n_out, int64_t n_in, bool accumulate);

// What linear layers in bf16 keep: compiled products and scratch.
typedef struct kvq_bf16 kvq_bf16;

typedef struct cpu_backend {
    kvq_backend table;
    kvq_bf16   *bf16; // NULL when linear layers are f32
} cpu_backend;

// Puts linear layers in bf16 into the table; destroy what was made also after a failure.
kvq_status kvq_use_bf16(cpu_backend *cpu, kvq_error *err);
void       kvq_bf16_destroy(const kvq_context *ctx, kvq_bf16 **bf16);

void kvq_rmsnorm_cpu(const kvq_backend *be, const float *x, const float *w, float eps, float *y, int64_t m, int64_t n);
void kvq_rmsnorm_backward_cpu(const kvq_backend *be, const float *x, const float *w, float eps, const float *dy,
                              float *dx, int64_t m, int64_t n);
void kvq_rope_cpu(const kvq_backend *be, float *x, const float *cos_table, const float *sin_table, int direction,
                  float scale, int64_t m, int n_heads, int head_dim, int rot);
void kvq_gated_mul_cpu(const kvq_backend *be, kvq_gate_kind kind, const float *gate, const float *up, float *y,
                       int64_t n);
void kvq_gated_mul_backward_cpu(const kvq_backend *be, kvq_gate_kind kind, float *gate, float *up, const float *dy,
                                int64_t n);
void kvq_softcap_cpu(const kvq_backend *be, float cap, float *x, int64_t n);

void kvq_route_cpu(const kvq_backend *be, const kvq_route *to, const float *x, const float *w, int64_t m, int64_t n);
void kvq_route_backward_cpu(const kvq_backend *be, const kvq_route *from, const float *dweight, const float *w,
                            float *dx, int64_t m, int64_t n);
void kvq_gather_rows_cpu(const kvq_backend *be, const float *x, const int32_t *rows, float *y, int64_t m, int64_t n);
void kvq_scatter_rows_cpu(const kvq_backend *be, const float *x, const int32_t *rows, const float *scales, float *y,
                          int64_t m, int64_t n);
void kvq_row_dots_cpu(const kvq_backend *be, const float *a, const float *b, float *out, int64_t m, int64_t n);

int64_t kvq_attention_scratch_floats_cpu(const kvq_backend *be, const kvq_attention_shape *shape, bool backward);
void    kvq_attention_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                          const float *v, const float *k_recent, const float *v_recent, float *out, float *scratch);
void kvq_attention_backward_cpu(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                                const float *v, const float *out, const float *dout, float *dq, float *dk, float *dv,
                                float *scratch);
void kvq_attention_step_cpu(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                            int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                            float *scratch);

void kvq_cross_entropy_cpu(const kvq_backend *be, float *logits, const int32_t *targets, int64_t m, int64_t n_vocab,
                           float cap, double scale, double *nll);
void kvq_compare_cpu(const kvq_backend *be, const float *logits_a, const float *logits_b, const int32_t *targets,
                     int64_t m, int64_t n_vocab, kvq_position_score *out);
void kvq_sample_cpu(const kvq_backend *be, const float *logits, const double *u, int64_t m, int64_t n_vocab,
                    int32_t *ids);

int64_t    kvq_encode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows);
void       kvq_decode_cpu(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x);
kvq_status kvq_encode_tiles_cpu(const kvq_backend *be, const kvq_tile_spec *spec, const float *x, int64_t first,
                                int64_t n_tokens, uint8_t *tiles, int64_t *bad, kvq_error *err);
void       kvq_decode_tiles_cpu(const kvq_backend *be, const kvq_tile_spec *spec, const uint8_t *tiles, int64_t first,
                                int64_t n_tokens, float *x);

int64_t kvq_store_halves_cpu(const kvq_backend *be, const float *x, int64_t n, uint16_t *to);
void    kvq_load_halves_cpu(const kvq_backend *be, const uint16_t *from, int64_t n, float *x);
void    kvq_round_halves_cpu(const kvq_backend *be, float *x, int64_t n);

#endif
