// SPDX-License-Identifier: Apache-2.0
// Windows that hide a pass key: their length, where the key lies, that their ids are those of their text; and what
// counts as retrieved.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_decoder.h"
#include "kvq_test.h"
#include "small_model.h"

static const double DEPTHS[] = {0, 0.25, 0.5, 0.75, 1};
enum { N_DEPTHS = 5, N_TRIALS = 3 };
static const char NEEDLE[] = " The pass key is ", QUESTION[] = " What is the pass key? The pass key is";

// ---------------------------------------------------------------- windows as text

// Byte-level and SentencePiece vocabularies write a blank as U+0120 or U+2581; all else is ASCII here.
static void append_spelling(const kvq_tokenizer *tokenizer, int64_t id, char *out, size_t size) {
    char spelling[64];
    kvq_tokenizer_spelling(tokenizer, id, spelling, sizeof spelling);
    for (const char *at = spelling; *at != 0;) {
        bool   blank = strncmp(at, "\xc4\xa0", 2) == 0 || strncmp(at, "\xe2\x96\x81", 3) == 0;
        size_t n = strlen(out);
        ck_assert(n + 2 < size && (blank || (unsigned char)*at < 128));
        out[n] = blank ? ' ' : *at;
        out[n + 1] = 0;
        at += !blank ? 1 : *at == '\xc4' ? 2 : 3;
    }
}

static char *text_of(const kvq_tokenizer *tokenizer, const int32_t *ids, int64_t n) {
    size_t size = (size_t)n * 64 + 16;
    char  *text = calloc(size, 1);
    for (int64_t i = 0; i < n; i++) append_spelling(tokenizer, ids[i], text, size);
    return text;
}

static int count(const char *text, const char *what) {
    int n = 0;
    for (const char *at = strstr(text, what); at != NULL; at = strstr(at + 1, what)) n++;
    return n;
}

// The text from the needle to the answer gives, behind a full stop, the very ids of the window.
static void expect_ids_of_text(const kvq_tokenizer *tokenizer, const char *text, const int32_t *ids, int64_t n) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     again = {NULL, 0, 0}, stop = {NULL, 0, 0};
    char       *joined = malloc(strlen(text) + 2);
    (void)sprintf(joined, ".%s", text);
    kvq_test_ok(kvq_tokenizer_encode(&ctx, tokenizer, ".", 1, false, &stop, &err), &err);
    kvq_test_ok(kvq_tokenizer_encode(&ctx, tokenizer, joined, strlen(joined), false, &again, &err), &err);
    ck_assert_int_eq(again.count, stop.count + n);
    ck_assert_mem_eq(again.data + stop.count, ids, (size_t)n * sizeof *ids);
    kvq_ids_free(&ctx, &again);
    kvq_ids_free(&ctx, &stop);
    free(joined);
}

static void expect_window(const kvq_tokenizer *tokenizer, const kvq_passkeys *keys, int64_t window) {
    const int32_t *ids = keys->windows.ids + window * keys->windows.seq_len;
    int64_t        needle = keys->needle_at[window], end = keys->answer_at + keys->n_answer[window];
    char          *before = text_of(tokenizer, ids, needle), *after = text_of(tokenizer, ids + needle, end - needle);
    char           key[16], needle_text[64], tail[96];
    ck_assert(keys->keys[window] >= 10000 && keys->keys[window] <= 99999);
    ck_assert(keys->n_answer[window] >= 1 && end <= keys->windows.seq_len);
    (void)snprintf(key, sizeof key, "%d", (int)keys->keys[window]);
    (void)snprintf(needle_text, sizeof needle_text, "%s%s.", NEEDLE, key);
    (void)snprintf(tail, sizeof tail, "%s %s", QUESTION, key);
    ck_assert_int_eq(strncmp(after, needle_text, strlen(needle_text)), 0);
    ck_assert_str_eq(after + strlen(after) - strlen(tail), tail);
    const char *behind = strstr(after, "is the pass key.") + 16;
    ck_assert(behind[0] == ' ' && behind[1] >= 'A' && behind[1] <= 'Z'); // a whole sentence
    ck_assert_int_eq(count(after, key), 3);                              // twice in the needle, once as the answer
    ck_assert_int_eq(count(before, key), 0);
    ck_assert_int_eq(before[strlen(before) - 1], '.'); // between two sentences
    expect_ids_of_text(tokenizer, after, ids + needle, end - needle);
    char *answer = text_of(tokenizer, ids + keys->answer_at, keys->n_answer[window]);
    ck_assert_str_eq(answer + (answer[0] == ' '), key); // the key is what is scored
    free(before), free(after), free(answer);
}

