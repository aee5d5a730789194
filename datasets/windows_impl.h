// SPDX-License-Identifier: Apache-2.0
//
// Private to datasets: how every kind of windows begins and ends, and how sources are read.
#ifndef KVQ_DATASETS_WINDOWS_IMPL_H
#define KVQ_DATASETS_WINDOWS_IMPL_H

#include "kvq_datasets.h"

// Checks the numbers (KVQ_ERR_USAGE) and allocates; everything else of *out is zero.
kvq_status windows_create(const kvq_context *ctx, int64_t seq_len, int64_t n_windows, int64_t bos_id, kvq_windows *out,
                          kvq_error *err);
// Fills ids_sha256.
kvq_status windows_hash(kvq_windows *windows, kvq_error *err);

// A list of ids as a source of one document, in one batch. The list is borrowed.
kvq_token_source source_of_ids(kvq_ids *ids);

// A source as a rule sees it: when documents are joined, all of it is one document, and joints are in their places.
typedef struct source_reader {
    const kvq_token_source *source;
    const kvq_window_rule  *rule;
    kvq_token_batch         held;          // comes behind the joint that was just given
    bool                    has_held, any; // any: ids came before
    bool                    fresh;         // the next ids are the first of a document
    int64_t                 n_documents;   // of the source itself
} source_reader;
kvq_status reader_begin(source_reader *reader, const kvq_token_source *source, const kvq_window_rule *rule,
                        kvq_error *err);
// Behind the batch with `end` nothing may be read.
kvq_status reader_next(source_reader *reader, kvq_token_batch *batch, kvq_error *err);

// A stretch of a source, long enough for a window, of which no drawn window has a token.
typedef struct text_gap {
    int     source;
    int64_t begin, n_tokens;
} text_gap;
// The gaps of a source of n_tokens tokens around n windows that do not overlap: out [n + 1]. Returns how many.
int64_t gaps_between(const int64_t *starts, int64_t n, int64_t step, int source, int64_t n_tokens, text_gap *out);
// Puts the widest, at most n_wanted, first and in the order of the text; the earlier one on a tie. Returns how many.
int64_t choose_gaps(text_gap *gaps, int64_t n_gaps, int64_t n_wanted);

// n windows to sources: n * w / sum(w), by largest remainders. The weights are 0 or more, and not all 0.
void deal_windows(const double *weights, int n_sources, int64_t n, int64_t *dealt);

// ---------------------------------------------------------------- line ends (newlines.c)

typedef struct newline_filter {
    char  *data;
    size_t n, capacity;
    size_t n_blanks; // at the end of what came, not given yet
    bool   after_feed;
} newline_filter;
void newline_filter_reset(newline_filter *filter);
void newline_filter_free(const kvq_context *ctx, newline_filter *filter);
// Changes a part of a text to point into the filter's own memory, valid until the next call.
kvq_status newline_filter_apply(const kvq_context *ctx, newline_filter *filter, kvq_newlines how, kvq_text_part *part,
                                kvq_error *err);

#endif
