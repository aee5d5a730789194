// SPDX-License-Identifier: Apache-2.0
//
// The layer-major sweeps over a model, and the calibration that watches them.
//
// How is a model swept that does not fit into memory?  One layer at a time, all windows through it: forward from layer
// 0
//   to L - 1, then the loss, then backward from L - 1 to 0, where each window's layer is recomputed from its input. The
//   hidden states between layers wait in a work directory.
// What if it is killed?  The work directory knows the last step that was finished, and what the unfinished one had
//   seen when it was last saved. The same command goes on from there and ends in the same bytes.
// What if it is spread?  Windows are dealt to processes (MPI) or to independent runs (shards). What they saw is order
//   statistics, integer counts and fixed-point sums: it merges exactly, so any distribution gives the same bytes.
// What does it cost?  Memory: one layer of weights (two with prefetch), one window's activations, and what one layer's
//   statistics need; it does not grow with the number of layers. Disk: kvq_sweep_plan.
#ifndef KVQ_CALIB_H
#define KVQ_CALIB_H

#include "kvq_codebook.h"
#include "kvq_core.h"
#include "kvq_datasets.h"
#include "kvq_model.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---------------------------------------------------------------- processes

// The processes that share one run. One is the usual case: kvq_processes_single.
typedef struct kvq_processes kvq_processes;
struct kvq_processes {
    int   rank, n_ranks;
    void *user;
    // Both are called by all ranks in the same order. agree: *smallest = the smallest value of all ranks.
    // exchange: every rank gives `bytes` bytes; *all (kvq_free) receives them one behind the other by rank, and
    // sizes [n_ranks] how many each gave.
    kvq_status (*agree)(const kvq_processes *p, int64_t value, int64_t *smallest, kvq_error *err);
    kvq_status (*exchange)(const kvq_processes *p, const kvq_context *ctx, const void *mine, int64_t bytes,
                           uint8_t **all, int64_t *sizes, kvq_error *err);
};
kvq_processes kvq_processes_single(void);
// Starts MPI when the program was started by it (mpirun), otherwise one process. KVQ_ERR_UNSUPPORTED when kvq was built
// without MPI but several processes were started. `finish` must be called by all of them before the program ends.
kvq_status kvq_processes_start(kvq_processes *out, kvq_error *err);
void       kvq_processes_finish(kvq_processes *p);

// ---------------------------------------------------------------- sweeps

typedef enum kvq_pass { KVQ_PASS_FORWARD, KVQ_PASS_BACKWARD } kvq_pass;

// One window in one layer, valid during the call. Host memory, but for `there`.
typedef struct kvq_seen {
    int64_t      window;  // index in kvq_windows
    const float *q;       // [S, H * D] pre-RoPE, forward and only when asked for
    const float *k, *v;   // [S, d] pre-RoPE K (or rotated, as the observer wants it), and V
    const float *dk, *dv; // [S, d] gradients of the window's mean loss, backward and only when asked for
    kvq_kv_view  there;   // k, v, dk and dv in memory of the backend that the sweeps run on
} kvq_seen;

// A growing array of bytes.
typedef struct kvq_blob {
    uint8_t *data;
    int64_t  bytes, capacity;
} kvq_blob;

// Watches the sweeps. For each layer and pass: begin, window for every window of this process, then finish. What was
// seen can be saved and merged at any time in between; a merge follows only a begin.
typedef struct kvq_observer {
    void *user;
    bool  wants_query, wants_second_pass, wants_gradients;
    bool  wants_rotated_keys; // k and dk are those after RoPE
    bool  wants_no_copies;    // backward: `there` is enough, k, v, dk and dv are NULL
    kvq_status (*begin)(void *user, kvq_pass pass, int64_t layer, kvq_error *err);
    kvq_status (*window)(void *user, kvq_pass pass, int64_t layer, const kvq_seen *seen, kvq_error *err);
    // Appends the result of the layer, once everything of all processes was seen or merged.
    kvq_status (*finish)(void *user, kvq_pass pass, int64_t layer, kvq_blob *result, kvq_error *err);
    // The rest is NULL for an observer whose sweeps can be neither resumed nor shared among processes.
    kvq_status (*save)(void *user, kvq_pass pass, int64_t layer, kvq_blob *out, kvq_error *err);
    kvq_status (*merge)(void *user, kvq_pass pass, int64_t layer, const uint8_t *data, int64_t bytes, kvq_error *err);
    // Takes a result of finish back, in a later run.
    kvq_status (*restore)(void *user, kvq_pass pass, int64_t layer, const uint8_t *data, int64_t bytes, kvq_error *err);
} kvq_observer;

