// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites: a small capture with a different, awkward value in every field, so that a field which is lost
// or swapped on the way through a file shows.
#ifndef SAMPLE_CAPTURE_H
#define SAMPLE_CAPTURE_H

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_io.h"
#include "kvq_test.h"

#define LAYERS  3
#define WINDOWS 2
#define TOKENS  5
#define HEADS   4
#define KV      2
#define DIM     6

static inline char *sample_path(const char *name) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", kvq_test_folder(), name);
    return path;
}

// Layer 1 is not captured.
static inline kvq_capture_info sample_info(void) {
    kvq_capture_info i = {.has_query = true, .has_fisher = true, .type = KVQ_ARRAY_F32};
    strcpy(i.model.architecture, "llama");
    strcpy(i.model.name, "kleines Modell \xc3\xa4\xe2\x82\xac");
    memset(i.model.config_sha256, 'c', KVQ_SHA256_HEX - 1);
    memset(i.model.weights_sha256, '0', KVQ_SHA256_HEX - 1);
    i.model.n_layers = LAYERS;
    i.model.n_heads = HEADS;
    i.model.n_kv_heads = KV;
    i.model.head_dim = DIM;
    i.model.hidden_size = 25;
    i.model.vocab_size = 512;
    i.model.n_tensors = 39;
    i.model.rope_theta = 500000.1;
    strcpy(i.model.rope_type, "llama3");
    strcpy(i.model.dtype, "BF16");
    strcpy(i.tokenizer.kind, "bpe-bytelevel");
    memset(i.tokenizer.sha256, 'a', KVQ_SHA256_HEX - 1);
    i.tokenizer.bos_added = true;
    strcpy(i.dataset.source, "a \"quoted\"\tname.txt"); // source_sha256 stays ""
    i.dataset.n_available_tokens = (int64_t)1 << 40;
    i.dataset.n_windows = WINDOWS;
    i.dataset.seq_len = TOKENS;
    i.dataset.seed = UINT64_MAX - 7; // needs all 64 bits
    kvq_capture_add_layer(&i, 0);
    kvq_capture_add_layer(&i, 2);
    return i;
}

static inline int64_t heads_of(kvq_capture_part part) { return part == KVQ_CAPTURE_Q ? HEADS : KV; }

static inline int64_t window_size(const kvq_capture_info *info, kvq_capture_part part) {
    return info->dataset.seq_len * heads_of(part) * info->model.head_dim;
}

// Element i of a window; squared gradients span 60 decades.
static inline float sample_value(kvq_capture_part part, int64_t layer, int64_t window, int64_t i) {
    uint32_t stream = (uint32_t)((layer * WINDOWS + window) * KVQ_CAPTURE_N_PARTS + part);
    double   u = kvq_rng_uniform(11, KVQ_RNG_TEST, stream, (uint64_t)i);
    bool     fisher = part == KVQ_CAPTURE_FISHER_K || part == KVQ_CAPTURE_FISHER_V;
    return (float)(fisher ? pow(10.0, -40 + 60 * u) : 100 * u - 30);
}

static inline int32_t sample_id(int64_t i) { return (int32_t)(i * 37 % 512); }

static inline kvq_status put_window(kvq_capture_writer *w, const kvq_capture_info *info, kvq_capture_part part,
                                    int64_t layer, int64_t window, kvq_error *err) {
    int64_t n = window_size(info, part);
    float  *x = malloc((size_t)n * sizeof *x);
    if (x == NULL) abort();
    for (int64_t i = 0; i < n; i++) x[i] = sample_value(part, layer, window, i);
    kvq_status status = kvq_capture_put(w, part, layer, window, x, err);
    free(x);
    return status;
}

static inline bool has_part(const kvq_capture_info *info, kvq_capture_part part) {
    return part <= KVQ_CAPTURE_V || (part == KVQ_CAPTURE_Q ? info->has_query : info->has_fisher);
}

static inline kvq_status put_all(kvq_capture_writer *w, const kvq_capture_info *info, kvq_error *err) {
    for (int64_t layer = 0; layer < info->model.n_layers; layer++) {
        for (int64_t window = 0; window < info->dataset.n_windows; window++) {
            for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
                if (!kvq_capture_has_layer(info, layer) || !has_part(info, part)) continue;
                kvq_status status = put_window(w, info, part, layer, window, err);
                if (status != KVQ_OK) return status;
            }
        }
    }
    return KVQ_OK;
}

static inline kvq_status write_capture(const kvq_context *ctx, const char *path, const kvq_capture_info *info,
                                       kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_capture_writer *w = NULL;
    int32_t             ids[WINDOWS * TOKENS];
    for (int64_t i = 0; i < WINDOWS * TOKENS; i++) ids[i] = sample_id(i);
    bool fits = info->dataset.n_windows * info->dataset.seq_len == WINDOWS * TOKENS;
    KVQ_TRY(kvq_capture_create(ctx, path, true, info, fits ? ids : NULL, &w, err));
    KVQ_TRY(put_all(w, info, err));
    KVQ_TRY(kvq_capture_commit(ctx, &w, 2.0 / 3, err));
done:
    kvq_capture_discard(ctx, &w);
    return status;
}

// What of a sample is stored as f16 comes back rounded.
static inline void assert_window(const kvq_capture *c, kvq_capture_part part, int64_t layer, int64_t window,
                                 bool half) {
    kvq_error               err = {0};
    const kvq_capture_info *info = kvq_capture_describe(c);
    int64_t                 n = window_size(info, part);
    float                  *x = malloc((size_t)n * sizeof *x);
    kvq_test_ok(kvq_capture_read(c, part, layer, window, x, &err), &err);
    int64_t n_wrong = 0; // Check is too slow to be asked about every element
    for (int64_t i = 0; i < n; i++) {
        float expected = sample_value(part, layer, window, i);
        if (half && part <= KVQ_CAPTURE_Q) expected = kvq_float_of_half(kvq_half_of_float(expected));
        n_wrong += kvq_bits_of_float(x[i]) != kvq_bits_of_float(expected);
    }
    ck_assert_msg(n_wrong == 0, "%s of layer %lld, window %lld: %lld of %lld elements are wrong",
                  kvq_capture_part_names[part], (long long)layer, (long long)window, (long long)n_wrong, (long long)n);
    free(x);
}

static inline void assert_all(const kvq_capture *c, bool half) {
    const kvq_capture_info *info = kvq_capture_describe(c);
    for (int64_t layer = 0; layer < info->model.n_layers; layer++) {
        for (int64_t window = 0; window < info->dataset.n_windows; window++) {
            for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
                if (kvq_capture_has_layer(info, layer) && has_part(info, part))
                    assert_window(c, part, layer, window, half);
            }
        }
    }
}

static inline int count_files(void) {
    int  n = 0;
    DIR *folder = opendir(kvq_test_folder());
    ck_assert_ptr_nonnull(folder);
    for (const struct dirent *entry = readdir(folder); entry != NULL; entry = readdir(folder))
        n += entry->d_name[0] != '.' || strlen(entry->d_name) > 2;
    (void)closedir(folder);
    return n;
}

#endif
