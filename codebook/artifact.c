// SPDX-License-Identifier: Apache-2.0
//
// The artifact in memory: ownership, views of it for the codec, and what a cache made with it weighs.
#include <string.h>

#include "codebook_impl.h"

// ---------------------------------------------------------------- names

const char *const kvq_weighting_names[] = {"none", "fisher", "fisher-scaled", "range", NULL};
const char *const kvq_axis_names[] = {"channel", "token", NULL};
const char *const kvq_key_domain_names[] = {"pre_rope", "post_rope", NULL};
const char *const kvq_token_range_names[] = {"extremes", "percentiles", NULL};
const char *const kvq_table_kind_names[] = {"channel", "affine", NULL};
const char *const kvq_scale_format_names[] = {"e4m3", "f16", NULL};
const char *const kvq_budget_scope_names[] = {"model", "layer", "head", NULL};

// ---------------------------------------------------------------- ownership

// Where the owned texts lie, so that creating and freeing them cannot forget one.
static const size_t TEXT_FIELDS[] = {
    offsetof(kvq_artifact, model.architecture),      offsetof(kvq_artifact, model.name),
    offsetof(kvq_artifact, model.rope_type),         offsetof(kvq_artifact, model.dtype),
    offsetof(kvq_artifact, tokenizer.kind),          offsetof(kvq_artifact, dataset.source),
    offsetof(kvq_artifact, quantizer.scheme),        offsetof(kvq_artifact, provenance.producer_version),
    offsetof(kvq_artifact, provenance.matmul),       offsetof(kvq_artifact, provenance.cpu),
    offsetof(kvq_artifact, provenance.options_json), offsetof(kvq_artifact, quantizer.rotation_kind),
};
#define N_TEXT_FIELDS (sizeof TEXT_FIELDS / sizeof *TEXT_FIELDS)

static char **text_field(kvq_artifact *artifact, size_t i) {
    return (char **)(void *)((char *)artifact + TEXT_FIELDS[i]);
}

kvq_status kvq_artifact_set_text(const kvq_context *ctx, char **field, const char *value, kvq_error *err) {
    char *copy = kvq_strdup(ctx, value);
    if (copy == NULL) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "no memory for the text '%.60s'", value);
    kvq_free(ctx, *field);
    *field = copy;
    return KVQ_OK;
}

kvq_status kvq_artifact_create(const kvq_context *ctx, int64_t n_layers, kvq_artifact **out, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    kvq_artifact *artifact = NULL;
    KVQ_TRY(KVQ_NEW(ctx, 1, "artifact", &artifact, err));
    for (size_t i = 0; i < N_TEXT_FIELDS; i++) KVQ_TRY(kvq_artifact_set_text(ctx, text_field(artifact, i), "", err));
    KVQ_TRY(KVQ_NEW(ctx, n_layers, "artifact layers", &artifact->layers, err));
    artifact->model.n_layers = n_layers;
    *out = artifact;
    artifact = NULL;
done:
    kvq_artifact_destroy(ctx, &artifact);
    return status;
}

static void free_tensor(const kvq_context *ctx, kvq_tensor_quant *tensor) {
    kvq_free(ctx, tensor->codebook);
    kvq_free(ctx, tensor->decode_levels);
    kvq_free(ctx, tensor->lower);
    kvq_free(ctx, tensor->upper);
    kvq_free(ctx, tensor->widths);
    kvq_free(ctx, tensor->key_levels);
    kvq_free(ctx, tensor->offset);
    kvq_free(ctx, tensor->scale);
}

void kvq_artifact_destroy(const kvq_context *ctx, kvq_artifact **artifact) {
    if (*artifact == NULL) return;
    for (int64_t layer = 0; (*artifact)->layers != NULL && layer < (*artifact)->model.n_layers; layer++) {
        free_tensor(ctx, &(*artifact)->layers[layer].k);
        free_tensor(ctx, &(*artifact)->layers[layer].v);
    }
    for (size_t i = 0; i < N_TEXT_FIELDS; i++) kvq_free(ctx, *text_field(*artifact, i));
    kvq_free(ctx, (*artifact)->quantizer.rotation);
    kvq_free(ctx, (*artifact)->layers);
    kvq_free(ctx, *artifact);
    *artifact = NULL;
}

