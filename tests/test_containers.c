// SPDX-License-Identifier: Apache-2.0
//
// The two containers of weights: what a damaged, hostile or unsupported file is refused for, and that none of them
// crashes.
#include "checkpoint_test.h"
#include "gguf.h"
#include "kvq_make_model.h"

// ---------------------------------------------------------------- safetensors

static void write_safetensors(const char *header, size_t n_data, int64_t announced) {
    size_t   n = strlen(header);
    uint64_t length = announced >= 0 ? (uint64_t)announced : n;
    char    *bytes = calloc(1, 8 + n + n_data);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, n);
    write_bytes(in_folder("m/model.safetensors"), bytes, 8 + n + n_data);
    free(bytes);
}

START_TEST(safetensors_are_refused_by_name) {
    static const struct {
        const char *header;
        size_t      n_data;
        int64_t     announced; // length of the header, -1 = the true one
        kvq_status  status;
        const char *fragment;
    } cases[] = {
        {"{}", 0, 3, KVQ_ERR_INTEGRITY, "of which 3"},
        {"{}", 0, INT64_MAX, KVQ_ERR_INTEGRITY, "no safetensors file"},
        {"{\"a\"", 0, -1, KVQ_ERR_INTEGRITY, "not JSON"},
        {"[]", 0, -1, KVQ_ERR_INTEGRITY, "not a JSON object"},
        {"{\"a\": 1}", 0, -1, KVQ_ERR_INTEGRITY, "'a' has no dtype"},
        {"{\"a\": {\"dtype\": \"F4\", \"shape\": [1], \"data_offsets\": [0, 4]}}", 4, -1, KVQ_ERR_UNSUPPORTED, "'F4'"},
        {"{\"a\": {\"dtype\": \"F32\", \"data_offsets\": [0, 4]}}", 4, -1, KVQ_ERR_INTEGRITY, "no shape"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [-1], \"data_offsets\": [0, 4]}}", 4, -1, KVQ_ERR_INTEGRITY, "shape"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [0.5], \"data_offsets\": [0, 4]}}", 4, -1, KVQ_ERR_INTEGRITY,
         "shape"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1,1,1,1,1,1,1,1,1], \"data_offsets\": [0, 4]}}", 4, -1,
         KVQ_ERR_INTEGRITY, "shape"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}", 4, -1, KVQ_ERR_INTEGRITY, "data_offsets"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [4, 0]}}", 4, -1, KVQ_ERR_INTEGRITY,
         "data_offsets"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 4, -1, KVQ_ERR_INTEGRITY,
         "ends at data byte 8, the file has 4"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 4]}}", 4, -1, KVQ_ERR_INTEGRITY,
         "occupies 4 bytes"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4294967296, 4294967296], \"data_offsets\": [0, 0]}}", 4, -1,
         KVQ_ERR_INTEGRITY, "impossibly large"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]},"
         "\"b\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [2, 6]}}",
         6, -1, KVQ_ERR_INTEGRITY, "'a' and 'b' overlap"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [4, 8]}}", 8, -1, KVQ_ERR_INTEGRITY,
         "bytes 0 to 4"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}}", 8, -1, KVQ_ERR_INTEGRITY,
         "the last 4 bytes"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]},"
         "\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [4, 8]}}",
         8, -1, KVQ_ERR_INTEGRITY, "'a' appears twice"},
        {"{\"__metadata__\": {\"a\": 1}}", 0, -1, KVQ_ERR_INTEGRITY, "__metadata__"},
        {"{\"model.embed_tokens.weight\": {\"dtype\": \"I64\", \"shape\": [288, 64], \"data_offsets\": [0, 147456]}}",
         147456, -1, KVQ_ERR_UNSUPPORTED, "'model.embed_tokens.weight' has type I64"},
        {"{\"model.embed_tokens.weight\": {\"dtype\": \"F32\", \"shape\": [64, 288], \"data_offsets\": [0, 73728]}}",
         73728, -1, KVQ_ERR_INPUT, "'model.embed_tokens.weight' has shape [64, 288], the config of"},
        {"{\"model.embed_tokens.weight\": {\"dtype\": \"F32\", \"shape\": [288, 64, 1], \"data_offsets\": [0, 73728]}}",
         73728, -1, KVQ_ERR_INPUT, "[288, 64, 1]"},
        {"{}", 0, -1, KVQ_ERR_INPUT, "'model.embed_tokens.weight' is missing"},
    };
    kvq_make_options o = kvq_make_options_default();
    kvq_make_model_hf(&o, in_folder("m"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_safetensors(cases[i].header, cases[i].n_data, cases[i].announced);
        refused(in_folder("m"), cases[i].status, cases[i].fragment);
    }
}
END_TEST

