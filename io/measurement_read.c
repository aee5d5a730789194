// SPDX-License-Identifier: Apache-2.0
//
// Reading measurement files. The seal is checked before anything is parsed, but files are not trusted for it: whoever
// makes a file can seal it.
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "measurement_impl.h"

static const container_kind MEASUREMENTS = {"measurements", "kvq-calibrate --measure-only"};

struct kvq_measurement {
    arrays_reader      *file;
    int                 minor; // of the version that the file says
    kvq_artifact       *about;
    kvq_measure_options options;
    bool                eigenvectors;
};

// ---------------------------------------------------------------- attributes

// What a later 1.x adds does not disturb, or raises kvq_min_reader.
static kvq_status check_version(const kvq_context *ctx, const arrays_reader *r, int *minor, kvq_error *err) {
    static const char *const NAMES[] = {"kvq_format", "kvq_format_version", "kvq_min_reader"};
    array_value              values[3] = {{0}};
    const char              *texts[3] = {"", "", ""};
    kvq_status               status = KVQ_OK;
    for (int i = 0; i < 3; i++) {
        KVQ_TRY(arrays_get(ctx, r, "/", NAMES[i], &values[i], err));
        if (values[i].kind == ARRAY_TEXT) texts[i] = values[i].text;
    }
    status = container_check_format(texts[0], MEASUREMENT_FORMAT, err);
    if (status == KVQ_OK) {
        status = container_check_version("measurement", texts[1], texts[2], MEASUREMENT_MAJOR, MEASUREMENT_MINOR, minor,
                                         err);
    }
    if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", arrays_path(r));
done:
    for (int i = 0; i < 3; i++) array_value_free(ctx, &values[i]);
    return status;
}

// False when it is stored as another type.
static bool convert(const array_value *value, record_type type, field_value *out) {
    out->type = type;
    switch (type) {
    case RECORD_TEXT:
        out->text = value->text;
        return value->kind == ARRAY_TEXT;
    case RECORD_I64:
        out->number.i = value->integer;
        return value->kind == ARRAY_INTEGER;
    case RECORD_U64: // a small one may have been stored with a sign
        out->number.u = value->kind == ARRAY_UNSIGNED ? value->unsigned_integer : (uint64_t)value->integer;
        return value->kind == ARRAY_UNSIGNED || (value->kind == ARRAY_INTEGER && value->integer >= 0);
    default:
        out->number.f = value->real;
        return value->kind == ARRAY_REAL;
    }
}

// A value of this type; only text has to be freed.
static kvq_status get(const kvq_context *ctx, const arrays_reader *r, const char *group, const char *name,
                      record_type type, array_value *value, field_value *out, kvq_error *err) {
    kvq_status status = arrays_get(ctx, r, group, name, value, err);
    if (status != KVQ_OK) return status;
    if (convert(value, type, out)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s@%s is %s %s", arrays_path(r), group, name,
                    value->kind == ARRAY_ABSENT ? "missing;" : "not",
                    value->kind == ARRAY_ABSENT ? "a measurement has it" : RECORD_TYPE_NAMES[type]);
}

static kvq_status read_field(const kvq_context *ctx, const arrays_reader *r, const field *f, void *base,
                             kvq_error *err) {
    char        path[ARRAYS_MAX_PATH];
    array_value value = {0};
    field_value v = {0};
    kvq_status  status = get(ctx, r, f->group, f->name, field_stored_as(f), &value, &v, err);
    if (status == KVQ_OK) {
        (void)snprintf(path, sizeof path, "%s@%s", f->group, f->name);
        status = field_set(ctx, f, path, base, &v, err);
        if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", arrays_path(r));
    }
    array_value_free(ctx, &value);
    return status;
}

static kvq_status read_integer(const kvq_context *ctx, const arrays_reader *r, const char *group, const char *name,
                               int64_t low, int64_t high, int64_t *out, kvq_error *err) {
    array_value value = {0};
    field_value v = {0};
    kvq_status  status = get(ctx, r, group, name, RECORD_I64, &value, &v, err);
    array_value_free(ctx, &value);
    if (status != KVQ_OK) return status;
    if (v.number.i < low || v.number.i > high) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s@%s is %" PRId64 ", outside of %" PRId64 " .. %" PRId64,
                        arrays_path(r), group, name, v.number.i, low, high);
    }
    *out = v.number.i;
    return KVQ_OK;
}

