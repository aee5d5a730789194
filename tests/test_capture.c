// SPDX-License-Identifier: Apache-2.0
//
// Capture files: what was put comes back, equal captures are equal bytes, and what could not be read is not written.
// With --write-sample FILE and --read FILE it serves check_capture_h5py.py. Other programs' files and what must not be
// read: test_capture_refused.c.
#include <inttypes.h>
#include <unistd.h>

#include "limited_memory.h"
#include "sample_capture.h"

// ---------------------------------------------------------------- good files

START_TEST(everything_comes_back) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture     *c = NULL;
    kvq_capture_info info = sample_info();
    int32_t          ids[WINDOWS * TOKENS];
    info.type = _i == 0 ? KVQ_ARRAY_F32 : KVQ_ARRAY_F16;
    char *path = sample_path("a.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    ck_assert_int_eq(count_files(), 1);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    kvq_capture_info expected = info, found = *kvq_capture_describe(c);
    expected.dataset.baseline_nll = 2.0 / 3;
    expected.has_ids = true;
    ck_assert(memcmp(&found.model, &expected.model, sizeof found.model) == 0);
    ck_assert(memcmp(&found.tokenizer, &expected.tokenizer, sizeof found.tokenizer) == 0);
    ck_assert(memcmp(&found.dataset, &expected.dataset, sizeof found.dataset) == 0);
    ck_assert(memcmp(found.layers, expected.layers, sizeof found.layers) == 0);
    ck_assert(found.has_query && found.has_fisher && found.has_ids);
    ck_assert_int_eq(found.type, info.type);
    assert_all(c, _i == 1);
    kvq_test_ok(kvq_capture_read_ids(c, ids, &err), &err);
    for (int64_t i = 0; i < WINDOWS * TOKENS; i++) ck_assert_int_eq(ids[i], sample_id(i));
    kvq_capture_close(&ctx, &c);
    ck_assert_ptr_null(c);
}
END_TEST

START_TEST(parts_that_were_not_captured_are_named) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture     *c = NULL;
    kvq_capture_info info = sample_info();
    float            x[TOKENS * HEADS * DIM];
    int32_t          ids[WINDOWS * TOKENS];
    info.has_query = info.has_fisher = false;
    info.dataset.seq_len = TOKENS - 1; // without ids
    char *path = sample_path("a.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    const kvq_capture_info *found = kvq_capture_describe(c);
    ck_assert(!found->has_query && !found->has_fisher && !found->has_ids);
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_Q, 0, 0, x, &err), KVQ_ERR_INPUT, &err,
                    "a.kvqc.h5: /layers/000/q is missing");
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_FISHER_V, 2, 0, x, &err), KVQ_ERR_INPUT, &err,
                    "/layers/002/fisher_v is missing");
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_K, 1, 0, x, &err), KVQ_ERR_INPUT, &err, "/layers/001/k is missing");
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_K, LAYERS, 0, x, &err), KVQ_ERR_INPUT, &err, "is missing");
    kvq_test_failed(kvq_capture_read(c, KVQ_CAPTURE_K, 0, WINDOWS, x, &err), KVQ_ERR_INPUT, &err, "no window 2");
    kvq_test_failed(kvq_capture_read_ids(c, ids, &err), KVQ_ERR_INPUT, &err, "/dataset/token_ids is missing");
    kvq_capture_close(&ctx, &c);
}
END_TEST

// HDF5 stores times of the second unless told not to, hence the wait.
START_TEST(equal_captures_give_equal_bytes) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture_info info = sample_info();
    kvq_mapped_file  files[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        char *path = sample_path(i == 0 ? "first.kvqc.h5" : "second.kvqc.h5");
        kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
        kvq_test_ok(kvq_map_file(path, &files[i], &err), &err);
        (void)sleep(i == 0 ? 1 : 0);
    }
    ck_assert_uint_eq(files[0].bytes, files[1].bytes);
    ck_assert(memcmp(files[0].data, files[1].data, files[0].bytes) == 0);
    ck_assert_int_ge((int64_t)files[0].bytes, kvq_capture_bytes(&info));
    kvq_unmap_file(&files[0]);
    kvq_unmap_file(&files[1]);
}
END_TEST

