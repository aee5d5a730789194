// SPDX-License-Identifier: Apache-2.0
//
// What was measured of one layer, in memory: shapes that follow from the options, and the list of arrays that files and
// saved states are made of.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kvq_codebook.h"

#define N_CELLS ((int64_t)KVQ_PAIR_CELLS * KVQ_PAIR_CELLS)

// ---------------------------------------------------------------- what options mean

int kvq_measured_v_side(double fraction, int d) { return kvq_block_n_side(fraction, d); }

int kvq_measured_k_side(const kvq_measure_options *options, double fraction, int d) {
    int most = (d - 1) / 2 < KVQ_BLOCK_MAX_SIDE ? (d - 1) / 2 : KVQ_BLOCK_MAX_SIDE;
    if (!(fraction > 0)) return 0;
    // ranges per token are those of the elements that are not outliers, so there are exactly as many
    if (options->k_axis == KVQ_AXIS_TOKEN || options->k_slots == 0) return kvq_block_n_side(fraction, d);
    return options->k_slots < 0 || options->k_slots > most ? most : (int)options->k_slots;
}

int kvq_measured_tile_side(const kvq_measure_options *options, double fraction, int d) {
    int most = (d - 1) / 2 < KVQ_BLOCK_MAX_SIDE ? (d - 1) / 2 : KVQ_BLOCK_MAX_SIDE;
    if (!(fraction > 0)) return 0;
    return options->tile_side < most ? (int)options->tile_side : most;
}

int kvq_measured_fraction(const kvq_measure_options *options, double fraction) {
    for (int f = 0; f < options->n_fractions; f++) {
        if (options->fractions[f] == fraction) return f;
    }
    return -1;
}

// ---------------------------------------------------------------- ownership

static kvq_status create_tensor(const kvq_context *ctx, kvq_weighting_set weightings, int n_heads, int64_t d,
                                bool thresholds, kvq_measured_tensor *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_distributions_create(ctx, weightings, n_heads, &out->heads, err));
    if (thresholds) KVQ_TRY(KVQ_NEW(ctx, d, "lower thresholds", &out->lower, err));
    if (thresholds) KVQ_TRY(KVQ_NEW(ctx, d, "upper thresholds", &out->upper, err));
done:
    return status;
}

static kvq_status create_channels(const kvq_context *ctx, int64_t d, kvq_channel_distribution *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, d * KVQ_CHANNEL_BINS, "weights of channels", &out->w, err));
    KVQ_TRY(KVQ_NEW(ctx, d * KVQ_CHANNEL_BINS, "positions of channels", &out->x, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "scatter of channels", &out->scatter, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "points of channels", &out->n_points, err));
    KVQ_TRY(KVQ_NEW(ctx, d, "outliers of channels", &out->n_outliers, err));
done:
    return status;
}

static kvq_status create_rotated(const kvq_context *ctx, kvq_value_distribution *out, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "weights of rotated values", &out->w, err));
    KVQ_TRY(KVQ_NEW(ctx, KVQ_HISTOGRAM_BINS, "positions of rotated values", &out->x, err));
    KVQ_TRY(KVQ_NEW(ctx, N_CELLS, "weights of pairs", &out->pair_w, err));
    KVQ_TRY(KVQ_NEW(ctx, N_CELLS, "positions of pairs", &out->pair_x, err));
    KVQ_TRY(KVQ_NEW(ctx, N_CELLS, "positions of pairs", &out->pair_y, err));
    KVQ_TRY(KVQ_NEW(ctx, 2, "scatter of rotated values", &out->scatter, err));
    KVQ_TRY(KVQ_NEW(ctx, 1, "points of rotated values", &out->n_points, err));
    KVQ_TRY(KVQ_NEW(ctx, 1, "exponent of scales", &out->scale_exponent, err));
done:
    return status;
}

static kvq_status create_allocated(const kvq_context *ctx, const kvq_measure_options *options, kvq_measured_layer *l,
                                   kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (options->k_axis != KVQ_AXIS_CHANNEL) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, NULL,
                         "keys whose ranges are found per token cannot be measured for the channel-allocated format"));
    }
    for (int f = 0; f < l->n_fractions; f++)
        KVQ_TRY(create_channels(ctx, (int64_t)l->n_kv_heads * l->head_dim, &l->k[f].channels, err));
    KVQ_TRY(create_rotated(ctx, &l->rotated, err));
    KVQ_TRY(KVQ_NEW(ctx, 2, "measured divergence", &l->kl, err));
done:
    return status;
}

