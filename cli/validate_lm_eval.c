// SPDX-License-Identifier: Apache-2.0
//
// Results in the form of lm-evaluation-harness, whose viewers and tables then read them: per task "metric,filter" and
// "metric_stderr,filter", with "N/A" where there is no error. The text is the task; nothing is filtered ("none").
#include <ctype.h>
#include <math.h>
#include <string.h>

#include "validate_report.h"

#define TASK_VERSION 1 // of what a metric means; raised when old and new results cannot be compared

typedef struct metrics {
    kvq_json *json;
    cJSON    *results, *higher_is_better; // of the task
} metrics;

static void add_metric(void *user, const named_number *number) {
    const metrics *m = user;
    char           key[96];
    if (!isfinite(number->x.value)) return;
    (void)snprintf(key, sizeof key, "%s,none", number->name);
    kvq_json_number(m->json, m->results, key, number->x.value);
    (void)snprintf(key, sizeof key, "%s_stderr,none", number->name);
    if (isfinite(number->x.stderr_))
        kvq_json_number(m->json, m->results, key, number->x.stderr_);
    else
        kvq_json_text(m->json, m->results, key, "N/A");
    kvq_json_bool(m->json, m->higher_is_better, number->name, number->more_is_better);
}

// A name as tasks have them: "kvq_wiki_test_raw".
static void name_task(const validate_report *r, char *out, size_t n) {
    (void)snprintf(out, n, "kvq_%s", r->windows.source);
    for (char *c = out; *c != 0; c++) {
        if (!isalnum((unsigned char)*c)) *c = '_';
    }
}

static void add_samples(kvq_json *json, const validate_report *r, const char *task) {
    const kvq_validation *v = &r->validation;
    int64_t               in_text = r->windows.n_available / v->seq_len; // one more may not be full
    cJSON                *samples = kvq_json_object(json, kvq_json_object(json, json->root, "n-samples"), task);
    kvq_json_count(json, samples, "original", in_text > v->n_windows ? in_text : v->n_windows);
    kvq_json_count(json, samples, "effective", v->n_windows);
}

static void add_task(kvq_json *json, const validate_report *r, const char *task) {
    cJSON *config = kvq_json_object(json, kvq_json_object(json, json->root, "configs"), task);
    kvq_json_text(json, config, "task", task);
    kvq_json_text(json, config, "dataset_name", r->windows.source);
    kvq_json_text(json, config, "output_type", "loglikelihood_rolling");
    kvq_json_count(json, config, "num_fewshot", 0);
    cJSON *metadata = kvq_json_object(json, config, "metadata");
    kvq_json_count(json, metadata, "version", TASK_VERSION);
    kvq_json_text(json, metadata, "token_ids_sha256", r->windows.ids_sha256);
    kvq_json_text(json, metadata, "protocol", kvq_protocol_names[r->validation.options.protocol]);
}

static void add_config(kvq_json *json, const validate_report *r) {
    cJSON *config = kvq_json_object(json, json->root, "config");
    char   arguments[640];
    (void)snprintf(arguments, sizeof arguments, "pretrained=%s%s%s", r->identity.name,
                   r->artifact != NULL ? ",kv_cache=" : "", r->artifact != NULL ? r->artifact_name : "");
    kvq_json_text(json, config, "model", "kvq");
    kvq_json_text(json, config, "model_args", arguments);
    kvq_json_text(json, config, "model_dtype", r->identity.dtype);
    kvq_json_count(json, config, "batch_size", 1);
    kvq_json_text(json, config, "device", "cpu");
    kvq_json_null(json, config, "limit");
    kvq_json_null(json, config, "gen_kwargs");
}

kvq_status render_lm_eval(kvq_cli *cli, const validate_report *r, FILE *out, kvq_error *err) {
    kvq_json json;
    char     task[sizeof r->windows.source + 8];
    (void)cli;
    kvq_json_init(&json);
    name_task(r, task, sizeof task);
    metrics m = {.json = &json};
    m.results = kvq_json_object(&json, kvq_json_object(&json, json.root, "results"), task);
    kvq_json_text(&json, m.results, "alias", task);
    (void)kvq_json_array(&json, kvq_json_object(&json, json.root, "group_subtasks"), task);
    add_task(&json, r, task);
    kvq_json_count(&json, kvq_json_object(&json, json.root, "versions"), task, TASK_VERSION);
    kvq_json_count(&json, kvq_json_object(&json, json.root, "n-shot"), task, 0);
    m.higher_is_better = kvq_json_object(&json, kvq_json_object(&json, json.root, "higher_is_better"), task);
    visit_numbers(r, false, add_metric, &m);
    add_samples(&json, r, task);
    add_config(&json, r);
    kvq_json_null(&json, json.root, "git_hash");
    kvq_json_text(&json, json.root, "kvq_version", KVQ_VERSION);
    kvq_json_text(&json, json.root, "model_name", r->identity.name);
    kvq_json_count(&json, json.root, "max_length", r->validation.seq_len);
    kvq_status status = kvq_json_write(&json, out, err);
    kvq_json_free(&json);
    return status;
}
