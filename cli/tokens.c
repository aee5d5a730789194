// SPDX-License-Identifier: Apache-2.0
//
// From --text, --tokens or "self" to windows of token ids: the glue between files, tokenizer, model and datasets that
// calibration and validation share. They differ only in how windows are taken (drawn or consecutive).
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"

const char *const kvq_cli_bos_names[] = {"auto", "always", "never", NULL};
const char *const kvq_cli_text_format_names[] = {"auto", "raw", "jsonl", NULL};
const char *const kvq_cli_documents_names[] = {"joined", "kept", NULL};
const char *const kvq_cli_newlines_names[] = {"kept", "bare", "single", "mixed", NULL};

static bool is_self(const char *text) { return strcmp(text, "self") == 0; }

bool kvq_cli_is_self(const kvq_cli_source *source) {
    return source->texts.count == 1 && is_self(source->texts.items[0]);
}

// ---------------------------------------------------------------- checks

static kvq_status check_options(const kvq_cli_source *source, kvq_error *err) {
    double weights[CLI_MAX_LIST];
    if (source->texts.count == 0 && source->tokens == NULL) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give a text file, or the word self to let the model write",
                        "--text is missing");
    }
    if (source->texts.count > 0 && source->tokens != NULL) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give one of them", "--text %s and --tokens %s contradict each other",
                        source->texts.items[0], source->tokens);
    }
    for (int i = 0; i < source->texts.count && source->texts.count > 1; i++) {
        if (!is_self(source->texts.items[i])) continue;
        return kvq_fail(err, KVQ_ERR_USAGE, "give files, or self alone",
                        "--text self: text that the model writes cannot be mixed with others");
    }
    if (kvq_cli_is_self(source) && source->bos == KVQ_BOS_NEVER) {
        return kvq_fail(err, KVQ_ERR_USAGE, "leave --bos out",
                        "--bos never: text that the model writes starts with a BOS token");
    }
    if (source->newlines != 0 && (source->tokens != NULL || kvq_cli_is_self(source))) {
        return kvq_fail(err, KVQ_ERR_USAGE, "leave it out",
                        "--newlines %s: only texts in files have line ends that can be changed",
                        kvq_cli_newlines_names[source->newlines]);
    }
    return source->mix != NULL ? kvq_cli_parse_mix(source->mix, &source->texts, weights, err) : KVQ_OK;
}

void kvq_cli_source_files(const kvq_cli_source *source, const char **inputs) {
    bool self = kvq_cli_is_self(source);
    inputs[0] = source->tokens;
    for (int i = 0; i < CLI_MAX_LIST; i++)
        inputs[1 + i] = i < source->texts.count && !self ? source->texts.items[i] : NULL;
}

kvq_status kvq_cli_source_check(const kvq_cli_source *source, kvq_error *err) {
    kvq_context     silent = kvq_context_default();
    kvq_mapped_file file = {NULL, 0};
    kvq_status      status = KVQ_OK;
    KVQ_TRY(check_options(source, err));
    if (source->tokens != NULL) KVQ_TRY(kvq_map_file(source->tokens, &file, err));
    for (int i = 0; i < source->texts.count && !kvq_cli_is_self(source); i++) {
        kvq_text *text = NULL;
        KVQ_TRY(kvq_text_open(&silent, source->texts.items[i], KVQ_TEXT_AUTO, NULL, &text, err));
        kvq_text_close(&silent, &text);
    }

done:
    kvq_unmap_file(&file);
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

kvq_status kvq_cli_resolve_bos(int policy, bool tokenizer_adds, int64_t known_id, int64_t vocab_size, int64_t *bos_id,
                               kvq_error *err) {
    bool wanted = policy == KVQ_BOS_ALWAYS || (policy == KVQ_BOS_AUTO && tokenizer_adds);
    *bos_id = -1;
    if (!wanted) return KVQ_OK;
    if (known_id < 0 || known_id >= vocab_size) {
        return kvq_fail(err, KVQ_ERR_USAGE, "use --bos never",
                        "--bos %s: neither model nor tokenizer names a BOS token", kvq_cli_bos_names[policy]);
    }
    *bos_id = known_id;
    return KVQ_OK;
}

// ---------------------------------------------------------------- given ids

static kvq_status token_windows(kvq_cli *cli, const kvq_model_config *config, const kvq_cli_source *from,
                                const kvq_cli_window_request *request, kvq_windows *out, kvq_error *err) {
    kvq_status      status = KVQ_OK;
    kvq_mapped_file file = {NULL, 0};
    kvq_ids         ids = {NULL, 0, 0};
    const char     *name = kvq_file_name(from->tokens);
    char            sha256[1][KVQ_SHA256_HEX];
    int64_t         bos_id;

    if (request->python_draw || request->n_heldout > 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, "give the text itself", "--tokens %s: %s needs a text", from->tokens,
                         request->python_draw ? "--draw python" : "--held-out"));
    }
    KVQ_TRY(kvq_map_file(from->tokens, &file, err));
    KVQ_TRY(kvq_sha256_of(file.data, file.bytes, sha256[0], err));
    KVQ_TRY(kvq_ids_read_npy(&cli->ctx, from->tokens, config->vocab_size, &ids, err));
    // a tokenizer's policy says nothing about ids that are given
    KVQ_TRY(kvq_cli_resolve_bos(from->bos, false, config->bos_id, config->vocab_size, &bos_id, err));
    if (request->drawn) {
        KVQ_TRY(
            kvq_windows_drawn(&cli->ctx, &ids, request->seq_len, request->n_windows, request->seed, bos_id, out, err));
    } else {
        KVQ_TRY(kvq_windows_consecutive(&cli->ctx, &ids, request->seq_len, request->n_windows, bos_id, out, err));
    }
    KVQ_TRY(kvq_windows_name(out, &name, sha256, 1, err));

done:
    kvq_ids_free(&cli->ctx, &ids);
    kvq_unmap_file(&file);
    return status;
}

kvq_status kvq_cli_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
                           const char *model_path, const kvq_cli_source *source, const kvq_cli_window_request *request,
                           kvq_windows *out, kvq_cli_tokenizer *tokenizer, kvq_error *err) {
    const kvq_model_config *config = kvq_checkpoint_config(checkpoint);
    kvq_cli_tokenizer       none = {.kind = "none", .bos_id = -1};
    *tokenizer = none;
    if (kvq_cli_is_self(source)) return kvq_cli_self_windows(cli, be, checkpoint, model_path, request, out, err);
    if (source->tokens != NULL) return token_windows(cli, config, source, request, out, err);
    return kvq_cli_text_windows(cli, config, model_path, source, request, out, tokenizer, err);
}
