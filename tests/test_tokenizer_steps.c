// SPDX-License-Identifier: Apache-2.0
// Tokenizer files in JSON: each step alone on vocabularies made here, what is refused, and where BOS and EOS come from.
// The expected pieces were compared with those of the `tokenizers` library, version 0.23.3.
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encode_parts.h"
#include "kvq_io.h"
#include "kvq_test.h"

// ---------------------------------------------------------------- files

static const char *write_file(const char *name, const char *text, size_t n) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(text, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
    return path;
}

static kvq_status open_tree(const kvq_context *ctx, const cJSON *root, kvq_tokenizer **out, kvq_error *err) {
    char       *text = cJSON_PrintUnformatted(root);
    const char *path = write_file("tokenizer.json", text, strlen(text));
    free(text);
    return kvq_tokenizer_open(ctx, path, out, err);
}

static kvq_tokenizer *open_good(const cJSON *root) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    kvq_test_ok(open_tree(&ctx, root, &t, &err), &err);
    return t;
}

// A byte as byte-level vocabularies spell it, written down independently of the library: printable Latin-1 stands for
// itself, 0x00-0x20, 0x7f-0xa0 and 0xad for U+0100 and on.
static void spell(const char *bytes, size_t n, char *out) {
    for (size_t i = 0; i < n; i++) {
        unsigned b = (uint8_t)bytes[i], c = b;
        if (b <= 0x20) c = 0x100 + b;
        if (b >= 0x7f && b <= 0xa0) c = 0x121 + (b - 0x7f);
        if (b == 0xad) c = 0x143;
        if (c < 0x80) {
            *out++ = (char)c;
        } else {
            *out++ = (char)(0xc0 | c >> 6);
            *out++ = (char)(0x80 | (c & 0x3f));
        }
    }
    *out = 0;
}

// Replaces root's member at "a.b.c" (which may be new) by a value given as JSON.
static void set(cJSON *root, const char *place, const char *json) {
    char   key[64] = "";
    cJSON *value = cJSON_Parse(json);
    ck_assert_msg(value != NULL, "not JSON: %s", json);
    for (const char *dot; (dot = strchr(place, '.')) != NULL; place = dot + 1) {
        (void)snprintf(key, sizeof key, "%.*s", (int)(dot - place), place);
        root = cJSON_GetObjectItemCaseSensitive(root, key);
    }
    cJSON_DeleteItemFromObjectCaseSensitive(root, place);
    cJSON_AddItemToObject(root, place, value);
}

// A vocabulary under construction: id i stands for texts[i].
enum { MAX_WORDS = 4000 };
typedef struct made {
    cJSON *root, *vocab;
    bool   byte_level;
    int    n;
    char  *texts[MAX_WORDS];
} made;

static int add_word(made *m, const char *text, size_t n) {
    char name[512];
    ck_assert_uint_lt(n, sizeof name / 2);
    if (m->byte_level) {
        spell(text, n, name);
    } else {
        (void)snprintf(name, sizeof name, "%.*s", (int)n, text);
    }
    const cJSON *old = cJSON_GetObjectItemCaseSensitive(m->vocab, name);
    if (old != NULL) return old->valueint;
    ck_assert_int_lt(m->n, MAX_WORDS);
    cJSON_AddNumberToObject(m->vocab, name, m->n);
    m->texts[m->n] = malloc(n + 1);
    memcpy(m->texts[m->n], text, n);
    m->texts[m->n][n] = 0;
    return m->n++;
}

// All bytes (ids 0..255), and one merge, of two zero bytes or two "<": a file without merges is refused.
static void make(made *m, bool byte_level) {
    memset(m, 0, sizeof *m);
    m->byte_level = byte_level;
    m->root =
        cJSON_Parse("{\"added_tokens\": [], \"normalizer\": null, \"pre_tokenizer\": null, \"post_processor\": null,"
                    " \"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}}");
    m->vocab = cJSON_GetObjectItem(cJSON_GetObjectItem(m->root, "model"), "vocab");
    for (int b = 0; b < 256; b++) {
        char text[8];
        text[0] = (char)b;
        if (!byte_level) (void)snprintf(text, sizeof text, "<0x%02X>", (unsigned)b);
        (void)add_word(m, text, byte_level ? 1 : 6);
    }
    if (byte_level) {
        set(m->root, "pre_tokenizer", "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}");
        (void)add_word(m, "\0\0", 2);
        set(m->root, "model.merges", "[[\"\\u0100\", \"\\u0100\"]]");
    } else {
        set(m->root, "model.byte_fallback", "true");
        (void)add_word(m, "<", 1);
        (void)add_word(m, "<<", 2);
        set(m->root, "model.merges", "[\"< <\"]");
    }
}

static void add_merge(made *m, const char *left, const char *right) {
    char   joined[128];
    cJSON *pair = cJSON_CreateArray();
    (void)snprintf(joined, sizeof joined, "%s%s", left, right);
    (void)add_word(m, left, strlen(left));
    (void)add_word(m, right, strlen(right));
    (void)add_word(m, joined, strlen(joined));
    cJSON_AddItemToArray(pair, cJSON_CreateString(left));
    cJSON_AddItemToArray(pair, cJSON_CreateString(right));
    cJSON_AddItemToArray(cJSON_GetObjectItem(cJSON_GetObjectItem(m->root, "model"), "merges"), pair);
}

