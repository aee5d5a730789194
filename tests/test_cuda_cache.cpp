// SPDX-License-Identifier: Apache-2.0
//
// The packed cache that lives on a device (kernels/cuda/cache.c), on the emulated one: byte for byte that of the CPU
// after every piece of tokens, its attention within the derived bound of f64 over what the CPU decodes, no waiting
// while tokens are decoded one by one, and what is refused.
#include <stdio.h>
#include <stdlib.h>

#include "device_cache_rig.h"
#include "emulated_rig.h"

// ---------------------------------------------------------------- layers

static attention_setup rows(int64_t sinks, int64_t recent, bool per_head) {
    attention_setup s = {};
    s.n_kv_heads = 2, s.head_dim = 16, s.k_bits = 3, s.v_bits = 4, s.n_side = 2;
    s.sinks = sinks, s.recent = recent, s.per_head = per_head, s.spread = 1;
    return s;
}

static attention_setup tiles(int64_t sinks, int dim, int n_slots) {
    attention_setup s = {};
    s.tiled = true;
    s.n_kv_heads = 2, s.head_dim = 16, s.dim = dim, s.half_scales = dim == 1, s.n_slots = n_slots;
    s.n_side = n_slots > 0 ? 2 : 0, s.sinks = sinks, s.spread = 1;
    return s;
}

static attention_setup swapped(attention_setup s) {
    s.swapped = true;
    return s;
}

static const struct {
    const char     *name;
    attention_setup with;
} LAYERS[] = {
    {"rows", rows(3, 0, false)},
    {"rows, tables per head", rows(0, 0, true)},
    {"rows, recent window", rows(1, 20, false)},
    {"rows, tables per head, recent window", rows(4, 130, true)},
    {"rows, K per token, V per channel", swapped(rows(2, 7, false))},
    {"rows, a page of sinks", rows(140, 1, false)},
    {"tiles", tiles(2, 1, 40)},
    {"tiles, pairs", tiles(0, 2, 8)},
    {"tiles without outliers, a tile of sinks", tiles(130, 2, 0)},
};
enum { N_LAYERS = sizeof LAYERS / sizeof *LAYERS, N_SEQS = 3, CAPACITY = 570 };

// What one sequence after the other gets. Sequence 0 ends at 431, sequence 1 at 563, sequence 2 at 401 tokens; its
// first piece is more than passes through f16 to the codec at a time.
static const struct {
    int     sequence;
    int64_t n;
} PIECES[] = {{0, 1},   {1, 260}, {0, 2},   {2, 400}, {0, 3},   {0, 40}, {1, 1},
              {0, 127}, {1, 301}, {0, 128}, {2, 1},   {0, 129}, {0, 1},  {1, 1}};

static Query query_of(const attention_setup &with, int group, bool before_rope) {
    int   D = with.head_dim;
    Query q = {group * with.n_kv_heads, with.n_kv_heads, D, (float)(1 / sqrt((double)D)), 0, 0, 0, 1, {}};
    if (!before_rope) return q;
    q.n_pairs = D / 2;
    for (int i = 0; i < q.n_pairs; i++) q.frequency.push_back(pow(1e4, -(double)i / q.n_pairs));
    return q;
}

// A layer twice: on the CPU, a cache for each sequence, and on the device.
struct Twin {
    attention_rig                   rig;
    Query                           query;
    std::vector<kvq_packed_layer *> host;
    std::vector<float *>            x[2];
    size_t                          d;
    CudaDevice                      device;
    CudaCache                      *cache;

    Twin(const attention_setup &with, int group, bool before_rope, int64_t n_pages = 0)
        : query(query_of(with, group, before_rope)), d((size_t)(with.n_kv_heads * with.head_dim)) {
        attention_rig_open(&with, &rig);
        for (int i = 0; i < N_SEQS; i++) {
            host.push_back(attention_rig_cache(&rig, CAPACITY));
            for (int t = 0; t < 2; t++)
                x[t].push_back(attention_rig_numbers(&rig, CAPACITY * (int64_t)d, (uint32_t)(2 * i + t)));
        }
        kvq_cache_layer layer = layer_of(rig, N_SEQS, CAPACITY, query);
        layer.n_pages = n_pages;
        cache = new CudaCache(&device, layer);
    }
    ~Twin() {
        delete cache;
        for (int i = 0; i < N_SEQS; i++) {
            kvq_packed_layer_destroy(&device.ctx, &host[(size_t)i]);
            free(x[0][(size_t)i]), free(x[1][(size_t)i]);
        }
        attention_rig_close(&rig);
    }
    Twin(const Twin &) = delete;
    Twin &operator=(const Twin &) = delete;

