// SPDX-License-Identifier: Apache-2.0
//
// Tiles of kvq_tile_hd.h on the device: codes and scales of keys and of values, and back. Outliers of keys, which are
// chosen among all tokens of a tile, are coded in tile_outliers.cu. Arithmetic, and the order of every sum, is the
// header's; what is here is who does it.
//
// Keys: a block has up to 32 channels of a head and all tokens, turned over in shared memory, so that lanes are
// channels towards x and tokens towards the planes. Values: a block has a head of 16 tokens, and a thread one channel
// of all of them, for each sum of the rotation must run over a head in its order.
#include "tiles_impl.cuh"

enum {
    KEY_CHANNELS = 32,
    KEY_ROW = KVQ_TILE_TOKENS + 1,  // a channel in shared memory; odd, so that 32 channels of a token lie in 32 banks
    VALUE_ROW = KVQ_TILE_LANES + 4, // the same of values: a multiple of 4, to be read by vectors
};

// ---------------------------------------------------------------- codes in planes

// Stores the codes of eight tokens in all planes of a column, bytes whole. For whole warps: each eight lanes may have a
// column and tokens of their own, or none (column < 0).
KVQ_DEVICE void put_codes(const TileSpec &s, KVQ_GLOBAL(uint8_t) tile, int column, int token, unsigned code) {
    int byte = (int)threadIdx.x % 8, shift = 0;
    KVQ_UNROLL
    for (int k = 0; k < KVQ_N_PLANES; k++) {
        int bits = 8 >> k, at = column >= 0 ? (int)s.planes[column * KVQ_N_PLANES + k] : -1;
        if (__any_sync((unsigned)ALL_LANES, at >= 0) == 0) continue;
        unsigned long long joined = join_eight(at >= 0 ? code >> shift & ((1u << bits) - 1u) : 0u, bits);
        if (at < 0) continue;
        shift += bits;
        if (byte < bits) tile[at + token / 8 * bits + byte] = byte_of(joined, byte);
    }
}

// The code of one token.
KVQ_DEVICE int get_code(const TileSpec &s, KVQ_GLOBAL(const uint8_t) tile, int column, int token) {
    unsigned code = 0;
    int      shift = 0;
    KVQ_UNROLL
    for (int k = 0; k < KVQ_N_PLANES; k++) {
        int bits = 8 >> k, at = s.planes[column * KVQ_N_PLANES + k], bit = token * bits;
        if (at < 0) continue;
        code |= ((unsigned)tile[at + (bit >> 3)] >> (bit & 7) & ((1u << bits) - 1u)) << shift;
        shift += bits;
    }
    return (int)code;
}

// ---------------------------------------------------------------- keys

// What a block of keys works on: channels [channel, channel + n) of the head, which are a part of it.
struct KeyPart {
    int     head, within, channel, n; // within: channels of the head before
    int64_t start;                    // token
};

KVQ_DEVICE KeyPart key_part(const TileSpec &s) {
    int parts = (s.head_dim + KEY_CHANNELS - 1) / KEY_CHANNELS, head = (int)blockIdx.y / parts;
    int within = (int)blockIdx.y % parts * KEY_CHANNELS, left = s.head_dim - within;
    return {head, within, head * s.head_dim + within, left < KEY_CHANNELS ? left : KEY_CHANNELS,
            (int64_t)blockIdx.x * KVQ_TILE_TOKENS};
}

KVQ_KERNEL KVQ_BOUNDS(KVQ_TILE_TOKENS, MIN_BLOCKS)
    encode_keys(TileSpec s, Tokens tokens, KVQ_GLOBAL(const float) x, KVQ_GLOBAL(uint8_t) tiles) {
    KVQ_SHARED(float, turned, KEY_CHANNELS *KEY_ROW);
    KeyPart part = key_part(s);
    int     lane = lane_of_thread(), t = (int)threadIdx.x;
    for (int row = t / 32; row < KVQ_TILE_TOKENS; row += KVQ_TILE_TOKENS / 32) {
        int64_t token = part.start + row;
        if (lane < part.n && is_coded(tokens, token))
            turned[lane * KEY_ROW + row] = x[token * s.d + part.channel + lane];
    }
    __syncthreads();
    KVQ_GLOBAL(uint8_t) tile = tiles + (ptrdiff_t)blockIdx.x * s.tile_bytes;
    bool coded = is_coded(tokens, part.start + t);
    for (int k = 0; k < part.n; k++) {
        int c = part.channel + k, code = 0;
        if (s.widths[c] == 0) continue; // of all lanes
        if (coded) code = code_of_key(s, turned[k * KEY_ROW + t], c);
        put_codes(s, tile, c, t, (unsigned)code);
    }
}

