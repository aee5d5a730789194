// SPDX-License-Identifier: Apache-2.0
//
// Capture files: their attributes as a table, their arrays by layer and part, and the checks on both. The layout is in
// docs/format.md; files come from other programs too and are not trusted.
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "arrays.h"

#define CAPTURE_FORMAT "kvq.capture"
#define CAPTURE_MAJOR  1 // other numbers are refused; minor numbers grow when something is added
#define CAPTURE_MINOR  0

#define CHUNK_BYTES ((int64_t)4 << 20)
#define COUNT_MAX   0x1p53      // counts beyond this are damage
#define MAX_WIDTH   65534       // heads * D; u16 channel numbers and one value that means none
#define MAX_TOKENS  (1LL << 31) // N and S each
#define TOKEN_IDS   "/dataset/token_ids"

const char *const kvq_capture_part_names[KVQ_CAPTURE_N_PARTS] = {"k", "v", "q", "fisher_k", "fisher_v"};

// ---------------------------------------------------------------- the attributes

typedef enum field_kind { FIELD_TEXT, FIELD_HASH, FIELD_I64, FIELD_U64, FIELD_F64, FIELD_BOOL } field_kind;

typedef struct field {
    const char *group, *name;
    field_kind  kind;
    size_t      at, bytes; // in kvq_capture_info; bytes for texts
    double      low, high; // i64, f64
    bool        required;
} field;

#define SIZE_OF(member) sizeof(((kvq_capture_info *)NULL)->member)
#define FIELD(group, name, kind, member, low, high, required)                                                          \
    { "/" #group, #name, kind, offsetof(kvq_capture_info, member), SIZE_OF(member), low, high, required }

static const field FIELDS[] = {
    FIELD(model, architecture, FIELD_TEXT, model.architecture, 0, 0, false),
    FIELD(model, name, FIELD_TEXT, model.name, 0, 0, false),
    FIELD(model, config_sha256, FIELD_HASH, model.config_sha256, 0, 0, false),
    FIELD(model, weights_sha256, FIELD_HASH, model.weights_sha256, 0, 0, false),
    FIELD(model, n_layers, FIELD_I64, model.n_layers, 1, KVQ_CAPTURE_MAX_LAYERS, true),
    FIELD(model, n_kv_heads, FIELD_I64, model.n_kv_heads, 1, MAX_WIDTH, true),
    FIELD(model, head_dim, FIELD_I64, model.head_dim, 1, MAX_WIDTH, true),
    FIELD(model, n_heads, FIELD_I64, model.n_heads, 0, MAX_WIDTH, false),
    FIELD(model, hidden_size, FIELD_I64, model.hidden_size, 0, COUNT_MAX, false),
    FIELD(model, vocab_size, FIELD_I64, model.vocab_size, 0, COUNT_MAX, false),
    FIELD(model, n_tensors, FIELD_I64, model.n_tensors, 0, COUNT_MAX, false),
    FIELD(model, rope_theta, FIELD_F64, model.rope_theta, 0, DBL_MAX, false),
    FIELD(model, rope_type, FIELD_TEXT, model.rope_type, 0, 0, false),
    FIELD(model, dtype, FIELD_TEXT, model.dtype, 0, 0, false),
    FIELD(tokenizer, kind, FIELD_TEXT, tokenizer.kind, 0, 0, false),
    FIELD(tokenizer, sha256, FIELD_HASH, tokenizer.sha256, 0, 0, false),
    FIELD(tokenizer, bos_added, FIELD_BOOL, tokenizer.bos_added, 0, 1, false),
    FIELD(dataset, source, FIELD_TEXT, dataset.source, 0, 0, false),
    FIELD(dataset, source_sha256, FIELD_HASH, dataset.source_sha256, 0, 0, false),
    FIELD(dataset, n_available_tokens, FIELD_I64, dataset.n_available_tokens, 0, COUNT_MAX, false),
    FIELD(dataset, seed, FIELD_U64, dataset.seed, 0, 0, false),
    FIELD(dataset, baseline_nll, FIELD_F64, dataset.baseline_nll, 0, DBL_MAX, false),
};
#define N_FIELDS (sizeof FIELDS / sizeof *FIELDS)

static const void *member_of(const kvq_capture_info *info, const field *f) { return (const char *)info + f->at; }

static kvq_status check_number(const char *file, const field *f, double value, kvq_error *err) {
    if (isnan(value) || isinf(value))
        return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s: %s@%s is %g", file, f->group, f->name, value);
    if (value < f->low || value > f->high) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s@%s is %.17g, outside of %g .. %g", file, f->group, f->name,
                        value, f->low, f->high);
    }
    return KVQ_OK;
}

