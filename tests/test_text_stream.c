// SPDX-License-Identifier: Apache-2.0
// Text files in parts: plain and compressed, as one document or one per line, read twice, and what is refused.
#include <archive.h>
#include <archive_entry.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kvq_io.h"
#include "kvq_test.h"
#include "limited_memory.h"

static const char *in_folder(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

static const char *write_file(const char *name, const void *data, size_t n) {
    const char *path = in_folder(name);
    FILE       *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    if (n > 0) ck_assert_uint_eq(fwrite(data, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
    return path;
}

static const char *write_text(const char *name, const char *text) { return write_file(name, text, strlen(text)); }

typedef int (*add_filter)(struct archive *);
static const struct packing {
    const char *suffix;
    add_filter  add;
} PACKINGS[] = {
    {"", NULL},
    {".gz", archive_write_add_filter_gzip},
    {".zst", archive_write_add_filter_zstd},
    {".xz", archive_write_add_filter_xz},
    {".bz2", archive_write_add_filter_bzip2},
};
enum { N_PACKINGS = sizeof PACKINGS / sizeof *PACKINGS };

// Compresses text into out; returns the number of bytes.
static size_t pack(add_filter add, const void *text, size_t n, void *out, size_t size) {
    size_t                used = 0;
    struct archive       *a = archive_write_new();
    struct archive_entry *entry = archive_entry_new();
    ck_assert_int_eq(archive_write_set_format_raw(a), ARCHIVE_OK);
    if (add != NULL) ck_assert_int_eq(add(a), ARCHIVE_OK);
    (void)archive_write_set_bytes_in_last_block(a, 1); // no padding
    ck_assert_int_eq(archive_write_open_memory(a, out, size, &used), ARCHIVE_OK);
    archive_entry_set_pathname(entry, "data");
    archive_entry_set_filetype(entry, AE_IFREG);
    ck_assert_int_eq(archive_write_header(a, entry), ARCHIVE_OK);
    if (n > 0) ck_assert_int_eq(archive_write_data(a, text, n), (la_ssize_t)n);
    archive_entry_free(entry);
    ck_assert_int_eq(archive_write_close(a), ARCHIVE_OK);
    (void)archive_write_free(a);
    return used;
}

static const char *write_packed(const struct packing *p, const char *name, const void *text, size_t n) {
    size_t size = n + 4096;
    void  *packed = malloc(size);
    char   full[64];
    (void)snprintf(full, sizeof full, "%s%s", name, p->suffix);
    const char *path = write_file(full, packed, pack(p->add, text, n, packed, size));
    free(packed);
    return path;
}

// Everything a text gives, documents ended by a zero byte each.
typedef struct gathered {
    char   *data;
    size_t  n;
    int64_t n_documents, n_parts;
} gathered;

static kvq_status gather(kvq_text *text, gathered *g, kvq_error *err) {
    kvq_text_part part = {0};
    bool          found = true;
    *g = (gathered){0};
    for (;;) {
        kvq_status status = kvq_text_next(text, &part, &found, err);
        if (status != KVQ_OK || !found) return status;
        ck_assert_uint_le(part.n, (size_t)1 << 20);
        g->data = realloc(g->data, g->n + part.n + 1);
        if (part.n > 0) memcpy(g->data + g->n, part.data, part.n);
        g->n += part.n;
        g->n_parts++;
        if (part.ends_document) {
            g->data[g->n++] = 0;
            g->n_documents++;
        }
    }
}

static kvq_text *open_good(const char *path, kvq_text_format format, const char *field) {
    static kvq_context ctx;
    kvq_error          err = {0};
    kvq_text          *text = NULL;
    ctx = kvq_test_context();
    kvq_test_ok(kvq_text_open(&ctx, path, format, field, &text, &err), &err);
    return text;
}

static void check_text(const char *path, kvq_text_format format, const char *field, const void *expected, size_t n) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_text   *text = open_good(path, format, field);
    gathered    g;
    kvq_test_ok(gather(text, &g, &err), &err);
    ck_assert_msg(g.n == n && (n == 0 || memcmp(g.data, expected, n) == 0),
                  "%s: %zu bytes in %lld documents instead of %zu bytes", path, g.n, (long long)g.n_documents, n);
    free(g.data);
    kvq_text_close(&ctx, &text);
    ck_assert_ptr_null(text);
}

static void check_fails(const char *path, kvq_text_format format, kvq_status status, const char *fragment) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_text   *text = NULL;
    gathered    g = {0};
    kvq_status  got = kvq_text_open(&ctx, path, format, NULL, &text, &err);
    if (got == KVQ_OK) got = gather(text, &g, &err);
    kvq_test_failed(got, status, &err, fragment);
    ck_assert_msg(strstr(err.message, kvq_file_name(path)) != NULL, "'%s' does not name the file", err.message);
    free(g.data);
    kvq_text_close(&ctx, &text);
}

// ---------------------------------------------------------------- one document

// Characters of one to four bytes, so that some lie across the ends of parts.
static size_t make_text(char *out, size_t size) {
    static const char *const CHARACTERS[] = {"a", "\u00e9", "\u4e2d", "\U0001f600", "\n", " "};
    size_t                   n = 0;
    for (uint64_t i = 0; n + 5 < size; i++) {
        const char *c = CHARACTERS[kvq_rng_below(1, KVQ_RNG_TEST, 0, i, 6)];
        memcpy(out + n, c, strlen(c));
        n += strlen(c);
    }
    out[n++] = 0; // what gather adds
    return n;
}

START_TEST(a_text_is_one_document_however_it_is_packed) {
    enum { SIZE = 1300000 };                                                        // more than one part
    static const char *const NAMES[] = {"text.gz", "text.zst", "text.txt", "text"}; // content decides
    char                    *text = malloc(SIZE), *packed = malloc(SIZE + 4096);
    size_t                   n = make_text(text, SIZE);
    size_t                   n_packed = pack(PACKINGS[_i].add, text, n - 1, packed, SIZE + 4096);
    for (size_t k = 0; k < sizeof NAMES / sizeof *NAMES; k++)
        check_text(write_file(NAMES[k], packed, n_packed), KVQ_TEXT_AUTO, NULL, text, n);
    check_text(write_packed(&PACKINGS[_i], "empty", "", 0), KVQ_TEXT_AUTO, NULL, "", 1);
    check_text(write_packed(&PACKINGS[_i], "one", "x", 1), KVQ_TEXT_AUTO, NULL, "x", 2);
    free(packed);
    free(text);
}
END_TEST

START_TEST(parts_end_between_characters) {
    enum { SIZE = 3 << 20 };
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    char         *data = malloc(SIZE);
    size_t        n = make_text(data, SIZE) - 1;
    kvq_text     *text = open_good(write_file("text", data, n), KVQ_TEXT_RAW, NULL);
    kvq_text_part part;
    bool          found;
    int           n_parts = 0;
    for (kvq_test_ok(kvq_text_next(text, &part, &found, &err), &err); found; n_parts++) {
        ck_assert_uint_eq(kvq_utf8_valid_prefix(part.data, part.n), part.n);
        kvq_test_ok(kvq_text_next(text, &part, &found, &err), &err);
    }
    ck_assert_int_ge(n_parts, 3);
    kvq_text_close(&ctx, &text);
    free(data);
}
END_TEST

START_TEST(the_hash_is_of_the_stored_file) {
    enum { SIZE = 1200000 };
    kvq_context     ctx = kvq_test_context();
    kvq_error       err = {0};
    char           *data = malloc(SIZE);
    size_t          n = make_text(data, SIZE) - 1;
    const char     *path = write_packed(&PACKINGS[_i], "text", data, n);
    kvq_mapped_file file = {0};
    char            expected[KVQ_SHA256_HEX], got[KVQ_SHA256_HEX];
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    kvq_test_ok(kvq_sha256_of(file.data, file.bytes, expected, &err), &err);
    kvq_unmap_file(&file);
    for (int when = 0; when < 3; when++) { // before anything is read, behind the first part, at the end
        kvq_text     *text = open_good(path, KVQ_TEXT_RAW, NULL);
        kvq_text_part part;
        bool          found;
        gathered      g = {0};
        if (when == 1) kvq_test_ok(kvq_text_next(text, &part, &found, &err), &err);
        if (when == 2) kvq_test_ok(gather(text, &g, &err), &err);
        free(g.data);
        kvq_test_ok(kvq_text_sha256(text, got, &err), &err);
        ck_assert_str_eq(got, expected);
        if (when > 0) { // and what comes in a second reading is the same
            kvq_test_ok(kvq_text_rewind(text, &err), &err);
            kvq_test_ok(gather(text, &g, &err), &err);
            ck_assert_uint_eq(g.n, n + 1);
            ck_assert(memcmp(g.data, data, n) == 0);
            free(g.data);
            kvq_test_ok(kvq_text_sha256(text, got, &err), &err);
            ck_assert_str_eq(got, expected);
        }
        kvq_text_close(&ctx, &text);
    }
    free(data);
}
END_TEST

START_TEST(compressed_files_may_be_several_in_one) {
    char   packed[2048];
    size_t first = pack(PACKINGS[_i].add, "one ", 4, packed, sizeof packed);
    size_t second = pack(PACKINGS[_i].add, "two", 3, packed + first, sizeof packed - first);
    check_text(write_file("text", packed, first + second), KVQ_TEXT_RAW, NULL, "one two", 8);
}
END_TEST

// ---------------------------------------------------------------- documents

START_TEST(each_line_is_a_document) {
    static const char LINES[] = "{\"text\": \"one\"}\n"
                                "\n  \r\n"
                                "{\"id\": 7, \"text\": \"two\\nlines \\u00e9\", \"x\": {\"text\": \"no\"}}\r\n"
                                "{\"text\": \"\"}\n"
                                "{\"text\": \"last\", \"other\": \"field\"}";
    static const char TEXTS[] = "one\0two\nlines \u00e9\0\0last";
    check_text(write_text("a.jsonl", LINES), KVQ_TEXT_AUTO, NULL, TEXTS, sizeof TEXTS);
    check_text(write_text("a.ndjson", LINES), KVQ_TEXT_AUTO, NULL, TEXTS, sizeof TEXTS);
    check_text(write_text("a.txt", LINES), KVQ_TEXT_JSONL, NULL, TEXTS, sizeof TEXTS);
    check_text(write_text("a.jsonl", LINES), KVQ_TEXT_RAW, NULL, LINES, sizeof LINES);
    check_text(write_text("ajsonl", LINES), KVQ_TEXT_AUTO, NULL, LINES, sizeof LINES);
    check_text(write_text("b.jsonl", "{\"other\": \"x\"}\n"), KVQ_TEXT_AUTO, "other", "x", 2);
    check_text(write_text("c.jsonl", "\n\n"), KVQ_TEXT_AUTO, NULL, "", 0);
    for (int k = 0; k < N_PACKINGS; k++)
        check_text(write_packed(&PACKINGS[k], "d.jsonl", LINES, sizeof LINES - 1), KVQ_TEXT_AUTO, NULL, TEXTS,
                   sizeof TEXTS);
}
END_TEST

// Lines across the ends of parts, and one longer than several parts.
START_TEST(lines_may_be_of_any_length) {
    enum { N = 5000, SIZE = 12 << 20 };
    char  *lines = malloc(SIZE), *texts = malloc(SIZE);
    size_t n_lines = 0, n_texts = 0;
    for (uint64_t i = 0; i < N; i++) {
        size_t length = i == 2500 ? (size_t)5 << 20 : (size_t)kvq_rng_below(3, KVQ_RNG_TEST, 0, i, 1200);
        memcpy(lines + n_lines, "{\"text\":\"", 9);
        n_lines += 9;
        for (size_t k = 0; k < length; k++) lines[n_lines++] = texts[n_texts++] = (char)('a' + (i + k) % 26);
        memcpy(lines + n_lines, "\"}\n", 3);
        n_lines += 3;
        texts[n_texts++] = 0;
    }
    check_text(write_file("a.jsonl", lines, n_lines), KVQ_TEXT_AUTO, NULL, texts, n_texts);
    free(lines);
    free(texts);
}
END_TEST

START_TEST(a_line_that_is_no_document_is_named) {
    static const struct {
        const char *line, *fragment;
    } BAD[] = {
        {"{\"text\": \"x\"", "line 3: not JSON: syntax error at byte 12"},
        {"plain text", "line 3: not JSON"},
        {"{\"text\": \"x\"} {\"text\": \"y\"}", "line 3: not JSON"},
        {"[\"text\"]", "line 3: is not a JSON object"},
        {"\"text\"", "line 3: is not a JSON object"},
        {"{\"content\": \"x\"}", "line 3: field 'text' is missing"},
        {"{\"text\": null}", "line 3: field 'text' is missing"},
        {"{\"text\": 5}", "line 3: field 'text' is not a string"},
        {"{\"text\": [\"x\"]}", "line 3: field 'text' is not a string"},
        {"{\"text\": \"x\", \"text\": \"y\"}", "line 3: field 'text' appears twice"},
        {"{\"text\": \"a\\u0000b\"}", "line 3: a string holds a zero character"},
    };
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        char lines[256];
        (void)snprintf(lines, sizeof lines, "{\"text\": \"good\"}\n\n%s\n{\"text\": \"good\"}\n", BAD[i].line);
        check_fails(write_text("bad.jsonl", lines), KVQ_TEXT_AUTO, KVQ_ERR_INPUT, BAD[i].fragment);
        (void)snprintf(lines, sizeof lines, "\n\n%s", BAD[i].line); // as the last line, without a line feed
        check_fails(write_text("bad.jsonl", lines), KVQ_TEXT_AUTO, KVQ_ERR_INPUT, BAD[i].fragment);
    }
}
END_TEST