// ---------------------------------------------------------------- making them

typedef struct rig {
    kvq_context      ctx;
    kvq_tokenizer   *tokenizer;
    kvq_passkey_rule rule;
} rig;

static void rig_open(rig *r, const char *path, int64_t seq_len) {
    kvq_error        err = {0};
    char             made[256];
    kvq_make_options options = kvq_make_options_default();
    *r = (rig){.ctx = kvq_test_context(),
               .rule = {.seq_len = seq_len,
                        .depths = DEPTHS,
                        .n_depths = N_DEPTHS,
                        .n_trials = N_TRIALS,
                        .seed = 5,
                        .bos_id = -1,
                        .vocab_size = 1 << 20}};
    if (path == NULL) {
        (void)snprintf(made, sizeof made, "%s/model", kvq_test_folder());
        kvq_make_model_hf(&options, made);
        path = made;
    }
    kvq_test_ok(kvq_tokenizer_open(&r->ctx, path, &r->tokenizer, &err), &err);
}

static void make(const rig *r, kvq_passkeys *keys) {
    kvq_error err = {0};
    kvq_test_ok(kvq_passkeys_make(&r->ctx, r->tokenizer, &r->rule, keys, &err), &err);
}

static void rig_close(rig *r) { kvq_tokenizer_close(&r->ctx, &r->tokenizer); }

static void expect_windows(rig *r) {
    kvq_passkeys keys;
    int64_t      S = r->rule.seq_len;
    make(r, &keys);
    ck_assert_int_eq(keys.windows.seq_len, S);
    ck_assert_int_eq(keys.windows.n_windows, N_DEPTHS * N_TRIALS);
    ck_assert_int_eq(keys.answer_at, S - KVQ_PASSKEY_ROOM);
    ck_assert_str_eq(keys.windows.source, "passkey");
    ck_assert_uint_eq(strlen(keys.windows.ids_sha256), 64);
    ck_assert_int_eq(keys.n_depths, N_DEPTHS);
    ck_assert_mem_eq(keys.depths, DEPTHS, sizeof DEPTHS);
    for (int64_t w = 0; w < keys.windows.n_windows; w++) expect_window(r->tokenizer, &keys, w);
    kvq_passkeys_free(&r->ctx, &keys);
    ck_assert_ptr_null(keys.windows.ids);
}

static const int64_t LENGTHS[] = {360, 400, 401, 402, 512, 1000, 4096};
START_TEST(windows_have_their_length_and_their_ids_are_those_of_the_text) {
    rig r;
    rig_open(&r, NULL, LENGTHS[_i]);
    expect_windows(&r);
    rig_close(&r);
}
END_TEST

// SentencePiece, which would put a blank in front of every part, with single digits.
START_TEST(sentencepiece_windows_are_those_of_the_text) {
    rig  r;
    char path[1024];
    kvq_test_shared_path(path, sizeof path, "models/stories15M");
    rig_open(&r, path, 300);
    expect_windows(&r);
    rig_close(&r);
}
END_TEST

START_TEST(smollm2_windows_are_those_of_the_text) {
    rig r;
    rig_open(&r, kvq_test_smollm2(), 1024);
    expect_windows(&r);
    rig_close(&r);
}
END_TEST

// Where the introduction ends.
static int64_t introduction_end(const kvq_tokenizer *tokenizer, const int32_t *ids) {
    char text[4096] = "";
    for (int64_t n = 0;; n++) {
        if (strstr(text, "at the end.") != NULL) return n;
        append_spelling(tokenizer, ids[n], text, sizeof text);
    }
}

