// SPDX-License-Identifier: Apache-2.0
//
// The engine of the sweeps: runs one step after the other for this process's windows, feeds the observer, and commits.
// A step is one layer passed by all windows (or the embedding, or the loss). Its result is written before the manifest
// says that it is finished, and what it read is deleted only when all processes know.
//
// Between steps the processes agree on how the step went, so that a failure or a request to stop on one of them ends
// all of them at the same place.
#include <stdio.h>
#include <string.h>

#include "calib_impl.h"

#define SAVE_INTERVAL_S 60.0 // an unfinished step is saved this often, so that a kill costs a minute
#define MAX_NAME        32
#define PARTIAL         "kvq-partial"
#define MAX_PATH        4096

typedef struct sweep {
    const kvq_context       *ctx;
    const kvq_backend       *be;
    kvq_model               *model;
    const kvq_model_config  *config;
    const kvq_windows       *windows;
    const kvq_sweep_options *options;
    const kvq_processes     *processes;
    const kvq_observer      *observer;
    step_plan                plan;
    work_dir                *work;
    kvq_workspace           *ws;
    float                   *x, *dx;              // backend [S, C]
    float                   *rotated, *d_rotated; // backend [S, d], when the observer wants keys after RoPE
    float                   *host_x;              // [S, C] between backend and work directory
    float                   *q, *k, *v, *dk, *dv; // host copies of one window for the observer
    int64_t                  state_floats, d, q_width;
    int64_t                  n_windows, local, window; // of this process; the current one here and in kvq_windows
    double                  *nll;                      // [S - 1]
    kvq_loss_sum             loss;
    kvq_layer               *layer;
    kvq_head                *head;
    double                   saved_at_s;
} sweep;

static const char *boundary_name(char name[MAX_NAME], const char *what, int64_t index) {
    (void)snprintf(name, MAX_NAME, "kvq-%s.%04lld", what, (long long)index);
    return name;
}

static kvq_status name_window(const sweep *s, kvq_status status, kvq_error *err) {
    if (status != KVQ_OK) kvq_error_prefix(err, "calibration window %lld: ", (long long)s->window);
    return status;
}

static kvq_status load_state(sweep *s, const char *what, int64_t index, float *to, kvq_error *err) {
    char       name[MAX_NAME];
    kvq_status status =
        work_read_slot(s->work, boundary_name(name, what, index), s->local, s->host_x, s->state_floats, err);
    if (status == KVQ_OK) s->be->upload(s->be, to, s->host_x, s->state_floats);
    return status;
}

static kvq_status store_state(sweep *s, const char *what, int64_t index, const float *from, kvq_error *err) {
    char name[MAX_NAME];
    s->be->download(s->be, s->host_x, from, s->state_floats);
    return work_write_slot(s->work, boundary_name(name, what, index), s->local, s->host_x, s->state_floats, err);
}

static void drop_state(sweep *s, const char *what, int64_t index) {
    char name[MAX_NAME];
    work_drop(s->work, boundary_name(name, what, index));
}

// ---------------------------------------------------------------- one window of a step

// Keys or their gradients as the observer wants them: rotated into `to`, unless that is NULL.
static const float *keys_of(sweep *s, int64_t layer, kvq_rotation rotation, const float *from, float *to) {
    if (to == NULL) return from;
    s->be->copy(s->be, to, from, s->windows->seq_len * s->d);
    kvq_rotate_keys(s->model, s->ws, layer, rotation, s->windows->seq_len, to);
    return to;
}

static void download_all(sweep *s, const kvq_kv_view *from) {
    int64_t n = s->windows->seq_len * s->d;
    s->be->download(s->be, s->k, from->k, n);
    s->be->download(s->be, s->v, from->v, n);
    if (from->dk != NULL) s->be->download(s->be, s->dk, from->dk, n);
    if (from->dv != NULL) s->be->download(s->be, s->dv, from->dv, n);
}

