// SPDX-License-Identifier: Apache-2.0
// Private to calib: growing bytes, the work directory, the steps of a run, and what a calibration keeps per layer.
#ifndef KVQ_CALIB_IMPL_H
#define KVQ_CALIB_IMPL_H

#include "kvq_calib.h"

// ---------------------------------------------------------------- growing bytes (blob.c)

void       kvq_blob_free(const kvq_context *ctx, kvq_blob *blob);
kvq_status kvq_blob_append(const kvq_context *ctx, kvq_blob *blob, const void *data, int64_t bytes, kvq_error *err);
// Appends `bytes` zeros and returns where they are, for the caller to fill.
kvq_status kvq_blob_extend(const kvq_context *ctx, kvq_blob *blob, int64_t bytes, uint8_t **at, kvq_error *err);

// Reads a blob from the front; to NULL skips. What is missing at the end fails with KVQ_ERR_INTEGRITY.
typedef struct blob_reader {
    const uint8_t *at;
    int64_t        left;
} blob_reader;
kvq_status blob_take(blob_reader *reader, void *to, int64_t bytes, kvq_error *err);

// Bytes behind their number: space for the caller to fill, and where they are.
kvq_status blob_append_sized(const kvq_context *ctx, kvq_blob *blob, int64_t bytes, uint8_t **at, kvq_error *err);
kvq_status blob_take_sized(blob_reader *reader, const uint8_t **at, int64_t *bytes, kvq_error *err);

// ---------------------------------------------------------------- the work directory (work_dir.c)

// A directory that one run owns (flock), with a manifest (fingerprint and last finished step), small files that are
// written whole or not at all, and large ones of equal slots. Everything carries a checksum that is verified when it
// is read. What is written becomes durable with the next commit.
typedef struct work_dir work_dir;

// Opens or makes the directory. A manifest with another fingerprint: KVQ_ERR_MISMATCH, naming the fields. A second run
// in the same directory: KVQ_ERR_EXISTS.
kvq_status work_open(const kvq_context *ctx, const char *path, const kvq_field *fingerprint, int64_t n_fingerprint,
                     bool restart, work_dir **out, kvq_error *err);
// finished: removes the directory and all that kvq put into it; otherwise it stays for the next run.
void work_close(const kvq_context *ctx, work_dir **work, bool finished);

// What the run in a directory ended in ("" when it did not end, or there is no run), whatever its fingerprint.
kvq_status work_peek_result(const kvq_context *ctx, const char *path, char result[KVQ_SHA256_HEX], kvq_error *err);
bool       work_exists(const char *path);                      // with a manifest
kvq_status work_make_folder(const char *path, kvq_error *err); // it may be there already
void       work_remove_folder(const char *path);               // when it is empty

int64_t work_step(const work_dir *work);   // steps finished; 0 in a new directory
int64_t work_stride(const work_dir *work); // of the run that made the directory; 0 in a new one
void    work_set_stride(work_dir *work, int64_t stride);
void    work_set_result(work_dir *work, const char result[KVQ_SHA256_HEX]);
// Makes what was written durable, then the manifest with the finished steps, stride and result.
kvq_status work_commit(const kvq_context *ctx, work_dir *work, int64_t step, kvq_error *err);

kvq_status work_put(const kvq_context *ctx, work_dir *work, const char *name, const kvq_blob *blob, kvq_error *err);
// *blob stays empty when there is no such file.
kvq_status work_get(const kvq_context *ctx, work_dir *work, const char *name, kvq_blob *blob, kvq_error *err);
void       work_drop(work_dir *work, const char *name); // harmless when there is none

kvq_status work_write_slot(work_dir *work, const char *name, int64_t slot, const float *x, int64_t n, kvq_error *err);
kvq_status work_read_slot(work_dir *work, const char *name, int64_t slot, float *x, int64_t n, kvq_error *err);

// ---------------------------------------------------------------- steps (steps.c)

typedef enum step_kind { STEP_EMBED, STEP_FORWARD, STEP_LOSS, STEP_REFILL, STEP_BACKWARD } step_kind;
typedef struct step {
    step_kind kind;
    int64_t   layer;
} step;