static void unmake(made *m) {
    for (int i = 0; i < m->n; i++) free(m->texts[i]);
    cJSON_Delete(m->root);
}

// The tokens of a text as their own texts with bars between, "ab|c".
static void show(const made *m, const char *text, size_t n, bool parse_special, char *out, size_t size) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = open_good(m->root);
    kvq_ids        ids = {0};
    kvq_test_ok(kvq_tokenizer_encode(&ctx, t, text, n, parse_special, &ids, &err), &err);
    check_parts(t, text, n, parse_special, &ids, text);
    out[0] = 0;
    for (int64_t i = 0; i < ids.count; i++) {
        size_t used = strlen(out);
        ck_assert_int_lt(ids.data[i], m->n);
        (void)snprintf(out + used, size - used, "%s%s", i > 0 ? "|" : "", m->texts[ids.data[i]]);
    }
    kvq_ids_free(&ctx, &ids);
    kvq_tokenizer_close(&ctx, &t);
}

static void check_tokens(const made *m, const char *text, const char *expected) {
    char got[1024];
    show(m, text, strlen(text), false, got, sizeof got);
    ck_assert_msg(strcmp(got, expected) == 0, "'%s' gave '%s' instead of '%s'", text, got, expected);
}

// ---------------------------------------------------------------- splitting and rewriting

static bool at_character(const char *p) { return ((uint8_t)*p & 0xc0) != 0x80; }

static void add_substrings(made *m, const char *text) {
    for (const char *a = text; *a != 0; a++) {
        for (const char *b = a + 1; at_character(a); b++) {
            if (at_character(b)) (void)add_word(m, a, (size_t)(b - a));
            if (*b == 0) break;
        }
    }
}

// With ignore_merges and every substring a token, each piece is one token: what is shown is how the text was cut.
static void check_pieces(const char *normalizer, const char *pre_tokenizer, const char *text, const char *expected) {
    static made m;
    char        copy[512];
    make(&m, strstr(pre_tokenizer, "ByteLevel") != NULL);
    set(m.root, "normalizer", normalizer);
    set(m.root, "pre_tokenizer", pre_tokenizer);
    set(m.root, "model.ignore_merges", "true");
    add_substrings(&m, text);
    (void)snprintf(copy, sizeof copy, "%s", expected);
    for (char *piece = strtok(copy, "|"); piece != NULL; piece = strtok(NULL, "|")) add_substrings(&m, piece);
    check_tokens(&m, text, expected);
    unmake(&m);
}

#define BYTES      "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define WITH(step) "{\"type\":\"Sequence\",\"pretokenizers\":[" step "," BYTES "]}"
#define SPLIT(pattern, behavior)                                                                                       \
    WITH("{\"type\":\"Split\",\"pattern\":" pattern ",\"behavior\":\"" behavior "\",\"invert\":false}")
#define REGEX(pattern) SPLIT("{\"Regex\":\"" pattern "\"}", "Isolated")

START_TEST(patterns_cut_as_their_models_do) {
    static const char GPT2[] = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}";
    static const char LLAMA3[] = REGEX("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{"
                                       "1,3}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|"
                                       "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+");
    static const char QWEN2[] = REGEX("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}| "
                                      "?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|"
                                      "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+");
    check_pieces("null", GPT2, "I'm sure it'S 1234x  a\n\n b!?", "I|'m| sure| it|'|S| 1234|x| | a|\n\n| b|!?");
    check_pieces("null", GPT2, "caf\u00e9 \u00b2\u00bd \u4e2d", "caf\u00e9| \u00b2\u00bd| \u4e2d");
    check_pieces("null", LLAMA3, "it'S 1234567 x\u00b2  a\n\n b!?\n", "it|'S| |123|456|7| x|\u00b2| | a|\n\n| b|!?\n");
    check_pieces("null", QWEN2, "it'S 123 (x)  \r\n y", "it|'S| |1|2|3| (|x|)|  \r\n| y");
    // White space is the Unicode property: U+0085 and U+3000 have it, U+180E and U+200B have not.
    check_pieces("null", GPT2, "a\xc2\x85\u3000b", "a|\xc2\x85|\u3000|b");
    check_pieces("null", GPT2, "a\u180e\u200bb", "a|\u180e\u200b|b");
    check_pieces("null", REGEX("\\\\d"), "a1\u0663\u00bdb", "a|1|\u0663|\u00bdb"); // \d is the category Nd
    check_pieces("null", REGEX("^a|b$"), "ab\nab", "a|b|\n|a|b");                  // ends of lines, not of the text
    // Letter case folds as Unicode says: U+017F is a form of s.
    check_pieces("null", LLAMA3, "a'\u017f b", "a|'\u017f| b");
}
END_TEST

