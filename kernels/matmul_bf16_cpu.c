// SPDX-License-Identifier: Apache-2.0
//
// Linear layers whose factors are bf16 and whose sums are f32, through oneDNN's matmul primitive.
//
// Weights are bf16 as [n_out, n_in], the order of checkpoints, so that one copy serves both directions: oneDNN reads it
// as it is for x w^T and for dy w. A layout of oneDNN's own choice would be a few percent faster, but it interleaves
// pairs along the summed dimension, which is n_in in one direction and n_out in the other.
//
// A tile is one thread's work: its rows of x are rounded to bf16 into scratch, then multiplied. oneDNN compiles a
// product for one exact shape; the compiled products are kept with the backend. So that a model whose row counts vary
// from call to call (experts) does not collect one for every count, the last rows of a matrix are padded to one of a
// few counts and multiplied into scratch.
#include "kernels_impl.h"

#define BF16_NEXT "use --compute f32"

#ifdef KVQ_MATMUL_ONEDNN
#include <oneapi/dnnl/dnnl.h>
#endif

#if defined KVQ_MATMUL_ONEDNN && DNNL_VERSION_MAJOR == 2
#include <pthread.h>

#define TILE_ROWS    256
#define TILE_COLUMNS 4096
#define MAX_DEPTH    16384 // a longer sum is cut into DEPTH_STEP, which bounds the scratch of a tile
#define DEPTH_STEP   8192

// y [rows, columns] (+)= x [rows, depth] w; x is dense, y and w have the given strides between rows. transpose_w: w is
// stored [columns, depth]. All of one type, so that there is no padding and shapes compare as bytes.
typedef struct product_shape {
    int64_t rows, columns, depth, w_stride, y_stride, transpose_w, accumulate;
} product_shape;

// One compiled product, and how its arguments lie in memory.
typedef struct product {
    product_shape      shape;
    dnnl_primitive_t   primitive;
    dnnl_memory_desc_t x, w, y, scratchpad;
    struct product    *next;
} product;

// What one tile needs while it is computed.
typedef struct scratch {
    uint16_t       *x;          // [rows, depth], the rounded factor
    float          *y;          // [rows, columns], only for padded rows
    unsigned char  *scratchpad; // the library's
    size_t          x_bytes, y_bytes, scratchpad_bytes;
    dnnl_stream_t   stream;
    struct scratch *next;
} scratch;

struct kvq_bf16 {
    const kvq_context *ctx;
    dnnl_engine_t      engine;
    pthread_mutex_t    lock; // of the two lists
    product           *products;
    scratch           *idle;
};

// ---------------------------------------------------------------- compiled products

static void destroy_product(const kvq_context *ctx, product *p) {
    if (p->primitive != NULL) (void)dnnl_primitive_destroy(p->primitive);
    kvq_free(ctx, p);
}

static dnnl_status_t describe_arguments(const product_shape *s, product *p) {
    const dnnl_dims_t x_dims = {s->rows, s->depth}, w_dims = {s->depth, s->columns}, y_dims = {s->rows, s->columns};
    const dnnl_dims_t x_strides = {s->depth, 1}, y_strides = {s->y_stride, 1};
    const dnnl_dims_t w_strides = {s->transpose_w ? 1 : s->w_stride, s->transpose_w ? s->w_stride : 1};
    dnnl_status_t     status = dnnl_memory_desc_init_by_strides(&p->x, 2, x_dims, dnnl_bf16, x_strides);
    if (status == dnnl_success) status = dnnl_memory_desc_init_by_strides(&p->w, 2, w_dims, dnnl_bf16, w_strides);
    if (status == dnnl_success) status = dnnl_memory_desc_init_by_strides(&p->y, 2, y_dims, dnnl_f32, y_strides);
    return status;
}

static dnnl_status_t set_accumulate(dnnl_primitive_attr_t attributes) {
    dnnl_post_ops_t add = NULL;
    dnnl_status_t   status = dnnl_post_ops_create(&add);
    if (status == dnnl_success) status = dnnl_post_ops_append_sum(add, 1.0f);
    if (status == dnnl_success) status = dnnl_primitive_attr_set_post_ops(attributes, add);
    if (add != NULL) (void)dnnl_post_ops_destroy(add);
    return status;
}

