// SPDX-License-Identifier: Apache-2.0
//
// Measurement files: their layout, and writing them layer by layer. docs/format.md describes the layout for people;
// reading is in measurement_read.c.
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "measurement_impl.h"

// ---------------------------------------------------------------- the layout

#define NUMBER(name, kind, member, low, high)                                                                          \
    FIELD_NUMBER(kvq_measure_options, MEASUREMENT_GROUP, name, kind, member, low, high, 0, OF_ALL)
#define NAMED(name, member, names) FIELD_NAMED(kvq_measure_options, MEASUREMENT_GROUP, name, member, names, 0, OF_ALL)

const field MEASURE_FIELDS[] = {
    NUMBER("sink_tokens", FIELD_I64, sink_tokens, 0, FIELD_TOKENS_MAX),
    NUMBER("count_sinks", FIELD_BOOL, count_sinks, 0, 1),
    NAMED("k_axis", k_axis, kvq_axis_names),
    NAMED("k_domain", k_domain, kvq_key_domain_names),
    NAMED("threshold_scope", threshold_scope, kvq_scope_names),
    NUMBER("k_slots", FIELD_I64, k_slots, -1, KVQ_BLOCK_MAX_SIDE),
    NAMED("token_range", token_range, kvq_token_range_names),
    NUMBER("half_thresholds", FIELD_BOOL, half_thresholds, 0, 1),
    NUMBER("moments", FIELD_BOOL, moments, 0, 1),
};
const size_t N_MEASURE_FIELDS = sizeof MEASURE_FIELDS / sizeof *MEASURE_FIELDS;

#define ADDED_NAME(name, member, names)                                                                                \
    FIELD_NAMED(kvq_measure_options, MEASUREMENT_GROUP, name, member, names, 1, OF_ALL)

const field ALLOCATED_FIELDS[] = {
    ADDED_NAME("channel_weighting", channel_weighting, kvq_weighting_names),
    FIELD_NUMBER(kvq_measure_options, MEASUREMENT_GROUP, "tile_side", FIELD_I64, tile_side, 0, KVQ_BLOCK_MAX_SIDE, 1,
                 OF_ALL),
    ADDED_NAME("rotation", rotation, kvq_rotation_names),
    ADDED_NAME("scale_format", scale_format, kvq_scale_format_names),
};
const size_t N_ALLOCATED_FIELDS = sizeof ALLOCATED_FIELDS / sizeof *ALLOCATED_FIELDS;

const measurement_grid MEASUREMENT_GRIDS[] = {
    {"channel_bins", KVQ_CHANNEL_BINS},
    {"value_reach", (int64_t)KVQ_VALUE_REACH},
    {"pair_cells", KVQ_PAIR_CELLS},
    {"pair_reach", (int64_t)KVQ_PAIR_REACH},
};
const size_t N_MEASUREMENT_GRIDS = sizeof MEASUREMENT_GRIDS / sizeof *MEASUREMENT_GRIDS;

bool measurement_has_field(const field *f) { return strcmp(f->group, QUANTIZER_GROUP) != 0; }

void measurement_weightings_text(kvq_weighting_set set, char out[WEIGHTINGS_TEXT]) {
    size_t used = 0;
    out[0] = 0;
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (!kvq_weightings_have(set, (kvq_weighting)w)) continue;
        const char *comma = used > 0 ? "," : "";
        used +=
            (size_t)snprintf(out + used, WEIGHTINGS_TEXT - used, "%s%s", comma, kvq_weighting_names[(kvq_weighting)w]);
    }
}

bool measurement_weightings_parse(const char *text, kvq_weighting_set *out) {
    char again[WEIGHTINGS_TEXT];
    for (kvq_weighting_set set = 0; set <= KVQ_WEIGHTINGS_ALL; set++) { // there are sixteen
        measurement_weightings_text(set, again);
        if (strcmp(text, again) != 0) continue;
        *out = set;
        return true;
    }
    return false;
}

