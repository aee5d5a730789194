// SPDX-License-Identifier: Apache-2.0
//
// kvq-inspect on an artifact: where it comes from, how it codes, how large the errors of each tensor are, and its
// tables of levels. Reading verifies the content hash, so whatever is shown is intact.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "inspect.h"

// One tensor of one layer that is shown.
typedef struct tensor_row {
    int64_t                 layer;
    char                    letter;
    const kvq_layer_quant  *of;
    const kvq_tensor_quant *tensor;
} tensor_row;

// Row i of all that are asked for; false behind the last.
static bool find_row(const kvq_artifact *a, const inspect_options *o, int64_t i, tensor_row *out) {
    for (int64_t at = 0; at < 2 * a->model.n_layers; at++) {
        int64_t layer = at / 2;
        bool    is_k = at % 2 == 0;
        if (!inspect_wants_layer(o, layer) || !inspect_wants_tensor(o, is_k ? INSPECT_K : INSPECT_V) || i-- > 0)
            continue;
        const kvq_layer_quant *l = &a->layers[layer];
        *out = (tensor_row){layer, is_k ? 'K' : 'V', l, is_k ? &l->k : &l->v};
        return true;
    }
    return false;
}

static int64_t n_elements(const kvq_fit_report *fit) { return fit->n_points + fit->n_outliers + fit->n_constant; }

// ---------------------------------------------------------------- text

static void print_quantizer(const kvq_artifact *a) {
    printf("quantizer  %s  outliers %g%% (K %d, V %d per side and token)  weighting %s\n", a->quantizer.scheme,
           a->quantizer.outlier_fraction * 100, a->quantizer.n_side_k, a->quantizer.n_side_v,
           kvq_weighting_names[a->quantizer.weighting]);
}

static void print_header(const kvq_artifact *a, const char *path, const char *content_sha256) {
    const kvq_tensor_quant *k = &a->layers[0].k;
    printf("artifact   %s  content sha256 %s\n", kvq_file_name(path), content_sha256);
    inspect_print_model(a);
    if (kvq_artifact_is_allocated(a))
        inspect_print_alloc_quantizer(a);
    else
        print_quantizer(a);
    printf("           keys %s  ranges of K per %s", kvq_key_domain_names[k->domain], kvq_axis_names[k->axis]);
    if (k->axis == KVQ_AXIS_CHANNEL) {
        printf(" by thresholds of the %s%s", kvq_scope_names[a->quantizer.threshold_scope],
               a->quantizer.sinks_counted ? ", sink tokens included" : "");
    }
    printf("\n           in f16: sink tokens %lld", (long long)a->quantizer.sink_tokens);
    if (!kvq_artifact_is_allocated(a)) printf("  recent tokens %lld", (long long)a->quantizer.recent_tokens);
    printf("\n");
    inspect_print_run(a);
    int64_t        n_tokens = inspect_budget_tokens(a), n_sequences = inspect_budget_sequences(a);
    kvq_cache_size size = kvq_artifact_cache_size(a, n_tokens);
    char           sequences[48] = "";
    if (n_sequences > 1) (void)snprintf(sequences, sizeof sequences, " for %lld sequences", (long long)n_sequences);
    printf("cache      %.3f bits per element%s at %lld tokens, everything counted\n\n",
           kvq_cache_bits_per_element(size, n_sequences), sequences, (long long)n_tokens);
    kvq_cli_print_memory(a);
    printf("\n");
}

// Whether errors of decoded elements are known: not in files of format 1.0, nor with an integer zero point, whose
// levels differ from channel to channel or token to token.
static bool errors_known(const kvq_tensor_quant *t) { return t->fit.energy > 0 && t->datatype != KVQ_INT_CLAMPED; }

// NMSE and SQNR, or dashes where they are not known.
static void print_nmse(double nmse, bool known) {
    if (!known) {
        printf("  %9s  %7s", "-", "-");
        return;
    }
    printf("  %9.3e", nmse);
    if (nmse > 0)
        printf("  %7.2f", -10 * log10(nmse));
    else
        printf("  %7s", "inf");
}