// Adds the residuals of a head that are for this part of it.
KVQ_DEVICE void add_outliers(const TileSpec &s, KVQ_GLOBAL(const uint8_t) tile, const KeyPart &part,
                             KVQ_SHARED_PTR(float) turned) {
    auto counts = kvq_as<uint16_t>(tile + s.code_bytes);
    auto entries = kvq_as<uint32_t>(tile + (s.code_bytes + s.count_bytes));
    int  first = 0;
    for (int head = 0; head < part.head; head++) first += (int)counts[head];
    for (int i = first + (int)threadIdx.x; i < first + (int)counts[part.head]; i += KVQ_TILE_TOKENS) {
        uint32_t entry = entries[i];
        int      t = (int)(entry & 0xffffu) >> 9, k = (int)(entry & 511u) - part.within;
        if (k >= 0 && k < part.n) turned[k * KEY_ROW + t] += kvq_float_of_half((uint16_t)(entry >> 16));
    }
}

KVQ_KERNEL KVQ_BOUNDS(KVQ_TILE_TOKENS, MIN_BLOCKS)
    decode_keys(TileSpec s, Tokens tokens, KVQ_GLOBAL(const uint8_t) tiles, KVQ_GLOBAL(float) x) {
    KVQ_SHARED(float, turned, KEY_CHANNELS *KEY_ROW);
    KVQ_GLOBAL(const uint8_t) tile = tiles + (ptrdiff_t)blockIdx.x * s.tile_bytes;
    KeyPart part = key_part(s);
    int     lane = lane_of_thread(), t = (int)threadIdx.x;
    for (int k = 0; k < part.n; k++) {
        int c = part.channel + k;
        turned[k * KEY_ROW + t] = decoded_key(s, get_code(s, tile, c, t), c);
    }
    __syncthreads();
    if (s.n_slots > 0) add_outliers(s, tile, part, turned);
    __syncthreads();
    for (int row = t / 32; row < KVQ_TILE_TOKENS; row += KVQ_TILE_TOKENS / 32) {
        int64_t token = part.start + row;
        if (lane < part.n && is_coded(tokens, token))
            x[token * s.d + part.channel + lane] = turned[lane * KEY_ROW + row];
    }
}

// ---------------------------------------------------------------- values

// What a block of values works on: one head of tokens [token, token + KVQ_TILE_LANES) of a tile that begins at `start`.
struct ValuePart {
    int     head, token;
    int64_t tile, start;
};

KVQ_DEVICE ValuePart value_part() {
    enum { PARTS = KVQ_TILE_TOKENS / KVQ_TILE_LANES };
    int64_t tile = (int64_t)(blockIdx.x / PARTS);
    return {(int)blockIdx.y, (int)(blockIdx.x % PARTS) * KVQ_TILE_LANES, tile, tile * KVQ_TILE_TOKENS};
}

// Whether any token of the part is coded; all threads find the same.
KVQ_DEVICE bool has_coded(const Tokens &tokens, const ValuePart &part) {
    int64_t token = part.start + part.token;
    return token + KVQ_TILE_LANES > tokens.first && token < tokens.end;
}