static kvq_status check_array(const arrays_reader *r, const char *path, const array_spec *wanted, kvq_error *err) {
    array_spec found;
    char       a[128], b[128];
    kvq_status status = arrays_describe(r, path, &found, err);
    if (status != KVQ_OK) return status;
    if (found.type == wanted->type && found.rank == wanted->rank &&
        memcmp(found.shape, wanted->shape, sizeof found.shape) == 0) {
        return KVQ_OK;
    }
    array_shape_text(&found, a);
    array_shape_text(wanted, b);
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s is %s of the shape %s instead of %s of %s", arrays_path(r), path,
                    kvq_array_type_name(found.type), a, kvq_array_type_name(wanted->type), b);
}

static kvq_status read_fractions(kvq_measurement *m, kvq_error *err) {
    array_spec found;
    kvq_status status = arrays_describe(m->file, FRACTIONS_PATH, &found, err);
    if (status != KVQ_OK) return status;
    if (found.type != KVQ_ARRAY_F64 || found.rank != 1 || found.shape[0] < 1 || found.shape[0] > KVQ_MAX_FRACTIONS) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: " FRACTIONS_PATH " is not a list of 1 to %d f64",
                        arrays_path(m->file), KVQ_MAX_FRACTIONS);
    }
    m->options.n_fractions = (int)found.shape[0];
    return arrays_read(m->file, FRACTIONS_PATH, &found, 0, found.shape[0], m->options.fractions, err);
}

// A number that this version has fixed.
static kvq_status expect_integer(const kvq_context *ctx, const arrays_reader *r, const char *name, int64_t wanted,
                                 kvq_error *err) {
    int64_t    value = 0;
    kvq_status status = read_integer(ctx, r, MEASUREMENT_GROUP, name, 1, INT32_MAX, &value, err);
    if (status != KVQ_OK || value == wanted) return status;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "measure again with this version",
                    "%s: " MEASUREMENT_GROUP "@%s is %" PRId64 "; this is kvq " KVQ_VERSION ", which reads %" PRId64,
                    arrays_path(r), name, value, wanted);
}

// Since 1.1; a file may be without.
static kvq_status read_allocated(const kvq_context *ctx, kvq_measurement *m, kvq_error *err) {
    array_value value = {0};
    int64_t     allocated = 0;
    kvq_status  status = KVQ_OK;
    if (m->minor < 1) return KVQ_OK;
    KVQ_TRY(arrays_get(ctx, m->file, MEASUREMENT_GROUP, "allocated", &value, err));
    if (value.kind == ARRAY_ABSENT) goto done;
    KVQ_TRY(read_integer(ctx, m->file, MEASUREMENT_GROUP, "allocated", 0, 1, &allocated, err));
    m->options.allocated = allocated != 0;
    if (!m->options.allocated) goto done;
    for (size_t i = 0; i < N_ALLOCATED_FIELDS; i++)
        KVQ_TRY(read_field(ctx, m->file, &ALLOCATED_FIELDS[i], &m->options, err));
    for (size_t i = 0; i < N_MEASUREMENT_GRIDS; i++)
        KVQ_TRY(expect_integer(ctx, m->file, MEASUREMENT_GRIDS[i].name, MEASUREMENT_GRIDS[i].value, err));
done:
    array_value_free(ctx, &value);
    return status;
}

static kvq_status read_options(const kvq_context *ctx, kvq_measurement *m, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    array_value text = {0};
    field_value v = {0};
    int64_t     value = 0;
    for (size_t i = 0; i < N_MEASURE_FIELDS; i++)
        KVQ_TRY(read_field(ctx, m->file, &MEASURE_FIELDS[i], &m->options, err));
    KVQ_TRY(read_integer(ctx, m->file, MEASUREMENT_GROUP, "eigenvectors", 0, m->options.moments, &value, err));
    m->eigenvectors = value != 0;
    KVQ_TRY(expect_integer(ctx, m->file, "bins", KVQ_HISTOGRAM_BINS, err));
    KVQ_TRY(read_allocated(ctx, m, err));
    KVQ_TRY(get(ctx, m->file, MEASUREMENT_GROUP, "weightings", RECORD_TEXT, &text, &v, err));
    if (!measurement_weightings_parse(v.text, &m->options.weightings)) {
        status = kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                          "%s: " MEASUREMENT_GROUP "@weightings is '%.80s', not names of weightings in their order",
                          arrays_path(m->file), v.text);
        goto done;
    }
    KVQ_TRY(read_fractions(m, err));