// The needle lies where the depth says, to within half of the longest sentence (at the beginning, where it does not
// touch a sentence that was cut, a whole one); at the end exactly. Keys have five digits, which are as many tokens
// here, so that all needles are equally long.
START_TEST(the_needle_lies_at_its_depth) {
    enum { S = 2000, LONGEST = 64 };
    rig          r;
    kvq_passkeys keys;
    rig_open(&r, NULL, S);
    make(&r, &keys);
    int64_t first = introduction_end(r.tokenizer, keys.windows.ids), last = keys.needle_at[4 * N_TRIALS];
    for (int64_t w = 0; w < N_DEPTHS * N_TRIALS; w++) {
        int    depth = (int)(w / N_TRIALS);
        double wanted = (double)first + DEPTHS[depth] * (double)(last - first);
        double reach = depth == 0 ? LONGEST : depth == N_DEPTHS - 1 ? 0.5 : 0.5 * LONGEST;
        ck_assert_double_eq_tol((double)keys.needle_at[w], wanted, reach);
    }
    char *head = text_of(r.tokenizer, keys.windows.ids + first, keys.needle_at[0] - first);
    ck_assert_int_le(count(head, "."), 1); // depth 0: at most a sentence, or the rest of one
    int64_t window = 4 * N_TRIALS;
    char   *tail = text_of(r.tokenizer, keys.windows.ids + window * S + last, S - KVQ_PASSKEY_ROOM - last);
    ck_assert_int_eq(count(tail, "."), 2); // depth 1: the two sentences of the needle, then the question
    ck_assert_str_eq(tail + strlen(tail) - strlen(QUESTION), QUESTION);
    free(head), free(tail);
    kvq_passkeys_free(&r.ctx, &keys);
    rig_close(&r);
}
END_TEST

START_TEST(a_window_depends_on_its_place_alone) {
    enum { S = 512 };
    static const double OTHER[] = {0.75, 0.1};
    rig                 r;
    kvq_passkeys        keys, again, some;
    rig_open(&r, NULL, S);
    make(&r, &keys);
    make(&r, &again);
    ck_assert_mem_eq(keys.windows.ids, again.windows.ids, N_DEPTHS * N_TRIALS * S * sizeof(int32_t));
    ck_assert_str_eq(keys.windows.ids_sha256, again.windows.ids_sha256);
    for (int64_t a = 0; a < N_DEPTHS * N_TRIALS; a++) { // 15 of 90000 keys: this seed has no equal ones
        for (int64_t b = 0; b < a; b++) ck_assert_int_ne(keys.keys[a], keys.keys[b]);
    }
    r.rule.depths = OTHER;
    r.rule.n_depths = 2;
    r.rule.n_trials = 2;
    make(&r, &some);
    ck_assert_mem_eq(some.windows.ids, keys.windows.ids + 3 * N_TRIALS * S, 2 * S * sizeof(int32_t));
    ck_assert_int_eq(some.keys[1], keys.keys[3 * N_TRIALS + 1]);
    kvq_passkeys_free(&r.ctx, &again);
    kvq_passkeys_free(&r.ctx, &some);
    r.rule.seed++;
    make(&r, &again);
    ck_assert_int_ne(again.keys[0], keys.keys[3 * N_TRIALS]);
    kvq_passkeys_free(&r.ctx, &again);
    r.rule.seed--;
    r.rule.seq_len++;
    make(&r, &again);
    ck_assert_int_ne(again.keys[0], keys.keys[3 * N_TRIALS]);
    kvq_passkeys_free(&r.ctx, &again);
    kvq_passkeys_free(&r.ctx, &keys);
    rig_close(&r);
}
END_TEST

