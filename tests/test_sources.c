// SPDX-License-Identifier: Apache-2.0
// Windows of sources that are read piece by piece: the same as of a list in memory; documents kept apart; several
// sources mixed; text files.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_datasets.h"
#include "kvq_test.h"

// Start of window i, read off its content; the rest of the window must follow.
static int64_t start_of(const kvq_windows *w, int64_t i) {
    int64_t        skip = w->bos_added ? 1 : 0, start = w->ids[i * w->seq_len + skip];
    const int32_t *ids = w->ids + i * w->seq_len;
    for (int64_t j = skip; j < w->seq_len; j++) ck_assert_int_eq(ids[j], start + j - skip);
    return start;
}

// ---------------------------------------------------------------- sources

// A source of documents whose tokens are document * 1000 + position, given in batches of random sizes; 0 ends the list.
typedef struct fake_source {
    const int64_t *lengths; // of documents, ends with -1
    uint64_t       seed;
    int64_t        document, position, n_batches, n_given, n_rewinds;
    int32_t        ids[64];
    int64_t        shrink_by; // tokens that the second reading lacks at the end of each document
} fake_source;

static kvq_status fake_rewind(void *user, kvq_error *err) {
    fake_source *f = user;
    (void)err;
    f->document = f->position = 0;
    f->n_rewinds++;
    return KVQ_OK;
}

static kvq_status fake_next(void *user, kvq_token_batch *batch, kvq_error *err) {
    fake_source *f = user;
    (void)err;
    if (f->lengths[f->document] < 0) {
        *batch = (kvq_token_batch){.end = true};
        return KVQ_OK;
    }
    int64_t length = f->lengths[f->document] - (f->n_rewinds > 1 ? f->shrink_by : 0), left = length - f->position;
    int64_t n = (int64_t)kvq_rng_below(f->seed, KVQ_RNG_TEST, 2, (uint64_t)f->n_batches++, 65);
    if (n > left) n = left;
    for (int64_t i = 0; i < n; i++) f->ids[i] = (int32_t)(f->document * 1000 + f->position + i);
    f->position += n;
    f->n_given += n;
    *batch = (kvq_token_batch){f->ids, n, f->position == length, false};
    if (batch->ends_document) {
        f->document++;
        f->position = 0;
    }
    return KVQ_OK;
}

static kvq_token_source fake(fake_source *f, const int64_t *lengths, uint64_t seed) {
    *f = (fake_source){.lengths = lengths, .seed = seed};
    return (kvq_token_source){.name = "fake.txt", .user = f, .rewind = fake_rewind, .next = fake_next};
}

// What the documents are when they are joined, in one list.
static kvq_ids joined(const int64_t *lengths, const int32_t *joint, int n_joint) {
    kvq_ids ids = {calloc(100000, sizeof(int32_t)), 0, 100000};
    for (int64_t d = 0; lengths[d] >= 0; d++) {
        for (int i = 0; i < n_joint && ids.count > 0 && lengths[d] > 0; i++) ids.data[ids.count++] = joint[i];
        for (int64_t t = 0; t < lengths[d]; t++) ids.data[ids.count++] = (int32_t)(d * 1000 + t);
    }
    return ids;
}

static const int64_t DOCUMENTS[] = {250, 0, 17, 900, 64, 3, 0, 128, 31, 500, -1};