done:
    array_value_free(ctx, &text);
    return status;
}

static kvq_status read_about(const kvq_context *ctx, kvq_measurement *m, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t    n_layers = 0; // decides how much is allocated, a few hundred bytes each
    KVQ_TRY(read_integer(ctx, m->file, "/model", "n_layers", 1, ARTIFACT_MAX_LAYERS, &n_layers, err));
    KVQ_TRY(kvq_artifact_create(ctx, n_layers, &m->about, err));
    for (size_t i = 0; i < N_ARTIFACT_FIELDS; i++) {
        if (measurement_has_field(&ARTIFACT_FIELDS[i]))
            KVQ_TRY(read_field(ctx, m->file, &ARTIFACT_FIELDS[i], m->about, err));
    }
done:
    return status;
}

// ---------------------------------------------------------------- arrays

static kvq_status create_layer(const kvq_context *ctx, const kvq_measurement *m, kvq_measured_layer **out,
                               kvq_error *err) {
    return kvq_measured_layer_create(ctx, &m->options, (int)m->about->model.n_heads, (int)m->about->model.n_kv_heads,
                                     (int)m->about->model.head_dim, out, err);
}

static int heads_of(const kvq_measurement *m, const spectrum_kind *kind) {
    return (int)(kind->of_queries ? m->about->model.n_heads : m->about->model.n_kv_heads);
}

static kvq_status check_spectra(const kvq_measurement *m, int64_t layer, kvq_error *err) {
    char       path[ARRAYS_MAX_PATH];
    int        D = (int)m->about->model.head_dim;
    kvq_status status = KVQ_OK;
    for (int i = 0; i < N_SPECTRA && m->options.moments; i++) {
        array_spec values = measurement_values_spec(heads_of(m, &SPECTRA[i]), D);
        array_spec vectors = measurement_vectors_spec(heads_of(m, &SPECTRA[i]), D);
        measurement_spectrum_path(path, layer, SPECTRA[i].letter, false);
        KVQ_TRY(check_array(m->file, path, &values, err));
        measurement_spectrum_path(path, layer, SPECTRA[i].letter, true);
        if (m->eigenvectors) KVQ_TRY(check_array(m->file, path, &vectors, err));
    }
done:
    return status;
}

// The sizes that a layer in memory follows from are attributes; they are believed when the file holds arrays of them.
static kvq_status check_sizes(const kvq_measurement *m, kvq_error *err) {
    int64_t           Hkv = m->about->model.n_kv_heads, H = m->about->model.n_heads, D = m->about->model.head_dim;
    kvq_measured_part histogram = {"k/0/weight_none", KVQ_PART_F32, 2, {Hkv, KVQ_HISTOGRAM_BINS}, NULL};
    kvq_measured_part moments = {"moments/q", KVQ_PART_F64, 3, {H, D, D}, NULL};
    kvq_measured_part channels = {"k/0/threshold_lower", KVQ_PART_F32, 1, {Hkv * D}, NULL};
    array_spec        specs[] = {measurement_part_spec(&histogram), measurement_part_spec(&moments),
                                 measurement_part_spec(&channels)};
    char              path[ARRAYS_MAX_PATH];
    measurement_part_path(path, 0, &histogram);
    kvq_status status = check_array(m->file, path, &specs[0], err);
    measurement_part_path(path, 0, &channels);
    if (status == KVQ_OK && m->options.allocated) status = check_array(m->file, path, &specs[2], err);
    if (status != KVQ_OK || !m->options.moments) return status;
    measurement_part_path(path, 0, &moments);
    return check_array(m->file, path, &specs[1], err);
}

// What all layers must have follows from an empty one.
static kvq_status check_layers(const kvq_context *ctx, const kvq_measurement *m, kvq_error *err) {
    kvq_measured_layer *empty = NULL;
    kvq_measured_part   part;
    char                path[ARRAYS_MAX_PATH];
    kvq_status          status = check_sizes(m, err);
    if (status != KVQ_OK) return status;
    KVQ_TRY(create_layer(ctx, m, &empty, err));
    for (int64_t layer = 0; layer < m->about->model.n_layers; layer++) {
        for (int i = 0; kvq_measured_layer_parts(empty, i, &part) != 0; i++) {
            array_spec spec = measurement_part_spec(&part);
            measurement_part_path(path, layer, &part);
            KVQ_TRY(check_array(m->file, path, &spec, err));
        }
        KVQ_TRY(check_spectra(m, layer, err));
    }
done:
    kvq_measured_layer_destroy(ctx, &empty);
    return status;
}