START_TEST(split_behaviors_keep_matches_where_they_say) {
    static const char *const SPLITS[][2] = {
        {SPLIT("{\"String\":\"-\"}", "Isolated"), "a|-|b|-|-|c|-"},
        {SPLIT("{\"String\":\"-\"}", "Removed"), "a|b|c"},
        {SPLIT("{\"String\":\"-\"}", "MergedWithPrevious"), "a-|b-|-|c-"},
        {SPLIT("{\"String\":\"-\"}", "MergedWithNext"), "a|-b|-|-c|-"},
        {SPLIT("{\"String\":\"-\"}", "Contiguous"), "a|-|b|--|c|-"},
        {WITH("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a-c]\"},\"behavior\":\"Removed\",\"invert\":true}"),
         "a|b|c"},
        {WITH("{\"type\":\"Split\",\"pattern\":{\"String\":\"-\"},\"behavior\":\"MergedWithNext\",\"invert\":true}"),
         "a-|b-|-|c-"},
        {REGEX("x*"), "a|-|b|-|-|c|-"}, // empty matches cut too
        {REGEX("^a|b(?=-)|c$"), "a|-|b|--c-"},
        {BYTES, "a-b--c-"},
    };
    for (size_t i = 0; i < sizeof SPLITS / sizeof *SPLITS; i++)
        check_pieces("null", SPLITS[i][0], "a-b--c-", SPLITS[i][1]);
}
END_TEST

START_TEST(digits_are_all_characters_of_number_categories) {
    static const char SINGLE[] = WITH("{\"type\":\"Digits\",\"individual_digits\":true}");
    static const char RUNS[] = WITH("{\"type\":\"Digits\",\"individual_digits\":false}");
    check_pieces("null", SINGLE, "a12 \u00bd\u0663\u2167b", "a|1|2| |\u00bd|\u0663|\u2167|b");
    check_pieces("null", RUNS, "a12 \u00bd\u0663\u2167b", "a|12| |\u00bd\u0663\u2167|b");
}
END_TEST

START_TEST(byte_level_prefixes_a_space_once) {
    static const char PREFIX[] = "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}";
    check_pieces("null", PREFIX, "ab cd", " ab| cd");
    check_pieces("null", PREFIX, " ab", " ab");
}
END_TEST

#define METASPACE(scheme, split)                                                                                       \
    "{\"type\":\"Metaspace\",\"replacement\":\"\u2581\",\"prepend_scheme\":\"" scheme "\",\"split\":" split "}"

START_TEST(metaspace_schemes) {
    check_pieces("null", METASPACE("always", "true"), "ab  c", "\u2581ab|\u2581|\u2581c");
    check_pieces("null", METASPACE("never", "true"), "ab c", "ab|\u2581c");
    check_pieces("null", METASPACE("first", "true"), " ab", "\u2581ab");
    check_pieces("null", METASPACE("always", "false"), "ab  c", "\u2581ab\u2581\u2581c");
    check_pieces("null", "{\"type\":\"Metaspace\",\"replacement\":\"\u2581\",\"add_prefix_space\":false}", "ab c",
                 "ab|\u2581c");
    // "first" is the first piece of the text, not of what another step leaves of it
    static const char BEHIND[] = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{"
                                 "\"String\":\"-\"},\"behavior\":\"Removed\"}," METASPACE("first", "false") "]}";
    check_pieces("null", BEHIND, "ab-c", "\u2581ab|c");
    check_pieces("null", BEHIND, "-ab-c", "ab|c");
}
END_TEST

START_TEST(normalizers_rewrite_the_text) {
    static const char *const FORMS[][3] = {
        {"{\"type\":\"NFC\"}", "e\u0301\ufb01", "\u00e9\ufb01"},
        {"{\"type\":\"NFD\"}", "\u00e9\ufb01", "e\u0301\ufb01"},
        {"{\"type\":\"NFKC\"}", "e\u0301\ufb01", "\u00e9fi"},
        {"{\"type\":\"NFKD\"}", "\u00e9\ufb01", "e\u0301fi"},
        {"{\"type\":\"Prepend\",\"prepend\":\"_\"}", "ab", "_ab"},
        {"{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"xy\"}", "aba", "xybxy"},
        {"{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"\\\\s+\"},\"content\":\" \"}", "a \t b", "a b"},
        {"{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\" "
         "\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"}]}",
         "a b", "_a_b"},
    };
    for (size_t i = 0; i < sizeof FORMS / sizeof *FORMS; i++)
        check_pieces(FORMS[i][0], BYTES, FORMS[i][1], FORMS[i][2]);
}
END_TEST

// ---------------------------------------------------------------- merging

START_TEST(lowest_rank_merges_first_then_the_leftmost) {
    static made m;
    make(&m, true);
    add_merge(&m, "b", "c");
    add_merge(&m, "a", "b");
    add_merge(&m, "x", "x");
    add_merge(&m, "xx", "xx");
    add_merge(&m, "ab", "bc"); // can only happen after two other merges
    check_tokens(&m, "abc", "a|bc");
    check_tokens(&m, "ab", "ab");
    check_tokens(&m, "abbc", "abbc");
    check_tokens(&m, "xxx", "xx|x");
    check_tokens(&m, "xxxxx", "xxxx|x");
    check_tokens(&m, "", "");
    unmake(&m);
}
END_TEST

