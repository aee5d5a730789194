// SPDX-License-Identifier: Apache-2.0
//
// Windows of token sources: all of a text in order, for scoring, or a few spread over it, for calibration.
//
// A source is seen as a row of documents (joined: one), and a document has an extent: how many of the possible starts
// of windows lie in it. Which starts are wanted is known beforehand, as numbers in the row of all extents; while the
// source passes by, each batch is copied to where the windows that it reaches into want it. A document's extent is
// known only at its end. Windows that began in it, but beyond its extent, then move on to the next document and are
// written over. So nothing is kept but the windows themselves.
#include <stdlib.h>
#include <string.h>

#include "kvq_datasets.h"
#include "python_random.h"
#include "windows_impl.h"

void kvq_windows_free(const kvq_context *ctx, kvq_windows *windows) {
    kvq_free(ctx, windows->ids);
    kvq_free(ctx, windows->heldout_ids);
    *windows = (kvq_windows){0};
}

static kvq_status check_shape(int64_t seq_len, int64_t n_windows, int64_t bos_id, kvq_error *err) {
    int64_t shortest = bos_id >= 0 ? 2 : 1; // a window that is only BOS would never advance
    if (seq_len < shortest)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "windows of %lld tokens; the shortest is %lld", (long long)seq_len,
                        (long long)shortest);
    if (n_windows < 1 || n_windows > INT32_MAX || n_windows > INT64_MAX / seq_len) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld windows of %lld tokens", (long long)n_windows,
                        (long long)seq_len);
    }
    if (bos_id > INT32_MAX) return kvq_fail(err, KVQ_ERR_USAGE, NULL, "beginning-of-text id %lld", (long long)bos_id);
    return KVQ_OK;
}

kvq_status windows_create(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, int64_t bos_id, kvq_windows *out,
                          kvq_error *err) {
    kvq_status status = check_shape(seq_len, n_windows, bos_id, err);
    if (status != KVQ_OK) return status;
    kvq_windows w = {.n_windows = n_windows, .seq_len = seq_len, .bos_added = bos_id >= 0};
    status = KVQ_NEW(ctx, n_windows * seq_len, "windows", &w.ids, err);
    if (status == KVQ_OK) *out = w;
    return status;
}

kvq_status windows_hash(kvq_windows *w, kvq_error *err) {
    return kvq_sha256_of(w->ids, (size_t)(w->n_windows * w->seq_len) * sizeof *w->ids, w->ids_sha256, err);
}

// ---------------------------------------------------------------- counting

// Tokens of the text in one window.
static int64_t window_step(const kvq_window_rule *rule) {
    return rule->bos_id >= 0 ? rule->seq_len - 1 : rule->seq_len;
}

typedef enum start_kind {
    STARTS_ANY,    // wherever a window fits into its document
    STARTS_PLACES, // floor(t / M) places in a document, counted by their tokens
} start_kind;

static int64_t extent(start_kind kind, int64_t n_tokens, int64_t step) {
    if (n_tokens < step) return 0;
    return kind == STARTS_ANY ? n_tokens - step + 1 : n_tokens / step * step;
}

typedef struct census {
    kvq_source_use use;
    int64_t        n_starts, n_places;
} census;

static void count_document(census *c, int64_t n_tokens, int64_t step) {
    if (n_tokens < step) {
        c->use.n_short++;
    } else {
        c->use.n_tokens += n_tokens;
        c->n_starts += extent(STARTS_ANY, n_tokens, step);
        c->n_places += n_tokens / step;
    }
}

