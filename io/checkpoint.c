// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints: opening either container, reading rows, identity.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "checkpoint.h"

const char *kvq_rope_type_name(kvq_rope_type type) {
    static const char *const NAMES[] = {"default", "linear", "llama3", "yarn"};
    return NAMES[type];
}

int64_t kvq_layer_window(const kvq_model_config *config, int64_t layer) {
    return (config->slides[layer / 8] >> (layer % 8) & 1) != 0 ? config->sliding_window : 0;
}

kvq_status checkpoint_join_path(const kvq_context *ctx, const char *directory, const char *name, char **out,
                                kvq_error *err) {
    size_t     size = strlen(directory) + strlen(name) + 2;
    char      *path = NULL;
    kvq_status status = KVQ_NEW(ctx, (int64_t)size, "path", &path, err);
    if (status != KVQ_OK) return status;
    (void)snprintf(path, size, "%s/%s", directory, name);
    *out = path;
    return KVQ_OK;
}

kvq_status checkpoint_check_config(const kvq_model_config *config, const char *what, kvq_error *err) {
    if (config->n_heads % config->n_kv_heads != 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %d query heads are not a multiple of %d key/value heads", what,
                        config->n_heads, config->n_kv_heads);
    }
    if (config->head_dim % 2 != 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the head width %d is odd, but rotary positions need pairs", what,
                        config->head_dim);
    }
    if (!(config->rope.theta > 1)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the rotary base %g is not above 1", what, config->rope.theta);
    }
    if (!(config->rms_norm_eps > 0 && config->rms_norm_eps < 1)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the epsilon %g of the RMS norm is not between 0 and 1", what,
                        (double)config->rms_norm_eps);
    }
    if (config->local_rope_theta != 0 && !(config->local_rope_theta > 1)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the rotary base %g of sliding layers is not above 1", what,
                        config->local_rope_theta);
    }
    if (config->bos_id >= config->vocab_size || config->eos_id >= config->vocab_size) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: token id bos %lld or eos %lld is outside the vocabulary of %lld",
                        what, (long long)config->bos_id, (long long)config->eos_id, (long long)config->vocab_size);
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- stored tensors by name

static int by_stored_name(const void *a, const void *b) {
    return gguf_compare(((const stored_tensor *)a)->name, ((const stored_tensor *)b)->name);
}

kvq_status checkpoint_sort_stored(kvq_checkpoint *c, kvq_error *err) {
    qsort(c->stored, (size_t)c->n_stored, sizeof *c->stored, by_stored_name);
    for (int64_t i = 1; i < c->n_stored; i++) {
        const stored_tensor *a = &c->stored[i - 1], *b = &c->stored[i];
        if (by_stored_name(a, b) != 0) continue;
        return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "tensor '%.*s' is in %s and in %s", (int)b->name.n, b->name.text,
                        a->file, b->file);
    }
    return KVQ_OK;
}

stored_tensor *checkpoint_find_stored(const kvq_checkpoint *c, gguf_string name) {
    stored_tensor wanted = {.name = name};
    if (c->n_stored == 0) return NULL;
    return bsearch(&wanted, c->stored, (size_t)c->n_stored, sizeof *c->stored, by_stored_name);
}

// ---------------------------------------------------------------- open and close

// "org/name" as models are called on a hub.
static bool looks_like_hub_name(const char *path) {
    const char *slash = strchr(path, '/');
    return slash != NULL && slash != path && slash[1] != 0 && strchr(slash + 1, '/') == NULL && path[0] != '.' &&
           path[0] != '~';
}

static kvq_status not_there(const char *path, kvq_error *err) {
    char advice[256];
    if (!looks_like_hub_name(path))
        return kvq_fail(err, KVQ_ERR_NOT_FOUND, NULL, "model %s: %s", path, strerror(errno));
    (void)snprintf(advice, sizeof advice, "kvq never downloads; run: hf download %.80s --local-dir DIR, then pass DIR",
                   path);
    return kvq_fail(err, KVQ_ERR_NOT_FOUND, advice, "model %s: there is no such directory or file", path);
}

