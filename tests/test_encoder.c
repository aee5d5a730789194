// SPDX-License-Identifier: Apache-2.0
// Texts that arrive in parts: whatever steps a tokenizer has and wherever the parts end, the ids are those of the
// whole; little is kept back; what cannot be taken by parts is an error once it is too long.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encode_parts.h"
#include "limited_memory.h"

// ---------------------------------------------------------------- tokenizers

// The character that stands for a byte in a byte-level vocabulary, as JSON.
static void put_byte(FILE *file, unsigned b) {
    unsigned c = b;
    if (b <= 0x20) c = 0x100 + b;
    if (b >= 0x7f && b <= 0xa0) c = 0x121 + (b - 0x7f);
    if (b == 0xad) c = 0x143;
    (void)fprintf(file, "\\u%04x", c);
}

typedef struct recipe {
    const char *name, *normalizer, *pre_tokenizer, *options;
    bool        byte_level;
    bool        parts; // nearly all of a text comes before its end
} recipe;

// Letters, signs and blanks that merge in pairs and fours, so that most cuts would change ids.
static const char *const PAIRS[] = {"ab",      "ba",     "aa", "11", "--", "\u2581a",
                                    "a\u2581", "\\n\\n", "ee", "a1", "xy", "a-"};

static void put_byte_level(FILE *file) {
    static const char *const MERGES[][2] = {{"a", "b"},          {"b", "a"},      {"a", "a"},      {"1", "1"},
                                            {"-", "-"},          {"a", "-"},      {"ab", "ab"},    {"aa", "aa"},
                                            {"11", "11"},        {"\u0120", "a"}, {"a", "\u0120"}, {"\u010a", "\u010a"},
                                            {"\u0120", "\u0120"}};
    int                      id = 0;
    (void)fputs("\"vocab\":{", file);
    for (unsigned b = 0; b < 256; b++) {
        (void)fprintf(file, "%s\"", b > 0 ? "," : "");
        put_byte(file, b);
        (void)fprintf(file, "\":%d", id++);
    }
    for (size_t i = 0; i < sizeof MERGES / sizeof *MERGES; i++)
        (void)fprintf(file, ",\"%s%s\":%d", MERGES[i][0], MERGES[i][1], id++);
    (void)fputs("},\"merges\":[", file);
    for (size_t i = 0; i < sizeof MERGES / sizeof *MERGES; i++)
        (void)fprintf(file, "%s[\"%s\",\"%s\"]", i > 0 ? "," : "", MERGES[i][0], MERGES[i][1]);
    (void)fputs("]", file);
}

static void put_characters(FILE *file) {
    static const char *const LETTERS[] = {"a", "b", "1", "-", "e", "x", "y", "\u2581", "\\n"};
    int                      id = 0;
    (void)fputs("\"byte_fallback\":true,\"vocab\":{", file);
    for (unsigned b = 0; b < 256; b++) (void)fprintf(file, "%s\"<0x%02X>\":%d", b > 0 ? "," : "", b, id++);
    for (size_t i = 0; i < sizeof LETTERS / sizeof *LETTERS; i++) (void)fprintf(file, ",\"%s\":%d", LETTERS[i], id++);
    for (size_t i = 0; i < sizeof PAIRS / sizeof *PAIRS; i++) (void)fprintf(file, ",\"%s\":%d", PAIRS[i], id++);
    (void)fputs(",\"abab\":900},\"merges\":[[\"ab\",\"ab\"]", file);
    for (size_t i = 0; i < sizeof PAIRS / sizeof *PAIRS; i++) {
        size_t cut = 1; // between the two characters of the pair
        while (((uint8_t)PAIRS[i][cut] & 0xc0) == 0x80 || PAIRS[i][cut - 1] == '\\') cut++;
        (void)fprintf(file, ",[\"%.*s\",\"%s\"]", (int)cut, PAIRS[i], PAIRS[i] + cut);
    }
    (void)fputs("]", file);
}

