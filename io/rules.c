// SPDX-License-Identifier: Apache-2.0
//
// Normalizers and pre-tokenizers, reduced to four kinds of rules on a list of pieces. The list begins as the whole
// text; rewriting rules change the text of each piece, splitting rules cut pieces up.
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "tokenizer_impl.h"

kvq_status tok_rules_add(const kvq_context *ctx, tok_rules *rules, tok_rule_kind kind, const char *text, tok_rule **out,
                         kvq_error *err) {
    void      *data = rules->data;
    kvq_status status = tok_grow(ctx, rules->n, &rules->capacity, sizeof *rules->data, &data, err);
    if (status != KVQ_OK) return status;
    rules->data = data;
    tok_rule rule = {.kind = kind};
    if (text != NULL) {
        rule.text = kvq_strdup(ctx, text);
        rule.n_text = strlen(text);
        if (rule.text == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "a rule of %zu bytes", rule.n_text);
    }
    *out = &rules->data[rules->n++];
    **out = rule;
    return KVQ_OK;
}

// ---------------------------------------------------------------- what can be done by parts

static bool one_character(const char *text, size_t n) {
    uint32_t c;
    return n > 0 && utf8_decode(text, n, &c) == n;
}

// Something in front is put there with the first part, which holds at least one character; so that, too, must be all it
// depends on. A rewriting that could leave nothing of the first part, or that looks at several characters, needs the
// whole. So does a normal form behind a replacement: where characters may be parted was found out before it.
static bool rewrites_parts(const tok_rule *rule, bool replaced) {
    const tok_pattern *p = &rule->pattern;
    if (rule->kind == TOK_RULE_FORM) return !replaced;
    if (rule->kind == TOK_RULE_PREPEND)
        return rule->prepend == TOK_PREPEND_ANY || one_character(rule->text, rule->n_text);
    return rule->n_text > 0 && p->literal != NULL && one_character(p->literal, p->n_literal);
}

// What is removed leaves no piece behind that the next part could continue, unless it is a match.
static bool splits_parts(const tok_rule *rule) {
    return rule->kind == TOK_RULE_SPLIT && !rule->pattern.whole && !(rule->behavior == TOK_REMOVED && rule->invert);
}

void tok_rules_finish(tok_rules *rules) {
    bool replaced = false;
    rules->rewrites_parts = rules->splits_parts = true;
    rules->has_form = false;
    rules->n_rewriting = 0;
    while (rules->n_rewriting < rules->n && rules->data[rules->n_rewriting].kind != TOK_RULE_SPLIT) {
        const tok_rule *rule = &rules->data[rules->n_rewriting++];
        rules->rewrites_parts = rules->rewrites_parts && rewrites_parts(rule, replaced);
        rules->has_form = rules->has_form || rule->kind == TOK_RULE_FORM;
        replaced = replaced || rule->kind == TOK_RULE_REPLACE;
    }
    for (int64_t i = rules->n_rewriting; i < rules->n; i++)
        rules->splits_parts = rules->splits_parts && splits_parts(&rules->data[i]);
}

void tok_rules_free(const kvq_context *ctx, tok_rules *rules) {
    for (int64_t i = 0; i < rules->n; i++) {
        kvq_free(ctx, rules->data[i].text);
        tok_pattern_free(ctx, &rules->data[i].pattern);
    }
    kvq_free(ctx, rules->data);
    *rules = (tok_rules){0};
}

void tok_pieces_free(const kvq_context *ctx, tok_pieces *pieces) {
    kvq_free(ctx, pieces->text.data);
    kvq_free(ctx, pieces->spans);
    *pieces = (tok_pieces){0};
}

static kvq_status push_span(tok_session *s, tok_pieces *pieces, size_t start, size_t end) {
    if (start == end) return KVQ_OK;
    void      *data = pieces->spans;
    kvq_status status = tok_grow(s->ctx, pieces->n, &pieces->capacity, sizeof *pieces->spans, &data, s->err);
    if (status != KVQ_OK) return status;
    pieces->spans = data;
    pieces->spans[pieces->n++] = (tok_span){start, end};
    return KVQ_OK;
}

// ---------------------------------------------------------------- splitting

// Whether a segment joins the one before it. Segments alternate freely: two matches may follow each other.
static bool joins(tok_behavior behavior, bool previous_is_match, bool is_match) {
    switch (behavior) {
    case TOK_MERGED_WITH_PREVIOUS:
        return is_match && !previous_is_match;
    case TOK_MERGED_WITH_NEXT:
        return !is_match && previous_is_match;
    case TOK_CONTIGUOUS:
        return is_match == previous_is_match;
    case TOK_REMOVED:
    case TOK_ISOLATED:
        break;
    }
    return false;
}