// However a text arrives, its windows are those of the whole list of ids.
START_TEST(streamed_windows_are_those_of_the_whole_text) {
    static const int32_t JOINT[] = {-7, -8};
    kvq_context          ctx = kvq_test_context();
    kvq_error            err = {0};
    for (int k = 0; k < 60; k++) {
        int              n_joint = k % 3;
        kvq_ids          ids = joined(DOCUMENTS, JOINT, n_joint);
        fake_source      f;
        kvq_windows      a = {0}, b = {0};
        kvq_window_rule  rule = {.seq_len = 2 + k * 3,
                                 .n_windows = 1 + k % 23,
                                 .seed = (uint64_t)k,
                                 .bos_id = k % 2 ? 9 : -1,
                                 .joint = {-7, -8},
                                 .n_joint = n_joint};
        kvq_source_use   use = {0};
        kvq_token_source source = fake(&f, DOCUMENTS, (uint64_t)k);
        kvq_test_ok(kvq_windows_drawn(&ctx, &ids, rule.seq_len, rule.n_windows, rule.seed, rule.bos_id, &a, &err),
                    &err);
        kvq_test_ok(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, &use, &b, &err), &err);
        ck_assert_str_eq(a.ids_sha256, b.ids_sha256);
        ck_assert_int_eq(a.n_available, b.n_available);
        ck_assert_int_eq(use.n_documents, 10);
        ck_assert_int_eq(use.n_tokens, ids.count);
        kvq_windows_free(&ctx, &a);
        kvq_windows_free(&ctx, &b);
        source = fake(&f, DOCUMENTS, (uint64_t)k);
        if (k % 5 == 0) rule.n_windows = 0;
        kvq_test_ok(kvq_windows_consecutive(&ctx, &ids, rule.seq_len, rule.n_windows, rule.bos_id, &a, &err), &err);
        kvq_test_ok(kvq_windows_take(&ctx, &source, NULL, 1, &rule, &use, &b, &err), &err);
        ck_assert_str_eq(a.ids_sha256, b.ids_sha256);
        ck_assert_int_eq(a.n_windows, use.n_windows);
        ck_assert_int_eq(f.n_rewinds, 1);
        // and no more is read than is used, but for the end of a batch
        int64_t used = b.n_windows * (rule.seq_len - (rule.bos_id >= 0));
        if (b.n_windows == rule.n_windows) ck_assert_int_le(f.n_given, used + 64);
        kvq_windows_free(&ctx, &a);
        kvq_windows_free(&ctx, &b);
        free(ids.data);
    }
}
END_TEST

// Checks that a window lies within one document and returns its start, document * 1000 + position.
static int64_t start_in_document(const kvq_windows *w, int64_t i) {
    int64_t start = start_of(w, i), last = start + w->seq_len - 1 - (w->bos_added ? 1 : 0);
    ck_assert_int_eq(start / 1000, last / 1000);
    ck_assert_int_lt(last % 1000, DOCUMENTS[start / 1000]);
    return start;
}

// Documents of 250, 900, 64, 128 and 500 tokens have 3 + 14 + 1 + 2 + 7 places of 64 tokens.
START_TEST(kept_documents_are_not_crossed) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    int         seen[27] = {0};
    for (uint64_t seed = 0; seed < 200; seed++) {
        fake_source      f;
        kvq_token_source source = fake(&f, DOCUMENTS, seed);
        kvq_windows      w = {0};
        kvq_source_use   use = {0};
        int              bos = seed % 2 == 1;
        kvq_window_rule  rule = {.seq_len = 64 + bos,
                                 .n_windows = 5,
                                 .seed = seed,
                                 .bos_id = bos ? 77777 : -1,
                                 .keep_documents = true,
                                 .joint = {1},
                                 .n_joint = 1};
        kvq_test_ok(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, &use, &w, &err), &err);
        ck_assert_int_eq(use.n_documents, 10);
        ck_assert_int_eq(use.n_short, 3);
        ck_assert_int_eq(use.n_tokens, 250 + 900 + 64 + 128 + 500);
        ck_assert_int_eq(w.n_available, use.n_tokens);
        ck_assert(!use.overlap);
        int64_t previous = -1;
        for (int64_t i = 0; i < 5; i++) {
            static const int FIRST_PLACE[] = {0, 0, 0, 3, 17, 0, 0, 18, 0, 20};
            int64_t          start = start_in_document(&w, i);
            ck_assert_int_eq(start % 1000 % 64, 0);
            ck_assert_int_gt(start, previous);
            previous = start;
            seen[FIRST_PLACE[start / 1000] + start % 1000 / 64]++;
            // of the 23 spare places, stratum i of 5 lies before window i
            int64_t before = FIRST_PLACE[start / 1000] + start % 1000 / 64 - i;
            ck_assert_int_ge(before, 23 * i / 5);
            ck_assert_int_lt(before, 23 * (i + 1) / 5);
        }
        kvq_windows_free(&ctx, &w);
    }
    int n_seen = 0;
    for (int i = 0; i < 27; i++) n_seen += seen[i] > 0;
    ck_assert_int_eq(n_seen, 27 - 4); // all but one between neighbouring strata
}
END_TEST

