/* The operators of domain "bapq" for ONNX Runtime: MatMul, Gemm, Conv, DepthwiseConv and Gather,
 * which read a layer; MaxPool and LayerNormalization, which do not.
 *
 * An operator holds no weights. Its second input, "bapq.run", is the ticket of the run it computes
 * for; everything else follows from that and from its attribute `layer`. So one session serves
 * concurrent runs on different plans, and swapping a plan touches no session. Of its store it knows
 * the number only: a graph is untrusted input, and a ticket of another store's run is refused. */
#include "ort_abi.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "depthwise.h"
#include "error.h"
#include "ops.h"
#include "plain.h"
#include "shapes.h"

typedef enum {
    MATMUL,
    GEMM,
    CONV,
    DEPTHWISE_CONV,
    GATHER,
    MAX_POOL,
    LAYER_NORMALIZATION,
    KINDS
} op_kind;

static bool takes_residual(op_kind kind) { return kind <= CONV; }

static bool reads_layer(op_kind kind) { return kind <= GATHER; }

static bool has_windows(op_kind kind) {
    return kind == CONV || kind == DEPTHWISE_CONV || kind == MAX_POOL;
}

typedef struct {
    OrtCustomOp callbacks; /* first: ORT hands back a pointer to it */
    op_kind kind;
} custom_op;

typedef struct {
    const OrtApi *api;
    op_kind kind;
    int64_t store_id; /* whose runs it computes for */
    int64_t layer;    /* -1: it reads none */
    bapq_epilogue epilogue;
    bapq_conv_params conv;
    float epsilon;
} op_kernel;

typedef struct {
    bapq_shape shape;
    void *data;
    bool there;
} tensor;

#define TRY(call)                            \
    do {                                     \
        OrtStatus *status_ = (call);         \
        if (status_ != NULL) return status_; \
    } while (0)

/* ---- attributes ---- */

static OrtStatus *read_ints(const OrtApi *api, const OrtKernelInfo *info, const char *const *names,
                            int64_t *const *targets, size_t count) {
    for (size_t i = 0; i < count; i++)
        TRY(ORT_KernelInfoGetAttribute_int64(api)(info, names[i], targets[i]));
    return NULL;
}

static OrtStatus *read_window(op_kernel *kernel, const OrtKernelInfo *info) {
    bapq_conv_params *p = &kernel->conv;
    static const char *const names[] = {"kernel_h",   "kernel_w",   "stride_h",   "stride_w",
                                        "pad_top",    "pad_left",   "pad_bottom", "pad_right",
                                        "dilation_h", "dilation_w", "auto_pad",   "group"};
    int64_t *const targets[] = {&p->kernel_h,   &p->kernel_w,   &p->stride_h,   &p->stride_w,
                                &p->pad_top,    &p->pad_left,   &p->pad_bottom, &p->pad_right,
                                &p->dilation_h, &p->dilation_w, &p->auto_pad,   &p->group};
    size_t count = sizeof names / sizeof *names;
    p->group = 1;
    return read_ints(kernel->api, info, names, targets,
                     kernel->kind == MAX_POOL ? count - 1 : count);
}

