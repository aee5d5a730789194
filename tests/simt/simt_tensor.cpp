// SPDX-License-Identifier: Apache-2.0
// Matrices that lie in the registers of a warp; see simt_tensor.h.
#include "simt_tensor.h"

#include "kvq_hd.h"

namespace simt {

enum { ALL_LANES = 32 };
static const unsigned all_lanes = 0xffffffffu;

static uint16_t half_of(unsigned r, int which) { return static_cast<uint16_t>(r >> 16 * which); }

struct Mma {
    float          *d;
    const unsigned *a, *b;
};

// Registers hold elements of (rows g and g + 8) x (columns 2 t, 2 t + 1 and those 8 further): a[h + 2 k] of row half h
// and column half k; b[k] of rows 2 t + 8 k, column g.
static void multiply(void **lanes, unsigned) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < ALL_LANES; lane++) {
        const Mma *m = static_cast<Mma *>(lanes[lane]);
        int        g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) {
            for (int i = 0; i < 2; i++) {
                int k = 2 * t + i;
                a[g + r % 2 * 8][k + r / 2 * 8] = static_cast<double>(kvq_float_of_half(half_of(m->a[r], i)));
                if (r < 2) b[k + r * 8][g] = static_cast<double>(kvq_float_of_half(half_of(m->b[r], i)));
            }
        }
    }
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            float *d = static_cast<Mma *>(lanes[i % 8 * 4 + j / 2])->d + i / 8 * 2 + j % 2;
            double sum = static_cast<double>(*d);
            for (int k = 0; k < 16; k++) sum += a[i][k] * b[k][j];
            *d = static_cast<float>(sum);
        }
    }
}

void mma_m16n8k16(float d[4], const unsigned a[4], const unsigned b[2], Place at) {
    Mma m = {d, a, b};
    sync_lanes("mma", all_lanes, &m, multiply, at);
}

struct Load {
    int             n;
    bool            transposed;
    unsigned       *r;
    const uint16_t *row;
};

// Row i of matrix m came from lane 8 m + i.
static void distribute(void **lanes, unsigned) {
    for (int lane = 0; lane < ALL_LANES; lane++) {
        Load *to = static_cast<Load *>(lanes[lane]);
        for (int m = 0; m < to->n; m++) {
            unsigned value = 0;
            for (int k = 0; k < 2; k++) {
                int row = lane / 4, column = lane % 4 * 2 + k;
                if (to->transposed) row = column, column = lane / 4;
                value |= static_cast<unsigned>(static_cast<Load *>(lanes[8 * m + row])->row[column]) << 16 * k;
            }
            to->r[m] = value;
        }
    }
}

void load_matrices(int n, bool transposed, unsigned *r, const uint16_t row[8], Place at) {
    Load load = {n, transposed, r, row};
    sync_lanes("ldmatrix", all_lanes, &load, distribute, at);
}

static void transpose(void **lanes, unsigned) {
    unsigned result[ALL_LANES];
    for (int lane = 0; lane < ALL_LANES; lane++) {
        result[lane] = 0;
        for (int k = 0; k < 2; k++) {
            int row = lane % 4 * 2 + k, column = lane / 4;
            result[lane] |=
                static_cast<unsigned>(half_of(*static_cast<unsigned *>(lanes[row * 4 + column / 2]), column % 2))
                << 16 * k;
        }
    }
    for (int lane = 0; lane < ALL_LANES; lane++) *static_cast<unsigned *>(lanes[lane]) = result[lane];
}

unsigned transpose_matrix(unsigned r, Place at) {
    sync_lanes("movmatrix", all_lanes, &r, transpose, at);
    return r;
}

} // namespace simt