// More windows than places: then they overlap, anywhere within a document.
START_TEST(too_few_places_overlap_within_documents) {
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    bool        odd = false;
    for (uint64_t seed = 0; seed < 20; seed++) {
        fake_source      f;
        kvq_token_source source = fake(&f, DOCUMENTS, seed);
        kvq_windows      w = {0};
        kvq_source_use   use = {0};
        kvq_window_rule  rule = {
             .seq_len = 64, .n_windows = 28 + (int64_t)seed * 10, .seed = seed, .bos_id = -1, .keep_documents = true};
        kvq_test_ok(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, &use, &w, &err), &err);
        ck_assert(use.overlap);
        int64_t previous = -1;
        for (int64_t i = 0; i < w.n_windows; i++) {
            int64_t start = start_in_document(&w, i);
            ck_assert_int_ge(start, previous);
            odd = odd || start % 1000 % 64 != 0;
            previous = start;
        }
        kvq_windows_free(&ctx, &w);
    }
    ck_assert(odd);
}
END_TEST

START_TEST(consecutive_windows_of_kept_documents) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    fake_source      f;
    kvq_windows      w = {0};
    kvq_source_use   use = {0};
    kvq_token_source source = fake(&f, DOCUMENTS, 1);
    kvq_window_rule  rule = {.seq_len = 100, .bos_id = -1, .keep_documents = true};
    kvq_test_ok(kvq_windows_take(&ctx, &source, NULL, 1, &rule, &use, &w, &err), &err);
    static const int64_t STARTS[] = {0,    100,  3000, 3100, 3200, 3300, 3400, 3500, 3600,
                                     3700, 3800, 7000, 9000, 9100, 9200, 9300, 9400};
    ck_assert_int_eq(w.n_windows, (int64_t)(sizeof STARTS / sizeof *STARTS));
    for (int64_t i = 0; i < w.n_windows; i++) ck_assert_int_eq(start_of(&w, i), STARTS[i]);
    ck_assert_int_eq(use.n_short, 4);
    kvq_windows_free(&ctx, &w);
}
END_TEST

// ---------------------------------------------------------------- several sources

static const int64_t LONG_ONE[] = {30000, -1}, SHORT_ONE[] = {10000, -1}, TINY[] = {20, -1};

// 16 windows of texts with 30000 and 10000 tokens: 12 and 4. Each source is drawn as by itself on a stream of its own.
START_TEST(windows_are_dealt_in_proportion_to_tokens) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    fake_source      f[2];
    kvq_token_source sources[] = {fake(&f[0], LONG_ONE, 1), fake(&f[1], SHORT_ONE, 2)};
    kvq_source_use   uses[2];
    kvq_windows      w = {0}, alone = {0};
    kvq_window_rule  rule = {.seq_len = 100, .n_windows = 16, .seed = 5, .bos_id = -1};
    kvq_test_ok(kvq_windows_draw(&ctx, sources, NULL, 2, &rule, uses, &w, &err), &err);
    ck_assert_int_eq(uses[0].n_windows, 12);
    ck_assert_int_eq(uses[1].n_windows, 4);
    ck_assert_int_eq(w.n_windows, 16);
    ck_assert_int_eq(w.n_available, 40000);
    kvq_ids ids = joined(LONG_ONE, NULL, 0);
    kvq_test_ok(kvq_windows_drawn(&ctx, &ids, 100, 12, 5, -1, &alone, &err), &err);
    ck_assert(memcmp(w.ids, alone.ids, 1200 * sizeof(int32_t)) == 0); // the first source is stream 0
    for (int64_t i = 0; i < 4; i++) { // the second: 9601 places before the windows, stream 1
        int64_t low = 9601 * i / 4, high = 9601 * (i + 1) / 4;
        int64_t start = low + (int64_t)kvq_rng_below(5, KVQ_RNG_WINDOWS, 1, (uint64_t)i, (uint64_t)(high - low));
        ck_assert_int_eq(start_of(&w, 12 + i), start + i * 100);
    }
    kvq_windows_free(&ctx, &w);
    kvq_windows_free(&ctx, &alone);
    free(ids.data);
}
END_TEST