static void print_fit(const kvq_artifact *a, const tensor_row *row, bool lloyd) {
    const kvq_tensor_quant *t = row->tensor;
    const kvq_fit_report   *fit = &t->fit;
    bool                    known = errors_known(t);
    char                    clipped[32] = "-", entropy[32] = "-", bound[32] = "-";
    if (fit->energy > 0)
        (void)snprintf(clipped, sizeof clipped, "%.3f%%", inspect_share(fit->n_clipped, n_elements(fit)) * 100);
    if (known) (void)snprintf(entropy, sizeof entropy, "%.3f", fit->entropy_bits);
    if (t->datatype == KVQ_NUQ) (void)snprintf(bound, sizeof bound, "%.1e", fit->binning_bound);
    printf("%5lld  %c       %4.3g  %-11s  %6d  %17.1f  %14.4e  %13s", (long long)row->layer, row->letter,
           inspect_mean_bits(a, t), kvq_datatype_names[t->datatype], inspect_tables(a, t), fit->effective_samples,
           fit->objective, bound);
    if (lloyd) printf("  %14.4e", fit->lloyd_objective);
    print_nmse(kvq_fit_nmse(fit), known);
    printf("  %7s  %7.3f%%  %12s\n", clipped, inspect_share(fit->n_outliers, n_elements(fit)) * 100, entropy);
}

static void print_allocation(const kvq_artifact *a, const inspect_options *o) {
    tensor_row row;
    inspect_print_alloc_head();
    for (int64_t i = 0; find_row(a, o, i, &row); i++) inspect_print_alloc_row(a, row.layer, row.tensor);
}

static void print_fits(const kvq_artifact *a, const inspect_options *o) {
    tensor_row row;
    bool       lloyd = false;
    if (kvq_artifact_is_allocated(a)) {
        print_allocation(a, o);
        return;
    }
    for (int64_t i = 0; find_row(a, o, i, &row); i++) lloyd = lloyd || row.tensor->fit.lloyd_objective > 0;
    printf("layer  tensor  bits  datatype     tables  effective samples  weighted error  binning bound");
    printf("%s       NMSE  SQNR dB  clipped  outliers  entropy bits\n", lloyd ? "   Lloyd reaches" : "");
    for (int64_t i = 0; find_row(a, o, i, &row); i++) print_fit(a, &row, lloyd);
}

static void print_heldout(const kvq_artifact *a, const inspect_options *o) {
    tensor_row row;
    bool       measured = false;
    for (int64_t i = 0; find_row(a, o, i, &row); i++) measured = measured || row.tensor->heldout.n_tokens > 0;
    if (!measured) return;
    printf("\nheld-out tokens, through the codec\n");
    printf("layer  tensor    tokens       NMSE  SQNR dB  clipped  outliers  attention error  of K and V together\n");
    for (int64_t i = 0; find_row(a, o, i, &row); i++) {
        const kvq_heldout_report *h = &row.tensor->heldout;
        if (h->n_tokens == 0) continue;
        printf("%5lld  %c       %8lld", (long long)row.layer, row.letter, (long long)h->n_tokens);
        print_nmse(h->nmse, true);
        printf("  %6.3f%%  %7.3f%%  %15.4e  %19.4e\n", h->clipped_share * 100, h->outlier_share * 100,
               h->attention_error, row.of->attention_error);
    }
}

static void print_codebooks(const kvq_artifact *a, const inspect_options *o) {
    tensor_row row;
    for (int64_t i = 0; find_row(a, o, i, &row); i++) {
        const kvq_tensor_quant *t = row.tensor;
        if (kvq_artifact_is_allocated(a)) inspect_print_alloc_tables(a, row.layer, t);
        for (int g = 0; g < t->n_groups && !kvq_artifact_is_allocated(a); g++) {
            const float *levels = t->codebook + (int64_t)g * t->n_levels;
            printf("layer %lld  %c  %s  table %d of %d\n", (long long)row.layer, row.letter,
                   kvq_datatype_names[t->datatype], g + 1, t->n_groups);
            printf("  code          level%s\n", t->decode_levels != NULL ? "     decodes to" : "");
            for (int c = 0; c < t->n_levels; c++) {
                printf("  %4d  %13.9g", c, (double)levels[c]);
                if (t->decode_levels != NULL) printf("  %13.9g", (double)t->decode_levels[g * t->n_levels + c]);
                printf("\n");
            }
        }
    }
}

// ---------------------------------------------------------------- JSON

