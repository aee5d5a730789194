// SPDX-License-Identifier: Apache-2.0
// Whole tokenizers: ids equal to those of the reference implementations, for every string and file; the two forms of
// one tokenizer agree; GGUF metadata is checked. The steps alone: test_tokenizer_steps.c.
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encode_parts.h"
#include "gguf.h"
#include "kvq_io.h"
#include "kvq_test.h"

static const char *in_folder(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

static const char *in_shared(const char *name) {
    static char path[1024];
    kvq_test_shared_path(path, sizeof path, name);
    return path;
}

static void write_file(const char *path, const void *data, size_t n) {
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(data, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
}

static kvq_tokenizer *open_good(const char *path) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    kvq_test_ok(kvq_tokenizer_open(&ctx, path, &t, &err), &err);
    return t;
}

static void check_ids(const kvq_tokenizer *t, const char *text, size_t n, bool parse_special, const cJSON *expected,
                      const char *name) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = {0};
    int64_t     i = 0;
    kvq_test_ok(kvq_tokenizer_encode(&ctx, t, text, n, parse_special, &ids, &err), &err);
    ck_assert_msg(ids.count == cJSON_GetArraySize(expected), "%s: %lld ids instead of %d", name, (long long)ids.count,
                  cJSON_GetArraySize(expected));
    const cJSON *item;
    cJSON_ArrayForEach(item, expected) {
        ck_assert_msg(ids.data[i] == item->valueint, "%s: id %lld is %d instead of %d", name, (long long)i, ids.data[i],
                      item->valueint);
        i++;
    }
    check_parts(t, text, n, parse_special, &ids, name);
    kvq_ids_free(&ctx, &ids);
}

// ---------------------------------------------------------------- reference ids

static cJSON *read_json(const char *name) {
    kvq_mapped_file file = {0};
    kvq_error       err = {0};
    kvq_test_ok(kvq_map_file(in_shared(name), &file, &err), &err);
    cJSON *root = cJSON_ParseWithLength((const char *)file.data, file.bytes);
    ck_assert_ptr_nonnull(root);
    kvq_unmap_file(&file);
    return root;
}

static size_t bytes_of_hex(const char *hex, char *out, size_t size) {
    size_t n = strlen(hex) / 2;
    ck_assert_uint_le(n, size);
    for (size_t i = 0; i < n; i++) {
        unsigned byte = 0;
        ck_assert_int_eq(sscanf(hex + 2 * i, "%2x", &byte), 1);
        out[i] = (char)byte;
    }
    return n;
}

// All strings of strings.json, well-formed and not.
static void check_strings(const kvq_tokenizer *t, const char *column, bool parse_special) {
    cJSON       *root = read_json("goldens/tokenizer/strings.json");
    const cJSON *item;
    int          n_strings = 0;
    cJSON_ArrayForEach(item, cJSON_GetObjectItem(root, "items")) {
        char   text[4096];
        size_t n = bytes_of_hex(cJSON_GetObjectItem(item, "hex")->valuestring, text, sizeof text);
        check_ids(t, text, n, parse_special, cJSON_GetObjectItem(item, column),
                  cJSON_GetObjectItem(item, "name")->valuestring);
        n_strings++;
    }
    ck_assert_int_ge(n_strings, 74);
    cJSON_Delete(root);
}

// In parts, nearly everything must be certain long before the end, or a text larger than memory would not go through.
static void check_file_parts(const kvq_tokenizer *t, const kvq_mapped_file *file, const kvq_ids *whole) {
    static const size_t LARGEST[] = {7, 4096, 300000};
    kvq_context         ctx = kvq_test_context();
    for (size_t k = 0; k < sizeof LARGEST / sizeof *LARGEST; k++) {
        kvq_ids parts = {0};
        int64_t early = 0;
        encode_parts(t, (const char *)file->data, file->bytes, true, LARGEST[k], k, &parts, &early);
        ck_assert_int_eq(parts.count, whole->count);
        ck_assert(memcmp(parts.data, whole->data, (size_t)whole->count * sizeof *whole->data) == 0);
        ck_assert_int_ge(early, whole->count - 64);
        kvq_ids_free(&ctx, &parts);
    }
}

