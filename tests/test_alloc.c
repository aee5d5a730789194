// SPDX-License-Identifier: Apache-2.0
// The allocation of bits: against all combinations of widths, budgets met to the step, scopes, groups, ties, targets
// out of reach, degenerate curves; what a cache weighs, by hand.
#include "alloc_test.h"
#include "limited_memory.h"

enum { ALL_WIDTHS = (1 << N_WIDTHS) - 1 };

static const unsigned WIDTH_SETS[] = {ALL_WIDTHS, 1u << 1 | 1u << 2 | 1u << 4, 1u << 0 | 1u << 2 | 1u << 4,
                                      1u << 2 | 1u << 3 | 1u << 4 | 1u << 5};
enum { N_SETS = sizeof WIDTH_SETS / sizeof *WIDTH_SETS };

// Curves of n_layers layers of d channels; what falls by about 4 for each bit, with noise but never rising.
static kvq_layer_curves *make_curves(int64_t n_layers, int64_t d, uint32_t seed, double noise) {
    kvq_layer_curves *curves = NEW(n_layers, kvq_layer_curves);
    for (int64_t l = 0; l < n_layers; l++) {
        curves[l].k = NEW(d * N_WIDTHS, double);
        for (int64_t c = 0; c < d; c++) {
            double *curve = curves[l].k + c * N_WIDTHS;
            for (int b = 0; b < N_WIDTHS; b++) {
                double step = b == 0 ? exp(3 * normal(seed, l * d + c))
                                     : exp(-1.4 * fmax(1 + noise * normal(seed + 1, (l * d + c) * 8 + b), 0));
                curve[b] = b == 0 ? step : curve[b - 1] * step;
            }
        }
        for (int r = 0; r <= KVQ_TILE_MAX_WIDTH; r++)
            curves[l].v[r] = r == 0 ? HUGE_VAL : 50 * exp(-0.7 * r + normal(seed + 2, l));
    }
    return curves;
}

static void drop_curves(kvq_layer_curves *curves, int64_t n_layers) {
    for (int64_t l = 0; l < n_layers; l++) free(curves[l].k);
    free(curves);
}

static kvq_allocation allocate(const kvq_artifact *a, const kvq_layer_curves *curves, const kvq_alloc_options *o) {
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_allocation found;
    kvq_test_ok(kvq_allocate(&ctx, a, curves, o, &found, &err), &err);
    return found;
}

static void drop_allocation(kvq_allocation *allocation) {
    kvq_context ctx = kvq_test_context();
    kvq_allocation_free(&ctx, allocation);
}

static void drop_artifact(kvq_artifact **a) {
    kvq_context ctx = kvq_test_context();
    kvq_artifact_destroy(&ctx, a);
}

// A budget of code bits needs the shape alone.
static kvq_artifact shape(int64_t n_layers, int n_heads, int D) {
    kvq_artifact a = {.model = {.n_layers = n_layers}};
    a.model.n_kv_heads = n_heads;
    a.model.head_dim = D;
    return a;
}

static kvq_alloc_options by_means(double k_bits, unsigned widths, int group, kvq_budget_scope scope) {
    kvq_alloc_options o = kvq_alloc_options_default();
    o.k_bits = k_bits;
    o.v_bits = 3;
    o.k_widths = widths;
    o.group = group;
    o.scope = scope;
    return o;
}

// ---------------------------------------------------------------- the walk

// Least loss of six channels for every sum of widths, over all combinations of allowed ones; infinite where there is
// none.
static void best_losses(const double *curves, unsigned allowed, double best[31]) {
    for (int i = 0; i <= 30; i++) best[i] = HUGE_VAL;
    for (int code = 0; code < 46656; code++) {
        double loss = 0;
        int    sum = 0;
        bool   legal = true;
        for (int c = 0, rest = code; c < 6; c++, rest /= N_WIDTHS) {
            loss += curves[c * N_WIDTHS + rest % N_WIDTHS];
            sum += rest % N_WIDTHS;
            legal = legal && (allowed >> rest % N_WIDTHS & 1u) != 0;
        }
        if (legal && loss < best[sum]) best[sum] = loss;
    }
}