static void add_quantizer(kvq_json *json, const kvq_artifact *a) {
    cJSON *quantizer = kvq_json_object(json, json->root, "quantizer");
    bool   is_allocated = kvq_artifact_is_allocated(a);
    kvq_json_text(json, quantizer, "scheme", a->quantizer.scheme);
    kvq_json_number(json, quantizer, "outlier_fraction", a->quantizer.outlier_fraction);
    kvq_json_count(json, quantizer, "n_side_k", a->quantizer.n_side_k);
    if (!is_allocated) kvq_json_count(json, quantizer, "n_side_v", a->quantizer.n_side_v);
    kvq_json_count(json, quantizer, "sink_tokens", a->quantizer.sink_tokens);
    if (!is_allocated) kvq_json_count(json, quantizer, "recent_tokens", a->quantizer.recent_tokens);
    kvq_json_text(json, quantizer, "weighting", kvq_weighting_names[a->quantizer.weighting]);
    kvq_json_text(json, quantizer, "threshold_scope", kvq_scope_names[a->quantizer.threshold_scope]);
    kvq_json_bool(json, quantizer, "sinks_counted", a->quantizer.sinks_counted);
    if (is_allocated) inspect_add_alloc_quantizer(json, quantizer, a);
}

// A number that is not known is null.
static void add_if(kvq_json *json, cJSON *parent, const char *key, double value, bool known) {
    kvq_json_number(json, parent, key, known ? value : (double)NAN);
}

static void add_fit(kvq_json *json, cJSON *tensor, const kvq_tensor_quant *t) {
    const kvq_fit_report *fit = &t->fit;
    bool                  known = errors_known(t);
    kvq_json_count(json, tensor, "points", fit->n_points);
    kvq_json_count(json, tensor, "outliers", fit->n_outliers);
    kvq_json_count(json, tensor, "constant", fit->n_constant);
    kvq_json_count(json, tensor, "clipped", fit->n_clipped);
    kvq_json_number(json, tensor, "outlier_share", inspect_share(fit->n_outliers, n_elements(fit)));
    kvq_json_number(json, tensor, "clipped_share", inspect_share(fit->n_clipped, n_elements(fit)));
    kvq_json_number(json, tensor, "weight_sum", fit->weight_sum);
    kvq_json_number(json, tensor, "effective_samples", fit->effective_samples);
    kvq_json_number(json, tensor, "objective", fit->objective);
    add_if(json, tensor, "binning_bound", fit->binning_bound, t->datatype == KVQ_NUQ);
    add_if(json, tensor, "lloyd_objective", fit->lloyd_objective, fit->lloyd_objective > 0);
    add_if(json, tensor, "normalised_mse", fit->normalised_mse, known);
    add_if(json, tensor, "mse", fit->mse, known);
    add_if(json, tensor, "energy", fit->energy, fit->energy > 0);
    add_if(json, tensor, "nmse", kvq_fit_nmse(fit), known);
    add_if(json, tensor, "sqnr_db", known ? kvq_fit_sqnr_db(fit) : 0, known);
    add_if(json, tensor, "entropy_bits", fit->entropy_bits, known);
}

static void add_heldout(kvq_json *json, cJSON *tensor, const kvq_heldout_report *h) {
    if (h->n_tokens == 0) return;
    cJSON *heldout = kvq_json_object(json, tensor, "heldout");
    kvq_json_count(json, heldout, "tokens", h->n_tokens);
    kvq_json_number(json, heldout, "nmse", h->nmse);
    kvq_json_number(json, heldout, "sqnr_db", h->nmse > 0 ? -10 * log10(h->nmse) : (double)INFINITY);
    kvq_json_number(json, heldout, "clipped_share", h->clipped_share);
    kvq_json_number(json, heldout, "outlier_share", h->outlier_share);
    kvq_json_number(json, heldout, "attention_error", h->attention_error);
}

static void add_tables(kvq_json *json, cJSON *tensor, const kvq_tensor_quant *t) {
    int64_t n = (int64_t)t->n_groups * t->n_levels;
    kvq_json_count(json, tensor, "groups", t->n_groups);
    kvq_json_floats(json, tensor, "codebook", t->codebook, n); // [groups, 2^bits] in a row
    kvq_json_floats(json, tensor, "decode_levels", t->decode_levels, n);
}