// A forward pass shows what enters attention: in the forward step, and in the backward one when no gradients are
// wanted.
static kvq_status observe(sweep *s, kvq_pass pass, int64_t layer, const kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    const float *k = keys_of(s, layer, KVQ_ROTATE_FORWARD, x->k, s->rotated);
    kvq_seen     seen = {.window = s->window, .there = {.k = k, .v = x->v}};
    if (s->q != NULL && pass == KVQ_PASS_FORWARD) {
        s->be->download(s->be, s->q, x->q, n_tokens * s->q_width);
        seen.q = s->q;
    }
    if (pass == KVQ_PASS_FORWARD || !s->observer->wants_no_copies) {
        download_all(s, &seen.there);
        seen.k = s->k;
        seen.v = s->v;
    }
    return s->observer->window(s->observer->user, pass, layer, &seen, err);
}

static kvq_status observe_forward(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    return observe(user, KVQ_PASS_FORWARD, layer, x, n_tokens, err);
}

static kvq_status observe_again(void *user, int64_t layer, kvq_qkv *x, int64_t n_tokens, kvq_error *err) {
    return observe(user, KVQ_PASS_BACKWARD, layer, x, n_tokens, err);
}

static kvq_status forward_window(sweep *s, int64_t l, kvq_qkv_hook hook, bool store, kvq_error *err) {
    int64_t    S = s->windows->seq_len;
    kvq_status status = load_state(s, "x", l, s->x, err);
    if (status != KVQ_OK) return status;
    status = name_window(s, kvq_layer_forward(s->model, s->layer, s->ws, S, s->x, hook, s, err), err);
    return status == KVQ_OK && store ? store_state(s, "x", l + 1, s->x, err) : status;
}

static kvq_status backward_window(sweep *s, int64_t l, kvq_error *err) {
    kvq_seen   seen = {.window = s->window};
    kvq_status status = KVQ_OK;
    KVQ_TRY(load_state(s, "x", l, s->x, err));
    KVQ_TRY(load_state(s, "g", l + 1, s->dx, err));
    KVQ_TRY(name_window(s, kvq_layer_backward(s->model, s->layer, s->ws, s->windows->seq_len, s->x, s->dx, err), err));
    seen.there = kvq_workspace_kv(s->ws);
    seen.there.k = keys_of(s, l, KVQ_ROTATE_FORWARD, seen.there.k, s->rotated);
    seen.there.dk = keys_of(s, l, KVQ_ROTATE_GRADIENT, seen.there.dk, s->d_rotated);
    if (!s->observer->wants_no_copies) {
        download_all(s, &seen.there);
        seen.k = s->k, seen.v = s->v, seen.dk = s->dk, seen.dv = s->dv;
    }
    KVQ_TRY(name_window(s, s->observer->window(s->observer->user, KVQ_PASS_BACKWARD, l, &seen, err), err));
    if (l > 0) KVQ_TRY(store_state(s, "g", l, s->dx, err));
done:
    return status;
}

static kvq_status loss_window(sweep *s, const int32_t *ids, kvq_error *err) {
    int64_t    S = s->windows->seq_len;
    float     *dx = s->plan.gradients ? s->dx : NULL;
    kvq_status status = load_state(s, "x", s->config->n_layers, s->x, err);
    if (status == KVQ_OK)
        status = name_window(s, kvq_head_loss(s->model, s->head, s->ws, ids, S, s->x, dx, s->nll, err), err);
    if (status != KVQ_OK) return status;
    for (int64_t t = 0; t < S - 1; t++) kvq_fixed_add(&s->loss.sum, s->nll[t]);
    s->loss.n_tokens += S - 1;
    return dx != NULL ? store_state(s, "g", s->config->n_layers, s->dx, err) : KVQ_OK;
}

