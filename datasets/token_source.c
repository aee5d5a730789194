// SPDX-License-Identifier: Apache-2.0
//
// Where tokens come from: a list in memory, or a text file that is read, decompressed and tokenized piece by piece.
#include <stdio.h>
#include <string.h>

#include "kvq_datasets.h"
#include "windows_impl.h"

// ---------------------------------------------------------------- ids in memory

static kvq_status rewind_ids(void *user, kvq_error *err) {
    (void)user, (void)err;
    return KVQ_OK;
}

static kvq_status next_ids(void *user, kvq_token_batch *batch, kvq_error *err) {
    (void)err;
    const kvq_ids *ids = user;
    *batch = (kvq_token_batch){ids->data, ids->count, true, true};
    return KVQ_OK;
}

kvq_token_source source_of_ids(kvq_ids *ids) {
    return (kvq_token_source){.user = ids, .rewind = rewind_ids, .next = next_ids};
}

// ---------------------------------------------------------------- a text file

struct kvq_text_source {
    const kvq_context   *ctx;
    const char          *name;         // of the file, in path, or label
    char                *path, *label; // label: with the form of the line ends
    kvq_newlines         newlines;
    newline_filter       filter;
    kvq_text            *text;
    kvq_encoder         *encoder;
    kvq_ids              ids;
    int64_t              vocab_size, n_given, n_readings;
    const kvq_tokenizer *tokenizer;
};

// Windows of a changed text are not windows of the file.
static kvq_status make_label(kvq_text_source *s, kvq_error *err) {
    int64_t    n = (int64_t)strlen(s->name) + 32;
    kvq_status status = KVQ_NEW(s->ctx, n, "name of a text", &s->label, err);
    if (status != KVQ_OK) return status;
    (void)snprintf(s->label, (size_t)n, "%s (%s newlines)", s->name, kvq_newlines_names[s->newlines]);
    s->name = s->label;
    return KVQ_OK;
}

kvq_status kvq_text_source_open(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const char *path,
                                const kvq_text_source_options *options, kvq_text_source **out, kvq_error *err) {
    kvq_text_source *s = NULL;
    kvq_status       status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "text source", &s, err));
    s->ctx = ctx;
    s->tokenizer = tokenizer;
    s->vocab_size = options->vocab_size;
    s->path = kvq_strdup(ctx, path);
    if (s->path == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: its name", path));
    s->name = strcmp(path, "-") == 0 ? "standard input" : kvq_file_name(s->path);
    s->newlines = options->newlines;
    if (s->newlines != KVQ_NEWLINES_KEPT) KVQ_TRY(make_label(s, err));
    KVQ_TRY(kvq_text_open(ctx, path, options->format, options->field, &s->text, err));
    *out = s;
    s = NULL;
done:
    kvq_text_source_close(ctx, &s);
    return status;
}

void kvq_text_source_close(const kvq_context *ctx, kvq_text_source **source) {
    kvq_text_source *s = *source;
    if (s == NULL) return;
    kvq_encoder_destroy(ctx, &s->encoder);
    kvq_text_close(ctx, &s->text);
    kvq_ids_free(ctx, &s->ids);
    newline_filter_free(ctx, &s->filter);
    kvq_free(ctx, s->label);
    kvq_free(ctx, s->path);
    kvq_free(ctx, s);
    *source = NULL;
}

kvq_status kvq_text_source_sha256(kvq_text_source *source, char sha256[KVQ_SHA256_HEX], kvq_error *err) {
    return kvq_text_sha256(source->text, sha256, err);
}

static kvq_status rewind_text(void *user, kvq_error *err) {
    kvq_text_source *s = user;
    kvq_status       status = KVQ_OK;
    KVQ_TRY(kvq_text_rewind(s->text, err));
    kvq_encoder_destroy(s->ctx, &s->encoder);
    KVQ_TRY(kvq_encoder_create(s->ctx, s->tokenizer, true, &s->encoder, err));
    newline_filter_reset(&s->filter);
    s->n_given = 0;
    s->n_readings++;
done:
    return status;
}

// A tokenizer may know more tokens than the model has rows for.
static kvq_status check_vocabulary(const kvq_text_source *s, kvq_error *err) {
    for (int64_t i = 0; i < s->ids.count; i++) {
        if (s->ids.data[i] >= 0 && s->ids.data[i] < s->vocab_size) continue;
        return kvq_fail(err, KVQ_ERR_MISMATCH, "use the tokenizer that was made for this model",
                        "%s: the tokenizer makes token %lld id %d, but the model's vocabulary has %lld", s->name,
                        (long long)(s->n_given + i), (int)s->ids.data[i], (long long)s->vocab_size);
    }
    return KVQ_OK;
}

static kvq_status next_of_text(void *user, kvq_token_batch *batch, kvq_error *err) {
    kvq_text_source *s = user;
    kvq_text_part    part = {0};
    kvq_status       status = KVQ_OK;
    bool             found = false;
    int64_t          done = 0, total = 0;
    s->ids.count = 0;
    if (kvq_stop_requested(s->ctx)) {
        return kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL, "%s was being read; it will be read again", s->name);
    }
    KVQ_TRY(kvq_text_next(s->text, &part, &found, err));
    if (found) {
        KVQ_TRY(newline_filter_apply(s->ctx, &s->filter, s->newlines, &part, err));
        status = kvq_encoder_push(s->encoder, part.data, part.n, part.ends_document, &s->ids, err);
        if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", s->name);
        KVQ_TRY(status);
        KVQ_TRY(check_vocabulary(s, err));
    }
    s->n_given += s->ids.count;
    kvq_text_position(s->text, &done, &total);
    kvq_report_progress(s->ctx, s->n_readings > 1 ? "pick" : "read", -1, done, total);
    *batch = (kvq_token_batch){s->ids.data, s->ids.count, part.ends_document, !found};
done:
    return status;
}

kvq_token_source kvq_text_source_view(kvq_text_source *source) {
    return (kvq_token_source){.name = source->name, .user = source, .rewind = rewind_text, .next = next_of_text};
}

// ---------------------------------------------------------------- documents

kvq_status reader_begin(source_reader *reader, const kvq_token_source *source, const kvq_window_rule *rule,
                        kvq_error *err) {
    *reader = (source_reader){.source = source, .rule = rule, .fresh = true};
    return source->rewind(source->user, err);
}

kvq_status reader_next(source_reader *r, kvq_token_batch *batch, kvq_error *err) {
    if (r->has_held) {
        *batch = r->held;
        r->has_held = false;
        return KVQ_OK;
    }
    kvq_token_batch b = {0};
    kvq_status      status = r->source->next(r->source->user, &b, err);
    if (status != KVQ_OK) return status;
    bool joint = r->fresh && r->any && b.n > 0 && r->rule->n_joint > 0 && !r->rule->keep_documents;
    r->n_documents += b.ends_document;
    r->any = r->any || b.n > 0;
    if (b.n > 0) r->fresh = false;
    if (b.ends_document) r->fresh = true;
    if (!r->rule->keep_documents) b.ends_document = b.end;
    if (joint) {
        r->held = b;
        r->has_held = true;
        b = (kvq_token_batch){.ids = r->rule->joint, .n = r->rule->n_joint};
    }
    *batch = b;
    return KVQ_OK;
}
