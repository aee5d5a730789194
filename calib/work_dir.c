// SPDX-License-Identifier: Apache-2.0
//
// The work directory; see calib_impl.h. A kill at any moment leaves the manifest of the last commit and files that are
// either the ones it speaks of or newer ones that nobody will believe: slots are written again before they are read,
// small files are replaced by renaming.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "calib_impl.h"

#define MANIFEST   "kvq-manifest.json"
#define LOCK       "kvq-lock"
#define OPEN_FILES 4 // a step reads two files of slots and writes two
#define MAX_NAME   64

typedef struct slot_file {
    char name[MAX_NAME];
    int  fd;
    bool dirty;
} slot_file;

struct work_dir {
    char      *path;
    int        lock;
    int64_t    step, stride;
    char       result[KVQ_SHA256_HEX]; // content hash of what the run ended in, "" before
    kvq_field *fields;                 // the fingerprint, then room for N_STATE_FIELDS
    int64_t    n_fingerprint;
    slot_file  files[OPEN_FILES];
    int        n_files;
};

#define N_STATE_FIELDS 4
static const char FORMAT_FIELD[] = "work_format", FORMAT[] = "1", STEP_FIELD[] = "finished_steps",
                  STRIDE_FIELD[] = "kept_boundaries_stride", RESULT_FIELD[] = "result";

static void path_of(const work_dir *w, const char *name, char out[4096]) {
    (void)snprintf(out, 4096, "%s/%s", w->path, name);
}

static kvq_status disk_failure(const work_dir *w, const char *name, const char *what, kvq_error *err) {
    bool full = errno == ENOSPC || errno == EFBIG || errno == EDQUOT;
    return kvq_fail(err, KVQ_ERR_DISK,
                    full ? "free some disk space, choose another --work-dir, or set --scratch-limit"
                         : "choose another folder with --work-dir",
                    "%s/%s: cannot %s: %s", w->path, name, what, strerror(errno));
}

static kvq_status damaged(const work_dir *w, const char *name, const char *what, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTEGRITY, "pass --restart to begin anew", "%s/%s: %s", w->path, name, what);
}

// ---------------------------------------------------------------- manifest

static kvq_status read_manifest(const kvq_context *ctx, work_dir *w, kvq_error *err) {
    char       path[4096];
    kvq_field *fields = NULL;
    int64_t    n = 0;
    kvq_status status = KVQ_OK;
    path_of(w, MANIFEST, path);
    if (access(path, F_OK) != 0) return KVQ_OK; // a new directory, or killed before anything was finished
    KVQ_TRY(kvq_fields_read(ctx, path, &fields, &n, err));
    const char *format = kvq_fields_find(fields, n, FORMAT_FIELD), *steps = kvq_fields_find(fields, n, STEP_FIELD);
    const char *stride = kvq_fields_find(fields, n, STRIDE_FIELD), *result = kvq_fields_find(fields, n, RESULT_FIELD);
    if (format == NULL || strcmp(format, FORMAT) != 0 || steps == NULL || stride == NULL || result == NULL ||
        n < N_STATE_FIELDS) {
        KVQ_TRY(damaged(w, MANIFEST, "was not written by this version of kvq", err));
    }
    status = kvq_fields_compare(fields, n - N_STATE_FIELDS, w->fields, w->n_fingerprint, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s belongs to another run: ", w->path);
        if (err != NULL) {
            (void)snprintf(err->next, sizeof err->next,
                           "repeat the command that made it, choose another --work-dir, or pass --restart to begin "
                           "anew");
        }
        goto done;
    }
    w->step = strtoll(steps, NULL, 10);
    w->stride = strtoll(stride, NULL, 10);
    (void)snprintf(w->result, sizeof w->result, "%s", result);
    if (w->step < 0 || w->stride < 1) status = damaged(w, MANIFEST, "is damaged", err);
done:
    kvq_free(ctx, fields);
    return status;
}

