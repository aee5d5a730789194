// SPDX-License-Identifier: Apache-2.0
//
// Reads the tokenizer in the metadata of a GGUF. The file has tokens, types, and either scores (model `llama`, a
// SentencePiece vocabulary) or merges (model `gpt2`, byte-level). The steps around the merging are not in the file: a
// name stands for them, and what each name means is the table PRE_TOKENIZERS.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "gguf.h"
#include "tokenizer_impl.h"

enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 }; // tokenizer.ggml.token_type

typedef struct reader {
    const kvq_context *ctx;
    const char        *path;
    const gguf_file   *file;
    kvq_tokenizer     *t;
    int64_t            n;
    gguf_string       *tokens; // [n]
    int32_t           *types;  // [n]
    float             *scores; // [n], NULL for byte-level
    kvq_error         *err;
} reader;

// ---------------------------------------------------------------- names for steps

// The splits of the models' own tokenizer files, in order, all isolated.
static const char LLAMA3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char QWEN2[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char TEKKEN[] =
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|"
    "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

typedef struct pre_tokenizer {
    const char *name, *pattern;
    bool        single_digits; // each digit is cut out first
    bool        nfc;           // the text is brought into Unicode form C first
    bool        ignore_merges, adds_bos;
} pre_tokenizer;

static const pre_tokenizer PRE_TOKENIZERS[] = {
    {"gpt-2", TOK_PATTERN_GPT2, .single_digits = false},
    {"smollm", TOK_PATTERN_GPT2, .single_digits = true},
    {"starcoder", TOK_PATTERN_GPT2, .single_digits = true},
    {"llama-bpe", LLAMA3, .ignore_merges = true, .adds_bos = true},
    {"llama3", LLAMA3, .ignore_merges = true, .adds_bos = true},
    {"llama-v3", LLAMA3, .ignore_merges = true, .adds_bos = true},
    {"qwen2", QWEN2, .nfc = true},
    {"tekken", TEKKEN, .ignore_merges = true, .adds_bos = true},
};

static kvq_status add_steps(reader *r, const pre_tokenizer *pre) {
    kvq_status status = KVQ_OK;
    tok_rule  *rule = NULL;
    if (pre->nfc) {
        KVQ_TRY(tok_rules_add(r->ctx, &r->t->normalizer, TOK_RULE_FORM, NULL, &rule, r->err));
        rule->form = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    }
    if (pre->single_digits) {
        KVQ_TRY(tok_rules_add(r->ctx, &r->t->splitter, TOK_RULE_SPLIT, NULL, &rule, r->err));
        rule->pattern.numbers = true;
        rule->behavior = TOK_ISOLATED;
    }
    KVQ_TRY(tok_rules_add(r->ctx, &r->t->splitter, TOK_RULE_SPLIT, NULL, &rule, r->err));
    rule->behavior = TOK_ISOLATED;
    KVQ_TRY(tok_pattern_regex(r->ctx, r->path, pre->pattern, &rule->pattern, r->err));
done:
    return status;
}

// ---------------------------------------------------------------- metadata

static kvq_status find_array(reader *r, const char *key, gguf_type type, gguf_array *out) {
    if (!gguf_get_array(r->file, key, type, out)) {
        return kvq_fail(r->err, KVQ_ERR_INPUT, NULL,
                        "%s: metadata key '%s' is missing or not an array of the right type", r->path, key);
    }
    if (out->count == (uint64_t)r->n) return KVQ_OK;
    return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: metadata key '%s' has %llu elements for %lld tokens", r->path,
                    key, (unsigned long long)out->count, (long long)r->n);
}

static kvq_status read_tokens(reader *r) {
    static const char KEY[] = "tokenizer.ggml.tokens";
    kvq_status        status = KVQ_OK;
    gguf_array        array = {0};
    if (!gguf_get_array(r->file, KEY, GGUF_STRING, &array) || array.count == 0 || array.count >= INT32_MAX / 2) {
        return kvq_fail(r->err, KVQ_ERR_INPUT,
                        "use a GGUF that carries its tokenizer, or tokenize elsewhere and pass ids",
                        "%s: no vocabulary: metadata key '%s' is missing or empty", r->path, KEY);
    }
    r->n = (int64_t)array.count;
    r->t->bpe.n_ids = (int32_t)r->n;
    KVQ_TRY(KVQ_NEW(r->ctx, r->n, "vocabulary", &r->tokens, r->err));
    const uint8_t *cursor = array.data;
    for (int64_t i = 0; i < r->n; i++) {
        r->tokens[i] = gguf_next_string(&array, &cursor);
        if (!utf8_is_valid(r->tokens[i].text, r->tokens[i].n) ||
            r->tokens[i].n > 4096) { // 4096: no real token comes near
            KVQ_TRY(kvq_fail(r->err, KVQ_ERR_INPUT, NULL,
                             "%s: token %lld (%zu bytes) is not UTF-8 or longer than 4096 bytes", r->path, (long long)i,
                             r->tokens[i].n));
        }
    }
done:
    return status;
}

