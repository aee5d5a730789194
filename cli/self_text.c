// SPDX-License-Identifier: Apache-2.0
//
// --text self: windows that the model writes.
#include "kvq_cli.h"

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
    if (kvq_stop_requested(&w->cli->ctx)) {
        return kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL,
                        "the model had written token %lld of %lld; its text will be written again",
                        (long long)w->n_done, (long long)w->n_total);
    }
    kvq_status status = kvq_decode_step(w->model, w->decode, ids, &logits, err);
    if (status != KVQ_OK) return status;
    w->be->sample(w->be, logits, u, n_seqs, w->vocab_size, next);
    kvq_report_progress(&w->cli->ctx, "write", -1, ++w->n_done, w->n_total);
    return w->be->check(w->be, err);
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

kvq_status kvq_cli_self_windows(kvq_cli *cli, const kvq_backend *be, const kvq_checkpoint *checkpoint,
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
