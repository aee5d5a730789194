// SPDX-License-Identifier: Apache-2.0
//
// A Hugging Face directory: config.json, and the weights in model.safetensors or in shards listed by an index.
#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint.h"
#include "json_read.h"

#define SINGLE "model.safetensors"
#define INDEX  "model.safetensors.index.json"

// ---------------------------------------------------------------- what the directory holds, for messages

typedef struct contents {
    char gguf[256]; // one of the GGUF files
    int  n_gguf;
    bool pickles; // weights in PyTorch's own format
} contents;

static bool has_ending(const char *name, const char *ending) {
    size_t n = strlen(name), m = strlen(ending);
    return n >= m && strcmp(name + n - m, ending) == 0;
}

static contents look_around(const char *path) {
    contents found = {.n_gguf = 0};
    DIR     *directory = opendir(path);
    if (directory == NULL) return found;
    for (struct dirent *entry = readdir(directory); entry != NULL; entry = readdir(directory)) {
        if (has_ending(entry->d_name, ".bin") || has_ending(entry->d_name, ".pth")) found.pickles = true;
        if (!has_ending(entry->d_name, ".gguf") || strlen(entry->d_name) >= sizeof found.gguf) continue;
        (void)snprintf(found.gguf, sizeof found.gguf, "%s", entry->d_name);
        found.n_gguf++;
    }
    (void)closedir(directory);
    return found;
}

// `missing`: what the directory lacks. Says what to do about what it holds instead.
static kvq_status refuse_directory(const char *path, const char *missing, kvq_error *err) {
    contents found = look_around(path);
    if (found.n_gguf > 0) {
        return kvq_fail(err, KVQ_ERR_NOT_FOUND, "pass the GGUF file itself instead of its directory",
                        "model %s: no %s in this directory, but %s/%s%s", path, missing, path, found.gguf,
                        found.n_gguf > 1 ? " and other GGUF files" : "");
    }
    if (found.pickles) {
        return kvq_fail(
            err, KVQ_ERR_UNSUPPORTED,
            "convert it in Python: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            "model %s: no %s in this directory, only weights as Python pickles (.bin, .pth), which kvq does not open",
            path, missing);
    }
    return kvq_fail(err, KVQ_ERR_NOT_FOUND, "pass a directory that holds config.json and *.safetensors",
                    "model %s: no %s in this directory", path, missing);
}

// ---------------------------------------------------------------- weights

static kvq_status open_shard(const kvq_context *ctx, kvq_checkpoint *c, const char *name, kvq_error *err) {
    char      *path = NULL;
    kvq_status status = checkpoint_join_path(ctx, c->path, name, &path, err);
    if (status == KVQ_OK) status = safetensors_open(ctx, path, &c->shards[c->n_shards], err);
    if (status == KVQ_OK) c->n_shards++;
    kvq_free(ctx, path);
    return status;
}

static bool is_open(const kvq_checkpoint *c, const char *name) {
    for (int64_t i = 0; i < c->n_shards; i++) {
        if (strcmp(kvq_file_name(safetensors_path(c->shards[i])), name) == 0) return true;
    }
    return false;
}

static kvq_status open_listed_shards(const kvq_context *ctx, kvq_checkpoint *c, const cJSON *map, const char *what,
                                     kvq_error *err) {
    kvq_status   status = KVQ_OK;
    const cJSON *entry;
    KVQ_TRY(KVQ_NEW(ctx, cJSON_GetArraySize(map), "shard list", &c->shards, err));
    cJSON_ArrayForEach(entry, map) {
        const char *file = cJSON_IsString(entry) ? entry->valuestring : "";
        if (!has_ending(file, ".safetensors") || strchr(file, '/') != NULL) {
            status = kvq_fail(err, KVQ_ERR_INPUT, NULL,
                              "%s: tensor '%.100s' is not in a .safetensors file of this directory ('%.100s')", what,
                              entry->string, file);
            goto done;
        }
        if (!is_open(c, file)) KVQ_TRY(open_shard(ctx, c, file, err));
    }
done:
    return status;
}

