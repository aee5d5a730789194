// SPDX-License-Identifier: Apache-2.0
//
// --text FILE: files, a tokenizer and a rule become windows. The texts are never in memory as a whole.
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"

typedef struct text_set {
    kvq_cli              *cli;
    kvq_tokenizer        *tokenizer;
    kvq_text_source      *sources[CLI_MAX_LIST];
    kvq_token_source      views[CLI_MAX_LIST];
    kvq_source_use        uses[CLI_MAX_LIST];
    int                   n, n_versions; // sources; of each text
    const kvq_cli_source *from;
} text_set;

// Drawing takes a second reading; that a pipe has none should be known before the first.
static kvq_status check_readable_twice(const char *path, kvq_error *err) {
    kvq_context silent = kvq_context_default();
    kvq_text   *text = NULL;
    kvq_status  status = kvq_text_open(&silent, path, KVQ_TEXT_AUTO, NULL, &text, err);
    if (status == KVQ_OK && !kvq_text_can_rewind(text)) {
        status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, "save it as a file first",
                          "--text %s: windows are drawn from the whole text, so it is read twice, and a pipe cannot be",
                          path);
    }
    kvq_text_close(&silent, &text);
    return status;
}

// With mixed newlines every text is there in two versions, as two sources.
static kvq_newlines version_of(const kvq_cli_source *from, int version) {
    return from->newlines <= KVQ_NEWLINES_SINGLE ? (kvq_newlines)from->newlines
           : version == 0                        ? KVQ_NEWLINES_KEPT
                                                 : KVQ_NEWLINES_BARE;
}

static kvq_status open_texts(text_set *set, const kvq_model_config *config, const char *model_path, bool drawn,
                             kvq_error *err) {
    const kvq_cli_source   *from = set->from;
    kvq_text_source_options options = {
        .format = (kvq_text_format)from->format, .field = from->field, .vocab_size = config->vocab_size};
    kvq_status status = KVQ_OK;
    for (int i = 0; i < from->texts.count && drawn; i++) KVQ_TRY(check_readable_twice(from->texts.items[i], err));
    KVQ_TRY(kvq_tokenizer_open(&set->cli->ctx, model_path, &set->tokenizer, err));
    for (int i = 0; i < set->n_versions * from->texts.count; i++) {
        options.newlines = version_of(from, i % set->n_versions);
        KVQ_TRY(kvq_text_source_open(&set->cli->ctx, set->tokenizer, from->texts.items[i / set->n_versions], &options,
                                     &set->sources[i], err));
        set->views[i] = kvq_text_source_view(set->sources[i]);
        set->n++;
    }

done:
    return status;
}

static void close_texts(text_set *set) {
    for (int i = 0; i < set->n; i++) kvq_text_source_close(&set->cli->ctx, &set->sources[i]);
    kvq_tokenizer_close(&set->cli->ctx, &set->tokenizer);
}

// Between joined documents stands what stands between texts in training: the token that ends a text, and, where windows
// begin with one, the token that begins a text.
static void set_joint(kvq_window_rule *rule, int64_t eos_id, int64_t vocab_size) {
    if (eos_id >= 0 && eos_id < vocab_size) rule->joint[rule->n_joint++] = (int32_t)eos_id;
    if (rule->bos_id >= 0 && rule->bos_id != eos_id) rule->joint[rule->n_joint++] = (int32_t)rule->bos_id;
}

// Versions of a text have equal shares.
static kvq_status parse_weights(const text_set *set, double *weights, kvq_error *err) {
    double     of_texts[CLI_MAX_LIST];
    kvq_status status = kvq_cli_parse_mix(set->from->mix, &set->from->texts, of_texts, err);
    for (int i = 0; i < set->n && status == KVQ_OK; i++) weights[i] = of_texts[i / set->n_versions];
    return status;
}

static kvq_status name_windows(text_set *set, kvq_windows *windows, kvq_error *err) {
    const char *names[CLI_MAX_LIST];
    char        sha256[CLI_MAX_LIST][KVQ_SHA256_HEX];
    kvq_status  status = KVQ_OK;
    for (int i = 0; i < set->n; i++) {
        names[i] = set->views[i].name;
        KVQ_TRY(kvq_text_source_sha256(set->sources[i], sha256[i], err));
    }
    status = kvq_windows_name(windows, names, sha256, set->n, err);

done:
    return status;
}

static void say_uses(text_set *set) {
    for (int i = 0; i < set->n; i++) {
        const kvq_source_use *use = &set->uses[i];
        if (set->n == 1 && use->n_documents == 1) continue; // the plan says it all
        kvq_cli_say(set->cli, "           %s  %lld documents  %lld tokens  %lld windows", set->views[i].name,
                    (long long)use->n_documents, (long long)use->n_tokens, (long long)use->n_windows);
    }
}

kvq_status kvq_cli_text_windows(kvq_cli *cli, const kvq_model_config *config, const char *model_path,
                                const kvq_cli_source *source, const kvq_cli_window_request *request, kvq_windows *out,
                                kvq_cli_tokenizer *tokenizer, kvq_error *err) {
    kvq_status      status = KVQ_OK;
    text_set        set = {.cli = cli, .from = source, .n_versions = source->newlines > KVQ_NEWLINES_SINGLE ? 2 : 1};
    double          weights[CLI_MAX_LIST];
    kvq_window_rule rule = {.seq_len = request->seq_len,
                            .n_windows = request->n_windows,
                            .seed = request->seed,
                            .keep_documents = source->documents == 1,
                            .python_draw = request->python_draw,
                            .n_heldout = request->n_heldout};

    if (set.n_versions * source->texts.count > CLI_MAX_LIST) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, NULL, "--newlines mixed: at most %d texts, there are %d", CLI_MAX_LIST / 2,
                         source->texts.count));
    }
    KVQ_TRY(open_texts(&set, config, model_path, request->drawn, err));
    kvq_tokenizer_info info = kvq_tokenizer_describe(set.tokenizer);
    int64_t            known_bos = info.bos_id >= 0 ? info.bos_id : config->bos_id;
    KVQ_TRY(kvq_cli_resolve_bos(source->bos, info.adds_bos, known_bos, config->vocab_size, &rule.bos_id, err));
    set_joint(&rule, info.eos_id >= 0 ? info.eos_id : config->eos_id, config->vocab_size);
    if (source->mix != NULL) KVQ_TRY(parse_weights(&set, weights, err));
    KVQ_TRY((request->drawn ? kvq_windows_draw : kvq_windows_take)(
        &cli->ctx, set.views, source->mix != NULL ? weights : NULL, set.n, &rule, set.uses, out, err));
    KVQ_TRY(name_windows(&set, out, err));
    say_uses(&set);
    (void)snprintf(tokenizer->kind, sizeof tokenizer->kind, "%s", info.kind);
    memcpy(tokenizer->sha256, info.sha256, sizeof tokenizer->sha256);
    tokenizer->bos_id = known_bos >= 0 && known_bos < config->vocab_size ? known_bos : -1;
    tokenizer->n_texts = set.n;
    for (int i = 0; i < set.n; i++) tokenizer->text_windows[i] = set.uses[i].n_windows;

done:
    close_texts(&set);
    return status;
}
