// SPDX-License-Identifier: Apache-2.0
//
// The model maker as a program, for tests of the commands: kvq_make_model_tool OUT_DIR [--gguf FILE] [--seed N] ...
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvq_make_model.h"

static const char USAGE[] =
    "usage: kvq_make_model_tool OUT_DIR [--gguf FILE] [--seed N] [--model-type NAME] [--layers N] [--hidden N]\n"
    "  [--heads N] [--kv-heads N] [--head-dim N] [--ffn N] [--vocab N] [--positions N] [--shards N]\n"
    "  [--dtype F32|F16|BF16] [--type F32|F16|BF16|Q8_0|Q4_0|Q4_1] [--rope JSON] [--config JSON] [--nan TENSOR]\n"
    "  [--tied] [--attention-bias] [--mlp-bias]\n";

int main(int argc, char **argv) {
    kvq_make_options o = kvq_make_options_default();
    const char      *folder = NULL, *gguf = NULL, *seed = NULL;
    const struct {
        const char  *name;
        bool        *flag;
        int         *number;
        const char **text;
    } table[] = {
        {"--gguf", NULL, NULL, &gguf},
        {"--seed", NULL, NULL, &seed},
        {"--model-type", NULL, NULL, &o.model_type},
        {"--layers", NULL, &o.n_layers, NULL},
        {"--hidden", NULL, &o.hidden_size, NULL},
        {"--heads", NULL, &o.n_heads, NULL},
        {"--kv-heads", NULL, &o.n_kv_heads, NULL},
        {"--head-dim", NULL, &o.head_dim, NULL},
        {"--ffn", NULL, &o.intermediate_size, NULL},
        {"--vocab", NULL, &o.vocab_size, NULL},
        {"--positions", NULL, &o.max_positions, NULL},
        {"--shards", NULL, &o.n_shards, NULL},
        {"--dtype", NULL, NULL, &o.dtype},
        {"--type", NULL, NULL, &o.gguf_type},
        {"--rope", NULL, NULL, &o.rope_scaling},
        {"--config", NULL, NULL, &o.extra_config},
        {"--nan", NULL, NULL, &o.not_finite},
        {"--tied", &o.tied_head, NULL, NULL},
        {"--attention-bias", &o.attention_bias, NULL, NULL},
        {"--mlp-bias", &o.mlp_bias, NULL, NULL},
    };
    const size_t n_options = sizeof table / sizeof *table;
    for (int i = 1; i < argc; i++) {
        size_t k = 0;
        while (k < n_options && strcmp(table[k].name, argv[i]) != 0) k++;
        bool known = k < n_options, needs_value = known && table[k].flag == NULL;
        if ((!known && (folder != NULL || argv[i][0] == '-')) || (needs_value && i + 1 == argc)) {
            (void)fputs(USAGE, stderr);
            return 2;
        }
        if (!known)
            folder = argv[i];
        else if (!needs_value)
            *table[k].flag = true;
        else if (table[k].number != NULL)
            *table[k].number = atoi(argv[++i]);
        else
            *table[k].text = argv[++i];
    }
    if (folder == NULL) {
        (void)fputs(USAGE, stderr);
        return 2;
    }
    if (seed != NULL) o.seed = strtoull(seed, NULL, 10);
    kvq_make_model_hf(&o, folder);
    if (gguf != NULL) kvq_make_model_gguf(&o, gguf);
    return 0;
}
