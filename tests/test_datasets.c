// SPDX-License-Identifier: Apache-2.0
// Windows of token lists, as Python draws them, held out; text a model writes itself; and token ids from NumPy files.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_datasets.h"
#include "python_random.h"
#include "units.h"
#include "windows_impl.h"

// The ids 0, 1, 2, ...: a window's content tells where it lies.
static kvq_ids counting(int64_t n) {
    kvq_ids ids = {malloc((size_t)n * sizeof(int32_t)), n, n};
    for (int64_t i = 0; i < n; i++) ids.data[i] = (int32_t)i;
    return ids;
}

// ---------------------------------------------------------------- consecutive windows

START_TEST(consecutive_windows_cover_the_text_in_order) {
    static const struct {
        int64_t n_ids, seq_len, n_max, n_windows;
    } CASES[] = {{100, 10, 0, 10}, {109, 10, 0, 10}, {100, 10, 3, 3},
                 {10, 10, 0, 1},   {100, 1, 0, 100}, {100, 10, 99, 10}};
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    for (size_t k = 0; k < sizeof CASES / sizeof *CASES; k++) {
        kvq_ids     ids = counting(CASES[k].n_ids);
        kvq_windows w = {0};
        char        hex[KVQ_SHA256_HEX];
        kvq_test_ok(kvq_windows_consecutive(&ctx, &ids, CASES[k].seq_len, CASES[k].n_max, -1, &w, &err), &err);
        ck_assert_int_eq(w.n_windows, CASES[k].n_windows);
        ck_assert_int_eq(w.seq_len, CASES[k].seq_len);
        ck_assert_int_eq(w.n_available, CASES[k].n_ids);
        ck_assert(!w.bos_added && w.source[0] == 0 && w.source_sha256[0] == 0);
        for (int64_t i = 0; i < w.n_windows * w.seq_len; i++) ck_assert_int_eq(w.ids[i], i);
        kvq_test_ok(kvq_sha256_of(ids.data, (size_t)(w.n_windows * w.seq_len) * 4, hex, &err), &err);
        ck_assert_str_eq(w.ids_sha256, hex);
        kvq_windows_free(&ctx, &w);
        ck_assert_ptr_null(w.ids);
        free(ids.data);
    }
}
END_TEST

START_TEST(bos_takes_position_zero_and_no_token_is_lost) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = counting(50);
    kvq_windows w = {0};
    kvq_test_ok(kvq_windows_consecutive(&ctx, &ids, 8, 0, 777, &w, &err), &err);
    ck_assert(w.bos_added);
    ck_assert_int_eq(w.n_windows, 7); // 50 / (8 - 1)
    for (int64_t i = 0; i < w.n_windows; i++) {
        ck_assert_int_eq(w.ids[i * 8], 777);
        for (int64_t j = 1; j < 8; j++) ck_assert_int_eq(w.ids[i * 8 + j], i * 7 + j - 1);
    }
    kvq_windows_free(&ctx, &w);
    free(ids.data);
}
END_TEST

START_TEST(windows_that_cannot_be_are_refused) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = counting(37), none = {0};
    kvq_windows w = {.n_windows = 5};
    kvq_test_failed(kvq_windows_consecutive(&ctx, &ids, 38, 0, -1, &w, &err), KVQ_ERR_INPUT, &err,
                    "37 tokens, but one window needs 38");
    kvq_test_failed(kvq_windows_drawn(&ctx, &ids, 39, 2, 1, 0, &w, &err), KVQ_ERR_INPUT, &err,
                    "37 tokens, but one window needs 38 and a beginning");
    kvq_test_failed(kvq_windows_drawn(&ctx, &none, 1, 1, 1, -1, &w, &err), KVQ_ERR_INPUT, &err, "0 tokens");
    kvq_test_failed(kvq_windows_consecutive(&ctx, &ids, 0, 0, -1, &w, &err), KVQ_ERR_USAGE, &err,
                    "windows of 0 tokens");
    kvq_test_failed(kvq_windows_consecutive(&ctx, &ids, 1, 0, 0, &w, &err), KVQ_ERR_USAGE, &err, "the shortest is 2");
    kvq_test_failed(kvq_windows_drawn(&ctx, &ids, INT64_MIN, 1, 1, -1, &w, &err), KVQ_ERR_USAGE, &err,
                    "windows of -9223372036854775808 tokens");
    kvq_test_failed(kvq_windows_drawn(&ctx, &ids, 8, 0, 1, -1, &w, &err), KVQ_ERR_USAGE, &err, "0 windows");
    kvq_test_failed(kvq_windows_drawn(&ctx, &ids, 8, INT64_MAX, 1, -1, &w, &err), KVQ_ERR_USAGE, &err,
                    "windows of 8 tokens");
    kvq_test_failed(kvq_windows_drawn(&ctx, &ids, 8, 1, 1, (int64_t)1 << 40, &w, &err), KVQ_ERR_USAGE, &err,
                    "beginning-of-text id");
    ck_assert_int_eq(w.n_windows, 5); // untouched
    free(ids.data);
}
END_TEST