// Which steps a run has. Boundary b is the input of layer b; boundaries 0, stride, 2 stride, ... stay on disk after the
// forward pass, and before a group of layers is passed backward, the boundaries inside it are made again (REFILL).
typedef struct step_plan {
    int64_t n_layers, stride;
    bool    second_pass, gradients;
} step_plan;
int64_t step_count(const step_plan *plan);
step    step_at(const step_plan *plan, int64_t index);
int64_t step_first_after_forward(const step_plan *plan);
// Does the input of a layer stay on disk after the layer was passed forward?
bool step_keeps_boundary(const step_plan *plan, int64_t layer);
// The most boundaries and gradients on disk at once.
int64_t step_peak_states(const step_plan *plan);

// What the finished steps of a run left in the work directory of this process; close it with work_close.
kvq_status sweep_open_results(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                              work_dir **out, kvq_error *err);
kvq_status sweep_get_result(const kvq_context *ctx, work_dir *work, step at, kvq_blob *out, kvq_error *err);

// An artifact that knows its model's shape and, unless fit is NULL, how it will be quantised; without tensors.
kvq_status calib_create_artifact(const kvq_context *ctx, const kvq_model_config *config,
                                 const kvq_measure_options *measured, const kvq_fit_options *fit, kvq_artifact **out,
                                 kvq_error *err);

kvq_status calib_describe_windows(const kvq_context *ctx, const kvq_windows *windows, kvq_artifact *artifact,
                                  kvq_error *err);
double     calib_mean_loss(kvq_loss_sum loss); // nats per token

// What an artifact says about model, tokenizer, text and where it comes from (measurements.c).
kvq_status calib_copy_identity(const kvq_context *ctx, const kvq_artifact *from, kvq_artifact *to, kvq_error *err);
// A layer from what the sweeps left in their work directory; about has its KL, where the format needs it
// (measurements.c).
kvq_status calib_measured_layer(const kvq_context *ctx, work_dir *work, const kvq_artifact *about,
                                const kvq_measure_options *options, int64_t layer, kvq_measured_layer **out,
                                kvq_error *err);
// KVQ_ERR_USAGE, listing what there is, when outliers of a fraction were not measured.
kvq_status calib_check_fraction(const kvq_measure_options *measured, double fraction, kvq_error *err);

// ---------------------------------------------------------------- what a calibration keeps (measure.c)

// The shape of what is measured.
typedef struct measure_shape {
    int64_t n_layers, seq_len, n_windows;
    int     n_heads, n_kv_heads, head_dim;
} measure_shape;
measure_shape measure_shape_of(const kvq_model_config *config, int64_t seq_len, int64_t n_windows);
measure_shape measure_shape_of_artifact(const kvq_artifact *artifact);

// What the channel-allocated format needs besides (measure_tiles.c). Forward: the mean square of V, from which the
// exponent of a layer's scales follows; backward: counts of channels and of rotated values.
typedef struct tile_measure tile_measure;
kvq_status measure_tiles_create(const kvq_context *ctx, const kvq_measure_options *options, measure_shape shape,
                                tile_measure **out, kvq_error *err);
void       measure_tiles_destroy(const kvq_context *ctx, tile_measure **tiles);
void       measure_tiles_drop(tile_measure *tiles);                                      // frees the counts
int64_t    measure_tiles_bytes(const kvq_measure_options *options, measure_shape shape); // of the counts
void       measure_tiles_begin_forward(tile_measure *tiles);
void       measure_tiles_see_forward(tile_measure *tiles, const float *v);
void       measure_tiles_finish_forward(tile_measure *tiles, int64_t layer);
kvq_fixed *measure_tiles_squares(
    tile_measure *tiles); // of the layer in work: what is saved and merged of the forward pass
int64_t   *measure_tiles_exponent(tile_measure *tiles, int64_t layer);
kvq_status measure_tiles_begin_backward(tile_measure *tiles, kvq_error *err);
// spec: the outliers of this fraction. Gradients are signed.
kvq_status measure_tiles_see_keys(tile_measure *tiles, int fraction, const kvq_block_spec *spec, const float *k,
                                  const float *dk, kvq_error *err);
