// SPDX-License-Identifier: Apache-2.0
// Curves and tables of the channel-allocated format: against exact k-means, affine tables against those of channels,
// k-means in the plane, views, threads, degenerate layers, lack of memory.
#include "alloc_test.h"
#include "limited_memory.h"

enum { H = 2, D = 8, CHANNELS = H * D };

static kvq_alloc_options small_options(kvq_table_kind tables, int v_dim) {
    kvq_alloc_options o = kvq_alloc_options_default();
    o.outlier_fraction = 0.01;
    o.tables = tables;
    o.v_dim = v_dim;
    return o;
}

static kvq_layer_curves curves_of(const made_layer *m, const kvq_measure_options *measure, const kvq_alloc_options *o) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_layer_curves curves;
    kvq_test_ok(kvq_layer_curves_make(&ctx, &m->layer, measure, o, &curves, &err), &err);
    return curves;
}

static void drop_curves(kvq_layer_curves *curves) {
    kvq_context ctx = kvq_test_context();
    kvq_layer_curves_free(&ctx, curves);
}

static kvq_artifact *fit(const made_layer *m, const kvq_measure_options *measure, const kvq_alloc_options *o,
                         const uint8_t *widths, int rate, int n_threads) {
    kvq_context   ctx = kvq_test_context();
    kvq_error     err = {0};
    kvq_artifact *a = described(1, H, D, measure, o);
    ctx.n_threads = n_threads;
    kvq_test_ok(kvq_fit_allocated_layer(&ctx, &m->layer, measure, o, widths, rate, a, 0, &err), &err);
    return a;
}

static void drop_artifact(kvq_artifact **a) {
    kvq_context ctx = kvq_test_context();
    kvq_artifact_destroy(&ctx, a);
}

static int64_t points_of(const made_layer *m, int c, kvq_weighted_point *points) {
    int64_t n = 0;
    for (int64_t i = (int64_t)c * KVQ_CHANNEL_BINS; i < (int64_t)(c + 1) * KVQ_CHANNEL_BINS; i++) {
        if (m->k.channels.w[i] > 0)
            points[n++] = (kvq_weighted_point){(double)m->k.channels.x[i], (double)m->k.channels.w[i]};
    }
    return n;
}

static double half_range(const made_layer *m, int c) { return (double)kvq_range_half(m->k.lower[c], m->k.upper[c]); }

static bool is_half(float x) { return kvq_float_of_half(kvq_half_of_float(x)) == x; }

// ---------------------------------------------------------------- curves

// Each width is the exact k-means of the channel plus its scatter, in the tensor's units under every weighting.
START_TEST(curves_are_exact_kmeans) {
    static kvq_weighted_point points[KVQ_CHANNEL_BINS];
    kvq_context               ctx = kvq_test_context();
    kvq_error                 err = {0};
    kvq_measure_options       measure = measure_options(0.01);
    kvq_alloc_options         o = small_options(KVQ_TABLE_CHANNEL, 2);
    made_layer               *m = make_layer(H, D, 400);
    const kvq_weighting       weighting = (kvq_weighting)_i;
    measure.channel_weighting = weighting;
    bool             contains = weighting == KVQ_WEIGHT_FISHER_SCALED || weighting == KVQ_WEIGHT_RANGE;
    kvq_layer_curves curves = curves_of(m, &measure, &o);
    for (int c = 0; c < CHANNELS; c++) {
        double  levels[32], cost, r = half_range(m, c), factor = contains ? 1 : r * r;
        int64_t n = points_of(m, c, points);
        for (int b = 0; b < N_WIDTHS; b++) {
            double found = curves.k[c * N_WIDTHS + b];
            kvq_test_ok(kvq_kmeans_exact(&ctx, points, n, 1 << b, levels, &cost, &err), &err);
            double expected = factor * (cost + m->k.channels.scatter[c]);
            ck_assert_double_eq_tol(found, expected, 1e-9 * expected);
            ck_assert(b == 0 || found <= curves.k[c * N_WIDTHS + b - 1]);
        }
    }
    drop_curves(&curves);
    drop_layer(m);
}
END_TEST