    int64_t length(int sequence) const { return kvq_packed_layer_length(host[(size_t)sequence]); }
    // The next n tokens of a sequence.
    void append(int sequence, int64_t n) {
        kvq_error    err = {};
        size_t       at = (size_t)length(sequence) * d, i = (size_t)sequence;
        const float *k = x[0][i] + at, *v = x[1][i] + at;
        expect_ok(cache->append(sequence, k, v, n, &err), err);
        expect_ok(kvq_packed_layer_append(attention_rig_backend(&rig), host[i], k, v, n, &err), err);
    }
    void expect_equal() {
        for (int i = 0; i < N_SEQS; i++) expect_sequence(cache, i, rig, host[(size_t)i]);
    }
    void check() {
        kvq_error err = {};
        expect_ok(kvq_cuda_cache_check(cache->cache, nullptr, device.stream, &err), err);
    }
    std::vector<float> queries() const {
        std::vector<float> q((size_t)(N_SEQS * query.n_heads * query.head_dim));
        for (size_t i = 0; i < q.size(); i++) q[i] = (float)(8 * kvq_rng_uniform(9, KVQ_RNG_TEST, 77, i) - 4);
        return q;
    }
    std::vector<float> attend() { return cache->attend(query, 0, queries()); }
};

// ---------------------------------------------------------------- bytes

START_TEST(bytes_are_those_of_the_cpu_after_every_piece) {
    Twin twin(LAYERS[_i].with, 1, false);
    for (const auto &piece : PIECES) {
        twin.append(piece.sequence, piece.n);
        twin.expect_equal();
    }
    twin.check();
}
END_TEST

// Token by token, past all edges.
START_TEST(bytes_are_those_of_the_cpu_after_every_token) {
    Twin twin(LAYERS[_i].with, 1, false);
    for (int i = 0; i < 290; i++) {
        twin.append(1, 1);
        if (i < 6 || i % 16 == 0 || i % 128 == 127 || i % 128 < 3)
            expect_sequence(twin.cache, 1, twin.rig, twin.host[1]);
    }
    twin.expect_equal();
    twin.check();
}
END_TEST

// ---------------------------------------------------------------- attention

// By shapes, as attention_launch.cu cuts.
static int splits_of(const Query &query, int64_t longest) {
    int64_t wanted = 512 / (N_SEQS * query.n_kv_heads), most = (longest + 255) / 256;
    return (int)(most < 1 ? 1 : wanted < most ? wanted : most);
}

static double compare(Twin *twin, const std::vector<float> &out) {
    size_t  size = (size_t)(twin->query.n_heads * twin->query.head_dim);
    int64_t longest = 0;
    double  share = 0;
    auto    q = twin->queries();
    for (int i = 0; i < N_SEQS; i++) longest = twin->length(i) > longest ? twin->length(i) : longest;
    for (int s = 0; s < N_SEQS; s++) {
        attention_sequence sequence;
        attention_sequence_of(&twin->rig, attention_rig_backend(&twin->rig), twin->host[(size_t)s], &sequence);
        Answer answer = exact_attention(twin->query, tokens_of(&twin->rig, sequence), q.data() + (size_t)s * size,
                                        splits_of(twin->query, longest));
        for (size_t i = 0; i < size; i++) {
            double is = (double)out[(size_t)s * size + i], error = fabs(is - answer.out[i]);
            if (!(error <= answer.bound[i]))
                ck_abort_msg("sequence %d of %d tokens, element %d: %g, not %g; %g > %g", s, (int)sequence.length,
                             (int)i, is, answer.out[i], error, answer.bound[i]);
            if (answer.bound[i] > 0) share = fmax(share, error / answer.bound[i]);
        }
        attention_sequence_close(&sequence);
    }
    return share;
}

static const struct {
    int     group, layer;
    bool    before_rope;
    float   softcap;
    int64_t window;
} LOOKS[] = {{1, 0, true, 0, 0},   {4, 1, true, 0, 0},  {8, 2, true, 0, 0},  {4, 3, true, 5, 0},
             {1, 4, false, 0, 33}, {4, 5, true, 0, 0},  {1, 6, true, 0, 0},  {4, 7, true, 5, 0},
             {8, 8, false, 0, 0},  {8, 6, true, 0, 33}, {4, 2, false, 0, 33}};
