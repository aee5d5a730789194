// SPDX-License-Identifier: Apache-2.0
// Caches as bytes: there and back, going on, what belongs to other layers and artifacts, damage, and bytes that
// somebody sealed who should not have.
#include "packed_rig.h"

static const setup SETUPS[] = {
    {.n_heads = 2, .head_dim = 80, .n_layers = 2, .sinks = 4, .recent = 16, .n_side = 2, .per_head = true},
    {.n_heads = 3, .head_dim = 64, .n_layers = 2, .n_side = 1},
    {.n_heads = 1, .head_dim = 96, .n_layers = 2, .sinks = 130, .recent = 140},
    {.tiled = true, .n_heads = 2, .head_dim = 80, .n_layers = 2, .sinks = 4, .n_side = 2, .n_slots = 16, .dim = 2},
    {.tiled = true, .n_heads = 1, .head_dim = 64, .n_layers = 2, .sinks = 130, .dim = 1},
};
enum { N_SETUPS = sizeof SETUPS / sizeof *SETUPS };

// Small enough to damage every byte: one with rows, a window and sinks, one with a tile that a flush closed.
static const setup SMALL[] = {
    {.n_heads = 2, .head_dim = 8, .n_layers = 2, .sinks = 2, .recent = 5, .n_side = 1},
    {.tiled = true, .n_heads = 2, .head_dim = 8, .n_layers = 2, .sinks = 2, .n_side = 1, .n_slots = 6, .dim = 2},
};
enum { N_SMALL = 20 };

static const int64_t LENGTHS[] = {0, 1, 15, 16, 17, 127, 128, 129, 300};
enum { N_LENGTHS = sizeof LENGTHS / sizeof *LENGTHS };

static kvq_status load(const rig *r, int64_t layer, int64_t capacity, const uint8_t *bytes, int64_t n,
                       kvq_packed_layer **out, kvq_error *err) {
    *out = NULL;
    kvq_status status = kvq_packed_layer_load(&r->ctx, r->artifact, layer, capacity, bytes, n, out, err);
    ck_assert_int_eq(*out == NULL, status != KVQ_OK);
    return status;
}

static void expect_refused(const rig *r, int64_t layer, int64_t capacity, const uint8_t *bytes, int64_t n,
                           kvq_status expected, const char *fragment) {
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    kvq_test_failed(load(r, layer, capacity, bytes, n, &cache, &err), expected, &err, fragment);
}

// ---------------------------------------------------------------- there and back

typedef struct example {
    rig               r;
    float            *x[2];
    kvq_packed_layer *cache;
    uint8_t          *bytes;
    int64_t           n_bytes;
} example;

// The first n of `most` tokens in layer 1, flushed or not.
static void open_example(example *e, const setup *with, int64_t n, int64_t most, bool flushed) {
    kvq_error err = {0};
    rig_open(&e->r, *with);
    for (uint32_t i = 0; i < 2; i++) e->x[i] = randoms(most * e->r.d, 1 + i);
    e->cache = new_cache(&e->r, 1, most);
    append(&e->r, e->cache, e->x, 0, n);
    if (flushed) kvq_test_ok(kvq_packed_layer_flush(e->r.be, e->cache, &err), &err);
    e->bytes = saved(e->cache, &e->n_bytes);
}

static void close_example(example *e) {
    kvq_packed_layer_destroy(&e->r.ctx, &e->cache);
    free(e->x[0]), free(e->x[1]), free(e->bytes);
    rig_close(&e->r);
}