// Values in single channels against exact k-means: levels of f16 cost a trace more. Rates that are not allowed are
// infinite. More bits cost less, and pairs less than single channels of the same bits.
START_TEST(curves_of_values) {
    static kvq_weighted_point points[KVQ_HISTOGRAM_BINS];
    kvq_context               ctx = kvq_test_context();
    kvq_error                 err = {0};
    kvq_measure_options       measure = measure_options(0.01);
    kvq_alloc_options         line = small_options(KVQ_TABLE_CHANNEL, 1), pair = small_options(KVQ_TABLE_CHANNEL, 2);
    made_layer               *m = make_layer(H, D, 3000);
    int64_t                   n = 0;
    line.v_rates = 1u << 1 | 1u << 2 | 1u << 3 | 1u << 4;
    pair.v_rates = 1u << 2 | 1u << 4 | 1u << 6 | 1u << 8;
    kvq_layer_curves l = curves_of(m, &measure, &line), p = curves_of(m, &measure, &pair);
    for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) {
        const kvq_value_distribution *v = &m->layer.rotated;
        if (v->w[i] > 0) points[n++] = (kvq_weighted_point){(double)v->x[i], (double)v->w[i]};
    }
    for (int rate = 0; rate <= KVQ_TILE_MAX_WIDTH; rate++) {
        ck_assert(isfinite(l.v[rate]) == ((line.v_rates >> rate & 1u) != 0));
        ck_assert(isfinite(p.v[rate]) == ((pair.v_rates >> rate & 1u) != 0));
        if (!isfinite(l.v[rate])) continue;
        double levels[16], cost;
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, n, 1 << rate, levels, &cost, &err), &err);
        ck_assert(l.v[rate] >= cost + 0.25 && l.v[rate] <= (cost + 0.25) * (1 + 1e-4));
        ck_assert(rate == 1 || l.v[rate] < l.v[rate - 1]);
        ck_assert(p.v[2 * rate] - 0.5 < l.v[rate] * (rate == 1 ? 1.01 : 1));
    }
    drop_curves(&l);
    drop_curves(&p);
    drop_layer(m);
}
END_TEST

// The reference is pairs whatever the options ask for, and what kvq_allocate chooses for it.
START_TEST(the_reference_allocation) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   reference = kvq_reference_allocation();
    made_layer         *m = make_layer(H, D, 400);
    m->kl[0] = 0.5;
    m->kl[1] = 0.25;
    reference.outlier_fraction = 0.01;
    kvq_layer_curves pairs = curves_of(m, &measure, &reference);
    kvq_artifact    *a = described(1, H, D, &measure, &reference);
    kvq_allocation   found;
    kvq_test_ok(kvq_allocate(&ctx, a, &pairs, &reference, &found, &err), &err);
    double loss = 0, sum = 0;
    for (int c = 0; c < CHANNELS; c++) {
        loss += pairs.k[c * N_WIDTHS + found.widths[c]];
        sum += found.widths[c];
    }
    ck_assert(sum == 2 * CHANNELS);
    ck_assert_double_eq_tol(pairs.reference[0], loss, 1e-12 * loss);
    ck_assert(pairs.reference[1] == pairs.v[6]);
    ck_assert_double_eq_tol(found.chosen.k_loss, 0.5, 1e-12); // nats
    ck_assert_double_eq_tol(found.chosen.v_loss, 0.25, 1e-12);
    for (int dim = 1; dim <= 2; dim++) {
        kvq_alloc_options o = small_options(KVQ_TABLE_AFFINE, dim);
        o.v_rates = 1u << 4;
        kvq_layer_curves curves = curves_of(m, &measure, &o);
        for (int i = 0; i < 2; i++) ck_assert(curves.reference[i] == pairs.reference[i] && curves.kl[i] == m->kl[i]);
        drop_curves(&curves);
    }
    kvq_allocation_free(&ctx, &found);
    drop_artifact(&a);
    drop_curves(&pairs);
    drop_layer(m);
}
END_TEST

// ---------------------------------------------------------------- tables

static const uint8_t MIXED[CHANNELS] = {0, 1, 2, 3, 4, 5, 2, 3, 5, 4, 3, 2, 1, 0, 2, 3};

// The error of the artifact's keys by its report.
static double key_error(const kvq_artifact *a) { return a->layers[0].k.fit.objective * a->layers[0].k.fit.weight_sum; }

