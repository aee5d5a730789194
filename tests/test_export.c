// SPDX-License-Identifier: Apache-2.0
// Exports: every number survives exactly, equal artifacts give equal bytes, and a check believes no changed file.
#include <cjson/cJSON.h>
#include <ctype.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "export.h"
#include "kvq_test.h"
#include "limited_memory.h"
#include "sample_artifact.h"

#define HASH "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

static const char *out_path(void) {
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/export.out", kvq_test_folder());
    return path;
}

static const kvq_export_target *target_number(int i) {
    int                      n = 0;
    const kvq_export_target *targets = kvq_export_targets(&n);
    ck_assert_int_lt(i, n);
    return &targets[i];
}

#define N_TARGETS 2

// Loops over targets and schemes: the target is _i % N_TARGETS, the scheme _i / N_TARGETS.
#define N_BOTH (2 * N_TARGETS)
static kvq_artifact *sample_number(const kvq_context *ctx, int i, int64_t n_layers) {
    return i < N_TARGETS ? sample_artifact(ctx, n_layers) : sample_alloc_artifact(ctx, n_layers);
}

typedef struct content {
    char  *data; // with a zero behind it
    size_t bytes;
} content;

static content read_file(const char *path) {
    kvq_mapped_file file = {0};
    kvq_error       err = {0};
    kvq_test_ok(kvq_map_file(path, &file, &err), &err);
    content c = {calloc(1, file.bytes + 1), file.bytes};
    memcpy(c.data, file.data, file.bytes);
    kvq_unmap_file(&file);
    return c;
}

// Writes the sample of two layers and gives the file's content.
static content exported(const kvq_export_target *target, const kvq_artifact *a) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_test_ok(target->write(&ctx, a, HASH, out_path(), true, &err), &err);
    return read_file(out_path());
}

static kvq_status check_bytes(const kvq_export_target *target, const kvq_artifact *a, const char *data, size_t bytes,
                              kvq_error *err) {
    kvq_context ctx = kvq_test_context();
    double      max_error = -1;
    (void)unlink(out_path());
    FILE *file = fopen(out_path(), "wb"); // a new file each time, unsynced: thousands of syncs take a minute
    ck_assert(file != NULL && fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0);
    kvq_status status = target->check(&ctx, a, HASH, out_path(), &max_error, err);
    ck_assert(max_error == (status == KVQ_OK ? 0 : -1));
    return status;
}

START_TEST(the_table_finds_its_targets) {
    int                      n = 0;
    const kvq_export_target *targets = kvq_export_targets(&n);
    ck_assert_int_eq(n, N_TARGETS);
    for (int i = 0; i < n; i++) ck_assert_ptr_eq(kvq_export_find(targets[i].name), &targets[i]);
    ck_assert_ptr_null(kvq_export_find("gguf"));
}
END_TEST