// ---------------------------------------------------------------- settings

static void describe_tensor(kvq_tensor_quant *t, int bits, kvq_datatype datatype, kvq_axis axis, int n_groups) {
    t->bits = bits;
    t->datatype = datatype;
    t->axis = axis;
    t->domain = KVQ_KEYS_PRE_ROPE;
    t->n_groups = n_groups;
    t->n_levels = 1 << bits;
    t->dim = 1;
}

void kvq_artifact_describe_quantizer(kvq_artifact *a, const kvq_measure_options *measure, const kvq_fit_options *fit) {
    int d = (int)(a->model.n_kv_heads * a->model.head_dim), n_groups = fit->per_head ? (int)a->model.n_kv_heads : 1;
    a->quantizer.outlier_fraction = fit->outlier_fraction;
    a->quantizer.n_side_k = kvq_measured_k_side(measure, fit->outlier_fraction, d);
    a->quantizer.n_side_v = kvq_measured_v_side(fit->outlier_fraction, d);
    a->quantizer.sink_tokens = measure->sink_tokens;
    a->quantizer.recent_tokens = fit->recent_tokens;
    a->quantizer.weighting = fit->weighting;
    a->quantizer.threshold_scope = measure->threshold_scope;
    a->quantizer.sinks_counted = measure->count_sinks;
    for (int64_t l = 0; l < a->model.n_layers; l++) {
        describe_tensor(&a->layers[l].k, fit->k_bits, fit->k_datatype, measure->k_axis, n_groups);
        describe_tensor(&a->layers[l].v, fit->v_bits, fit->v_datatype, KVQ_AXIS_TOKEN, n_groups);
        a->layers[l].k.domain = measure->k_domain;
    }
}

// ---------------------------------------------------------------- views

kvq_block_spec kvq_tensor_block_spec(const kvq_tensor_quant *tensor, int d, int n_side, float *storage) {
    kvq_block_spec spec = {.d = d,
                           .bits = tensor->bits,
                           .n_side = n_side,
                           .levels = tensor->codebook,
                           .n_groups = tensor->n_groups,
                           .decoded = tensor->decode_levels,
                           .clamp_zero = tensor->datatype == KVQ_INT_CLAMPED};
    float         *z = storage, *r = storage + d, *grid_z = storage + 2 * (int64_t)d;
    if (tensor->axis == KVQ_AXIS_TOKEN) return spec;
    for (int c = 0; c < d; c++) {
        z[c] = kvq_range_middle(tensor->lower[c], tensor->upper[c]);
        r[c] = kvq_range_half(tensor->lower[c], tensor->upper[c]);
        grid_z[c] = kvq_block_clamped_middle(z[c], r[c], tensor->n_levels);
    }
    spec.z = z;
    spec.r = r;
    if (spec.clamp_zero) spec.grid_z = grid_z;
    return spec;
}

// What does not depend on a tensor's arrays.
static kvq_tile_spec tile_spec(const kvq_artifact *a, bool keys, const kvq_tensor_quant *tensor) {
    kvq_tile_spec s = {.d = (int)(a->model.n_kv_heads * a->model.head_dim), .head_dim = (int)a->model.head_dim};
    if (keys) {
        s.n_side = a->quantizer.n_side_k;
        s.n_slots = a->quantizer.n_slots;
    } else {
        s.rotation = a->quantizer.rotation;
        s.scale_format = tensor->scale_format;
        s.scale_exponent = tensor->scale_exponent;
    }
    return s;
}

