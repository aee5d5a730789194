// SPDX-License-Identifier: Apache-2.0
#include <stdio.h>
#include <string.h>

#include "hdf5_impl.h"

#define MAX_PATH 512

// ---------------------------------------------------------------- HDF5's errors

hdf5_printing hdf5_printing_off(void) {
    hdf5_printing saved = {0};
    saved.known = H5Eget_auto2(H5E_DEFAULT, &saved.function, &saved.data) >= 0;
    (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    return saved;
}

void hdf5_printing_restore(hdf5_printing saved) {
    if (saved.known) (void)H5Eset_auto2(H5E_DEFAULT, saved.function, saved.data);
}

static herr_t copy_innermost(unsigned n, const H5E_error2_t *entry, void *user) {
    hdf5_cause *cause = user;
    if (n == 0) (void)snprintf(cause->text, sizeof cause->text, "%s", entry->desc);
    return 0;
}

hdf5_cause hdf5_last_cause(void) {
    hdf5_cause cause = {"no reason given"};
    (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, copy_innermost, &cause);
    return cause;
}

void hdf5_close(hid_t id, herr_t (*close)(hid_t)) {
    if (id >= 0) (void)close(id);
}

// ---------------------------------------------------------------- writing

hid_t hdf5_text_type(size_t bytes) {
    hid_t type = H5Tcopy(H5T_C_S1);
    if (H5Tset_size(type, bytes > 0 ? bytes : 1) < 0 || H5Tset_cset(type, H5T_CSET_UTF8) < 0 ||
        H5Tset_strpad(type, H5T_STR_NULLPAD) < 0) {
        hdf5_close(type, H5Tclose);
        return H5I_INVALID_HID;
    }
    return type;
}

// The number is far above what any object of ours has.
bool hdf5_keep_compact(hid_t object_settings) {
    return H5Pset_obj_track_times(object_settings, false) >= 0 &&
           H5Pset_attr_phase_change(object_settings, 4096, 0) >= 0;
}

bool hdf5_keep_links_compact(hid_t group_settings) { return H5Pset_link_phase_change(group_settings, 4096, 0) >= 0; }

bool hdf5_make_groups(hid_t file, hid_t group_settings, const char *path) {
    char part[MAX_PATH];
    for (const char *end = path + 1; end[-1] != 0; end++) {
        if ((*end != '/' && *end != 0) || end == path + 1) continue;
        (void)snprintf(part, sizeof part, "%.*s", (int)(end - path), path);
        htri_t exists = H5Lexists(file, part, H5P_DEFAULT);
        if (exists > 0) continue;
        hid_t group = H5Gcreate2(file, part, H5P_DEFAULT, group_settings, H5P_DEFAULT);
        if (exists < 0 || group < 0) return false;
        (void)H5Gclose(group);
    }
    return true;
}

// ---------------------------------------------------------------- reading

const char *hdf5_unsafe_storage(hid_t dataset_settings) {
    H5D_layout_t layout = H5Pget_layout(dataset_settings);
    if (layout != H5D_COMPACT && layout != H5D_CONTIGUOUS && layout != H5D_CHUNKED)
        return "its storage is in other files";
    if (H5Pget_external_count(dataset_settings) != 0) return "its storage is in other files";
    int n_filters = H5Pget_nfilters(dataset_settings);
    if (n_filters < 0) return "its storage has no readable description";
    for (int i = 0; i < n_filters; i++) {
        unsigned     flags, config;
        size_t       n_values = 0;
        H5Z_filter_t filter = H5Pget_filter2(dataset_settings, (unsigned)i, &flags, &n_values, NULL, 0, NULL, &config);
        if (filter != H5Z_FILTER_DEFLATE && filter != H5Z_FILTER_SHUFFLE && filter != H5Z_FILTER_FLETCHER32) {
            return "it is compressed by a filter other than deflate, shuffle and fletcher32";
        }
    }
    return NULL;
}

uint64_t hdf5_chunk_bytes(hid_t dataset_settings, uint64_t element_bytes) {
    hsize_t  chunk[H5S_MAX_RANK];
    uint64_t bytes = element_bytes;
    if (H5Pget_layout(dataset_settings) != H5D_CHUNKED) return 0;
    int rank = H5Pget_chunk(dataset_settings, H5S_MAX_RANK, chunk);
    if (rank <= 0) return UINT64_MAX;
    for (int i = 0; i < rank; i++) {
        if (chunk[i] == 0 || chunk[i] > (uint64_t)INT64_MAX / bytes) return UINT64_MAX;
        bytes *= chunk[i];
    }
    return bytes;
}