static kvq_status check_fractions(const kvq_measure_options *o, kvq_error *err) {
    if (o->n_fractions < 1 || o->n_fractions > KVQ_MAX_FRACTIONS) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, FRACTIONS_PATH ": %d fractions, not between 1 and %d", o->n_fractions,
                        KVQ_MAX_FRACTIONS);
    }
    for (int f = 0; f < o->n_fractions; f++) {
        double x = o->fractions[f];
        if (x >= 0 && x < 1 && (f == 0 || x > o->fractions[f - 1])) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, FRACTIONS_PATH ": element %d is %.9g; they ascend within 0 .. 1", f,
                        x);
    }
    return KVQ_OK;
}

// What the channel-allocated format needs of the rest.
static kvq_status check_allocated(const kvq_artifact *about, const kvq_measure_options *o, kvq_error *err) {
    int64_t D = about->model.head_dim;
    if (!o->allocated) return KVQ_OK;
    if (o->k_axis != KVQ_AXIS_CHANNEL) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        MEASUREMENT_GROUP "@allocated is 1, which needs the k_axis 'channel' instead of '%s'",
                        kvq_axis_names[o->k_axis]);
    }
    if (D >= 2 && D <= KVQ_TILE_MAX_HEAD_DIM) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                    "/model@head_dim is %" PRId64 ", outside of 2 .. %d of the channel-allocated format", D,
                    KVQ_TILE_MAX_HEAD_DIM);
}

kvq_status measurement_check(const kvq_artifact *about, const kvq_measure_options *o, kvq_error *err) {
    int64_t    n_heads = about->model.n_heads, most = (KVQ_NO_CHANNEL - 1) / about->model.head_dim;
    kvq_status status = artifact_check_row_width(about, err);
    if (status == KVQ_OK) status = check_fractions(o, err);
    if (status != KVQ_OK) return status;
    if (n_heads > most || (o->moments && n_heads < 1)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "/model@n_heads is %" PRId64 ", not between %d and %" PRId64 ", as queries need", n_heads,
                        o->moments ? 1 : 0, most);
    }
    if ((o->weightings & ~KVQ_WEIGHTINGS_ALL) != 0 || (o->weightings & KVQ_WEIGHTINGS_BASIC) != KVQ_WEIGHTINGS_BASIC) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, MEASUREMENT_GROUP "@weightings: not a set that has none and range");
    }
    return check_allocated(about, o, err);
}

// ---------------------------------------------------------------- values

// The array that a value lies in, by its address: arrays are known by kvq_measured_layer_parts alone.
static kvq_status bad_value(const kvq_measured_layer *m, int64_t layer, const void *at, double value, const char *why,
                            kvq_error *err) {
    static const size_t SIZES[] = {[KVQ_PART_I64] = 8, [KVQ_PART_F32] = 4, [KVQ_PART_F64] = 8};
    kvq_measured_part   part;
    char                path[ARRAYS_MAX_PATH];
    for (int i = 0; kvq_measured_layer_parts(m, i, &part) != 0; i++) {
        array_spec spec = measurement_part_spec(&part);
        uintptr_t  begin = (uintptr_t)part.data, size = SIZES[part.type] * (uintptr_t)array_elements(&spec);
        if ((uintptr_t)at < begin || (uintptr_t)at >= begin + size) continue;
        measurement_part_path(path, layer, &part);
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s: element %zu is %.9g%s", path,
                        (size_t)((uintptr_t)at - begin) / SIZES[part.type], value, why);
    }
    return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "/layers/%03" PRId64 ": a value is %.9g%s", layer, value, why);
}

