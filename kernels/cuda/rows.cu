// SPDX-License-Identifier: Apache-2.0
//
// Rows of kvq_block_hd.h on the device: one thread block codes one token. Arithmetic is the header's own; what is here
// is who does it, and the selection that the header does one element after the other.
#include "row_ranges.cuh"

enum { ROW_THREADS = 256 };

// A kvq_block_spec in words of the device.
struct RowSpec {
    int d, bits, n_side, width, code_bytes, row_bytes, clamp_zero; // width: channels of a table
    KVQ_GLOBAL(const float) levels;
    KVQ_GLOBAL(const float) decoded;
    KVQ_GLOBAL(const float) z;
    KVQ_GLOBAL(const float) r;
    KVQ_GLOBAL(const float) grid_z;
};

// The table of channel c in one of the two sets of tables.
KVQ_DEVICE const float *table_of(const RowSpec &s, KVQ_GLOBAL(const float) tables, int c) {
    int n = 1 << s.bits;
    return kvq_raw(tables + (ptrdiff_t)(c / s.width) * n, n);
}

KVQ_DEVICE int code_of(const RowSpec &s, float x, Range range, int c) {
    const float *levels = table_of(s, s.levels, c);
    return kvq_block_nearest(kvq_block_normalise(x, range.z, range.r, levels[0]), levels, 1 << s.bits);
}

KVQ_DEVICE float decoded_of(const RowSpec &s, int code, Range range, int c) {
    return table_of(s, s.decoded, c)[code] * range.r + range.z;
}

// ---------------------------------------------------------------- encoding

// Nothing to find in a K row; returns 1.
KVQ_DEVICE int find_range(const RowSpec &, FixedRanges *, const Chosen &, KVQ_GLOBAL(uint8_t)) { return 1; }

// Stores the range of a V row in front of its outliers. Returns 0 when it does not fit into f16.
KVQ_DEVICE int find_range(const RowSpec &s, TokenRange *row, const Chosen &chosen, KVQ_GLOBAL(uint8_t) stored) {
    HalfRange range = find_token_range(row, chosen, s.clamp_zero, s.bits);
    if (threadIdx.x == 0) kvq_as<uint32_t>(stored)[0] = (uint32_t)range.z | (uint32_t)range.r << 16;
    return fits_halves(range);
}

// Codes of all channels, 32 of them by a warp at a time.
template <typename Row> KVQ_DEVICE void store_codes(const RowSpec &s, const Row &row, KVQ_GLOBAL(uint8_t) codes) {
    int lane = lane_of_thread(), byte = lane % 8;
    for (int from = (int)threadIdx.x - lane; from < s.d; from += (int)blockDim.x) {
        int c = from + lane, at = c / 8 * s.bits + byte, code = 0;
        if (c < s.d) code = code_of(s, row.keys.x[c], range_of(row, c), c);
        unsigned long long joined = join_eight((unsigned)code, s.bits);
        if (byte < s.bits && at < s.code_bytes) codes[at] = byte_of(joined, byte);
    }
}

// Slots of both sides, each thread some of them. Returns 0 when a residual does not fit into f16.
template <typename Row>
KVQ_DEVICE int store_outliers(const RowSpec &s, const Row &row, const Chosen &chosen, KVQ_GLOBAL(uint8_t) slots) {
    int finite = 1;
    for (int i = (int)threadIdx.x; i < 2 * s.n_side; i += (int)blockDim.x) {
        int      side = i < s.n_side ? UPPER : LOWER, first = side * s.n_side, n = (int)chosen.n[side], at = i;
        uint32_t channel = KVQ_NO_CHANNEL, residual = 0;
        if (i - first < n) {
            select_key key = chosen.list[i];
            int        c = channel_of_key(row.keys, side, key);
            Range      range = range_of(row, c);
            float      x = row.keys.x[c];
            channel = (uint32_t)c;
            residual = kvq_half_of_float(x - decoded_of(s, code_of(s, x, range, c), range, c));
            if (!kvq_half_is_finite((uint16_t)residual)) finite = 0;
            at = first + rank_of_key(chosen.list + first, n, key);
        }
        kvq_as<uint32_t>(slots)[at] = channel | residual << 16;
    }
    return finite;
}

template <typename Row>
KVQ_DEVICE void encode_token(const RowSpec &s, Row row, KVQ_GLOBAL(uint8_t) out, KVQ_GLOBAL_ALIASED(int) first_bad) {
    KVQ_DYNAMIC_SHARED(select_key, list);
    KVQ_SHARED(unsigned, n_chosen, 2);
    KVQ_SHARED(select_key, limit, 2);
    Chosen chosen = {list, n_chosen, limit};
    if (Row::HAS_LIMITS || s.n_side > 0) choose_outliers(row.keys, s.d, s.n_side, chosen);
    int finite = find_range(s, &row, chosen, out + s.code_bytes);
    store_codes(s, row, out);
    finite &= store_outliers(s, row, chosen, out + (s.row_bytes - 8 * s.n_side));
    if (finite == 0) atomicMin(first_bad, (int)blockIdx.x);
}

KVQ_KERNEL KVQ_BOUNDS(ROW_THREADS, MIN_BLOCKS)
    encode_key_rows(RowSpec s, KVQ_GLOBAL(const float) x, KVQ_GLOBAL(uint8_t) rows, KVQ_GLOBAL_ALIASED(int) first_bad) {
    FixedRanges row = {{x + (ptrdiff_t)blockIdx.x * s.d, s.z, s.r}, s.grid_z};
    encode_token(s, row, rows + (ptrdiff_t)blockIdx.x * s.row_bytes, first_bad);
}

