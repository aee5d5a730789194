// SPDX-License-Identifier: Apache-2.0
//
// Partial results: /fields and /counts as attributes, everything else below /arrays, the seal behind it.
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "arrays.h"

#define PARTIAL_FORMAT  "kvq.partial"
#define PARTIAL_VERSION "1.0" // read by the version that wrote it: it lives for hours

static const container_kind PARTIALS = {"partial results", "kvq-calibrate --shard"};

static const char NAME_ADVICE[] = "names are parts of letters, digits, '_' and '-' with '/' between them";

// "/arrays/<name>", or an error when the name could leave that group.
static kvq_status array_path(const char *file, const char *name, char out[ARRAYS_MAX_PATH], kvq_error *err) {
    static const char ALLOWED[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    bool              ok = strlen(name) < ARRAYS_MAX_PATH - strlen("/arrays/");
    for (const char *part = name; ok && part != NULL;) {
        size_t n = strspn(part, ALLOWED);
        ok = n > 0 && (part[n] == '/' || part[n] == 0);
        part = part[n] == '/' ? part + n + 1 : NULL;
    }
    if (!ok) return kvq_fail(err, KVQ_ERR_INTERNAL, NAME_ADVICE, "%s: '%.80s' is no name of an array", file, name);
    (void)snprintf(out, ARRAYS_MAX_PATH, "/arrays/%s", name);
    return KVQ_OK;
}

// ---------------------------------------------------------------- writing

struct kvq_partial_writer {
    arrays_writer *file;
    char          *path;
};

static kvq_status write_names(const kvq_partial_writer *w, const kvq_field *fields, int64_t n_fields,
                              const kvq_count *counts, int64_t n_counts, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(arrays_put_text(w->file, "/", "kvq_format", PARTIAL_FORMAT, err));
    KVQ_TRY(arrays_put_text(w->file, "/", "kvq_format_version", PARTIAL_VERSION, err));
    KVQ_TRY(arrays_put_text(w->file, "/", "producer_version", KVQ_VERSION, err));
    for (int64_t i = 0; i < n_fields; i++)
        KVQ_TRY(arrays_put_text(w->file, "/fields", fields[i].name, fields[i].value, err));
    for (int64_t i = 0; i < n_counts; i++)
        KVQ_TRY(arrays_put_i64(w->file, "/counts", counts[i].name, counts[i].value, err));
done:
    return status;
}

kvq_status kvq_partial_create(const kvq_context *ctx, const char *path, bool force, const kvq_field *fields,
                              int64_t n_fields, const kvq_count *counts, int64_t n_counts, kvq_partial_writer **out,
                              kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_partial_writer *w = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "partial result", &w, err));
    w->path = kvq_strdup(ctx, path);
    if (w->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "no memory for the name %s", path);
        goto done;
    }
    KVQ_TRY(arrays_begin(ctx, path, force, &w->file, err));
    KVQ_TRY(write_names(w, fields, n_fields, counts, n_counts, err));
    *out = w;
    w = NULL;
done:
    kvq_partial_discard(ctx, &w);
    return status;
}

kvq_status kvq_partial_put(kvq_partial_writer *writer, const char *name, kvq_array_type type, int n_dims,
                           const int64_t *dims, const void *data, kvq_error *err) {
    kvq_status status = KVQ_OK;
    char       path[ARRAYS_MAX_PATH];
    array_spec spec = {.type = type, .rank = n_dims};
    if (n_dims < 1 || n_dims > ARRAYS_MAX_RANK) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "%s: %.80s: %d dimensions; 1 .. %d are possible", writer->path,
                        name, n_dims, ARRAYS_MAX_RANK);
    }
    memcpy(spec.shape, dims, (size_t)n_dims * sizeof *dims);
    KVQ_TRY(array_path(writer->path, name, path, err));
    KVQ_TRY(arrays_create(writer->file, path, &spec, err));
    if (array_elements(&spec) > 0) KVQ_TRY(arrays_write(writer->file, path, 0, dims[0], data, err));
done:
    return status;
}