// ---------------------------------------------------------------- drawn windows

// Start of window i, read off its content; the rest of the window must follow.
static int64_t start_of(const kvq_windows *w, int64_t i) {
    int64_t        skip = w->bos_added ? 1 : 0, start = w->ids[i * w->seq_len + skip];
    const int32_t *ids = w->ids + i * w->seq_len;
    for (int64_t j = skip; j < w->seq_len; j++) ck_assert_int_eq(ids[j], start + j - skip);
    return start;
}

START_TEST(drawn_windows_are_one_per_stratum_and_do_not_overlap) {
    enum { N_IDS = 10000, N = 16, S = 100 };
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = counting(N_IDS);
    for (int bos = 0; bos < 2; bos++) {
        int64_t step = S - bos, spare = N_IDS - N * step; // of the places [0, spare], stratum i has [i, i + 1) / N
        for (uint64_t seed = 0; seed < 50; seed++) {
            kvq_windows w = {0};
            kvq_test_ok(kvq_windows_drawn(&ctx, &ids, S, N, seed, bos ? 99999 : -1, &w, &err), &err);
            ck_assert_int_eq(w.bos_added, bos);
            for (int64_t i = 0; i < N; i++) {
                int64_t start = start_of(&w, i), free_before = start - i * step;
                if (bos) ck_assert_int_eq(w.ids[i * S], 99999);
                ck_assert_int_ge(free_before, (spare + 1) * i / N);
                ck_assert_int_lt(free_before, (spare + 1) * (i + 1) / N);
                if (i > 0) ck_assert_int_ge(start, start_of(&w, i - 1) + step);
            }
            kvq_windows_free(&ctx, &w);
        }
    }
    free(ids.data);
}
END_TEST

// Every token can be drawn, the first and the last too, but for one between neighbouring strata: there the last place
// of one window ends and the first place of the next begins one further on.
START_TEST(drawn_windows_reach_the_whole_text) {
    enum { N_IDS = 60, N = 3, S = 10 };
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = counting(N_IDS);
    int         seen[N_IDS] = {0};
    for (uint64_t seed = 0; seed < 300; seed++) {
        kvq_windows w = {0};
        kvq_test_ok(kvq_windows_drawn(&ctx, &ids, S, N, seed, -1, &w, &err), &err);
        for (int64_t i = 0; i < N * S; i++) seen[w.ids[i]]++;
        kvq_windows_free(&ctx, &w);
    }
    for (int i = 0; i < N_IDS; i++)
        ck_assert_msg((seen[i] > 0) == (i != 19 && i != 39), "token %d is drawn %d times", i, seen[i]);
    free(ids.data);
}
END_TEST

START_TEST(drawn_windows_follow_the_seed_alone) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = counting(5000);
    kvq_windows a = {0}, b = {0}, c = {0};
    kvq_test_ok(kvq_windows_drawn(&ctx, &ids, 64, 8, 42, -1, &a, &err), &err);
    ctx.n_threads = 1;
    kvq_test_ok(kvq_windows_drawn(&ctx, &ids, 64, 8, 42, -1, &b, &err), &err);
    kvq_test_ok(kvq_windows_drawn(&ctx, &ids, 64, 8, 43, -1, &c, &err), &err);
    ck_assert_str_eq(a.ids_sha256, b.ids_sha256);
    ck_assert_str_ne(a.ids_sha256, c.ids_sha256);
    ck_assert_int_eq(start_of(&a, 0), 70); // as a separate Python program computes it
    ck_assert_int_eq(start_of(&a, 7), 4853);
    kvq_windows_free(&ctx, &a);
    kvq_windows_free(&ctx, &b);
    kvq_windows_free(&ctx, &c);
    free(ids.data);
}
END_TEST