enum { N_LOOKS = sizeof LOOKS / sizeof *LOOKS };
// Tokens that sequence 0 has, and what the others get on the way: lengths of 0 and of sinks only, edges of pages.
static const int64_t LENGTHS[] = {0, 1, 2, 3, 4, 5, 127, 128, 129, 132, 255, 256, 300};

START_TEST(attention_is_within_the_bound) {
    const auto &look = LOOKS[_i];
    Twin        twin(LAYERS[look.layer].with, look.group, look.before_rope);
    double      share = 0;
    twin.query.softcap = look.softcap;
    twin.query.window = look.window;
    for (int64_t length : LENGTHS) {
        if (length > twin.length(0)) twin.append(0, length - twin.length(0));
        if (length >= 127 && twin.length(2) + 33 < CAPACITY) twin.append(2, 33);
        share = fmax(share, compare(&twin, twin.attend()));
    }
    printf("%-38s group %d: at most %.4f of the bound\n", LAYERS[look.layer].name, look.group, share);
    twin.check();
}
END_TEST

// ---------------------------------------------------------------- order and waiting

// All orders of threads and blocks, with every access to global memory traced, have the same bits and no race.
START_TEST(any_schedule_gives_the_same_bits) {
    std::vector<float> first;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        Twin twin(LAYERS[_i].with, 4, true);
        begin(seed);
        twin.append(0, 150), twin.append(1, 3);
        for (int i = 0; i < 3; i++) twin.append(0, 1);
        twin.expect_equal();
        std::vector<float> out = twin.attend();
        if (first.empty()) first = out;
        if (memcmp(out.data(), first.data(), out.size() * sizeof(float)) != 0) ck_abort_msg("seed %d", (int)seed);
        expect_clean();
    }
}
END_TEST

// 140 tokens one by one, and attention behind each; tokens and queries are on the device already.
static kvq_status decode_steps(Twin *twin, const CudaFloats &k, const CudaFloats &v, const CudaFloats &q,
                               CudaFloats *out, kvq_error *err) {
    kvq_cache_query query = {twin->query.n_heads, twin->query.scale, 0, 0, 0};
    kvq_status      status = KVQ_OK;
    for (size_t i = 0; i < 140; i++) {
        KVQ_TRY(kvq_cuda_cache_append(twin->cache->cache, 0, k.at + i * twin->d, v.at + i * twin->d, 1,
                                      twin->device.stream, err));
        if (i % 70 == 69)
            KVQ_TRY(kvq_cuda_cache_attend(twin->cache->cache, &query, q.at, out->at, twin->device.stream, err));
    }

done:
    return status;
}

// Does it all, of which the last part is decode_steps; `calls` of the device's runtime may be made.
static kvq_status decode_within(int64_t calls, const attention_setup &with, kvq_error *err) {
    (void)setenv("KVQ_SIMT_CALLS", "1000000", 1);
    Twin       twin(with, 4, true);
    CudaFloats k(&twin.device, 140 * twin.d), v(&twin.device, 140 * twin.d), q(&twin.device, twin.queries().size()),
        out(&twin.device, q.n);
    k.put(twin.x[0][0], 140 * twin.d), v.put(twin.x[1][0], 140 * twin.d), q.put(twin.queries().data(), q.n);
    (void)twin.attend(); // the workspace is there
    // A second device has the world's settings: the runtime now counts from here.
    char text[32];
    (void)snprintf(text, sizeof text, "%lld", (long long)calls);
    (void)setenv("KVQ_SIMT_CALLS", text, 1);
    kvq_cuda_device *counted = nullptr;
    expect_ok(kvq_cuda_open(&twin.device.ctx, 0, &counted, err), *err);
    kvq_status status = decode_steps(&twin, k, v, q, &out, err);
    (void)setenv("KVQ_SIMT_CALLS", "1000000", 1);
    kvq_cuda_close(&twin.device.ctx, &counted);
    return status;
}

// Rows without a recent window: nothing is copied, allocated or waited for. With one, or with tiles, memory for tokens
// on their way to the codec is allocated once, for K and V together: one or two calls.
START_TEST(tokens_are_decoded_without_waiting) {
    const attention_setup &with = LAYERS[_i].with;
    kvq_error              err = {};
    bool                   is_staged = with.tiled || with.recent > 0;
    expect_ok(decode_within(is_staged ? 1 + with.tiled : 0, with, &err), err);
}
END_TEST