START_TEST(weights_deal_windows_by_largest_remainders) {
    static const struct {
        double  weights[3];
        int64_t n, dealt[3];
    } DEALS[] = {
        {{1, 1, 1}, 16, {6, 5, 5}},        // a tie: the earlier one
        {{0.6, 0.3, 0.1}, 16, {10, 5, 1}}, // 9.6, 4.8, 1.6: 9 + 4 + 1, then the fractions .8 and ...
        {{6, 3, 1}, 10, {6, 3, 1}},        // need not add up to 1
        {{0.1, 0.2, 0.7}, 10, {1, 2, 7}},  // in binary they do not add up to 1 either
        {{0, 1, 1}, 5, {0, 3, 2}},         // 0 leaves one out
        {{1e-300, 1, 1e-300}, 7, {0, 7, 0}}, {{1e300, 1e300, 1e300}, 3, {1, 1, 1}},
    };
    kvq_context ctx = kvq_test_context();
    kvq_error   err = {0};
    for (size_t k = 0; k < sizeof DEALS / sizeof *DEALS; k++) {
        fake_source      f[3];
        kvq_token_source sources[] = {fake(&f[0], LONG_ONE, 1), fake(&f[1], SHORT_ONE, 2), fake(&f[2], LONG_ONE, 3)};
        kvq_source_use   uses[3];
        kvq_windows      w = {0};
        kvq_window_rule  rule = {.seq_len = 50, .n_windows = DEALS[k].n, .bos_id = -1};
        for (int consecutive = 0; consecutive < 2; consecutive++) {
            kvq_test_ok((consecutive ? kvq_windows_take : kvq_windows_draw)(&ctx, sources, DEALS[k].weights, 3, &rule,
                                                                            uses, &w, &err),
                        &err);
            ck_assert_int_eq(w.n_windows, DEALS[k].n);
            for (int j = 0; j < 3; j++)
                ck_assert_msg(uses[j].n_windows == DEALS[k].dealt[j], "deal %zu: source %d gives %lld windows", k, j,
                              (long long)uses[j].n_windows);
            kvq_windows_free(&ctx, &w);
        }
    }
}
END_TEST

// Of several texts the widest gaps of all, in the order of the texts; a text that gives no window holds out none.
START_TEST(heldout_windows_of_several_sources) {
    enum { N = 4, STEP = 100, WANTED = 5 };
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    fake_source      f[3];
    kvq_token_source sources[] = {fake(&f[0], SHORT_ONE, 1), fake(&f[1], LONG_ONE, 2), fake(&f[2], DOCUMENTS, 3)};
    kvq_windows      w = {0};
    kvq_window_rule  rule = {.seq_len = STEP, .n_windows = 2 * N, .seed = 5, .bos_id = -1, .n_heldout = WANTED};
    double           weights[] = {1, 1, 0};
    kvq_test_ok(kvq_windows_draw(&ctx, sources, weights, 3, &rule, NULL, &w, &err), &err);
    ck_assert(f[0].n_rewinds == 2 && f[1].n_rewinds == 2 && f[2].n_rewinds == 1); // both kinds in one reading
    int64_t middles[2 * N + 2], widths[2 * N + 2];
    for (int i = 0, at = 0; i < 2; i++) {
        int64_t begin = 0;
        for (int j = 0; j <= N; j++, at++) {
            int64_t end = j < N ? start_of(&w, i * N + j) : i == 0 ? 10000 : 30000;
            widths[at] = end - begin;
            middles[at] = begin + (widths[at] - STEP) / 2;
            begin = end + STEP;
        }
    }
    kvq_windows heldout = w;
    heldout.ids = w.heldout_ids;
    ck_assert_int_eq(w.n_heldout, WANTED);
    int next = 0, n_of_first = 0;
    for (int i = 0; i < 2 * N + 2; i++) {
        int n_wider = 0;
        for (int j = 0; j < 2 * N + 2; j++) n_wider += widths[j] > widths[i] || (j < i && widths[j] == widths[i]);
        if (n_wider >= WANTED) continue;
        ck_assert_int_eq(start_of(&heldout, next++), middles[i]);
        n_of_first += i <= N;
    }
    ck_assert(n_of_first > 0 && n_of_first < WANTED); // this seed takes some of either
    kvq_windows_free(&ctx, &w);

    rule.keep_documents = true; // only joined texts hold windows out
    kvq_test_ok(kvq_windows_draw(&ctx, sources, weights, 2, &rule, NULL, &w, &err), &err);
    ck_assert(w.n_heldout == 0 && w.heldout_ids == NULL);
    kvq_windows_free(&ctx, &w);
}
END_TEST

