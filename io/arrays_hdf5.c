// SPDX-License-Identifier: Apache-2.0
//
// Named arrays in HDF5 files, in pieces. See arrays.h.
//
// Why these settings?  Bounds 1.10 .. 1.10 for writing: every structure, chunk indices included, carries a checksum,
//   and chunks get one from us, so damage is found before it is believed. No object times, attributes and links in
//   their object's header: equal content gives equal bytes. No chunk cache for writing: what fails, fails where it was
//   written.
// What is not done:  type conversion (memory type = file type; HDF5 1.10.8 converts floats wrongly), soft or external
//   links, external or virtual storage, filters that would load a plugin.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "arrays.h"
#include "hdf5_impl.h"

#define MAX_CHUNK_BYTES ((uint64_t)256 << 20) // HDF5 holds a chunk in memory, twice where it is filtered
#define DEFLATE_LEVEL   4                     // of 9: higher ones gain little on shuffled floats
#define MAX_EXPANSION   1032 // no allowed filter expands more: deflate's limit (zlib's technical notes)

static const char DISK_ADVICE[] = "check free space and permissions of the folder, or choose another one";

// ---------------------------------------------------------------- types and shapes

static const struct {
    const char *name;
    size_t      bytes;
} TYPES[KVQ_ARRAY_N_TYPES] = {
    [KVQ_ARRAY_U8] = {"u8", 1},   [KVQ_ARRAY_I32] = {"i32", 4}, [KVQ_ARRAY_I64] = {"i64", 8},
    [KVQ_ARRAY_U64] = {"u64", 8}, [KVQ_ARRAY_F16] = {"f16", 2}, [KVQ_ARRAY_F32] = {"f32", 4},
    [KVQ_ARRAY_F64] = {"f64", 8},
};

const char *kvq_array_type_name(kvq_array_type type) { return TYPES[type].name; }
size_t      kvq_array_type_bytes(kvq_array_type type) { return TYPES[type].bytes; }

int64_t array_elements(const array_spec *spec) {
    int64_t n = 1;
    for (int i = 0; i < spec->rank; i++) n *= spec->shape[i];
    return n;
}

int64_t array_row_bytes(const array_spec *spec) {
    if (array_elements(spec) == 0) return 0; // the other extents may then be of any size
    return array_elements(spec) / spec->shape[0] * (int64_t)TYPES[spec->type].bytes;
}

void array_shape_text(const array_spec *spec, char out[128]) {
    int used = snprintf(out, 128, "[");
    for (int i = 0; i < spec->rank; i++)
        used += snprintf(out + used, 128 - (size_t)used, "%s%" PRId64, i > 0 ? ", " : "", spec->shape[i]);
    (void)snprintf(out + used, 128 - (size_t)used, "]");
}

// IEEE binary16, which HDF5 1.10 has no name for; as numpy and h5py describe it.
static hid_t half_type(void) {
    hid_t type = H5Tcopy(H5T_IEEE_F32LE);
    if (H5Tset_fields(type, 15, 10, 5, 0, 10) < 0 || H5Tset_size(type, 2) < 0 || H5Tset_ebias(type, 15) < 0) {
        hdf5_close(type, H5Tclose);
        return H5I_INVALID_HID;
    }
    return type;
}

// A new id, to be closed.
static hid_t make_type(kvq_array_type type) {
    switch (type) {
    case KVQ_ARRAY_U8:
        return H5Tcopy(H5T_STD_U8LE);
    case KVQ_ARRAY_I32:
        return H5Tcopy(H5T_STD_I32LE);
    case KVQ_ARRAY_I64:
        return H5Tcopy(H5T_STD_I64LE);
    case KVQ_ARRAY_U64:
        return H5Tcopy(H5T_STD_U64LE);
    case KVQ_ARRAY_F16:
        return half_type();
    case KVQ_ARRAY_F32:
        return H5Tcopy(H5T_IEEE_F32LE);
    case KVQ_ARRAY_F64:
        return H5Tcopy(H5T_IEEE_F64LE);
    default:
        return H5I_INVALID_HID;
    }
}

