// SPDX-License-Identifier: Apache-2.0
// What can be asked of a calibration.
#include "calib_impl.h"

#define MAX_OUTLIER_FRACTION 0.1

kvq_calib_options kvq_calib_options_default(void) {
    return (kvq_calib_options){
        .k_bits = 3, .v_bits = 3, .outlier_fraction = 0.01, .sink_tokens = 1, .weighting = KVQ_WEIGHT_FISHER_SCALED};
}

static kvq_status check_bits(const char *option, int bits, kvq_error *err) {
    if (bits >= 2 && bits <= 4) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "choose 2, 3 or 4", "%s %d: supported widths are 2, 3 and 4 bits", option,
                    bits);
}

kvq_status kvq_calib_options_check(const kvq_calib_options *o, const kvq_model_config *config, int64_t seq_len,
                                   kvq_error *err) {
    int        d = config->n_kv_heads * config->head_dim;
    kvq_status status = check_bits("--k-bits", o->k_bits, err);
    if (status == KVQ_OK) status = check_bits("--v-bits", o->v_bits, err);
    if (status != KVQ_OK) return status;
    if (!(o->outlier_fraction >= 0 && o->outlier_fraction <= MAX_OUTLIER_FRACTION)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "1% is the usual choice", "--outliers %g: the fraction must lie in 0 .. %g",
                        o->outlier_fraction, MAX_OUTLIER_FRACTION);
    }
    if (seq_len < 2) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--seq-len %lld: a window needs two tokens, one to see and one to predict", (long long)seq_len);
    }
    if (config->max_positions > 0 && seq_len > config->max_positions) {
        return kvq_fail(err, KVQ_ERR_USAGE, "use shorter windows",
                        "--seq-len %lld: the model was made for at most %lld positions", (long long)seq_len,
                        (long long)config->max_positions);
    }
    // the last token of a window predicts nothing, so its Fisher weights are exactly zero
    int64_t most_sinks = seq_len - (o->weighting == KVQ_WEIGHT_NONE ? 1 : 2);
    if (o->sink_tokens < 0 || o->sink_tokens > most_sinks) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--sink-tokens %lld: must lie in 0 .. %lld for windows of %lld tokens",
                        (long long)o->sink_tokens, (long long)most_sinks, (long long)seq_len);
    }
    int n_side = kvq_block_n_side(o->outlier_fraction, d);
    if (d >= (int)KVQ_NO_CHANNEL) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "K and V have %d channels per token: at most %d can be stored",
                        d, (int)KVQ_NO_CHANNEL - 1);
    }
    if (2 * n_side >= d || n_side > KVQ_BLOCK_MAX_SIDE) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use a smaller --outliers",
                        "K and V have %d channels: %d outliers on either side do not fit", d, n_side);
    }
    return KVQ_OK;
}
