// SPDX-License-Identifier: Apache-2.0
//
// The pictures of a report as commands of gnuplot, with their data inside. Every text in them is ours, and numbers that
// are not known are NaN, which gnuplot leaves out.
#include <math.h>

#include "validate_report.h"

#define BASELINE  "#64748b" // colours: full precision, ...
#define QUANTIZED "#2563eb" // ... the quantised cache, ...
#define KEYS      "#d97706" // ... and what K or V alone does to it
#define VALUES    "#059669"

// ---------------------------------------------------------------- data

static void add_row(FILE *to, double x, const double *values, int n) {
    (void)fprintf(to, "%.9g", x);
    for (int i = 0; i < n; i++) (void)(isfinite(values[i]) ? fprintf(to, " %.9g", values[i]) : fputs(" NaN", to));
    (void)fputc('\n', to);
}

static bool has_bucket(const kvq_bucket *buckets, int n) {
    for (int i = 0; i < n; i++) {
        if (isfinite(buckets[i].kld.value)) return true;
    }
    return false;
}
static bool has_positions(const validate_report *r) {
    return r->artifact != NULL && has_bucket(r->validation.positions, r->validation.n_positions);
}
static bool has_confidences(const validate_report *r) {
    return r->artifact != NULL && has_bucket(r->validation.confidences, r->validation.n_confidences);
}

// Buckets stand side by side under their beginnings, which is a logarithmic axis for positions.
static void add_ticks(FILE *to, const kvq_bucket *buckets, int n) {
    (void)fputs("set xtics (", to);
    for (int i = 0; i < n; i++) (void)fprintf(to, "%s\"%g\" %d", i > 0 ? ", " : "", buckets[i].from, i);
    (void)fprintf(to, ")\nset xrange [-0.5:%d.5]\n", n - 1);
}

// ---------------------------------------------------------------- one per picture

static void plot_perplexity(const validate_report *r, FILE *to) {
    const kvq_validation *v = &r->validation;
    add_ticks(to, v->positions, v->n_positions);
    (void)fputs(
        "set xlabel 'position in the window, from'\nset ylabel 'perplexity'\nset key above right horizontal\n$d << E\n",
        to);
    for (int i = 0; i < v->n_positions; i++) {
        const double values[] = {exp(v->positions[i].baseline_nll), exp(v->positions[i].quantized_nll)};
        add_row(to, i, values, 2);
    }
    (void)fputs("E\nplot $d using 1:3 with linespoints ls 2 title 'quantised', "
                "$d using 1:2 with linespoints ls 1 title 'full precision'\n",
                to);
}

static void plot_kld(const kvq_bucket *buckets, int n, const char *label, FILE *to) {
    add_ticks(to, buckets, n);
    (void)fprintf(to,
                  "set xlabel '%s'\nset ylabel 'KL divergence, nats per token'\nset yrange [0:*]\nunset key\n$d << E\n",
                  label);
    for (int i = 0; i < n; i++) {
        const kvq_estimate *x = &buckets[i].kld;
        const double        values[] = {x->value, x->low > 0 ? x->low : 0, x->high};
        add_row(to, i, values, 3);
    }
    (void)fputs("E\nplot $d using 1:2:3:4 with yerrorbars ls 3 notitle, $d using 1:2 with linespoints ls 2 notitle\n",
                to);
}

static void plot_kld_position(const validate_report *r, FILE *to) {
    plot_kld(r->validation.positions, r->validation.n_positions, "position in the window, from", to);
}

static void plot_kld_confidence(const validate_report *r, FILE *to) {
    plot_kld(r->validation.confidences, r->validation.n_confidences,
             "probability of the first choice in full precision, from", to);
}

static bool has_layers(const validate_report *r) {
    const kvq_validation *v = &r->validation;
    for (int64_t l = 0; v->layers != NULL && l < v->n_layers; l++) {
        if (isfinite(v->layers[l].attention_error.value)) return true;
    }
    return false;
}

