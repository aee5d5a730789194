// SPDX-License-Identifier: Apache-2.0
//
// Does the model still find what lies far behind it? Windows that hide a pass key, scored where they tell it.
#include <math.h>

#include "kvq_decoder.h"

// Whether all tokens of a window's answer are hits. The window holds the right answer, and token j of it is predicted
// from the right tokens before it. Greedy decoding predicts it from the tokens that it chose itself; as long as all of
// these were right, they are the same. So either every choice is right both ways, or the first wrong one is the same
// both ways, and greedy decoding has not given the key either.
static bool retrieved(const kvq_validation *v, const kvq_passkeys *keys, int64_t window, uint8_t hit) {
    const uint8_t *hits = v->position_hits + window * v->n_scored; // the first scored position predicts answer_at
    for (int32_t j = 0; j < keys->n_answer[window]; j++) {
        if ((hits[j] & hit) == 0) return false;
    }
    return true;
}

static kvq_passkey_cell count_cell(const kvq_validation *v, const kvq_passkeys *keys, int depth) {
    kvq_passkey_cell cell = {.seq_len = v->seq_len, .depth = keys->depths[depth], .n_trials = keys->n_trials};
    for (int64_t trial = 0; trial < keys->n_trials; trial++) {
        int64_t window = depth * keys->n_trials + trial;
        bool    baseline = retrieved(v, keys, window, KVQ_BASELINE_HIT);
        bool    quantized = retrieved(v, keys, window, KVQ_QUANTIZED_HIT);
        cell.baseline += baseline;
        cell.quantized += quantized;
        cell.both += baseline && quantized;
    }
    return cell;
}

kvq_validate_options kvq_passkey_options(const kvq_passkeys *keys) {
    return (kvq_validate_options){.protocol = KVQ_PROTOCOL_DECODE, .n_prompt = keys->answer_at - 1};
}

kvq_status kvq_validate_passkey(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                                const kvq_artifact *artifact, const kvq_passkeys *keys, kvq_passkey_cell *cells,
                                kvq_error *err) {
    const kvq_validate_options options = kvq_passkey_options(keys);
    kvq_validation             v = {.has_artifact = false};
    if (artifact == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "passkey: there is no cache to decode with");
    kvq_status status = kvq_validate(ctx, be, model, artifact, &keys->windows, &options, &v, err);
    if (status != KVQ_OK) return status;
    for (int depth = 0; depth < keys->n_depths; depth++) cells[depth] = count_cell(&v, keys, depth);
    kvq_validation_free(ctx, &v);
    return KVQ_OK;
}

kvq_estimate kvq_passkey_kept(const kvq_passkey_cell *cells, int64_t n_cells) {
    const double z = 1.959963984540054, nan = (double)NAN; // 97.5 % of the normal distribution
    double       n = 0, both = 0;
    for (int64_t i = 0; i < n_cells; i++) {
        n += (double)cells[i].baseline;
        both += (double)cells[i].both;
    }
    if (!(n > 0)) return (kvq_estimate){nan, nan, nan, nan};
    double p = both / n, centre = (p + z * z / (2 * n)) / (1 + z * z / n);
    double reach = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n));
    // rounding must not leave an end inside of the value
    return (kvq_estimate){p, sqrt(p * (1 - p) / n), both > 0 ? fmin(centre - reach, p) : 0,
                          both < n ? fmax(centre + reach, p) : 1};
}