// ---------------------------------------------------------------- numbers beyond f16

// Of the sinks, of what waits, and of what is coded at once: in a prompt, by itself, and behind it. The last token has
// one, too; the first one is told.
START_TEST(numbers_beyond_f16_are_named) {
    static const int64_t AT[] = {0, 2, 131, 159};
    enum { N = 170 };
    for (int64_t at : AT) {
        Twin               twin(LAYERS[_i].with, 1, false);
        kvq_error          err = {};
        kvq_cuda_cache_bad bad = {-1, -1, -1};
        int                tensor = (int)(at % 2);
        const int64_t      ends[] = {at, at + 1, N};
        twin.append(2, 33);
        twin.x[tensor][1][at * (int64_t)twin.d + 5] = -7e8f;
        twin.x[1][1][(N - 1) * (int64_t)twin.d + 7] = 7e8f;
        for (int64_t first = 0, i = 0; i < 3; first = ends[i++]) {
            size_t from = (size_t)first * twin.d;
            expect_ok(twin.cache->append(1, twin.x[0][1] + from, twin.x[1][1] + from, ends[i] - first, &err), err);
        }
        expect_sequence(twin.cache, 2, twin.rig, twin.host[2]); // the others are as they should be
        char text[64];
        (void)snprintf(text, sizeof text, "sequence 1, %s, position %d", tensor == 0 ? "K" : "V", (int)at);
        kvq_test_failed(kvq_cuda_cache_check(twin.cache->cache, &bad, twin.device.stream, &err), KVQ_ERR_NUMERICAL,
                        &err, text);
        if (bad.sequence != 1 || bad.tensor != tensor || bad.position != at) ck_abort_msg("%s", text);
        expect_ok(kvq_cuda_cache_reset(twin.cache->cache, 1, twin.device.stream, &err), err);
        twin.append(2, 260); // the codec has forgotten it, too
        expect_sequence(twin.cache, 2, twin.rig, twin.host[2]);
        twin.check();
    }
}
END_TEST

// An infinity or something that is no number, where tokens pass through f16, is named; no kernel stumbles over it.
START_TEST(what_is_no_number_is_named) {
    const attention_setup &with = LAYERS[_i].with;
    if (!with.tiled && with.recent == 0) return;
    Twin               twin(with, 1, false);
    kvq_error          err = {};
    kvq_cuda_cache_bad bad = {-1, -1, -1};
    twin.x[0][0][200 * (int64_t)twin.d + 3] = (float)NAN;
    twin.x[1][0][150 * (int64_t)twin.d + 3] = (float)INFINITY;
    expect_ok(twin.cache->append(0, twin.x[0][0], twin.x[1][0], 300, &err), err);
    kvq_test_failed(kvq_cuda_cache_check(twin.cache->cache, &bad, twin.device.stream, &err), KVQ_ERR_NUMERICAL, &err,
                    "sequence 0, V, position 150");
    (void)twin.attend();
}
END_TEST

// ---------------------------------------------------------------- room

START_TEST(what_does_not_fit_changes_nothing) {
    Twin      twin(LAYERS[_i].with, 1, false);
    kvq_error err = {};
    twin.append(1, 300);
    CudaFloats x(&twin.device, (CAPACITY + 1) * twin.d);
    auto       append = [&](int sequence, int64_t n) {
        return kvq_cuda_cache_append(twin.cache->cache, sequence, x.at, x.at, n, twin.device.stream, &err);
    };
    kvq_test_failed(append(1, CAPACITY - 299), KVQ_ERR_USAGE, &err, "sequence 1: 271 tokens do not fit behind 300");
    kvq_test_failed(append(0, CAPACITY + 1), KVQ_ERR_USAGE, &err, "sequence 0: 571 tokens do not fit behind 0");
    kvq_test_failed(append(0, -1), KVQ_ERR_USAGE, &err, "-1 tokens");
    kvq_test_failed(append(N_SEQS, 1), KVQ_ERR_USAGE, &err, "sequence 3 of a packed cache of 3");
    kvq_test_failed(append(-1, 1), KVQ_ERR_USAGE, &err, "sequence -1");
    kvq_test_failed(kvq_cuda_cache_reset(twin.cache->cache, N_SEQS, twin.device.stream, &err), KVQ_ERR_USAGE, &err,
                    "sequence 3");
    expect_ok(append(1, 0), err);
    twin.expect_equal();
    twin.append(1, CAPACITY - 300);
    twin.expect_equal();
}
END_TEST

