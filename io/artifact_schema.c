// SPDX-License-Identifier: Apache-2.0
//
// The layout of an artifact as tables, and the rules that its content obeys. A new field is one line here and one in
// docs/format.md; writing, reading, hashing and the exports follow. See artifact_schema.h.
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "artifact_schema.h"

// ---------------------------------------------------------------- the tables

typedef enum field_kind {
    FIELD_TEXT,      // char *
    FIELD_HASH,      // char[KVQ_SHA256_HEX]: "" or 64 digits
    FIELD_I64,       // int64_t
    FIELD_INT,       // int, stored as i64
    FIELD_BOOL,      // bool, stored as i64 0 or 1
    FIELD_U64,       // uint64_t
    FIELD_F64,       // double
    FIELD_AXIS,      // kvq_axis, stored by name
    FIELD_WEIGHTING, // kvq_weighting, stored by name
} field_kind;

typedef struct field {
    const char *group; // from the root, or below the group of a tensor
    const char *name;
    field_kind  kind;
    size_t      offset;    // in kvq_artifact, or in kvq_tensor_quant
    double      low, high; // legal range of i64, int, bool and f64
} field;

#define TOKENS_MAX 0x1p31 // of one window and of one sequence; products with sizes of a model stay in 63 bits
#define COUNT_MAX  0x1p53 // counts beyond this are damage; and every JSON reader holds integers up to here
#define ARTIFACT(group, name, kind, member, low, high)                                                                 \
    { group, name, kind, offsetof(kvq_artifact, member), low, high }
#define TENSOR(group, name, kind, member, low, high)                                                                   \
    { group, name, kind, offsetof(kvq_tensor_quant, member), low, high }

static const field ARTIFACT_FIELDS[] = {
    ARTIFACT("/", "producer_version", FIELD_TEXT, provenance.producer_version, 0, 0),
    ARTIFACT("/provenance", "matmul", FIELD_TEXT, provenance.matmul, 0, 0),
    ARTIFACT("/provenance", "cpu", FIELD_TEXT, provenance.cpu, 0, 0),
    ARTIFACT("/provenance", "options_json", FIELD_TEXT, provenance.options_json, 0, 0),
    ARTIFACT("/model", "architecture", FIELD_TEXT, model.architecture, 0, 0),
    ARTIFACT("/model", "name", FIELD_TEXT, model.name, 0, 0),
    ARTIFACT("/model", "config_sha256", FIELD_HASH, model.config_sha256, 0, 0),
    ARTIFACT("/model", "weights_sha256", FIELD_HASH, model.weights_sha256, 0, 0),
    ARTIFACT("/model", "n_layers", FIELD_I64, model.n_layers, 1, ARTIFACT_MAX_LAYERS),
    ARTIFACT("/model", "hidden_size", FIELD_I64, model.hidden_size, 0, COUNT_MAX),
    ARTIFACT("/model", "n_heads", FIELD_I64, model.n_heads, 0, COUNT_MAX),
    ARTIFACT("/model", "n_kv_heads", FIELD_I64, model.n_kv_heads, 1, KVQ_NO_CHANNEL - 1),
    ARTIFACT("/model", "head_dim", FIELD_I64, model.head_dim, 1, KVQ_NO_CHANNEL - 1),
    ARTIFACT("/model", "vocab_size", FIELD_I64, model.vocab_size, 0, COUNT_MAX),
    ARTIFACT("/model", "rope_theta", FIELD_F64, model.rope_theta, 0, DBL_MAX),
    ARTIFACT("/model", "rope_type", FIELD_TEXT, model.rope_type, 0, 0),
    ARTIFACT("/model", "dtype", FIELD_TEXT, model.dtype, 0, 0),
    ARTIFACT("/model", "n_tensors", FIELD_I64, model.n_tensors, 0, COUNT_MAX),
    ARTIFACT("/tokenizer", "kind", FIELD_TEXT, tokenizer.kind, 0, 0),
    ARTIFACT("/tokenizer", "sha256", FIELD_HASH, tokenizer.sha256, 0, 0),
    ARTIFACT("/tokenizer", "bos_added", FIELD_BOOL, tokenizer.bos_added, 0, 1),
    ARTIFACT("/dataset", "source", FIELD_TEXT, dataset.source, 0, 0),
    ARTIFACT("/dataset", "source_sha256", FIELD_HASH, dataset.source_sha256, 0, 0),
    ARTIFACT("/dataset", "token_ids_sha256", FIELD_HASH, dataset.token_ids_sha256, 0, 0),
    ARTIFACT("/dataset", "n_available_tokens", FIELD_I64, dataset.n_available_tokens, 0, COUNT_MAX),
    ARTIFACT("/dataset", "n_samples", FIELD_I64, dataset.n_samples, 0, TOKENS_MAX),
    ARTIFACT("/dataset", "seq_len", FIELD_I64, dataset.seq_len, 0, TOKENS_MAX),
    ARTIFACT("/dataset", "seed", FIELD_U64, dataset.seed, 0, 0),
    ARTIFACT("/dataset", "baseline_nll", FIELD_F64, baseline_nll, 0, DBL_MAX),
    ARTIFACT("/quantizer", "scheme", FIELD_TEXT, quantizer.scheme, 0, 0),
    ARTIFACT("/quantizer", "outlier_fraction", FIELD_F64, quantizer.outlier_fraction, 0, 1),
    ARTIFACT("/quantizer", "n_side_k", FIELD_INT, quantizer.n_side_k, 0, KVQ_BLOCK_MAX_SIDE),
    ARTIFACT("/quantizer", "n_side_v", FIELD_INT, quantizer.n_side_v, 0, KVQ_BLOCK_MAX_SIDE),
    ARTIFACT("/quantizer", "sink_tokens", FIELD_I64, quantizer.sink_tokens, 0, TOKENS_MAX),
    ARTIFACT("/quantizer", "weighting", FIELD_WEIGHTING, quantizer.weighting, 0, 0),
};

