// SPDX-License-Identifier: Apache-2.0
// The host's half of decode attention: what can be computed, how it is cut into blocks, and the call as kernels see it.
#include "attention_kernels.cuh"
#include "kvq_cuda_attention.h"

// Blocks that keep a large device busy. A constant, so that the bits do not depend on the device.
enum { BLOCKS_WANTED = 512, TOKENS_PER_SPLIT = 256, MAX_GRID = 65535 };

typedef kvq_cuda_attention_call Description;

// ---------------------------------------------------------------- shapes

static int group_of(const Description *a) { return a->n_heads / a->n_kv_heads; }
static int blocks_per_group(const Description *a) { return (group_of(a) + ATTEND_MAX_HEADS - 1) / ATTEND_MAX_HEADS; }

static int splits_of(const Description *a) {
    if (a->n_splits > 0) return a->n_splits;
    int64_t seen = a->window > 0 && a->window < a->max_length ? a->window : a->max_length;
    int64_t blocks = (int64_t)a->n_seqs * a->n_kv_heads * blocks_per_group(a);
    int64_t wanted = BLOCKS_WANTED / blocks, most = (seen + TOKENS_PER_SPLIT - 1) / TOKENS_PER_SPLIT;
    if (wanted > most) wanted = most;
    return wanted < 1 ? 1 : wanted > KVQ_CUDA_MAX_SPLITS ? KVQ_CUDA_MAX_SPLITS : (int)wanted;
}

static bool has_shapes(const Description *a) {
    return a->n_seqs >= 0 && a->n_kv_heads > 0 && a->n_heads > 0 && a->n_heads % a->n_kv_heads == 0;
}

size_t kvq_cuda_attention_workspace(const kvq_cuda_attention_call *a) {
    if (!has_shapes(a) || a->n_seqs == 0) return 0;
    size_t parts = (size_t)a->n_seqs * (size_t)a->n_heads * (size_t)splits_of(a);
    return parts * (2 + (a->tiled ? 2 : 1) * (size_t)a->head_dim) * sizeof(float);
}

// ---------------------------------------------------------------- checks

static kvq_status unsupported(kvq_error *err, const char *what, int64_t is, int64_t most) {
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL, "decode attention on a device: %s %lld, at most %lld", what,
                    (long long)is, (long long)most);
}

static kvq_status wrong(kvq_error *err, const char *what) {
    return kvq_fail(err, KVQ_ERR_USAGE, NULL, "decode attention on a device: %s", what);
}

static bool aligned(const void *p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

static kvq_status check_shapes(const Description *a, kvq_error *err) {
    if (!has_shapes(a)) return wrong(err, "heads that KV heads do not divide, or a negative number of sequences");
    if (a->head_dim < 8 || a->head_dim > KVQ_CUDA_MAX_HEAD_DIM || a->head_dim % 2 != 0)
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, NULL,
                        "decode attention on a device: heads of %d channels, not an "
                        "even number from 8 to %d",
                        a->head_dim, KVQ_CUDA_MAX_HEAD_DIM);
    if (a->n_seqs > MAX_GRID) return unsupported(err, "sequences", a->n_seqs, MAX_GRID);
    if (a->n_heads > MAX_GRID) return unsupported(err, "heads", a->n_heads, MAX_GRID);
    if (a->n_splits < 0 || a->n_splits > KVQ_CUDA_MAX_SPLITS)
        return unsupported(err, "splits", a->n_splits, KVQ_CUDA_MAX_SPLITS);
    if (a->max_length < 0 || a->max_length > (1 << 30)) return unsupported(err, "tokens", a->max_length, 1 << 30);
    if (a->window < 0 || !(a->softcap >= 0)) return wrong(err, "a negative window or cap of scores");
    if (a->rope.n_pairs < 0 || 2 * a->rope.n_pairs > a->head_dim)
        return wrong(err, "more channels are rotated than a head has");
    if (a->rope.n_pairs > 0 && a->rope.n_bases * 128 < a->max_length)
        return wrong(err, "the rotary tables end before the longest sequence");
    return KVQ_OK;
}