START_TEST(ignore_merges_takes_whole_pieces_only) {
    static made m;
    make(&m, true);
    (void)add_word(&m, "abc", 3);
    add_merge(&m, "b", "c");
    check_tokens(&m, "abc", "a|bc");
    set(m.root, "model.ignore_merges", "true");
    check_tokens(&m, "abc", "abc");
    check_tokens(&m, "abcd", "a|bc|d");
    unmake(&m);
}
END_TEST

// Quadratic work on a million characters without a boundary would hit the suite's time limit.
START_TEST(a_long_run_is_merged_in_good_time) {
    enum { N = 1 << 20 };
    static made m;
    make(&m, true);
    add_merge(&m, "a", "a");
    add_merge(&m, "aa", "aa");
    add_merge(&m, "aaaa", "aaaa");
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = open_good(m.root);
    kvq_ids        ids = {0};
    char          *text = malloc(N);
    memset(text, 'a', N);
    kvq_test_ok(kvq_tokenizer_encode(&ctx, t, text, N, false, &ids, &err), &err);
    ck_assert_int_eq(ids.count, N / 8);
    for (int64_t i = 0; i < ids.count; i++) ck_assert_str_eq(m.texts[ids.data[i]], "aaaaaaaa");
    free(text);
    kvq_ids_free(&ctx, &ids);
    kvq_tokenizer_close(&ctx, &t);
    unmake(&m);
}
END_TEST

// Words of a text that arrives as one piece are independent only where no merge reaches across.
START_TEST(merges_may_cross_words) {
    static made m;
    make(&m, false);
    set(m.root, "normalizer", "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\u2581\"}");
    (void)add_word(&m, "c", 1);
    add_merge(&m, "b", "\u2581");
    add_merge(&m, "\u2581", "a");
    add_merge(&m, "b\u2581", "a");
    check_tokens(&m, "ab ab ac a", "a|b\u2581a|b\u2581a|c|\u2581a");
    unmake(&m);
}
END_TEST

START_TEST(missing_characters_fall_back_to_bytes) {
    static made m;
    make(&m, false);
    add_merge(&m, "a", "b");
    check_tokens(&m, "ab\u00e9b", "ab|<0xC3>|<0xA9>|b");
    unmake(&m);
}
END_TEST

START_TEST(a_byte_without_token_is_unknown_or_an_error) {
    static made    m;
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    kvq_ids        ids = {0};
    make(&m, true);
    (void)add_word(&m, "UNK", 3);
    cJSON_DeleteItemFromObjectCaseSensitive(m.vocab, "z");
    t = open_good(m.root);
    kvq_test_ok(kvq_tokenizer_encode(&ctx, t, "ab", 2, false, &ids, &err), &err);
    kvq_test_failed(kvq_tokenizer_encode(&ctx, t, "abz", 3, false, &ids, &err), KVQ_ERR_INPUT, &err, "byte 0x7A");
    ck_assert_int_eq(ids.count, 2); // appended to, and untouched by a failure
    kvq_tokenizer_close(&ctx, &t);
    kvq_ids_free(&ctx, &ids);
    set(m.root, "model.unk_token", "\"UNK\"");
    check_tokens(&m, "azzb", "a|UNK|UNK|b");
    set(m.root, "model.fuse_unk", "true");
    check_tokens(&m, "azzb", "a|UNK|b");
    unmake(&m);
}
END_TEST

START_TEST(malformed_text_follows_the_framework) {
    static const struct {
        const char *bytes, *by_part, *by_byte;
    } CASES[] = {
        {"a\xff"
         "b",
         "a|\ufffd|b", "a|\ufffd|b"},
        {"\xe4\xbd"
         "a",
         "\ufffd|a", "\ufffd\ufffd|a"}, // truncated: one part, two bytes
        {"\xf0\x9f\x98", "\ufffd", "\ufffd\ufffd|\ufffd"},
        {"\xed\xa0\x80", "\ufffd|\ufffd|\ufffd", "\ufffd\ufffd|\ufffd"}, // surrogate: no prefix of it is well-formed
        {"\xc0\xaf", "\ufffd|\ufffd", "\ufffd\ufffd"},                   // overlong
    };
    static made parts, bytes;
    char        got[256];
    make(&parts, true);
    set(parts.root, "model.ignore_merges", "true");
    set(parts.root, "pre_tokenizer", REGEX("."));
    (void)add_word(&parts, "\ufffd", 3);
    make(&bytes, false);
    (void)add_word(&bytes, "b", 1);
    (void)add_word(&bytes, "a", 1);
    add_merge(&bytes, "\ufffd", "\ufffd");
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        show(&parts, CASES[i].bytes, strlen(CASES[i].bytes), false, got, sizeof got);
        ck_assert_str_eq(got, CASES[i].by_part);
        show(&bytes, CASES[i].bytes, strlen(CASES[i].bytes), false, got, sizeof got);
        ck_assert_str_eq(got, CASES[i].by_byte);
    }
    unmake(&parts);
    unmake(&bytes);
}
END_TEST