START_TEST(tables_of_channels) {
    static kvq_weighted_point points[KVQ_CHANNEL_BINS];
    kvq_context               ctx = kvq_test_context();
    kvq_error                 err = {0};
    kvq_measure_options       measure = measure_options(0.01);
    kvq_alloc_options         o = small_options(KVQ_TABLE_CHANNEL, 2);
    made_layer               *m = make_layer(H, D, 400);
    kvq_layer_curves          curves = curves_of(m, &measure, &o);
    kvq_artifact             *a = fit(m, &measure, &o, MIXED, 5, 2);
    const kvq_tensor_quant   *k = &a->layers[0].k, *v = &a->layers[0].v;
    int64_t                   at = 0, n_outliers = 0;
    double                    expected = 0;
    for (int c = 0; c < CHANNELS; c++) {
        double levels[32], cost;
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, points_of(m, c, points), 1 << MIXED[c], levels, &cost, &err), &err);
        for (int j = 0; j < 1 << MIXED[c]; j++, at++) {
            ck_assert(k->key_levels[at] == kvq_float_of_half(kvq_half_of_float((float)levels[j])));
            ck_assert(j == 0 || k->key_levels[at] >= k->key_levels[at - 1]);
        }
        expected += curves.k[c * N_WIDTHS + MIXED[c]];
        n_outliers += c % 5;
        ck_assert(k->lower[c] == m->k.lower[c] && k->upper[c] == m->k.upper[c]);
    }
    ck_assert_int_eq(at, k->n_key_levels);
    ck_assert_mem_eq(k->widths, MIXED, CHANNELS);
    ck_assert(k->fit.n_points == 400 * CHANNELS && k->fit.n_outliers == n_outliers);
    ck_assert(key_error(a) >= expected * (1 - 1e-9) && key_error(a) <= expected * 1.001); // levels are f16
    ck_assert(v->bits == 5 && v->n_levels == 32 && v->dim == 2 && v->scale_exponent == -3);
    for (int i = 0; i < 64; i++) ck_assert(is_half(v->codebook[i]));
    ck_assert_double_eq_tol(v->fit.objective * v->fit.weight_sum, curves.v[5], 1e-9 * curves.v[5]);
    drop_artifact(&a);
    drop_curves(&curves);
    drop_layer(m);
}
END_TEST

// A shared table never beats one for each channel, but for the roundings of both; with 0 and 1 bit it is as good, for
// the maps are exact. More bits cost less.
START_TEST(affine_tables_against_those_of_channels) {
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   affine = small_options(KVQ_TABLE_AFFINE, 2), channel = small_options(KVQ_TABLE_CHANNEL, 2);
    made_layer         *m = make_layer(H, D, 400);
    double              before = HUGE_VAL;
    for (int w = 0; w < N_WIDTHS; w++) {
        uint8_t widths[CHANNELS];
        memset(widths, w, sizeof widths);
        for (int none = 0; none < 2; none++) {
            measure.channel_weighting = none != 0 ? KVQ_WEIGHT_NONE : KVQ_WEIGHT_FISHER_SCALED;
            kvq_artifact           *a = fit(m, &measure, &affine, widths, 5, 2);
            kvq_artifact           *b = fit(m, &measure, &channel, widths, 5, 2);
            const kvq_tensor_quant *k = &a->layers[0].k;
            double                  ratio = key_error(a) / key_error(b);
            ck_assert(ratio >= 0.999);
            ck_assert(ratio <= (w < 2 ? 1.001 : 2.5)); // a bit less costs a factor of 5
            ck_assert(none != 0 || key_error(a) < before);
            if (none == 0) before = key_error(a);
            ck_assert_int_eq(k->n_key_levels, 63);
            for (int j = 0; j < 63; j++) {
                int  first = (1 << w) - 1;
                bool inside = j >= first && j < first + (1 << w);
                ck_assert(is_half(k->key_levels[j]) && (inside || k->key_levels[j] == 0));
                ck_assert(!inside || j == first || k->key_levels[j] >= k->key_levels[j - 1]);
            }
            int n_negative = 0;
            for (int c = 0; c < CHANNELS; c++) {
                ck_assert(is_half(k->offset[c]) && is_half(k->scale[c]));
                n_negative += k->scale[c] < 0;
            }
            ck_assert(w < 2 || n_negative >= CHANNELS / 3); // those that lean the other way
            drop_artifact(&a);
            drop_artifact(&b);
        }
    }
    drop_layer(m);
}
END_TEST

