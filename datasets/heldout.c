// SPDX-License-Identifier: Apache-2.0
//
// Held-out windows: places where the windows that were drawn leave room.
#include <stdlib.h>

#include "windows_impl.h"

static int by_place(const void *left, const void *right) {
    const text_gap *a = left, *b = right;
    if (a->source != b->source) return a->source < b->source ? -1 : 1;
    return (a->begin > b->begin) - (a->begin < b->begin);
}

static int by_width(const void *left, const void *right) {
    const text_gap *a = left, *b = right;
    if (a->n_tokens != b->n_tokens) return a->n_tokens > b->n_tokens ? -1 : 1;
    return by_place(left, right);
}

int64_t gaps_between(const int64_t *starts, int64_t n, int64_t step, int source, int64_t n_tokens, text_gap *out) {
    int64_t end = 0, n_gaps = 0;
    for (int64_t i = 0; i <= n; i++) {
        int64_t begin = end, next = i < n ? starts[i] : n_tokens;
        end = next + step;
        if (next - begin >= step) out[n_gaps++] = (text_gap){source, begin, next - begin};
    }
    return n_gaps;
}

int64_t choose_gaps(text_gap *gaps, int64_t n_gaps, int64_t n_wanted) {
    if (n_gaps == 0) return 0;
    qsort(gaps, (size_t)n_gaps, sizeof *gaps, by_width);
    int64_t n = n_gaps < n_wanted ? n_gaps : n_wanted;
    qsort(gaps, (size_t)n, sizeof *gaps, by_place);
    return n;
}
