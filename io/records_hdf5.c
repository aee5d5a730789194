// SPDX-License-Identifier: Apache-2.0
//
// Records as HDF5 and back. It works on files in memory (HDF5's core driver), so the disk is seen by files.c alone: no
// partial file, no lock, no second reading of a file that changes meanwhile.
//
// Why these settings?  Bounds 1.8 .. 1.8: readable since 2008, and object headers carry checksums, which the older
//   layout lacks, so damage in HDF5's own structures is found before they are believed. No object times and all
//   attributes and links in their object's header: equal content gives equal bytes.
// What is not done:  type conversion (memory type = file type; HDF5 1.10.8 converts floats wrongly), variable-length
//   strings, soft or external links, external or virtual storage, filters that would load a plugin.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hdf5_impl.h"
#include "records.h"

#define IMAGE_STEP    ((size_t)64 << 10) // growth of a file in memory
#define MAX_LINKS     100000             // far above the few thousand of the largest model; ends cycles of hard links
#define MAX_DEPTH     8
#define MAX_EXPANSION 1032 // no allowed filter expands more: deflate's limit (zlib's technical notes)

// ---------------------------------------------------------------- types

static hid_t number_type(record_type type) {
    switch (type) {
    case RECORD_I64:
        return H5T_STD_I64LE;
    case RECORD_U64:
        return H5T_STD_U64LE;
    case RECORD_F64:
        return H5T_IEEE_F64LE;
    case RECORD_F32:
        return H5T_IEEE_F32LE;
    default:
        return H5I_INVALID_HID;
    }
}

static hid_t create_type(record_type type, size_t text_bytes) {
    return type == RECORD_TEXT ? hdf5_text_type(text_bytes) : H5Tcopy(number_type(type));
}

// ---------------------------------------------------------------- writing

// The settings of one file that is being made.
typedef struct writer {
    hid_t file, group_settings, dataset_settings;
} writer;

static hid_t access_in_memory(void) {
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (H5Pset_fapl_core(access, IMAGE_STEP, false) < 0 ||
        H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V18) < 0) {
        hdf5_close(access, H5Pclose);
        return H5I_INVALID_HID;
    }
    return access;
}

// The finished file is taken over at the moment HDF5 closes it. H5Fget_file_image would be shorter, but 1.10.8 clears a
// flag in the image's superblock without renewing the checksum over it, and then refuses to open its own work.
typedef struct captured {
    uint8_t *data; // malloc's: HDF5 does not recover well from a failing allocation, so none is injected here
    size_t   bytes;
} captured;

static void *image_malloc(size_t bytes, H5FD_file_image_op_t when, void *user) {
    (void)when, (void)user;
    return calloc(1, bytes);
}

static void *image_memcpy(void *to, const void *from, size_t bytes, H5FD_file_image_op_t when, void *user) {
    (void)when, (void)user;
    return memcpy(to, from, bytes);
}

// Zeros what is new: bytes that HDF5 never writes are part of the file too.
static void *image_realloc(void *p, size_t bytes, H5FD_file_image_op_t when, void *user) {
    captured *image = user;
    uint8_t  *grown = realloc(p, bytes);
    (void)when;
    if (grown == NULL) return NULL;
    if (bytes > image->bytes) memset(grown + image->bytes, 0, bytes - image->bytes);
    image->bytes = bytes;
    return grown;
}

static herr_t image_free(void *p, H5FD_file_image_op_t when, void *user) {
    if (when == H5FD_FILE_IMAGE_OP_FILE_CLOSE)
        ((captured *)user)->data = p;
    else
        free(p);
    return 0;
}

static void  *share_user(void *user) { return user; }
static herr_t leave_user(void *user) {
    (void)user;
    return 0;
}

static bool capture_image(hid_t access, captured *image) {
    H5FD_file_image_callbacks_t callbacks = {image_malloc, image_memcpy, image_realloc, image_free,
                                             share_user,   leave_user,   image};
    return H5Pset_file_image_callbacks(access, &callbacks) >= 0;
}

// A superblock of version 2 (HDF5 File Format Specification 3.0, II.A) says where the file ends; behind lies what the
// driver allocated in advance.
static size_t image_end(const captured *image) {
    uint64_t end = 0;
    if (image->data != NULL && image->bytes >= 48) memcpy(&end, image->data + 28, sizeof end);
    return end <= image->bytes ? (size_t)end : 0;
}

// HDF5 takes two open files of one name for the same file; the address of something alive makes the name unique.
static void unique_name(char *out, size_t size, const void *alive) { (void)snprintf(out, size, "kvq-%p", alive); }