static void set_state(kvq_field *f, const char *name, const char *value) {
    (void)snprintf(f->name, sizeof f->name, "%s", name);
    (void)snprintf(f->value, sizeof f->value, "%s", value);
}

kvq_status work_commit(const kvq_context *ctx, work_dir *w, int64_t step_done, kvq_error *err) {
    char path[4096], number[32];
    for (int i = 0; i < w->n_files; i++) {
        if (!w->files[i].dirty) continue;
        if (fsync(w->files[i].fd) != 0) return disk_failure(w, w->files[i].name, "be written to the disk", err);
        w->files[i].dirty = false;
    }
    kvq_field *state = w->fields + w->n_fingerprint;
    set_state(&state[0], FORMAT_FIELD, FORMAT);
    (void)snprintf(number, sizeof number, "%" PRId64, step_done);
    set_state(&state[1], STEP_FIELD, number);
    (void)snprintf(number, sizeof number, "%" PRId64, w->stride);
    set_state(&state[2], STRIDE_FIELD, number);
    set_state(&state[3], RESULT_FIELD, w->result);
    path_of(w, MANIFEST, path);
    kvq_status status = kvq_fields_write(ctx, path, w->fields, w->n_fingerprint + N_STATE_FIELDS, err);
    if (status == KVQ_OK) w->step = step_done;
    return status;
}

int64_t work_step(const work_dir *w) { return w->step; }
int64_t work_stride(const work_dir *w) { return w->stride; }
void    work_set_stride(work_dir *w, int64_t stride) { w->stride = stride; }

void work_set_result(work_dir *w, const char result[KVQ_SHA256_HEX]) { memcpy(w->result, result, sizeof w->result); }

// ---------------------------------------------------------------- open and close

static kvq_status take_lock(work_dir *w, kvq_error *err) {
    char path[4096], holder[64] = "";
    path_of(w, LOCK, path);
    w->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (w->lock < 0) return disk_failure(w, LOCK, "be created", err);
    if (flock(w->lock, LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK) return disk_failure(w, LOCK, "be locked", err);
        ssize_t n = pread(w->lock, holder, sizeof holder - 1, 0);
        holder[n > 0 ? n : 0] = 0;
        return kvq_fail(err, KVQ_ERR_EXISTS, "wait for it, or choose another --work-dir",
                        "%s: another run (process %s) is working in this folder", w->path, holder);
    }
    int n = snprintf(holder, sizeof holder, "%ld", (long)getpid());
    if (ftruncate(w->lock, 0) != 0 || pwrite(w->lock, holder, (size_t)n, 0) != n) {
        return disk_failure(w, LOCK, "be written", err);
    }
    return KVQ_OK;
}

// Files of ours, also the temporary ones of a killed run; anything else in the directory is left alone.
static bool is_ours(const char *name) {
    bool temporary = name[0] == '.' && strstr(name, ".tmp-") != NULL;
    return strncmp(name + temporary, "kvq-", 4) == 0;
}

// The manifest goes last: as long as it is there, it says what the run was and what came of it. The lock is the
// caller's.
static void remove_files(const work_dir *w) {
    char           path[4096];
    DIR           *folder = opendir(w->path);
    struct dirent *entry;
    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        if (!is_ours(entry->d_name) || strcmp(entry->d_name, LOCK) == 0 || strcmp(entry->d_name, MANIFEST) == 0)
            continue;
        path_of(w, entry->d_name, path);
        (void)unlink(path);
    }
    if (folder != NULL) (void)closedir(folder);
    path_of(w, MANIFEST, path);
    (void)unlink(path);
}

// Of a directory that need not exist; false when it has no manifest.
static bool find_manifest(const char *path, char manifest[4096]) {
    (void)snprintf(manifest, 4096, "%.4000s/" MANIFEST, path);
    return access(manifest, F_OK) == 0;
}

bool work_exists(const char *path) {
    char manifest[4096];
    return find_manifest(path, manifest);
}

kvq_status work_make_folder(const char *path, kvq_error *err) {
    if (mkdir(path, 0777) == 0 || errno == EEXIST) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_DISK, "choose another folder with --work-dir", "%s: cannot be created: %s", path,
                    strerror(errno));
}