START_TEST(a_line_without_end_is_refused) {
    enum { SIZE = (64 << 20) + 1000 };
    char *line = malloc(SIZE);
    memset(line, 'x', SIZE);
    memcpy(line, "{\"text\": \"a\"}\n", 14);
    check_fails(write_file("long.jsonl", line, SIZE), KVQ_TEXT_AUTO, KVQ_ERR_UNSUPPORTED,
                "line 2 has more than 67108864 bytes");
    free(line);
}
END_TEST

// ---------------------------------------------------------------- what is no text

START_TEST(files_that_are_no_text_are_refused) {
    static const struct {
        const char *bytes;
        size_t      n;
        kvq_status  status;
        const char *fragment;
    } BAD[] = {
        {"PK\x03\x04rest", 8, KVQ_ERR_UNSUPPORTED, "begins as zip"},
        {"\x1f\x8b\x08 not gzip", 12, KVQ_ERR_UNSUPPORTED, "begins as gzip"},
        {"GGUF\x03\0\0\0", 8, KVQ_ERR_UNSUPPORTED, "begins as GGUF"},
        {"\x89HDF\r\n", 6, KVQ_ERR_UNSUPPORTED, "begins as HDF5"},
        {"\xff\xfe"
         "a\0",
         4, KVQ_ERR_UNSUPPORTED, "begins as UTF-16"},
        {"PAR1", 4, KVQ_ERR_UNSUPPORTED, "begins as Parquet"},
        {"\x04\x22\x4d\x18", 4, KVQ_ERR_UNSUPPORTED, "begins as lz4"},
        {"text\0text", 9, KVQ_ERR_INPUT, "byte 4 is zero"},
    };
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        check_fails(write_file("bad.txt", BAD[i].bytes, BAD[i].n), KVQ_TEXT_RAW, BAD[i].status, BAD[i].fragment);
        for (int k = 0; k < N_PACKINGS; k++) { // and compressed
            if (BAD[i].status == KVQ_ERR_INPUT)
                check_fails(write_packed(&PACKINGS[k], "bad", BAD[i].bytes, BAD[i].n), KVQ_TEXT_RAW, BAD[i].status,
                            BAD[i].fragment);
        }
    }
    enum { FAR = 2500000 };
    char *text = calloc(1, FAR + 1);
    memset(text, 'a', FAR);
    check_fails(write_file("far.txt", text, FAR + 1), KVQ_TEXT_RAW, KVQ_ERR_INPUT, "byte 2500000 is zero");
    free(text);
    check_fails(in_folder("nowhere.txt"), KVQ_TEXT_RAW, KVQ_ERR_NOT_FOUND, "cannot be opened");
    check_fails(kvq_test_folder(), KVQ_TEXT_RAW, KVQ_ERR_INPUT, "is a directory");
}
END_TEST

