// SPDX-License-Identifier: Apache-2.0
//
// How the bits of the channel-allocated format are spent: a greedy walk along lower convex hulls.
//
// A *unit* is what has one width: a group of channels of a head, or the values of a layer. Each has a curve of
// (cost in bits, error); a *segment* joins two neighbouring points of its hull. All segments of all units are sorted
// once by what a bit gains there, and a walk takes them in that order as long as the budget lasts. Slopes of a hull
// fall, so the segments of a unit come in their own order, and up to the first one that does not fit the result is the
// optimum for what it costs (Shoham and Gersho 1988). One that does not fit is passed over, and with it all that follow
// in its unit: they start from a width that was not reached.
//
// Keys and values share a budget in bits per element, but not a walk: the split is searched over key budgets, for each
// the values take what keys leave, and keys take what values leave, whose steps are coarse.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "codebook_impl.h"

#define MAX_WIDTHS     (KVQ_TILE_MAX_WIDTH + 1)
#define STEPS_PER_BIT  16
#define ROUNDING       1e-6 // of a bit, so that 2.1 bits of 1000 channels are 2100
#define BITS_OF_LEVEL  16
#define MAX_TOKENS     (INT64_C(1) << 24)
#define MAX_SEQUENCES  (INT64_C(1) << 10)
#define QUARTER_OF_BIT (STEPS_PER_BIT / 4)
#define LARGEST_GROUP  8
#define LEAST_GROUPS   8 // of a head

// ---------------------------------------------------------------- options

kvq_alloc_options kvq_alloc_options_default(void) {
    return (kvq_alloc_options){.outlier_fraction = 0.0025,
                               .target_bits = 3,
                               .n_tokens = 2048,
                               .n_sequences = 8,
                               .k_widths = (2u << KVQ_MAX_KEY_WIDTH) - 1,
                               .v_rates = 1u << 4 | 1u << 5 | 1u << 6 | 1u << 7 | 1u << 8,
                               .scope = KVQ_BUDGET_MODEL,
                               .tables = KVQ_TABLE_CHANNEL,
                               .v_dim = 2};
}

kvq_alloc_options kvq_reference_allocation(void) {
    kvq_alloc_options o = kvq_alloc_options_default();
    o.target_bits = 0;
    o.k_bits = 2;
    o.v_bits = 3;
    o.v_rates = 1u << 6;
    o.group = 8; // of any head: what was measured stays valid
    o.scope = KVQ_BUDGET_LAYER;
    return o;
}

int kvq_alloc_group(const kvq_alloc_options *o, int head_dim) {
    int group = LARGEST_GROUP;
    if (o->group > 0) return o->group;
    while (group > 1 && head_dim < LEAST_GROUPS * group) group /= 2;
    return group;
}

static int lowest_bit(unsigned set) {
    int i = 0;
    while (i < 31 && (set >> i & 1u) == 0) i++;
    return i;
}

static int highest_bit(unsigned set) {
    int i = 31;
    while (i > 0 && (set >> i & 1u) == 0) i--;
    return i;
}

static kvq_status check_mean(const char *option, double bits, double least, double most, kvq_error *err) {
    if (bits >= least && bits <= most) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s %g cannot be a mean of the allowed widths, which reach from %g to %g",
                    option, bits, least, most);
}

static kvq_status check_budget(const kvq_alloc_options *o, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (o->k_bits != 0 || o->v_bits != 0) {
        if (!(o->k_bits > 0) || !(o->v_bits > 0)) {
            return kvq_fail(err, KVQ_ERR_USAGE, "give both, or --target-bits", "--k-mean-bits %g and --v-mean-bits %g",
                            o->k_bits, o->v_bits);
        }
        KVQ_TRY(check_mean("--k-mean-bits", o->k_bits, lowest_bit(o->k_widths), highest_bit(o->k_widths), err));
        KVQ_TRY(check_mean("--v-mean-bits", o->v_bits, (double)lowest_bit(o->v_rates) / o->v_dim,
                           (double)highest_bit(o->v_rates) / o->v_dim, err));
    } else if (!(o->target_bits > 0) || !(o->target_bits <= 32)) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--target-bits %g is not a number of bits per element",
                        o->target_bits);
    }
    if (o->n_tokens < 1 || o->n_tokens > MAX_TOKENS || o->n_sequences < 1 || o->n_sequences > MAX_SEQUENCES) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--target-tokens %lld and --target-sequences %lld; 1 to %lld and 1 to %lld are possible",
                        (long long)o->n_tokens, (long long)o->n_sequences, (long long)MAX_TOKENS,
                        (long long)MAX_SEQUENCES);
    }