// A loaded cache has the bytes that it was loaded from and decodes to the same numbers; and it goes on as if nothing
// had happened, whatever its own capacity.
START_TEST(a_loaded_cache_goes_on) {
    enum { MOST = 420 };
    for (int i = 0; i < 4 * N_LENGTHS; i++) {
        example           e;
        kvq_error         err = {0};
        kvq_packed_layer *loaded = NULL;
        int64_t           n = LENGTHS[i / 4];
        open_example(&e, &SETUPS[_i], n, MOST, i % 2 == 1);
        kvq_test_ok(load(&e.r, 1, i % 4 < 2 ? MOST : 100000, e.bytes, e.n_bytes, &loaded, &err), &err);
        expect_same_bytes(e.cache, loaded);
        ck_assert_int_eq(kvq_packed_layer_bytes(loaded), kvq_packed_layer_bytes(e.cache));
        expect_cache(&e.r, loaded, 1, n, i % 2 == 1 ? flushed_of(&e.r, n) : coded_of(&e.r, n), e.x);
        for (int64_t at = n, piece = 1; at < MOST; at += piece, piece = piece * 3 % 100 + 1) {
            piece = piece < MOST - at ? piece : MOST - at;
            append(&e.r, loaded, e.x, at, at + piece);
        }
        append(&e.r, e.cache, e.x, n, MOST);
        expect_same_bytes(e.cache, loaded);
        kvq_packed_layer_destroy(&e.r.ctx, &loaded);
        close_example(&e);
    }
}
END_TEST

// The bytes do not tell the capacity, even when it cuts the sinks or the window short; a capacity that is too small for
// the tokens is refused.
START_TEST(bytes_do_not_depend_on_the_capacity) {
    for (int i = 0; i < N_LENGTHS; i++) {
        example           e;
        kvq_error         err = {0};
        kvq_packed_layer *loaded = NULL;
        int64_t           n = LENGTHS[i];
        open_example(&e, &SETUPS[_i], n, 400, false);
        kvq_packed_layer *tight = new_cache(&e.r, 1, n);
        append(&e.r, tight, e.x, 0, n);
        expect_same_bytes(e.cache, tight);
        kvq_test_ok(load(&e.r, 1, n, e.bytes, e.n_bytes, &loaded, &err), &err);
        expect_same_bytes(e.cache, loaded);
        if (n > 0) expect_refused(&e.r, 1, n - 1, e.bytes, e.n_bytes, KVQ_ERR_USAGE, "do not fit into a cache of");
        kvq_packed_layer_destroy(&e.r.ctx, &tight);
        kvq_packed_layer_destroy(&e.r.ctx, &loaded);
        close_example(&e);
    }
}
END_TEST

START_TEST(loading_without_memory_leaves_nothing) {
    example           e;
    kvq_error         err = {0};
    kvq_packed_layer *loaded = NULL;
    int64_t           n_failed = 0;
    open_example(&e, &SETUPS[_i], 300, 300, true);
    limited_memory memory = {.inner = e.r.ctx};
    kvq_context    limited = limited_context(&memory);
    while (kvq_packed_layer_load(&limited, e.r.artifact, 1, 300, e.bytes, e.n_bytes, &loaded, &err) != KVQ_OK) {
        ck_assert_int_eq(err.status, KVQ_ERR_MEMORY);
        ck_assert_ptr_null(loaded);
        ck_assert_int_eq(memory.n_live, 0);
        memory.left = ++n_failed;
        ck_assert_int_lt(n_failed, 60);
    }
    ck_assert_int_gt(n_failed, 5);
    expect_same_bytes(e.cache, loaded);
    kvq_packed_layer_destroy(&limited, &loaded);
    ck_assert_int_eq(memory.n_live, 0);
    close_example(&e);
}
END_TEST

// ---------------------------------------------------------------- identity

typedef struct stream { // what is hashed
    uint8_t bytes[1 << 16];
    size_t  n;
} stream;

static void hash_integer(stream *s, int64_t x) {
    for (int i = 0; i < 8; i++) s->bytes[s->n++] = (uint8_t)((uint64_t)x >> 8 * i);
}

static void hash_bytes(stream *s, const void *from, int64_t n) {
    hash_integer(s, n);
    if (n > 0) memcpy(s->bytes + s->n, from, (size_t)n);
    s->n += (size_t)n;
}

static void hash_floats(stream *s, const float *x, int64_t n) {
    hash_integer(s, x != NULL ? n : 0);
    for (int64_t i = 0; x != NULL && i < n; i++) {
        uint32_t bits = kvq_bits_of_float(x[i]);
        for (int b = 0; b < 4; b++) s->bytes[s->n++] = (uint8_t)(bits >> 8 * b);
    }
}

