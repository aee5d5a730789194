// SPDX-License-Identifier: Apache-2.0
//
// Text files, read in parts: a file may be larger than memory, and compressed. libarchive undoes the compression, which
// it tells by content; its archive formats are left out, so that it sees one stream of bytes. The bytes of the file
// itself are hashed as they pass.
#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json_read.h"
#include "tokenizer_impl.h"

#define STORED_BYTES ((size_t)64 << 10) // read from the file at a time
#define PART_BYTES   ((size_t)1 << 20)
#define LINE_BYTES   ((size_t)64 << 20) // a document that is longer should be given as plain text

struct kvq_text {
    const kvq_context *ctx;
    char              *path, *field;
    bool               jsonl, regular;
    int                fd;
    int64_t            size; // of a regular file, with the time of its last change: it must stay what it is
    struct timespec    changed;
    struct archive    *archive; // NULL before the first part
    uint8_t           *stored;  // [STORED_BYTES]
    int                read_errno;

    kvq_sha256 *hash; // NULL once sha256 is known
    char        sha256[KVQ_SHA256_HEX];
    int64_t     n_stored; // bytes hashed
    int64_t     n_read;   // bytes of the file read since the start

    char       *buffer; // [PART_BYTES], text[at, n), of which a character at the end may be unfinished (behind `ready`)
    size_t      at, ready, n;
    int64_t     n_before; // bytes of text before the buffer
    bool        ended, warned, gave_end;
    tok_text    line;
    int64_t     n_lines;
    cJSON      *tree; // of the line whose document is being given
    size_t      given, n_document;
    const char *document;
};

// ---------------------------------------------------------------- opening

static bool ends_with(const char *text, size_t n, const char *suffix) {
    size_t m = strlen(suffix);
    return n >= m && memcmp(text + n - m, suffix, m) == 0;
}

static bool named_jsonl(const char *path) {
    static const char *const PACKED[] = {".gz", ".zst", ".xz", ".bz2"};
    size_t                   n = strlen(path);
    for (size_t i = 0; i < sizeof PACKED / sizeof *PACKED; i++) {
        if (ends_with(path, n, PACKED[i])) {
            n -= strlen(PACKED[i]);
            break;
        }
    }
    return ends_with(path, n, ".jsonl") || ends_with(path, n, ".ndjson");
}

static kvq_status open_descriptor(kvq_text *t, kvq_error *err) {
    struct stat info;
    bool        standard = strcmp(t->path, "-") == 0;
    t->fd = standard ? fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0) : open(t->path, O_RDONLY | O_CLOEXEC);
    if (t->fd < 0 || fstat(t->fd, &info) != 0)
        return kvq_fail(err, KVQ_ERR_NOT_FOUND, NULL, "%s: cannot be opened: %s", t->path, strerror(errno));
    if (S_ISDIR(info.st_mode)) return kvq_fail(err, KVQ_ERR_INPUT, "give a file", "%s: is a directory", t->path);
    t->regular = S_ISREG(info.st_mode);
    t->size = (int64_t)info.st_size;
    t->changed = info.st_mtim;
    return KVQ_OK;
}

kvq_status kvq_text_open(const kvq_context *ctx, const char *path, kvq_text_format format, const char *field,
                         kvq_text **out, kvq_error *err) {
    kvq_text  *t = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "text", &t, err));
    t->ctx = ctx;
    t->fd = -1;
    t->jsonl = format == KVQ_TEXT_JSONL || (format == KVQ_TEXT_AUTO && named_jsonl(path));
    t->path = kvq_strdup(ctx, path);
    t->field = kvq_strdup(ctx, field != NULL ? field : "text");
    if (t->path == NULL || t->field == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: its name", path));
    KVQ_TRY(open_descriptor(t, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)STORED_BYTES, "file buffer", &t->stored, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)PART_BYTES, "text buffer", &t->buffer, err));
    KVQ_TRY(kvq_sha256_create(&t->hash, err));
    *out = t;
    t = NULL;
done:
    kvq_text_close(ctx, &t);
    return status;
}

