// SPDX-License-Identifier: Apache-2.0
//
// Windows that hide a pass key. Every text below is tokenized once or once a window; a window is put together from ids.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_datasets.h"
#include "windows_impl.h"

static const char INTRODUCTION[] =
    "A pass key is hidden somewhere in this text. Find it and remember it, for you will be asked for it at the end.";
static const char NEEDLE[] = " The pass key is %d. Remember it: %d is the pass key.";
static const char QUESTION[] = " What is the pass key? The pass key is";
static const char ANSWER[] = " %d";
// Nothing here is a number or speaks of keys. All begin with a blank and end with a full stop, which is where every
// tokenizer parts text.
static const char *const FILLER[] = {
    " Rain had fallen on the hills since the early morning.",
    " The ferry crosses the river whenever enough people are waiting.",
    " An old dog slept in the shade of the wall.",
    " Somebody had left a window open on the upper floor.",
    " The baker sells dark bread and small sweet rolls.",
    " Behind the school there is a garden with apple trees.",
    " Clouds moved slowly from the sea towards the mountains.",
    " The train was late, as it often is in winter.",
    " Children were flying a red kite over the meadow.",
    " In the library it was quiet and a little too warm.",
    " The market closes when the last of the fish is sold.",
    " A wooden bridge leads to the other side of the valley.",
    " She poured the tea and looked out into the yard.",
    " The lamp in the hall has been broken for weeks.",
    " Tall grass grows along the path to the mill.",
    " His brother repairs boats in a shed by the harbour.",
    " The wind turned in the night and the air grew cold.",
    " On the table lay a map, a pencil and some string.",
    " Most of the houses in this street have blue doors.",
    " A clock was ticking in the room next door.",
    " The cat watched the birds and did not move.",
    " They walked home along the shore and talked about music.",
    " Snow is rare here, but fog is not.",
    " The carpenter measured the board again before he cut it.",
};
#define N_FILLER ((int)(sizeof FILLER / sizeof *FILLER))

#define LONGEST_TEXT 160

typedef struct maker {
    const kvq_context      *ctx;
    const kvq_tokenizer    *tokenizer;
    const kvq_passkey_rule *rule;
    kvq_passkeys            out;
    kvq_ids                 introduction;
    kvq_ids                 sentences;            // of FILLER, one behind the other
    int64_t                 begins[N_FILLER + 1]; // of each among them
    kvq_ids                 needle, tail;         // of one window; tail: question and answer
    int64_t                 n_question;           // tokens of the tail that are the question
    int32_t                *filler;               // [S], of one window
} maker;

// ---------------------------------------------------------------- tokens

static int64_t common_front(const int32_t *a, int64_t n_a, const int32_t *b, int64_t n_b) {
    int64_t n = 0;
    while (n < n_a && n < n_b && a[n] == b[n]) n++;
    return n;
}

// A tokenizer may know more tokens than the model has rows for.
static kvq_status check_vocabulary(const maker *m, const kvq_ids *ids, kvq_error *err) {
    for (int64_t i = 0; i < ids->count; i++) {
        if (ids->data[i] >= 0 && ids->data[i] < m->rule->vocab_size) continue;
        return kvq_fail(err, KVQ_ERR_MISMATCH, "use the tokenizer that was made for this model",
                        "passkey: the tokenizer makes id %d, but the model's vocabulary has %lld", (int)ids->data[i],
                        (long long)m->rule->vocab_size);
    }
    return KVQ_OK;
}

// Appends the ids of a text that stands behind a sentence. Alone it could be tokenized in another way: SentencePiece
// puts a blank in front of whatever it is given.
static kvq_status append(const maker *m, const char *text, kvq_ids *ids, kvq_error *err) {
    kvq_ids    stop = {NULL, 0, 0};
    char       joined[LONGEST_TEXT];
    int64_t    at = ids->count;
    kvq_status status = KVQ_OK;
    int        n = snprintf(joined, sizeof joined, ".%s", text);
    KVQ_TRY(kvq_tokenizer_encode(m->ctx, m->tokenizer, joined, 1, false, &stop, err));
    KVQ_TRY(kvq_tokenizer_encode(m->ctx, m->tokenizer, joined, (size_t)n, false, ids, err));
    int64_t drop = common_front(stop.data, stop.count, ids->data + at, ids->count - at);
    memmove(ids->data + at, ids->data + at + drop, (size_t)(ids->count - at - drop) * sizeof *ids->data);
    ids->count -= drop;
    status = check_vocabulary(m, ids, err);

done:
    kvq_ids_free(m->ctx, &stop);
    return status;
}