static int by_position(const void *a, const void *b) {
    double x = ((const kvq_weighted_point *)a)->x, y = ((const kvq_weighted_point *)b)->x;
    return (x > y) - (x < y);
}

// The table is the best one for the maps as they are stored: exact k-means of the pooled points themselves is better by
// no more than the bins of the pool and f16 hide: levels of about 2 are off by up to 5e-4, whose square is 2e-5 of the
// error of 4 bits, some 0.01.
START_TEST(an_affine_table_is_fitted_last) {
    static kvq_weighted_point points[CHANNELS * KVQ_CHANNEL_BINS];
    kvq_context               ctx = kvq_test_context();
    kvq_error                 err = {0};
    kvq_measure_options       measure = measure_options(0.01);
    kvq_alloc_options         o = small_options(KVQ_TABLE_AFFINE, 2);
    made_layer               *m = make_layer(H, D, 400);
    for (int w = 2; w <= 4; w++) {
        uint8_t widths[CHANNELS];
        double  levels[16], optimum, cost = 0;
        int64_t n = 0;
        memset(widths, w, sizeof widths);
        kvq_artifact           *a = fit(m, &measure, &o, widths, 5, 2);
        const kvq_tensor_quant *k = &a->layers[0].k;
        for (int c = 0; c < CHANNELS; c++) {
            double  middle = (double)kvq_range_middle(k->lower[c], k->upper[c]), r = half_range(m, c);
            double  z = ((double)k->offset[c] - middle) / r, s = (double)k->scale[c] / r;
            int64_t n_before = n;
            n += points_of(m, c, points + n);
            for (int64_t i = n_before; i < n; i++)
                points[i] = (kvq_weighted_point){(points[i].x - z) / s, points[i].w * s * s};
        }
        qsort(points, (size_t)n, sizeof *points, by_position);
        kvq_test_ok(kvq_kmeans_exact(&ctx, points, n, 1 << w, levels, &optimum, &err), &err);
        for (int64_t i = 0; i < n; i++) {
            double least = HUGE_VAL;
            for (int j = 0; j < 1 << w; j++) {
                double distance = points[i].x - (double)k->key_levels[(1 << w) - 1 + j];
                least = fmin(least, distance * distance);
            }
            cost += points[i].w * least;
        }
        ck_assert(cost >= optimum * (1 - 1e-9) && cost <= optimum * (1 + 2e-5));
        drop_artifact(&a);
    }
    drop_layer(m);
}
END_TEST

// Channels that differ only by an affine map, some of them mirrored, lose nothing by sharing a table.
START_TEST(affine_copies_share_a_table) {
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   affine = small_options(KVQ_TABLE_AFFINE, 2), channel = small_options(KVQ_TABLE_CHANNEL, 2);
    made_layer         *m = make_layer(H, D, 400);
    uint8_t             widths[CHANNELS];
    memset(widths, 3, sizeof widths);
    for (int c = 1; c < CHANNELS; c++) {
        int     sign = c % 2 == 0 ? 1 : -1;
        float   shrink = (float)sign / (1 + (float)c / 8);
        int64_t from = KVQ_CHANNEL_BINS, to = c * (int64_t)KVQ_CHANNEL_BINS;
        for (int i = 0; c != 1 && i < KVQ_CHANNEL_BINS; i++) { // channel 1 leans to one side
            int source = sign > 0 ? i : KVQ_CHANNEL_BINS - 1 - i;
            m->k.channels.w[to + i] = m->k.channels.w[from + source];
            m->k.channels.x[to + i] = m->k.channels.x[from + source] * shrink;
        }
        m->k.channels.scatter[c] = 0;
    }
    memcpy(m->k.channels.w, m->k.channels.w + KVQ_CHANNEL_BINS, KVQ_CHANNEL_BINS * sizeof(float));
    memcpy(m->k.channels.x, m->k.channels.x + KVQ_CHANNEL_BINS, KVQ_CHANNEL_BINS * sizeof(float));
    m->k.channels.scatter[0] = 0;
    kvq_artifact *a = fit(m, &measure, &affine, widths, 5, 2), *b = fit(m, &measure, &channel, widths, 5, 2);
    ck_assert(key_error(a) <= 1.01 * key_error(b)); // bins of the pool, and f16
    drop_artifact(&a);
    drop_artifact(&b);
    drop_layer(m);
}
END_TEST