static kvq_status create_moments(const kvq_context *ctx, kvq_measured_layer *l, kvq_error *err) {
    int64_t    D2 = (int64_t)l->head_dim * l->head_dim;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, l->n_heads * D2, "second moments of Q", &l->moments.q, err));
    KVQ_TRY(KVQ_NEW(ctx, l->n_kv_heads * D2, "second moments of K", &l->moments.k, err));
    KVQ_TRY(KVQ_NEW(ctx, l->n_kv_heads * D2, "second moments of V", &l->moments.v, err));
done:
    return status;
}

kvq_status kvq_measured_layer_create(const kvq_context *ctx, const kvq_measure_options *options, int n_heads,
                                     int n_kv_heads, int head_dim, kvq_measured_layer **out, kvq_error *err) {
    kvq_measured_layer *l = NULL;
    int64_t             d = (int64_t)n_kv_heads * head_dim;
    kvq_status          status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, 1, "measurement of a layer", &l, err));
    l->n_fractions = options->n_fractions;
    l->n_heads = n_heads;
    l->n_kv_heads = n_kv_heads;
    l->head_dim = head_dim;
    l->weightings = options->weightings;
    KVQ_TRY(KVQ_NEW(ctx, options->n_fractions, "measurements of K", &l->k, err));
    KVQ_TRY(KVQ_NEW(ctx, options->n_fractions, "measurements of V", &l->v, err));
    for (int f = 0; f < options->n_fractions; f++) {
        bool thresholds = options->k_axis == KVQ_AXIS_CHANNEL;
        KVQ_TRY(create_tensor(ctx, l->weightings, n_kv_heads, d, thresholds, &l->k[f], err));
        KVQ_TRY(create_tensor(ctx, l->weightings, n_kv_heads, d, false, &l->v[f], err));
    }
    if (options->moments) KVQ_TRY(create_moments(ctx, l, err));
    if (options->allocated) KVQ_TRY(create_allocated(ctx, options, l, err));
    *out = l;
    l = NULL;
done:
    kvq_measured_layer_destroy(ctx, &l);
    return status;
}

static void free_channels(const kvq_context *ctx, kvq_channel_distribution *channels) {
    kvq_free(ctx, channels->w);
    kvq_free(ctx, channels->x);
    kvq_free(ctx, channels->scatter);
    kvq_free(ctx, channels->n_points);
    kvq_free(ctx, channels->n_outliers);
}

static void free_rotated(const kvq_context *ctx, kvq_value_distribution *rotated) {
    kvq_free(ctx, rotated->w);
    kvq_free(ctx, rotated->x);
    kvq_free(ctx, rotated->pair_w);
    kvq_free(ctx, rotated->pair_x);
    kvq_free(ctx, rotated->pair_y);
    kvq_free(ctx, rotated->scatter);
    kvq_free(ctx, rotated->n_points);
    kvq_free(ctx, rotated->scale_exponent);
}

static void free_tensors(const kvq_context *ctx, kvq_measured_tensor *tensors, int n) {
    for (int f = 0; tensors != NULL && f < n; f++) {
        kvq_free(ctx, tensors[f].lower);
        kvq_free(ctx, tensors[f].upper);
        kvq_distributions_free(ctx, &tensors[f].heads);
        free_channels(ctx, &tensors[f].channels);
    }
    kvq_free(ctx, tensors);
}

void kvq_measured_layer_destroy(const kvq_context *ctx, kvq_measured_layer **layer) {
    kvq_measured_layer *l = *layer;
    if (l == NULL) return;
    free_tensors(ctx, l->k, l->n_fractions);
    free_tensors(ctx, l->v, l->n_fractions);
    kvq_free(ctx, l->moments.q);
    kvq_free(ctx, l->moments.k);
    kvq_free(ctx, l->moments.v);
    free_rotated(ctx, &l->rotated);
    kvq_free(ctx, l->kl);
    kvq_free(ctx, l);
    *layer = NULL;
}

// ---------------------------------------------------------------- the list of arrays

#define N_COUNTS (int)(sizeof(kvq_element_counts) / sizeof(int64_t))
#define N_SUMS   (int)(sizeof(kvq_distribution_sums) / sizeof(double))

// Takes the parts that exist one after the other until the wanted one.
typedef struct part_search {
    int                wanted, at;
    bool               found;
    kvq_measured_part *out;
} part_search;

static void offer(part_search *s, const char *prefix, const char *name, kvq_part_type type, void *data, int64_t a,
                  int64_t b, int64_t c) {
    if (data == NULL || s->found || s->at++ != s->wanted) return;
    s->found = true;
    s->out->type = type;
    s->out->data = data;
    s->out->n_dims = c > 0 ? 3 : b > 0 ? 2 : 1;
    s->out->dims[0] = a;
    s->out->dims[1] = b;
    s->out->dims[2] = c;
    (void)snprintf(s->out->name, sizeof s->out->name, "%s%s", prefix, name);
}

