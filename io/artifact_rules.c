// SPDX-License-Identifier: Apache-2.0
// Schemes, and the rules of scheme "nuq"; see artifact_rules.h.
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "artifact_rules.h"
#include "artifact_schema.h"

// ---------------------------------------------------------------- schemes and places

static const artifact_scheme SCHEMES[] = {
    {"nuq", 0, "1.1", "KVQ-1.1", OF_NUQ},
    {"alloc", 2, "1.2", "KVQ-1.2", OF_ALLOC},
};
#define N_SCHEMES (sizeof SCHEMES / sizeof *SCHEMES)

kvq_status artifact_scheme_find(const char *name, int minor, const artifact_scheme **out, kvq_error *err) {
    char   known[64] = "";
    size_t used = 0;
    if (minor > ARTIFACT_MINOR) minor = ARTIFACT_MINOR;
    for (size_t i = 0; i < N_SCHEMES && SCHEMES[i].since <= minor; i++) {
        if (strcmp(name, SCHEMES[i].name) == 0) {
            *out = &SCHEMES[i];
            return KVQ_OK;
        }
        used += (size_t)snprintf(known + used, sizeof known - used, "%s'%s'", i > 0 ? ", " : "", SCHEMES[i].name);
    }
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, QUANTIZER_SCHEME " is '%.80s'; format %d.%d knows %s", name,
                    ARTIFACT_MAJOR, minor, known);
}

artifact_place artifact_place_of(const kvq_artifact *artifact, const artifact_scheme *scheme, int64_t layer,
                                 int which) {
    bool           is_key = which == 0;
    char           letter = is_key ? 'k' : 'v';
    artifact_place p = {.of = scheme->of & (is_key ? OF_K : OF_V)};
    p.tensor = is_key ? &artifact->layers[layer].k : &artifact->layers[layer].v;
    (void)snprintf(p.group, sizeof p.group, "/layers/%03" PRId64 "/%c", layer, letter);
    (void)snprintf(p.hf_name, sizeof p.hf_name, "model.layers.%" PRId64 ".self_attn.%c_proj", layer, letter);
    return p;
}

// ---------------------------------------------------------------- of both schemes

kvq_status artifact_check_finite(const char *group, const char *name, const float *x, int64_t n, kvq_error *err) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "%s/%s: element %" PRId64 " is %g", group, name, i,
                            (double)x[i]);
        }
    }
    return KVQ_OK;
}

kvq_status artifact_check_thresholds(const artifact_place *p, int64_t d, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    kvq_status              status = artifact_check_finite(p->group, "threshold_lower", t->lower, d, err);
    if (status == KVQ_OK) status = artifact_check_finite(p->group, "threshold_upper", t->upper, d, err);
    for (int64_t c = 0; status == KVQ_OK && c < d; c++) {
        float lower = t->lower[c], upper = t->upper[c];
        if (lower <= upper && isfinite(upper - lower) && isfinite(upper + lower)) continue;
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL,
                          "%s: the thresholds of channel %" PRId64
                          ", %.9g and %.9g, do not ascend or have no f32 middle and width",
                          p->group, c, (double)lower, (double)upper);
    }
    return status;
}

// ---------------------------------------------------------------- of "nuq"

// Evenly spaced levels may be decoded by integer arithmetic and have their zero point clamped, so they must be what
// they are called. 2^-20: far more than f32 can be off, far less than any step.
static kvq_status check_even(const artifact_place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    for (int i = 0; i < t->n_groups * t->n_levels; i++) {
        double even = 2.0 * (i % t->n_levels) / (t->n_levels - 1) - 1;
        if (fabs((double)t->codebook[i] - even) <= 0x1p-20) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/codebook: element %d is %.9g; the datatype '%s' has %.9g there",
                        p->group, i, (double)t->codebook[i], kvq_datatype_names[t->datatype], even);
    }
    return KVQ_OK;
}

static kvq_status check_levels(const artifact_place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    int                     n = t->n_groups * t->n_levels;
    kvq_status              status = artifact_check_finite(p->group, "codebook", t->codebook, n, err);
    if (status == KVQ_OK && t->decode_levels != NULL)
        status = artifact_check_finite(p->group, "decode_levels", t->decode_levels, n, err);
    if (status != KVQ_OK) return status;
    for (int i = 1; i < n; i++) {
        if (i % t->n_levels == 0 || t->codebook[i] >= t->codebook[i - 1]) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/codebook: level %d, %.9g, is below level %d, %.9g", p->group, i,
                        (double)t->codebook[i], i - 1, (double)t->codebook[i - 1]);
    }
    bool is_even = t->datatype == KVQ_INT || t->datatype == KVQ_INT_CLAMPED;
    return is_even ? check_even(p, err) : KVQ_OK;
}

static kvq_status check_nuq_tensor(const kvq_artifact *a, const artifact_place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    bool                    per_channel = t->axis == KVQ_AXIS_CHANNEL;
    if ((t->n_groups != 1 && t->n_groups != a->model.n_kv_heads) || t->dim != 1 || t->n_levels != 1 << t->bits) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "%s/codebook: %d groups of %d levels of %d dimensions; format 1.1 holds one group, or one per "
                        "KV head, of 2^bits = %d levels of one",
                        p->group, t->n_groups, t->n_levels, t->dim, 1 << t->bits);
    }
    if (per_channel && !artifact_is_key(p)) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s@axis is 'channel'; format 1.1 knows 'token' here",
                        p->group);
    }
    if (t->codebook == NULL || (t->lower != NULL) != per_channel || (t->upper != NULL) != per_channel) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s: the codebook is missing, or thresholds do not fit the axis '%s'",
                        p->group, kvq_axis_names[t->axis]);
    }
    kvq_status status = check_levels(p, err);
    return status == KVQ_OK && per_channel ? artifact_check_thresholds(p, artifact_row_width(a), err) : status;
}

// The members of the other scheme have no place in its files, and losing one in silence would change what it means.
static kvq_status check_nuq_settings(const kvq_artifact *a, kvq_error *err) {
    if (!kvq_artifact_is_allocated(a)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, QUANTIZER_SCHEME " is 'nuq', but there is a rotation of values");
}

// ---------------------------------------------------------------- all

kvq_status artifact_check_settings(const kvq_artifact *a, const artifact_scheme *scheme, kvq_error *err) {
    int        n_side = a->quantizer.n_side_k > a->quantizer.n_side_v ? a->quantizer.n_side_k : a->quantizer.n_side_v;
    kvq_status status = artifact_check_row_width(a, err);
    if (status != KVQ_OK) return status;
    if (2 * (int64_t)n_side >= artifact_row_width(a)) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "/quantizer: %d outliers per side leave nothing of %" PRId64 " channels", n_side,
                        artifact_row_width(a));
    }
    return scheme->of == OF_ALLOC ? artifact_check_alloc_settings(a, err) : check_nuq_settings(a, err);
}

kvq_status artifact_check_tensors(const kvq_artifact *a, const artifact_scheme *scheme, kvq_error *err) {
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        for (int which = 0; which < ARTIFACT_TENSORS; which++) {
            artifact_place p = artifact_place_of(a, scheme, layer, which);
            kvq_status     status =
                scheme->of == OF_ALLOC ? artifact_check_alloc_tensor(a, &p, err) : check_nuq_tensor(a, &p, err);
            if (status != KVQ_OK) return status;
        }
    }
    return KVQ_OK;
}
