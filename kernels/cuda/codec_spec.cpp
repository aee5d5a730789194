// SPDX-License-Identifier: Apache-2.0
//
// Host part of the device codecs: checks specs and lays out their tables for one copy to the device. It calls nothing
// of CUDA, so that tests without a device run it too.
#include "kvq_cuda_codec.h"

// Tables one behind the other, each at a multiple of 16 bytes. Without `host` sizes are only added up.
struct Packing {
    unsigned char       *host;
    const unsigned char *device;
    size_t               bytes;
};

// Where the table will be on the device; NULL when there is none.
template <typename T> static const T *pack(Packing *p, const T *table, size_t n) {
    if (table == NULL || n == 0) return NULL;
    size_t at = p->bytes;
    p->bytes += (n * sizeof(T) + 15) / 16 * 16;
    if (p->host == NULL) return NULL;
    memset(p->host + at, 0, p->bytes - at);
    memcpy(p->host + at, table, n * sizeof(T));
    return reinterpret_cast<const T *>(p->device + at);
}

static kvq_status check_memory(const void *device, kvq_error *err) {
    if (reinterpret_cast<uintptr_t>(device) % 16 == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "tables in device memory do not begin at a multiple of 16");
}

// ---------------------------------------------------------------- rows

static kvq_block_spec pack_rows(const kvq_block_spec *s, Packing *p) {
    size_t         n_levels = (size_t)(s->n_groups > 1 ? s->n_groups : 1) << s->bits, d = (size_t)s->d;
    kvq_block_spec out = *s;
    out.levels = pack(p, s->levels, n_levels);
    out.decoded = pack(p, s->decoded, n_levels);
    out.z = pack(p, s->z, d);
    out.r = pack(p, s->r, d);
    out.grid_z = pack(p, s->grid_z, d);
    return out;
}

size_t kvq_cuda_rows_bytes(const kvq_block_spec *spec) {
    Packing p = {NULL, NULL, 0};
    (void)pack_rows(spec, &p);
    return p.bytes;
}

static kvq_status check_rows(const kvq_block_spec *s, kvq_error *err) {
    if (s->d < 1 || s->d >= (int)KVQ_NO_CHANNEL)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "rows of %d channels, not 1 .. 65534", s->d);
    if (s->bits < 1 || s->bits > KVQ_MAX_BITS)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "codes of %d bits, not 1 .. %d", s->bits, KVQ_MAX_BITS);
    if (s->n_side < 0 || s->n_side > KVQ_BLOCK_MAX_SIDE || 2 * s->n_side >= s->d)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%d outliers per side of %d channels", s->n_side, s->d);
    if (s->n_groups < 0 || (s->n_groups > 1 && s->d % s->n_groups != 0))
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%d tables do not share %d channels evenly", s->n_groups, s->d);
    if (s->levels == NULL || (s->r == NULL) != (s->z == NULL))
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a spec without levels, or with one of z and r");
    if (s->grid_z != NULL && s->r == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "offsets of codes without ranges per channel");
    return KVQ_OK;
}

kvq_status kvq_cuda_rows_pack(const kvq_block_spec *spec, void *host, const void *device, kvq_block_spec *out,
                              kvq_error *err) {
    kvq_status status = KVQ_OK;
    Packing    p = {static_cast<unsigned char *>(host), static_cast<const unsigned char *>(device), 0};
    if ((status = check_rows(spec, err)) != KVQ_OK || (status = check_memory(device, err)) != KVQ_OK) return status;
    *out = pack_rows(spec, &p);
    return KVQ_OK;
}

// ---------------------------------------------------------------- tiles

static size_t n_level_vectors(const kvq_tile_spec *s) {
    size_t n = 0;
    for (int c = 0; c < s->d / s->dim; c++) {
        size_t end = (size_t)s->table[c] + ((size_t)1 << s->widths[c]);
        n = end > n ? end : n;
    }
    return n;
}