static kvq_status check_part(const kvq_measured_layer *m, int64_t layer, const kvq_measured_part *part,
                             kvq_error *err) {
    array_spec spec = measurement_part_spec(part);
    for (int64_t i = 0; i < array_elements(&spec); i++) {
        if (part->type == KVQ_PART_I64) {
            const int64_t *x = (const int64_t *)part->data + i;
            if (*x < 0 && part->data != m->rotated.scale_exponent)
                return bad_value(m, layer, x, (double)*x, ", a negative count", err);
        } else if (part->type == KVQ_PART_F32) {
            const float *x = (const float *)part->data + i;
            if (!isfinite(*x)) return bad_value(m, layer, x, (double)*x, "", err);
        } else {
            const double *x = (const double *)part->data + i;
            if (!isfinite(*x)) return bad_value(m, layer, x, *x, "", err);
        }
    }
    return KVQ_OK;
}

// How positions are cut into bins: n over +-reach; with open ends what lies beyond is in the outermost ones.
typedef struct grid {
    int    n;
    double reach;
    bool   open;
} grid;

static bool is_inside(const grid *g, int i, double x) {
    double width = 2 * g->reach / g->n, low = i * width - g->reach;
    return (x >= low || (g->open && i == 0)) && (x <= low + width || (g->open && i == g->n - 1));
}

static kvq_status check_weight(const kvq_measured_layer *m, int64_t layer, const float *w, kvq_error *err) {
    return *w < 0 ? bad_value(m, layer, w, (double)*w, ", a negative weight", err) : KVQ_OK;
}

// w, x [g->n], or NULL.
static kvq_status check_bins(const kvq_measured_layer *m, int64_t layer, const grid *g, const float *w, const float *x,
                             kvq_error *err) {
    kvq_status status = KVQ_OK;
    for (int i = 0; w != NULL && status == KVQ_OK && i < g->n; i++) {
        status = check_weight(m, layer, &w[i], err);
        if (status == KVQ_OK && w[i] > 0 && !is_inside(g, i, (double)x[i]))
            status = bad_value(m, layer, &x[i], (double)x[i], ", a mean outside of its bin", err);
    }
    return status;
}

static kvq_status check_sums(const kvq_measured_layer *m, int64_t layer, const double *sums, int64_t n,
                             kvq_error *err) {
    for (int64_t i = 0; sums != NULL && i < n; i++) {
        if (sums[i] < 0) return bad_value(m, layer, &sums[i], sums[i], ", a negative sum", err);
    }
    return KVQ_OK;
}

static kvq_status check_tensor(const kvq_measured_layer *m, int64_t layer, const kvq_measured_tensor *t,
                               kvq_error *err) {
    static const grid BINS = {KVQ_HISTOGRAM_BINS, 1, false};
    kvq_status        status = KVQ_OK;
    for (int c = 0; t->lower != NULL && c < m->n_kv_heads * m->head_dim; c++) {
        if (t->lower[c] <= t->upper[c] && isfinite(t->upper[c] - t->lower[c])) continue;
        return bad_value(m, layer, &t->lower[c], (double)t->lower[c], ", not below the upper threshold", err);
    }
    for (int head = 0; head < m->n_kv_heads; head++) {
        const kvq_distribution_sums *sums = t->heads[head].sums;
        const double *squares[] = {&sums->energy, &sums->beyond[0], &sums->beyond[1], &sums->beyond_squared};
        for (int i = 0; i < 4; i++) {
            if (*squares[i] < 0) return bad_value(m, layer, squares[i], *squares[i], ", a negative sum", err);
        }
        for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
            if (sums->w2[w] < 0) return bad_value(m, layer, &sums->w2[w], sums->w2[w], ", a negative sum", err);
            KVQ_TRY(check_bins(m, layer, &BINS, t->heads[head].by[w].w, t->heads[head].by[w].x, err));
        }
    }
done:
    return status;
}

