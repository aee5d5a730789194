// SPDX-License-Identifier: Apache-2.0
// Gates: what is read, and every way to judge it.
#include <math.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_test.h"

static const double NONE = (double)NAN;

static kvq_gate parsed(const char *expression) {
    kvq_error err = {0};
    kvq_gate  gate;
    kvq_test_ok(kvq_gate_parse(expression, &gate, &err), &err);
    return gate;
}

// ---------------------------------------------------------------- reading

typedef struct reading {
    const char *expression, *metric;
    double      limit;
    bool        share, at_most, needs_artifact;
} reading;

static const reading READINGS[] = {
    {"dppl<=1%", "dppl", 0.01, true, true, true},
    {" dppl <= 0.05 ", "dppl", 0.05, true, true, true},
    {"dppl<=150%", "dppl", 1.5, true, true, true},
    {"dppl>=-1%", "dppl", -0.01, true, false, true},
    {"ppl<=25", "ppl", 25, false, true, false},
    {"kld.mean<=1e-3", "kld.mean", 0.001, false, true, true},
    {"kld.median<=0.02", "kld.median", 0.02, false, true, true},
    {"kld.p90<=0.1", "kld.p90", 0.1, false, true, true},
    {"kld.p99<=0.2", "kld.p99", 0.2, false, true, true},
    {"kld.p99.9<=2", "kld.p99.9", 2, false, true, true},
    {"kld.max<=10", "kld.max", 10, false, true, true},
    {"top1>=97%", "top1", 0.97, true, false, true},
    {"top5>=0.9", "top5", 0.9, true, false, true},
    {"dp.rms<=5%", "dp.rms", 0.05, true, true, true},
    {"layer.attn_err.max<=12.5%", "layer.attn_err.max", 0.125, true, true, true},
    {"effective_bits<=3.5", "effective_bits", 3.5, false, true, true},
    {"regression.ppl<=0.5%", "regression.ppl", 0.005, true, true, true},
    {"regression.kld<=10%", "regression.kld", 0.1, true, true, true},
};
enum { N_READINGS = (int)(sizeof READINGS / sizeof *READINGS) };

START_TEST(gates_are_read) {
    const reading *r = &READINGS[_i];
    kvq_gate       gate = parsed(r->expression);
    ck_assert_str_eq(gate.metric, r->metric);
    ck_assert_double_eq_tol(gate.limit, r->limit, 1e-15);
    ck_assert_int_eq(gate.share, r->share);
    ck_assert_int_eq(gate.at_most, r->at_most);
    ck_assert_int_eq(kvq_gate_needs_artifact(&gate), r->needs_artifact);
    ck_assert_str_eq(gate.expression, r->expression + strspn(r->expression, " "));
}
END_TEST