typedef struct splitter {
    tok_session    *session;
    const tok_rule *rule;
    tok_pieces     *out;
    tok_span        pending; // segments joined so far
    bool            pending_is_match, any;
} splitter;

static kvq_status push_pending(splitter *p) {
    if (!p->any || (p->rule->behavior == TOK_REMOVED && p->pending_is_match)) return KVQ_OK;
    return push_span(p->session, p->out, p->pending.start, p->pending.end);
}

static kvq_status push_segment(splitter *p, size_t start, size_t end, bool is_match) {
    is_match = is_match != p->rule->invert;
    kvq_status status = KVQ_OK;
    if (p->any && joins(p->rule->behavior, p->pending_is_match, is_match)) {
        p->pending.end = end;
    } else {
        status = push_pending(p);
        p->pending = (tok_span){start, end};
    }
    p->pending_is_match = is_match;
    p->any = true;
    return status;
}

// The piece whose end is not known: the same walk, as far as its matches are certain. A match at the end of what is
// certain closes its piece only where no behaviour could join something to it.
static kvq_status split_rest(tok_session *s, const tok_rule *rule, const tok_pieces *in, tok_pieces *out) {
    kvq_status status = KVQ_OK;
    size_t     base = in->rest.start, at = base;
    tok_walk   walk = {
          .pattern = &rule->pattern, .text = in->text.data + base, .n = in->rest.end - base, .open = true, .certain = 0};
    splitter p = {.session = s, .rule = rule, .out = out};
    for (bool found = true; walk.n > 0;) {
        KVQ_TRY(tok_walk_next(&s->matcher, &walk, &found, s->err));
        size_t next = base + (found ? walk.start : walk.certain);
        if (next > at) KVQ_TRY(push_segment(&p, at, next, false));
        if (!found) break;
        KVQ_TRY(push_segment(&p, base + walk.start, base + walk.end, true));
        at = base + walk.end;
    }
    size_t certain = base + walk.certain, start = p.any ? p.pending.start : at;
    bool   alone = rule->behavior == TOK_ISOLATED || rule->behavior == TOK_REMOVED;
    if (p.any && certain <= at && alone) {
        KVQ_TRY(push_pending(&p));
        start = at;
    }
    out->rest = (tok_span){start, certain > at ? certain : at};
    if (start >= in->last_match) out->resume = start;
    if (at > start && at > in->last_match) out->last_match = at;
done:
    return status;
}

// The text stays where it is; only the spans are new.
static kvq_status split(tok_session *s, const tok_rule *rule, const tok_pieces *in, tok_pieces *out) {
    kvq_status status = KVQ_OK;
    for (int64_t i = 0; i < in->n; i++) {
        size_t   base = in->spans[i].start, at = 0;
        tok_walk walk = {.pattern = &rule->pattern, .text = in->text.data + base, .n = in->spans[i].end - base};
        splitter p = {.session = s, .rule = rule, .out = out};
        for (bool found = true;;) {
            KVQ_TRY(tok_walk_next(&s->matcher, &walk, &found, s->err));
            size_t next = found ? walk.start : walk.n;
            if (next > at) KVQ_TRY(push_segment(&p, base + at, base + next, false));
            if (!found) break;
            KVQ_TRY(push_segment(&p, base + walk.start, base + walk.end, true));
            at = walk.end;
        }
        KVQ_TRY(push_pending(&p));
    }
    out->at_start = in->at_start && out->n > 0 && out->spans[0].start == in->spans[0].start;
    out->open = in->open;
    out->resume = in->resume;
    out->last_match = in->last_match;
    if (in->open) status = split_rest(s, rule, in, out);
done:
    return status;
}

// ---------------------------------------------------------------- rewriting