kvq_status kvq_partial_commit(const kvq_context *ctx, kvq_partial_writer **writer, kvq_error *err) {
    char       sha256[KVQ_SHA256_HEX];
    kvq_status status = arrays_commit(ctx, &(*writer)->file, sha256, err);
    kvq_partial_discard(ctx, writer);
    return status;
}

void kvq_partial_discard(const kvq_context *ctx, kvq_partial_writer **writer) {
    kvq_partial_writer *w = *writer;
    if (w == NULL) return;
    arrays_discard(ctx, &w->file);
    kvq_free(ctx, w->path);
    kvq_free(ctx, w);
    *writer = NULL;
}

// ---------------------------------------------------------------- reading

struct kvq_partial {
    arrays_reader *file;
    kvq_field     *fields; // grows; see add_field
    kvq_count     *counts;
    int64_t        n_fields, n_counts;
};

// What visits the attributes of a group: once to count them, once to keep them.
typedef struct names {
    kvq_partial *partial;
    bool         keep;
} names;

static kvq_status bad_name(const kvq_partial *p, const char *group, const char *name, const char *wanted,
                           kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s@%.80s: the name is too long, or the value is no %s",
                    arrays_path(p->file), group, name, wanted);
}

static kvq_status visit_field(void *user, const char *name, const array_value *value, kvq_error *err) {
    names       *n = user;
    kvq_partial *p = n->partial;
    kvq_field   *f = n->keep ? &p->fields[p->n_fields] : NULL;
    if (strlen(name) >= sizeof f->name || value->kind != ARRAY_TEXT || strlen(value->text) >= sizeof f->value)
        return bad_name(p, "/fields", name, "text that is short enough", err);
    if (n->keep) {
        strcpy(f->name, name);
        strcpy(f->value, value->text);
    }
    p->n_fields++;
    return KVQ_OK;
}

static kvq_status visit_count(void *user, const char *name, const array_value *value, kvq_error *err) {
    names       *n = user;
    kvq_partial *p = n->partial;
    kvq_count   *c = n->keep ? &p->counts[p->n_counts] : NULL;
    if (strlen(name) >= sizeof c->name || value->kind != ARRAY_INTEGER)
        return bad_name(p, "/counts", name, "integer of 64 bits", err);
    if (n->keep) {
        strcpy(c->name, name);
        c->value = value->integer;
    }
    p->n_counts++;
    return KVQ_OK;
}

static kvq_status read_names(const kvq_context *ctx, kvq_partial *p, kvq_error *err) {
    kvq_status status = KVQ_OK;
    names      n = {p, false};
    KVQ_TRY(arrays_each(ctx, p->file, "/fields", visit_field, &n, err));
    KVQ_TRY(arrays_each(ctx, p->file, "/counts", visit_count, &n, err));
    KVQ_TRY(KVQ_NEW(ctx, p->n_fields, "fields of a partial result", &p->fields, err));
    KVQ_TRY(KVQ_NEW(ctx, p->n_counts, "counts of a partial result", &p->counts, err));
    n.keep = true;
    p->n_fields = p->n_counts = 0;
    KVQ_TRY(arrays_each(ctx, p->file, "/fields", visit_field, &n, err));
    KVQ_TRY(arrays_each(ctx, p->file, "/counts", visit_count, &n, err));
done:
    return status;
}

static kvq_status check_version(const kvq_context *ctx, const arrays_reader *r, kvq_error *err) {
    array_value format = {0}, version = {0};
    kvq_status  status = KVQ_OK;
    KVQ_TRY(arrays_get(ctx, r, "/", "kvq_format", &format, err));
    KVQ_TRY(arrays_get(ctx, r, "/", "kvq_format_version", &version, err));
    if (format.kind != ARRAY_TEXT || strcmp(format.text, PARTIAL_FORMAT) != 0) {
        status = kvq_fail(err, KVQ_ERR_INPUT, "partial results are made by kvq-calibrate --shard",
                          "%s: an HDF5 file, but its attribute kvq_format is '%.80s' instead of '%s'", arrays_path(r),
                          format.kind == ARRAY_TEXT ? format.text : "", PARTIAL_FORMAT);
    } else if (version.kind != ARRAY_TEXT || strcmp(version.text, PARTIAL_VERSION) != 0) {
        status = kvq_fail(err, KVQ_ERR_VERSION, "use one version of kvq for all shards",
                          "%s: a partial result of format '%.80s'; this is kvq " KVQ_VERSION ", which reads %s",
                          arrays_path(r), version.kind == ARRAY_TEXT ? version.text : "", PARTIAL_VERSION);
    }
done:
    array_value_free(ctx, &format);
    array_value_free(ctx, &version);
    return status;
}