// Cut off anywhere, or with one byte more, a compressed text is damaged; what was read before does not count.
START_TEST(damaged_compression_is_found) {
    enum { SIZE = 300000 };
    char  *text = malloc(SIZE), *packed = malloc(2 * SIZE);
    size_t n_text = make_text(text, SIZE) - 1, n = pack(PACKINGS[_i + 1].add, text, n_text, packed, 2 * SIZE);
    for (size_t i = 0; i < 12; i++) {
        size_t length = i < 6 ? n - 1 - i * 3 : n * (i - 5) / 8;
        check_fails(write_file("cut", packed, length), KVQ_TEXT_RAW, KVQ_ERR_INTEGRITY, "breaks off or is damaged");
    }
    memcpy(packed + n, "more", 4);
    check_fails(write_file("more", packed, n + 4), KVQ_TEXT_RAW, KVQ_ERR_INTEGRITY, "");
    free(text);
    free(packed);
}
END_TEST

// One flipped byte anywhere: an error, or text, and never harm. (gzip and bzip2 differ in what their check sums cover.)
START_TEST(flipped_bytes_do_no_harm) {
    kvq_context ctx = kvq_test_context();
    char        text[600], packed[4096];
    size_t n_text = make_text(text, sizeof text) - 1, n = pack(PACKINGS[_i].add, text, n_text, packed, sizeof packed);
    for (size_t i = 0; i < n; i++) {
        for (int bit = 0; bit < 8; bit += 3) {
            kvq_error err = {0};
            kvq_text *in = NULL;
            gathered  g = {0};
            packed[i] = (char)(packed[i] ^ (1 << bit));
            kvq_status status = kvq_text_open(&ctx, write_file("flipped", packed, n), KVQ_TEXT_RAW, NULL, &in, &err);
            if (status == KVQ_OK) status = gather(in, &g, &err);
            ck_assert(status == KVQ_OK || err.message[0] != 0);
            packed[i] = (char)(packed[i] ^ (1 << bit));
            free(g.data);
            kvq_text_close(&ctx, &in);
        }
    }
}
END_TEST

