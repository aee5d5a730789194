// SPDX-License-Identifier: Apache-2.0
//
// kvq-capture: a checkpoint and a text in, keys and values of its layers out, as a file that any program can read.
#include <stdio.h>
#include <string.h>

#include "kvq_cli.h"
#include "kvq_fisher.h"

static const char *const    DTYPE_NAMES[] = {"f32", "f16", NULL};
static const kvq_array_type DTYPES[] = {KVQ_ARRAY_F32, KVQ_ARRAY_F16};

typedef struct capture_options {
    kvq_cli_common common;
    kvq_cli_source source;
    const char    *model, *output, *work_dir, *layers;
    int64_t        samples, seq_len;
    kvq_cli_seed   seed;
    int            dtype;
    kvq_cli_engine engine;
    bool           with_query, with_fisher, force, dry_run;
} capture_options;

#define AT(field) offsetof(capture_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "Hugging Face directory (safetensors) or one GGUF file"},
    CLI_TEXT_ROWS,
    CLI_WINDOW_ROWS,
    {"layers", 0, CLI_TEXT, AT(layers), "LIST", .help = "which layers, from 0, as 0-3,7 (all)"},
    {"with-query", 0, CLI_FLAG, AT(with_query), NULL, .help = "also the queries before RoPE"},
    {"with-fisher", 0, CLI_FLAG, AT(with_fisher), NULL,
     .help = "also the squared gradients of the loss, which a weighted fit needs"},
    {"dtype", 0, CLI_CHOICE, AT(dtype), "TYPE",
     .help = "how K, V and Q are stored: f32 (default) or f16; squared gradients are always f32",
     .choices = DTYPE_NAMES},
    CLI_ENGINE_ROWS,
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "changes speed, never a result (one per core)",
     .min = 1, .max = KVQ_MAX_THREADS},
    {"work-dir", 0, CLI_TEXT, AT(work_dir), "DIR", .help = "scratch, removed at the end (OUT.work)"},
    {"dry-run", 'n', CLI_FLAG, AT(dry_run), NULL, .help = "print the plan, write nothing"},
    {"force", 'f', CLI_FLAG, AT(force), NULL, .help = "replace an existing output"},
    {"output", 'o', CLI_TEXT, AT(output), "OUT.kvqc.h5", .help = "the capture to write"},
};
#undef AT

typedef struct capture_run {
    const capture_options  *o;
    char                    work_dir[CLI_MAX_PATH];
    kvq_checkpoint         *checkpoint;
    kvq_checkpoint_identity identity;
    kvq_backend            *be;
    kvq_model              *model;
    kvq_windows             windows;
    kvq_cli_tokenizer       tokenizer;
    kvq_calib_plan          plan;
    kvq_capture_info        info;
    kvq_capture_writer     *writer;
    float                  *fisher; // [S, d]
    double                  start_s;
} capture_run;

// ---------------------------------------------------------------- options

static kvq_status check_options(const capture_options *o, kvq_error *err) {
    if (o->model == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--model is missing");
    if (o->output == NULL) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--output (-o) is missing");
    return kvq_cli_source_check(&o->source, err);
}

// "0-3,7" into bits; NULL = all layers.
static kvq_status read_layers(const char *list, int64_t n_layers, kvq_capture_info *info, kvq_error *err) {
    char whole[32];
    (void)snprintf(whole, sizeof whole, "0-%lld", (long long)n_layers - 1);
    for (const char *at = list != NULL ? list : whole; at != NULL;) {
        long long first = -1, last = -1;
        int       end = 0, end_of_range = 0;
        int       n = sscanf(at, "%9lld%n-%9lld%n", &first, &end, &last, &end_of_range);
        if (n == 2) end = end_of_range;
        if (n == 1) last = first;
        if (n < 1 || first < 0 || last < first || (at[end] != ',' && at[end] != 0)) {
            return kvq_fail(err, KVQ_ERR_USAGE, "give numbers and ranges, as 0-3,7", "--layers: '%s' is not a list",
                            list);
        }
        if (last >= n_layers || last >= KVQ_CAPTURE_MAX_LAYERS) {
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--layers: there is no layer %lld; the model has 0 to %lld", last,
                            (long long)n_layers - 1);
        }
        for (int64_t layer = first; layer <= last; layer++) kvq_capture_add_layer(info, layer);
        at = at[end] == ',' ? at + end + 1 : NULL;
    }
    return KVQ_OK;
}

