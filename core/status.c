// SPDX-License-Identifier: Apache-2.0
// Status codes and error records.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "kvq_core.h"

typedef struct status_entry {
    int         number, exit_code;
    const char *cause, *next;
} status_entry;

static const status_entry STATUS_TABLE[] = {
#define STATUS_ROW(name, number, exit_code, cause, next) {number, exit_code, cause, next},
    KVQ_STATUS_LIST(STATUS_ROW)
#undef STATUS_ROW
};

int         kvq_status_number(kvq_status status) { return STATUS_TABLE[status].number; }
int         kvq_status_exit_code(kvq_status status) { return STATUS_TABLE[status].exit_code; }
const char *kvq_status_cause(kvq_status status) { return STATUS_TABLE[status].cause; }

kvq_status kvq_fail(kvq_error *err, kvq_status status, const char *next, const char *format, ...) {
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        err->status = status;
        (void)vsnprintf(err->message, sizeof err->message, format, args);
        (void)snprintf(err->next, sizeof err->next, "%s", next != NULL ? next : STATUS_TABLE[status].next);
        va_end(args);
    }
    return status;
}

void kvq_error_prefix(kvq_error *err, const char *format, ...) {
    if (err == NULL) return;
    char    text[sizeof err->message];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof text) return;
    (void)snprintf(text + n, sizeof text - (size_t)n, "%s", err->message);
    memcpy(err->message, text, sizeof text);
}
