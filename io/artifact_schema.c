// SPDX-License-Identifier: Apache-2.0
//
// The layout of an artifact as tables, and the rules that its content obeys. A new field is one line here or in
// artifact_fields.c and one in docs/format.md; writing, reading, hashing and the exports follow. See artifact_schema.h.
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "artifact_schema.h"

// ---------------------------------------------------------------- the tables

#define NUMBER(group, name, kind, member, low, high)                                                                   \
    FIELD_NUMBER(kvq_tensor_quant, group, name, kind, member, low, high, 0)
#define ADDED(group, name, kind, member, low, high)                                                                    \
    FIELD_NUMBER(kvq_tensor_quant, group, name, kind, member, low, high, 1)
#define NAMED(name, member, names, since) FIELD_NAMED(kvq_tensor_quant, "", name, member, names, since)

static const field TENSOR_FIELDS[] = {
    NUMBER("", "bits", FIELD_INT, bits, 1, KVQ_MAX_BITS),
    NAMED("datatype", datatype, kvq_datatype_names, 1),
    NAMED("axis", axis, kvq_axis_names, 0),
    NUMBER("/fit", "n_points", FIELD_I64, fit.n_points, 0, FIELD_COUNT_MAX),
    NUMBER("/fit", "n_outliers", FIELD_I64, fit.n_outliers, 0, FIELD_COUNT_MAX),
    NUMBER("/fit", "n_constant", FIELD_I64, fit.n_constant, 0, FIELD_COUNT_MAX),
    ADDED("/fit", "n_clipped", FIELD_I64, fit.n_clipped, 0, FIELD_COUNT_MAX),
    NUMBER("/fit", "weight_sum", FIELD_F64, fit.weight_sum, 0, DBL_MAX),
    NUMBER("/fit", "effective_samples", FIELD_F64, fit.effective_samples, 0, DBL_MAX),
    NUMBER("/fit", "objective", FIELD_F64, fit.objective, 0, DBL_MAX),
    NUMBER("/fit", "binning_bound", FIELD_F64, fit.binning_bound, 0, DBL_MAX),
    ADDED("/fit", "lloyd_objective", FIELD_F64, fit.lloyd_objective, 0, DBL_MAX),
    ADDED("/fit", "normalised_mse", FIELD_F64, fit.normalised_mse, 0, DBL_MAX),
    ADDED("/fit", "mse", FIELD_F64, fit.mse, 0, DBL_MAX),
    ADDED("/fit", "energy", FIELD_F64, fit.energy, 0, DBL_MAX),
    ADDED("/fit", "entropy_bits", FIELD_F64, fit.entropy_bits, 0, KVQ_MAX_BITS),
    ADDED("/heldout", "n_tokens", FIELD_I64, heldout.n_tokens, 0, FIELD_COUNT_MAX),
    ADDED("/heldout", "nmse", FIELD_F64, heldout.nmse, 0, DBL_MAX),
    ADDED("/heldout", "clipped_share", FIELD_F64, heldout.clipped_share, 0, 1),
    ADDED("/heldout", "outlier_share", FIELD_F64, heldout.outlier_share, 0, 1),
    ADDED("/heldout", "attention_error", FIELD_F64, heldout.attention_error, 0, DBL_MAX),
};

// K says which keys it is about; V has one domain.
static const field KEY_DOMAIN = NAMED("domain", domain, kvq_key_domain_names, 0);
#define VALUE_DOMAIN "projection"

static const field LAYER_FIELDS[] = {
    FIELD_NUMBER(kvq_layer_quant, "", "attention_error", FIELD_F64, attention_error, 0, DBL_MAX, 1),
};

// Datasets of a tensor, f32.
typedef enum array_need { NEED_ALWAYS, NEED_PER_CHANNEL, NEED_NEVER } array_need;
typedef struct array_field {
    const char *name;
    size_t      offset;   // of the pointer in kvq_tensor_quant
    bool        of_codes; // [n_groups, 2^bits], otherwise [Hkv, D]
    array_need  need;     // per channel: exactly where the axis is the channel; never: an option
    int         since;    // as in field
} array_field;