// sums[t] = sum over b of m[b][i] * y[b][t], in the order of b from 0 on: row i of the transpose of m times the vectors
// of all tokens. y [n, VALUE_ROW] in shared memory; all threads read the same of it.
KVQ_DEVICE void rotate(KVQ_GLOBAL(const float) m, int n, int i, KVQ_SHARED_PTR(const float) y,
                       float sums[KVQ_TILE_LANES]) {
    KVQ_UNROLL
    for (int t = 0; t < KVQ_TILE_LANES; t++) sums[t] = 0;
    for (int b = 0; b < n; b++) {
        float a = m[b * n + i];
        KVQ_UNROLL
        for (int t = 0; t < KVQ_TILE_LANES; t += 4) {
            float4 four = kvq_as<float4>(y)[(b * VALUE_ROW + t) / 4];
            sums[t] += a * four.x;
            sums[t + 1] += a * four.y;
            sums[t + 2] += a * four.z;
            sums[t + 3] += a * four.w;
        }
    }
}

// y = R x of the part, in place of x. For the whole block; no barrier follows.
KVQ_DEVICE void rotate_in_place(const TileSpec &s, KVQ_SHARED_PTR(float) y) {
    int   i = (int)threadIdx.x;
    float sums[KVQ_TILE_LANES];
    __syncthreads();
    if (i < s.head_dim) rotate(s.rotation_t, s.head_dim, i, y, sums);
    __syncthreads();
    if (i < s.head_dim) {
        KVQ_UNROLL
        for (int t = 0; t < KVQ_TILE_LANES; t++) y[i * VALUE_ROW + t] = sums[t];
    }
}

// Scales of the part, by a thread for each token: stored and, as they are stored, in `scales`. A token that is not
// coded has zeros in y, and so a scale of 0.
KVQ_DEVICE void find_scales(const TileSpec &s, const ValuePart &part, KVQ_GLOBAL(uint8_t) tile,
                            KVQ_SHARED_PTR(const float) y, KVQ_SHARED_PTR(float) scales,
                            KVQ_GLOBAL_ALIASED(int) first_bad) {
    int      t = (int)threadIdx.x, at = part.head * KVQ_TILE_TOKENS + part.token + t;
    float    squares = 0, scale;
    uint16_t code;
    if (t >= KVQ_TILE_LANES) return;
    for (int i = 0; i < s.head_dim; i++) {
        float yi = y[i * VALUE_ROW + t];
        squares += yi * yi;
    }
    kvq_tile_spec form = scale_form(s);
    int           fits = kvq_tile_find_scale(&form, squares, &code, &scale);
    scales[t] = scale;

    if (s.scale_format == KVQ_SCALE_F16)
        kvq_as<uint16_t>(tile + s.code_bytes)[at] = code;
    else
        tile[s.code_bytes + at] = (uint8_t)code;
    if (fits == 0) atomicMin(first_bad, (int)(part.start + part.token + t));
}

// Index of the nearest of n level vectors by dx^2 + dy^2 (y = 0 where dim is 1), the lower one on a tie.
KVQ_DEVICE int nearest_vector(const float *levels, int dim, int n, float x, float y) {
    float distance = HUGE_VALF;
    int   best = 0;
    for (int i = 0; i < n; i++) {
        float dx = x - levels[i * dim], dy = dim == 2 ? y - levels[i * dim + 1] : 0.0f, next = dx * dx + dy * dy;
        best = next < distance ? i : best;
        distance = next < distance ? next : distance;
    }
    return best;
}

// Codes of all columns of the head: each eight lanes take eight tokens of a column, half of the part.
KVQ_DEVICE void store_value_codes(const TileSpec &s, const Tokens &tokens, const ValuePart &part,
                                  KVQ_GLOBAL(uint8_t) tile, KVQ_SHARED_PTR(const float) y,
                                  KVQ_SHARED_PTR(const float) scales) {
    int thread = (int)threadIdx.x, per_head = s.head_dim / s.dim, n = per_head * KVQ_TILE_LANES;
    for (int from = thread - thread % 32; from < n; from += (int)blockDim.x) { // whole warps
        int item = from + thread % 32, within = item / KVQ_TILE_LANES, t = item % KVQ_TILE_LANES, code = 0;
        int column = item < n ? part.head * per_head + within : -1;
        if (column >= 0 && is_coded(tokens, part.start + part.token + t)) {
            int          width = s.widths[column];
            const float *levels = kvq_raw(s.levels + (ptrdiff_t)s.table[column] * s.dim, s.dim << width);
            float        scale = scales[t], xs = kvq_tile_unscale(y[within * s.dim * VALUE_ROW + t], scale), ys = 0;
            if (s.dim == 2) ys = kvq_tile_unscale(y[(within * 2 + 1) * VALUE_ROW + t], scale);
            code = nearest_vector(levels, s.dim, 1 << width, xs, ys);
        }
        put_codes(s, tile, column, part.token + t, (unsigned)code);
    }
}