static void count_warning(void *user, kvq_log_level level, const char *text) {
    int *n = user;
    if (level == KVQ_LOG_WARNING && strstr(text, "not UTF-8 from byte 1048577 on") != NULL) ++*n;
}

START_TEST(malformed_bytes_are_given_as_they_are_after_one_warning) {
    enum { SIZE = 2 << 20 };
    int         n_warnings = 0;
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    char       *data = malloc(SIZE);
    kvq_text   *text = NULL;
    gathered    g;
    memset(data, 'a', SIZE);
    data[1048577] = data[1500000] = data[SIZE - 1] = (char)0xe4; // the last one is the beginning of a character
    ctx.log = count_warning;
    ctx.user = &n_warnings;
    kvq_test_ok(kvq_text_open(&ctx, write_file("latin1", data, SIZE), KVQ_TEXT_RAW, NULL, &text, &err), &err);
    for (int reading = 0; reading < 2; reading++) {
        kvq_test_ok(gather(text, &g, &err), &err);
        ck_assert_uint_eq(g.n, SIZE + 1);
        ck_assert(memcmp(g.data, data, SIZE) == 0);
        free(g.data);
        kvq_test_ok(kvq_text_rewind(text, &err), &err);
    }
    ck_assert_int_eq(n_warnings, 1);
    kvq_text_close(&ctx, &text);
    free(data);
}
END_TEST

