// SPDX-License-Identifier: Apache-2.0
//
// kvq-bench: how fast this machine does what kvq spends its time on, as ratios and fractions measured in one run.
#include <stdio.h>
#include <string.h>

#include "bench.h"

#define AT(field) offsetof(bench_options, field)
static const kvq_cli_option OPTIONS[] = {
    {"CASE...", 0, CLI_OPERANDS, AT(cases), NULL, .help = "what to measure: matmul, sweep, fit, tokenizer, codec"},
    {"model", 0, CLI_TEXT, AT(model), "PATH", .help = "for sweep and tokenizer: HF directory or one GGUF file"},
    {"text", 0, CLI_TEXT, AT(text), "FILE", .help = "for tokenizer: a text"},
    {"points", 0, CLI_TEXT, AT(points), "FILE",
     .help = "for fit: pairs of f32, a position in [-1, 1] and its weight, instead of made-up ones"},
    {"bits", 0, CLI_COUNT, AT(bits), "B", .help = "for fit with --points: only this width (2 to 4)", .min = 1,
     .max = KVQ_MAX_BITS},
    {"shape", 0, CLI_LIST, AT(shapes), "OUTxIN[xROWS]", .help = "for matmul: one more product; repeatable"},
    {"seq-len", 0, CLI_COUNT, AT(seq_len), "S", .help = "tokens per window of sweep (512), rows of a shape (2048)",
     .min = 2, .max = CLI_MAX_TOKENS},
    {"windows", 0, CLI_COUNT, AT(windows), "N", .help = "windows of random token ids of sweep (1)", .min = 1,
     .max = CLI_MAX_TOKENS},
    {"layers", 0, CLI_COUNT, AT(layers), "N", .help = "only the first N layers in sweep (all)", .min = 1,
     .max = KVQ_MAX_LAYERS},
    {"tokens", 0, CLI_COUNT, AT(tokens), "N",
     .help = "for codec: tokens of a prompt (2048), rounded up to tiles of 128", .min = 1, .max = CLI_MAX_TOKENS},
    {"kv-heads", 0, CLI_COUNT, AT(kv_heads), "N", .help = "for codec: KV heads of a layer (8)", .min = 1, .max = 1024},
    {"head-dim", 0, CLI_COUNT, AT(head_dim), "D", .help = "for codec: channels of a head, even (128)", .min = 8,
     .max = 256},
    {"context", 0, CLI_LIST, AT(contexts), "N",
     .help = "for codec on a device: tokens that are attended to; repeatable (4096, 16384, 65536)"},
    {"device", 0, CLI_TEXT, AT(engine.device), "DEV",
     .help = "for codec: cpu, cuda, cuda:N, or auto (default): a GPU beside the CPU when there is one"},
    {"compute", 0, CLI_CHOICE, AT(engine.compute), "TYPE", .help = "f32 (default) or bf16: linear layers in sweep",
     .choices = kvq_compute_names},
    {"repeats", 0, CLI_COUNT, AT(repeats), "N", .help = "measurements of each quantity (5)", .min = 1,
     .max = BENCH_MAX_REPEATS},
    {"threads", 0, CLI_COUNT, AT(common.n_threads), "N", .help = "one per core", .min = 1, .max = KVQ_MAX_THREADS},
    {"csv", 0, CLI_FLAG, AT(csv), NULL, .help = "comma-separated values instead of a table"},
    {"json", 0, CLI_FLAG, AT(json), NULL, .help = "one JSON document on stdout (kvq.bench/1)"},
};
#undef AT

static const struct {
    const char *name;
    kvq_status (*run)(bench_report *report, kvq_error *err);
    bool needs_model, needs_text;
} CASES[] = {{"matmul", bench_matmul, false, false},
             {"sweep", bench_sweep, true, false},
             {"fit", bench_fit, false, false},
             {"tokenizer", bench_tokenizer, true, true},
             {"codec", bench_codec, false, false}};