kvq_status kvq_checkpoint_open(const kvq_context *ctx, const char *path, kvq_checkpoint **out, kvq_error *err) {
    kvq_status      status;
    kvq_checkpoint *c = NULL;
    struct stat     info;
    if (stat(path, &info) != 0) return not_there(path, err);
    KVQ_TRY(KVQ_NEW(ctx, 1, "checkpoint", &c, err));
    c->path = kvq_strdup(ctx, path);
    if (c->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "model %s: could not allocate its name", path);
        goto done;
    }
    for (size_t n = strlen(c->path); n > 1 && c->path[n - 1] == '/'; n--) c->path[n - 1] = 0;
    if (S_ISDIR(info.st_mode)) {
        KVQ_TRY(checkpoint_open_directory(ctx, c, err));
    } else if (gguf_is_gguf(path)) {
        KVQ_TRY(checkpoint_open_gguf(ctx, c, err));
    } else {
        status =
            kvq_fail(err, KVQ_ERR_INPUT, "pass a Hugging Face directory (config.json and *.safetensors) or a GGUF file",
                     "model %s: is neither a directory nor a GGUF file", path);
        goto done;
    }
    KVQ_TRY(checkpoint_bind(ctx, c, err));
    *out = c;
    c = NULL;
done:
    kvq_checkpoint_close(ctx, &c);
    return status;
}

void kvq_checkpoint_close(const kvq_context *ctx, kvq_checkpoint **checkpoint) {
    kvq_checkpoint *c = *checkpoint;
    if (c == NULL) return;
    for (int64_t i = 0; i < c->n_shards; i++) safetensors_close(ctx, &c->shards[i]);
    kvq_free(ctx, c->shards);
    gguf_close(ctx, &c->gguf);
    kvq_unmap_file(&c->config_file);
    kvq_free(ctx, c->stored);
    kvq_free(ctx, c->bound);
    kvq_free(ctx, c->path);
    kvq_free(ctx, c);
    *checkpoint = NULL;
}

const kvq_model_config *kvq_checkpoint_config(const kvq_checkpoint *checkpoint) { return &checkpoint->config; }

// ---------------------------------------------------------------- reading

static int name_to_bound(const void *name, const void *bound) {
    return strcmp(name, ((const bound_tensor *)bound)->name);
}

static const bound_tensor *find_bound(const kvq_checkpoint *c, const char *name) {
    return bsearch(name, c->bound, (size_t)c->n_bound, sizeof *c->bound, name_to_bound);
}

int64_t kvq_checkpoint_largest_tensor(const kvq_checkpoint *checkpoint) {
    size_t largest = 0;
    for (int64_t i = 0; i < checkpoint->n_stored; i++)
        largest = checkpoint->stored[i].bytes > largest ? checkpoint->stored[i].bytes : largest;
    return (int64_t)largest;
}

bool kvq_checkpoint_has(const kvq_checkpoint *checkpoint, const char *name) {
    return find_bound(checkpoint, name) != NULL;
}

// Row of the file that holds row `row` of the model. Within a head of width D, Hugging Face row i < D/2 is file row 2
// i, row D/2 + i is file row 2 i + 1.
static int64_t file_row(int64_t row, int64_t head_dim) {
    int64_t head = row / head_dim, i = row % head_dim, half = head_dim / 2;
    return head * head_dim + (i < half ? 2 * i : 2 * (i - half) + 1);
}

static kvq_status check_finite(const bound_tensor *b, int64_t row, const float *x, int64_t n, kvq_error *err) {
    int64_t i = kvq_find_nonfinite(x, n);
    if (i < 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s: tensor '%s' holds %g at row %lld, column %lld", b->stored->file,
                    b->name, (double)x[i], (long long)row, (long long)i);
}