// Which of our types an HDF5 type is; KVQ_ARRAY_N_TYPES when none.
static kvq_array_type classify(hid_t type) {
    for (int t = 0; t < KVQ_ARRAY_N_TYPES; t++) {
        hid_t ours = make_type((kvq_array_type)t);
        bool  equal = ours >= 0 && H5Tequal(type, ours) > 0;
        hdf5_close(ours, H5Tclose);
        if (equal) return (kvq_array_type)t;
    }
    return KVQ_ARRAY_N_TYPES;
}

// Rows [row, row + n_rows) of a file's dataspace as a selection, and the memory that belongs to it.
static bool select_rows(hid_t space, const array_spec *spec, int64_t row, int64_t n_rows, hid_t *memory) {
    hsize_t start[ARRAYS_MAX_RANK] = {(hsize_t)row}, count[ARRAYS_MAX_RANK] = {(hsize_t)n_rows};
    for (int i = 1; i < spec->rank; i++) count[i] = (hsize_t)spec->shape[i];
    *memory = H5Screate_simple(spec->rank, count, NULL);
    return *memory >= 0 && H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) >= 0;
}

// ---------------------------------------------------------------- writing

struct arrays_writer {
    kvq_output output;
    hdf5_disk  disk;
    hid_t      file, group_settings;
};

// The status of a step that HDF5 thinks was `ok`.
static kvq_status written(const arrays_writer *w, const char *path, bool ok, kvq_error *err) {
    if (w->disk.error != 0) {
        return kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: %s cannot be written: %s", w->output.path, path,
                        strerror(w->disk.error));
    }
    if (ok) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: %s cannot be written: HDF5: %s", w->output.path, path,
                    hdf5_last_cause().text);
}

static bool open_for_writing(arrays_writer *w) {
    hid_t access = H5Pcreate(H5P_FILE_ACCESS), creation = H5Pcreate(H5P_FILE_CREATE);
    w->group_settings = H5Pcreate(H5P_GROUP_CREATE);
    if (H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0 && hdf5_disk_use(access, &w->disk) &&
        H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0 && hdf5_keep_compact(creation) &&
        hdf5_keep_links_compact(creation) && hdf5_keep_compact(w->group_settings) &&
        hdf5_keep_links_compact(w->group_settings)) {
        w->file = H5Fcreate(w->output.temporary, H5F_ACC_TRUNC, creation, access);
    }
    hdf5_close(creation, H5Pclose);
    hdf5_close(access, H5Pclose);
    return w->file >= 0;
}

kvq_status arrays_begin(const kvq_context *ctx, const char *path, bool force, arrays_writer **out, kvq_error *err) {
    kvq_status     status = KVQ_OK;
    arrays_writer *w = NULL;
    hdf5_printing  saved = hdf5_printing_off();
    KVQ_TRY(KVQ_NEW(ctx, 1, "array writer", &w, err));
    w->file = w->group_settings = w->disk.driver = H5I_INVALID_HID;
    KVQ_TRY(kvq_output_begin(ctx, path, force, &w->output, err));
    bool opened = open_for_writing(w);
    KVQ_TRY(written(w, "the file", opened, err));
    *out = w;
    w = NULL;
done:
    arrays_discard(ctx, &w);
    hdf5_printing_restore(saved);
    return status;
}

static bool close_file(arrays_writer *w) {
    bool ok = w->file < 0 || H5Fclose(w->file) >= 0;
    hdf5_close(w->group_settings, H5Pclose);
    hdf5_disk_release(&w->disk);
    w->file = w->group_settings = H5I_INVALID_HID;
    return ok;
}

void arrays_discard(const kvq_context *ctx, arrays_writer **writer) {
    arrays_writer *w = *writer;
    if (w == NULL) return;
    hdf5_printing saved = hdf5_printing_off();
    (void)close_file(w);
    hdf5_printing_restore(saved);
    kvq_output_discard(ctx, &w->output);
    kvq_free(ctx, w);
    *writer = NULL;
}