// A text too short for all windows side by side still gives as many, spread out and sharing tokens.
START_TEST(short_texts_give_overlapping_windows) {
    static const int64_t LENGTHS[] = {10, 11, 13, 25, 99};
    kvq_context          ctx = kvq_test_context();
    kvq_error            err = {0};
    for (size_t k = 0; k < sizeof LENGTHS / sizeof *LENGTHS; k++) {
        kvq_ids     ids = counting(LENGTHS[k]);
        kvq_windows w = {0};
        kvq_test_ok(kvq_windows_drawn(&ctx, &ids, 10, 10, 7, -1, &w, &err), &err);
        for (int64_t i = 0; i < 10; i++) {
            ck_assert_int_le(start_of(&w, i), LENGTHS[k] - 10);
            if (i > 0) ck_assert_int_ge(start_of(&w, i), start_of(&w, i - 1));
        }
        kvq_windows_free(&ctx, &w);
        free(ids.data);
    }
}
END_TEST

// ---------------------------------------------------------------- drawn as Python does

// What python3 prints for r = random.Random(seed); [r.randint(0, last) for _ in range(n)].
START_TEST(python_numbers_are_those_of_python) {
    static const struct {
        uint64_t seed;
        int64_t  last, drawn[16];
        int      n;
    } CASES[] = {
        {0, 0, {0, 0, 0}, 3}, // a number that can only be 0 takes words all the same
        {0, 9, {6, 6, 0, 4, 8, 7, 6, 4}, 8},
        {123456789, 1, {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1}, 16},
        {1, INT32_MAX, {577090037, 271041745, 1095513148, 506456969}, 4},
        {7, UINT32_MAX, {647892279, 2795742288, 2301595691, 2179419893}, 4},
        {7, (int64_t)1 << 32, {647892279, 2795742288, 2301595691, 2179419893}, 4}, // 33 bits, two words
        {4294967301, 999, {161, 497, 289, 911, 618, 855}, 6},                      // a seed of two digits
        {UINT64_MAX, ((int64_t)1 << 62) - 1, {2294576949312773758, 4206446891363434577, 876381959062349251}, 3},
        {UINT64_MAX, INT64_MAX - 1, {2294576949312773758, 5706972812880472640, 4206446891363434577}, 3},
    };
    python_random r;
    for (size_t k = 0; k < sizeof CASES / sizeof *CASES; k++) {
        python_random_seed(&r, CASES[k].seed);
        for (int i = 0; i < CASES[k].n; i++)
            ck_assert_int_eq(python_random_up_to(&r, CASES[k].last), CASES[k].drawn[i]);
    }
    int64_t drawn[2000], sum = 0;
    python_random_seed(&r, 2026);
    for (int i = 0; i < 2000; i++) sum += drawn[i] = python_random_up_to(&r, 99999);
    ck_assert(drawn[623] == 13928 && drawn[624] == 42767 && drawn[625] == 63512); // a new set of words
    ck_assert(drawn[1999] == 60868 && sum == 101235205);
}
END_TEST

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void check_python_windows(int64_t n_ids, int64_t seq_len, int64_t bos_id, uint64_t seed, double *starts, int n) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_ids          ids = counting(n_ids);
    kvq_windows      w = {0};
    kvq_source_use   use = {0};
    kvq_token_source source = source_of_ids(&ids);
    kvq_window_rule  rule = {.seq_len = seq_len, .n_windows = n, .seed = seed, .bos_id = bos_id, .python_draw = true};
    bool             overlap = false;
    rule.n_heldout = 3;
    kvq_test_ok(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, &use, &w, &err), &err);
    qsort(starts, (size_t)n, sizeof *starts, by_value);
    for (int i = 0; i < n; i++) ck_assert_int_eq(start_of(&w, i), (int64_t)starts[i]);
    for (int i = 1; i < n; i++) overlap = overlap || starts[i] - starts[i - 1] < (double)(seq_len - (bos_id >= 0));
    ck_assert_int_eq(use.overlap, overlap);
    ck_assert(w.n_heldout == 0 && w.heldout_ids == NULL); // even where there would be room
    kvq_windows_free(&ctx, &w);
    free(ids.data);
}

START_TEST(windows_as_python_draws_them) {
    double starts[] = {4467, 204, 839, 912, 1143, 1828, 2006, 2253};
    check_python_windows(5000, 64, -1, 42, starts, 8);
    check_python_windows(5000, 65, 9, 42, starts, 8); // a beginning-of-text token is none of the text's
}
END_TEST