START_TEST(a_fresh_export_passes_its_check_and_is_reproducible) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i % N_TARGETS);
    kvq_artifact            *a = sample_number(&ctx, _i, 12);
    content                  first = exported(target, a), second = exported(target, a);
    ck_assert(first.bytes == second.bytes && memcmp(first.data, second.data, first.bytes) == 0);
    kvq_test_ok(check_bytes(target, a, first.data, first.bytes, &err), &err);
    kvq_test_failed(target->write(&ctx, a, HASH, out_path(), false, &err), KVQ_ERR_EXISTS, &err, "export.out");
    ck_assert_int_eq(unlink(out_path()), 0);
    double max_error;
    kvq_test_failed(target->check(&ctx, a, HASH, out_path(), &max_error, &err), KVQ_ERR_NOT_FOUND, &err, "export.out");
    free(first.data);
    free(second.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// ---------------------------------------------------------------- json, read with cJSON alone

static const cJSON *item(const cJSON *object, const char *key) {
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(object, key);
    ck_assert_msg(found != NULL, "no %s", key);
    return found;
}

static void assert_json_floats(const cJSON *rows, const float *x, int n_rows, int n_columns) {
    ck_assert_int_eq(cJSON_GetArraySize(rows), n_rows);
    for (int i = 0; i < n_rows; i++) {
        const cJSON *row = cJSON_GetArrayItem(rows, i);
        ck_assert_int_eq(cJSON_GetArraySize(row), n_columns);
        for (int k = 0; k < n_columns; k++) {
            float read = (float)cJSON_GetArrayItem(row, k)->valuedouble;
            ck_assert_uint_eq(kvq_bits_of_float(read), kvq_bits_of_float(x[i * n_columns + k]));
        }
    }
}

START_TEST(json_holds_every_number) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a = sample_artifact(&ctx, 3);
    content       c = exported(kvq_export_find("json"), a);
    cJSON        *root = cJSON_Parse(c.data);
    ck_assert_str_eq(item(root, "schema")->valuestring, "kvq.artifact/1");
    ck_assert_str_eq(item(root, "content_sha256")->valuestring, HASH);
    ck_assert_str_eq(item(item(root, "model"), "name")->valuestring, a->model.name);
    ck_assert_str_eq(item(item(root, "dataset"), "source")->valuestring, a->dataset.source);
    ck_assert_str_eq(item(item(root, "dataset"), "seed")->valuestring, "18446744073709551608");
    ck_assert(item(item(root, "dataset"), "baseline_nll")->valuedouble == a->baseline_nll);
    ck_assert(item(item(root, "model"), "rope_theta")->valuedouble == a->model.rope_theta);
    ck_assert_str_eq(item(item(root, "provenance"), "options_json")->valuestring, a->provenance.options_json);
    const cJSON *layers = item(root, "layers");
    ck_assert_int_eq(cJSON_GetArraySize(layers), 3);
    for (int layer = 0; layer < 3; layer++) {
        const kvq_layer_quant *q = &a->layers[layer];
        const cJSON           *k = item(cJSON_GetArrayItem(layers, layer), "k"),
                    *v = item(cJSON_GetArrayItem(layers, layer), "v");
        ck_assert(item(k, "bits")->valuedouble == q->k.bits && item(v, "bits")->valuedouble == q->v.bits);
        assert_json_floats(item(k, "codebook"), q->k.codebook, 1, q->k.n_levels);
        assert_json_floats(item(v, "codebook"), q->v.codebook, q->v.n_groups, q->v.n_levels);
        assert_json_floats(item(v, "decode_levels"), q->v.decode_levels, q->v.n_groups, q->v.n_levels);
        ck_assert_str_eq(item(v, "datatype")->valuestring, kvq_datatype_names[q->v.datatype]);
        ck_assert(item(item(v, "heldout"), "nmse")->valuedouble == q->v.heldout.nmse);
        ck_assert(item(cJSON_GetArrayItem(layers, layer), "attention_error")->valuedouble == q->attention_error);
        ck_assert(item(item(v, "fit"), "weight_sum")->valuedouble == q->v.fit.weight_sum);
        ck_assert((cJSON_GetObjectItemCaseSensitive(k, "threshold_upper") != NULL) == (q->k.upper != NULL));
        if (q->k.lower == NULL) continue;
        assert_json_floats(item(k, "threshold_lower"), q->k.lower, SAMPLE_HEADS, SAMPLE_HEAD_DIM);
        assert_json_floats(item(k, "threshold_upper"), q->k.upper, SAMPLE_HEADS, SAMPLE_HEAD_DIM);
        ck_assert_ptr_null(cJSON_GetObjectItemCaseSensitive(v, "threshold_lower"));
    }
    cJSON_Delete(root);
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(json_holds_every_number_of_alloc) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a = sample_alloc_artifact(&ctx, 2);
    content       c = exported(kvq_export_find("json"), a);
    cJSON        *root = cJSON_Parse(c.data);
    const cJSON  *quantizer = item(root, "quantizer"), *layers = item(root, "layers");
    ck_assert_str_eq(item(root, "kvq_format_version")->valuestring, "1.2");
    assert_json_floats(item(quantizer, "rotation"), a->quantizer.rotation, SAMPLE_ALLOC_HEAD_DIM,
                       SAMPLE_ALLOC_HEAD_DIM);
    ck_assert(item(quantizer, "target_bits")->valuedouble == a->quantizer.target_bits);
    ck_assert_ptr_null(cJSON_GetObjectItemCaseSensitive(quantizer, "n_side_v"));
    for (int layer = 0; layer < 2; layer++) {
        const kvq_layer_quant *q = &a->layers[layer];
        const cJSON           *k = item(cJSON_GetArrayItem(layers, layer), "k"),
                    *v = item(cJSON_GetArrayItem(layers, layer), "v"), *widths = item(k, "widths"),
                    *levels = item(k, "key_levels");
        ck_assert_int_eq(cJSON_GetArraySize(widths), SAMPLE_ALLOC_D);
        for (int d = 0; d < SAMPLE_ALLOC_D; d++)
            ck_assert(cJSON_GetArrayItem(widths, d)->valuedouble == q->k.widths[d]);
        ck_assert_int_eq(cJSON_GetArraySize(levels), q->k.n_key_levels);
        for (int i = 0; i < q->k.n_key_levels; i++)
            ck_assert((float)cJSON_GetArrayItem(levels, i)->valuedouble == q->k.key_levels[i]);
        assert_json_floats(item(v, "codebook")->child, q->v.codebook, q->v.n_levels, q->v.dim);
        ck_assert(item(v, "scale_exponent")->valuedouble == q->v.scale_exponent &&
                  item(v, "kl")->valuedouble == q->v.kl);
        if (q->k.offset == NULL) continue;
        assert_json_floats(item(k, "offset"), q->k.offset, SAMPLE_HEADS, SAMPLE_ALLOC_HEAD_DIM);
        assert_json_floats(item(k, "scale"), q->k.scale, SAMPLE_HEADS, SAMPLE_ALLOC_HEAD_DIM);
    }
    cJSON_Delete(root);
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// Nine digits are enough: every 40961st f32 comes back.
static void numbers_survive(const char *locale) {
    char text[EXPORT_NUMBER];
    for (uint32_t bits = 1; bits < 0x7f800000u; bits += 40961) {
        float x = kvq_float_of_bits(bits);
        (void)setlocale(LC_NUMERIC, locale);
        export_number((double)x, RECORD_F32, text);
        (void)setlocale(LC_NUMERIC, "C");
        ck_assert_uint_eq(strspn(text, "0123456789.e+-"), strlen(text));
        ck_assert_msg(strtof(text, NULL) == x, "%s", text);
    }
}

// The locale's decimal point, a comma or a character of two bytes, is not written.
START_TEST(numbers_survive_as_text_in_every_locale) {
    static const char *const LOCALES[] = {"C", "de_DE.UTF-8", "ps_AF.UTF-8"};
    char                     text[EXPORT_NUMBER];
    for (int i = 0; i < 3; i++) {
        if (setlocale(LC_NUMERIC, LOCALES[i]) != NULL)
            numbers_survive(LOCALES[i]);
        else
            printf("export: the locale %s is not installed and was not tried\n", LOCALES[i]);
    }
    export_number(0.1, RECORD_F64, text);
    ck_assert_str_eq(text, "0.10000000000000001");
    export_number(-1e-300, RECORD_F64, text);
    ck_assert_str_eq(text, "-1e-300");
    export_number(-0.0, RECORD_F32, text);
    ck_assert_str_eq(text, "-0.0"); // "-0" is the integer 0 to many readers
}
END_TEST

// ---------------------------------------------------------------- safetensors, by hand

START_TEST(safetensors_layout_is_as_specified) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a = sample_artifact(&ctx, 12); // layers.10 comes before layers.2
    content       c = exported(kvq_export_find("safetensors"), a);
    uint64_t      header_bytes;
    memcpy(&header_bytes, c.data, 8);
    ck_assert_uint_eq(header_bytes % 8, 0);
    cJSON       *header = cJSON_ParseWithLength(c.data + 8, header_bytes);
    const cJSON *metadata = item(header, "__metadata__"), *tensor, *previous = NULL;
    double       at = 0;
    cJSON_ArrayForEach(tensor, header) {
        if (tensor == metadata) continue;
        ck_assert(previous == NULL || strcmp(previous->string, tensor->string) < 0);
        ck_assert(cJSON_GetArrayItem(item(tensor, "data_offsets"), 0)->valuedouble == at);
        at = cJSON_GetArrayItem(item(tensor, "data_offsets"), 1)->valuedouble;
        previous = tensor;
    }
    ck_assert(8 + (double)header_bytes + at == (double)c.bytes);
    const cJSON *upper = item(header, "layers.1.k.threshold_upper");
    size_t offset = 8 + (size_t)header_bytes + (size_t)cJSON_GetArrayItem(item(upper, "data_offsets"), 0)->valuedouble;
    ck_assert(memcmp(c.data + offset, a->layers[1].k.upper, SAMPLE_D * sizeof(float)) == 0);
    ck_assert(cJSON_GetArrayItem(item(upper, "shape"), 0)->valuedouble == SAMPLE_HEADS);
    ck_assert(cJSON_GetArrayItem(item(upper, "shape"), 1)->valuedouble == SAMPLE_HEAD_DIM);
    ck_assert_str_eq(item(upper, "dtype")->valuestring, "F32");
    const cJSON *tables = item(item(header, "layers.2.v.decode_levels"), "shape");
    ck_assert(cJSON_GetArrayItem(tables, 0)->valuedouble == SAMPLE_HEADS);
    ck_assert(cJSON_GetArrayItem(tables, 1)->valuedouble == 4);
    ck_assert_ptr_null(cJSON_GetObjectItemCaseSensitive(header, "layers.2.k.threshold_upper"));
    const char *const expected[][2] = {
        {"kvq_format_version", "1.1"},
        {"content_sha256", HASH},
        {"layers.0.k.bits", "4"},
        {"layers.1.v.bits", "2"},
        {"layers.1.v.datatype", "nf"},
        {"layers.2.k.datatype", "int-clamped"},
        {"layers.2.k.domain", "post_rope"},
        {"layers.2.attention_error", "2.125"},
        {"layers.2.v.heldout.clipped_share", "0.015625"},
        {"quantizer.recent_tokens", "128"},
        {"quantizer.weighting", "range"},
        {"quantizer.threshold_scope", "matrix"},
        {"quantizer.sinks_counted", "1"},
        {"quantizer.n_side_v", "2"},
        {"quantizer.outlier_fraction", "0.01"},
        {"quantizer.sink_tokens", "5"},
        {"model.name", a->model.name},
        {"dataset.seed", "18446744073709551608"},
        {"provenance.options_json", a->provenance.options_json},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        ck_assert_str_eq(item(metadata, expected[i][0])->valuestring, expected[i][1]);
    cJSON_Delete(header);
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// Integers first, so that every tensor lies at a multiple of its element.
START_TEST(safetensors_of_alloc_are_typed_and_aligned) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a = sample_alloc_artifact(&ctx, 2);
    content       c = exported(kvq_export_find("safetensors"), a);
    uint64_t      header_bytes;
    int           n_integers = 0;
    memcpy(&header_bytes, c.data, 8);
    cJSON       *header = cJSON_ParseWithLength(c.data + 8, header_bytes);
    const cJSON *metadata = item(header, "__metadata__"), *tensor, *widths = item(header, "layers.0.k.widths");
    cJSON_ArrayForEach(tensor, header) {
        if (tensor == metadata) continue;
        bool   is_integer = strcmp(item(tensor, "dtype")->valuestring, "I64") == 0;
        double at = cJSON_GetArrayItem(item(tensor, "data_offsets"), 0)->valuedouble;
        ck_assert_int_eq((int64_t)at % (is_integer ? 8 : 4), 0);
        n_integers += is_integer;
    }
    ck_assert_int_eq(n_integers, 2); // widths of two layers
    ck_assert(cJSON_GetArrayItem(item(widths, "shape"), 0)->valuedouble == SAMPLE_ALLOC_D);
    for (int d = 0; d < SAMPLE_ALLOC_D; d++) {
        int64_t width;
        size_t  at = 8 + (size_t)header_bytes +
                    (size_t)cJSON_GetArrayItem(item(widths, "data_offsets"), 0)->valuedouble + 8 * (size_t)d;
        memcpy(&width, c.data + at, sizeof width);
        ck_assert_int_eq(width, a->layers[0].k.widths[d]);
    }
    ck_assert_str_eq(item(item(header, "quantizer.rotation"), "dtype")->valuestring, "F32");
    ck_assert_int_eq(cJSON_GetArraySize(item(item(header, "layers.0.v.codebook"), "shape")), 3);
    ck_assert_str_eq(item(metadata, "layers.1.k.table_kind")->valuestring, "affine");
    ck_assert_str_eq(item(metadata, "layers.0.v.scale_exponent")->valuestring, "-8");
    ck_assert_str_eq(item(metadata, "quantizer.rotation_kind")->valuestring, "hadamard");
    cJSON_Delete(header);
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// ---------------------------------------------------------------- changed files

// A flip that leaves the meaning of JSON as it is: other white space, a digit beyond the precision, 1E-5 for 1e-5.
static bool is_harmless(const char *before) {
    bool is_exponent = *before == 'e' && isdigit((unsigned char)before[-1]) && strchr("+-", before[1]) != NULL;
    return is_exponent || isspace((unsigned char)*before) || isdigit((unsigned char)*before);
}

// One bit of every byte.
START_TEST(a_flipped_bit_fails_the_check) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i % N_TARGETS);
    kvq_artifact            *a = sample_number(&ctx, _i, 1);
    content                  c = exported(target, a);
    bool                     is_json = strcmp(target->name, "json") == 0;
    for (size_t at = 0; at < c.bytes; at++) {
        char before = c.data[at];
        bool harmless = is_json && is_harmless(c.data + at);
        c.data[at] = (char)(before ^ (1 << (at % 8)));
        kvq_status status = check_bytes(target, a, c.data, c.bytes, &err);
        ck_assert_msg(status != KVQ_OK || harmless, "byte %zu, '%c'", at, before);
        c.data[at] = before;
    }
    kvq_test_ok(check_bytes(target, a, c.data, c.bytes, &err), &err);
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(a_truncated_export_fails_the_check) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i);
    kvq_artifact            *a = sample_artifact(&ctx, 1);
    content                  c = exported(target, a);
    for (size_t bytes = 0; bytes < c.bytes; bytes += 1 + bytes / 100) {
        ck_assert_int_ne(check_bytes(target, a, c.data, bytes, &err), KVQ_OK);
    }
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