static kvq_status take_census(const kvq_token_source *source, const kvq_window_rule *rule, census *out,
                              kvq_error *err) {
    source_reader   reader;
    kvq_token_batch batch = {0};
    census          c = {.n_starts = 0};
    int64_t         step = window_step(rule), n_tokens = 0;
    kvq_status      status = KVQ_OK;
    KVQ_TRY(reader_begin(&reader, source, rule, err));
    while (!batch.end) {
        KVQ_TRY(reader_next(&reader, &batch, err));
        n_tokens += batch.n;
        if (!batch.ends_document && !batch.end) continue;
        if (n_tokens > 0 || !rule->keep_documents) count_document(&c, n_tokens, step);
        if (!rule->keep_documents && n_tokens < step) c.use.n_tokens = n_tokens; // for the message
        n_tokens = 0;
    }
    c.use.n_documents = reader.n_documents;
    *out = c;
done:
    return status;
}

// ---------------------------------------------------------------- what cannot be

static kvq_status fail_named(const kvq_token_source *source, kvq_status status, kvq_error *err) {
    if (source->name != NULL) kvq_error_prefix(err, "%s: ", source->name);
    return status;
}

static kvq_status fail_too_short(const kvq_token_source *source, const kvq_window_rule *rule, const kvq_source_use *use,
                                 kvq_error *err) {
    const char *and_bos = rule->bos_id >= 0 ? " and a beginning-of-text token" : "";
    kvq_status  status;
    if (rule->keep_documents) {
        status = kvq_fail(err, KVQ_ERR_INPUT, "use shorter windows, or join the documents",
                          "none of the %lld documents has the %lld tokens%s of one window", (long long)use->n_documents,
                          (long long)window_step(rule), and_bos);
    } else {
        status = kvq_fail(err, KVQ_ERR_INPUT, "use a longer text or shorter windows",
                          "the text has %lld tokens, but one window needs %lld%s", (long long)use->n_tokens,
                          (long long)window_step(rule), and_bos);
    }
    return fail_named(source, status, err);
}

static void warn(const kvq_context *ctx, const kvq_token_source *source, const kvq_window_rule *rule,
                 const kvq_source_use *use) {
    const char *name = source->name != NULL ? source->name : "the text";
    if (rule->keep_documents && use->n_short > 0) {
        kvq_log(ctx, KVQ_LOG_WARNING,
                "%s: %lld of %lld documents are shorter than a window of %lld tokens and left out", name,
                (long long)use->n_short, (long long)use->n_documents, (long long)rule->seq_len);
    }
    if (use->overlap && rule->python_draw) {
        kvq_log(ctx, KVQ_LOG_WARNING, "%s: some windows share tokens, as Python happens to draw them", name);
    } else if (use->overlap) {
        kvq_log(ctx, KVQ_LOG_WARNING, "%s has fewer than %lld x %lld tokens%s, so windows overlap", name,
                (long long)use->n_windows, (long long)rule->seq_len,
                rule->keep_documents ? " in documents that hold whole windows" : "");
    }
}

// ---------------------------------------------------------------- starts

// One of `n_starts` places from stratum i of n. The strata differ by at most one place; with fewer places than strata
// some are empty and take the place they begin at.
static int64_t draw_start(uint64_t seed, uint32_t stream, int64_t i, int64_t n, int64_t n_starts) {
    int64_t whole = n_starts / n, rest = n_starts % n; // n is below 2^32, so nothing overflows
    int64_t low = whole * i + rest * i / n, high = whole * (i + 1) + rest * (i + 1) / n;
    if (high <= low) return low;
    return low + (int64_t)kvq_rng_below(seed, KVQ_RNG_WINDOWS, stream, (uint64_t)i, (uint64_t)(high - low));
}

// Fills starts [n], ascending. When all windows fit side by side, what is drawn is how much of the spare text, or how
// many of the spare places, lie before each; otherwise starts are drawn as they are, and windows share tokens.
static start_kind draw_starts(const kvq_window_rule *rule, const census *c, uint32_t stream, int64_t n,
                              int64_t *starts) {
    int64_t step = window_step(rule);
    bool    fit = c->n_places >= n, places = fit && rule->keep_documents;
    int64_t unit = places ? step : 1, apart = !fit ? 0 : places ? 1 : step;
    int64_t n_starts = places ? c->n_places - n + 1 : fit ? c->use.n_tokens - n * step + 1 : c->n_starts;
    for (int64_t i = 0; i < n; i++) starts[i] = (draw_start(rule->seed, stream, i, n, n_starts) + i * apart) * unit;
    return places ? STARTS_PLACES : STARTS_ANY;
}

