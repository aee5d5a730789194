// SPDX-License-Identifier: Apache-2.0
//
// kvq-validate --passkey: a number is hidden in windows of filler, and asked for at the end of them.
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "validate_passkey.h"

static const double USUAL_DEPTHS[] = {0, 0.25, 0.5, 0.75, 1};

// ---------------------------------------------------------------- options

// "1k,2048": false when it is no such list.
static bool parse_lengths(const char *text, passkey_report *r) {
    for (const char *at = text;; at++) {
        char *end;
        errno = 0;
        long long value = strtoll(at, &end, 10);
        if (!isdigit((unsigned char)*at) || errno != 0 || (double)value > CLI_MAX_TOKENS) return false;
        if (tolower((unsigned char)*end) == 'k') {
            value *= 1024;
            end++;
        }
        if (value < 1 || (double)value > CLI_MAX_TOKENS || r->n_lengths == PASSKEY_MAX_LENGTHS) return false;
        r->lengths[r->n_lengths++] = value;
        if (*end == 0) return true;
        if (*end != ',') return false;
        at = end;
    }
}

kvq_status passkey_plan(const passkey_wanted *o, passkey_report *out, kvq_error *err) {
    passkey_report r = {.n_lengths = 0};
    if (!parse_lengths(o->lengths, &r)) {
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "--passkey: '%s' is not a list of up to %d lengths like 1k,2k,4096",
                        o->lengths, PASSKEY_MAX_LENGTHS);
    }
    r.n_depths = o->depths.count > 0 ? o->depths.count : CLI_COUNT_OF(USUAL_DEPTHS);
    r.n_trials = o->trials > 0 ? o->trials : PASSKEY_TRIALS;
    for (int i = 0; i < r.n_lengths; i++) {
        for (int j = 0; j < r.n_depths; j++) {
            double depth = o->depths.count > 0 ? o->depths.values[j] : USUAL_DEPTHS[j];
            r.cells[i * r.n_depths + j] = (kvq_passkey_cell){.seq_len = r.lengths[i], .depth = depth};
        }
    }
    *out = r;
    return KVQ_OK;
}

// ---------------------------------------------------------------- the test

static kvq_status make_windows(kvq_cli *cli, const kvq_tokenizer *tokenizer, const kvq_passkey_rule *same,
                               passkey_report *r, kvq_error *err) {
    double     depths[KVQ_MAX_FRACTIONS];
    kvq_status status = KVQ_OK;
    for (int j = 0; j < r->n_depths; j++) depths[j] = r->cells[j].depth;
    for (int i = 0; i < r->n_lengths; i++) {
        kvq_passkey_rule rule = *same;
        rule.seq_len = r->lengths[i];
        rule.depths = depths;
        KVQ_TRY(kvq_passkeys_make(&cli->ctx, tokenizer, &rule, &r->windows[i], err));
    }

done:
    return status;
}

kvq_status passkey_prepare(kvq_cli *cli, const kvq_model_config *config, const char *model_path, int bos, uint64_t seed,
                           passkey_report *r, kvq_cli_tokenizer *tokenizer, kvq_error *err) {
    kvq_tokenizer   *opened = NULL;
    kvq_passkey_rule rule = {
        .n_depths = r->n_depths, .n_trials = r->n_trials, .seed = seed, .vocab_size = config->vocab_size};
    kvq_status status = KVQ_OK;
    for (int i = 0; i < r->n_lengths; i++) {
        if (config->max_positions == 0 || r->lengths[i] <= config->max_positions) continue;
        KVQ_TRY(kvq_fail(err, KVQ_ERR_USAGE, "choose shorter windows", "--passkey %lld: the model has %lld positions",
                         (long long)r->lengths[i], (long long)config->max_positions));
    }
    KVQ_TRY(kvq_tokenizer_open(&cli->ctx, model_path, &opened, err));
    kvq_tokenizer_info info = kvq_tokenizer_describe(opened);
    int64_t            known_bos = info.bos_id >= 0 ? info.bos_id : config->bos_id;
    KVQ_TRY(kvq_cli_resolve_bos(bos, info.adds_bos, known_bos, config->vocab_size, &rule.bos_id, err));
    KVQ_TRY(make_windows(cli, opened, &rule, r, err));
    (void)snprintf(tokenizer->kind, sizeof tokenizer->kind, "%s", info.kind);
    memcpy(tokenizer->sha256, info.sha256, sizeof tokenizer->sha256);

done:
    kvq_tokenizer_close(&cli->ctx, &opened);
    return status;
}

kvq_validate_cost passkey_cost(const kvq_model *model, const passkey_report *r) {
    kvq_validate_cost all = {0};
    for (int i = 0; i < r->n_lengths; i++) {
        const kvq_windows         *w = &r->windows[i].windows;
        const kvq_validate_options options = kvq_passkey_options(&r->windows[i]);
        kvq_validate_cost          cost = kvq_validate_plan(model, true, w->n_windows, w->seq_len, &options);
        all.bytes = cost.bytes > all.bytes ? cost.bytes : all.bytes;
        all.tera_flops += cost.tera_flops;
    }
    return all;
}