static kvq_status check_hash(const char *file, const field *f, const char *hex, kvq_error *err) {
    size_t n = strlen(hex);
    if ((n == 0 || n == KVQ_SHA256_HEX - 1) && strspn(hex, "0123456789abcdef") == n) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, "leave it out when it is not known",
                    "%s: %s@%s: '%.80s' is not a SHA-256 in lower-case hexadecimal", file, f->group, f->name, hex);
}

// ---------------------------------------------------------------- the arrays

bool kvq_capture_has_layer(const kvq_capture_info *info, int64_t layer) {
    if (layer < 0 || layer >= KVQ_CAPTURE_MAX_LAYERS) return false;
    return (info->layers[layer / 8] >> (layer % 8) & 1) != 0;
}

void kvq_capture_add_layer(kvq_capture_info *info, int64_t layer) {
    info->layers[layer / 8] = (uint8_t)(info->layers[layer / 8] | 1u << (layer % 8));
}

static bool is_fisher(kvq_capture_part part) { return part == KVQ_CAPTURE_FISHER_K || part == KVQ_CAPTURE_FISHER_V; }

static bool has_part(const kvq_capture_info *info, kvq_capture_part part) {
    return part == KVQ_CAPTURE_Q ? info->has_query : is_fisher(part) ? info->has_fisher : true;
}

static int64_t heads_of(const kvq_capture_info *info, kvq_capture_part part) {
    return part == KVQ_CAPTURE_Q ? info->model.n_heads : info->model.n_kv_heads;
}

// Squared gradients span more decades than f16 has.
static array_spec spec_of(const kvq_capture_info *info, kvq_capture_part part) {
    array_spec spec = {is_fisher(part) ? KVQ_ARRAY_F32 : info->type,
                       4,
                       {info->dataset.n_windows, info->dataset.seq_len, heads_of(info, part), info->model.head_dim},
                       {0},
                       false};
    // one window or an equal part of it
    int64_t n_parts = (array_row_bytes(&spec) + CHUNK_BYTES - 1) / CHUNK_BYTES;
    if (n_parts > info->dataset.seq_len) n_parts = info->dataset.seq_len;
    memcpy(spec.chunk, spec.shape, sizeof spec.chunk);
    spec.chunk[0] = 1;
    spec.chunk[1] = (info->dataset.seq_len + n_parts - 1) / n_parts;
    return spec;
}

static void layer_path(char out[ARRAYS_MAX_PATH], int64_t layer, kvq_capture_part part) {
    (void)snprintf(out, ARRAYS_MAX_PATH, "/layers/%03" PRId64 "/%s", layer, kvq_capture_part_names[part]);
}

static int64_t count_layers(const kvq_capture_info *info) {
    int64_t n = 0;
    for (int64_t layer = 0; layer < info->model.n_layers; layer++) n += kvq_capture_has_layer(info, layer);
    return n;
}

int64_t kvq_capture_bytes(const kvq_capture_info *info) {
    int64_t per_layer = 0;
    for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
        array_spec spec = spec_of(info, part);
        if (has_part(info, part)) per_layer += array_row_bytes(&spec) * info->dataset.n_windows;
    }
    int64_t ids = info->has_ids ? 4 * info->dataset.n_windows * info->dataset.seq_len : 0;
    return per_layer * count_layers(info) + ids;
}

// What every capture obeys, written or read.
static kvq_status check_info(const char *file, const kvq_capture_info *info, kvq_error *err) {
    int64_t heads = info->model.n_heads > info->model.n_kv_heads ? info->model.n_heads : info->model.n_kv_heads;
    for (size_t i = 0; i < N_FIELDS; i++) {
        const field *f = &FIELDS[i];
        const void  *value = member_of(info, f);
        kvq_status   status = KVQ_OK;
        if (f->kind == FIELD_HASH) status = check_hash(file, f, value, err);
        if (f->kind == FIELD_F64) status = check_number(file, f, *(const double *)value, err);
        if (f->kind == FIELD_I64) status = check_number(file, f, (double)*(const int64_t *)value, err);
        if (status != KVQ_OK) return status;
    }
    if (heads * info->model.head_dim > MAX_WIDTH) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s: %" PRId64 " heads of %" PRId64 " channels; at most %d",
                        file, heads, info->model.head_dim, MAX_WIDTH);
    }
    if (info->has_query && info->model.n_heads == 0)
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: there are queries, but /model@n_heads is missing", file);
    return KVQ_OK;
}

