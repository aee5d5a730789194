// SPDX-License-Identifier: Apache-2.0
// Rows and tiles in pages: memory follows what is stored, and what is stored stays where it is.
#include <string.h>

#include "packed_impl.h"

kvq_status packed_pages_create(const kvq_context *ctx, int64_t page_bytes, int64_t n_most, packed_pages *out,
                               kvq_error *err) {
    *out = (packed_pages){.page_bytes = page_bytes, .n_most = n_most};
    return KVQ_NEW(ctx, n_most, "table of pages", &out->table, err);
}

void packed_pages_destroy(const kvq_context *ctx, packed_pages *pages) {
    for (int64_t i = 0; i < pages->n_pages; i++) {
        if (pages->table[i].owner) kvq_free(ctx, pages->table[i].bytes);
    }
    kvq_free(ctx, pages->table);
    *pages = (packed_pages){0};
}

kvq_status packed_pages_reserve(const kvq_context *ctx, packed_pages *pages, int64_t n_pages, kvq_error *err) {
    uint8_t *bytes = NULL;
    int64_t  n_new = n_pages - pages->n_pages;
    if (n_new <= 0) return KVQ_OK;
    kvq_status status = kvq_alloc(ctx, n_new, (size_t)pages->page_bytes, "pages of the packed cache", &bytes, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < n_new; i++)
        pages->table[pages->n_pages + i] = (packed_page){bytes + i * pages->page_bytes, i == 0};
    pages->n_pages = n_pages;
    return KVQ_OK;
}

uint8_t *packed_pages_at(const packed_pages *pages, int64_t at, int64_t bytes, int64_t *run) {
    int64_t page = at / pages->page_bytes, within = at % pages->page_bytes, end = page + 1;
    while (end < pages->n_pages && !pages->table[end].owner && (end - page) * pages->page_bytes - within < bytes) end++;
    *run = packed_smaller((end - page) * pages->page_bytes - within, bytes);
    return pages->table[page].bytes + within;
}

void packed_pages_get(const packed_pages *pages, int64_t bytes, uint8_t *to) {
    for (int64_t at = 0, run; at < bytes; at += run) {
        const uint8_t *from = packed_pages_at(pages, at, bytes - at, &run);
        memcpy(to + at, from, (size_t)run);
    }
}

void packed_pages_put(const packed_pages *pages, int64_t at, int64_t bytes, const uint8_t *from) {
    for (int64_t done = 0, run; done < bytes; done += run) {
        uint8_t *to = packed_pages_at(pages, at + done, bytes - done, &run);
        memcpy(to, from + done, (size_t)run);
    }
}