static OrtStatus *read_attributes(op_kernel *kernel, const OrtKernelInfo *info) {
    const OrtApi *api = kernel->api;
    kernel->layer = -1;
    if (kernel->kind == MAX_POOL) return read_window(kernel, info);
    if (kernel->kind == LAYER_NORMALIZATION)
        return ORT_KernelInfoGetAttribute_float(api)(info, "epsilon", &kernel->epsilon);
    TRY(ORT_KernelInfoGetAttribute_int64(api)(info, "layer", &kernel->layer));
    if (kernel->kind == GATHER) return NULL;
    int64_t use_bias, function;
    TRY(ORT_KernelInfoGetAttribute_int64(api)(info, "use_bias", &use_bias));
    bapq_epilogue *epilogue = &kernel->epilogue;
    epilogue->use_bias = use_bias != 0;
    TRY(ORT_KernelInfoGetAttribute_float(api)(info, "clip_low", &epilogue->clip_low));
    TRY(ORT_KernelInfoGetAttribute_float(api)(info, "clip_high", &epilogue->clip_high));
    /* Attributes hold no infinities: the ends of float32 stand for no clip, and infinity passes. */
    if (epilogue->clip_low <= -FLT_MAX) epilogue->clip_low = -INFINITY;
    if (epilogue->clip_high >= FLT_MAX) epilogue->clip_high = INFINITY;
    epilogue->clip_low += 0.0f; /* a zero without sign, as all outputs have */
    epilogue->clip_high += 0.0f;
    TRY(ORT_KernelInfoGetAttribute_int64(api)(info, "function", &function));
    if (isnan(epilogue->clip_low) || isnan(epilogue->clip_high) || function < 0 ||
        function >= BAPQ_FUNCTIONS || (function && kernel->kind == DEPTHWISE_CONV))
        return ORT_CreateStatus(api)(ORT_INVALID_ARGUMENT,
                                     "bapq: an operator's clip or function is none that there is");
    epilogue->function = (bapq_function)function;
    return has_windows(kernel->kind) ? read_window(kernel, info) : NULL;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                                void **out) {
    op_kernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return ORT_CreateStatus(api)(ORT_FAIL, "bapq: no memory for an operator");
    kernel->api = api;
    kernel->kind = ((const custom_op *)op)->kind;
    kernel->store_id = bapq_operators_store_id();
    OrtStatus *status = read_attributes(kernel, info);
    if (status != NULL) {
        free(kernel);
        return status;
    }
    *out = kernel;
    return NULL;
}

static void destroy_kernel(void *kernel) { free(kernel); }

/* ---- tensors ---- */

/* Takes a dense tensor of this element type, or none, where the graph gives none; anything else
 * that a graph may hand over is refused. */
static OrtStatus *get_input(const op_kernel *kernel, OrtKernelContext *context, size_t index,
                            int type, tensor *out) {
    const OrtApi *api = kernel->api;
    const OrtValue *value = NULL;
    OrtShapeInfo *info = NULL;
    int found = 0;
    *out = (tensor){.there = false};
    TRY(ORT_KernelContext_GetInput(api)(context, index, &value));
    if (value == NULL) return NULL;
    out->there = true;
    TRY(ORT_GetTensorTypeAndShape(api)(value, &info));
    bapq_shape *shape = &out->shape;
    OrtStatus *status = ORT_GetTensorElementType(api)(info, &found);
    if (status == NULL && found != type)
        status = ORT_CreateStatus(api)(ORT_INVALID_ARGUMENT, "bapq: an input of another type");
    if (status == NULL) status = ORT_GetDimensionsCount(api)(info, &shape->rank);
    if (status == NULL && shape->rank > BAPQ_MAX_RANK)
        status = ORT_CreateStatus(api)(ORT_INVALID_ARGUMENT, "bapq: more than 16 dimensions");
    if (status == NULL) status = ORT_GetDimensions(api)(info, shape->dims, shape->rank);
    ORT_ReleaseShapeInfo(api)(info);
    if (status != NULL) return status;
    return ORT_GetTensorMutableData(api)((OrtValue *)value, &out->data);
}

/* The run that the ticket names: an open one of the store that the operator was made for. */
static OrtStatus *get_run(const op_kernel *kernel, OrtKernelContext *context, bapq_run **run) {
    tensor ticket;
    TRY(get_input(kernel, context, 1, ORT_INT64, &ticket));
    *run = NULL;
    if (ticket.shape.rank == 0 && ticket.data != NULL)
        *run = bapq_run_of(*(const int64_t *)ticket.data);
    bool fits = *run != NULL && bapq_run_store_id(*run) == kernel->store_id;
    if (fits && reads_layer(kernel->kind))
        fits = kernel->layer >= 0 && kernel->layer < bapq_run_layer_count(*run);
    if (!fits)
        return ORT_CreateStatus(kernel->api)(ORT_INVALID_ARGUMENT,
                                             "bapq.run is no open run of this bank");
    return NULL;
}

static OrtStatus *make_output(const op_kernel *kernel, OrtKernelContext *context,
                              const bapq_shape *shape, float **data) {
    OrtValue *value = NULL;
    TRY(ORT_KernelContext_GetOutput(kernel->api)(context, 0, shape->dims, shape->rank, &value));
    return ORT_GetTensorMutableData(kernel->api)(value, (void **)data);
}

/* ---- compute ---- */