START_TEST(windows_of_the_reference_program) {
    cJSON       *units = units_read();
    const cJSON *example;
    int          n_examples = 0, n_windows = 0;
    cJSON_ArrayForEach(example, units_get(units, "randint")) {
        python_random r;
        int           n;
        double       *starts = units_array(example, "starts", &n);
        int64_t       n_ids = (int64_t)units_number(example, "n"), seq_len = (int64_t)units_number(example, "seqlen");
        uint64_t      seed = (uint64_t)units_number(example, "seed");
        python_random_seed(&r, seed);
        for (int i = 0; i < n; i++) ck_assert_int_eq(python_random_up_to(&r, n_ids - seq_len - 1), (int64_t)starts[i]);
        n_examples++;
        if (n_ids < 1000000) {
            check_python_windows(n_ids, seq_len, -1, seed, starts, n);
            n_windows++;
        }
        free(starts);
    }
    ck_assert_int_eq(n_examples, 8);
    ck_assert_int_eq(n_windows, 7); // one text of the reference is too long for a test
    cJSON_Delete(units);
}
END_TEST

START_TEST(what_python_cannot_draw_is_refused) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_ids          ids = counting(65);
    kvq_windows      w = {.n_windows = 5};
    kvq_token_source sources[] = {source_of_ids(&ids), source_of_ids(&ids)};
    kvq_window_rule  rule = {.seq_len = 65, .n_windows = 2, .bos_id = -1, .python_draw = true};
    kvq_test_failed(kvq_windows_draw(&ctx, sources, NULL, 1, &rule, NULL, &w, &err), KVQ_ERR_INPUT, &err,
                    "65 tokens, but one window as Python draws it needs 66");
    kvq_test_failed(kvq_windows_draw(&ctx, sources, NULL, 2, &rule, NULL, &w, &err), KVQ_ERR_USAGE, &err,
                    "not from several texts");
    kvq_test_failed(kvq_windows_take(&ctx, sources, NULL, 1, &rule, NULL, &w, &err), KVQ_ERR_USAGE, &err,
                    "consecutive windows are not drawn");
    rule.keep_documents = true;
    kvq_test_failed(kvq_windows_draw(&ctx, sources, NULL, 1, &rule, NULL, &w, &err), KVQ_ERR_USAGE, &err,
                    "documents that are kept apart");
    rule = (kvq_window_rule){.seq_len = 5, .n_windows = 2, .bos_id = -1, .n_heldout = -1};
    kvq_test_failed(kvq_windows_draw(&ctx, sources, NULL, 1, &rule, NULL, &w, &err), KVQ_ERR_USAGE, &err,
                    "-1 held-out windows");
    ck_assert_int_eq(w.n_windows, 5);
    free(ids.data);
}
END_TEST

// ---------------------------------------------------------------- held-out windows

static kvq_windows draw_with_heldout(int64_t n_ids, int64_t seq_len, int64_t n, int64_t n_heldout, uint64_t seed,
                                     int64_t bos_id) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    kvq_ids          ids = counting(n_ids);
    kvq_windows      w = {0};
    kvq_token_source source = source_of_ids(&ids);
    kvq_window_rule rule = {.seq_len = seq_len, .n_windows = n, .seed = seed, .bos_id = bos_id, .n_heldout = n_heldout};
    kvq_test_ok(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, NULL, &w, &err), &err);
    free(ids.data);
    return w;
}

static int64_t heldout_start(const kvq_windows *w, int64_t i) {
    kvq_windows view = *w;
    view.ids = w->heldout_ids;
    return start_of(&view, i);
}

// Against a search of its own: how wide the gap around each held-out window is, and that none left out was wider.
static void check_heldout(const kvq_windows *w, int64_t n_ids, int64_t n_wanted) {
    int64_t step = w->seq_len - w->bos_added, narrowest = INT64_MAX, widest_free = 0, n_room = 0, next = 0;
    for (int64_t i = 0; i <= w->n_windows; i++) {
        int64_t begin = i > 0 ? start_of(w, i - 1) + step : 0;
        int64_t width = (i < w->n_windows ? start_of(w, i) : n_ids) - begin;
        n_room += width >= step;
        if (next < w->n_heldout && heldout_start(w, next) < begin + width) {
            ck_assert_int_eq(heldout_start(w, next), begin + (width - step) / 2);
            ck_assert_int_ge(width, step);
            if (w->bos_added) ck_assert_int_eq(w->heldout_ids[next * w->seq_len], w->ids[0]);
            narrowest = width < narrowest ? width : narrowest;
            next++;
        } else {
            widest_free = width > widest_free ? width : widest_free;
        }
    }
    ck_assert_int_eq(next, w->n_heldout); // all lie in a gap, one in each, in the order of the text
    ck_assert_int_eq(w->n_heldout, n_room < n_wanted ? n_room : n_wanted);
    ck_assert(w->n_heldout < n_wanted ? widest_free < step : widest_free <= narrowest);
}