static int by_start(const void *left, const void *right) {
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

// Of the T - M + 1 starts there are, Python programs leave out the last; so T must be more than M.
static kvq_status draw_python_starts(const kvq_token_source *source, const kvq_window_rule *rule, census *c,
                                     int64_t *starts, kvq_error *err) {
    python_random r;
    int64_t       n = c->use.n_windows, step = window_step(rule), last = c->use.n_tokens - step - 1;
    if (last < 0) {
        kvq_status status = kvq_fail(err, KVQ_ERR_INPUT, "use a longer text or shorter windows",
                                     "the text has %lld tokens, but one window as Python draws it needs %lld",
                                     (long long)c->use.n_tokens, (long long)(step + 1));
        return fail_named(source, status, err);
    }
    python_random_seed(&r, rule->seed);
    for (int64_t i = 0; i < n; i++) starts[i] = python_random_up_to(&r, last);
    qsort(starts, (size_t)n, sizeof *starts, by_start);
    for (int64_t i = 1; i < n; i++) c->use.overlap = c->use.overlap || starts[i] - starts[i - 1] < step;
    return KVQ_OK;
}

// ---------------------------------------------------------------- filling

// Where the tokens of one window lie and where they go.
typedef struct place {
    int64_t  start;
    int32_t *ids; // [M]
} place;

typedef struct filling {
    const place *places; // [n], ascending starts
    int64_t      n, step, n_filled;
    int64_t      base, position; // extents before the present document; tokens of it so far
    start_kind   kind;
} filling;

// Copies what the windows want of a batch at the present position. Windows end in the order of their starts.
static void copy_batch(filling *f, const kvq_token_batch *batch) {
    int64_t behind = f->position + batch->n;
    for (int64_t i = f->n_filled; i < f->n && f->places[i].start - f->base < behind; i++) {
        int64_t  start = f->places[i].start - f->base, from = start > f->position ? start : f->position;
        int64_t  end = start + f->step < behind ? start + f->step : behind;
        int32_t *ids = f->places[i].ids;
        if (from < end)
            memcpy(ids + (from - start), batch->ids + (from - f->position), (size_t)(end - from) * sizeof *ids);
    }
    f->position = behind;
    while (f->n_filled < f->n && f->places[f->n_filled].start - f->base + f->step <= behind) f->n_filled++;
}

static kvq_status fill_windows(const kvq_token_source *source, const kvq_window_rule *rule, filling *f,
                               kvq_error *err) {
    source_reader   reader;
    kvq_token_batch batch = {0};
    kvq_status      status = KVQ_OK;
    KVQ_TRY(reader_begin(&reader, source, rule, err));
    while (f->n_filled < f->n && !batch.end) {
        KVQ_TRY(reader_next(&reader, &batch, err));
        copy_batch(f, &batch);
        if (batch.ends_document) {
            f->base += extent(f->kind, f->position, f->step);
            f->position = 0;
        }
    }
    if (f->n_filled < f->n) {
        status = kvq_fail(err, KVQ_ERR_INTEGRITY, "start again when nothing writes to it",
                          "the second reading gave fewer tokens than the first");
        status = fail_named(source, status, err);
    }
done:
    return status;
}

static void put_bos(kvq_windows *w, int64_t bos_id) {
    for (int64_t i = 0; bos_id >= 0 && i < w->n_windows; i++) w->ids[i * w->seq_len] = (int32_t)bos_id;
    for (int64_t i = 0; bos_id >= 0 && i < w->n_heldout; i++) w->heldout_ids[i * w->seq_len] = (int32_t)bos_id;
}

// ---------------------------------------------------------------- drawn

static kvq_status count_sources(const kvq_context *ctx, const kvq_token_source *sources, const double *weights,
                                int n_sources, const kvq_window_rule *rule, census *counts, kvq_error *err) {
    double     tokens[KVQ_MAX_SOURCES];
    int64_t    dealt[KVQ_MAX_SOURCES];
    kvq_status status = KVQ_OK;
    for (int j = 0; j < n_sources; j++) {
        KVQ_TRY(take_census(&sources[j], rule, &counts[j], err));
        tokens[j] = counts[j].n_places > 0 ? (double)counts[j].use.n_tokens : 0;
        if (tokens[j] == 0 && (weights == NULL ? n_sources == 1 : weights[j] > 0)) {
            KVQ_TRY(fail_too_short(&sources[j], rule, &counts[j].use, err));
        }
    }
    bool any = false;
    for (int j = 0; j < n_sources; j++) any = any || tokens[j] > 0;
    if (!any) KVQ_TRY(fail_too_short(&sources[0], rule, &counts[0].use, err));
    deal_windows(weights != NULL ? weights : tokens, n_sources, rule->n_windows, dealt);
    for (int j = 0; j < n_sources; j++) {
        counts[j].use.n_windows = dealt[j];
        if (dealt[j] == 0) {
            kvq_log(ctx, KVQ_LOG_WARNING, "%s: none of the %lld windows comes from it",
                    sources[j].name != NULL ? sources[j].name : "the text", (long long)rule->n_windows);
        }
    }
done:
    return status;
}

static kvq_status check_sources(int n_sources, kvq_error *err) {
    if (n_sources >= 1 && n_sources <= KVQ_MAX_SOURCES) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%d texts; from 1 to %d can be mixed", n_sources, KVQ_MAX_SOURCES);
}

static kvq_status check_drawing(int n_sources, const kvq_window_rule *rule, kvq_error *err) {
    kvq_status status = KVQ_OK;
    KVQ_TRY(check_sources(n_sources, err));
    KVQ_TRY(check_shape(rule->seq_len, rule->n_windows, rule->bos_id, err));
    if (rule->n_heldout < 0) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld held-out windows", (long long)rule->n_heldout));
    }
    if (rule->python_draw && (n_sources != 1 || rule->keep_documents)) {
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, "use one text and join its documents",
                         "windows as Python draws them come from one text without bounds, not from %s",
                         n_sources != 1 ? "several texts" : "documents that are kept apart"));
    }