kvq_status work_peek_result(const kvq_context *ctx, const char *path, char result[KVQ_SHA256_HEX], kvq_error *err) {
    char       manifest[4096];
    kvq_field *fields = NULL;
    int64_t    n = 0;
    kvq_status status = KVQ_OK;
    result[0] = 0;
    if (!find_manifest(path, manifest)) return KVQ_OK;
    KVQ_TRY(kvq_fields_read(ctx, manifest, &fields, &n, err));
    const char *found = kvq_fields_find(fields, n, RESULT_FIELD);
    if (found != NULL) (void)snprintf(result, KVQ_SHA256_HEX, "%s", found);
done:
    kvq_free(ctx, fields);
    return status;
}

void work_remove_folder(const char *path) { (void)rmdir(path); }

kvq_status work_open(const kvq_context *ctx, const char *path, const kvq_field *fingerprint, int64_t n_fingerprint,
                     bool restart, work_dir **out, kvq_error *err) {
    work_dir  *w = NULL;
    kvq_status status = KVQ_OK;
    if (strlen(path) > 4096 - 2 * MAX_NAME) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose a shorter --work-dir", "%.64s...: the path is too long", path);
    }
    KVQ_TRY(KVQ_NEW(ctx, 1, "work directory", &w, err));
    w->lock = -1;
    w->path = kvq_strdup(ctx, path);
    if (w->path == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "name of the work directory"));
    KVQ_TRY(KVQ_NEW(ctx, n_fingerprint + N_STATE_FIELDS, "fingerprint", &w->fields, err));
    if (n_fingerprint > 0) memcpy(w->fields, fingerprint, (size_t)n_fingerprint * sizeof *fingerprint);
    w->n_fingerprint = n_fingerprint;
    KVQ_TRY(work_make_folder(path, err));
    KVQ_TRY(take_lock(w, err));
    if (!restart) KVQ_TRY(read_manifest(ctx, w, err));
    if (w->stride == 0) remove_files(w); // nothing is believed without a manifest
    *out = w;
    w = NULL;
done:
    work_close(ctx, &w, false);
    return status;
}

void work_close(const kvq_context *ctx, work_dir **work, bool finished) {
    work_dir *w = *work;
    if (w == NULL) return;
    for (int i = 0; i < w->n_files; i++) (void)close(w->files[i].fd);
    if (finished) {
        char lock[4096];
        remove_files(w);
        path_of(w, LOCK, lock);
        (void)unlink(lock);
        work_remove_folder(w->path); // stays when it holds anything else
    }
    if (w->lock >= 0) (void)close(w->lock);
    kvq_free(ctx, w->fields);
    kvq_free(ctx, w->path);
    kvq_free(ctx, w);
    *work = NULL;
}

// ---------------------------------------------------------------- small files

kvq_status work_put(const kvq_context *ctx, work_dir *w, const char *name, const kvq_blob *blob, kvq_error *err) {
    char       path[4096];
    kvq_blob   file = {0};
    uint64_t   sum = kvq_checksum(blob->data, (size_t)blob->bytes);
    kvq_status status = kvq_blob_append(ctx, &file, &sum, sizeof sum, err);
    path_of(w, name, path);
    if (status == KVQ_OK) status = kvq_blob_append(ctx, &file, blob->data, blob->bytes, err);
    if (status == KVQ_OK) status = kvq_write_file(ctx, path, true, file.data, (size_t)file.bytes, err);
    kvq_blob_free(ctx, &file);
    return status;
}