typedef struct kvq_sweep_options {
    const char      *work_dir;        // made when needed, removed at the end
    bool             restart;         // forget what an earlier run left there
    bool             forward_only;    // end after the forward pass and leave the work directory for a later run
    bool             prefetch;        // expand the next layer's weights in the background
    int64_t          stride;          // every stride-th boundary between layers stays on disk; the rest is recomputed
    int64_t          shard, n_shards; // this run sees windows with index % n_shards == shard; 0 of 1 = all
    const kvq_field *fingerprint;     // what the run depends on; a work directory of another run is refused with a diff
    int64_t          n_fingerprint;
} kvq_sweep_options;

// The model's loss over the windows that were seen; exact, so it does not depend on their order.
typedef struct kvq_loss_sum {
    kvq_fixed sum; // nats
    int64_t   n_tokens;
} kvq_loss_sum;

// Runs the sweeps of this process's windows; *loss is that of all processes. The work directory stays, complete, until
// kvq_sweep_forget: call it when what came of the run is safe.
// KVQ_ERR_INTERRUPTED when ctx->stop asked for it, or another process failed: everything is saved. KVQ_ERR_MISMATCH,
// with the differing fields: the work directory belongs to another run.
kvq_status kvq_sweep(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                     const kvq_sweep_options *options, const kvq_processes *processes, const kvq_observer *observer,
                     kvq_loss_sum *loss, kvq_error *err);
// Has a run begun in this work directory that can be continued?
bool kvq_sweep_has_begun(const kvq_sweep_options *options, const kvq_processes *processes);
// Records what the run is about to end in (a content hash), before that is written: a kill in between must not make the
// finished output look like somebody else's. peek gives it back, "" when there is none, whatever the fingerprint.
kvq_status kvq_sweep_set_result(const kvq_context *ctx, const kvq_sweep_options *options,
                                const kvq_processes *processes, const char result[KVQ_SHA256_HEX], kvq_error *err);
kvq_status kvq_sweep_peek_result(const kvq_context *ctx, const kvq_sweep_options *options,
                                 const kvq_processes *processes, char result[KVQ_SHA256_HEX], kvq_error *err);
// Bytes that a caller wants to find when its run goes on. recall: *found is false when nothing of this size was noted
// under the name.
kvq_status kvq_sweep_note(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                          const char *name, const void *data, int64_t bytes, kvq_error *err);
kvq_status kvq_sweep_recall(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                            const char *name, void *data, int64_t bytes, bool *found, kvq_error *err);
// Removes the work directory. KVQ_ERR_MISMATCH when it belongs to another run.
kvq_status kvq_sweep_forget(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                            kvq_error *err);

// ---------------------------------------------------------------- calibration

typedef struct kvq_calib_options {
    kvq_measure_options measure; // a calibration measures the fraction and weighting that its fit needs, whatever is
    kvq_fit_options     fit;     // named here; a measurement does not look at fit
} kvq_calib_options;
// 3 bits, 1 %, 1 sink, fisher-scaled, keys per channel before RoPE; measures fractions 0, 0.25 % and 1 %, all
// weightings and moments.
kvq_calib_options kvq_calib_options_default(void);

// Check ranges, of a measurement also against the model. KVQ_ERR_USAGE, or KVQ_ERR_UNSUPPORTED for what kvq cannot do,
// names the option.
kvq_status kvq_measure_options_check(const kvq_measure_options *options, const kvq_model_config *config,
                                     int64_t seq_len, kvq_error *err);