// ---------------------------------------------------------------- preparations

static void describe_model(capture_run *r) {
    const kvq_model_config *c = kvq_checkpoint_config(r->checkpoint);
    kvq_capture_info       *i = &r->info;
    (void)snprintf(i->model.architecture, sizeof i->model.architecture, "%s", c->architecture);
    (void)snprintf(i->model.name, sizeof i->model.name, "%s", r->identity.name);
    (void)snprintf(i->model.rope_type, sizeof i->model.rope_type, "%s", kvq_rope_type_name(c->rope.type));
    (void)snprintf(i->model.dtype, sizeof i->model.dtype, "%s", r->identity.dtype);
    memcpy(i->model.config_sha256, r->identity.config_sha256, sizeof i->model.config_sha256);
    memcpy(i->model.weights_sha256, r->identity.weights_sha256, sizeof i->model.weights_sha256);
    i->model.n_layers = c->n_layers;
    i->model.n_heads = c->n_heads;
    i->model.n_kv_heads = c->n_kv_heads;
    i->model.head_dim = c->head_dim;
    i->model.hidden_size = c->hidden_size;
    i->model.vocab_size = c->vocab_size;
    i->model.n_tensors = r->identity.n_tensors;
    i->model.rope_theta = c->rope.theta;
}

static void describe_windows(capture_run *r) {
    kvq_capture_info *i = &r->info;
    (void)snprintf(i->tokenizer.kind, sizeof i->tokenizer.kind, "%s", r->tokenizer.kind);
    memcpy(i->tokenizer.sha256, r->tokenizer.sha256, sizeof i->tokenizer.sha256);
    i->tokenizer.bos_added = r->windows.bos_added;
    (void)snprintf(i->dataset.source, sizeof i->dataset.source, "%s", r->windows.source);
    memcpy(i->dataset.source_sha256, r->windows.source_sha256, sizeof i->dataset.source_sha256);
    i->dataset.n_available_tokens = r->windows.n_available;
}

static kvq_status open_model(kvq_cli *cli, capture_run *r, kvq_error *err) {
    kvq_status             status = KVQ_OK;
    const capture_options *o = r->o;
    KVQ_TRY(kvq_checkpoint_open(&cli->ctx, o->model, &r->checkpoint, err));
    const kvq_model_config *config = kvq_checkpoint_config(r->checkpoint);
    cli->n_layers = config->n_layers;
    KVQ_TRY(read_layers(o->layers, config->n_layers, &r->info, err));
    KVQ_TRY(kvq_cli_seq_len(cli, config, o->seq_len, CLI_DEFAULT_SEQ_LEN, &r->info.dataset.seq_len, err));
    KVQ_TRY(kvq_checkpoint_identify(&cli->ctx, r->checkpoint, &r->identity, err));
    KVQ_TRY(kvq_cli_backend(cli, &o->engine, &r->be, err));
    KVQ_TRY(kvq_model_create(&cli->ctx, r->be, r->checkpoint, false, &r->model, err));
    describe_model(r);
    r->info.dataset.n_windows = o->samples;
    r->info.dataset.seed = o->seed.value;
    r->info.has_query = o->with_query;
    r->info.has_fisher = o->with_fisher;
    r->info.has_ids = true;
    r->info.type = DTYPES[o->dtype];
done:
    return status;
}

