// SPDX-License-Identifier: Apache-2.0
//
// kvq_cuda_runtime.h on the emulated device, so that programs run their CUDA backend without a GPU.
//
// It is as late as a device may be: what is asked for on a stream happens when somebody waits for it, or when a kernel
// is started behind it. Who reads a result too early, or overwrites what has not been copied yet, gets other numbers.
// Device memory cannot be touched by the host: it is mapped, but not readable, while no operation of the device runs.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <mutex>

#include "kvq_cuda_runtime.h"
#include "kvq_kernels.h"
#include "simt_machine.h"

struct kvq_cuda_device {
    kvq_cuda_about about;
    kvq_context    ctx;
    kvq_backend   *products; // the library of products
};

namespace {

struct Stream {
    std::deque<std::function<void()>> waiting;
    uint64_t                          n_asked = 0, n_done = 0;
};

struct Event {
    Stream  *stream = nullptr;
    uint64_t n_asked = 0;
};

// What the environment asks of the device; see kvq_cuda_open.
struct Wanted {
    uint64_t seed = 1, memory = UINT64_MAX, calls = UINT64_MAX;
};

struct World {
    Wanted                   wanted;
    std::recursive_mutex     lock;
    int                      depth = 0; // of operations of the device
    std::map<void *, size_t> blocks;    // device memory, as mapped
    std::map<void *, size_t> pinned;
    std::map<void *, Stream> streams;
};

World world;

// ---------------------------------------------------------------- who may touch device memory

// Only small blocks, for the time that it takes: those who touch large ones touch these too, in the models of tests.
constexpr size_t MOST_PROTECTED = (size_t)1 << 18;

void protect(int rights) {
    for (const auto &block : world.blocks) {
        if (block.second <= MOST_PROTECTED) (void)mprotect(block.first, block.second, rights);
    }
}

void enter() {
    world.lock.lock();
    if (world.depth++ == 0) protect(PROT_READ | PROT_WRITE);
}

void leave() {
    if (--world.depth == 0) protect(PROT_NONE);
    world.lock.unlock();
}

struct Operation {
    Operation() { enter(); }
    ~Operation() { leave(); }
    Operation(const Operation &) = delete;
    Operation &operator=(const Operation &) = delete;
};

// Does what is waiting in a stream until `n` of all that was ever asked for are done.
void reach(Stream *stream, uint64_t n) {
    while (stream->n_done < n && !stream->waiting.empty()) {
        std::function<void()> next = std::move(stream->waiting.front());
        stream->waiting.pop_front();
        stream->n_done++;
        next();
    }
}

void ask(void *stream, std::function<void()> what) {
    Stream &s = world.streams.at(stream);
    s.waiting.push_back(std::move(what));
    s.n_asked++;
}

// A launch runs at once, behind what waits in its stream.
void before_launch(void *stream) {
    enter();
    auto found = world.streams.find(stream);
    if (found != world.streams.end()) reach(&found->second, found->second.n_asked);
}

// ---------------------------------------------------------------- checks

bool within(const std::map<void *, size_t> &all, const void *p, size_t bytes) {
    auto after = all.upper_bound(const_cast<void *>(p));
    if (after == all.begin()) return false;
    --after;
    size_t offset = (size_t)(static_cast<const char *>(p) - static_cast<char *>(after->first));
    return offset <= after->second && bytes <= after->second - offset;
}

bool on_device(const void *p, size_t bytes) {
    simt::Memory *m = simt::find_memory(p);
    return m != nullptr && bytes <= (size_t)(m->base + m->bytes - static_cast<const unsigned char *>(p));
}

void define(void *p, size_t bytes) {
    simt::Memory *m = simt::find_memory(p);
    memset(m->defined + (static_cast<unsigned char *>(p) - m->base), 1, bytes);
}

kvq_status invalid(const char *what, kvq_error *err) {
    return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "cuda:0, emulated device: %s", what);
}

// Counts a call that may fail.
kvq_status count_call(kvq_error *err) {
    if (world.wanted.calls == 0) return invalid("it stopped working", err);
    world.wanted.calls--;
    return KVQ_OK;
}

uint64_t number_of(const char *variable, uint64_t otherwise) {
    const char *text = getenv(variable);
    return text != nullptr ? strtoull(text, nullptr, 10) : otherwise;
}

kvq_status findings(kvq_error *err) {
    if (simt::reports().empty()) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_INTERNAL, NULL, "cuda:0, emulated device: %s", simt::report_text().c_str());
}

} // namespace

