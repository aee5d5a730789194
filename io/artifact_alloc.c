// SPDX-License-Identifier: Apache-2.0
// The rules of scheme "alloc": channel-allocated keys and rotated values, in tiles. See artifact_rules.h.
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "artifact_rules.h"

#define ROTATION QUANTIZER_GROUP "/rotation"

// ---------------------------------------------------------------- settings

typedef enum rotation_kind { ROTATION_HADAMARD, ROTATION_RANDOM, ROTATION_NONE } rotation_kind;
static const char *const ROTATION_KINDS[] = {"hadamard", "random", "none", NULL};

static kvq_status find_rotation_kind(const char *text, rotation_kind *out, kvq_error *err) {
    for (int i = 0; ROTATION_KINDS[i] != NULL; i++) {
        if (strcmp(text, ROTATION_KINDS[i]) != 0) continue;
        *out = (rotation_kind)i;
        return KVQ_OK;
    }
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                    QUANTIZER_GROUP "@rotation_kind is '%.80s', none of 'hadamard', 'random', 'none'", text);
}

// An engine may compute by the kind alone: a fast transform, or nothing. 2^-22 lets 1 / sqrt(D) be off by its last bit.
static kvq_status check_rotation_kind(const float *r, int D, rotation_kind kind, kvq_error *err) {
    for (int i = 0; i < D * D && kind != ROTATION_RANDOM; i++) {
        double x = (double)r[i];
        bool   is_right = kind == ROTATION_NONE ? x == (i % (D + 1) == 0) : fabs(fabs(x) * sqrt(D) - 1) <= 0x1p-22;
        if (is_right) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        ROTATION ": element %d is %.9g, which rotation_kind '%s' does not have", i, x,
                        ROTATION_KINDS[kind]);
    }
    return KVQ_OK;
}

// Rounding an orthogonal matrix to f32 changes a product of two of its rows by at most 2^-23 (the rows have length 1:
// Cauchy-Schwarz). D times that leaves room for a factorisation in f32, whose error grows with D, and is below the
// 2^-11 of an f16 for every D that a tile can have.
static kvq_status check_orthogonal(const float *r, int D, kvq_error *err) {
    const double tolerance = D * 0x1p-23;
    for (int i = 0; i < D; i++) {
        for (int j = 0; j <= i; j++) {
            double sum = 0;
            for (int k = 0; k < D; k++) sum += (double)r[i * D + k] * (double)r[j * D + k];
            if (fabs(sum - (i == j)) <= tolerance) continue;
            return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                            ROTATION ": rows %d and %d have the product %.9g; it is not orthogonal", i, j, sum);
        }
    }
    return KVQ_OK;
}

static kvq_status check_rotation(const kvq_artifact *a, kvq_error *err) {
    int           D = (int)a->model.head_dim;
    rotation_kind kind = ROTATION_NONE;
    kvq_status    status = find_rotation_kind(a->quantizer.rotation_kind, &kind, err);
    if (status != KVQ_OK) return status;
    if (a->quantizer.rotation == NULL) return kvq_fail(err, KVQ_ERR_INPUT, NULL, ROTATION " is missing");
    KVQ_TRY(artifact_check_finite(QUANTIZER_GROUP, "rotation", a->quantizer.rotation, (int64_t)D * D, err));
    KVQ_TRY(check_orthogonal(a->quantizer.rotation, D, err));
    KVQ_TRY(check_rotation_kind(a->quantizer.rotation, D, kind, err));
done:
    return status;
}

kvq_status artifact_check_alloc_settings(const kvq_artifact *a, kvq_error *err) {
    if (a->model.head_dim < 2 || a->model.head_dim > KVQ_TILE_MAX_HEAD_DIM) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "/model@head_dim is %" PRId64 ", outside of 2 .. %d of a tile",
                        a->model.head_dim, KVQ_TILE_MAX_HEAD_DIM);
    }
    if (a->quantizer.n_slots % 2 != 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, QUANTIZER_GROUP "@n_slots is %d, an odd number",
                        a->quantizer.n_slots);
    }
    if (a->quantizer.n_side_v != 0 || a->quantizer.recent_tokens != 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        QUANTIZER_GROUP ": n_side_v is %d and recent_tokens is %" PRId64 "; scheme 'alloc' has neither",
                        a->quantizer.n_side_v, a->quantizer.recent_tokens);
    }
    return check_rotation(a, err);
}

// ---------------------------------------------------------------- tensors

static kvq_status check_halves(const artifact_place *p, const char *name, const float *x, int64_t n, kvq_error *err) {
    kvq_status status = artifact_check_finite(p->group, name, x, n, err);
    for (int64_t i = 0; status == KVQ_OK && i < n; i++) {
        if (kvq_float_of_half(kvq_half_of_float(x[i])) == x[i]) continue;
        status = kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/%s: element %" PRId64 " is %.9g, not a number of f16", p->group,
                          name, i, (double)x[i]);
    }
    return status;
}

// What a tensor has, by its role; the rest has to be absent.
typedef struct part {
    const char *name;
    const void *data;
    bool        wanted;
} part;

static kvq_status check_parts(const artifact_place *p, const part *parts, int n, kvq_error *err) {
    for (int i = 0; i < n; i++) {
        if ((parts[i].data != NULL) == parts[i].wanted) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/%s is %s", p->group, parts[i].name,
                        parts[i].wanted ? "missing" : "there, which scheme 'alloc' does not have");
    }
    return KVQ_OK;
}