// Whether (i, best[i]) is a vertex of the lower convex hull of all points: below every chord around it.
static bool is_vertex(const double best[31], int i) {
    if (!isfinite(best[i])) return false;
    for (int a = 0; a < i; a++) {
        for (int b = i + 1; b <= 30; b++) {
            if (!isfinite(best[a]) || !isfinite(best[b])) continue;
            double chord = best[a] + (best[b] - best[a]) * (i - a) / (b - a);
            if (best[i] >= chord * (1 - 1e-9)) return false;
        }
    }
    return true;
}

// Greedy on the hulls is the optimum at every vertex of the hull of all combinations, and in between no worse than the
// vertex below and no better than the optimum.
START_TEST(the_walk_is_optimal_at_vertices) {
    int n_vertices = 0, n_between = 0;
    for (uint32_t problem = 0; problem < 24; problem++) {
        kvq_artifact      a = shape(1, 3, 2);
        unsigned          allowed = WIDTH_SETS[problem % N_SETS];
        kvq_layer_curves *curves = make_curves(1, 6, 100 * problem + 1, problem % 3 == 0 ? 0.1 : 0.7);
        double            best[31], below = HUGE_VAL, optimum = HUGE_VAL;
        best_losses(curves->k, allowed, best);
        for (int budget = 1; budget <= 30; budget++) {
            if (isfinite(best[budget])) optimum = fmin(optimum, best[budget]);
            if (budget == 1) optimum = fmin(optimum, best[0]);
            if (is_vertex(best, budget)) below = best[budget];
            if (budget == 1 && is_vertex(best, 0)) below = fmin(below, best[0]);
            if (!isfinite(below)) continue; // less than the smallest widths
            kvq_alloc_options o = by_means(budget / 6.0, allowed, 1, KVQ_BUDGET_MODEL);
            if (allowed < 32 && budget > 24) continue; // beyond the largest widths
            kvq_allocation found = allocate(&a, curves, &o);
            double         loss = 0, sum = 0;
            for (int c = 0; c < 6; c++) {
                ck_assert((allowed >> found.widths[c] & 1u) != 0);
                loss += curves->k[c * N_WIDTHS + found.widths[c]];
                sum += found.widths[c];
            }
            ck_assert(sum <= budget);
            ck_assert_double_eq_tol(found.chosen.k_bits, sum / 6, 1e-12);
            ck_assert_double_eq_tol(found.chosen.k_loss, loss, 1e-12 * loss);
            ck_assert(loss <= below * (1 + 1e-12) && loss >= optimum * (1 - 1e-12));
            n_vertices += is_vertex(best, budget);
            n_between += !is_vertex(best, budget);
            drop_allocation(&found);
        }
        drop_curves(curves, 1);
    }
    ck_assert(n_vertices > 200 && n_between > 50);
}
END_TEST

START_TEST(ties_go_to_the_lower_layer_then_the_lower_channel) {
    kvq_artifact      a = shape(2, 1, 4);
    kvq_layer_curves *curves = make_curves(2, 4, 1, 0);
    for (int l = 0; l < 2; l++) {
        for (int i = 0; i < 4 * N_WIDTHS; i++) curves[l].k[i] = pow(4, -(i % N_WIDTHS));
    }
    for (int extra = 0; extra <= 8; extra++) {
        kvq_alloc_options o = by_means(1 + extra / 8.0, ALL_WIDTHS, 1, KVQ_BUDGET_MODEL);
        kvq_allocation    found = allocate(&a, curves, &o);
        for (int i = 0; i < 8; i++) ck_assert_int_eq(found.widths[i], i < extra ? 2 : 1);
        drop_allocation(&found);
    }
    drop_curves(curves, 2);
}
END_TEST