START_TEST(a_truncated_safetensors_file_is_refused) {
    kvq_make_options o = kvq_make_options_default();
    size_t           n = 0;
    kvq_make_model_hf(&o, in_folder("m"));
    char *bytes = read_bytes(in_folder("m/model.safetensors"), &n);
    for (size_t keep = 0; keep < n; keep += keep < 16 ? 1 : 997) {
        write_bytes(in_folder("m/model.safetensors"), bytes, keep);
        refused(in_folder("m"), KVQ_ERR_INTEGRITY, "model.safetensors");
    }
    free(bytes);
}
END_TEST

START_TEST(shards_and_index_must_agree) {
    static const struct {
        const char *index;
        kvq_status  status;
        const char *fragment;
    } cases[] = {
        {"{}", KVQ_ERR_INPUT, "no weight_map"},
        {"{\"weight_map\": {\"a\": \"../x.safetensors\"}}", KVQ_ERR_INPUT, "'../x.safetensors'"},
        {"{\"weight_map\": {\"a\": 1}}", KVQ_ERR_INPUT, "tensor 'a'"},
        {"{\"weight_map\": {\"a\": \"none.safetensors\"}}", KVQ_ERR_NOT_FOUND, "none.safetensors"},
        {"{\"weight_map\": {\"a\": \"model-00001-of-00002.safetensors\"}}", KVQ_ERR_INTEGRITY,
         "'a' is not in model-00001"},
        {"{\"weight_map\": {\"model.norm.weight\": \"model-00001-of-00002.safetensors\"}}", KVQ_ERR_INTEGRITY,
         "lists 1 tensors"},
    };
    kvq_make_options o = kvq_make_options_default();
    o.n_shards = 2;
    kvq_make_model_hf(&o, in_folder("m"));
    close_it(open_good(in_folder("m")));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_bytes(in_folder("m/model.safetensors.index.json"), cases[i].index, strlen(cases[i].index));
        refused(in_folder("m"), cases[i].status, cases[i].fragment);
    }
    kvq_make_model_hf(&o, in_folder("m"));
    size_t n = 0; // both shards hold the same tensors
    char  *bytes = read_bytes(in_folder("m/model-00001-of-00002.safetensors"), &n);
    write_bytes(in_folder("m/model-00002-of-00002.safetensors"), bytes, n);
    free(bytes);
    refused(in_folder("m"), KVQ_ERR_INTEGRITY, "is in");
}
END_TEST

// ---------------------------------------------------------------- GGUF

// A GGUF written piece by piece.
typedef struct builder {
    char   bytes[4096];
    size_t n;
} builder;

static void put(builder *b, const void *p, size_t n) {
    ck_assert_uint_le(b->n + n, sizeof b->bytes);
    memcpy(b->bytes + b->n, p, n);
    b->n += n;
}

static void put_u32(builder *b, uint32_t x) { put(b, &x, sizeof x); }
static void put_u64(builder *b, uint64_t x) { put(b, &x, sizeof x); }

static void put_string(builder *b, const char *text) {
    put_u64(b, strlen(text));
    put(b, text, strlen(text));
}

static builder begin_gguf(uint32_t version, uint64_t n_tensors, uint64_t n_pairs) {
    builder b = {.n = 0};
    put(&b, "GGUF", 4);
    put_u32(&b, version);
    put_u64(&b, n_tensors);
    put_u64(&b, n_pairs);
    return b;
}

static void put_key(builder *b, const char *key, gguf_type type) {
    put_string(b, key);
    put_u32(b, type);
}

static void put_tensor(builder *b, const char *name, uint32_t n_dims, uint64_t dim0, uint64_t dim1, uint32_t type,
                       uint64_t offset) {
    put_string(b, name);
    put_u32(b, n_dims);
    for (uint32_t i = 0; i < n_dims && i < 5; i++) put_u64(b, i == 0 ? dim0 : i == 1 ? dim1 : 1);
    put_u32(b, type);
    put_u64(b, offset);
}