KVQ_KERNEL KVQ_BOUNDS(KVQ_TILE_MAX_HEAD_DIM, MIN_BLOCKS)
    encode_values(TileSpec s, Tokens tokens, KVQ_GLOBAL(const float) x, KVQ_GLOBAL(uint8_t) tiles,
                  KVQ_GLOBAL_ALIASED(int) first_bad) {
    KVQ_DYNAMIC_SHARED(float, y);
    KVQ_SHARED(float, scales, KVQ_TILE_LANES);
    ValuePart part = value_part();
    KVQ_GLOBAL(uint8_t) tile = tiles + (ptrdiff_t)part.tile * s.tile_bytes;
    int j = (int)threadIdx.x;
    for (int t = 0; t < KVQ_TILE_LANES && j < s.head_dim; t++) {
        int64_t token = part.start + part.token + t;
        y[j * VALUE_ROW + t] = is_coded(tokens, token) ? (float)x[token * s.d + part.head * s.head_dim + j] : 0.0f;
    }
    if (has_coded(tokens, part)) rotate_in_place(s, y); // otherwise zeros
    __syncthreads();
    find_scales(s, part, tile, y, scales, first_bad);
    __syncthreads();
    store_value_codes(s, tokens, part, tile, y, scales);
}

// Level vectors times scales of the part.
KVQ_DEVICE void expand_values(const TileSpec &s, const ValuePart &part, KVQ_GLOBAL(const uint8_t) tile,
                              KVQ_SHARED_PTR(const float) scales, KVQ_SHARED_PTR(float) y) {
    int per_head = s.head_dim / s.dim, n = per_head * KVQ_TILE_LANES;
    for (int item = (int)threadIdx.x; item < n; item += (int)blockDim.x) {
        int within = item / KVQ_TILE_LANES, t = item % KVQ_TILE_LANES, column = part.head * per_head + within;
        int code = get_code(s, tile, column, part.token + t);
        for (int k = 0; k < s.dim; k++) {
            float level = s.levels[((ptrdiff_t)s.table[column] + code) * s.dim + k];
            y[(within * s.dim + k) * VALUE_ROW + t] = scales[t] * level;
        }
    }
}

KVQ_KERNEL KVQ_BOUNDS(KVQ_TILE_MAX_HEAD_DIM, MIN_BLOCKS)
    decode_values(TileSpec s, Tokens tokens, KVQ_GLOBAL(const uint8_t) tiles, KVQ_GLOBAL(float) x) {
    KVQ_DYNAMIC_SHARED(float, y);
    KVQ_SHARED(float, scales, KVQ_TILE_LANES);
    ValuePart part = value_part();
    KVQ_GLOBAL(const uint8_t) tile = tiles + (ptrdiff_t)part.tile * s.tile_bytes;
    int   j = (int)threadIdx.x, at = part.head * KVQ_TILE_TOKENS + part.token + j;
    float sums[KVQ_TILE_LANES];
    if (!has_coded(tokens, part)) return; // all threads
    if (j < KVQ_TILE_LANES) {
        kvq_tile_spec form = scale_form(s);
        bool          wide = s.scale_format == KVQ_SCALE_F16;
        uint16_t code = wide ? (uint16_t)kvq_as<uint16_t>(tile + s.code_bytes)[at] : (uint16_t)tile[s.code_bytes + at];
        scales[j] = kvq_tile_scale_of_code(&form, code);
    }
    __syncthreads();
    expand_values(s, part, tile, scales, y);
    __syncthreads();
    if (j >= s.head_dim) return;
    rotate(s.rotation, s.head_dim, j, y, sums);
    KVQ_UNROLL
    for (int t = 0; t < KVQ_TILE_LANES; t++) {
        int64_t token = part.start + part.token + t;
        if (is_coded(tokens, token)) x[token * s.d + part.head * s.head_dim + j] = sums[t];
    }
}

