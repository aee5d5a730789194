// SPDX-License-Identifier: Apache-2.0
//
// Private to the suites that score a model: a model of three layers, windows of random ids, and artifacts of both
// schemes for it.
#ifndef SCORED_MODEL_H
#define SCORED_MODEL_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_calib.h"
#include "kvq_decoder.h"
#include "kvq_test.h"
#include "small_model.h"

enum { L = 3, DIM = 16, D = 2 * DIM, C = 64, V = KVQ_MAKE_N_TOKENS, MOST_N = 8, MOST_S = 600, MOST_T = 512 };

typedef struct rig {
    kvq_context             ctx;
    kvq_backend            *be;
    kvq_checkpoint         *checkpoint;
    kvq_model              *model;
    const kvq_model_config *c;
    kvq_artifact           *artifact;
    kvq_windows             windows;
    int32_t                 ids[MOST_N * MOST_S];
} rig;

static inline void rig_open(rig *r, int64_t n_windows, int64_t seq_len) {
    kvq_make_options options = kvq_make_options_default();
    memset(r, 0, sizeof *r);
    r->ctx = kvq_test_context();
    options.n_layers = L;
    options.max_positions = 1024;
    small_model_open(&r->ctx, &options, false, &r->be, &r->checkpoint, &r->model);
    r->c = kvq_model_describe(r->model);
    ck_assert(r->c->hidden_size == C && r->c->vocab_size == V && r->c->n_kv_heads * r->c->head_dim == D);
    r->windows = (kvq_windows){.n_windows = n_windows, .seq_len = seq_len, .ids = r->ids, .source = "test"};
    for (int64_t i = 0; i < n_windows * seq_len; i++)
        r->ids[i] = (int32_t)kvq_rng_below(8, KVQ_RNG_TEST, 80, (uint64_t)i, V);
}

static inline void rig_close(rig *r) {
    kvq_artifact_destroy(&r->ctx, &r->artifact);
    small_model_close(&r->ctx, &r->be, &r->checkpoint, &r->model);
}

// ---------------------------------------------------------------- artifacts of this model

enum { NUQ, ALLOC };

// Of two short windows: what the artifact knows is of no importance here, and that it clips and errs is welcome.
static inline kvq_windows few_windows(rig *r) {
    return (kvq_windows){.n_windows = 2, .seq_len = 40, .ids = r->ids, .source = "test"};
}

static inline void make_nuq(rig *r, int bits, kvq_key_domain domain, int64_t recent, const kvq_sweep_options *sweep) {
    kvq_calib_options o = kvq_calib_options_default();
    kvq_processes     alone = kvq_processes_single();
    kvq_windows       w = bits < 8 ? few_windows(r) : r->windows;
    kvq_error         err = {0};
    if (bits == 8) o.fit.outlier_fraction = 0; // and nothing of these windows is cut off
    o.measure.k_domain = domain;
    o.measure.sink_tokens = 2;
    o.fit.k_bits = o.fit.v_bits = bits;
    o.fit.recent_tokens = recent;
    kvq_test_ok(kvq_calibrate(&r->ctx, r->be, r->model, &w, &o, sweep, &alone, &r->artifact, &err), &err);
}

static inline void make_alloc(rig *r, const kvq_sweep_options *sweep) {
    kvq_measure_options  o = kvq_calib_options_default().measure;
    kvq_alloc_options    reference = kvq_reference_allocation();
    kvq_processes        alone = kvq_processes_single();
    kvq_windows          w = few_windows(r);
    kvq_measured_layers *layers = NULL;
    kvq_artifact        *about = NULL;
    kvq_error            err = {0};
    kvq_measure_for_tiles(&o);
    o.sink_tokens = 2;
    kvq_test_ok(kvq_measure(&r->ctx, r->be, r->model, &w, &o, sweep, &alone, &about, &err), &err);
    kvq_test_ok(kvq_measured_layers_open(&r->ctx, about, &o, sweep, &alone, &layers, &err), &err);
    kvq_test_ok(kvq_fit_allocated(&r->ctx, layers, &reference, NULL, &r->artifact, NULL, &err), &err);
    kvq_measured_layers_close(&r->ctx, &layers);
    kvq_artifact_destroy(&r->ctx, &about);
}

// bits, domain, recent: of the scheme NUQ.
static inline void make_artifact(rig *r, int scheme, int bits, kvq_key_domain domain, int64_t recent) {
    char          folder[256];
    kvq_processes alone = kvq_processes_single();
    kvq_error     err = {0};
    (void)snprintf(folder, sizeof folder, "%s/work", kvq_test_folder());
    kvq_sweep_options sweep = {.work_dir = folder, .restart = true, .stride = 1, .n_shards = 1};
    if (scheme == NUQ) {
        make_nuq(r, bits, domain, recent, &sweep);
    } else {
        make_alloc(r, &sweep);
    }
    kvq_test_ok(kvq_sweep_forget(&r->ctx, &sweep, &alone, &err), &err);
}

#endif