static bool writer_open(writer *w, captured *image) {
    char  name[64];
    hid_t access = access_in_memory(), creation = H5Pcreate(H5P_FILE_CREATE);
    w->group_settings = H5Pcreate(H5P_GROUP_CREATE);
    w->dataset_settings = H5Pcreate(H5P_DATASET_CREATE);
    unique_name(name, sizeof name, w);
    if (access >= 0 && capture_image(access, image) && hdf5_keep_compact(creation) &&
        hdf5_keep_compact(w->group_settings) && hdf5_keep_compact(w->dataset_settings) &&
        hdf5_keep_links_compact(creation) && hdf5_keep_links_compact(w->group_settings)) {
        w->file = H5Fcreate(name, H5F_ACC_TRUNC, creation, access);
    }
    hdf5_close(creation, H5Pclose);
    hdf5_close(access, H5Pclose);
    return w->file >= 0;
}

static bool writer_close(writer *w) {
    hdf5_close(w->dataset_settings, H5Pclose);
    hdf5_close(w->group_settings, H5Pclose);
    return w->file >= 0 && H5Fclose(w->file) >= 0;
}

static bool write_attribute(const writer *w, const record *r, const char *owner, const char *name, hid_t type,
                            hid_t space) {
    hid_t object = H5Oopen(w->file, owner, H5P_DEFAULT);
    hid_t attribute = object < 0 ? object : H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    bool  ok = attribute >= 0 && H5Awrite(attribute, type, r->data) >= 0;
    hdf5_close(attribute, H5Aclose);
    hdf5_close(object, H5Oclose);
    return ok;
}

static bool write_dataset(const writer *w, const record *r, hid_t type, hid_t space) {
    hid_t dataset = H5Dcreate2(w->file, r->path, type, space, H5P_DEFAULT, w->dataset_settings, H5P_DEFAULT);
    bool  ok = dataset >= 0 && H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, r->data) >= 0;
    hdf5_close(dataset, H5Dclose);
    return ok;
}

static bool write_record(const writer *w, const record *r) {
    hsize_t shape[RECORD_MAX_RANK] = {0};
    char    owner[RECORD_MAX_PATH];
    for (int i = 0; i < r->rank; i++) shape[i] = (hsize_t)r->shape[i];
    (void)snprintf(owner, sizeof owner, "%s", r->path);
    char *name = strchr(owner, '@'), *slash = strrchr(owner, '/');
    bool  is_attribute = name != NULL;
    if (is_attribute) *name = 0;
    if (!is_attribute) slash[slash == owner ? 1 : 0] = 0;
    hid_t type = create_type(r->type, r->bytes);
    hid_t space = r->rank == 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(r->rank, shape, NULL);
    bool  ok = type >= 0 && space >= 0 && hdf5_make_groups(w->file, w->group_settings, owner) &&
              (is_attribute ? write_attribute(w, r, owner, name + 1, type, space) : write_dataset(w, r, type, space));
    hdf5_close(space, H5Sclose);
    hdf5_close(type, H5Tclose);
    return ok;
}

kvq_status records_to_hdf5(const kvq_context *ctx, const record_list *list, size_t room, uint8_t **image, size_t *bytes,
                           kvq_error *err) {
    writer        w = {H5I_INVALID_HID, H5I_INVALID_HID, H5I_INVALID_HID};
    captured      made = {0};
    kvq_status    status = KVQ_OK;
    uint8_t      *copy = NULL;
    const char   *at = "file";
    hdf5_printing saved = hdf5_printing_off();
    bool          ok = writer_open(&w, &made);
    for (int64_t i = 0; ok && i < list->count; i++) {
        at = list->items[i].path;
        ok = write_record(&w, &list->items[i]);
    }
    hdf5_cause why = hdf5_last_cause();
    ok = writer_close(&w) && ok;
    size_t size = image_end(&made);
    if (!ok || size == 0) {
        status =
            kvq_fail(err, KVQ_ERR_MEMORY, NULL, "%s: HDF5 could not build the artifact in memory: %s", at, why.text);
        goto done;
    }
    KVQ_TRY(KVQ_NEW(ctx, (int64_t)(size + room), "artifact file", &copy, err));
    memcpy(copy, made.data, size);
    *image = copy;
    *bytes = size;
done:
    free(made.data);
    hdf5_printing_restore(saved);
    return status;
}

// ---------------------------------------------------------------- reading

typedef struct loader {
    const kvq_context *ctx;
    record_list        list;
    int64_t            n_links;
    uint64_t           limit; // bytes that one value may have
    kvq_error         *err;
} loader;

static kvq_status damaged(const loader *l, const char *path) {
    return kvq_fail(l->err, KVQ_ERR_INTEGRITY, NULL, "%s cannot be read: HDF5: %s", path, hdf5_last_cause().text);
}

static kvq_status refused(const loader *l, const char *path, const char *why) {
    return kvq_fail(l->err, KVQ_ERR_INPUT, "docs/format.md lists what an artifact may contain", "%s: %s", path, why);
}