// A pool of five pages for three sequences: one has to go before another can grow, whose pages then lie scattered.
START_TEST(pages_are_shared_and_used_again) {
    Twin      twin(LAYERS[_i].with, 4, true, 5);
    kvq_error err = {};
    int64_t   page = twin.rig.with.tiled ? 0 : twin.rig.with.sinks + twin.rig.with.recent; // f16 tokens of rows
    twin.append(0, page + 128), twin.append(1, page + 256), twin.append(2, page + 128), twin.append(0, 128);
    std::vector<float> more((size_t)CAPACITY * twin.d, 0.5f);
    kvq_test_failed(twin.cache->append(2, more.data(), more.data(), twin.rig.with.tiled ? 257 : 256, &err),
                    KVQ_ERR_MEMORY, &err, "sequence 2 needs 2 more pages of 128 tokens; 0 of 5 are free");
    twin.expect_equal();
    expect_ok(kvq_cuda_cache_reset(twin.cache->cache, 0, twin.device.stream, &err), err);
    kvq_packed_layer_reset(twin.host[0]);
    twin.expect_equal();
    twin.append(2, 128), twin.append(0, page + 1);
    twin.expect_equal();
    (void)compare(&twin, twin.attend());
    expect_ok(kvq_cuda_cache_reset(twin.cache->cache, 1, twin.device.stream, &err), err);
    kvq_packed_layer_reset(twin.host[1]);
    twin.append(1, page + 129); // again, from the start
    twin.expect_equal();
    (void)compare(&twin, twin.attend());
    twin.check();
}
END_TEST

// ---------------------------------------------------------------- creation

struct Refusal {
    bool tiled;
    void (*change)(kvq_cache_layer *layer);
    const char *fragment;
};
static const Refusal refusals[] = {
    {false, [](kvq_cache_layer *l) { l->n_seqs = 0; }, "sequences, not 1 .. 65535: 0"},
    {false, [](kvq_cache_layer *l) { l->capacity = 0; }, "capacity, not 1 .. 2^30: 0"},
    {false, [](kvq_cache_layer *l) { l->n_kv_heads = 0; }, "KV heads: 0"},
    {false, [](kvq_cache_layer *l) { l->head_dim = 8; }, "channels in the spec of K: 32"},
    {false, [](kvq_cache_layer *l) { l->n_sinks = -1; }, "sinks: -1"},
    {false, [](kvq_cache_layer *l) { l->n_recent = -1; }, "recent tokens: -1"},
    {false, [](kvq_cache_layer *l) { l->n_pages = -1; }, "pages, not 0 .. 2^31 - 1: -1"},
    {false, [](kvq_cache_layer *l) { l->n_pairs = 9; }, "rotated pairs"},
    {false, [](kvq_cache_layer *l) { l->n_pairs = 8; }, "without frequencies"},
    {false, [](kvq_cache_layer *l) { l->rows[1].d = 16; }, "channels in the spec of V: 16"},
    {false, [](kvq_cache_layer *l) { l->rows[0].bits = 9; }, "codes of 9 bits"},
    {false,
     [](kvq_cache_layer *l) {
         l->n_seqs = 65535;
         l->capacity = 1 << 30;
     },
     "pages, more than 2^31 - 1"},
    {true, [](kvq_cache_layer *l) { l->n_recent = 4; }, "tiles with recent tokens: 4"},
    {true, [](kvq_cache_layer *l) { l->tiles[0] = l->tiles[1]; }, "for the other tensor than 0"},
    {true, [](kvq_cache_layer *l) { l->tiles[1].levels = nullptr; }, "without all of its tables"},
};
enum { N_REFUSALS = sizeof refusals / sizeof *refusals };

START_TEST(layers_that_make_no_sense_are_refused) {
    const Refusal  &r = refusals[_i];
    attention_setup with = r.tiled ? tiles(2, 1, 40) : rows(3, 0, false);
    attention_rig   rig;
    kvq_error       err = {};
    kvq_cuda_cache *cache = nullptr;
    attention_rig_open(&with, &rig);
    {
        CudaDevice      device;
        kvq_cache_layer layer = layer_of(rig, 1, 100, query_of(with, 1, false));
        layer.frequency = nullptr;
        r.change(&layer);
        kvq_test_failed(kvq_cuda_cache_create(device.device, &device.ctx, &layer, &cache, &err), KVQ_ERR_USAGE, &err,
                        r.fragment);
        ck_assert_ptr_null(cache);
    }
    attention_rig_close(&rig);
}
END_TEST

