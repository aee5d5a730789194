// SPDX-License-Identifier: Apache-2.0
//
// --bos auto follows the tokenizer, and tokenizers are not always right about their model: some models are useless
// without a BOS token in front, a few with one. So both ways are measured.
#include "kvq_cli.h"

#define FAR_BETTER_NATS 0.5 // per token; a model that does not care differs by hundredths

kvq_status kvq_cli_check_bos(kvq_cli *cli, const kvq_backend *be, kvq_model *model, const kvq_cli_source *source,
                             const kvq_windows *windows, const kvq_cli_tokenizer *tokenizer, bool plan_only,
                             kvq_error *err) {
    if (source->bos != KVQ_BOS_AUTO || tokenizer->bos_id < 0) return KVQ_OK;
    kvq_bos_trial trial = kvq_bos_trial_plan(model, windows);
    if (trial.n_windows == 0) return KVQ_OK;
    kvq_cli_say(cli, "bos        auto: %lld windows of %lld tokens are scored with and without one first, %.3g TFLOP",
                (long long)trial.n_windows, (long long)trial.n_tokens, trial.tera_flops);
    if (plan_only) return KVQ_OK;
    kvq_status status = kvq_bos_trial_run(&cli->ctx, be, model, windows, tokenizer->bos_id, &trial, err);
    if (status != KVQ_OK) return status;
    bool   added = windows->bos_added;
    double this_way = added ? trial.with_bos : trial.without_bos;
    double other_way = added ? trial.without_bos : trial.with_bos;
    kvq_cli_say(cli, "bos        %.3f nats per token with a BOS token, %.3f without", trial.with_bos,
                trial.without_bos);
    if (this_way - other_way > FAR_BETTER_NATS) {
        kvq_log(&cli->ctx, KVQ_LOG_WARNING,
                "this model reads text far better %s a BOS token in front: %.2f instead of %.2f nats per token. The "
                "tokenizer says otherwise, and --bos auto follows it; use --bos %s",
                added ? "without" : "with", other_way, this_way, added ? "never" : "always");
    }
    return KVQ_OK;
}