kvq_status work_get(const kvq_context *ctx, work_dir *w, const char *name, kvq_blob *blob, kvq_error *err) {
    char            path[4096];
    kvq_mapped_file file = {NULL, 0};
    uint64_t        sum = 0;
    path_of(w, name, path);
    if (access(path, F_OK) != 0) return KVQ_OK;
    kvq_status status = kvq_map_file(path, &file, err);
    if (status != KVQ_OK) return status;
    size_t n = file.bytes < sizeof sum ? 0 : file.bytes - sizeof sum;
    if (file.bytes >= sizeof sum) memcpy(&sum, file.data, sizeof sum);
    if (file.bytes < sizeof sum || kvq_checksum(file.data + sizeof sum, n) != sum) {
        status = damaged(w, name, "is damaged", err);
    } else {
        status = kvq_blob_append(ctx, blob, file.data + sizeof sum, (int64_t)n, err);
    }
    kvq_unmap_file(&file);
    return status;
}

void work_drop(work_dir *w, const char *name) {
    char path[4096];
    for (int i = 0; i < w->n_files; i++) {
        if (strcmp(w->files[i].name, name) != 0) continue;
        (void)close(w->files[i].fd);
        w->files[i] = w->files[--w->n_files];
        break;
    }
    path_of(w, name, path);
    (void)unlink(path);
}

// ---------------------------------------------------------------- slots

// The open file of a name; the one opened first gives way when there are too many.
static kvq_status file_of(work_dir *w, const char *name, slot_file **out, kvq_error *err) {
    char path[4096];
    for (int i = 0; i < w->n_files; i++) {
        if (strcmp(w->files[i].name, name) != 0) continue;
        *out = &w->files[i];
        return KVQ_OK;
    }
    if (w->n_files == OPEN_FILES) {
        bool synced = !w->files[0].dirty || fsync(w->files[0].fd) == 0;
        if (!synced) return disk_failure(w, w->files[0].name, "be written to the disk", err);
        (void)close(w->files[0].fd);
        memmove(w->files, w->files + 1, (OPEN_FILES - 1) * sizeof *w->files);
        w->n_files--;
    }
    path_of(w, name, path);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return disk_failure(w, name, "be opened", err);
    *out = &w->files[w->n_files++];
    (void)snprintf((*out)->name, MAX_NAME, "%s", name);
    (*out)->fd = fd;
    (*out)->dirty = false;
    return KVQ_OK;
}

static bool write_all(int fd, const void *data, size_t bytes, off_t at) {
    const char *from = data;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, from, bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        from += n;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

static bool read_all(int fd, void *data, size_t bytes, off_t at) {
    char *to = data;
    while (bytes > 0) {
        ssize_t n = pread(fd, to, bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        to += n;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

// A slot is its checksum and its numbers.
static off_t slot_at(int64_t slot, int64_t n) {
    return (off_t)(slot * (n * (int64_t)sizeof(float) + (int64_t)sizeof(uint64_t)));
}

kvq_status work_write_slot(work_dir *w, const char *name, int64_t slot, const float *x, int64_t n, kvq_error *err) {
    slot_file *file = NULL;
    size_t     bytes = (size_t)n * sizeof *x;
    uint64_t   sum = kvq_checksum(x, bytes);
    kvq_status status = file_of(w, name, &file, err);
    if (status != KVQ_OK) return status;
    file->dirty = true;
    if (write_all(file->fd, &sum, sizeof sum, slot_at(slot, n)) &&
        write_all(file->fd, x, bytes, slot_at(slot, n) + (off_t)sizeof sum)) {
        return KVQ_OK;
    }
    return disk_failure(w, name, "be written", err);
}

kvq_status work_read_slot(work_dir *w, const char *name, int64_t slot, float *x, int64_t n, kvq_error *err) {
    slot_file *file = NULL;
    size_t     bytes = (size_t)n * sizeof *x;
    uint64_t   sum = 0;
    kvq_status status = file_of(w, name, &file, err);
    if (status != KVQ_OK) return status;
    if (!read_all(file->fd, &sum, sizeof sum, slot_at(slot, n)) ||
        !read_all(file->fd, x, bytes, slot_at(slot, n) + (off_t)sizeof sum) || kvq_checksum(x, bytes) != sum) {
        return damaged(w, name, "is truncated or damaged", err);
    }
    return KVQ_OK;
}