// Every layer or head gets its own share exactly, whatever the others would gain; without scopes it is not so.
START_TEST(scopes_get_equal_shares) {
    enum { L = 3, H = 2, D = 16 };
    kvq_artifact      a = shape(L, H, D);
    kvq_layer_curves *curves = make_curves(L, H * D, 40, 0);
    for (int64_t i = 0; i < H * D * N_WIDTHS; i++) curves[1].k[i] *= 1000;
    for (int scope = 0; scope < KVQ_N_BUDGET_SCOPES; scope++) {
        kvq_alloc_options o = by_means(2.25, ALL_WIDTHS, 2, (kvq_budget_scope)scope);
        kvq_allocation    found = allocate(&a, curves, &o);
        int size = scope == KVQ_BUDGET_HEAD ? D : scope == KVQ_BUDGET_LAYER ? H * D : L * H * D, uneven = 0;
        for (int i = 0, sum = 0; i < L * H * D; i++) {
            sum += found.widths[i];
            if ((i + 1) % (H * D) == 0) uneven += 4 * sum != 9 * H * D;
            if ((i + 1) % size == 0) ck_assert_int_eq(4 * sum, 9 * size);
            if ((i + 1) % size == 0) sum = 0;
        }
        ck_assert(scope != KVQ_BUDGET_MODEL || uneven > 0);
        drop_allocation(&found);
    }
    drop_curves(curves, L);
}
END_TEST

// Channels of a head in the order of D(2) share widths by the group.
START_TEST(groups_are_sorted_by_two_bits) {
    enum { H = 2, D = 20 };
    kvq_artifact      a = shape(1, H, D);
    kvq_layer_curves *curves = make_curves(1, H * D, 50, 0.5);
    const int         groups[] = {1, 2, 8, 64};
    curves->k[3 * N_WIDTHS + 2] = curves->k[7 * N_WIDTHS + 2]; // a tie
    for (int g = 0; g < 4; g++) {
        kvq_alloc_options o = by_means(2.5, ALL_WIDTHS, groups[g], KVQ_BUDGET_MODEL);
        kvq_allocation    found = allocate(&a, curves, &o);
        for (int i = 0; i < H * D; i++) {
            int rank_i = 0, head = i / D;
            for (int j = head * D; j < (head + 1) * D; j++) {
                double ours = curves->k[i * N_WIDTHS + 2], other = curves->k[j * N_WIDTHS + 2];
                rank_i += other < ours || (other == ours && j < i);
            }
            for (int j = head * D; j < (head + 1) * D; j++) {
                int rank_j = 0;
                for (int m = head * D; m < (head + 1) * D; m++) {
                    double ours = curves->k[j * N_WIDTHS + 2], other = curves->k[m * N_WIDTHS + 2];
                    rank_j += other < ours || (other == ours && m < j);
                }
                if (rank_i / groups[g] == rank_j / groups[g]) ck_assert_int_eq(found.widths[i], found.widths[j]);
            }
        }
        ck_assert(found.chosen.k_bits <= 2.5 && (groups[g] > 8 || found.chosen.k_bits > 2.3));
        drop_allocation(&found);
    }
    drop_curves(curves, 1);
}
END_TEST

// Nothing said: heads have at least 8 groups where they can. The reference stays what measurements were made at.
START_TEST(groups_by_the_head) {
    enum { H = 2, D = 48, N = 11 };
    const int    dims[N] = {2, 8, 15, 16, 31, 32, 48, 63, 64, 80, 256}, sizes[N] = {1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8};
    kvq_artifact a = shape(1, H, D);
    kvq_layer_curves *curves = make_curves(1, H * D, 55, 0.5);
    kvq_alloc_options o = by_means(2.5, ALL_WIDTHS, 0, KVQ_BUDGET_MODEL), reference = kvq_reference_allocation();
    ck_assert_int_eq(kvq_alloc_options_default().group, 0);
    for (int i = 0; i < N; i++) {
        ck_assert_int_eq(kvq_alloc_group(&o, dims[i]), sizes[i]);
        ck_assert_int_eq(kvq_alloc_group(&reference, dims[i]), 8);
    }
    kvq_allocation usual = allocate(&a, curves, &o);
    o.group = 4;
    kvq_allocation given = allocate(&a, curves, &o);
    ck_assert_int_eq(kvq_alloc_group(&o, 256), 4);
    ck_assert_mem_eq(usual.widths, given.widths, H * D);
    drop_allocation(&usual);
    drop_allocation(&given);
    drop_curves(curves, 1);
}
END_TEST