// What is wrong is named, and so are the metrics.
START_TEST(what_is_no_gate_is_refused) {
    const struct {
        const char *expression, *why;
    } bad[] = {{"", "no <= or >="},
               {"dppl", "no <= or >="},
               {"dppl<1%", "no <= or >="},
               {"dppl=1", "no <= or >="},
               {"dppl=<1", "no <= or >="},
               {"speed<=1", "unknown metric"},
               {"<=3", "unknown metric"},
               {"dppl.<=1", "unknown metric"},
               {"dpp<=1", "unknown metric"},
               {"DPPL<=1", "unknown metric"},
               {"dppl<=", "not a number"},
               {"dppl<=x", "not a number"},
               {"dppl<=nan", "not a number"},
               {"dppl<=inf", "not a number"},
               {"dppl<=1e999", "not a number"},
               {"dppl<=1%%", "something behind"},
               {"dppl<=1 2", "something behind"},
               {"dppl<=1%,top1>=97%", "something behind"},
               {"kld.mean<=2%", "no percentage"},
               {"ppl<=500%", "no percentage"},
               {"dppl<=10", "percent sign"},
               {"top1>=97", "percent sign"},
               {"dppl<=0.00000000000000000000000000000000000000000000000000000001", "too long"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvq_error err = {0};
        kvq_gate  gate = {.limit = 7};
        kvq_test_failed(kvq_gate_parse(bad[i].expression, &gate, &err), KVQ_ERR_USAGE, &err, bad[i].why);
        ck_assert_ptr_nonnull(strstr(err.message, "--gate"));
        for (int m = 0; m < N_READINGS; m++) ck_assert_ptr_nonnull(strstr(err.next, READINGS[m].metric));
        ck_assert(gate.limit == 7); // untouched
    }
}
END_TEST

// ---------------------------------------------------------------- judging

// dppl, which lies around 5 % as said; 1000 scored tokens.
typedef struct judging {
    const char  *expression;
    kvq_estimate dppl;
    kvq_verdict  by_interval, by_point;
    double       tokens;
} judging;

static const judging JUDGINGS[] = {
    {"dppl<=10%", {0.05, 0.01, 0.03, 0.08}, KVQ_PASS, KVQ_PASS, 0},
    {"dppl<=8%", {0.05, 0.01, 0.03, 0.08}, KVQ_PASS, KVQ_PASS, 0}, // an end at the limit is within
    {"dppl<=2%", {0.05, 0.01, 0.03, 0.08}, KVQ_FAIL, KVQ_FAIL, 0},
    {"dppl>=2%", {0.05, 0.01, 0.03, 0.08}, KVQ_PASS, KVQ_PASS, 0},
    {"dppl>=3%", {0.05, 0.01, 0.03, 0.08}, KVQ_PASS, KVQ_PASS, 0},
    {"dppl>=10%", {0.05, 0.01, 0.03, 0.08}, KVQ_FAIL, KVQ_FAIL, 0},
    // the end beyond the limit is 3 % from the value and must come to 1 %: nine times the tokens
    {"dppl<=6%", {0.05, 0.01, 0.03, 0.08}, KVQ_INCONCLUSIVE, KVQ_PASS, 9000},
    {"dppl>=6%", {0.05, 0.01, 0.03, 0.08}, KVQ_INCONCLUSIVE, KVQ_FAIL, 9000},
    // on the other side 2 %, to 1 %: four times; to 2 % and an end that counts as within: once
    {"dppl<=4%", {0.05, 0.01, 0.03, 0.08}, KVQ_INCONCLUSIVE, KVQ_FAIL, 4000},
    {"dppl>=4%", {0.05, 0.01, 0.03, 0.08}, KVQ_INCONCLUSIVE, KVQ_PASS, 4000},
    {"dppl<=3%", {0.05, 0.01, 0.03, 0.08}, KVQ_INCONCLUSIVE, KVQ_FAIL, 1000},
    // never, where the value is the limit, also when it is an end; or an end is not known
    {"dppl<=5%", {0.05, 0.01, 0.03, 0.08}, KVQ_INCONCLUSIVE, KVQ_PASS, HUGE_VAL},
    {"dppl<=5%", {0.05, 0.01, 0.05, 0.08}, KVQ_INCONCLUSIVE, KVQ_PASS, HUGE_VAL},
    {"dppl>=5%", {0.05, 0.01, 0.03, 0.05}, KVQ_INCONCLUSIVE, KVQ_PASS, HUGE_VAL},
    {"dppl<=6%", {0.05, 0.01, 0.03, HUGE_VAL}, KVQ_INCONCLUSIVE, KVQ_PASS, HUGE_VAL},
    {"dppl>=4%", {0.05, 0.01, -HUGE_VAL, 0.08}, KVQ_INCONCLUSIVE, KVQ_PASS, HUGE_VAL},
    {"dppl<=2%", {0.05, 0.01, 0.03, HUGE_VAL}, KVQ_FAIL, KVQ_FAIL, 0},
    // a constant: its interval is a point
    {"dppl<=5%", {0.05, 0, 0.05, 0.05}, KVQ_PASS, KVQ_PASS, 0},
    {"dppl<=4%", {0.05, 0, 0.05, 0.05}, KVQ_FAIL, KVQ_FAIL, 0},
    // one window; nothing measured; an overflow
    {"dppl<=10%", {0.05, NAN, NAN, NAN}, KVQ_INCONCLUSIVE, KVQ_PASS, NAN},
    {"dppl<=5%", {0.05, NAN, NAN, NAN}, KVQ_INCONCLUSIVE, KVQ_PASS, NAN},
    {"dppl<=2%", {0.05, NAN, NAN, NAN}, KVQ_INCONCLUSIVE, KVQ_FAIL, NAN},
    {"dppl<=2%", {NAN, NAN, NAN, NAN}, KVQ_FAIL, KVQ_FAIL, 0},
    {"dppl>=2%", {NAN, NAN, NAN, NAN}, KVQ_FAIL, KVQ_FAIL, 0},
    {"dppl<=2%", {HUGE_VAL, NAN, NAN, NAN}, KVQ_FAIL, KVQ_FAIL, 0},
};
enum { N_JUDGINGS = (int)(sizeof JUDGINGS / sizeof *JUDGINGS) };

START_TEST(gates_are_judged) {
    const judging *c = &JUDGINGS[_i];
    kvq_validation v = {.has_artifact = true, .dppl = c->dppl, .tokens_scored = 1000};
    kvq_gate       gate = parsed(c->expression);
    kvq_judgement  interval = kvq_gate_judge(&gate, &v, false), point = kvq_gate_judge(&gate, &v, true);
    ck_assert_str_eq(kvq_verdict_names[interval.verdict], kvq_verdict_names[c->by_interval]);
    ck_assert_str_eq(kvq_verdict_names[point.verdict], kvq_verdict_names[c->by_point]);
    ck_assert(point.tokens_to_decide == 0);
    ck_assert_mem_eq(&interval.measured, &c->dppl, sizeof c->dppl);
    if (isfinite(c->tokens)) {
        ck_assert_double_eq_tol(interval.tokens_to_decide, c->tokens, 1e-9 * c->tokens + 1e-30);
    } else {
        ck_assert(isnan(c->tokens) ? isnan(interval.tokens_to_decide) : interval.tokens_to_decide == c->tokens);
    }
}
END_TEST

// Every metric is its own field.
START_TEST(metrics_are_what_their_names_say) {
    kvq_layer_errors layers[] = {{.attention_error = {0.20, 0, 0.1, 0.3}},
                                 {.attention_error = {0.24, 0, 0.2, 0.3}},
                                 {.attention_error = {0.22, 0, 0.2, 0.3}}};
    kvq_validation   v = {.has_artifact = true,
                          .baseline_ppl = {1},
                          .quantized_ppl = {2},
                          .dppl = {0.03},
                          .kld = {4},
                          .kld_quantiles = {{5}, {6}, {7}, {8}},
                          .kld_max = 9,
                          .top1 = {0.10},
                          .top5 = {0.11},
                          .dp_rms = {0.12},
                          .n_layers = 3,
                          .layers = layers,
                          .effective_bits = 13,
                          .has_regression = true,
                          .regression_ppl = {0.14},
                          .regression_kld = {0.15}};
    const struct {
        const char *expression;
        double      value;
    } metrics[] = {{"ppl<=1", 2},
                   {"dppl<=1", 0.03},
                   {"kld.mean<=1", 4},
                   {"kld.median<=1", 5},
                   {"kld.p90<=1", 6},
                   {"kld.p99<=1", 7},
                   {"kld.p99.9<=1", 8},
                   {"kld.max<=1", 9},
                   {"top1<=1", 0.10},
                   {"top5<=1", 0.11},
                   {"dp.rms<=1", 0.12},
                   {"layer.attn_err.max<=1", 0.24},
                   {"effective_bits<=1", 13},
                   {"regression.ppl<=1", 0.14},
                   {"regression.kld<=1", 0.15}};
    for (size_t i = 0; i < sizeof metrics / sizeof *metrics; i++) {
        kvq_gate gate = parsed(metrics[i].expression);
        ck_assert(kvq_gate_judge(&gate, &v, true).measured.value == metrics[i].value);
    }
    ck_assert_int_eq((int)(sizeof metrics / sizeof *metrics), 15);
}
END_TEST

// The largest KL and the bits have no scatter: even of a single window they pass or fail.
START_TEST(exact_metrics_are_always_decided) {
    kvq_validation v = {.has_artifact = true, .kld_max = 3, .effective_bits = 3.4, .tokens_scored = 10};
    const struct {
        const char *expression;
        kvq_verdict verdict;
    } cases[] = {{"kld.max<=3", KVQ_PASS},
                 {"kld.max<=2.9", KVQ_FAIL},
                 {"effective_bits<=3.5", KVQ_PASS},
                 {"effective_bits>=3.5", KVQ_FAIL}};
    for (int by_point = 0; by_point < 2; by_point++) {
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            kvq_gate gate = parsed(cases[i].expression);
            ck_assert_int_eq(kvq_gate_judge(&gate, &v, by_point).verdict, cases[i].verdict);
        }
    }
}
END_TEST