// Index of a case.
static kvq_status find_case(const char *word, int *index, kvq_error *err) {
    const char *names[CLI_COUNT_OF(CASES)];
    for (int i = 0; i < CLI_COUNT_OF(CASES); i++) {
        names[i] = CASES[i].name;
        if (strcmp(word, names[i]) != 0) continue;
        *index = i;
        return KVQ_OK;
    }
    const char *closest = kvq_cli_closest(word, names, CLI_COUNT_OF(CASES));
    char        next[96];
    (void)snprintf(next, sizeof next, closest != NULL ? "did you mean %s?" : "%ssee kvq-bench --help",
                   closest != NULL ? closest : "");
    return kvq_fail(err, KVQ_ERR_USAGE, next, "unknown case '%s'", word);
}

static kvq_status check_options(const bench_options *o, kvq_error *err) {
    int index = 0;
    if (o->csv && o->json) return kvq_fail(err, KVQ_ERR_USAGE, "give one of them", "--csv and --json contradict");
    if (o->cases.count == 0) {
        return kvq_fail(err, KVQ_ERR_USAGE, "name one or more of matmul, sweep, fit, tokenizer, codec",
                        "the case to measure is missing");
    }
    for (int i = 0; i < o->cases.count; i++) {
        kvq_status status = find_case(o->cases.items[i], &index, err);
        if (status != KVQ_OK) return status;
        if (o->engine.device != NULL && CASES[index].run != bench_codec)
            return kvq_fail(err, KVQ_ERR_USAGE, "measure codec by itself", "%s: --device is for codec alone",
                            CASES[index].name);
        bool lacks_model = CASES[index].needs_model && o->model == NULL;
        if (lacks_model || (CASES[index].needs_text && o->text == NULL)) {
            return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%s: %s is missing", CASES[index].name,
                            lacks_model ? "--model" : "--text");
        }
    }
    return KVQ_OK;
}

static kvq_status run(kvq_cli *cli, void *options, int *exit_code, kvq_error *err) {
    const bench_options *o = options;
    bench_report         report = {.cli = cli, .options = o};
    kvq_status           status = check_options(o, err);
    (void)exit_code; // a speed is no verdict
    for (int i = 0; i < o->cases.count && status == KVQ_OK; i++) {
        int index = 0;
        status = find_case(o->cases.items[i], &index, err);
        if (status != KVQ_OK) break;
        report.benchmark = CASES[index].name;
        status = CASES[index].run(&report, err);
    }
    kvq_cli_end_progress(cli);
    if (status == KVQ_OK) status = bench_print(&report, err);
    if (status == KVQ_OK)
        kvq_cli_next(cli, "kvq-calibrate", "--model", o->model != NULL ? o->model : "MODEL", "--text", "TRAIN.txt",
                     "-o", "OUT.kvq.h5", "--dry-run", NULL);
    bench_free(&report);
    return status;
}

static const kvq_cli_program PROGRAM = {
    .name = "kvq-bench",
    .summary = "Measures what kvq spends its time on: medians over repeats, and ratios taken in the same run.",
    .synopsis = "CASE... [--model PATH] [--text FILE] [--repeats N] [--csv | --json]\n",
    .options = OPTIONS,
    .n_options = CLI_COUNT_OF(OPTIONS),
    .notes =
        "cases:\n"
        "  matmul     large products in f32 and bf16; the fastest is \"best\" wherever a fraction of it is given\n"
        "  sweep      the stages of a calibration of --model: time, share, rate of products, peak memory\n"
        "  fit        counting into histograms; exact codebooks against Lloyd's iteration\n"
        "  tokenizer  --text through the tokenizer of --model\n"
        "  codec      K and V of a layer into packed rows and tiles and back, checked byte for byte; on a device also\n"
        "             packing of a prompt, append of a token, attention. GB/s f16: bytes of the f16 cache that is\n"
        "             replaced; GB/s packed: bytes that are stored, or read\n\n"
        "examples:\n"
        "  kvq-bench matmul --shape 4096x4096 --shape 11008x4096\n"
        "  kvq-bench codec --kv-heads 8 --head-dim 128 --tokens 4096\n"
        "  kvq-bench sweep --model model.gguf --seq-len 2048 --repeats 3 --json > sweep.json\n",
    .run = run,
};

int main(int argc, char **argv) {
    bench_options options = {.repeats = 5, .windows = 1, .tokens = 2048, .kv_heads = 8, .head_dim = 128};
    return kvq_cli_main(&PROGRAM, argc, argv, &options);
}