// Where KL was measured a layer's predicted loss at the reference allocation is that KL; other layers are taken as they
// are.
START_TEST(measured_kl_scales_a_layer) {
    enum { L = 2, D = 32 };
    kvq_artifact      a = shape(L, 1, D);
    kvq_layer_curves *curves = make_curves(L, D, 60, 0);
    kvq_alloc_options reference = kvq_reference_allocation();
    for (int i = 0; i < D * N_WIDTHS; i++) curves[1].k[i] = curves[0].k[i];
    kvq_allocation plain = allocate(&a, curves, &reference);
    ck_assert_mem_eq(plain.widths, plain.widths + D, D);
    ck_assert_double_eq_tol(plain.chosen.k_bits, 2, 1e-12);
    ck_assert_double_eq_tol(plain.chosen.v_bits, 3, 1e-12);
    ck_assert(plain.rates[0] == 6 && plain.rates[1] == 6);
    curves[0].reference[0] = plain.chosen.k_loss / 2;
    curves[0].kl[0] = 0.125;
    curves[1].reference[0] = plain.chosen.k_loss / 2;
    curves[1].kl[0] = 8;
    kvq_allocation scaled = allocate(&a, curves, &reference);
    ck_assert_mem_eq(plain.widths, scaled.widths, L * D); // a layer's scale does not change its own order
    ck_assert_double_eq_tol(scaled.chosen.k_loss, 8.125, 1e-9);
    reference.scope = KVQ_BUDGET_MODEL;
    kvq_allocation global = allocate(&a, curves, &reference);
    int            sums[L] = {0};
    for (int i = 0; i < L * D; i++) sums[i / D] += global.widths[i];
    ck_assert(sums[1] > sums[0] + D);
    curves[0].kl[0] = 1e3 * curves[0].reference[0];
    curves[1].kl[0] = 0; // as it is: a thousandth of the other
    kvq_allocation unmeasured = allocate(&a, curves, &reference);
    memset(sums, 0, sizeof sums);
    for (int i = 0; i < L * D; i++) sums[i / D] += unmeasured.widths[i];
    ck_assert(sums[0] > sums[1] + D);
    drop_allocation(&plain);
    drop_allocation(&scaled);
    drop_allocation(&global);
    drop_allocation(&unmeasured);
    drop_curves(curves, L);
}
END_TEST

// ---------------------------------------------------------------- the budget

static void choose(kvq_artifact *a, const kvq_allocation *found) {
    int64_t d = a->model.n_kv_heads * a->model.head_dim;
    for (int64_t l = 0; l < a->model.n_layers; l++) {
        memcpy(a->layers[l].k.widths, found->widths + l * d, (size_t)d);
        a->layers[l].v.bits = found->rates[l];
        a->layers[l].v.n_levels = 1 << found->rates[l];
    }
}