// Takes the type over.
static kvq_status put_attribute(arrays_writer *w, const char *group, const char *name, hid_t type, const void *value,
                                kvq_error *err) {
    hdf5_printing saved = hdf5_printing_off();
    char          path[ARRAYS_MAX_PATH];
    hid_t         space = H5Screate(H5S_SCALAR), object = H5I_INVALID_HID, attribute = H5I_INVALID_HID;
    if (hdf5_make_groups(w->file, w->group_settings, group)) object = H5Oopen(w->file, group, H5P_DEFAULT);
    if (object >= 0) attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    bool ok = attribute >= 0 && H5Awrite(attribute, type, value) >= 0;
    (void)snprintf(path, sizeof path, "%s@%s", group, name);
    kvq_status status = written(w, path, ok, err);
    hdf5_close(attribute, H5Aclose);
    hdf5_close(object, H5Oclose);
    hdf5_close(space, H5Sclose);
    hdf5_close(type, H5Tclose);
    hdf5_printing_restore(saved);
    return status;
}

kvq_status arrays_put_text(arrays_writer *w, const char *group, const char *name, const char *text, kvq_error *err) {
    size_t bytes = strlen(text);
    if (bytes > ARRAYS_MAX_TEXT || kvq_utf8_valid_prefix(text, bytes) != bytes) {
        return kvq_fail(err, KVQ_ERR_INPUT, "shorten or rename what it comes from",
                        "%s: %s@%s is no UTF-8 text of at most %d bytes", w->output.path, group, name, ARRAYS_MAX_TEXT);
    }
    return put_attribute(w, group, name, hdf5_text_type(bytes), text, err);
}

kvq_status arrays_put_i64(arrays_writer *w, const char *group, const char *name, int64_t value, kvq_error *err) {
    return put_attribute(w, group, name, make_type(KVQ_ARRAY_I64), &value, err);
}

kvq_status arrays_put_u64(arrays_writer *w, const char *group, const char *name, uint64_t value, kvq_error *err) {
    return put_attribute(w, group, name, make_type(KVQ_ARRAY_U64), &value, err);
}

kvq_status arrays_put_f64(arrays_writer *w, const char *group, const char *name, double value, kvq_error *err) {
    return put_attribute(w, group, name, make_type(KVQ_ARRAY_F64), &value, err);
}

static bool set_storage(hid_t settings, const array_spec *spec) {
    hsize_t chunk[ARRAYS_MAX_RANK];
    if (!hdf5_keep_compact(settings)) return false;
    if (spec->chunk[0] == 0) return true;
    for (int i = 0; i < spec->rank; i++) chunk[i] = (hsize_t)spec->chunk[i];
    if (H5Pset_chunk(settings, spec->rank, chunk) < 0) return false;
    // what is stored is summed, so damage is found before it is expanded
    if (spec->deflate && (H5Pset_shuffle(settings) < 0 || H5Pset_deflate(settings, DEFLATE_LEVEL) < 0)) return false;
    return H5Pset_fletcher32(settings) >= 0;
}

kvq_status arrays_create(arrays_writer *w, const char *path, const array_spec *spec, kvq_error *err) {
    hdf5_printing saved = hdf5_printing_off();
    hsize_t       shape[ARRAYS_MAX_RANK];
    char          group[ARRAYS_MAX_PATH];
    for (int i = 0; i < spec->rank; i++) shape[i] = (hsize_t)spec->shape[i];
    (void)snprintf(group, sizeof group, "%s", path);
    char *slash = strrchr(group, '/');
    slash[slash == group ? 1 : 0] = 0;
    hid_t type = make_type(spec->type), space = H5Screate_simple(spec->rank, shape, NULL);
    hid_t settings = H5Pcreate(H5P_DATASET_CREATE), dataset = H5I_INVALID_HID;
    if (set_storage(settings, spec) && hdf5_make_groups(w->file, w->group_settings, group)) {
        dataset = H5Dcreate2(w->file, path, type, space, H5P_DEFAULT, settings, H5P_DEFAULT);
    }
    kvq_status status = written(w, path, dataset >= 0, err);
    hdf5_close(dataset, H5Dclose);
    hdf5_close(settings, H5Pclose);
    hdf5_close(space, H5Sclose);
    hdf5_close(type, H5Tclose);
    hdf5_printing_restore(saved);
    return status;
}

// The shape of a dataset of ours; only what select_rows needs.
static bool shape_of(hid_t space, array_spec *out) {
    hsize_t shape[ARRAYS_MAX_RANK];
    out->rank = H5Sget_simple_extent_ndims(space);
    if (out->rank < 1 || out->rank > ARRAYS_MAX_RANK || H5Sget_simple_extent_dims(space, shape, NULL) < 0) return false;
    for (int i = 0; i < out->rank; i++) {
        if (shape[i] > INT64_MAX) return false;
        out->shape[i] = (int64_t)shape[i];
    }
    return true;
}

