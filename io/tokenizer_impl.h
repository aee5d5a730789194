// SPDX-License-Identifier: Apache-2.0
//
// Private to the tokenizer files of io. A text becomes ids in four steps, each with a file of its own:
//
//     added_tokens.c   cuts out the tokens that are written in the text as a whole ("<s>")
//     rules.c          rewrites and splits what lies between them (normalizer and pre-tokenizer of the file)
//     patterns.c       finds what the rules speak of: literal strings, regular expressions, digits
//     bpe.c            merges the characters or bytes of each piece into tokens
//
// encoder.c takes a text that arrives in parts through these steps. Each step passes on what is certain, that is, what
// nothing that follows can change, and keeps the rest until there is more; so the ids do not depend on the parts.
//
// tokenizer_json.c and tokenizer_gguf.c fill the same description, struct kvq_tokenizer, from the two file forms, and
// tokenizer.c runs it. A tokenizer never changes after it was opened, so several threads may share one; everything
// that changes during a text lives in a tok_session.
#ifndef KVQ_IO_TOKENIZER_IMPL_H
#define KVQ_IO_TOKENIZER_IMPL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "kvq_io.h"

// ---------------------------------------------------------------- containers (tok_tables.c)

typedef struct tok_text { // growing bytes, not zero-terminated
    char  *data;
    size_t n, capacity;
} tok_text;
kvq_status tok_text_append(const kvq_context *ctx, tok_text *text, const char *data, size_t n, kvq_error *err);
kvq_status tok_ids_push(const kvq_context *ctx, kvq_ids *ids, int32_t id, kvq_error *err);

// Makes room for one more element of an array that doubles.
kvq_status tok_grow(const kvq_context *ctx, int64_t n, int64_t *capacity, size_t size, void **data, kvq_error *err);

// Strings to numbers, open addressing. The keys are copied.
typedef struct tok_table {
    tok_text         keys;
    struct tok_slot *slots;
    size_t           n, n_slots; // n_slots is a power of two, at least 4/3 n
} tok_table;
int32_t tok_table_find(const tok_table *table, const char *key, size_t n); // -1 when absent
// A key with this value, NULL when there is none; looks through all.
const char *tok_table_key(const tok_table *table, int32_t value, size_t *n);
kvq_status  tok_table_put(const kvq_context *ctx, tok_table *table, const char *key, size_t n, int32_t value,
                          kvq_error *err);
void        tok_table_free(const kvq_context *ctx, tok_table *table);

// Pairs of numbers below 2^31 to a rank and a number.
typedef struct tok_pair {
    uint64_t key; // left << 32 | right; TOK_NO_PAIR in a free slot
    uint32_t rank;
    int32_t  merged;
} tok_pair;
#define TOK_NO_PAIR UINT64_MAX
typedef struct tok_pairs {
    tok_pair *slots;
    size_t    n, n_slots;
} tok_pairs;
const tok_pair *tok_pairs_find(const tok_pairs *pairs, uint32_t left, uint32_t right); // NULL when absent
// Replaces what is there.
kvq_status tok_pairs_put(const kvq_context *ctx, tok_pairs *pairs, uint32_t left, uint32_t right, uint32_t rank,
                         int32_t merged, kvq_error *err);
void       tok_pairs_free(const kvq_context *ctx, tok_pairs *pairs);

// ---------------------------------------------------------------- characters (utf8.c)

#define UTF8_BLANK_MARK "\xe2\x96\x81" // U+2581, SentencePiece's blank

// Code point and length of the character at text[0..n), n > 0; 0 when it is malformed.
size_t utf8_decode(const char *text, size_t n, uint32_t *code_point);
size_t utf8_encode(uint32_t code_point, char out[4]);
bool   utf8_is_valid(const char *text, size_t n);
bool   utf8_is_white_space(uint32_t code_point); // the Unicode property White_Space
bool   utf8_is_number(uint32_t code_point);      // general category Nd, Nl or No
// A character before which a text can be cut so that the normal forms of the two parts make up that of the whole: it is
// a starter, has no decomposition, and is never composed with what stands before it. True for ASCII and the unified
// ideographs with their full stop and comma; other characters that would do are not looked for.
bool utf8_begins_form(uint32_t code_point);
// Bytes of an unfinished character at the end of text[0, n), 0 to 3.
size_t utf8_unfinished(const char *text, size_t n);
// Appends text with everything malformed replaced by U+FFFD: one for each maximal ill-formed part (Unicode 15, section
// 3.9, as Python and Rust do), or one for each byte (as SentencePiece does).
kvq_status utf8_repair(const kvq_context *ctx, const char *text, size_t n, bool each_byte, tok_text *out,
                       kvq_error *err);

// ---------------------------------------------------------------- patterns (patterns.c)

