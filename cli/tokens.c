// SPDX-License-Identifier: Apache-2.0
//
// From --text, --tokens or "self" to windows of token ids: the glue between files, tokenizer, model and datasets that
// calibration and validation share. They differ only in how windows are taken (drawn or consecutive).
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"

const char *const kvq_cli_bos_names[] = {"auto", "always", "never", NULL};

bool kvq_cli_is_self(const kvq_cli_source *source) { return source->text != NULL && strcmp(source->text, "self") == 0; }

kvq_status kvq_cli_source_check(const kvq_cli_source *source, kvq_error *err) {
    if (source->text == NULL && source->tokens == NULL) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give a text file, or the word self to let the model write",
                        "--text is missing");
    }
    if (source->text != NULL && source->tokens != NULL) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give one of them", "--text %s and --tokens %s contradict each other",
                        source->text, source->tokens);
    }
    if (kvq_cli_is_self(source)) {
        if (source->bos != KVQ_BOS_NEVER) return KVQ_OK;
        return kvq_fail(err, KVQ_ERR_USAGE, "leave --bos out",
                        "--bos never: text that the model writes starts with a BOS token");
    }
    kvq_mapped_file file;
    kvq_status      status = kvq_map_file(source->text != NULL ? source->text : source->tokens, &file, err);
    if (status == KVQ_OK) kvq_unmap_file(&file);
    return status;
}

kvq_status kvq_cli_seq_len(kvq_cli *cli, const kvq_model_config *config, int64_t wanted, int64_t usual, int64_t *out,
                           kvq_error *err) {
    int64_t limit = config->max_positions > 0 ? config->max_positions : INT64_MAX; // 0 = the model names no limit
    if (wanted > limit) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose a shorter window", "--seq-len %lld: the model has %lld positions",
                        (long long)wanted, (long long)limit);
    }
    if (wanted == 0 && usual > limit) {
        kvq_log(&cli->ctx, KVQ_LOG_INFO, "windows of %lld tokens: the model has no more positions (usual: %lld)",
                (long long)limit, (long long)usual);
    }
    *out = wanted > 0 ? wanted : usual < limit ? usual : limit;
    return KVQ_OK;
}

// ---------------------------------------------------------------- a given text

typedef struct token_source {
    kvq_ids ids;
    int64_t bos_id; // known id, or -1
    bool    adds_bos;
} token_source;

// A tokenizer may know more tokens than the model has rows for.
static kvq_status check_vocabulary(const kvq_ids *ids, int64_t vocab_size, const char *tokenizer, kvq_error *err) {
    for (int64_t i = 0; i < ids->count; i++) {
        if (ids->data[i] < 0 || ids->data[i] >= vocab_size) {
            return kvq_fail(err, KVQ_ERR_MISMATCH, "use the tokenizer that was made for this model",
                            "%s: token %lld has id %d, but the model's vocabulary has %lld", tokenizer, (long long)i,
                            (int)ids->data[i], (long long)vocab_size);
        }
    }
    return KVQ_OK;
}

// Beginnings of files that a tokenizer would turn into thousands of meaningless tokens without a word.
static const struct {
    const char *magic, *what;
} NO_TEXT[] = {
    {"\x1f\x8b", "gzip"},
    {"\x28\xb5\x2f\xfd", "zstd"},
    {"\xfd"
     "7zXZ",
     "xz"},
    {"BZh", "bzip2"},
    {"PK\x03\x04", "zip"},
    {"\x89HDF", "HDF5"},
    {"GGUF", "GGUF"},
    {"\xff\xfe", "UTF-16"},
    {"\xfe\xff", "UTF-16"},
};