static const field TENSOR_FIELDS[] = {
    TENSOR("", "bits", FIELD_INT, bits, 1, KVQ_MAX_BITS),
    TENSOR("", "axis", FIELD_AXIS, axis, 0, 0),
    TENSOR("/fit", "n_points", FIELD_I64, fit.n_points, 0, COUNT_MAX),
    TENSOR("/fit", "n_outliers", FIELD_I64, fit.n_outliers, 0, COUNT_MAX),
    TENSOR("/fit", "n_constant", FIELD_I64, fit.n_constant, 0, COUNT_MAX),
    TENSOR("/fit", "weight_sum", FIELD_F64, fit.weight_sum, 0, DBL_MAX),
    TENSOR("/fit", "effective_samples", FIELD_F64, fit.effective_samples, 0, DBL_MAX),
    TENSOR("/fit", "objective", FIELD_F64, fit.objective, 0, DBL_MAX),
    TENSOR("/fit", "binning_bound", FIELD_F64, fit.binning_bound, 0, DBL_MAX),
};

// Datasets of a tensor, f32: [1, 2^bits], or [Hkv, D] where the axis is the channel.
typedef struct array_field {
    const char *name;
    size_t      offset; // of the pointer in kvq_tensor_quant
    bool        per_channel;
} array_field;

static const array_field ARRAY_FIELDS[] = {
    {"codebook", offsetof(kvq_tensor_quant, codebook), false},
    {"threshold_lower", offsetof(kvq_tensor_quant, lower), true},
    {"threshold_upper", offsetof(kvq_tensor_quant, upper), true},
};

// Texts that follow from the format and the place; readers other than kvq need them.
typedef struct label {
    const char *path, *text;
} label;

static const label FILE_LABELS[] = {
    {"/@kvq_format", ARTIFACT_FORMAT}, {"/@kvq_format_version", "1.0"}, {"/@kvq_min_reader", "1.0"},
    {"/@Conventions", "KVQ-1.0"},      {"/@producer", "kvq"},
};

#define N_OF(table) (sizeof(table) / sizeof *(table))

static const char *const AXIS_NAMES[] = {[KVQ_AXIS_CHANNEL] = "channel", [KVQ_AXIS_TOKEN] = "token"};

// The two tensors of a layer, K first.
static const struct tensor_kind {
    char        letter;
    const char *domain; // which point of the model the numbers belong to
    size_t      offset; // in kvq_layer_quant
    kvq_axis    axis;
} TENSOR_KINDS[] = {
    {'k', "pre_rope", offsetof(kvq_layer_quant, k), KVQ_AXIS_CHANNEL},
    {'v', "projection", offsetof(kvq_layer_quant, v), KVQ_AXIS_TOKEN},
};

// One tensor of one layer, with the names it has outside.
typedef struct place {
    kvq_tensor_quant         *tensor;
    const struct tensor_kind *kind;
    char                      group[64], hf_name[64];
} place;