// All files of files.json, by number and hash of their ids.
static void check_files(const kvq_tokenizer *t, const char *column) {
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    cJSON       *root = read_json("goldens/tokenizer/files.json");
    const cJSON *item;
    int          n_files = 0;
    cJSON_ArrayForEach(item, cJSON_GetObjectItem(root, "files")) {
        const cJSON    *expected = cJSON_GetObjectItem(item, column);
        kvq_mapped_file file = {0};
        kvq_ids         ids = {0};
        char            name[256], hex[KVQ_SHA256_HEX];
        (void)snprintf(name, sizeof name, "data/%s", item->string);
        kvq_test_ok(kvq_map_file(in_shared(name), &file, &err), &err);
        kvq_test_ok(kvq_tokenizer_encode(&ctx, t, (const char *)file.data, file.bytes, true, &ids, &err), &err);
        ck_assert_int_eq(ids.count, cJSON_GetObjectItem(expected, "count")->valueint);
        kvq_test_ok(kvq_sha256_of(ids.data, (size_t)ids.count * sizeof *ids.data, hex, &err), &err);
        ck_assert_str_eq(hex, cJSON_GetObjectItem(expected, "sha256_int32le")->valuestring);
        check_file_parts(t, &file, &ids);
        kvq_ids_free(&ctx, &ids);
        kvq_unmap_file(&file);
        n_files++;
    }
    ck_assert_int_ge(n_files, 3);
    cJSON_Delete(root);
}

static const struct sentencepiece_model {
    const char *path, *column;
    int64_t     vocab_size;
} SENTENCEPIECE[] = {
    {"models/stories15M", "llama2_32k", 32000},
    {"models/stories260K/tokenizer.json", "tok512", 512},
};

START_TEST(sentencepiece_json_gives_reference_ids) {
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = open_good(in_shared(SENTENCEPIECE[_i].path));
    check_strings(t, SENTENCEPIECE[_i].column, false);
    check_files(t, SENTENCEPIECE[_i].column);
    kvq_tokenizer_info info = kvq_tokenizer_describe(t);
    ck_assert_str_eq(info.kind, "bpe-sentencepiece");
    ck_assert_int_eq(info.vocab_size, SENTENCEPIECE[_i].vocab_size);
    ck_assert_int_eq(info.bos_id, 1); // from config.json beside it
    ck_assert_int_eq(info.eos_id, 2);
    ck_assert_int_eq(info.adds_bos, false);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// The one string on which frameworks disagree: SentencePiece knows no control tokens in text, `tokenizers` does.
START_TEST(sentencepiece_json_parses_special_tokens) {
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = open_good(in_shared("models/stories15M"));
    cJSON         *expected = cJSON_Parse("[1, 15043, 2, 259, 0, 29871, 529, 8305, 29958]"); // tokenizers 0.23.3
    check_ids(t, "<s>Hello</s> <unk> <pad>", 24, true, expected, "special_llama");
    cJSON_Delete(expected);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

START_TEST(smollm2_gguf_gives_reference_ids) {
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = open_good(kvq_test_smollm2());
    check_strings(t, "smollm2", true);
    check_strings(t, "smollm2_plain", false);
    check_files(t, "smollm2");
    kvq_tokenizer_info info = kvq_tokenizer_describe(t);
    ck_assert_str_eq(info.kind, "bpe-bytelevel");
    ck_assert_int_eq(info.vocab_size, 49152);
    ck_assert_int_eq(info.bos_id, 1);
    ck_assert_int_eq(info.eos_id, 2);
    ck_assert_int_eq(info.adds_bos, false);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// ---------------------------------------------------------------- one tokenizer in two forms

static cJSON *string_of(gguf_string s) {
    char *text = calloc(s.n + 1, 1);
    memcpy(text, s.text, s.n);
    cJSON *item = cJSON_CreateString(text);
    free(text);
    return item;
}

// SmolLM2's tokenizer.json, made from the GGUF by what is known of the original: digits one by one, then ByteLevel.
static void write_smollm2_json(const char *path) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    gguf_file  *file = NULL;
    gguf_array  array = {0};
    cJSON *root = cJSON_Parse("{\"normalizer\": null, \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": "
                              "[{\"type\": \"Digits\", \"individual_digits\": true},"
                              " {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": true}]}, "
                              "\"added_tokens\": [], \"model\": {\"type\": \"BPE\"}}");
    cJSON *vocab = cJSON_CreateObject(), *merges = cJSON_CreateArray(), *model = cJSON_GetObjectItem(root, "model");
    kvq_test_ok(gguf_open(&ctx, kvq_test_smollm2(), &file, &err), &err);
    ck_assert(gguf_get_array(file, "tokenizer.ggml.tokens", GGUF_STRING, &array));
    const uint8_t *cursor = array.data;
    for (uint64_t i = 0; i < array.count; i++) {
        cJSON *name = string_of(gguf_next_string(&array, &cursor)), *id = cJSON_CreateNumber((double)i);
        if (i < 17) { // the control tokens
            cJSON *added = cJSON_Parse("{\"special\": true, \"normalized\": false}");
            cJSON_AddNumberToObject(added, "id", (double)i);
            cJSON_AddStringToObject(added, "content", name->valuestring);
            cJSON_AddItemToArray(cJSON_GetObjectItem(root, "added_tokens"), added);
        }
        id->string = name->valuestring; // an array's append takes the same time for every element, an object's does not
        name->valuestring = NULL;
        cJSON_Delete(name);
        cJSON_AddItemToArray(vocab, id);
    }
    ck_assert(gguf_get_array(file, "tokenizer.ggml.merges", GGUF_STRING, &array));
    cursor = array.data;
    for (uint64_t i = 0; i < array.count; i++)
        cJSON_AddItemToArray(merges, string_of(gguf_next_string(&array, &cursor)));
    cJSON_AddItemToObject(model, "vocab", vocab);
    cJSON_AddItemToObject(model, "merges", merges);
    char *text = cJSON_PrintUnformatted(root);
    write_file(path, text, strlen(text));
    free(text);
    cJSON_Delete(root);
    gguf_close(&ctx, &file);
}