START_TEST(heldout_windows_lie_in_the_widest_gaps) {
    kvq_context ctx = kvq_test_context();
    int         n_short = 0;
    for (uint64_t seed = 0; seed < 200; seed++) {
        int64_t     n = 1 + (int64_t)seed % 9, n_wanted = 1 + (int64_t)seed % 5, n_ids = 150 + 7 * (int64_t)seed;
        int64_t     bos_id = seed % 2 == 1 ? 99999 : -1;
        kvq_windows w = draw_with_heldout(n_ids, 16, n, n_wanted, seed, bos_id);
        kvq_windows same = draw_with_heldout(n_ids, 16, n, n_wanted, seed, bos_id);
        kvq_windows without = draw_with_heldout(n_ids, 16, n, 0, seed, bos_id);
        check_heldout(&w, n_ids, n_wanted);
        n_short += w.n_heldout < n_wanted;
        ck_assert(memcmp(w.heldout_ids, same.heldout_ids, (size_t)w.n_heldout * 16 * sizeof(int32_t)) == 0);
        ck_assert(without.n_heldout == 0 && without.heldout_ids == NULL);
        ck_assert_str_eq(w.ids_sha256, without.ids_sha256);
        ck_assert(memcmp(w.ids, without.ids, (size_t)n * 16 * sizeof(int32_t)) == 0);
        kvq_windows_free(&ctx, &w);
        ck_assert(w.heldout_ids == NULL && w.n_heldout == 0);
        kvq_windows_free(&ctx, &same);
        kvq_windows_free(&ctx, &without);
    }
    ck_assert_int_gt(n_short, 10);
}
END_TEST

// One window that fills the text leaves no gap; of one window in the middle of twice as much, the two ends are too
// short by a token or just long enough; windows that overlap are followed by none.
START_TEST(heldout_windows_need_room) {
    kvq_context ctx = kvq_test_context();
    kvq_windows full = draw_with_heldout(10, 10, 1, 4, 1, -1), overlapping = draw_with_heldout(99, 10, 10, 4, 1, -1);
    ck_assert_int_eq(full.n_heldout, 0);
    ck_assert_int_eq(overlapping.n_heldout, 0);
    kvq_windows_free(&ctx, &full);
    kvq_windows_free(&ctx, &overlapping);
    for (uint64_t seed = 0; seed < 50; seed++) {
        kvq_windows w = draw_with_heldout(30, 10, 1, 4, seed, -1);
        int64_t     start = start_of(&w, 0);
        ck_assert_int_eq(w.n_heldout, (start >= 10) + (start <= 10));
        kvq_windows_free(&ctx, &w);
    }
}
END_TEST

// ---------------------------------------------------------------- self-generated text

enum { BOS = 1, EOS = 2, N_CALLS = 64, MAX_SEQS = 8 };

typedef struct fake_model { // writes id = 10 + floor(90 u), or EOS when u is small; remembers what it was given
    int64_t n_calls, n_seqs, fail_at;
    int32_t given[N_CALLS][MAX_SEQS], eos;
    double  u[N_CALLS][MAX_SEQS];
} fake_model;

static kvq_status fake_step(void *user, int64_t n_seqs, const int32_t *ids, const double *u, int32_t *next,
                            kvq_error *err) {
    fake_model *m = user;
    if (m->n_calls == m->fail_at) return kvq_fail(err, KVQ_ERR_NUMERICAL, NULL, "fake failure");
    m->n_seqs = n_seqs;
    for (int64_t i = 0; i < n_seqs; i++) {
        ck_assert(u[i] >= 0 && u[i] < 1);
        m->given[m->n_calls][i] = ids[i];
        m->u[m->n_calls][i] = u[i];
        next[i] = u[i] < 0.2 ? m->eos : 10 + (int32_t)(90 * u[i]);
    }
    m->n_calls++;
    return KVQ_OK;
}

static kvq_windows write_self(fake_model *m, int64_t n_windows, uint64_t seed, int64_t eos_id) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_windows w = {0};
    memset(m, 0, sizeof *m);
    m->eos = (int32_t)eos_id;
    m->fail_at = -1;
    kvq_test_ok(kvq_windows_self(&ctx, 32, n_windows, seed, BOS, eos_id, fake_step, m, &w, &err), &err);
    return w;
}