// ---------------------------------------------------------------- host

static kvq_status check_tiles(const uint8_t *tiles, int64_t first, int64_t n_tokens, kvq_error *err) {
    if (n_tokens < 0 || n_tokens > INT32_MAX - KVQ_TILE_TOKENS || first < 0 || first > n_tokens)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "tokens %lld .. %lld at once, not 0 .. 2^31 - 129", (long long)first,
                        (long long)n_tokens);
    if (reinterpret_cast<uintptr_t>(tiles) % 4 != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "tiles in device memory do not begin at a multiple of 4");
    return KVQ_OK;
}

static dim3 grid_of_keys(const TileSpec &s, unsigned n_tiles) {
    int parts = (s.head_dim + KEY_CHANNELS - 1) / KEY_CHANNELS;
    return dim3(n_tiles, (unsigned)(s.d / s.head_dim * parts));
}

static dim3 grid_of_values(const TileSpec &s, unsigned n_tiles) {
    return dim3(n_tiles * (KVQ_TILE_TOKENS / KVQ_TILE_LANES), (unsigned)(s.d / s.head_dim));
}

static size_t shared_of_values(const TileSpec &s) { return (size_t)s.head_dim * VALUE_ROW * sizeof(float); }

kvq_status kvq_cuda_encode_tiles(const kvq_cuda_tiles *spec, const float *x, int64_t first, int64_t n_tokens,
                                 uint8_t *tiles, void *scratch, int *first_bad, void *stream, kvq_error *err) {
    kvq_status status = check_tiles(tiles, first, n_tokens, err);
    if (status != KVQ_OK || n_tokens == 0) return status;
    if (reinterpret_cast<uintptr_t>(scratch) % 8 != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "scratch in device memory does not begin at a multiple of 8");
    TileSpec s = tile_spec(spec);
    Tokens   tokens = {first, n_tokens};
    unsigned n_tiles = (unsigned)((n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS);
    if (spec->spec.r == NULL) {
        KVQ_LAUNCH(encode_values, grid_of_values(s, n_tiles), round_up(s.head_dim, 32), shared_of_values(s),
                   op_stream(stream), s, tokens, x, tiles, first_bad);
        return op_launched("a kernel of the codec", err);
    }
    KVQ_LAUNCH(encode_keys, grid_of_keys(s, n_tiles), KVQ_TILE_TOKENS, 0, op_stream(stream), s, tokens, x, tiles);
    status = op_launched("a kernel of the codec", err);
    if (status != KVQ_OK || s.n_slots == 0) return status;
    return kvq_cuda_encode_outliers(&spec->spec, s, tokens, x, tiles, scratch, first_bad, op_stream(stream), err);
}

kvq_status kvq_cuda_decode_tiles(const kvq_cuda_tiles *spec, const uint8_t *tiles, int64_t first, int64_t n_tokens,
                                 float *x, void *stream, kvq_error *err) {
    kvq_status status = check_tiles(tiles, first, n_tokens, err);
    if (status != KVQ_OK || n_tokens == 0) return status;
    TileSpec s = tile_spec(spec);
    Tokens   tokens = {first, n_tokens};
    unsigned n_tiles = (unsigned)((n_tokens + KVQ_TILE_TOKENS - 1) / KVQ_TILE_TOKENS);
    if (spec->spec.r != NULL)
        KVQ_LAUNCH(decode_keys, grid_of_keys(s, n_tiles), KVQ_TILE_TOKENS, 0, op_stream(stream), s, tokens, tiles, x);
    else
        KVQ_LAUNCH(decode_values, grid_of_values(s, n_tiles), round_up(s.head_dim, 32), shared_of_values(s),
                   op_stream(stream), s, tokens, tiles, x);
    return op_launched("a kernel of the codec", err);
}
