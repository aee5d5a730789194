// SPDX-License-Identifier: Apache-2.0
//
// Line ends of a text in the forms that models meet them in, whatever the file has. A text arrives in parts, so blanks
// at the end of a part wait until it is known what follows them.
#include <string.h>

#include "windows_impl.h"

const char *const kvq_newlines_names[] = {"kept", "bare", "single", NULL};

void newline_filter_reset(newline_filter *f) {
    f->n_blanks = 0;
    f->after_feed = false;
}

void newline_filter_free(const kvq_context *ctx, newline_filter *f) {
    kvq_free(ctx, f->data);
    *f = (newline_filter){.data = NULL};
}

static void put_blanks(newline_filter *f) {
    if (f->n_blanks > 0) memset(f->data + f->n, ' ', f->n_blanks); // there may be no data yet
    f->n += f->n_blanks;
    f->n_blanks = 0;
}

kvq_status newline_filter_apply(const kvq_context *ctx, newline_filter *f, kvq_newlines how, kvq_text_part *part,
                                kvq_error *err) {
    size_t needed = part->n + f->n_blanks;
    if (how == KVQ_NEWLINES_KEPT) return KVQ_OK;
    if (needed > f->capacity) {
        kvq_free(ctx, f->data);
        f->data = NULL;
        f->capacity = 0;
        kvq_status status = KVQ_NEW(ctx, (int64_t)needed, "text", &f->data, err);
        if (status != KVQ_OK) return status;
        f->capacity = needed;
    }
    f->n = 0;
    for (size_t i = 0; i < part->n; i++) {
        char c = part->data[i];
        if (c == ' ') {
            f->n_blanks++;
        } else if (c == '\n') {
            f->n_blanks = 0;
            if (how != KVQ_NEWLINES_SINGLE || !f->after_feed) f->data[f->n++] = '\n';
            f->after_feed = true;
        } else {
            put_blanks(f);
            f->data[f->n++] = c;
            f->after_feed = false;
        }
    }
    if (part->ends_document) {
        put_blanks(f);
        f->after_feed = false;
    }
    part->data = f->data;
    part->n = f->n;
    return KVQ_OK;
}
