// SPDX-License-Identifier: Apache-2.0
//
// What kvq-inspect shows of artifacts of scheme "alloc" alone: how bits are spent on channels and values.
#include <math.h>
#include <stdio.h>

#include "inspect.h"

#define N_WIDTHS (KVQ_MAX_KEY_WIDTH + 1)

static int64_t row_width(const kvq_artifact *a) { return a->model.n_kv_heads * a->model.head_dim; }

static void count_widths(const kvq_artifact *a, const kvq_tensor_quant *t, int64_t out[N_WIDTHS]) {
    for (int w = 0; w < N_WIDTHS; w++) out[w] = 0;
    for (int64_t c = 0; c < row_width(a); c++) out[t->widths[c]]++;
}

double inspect_mean_bits(const kvq_artifact *a, const kvq_tensor_quant *t) {
    int64_t counts[N_WIDTHS], sum = 0;
    if (t->widths == NULL) return (double)t->bits / t->dim;
    count_widths(a, t, counts);
    for (int w = 0; w < N_WIDTHS; w++) sum += w * counts[w];
    return (double)sum / (double)row_width(a);
}

int inspect_tables(const kvq_artifact *a, const kvq_tensor_quant *t) {
    if (t->widths == NULL) return t->n_groups;
    return t->table_kind == KVQ_TABLE_AFFINE ? N_WIDTHS : (int)row_width(a);
}

int64_t inspect_budget_sequences(const kvq_artifact *a) {
    return a->quantizer.budget_sequences > 0 ? a->quantizer.budget_sequences : 1;
}

int64_t inspect_budget_tokens(const kvq_artifact *a) {
    return a->quantizer.budget_tokens > 0 ? a->quantizer.budget_tokens : a->dataset.seq_len;
}

// ---------------------------------------------------------------- text

void inspect_print_alloc_quantizer(const kvq_artifact *a) {
    printf("quantizer  %s  outliers of K %g%% (%d per side and token, %d per tile of %d tokens)  weighting %s\n",
           a->quantizer.scheme, a->quantizer.outlier_fraction * 100, a->quantizer.n_side_k, a->quantizer.n_slots,
           KVQ_TILE_TOKENS, kvq_weighting_names[a->quantizer.weighting]);
    if (a->quantizer.target_bits > 0)
        printf("           target %g bits per element for %lld sequences of %lld tokens", a->quantizer.target_bits,
               (long long)a->quantizer.budget_sequences, (long long)a->quantizer.budget_tokens);
    else
        printf("           bits as given");
    printf("  rotation of values %s\n", a->quantizer.rotation_kind);
}

static void print_fit_and_kl(const kvq_tensor_quant *t) {
    int64_t n = t->fit.n_points + t->fit.n_outliers + t->fit.n_constant;
    printf("  %14.4e  %7.3f%%", t->fit.objective, 100 * inspect_share(t->fit.n_outliers, n));
    if (t->kl > 0)
        printf("  %11.4e\n", t->kl);
    else
        printf("  %11s\n", "-");
}

static void print_keys(const kvq_artifact *a, const kvq_tensor_quant *t) {
    int64_t counts[N_WIDTHS];
    count_widths(a, t, counts);
    for (int w = 0; w < N_WIDTHS; w++) printf("  %5lld", (long long)counts[w]);
    printf("  %-8s  %5s  %8s", kvq_table_kind_names[t->table_kind], "-", "-");
}

static void print_values(const kvq_tensor_quant *t) {
    for (int w = 0; w < N_WIDTHS; w++) printf("  %5s", "-");
    printf("  %-8s  %5s  %8d", t->dim == 2 ? "pairs" : "single", kvq_scale_format_names[t->scale_format],
           t->scale_exponent);
}

void inspect_print_alloc_head(void) {
    printf("bits per element of codes, channels of K by their bits, and the KL of the tensor alone at 2 (K) or 3 (V) "
           "bits\n"
           "layer  tensor   bits      0      1      2      3      4      5  tables    scale  exponent  weighted error"
           "  outliers   KL in nats\n");
}

void inspect_print_alloc_row(const kvq_artifact *a, int64_t layer, const kvq_tensor_quant *t) {
    bool is_key = t->widths != NULL;
    printf("%5lld  %c       %5.3f", (long long)layer, is_key ? 'K' : 'V', inspect_mean_bits(a, t));
    if (is_key)
        print_keys(a, t);
    else
        print_values(t);
    print_fit_and_kl(t);
}