static kvq_status read_types(reader *r) {
    static const char KEY[] = "tokenizer.ggml.token_type";
    kvq_status        status = KVQ_OK;
    gguf_array        array = {0};
    KVQ_TRY(KVQ_NEW(r->ctx, r->n, "token types", &r->types, r->err));
    if (!gguf_has(r->file, KEY)) {
        for (int64_t i = 0; i < r->n; i++) r->types[i] = NORMAL;
        return KVQ_OK;
    }
    KVQ_TRY(find_array(r, KEY, GGUF_I32, &array));
    memcpy(r->types, array.data, (size_t)r->n * sizeof *r->types);
    for (int64_t i = 0; i < r->n; i++) {
        if (r->types[i] >= NORMAL && r->types[i] <= BYTE) continue;
        KVQ_TRY(kvq_fail(r->err, KVQ_ERR_UNSUPPORTED, NULL, "%s: token %lld has the unknown type %d", r->path,
                         (long long)i, r->types[i]));
    }
done:
    return status;
}

static kvq_status read_id(reader *r, const char *key, int64_t *out) {
    if (!gguf_has(r->file, key)) return KVQ_OK;
    if (gguf_get_int(r->file, key, out) && *out >= 0 && *out < r->n) return KVQ_OK;
    return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: metadata key '%s' is not the id of one of the %lld tokens",
                    r->path, key, (long long)r->n);
}

// Everything ids depend on. Each value is preceded by its name and length, so that no two files share a byte stream.
static kvq_status hash_metadata(reader *r) {
    static const char *const ARRAYS[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores",
                                         "tokenizer.ggml.merges"};
    static const char *const STRINGS[] = {"tokenizer.ggml.model", "tokenizer.ggml.pre"};
    static const char *const FLAGS[] = {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces"};
    kvq_sha256              *hash = NULL;
    kvq_status               status = kvq_sha256_create(&hash, r->err);
    if (status != KVQ_OK) return status;
    for (size_t i = 0; i < sizeof ARRAYS / sizeof *ARRAYS; i++) {
        gguf_array array = {0};
        bool       there = gguf_get_array(r->file, ARRAYS[i], GGUF_STRING, &array) ||
                     gguf_get_array(r->file, ARRAYS[i], GGUF_I32, &array) ||
                     gguf_get_array(r->file, ARRAYS[i], GGUF_F32, &array);
        uint64_t n = there ? (uint64_t)(array.end - array.data) : 0;
        kvq_sha256_push(hash, ARRAYS[i], strlen(ARRAYS[i]));
        kvq_sha256_push(hash, &n, sizeof n);
        if (n > 0) kvq_sha256_push(hash, array.data, n);
    }
    for (size_t i = 0; i < sizeof STRINGS / sizeof *STRINGS; i++) {
        gguf_string text = {"", 0};
        (void)gguf_get_string(r->file, STRINGS[i], &text);
        uint64_t n = text.n;
        kvq_sha256_push(hash, STRINGS[i], strlen(STRINGS[i]));
        kvq_sha256_push(hash, &n, sizeof n);
        kvq_sha256_push(hash, text.text, text.n);
    }
    for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++) {
        bool    flag = false;
        uint8_t value =
            gguf_get_bool(r->file, FLAGS[i], &flag) ? (flag ? 1 : 0) : 2; // 2: absent, which has its own meaning
        kvq_sha256_push(hash, FLAGS[i], strlen(FLAGS[i]));
        kvq_sha256_push(hash, &value, 1);
    }
    kvq_sha256_finalize(&hash, r->t->info.sha256);
    return KVQ_OK;
}

// ---------------------------------------------------------------- tokens

