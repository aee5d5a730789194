// SPDX-License-Identifier: Apache-2.0
//
// The steps of a run as a list that is computed, not stored: which layer is passed how, and which hidden states must
// wait on disk for it. Keeping only every stride-th boundary trades disk for passing most layers forward once more
// (Chen et al., "Training deep nets with sublinear memory cost", 2016); the numbers stay the same to the last bit.
#include "calib_impl.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t n_groups(const step_plan *p) { return (p->n_layers + p->stride - 1) / p->stride; }

// Steps of the backward pass over a group of `n` layers: all but its first boundary are made again.
static int64_t group_steps(int64_t n) { return 2 * n - 1; }

int64_t step_first_after_forward(const step_plan *p) { return 1 + p->n_layers; }

int64_t step_count(const step_plan *p) {
    if (!p->second_pass) return step_first_after_forward(p);
    return step_first_after_forward(p) + 1 + 2 * p->n_layers - n_groups(p);
}

step step_at(const step_plan *p, int64_t index) {
    int64_t at = index - step_first_after_forward(p);
    if (index == 0) return (step){STEP_EMBED, 0};
    if (at < 0) return (step){STEP_FORWARD, index - 1};
    if (at == 0) return (step){STEP_LOSS, p->n_layers};
    at--;
    for (int64_t group = n_groups(p) - 1; group >= 0; group--) {
        int64_t first = group * p->stride, n = smaller(p->stride, p->n_layers - first);
        if (at < n - 1) return (step){STEP_REFILL, first + at};
        if (at < group_steps(n)) return (step){STEP_BACKWARD, first + n - 1 - (at - (n - 1))};
        at -= group_steps(n);
    }
    return (step){STEP_BACKWARD, 0}; // beyond the last step
}

bool step_keeps_boundary(const step_plan *p, int64_t layer) { return p->second_pass && layer % p->stride == 0; }

int64_t step_peak_states(const step_plan *p) {
    if (!p->second_pass) return 2;
    int64_t forward = p->stride > 1 ? 2 : 1, backward = p->stride - 1 + (p->gradients ? 2 : 0);
    return n_groups(p) + (forward > backward ? forward : backward);
}