// As drawn windows do, those held out come from a text in pieces as from the whole list.
START_TEST(heldout_windows_of_a_stream) {
    static const int32_t JOINT[] = {-7, -8};
    kvq_context          ctx = kvq_test_context();
    kvq_error            err = {0};
    int64_t              n_seen = 0;
    for (int k = 0; k < 60; k++) {
        fake_source      f;
        kvq_ids          ids = joined(DOCUMENTS, JOINT, 2);
        kvq_token_source source = fake(&f, DOCUMENTS, (uint64_t)k);
        kvq_windows      w = {0};
        kvq_window_rule  rule = {.seq_len = 2 + k,
                                 .n_windows = 1 + k % 13,
                                 .seed = (uint64_t)k,
                                 .bos_id = -1,
                                 .joint = {-7, -8},
                                 .n_joint = 2,
                                 .n_heldout = 4};
        kvq_test_ok(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, NULL, &w, &err), &err);
        for (int64_t i = 0; i < w.n_heldout; i++, n_seen++) { // somewhere in the list, and in no drawn window
            const int32_t *window = w.heldout_ids + i * w.seq_len;
            int64_t        at = 0;
            while (at + w.seq_len <= ids.count && memcmp(ids.data + at, window, (size_t)w.seq_len * 4) != 0) at++;
            ck_assert_int_le(at + w.seq_len, ids.count);
            for (int64_t j = 0; j < w.n_windows * w.seq_len; j++) {
                for (int64_t t = 0; t < w.seq_len; t++) ck_assert(window[t] < 0 || w.ids[j] != window[t]);
            }
        }
        kvq_windows_free(&ctx, &w);
        free(ids.data);
    }
    ck_assert_int_gt(n_seen, 150);
}
END_TEST

START_TEST(sources_that_cannot_give_their_windows_are_refused) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    fake_source      f[2];
    kvq_token_source sources[] = {fake(&f[0], TINY, 1), fake(&f[1], SHORT_ONE, 2)};
    double           weights[] = {1, 1};
    kvq_source_use   uses[2];
    kvq_windows      w = {.n_windows = 5};
    kvq_window_rule  rule = {.seq_len = 50, .n_windows = 8, .bos_id = -1};
    kvq_test_failed(kvq_windows_draw(&ctx, sources, weights, 2, &rule, uses, &w, &err), KVQ_ERR_INPUT, &err,
                    "fake.txt: the text has 20 tokens, but one window needs 50");
    kvq_test_failed(kvq_windows_take(&ctx, sources, weights, 2, &rule, uses, &w, &err), KVQ_ERR_INPUT, &err,
                    "fake.txt: the text has 20 tokens");
    rule.seq_len = 20; // now it has one window
    kvq_test_failed(kvq_windows_take(&ctx, sources, weights, 2, &rule, uses, &w, &err), KVQ_ERR_INPUT, &err,
                    "fake.txt: has 1 windows, but 4 of the 8 were to come from it");
    rule.keep_documents = true;
    rule.seq_len = 20000;
    kvq_test_failed(kvq_windows_draw(&ctx, sources + 1, NULL, 1, &rule, uses, &w, &err), KVQ_ERR_INPUT, &err,
                    "fake.txt: none of the 1 documents has the 20000 tokens of one window");
    kvq_test_failed(kvq_windows_draw(&ctx, sources, NULL, 0, &rule, uses, &w, &err), KVQ_ERR_USAGE, &err, "0 texts");
    kvq_test_failed(kvq_windows_take(&ctx, sources, NULL, 33, &rule, uses, &w, &err), KVQ_ERR_USAGE, &err, "33 texts");
    ck_assert_int_eq(w.n_windows, 5); // untouched
    // without weights, a text that is too short simply has no share
    rule = (kvq_window_rule){.seq_len = 50, .n_windows = 8, .bos_id = -1};
    kvq_test_ok(kvq_windows_draw(&ctx, sources, NULL, 2, &rule, uses, &w, &err), &err);
    ck_assert_int_eq(uses[0].n_windows, 0);
    ck_assert_int_eq(uses[1].n_windows, 8);
    kvq_windows_free(&ctx, &w);
}
END_TEST

START_TEST(a_source_that_shrinks_is_found) {
    kvq_context      ctx = kvq_test_context();
    kvq_error        err = {0};
    fake_source      f;
    kvq_token_source source = fake(&f, SHORT_ONE, 1);
    kvq_windows      w = {0};
    kvq_window_rule  rule = {.seq_len = 5000, .n_windows = 2, .bos_id = -1};
    f.shrink_by = 1;
    kvq_test_failed(kvq_windows_draw(&ctx, &source, NULL, 1, &rule, NULL, &w, &err), KVQ_ERR_INTEGRITY, &err,
                    "fewer tokens than the first");
    ck_assert_ptr_null(w.ids);
}
END_TEST