// ---------------------------------------------------------------- numbers on their way

// A window of one part, for messages.
typedef struct window_of {
    const char             *file;
    const kvq_capture_info *info;
    kvq_capture_part        part;
    int64_t                 layer, window;
} window_of;

static kvq_status bad_value(const window_of *w, int64_t i, double value, const char *what, const char *next,
                            kvq_error *err) {
    char    path[ARRAYS_MAX_PATH];
    int64_t width = heads_of(w->info, w->part) * w->info->model.head_dim;
    layer_path(path, w->layer, w->part);
    return kvq_fail(err, KVQ_ERR_NUMERICAL, next,
                    "%s: %s: window %" PRId64 ", position %" PRId64 ", channel %" PRId64 " is %.9g%s", w->file, path,
                    w->window, i / width, i % width, value, what);
}

static kvq_status check_values(const window_of *w, const float *x, int64_t n, kvq_error *err) {
    static const char NEXT[] = "check the model and the program that captured it";
    int64_t           at = kvq_find_nonfinite(x, n);
    if (at >= 0) return bad_value(w, at, (double)x[at], "", NEXT, err);
    for (int64_t i = 0; is_fisher(w->part) && i < n; i++) {
        if (x[i] < 0) return bad_value(w, i, (double)x[i], ", although a square", NEXT, err);
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- writing

struct kvq_capture_writer {
    arrays_writer   *file;
    char            *path;
    kvq_capture_info info;
    uint16_t        *half; // one window of the widest part
    bool            *put;  // [KVQ_CAPTURE_N_PARTS, n_layers, N]
};

static bool *put_flag(const kvq_capture_writer *w, kvq_capture_part part, int64_t layer, int64_t window) {
    return &w->put[((int64_t)part * w->info.model.n_layers + layer) * w->info.dataset.n_windows + window];
}

static kvq_status check_request(const char *path, const kvq_capture_info *info, kvq_error *err) {
    kvq_status status = check_info(path, info, err);
    if (status != KVQ_OK) return status;
    if (info->type != KVQ_ARRAY_F16 && info->type != KVQ_ARRAY_F32) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s: captures are written as f16 or f32, not %s", path,
                        kvq_array_type_name(info->type));
    }
    if (info->dataset.n_windows < 1 || info->dataset.n_windows > MAX_TOKENS || info->dataset.seq_len < 1 ||
        info->dataset.seq_len > MAX_TOKENS || count_layers(info) == 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s: %" PRId64 " layers, %" PRId64 " windows of %" PRId64 " tokens",
                        path, count_layers(info), info->dataset.n_windows, info->dataset.seq_len);
    }
    return KVQ_OK;
}

static kvq_status create_arrays(const kvq_capture_writer *w, kvq_error *err) {
    char path[ARRAYS_MAX_PATH];
    for (int64_t layer = 0; layer < w->info.model.n_layers; layer++) {
        for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
            if (!kvq_capture_has_layer(&w->info, layer) || !has_part(&w->info, part)) continue;
            array_spec spec = spec_of(&w->info, part);
            layer_path(path, layer, part);
            kvq_status status = arrays_create(w->file, path, &spec, err);
            if (status != KVQ_OK) return status;
        }
    }
    return KVQ_OK;
}

static kvq_status write_ids(const kvq_capture_writer *w, const int32_t *ids, kvq_error *err) {
    array_spec spec = {KVQ_ARRAY_I32, 2, {w->info.dataset.n_windows, w->info.dataset.seq_len}, {0}, false};
    if (ids == NULL) return KVQ_OK;
    kvq_status status = arrays_create(w->file, TOKEN_IDS, &spec, err);
    return status == KVQ_OK ? arrays_write(w->file, TOKEN_IDS, 0, spec.shape[0], ids, err) : status;
}