START_TEST(a_bos_token_takes_position_zero_and_counts) {
    rig          r;
    kvq_passkeys keys, without;
    rig_open(&r, NULL, 512);
    make(&r, &without);
    r.rule.bos_id = KVQ_MAKE_BOS;
    make(&r, &keys);
    ck_assert(keys.windows.bos_added && !without.windows.bos_added);
    for (int64_t w = 0; w < keys.windows.n_windows; w++) {
        ck_assert_int_eq(keys.windows.ids[w * 512], KVQ_MAKE_BOS);
        ck_assert_int_eq(keys.windows.ids[w * 512 + 1], without.windows.ids[w * 512]);
    }
    ck_assert_int_eq(keys.needle_at[14], without.needle_at[14]); // its end is where it was
    kvq_passkeys_free(&r.ctx, &keys);
    kvq_passkeys_free(&r.ctx, &without);
    rig_close(&r);
}
END_TEST

START_TEST(what_cannot_be_made_is_refused) {
    static const double WRONG[] = {-0.01, 1.01, NAN};
    rig                 r;
    kvq_error           err = {0};
    kvq_passkeys        keys = {.n_depths = 77};
    long long           shortest = 0;
    rig_open(&r, NULL, 40);
    kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_USAGE, &err,
                    "windows of 40 tokens; with this tokenizer the shortest that have filler have ");
    ck_assert_int_eq(sscanf(strstr(err.message, "filler have ") + 12, "%lld", &shortest), 1);
    r.rule.seq_len = shortest - 1;
    kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_USAGE, &err, "shortest");
    r.rule.seq_len = 0;
    kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_USAGE, &err, "0 tokens");
    r.rule.seq_len = shortest;
    r.rule.vocab_size = 200;
    kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_MISMATCH, &err,
                    "vocabulary has 200");
    r.rule.vocab_size = KVQ_MAKE_N_TOKENS;
    r.rule.n_trials = 0;
    kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_USAGE, &err, "0 trials");
    r.rule.n_trials = KVQ_MAX_PASSKEY_TRIALS + 1;
    kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_USAGE, &err, "65537 trials");
    r.rule.n_trials = 1;
    r.rule.n_depths = 1;
    for (int i = 0; i < 3; i++) {
        r.rule.depths = &WRONG[i];
        kvq_test_failed(kvq_passkeys_make(&r.ctx, r.tokenizer, &r.rule, &keys, &err), KVQ_ERR_USAGE, &err,
                        "not between 0 and 1");
    }
    ck_assert_int_eq(keys.n_depths, 77); // untouched
    r.rule.depths = DEPTHS;
    make(&r, &keys); // the length that was named
    expect_window(r.tokenizer, &keys, 0);
    kvq_passkeys_free(&r.ctx, &keys);
    rig_close(&r);
}
END_TEST

// ---------------------------------------------------------------- retrieval

enum { S = 24, AT = S - KVQ_PASSKEY_ROOM, N = 6 };

typedef struct machine {
    kvq_context             ctx;
    kvq_backend            *be;
    kvq_checkpoint         *checkpoint;
    kvq_model              *model;
    const kvq_model_config *c;
    kvq_artifact           *a;
} machine;

static void fill_tensor(machine *m, kvq_tensor_quant *t, kvq_axis axis) {
    static const float LEVELS[] = {-1, -0.33f, 0.33f, 1};
    *t = (kvq_tensor_quant){.bits = 2, .axis = axis, .n_groups = 1, .dim = 1, .n_levels = 4};
    kvq_test_ok(KVQ_NEW(&m->ctx, 4, "levels", &t->codebook, NULL), NULL);
    memcpy(t->codebook, LEVELS, sizeof LEVELS);
    if (axis == KVQ_AXIS_TOKEN) return;
    int64_t d = (int64_t)m->c->n_kv_heads * m->c->head_dim;
    kvq_test_ok(KVQ_NEW(&m->ctx, d, "lower", &t->lower, NULL), NULL);
    kvq_test_ok(KVQ_NEW(&m->ctx, d, "upper", &t->upper, NULL), NULL);
    for (int64_t i = 0; i < d; i++) t->upper[i] = -(t->lower[i] = -4);
}