static kvq_status run_window(sweep *s, step at, kvq_error *err) {
    const int32_t *ids = s->windows->ids + s->window * s->windows->seq_len;
    kvq_status     status;
    switch (at.kind) {
    case STEP_EMBED:
        status = name_window(s, kvq_model_embed(s->model, ids, s->windows->seq_len, s->x, err), err);
        return status == KVQ_OK ? store_state(s, "x", 0, s->x, err) : status;
    case STEP_FORWARD:
        return forward_window(s, at.layer, observe_forward, s->plan.second_pass || at.layer + 1 < s->config->n_layers,
                              err);
    case STEP_REFILL:
        return forward_window(s, at.layer, NULL, true, err);
    case STEP_LOSS:
        return loss_window(s, ids, err);
    case STEP_BACKWARD:
        return s->plan.gradients ? backward_window(s, at.layer, err)
                                 : forward_window(s, at.layer, observe_again, false, err);
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- what a step accumulates

// Embedding and refilling leave nothing behind but states.
static bool accumulates(step at) { return at.kind != STEP_EMBED && at.kind != STEP_REFILL; }

static kvq_pass pass_of(step at) { return at.kind == STEP_FORWARD ? KVQ_PASS_FORWARD : KVQ_PASS_BACKWARD; }

static kvq_status begin_accumulating(sweep *s, step at, kvq_error *err) {
    const kvq_observer *o = s->observer;
    if (at.kind == STEP_LOSS) s->loss = (kvq_loss_sum){0};
    if (!accumulates(at) || at.kind == STEP_LOSS) return KVQ_OK;
    return o->begin(o->user, pass_of(at), at.layer, err);
}

static kvq_status save_accumulated(sweep *s, step at, kvq_blob *out, kvq_error *err) {
    const kvq_observer *o = s->observer;
    if (at.kind == STEP_LOSS) return kvq_blob_append(s->ctx, out, &s->loss, sizeof s->loss, err);
    return accumulates(at) ? o->save(o->user, pass_of(at), at.layer, out, err) : KVQ_OK;
}

static kvq_status merge_accumulated(sweep *s, step at, const uint8_t *data, int64_t bytes, kvq_error *err) {
    const kvq_observer *o = s->observer;
    blob_reader         in = {data, bytes};
    kvq_loss_sum        part;
    if (!accumulates(at)) return KVQ_OK;
    if (at.kind != STEP_LOSS) return o->merge(o->user, pass_of(at), at.layer, data, bytes, err);
    kvq_status status = blob_take(&in, &part, sizeof part, err);
    if (status != KVQ_OK) return status;
    kvq_fixed_merge(&s->loss.sum, part.sum);
    s->loss.n_tokens += part.n_tokens;
    return KVQ_OK;
}

static const char *result_name(char name[MAX_NAME], step at) {
    return boundary_name(name,
                         at.kind == STEP_LOSS      ? "loss"
                         : at.kind == STEP_FORWARD ? "forward"
                                                   : "backward",
                         at.layer);
}

// ---------------------------------------------------------------- unfinished steps

typedef struct partial_header {
    int64_t step, n_done;
} partial_header;

static kvq_status save_partial(sweep *s, int64_t index, int64_t n_done, kvq_error *err) {
    partial_header header = {index, n_done};
    kvq_blob       blob = {0};
    kvq_status     status = KVQ_OK;
    if (s->observer->save == NULL) return KVQ_OK;
    KVQ_TRY(work_commit(s->ctx, s->work, index, err)); // the states of these windows first
    KVQ_TRY(kvq_blob_append(s->ctx, &blob, &header, sizeof header, err));
    KVQ_TRY(save_accumulated(s, step_at(&s->plan, index), &blob, err));
    KVQ_TRY(work_put(s->ctx, s->work, PARTIAL, &blob, err));
    s->saved_at_s = kvq_now_s();
done:
    kvq_blob_free(s->ctx, &blob);
    return status;
}

// What a stopped run had seen of this step; *n_done stays 0 when there is nothing.
static kvq_status load_partial(sweep *s, int64_t index, int64_t *n_done, kvq_error *err) {
    partial_header header = {0};
    kvq_blob       blob = {0};
    kvq_status     status = KVQ_OK;
    KVQ_TRY(work_get(s->ctx, s->work, PARTIAL, &blob, err));
    if (blob.bytes >= (int64_t)sizeof header) memcpy(&header, blob.data, sizeof header);
    if (blob.bytes < (int64_t)sizeof header || header.step != index || header.n_done > s->n_windows) goto done;
    KVQ_TRY(merge_accumulated(s, step_at(&s->plan, index), blob.data + sizeof header,
                              blob.bytes - (int64_t)sizeof header, err));
    *n_done = header.n_done;
done:
    kvq_blob_free(s->ctx, &blob);
    return status;
}

// ---------------------------------------------------------------- one step

static void report(const sweep *s, step at, int64_t n_done) {
    static const char *const NAMES[] = {"embed", "forward", "loss", "recompute", "backward"};
    int64_t                  L = s->config->n_layers, layer = -1, before = 0, n_layers = 1;
    if (at.kind == STEP_FORWARD || at.kind == STEP_BACKWARD) {
        layer = at.layer;
        before = at.kind == STEP_FORWARD ? layer : L - 1 - layer;
        n_layers = L;
    }
    kvq_report_progress(s->ctx, NAMES[at.kind], layer, before * s->n_windows + n_done, n_layers * s->n_windows);
}

static kvq_status stopped(const sweep *s, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL, "everything done so far is saved in %s", s->options->work_dir);
}

// What became of a window. A backend that has failed gives numbers that are none, and whoever stumbled over them had
// less to say.
static kvq_status check_window(const sweep *s, kvq_status status, kvq_error *err) {
    kvq_error  failure = {KVQ_OK, "", ""};
    kvq_status checked = s->be->check(s->be, &failure);
    if (checked == KVQ_OK) return status;
    if (err != NULL) *err = failure;
    return checked;
}

static kvq_status run_windows(sweep *s, int64_t index, kvq_error *err) {
    step       at = step_at(&s->plan, index);
    int64_t    first = 0, stride = s->options->n_shards * s->processes->n_ranks;
    kvq_status status = KVQ_OK;
    KVQ_TRY(begin_accumulating(s, at, err));
    KVQ_TRY(load_partial(s, index, &first, err));
    for (s->local = first; s->local < s->n_windows; s->local++) {
        s->window = s->local * stride + s->options->shard * s->processes->n_ranks + s->processes->rank;
        KVQ_TRY(check_window(s, run_window(s, at, err), err)); // before anything of it is saved
        report(s, at, s->local + 1);
        bool stop = kvq_stop_requested(s->ctx), last = s->local + 1 == s->n_windows;
        if (last || (!stop && kvq_now_s() < s->saved_at_s + SAVE_INTERVAL_S)) continue;
        KVQ_TRY(save_partial(s, index, s->local + 1, err));
        if (stop) KVQ_TRY(stopped(s, err));
    }
done:
    return status;
}

// How a step went, from worst to best; what all processes agree on is the worst. A failure is its negated status.
enum { WAS_STOPPED = 1, WENT_WELL };

// Turns this process's outcome into that of all.
static kvq_status agree(sweep *s, int64_t index, kvq_status status, kvq_error *err) {
    int64_t mine = status == KVQ_OK ? WENT_WELL : status == KVQ_ERR_INTERRUPTED ? WAS_STOPPED : -(int64_t)status;
    int64_t all = mine;
    if (s->processes->n_ranks == 1) return status;
    kvq_status agreed = s->processes->agree(s->processes, mine, &all, status == KVQ_OK ? err : NULL);
    if (agreed != KVQ_OK && status == KVQ_OK) return agreed;
    if (all >= mine) return status;
    if (all < 0) {
        return kvq_fail(err, (kvq_status)-all, "see the message of the other process, then run the same command again",
                        "another process of this run failed; everything done so far is saved");
    }
    status = index >= 0 ? save_partial(s, index, s->n_windows, err) : KVQ_OK;
    return status != KVQ_OK ? status
                            : kvq_fail(err, KVQ_ERR_INTERRUPTED, NULL,
                                       "another process of this run was stopped; everything is saved");
}

// What all processes saw, in every process.
static kvq_status share(sweep *s, step at, kvq_error *err) {
    kvq_blob   mine = {0};
    uint8_t   *all = NULL;
    int64_t   *sizes = NULL, offset = 0;
    kvq_status status = KVQ_OK;
    if (s->processes->n_ranks == 1 || !accumulates(at)) return KVQ_OK;
    status = KVQ_NEW(s->ctx, s->processes->n_ranks, "sizes of what processes saw", &sizes, err);
    if (status == KVQ_OK) status = save_accumulated(s, at, &mine, err);
    KVQ_TRY(agree(s, -1, status, err)); // nobody waits for a process that has nothing to give
    KVQ_TRY(s->processes->exchange(s->processes, s->ctx, mine.data, mine.bytes, &all, sizes, err));
    KVQ_TRY(begin_accumulating(s, at, err));
    for (int rank = 0; rank < s->processes->n_ranks; offset += sizes[rank++])
        KVQ_TRY(merge_accumulated(s, at, all + offset, sizes[rank], err));
done:
    kvq_blob_free(s->ctx, &mine);
    kvq_free(s->ctx, all);
    kvq_free(s->ctx, sizes);
    return status;
}

static kvq_status conclude(sweep *s, step at, kvq_error *err) {
    const kvq_observer *o = s->observer;
    char                name[MAX_NAME];
    kvq_blob            result = {0};
    kvq_status          status = KVQ_OK;
    if (!accumulates(at)) return KVQ_OK;
    KVQ_TRY(share(s, at, err));
    if (at.kind == STEP_LOSS) {
        KVQ_TRY(kvq_blob_append(s->ctx, &result, &s->loss, sizeof s->loss, err));
    } else {
        KVQ_TRY(o->finish(o->user, pass_of(at), at.layer, &result, err));
    }
    KVQ_TRY(work_put(s->ctx, s->work, result_name(name, at), &result, err));
done:
    kvq_blob_free(s->ctx, &result);
    return status;
}

static void drop_what_was_read(sweep *s, step at) {
    work_drop(s->work, PARTIAL);
    if (at.kind == STEP_FORWARD && !step_keeps_boundary(&s->plan, at.layer)) drop_state(s, "x", at.layer);
    if (at.kind == STEP_LOSS) drop_state(s, "x", at.layer);
    if (at.kind != STEP_BACKWARD) return;
    drop_state(s, "x", at.layer);
    drop_state(s, "g", at.layer + 1);
}

static kvq_status load_weights(sweep *s, int64_t index, kvq_error *err) {
    step at = step_at(&s->plan, index), next = step_at(&s->plan, index + 1);
    if (at.kind == STEP_EMBED) return KVQ_OK;
    kvq_status status = at.kind == STEP_LOSS ? kvq_head_load(s->model, &s->head, err)
                                             : kvq_layer_load(s->model, at.layer, &s->layer, err);
    bool       more = index + 1 < step_count(&s->plan) && next.kind != STEP_LOSS;
    if (status == KVQ_OK && s->options->prefetch && more) kvq_layer_prefetch(s->model, next.layer);
    return status;
}

static kvq_status run_step(sweep *s, int64_t index, kvq_error *err) {
    step       at = step_at(&s->plan, index);
    kvq_status status = KVQ_OK;
    if (kvq_stop_requested(s->ctx)) status = stopped(s, err);
    KVQ_TRY(agree(s, -1, status, err));
    status = load_weights(s, index, err);
    if (status == KVQ_OK) status = run_windows(s, index, err);
    KVQ_TRY(agree(s, index, status, err));
    status = conclude(s, at, err);
    if (status == KVQ_OK && s->observer->save != NULL) status = work_commit(s->ctx, s->work, index + 1, err);
    KVQ_TRY(agree(s, -1, status, err));
    drop_what_was_read(s, at);
done:
    kvq_layer_release(s->model, &s->layer);
    kvq_head_release(s->model, &s->head);
    return status;
}

// ---------------------------------------------------------------- the whole run

kvq_status sweep_get_result(const kvq_context *ctx, work_dir *work, step at, kvq_blob *out, kvq_error *err) {
    char       name[MAX_NAME];
    kvq_status status = work_get(ctx, work, result_name(name, at), out, err);
    if (status != KVQ_OK || out->bytes > 0) return status;
    return kvq_fail(err, KVQ_ERR_INTEGRITY, "pass --restart to begin anew", "work directory: %s is missing", name);
}

// Results of steps that an earlier run finished.
static kvq_status restore(sweep *s, int64_t n_steps, kvq_error *err) {
    const kvq_observer *o = s->observer;
    kvq_blob            blob = {0};
    kvq_status          status = KVQ_OK;
    for (int64_t index = 0; index < n_steps; index++) {
        step at = step_at(&s->plan, index);
        if (!accumulates(at)) continue;
        blob.bytes = 0;
        KVQ_TRY(sweep_get_result(s->ctx, s->work, at, &blob, err));
        if (at.kind == STEP_LOSS) {
            blob_reader in = {blob.data, blob.bytes};
            KVQ_TRY(blob_take(&in, &s->loss, sizeof s->loss, err));
        } else {
            KVQ_TRY(o->restore(o->user, pass_of(at), at.layer, blob.data, blob.bytes, err));
        }
    }
done:
    kvq_blob_free(s->ctx, &blob);
    return status;
}

static kvq_status allocate(sweep *s, kvq_error *err) {
    int64_t    S = s->windows->seq_len, kv = S * s->d;
    bool       gradients_copied = s->plan.gradients && !s->observer->wants_no_copies;
    kvq_status status = KVQ_OK;
    KVQ_TRY(kvq_workspace_create(s->model, S, s->plan.gradients, &s->ws, err));
    KVQ_TRY(s->be->alloc(s->be, s->state_floats, "hidden state", &s->x, err));
    KVQ_TRY(s->be->alloc(s->be, s->state_floats, "gradient", &s->dx, err));
    KVQ_TRY(KVQ_NEW(s->ctx, s->state_floats, "hidden state", &s->host_x, err));
    KVQ_TRY(KVQ_NEW(s->ctx, S, "losses", &s->nll, err));
    KVQ_TRY(KVQ_NEW(s->ctx, kv, "K of a window", &s->k, err));
    KVQ_TRY(KVQ_NEW(s->ctx, kv, "V of a window", &s->v, err));
    KVQ_TRY(KVQ_NEW(s->ctx, gradients_copied ? kv : 0, "gradient of K", &s->dk, err));
    KVQ_TRY(KVQ_NEW(s->ctx, gradients_copied ? kv : 0, "gradient of V", &s->dv, err));
    if (s->observer->wants_rotated_keys) {
        KVQ_TRY(s->be->alloc(s->be, kv, "rotated keys", &s->rotated, err));
        KVQ_TRY(s->be->alloc(s->be, s->plan.gradients ? kv : 0, "rotated gradient", &s->d_rotated, err));
    }
    if (s->observer->wants_query) KVQ_TRY(KVQ_NEW(s->ctx, S * s->q_width, "Q of a window", &s->q, err));
done:
    return status;
}

static void release(sweep *s) {
    kvq_prefetch_drop(s->model); // a run that was stopped does not take what it asked for
    kvq_workspace_destroy(s->model, &s->ws);
    s->be->release(s->be, s->x);
    s->be->release(s->be, s->dx);
    s->be->release(s->be, s->rotated);
    s->be->release(s->be, s->d_rotated);
    float *host[] = {s->host_x, s->q, s->k, s->v, s->dk, s->dv};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) kvq_free(s->ctx, host[i]);
    kvq_free(s->ctx, s->nll);
    work_close(s->ctx, &s->work, false);
}