kvq_status arrays_write(arrays_writer *w, const char *path, int64_t row, int64_t n_rows, const void *data,
                        kvq_error *err) {
    hdf5_printing saved = hdf5_printing_off();
    array_spec    spec = {0};
    hid_t         memory = H5I_INVALID_HID, type = H5I_INVALID_HID, space = H5I_INVALID_HID;
    hid_t         access = H5Pcreate(H5P_DATASET_ACCESS), dataset = H5I_INVALID_HID;
    if (H5Pset_chunk_cache(access, 0, 0, 1) >= 0) dataset = H5Dopen2(w->file, path, access);
    if (dataset >= 0) {
        space = H5Dget_space(dataset);
        type = H5Dget_type(dataset);
    }
    bool ok = space >= 0 && type >= 0 && shape_of(space, &spec) && select_rows(space, &spec, row, n_rows, &memory) &&
              H5Dwrite(dataset, type, memory, space, H5P_DEFAULT, data) >= 0;
    kvq_status status = written(w, path, ok, err);
    hdf5_close(memory, H5Sclose);
    hdf5_close(type, H5Tclose);
    hdf5_close(space, H5Sclose);
    hdf5_close(dataset, H5Dclose);
    hdf5_close(access, H5Pclose);
    hdf5_printing_restore(saved);
    return status;
}

static void seal_digits(const void *line, char sha256[KVQ_SHA256_HEX]) {
    memcpy(sha256, (const char *)line + strlen(SEAL), KVQ_SHA256_HEX - 1);
    sha256[KVQ_SHA256_HEX - 1] = 0;
}

static kvq_status append_seal(const arrays_writer *w, char sha256[KVQ_SHA256_HEX], kvq_error *err) {
    kvq_mapped_file file = {0};
    char            line[SEAL_BYTES + 1];
    kvq_status      status = kvq_map_file(w->output.temporary, &file, err);
    if (status != KVQ_OK) return status;
    status = seal_make(file.data, file.bytes, line, err);
    kvq_unmap_file(&file);
    if (status != KVQ_OK) return status;
    int  fd = open(w->output.temporary, O_WRONLY | O_APPEND | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, line, SEAL_BYTES) == (ssize_t)SEAL_BYTES;
    if (fd >= 0) ok = close(fd) == 0 && ok;
    if (!ok) {
        return kvq_fail(err, KVQ_ERR_DISK, DISK_ADVICE, "%s: its last line cannot be written: %s", w->output.path,
                        strerror(errno));
    }
    seal_digits(line, sha256);
    return KVQ_OK;
}

kvq_status arrays_commit(const kvq_context *ctx, arrays_writer **writer, char *sha256, kvq_error *err) {
    arrays_writer *w = *writer;
    hdf5_printing  saved = hdf5_printing_off();
    bool           closed = close_file(w);
    kvq_status     status = written(w, "the end of the file", closed, err);
    hdf5_printing_restore(saved);
    char digits[KVQ_SHA256_HEX];
    if (status == KVQ_OK && sha256 != NULL) status = append_seal(w, digits, err);
    if (status == KVQ_OK) status = kvq_output_commit(ctx, &w->output, err);
    if (status == KVQ_OK && sha256 != NULL) strcpy(sha256, digits);
    arrays_discard(ctx, writer);
    return status;
}

// ---------------------------------------------------------------- reading: the file

struct arrays_reader {
    char    *path;
    uint64_t bytes; // of the file
    hid_t    file;
    char     sha256[KVQ_SHA256_HEX]; // sealed
};

const char *arrays_sha256(const arrays_reader *r) { return r->sha256; }
const char *arrays_path(const arrays_reader *r) { return r->path; }

static kvq_status damaged(const arrays_reader *r, const char *path, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTEGRITY, NULL, "%s: %s cannot be read: HDF5: %s", r->path, path,
                    hdf5_last_cause().text);
}

static kvq_status refused(const arrays_reader *r, const char *path, const char *why, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INPUT, "docs/format.md says how such a file is made", "%s: %s: %s", r->path, path,
                    why);
}