// No weight in a channel: nothing to lose, and it decodes to the middle. No weight at all is refused when weights were
// asked for; a constant channel; a channel of a single point.
START_TEST(degenerate_layers) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.01);
    made_layer         *m = make_layer(H, D, 400);
    uint8_t             widths[CHANNELS];
    memset(widths, 2, sizeof widths);
    memset(m->k.channels.w + KVQ_CHANNEL_BINS, 0, 2 * KVQ_CHANNEL_BINS * sizeof(float)); // channels 1 and 2
    m->k.channels.scatter[1] = m->k.channels.scatter[2] = m->k.channels.scatter[3] = 0;
    m->k.lower[2] = m->k.upper[2] = 0.5f;
    memset(m->k.channels.w + 3 * KVQ_CHANNEL_BINS, 0, KVQ_CHANNEL_BINS * sizeof(float));
    m->k.channels.w[3 * KVQ_CHANNEL_BINS + 700] = 5;
    m->k.channels.x[3 * KVQ_CHANNEL_BINS + 700] = 0.375f;
    for (int tables = 0; tables < KVQ_N_TABLE_KINDS; tables++) {
        kvq_alloc_options o = small_options((kvq_table_kind)tables, 2);
        kvq_layer_curves  curves = curves_of(m, &measure, &o);
        for (int b = 0; b < 3 * N_WIDTHS; b++) ck_assert(curves.k[N_WIDTHS + b] == 0);
        kvq_artifact           *a = fit(m, &measure, &o, widths, 5, 2);
        const kvq_tensor_quant *k = &a->layers[0].k;
        if (tables == KVQ_TABLE_AFFINE) {
            float middle = kvq_range_middle(m->k.lower[1], m->k.upper[1]);
            ck_assert(k->scale[1] == 0 && k->offset[1] == kvq_float_of_half(kvq_half_of_float(middle)));
            ck_assert(k->scale[2] == 0 && k->offset[2] == 0.5f && k->scale[3] == 0);
        } else {
            for (int j = 4; j < 12; j++) ck_assert(k->key_levels[j] == 0);
            for (int j = 12; j < 16; j++) ck_assert(k->key_levels[j] == 0.375f);
        }
        drop_curves(&curves);
        drop_artifact(&a);
    }
    made_layer *nothing = make_layer(H, D, 400);
    memset(nothing->k.channels.w, 0, CHANNELS * KVQ_CHANNEL_BINS * sizeof(float));
    kvq_alloc_options o = small_options(KVQ_TABLE_AFFINE, 2);
    kvq_artifact     *a = described(1, H, D, &measure, &o);
    kvq_test_failed(kvq_fit_allocated_layer(&ctx, &nothing->layer, &measure, &o, widths, 5, a, 0, &err),
                    KVQ_ERR_NUMERICAL, &err, "layer 0, K: the loss does not feel");
    measure.channel_weighting = KVQ_WEIGHT_RANGE;
    memset(nothing->layer.rotated.pair_w, 0, N_CELLS * sizeof(float));
    nothing->layer.rotated.scatter[1] = 0;
    kvq_test_ok(kvq_fit_allocated_layer(&ctx, &nothing->layer, &measure, &o, widths, 5, a, 0, &err), &err);
    for (int i = 0; i < 64; i++) ck_assert(a->layers[0].v.codebook[i] == 0);
    kvq_test_failed(kvq_fit_allocated_layer(&ctx, &nothing->layer, &measure, &o, widths, 9, a, 0, &err),
                    KVQ_ERR_INTERNAL, &err, "9 bits");
    o.outlier_fraction = 0.02;
    kvq_test_failed(kvq_fit_allocated_layer(&ctx, &nothing->layer, &measure, &o, widths, 5, a, 0, &err),
                    KVQ_ERR_INTERNAL, &err, "0.02");
    nothing->k.channels.w[5 * KVQ_CHANNEL_BINS] = NAN;
    o.outlier_fraction = 0.01;
    kvq_layer_curves curves = {.k = NULL};
    kvq_test_failed(kvq_layer_curves_make(&ctx, &nothing->layer, &measure, &o, &curves, &err), KVQ_ERR_NUMERICAL, &err,
                    "channel 5");
    ck_assert_ptr_null(curves.k);
    drop_artifact(&a);
    drop_layer(nothing);
    drop_layer(m);
}
END_TEST