static kvq_status check_text(kvq_cli *cli, const char *path, const kvq_mapped_file *file, kvq_error *err) {
    const char *advice = "give plain UTF-8 text; decompress or convert it first";
    for (int i = 0; i < CLI_COUNT_OF(NO_TEXT); i++) {
        size_t n = strlen(NO_TEXT[i].magic);
        if (file->bytes < n || memcmp(file->data, NO_TEXT[i].magic, n) != 0) continue;
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, advice, "%s: the file begins as %s, not as text", path,
                        NO_TEXT[i].what);
    }
    const uint8_t *zero = file->bytes > 0 ? memchr(file->data, 0, file->bytes) : NULL;
    if (zero != NULL) {
        return kvq_fail(err, KVQ_ERR_INPUT, advice, "%s: byte %td is zero, so this is no text", path,
                        zero - file->data);
    }
    size_t malformed = kvq_utf8_valid_prefix((const char *)file->data, file->bytes);
    if (malformed < file->bytes) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING, "%s: not UTF-8 from byte %zu on; malformed bytes become U+FFFD", path,
                malformed);
    }
    return KVQ_OK;
}

static kvq_status read_text(kvq_cli *cli, const char *path, const char *model_path, const kvq_model_config *config,
                            token_source *source, kvq_cli_tokenizer *description, char source_sha256[KVQ_SHA256_HEX],
                            kvq_error *err) {
    kvq_status      status = KVQ_OK;
    kvq_mapped_file file = {NULL, 0};
    kvq_tokenizer  *tokenizer = NULL;

    KVQ_TRY(kvq_map_file(path, &file, err));
    KVQ_TRY(check_text(cli, path, &file, err));
    KVQ_TRY(kvq_sha256_of(file.data, file.bytes, source_sha256, err));
    KVQ_TRY(kvq_tokenizer_open(&cli->ctx, model_path, &tokenizer, err));
    kvq_tokenizer_info info = kvq_tokenizer_describe(tokenizer);
    KVQ_TRY(kvq_tokenizer_encode(&cli->ctx, tokenizer, (const char *)file.data, file.bytes, true, &source->ids, err));
    KVQ_TRY(check_vocabulary(&source->ids, config->vocab_size, kvq_file_name(model_path), err));
    source->bos_id = info.bos_id >= 0 ? info.bos_id : config->bos_id;
    source->adds_bos = info.adds_bos;
    (void)snprintf(description->kind, sizeof description->kind, "%s", info.kind);
    memcpy(description->sha256, info.sha256, sizeof description->sha256);

done:
    kvq_tokenizer_close(&cli->ctx, &tokenizer);
    kvq_unmap_file(&file);
    return status;
}