static kvq_status check_channels(const kvq_measured_layer *m, int64_t layer, const kvq_channel_distribution *c,
                                 kvq_error *err) {
    static const grid BINS = {KVQ_CHANNEL_BINS, 1, true}; // of a channel without slots everything counts
    int64_t           d = (int64_t)m->n_kv_heads * m->head_dim;
    kvq_status        status = check_sums(m, layer, c->scatter, d, err);
    for (int64_t i = 0; c->w != NULL && status == KVQ_OK && i < d; i++)
        status = check_bins(m, layer, &BINS, c->w + i * BINS.n, c->x + i * BINS.n, err);
    return status;
}

static kvq_status check_pairs(const kvq_measured_layer *m, int64_t layer, const kvq_value_distribution *v,
                              kvq_error *err) {
    static const grid CELLS = {KVQ_PAIR_CELLS, (double)KVQ_PAIR_REACH, true};
    kvq_status        status = KVQ_OK;
    for (int i = 0; v->pair_w != NULL && status == KVQ_OK && i < CELLS.n * CELLS.n; i++) {
        const float *bad = is_inside(&CELLS, i / CELLS.n, (double)v->pair_x[i]) ? &v->pair_y[i] : &v->pair_x[i];
        bool         inside = bad == &v->pair_y[i] && is_inside(&CELLS, i % CELLS.n, (double)v->pair_y[i]);
        status = check_weight(m, layer, &v->pair_w[i], err);
        if (status == KVQ_OK && v->pair_w[i] > 0 && !inside)
            status = bad_value(m, layer, bad, (double)*bad, ", a mean outside of its cell", err);
    }
    return status;
}

static kvq_status check_rotated(const kvq_measured_layer *m, int64_t layer, kvq_error *err) {
    static const grid             BINS = {KVQ_HISTOGRAM_BINS, (double)KVQ_VALUE_REACH, true};
    const kvq_value_distribution *v = &m->rotated;
    kvq_status                    status = check_bins(m, layer, &BINS, v->w, v->x, err);
    if (status == KVQ_OK) status = check_pairs(m, layer, v, err);
    if (status == KVQ_OK) status = check_sums(m, layer, v->scatter, 2, err);
    if (status != KVQ_OK || v->scale_exponent == NULL || llabs(*v->scale_exponent) <= SCALE_EXPONENT_MAX) return status;
    return bad_value(m, layer, v->scale_exponent, (double)*v->scale_exponent, ", beyond what a scale may have", err);
}

static kvq_status check_kl(const kvq_measured_layer *m, int64_t layer, kvq_error *err) {
    for (int i = 0; m->kl != NULL && i < 2; i++) {
        if (m->kl[i] < 0) return bad_value(m, layer, &m->kl[i], m->kl[i], ", a negative divergence", err);
    }
    return KVQ_OK;
}

kvq_status measurement_check_values(const kvq_measured_layer *m, int64_t layer, kvq_error *err) {
    kvq_measured_part part;
    kvq_status        status = KVQ_OK;
    for (int i = 0; kvq_measured_layer_parts(m, i, &part) != 0; i++) KVQ_TRY(check_part(m, layer, &part, err));
    for (int f = 0; f < m->n_fractions; f++) {
        KVQ_TRY(check_tensor(m, layer, &m->k[f], err));
        KVQ_TRY(check_tensor(m, layer, &m->v[f], err));
        KVQ_TRY(check_channels(m, layer, &m->k[f].channels, err));
    }
    KVQ_TRY(check_rotated(m, layer, err));
    KVQ_TRY(check_kl(m, layer, err));
done:
    return status;
}

// ---------------------------------------------------------------- arrays

#define CHUNK_BYTES ((int64_t)4 << 20)
#define SMALL_BYTES 4096 // in one piece: describing chunks would take more than they save

// Whole rows of at most 4 MiB; histograms are sparse or smooth, so they shrink.
static array_spec stored(array_spec spec) {
    int64_t row = array_row_bytes(&spec);
    if (row * spec.shape[0] < SMALL_BYTES) return spec;
    int64_t rows = row > CHUNK_BYTES ? 1 : CHUNK_BYTES / row;
    memcpy(spec.chunk, spec.shape, sizeof spec.chunk);
    if (rows < spec.chunk[0]) spec.chunk[0] = rows;
    spec.deflate = true;
    return spec;
}