static place place_of(const kvq_artifact *artifact, int64_t layer, size_t which) {
    place p = {.kind = &TENSOR_KINDS[which]};
    p.tensor = (kvq_tensor_quant *)(void *)((char *)&artifact->layers[layer] + p.kind->offset);
    (void)snprintf(p.group, sizeof p.group, "/layers/%03" PRId64 "/%c", layer, p.kind->letter);
    (void)snprintf(p.hf_name, sizeof p.hf_name, "model.layers.%" PRId64 ".self_attn.%c_proj", layer, p.kind->letter);
    return p;
}

static void join(char out[RECORD_MAX_PATH], const char *group, const char *below, char separator, const char *name) {
    (void)snprintf(out, RECORD_MAX_PATH, "%s%s%c%s", group, below, separator, name);
}

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

static kvq_status check_finite(const place *p, const char *name, const float *x, int64_t n, kvq_error *err) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s/%s: element %" PRId64 " is %g", p->group, name, i,
                            (double)x[i]);
        }
    }
    return KVQ_OK;
}

static kvq_status check_tensor(const place *p, int64_t d, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    if (t->n_groups != 1 || t->dim != 1 || t->n_levels != 1 << t->bits) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "%s/codebook: %d groups of %d levels of %d dimensions; format 1.0 holds one group of 2^bits = "
                        "%d levels of one",
                        p->group, t->n_groups, t->n_levels, t->dim, 1 << t->bits);
    }
    if (t->axis != p->kind->axis) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s@axis is '%s'; format 1.0 knows '%s' here", p->group,
                        AXIS_NAMES[t->axis], AXIS_NAMES[p->kind->axis]);
    }
    bool per_channel = t->axis == KVQ_AXIS_CHANNEL;
    if (t->codebook == NULL || (t->lower != NULL) != per_channel || (t->upper != NULL) != per_channel) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the codebook is missing, or thresholds do not fit the axis '%s'",
                        p->group, AXIS_NAMES[t->axis]);
    }
    kvq_status status = check_finite(p, "codebook", t->codebook, t->n_levels, err);
    if (status == KVQ_OK && per_channel) status = check_finite(p, "threshold_lower", t->lower, d, err);
    if (status == KVQ_OK && per_channel) status = check_finite(p, "threshold_upper", t->upper, d, err);
    if (status != KVQ_OK) return status;
    for (int i = 1; i < t->n_levels; i++) {
        if (t->codebook[i] < t->codebook[i - 1]) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/codebook: level %d, %.9g, is below level %d, %.9g", p->group,
                            i, (double)t->codebook[i], i - 1, (double)t->codebook[i - 1]);
        }
    }
    for (int64_t c = 0; per_channel && c < d; c++) {
        float lower = t->lower[c], upper = t->upper[c];
        if (lower > upper || !isfinite(upper - lower) || !isfinite(upper + lower)) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                            "%s: the thresholds of channel %" PRId64
                            ", %.9g and %.9g, do not ascend or have no f32 middle and width",
                            p->group, c, (double)lower, (double)upper);
        }
    }
    return KVQ_OK;
}

// d, the width of a row; both factors were checked to be small.
static int64_t row_width(const kvq_artifact *a) { return a->model.n_kv_heads * a->model.head_dim; }

// What concerns several fields together, before any array is looked at.
static kvq_status check_settings(const kvq_artifact *a, kvq_error *err) {
    int64_t d = row_width(a);
    int     n_side = a->quantizer.n_side_k > a->quantizer.n_side_v ? a->quantizer.n_side_k : a->quantizer.n_side_v;
    if (strcmp(a->quantizer.scheme, "nuq") != 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "/quantizer@scheme is '%.80s'; format 1.0 knows 'nuq'",
                        a->quantizer.scheme);
    }
    if (d >= KVQ_NO_CHANNEL) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "/model: %" PRId64 " KV heads of %" PRId64 " channels; the codec numbers channels with 16 bits",
                        a->model.n_kv_heads, a->model.head_dim);
    }
    if (2 * (int64_t)n_side >= d) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "/quantizer: %d outliers per side leave nothing of %" PRId64 " channels", n_side, d);
    }
    return KVQ_OK;
}