// An affine map that leaves f16.
START_TEST(maps_beyond_f16_are_refused) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   o = small_options(KVQ_TABLE_AFFINE, 2);
    made_layer         *m = make_layer(H, D, 400);
    kvq_artifact       *a = described(1, H, D, &measure, &o);
    m->k.lower[6] = 2e5f;
    m->k.upper[6] = 3e5f;
    kvq_test_failed(kvq_fit_allocated_layer(&ctx, &m->layer, &measure, &o, MIXED, 5, a, 0, &err), KVQ_ERR_NUMERICAL,
                    &err, "channel 6");
    drop_artifact(&a);
    drop_layer(m);
}
END_TEST

// ---------------------------------------------------------------- views, threads, memory

START_TEST(views_find_the_tables) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.01);
    made_layer         *m = make_layer(H, D, 400);
    for (int tables = 0; tables < KVQ_N_TABLE_KINDS; tables++) {
        kvq_alloc_options       o = small_options((kvq_table_kind)tables, 2);
        kvq_artifact           *a = fit(m, &measure, &o, MIXED, 5, 2);
        const kvq_tensor_quant *k = &a->layers[0].k, *v = &a->layers[0].v;
        kvq_tile_view           keys, values;
        kvq_test_ok(kvq_tile_view_create(&ctx, a, k, &keys, &err), &err);
        kvq_test_ok(kvq_tile_view_create(&ctx, a, v, &values, &err), &err);
        ck_assert(keys.spec.d == CHANNELS && keys.spec.head_dim == D && keys.spec.dim == 1);
        ck_assert(keys.spec.n_slots == kvq_tile_slots(0.01, CHANNELS) && keys.spec.rotation == NULL);
        for (int c = 0, next = 0; c < CHANNELS; next += 1 << MIXED[c++]) {
            float middle = kvq_range_middle(k->lower[c], k->upper[c]), half = kvq_range_half(k->lower[c], k->upper[c]);
            bool  affine = tables == KVQ_TABLE_AFFINE;
            ck_assert_int_eq(keys.spec.table[c], affine ? (1 << MIXED[c]) - 1 : next);
            ck_assert(keys.spec.middle[c] == middle && keys.spec.half[c] == half);
            ck_assert(keys.spec.z[c] == (affine ? k->offset[c] : middle));
            ck_assert(keys.spec.r[c] == (affine ? k->scale[c] : half));
        }
        ck_assert(keys.spec.levels == k->key_levels && values.spec.levels == v->codebook);
        ck_assert(values.spec.z == NULL && values.spec.rotation == a->quantizer.rotation && values.spec.dim == 2);
        for (int c = 0; c < CHANNELS / 2; c++) ck_assert(values.spec.widths[c] == 5 && values.spec.table[c] == 0);
        int64_t tile = kvq_tile_bytes(&keys.spec) + kvq_tile_bytes(&values.spec);
        ck_assert_int_eq(kvq_artifact_cache_size(a, 3 * KVQ_TILE_TOKENS).row_bytes, 3 * tile);
        kvq_tile_view_free(&ctx, &keys);
        kvq_tile_view_free(&ctx, &values);
        drop_artifact(&a);
    }
    drop_layer(m);
}
END_TEST