// Without an artifact, layers or an earlier report nothing was compared, so a gate on that cannot pass.
START_TEST(a_gate_on_nothing_fails) {
    const char    *gates[] = {"dppl<=10%", "kld.max<=1", "effective_bits<=9", "top1>=0"};
    const char    *more[] = {"layer.attn_err.max<=1", "regression.ppl<=1", "regression.kld<=1"};
    kvq_validation v = {.has_artifact = false, .baseline_ppl = {5, 0.1, 4.8, 5.2}};
    for (int i = 0; i < 4; i++) {
        kvq_gate      gate = parsed(gates[i]);
        kvq_judgement j = kvq_gate_judge(&gate, &v, i % 2 == 0);
        ck_assert_int_eq(j.verdict, KVQ_FAIL);
        ck_assert(isnan(j.measured.value));
    }
    kvq_gate gate = parsed("ppl<=10");
    ck_assert_int_eq(kvq_gate_judge(&gate, &v, false).verdict, KVQ_PASS);
    ck_assert(kvq_gate_judge(&gate, &v, false).measured.value == 5);
    v.has_artifact = true;
    for (int i = 0; i < 3; i++) {
        gate = parsed(more[i]);
        ck_assert_int_eq(kvq_gate_judge(&gate, &v, false).verdict, KVQ_FAIL);
        ck_assert_int_eq(kvq_gate_judge(&gate, &v, true).verdict, KVQ_FAIL);
    }
}
END_TEST