// ---------------------------------------------------------------- twice

START_TEST(pipes_are_read_once) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    gathered    g;
    int         ends[2];
    char        path[64];
    ck_assert_int_eq(pipe(ends), 0);
    ck_assert_int_eq(write(ends[1], "some text", 9), 9);
    (void)close(ends[1]);
    (void)snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    kvq_text *text = open_good(path, KVQ_TEXT_RAW, NULL);
    ck_assert(!kvq_text_can_rewind(text));
    kvq_test_ok(kvq_text_rewind(text, &err), &err); // nothing was read yet
    kvq_test_ok(gather(text, &g, &err), &err);
    ck_assert_str_eq(g.data, "some text");
    kvq_test_failed(kvq_text_rewind(text, &err), KVQ_ERR_UNSUPPORTED, &err, "cannot be read a second time");
    free(g.data);
    kvq_text_close(&ctx, &text);
    (void)close(ends[0]);
}
END_TEST

START_TEST(a_file_that_changes_is_found) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    gathered    g;
    const char *path = write_text("text", "one two");
    kvq_text   *text = open_good(path, KVQ_TEXT_RAW, NULL);
    kvq_test_ok(gather(text, &g, &err), &err);
    free(g.data);
    FILE *file = fopen(path, "ab");
    (void)fputs(" three", file);
    (void)fclose(file);
    kvq_test_failed(kvq_text_rewind(text, &err), KVQ_ERR_INTEGRITY, &err, "was changed");
    kvq_text_close(&ctx, &text);
}
END_TEST