// Which columns have which table, and where levels become values.
static void view_keys(const kvq_tensor_quant *tensor, kvq_tile_view *view) {
    kvq_tile_spec *s = &view->spec;
    float         *middle = view->ranges, *half = view->ranges + s->d;
    bool           affine = tensor->table_kind == KVQ_TABLE_AFFINE;
    int32_t        next = 0;
    for (int c = 0; c < s->d; c++) {
        middle[c] = kvq_range_middle(tensor->lower[c], tensor->upper[c]);
        half[c] = kvq_range_half(tensor->lower[c], tensor->upper[c]);
        view->table[c] = affine ? codebook_affine_table(tensor->widths[c]) : next;
        next += 1 << tensor->widths[c];
    }
    s->dim = 1;
    s->widths = tensor->widths;
    s->levels = tensor->key_levels;
    s->middle = middle;
    s->half = half;
    s->z = affine ? tensor->offset : middle;
    s->r = affine ? tensor->scale : half;
}

// All columns have one width and the only table.
static void view_values(const kvq_tensor_quant *tensor, kvq_tile_view *view) {
    memset(view->widths, tensor->bits, (size_t)(view->spec.d / tensor->dim));
    view->spec.dim = tensor->dim;
    view->spec.widths = view->widths;
    view->spec.levels = tensor->codebook;
}

kvq_status kvq_tile_view_create(const kvq_context *ctx, const kvq_artifact *artifact, const kvq_tensor_quant *tensor,
                                kvq_tile_view *out, kvq_error *err) {
    kvq_status    status = KVQ_OK;
    bool          keys = tensor->widths != NULL;
    kvq_tile_view view = {.spec = tile_spec(artifact, keys, tensor)};
    int           n_columns = view.spec.d / tensor->dim;
    KVQ_TRY(KVQ_NEW(ctx, n_columns, "columns of tiles", &view.columns, err));
    KVQ_TRY(KVQ_NEW(ctx, n_columns, "tables of columns", &view.table, err));
    if (keys) {
        KVQ_TRY(KVQ_NEW(ctx, 2 * (int64_t)view.spec.d, "ranges of channels", &view.ranges, err));
        view_keys(tensor, &view);
    } else {
        KVQ_TRY(KVQ_NEW(ctx, n_columns, "widths of columns", &view.widths, err));
        view_values(tensor, &view);
    }
    (void)kvq_tile_layout(view.spec.widths, n_columns, view.spec.head_dim / tensor->dim, view.columns);
    view.spec.columns = view.columns;
    view.spec.table = view.table;
    *out = view;
    view = (kvq_tile_view){.columns = NULL};
done:
    kvq_tile_view_free(ctx, &view);
    return status;
}

void kvq_tile_view_free(const kvq_context *ctx, kvq_tile_view *view) {
    kvq_free(ctx, view->columns);
    kvq_free(ctx, view->widths);
    kvq_free(ctx, view->table);
    kvq_free(ctx, view->ranges);
    *view = (kvq_tile_view){.columns = NULL};
}

// ---------------------------------------------------------------- sizes

// One tensor of one layer; d channels, of n_tokens tokens n_exact are kept in f16.
static void add_tensor(kvq_cache_size *size, const kvq_tensor_quant *tensor, int d, int n_side, int64_t n_tokens,
                       int64_t n_exact) {
    static const float PRESENT = 0; // only says that the ranges belong to channels; no range is read
    kvq_block_spec     spec = {.d = d, .bits = tensor->bits, .n_side = n_side};
    int64_t            n_levels = (int64_t)tensor->n_groups * tensor->n_levels * tensor->dim;
    if (tensor->axis == KVQ_AXIS_CHANNEL) {
        spec.r = &PRESENT;
        size->tables_bytes += 2 * (int64_t)d * (int64_t)sizeof(float); // thresholds
    }
    size->n_elements += d * n_tokens;
    size->row_bytes += kvq_block_row_bytes(&spec) * (n_tokens - n_exact);
    size->exact_bytes += 2 * (int64_t)d * n_exact;
    size->tables_bytes += n_levels * (int64_t)sizeof(float) * (tensor->decode_levels != NULL ? 2 : 1);
}

