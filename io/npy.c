// SPDX-License-Identifier: Apache-2.0
//
// Token ids from NumPy's .npy files, for whoever tokenizes elsewhere. The file is a magic, a version, the length of a
// header, the header, which is a Python dictionary in text, and the array (NEP 1, "A simple file format for NumPy
// arrays"). Only the few dictionaries that describe a list of ids are read.
#include <string.h>

#include "kvq_io.h"

static const char MAGIC[] = "\x93NUMPY";
static const char ADVICE[] = "write the ids with numpy.save(path, numpy.asarray(ids, dtype='int32'))";

// ---------------------------------------------------------------- element types

static int64_t load(const uint8_t *at, int bytes, bool is_signed) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++) x |= (uint64_t)at[i] << (8 * i);
    if (is_signed && bytes < 8 && (x >> (8 * bytes - 1)) != 0) x |= ~(uint64_t)0 << (8 * bytes);
    return (int64_t)x;
}

typedef struct element {
    const char *descr; // as the header has it, in quotes
    int         bytes;
    bool        is_signed;
} element;

static const element ELEMENTS[] = {
    {"'<i2'", 2, true}, {"'<i4'", 4, true}, {"'<i8'", 8, true}, {"'<u2'", 2, false}, {"'<u4'", 4, false},
};

// ---------------------------------------------------------------- header

typedef struct header { // the text still to be read
    const char    *at, *end;
    const char    *path, *begin;
    const element *element;
    uint64_t       count;
    int            fields; // bits of FIELDS that were seen
    kvq_error     *err;
} header;

static kvq_status bad_header(const header *h, const char *what) {
    const char *last = h->end; // padding and the line's end say nothing
    while (last > h->begin && (last[-1] == ' ' || last[-1] == '\n')) last--;
    int shown = last - h->begin < 200 ? (int)(last - h->begin) : 200;
    return kvq_fail(h->err, KVQ_ERR_INPUT, ADVICE, "%s: %s, at byte %td of the header %.*s", h->path, what,
                    h->at - h->begin, shown, h->begin);
}

static bool accept(header *h, const char *text) {
    size_t n = strlen(text);
    while (h->at < h->end && *h->at == ' ') h->at++;
    if ((size_t)(h->end - h->at) < n || memcmp(h->at, text, n) != 0) return false;
    h->at += n;
    return true;
}

static kvq_status read_descr(header *h) {
    for (size_t i = 0; i < sizeof ELEMENTS / sizeof *ELEMENTS; i++) {
        if (!accept(h, ELEMENTS[i].descr)) continue;
        h->element = &ELEMENTS[i];
        return KVQ_OK;
    }
    return bad_header(h, "the element type is not little-endian int16, int32, int64, uint16 or uint32");
}

static kvq_status read_order(header *h) {
    return accept(h, "False") ? KVQ_OK : bad_header(h, "the array is not in C order");
}

static kvq_status read_shape(header *h) {
    static const char MESSAGE[] = "the shape is not that of a one-dimensional array";
    if (!accept(h, "(")) return bad_header(h, MESSAGE);
    const char *digits = h->at;
    while (h->at < h->end && *h->at >= '0' && *h->at <= '9') {
        if (h->count > (UINT64_MAX / 8 - 9) / 10) return bad_header(h, "the shape is larger than any file");
        h->count = h->count * 10 + (uint64_t)(*h->at++ - '0');
    }
    if (h->at == digits || !accept(h, ",") || !accept(h, ")")) return bad_header(h, MESSAGE);
    return KVQ_OK;
}

static const struct field {
    const char *key;
    kvq_status (*read)(header *h);
} FIELDS[] = {{"'descr'", read_descr}, {"'fortran_order'", read_order}, {"'shape'", read_shape}};
enum { N_FIELDS = sizeof FIELDS / sizeof *FIELDS };

static kvq_status read_field(header *h) {
    for (int i = 0; i < N_FIELDS; i++) {
        if (!accept(h, FIELDS[i].key)) continue;
        if ((h->fields & 1 << i) != 0) return bad_header(h, "a field appears twice");
        h->fields |= 1 << i;
        return accept(h, ":") ? FIELDS[i].read(h) : bad_header(h, "a colon is missing");
    }
    return bad_header(h, "a field that is not descr, fortran_order or shape");
}

