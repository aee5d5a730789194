// SPDX-License-Identifier: Apache-2.0
//
// What long contexts need in memory, as kvq-validate and kvq-inspect print it.
#include <stdio.h>

#include "kvq_cli.h"

static double gib(double bytes) { return bytes / 0x1p30; }

void kvq_cli_print_memory(const kvq_artifact *artifact) {
    bool formula = kvq_artifact_memory(artifact, 1).formula_bytes > 0;
    printf("memory of one sequence in GiB, everything counted%s\n", formula ? ", and by the paper's formula" : "");
    printf("tokens       in f16     artifact  compression  bytes per token%s\n",
           formula ? "      formula  compression" : "");
    for (int i = 0; i < KVQ_N_MEMORY_LENGTHS; i++) {
        kvq_memory m = kvq_artifact_memory(artifact, kvq_memory_lengths[i].n_tokens);
        printf("%6s  %11.3f  %11.3f  %10.2fx  %15.1f", kvq_memory_lengths[i].name, gib(m.fp16_bytes), gib(m.bytes),
               m.fp16_bytes / m.bytes, m.bytes / (double)m.n_tokens);
        if (formula) printf("  %11.3f  %10.2fx", gib(m.formula_bytes), m.fp16_bytes / m.formula_bytes);
        printf("\n");
    }
}

void kvq_cli_add_memory(kvq_json *json, const kvq_artifact *artifact) {
    cJSON *array = kvq_json_array(json, json->root, "memory");
    for (int i = 0; i < KVQ_N_MEMORY_LENGTHS; i++) {
        kvq_memory m = kvq_artifact_memory(artifact, kvq_memory_lengths[i].n_tokens);
        cJSON     *row = kvq_json_object(json, array, NULL);
        kvq_json_text(json, row, "length", kvq_memory_lengths[i].name);
        kvq_json_count(json, row, "tokens", m.n_tokens);
        kvq_json_number(json, row, "fp16_bytes", m.fp16_bytes);
        kvq_json_number(json, row, "bytes", m.bytes);
        kvq_json_number(json, row, "bytes_per_token", m.bytes / (double)m.n_tokens);
        kvq_json_number(json, row, "compression", m.fp16_bytes / m.bytes);
        if (!(m.formula_bytes > 0)) continue; // the formula says nothing about this format
        kvq_json_number(json, row, "formula_bytes", m.formula_bytes);
        kvq_json_number(json, row, "formula_compression", m.fp16_bytes / m.formula_bytes);
    }
}
