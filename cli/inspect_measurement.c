// SPDX-License-Identifier: Apache-2.0
//
// kvq-inspect on a measurement: what was measured, how many samples the weights of each layer are worth, and in how
// many directions queries, keys and values spread. Layers are read one at a time.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inspect.h"

// What is known of one tensor of one layer. Of Q only the spectrum is.
typedef struct tensor_facts {
    char                       letter;
    const kvq_measured_tensor *measured; // [n_fractions], NULL for Q
    double                     kl;       // of this tensor alone in the reference allocation, 0 = not measured
    int                        n_heads, head_dim;
    double                    *values; // eigenvalues [n_heads, head_dim], NULL without moments
    double                    *ranks;  // [n_heads]
} tensor_facts;

typedef struct inspection {
    kvq_cli                   *cli;
    const inspect_options     *o;
    const kvq_measurement     *file;
    const kvq_artifact        *about;
    const kvq_measure_options *options;
    int                        fraction;  // shown in the table
    kvq_weighting              weighting; // likewise
    kvq_json                  *json;      // NULL for text
    cJSON                     *layers;
} inspection;

static const char LETTERS[] = "QKV";

// Kish's effective sample size of all heads together: (sum w)^2 / sum w^2.
static double effective_samples(const kvq_distribution *heads, int n_heads, kvq_weighting weighting) {
    double sum = 0, squares = 0;
    for (int h = 0; h < n_heads; h++) {
        const float *w = heads[h].by[weighting].w;
        for (int i = 0; i < KVQ_HISTOGRAM_BINS; i++) sum += (double)w[i];
        squares += heads[h].sums->w2[weighting];
    }
    return squares > 0 ? sum * sum / squares : 0;
}

static kvq_element_counts total_counts(const kvq_distribution *heads, int n_heads) {
    kvq_element_counts sum = {0};
    for (int h = 0; h < n_heads; h++) {
        sum.n_points += heads[h].counts->n_points;
        sum.n_outliers += heads[h].counts->n_outliers;
        sum.n_constant += heads[h].counts->n_constant;
        sum.n_clipped += heads[h].counts->n_clipped;
    }
    return sum;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// ---------------------------------------------------------------- the header

static void print_header(const inspection *s) {
    const kvq_measure_options *m = s->options;
    int                        d = (int)(s->about->model.n_kv_heads * s->about->model.head_dim);
    printf("measured   %s  sha256 %s\n", kvq_file_name(s->o->file), kvq_measurement_sha256(s->file));
    inspect_print_model(s->about);
    printf("contents   outliers");
    for (int f = 0; f < m->n_fractions; f++) {
        printf("%s %g%% (K %d, V %d per side and token)", f > 0 ? "," : "", m->fractions[f] * 100,
               kvq_measured_k_side(m, m->fractions[f], d), kvq_measured_v_side(m->fractions[f], d));
    }
    printf("\n           weightings");
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (kvq_weightings_have(m->weightings, (kvq_weighting)w)) printf(" %s", kvq_weighting_names[w]);
    }
    printf("\n           keys %s  ranges of K per %s", kvq_key_domain_names[m->k_domain], kvq_axis_names[m->k_axis]);
    if (m->k_axis == KVQ_AXIS_CHANNEL) printf(" by thresholds of the %s", kvq_scope_names[m->threshold_scope]);
    printf("  ranges per token by %s\n", kvq_token_range_names[m->token_range]);
    printf("           sink tokens %lld%s  second moments %s\n", (long long)m->sink_tokens,
           m->count_sinks ? ", counted in thresholds only" : "", m->moments ? "yes" : "no");
    if (m->allocated) {
        printf("           channels and rotated values: weighting %s  rotation %s  scales %s\n",
               kvq_weighting_names[m->channel_weighting], kvq_rotation_names[m->rotation],
               kvq_scale_format_names[m->scale_format]);
    }
    inspect_print_run(s->about);
}