START_TEST(smollm2_json_gives_reference_ids) {
    kvq_context ctx = kvq_test_context();
    write_smollm2_json(in_folder("tokenizer.json"));
    kvq_tokenizer *t = open_good(in_folder("tokenizer.json"));
    check_strings(t, "smollm2", true);
    check_strings(t, "smollm2_plain", false);
    check_files(t, "smollm2");
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// ---------------------------------------------------------------- GGUF files made here

typedef struct made { // a GGUF of metadata alone
    uint8_t *data;
    size_t   n, capacity;
    uint64_t n_keys;
} made;

static void put(made *m, const void *data, size_t n) {
    if (m->n + n > m->capacity) {
        m->capacity = 2 * (m->n + n);
        m->data = realloc(m->data, m->capacity);
    }
    if (n > 0) memcpy(m->data + m->n, data, n);
    m->n += n;
}

static void put_u32(made *m, uint32_t x) { put(m, &x, sizeof x); }
static void put_u64(made *m, uint64_t x) { put(m, &x, sizeof x); }

static void put_text(made *m, const char *text, size_t n) {
    put_u64(m, n);
    put(m, text, n);
}

enum {
    TYPE_U32 = 4,
    TYPE_I32 = 5,
    TYPE_F32 = 6,
    TYPE_BOOL = 7,
    TYPE_STRING = 8,
    TYPE_ARRAY = 9
}; // numbers of the format

static void put_key(made *m, const char *key, uint32_t type) {
    put_text(m, key, strlen(key));
    put_u32(m, type);
    m->n_keys++;
}

static void put_string(made *m, const char *key, const char *value) {
    put_key(m, key, TYPE_STRING);
    put_text(m, value, strlen(value));
}

static void put_flag(made *m, const char *key, bool value) {
    uint8_t byte = value;
    put_key(m, key, TYPE_BOOL);
    put(m, &byte, 1);
}

static void put_number(made *m, const char *key, uint32_t value) {
    put_key(m, key, TYPE_U32);
    put_u32(m, value);
}

static void put_array(made *m, const char *key, uint32_t type, uint64_t count) {
    put_key(m, key, TYPE_ARRAY);
    put_u32(m, type);
    put_u64(m, count);
}

static void begin(made *m) {
    memset(m, 0, sizeof *m);
    put(m, "GGUF", 4);
    put_u32(m, 3);
    put_u64(m, 0); // tensors
    put_u64(m, 0); // keys, filled in by finish
}

static const char *finish(made *m) {
    memcpy(m->data + 16, &m->n_keys, 8);
    write_file(in_folder("m.gguf"), m->data, m->n);
    free(m->data);
    return in_folder("m.gguf");
}

// The vocabulary of Llama 2 as a GGUF of model `llama`: pieces from tokenizer.json, scores from llama2.c's
// tokenizer.bin.
static const char *write_llama2_gguf(void) {
    static made     m, types, scores;
    kvq_mapped_file bin = {0};
    kvq_error       err = {0};
    cJSON          *root = read_json("models/stories15M/tokenizer.json");
    const cJSON    *vocab = cJSON_GetObjectItem(cJSON_GetObjectItem(root, "model"), "vocab"), *item;
    uint32_t        n = (uint32_t)cJSON_GetArraySize(vocab), i = 0;
    kvq_test_ok(kvq_map_file(in_shared("models/tokenizer.bin"), &bin, &err), &err);
    begin(&m);
    put_string(&m, "tokenizer.ggml.model", "llama");
    put_array(&m, "tokenizer.ggml.tokens", TYPE_STRING, n);
    size_t at = 4; // behind the length of the longest token
    cJSON_ArrayForEach(item, vocab) {
        int32_t type = i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1, length;
        ck_assert_int_eq(item->valueint, i);
        put_text(&m, item->string, strlen(item->string));
        put(&types, &type, 4);
        put(&scores, bin.data + at, 4);
        memcpy(&length, bin.data + at + 4, 4);
        at += 8 + (size_t)length;
        i++;
    }
    ck_assert_uint_eq(at, bin.bytes);
    put_array(&m, "tokenizer.ggml.token_type", TYPE_I32, n);
    put(&m, types.data, types.n);
    put_array(&m, "tokenizer.ggml.scores", TYPE_F32, n);
    put(&m, scores.data, scores.n);
    put_number(&m, "tokenizer.ggml.bos_token_id", 1);
    put_number(&m, "tokenizer.ggml.eos_token_id", 2);
    free(types.data);
    free(scores.data);
    kvq_unmap_file(&bin);
    cJSON_Delete(root);
    return finish(&m);
}

START_TEST(sentencepiece_gguf_gives_reference_ids) {
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = open_good(write_llama2_gguf());
    check_strings(t, "llama2_32k", false);
    check_files(t, "llama2_32k");
    kvq_tokenizer_info info = kvq_tokenizer_describe(t);
    ck_assert_str_eq(info.kind, "bpe-sentencepiece");
    ck_assert_int_eq(info.vocab_size, 32000);
    ck_assert_int_eq(info.bos_id, 1);
    ck_assert_int_eq(info.eos_id, 2);
    ck_assert_int_eq(info.adds_bos, true); // what the format says when the key is absent
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// A small vocabulary of model `llama`: <unk>, <s>, 256 bytes, then these from id 258 on.
typedef struct piece {
    const char *text;
    float       score;
    int32_t     type;
} piece;

typedef struct variation { // of a good file
    const char *without, *model, *flag;
    int         n_scores_missing, bad_type;
    float       last_score;
    uint32_t    bos;
} variation;

static bool wanted(const variation *v, const char *key) { return v->without == NULL || strcmp(v->without, key) != 0; }

static const char *write_small(const piece *pieces, uint32_t n_pieces, const variation *v) {
    made        m;
    uint32_t    n = 258 + n_pieces;
    const char *model = v->model != NULL ? v->model : "llama";
    begin(&m);
    put_string(&m, "tokenizer.ggml.model", model);
    put_number(&m, "tokenizer.ggml.bos_token_id", v->bos);
    if (wanted(v, "tokens")) {
        put_array(&m, "tokenizer.ggml.tokens", TYPE_STRING, n);
        put_text(&m, "<unk>", 5);
        put_text(&m, "<s>", 3);
        for (unsigned b = 0; b < 256; b++) {
            char name[8];
            (void)snprintf(name, sizeof name, "<0x%02X>", wanted(v, "byte") ? b : 7);
            put_text(&m, name, 6);
        }
        for (uint32_t i = 0; i < n_pieces; i++) put_text(&m, pieces[i].text, strlen(pieces[i].text));
    }
    put_array(&m, "tokenizer.ggml.token_type", TYPE_I32, n);
    for (uint32_t i = 0; i < n; i++)
        put_u32(&m, v->bad_type && i == n - 1 ? 9
                    : i == 0                  ? 2
                    : i == 1                  ? 3
                    : i < 258                 ? 6
                                              : (uint32_t)pieces[i - 258].type);
    if (wanted(v, "scores")) {
        uint32_t n_scores = n - (uint32_t)v->n_scores_missing;
        put_array(&m, "tokenizer.ggml.scores", TYPE_F32, n_scores);
        for (uint32_t i = 0; i < n_scores; i++) {
            float score = i == n - 1 && v->last_score != 0 ? v->last_score : i < 258 ? 0 : pieces[i - 258].score;
            put(&m, &score, 4);
        }
    }
    if (v->flag != NULL) put_flag(&m, v->flag, true);
    return finish(&m);
}

static void check_small(const kvq_tokenizer *t, const char *text, const char *expected_json) {
    cJSON *expected = cJSON_Parse(expected_json);
    check_ids(t, text, strlen(text), true, expected, text);
    cJSON_Delete(expected);
}

// id: 258 + index
static const piece PIECES[] = {
    {"\u2581", -9, 1}, {"a", -8, 1},   {"b", -8, 1}, {"ab", -1, 1},  {"q", -5, 1}, {"aa", -1, 1},
    {"xy", -2, 1},     {"USER", 0, 4}, {"ba", 0, 5}, {"xyz", -1, 1}, {"", 0, 1},   {"", 0, 5},
};
enum { N_PIECES = sizeof PIECES / sizeof *PIECES };

// "x", "y" and "z" are no pieces, but "xy" is: SentencePiece merges characters whether they are pieces or not. Equal
// scores go left to right. Unused pieces are never made.
START_TEST(sentencepiece_gguf_merges_by_score) {
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = open_good(write_small(PIECES, N_PIECES, &(variation){.bos = 1}));
    check_small(t, "ab", "[258, 261]");
    check_small(t, "aab", "[258, 263, 260]");  // aa and ab have one score: the leftmost
    check_small(t, "aaab", "[258, 263, 261]"); // aa first, then ab
    check_small(t, "xyz", "[258, 267]");
    check_small(t, "xy", "[258, 264]");
    check_small(t, "x", "[258, 122]"); // 2 + 'x'
    check_small(t, "bax", "[258, 260, 259, 122]");
    check_small(t, "<s>a", "[1, 258, 259]");
    check_small(t, "aUSERa", "[258, 259, 265, 258, 259]"); // each part behind a token gets its blank
    check_small(t, "<0x61>", "[258, 62, 50, 122, 56, 51, 64]");
    cJSON *plain =
        cJSON_Parse("[258, 62, 117, 64, 265]"); // control tokens are text unless asked for, user's tokens never
    check_ids(t, "<s>USER", 7, false, plain, "plain");
    cJSON_Delete(plain);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

START_TEST(sentencepiece_gguf_is_checked) {
    static const struct {
        variation   v;
        kvq_status  status;
        const char *fragment;
    } BAD[] = {
        {{.without = "tokens"}, KVQ_ERR_INPUT, "tokenizer.ggml.tokens"},
        {{.without = "scores"}, KVQ_ERR_INPUT, "tokenizer.ggml.scores"},
        {{.without = "byte"}, KVQ_ERR_UNSUPPORTED, "no byte piece <0x00>"},
        {{.n_scores_missing = 1}, KVQ_ERR_INPUT, "269 elements for 270 tokens"},
        {{.last_score = NAN}, KVQ_ERR_NUMERICAL, "score of token 269"},
        {{.bad_type = 1}, KVQ_ERR_UNSUPPORTED, "unknown type 9"},
        {{.bos = 270}, KVQ_ERR_INPUT, "tokenizer.ggml.bos_token_id"},
        {{.model = "bert"}, KVQ_ERR_UNSUPPORTED, "'bert'"},
        {{.model = "gpt2"}, KVQ_ERR_UNSUPPORTED, "pre-tokenizer ''"},
        {{.flag = "tokenizer.ggml.remove_extra_whitespaces"}, KVQ_ERR_UNSUPPORTED, "remove_extra_whitespaces"},
        {{.flag = "tokenizer.ggml.precompiled_charsmap"}, KVQ_ERR_UNSUPPORTED, "precompiled_charsmap"},
    };
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = NULL;
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kvq_error err = {0};
        kvq_test_failed(kvq_tokenizer_open(&ctx, write_small(PIECES, N_PIECES, &BAD[i].v), &t, &err), BAD[i].status,
                        &err, BAD[i].fragment);
        ck_assert_ptr_null(t);
    }
    const piece twice[] = {{"a", 0, 1}, {"a", 0, 1}}, broken[] = {{"\xff", 0, 1}};
    kvq_error   err = {0};
    kvq_test_failed(kvq_tokenizer_open(&ctx, write_small(twice, 2, &(variation){0}), &t, &err), KVQ_ERR_INPUT, &err,
                    "token 259 'a' is in the vocabulary twice");
    kvq_test_failed(kvq_tokenizer_open(&ctx, write_small(broken, 1, &(variation){0}), &t, &err), KVQ_ERR_INPUT, &err,
                    "token 258");
}
END_TEST

// A byte-level GGUF with letters, digits, "!" and a merge or two.
static const char *write_byte_level(const char *pre, const char *merge, const char *flag) {
    static const char *const TOKENS[] = {"a", "b", "1", "2", "!", "ab", "12", "\u0120", "a1"};
    enum { N = sizeof TOKENS / sizeof *TOKENS };
    made m;
    begin(&m);
    put_string(&m, "tokenizer.ggml.model", "gpt2");
    if (pre != NULL) put_string(&m, "tokenizer.ggml.pre", pre);
    put_array(&m, "tokenizer.ggml.tokens", TYPE_STRING, N);
    for (int i = 0; i < N; i++) put_text(&m, TOKENS[i], strlen(TOKENS[i]));
    if (merge != NULL) {
        put_array(&m, "tokenizer.ggml.merges", TYPE_STRING, 2);
        put_text(&m, "a b", 3);
        put_text(&m, merge, strlen(merge));
    }
    if (flag != NULL) put_flag(&m, flag, true);
    return finish(&m);
}

START_TEST(byte_level_gguf_pre_tokenizers) {
    static const struct {
        const char *pre, *expected; // of "ab12a1 12"
        bool        adds_bos;
    } PRE[] = {
        {"gpt-2", "[5, 6, 0, 2, 7, 6]", false},        // digits in runs
        {"smollm", "[5, 2, 3, 0, 2, 7, 2, 3]", false}, // one by one
        {"starcoder", "[5, 2, 3, 0, 2, 7, 2, 3]", false}, {"qwen2", "[5, 2, 3, 0, 2, 7, 2, 3]", false},
        {"llama-bpe", "[5, 6, 0, 2, 7, 6]", true}, // up to three
        {"tekken", "[5, 2, 3, 0, 2, 7, 2, 3]", true},
    };
    kvq_context ctx = kvq_test_context();
    for (size_t i = 0; i < sizeof PRE / sizeof *PRE; i++) {
        kvq_tokenizer *t = open_good(write_byte_level(PRE[i].pre, "1 2", NULL));
        check_small(t, "ab12a1 12", PRE[i].expected);
        ck_assert_int_eq(kvq_tokenizer_describe(t).adds_bos, PRE[i].adds_bos);
        ck_assert_int_eq(kvq_tokenizer_describe(t).bos_id, -1);
        kvq_tokenizer_close(&ctx, &t);
    }
    kvq_tokenizer *t = open_good(write_byte_level("gpt-2", "1 2", "tokenizer.ggml.add_bos_token"));
    ck_assert_int_eq(kvq_tokenizer_describe(t).adds_bos, true);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

START_TEST(byte_level_gguf_is_checked) {
    static const struct {
        const char *pre, *merge, *flag;
        kvq_status  status;
        const char *fragment;
    } BAD[] = {
        {"dbrx", "1 2", NULL, KVQ_ERR_UNSUPPORTED, "pre-tokenizer 'dbrx'"},
        {NULL, "1 2", NULL, KVQ_ERR_UNSUPPORTED, "tokenizer.ggml.pre"},
        {"smollm", NULL, NULL, KVQ_ERR_INPUT, "without merges"},
        {"smollm", "12", NULL, KVQ_ERR_INPUT, "merge 1 is not a pair"},
        {"smollm", "1 ", NULL, KVQ_ERR_INPUT, "merge 1 is not a pair"},
        {"smollm", "1 b", NULL, KVQ_ERR_INPUT, "merge 1 joins '1' and 'b'"},
        {"smollm", "1 2", "tokenizer.ggml.add_space_prefix", KVQ_ERR_UNSUPPORTED, "add_space_prefix"},
    };
    kvq_context    ctx = kvq_test_context();
    kvq_tokenizer *t = NULL;
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kvq_error err = {0};
        kvq_test_failed(kvq_tokenizer_open(&ctx, write_byte_level(BAD[i].pre, BAD[i].merge, BAD[i].flag), &t, &err),
                        BAD[i].status, &err, BAD[i].fragment);
    }
}
END_TEST

// The hash names what decides over ids: it follows the merges, and nothing else changes it.
START_TEST(gguf_hash_follows_what_ids_depend_on) {
    char                     hashes[3][KVQ_SHA256_HEX];
    kvq_context              ctx = kvq_test_context();
    static const char *const MERGES[] = {"1 2", "1 2", "a 1"}, *const FLAGS[] = {NULL, "tokenizer.ggml.add_bos_token",
                                                                                 NULL};
    for (int i = 0; i < 3; i++) {
        kvq_tokenizer *t = open_good(write_byte_level("smollm", MERGES[i], FLAGS[i]));
        strcpy(hashes[i], kvq_tokenizer_describe(t).sha256);
        kvq_tokenizer_close(&ctx, &t);
    }
    ck_assert_str_eq(hashes[0], hashes[1]);
    ck_assert_str_ne(hashes[0], hashes[2]);
}
END_TEST

// ---------------------------------------------------------------- memory

static void *rationed_alloc(void *user, size_t bytes) {
    long *left = user;
    return (*left)-- > 0 ? aligned_alloc(64, bytes) : NULL;
}

static void rationed_release(void *user, void *p) {
    (void)user;
    free(p);
}

START_TEST(any_failing_allocation_is_reported) {
    const char *path = write_small(PIECES, N_PIECES, &(variation){.bos = 1});
    bool        enough = false;
    for (long ration = 0; !enough; ration++) {
        long           left = ration;
        kvq_context    ctx = kvq_test_context();
        kvq_error      err = {0};
        kvq_tokenizer *t = NULL;
        kvq_ids        ids = {0};
        ctx.alloc = rationed_alloc;
        ctx.release = rationed_release;
        ctx.user = &left;
        kvq_status status = kvq_tokenizer_open(&ctx, path, &t, &err);
        if (status == KVQ_OK) status = kvq_tokenizer_encode(&ctx, t, "xyz \xff", 5, true, &ids, &err);
        enough = status == KVQ_OK;
        if (!enough) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
        kvq_ids_free(&ctx, &ids);
        kvq_tokenizer_close(&ctx, &t);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_GOLDEN_LOOP(sentencepiece_json_gives_reference_ids, (int)(sizeof SENTENCEPIECE / sizeof *SENTENCEPIECE)),
    KVQ_GOLDEN_CASE(sentencepiece_json_parses_special_tokens),
    KVQ_GOLDEN_CASE(sentencepiece_gguf_gives_reference_ids),
    KVQ_SMOLLM2_CASE(smollm2_gguf_gives_reference_ids),
    KVQ_SMOLLM2_CASE(smollm2_json_gives_reference_ids),
    KVQ_CASE(sentencepiece_gguf_merges_by_score),
    KVQ_CASE(sentencepiece_gguf_is_checked),
    KVQ_CASE(byte_level_gguf_pre_tokenizers),
    KVQ_CASE(byte_level_gguf_is_checked),
    KVQ_CASE(gguf_hash_follows_what_ids_depend_on),
    KVQ_CASE(any_failing_allocation_is_reported),
};
KVQ_TEST_MAIN("tokenizer", CASES)
