// SPDX-License-Identifier: Apache-2.0
//
// What every other folder stands on: status codes and errors, the context that carries allocator, threads and
// callbacks, checked allocation, fixed partition of parallel work, hashing, random numbers, order-independent sums.
//
// Glossary of the dimension letters used in array comments, here and everywhere:
//   L  layers              H  query heads           Hkv  key/value heads (n_kv_heads)    D  head_dim
//   d  = Hkv * D, the width of K or V of one token   C  hidden_size                      F  intermediate_size
//   S  = seq_len, tokens of one window               N  windows (samples)                V  vocab_size
//   T  = N * S, all tokens                           b  bits                             B  sequences of a batch
// Arrays are row-major; [T, d] means element (t, c) lies at t * d + c.
#ifndef KVQ_CORE_H
#define KVQ_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvq_fixed_hd.h"
#include "kvq_hd.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVQ_VERSION "0.1.0"

// ---------------------------------------------------------------- status and errors

// One list gives code, number shown to users (KVQ-Ennnn), exit code of the programs, cause in general terms, and what
// to do next when the place that failed has nothing better to say. Exit codes: docs/exit-codes.md.
#define KVQ_STATUS_LIST(X)                                                                                             \
    X(OK, 0, 0, "success", "")                                                                                         \
    X(ERR_USAGE, 2001, 2, "an argument is wrong or two contradict each other", "see --help")                           \
    X(ERR_NOT_FOUND, 3001, 3, "the file does not exist or cannot be opened", "check the path and its permissions")     \
    X(ERR_INPUT, 3002, 3, "the input does not have the content this program needs",                                    \
      "check that the file is the one you meant")                                                                      \
    X(ERR_UNSUPPORTED, 3003, 3, "kvq does not know how to use this input correctly, so it refuses",                    \
      "see docs/limits.md for what is supported")                                                                      \
    X(ERR_MISMATCH, 3004, 3, "two inputs do not belong together",                                                      \
      "use the artifact, model and tokenizer that were made for each other")                                           \
    X(ERR_INTEGRITY, 4001, 4, "the file is damaged, truncated, or was changed after it was written",                   \
      "fetch or make the file again")                                                                                  \
    X(ERR_VERSION, 4002, 4, "the file was written by a newer, incompatible version",                                   \
      "install the version of kvq that wrote it")                                                                      \
    X(ERR_NUMERICAL, 5001, 5, "a value is not finite or a computation left its range",                                 \
      "check the weights; a damaged checkpoint is the usual cause")                                                    \
    X(ERR_MEMORY, 6001, 6, "not enough memory", "use fewer or shorter windows, or a machine with more memory")         \
    X(ERR_DISK, 6002, 6, "the disk does not take it", "free some disk space or choose another folder")                 \
    X(ERR_INTERRUPTED, 7501, 75, "the run was stopped on request", "run the same command again to continue")           \
    X(ERR_EXISTS, 2002, 2, "the place is already taken", "choose another name or pass --force")                        \
    X(ERR_INTERNAL, 9001, 70, "a defect in kvq", "please report it with the command line")

typedef enum kvq_status {
#define KVQ_STATUS_ENUM(name, number, exit_code, cause, next) KVQ_##name,
    KVQ_STATUS_LIST(KVQ_STATUS_ENUM)
#undef KVQ_STATUS_ENUM
} kvq_status;

int         kvq_status_number(kvq_status status);    // 4001
int         kvq_status_exit_code(kvq_status status); // 4
const char *kvq_status_cause(kvq_status status);     // "the file is damaged, ..."

// What went wrong, filled by the deepest frame that knows; outer frames only forward. `message` names what and where
// (file, tensor, layer, byte) with the offending value, `next` what the user can do.
typedef struct kvq_error {
    kvq_status status;
    char       message[768];
    char       next[384];
} kvq_error;

// Fills `err` (may be NULL) and returns `status`, so that a failing line reads `return kvq_fail(err, ...)`.
// `next` NULL means the general advice of the status list.
kvq_status kvq_fail(kvq_error *err, kvq_status status, const char *next, const char *format, ...) KVQ_PRINTF(4, 5);

// Puts words in front of an error's message on its way up ("window 3: "), where the outer frame knows something the
// deepest one cannot.
void kvq_error_prefix(kvq_error *err, const char *format, ...) KVQ_PRINTF(2, 3);

// Forwards a failure: evaluates `call` once and leaves the function through its `done:` label.
#define KVQ_TRY(call)                                                                                                  \
    do {                                                                                                               \
        status = (call);                                                                                               \
        if (status != KVQ_OK) goto done;                                                                               \
    } while (0)

// ---------------------------------------------------------------- context

typedef enum kvq_log_level { KVQ_LOG_ERROR, KVQ_LOG_WARNING, KVQ_LOG_INFO, KVQ_LOG_DEBUG } kvq_log_level;

typedef struct kvq_progress {
    const char *stage;       // short, fixed name: "forward", "backward", "score"
    int64_t     layer;       // the one being worked on, -1 = none
    int64_t     done, total; // steps of this stage; a continued run starts with those done before
} kvq_progress;