// Every rank has a directory of its own inside: ranks may see different disks.
static void folder_of(const kvq_sweep_options *options, const kvq_processes *p, char path[MAX_PATH]) {
    if (p->n_ranks == 1) {
        (void)snprintf(path, MAX_PATH, "%s", options->work_dir);
    } else {
        (void)snprintf(path, MAX_PATH, "%s/rank-%d", options->work_dir, p->rank);
    }
}

bool kvq_sweep_has_begun(const kvq_sweep_options *options, const kvq_processes *processes) {
    char path[MAX_PATH];
    folder_of(options, processes, path);
    return strlen(options->work_dir) < MAX_PATH - 64 && work_exists(path);
}

// One process keeps its files in the directory itself, several in folders inside: neither sees what the other left.
static kvq_status refuse_other_layout(const kvq_sweep_options *options, const kvq_processes *p, kvq_error *err) {
    char other[MAX_PATH];
    (void)snprintf(other, sizeof other, p->n_ranks == 1 ? "%.4000s/rank-0" : "%.4000s", options->work_dir);
    if (!work_exists(other)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_MISMATCH, "continue with as many processes, or choose another --work-dir",
                    "%s belongs to a run of %s", options->work_dir,
                    p->n_ranks == 1 ? "several processes" : "one process");
}