START_TEST(threads_leave_no_trace) {
    kvq_measure_options measure = measure_options(0.01);
    made_layer         *m = make_layer(H, D, 400);
    for (int problem = 0; problem < 4; problem++) {
        kvq_alloc_options o = small_options((kvq_table_kind)(problem % 2), 1 + problem / 2);
        kvq_artifact     *one = fit(m, &measure, &o, MIXED, 5, 1);
        kvq_layer_curves  first = curves_of(m, &measure, &o);
        for (int n = 2; n <= 7; n += 5) {
            kvq_context      ctx = kvq_test_context();
            kvq_error        err = {0};
            kvq_layer_curves curves;
            ctx.n_threads = n;
            kvq_artifact           *more = fit(m, &measure, &o, MIXED, 5, n);
            const kvq_tensor_quant *a = &one->layers[0].k, *b = &more->layers[0].k;
            ck_assert_mem_eq(a->key_levels, b->key_levels, (size_t)a->n_key_levels * sizeof(float));
            if (a->scale != NULL) ck_assert_mem_eq(a->scale, b->scale, CHANNELS * sizeof(float));
            ck_assert_mem_eq(one->layers[0].v.codebook, more->layers[0].v.codebook,
                             (size_t)o.v_dim * 32 * sizeof(float));
            kvq_test_ok(kvq_layer_curves_make(&ctx, &m->layer, &measure, &o, &curves, &err), &err);
            ck_assert_mem_eq(curves.k, first.k, CHANNELS * N_WIDTHS * sizeof(double));
            ck_assert_mem_eq(curves.v, first.v, sizeof first.v);
            drop_curves(&curves);
            drop_artifact(&more);
        }
        drop_curves(&first);
        drop_artifact(&one);
    }
    drop_layer(m);
}
END_TEST

// Everything that can run out of memory, one allocation after the other; fitted twice, so that arrays are replaced.
static kvq_status fit_and_view(const kvq_context *ctx, const made_layer *m, const kvq_measure_options *measure,
                               const kvq_alloc_options *o, kvq_artifact *a) {
    kvq_status       status = KVQ_OK;
    kvq_error        err;
    kvq_layer_curves curves = {.k = NULL};
    kvq_tile_view    view = {.columns = NULL};
    KVQ_TRY(kvq_layer_curves_make(ctx, &m->layer, measure, o, &curves, &err));
    KVQ_TRY(kvq_fit_allocated_layer(ctx, &m->layer, measure, o, MIXED, 2, a, 0, &err));
    KVQ_TRY(kvq_fit_allocated_layer(ctx, &m->layer, measure, o, MIXED, 3, a, 0, &err));
    KVQ_TRY(kvq_tile_view_create(ctx, a, &a->layers[0].k, &view, &err));
    kvq_tile_view_free(ctx, &view);
    KVQ_TRY(kvq_tile_view_create(ctx, a, &a->layers[0].v, &view, &err));
done:
    kvq_tile_view_free(ctx, &view);
    kvq_layer_curves_free(ctx, &curves);
    return status;
}

START_TEST(nothing_is_lost_without_memory) {
    kvq_measure_options measure = measure_options(0.01);
    made_layer         *m = make_layer(H, D, 20);
    for (int problem = 0; problem < 2; problem++) {
        limited_memory    memory = {.inner = kvq_test_context()};
        kvq_context       ctx = limited_context(&memory);
        kvq_alloc_options o = small_options((kvq_table_kind)problem, 1 + problem);
        kvq_status        status = KVQ_ERR_MEMORY;
        int               n_failed = 0;
        o.v_rates = 1u << 2;
        for (; status != KVQ_OK; n_failed++) {
            kvq_error     err = {0};
            kvq_artifact *a = NULL;
            memory.left = 1000;
            kvq_test_ok(kvq_artifact_create(&ctx, 1, &a, &err), &err);
            a->model.n_kv_heads = H;
            a->model.head_dim = D;
            kvq_test_ok(kvq_artifact_describe_allocated(&ctx, a, &measure, &o, &err), &err);
            memory.left = n_failed;
            status = fit_and_view(&ctx, m, &measure, &o, a);
            ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
            kvq_artifact_destroy(&ctx, &a);
            ck_assert_int_eq(memory.n_live, 0);
        }
        ck_assert(n_failed > 40);
    }
    drop_layer(m);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(curves_are_exact_kmeans, KVQ_N_WEIGHTINGS),
    KVQ_CASE(curves_of_values),
    KVQ_CASE(the_reference_allocation),
    KVQ_CASE(tables_of_channels),
    KVQ_CASE(affine_tables_against_those_of_channels),
    KVQ_CASE(an_affine_table_is_fitted_last),
    KVQ_CASE(affine_copies_share_a_table),
    KVQ_CASE(degenerate_layers),
    KVQ_CASE(maps_beyond_f16_are_refused),
    KVQ_CASE(views_find_the_tables),
    KVQ_CASE(threads_leave_no_trace),
    KVQ_CASE(nothing_is_lost_without_memory),
};
KVQ_TEST_MAIN("alloc_fit", CASES)