static const char ADDED[] = "[{\"id\":1000,\"content\":\"<s>\",\"special\":true,\"normalized\":false},"
                            "{\"id\":1001,\"content\":\"<s>aa\",\"special\":false,\"normalized\":false},"
                            "{\"id\":1002,\"content\":\"<l>\",\"special\":true,\"normalized\":false,\"lstrip\":true},"
                            "{\"id\":1003,\"content\":\"<r>\",\"special\":true,\"normalized\":false,\"rstrip\":true},"
                            "{\"id\":1004,\"content\":\"xx\",\"special\":false,\"normalized\":true}]";

static kvq_tokenizer *open_recipe(const recipe *r, const char *added) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    char           path[256];
    (void)snprintf(path, sizeof path, "%s/tokenizer.json", kvq_test_folder());
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    (void)fprintf(file, "{\"added_tokens\":%s,\"normalizer\":%s,\"pre_tokenizer\":%s,\"model\":{\"type\":\"BPE\",%s",
                  added, r->normalizer, r->pre_tokenizer, r->options);
    if (r->byte_level) {
        put_byte_level(file);
    } else {
        put_characters(file);
    }
    (void)fputs("}}", file);
    ck_assert_int_eq(fclose(file), 0);
    kvq_test_ok(kvq_tokenizer_open(&ctx, path, &t, &err), &err);
    return t;
}

#define BYTES         "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define BEFORE(steps) "{\"type\":\"Sequence\",\"pretokenizers\":[" steps "," BYTES "]}"
#define SPLIT(pattern, behavior, invert)                                                                               \
    "{\"type\":\"Split\",\"pattern\":{" pattern "},\"behavior\":\"" behavior "\",\"invert\":" invert "}"
#define DIGITS(single) "{\"type\":\"Digits\",\"individual_digits\":" single "}"
#define METASPACE(scheme, split)                                                                                       \
    "{\"type\":\"Metaspace\",\"replacement\":\"\u2581\",\"prepend_scheme\":\"" scheme "\",\"split\":" split "}"
#define REPLACE(from, to) "{\"type\":\"Replace\",\"pattern\":{" from "},\"content\":\"" to "\"}"
#define BOTH(a, b)        "{\"type\":\"Sequence\",\"normalizers\":[" a "," b "]}"
#define GPT2              "\"Regex\":\"'s|'t| ?\\\\p{L}+| ?\\\\p{N}+| ?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+\""
#define LLAMA3                                                                                                         \
    "\"Regex\":\"(?i:'s|'t)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}| "                                   \
    "?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|"                                                                         \
    "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\""

