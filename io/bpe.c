// SPDX-License-Identifier: Apache-2.0
//
// Byte-pair encoding of one piece of text: begin with a token for each byte (byte-level) or character, and as long as
// two neighbours have a merge rule, merge those with the lowest rank, the leftmost among equals.
//
// Two observations keep this fast without changing any result. Texts repeat their words, so the ids of a short piece
// are remembered. And characters that stand on no merge's seam are never merged across, so a text that arrives as a
// single piece, as SentencePiece-like tokenizers have it, falls apart into words by itself.
#include <stdio.h>
#include <string.h>

#include "tokenizer_impl.h"

#define CACHED_BYTES 64 // longer pieces are rare and seldom repeat
#define CACHED_PIECES                                                                                                  \
    (1 << 16) // when there are more, all are forgotten: a text must not fill the memory with its words

// ---------------------------------------------------------------- reading

// GPT-2's printable stand-ins for bytes: those Latin-1 characters that print stand for themselves, the other 68 bytes,
// in order, for U+0100 and on.
size_t tok_byte_character(int byte, char out[4]) {
    uint32_t next = 0x100;
    for (int b = 0; b <= 255; b++) {
        bool     prints = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        uint32_t character = prints ? (uint32_t)b : next++;
        if (b == byte) return utf8_encode(character, out);
    }
    return 0;
}

kvq_status tok_bpe_find_bytes(tok_bpe *bpe, const char *where, kvq_error *err) {
    for (int b = 0; b < 256; b++) {
        char   name[8];
        size_t n = bpe->byte_level ? tok_byte_character(b, name)
                                   : (size_t)snprintf(name, sizeof name, "<0x%02X>", (unsigned)b & 0xffu);
        bpe->bytes[b] = tok_table_find(&bpe->vocabulary, name, n);
        if (bpe->bytes[b] < 0 && !bpe->byte_level) {
            return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: byte fallback without the piece %s in the vocabulary",
                            where, name);
        }
    }
    return KVQ_OK;
}

kvq_status tok_bpe_add_touching(const kvq_context *ctx, tok_bpe *bpe, const char *left, size_t n_left,
                                const char *right, size_t n_right, kvq_error *err) {
    size_t   last = n_left - 1;
    uint32_t before = 0, after = 0;
    while (last > 0 && ((uint8_t)left[last] & 0xc0) == 0x80) last--;
    (void)utf8_decode(left + last, n_left - last, &before);
    (void)utf8_decode(right, n_right, &after);
    return tok_pairs_put(ctx, &bpe->touching, before, after, 0, 0, err);
}

// Merging them would join bytes that no character boundary separates, which `touching` does not know.
static bool is_byte_piece(const char *text, size_t n) {
    return n == 6 && memcmp(text, "<0x", 3) == 0 && text[5] == '>';
}

kvq_status tok_bpe_add_merge(const kvq_context *ctx, tok_bpe *bpe, const char *where, int64_t index, const char *left,
                             size_t n_left, const char *right, size_t n_right, kvq_error *err) {
    kvq_status status = KVQ_OK;
    tok_text   joined = {0};
    KVQ_TRY(tok_text_append(ctx, &joined, left, n_left, err));
    KVQ_TRY(tok_text_append(ctx, &joined, right, n_right, err));
    int32_t a = tok_table_find(&bpe->vocabulary, left, n_left), b = tok_table_find(&bpe->vocabulary, right, n_right);
    int32_t ab = tok_table_find(&bpe->vocabulary, joined.data, joined.n);
    if (a < 0 || b < 0 || ab < 0 || index > UINT32_MAX) {
        KVQ_TRY(kvq_fail(
            err, KVQ_ERR_INPUT, NULL, "%s: merge %lld joins '%.*s' and '%.*s', and %s is not in the vocabulary", where,
            (long long)index, n_left < 80 ? (int)n_left : 80, left, n_right < 80 ? (int)n_right : 80, right,
            a < 0   ? "the first"
            : b < 0 ? "the second"
                    : "the result"));
    }
    if (!bpe->byte_level && (is_byte_piece(left, n_left) || is_byte_piece(right, n_right))) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: merge %lld joins byte-fallback pieces", where,
                         (long long)index));
    }
    KVQ_TRY(tok_pairs_put(ctx, &bpe->merges, (uint32_t)a, (uint32_t)b, (uint32_t)index, ab, err));
    if (!bpe->byte_level) KVQ_TRY(tok_bpe_add_touching(ctx, bpe, left, n_left, right, n_right, err));
