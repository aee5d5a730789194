// SPDX-License-Identifier: Apache-2.0
//
// The layer-major sweeps that turn a model and windows of tokens into an artifact.
//
// Forward, layer 0 .. L-1: every window's layer input goes to scratch files, K of one layer is kept for its exact
// quantiles. Backward, layer L-1 .. 0: each window is recomputed from scratch, its K, V and their gradients are counted
// into the histograms of that layer, the layer is fitted and forgotten.
// Memory: one layer of weights + one window's activations + one layer's K or two histograms per thread; it does not
// grow with the number of layers, and with the number of windows only through one layer's K. Scratch on disk: (L + 2) *
// T * C f32.
#ifndef KVQ_CALIB_H
#define KVQ_CALIB_H

#include "kvq_codebook.h"
#include "kvq_core.h"
#include "kvq_datasets.h"
#include "kvq_model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvq_calib_options {
    int           k_bits, v_bits;   // 2 .. 4
    double        outlier_fraction; // two-sided, 0 .. 0.1; 0 = no outliers
    int64_t       sink_tokens;      // first tokens of a window kept in f16 and out of the statistics, 0 .. S - 1
    kvq_weighting weighting;
    const char   *scratch_dir; // decides the disk; its files have no names and end with the process
} kvq_calib_options;
kvq_calib_options kvq_calib_options_default(void); // 3 bits, 1 %, 1 sink, fisher-scaled

// Checks ranges, alone and against the model. KVQ_ERR_USAGE names the option.
kvq_status kvq_calib_options_check(const kvq_calib_options *options, const kvq_model_config *config, int64_t seq_len,
                                   kvq_error *err);

// What a run will need, from shapes alone.
typedef struct kvq_calib_plan {
    int64_t memory_bytes, scratch_bytes;
    double  tera_flops;
} kvq_calib_plan;
kvq_calib_plan kvq_calib_estimate(const kvq_context *ctx, const kvq_model *model, int64_t n_windows, int64_t seq_len);

// Runs both sweeps and the fit. The artifact's quantizer, dataset counts, model shape and layers are filled; identity
// and provenance are the caller's to add. Same input, same result on any number of threads.
kvq_status kvq_calibrate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                         const kvq_calib_options *options, kvq_artifact **out, kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