void kvq_text_close(const kvq_context *ctx, kvq_text **text) {
    char      sha256[KVQ_SHA256_HEX];
    kvq_text *t = *text;
    if (t == NULL) return;
    (void)archive_read_free(t->archive); // NULL is fine
    if (t->fd >= 0) (void)close(t->fd);
    if (t->hash != NULL) kvq_sha256_finalize(&t->hash, sha256);
    cJSON_Delete(t->tree);
    kvq_free(ctx, t->line.data);
    kvq_free(ctx, t->buffer);
    kvq_free(ctx, t->stored);
    kvq_free(ctx, t->field);
    kvq_free(ctx, t->path);
    kvq_free(ctx, t);
    *text = NULL;
}

void kvq_text_position(const kvq_text *text, int64_t *done, int64_t *total) {
    *done = text->n_read;
    *total = text->regular ? text->size : 0;
}

bool kvq_text_can_rewind(const kvq_text *text) { return text->regular; }

// ---------------------------------------------------------------- stored bytes

// The next bytes of the file; 0 at its end, -1 with read_errno set.
static ssize_t read_stored(kvq_text *t) {
    ssize_t n;
    do {
        n = read(t->fd, t->stored, STORED_BYTES);
    } while (n < 0 && errno == EINTR);
    if (n < 0) t->read_errno = errno;
    if (n > 0) t->n_read += n;
    if (n > 0 && t->hash != NULL) {
        kvq_sha256_push(t->hash, t->stored, (size_t)n);
        t->n_stored += n;
    }
    return n;
}

static la_ssize_t on_read(struct archive *archive, void *user, const void **data) {
    kvq_text *t = user;
    *data = t->stored;
    ssize_t n = read_stored(t);
    if (n < 0) archive_set_error(archive, t->read_errno, "%s", strerror(t->read_errno));
    return n;
}

static kvq_status fail_read(kvq_text *t, kvq_error *err) {
    const char *reason = archive_error_string(t->archive);
    if (t->read_errno != 0) {
        return kvq_fail(err, KVQ_ERR_NOT_FOUND, "check the disk and the permissions", "%s: cannot be read: %s", t->path,
                        strerror(t->read_errno));
    }
    if (archive_errno(t->archive) == ENOMEM) {
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: %s", t->path, reason != NULL ? reason : "decompression");
    }
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                    "%s: the compressed text breaks off or is damaged behind %lld bytes: %s", t->path,
                    (long long)(t->n_before + (int64_t)t->n), reason != NULL ? reason : "no reason given");
}

static kvq_status begin(kvq_text *t, kvq_error *err) {
    struct archive_entry *entry;
    t->archive = archive_read_new();
    if (t->archive == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: the state of a decompression", t->path);
    int bad = archive_read_support_filter_gzip(t->archive) | archive_read_support_filter_zstd(t->archive) |
              archive_read_support_filter_xz(t->archive) | archive_read_support_filter_bzip2(t->archive) |
              archive_read_support_format_raw(t->archive) | archive_read_support_format_empty(t->archive);
    if (bad != ARCHIVE_OK) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "install a libarchive with gzip, zstd, xz and bzip2",
                        "%s: this libarchive lacks a format: %s", t->path, archive_error_string(t->archive));
    }
    int code = archive_read_open(t->archive, t, NULL, on_read, NULL);
    if (code == ARCHIVE_OK) code = archive_read_next_header(t->archive, &entry);
    if (code == ARCHIVE_EOF) { // an empty file, or nothing in a compressed one
        t->ended = true;
        return KVQ_OK;
    }
    return code == ARCHIVE_OK ? KVQ_OK : fail_read(t, err);
}

// libarchive stops without a word where a gzip or bzip2 file goes on as something else.
static kvq_status check_nothing_behind(kvq_text *t, kvq_error *err) {
    int64_t used = archive_filter_bytes(t->archive, -1);
    if (archive_filter_count(t->archive) < 2 || t->n_stored <= used) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL,
                    "%s: the compressed text ends at byte %lld, but the file goes on to %lld", t->path, (long long)used,
                    (long long)t->n_stored);
}

kvq_status kvq_text_sha256(kvq_text *t, char sha256[KVQ_SHA256_HEX], kvq_error *err) {
    ssize_t n = 1;
    while (t->hash != NULL && n > 0) n = read_stored(t);
    if (n < 0) {
        return kvq_fail(err, KVQ_ERR_NOT_FOUND, "check the disk and the permissions", "%s: cannot be read: %s", t->path,
                        strerror(t->read_errno));
    }
    if (t->hash != NULL) kvq_sha256_finalize(&t->hash, t->sha256);
    memcpy(sha256, t->sha256, sizeof t->sha256);
    return KVQ_OK;
}

