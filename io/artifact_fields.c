// SPDX-License-Identifier: Apache-2.0
// See artifact_fields.h; docs/format.md describes the same fields for people.
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "artifact_fields.h"

// ---------------------------------------------------------------- the table

#define NUMBER_OF(group, name, kind, member, low, high, since, of)                                                     \
    FIELD_NUMBER(kvq_artifact, group, name, kind, member, low, high, since, of)
#define NUMBER(group, name, kind, member, low, high) NUMBER_OF(group, name, kind, member, low, high, 0, OF_ALL)
#define ADDED(group, name, kind, member, low, high)  NUMBER_OF(group, name, kind, member, low, high, 1, OF_ALL)
#define WORDS(group, name, kind, member)             FIELD_WORDS(kvq_artifact, group, name, kind, member, 0, OF_ALL)
#define NAMED(group, name, member, names, since)     FIELD_NAMED(kvq_artifact, group, name, member, names, since, OF_ALL)

const field ARTIFACT_FIELDS[] = {
    WORDS("/", "producer_version", FIELD_TEXT, provenance.producer_version),
    WORDS("/provenance", "matmul", FIELD_TEXT, provenance.matmul),
    WORDS("/provenance", "cpu", FIELD_TEXT, provenance.cpu),
    WORDS("/provenance", "options_json", FIELD_TEXT, provenance.options_json),
    WORDS("/model", "architecture", FIELD_TEXT, model.architecture),
    WORDS("/model", "name", FIELD_TEXT, model.name),
    WORDS("/model", "config_sha256", FIELD_HASH, model.config_sha256),
    WORDS("/model", "weights_sha256", FIELD_HASH, model.weights_sha256),
    NUMBER("/model", "n_layers", FIELD_I64, model.n_layers, 1, ARTIFACT_MAX_LAYERS),
    NUMBER("/model", "hidden_size", FIELD_I64, model.hidden_size, 0, FIELD_COUNT_MAX),
    NUMBER("/model", "n_heads", FIELD_I64, model.n_heads, 0, FIELD_COUNT_MAX),
    NUMBER("/model", "n_kv_heads", FIELD_I64, model.n_kv_heads, 1, KVQ_NO_CHANNEL - 1),
    NUMBER("/model", "head_dim", FIELD_I64, model.head_dim, 1, KVQ_NO_CHANNEL - 1),
    NUMBER("/model", "vocab_size", FIELD_I64, model.vocab_size, 0, FIELD_COUNT_MAX),
    NUMBER("/model", "rope_theta", FIELD_F64, model.rope_theta, 0, DBL_MAX),
    WORDS("/model", "rope_type", FIELD_TEXT, model.rope_type),
    WORDS("/model", "dtype", FIELD_TEXT, model.dtype),
    NUMBER("/model", "n_tensors", FIELD_I64, model.n_tensors, 0, FIELD_COUNT_MAX),
    WORDS("/tokenizer", "kind", FIELD_TEXT, tokenizer.kind),
    WORDS("/tokenizer", "sha256", FIELD_HASH, tokenizer.sha256),
    NUMBER("/tokenizer", "bos_added", FIELD_BOOL, tokenizer.bos_added, 0, 1),
    WORDS("/dataset", "source", FIELD_TEXT, dataset.source),
    WORDS("/dataset", "source_sha256", FIELD_HASH, dataset.source_sha256),
    WORDS("/dataset", "token_ids_sha256", FIELD_HASH, dataset.token_ids_sha256),
    NUMBER("/dataset", "n_available_tokens", FIELD_I64, dataset.n_available_tokens, 0, FIELD_COUNT_MAX),
    NUMBER("/dataset", "n_samples", FIELD_I64, dataset.n_samples, 0, FIELD_TOKENS_MAX),
    NUMBER("/dataset", "seq_len", FIELD_I64, dataset.seq_len, 0, FIELD_TOKENS_MAX),
    NUMBER("/dataset", "seed", FIELD_U64, dataset.seed, 0, 0),
    NUMBER("/dataset", "baseline_nll", FIELD_F64, baseline_nll, 0, DBL_MAX),
    WORDS(QUANTIZER_GROUP, "scheme", FIELD_TEXT, quantizer.scheme),
    NUMBER(QUANTIZER_GROUP, "outlier_fraction", FIELD_F64, quantizer.outlier_fraction, 0, 1),
    NUMBER(QUANTIZER_GROUP, "n_side_k", FIELD_INT, quantizer.n_side_k, 0, KVQ_BLOCK_MAX_SIDE),
    NUMBER_OF(QUANTIZER_GROUP, "n_side_v", FIELD_INT, quantizer.n_side_v, 0, KVQ_BLOCK_MAX_SIDE, 0, OF_NUQ),
    NUMBER(QUANTIZER_GROUP, "sink_tokens", FIELD_I64, quantizer.sink_tokens, 0, FIELD_TOKENS_MAX),
    NUMBER_OF(QUANTIZER_GROUP, "recent_tokens", FIELD_I64, quantizer.recent_tokens, 0, FIELD_TOKENS_MAX, 1, OF_NUQ),
    NAMED(QUANTIZER_GROUP, "weighting", quantizer.weighting, kvq_weighting_names, 0),
    NAMED(QUANTIZER_GROUP, "threshold_scope", quantizer.threshold_scope, kvq_scope_names, 1),
    ADDED(QUANTIZER_GROUP, "sinks_counted", FIELD_BOOL, quantizer.sinks_counted, 0, 1),
    NUMBER_OF(QUANTIZER_GROUP, "n_slots", FIELD_INT, quantizer.n_slots, 0, 65534, 2, OF_ALLOC),
    NUMBER_OF(QUANTIZER_GROUP, "budget_tokens", FIELD_I64, quantizer.budget_tokens, 0, FIELD_TOKENS_MAX, 2, OF_ALLOC),
    NUMBER_OF(QUANTIZER_GROUP, "budget_sequences", FIELD_I64, quantizer.budget_sequences, 0, FIELD_TOKENS_MAX, 2,
              OF_ALLOC),
    NUMBER_OF(QUANTIZER_GROUP, "target_bits", FIELD_F64, quantizer.target_bits, 0, TARGET_BITS_MAX, 2, OF_ALLOC),
    FIELD_WORDS(kvq_artifact, QUANTIZER_GROUP, "rotation_kind", FIELD_TEXT, quantizer.rotation_kind, 2, OF_ALLOC),
};
const size_t N_ARTIFACT_FIELDS = sizeof ARTIFACT_FIELDS / sizeof *ARTIFACT_FIELDS;