static void add_tensor(kvq_json *json, cJSON *layer, const kvq_artifact *a, const tensor_row *row) {
    const kvq_tensor_quant *t = row->tensor;
    int64_t                 d = a->model.n_kv_heads * a->model.head_dim;
    cJSON                  *tensor = kvq_json_object(json, layer, row->letter == 'K' ? "k" : "v");
    if (!kvq_artifact_is_allocated(a)) {
        kvq_json_count(json, tensor, "bits", t->bits);
        kvq_json_text(json, tensor, "datatype", kvq_datatype_names[t->datatype]);
    }
    kvq_json_text(json, tensor, "axis", kvq_axis_names[t->axis]);
    kvq_json_text(json, tensor, "domain", row->letter == 'K' ? kvq_key_domain_names[t->domain] : "projection");
    if (kvq_artifact_is_allocated(a))
        inspect_add_alloc_tensor(json, tensor, a, t);
    else
        add_tables(json, tensor, t);
    kvq_json_floats(json, tensor, "lower", t->lower, d);
    kvq_json_floats(json, tensor, "upper", t->upper, d);
    add_fit(json, tensor, t);
    add_heldout(json, tensor, &t->heldout);
}

static void add_layers(kvq_json *json, const kvq_artifact *a, const inspect_options *o) {
    cJSON     *layers = kvq_json_array(json, json->root, "layers"), *layer = NULL;
    tensor_row row, before = {.layer = -1};
    for (int64_t i = 0; find_row(a, o, i, &row); i++, before = row) {
        if (row.layer != before.layer) {
            layer = kvq_json_object(json, layers, NULL);
            kvq_json_count(json, layer, "layer", row.layer);
            bool measured = row.of->k.heldout.n_tokens > 0 || row.of->v.heldout.n_tokens > 0;
            add_if(json, layer, "attention_error", row.of->attention_error, measured);
        }
        add_tensor(json, layer, a, &row);
    }
}

static kvq_status print_json(const kvq_artifact *a, const inspect_options *o, const char *content_sha256,
                             kvq_error *err) {
    kvq_json json;
    kvq_json_init(&json);
    kvq_json_text(&json, json.root, "schema", "kvq.inspect/1");
    kvq_json_text(&json, json.root, "file", kvq_file_name(o->file));
    kvq_json_text(&json, json.root, "content_sha256", content_sha256);
    inspect_add_model(&json, a);
    inspect_add_dataset(&json, a);
    add_quantizer(&json, a);
    inspect_add_run(&json, a);
    kvq_json_number(
        &json, json.root, "bits_per_element",
        kvq_cache_bits_per_element(kvq_artifact_cache_size(a, inspect_budget_tokens(a)), inspect_budget_sequences(a)));
    kvq_cli_add_memory(&json, a);
    add_layers(&json, a, o);
    kvq_status status = kvq_json_print(&json, err);
    kvq_json_free(&json);
    return status;
}

// ---------------------------------------------------------------- the report

kvq_status inspect_artifact(kvq_cli *cli, const inspect_options *o, kvq_error *err) {
    kvq_artifact *a = NULL;
    char          content_sha256[KVQ_SHA256_HEX];
    kvq_status    status = KVQ_OK;
    if (o->spectrum || o->fraction >= 0 || o->tensor == INSPECT_Q) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s is an artifact; %s is about a measurement (.kvqm.h5)", o->file,
                        o->spectrum        ? "--spectrum"
                        : o->fraction >= 0 ? "--fraction"
                                           : "--tensor q");
    }
    KVQ_TRY(kvq_artifact_read(&cli->ctx, o->file, &a, content_sha256, err));
    KVQ_TRY(inspect_check_layer(o, a->model.n_layers, err));
    if (o->check) {
        printf("ok  content sha256 %s\n", content_sha256);
    } else if (o->json) {
        KVQ_TRY(print_json(a, o, content_sha256, err));
    } else if (o->codebook) {
        print_codebooks(a, o);
    } else {
        print_header(a, o->file, content_sha256);
        print_fits(a, o);
        print_heldout(a, o);
    }
    kvq_cli_next(cli, "kvq-validate", "--model", "MODEL", "--artifact", o->file, "--text", "HELD_OUT.txt", NULL);
done:
    kvq_artifact_destroy(&cli->ctx, &a);
    return status;
}