static const struct edit {
    const char *target, *from, *to; // the first occurrence
    kvq_status  status;
    const char *message;
} EDITS[] = {
    {"json", "\"bits\":\t4", "\"bits\":\t3", KVQ_ERR_INTEGRITY, "/layers/000/k@bits has another value"},
    {"json", "\"bits\":\t4", "\"bits\":\t\"4\"", KVQ_ERR_INTEGRITY, "/layers/000/k@bits has another value"},
    {"json", "\"axis\":\t\"channel\",", "", KVQ_ERR_INTEGRITY, "/layers/000/k@axis is missing"},
    {"json", "\"axis\":\t\"channel\"", "\"axis\":\t\"token\"", KVQ_ERR_INTEGRITY,
     "/layers/000/k@axis has another text"},
    {"json", "\"codebook\":\t[[", "\"codebook\":\t[[0.5,", KVQ_ERR_INTEGRITY,
     "/layers/000/k/codebook has another shape"},
    {"json", "\"codebook\":\t[[-", "\"codebook\":\t[[", KVQ_ERR_INTEGRITY,
     "/layers/000/k/codebook has another shape, or another value near element 1"},
    {"json", "\"seed\":\t\"1844", "\"seed\":\t\"1744", KVQ_ERR_INTEGRITY, "/dataset@seed has another text"},
    {"json", "\"axis\":\t\"channel\"", "\"axis\":\t\"channel\", \"rotation\": 1", KVQ_ERR_INTEGRITY,
     "values instead of"},
    {"json", "\"content_sha256\":\t\"00", "\"content_sha256\":\t\"01", KVQ_ERR_INTEGRITY, "content_sha256"},
    {"json", "kvq.artifact/1", "kvq.artifact/2", KVQ_ERR_VERSION, "'kvq.artifact/2'"},
    {"safetensors", "\"layers.0.k.bits\":\"4\"", "\"layers.0.k.bits\":\"3\"", KVQ_ERR_INTEGRITY,
     "metadata layers.0.k.bits"},
    {"safetensors", "layers.0.v.codebook", "layers.9.v.codebook", KVQ_ERR_INTEGRITY,
     "tensor layers.0.v.codebook is missing"},
    {"safetensors", "\"shape\":[2,6]", "\"shape\":[6,2]", KVQ_ERR_INTEGRITY, "another type, shape or place"},
    {"safetensors", "\"dtype\":\"F32\"", "\"dtype\":\"I32\"", KVQ_ERR_INTEGRITY, "another type, shape or place"},
    {"safetensors", "\"tokenizer.kind\"", "\"extra\":\"1\",\"tokenizer.kind\"", KVQ_ERR_INTEGRITY, "names and"},
    {"safetensors", "\"data_offsets\":[0,", "\"data_offsets\":[9,", KVQ_ERR_INTEGRITY, "another type, shape or place"},
};