// ---------------------------------------------------------------- rules

static bool is_utf8(const char *text) {
    const utf8proc_uint8_t *at = (const utf8proc_uint8_t *)text;
    for (utf8proc_int32_t c = 1; *at != 0;) {
        utf8proc_ssize_t n = utf8proc_iterate(at, -1, &c);
        if (n <= 0) return false;
        at += n;
    }
    return true;
}

static kvq_status check_text(const char *path, const char *text, kvq_error *err) {
    if (strlen(text) > RECORD_MAX_TEXT) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: a text of %zu bytes; the format holds %d", path,
                        strlen(text), RECORD_MAX_TEXT);
    }
    if (!is_utf8(text)) {
        return kvq_fail(err, KVQ_ERR_INPUT, "rename the file or folder it comes from",
                        "%s: the text is not valid UTF-8", path);
    }
    return KVQ_OK;
}

static kvq_status check_hash(const char *path, const char *hex, kvq_error *err) {
    size_t n = strlen(hex);
    if ((n != 0 && n != KVQ_SHA256_HEX - 1) || strspn(hex, "0123456789abcdef") != n) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: '%.80s' is not a SHA-256 in lower-case hexadecimal", path, hex);
    }
    return KVQ_OK;
}

static kvq_status check_number(const field *f, const char *path, double value, kvq_error *err) {
    if (isnan(value) || isinf(value)) return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s is %g", path, value);
    if (value < f->low || value > f->high) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is %.17g, outside of %g .. %g", path, value, f->low, f->high);
    }
    return KVQ_OK;
}

static kvq_status find_choice(const field *f, const char *path, const char *text, int *out, kvq_error *err) {
    char   list[160] = "";
    size_t used = 0;
    for (int i = 0; f->names[i] != NULL; i++) {
        if (strcmp(text, f->names[i]) == 0) {
            *out = i;
            return KVQ_OK;
        }
        if (used < sizeof list)
            used += (size_t)snprintf(list + used, sizeof list - used, "%s'%s'", i > 0 ? ", " : "", f->names[i]);
    }
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s is '%.80s', none of %s", path, text, list);
}

