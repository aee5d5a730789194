// SPDX-License-Identifier: Apache-2.0
//
// Private to io: what the files that call HDF5 do the same way.
#ifndef KVQ_IO_HDF5_IMPL_H
#define KVQ_IO_HDF5_IMPL_H

#include <hdf5.h>

#include "kvq_core.h"

// HDF5 prints errors unless told not to; every entry into io turns that off and puts the caller's setting back.
typedef struct hdf5_printing {
    H5E_auto2_t function;
    void       *data;
    bool        known;
} hdf5_printing;
hdf5_printing hdf5_printing_off(void);
void          hdf5_printing_restore(hdf5_printing saved);

// The innermost of HDF5's own error messages.
typedef struct hdf5_cause {
    char text[160];
} hdf5_cause;
hdf5_cause hdf5_last_cause(void);

// Closing is harmless for an id that was never opened, as free is for NULL.
void hdf5_close(hid_t id, herr_t (*close)(hid_t));

// Fixed length, UTF-8, padded with zeros. HDF5 has no strings of length 0, so "" takes one zero.
hid_t hdf5_text_type(size_t bytes);

// Settings under which equal content gives equal bytes: no times, attributes and links in their object's header and
// never in HDF5's heaps.
bool hdf5_keep_compact(hid_t object_settings);
bool hdf5_keep_links_compact(hid_t group_settings);

// Creates the groups above and up to `path` that do not exist. Not HDF5's own creation of intermediate groups: that one
// does not pass our settings on.
bool hdf5_make_groups(hid_t file, hid_t group_settings, const char *path);

// A file that is written through HDF5 without telling it of failures: see hdf5_disk.c. hdf5_disk_use makes `access`
// open an existing file, empty it, and write it this way; the disk is released after the file is closed.
typedef struct hdf5_disk {
    int   error;  // errno of the first failure, 0 so far
    hid_t driver; // H5I_INVALID_HID before and after
} hdf5_disk;
bool hdf5_disk_use(hid_t access, hdf5_disk *disk);
void hdf5_disk_release(hdf5_disk *disk);

// Reading must not open other files or load a plugin: NULL when this dataset's storage does neither, else why not.
const char *hdf5_unsafe_storage(hid_t dataset_settings);
// Bytes of one chunk whose elements take `element_bytes`; 0 when the storage is not chunked, UINT64_MAX beyond 2^63.
uint64_t hdf5_chunk_bytes(hid_t dataset_settings, uint64_t element_bytes);

#endif