// Files of HDF5 before 1.10 hold structures without checksums, and HDF5 1.10.8 crashes where those are damaged. Byte 8
// is the version of the superblock (HDF5 File Format Specification 3.0, II.A): 3 since 1.10.
static kvq_status check_has_checksums(const kvq_mapped_file *file, kvq_error *err) {
    if (file->bytes > 8 && file->data[8] >= 3) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, "write it with h5py.File(path, 'w', libver='v110'), or convert it: h5repack -L",
                    "an HDF5 file in the format of before 1.10, whose structures have no checksums");
}

// What must be known of the bytes before HDF5 may open them: that they are those which were written, or at least that
// HDF5 will find out. Fills r->bytes and r->sha256.
static kvq_status check_bytes(arrays_reader *r, bool sealed, container_kind kind, kvq_error *err) {
    kvq_mapped_file file = {0};
    kvq_status      status = kvq_map_file(r->path, &file, err);
    if (status != KVQ_OK) return status;
    size_t bytes = r->bytes = file.bytes;
    if (sealed) {
        status = seal_check(file.data, &bytes, kind, err);
        if (status == KVQ_OK) seal_digits(file.data + bytes, r->sha256);
    } else {
        status = container_is_hdf5(file.data, bytes, kind, err);
        if (status == KVQ_OK) status = check_has_checksums(&file, err);
    }
    if (status != KVQ_OK) kvq_error_prefix(err, "%s: ", r->path);
    kvq_unmap_file(&file);
    return status;
}

kvq_status arrays_open(const kvq_context *ctx, const char *path, bool sealed, container_kind kind, arrays_reader **out,
                       kvq_error *err) {
    kvq_status     status = KVQ_OK;
    arrays_reader *r = NULL;
    hdf5_printing  saved = hdf5_printing_off();
    hid_t          access = H5Pcreate(H5P_FILE_ACCESS);
    KVQ_TRY(KVQ_NEW(ctx, 1, "array reader", &r, err));
    r->file = H5I_INVALID_HID;
    r->path = kvq_strdup(ctx, path);
    if (r->path == NULL) {
        status = kvq_fail(err, KVQ_ERR_MEMORY, NULL, "no memory for the name %s", path);
        goto done;
    }
    KVQ_TRY(check_bytes(r, sealed, kind, err));
    if (H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0) r->file = H5Fopen(path, H5F_ACC_RDONLY, access);
    if (r->file < 0) {
        status = damaged(r, "the file", err);
        goto done;
    }
    *out = r;
    r = NULL;
done:
    arrays_close(ctx, &r);
    hdf5_close(access, H5Pclose);
    hdf5_printing_restore(saved);
    return status;
}

void arrays_close(const kvq_context *ctx, arrays_reader **reader) {
    arrays_reader *r = *reader;
    if (r == NULL) return;
    hdf5_printing saved = hdf5_printing_off();
    hdf5_close(r->file, H5Fclose);
    hdf5_printing_restore(saved);
    kvq_free(ctx, r->path);
    kvq_free(ctx, r);
    *reader = NULL;
}

// Every step of the path is looked at: HDF5 would follow a link into another file by itself.
static bool has_path(const arrays_reader *r, const char *path) {
    char part[ARRAYS_MAX_PATH];
    if (strcmp(path, "/") == 0) return true;
    for (const char *end = path + 1; end[-1] != 0; end++) {
        H5L_info_t link;
        if (*end != '/' && *end != 0) continue;
        (void)snprintf(part, sizeof part, "%.*s", (int)(end - path), path);
        if (H5Lexists(r->file, part, H5P_DEFAULT) <= 0) return false;
        if (H5Lget_info(r->file, part, &link, H5P_DEFAULT) < 0 || link.type != H5L_TYPE_HARD) return false;
    }
    return true;
}

bool arrays_has(const arrays_reader *r, const char *path) {
    hdf5_printing saved = hdf5_printing_off();
    bool          has = has_path(r, path);
    hdf5_printing_restore(saved);
    return has;
}

// ---------------------------------------------------------------- reading: attributes

void array_value_free(const kvq_context *ctx, array_value *value) {
    kvq_free(ctx, value->text);
    value->text = NULL;
}