static kvq_status open_gguf(const builder *b, gguf_file **file, kvq_error *err) {
    kvq_context ctx = kvq_test_context();
    write_bytes(in_folder("t.gguf"), b->bytes, b->n);
    return gguf_open(&ctx, in_folder("t.gguf"), file, err);
}

static void gguf_refused(const builder *b, kvq_status expected, const char *fragment) {
    gguf_file *file = NULL;
    kvq_error  err = {0};
    kvq_status status = open_gguf(b, &file, &err);
    kvq_test_failed(status, expected, &err, fragment);
    ck_assert_ptr_null(file);
}

static builder all_value_types(void) {
    const uint8_t   bytes[8] = {0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}; // -2, or the largest number less one
    const float     f = 0.5f;
    const double    d = -0.25;
    builder         b = begin_gguf(3, 0, 15);
    const gguf_type integers[] = {GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_U64, GGUF_I64};
    const size_t    sizes[] = {1, 1, 2, 2, 4, 4, 8, 8};
    for (int i = 0; i < 8; i++) {
        put_key(&b, (const char *[]){"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"}[i], integers[i]);
        put(&b, bytes, sizes[i]);
    }
    put_key(&b, "f32", GGUF_F32);
    put(&b, &f, sizeof f);
    put_key(&b, "f64", GGUF_F64);
    put(&b, &d, sizeof d);
    put_key(&b, "yes", GGUF_BOOL);
    put(&b, "\1", 1);
    put_key(&b, "text", GGUF_STRING);
    put_string(&b, "hello");
    put_key(&b, "words", GGUF_ARRAY);
    put_u32(&b, GGUF_STRING);
    put_u64(&b, 2);
    put_string(&b, "a");
    put_string(&b, "");
    put_key(&b, "numbers", GGUF_ARRAY);
    put_u32(&b, GGUF_I32);
    put_u64(&b, 3);
    put(&b, "abcdefghijkl", 12);
    put_key(&b, "none", GGUF_ARRAY);
    put_u32(&b, GGUF_STRING);
    put_u64(&b, 0);
    return b;
}

START_TEST(gguf_values_convert_without_loss) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    gguf_file  *f = NULL;
    builder     b = all_value_types();
    int64_t     i = 0;
    double      x = 0;
    bool        yes = false;
    gguf_string s;
    gguf_array  a;
    kvq_test_ok(open_gguf(&b, &f, &err), &err);
    ck_assert(gguf_get_int(f, "u8", &i) && i == 254 && gguf_get_int(f, "i8", &i) && i == -2);
    ck_assert(gguf_get_int(f, "u16", &i) && i == 65534 && gguf_get_int(f, "i16", &i) && i == -2);
    ck_assert(gguf_get_int(f, "u32", &i) && i == 4294967294 && gguf_get_int(f, "i32", &i) && i == -2);
    ck_assert(!gguf_get_int(f, "u64", &i) && gguf_get_int(f, "i64", &i) && i == -2);
    ck_assert(!gguf_get_int(f, "f32", &i) && !gguf_get_int(f, "text", &i) && !gguf_get_int(f, "no", &i) && i == -2);
    ck_assert(gguf_get_float(f, "f32", &x) && x == 0.5 && gguf_get_float(f, "f64", &x) && x == -0.25);
    ck_assert(gguf_get_float(f, "i16", &x) && x == -2 && !gguf_get_float(f, "yes", &x));
    ck_assert(gguf_get_bool(f, "yes", &yes) && yes && !gguf_get_bool(f, "u8", &yes));
    ck_assert(gguf_get_string(f, "text", &s) && s.n == 5 && memcmp(s.text, "hello", 5) == 0);
    ck_assert(gguf_get_array(f, "words", GGUF_STRING, &a) && a.count == 2 && !gguf_get_array(f, "words", GGUF_I32, &a));
    const uint8_t *cursor = a.data;
    s = gguf_next_string(&a, &cursor);
    ck_assert(s.n == 1 && s.text[0] == 'a');
    s = gguf_next_string(&a, &cursor);
    ck_assert(s.n == 0 && s.text != NULL);
    s = gguf_next_string(&a, &cursor);
    ck_assert(s.text == NULL);
    ck_assert(gguf_get_array(f, "numbers", GGUF_I32, &a) && a.count == 3 && memcmp(a.data, "abcdefghijkl", 12) == 0);
    ck_assert(gguf_get_array(f, "none", GGUF_STRING, &a) && a.count == 0);
    ck_assert(gguf_key(f, 0).n == 2 && gguf_key(f, 15).text == NULL && gguf_has(f, "f64") && !gguf_has(f, "f6"));
    gguf_close(&ctx, &f);
}
END_TEST

