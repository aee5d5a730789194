// SPDX-License-Identifier: Apache-2.0
//
// Private to kvq-inspect: its options, and the reports about each kind of file.
#ifndef KVQ_CLI_INSPECT_H
#define KVQ_CLI_INSPECT_H

#include "kvq_cli.h"

typedef struct inspect_options {
    kvq_cli_common common;
    const char    *file;
    bool           check, json, codebook, spectrum;
    int64_t        layer;    // -1 = all
    int            tensor;   // inspect_tensor
    double         fraction; // of a measurement; -1 = the first
} inspect_options;

typedef enum inspect_tensor { INSPECT_ALL, INSPECT_Q, INSPECT_K, INSPECT_V } inspect_tensor;

static inline bool inspect_wants_layer(const inspect_options *o, int64_t layer) {
    return o->layer < 0 || o->layer == layer;
}
static inline bool inspect_wants_tensor(const inspect_options *o, inspect_tensor tensor) {
    return o->tensor == INSPECT_ALL || o->tensor == (int)tensor;
}
// KVQ_ERR_USAGE when the layer that is asked for does not exist.
kvq_status inspect_check_layer(const inspect_options *o, int64_t n_layers, kvq_error *err);

// A share of a whole that may be 0.
static inline double inspect_share(int64_t part, int64_t whole) { return whole > 0 ? (double)part / (double)whole : 0; }

// What artifacts and measurements say about model, tokenizer, text and program (inspect_about.c).
void inspect_print_model(const kvq_artifact *a);
void inspect_print_run(const kvq_artifact *a); // program and baseline
void inspect_add_model(kvq_json *json, const kvq_artifact *a);
void inspect_add_dataset(kvq_json *json, const kvq_artifact *a);
void inspect_add_run(kvq_json *json, const kvq_artifact *a);

// What an artifact of scheme "alloc" says besides (inspect_alloc.c); the first three are about any scheme.
double inspect_mean_bits(const kvq_artifact *a, const kvq_tensor_quant *t); // of codes, per element
int    inspect_tables(const kvq_artifact *a, const kvq_tensor_quant *t);
// Length and number of the sequences that the size of the cache is about.
int64_t inspect_budget_tokens(const kvq_artifact *a);
int64_t inspect_budget_sequences(const kvq_artifact *a);
void    inspect_print_alloc_quantizer(const kvq_artifact *a);
void    inspect_print_alloc_head(void);
void    inspect_print_alloc_row(const kvq_artifact *a, int64_t layer, const kvq_tensor_quant *t);
void    inspect_print_alloc_tables(const kvq_artifact *a, int64_t layer, const kvq_tensor_quant *t);
void    inspect_add_alloc_quantizer(kvq_json *json, cJSON *quantizer, const kvq_artifact *a);
void    inspect_add_alloc_tensor(kvq_json *json, cJSON *tensor, const kvq_artifact *a, const kvq_tensor_quant *t);

kvq_status inspect_artifact(kvq_cli *cli, const inspect_options *o, kvq_error *err);    // inspect_artifact.c
kvq_status inspect_measurement(kvq_cli *cli, const inspect_options *o, kvq_error *err); // inspect_measurement.c

#endif