static kvq_status put_token(reader *r, int64_t i) {
    gguf_string token = r->tokens[i];
    tok_bpe    *bpe = &r->t->bpe;
    if (tok_table_find(&bpe->vocabulary, token.text, token.n) >= 0) {
        return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: token %lld '%.*s' is in the vocabulary twice", r->path,
                        (long long)i, (int)(token.n < 80 ? token.n : 80), token.text);
    }
    return tok_table_put(r->ctx, &bpe->vocabulary, token.text, token.n, (int32_t)i, r->err);
}

// Control and unknown tokens are special; user-defined ones are looked for in any case. A padded vocabulary has empty
// or unused tokens, which no text can produce.
static kvq_status add_tokens(reader *r) {
    bool spm = !r->t->bpe.byte_level;
    for (int64_t i = 0; i < r->n; i++) {
        gguf_string token = r->tokens[i];
        int32_t     type = r->types[i];
        bool        cut_out = type == CONTROL || type == UNKNOWN || type == USER_DEFINED;
        bool        mergeable = type == NORMAL || type == USER_DEFINED || (!spm && cut_out);
        kvq_status  status = KVQ_OK;
        if (token.n == 0) continue;
        if (mergeable) status = put_token(r, i);
        if (status == KVQ_OK && cut_out) {
            tok_added_token like = {.id = (int32_t)i, .special = type != USER_DEFINED};
            status = tok_added_put(r->ctx, &r->t->raw, token.text, token.n, like, r->err);
        }
        if (status != KVQ_OK) return status;
    }
    tok_added_finish(&r->t->raw);
    tok_added_finish(&r->t->normalized);
    return KVQ_OK;
}

// ---------------------------------------------------------------- model gpt2

static kvq_status read_merges(reader *r) {
    static const char KEY[] = "tokenizer.ggml.merges";
    kvq_status        status = KVQ_OK;
    gguf_array        array = {0};
    if (!gguf_get_array(r->file, KEY, GGUF_STRING, &array) || array.count == 0) {
        return kvq_fail(r->err, KVQ_ERR_INPUT, NULL,
                        "%s: a tokenizer without merges: metadata key '%s' is missing or empty", r->path, KEY);
    }
    const uint8_t *cursor = array.data;
    for (uint64_t i = 0; i < array.count; i++) {
        gguf_string merge = gguf_next_string(&array, &cursor);
        const char *blank = merge.n > 1 ? memchr(merge.text + 1, ' ', merge.n - 1) : NULL;
        size_t      n_left = blank != NULL ? (size_t)(blank - merge.text) : 0;
        if (blank == NULL || n_left + 1 == merge.n)
            KVQ_TRY(kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: merge %llu is not a pair of tokens", r->path,
                             (unsigned long long)i));
        KVQ_TRY(tok_bpe_add_merge(r->ctx, &r->t->bpe, r->path, (int64_t)i, merge.text, n_left, blank + 1,
                                  merge.n - n_left - 1, r->err));
    }
done:
    return status;
}

static kvq_status read_gpt2(reader *r) {
    kvq_status           status = KVQ_OK;
    tok_bpe             *bpe = &r->t->bpe;
    gguf_string          name = {"", 0};
    const pre_tokenizer *pre = NULL;
    bool                 prefix = false;
    (void)gguf_get_string(r->file, "tokenizer.ggml.pre", &name);
    for (size_t i = 0; i < sizeof PRE_TOKENIZERS / sizeof *PRE_TOKENIZERS; i++) {
        if (strlen(PRE_TOKENIZERS[i].name) == name.n && memcmp(PRE_TOKENIZERS[i].name, name.text, name.n) == 0)
            pre = &PRE_TOKENIZERS[i];
    }
    if (pre == NULL) {
        KVQ_TRY(kvq_fail(r->err, KVQ_ERR_UNSUPPORTED,
                         "use the model's Hugging Face directory, whose tokenizer.json spells the steps out",
                         "%s: pre-tokenizer '%.*s' (metadata key 'tokenizer.ggml.pre') is not known", r->path,
                         (int)(name.n < 80 ? name.n : 80), name.text));
    }
    if (gguf_get_bool(r->file, "tokenizer.ggml.add_space_prefix", &prefix) && prefix) {
        KVQ_TRY(kvq_fail(r->err, KVQ_ERR_UNSUPPORTED, NULL,
                         "%s: 'tokenizer.ggml.add_space_prefix' is true for a byte-level vocabulary", r->path));
    }
    r->t->info.adds_bos = pre->adds_bos;
    bpe->byte_level = true;
    bpe->unk_id = -1;
    bpe->ignore_merges = pre->ignore_merges;
    KVQ_TRY(add_steps(r, pre));
    KVQ_TRY(add_tokens(r));
    KVQ_TRY(tok_bpe_find_bytes(bpe, r->path, r->err));
    KVQ_TRY(read_merges(r));
done:
    return status;
}