static void hash_rows(const rig *r, stream *s, const kvq_tensor_quant *t, int n_side) {
    float          storage[3 * 256];
    kvq_block_spec spec = kvq_tensor_block_spec(t, r->d, n_side, storage);
    hash_integer(s, t->bits);
    hash_integer(s, n_side);
    hash_integer(s, t->datatype == KVQ_INT_CLAMPED);
    hash_floats(s, t->codebook, t->n_groups * t->n_levels);
    hash_floats(s, t->decode_levels, t->n_groups * t->n_levels);
    hash_floats(s, spec.z, r->d);
    hash_floats(s, spec.r, r->d);
    hash_floats(s, t->datatype == KVQ_INT_CLAMPED ? spec.grid_z : NULL, r->d);
}

static void hash_tiles(const rig *r, stream *s, const kvq_tensor_quant *t) {
    kvq_tile_view view = {.columns = NULL};
    bool          keys = t->widths != NULL;
    int64_t       d = r->d, n_columns = d / t->dim;
    kvq_test_ok(kvq_tile_view_create(&r->ctx, r->artifact, t, &view, NULL), NULL);
    hash_integer(s, t->dim);
    hash_integer(s, keys ? r->with.n_side : 0);
    hash_integer(s, keys ? r->with.n_slots : 0);
    hash_integer(s, keys ? 0 : (int)t->scale_format);
    hash_integer(s, keys ? 0 : t->scale_exponent);
    hash_bytes(s, view.spec.widths, n_columns);
    hash_integer(s, n_columns);
    for (int64_t c = 0, table = 0; c < n_columns; c++) {
        for (int b = 0; b < 4; b++) s->bytes[s->n++] = (uint8_t)(table >> 8 * b);
        table += keys ? 1 << t->widths[c] : 0; // one for each channel
    }
    hash_floats(s, keys ? t->key_levels : t->codebook, keys ? t->n_key_levels : (int64_t)t->n_levels * t->dim);
    hash_floats(s, view.spec.z, d);
    hash_floats(s, view.spec.r, d);
    hash_floats(s, view.spec.middle, d);
    hash_floats(s, view.spec.half, d);
    hash_floats(s, keys ? NULL : r->artifact->quantizer.rotation, (int64_t)r->with.head_dim * r->with.head_dim);
    kvq_tile_view_free(&r->ctx, &view);
}

START_TEST(the_identity_is_what_the_page_says) {
    static stream s;
    char          hex[KVQ_SHA256_HEX];
    example       e;
    const char   *weights = "00ff";
    open_example(&e, &SMALL[_i % 2], 0, 0, false);
    kvq_layer_quant *l = &e.r.artifact->layers[1];
    kvq_test_ok(kvq_artifact_set_text(&e.r.ctx, &e.r.artifact->model.architecture, "llama", NULL), NULL);
    (void)snprintf(e.r.artifact->model.weights_sha256, sizeof e.r.artifact->model.weights_sha256, "%s", weights);
    l->k.domain = _i < 2 ? KVQ_KEYS_PRE_ROPE : KVQ_KEYS_POST_ROPE;
    if (_i == 2) l->k.datatype = KVQ_INT_CLAMPED;
    kvq_packed_layer_destroy(&e.r.ctx, &e.cache);
    free(e.bytes);
    e.cache = new_cache(&e.r, 1, 0);
    e.bytes = saved(e.cache, &e.n_bytes);
    s.n = 0;
    hash_bytes(&s, "llama", 5);
    hash_bytes(&s, "", 0);
    hash_bytes(&s, weights, 4);
    hash_integer(&s, _i < 2 ? 0 : 1);
    for (int tensor = 0; tensor < 2; tensor++) {
        if (e.r.with.tiled)
            hash_tiles(&e.r, &s, tensor == 0 ? &l->k : &l->v);
        else
            hash_rows(&e.r, &s, tensor == 0 ? &l->k : &l->v, e.r.with.n_side);
    }
    kvq_test_ok(kvq_sha256_of(s.bytes, s.n, hex, NULL), NULL);
    ck_assert_mem_eq(e.bytes + IDENTITY_AT, hex, 64);
    close_example(&e);
}
END_TEST