done:
    return status;
}

// Windows while they are drawn: those of a source stand together, in the order of sources.
typedef struct drawing {
    const kvq_token_source *sources;
    const kvq_window_rule  *rule;
    int                     n_sources;
    census                  counts[KVQ_MAX_SOURCES];
    start_kind              kinds[KVQ_MAX_SOURCES];
    int64_t                *starts;  // [n_windows]
    text_gap               *heldout; // the first w.n_heldout: where held-out windows lie
    place                  *places;  // [n_windows + w.n_heldout] scratch
    kvq_windows             w;
} drawing;

static kvq_status draw_all_starts(const kvq_context *ctx, drawing *d, kvq_error *err) {
    kvq_status status = KVQ_OK;
    int64_t   *starts = NULL;
    KVQ_TRY(KVQ_NEW(ctx, d->rule->n_windows, "places of windows", &d->starts, err));
    starts = d->starts;
    for (int j = 0; j < d->n_sources; j++) {
        census *c = &d->counts[j];
        d->w.n_available += c->use.n_tokens;
        if (d->rule->python_draw) {
            KVQ_TRY(draw_python_starts(&d->sources[j], d->rule, c, starts, err));
        } else if (c->use.n_windows > 0) {
            c->use.overlap = c->n_places < c->use.n_windows;
            d->kinds[j] = draw_starts(d->rule, c, (uint32_t)j, c->use.n_windows, starts);
        }
        warn(ctx, &d->sources[j], d->rule, &c->use);
        starts += c->use.n_windows;
    }
done:
    return status;
}