static kvq_status check_tensors(const kvq_artifact *a, kvq_error *err) {
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        for (size_t which = 0; which < N_OF(TENSOR_KINDS); which++) {
            place      p = place_of(a, layer, which);
            kvq_status status = check_tensor(&p, row_width(a), err);
            if (status != KVQ_OK) return status;
        }
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- from the artifact

typedef union value {
    int64_t  i;
    uint64_t u;
    double   f;
} value;

static const record_type STORED_AS[] = {
    [FIELD_TEXT] = RECORD_TEXT, [FIELD_HASH] = RECORD_TEXT, [FIELD_I64] = RECORD_I64,
    [FIELD_INT] = RECORD_I64,   [FIELD_BOOL] = RECORD_I64,  [FIELD_U64] = RECORD_U64,
    [FIELD_F64] = RECORD_F64,   [FIELD_AXIS] = RECORD_TEXT, [FIELD_WEIGHTING] = RECORD_TEXT,
};

static kvq_status put_field(const kvq_context *ctx, record_list *list, const char *group, const field *f,
                            const void *base, kvq_error *err) {
    char        path[RECORD_MAX_PATH];
    const void *at = (const char *)base + f->offset;
    const char *text = NULL;
    value       v = {0};
    kvq_status  status = KVQ_OK;
    join(path, group, f->group, '@', f->name);
    switch (f->kind) {
    case FIELD_TEXT:
        text = *(char *const *)at;
        break;
    case FIELD_HASH:
        text = at;
        break;
    case FIELD_I64:
        v.i = *(const int64_t *)at;
        break;
    case FIELD_INT:
        v.i = *(const int *)at;
        break;
    case FIELD_BOOL:
        v.i = *(const bool *)at;
        break;
    case FIELD_U64:
        v.u = *(const uint64_t *)at;
        break;
    case FIELD_F64:
        v.f = *(const double *)at;
        break;
    case FIELD_AXIS:
        text = AXIS_NAMES[*(const kvq_axis *)at];
        break;
    case FIELD_WEIGHTING:
        text = kvq_weighting_name(*(const kvq_weighting *)at);
        break;
    }
    if (f->kind == FIELD_HASH) status = check_hash(path, text, err);
    if (f->kind == FIELD_TEXT) status = check_text(path, text, err);
    if (STORED_AS[f->kind] == RECORD_I64) status = check_number(f, path, (double)v.i, err);
    if (f->kind == FIELD_F64) status = check_number(f, path, v.f, err);
    if (status != KVQ_OK) return status;
    return record_add(ctx, list, path, STORED_AS[f->kind], 0, NULL, text != NULL ? (const void *)text : &v, err);
}

static kvq_status put_text(const kvq_context *ctx, record_list *list, const char *group, const char *name,
                           const char *text, kvq_error *err) {
    char path[RECORD_MAX_PATH];
    join(path, group, "", '@', name);
    return record_add(ctx, list, path, RECORD_TEXT, 0, NULL, text, err);
}

static void shape_of(const kvq_artifact *a, const kvq_tensor_quant *t, const array_field *f, int64_t shape[2]) {
    shape[0] = f->per_channel ? a->model.n_kv_heads : t->n_groups;
    shape[1] = f->per_channel ? a->model.head_dim : t->n_levels;
}

static kvq_status put_tensor(const kvq_context *ctx, record_list *list, const kvq_artifact *a, const place *p,
                             kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       path[RECORD_MAX_PATH];
    int64_t    shape[2];
    KVQ_TRY(put_text(ctx, list, p->group, "hf_name", p->hf_name, err));
    KVQ_TRY(put_text(ctx, list, p->group, "domain", p->kind->domain, err));
    for (size_t i = 0; i < N_OF(TENSOR_FIELDS); i++)
        KVQ_TRY(put_field(ctx, list, p->group, &TENSOR_FIELDS[i], p->tensor, err));
    for (size_t i = 0; i < N_OF(ARRAY_FIELDS); i++) {
        if (ARRAY_FIELDS[i].per_channel && p->tensor->axis != KVQ_AXIS_CHANNEL) continue;
        const float *data = *(float *const *)(const void *)((const char *)p->tensor + ARRAY_FIELDS[i].offset);
        shape_of(a, p->tensor, &ARRAY_FIELDS[i], shape);
        join(path, p->group, "", '/', ARRAY_FIELDS[i].name);
        KVQ_TRY(record_add(ctx, list, path, RECORD_F32, 2, shape, data, err));
    }
done:
    return status;
}

kvq_status artifact_to_records(const kvq_context *ctx, const kvq_artifact *a, record_list *out, kvq_error *err) {
    record_list list = {0};
    kvq_status  status = KVQ_OK;
    for (size_t i = 0; i < N_OF(FILE_LABELS); i++) {
        KVQ_TRY(record_add(ctx, &list, FILE_LABELS[i].path, RECORD_TEXT, 0, NULL, FILE_LABELS[i].text, err));
    }
    for (size_t i = 0; i < N_OF(ARTIFACT_FIELDS); i++) KVQ_TRY(put_field(ctx, &list, "", &ARTIFACT_FIELDS[i], a, err));
    KVQ_TRY(check_settings(a, err));
    KVQ_TRY(check_tensors(a, err));
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        for (size_t which = 0; which < N_OF(TENSOR_KINDS); which++) {
            place p = place_of(a, layer, which);
            KVQ_TRY(put_tensor(ctx, &list, a, &p, err));
        }
    }
    record_sort(&list);
    *out = list;
    list = (record_list){0};
done:
    record_list_free(ctx, &list);
    return status;
}

