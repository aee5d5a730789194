// SPDX-License-Identifier: Apache-2.0
//
// What the options of kvq-calibrate mean together: contradictions, defaults that depend on others, and the list of
// settings that artifacts record.
#include <math.h>
#include <stdio.h>

#include "calibrate_report.h"

const char *const calibrate_group_names[] = {"layer", "head", NULL};
const char *const calibrate_draw_names[] = {"kvq", "python", NULL};
const char *const calibrate_compat_names[] = {"none", "kvquant", NULL};

// ---------------------------------------------------------------- contradictions

const char *find_given(const named_option *options, int n) {
    for (int i = 0; i < n; i++) {
        if (options[i].given) return options[i].name;
    }
    return NULL;
}

// An option that could have no effect is a misunderstanding.
static kvq_status refuse(const named_option *options, int n, const char *beside, const char *next, kvq_error *err) {
    const char *found = find_given(options, n);
    if (found == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, next, "%s: %s has no meaning here", beside, found);
}

// What belongs to sweeps over a model.
static kvq_status refuse_sweep_options(const calibrate_options *o, int n_ranks, const char *beside, const char *next,
                                       kvq_error *err) {
    const named_option options[] = {
        {"--samples", o->samples != CLI_USUAL_SAMPLES},
        {"--seq-len", o->seq_len > 0},
        {"--seed", o->seed.given},
        {"--draw", o->draw != 0},
        {"--memory-limit", o->memory_limit > 0},
        {"--scratch-limit", o->scratch_limit > 0},
        {"--work-dir", o->work_dir != NULL},
        {"--restart", o->restart},
        {"--shard", o->shard != NULL},
        {"--thresholds", o->thresholds != NULL},
        {"--measure-only", o->measure_only},
        {"mpirun", n_ranks > 1},
    };
    return refuse(options, CLI_COUNT_OF(options), beside, next, err);
}

static kvq_status refuse_model_options(const calibrate_options *o, const char *beside, const char *next,
                                       kvq_error *err) {
    const named_option options[] = {
        {"--model", o->model != NULL},          {"--text", o->source.texts.count > 0},
        {"--tokens", o->source.tokens != NULL}, {"--bos", o->source.bos != KVQ_BOS_AUTO},
        {"--held-out", o->held_out > 0},        {"--compute", o->engine.compute != KVQ_COMPUTE_F32},
        {"--eigenvectors", o->eigenvectors},
    };
    return refuse(options, CLI_COUNT_OF(options), beside, next, err);
}

// A measurement does not look at how a fit would be made.
static kvq_status refuse_fit_options(const calibrate_options *o, kvq_error *err) {
    const named_option options[] = {
        {"--bits", o->bits > 0},
        {"--k-bits", o->k_bits > 0},
        {"--v-bits", o->v_bits > 0},
        {"--datatype", o->datatype != NOT_GIVEN},
        {"--k-datatype", o->k_datatype != NOT_GIVEN},
        {"--v-datatype", o->v_datatype != NOT_GIVEN},
        {"--weighting", o->weighting != NOT_GIVEN && !o->allocated.measure}, // channels are counted with one
        {"--groups", o->groups != 0},
        {"--q-norm", o->q_norm},
        {"--compare-lloyd", o->compare_lloyd},
        {"--recent-window", o->recent_window > 0},
        {"--held-out", o->held_out > 0},
    };
    return refuse(options, CLI_COUNT_OF(options), "--measure-only", "give it to kvq-calibrate --from, which fits", err);
}

static kvq_status refuse_measured_options(const calibrate_options *o, kvq_error *err) {
    const named_option options[] = {
        {"--sink-tokens", o->sink_tokens != NOT_GIVEN},
        {"--count-sinks", o->count_sinks},
        {"--k-axis", o->k_axis != KVQ_AXIS_CHANNEL},
        {"--k-domain", o->k_domain != KVQ_KEYS_PRE_ROPE},
        {"--threshold-scope", o->threshold_scope != KVQ_SCOPE_CHANNEL},
        {"--k-outlier-slots", o->k_slots > 0},
        {"--eigenvectors", o->eigenvectors},
        {"--compat", o->compat != 0},
        {"--capture", o->capture != NULL},
    };
    return refuse(options, CLI_COUNT_OF(options), "--from",
                  "the measurement decides it; measure again with --measure-only to change it", err);
}