// Text of variable length lies in HDF5's global heap, which has no checksums: HDF5 1.10.8 reads beyond its end, or
// forever, where it is damaged.
static kvq_status get_text(const kvq_context *ctx, const arrays_reader *r, const char *path, hid_t attribute,
                           hid_t type, array_value *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    size_t     bytes = H5Tget_size(type);
    char      *text = NULL;
    if (H5Tis_variable_str(type) != 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, "store it with fixed length (h5py: numpy.bytes_)",
                        "%s: %s is a text of variable length", r->path, path);
    }
    if (bytes == 0 || bytes > ARRAYS_MAX_TEXT) return refused(r, path, "its text has more than 60000 bytes", err);
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)bytes + 1, "text of an attribute", &text, err)); // the zero behind it stays
    if (H5Aread(attribute, type, text) < 0) KVQ_TRY(damaged(r, path, err));
    if (kvq_utf8_valid_prefix(text, strlen(text)) != strlen(text)) KVQ_TRY(refused(r, path, "it is not UTF-8", err));
    out->kind = ARRAY_TEXT;
    out->text = text;
    text = NULL;
done:
    kvq_free(ctx, text);
    return status;
}

// Little-endian integers of any width, with sign; the type of an enumeration is its integer's.
static bool integer_from(hid_t type, uint64_t raw, array_value *out) {
    size_t bytes = H5Tget_size(type);
    bool   is_signed = H5Tget_sign(type) == H5T_SGN_2;
    if (bytes > sizeof raw || H5Tget_precision(type) != 8 * bytes || H5Tget_order(type) != H5T_ORDER_LE) return false;
    if (!is_signed && raw > INT64_MAX) {
        out->kind = ARRAY_UNSIGNED;
        out->unsigned_integer = raw;
        return true;
    }
    if (is_signed && bytes < sizeof raw && raw >> (8 * bytes - 1) != 0) raw |= UINT64_MAX << (8 * bytes);
    out->kind = ARRAY_INTEGER;
    out->integer = (int64_t)raw;
    return true;
}

static bool real_from(hid_t type, uint64_t raw, array_value *out) {
    kvq_array_type t = classify(type);
    out->kind = ARRAY_REAL;
    if (t == KVQ_ARRAY_F64) memcpy(&out->real, &raw, sizeof out->real);
    if (t == KVQ_ARRAY_F32) out->real = (double)kvq_float_of_bits((uint32_t)raw);
    return t == KVQ_ARRAY_F64 || t == KVQ_ARRAY_F32;
}

static kvq_status get_number(const arrays_reader *r, const char *path, hid_t attribute, hid_t type, array_value *out,
                             kvq_error *err) {
    static const char BAD_TYPE[] = "its type is none of text, little-endian integer, f32 and f64";
    uint64_t          raw = 0; // little-endian, as this processor is
    H5T_class_t class = H5Tget_class(type);
    if (class != H5T_INTEGER && class != H5T_ENUM && class != H5T_FLOAT) return refused(r, path, BAD_TYPE, err);
    if (H5Tget_size(type) > sizeof raw) return refused(r, path, BAD_TYPE, err);
    if (H5Aread(attribute, type, &raw) < 0) return damaged(r, path, err);
    hid_t integer = class == H5T_ENUM ? H5Tget_super(type) : H5Tcopy(type);
    bool  ok = integer >= 0 && (class == H5T_FLOAT ? real_from(type, raw, out) : integer_from(integer, raw, out));
    hdf5_close(integer, H5Tclose);
    return ok ? KVQ_OK : refused(r, path, BAD_TYPE, err);
}

// One attribute of an open object; `path` is its name in messages.
static kvq_status get_value(const kvq_context *ctx, const arrays_reader *r, const char *path, hid_t attribute,
                            array_value *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    hid_t      type = H5Aget_type(attribute), space = H5Aget_space(attribute);
    if (type < 0 || space < 0) {
        status = damaged(r, path, err);
    } else if (H5Sget_simple_extent_npoints(space) != 1) {
        status = refused(r, path, "it does not hold exactly one value", err);
    } else if (H5Tget_class(type) == H5T_STRING) {
        status = get_text(ctx, r, path, attribute, type, out, err);
    } else {
        status = get_number(r, path, attribute, type, out, err);
    }
    hdf5_close(space, H5Sclose);
    hdf5_close(type, H5Tclose);
    return status;
}