static void add_header(const inspection *s) {
    const kvq_measure_options *m = s->options;
    kvq_json                  *json = s->json;
    kvq_json_text(json, json->root, "schema", "kvq.inspect-measurement/1");
    kvq_json_text(json, json->root, "file", kvq_file_name(s->o->file));
    kvq_json_text(json, json->root, "sha256", kvq_measurement_sha256(s->file));
    inspect_add_model(json, s->about);
    inspect_add_dataset(json, s->about);
    inspect_add_run(json, s->about);
    cJSON *measured = kvq_json_object(json, json->root, "measured");
    kvq_json_doubles(json, measured, "fractions", m->fractions, m->n_fractions);
    cJSON *weightings = kvq_json_array(json, measured, "weightings");
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (kvq_weightings_have(m->weightings, (kvq_weighting)w))
            kvq_json_text(json, weightings, NULL, kvq_weighting_names[w]);
    }
    kvq_json_count(json, measured, "bins", KVQ_HISTOGRAM_BINS);
    kvq_json_count(json, measured, "sink_tokens", m->sink_tokens);
    kvq_json_bool(json, measured, "count_sinks", m->count_sinks);
    kvq_json_text(json, measured, "k_axis", kvq_axis_names[m->k_axis]);
    kvq_json_text(json, measured, "k_domain", kvq_key_domain_names[m->k_domain]);
    kvq_json_text(json, measured, "threshold_scope", kvq_scope_names[m->threshold_scope]);
    kvq_json_count(json, measured, "k_slots", m->k_slots);
    kvq_json_text(json, measured, "token_range", kvq_token_range_names[m->token_range]);
    kvq_json_bool(json, measured, "moments", m->moments);
    if (!m->allocated) return;
    kvq_json_bool(json, measured, "allocated", true);
    kvq_json_text(json, measured, "channel_weighting", kvq_weighting_names[m->channel_weighting]);
    kvq_json_text(json, measured, "rotation", kvq_rotation_names[m->rotation]);
    kvq_json_text(json, measured, "scale_format", kvq_scale_format_names[m->scale_format]);
}

// ---------------------------------------------------------------- one tensor

static void print_tensor(const inspection *s, int64_t layer, tensor_facts *t) {
    int n = t->n_heads;
    printf("%5lld  %c     ", (long long)layer, t->letter);
    if (t->measured != NULL) {
        const kvq_distribution *heads = t->measured[s->fraction].heads;
        kvq_element_counts      counts = total_counts(heads, n);
        int64_t                 all = counts.n_points + counts.n_outliers + counts.n_constant;
        printf("  %12lld  %7.3f%%  %7.3f%%  %17.1f", (long long)all, inspect_share(counts.n_outliers, all) * 100,
               inspect_share(counts.n_clipped, all) * 100, effective_samples(heads, n, s->weighting));
    } else {
        printf("  %12s  %8s  %8s  %17s", "-", "-", "-", "-");
    }
    if (t->ranks != NULL) {
        qsort(t->ranks, (size_t)n, sizeof *t->ranks, compare_doubles);
        double median = (t->ranks[(n - 1) / 2] + t->ranks[n / 2]) / 2;
        printf("  %6.1f  %6.1f  %6.1f of %d", t->ranks[0], median, t->ranks[n - 1], t->head_dim);
    }
    if (t->kl > 0) printf("  KL %.4e nats", t->kl);
    printf("\n");
    for (int h = 0; s->o->spectrum && h < n; h++) {
        printf("       eigenvalues of head %d:", h);
        for (int i = 0; i < t->head_dim; i++) printf(" %.4g", t->values[h * t->head_dim + i]);
        printf("\n");
    }
}

