// SPDX-License-Identifier: Apache-2.0
//
// The KV codecs on a CUDA device in exact mode: byte for byte what kvq_block_encode and kvq_tile_encode give, bit for
// bit what their decoders give (compile with -fmad=false). Rows: every d, width, table and kind that kvq_block_spec
// has. Tiles: everything that kvq_tile_spec has, with d up to 65534.
//
// A spec for the device is the host's, with pointers into device memory. The caller owns that memory:
//
//     size_t bytes = kvq_cuda_rows_bytes(&spec);
//     status = kvq_cuda_rows_pack(&spec, host, device, &on_device, err); // host, device: `bytes` bytes each
//     cudaMemcpyAsync(device, host, bytes, ...);
//     status = kvq_cuda_encode_rows(&on_device, x, m, rows, first_bad, stream, err);
//
// Every function returns KVQ_OK, KVQ_ERR_USAGE (a size or pointer that the contract does not allow: nothing was
// launched) or KVQ_ERR_INTERNAL (the device refused the launch). Nothing waits for the device: what goes wrong while a
// kernel runs is reported by whoever synchronises with the stream.
//
// first_bad [1], device memory: lowered to the lowest index of a token with a number that f16 cannot hold. The caller
// sets it to INT_MAX before. Bytes of such tokens (of such tiles) are unusable. NaN and infinities in x must have been
// refused before, as on the CPU.
#ifndef KVQ_CUDA_CODEC_H
#define KVQ_CUDA_CODEC_H

#include "kvq_block_hd.h"
#include "kvq_core.h"
#include "kvq_tile_hd.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------- rows

// Size of the tables of a spec on the device, a multiple of 16.
size_t kvq_cuda_rows_bytes(const kvq_block_spec *spec);

// Checks a spec of the host, copies its tables to `host` and makes of it the spec of the device, whose tables will be
// at `device` (a multiple of 16) when the caller has copied host there.
kvq_status kvq_cuda_rows_pack(const kvq_block_spec *spec, void *host, const void *device, kvq_block_spec *out,
                              kvq_error *err);

// Appends m tokens (one, or a whole prompt): x [m, d] f32 to rows [m, kvq_block_row_bytes], a multiple of 4 in memory.
// 0 <= m < 2^31.
kvq_status kvq_cuda_encode_rows(const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows, int *first_bad,
                                void *stream, kvq_error *err);

// rows [m, kvq_block_row_bytes] that encoding wrote, to x [m, d]. A row of other origin in which two slots name one
// channel gives that channel any of the residuals.
kvq_status kvq_cuda_decode_rows(const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x, void *stream,
                                kvq_error *err);

// ---------------------------------------------------------------- tiles

// A kvq_tile_spec on the device, with what the host has derived from it.
typedef struct kvq_cuda_tiles {
    kvq_tile_spec spec;       // pointers into device memory
    const float  *rotation_t; // values: [head_dim, head_dim] transpose of the rotation, in device memory
    int           code_bytes, tile_bytes;
} kvq_cuda_tiles;

// As for rows. The columns of the spec are those of kvq_tile_layout.
size_t     kvq_cuda_tiles_bytes(const kvq_tile_spec *spec);
kvq_status kvq_cuda_tiles_pack(const kvq_tile_spec *spec, void *host, const void *device, kvq_cuda_tiles *out,
                               kvq_error *err);

// Device memory that encoding needs beside the tiles, 0 for values. It holds nothing between calls.
size_t kvq_cuda_tiles_scratch_bytes(const kvq_cuda_tiles *spec, int64_t n_tokens);

// x [n_tokens, d] are the tokens of positions 0 .. n_tokens - 1 counted from the start of a tile; those before `first`
// (sinks), 0 .. n_tokens, are not read and not coded. tiles [ceil(n_tokens / KVQ_TILE_TOKENS), kvq_tile_bytes], every
// byte of which is written; the last one may be short. tiles begin at a multiple of 4, scratch at one of 8. n_tokens at
// most 2^31 - 129.
kvq_status kvq_cuda_encode_tiles(const kvq_cuda_tiles *spec, const float *x, int64_t first, int64_t n_tokens,
                                 uint8_t *tiles, void *scratch, int *first_bad, void *stream, kvq_error *err);

// Decodes tokens [first, n_tokens) into x [n_tokens, d]; the rows before `first` are left alone. Tiles must pass
// kvq_tile_outliers_fit, as those that encoding wrote do.
kvq_status kvq_cuda_decode_tiles(const kvq_cuda_tiles *spec, const uint8_t *tiles, int64_t first, int64_t n_tokens,
                                 float *x, void *stream, kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