array_spec measurement_part_spec(const kvq_measured_part *part) {
    static const kvq_array_type TYPES[] = {
        [KVQ_PART_I64] = KVQ_ARRAY_I64, [KVQ_PART_F32] = KVQ_ARRAY_F32, [KVQ_PART_F64] = KVQ_ARRAY_F64};
    array_spec spec = {.type = TYPES[part->type], .rank = part->n_dims};
    memcpy(spec.shape, part->dims, (size_t)part->n_dims * sizeof *part->dims);
    return stored(spec);
}

void measurement_part_path(char out[ARRAYS_MAX_PATH], int64_t layer, const kvq_measured_part *part) {
    (void)snprintf(out, ARRAYS_MAX_PATH, "/layers/%03" PRId64 "/%s", layer, part->name);
}

const spectrum_kind SPECTRA[N_SPECTRA] = {{'q', true}, {'k', false}, {'v', false}};

array_spec measurement_values_spec(int n_heads, int head_dim) {
    array_spec spec = {.type = KVQ_ARRAY_F64, .rank = 2, .shape = {n_heads, head_dim}};
    return stored(spec);
}

array_spec measurement_vectors_spec(int n_heads, int head_dim) {
    array_spec spec = {.type = KVQ_ARRAY_F64, .rank = 3, .shape = {n_heads, head_dim, head_dim}};
    return stored(spec);
}

void measurement_spectrum_path(char out[ARRAYS_MAX_PATH], int64_t layer, char letter, bool vectors) {
    (void)snprintf(out, ARRAYS_MAX_PATH, "/layers/%03" PRId64 "/spectrum/%c%s", layer, letter,
                   vectors ? "_vectors" : "");
}

// ---------------------------------------------------------------- writing

struct kvq_measurement_writer {
    arrays_writer      *file;
    char               *path;
    kvq_measure_options options;
    int64_t             n_layers;
    int                 n_heads, n_kv_heads, head_dim;
    bool                eigenvectors;
    bool               *put; // [n_layers]
};

static kvq_status write_field(const kvq_measurement_writer *w, const field *f, const void *base, kvq_error *err) {
    char        path[ARRAYS_MAX_PATH];
    field_value v = {0};
    (void)snprintf(path, sizeof path, "%s@%s", f->group, f->name);
    kvq_status status = field_get(f, path, base, &v, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", w->path);
        return status;
    }
    switch (v.type) {
    case RECORD_I64:
        return arrays_put_i64(w->file, f->group, f->name, v.number.i, err);
    case RECORD_U64:
        return arrays_put_u64(w->file, f->group, f->name, v.number.u, err);
    case RECORD_F64:
        return arrays_put_f64(w->file, f->group, f->name, v.number.f, err);
    default:
        return arrays_put_text(w->file, f->group, f->name, v.text, err);
    }
}

static kvq_status write_allocated(const kvq_measurement_writer *w, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (!w->options.allocated) return KVQ_OK;
    KVQ_TRY(arrays_put_i64(w->file, MEASUREMENT_GROUP, "allocated", 1, err));
    for (size_t i = 0; i < N_ALLOCATED_FIELDS; i++) KVQ_TRY(write_field(w, &ALLOCATED_FIELDS[i], &w->options, err));
    for (size_t i = 0; i < N_MEASUREMENT_GRIDS; i++) {
        const measurement_grid *g = &MEASUREMENT_GRIDS[i];
        KVQ_TRY(arrays_put_i64(w->file, MEASUREMENT_GROUP, g->name, g->value, err));
    }
done:
    return status;
}