// ---------------------------------------------------------------- added tokens

static void add_token(made *m, const char *text, const char *options) {
    char json[256];
    int  id = add_word(m, text, strlen(text));
    (void)snprintf(json, sizeof json, "{\"id\":%d,\"content\":\"%s\",\"single_word\":false,%s}", id, text, options);
    cJSON *token = cJSON_Parse(json);
    ck_assert_ptr_nonnull(token);
    cJSON_AddItemToArray(cJSON_GetObjectItem(m->root, "added_tokens"), token);
}

START_TEST(added_tokens_are_cut_out_first) {
    static made m;
    char        got[256];
    make(&m, true);
    add_merge(&m, "<", "s");
    add_token(&m, "<s>", "\"special\":true,\"normalized\":false");
    add_token(&m, "<s>x", "\"special\":false,\"normalized\":false");
    add_token(&m, "<l>", "\"special\":true,\"normalized\":false,\"lstrip\":true");
    add_token(&m, "<r>", "\"special\":true,\"normalized\":false,\"rstrip\":true");
    show(&m, "a<s>b", 5, true, got, sizeof got);
    ck_assert_str_eq(got, "a|<s>|b");
    show(&m, "a<s>b", 5, false, got, sizeof got);
    ck_assert_str_eq(got, "a|<s|>|b"); // special tokens are text unless asked for
    show(&m, "<s>x<s>", 7, true, got, sizeof got);
    ck_assert_str_eq(got, "<s>x|<s>"); // the longest
    show(&m, "<s>x<s>", 7, false, got, sizeof got);
    ck_assert_str_eq(got, "<s>x|<s|>"); // those that are not special always count
    show(&m, "a <l> b\u3000<r> \u3000 c", 19, true, got, sizeof got);
    ck_assert_str_eq(got, "a|<l>| |b|\xe3|\x80|\x80|<r>|c");
    unmake(&m);
}
END_TEST

// With prepend_scheme "first" a blank stands before the text alone, not before what follows a token.
START_TEST(text_behind_an_added_token_is_not_the_first) {
    static made m;
    make(&m, false);
    (void)add_word(&m, "a", 1);
    (void)add_word(&m, "\u2581", 3);
    set(m.root, "pre_tokenizer", METASPACE("first", "false"));
    add_token(&m, "<t>", "\"special\":false,\"normalized\":false");
    check_tokens(&m, "a<t>a a", "\u2581|a|<t>|a|\u2581|a");
    check_tokens(&m, "<t>a", "<t>|a");
    set(m.root, "pre_tokenizer", METASPACE("always", "false"));
    check_tokens(&m, "a<t>a", "\u2581|a|<t>|\u2581|a");
    unmake(&m);
}
END_TEST

START_TEST(normalized_tokens_are_found_behind_the_normalizer) {
    static made m;
    make(&m, true);
    set(m.root, "normalizer", "{\"type\":\"NFC\"}");
    add_token(&m, "\u00e9\u00e9", "\"special\":false,\"normalized\":true");
    check_tokens(&m, "xe\u0301e\u0301y", "x|\u00e9\u00e9|y");
    unmake(&m);
}
END_TEST

// ---------------------------------------------------------------- beginning and end of text

static void check_ends(const char *config, const char *model_config, int64_t bos, int64_t eos, bool adds_bos) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    (void)write_file("tokenizer_config.json", config, strlen(config));
    (void)write_file("config.json", model_config, strlen(model_config));
    kvq_test_ok(kvq_tokenizer_open(&ctx, kvq_test_folder(), &t, &err), &err);
    kvq_tokenizer_info info = kvq_tokenizer_describe(t);
    ck_assert_int_eq(info.bos_id, bos);
    ck_assert_int_eq(info.eos_id, eos);
    ck_assert_int_eq(info.adds_bos, adds_bos);
    kvq_tokenizer_close(&ctx, &t);
}