// Bytes of 128 rows, or -1.
static int64_t rows_page(const kvq_cuda_rows *r, int d) {
    if (r->bits < 1 || r->bits > KVQ_MAX_BITS || r->n_side < 0 || 2 * r->n_side >= d) return -1;
    if (r->n_groups < 1 || d % r->n_groups != 0 || r->levels == NULL || (r->z == NULL) != (r->r == NULL)) return -1;
    return KVQ_TILE_TOKENS * (int64_t)(kvq_block_code_bytes(d, r->bits) + (r->r == NULL ? 4 : 0) + 8 * r->n_side);
}

static int64_t keys_page(const kvq_cuda_tile_keys *k, int n_heads) {
    if (k->columns == NULL || k->table == NULL || k->levels == NULL || k->z == NULL || k->r == NULL) return -1;
    if (k->n_slots < 0 || k->n_slots > KVQ_TILE_MAX_SLOTS || k->code_bytes < 0 || k->code_bytes % 16 != 0) return -1;
    return k->code_bytes + (k->n_slots > 0 ? (2 * n_heads + 3) / 4 * 4 + 4 * (int64_t)k->n_slots : 0);
}

static int64_t values_page(const kvq_cuda_tile_values *v, int n_heads) {
    if (v->columns == NULL || v->table == NULL || v->levels == NULL || v->rotation == NULL) return -1;
    if ((v->dim != 1 && v->dim != 2) || v->scale_exponent < -100 || v->scale_exponent > 100) return -1;
    if ((v->scale_format != KVQ_SCALE_F16 && v->scale_format != KVQ_SCALE_E4M3) || v->code_bytes < 0 ||
        v->code_bytes % 16 != 0)
        return -1;
    return v->code_bytes + (int64_t)KVQ_TILE_TOKENS * n_heads * (v->scale_format == KVQ_SCALE_F16 ? 2 : 1);
}

static kvq_status check_cache(const Description *a, kvq_error *err) {
    int     d = a->n_kv_heads * a->head_dim;
    int64_t k = a->tiled ? keys_page(&a->k_tiles, a->n_kv_heads) : rows_page(&a->k_rows, d);
    int64_t v = a->tiled ? values_page(&a->v_tiles, a->n_kv_heads) : rows_page(&a->v_rows, d);
    if (k < 0 || v < 0) return wrong(err, "the description of keys or values is incomplete or out of range");
    if (a->k_page_bytes < k || a->v_page_bytes < v || a->k_page_bytes % 4 != 0 || a->v_page_bytes % 4 != 0 ||
        !aligned(a->k_pages, 4) || !aligned(a->v_pages, 4))
        return wrong(err, "pages are smaller than 128 tokens, or not aligned to 4 bytes");
    if (a->n_sinks < 0 || a->n_recent < 0 || a->max_pages < 0 || (a->tiled && a->n_recent != KVQ_TILE_TOKENS))
        return wrong(err, "the number of sinks, recent tokens or pages");
    int64_t behind = a->max_length - (a->tiled ? 0 : a->n_sinks) - (a->tiled ? KVQ_TILE_TOKENS - 1 : a->n_recent);
    if ((int64_t)a->max_pages * KVQ_TILE_TOKENS < behind)
        return wrong(err, "the table of pages ends before the longest sequence");
    if (!aligned(a->rope.bases, 8) || !aligned(a->rope.offsets, 8) || !aligned(a->workspace, 4))
        return wrong(err, "rotary tables are not aligned to 8 bytes, or the workspace is not to 4");
    return KVQ_OK;
}

// ---------------------------------------------------------------- the call

