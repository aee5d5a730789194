// SPDX-License-Identifier: Apache-2.0
//
// The patterns of tokenizer files, found with PCRE2. The files are written for Oniguruma, and most of what they say
// means the same in both; what does not is translated or refused here, because a pattern that is merely accepted
// would cut the text in other places without anybody noticing.
#include <string.h>

#include "tokenizer_impl.h"

const char TOK_PATTERN_GPT2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

#define JIT_STACK_START (32u << 10)
#define JIT_STACK_LIMIT (16u << 20) // a pattern that needs more on one piece of text fails with an error

// ---------------------------------------------------------------- from Oniguruma to PCRE2

typedef struct translation {
    const kvq_context *ctx;
    const char        *where, *pattern; // zero-terminated
    size_t             at;
    bool               in_class, looks_back;
    tok_text           out;
    kvq_error         *err;
} translation;

static kvq_status refuse(const translation *t, const char *what) {
    return kvq_fail(t->err, KVQ_ERR_UNSUPPORTED, NULL, "%s: pattern '%.300s' uses %s at byte %zu", t->where, t->pattern,
                    what, t->at);
}

static kvq_status emit(translation *t, const char *text, size_t n_read) {
    t->at += n_read;
    return tok_text_append(t->ctx, &t->out, text, strlen(text), t->err);
}

static kvq_status copy(translation *t, size_t n) {
    kvq_status status = tok_text_append(t->ctx, &t->out, t->pattern + t->at, n, t->err);
    t->at += n;
    return status;
}

// \p{L}, \p{Lu}, \P{N}: general categories are the same. A longer name is a script, which PCRE2 would extend to the
// characters that several scripts share unless told not to ("sc:").
static kvq_status translate_property(translation *t) {
    const char *open = t->pattern + t->at + 2, *close = *open == '{' ? strchr(open, '}') : NULL;
    if (close == NULL) return refuse(t, "\\p without braces");
    const char *name = open + (open[1] == '^' ? 2 : 1);
    if (close - name <= 2) return copy(t, (size_t)(close - t->pattern) + 1 - t->at);
    kvq_status status = copy(t, (size_t)(name - t->pattern) - t->at);
    if (status == KVQ_OK) status = emit(t, "sc:", 0);
    return status == KVQ_OK ? copy(t, (size_t)(close - name) + 1) : status;
}

// \s is the property White_Space in Oniguruma; PCRE2's own \s also holds U+180E. \w and \b differ in combining marks,
// \h is a hexadecimal digit there, \v one character only.
static kvq_status translate_escape(translation *t) {
    char c = t->pattern[t->at + 1];
    if (c == 's') return emit(t, "\\p{White_Space}", 2);
    if (c == 'S') return emit(t, "\\P{White_Space}", 2);
    if (c == 'p' || c == 'P') return translate_property(t);
    bool letter_or_digit = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    if (c == 0 || (letter_or_digit && strchr("rntfdD", c) == NULL))
        return refuse(t, "an escape that kvq does not know how to read as Oniguruma does");
    return copy(t, 2);
}

static bool looking_at(const translation *t, const char *text) {
    return strncmp(t->pattern + t->at, text, strlen(text)) == 0;
}

static kvq_status translate_group(translation *t) {
    static const char *const KNOWN[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
    if (t->pattern[t->at + 1] == '*') return refuse(t, "a verb");
    if (t->pattern[t->at + 1] != '?') return copy(t, 1);
    if (looking_at(t, "(?<")) t->looks_back = true;
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        if (looking_at(t, KNOWN[i])) return copy(t, strlen(KNOWN[i]));
    }
    return refuse(t, "a kind of group");
}

