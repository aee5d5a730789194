// SPDX-License-Identifier: Apache-2.0
//
// An earlier report of kvq-validate, as far as a new one is compared with it. Windows are compared in pairs, which
// needs the same tokens in the same windows, seen in the same way: that is what the terms say.
#include <stdio.h>
#include <string.h>

#include "json_read.h"

#define SCHEMA      "kvq.validate/1"
#define SCHEMA_NAME "kvq.validate/"
#define MAX_COUNT   ((int64_t)1 << 24) // of windows, and of tokens in one: no run is longer

static const char NO_REPORT[] = "pass what kvq-validate --json printed when it measured an artifact";

static kvq_status check_schema(const cJSON *root, const char *path, kvq_error *err) {
    const char *schema = NULL;
    if (!cJSON_IsObject(root)) return kvq_fail(err, KVQ_ERR_INPUT, NO_REPORT, "%s: holds no JSON object", path);
    kvq_status status = json_get_string(root, "schema", path, true, &schema, err);
    if (status != KVQ_OK || (schema != NULL && strcmp(schema, SCHEMA) == 0)) return status;
    if (schema != NULL && strncmp(schema, SCHEMA_NAME, strlen(SCHEMA_NAME)) == 0) {
        return kvq_fail(err, KVQ_ERR_VERSION, NULL, "%s: the report has the schema '%.32s', this version reads '%s'",
                        path, schema, SCHEMA);
    }
    return kvq_fail(err, KVQ_ERR_INPUT, NO_REPORT, "%s: is no report of kvq-validate (schema '%.32s')", path,
                    schema != NULL ? schema : "none");
}

static kvq_status take_text(const cJSON *object, const char *key, const char *path, char *out, size_t size,
                            kvq_error *err) {
    const char *text = NULL;
    kvq_status  status = json_get_string(object, key, path, false, &text, err);
    if (status != KVQ_OK) return status;
    if (strlen(text) >= size)
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: field '%s' is longer than %zu bytes", path, key, size - 1);
    (void)snprintf(out, size, "%s", text);
    return KVQ_OK;
}

static kvq_status take_terms(const cJSON *root, const char *path, kvq_report_terms *out, kvq_error *err) {
    const cJSON *text = NULL;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(json_get_object(root, "text", path, false, &text, err));
    KVQ_TRY(take_text(text, "token_ids_sha256", path, out->ids_sha256, sizeof out->ids_sha256, err));
    KVQ_TRY(json_get_int(root, "seq_len", path, false, 1, MAX_COUNT, &out->seq_len, err));
    KVQ_TRY(json_get_int(root, "windows", path, false, 1, MAX_COUNT, &out->n_windows, err));
    KVQ_TRY(take_text(root, "protocol", path, out->protocol, sizeof out->protocol, err));
    KVQ_TRY(json_get_int(root, "prompt", path, false, 0, MAX_COUNT, &out->n_prompt, err));

done:
    return status;
}

static kvq_status take_report(const kvq_context *ctx, const cJSON *root, const char *path, kvq_report_baseline *out,
                              kvq_error *err) {
    const cJSON *quantized = NULL, *kld = NULL;
    kvq_status   status = KVQ_OK;
    KVQ_TRY(check_schema(root, path, err));
    KVQ_TRY(take_text(root, "kvq_version", path, out->kvq_version, sizeof out->kvq_version, err));
    KVQ_TRY(json_get_object(root, "quantized", path, true, &quantized, err));
    if (quantized == NULL) {
        KVQ_TRY(
            kvq_fail(err, KVQ_ERR_INPUT, NO_REPORT, "%s: the report measured no artifact, only the model alone", path));
    }
    KVQ_TRY(json_get_object(root, "kld", path, false, &kld, err));
    KVQ_TRY(take_terms(root, path, &out->terms, err));
    int64_t n = out->terms.n_windows;
    KVQ_TRY(KVQ_NEW(ctx, n, "windows of the earlier report", &out->window_nll, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "windows of the earlier report", &out->window_kld, err));
    KVQ_TRY(json_get_doubles(quantized, "window_nll", path, n, out->window_nll, err));
    KVQ_TRY(json_get_doubles(kld, "windows", path, n, out->window_kld, err));

done:
    return status;
}

kvq_status kvq_report_baseline_read(const kvq_context *ctx, const char *path, kvq_report_baseline *out,
                                    kvq_error *err) {
    kvq_report_baseline baseline = {.window_nll = NULL};
    cJSON              *root = NULL;
    kvq_status          status = json_parse_file(path, &root, err);
    if (status == KVQ_OK) status = take_report(ctx, root, path, &baseline, err);
    cJSON_Delete(root);
    if (status == KVQ_OK)
        *out = baseline;
    else
        kvq_report_baseline_free(ctx, &baseline);
    return status;
}

void kvq_report_baseline_free(const kvq_context *ctx, kvq_report_baseline *baseline) {
    kvq_free(ctx, baseline->window_nll);
    kvq_free(ctx, baseline->window_kld);
    baseline->window_nll = baseline->window_kld = NULL;
}

// ---------------------------------------------------------------- comparing

static const char OTHER_TERMS[] = "measure with the settings and the text of the earlier report, or make that again";

static kvq_status compare_text(const char *path, const char *what, const char *then, const char *now, kvq_error *err) {
    if (strcmp(then, now) == 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_MISMATCH, OTHER_TERMS, "%s: %s: the report has '%.64s', this run '%.64s'", path, what,
                    then, now);
}

static kvq_status compare_count(const char *path, const char *what, int64_t then, int64_t now, kvq_error *err) {
    if (then == now) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_MISMATCH, OTHER_TERMS, "%s: %s: the report has %lld, this run %lld", path, what,
                    (long long)then, (long long)now);
}

// Lengths first: when they differ the ids do as well, and the length is what a user can mend.
kvq_status kvq_report_baseline_matches(const kvq_report_baseline *baseline, const char *path,
                                       const kvq_report_terms *now, kvq_error *err) {
    const kvq_report_terms *then = &baseline->terms;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(compare_count(path, "seq_len", then->seq_len, now->seq_len, err));
    KVQ_TRY(compare_count(path, "windows", then->n_windows, now->n_windows, err));
    KVQ_TRY(compare_text(path, "token ids", then->ids_sha256, now->ids_sha256, err));
    KVQ_TRY(compare_text(path, "protocol", then->protocol, now->protocol, err));
    KVQ_TRY(compare_count(path, "prompt", then->n_prompt, now->n_prompt, err));

done:
    return status;
}
