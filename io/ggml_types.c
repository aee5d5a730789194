// SPDX-License-Identifier: Apache-2.0
//
// Expansion of the ggml block formats. A block holds a few scales and packed integers; the formulas below are in f32
// with one rounding per operation, in the order given, and equal ggml's reference bit for bit. Layouts are drawn in the
// order of the bytes; d and m are binary16. "lo" and "hi" are the halves of a byte.
#include <stddef.h>
#include <string.h>

#include "ggml_types.h"
#include "kvq_core.h"

#define SMALL 32  // values of a block of the first generation
#define SUPER 256 // values of a "K" block

static float load_half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return kvq_float_of_half(h);
}

static uint32_t load_u32(const uint8_t *p) {
    uint32_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

// ---------------------------------------------------------------- plain numbers

static void expand_f32(const uint8_t *in, int64_t n, float *out) { memcpy(out, in, (size_t)n * sizeof *out); }

static void expand_f16(const uint8_t *in, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = load_half(in + 2 * i);
}

static void expand_bf16(const uint8_t *in, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, sizeof h);
        out[i] = kvq_float_of_bf16(h);
    }
}

// ---------------------------------------------------------------- blocks of 32: x = q * d (+ m)

// | d | 16 bytes |: byte j holds values j (lo) and j + 16 (hi), shifted by 8.
static void expand_q4_0(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 18, out += SMALL) {
        float          d = load_half(in);
        const uint8_t *q = in + 2;
        for (int j = 0; j < 16; j++) {
            out[j] = (float)((q[j] & 15) - 8) * d;
            out[j + 16] = (float)((q[j] >> 4) - 8) * d;
        }
    }
}

// | d | m | 16 bytes |
static void expand_q4_1(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 20, out += SMALL) {
        float          d = load_half(in), m = load_half(in + 2);
        const uint8_t *q = in + 4;
        for (int j = 0; j < 16; j++) {
            out[j] = (float)(q[j] & 15) * d + m;
            out[j + 16] = (float)(q[j] >> 4) * d + m;
        }
    }
}

// | d | fifth bits of values 0..31 | 16 bytes |, shifted by 16.
static void expand_q5_0(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 22, out += SMALL) {
        float          d = load_half(in);
        uint32_t       fifth = load_u32(in + 2);
        const uint8_t *q = in + 6;
        for (int j = 0; j < 16; j++) {
            out[j] = (float)((q[j] & 15) + (int)((fifth >> j) & 1u) * 16 - 16) * d;
            out[j + 16] = (float)((q[j] >> 4) + (int)((fifth >> (j + 16)) & 1u) * 16 - 16) * d;
        }
    }
}

// | d | m | fifth bits | 16 bytes |
static void expand_q5_1(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 24, out += SMALL) {
        float          d = load_half(in), m = load_half(in + 2);
        uint32_t       fifth = load_u32(in + 4);
        const uint8_t *q = in + 8;
        for (int j = 0; j < 16; j++) {
            out[j] = (float)((q[j] & 15) + (int)((fifth >> j) & 1u) * 16) * d + m;
            out[j + 16] = (float)((q[j] >> 4) + (int)((fifth >> (j + 16)) & 1u) * 16) * d + m;
        }
    }
}

// | d | 32 signed bytes |
static void expand_q8_0(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 34, out += SMALL) {
        float         d = load_half(in);
        const int8_t *q = (const int8_t *)(in + 2);
        for (int j = 0; j < SMALL; j++) out[j] = (float)q[j] * d;
    }
}

// ---------------------------------------------------------------- blocks of 256: sub-blocks with small integer scales

// | 16 bytes: scale (lo), minimum (hi) of 16 sub-blocks | 64 bytes of 2 bits | d | m |, x = (d * scale) * q - m *
// minimum. The two bits of values 128 h + 32 s + i are bits 2s of byte 32 h + i.
static void expand_q2_k(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 84, out += SUPER) {
        float d = load_half(in + 80), m = load_half(in + 82);
        for (int sub = 0; sub < 16; sub++) {
            float          scale = d * (float)(in[sub] & 15), minimum = m * (float)(in[sub] >> 4);
            const uint8_t *q = in + 16 + sub / 8 * 32 + sub % 2 * 16;
            int            shift = sub % 8 / 2 * 2;
            for (int i = 0; i < 16; i++) out[sub * 16 + i] = scale * (float)((q[i] >> shift) & 3) - minimum;
        }
    }
}

// | 32 bytes: third bits, bit k for values 32 k + i | 64 bytes of 2 bits as in Q2_K | 12 bytes: 16 scales of 6 bits | d
// |, x = d * (scale - 32) * (q - 4), q of three bits. Low four bits of scale s: byte s % 8, lo then hi; high two bits:
// byte 8 + s % 4, bits 2 (s / 4).
static void expand_q3_k(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 110, out += SUPER) {
        const uint8_t *packed = in + 96;
        float          d = load_half(in + 108);
        for (int sub = 0; sub < 16; sub++) {
            int   low = (packed[sub % 8] >> (sub / 8 * 4)) & 15, high = (packed[8 + sub % 4] >> (sub / 4 * 2)) & 3;
            float scale = d * (float)((low | high << 4) - 32);
            const uint8_t *q = in + 32 + sub / 8 * 32 + sub % 2 * 16, *third = in + sub % 2 * 16;
            int            shift = sub % 8 / 2 * 2, plane = sub / 2;
            for (int i = 0; i < 16; i++) {
                int value = ((q[i] >> shift) & 3) + ((third[i] >> plane) & 1) * 4 - 4;
                out[sub * 16 + i] = scale * (float)value;
            }
        }
    }
}