// The cache of what was chosen is no larger than asked for, and where all keys share the budget nothing that is left
// would pay for another bit of any group. Curves are convex, so a group's next width is the next allowed one. An
// artifact for which widths were chosen before gives the same result.
START_TEST(targets_are_met_to_the_step) {
    enum { L = 3, H = 2, D = 16, T = 256 };
    const int groups[] = {1, 2, 8};
    for (int problem = 0; problem < 36; problem++) {
        kvq_measure_options measure = measure_options(problem % 4 == 0 ? 0 : 0.01);
        kvq_alloc_options   o = kvq_alloc_options_default();
        kvq_layer_curves   *curves = make_curves(L, H * D, 70u + 10u * (uint32_t)problem, 0);
        o.outlier_fraction = measure.fractions[0];
        o.target_bits = 8 + 0.05 * problem; // the tables of so few channels are much
        o.n_tokens = T - problem;
        o.n_sequences = 1 + problem % 4;
        o.k_widths = WIDTH_SETS[problem % N_SETS];
        o.group = groups[problem % 3];
        o.scope = (kvq_budget_scope)(problem / 3 % 3);
        o.tables = (kvq_table_kind)(problem / 9 % 2);
        o.v_dim = 1 + problem / 5 % 2;
        kvq_artifact  *a = described(L, H, D, &measure, &o);
        kvq_allocation found = allocate(a, curves, &o);
        choose(a, &found);
        kvq_cache_size size = kvq_artifact_cache_size(a, T);
        double         left = (o.target_bits - kvq_cache_bits_per_element(size, o.n_sequences)) *
                      (double)(size.n_elements * o.n_sequences);
        ck_assert(left >= -1e-6);
        int64_t cheapest = INT64_MAX;
        for (int i = 0; i < L * H * D; i++) {
            int next = found.widths[i] + 1, now = found.widths[i];
            while (next < N_WIDTHS && (o.k_widths >> next & 1u) == 0) next++;
            if (next == N_WIDTHS) continue;
            int64_t tables = o.tables == KVQ_TABLE_CHANNEL ? 16 * ((1 << next) - (1 << now)) : 0;
            int64_t cost = o.group * ((int64_t)T * o.n_sequences * (next - now) + tables);
            if (cost < cheapest) cheapest = cost;
        }
        if (cheapest < INT64_MAX) {
            double n_scopes = o.scope == KVQ_BUDGET_MODEL ? 1 : o.scope == KVQ_BUDGET_LAYER ? L : L * H;
            double most = n_scopes * (n_scopes == 1 ? (double)cheapest : o.group * (T * 2.0 + 16 * 32)); // of a scope
            ck_assert(left < most);
        }
        kvq_allocation again = allocate(a, curves, &o);
        ck_assert_mem_eq(found.widths, again.widths, L * H * D);
        ck_assert_mem_eq(found.rates, again.rates, L);
        drop_allocation(&found);
        drop_allocation(&again);
        drop_artifact(&a);
        drop_curves(curves, L);
    }
}
END_TEST

// The chosen split costs less than its neighbours, which come by rising bits of keys; no other split of the search is
// better than what a plain search over means of keys finds.
START_TEST(the_split_is_the_best) {
    enum { L = 8, H = 4, D = 32 };
    for (int problem = 0; problem < 6; problem++) {
        kvq_measure_options measure = measure_options(0.0025);
        kvq_alloc_options   o = kvq_alloc_options_default();
        kvq_layer_curves   *curves = make_curves(L, H * D, 500u + 10u * (uint32_t)problem, 0.3);
        kvq_artifact       *a = described(L, H, D, &measure, &o);
        o.n_tokens = 4096;
        o.target_bits = 2.75 + 0.25 * problem;
        kvq_allocation found = allocate(a, curves, &o);
        double         chosen = found.chosen.k_loss + found.chosen.v_loss, before = -1;
        ck_assert(found.n_neighbours > 0 && found.n_neighbours <= 4);
        for (int i = 0; i < found.n_neighbours; i++) {
            ck_assert(found.neighbours[i].k_loss + found.neighbours[i].v_loss >= chosen);
            ck_assert(found.neighbours[i].k_bits > before && found.neighbours[i].k_bits != found.chosen.k_bits);
            before = found.neighbours[i].k_bits;
        }
        choose(a, &found);
        double target_bytes = o.target_bits * (double)kvq_artifact_cache_size(a, 4096).n_elements / 8;
        for (double k_bits = 1; k_bits <= 5; k_bits += 0.25) {
            for (double v_bits = 2; v_bits <= 4; v_bits += 0.125) {
                kvq_alloc_options means = o;
                means.k_bits = k_bits;
                means.v_bits = v_bits;
                kvq_allocation other = allocate(a, curves, &means);
                choose(a, &other);
                kvq_cache_size size = kvq_artifact_cache_size(a, 4096);
                if ((double)(size.row_bytes + size.exact_bytes + size.tables_bytes) <= target_bytes)
                    ck_assert(other.chosen.k_loss + other.chosen.v_loss >= chosen * 0.999); // tables cost nothing there
                drop_allocation(&other);
            }
        }
        drop_allocation(&found);
        drop_artifact(&a);
        drop_curves(curves, L);
    }
}
END_TEST

