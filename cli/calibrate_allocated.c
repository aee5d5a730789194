// SPDX-License-Identifier: Apache-2.0
//
// kvq-calibrate for the channel-allocated format: what its options mean, and a run from the measurement over the KL of
// single tensors to the artifact.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calibrate_report.h"

#define USUAL_OUTLIERS  0.0025
#define USUAL_KL_TOKENS 2048

const char *const   calibrate_preset_names[] = {"alloc-3.4", "alloc-3", "alloc-2.75", "alloc-2.1", NULL};
static const double PRESET_BITS[] = {3.4, 3, 2.75, 2.1};
const char *const   calibrate_v_dim_names[] = {"1", "2", NULL};

// ---------------------------------------------------------------- options

static bool wants_artifact(const allocated_options *a) {
    return a->target_bits > 0 || a->preset != NOT_GIVEN || a->k_bits > 0 || a->v_bits > 0 || a->widths_from != NULL;
}

// What artifacts of this scheme never have.
static kvq_status refuse_others(const calibrate_options *o, kvq_error *err) {
    const named_option others[] = {{"--bits", o->bits > 0},
                                   {"--k-bits", o->k_bits > 0},
                                   {"--v-bits", o->v_bits > 0},
                                   {"--datatype", o->datatype != NOT_GIVEN},
                                   {"--k-datatype", o->k_datatype != NOT_GIVEN},
                                   {"--v-datatype", o->v_datatype != NOT_GIVEN},
                                   {"--groups", o->groups != 0},
                                   {"--q-norm", o->q_norm},
                                   {"--compare-lloyd", o->compare_lloyd},
                                   {"--recent-window", o->recent_window > 0},
                                   {"--compat", o->compat != 0},
                                   {"--shard", o->shard != NULL},
                                   {"--capture", o->capture != NULL}};
    const char        *found = find_given(others, CLI_COUNT_OF(others));
    if (found == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "leave one of them out",
                    "%s has no meaning in the channel-allocated format (--target-bits, --preset)", found);
}

// What only artifacts of this scheme have, or measurements for them.
static kvq_status refuse_own(const calibrate_options *o, kvq_error *err) {
    const allocated_options *a = &o->allocated;
    const named_option       own[] = {{"--k-mean-bits", a->k_bits > 0},
                                      {"--v-mean-bits", a->v_bits > 0},
                                      {"--k-widths", a->k_widths != NULL},
                                      {"--v-rates", a->v_rates != NULL},
                                      {"--width-group", a->width_group > 0},
                                      {"--budget", a->scope != 0},
                                      {"--k-tables", a->tables != 0},
                                      {"--v-dim", a->v_dim != 1},
                                      {"--target-tokens", a->target_tokens > 0},
                                      {"--target-sequences", a->target_sequences > 0}},
                       measured[] = {{"--v-scale", a->scale != 0},
                                     {"--v-rotation", a->rotation != 0},
                                     {"--kl-tokens", a->kl_tokens != NOT_GIVEN}};
    const char *of_fit = find_given(own, CLI_COUNT_OF(own));
    const char *found = of_fit != NULL ? of_fit : a->measure ? NULL : find_given(measured, CLI_COUNT_OF(measured));
    if (found == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE,
                    !o->measure_only ? "add --target-bits, or a --preset"
                    : of_fit != NULL ? "give it to kvq-calibrate --from, which fits"
                                     : "add --allocated",
                    "%s belongs to the channel-allocated format", found);
}

