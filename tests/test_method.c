// SPDX-License-Identifier: Apache-2.0
//
// Numbers that the description of KVQuant (arXiv 2401.18079) and its public code fix and that no other suite checks:
// cache sizes as published, the score of a key that is rotated on the fly, restored outliers.
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"
#include "kvq_kernels.h"
#include "kvq_test.h"

// An artifact of one layer after another with uniform width, as far as sizes go. head_dim 128.
static kvq_artifact *uniform_artifact(const kvq_context *ctx, int64_t n_layers, int64_t d, int bits, double outliers) {
    kvq_artifact       *a = NULL;
    kvq_error           err = {0};
    kvq_measure_options measured = {.n_fractions = 1, .fractions = {outliers}};
    kvq_fit_options     fit = {.outlier_fraction = outliers, .k_bits = bits, .v_bits = bits};
    kvq_test_ok(kvq_artifact_create(ctx, n_layers, &a, &err), &err);
    a->model.n_kv_heads = d / 128;
    a->model.head_dim = 128;
    kvq_artifact_describe_quantizer(a, &measured, &fit);
    return a;
}

// Without outliers the published average is b + 16 / d bits (codes, and two f16 per token for V); the sizes in GiB at
// 128K tokens follow. Tables, which the paper leaves out, are counted apart.
START_TEST(dense_caches_have_the_published_size) {
    static const struct {
        int64_t n_layers, d;
        double  bits[3]; // average at 4, 3, 2 bits, three decimals
        double  gib[3];  // one decimal
    } MODELS[] = {
        {32, 4096, {4.004, 3.004, 2.004}, {16.0, 12.0, 8.0}},  // LLaMA-7B
        {40, 5120, {4.003, 3.003, 2.003}, {25.0, 18.8, 12.5}}, // LLaMA-13B
        {60, 6656, {4.002, 3.002, 2.002}, {48.8, 36.6, 24.4}}, // LLaMA-30B
        {80, 8192, {4.002, 3.002, 2.002}, {80.0, 60.0, 40.0}}, // LLaMA-65B
        {80, 1024, {4.016, 3.016, 2.016}, {10.0, 7.5, 5.0}},   // Llama-2-70B
    };
    kvq_context ctx = kvq_test_context();
    for (size_t i = 0; i < sizeof MODELS / sizeof *MODELS; i++) {
        for (int j = 0; j < 3; j++) {
            kvq_artifact  *a = uniform_artifact(&ctx, MODELS[i].n_layers, MODELS[i].d, 4 - j, 0);
            kvq_cache_size size = kvq_artifact_cache_size(a, 131072);
            double         bits = 8.0 * (double)size.row_bytes / (double)size.n_elements;
            ck_assert_double_eq_tol(bits, MODELS[i].bits[j], 0.0005001);
            ck_assert_double_eq_tol((double)size.row_bytes / 0x1p30, MODELS[i].gib[j], 0.0501);
            ck_assert_int_eq(size.exact_bytes, 0);
            kvq_artifact_destroy(&ctx, &a);
        }
    }
}
END_TEST

// With 1 % outliers a compact layout of 4096 channels: 168 bytes of outliers a row, and the claimed compression.
START_TEST(outlier_rows_have_the_published_size) {
    static const struct {
        int    bits, k_bytes, v_bytes;
        double compression;
    } ROWS[] = {{4, 2216, 2220, 3.69}, {3, 1704, 1708, 4.80}, {2, 1192, 1196, 6.86}};
    kvq_context ctx = kvq_test_context();
    for (size_t i = 0; i < sizeof ROWS / sizeof *ROWS; i++) {
        kvq_artifact  *a = uniform_artifact(&ctx, 1, 4096, ROWS[i].bits, 0.01);
        kvq_cache_size size = kvq_artifact_cache_size(a, 1);
        ck_assert_int_eq(size.row_bytes, ROWS[i].k_bytes + ROWS[i].v_bytes);
        ck_assert_double_eq_tol(2 * 2 * 4096 / (double)size.row_bytes, ROWS[i].compression, 0.005);
        kvq_artifact_destroy(&ctx, &a);
    }
}
END_TEST