done:
    return status;
}

kvq_status kvq_alloc_options_check(const kvq_alloc_options *o, int head_dim, kvq_error *err) {
    const unsigned rates = ((2u << KVQ_TILE_MAX_WIDTH) - 1) & ~1u, widths = (2u << KVQ_MAX_KEY_WIDTH) - 1;
    if (head_dim < 2 || head_dim > KVQ_TILE_MAX_HEAD_DIM) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "heads of %d channels; tiles take 2 to %d", head_dim,
                        KVQ_TILE_MAX_HEAD_DIM);
    }
    if (!(o->outlier_fraction >= 0) || !(o->outlier_fraction < 1)) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--outliers %g is not a fraction in [0, 1)", o->outlier_fraction);
    }
    if (o->k_widths == 0 || (o->k_widths & ~widths) != 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--k-widths: widths of keys are 0 to %d bits", KVQ_MAX_KEY_WIDTH);
    }
    if (o->v_dim < 1 || o->v_dim > 2 || head_dim % o->v_dim != 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--v-dim %d; 1 or 2 are possible, and it must divide head_dim = %d",
                        o->v_dim, head_dim);
    }
    if (o->v_rates == 0 || (o->v_rates & ~rates) != 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--v-rates: %s of values have 1 to %d bits",
                        o->v_dim == 2 ? "pairs" : "channels", KVQ_TILE_MAX_WIDTH);
    }
    if (o->group < 0 || o->group > KVQ_TILE_MAX_HEAD_DIM) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--width-group %d; 1 to %d channels can share a width", o->group,
                        KVQ_TILE_MAX_HEAD_DIM);
    }
    if ((unsigned)o->scope >= KVQ_N_BUDGET_SCOPES || (unsigned)o->tables >= KVQ_N_TABLE_KINDS) {
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "budget scope %d, table kind %d", (int)o->scope, (int)o->tables);
    }
    return check_budget(o, err);
}

// ---------------------------------------------------------------- units and segments

typedef struct unit {
    int64_t layer, lowest; // channel; of values 0
    int64_t scope;         // whose budget it spends
    int64_t first, count;  // members in an order that is kept elsewhere
    int     start;         // smallest width
    double  loss[MAX_WIDTHS];
    int64_t cost[MAX_WIDTHS]; // bits
} unit;

typedef struct segment {
    double  slope; // what a bit gains
    int64_t cost, layer, lowest, unit;
    int     from, to;
} segment;

typedef struct hulls {
    int64_t  n_units, n_scopes, n_segments;
    unit    *units;
    segment *segments;  // in the order in which they are taken
    uint8_t *width;     // [n_units] result of a walk
    int64_t *left;      // [n_scopes]
    int64_t  min_cost;  // of all units at their smallest widths, ...
    int64_t  max_cost;  // ... and at the ends of their hulls
    double   n_columns; // whose mean width is asked for
} hulls;

// By falling slope; ties: the lower layer, then the lower channel. What is left are the segments of one unit.
static int by_slope(const void *a, const void *b) {
    const segment *s = a, *t = b;
    if (s->slope != t->slope) return s->slope < t->slope ? 1 : -1;
    if (s->layer != t->layer) return s->layer < t->layer ? -1 : 1;
    if (s->lowest != t->lowest) return s->lowest < t->lowest ? -1 : 1;
    return (s->from > t->from) - (s->from < t->from);
}

static double slope_between(const unit *u, int from, int to) {
    return (u->loss[from] - u->loss[to]) / (double)(u->cost[to] - u->cost[from]);
}