// What `allocated` adds disturbs no reader of 1.0, which fits the rest.
static kvq_status write_attributes(const kvq_measurement_writer *w, const kvq_artifact *about, kvq_error *err) {
    const char *const labels[][2] = {
        {"kvq_format", MEASUREMENT_FORMAT},
        {"kvq_format_version", w->options.allocated ? "1.1" : "1.0"},
        {"kvq_min_reader", "1.0"},
        {"producer", "kvq"},
    };
    kvq_status status = KVQ_OK;
    char       text[WEIGHTINGS_TEXT];
    array_spec fractions = {.type = KVQ_ARRAY_F64, .rank = 1, .shape = {w->options.n_fractions}};
    for (size_t i = 0; i < sizeof labels / sizeof *labels; i++)
        KVQ_TRY(arrays_put_text(w->file, "/", labels[i][0], labels[i][1], err));
    for (size_t i = 0; i < N_ARTIFACT_FIELDS; i++) {
        if (measurement_has_field(&ARTIFACT_FIELDS[i])) KVQ_TRY(write_field(w, &ARTIFACT_FIELDS[i], about, err));
    }
    for (size_t i = 0; i < N_MEASURE_FIELDS; i++) KVQ_TRY(write_field(w, &MEASURE_FIELDS[i], &w->options, err));
    measurement_weightings_text(w->options.weightings, text);
    KVQ_TRY(arrays_put_text(w->file, MEASUREMENT_GROUP, "weightings", text, err));
    KVQ_TRY(arrays_put_i64(w->file, MEASUREMENT_GROUP, "bins", KVQ_HISTOGRAM_BINS, err));
    KVQ_TRY(arrays_put_i64(w->file, MEASUREMENT_GROUP, "eigenvectors", w->eigenvectors, err));
    KVQ_TRY(write_allocated(w, err));
    KVQ_TRY(arrays_create(w->file, FRACTIONS_PATH, &fractions, err));
    KVQ_TRY(arrays_write(w->file, FRACTIONS_PATH, 0, fractions.shape[0], w->options.fractions, err));
done:
    return status;
}

kvq_status kvq_measurement_create(const kvq_context *ctx, const char *path, bool force, const kvq_artifact *about,
                                  const kvq_measure_options *options, bool eigenvectors, kvq_measurement_writer **out,
                                  kvq_error *err) {
    kvq_status              status = measurement_check(about, options, err);
    kvq_measurement_writer *w = NULL;
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", path);
        return status;
    }
    KVQ_TRY(KVQ_NEW(ctx, 1, "measurement writer", &w, err));
    w->options = *options;
    w->n_layers = about->model.n_layers;
    w->n_heads = (int)about->model.n_heads;
    w->n_kv_heads = (int)about->model.n_kv_heads;
    w->head_dim = (int)about->model.head_dim;
    w->eigenvectors = eigenvectors && options->moments;
    w->path = kvq_strdup(ctx, path);
    if (w->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "no memory for the name %s", path);
        goto done;
    }
    KVQ_TRY(KVQ_NEW(ctx, w->n_layers, "list of measured layers", &w->put, err));
    KVQ_TRY(arrays_begin(ctx, path, force, &w->file, err));
    KVQ_TRY(write_attributes(w, about, err));
    *out = w;
    w = NULL;
done:
    kvq_measurement_discard(ctx, &w);
    return status;
}

static kvq_status put_array(const kvq_measurement_writer *w, const char *path, const array_spec *spec, const void *data,
                            kvq_error *err) {
    kvq_status status = arrays_create(w->file, path, spec, err);
    return status == KVQ_OK ? arrays_write(w->file, path, 0, spec->shape[0], data, err) : status;
}