START_TEST(text_ends_come_from_the_files_in_order) {
    static made    m;
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t;
    make(&m, true);
    add_token(&m, "<s>", "\"special\":true,\"normalized\":false");
    add_token(&m, "</s>", "\"special\":true,\"normalized\":false");
    int64_t bos = m.n - 2, eos = m.n - 1;
    t = open_good(m.root); // alone: customary names
    ck_assert_int_eq(kvq_tokenizer_describe(t).bos_id, bos);
    ck_assert_int_eq(kvq_tokenizer_describe(t).eos_id, eos);
    ck_assert_int_eq(kvq_tokenizer_describe(t).adds_bos, false);
    ck_assert_int_eq(kvq_tokenizer_describe(t).vocab_size, m.n);
    ck_assert_str_eq(kvq_tokenizer_describe(t).kind, "bpe-bytelevel");
    kvq_tokenizer_close(&ctx, &t);
    check_ends("{\"bos_token\": \"a\", \"eos_token\": {\"content\": \"b\"}}",
               "{\"bos_token_id\": 1, \"eos_token_id\": 2}", 'a', 'b', false);
    check_ends("{\"add_bos_token\": true}", "{\"bos_token_id\": 1, \"eos_token_id\": [5, 6]}", 1, 5, true);
    check_ends("{\"bos_token\": null}", "{}", bos, eos, false);
    set(m.root, "post_processor",
        "{\"type\":\"Sequence\",\"processors\":[{\"type\":\"ByteLevel\"},{\"type\":\"TemplateProcessing\",\"single\":[{"
        "\"SpecialToken\":{\"id\":\"a\"}},{\"Sequence\":{\"id\":\"A\"}}],"
        "\"special_tokens\":{\"a\":{\"id\":\"a\",\"ids\":[97]}}}]}");
    t = open_good(m.root);
    kvq_tokenizer_close(&ctx, &t);
    check_ends("{}", "{}", 97, eos, true);
    check_ends("{\"add_bos_token\": false}", "{}", 97, eos, false); // the configuration wins
    (void)write_file("tokenizer_config.json", "{\"bos_token\": \"nowhere\"}", 24);
    kvq_test_failed(kvq_tokenizer_open(&ctx, kvq_test_folder(), &t, &err), KVQ_ERR_MISMATCH, &err,
                    "bos_token 'nowhere'");
    (void)write_file("tokenizer_config.json", "{}", 2);
    (void)write_file("config.json", "{\"eos_token_id\": 99999}", 23);
    kvq_test_failed(kvq_tokenizer_open(&ctx, kvq_test_folder(), &t, &err), KVQ_ERR_MISMATCH, &err,
                    "eos_token_id is 99999");
    unmake(&m);
}
END_TEST

// ---------------------------------------------------------------- refusals

#define ISOLATED_REGEX(p) "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" p "\"},\"behavior\":\"Isolated\"}"

