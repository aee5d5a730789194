// SPDX-License-Identifier: Apache-2.0
//
// Tokens that are looked for in the text as a whole, before any merging: control tokens such as "<s>", and words that
// were added to a vocabulary later. Leftmost first, the longest of those that begin at the same place.
#include <stdlib.h>
#include <string.h>

#include "tokenizer_impl.h"

kvq_status tok_added_put(const kvq_context *ctx, tok_added *added, const char *text, size_t n, tok_added_token like,
                         kvq_error *err) {
    kvq_status status = KVQ_OK;
    void      *data = added->data;
    char      *copy = NULL;
    KVQ_TRY(tok_grow(ctx, added->n, &added->capacity, sizeof *added->data, &data, err));
    added->data = data;
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)n + 1, "added token", &copy, err));
    memcpy(copy, text, n);
    like.text = copy;
    like.n = n;
    added->data[added->n++] = like;
done:
    return status;
}

static int compare_texts(const void *pa, const void *pb) {
    const tok_added_token *a = pa, *b = pb;
    int                    order = memcmp(a->text, b->text, a->n < b->n ? a->n : b->n);
    return order != 0 ? order : (a->n > b->n) - (a->n < b->n);
}

void tok_added_finish(tok_added *added) {
    if (added->n > 0) qsort(added->data, (size_t)added->n, sizeof *added->data, compare_texts);
    int64_t i = 0;
    for (int c = 0; c < 257; c++) {
        while (i < added->n && (uint8_t)added->data[i].text[0] < c) i++;
        added->first[c] = i;
    }
    for (i = 0; i < added->n; i++) added->swallows_back = added->swallows_back || added->data[i].lstrip;
}

void tok_added_free(const kvq_context *ctx, tok_added *added) {
    for (int64_t i = 0; i < added->n; i++) kvq_free(ctx, added->data[i].text);
    kvq_free(ctx, added->data);
    *added = (tok_added){0};
}

// First index in [low, high) whose byte at `depth` is at least `byte`. All of them are longer than depth, agree before
// it.
static int64_t lower_bound(const tok_added *added, int64_t low, int64_t high, size_t depth, int byte) {
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if ((uint8_t)added->data[middle].text[depth] < byte) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// The longest token that begins at text, and whether the text ends before a longer one could be told from it. The
// sorted list is used like a trie: with each byte the range of tokens that agree so far becomes narrower, and a token
// that ends here is the first of its range.
static const tok_added_token *longest_at(const tok_added *added, const char *text, size_t n, bool parse_special,
                                         bool *unfinished) {
    const tok_added_token *best = NULL;
    uint8_t                first = (uint8_t)text[0];
    int64_t                low = added->first[first], high = added->first[first + 1];
    for (size_t depth = 1; low < high; depth++) {
        while (low < high && added->data[low].n == depth) {
            if (parse_special || !added->data[low].special) best = &added->data[low];
            low++;
        }
        *unfinished = depth == n && low < high;
        if (depth == n) break;
        uint8_t byte = (uint8_t)text[depth];
        low = lower_bound(added, low, high, depth, byte);
        high = lower_bound(added, low, high, depth, byte + 1);
    }
    return best;
}

static size_t skip_white_space(const char *text, size_t n, size_t at) {
    uint32_t c;
    for (size_t length; at < n; at += length) {
        length = utf8_decode(text + at, n - at, &c);
        if (length == 0 || !utf8_is_white_space(c)) break;
    }
    return at;
}

static size_t skip_white_space_back(const char *text, size_t from, size_t at) {
    while (at > from) {
        size_t   before = at - 1;
        uint32_t c;
        while (before > from && ((uint8_t)text[before] & 0xc0) == 0x80) before--;
        if (utf8_decode(text + before, at - before, &c) == 0 || !utf8_is_white_space(c)) break;
        at = before;
    }
    return at;
}

const tok_added_token *tok_added_next(const tok_added *added, const char *text, size_t n, size_t from, bool open,
                                      bool parse_special, tok_span *where) {
    size_t at = from;
    for (; at < n && added->n > 0; at++) {
        bool                   unfinished = false;
        const tok_added_token *token = longest_at(added, text + at, n - at, parse_special, &unfinished);
        if (open && unfinished) break;
        if (token == NULL) continue;
        size_t end = token->rstrip ? skip_white_space(text, n, at + token->n) : at + token->n;
        if (open && token->rstrip && end == n) break; // there may be more of the white space
        where->start = token->lstrip ? skip_white_space_back(text, from, at) : at;
        where->end = end;
        return token;
    }
    if (added->n == 0) at = n;
    if (open && added->swallows_back) at = skip_white_space_back(text, from, at);
    where->start = where->end = at;
    return NULL;
}