// The sweeps are those of a calibration; its statistics are not kept here. A disk that is too small for the capture is
// found before hours are spent on filling it; the work directory makes do with what is left.
static kvq_status make_plan(kvq_cli *cli, capture_run *r, kvq_error *err) {
    kvq_measure_options options = {.n_fractions = 1, .weightings = KVQ_WEIGHTINGS_BASIC};
    kvq_calib_limits    limits = {0, 0};
    double              free_bytes = kvq_cli_free_bytes(r->o->output), bytes = (double)kvq_capture_bytes(&r->info);
    char                needed[32], available[32];
    if (free_bytes >= 0 && free_bytes < bytes) {
        kvq_cli_format_bytes(bytes, needed, sizeof needed);
        kvq_cli_format_bytes(free_bytes, available, sizeof available);
        return kvq_fail(err, KVQ_ERR_DISK, "capture fewer layers or windows, or with --dtype f16",
                        "%s: the capture needs %s, but %s are free", r->o->output, needed, available);
    }
    if (r->o->with_fisher) options.weightings |= 1u << KVQ_WEIGHT_FISHER;
    if (free_bytes > bytes && r->o->work_dir == NULL) limits.scratch_bytes = (int64_t)(free_bytes - bytes);
    return kvq_calib_plan_make(&cli->ctx, r->model, &options, r->o->samples, r->info.dataset.seq_len, 1, limits,
                               &r->plan, err);
}

static void print_plan(kvq_cli *cli, const capture_run *r) {
    const kvq_model_config *c = kvq_checkpoint_config(r->checkpoint);
    const capture_options  *o = r->o;
    char                    size[32], scratch[32], memory[32], compute[CLI_COMPUTE_TEXT];
    int64_t                 n_layers = 0;
    for (int64_t layer = 0; layer < c->n_layers; layer++) n_layers += kvq_capture_has_layer(&r->info, layer);
    kvq_cli_format_bytes((double)kvq_capture_bytes(&r->info), size, sizeof size);
    kvq_cli_format_bytes((double)r->plan.scratch_bytes, scratch, sizeof scratch);
    kvq_cli_format_bytes((double)(r->plan.memory_bytes - r->plan.statistics_bytes), memory, sizeof memory);
    kvq_cli_say(cli, "model      %s  %s  %lld layers  %d KV heads x %d", r->identity.name, c->architecture,
                (long long)c->n_layers, c->n_kv_heads, c->head_dim);
    kvq_cli_say(cli, "windows    %lld x %lld tokens  seed %llu", (long long)o->samples,
                (long long)r->info.dataset.seq_len, (unsigned long long)o->seed.value);
    if (r->windows.ids != NULL) {
        kvq_cli_say(cli, "text       %s  %lld tokens available  tokenizer %s  BOS %s", r->windows.source,
                    (long long)r->windows.n_available, r->tokenizer.kind, r->windows.bos_added ? "added" : "not added");
    }
    kvq_cli_say(cli, "captures   %lld layers  K V%s as %s%s", (long long)n_layers, o->with_query ? " Q" : "",
                DTYPE_NAMES[o->dtype], o->with_fisher ? "  squared gradients as f32" : "");
    kvq_cli_compute_text(cli, r->be, compute);
    kvq_cli_say(cli, "compute    %s", compute);
    kvq_cli_say(cli, "memory     peak about %s", memory);
    kvq_cli_say(cli, "disk       %s in %s, at most %s in %s", size, o->output, scratch, r->work_dir);
}

static kvq_status find_windows(kvq_cli *cli, capture_run *r, kvq_error *err) {
    const capture_options *o = r->o;
    kvq_cli_window_request request = {
        .n_windows = o->samples, .seed = o->seed.value, .drawn = true, .seq_len = r->info.dataset.seq_len};
    return kvq_cli_windows(cli, r->be, r->checkpoint, o->model, &o->source, &request, &r->windows, &r->tokenizer, err);
}

// A capture cannot go on where another run stopped: it would empty the directory.
static kvq_status check_work_dir(const capture_run *r, kvq_error *err) {
    kvq_processes     alone = kvq_processes_single();
    kvq_sweep_options options = {.work_dir = r->work_dir, .n_shards = 1};
    if (r->o->work_dir == NULL || !kvq_sweep_has_begun(&options, &alone)) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_EXISTS, "choose another directory, or remove it when that run is not needed any more",
                    "--work-dir %s: holds what an unfinished run needs to continue", r->work_dir);
}