// A window of more than one chunk, the last of which is not full. The plan's size is that of the file, up to the
// structures: they are a few bytes per chunk.
START_TEST(long_windows_are_cut_into_chunks) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture     *c = NULL;
    kvq_mapped_file  file = {0};
    kvq_capture_info info = sample_info();
    info.has_query = info.has_fisher = false;
    info.model.head_dim = 256;
    info.dataset.seq_len = 4001; // 8.2 MB of K
    char *path = sample_path("long.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    kvq_test_ok(kvq_capture_open(&ctx, path, &c, &err), &err);
    assert_all(c, false);
    kvq_capture_close(&ctx, &c);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    int64_t more = (int64_t)file.bytes - kvq_capture_bytes(&info);
    ck_assert_msg(more > 0 && more < 64 << 10, "%lld bytes more than planned", (long long)more);
    kvq_unmap_file(&file);
}
END_TEST

// ---------------------------------------------------------------- refusing to write

START_TEST(values_that_could_not_be_used_are_not_written) {
    static const struct {
        kvq_capture_part part;
        float            value;
        const char      *message;
    } BAD[] = {
        {KVQ_CAPTURE_K, (float)NAN, "/layers/002/k: window 1, position 3, channel 10 is "},
        {KVQ_CAPTURE_Q, (float)HUGE_VAL, "/layers/002/q: window 1, position 1, channel 22 is inf"},
        {KVQ_CAPTURE_V, 65520.0f, "/layers/002/v: window 1, position 3, channel 10 is 65520, more than f16 holds"},
        {KVQ_CAPTURE_FISHER_K, -0.5f, "fisher_k: window 1, position 3, channel 10 is -0.5, although a square"},
    };
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_capture_writer *w = NULL;
    kvq_capture_info    info = sample_info();
    float               x[TOKENS * HEADS * DIM] = {0};
    info.type = KVQ_ARRAY_F16;
    kvq_test_ok(kvq_capture_create(&ctx, sample_path("a.kvqc.h5"), false, &info, NULL, &w, &err), &err);
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        x[46] = BAD[i].value;
        kvq_test_failed(kvq_capture_put(w, BAD[i].part, 2, 1, x, &err), KVQ_ERR_NUMERICAL, &err, BAD[i].message);
    }
    x[46] = 65519.0f; // rounds to 65504
    kvq_test_ok(kvq_capture_put(w, KVQ_CAPTURE_V, 2, 1, x, &err), &err);
    kvq_capture_discard(&ctx, &w);
    ck_assert_ptr_null(w);
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

START_TEST(an_incomplete_capture_is_not_committed) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_capture_writer *w = NULL;
    kvq_capture_info    info = sample_info();
    float               x[TOKENS * HEADS * DIM] = {0};
    kvq_test_ok(kvq_capture_create(&ctx, sample_path("a.kvqc.h5"), false, &info, NULL, &w, &err), &err);
    kvq_test_failed(kvq_capture_put(w, KVQ_CAPTURE_K, 1, 0, x, &err), KVQ_ERR_INTERNAL, &err,
                    "layer 1, k, window 0 has no place");
    kvq_test_failed(kvq_capture_put(w, KVQ_CAPTURE_K, 0, WINDOWS, x, &err), KVQ_ERR_INTERNAL, &err, "window 2");
    for (int64_t i = 0; i < WINDOWS; i++) kvq_test_ok(kvq_capture_put(w, KVQ_CAPTURE_K, 0, i, x, &err), &err);
    kvq_test_ok(kvq_capture_put(w, KVQ_CAPTURE_V, 0, 0, x, &err), &err);
    kvq_test_failed(kvq_capture_commit(&ctx, &w, 0, &err), KVQ_ERR_INTERNAL, &err,
                    "/layers/000/v: window 1 was never captured");
    ck_assert_ptr_null(w);
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