extern "C" {

// ---------------------------------------------------------------- device

// KVQ_SIMT_SEED: the order of threads; KVQ_SIMT_MEMORY: bytes of its memory; KVQ_SIMT_CALLS: after so many calls it
// fails.
kvq_status kvq_cuda_open(const kvq_context *ctx, int index, kvq_cuda_device **out, kvq_error *err) {
    if (index != 0) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, "take --device cuda:0", "there is no CUDA device %d, there is 1",
                        index);
    }
    kvq_cuda_device *device = new kvq_cuda_device();
    device->about = {"emulated device", "the processor's products", 0, 0, 0, 0, 0};
    device->ctx = *ctx;
    kvq_status status = kvq_backend_cpu(&device->ctx, KVQ_COMPUTE_F32, &device->products, err);
    if (status != KVQ_OK) {
        delete device;
        return status;
    }
    world.wanted = {number_of("KVQ_SIMT_SEED", 1), number_of("KVQ_SIMT_MEMORY", (uint64_t)16 << 30),
                    number_of("KVQ_SIMT_CALLS", UINT64_MAX)};
    device->about.memory_bytes = device->about.free_bytes = (int64_t)world.wanted.memory;
    simt::Options options;
    options.seed = world.wanted.seed;
    options.preempt_every = 1u << 20; // the order of threads is the subject of the suites of kernels
    options.max_traced_bytes = 0;
    simt::begin(options);
    simt::hooks = {before_launch, leave};
    *out = device;
    return KVQ_OK;
}

void kvq_cuda_close(const kvq_context *, kvq_cuda_device **device) {
    if (*device == nullptr) return;
    (*device)->products->destroy(&(*device)->products);
    delete *device;
    *device = nullptr;
    simt::hooks = {};
}

const kvq_cuda_about *kvq_cuda_describe(const kvq_cuda_device *device) { return &device->about; }

// ---------------------------------------------------------------- memory

kvq_status kvq_cuda_alloc(kvq_cuda_device *, size_t bytes, const char *what, void **out, kvq_error *err) {
    Operation operation;
    size_t    page = (size_t)sysconf(_SC_PAGESIZE),
           mapped = (bytes + page - 1) / page * page + page; // apart from the next
    size_t     held = 0;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    for (const auto &block : world.blocks) held += block.second;
    void *base = held + mapped > world.wanted.memory
                     ? MAP_FAILED
                     : mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "cuda:0, emulated device: no %zu bytes for %s", bytes, what);
    memset(base, 0xff, bytes); // floats: NaN
    world.blocks[base] = mapped;
    (void)simt::add_memory(what, base, bytes, false);
    *out = base;
    return KVQ_OK;
}

void kvq_cuda_free(kvq_cuda_device *, void *p) {
    if (p == nullptr) return;
    Operation operation;
    for (auto &stream : world.streams) reach(&stream.second, stream.second.n_asked);
    simt::remove_memory(p);
    (void)munmap(p, world.blocks.at(p));
    world.blocks.erase(p);
}

kvq_status kvq_cuda_alloc_pinned(kvq_cuda_device *, size_t bytes, void **out, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    *out = malloc(bytes > 0 ? bytes : 1);
    if (*out == nullptr) return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "no %zu bytes of pinned memory", bytes);
    world.pinned[*out] = bytes;
    return KVQ_OK;
}

void kvq_cuda_free_pinned(kvq_cuda_device *, void *p) {
    Operation operation;
    for (auto &stream : world.streams) reach(&stream.second, stream.second.n_asked);
    world.pinned.erase(p);
    free(p);
}

// ---------------------------------------------------------------- order

kvq_status kvq_cuda_stream_create(kvq_cuda_device *, void **stream, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    *stream = new char;
    world.streams[*stream] = Stream();
    return KVQ_OK;
}

void kvq_cuda_stream_destroy(kvq_cuda_device *, void *stream) {
    if (stream == nullptr) return;
    Operation operation;
    Stream   &s = world.streams.at(stream);
    reach(&s, s.n_asked);
    world.streams.erase(stream);
    delete static_cast<char *>(stream);
}

kvq_status kvq_cuda_event_create(kvq_cuda_device *, void **event, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    *event = new Event;
    return KVQ_OK;
}

void kvq_cuda_event_destroy(kvq_cuda_device *, void *event) { delete static_cast<Event *>(event); }

