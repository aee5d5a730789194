// SPDX-License-Identifier: Apache-2.0
//
// Private to the reports: pictures by gnuplot, which is looked for in PATH at run time.
#ifndef KVQ_PLOTS_H
#define KVQ_PLOTS_H

#include <stdbool.h>
#include <stddef.h>

typedef enum plot_result { PLOT_DRAWN, PLOT_NO_GNUPLOT, PLOT_FAILED } plot_result;

// Runs gnuplot with the commands on its input. *svg is the drawing as an element that can stand inside of a page: no
// declarations in front, no fixed size, `title` for those who cannot see it. Released with free().
plot_result plot_run(const char *commands, size_t bytes, const char *title, char **svg);

#endif
