// SPDX-License-Identifier: Apache-2.0
//
// Where an artifact comes from: the record that goes into it, and the fingerprint that decides whether an interrupted
// run may go on. Both list the same things; neither holds a path, a thread count, or anything else that cannot change
// the result.
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calibrate_report.h"

static void describe_text(kvq_json *json, const calibration *c) {
    kvq_json_text(json, json->root, "source", c->windows.source);
    if (c->tokenizer.n_texts > 0) {
        const kvq_cli_source *source = &c->o->source;
        cJSON                *windows = kvq_json_array(json, json->root, "text_windows");
        for (int i = 0; i < c->tokenizer.n_texts; i++)
            kvq_json_count(json, windows, NULL, c->tokenizer.text_windows[i]);
        kvq_json_text(json, json->root, "text_format", kvq_cli_text_format_names[source->format]);
        kvq_json_text(json, json->root, "text_field", source->field != NULL ? source->field : "text");
        kvq_json_text(json, json->root, "documents", kvq_cli_documents_names[source->documents]);
        kvq_json_text(json, json->root, "newlines", kvq_cli_newlines_names[source->newlines]);
    }
    kvq_json_count(json, json->root, "samples", c->windows.n_windows);
    kvq_json_count(json, json->root, "seq_len", c->windows.seq_len);
    kvq_json_seed(json, json->root, "seed", c->o->seed.value);
    kvq_json_text(json, json->root, "draw", calibrate_draw_names[c->python_draw]);
    kvq_json_count(json, json->root, "held_out", c->windows.n_heldout);
    kvq_json_text(json, json->root, "bos", kvq_cli_bos_names[c->o->source.bos]);
    kvq_json_text(json, json->root, "compute", kvq_compute_names[c->o->engine.compute]);
}

// Every option as it took effect. What a capture was made with is not known here.
static kvq_status describe_options(const calibration *c, char **out, kvq_error *err) {
    kvq_json json;
    setting  settings[MAX_SETTINGS];
    int      n = list_settings(c, settings);
    kvq_json_init(&json);
    if (c->o->from != NULL) {
        kvq_json_text(&json, json.root, "measurement", kvq_file_name(c->o->from));
        kvq_json_text(&json, json.root, "measurement_sha256", kvq_measurement_sha256(c->measurement));
        kvq_json_text(&json, json.root, "measured_with",
                      kvq_measurement_about(c->measurement)->provenance.options_json);
        if (c->o->held_out > 0) kvq_json_text(&json, json.root, "held_out_source", c->windows.source);
        kvq_json_count(&json, json.root, "held_out", c->windows.n_heldout);
    } else if (c->o->capture != NULL) {
        kvq_json_text(&json, json.root, "capture", kvq_file_name(c->o->capture));
    } else {
        describe_text(&json, c);
    }
    for (int i = 0; i < n; i++) {
        if (settings[i].text != NULL)
            kvq_json_text(&json, json.root, settings[i].name, settings[i].text);
        else
            kvq_json_number(&json, json.root, settings[i].name, settings[i].number);
    }
    kvq_json_text(&json, json.root, "compat", calibrate_compat_names[c->o->compat]);
    kvq_status status = kvq_json_line(&json, out, err);
    kvq_json_free(&json);
    return status;
}

kvq_status record_provenance(kvq_cli *cli, const calibration *c, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    kvq_artifact *a = c->artifact;
    char          cpu[256];
    char         *options_json = NULL;
    kvq_cli_describe_cpu(cpu, sizeof cpu);
    KVQ_TRY(describe_options(c, &options_json, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.producer_version, KVQ_VERSION, err));
    if (c->o->from == NULL) { // a measurement says which ones it was made with
        KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.matmul, c->be != NULL ? c->be->matmul : "none", err));
        KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.cpu, cpu, err));
    }
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->provenance.options_json, options_json, err));
done:
    free(options_json);
    return status;
}

kvq_status record_identity(kvq_cli *cli, const calibration *c, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    kvq_artifact *a = c->artifact;
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->model.name, c->identity.name, err));
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->model.dtype, c->identity.dtype, err));
    memcpy(a->model.config_sha256, c->identity.config_sha256, sizeof a->model.config_sha256);
    memcpy(a->model.weights_sha256, c->identity.weights_sha256, sizeof a->model.weights_sha256);
    a->model.n_tensors = c->identity.n_tensors;
    KVQ_TRY(kvq_artifact_set_text(&cli->ctx, &a->tokenizer.kind, c->tokenizer.kind, err));
    memcpy(a->tokenizer.sha256, c->tokenizer.sha256, sizeof a->tokenizer.sha256);
    a->dataset.seed = c->o->seed.value;
    KVQ_TRY(record_provenance(cli, c, err));
done:
    return status;
}

static void add(calibration *c, const char *name, const char *format, ...) KVQ_PRINTF(3, 4);
static void add(calibration *c, const char *name, const char *format, ...) {
    kvq_field *f = &c->fingerprint[c->n_fingerprint++];
    va_list    args;
    (void)snprintf(f->name, sizeof f->name, "%s", name);
    va_start(args, format);
    (void)vsnprintf(f->value, sizeof f->value, format, args);
    va_end(args);
}

void make_fingerprint(calibration *c) {
    char    cpu[256];
    setting settings[MAX_SETTINGS];
    int     n = list_settings(c, settings);
    kvq_cli_describe_cpu(cpu, sizeof cpu);
    c->n_fingerprint = 0;
    add(c, "kvq", "%s", KVQ_VERSION);
    add(c, "model", "%s", c->identity.name);
    add(c, "config_sha256", "%s", c->identity.config_sha256);
    add(c, "weights_sha256", "%s", c->identity.weights_sha256);
    add(c, "tokenizer_sha256", "%s", c->tokenizer.sha256);
    add(c, "text", "%s", c->windows.source);
    add(c, "token_ids_sha256", "%s", c->windows.ids_sha256);
    add(c, "samples", "%" PRId64, c->windows.n_windows);
    add(c, "seq_len", "%" PRId64, c->windows.seq_len);
    add(c, "seed", "%" PRIu64, c->o->seed.value);
    for (int i = 0; i < n; i++) {
        if (settings[i].text != NULL)
            add(c, settings[i].name, "%s", settings[i].text);
        else
            add(c, settings[i].name, "%.17g", settings[i].number);
    }
    add(c, "held_out", "%" PRId64, c->o->held_out);
    add(c, "draw", "%s", calibrate_draw_names[c->python_draw]);
    add(c, "matrix_products", "%s", c->be->matmul);
    add(c, "processor", "%.200s", cpu);
}