// Points of the lower convex hull over the allowed widths, from the smallest one on, as long as the error does not rise
// again. Points on a straight line all stay: small steps spend a budget better.
static int find_hull(const unit *u, unsigned allowed, int points[MAX_WIDTHS]) {
    int n = 0;
    for (int b = 0; b < MAX_WIDTHS; b++) {
        if ((allowed >> b & 1u) == 0 || !isfinite(u->loss[b])) continue;
        while (n > 1 && slope_between(u, points[n - 2], points[n - 1]) < slope_between(u, points[n - 1], b)) n--;
        points[n++] = b;
    }
    while (n > 1 && u->loss[points[n - 1]] > u->loss[points[n - 2]]) n--;
    return n;
}

static bool add_segments(hulls *h, int64_t index, unsigned allowed) {
    unit *u = &h->units[index];
    int   points[MAX_WIDTHS] = {0}, n = find_hull(u, allowed, points);
    if (n == 0) return false;
    u->start = points[0];
    h->min_cost += u->cost[points[0]];
    h->max_cost += u->cost[points[n - 1]];
    for (int i = 1; i < n; i++) {
        int from = points[i - 1], to = points[i];
        h->segments[h->n_segments++] =
            (segment){slope_between(u, from, to), u->cost[to] - u->cost[from], u->layer, u->lowest, index, from, to};
    }
    return true;
}

static void hulls_free(const kvq_context *ctx, hulls *h) {
    kvq_free(ctx, h->units);
    kvq_free(ctx, h->segments);
    kvq_free(ctx, h->width);
    kvq_free(ctx, h->left);
}

// `h` must be zero.
static kvq_status hulls_create(const kvq_context *ctx, hulls *h, int64_t n_units, int64_t n_scopes, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, n_units, "units of the allocation", &h->units, err));
    KVQ_TRY(KVQ_NEW(ctx, n_units * KVQ_TILE_MAX_WIDTH, "segments of the allocation", &h->segments, err));
    KVQ_TRY(KVQ_NEW(ctx, n_units, "widths of the allocation", &h->width, err));
    KVQ_TRY(KVQ_NEW(ctx, n_scopes, "budgets of the allocation", &h->left, err));
    h->n_units = n_units;
    h->n_scopes = n_scopes;
done:
    return status;
}

// All curves of the units are there: their segments in the order of the walk.
static kvq_status hulls_finish(hulls *h, unsigned allowed, const char *what, kvq_error *err) {
    for (int64_t i = 0; i < h->n_units; i++) {
        if (add_segments(h, i, allowed)) continue;
        return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "layer %lld: no error is known for any allowed width of %s",
                        (long long)h->units[i].layer, what);
    }
    qsort(h->segments, (size_t)h->n_segments, sizeof *h->segments, by_slope);
    return KVQ_OK;
}

// Spends the budget, in equal parts on all scopes; returns what was spent. It must be enough for the smallest widths.
static int64_t walk(hulls *h, int64_t budget) {
    int64_t spent = h->min_cost;
    for (int64_t s = 0; s < h->n_scopes; s++) h->left[s] = budget / h->n_scopes;
    for (int64_t i = 0; i < h->n_units; i++) {
        h->width[i] = (uint8_t)h->units[i].start;
        h->left[h->units[i].scope] -= h->units[i].cost[h->units[i].start];
    }
    for (int64_t i = 0; i < h->n_segments; i++) {
        const segment *s = &h->segments[i];
        int64_t       *left = &h->left[h->units[s->unit].scope];
        if (h->width[s->unit] != s->from || s->cost > *left) continue;
        h->width[s->unit] = (uint8_t)s->to;
        *left -= s->cost;
        spent += s->cost;
    }
    return spent;
}

static double walk_loss(const hulls *h) {
    double loss = 0;
    for (int64_t i = 0; i < h->n_units; i++) loss += h->units[i].loss[h->width[i]];
    return loss;
}

static double mean_width(const hulls *h) {
    double bits = 0;
    for (int64_t i = 0; i < h->n_units; i++) bits += (double)h->width[i] * (double)h->units[i].count;
    return bits / h->n_columns;
}

// ---------------------------------------------------------------- keys and values

typedef struct request {
    const kvq_context       *ctx;
    const kvq_layer_curves  *curves;
    const kvq_alloc_options *options;
    int64_t                  n_layers, n_heads, D;
    bool                     in_bits; // the budget is a mean of code bits, and nothing else costs
    int64_t                  n_tiled; // tokens of a sequence, in whole tiles
} request;

