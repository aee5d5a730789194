// SPDX-License-Identifier: Apache-2.0
//
// Characters of UTF-8 text and the repair of malformed text. Decoding and categories are utf8proc's; what it does not
// offer is how much of a malformed text one U+FFFD stands for.
#include <utf8proc.h>

#include "tokenizer_impl.h"

size_t utf8_decode(const char *text, size_t n, uint32_t *code_point) {
    uint8_t first = (uint8_t)text[0];
    if (first < 0x80) {
        *code_point = first;
        return 1;
    }
    utf8proc_int32_t value;
    utf8proc_ssize_t length = utf8proc_iterate((const utf8proc_uint8_t *)text, n < 4 ? (utf8proc_ssize_t)n : 4, &value);
    if (length <= 0) return 0;
    *code_point = (uint32_t)value;
    return (size_t)length;
}

size_t utf8_encode(uint32_t code_point, char out[4]) {
    return (size_t)utf8proc_encode_char((utf8proc_int32_t)code_point, (utf8proc_uint8_t *)out);
}

size_t kvq_utf8_valid_prefix(const char *text, size_t n) {
    uint32_t code_point;
    size_t   at = 0;
    for (size_t length; at < n; at += length) {
        length = utf8_decode(text + at, n - at, &code_point);
        if (length == 0) break;
    }
    return at;
}

bool utf8_is_valid(const char *text, size_t n) { return kvq_utf8_valid_prefix(text, n) == n; }

bool utf8_is_white_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool utf8_is_number(uint32_t c) {
    if (c < 0x80) return c >= '0' && c <= '9';
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)c);
    return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO;
}

bool utf8_begins_form(uint32_t c) { return c < 0x80 || c == 0x3001 || c == 0x3002 || (c >= 0x4e00 && c <= 0x9fff); }

// Whatever precedes it, a byte that is no continuation byte begins something new, well-formed or not; so a text may be
// cut before it, and there is no need to look further back than the longest character goes.
size_t utf8_unfinished(const char *text, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t byte = (uint8_t)text[n - back];
        if ((byte & 0xc0) == 0x80) continue;
        size_t expected = byte < 0xc0 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
        return expected > back ? back : 0;
    }
    return 0;
}

// Length of the maximal part of text that could begin a well-formed sequence but does not go on as one, at least 1.
// The second byte's range depends on the first: table 3-7 of the Unicode Standard, version 15.
static size_t ill_formed_length(const uint8_t *text, size_t n) {
    uint8_t first = text[0];
    if (first < 0xc2 || first > 0xf4) return 1;
    size_t  expected = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    uint8_t low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    uint8_t high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    size_t  length = 1;
    while (length < expected && length < n && text[length] >= low && text[length] <= high) {
        length++;
        low = 0x80;
        high = 0xbf;
    }
    return length;
}

kvq_status utf8_repair(const kvq_context *ctx, const char *text, size_t n, bool each_byte, tok_text *out,
                       kvq_error *err) {
    kvq_status status = KVQ_OK;
    size_t     good = 0; // what lies before is in `out`
    for (size_t at = 0; at < n;) {
        uint32_t code_point;
        size_t   length = utf8_decode(text + at, n - at, &code_point);
        if (length > 0) {
            at += length;
            continue;
        }
        KVQ_TRY(tok_text_append(ctx, out, text + good, at - good, err));
        KVQ_TRY(tok_text_append(ctx, out, "\xef\xbf\xbd", 3, err));
        at += each_byte ? 1 : ill_formed_length((const uint8_t *)text + at, n - at);
        good = at;
    }
    status = tok_text_append(ctx, out, text + good, n - good, err);
done:
    return status;
}