static void offer_tensor(part_search *s, const kvq_measured_layer *l, const kvq_measured_tensor *t, char letter,
                         int fraction) {
    char              prefix[32], name[32];
    int64_t           d = (int64_t)l->n_kv_heads * l->head_dim;
    kvq_distribution *heads = t->heads;
    (void)snprintf(prefix, sizeof prefix, "%c/%d/", letter, fraction);
    offer(s, prefix, "threshold_lower", KVQ_PART_F32, t->lower, d, 0, 0);
    offer(s, prefix, "threshold_upper", KVQ_PART_F32, t->upper, d, 0, 0);
    offer(s, prefix, "counts", KVQ_PART_I64, heads->counts, l->n_kv_heads, N_COUNTS, 0);
    offer(s, prefix, "sums", KVQ_PART_F64, heads->sums, l->n_kv_heads, N_SUMS, 0);
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        (void)snprintf(name, sizeof name, "weight_%s", kvq_weighting_names[w]);
        offer(s, prefix, name, KVQ_PART_F32, heads->by[w].w, l->n_kv_heads, KVQ_HISTOGRAM_BINS, 0);
        (void)snprintf(name, sizeof name, "mean_%s", kvq_weighting_names[w]);
        offer(s, prefix, name, KVQ_PART_F32, heads->by[w].x, l->n_kv_heads, KVQ_HISTOGRAM_BINS, 0);
    }
}

static void offer_channels(part_search *s, const kvq_channel_distribution *channels, int64_t d, int fraction) {
    char prefix[32];
    (void)snprintf(prefix, sizeof prefix, "k/%d/channel_", fraction);
    offer(s, prefix, "weight", KVQ_PART_F32, channels->w, d, KVQ_CHANNEL_BINS, 0);
    offer(s, prefix, "mean", KVQ_PART_F32, channels->x, d, KVQ_CHANNEL_BINS, 0);
    offer(s, prefix, "scatter", KVQ_PART_F64, channels->scatter, d, 0, 0);
    offer(s, prefix, "points", KVQ_PART_I64, channels->n_points, d, 0, 0);
    offer(s, prefix, "outliers", KVQ_PART_I64, channels->n_outliers, d, 0, 0);
}

static void offer_rotated(part_search *s, const kvq_value_distribution *rotated) {
    offer(s, "rotated/", "weight", KVQ_PART_F32, rotated->w, KVQ_HISTOGRAM_BINS, 0, 0);
    offer(s, "rotated/", "mean", KVQ_PART_F32, rotated->x, KVQ_HISTOGRAM_BINS, 0, 0);
    offer(s, "rotated/", "pair_weight", KVQ_PART_F32, rotated->pair_w, KVQ_PAIR_CELLS, KVQ_PAIR_CELLS, 0);
    offer(s, "rotated/", "pair_x", KVQ_PART_F32, rotated->pair_x, KVQ_PAIR_CELLS, KVQ_PAIR_CELLS, 0);
    offer(s, "rotated/", "pair_y", KVQ_PART_F32, rotated->pair_y, KVQ_PAIR_CELLS, KVQ_PAIR_CELLS, 0);
    offer(s, "rotated/", "scatter", KVQ_PART_F64, rotated->scatter, 2, 0, 0);
    offer(s, "rotated/", "n_points", KVQ_PART_I64, rotated->n_points, 1, 0, 0);
    offer(s, "rotated/", "scale_exponent", KVQ_PART_I64, rotated->scale_exponent, 1, 0, 0);
}

int kvq_measured_layer_parts(const kvq_measured_layer *l, int index, kvq_measured_part *out) {
    part_search s = {.wanted = index, .out = out};
    int64_t     D = l->head_dim;
    for (int f = 0; f < l->n_fractions; f++) {
        offer_tensor(&s, l, &l->k[f], 'k', f);
        offer_channels(&s, &l->k[f].channels, (int64_t)l->n_kv_heads * D, f);
        offer_tensor(&s, l, &l->v[f], 'v', f);
    }
    offer(&s, "moments/", "q", KVQ_PART_F64, l->moments.q, l->n_heads, D, D);
    offer(&s, "moments/", "k", KVQ_PART_F64, l->moments.k, l->n_kv_heads, D, D);
    offer(&s, "moments/", "v", KVQ_PART_F64, l->moments.v, l->n_kv_heads, D, D);
    offer_rotated(&s, &l->rotated);
    offer(&s, "", "kl", KVQ_PART_F64, l->kl, 2, 0, 0);
    return s.found;
}