// ---------------------------------------------------------------- what does not belong together

// Every part of an artifact that the bytes depend on, changed by itself.
typedef struct change {
    const char *what, *fragment;
    void (*apply)(kvq_artifact *a);
} change;

static void change_weights(kvq_artifact *a) { a->model.weights_sha256[0] = 'f'; }
static void change_config(kvq_artifact *a) { a->model.config_sha256[0] = 'f'; }
static void change_domain(kvq_artifact *a) { a->layers[1].k.domain = KVQ_KEYS_POST_ROPE; }
static void change_sinks(kvq_artifact *a) { a->quantizer.sink_tokens++; }
static void change_recent(kvq_artifact *a) { a->quantizer.recent_tokens++; }
static void change_side(kvq_artifact *a) { a->quantizer.n_side_k++; }
static void change_side_v(kvq_artifact *a) { a->quantizer.n_side_v++; }
static void change_level(kvq_artifact *a) { a->layers[1].v.codebook[2] += 0.25f; }
static void change_k_level(kvq_artifact *a) { a->layers[1].k.codebook[2] += 0.25f; }
static void change_bits(kvq_artifact *a) { a->layers[1].v.bits = 2; }
static void change_kind(kvq_artifact *a) { a->layers[1].v.datatype = KVQ_INT_CLAMPED; }
static void change_lower(kvq_artifact *a) { a->layers[1].k.lower[3] -= 0.25f; }
static void change_upper(kvq_artifact *a) { a->layers[1].k.upper[3] += 0.25f; }
static void change_shape(kvq_artifact *a) {
    a->model.head_dim /= 2;
    a->model.n_kv_heads *= 2;
}
static void change_decoded(kvq_artifact *a) { a->layers[1].k.decode_levels[1] += 0.25f; }
static void change_widths(kvq_artifact *a) { // the same sizes in another order
    uint8_t width = a->layers[1].k.widths[0];
    a->layers[1].k.widths[0] = a->layers[1].k.widths[1];
    a->layers[1].k.widths[1] = width;
}
static void change_key_level(kvq_artifact *a) { a->layers[1].k.key_levels[a->layers[1].k.n_key_levels - 1] += 0.25f; }
static void change_slots(kvq_artifact *a) { a->quantizer.n_slots += 2; }
static void change_rotation(kvq_artifact *a) { a->quantizer.rotation[1] = -a->quantizer.rotation[1]; }
static void change_exponent(kvq_artifact *a) { a->layers[1].v.scale_exponent++; }
static void change_format(kvq_artifact *a) { a->layers[1].v.scale_format = KVQ_SCALE_F16; }

static const change ANY_CHANGES[] = {
    {"weights", "of another model, or was coded with other tables", change_weights},
    {"config", "of another model", change_config},
    {"domain", "other tables", change_domain},
    {"sinks", "has sink_tokens 4 instead of 5", change_sinks},
    {"recent", "recent_tokens", change_recent},
    {"side", "other tables", change_side},
    {"a level", "other tables", change_level},
    {"lower", "other tables", change_lower},
    {"upper", "other tables", change_upper},
};
static const change ROW_CHANGES[] = {
    {"shape", "head_dim 80 instead of 40", change_shape},
    {"a level of K", "other tables", change_k_level},
    {"side of V", "other tables", change_side_v},
    {"bits", "other tables", change_bits},
    {"datatype", "other tables", change_kind},
    {"decoded", "other tables", change_decoded},
};
static const change TILE_CHANGES[] = {
    {"widths", "other tables", change_widths},     {"key level", "other tables", change_key_level},
    {"slots", "other tables", change_slots},       {"rotation", "other tables", change_rotation},
    {"exponent", "other tables", change_exponent}, {"format", "other tables", change_format},
};