kvq_status kvq_capture_create(const kvq_context *ctx, const char *path, bool force, const kvq_capture_info *info,
                              const int32_t *ids, kvq_capture_writer **out, kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_capture_writer *w = NULL;
    KVQ_TRY(check_request(path, info, err));
    KVQ_TRY(KVQ_NEW(ctx, 1, "capture writer", &w, err));
    w->info = *info;
    w->info.has_ids = ids != NULL;
    w->path = kvq_strdup(ctx, path);
    if (w->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "no memory for the name %s", path);
        goto done;
    }
    int64_t n_flags = info->model.n_layers * KVQ_CAPTURE_N_PARTS * info->dataset.n_windows;
    KVQ_TRY(KVQ_NEW(ctx, n_flags, "list of captured windows", &w->put, err));
    if (info->type == KVQ_ARRAY_F16) {
        int64_t heads = info->has_query && info->model.n_heads > info->model.n_kv_heads ? info->model.n_heads
                                                                                        : info->model.n_kv_heads;
        int64_t n = info->dataset.seq_len * heads * info->model.head_dim;
        KVQ_TRY(KVQ_NEW(ctx, n, "window as f16", &w->half, err));
    }
    KVQ_TRY(arrays_begin(ctx, path, force, &w->file, err));
    KVQ_TRY(create_arrays(w, err));
    KVQ_TRY(write_ids(w, ids, err));
    *out = w;
    w = NULL;
done:
    kvq_capture_discard(ctx, &w);
    return status;
}

static kvq_status to_half(const window_of *w, const float *x, int64_t n, uint16_t *half, kvq_error *err) {
    for (int64_t i = 0; i < n; i++) {
        half[i] = kvq_half_of_float(x[i]);
        if ((half[i] & 0x7fffu) == 0x7c00u)
            return bad_value(w, i, (double)x[i], ", more than f16 holds", "capture as f32 (--dtype f32)", err);
    }
    return KVQ_OK;
}

kvq_status kvq_capture_put(kvq_capture_writer *writer, kvq_capture_part part, int64_t layer, int64_t window,
                           const float *x, kvq_error *err) {
    const kvq_capture_info *info = &writer->info;
    window_of               w = {writer->path, info, part, layer, window};
    char                    path[ARRAYS_MAX_PATH];
    const void             *data = x;
    if (!kvq_capture_has_layer(info, layer) || layer >= info->model.n_layers || !has_part(info, part) || window < 0 ||
        window >= info->dataset.n_windows) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "%s: layer %" PRId64 ", %s, window %" PRId64 " has no place",
                        writer->path, layer, kvq_capture_part_names[part], window);
    }
    array_spec spec = spec_of(info, part);
    int64_t    n = array_elements(&spec) / info->dataset.n_windows;
    kvq_status status = check_values(&w, x, n, err);
    if (status == KVQ_OK && spec.type == KVQ_ARRAY_F16) {
        status = to_half(&w, x, n, writer->half, err);
        data = writer->half;
    }
    if (status != KVQ_OK) return status;
    layer_path(path, layer, part);
    status = arrays_write(writer->file, path, window, 1, data, err);
    if (status == KVQ_OK) *put_flag(writer, part, layer, window) = true;
    return status;
}

static kvq_status check_complete(const kvq_capture_writer *w, kvq_error *err) {
    char path[ARRAYS_MAX_PATH];
    for (int64_t layer = 0; layer < w->info.model.n_layers; layer++) {
        for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
            if (!kvq_capture_has_layer(&w->info, layer) || !has_part(&w->info, part)) continue;
            for (int64_t window = 0; window < w->info.dataset.n_windows; window++) {
                if (*put_flag(w, part, layer, window)) continue;
                layer_path(path, layer, part);
                return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "%s: %s: window %" PRId64 " was never captured", w->path,
                                path, window);
            }
        }
    }
    return KVQ_OK;
}

static kvq_status write_field(const kvq_capture_writer *w, const field *f, kvq_error *err) {
    const void *value = member_of(&w->info, f);
    switch (f->kind) {
    case FIELD_TEXT:
    case FIELD_HASH:
        return arrays_put_text(w->file, f->group, f->name, value, err);
    case FIELD_I64:
        return arrays_put_i64(w->file, f->group, f->name, *(const int64_t *)value, err);
    case FIELD_U64:
        return arrays_put_u64(w->file, f->group, f->name, *(const uint64_t *)value, err);
    case FIELD_F64:
        return arrays_put_f64(w->file, f->group, f->name, *(const double *)value, err);
    default:
        return arrays_put_i64(w->file, f->group, f->name, *(const bool *)value ? 1 : 0, err);
    }
}