kvq_status kvq_fit_options_check(const kvq_fit_options *options, kvq_error *err);
// Adds what the channel-allocated format needs: thresholds in f16, and unless k_slots says otherwise 8 outliers of keys
// per token and side.
void kvq_measure_for_tiles(kvq_measure_options *options);
// What has to be measured for a fit: options->measure with the fit's fraction and weighting alone, without moments.
kvq_measure_options kvq_measure_for_fit(const kvq_calib_options *options);

// What a run will need, from shapes alone, and how it is made to fit.
typedef struct kvq_calib_limits {
    int64_t memory_bytes, scratch_bytes; // 0 = none
} kvq_calib_limits;
typedef struct kvq_calib_plan {
    int64_t memory_bytes;                                     // resident, at the worst moment: the next four, but ..
    int64_t device_bytes;                                     // .. what of them is in the memory of a device
    int64_t weight_bytes, activation_bytes, statistics_bytes; // layers or head; one window; what one layer collects
    int64_t program_bytes;                                    // code, libraries, and what they keep
    int64_t scratch_bytes;                                    // work directory of this process at its largest
    int64_t stride;                                           // for kvq_sweep_options
    bool    prefetch;                                         // likewise
    double  tera_flops;                                       // of this process
} kvq_calib_plan;
// n_parts: processes times shards that the windows are dealt to. KVQ_ERR_MEMORY or KVQ_ERR_DISK when a limit is too
// small; the message names the least that would do.
kvq_status kvq_calib_plan_make(const kvq_context *ctx, const kvq_model *model, const kvq_measure_options *options,
                               int64_t n_windows, int64_t seq_len, int64_t n_parts, kvq_calib_limits limits,
                               kvq_calib_plan *out, kvq_error *err);

// Seconds that the sweeps of a plan will take, from two windows of random tokens really passed through layer 0 and the
// head; nothing is written.
kvq_status kvq_calib_probe(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                           const kvq_measure_options *options, int64_t n_windows, int64_t seq_len, int64_t n_parts,
                           const kvq_calib_plan *plan, double *seconds, kvq_error *err);

// Sweeps and fit. The artifact's quantizer, dataset counts, model shape and layers are filled; identity and provenance
// are the caller's to add. Same input, same result on any number of threads, processes and interruptions. The work
// directory stays until kvq_sweep_forget.
kvq_status kvq_calibrate(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                         const kvq_calib_options *options, const kvq_sweep_options *sweep,
                         const kvq_processes *processes, kvq_artifact **out, kvq_error *err);

// The same sweeps without a fit: everything that options->measure names stays in the work directory, complete, for
// kvq_measure_write. *about: the artifact's identity without tensors, for the caller to complete.
kvq_status kvq_measure(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                       const kvq_measure_options *options, const kvq_sweep_options *sweep,
                       const kvq_processes *processes, kvq_artifact **about, kvq_error *err);
// Writes the measurement file, layer by layer; layers[].k.kl and v.kl of `about` go with it.
kvq_status kvq_measure_write(const kvq_context *ctx, const kvq_artifact *about, const kvq_measure_options *options,
                             const kvq_sweep_options *sweep, const kvq_processes *processes, const char *path,
                             bool force, bool eigenvectors, char sha256[KVQ_SHA256_HEX], kvq_error *err);

// Fits from a measurement, in seconds: the artifact that a calibration with the same options gives, tensors and
// thresholds bit for bit. KVQ_ERR_USAGE when the fraction or weighting was not measured; the message lists what was.
kvq_status kvq_refit(const kvq_context *ctx, const kvq_measurement *measurement, const kvq_fit_options *options,
                     kvq_artifact **out, kvq_error *err);

// ---------------------------------------------------------------- channel-allocated artifacts