static void expect_changes_refused(const setup *with, const change *changes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        example   e;
        kvq_error err = {0};
        open_example(&e, with, 140, 140, false);
        kvq_packed_layer_destroy(&e.r.ctx, &e.cache); // it has borrowed the artifact
        changes[i].apply(e.r.artifact);
        kvq_status status = load(&e.r, 1, 140, e.bytes, e.n_bytes, &e.cache, &err);
        ck_assert_msg(status == KVQ_ERR_MISMATCH, "%s: KVQ-E%d", changes[i].what, kvq_status_number(status));
        kvq_test_failed(status, KVQ_ERR_MISMATCH, &err, changes[i].fragment);
        close_example(&e);
    }
}

START_TEST(other_artifacts_are_refused) {
    for (int i = 0; i < 4; i += 3)
        expect_changes_refused(&SETUPS[i], ANY_CHANGES, sizeof ANY_CHANGES / sizeof *ANY_CHANGES);
    expect_changes_refused(&SETUPS[0], ROW_CHANGES, sizeof ROW_CHANGES / sizeof *ROW_CHANGES);
    expect_changes_refused(&SETUPS[3], TILE_CHANGES, sizeof TILE_CHANGES / sizeof *TILE_CHANGES);
}
END_TEST

// Another layer, also one with the same tables; another scheme, and other shapes of the same d.
START_TEST(other_layers_and_shapes_are_refused) {
    example e, other;
    open_example(&e, &SETUPS[_i], 140, 140, false);
    expect_refused(&e.r, 0, 140, e.bytes, e.n_bytes, KVQ_ERR_MISMATCH, "layer 0: the saved cache has layer 1");
    expect_refused(&e.r, 2, 140, e.bytes, e.n_bytes, KVQ_ERR_USAGE, "layer 2 of an artifact of 2 layers");
    for (int i = 0; i < N_SETUPS; i++) {
        if (i == _i) continue;
        open_example(&other, &SETUPS[i], 0, 0, false);
        expect_refused(&other.r, 1, 140, e.bytes, e.n_bytes, KVQ_ERR_MISMATCH, "layer 1: the saved cache has");
        close_example(&other);
    }
    close_example(&e);
}
END_TEST

// What a cache does not depend on may change: other layers, reports, what the model is called.
START_TEST(the_rest_of_an_artifact_may_change) {
    example   e;
    kvq_error err = {0};
    open_example(&e, &SETUPS[_i], 140, 140, true);
    kvq_artifact *a = e.r.artifact;
    kvq_packed_layer_destroy(&e.r.ctx, &e.cache);
    a->layers[0].k.lower[0] -= 1;
    a->layers[1].k.fit.mse = 3;
    a->dataset.seed++;
    kvq_test_ok(kvq_artifact_set_text(&e.r.ctx, &a->model.name, "renamed", NULL), NULL);
    kvq_test_ok(load(&e.r, 1, 140, e.bytes, e.n_bytes, &e.cache, &err), &err);
    close_example(&e);
}
END_TEST

// ---------------------------------------------------------------- damage

// Every length but the right one, and every byte changed.
START_TEST(damaged_bytes_are_refused) {
    for (int flushed = 0; flushed < 2; flushed++) {
        example e;
        open_example(&e, &SMALL[_i], N_SMALL, N_SMALL, flushed != 0);
        for (int64_t n = 0; n < e.n_bytes; n++) {
            uint8_t *part = malloc((size_t)n + 1); // of its own, so that reading beyond it would be noticed
            memcpy(part, e.bytes, (size_t)n);
            expect_refused(&e.r, 1, N_SMALL, part, n, KVQ_ERR_INTEGRITY, "saved cache");
            free(part);
        }
        expect_refused(&e.r, 1, N_SMALL, e.bytes, e.n_bytes + 1, KVQ_ERR_INTEGRITY, "damaged");
        for (int64_t i = 0; i < e.n_bytes; i++) {
            e.bytes[i] ^= (uint8_t)(1 << i % 8);
            expect_refused(&e.r, 1, N_SMALL, e.bytes, e.n_bytes, KVQ_ERR_INTEGRITY, "saved cache");
            e.bytes[i] ^= (uint8_t)(1 << i % 8);
        }
        close_example(&e);
    }
}
END_TEST

typedef struct forgery {
    int         number; // which of those in the header
    int64_t     value;
    kvq_status  status;
    const char *fragment;
} forgery;