// Cut anywhere, a file of this kind is refused (a cut exactly at the end is the file itself).
START_TEST(gguf_cut_anywhere_is_refused) {
    builder b = all_value_types();
    size_t  whole = b.n;
    for (b.n = 0; b.n < whole; b.n++) {
        gguf_file *file = NULL;
        kvq_error  err = {0};
        ck_assert_int_ne(open_gguf(&b, &file, &err), KVQ_OK);
        ck_assert_ptr_nonnull(strstr(err.message, "t.gguf"));
    }
}
END_TEST

START_TEST(gguf_is_refused_by_name) {
    builder b = begin_gguf(1, 0, 0);
    gguf_refused(&b, KVQ_ERR_UNSUPPORTED, "version 1");
    b = begin_gguf(0x03000000, 0, 0);
    gguf_refused(&b, KVQ_ERR_UNSUPPORTED, "big-endian");
    b = begin_gguf(3, UINT64_MAX, 0);
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "18446744073709551615 tensors");
    b = begin_gguf(3, 0, 1);
    put_key(&b, "k", (gguf_type)13);
    put_u32(&b, 0);
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "value type 13");
    b = begin_gguf(3, 0, 1);
    put_key(&b, "k", GGUF_BOOL);
    put(&b, "\2", 1);
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "boolean 2");
    b = begin_gguf(3, 0, 1);
    put_key(&b, "k", GGUF_ARRAY);
    put_u32(&b, GGUF_ARRAY);
    put_u64(&b, 1);
    gguf_refused(&b, KVQ_ERR_UNSUPPORTED, "array of arrays");
    b = begin_gguf(3, 0, 1);
    put_key(&b, "k", GGUF_ARRAY);
    put_u32(&b, GGUF_U64);
    put_u64(&b, UINT64_MAX / 4); // times eight wraps around
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "beyond the end");
    b = begin_gguf(3, 0, 2);
    for (int i = 0; i < 2; i++) {
        put_key(&b, "k", GGUF_U32);
        put_u32(&b, 0);
    }
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "'k' appears twice");
    b = begin_gguf(3, 0, 1);
    put_key(&b, "general.alignment", GGUF_U32);
    put_u32(&b, 12);
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "multiple of 8 (12)");
}
END_TEST

START_TEST(gguf_tensors_are_refused_by_name) {
    static const struct {
        uint32_t    n_dims;
        uint64_t    dim0, dim1;
        uint32_t    type;
        uint64_t    offset;
        kvq_status  status;
        const char *fragment;
    } cases[] = {
        {0, 1, 1, 0, 0, KVQ_ERR_INTEGRITY, "'t' has 0 dimensions"},
        {5, 1, 1, 0, 0, KVQ_ERR_INTEGRITY, "'t' has 5 dimensions"},
        {1, 4, 1, 16, 0, KVQ_ERR_UNSUPPORTED, "'t' has type IQ2_XXS (16)"},
        {1, 4, 1, 99, 0, KVQ_ERR_UNSUPPORTED, "'t' has type unknown (99)"},
        {1, 33, 1, 8, 0, KVQ_ERR_INTEGRITY, "rows of 33 values, not a multiple of 32 (Q8_0)"},
        {2, 4, 0, 0, 0, KVQ_ERR_INTEGRITY, "empty"},
        {2, 1ull << 40, 1ull << 40, 0, 0, KVQ_ERR_INTEGRITY, "impossibly large"},
        {1, UINT64_MAX, 1, 0, 0, KVQ_ERR_INTEGRITY, "impossibly large"},
        {1, (1ull << 62) + 1, 1, 0, 0, KVQ_ERR_INTEGRITY, "impossibly large"}, // times four bytes wraps around to four
        {1, 4, 1, 0, 8, KVQ_ERR_INTEGRITY, "starts at 8, not a multiple of 32"},
        {1, 25, 1, 0, 0, KVQ_ERR_INTEGRITY, "goes beyond the end of the 96 data bytes"},
        {1, 8, 1, 0, 1ull << 63, KVQ_ERR_INTEGRITY, "goes beyond the end"},
        {1, 9, 1, 0, 32, KVQ_ERR_INTEGRITY, "'t' and 'u' overlap"},
    };
    static const char zeros[128];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        builder b = begin_gguf(3, 2, 0);
        put_tensor(&b, "u", 1, 8, 1, 0, 64);
        put_tensor(&b, "t", cases[i].n_dims, cases[i].dim0, cases[i].dim1, cases[i].type, cases[i].offset);
        put(&b, zeros, (32 - b.n % 32) % 32);
        put(&b, zeros, 96);
        gguf_refused(&b, cases[i].status, cases[i].fragment);
    }
    builder b = begin_gguf(3, 2, 0);
    put_tensor(&b, "t", 1, 8, 1, 0, 0);
    put_tensor(&b, "t", 1, 8, 1, 0, 32);
    put(&b, zeros, (32 - b.n % 32) % 32);
    put(&b, zeros, 64);
    gguf_refused(&b, KVQ_ERR_INTEGRITY, "'t' appears twice");
}
END_TEST