static const struct refusal {
    const char *place, *json;
    kvq_status  status;
    const char *fragment;
} REFUSALS[] = {
    {"model", "null", KVQ_ERR_INPUT, "is not a JSON object"},
    {"model.type", "\"WordPiece\"", KVQ_ERR_UNSUPPORTED, "'WordPiece'"},
    {"model.type", "\"Unigram\"", KVQ_ERR_UNSUPPORTED, "'Unigram'"},
    {"model.merges", "[]", KVQ_ERR_INPUT, "without merges"},
    {"model.merges", "null", KVQ_ERR_INPUT, "without merges"},
    {"model.merges", "[\"a b c\"]", KVQ_ERR_INPUT, "merge 0 is not a pair"},
    {"model.merges", "[[\"a\"]]", KVQ_ERR_INPUT, "merge 0 is not a pair"},
    {"model.merges", "[[\"a\", 7]]", KVQ_ERR_INPUT, "merge 0 is not a pair"},
    {"model.merges", "[[\"a\", \"b\", \"c\"]]", KVQ_ERR_INPUT, "merge 0 is not a pair"},
    {"model.merges", "[[\"a\", \"b\"]]", KVQ_ERR_INPUT, "the result is not in the vocabulary"},
    {"model.merges", "[[\"qq\", \"b\"]]", KVQ_ERR_INPUT, "the first is not in the vocabulary"},
    {"model.vocab", "{}", KVQ_ERR_INPUT, "model.vocab is missing"},
    {"model.vocab", "{\"a\": -1}", KVQ_ERR_INPUT, "token 'a'"},
    {"model.vocab", "{\"a\": 0.5}", KVQ_ERR_INPUT, "token 'a'"},
    {"model.vocab", "{\"a\": \"x\"}", KVQ_ERR_INPUT, "token 'a'"},
    {"model.vocab", "{\"a\": 1, \"a\": 2}", KVQ_ERR_INPUT, "twice"},
    {"model.vocab", "{\"\\u0000a\": 1}", KVQ_ERR_UNSUPPORTED, "zero character"},
    {"model.dropout", "0.1", KVQ_ERR_UNSUPPORTED, "'dropout'"},
    {"model.continuing_subword_prefix", "\"##\"", KVQ_ERR_UNSUPPORTED, "'continuing_subword_prefix'"},
    {"model.end_of_word_suffix", "\"</w>\"", KVQ_ERR_UNSUPPORTED, "'end_of_word_suffix'"},
    {"model.byte_fallback", "3", KVQ_ERR_INPUT, "byte_fallback"},
    {"normalizer", "{\"type\":\"Lowercase\"}", KVQ_ERR_UNSUPPORTED, "normalizer 'Lowercase'"},
    {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Precompiled\"}]}", KVQ_ERR_UNSUPPORTED,
     "'Precompiled'"},
    {"normalizer", "{}", KVQ_ERR_INPUT, "'type' is missing"},
    {"pre_tokenizer", "null", KVQ_ERR_UNSUPPORTED, "neither a ByteLevel pre-tokenizer nor byte_fallback"},
    {"pre_tokenizer", "{\"type\":\"Whitespace\"}", KVQ_ERR_UNSUPPORTED, "pre_tokenizer 'Whitespace'"},
    {"pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTES ",{\"type\":\"Digits\"}]}",
     KVQ_ERR_UNSUPPORTED, "behind ByteLevel"},
    {"pre_tokenizer", SPLIT("{\"String\":\"a\"}", "Sideways"), KVQ_ERR_UNSUPPORTED, "'Sideways'"},
    {"pre_tokenizer", SPLIT("{\"Glob\":\"a\"}", "Isolated"), KVQ_ERR_INPUT, "'String' is missing"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"prepend_scheme\":\"last\"}", KVQ_ERR_UNSUPPORTED, "'last'"},
    {"pre_tokenizer", ISOLATED_REGEX("a("), KVQ_ERR_UNSUPPORTED, "cannot be compiled"},
    {"pre_tokenizer", ISOLATED_REGEX(""), KVQ_ERR_UNSUPPORTED, "it is empty"},
    {"pre_tokenizer", ISOLATED_REGEX("\\\\w+"), KVQ_ERR_UNSUPPORTED, "an escape"},
    {"pre_tokenizer", ISOLATED_REGEX("[a[b]]"), KVQ_ERR_UNSUPPORTED, "a class within a class"},
    {"pre_tokenizer", ISOLATED_REGEX("[a&&b]"), KVQ_ERR_UNSUPPORTED, "intersection"},
    {"pre_tokenizer", ISOLATED_REGEX("a{1,3}+"), KVQ_ERR_UNSUPPORTED, "a + behind an interval"},
    {"pre_tokenizer", ISOLATED_REGEX("a{,3}"), KVQ_ERR_UNSUPPORTED, "without a lower bound"},
    {"pre_tokenizer", ISOLATED_REGEX("(?m:a)"), KVQ_ERR_UNSUPPORTED, "a kind of group"},
    {"post_processor", "{\"type\":\"RobertaProcessing\"}", KVQ_ERR_UNSUPPORTED, "'RobertaProcessing'"},
    {"added_tokens", "[{\"id\":5,\"content\":\"a\"}]", KVQ_ERR_INPUT, "id 5 here and 97"},
    {"added_tokens", "[{\"id\":5}]", KVQ_ERR_INPUT, "'content' is missing"},
    {"added_tokens", "[{\"id\":700,\"content\":\"w\\u00e9\",\"single_word\":true}]", KVQ_ERR_UNSUPPORTED,
     "single_word"},
    {"added_tokens", "[{\"id\":700,\"content\":\"\"}]", KVQ_ERR_INPUT, "added token"},
};

START_TEST(what_is_not_implemented_is_refused_by_name) {
    static made          m;
    kvq_context          ctx = kvq_test_context();
    kvq_error            err = {0};
    kvq_tokenizer       *t = NULL;
    const struct refusal r = REFUSALS[_i];
    make(&m, true);
    set(m.root, r.place, r.json);
    if (strcmp(r.place, "model.vocab") ==
        0) { // cJSON merges no duplicates and prints no zero: put the text in as it is
        char *before, *after, text[4096];
        set(m.root, r.place, "\"HERE\"");
        char *printed = cJSON_PrintUnformatted(m.root);
        before = printed;
        after = strstr(printed, "\"HERE\"");
        (void)snprintf(text, sizeof text, "%.*s%s%s", (int)(after - before), before, r.json, after + 6);
        (void)write_file("tokenizer.json", text, strlen(text));
        free(printed);
        kvq_test_failed(kvq_tokenizer_open(&ctx, kvq_test_folder(), &t, &err), r.status, &err, r.fragment);
    } else {
        kvq_test_failed(open_tree(&ctx, m.root, &t, &err), r.status, &err, r.fragment);
    }
    ck_assert_msg(strstr(err.message, "tokenizer.json") != NULL, "'%s' does not name the file", err.message);
    ck_assert_ptr_null(t);
    unmake(&m);
}
END_TEST

START_TEST(files_that_are_no_tokenizer_are_refused) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    kvq_test_failed(kvq_tokenizer_open(&ctx, kvq_test_folder(), &t, &err), KVQ_ERR_NOT_FOUND, &err,
                    "no tokenizer.json");
    kvq_test_failed(kvq_tokenizer_open(&ctx, "/nonexistent", &t, &err), KVQ_ERR_NOT_FOUND, &err, "/nonexistent");
    kvq_test_failed(kvq_tokenizer_open(&ctx, write_file("x.json", "[1]", 3), &t, &err), KVQ_ERR_INPUT, &err,
                    "not a JSON object");
    kvq_test_failed(kvq_tokenizer_open(&ctx, write_file("x.json", "{}", 2), &t, &err), KVQ_ERR_INPUT, &err,
                    "'model' is missing");
    kvq_test_failed(kvq_tokenizer_open(&ctx, write_file("x.json", "", 0), &t, &err), KVQ_ERR_INTEGRITY, &err,
                    "not JSON");
}
END_TEST

