// SPDX-License-Identifier: Apache-2.0
//
// A file driver of HDF5 for writing, whose writes never fail in HDF5's eyes. Why: HDF5 1.10 keeps a file that could not
// be flushed (a full disk is enough) half open, and crashes when the process ends and it tries again. So the first
// failure is remembered, with the system's own reason, and nothing more is written; HDF5 closes in peace, and the
// caller asks hdf5_disk.error.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hdf5_impl.h"

// What HDF5 sees; the first member is its own part.
typedef struct driver_file {
    H5FD_t     base;
    hdf5_disk *disk;
    int        fd;
    haddr_t    end_of_addresses, end_of_file;
} driver_file;

static void remember(hdf5_disk *disk) {
    if (disk->error == 0) disk->error = errno != 0 ? errno : EIO;
}

static H5FD_t *disk_open(const char *name, unsigned flags, hid_t access, haddr_t max_address) {
    hdf5_disk *const *disk = H5Pget_driver_info(access);
    driver_file      *f = calloc(1, sizeof *f); // HDF5 does not recover well from a failing allocation
    (void)flags, (void)max_address;
    if (disk == NULL || f == NULL) {
        free(f);
        return NULL;
    }
    f->disk = *disk;
    f->fd = open(name, O_RDWR | O_TRUNC | O_CLOEXEC);
    if (f->fd < 0) {
        remember(f->disk);
        free(f);
        return NULL;
    }
    return &f->base;
}

static herr_t disk_close(H5FD_t *base) {
    driver_file *f = (driver_file *)(void *)base;
    if (close(f->fd) != 0) remember(f->disk);
    free(f);
    return 0;
}

// Which features HDF5 may use; those of its own driver for plain files.
static herr_t disk_query(const H5FD_t *base, unsigned long *flags) {
    (void)base;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
    return 0;
}

static haddr_t disk_get_eoa(const H5FD_t *base, H5FD_mem_t type) {
    (void)type;
    return ((const driver_file *)(const void *)base)->end_of_addresses;
}

static herr_t disk_set_eoa(H5FD_t *base, H5FD_mem_t type, haddr_t address) {
    (void)type;
    ((driver_file *)(void *)base)->end_of_addresses = address;
    return 0;
}

static haddr_t disk_get_eof(const H5FD_t *base, H5FD_mem_t type) {
    (void)type;
    return ((const driver_file *)(const void *)base)->end_of_file;
}

// What was never written reads as zeros, as in every file.
static herr_t disk_read(H5FD_t *base, H5FD_mem_t type, hid_t transfer, haddr_t address, size_t bytes, void *out) {
    driver_file *f = (driver_file *)(void *)base;
    uint8_t     *to = out;
    (void)type, (void)transfer;
    while (bytes > 0) {
        ssize_t n = pread(f->fd, to, bytes, (off_t)address);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) remember(f->disk);
        if (n <= 0) break;
        to += n, address += (haddr_t)n, bytes -= (size_t)n;
    }
    memset(to, 0, bytes);
    return 0;
}

static herr_t disk_write(H5FD_t *base, H5FD_mem_t type, hid_t transfer, haddr_t address, size_t bytes,
                         const void *data) {
    driver_file   *f = (driver_file *)(void *)base;
    const uint8_t *from = data;
    (void)type, (void)transfer;
    while (bytes > 0 && f->disk->error == 0) {
        ssize_t n = pwrite(f->fd, from, bytes, (off_t)address);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            remember(f->disk);
            break;
        }
        from += n, address += (haddr_t)n, bytes -= (size_t)n;
    }
    if (address + bytes > f->end_of_file) f->end_of_file = address + bytes;
    return 0;
}

static herr_t disk_truncate(H5FD_t *base, hid_t transfer, hbool_t closing) {
    driver_file *f = (driver_file *)(void *)base;
    (void)transfer, (void)closing;
    if (f->end_of_file == f->end_of_addresses) return 0;
    if (f->disk->error == 0 && ftruncate(f->fd, (off_t)f->end_of_addresses) != 0) remember(f->disk);
    f->end_of_file = f->end_of_addresses;
    return 0;
}

bool hdf5_disk_use(hid_t access, hdf5_disk *disk) {
    static const H5FD_class_t DRIVER = {
#ifdef H5FD_CLASS_VERSION // since HDF5 1.14
        .version = H5FD_CLASS_VERSION,
        .value = (H5FD_class_value_t)512, // the first number that is free for anybody
#endif
        .name = "kvq",
        .maxaddr = INT64_MAX,
        .fc_degree = H5F_CLOSE_STRONG,
        .fapl_size = sizeof(hdf5_disk *),
        .open = disk_open,
        .close = disk_close,
        .query = disk_query,
        .get_eoa = disk_get_eoa,
        .set_eoa = disk_set_eoa,
        .get_eof = disk_get_eof,
        .read = disk_read,
        .write = disk_write,
        .truncate = disk_truncate,
        .fl_map = H5FD_FLMAP_DICHOTOMY,
    };
    disk->driver = H5FDregister(&DRIVER);
    return disk->driver >= 0 && H5Pset_driver(access, disk->driver, &disk) >= 0; // keeps a copy of the pointer
}

// HDF5 1.10.8 gives up its own hold on a driver before it calls disk_close.
void hdf5_disk_release(hdf5_disk *disk) {
    hdf5_close(disk->driver, H5FDunregister);
    disk->driver = H5I_INVALID_HID;
}