// ---------------------------------------------------------------- model llama

static kvq_status read_scores(reader *r) {
    kvq_status status = KVQ_OK;
    gguf_array array = {0};
    KVQ_TRY(find_array(r, "tokenizer.ggml.scores", GGUF_F32, &array));
    KVQ_TRY(KVQ_NEW(r->ctx, r->n, "token scores", &r->scores, r->err));
    memcpy(r->scores, array.data, (size_t)r->n * sizeof *r->scores);
    for (int64_t i = 0; i < r->n; i++) {
        if (!isfinite(r->scores[i]))
            KVQ_TRY(kvq_fail(r->err, KVQ_ERR_NUMERICAL, NULL, "%s: the score of token %lld is not finite", r->path,
                             (long long)i));
    }
done:
    return status;
}

// The pieces "<0x00>" .. "<0xFF>", known by their type.
static kvq_status find_byte_pieces(reader *r) {
    int32_t *bytes = r->t->bpe.bytes;
    for (int b = 0; b < 256; b++) bytes[b] = -1;
    for (int64_t i = 0; i < r->n; i++) {
        const char *text = r->tokens[i].text;
        if (r->types[i] != BYTE || r->tokens[i].n != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') continue;
        char          digits[3] = {text[3], text[4], 0}, *end = digits;
        unsigned long b = strtoul(digits, &end, 16);
        if (end == digits + 2 && b < 256) bytes[b] = (int32_t)i;
    }
    for (int b = 0; b < 256; b++) {
        if (bytes[b] < 0)
            return kvq_fail(r->err, KVQ_ERR_UNSUPPORTED, NULL, "%s: the vocabulary has no byte piece <0x%02X>", r->path,
                            (unsigned)b & 0xffu);
    }
    return KVQ_OK;
}

// Characters that occur in pieces without being pieces get ids beyond the vocabulary, as stepping stones for merges.
static kvq_status add_stepping_stones(reader *r) {
    tok_bpe   *bpe = &r->t->bpe;
    kvq_status status = KVQ_OK;
    int32_t    next = bpe->n_ids;
    uint32_t   c;
    for (int64_t i = 0; i < r->n; i++) {
        gguf_string token = r->tokens[i];
        if (r->types[i] != NORMAL && r->types[i] != USER_DEFINED) continue;
        for (size_t at = 0, length; at < token.n; at += length) {
            length = utf8_decode(token.text + at, token.n - at, &c);
            if (tok_table_find(&bpe->vocabulary, token.text + at, length) >= 0) continue;
            KVQ_TRY(tok_table_put(r->ctx, &bpe->vocabulary, token.text + at, length, next++, r->err));
        }
    }
done:
    return status;
}

typedef struct ranked {
    float   score;
    int32_t id;
} ranked;

static int by_score(const void *pa, const void *pb) {
    const ranked *a = pa, *b = pb;
    return (a->score < b->score) - (a->score > b->score);
}

// SentencePiece merges the neighbours whose concatenation is the piece of highest score: a merge rule for each way to
// cut a piece into two that can arise, ranked by the score. Equal scores share a rank, so that the leftmost goes first.
static kvq_status derive_merges(reader *r) {
    tok_bpe   *bpe = &r->t->bpe;
    kvq_status status = KVQ_OK;
    ranked    *order = NULL;
    uint32_t   rank = 0;
    KVQ_TRY(KVQ_NEW(r->ctx, r->n, "order of scores", &order, r->err));
    for (int64_t i = 0; i < r->n; i++) order[i] = (ranked){r->scores[i], (int32_t)i};
    qsort(order, (size_t)r->n, sizeof *order, by_score);
    for (int64_t k = 0; k < r->n; k++) {
        if (k > 0 && order[k].score < order[k - 1].score) rank++;
        int32_t     id = order[k].id;
        gguf_string token = r->tokens[id];
        if (r->types[id] != NORMAL && r->types[id] != USER_DEFINED) continue;
        for (size_t cut = 1; cut < token.n; cut++) {
            if (((uint8_t)token.text[cut] & 0xc0) == 0x80) continue; // inside a character
            int32_t left = tok_table_find(&bpe->vocabulary, token.text, cut);
            int32_t right = tok_table_find(&bpe->vocabulary, token.text + cut, token.n - cut);
            if (left < 0 || right < 0) continue;
            KVQ_TRY(tok_pairs_put(r->ctx, &bpe->merges, (uint32_t)left, (uint32_t)right, rank, id, r->err));
            KVQ_TRY(tok_bpe_add_touching(r->ctx, bpe, token.text, cut, token.text + cut, token.n - cut, r->err));
        }
    }
done:
    kvq_free(r->ctx, order);
    return status;
}

static kvq_status read_llama(reader *r) {
    kvq_status  status = KVQ_OK;
    bool        prefix = true, squeeze = false;
    tok_rule   *rule = NULL;
    tok_rules  *normalizer = &r->t->normalizer;
    const char *refused = "tokenizer.ggml.precompiled_charsmap";
    (void)gguf_get_bool(r->file, "tokenizer.ggml.add_space_prefix", &prefix);
    (void)gguf_get_bool(r->file, "tokenizer.ggml.remove_extra_whitespaces", &squeeze);
    if (squeeze) refused = "tokenizer.ggml.remove_extra_whitespaces";
    if (squeeze || gguf_has(r->file, refused))
        KVQ_TRY(kvq_fail(r->err, KVQ_ERR_UNSUPPORTED, NULL,
                         "%s: the normalisation of metadata key '%s' is not supported", r->path, refused));
    if (prefix) KVQ_TRY(tok_rules_add(r->ctx, normalizer, TOK_RULE_PREPEND, UTF8_BLANK_MARK, &rule, r->err));
    KVQ_TRY(tok_rules_add(r->ctx, normalizer, TOK_RULE_REPLACE, UTF8_BLANK_MARK, &rule, r->err));
    KVQ_TRY(tok_pattern_literal(r->ctx, " ", &rule->pattern, r->err));
    r->t->info.adds_bos = true;
    r->t->bpe.unk_id = -1;
    KVQ_TRY(read_scores(r));
    KVQ_TRY(add_tokens(r));
    KVQ_TRY(find_byte_pieces(r));
    KVQ_TRY(add_stepping_stones(r));
    KVQ_TRY(derive_merges(r));
done:
    return status;
}

// ---------------------------------------------------------------- the file

static kvq_status read_model(reader *r) {
    gguf_string model = {"", 0};
    (void)gguf_get_string(r->file, "tokenizer.ggml.model", &model);
    if (model.n == 4 && memcmp(model.text, "gpt2", 4) == 0) return read_gpt2(r);
    if (model.n == 5 && memcmp(model.text, "llama", 5) == 0) return read_llama(r);
    return kvq_fail(r->err, KVQ_ERR_UNSUPPORTED, NULL,
                    "%s: tokenizer model '%.*s' (metadata key 'tokenizer.ggml.model') is not supported", r->path,
                    (int)(model.n < 80 ? model.n : 80), model.text);
}

kvq_status tok_read_gguf(const kvq_context *ctx, const char *path, kvq_tokenizer *t, kvq_error *err) {
    gguf_file *file = NULL;
    kvq_status status = gguf_open(ctx, path, &file, err);
    reader     r = {.ctx = ctx, .path = path, .file = file, .t = t, .err = err};
    if (status != KVQ_OK) return status;
    KVQ_TRY(read_tokens(&r));
    KVQ_TRY(read_types(&r));
    KVQ_TRY(hash_metadata(&r));
    KVQ_TRY(read_model(&r));
    KVQ_TRY(read_id(&r, "tokenizer.ggml.bos_token_id", &t->info.bos_id));
    KVQ_TRY(read_id(&r, "tokenizer.ggml.eos_token_id", &t->info.eos_id));
    (void)gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &t->info.adds_bos);
done:
    kvq_free(ctx, r.tokens);
    kvq_free(ctx, r.types);
    kvq_free(ctx, r.scores);
    gguf_close(ctx, &file);
    return status;
}