START_TEST(a_target_out_of_reach_says_what_is_possible) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.0025);
    kvq_alloc_options   o = kvq_alloc_options_default();
    kvq_layer_curves   *curves = make_curves(2, 64, 80, 0);
    kvq_artifact       *a = described(2, 2, 32, &measure, &o);
    kvq_allocation      found = {.n_neighbours = -1};
    o.k_widths = 1u << 2 | 1u << 3;
    o.target_bits = 2;
    kvq_test_failed(kvq_allocate(&ctx, a, curves, &o, &found, &err), KVQ_ERR_USAGE, &err, "--target-bits 2 is out of");
    ck_assert(found.n_neighbours == -1 && found.widths == NULL);
    const char *number = strstr(err.message, "at least ");
    ck_assert_ptr_nonnull(number);
    o.target_bits = strtod(number + strlen("at least "), NULL);
    found = allocate(a, curves, &o);
    for (int i = 0; i < 128; i++) ck_assert_int_eq(found.widths[i], 2);
    drop_allocation(&found);
    o.target_bits -= 0.0015;
    kvq_test_failed(kvq_allocate(&ctx, a, curves, &o, &found, &err), KVQ_ERR_USAGE, &err, "out of reach");
    o.target_bits = 30; // more than there is to spend
    found = allocate(a, curves, &o);
    for (int i = 0; i < 128; i++) ck_assert_int_eq(found.widths[i], 3);
    ck_assert(found.rates[0] == 8 && found.rates[1] == 8);
    drop_allocation(&found);
    drop_artifact(&a);
    drop_curves(curves, 2);
}
END_TEST

// Nothing gains anything: the fewest bits of keys. One channel has all of the error: it gets the most it can.
START_TEST(degenerate_curves) {
    enum { L = 2, D = 16 };
    kvq_measure_options measure = measure_options(0);
    kvq_alloc_options   o = kvq_alloc_options_default();
    kvq_layer_curves   *curves = make_curves(L, D, 90, 0);
    o.group = 1;
    o.outlier_fraction = 0;
    o.target_bits = 6;
    o.n_tokens = 1;
    kvq_artifact *a = described(L, 1, D, &measure, &o);
    for (int l = 0; l < L; l++) {
        memset(curves[l].k, 0, D * N_WIDTHS * sizeof(double));
        for (int r = 1; r <= KVQ_TILE_MAX_WIDTH; r++) curves[l].v[r] = 0;
    }
    kvq_allocation found = allocate(a, curves, &o);
    ck_assert(found.chosen.k_loss == 0 && found.chosen.v_loss == 0);
    drop_allocation(&found);
    for (int b = 0; b < N_WIDTHS; b++) curves[1].k[5 * N_WIDTHS + b] = pow(0.25, b);
    found = allocate(a, curves, &o);
    ck_assert_int_eq(found.widths[D + 5], KVQ_MAX_KEY_WIDTH);
    drop_allocation(&found);
    for (int r = 0; r <= KVQ_TILE_MAX_WIDTH; r++) curves[1].v[r] = HUGE_VAL;
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_test_failed(kvq_allocate(&ctx, a, curves, &o, &found, &err), KVQ_ERR_INTERNAL, &err, "layer 1");
    drop_artifact(&a);
    drop_curves(curves, L);
}
END_TEST

