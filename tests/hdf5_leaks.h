// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites that show damaged files to HDF5. Include it in one source of a program: it answers the leak
// checker.
#ifndef HDF5_LEAKS_H
#define HDF5_LEAKS_H

#include <hdf5.h>
#include <stdbool.h>

// HDF5 1.10.8 loses memory when it meets damage. It says so at exit unless its printing is off by then, and a leak
// checker would say so too, but asks the second function before.
static bool expect_leaks;

__attribute__((visibility("default"))) int __lsan_is_turned_off(void);

int __lsan_is_turned_off(void) { return expect_leaks; }

static void expect_hdf5_leaks(void) {
    (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    expect_leaks = true; // in this test's process
}

#endif