static kvq_cuda_tiles pack_tiles(const kvq_tile_spec *s, Packing *p) {
    size_t         d = (size_t)s->d, n_columns = d / (size_t)s->dim, n = (size_t)s->head_dim;
    kvq_cuda_tiles out = {*s, NULL, kvq_tile_code_bytes(s), kvq_tile_bytes(s)};
    out.spec.widths = pack(p, s->widths, n_columns);
    out.spec.columns = pack(p, s->columns, n_columns);
    out.spec.levels = pack(p, s->levels, n_level_vectors(s) * (size_t)s->dim);
    out.spec.table = pack(p, s->table, n_columns);
    out.spec.z = pack(p, s->z, d);
    out.spec.r = pack(p, s->r, d);
    out.spec.middle = pack(p, s->middle, d);
    out.spec.half = pack(p, s->half, d);
    out.spec.rotation = pack(p, s->rotation, n * n);
    size_t at = p->bytes;
    out.rotation_t = pack(p, s->rotation, n * n);
    for (size_t i = 0; i < n * n && out.rotation_t != NULL; i++)
        memcpy(p->host + at + sizeof(float) * (i % n * n + i / n), s->rotation + i, sizeof(float));
    return out;
}

size_t kvq_cuda_tiles_bytes(const kvq_tile_spec *spec) {
    Packing p = {NULL, NULL, 0};
    (void)pack_tiles(spec, &p);
    return p.bytes;
}

static kvq_status check_sizes(const kvq_tile_spec *s, kvq_error *err) {
    bool is_key = s->r != NULL;
    if (s->head_dim < 2 || s->head_dim > KVQ_TILE_MAX_HEAD_DIM || s->d < 1 || s->d >= (int)KVQ_NO_CHANNEL ||
        s->d % s->head_dim != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "tiles of %d channels in heads of %d", s->d, s->head_dim);
    if (s->dim != 1 && (s->dim != 2 || is_key || s->head_dim % 2 != 0))
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "columns of %d channels of %s in heads of %d", s->dim,
                        is_key ? "keys" : "values", s->head_dim);
    if (s->n_side < 0 || s->n_side > KVQ_BLOCK_MAX_SIDE || s->n_slots < 0 || s->n_slots > KVQ_TILE_MAX_SLOTS)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%d outliers per side, %d per tile", s->n_side, s->n_slots);
    if (s->scale_format >= KVQ_N_SCALE_FORMATS)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "an unknown format of scales, %d", (int)s->scale_format);
    return KVQ_OK;
}

static kvq_status check_tables(const kvq_tile_spec *s, kvq_error *err) {
    bool is_key = s->r != NULL, has_keys = is_key && s->z != NULL && (s->n_slots == 0 || (s->middle && s->half));
    if (s->widths == NULL || s->columns == NULL || s->levels == NULL || s->table == NULL ||
        !(is_key ? has_keys : s->z == NULL && s->rotation != NULL))
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "a spec of %s without all of its tables", is_key ? "keys" : "values");
    return KVQ_OK;
}

// Every plane that the width asks for is a place of the tile, and there is no other.
static kvq_status check_columns(const kvq_tile_spec *s, kvq_error *err) {
    for (int c = 0; c < s->d / s->dim; c++) {
        if (s->widths[c] > KVQ_TILE_MAX_WIDTH || s->table[c] < 0)
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "column %d: width %d, table %d", c, s->widths[c], s->table[c]);
    }
    int end = kvq_tile_code_bytes(s);
    for (int i = 0; i < s->d / s->dim * KVQ_N_PLANES; i++) {
        int  c = i / KVQ_N_PLANES, bits = 8 >> i % KVQ_N_PLANES, at = s->columns[c].at[i % KVQ_N_PLANES];
        bool has_plane = (s->widths[c] & bits) != 0;
        if (has_plane ? at < 0 || at % 16 != 0 || at > end - 16 * bits : at >= 0)
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "column %d of width %d: a plane of %d bits at byte %d of %d", c,
                            s->widths[c], bits, at, end);
    }
    return KVQ_OK;
}

kvq_status kvq_cuda_tiles_pack(const kvq_tile_spec *spec, void *host, const void *device, kvq_cuda_tiles *out,
                               kvq_error *err) {
    kvq_status status = KVQ_OK;
    Packing    p = {static_cast<unsigned char *>(host), static_cast<const unsigned char *>(device), 0};
    KVQ_TRY(check_sizes(spec, err));
    KVQ_TRY(check_tables(spec, err));
    KVQ_TRY(check_columns(spec, err));
    KVQ_TRY(check_memory(device, err));
    *out = pack_tiles(spec, &p);
done:
    return status;
}