// Windows that Python draws overlap or not by chance, so none is held out beside them.
static kvq_status hold_out(const kvq_context *ctx, drawing *d, kvq_error *err) {
    kvq_status     status = KVQ_OK;
    const int64_t *starts = d->starts;
    int64_t        step = window_step(d->rule), n_gaps = 0;
    if (d->rule->n_heldout == 0 || d->rule->keep_documents || d->rule->python_draw) return KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, d->rule->n_windows + d->n_sources, "gaps between windows", &d->heldout, err));
    for (int j = 0; j < d->n_sources; j++) {
        const kvq_source_use *use = &d->counts[j].use;
        if (use->n_windows > 0 && !use->overlap)
            n_gaps += gaps_between(starts, use->n_windows, step, j, use->n_tokens, d->heldout + n_gaps);
        starts += use->n_windows;
    }
    d->w.n_heldout = choose_gaps(d->heldout, n_gaps, d->rule->n_heldout);
    KVQ_TRY(KVQ_NEW(ctx, d->w.n_heldout * d->w.seq_len, "held-out windows", &d->w.heldout_ids, err));
done:
    return status;
}

// Both kinds in one reading: the places of source j by their starts. Counts those before in *first and *first_heldout.
static int64_t places_of(const drawing *d, int j, int64_t *first, int64_t *first_heldout) {
    int64_t step = window_step(d->rule), skip = d->rule->seq_len - step, n = 0;
    int64_t end = *first + d->counts[j].use.n_windows;
    for (;;) {
        bool            more = *first < end;
        const text_gap *gap = *first_heldout < d->w.n_heldout ? &d->heldout[*first_heldout] : NULL;
        if (gap != NULL && gap->source != j) gap = NULL;
        if (!more && gap == NULL) return n;
        if (gap == NULL || (more && d->starts[*first] < gap->begin)) {
            d->places[n++] = (place){d->starts[*first], d->w.ids + *first * d->w.seq_len + skip};
            ++*first;
        } else {
            d->places[n++] = (place){gap->begin + (gap->n_tokens - step) / 2,
                                     d->w.heldout_ids + *first_heldout * d->w.seq_len + skip};
            ++*first_heldout;
        }
    }
}

static kvq_status fill_sources(const kvq_context *ctx, drawing *d, kvq_error *err) {
    int64_t    first = 0, first_heldout = 0;
    kvq_status status = KVQ_OK;
    KVQ_TRY(KVQ_NEW(ctx, d->w.n_windows + d->w.n_heldout, "places of windows", &d->places, err));
    for (int j = 0; j < d->n_sources; j++) {
        filling f = {.places = d->places, .step = window_step(d->rule), .kind = d->kinds[j]};
        f.n = places_of(d, j, &first, &first_heldout);
        if (f.n > 0) KVQ_TRY(fill_windows(&d->sources[j], d->rule, &f, err));
    }
    put_bos(&d->w, d->rule->bos_id);
done:
    return status;
}

