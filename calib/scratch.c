// SPDX-License-Identifier: Apache-2.0
//
// Hidden states on disk; see calib_impl.h. All files are opened and unlinked before the first byte is written: two runs
// in one folder cannot meet, and however a run ends, also by a signal, the system takes the space back.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "calib_impl.h"

struct kvq_scratch {
    char   *folder; // for messages
    int64_t n_boundaries, window_floats;
    int    *files; // [n_boundaries + 1], the gradient last; -1 = closed
};

static int64_t slot_of(const kvq_scratch *s, int64_t boundary) {
    return boundary == KVQ_SCRATCH_GRADIENT ? s->n_boundaries : boundary;
}

static kvq_status scratch_failure(const char *folder, const char *what, kvq_error *err) {
    bool full = errno == ENOSPC || errno == EFBIG || errno == EDQUOT;
    return kvq_fail(err, KVQ_ERR_DISK,
                    full ? "free some disk space or choose another folder with --work-dir"
                         : "choose another folder with --work-dir",
                    "%s: cannot %s: %s", folder, what, strerror(errno));
}

// A file without a name.
static kvq_status open_file(const char *folder, int *file, kvq_error *err) {
    char path[4096];
    if (snprintf(path, sizeof path, "%s/kvq-scratch-XXXXXX", folder) >= (int)sizeof path) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose a shorter --work-dir", "%.64s...: the path is too long", folder);
    }
    *file = mkstemp(path);
    if (*file < 0) return scratch_failure(folder, "create a scratch file", err);
    (void)unlink(path);
    return KVQ_OK;
}

kvq_status kvq_scratch_create(const kvq_context *ctx, const char *folder, int64_t n_boundaries, int64_t window_floats,
                              kvq_scratch **out, kvq_error *err) {
    kvq_scratch *s = NULL;
    bool         made_folder = false;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "scratch", &s, err));
    KVQ_TRY(KVQ_NEW(ctx, n_boundaries + 1, "scratch files", &s->files, err));
    s->n_boundaries = n_boundaries;
    s->window_floats = window_floats;
    for (int64_t slot = 0; slot <= n_boundaries; slot++) s->files[slot] = -1;
    s->folder = kvq_strdup(ctx, folder);
    if (s->folder == NULL) KVQ_TRY(kvq_fail(err, KVQ_ERR_MEMORY, NULL, "scratch folder name"));
    made_folder = mkdir(folder, 0777) == 0;
    if (!made_folder && errno != EEXIST) KVQ_TRY(scratch_failure(folder, "create the scratch folder", err));
    for (int64_t slot = 0; slot <= n_boundaries; slot++) KVQ_TRY(open_file(folder, &s->files[slot], err));
    *out = s;
    s = NULL;

done:
    if (made_folder) (void)rmdir(folder);
    kvq_scratch_destroy(ctx, &s);
    return status;
}

void kvq_scratch_destroy(const kvq_context *ctx, kvq_scratch **scratch) {
    kvq_scratch *s = *scratch;
    if (s == NULL) return;
    for (int64_t slot = 0; s->files != NULL && slot <= s->n_boundaries; slot++) kvq_scratch_drop(s, slot);
    kvq_free(ctx, s->files);
    kvq_free(ctx, s->folder);
    kvq_free(ctx, s);
    *scratch = NULL;
}

void kvq_scratch_drop(kvq_scratch *s, int64_t boundary) {
    int64_t slot = slot_of(s, boundary);
    if (s->files[slot] >= 0) (void)close(s->files[slot]);
    s->files[slot] = -1;
}

kvq_status kvq_scratch_write(kvq_scratch *s, int64_t boundary, int64_t window, const float *x, kvq_error *err) {
    size_t      bytes = (size_t)s->window_floats * sizeof *x;
    off_t       at = (off_t)((size_t)window * bytes);
    const char *from = (const char *)x;
    while (bytes > 0) {
        ssize_t n = pwrite(s->files[slot_of(s, boundary)], from, bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return scratch_failure(s->folder, "write a scratch file", err);
        from += n;
        at += n;
        bytes -= (size_t)n;
    }
    return KVQ_OK;
}

kvq_status kvq_scratch_read(kvq_scratch *s, int64_t boundary, int64_t window, float *x, kvq_error *err) {
    size_t bytes = (size_t)s->window_floats * sizeof *x;
    off_t  at = (off_t)((size_t)window * bytes);
    char  *to = (char *)x;
    while (bytes > 0) {
        ssize_t n = pread(s->files[slot_of(s, boundary)], to, bytes, at);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENODATA;
        if (n <= 0) return scratch_failure(s->folder, "read a scratch file", err);
        to += n;
        at += n;
        bytes -= (size_t)n;
    }
    return KVQ_OK;
}