struct Counted {
    int64_t left, live;
};
static void *counted_alloc(void *user, size_t bytes) {
    Counted *c = static_cast<Counted *>(user);
    if (c->left-- <= 0) return nullptr;
    c->live++;
    return aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
}
static void counted_release(void *user, void *p) {
    static_cast<Counted *>(user)->live--;
    free(p);
}

// Every allocation of the host and every call of the device fails once; each time all is given back, and told.
START_TEST(every_failure_is_told) {
    attention_rig rig;
    Query         query = query_of(LAYERS[_i].with, 1, true);
    attention_rig_open(&LAYERS[_i].with, &rig);
    kvq_cache_layer layer = layer_of(rig, 1, 300, query);
    int             n_failed[2] = {0, 0};
    for (int what = 0; what < 2; what++) {
        kvq_status status = KVQ_ERR_INTERNAL;
        for (int64_t n = 0; status != KVQ_OK; n++) {
            Counted         memory = {what == 0 ? n : 1000000, 0};
            kvq_context     ctx = kvq_test_context();
            kvq_error       err = {};
            kvq_cuda_cache *cache = nullptr;
            char            calls[32];
            ctx.user = &memory, ctx.alloc = counted_alloc, ctx.release = counted_release;
            (void)snprintf(calls, sizeof calls, "%lld", what == 1 ? (long long)n + 2 : 1000000ll);
            (void)setenv("KVQ_SIMT_CALLS", calls, 1);
            CudaDevice device; // two calls
            status = kvq_cuda_cache_create(device.device, &ctx, &layer, &cache, &err);
            if (status == KVQ_OK) {
                kvq_cuda_cache_destroy(&cache);
            } else {
                n_failed[what]++;
                kvq_test_failed(status, what == 0 ? KVQ_ERR_MEMORY : KVQ_ERR_INTERNAL, &err,
                                what == 0 ? "" : "stopped working");
            }
            if (cache != nullptr || memory.live != 0) ck_abort_msg("%d blocks are left", (int)memory.live);
        }
    }
    ck_assert_int_gt(n_failed[0], 5);
    ck_assert_int_gt(n_failed[1], 15);
    attention_rig_close(&rig);
}
END_TEST

START_TEST(memory_of_the_device_runs_out) {
    attention_rig rig;
    kvq_error     err = {};
    attention_rig_open(&LAYERS[_i].with, &rig);
    kvq_cache_layer layer = layer_of(rig, 3, 100000, query_of(rig.with, 1, false));
    kvq_cuda_cache *cache = nullptr;
    (void)setenv("KVQ_SIMT_MEMORY", "4000000", 1);
    {
        CudaDevice device;
        kvq_test_failed(kvq_cuda_cache_create(device.device, &device.ctx, &layer, &cache, &err), KVQ_ERR_MEMORY, &err,
                        "pages of packed");
        layer.capacity = 1000;
        CudaCache fits(&device, layer);
        if (kvq_cuda_cache_held_bytes(fits.cache) > 4000000) ck_abort_msg("held");
    }
    attention_rig_close(&rig);
}
END_TEST

static const kvq_test_case cases[] = {
    KVQ_LOOP(bytes_are_those_of_the_cpu_after_every_piece, N_LAYERS),
    KVQ_LOOP(bytes_are_those_of_the_cpu_after_every_token, N_LAYERS),
    KVQ_LOOP(attention_is_within_the_bound, N_LOOKS),
    KVQ_LOOP(any_schedule_gives_the_same_bits, N_LAYERS),
    KVQ_LOOP(tokens_are_decoded_without_waiting, N_LAYERS),
    KVQ_LOOP(numbers_beyond_f16_are_named, N_LAYERS),
    KVQ_LOOP(what_is_no_number_is_named, N_LAYERS),
    KVQ_LOOP(what_does_not_fit_changes_nothing, N_LAYERS),
    KVQ_LOOP(pages_are_shared_and_used_again, N_LAYERS),
    KVQ_LOOP(layers_that_make_no_sense_are_refused, N_REFUSALS),
    KVQ_LOOP(every_failure_is_told, N_LAYERS),
    KVQ_LOOP(memory_of_the_device_runs_out, N_LAYERS),
};
KVQ_TEST_MAIN("test_cuda_cache", cases)