// A small random model, and an artifact whose two bits ruin it unless all tokens are sinks, which are kept in f16.
static void machine_open(machine *m) {
    kvq_error        err = {0};
    kvq_make_options options = kvq_make_options_default();
    *m = (machine){.ctx = kvq_test_context()};
    small_model_open(&m->ctx, &options, true, &m->be, &m->checkpoint, &m->model);
    m->c = kvq_model_describe(m->model);
    kvq_test_ok(kvq_artifact_create(&m->ctx, m->c->n_layers, &m->a, &err), &err);
    m->a->model.n_kv_heads = m->c->n_kv_heads;
    m->a->model.head_dim = m->c->head_dim;
    for (int64_t l = 0; l < m->c->n_layers; l++) {
        fill_tensor(m, &m->a->layers[l].k, KVQ_AXIS_CHANNEL);
        fill_tensor(m, &m->a->layers[l].v, KVQ_AXIS_TOKEN);
    }
}

static void machine_close(machine *m) {
    kvq_artifact_destroy(&m->ctx, &m->a);
    small_model_close(&m->ctx, &m->be, &m->checkpoint, &m->model);
}

// Fills ids [S] from AT on with what the model chooses itself, token by token.
static void decode_greedily(machine *m, int32_t *ids) {
    kvq_error   err = {0};
    kvq_decode *decode = NULL;
    kvq_test_ok(kvq_decode_create(m->model, 1, S, &decode, &err), &err);
    for (int64_t t = 0; t < S - 1; t++) {
        const float *logits;
        kvq_test_ok(kvq_decode_step(m->model, decode, ids + t, &logits, &err), &err);
        int32_t best = 0;
        for (int32_t i = 1; i < m->c->vocab_size; i++) best = logits[i] > logits[best] ? i : best;
        if (t + 1 >= AT) ids[t + 1] = best;
    }
    kvq_decode_destroy(m->model, &decode);
}

// Answers that the model gives itself are retrieved, and no others; what stands behind an answer does not matter. With
// all tokens in f16 the cache retrieves the same; with two bits everywhere this model retrieves nothing.
START_TEST(retrieved_is_what_greedy_decoding_gives) {
    static const int  WRONG[N] = {-1, 3, 3, 0, 4, 1}; // which token is replaced by another one
    static const bool HIT[N] = {true, false, true, false, true, false};
    int32_t           n_answer[N] = {4, 4, 3, 4, 4, 2}, ids[N * S];
    double            depths[] = {0, 1};
    machine           m;
    kvq_error         err = {0};
    kvq_passkey_cell  cells[2];
    kvq_passkeys      keys = {.windows = {.n_windows = N, .seq_len = S, .ids = ids, .source = "passkey"},
                              .n_depths = 2,
                              .n_trials = 3,
                              .depths = depths,
                              .answer_at = AT,
                              .n_answer = n_answer};
    machine_open(&m);
    for (int w = 0; w < N; w++) {
        int32_t *window = ids + (int64_t)w * S;
        for (int64_t t = 0; t < AT; t++)
            window[t] = (int32_t)kvq_rng_below(3, KVQ_RNG_TEST, 90, (uint64_t)(w * S + t), (uint64_t)m.c->vocab_size);
        decode_greedily(&m, window);
        if (WRONG[w] >= 0) window[AT + WRONG[w]] = (window[AT + WRONG[w]] + 1) % (int32_t)m.c->vocab_size;
    }
    m.a->quantizer.sink_tokens = S;
    kvq_test_ok(kvq_validate_passkey(&m.ctx, m.be, m.model, m.a, &keys, cells, &err), &err);
    for (int i = 0; i < 2; i++) {
        int hits = HIT[3 * i] + HIT[3 * i + 1] + HIT[3 * i + 2];
        ck_assert(cells[i].seq_len == S && cells[i].depth == depths[i] && cells[i].n_trials == 3);
        ck_assert_int_eq(cells[i].baseline, hits);
        ck_assert_int_eq(cells[i].quantized, hits);
        ck_assert_int_eq(cells[i].both, hits);
    }
    m.a->quantizer.sink_tokens = 0;
    kvq_test_ok(kvq_validate_passkey(&m.ctx, m.be, m.model, m.a, &keys, cells, &err), &err);
    ck_assert(cells[0].baseline == 2 && cells[0].quantized == 0 && cells[0].both == 0);
    ck_assert(cells[1].baseline == 1 && cells[1].quantized == 0 && cells[1].both == 0);
    kvq_test_failed(kvq_validate_passkey(&m.ctx, m.be, m.model, NULL, &keys, cells, &err), KVQ_ERR_USAGE, &err,
                    "no cache");
    machine_close(&m);
}
END_TEST