static const char BAD_TYPE[] =
    "its type is none of i64, u64, f64, f32 (little-endian) and fixed-length zero-padded UTF-8 text";

// Which record type an HDF5 type is; RECORD_N_TYPES when none.
static record_type classify(hid_t type) {
    for (int t = RECORD_I64; t < RECORD_N_TYPES; t++) {
        if (H5Tequal(type, number_type((record_type)t)) > 0) return (record_type)t;
    }
    if (H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0) return RECORD_N_TYPES;
    hid_t text = hdf5_text_type(H5Tget_size(type));
    bool  equal = text >= 0 && H5Tequal(type, text) > 0;
    hdf5_close(text, H5Tclose);
    return equal ? RECORD_TEXT : RECORD_N_TYPES;
}

// Shape of a value, and its size in memory checked against the limit.
static kvq_status measure(const loader *l, const char *path, hid_t type, hid_t space, record *r) {
    hsize_t     dims[RECORD_MAX_RANK] = {0};
    H5S_class_t kind = H5Sget_simple_extent_type(space);
    r->type = classify(type);
    r->rank = H5Sget_simple_extent_ndims(space);
    if (r->type == RECORD_N_TYPES) return refused(l, path, BAD_TYPE);
    if ((kind != H5S_SCALAR && kind != H5S_SIMPLE) || r->rank < 0 || r->rank > RECORD_MAX_RANK) {
        return refused(l, path, "it has no value or more than three dimensions");
    }
    if (r->type == RECORD_TEXT && r->rank != 0) return refused(l, path, "arrays of text are not allowed");
    if (H5Sget_simple_extent_dims(space, dims, NULL) < 0) return damaged(l, path);
    uint64_t bytes = r->type == RECORD_TEXT ? H5Tget_size(type) : RECORD_TYPE_BYTES[r->type];
    for (int i = 0; i < r->rank; i++) {
        if (dims[i] > l->limit || (dims[i] != 0 && bytes > l->limit / dims[i])) {
            return refused(l, path, "its shape has more elements than a file of this size can hold");
        }
        bytes *= dims[i];
        r->shape[i] = (int64_t)dims[i];
    }
    if (bytes > l->limit) return refused(l, path, "its text is longer than the file");
    r->bytes = (size_t)bytes;
    return KVQ_OK;
}

static bool zero_after_text(const char *text, size_t bytes) {
    for (size_t i = strlen(text); i < bytes; i++) {
        if (text[i] != 0) return false;
    }
    return true;
}