static const recipe RECIPES[] = {
    // the forms that models use
    {"gpt-2", "null", BEFORE(SPLIT(GPT2, "Isolated", "false")), "", true, true},
    {"smollm", "null", BEFORE(DIGITS("true") "," SPLIT(GPT2, "Isolated", "false")), "", true, true},
    {"llama-3", "null", BEFORE(SPLIT(LLAMA3, "Isolated", "false")), "\"ignore_merges\":true,", true, true},
    {"qwen", "{\"type\":\"NFC\"}", BEFORE(SPLIT(LLAMA3, "Isolated", "false")), "", true, true},
    {"prefix", "null", "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", "", true, true},
    {"llama-2", BOTH("{\"type\":\"Prepend\",\"prepend\":\"\u2581\"}", REPLACE("\"String\":\" \"", "\u2581")), "null",
     "", false, true},
    {"gemma", REPLACE("\"String\":\" \"", "\u2581"), SPLIT("\"String\":\" \"", "MergedWithPrevious", "false"), "",
     false, true},
    {"metaspace", "null", METASPACE("always", "true"), "", false, true},
    {"metaspace, first", "null", METASPACE("first", "false"), "", false, true},
    // every behaviour, alone and with a split behind it that cuts into its pieces
    {"isolated", "null", BEFORE(SPLIT("\"String\":\"--\"", "Isolated", "false")), "", true, true},
    {"removed", "null", BEFORE(SPLIT("\"String\":\"--\"", "Removed", "false")), "", true, true},
    {"previous", "null", BEFORE(SPLIT("\"String\":\"-\"", "MergedWithPrevious", "false")), "", true, true},
    {"next", "null", BEFORE(SPLIT("\"String\":\"-\"", "MergedWithNext", "false")), "", true, true},
    {"contiguous", "null", BEFORE(SPLIT("\"String\":\"-\"", "Contiguous", "false")), "", true, true},
    {"inverted", "null", BEFORE(SPLIT("\"Regex\":\"[a-b]+\"", "MergedWithNext", "true")), "", true, true},
    {"inverted contiguous", "null", BEFORE(SPLIT("\"Regex\":\"[a-b]\"", "Contiguous", "true")), "", true, true},
    {"previous, then", "null",
     BEFORE(
         SPLIT("\"String\":\"-\"", "MergedWithPrevious", "false") "," SPLIT("\"Regex\":\"a+|-\"", "Isolated", "false")),
     "", true, true},
    {"next, then", "null",
     BEFORE(SPLIT("\"Regex\":\"-+a\"", "MergedWithNext", "false") "," SPLIT("\"Regex\":\"a+|-\"", "Isolated", "false")),
     "", true, true},
    {"contiguous, then", "null",
     BEFORE(SPLIT("\"Regex\":\"-a?\"", "Contiguous", "false") "," SPLIT("\"Regex\":\"a+|--|b\"", "MergedWithNext",
                                                                        "false")),
     "", true, true},
    {"joined by what follows", "null",
     BEFORE(SPLIT("\"String\":\"-a\"", "Contiguous", "false") "," SPLIT("\"Regex\":\"a-|-\"", "Isolated", "false")), "",
     true, true},
    {"runs of digits, then", "null", BEFORE(DIGITS("false") "," SPLIT("\"Regex\":\"1a|[^1]\"", "Isolated", "false")),
     "", true, true},
    {"characters, then merges", "null", SPLIT("\"String\":\"b\"", "MergedWithNext", "false"), "", false, true},
    {"characters, joined", "null", SPLIT("\"String\":\"-a\"", "Contiguous", "false"), "", false, true},
    {"characters, whole pieces", "null", METASPACE("always", "true"), "\"ignore_merges\":true,", false, true},
    // what needs all of the text
    {"removed inverted", "null", BEFORE(SPLIT("\"Regex\":\"[a-b]\"", "Removed", "true")), "", true, false},
    {"looks back", "null", BEFORE(SPLIT("\"Regex\":\"(?<=a)b\"", "Isolated", "false")), "", true, false},
    {"begins lines", "null", BEFORE(SPLIT("\"Regex\":\"^a\"", "Isolated", "false")), "", true, false},
    {"empty matches", "null", BEFORE(SPLIT("\"Regex\":\"a*\"", "Isolated", "false")), "", true, false},
    {"nothing to part", "null", BYTES, "", true, false},
    {"replaced runs", REPLACE("\"Regex\":\" +\"", " "), BEFORE(SPLIT(GPT2, "Isolated", "false")), "", true, false},
    {"replaced pairs", REPLACE("\"String\":\"ab\"", "x"), BEFORE(SPLIT(GPT2, "Isolated", "false")), "", true, false},
    {"removed first", BOTH(REPLACE("\"String\":\"a\"", ""), "{\"type\":\"Prepend\",\"prepend\":\"-\"}"),
     BEFORE(SPLIT(GPT2, "Isolated", "false")), "", true, false},
    {"accents made", BOTH(REPLACE("\"String\":\"-\"", "\u0301"), "{\"type\":\"NFC\"}"),
     BEFORE(SPLIT(GPT2, "Isolated", "false")), "", true, false},
    {"prefix of each piece", "null",
     "{\"type\":\"Sequence\",\"pretokenizers\":[" DIGITS(
         "true") ",{\"type\":\"ByteLevel\",\"add_prefix_space\":true}]}",
     "", true, false},
};
enum { N_RECIPES = sizeof RECIPES / sizeof *RECIPES };

// ---------------------------------------------------------------- texts