// A layer's errors become nats where its KL was measured.
static double loss_scale(const kvq_layer_curves *curves, int tensor) {
    bool measured = curves->kl[tensor] > 0 && curves->reference[tensor] > 0;
    return measured ? curves->kl[tensor] / curves->reference[tensor] : 1;
}

static int64_t columns_cost(const request *r, int64_t n_columns, int bits) {
    return n_columns * bits * (r->in_bits ? 1 : r->n_tiled * r->options->n_sequences);
}

static int64_t key_cost(const request *r, int64_t n_channels, int width) {
    bool tables = !r->in_bits && r->options->tables == KVQ_TABLE_CHANNEL;
    return columns_cost(r, n_channels, width) + (tables ? n_channels * BITS_OF_LEVEL << width : 0);
}

static int64_t value_cost(const request *r, int dim, int rate) {
    return columns_cost(r, r->n_heads * r->D / dim, rate) + (r->in_bits ? 0 : (int64_t)dim * BITS_OF_LEVEL << rate);
}

typedef struct ranked_channel {
    double  error; // D_c(2)
    int32_t channel;
} ranked_channel;

static int by_error(const void *a, const void *b) {
    const ranked_channel *s = a, *t = b;
    if (s->error != t->error) return s->error < t->error ? -1 : 1;
    return (s->channel > t->channel) - (s->channel < t->channel);
}

static void make_key_unit(const request *r, const ranked_channel *members, int64_t layer, int64_t head, unit *u) {
    const kvq_layer_curves *curves = &r->curves[layer];
    double                  scale = loss_scale(curves, 0);
    u->layer = layer;
    u->lowest = members[0].channel;
    u->scope = r->options->scope == KVQ_BUDGET_MODEL   ? 0
               : r->options->scope == KVQ_BUDGET_LAYER ? layer
                                                       : layer * r->n_heads + head;
    for (int b = 0; b <= KVQ_MAX_KEY_WIDTH; b++) {
        double error = 0;
        for (int64_t i = 0; i < u->count; i++) error += curves->k[members[i].channel * (KVQ_MAX_KEY_WIDTH + 1) + b];
        u->loss[b] = scale * error;
        u->cost[b] = key_cost(r, u->count, b);
    }
    for (int64_t i = 1; i < u->count; i++) {
        if (members[i].channel < u->lowest) u->lowest = members[i].channel;
    }
}

// Channels of each head sorted, and cut into groups, the last of which may be smaller; members [n_layers, d] says who
// is in a unit.
static kvq_status make_keys(const request *r, hulls *h, ranked_channel *members, kvq_error *err) {
    const int64_t SCOPES[KVQ_N_BUDGET_SCOPES] = {1, r->n_layers, r->n_layers * r->n_heads};
    int64_t       group = kvq_alloc_group(r->options, (int)r->D), d = r->n_heads * r->D;
    int64_t       per_head = (r->D + group - 1) / group;
    unit         *u;
    kvq_status    status = KVQ_OK;
    KVQ_TRY(hulls_create(r->ctx, h, r->n_layers * r->n_heads * per_head, SCOPES[r->options->scope], err));
    u = h->units;
    h->n_columns = (double)(r->n_layers * d);
    for (int64_t head = 0; head < r->n_layers * r->n_heads; head++) {
        int64_t         layer = head / r->n_heads, first = head % r->n_heads * r->D;
        ranked_channel *ranked = members + head * r->D;
        for (int64_t i = 0; i < r->D; i++) {
            double error = r->curves[layer].k[(first + i) * (KVQ_MAX_KEY_WIDTH + 1) + 2];
            ranked[i] = (ranked_channel){error, (int32_t)(first + i)};
        }
        qsort(ranked, (size_t)r->D, sizeof *ranked, by_error);
        for (int64_t at = 0; at < r->D; at += group, u++) {
            u->first = head * r->D + at;
            u->count = r->D - at < group ? r->D - at : group;
            make_key_unit(r, ranked + at, layer, head % r->n_heads, u);
        }
    }
    KVQ_TRY(hulls_finish(h, r->options->k_widths, "keys", err));
done:
    return status;
}

