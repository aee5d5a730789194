// SPDX-License-Identifier: Apache-2.0
//
// Private to the device codec of tiles: a spec in words of the device, and what its two files have in common.
#ifndef KVQ_TILES_IMPL_CUH
#define KVQ_TILES_IMPL_CUH

#include "codec_impl.cuh"

// A kvq_cuda_tiles in words of the device.
struct TileSpec {
    int              d, head_dim, dim, n_heads, code_bytes, count_bytes, tile_bytes, n_side, n_slots, scale_exponent;
    kvq_scale_format scale_format;
    KVQ_GLOBAL(const uint8_t) widths;
    KVQ_GLOBAL(const int32_t) planes; // [columns, KVQ_N_PLANES] offsets of a column's planes, -1 = none
    KVQ_GLOBAL(const float) levels;
    KVQ_GLOBAL(const int32_t) table;
    KVQ_GLOBAL(const float) z;
    KVQ_GLOBAL(const float) r;
    KVQ_GLOBAL(const float) middle;
    KVQ_GLOBAL(const float) half;
    KVQ_GLOBAL(const float) rotation;
    KVQ_GLOBAL(const float) rotation_t; // its transpose, so that neighbouring threads read neighbouring elements
};

// The tokens that are coded: those before `first` are sinks.
struct Tokens {
    int64_t first, end;
};

KVQ_DEVICE bool is_coded(const Tokens &tokens, int64_t token) { return token >= tokens.first && token < tokens.end; }

// What the header's functions on scales need of a spec.
KVQ_DEVICE kvq_tile_spec scale_form(const TileSpec &s) {
    kvq_tile_spec form = {};
    form.head_dim = s.head_dim;
    form.scale_format = s.scale_format;
    form.scale_exponent = s.scale_exponent;
    return form;
}

KVQ_DEVICE int code_of_key(const TileSpec &s, float x, int c) {
    float r = s.r[c];
    int   n = 1 << (int)s.widths[c];
    if (!(r != 0)) return 0; // a channel without a range is not coded
    return kvq_block_nearest((x - s.z[c]) / r, kvq_raw(s.levels + (int)s.table[c], n), n);
}

KVQ_DEVICE float decoded_key(const TileSpec &s, int code, int c) {
    return s.z[c] + s.r[c] * s.levels[(int)s.table[c] + code];
}

static inline TileSpec tile_spec(const kvq_cuda_tiles *tiles) {
    const kvq_tile_spec *spec = &tiles->spec;
    TileSpec             s = {};
    s.d = spec->d;
    s.head_dim = spec->head_dim;
    s.dim = spec->dim;
    s.n_heads = spec->d / spec->head_dim;
    s.code_bytes = tiles->code_bytes;
    s.count_bytes = kvq_tile_count_bytes(spec);
    s.tile_bytes = tiles->tile_bytes;
    s.n_side = spec->n_side;
    s.n_slots = spec->n_slots;
    s.scale_exponent = spec->scale_exponent;
    s.scale_format = spec->scale_format;
    s.widths = spec->widths;
    s.planes = reinterpret_cast<const int32_t *>(spec->columns);
    s.levels = spec->levels;
    s.table = spec->table;
    s.z = spec->z;
    s.r = spec->r;
    s.middle = spec->middle;
    s.half = spec->half;
    s.rotation = spec->rotation;
    s.rotation_t = tiles->rotation_t;
    return s;
}

// Counts and entries of all tiles of keys, of which n_slots is not 0 (tile_outliers.cu).
kvq_status kvq_cuda_encode_outliers(const kvq_tile_spec *spec, const TileSpec &s, const Tokens &tokens, const float *x,
                                    uint8_t *tiles, void *memory, int *first_bad, kvq_stream stream, kvq_error *err);

#endif