static const array_field ARRAY_FIELDS[] = {
    {"codebook", offsetof(kvq_tensor_quant, codebook), true, NEED_ALWAYS, 0},
    {"decode_levels", offsetof(kvq_tensor_quant, decode_levels), true, NEED_NEVER, 1},
    {"threshold_lower", offsetof(kvq_tensor_quant, lower), false, NEED_PER_CHANNEL, 0},
    {"threshold_upper", offsetof(kvq_tensor_quant, upper), false, NEED_PER_CHANNEL, 0},
};

// Texts that follow from the format and the place; readers other than kvq need them.
typedef struct label {
    const char *path, *text;
} label;

static const label FILE_LABELS[] = {
    {"/@kvq_format", ARTIFACT_FORMAT}, {"/@kvq_format_version", "1.1"}, {"/@kvq_min_reader", "1.1"},
    {"/@Conventions", "KVQ-1.1"},      {"/@producer", "kvq"},
};

#define N_OF(table) (sizeof(table) / sizeof *(table))

// The two tensors of a layer, K first.
static const struct tensor_kind {
    char   letter;
    bool   may_be_per_channel;
    size_t offset; // in kvq_layer_quant
} TENSOR_KINDS[] = {
    {'k', true, offsetof(kvq_layer_quant, k)},
    {'v', false, offsetof(kvq_layer_quant, v)},
};

static void layer_group(char out[64], int64_t layer) { (void)snprintf(out, 64, "/layers/%03" PRId64, layer); }

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

static kvq_status check_finite(const place *p, const char *name, const float *x, int64_t n, kvq_error *err) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s/%s: element %" PRId64 " is %g", p->group, name, i,
                            (double)x[i]);
        }
    }
    return KVQ_OK;
}

// Evenly spaced levels may be decoded by integer arithmetic and have their zero point clamped, so they must be what
// they are called. 2^-20: far more than f32 can be off, far less than any step.
static kvq_status check_even(const place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    for (int i = 0; i < t->n_groups * t->n_levels; i++) {
        double even = 2.0 * (i % t->n_levels) / (t->n_levels - 1) - 1;
        if (fabs((double)t->codebook[i] - even) <= 0x1p-20) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/codebook: element %d is %.9g; the datatype '%s' has %.9g there",
                        p->group, i, (double)t->codebook[i], kvq_datatype_names[t->datatype], even);
    }
    return KVQ_OK;
}

static kvq_status check_levels(const place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    int                     n = t->n_groups * t->n_levels;
    kvq_status              status = check_finite(p, "codebook", t->codebook, n, err);
    if (status == KVQ_OK && t->decode_levels != NULL)
        status = check_finite(p, "decode_levels", t->decode_levels, n, err);
    if (status != KVQ_OK) return status;
    for (int i = 1; i < n; i++) {
        if (i % t->n_levels == 0 || t->codebook[i] >= t->codebook[i - 1]) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/codebook: level %d, %.9g, is below level %d, %.9g", p->group, i,
                        (double)t->codebook[i], i - 1, (double)t->codebook[i - 1]);
    }
    bool is_even = t->datatype == KVQ_INT || t->datatype == KVQ_INT_CLAMPED;
    return is_even ? check_even(p, err) : KVQ_OK;
}

static kvq_status check_thresholds(const place *p, int64_t d, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    kvq_status              status = check_finite(p, "threshold_lower", t->lower, d, err);
    if (status == KVQ_OK) status = check_finite(p, "threshold_upper", t->upper, d, err);
    for (int64_t c = 0; status == KVQ_OK && c < d; c++) {
        float lower = t->lower[c], upper = t->upper[c];
        if (lower <= upper && isfinite(upper - lower) && isfinite(upper + lower)) continue;
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL,
                          "%s: the thresholds of channel %" PRId64
                          ", %.9g and %.9g, do not ascend or have no f32 middle and width",
                          p->group, c, (double)lower, (double)upper);
    }
    return status;
}

