// SPDX-License-Identifier: Apache-2.0
//
// Reads the tokenizer.json of the Hugging Face `tokenizers` library. The file is a program: a list of steps, each with
// its options. Steps are looked up by name in tables, and what is not in a table is refused by that name, because a
// step left out would give other ids without any sign of it.
#include <string.h>
#include <unistd.h>
#include <utf8proc.h>

#include "json_read.h"
#include "tokenizer_impl.h"

typedef struct reader {
    const kvq_context *ctx;
    const char        *path; // of tokenizer.json
    kvq_tokenizer     *t;
    bool               byte_level;
    bool               template_bos; // a template puts a token in front
    int64_t            template_id;  // which
    kvq_error         *err;
} reader;

static kvq_status unsupported(reader *r, const char *field, const char *what) {
    return kvq_fail(r->err, KVQ_ERR_UNSUPPORTED, NULL, "%s: %s '%s' is not supported", r->path, field, what);
}

// Each kind of step: the name in the file, and what reads its options.
typedef struct step {
    const char *type;
    kvq_status (*read)(reader *r, const cJSON *options, int detail);
    int detail;
} step;

static kvq_status read_step(reader *r, const char *field, const step *steps, size_t n_steps, const cJSON *options) {
    const char *type = NULL;
    if (options == NULL || cJSON_IsNull(options)) return KVQ_OK;
    kvq_status status = json_get_string(options, "type", r->path, false, &type, r->err);
    if (status != KVQ_OK) return status;
    for (size_t i = 0; i < n_steps; i++) {
        if (strcmp(steps[i].type, type) == 0) return steps[i].read(r, options, steps[i].detail);
    }
    return unsupported(r, field, type);
}

static const cJSON *member(const cJSON *object, const char *key) {
    return cJSON_GetObjectItemCaseSensitive(object, key);
}

static kvq_status read_flag(reader *r, const cJSON *object, const char *key, bool fallback, bool *out) {
    *out = fallback;
    return json_get_bool(object, key, r->path, true, out, r->err);
}

// ---------------------------------------------------------------- patterns

// {"String": "..."} or {"Regex": "..."}
static kvq_status read_pattern(reader *r, const cJSON *options, tok_pattern *out) {
    const cJSON *pattern = member(options, "pattern");
    const char  *text = NULL;
    if (pattern != NULL && member(pattern, "Regex") != NULL) {
        kvq_status status = json_get_string(pattern, "Regex", r->path, false, &text, r->err);
        return status == KVQ_OK ? tok_pattern_regex(r->ctx, r->path, text, out, r->err) : status;
    }
    kvq_status status = json_get_string(pattern, "String", r->path, false, &text, r->err);
    return status == KVQ_OK ? tok_pattern_literal(r->ctx, text, out, r->err) : status;
}

// ---------------------------------------------------------------- normalizers

static kvq_status read_normalizer(reader *r, const cJSON *options);