kvq_status kvq_windows_draw(const kvq_context *ctx, const kvq_token_source *sources, const double *weights,
                            int n_sources, const kvq_window_rule *rule, kvq_source_use *uses, kvq_windows *out,
                            kvq_error *err) {
    drawing    d = {.sources = sources, .rule = rule, .n_sources = n_sources};
    kvq_status status = KVQ_OK;
    KVQ_TRY(check_drawing(n_sources, rule, err));
    KVQ_TRY(count_sources(ctx, sources, weights, n_sources, rule, d.counts, err));
    KVQ_TRY(windows_create(ctx, rule->seq_len, rule->n_windows, rule->bos_id, &d.w, err));
    KVQ_TRY(draw_all_starts(ctx, &d, err));
    KVQ_TRY(hold_out(ctx, &d, err));
    KVQ_TRY(fill_sources(ctx, &d, err));
    KVQ_TRY(windows_hash(&d.w, err));
    for (int j = 0; j < n_sources && uses != NULL; j++) uses[j] = d.counts[j].use;
    *out = d.w;
    d.w = (kvq_windows){0};
done:
    kvq_free(ctx, d.places);
    kvq_free(ctx, d.heldout);
    kvq_free(ctx, d.starts);
    kvq_windows_free(ctx, &d.w);
    return status;
}

// ---------------------------------------------------------------- consecutive

// Room for one more window behind the n that there are.
static kvq_status grow(const kvq_context *ctx, kvq_windows *w, int64_t n, int64_t *capacity, kvq_error *err) {
    int32_t *larger = NULL;
    int64_t  wider = *capacity < 8 ? 8 : 2 * *capacity;
    if (n < *capacity) return KVQ_OK;
    kvq_status status = check_shape(w->seq_len, wider, -1, err);
    if (status == KVQ_OK) status = KVQ_NEW(ctx, wider * w->seq_len, "windows", &larger, err);
    if (status != KVQ_OK) return status;
    if (n > 0) memcpy(larger, w->ids, (size_t)(n * w->seq_len) * sizeof *larger);
    kvq_free(ctx, w->ids);
    w->ids = larger;
    *capacity = wider;
    return KVQ_OK;
}

// Appends windows of one source, at most `most`.
static kvq_status take_source(const kvq_context *ctx, const kvq_token_source *source, const kvq_window_rule *rule,
                              int64_t most, kvq_windows *w, int64_t *capacity, kvq_source_use *use, kvq_error *err) {
    source_reader   reader;
    kvq_token_batch batch = {0};
    census          c = {.n_starts = 0};
    int64_t         step = window_step(rule), skip = rule->seq_len - step, n_tokens = 0, n_seen = 0, filled = 0;
    kvq_status      status = KVQ_OK;
    KVQ_TRY(reader_begin(&reader, source, rule, err));
    while (c.use.n_windows < most && !batch.end) {
        KVQ_TRY(reader_next(&reader, &batch, err));
        n_tokens += batch.n;
        n_seen += batch.n;
        for (int64_t at = 0; at < batch.n && c.use.n_windows < most;) {
            KVQ_TRY(grow(ctx, w, w->n_windows, capacity, err));
            int64_t n = step - filled < batch.n - at ? step - filled : batch.n - at;
            memcpy(w->ids + w->n_windows * w->seq_len + skip + filled, batch.ids + at, (size_t)n * sizeof *batch.ids);
            at += n;
            filled += n;
            if (filled < step) break;
            filled = 0;
            w->n_windows++;
            c.use.n_windows++;
        }
        if (!batch.ends_document && !batch.end) continue;
        if (n_tokens > 0) count_document(&c, n_tokens, step);
        n_tokens = filled = 0;
    }
    c.use.n_documents = reader.n_documents;
    c.use.n_tokens = rule->keep_documents ? c.use.n_tokens + n_tokens : n_seen;
    warn(ctx, source, rule, &c.use);
    w->n_available += c.use.n_tokens;
    *use = c.use;
done:
    return status;
}

