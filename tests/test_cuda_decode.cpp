// SPDX-License-Identifier: Apache-2.0
//
// A model decoded token by token, with the device's packed caches and attention (emulated) and with the CPU's: the
// perplexities are the same but for rounding.
#include <math.h>
#include <stdio.h>

#include <memory>

#include "attention_model.h"
#include "device_cache_rig.h"

enum { N_TOKENS = 161 }; // a tile is completed on the way

struct Decoder {
    CudaDevice                              device;
    std::vector<std::unique_ptr<CudaCache>> caches;                 // of the layers
    double                                  largest = 0, share = 0; // error against f64, and of its bound
};

static void attend_on_device(void *user, const attention_step *step, float *out) {
    Decoder               *decoder = static_cast<Decoder *>(user);
    const attention_setup *with = &step->rig->with;
    int                    D = with->head_dim;
    Query                  query = {step->n_heads, with->n_kv_heads, D, step->scale, 0, 0, D / 2, 1, {}};
    kvq_error              err = {};
    query.frequency.assign(step->frequency, step->frequency + D / 2);
    if (decoder->caches.size() == (size_t)step->layer)
        decoder->caches.emplace_back(new CudaCache(&decoder->device, layer_of(*step->rig, 1, N_TOKENS, query)));
    CudaCache *cache = decoder->caches[(size_t)step->layer].get();
    expect_ok(cache->append(0, step->k, step->v, 1, &err), err);
    std::vector<float> q(step->q, step->q + step->n_heads * D), result = cache->attend(query, 2, q);
    Answer             exact = exact_attention(query, tokens_of(step->rig, *step->sequence), q.data(), 2);
    for (size_t i = 0; i < q.size(); i++) {
        double error = fabs((double)result[i] - exact.out[i]);
        if (!(error <= exact.bound[i])) ck_abort_msg("%g > %g", error, exact.bound[i]);
        decoder->largest = fmax(decoder->largest, error);
        decoder->share = fmax(decoder->share, error / exact.bound[i]);
    }
    memcpy(out, result.data(), q.size() * sizeof(float));
}

// Outputs of single calls are within the derived bound of f64, as ever. What they add up to in a model: a last bit here
// and there decides for another code of the next layer, which moves single losses by 1e-3 and their mean by less.
START_TEST(perplexity_is_that_of_the_cpu) {
    bool    tiled = _i == 1;
    Decoder decoder;
    double  full = attention_model_nll(tiled, N_TOKENS, NULL, NULL);
    double  cpu = attention_model_nll(tiled, N_TOKENS, attention_on_cpu, NULL);
    double  device = attention_model_nll(tiled, N_TOKENS, attend_on_device, &decoder);
    printf(
        "%s, %d tokens: perplexity %.6f in full precision, %.6f on the CPU, %.6f on the device; outputs within %.1e, "
        "%.4f of the bound\n",
        tiled ? "tiles" : "rows", N_TOKENS - 1, exp(full), exp(cpu), exp(device), decoder.largest, decoder.share);
    for (auto &cache : decoder.caches) {
        kvq_error err = {};
        expect_ok(kvq_cuda_cache_check(cache->cache, nullptr, decoder.device.stream, &err), err);
    }
    ck_assert_double_lt(fabs(cpu - device), 1e-3);
    ck_assert_double_gt(fabs(cpu - full), 1e-3); // the cache does lose something
}
END_TEST

static const kvq_test_case cases[] = {KVQ_GOLDEN_LOOP(perplexity_is_that_of_the_cpu, 2)};
KVQ_TEST_MAIN("test_cuda_decode", cases)