// Words that the steps above look at, and halves of them; malformed bytes too.
static const char *const WORDS[] = {
    "a",      "a",      "b",    "ab",   "aa",       " ",   " ",       "  ",     "\n",         "\n\n",     "\r\n",
    "1",      "11",     "-",    "--",   "-a",       "e",   "e\u0301", "\u0301", "\u4e2d",     "'s",       "'",
    "<",      "<s",     "<s>",  "<s>a", "<l>",      "<r>", "\u3000",  "xx",     "x",          "\t",       "\u2581",
    "\u00e9", "\u1e69", "\xff", "\xe4", "\xbd\xa0", "?!",  "\u0323",  "S",      "\U0001f600", "\xf0\x9f", ">"};

// Every fourth text has few of them, which then follow each other often.
static size_t random_text(uint64_t seed, size_t n_words, char *out, size_t size) {
    static const char *const FEW[] = {"a", "-", "-a", "b", "1", " "};
    size_t                   n = 0;
    for (size_t i = 0; i < n_words; i++) {
        const char *word = seed % 4 == 3 ? FEW[kvq_rng_below(seed, KVQ_RNG_TEST, 1, i, sizeof FEW / sizeof *FEW)]
                                         : WORDS[kvq_rng_below(seed, KVQ_RNG_TEST, 1, i, sizeof WORDS / sizeof *WORDS)];
        if (n + strlen(word) > size) break;
        memcpy(out + n, word, strlen(word));
        n += strlen(word);
    }
    return n;
}

START_TEST(parts_never_change_ids) {
    const recipe  *r = &RECIPES[_i];
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *plain = open_recipe(r, "[]"), *added = open_recipe(r, ADDED);
    char           text[1024];
    for (uint64_t seed = 0; seed < 150; seed++) {
        const kvq_tokenizer *t = seed % 2 == 0 ? plain : added;
        bool                 special = seed % 3 != 0;
        size_t               n = random_text(seed, 1 + seed % 60, text, sizeof text);
        kvq_ids              whole = {0};
        kvq_test_ok(kvq_tokenizer_encode(&ctx, t, text, n, special, &whole, &err), &err);
        check_parts(t, text, n, special, &whole, r->name);
        kvq_ids_free(&ctx, &whole);
    }
    kvq_tokenizer_close(&ctx, &plain);
    kvq_tokenizer_close(&ctx, &added);
}
END_TEST

// A text is not kept when it need not be, and kept when it must.
START_TEST(what_is_certain_is_not_kept) {
    const recipe  *r = &RECIPES[_i];
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = open_recipe(r, r->parts ? ADDED : "[]"); // an added token ends what goes before it
    enum { N = 20000 };
    static char text[N];
    kvq_ids     ids = {0};
    int64_t     early = 0;
    size_t      n = random_text(8, N, text, N);
    encode_parts(t, text, n, true, 100, 3, &ids, &early);
    ck_assert_int_gt(ids.count, 2000);
    ck_assert_msg(r->parts ? early > ids.count - 100 : early == 0, "%s: %lld of %lld ids came early", r->name,
                  (long long)early, (long long)ids.count);
    kvq_ids_free(&ctx, &ids);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// One encoder, several texts: each begins anew.
START_TEST(texts_do_not_see_each_other) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    for (int k = 0; k < N_RECIPES; k++) {
        kvq_tokenizer *t = open_recipe(&RECIPES[k], ADDED);
        kvq_encoder   *e = NULL;
        kvq_ids        ids = {0}, alone = {0};
        kvq_test_ok(kvq_encoder_create(&ctx, t, true, &e, &err), &err);
        for (uint64_t seed = 0; seed < 40; seed++) {
            char   text[256];
            size_t n = random_text(seed, seed % 20, text, sizeof text);
            kvq_test_ok(kvq_tokenizer_encode(&ctx, t, text, n, true, &alone, &err), &err);
            kvq_test_ok(kvq_encoder_push(e, text, n / 2, false, &ids, &err), &err);
            kvq_test_ok(kvq_encoder_push(e, text + n / 2, n - n / 2, true, &ids, &err), &err);
        }
        ck_assert_int_eq(ids.count, alone.count);
        ck_assert(memcmp(ids.data, alone.data, (size_t)ids.count * sizeof *ids.data) == 0);
        kvq_encoder_destroy(&ctx, &e);
        kvq_ids_free(&ctx, &ids);
        kvq_ids_free(&ctx, &alone);
        kvq_tokenizer_close(&ctx, &t);
    }
}
END_TEST