// Every option out of its range is named.
START_TEST(options_are_checked) {
    enum { N_BAD = 12 };
    kvq_alloc_options bad[N_BAD];
    const char       *fragments[N_BAD] = {"--outliers",    "--k-widths",      "--k-widths",    "--v-dim",
                                          "--v-dim",       "--v-rates",       "--v-rates",     "--width-group",
                                          "--k-mean-bits", "--k-mean-bits 6", "--v-mean-bits", "--target-bits"};
    kvq_error         err = {0};
    for (int i = 0; i < N_BAD; i++) bad[i] = kvq_alloc_options_default();
    bad[0].outlier_fraction = 1;
    bad[1].k_widths = 0;
    bad[2].k_widths = 1u << 6;
    bad[3].v_dim = 3;
    bad[4].v_dim = 2; // of an odd head
    bad[5].v_rates = 0;
    bad[6].v_rates = 1;
    bad[7].group = -1;
    bad[8].k_bits = 2; // alone
    bad[9].k_bits = 6, bad[9].v_bits = 3;
    bad[10].k_bits = 2, bad[10].v_bits = 4.5;
    bad[11].target_bits = NAN;
    for (int i = 0; i < N_BAD; i++)
        kvq_test_failed(kvq_alloc_options_check(&bad[i], i == 4 ? 63 : 64, &err), KVQ_ERR_USAGE, &err, fragments[i]);
    kvq_alloc_options good[] = {kvq_alloc_options_default(), kvq_reference_allocation()};
    for (int i = 0; i < 2; i++) kvq_test_ok(kvq_alloc_options_check(&good[i], 64, &err), &err);
    kvq_test_failed(kvq_alloc_options_check(&good[0], 1024, &err), KVQ_ERR_UNSUPPORTED, &err, "1024");
    good[0].n_tokens = 0;
    kvq_test_failed(kvq_alloc_options_check(&good[0], 64, &err), KVQ_ERR_USAGE, &err, "--target-tokens 0");
}
END_TEST

// ---------------------------------------------------------------- sizes

// One head of 4 channels. Keys of 0 + 1 + 3 + 5 bits: 16 * 9 = 144 bytes of codes, 4 of counts and 4 each of 6 slots;
// two pairs of values at 5 bits: 160 bytes and 128 scales. 300 tokens are two tiles and 44 more, 4 are sinks.
START_TEST(a_cache_by_hand) {
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   o = kvq_alloc_options_default();
    const uint8_t       widths[] = {0, 1, 3, 5};
    o.outlier_fraction = 0.01; // 5.12 of 512 elements
    kvq_artifact *a = described(1, 1, 4, &measure, &o);
    memcpy(a->layers[0].k.widths, widths, sizeof widths);
    a->layers[0].v.bits = 5;
    a->layers[0].v.n_levels = 32;
    kvq_cache_size size = kvq_artifact_cache_size(a, 300);
    ck_assert_int_eq(size.n_elements, 2 * 4 * 300);
    ck_assert_int_eq(size.row_bytes, 2 * ((144 + 4 + 4 * 6) + (160 + 128)));
    ck_assert_int_eq(size.exact_bytes, (4 + 44) * 2 * 4 * 2);
    int64_t thresholds = 2 * 4 * 2, levels = (1 + 2 + 8 + 32) * 2, pairs = 32 * 2 * 2;
    ck_assert_int_eq(size.tables_bytes, thresholds + levels + 4 + pairs);
    a->layers[0].k.table_kind = KVQ_TABLE_AFFINE;
    ck_assert_int_eq(kvq_artifact_cache_size(a, 300).tables_bytes, thresholds + 63 * 2 + 2 * 4 * 2 + 4 + pairs);
    kvq_context ctx = kvq_test_context(); // a rotation that cannot be made again belongs to the tables
    kvq_test_ok(kvq_artifact_set_text(&ctx, &a->quantizer.rotation_kind, "random", NULL), NULL);
    ck_assert_int_eq(kvq_artifact_cache_size(a, 300).tables_bytes,
                     thresholds + 63 * 2 + 2 * 4 * 2 + 4 + pairs + 4 * 4 * 4);
    a->layers[0].v.scale_format = KVQ_SCALE_F16;
    ck_assert_int_eq(kvq_artifact_cache_size(a, 300).row_bytes, size.row_bytes + 2 * 128);
    size = kvq_artifact_cache_size(a, 3); // all of them are sinks, in no tile
    ck_assert(size.row_bytes == 0 && size.exact_bytes == 3 * 2 * 4 * 2);
    drop_artifact(&a);
}
END_TEST