static kvq_status refuse_measured(const calibrate_options *o, kvq_error *err) {
    const allocated_options *a = &o->allocated;
    const named_option       measured[] = {
              {"--v-scale", a->scale != 0}, {"--v-rotation", a->rotation != 0}, {"--weighting", o->weighting != NOT_GIVEN}};
    const char *found = find_given(measured, CLI_COUNT_OF(measured));
    if (o->from == NULL) return KVQ_OK;
    if (a->kl_tokens != NOT_GIVEN && a->kl_tokens != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--from: the measurement decides --kl-tokens; 0 ignores what it has");
    if (found == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "leave it out; to change it measure again with --measure-only --allocated",
                    "--from: the measurement decides %s of the channel-allocated format", found);
}

static kvq_status check_budget_options(const allocated_options *a, kvq_error *err) {
    const named_option decided[] = {{"--k-widths", a->k_widths != NULL},
                                    {"--v-rates", a->v_rates != NULL},
                                    {"--width-group", a->width_group > 0},
                                    {"--budget", a->scope != 0},
                                    {"--kl-tokens", a->kl_tokens > 0}};
    const char        *found = find_given(decided, CLI_COUNT_OF(decided));
    int                n_budgets =
        (a->target_bits > 0) + (a->preset != NOT_GIVEN) + (a->k_bits > 0 || a->v_bits > 0) + (a->widths_from != NULL);
    if (n_budgets > 1) {
        return kvq_fail(err, KVQ_ERR_USAGE,
                        "give --target-bits, or a --preset, or --k-mean-bits and --v-mean-bits, or --widths-from",
                        "more than one budget of the channel-allocated format");
    }
    if ((a->k_bits > 0) != (a->v_bits > 0)) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give both, or --target-bits instead",
                        "--k-mean-bits and --v-mean-bits belong together");
    }
    if (a->widths_from == NULL || found == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, "leave one of them out",
                    "--widths-from: %s has no meaning when the widths are given", found);
}

kvq_status check_allocated_options(const calibrate_options *o, kvq_error *err) {
    const allocated_options *a = &o->allocated;
    kvq_status               status = KVQ_OK;
    if (a->measure && !o->measure_only)
        return kvq_fail(err, KVQ_ERR_USAGE, "add --measure-only", "--allocated belongs to a measurement");
    if (!wants_artifact(a)) return refuse_own(o, err);
    KVQ_TRY(refuse_others(o, err));
    if (o->measure_only) {
        return kvq_fail(err, KVQ_ERR_USAGE, "give it to kvq-calibrate --from; --allocated measures what it needs",
                        "--measure-only: --target-bits and --preset have no meaning here");
    }
    KVQ_TRY(refuse_measured(o, err));
    KVQ_TRY(check_budget_options(a, err));

done:
    return status;
}

// "0,1,2,3": the numbers as bits of a set.
static kvq_status read_set(const char *option, const char *text, unsigned *set, kvq_error *err) {
    unsigned result = 0;
    if (text == NULL) return KVQ_OK;
    for (const char *at = text; *at != 0;) {
        char *end;
        long  value = strtol(at, &end, 10);
        if (end == at || (*end != 0 && *end != ',') || value < 0 || value > KVQ_TILE_MAX_WIDTH) {
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s: '%s' is not a list of widths from 0 to %d like 1,2,4",
                            option, text, KVQ_TILE_MAX_WIDTH);
        }
        result |= 1u << value;
        at = *end == ',' ? end + 1 : end;
    }
    *set = result;
    return KVQ_OK;
}

kvq_status resolve_allocated_options(calibration *c, kvq_error *err) {
    const allocated_options *a = &c->o->allocated;
    kvq_alloc_options       *to = &c->alloc;
    kvq_status               status = KVQ_OK;
    *to = kvq_alloc_options_default();
    c->allocated = wants_artifact(a);
    if (a->preset != NOT_GIVEN) to->target_bits = PRESET_BITS[a->preset];
    if (a->target_bits > 0) to->target_bits = a->target_bits;
    to->k_bits = a->k_bits;
    to->v_bits = a->v_bits;
    to->scope = (kvq_budget_scope)a->scope;
    to->tables = (kvq_table_kind)a->tables;
    if (a->target_sequences > 0) to->n_sequences = a->target_sequences;
    if (a->width_group > 0) to->group = (int)a->width_group;
    if (a->v_dim == 0) { // single channels: whole bits
        to->v_dim = 1;
        to->v_rates = 1u << 2 | 1u << 3 | 1u << 4;
    }
    KVQ_TRY(read_set("--k-widths", a->k_widths, &to->k_widths, err));
    KVQ_TRY(read_set("--v-rates", a->v_rates, &to->v_rates, err));
    to->outlier_fraction = c->o->outliers.count > 0 ? c->o->outliers.values[0] : USUAL_OUTLIERS;
    bool needs_kl = (c->allocated && a->widths_from == NULL) || a->measure; // given widths need no budget
    c->kl_tokens = !needs_kl ? 0 : a->kl_tokens != NOT_GIVEN ? a->kl_tokens : USUAL_KL_TOKENS;
    to->gradients_only = c->o->from != NULL && (a->kl_tokens == 0 || a->widths_from != NULL);
    c->options.measure.rotation = (kvq_rotation_kind)a->rotation;
    c->options.measure.scale_format = (kvq_scale_format)a->scale;
    if (c->allocated) c->options.fit.outlier_fraction = to->outlier_fraction;
    if (c->o->weighting != NOT_GIVEN) c->options.measure.channel_weighting = (kvq_weighting)c->o->weighting;

done:
    return status;
}

