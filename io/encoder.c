// SPDX-License-Identifier: Apache-2.0
//
// Takes a text through the steps that tokenizer_impl.h lists, all of it at once or in parts of any size. Between the
// steps lie three texts, each of which is passed on as far as it is certain:
//
//     RAW      repaired UTF-8. Certain is what no added token can reach into and what the normalizer can rewrite
//              without seeing more.
//     NORMAL   the normalized text of one section, that is, of what lies between two added tokens. Certain is the same
//              for the added tokens that are looked for here, and for the rules in front of the first split.
//     PIECES   what is to be split, of one section. Certain are the pieces that end before the first match that might
//              still change; of the piece behind them what no merge can cross.
//
// A tokenizer for which a step needs the whole text (tok_rules_finish says so) keeps all of it there.
#include <string.h>

#include "tokenizer_impl.h"

#define MAX_TEXT_BYTES (INT32_MAX / 4)    // positions within a piece are 32-bit; 4: what a normalizer may add
#define MAX_KEPT_BYTES ((size_t)64 << 20) // of a text that may go on

typedef struct tok_level {
    tok_text text;     // arrived and not passed on
    size_t   again;    // fewer bytes than this are not looked at: nothing was certain about half as many
    bool     begun;    // part of the present section was passed on
    bool     at_start; // the text begins with this section
} tok_level;

enum { RAW, NORMAL, PIECES, N_LEVELS };

struct kvq_encoder {
    tok_session s;
    tok_text    bytes, repaired; // what arrived, up to a character that is not finished
    tok_level   levels[N_LEVELS];
};

kvq_status kvq_encoder_create(const kvq_context *ctx, const kvq_tokenizer *tokenizer, bool parse_special,
                              kvq_encoder **out, kvq_error *err) {
    kvq_encoder *e = NULL;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "encoder", &e, err));
    e->s = (tok_session){.ctx = ctx, .tokenizer = tokenizer, .parse_special = parse_special, .err = err};
    KVQ_TRY(tok_matcher_create(&e->s.matcher, err));
    e->levels[RAW].at_start = true;
    *out = e;
    e = NULL;
done:
    kvq_encoder_destroy(ctx, &e);
    return status;
}

void kvq_encoder_destroy(const kvq_context *ctx, kvq_encoder **encoder) {
    kvq_encoder *e = *encoder;
    if (e == NULL) return;
    tok_matcher_destroy(&e->s.matcher);
    tok_pieces_free(ctx, &e->s.normal);
    tok_pieces_free(ctx, &e->s.pieces);
    tok_pieces_free(ctx, &e->s.scratch);
    tok_table_free(ctx, &e->s.cache);
    kvq_free(ctx, e->s.cached);
    kvq_ids_free(ctx, &e->s.cached_ids);
    tok_bpe_work_free(&e->s);
    kvq_free(ctx, e->bytes.data);
    kvq_free(ctx, e->repaired.data);
    for (int k = 0; k < N_LEVELS; k++) kvq_free(ctx, e->levels[k].text.data);
    kvq_free(ctx, e);
    *encoder = NULL;
}

// ---------------------------------------------------------------- texts between steps

static kvq_status arrive(kvq_encoder *e, tok_level *l, const char *text, size_t n, bool last, bool *look) {
    kvq_status status = tok_text_append(e->s.ctx, &l->text, text, n, e->s.err);
    *look = last || l->text.n >= l->again || l->text.n > MAX_KEPT_BYTES;
    return status;
}

static const char *bytes_of(const tok_text *text) { return text->data != NULL ? text->data : ""; }

static void drop(tok_text *text, size_t n) {
    if (n > 0) memmove(text->data, text->data + n, text->n - n);
    text->n -= n;
}

