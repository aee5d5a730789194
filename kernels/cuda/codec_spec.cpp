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
