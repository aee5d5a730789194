// SPDX-License-Identifier: Apache-2.0
// Hidden states on disk; see calib_impl.h.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "calib_impl.h"

struct kvq_scratch {
    char   *folder;
    int64_t n_boundaries, window_floats;
    int    *files; // [n_boundaries + 1], the gradient last; -1 = not open
};

static int64_t slot_of(const kvq_scratch *s, int64_t boundary) {
    return boundary == KVQ_SCRATCH_GRADIENT ? s->n_boundaries : boundary;
}

static void path_of(const kvq_scratch *s, int64_t slot, char *path, size_t size) {
    if (slot == s->n_boundaries) {
        (void)snprintf(path, size, "%s/gradient.f32", s->folder);
    } else {
        (void)snprintf(path, size, "%s/boundary-%04lld.f32", s->folder, (long long)slot);
    }
}

static kvq_status scratch_failure(const kvq_scratch *s, int64_t slot, const char *verb, kvq_error *err) {
    char path[4096];
    path_of(s, slot, path, sizeof path);
    return kvq_fail(err, KVQ_ERR_DISK, "free some disk space or choose another folder with --work-dir",
                    "%s: cannot %s scratch file: %s", path, verb, strerror(errno));
}

kvq_status kvq_scratch_create(const kvq_context *ctx, const char *folder, int64_t n_boundaries, int64_t window_floats,
                              kvq_scratch **out, kvq_error *err) {
    kvq_scratch *s = NULL;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "scratch", &s, err));
    KVQ_TRY(KVQ_NEW(ctx, n_boundaries + 1, "scratch files", &s->files, err));
    s->n_boundaries = n_boundaries;
    s->window_floats = window_floats;
    for (int64_t i = 0; i <= n_boundaries; i++) s->files[i] = -1;
    s->folder = kvq_strdup(ctx, folder); // before the folder exists, so that destroy can always remove it
    if (s->folder == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "scratch folder name"));
    if (mkdir(folder, 0777) != 0 && errno != EEXIST) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_DISK, "choose another folder with --work-dir",
                         "%s: cannot create the scratch folder: %s", folder, strerror(errno)));
    }
    *out = s;
    s = NULL;

done:
    kvq_scratch_destroy(ctx, &s);
    return status;
}

void kvq_scratch_destroy(const kvq_context *ctx, kvq_scratch **scratch) {
    kvq_scratch *s = *scratch;
    if (s == NULL) return;
    for (int64_t slot = 0; s->files != NULL && s->folder != NULL && slot <= s->n_boundaries; slot++)
        kvq_scratch_drop(s, slot);
    if (s->folder != NULL) (void)rmdir(s->folder); // stays when it holds somebody else's files
    kvq_free(ctx, s->files);
    kvq_free(ctx, s->folder);
    kvq_free(ctx, s);
    *scratch = NULL;
}

void kvq_scratch_drop(kvq_scratch *s, int64_t boundary) {
    char    path[4096];
    int64_t slot = slot_of(s, boundary);
    if (s->files[slot] < 0) return;
    (void)close(s->files[slot]);
    s->files[slot] = -1;
    path_of(s, slot, path, sizeof path);
    (void)unlink(path);
}

kvq_status kvq_scratch_write(kvq_scratch *s, int64_t boundary, int64_t window, const float *x, kvq_error *err) {
    int64_t     slot = slot_of(s, boundary);
    size_t      bytes = (size_t)s->window_floats * sizeof *x;
    off_t       at = (off_t)((size_t)window * bytes);
    const char *from = (const char *)x;
    if (s->files[slot] < 0) {
        char path[4096];
        path_of(s, slot, path, sizeof path);
        s->files[slot] = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (s->files[slot] < 0) return scratch_failure(s, slot, "create", err);
    }
    while (bytes > 0) {
        ssize_t n = pwrite(s->files[slot], from, bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return scratch_failure(s, slot, "write", err);
        from += n;
        at += n;
        bytes -= (size_t)n;
    }
    return KVQ_OK;
}

kvq_status kvq_scratch_read(kvq_scratch *s, int64_t boundary, int64_t window, float *x, kvq_error *err) {
    int64_t slot = slot_of(s, boundary);
    size_t  bytes = (size_t)s->window_floats * sizeof *x;
    off_t   at = (off_t)((size_t)window * bytes);
    char   *to = (char *)x;
    while (bytes > 0) {
        ssize_t n = pread(s->files[slot], to, bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENODATA;
        if (n <= 0) return scratch_failure(s, slot, "read", err);
        to += n;
        at += n;
        bytes -= (size_t)n;
    }
    return KVQ_OK;
}