// Wilson's interval: published for 9 of 10 and 10 of 10 as 0.596 .. 0.982 and 0.722 .. 1.
START_TEST(the_share_kept_is_of_what_the_baseline_retrieves) {
    kvq_passkey_cell cells[] = {{.n_trials = 9, .baseline = 4, .quantized = 8, .both = 3},
                                {.n_trials = 9, .baseline = 6, .quantized = 7, .both = 6}};
    kvq_estimate     x = kvq_passkey_kept(cells, 2);
    ck_assert_double_eq_tol(x.value, 0.9, 1e-15);
    ck_assert_double_eq_tol(x.stderr_, sqrt(0.09 / 10), 1e-15);
    ck_assert_double_eq_tol(x.low, 0.59585, 1e-5);
    ck_assert_double_eq_tol(x.high, 0.98212, 1e-5);
    cells[0].both = 4;
    x = kvq_passkey_kept(cells, 2);
    ck_assert(x.value == 1 && x.high == 1 && x.stderr_ == 0);
    ck_assert_double_eq_tol(x.low, 0.72247, 1e-5);
    cells[0].both = cells[1].both = 0;
    x = kvq_passkey_kept(cells, 2);
    ck_assert(x.value == 0 && x.low == 0);
    ck_assert_double_eq_tol(x.high, 0.27753, 1e-5);
    cells[0].baseline = cells[1].baseline = 0;
    x = kvq_passkey_kept(cells, 2);
    ck_assert(isnan(x.value) && isnan(x.stderr_) && isnan(x.low) && isnan(x.high));
}
END_TEST

// A share of nothing fails; an interval across the limit is inconclusive.
START_TEST(the_gate_fails_when_the_baseline_retrieves_none) {
    static const struct {
        int64_t     baseline, both;
        kvq_verdict by_interval, by_point;
    } CASES[] = {{0, 0, KVQ_FAIL, KVQ_FAIL},
                 {10, 10, KVQ_INCONCLUSIVE, KVQ_PASS},
                 {100, 100, KVQ_PASS, KVQ_PASS},
                 {100, 50, KVQ_FAIL, KVQ_FAIL}};
    kvq_gate  gate;
    kvq_error err = {0};
    kvq_test_ok(kvq_gate_parse("passkey>=90%", &gate, &err), &err);
    ck_assert(kvq_gate_needs_artifact(&gate));
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        kvq_passkey_cell cell = {.n_trials = 200, .baseline = CASES[i].baseline, .both = CASES[i].both};
        kvq_validation   v = {.has_artifact = true, .has_passkey = true, .passkey = kvq_passkey_kept(&cell, 1)};
        ck_assert_int_eq(kvq_gate_judge(&gate, &v, false).verdict, CASES[i].by_interval);
        ck_assert_int_eq(kvq_gate_judge(&gate, &v, true).verdict, CASES[i].by_point);
        v.has_passkey = false; // a text was measured
        ck_assert_int_eq(kvq_gate_judge(&gate, &v, false).verdict, KVQ_FAIL);
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(windows_have_their_length_and_their_ids_are_those_of_the_text, 7),
    KVQ_GOLDEN_CASE(sentencepiece_windows_are_those_of_the_text),
    KVQ_SMOLLM2_CASE(smollm2_windows_are_those_of_the_text),
    KVQ_CASE(the_needle_lies_at_its_depth),
    KVQ_CASE(a_window_depends_on_its_place_alone),
    KVQ_CASE(a_bos_token_takes_position_zero_and_counts),
    KVQ_CASE(what_cannot_be_made_is_refused),
    KVQ_CASE(retrieved_is_what_greedy_decoding_gives),
    KVQ_CASE(the_share_kept_is_of_what_the_baseline_retrieves),
    KVQ_CASE(the_gate_fails_when_the_baseline_retrieves_none),
};
KVQ_TEST_MAIN("passkey", CASES)