kvq_status kvq_text_rewind(kvq_text *t, kvq_error *err) {
    char        sha256[KVQ_SHA256_HEX];
    struct stat info;
    kvq_status  status = KVQ_OK;
    if (t->archive == NULL) return KVQ_OK; // nothing was read
    if (!t->regular) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "save it as a file first",
                        "%s: is a pipe or device, which cannot be read a second time", t->path);
    }
    KVQ_TRY(kvq_text_sha256(t, sha256, err));
    if (fstat(t->fd, &info) != 0 || lseek(t->fd, 0, SEEK_SET) != 0) {
        return kvq_fail(err, KVQ_ERR_NOT_FOUND, NULL, "%s: cannot be read again: %s", t->path, strerror(errno));
    }
    if (info.st_size != t->size || info.st_mtim.tv_sec != t->changed.tv_sec ||
        info.st_mtim.tv_nsec != t->changed.tv_nsec) {
        return kvq_fail(err, KVQ_ERR_INTEGRITY, "start again when nothing writes to it",
                        "%s: was changed while it was being read", t->path);
    }
    (void)archive_read_free(t->archive);
    t->archive = NULL;
    cJSON_Delete(t->tree);
    t->tree = NULL;
    t->document = NULL;
    t->at = t->ready = t->n = t->line.n = 0;
    t->n_before = t->n_lines = t->n_read = 0;
    t->ended = t->gave_end = false;
done:
    return status;
}

// ---------------------------------------------------------------- text

// Beginnings of files that a tokenizer would turn into thousands of meaningless tokens without a word.
static const struct {
    const char *magic, *what;
} NO_TEXT[] = {
    {"\x1f\x8b", "gzip"},
    {"\x28\xb5\x2f\xfd", "zstd"},
    {"\xfd"
     "7zXZ",
     "xz"},
    {"BZh", "bzip2"},
    {"\x04\x22\x4d\x18", "lz4"},
    {"PK\x03\x04", "zip"},
    {"\x89HDF", "HDF5"},
    {"GGUF", "GGUF"},
    {"PAR1", "Parquet"},
    {"%PDF-", "PDF"},
    {"\xff\xfe", "UTF-16"},
    {"\xfe\xff", "UTF-16"},
};
static const char NO_TEXT_ADVICE[] = "give UTF-8 text, plain or compressed by gzip, zstd, xz or bzip2";

static kvq_status check_beginning(const kvq_text *t, kvq_error *err) {
    for (size_t i = 0; i < sizeof NO_TEXT / sizeof *NO_TEXT; i++) {
        size_t n = strlen(NO_TEXT[i].magic);
        if (t->n < n || memcmp(t->buffer, NO_TEXT[i].magic, n) != 0) continue;
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NO_TEXT_ADVICE, "%s: begins as %s, not as text", t->path,
                        NO_TEXT[i].what);
    }
    return KVQ_OK;
}

static kvq_status check_text(kvq_text *t, kvq_error *err) {
    const char *zero = t->n > 0 ? memchr(t->buffer, 0, t->n) : NULL;
    if (zero != NULL) {
        return kvq_fail(err, KVQ_ERR_INPUT, NO_TEXT_ADVICE, "%s: byte %lld is zero, so this is no text", t->path,
                        (long long)(t->n_before + (zero - t->buffer)));
    }
    size_t valid = t->warned ? t->ready : kvq_utf8_valid_prefix(t->buffer, t->ready);
    if (valid < t->ready) {
        kvq_log(t->ctx, KVQ_LOG_WARNING, "%s: not UTF-8 from byte %lld on; malformed bytes become U+FFFD", t->path,
                (long long)(t->n_before + (int64_t)valid));
        t->warned = true;
    }
    return KVQ_OK;
}