static dnnl_status_t compile(dnnl_engine_t engine, const product_shape *s, product *p) {
    dnnl_matmul_desc_t    description;
    dnnl_primitive_attr_t attributes = NULL;
    dnnl_primitive_desc_t chosen = NULL;
    dnnl_status_t         status = describe_arguments(s, p);
    if (status == dnnl_success) status = dnnl_matmul_desc_init(&description, &p->x, &p->w, NULL, &p->y);
    if (status == dnnl_success) status = dnnl_primitive_attr_create(&attributes);
    if (status == dnnl_success) status = dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user);
    if (status == dnnl_success && s->accumulate) status = set_accumulate(attributes);
    if (status == dnnl_success) status = dnnl_primitive_desc_create(&chosen, &description, attributes, engine, NULL);
    if (status == dnnl_success) status = dnnl_primitive_create(&p->primitive, chosen);
    if (status == dnnl_success) p->scratchpad = *dnnl_primitive_desc_query_md(chosen, dnnl_query_scratchpad_md, 0);
    if (chosen != NULL) (void)dnnl_primitive_desc_destroy(chosen);
    if (attributes != NULL) (void)dnnl_primitive_attr_destroy(attributes);
    return status;
}

static product *compile_new(kvq_bf16 *bf16, const product_shape *shape) {
    product *p;
    if (KVQ_NEW(bf16->ctx, 1, "matrix product", &p, NULL) != KVQ_OK) return NULL;
    p->shape = *shape;
    if (compile(bf16->engine, shape, p) != dnnl_success) {
        destroy_product(bf16->ctx, p);
        return NULL;
    }
    p->next = bf16->products;
    bf16->products = p;
    return p;
}

// The compiled product of a shape, made when it is asked for the first time; NULL when that fails. Called by the thread
// that will run it: oneDNN compiles for the number of threads that its caller may use, which is one here.
static const product *product_for(kvq_bf16 *bf16, const product_shape *shape) {
    (void)pthread_mutex_lock(&bf16->lock);
    const product *p = bf16->products;
    while (p != NULL && memcmp(&p->shape, shape, sizeof *shape) != 0) p = p->next;
    if (p == NULL) p = compile_new(bf16, shape);
    (void)pthread_mutex_unlock(&bf16->lock);
    return p;
}

// ---------------------------------------------------------------- scratch

static void destroy_scratch(const kvq_context *ctx, scratch *s) {
    if (s->stream != NULL) (void)dnnl_stream_destroy(s->stream);
    kvq_free(ctx, s->x);
    kvq_free(ctx, s->y);
    kvq_free(ctx, s->scratchpad);
    kvq_free(ctx, s);
}

static scratch *new_scratch(const kvq_bf16 *bf16) {
    scratch *s;
    if (KVQ_NEW(bf16->ctx, 1, "matrix product scratch", &s, NULL) != KVQ_OK) return NULL;
    if (dnnl_stream_create(&s->stream, bf16->engine, dnnl_stream_default_flags) == dnnl_success) return s;
    destroy_scratch(bf16->ctx, s);
    return NULL;
}

// As many exist as tiles were ever computed at the same time.
static scratch *take_scratch(kvq_bf16 *bf16) {
    (void)pthread_mutex_lock(&bf16->lock);
    scratch *s = bf16->idle;
    if (s != NULL) bf16->idle = s->next;
    (void)pthread_mutex_unlock(&bf16->lock);
    return s != NULL ? s : new_scratch(bf16);
}

static void give_scratch(kvq_bf16 *bf16, scratch *s) {
    (void)pthread_mutex_lock(&bf16->lock);
    s->next = bf16->idle;
    bf16->idle = s;
    (void)pthread_mutex_unlock(&bf16->lock);
}

// Makes room for `wanted` bytes; what was there is lost. `buffer` is the address of a pointer of any type.
static bool reserve(const kvq_context *ctx, void *buffer, size_t *bytes, size_t wanted) {
    void *p;
    if (wanted <= *bytes) return true;
    if (kvq_alloc(ctx, (int64_t)wanted, 1, "matrix product scratch", &p, NULL) != KVQ_OK) return false;
    void *old;
    memcpy(&old, buffer, sizeof old);
    memcpy(buffer, &p, sizeof p);
    kvq_free(ctx, old);
    *bytes = wanted;
    return true;
}

// ---------------------------------------------------------------- one tile

typedef struct bf16_job {
    kvq_bf16       *bf16;
    const float    *x, *bias;
    const uint16_t *w;
    float          *y;
    int64_t         m, n, k;
    bool            transpose_w; // w is [n, k] rather than [k, n]
    bool            accumulate;
    tiling          tiles;
} bf16_job;

// The row counts for which products are compiled: powers of two up to 32, then multiples of 32.
static int64_t padded_rows(int64_t rows) {
    int64_t padded = 1;
    while (padded < rows && padded < 32) padded *= 2;
    return padded < rows ? (rows + 31) / 32 * 32 : padded;
}

static void round_to_bf16(const float *from, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) to[i] = kvq_bf16_of_float(from[i]);
}

// Rounds x [rows, depth] of row stride x_stride, with rows of zeros behind it.
static void round_rows(const float *x, int64_t x_stride, const product_shape *s, int64_t rows, uint16_t *to) {
    for (int64_t i = 0; i < rows; i++) round_to_bf16(x + i * x_stride, s->depth, to + i * s->depth);
    memset(to + rows * s->depth, 0, (size_t)((s->rows - rows) * s->depth) * sizeof *to);
}