// ---------------------------------------------------------------- the file

kvq_status kvq_measurement_open(const kvq_context *ctx, const char *path, kvq_measurement **out, kvq_error *err) {
    kvq_status       status = KVQ_OK;
    kvq_measurement *m = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "measurement", &m, err));
    KVQ_TRY(arrays_open(ctx, path, true, MEASUREMENTS, &m->file, err));
    KVQ_TRY(check_version(ctx, m->file, &m->minor, err));
    KVQ_TRY(read_about(ctx, m, err));
    KVQ_TRY(read_options(ctx, m, err));
    status = measurement_check(m->about, &m->options, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", path);
        goto done;
    }
    KVQ_TRY(check_layers(ctx, m, err));
    *out = m;
    m = NULL;
done:
    kvq_measurement_close(ctx, &m);
    return status;
}

void kvq_measurement_close(const kvq_context *ctx, kvq_measurement **measurement) {
    kvq_measurement *m = *measurement;
    if (m == NULL) return;
    arrays_close(ctx, &m->file);
    kvq_artifact_destroy(ctx, &m->about);
    kvq_free(ctx, m);
    *measurement = NULL;
}

const kvq_artifact        *kvq_measurement_about(const kvq_measurement *m) { return m->about; }
const kvq_measure_options *kvq_measurement_options(const kvq_measurement *m) { return &m->options; }
const char                *kvq_measurement_sha256(const kvq_measurement *m) { return arrays_sha256(m->file); }

static kvq_status check_layer_number(const kvq_measurement *m, int64_t layer, kvq_error *err) {
    if (layer >= 0 && layer < m->about->model.n_layers) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: there is no layer %" PRId64 "; it has %" PRId64,
                    arrays_path(m->file), layer, m->about->model.n_layers);
}

kvq_status kvq_measurement_read(const kvq_context *ctx, const kvq_measurement *measurement, int64_t layer,
                                kvq_measured_layer **out, kvq_error *err) {
    kvq_measured_layer *l = NULL;
    kvq_measured_part   part;
    char                path[ARRAYS_MAX_PATH];
    kvq_status          status = KVQ_OK;
    KVQ_TRY(check_layer_number(measurement, layer, err));
    KVQ_TRY(create_layer(ctx, measurement, &l, err));
    for (int i = 0; kvq_measured_layer_parts(l, i, &part) != 0; i++) {
        array_spec spec = measurement_part_spec(&part);
        measurement_part_path(path, layer, &part);
        KVQ_TRY(arrays_read(measurement->file, path, &spec, 0, spec.shape[0], part.data, err));
    }
    status = measurement_check_values(l, layer, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", arrays_path(measurement->file));
        goto done;
    }
    *out = l;
    l = NULL;
done:
    kvq_measured_layer_destroy(ctx, &l);
    return status;
}

kvq_status kvq_measurement_spectrum(const kvq_context *ctx, const kvq_measurement *measurement, int64_t layer,
                                    char tensor, double *values, kvq_error *err) {
    char       path[ARRAYS_MAX_PATH];
    double    *read = NULL;
    int64_t    n = 0, D = measurement->about->model.head_dim;
    kvq_status status = KVQ_OK;
    for (int i = 0; i < N_SPECTRA && measurement->options.moments; i++) {
        if (SPECTRA[i].letter == tensor) n = heads_of(measurement, &SPECTRA[i]) * D;
    }
    if (n == 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, "measure again with second moments", "%s: there is no spectrum of '%c'",
                        arrays_path(measurement->file), tensor);
    }
    array_spec spec = measurement_values_spec((int)(n / D), (int)D);
    KVQ_TRY(check_layer_number(measurement, layer, err));
    KVQ_TRY(KVQ_NEW(ctx, n, "eigenvalues", &read, err));
    measurement_spectrum_path(path, layer, tensor, false);
    KVQ_TRY(arrays_read(measurement->file, path, &spec, 0, spec.shape[0], read, err));
    for (int64_t i = 0; i < n; i++) {
        if (isfinite(read[i]) && (i % D == 0 || read[i] <= read[i - 1])) continue;
        status = kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s: %s: element %" PRId64 " is %.9g; a head's values descend",
                          arrays_path(measurement->file), path, i, read[i]);
        goto done;
    }
    memcpy(values, read, (size_t)n * sizeof *values);
done:
    kvq_free(ctx, read);
    return status;
}