// Replaces the first occurrence of a text in a file by another of the same length.
static void patch(const char *path, const char *from, const char *to, size_t n) {
    size_t size = 0, at = 0;
    char  *bytes = read_bytes(path, &size);
    while (at + n <= size && memcmp(bytes + at, from, n) != 0) at++;
    ck_assert_uint_le(at + n, size);
    memcpy(bytes + at, to, n);
    write_bytes(path, bytes, size);
    free(bytes);
}

START_TEST(gguf_models_are_refused_by_name) {
    static const struct {
        const char *from, *to;
        size_t      n;
        kvq_status  status;
        const char *fragment;
    } cases[] = {
        {"\5\0\0\0\0\0\0\0llama", "\5\0\0\0\0\0\0\0gemma", 13, KVQ_ERR_UNSUPPORTED, "'gemma' is not supported"},
        {"llama.block_count", "llama.xlock_count", 17, KVQ_ERR_INPUT, "'llama.block_count' is missing"},
        {"llama.attention.head_count\4\0\0\0\4", "llama.attention.head_count\4\0\0\0\0", 31, KVQ_ERR_INPUT,
         "head_count' is 0"},
        {"value_length\4\0\0\0\20", "value_length\4\0\0\0\10", 17, KVQ_ERR_UNSUPPORTED, "values of width 8"},
        {"dimension_count\4\0\0\0\20", "dimension_count\4\0\0\0\10", 20, KVQ_ERR_UNSUPPORTED, "8 rotated channels"},
        {"vocab_size\4\0\0\0\40\1", "vocab_size\4\0\0\0\41\1", 16, KVQ_ERR_INPUT, "has shape [288, 64], the config of"},
        {"bos_token_id\4\0\0\0\0\0", "bos_token_id\4\0\0\0\0\2", 18, KVQ_ERR_INPUT, "bos 512"},
        {"blk.1.attn_k.weight", "blk.7.attn_k.weight", 19, KVQ_ERR_INPUT, "'blk.1.attn_k.weight' is missing"},
        {"general.name", "llama.xyz.am", 12, KVQ_OK, ""},
        {"llama.context_length", "llama.expert_counttt", 20, KVQ_ERR_INPUT, "'llama.context_length' is missing"},
    };
    kvq_make_options o = kvq_make_options_default();
    const char      *path = in_folder("m.gguf");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvq_make_model_gguf(&o, path);
        patch(path, cases[i].from, cases[i].to, cases[i].n);
        if (cases[i].status == KVQ_OK)
            close_it(open_good(path));
        else
            refused(path, cases[i].status, cases[i].fragment);
    }
}
END_TEST