// ---------------------------------------------------------------- to the artifact

static kvq_status take(record_list *list, const char *path, record_type type, int rank, const record **out,
                       kvq_error *err) {
    const record *r = record_take(list, path);
    if (r == NULL) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is missing", path);
    if (r->type != type || r->rank != rank) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is %s with %d dimensions instead of %s with %d", path,
                        RECORD_TYPE_NAMES[r->type], r->rank, RECORD_TYPE_NAMES[type], rank);
    }
    *out = r;
    return KVQ_OK;
}

static kvq_status take_axis(const char *path, const char *text, kvq_axis *out, kvq_error *err) {
    for (size_t i = 0; i < N_OF(AXIS_NAMES); i++) {
        if (strcmp(text, AXIS_NAMES[i]) != 0) continue;
        *out = (kvq_axis)i;
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s is '%.80s', none of 'channel', 'token'", path, text);
}

static kvq_status take_weighting(const char *path, const char *text, kvq_weighting *out, kvq_error *err) {
    if (kvq_weighting_parse(text, out)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s is '%.80s', none of 'none', 'fisher', 'fisher-scaled'", path,
                    text);
}

static kvq_status take_field(const kvq_context *ctx, record_list *list, const char *group, const field *f, void *base,
                             kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    void         *at = (char *)base + f->offset;
    const record *r = NULL;
    value         v = {0};
    join(path, group, f->group, '@', f->name);
    kvq_status status = take(list, path, STORED_AS[f->kind], 0, &r, err);
    if (status != KVQ_OK) return status;
    if (r->type != RECORD_TEXT) memcpy(&v, r->data, sizeof v);
    if (r->type == RECORD_I64) status = check_number(f, path, (double)v.i, err);
    if (r->type == RECORD_F64) status = check_number(f, path, v.f, err);
    if (f->kind == FIELD_HASH) status = check_hash(path, r->data, err);
    if (f->kind == FIELD_TEXT) status = check_text(path, r->data, err);
    if (status != KVQ_OK) return status;
    switch (f->kind) {
    case FIELD_TEXT:
        return kvq_artifact_set_text(ctx, at, r->data, err);
    case FIELD_HASH:
        memcpy(at, r->data, r->bytes + 1);
        break;
    case FIELD_I64:
        *(int64_t *)at = v.i;
        break;
    case FIELD_INT:
        *(int *)at = (int)v.i;
        break;
    case FIELD_BOOL:
        *(bool *)at = v.i != 0;
        break;
    case FIELD_U64:
        *(uint64_t *)at = v.u;
        break;
    case FIELD_F64:
        *(double *)at = v.f;
        break;
    case FIELD_AXIS:
        return take_axis(path, r->data, at, err);
    case FIELD_WEIGHTING:
        return take_weighting(path, r->data, at, err);
    }
    return KVQ_OK;
}

static kvq_status expect_text(record_list *list, const char *group, const char *name, const char *text,
                              kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    const record *r = NULL;
    join(path, group, "", '@', name);
    kvq_status status = take(list, path, RECORD_TEXT, 0, &r, err);
    if (status == KVQ_OK && strcmp(r->data, text) != 0) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is '%.80s' instead of '%s'", path, (const char *)r->data, text);
    }
    return status;
}