// Passed first to every function that allocates, works in parallel or reports. Plain data, borrowed for the call,
// never changed by the library; two contexts never share state. Callbacks may be NULL and are called from the thread
// that called the library; alloc and release from any thread.
typedef struct kvq_context {
    int n_threads;                            // 1 or more; changes speed only, never a result
    void *(*alloc)(void *user, size_t bytes); // bytes is a multiple of 64, and the result must be aligned to 64
    void (*release)(void *user, void *p);
    void (*log)(void *user, kvq_log_level level, const char *text);
    void (*progress)(void *user, const kvq_progress *p);
    bool (*stop)(void *user); // asked now and then by long work; true ends it with KVQ_ERR_INTERRUPTED, state saved
    void *user;
} kvq_context;

kvq_context kvq_context_default(void); // malloc, one thread per available core, silent

void kvq_log(const kvq_context *ctx, kvq_log_level level, const char *format, ...) KVQ_PRINTF(3, 4);
void kvq_report_progress(const kvq_context *ctx, const char *stage, int64_t layer, int64_t done, int64_t total);
bool kvq_stop_requested(const kvq_context *ctx);

double kvq_now_s(void); // monotonic clock, for durations

// ---------------------------------------------------------------- memory

// Zeroed array of `count` elements of `size` bytes, aligned to 64 bytes; release with kvq_free. `out` is the address of
// a pointer of any type. Fails with KVQ_ERR_MEMORY (naming `what`) when the product overflows or memory runs out;
// `*out` is then untouched. A count of 0 gives a valid pointer.
kvq_status kvq_alloc(const kvq_context *ctx, int64_t count, size_t size, const char *what, void *out, kvq_error *err);
void       kvq_free(const kvq_context *ctx, void *p);            // NULL is fine
char      *kvq_strdup(const kvq_context *ctx, const char *text); // NULL when out of memory; kvq_free

// Typed form: KVQ_NEW(ctx, n, "weights", &p, err) takes the element size from the pointer.
#define KVQ_NEW(ctx, count, what, out, err) kvq_alloc((ctx), (count), sizeof **(out), (what), (out), (err))

// ---------------------------------------------------------------- parallel work

// Calls body(user, item, worker) once for every item in [0, n_items), on up to ctx->n_threads threads; worker is in
// [0, n_threads). Which thread gets which item is not defined, so results must depend on the item alone. Libraries that
// use OpenMP run single-threaded inside. Bodies must not call the context's callbacks.
#define KVQ_MAX_THREADS 256 // more are not used
typedef void (*kvq_parallel_fn)(void *user, int64_t item, int worker);
void kvq_parallel_for(const kvq_context *ctx, int64_t n_items, kvq_parallel_fn body, void *user);

// ---------------------------------------------------------------- finite numbers

// Index of the first element of x [n] that is NaN or infinite, or -1.
int64_t kvq_find_nonfinite(const float *x, int64_t n);

// ---------------------------------------------------------------- hashing

#define KVQ_SHA256_HEX 65 // 64 lower-case digits and the final zero

typedef struct kvq_sha256 kvq_sha256;
kvq_status                kvq_sha256_create(kvq_sha256 **out, kvq_error *err);
void                      kvq_sha256_push(kvq_sha256 *hash, const void *data, size_t bytes);
void                      kvq_sha256_finalize(kvq_sha256 **hash, char hex[KVQ_SHA256_HEX]); // destroys the state
kvq_status                kvq_sha256_of(const void *data, size_t bytes, char hex[KVQ_SHA256_HEX], kvq_error *err);

// XXH3 with 64 bits: finds damage at the speed of memory, but proves nothing against intent.
uint64_t kvq_checksum(const void *data, size_t bytes);

// ---------------------------------------------------------------- random numbers

// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator, so a number depends on its key alone and never on
// the order of calls. Key: the user's seed. Counter: a purpose (one of kvq_rng_purpose), a stream, an index.
typedef enum kvq_rng_purpose {
    KVQ_RNG_WINDOWS = 1,
    KVQ_RNG_SELF_TEXT = 2,
    KVQ_RNG_KMEANS = 3,
    KVQ_RNG_BENCH = 4,
    KVQ_RNG_ROTATION = 5,
    KVQ_RNG_BOOTSTRAP = 6,
    KVQ_RNG_PASSKEY = 7,
    KVQ_RNG_TEST = 99
} kvq_rng_purpose;

void     kvq_rng_block(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index, uint32_t out[4]);
double   kvq_rng_uniform(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index); // [0, 1), 53 bits
uint64_t kvq_rng_below(uint64_t seed, uint32_t purpose, uint32_t stream, uint64_t index,
                       uint64_t bound); // [0, bound), unbiased up to 2^-64

// ---------------------------------------------------------------- order-independent sums (kvq_fixed_hd.h)

double kvq_fixed_to_double(kvq_fixed x); // correctly rounded up to one unit in the last place

#ifdef __cplusplus
}
#endif
#endif
