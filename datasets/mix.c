// SPDX-License-Identifier: Apache-2.0
//
// Several sources as one sample set: how many windows each gives, and what the set is called.
#include <string.h>

#include "kvq_datasets.h"
#include "windows_impl.h"

void deal_windows(const double *weights, int n_sources, int64_t n, int64_t *dealt) {
    double  fraction[KVQ_MAX_SOURCES], sum = 0;
    int64_t left = n;
    for (int j = 0; j < n_sources; j++) sum += weights[j];
    for (int j = 0; j < n_sources; j++) {
        double share = (double)n * (weights[j] / sum);
        dealt[j] = (int64_t)share;
        if (dealt[j] > left) dealt[j] = left; // rounding must not deal more than there are
        fraction[j] = weights[j] > 0 ? share - (double)dealt[j] : -1;
        left -= dealt[j];
    }
    for (; left > 0; left--) {
        int most = 0;
        for (int j = 1; j < n_sources; j++) most = fraction[j] > fraction[most] ? j : most;
        dealt[most]++;
        fraction[most] -= 1;
    }
}

// ---------------------------------------------------------------- names

// Appends as much of `text` as fits with whole characters; false when some of it did not.
static bool append(char *out, size_t size, const char *text) {
    size_t used = strlen(out), n = strlen(text);
    bool   all = n < size - used;
    if (!all) n = size - used - 1;
    while (n > 0 && !all && ((uint8_t)text[n] & 0xc0) == 0x80) n--;
    memcpy(out + used, text, n);
    out[used + n] = 0;
    return all;
}

static void join_names(const char *const *names, int n_sources, char *out, size_t size) {
    static const char MORE[] = "...";
    bool              all = true;
    out[0] = 0;
    for (int j = 0; j < n_sources && all; j++) {
        if (j > 0) all = append(out, size - sizeof MORE + 1, " + ");
        if (all) all = append(out, size - sizeof MORE + 1, names[j]);
    }
    if (!all) (void)append(out, size, MORE);
}

kvq_status kvq_windows_name(kvq_windows *windows, const char *const *names, char (*const sha256)[KVQ_SHA256_HEX],
                            int n_sources, kvq_error *err) {
    kvq_sha256 *hash = NULL;
    kvq_status  status = kvq_sha256_create(&hash, err);
    if (status != KVQ_OK) return status;
    for (int j = 0; j < n_sources; j++) {
        kvq_sha256_push(hash, sha256[j], strlen(sha256[j]));
        kvq_sha256_push(hash, "  ", 2);
        kvq_sha256_push(hash, names[j], strlen(names[j]));
        kvq_sha256_push(hash, "\n", 1);
    }
    kvq_sha256_finalize(&hash, windows->source_sha256);
    if (n_sources == 1) memcpy(windows->source_sha256, sha256[0], sizeof windows->source_sha256);
    join_names(names, n_sources, windows->source, sizeof windows->source);
    return KVQ_OK;
}