static void add_fraction(const inspection *s, cJSON *list, const tensor_facts *t, int fraction) {
    const kvq_distribution *heads = t->measured[fraction].heads;
    kvq_element_counts      counts = total_counts(heads, t->n_heads);
    cJSON                  *object = kvq_json_object(s->json, list, NULL);
    kvq_json_number(s->json, object, "fraction", s->options->fractions[fraction]);
    kvq_json_count(s->json, object, "points", counts.n_points);
    kvq_json_count(s->json, object, "outliers", counts.n_outliers);
    kvq_json_count(s->json, object, "constant", counts.n_constant);
    kvq_json_count(s->json, object, "clipped", counts.n_clipped);
    cJSON *samples = kvq_json_object(s->json, object, "effective_samples");
    for (int w = 0; w < KVQ_N_WEIGHTINGS; w++) {
        if (!kvq_weightings_have(s->options->weightings, (kvq_weighting)w)) continue;
        kvq_json_number(s->json, samples, kvq_weighting_names[w],
                        effective_samples(heads, t->n_heads, (kvq_weighting)w));
    }
}

static void add_tensor(const inspection *s, cJSON *layer, const tensor_facts *t) {
    const char key[2] = {(char)(t->letter - 'Q' + 'q'), 0};
    cJSON     *tensor = kvq_json_object(s->json, layer, key);
    if (t->measured != NULL) {
        cJSON *fractions = kvq_json_array(s->json, tensor, "fractions");
        for (int f = 0; f < s->options->n_fractions; f++) add_fraction(s, fractions, t, f);
    }
    if (t->kl > 0) kvq_json_number(s->json, tensor, "kl", t->kl);
    if (t->ranks != NULL) kvq_json_doubles(s->json, tensor, "effective_rank", t->ranks, t->n_heads);
    if (!s->o->spectrum) return;
    cJSON *spectrum = kvq_json_array(s->json, tensor, "spectrum");
    for (int h = 0; h < t->n_heads; h++)
        kvq_json_doubles(s->json, spectrum, NULL, t->values + (int64_t)h * t->head_dim, t->head_dim);
}

// ---------------------------------------------------------------- layers

static kvq_status show_tensor(const inspection *s, int64_t layer, const kvq_measured_layer *measured, char letter,
                              cJSON *object, kvq_error *err) {
    kvq_status         status = KVQ_OK;
    const kvq_context *ctx = &s->cli->ctx;
    tensor_facts       t = {.letter = letter, .head_dim = measured->head_dim};
    t.n_heads = letter == 'Q' ? measured->n_heads : measured->n_kv_heads;
    t.measured = letter == 'Q' ? NULL : letter == 'K' ? measured->k : measured->v;
    if (measured->kl != NULL && letter != 'Q') t.kl = measured->kl[letter == 'V'];
    if (s->options->moments) {
        KVQ_TRY(KVQ_NEW(ctx, (int64_t)t.n_heads * t.head_dim, "eigenvalues", &t.values, err));
        KVQ_TRY(KVQ_NEW(ctx, t.n_heads, "effective ranks", &t.ranks, err));
        KVQ_TRY(kvq_measurement_spectrum(ctx, s->file, layer, (char)(letter - 'Q' + 'q'), t.values, err));
        for (int h = 0; h < t.n_heads; h++)
            t.ranks[h] = kvq_effective_rank(t.values + (int64_t)h * t.head_dim, t.head_dim);
    }
    if (s->json != NULL)
        add_tensor(s, object, &t);
    else
        print_tensor(s, layer, &t);
done:
    kvq_free(ctx, t.values);
    kvq_free(ctx, t.ranks);
    return status;
}

static kvq_status show_layer(const inspection *s, int64_t layer, kvq_error *err) {
    kvq_status          status = KVQ_OK;
    kvq_measured_layer *measured = NULL;
    cJSON              *object = NULL;
    KVQ_TRY(kvq_measurement_read(&s->cli->ctx, s->file, layer, &measured, err));
    if (s->o->check) goto done;
    if (s->json != NULL) {
        object = kvq_json_object(s->json, s->layers, NULL);
        kvq_json_count(s->json, object, "layer", layer);
    }
    for (int i = 0; i < 3; i++) {
        bool wanted = inspect_wants_tensor(s->o, (inspect_tensor)(INSPECT_Q + i));
        if (!wanted || (LETTERS[i] == 'Q' && !s->options->moments)) continue;
        KVQ_TRY(show_tensor(s, layer, measured, LETTERS[i], object, err));
    }
done:
    kvq_measured_layer_destroy(&s->cli->ctx, &measured);
    return status;
}