static kvq_status list_stored(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err) {
    int64_t n = 0, total = 0;
    for (int64_t i = 0; i < c->n_shards; i++) {
        (void)safetensors_tensors(c->shards[i], &n);
        total += n;
    }
    kvq_status status = KVQ_NEW(ctx, total, "tensor list", &c->stored, err);
    if (status != KVQ_OK) return status;
    for (int64_t i = 0; i < c->n_shards; i++) {
        const safetensors_tensor *t = safetensors_tensors(c->shards[i], &n);
        for (int64_t j = 0; j < n; j++) {
            stored_tensor *s = &c->stored[c->n_stored++];
            s->name = (gguf_string){t[j].name, strlen(t[j].name)};
            s->file = safetensors_path(c->shards[i]);
            s->type_name = t[j].dtype;
            s->type = t[j].type;
            s->n_dims = t[j].n_dims;
            memcpy(s->dims, t[j].dims, sizeof s->dims);
            s->data = t[j].data;
            s->bytes = t[j].bytes;
        }
    }
    return checkpoint_sort_stored(c, err);
}

// Index and shards name the same tensors in the same files: otherwise files of two checkpoints are mixed.
static kvq_status check_index(const kvq_checkpoint *c, const cJSON *map, const char *what, kvq_error *err) {
    const cJSON *entry;
    int64_t      n = 0;
    cJSON_ArrayForEach(entry, map) {
        const stored_tensor *s = checkpoint_find_stored(c, (gguf_string){entry->string, strlen(entry->string)});
        if (s == NULL || strcmp(kvq_file_name(s->file), entry->valuestring) != 0) {
            return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: tensor '%.100s' is not in %.100s", what, entry->string,
                            entry->valuestring);
        }
        n++;
    }
    if (n == c->n_stored) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: lists %lld tensors, its files hold %lld", what, (long long)n,
                    (long long)c->n_stored);
}

static kvq_status open_index(const kvq_context *ctx, kvq_checkpoint *c, const char *path, kvq_error *err) {
    kvq_status   status;
    cJSON       *index = NULL;
    const cJSON *map;
    KVQ_TRY(json_parse_file(path, &index, err));
    map = cJSON_GetObjectItemCaseSensitive(index, "weight_map");
    if (!cJSON_IsObject(map)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: has no weight_map", path);
        goto done;
    }
    KVQ_TRY(open_listed_shards(ctx, c, map, path, err));
    KVQ_TRY(list_stored(ctx, c, err));
    KVQ_TRY(check_index(c, map, path, err));
done:
    cJSON_Delete(index);
    return status;
}

static kvq_status open_single(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err) {
    kvq_status status = KVQ_NEW(ctx, 1, "shard list", &c->shards, err);
    if (status == KVQ_OK) status = open_shard(ctx, c, SINGLE, err);
    return status == KVQ_OK ? list_stored(ctx, c, err) : status;
}

kvq_status checkpoint_open_directory(const kvq_context *ctx, kvq_checkpoint *c, kvq_error *err) {
    kvq_status status;
    char      *config = NULL, *single = NULL, *index = NULL;
    KVQ_TRY(checkpoint_join_path(ctx, c->path, "config.json", &config, err));
    KVQ_TRY(checkpoint_join_path(ctx, c->path, SINGLE, &single, err));
    KVQ_TRY(checkpoint_join_path(ctx, c->path, INDEX, &index, err));
    if (access(config, F_OK) != 0) {
        status = refuse_directory(c->path, "config.json", err);
        goto done;
    }
    KVQ_TRY(kvq_map_file(config, &c->config_file, err));
    KVQ_TRY(hf_config_read(ctx, (const char *)c->config_file.data, c->config_file.bytes, config, &c->config, err));
    if (access(single, F_OK) == 0) { // transformers prefers it to an index, too
        KVQ_TRY(open_single(ctx, c, err));
    } else if (access(index, F_OK) == 0) {
        KVQ_TRY(open_index(ctx, c, index, err));
    } else {
        status = refuse_directory(c->path, SINGLE, err);
    }
done:
    kvq_free(ctx, config);
    kvq_free(ctx, single);
    kvq_free(ctx, index);
    return status;
}
