// SPDX-License-Identifier: Apache-2.0
// What can be asked of a calibration.
#include "calib_impl.h"

#define MAX_OUTLIER_FRACTION 0.1

kvq_calib_options kvq_calib_options_default(void) {
    return (kvq_calib_options){
        .measure = {.n_fractions = 3,
                    .fractions = {0, 0.0025, 0.01},
                    .weightings = KVQ_WEIGHTINGS_ALL,
                    .sink_tokens = 1,
                    .channel_weighting = KVQ_WEIGHT_FISHER_SCALED,
                    .moments = true},
        .fit = {.outlier_fraction = 0.01, .k_bits = 3, .v_bits = 3, .weighting = KVQ_WEIGHT_FISHER_SCALED}};
}

kvq_measure_options kvq_measure_for_fit(const kvq_calib_options *options) {
    kvq_measure_options m = options->measure;
    m.n_fractions = 1;
    m.fractions[0] = options->fit.outlier_fraction;
    m.weightings = KVQ_WEIGHTINGS_BASIC | 1u << options->fit.weighting;
    m.moments = false;
    return m;
}

#define USUAL_TILE_SIDE 8

void kvq_measure_for_tiles(kvq_measure_options *m) {
    m->allocated = true;
    m->half_thresholds = true;
    m->tile_side = m->k_slots > 0 ? m->k_slots : USUAL_TILE_SIDE;
}

// ---------------------------------------------------------------- measurements

static kvq_status check_fraction(const kvq_measure_options *o, int f, int d, kvq_error *err) {
    double fraction = o->fractions[f];
    if (!(fraction >= 0 && fraction <= MAX_OUTLIER_FRACTION)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "1% is the usual choice", "--outliers %g: the fraction must lie in 0 .. %g",
                        fraction, MAX_OUTLIER_FRACTION);
    }
    if (f > 0 && !(fraction > o->fractions[f - 1])) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--outliers: %g comes after %g; give them in ascending order",
                        fraction, o->fractions[f - 1]);
    }
    int n_side = kvq_block_n_side(fraction, d);
    if (2 * n_side >= d || n_side > KVQ_BLOCK_MAX_SIDE) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use a smaller --outliers",
                        "K and V have %d channels: %d outliers on either side do not fit", d, n_side);
    }
    return KVQ_OK;
}

static kvq_status check_tiles(const kvq_measure_options *o, int head_dim, kvq_error *err) {
    if (!o->allocated) return KVQ_OK;
    if (o->k_axis != KVQ_AXIS_CHANNEL || o->k_domain != KVQ_KEYS_PRE_ROPE || !o->half_thresholds) {
        return kvq_fail(
            err, KVQ_ERR_USAGE, "leave out --k-axis and --k-domain",
            "channel-allocated keys have ranges per channel, thresholds in f16, and are stored before RoPE");
    }
    if (head_dim <= KVQ_TILE_MAX_HEAD_DIM && head_dim % 2 == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                    "a head_dim of %d: the channel-allocated format has even ones up to %d", head_dim,
                    KVQ_TILE_MAX_HEAD_DIM);
}

static kvq_status check_windows(const kvq_measure_options *o, const kvq_model_config *config, int64_t seq_len,
                                kvq_error *err) {
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
    int64_t most_sinks = seq_len - (measure_needs_gradients(o) ? 2 : 1);
    if (o->sink_tokens < 0 || o->sink_tokens > most_sinks) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--sink-tokens %lld: must lie in 0 .. %lld for windows of %lld tokens",
                        (long long)o->sink_tokens, (long long)most_sinks, (long long)seq_len);
    }
    return KVQ_OK;
}

kvq_status kvq_measure_options_check(const kvq_measure_options *o, const kvq_model_config *config, int64_t seq_len,
                                     kvq_error *err) {
    int        d = config->n_kv_heads * config->head_dim;
    kvq_status status = check_windows(o, config, seq_len, err);
    if (status == KVQ_OK) status = check_tiles(o, config->head_dim, err);
    if (status != KVQ_OK) return status;
    if (d >= (int)KVQ_NO_CHANNEL) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "K and V have %d channels per token: at most %d can be stored",
                        d, (int)KVQ_NO_CHANNEL - 1);
    }
    if (o->n_fractions < 1 || o->n_fractions > KVQ_MAX_FRACTIONS) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--outliers: %d fractions; 1 to %d can be measured", o->n_fractions,
                        KVQ_MAX_FRACTIONS);
    }
    for (int f = 0; f < o->n_fractions && status == KVQ_OK; f++) status = check_fraction(o, f, d, err);
    if (status != KVQ_OK) return status;
    if (o->k_axis == KVQ_AXIS_TOKEN && (o->threshold_scope == KVQ_SCOPE_MATRIX || o->k_slots != 0)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "leave them out, or keep --k-axis channel",
                        "--k-axis token: there are no thresholds, so --threshold-scope and --k-outlier-slots mean "
                        "nothing");
    }
    if (o->k_slots < -1 || 2 * o->k_slots >= d || o->k_slots > KVQ_BLOCK_MAX_SIDE) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--k-outlier-slots %lld: of %d channels at most %d per side",
                        (long long)o->k_slots, d, (d - 1) / 2 < KVQ_BLOCK_MAX_SIDE ? (d - 1) / 2 : KVQ_BLOCK_MAX_SIDE);
    }
    if (o->moments && o->k_domain == KVQ_KEYS_POST_ROPE)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "second moments are measured of keys before RoPE only");
    return KVQ_OK;
}

// ---------------------------------------------------------------- fits

static kvq_status check_bits(const char *option, int bits, kvq_error *err) {
    if ((bits >= 2 && bits <= 5) || bits == 8) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "choose 2, 3, 4 or 5; 8 for reference",
                    "%s %d: supported widths are 2, 3, 4, 5 and 8 bits", option, bits);
}

kvq_status kvq_fit_options_check(const kvq_fit_options *o, kvq_error *err) {
    kvq_status status = check_bits("--k-bits", o->k_bits, err);
    if (status == KVQ_OK) status = check_bits("--v-bits", o->v_bits, err);
    if (status != KVQ_OK) return status;
    if (o->recent_tokens < 0 || o->recent_tokens > INT32_MAX)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--recent-window %lld: not a number of tokens",
                        (long long)o->recent_tokens);
    bool fixed = o->k_datatype != KVQ_NUQ && o->v_datatype != KVQ_NUQ;
    if (o->compare_lloyd && fixed)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--compare-lloyd: these datatypes have no fit to compare");
    if (o->q_norm && (o->k_datatype == KVQ_INT_CLAMPED || o->v_datatype == KVQ_INT_CLAMPED)) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "use int",
                        "--q-norm and the datatype int-clamped: the affine map would undo the zero point");
    }
    return KVQ_OK;
}