// Which part of the windows a directory belongs to is as much part of its identity as the settings.
static kvq_status open_work_dir(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *p,
                                bool restart, work_dir **out, kvq_error *err) {
    char       path[MAX_PATH];
    kvq_field *fields = NULL;
    int64_t    n = options->n_fingerprint;
    kvq_status status = KVQ_OK;
    if (strlen(options->work_dir) >= MAX_PATH - 64) {
        return kvq_fail(err, KVQ_ERR_USAGE, "choose a shorter --work-dir", "%.64s...: the path is too long",
                        options->work_dir);
    }
    folder_of(options, p, path);
    KVQ_TRY(refuse_other_layout(options, p, err));
    if (p->n_ranks > 1) KVQ_TRY(work_make_folder(options->work_dir, err));
    KVQ_TRY(KVQ_NEW(ctx, n + 1, "fingerprint", &fields, err));
    if (n > 0) memcpy(fields, options->fingerprint, (size_t)n * sizeof *fields);
    (void)snprintf(fields[n].name, sizeof fields[n].name, "part");
    (void)snprintf(fields[n].value, sizeof fields[n].value, "shard %lld of %lld, process %d of %d",
                   (long long)options->shard, (long long)options->n_shards, p->rank, p->n_ranks);
    KVQ_TRY(work_open(ctx, path, fields, n + 1, restart, out, err));
done:
    kvq_free(ctx, fields);
    return status;
}