// One tensor at a time: Q alone may have as many heads as K and V together. The vectors are always computed, because
// without them LAPACK takes another way to the values, and these should not depend on what else is stored.
static kvq_status put_spectrum(const kvq_context *ctx, const kvq_measurement_writer *w, int64_t layer,
                               const spectrum_kind *kind, const double *moments, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int        n_heads = kind->of_queries ? w->n_heads : w->n_kv_heads;
    array_spec spec = measurement_values_spec(n_heads, w->head_dim);
    array_spec vectors_spec = measurement_vectors_spec(n_heads, w->head_dim);
    double    *values = NULL, *vectors = NULL;
    char       path[ARRAYS_MAX_PATH];
    KVQ_TRY(KVQ_NEW(ctx, array_elements(&spec), "eigenvalues", &values, err));
    KVQ_TRY(KVQ_NEW(ctx, array_elements(&vectors_spec), "eigenvectors", &vectors, err));
    KVQ_TRY(kvq_spectrum(ctx, moments, n_heads, w->head_dim, values, vectors, err));
    measurement_spectrum_path(path, layer, kind->letter, false);
    KVQ_TRY(put_array(w, path, &spec, values, err));
    measurement_spectrum_path(path, layer, kind->letter, true);
    if (w->eigenvectors) KVQ_TRY(put_array(w, path, &vectors_spec, vectors, err));
done:
    kvq_free(ctx, vectors);
    kvq_free(ctx, values);
    return status;
}

static bool fits(const kvq_measurement_writer *w, int64_t layer, const kvq_measured_layer *m) {
    return layer >= 0 && layer < w->n_layers && !w->put[layer] && m->n_fractions == w->options.n_fractions &&
           m->n_heads == w->n_heads && m->n_kv_heads == w->n_kv_heads && m->head_dim == w->head_dim &&
           m->weightings == w->options.weightings && (m->moments.q != NULL) == w->options.moments &&
           (m->kl != NULL) == w->options.allocated;
}

kvq_status kvq_measurement_put(const kvq_context *ctx, kvq_measurement_writer *writer, int64_t layer,
                               const kvq_measured_layer *measured, kvq_error *err) {
    kvq_status        status = KVQ_OK;
    kvq_measured_part part;
    char              path[ARRAYS_MAX_PATH];
    if (!fits(writer, layer, measured)) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL,
                        "%s: layer %" PRId64 " is put twice, or is not what the options say", writer->path, layer);
    }
    status = measurement_check_values(measured, layer, err);
    if (status != KVQ_OK) {
        kvq_error_prefix(err, "%s: ", writer->path);
        return status;
    }
    for (int i = 0; kvq_measured_layer_parts(measured, i, &part) != 0; i++) {
        array_spec spec = measurement_part_spec(&part);
        measurement_part_path(path, layer, &part);
        KVQ_TRY(put_array(writer, path, &spec, part.data, err));
    }
    for (int i = 0; i < N_SPECTRA && writer->options.moments; i++) {
        const double *moments[N_SPECTRA] = {measured->moments.q, measured->moments.k, measured->moments.v};
        KVQ_TRY(put_spectrum(ctx, writer, layer, &SPECTRA[i], moments[i], err));
    }
    writer->put[layer] = true;
done:
    return status;
}

kvq_status kvq_measurement_commit(const kvq_context *ctx, kvq_measurement_writer **writer, char sha256[KVQ_SHA256_HEX],
                                  kvq_error *err) {
    kvq_measurement_writer *w = *writer;
    kvq_status              status = KVQ_OK;
    for (int64_t layer = 0; layer < w->n_layers; layer++) {
        if (w->put[layer]) continue;
        status = kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "%s: layer %" PRId64 " was never put", w->path, layer);
        goto done;
    }
    KVQ_TRY(arrays_commit(ctx, &w->file, sha256, err));
done:
    kvq_measurement_discard(ctx, writer);
    return status;
}

void kvq_measurement_discard(const kvq_context *ctx, kvq_measurement_writer **writer) {
    kvq_measurement_writer *w = *writer;
    if (w == NULL) return;
    arrays_discard(ctx, &w->file);
    kvq_free(ctx, w->put);
    kvq_free(ctx, w->path);
    kvq_free(ctx, w);
    *writer = NULL;
}