// Everything opened and checked, the windows known, the plan printed.
static kvq_status prepare(kvq_cli *cli, capture_run *r, kvq_error *err) {
    kvq_status             status = KVQ_OK;
    const capture_options *o = r->o;
    bool                   self = kvq_cli_is_self(&o->source);
    const char            *inputs[CLI_SOURCE_FILES + 1] = {NULL};
    kvq_cli_source_files(&o->source, inputs);
    inputs[CLI_SOURCE_FILES] = o->model;
    KVQ_TRY(kvq_cli_check_output(cli, o->output, o->force, inputs, CLI_COUNT_OF(inputs), err));
    KVQ_TRY(check_work_dir(r, err));
    KVQ_TRY(open_model(cli, r, err));
    KVQ_TRY(make_plan(cli, r, err));
    // a text is read before the plan, which says how much there is; writing one takes long, so it comes after
    if (!self) KVQ_TRY(find_windows(cli, r, err));
    print_plan(cli, r);
    if (!self)
        KVQ_TRY(kvq_cli_check_bos(cli, r->be, r->model, &o->source, &r->windows, &r->tokenizer, o->dry_run, err));
    if (self && !o->dry_run) KVQ_TRY(find_windows(cli, r, err));
done:
    return status;
}

// ---------------------------------------------------------------- watching the sweeps

static kvq_status put(capture_run *r, kvq_capture_part part, int64_t layer, int64_t window, const float *x,
                      kvq_error *err) {
    return kvq_capture_put(r->writer, part, layer, window, x, err);
}

static kvq_status put_squares(capture_run *r, kvq_capture_part part, int64_t layer, int64_t window,
                              const float *gradient, kvq_error *err) {
    int64_t n = r->info.dataset.seq_len * r->info.model.n_kv_heads * r->info.model.head_dim;
    kvq_fisher_diagonal(gradient, n, r->fisher);
    return put(r, part, layer, window, r->fisher, err);
}

static kvq_status see_begin(void *user, kvq_pass pass, int64_t layer, kvq_error *err) {
    (void)user, (void)pass, (void)layer, (void)err;
    return KVQ_OK;
}

static kvq_status see_window(void *user, kvq_pass pass, int64_t layer, const kvq_seen *seen, kvq_error *err) {
    capture_run *r = user;
    kvq_status   status = KVQ_OK;
    if (!kvq_capture_has_layer(&r->info, layer)) return KVQ_OK;
    if (pass == KVQ_PASS_BACKWARD) {
        KVQ_TRY(put_squares(r, KVQ_CAPTURE_FISHER_K, layer, seen->window, seen->dk, err));
        KVQ_TRY(put_squares(r, KVQ_CAPTURE_FISHER_V, layer, seen->window, seen->dv, err));
        goto done;
    }
    KVQ_TRY(put(r, KVQ_CAPTURE_K, layer, seen->window, seen->k, err));
    KVQ_TRY(put(r, KVQ_CAPTURE_V, layer, seen->window, seen->v, err));
    if (r->o->with_query) KVQ_TRY(put(r, KVQ_CAPTURE_Q, layer, seen->window, seen->q, err));
done:
    return status;
}

static kvq_status see_finish(void *user, kvq_pass pass, int64_t layer, kvq_blob *result, kvq_error *err) {
    (void)user, (void)pass, (void)layer, (void)result, (void)err;
    return KVQ_OK;
}

// ---------------------------------------------------------------- the run

// Half a capture is no use, so a stopped run keeps nothing.
static kvq_status sweep(kvq_cli *cli, capture_run *r, kvq_error *err) {
    kvq_status        status = KVQ_OK;
    kvq_processes     alone = kvq_processes_single();
    kvq_loss_sum      loss = {{0, 0}, 0};
    kvq_sweep_options options = {
        .work_dir = r->work_dir, .n_shards = 1, .stride = r->plan.stride, .prefetch = r->plan.prefetch};
    kvq_observer observer = {.user = r,
                             .wants_query = r->o->with_query,
                             .wants_second_pass = r->o->with_fisher,
                             .wants_gradients = r->o->with_fisher,
                             .begin = see_begin,
                             .window = see_window,
                             .finish = see_finish};
    status = kvq_sweep(&cli->ctx, r->be, r->model, &r->windows, &options, &alone, &observer, &loss, err);
    (void)kvq_sweep_forget(&cli->ctx, &options, &alone, NULL); // whatever happened, nothing of it is needed
    if (status == KVQ_ERR_INTERRUPTED) {
        return kvq_fail(err, status, "run the same command again", "%s was not written; a capture starts anew",
                        r->o->output);
    }
    if (status != KVQ_OK) return status;
    // without a second pass the head is not run, and the loss is not known
    double nll = loss.n_tokens > 0 ? kvq_fixed_to_double(loss.sum) / (double)loss.n_tokens : 0;
    return kvq_capture_commit(&cli->ctx, &r->writer, nll, err);
}

