// SPDX-License-Identifier: Apache-2.0
//
// The case `tokenizer`: a text through a model's tokenizer, as one string and on one thread.
#include <stdio.h>
#include <string.h>

#include "bench.h"

#define MAX_BYTES (INT64_C(64) << 20) // of the text; the rest is not used

typedef struct tokenizer_run {
    kvq_tokenizer *tokenizer;
    char          *text;
    int64_t        bytes, capacity;
    kvq_ids        ids;
} tokenizer_run;

static kvq_status append(const kvq_context *ctx, tokenizer_run *t, const char *text, int64_t n, kvq_error *err) {
    if (t->bytes + n > t->capacity) {
        char      *larger;
        int64_t    capacity = 2 * (t->bytes + n);
        kvq_status status = KVQ_NEW(ctx, capacity, "text", &larger, err);
        if (status != KVQ_OK) return status;
        if (t->bytes > 0) memcpy(larger, t->text, (size_t)t->bytes);
        kvq_free(ctx, t->text);
        t->text = larger;
        t->capacity = capacity;
    }
    memcpy(t->text + t->bytes, text, (size_t)n);
    t->bytes += n;
    return KVQ_OK;
}

static kvq_status read_text(const kvq_context *ctx, const char *path, tokenizer_run *t, kvq_error *err) {
    kvq_text     *text = NULL;
    kvq_text_part part;
    bool          found = true;
    kvq_status    status = KVQ_OK;
    KVQ_TRY(kvq_text_open(ctx, path, KVQ_TEXT_AUTO, NULL, &text, err));
    while (t->bytes < MAX_BYTES) {
        KVQ_TRY(kvq_text_next(text, &part, &found, err));
        if (!found) break;
        KVQ_TRY(append(ctx, t, part.data, (int64_t)part.n, err));
    }
    if (t->bytes == 0)
        status = kvq_fail(err, KVQ_ERR_INPUT, "give a text of some kilobytes", "%s: the text is empty", path);

done:
    kvq_text_close(ctx, &text);
    return status;
}

static kvq_status encode(const kvq_context *ctx, tokenizer_run *t, double *seconds, kvq_error *err) {
    t->ids.count = 0; // the memory stays
    double     start = kvq_now_s();
    kvq_status status = kvq_tokenizer_encode(ctx, t->tokenizer, t->text, (size_t)t->bytes, true, &t->ids, err);
    *seconds = kvq_now_s() - start;
    return status;
}

static kvq_status measure(bench_report *r, tokenizer_run *t, kvq_error *err) {
    const bench_options *o = r->options;
    bench_series         open = {.n = (int)o->repeats}, seconds = open;
    double               unmeasured;
    kvq_status           status = KVQ_OK;
    for (int i = 0; i < open.n; i++) {
        kvq_tokenizer_close(&r->cli->ctx, &t->tokenizer);
        double start = kvq_now_s();
        KVQ_TRY(kvq_tokenizer_open(&r->cli->ctx, o->model, &t->tokenizer, err));
        open.values[i] = kvq_now_s() - start;
    }
    KVQ_TRY(encode(&r->cli->ctx, t, &unmeasured, err));
    for (int i = 0; i < seconds.n; i++) KVQ_TRY(encode(&r->cli->ctx, t, &seconds.values[i], err));
    bench_series bytes = bench_inverse(&seconds, (double)t->bytes * 1e-6);
    bench_series tokens = bench_inverse(&seconds, (double)t->ids.count * 1e-6);
    const char  *kind = kvq_tokenizer_describe(t->tokenizer).kind;
    KVQ_TRY(bench_add(r, &open, "s", err, "open %s", kind));
    KVQ_TRY(bench_add(r, &bytes, "MB/s", err, "encode, %lld bytes", (long long)t->bytes));
    KVQ_TRY(bench_add(r, &tokens, "Mtokens/s", err, "encode, %lld tokens", (long long)t->ids.count));

done:
    return status;
}

kvq_status bench_tokenizer(bench_report *r, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    tokenizer_run t = {.tokenizer = NULL};
    KVQ_TRY(read_text(&r->cli->ctx, r->options->text, &t, err));
    KVQ_TRY(measure(r, &t, err));

done:
    kvq_tokenizer_close(&r->cli->ctx, &t.tokenizer);
    kvq_ids_free(&r->cli->ctx, &t.ids);
    kvq_free(&r->cli->ctx, t.text);
    return status;
}