static void attribute_path(char out[ARRAYS_MAX_PATH], const char *group, const char *name) {
    (void)snprintf(out, ARRAYS_MAX_PATH, "%s@%s", group, name);
}

kvq_status arrays_get(const kvq_context *ctx, const arrays_reader *r, const char *group, const char *name,
                      array_value *out, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    hdf5_printing saved = hdf5_printing_off();
    char          path[ARRAYS_MAX_PATH];
    hid_t         object = H5I_INVALID_HID, attribute = H5I_INVALID_HID;
    memset(out, 0, sizeof *out);
    attribute_path(path, group, name);
    if (!has_path(r, group)) goto done;
    object = H5Oopen(r->file, group, H5P_DEFAULT);
    htri_t exists = object < 0 ? -1 : H5Aexists(object, name);
    if (exists == 0) goto done;
    if (exists > 0) attribute = H5Aopen(object, name, H5P_DEFAULT);
    status = attribute < 0 ? damaged(r, path, err) : get_value(ctx, r, path, attribute, out, err);
done:
    hdf5_close(attribute, H5Aclose);
    hdf5_close(object, H5Oclose);
    hdf5_printing_restore(saved);
    return status;
}

typedef struct attribute_visit {
    const kvq_context   *ctx;
    const arrays_reader *r;
    const char          *group;
    arrays_visit_fn      visit;
    void                *user;
    kvq_error           *err;
    kvq_status           status;
} attribute_visit;

static herr_t visit_attribute(hid_t object, const char *name, const H5A_info_t *info, void *user) {
    attribute_visit *v = user;
    array_value      value = {0};
    char             path[ARRAYS_MAX_PATH];
    (void)info;
    attribute_path(path, v->group, name);
    hid_t attribute = H5Aopen(object, name, H5P_DEFAULT);
    v->status = attribute < 0 ? damaged(v->r, path, v->err) : get_value(v->ctx, v->r, path, attribute, &value, v->err);
    hdf5_close(attribute, H5Aclose);
    if (v->status == KVQ_OK) v->status = v->visit(v->user, name, &value, v->err);
    array_value_free(v->ctx, &value);
    return v->status == KVQ_OK ? 0 : -1;
}

kvq_status arrays_each(const kvq_context *ctx, const arrays_reader *r, const char *group, arrays_visit_fn visit,
                       void *user, kvq_error *err) {
    hdf5_printing   saved = hdf5_printing_off();
    attribute_visit v = {ctx, r, group, visit, user, err, KVQ_OK};
    hsize_t         at = 0;
    hid_t           object = H5I_INVALID_HID;
    if (!has_path(r, group)) goto done;
    object = H5Oopen(r->file, group, H5P_DEFAULT);
    herr_t result = object < 0 ? -1 : H5Aiterate2(object, H5_INDEX_NAME, H5_ITER_INC, &at, visit_attribute, &v);
    if (result < 0 && v.status == KVQ_OK) v.status = damaged(r, group, err);
done:
    hdf5_close(object, H5Oclose);
    hdf5_printing_restore(saved);
    return v.status;
}

// ---------------------------------------------------------------- reading: arrays

// NULL when every element lies in the file, else why that is not so. A chunk that was never written would be read as
// zeros.
static const char *incomplete(const arrays_reader *r, hid_t dataset, hid_t space, hid_t settings,
                              const array_spec *spec) {
    H5D_layout_t layout = H5Pget_layout(settings);
    uint64_t     bytes = TYPES[spec->type].bytes, limit = r->bytes * (layout == H5D_CHUNKED ? MAX_EXPANSION : 1);
    uint64_t     n_chunks = 1;
    hsize_t      chunk[ARRAYS_MAX_RANK], n_stored = 0;
    for (int i = 0; i < spec->rank; i++) {
        if (spec->shape[i] != 0 && bytes > limit / (uint64_t)spec->shape[i])
            return "its shape has more elements than a file of this size can hold";
        bytes *= (uint64_t)spec->shape[i];
    }
    if (bytes == 0 || layout == H5D_COMPACT) return NULL;
    if (layout == H5D_CONTIGUOUS) return H5Dget_storage_size(dataset) == bytes ? NULL : "it was never written";
    if (H5Pget_chunk(settings, ARRAYS_MAX_RANK, chunk) != spec->rank) return "its chunks have another rank";
    for (int i = 0; i < spec->rank; i++) n_chunks *= ((uint64_t)spec->shape[i] + chunk[i] - 1) / chunk[i];
    if (H5Dget_num_chunks(dataset, space, &n_stored) < 0) return "its chunks cannot be counted";
    return n_stored == n_chunks ? NULL : "some of its chunks were never written";
}

