// SPDX-License-Identifier: Apache-2.0
//
// The tokenizer's public face: opens either file form, and takes a text through the steps that tokenizer_impl.h lists.
#include <string.h>
#include <sys/stat.h>

#include "gguf.h"
#include "tokenizer_impl.h"

#define MAX_TEXT_BYTES INT32_MAX // positions within a piece are 32-bit

// ---------------------------------------------------------------- opening

static bool is_directory(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static kvq_status read_directory(const kvq_context *ctx, const char *path, kvq_tokenizer *t, kvq_error *err) {
    static const char NAME[] = "/tokenizer.json";
    char             *file = NULL;
    size_t            n = strlen(path);
    struct stat       info;
    kvq_status        status = KVQ_OK;
    while (n > 1 && path[n - 1] == '/') n--;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)(n + sizeof NAME), "path", &file, err));
    memcpy(file, path, n);
    memcpy(file + n, NAME, sizeof NAME);
    if (stat(file, &info) != 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_NOT_FOUND,
                         "save the tokenizer in its `tokenizers` form (a file tokenizer.model alone is not enough)",
                         "%s: no tokenizer.json in this folder", path));
    }
    status = tok_read_json(ctx, file, t, err);
done:
    kvq_free(ctx, file);
    return status;
}

kvq_status kvq_tokenizer_open(const kvq_context *ctx, const char *path, kvq_tokenizer **out, kvq_error *err) {
    kvq_tokenizer *t = NULL;
    kvq_status     status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "tokenizer", &t, err));
    t->info.bos_id = t->info.eos_id = -1;
    KVQ_TRY(is_directory(path)   ? read_directory(ctx, path, t, err)
            : gguf_is_gguf(path) ? tok_read_gguf(ctx, path, t, err)
                                 : tok_read_json(ctx, path, t, err));
    t->info.kind = t->bpe.byte_level ? "bpe-bytelevel" : "bpe-sentencepiece";
    t->info.vocab_size = t->bpe.n_ids;
    *out = t;
    t = NULL;
done:
    kvq_tokenizer_close(ctx, &t);
    return status;
}

void kvq_tokenizer_close(const kvq_context *ctx, kvq_tokenizer **tokenizer) {
    kvq_tokenizer *t = *tokenizer;
    if (t == NULL) return;
    tok_added_free(ctx, &t->raw);
    tok_added_free(ctx, &t->normalized);
    tok_rules_free(ctx, &t->normalizer);
    tok_rules_free(ctx, &t->splitter);
    tok_bpe_free(ctx, &t->bpe);
    kvq_free(ctx, t);
    *tokenizer = NULL;
}

kvq_tokenizer_info kvq_tokenizer_describe(const kvq_tokenizer *tokenizer) { return tokenizer->info; }

void kvq_ids_free(const kvq_context *ctx, kvq_ids *ids) {
    kvq_free(ctx, ids->data);
    *ids = (kvq_ids){0};
}

// ---------------------------------------------------------------- encoding

typedef kvq_status (*encode_part)(tok_session *s, const char *text, size_t n, bool at_start);

// Cuts the added tokens out of a text and hands what lies between them to `part`.
static kvq_status encode_around(tok_session *s, const tok_added *added, encode_part part, const char *text, size_t n,
                                bool at_start) {
    kvq_status status = KVQ_OK;
    for (size_t from = 0; from < n;) {
        tok_span               where = {n, n};
        const tok_added_token *token = tok_added_next(added, text, n, from, s->parse_special, &where);
        if (where.start > from) KVQ_TRY(part(s, text + from, where.start - from, at_start && from == 0));
        if (token != NULL) KVQ_TRY(tok_ids_push(s->ctx, s->ids, token->id, s->err));
        from = where.end;
    }
done:
    return status;
}

static kvq_status encode_plain(tok_session *s, const char *text, size_t n, bool at_start) {
    kvq_status status = tok_apply_rules(s, &s->tokenizer->splitter, text, n, at_start, &s->pieces);
    for (int64_t i = 0; i < s->pieces.n && status == KVQ_OK; i++) {
        tok_span span = s->pieces.spans[i];
        status = tok_bpe_encode(s, s->pieces.text.data + span.start, span.end - span.start);
    }
    return status;
}

static kvq_status encode_unnormalized(tok_session *s, const char *text, size_t n, bool at_start) {
    kvq_status status = tok_apply_rules(s, &s->tokenizer->normalizer, text, n, at_start, &s->normal);
    if (status != KVQ_OK) return status;
    return encode_around(s, &s->tokenizer->normalized, encode_plain, s->normal.text.data, s->normal.text.n,
                         s->normal.at_start);
}

static void end_session(tok_session *s) {
    tok_matcher_destroy(&s->matcher);
    tok_pieces_free(s->ctx, &s->normal);
    tok_pieces_free(s->ctx, &s->pieces);
    tok_pieces_free(s->ctx, &s->scratch);
    tok_table_free(s->ctx, &s->cache);
    kvq_free(s->ctx, s->cached);
    tok_bpe_work_free(s);
}

kvq_status kvq_tokenizer_encode(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const char *text, size_t n,
                                bool parse_special, kvq_ids *ids, kvq_error *err) {
    tok_session s = {.ctx = ctx, .tokenizer = tokenizer, .parse_special = parse_special, .ids = ids, .err = err};
    int64_t     count = ids->count;
    tok_text    repaired = {0};
    kvq_status  status = KVQ_OK;
    if (n > MAX_TEXT_BYTES / 4) { // 4: room for what a normalizer may add
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "split the text into smaller files",
                        "a text of %zu bytes; the largest is %d", n, MAX_TEXT_BYTES / 4);
    }
    KVQ_TRY(tok_matcher_create(&s.matcher, err));
    if (!utf8_is_valid(text, n)) {
        KVQ_TRY(utf8_repair(ctx, text, n, !tokenizer->bpe.byte_level, &repaired, err));
        text = repaired.data;
        n = repaired.n;
    }
    KVQ_TRY(encode_around(&s, &tokenizer->raw, encode_unnormalized, text, n, true));
done:
    if (status != KVQ_OK) ids->count = count;
    kvq_free(ctx, repaired.data);
    end_session(&s);
    return status;
}
