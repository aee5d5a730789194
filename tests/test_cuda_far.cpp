// SPDX-License-Identifier: Apache-2.0
//
// Pages of a cache that lie farther apart than 32 bits reach, as those of millions of tokens do: attention gives the
// bits that it gives when they lie side by side. The emulated device has so much memory because nobody touches it.
#include <math.h>
#include <sys/mman.h>

#include "attention_device.h"
#include "emulated_rig.h"

enum { LENGTH = 300, GROUP = 4, N_PAGES = 3 };
static const int64_t STRIDES[] = {((int64_t)1 << 31) + 4096, ((int64_t)1 << 32) + 4096}; // of K, of V

static attention_setup setup_of(bool tiled) {
    attention_setup s = {};
    s.tiled = tiled;
    s.n_kv_heads = 2, s.head_dim = 64, s.sinks = 2, s.spread = 1, s.n_side = 1;
    s.k_bits = s.v_bits = 3, s.recent = tiled ? 0 : 5;
    s.dim = tiled ? 2 : 1, s.n_slots = tiled ? 16 : 0;
    return s;
}

struct Far {
    unsigned char *base;
    size_t         bytes;

    Far(const char *name, int64_t stride) : bytes((size_t)(N_PAGES * stride)) {
        void *all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        ck_assert_msg(all != MAP_FAILED, "no %zu bytes of address space", bytes);
        base = static_cast<unsigned char *>(all);
        memory = simt::add_memory(name, base, bytes, false);
    }
    ~Far() {
        simt::remove_memory(base);
        (void)munmap(base, bytes);
    }
    void put(int64_t at, const unsigned char *from, int64_t n) {
        memcpy(base + at, from, (size_t)n);
        memset(memory->defined + at, 1, (size_t)n);
    }

  private:
    simt::Memory *memory;
};

// Page i of the sequence goes to the place N_PAGES - 1 - i of the far pools.
static void move_away(Device *device, Far *k, Far *v) {
    kvq_cuda_attention_call &c = device->call;
    std::vector<int32_t>     table((size_t)c.max_pages, N_PAGES);
    for (int32_t i = 0; i < N_PAGES; i++) {
        int32_t from = device->table[(size_t)i];
        table[(size_t)i] = N_PAGES - 1 - i;
        if (from >= c.max_pages) continue; // no token of it is coded
        k->put(table[(size_t)i] * STRIDES[0], c.k_pages + from * c.k_page_bytes, c.k_page_bytes);
        v->put(table[(size_t)i] * STRIDES[1], c.v_pages + from * c.v_page_bytes, c.v_page_bytes);
    }
    c.k_pages = k->base;
    c.v_pages = v->base;
    c.k_page_bytes = STRIDES[0];
    c.v_page_bytes = STRIDES[1];
    c.page_table = device->owned.copy("page table", table.data(), table.size());
}

static std::vector<float> attend(Device *device, size_t n) {
    kvq_error           err = {};
    simt::Buffer<float> out("out", n);
    simt::Buffer<float> workspace("workspace", kvq_cuda_attention_workspace(&device->call) / sizeof(float));
    device->call.out = out.data();
    device->call.workspace = workspace.data();
    begin(3);
    kvq_test_ok(kvq_cuda_attention(&device->call, nullptr, &err), &err);
    expect_clean();
    return out.values();
}

START_TEST(pages_may_lie_anywhere) {
    attention_rig      rig;
    attention_sequence sequence;
    Query              query = {2 * GROUP, 2, 64, 0.125f, 0, 0, 0, 1, {}};
    size_t             n = (size_t)(query.n_heads * query.head_dim);
    std::vector<float> q(n);
    attention_setup    with = setup_of(_i == 1);
    attention_rig_open(&with, &rig);
    attention_sequence_open(&rig, LENGTH, 7, &sequence);
    for (size_t i = 0; i < n; i++) q[i] = (float)(2 * kvq_rng_uniform(5, KVQ_RNG_TEST, 9, i) - 1);
    Device device;
    put_spec(&rig, &device);
    put_sequences(&rig, {sequence}, &device);
    put_query(query, q, &device);
    std::vector<float> near = attend(&device, n);
    Far                k("far keys", STRIDES[0]), v("far values", STRIDES[1]);
    move_away(&device, &k, &v);
    std::vector<float> far = attend(&device, n);
    ck_assert(memcmp(near.data(), far.data(), n * sizeof(float)) == 0);
    attention_sequence_close(&sequence);
    attention_rig_close(&rig);
}
END_TEST

static const kvq_test_case cases[] = {KVQ_LOOP(pages_may_lie_anywhere, 2)};
KVQ_TEST_MAIN("cuda far", cases)