// In a class Oniguruma knows nesting and intersection. Outside, {,n} is a repetition to it, and a + behind an interval
// repeats the interval, where PCRE2 reads "possessive".
static kvq_status translate_next(translation *t) {
    char c = t->pattern[t->at];
    if (c == '\\') return translate_escape(t);
    if (t->in_class) {
        if (c == '[') return refuse(t, "a class within a class");
        if (looking_at(t, "&&")) return refuse(t, "the intersection of classes");
        if (c == ']') t->in_class = false;
        return copy(t, 1);
    }
    if (c == '[') {
        t->in_class = true;
        size_t n = t->pattern[t->at + 1] == '^' ? 2 : 1;
        return t->pattern[t->at + n] == ']' ? refuse(t, "a class that begins with ]") : copy(t, n);
    }
    if (c == '(') return translate_group(t);
    if (c == '^') t->looks_back = true; // for the end of a line
    if (looking_at(t, "{,")) return refuse(t, "an interval without a lower bound");
    if (looking_at(t, "}+")) return refuse(t, "a + behind an interval");
    return copy(t, 1);
}

kvq_status tok_pattern_regex(const kvq_context *ctx, const char *where, const char *text, tok_pattern *out,
                             kvq_error *err) {
    kvq_status  status = KVQ_OK;
    translation t = {.ctx = ctx, .where = where, .pattern = text, .err = err};
    while (text[t.at] != 0) KVQ_TRY(translate_next(&t));
    if (t.at == 0) KVQ_TRY(refuse(&t, "nothing: it is empty, and matches everywhere"));

    // Multi-line: in Oniguruma's default syntax ^ and $ always mean the ends of lines.
    int          code = 0;
    PCRE2_SIZE   offset = 0;
    uint32_t     options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_CAPTURE;
    pcre2_code  *regex = pcre2_compile((PCRE2_SPTR)t.out.data, t.out.n, options, &code, &offset, NULL);
    PCRE2_UCHAR8 reason[128] = "";
    if (regex == NULL) {
        (void)pcre2_get_error_message(code, reason, sizeof reason);
        KVQ_TRY(kvq_fail(err, code == PCRE2_ERROR_NOMEMORY ? KVQ_ERR_MEMORY : KVQ_ERR_UNSUPPORTED, NULL,
                         "%s: pattern '%.300s' cannot be compiled: %s near byte %zu", where, text, (const char *)reason,
                         offset));
    }
    // without JIT the same matches are found, more slowly
    (void)pcre2_jit_compile(regex, PCRE2_JIT_COMPLETE | PCRE2_JIT_PARTIAL_HARD);
    uint32_t matches_nothing = 1, behind = 1;
    (void)pcre2_pattern_info(regex, PCRE2_INFO_MATCHEMPTY, &matches_nothing);
    (void)pcre2_pattern_info(regex, PCRE2_INFO_MAXLOOKBEHIND, &behind);
    out->regex = regex;
    out->whole = t.looks_back || matches_nothing != 0 || behind != 0;
done:
    kvq_free(ctx, t.out.data);
    return status;
}

kvq_status tok_pattern_literal(const kvq_context *ctx, const char *text, tok_pattern *out, kvq_error *err) {
    char *literal = kvq_strdup(ctx, text);
    if (literal == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "a pattern of %zu bytes", strlen(text));
    out->literal = literal;
    out->n_literal = strlen(text);
    return KVQ_OK;
}

void tok_pattern_free(const kvq_context *ctx, tok_pattern *pattern) {
    kvq_free(ctx, pattern->literal);
    pcre2_code_free(pattern->regex);
    *pattern = (tok_pattern){0};
}

// ---------------------------------------------------------------- matching

kvq_status tok_matcher_create(tok_matcher *out, kvq_error *err) {
    tok_matcher m = {
        .data = pcre2_match_data_create(1, NULL),
        .context = pcre2_match_context_create(NULL),
        .stack = pcre2_jit_stack_create(JIT_STACK_START, JIT_STACK_LIMIT, NULL),
    };
    if (m.data == NULL || m.context == NULL) {
        tok_matcher_destroy(&m);
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "the state of a pattern search");
    }
    pcre2_jit_stack_assign(m.context, NULL, m.stack); // NULL: no JIT in this library, or a small stack
    *out = m;
    return KVQ_OK;
}