static kvq_status check_presence(const artifact_place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    bool                    is_key = artifact_is_key(p), is_affine = is_key && t->table_kind == KVQ_TABLE_AFFINE;
    const part parts[] = {{"codebook", t->codebook, !is_key},    {"decode_levels", t->decode_levels, false},
                          {"threshold_lower", t->lower, is_key}, {"threshold_upper", t->upper, is_key},
                          {"widths", t->widths, is_key},         {"key_levels", t->key_levels, is_key},
                          {"offset", t->offset, is_affine},      {"scale", t->scale, is_affine}};
    return check_parts(p, parts, (int)(sizeof parts / sizeof *parts), err);
}

static kvq_status check_widths(const artifact_place *p, int64_t d, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    int64_t                 n = 0;
    bool                    is_affine = t->table_kind == KVQ_TABLE_AFFINE;
    for (int64_t c = 0; c < d; c++) {
        if (t->widths[c] > KVQ_MAX_KEY_WIDTH) {
            return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/widths: element %" PRId64 " is %d, outside of 0 .. %d",
                            p->group, c, t->widths[c], KVQ_MAX_KEY_WIDTH);
        }
        n += 1 << t->widths[c];
    }
    if (is_affine) n = (2 << KVQ_MAX_KEY_WIDTH) - 1;
    if (t->n_key_levels == n) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s/key_levels: %" PRId64 " levels; the tables of %s have %" PRId64,
                    p->group, t->n_key_levels, is_affine ? "every width" : "these widths", n);
}

static kvq_status check_ascending(const artifact_place *p, int64_t first, int64_t n, kvq_error *err) {
    const float *x = p->tensor->key_levels;
    for (int64_t i = first + 1; i < first + n; i++) {
        if (x[i] >= x[i - 1]) continue;
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "%s/key_levels: level %" PRId64 ", %.9g, is below level %" PRId64 ", %.9g, of its table",
                        p->group, i, (double)x[i], i - 1, (double)x[i - 1]);
    }
    return KVQ_OK;
}

static kvq_status check_key_levels(const artifact_place *p, int64_t d, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    bool                    is_affine = t->table_kind == KVQ_TABLE_AFFINE;
    int64_t                 n_tables = is_affine ? KVQ_MAX_KEY_WIDTH + 1 : d, first = 0;
    kvq_status              status = check_halves(p, "key_levels", t->key_levels, t->n_key_levels, err);
    for (int64_t i = 0; status == KVQ_OK && i < n_tables; i++) {
        int64_t n = (int64_t)1 << (is_affine ? i : t->widths[i]);
        status = check_ascending(p, first, n, err);
        first += n;
    }
    return status;
}

static kvq_status check_keys(const artifact_place *p, int64_t d, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    kvq_status              status = KVQ_OK;
    if (t->bits != 0 || t->n_levels != 0) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL,
                        "%s: %d bits and %d levels; in scheme 'alloc' each channel has a width", p->group, t->bits,
                        t->n_levels);
    }
    KVQ_TRY(check_widths(p, d, err));
    KVQ_TRY(check_key_levels(p, d, err));
    KVQ_TRY(artifact_check_thresholds(p, d, err));
    KVQ_TRY(check_halves(p, "threshold_lower", t->lower, d, err));
    KVQ_TRY(check_halves(p, "threshold_upper", t->upper, d, err));
    if (t->offset != NULL) KVQ_TRY(check_halves(p, "offset", t->offset, d, err));
    if (t->scale != NULL) KVQ_TRY(check_halves(p, "scale", t->scale, d, err));
done:
    return status;
}

static kvq_status check_values(const kvq_artifact *a, const artifact_place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    bool                    is_pair = t->dim == 2 && a->model.head_dim % 2 == 0;
    if (t->bits < 1 || t->bits > KVQ_TILE_MAX_WIDTH) {
        return kvq_fail(err, KVQ_ERR_INPUT, NULL, "%s@bits is %d, outside of 1 .. %d", p->group, t->bits,
                        KVQ_TILE_MAX_WIDTH);
    }
    if (t->n_groups != 1 || t->n_levels != 1 << t->bits || (t->dim != 1 && !is_pair)) {
        return kvq_fail(
            err, KVQ_ERR_UNSUPPORTED, NULL,
            "%s/codebook: %d groups of %d levels of %d dimensions; scheme 'alloc' holds one group of 2^bits = "
            "%d levels of one dimension, or of two that divide head_dim",
            p->group, t->n_groups, t->n_levels, t->dim, 1 << t->bits);
    }
    return artifact_check_finite(p->group, "codebook", t->codebook, (int64_t)t->n_levels * t->dim, err);
}

kvq_status artifact_check_alloc_tensor(const kvq_artifact *a, const artifact_place *p, kvq_error *err) {
    const kvq_tensor_quant *t = p->tensor;
    bool                    is_key = artifact_is_key(p);
    kvq_axis                axis = is_key ? KVQ_AXIS_CHANNEL : KVQ_AXIS_TOKEN;
    if (t->axis != axis || t->datatype != KVQ_NUQ) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "%s@%s: scheme 'alloc' knows '%s' only", p->group,
                        t->axis != axis ? "axis" : "datatype",
                        t->axis != axis ? kvq_axis_names[axis] : kvq_datatype_names[KVQ_NUQ]);
    }
    kvq_status status = check_presence(p, err);
    if (status != KVQ_OK) return status;
    return is_key ? check_keys(p, artifact_row_width(a), err) : check_values(a, p, err);
}