// Fills the buffer anew. At the end of the text it stays empty.
static kvq_status fill(kvq_text *t, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (t->archive == NULL) KVQ_TRY(begin(t, err));
    size_t left = t->n - t->ready; // of an unfinished character
    if (left > 0) memmove(t->buffer, t->buffer + t->ready, left);
    t->n_before += (int64_t)t->ready;
    t->at = t->ready = 0;
    t->n = left;
    while (!t->ended && t->n < PART_BYTES) {
        la_ssize_t n = archive_read_data(t->archive, t->buffer + t->n, PART_BYTES - t->n);
        if (n < 0) KVQ_TRY(fail_read(t, err));
        t->ended = n == 0;
        t->n += (size_t)n;
    }
    t->ready = t->n - (t->ended ? 0 : utf8_unfinished(t->buffer, t->n));
    if (t->n_before == 0) KVQ_TRY(check_beginning(t, err));
    KVQ_TRY(check_text(t, err));
    if (t->ended && t->hash != NULL) {
        char sha256[KVQ_SHA256_HEX];
        KVQ_TRY(kvq_text_sha256(t, sha256, err));
        KVQ_TRY(check_nothing_behind(t, err));
    }
done:
    return status;
}

// ---------------------------------------------------------------- documents

static bool is_blank(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (strchr(" \t\r\n", text[i]) == NULL) return false;
    }
    return true;
}

static kvq_status parse_line(kvq_text *t, const char *line, size_t n, kvq_error *err) {
    kvq_status status = KVQ_OK;
    kvq_error  inner = {0};
    char       what[512];
    (void)snprintf(what, sizeof what, "%.400s: line %lld", t->path, (long long)t->n_lines);
    status = json_check_no_zero(line, n, what, &inner);
    if (status == KVQ_OK) status = json_parse(line, n, what, &t->tree, &inner);
    if (status == KVQ_OK) status = json_get_string(t->tree, t->field, what, false, &t->document, &inner);
    if (status != KVQ_OK) {
        return kvq_fail(err, status == KVQ_ERR_MEMORY ? status : KVQ_ERR_INPUT,
                        "check --text-field, or read the file as plain text with --text-format raw", "%s",
                        inner.message);
    }
    t->n_document = strlen(t->document);
    t->given = 0;
    return KVQ_OK;
}

static kvq_status append_line(kvq_text *t, const char *text, size_t n, kvq_error *err) {
    if (t->line.n + n > LINE_BYTES) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED,
                        "break the document up, or read the file as plain text with --text-format raw",
                        "%s: line %lld has more than %zu bytes", t->path, (long long)t->n_lines + 1, LINE_BYTES);
    }
    return tok_text_append(t->ctx, &t->line, text, n, err);
}

// The next line that is not blank becomes the present document; none is left when document stays NULL.
static kvq_status next_document(kvq_text *t, kvq_error *err) {
    kvq_status status = KVQ_OK;
    cJSON_Delete(t->tree);
    t->tree = NULL;
    t->document = NULL;
    while (t->document == NULL) {
        if (t->at == t->ready && !t->ended) KVQ_TRY(fill(t, err));
        const char *text = t->buffer + t->at, *end = memchr(text, '\n', t->ready - t->at);
        size_t      n = end != NULL ? (size_t)(end - text) : t->ready - t->at;
        t->at += n + (end != NULL);
        if (end != NULL || t->ended) {
            bool last = end == NULL; // without a line feed
            if (t->line.n > 0) {
                KVQ_TRY(append_line(t, text, n, err));
                text = t->line.data;
                n = t->line.n;
            }
            if (last && n == 0) break;
            t->n_lines++;
            if (!is_blank(text, n)) KVQ_TRY(parse_line(t, text, n, err));
            t->line.n = 0;
        } else {
            KVQ_TRY(append_line(t, text, n, err));
        }
    }
done:
    return status;
}

static kvq_status next_of_document(kvq_text *t, kvq_text_part *part, bool *found, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (t->document == NULL || t->given == t->n_document) KVQ_TRY(next_document(t, err));
    *found = t->document != NULL;
    if (!*found) return KVQ_OK;
    size_t left = t->n_document - t->given, n = left < PART_BYTES ? left : PART_BYTES;
    *part = (kvq_text_part){t->document + t->given, n, n == left};
    t->given += n;
done:
    return status;
}

kvq_status kvq_text_next(kvq_text *t, kvq_text_part *part, bool *found, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (t->jsonl) return next_of_document(t, part, found, err);
    *found = !t->gave_end;
    if (!*found) return KVQ_OK;
    if (!t->ended) KVQ_TRY(fill(t, err));
    *part = (kvq_text_part){t->buffer, t->ready, t->ended};
    t->gave_end = t->ended;
done:
    return status;
}
