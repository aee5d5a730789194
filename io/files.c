// SPDX-License-Identifier: Apache-2.0
//
// Files that are read through a mapping, and files that are written whole or not at all.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kvq_io.h"

const char *kvq_file_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

// ---------------------------------------------------------------- input

// Somebody who truncates the file while it is mapped ends the program with SIGBUS; that is the price of never copying
// a checkpoint, and the reason why kvq itself replaces files by rename only.
kvq_status kvq_map_file(const char *path, kvq_mapped_file *out, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    struct stat info;
    void       *data = NULL;
    int         fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return kvq_fail(err, KVQ_ERR_NOT_FOUND, NULL, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(fd, &info) != 0) {
        status = kvq_fail(err, KVQ_ERR_NOT_FOUND, NULL, "%s: cannot be examined: %s", path, strerror(errno));
    } else if (!S_ISREG(info.st_mode)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, "pass a regular file", "%s: is %s, not a regular file", path,
                          S_ISDIR(info.st_mode) ? "a directory" : "a device or pipe");
    } else if (info.st_size > 0) {
        data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED) {
            status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: %lld bytes cannot be mapped: %s", path,
                              (long long)info.st_size, strerror(errno));
        }
    }
    (void)close(fd);
    if (status == KVQ_OK) {
        out->data = data;
        out->bytes = (size_t)info.st_size;
    }
    return status;
}

void kvq_unmap_file(kvq_mapped_file *file) {
    if (file->data != NULL) (void)munmap((void *)(uintptr_t)file->data, file->bytes);
    file->data = NULL;
    file->bytes = 0;
}

// ---------------------------------------------------------------- output

#define MAX_TEMPORARIES 100 // leftovers of crashed runs with the same process id, one name each

static const char DISK_ADVICE[] = "check free space and permissions of the folder, or choose another one";

// `path` may be written: it does not exist, or it is a regular file and `force` is set. A device is refused even with
// force, because a rename would replace the device itself by a file.
static kvq_status check_target(const char *path, bool force, kvq_error *err) {
    struct stat info;
    size_t      n = strlen(path);
    if (n == 0 || path[n - 1] == '/')
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "output '%s': is not a file name", path);
    if (stat(path, &info) != 0) return KVQ_OK;
    if (!S_ISREG(info.st_mode)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose a file name", "output %s: exists and is %s, not a regular file",
                        path, S_ISDIR(info.st_mode) ? "a directory" : "a device or pipe");
    }
    if (!force) return kvq_fail(err, KVQ_ERR_EXISTS, NULL, "output %s: already exists", path);
    return KVQ_OK;
}

kvq_status kvq_output_begin(const kvq_context *ctx, const char *path, bool force, kvq_output *out, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    kvq_output  o = {.force = force};
    const char *name = kvq_file_name(path);
    size_t      size = strlen(path) + 64;
    int         fd = -1;
    KVQ_TRY(check_target(path, force, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)size, "output name", &o.path, err));
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)size, "temporary name", &o.temporary, err));
    (void)snprintf(o.path, size, "%s", path);
    for (int i = 0; i < MAX_TEMPORARIES && fd < 0; i++) {
        (void)snprintf(o.temporary, size, "%.*s.%s.tmp-%ld-%d", (int)(name - path), path, name, (long)getpid(), i);
        fd = open(o.temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0 && errno != EEXIST) break;
    }
    if (fd < 0) {
        status = kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be created: %s", o.temporary, strerror(errno));
        goto done;
    }
    (void)close(fd);
    *out = o;
done:
    if (status != KVQ_OK) {
        kvq_free(ctx, o.path);
        kvq_free(ctx, o.temporary);
    }
    return status;
}

static int sync_path(const char *path, int flags) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0) return -1;
    int result = fsync(fd), saved = errno;
    (void)close(fd);
    errno = saved;
    return result;
}