void tok_matcher_destroy(tok_matcher *matcher) {
    pcre2_match_data_free(matcher->data);
    pcre2_match_context_free(matcher->context);
    pcre2_jit_stack_free(matcher->stack);
    *matcher = (tok_matcher){0};
}

// Of an open text PCRE2 reports a match only when it came to it without wishing to see what stands behind the end. A
// pattern that does not look back then finds the same match in any longer text, also when the search begins later.
static kvq_status find_regex(const tok_matcher *matcher, tok_walk *walk, bool *found, kvq_error *err) {
    // The text was checked to be UTF-8 when it arrived, and every cut since is between characters.
    uint32_t options = PCRE2_NO_UTF_CHECK | (walk->open ? PCRE2_PARTIAL_HARD : 0);
    int code = pcre2_match(walk->pattern->regex, (PCRE2_SPTR)walk->text, walk->n, walk->from, options, matcher->data,
                           matcher->context);
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(matcher->data);
    *found = code >= 0;
    if (code >= 0) {
        walk->start = ends[0];
        walk->end = ends[1];
        return KVQ_OK;
    }
    walk->certain = code == PCRE2_ERROR_PARTIAL ? ends[0] : walk->n;
    if (code == PCRE2_ERROR_NOMATCH || code == PCRE2_ERROR_PARTIAL) return KVQ_OK;
    PCRE2_UCHAR8 reason[128] = "";
    (void)pcre2_get_error_message(code, reason, sizeof reason);
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "split the text into smaller files",
                    "the tokenizer's pattern gave up in a piece of %zu bytes of the text: %s", walk->n,
                    (const char *)reason);
}

// Where the literal could begin and reach beyond the end.
static size_t unfinished_literal(const tok_walk *walk) {
    const tok_pattern *p = walk->pattern;
    size_t             at = walk->n - walk->from < p->n_literal ? walk->from : walk->n - p->n_literal + 1;
    while (at < walk->n && memcmp(walk->text + at, p->literal, walk->n - at) != 0) at++;
    return at;
}

static bool find_literal(tok_walk *walk) {
    const tok_pattern *p = walk->pattern;
    walk->certain = walk->open && p->n_literal > 0 ? unfinished_literal(walk) : walk->n;
    for (size_t at = walk->from; p->n_literal > 0 && walk->n - at >= p->n_literal; at++) {
        const char *hit = memchr(walk->text + at, p->literal[0], walk->n - at - p->n_literal + 1);
        if (hit == NULL) return false;
        at = (size_t)(hit - walk->text);
        if (memcmp(hit, p->literal, p->n_literal) == 0) {
            walk->start = at;
            walk->end = at + p->n_literal;
            return true;
        }
    }
    return false;
}

static bool find_number(tok_walk *walk) {
    uint32_t c;
    walk->certain = walk->n;
    for (size_t at = walk->from, length; at < walk->n; at += length) {
        length = utf8_decode(walk->text + at, walk->n - at, &c);
        if (length == 0) break; // cannot happen in checked text, and must not loop if it did
        if (utf8_is_number(c)) {
            walk->start = at;
            walk->end = at + length;
            return true;
        }
    }
    return false;
}

kvq_status tok_walk_next(const tok_matcher *matcher, tok_walk *walk, bool *found, kvq_error *err) {
    *found = false;
    walk->certain = walk->n;
    while (walk->from <= walk->n) {
        size_t previous_end = walk->end;
        if (walk->pattern->regex == NULL) {
            *found = walk->pattern->numbers ? find_number(walk) : find_literal(walk);
        } else {
            kvq_status status = find_regex(matcher, walk, found, err);
            if (status != KVQ_OK) return status;
        }
        if (!*found) return KVQ_OK;
        walk->from = walk->end;
        if (walk->start < walk->end || !walk->any || walk->start != previous_end) break;
        *found = false; // empty, right behind the last match: one character on
        uint32_t c;
        size_t   length = walk->from < walk->n ? utf8_decode(walk->text + walk->from, walk->n - walk->from, &c) : 1;
        walk->from += length > 0 ? length : 1;
    }
    walk->any = *found;
    return KVQ_OK;
}