// Keeps what lies behind the first n bytes.
static kvq_status keep(kvq_encoder *e, tok_level *l, size_t n, bool last) {
    drop(&l->text, n);
    l->again = n > 0 || last ? 0 : 2 * l->text.n;
    if (l->text.n <= MAX_KEPT_BYTES || last) return KVQ_OK;
    return kvq_fail(e->s.err, KVQ_ERR_UNSUPPORTED, "break the text into lines or documents",
                    "this tokenizer finds no place in %zu bytes of the text where it could be taken by parts",
                    l->text.n);
}

// ---------------------------------------------------------------- pieces

static kvq_status encode_pieces(kvq_encoder *e, bool last, size_t *done) {
    tok_session      *s = &e->s;
    const tok_pieces *p = &s->pieces;
    kvq_status        status = KVQ_OK;
    size_t            whole = last ? p->text.n : p->resume, partly = 0;
    if (!last) {
        const char *rest = p->text.data + p->rest.start;
        partly = tok_bpe_certain(&s->tokenizer->bpe, rest, p->rest.end - p->rest.start);
        if (partly > 0 && p->rest.start + partly >= p->last_match) {
            whole = p->rest.start;
        } else {
            partly = 0;
        }
    }
    for (int64_t i = 0; i < p->n && p->spans[i].end <= whole; i++) {
        tok_span span = p->spans[i];
        KVQ_TRY(tok_bpe_encode(s, p->text.data + span.start, span.end - span.start));
    }
    if (partly > 0) KVQ_TRY(tok_bpe_encode(s, p->text.data + whole, partly));
    *done = whole + partly;
done:
    return status;
}

static kvq_status push_pieces(kvq_encoder *e, const char *text, size_t n, bool last) {
    tok_session     *s = &e->s;
    tok_level       *l = &e->levels[PIECES];
    const tok_rules *rules = &s->tokenizer->splitter;
    kvq_status       status = KVQ_OK;
    bool             look;
    size_t           done = 0;
    KVQ_TRY(arrive(e, l, text, n, last, &look));
    if (!look) return KVQ_OK;
    if (l->text.n > 0 && (last || rules->splits_parts)) {
        tok_part part = {.text = l->text.data, .n = l->text.n, .at_start = l->at_start, .open = !last};
        KVQ_TRY(tok_apply_rules(s, rules->data + rules->n_rewriting, rules->n - rules->n_rewriting, part, &s->pieces));
        KVQ_TRY(encode_pieces(e, last, &done));
        if (last) done = l->text.n;
    }
    status = keep(e, l, done, last);
done:
    return status;
}

// ---------------------------------------------------------------- sections

// How much of a section that may go on can be rewritten by itself.
static size_t rewritable(const tok_rules *rules, const char *text, size_t n) {
    uint32_t c;
    if (!rules->rewrites_parts) return 0;
    if (!rules->has_form) return n;
    for (size_t at = n; at > 0;) {
        at--;
        if (((uint8_t)text[at] & 0xc0) != 0x80 && utf8_decode(text + at, n - at, &c) > 0 && utf8_begins_form(c))
            return at;
    }
    return 0;
}

static kvq_status push_level(kvq_encoder *e, int k, const char *text, size_t n, bool last);

static kvq_status pass_on(kvq_encoder *e, int k, const char *text, size_t n, bool at_start, bool closed) {
    if (!e->levels[k].begun) e->levels[k + 1].at_start = at_start;
    return k == RAW ? push_level(e, NORMAL, text, n, closed) : push_pieces(e, text, n, closed);
}