// The worst of all layers, unless one is not known; only some windows are measured layer by layer, and tokens are
// those.
START_TEST(the_worst_layer_counts) {
    kvq_layer_errors layers[] = {{.attention_error = {0.10, 0.01, 0.05, 0.15}},
                                 {.attention_error = {0.20, 0.01, 0.16, 0.28}},
                                 {.attention_error = {0.15, 0.01, 0.14, 0.16}}};
    kvq_validation   v = {.has_artifact = true,
                          .options = {.layer_windows = 2},
                          .n_scored = 50,
                          .tokens_scored = 1000,
                          .n_layers = 3,
                          .layers = layers};
    kvq_gate         gate = parsed("layer.attn_err.max<=24%");
    kvq_judgement    j = kvq_gate_judge(&gate, &v, false);
    ck_assert_int_eq(j.verdict, KVQ_INCONCLUSIVE);
    ck_assert_double_eq_tol(j.tokens_to_decide, 4 * 2 * 50, 1e-9);
    layers[1].attention_error = (kvq_estimate){NONE, NONE, NONE, NONE};
    ck_assert_int_eq(kvq_gate_judge(&gate, &v, false).verdict, KVQ_FAIL);
    ck_assert_int_eq(kvq_gate_judge(&gate, &v, true).verdict, KVQ_FAIL);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(gates_are_read, N_READINGS),       KVQ_CASE(what_is_no_gate_is_refused),
    KVQ_LOOP(gates_are_judged, N_JUDGINGS),     KVQ_CASE(metrics_are_what_their_names_say),
    KVQ_CASE(exact_metrics_are_always_decided), KVQ_CASE(a_gate_on_nothing_fails),
    KVQ_CASE(the_worst_layer_counts),
};
KVQ_TEST_MAIN("gates", CASES)