START_TEST(an_existing_file_needs_force) {
    kvq_context         ctx = kvq_test_context();
    kvq_error           err = {0};
    kvq_capture_writer *w = NULL;
    kvq_capture_info    info = sample_info();
    char               *path = sample_path("a.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    kvq_test_failed(kvq_capture_create(&ctx, path, false, &info, NULL, &w, &err), KVQ_ERR_EXISTS, &err, "a.kvqc.h5");
    ck_assert_ptr_null(w);
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    ck_assert_int_eq(count_files(), 1);
}
END_TEST

static void ask_many_layers(kvq_capture_info *i) { i->model.n_layers = 1001; }
static void ask_no_layers(kvq_capture_info *i) { memset(i->layers, 0, sizeof i->layers); }
static void ask_f64(kvq_capture_info *i) { i->type = KVQ_ARRAY_F64; }
static void ask_no_heads(kvq_capture_info *i) { i->model.n_heads = 0; }
static void ask_no_windows(kvq_capture_info *i) { i->dataset.n_windows = 0; }
static void ask_wide(kvq_capture_info *i) { i->model.n_heads = 65534; }
static void ask_bad_hash(kvq_capture_info *i) { i->tokenizer.sha256[3] = 'X'; }
static void ask_nan(kvq_capture_info *i) { i->model.rope_theta = (double)NAN; }

START_TEST(what_could_not_be_read_back_is_not_written) {
    static const struct {
        void (*ask)(kvq_capture_info *info);
        kvq_status  status;
        const char *message;
    } ASKED[] = {
        {ask_many_layers, KVQ_ERR_INPUT, "/model@n_layers is 1001"},
        {ask_no_layers, KVQ_ERR_USAGE, "0 layers"},
        {ask_f64, KVQ_ERR_USAGE, "not f64"},
        {ask_no_heads, KVQ_ERR_INPUT, "/model@n_heads is missing"},
        {ask_no_windows, KVQ_ERR_USAGE, "0 windows"},
        {ask_wide, KVQ_ERR_UNSUPPORTED, "65534 heads of 6 channels"},
        {ask_bad_hash, KVQ_ERR_INPUT, "/tokenizer@sha256"},
        {ask_nan, KVQ_ERR_NUMERICAL, "/model@rope_theta is"},
    };
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    for (size_t i = 0; i < sizeof ASKED / sizeof *ASKED; i++) {
        kvq_capture_info    info = sample_info();
        kvq_capture_writer *w = NULL;
        ASKED[i].ask(&info);
        kvq_test_failed(kvq_capture_create(&ctx, sample_path("a.kvqc.h5"), false, &info, NULL, &w, &err),
                        ASKED[i].status, &err, ASKED[i].message);
        ck_assert_ptr_null(w);
    }
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

// HDF5 1.10.8 would crash at exit if it knew that its file could not be completed.
START_TEST(a_full_disk_is_an_error_at_every_size) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture_info info = sample_info();
    kvq_mapped_file  file = {0};
    char            *path = sample_path("full.kvqc.h5");
    kvq_test_ok(write_capture(&ctx, path, &info, &err), &err);
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    size_t bytes = file.bytes;
    kvq_unmap_file(&file);
    ck_assert_int_eq(unlink(path), 0);
    for (size_t limit = 0; limit < bytes; limit += 1 + bytes / 23) {
        kvq_test_limit_files(limit);
        kvq_status status = write_capture(&ctx, path, &info, &err);
        kvq_test_limit_files(KVQ_TEST_NO_LIMIT);
        kvq_test_failed(status, KVQ_ERR_DISK, &err, "full.kvqc.h5: ");
        ck_assert_ptr_nonnull(strstr(err.message, "File too large"));
        ck_assert_int_eq(count_files(), 0);
    }
}
END_TEST

static kvq_status write_and_read(const kvq_context *ctx, const char *path, kvq_error *err) {
    kvq_status       status = KVQ_OK;
    kvq_capture     *c = NULL;
    kvq_capture_info info = sample_info();
    info.type = KVQ_ARRAY_F16; // needs most buffers
    KVQ_TRY(write_capture(ctx, path, &info, err));
    KVQ_TRY(kvq_capture_open(ctx, path, &c, err));
done:
    kvq_capture_close(ctx, &c);
    return status;
}

START_TEST(every_allocation_may_fail) {
    limited_memory memory = {.inner = kvq_test_context()};
    kvq_context    ctx = limited_context(&memory);
    kvq_error      err = {0};
    char          *path = sample_path("a.kvqc.h5");
    kvq_status     status = KVQ_ERR_MEMORY;
    int64_t        n = 0;
    for (; status != KVQ_OK && n < 1000; n++) {
        memory.left = n;
        status = write_and_read(&ctx, path, &err);
        if (status != KVQ_OK) ck_assert_int_eq(status, KVQ_ERR_MEMORY);
        ck_assert_int_eq(memory.n_live, 0);
    }
    kvq_test_ok(status, &err);
    ck_assert_int_gt(n, 10);
    ck_assert_int_eq(count_files(), 1);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(everything_comes_back, 2),
    KVQ_CASE(parts_that_were_not_captured_are_named),
    KVQ_CASE(equal_captures_give_equal_bytes),
    KVQ_CASE(long_windows_are_cut_into_chunks),
    KVQ_CASE(values_that_could_not_be_used_are_not_written),
    KVQ_CASE(an_incomplete_capture_is_not_committed),
    KVQ_CASE(an_existing_file_needs_force),
    KVQ_CASE(what_could_not_be_read_back_is_not_written),
    KVQ_CASE(a_full_disk_is_an_error_at_every_size),
    KVQ_CASE(every_allocation_may_fail),
};

// ---------------------------------------------------------------- for check_capture_h5py.py

static int complain(const kvq_error *err) {
    (void)fprintf(stderr, "%s\n", err->message);
    return 1;
}

// One line per window: layer, part, window, and the sum of its values in f64.
static int print_sums(const kvq_context *ctx, const char *path) {
    kvq_capture *c = NULL;
    kvq_error    err = {0};
    if (kvq_capture_open(ctx, path, &c, &err) != KVQ_OK) return complain(&err);
    const kvq_capture_info *info = kvq_capture_describe(c);
    int64_t heads = info->model.n_heads > info->model.n_kv_heads ? info->model.n_heads : info->model.n_kv_heads;
    float  *x = malloc((size_t)(info->dataset.seq_len * heads * info->model.head_dim) * sizeof *x);
    for (int64_t i = 0; i < info->model.n_layers * info->dataset.n_windows * KVQ_CAPTURE_N_PARTS; i++) {
        kvq_capture_part part = (kvq_capture_part)(i % KVQ_CAPTURE_N_PARTS);
        int64_t          window = i / KVQ_CAPTURE_N_PARTS % info->dataset.n_windows;
        int64_t          layer = i / KVQ_CAPTURE_N_PARTS / info->dataset.n_windows;
        double           sum = 0;
        if (!kvq_capture_has_layer(info, layer) || !has_part(info, part)) continue;
        if (kvq_capture_read(c, part, layer, window, x, &err) != KVQ_OK) return complain(&err);
        int64_t n = info->dataset.seq_len * info->model.head_dim *
                    (part == KVQ_CAPTURE_Q ? info->model.n_heads : info->model.n_kv_heads);
        for (int64_t k = 0; k < n; k++) sum += (double)x[k];
        printf("%" PRId64 " %s %" PRId64 " %.17g\n", layer, kvq_capture_part_names[part], window, sum);
    }
    free(x);
    kvq_capture_close(ctx, &c);
    return 0;
}

int main(int argc, char **argv) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_capture_info info = sample_info();
    if (argc == 3 && strcmp(argv[1], "--write-sample") == 0)
        return write_capture(&ctx, argv[2], &info, &err) == KVQ_OK ? 0 : complain(&err);
    if (argc == 3 && strcmp(argv[1], "--read") == 0) return print_sums(&ctx, argv[2]);
    return kvq_test_run("capture", CASES, (int)(sizeof CASES / sizeof *CASES));
}