// A file with every step in it, cut off or changed at any byte, opens or is refused, and never does harm.
START_TEST(damaged_files_do_no_harm) {
    static made m;
    kvq_context ctx = kvq_test_context();
    make(&m, false);
    set(m.root, "normalizer",
        "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"a+"
        "\"},\"content\":\"b\"}]}");
    set(m.root, "pre_tokenizer", METASPACE("first", "true"));
    add_token(&m, "<s>", "\"special\":true,\"normalized\":true,\"lstrip\":true");
    char  *text = cJSON_PrintUnformatted(m.root);
    size_t n = strlen(text), vocab = (size_t)(strstr(text, "\"vocab\"") - text),
           vocab_end = vocab + 400; // its middle repeats itself
    for (size_t i = 0; i < n; i++) {
        if (i > vocab_end && i < n - 400) continue;
        for (int change = 0; change < 3; change++) {
            kvq_error      err = {0};
            kvq_tokenizer *t = NULL;
            kvq_ids        ids = {0};
            char           kept = text[i];
            if (change > 0) text[i] = change == 1 ? (char)(kept ^ 1) : '"';
            kvq_status status = kvq_tokenizer_open(&ctx, write_file("t.json", text, change == 0 ? i : n), &t, &err);
            if (status == KVQ_OK) (void)kvq_tokenizer_encode(&ctx, t, "aa <s> <<b\u00e9", 13, true, &ids, &err);
            ck_assert(status == KVQ_OK || err.message[0] != 0);
            text[i] = kept;
            kvq_ids_free(&ctx, &ids);
            kvq_tokenizer_close(&ctx, &t);
        }
    }
    free(text);
    unmake(&m);
}
END_TEST

// ---------------------------------------------------------------- memory

typedef struct rationed {
    long left, live;
} rationed;

static void *rationed_alloc(void *user, size_t bytes) {
    rationed *r = user;
    if (r->left-- <= 0) return NULL;
    r->live++;
    return aligned_alloc(64, bytes);
}

static void rationed_release(void *user, void *p) {
    ((rationed *)user)->live--;
    free(p);
}

START_TEST(any_failing_allocation_is_reported_and_nothing_leaks) {
    static made m;
    make(&m, true);
    set(m.root, "normalizer", "{\"type\":\"NFC\"}");
    set(m.root, "pre_tokenizer", WITH("{\"type\":\"Digits\",\"individual_digits\":true}"));
    add_token(&m, "\u00e9\u00e9", "\"special\":false,\"normalized\":true");
    char       *text = cJSON_PrintUnformatted(m.root);
    const char *path = write_file("tokenizer.json", text, strlen(text));
    bool        enough = false;
    for (long ration = 0; !enough; ration++) {
        rationed       r = {ration, 0};
        kvq_context    ctx = kvq_test_context();
        kvq_error      err = {0};
        kvq_tokenizer *t = NULL;
        kvq_ids        ids = {0};
        ctx.alloc = rationed_alloc;
        ctx.release = rationed_release;
        ctx.user = &r;
        kvq_status status = kvq_tokenizer_open(&ctx, path, &t, &err);
        if (status == KVQ_OK)
            status = kvq_tokenizer_encode(&ctx, t,
                                          "a\xff"
                                          "1e\u0301e\u0301 b",
                                          11, true, &ids, &err);
        enough = status == KVQ_OK;
        if (!enough) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
        ck_assert(enough || ids.count == 0);
        kvq_ids_free(&ctx, &ids);
        kvq_tokenizer_close(&ctx, &t);
        ck_assert_int_eq(r.live, 0);
    }
    free(text);
    unmake(&m);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(patterns_cut_as_their_models_do),
    KVQ_CASE(split_behaviors_keep_matches_where_they_say),
    KVQ_CASE(digits_are_all_characters_of_number_categories),
    KVQ_CASE(byte_level_prefixes_a_space_once),
    KVQ_CASE(metaspace_schemes),
    KVQ_CASE(normalizers_rewrite_the_text),
    KVQ_CASE(lowest_rank_merges_first_then_the_leftmost),
    KVQ_CASE(ignore_merges_takes_whole_pieces_only),
    KVQ_CASE(a_long_run_is_merged_in_good_time),
    KVQ_CASE(merges_may_cross_words),
    KVQ_CASE(missing_characters_fall_back_to_bytes),
    KVQ_CASE(a_byte_without_token_is_unknown_or_an_error),
    KVQ_CASE(malformed_text_follows_the_framework),
    KVQ_CASE(added_tokens_are_cut_out_first),
    KVQ_CASE(text_behind_an_added_token_is_not_the_first),
    KVQ_CASE(normalized_tokens_are_found_behind_the_normalizer),
    KVQ_CASE(text_ends_come_from_the_files_in_order),
    KVQ_LOOP(what_is_not_implemented_is_refused_by_name, (int)(sizeof REFUSALS / sizeof *REFUSALS)),
    KVQ_CASE(files_that_are_no_tokenizer_are_refused),
    KVQ_CASE(damaged_files_do_no_harm),
    KVQ_CASE(any_failing_allocation_is_reported_and_nothing_leaks),
};
KVQ_TEST_MAIN("tokenizer steps", CASES)