static const forgery FORGERIES[] = {
    {0, 2, KVQ_ERR_VERSION, "a saved cache of version 2; this is version 1"},
    {0, 0, KVQ_ERR_VERSION, "version 0"},
    {1, 2, KVQ_ERR_MISMATCH, "scheme 2"},
    {2, 0, KVQ_ERR_MISMATCH, "layer 0 instead of 1"},
    {3, 15, KVQ_ERR_MISMATCH, "d 15 instead of 16"},
    {4, 4, KVQ_ERR_MISMATCH, "head_dim 4 instead of 8"},
    {7, -1, KVQ_ERR_INTEGRITY, "of -1 tokens"},
    {7, INT64_MIN, KVQ_ERR_INTEGRITY, "cannot have"},
    {7, INT64_MAX, KVQ_ERR_INTEGRITY, "cannot have"},
    {7, N_SMALL + 1, KVQ_ERR_INTEGRITY, "cannot have"},
    {7, N_SMALL - 1, KVQ_ERR_INTEGRITY, "cannot have"},
    {7, 0, KVQ_ERR_INTEGRITY, "cannot have"},
    {7, 101, KVQ_ERR_USAGE, "101 saved tokens do not fit into a cache of 100"},
    {8, -1, KVQ_ERR_INTEGRITY, "-1 of them coded"},
    {8, 12, KVQ_ERR_INTEGRITY, "12 of them coded"},
    {8, 14, KVQ_ERR_INTEGRITY, "14 of them coded"},
    {8, 21, KVQ_ERR_INTEGRITY, "21 of them coded"},
    {8, INT64_MAX, KVQ_ERR_INTEGRITY, "cannot have"},
    {8, INT64_MIN, KVQ_ERR_INTEGRITY, "cannot have"},
};

// A right seal under wrong numbers; rows have 13 coded tokens, tiles none.
START_TEST(forged_numbers_are_refused) {
    const forgery *f = &FORGERIES[_i];
    for (int i = 0; i < 2; i++) {
        example e;
        open_example(&e, &SMALL[i], N_SMALL, N_SMALL, false);
        put_number(e.bytes, f->number, f->value);
        seal(e.bytes, e.n_bytes);
        expect_refused(&e.r, 1, 100, e.bytes, e.n_bytes, f->status, f->fragment);
        close_example(&e);
    }
}
END_TEST

// Whatever is in sealed bytes, they are refused or give a cache that can be used.
static void use_forged(const example *e) {
    kvq_error         err = {0};
    kvq_packed_layer *cache = NULL;
    float             k[N_SMALL * 16], v[N_SMALL * 16];
    kvq_status        status = load(&e->r, 1, 100, e->bytes, e->n_bytes, &cache, &err);
    if (status != KVQ_OK) {
        ck_assert_msg(status == KVQ_ERR_INTEGRITY || status == KVQ_ERR_MISMATCH || status == KVQ_ERR_VERSION ||
                          status == KVQ_ERR_USAGE,
                      "KVQ-E%d: %s", kvq_status_number(status), err.message);
        return;
    }
    int64_t  n;
    uint8_t *again = saved(cache, &n);
    ck_assert_int_eq(n, e->n_bytes);
    ck_assert(memcmp(again, e->bytes, (size_t)n) == 0);
    free(again);
    kvq_packed_layer_decode(e->r.be, cache, k, v);
    append(&e->r, cache, e->x, N_SMALL, 100);
    kvq_packed_layer_destroy(&e->r.ctx, &cache);
}