static kvq_status check_bits_options(const calibrate_options *o, kvq_error *err) {
    if (o->bits > 0 && (o->k_bits > 0 || o->v_bits > 0)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give --bits, or --k-bits and --v-bits",
                        "--bits %lld and --k-bits or --v-bits contradict each other", (long long)o->bits);
    }
    if (o->outliers.count > 1 && !o->measure_only) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give one, or add --measure-only", "--outliers: %d shares; a fit has one",
                        o->outliers.count);
    }
    return KVQ_OK;
}

static kvq_status check_capture_options(const calibrate_options *o, int n_ranks, kvq_error *err) {
    static const char NEXT[] = "leave it out; the capture brings model, text and windows along";
    char              beside[300];
    (void)snprintf(beside, sizeof beside, "--capture %.256s", o->capture);
    kvq_status status = refuse_model_options(o, beside, NEXT, err);
    if (status == KVQ_OK) status = refuse_sweep_options(o, n_ranks, beside, NEXT, err);
    if (status == KVQ_OK && o->compat != 0)
        status = kvq_fail(err, KVQ_ERR_USAGE, NEXT, "%s: --compat has no meaning here", beside);
    return status == KVQ_OK ? check_bits_options(o, err) : status;
}

// Held-out windows lie between the others, so there must be a text with places that are known to be free.
static kvq_status check_held_out(const calibrate_options *o, kvq_error *err) {
    const named_option options[] = {
        {"--draw python", o->draw == 1},
        {"--compat kvquant", o->compat == 1},
        {"--documents kept", o->source.documents == 1},
        {"--text self", kvq_cli_is_self(&o->source)},
        {"--tokens", o->source.tokens != NULL},
    };
    const char *found = find_given(options, CLI_COUNT_OF(options));
    if (o->held_out == 0 || found == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "leave one of them out",
                    "--held-out: with %s there are no windows beside the calibration's", found);
}

static kvq_status check_from_options(const calibrate_options *o, int n_ranks, kvq_error *err) {
    static const char NEXT[] = "leave it out; the measurement brings model, text and windows along";
    kvq_status        status = refuse_measured_options(o, err);
    if (status == KVQ_OK) status = refuse_sweep_options(o, n_ranks, "--from", NEXT, err);
    if (status == KVQ_OK && o->held_out == 0) {
        status = refuse_model_options(
            o, "--from", "a fit needs neither model nor text; they are for --held-out N, its error report", err);
    }
    if (status == KVQ_OK) status = check_bits_options(o, err);
    if (status != KVQ_OK || o->held_out == 0) return status;
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--held-out needs --model and --text");
    status = check_held_out(o, err);
    return status == KVQ_OK ? kvq_cli_source_check(&o->source, err) : status;
}

static kvq_status check_shard_options(const calibrate_options *o, int n_ranks, kvq_error *err) {
    if (o->shard != NULL && n_ranks > 1) {
        return kvq_fail(err, KVQ_ERR_USAGE, "use one of them", "--shard %s and %d processes contradict each other",
                        o->shard, n_ranks);
    }
    if (o->shard != NULL && o->held_out > 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "leave it out", "--held-out: what kvq-merge writes has no model to test");
    }
    if (o->shard != NULL && o->measure_only) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "spread it over processes with mpirun",
                        "--measure-only of a --shard: kvq-merge makes artifacts, not measurements");
    }
    if (o->thresholds != NULL && o->shard == NULL)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--thresholds belongs to the second round of a --shard");
    return KVQ_OK;
}

kvq_status check_calibrate_options(const calibrate_options *o, int n_ranks, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    KVQ_TRY(check_allocated_options(o, err));
    if (o->from != NULL) return check_from_options(o, n_ranks, err);
    if (o->capture != NULL) return check_capture_options(o, n_ranks, err);
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--model is missing");
    KVQ_TRY(check_bits_options(o, err));
    if (o->measure_only) KVQ_TRY(refuse_fit_options(o, err));
    if (o->eigenvectors && !o->measure_only)
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, "add --measure-only", "--eigenvectors belong to a measurement"));
    KVQ_TRY(check_shard_options(o, n_ranks, err));
    KVQ_TRY(check_held_out(o, err));
    KVQ_TRY(kvq_cli_source_check(&o->source, err));
