// SPDX-License-Identifier: Apache-2.0
// The context: defaults, allocation with checked sizes, log and progress.
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvq_core.h"

#define ALIGNMENT 64u // a cache line, and the widest vector register

static void *default_alloc(void *user, size_t bytes) {
    (void)user;
    return aligned_alloc(ALIGNMENT, bytes);
}

static void default_release(void *user, void *p) {
    (void)user;
    free(p);
}

kvq_context kvq_context_default(void) {
    kvq_context ctx = {.n_threads = omp_get_num_procs(), .alloc = default_alloc, .release = default_release};
    return ctx;
}

kvq_status kvq_alloc(const kvq_context *ctx, int64_t count, size_t size, const char *what, void *out, kvq_error *err) {
    size_t limit = SIZE_MAX / 2 - ALIGNMENT;
    if (count < 0 || size == 0 || (uint64_t)count > limit / size) {
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: %lld elements of %zu bytes are more than can be addressed",
                        what, (long long)count, size);
    }
    size_t bytes = (size_t)count * size;
    size_t padded = (bytes / ALIGNMENT + 1) * ALIGNMENT;
    void  *p = ctx->alloc(ctx->user, padded);
    if (p == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: could not allocate %zu bytes", what, bytes);
    memset(p, 0, padded);
    memcpy(out, &p, sizeof p); // the caller's pointer has a type of its own
    return KVQ_OK;
}

void kvq_free(const kvq_context *ctx, void *p) {
    if (p != NULL) ctx->release(ctx->user, p);
}

char *kvq_strdup(const kvq_context *ctx, const char *text) {
    char *copy = NULL;
    if (KVQ_NEW(ctx, (int64_t)strlen(text) + 1, "text", &copy, NULL) != KVQ_OK) return NULL;
    strcpy(copy, text);
    return copy;
}

void kvq_log(const kvq_context *ctx, kvq_log_level level, const char *format, ...) {
    if (ctx->log == NULL) return;
    char    text[1024];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ctx->log(ctx->user, level, text);
}

void kvq_report_progress(const kvq_context *ctx, const char *stage, int64_t layer, int64_t done, int64_t total) {
    kvq_progress p = {stage, layer, done, total};
    if (ctx->progress != NULL) ctx->progress(ctx->user, &p);
}

double kvq_now_s(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

bool kvq_stop_requested(const kvq_context *ctx) { return ctx->stop != NULL && ctx->stop(ctx->user); }