static kvq_status tokenize_once(maker *m, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(
        kvq_tokenizer_encode(m->ctx, m->tokenizer, INTRODUCTION, strlen(INTRODUCTION), false, &m->introduction, err));
    KVQ_TRY(check_vocabulary(m, &m->introduction, err));
    for (int i = 0; i < N_FILLER; i++) {
        KVQ_TRY(append(m, FILLER[i], &m->sentences, err));
        m->begins[i + 1] = m->sentences.count;
        if (m->begins[i + 1] == m->begins[i])
            KVQ_TRY(
                kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "passkey: the tokenizer makes no token of '%s'", FILLER[i]));
    }

done:
    return status;
}

// Needle, question and answer. The answer begins where the ids part from those of the question alone, for greedy
// decoding starts from what both have in common.
static kvq_status tokenize_key(maker *m, int32_t key, kvq_error *err) {
    char       text[LONGEST_TEXT], answer[16];
    kvq_ids    question = {NULL, 0, 0};
    kvq_status status = KVQ_OK;
    m->needle.count = m->tail.count = 0;
    (void)snprintf(text, sizeof text, NEEDLE, (int)key, (int)key);
    KVQ_TRY(append(m, text, &m->needle, err));
    (void)snprintf(answer, sizeof answer, ANSWER, (int)key);
    (void)snprintf(text, sizeof text, "%s%s", QUESTION, answer);
    KVQ_TRY(append(m, text, &m->tail, err));
    KVQ_TRY(append(m, QUESTION, &question, err));
    m->n_question = common_front(question.data, question.count, m->tail.data, m->tail.count);
    int64_t n_answer = m->tail.count - m->n_question;
    if (n_answer < 1 || n_answer > KVQ_PASSKEY_ROOM) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                         "passkey: the tokenizer makes %lld tokens of '%s', not 1 to %d", (long long)n_answer, answer,
                         KVQ_PASSKEY_ROOM));
    }

done:
    kvq_ids_free(m->ctx, &question);
    return status;
}

// ---------------------------------------------------------------- windows

// Numbers of one window: 0 decides its key, the others its sentences.
static uint64_t draw(const maker *m, int depth, int64_t trial, int64_t number, uint64_t bound) {
    uint64_t parts = (uint64_t)llround(m->rule->depths[depth] * 10000);
    uint64_t index = parts << 48 | (uint64_t)trial << 32 | (uint64_t)number;
    return kvq_rng_below(m->rule->seed, KVQ_RNG_PASSKEY, (uint32_t)m->rule->seq_len, index, bound);
}

// Fills m->filler [0, n) from its end with sentences, none twice in a row; what does not fit is cut off at the
// beginning of the first. Returns the place before a whole sentence, or the end, that is nearest to `wanted`; the
// earlier one on a tie. So a needle never touches what was cut.
static int64_t fill(maker *m, int depth, int64_t trial, int64_t n, double wanted) {
    int64_t best = n, number = 1;
    int     sentence = (int)draw(m, depth, trial, number++, (uint64_t)N_FILLER);
    for (int64_t end = n; end > 0;) {
        int64_t length = m->begins[sentence + 1] - m->begins[sentence], used = length < end ? length : end;
        memcpy(m->filler + end - used, m->sentences.data + m->begins[sentence + 1] - used,
               (size_t)used * sizeof *m->filler);
        end -= used;
        if (used == length && fabs((double)end - wanted) <= fabs((double)best - wanted)) best = end;
        sentence = (sentence + 1 + (int)draw(m, depth, trial, number++, (uint64_t)N_FILLER - 1)) % N_FILLER;
    }
    return best;
}

static int32_t *put(int32_t *at, const int32_t *ids, int64_t n) {
    memcpy(at, ids, (size_t)n * sizeof *at);
    return at + n;
}

static kvq_status make_window(maker *m, int depth, int64_t trial, kvq_error *err) {
    const kvq_passkey_rule *rule = m->rule;
    kvq_passkeys           *out = &m->out;
    int64_t                 window = depth * rule->n_trials + trial;
    int32_t                *first = out->windows.ids + window * rule->seq_len, *at = first;
    kvq_status              status = KVQ_OK;
    out->keys[window] = 10000 + (int32_t)draw(m, depth, trial, 0, 90000);
    KVQ_TRY(tokenize_key(m, out->keys[window], err));
    int64_t fixed = (rule->bos_id >= 0 ? 1 : 0) + m->introduction.count + m->needle.count + m->n_question;
    int64_t n_filler = out->answer_at - fixed;
    if (n_filler < 1) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, "choose longer windows",
                         "passkey: windows of %lld tokens; with this tokenizer the shortest that have filler have %lld",
                         (long long)rule->seq_len, (long long)(fixed + 1 + KVQ_PASSKEY_ROOM)));
    }
    int64_t before = fill(m, depth, trial, n_filler, rule->depths[depth] * (double)n_filler);
    if (rule->bos_id >= 0) *at++ = (int32_t)rule->bos_id;
    at = put(at, m->introduction.data, m->introduction.count);
    at = put(at, m->filler, before);
    out->needle_at[window] = at - first;
    at = put(at, m->needle.data, m->needle.count);
    at = put(at, m->filler + before, n_filler - before);
    at = put(at, m->tail.data, m->tail.count);
    out->n_answer[window] = (int32_t)(m->tail.count - m->n_question);
    (void)put(at, m->sentences.data, KVQ_PASSKEY_ROOM - out->n_answer[window]);