static kvq_status write_attributes(const kvq_capture_writer *w, kvq_error *err) {
    static const char *const LABELS[][2] = {
        {"kvq_format", CAPTURE_FORMAT},
        {"kvq_format_version", "1.0"},
        {"producer", "kvq"},
        {"producer_version", KVQ_VERSION},
    };
    kvq_status status = KVQ_OK;
    for (size_t i = 0; i < sizeof LABELS / sizeof *LABELS && status == KVQ_OK; i++)
        status = arrays_put_text(w->file, "/", LABELS[i][0], LABELS[i][1], err);
    for (size_t i = 0; i < N_FIELDS && status == KVQ_OK; i++) status = write_field(w, &FIELDS[i], err);
    return status;
}

kvq_status kvq_capture_commit(const kvq_context *ctx, kvq_capture_writer **writer, double baseline_nll,
                              kvq_error *err) {
    kvq_capture_writer *w = *writer;
    kvq_status          status = KVQ_OK;
    w->info.dataset.baseline_nll = baseline_nll;
    KVQ_TRY(check_info(w->path, &w->info, err));
    KVQ_TRY(check_complete(w, err));
    KVQ_TRY(write_attributes(w, err));
    KVQ_TRY(arrays_commit(ctx, &w->file, NULL, err));
done:
    kvq_capture_discard(ctx, writer);
    return status;
}

void kvq_capture_discard(const kvq_context *ctx, kvq_capture_writer **writer) {
    kvq_capture_writer *w = *writer;
    if (w == NULL) return;
    arrays_discard(ctx, &w->file);
    kvq_free(ctx, w->put);
    kvq_free(ctx, w->half);
    kvq_free(ctx, w->path);
    kvq_free(ctx, w);
    *writer = NULL;
}

// ---------------------------------------------------------------- reading: the description

typedef array_spec part_specs[KVQ_CAPTURE_N_PARTS];

struct kvq_capture {
    arrays_reader   *file;
    kvq_capture_info info;
    part_specs      *specs; // [n_layers]
    array_spec       ids;
    void            *stored; // one window as it lies in the file, where that is not f32
};

static kvq_status wrong_kind(const arrays_reader *r, const field *f, const char *wanted, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s@%s is not %s", arrays_path(r), f->group, f->name, wanted);
}

static bool real_of(const array_value *value, double *out) {
    if (value->kind == ARRAY_REAL) *out = value->real;
    if (value->kind == ARRAY_INTEGER) *out = (double)value->integer;
    if (value->kind == ARRAY_UNSIGNED) *out = (double)value->unsigned_integer;
    return value->kind == ARRAY_REAL || value->kind == ARRAY_INTEGER || value->kind == ARRAY_UNSIGNED;
}

static kvq_status set_text(const arrays_reader *r, const field *f, const array_value *value, char *out,
                           kvq_error *err) {
    if (value->kind != ARRAY_TEXT) return wrong_kind(r, f, "a text", err);
    if (strlen(value->text) < f->bytes) {
        strcpy(out, value->text);
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s@%s is a text of %zu bytes; at most %zu", arrays_path(r), f->group,
                    f->name, strlen(value->text), f->bytes - 1);
}

static kvq_status set_bool(const arrays_reader *r, const field *f, const array_value *value, bool *out,
                           kvq_error *err) {
    if (value->kind != ARRAY_INTEGER || value->integer < 0 || value->integer > 1)
        return wrong_kind(r, f, "a bool, 0 or 1", err);
    *out = value->integer != 0;
    return KVQ_OK;
}

static kvq_status set_field(const arrays_reader *r, const field *f, const array_value *value, kvq_capture_info *info,
                            kvq_error *err) {
    void *at = (char *)info + f->at;
    switch (f->kind) {
    case FIELD_TEXT:
    case FIELD_HASH:
        return set_text(r, f, value, at, err);
    case FIELD_I64:
        if (value->kind != ARRAY_INTEGER) return wrong_kind(r, f, "an integer of 64 bits", err);
        *(int64_t *)at = value->integer;
        return KVQ_OK;
    case FIELD_U64:
        if (value->kind != ARRAY_UNSIGNED && (value->kind != ARRAY_INTEGER || value->integer < 0))
            return wrong_kind(r, f, "an unsigned integer", err);
        *(uint64_t *)at = value->kind == ARRAY_UNSIGNED ? value->unsigned_integer : (uint64_t)value->integer;
        return KVQ_OK;
    case FIELD_F64:
        return real_of(value, at) ? KVQ_OK : wrong_kind(r, f, "a number", err);
    default:
        return set_bool(r, f, value, at, err);
    }
}