static kvq_status open_work(sweep *s, kvq_error *err) {
    bool       restart = s->options->restart || s->observer->save == NULL;
    kvq_status status = open_work_dir(s->ctx, s->options, s->processes, restart, &s->work, err);
    if (status == KVQ_OK && work_stride(s->work) == 0) work_set_stride(s->work, s->options->stride);
    return status;
}

static kvq_status expect_equal(const sweep *s, int64_t value, const char *what, kvq_error *err) {
    int64_t    least = value, most = -value;
    kvq_status status = s->processes->agree(s->processes, value, &least, err);
    if (status == KVQ_OK) status = s->processes->agree(s->processes, -value, &most, err);
    if (status != KVQ_OK || least == -most) return status;
    return kvq_fail(err, KVQ_ERR_MISMATCH, "give all processes the same command, model, text and kind of processor",
                    "the processes of this run differ in %s", what);
}

// All processes must mean the same run, and the same steps: the sparsest plan is that of all.
static kvq_status agree_on_plan(sweep *s, kvq_error *err) {
    size_t     bytes = (size_t)s->options->n_fingerprint * sizeof *s->options->fingerprint;
    int64_t    hash = (int64_t)(kvq_checksum(s->options->fingerprint, bytes) >> 1), sparsest = 0;
    kvq_status status = KVQ_OK;
    KVQ_TRY(expect_equal(s, hash, "their inputs or settings", err));
    KVQ_TRY(s->processes->agree(s->processes, -work_stride(s->work), &sparsest, err));
    if (work_step(s->work) == 0) work_set_stride(s->work, -sparsest);
    KVQ_TRY(expect_equal(s, work_stride(s->work), "the layers that they recompute", err));
    s->plan.stride = work_stride(s->work);
    if (s->observer->save != NULL && work_step(s->work) == 0) status = work_commit(s->ctx, s->work, 0, err);
done:
    return status;
}