// Scale and minimum of sub-block s = 0..7 from the 12 bytes that Q4_K and Q5_K share: six bits each; the first four
// pairs lie in the low six bits of bytes 0-3 and 4-7, the others in bytes 8-11 with their high bits on top of bytes
// 0-7.
static void unpack_scale_and_minimum(const uint8_t *packed, int s, int *scale, int *minimum) {
    if (s < 4) {
        *scale = packed[s] & 63;
        *minimum = packed[s + 4] & 63;
    } else {
        *scale = (packed[s + 4] & 15) | (packed[s - 4] >> 6) << 4;
        *minimum = (packed[s + 4] >> 4) | (packed[s] >> 6) << 4;
    }
}

// | d | m | 12 bytes of scales | 128 bytes |, x = (d * scale) * q - m * minimum; byte 32 p + i holds values 64 p + i
// (lo) and 64 p + 32 + i (hi).
static void expand_q4_k(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 144, out += SUPER) {
        float d = load_half(in), m = load_half(in + 2);
        for (int sub = 0; sub < 8; sub++) {
            int scale, minimum, shift = sub % 2 * 4;
            unpack_scale_and_minimum(in + 4, sub, &scale, &minimum);
            float          step = d * (float)scale, below = m * (float)minimum;
            const uint8_t *q = in + 16 + sub / 2 * 32;
            for (int i = 0; i < 32; i++) out[sub * 32 + i] = step * (float)((q[i] >> shift) & 15) - below;
        }
    }
}

// As Q4_K with 32 bytes between scales and values: bit s of byte i is the fifth bit of value 32 s + i.
static void expand_q5_k(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 176, out += SUPER) {
        float d = load_half(in), m = load_half(in + 2);
        for (int sub = 0; sub < 8; sub++) {
            int scale, minimum, shift = sub % 2 * 4;
            unpack_scale_and_minimum(in + 4, sub, &scale, &minimum);
            float          step = d * (float)scale, below = m * (float)minimum;
            const uint8_t *fifth = in + 16, *q = in + 48 + sub / 2 * 32;
            for (int i = 0; i < 32; i++) {
                int value = ((q[i] >> shift) & 15) + ((fifth[i] >> sub) & 1) * 16;
                out[sub * 32 + i] = step * (float)value - below;
            }
        }
    }
}

// | 128 bytes: low four bits | 64 bytes: high two bits | 16 signed scales | d |, x = (d * scale) * (q - 32). In each
// half of 128 values, run r = 0..3 of 32: low bits in byte 32 (r % 2) + i (lo for r < 2, else hi), high bits 2 r of
// byte i.
static void expand_q6_k(const uint8_t *in, int64_t n_blocks, float *out) {
    for (int64_t b = 0; b < n_blocks; b++, in += 210, out += SUPER) {
        const int8_t *scales = (const int8_t *)(in + 192);
        float         d = load_half(in + 208);
        for (int sub = 0; sub < 16; sub++) {
            int            half = sub / 8, run = sub % 8 / 2, at = sub % 2 * 16;
            const uint8_t *low = in + half * 64 + run % 2 * 32 + at, *high = in + 128 + half * 32 + at;
            float          scale = d * (float)scales[sub];
            for (int i = 0; i < 16; i++) {
                int value = ((low[i] >> (run / 2 * 4)) & 15) | ((high[i] >> (run * 2)) & 3) << 4;
                out[sub * 16 + i] = scale * (float)(value - 32);
            }
        }
    }
}

// ---------------------------------------------------------------- the list

static const ggml_type TYPES[] = {
    {GGML_F32, "F32", 1, 4, expand_f32},    {GGML_F16, "F16", 1, 2, expand_f16},
    {2, "Q4_0", SMALL, 18, expand_q4_0},    {3, "Q4_1", SMALL, 20, expand_q4_1},
    {6, "Q5_0", SMALL, 22, expand_q5_0},    {7, "Q5_1", SMALL, 24, expand_q5_1},
    {8, "Q8_0", SMALL, 34, expand_q8_0},    {10, "Q2_K", SUPER, 84, expand_q2_k},
    {11, "Q3_K", SUPER, 110, expand_q3_k},  {12, "Q4_K", SUPER, 144, expand_q4_k},
    {13, "Q5_K", SUPER, 176, expand_q5_k},  {14, "Q6_K", SUPER, 210, expand_q6_k},
    {GGML_BF16, "BF16", 1, 2, expand_bf16},
};

const ggml_type *ggml_type_find(uint32_t number) {
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++) {
        if (TYPES[i].number == number) return &TYPES[i];
    }
    return NULL;
}

// Names of the types that can occur but cannot be expanded, for messages; by number, NULL where the number was retired.
static const char *const OTHER_NAMES[] = {
    [9] = "Q8_1",   [15] = "Q8_K",   [16] = "IQ2_XXS", [17] = "IQ2_XS", [18] = "IQ3_XXS",
    [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",   [22] = "IQ2_S",  [23] = "IQ4_XS",
    [24] = "I8",    [25] = "I16",    [26] = "I32",     [27] = "I64",    [28] = "F64",
    [29] = "IQ1_M", [34] = "TQ1_0",  [35] = "TQ2_0",   [39] = "MXFP4",
};

const char *ggml_type_name(uint32_t number) {
    const ggml_type *type = ggml_type_find(number);
    if (type != NULL) return type->name;
    bool listed = number < sizeof OTHER_NAMES / sizeof *OTHER_NAMES && OTHER_NAMES[number] != NULL;
    return listed ? OTHER_NAMES[number] : "unknown";
}