kvq_status kvq_partial_open(const kvq_context *ctx, const char *path, kvq_partial **out, kvq_error *err) {
    kvq_status   status = KVQ_OK;
    kvq_partial *p = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "partial result", &p, err));
    KVQ_TRY(arrays_open(ctx, path, true, PARTIALS, &p->file, err));
    KVQ_TRY(check_version(ctx, p->file, err));
    KVQ_TRY(read_names(ctx, p, err));
    *out = p;
    p = NULL;
done:
    kvq_partial_close(ctx, &p);
    return status;
}

void kvq_partial_close(const kvq_context *ctx, kvq_partial **partial) {
    kvq_partial *p = *partial;
    if (p == NULL) return;
    arrays_close(ctx, &p->file);
    kvq_free(ctx, p->fields);
    kvq_free(ctx, p->counts);
    kvq_free(ctx, p);
    *partial = NULL;
}

const kvq_field *kvq_partial_fields(const kvq_partial *partial, int64_t *n) {
    *n = partial->n_fields;
    return partial->fields;
}

kvq_status kvq_partial_count(const kvq_partial *partial, const char *name, int64_t low, int64_t high, int64_t *out,
                             kvq_error *err) {
    for (int64_t i = 0; i < partial->n_counts; i++) {
        const kvq_count *c = &partial->counts[i];
        if (strcmp(c->name, name) != 0) continue;
        if (c->value < low || c->value > high) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s is %" PRId64 ", outside of %" PRId64 " .. %" PRId64,
                            arrays_path(partial->file), name, c->value, low, high);
        }
        *out = c->value;
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the count %s is missing", arrays_path(partial->file), name);
}

static kvq_status find_array(const kvq_partial *p, const char *name, kvq_array_type type, int n_dims,
                             char path[ARRAYS_MAX_PATH], array_spec *spec, kvq_error *err) {
    const char *file = arrays_path(p->file);
    kvq_status  status = KVQ_OK;
    KVQ_TRY(array_path(file, name, path, err));
    KVQ_TRY(arrays_describe(p->file, path, spec, err));
    if (spec->type != type || spec->rank != n_dims) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s is %s of %d dimensions instead of %s of %d", file, path,
                          kvq_array_type_name(spec->type), spec->rank, kvq_array_type_name(type), n_dims);
    }
done:
    return status;
}

kvq_status kvq_partial_dims(const kvq_partial *partial, const char *name, kvq_array_type type, int n_dims,
                            int64_t *dims, kvq_error *err) {
    char       path[ARRAYS_MAX_PATH];
    array_spec spec;
    kvq_status status = find_array(partial, name, type, n_dims, path, &spec, err);
    if (status == KVQ_OK) memcpy(dims, spec.shape, (size_t)n_dims * sizeof *dims);
    return status;
}

kvq_status kvq_partial_get(const kvq_partial *partial, const char *name, kvq_array_type type, int n_dims,
                           const int64_t *dims, void *data, kvq_error *err) {
    char       path[ARRAYS_MAX_PATH], found[128], wanted_text[128];
    array_spec spec, wanted = {.type = type, .rank = n_dims};
    kvq_status status = find_array(partial, name, type, n_dims, path, &spec, err);
    if (status != KVQ_OK) return status;
    memcpy(wanted.shape, dims, (size_t)n_dims * sizeof *dims);
    if (memcmp(spec.shape, wanted.shape, sizeof spec.shape) != 0) {
        array_shape_text(&spec, found);
        array_shape_text(&wanted, wanted_text);
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s has the shape %s instead of %s", arrays_path(partial->file),
                        path, found, wanted_text);
    }
    return arrays_read(partial->file, path, &spec, 0, spec.shape[0], data, err);
}