static kvq_status append_form(tok_session *s, const tok_rule *rule, const char *text, size_t n, tok_text *out) {
    bool ascii = true; // every normal form leaves ASCII alone
    for (size_t i = 0; i < n && ascii; i++) ascii = (uint8_t)text[i] < 0x80;
    if (ascii) return tok_text_append(s->ctx, out, text, n, s->err);
    utf8proc_uint8_t *form = NULL;
    utf8proc_ssize_t  length =
        utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n, &form, (utf8proc_option_t)rule->form);
    if (length < 0) {
        return kvq_fail(s->err, length == UTF8PROC_ERROR_NOMEM ? KVQ_ERR_MEMORY : KVQ_ERR_INPUT, NULL,
                        "Unicode normal form of %zu bytes of text: %s", n, utf8proc_errmsg(length));
    }
    kvq_status status = tok_text_append(s->ctx, out, (const char *)form, (size_t)length, s->err);
    free(form); // utf8proc's own allocation
    return status;
}

static kvq_status append_replaced(tok_session *s, const tok_rule *rule, const char *text, size_t n, tok_text *out) {
    kvq_status status = KVQ_OK;
    size_t     at = 0;
    tok_walk   walk = {.pattern = &rule->pattern, .text = text, .n = n};
    for (bool found = true;;) {
        KVQ_TRY(tok_walk_next(&s->matcher, &walk, &found, s->err));
        KVQ_TRY(tok_text_append(s->ctx, out, text + at, (found ? walk.start : n) - at, s->err));
        if (!found) break;
        KVQ_TRY(tok_text_append(s->ctx, out, rule->text, rule->n_text, s->err));
        at = walk.end;
    }
done:
    return status;
}

static kvq_status append_prepended(tok_session *s, const tok_rule *rule, const char *text, size_t n, bool first,
                                   tok_text *out) {
    bool       there = n >= rule->n_text && memcmp(text, rule->text, rule->n_text) == 0;
    bool       wanted = rule->prepend == TOK_PREPEND_ANY || (!there && (first || rule->prepend == TOK_PREPEND_MISSING));
    kvq_status status = wanted ? tok_text_append(s->ctx, out, rule->text, rule->n_text, s->err) : KVQ_OK;
    return status == KVQ_OK ? tok_text_append(s->ctx, out, text, n, s->err) : status;
}

static kvq_status rewrite(tok_session *s, const tok_rule *rule, bool continues, const tok_pieces *in, tok_pieces *out) {
    kvq_status status = KVQ_OK;
    out->text.n = 0;
    out->at_start = out->open = false;
    for (int64_t i = 0; i < in->n; i++) {
        const char *text = in->text.data + in->spans[i].start;
        size_t      n = in->spans[i].end - in->spans[i].start, start = out->text.n;
        if (rule->kind == TOK_RULE_FORM) {
            KVQ_TRY(append_form(s, rule, text, n, &out->text));
        } else if (rule->kind == TOK_RULE_REPLACE) {
            KVQ_TRY(append_replaced(s, rule, text, n, &out->text));
        } else if (continues && i == 0) {
            KVQ_TRY(tok_text_append(s->ctx, &out->text, text, n, s->err));
        } else {
            KVQ_TRY(append_prepended(s, rule, text, n, i == 0 && in->at_start, &out->text));
        }
        KVQ_TRY(push_span(s, out, start, out->text.n));
        if (i == 0) out->at_start = in->at_start && out->n > 0;
    }
done:
    return status;
}

// A split leaves the text in place, a rewriting brings a new one: what `pieces` does not take over becomes scratch.
static void exchange(tok_pieces *pieces, tok_pieces *scratch, bool with_text) {
    tok_pieces old = *pieces;
    *pieces = *scratch;
    *scratch = old;
    if (!with_text) {
        scratch->text = pieces->text;
        pieces->text = old.text;
    }
}

kvq_status tok_apply_rules(tok_session *s, const tok_rule *rules, int64_t n_rules, tok_part part, tok_pieces *pieces) {
    kvq_status status = KVQ_OK;
    pieces->n = 0;
    pieces->text.n = 0;
    pieces->at_start = part.at_start;
    pieces->open = part.open;
    pieces->rest = (tok_span){0, part.n};
    pieces->resume = pieces->last_match = 0;
    KVQ_TRY(tok_text_append(s->ctx, &pieces->text, part.text, part.n, s->err));
    if (!part.open) KVQ_TRY(push_span(s, pieces, 0, part.n));
    for (int64_t i = 0; i < n_rules; i++) {
        const tok_rule *rule = &rules[i];
        bool            splits = rule->kind == TOK_RULE_SPLIT;
        s->scratch.n = 0;
        KVQ_TRY(splits ? split(s, rule, pieces, &s->scratch) : rewrite(s, rule, part.continues, pieces, &s->scratch));
        exchange(pieces, &s->scratch, !splits);
    }
done:
    return status;
}