kvq_status passkey_run(kvq_cli *cli, const kvq_backend *be, kvq_model *model, const kvq_artifact *artifact,
                       passkey_report *r, kvq_error *err) {
    int        n_cells = r->n_lengths * r->n_depths;
    kvq_status status = KVQ_OK;
    for (int i = 0; i < r->n_lengths; i++) {
        KVQ_TRY(kvq_validate_passkey(&cli->ctx, be, model, artifact, &r->windows[i], r->cells + i * r->n_depths, err));
    }
    for (int i = 0; i < n_cells; i++) {
        r->all.n_trials += r->cells[i].n_trials;
        r->all.baseline += r->cells[i].baseline;
        r->all.quantized += r->cells[i].quantized;
        r->all.both += r->cells[i].both;
    }
    r->kept = kvq_passkey_kept(r->cells, n_cells);

done:
    return status;
}

void passkey_free(kvq_cli *cli, passkey_report *r) {
    for (int i = 0; i < r->n_lengths; i++) kvq_passkeys_free(&cli->ctx, &r->windows[i]);
}

// ---------------------------------------------------------------- reports

void passkey_say(kvq_cli *cli, const passkey_report *r) {
    kvq_cli_say(cli, "passkey    %d lengths  %d depths  %lld windows of each  BOS %s", r->n_lengths, r->n_depths,
                (long long)r->n_trials, r->windows[0].windows.bos_added ? "added" : "not added");
}

void passkey_print(const passkey_report *r) {
    const kvq_passkey_cell *all = &r->all;
    printf("passkey: keys retrieved of %lld, with the full-precision / with the quantised cache\n",
           (long long)r->n_trials);
    printf("tokens  depth");
    for (int j = 0; j < r->n_depths; j++) printf("  %8g%%", r->cells[j].depth * 100);
    printf("\n");
    for (int i = 0; i < r->n_lengths; i++) {
        printf("%6lld       ", (long long)r->lengths[i]);
        for (int j = 0; j < r->n_depths; j++) {
            const kvq_passkey_cell *cell = &r->cells[i * r->n_depths + j];
            printf("  %3lld / %3lld", (long long)cell->baseline, (long long)cell->quantized);
        }
        printf("\n");
    }
    printf("%-16s %lld / %lld of %lld\n", "all", (long long)all->baseline, (long long)all->quantized,
           (long long)all->n_trials);
    if (all->baseline > 0) {
        printf("%-16s %lld of the %lld that the baseline retrieves: %.2f%% (%.2f .. %.2f)\n", "kept",
               (long long)all->both, (long long)all->baseline, 100 * r->kept.value, 100 * r->kept.low,
               100 * r->kept.high);
    } else {
        printf("%-16s the baseline retrieves none, so the cache cannot be judged\n", "kept");
    }
}

static void add_counts(kvq_json *json, cJSON *object, const kvq_passkey_cell *cell) {
    kvq_json_count(json, object, "trials", cell->n_trials);
    kvq_json_count(json, object, "baseline", cell->baseline);
    kvq_json_count(json, object, "quantized", cell->quantized);
    kvq_json_count(json, object, "both", cell->both);
}

void passkey_add(kvq_json *json, const passkey_report *r, uint64_t seed, int bos, const kvq_cli_tokenizer *tokenizer) {
    cJSON *passkey = kvq_json_object(json, json->root, "passkey");
    kvq_json_seed(json, passkey, "seed", seed);
    kvq_json_text(json, passkey, "tokenizer", tokenizer->kind);
    kvq_json_text(json, passkey, "tokenizer_sha256", tokenizer->sha256);
    kvq_json_text(json, passkey, "bos", kvq_cli_bos_names[bos]);
    kvq_json_bool(json, passkey, "bos_added", r->windows[0].windows.bos_added);
    cJSON *lengths = kvq_json_array(json, passkey, "lengths");
    for (int i = 0; i < r->n_lengths; i++) {
        cJSON *length = kvq_json_object(json, lengths, NULL);
        kvq_json_count(json, length, "tokens", r->lengths[i]);
        kvq_json_text(json, length, "token_ids_sha256", r->windows[i].windows.ids_sha256);
        cJSON *depths = kvq_json_array(json, length, "depths");
        for (int j = 0; j < r->n_depths; j++) {
            const kvq_passkey_cell *cell = &r->cells[i * r->n_depths + j];
            cJSON                  *depth = kvq_json_object(json, depths, NULL);
            kvq_json_number(json, depth, "depth", cell->depth);
            add_counts(json, depth, cell);
        }
    }
    add_counts(json, kvq_json_object(json, passkey, "all"), &r->all);
    cJSON *kept = kvq_json_object(json, passkey, "kept");
    kvq_json_number(json, kept, "mean", r->kept.value);
    kvq_json_number(json, kept, "stderr", r->kept.stderr_);
    kvq_json_number(json, kept, "low", r->kept.low);
    kvq_json_number(json, kept, "high", r->kept.high);
}