KVQ_KERNEL KVQ_BOUNDS(ROW_THREADS, MIN_BLOCKS)
    encode_value_rows(RowSpec s, KVQ_GLOBAL(const float) x, KVQ_GLOBAL(uint8_t) rows,
                      KVQ_GLOBAL_ALIASED(int) first_bad) {
    TokenRange row = {{x + (ptrdiff_t)blockIdx.x * s.d}, {0, 0}};
    encode_token(s, row, rows + (ptrdiff_t)blockIdx.x * s.row_bytes, first_bad);
}

// ---------------------------------------------------------------- decoding

// All channels, then what outliers add: another thread's channel, hence the barrier.
template <typename Row>
KVQ_DEVICE void decode_token(const RowSpec &s, const Row &row, KVQ_GLOBAL(const uint8_t) coded, KVQ_GLOBAL(float) x) {
    const uint8_t *codes = kvq_raw(coded, s.code_bytes);
    for (int c = (int)threadIdx.x; c < s.d; c += (int)blockDim.x)
        x[c] = decoded_of(s, kvq_block_get_code(codes, c, s.bits), range_of(row, c), c);
    __syncthreads();
    auto slots = kvq_as<uint32_t>(coded + (s.row_bytes - 8 * s.n_side));
    for (int i = (int)threadIdx.x; i < 2 * s.n_side; i += (int)blockDim.x) {
        uint32_t slot = slots[i];
        int      c = (int)(slot & 0xffffu);
        if (c < s.d) x[c] += kvq_float_of_half((uint16_t)(slot >> 16));
    }
}

KVQ_KERNEL KVQ_BOUNDS(ROW_THREADS, MIN_BLOCKS)
    decode_key_rows(RowSpec s, KVQ_GLOBAL(const uint8_t) rows, KVQ_GLOBAL(float) x) {
    KVQ_GLOBAL(float) out = x + (ptrdiff_t)blockIdx.x * s.d;
    FixedRanges row = {{nullptr, s.z, s.r}, s.grid_z};
    decode_token(s, row, rows + (ptrdiff_t)blockIdx.x * s.row_bytes, out);
}

KVQ_KERNEL KVQ_BOUNDS(ROW_THREADS, MIN_BLOCKS)
    decode_value_rows(RowSpec s, KVQ_GLOBAL(const uint8_t) rows, KVQ_GLOBAL(float) x) {
    KVQ_GLOBAL(float) out = x + (ptrdiff_t)blockIdx.x * s.d;
    KVQ_GLOBAL(const uint8_t) row = rows + (ptrdiff_t)blockIdx.x * s.row_bytes;
    uint32_t   stored = kvq_as<uint32_t>(row + s.code_bytes)[0];
    TokenRange range = {{nullptr},
                        {kvq_float_of_half((uint16_t)(stored & 0xffffu)), kvq_float_of_half((uint16_t)(stored >> 16))}};
    decode_token(s, range, row, out);
}

// ---------------------------------------------------------------- host

static RowSpec row_spec(const kvq_block_spec *spec) {
    RowSpec s = {};
    s.d = spec->d;
    s.bits = spec->bits;
    s.n_side = spec->n_side;
    s.width = kvq_block_table_width(spec);
    s.code_bytes = kvq_block_code_bytes(spec->d, spec->bits);
    s.row_bytes = kvq_block_row_bytes(spec);
    s.clamp_zero = spec->clamp_zero;
    s.levels = spec->levels;
    s.decoded = kvq_block_decode_levels(spec);
    s.z = spec->z;
    s.r = spec->r;
    s.grid_z = spec->grid_z != NULL ? spec->grid_z : spec->z;
    return s;
}

// One token a block, and no more threads than channels.
static unsigned threads_of_row(int d) { return d < ROW_THREADS ? round_up(d, 32) : (unsigned)ROW_THREADS; }

static kvq_status check_rows(const uint8_t *rows, int64_t m, kvq_error *err) {
    if (m < 0 || m > INT32_MAX)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "%lld rows at once, not 0 .. 2^31 - 1", (long long)m);
    if (reinterpret_cast<uintptr_t>(rows) % 4 != 0)
        return kvq_fail(err, KVQ_ERR_USAGE, NULL, "rows in device memory do not begin at a multiple of 4");
    return KVQ_OK;
}

kvq_status kvq_cuda_encode_rows(const kvq_block_spec *spec, const float *x, int64_t m, uint8_t *rows, int *first_bad,
                                void *stream, kvq_error *err) {
    kvq_status status = check_rows(rows, m, err);
    if (status != KVQ_OK || m == 0) return status;
    RowSpec  s = row_spec(spec);
    unsigned grid = (unsigned)m, block = threads_of_row(s.d);
    size_t   list = 2 * (size_t)s.n_side * sizeof(select_key);
    if (spec->r != NULL)
        KVQ_LAUNCH(encode_key_rows, grid, block, list, op_stream(stream), s, x, rows, first_bad);
    else
        KVQ_LAUNCH(encode_value_rows, grid, block, list, op_stream(stream), s, x, rows, first_bad);
    return op_launched("a kernel of the codec", err);
}

kvq_status kvq_cuda_decode_rows(const kvq_block_spec *spec, const uint8_t *rows, int64_t m, float *x, void *stream,
                                kvq_error *err) {
    kvq_status status = check_rows(rows, m, err);
    if (status != KVQ_OK || m == 0) return status;
    RowSpec  s = row_spec(spec);
    unsigned grid = (unsigned)m, block = threads_of_row(s.d);
    if (spec->r != NULL)
        KVQ_LAUNCH(decode_key_rows, grid, block, 0, op_stream(stream), s, rows, x);
    else
        KVQ_LAUNCH(decode_value_rows, grid, block, 0, op_stream(stream), s, rows, x);
    return op_launched("a kernel of the codec", err);
}
