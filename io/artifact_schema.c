// SPDX-License-Identifier: Apache-2.0
//
// The layout of an artifact as tables. A new field is one line here or in artifact_fields.c and one in docs/format.md;
// writing, reading, hashing and the exports follow. See artifact_schema.h; rules are in artifact_rules.h.
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "artifact_rules.h"
#include "artifact_schema.h"

// ---------------------------------------------------------------- the tables

#define NUMBER_OF(group, name, kind, member, low, high, since, of)                                                     \
    FIELD_NUMBER(kvq_tensor_quant, group, name, kind, member, low, high, since, of)
#define NUMBER(group, name, kind, member, low, high) NUMBER_OF(group, name, kind, member, low, high, 0, OF_ALL)
#define ADDED(group, name, kind, member, low, high)  NUMBER_OF(group, name, kind, member, low, high, 1, OF_ALL)
#define NAMED(name, member, names, since, of)        FIELD_NAMED(kvq_tensor_quant, "", name, member, names, since, of)

static const field TENSOR_FIELDS[] = {
    NUMBER_OF("", "bits", FIELD_INT, bits, 1, KVQ_MAX_BITS, 0, OF_NUQ | OF_ALLOC_V),
    NAMED("datatype", datatype, kvq_datatype_names, 1, OF_NUQ),
    NAMED("axis", axis, kvq_axis_names, 0, OF_ALL),
    NAMED("domain", domain, kvq_key_domain_names, 0, OF_K), // V has one domain
    NAMED("table_kind", table_kind, kvq_table_kind_names, 2, OF_ALLOC_K),
    NAMED("scale_format", scale_format, kvq_scale_format_names, 2, OF_ALLOC_V),
    NUMBER_OF("", "scale_exponent", FIELD_INT, scale_exponent, -SCALE_EXPONENT_MAX, SCALE_EXPONENT_MAX, 2, OF_ALLOC_V),
    NUMBER_OF("", "kl", FIELD_F64, kl, 0, DBL_MAX, 2, OF_ALLOC),
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

#define VALUE_DOMAIN "projection"

static const field LAYER_FIELDS[] = {
    FIELD_NUMBER(kvq_layer_quant, "", "attention_error", FIELD_F64, attention_error, 0, DBL_MAX, 1, OF_ALL),
};

// Datasets of a tensor.
typedef enum array_extent {
    EXTENT_CODES,    // [n_groups, 2^bits], in "alloc" [n_groups, 2^bits, dim]
    EXTENT_CHANNELS, // [Hkv, D]
    EXTENT_ROW,      // [d]
    EXTENT_LEVELS,   // [n_key_levels]
} array_extent;
typedef enum array_need { NEED_ALWAYS, NEED_PER_CHANNEL, NEED_AFFINE, NEED_NEVER } array_need;
typedef struct array_field {
    const char  *name;
    size_t       offset; // of the pointer in kvq_tensor_quant
    record_type  type;   // f32, or i64 for what is bytes in memory: readers of 1.1 know no u8
    array_extent extent;
    array_need   need;  // per channel: exactly where the axis is the channel; never: an option
    int          since; // as in field
    unsigned     of;    // likewise
} array_field;

#define ARRAY(name, type, extent, need, since, of)                                                                     \
    { #name, offsetof(kvq_tensor_quant, name), type, extent, need, since, of }

static const array_field ARRAY_FIELDS[] = {
    ARRAY(codebook, RECORD_F32, EXTENT_CODES, NEED_ALWAYS, 0, OF_NUQ | OF_ALLOC_V),
    ARRAY(decode_levels, RECORD_F32, EXTENT_CODES, NEED_NEVER, 1, OF_NUQ),
    {"threshold_lower", offsetof(kvq_tensor_quant, lower), RECORD_F32, EXTENT_CHANNELS, NEED_PER_CHANNEL, 0,
     OF_NUQ | OF_ALLOC_K},
    {"threshold_upper", offsetof(kvq_tensor_quant, upper), RECORD_F32, EXTENT_CHANNELS, NEED_PER_CHANNEL, 0,
     OF_NUQ | OF_ALLOC_K},
    ARRAY(widths, RECORD_I64, EXTENT_ROW, NEED_ALWAYS, 2, OF_ALLOC_K),
    ARRAY(key_levels, RECORD_F32, EXTENT_LEVELS, NEED_ALWAYS, 2, OF_ALLOC_K),
    ARRAY(offset, RECORD_F32, EXTENT_CHANNELS, NEED_AFFINE, 2, OF_ALLOC_K),
    ARRAY(scale, RECORD_F32, EXTENT_CHANNELS, NEED_AFFINE, 2, OF_ALLOC_K),
};

// The one array that belongs to no layer.
#define ROTATION QUANTIZER_GROUP "/rotation"

// Texts that follow from the format and the place; readers other than kvq need them.
typedef struct label {
    const char *path, *text;
} label;

#define N_LABELS 5
static void list_labels(const artifact_scheme *scheme, label out[N_LABELS]) {
    const label labels[N_LABELS] = {
        {"/@kvq_format", ARTIFACT_FORMAT},
        {"/@kvq_format_version", scheme->version},
        {"/@kvq_min_reader", scheme->version},
        {"/@Conventions", scheme->conventions},
        {"/@producer", "kvq"},
    };
    memcpy(out, labels, sizeof labels);
}

#define N_OF(table) (sizeof(table) / sizeof *(table))

static void layer_group(char out[64], int64_t layer) { (void)snprintf(out, 64, "/layers/%03" PRId64, layer); }

static void join(char out[RECORD_MAX_PATH], const char *group, const char *below, char separator, const char *name) {
    (void)snprintf(out, RECORD_MAX_PATH, "%s%s%c%s", group, below, separator, name);
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

typedef struct array_shape {
    int     rank;
    int64_t extents[RECORD_MAX_RANK];
} array_shape;

static array_shape shape_of(const kvq_artifact *a, const artifact_place *p, const array_field *f) {
    const kvq_tensor_quant *t = p->tensor;
    switch (f->extent) {
    case EXTENT_CODES:
        return (array_shape){(p->of & OF_ALLOC) != 0 ? 3 : 2, {t->n_groups, t->n_levels, t->dim}};
    case EXTENT_CHANNELS:
        return (array_shape){2, {a->model.n_kv_heads, a->model.head_dim}};
    case EXTENT_ROW:
        return (array_shape){1, {artifact_row_width(a)}};
    default:
        return (array_shape){1, {t->n_key_levels}};
    }
}

static const void *data_of(const kvq_tensor_quant *t, const array_field *f) {
    const void *data;
    memcpy(&data, (const char *)t + f->offset, sizeof data);
    return data;
}

static kvq_status put_array(const kvq_context *ctx, record_list *list, const char *path, const array_field *f,
                            array_shape shape, const void *data, kvq_error *err) {
    void   *copy = NULL;
    int64_t n = 1;
    if (f->type == RECORD_F32) return record_add(ctx, list, path, f->type, shape.rank, shape.extents, data, err);
    for (int i = 0; i < shape.rank; i++) n *= shape.extents[i];
    kvq_status status = record_reserve(ctx, list, path, f->type, shape.rank, shape.extents,
                                       (size_t)n * RECORD_TYPE_BYTES[f->type], &copy, err);
    for (int64_t i = 0; status == KVQ_OK && i < n; i++) ((int64_t *)copy)[i] = ((const uint8_t *)data)[i];
    return status;
}

// Options are there or not; the rest follows from the tensor's fields.
static bool is_needed(const artifact_place *p, const array_field *f) {
    const kvq_tensor_quant *t = p->tensor;
    if (f->need == NEED_PER_CHANNEL) return t->axis == KVQ_AXIS_CHANNEL;
    return f->need == NEED_ALWAYS || (f->need == NEED_AFFINE && t->table_kind == KVQ_TABLE_AFFINE);
}

static kvq_status put_tensor(const kvq_context *ctx, record_list *list, const kvq_artifact *a, const artifact_place *p,
                             kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       path[RECORD_MAX_PATH];
    KVQ_TRY(put_text(ctx, list, p->group, "hf_name", p->hf_name, err));
    if (!artifact_is_key(p)) KVQ_TRY(put_text(ctx, list, p->group, "domain", VALUE_DOMAIN, err));
    for (size_t i = 0; i < N_OF(TENSOR_FIELDS); i++) {
        if ((TENSOR_FIELDS[i].of & p->of) != 0)
            KVQ_TRY(put_field(ctx, list, p->group, &TENSOR_FIELDS[i], p->tensor, err));
    }
    for (size_t i = 0; i < N_OF(ARRAY_FIELDS); i++) {
        const array_field *f = &ARRAY_FIELDS[i];
        if ((f->of & p->of) == 0 || !(is_needed(p, f) || (f->need == NEED_NEVER && data_of(p->tensor, f) != NULL)))
            continue;
        join(path, p->group, "", '/', f->name);
        KVQ_TRY(put_array(ctx, list, path, f, shape_of(a, p, f), data_of(p->tensor, f), err));
    }
done:
    return status;
}

static kvq_status put_layer(const kvq_context *ctx, record_list *list, const kvq_artifact *a,
                            const artifact_scheme *scheme, int64_t layer, kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       group[64];
    layer_group(group, layer);
    for (size_t i = 0; i < N_OF(LAYER_FIELDS); i++)
        KVQ_TRY(put_field(ctx, list, group, &LAYER_FIELDS[i], &a->layers[layer], err));
    for (int which = 0; which < ARTIFACT_TENSORS; which++) {
        artifact_place p = artifact_place_of(a, scheme, layer, which);
        KVQ_TRY(put_tensor(ctx, list, a, &p, err));
    }
done:
    return status;
}

static kvq_status put_rotation(const kvq_context *ctx, record_list *list, const kvq_artifact *a, kvq_error *err) {
    const int64_t shape[2] = {a->model.head_dim, a->model.head_dim};
    if (!kvq_artifact_is_allocated(a)) return KVQ_OK;
    return record_add(ctx, list, ROTATION, RECORD_F32, 2, shape, a->quantizer.rotation, err);
}

kvq_status artifact_to_records(const kvq_context *ctx, const kvq_artifact *a, record_list *out, kvq_error *err) {
    record_list            list = {0};
    const artifact_scheme *scheme = NULL;
    label                  labels[N_LABELS];
    kvq_status             status = KVQ_OK;
    KVQ_TRY(artifact_scheme_find(a->quantizer.scheme, ARTIFACT_MINOR, &scheme, err));
    list_labels(scheme, labels);
    for (int i = 0; i < N_LABELS; i++)
        KVQ_TRY(record_add(ctx, &list, labels[i].path, RECORD_TEXT, 0, NULL, labels[i].text, err));
    for (size_t i = 0; i < N_ARTIFACT_FIELDS; i++) {
        if ((ARTIFACT_FIELDS[i].of & scheme->of) != 0) KVQ_TRY(put_field(ctx, &list, "", &ARTIFACT_FIELDS[i], a, err));
    }
    KVQ_TRY(artifact_check_settings(a, scheme, err));
    KVQ_TRY(artifact_check_tensors(a, scheme, err));
    KVQ_TRY(put_rotation(ctx, &list, a, err));
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) KVQ_TRY(put_layer(ctx, &list, a, scheme, layer, err));
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
    const kvq_context     *ctx;
    record_list           *list;
    int                    minor;
    const artifact_scheme *scheme;
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

// Of a later version or of something else it is not looked up.
static bool is_known(const reading *r, int since, unsigned of, unsigned wanted) {
    return since <= r->minor && (of & wanted) != 0;
}

// A field of a later version keeps its zero; if it is there all the same, nobody takes it and it is refused.
static kvq_status take_field(const reading *r, const char *group, const field *f, unsigned of, void *base,
                             kvq_error *err) {
    char          path[RECORD_MAX_PATH];
    const record *found = NULL;
    if (!is_known(r, f->since, f->of, of)) return KVQ_OK;
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

static void shape_text(int rank, const int64_t *extents, char out[96]) {
    size_t used = 0;
    for (int i = 0; i < rank; i++)
        used += (size_t)snprintf(out + used, 96 - used, "%s%" PRId64, i > 0 ? ", " : "", extents[i]);
}

static kvq_status narrow(const record *found, uint8_t *out, kvq_error *err) {
    for (int64_t i = 0; i < record_n_elements(found); i++) {
        int64_t x = ((const int64_t *)found->data)[i];
        if (x < 0 || x > UINT8_MAX) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: element %" PRId64 " is %" PRId64 ", outside of 0 .. %d",
                            found->path, i, x, UINT8_MAX);
        }
        out[i] = (uint8_t)x;
    }
    return KVQ_OK;
}

// A copy of an array of this type and shape, i64 as bytes.
static kvq_status take_numbers(const reading *r, const char *path, record_type type, array_shape shape, void **out,
                               kvq_error *err) {
    const record *found = NULL;
    char          is[96], should[96];
    uint8_t      *data = NULL;
    kvq_status    status = take(r, path, type, shape.rank, &found, err);
    if (status != KVQ_OK) return status;
    if (memcmp(found->shape, shape.extents, (size_t)shape.rank * sizeof *shape.extents) != 0) {
        shape_text(shape.rank, found->shape, is);
        shape_text(shape.rank, shape.extents, should);
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s has the shape [%s] instead of [%s]", path, is, should);
    }
    KVQ_TRY(KVQ_NEW(r->ctx, type == RECORD_I64 ? record_n_elements(found) : (int64_t)found->bytes, path, &data, err));
    if (type == RECORD_I64)
        KVQ_TRY(narrow(found, data, err));
    else
        memcpy(data, found->data, found->bytes);
    *out = data;
    data = NULL;
done:
    kvq_free(r->ctx, data);
    return status;
}

static kvq_status take_array(const reading *r, const kvq_artifact *a, const artifact_place *p, const array_field *f,
                             kvq_error *err) {
    char  path[RECORD_MAX_PATH];
    void *data = NULL;
    join(path, p->group, "", '/', f->name);
    bool wanted = f->need == NEED_NEVER ? record_find(r->list, path) != NULL : is_needed(p, f);
    if (!is_known(r, f->since, f->of, p->of) || !wanted) return KVQ_OK;
    kvq_status status = take_numbers(r, path, f->type, shape_of(a, p, f), &data, err);
    if (status == KVQ_OK) memcpy((char *)p->tensor + f->offset, &data, sizeof data);
    return status;
}

// An extent of an array that is not there, or has fewer dimensions, is 0.
static int64_t extent_of(const reading *r, const artifact_place *p, const char *name, int axis) {
    char path[RECORD_MAX_PATH];
    join(path, p->group, "", '/', name);
    const record *found = record_find(r->list, path);
    return found != NULL && axis < found->rank ? found->shape[axis] : 0;
}

// What arrays say by their own shape: the number of tables, one or since 1.1 one per KV head; the dimensions of levels,
// one or in "alloc" two; and how many levels keys have. Other numbers will fail by the shape, or by the rules.
static void take_sizes(const reading *r, const kvq_artifact *a, const artifact_place *p) {
    kvq_tensor_quant *t = p->tensor;
    bool              is_allocated = (p->of & OF_ALLOC) != 0;
    bool              per_head = !is_allocated && r->minor > 0 && extent_of(r, p, "codebook", 0) == a->model.n_kv_heads;
    t->n_groups = per_head ? (int)a->model.n_kv_heads : 1;
    t->dim = is_allocated && extent_of(r, p, "codebook", 2) == 2 ? 2 : 1;
    t->n_levels = p->of == OF_ALLOC_K ? 0 : 1 << t->bits;
    t->n_key_levels = p->of == OF_ALLOC_K ? extent_of(r, p, "key_levels", 0) : 0;
}

static kvq_status take_tensor(const reading *r, const kvq_artifact *a, const artifact_place *p, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(expect_text(r, p->group, "hf_name", p->hf_name, err));
    if (!artifact_is_key(p)) KVQ_TRY(expect_text(r, p->group, "domain", VALUE_DOMAIN, err));
    for (size_t i = 0; i < N_OF(TENSOR_FIELDS); i++)
        KVQ_TRY(take_field(r, p->group, &TENSOR_FIELDS[i], p->of, p->tensor, err));
    take_sizes(r, a, p);
    for (size_t i = 0; i < N_OF(ARRAY_FIELDS); i++) KVQ_TRY(take_array(r, a, p, &ARRAY_FIELDS[i], err));
done:
    return status;
}

static kvq_status take_layer(const reading *r, const kvq_artifact *a, int64_t layer, kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       group[64];
    layer_group(group, layer);
    for (size_t i = 0; i < N_OF(LAYER_FIELDS); i++)
        KVQ_TRY(take_field(r, group, &LAYER_FIELDS[i], OF_ALL, &a->layers[layer], err));
    for (int which = 0; which < ARTIFACT_TENSORS; which++) {
        artifact_place p = artifact_place_of(a, r->scheme, layer, which);
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

// The scheme decides which fields there are.
static kvq_status take_scheme(reading *r, kvq_error *err) {
    const record *found = NULL;
    kvq_status    status = take(r, QUANTIZER_SCHEME, RECORD_TEXT, 0, &found, err);
    return status == KVQ_OK ? artifact_scheme_find(found->data, r->minor, &r->scheme, err) : status;
}

static kvq_status take_rotation(const reading *r, kvq_artifact *a, kvq_error *err) {
    void       *data = NULL;
    array_shape shape = {2, {a->model.head_dim, a->model.head_dim}};
    if (r->scheme->of != OF_ALLOC) return KVQ_OK;
    kvq_status status = take_numbers(r, ROTATION, RECORD_F32, shape, &data, err);
    if (status == KVQ_OK) a->quantizer.rotation = data;
    return status;
}

kvq_status artifact_from_records(const kvq_context *ctx, record_list *list, int minor, kvq_artifact **out,
                                 kvq_error *err) {
    kvq_artifact *a = NULL;
    int64_t       n_layers = 0;
    kvq_status    status = KVQ_OK;
    reading       r = {ctx, list, minor, NULL};
    label         labels[N_LABELS];
    KVQ_TRY(take_scheme(&r, err));
    list_labels(r.scheme, labels);
    for (int i = 0; i < N_LABELS; i++) (void)record_take(list, labels[i].path);
    KVQ_TRY(count_layers(&r, &n_layers, err));
    KVQ_TRY(kvq_artifact_create(ctx, n_layers, &a, err));
    for (size_t i = 0; i < N_ARTIFACT_FIELDS; i++)
        KVQ_TRY(take_field(&r, "", &ARTIFACT_FIELDS[i], r.scheme->of, a, err));
    KVQ_TRY(take_rotation(&r, a, err));
    KVQ_TRY(artifact_check_settings(a, r.scheme, err));
    for (int64_t layer = 0; layer < n_layers; layer++) KVQ_TRY(take_layer(&r, a, layer, err));
    KVQ_TRY(artifact_check_tensors(a, r.scheme, err));
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
static bool is_numeric(const char *path) {
    return starts_with(path, "/layers/") || starts_with(path, QUANTIZER_GROUP "@") || starts_with(path, ROTATION);
}

kvq_status artifact_content_hash(const record_list *list, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    return record_hash(list, is_content, hex, err);
}
kvq_status artifact_numeric_hash(const record_list *list, char hex[KVQ_SHA256_HEX], kvq_error *err) {
    return record_hash(list, is_numeric, hex, err);
}