kvq_status open_widths(kvq_cli *cli, calibration *c, kvq_error *err) {
    const char *path = c->o->allocated.widths_from;
    char        sha256[KVQ_SHA256_HEX];
    kvq_status  status = KVQ_OK;
    if (path == NULL) return KVQ_OK;
    KVQ_TRY(kvq_artifact_read(&cli->ctx, path, &c->like, sha256, err));
    if (!kvq_artifact_is_allocated(c->like) || c->like->layers[0].v.dim != c->alloc.v_dim) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_MISMATCH, "give one that was made with --target-bits, and its --v-dim",
                         "--widths-from %s: it is not channel-allocated, or not with --v-dim %d", path,
                         c->alloc.v_dim));
    }

done:
    return status;
}

// Bits are dealt for whole tiles, and an open tile is said apart; what is named and recorded is what was dealt for.
void set_by_shape(calibration *c, int64_t head_dim) {
    int64_t given = c->o->allocated.target_tokens, n = given > 0 ? given : c->seq_len;
    c->alloc.n_tokens = (n + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS * KVQ_TILE_TOKENS;
    c->alloc.group = kvq_alloc_group(&c->alloc, (int)head_dim);
}

void complete_allocated_options(calibration *c, int64_t head_dim) {
    if (c->allocated || c->o->allocated.measure) kvq_measure_for_tiles(&c->measured);
    set_by_shape(c, head_dim);
}

void list_allocated(const calibration *c, setting list[MAX_SETTINGS], int *n) {
    const kvq_alloc_options *a = &c->alloc;
    const char              *from = c->o->allocated.widths_from;
    const setting            all[] = {
                   {"outliers", NULL, a->outlier_fraction},
                   {"target_bits", NULL, a->k_bits > 0 || from != NULL ? 0 : a->target_bits},
                   {"target_tokens", NULL, (double)a->n_tokens},
                   {"target_sequences", NULL, (double)a->n_sequences},
                   {"k_mean_bits", NULL, a->k_bits},
                   {"v_mean_bits", NULL, a->v_bits},
                   {"k_widths", NULL, a->k_widths},
                   {"v_rates", NULL, a->v_rates},
                   {"width_group", NULL, a->group},
                   {"budget", kvq_budget_scope_names[a->scope], 0},
                   {"k_tables", kvq_table_kind_names[a->tables], 0},
                   {"v_dim", NULL, a->v_dim},
    };
    for (int i = 0; i < CLI_COUNT_OF(all); i++) list[(*n)++] = all[i];
    if (from != NULL) list[(*n)++] = (setting){"widths_from", kvq_file_name(from), 0};
}

void print_allocated(kvq_cli *cli, const calibration *c) {
    const kvq_alloc_options *a = &c->alloc;
    char                     budget[96];
    if (c->o->allocated.widths_from != NULL)
        (void)snprintf(budget, sizeof budget, "widths of %.64s", kvq_file_name(c->o->allocated.widths_from));
    else if (a->k_bits > 0)
        (void)snprintf(budget, sizeof budget, "K %g bits  V %g bits", a->k_bits, a->v_bits);
    else
        (void)snprintf(budget, sizeof budget, "%g bits for %lld sequences of %lld tokens, everything counted",
                       a->target_bits, (long long)a->n_sequences, (long long)a->n_tokens);
    kvq_cli_say(cli, "quantizer  channel-allocated  %s", budget);
    kvq_cli_say(cli,
                "           K tables per %s, widths in groups of %d, budget by %s, outliers %g%%  V rotated (%s), %s, "
                "scales %s  sink tokens %lld",
                a->tables == KVQ_TABLE_CHANNEL ? "channel" : "layer and width", a->group,
                kvq_budget_scope_names[a->scope], a->outlier_fraction * 100, kvq_rotation_names[c->measured.rotation],
                a->v_dim == 2 ? "pairs" : "single channels", kvq_scale_format_names[c->measured.scale_format],
                (long long)c->measured.sink_tokens);
}

// ---------------------------------------------------------------- what was chosen

static void print_split(kvq_cli *cli, const char *label, const kvq_split *s, const kvq_split *chosen) {
    double loss = s->k_loss + s->v_loss, than = chosen->k_loss + chosen->v_loss;
    kvq_cli_say(cli, "%-10s K %.3f  V %.3f bits: predicted loss %.4g (K %.4g, V %.4g)%s", label, s->k_bits, s->v_bits,
                loss, s->k_loss, s->v_loss,
                s == chosen    ? ""
                : loss >= than ? "  more"
                               : "  less");
}

static void print_allocation(kvq_cli *cli, const calibration *c, const kvq_allocation *a) {
    int64_t L = c->artifact->model.n_layers;
    print_split(cli, "chosen", &a->chosen, &a->chosen);
    for (int i = 0; i < a->n_neighbours; i++)
        print_split(cli, i == 0 ? "neighbours" : "", &a->neighbours[i], &a->chosen);
    char text[600] = "";
    for (int64_t l = 0; l < L; l++) {
        size_t used = strlen(text);
        (void)snprintf(text + used, sizeof text - used, " %g", (double)a->rates[l] / c->alloc.v_dim);
    }
    kvq_cli_say(cli, "V bits by layer:%s", text);
}

// While a sequence grows, its last tile is in f16: 63.5 tokens on average.
void print_allocated_size(kvq_cli *cli, const calibration *c) {
    const kvq_alloc_options *a = &c->alloc;
    kvq_cache_size           size = kvq_artifact_cache_size(c->artifact, a->n_tokens);
    double                   bits = kvq_cache_bits_per_element(size, a->n_sequences);
    kvq_cli_say(cli,
                "cache: %.3f bits per element for %lld sequences of %lld tokens, everything counted (%.3f for one); "
                "while they grow, their open tiles add %.3f on average",
                bits, (long long)a->n_sequences, (long long)a->n_tokens, kvq_cache_bits_per_element(size, 1),
                (KVQ_TILE_TOKENS - 1) / 2.0 * (16 - bits) / (double)a->n_tokens);
}

// ---------------------------------------------------------------- runs

static kvq_sensitivity_cost cost_of(const calibration *c) {
    return kvq_sensitivity_plan(c->model, c->seq_len, c->o->samples, c->kl_tokens);
}

double sensitivity_tera_flops(const calibration *c) { return c->kl_tokens > 0 ? cost_of(c).tera_flops : 0; }

int64_t sensitivity_bytes(const calibration *c) {
    if (c->kl_tokens == 0) return 0;
    kvq_sensitivity_cost cost = cost_of(c);
    return c->plan.weight_bytes + c->plan.program_bytes + cost.bytes;
}

static kvq_status fit_reference(kvq_cli *cli, const calibration *c, kvq_artifact **out, kvq_error *err) {
    kvq_alloc_options    reference = kvq_reference_allocation();
    kvq_measured_layers *layers = NULL;
    kvq_status           status = KVQ_OK;
    reference.outlier_fraction = c->measured.fractions[c->measured.n_fractions > 1 ? 1 : 0];
    KVQ_TRY(kvq_measured_layers_open(&cli->ctx, c->artifact, &c->measured, &c->sweep, &c->processes, &layers, err));
    KVQ_TRY(kvq_fit_allocated(&cli->ctx, layers, &reference, NULL, out, NULL, err));

done:
    kvq_measured_layers_close(&cli->ctx, &layers);
    return status;
}

// kl [1 + 2 L]: how many layers are done, and what was found. The work directory has them after every piece, so that a
// run that was ended goes on behind them.
static kvq_status measure_pieces(kvq_cli *cli, const calibration *c, const kvq_artifact *reference, double *kl,
                                 kvq_error *err) {
    static const char NAME[] = "sensitivity";
    int64_t           L = c->artifact->model.n_layers, bytes = (1 + 2 * L) * (int64_t)sizeof *kl;
    int64_t           step = cost_of(c).n_layers;
    bool              found = false;
    kvq_status        status = KVQ_OK;
    KVQ_TRY(kvq_sweep_recall(&cli->ctx, &c->sweep, &c->processes, NAME, kl, bytes, &found, err));
    for (int64_t first = (int64_t)kl[0]; first < L; first += step) {
        int64_t end = first + step < L ? first + step : L;
        KVQ_TRY(kvq_measure_sensitivity(&cli->ctx, c->be, c->model, reference, &c->windows, c->kl_tokens, first, end,
                                        kl + 1, err));
        kl[0] = (double)end;
        KVQ_TRY(kvq_sweep_note(&cli->ctx, &c->sweep, &c->processes, NAME, kl, bytes, err));
    }

done:
    return status;
}

kvq_status measure_sensitivity(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_artifact *reference = NULL;
    double       *kl = NULL;
    int64_t       L = c->artifact->model.n_layers;
    kvq_status    status = KVQ_OK;
    if (c->kl_tokens == 0) return KVQ_OK;
    KVQ_TRY(KVQ_NEW(&cli->ctx, 1 + 2 * L, "KL of single tensors", &kl, err));
    KVQ_TRY(fit_reference(cli, c, &reference, err));
    KVQ_TRY(measure_pieces(cli, c, reference, kl, err));
    for (int64_t l = 0; l < L; l++) {
        c->artifact->layers[l].k.kl = kl[1 + 2 * l];
        c->artifact->layers[l].v.kl = kl[2 + 2 * l];
    }

done:
    kvq_artifact_destroy(&cli->ctx, &reference);
    kvq_free(&cli->ctx, kl);
    return status;
}

static kvq_status fit(kvq_cli *cli, calibration *c, const kvq_measured_layers *layers, kvq_error *err) {
    kvq_artifact  *artifact = NULL;
    kvq_allocation chosen = {.widths = NULL};
    kvq_status     status = KVQ_OK;
    KVQ_TRY(kvq_fit_allocated(&cli->ctx, layers, &c->alloc, c->like, &artifact, &chosen, err));
    kvq_artifact_destroy(&cli->ctx, &c->artifact);
    c->artifact = artifact;
    kvq_cli_end_progress(cli);
    if (c->like == NULL) print_allocation(cli, c, &chosen);

done:
    kvq_allocation_free(&cli->ctx, &chosen);
    return status;
}

kvq_status run_allocated(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_measured_layers *layers = NULL;
    kvq_status           status = KVQ_OK;
    KVQ_TRY(kvq_measure(&cli->ctx, c->be, c->model, &c->windows, &c->measured, &c->sweep, &c->processes, &c->artifact,
                        err));
    KVQ_TRY(measure_sensitivity(cli, c, err));
    KVQ_TRY(kvq_measured_layers_open(&cli->ctx, c->artifact, &c->measured, &c->sweep, &c->processes, &layers, err));
    KVQ_TRY(fit(cli, c, layers, err));

done:
    kvq_measured_layers_close(&cli->ctx, &layers);
    return status;
}

kvq_status fit_allocated_from(kvq_cli *cli, calibration *c, kvq_error *err) {
    kvq_measured_layers *layers = NULL;
    kvq_status           status = KVQ_OK;
    KVQ_TRY(kvq_measured_layers_of_file(&cli->ctx, c->measurement, &layers, err));
    KVQ_TRY(fit(cli, c, layers, err));

done:
    kvq_measured_layers_close(&cli->ctx, &layers);
    return status;
}
