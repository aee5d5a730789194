// SPDX-License-Identifier: Apache-2.0
//
// The tokenizer's public face: opens either file form. Encoding: encoder.c.
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "gguf.h"
#include "tokenizer_impl.h"

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
    tok_rules_finish(&t->normalizer);
    tok_rules_finish(&t->splitter);
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

void kvq_tokenizer_spelling(const kvq_tokenizer *tokenizer, int64_t id, char *out, size_t size) {
    size_t      n = 0;
    const char *key = tok_table_key(&tokenizer->bpe.vocabulary, (int32_t)id, &n);
    (void)snprintf(out, size, "%.*s", key != NULL ? (int)n : 0, key != NULL ? key : "");
}

void kvq_ids_free(const kvq_context *ctx, kvq_ids *ids) {
    kvq_free(ctx, ids->data);
    *ids = (kvq_ids){0};
}
