// SPDX-License-Identifier: Apache-2.0
//
// A small model, its windows and what is measured for the channel-allocated format: what the suites of that start from.
#ifndef TILE_RIG_H
#define TILE_RIG_H

#include <stdio.h>

#include "calib_rig.h"
#include "kvq_make_model.h"

enum { N = 5, S = 40, L = 3, HEADS = 2, DIM = 16, D = HEADS * DIM, SINKS = 2 };
#define FRACTION 0.05

static inline void make_model(char path[256]) {
    kvq_make_options options = kvq_make_options_default();
    options.n_layers = L;
    options.attention_bias = true; // with which the exponent of scales is not 0 everywhere
    (void)snprintf(path, 256, "%s/model", kvq_test_folder());
    kvq_make_model_hf(&options, path);
}

static inline kvq_windows make_windows(int64_t n, int64_t seq_len, int32_t *ids) {
    for (int64_t i = 0; i < n * seq_len; i++)
        ids[i] = (int32_t)kvq_rng_below(2, KVQ_RNG_TEST, 60, (uint64_t)i, KVQ_MAKE_N_TOKENS);
    return (kvq_windows){.n_windows = n, .seq_len = seq_len, .ids = ids, .source = "test"};
}

// One slot a side, so that some of what lies beyond the thresholds finds none.
static inline kvq_measure_options measure_options(void) {
    kvq_measure_options o = kvq_calib_options_default().measure;
    o.n_fractions = 2;
    o.fractions[0] = 0;
    o.fractions[1] = FRACTION;
    o.sink_tokens = SINKS;
    o.k_slots = 1;
    kvq_measure_for_tiles(&o);
    return o;
}

static inline kvq_sweep_options sweep_in(char folder[256], const char *name) {
    (void)snprintf(folder, 256, "%s/%s", kvq_test_folder(), name);
    return (kvq_sweep_options){.work_dir = folder, .stride = 1, .n_shards = 1, .prefetch = true};
}

static inline kvq_status measure_in(rig *r, const kvq_windows *w, const kvq_sweep_options *sweep,
                                    const kvq_processes *p, kvq_artifact **about, kvq_error *err) {
    kvq_measure_options o = measure_options();
    return kvq_measure(&r->ctx, r->be, r->model, w, &o, sweep, p, about, err);
}

#endif