kvq_status kvq_sweep(const kvq_context *ctx, const kvq_backend *be, kvq_model *model, const kvq_windows *windows,
                     const kvq_sweep_options *options, const kvq_processes *processes, const kvq_observer *observer,
                     kvq_loss_sum *loss, kvq_error *err) {
    const kvq_model_config *c = kvq_model_describe(model);
    int64_t                 n_parts = options->n_shards * processes->n_ranks;
    int64_t                 part = options->shard * processes->n_ranks + processes->rank;
    sweep                   s = {.ctx = ctx,
                                 .be = be,
                                 .model = model,
                                 .config = c,
                                 .windows = windows,
                                 .options = options,
                                 .processes = processes,
                                 .observer = observer,
                                 .plan = {.n_layers = c->n_layers,
                                          .second_pass = observer->wants_second_pass,
                                          .gradients = observer->wants_gradients},
                                 .state_floats = windows->seq_len * c->hidden_size,
                                 .d = (int64_t)c->n_kv_heads * c->head_dim,
                                 .q_width = (int64_t)c->n_heads * c->head_dim,
                                 .n_windows = (windows->n_windows - part + n_parts - 1) / n_parts,
                                 .saved_at_s = kvq_now_s()};
    kvq_status              status = allocate(&s, err);
    if (status == KVQ_OK) status = open_work(&s, err);
    KVQ_TRY(agree(&s, -1, status, err));
    KVQ_TRY(agree(&s, -1, agree_on_plan(&s, err), err));
    int64_t first = work_step(s.work), agreed = first;
    int64_t end = options->forward_only ? step_first_after_forward(&s.plan) : step_count(&s.plan);
    KVQ_TRY(processes->agree(processes, first, &agreed, err));
    if (agreed > 0) {
        kvq_log(ctx, KVQ_LOG_INFO, "continues in %s: %lld of %lld steps were finished before", options->work_dir,
                (long long)agreed, (long long)end);
    }
    KVQ_TRY(agree(&s, -1, restore(&s, agreed, err), err));
    for (int64_t index = agreed; index < end; index++) KVQ_TRY(run_step(&s, index, err));
    *loss = s.loss;
done:
    release(&s);
    return status;
}