static kvq_status check_tensor(const kvq_artifact *a, const place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    bool                    per_channel = t->axis == KVQ_AXIS_CHANNEL;
    if ((t->n_groups != 1 && t->n_groups != a->model.n_kv_heads) || t->dim != 1 || t->n_levels != 1 << t->bits) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "%s/codebook: %d groups of %d levels of %d dimensions; format 1.1 holds one group, or one per "
                        "KV head, of 2^bits = %d levels of one",
                        p->group, t->n_groups, t->n_levels, t->dim, 1 << t->bits);
    }
    if (per_channel && !p->kind->may_be_per_channel) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s@axis is 'channel'; format 1.1 knows 'token' here",
                        p->group);
    }
    if (t->codebook == NULL || (t->lower != NULL) != per_channel || (t->upper != NULL) != per_channel) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the codebook is missing, or thresholds do not fit the axis '%s'",
                        p->group, kvq_axis_names[t->axis]);
    }
    kvq_status status = check_levels(p, err);
    return status == KVQ_OK && per_channel ? check_thresholds(p, artifact_row_width(a), err) : status;
}

// What concerns several fields together, before any array is looked at.
static kvq_status check_settings(const kvq_artifact *a, kvq_error *err) {
    int        n_side = a->quantizer.n_side_k > a->quantizer.n_side_v ? a->quantizer.n_side_k : a->quantizer.n_side_v;
    kvq_status status = artifact_check_row_width(a, err);
    if (status != KVQ_OK) return status;
    if (strcmp(a->quantizer.scheme, "nuq") != 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "/quantizer@scheme is '%.80s'; format 1.1 knows 'nuq'",
                        a->quantizer.scheme);
    }
    if (2 * (int64_t)n_side >= artifact_row_width(a)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "/quantizer: %d outliers per side leave nothing of %" PRId64 " channels", n_side,
                        artifact_row_width(a));
    }
    return KVQ_OK;
}

static kvq_status check_tensors(const kvq_artifact *a, kvq_error *err) {
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        for (size_t which = 0; which < N_OF(TENSOR_KINDS); which++) {
            place      p = place_of(a, layer, which);
            kvq_status status = check_tensor(a, &p, err);
            if (status != KVQ_OK) return status;
        }
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- from the artifact

static kvq_status put_field(const kvq_context *ctx, record_list *list, const char *group, const field *f,
                            const void *base, kvq_error *err) {
    char        path[RECORD_MAX_PATH];
    field_value v = {0};
    join(path, group, f->group, '@', f->name);
    kvq_status status = field_get(f, path, base, &v, err);
    if (status != KVQ_OK) return status;
    return record_add(ctx, list, path, v.type, 0, NULL, v.text != NULL ? (const void *)v.text : &v.number, err);
}

static kvq_status put_text(const kvq_context *ctx, record_list *list, const char *group, const char *name,
                           const char *text, kvq_error *err) {
    char path[RECORD_MAX_PATH];
    join(path, group, "", '@', name);
    return record_add(ctx, list, path, RECORD_TEXT, 0, NULL, text, err);
}

static void shape_of(const kvq_artifact *a, const kvq_tensor_quant *t, const array_field *f, int64_t shape[2]) {
    shape[0] = f->of_codes ? t->n_groups : a->model.n_kv_heads;
    shape[1] = f->of_codes ? t->n_levels : a->model.head_dim;
}

static bool is_present(const kvq_tensor_quant *t, const array_field *f) {
    if (f->need == NEED_NEVER) return *(float *const *)(const void *)((const char *)t + f->offset) != NULL;
    return f->need == NEED_ALWAYS || t->axis == KVQ_AXIS_CHANNEL;
}

static kvq_status put_tensor(const kvq_context *ctx, record_list *list, const kvq_artifact *a, const place *p,
                             kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       path[RECORD_MAX_PATH];
    int64_t    shape[2];
    KVQ_TRY(put_text(ctx, list, p->group, "hf_name", p->hf_name, err));
    if (p->kind->letter == 'k')
        KVQ_TRY(put_field(ctx, list, p->group, &KEY_DOMAIN, p->tensor, err));
    else
        KVQ_TRY(put_text(ctx, list, p->group, KEY_DOMAIN.name, VALUE_DOMAIN, err));
    for (size_t i = 0; i < N_OF(TENSOR_FIELDS); i++)
        KVQ_TRY(put_field(ctx, list, p->group, &TENSOR_FIELDS[i], p->tensor, err));
    for (size_t i = 0; i < N_OF(ARRAY_FIELDS); i++) {
        if (!is_present(p->tensor, &ARRAY_FIELDS[i])) continue;
        const float *data = *(float *const *)(const void *)((const char *)p->tensor + ARRAY_FIELDS[i].offset);
        shape_of(a, p->tensor, &ARRAY_FIELDS[i], shape);
        join(path, p->group, "", '/', ARRAY_FIELDS[i].name);
        KVQ_TRY(record_add(ctx, list, path, RECORD_F32, 2, shape, data, err));
    }
done:
    return status;
}

static kvq_status put_layer(const kvq_context *ctx, record_list *list, const kvq_artifact *a, int64_t layer,
                            kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       group[64];
    layer_group(group, layer);
    for (size_t i = 0; i < N_OF(LAYER_FIELDS); i++)
        KVQ_TRY(put_field(ctx, list, group, &LAYER_FIELDS[i], &a->layers[layer], err));
    for (size_t which = 0; which < N_OF(TENSOR_KINDS); which++) {
        place p = place_of(a, layer, which);
        KVQ_TRY(put_tensor(ctx, list, a, &p, err));
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
    for (size_t i = 0; i < N_ARTIFACT_FIELDS; i++) KVQ_TRY(put_field(ctx, &list, "", &ARTIFACT_FIELDS[i], a, err));
    KVQ_TRY(check_settings(a, err));
    KVQ_TRY(check_tensors(a, err));
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) KVQ_TRY(put_layer(ctx, &list, a, layer, err));
    record_sort(&list);
    *out = list;
    list = (record_list){0};
done:
    record_list_free(ctx, &list);
    return status;
}

// ---------------------------------------------------------------- to the artifact

// What a file of this minor version is read with.
typedef struct reading {
    const kvq_context *ctx;
    record_list       *list;
    int                minor;
} reading;

static kvq_status take(const reading *r, const char *path, record_type type, int rank, const record **out,
                       kvq_error *err) {
    const record *found = record_take(r->list, path);
    if (found == NULL) return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is missing", path);
    if (found->type != type || found->rank != rank) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is %s with %d dimensions instead of %s with %d", path,
                        RECORD_TYPE_NAMES[found->type], found->rank, RECORD_TYPE_NAMES[type], rank);
    }
    *out = found;
    return KVQ_OK;
}