kvq_status kvq_checkpoint_read(const kvq_checkpoint *checkpoint, const char *name, int64_t n_total_rows,
                               int64_t n_columns, int64_t row, int64_t n_rows, float *out, kvq_error *err) {
    const bound_tensor *b = find_bound(checkpoint, name);
    if (b == NULL) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "model %s: has no tensor '%s'", checkpoint->path, name);
    if (b->rows != n_total_rows || b->columns != n_columns || row < 0 || n_rows < 0 || row > b->rows - n_rows) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL,
                        "tensor '%s' is [%lld, %lld]: rows %lld + %lld of [%lld, %lld] asked for", name,
                        (long long)b->rows, (long long)b->columns, (long long)row, (long long)n_rows,
                        (long long)n_total_rows, (long long)n_columns);
    }
    const ggml_type *type = b->stored->type;
    if (b->is_vector && b->is_paired) { // a bias: its elements are permuted as the rows of its matrix are
        for (int64_t i = 0; i < n_rows * n_columns; i++) {
            type->expand(b->data + file_row(i, checkpoint->config.head_dim) * type->bytes, 1, out + i);
        }
        return check_finite(b, row, out, n_rows * n_columns, err);
    }
    int64_t n_blocks = n_columns / type->values;
    for (int64_t r = row; r < row + n_rows; r++, out += n_columns) {
        int64_t at = b->is_paired ? file_row(r, checkpoint->config.head_dim) : r;
        type->expand(b->data + at * n_blocks * type->bytes, n_blocks, out);
        kvq_status status = check_finite(b, r, out, n_columns, err);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

void kvq_checkpoint_forget(const kvq_checkpoint *checkpoint, const char *name) {
    const bound_tensor *b = find_bound(checkpoint, name);
    if (b != NULL) checkpoint_forget_bytes(b->data, b->bytes);
}

// ---------------------------------------------------------------- identity

enum { DIGEST_STEP_BYTES = 8 << 20 };

typedef struct digest_job {
    const kvq_checkpoint *checkpoint;
    char (*digests)[KVQ_SHA256_HEX]; // [n_bound]
    kvq_status *status;              // [n_bound]
} digest_job;

// One tensor: a line with name, type and shape, then the stored bytes. A tensor may be larger than the memory, so what
// was hashed is forgotten on the way.
static void digest_tensor(void *user, int64_t item, int worker) {
    digest_job         *job = user;
    const bound_tensor *b = &job->checkpoint->bound[item];
    kvq_sha256         *hash = NULL;
    char                line[192];
    (void)worker;
    job->status[item] = kvq_sha256_create(&hash, NULL);
    if (job->status[item] != KVQ_OK) return;
    int n = snprintf(line, sizeof line, "%s %s %lld %lld\n", b->name, b->stored->type->name, (long long)b->rows,
                     (long long)b->columns);
    kvq_sha256_push(hash, line, (size_t)n);
    for (size_t at = 0; at < b->bytes; at += DIGEST_STEP_BYTES) {
        size_t n_step = b->bytes - at < DIGEST_STEP_BYTES ? b->bytes - at : DIGEST_STEP_BYTES;
        kvq_sha256_push(hash, b->data + at, n_step);
        checkpoint_forget_bytes(b->data, at + n_step); // from the start: a step rarely ends where a page does
    }
    kvq_sha256_finalize(&hash, job->digests[item]);
}

static const char *most_used_type(const kvq_checkpoint *c) {
    size_t   totals[GGML_TYPE_LIMIT] = {0};
    uint32_t best = 0;
    for (int64_t i = 0; i < c->n_bound; i++) totals[c->bound[i].stored->type->number] += c->bound[i].bytes;
    for (uint32_t i = 1; i < GGML_TYPE_LIMIT; i++) best = totals[i] > totals[best] ? i : best;
    return ggml_type_name(best);
}

// Tensors are hashed one by one, in parallel, and the digests are hashed in the order of the names: the result does not
// depend on threads, on the order in the file, or on how the file is split.
kvq_status kvq_checkpoint_identify(const kvq_context *ctx, const kvq_checkpoint *checkpoint,
                                   kvq_checkpoint_identity *out, kvq_error *err) {
    kvq_status              status;
    const kvq_checkpoint   *c = checkpoint;
    digest_job              job = {.checkpoint = c};
    kvq_checkpoint_identity id = {.n_tensors = c->n_bound};
    size_t                  n_config = c->config_file.bytes;
    const uint8_t          *config = c->gguf != NULL ? gguf_metadata(c->gguf, &n_config) : c->config_file.data;
    KVQ_TRY(KVQ_NEW(ctx, c->n_bound, "digests", &job.digests, err));
    KVQ_TRY(KVQ_NEW(ctx, c->n_bound, "digest states", &job.status, err));
    kvq_parallel_for(ctx, c->n_bound, digest_tensor, &job);
    for (int64_t i = 0; i < c->n_bound; i++) {
        if (job.status[i] != KVQ_OK) {
            status = kvq_fail(err, job.status[i], NULL, "tensor '%s': could not be hashed", c->bound[i].name);
            goto done;
        }
        id.weight_bytes += (int64_t)c->bound[i].bytes;
    }
    KVQ_TRY(kvq_sha256_of(job.digests, (size_t)c->n_bound * sizeof *job.digests, id.weights_sha256, err));
    KVQ_TRY(kvq_sha256_of(config, n_config, id.config_sha256, err));
    (void)snprintf(id.name, sizeof id.name, "%s", kvq_file_name(c->path));
    (void)snprintf(id.dtype, sizeof id.dtype, "%s", most_used_type(c));
    *out = id;
done:
    kvq_free(ctx, job.digests);
    kvq_free(ctx, job.status);
    return status;
}