START_TEST(forged_bytes_are_safe) {
    for (int i = 0; i < 4; i++) {
        example e;
        open_example(&e, &SMALL[i / 2], N_SMALL, 100, i % 2 == 1);
        for (int64_t at = 0; at < e.n_bytes - SEAL; at++) {
            static const uint8_t VALUES[] = {0xff, 0x7c, 0x80, 0};
            uint8_t              was = e.bytes[at];
            e.bytes[at] = VALUES[at % 4] != was ? VALUES[at % 4] : (uint8_t)~was;
            seal(e.bytes, e.n_bytes);
            use_forged(&e);
            e.bytes[at] = was;
        }
        for (uint32_t round = 0; round < 200; round++) { // everything behind the header
            for (int64_t at = HEADER; at < e.n_bytes - SEAL; at++)
                e.bytes[at] =
                    (uint8_t)(kvq_rng_below(9, KVQ_RNG_TEST, round, (uint64_t)at, 256) & (round % 2 ? 0xff : 0x3b));
            seal(e.bytes, e.n_bytes);
            use_forged(&e);
        }
        close_example(&e);
    }
}
END_TEST

// Numbers that are not finite in a sink, and in a token that waits; outliers that would lie outside of their tile, and
// more of them than there are slots.
START_TEST(forged_contents_are_located) {
    example e;
    int     d = 16;
    for (int i = 0; i < 2; i++) {
        open_example(&e, &SMALL[i], N_SMALL, N_SMALL, false);
        e.bytes[HEADER + 2 * (d + 3) + 1] = 0x7c;
        seal(e.bytes, e.n_bytes);
        expect_refused(&e.r, 1, 100, e.bytes, e.n_bytes, KVQ_ERR_INTEGRITY, "layer 1, K, position 1: the saved cache");
        e.bytes[HEADER + 2 * (d + 3) + 1] = 0x3c;
        e.bytes[e.n_bytes - SEAL - 1] = 0xfe;
        seal(e.bytes, e.n_bytes);
        expect_refused(&e.r, 1, 100, e.bytes, e.n_bytes, KVQ_ERR_INTEGRITY, "layer 1, V, position 19: the saved cache");
        close_example(&e);
    }
    open_example(&e, &SMALL[1], N_SMALL, N_SMALL, true);
    kvq_tile_view view = {.columns = NULL};
    kvq_test_ok(kvq_tile_view_create(&e.r.ctx, e.r.artifact, &e.r.artifact->layers[1].k, &view, NULL), NULL);
    uint8_t *counts = e.bytes + HEADER + 2 * 2 * d + kvq_tile_code_bytes(&view.spec), *entry = counts + 4;
    ck_assert_int_eq(counts[0] + counts[2], 6); // all slots are taken
    entry[4] = (uint8_t)((entry[4] & 0xf8) | 8);
    seal(e.bytes, e.n_bytes);
    expect_refused(&e.r, 1, 100, e.bytes, e.n_bytes, KVQ_ERR_INTEGRITY, "tile 0 of the saved cache");
    entry[4] &= 7;
    counts[2]++;
    seal(e.bytes, e.n_bytes);
    expect_refused(&e.r, 1, 100, e.bytes, e.n_bytes, KVQ_ERR_INTEGRITY, "tile 0 of the saved cache");
    counts[2]--;
    counts[3] = 0xff;
    seal(e.bytes, e.n_bytes);
    expect_refused(&e.r, 1, 100, e.bytes, e.n_bytes, KVQ_ERR_INTEGRITY, "tile 0 of the saved cache");
    kvq_tile_view_free(&e.r.ctx, &view);
    close_example(&e);
}
END_TEST

static const kvq_test_case CASES[] = {
    KVQ_LOOP(a_loaded_cache_goes_on, N_SETUPS),
    KVQ_LOOP(bytes_do_not_depend_on_the_capacity, N_SETUPS),
    KVQ_LOOP(loading_without_memory_leaves_nothing, N_SETUPS),
    KVQ_LOOP(the_identity_is_what_the_page_says, 4),
    KVQ_CASE(other_artifacts_are_refused),
    KVQ_LOOP(other_layers_and_shapes_are_refused, N_SETUPS),
    KVQ_LOOP(the_rest_of_an_artifact_may_change, N_SETUPS),
    KVQ_LOOP(damaged_bytes_are_refused, 2),
    KVQ_LOOP(forged_numbers_are_refused, (int)(sizeof FORGERIES / sizeof *FORGERIES)),
    KVQ_CASE(forged_bytes_are_safe),
    KVQ_CASE(forged_contents_are_located),
};
KVQ_TEST_MAIN("packed saved", CASES)
