// SPDX-License-Identifier: Apache-2.0
//
// Private to io: the layout of a measurement file, shared by its writer and its reader. Attributes are the fields of an
// artifact (artifact_fields.h) and those of kvq_measure_options; arrays are whatever kvq_measured_layer_parts lists,
// under /layers/NNN, so that neither file nor code here names them twice.
#ifndef KVQ_IO_MEASUREMENT_IMPL_H
#define KVQ_IO_MEASUREMENT_IMPL_H

#include "arrays.h"
#include "artifact_fields.h"

#define MEASUREMENT_FORMAT "kvq.measurement"
#define MEASUREMENT_MAJOR  1 // as in artifact_schema.h
#define MEASUREMENT_MINOR  1
#define MEASUREMENT_GROUP  "/measurement"
#define FRACTIONS_PATH     MEASUREMENT_GROUP "/fractions"

// Members of kvq_measure_options that are one value.
extern const field  MEASURE_FIELDS[];
extern const size_t N_MEASURE_FIELDS;
// Since 1.1, of files with `allocated` only: the members, and how fine and how far channels and values are counted.
extern const field  ALLOCATED_FIELDS[];
extern const size_t N_ALLOCATED_FIELDS;
typedef struct measurement_grid {
    const char *name; // "channel_bins"
    int64_t     value;
} measurement_grid;
extern const measurement_grid MEASUREMENT_GRIDS[];
extern const size_t           N_MEASUREMENT_GRIDS;

// Whether a measurement has this field of an artifact: all but the quantizer's.
bool measurement_has_field(const field *f);

#define WEIGHTINGS_TEXT 64
void measurement_weightings_text(kvq_weighting_set set, char out[WEIGHTINGS_TEXT]); // "none,fisher,range"
bool measurement_weightings_parse(const char *text, kvq_weighting_set *out);        // what the other one writes

// What options and sizes must obey for a layer of them to be made at all.
kvq_status measurement_check(const kvq_artifact *about, const kvq_measure_options *options, kvq_error *err);
// KVQ_ERR_NUMERICAL for what kvq_measurement_read refuses.
kvq_status measurement_check_values(const kvq_measured_layer *measured, int64_t layer, kvq_error *err);

// How a part is stored, and where.
array_spec measurement_part_spec(const kvq_measured_part *part);
void       measurement_part_path(char out[ARRAYS_MAX_PATH], int64_t layer, const kvq_measured_part *part);

// The spectra, Q first.
#define N_SPECTRA 3
typedef struct spectrum_kind {
    char letter;
    bool of_queries; // one per query head, otherwise one per KV head
} spectrum_kind;
extern const spectrum_kind SPECTRA[N_SPECTRA];

array_spec measurement_values_spec(int n_heads, int head_dim);
array_spec measurement_vectors_spec(int n_heads, int head_dim);
void       measurement_spectrum_path(char out[ARRAYS_MAX_PATH], int64_t layer, char letter, bool vectors);

#endif