static void check_name(const char *const *names, int n, const char *expected) {
    kvq_error   err = {0};
    kvq_windows w = {0};
    static char sha256[KVQ_MAX_SOURCES][KVQ_SHA256_HEX];
    for (int i = 0; i < n; i++) kvq_test_ok(kvq_sha256_of(names[i], strlen(names[i]), sha256[i], &err), &err);
    kvq_test_ok(kvq_windows_name(&w, names, sha256, n, &err), &err);
    ck_assert_str_eq(w.source, expected);
    char text[KVQ_MAX_SOURCES * 400] = "", hex[KVQ_SHA256_HEX];
    for (int i = 0; i < n; i++) {
        (void)strcat(text, sha256[i]);
        (void)strcat(strcat(strcat(text, "  "), names[i]), "\n");
    }
    kvq_test_ok(kvq_sha256_of(text, strlen(text), hex, &err), &err);
    ck_assert_str_eq(w.source_sha256, n == 1 ? sha256[0] : hex);
}

START_TEST(several_sources_have_one_name_and_hash) {
    char        longest[256], joined_names[256];
    const char *two[] = {"a.txt", "b.jsonl.gz"}, *one[] = {"a.txt"}, *many[] = {"a.txt", longest};
    check_name(one, 1, "a.txt");
    check_name(two, 2, "a.txt + b.jsonl.gz");
    memset(longest, 'x', 255);
    longest[255] = 0;
    (void)snprintf(joined_names, sizeof joined_names, "a.txt + %.244s...", longest);
    check_name(many, 2, joined_names);
    for (int i = 0; i < 254; i += 2) memcpy(longest + i, "\xc3\xa9", 2); // never half a character
    longest[254] = 0;
    (void)snprintf(joined_names, sizeof joined_names, "a.txt + %.244s...", longest);
    check_name(many, 2, joined_names);
}
END_TEST

// ---------------------------------------------------------------- text files as sources

static kvq_tokenizer *byte_tokenizer(void) {
    static char    path[256];
    kvq_context    ctx = kvq_test_context();
    kvq_error      err = {0};
    kvq_tokenizer *t = NULL;
    (void)snprintf(path, sizeof path, "%s/tokenizer.json", kvq_test_folder());
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    (void)fputs("{\"added_tokens\":[],\"pre_tokenizer\":{\"type\":\"Metaspace\",\"prepend_scheme\":\"never\"},"
                "\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{",
                file);
    for (unsigned b = 0; b < 256; b++) (void)fprintf(file, "\"<0x%02X>\":%u,", b, b);
    (void)fputs("\"<\":256,\"<<\":257},\"merges\":[\"< <\"]}}", file);
    ck_assert_int_eq(fclose(file), 0);
    kvq_test_ok(kvq_tokenizer_open(&ctx, path, &t, &err), &err);
    return t;
}

static bool stop_now(void *user) {
    (void)user;
    return true;
}