static void print_levels(const float *levels, int n, int dim) {
    printf("  code          level%s\n", dim == 2 ? "  of the next channel" : "");
    for (int i = 0; i < n; i++) {
        printf("  %4d  %13.9g", i, (double)levels[i * dim]);
        if (dim == 2) printf("  %19.9g", (double)levels[2 * i + 1]);
        printf("\n");
    }
}

static void print_key_tables(const kvq_artifact *a, int64_t layer, const kvq_tensor_quant *t) {
    bool    is_affine = t->table_kind == KVQ_TABLE_AFFINE;
    int64_t at = 0;
    for (int i = 0; i < inspect_tables(a, t); i++) {
        int width = is_affine ? i : t->widths[i], D = (int)a->model.head_dim;
        printf("layer %lld  K  %s table of ", (long long)layer, kvq_table_kind_names[t->table_kind]);
        if (is_affine)
            printf("%d bits\n", width);
        else
            printf("head %d channel %d, %d bits\n", i / D, i % D, width);
        print_levels(t->key_levels + at, 1 << width, 1);
        at += (int64_t)1 << width;
    }
}

void inspect_print_alloc_tables(const kvq_artifact *a, int64_t layer, const kvq_tensor_quant *t) {
    if (t->widths != NULL) {
        print_key_tables(a, layer, t);
        return;
    }
    printf("layer %lld  V  %s, %d bits\n", (long long)layer, t->dim == 2 ? "pairs of channels" : "channels", t->bits);
    print_levels(t->codebook, t->n_levels, t->dim);
}

// ---------------------------------------------------------------- JSON

void inspect_add_alloc_quantizer(kvq_json *json, cJSON *quantizer, const kvq_artifact *a) {
    kvq_json_count(json, quantizer, "n_slots", a->quantizer.n_slots);
    kvq_json_count(json, quantizer, "budget_tokens", a->quantizer.budget_tokens);
    kvq_json_count(json, quantizer, "budget_sequences", a->quantizer.budget_sequences);
    kvq_json_number(json, quantizer, "target_bits",
                    a->quantizer.target_bits > 0 ? a->quantizer.target_bits : (double)NAN);
    kvq_json_text(json, quantizer, "rotation_kind", a->quantizer.rotation_kind);
}

static void add_keys(kvq_json *json, cJSON *tensor, const kvq_artifact *a, const kvq_tensor_quant *t) {
    int64_t counts[N_WIDTHS];
    cJSON  *histogram = kvq_json_array(json, tensor, "width_counts");
    count_widths(a, t, counts);
    for (int w = 0; w < N_WIDTHS; w++) kvq_json_count(json, histogram, NULL, counts[w]);
    cJSON *widths = kvq_json_array(json, tensor, "widths");
    for (int64_t c = 0; c < row_width(a); c++) kvq_json_count(json, widths, NULL, t->widths[c]);
    kvq_json_text(json, tensor, "table_kind", kvq_table_kind_names[t->table_kind]);
    kvq_json_floats(json, tensor, "key_levels", t->key_levels, t->n_key_levels);
    kvq_json_floats(json, tensor, "offset", t->offset, row_width(a));
    kvq_json_floats(json, tensor, "scale", t->scale, row_width(a));
}

static void add_values(kvq_json *json, cJSON *tensor, const kvq_tensor_quant *t) {
    kvq_json_count(json, tensor, "bits", t->bits); // of a column of `dim` channels
    kvq_json_count(json, tensor, "dim", t->dim);
    kvq_json_floats(json, tensor, "codebook", t->codebook, (int64_t)t->n_levels * t->dim);
    kvq_json_text(json, tensor, "scale_format", kvq_scale_format_names[t->scale_format]);
    kvq_json_count(json, tensor, "scale_exponent", t->scale_exponent);
}

void inspect_add_alloc_tensor(kvq_json *json, cJSON *tensor, const kvq_artifact *a, const kvq_tensor_quant *t) {
    kvq_json_number(json, tensor, "mean_bits", inspect_mean_bits(a, t));
    if (t->widths != NULL)
        add_keys(json, tensor, a, t);
    else
        add_values(json, tensor, t);
    kvq_json_number(json, tensor, "kl", t->kl > 0 ? t->kl : (double)NAN);
}
