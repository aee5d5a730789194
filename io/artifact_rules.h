// SPDX-License-Identifier: Apache-2.0
//
// Private to io: the schemes that an artifact may follow, and what its content obeys beyond the ranges of single
// fields. Writing and reading apply the same rules, so what could not be read again is not written.
#ifndef KVQ_IO_ARTIFACT_RULES_H
#define KVQ_IO_ARTIFACT_RULES_H

#include "artifact_fields.h"

// How rows are coded. A file says the version of its scheme, so that readers keep reading what they understand.
typedef struct artifact_scheme {
    const char *name;
    int         since;                 // minor version that brought it
    const char *version, *conventions; // what its files say
    unsigned    of;                    // OF_NUQ or OF_ALLOC
} artifact_scheme;

// KVQ_ERR_UNSUPPORTED, naming it, for a scheme that this minor version does not have.
kvq_status artifact_scheme_find(const char *name, int minor, const artifact_scheme **out, kvq_error *err);

// One tensor of one layer, with the names it has outside.
typedef struct artifact_place {
    kvq_tensor_quant *tensor;
    unsigned          of; // one of field_of: this tensor in this scheme
    char              group[64], hf_name[64];
} artifact_place;

#define ARTIFACT_TENSORS 2 // of a layer, K first
artifact_place artifact_place_of(const kvq_artifact *artifact, const artifact_scheme *scheme, int64_t layer, int which);

static inline bool artifact_is_key(const artifact_place *p) { return (p->of & OF_K) != 0; }

// What concerns several settings together, before any array of a layer is looked at.
kvq_status artifact_check_settings(const kvq_artifact *artifact, const artifact_scheme *scheme, kvq_error *err);
kvq_status artifact_check_tensors(const kvq_artifact *artifact, const artifact_scheme *scheme, kvq_error *err);

// Shared by the rules of both schemes: all numbers are finite (KVQ_ERR_NUMERICAL), and thresholds are ranges.
kvq_status artifact_check_finite(const char *group, const char *name, const float *x, int64_t n, kvq_error *err);
kvq_status artifact_check_thresholds(const artifact_place *p, int64_t d, kvq_error *err);

// Of scheme "alloc" (artifact_alloc.c).
kvq_status artifact_check_alloc_settings(const kvq_artifact *artifact, kvq_error *err);
kvq_status artifact_check_alloc_tensor(const kvq_artifact *artifact, const artifact_place *p, kvq_error *err);

#endif