static kvq_status make_values(const request *r, hulls *h, kvq_error *err) {
    int        dim = r->options->v_dim;
    kvq_status status = KVQ_OK;
    KVQ_TRY(hulls_create(r->ctx, h, r->n_layers, 1, err));
    h->n_columns = (double)(r->n_layers * dim); // so that the mean is one of elements
    for (int64_t layer = 0; layer < r->n_layers; layer++) {
        unit  *u = &h->units[layer];
        double scale = loss_scale(&r->curves[layer], 1);
        u->layer = layer;
        u->count = 1;
        for (int rate = 0; rate <= KVQ_TILE_MAX_WIDTH; rate++) {
            u->loss[rate] = scale * r->curves[layer].v[rate];
            u->cost[rate] = value_cost(r, dim, rate);
        }
    }
    KVQ_TRY(hulls_finish(h, r->options->v_rates, "values", err));
done:
    return status;
}

// ---------------------------------------------------------------- the split

// Values take what keys leave, and keys what values leave: the steps of keys are the finer ones.
static kvq_split try_split(hulls *k, hulls *v, int64_t k_budget, int64_t budget) {
    int64_t spent = walk(v, budget - walk(k, k_budget));
    (void)walk(k, budget - spent);
    return (kvq_split){mean_width(k), mean_width(v), walk_loss(k), walk_loss(v)};
}

static bool better(kvq_split a, kvq_split b) {
    double loss_a = a.k_loss + a.v_loss, loss_b = b.k_loss + b.v_loss;
    return loss_a < loss_b || (loss_a == loss_b && a.k_bits < b.k_bits);
}

// Splits a quarter and half a bit of keys from the best one, where they differ.
static void take_neighbours(const kvq_split *splits, int64_t n, int64_t best, kvq_allocation *out) {
    double before = -1;
    for (int64_t i = best - 2 * QUARTER_OF_BIT; i <= best + 2 * QUARTER_OF_BIT; i += QUARTER_OF_BIT) {
        if (i < 0 || i >= n || splits[i].k_bits == splits[best].k_bits || splits[i].k_bits == before) continue;
        before = splits[i].k_bits;
        out->neighbours[out->n_neighbours++] = splits[i];
    }
}

static kvq_status search_split(const request *r, hulls *k, hulls *v, int64_t budget, kvq_allocation *out,
                               kvq_error *err) {
    int64_t    step = columns_cost(r, (int64_t)k->n_columns, 1) / STEPS_PER_BIT, best = 0;
    int64_t    most = budget - v->min_cost < k->max_cost ? budget - v->min_cost : k->max_cost;
    int64_t    n = (most - k->min_cost) / step + 1;
    kvq_split *splits = NULL;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(r->ctx, n, "splits of the budget", &splits, err));
    for (int64_t i = 0; i < n; i++) {
        splits[i] = try_split(k, v, k->min_cost + i * step, budget);
        if (better(splits[i], splits[best])) best = i;
    }
    out->chosen = try_split(k, v, k->min_cost + best * step, budget);
    take_neighbours(splits, n, best, out);
done:
    kvq_free(r->ctx, splits);
    return status;
}

// Bits that the widths of an artifact, chosen before or still 0, already account for.
static int64_t chosen_bits(const request *r, const kvq_artifact *a) {
    int64_t bits = 0;
    for (int64_t layer = 0; layer < r->n_layers; layer++) {
        const kvq_tensor_quant *k = &a->layers[layer].k, *v = &a->layers[layer].v;
        for (int64_t c = 0; c < r->n_heads * r->D; c++) bits += key_cost(r, 1, k->widths[c]);
        bits += value_cost(r, v->dim, v->bits);
    }
    return bits;
}