done:
    return status;
}

// ---------------------------------------------------------------- what they mean

// "I/N"
static kvq_status read_shard(const char *text, kvq_sweep_options *out, kvq_error *err) {
    long long shard = 0, n_shards = 1;
    int       end = 0;
    if (text != NULL && (sscanf(text, "%lld/%lld%n", &shard, &n_shards, &end) != 2 || text[end] != 0 || shard < 0 ||
                         shard >= n_shards || n_shards > CLI_MAX_LIST)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "the first of two is 0/2", "--shard: '%s' is not I/N with 0 <= I < N <= %d",
                        text, CLI_MAX_LIST);
    }
    out->shard = shard;
    out->n_shards = n_shards;
    return KVQ_OK;
}

static void resolve_fit(const calibrate_options *o, kvq_fit_options *f) {
    int all = o->datatype != NOT_GIVEN ? o->datatype : KVQ_NUQ;
    if (o->bits > 0) f->k_bits = f->v_bits = (int)o->bits;
    if (o->k_bits > 0) f->k_bits = (int)o->k_bits;
    if (o->v_bits > 0) f->v_bits = (int)o->v_bits;
    f->k_datatype = (kvq_datatype)(o->k_datatype != NOT_GIVEN ? o->k_datatype : all);
    f->v_datatype = (kvq_datatype)(o->v_datatype != NOT_GIVEN ? o->v_datatype : all);
    if (o->weighting != NOT_GIVEN) f->weighting = (kvq_weighting)o->weighting;
    if (o->outliers.count > 0) f->outlier_fraction = o->outliers.values[0];
    f->per_head = o->groups == 1;
    f->q_norm = o->q_norm;
    f->compare_lloyd = o->compare_lloyd;
    f->recent_tokens = o->recent_window;
}

static void resolve_measure(const calibrate_options *o, kvq_measure_options *m) {
    if (o->outliers.count > 0) {
        m->n_fractions = o->outliers.count;
        for (int i = 0; i < o->outliers.count; i++) m->fractions[i] = o->outliers.values[i];
    }
    if (o->sink_tokens != NOT_GIVEN) m->sink_tokens = o->sink_tokens;
    m->count_sinks = o->count_sinks;
    m->k_axis = (kvq_axis)o->k_axis;
    m->k_domain = (kvq_key_domain)o->k_domain;
    m->threshold_scope = (kvq_scope)o->threshold_scope;
    m->k_slots = o->k_slots;
    m->moments = m->k_domain == KVQ_KEYS_PRE_ROPE; // they are of keys before RoPE
}

// What the public code of KVQuant does, where that differs from the paper or from what an engine can store.
static void imitate_kvquant(calibration *c) {
    const calibrate_options *o = c->o;
    kvq_measure_options     *m = &c->options.measure;
    if (o->weighting == NOT_GIVEN) c->options.fit.weighting = KVQ_WEIGHT_FISHER;
    if (o->sink_tokens == NOT_GIVEN) m->sink_tokens = 0;
    m->count_sinks = true;
    m->token_range = KVQ_RANGE_PERCENTILES;
    if (m->k_axis == KVQ_AXIS_CHANNEL && o->k_slots == 0) m->k_slots = -1;
    m->half_thresholds = true;
    c->python_draw = true;
}

kvq_status resolve_calibrate_options(calibration *c, kvq_error *err) {
    const calibrate_options *o = c->o;
    c->options = kvq_calib_options_default();
    resolve_fit(o, &c->options.fit);
    resolve_measure(o, &c->options.measure);
    c->python_draw = o->draw == 1;
    if (o->compat == 1) imitate_kvquant(c);
    kvq_status status = resolve_allocated_options(c, err);
    if (status != KVQ_OK) return status;
    c->measured = o->measure_only ? c->options.measure : kvq_measure_for_fit(&c->options);
    status = kvq_cli_work_dir(o->work_dir, o->output, c->work_dir, err);
    if (status != KVQ_OK) return status;
    c->sweep = (kvq_sweep_options){.work_dir = c->work_dir, .restart = o->restart};
    status = read_shard(o->shard, &c->sweep, err);
    if (status != KVQ_OK || o->shard == NULL || o->work_dir != NULL) return status;
    return kvq_fail(err, KVQ_ERR_USAGE, "give each shard a folder of its own, the same in both rounds",
                    "--shard %s needs --work-dir: the second round goes on where the first one ended", o->shard);
}