START_TEST(self_text_begins_with_bos_and_goes_on_after_eos) {
    static fake_model m;
    kvq_context       ctx = kvq_test_context();
    kvq_windows       w = write_self(&m, 4, 5, EOS);
    int               n_ends = 0;
    ck_assert(w.bos_added);
    ck_assert_int_eq(w.n_windows, 4);
    ck_assert_int_eq(w.n_available, 4 * 32);
    ck_assert_str_eq(w.source, "self");
    ck_assert_str_eq(w.source_sha256, "");
    ck_assert_uint_eq(strlen(w.ids_sha256), 64);
    ck_assert_int_eq(m.n_calls, 31); // the last token is not fed back
    for (int64_t i = 0; i < 4; i++) {
        ck_assert_int_eq(w.ids[i * 32], BOS);
        for (int64_t p = 1; p < 32; p++) {
            int32_t before = w.ids[i * 32 + p - 1], here = w.ids[i * 32 + p];
            ck_assert_int_eq(m.given[p - 1][i], before);
            n_ends += before == EOS;
            if (before == EOS) {
                ck_assert_int_eq(here, BOS);
            } else {
                ck_assert_int_eq(here, m.u[p - 1][i] < 0.2 ? EOS : 10 + (int32_t)(90 * m.u[p - 1][i]));
            }
        }
    }
    ck_assert_int_gt(n_ends, 3); // the rule was put to use
    kvq_windows_free(&ctx, &w);
}
END_TEST

// A model whose text begins and ends with one token must not write that token for ever.
START_TEST(self_text_with_one_token_for_both_ends_goes_on) {
    static fake_model m;
    kvq_context       ctx = kvq_test_context();
    kvq_windows       w = write_self(&m, 4, 5, BOS);
    for (int64_t i = 0; i < 4 * 32; i++) {
        if (i % 32 > 0)
            ck_assert_int_eq(w.ids[i],
                             m.u[i % 32 - 1][i / 32] < 0.2 ? BOS : 10 + (int32_t)(90 * m.u[i % 32 - 1][i / 32]));
    }
    kvq_windows_free(&ctx, &w);
}
END_TEST

START_TEST(self_text_depends_on_seed_window_and_position_alone) {
    static fake_model m;
    kvq_context       ctx = kvq_test_context();
    kvq_windows few = write_self(&m, 3, 9, EOS), many = write_self(&m, 8, 9, EOS), other = write_self(&m, 3, 10, EOS);
    ck_assert(memcmp(few.ids, many.ids, 3 * 32 * sizeof(int32_t)) ==
              0); // the batch it is written in makes no difference
    ck_assert_str_ne(few.ids_sha256, other.ids_sha256);
    ck_assert(memcmp(few.ids, few.ids + 32, 32 * sizeof(int32_t)) != 0);
    for (int p = 1; p < 32; p++) ck_assert(m.u[p - 1][2] == kvq_rng_uniform(10, KVQ_RNG_SELF_TEXT, 2, (uint64_t)p));
    kvq_windows_free(&ctx, &few);
    kvq_windows_free(&ctx, &many);
    kvq_windows_free(&ctx, &other);
}
END_TEST

START_TEST(self_text_failures_are_forwarded) {
    static fake_model m = {.fail_at = 3};
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_windows       w = {.n_windows = 5};
    kvq_test_failed(kvq_windows_self(&ctx, 32, 2, 1, BOS, EOS, fake_step, &m, &w, &err), KVQ_ERR_NUMERICAL, &err,
                    "fake failure");
    kvq_test_failed(kvq_windows_self(&ctx, 32, 2, 1, -1, EOS, fake_step, &m, &w, &err), KVQ_ERR_UNSUPPORTED, &err,
                    "beginning-of-text");
    m = (fake_model){.fail_at = -1, .eos = -5};
    kvq_test_failed(kvq_windows_self(&ctx, 32, 2, 5, BOS, EOS, fake_step, &m, &w, &err), KVQ_ERR_INTERNAL, &err,
                    "token id -5");
    ck_assert_int_eq(w.n_windows, 5);
}
END_TEST

// ---------------------------------------------------------------- token ids from NumPy

