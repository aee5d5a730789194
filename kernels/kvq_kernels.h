// SPDX-License-Identifier: Apache-2.0
//
// The compute operations of the model, the sweeps and the decoder behind one table. The CPU table (kernels/*_cpu.c) is
// the specification: plain C, one rule per operation. A device backend overrides entries and must agree with it.
//
// Memory: every `float *` argument is memory of the backend (from its alloc); callers pass it on and do offset
// arithmetic, but only upload and download move numbers between it and the host. Arguments marked `host` are ordinary
// memory. All matrices are row-major and dense. Every operation is deterministic: work is cut into fixed tiles, each
// computed by one thread, so the thread count never changes a bit.
#ifndef KVQ_KERNELS_H
#define KVQ_KERNELS_H

#include "kvq_block_hd.h"
#include "kvq_core.h"
#include "kvq_count_hd.h"
#include "kvq_device_cache.h"
#include "kvq_tile_hd.h"

#ifdef __cplusplus
extern "C" {
#endif

// The keys (and values) that query i reads from a second set: those from kvq_second_set_begin(i) on, the last `recent`
// ones and those behind the last whole tile of `tile`; queries before `prompt` read all from it. All 0: there is none.
typedef struct kvq_second_set {
    int64_t recent, tile, prompt;
} kvq_second_set;
KVQ_HD bool    kvq_second_set_used(const kvq_second_set *s) { return s->recent > 0 || s->tile > 0 || s->prompt > 0; }
KVQ_HD int64_t kvq_second_set_begin(const kvq_second_set *s, int64_t i) {
    int64_t begin = i < s->prompt || i < s->recent ? 0 : i + 1 - s->recent;
    int64_t open = s->tile > 0 ? (i + 1) / s->tile * s->tile : i + 1;
    return begin < open ? begin : open;
}

// Shape of one attention call over one window, causal: query i sees keys j with j <= i, and i - j < window if window >
// 0. Query head h reads KV head h / (n_heads / n_kv_heads). With a second set, query i reads the keys from
// kvq_second_set_begin(i) on, and their values, from that; there is one softmax over all.
typedef struct kvq_attention_shape {
    int64_t        n_tokens;            // S
    int            n_heads, n_kv_heads; // H, Hkv
    int            head_dim;            // D
    int64_t        window;              // 0 = unlimited
    float          scale;               // multiplies the scores, usually 1 / sqrt(D)
    float          softcap;             // scores become softcap * tanh(score / softcap); 0 = off
    kvq_second_set second;              // forward of one window only
} kvq_attention_shape;

// What a gated MLP does to its gate: silu(g) = g / (1 + exp(-g)); gelu(g) = g (1 + tanh(u)) / 2 with
// u = sqrt(2 / pi) (g + 0.044715 g^3), the approximation that gemma is trained with.
typedef enum kvq_gate_kind { KVQ_GATE_SILU, KVQ_GATE_GELU_TANH } kvq_gate_kind;

// Where a router sends m tokens; host memory. probability [m, E] is the softmax of the router's logits; expert [m, k]
// are the k most probable ones, most probable first, the lower index on a tie; weight [m, k] their probabilities,
// divided by their sum when normalize.
typedef struct kvq_route {
    int      n_experts, per_token; // E, k
    bool     normalize;
    float   *probability;
    int32_t *expert;
    float   *weight;
} kvq_route;

// What is compared per scored position by `compare`.
typedef struct kvq_position_score {
    double nll_a, nll_b; // -log p(target), nats, log-sum-exp in f64
    double kl;           // KL(a || b) in nats
    int    top_a, top_b; // token of the largest logit, the lowest id on a tie
    double confidence_a; // probability of top_a in a
    int    top5_common;  // how many of a's five largest logits (lower ids on ties) are among b's; all when n_vocab < 5
} kvq_position_score;

// How the rows of a tensor are counted for a fit, by the decoder's own rule. Host memory.
typedef struct kvq_count_rule {
    const kvq_block_spec *spec;    // levels are not used; as kvq_count_rows (codebook/) wants it
    int                   n_heads; // divides spec->d; each has counters of its own
    int64_t               n_skip;  // first rows, which are left out: sink tokens
    kvq_weighting_set     weightings;
} kvq_count_rule;

typedef struct kvq_backend kvq_backend;
struct kvq_backend {
    const char        *name;   // "cpu", "cuda"
    const char        *device; // what a person calls it: "this processor", "cuda:0, NVIDIA H200"
    const char        *matmul; // what decides the bits of `linear`: "onednn", "onednn-bf16", "cublas 13.2 sm_90" ..
    char               fallback[256]; // why "auto" took no faster device; empty when it was not asked, or took one
    int64_t            memory_bytes;  // what `alloc` can give at most; 0: it gives of the process's memory
    const kvq_context *ctx;           // borrowed for the life of the backend

    void (*destroy)(kvq_backend **be);

    // Waits for everything that was asked for and tells what has gone wrong since the backend was made. A device may
    // fail between two calls; from then on every number that comes from it is NaN, every index the first one, and this
    // says why. Asked for at the end of each pass over a layer and of each use of the head.
    kvq_status (*check)(const kvq_backend *be, kvq_error *err);

    // ---- memory
    kvq_status (*alloc)(const kvq_backend *be, int64_t n_floats, const char *what, float **out,
                        kvq_error *err); // zeroed
    void (*release)(const kvq_backend *be, float *p);
    void (*upload)(const kvq_backend *be, float *to, const float *host_from, int64_t n);
    void (*download)(const kvq_backend *be, float *host_to, const float *from, int64_t n);
    void (*copy)(const kvq_backend *be, float *to, const float *from, int64_t n);
    void (*zero)(const kvq_backend *be, float *x, int64_t n);
    void (*add)(const kvq_backend *be, float *y, const float *x, int64_t n); // y += x

    // ---- linear layers; w is [n_out, n_in] as checkpoints store it, in the backend's own form (f32, or bf16 when the
    // backend computes in it): sized, filled row by row, and used through these functions only.
    int64_t (*weights_floats)(const kvq_backend *be, int64_t n_out, int64_t n_in); // floats to alloc for one matrix
    // Rows [row, row + n_rows) of w, which may be used after `check`. Called from several threads for different rows,
    // also while another thread uses other memory of the backend; so are alloc, release and upload.
    void (*upload_weights)(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                           const float *host_from);
    // y [m, n_out] = x [m, n_in] w^T + bias [n_out] (NULL = none)
    void (*linear)(const kvq_backend *be, const float *x, const float *w, const float *bias, float *y, int64_t m,
                   int64_t n_out, int64_t n_in);
    // dx [m, n_in] (+)= dy [m, n_out] w; accumulate adds to what dx holds
    void (*linear_backward)(const kvq_backend *be, const float *dy, const float *w, float *dx, int64_t m, int64_t n_out,
                            int64_t n_in, bool accumulate);

    // ---- row operations
    // y [m, n] = x / sqrt(mean(x^2) + eps) * w [n]; the mean in f64 (Zhang and Sennrich 2019). y may be x.
    void (*rmsnorm)(const kvq_backend *be, const float *x, const float *w, float eps, float *y, int64_t m, int64_t n);
    // dx [m, n] += d loss / d x
    void (*rmsnorm_backward)(const kvq_backend *be, const float *x, const float *w, float eps, const float *dy,
                             float *dx, int64_t m, int64_t n);
    // Rotates x [m, n_heads, head_dim] in place: channels (i, i + rot/2) of a head by the angle whose cosine and sine
    // lie in cos_table, sin_table [m, rot/2], times scale; channels from rot on pass. direction -1 rotates back.
    void (*rope)(const kvq_backend *be, float *x, const float *cos_table, const float *sin_table, int direction,
                 float scale, int64_t m, int n_heads, int head_dim, int rot);
    // y [n] = activation(gate) * up; y may be gate or up
    void (*gated_mul)(const kvq_backend *be, kvq_gate_kind kind, const float *gate, const float *up, float *y,
                      int64_t n);
    // gate and up are replaced by their gradients
    void (*gated_mul_backward)(const kvq_backend *be, kvq_gate_kind kind, float *gate, float *up, const float *dy,
                               int64_t n);
    // x [n] = cap * tanh(x / cap)
    void (*softcap)(const kvq_backend *be, float cap, float *x, int64_t n);

    // ---- experts; x [m, n] are a router's inputs, w [E, n] its weights
    // Fills the arrays of `to`. Logits are summed and turned into probabilities in f64.
    void (*route)(const kvq_backend *be, const kvq_route *to, const float *x, const float *w, int64_t m, int64_t n);
    // dx [m, n] += d loss / d x, host_dweight [m, k] being d loss / d weight; which experts were chosen has no gradient
    void (*route_backward)(const kvq_backend *be, const kvq_route *from, const float *host_dweight, const float *w,
                           float *dx, int64_t m, int64_t n);
    // y [m, n]: row i is row host_rows[i] of x
    void (*gather_rows)(const kvq_backend *be, const float *x, const int32_t *host_rows, float *y, int64_t m,
                        int64_t n);
    // Row host_rows[i] of y += host_scales[i] * row i of x [m, n]; no row occurs twice.
    void (*scatter_rows)(const kvq_backend *be, const float *x, const int32_t *host_rows, const float *host_scales,
                         float *y, int64_t m, int64_t n);
    // host_out [m] = dot products of the rows of a and b [m, n], summed in f64
    void (*row_dots)(const kvq_backend *be, const float *a, const float *b, float *host_out, int64_t m, int64_t n);

    // ---- attention of one window; q, out [S, H, D], k, v [S, Hkv, D], all after RoPE
    // Scratch is found by *_scratch_floats and passed in; it belongs to the caller. What is enough for one shape is for
    // smaller windows and without a second set, and what is enough for backward is for any forward.
    int64_t (*attention_scratch_floats)(const kvq_backend *be, const kvq_attention_shape *shape, bool backward);
    // k_recent, v_recent: the second set; not read when shape->second is not used
    void (*attention)(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                      const float *v, const float *k_recent, const float *v_recent, float *out, float *scratch);
    // dq, dk, dv are overwritten; scores are recomputed from q and k. shape->second is not used.
    void (*attention_backward)(const kvq_backend *be, const kvq_attention_shape *shape, const float *q, const float *k,
                               const float *v, const float *out, const float *dout, float *dq, float *dk, float *dv,
                               float *scratch);
    // One new token for each of n_seqs sequences: q, out [n_seqs, H, D]; caches [n_seqs, capacity, Hkv, D] of which the
    // first n_past + 1 positions are valid (the new token's K and V already stored). scratch: [n_seqs * H, capacity]
    void (*attention_step)(const kvq_backend *be, const kvq_attention_shape *shape, int64_t n_seqs, int64_t n_past,
                           int64_t capacity, const float *q, const float *k_cache, const float *v_cache, float *out,
                           float *scratch);

    // ---- loss; logits [m, n_vocab], targets and results in host memory
    // nll[i] = log-sum-exp(logits[i]) - logits[i][target]; when scale != 0 the logits are replaced by the gradient of
    // scale * nll with respect to what `softcap` with this cap turned into them (0: with respect to themselves).
    // Log-sum-exp in f64.
    void (*cross_entropy)(const kvq_backend *be, float *logits, const int32_t *host_targets, int64_t m, int64_t n_vocab,
                          float cap, double scale, double *host_nll);
    void (*compare)(const kvq_backend *be, const float *logits_a, const float *logits_b, const int32_t *host_targets,
                    int64_t m, int64_t n_vocab, kvq_position_score *host_out);
    // Draws one token per row by inverse CDF of softmax(logits) at host_u[i] in [0, 1)
    void (*sample)(const kvq_backend *be, const float *logits, const double *host_u, int64_t m, int64_t n_vocab,
                   int32_t *host_ids);

    // ---- KV codec: `spec`, its tables and `rows` are host memory; x [m, d]
    // encode returns the index of the first row with a number that f16 cannot hold, or -1
    int64_t (*encode)(const kvq_backend *be, const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows);
    void (*decode)(const kvq_backend *be, const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x);

    // The channel-allocated codec (kvq_tile_hd.h), spec and tiles in host memory: x [n_tokens, d] are the tokens of
    // positions 0
    // .. n_tokens - 1 counted from the start of a tile. Those before `first` (sinks), 0 .. n_tokens, are not coded, in
    // whichever tile they lie, and decoding leaves their rows alone. tiles [ceil(n_tokens / KVQ_TILE_TOKENS),
    // kvq_tile_bytes]; the last one may be short. *bad = the first token with a number that f16 cannot hold (the tiles
    // are then unusable), or -1. KVQ_ERR_MEMORY when there is none for scratch; decoding needs none.
    kvq_status (*encode_tiles)(const kvq_backend *be, const kvq_tile_spec *spec, const float *x, int64_t first,
                               int64_t n_tokens, uint8_t *tiles, int64_t *bad, kvq_error *err);
    void (*decode_tiles)(const kvq_backend *be, const kvq_tile_spec *spec, const uint8_t *tiles, int64_t first,
                         int64_t n_tokens, float *x);

    // ---- numbers in f16 (to the nearest, ties to even), as caches keep what they do not code; x [n]
    // Returns the index of the first number that f16 cannot hold, the others being stored or not, or -1. host_to NULL:
    // they are only looked at.
    int64_t (*store_halves)(const kvq_backend *be, const float *x, int64_t n, uint16_t *host_to);
    void (*load_halves)(const kvq_backend *be, const uint16_t *host_from, int64_t n, float *x);
    void (*round_halves)(const kvq_backend *be, float *x, int64_t n); // too large becomes infinite

    // Index of the first element of x [n] that is NaN or infinite, or -1.
    int64_t (*find_nonfinite)(const kvq_backend *be, const float *x, int64_t n);

    // ---- counting for a fit; NULL, both, where numbers are in host memory anyway and codebook/count.c counts them
    // Adds rows [n_skip, m) of x [m, d], with the signed gradients [m, d] of the loss (NULL = none, squares are 0), to
    // `counters`: for each head a piece of kvq_counters_bytes, one behind the other, all zeros before the first call.
    // They hold the bytes of the histograms that kvq_count_rows fills from the same rows. scratch:
    // count_scratch_floats. Returns the index in x of the first element that cannot be counted, nothing of this call
    // having been added, or -1: one that is not finite, whose squared gradient is not, one of whose weights leaves the
    // range of the sums, or the first one of a token whose range leaves f16.
    int64_t (*count_scratch_floats)(const kvq_backend *be, int64_t m, int64_t d);
    int64_t (*count)(const kvq_backend *be, const kvq_count_rule *rule, const float *x, const float *gradients,
                     int64_t m, float *counters, float *scratch);

    // ---- packed caches that live in its memory; NULL: it has none
    const kvq_cache_functions *cache;
};

// Number type of the factors of linear layers. With bf16, weights are stored in it (rounded to nearest even; exact for
// checkpoints in bf16) and activations and gradients are rounded to it right before a product; sums, results and every
// other operation stay f32. Half the memory of weights and about twice the speed, at a relative error of up to 2^-8 per
// factor.
typedef enum kvq_compute { KVQ_COMPUTE_F32, KVQ_COMPUTE_BF16 } kvq_compute;
extern const char *const kvq_compute_names[]; // "f32", "bf16", NULL at the end

// The CPU backend. `ctx` is borrowed and must outlive it; release with be->destroy(&be). KVQ_ERR_UNSUPPORTED when bf16
// is asked of a processor without instructions for it, or of a build without oneDNN.
kvq_status kvq_backend_cpu(const kvq_context *ctx, kvq_compute compute, kvq_backend **out, kvq_error *err);
// Device `index` of CUDA (kernels/cuda). KVQ_ERR_UNSUPPORTED, with what to install, when this build has no CUDA or the
// machine no such device; KVQ_ERR_MEMORY. What one thread asks for happens in order; only what upload_weights says may
// be called while another thread uses the backend.
kvq_status kvq_backend_cuda(const kvq_context *ctx, int index, kvq_compute compute, kvq_backend **out, kvq_error *err);
// The backend of a device: "cpu", "cuda" (the first one), "cuda:N", or "auto": the first CUDA device when there is one,
// and otherwise the CPU, with the reason in `fallback`. KVQ_ERR_USAGE for any other word.
kvq_status kvq_backend_open(const kvq_context *ctx, const char *device, kvq_compute compute, kvq_backend **out,
                            kvq_error *err);

#ifdef __cplusplus
}
#endif
#endif
