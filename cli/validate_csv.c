// SPDX-License-Identifier: Apache-2.0
//
// Errors of layers as comma-separated values, shares as fractions; what is not known is empty. All fields are numbers,
// so nothing needs quotes.
#include "validate_report.h"

static void add_value(FILE *out, double x) {
    char text[CLI_EXACT_NUMBER];
    kvq_cli_format_exact(x, text);
    (void)fprintf(out, ",%s", text);
}

static void add_tensor(FILE *out, const kvq_heldout_report *e, double code_use) {
    add_value(out, e->nmse);
    add_value(out, e->attention_error);
    add_value(out, e->outlier_share);
    add_value(out, e->clipped_share);
    add_value(out, code_use);
}

static void add_calibrated(FILE *out, const kvq_tensor_quant *t) {
    calibrated_tensor c = calibrated_of(t);
    add_value(out, c.nmse);
    add_value(out, c.outlier_share);
    add_value(out, c.clipped_share);
    add_value(out, c.code_use);
}

kvq_status render_csv(kvq_cli *cli, const validate_report *r, FILE *out, kvq_error *err) {
    const kvq_validation *v = &r->validation;
    (void)cli, (void)err;
    (void)fputs("layer,attention_error,attention_error_low,attention_error_high,"
                "k_nmse,k_attention_error,k_outlier_share,k_clipped_share,k_code_use,"
                "v_nmse,v_attention_error,v_outlier_share,v_clipped_share,v_code_use,"
                "k_calibrated_nmse,k_calibrated_outlier_share,k_calibrated_clipped_share,k_calibrated_code_use,"
                "v_calibrated_nmse,v_calibrated_outlier_share,v_calibrated_clipped_share,v_calibrated_code_use\n",
                out);
    for (int64_t l = 0; v->layers != NULL && l < v->n_layers; l++) {
        const kvq_layer_errors *e = &v->layers[l];
        (void)fprintf(out, "%lld", (long long)l);
        add_value(out, e->attention_error.value);
        add_value(out, e->attention_error.low);
        add_value(out, e->attention_error.high);
        add_tensor(out, &e->k, e->k_code_use);
        add_tensor(out, &e->v, e->v_code_use);
        add_calibrated(out, &r->artifact->layers[l].k);
        add_calibrated(out, &r->artifact->layers[l].v);
        (void)fputc('\n', out);
    }
    return KVQ_OK;
}