// The formula of the paper gives every size that is published, to the printed digit: GiB at 128K tokens.
START_TEST(the_formula_gives_the_published_sizes) {
    static const struct {
        int64_t n_layers, d;
        double  fp16, gib[6]; // 4, 4-1%, 3, 3-1%, 2, 2-1%
    } MODELS[] = {
        {32, 4096, 64.0, {16.0, 17.3, 12.0, 13.3, 8.0, 9.3}},    // LLaMA-7B
        {40, 5120, 100.0, {25.0, 27.0, 18.8, 20.8, 12.5, 14.5}}, // LLaMA-13B
        {60, 6656, 195.0, {48.8, 52.7, 36.6, 40.5, 24.4, 28.3}}, // LLaMA-30B
        {80, 8192, 320.0, {80.0, 86.5, 60.0, 66.5, 40.0, 46.5}}, // LLaMA-65B
        {80, 1024, 40.0, {10.0, 10.9, 7.5, 8.4, 5.0, 5.9}},      // Llama-2-70B
        {32, 1024, 16.0, {4.0, 4.4, 3.0, 3.4, 2.0, 2.4}},        // Llama-3-8B
    };
    kvq_context ctx = kvq_test_context();
    for (size_t i = 0; i < sizeof MODELS / sizeof *MODELS; i++) {
        for (int j = 0; j < 6; j++) {
            kvq_artifact *a = uniform_artifact(&ctx, MODELS[i].n_layers, MODELS[i].d, 4 - j / 2, j % 2 == 0 ? 0 : 0.01);
            kvq_memory    m = kvq_artifact_memory(a, 131072);
            ck_assert(m.fp16_bytes == MODELS[i].fp16 * 0x1p30);
            ck_assert_double_eq_tol(m.formula_bytes / 0x1p30, MODELS[i].gib[j], 0.0501); // printed with one decimal
            kvq_artifact_destroy(&ctx, &a);
        }
    }
    kvq_artifact *a = uniform_artifact(&ctx, 32, 4096, 2, 0);
    ck_assert_double_eq_tol(kvq_artifact_memory(a, 10000000).formula_bytes / 0x1p30, 611.5, 0.0501);
    ck_assert(kvq_artifact_memory(a, 1 << 20).fp16_bytes == 512 * 0x1p30);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// Average bits with 1 % outliers as published, three decimals, and what another fraction and unequal widths make of it.
START_TEST(the_formula_gives_the_published_bits) {
    static const struct {
        int64_t d;
        double  bits[3]; // 4, 3, 2
    } ROWS[] = {{1024, {4.351, 3.351, 2.351}},
                {4096, {4.328, 3.328, 2.328}},
                {5120, {4.326, 3.326, 2.326}},
                {6656, {4.325, 3.325, 2.325}},
                {8192, {4.324, 3.324, 2.324}}};
    kvq_context ctx = kvq_test_context();
    for (size_t i = 0; i < sizeof ROWS / sizeof *ROWS; i++) {
        for (int j = 0; j < 3; j++) {
            kvq_artifact *a = uniform_artifact(&ctx, 2, ROWS[i].d, 4 - j, 0.01);
            kvq_memory    m = kvq_artifact_memory(a, 1000);
            ck_assert_double_eq_tol(16 * m.formula_bytes / m.fp16_bytes, ROWS[i].bits[j], 0.0005001);
            kvq_artifact_destroy(&ctx, &a);
        }
    }
    kvq_artifact *a = uniform_artifact(&ctx, 1, 4096, 3, 0.0025);
    a->layers[0].v.bits = 4;
    kvq_memory m = kvq_artifact_memory(a, 1);
    ck_assert_double_eq_tol(16 * m.formula_bytes / m.fp16_bytes, 3.5 + 0.08 + 32.0 / 4096, 1e-12);
    kvq_artifact_destroy(&ctx, &a);
}
END_TEST

// What the artifact really needs is all of its size; and where the paper says nothing, nothing is made up.
START_TEST(memory_counts_what_a_cache_holds) {
    kvq_context   ctx = kvq_test_context();
    kvq_artifact *a = uniform_artifact(&ctx, 3, 1024, 3, 0.01);
    a->quantizer.sink_tokens = 4;
    kvq_cache_size size = kvq_artifact_cache_size(a, 5000);
    kvq_memory     m = kvq_artifact_memory(a, 5000);
    ck_assert(size.exact_bytes > 0 && size.tables_bytes > 0 && m.n_tokens == 5000);
    ck_assert(m.bytes == (double)(size.row_bytes + size.exact_bytes + size.tables_bytes));
    ck_assert(m.fp16_bytes == 5000.0 * 2 * 3 * 1024 * 2);
    ck_assert(m.formula_bytes > 0);
    a->layers[2].k.axis = KVQ_AXIS_TOKEN;
    ck_assert(kvq_artifact_memory(a, 5000).formula_bytes == 0);
    a->layers[2].k.axis = KVQ_AXIS_CHANNEL;
    a->layers[1].v.axis = KVQ_AXIS_CHANNEL;
    ck_assert(kvq_artifact_memory(a, 5000).formula_bytes == 0);
    kvq_artifact_destroy(&ctx, &a);
    ck_assert_int_eq(kvq_memory_lengths[0].n_tokens, 32768);
    ck_assert_int_eq(kvq_memory_lengths[1].n_tokens, 131072);
    ck_assert_int_eq(kvq_memory_lengths[2].n_tokens, 1048576);
    ck_assert_int_eq(kvq_memory_lengths[3].n_tokens, 10000000);
}
END_TEST

// A kernel that rotates on the fly takes, for a stored key k at position p and a query q that is rotated already,
//     sum_i k_i (cos(p t_i) q_i + s_i sin(p t_i) q_partner(i)),  s = +1 in the lower half and -1 in the upper one;
// that is the product of the rotated key and the rotated query. Everything here in f64 from f32 tables: the angles
// carry 2^-24, the sum of D products of numbers below 2 loses less than 4 D 2^-24.
START_TEST(a_key_rotated_on_the_fly_scores_the_same) {
    enum { D = 64, P = 1000 };
    kvq_context  ctx = kvq_test_context();
    kvq_error    err = {0};
    kvq_backend *be = NULL;
    float        k[D], q[D], cosine[D / 2], sine[D / 2], stored[D];
    double       on_the_fly = 0, rotated_first = 0;
    kvq_test_ok(kvq_backend_cpu(&ctx, KVQ_COMPUTE_F32, &be, &err), &err);
    for (int i = 0; i < D; i++) {
        stored[i] = k[i] = (float)(2 * kvq_rng_uniform(1, KVQ_RNG_TEST, 80, (uint64_t)i) - 1);
        q[i] = (float)(2 * kvq_rng_uniform(1, KVQ_RNG_TEST, 81, (uint64_t)i) - 1); // at its own position already
    }
    for (int i = 0; i < D / 2; i++) {
        double angle = P * pow(10000, -2.0 * i / D);
        cosine[i] = (float)cos(angle);
        sine[i] = (float)sin(angle);
    }
    be->rope(be, k, cosine, sine, 1, 1.0f, 1, 1, D, D);
    for (int i = 0; i < D; i++) {
        int    partner = (i + D / 2) % D;
        double angle = P * pow(10000, -2.0 * (i % (D / 2)) / D), sign = i < D / 2 ? 1 : -1;
        on_the_fly += (double)stored[i] * (cos(angle) * (double)q[i] + sign * sin(angle) * (double)q[partner]);
        rotated_first += (double)k[i] * (double)q[i];
    }
    ck_assert_double_eq_tol(on_the_fly, rotated_first, 4 * D * 0x1p-24);
    be->destroy(&be);
}
END_TEST

// An outlier comes back as its value but for the rounding of its residual to f16: half a unit of that, which is at most
// a unit of the value in f16, for the dense level lies between the value and 0 or not far beyond.
START_TEST(outliers_are_restored_to_half_precision) {
    enum { D = 128, ROWS = 200, SIDE = 3 };
    float             x[D], back[D], levels[4] = {-0.9f, -0.3f, 0.3f, 0.9f}, z[D], r[D], keys[2][SIDE + 1];
    uint16_t          channels[2][SIDE + 1];
    kvq_block_scratch work = {keys[0], keys[1], channels[0], channels[1], 0, 0};
    uint8_t           row[256];
    int               n_restored = 0;
    for (int c = 0; c < D; c++) {
        z[c] = 0.01f * (float)c;
        r[c] = 1 + 0.02f * (float)c;
    }
    for (int i = 0; i < ROWS; i++) {
        bool           keys_rule = i % 2 == 0;
        kvq_block_spec spec = {.d = D, .bits = 2, .n_side = SIDE, .levels = levels};
        if (keys_rule) spec.z = z;
        if (keys_rule) spec.r = r;
        for (int c = 0; c < D; c++)
            x[c] = (float)(3 * tan(2.8 * (kvq_rng_uniform(2, KVQ_RNG_TEST, 82, (uint64_t)(i * D + c)) - 0.5)));
        ck_assert_int_eq(kvq_block_encode(&spec, x, &work, row), 1);
        kvq_block_decode(&spec, row, back);
        for (int side = 0; side < 2; side++) {
            for (int j = 0; j < (side == 0 ? work.n_upper : work.n_lower); j++, n_restored++) {
                int   c = side == 0 ? work.upper_channel[j] : work.lower_channel[j];
                float size = fabsf(x[c]) + (keys_rule ? fabsf(z[c]) + r[c] : 6); // of what the residual can be
                ck_assert_double_le(fabs((double)back[c] - (double)x[c]), (double)size * 0x1p-11 + 0x1p-24);
            }
        }
    }
    ck_assert_int_gt(n_restored, ROWS * SIDE);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(dense_caches_have_the_published_size),    KVQ_CASE(outlier_rows_have_the_published_size),
    KVQ_CASE(the_formula_gives_the_published_sizes),   KVQ_CASE(the_formula_gives_the_published_bits),
    KVQ_CASE(memory_counts_what_a_cache_holds),        KVQ_CASE(a_key_rotated_on_the_fly_scores_the_same),
    KVQ_CASE(outliers_are_restored_to_half_precision),
};
KVQ_TEST_MAIN("method", CASES)