// A field of a later version keeps its zero; if it is there all the same, nobody takes it and it is refused.
static kvq_status take_field(const reading *r, const char *group, const field *f, void *base, kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    const record *found = NULL;
    if (f->since > r->minor) return KVQ_OK;
    join(path, group, f->group, '@', f->name);
    kvq_status status = take(r, path, field_stored_as(f), 0, &found, err);
    if (status != KVQ_OK) return status;
    field_value v = {.type = found->type};
    if (v.type == RECORD_TEXT)
        v.text = found->data;
    else
        memcpy(&v.number, found->data, sizeof v.number);
    return field_set(r->ctx, f, path, base, &v, err);
}

static kvq_status expect_text(const reading *r, const char *group, const char *name, const char *text, kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    const record *found = NULL;
    join(path, group, "", '@', name);
    kvq_status status = take(r, path, RECORD_TEXT, 0, &found, err);
    if (status == KVQ_OK && strcmp(found->data, text) != 0) {
        status =
            kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s is '%.80s' instead of '%s'", path, (const char *)found->data, text);
    }
    return status;
}

static kvq_status take_array(const reading *r, const kvq_artifact *a, const place *p, const array_field *f,
                             kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    int64_t       shape[2];
    float        *data = NULL;
    const record *found = NULL;
    join(path, p->group, "", '/', f->name);
    bool wanted = f->need == NEED_NEVER ? record_find(r->list, path) != NULL : is_present(p->tensor, f);
    if (f->since > r->minor || !wanted) return KVQ_OK;
    kvq_status status = take(r, path, RECORD_F32, 2, &found, err);
    if (status != KVQ_OK) return status;
    shape_of(a, p->tensor, f, shape);
    if (found->shape[0] != shape[0] || found->shape[1] != shape[1]) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "%s has the shape [%" PRId64 ", %" PRId64 "] instead of [%" PRId64 ", %" PRId64 "]", path,
                        found->shape[0], found->shape[1], shape[0], shape[1]);
    }
    status = KVQ_NEW(r->ctx, shape[0] * shape[1], path, &data, err);
    if (status != KVQ_OK) return status;
    memcpy(data, found->data, found->bytes);
    memcpy((char *)p->tensor + f->offset, &data, sizeof data);
    return KVQ_OK;
}