// The layers of one measurement: results of a finished kvq_measure in its work directory (about: the artifact that gave
// its identity, with what was measured of single tensors in layers[].k.kl and v.kl), or a file. Everything is borrowed.
typedef struct kvq_measured_layers kvq_measured_layers;
kvq_status                         kvq_measured_layers_open(const kvq_context *ctx, const kvq_artifact *about,
                                                            const kvq_measure_options *options, const kvq_sweep_options *sweep,
                                                            const kvq_processes *processes, kvq_measured_layers **out, kvq_error *err);
kvq_status kvq_measured_layers_of_file(const kvq_context *ctx, const kvq_measurement *file, kvq_measured_layers **out,
                                       kvq_error *err);
void       kvq_measured_layers_close(const kvq_context *ctx, kvq_measured_layers **layers);

// What can be known before anything is measured: KVQ_ERR_USAGE for options out of range and a target that no widths can
// reach.
kvq_status kvq_fit_allocated_check(const kvq_context *ctx, const kvq_model_config *config,
                                   const kvq_measure_options *measured, const kvq_alloc_options *options,
                                   kvq_error *err);

// Error curves of all layers, the allocation of bits, and the fit. With `like` (NULL = none), an artifact of the same
// shape, its widths and rates are used instead of an allocation. Memory: one measured layer, and the curves. *chosen
// (NULL = not wanted; kvq_allocation_free) says what was chosen. KVQ_ERR_USAGE when the outlier fraction or what the
// format needs was not measured, or the target is out of reach; KVQ_ERR_MISMATCH when `like` has another shape.
kvq_status kvq_fit_allocated(const kvq_context *ctx, const kvq_measured_layers *layers,
                             const kvq_alloc_options *options, const kvq_artifact *like, kvq_artifact **out,
                             kvq_allocation *chosen, kvq_error *err);

// A calibration from a capture file, without a model. source_name is recorded when the capture does not say what its
// text was. KVQ_ERR_INPUT when a layer or needed squared gradients are missing. KVQ_ERR_UNSUPPORTED for keys after
// RoPE: a capture holds those before it.
kvq_status kvq_calibrate_capture(const kvq_context *ctx, const kvq_capture *capture, const char *source_name,
                                 const kvq_calib_options *options, kvq_artifact **out, kvq_error *err);

// ---------------------------------------------------------------- shards

// Independent runs over the shards of one set of windows, in two rounds with a merge after each. Round 1 sees K forward
// and gives the ends of its channels; merged, they give the thresholds. Round 2 goes on in the same work directory with
// them and gives histograms; merged, they give the artifact, equal to that of one run.
typedef enum kvq_round { KVQ_ROUND_ENDS = 1, KVQ_ROUND_HISTOGRAMS = 2 } kvq_round;

// kvq_calibrate for one shard (sweep->shard of sweep->n_shards). *out is a template: everything but what only all
// shards together know. thresholds: the merged file of round 1, or NULL for round 1 itself. KVQ_ERR_MISMATCH when it
// was made from other windows or settings.
kvq_status kvq_calibrate_shard(const kvq_context *ctx, const kvq_backend *be, kvq_model *model,
                               const kvq_windows *windows, const kvq_calib_options *options,
                               const kvq_sweep_options *sweep, const char *thresholds, kvq_artifact **out,
                               kvq_error *err);
// Writes what the shard saw, with the template (identity and provenance filled in), as a file for kvq_merge.
kvq_status kvq_shard_write(const kvq_context *ctx, const kvq_artifact *artifact, const kvq_calib_options *options,
                           const kvq_sweep_options *sweep, kvq_round round, const char *path, bool force,
                           kvq_error *err);

// All shards of one round, in any order. Round 1: writes the thresholds to `path`. Round 2: writes the artifact and its
// content hash. KVQ_ERR_MISMATCH, naming the fields, when the files do not belong together; KVQ_ERR_INPUT when a shard
// is missing or there twice.
kvq_status kvq_merge(const kvq_context *ctx, const char *const *paths, int n_paths, const char *path, bool force,
                     kvq_round *round, char content_sha256[KVQ_SHA256_HEX], kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