static kvq_status push_section(kvq_encoder *e, int k, const char *text, size_t n, bool closed, size_t *taken) {
    tok_session     *s = &e->s;
    tok_level       *l = &e->levels[k];
    const tok_rules *rules = k == RAW ? &s->tokenizer->normalizer : &s->tokenizer->splitter;
    kvq_status       status = KVQ_OK;
    size_t           take = closed ? n : rewritable(rules, text, n);
    *taken = take;
    if (take == 0 && !(closed && l->begun)) return KVQ_OK;
    if (take == 0 || rules->n_rewriting == 0) {
        KVQ_TRY(pass_on(e, k, text, take, l->at_start, closed));
    } else {
        tok_part part = {.text = text, .n = take, .at_start = l->at_start, .continues = l->begun};
        KVQ_TRY(tok_apply_rules(s, rules->data, rules->n_rewriting, part, &s->normal));
        KVQ_TRY(pass_on(e, k, bytes_of(&s->normal.text), s->normal.text.n, s->normal.at_start, closed));
    }
    l->begun = !closed;
    if (closed) l->at_start = false;
done:
    return status;
}

// Cuts the added tokens out of a text and hands on what lies between them.
static kvq_status push_level(kvq_encoder *e, int k, const char *text, size_t n, bool last) {
    tok_session     *s = &e->s;
    tok_level       *l = &e->levels[k];
    const tok_added *added = k == RAW ? &s->tokenizer->raw : &s->tokenizer->normalized;
    kvq_status       status = KVQ_OK;
    bool             look;
    size_t           from = 0, taken = 0;
    KVQ_TRY(arrive(e, l, text, n, last, &look));
    if (!look) return KVQ_OK;
    for (bool more = true; more;) {
        tok_span               where = {0, 0};
        const tok_added_token *token =
            tok_added_next(added, bytes_of(&l->text), l->text.n, from, !last, s->parse_special, &where);
        more = token != NULL;
        KVQ_TRY(push_section(e, k, bytes_of(&l->text) + from, where.start - from, more || last, &taken));
        from += taken;
        if (!more) break;
        KVQ_TRY(tok_ids_push(s->ctx, s->ids, token->id, s->err));
        l->at_start = false;
        from = where.end;
    }
    status = keep(e, l, from, last);
done:
    return status;
}

// ---------------------------------------------------------------- bytes

static kvq_status push_bytes(kvq_encoder *e, const char *text, size_t n, bool last) {
    const kvq_context *ctx = e->s.ctx;
    kvq_error         *err = e->s.err;
    kvq_status         status = KVQ_OK;
    KVQ_TRY(tok_text_append(ctx, &e->bytes, text, n, err));
    const char *bytes = bytes_of(&e->bytes);
    size_t      size = e->bytes.n - (last ? 0 : utf8_unfinished(bytes, e->bytes.n));
    if (utf8_is_valid(bytes, size)) {
        KVQ_TRY(push_level(e, RAW, bytes, size, last));
    } else {
        bool each_byte = !e->s.tokenizer->bpe.byte_level;
        e->repaired.n = 0;
        KVQ_TRY(utf8_repair(ctx, bytes, size, each_byte, &e->repaired, err));
        KVQ_TRY(push_level(e, RAW, e->repaired.data, e->repaired.n, last));
    }
    drop(&e->bytes, size);
    if (last) e->levels[RAW].at_start = true;
done:
    return status;
}

kvq_status kvq_encoder_push(kvq_encoder *e, const char *text, size_t n, bool last, kvq_ids *ids, kvq_error *err) {
    int64_t count = ids->count;
    if (n > MAX_TEXT_BYTES) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "split the text into smaller files",
                        "a text of %zu bytes; the largest is %d", n, MAX_TEXT_BYTES);
    }
    e->s.ids = ids;
    e->s.err = err;
    kvq_status status = push_bytes(e, text, n, last);
    if (status != KVQ_OK) ids->count = count;
    return status;
}

kvq_status kvq_tokenizer_encode(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const char *text, size_t n,
                                bool parse_special, kvq_ids *ids, kvq_error *err) {
    kvq_encoder *e = NULL;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(kvq_encoder_create(ctx, tokenizer, parse_special, &e, err));
    status = kvq_encoder_push(e, text, n, true, ids, err);
done:
    kvq_encoder_destroy(ctx, &e);
    return status;
}