typedef struct {
    const OrtApi *api;
    const OrtKernelContext *context;
} ort_parallel;

static void ort_for_each(void *self, void (*task)(void *, size_t), size_t count, void *data) {
    const ort_parallel *p = self;
    OrtStatus *status = ORT_KernelContext_ParallelFor(p->api)(p->context, task, count, 0, data);
    if (status != NULL) { /* ORT refused before it started any: do the work here */
        ORT_ReleaseStatus(p->api)(status);
        for (size_t i = 0; i < count; i++) task(data, i);
    }
}

/* What one call computes with, and how it went. */
typedef struct {
    const op_kernel *kernel;
    OrtKernelContext *context;
    bapq_run *run;
    const bapq_layer *layer;
    tensor x, residual;
    bapq_epilogue epilogue;
    int32_t status;
    bapq_error failure; /* unless status is BAPQ_OK */
} call;

/* Makes the output, and checks what is added to it. */
static OrtStatus *begin(call *c, const bapq_shape *y_shape, float **y) {
    c->epilogue = c->kernel->epilogue;
    if (c->residual.there) {
        c->status = bapq_residual_shape(&c->residual.shape, y_shape, &c->failure);
        if (c->status != BAPQ_OK) return NULL;
        c->epilogue.residual = c->residual.data;
    }
    return make_output(c->kernel, c->context, y_shape, y);
}

static OrtStatus *compute_matmul(call *c, const bapq_parallel *parallel) {
    bapq_shape y_shape;
    int64_t m;
    float *y;
    c->status = bapq_matmul_shape(c->layer, c->kernel->kind == GEMM, &c->x.shape, &m, &y_shape,
                                  &c->failure);
    if (c->status != BAPQ_OK) return NULL;
    TRY(begin(c, &y_shape, &y));
    if (c->status != BAPQ_OK) return NULL;
    c->status = bapq_matmul(c->run, (int32_t)c->kernel->layer, &c->epilogue, parallel, m, c->x.data,
                            y, &c->failure);
    return NULL;
}

static OrtStatus *compute_conv(call *c, const bapq_parallel *parallel) {
    int depthwise = c->kernel->kind == DEPTHWISE_CONV;
    bapq_shape y_shape;
    bapq_conv conv;
    float *y;
    c->status =
        bapq_conv_shape(c->layer, &c->kernel->conv, &c->x.shape, &conv, &y_shape, &c->failure);
    if (c->status != BAPQ_OK) return NULL;
    TRY(begin(c, &y_shape, &y));
    if (c->status != BAPQ_OK) return NULL;
    c->status = (depthwise ? bapq_depthwise_run : bapq_conv_run)(c->run, (int32_t)c->kernel->layer,
                                                                 &conv, &c->epilogue, parallel,
                                                                 c->x.data, y, &c->failure);
    return NULL;
}

static OrtStatus *compute_gather(call *c) {
    bapq_shape y_shape;
    int64_t count;
    float *y;
    c->status = bapq_gather_shape(c->layer, &c->x.shape, &count, &y_shape, &c->failure);
    if (c->status != BAPQ_OK) return NULL;
    TRY(make_output(c->kernel, c->context, &y_shape, &y));
    c->status = bapq_gather(c->run, (int32_t)c->kernel->layer, count, c->x.data, y, &c->failure);
    return NULL;
}

static OrtStatus *compute_max_pool(call *c, const bapq_parallel *parallel) {
    bapq_shape y_shape;
    bapq_conv pool;
    float *y;
    c->status = bapq_pool_shape(&c->kernel->conv, &c->x.shape, &pool, &y_shape, &c->failure);
    if (c->status != BAPQ_OK) return NULL;
    TRY(make_output(c->kernel, c->context, &y_shape, &y));
    c->status = bapq_max_pool(c->run, &pool, parallel, c->x.data, y, &c->failure);
    return NULL;
}