// Appends the value of an attribute or a dataset under `path`.
static kvq_status load_value(loader *l, hid_t object, bool is_attribute, const char *path) {
    kvq_status status = KVQ_OK;
    record     r = {0};
    void      *data = NULL;
    hid_t      type = is_attribute ? H5Aget_type(object) : H5Dget_type(object);
    hid_t      space = is_attribute ? H5Aget_space(object) : H5Dget_space(object);
    if (type < 0 || space < 0) {
        status = damaged(l, path);
        goto done;
    }
    KVQ_TRY(measure(l, path, type, space, &r));
    KVQ_TRY(record_reserve(l->ctx, &l->list, path, r.type, r.rank, r.shape, r.bytes, &data, l->err));
    herr_t read = 0;
    if (r.bytes > 0) {
        read = is_attribute ? H5Aread(object, type, data) : H5Dread(object, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
    }
    if (read < 0) {
        status = damaged(l, path);
    } else if (r.type == RECORD_TEXT) {
        if (!zero_after_text(data, r.bytes)) status = refused(l, path, "text has bytes after its first zero");
        l->list.items[l->list.count - 1].bytes = strlen(data);
    }
done:
    hdf5_close(space, H5Sclose);
    hdf5_close(type, H5Tclose);
    return status;
}

// '@' separates attribute names in record paths, control characters would make the lines of the content hash ambiguous.
static kvq_status join(const loader *l, const char *owner, char separator, const char *name,
                       char out[RECORD_MAX_PATH]) {
    int n = snprintf(out, RECORD_MAX_PATH, "%s%c%s", owner, separator, name);
    for (const char *c = name; *c != 0; c++) {
        if (*c == '@' || (unsigned char)*c < 0x20)
            return refused(l, owner, "a name below it has '@' or a control character");
    }
    if (n < 0 || n >= RECORD_MAX_PATH) return refused(l, owner, "a name below it is too long");
    return KVQ_OK;
}

typedef struct attribute_visit {
    loader     *loader;
    const char *owner;
    kvq_status  status;
} attribute_visit;

static herr_t load_attribute(hid_t object, const char *name, const H5A_info_t *info, void *user) {
    (void)info;
    attribute_visit *visit = user;
    char             path[RECORD_MAX_PATH];
    visit->status = join(visit->loader, visit->owner, '@', name, path);
    if (visit->status != KVQ_OK) return -1;
    hid_t attribute = H5Aopen(object, name, H5P_DEFAULT);
    visit->status = attribute < 0 ? damaged(visit->loader, path) : load_value(visit->loader, attribute, true, path);
    hdf5_close(attribute, H5Aclose);
    return visit->status == KVQ_OK ? 0 : -1;
}

static kvq_status load_attributes(loader *l, hid_t object, const char *owner) {
    attribute_visit visit = {l, owner, KVQ_OK};
    hsize_t         at = 0;
    herr_t          result = H5Aiterate2(object, H5_INDEX_NAME, H5_ITER_INC, &at, load_attribute, &visit);
    if (visit.status != KVQ_OK) return visit.status;
    return result < 0 ? damaged(l, owner) : KVQ_OK;
}

// Reading must not open other files, load a plugin, or allocate a chunk that the file cannot fill.
static const char *unsafe_storage(const loader *l, hid_t settings) {
    const char *why = hdf5_unsafe_storage(settings);
    if (why == NULL && hdf5_chunk_bytes(settings, 8) > l->limit) why = "its chunks are larger than the file";
    return why;
}

static kvq_status load_dataset(loader *l, hid_t dataset, const char *path) {
    hid_t settings = H5Dget_create_plist(dataset);
    if (settings < 0) return damaged(l, path);
    const char *why = unsafe_storage(l, settings);
    (void)H5Pclose(settings);
    if (why != NULL) return refused(l, path, why);
    kvq_status status = load_value(l, dataset, false, path);
    return status == KVQ_OK ? load_attributes(l, dataset, path) : status;
}

static kvq_status load_group(loader *l, hid_t group, const char *path, int depth);

// One link of a group; path is "" for the root, so that children read "/model".
static kvq_status load_link(loader *l, hid_t group, const char *group_path, hsize_t index, int depth) {
    char       name[RECORD_MAX_PATH], path[RECORD_MAX_PATH];
    H5L_info_t link;
    if (H5Lget_name_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, index, name, sizeof name, H5P_DEFAULT) < 0) {
        return damaged(l, group_path);
    }
    kvq_status status = join(l, group_path, '/', name, path);
    if (status != KVQ_OK) return status;
    if (H5Lget_info(group, name, &link, H5P_DEFAULT) < 0) return damaged(l, path);
    if (link.type != H5L_TYPE_HARD) return refused(l, path, "soft and external links are not allowed");
    if (++l->n_links > MAX_LINKS || depth > MAX_DEPTH) return refused(l, path, "too many objects, or a cycle of links");
    hid_t object = H5Oopen(group, name, H5P_DEFAULT);
    if (object < 0) return damaged(l, path);
    switch (H5Iget_type(object)) {
    case H5I_GROUP:
        status = load_group(l, object, path, depth);
        break;
    case H5I_DATASET:
        status = load_dataset(l, object, path);
        break;
    default:
        status = refused(l, path, "it is neither a group nor a dataset");
    }
    (void)H5Oclose(object);
    return status;
}

static kvq_status load_group(loader *l, hid_t group, const char *path, int depth) {
    H5G_info_t info;
    if (H5Gget_info(group, &info) < 0) return damaged(l, path);
    kvq_status status = load_attributes(l, group, path[0] == 0 ? "/" : path);
    for (hsize_t i = 0; status == KVQ_OK && i < info.nlinks; i++) status = load_link(l, group, path, i, depth + 1);
    return status;
}

kvq_status records_from_hdf5(const kvq_context *ctx, const uint8_t *image, size_t bytes, record_list *out,
                             kvq_error *err) {
    hdf5_printing saved = hdf5_printing_off();
    loader        l = {.ctx = ctx, .limit = (uint64_t)bytes * MAX_EXPANSION, .err = err};
    hid_t         access = access_in_memory(), file = H5I_INVALID_HID, root = H5I_INVALID_HID;
    char          id[64];
    unique_name(id, sizeof id, &l);
    // HDF5 copies the bytes, so it never sees the caller's mapping; the cast is for an interface without const.
    if (access >= 0 && H5Pset_file_image(access, (void *)(uintptr_t)image, bytes) >= 0) {
        file = H5Fopen(id, H5F_ACC_RDONLY, access);
    }
    if (file >= 0) root = H5Gopen2(file, "/", H5P_DEFAULT);
    kvq_status status = root < 0 ? damaged(&l, "the file") : load_group(&l, root, "", 0);
    hdf5_close(root, H5Gclose);
    hdf5_close(file, H5Fclose);
    hdf5_close(access, H5Pclose);
    if (status == KVQ_OK) {
        record_sort(&l.list);
        *out = l.list;
    } else {
        record_list_free(ctx, &l.list);
    }
    hdf5_printing_restore(saved);
    return status;
}