done:
    kvq_free(ctx, joined.data);
    return status;
}

void tok_bpe_free(const kvq_context *ctx, tok_bpe *bpe) {
    tok_table_free(ctx, &bpe->vocabulary);
    tok_pairs_free(ctx, &bpe->merges);
    tok_pairs_free(ctx, &bpe->touching);
}

// ---------------------------------------------------------------- merging

typedef struct symbol { // a list that is linked in both directions and lies in text order
    int32_t  id;        // -1 once it was merged into its left neighbour
    int32_t  previous, next;
    uint32_t at; // where its text begins in the run
} symbol;

typedef struct candidate { // a pair of neighbours that may merge
    uint32_t rank;
    int32_t  at; // index of the left symbol
    int32_t  left, right, merged;
} candidate;

struct bpe_work {
    symbol    *symbols;
    candidate *heap; // the smallest (rank, at) on top
    int64_t    n_symbols, symbols_capacity, n_heap, heap_capacity;
    tok_text   name;
};

void tok_bpe_work_free(tok_session *s) {
    if (s->work == NULL) return;
    kvq_free(s->ctx, s->work->symbols);
    kvq_free(s->ctx, s->work->heap);
    kvq_free(s->ctx, s->work->name.data);
    kvq_free(s->ctx, s->work);
    s->work = NULL;
}

static bool earlier(candidate a, candidate b) { return a.rank != b.rank ? a.rank < b.rank : a.at < b.at; }