static kvq_status read_header(header *h) {
    if (!accept(h, "{")) return bad_header(h, "not a dictionary");
    while (!accept(h, "}")) {
        kvq_status status = read_field(h);
        if (status != KVQ_OK) return status;
        if (accept(h, ",")) continue;
        if (!accept(h, "}")) return bad_header(h, "a comma or brace is missing");
        break;
    }
    if (h->fields != (1 << N_FIELDS) - 1) return bad_header(h, "descr, fortran_order or shape is missing");
    return accept(h, "\n") && h->at == h->end ? KVQ_OK : bad_header(h, "something follows the dictionary");
}

// ---------------------------------------------------------------- the file

// Finds header and data. Version 1 has a two-byte header length, version 2 a four-byte one.
static kvq_status read_preamble(const char *path, const kvq_mapped_file *file, header *h, size_t *data_at,
                                kvq_error *err) {
    if (file->bytes < 10 || memcmp(file->data, MAGIC, sizeof MAGIC - 1) != 0)
        return kvq_fail(err, KVQ_ERR_INPUT, ADVICE, "%s: not a .npy file: it does not begin with its magic", path);
    int major = file->data[6], minor = file->data[7], length_bytes = major == 1 ? 2 : 4;
    if (major < 1 || major > 2 || minor != 0)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, ADVICE, "%s: .npy version %d.%d, must be 1.0 or 2.0", path, major,
                        minor);
    size_t begin = 8 + (size_t)length_bytes;
    if (file->bytes < begin)
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: ends within the header's length, at byte %zu", path,
                        file->bytes);
    size_t length = (size_t)load(file->data + 8, length_bytes, false);
    if (length > file->bytes - begin)
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: a header of %zu bytes in a file of %zu", path, length,
                        file->bytes);
    *h = (header){.path = path, .begin = (const char *)file->data + begin, .err = err};
    h->at = h->begin;
    h->end = h->begin + length;
    *data_at = begin + length;
    return KVQ_OK;
}

kvq_status kvq_ids_read_npy(const kvq_context *ctx, const char *path, int64_t vocab_size, kvq_ids *ids,
                            kvq_error *err) {
    kvq_mapped_file file = {0};
    header          h = {0};
    size_t          data_at = 0;
    int32_t        *all = NULL;
    kvq_status      status = KVQ_OK;
    KVQ_TRY(kvq_map_file(path, &file, err));
    KVQ_TRY(read_preamble(path, &file, &h, &data_at, err));
    KVQ_TRY(read_header(&h));
    uint64_t bytes = h.count * (uint64_t)h.element->bytes; // read_shape left room for the factor
    if (bytes != file.bytes - data_at) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                         "%s: %llu ids need %llu bytes, the file has %zu behind its header", path,
                         (unsigned long long)h.count, (unsigned long long)bytes, file.bytes - data_at));
    }
    int64_t n = (int64_t)h.count;
    KVQ_TRY(KVQ_NEW(ctx, ids->count + n, "token ids", &all, err));
    if (ids->count > 0) memcpy(all, ids->data, (size_t)ids->count * sizeof *all);
    for (int64_t i = 0; i < n; i++) {
        int64_t id = load(file.data + data_at + i * h.element->bytes, h.element->bytes, h.element->is_signed);
        if (id < 0 || id >= vocab_size) {
            KVQ_TRY(kvq_fail(err, KVQ_ERR_MISMATCH, "use ids of this model's own tokenizer",
                             "%s: id %lld at index %lld is not below the vocabulary size %lld", path, (long long)id,
                             (long long)i, (long long)vocab_size));
        }
        all[ids->count + i] = (int32_t)id;
    }
    kvq_free(ctx, ids->data);
    *ids = (kvq_ids){all, ids->count + n, ids->count + n};
    all = NULL;
done:
    kvq_free(ctx, all);
    kvq_unmap_file(&file);
    return status;
}