static const char *write_npy(int version, const char *header, const void *data, size_t n) {
    static char path[256];
    uint8_t     preamble[12] = {0x93, 'N', 'U', 'M', 'P', 'Y', (uint8_t)version, 0};
    size_t      length = strlen(header), n_preamble = version == 1 ? 10 : 12;
    for (size_t i = 8; i < n_preamble; i++) preamble[i] = (uint8_t)(length >> 8 * (i - 8));
    (void)snprintf(path, sizeof path, "%s/ids.npy", kvq_test_folder());
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    (void)fwrite(preamble, 1, n_preamble, file);
    (void)fwrite(header, 1, length, file);
    if (n > 0) (void)fwrite(data, 1, n, file);
    ck_assert_int_eq(fclose(file), 0);
    return path;
}

#define HEADER(descr, shape) "{'descr': '" descr "', 'fortran_order': False, 'shape': " shape ", }       \n"

static const int16_t  I2[] = {0, 5, 32767};
static const int32_t  I4[] = {0, 5, 70000};
static const int64_t  I8[] = {0, 5, 70000};
static const uint16_t U2[] = {0, 5, 65535};
static const uint32_t U4[] = {0, 5, 70000};

START_TEST(npy_element_types_are_read) {
    static const struct {
        const char *header;
        const void *data;
        size_t      bytes;
        int         version;
        int32_t     last;
    } GOOD[] = {
        {HEADER("<i2", "(3,)"), I2, sizeof I2, 1, 32767},
        {HEADER("<i4", "(3,)"), I4, sizeof I4, 1, 70000},
        {HEADER("<i8", "(3,)"), I8, sizeof I8, 2, 70000},
        {HEADER("<u2", "(3,)"), U2, sizeof U2, 1, 65535},
        {HEADER("<u4", "(3,)"), U4, sizeof U4, 2, 70000},
        {"{'shape':(3,),'fortran_order':False,'descr':'<i4'}\n", I4, sizeof I4, 1, 70000},
    };
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    kvq_ids     ids = {0};
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) {
        kvq_test_ok(kvq_ids_read_npy(&ctx, write_npy(GOOD[i].version, GOOD[i].header, GOOD[i].data, GOOD[i].bytes),
                                     100000, &ids, &err),
                    &err);
        ck_assert_int_eq(ids.count, 3 * (int64_t)(i + 1)); // appended
        const int32_t *got = ids.data + 3 * i;
        ck_assert(got[0] == 0 && got[1] == 5 && got[2] == GOOD[i].last);
    }
    kvq_test_ok(kvq_ids_read_npy(&ctx, write_npy(1, HEADER("<i4", "(0,)"), NULL, 0), 10, &ids, &err), &err);
    kvq_ids_free(&ctx, &ids);
}
END_TEST

START_TEST(npy_that_holds_no_ids_is_refused) {
    static const struct {
        const char *header;
        size_t      bytes;
        kvq_status  status;
        const char *fragment;
    } BAD[] = {
        {HEADER(">i4", "(3,)"), 12, KVQ_ERR_INPUT, "element type"},
        {HEADER("<f4", "(3,)"), 12, KVQ_ERR_INPUT, "element type"},
        {HEADER("<i4", "(3,1)"), 12, KVQ_ERR_INPUT, "one-dimensional"},
        {HEADER("<i4", "()"), 4, KVQ_ERR_INPUT, "one-dimensional"},
        {HEADER("<i4", "(-3,)"), 12, KVQ_ERR_INPUT, "one-dimensional"},
        {HEADER("<i8", "(4611686018427387904,)"), 12, KVQ_ERR_INPUT, "larger than any file"},
        {HEADER("<i4", "(4,)"), 12, KVQ_ERR_INTEGRITY, "4 ids need 16 bytes"},
        {HEADER("<i4", "(2,)"), 12, KVQ_ERR_INTEGRITY, "2 ids need 8 bytes"},
        {"{'descr': '<i4', 'fortran_order': True, 'shape': (3,), }\n", 12, KVQ_ERR_INPUT, "C order"},
        {"{'descr': '<i4', 'shape': (3,), }\n", 12, KVQ_ERR_INPUT, "is missing"},
        {"{'descr': '<i4', 'descr': '<i4', 'fortran_order': False, 'shape': (3,), }\n", 12, KVQ_ERR_INPUT, "twice"},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (3,), 'x': 1}\n", 12, KVQ_ERR_INPUT, "a field that is not"},
        {"{'descr' '<i4'}\n", 12, KVQ_ERR_INPUT, "colon"},
        {"{'descr': '<i4' 'shape': (3,)}\n", 12, KVQ_ERR_INPUT, "comma or brace"},
        {"['descr']\n", 12, KVQ_ERR_INPUT, "not a dictionary"},
        {HEADER("<i4", "(3,)") "x", 12, KVQ_ERR_INPUT, "something follows"},
    };
    kvq_context ctx = kvq_test_context();
    kvq_ids     ids = {0};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kvq_error err = {0};
        kvq_test_failed(kvq_ids_read_npy(&ctx, write_npy(1, BAD[i].header, I4, BAD[i].bytes), 100000, &ids, &err),
                        BAD[i].status, &err, BAD[i].fragment);
        ck_assert_ptr_nonnull(strstr(err.message, "ids.npy"));
    }
    kvq_error err = {0};
    kvq_test_failed(kvq_ids_read_npy(&ctx, write_npy(3, HEADER("<i4", "(3,)"), I4, 12), 100000, &ids, &err),
                    KVQ_ERR_UNSUPPORTED, &err, "version 3.0");
    kvq_test_failed(kvq_ids_read_npy(&ctx, write_npy(1, HEADER("<i4", "(3,)"), I4, 12), 70000, &ids, &err),
                    KVQ_ERR_MISMATCH, &err, "id 70000 at index 2");
    const int32_t negative[] = {1, -1};
    kvq_test_failed(kvq_ids_read_npy(&ctx, write_npy(1, HEADER("<i4", "(2,)"), negative, 8), 70000, &ids, &err),
                    KVQ_ERR_MISMATCH, &err, "id -1 at index 1");
    ck_assert_ptr_null(ids.data);
}
END_TEST