static kvq_status describe(const arrays_reader *r, const char *path, hid_t dataset, hid_t type, hid_t space,
                           hid_t settings, array_spec *out, kvq_error *err) {
    char why[160];
    if (!shape_of(space, out)) return refused(r, path, "it has no value or more than four dimensions", err);
    out->type = classify(type);
    if (out->type == KVQ_ARRAY_N_TYPES) {
        return refused(r, path, "its type is none of u8, i32, i64, u64, f16, f32 and f64 (little-endian)", err);
    }
    const char *unsafe = hdf5_unsafe_storage(settings);
    if (unsafe != NULL) return refused(r, path, unsafe, err);
    uint64_t chunk = hdf5_chunk_bytes(settings, TYPES[out->type].bytes);
    if (chunk > MAX_CHUNK_BYTES) {
        (void)snprintf(why, sizeof why, "its chunks have more than %" PRIu64 " MiB", MAX_CHUNK_BYTES >> 20);
        return refused(r, path, why, err);
    }
    unsafe = incomplete(r, dataset, space, settings, out);
    return unsafe == NULL ? KVQ_OK : refused(r, path, unsafe, err);
}

kvq_status arrays_describe(const arrays_reader *r, const char *path, array_spec *out, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    hdf5_printing saved = hdf5_printing_off();
    array_spec    spec = {0};
    hid_t         dataset = H5I_INVALID_HID, type = H5I_INVALID_HID, space = H5I_INVALID_HID;
    hid_t         settings = H5I_INVALID_HID, object = H5I_INVALID_HID;
    if (!has_path(r, path)) {
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: %s is missing", r->path, path);
        goto done;
    }
    object = H5Oopen(r->file, path, H5P_DEFAULT);
    if (object >= 0 && H5Iget_type(object) != H5I_DATASET) {
        status = refused(r, path, "it is not an array", err);
        goto done;
    }
    if (object >= 0) dataset = H5Dopen2(r->file, path, H5P_DEFAULT);
    if (dataset >= 0) {
        type = H5Dget_type(dataset);
        space = H5Dget_space(dataset);
        settings = H5Dget_create_plist(dataset);
    }
    if (type < 0 || space < 0 || settings < 0) {
        status = damaged(r, path, err);
        goto done;
    }
    KVQ_TRY(describe(r, path, dataset, type, space, settings, &spec, err));
    *out = spec;
done:
    hdf5_close(settings, H5Pclose);
    hdf5_close(space, H5Sclose);
    hdf5_close(type, H5Tclose);
    hdf5_close(dataset, H5Dclose);
    hdf5_close(object, H5Oclose);
    hdf5_printing_restore(saved);
    return status;
}

kvq_status arrays_read(const arrays_reader *r, const char *path, const array_spec *spec, int64_t row, int64_t n_rows,
                       void *data, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    hdf5_printing saved = hdf5_printing_off();
    hid_t         type = make_type(spec->type), space = H5I_INVALID_HID, memory = H5I_INVALID_HID;
    hid_t         dataset = H5Dopen2(r->file, path, H5P_DEFAULT);
    if (dataset >= 0) space = H5Dget_space(dataset);
    if (array_elements(spec) > 0 && (space < 0 || !select_rows(space, spec, row, n_rows, &memory) ||
                                     H5Dread(dataset, type, memory, space, H5P_DEFAULT, data) < 0)) {
        status = damaged(r, path, err);
    }
    hdf5_close(memory, H5Sclose);
    hdf5_close(space, H5Sclose);
    hdf5_close(dataset, H5Dclose);
    hdf5_close(type, H5Tclose);
    hdf5_printing_restore(saved);
    return status;
}