static OrtStatus *compute_normalization(call *c, const bapq_parallel *parallel) {
    tensor scale, bias;
    bapq_normalization job = {.epsilon = c->kernel->epsilon, .n = 1};
    TRY(get_input(c->kernel, c->context, 2, ORT_FLOAT, &scale));
    TRY(get_input(c->kernel, c->context, 3, ORT_FLOAT, &bias));
    if (!scale.there)
        return ORT_CreateStatus(c->kernel->api)(ORT_INVALID_ARGUMENT, "bapq: an input is missing");
    c->status = bapq_normalization_shape(&c->x.shape, &scale.shape, bias.there ? &bias.shape : NULL,
                                         &job.m, &c->failure);
    if (c->status != BAPQ_OK) return NULL;
    TRY(make_output(c->kernel, c->context, &c->x.shape, &job.y));
    job.n = c->x.shape.dims[c->x.shape.rank - 1];
    job.x = c->x.data;
    job.scale = scale.data;
    job.bias = bias.there ? bias.data : NULL;
    bapq_normalize(&job, parallel);
    return NULL;
}

static OrtStatus *compute_of_layer(call *c, const bapq_parallel *parallel) {
    op_kind kind = c->kernel->kind;
    if (takes_residual(kind)) TRY(get_input(c->kernel, c->context, 2, ORT_FLOAT, &c->residual));
    c->layer = bapq_run_layer(c->run, (int32_t)c->kernel->layer);
    if (c->layer->depthwise != (kind == DEPTHWISE_CONV)) {
        c->status = bapq_fail(&c->failure, BAPQ_ARGUMENT, "%s",
                              "only DepthwiseConv reads a depthwise layer, and it reads no other");
        return NULL;
    }
    if (has_windows(kind)) return compute_conv(c, parallel);
    return kind == GATHER ? compute_gather(c) : compute_matmul(c, parallel);
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
    const op_kernel *kernel = state;
    call c = {.kernel = kernel, .context = context};
    TRY(get_run(kernel, context, &c.run));
    TRY(get_input(kernel, context, 0, kernel->kind == GATHER ? ORT_INT64 : ORT_FLOAT, &c.x));
    if (!c.x.there)
        return ORT_CreateStatus(kernel->api)(ORT_INVALID_ARGUMENT, "bapq: an input is missing");
    ort_parallel pool = {kernel->api, context};
    bapq_parallel parallel = {ort_for_each, &pool};
    c.failure.layer = -1;
    if (kernel->kind == MAX_POOL)
        TRY(compute_max_pool(&c, &parallel));
    else if (kernel->kind == LAYER_NORMALIZATION)
        TRY(compute_normalization(&c, &parallel));
    else
        TRY(compute_of_layer(&c, &parallel));
    if (c.status == BAPQ_OK) return NULL;
    if (c.failure.layer < 0) c.failure.layer = (int32_t)kernel->layer;
    bapq_run_fail(c.run, &c.failure);
    return ORT_CreateStatus(kernel->api)(ORT_FAIL, c.failure.message);
}

/* ---- registration ---- */

static const char *const NAMES[KINDS] = {
    "MatMul", "Gemm", "Conv", "DepthwiseConv", "Gather", "MaxPool", "LayerNormalization"};

static const char *get_name(const OrtCustomOp *op) { return NAMES[((const custom_op *)op)->kind]; }
static const char *get_provider(const OrtCustomOp *op) {
    (void)op;
    return NULL; /* the CPU */
}
static int get_input_type(const OrtCustomOp *op, size_t index) {
    int ids = ((const custom_op *)op)->kind == GATHER;
    return index == 1 || ids ? ORT_INT64 : ORT_FLOAT;
}
static size_t get_input_count(const OrtCustomOp *op) {
    op_kind kind = ((const custom_op *)op)->kind;
    return kind == LAYER_NORMALIZATION ? 4 : takes_residual(kind) ? 3 : 2;
}
static int get_output_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_FLOAT;
}
static size_t get_output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}
static int get_input_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index >= 2 ? ORT_OPTIONAL : ORT_REQUIRED;
}
static int get_output_characteristic(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_REQUIRED;
}
static int get_memory_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_MEMORY_DEFAULT;
}
static int get_one(const OrtCustomOp *op) {
    (void)op;
    return 1;
}
static int get_last_version(const OrtCustomOp *op) {
    (void)op;
    return INT_MAX;
}

static custom_op ops[KINDS];
static OrtCustomOpDomain *domain;
static pthread_mutex_t domain_lock = PTHREAD_MUTEX_INITIALIZER;