// More different words than are remembered: forgetting them changes nothing.
START_TEST(many_words_are_forgotten_and_found_again) {
    enum { N_WORDS = 150000, SIZE = N_WORDS * 8 };
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = open_recipe(&RECIPES[0], "[]");
    char          *text = malloc(SIZE);
    kvq_ids        ids = {0};
    size_t         n = 0;
    for (int i = 0; i < N_WORDS; i++) // a number of five letters
        n += (size_t)snprintf(text + n, SIZE - n, "%c%c%c%c%c ", 'c' + i % 13, 'c' + i / 13 % 13, 'c' + i / 169 % 13,
                              'c' + i / 2197 % 13, 'c' + i / 28561);
    kvq_test_ok(kvq_tokenizer_encode(&ctx, t, text, n, true, &ids, &err), &err);
    ck_assert_int_eq(ids.count, (int64_t)n); // nothing merges here
    for (int64_t i = 0; i < ids.count; i++) ck_assert_int_eq(ids.data[i], (uint8_t)text[i]);
    free(text);
    kvq_ids_free(&ctx, &ids);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

START_TEST(a_text_that_cannot_be_parted_ends_in_an_error) {
    enum { PART = 4 << 20 };
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = open_recipe(&RECIPES[0], "[]");
    kvq_encoder   *e = NULL;
    kvq_ids        ids = {0};
    kvq_status     status = KVQ_OK;
    char          *text = malloc(PART);
    memset(text, 'a', PART); // one word
    kvq_test_ok(kvq_encoder_create(&ctx, t, true, &e, &err), &err);
    int n_parts = 0;
    for (; status == KVQ_OK && n_parts < 20; n_parts++) status = kvq_encoder_push(e, text, PART, false, &ids, &err);
    kvq_test_failed(status, KVQ_ERR_UNSUPPORTED, &err, "finds no place in 71303168 bytes");
    ck_assert_int_eq(n_parts, 17);
    ck_assert_int_eq(ids.count, 0);
    free(text);
    kvq_encoder_destroy(&ctx, &e);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

START_TEST(any_failing_allocation_is_reported_and_nothing_leaks) {
    static const char TEXT[] = "ab <l> \xff e\u0301 11--<s>aa";
    kvq_context       usual = kvq_test_context();
    bool              enough = false;
    for (int k = 3; k < N_RECIPES; k += 2) { // with a normal form, with a prefix, by characters
        kvq_tokenizer *t = open_recipe(&RECIPES[k], ADDED);
        enough = false;
        for (int64_t limit = 0; !enough; limit++) {
            limited_memory memory = {.inner = usual, .left = limit};
            kvq_context    ctx = limited_context(&memory);
            kvq_error      err = {0};
            kvq_encoder   *e = NULL;
            kvq_ids        ids = {0};
            kvq_status     status = kvq_encoder_create(&ctx, t, true, &e, &err);
            for (size_t i = 0; i < sizeof TEXT && status == KVQ_OK; i += 5) {
                size_t left = sizeof TEXT - 1 - i;
                status = kvq_encoder_push(e, TEXT + i, left < 5 ? left : 5, left <= 5, &ids, &err);
            }
            enough = status == KVQ_OK;
            if (!enough) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
            kvq_encoder_destroy(&ctx, &e);
            kvq_ids_free(&ctx, &ids);
            ck_assert_int_eq(memory.n_live, 0);
        }
        kvq_tokenizer_close(&usual, &t);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(parts_never_change_ids, N_RECIPES),
    KVQ_LOOP(what_is_certain_is_not_kept, N_RECIPES),
    KVQ_CASE(texts_do_not_see_each_other),
    KVQ_CASE(many_words_are_forgotten_and_found_again),
    KVQ_CASE(a_text_that_cannot_be_parted_ends_in_an_error),
    KVQ_CASE(any_failing_allocation_is_reported_and_nothing_leaks),
};
KVQ_TEST_MAIN("encoder", CASES)