static kvq_status read_tokens(kvq_cli *cli, const char *path, const kvq_model_config *config, token_source *source,
                              char source_sha256[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_status      status = KVQ_OK;
    kvq_mapped_file file = {NULL, 0};

    KVQ_TRY(kvq_map_file(path, &file, err));
    KVQ_TRY(kvq_sha256_of(file.data, file.bytes, source_sha256, err));
    KVQ_TRY(kvq_ids_read_npy(&cli->ctx, path, config->vocab_size, &source->ids, err));
    source->bos_id = config->bos_id; // a tokenizer's policy says nothing about ids that are given

done:
    kvq_unmap_file(&file);
    return status;
}

// The BOS token of each window, -1 for none.
static kvq_status resolve_bos(const token_source *source, int policy, int64_t vocab_size, int64_t *bos_id,
                              kvq_error *err) {
    bool wanted = policy == KVQ_BOS_ALWAYS || (policy == KVQ_BOS_AUTO && source->adds_bos);
    *bos_id = -1;
    if (!wanted) return KVQ_OK;
    if (source->bos_id < 0 || source->bos_id >= vocab_size) {
        return kvq_fail(err, KVQ_ERR_USAGE, "use --bos never",
                        "--bos %s: neither model nor tokenizer names a BOS token", kvq_cli_bos_names[policy]);
    }
    *bos_id = source->bos_id;
    return KVQ_OK;
}

static kvq_status given_windows(kvq_cli *cli, const kvq_model_config *config, const char *model_path,
                                const kvq_cli_source *from, const kvq_cli_window_request *request, kvq_windows *out,
                                kvq_cli_tokenizer *tokenizer, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    const char  *path = from->text != NULL ? from->text : from->tokens;
    token_source source = {.bos_id = -1};
    char         sha256[KVQ_SHA256_HEX];
    int64_t      bos_id;

    if (from->text != NULL) {
        KVQ_TRY(read_text(cli, path, model_path, config, &source, tokenizer, sha256, err));
    } else {
        KVQ_TRY(read_tokens(cli, path, config, &source, sha256, err));
    }
    KVQ_TRY(resolve_bos(&source, from->bos, config->vocab_size, &bos_id, err));
    if (request->drawn) {
        KVQ_TRY(kvq_windows_drawn(&cli->ctx, &source.ids, request->seq_len, request->n_windows, request->seed, bos_id,
                                  out, err));
    } else {
        KVQ_TRY(
            kvq_windows_consecutive(&cli->ctx, &source.ids, request->seq_len, request->n_windows, bos_id, out, err));
    }
    (void)snprintf(out->source, sizeof out->source, "%s", kvq_file_name(path));
    memcpy(out->source_sha256, sha256, sizeof out->source_sha256);

done:
    kvq_ids_free(&cli->ctx, &source.ids);
    return status;
}

// ---------------------------------------------------------------- the model's own text

typedef struct writer {
    kvq_cli           *cli;
    const kvq_backend *be;
    kvq_model         *model;
    kvq_decode        *decode;
    int64_t            vocab_size, n_done, n_total;
} writer;

static kvq_status write_token(void *user, int64_t n_seqs, const int32_t *ids, const double *u, int32_t *next,
                              kvq_error *err) {
    writer      *w = user;
    const float *logits;
    kvq_status   status = kvq_decode_step(w->model, w->decode, ids, &logits, err);
    if (status != KVQ_OK) return status;
    w->be->sample(w->be, logits, u, n_seqs, w->vocab_size, next);
    kvq_report_progress(&w->cli->ctx, "write", ++w->n_done, w->n_total);
    return KVQ_OK;
}

// The model's own BOS, else the one its tokenizer names. A checkpoint without a tokenizer can write as well.
static kvq_status find_bos(kvq_cli *cli, const kvq_model_config *config, const char *model_path, int64_t *bos_id,
                           kvq_error *err) {
    kvq_tokenizer *tokenizer = NULL;
    *bos_id = config->bos_id;
    if (*bos_id < 0 && kvq_tokenizer_open(&cli->ctx, model_path, &tokenizer, NULL) == KVQ_OK) {
        *bos_id = kvq_tokenizer_describe(tokenizer).bos_id;
        kvq_tokenizer_close(&cli->ctx, &tokenizer);
    }
    if (*bos_id >= 0 && *bos_id < config->vocab_size) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "give a text file",
                    "--text self: neither model nor tokenizer of %s names a BOS token", kvq_file_name(model_path));
}

static kvq_status self_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                               const char *model_path, const kvq_cli_window_request *request, kvq_windows *out,
                               kvq_error *err) {
    kvq_status              status = KVQ_OK;
    const kvq_model_config *config = kvq_checkpoint_config(checkpoint);
    writer  w = {.cli = cli, .be = be, .vocab_size = config->vocab_size, .n_total = request->seq_len - 1};
    int64_t bos_id;

    KVQ_TRY(find_bos(cli, config, model_path, &bos_id, err));
    KVQ_TRY(kvq_model_create(&cli->ctx, be, checkpoint, true, &w.model, err));
    KVQ_TRY(kvq_decode_create(w.model, request->n_windows, request->seq_len, &w.decode, err));
    KVQ_TRY(kvq_windows_self(&cli->ctx, request->seq_len, request->n_windows, request->seed, bos_id, config->eos_id,
                             write_token, &w, out, err));

done:
    if (w.model != NULL) kvq_decode_destroy(w.model, &w.decode);
    kvq_model_destroy(&cli->ctx, &w.model);
    return status;
}

kvq_status kvq_cli_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                           const char *model_path, const kvq_cli_source *source, const kvq_cli_window_request *request,
                           kvq_windows *out, kvq_cli_tokenizer *tokenizer, kvq_error *err) {
    kvq_cli_tokenizer none = {"none", ""};
    *tokenizer = none;
    if (kvq_cli_is_self(source)) return self_windows(cli, be, checkpoint, model_path, request, out, err);
    return given_windows(cli, kvq_checkpoint_config(checkpoint), model_path, source, request, out, tokenizer, err);
}