// oneDNN takes arguments that are not const; it writes to y and the scratchpad alone.
static dnnl_status_t execute(kvq_bf16 *bf16, const product *p, scratch *s, const uint16_t *w, float *y) {
    const dnnl_memory_desc_t *const layouts[] = {&p->x, &p->w, &p->y, &p->scratchpad};
    void *const                     places[] = {s->x, (void *)(uintptr_t)w, y, s->scratchpad};
    dnnl_exec_arg_t                 arguments[] = {
                        {DNNL_ARG_SRC, NULL}, {DNNL_ARG_WEIGHTS, NULL}, {DNNL_ARG_DST, NULL}, {DNNL_ARG_SCRATCHPAD, NULL}};
    enum { N = sizeof arguments / sizeof *arguments };
    dnnl_status_t status = dnnl_success;
    for (int i = 0; i < N && status == dnnl_success; i++)
        status = dnnl_memory_create(&arguments[i].memory, layouts[i], bf16->engine, places[i]);
    if (status == dnnl_success) status = dnnl_primitive_execute(p->primitive, s->stream, N, arguments);
    if (status == dnnl_success) status = dnnl_stream_wait(s->stream);
    for (int i = 0; i < N; i++) {
        if (arguments[i].memory != NULL) (void)dnnl_memory_destroy(arguments[i].memory);
    }
    return status;
}

// The part of a tile's sum from `from` on. y is where the tile's results go: their place, or scratch.
static bool multiply_part(const bf16_job *job, tile t, int64_t from, product_shape shape, scratch *s, float *y) {
    const product  *p = product_for(job->bf16, &shape);
    const uint16_t *w = job->transpose_w ? job->w + t.column * job->k + from : job->w + from * job->n + t.column;
    if (p == NULL) return false;
    size_t x_bytes = (size_t)(shape.rows * shape.depth) * sizeof *s->x;
    if (!reserve(job->bf16->ctx, &s->x, &s->x_bytes, x_bytes)) return false;
    if (!reserve(job->bf16->ctx, &s->scratchpad, &s->scratchpad_bytes, dnnl_memory_desc_get_size(&p->scratchpad)))
        return false;
    round_rows(job->x + t.row * job->k + from, job->k, &shape, t.rows, s->x);
    return execute(job->bf16, p, s, w, y) == dnnl_success;
}

static bool multiply_tile(const bf16_job *job, tile t, product_shape shape, scratch *s, float *y) {
    int64_t step = job->k <= MAX_DEPTH ? job->k : DEPTH_STEP;
    for (int64_t from = 0; from < job->k; from += step) {
        shape.depth = smaller(step, job->k - from);
        if (!multiply_part(job, t, from, shape, s, y)) return false;
        shape.accumulate = true; // from the second part on
    }
    return true;
}

static void finish_padded(const bf16_job *job, tile t, const float *from, float *y) {
    for (int64_t i = 0; i < t.rows; i++) {
        for (int64_t j = 0; j < t.columns; j++) {
            float before = job->accumulate ? y[i * job->n + j] : 0.0f;
            y[i * job->n + j] = before + from[i * t.columns + j];
        }
    }
}

static bool compute_tile(const bf16_job *job, tile t, scratch *s, float *y) {
    product_shape shape = {.rows = padded_rows(t.rows),
                           .columns = t.columns,
                           .w_stride = job->transpose_w ? job->k : job->n,
                           .y_stride = job->n,
                           .transpose_w = job->transpose_w,
                           .accumulate = job->accumulate};
    if (shape.rows == t.rows) return multiply_tile(job, t, shape, s, y);
    shape.y_stride = t.columns;
    shape.accumulate = false;
    if (!reserve(job->bf16->ctx, &s->y, &s->y_bytes, (size_t)(shape.rows * t.columns) * sizeof *s->y)) return false;
    if (!multiply_tile(job, t, shape, s, s->y)) return false;
    finish_padded(job, t, s->y, y);
    return true;
}

static void bf16_tile(void *user, int64_t item, int worker) {
    const bf16_job *job = user;
    tile            t = tile_of(&job->tiles, job->m, job->n, item);
    float          *y = job->y + t.row * job->n + t.column;
    scratch        *s = take_scratch(job->bf16);
    (void)worker;
    if (s == NULL || !compute_tile(job, t, s, y)) spoil(y, job->n, t.rows, t.columns);
    if (s != NULL) give_scratch(job->bf16, s);
    if (job->bias == NULL) return;
    for (int64_t i = 0; i < t.rows; i++) {
        for (int64_t j = 0; j < t.columns; j++) y[i * job->n + j] += job->bias[t.column + j];
    }
}