done:
    return status;
}

// ---------------------------------------------------------------- all

static kvq_status check_rule(const kvq_passkey_rule *rule, kvq_error *err) {
    if (rule->n_depths < 1 || rule->n_trials < 1 || rule->n_trials > KVQ_MAX_PASSKEY_TRIALS) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "passkey: %lld trials at %d depths", (long long)rule->n_trials,
                        rule->n_depths);
    }
    if (rule->seq_len > UINT32_MAX)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "passkey: windows of %lld tokens", (long long)rule->seq_len);
    for (int i = 0; i < rule->n_depths; i++) {
        if (rule->depths[i] >= 0 && rule->depths[i] <= 1) continue;
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "passkey: a depth of %g is not between 0 and 1", rule->depths[i]);
    }
    return KVQ_OK;
}

static kvq_status allocate(maker *m, kvq_error *err) {
    const kvq_passkey_rule *rule = m->rule;
    kvq_passkeys           *out = &m->out;
    int64_t                 n_windows = rule->n_depths * rule->n_trials;
    kvq_status              status = KVQ_OK;
    KVQ_TRY(windows_create(m->ctx, rule->seq_len, n_windows, rule->bos_id, &out->windows, err));
    KVQ_TRY(KVQ_NEW(m->ctx, rule->n_depths, "depths", &out->depths, err));
    KVQ_TRY(KVQ_NEW(m->ctx, n_windows, "keys", &out->keys, err));
    KVQ_TRY(KVQ_NEW(m->ctx, n_windows, "lengths of answers", &out->n_answer, err));
    KVQ_TRY(KVQ_NEW(m->ctx, n_windows, "needles", &out->needle_at, err));
    KVQ_TRY(KVQ_NEW(m->ctx, rule->seq_len, "filler", &m->filler, err));
    memcpy(out->depths, rule->depths, (size_t)rule->n_depths * sizeof *out->depths);
    out->n_depths = rule->n_depths;
    out->n_trials = rule->n_trials;
    out->answer_at = rule->seq_len - KVQ_PASSKEY_ROOM;

done:
    return status;
}

kvq_status kvq_passkeys_make(const kvq_context *ctx, const kvq_tokenizer *tokenizer, const kvq_passkey_rule *rule,
                             kvq_passkeys *out, kvq_error *err) {
    maker      m = {.ctx = ctx, .tokenizer = tokenizer, .rule = rule};
    kvq_status status = KVQ_OK;
    KVQ_TRY(check_rule(rule, err));
    KVQ_TRY(allocate(&m, err));
    KVQ_TRY(tokenize_once(&m, err));
    for (int depth = 0; depth < rule->n_depths; depth++) {
        for (int64_t trial = 0; trial < rule->n_trials; trial++) KVQ_TRY(make_window(&m, depth, trial, err));
    }
    m.out.windows.n_available = m.out.windows.n_windows * rule->seq_len;
    strcpy(m.out.windows.source, "passkey");
    KVQ_TRY(windows_hash(&m.out.windows, err));
    *out = m.out;
    m.out = (kvq_passkeys){.keys = NULL};

done:
    kvq_passkeys_free(ctx, &m.out);
    kvq_ids_free(ctx, &m.introduction);
    kvq_ids_free(ctx, &m.sentences);
    kvq_ids_free(ctx, &m.needle);
    kvq_ids_free(ctx, &m.tail);
    kvq_free(ctx, m.filler);
    return status;
}

void kvq_passkeys_free(const kvq_context *ctx, kvq_passkeys *keys) {
    kvq_windows_free(ctx, &keys->windows);
    kvq_free(ctx, keys->depths);
    kvq_free(ctx, keys->keys);
    kvq_free(ctx, keys->n_answer);
    kvq_free(ctx, keys->needle_at);
    *keys = (kvq_passkeys){.keys = NULL};
}
