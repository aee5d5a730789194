// SPDX-License-Identifier: Apache-2.0
//
// A model decoded token by token, with the device's attention (emulated) over its packed caches and with the CPU's: the
// perplexities are the same but for rounding.
#include <math.h>
#include <stdio.h>

#include "attention_device.h"
#include "attention_model.h"
#include "emulated_rig.h"

enum { N_TOKENS = 161 }; // a tile is completed on the way

struct Watched {
    double largest, share; // error against f64, and of its bound
};

// The kernel's schedule is not the subject here: few preemptions, no search for races in global memory.
static void attend_on_device(void *user, const attention_step *step, float *out) {
    Watched      *watched = static_cast<Watched *>(user);
    simt::Options options;
    options.preempt_every = 1u << 20;
    options.max_traced_bytes = 0;
    simt::begin(options);
    const attention_setup          *with = &step->rig->with;
    int                             D = with->head_dim;
    std::vector<attention_sequence> sequences = {*step->sequence};
    size_t                          size = (size_t)(step->n_heads * D);
    std::vector<float>              q(step->q, step->q + size);
    Query                           query = {step->n_heads, with->n_kv_heads, D, step->scale, 0, 0, D / 2, 1, {}};
    query.frequency.assign(step->frequency, step->frequency + D / 2);
    Device device;
    put_spec(step->rig, &device);
    put_sequences(step->rig, sequences, &device);
    put_query(query, q, &device);
    device.call.n_splits = 2;
    kvq_error           err = {};
    simt::Buffer<float> result("out", size);
    simt::Buffer<float> workspace("workspace", kvq_cuda_attention_workspace(&device.call) / sizeof(float));
    device.call.out = result.data();
    device.call.workspace = workspace.data();
    kvq_test_ok(kvq_cuda_attention(&device.call, nullptr, &err), &err);
    expect_clean();
    Answer exact = exact_attention(query, tokens_of(step->rig, sequences[0]), q.data(), 2);
    for (size_t i = 0; i < size; i++) {
        double error = fabs((double)result.values()[i] - exact.out[i]);
        ck_assert_msg(error <= exact.bound[i], "%g > %g", error, exact.bound[i]);
        watched->largest = fmax(watched->largest, error);
        watched->share = fmax(watched->share, error / exact.bound[i]);
    }
    memcpy(out, result.data(), size * sizeof(float));
}

// Outputs of single calls are within the derived bound of f64, as ever. What they add up to in a model: a last bit here
// and there decides for another code of the next layer, which moves single losses by 1e-3 and their mean by less.
START_TEST(perplexity_is_that_of_the_cpu) {
    bool    tiled = _i == 1;
    Watched watched = {0, 0};
    double  full = attention_model_nll(tiled, N_TOKENS, NULL, NULL);
    double  cpu = attention_model_nll(tiled, N_TOKENS, attention_on_cpu, NULL);
    double  device = attention_model_nll(tiled, N_TOKENS, attend_on_device, &watched);
    printf(
        "%s, %d tokens: perplexity %.6f in full precision, %.6f on the CPU, %.6f on the device; outputs within %.1e, "
        "%.4f of the bound\n",
        tiled ? "tiles" : "rows", N_TOKENS - 1, exp(full), exp(cpu), exp(device), watched.largest, watched.share);
    ck_assert_double_lt(fabs(cpu - device), 1e-3);
    ck_assert_double_gt(fabs(cpu - full), 1e-3); // the cache does lose something
}
END_TEST

static const kvq_test_case cases[] = {KVQ_GOLDEN_LOOP(perplexity_is_that_of_the_cpu, 2)};
KVQ_TEST_MAIN("test_cuda_decode", cases)