static kvq_status read_fields(const kvq_context *ctx, kvq_capture *c, kvq_error *err) {
    for (size_t i = 0; i < N_FIELDS; i++) {
        const field *f = &FIELDS[i];
        array_value  value;
        kvq_status   status = arrays_get(ctx, c->file, f->group, f->name, &value, err);
        if (status == KVQ_OK && value.kind != ARRAY_ABSENT) status = set_field(c->file, f, &value, &c->info, err);
        if (status == KVQ_OK && value.kind == ARRAY_ABSENT && f->required) {
            status = kvq_fail(err, KVQ_ERR_INPUT, "docs/format.md lists what a capture must have",
                              "%s: %s@%s is missing", arrays_path(c->file), f->group, f->name);
        }
        array_value_free(ctx, &value);
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}

static kvq_status check_version(const kvq_context *ctx, const arrays_reader *r, kvq_error *err) {
    array_value format = {0}, version = {0};
    int         major = 0, minor = 0;
    kvq_status  status = KVQ_OK;
    KVQ_TRY(arrays_get(ctx, r, "/", "kvq_format", &format, err));
    KVQ_TRY(arrays_get(ctx, r, "/", "kvq_format_version", &version, err));
    if (format.kind != ARRAY_TEXT || strcmp(format.text, CAPTURE_FORMAT) != 0) {
        status = kvq_fail(err, KVQ_ERR_INPUT, "captures are made by kvq-capture, or as docs/format.md says",
                          "%s: an HDF5 file, but its attribute kvq_format is '%.80s' instead of '%s'", arrays_path(r),
                          format.kind == ARRAY_TEXT ? format.text : "", CAPTURE_FORMAT);
    } else if (version.kind != ARRAY_TEXT || !container_parse_version(version.text, &major, &minor)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: kvq_format_version '%.80s' is no version such as '1.0'",
                          arrays_path(r), version.kind == ARRAY_TEXT ? version.text : "");
    } else if (major != CAPTURE_MAJOR) {
        status =
            kvq_fail(err, KVQ_ERR_VERSION, NULL, "%s: capture format %s; this is kvq " KVQ_VERSION ", which reads %d.x",
                     arrays_path(r), version.text, CAPTURE_MAJOR);
    }
done:
    array_value_free(ctx, &format);
    array_value_free(ctx, &version);
    return status;
}

// ---------------------------------------------------------------- reading: the arrays

static kvq_status check_shape(const arrays_reader *r, const char *path, const array_spec *found,
                              const array_spec *wanted, kvq_error *err) {
    char a[128], b[128];
    if (found->rank == wanted->rank && memcmp(found->shape, wanted->shape, sizeof found->shape) == 0) return KVQ_OK;
    array_shape_text(found, a);
    array_shape_text(wanted, b);
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s has the shape %s instead of %s", arrays_path(r), path, a, b);
}

// What an array may be stored as; f16 has too few decades for squared gradients.
typedef struct stored_as {
    uint32_t    types; // bits of kvq_array_type
    const char *names;
} stored_as;

#define BIT(type) (1u << KVQ_ARRAY_##type)
static const stored_as FLOATS = {BIT(F16) | BIT(F32) | BIT(F64), "f16, f32 or f64"};
static const stored_as SQUARES = {BIT(F32) | BIT(F64), "f32 or f64"};
static const stored_as IDS = {BIT(I32) | BIT(I64), "i32 or i64"};

static kvq_status check_type(const arrays_reader *r, const char *path, const array_spec *found, stored_as allowed,
                             kvq_error *err) {
    if ((allowed.types >> found->type & 1) != 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s is stored as %s; it must be %s", arrays_path(r), path,
                    kvq_array_type_name(found->type), allowed.names);
}

// The first array found says how many windows there are and how long they are.
static kvq_status learn_windows(kvq_capture *c, const char *path, const array_spec *found, kvq_error *err) {
    if (c->info.dataset.n_windows > 0) return KVQ_OK;
    if (found->rank != 4 || found->shape[0] < 1 || found->shape[1] < 1 || found->shape[0] > MAX_TOKENS ||
        found->shape[1] > MAX_TOKENS) {
        char shape[128];
        array_shape_text(found, shape);
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "%s: %s has the shape %s instead of [windows, tokens, heads, channels]", arrays_path(c->file),
                        path, shape);
    }
    c->info.dataset.n_windows = found->shape[0];
    c->info.dataset.seq_len = found->shape[1];
    c->info.type = found->type;
    return KVQ_OK;
}