// ---------------------------------------------------------------- the table's entries

static void run_product(const kvq_backend *be, bf16_job *job) {
    int64_t columns = job->m <= FEW_ROWS ? columns_for_few_rows(job->n) : equal_columns(job->n, TILE_COLUMNS);
    job->bf16 = ((const cpu_backend *)be)->bf16;
    job->tiles = cut_into_tiles(job->m, job->n, TILE_ROWS, columns);
    kvq_parallel_for(be->ctx, job->tiles.n_tiles, bf16_tile, job);
}

static void linear(const kvq_backend *be, const float *x, const float *w, const float *bias, float *y, int64_t m,
                   int64_t n_out, int64_t n_in) {
    bf16_job job = {
        .x = x, .w = (const uint16_t *)w, .bias = bias, .y = y, .m = m, .n = n_out, .k = n_in, .transpose_w = true};
    run_product(be, &job);
}

static void linear_backward(const kvq_backend *be, const float *dy, const float *w, float *dx, int64_t m, int64_t n_out,
                            int64_t n_in, bool accumulate) {
    bf16_job job = {
        .x = dy, .w = (const uint16_t *)w, .y = dx, .m = m, .n = n_in, .k = n_out, .accumulate = accumulate};
    run_product(be, &job);
}

static int64_t weights_floats(const kvq_backend *be, int64_t n_out, int64_t n_in) {
    (void)be;
    return (n_out * n_in + 1) / 2;
}

static void upload_weights(const kvq_backend *be, float *w, int64_t n_in, int64_t row, int64_t n_rows,
                           const float *host_from) {
    (void)be;
    round_to_bf16(host_from, n_rows * n_in, (uint16_t *)w + row * n_in);
}

// ---------------------------------------------------------------- life

static kvq_status open_engine(const kvq_context *ctx, kvq_bf16 **out, kvq_error *err) {
    kvq_bf16  *bf16;
    kvq_status status = KVQ_NEW(ctx, 1, "bf16 products", &bf16, err);
    if (status != KVQ_OK) return status;
    bf16->ctx = ctx;
    if (pthread_mutex_init(&bf16->lock, NULL) != 0) {
        kvq_free(ctx, bf16);
        return kvq_fail(err, KVQ_ERR_MEMORY, NULL, "bf16: a lock could not be made");
    }
    *out = bf16;
    dnnl_status_t made = dnnl_engine_create(&bf16->engine, dnnl_cpu, 0);
    if (made == dnnl_success) return KVQ_OK;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, BF16_NEXT, "bf16: oneDNN has no engine for this processor (status %d)",
                    (int)made);
}

kvq_status kvq_use_bf16(cpu_backend *cpu, kvq_error *err) {
    kvq_backend   *be = &cpu->table;
    dnnl_cpu_isa_t isa = dnnl_get_effective_cpu_isa(); // a set of bits; processors with AMX have those of bf16 too
    if ((isa & dnnl_cpu_isa_avx512_core_bf16) != dnnl_cpu_isa_avx512_core_bf16) {
        return kvq_fail(err, KVQ_ERR_UNSUPPORTED, BF16_NEXT,
                        "bf16: this processor has neither avx512_bf16 nor amx_bf16, or oneDNN was told not to use them "
                        "(its instruction set mask is 0x%x)",
                        (unsigned)isa);
    }
    be->matmul = "onednn-bf16";
    be->weights_floats = weights_floats;
    be->upload_weights = upload_weights;
    be->linear = linear;
    be->linear_backward = linear_backward;
    return open_engine(be->ctx, &cpu->bf16, err);
}

void kvq_bf16_destroy(const kvq_context *ctx, kvq_bf16 **bf16) {
    if (*bf16 == NULL) return;
    for (product *p = (*bf16)->products, *next; p != NULL; p = next) {
        next = p->next;
        destroy_product(ctx, p);
    }
    for (scratch *s = (*bf16)->idle, *next; s != NULL; s = next) {
        next = s->next;
        destroy_scratch(ctx, s);
    }
    if ((*bf16)->engine != NULL) (void)dnnl_engine_destroy((*bf16)->engine);
    (void)pthread_mutex_destroy(&(*bf16)->lock);
    kvq_free(ctx, *bf16);
    *bf16 = NULL;
}

#else // no oneDNN, or one whose interface this file does not speak

kvq_status kvq_use_bf16(cpu_backend *cpu, kvq_error *err) {
    (void)cpu;
    return kvq_fail(err, KVQ_ERR_UNSUPPORTED, BF16_NEXT ", or build kvq with oneDNN 2 (-DKVQ_MATMUL=onednn)",
                    "bf16: this build of kvq has no matrix products for it");
}

void kvq_bf16_destroy(const kvq_context *ctx, kvq_bf16 **bf16) { (void)ctx, (void)bf16; }
#endif