static void plot_layers(const validate_report *r, FILE *to) {
    const kvq_validation *v = &r->validation;
    (void)fprintf(to,
                  "set xrange [-0.5:%lld.5]\nset yrange [0:*]\nset xlabel 'layer'\n"
                  "set ylabel 'error of the attention output, %%'\nset key above right horizontal\n$d << E\n",
                  (long long)v->n_layers - 1);
    for (int64_t l = 0; l < v->n_layers; l++) {
        const kvq_layer_errors *e = &v->layers[l];
        const double            values[] = {100 * e->attention_error.value, 100 * e->attention_error.low,
                                            100 * e->attention_error.high, 100 * e->k.attention_error, 100 * e->v.attention_error};
        add_row(to, (double)l, values, 5);
    }
    (void)fputs(
        "E\nplot $d using 1:2:3:4 with yerrorbars ls 3 notitle, $d using 1:2 with linespoints ls 2 title 'both', "
        "$d using 1:5 with linespoints ls 4 title 'K alone', $d using 1:6 with linespoints ls 5 title 'V alone'\n",
        to);
}

static void histogram_ends(const kvq_validation *v, int *first, int *last) {
    *first = KVQ_KLD_BINS;
    *last = -1;
    for (int i = 0; i < KVQ_KLD_BINS; i++) {
        if (v->kld_histogram[i] == 0) continue;
        if (*last < 0) *first = i;
        *last = i;
    }
}

static bool has_histogram(const validate_report *r) {
    int first, last;
    histogram_ends(&r->validation, &first, &last);
    return r->artifact != NULL && last >= 0;
}

// The axis is the logarithm itself: boxes of equal width, and a number at each power of ten.
static void plot_histogram(const validate_report *r, FILE *to) {
    const kvq_validation *v = &r->validation;
    int                   first, last;
    histogram_ends(v, &first, &last);
    (void)fputs("set xtics (", to);
    for (int power = -8; power <= 2; power++)
        (void)fprintf(to, "%s'10^{%s%d}' %d", power > -8 ? ", " : "", power < 0 ? "−" : "", power < 0 ? -power : power,
                      power);
    (void)fprintf(to,
                  ")\nset xrange [%.2f:%.2f]\nset yrange [0:*]\nset xlabel 'KL divergence of a token, nats'\n"
                  "set ylabel 'share of tokens, %%'\nset boxwidth 0.25\nset style fill solid 0.75 noborder\nunset key\n"
                  "$d << E\n",
                  first / 4.0 - 8.25, (last + 1) / 4.0 - 7.75);
    for (int i = first; i <= last; i++) {
        double share = 100 * (double)v->kld_histogram[i] / (double)v->tokens_scored;
        add_row(to, (i + 0.5) / 4 - 8, &share, 1);
    }
    (void)fputs("E\nplot $d using 1:2 with boxes lc rgb '" QUANTIZED "' notitle\n", to);
}

static const report_plot PLOTS[] = {
    {"Perplexity by position", "A cache that loses more the longer it grows would part the lines.", false,
     has_positions, plot_perplexity},
    {"KL divergence by position", "With intervals of 95 % over windows.", false, has_positions, plot_kld_position},
    {"Distribution of KL divergence", "Each token once; means hide the right end.", false, has_histogram,
     plot_histogram},
    {"KL divergence by confidence", "By the probability that full precision gives its first choice.", false,
     has_confidences, plot_kld_confidence},
    {"Error of each layer", "Relative error of the attention output when the layer's input is exact.", true, has_layers,
     plot_layers},
};

const report_plot *report_plots(int *n) {
    *n = CLI_COUNT_OF(PLOTS);
    return PLOTS;
}

// What all of them begin with.
void begin_plot(const report_plot *plot, FILE *to) {
    (void)fprintf(to, "set terminal svg size %d,280 font 'sans-serif,13' background 'white' linewidth 1\n",
                  plot->wide ? 980 : 480);
    (void)fputs("set encoding utf8\n"
                "set border 3 lc rgb '#94a3b8'\n"
                "set tics nomirror out scale 0.5 textcolor rgb '#475569'\n"
                "set grid ytics lc rgb '#e2e8f0' lt 1 lw 1\n"
                "set xlabel textcolor rgb '#475569'\nset ylabel textcolor rgb '#475569'\n"
                "set key textcolor rgb '#334155' samplen 2 spacing 1.2\n"
                "set style line 1 lc rgb '" BASELINE "' lw 2 pt 7 ps 0.45\n"
                "set style line 2 lc rgb '" QUANTIZED "' lw 2 pt 7 ps 0.45\n"
                "set style line 3 lc rgb '#93c5fd' lw 2 pt 0\n"
                "set style line 4 lc rgb '" KEYS "' lw 2 pt 7 ps 0.45\n"
                "set style line 5 lc rgb '" VALUES "' lw 2 pt 7 ps 0.45\n",
                to);
}