kvq_status measure_tiles_see_values(tile_measure *tiles, int64_t layer, const float *v, const float *dv,
                                    kvq_error *err);
kvq_status measure_tiles_save(const tile_measure *tiles, kvq_blob *out, kvq_error *err);
kvq_status measure_tiles_merge(tile_measure *tiles, blob_reader *in, kvq_error *err);
kvq_status measure_tiles_fill(const tile_measure *tiles, int64_t layer, kvq_measured_layer *to, kvq_error *err);

// Channels of K, or of V.
static inline int64_t measure_width(measure_shape shape) { return (int64_t)shape.n_kv_heads * shape.head_dim; }
// Histograms of a layer: [n_fractions, K and V, n_kv_heads].
static inline int measure_histograms(const kvq_measure_options *o, measure_shape shape) {
    return o->n_fractions * 2 * shape.n_kv_heads;
}

// Histograms that are counted where K and V are (measure_device.c): a part of them is in memory of the backend until it
// is taken.
typedef struct device_counts device_counts;
bool       device_counts_possible(const kvq_backend *be, const kvq_measure_options *options); // be NULL: no
int64_t    device_counts_bytes(const kvq_backend *be, const kvq_measure_options *options, measure_shape shape);
kvq_status device_counts_create(const kvq_context *ctx, const kvq_backend *be, const kvq_measure_options *options,
                                measure_shape shape, device_counts **out, kvq_error *err);
void       device_counts_destroy(const kvq_context *ctx, device_counts **counts);
kvq_status device_counts_begin(device_counts *counts, kvq_error *err); // makes empty ones
void       device_counts_drop(device_counts *counts);                  // frees them
// Rows of a tensor of one window, x and dx (NULL = no weighting needs it) [S, d] in memory of the backend, into the
// histograms [n_kv_heads] from `first` on. False: they cannot be counted, and nothing was; kvq_count_rows says why,
// unless the backend has failed.
bool device_counts_add(device_counts *counts, int first, const kvq_block_spec *spec, const float *x, const float *dx);
// Adds all to histograms [n_fractions, 2, n_kv_heads] and begins anew.
kvq_status device_counts_take(device_counts *counts, kvq_histogram *const *histograms, kvq_error *err);

// One layer at a time: the ends of K and second moments in the forward pass, histograms of K and V in the backward
// pass. A layer's result is a kvq_measured_layer as bytes.
typedef struct measure measure;
// What the sweeps show is in memory of `be`, which counts if it can; NULL: all comes from the host. With a fit (NULL =
// none) a layer is fitted into the artifact when it is complete, also when it was restored. Its
// moments are not there then: they are results of the forward pass.
kvq_status measure_create(const kvq_context *ctx, const kvq_backend *be, const kvq_measure_options *options,
                          measure_shape shape, const kvq_fit_options *fit, kvq_artifact *artifact, measure **out,
                          kvq_error *err);
void       measure_destroy(const kvq_context *ctx, measure **m);
// In a shard the results are what was seen, to be merged with the other shards' before anything is concluded from it.
void         measure_keep_raw(measure *m);
kvq_observer measure_observer(measure *m);
// One window in the backward pass of a layer, with squared gradients that somebody else made; NULL = none.
kvq_status measure_count(measure *m, int64_t layer, const float *k, const float *v, const float *w_k, const float *w_v,
                         kvq_error *err);
// Thresholds [n_layers, n_fractions, 2, d] (lower, upper) where keys have ranges per channel: found by the forward
// pass, or set before the backward one.
float  *measure_thresholds(measure *m);
int64_t measure_thresholds_count(const measure *m); // 0 when ranges are found per token
// Completes a layer from the results of both passes.
kvq_status measure_layer_from_results(const kvq_context *ctx, const kvq_measure_options *options, measure_shape shape,
                                      const kvq_blob *forward, const kvq_blob *backward, kvq_measured_layer **out,
                                      kvq_error *err);
int64_t    measure_bytes(const kvq_measure_options *options, measure_shape shape); // memory at the worst moment
bool       measure_needs_gradients(const kvq_measure_options *options);

#endif