static kvq_status take_array(const kvq_context *ctx, record_list *list, const kvq_artifact *a, const place *p,
                             const array_field *f, kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    int64_t       shape[2];
    float        *data = NULL;
    const record *r = NULL;
    join(path, p->group, "", '/', f->name);
    kvq_status status = take(list, path, RECORD_F32, 2, &r, err);
    if (status != KVQ_OK) return status;
    shape_of(a, p->tensor, f, shape);
    if (r->shape[0] != shape[0] || r->shape[1] != shape[1]) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "%s has the shape [%" PRId64 ", %" PRId64 "] instead of [%" PRId64 ", %" PRId64 "]", path,
                        r->shape[0], r->shape[1], shape[0], shape[1]);
    }
    status = KVQ_NEW(ctx, shape[0] * shape[1], path, &data, err);
    if (status != KVQ_OK) return status;
    memcpy(data, r->data, r->bytes);
    memcpy((char *)p->tensor + f->offset, &data, sizeof data);
    return KVQ_OK;
}

static kvq_status take_tensor(const kvq_context *ctx, record_list *list, const kvq_artifact *a, const place *p,
                              kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(expect_text(list, p->group, "hf_name", p->hf_name, err));
    KVQ_TRY(expect_text(list, p->group, "domain", p->kind->domain, err));
    for (size_t i = 0; i < N_OF(TENSOR_FIELDS); i++)
        KVQ_TRY(take_field(ctx, list, p->group, &TENSOR_FIELDS[i], p->tensor, err));
    p->tensor->n_groups = p->tensor->dim = 1;
    p->tensor->n_levels = 1 << p->tensor->bits;
    for (size_t i = 0; i < N_OF(ARRAY_FIELDS); i++) {
        if (ARRAY_FIELDS[i].per_channel && p->tensor->axis != KVQ_AXIS_CHANNEL) continue;
        KVQ_TRY(take_array(ctx, list, a, p, &ARRAY_FIELDS[i], err));
    }
done:
    return status;
}

// The number of layers decides how much is allocated, so it is believed only when the last of them is there.
static kvq_status count_layers(record_list *list, int64_t *out, kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    const record *r = NULL;
    kvq_status    status = take(list, "/model@n_layers", RECORD_I64, 0, &r, err);
    if (status != KVQ_OK) return status;
    int64_t n = *(const int64_t *)r->data;
    if (n < 1 || n > ARTIFACT_MAX_LAYERS) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "/model@n_layers is %" PRId64 ", not between 1 and %d", n,
                        ARTIFACT_MAX_LAYERS);
    }
    (void)snprintf(path, sizeof path, "/layers/%03" PRId64 "/v/codebook", n - 1);
    if (record_find(list, path) == NULL) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "/model@n_layers is %" PRId64 ", but there is no %s", n, path);
    }
    *out = n;
    return KVQ_OK;
}

kvq_status artifact_from_records(const kvq_context *ctx, record_list *list, kvq_artifact **out, kvq_error *err) {
    kvq_artifact *a = NULL;
    int64_t       n_layers = 0;
    kvq_status    status = KVQ_OK;
    for (size_t i = 0; i < N_OF(FILE_LABELS); i++) (void)record_take(list, FILE_LABELS[i].path);
    KVQ_TRY(count_layers(list, &n_layers, err));
    KVQ_TRY(kvq_artifact_create(ctx, n_layers, &a, err));
    for (size_t i = 0; i < N_OF(ARTIFACT_FIELDS); i++) KVQ_TRY(take_field(ctx, list, "", &ARTIFACT_FIELDS[i], a, err));
    KVQ_TRY(check_settings(a, err));
    for (int64_t layer = 0; layer < n_layers; layer++) {
        for (size_t which = 0; which < N_OF(TENSOR_KINDS); which++) {
            place p = place_of(a, layer, which);
            KVQ_TRY(take_tensor(ctx, list, a, &p, err));
        }
    }
    KVQ_TRY(check_tensors(a, err));
    *out = a;
    a = NULL;
done:
    kvq_artifact_destroy(ctx, &a);
    return status;
}

// ---------------------------------------------------------------- hashes

static bool starts_with(const char *text, const char *start) { return strncmp(text, start, strlen(start)) == 0; }

static bool is_content(const char *path) {
    return strcmp(path, ARTIFACT_CONTENT_HASH) != 0 && strcmp(path, ARTIFACT_NUMERIC_HASH) != 0;
}

// What a decoder computes with: no producer, no names, no hashes of inputs.
static bool is_numeric(const char *path) { return starts_with(path, "/layers/") || starts_with(path, "/quantizer@"); }

kvq_status artifact_content_hash(const record_list *list, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    return record_hash(list, is_content, hex, err);
}
kvq_status artifact_numeric_hash(const record_list *list, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    return record_hash(list, is_numeric, hex, err);
}