typedef struct tok_pattern { // exactly one of the three
    char       *literal;
    size_t      n_literal;
    pcre2_code *regex;
    bool        numbers; // one character that utf8_is_number
    bool        whole;   // a regex that looks back, or may match nothing: where it matches depends on all of the text
} tok_pattern;

extern const char TOK_PATTERN_GPT2[]; // what a ByteLevel pre-tokenizer splits with

// `where` names file and field in messages.
kvq_status tok_pattern_literal(const kvq_context *ctx, const char *text, tok_pattern *out, kvq_error *err);
kvq_status tok_pattern_regex(const kvq_context *ctx, const char *where, const char *text, tok_pattern *out,
                             kvq_error *err);
void       tok_pattern_free(const kvq_context *ctx, tok_pattern *pattern);

// What PCRE2 needs while it matches; not shareable between threads.
typedef struct tok_matcher {
    pcre2_match_data    *data;
    pcre2_match_context *context;
    pcre2_jit_stack     *stack;
} tok_matcher;
kvq_status tok_matcher_create(tok_matcher *out, kvq_error *err);
void       tok_matcher_destroy(tok_matcher *matcher);

// Walks over the matches in text[0, n), left to right, not overlapping. An empty match is given too, but never right
// behind another match. When the text may go on behind n, only matches are given that stay what they are whatever
// follows, and the walk ends where the first that might change could begin.
typedef struct tok_walk {
    const tok_pattern *pattern;
    const char        *text;
    size_t             n, from;
    bool               open;       // the text may go on
    size_t             start, end; // the match
    size_t             certain;    // when there is none: text[from, certain) holds no beginning of one
    bool               any;        // there was a match before
} tok_walk;
kvq_status tok_walk_next(const tok_matcher *matcher, tok_walk *walk, bool *found, kvq_error *err);

// ---------------------------------------------------------------- rules (rules.c)

typedef enum tok_rule_kind {
    TOK_RULE_FORM,    // a Unicode normal form
    TOK_RULE_PREPEND, // put `text` in front
    TOK_RULE_REPLACE, // every match by `text`
    TOK_RULE_SPLIT,   // cut at the matches
} tok_rule_kind;

// What becomes of the matches of a split; the names are those of the file format.
typedef enum tok_behavior {
    TOK_REMOVED,
    TOK_ISOLATED,
    TOK_MERGED_WITH_PREVIOUS,
    TOK_MERGED_WITH_NEXT,
    TOK_CONTIGUOUS
} tok_behavior;

// Which pieces get the prepended text. Metaspace and ByteLevel do not repeat a prefix that is there already.
typedef enum tok_prepend { TOK_PREPEND_ANY, TOK_PREPEND_MISSING, TOK_PREPEND_MISSING_FIRST } tok_prepend;

typedef struct tok_rule {
    tok_rule_kind kind;
    int           form; // utf8proc options
    char         *text;
    size_t        n_text;
    tok_prepend   prepend;
    tok_pattern   pattern;
    tok_behavior  behavior;
    bool          invert; // a split at what does not match
} tok_rule;

typedef struct tok_rules {
    tok_rule *data;
    int64_t   n, capacity;
    // What tok_rules_finish finds out. Rewriting by parts gives the same as rewriting the whole when the text is cut
    // anywhere between characters, with a normal form before a character that utf8_begins_form.
    int64_t n_rewriting; // rules before the first split
    bool    rewrites_parts, has_form;
    bool    splits_parts; // the rules from the first split on can be applied to a text whose end is not known
} tok_rules;
// Appends an empty rule of a kind, to be filled in. The pointer holds until the next call.
kvq_status tok_rules_add(const kvq_context *ctx, tok_rules *rules, tok_rule_kind kind, const char *text, tok_rule **out,
                         kvq_error *err);
void       tok_rules_finish(tok_rules *rules); // to be called once, after the last rule was filled in
void       tok_rules_free(const kvq_context *ctx, tok_rules *rules);

// Text between two added tokens, or a part of it.
typedef struct tok_part {
    const char *text;
    size_t      n;
    bool        at_start;  // it begins where the whole text begins
    bool        continues; // its beginning was dealt with before: nothing is put in front
    bool        open;      // it may go on; for splits only
} tok_part;

typedef struct tok_span {
    size_t start, end;
} tok_span;
typedef struct tok_pieces {
    tok_text  text;
    tok_span *spans; // into text, none empty
    int64_t   n, capacity;
    bool      at_start; // the first piece begins where the text begins
    // Of an open text: the piece that is not complete, as far as it is certain; from where the rules can be applied
    // anew with the same result; and the end of the last match in a piece that is not complete: anew means there, at
    // `resume`, or behind.
    bool     open;
    tok_span rest;
    size_t   resume, last_match;
} tok_pieces;
void tok_pieces_free(const kvq_context *ctx, tok_pieces *pieces);