// Without force the name must not be taken over from a file that appeared meanwhile: link() decides that atomically.
// File systems without hard links fall back to a rename.
static int move_into_place(const kvq_output *o) {
    if (!o->force) {
        if (link(o->temporary, o->path) == 0) return unlink(o->temporary);
        if (errno != EPERM && errno != EOPNOTSUPP && errno != ENOSYS) return -1;
        if (access(o->path, F_OK) == 0) {
            errno = EEXIST;
            return -1;
        }
    }
    return rename(o->temporary, o->path);
}

// The folder of `path`, so that the new name survives a power failure. Folders that cannot be synced (EINVAL on some
// network file systems) are none of our business.
static int sync_folder(char *path) {
    char  *slash = strrchr(path, '/'), saved = 0;
    size_t keep = slash == NULL ? 0 : slash == path ? 1 : (size_t)(slash - path);
    if (keep > 0) {
        saved = path[keep];
        path[keep] = 0;
    }
    int result = sync_path(keep > 0 ? path : ".", O_DIRECTORY);
    if (keep > 0) path[keep] = saved;
    return result != 0 && errno == EINVAL ? 0 : result;
}

kvq_status kvq_output_commit(const kvq_context *ctx, kvq_output *output, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (sync_path(output->temporary, 0) != 0) {
        status = kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be synced: %s", output->path, strerror(errno));
    } else if (move_into_place(output) != 0) {
        status = errno == EEXIST ? kvq_fail(err, KVQ_ERR_EXISTS, NULL,
                                            "output %s: was created by someone else meanwhile", output->path)
                                 : kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be renamed into place: %s",
                                            output->path, strerror(errno));
    } else if (sync_folder(output->path) != 0) {
        status = kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: its folder cannot be synced: %s", output->path,
                          strerror(errno));
    }
    kvq_output_discard(ctx, output);
    return status;
}

void kvq_output_discard(const kvq_context *ctx, kvq_output *output) {
    if (output->temporary != NULL) (void)unlink(output->temporary); // after a commit there is nothing under this name
    kvq_free(ctx, output->path);
    kvq_free(ctx, output->temporary);
    output->path = output->temporary = NULL;
}

static kvq_status write_all(int fd, const char *path, const uint8_t *data, size_t bytes, kvq_error *err) {
    size_t at = 0;
    while (at < bytes) {
        ssize_t n = write(fd, data + at, bytes - at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            return kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: writing failed, stopped at byte %zu of %zu: %s", path,
                            at, bytes, strerror(errno));
        }
        at += (size_t)n;
    }
    return KVQ_OK;
}

kvq_status kvq_output_write(const kvq_output *output, const void *data, size_t bytes, kvq_error *err) {
    int fd = open(output->temporary, O_WRONLY | O_CLOEXEC);
    if (fd < 0) {
        return kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be opened: %s", output->temporary, strerror(errno));
    }
    kvq_status status = write_all(fd, output->path, data, bytes, err);
    if (close(fd) != 0 && status == KVQ_OK) {
        status = kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be closed: %s", output->path, strerror(errno));
    }
    return status;
}

kvq_status kvq_write_file(const kvq_context *ctx, const char *path, bool force, const void *data, size_t bytes,
                          kvq_error *err) {
    kvq_output output = {0};
    kvq_status status = kvq_output_begin(ctx, path, force, &output, err);
    if (status != KVQ_OK) return status;
    status = kvq_output_write(&output, data, bytes, err);
    if (status == KVQ_OK) status = kvq_output_commit(ctx, &output, err);
    kvq_output_discard(ctx, &output);
    return status;
}

kvq_status kvq_append_file(const char *path, const void *data, size_t bytes, kvq_error *err) {
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be appended to: %s", path, strerror(errno));
    kvq_status status = write_all(fd, path, data, bytes, err);
    if (close(fd) != 0 && status == KVQ_OK)
        status = kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: cannot be closed: %s", path, strerror(errno));
    return status;
}