static kvq_status print_summary(kvq_cli *cli, const capture_run *r, kvq_error *err) {
    kvq_mapped_file file;
    char            size[32], seconds[32];
    kvq_status      status = kvq_map_file(r->o->output, &file, err);
    if (status != KVQ_OK) return status;
    kvq_cli_format_bytes((double)file.bytes, size, sizeof size);
    kvq_unmap_file(&file);
    kvq_cli_format_seconds(kvq_now_s() - r->start_s, seconds, sizeof seconds);
    printf("wrote %s  %s  %s\n", r->o->output, size, seconds);
    if (r->o->with_fisher) {
        kvq_cli_next(cli, "kvq-calibrate", "--capture", r->o->output, "-o", "OUT.kvq.h5", NULL);
    } else {
        kvq_cli_next(cli, "kvq-calibrate", "--capture", r->o->output, "--weighting", "none", "-o", "OUT.kvq.h5", NULL);
    }
    return KVQ_OK;
}

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    kvq_status  status = KVQ_OK;
    capture_run r = {.o = options, .start_s = kvq_now_s()};
    (void)exit_code; // a capture has no negative verdict
    KVQ_TRY(check_options(r.o, err));
    KVQ_TRY(kvq_cli_work_dir(r.o->work_dir, r.o->output, r.work_dir, err));
    KVQ_TRY(prepare(cli, &r, err));
    if (r.o->dry_run) {
        kvq_cli_say(cli, "would write %s; nothing was written", r.o->output);
        goto done;
    }
    describe_windows(&r);
    int64_t n = r.info.dataset.seq_len * r.info.model.n_kv_heads * r.info.model.head_dim;
    if (r.o->with_fisher) KVQ_TRY(KVQ_NEW(&cli->ctx, n, "squared gradients of a window", &r.fisher, err));
    KVQ_TRY(kvq_capture_create(&cli->ctx, r.o->output, r.o->force, &r.info, r.windows.ids, &r.writer, err));
    KVQ_TRY(sweep(cli, &r, err));
    KVQ_TRY(print_summary(cli, &r, err));
done:
    kvq_capture_discard(&cli->ctx, &r.writer);
    kvq_free(&cli->ctx, r.fisher);
    kvq_windows_free(&cli->ctx, &r.windows);
    kvq_model_destroy(&cli->ctx, &r.model);
    if (r.be != NULL) r.be->destroy(&r.be);
    kvq_checkpoint_close(&cli->ctx, &r.checkpoint);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-capture",
    .summary =
        "Writes the keys before RoPE and the values of a model over a text into a file that any program can read.",
    .synopsis = "--model PATH --text FILE|self [--samples N] [--seq-len S] [--seed X]\n"
                "    [--layers LIST] [--with-query] [--with-fisher] [--dtype f32|f16]\n"
                "    [--threads N] [--force] -o OUT.kvqc.h5\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes =
        "The file is HDF5; docs/format.md describes it. kvq-calibrate --capture fits from it without the model.\n\n"
        "examples:\n"
        "  kvq-capture --model model.gguf --text wiki.train.raw --with-fisher -o m.kvqc.h5\n"
        "  kvq-capture --model llama-3.1-8b --text wiki.train.raw --layers 0,15-16 --with-query -o some.kvqc.h5\n",
    .can_stop = true,
    .run = run,
};

int main(int argc, char **argv) {
    capture_options options = {.samples = CLI_USUAL_SAMPLES};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
