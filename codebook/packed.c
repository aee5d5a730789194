// SPDX-License-Identifier: Apache-2.0
//
// Sums as bytes, to be saved or sent and merged elsewhere. Most bins and cells are empty, so only the others are kept.
#include <string.h>

#include "codebook_impl.h"

KVQ_STATIC_ASSERT(sizeof(kvq_bin) == 2 * sizeof(kvq_fixed), "a bin is an array of two sums");
KVQ_STATIC_ASSERT(sizeof(kvq_cell) == 3 * sizeof(kvq_fixed), "a cell is an array of three sums");

#define MAX_WIDTH 3

// Not asked of the weight alone: one that is truncated to 0 may lie so far away that its product with the position is
// not.
static bool is_occupied(const kvq_fixed *record, int width) {
    uint64_t any = 0;
    for (int i = 0; i < width; i++) any |= record[i].lo | (uint64_t)record[i].hi;
    return any != 0;
}

static int64_t record_bytes(codebook_records r) { return (int64_t)sizeof(kvq_fixed) * r.width; }

static int64_t n_occupied(codebook_records r) {
    int64_t n = 0;
    for (int64_t i = 0; i < r.n; i++) n += is_occupied(r.at + i * r.width, r.width);
    return n;
}

int64_t codebook_packed_bytes(codebook_records r) {
    return (int64_t)sizeof(int64_t) + n_occupied(r) * (record_bytes(r) + (int64_t)sizeof(int64_t));
}

uint8_t *codebook_put(uint8_t *out, const void *data, int64_t bytes) {
    memcpy(out, data, (size_t)bytes);
    return out + bytes;
}

uint8_t *codebook_pack(codebook_records r, uint8_t *out) {
    int64_t n = n_occupied(r);
    out = codebook_put(out, &n, (int64_t)sizeof n);
    for (int64_t i = 0; i < r.n; i++) {
        const kvq_fixed *record = r.at + i * r.width;
        if (!is_occupied(record, r.width)) continue;
        out = codebook_put(out, record, record_bytes(r));
        out = codebook_put(out, &i, (int64_t)sizeof i);
    }
    return out;
}

static kvq_status does_not_fit(const codebook_reader *from, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "a saved %s of %lld bytes does not fit together", from->what,
                    (long long)from->bytes);
}

kvq_status codebook_read(codebook_reader *from, void *out, int64_t bytes, kvq_error *err) {
    if (from->end - from->at < bytes) return does_not_fit(from, err);
    memcpy(out, from->at, (size_t)bytes);
    from->at += bytes;
    return KVQ_OK;
}

kvq_status codebook_read_end(const codebook_reader *from, kvq_error *err) {
    return from->at == from->end ? KVQ_OK : does_not_fit(from, err);
}

kvq_status codebook_merge_count(int64_t *into, codebook_reader *from, kvq_error *err) {
    int64_t    n = 0;
    kvq_status status = codebook_read(from, &n, (int64_t)sizeof n, err);
    if (status != KVQ_OK) return status;
    if (n < 0 || n > INT64_MAX - *into) return does_not_fit(from, err);
    *into += n;
    return KVQ_OK;
}

static void merge_record(kvq_fixed *into, const kvq_fixed *from, int width) {
    kvq_fixed_merge_positive(&into[0], from[0]);
    for (int i = 1; i < width; i++) kvq_fixed_merge(&into[i], from[i]);
}

kvq_status codebook_merge_packed(codebook_records into, codebook_reader *from, kvq_error *err) {
    int64_t    n = 0, index = 0, before = -1;
    kvq_fixed  record[MAX_WIDTH];
    kvq_status status = KVQ_OK;
    KVQ_TRY(codebook_read(from, &n, (int64_t)sizeof n, err));
    if (n < 0 || n > into.n) KVQ_TRY(does_not_fit(from, err));
    for (int64_t i = 0; i < n; i++, before = index) {
        KVQ_TRY(codebook_read(from, record, record_bytes(into), err));
        KVQ_TRY(codebook_read(from, &index, (int64_t)sizeof index, err));
        if (index <= before || index >= into.n || !is_occupied(record, into.width)) {
            KVQ_TRY(
                kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "a saved %s speaks of bin %lld", from->what, (long long)index));
        }
        merge_record(into.at + index * into.width, record, into.width);
    }
done:
    return status;
}

bool codebook_left_range(codebook_records r) {
    bool left = false;
    for (int64_t i = 0; i < r.n; i++) left = left || r.at[i * r.width].hi < 0;
    return left;
}