static kvq_status read_spec(kvq_capture *c, int64_t layer, kvq_capture_part part, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    char        path[ARRAYS_MAX_PATH];
    array_spec *spec = &c->specs[layer][part];
    layer_path(path, layer, part);
    KVQ_TRY(arrays_describe(c->file, path, spec, err));
    KVQ_TRY(learn_windows(c, path, spec, err));
    KVQ_TRY(check_type(c->file, path, spec, is_fisher(part) ? SQUARES : FLOATS, err));
    array_spec wanted = spec_of(&c->info, part);
    KVQ_TRY(check_shape(c->file, path, spec, &wanted, err));
done:
    return status;
}

static bool holds(const kvq_capture *c, int64_t layer, kvq_capture_part part) {
    char path[ARRAYS_MAX_PATH];
    layer_path(path, layer, part);
    return arrays_has(c->file, path);
}

// Which layers there are, and which parts. What one layer has, all must have.
static kvq_status find_layers(kvq_capture *c, kvq_error *err) {
    kvq_capture_info *info = &c->info;
    char              group[ARRAYS_MAX_PATH];
    for (int64_t layer = 0; layer < info->model.n_layers; layer++) {
        (void)snprintf(group, sizeof group, "/layers/%03" PRId64, layer);
        if (!arrays_has(c->file, group)) continue;
        kvq_capture_add_layer(info, layer);
        info->has_query |= holds(c, layer, KVQ_CAPTURE_Q);
        info->has_fisher |= holds(c, layer, KVQ_CAPTURE_FISHER_K) || holds(c, layer, KVQ_CAPTURE_FISHER_V);
    }
    if (count_layers(info) > 0) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, "the groups of layers are named /layers/000, /layers/001 and so on",
                    "%s: there is no layer", arrays_path(c->file));
}

static kvq_status read_specs(kvq_capture *c, kvq_error *err) {
    for (int64_t layer = 0; layer < c->info.model.n_layers; layer++) {
        for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
            if (!kvq_capture_has_layer(&c->info, layer) || !has_part(&c->info, part)) continue;
            kvq_status status = read_spec(c, layer, part, err);
            if (status != KVQ_OK) return status;
        }
    }
    return KVQ_OK;
}

static kvq_status read_ids_spec(kvq_capture *c, kvq_error *err) {
    kvq_status status = KVQ_OK;
    array_spec wanted = {KVQ_ARRAY_I32, 2, {c->info.dataset.n_windows, c->info.dataset.seq_len}, {0}, false};
    c->info.has_ids = arrays_has(c->file, TOKEN_IDS);
    if (!c->info.has_ids) return KVQ_OK;
    KVQ_TRY(arrays_describe(c->file, TOKEN_IDS, &c->ids, err));
    KVQ_TRY(check_type(c->file, TOKEN_IDS, &c->ids, IDS, err));
    KVQ_TRY(check_shape(c->file, TOKEN_IDS, &c->ids, &wanted, err));
done:
    return status;
}

// Room for a window of the largest stored form that is not f32 already.
static kvq_status allocate_window(const kvq_context *ctx, kvq_capture *c, kvq_error *err) {
    int64_t most = c->info.has_ids ? array_row_bytes(&c->ids) : 0;
    for (int64_t layer = 0; layer < c->info.model.n_layers; layer++) {
        for (kvq_capture_part part = 0; part < KVQ_CAPTURE_N_PARTS; part++) {
            const array_spec *spec = &c->specs[layer][part];
            if (spec->rank == 0 || spec->type == KVQ_ARRAY_F32) continue;
            if (array_row_bytes(spec) > most) most = array_row_bytes(spec);
        }
    }
    return kvq_alloc(ctx, most, 1, "window as it is stored", &c->stored, err);
}

static const container_kind CAPTURES = {"captures", "kvq-capture or as docs/format.md says"};

kvq_status kvq_capture_open(const kvq_context *ctx, const char *path, kvq_capture **out, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    kvq_capture *c = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "capture", &c, err));
    KVQ_TRY(arrays_open(ctx, path, false, CAPTURES, &c->file, err));
    KVQ_TRY(check_version(ctx, c->file, err));
    KVQ_TRY(read_fields(ctx, c, err));
    KVQ_TRY(check_info(path, &c->info, err));
    KVQ_TRY(KVQ_NEW(ctx, c->info.model.n_layers, "shapes of a capture", &c->specs, err));
    KVQ_TRY(find_layers(c, err));
    KVQ_TRY(check_info(path, &c->info, err)); // now that it is known whether queries are there
    KVQ_TRY(read_specs(c, err));
    KVQ_TRY(read_ids_spec(c, err));
    KVQ_TRY(allocate_window(ctx, c, err));
    *out = c;
    c = NULL;