// How many windows each source is to give, INT64_MAX for all.
static kvq_status deal_consecutive(const kvq_token_source *sources, const double *weights, int n_sources,
                                   const kvq_window_rule *rule, int64_t *dealt, kvq_error *err) {
    double     tokens[KVQ_MAX_SOURCES];
    double     total = 0;
    kvq_status status = KVQ_OK;
    for (int j = 0; j < n_sources; j++) dealt[j] = rule->n_windows > 0 ? rule->n_windows : INT64_MAX;
    if (rule->n_windows == 0 || n_sources == 1) return KVQ_OK;
    for (int j = 0; j < n_sources && weights == NULL; j++) {
        census c;
        KVQ_TRY(take_census(&sources[j], rule, &c, err));
        tokens[j] = c.n_places > 0 ? (double)c.use.n_tokens : 0;
        total += tokens[j];
        if (j == n_sources - 1 && total == 0) KVQ_TRY(fail_too_short(&sources[j], rule, &c.use, err));
    }
    deal_windows(weights != NULL ? weights : tokens, n_sources, rule->n_windows, dealt);
done:
    return status;
}

kvq_status kvq_windows_take(const kvq_context *ctx, const kvq_token_source *sources, const double *weights,
                            int n_sources, const kvq_window_rule *rule, kvq_source_use *uses, kvq_windows *out,
                            kvq_error *err) {
    kvq_windows    w = {.seq_len = rule->seq_len, .bos_added = rule->bos_id >= 0};
    kvq_source_use use[KVQ_MAX_SOURCES] = {{.n_documents = 0}};
    int64_t        dealt[KVQ_MAX_SOURCES], capacity = 0;
    kvq_status     status = KVQ_OK;
    KVQ_TRY(check_sources(n_sources, err));
    if (rule->python_draw)
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, NULL, "consecutive windows are not drawn as Python does"));
    KVQ_TRY(check_shape(rule->seq_len, rule->n_windows > 0 ? rule->n_windows : 1, rule->bos_id, err));
    KVQ_TRY(deal_consecutive(sources, weights, n_sources, rule, dealt, err));
    for (int j = 0; j < n_sources; j++) {
        if (dealt[j] == 0) continue;
        KVQ_TRY(take_source(ctx, &sources[j], rule, dealt[j], &w, &capacity, &use[j], err));
        if (use[j].n_windows == 0) KVQ_TRY(fail_too_short(&sources[j], rule, &use[j], err));
        if (weights != NULL && n_sources > 1 && use[j].n_windows < dealt[j] && rule->n_windows > 0) {
            status = kvq_fail(err, KVQ_ERR_INPUT, "ask for fewer windows, or weigh the text less",
                              "has %lld windows, but %lld of the %lld were to come from it",
                              (long long)use[j].n_windows, (long long)dealt[j], (long long)rule->n_windows);
            KVQ_TRY(fail_named(&sources[j], status, err));
        }
    }
    put_bos(&w, rule->bos_id);
    KVQ_TRY(windows_hash(&w, err));
    for (int j = 0; j < n_sources && uses != NULL; j++) uses[j] = use[j];
    *out = w;
    w.ids = NULL;
done:
    kvq_free(ctx, w.ids);
    return status;
}

// ---------------------------------------------------------------- lists of ids

kvq_status kvq_windows_consecutive(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_max,
                                   int64_t bos_id, kvq_windows *out, kvq_error *err) {
    kvq_ids          list = *ids;
    kvq_token_source source = source_of_ids(&list);
    kvq_window_rule  rule = {.seq_len = seq_len, .n_windows = n_max > 0 ? n_max : 0, .bos_id = bos_id};
    return kvq_windows_take(ctx, &source, NULL, 1, &rule, NULL, out, err);
}

kvq_status kvq_windows_drawn(const kvq_context *ctx, const kvq_ids *ids, int64_t seq_len, int64_t n_windows,
                             uint64_t seed, int64_t bos_id, kvq_windows *out, kvq_error *err) {
    kvq_ids          list = *ids;
    kvq_token_source source = source_of_ids(&list);
    kvq_window_rule  rule = {.seq_len = seq_len, .n_windows = n_windows, .seed = seed, .bos_id = bos_id};
    return kvq_windows_draw(ctx, &source, NULL, 1, &rule, NULL, out, err);
}