// Keys that would change the result, one at a time, in front of the others of a good file.
START_TEST(gguf_keys_that_change_the_model_are_refused) {
    static const struct {
        const char *key;
        gguf_type   type;
        uint32_t    value; // as stored: 0x3f000000 is 0.5
        const char *fragment;
    } cases[] = {
        {"llama.expert_count", GGUF_U32, 8, "'llama.expert_count' is 8"},
        {"llama.attention.sliding_window", GGUF_U32, 128, "sliding_window"},
        {"llama.attention.causal", GGUF_U32, 0, "'llama.attention.causal' is 0"},
        {"llama.attn_logit_softcapping", GGUF_F32, 0x3f000000, "attn_logit_softcapping' is 0.5"},
        {"llama.rope.scaling.attn_factor", GGUF_F32, 0x3f000000, "attention factor (0.5) without yarn"},
        {"split.count", GGUF_U32, 2, "one of 2 parts"},
    };
    kvq_make_options o = kvq_make_options_default();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        builder  b = {.n = 0};
        size_t   n = 0;
        uint64_t n_pairs = 0;
        kvq_make_model_gguf(&o, in_folder("good.gguf"));
        char *good = read_bytes(in_folder("good.gguf"), &n);
        memcpy(&n_pairs, good + 16, 8);
        n_pairs++;
        memcpy(good + 16, &n_pairs, 8);
        put_key(&b, cases[i].key, cases[i].type);
        put_u32(&b, cases[i].value);
        char *bad = calloc(1, n + b.n + 32); // data move by less than the alignment: what is refused comes first
        memcpy(bad, good, 24);
        memcpy(bad + 24, b.bytes, b.n);
        memcpy(bad + 24 + b.n, good + 24, n - 24);
        write_bytes(in_folder("bad.gguf"), bad, n + b.n + 32);
        refused(in_folder("bad.gguf"), KVQ_ERR_UNSUPPORTED, cases[i].fragment);
        free(good);
        free(bad);
    }
}
END_TEST

// Flipped bits and cuts in the head of a file: any status is fine, a crash is not. The sanitizer build is the judge.
START_TEST(damaged_gguf_never_crashes) {
    kvq_make_options o = kvq_make_options_default();
    kvq_context      ctx = kvq_test_context();
    size_t           n = 0;
    o.gguf_type = "Q8_0";
    kvq_make_model_gguf(&o, in_folder("m.gguf"));
    char *good = read_bytes(in_folder("m.gguf"), &n), *bad = malloc(n);
    for (uint64_t i = 0; i < 300; i++) {
        kvq_checkpoint *c = NULL;
        size_t          keep = i % 3 == 0 ? (size_t)kvq_rng_below(5, KVQ_RNG_TEST, 1, i, n) : n;
        memcpy(bad, good, n);
        for (uint64_t flip = 0; flip < 1 + i % 4; flip++) {
            size_t head = i % 2 == 0 ? 300 : 10000; // counts and sizes, or the whole head
            bad[kvq_rng_below(5, KVQ_RNG_TEST, 2, 4 * i + flip, head)] ^=
                (char)(1 << kvq_rng_below(5, KVQ_RNG_TEST, 3, 4 * i + flip, 8));
        }
        write_bytes(in_folder("bad.gguf"), bad, keep);
        if (kvq_checkpoint_open(&ctx, in_folder("bad.gguf"), &c, NULL) == KVQ_OK) kvq_checkpoint_close(&ctx, &c);
    }
    free(good);
    free(bad);
}
END_TEST

START_TEST(damaged_safetensors_never_crash) {
    kvq_make_options o = kvq_make_options_default();
    kvq_context      ctx = kvq_test_context();
    size_t           n = 0;
    kvq_make_model_hf(&o, in_folder("m"));
    char *good = read_bytes(in_folder("m/model.safetensors"), &n), *bad = malloc(n);
    for (uint64_t i = 0; i < 300; i++) {
        kvq_checkpoint *c = NULL;
        memcpy(bad, good, n);
        for (uint64_t flip = 0; flip < 1 + i % 4; flip++) {
            bad[kvq_rng_below(6, KVQ_RNG_TEST, 2, 4 * i + flip, 2500)] ^=
                (char)(1 << kvq_rng_below(6, KVQ_RNG_TEST, 3, 4 * i + flip, 8));
        }
        write_bytes(in_folder("m/model.safetensors"), bad, n);
        if (kvq_checkpoint_open(&ctx, in_folder("m"), &c, NULL) == KVQ_OK) kvq_checkpoint_close(&ctx, &c);
    }
    free(good);
    free(bad);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(safetensors_are_refused_by_name),
    KVQ_CASE(a_truncated_safetensors_file_is_refused),
    KVQ_CASE(shards_and_index_must_agree),
    KVQ_CASE(gguf_values_convert_without_loss),
    KVQ_CASE(gguf_cut_anywhere_is_refused),
    KVQ_CASE(gguf_is_refused_by_name),
    KVQ_CASE(gguf_tensors_are_refused_by_name),
    KVQ_CASE(gguf_models_are_refused_by_name),
    KVQ_CASE(gguf_keys_that_change_the_model_are_refused),
    KVQ_CASE(damaged_gguf_never_crashes),
    KVQ_CASE(damaged_safetensors_never_crash),
};
KVQ_TEST_MAIN("containers", CASES)