START_TEST(text_files_are_sources) {
    kvq_context       ctx = kvq_test_context();
    kvq_error         err = {0};
    kvq_tokenizer    *t = byte_tokenizer();
    kvq_text_source  *s = NULL;
    kvq_windows       w = {0};
    kvq_source_use    use = {0};
    char              path[256], hex[KVQ_SHA256_HEX], expected[KVQ_SHA256_HEX];
    static const char LINES[] = "{\"body\":\"abcdefgh\"}\n{\"body\":\"xyz\"}\n{\"body\":\"ABCDEFGHIJK\"}\n";
    (void)snprintf(path, sizeof path, "%s/a.jsonl", kvq_test_folder());
    FILE *file = fopen(path, "wb");
    (void)fputs(LINES, file);
    (void)fclose(file);
    kvq_text_source_options options = {.field = "body", .vocab_size = 258};
    kvq_test_ok(kvq_text_source_open(&ctx, t, path, &options, &s, &err), &err);
    kvq_token_source view = kvq_text_source_view(s);
    ck_assert_str_eq(view.name, "a.jsonl");
    kvq_window_rule rule = {.seq_len = 4, .bos_id = -1, .keep_documents = true};
    kvq_test_ok(kvq_windows_take(&ctx, &view, NULL, 1, &rule, &use, &w, &err), &err);
    ck_assert_int_eq(w.n_windows, 4);
    for (int i = 0; i < 16; i++) ck_assert_int_eq(w.ids[i], "abcdefghABCDEFGH"[i]);
    ck_assert(use.n_documents == 3 && use.n_short == 1);
    kvq_windows_free(&ctx, &w);
    rule = (kvq_window_rule){.seq_len = 4, .n_windows = 3, .bos_id = -1, .joint = {'-'}, .n_joint = 1};
    kvq_test_ok(kvq_windows_take(&ctx, &view, NULL, 1, &rule, &use, &w, &err), &err); // the source is read anew
    for (int i = 0; i < 12; i++) ck_assert_int_eq(w.ids[i], "abcdefgh-xyz-"[i]);
    kvq_windows_free(&ctx, &w);
    kvq_test_ok(kvq_text_source_sha256(s, hex, &err), &err);
    kvq_test_ok(kvq_sha256_of(LINES, sizeof LINES - 1, expected, &err), &err);
    ck_assert_str_eq(hex, expected);
    ctx.stop = stop_now;
    kvq_test_failed(kvq_windows_take(&ctx, &view, NULL, 1, &rule, &use, &w, &err), KVQ_ERR_INTERRUPTED, &err,
                    "a.jsonl was being read");
    ctx.stop = NULL;
    kvq_text_source_close(&ctx, &s);
    options.vocab_size = 'z';
    kvq_test_ok(kvq_text_source_open(&ctx, t, path, &options, &s, &err), &err);
    view = kvq_text_source_view(s);
    kvq_test_failed(kvq_windows_take(&ctx, &view, NULL, 1, &rule, &use, &w, &err), KVQ_ERR_MISMATCH, &err,
                    "a.jsonl: the tokenizer makes token 10 id 122, but the model's vocabulary has 122");
    kvq_text_source_close(&ctx, &s);
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// ---------------------------------------------------------------- line ends

// What the options promise, of a whole document: line by line, without the spaces that end it.
static size_t with_newlines(kvq_newlines how, const char *text, size_t n, char *out) {
    size_t n_out = 0;
    for (size_t at = 0; at < n;) {
        const char *feed = memchr(text + at, '\n', n - at);
        size_t      end = feed != NULL ? (size_t)(feed - text) : n, next = feed != NULL ? end + 1 : n;
        while (how != KVQ_NEWLINES_KEPT && feed != NULL && end > at && text[end - 1] == ' ') end--;
        memcpy(out + n_out, text + at, end - at);
        n_out += end - at;
        bool blank = end == at && n_out > 0 && out[n_out - 1] == '\n';
        if (feed != NULL && (how != KVQ_NEWLINES_SINGLE || !blank)) out[n_out++] = '\n';
        at = next;
    }
    return n_out;
}

// The tokenizer of these tests makes the three bytes of a lower block of a space, and one token of any other byte.
static int64_t tokens_of(const char *text, size_t n, int32_t *ids) {
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] == ' ') {
            ids[count++] = 0xe2;
            ids[count++] = 0x96;
            ids[count++] = 0x81;
        } else {
            ids[count++] = (unsigned char)text[i];
        }
    }
    return count;
}

static void write_text(const char *path, const char *text, size_t n) {
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(text, 1, n, file), n);
    ck_assert_int_eq(fclose(file), 0);
}

// The whole file as one window of its ids. With a source that is read twice, so nothing of the first reading is left.
static void check_newlines(const kvq_tokenizer *t, const char *path, kvq_newlines how, const int32_t *expected,
                           int64_t n) {
    kvq_context             ctx = kvq_test_context();
    kvq_error               err = {0};
    kvq_text_source        *s = NULL;
    kvq_text_source_options options = {.field = "text", .vocab_size = 258, .newlines = how};
    kvq_test_ok(kvq_text_source_open(&ctx, t, path, &options, &s, &err), &err);
    kvq_token_source view = kvq_text_source_view(s);
    for (int reading = 0; reading < 2; reading++) {
        kvq_windows     w = {0};
        kvq_source_use  use = {0};
        kvq_window_rule rule = {.seq_len = n, .bos_id = -1};
        kvq_test_ok(kvq_windows_take(&ctx, &view, NULL, 1, &rule, &use, &w, &err), &err);
        ck_assert_int_eq(w.n_available, n);
        ck_assert_msg(memcmp(w.ids, expected, (size_t)n * sizeof *expected) == 0, "%s newlines of %s",
                      kvq_newlines_names[how], path);
        kvq_windows_free(&ctx, &w);
    }
    char name[64];
    (void)snprintf(name, sizeof name, how == KVQ_NEWLINES_KEPT ? "%s" : "%s (%s newlines)", strrchr(path, '/') + 1,
                   kvq_newlines_names[how]);
    ck_assert_str_eq(view.name, name);
    kvq_text_source_close(&ctx, &s);
}