START_TEST(an_edited_export_fails_the_check_by_name) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const struct edit       *e = &EDITS[_i];
    const kvq_export_target *target = kvq_export_find(e->target);
    kvq_artifact            *a = sample_artifact(&ctx, 1);
    content                  c = exported(target, a);
    size_t                   n_from = strlen(e->from), n_to = strlen(e->to), at = 0;
    char                    *edited = calloc(1, c.bytes + n_to + 1);
    while (at + n_from <= c.bytes && memcmp(c.data + at, e->from, n_from) != 0) at++;
    ck_assert_msg(at + n_from <= c.bytes, "no %s to edit", e->from);
    memcpy(edited, c.data, at);
    memcpy(edited + at, e->to, n_to);
    if (strcmp(e->target, "safetensors") == 0) { // the length of the header
        uint64_t header_bytes;
        memcpy(&header_bytes, c.data, sizeof header_bytes);
        header_bytes += n_to - n_from;
        memcpy(edited, &header_bytes, sizeof header_bytes);
    }
    memcpy(edited + at + n_to, c.data + at + n_from, c.bytes - at - n_from);
    kvq_test_failed(check_bytes(target, a, edited, c.bytes - n_from + n_to, &err), e->status, &err, e->message);
    free(edited);
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(bytes_behind_an_export_fail_the_check) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i);
    kvq_artifact            *a = sample_artifact(&ctx, 1);
    content                  c = exported(target, a);
    c.data[c.bytes] = '!';
    kvq_test_failed(check_bytes(target, a, c.data, c.bytes + 1, &err), KVQ_ERR_INTEGRITY, &err, "export.out");
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// A correct file of another artifact is the wrong file.
START_TEST(the_export_of_another_allocation_fails_the_check) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i);
    kvq_artifact            *a = sample_alloc_artifact(&ctx, 2);
    content                  c = exported(target, a);
    uint8_t                 *widths = a->layers[1].k.widths; // affine: any widths go with the tables
    widths[3] = 1;
    kvq_test_failed(check_bytes(target, a, c.data, c.bytes, &err), KVQ_ERR_INTEGRITY, &err, "widths");
    widths[3] = SAMPLE_WIDTHS[3];
    kvq_test_ok(check_bytes(target, a, c.data, c.bytes, &err), &err);
    a->layers[0].v.codebook[9] += 1e-6f;
    kvq_test_failed(check_bytes(target, a, c.data, c.bytes, &err), KVQ_ERR_INTEGRITY, &err, "codebook");
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