/* Called with domain_lock held. The domain lives as long as the process: sessions refer to it. */
static OrtStatus *make_domain(const OrtApi *api) {
    OrtCustomOpDomain *made = NULL;
    TRY(ORT_CreateCustomOpDomain(api)("bapq", &made));
    for (int kind = 0; kind < KINDS; kind++) {
        ops[kind].kind = (op_kind)kind;
        ops[kind].callbacks = (OrtCustomOp){.version = ORT_API_VERSION,
                                            .GetName = get_name,
                                            .GetExecutionProviderType = get_provider,
                                            .GetInputType = get_input_type,
                                            .GetInputTypeCount = get_input_count,
                                            .GetOutputType = get_output_type,
                                            .GetOutputTypeCount = get_output_count,
                                            .KernelDestroy = destroy_kernel,
                                            .GetInputCharacteristic = get_input_characteristic,
                                            .GetOutputCharacteristic = get_output_characteristic,
                                            .GetInputMemoryType = get_memory_type,
                                            .GetVariadicInputMinArity = get_one,
                                            .GetVariadicInputHomogeneity = get_one,
                                            .GetVariadicOutputMinArity = get_one,
                                            .GetVariadicOutputHomogeneity = get_one,
                                            .CreateKernelV2 = create_kernel,
                                            .KernelComputeV2 = compute,
                                            .GetStartVersion = get_one,
                                            .GetEndVersion = get_last_version};
        OrtStatus *status = ORT_CustomOpDomain_Add(api)(made, &ops[kind].callbacks);
        if (status != NULL) {
            ORT_ReleaseCustomOpDomain(api)(made);
            return status;
        }
    }
    domain = made;
    return NULL;
}

/* ---- allocation ---- */

/* ONNX Runtime's own: what the arena has no room for, it finds or refuses by an exception, which
 * passes through our frames (hence -fexceptions in CMakeLists.txt). ONNX Runtime does not look
 * whether an allocator gave NULL. */
static OrtAllocator *fallback;

static void *allocate(OrtAllocator *self, size_t bytes) {
    (void)self;
    void *memory = bapq_arena_take(bytes);
    return memory ? memory : fallback->Alloc(fallback, bytes);
}
static void deallocate(OrtAllocator *self, void *memory) {
    (void)self;
    if (!bapq_arena_give(memory)) fallback->Free(fallback, memory);
}
static OrtMemoryInfo *memory_info;
static const OrtMemoryInfo *get_memory_info(const OrtAllocator *self) {
    (void)self;
    return memory_info;
}
static OrtAllocator allocator = {ORT_API_VERSION, allocate, deallocate, get_memory_info};

/* For sessions that ask for what the environment has. Called with domain_lock held. */
static OrtStatus *register_arena(const OrtApi *api) {
    OrtEnv *env = NULL;
    TRY(ORT_GetAllocatorWithDefaultOptions(api)(&fallback)); /* lives as long as the process */
    TRY(ORT_CreateEnv(api)(ORT_LOG_FATAL, "bapq",
                           &env)); /* one more hold on the only one there is */
    if (memory_info == NULL)
        TRY(ORT_CreateCpuMemoryInfo(api)(ORT_DEVICE_ALLOCATOR, ORT_MEMORY_DEFAULT, &memory_info));
    return ORT_RegisterAllocator(api)(env, &allocator);
}

/* Where ONNX Runtime refuses, or Python's environment is another one, sessions keep their own. */
static void offer_arena(const OrtApi *api) {
    static bool tried;
    OrtStatus *status = tried || !bapq_arena_open() ? NULL : register_arena(api);
    tried = true;
    if (status != NULL) ORT_ReleaseStatus(api)(status);
}

/* The entry that SessionOptions.register_custom_ops_library looks up. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (api == NULL) {
        const OrtApi *oldest = base->GetApi(1);
        return ORT_CreateStatus(oldest)(ORT_FAIL, "bapq needs ONNX Runtime 1.17 or newer");
    }
    pthread_mutex_lock(&domain_lock);
    OrtStatus *status = domain == NULL ? make_domain(api) : NULL;
    if (status == NULL) offer_arena(api);
    pthread_mutex_unlock(&domain_lock);
    if (status != NULL) return status;
    return ORT_AddCustomOpDomain(api)(options, domain);
}