kvq_status sweep_open_results(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                              work_dir **out, kvq_error *err) {
    return open_work_dir(ctx, options, processes, false, out, err);
}

kvq_status kvq_sweep_set_result(const kvq_context *ctx, const kvq_sweep_options *options,
                                const kvq_processes *processes, const char result[KVQ_SHA256_HEX], kvq_error *err) {
    work_dir  *work = NULL;
    kvq_status status = open_work_dir(ctx, options, processes, false, &work, err);
    if (status != KVQ_OK) return status;
    work_set_result(work, result);
    status = work_commit(ctx, work, work_step(work), err);
    work_close(ctx, &work, false);
    return status;
}

static const char *note_name(char file[MAX_NAME], const char *name) {
    (void)snprintf(file, MAX_NAME, "kvq-note-%s", name);
    return file;
}

kvq_status kvq_sweep_note(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                          const char *name, const void *data, int64_t bytes, kvq_error *err) {
    work_dir  *work = NULL;
    char       file[MAX_NAME];
    kvq_blob   blob = {0};
    kvq_status status = KVQ_OK;
    KVQ_TRY(open_work_dir(ctx, options, processes, false, &work, err));
    KVQ_TRY(kvq_blob_append(ctx, &blob, data, bytes, err));
    KVQ_TRY(work_put(ctx, work, note_name(file, name), &blob, err));
    KVQ_TRY(work_commit(ctx, work, work_step(work), err));
done:
    kvq_blob_free(ctx, &blob);
    work_close(ctx, &work, false);
    return status;
}

kvq_status kvq_sweep_recall(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                            const char *name, void *data, int64_t bytes, bool *found, kvq_error *err) {
    work_dir  *work = NULL;
    char       file[MAX_NAME];
    kvq_blob   blob = {0};
    kvq_status status = KVQ_OK;
    KVQ_TRY(open_work_dir(ctx, options, processes, false, &work, err));
    KVQ_TRY(work_get(ctx, work, note_name(file, name), &blob, err));
    *found = blob.bytes == bytes;
    if (*found) memcpy(data, blob.data, (size_t)bytes);
done:
    kvq_blob_free(ctx, &blob);
    work_close(ctx, &work, false);
    return status;
}

kvq_status kvq_sweep_peek_result(const kvq_context *ctx, const kvq_sweep_options *options,
                                 const kvq_processes *processes, char result[KVQ_SHA256_HEX], kvq_error *err) {
    char path[MAX_PATH];
    folder_of(options, processes, path);
    return work_peek_result(ctx, path, result, err);
}

kvq_status kvq_sweep_forget(const kvq_context *ctx, const kvq_sweep_options *options, const kvq_processes *processes,
                            kvq_error *err) {
    work_dir  *work = NULL;
    int64_t    all = 0;
    kvq_status status = open_work_dir(ctx, options, processes, false, &work, err);
    if (status == KVQ_OK) work_close(ctx, &work, true);
    (void)processes->agree(processes, 0, &all, NULL); // then the folders of all processes are gone
    if (processes->n_ranks > 1 && processes->rank == 0) work_remove_folder(options->work_dir);
    return status;
}