START_TEST(any_failing_allocation_is_reported_and_nothing_leaks) {
    enum { SIZE = 1500000 };
    char *lines = malloc(SIZE);
    (void)memset(lines, ' ', SIZE);
    (void)memcpy(lines, "{\"text\":\"a\"}\n{", 14);
    (void)memcpy(lines + SIZE - 12, "\"text\":\"b\"}\n", 12); // a line across two parts
    const char *path = write_file("a.jsonl", lines, SIZE);
    bool        enough = false;
    for (int64_t limit = 0; !enough; limit++) {
        limited_memory memory = {.inner = kvq_test_context(), .left = limit};
        kvq_context    ctx = limited_context(&memory);
        kvq_error      err = {0};
        kvq_text      *text = NULL;
        gathered       g = {0};
        kvq_status     status = kvq_text_open(&ctx, path, KVQ_TEXT_AUTO, NULL, &text, &err);
        if (status == KVQ_OK) status = gather(text, &g, &err);
        enough = status == KVQ_OK;
        if (!enough) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
        free(g.data);
        kvq_text_close(&ctx, &text);
        ck_assert_int_eq(memory.n_live, 0);
    }
    free(lines);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(a_text_is_one_document_however_it_is_packed, N_PACKINGS),
    KVQ_CASE(parts_end_between_characters),
    KVQ_LOOP(the_hash_is_of_the_stored_file, N_PACKINGS),
    KVQ_LOOP(compressed_files_may_be_several_in_one, N_PACKINGS),
    KVQ_CASE(each_line_is_a_document),
    KVQ_CASE(lines_may_be_of_any_length),
    KVQ_CASE(a_line_that_is_no_document_is_named),
    KVQ_CASE(a_line_without_end_is_refused),
    KVQ_CASE(files_that_are_no_text_are_refused),
    KVQ_LOOP(damaged_compression_is_found, N_PACKINGS - 1),
    KVQ_LOOP(flipped_bytes_do_no_harm, N_PACKINGS),
    KVQ_CASE(malformed_bytes_are_given_as_they_are_after_one_warning),
    KVQ_CASE(pipes_are_read_once),
    KVQ_CASE(a_file_that_changes_is_found),
    KVQ_CASE(any_failing_allocation_is_reported_and_nothing_leaks),
};
KVQ_TEST_MAIN("text stream", CASES)