START_TEST(the_export_of_another_artifact_fails_the_check) {
    kvq_context              ctx = kvq_test_context();
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i);
    kvq_artifact            *a = sample_artifact(&ctx, 2);
    content                  c = exported(target, a);
    a->layers[1].k.lower[3] -= 1e-6f;
    kvq_test_failed(check_bytes(target, a, c.data, c.bytes, &err), KVQ_ERR_INTEGRITY, &err, "k");
    ck_assert_ptr_nonnull(strstr(err.message, "element"));
    free(c.data);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// ---------------------------------------------------------------- failing allocations

START_TEST(a_failing_allocation_leaves_nothing) {
    limited_memory           limit = {.inner = kvq_test_context()};
    kvq_context              good = limit.inner, bad = limited_context(&limit);
    kvq_error                err = {0};
    const kvq_export_target *target = target_number(_i % N_TARGETS);
    kvq_artifact            *a = sample_number(&good, _i, 1);
    double                   max_error;
    for (int checking = 0; checking < 2; checking++) {
        kvq_status status = KVQ_ERR_MEMORY;
        for (int64_t n = 0; status != KVQ_OK; n++) {
            limit.left = n;
            status = checking ? target->check(&bad, a, HASH, out_path(), &max_error, &err)
                              : target->write(&bad, a, HASH, out_path(), false, &err);
            ck_assert_int_eq(limit.n_live, 0);
            if (status != KVQ_OK) kvq_test_failed(status, KVQ_ERR_MEMORY, &err, "");
            if (!checking) ck_assert_int_eq(access(out_path(), F_OK) == 0, status == KVQ_OK);
        }
    }
    kvq_artifact_destroy(&good, &a);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(the_table_finds_its_targets),
    KVQ_LOOP(a_fresh_export_passes_its_check_and_is_reproducible, N_BOTH),
    KVQ_CASE(json_holds_every_number_of_alloc),
    KVQ_CASE(safetensors_of_alloc_are_typed_and_aligned),
    KVQ_LOOP(the_export_of_another_allocation_fails_the_check, N_TARGETS),
    KVQ_CASE(json_holds_every_number),
    KVQ_CASE(numbers_survive_as_text_in_every_locale),
    KVQ_CASE(safetensors_layout_is_as_specified),
    KVQ_LOOP(a_flipped_bit_fails_the_check, N_BOTH),
    KVQ_LOOP(a_truncated_export_fails_the_check, N_TARGETS),
    KVQ_LOOP(an_edited_export_fails_the_check_by_name, (int)(sizeof EDITS / sizeof *EDITS)),
    KVQ_LOOP(bytes_behind_an_export_fail_the_check, N_TARGETS),
    KVQ_LOOP(the_export_of_another_artifact_fails_the_check, N_TARGETS),
    KVQ_LOOP(a_failing_allocation_leaves_nothing, N_BOTH),
};
KVQ_TEST_MAIN("export", CASES)