// The best weighting there is, and the fraction asked for.
static kvq_status choose(inspection *s, kvq_error *err) {
    static const kvq_weighting BEST[] = {KVQ_WEIGHT_FISHER_SCALED, KVQ_WEIGHT_FISHER, KVQ_WEIGHT_NONE};
    for (int i = CLI_COUNT_OF(BEST) - 1; i >= 0; i--) {
        if (kvq_weightings_have(s->options->weightings, BEST[i])) s->weighting = BEST[i];
    }
    if (s->o->fraction >= 0) s->fraction = kvq_measured_fraction(s->options, s->o->fraction);
    if (s->fraction < 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "kvq-inspect without --fraction lists those that were",
                        "--fraction %g was not measured in %s", s->o->fraction, s->o->file);
    }
    if ((s->o->spectrum || s->o->tensor == INSPECT_Q) && !s->options->moments) {
        return kvq_fail(err, KVQ_ERR_USAGE, "measure again with second moments",
                        "%s holds no second moments, so there is no spectrum and nothing of Q", s->o->file);
    }
    return KVQ_OK;
}

static void print_table_head(const inspection *s) {
    printf("\noutliers %g%%, weighting %s\n", s->options->fractions[s->fraction] * 100,
           kvq_weighting_names[s->weighting]);
    printf("layer  tensor      elements  outliers   clipped  effective samples%s\n",
           s->options->moments ? "  effective rank of heads: min, median, max" : "");
}

static kvq_status report(inspection *s, kvq_error *err) {
    kvq_status status = KVQ_OK;
    if (s->json != NULL) {
        add_header(s);
        s->layers = kvq_json_array(s->json, s->json->root, "layers");
    } else if (!s->o->check) {
        print_header(s);
        print_table_head(s);
    }
    for (int64_t layer = 0; layer < s->about->model.n_layers; layer++) {
        if (s->o->check || inspect_wants_layer(s->o, layer)) KVQ_TRY(show_layer(s, layer, err));
    }
    if (s->json != NULL)
        KVQ_TRY(kvq_json_print(s->json, err));
    else if (s->o->check)
        printf("ok  sha256 %s\n", kvq_measurement_sha256(s->file));
done:
    return status;
}

kvq_status inspect_measurement(kvq_cli *cli, const inspect_options *o, kvq_error *err) {
    kvq_status       status = KVQ_OK;
    kvq_measurement *file = NULL;
    kvq_json         json = {0};
    inspection       s = {.cli = cli, .o = o};
    if (o->codebook) {
        return kvq_fail(err, KVQ_ERR_USAGE, "kvq-calibrate --from makes an artifact of it",
                        "%s is a measurement; --codebook is about an artifact (.kvq.h5)", o->file);
    }
    KVQ_TRY(kvq_measurement_open(&cli->ctx, o->file, &file, err));
    s.file = file;
    s.about = kvq_measurement_about(file);
    s.options = kvq_measurement_options(file);
    KVQ_TRY(inspect_check_layer(o, s.about->model.n_layers, err));
    KVQ_TRY(choose(&s, err));
    if (o->json && !o->check) {
        kvq_json_init(&json);
        s.json = &json;
    }
    KVQ_TRY(report(&s, err));
    kvq_cli_next(cli, "kvq-calibrate", "--from", o->file, "-o", "OUT.kvq.h5", NULL);
done:
    kvq_json_free(&json);
    kvq_measurement_close(&cli->ctx, &file);
    return status;
}