// Bytes of a tile of keys. Only whether z and r are there is asked, not what they are.
static int64_t key_tile_bytes(const kvq_artifact *a, const kvq_tensor_quant *k) {
    static const float PRESENT = 0;
    kvq_tile_spec      s = tile_spec(a, true, k);
    s.dim = 1;
    s.widths = k->widths;
    s.z = s.r = s.middle = s.half = &PRESENT;
    return kvq_tile_bytes(&s);
}

// All heads of a tile of values have as many bytes, so the widths of one are enough.
static int64_t value_tile_bytes(const kvq_artifact *a, const kvq_tensor_quant *v) {
    uint8_t       widths[KVQ_TILE_MAX_HEAD_DIM];
    kvq_tile_spec s = tile_spec(a, false, v);
    memset(widths, v->bits, sizeof widths);
    s.d = s.head_dim;
    s.dim = v->dim;
    s.widths = widths;
    return a->model.n_kv_heads * kvq_tile_bytes(&s);
}

static int64_t key_table_bytes(const kvq_tensor_quant *k, int64_t d) {
    int64_t n_halves = 2 * d; // thresholds
    if (k->table_kind == KVQ_TABLE_AFFINE) n_halves += 2 * d + CODEBOOK_AFFINE_LEVELS;
    for (int64_t c = 0; c < d && k->table_kind == KVQ_TABLE_CHANNEL; c++) n_halves += (int64_t)1 << k->widths[c];
    return n_halves * (int64_t)sizeof(uint16_t) + d;
}

// Sinks lie in the first tile, as code 0, and are kept exactly besides; a tile that is not full is kept exactly.
static kvq_cache_size allocated_size(const kvq_artifact *a, int64_t n_tokens) {
    kvq_cache_size size = {0};
    int64_t        D = a->model.head_dim, d = a->model.n_kv_heads * D, n_tiles = n_tokens / KVQ_TILE_TOKENS;
    int64_t        n_tiled = n_tiles * KVQ_TILE_TOKENS, n_sinks = a->quantizer.sink_tokens;
    int64_t        n_exact = (n_sinks < n_tiled ? n_sinks : n_tiled) + n_tokens - n_tiled;
    for (int64_t layer = 0; layer < a->model.n_layers; layer++) {
        const kvq_tensor_quant *k = &a->layers[layer].k, *v = &a->layers[layer].v;
        size.n_elements += 2 * d * n_tokens;
        size.row_bytes += n_tiles * (key_tile_bytes(a, k) + value_tile_bytes(a, v));
        size.exact_bytes += 2 * d * n_exact * (int64_t)sizeof(uint16_t);
        size.tables_bytes += key_table_bytes(k, d) + ((int64_t)v->dim << v->bits) * (int64_t)sizeof(uint16_t);
    }
    if (strcmp(a->quantizer.rotation_kind, "random") == 0) size.tables_bytes += D * D * (int64_t)sizeof(float);
    return size;
}

kvq_cache_size kvq_artifact_cache_size(const kvq_artifact *artifact, int64_t n_tokens) {
    kvq_cache_size size = {0};
    int            d = (int)(artifact->model.n_kv_heads * artifact->model.head_dim);
    int64_t        n_exact = artifact->quantizer.sink_tokens + artifact->quantizer.recent_tokens;
    if (kvq_artifact_is_allocated(artifact)) return allocated_size(artifact, n_tokens);
    if (n_exact > n_tokens) n_exact = n_tokens;
    for (int64_t layer = 0; layer < artifact->model.n_layers; layer++) {
        add_tensor(&size, &artifact->layers[layer].k, d, artifact->quantizer.n_side_k, n_tokens, n_exact);
        add_tensor(&size, &artifact->layers[layer].v, d, artifact->quantizer.n_side_v, n_tokens, n_exact);
    }
    return size;
}

double kvq_cache_bits_per_element(kvq_cache_size size, int64_t n_sequences) {
    int64_t bytes = (size.row_bytes + size.exact_bytes) * n_sequences + size.tables_bytes;
    int64_t n = size.n_elements * n_sequences;
    return n > 0 ? 8.0 * (double)bytes / (double)n : 0;
}