// ---------------------------------------------------------------- added tokens (added_tokens.c)

typedef struct tok_added_token {
    char   *text;
    size_t  n;
    int32_t id;
    bool    special;        // ordinary text unless special tokens are parsed
    bool    lstrip, rstrip; // swallows white space on that side
} tok_added_token;

typedef struct tok_added {
    tok_added_token *data;
    int64_t          n, capacity;
    int64_t          first[257];    // tokens that begin with byte c: [first[c], first[c + 1])
    bool             swallows_back; // some token has lstrip
} tok_added;
kvq_status tok_added_put(const kvq_context *ctx, tok_added *added, const char *text, size_t n, tok_added_token like,
                         kvq_error *err);
void       tok_added_finish(tok_added *added); // sorts; to be called once, after the last put
void       tok_added_free(const kvq_context *ctx, tok_added *added);
// The leftmost, then longest, token in text[from, n); its extent with the white space it swallows in *where. Without
// one, *where is empty and lies at n. When the text may go on (open), it lies where the first token could begin, or the
// white space that one could swallow, that what follows might complete or change.
const tok_added_token *tok_added_next(const tok_added *added, const char *text, size_t n, size_t from, bool open,
                                      bool parse_special, tok_span *where);

// ---------------------------------------------------------------- byte-pair encoding (bpe.c)

typedef struct tok_bpe {
    tok_table vocabulary; // token as the file writes it -> id
    tok_pairs merges;     // pair of ids -> rank and id of the result; the lowest rank merges first
    tok_pairs touching;   // pairs of characters between which some merge can happen; empty when byte_level
    int32_t   n_ids;      // largest id + 1; larger ids are stepping stones of merges that cannot be tokens themselves
    int32_t   bytes[256]; // byte_level: id of the byte; otherwise of its fallback piece "<0x0A>"; -1 = none
    int32_t   unk_id;     // for a byte without id; -1 = such a text is an error
    bool      byte_level, ignore_merges, fuse_unk;
} tok_bpe;

size_t tok_byte_character(int byte, char out[4]); // the character that stands for a byte in byte-level vocabularies

// Fills bytes[] from the vocabulary. A fallback that lacks a byte is an error.
kvq_status tok_bpe_find_bytes(tok_bpe *bpe, const char *where, kvq_error *err);
// left and right must be in the vocabulary, and so must be what they join to.
kvq_status tok_bpe_add_merge(const kvq_context *ctx, tok_bpe *bpe, const char *where, int64_t index, const char *left,
                             size_t n_left, const char *right, size_t n_right, kvq_error *err);
kvq_status tok_bpe_add_touching(const kvq_context *ctx, tok_bpe *bpe, const char *left, size_t n_left,
                                const char *right, size_t n_right, kvq_error *err);
void       tok_bpe_free(const kvq_context *ctx, tok_bpe *bpe);

// ---------------------------------------------------------------- the tokenizer and one text

struct kvq_tokenizer {
    kvq_tokenizer_info info;
    tok_added          raw; // looked for in the text as it is
    tok_rules          normalizer;
    tok_added          normalized; // looked for behind the normalizer
    tok_rules          splitter;
    tok_bpe            bpe;
};

typedef struct tok_session {
    const kvq_context   *ctx;
    const kvq_tokenizer *tokenizer;
    bool                 parse_special;
    tok_matcher          matcher;
    tok_pieces           normal, pieces, scratch;
    tok_table            cache;  // piece -> index into `cached`
    tok_span            *cached; // ids of a piece, as a span of cached_ids
    int64_t              n_cached, cached_capacity;
    kvq_ids              cached_ids;
    struct bpe_work     *work;
    kvq_ids             *ids; // where the result goes
    kvq_error           *err;
} tok_session;

// Replaces `pieces` by the single piece `part` and applies the rules one after the other.
kvq_status tok_apply_rules(tok_session *session, const tok_rule *rules, int64_t n_rules, tok_part part,
                           tok_pieces *pieces);
kvq_status tok_bpe_encode(tok_session *session, const char *piece, size_t n);
// How much of a piece that may go on can be encoded by itself.
size_t tok_bpe_certain(const tok_bpe *bpe, const char *piece, size_t n);
void   tok_bpe_work_free(tok_session *session);

// The two readers fill an empty tokenizer; on failure the caller frees what is there. They set info.sha256, bos_id,
// eos_id, adds_bos.
kvq_status tok_read_json(const kvq_context *ctx, const char *path, kvq_tokenizer *t, kvq_error *err);
kvq_status tok_read_gguf(const kvq_context *ctx, const char *path, kvq_tokenizer *t, kvq_error *err);

#endif