static kvq_status heap_push(tok_session *s, candidate c) {
    struct bpe_work *w = s->work;
    void            *data = w->heap;
    kvq_status       status = tok_grow(s->ctx, w->n_heap, &w->heap_capacity, sizeof *w->heap, &data, s->err);
    if (status != KVQ_OK) return status;
    w->heap = data;
    int64_t i = w->n_heap++;
    for (; i > 0 && earlier(c, w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = c;
    return KVQ_OK;
}

static candidate heap_pop(struct bpe_work *w) {
    candidate top = w->heap[0], moved = w->heap[--w->n_heap];
    int64_t   i = 0;
    for (int64_t child; (child = 2 * i + 1) < w->n_heap; i = child) {
        if (child + 1 < w->n_heap && earlier(w->heap[child + 1], w->heap[child])) child++;
        if (!earlier(w->heap[child], moved)) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = moved;
    return top;
}

static kvq_status consider(tok_session *s, int32_t at) {
    const symbol *symbols = s->work->symbols;
    if (at < 0 || symbols[at].next < 0) return KVQ_OK;
    int32_t         left = symbols[at].id, right = symbols[symbols[at].next].id;
    const tok_pair *pair = tok_pairs_find(&s->tokenizer->bpe.merges, (uint32_t)left, (uint32_t)right);
    return pair == NULL ? KVQ_OK : heap_push(s, (candidate){pair->rank, at, left, right, pair->merged});
}

static kvq_status merge_all(tok_session *s) {
    kvq_status       status = KVQ_OK;
    struct bpe_work *w = s->work;
    w->n_heap = 0;
    for (int64_t i = 0; i < w->n_symbols; i++) KVQ_TRY(consider(s, (int32_t)i));
    while (w->n_heap > 0) {
        candidate c = heap_pop(w);
        symbol   *left = &w->symbols[c.at];
        if (left->id != c.left || left->next < 0 || w->symbols[left->next].id != c.right)
            continue; // one of the two has changed since
        symbol *right = &w->symbols[left->next];
        left->id = c.merged;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) w->symbols[left->next].previous = c.at;
        KVQ_TRY(consider(s, left->previous));
        KVQ_TRY(consider(s, c.at));
    }
done:
    return status;
}

static kvq_status push_symbol(tok_session *s, int32_t id, size_t at) {
    struct bpe_work *w = s->work;
    void            *data = w->symbols;
    kvq_status       status = tok_grow(s->ctx, w->n_symbols, &w->symbols_capacity, sizeof *w->symbols, &data, s->err);
    if (status != KVQ_OK) return status;
    w->symbols = data;
    int32_t i = (int32_t)w->n_symbols++;
    w->symbols[i] = (symbol){.id = id, .previous = i - 1, .next = -1, .at = (uint32_t)at};
    if (i > 0) w->symbols[i - 1].next = i;
    return KVQ_OK;
}

static kvq_status begin_with_bytes(tok_session *s, const char *text, size_t n) {
    const tok_bpe *bpe = &s->tokenizer->bpe;
    kvq_status     status = KVQ_OK;
    bool           after_unknown = false;
    for (size_t at = 0; at < n; at++) {
        int32_t id = bpe->bytes[(uint8_t)text[at]];
        bool    unknown = id < 0;
        if (unknown && bpe->unk_id < 0) {
            return kvq_fail(s->err, KVQ_ERR_INPUT,
                            "remove the character from the text, or use the tokenizer the text was written for",
                            "the tokenizer has no token for the byte 0x%02X of the text, and none for unknown ones",
                            (unsigned)(uint8_t)text[at]);
        }
        if (!(unknown && after_unknown && bpe->fuse_unk)) KVQ_TRY(push_symbol(s, unknown ? bpe->unk_id : id, at));
        after_unknown = unknown;
    }
done:
    return status;
}

static kvq_status begin_with_characters(tok_session *s, const char *text, size_t n) {
    const tok_bpe *bpe = &s->tokenizer->bpe;
    kvq_status     status = KVQ_OK;
    uint32_t       c;
    for (size_t at = 0, length; at < n; at += length) {
        length = utf8_decode(text + at, n - at, &c);
        if (length == 0) return kvq_fail(s->err, KVQ_ERR_INTERNAL, NULL, "malformed text behind the normalizer");
        int32_t id = tok_table_find(&bpe->vocabulary, text + at, length);
        if (id >= 0) {
            KVQ_TRY(push_symbol(s, id, at));
        } else {
            for (size_t i = at; i < at + length; i++) KVQ_TRY(push_symbol(s, bpe->bytes[(uint8_t)text[i]], i));
        }
    }
done:
    return status;
}

// Encodes text that no rule and no cache concerns any more.
static kvq_status encode_run(tok_session *s, const char *text, size_t n) {
    const tok_bpe *bpe = &s->tokenizer->bpe;
    kvq_status     status = KVQ_OK;
    s->work->n_symbols = 0;
    KVQ_TRY(bpe->byte_level ? begin_with_bytes(s, text, n) : begin_with_characters(s, text, n));
    KVQ_TRY(merge_all(s));
    for (int32_t i = s->work->n_symbols > 0 ? 0 : -1, next; i >= 0; i = next) {
        symbol here = s->work->symbols[i];
        next = here.next;
        if (here.id < bpe->n_ids) {
            KVQ_TRY(tok_ids_push(s->ctx, s->ids, here.id, s->err));
            continue;
        }
        size_t end = next >= 0 ? s->work->symbols[next].at : n; // a stepping stone that nothing was built on
        for (size_t b = here.at; b < end; b++)
            KVQ_TRY(tok_ids_push(s->ctx, s->ids, bpe->bytes[(uint8_t)text[b]], s->err));
    }
done:
    return status;
}

// With ignore_merges a piece that is a token as a whole is that token, whatever the merges would make of it.
static kvq_status encode_whole(tok_session *s, const char *piece, size_t n, bool *done) {
    const tok_bpe *bpe = &s->tokenizer->bpe;
    kvq_status     status = KVQ_OK;
    tok_text      *name = &s->work->name; // the piece in the vocabulary's spelling
    name->n = 0;
    for (size_t i = 0; bpe->byte_level && i < n; i++) {
        char character[4];
        KVQ_TRY(tok_text_append(s->ctx, name, character, tok_byte_character((uint8_t)piece[i], character), s->err));
    }
    int32_t id = bpe->byte_level ? tok_table_find(&bpe->vocabulary, name->data, name->n)
                                 : tok_table_find(&bpe->vocabulary, piece, n);
    *done = id >= 0 && id < bpe->n_ids;
    if (*done) status = tok_ids_push(s->ctx, s->ids, id, s->err);
done:
    return status;
}

// ---------------------------------------------------------------- pieces

static kvq_status append_ids(tok_session *s, const kvq_ids *from, size_t start, size_t end, kvq_ids *to) {
    kvq_status status = KVQ_OK;
    for (size_t i = start; i < end; i++) KVQ_TRY(tok_ids_push(s->ctx, to, from->data[i], s->err));
done:
    return status;
}

static kvq_status remember(tok_session *s, const char *text, size_t n, size_t first_id) {
    kvq_status status = KVQ_OK;
    if (s->n_cached == CACHED_PIECES) {
        tok_table_free(s->ctx, &s->cache);
        s->n_cached = s->cached_ids.count = 0;
    }
    void  *data = s->cached;
    size_t start = (size_t)s->cached_ids.count;
    KVQ_TRY(tok_grow(s->ctx, s->n_cached, &s->cached_capacity, sizeof *s->cached, &data, s->err));
    s->cached = data;
    KVQ_TRY(append_ids(s, s->ids, first_id, (size_t)s->ids->count, &s->cached_ids));
    s->cached[s->n_cached] = (tok_span){start, (size_t)s->cached_ids.count};
    KVQ_TRY(tok_table_put(s->ctx, &s->cache, text, n, (int32_t)s->n_cached++, s->err));
done:
    return status;
}

static kvq_status encode_cached(tok_session *s, const char *text, size_t n) {
    const tok_bpe *bpe = &s->tokenizer->bpe;
    kvq_status     status = KVQ_OK;
    bool           cached = n <= CACHED_BYTES;
    int32_t        hit = cached ? tok_table_find(&s->cache, text, n) : -1;
    if (hit >= 0) return append_ids(s, &s->cached_ids, s->cached[hit].start, s->cached[hit].end, s->ids);
    size_t start = (size_t)s->ids->count;
    bool   whole = false;
    if (bpe->ignore_merges && bpe->byte_level) KVQ_TRY(encode_whole(s, text, n, &whole));
    if (!whole) KVQ_TRY(encode_run(s, text, n));
    if (cached) KVQ_TRY(remember(s, text, n, start));
done:
    return status;
}

// Cuts where no merge can cross: no rule has the character before as the last of its left part and the character behind
// as the first of its right part. Merges on the two sides cannot see each other, so the order between them is free.
static kvq_status encode_characters(tok_session *s, const char *text, size_t n) {
    const tok_pairs *touching = &s->tokenizer->bpe.touching;
    kvq_status       status = KVQ_OK;
    size_t           start = 0;
    uint32_t         before = 0, c = 0;
    for (size_t at = 0, length; at < n; at += length, before = c) {
        length = utf8_decode(text + at, n - at, &c);
        if (length == 0) return kvq_fail(s->err, KVQ_ERR_INTERNAL, NULL, "malformed text behind the normalizer");
        if (at == 0 || tok_pairs_find(touching, before, c) != NULL) continue;
        KVQ_TRY(encode_cached(s, text + start, at - start));
        start = at;
    }
    status = encode_cached(s, text + start, n - start);
done:
    return status;
}

// A byte-level piece may be merged into one token up to its end, and so may any that is looked up as a whole first.
size_t tok_bpe_certain(const tok_bpe *bpe, const char *piece, size_t n) {
    uint32_t c = 0;
    if (bpe->byte_level || bpe->ignore_merges) return 0;
    for (size_t at = n, behind = n; at > 0; behind = at) {
        uint32_t after = c;
        for (at--; at > 0 && ((uint8_t)piece[at] & 0xc0) == 0x80;) at--;
        if (utf8_decode(piece + at, behind - at, &c) != behind - at) return 0; // for tok_bpe_encode to report
        if (behind < n && tok_pairs_find(&bpe->touching, c, after) == NULL) return behind;
    }
    return 0;
}

kvq_status tok_bpe_encode(tok_session *s, const char *piece, size_t n) {
    const tok_bpe *bpe = &s->tokenizer->bpe;
    kvq_status     status = KVQ_OK;
    bool           whole = false;
    if (s->work == NULL) KVQ_TRY(KVQ_NEW(s->ctx, 1, "merge state", &s->work, s->err));
    if (bpe->byte_level) return encode_cached(s, piece, n);
    if (bpe->ignore_merges) KVQ_TRY(encode_whole(s, piece, n, &whole));
    if (!whole) status = encode_characters(s, piece, n);
done:
    return status;
}