kvq_status kvq_cuda_record(kvq_cuda_device *, void *event, void *stream, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    Stream &s = world.streams.at(stream);
    *static_cast<Event *>(event) = {&s, s.n_asked};
    return KVQ_OK;
}

kvq_status kvq_cuda_await(kvq_cuda_device *, void *event, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    const Event &e = *static_cast<Event *>(event);
    if (e.stream != nullptr) reach(e.stream, e.n_asked);
    return findings(err);
}

kvq_status kvq_cuda_follow(kvq_cuda_device *, void *stream, void *event, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    Event now = *static_cast<Event *>(event); // what it stands for at this moment
    ask(stream, [now]() {
        if (now.stream != nullptr) reach(now.stream, now.n_asked);
    });
    return KVQ_OK;
}

kvq_status kvq_cuda_finish(kvq_cuda_device *, void *stream, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    Stream &s = world.streams.at(stream);
    reach(&s, s.n_asked);
    return findings(err);
}

// ---------------------------------------------------------------- work

kvq_status kvq_cuda_copy(kvq_cuda_device *, kvq_cuda_way way, void *to, const void *from, size_t bytes, void *stream,
                         kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    bool reads_device = way != KVQ_CUDA_TO_DEVICE, writes_device = way != KVQ_CUDA_TO_HOST;
    if (bytes == 0) return KVQ_OK;
    if (!(reads_device ? on_device(from, bytes) : within(world.pinned, from, bytes)))
        return invalid("a copy from memory that is not its own", err);
    if (!(writes_device ? on_device(to, bytes) : within(world.pinned, to, bytes)))
        return invalid("a copy to memory that is not its own", err);
    ask(stream, [to, from, bytes, writes_device]() {
        memmove(to, from, bytes);
        if (writes_device) define(to, bytes);
    });
    return KVQ_OK;
}

kvq_status kvq_cuda_clear(kvq_cuda_device *, void *to, size_t bytes, void *stream, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    if (!on_device(to, bytes)) return invalid("clears memory that is not its own", err);
    ask(stream, [to, bytes]() {
        memset(to, 0, bytes);
        define(to, bytes);
    });
    return KVQ_OK;
}

// Factors in bf16 are exact in f32, and so are their products.
static std::vector<float> floats_of(const void *from, int64_t n, bool bf16) {
    std::vector<float> to((size_t)n);
    for (int64_t i = 0; bf16 && i < n; i++) to[(size_t)i] = kvq_float_of_bf16(static_cast<const uint16_t *>(from)[i]);
    if (!bf16 && n > 0) memcpy(to.data(), from, (size_t)n * sizeof(float));
    return to;
}

static void multiply(const kvq_backend *be, const kvq_cuda_product &p) {
    int64_t            n_out = p.transposed ? p.n : p.k, n_in = p.transposed ? p.k : p.n;
    std::vector<float> x = floats_of(p.x, p.m * p.k, p.bf16), w = floats_of(p.w, p.n * p.k, p.bf16);
    std::vector<float> own((size_t)be->weights_floats(be, n_out, n_in));
    be->upload_weights(be, own.data(), n_in, 0, n_out, w.data());
    if (p.transposed)
        be->linear(be, x.data(), own.data(), nullptr, p.y, p.m, n_out, n_in);
    else
        be->linear_backward(be, x.data(), own.data(), p.y, p.m, n_out, n_in, p.accumulate);
    define(p.y, (size_t)(p.m * p.n) * sizeof(float));
}

kvq_status kvq_cuda_multiply(kvq_cuda_device *device, const kvq_cuda_product *product, void *stream, kvq_error *err) {
    Operation  operation;
    kvq_status status = count_call(err);
    if (status != KVQ_OK) return status;
    kvq_cuda_product p = *product;
    size_t           width = p.bf16 ? sizeof(uint16_t) : sizeof(float);
    if (p.transposed && p.accumulate) return invalid("a product that adds to what is there", err); // nobody asks for it
    if (!on_device(p.x, (size_t)(p.m * p.k) * width) || !on_device(p.w, (size_t)(p.n * p.k) * width) ||
        !on_device(p.y, (size_t)(p.m * p.n) * sizeof(float)))
        return invalid("a product of memory that is not its own", err);
    ask(stream, [device, p]() { multiply(device->products, p); });
    return KVQ_OK;
}

} // extern "C"