done:
    kvq_capture_close(ctx, &c);
    return status;
}

void kvq_capture_close(const kvq_context *ctx, kvq_capture **capture) {
    kvq_capture *c = *capture;
    if (c == NULL) return;
    arrays_close(ctx, &c->file);
    kvq_free(ctx, c->specs);
    kvq_free(ctx, c->stored);
    kvq_free(ctx, c);
    *capture = NULL;
}

const kvq_capture_info *kvq_capture_describe(const kvq_capture *capture) { return &capture->info; }

// ---------------------------------------------------------------- reading: the numbers

static kvq_status to_float(const window_of *w, kvq_array_type type, const void *stored, int64_t n, float *x,
                           kvq_error *err) {
    const double   *wide = stored;
    const uint16_t *half = stored;
    for (int64_t i = 0; i < n && type == KVQ_ARRAY_F16; i++) x[i] = kvq_float_of_half(half[i]);
    for (int64_t i = 0; i < n && type == KVQ_ARRAY_F64; i++) {
        x[i] = (float)wide[i];
        if (isfinite(wide[i]) && isinf(x[i])) return bad_value(w, i, wide[i], ", more than f32 holds", NULL, err);
    }
    return KVQ_OK;
}

kvq_status kvq_capture_read(const kvq_capture *capture, kvq_capture_part part, int64_t layer, int64_t window, float *x,
                            kvq_error *err) {
    kvq_status              status = KVQ_OK;
    const kvq_capture_info *info = &capture->info;
    const char             *file = arrays_path(capture->file);
    window_of               w = {file, info, part, layer, window};
    char                    path[ARRAYS_MAX_PATH];
    layer_path(path, layer, part);
    if (layer < 0 || layer >= info->model.n_layers || !kvq_capture_has_layer(info, layer) || !has_part(info, part))
        return kvq_fail(err, KVQ_ERR_INPUT, "capture again with all that is needed", "%s: %s is missing", file, path);
    if (window < 0 || window >= info->dataset.n_windows) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s: there is no window %" PRId64, file, path, window);
    }
    const array_spec *spec = &capture->specs[layer][part];
    int64_t           n = array_elements(spec) / info->dataset.n_windows;
    bool              direct = spec->type == KVQ_ARRAY_F32;
    KVQ_TRY(arrays_read(capture->file, path, spec, window, 1, direct ? (void *)x : capture->stored, err));
    KVQ_TRY(to_float(&w, spec->type, capture->stored, n, x, err));
    KVQ_TRY(check_values(&w, x, n, err));
done:
    return status;
}

static kvq_status check_id(const kvq_capture *c, int64_t window, int64_t position, int64_t id, kvq_error *err) {
    int64_t limit = c->info.model.vocab_size > 0 ? c->info.model.vocab_size : INT32_MAX;
    if (id >= 0 && id < limit) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                    "%s: " TOKEN_IDS ": window %" PRId64 ", position %" PRId64 " is %" PRId64
                    ", outside of 0 .. %" PRId64,
                    arrays_path(c->file), window, position, id, limit - 1);
}

kvq_status kvq_capture_read_ids(const kvq_capture *capture, int32_t *ids, kvq_error *err) {
    int64_t        n = capture->info.dataset.n_windows, seq_len = capture->info.dataset.seq_len;
    const int32_t *narrow = capture->stored;
    const int64_t *wide = capture->stored;
    if (!capture->info.has_ids) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: " TOKEN_IDS " is missing", arrays_path(capture->file));
    }
    for (int64_t window = 0; window < n; window++) {
        kvq_status status = arrays_read(capture->file, TOKEN_IDS, &capture->ids, window, 1, capture->stored, err);
        for (int64_t i = 0; i < seq_len && status == KVQ_OK; i++) {
            int64_t id = capture->ids.type == KVQ_ARRAY_I64 ? wide[i] : narrow[i];
            status = check_id(capture, window, i, id, err);
            if (status == KVQ_OK) ids[window * seq_len + i] = (int32_t)id;
        }
        if (status != KVQ_OK) return status;
    }
    return KVQ_OK;
}