START_TEST(damaged_npy_does_no_harm) {
    static const char HEADER_TEXT[] = HEADER("<i4", "(3,)");
    kvq_context       ctx = kvq_test_context();
    uint8_t           whole[256];
    size_t            n = 10 + sizeof HEADER_TEXT - 1 + sizeof I4;
    FILE             *file = fopen(write_npy(1, HEADER_TEXT, I4, sizeof I4), "rb");
    ck_assert_uint_eq(fread(whole, 1, sizeof whole, file), n);
    (void)fclose(file);
    for (size_t i = 0; i < n; i++) {
        for (int change = 0; change < 3; change++) {
            kvq_error err = {0};
            kvq_ids   ids = {0};
            char      path[256];
            uint8_t   kept = whole[i];
            if (change > 0) whole[i] = change == 1 ? kept ^ 1u : 0xff;
            (void)snprintf(path, sizeof path, "%s/damaged.npy", kvq_test_folder());
            file = fopen(path, "wb");
            (void)fwrite(whole, 1, change == 0 ? i : n, file);
            (void)fclose(file);
            kvq_status status = kvq_ids_read_npy(&ctx, path, 100000, &ids, &err);
            ck_assert(status == KVQ_OK || (err.message[0] != 0 && ids.data == NULL));
            ck_assert(change != 0 || status != KVQ_OK); // no prefix is a file
            whole[i] = kept;
            kvq_ids_free(&ctx, &ids);
        }
    }
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(consecutive_windows_cover_the_text_in_order),
    KVQ_CASE(bos_takes_position_zero_and_no_token_is_lost),
    KVQ_CASE(windows_that_cannot_be_are_refused),
    KVQ_CASE(drawn_windows_are_one_per_stratum_and_do_not_overlap),
    KVQ_CASE(drawn_windows_reach_the_whole_text),
    KVQ_CASE(drawn_windows_follow_the_seed_alone),
    KVQ_CASE(short_texts_give_overlapping_windows),
    KVQ_CASE(python_numbers_are_those_of_python),
    KVQ_CASE(windows_as_python_draws_them),
    KVQ_GOLDEN_CASE(windows_of_the_reference_program),
    KVQ_CASE(what_python_cannot_draw_is_refused),
    KVQ_CASE(heldout_windows_lie_in_the_widest_gaps),
    KVQ_CASE(heldout_windows_need_room),
    KVQ_CASE(self_text_begins_with_bos_and_goes_on_after_eos),
    KVQ_CASE(self_text_with_one_token_for_both_ends_goes_on),
    KVQ_CASE(self_text_depends_on_seed_window_and_position_alone),
    KVQ_CASE(self_text_failures_are_forwarded),
    KVQ_CASE(npy_element_types_are_read),
    KVQ_CASE(npy_that_holds_no_ids_is_refused),
    KVQ_CASE(damaged_npy_does_no_harm),
};
KVQ_TEST_MAIN("datasets", CASES)