// The target, less everything that does not depend on the choice.
static kvq_status spend_target(const request *r, const kvq_artifact *a, hulls *k, hulls *v, kvq_allocation *out,
                               kvq_error *err) {
    kvq_cache_size size = kvq_artifact_cache_size(a, r->n_tiled);
    int64_t        n_sequences = r->options->n_sequences;
    int64_t fixed = 8 * ((size.row_bytes + size.exact_bytes) * n_sequences + size.tables_bytes) - chosen_bits(r, a);
    double  n = (double)(size.n_elements * n_sequences), least = (double)(fixed + k->min_cost + v->min_cost) / n;
    int64_t budget = (int64_t)floor(r->options->target_bits * n + ROUNDING) - fixed;
    if (budget < k->min_cost + v->min_cost) {
        return kvq_fail(err, KVQ_ERR_USAGE, "ask for more bits, a longer sequence, or allow smaller widths",
                        "--target-bits %g is out of reach: with %lld tokens these widths need at least %.3f bits per "
                        "element",
                        r->options->target_bits, (long long)r->options->n_tokens, ceil(least * 1000) / 1000);
    }
    if (budget > k->max_cost + v->max_cost) {
        kvq_log(r->ctx, KVQ_LOG_WARNING,
                "--target-bits %g cannot be spent: the largest widths that gain anything need %.3f bits per element",
                r->options->target_bits, (double)(fixed + k->max_cost + v->max_cost) / n);
    }
    return search_split(r, k, v, budget, out, err);
}

// The means that were asked for.
static kvq_status spend_means(const request *r, hulls *k, hulls *v, kvq_allocation *out, kvq_error *err) {
    int64_t d = r->n_heads * r->D;
    int64_t k_budget = (int64_t)floor(r->options->k_bits * (double)(r->n_layers * d) + ROUNDING);
    int64_t v_budget = (int64_t)floor(r->options->v_bits * (double)(r->n_layers * d) + ROUNDING);
    if (k_budget < k->min_cost || v_budget < v->min_cost) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL,
                        "--k-mean-bits %g or --v-mean-bits %g is out of reach of the allowed widths",
                        r->options->k_bits, r->options->v_bits);
    }
    (void)walk(k, k_budget);
    (void)walk(v, v_budget);
    out->chosen = (kvq_split){mean_width(k), mean_width(v), walk_loss(k), walk_loss(v)};
    return KVQ_OK;
}

kvq_status kvq_allocate(const kvq_context *ctx, const kvq_artifact *a, const kvq_layer_curves *curves,
                        const kvq_alloc_options *options, kvq_allocation *out, kvq_error *err) {
    kvq_status      status = KVQ_OK;
    hulls           k = {0}, v = {0};
    ranked_channel *members = NULL;
    kvq_allocation  found = {.widths = NULL};
    int64_t         n_tiles = (options->n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS;
    request         r = {.ctx = ctx, .curves = curves, .options = options, .n_layers = a->model.n_layers};
    int64_t         n_channels = a->model.n_layers * a->model.n_kv_heads * a->model.head_dim;
    r.n_heads = a->model.n_kv_heads;
    r.D = a->model.head_dim;
    r.in_bits = options->k_bits > 0;
    r.n_tiled = n_tiles * KVQ_TILE_TOKENS;
    KVQ_TRY(kvq_alloc_options_check(options, (int)r.D, err));
    KVQ_TRY(KVQ_NEW(ctx, n_channels, "widths of keys", &found.widths, err));
    KVQ_TRY(KVQ_NEW(ctx, r.n_layers, "rates of values", &found.rates, err));
    KVQ_TRY(KVQ_NEW(ctx, n_channels, "order of channels", &members, err));
    KVQ_TRY(make_keys(&r, &k, members, err));
    KVQ_TRY(make_values(&r, &v, err));
    KVQ_TRY(r.in_bits ? spend_means(&r, &k, &v, &found, err) : spend_target(&r, a, &k, &v, &found, err));
    for (int64_t i = 0; i < k.n_units; i++) {
        const unit *u = &k.units[i];
        for (int64_t m = u->first; m < u->first + u->count; m++)
            found.widths[u->layer * r.n_heads * r.D + members[m].channel] = k.width[i];
    }
    memcpy(found.rates, v.width, (size_t)r.n_layers);
    *out = found;
    found = (kvq_allocation){.widths = NULL};
done:
    kvq_allocation_free(ctx, &found);
    hulls_free(ctx, &k);
    hulls_free(ctx, &v);
    kvq_free(ctx, members);
    return status;
}

void kvq_allocation_free(const kvq_context *ctx, kvq_allocation *allocation) {
    kvq_free(ctx, allocation->widths);
    kvq_free(ctx, allocation->rates);
    allocation->widths = allocation->rates = NULL;
}