// A file is read in parts of a MiB; spaces, line feeds and blank lines lie across two of their borders.
START_TEST(line_ends_have_the_form_that_was_asked_for) {
    enum { PART = 1 << 20, N = 2 * PART + 1000 };
    static const char BORDERS[2][24] = {"x  \n   \n      \n  y   \nz", "x          \n\n\n  \n y  "};
    static const int  SHIFTS[] = {5, 12, 17, 18}; // in blanks, behind a line feed, between blanks and a letter
    static char       text[N], changed[N];
    static int32_t    ids[3 * N];
    char              path[256];
    kvq_context       ctx = kvq_test_context();
    kvq_tokenizer    *t = byte_tokenizer();
    (void)snprintf(path, sizeof path, "%s/lines.txt", kvq_test_folder());
    for (size_t k = 0; k < sizeof SHIFTS / sizeof *SHIFTS; k++) {
        int shift = SHIFTS[k];
        for (int i = 0; i < N; i++) text[i] = "abc d\n"[kvq_rng_below(3, KVQ_RNG_TEST, 5, (uint64_t)i, 6)];
        for (int b = 0; b < 2; b++) memcpy(text + (b + 1) * PART - shift, BORDERS[b], strlen(BORDERS[b]));
        memcpy(text, "\n \n", 3);         // a document may begin with a blank line
        memcpy(text + N - 4, "\n   ", 4); // and end with spaces, which are not in front of a line feed
        write_text(path, text, N);
        for (int how = 0; how < 3; how++) {
            size_t n = with_newlines((kvq_newlines)how, text, N, changed);
            ck_assert(how == 0 ? n == N : n < N);
            check_newlines(t, path, (kvq_newlines)how, ids, tokens_of(changed, n, ids));
        }
    }
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

// By hand, so that the rule above is not its own witness; and documents know nothing of each other.
START_TEST(line_ends_by_hand) {
    static const char        LINES[] = "{\"text\":\"\\na \\n \\n\\nb  c\\t\\n  d  \"}\n"
                                       "{\"text\":\"\"}\n{\"text\":\"\\n\"}\n{\"text\":\"\\n\\n  e\"}\n";
    static const char *const EXPECTED[] = {"\na \n \n\nb  c\t\n  d  \n\n\n  e", "\na\n\n\nb  c\t\n  d  \n\n\n  e",
                                           "\na\nb  c\t\n  d  \n\n  e"};
    char                     path[256];
    int32_t                  ids[200];
    kvq_context              ctx = kvq_test_context();
    kvq_tokenizer           *t = byte_tokenizer();
    (void)snprintf(path, sizeof path, "%s/lines.jsonl", kvq_test_folder());
    write_text(path, LINES, sizeof LINES - 1);
    for (int how = 0; how < 3; how++)
        check_newlines(t, path, (kvq_newlines)how, ids, tokens_of(EXPECTED[how], strlen(EXPECTED[how]), ids));
    kvq_tokenizer_close(&ctx, &t);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_CASE(streamed_windows_are_those_of_the_whole_text),
    KVQ_CASE(kept_documents_are_not_crossed),
    KVQ_CASE(too_few_places_overlap_within_documents),
    KVQ_CASE(consecutive_windows_of_kept_documents),
    KVQ_CASE(windows_are_dealt_in_proportion_to_tokens),
    KVQ_CASE(weights_deal_windows_by_largest_remainders),
    KVQ_CASE(heldout_windows_of_several_sources),
    KVQ_CASE(heldout_windows_of_a_stream),
    KVQ_CASE(sources_that_cannot_give_their_windows_are_refused),
    KVQ_CASE(a_source_that_shrinks_is_found),
    KVQ_CASE(several_sources_have_one_name_and_hash),
    KVQ_CASE(text_files_are_sources),
    KVQ_CASE(line_ends_have_the_form_that_was_asked_for),
    KVQ_CASE(line_ends_by_hand),
};
KVQ_TEST_MAIN("sources", CASES)
