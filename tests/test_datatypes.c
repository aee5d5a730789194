// SPDX-License-Identifier: Apache-2.0
// Datatypes without a fit: NormalFloat against its definition and the published tables, integers, refusals; names.
#include <math.h>
#include <string.h>

#include "kvq_codebook.h"
#include "units.h"

static void fixed_levels(kvq_datatype datatype, int bits, float *levels) {
    kvq_error err = {0};
    kvq_test_ok(kvq_fixed_levels(datatype, bits, levels, &err), &err);
    ck_assert(levels[0] == -1.0f && levels[(1 << bits) - 1] == 1.0f);
    for (int i = 1; i < 1 << bits; i++) ck_assert(levels[i] > levels[i - 1]);
}

// docs/method.md 4.4, to six decimals; 4 bits are the NF4 of QLoRA (arXiv 2305.14314, appendix E).
START_TEST(nf_tables_are_the_published_ones) {
    static const struct {
        int    bits;
        double levels[16];
    } TABLES[] = {
        {2, {-1, 0, 0.337915, 1}},
        {3, {-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1}},
        {4,
         {-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0, 0.079580, 0.160930, 0.246112,
          0.337915, 0.440710, 0.562617, 0.722957, 1}},
    };
    float levels[1 << KVQ_MAX_BITS];
    for (size_t k = 0; k < sizeof TABLES / sizeof *TABLES; k++) {
        fixed_levels(KVQ_NF, TABLES[k].bits, levels);
        for (int i = 0; i < 1 << TABLES[k].bits; i++)
            ck_assert_double_eq_tol((double)levels[i], TABLES[k].levels[i],
                                    5.1e-7); // half of the last decimal, and f32
    }
}
END_TEST

START_TEST(nf_tables_are_those_of_the_reference) {
    static const char *const NAMES[] = {"2", "3", "4"};
    cJSON                   *units = units_read();
    const cJSON             *tables = units_get(units, "nf");
    float                    levels[1 << KVQ_MAX_BITS];
    for (int bits = 2; bits <= 4; bits++) {
        int     n;
        double *expected = units_array(tables, NAMES[bits - 2], &n);
        fixed_levels(KVQ_NF, bits, levels);
        ck_assert_int_eq(n, 1 << bits);
        for (int i = 0; i < n; i++) // nine digits tell one f32 from another
            ck_assert_msg(levels[i] == (float)expected[i], "%d bits, level %d: %.9g, reference %.9g", bits, i,
                          (double)levels[i], expected[i]);
        free(expected);
    }
    cJSON_Delete(units);
}
END_TEST

// The definition the other way round: the probability below each level, scaled back, is where it should be. Levels are
// rounded to f32, which moves a probability by less than the density, 0.4, times 1.85 * 2^-24 on a normal variable.
START_TEST(nf_levels_are_quantiles_of_a_normal_variable) {
    const double DELTA = 0.5 * (1.0 / 32 + 1.0 / 30), END = -1.8481314207079738; // Python: NormalDist().inv_cdf(DELTA)
    float        levels[1 << KVQ_MAX_BITS];
    for (int bits = 1; bits <= KVQ_MAX_BITS; bits++) {
        fixed_levels(KVQ_NF, bits, levels);
        int zero = (1 << (bits - 1)) - 1, above = 1 << (bits - 1);
        for (int i = 0; i < 1 << bits && bits > 1; i++) {
            double share = i < zero ? (double)(zero - i) / zero : (double)(i - zero) / above;
            double p = 0.5 * erfc(-(double)levels[i] * -END / sqrt(2));
            ck_assert_double_eq_tol(p, i < zero ? 0.5 - share * (0.5 - DELTA) : 0.5 + share * (0.5 - DELTA), 1e-7);
        }
        ck_assert(bits == 1 || levels[zero] == 0);
    }
    ck_assert(levels[0] == -1); // 1 bit has no zero: the two ends, which fixed_levels has checked
}
END_TEST

START_TEST(integers_are_evenly_spaced) {
    float levels[1 << KVQ_MAX_BITS], clamped[1 << KVQ_MAX_BITS];
    for (int bits = 1; bits <= KVQ_MAX_BITS; bits++) {
        int last = (1 << bits) - 1;
        fixed_levels(KVQ_INT, bits, levels);
        for (int i = 0; i <= last; i++) {
            ck_assert_double_eq_tol((double)levels[i], -1 + 2 * (double)i / last, 0x1p-24); // rounded to f32
            ck_assert(levels[i] == -levels[last - i]);
        }
        fixed_levels(KVQ_INT_CLAMPED, bits, clamped);
        ck_assert(memcmp(levels, clamped, (size_t)(last + 1) * sizeof *levels) == 0);
    }
    fixed_levels(KVQ_INT, 2, levels);
    ck_assert(levels[1] == -1 / 3.0f && levels[2] == 1 / 3.0f);
}
END_TEST

START_TEST(levels_that_cannot_be_are_refused) {
    kvq_error err = {0};
    float     level = 7;
    kvq_test_failed(kvq_fixed_levels(KVQ_NF, 0, &level, &err), KVQ_ERR_USAGE, &err, "a table of 0 bits");
    kvq_test_failed(kvq_fixed_levels(KVQ_INT, 9, &level, &err), KVQ_ERR_USAGE, &err, "widths are 1 to 8");
    kvq_test_failed(kvq_fixed_levels(KVQ_NUQ, 3, &level, &err), KVQ_ERR_USAGE, &err, "'nuq' has no levels before");
    kvq_test_failed(kvq_fixed_levels(KVQ_N_DATATYPES, 3, &level, &err), KVQ_ERR_USAGE, &err, "'?'");
    ck_assert(level == 7);
}
END_TEST

static void check_names(const char *const *names, int n) {
    for (int i = 0; i < n; i++) ck_assert_ptr_nonnull(names[i]);
    ck_assert_ptr_null(names[n]);
}

START_TEST(every_choice_has_a_name) {
    check_names(kvq_datatype_names, KVQ_N_DATATYPES);
    check_names(kvq_axis_names, KVQ_AXIS_TOKEN + 1);
    check_names(kvq_key_domain_names, KVQ_KEYS_POST_ROPE + 1);
    check_names(kvq_scope_names, KVQ_SCOPE_MATRIX + 1);
    ck_assert_str_eq(kvq_datatype_names[KVQ_INT_CLAMPED], "int-clamped");
    ck_assert_str_eq(kvq_axis_names[KVQ_AXIS_TOKEN], "token");
    ck_assert_str_eq(kvq_key_domain_names[KVQ_KEYS_POST_ROPE], "post_rope");
    ck_assert_str_eq(kvq_scope_names[KVQ_SCOPE_MATRIX], "matrix");
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(nf_tables_are_the_published_ones),
    KVQ_GOLDEN_CASE(nf_tables_are_those_of_the_reference),
    KVQ_CASE(nf_levels_are_quantiles_of_a_normal_variable),
    KVQ_CASE(integers_are_evenly_spaced),
    KVQ_CASE(levels_that_cannot_be_are_refused),
    KVQ_CASE(every_choice_has_a_name),
};
KVQ_TEST_MAIN("datatypes", CASES)