// The number of tables is the codebook's own: one, or since 1.1 one per KV head. Another one will fail by its shape.
static int count_groups(const reading *r, const kvq_artifact *a, const place *p) {
    char path[RECORD_MAX_PATH];
    join(path, p->group, "", '/', ARRAY_FIELDS[0].name);
    const record *codebook = record_find(r->list, path);
    bool per_head = codebook != NULL && codebook->rank > 0 && codebook->shape[0] == a->model.n_kv_heads && r->minor > 0;
    return per_head ? (int)a->model.n_kv_heads : 1;
}

static kvq_status take_tensor(const reading *r, const kvq_artifact *a, const place *p, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(expect_text(r, p->group, "hf_name", p->hf_name, err));
    if (p->kind->letter == 'k')
        KVQ_TRY(take_field(r, p->group, &KEY_DOMAIN, p->tensor, err));
    else
        KVQ_TRY(expect_text(r, p->group, KEY_DOMAIN.name, VALUE_DOMAIN, err));
    for (size_t i = 0; i < N_OF(TENSOR_FIELDS); i++)
        KVQ_TRY(take_field(r, p->group, &TENSOR_FIELDS[i], p->tensor, err));
    p->tensor->dim = 1;
    p->tensor->n_groups = count_groups(r, a, p);
    p->tensor->n_levels = 1 << p->tensor->bits;
    for (size_t i = 0; i < N_OF(ARRAY_FIELDS); i++) KVQ_TRY(take_array(r, a, p, &ARRAY_FIELDS[i], err));
done:
    return status;
}

static kvq_status take_layer(const reading *r, const kvq_artifact *a, int64_t layer, kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       group[64];
    layer_group(group, layer);
    for (size_t i = 0; i < N_OF(LAYER_FIELDS); i++)
        KVQ_TRY(take_field(r, group, &LAYER_FIELDS[i], &a->layers[layer], err));
    for (size_t which = 0; which < N_OF(TENSOR_KINDS); which++) {
        place p = place_of(a, layer, which);
        KVQ_TRY(take_tensor(r, a, &p, err));
    }
done:
    return status;
}

// The number of layers decides how much is allocated, so it is believed only when the last of them is there.
static kvq_status count_layers(const reading *r, int64_t *out, kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    const record *found = NULL;
    kvq_status    status = take(r, "/model@n_layers", RECORD_I64, 0, &found, err);
    if (status != KVQ_OK) return status;
    int64_t n = *(const int64_t *)found->data;
    if (n < 1 || n > ARTIFACT_MAX_LAYERS) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "/model@n_layers is %" PRId64 ", not between 1 and %d", n,
                        ARTIFACT_MAX_LAYERS);
    }
    (void)snprintf(path, sizeof path, "/layers/%03" PRId64 "/v/codebook", n - 1);
    if (record_find(r->list, path) == NULL) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "/model@n_layers is %" PRId64 ", but there is no %s", n, path);
    }
    *out = n;
    return KVQ_OK;
}

kvq_status artifact_from_records(const kvq_context *ctx, record_list *list, int minor, kvq_artifact **out,
                                 kvq_error *err) {
    kvq_artifact *a = NULL;
    int64_t       n_layers = 0;
    kvq_status    status = KVQ_OK;
    reading       r = {ctx, list, minor};
    for (size_t i = 0; i < N_OF(FILE_LABELS); i++) (void)record_take(list, FILE_LABELS[i].path);
    KVQ_TRY(count_layers(&r, &n_layers, err));
    KVQ_TRY(kvq_artifact_create(ctx, n_layers, &a, err));
    for (size_t i = 0; i < N_ARTIFACT_FIELDS; i++) KVQ_TRY(take_field(&r, "", &ARTIFACT_FIELDS[i], a, err));
    KVQ_TRY(check_settings(a, err));
    for (int64_t layer = 0; layer < n_layers; layer++) KVQ_TRY(take_layer(&r, a, layer, err));
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