static kvq_status name_choice(const field *f, const char *path, int value, const char **out, kvq_error *err) {
    int n = 0;
    while (f->names[n] != NULL) n++;
    if (value < 0 || value >= n)
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is %d, outside of 0 .. %d", path, value, n - 1);
    *out = f->names[value];
    return KVQ_OK;
}

static kvq_status check_value(const field *f, const char *path, const field_value *v, kvq_error *err) {
    if (f->kind == FIELD_HASH) return check_hash(path, v->text, err);
    if (f->kind == FIELD_TEXT) return check_text(path, v->text, err);
    if (v->type == RECORD_I64) return check_number(f, path, (double)v->number.i, err);
    if (v->type == RECORD_F64) return check_number(f, path, v->number.f, err);
    return KVQ_OK;
}

kvq_status artifact_check_row_width(const kvq_artifact *a, kvq_error *err) {
    if (artifact_row_width(a) < KVQ_NO_CHANNEL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                    "/model: %" PRId64 " KV heads of %" PRId64 " channels; the codec numbers channels with 16 bits",
                    a->model.n_kv_heads, a->model.head_dim);
}

// ---------------------------------------------------------------- members

record_type field_stored_as(const field *f) {
    static const record_type STORED_AS[] = {
        [FIELD_TEXT] = RECORD_TEXT, [FIELD_HASH] = RECORD_TEXT, [FIELD_I64] = RECORD_I64, [FIELD_INT] = RECORD_I64,
        [FIELD_BOOL] = RECORD_I64,  [FIELD_U64] = RECORD_U64,   [FIELD_F64] = RECORD_F64, [FIELD_CHOICE] = RECORD_TEXT,
    };
    return STORED_AS[f->kind];
}

// A choice is read and written as the int that gcc and clang take for it.
KVQ_STATIC_ASSERT(sizeof(kvq_axis) == sizeof(int) && sizeof(kvq_weighting) == sizeof(int), "enumerations are ints");

kvq_status field_get(const field *f, const char *path, const void *base, field_value *out, kvq_error *err) {
    const void *at = (const char *)base + f->offset;
    kvq_status  status = KVQ_OK;
    field_value v = {.type = field_stored_as(f)};
    int         choice = 0;
    switch (f->kind) {
    case FIELD_TEXT:
        v.text = *(char *const *)at;
        break;
    case FIELD_HASH:
        v.text = at;
        break;
    case FIELD_I64:
        v.number.i = *(const int64_t *)at;
        break;
    case FIELD_INT:
        v.number.i = *(const int *)at;
        break;
    case FIELD_BOOL:
        v.number.i = *(const bool *)at;
        break;
    case FIELD_U64:
        v.number.u = *(const uint64_t *)at;
        break;
    case FIELD_F64:
        v.number.f = *(const double *)at;
        break;
    case FIELD_CHOICE:
        memcpy(&choice, at, sizeof choice);
        status = name_choice(f, path, choice, &v.text, err);
        break;
    }
    if (status == KVQ_OK) status = check_value(f, path, &v, err);
    if (status == KVQ_OK) *out = v;
    return status;
}

kvq_status field_set(const kvq_context *ctx, const field *f, const char *path, void *base, const field_value *value,
                     kvq_error *err) {
    void      *at = (char *)base + f->offset;
    int        choice = 0;
    kvq_status status = check_value(f, path, value, err);
    if (status == KVQ_OK && f->kind == FIELD_CHOICE) status = find_choice(f, path, value->text, &choice, err);
    if (status != KVQ_OK) return status;
    switch (f->kind) {
    case FIELD_TEXT:
        return kvq_artifact_set_text(ctx, at, value->text, err);
    case FIELD_HASH:
        strcpy(at, value->text);
        break;
    case FIELD_I64:
        *(int64_t *)at = value->number.i;
        break;
    case FIELD_INT:
        *(int *)at = (int)value->number.i;
        break;
    case FIELD_BOOL:
        *(bool *)at = value->number.i != 0;
        break;
    case FIELD_U64:
        *(uint64_t *)at = value->number.u;
        break;
    case FIELD_F64:
        *(double *)at = value->number.f;
        break;
    case FIELD_CHOICE:
        memcpy(at, &choice, sizeof choice);
        break;
    }
    return KVQ_OK;
}