START_TEST(a_description) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   o = kvq_alloc_options_default();
    measure.k_slots = 0;
    o.outlier_fraction = 0.01;
    o.tables = KVQ_TABLE_AFFINE;
    o.v_dim = 1;
    kvq_artifact *a = described(2, 2, 32, &measure, &o);
    ck_assert_str_eq(a->quantizer.scheme, "alloc");
    ck_assert(kvq_artifact_is_allocated(a) && a->quantizer.rotation_kind[0] != 0);
    ck_assert_int_eq(a->quantizer.n_side_k, 8);
    ck_assert_int_eq(a->quantizer.n_slots, kvq_tile_slots(0.01, 64));
    ck_assert(a->quantizer.n_side_v == 0 && a->quantizer.sink_tokens == 4 && a->quantizer.recent_tokens == 0);
    ck_assert(a->quantizer.budget_tokens == 2048 && a->quantizer.target_bits == 3);
    ck_assert(a->quantizer.weighting == KVQ_WEIGHT_FISHER_SCALED);
    ck_assert(a->layers[1].k.table_kind == KVQ_TABLE_AFFINE && a->layers[1].v.dim == 1);
    o = kvq_reference_allocation(); // described again
    o.outlier_fraction = 0.01;
    kvq_test_ok(kvq_artifact_describe_allocated(&ctx, a, &measure, &o, &err), &err);
    ck_assert(a->quantizer.target_bits == 0 && a->layers[1].v.dim == 2);
    drop_artifact(&a);
}
END_TEST

START_TEST(too_many_slots_are_refused) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_measure_options measure = measure_options(0.5);
    kvq_alloc_options   o = kvq_alloc_options_default();
    kvq_artifact       *a = NULL;
    o.outlier_fraction = 0.5;
    kvq_test_ok(kvq_artifact_create(&ctx, 1, &a, &err), &err);
    a->model.n_kv_heads = 8;
    a->model.head_dim = 128; // 65536 slots
    kvq_test_failed(kvq_artifact_describe_allocated(&ctx, a, &measure, &o, &err), KVQ_ERR_UNSUPPORTED, &err, "slots");
    drop_artifact(&a);
}
END_TEST

// ---------------------------------------------------------------- memory

START_TEST(nothing_is_lost_without_memory) {
    limited_memory      memory = {.inner = kvq_test_context()};
    kvq_context         ctx = limited_context(&memory);
    kvq_measure_options measure = measure_options(0.01);
    kvq_alloc_options   o = kvq_alloc_options_default();
    kvq_layer_curves   *curves = make_curves(2, 64, 95, 0);
    o.outlier_fraction = 0.01;
    o.target_bits = 6;
    kvq_status status = KVQ_ERR_MEMORY;
    int        n_failed = 0;
    for (; status != KVQ_OK; n_failed++) {
        kvq_error      err = {0};
        kvq_artifact  *a = NULL;
        kvq_allocation found = {.widths = NULL};
        memory.left = n_failed;
        status = kvq_artifact_create(&ctx, 2, &a, &err);
        if (status == KVQ_OK) {
            a->model.n_kv_heads = 2;
            a->model.head_dim = 32;
            status = kvq_artifact_describe_allocated(&ctx, a, &measure, &o, &err);
        }
        if (status == KVQ_OK) status = kvq_allocate(&ctx, a, curves, &o, &found, &err);
        ck_assert(status == KVQ_OK || status == KVQ_ERR_MEMORY);
        kvq_allocation_free(&ctx, &found);
        kvq_artifact_destroy(&ctx, &a);
        ck_assert_int_eq(memory.n_live, 0);
    }
    ck_assert(n_failed > 25);
    drop_curves(curves, 2);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(the_walk_is_optimal_at_vertices),
    KVQ_CASE(ties_go_to_the_lower_layer_then_the_lower_channel),
    KVQ_CASE(scopes_get_equal_shares),
    KVQ_CASE(groups_are_sorted_by_two_bits),
    KVQ_CASE(groups_by_the_head),
    KVQ_CASE(measured_kl_scales_a_layer),
    KVQ_CASE(targets_are_met_to_the_step),
    KVQ_CASE(the_split_is_the_best),
    KVQ_CASE(a_target_out_of_reach_says_what_is_possible),
    KVQ_CASE(degenerate_curves),
    KVQ_CASE(options_are_checked),
    KVQ_CASE(a_cache_by_hand),
    KVQ_CASE(a_description),
    KVQ_CASE(too_many_slots_are_refused),
    KVQ_CASE(nothing_is_lost_without_memory),
};
KVQ_TEST_MAIN("alloc", CASES)