static kvq_status read_normalizers(reader *r, const cJSON *options, int detail) {
    (void)detail;
    const cJSON *item;
    cJSON_ArrayForEach(item, member(options, "normalizers")) {
        kvq_status status = read_normalizer(r, item);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

static kvq_status read_form(reader *r, const cJSON *options, int form) {
    (void)options;
    tok_rule  *rule = NULL;
    kvq_status status = tok_rules_add(r->ctx, &r->t->normalizer, TOK_RULE_FORM, NULL, &rule, r->err);
    if (status == KVQ_OK) rule->form = UTF8PROC_STABLE | form;
    return status;
}

static kvq_status read_prepend(reader *r, const cJSON *options, int detail) {
    (void)detail;
    tok_rule   *rule = NULL;
    const char *text = NULL;
    kvq_status  status = json_get_string(options, "prepend", r->path, false, &text, r->err);
    return status == KVQ_OK ? tok_rules_add(r->ctx, &r->t->normalizer, TOK_RULE_PREPEND, text, &rule, r->err) : status;
}

static kvq_status read_replace(reader *r, const cJSON *options, int detail) {
    (void)detail;
    kvq_status  status = KVQ_OK;
    tok_rule   *rule = NULL;
    const char *content = NULL;
    KVQ_TRY(json_get_string(options, "content", r->path, false, &content, r->err));
    KVQ_TRY(tok_rules_add(r->ctx, &r->t->normalizer, TOK_RULE_REPLACE, content, &rule, r->err));
    KVQ_TRY(read_pattern(r, options, &rule->pattern));
done:
    return status;
}

static kvq_status read_normalizer(reader *r, const cJSON *options) {
    static const step STEPS[] = {
        {"Sequence", read_normalizers, 0},
        {"NFC", read_form, UTF8PROC_COMPOSE},
        {"NFD", read_form, UTF8PROC_DECOMPOSE},
        {"NFKC", read_form, UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
        {"NFKD", read_form, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT},
        {"Prepend", read_prepend, 0},
        {"Replace", read_replace, 0},
    };
    return read_step(r, "normalizer", STEPS, sizeof STEPS / sizeof *STEPS, options);
}

// ---------------------------------------------------------------- pre-tokenizers

static kvq_status read_pre_tokenizer(reader *r, const cJSON *options);

static kvq_status read_pre_tokenizers(reader *r, const cJSON *options, int detail) {
    (void)detail;
    const cJSON *item;
    cJSON_ArrayForEach(item, member(options, "pretokenizers")) {
        kvq_status status = read_pre_tokenizer(r, item);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

static kvq_status add_rule(reader *r, tok_rule_kind kind, const char *text, tok_rule **out) {
    return tok_rules_add(r->ctx, &r->t->splitter, kind, text, out, r->err);
}

static kvq_status read_byte_level(reader *r, const cJSON *options, int detail) {
    (void)detail;
    kvq_status status = KVQ_OK;
    bool       prefix, use_regex;
    tok_rule  *rule = NULL;
    KVQ_TRY(read_flag(r, options, "add_prefix_space", true, &prefix));
    KVQ_TRY(read_flag(r, options, "use_regex", true, &use_regex));
    if (prefix) {
        KVQ_TRY(add_rule(r, TOK_RULE_PREPEND, " ", &rule));
        rule->prepend = TOK_PREPEND_MISSING;
    }
    if (use_regex) {
        KVQ_TRY(add_rule(r, TOK_RULE_SPLIT, NULL, &rule));
        rule->behavior = TOK_ISOLATED;
        KVQ_TRY(tok_pattern_regex(r->ctx, r->path, TOK_PATTERN_GPT2, &rule->pattern, r->err));
    }
    r->byte_level = true;
done:
    return status;
}

static kvq_status read_digits(reader *r, const cJSON *options, int detail) {
    (void)detail;
    bool       individual;
    tok_rule  *rule = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(read_flag(r, options, "individual_digits", false, &individual));
    KVQ_TRY(add_rule(r, TOK_RULE_SPLIT, NULL, &rule));
    rule->pattern.numbers = true;
    rule->behavior = individual ? TOK_ISOLATED : TOK_CONTIGUOUS;
done:
    return status;
}

static kvq_status read_split(reader *r, const cJSON *options, int detail) {
    (void)detail;
    static const char *const NAMES[] = {
        [TOK_REMOVED] = "Removed",
        [TOK_ISOLATED] = "Isolated",
        [TOK_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
        [TOK_MERGED_WITH_NEXT] = "MergedWithNext",
        [TOK_CONTIGUOUS] = "Contiguous",
    };
    kvq_status  status = KVQ_OK;
    const char *name = NULL;
    tok_rule   *rule = NULL;
    size_t      behavior = 0, n_names = sizeof NAMES / sizeof *NAMES;
    KVQ_TRY(json_get_string(options, "behavior", r->path, false, &name, r->err));
    while (behavior < n_names && strcmp(NAMES[behavior], name) != 0) behavior++;
    if (behavior == n_names) KVQ_TRY(unsupported(r, "Split behavior", name));
    KVQ_TRY(add_rule(r, TOK_RULE_SPLIT, NULL, &rule));
    rule->behavior = (tok_behavior)behavior;
    KVQ_TRY(read_flag(r, options, "invert", false, &rule->invert));
    KVQ_TRY(read_pattern(r, options, &rule->pattern));
done:
    return status;
}

// Older files say add_prefix_space instead of prepend_scheme.
static kvq_status read_prepend_scheme(reader *r, const cJSON *options, const char **scheme) {
    bool       prefix;
    kvq_status status = read_flag(r, options, "add_prefix_space", true, &prefix);
    *scheme = prefix ? "always" : "never";
    return status == KVQ_OK ? json_get_string(options, "prepend_scheme", r->path, true, scheme, r->err) : status;
}

static kvq_status read_metaspace(reader *r, const cJSON *options, int detail) {
    (void)detail;
    kvq_status  status = KVQ_OK;
    const char *mark = UTF8_BLANK_MARK, *scheme = NULL;
    bool        splits;
    tok_rule   *rule = NULL;
    KVQ_TRY(json_get_string(options, "replacement", r->path, true, &mark, r->err));
    KVQ_TRY(read_prepend_scheme(r, options, &scheme));
    KVQ_TRY(read_flag(r, options, "split", true, &splits));
    KVQ_TRY(add_rule(r, TOK_RULE_REPLACE, mark, &rule));
    KVQ_TRY(tok_pattern_literal(r->ctx, " ", &rule->pattern, r->err));
    bool first = strcmp(scheme, "first") == 0;
    if (first || strcmp(scheme, "always") == 0) {
        KVQ_TRY(add_rule(r, TOK_RULE_PREPEND, mark, &rule));
        rule->prepend = first ? TOK_PREPEND_MISSING_FIRST : TOK_PREPEND_MISSING;
    } else if (strcmp(scheme, "never") != 0) {
        KVQ_TRY(unsupported(r, "Metaspace prepend_scheme", scheme));
    }
    if (splits) {
        KVQ_TRY(add_rule(r, TOK_RULE_SPLIT, NULL, &rule));
        rule->behavior = TOK_MERGED_WITH_NEXT;
        KVQ_TRY(tok_pattern_literal(r->ctx, mark, &rule->pattern, r->err));
    }
done:
    return status;
}

static kvq_status read_pre_tokenizer(reader *r, const cJSON *options) {
    static const step STEPS[] = {
        {"Sequence", read_pre_tokenizers, 0}, {"ByteLevel", read_byte_level, 0},
        {"Digits", read_digits, 0},           {"Split", read_split, 0},
        {"Metaspace", read_metaspace, 0},
    };
    // ByteLevel turns the text into stand-ins for bytes; kvq never spells these out, so nothing can look at them.
    if (r->byte_level) return unsupported(r, "pre_tokenizer", "a step behind ByteLevel");
    return read_step(r, "pre_tokenizer", STEPS, sizeof STEPS / sizeof *STEPS, options);
}

// ---------------------------------------------------------------- post-processors

static kvq_status read_post_processor(reader *r, const cJSON *options);

static kvq_status read_post_processors(reader *r, const cJSON *options, int detail) {
    (void)detail;
    const cJSON *item;
    cJSON_ArrayForEach(item, member(options, "processors")) {
        kvq_status status = read_post_processor(r, item);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

// {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": ...}], "special_tokens": {"<s>": {"ids": [1]}}}
static kvq_status read_template(reader *r, const cJSON *options, int detail) {
    (void)detail;
    const cJSON *first = cJSON_GetArrayItem(member(options, "single"), 0);
    const cJSON *token = first != NULL ? member(first, "SpecialToken") : NULL;
    const char  *name = NULL;
    if (token == NULL) return KVQ_OK;
    kvq_status status = json_get_string(token, "id", r->path, false, &name, r->err);
    if (status != KVQ_OK) return status;
    const cJSON *entry =
        member(options, "special_tokens") != NULL ? member(member(options, "special_tokens"), name) : NULL;
    const cJSON *id = entry != NULL ? cJSON_GetArrayItem(member(entry, "ids"), 0) : NULL;
    r->template_bos = true;
    if (cJSON_IsNumber(id) && id->valuedouble >= 0 && id->valuedouble <= INT32_MAX)
        r->template_id = (int64_t)id->valuedouble;
    return KVQ_OK;
}

static kvq_status skip_step(reader *r, const cJSON *options, int detail) {
    (void)r, (void)options, (void)detail;
    return KVQ_OK;
}

// Nothing of it is applied to the ids; it tells whether the tokenizer begins a text with a token of its own.
static kvq_status read_post_processor(reader *r, const cJSON *options) {
    static const step STEPS[] = {
        {"Sequence", read_post_processors, 0},
        {"TemplateProcessing", read_template, 0},
        {"ByteLevel", skip_step, 0}, // trims offsets only
    };
    return read_step(r, "post_processor", STEPS, sizeof STEPS / sizeof *STEPS, options);
}

// ---------------------------------------------------------------- the model

static kvq_status check_text(reader *r, const char *text, const char *what) {
    if (text != NULL && text[0] != 0 && utf8_is_valid(text, strlen(text))) return KVQ_OK;
    return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: %s '%.80s' is empty or not UTF-8", r->path, what,
                    text != NULL ? text : "");
}

static kvq_status read_vocabulary(reader *r, const cJSON *model) {
    const cJSON *vocab = member(model, "vocab"), *item;
    tok_bpe     *bpe = &r->t->bpe;
    kvq_status   status = KVQ_OK;
    if (!cJSON_IsObject(vocab) || vocab->child == NULL)
        return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: model.vocab is missing, empty or not an object", r->path);
    cJSON_ArrayForEach(item, vocab) {
        double id = item->valuedouble;
        KVQ_TRY(check_text(r, item->string, "vocabulary entry"));
        if (!cJSON_IsNumber(item) || !(id >= 0 && id < INT32_MAX) || id != (double)(int32_t)id) {
            KVQ_TRY(kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: the id of token '%.80s' is not a whole number from 0 on",
                             r->path, item->string));
        }
        if (tok_table_find(&bpe->vocabulary, item->string, strlen(item->string)) >= 0) {
            KVQ_TRY(kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: token '%.80s' is in the vocabulary twice", r->path,
                             item->string));
        }
        KVQ_TRY(tok_table_put(r->ctx, &bpe->vocabulary, item->string, strlen(item->string), (int32_t)id, r->err));
        if (id >= bpe->n_ids) bpe->n_ids = (int32_t)id + 1;
    }
done:
    return status;
}

// A rule is "left right", or, since tokens may hold blanks, ["left", "right"].
static kvq_status read_merges(reader *r, const cJSON *model) {
    const cJSON *merges = member(model, "merges"), *item;
    kvq_status   status = KVQ_OK;
    int64_t      index = 0;
    if (!cJSON_IsArray(merges) || merges->child == NULL) {
        return kvq_fail(r->err, KVQ_ERR_INPUT,
                        "get a tokenizer.json with model.merges, for example by saving the tokenizer again with a "
                        "current `tokenizers`",
                        "%s: a tokenizer without merges: model.merges is missing or empty", r->path);
    }
    cJSON_ArrayForEach(item, merges) {
        const char *left =
            cJSON_IsArray(item) ? cJSON_GetStringValue(cJSON_GetArrayItem(item, 0)) : cJSON_GetStringValue(item);
        const char *right = cJSON_IsArray(item) ? cJSON_GetStringValue(cJSON_GetArrayItem(item, 1)) : NULL;
        size_t      n_left = left != NULL ? strlen(left) : 0;
        const char *blank = left != NULL && !cJSON_IsArray(item) ? strchr(left, ' ') : NULL;
        if (blank != NULL && strchr(blank + 1, ' ') == NULL) {
            n_left = (size_t)(blank - left);
            right = blank + 1;
        }
        if (n_left == 0 || right == NULL || right[0] == 0 || (cJSON_IsArray(item) && cJSON_GetArraySize(item) != 2)) {
            KVQ_TRY(kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: merge %lld is not a pair of tokens", r->path,
                             (long long)index));
        }
        KVQ_TRY(tok_bpe_add_merge(r->ctx, &r->t->bpe, r->path, index++, left, n_left, right, strlen(right), r->err));
    }
done:
    return status;
}

// Options of a BPE model that change ids and that kvq does not have: they must be absent, null, or say "nothing".
static kvq_status check_absent_options(reader *r, const cJSON *model) {
    static const char *const KEYS[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        const cJSON *item = member(model, KEYS[i]);
        bool         nothing = item == NULL || cJSON_IsNull(item) || (cJSON_IsNumber(item) && item->valuedouble == 0) ||
                       (cJSON_IsString(item) && item->valuestring[0] == 0);
        if (!nothing) return unsupported(r, "model option", KEYS[i]);
    }
    return KVQ_OK;
}

static kvq_status read_model(reader *r, const cJSON *root) {
    const cJSON *model = member(root, "model");
    const char  *type = "BPE", *unk = NULL; // files of the first versions do not name the type
    tok_bpe     *bpe = &r->t->bpe;
    kvq_status   status = KVQ_OK;
    bool         byte_fallback;
    if (model == NULL)
        return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: field 'model' is missing: not a tokenizer.json", r->path);
    KVQ_TRY(json_get_string(model, "type", r->path, true, &type, r->err));
    if (strcmp(type, "BPE") != 0) KVQ_TRY(unsupported(r, "model type", type));
    KVQ_TRY(check_absent_options(r, model));
    KVQ_TRY(read_flag(r, model, "byte_fallback", false, &byte_fallback));
    KVQ_TRY(read_flag(r, model, "ignore_merges", false, &bpe->ignore_merges));
    KVQ_TRY(read_flag(r, model, "fuse_unk", false, &bpe->fuse_unk));
    KVQ_TRY(json_get_string(model, "unk_token", r->path, true, &unk, r->err));
    if (!r->byte_level && !byte_fallback)
        KVQ_TRY(unsupported(r, "model", "BPE with neither a ByteLevel pre-tokenizer nor byte_fallback"));
    bpe->byte_level = r->byte_level;
    KVQ_TRY(read_vocabulary(r, model));
    KVQ_TRY(tok_bpe_find_bytes(bpe, r->path, r->err));
    bpe->unk_id = unk != NULL && !byte_fallback ? tok_table_find(&bpe->vocabulary, unk, strlen(unk)) : -1;
    KVQ_TRY(read_merges(r, model));
done:
    return status;
}

// ---------------------------------------------------------------- added tokens

// A token that is looked for behind the normalizer went through it itself.
static kvq_status put_normalized(reader *r, const char *text, tok_added_token like) {
    kvq_status       status = KVQ_OK;
    const tok_rules *rules = &r->t->normalizer;
    tok_session      s = {.ctx = r->ctx, .tokenizer = r->t, .err = r->err};
    tok_part         whole = {.text = text, .n = strlen(text), .at_start = true};
    KVQ_TRY(tok_matcher_create(&s.matcher, r->err));
    KVQ_TRY(tok_apply_rules(&s, rules->data, rules->n, whole, &s.normal));
    if (s.normal.n > 0)
        KVQ_TRY(tok_added_put(r->ctx, &r->t->normalized, s.normal.text.data, s.normal.text.n, like, r->err));
done:
    tok_matcher_destroy(&s.matcher);
    tok_pieces_free(r->ctx, &s.normal);
    tok_pieces_free(r->ctx, &s.scratch);
    return status;
}

static kvq_status read_added_token(reader *r, const cJSON *item) {
    kvq_status      status = KVQ_OK;
    const char     *text = NULL;
    int64_t         id = -1;
    bool            normalized, single_word;
    tok_added_token like = {0};
    tok_bpe        *bpe = &r->t->bpe;
    KVQ_TRY(json_get_string(item, "content", r->path, false, &text, r->err));
    KVQ_TRY(check_text(r, text, "added token"));
    KVQ_TRY(json_get_int(item, "id", r->path, false, 0, INT32_MAX - 1, &id, r->err));
    KVQ_TRY(read_flag(r, item, "special", false, &like.special));
    KVQ_TRY(read_flag(r, item, "lstrip", false, &like.lstrip));
    KVQ_TRY(read_flag(r, item, "rstrip", false, &like.rstrip));
    KVQ_TRY(read_flag(r, item, "normalized", !like.special, &normalized));
    KVQ_TRY(read_flag(r, item, "single_word", false, &single_word));
    if (single_word) KVQ_TRY(unsupported(r, "option single_word of added token", text));
    int32_t known = tok_table_find(&bpe->vocabulary, text, strlen(text));
    if (known >= 0 && known != id) {
        KVQ_TRY(kvq_fail(r->err, KVQ_ERR_INPUT, NULL,
                         "%s: added token '%.80s' has id %lld here and %d in the vocabulary", r->path, text,
                         (long long)id, known));
    }
    like.id = (int32_t)id;
    if (like.id >= bpe->n_ids) bpe->n_ids = like.id + 1;
    KVQ_TRY(normalized ? put_normalized(r, text, like)
                       : tok_added_put(r->ctx, &r->t->raw, text, strlen(text), like, r->err));
done:
    return status;
}

static kvq_status read_added_tokens(reader *r, const cJSON *root) {
    const cJSON *item;
    cJSON_ArrayForEach(item, member(root, "added_tokens")) {
        kvq_status status = read_added_token(r, item);
        if (status != KVQ_OK) return status;
    }
    tok_added_finish(&r->t->raw);
    tok_added_finish(&r->t->normalized);
    return KVQ_OK;
}

// ---------------------------------------------------------------- beginning and end of text

static int64_t find_token(const kvq_tokenizer *t, const cJSON *root, const char *text) {
    const cJSON *item;
    cJSON_ArrayForEach(item, member(root, "added_tokens")) {
        const char *content = cJSON_GetStringValue(member(item, "content"));
        if (content != NULL && strcmp(content, text) == 0) return (int64_t)member(item, "id")->valuedouble;
    }
    return tok_table_find(&t->bpe.vocabulary, text, strlen(text));
}

// The files beside tokenizer.json; either may be missing.
typedef struct companions {
    char  *tokenizer_path, *model_path;
    cJSON *tokenizer, *model; // tokenizer_config.json, config.json
} companions;

static kvq_status read_companion(reader *r, const char *name, char **path, cJSON **out) {
    size_t     folder = (size_t)(kvq_file_name(r->path) - r->path), n = strlen(name) + 1;
    kvq_status status = KVQ_NEW(r->ctx, (int64_t)(folder + n), "path", path, r->err);
    if (status != KVQ_OK) return status;
    memcpy(*path, r->path, folder);
    memcpy(*path + folder, name, n);
    if (access(*path, F_OK) != 0) return KVQ_OK;
    status = json_parse_file(*path, out, r->err);
    if (status != KVQ_OK || cJSON_IsObject(*out)) return status;
    return kvq_fail(r->err, KVQ_ERR_INPUT, NULL, "%s: is not a JSON object", *path);
}

// One of the two tokens a text may be enclosed in. Where to look, in this order: tokenizer_config.json by name,
// config.json by id, and, for a tokenizer.json that stands alone, customary names among its added tokens.
typedef struct text_end {
    const char *name_key, *id_key, *customary[4];
} text_end;

static kvq_status find_role(reader *r, const cJSON *root, const companions *c, const text_end *role, int64_t *out) {
    const cJSON *named = c->tokenizer != NULL ? member(c->tokenizer, role->name_key) : NULL;
    const cJSON *id = c->model != NULL ? member(c->model, role->id_key) : NULL;
    const char  *name = cJSON_GetStringValue(cJSON_IsObject(named) ? member(named, "content") : named);
    if (name != NULL) {
        *out = find_token(r->t, root, name);
        if (*out >= 0) return KVQ_OK;
        return kvq_fail(r->err, KVQ_ERR_MISMATCH, NULL, "%s: %s '%.80s' is not in %s", c->tokenizer_path,
                        role->name_key, name, r->path);
    }
    if (cJSON_IsArray(id))
        id = cJSON_GetArrayItem(id, 0); // several tokens end a turn of a conversation; the first ends a text
    if (cJSON_IsNumber(id) && id->valuedouble >= 0) {
        if (id->valuedouble < r->t->bpe.n_ids && id->valuedouble == (double)(int64_t)id->valuedouble) {
            *out = (int64_t)id->valuedouble;
            return KVQ_OK;
        }
        return kvq_fail(r->err, KVQ_ERR_MISMATCH, NULL, "%s: %s is %.17g, but the ids of %s end at %d", c->model_path,
                        role->id_key, id->valuedouble, r->path, r->t->bpe.n_ids - 1);
    }
    for (size_t i = 0; i < sizeof role->customary / sizeof *role->customary && role->customary[i] != NULL && *out < 0;
         i++)
        *out = find_token(r->t, root, role->customary[i]);
    return KVQ_OK;
}

static kvq_status read_text_ends(reader *r, const cJSON *root) {
    static const text_end BOS = {"bos_token", "bos_token_id", {"<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"}};
    static const text_end EOS = {"eos_token", "eos_token_id", {"</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"}};
    kvq_tokenizer_info   *info = &r->t->info;
    companions            c = {0};
    kvq_status            status = KVQ_OK;
    info->bos_id = r->template_id;
    KVQ_TRY(read_companion(r, "tokenizer_config.json", &c.tokenizer_path, &c.tokenizer));
    KVQ_TRY(read_companion(r, "config.json", &c.model_path, &c.model));
    KVQ_TRY(find_role(r, root, &c, &BOS, &info->bos_id));
    KVQ_TRY(find_role(r, root, &c, &EOS, &info->eos_id));
    info->adds_bos = r->template_bos;
    if (c.tokenizer != NULL)
        KVQ_TRY(json_get_bool(c.tokenizer, "add_bos_token", c.tokenizer_path, true, &info->adds_bos, r->err));
done:
    cJSON_Delete(c.tokenizer);
    cJSON_Delete(c.model);
    kvq_free(r->ctx, c.tokenizer_path);
    kvq_free(r->ctx, c.model_path);
    return status;
}

// ---------------------------------------------------------------- the file

kvq_status tok_read_json(const kvq_context *ctx, const char *path, kvq_tokenizer *t, kvq_error *err) {
    reader          r = {.ctx = ctx, .path = path, .t = t, .template_id = -1, .err = err};
    kvq_mapped_file file = {0};
    cJSON          *root = NULL;
    kvq_status      status = KVQ_OK;
    KVQ_TRY(kvq_map_file(path, &file, err));
    KVQ_TRY(kvq_sha256_of(file.data, file.bytes, t->info.sha256, err));
    KVQ_TRY(json_check_no_zero((const char *)file.data, file.bytes, path, err));
    KVQ_TRY(json_parse((const char *)file.data, file.bytes, path, &root, err));
    if (!cJSON_IsObject(root)) KVQ_TRY(kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: is not a JSON object", path));
    KVQ_TRY(read_normalizer(&r, member(root, "normalizer")));
    KVQ_TRY(read_pre_tokenizer(&r, member(root, "pre_tokenizer")));
    KVQ_TRY(read_model(&r, root));
    KVQ_TRY(read_added_tokens(&r, root));
    KVQ_TRY(read_post_processor(&r, member(root, "post_processor")));
    KVQ_TRY(read_text_ends(&r, root));
done:
    cJSON_Delete(root);
    kvq_unmap_file(&file);
    return status;
}