// The first token's keys are outliers in many channels at once, more than a token has slots for. Cut off, they no
// longer take the attention that the other tokens want to get rid of (docs/results.md has the loss).
void warn_of_cut_sinks(const kvq_cli *cli, const calibration *c) {
    const kvq_measure_options *m = &c->measured;
    double                     most = 0;
    for (int i = 0; i < m->n_fractions; i++) most = fmax(most, m->fractions[i]);
    if (c->o->from != NULL || m->sink_tokens > 0 || m->k_axis != KVQ_AXIS_CHANNEL || m->k_slots < 0 || most == 0)
        return;
    kvq_log(&cli->ctx, KVQ_LOG_WARNING,
            "--sink-tokens 0: keys of the first token usually have more outliers than there are slots for, which costs "
            "more than the others gain; use --sink-tokens 1, or --outliers 0");
}

// ---------------------------------------------------------------- the list

static void add_text(setting *list, int *n, const char *name, const char *text) {
    list[(*n)++] = (setting){.name = name, .text = text};
}

static void add_number(setting *list, int *n, const char *name, double number) {
    list[(*n)++] = (setting){.name = name, .number = number};
}

static void list_fit(const kvq_fit_options *f, setting *list, int *n) {
    add_number(list, n, "outliers", f->outlier_fraction);
    add_number(list, n, "k_bits", f->k_bits);
    add_number(list, n, "v_bits", f->v_bits);
    add_text(list, n, "k_datatype", kvq_datatype_names[f->k_datatype]);
    add_text(list, n, "v_datatype", kvq_datatype_names[f->v_datatype]);
    add_text(list, n, "weighting", kvq_weighting_names[f->weighting]);
    add_text(list, n, "groups", calibrate_group_names[f->per_head]);
    add_number(list, n, "q_norm", f->q_norm);
    add_number(list, n, "compare_lloyd", f->compare_lloyd);
    add_number(list, n, "recent_window", (double)f->recent_tokens);
}

int list_settings(const calibration *c, setting list[MAX_SETTINGS]) {
    static const char *const FRACTION_NAMES[KVQ_MAX_FRACTIONS] = {
        "outliers", "outliers_1", "outliers_2", "outliers_3", "outliers_4", "outliers_5", "outliers_6", "outliers_7"};
    const kvq_measure_options *m = &c->measured;
    int                        n = 0;
    if (c->allocated)
        list_allocated(c, list, &n);
    else if (!c->o->measure_only)
        list_fit(&c->options.fit, list, &n);
    for (int f = 0; f < m->n_fractions && c->o->measure_only; f++)
        add_number(list, &n, FRACTION_NAMES[f], m->fractions[f]);
    add_number(list, &n, "sink_tokens", (double)m->sink_tokens);
    add_number(list, &n, "count_sinks", m->count_sinks);
    add_text(list, &n, "k_axis", kvq_axis_names[m->k_axis]);
    add_text(list, &n, "k_domain", kvq_key_domain_names[m->k_domain]);
    add_text(list, &n, "threshold_scope", kvq_scope_names[m->threshold_scope]);
    add_number(list, &n, "k_outlier_slots", (double)m->k_slots);
    add_number(list, &n, "half_thresholds", m->half_thresholds);
    add_text(list, &n, "token_range", kvq_token_range_names[m->token_range]);
    add_number(list, &n, "measured_weightings", m->weightings);
    if (!m->allocated) return n;
    add_text(list, &n, "channel_weighting", kvq_weighting_names[m->channel_weighting]);
    add_text(list, &n, "v_rotation", kvq_rotation_names[m->rotation]);
    add_text(list, &n, "v_scale", kvq_scale_format_names[m->scale_format]);
    add_number(list, &n, "kl_tokens", (double)c->kl_tokens);
    return n;
}