static RowTensor rows_for_device(const kvq_cuda_rows &r, int d) {
    RowTensor to;
    to.levels = r.levels;
    to.z = r.z;
    to.r = r.r;
    to.per_token = r.r == NULL;
    to.bits = r.bits;
    to.width = d / r.n_groups;
    to.code_bytes = kvq_block_code_bytes(d, r.bits);
    to.row_bytes = to.code_bytes + (to.per_token ? 4 : 0) + 8 * r.n_side;
    to.n_slots = 2 * r.n_side;
    return to;
}

static TileTensor keys_for_device(const kvq_cuda_tile_keys &k) {
    TileTensor to;
    to.columns = k.columns->at;
    to.table = k.table;
    to.levels = k.levels;
    to.z = k.z;
    to.r = k.r;
    to.rotation = NULL;
    to.dim = 1;
    to.code_bytes = k.code_bytes;
    to.n_slots = k.n_slots;
    to.half_scales = 0;
    to.scale_unit = 1;
    return to;
}

static TileTensor values_for_device(const kvq_cuda_tile_values &v) {
    TileTensor to;
    to.columns = v.columns->at;
    to.table = v.table;
    to.levels = v.levels;
    to.z = NULL;
    to.r = NULL;
    to.rotation = v.rotation;
    to.dim = v.dim;
    to.code_bytes = v.code_bytes;
    to.n_slots = 0;
    to.half_scales = v.scale_format == KVQ_SCALE_F16;
    to.scale_unit = ldexpf(1.0f, v.scale_exponent);
    return to;
}

static void set_tensors(const Description *a, Call *c) {
    c->k.pages = a->k_pages;
    c->v.pages = a->v_pages;
    c->k.sinks = a->k_sinks;
    c->v.sinks = a->v_sinks;
    c->k.recent = a->k_recent;
    c->v.recent = a->v_recent;
    c->k.page_bytes = a->k_page_bytes;
    c->v.page_bytes = a->v_page_bytes;
    if (a->tiled) {
        c->k.tiles = keys_for_device(a->k_tiles);
        c->v.tiles = values_for_device(a->v_tiles);
    } else {
        c->k.rows = rows_for_device(a->k_rows, c->d);
        c->v.rows = rows_for_device(a->v_rows, c->d);
    }
}

static Call for_device(const Description *a) {
    Call c = {};
    c.page_table = a->page_table;
    c.lengths = a->lengths;
    c.coded = a->coded;
    c.bases = reinterpret_cast<const float2 *>(a->rope.bases);
    c.offsets = reinterpret_cast<const float2 *>(a->rope.offsets);
    c.n_pairs = a->rope.n_pairs;
    c.n_heads = a->n_heads;
    c.n_kv_heads = a->n_kv_heads;
    c.head_dim = a->head_dim;
    c.d = a->n_kv_heads * a->head_dim;
    c.max_length = (int)a->max_length;
    c.max_pages = a->max_pages;
    c.n_sinks = a->n_sinks;
    c.n_recent = a->n_recent;
    c.window = a->window < a->max_length ? (int)a->window : 0;
    c.n_splits = splits_of(a);
    c.blocks_per_group = blocks_per_group(a);
    c.heads_per_block = (group_of(a) + c.blocks_per_group - 1) / c.blocks_per_group; // 9 heads are 5 + 4, not 8 + 1
    c.scale = a->scale;
    c.softcap = a->softcap;
    set_tensors(a, &c);
    return c;
}

kvq_status kvq_cuda_attention(const kvq_cuda_attention_call *a, void *stream, kvq_error *err) {
    kvq_status status = check_shapes(a, err);
    if (status == KVQ_OK) status = check_cache(a, err);
    if (status != KVQ_OK || a->n_seqs == 0) return status;
    attention_launch(for_device(a), a->tiled, a->n_seqs, a->q, static_cast<float *>(a->workspace), a->out,
                     static_cast<kvq_stream>(stream));
    const char *problem = kvq_launch_error();
    if (problem == NULL) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERNAL, "check that the device works and is one that kvq was built for",
                    "decode attention on a device: %s", problem);
}
