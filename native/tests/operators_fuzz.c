/* The operators on hostile graphs, for the sanitizers: ONNX Runtime's part is played by a few
 * functions here, so attributes, shapes, types, missing inputs and tickets are what no real graph
 * dares, and every tensor ends where its memory ends. A case answers or refuses; it must not
 * crash, read or write beyond a tensor, or overflow.
 *
 * Usage: operators_fuzz DIRECTORY CASES [SEED]
 * With -DBAPQ_LIBFUZZER the cases come from libFuzzer, and DIRECTORY from BAPQ_FUZZ_DIRECTORY. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crc32.h"
#include "ops.h"
#include "ort_abi.h"
#include "store.h"

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

/* ---- ONNX Runtime ---- */

enum { MOST_OUTPUT = 1 << 20 }; /* elements: beyond it the allocator refuses */

struct OrtStatus {
    char message[300];
};
struct OrtValue {
    int type;
    size_t rank;
    int64_t dims[20];
    void *data;
    bool no_tensor;
};
struct OrtKernelContext {
    OrtValue *input[4];
    OrtValue output;
};
struct OrtKernelInfo {
    int64_t layer, use_bias, function;
    float clip_low, clip_high, epsilon;
    bapq_conv_params conv;
};

static OrtStatus *make_status(int code, const char *message) {
    (void)code;
    OrtStatus *status = malloc(sizeof *status);
    snprintf(status->message, sizeof status->message, "%s", message);
    return status;
}
static void release_status(OrtStatus *status) { free(status); }

static OrtStatus *get_int(const OrtKernelInfo *info, const char *name, int64_t *out) {
    const bapq_conv_params *p = &info->conv;
    const struct {
        const char *name;
        int64_t value;
    } known[] = {
        {"layer", info->layer},        {"function", info->function},  {"use_bias", info->use_bias},
        {"group", p->group},           {"kernel_h", p->kernel_h},     {"kernel_w", p->kernel_w},
        {"stride_h", p->stride_h},     {"stride_w", p->stride_w},     {"pad_top", p->pad_top},
        {"pad_left", p->pad_left},     {"pad_bottom", p->pad_bottom}, {"pad_right", p->pad_right},
        {"dilation_h", p->dilation_h}, {"dilation_w", p->dilation_w}, {"auto_pad", p->auto_pad}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(known[i].name, name) == 0) {
            *out = known[i].value;
            return NULL;
        }
    return make_status(ORT_FAIL, name);
}
static OrtStatus *get_float(const OrtKernelInfo *info, const char *name, float *out) {
    *out = strcmp(name, "epsilon") == 0    ? info->epsilon
           : strcmp(name, "clip_low") == 0 ? info->clip_low
                                           : info->clip_high;
    return NULL;
}
static OrtStatus *get_input(OrtKernelContext *context, size_t index, const OrtValue **out) {
    *out = context->input[index];
    return NULL;
}
static OrtStatus *get_output(OrtKernelContext *context, size_t index, const int64_t *dims,
                             size_t rank, OrtValue **out) {
    (void)index;
    size_t elements = 1;
    for (size_t i = 0; i < rank; i++) {
        if (dims[i] < 0) return make_status(ORT_FAIL, "a negative axis");
        if (__builtin_mul_overflow(elements, (size_t)dims[i], &elements))
            return make_status(ORT_FAIL, "the output's size overflows");
    }
    if (elements > MOST_OUTPUT) return make_status(ORT_FAIL, "no memory for the output");
    context->output.data = malloc(elements * sizeof(float)); /* not a byte more */
    *out = &context->output;
    return NULL;
}
static OrtStatus *get_info(const OrtValue *value, OrtShapeInfo **out) {
    if (value->no_tensor) return make_status(ORT_FAIL, "no tensor");
    *out = (OrtShapeInfo *)value;
    return NULL;
}
static void release_info(OrtShapeInfo *info) { (void)info; }
static OrtStatus *get_type(const OrtShapeInfo *info, int *type) {
    *type = ((const OrtValue *)info)->type;
    return NULL;
}
static OrtStatus *get_rank(const OrtShapeInfo *info, size_t *rank) {
    *rank = ((const OrtValue *)info)->rank;
    return NULL;
}
static OrtStatus *get_dims(const OrtShapeInfo *info, int64_t *dims, size_t count) {
    memcpy(dims, ((const OrtValue *)info)->dims, count * sizeof *dims);
    return NULL;
}
static OrtStatus *get_data(OrtValue *value, void **data) {
    *data = value->data;
    return NULL;
}
static OrtStatus *parallel_for(const OrtKernelContext *context, void (*task)(void *, size_t),
                               size_t count, size_t batch, void *data) {
    (void)context, (void)batch;
    for (size_t i = 0; i < count; i++) task(data, i);
    return NULL;
}

static const OrtCustomOp *operators[8];
static int operator_count;

static OrtStatus *make_domain(const char *name, OrtCustomOpDomain **out) {
    (void)name;
    static int domain;
    *out = (OrtCustomOpDomain *)&domain;
    return NULL;
}
static OrtStatus *add_operator(OrtCustomOpDomain *domain, const OrtCustomOp *op) {
    (void)domain;
    operators[operator_count++] = op;
    return NULL;
}
static OrtStatus *add_domain(OrtSessionOptions *options, OrtCustomOpDomain *domain) {
    (void)options, (void)domain;
    return NULL;
}
static OrtStatus *no_allocator(OrtAllocator **out) {
    *out = NULL;
    return make_status(ORT_FAIL, "tensors stand outside the arena here, each in its own memory");
}

/* The slots of ort_abi.h. */
static OrtApi api = {.slot = {[0] = (void *)make_status,
                              [26] = (void *)make_domain,
                              [27] = (void *)add_operator,
                              [28] = (void *)add_domain,
                              [51] = (void *)get_data,
                              [60] = (void *)get_type,
                              [61] = (void *)get_rank,
                              [62] = (void *)get_dims,
                              [65] = (void *)get_info,
                              [78] = (void *)no_allocator,
                              [85] = (void *)get_float,
                              [86] = (void *)get_int,
                              [90] = (void *)get_input,
                              [91] = (void *)get_output,
                              [93] = (void *)release_status,
                              [99] = (void *)release_info,
                              [274] = (void *)parallel_for}};
static const OrtApi *get_api(uint32_t version) {
    (void)version;
    return &api;
}

/* ---- two banks ---- */

enum { ALL = (1 << BAPQ_LEVELS) - 1, CHUNKS_MOST = 32 };
enum { MATMUL, GEMM, CONV, DEPTHWISE, GATHER, POOL, NORMALIZATION, KINDS };
static const int32_t row_order[] = {3, 1, 0, 2, 5, 4, 7, 6, 15, 9, 10, 11, 12, 13, 14, 8};
/* rows, stored_rows, columns, chunk_rows, first_chunk, residual_steps, has_bias, gathered,
 * depthwise, read_by_row, levels, scale_columns, row_order, dropped_bias */
static bapq_layer layers[] = {
    {24, 24, 72, 16, 0, 15, 1, 0, 0, 0, ALL, {0, 0, 32, 64, 32}, NULL, NULL},
    {40, 40, 37, 16, 0, 8, 0, 0, 0, 0, ALL, {0, 0, 64, 32, 32}, NULL, NULL},
    {33, 33, 40, 16, 0, 15, 0, 1, 0, 1, ALL, {0, 0, 32, 32, 32}, NULL, NULL},
    {16, 16, 64, 16, 0, 9, 1, 0, 0, 0, ALL, {0, 0, 32, 32, 64}, row_order, NULL},
    {24, 24, 9, 16, 0, 16, 1, 0, 0, 0, ALL, {0, 0, 32, 32, 32}, NULL, NULL},
    {24, 24, 9, 16, 0, 16, 1, 0, 1, 0, ALL, {0, 0, 32, 32, 32}, NULL, NULL}};
enum { LAYERS = sizeof layers / sizeof *layers };
/* A window and groups that fit each layer as a convolution: channels, group, kernel_h, kernel_w. */
static const int64_t windows[LAYERS][4] = {{8, 1, 3, 3},  {37, 1, 1, 1},  {40, 1, 1, 1},
                                           {64, 1, 1, 1}, {24, 24, 3, 3}, {12, 12, 3, 3}};

static bapq_extent extents[BAPQ_PLANES][CHUNKS_MOST];
static char paths[BAPQ_PLANES][4096];
static int32_t chunk_count;
static bapq_store *stores[2]; /* that of the graph, and another session's */

static uint64_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 24;
}

static void fail(const char *what, const char *why) {
    printf("operators_fuzz: FAILED: %s: %s\n", what, why);
    exit(1);
}

static void write_planes(const char *directory) {
    uint64_t state = 5;
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        snprintf(paths[p], sizeof paths[p], "%s/%s.bin", directory, bapq_plane_name(p));
        FILE *file = fopen(paths[p], "wb");
        if (!file) fail(paths[p], "cannot be written");
        uint64_t offset = 0;
        chunk_count = 0;
        for (int32_t l = 0; l < LAYERS; l++) {
            layers[l].first_chunk = chunk_count;
            for (int32_t i = 0; i < bapq_chunk_count(&layers[l]); i++, chunk_count++) {
                int32_t rows = layers[l].stored_rows - i * layers[l].chunk_rows;
                rows = rows < layers[l].chunk_rows ? rows : layers[l].chunk_rows;
                int64_t bytes =
                    bapq_ceil_div(rows, BAPQ_TILE_ROWS) * bapq_record_bytes(&layers[l], p);
                uint8_t *content = malloc((size_t)bytes);
                for (int64_t b = 0; b < bytes; b++) content[b] = (uint8_t)next_random(&state);
                extents[p][chunk_count] =
                    (bapq_extent){offset, (uint32_t)bytes, bapq_crc32(content, (size_t)bytes)};
                if (fwrite(content, 1, (size_t)bytes, file) != (size_t)bytes)
                    fail(paths[p], "cannot be written");
                offset += (uint64_t)bytes;
                free(content);
            }
        }
        fclose(file);
    }
}

static void open_stores(const char *directory) {
    write_planes(directory);
    bapq_bank bank = {
        .layers = layers, .layer_count = LAYERS, .chunk_count = chunk_count, .row_cache_slots = 4};
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        bank.plane_path[p] = paths[p];
        bank.extents[p] = extents[p];
    }
    bapq_error error = {0};
    for (int32_t i = 0; i < 2; i++)
        if (bapq_store_open(&bank, &stores[i], &error) != BAPQ_OK) fail("open", error.message);
    if (RegisterCustomOps(NULL, &(OrtApiBase){get_api, NULL}) != NULL) fail("register", "refused");
}

static void publish(bapq_store *store, uint8_t bits) {
    uint8_t level[CHUNKS_MOST], pinned[CHUNKS_MOST];
    memset(level, bits, sizeof level);
    memset(pinned, 1, sizeof pinned);
    bapq_plan_request request = {.levels = level,
                                 .pinned = pinned,
                                 .region = -1,
                                 .home_limit_bytes = INT64_MAX / 2,
                                 .threads = 3};
    bapq_error error = {0};
    if (bapq_store_publish(store, &request, &error) != BAPQ_OK) fail("publish", error.message);
}

/* ---- one case ---- */

typedef struct {
    const uint8_t *data;
    size_t left;
} bytes;

static uint32_t take(bytes *b, uint32_t below) {
    uint32_t value = 0;
    for (int i = 0; i < 2 && b->left > 0; i++, b->left--) value = value << 8 | *b->data++;
    return value % below;
}

/* Numbers at which arithmetic goes wrong. */
static int64_t wicked(bytes *b) {
    static const int64_t values[] = {
        0,   -1,   INT64_MIN, INT64_MAX, INT32_MAX, INT32_MIN, 1LL << 32, (1LL << 32) + 1,
        300, 5000, 1 << 20,   1 << 21,   1LL << 31, 1LL << 62, 65536,     7,
        5,   3,    2,         1};
    int64_t value = values[take(b, sizeof values / sizeof *values)];
    return take(b, 4) == 0 ? (int64_t)((uint64_t)value + take(b, 5) - 2) : value;
}

/* The number whose product with an odd one is 1 modulo 2^64. */
static uint64_t inverse(uint64_t odd) {
    uint64_t x = odd;
    for (int i = 0; i < 6; i++) x *= 2 - odd * x;
    return x;
}

static void fill_value(OrtValue *value, bytes *b, int kind) {
    size_t elements = 1;
    for (size_t i = 0; i < value->rank; i++) elements *= (size_t)value->dims[i];
    bool wide = value->type == ORT_INT64;
    value->data = elements ? malloc(elements * (wide ? 8 : 4)) : NULL; /* not a byte more */
    uint64_t state = take(b, 65536);
    for (size_t i = 0; i < elements; i++) {
        int64_t number = (int64_t)(next_random(&state) % 33);
        if (kind == GATHER && next_random(&state) % 16 == 0) number = wicked(b);
        float real = (float)((double)(next_random(&state) % 2000) / 1000 - 1);
        if (next_random(&state) % 4096 == 0) real = 1.0f / 0.0f;
        if (wide)
            ((int64_t *)value->data)[i] = number;
        else
            ((float *)value->data)[i] = real;
    }
}

static int64_t answered, refused;

static void run_case(bytes *b) {
    static const uint8_t bits[] = {32, 8, 4, 2, 1};
    int kind = (int)take(b, KINDS);
    int32_t layer = (int32_t)take(b, LAYERS);
    if (kind == DEPTHWISE && take(b, 4)) layer = LAYERS - 1;
    const int64_t *w = windows[layer];
    OrtKernelInfo info = {.layer = layer,
                          .use_bias = take(b, 2),
                          .function = take(b, 4) ? 0 : take(b, 6) - 1,
                          .clip_low = -3e38f,
                          .clip_high = take(b, 4) ? 3e38f : 0.0f / 0.0f,
                          .conv = {w[1], w[2], w[3], 1, 1, 1, 1, 1, 1, 1, 1, 0}};
    OrtValue x = {.type = kind == GATHER ? ORT_INT64 : ORT_FLOAT},
             ticket_value = {.type = ORT_INT64};
    if (kind == CONV || kind == DEPTHWISE || kind == POOL) {
        int flat = take(b, 4) == 0;
        int64_t image[] = {1 + take(b, 2), w[0], 1 + take(b, 12), 1 + take(b, 12)};
        x.rank = flat ? 3 : 4;
        memcpy(x.dims, image, sizeof image);
        if (flat && take(b, 2)) {
            info.conv.kernel_h = 1;
            info.conv.pad_top = info.conv.pad_bottom = 0;
        }
    } else {
        x.rank = kind == GEMM ? 2 : 1 + take(b, 3);
        for (size_t i = 0; i < x.rank; i++) x.dims[i] = 1 + take(b, 6);
        if (kind != GATHER) x.dims[x.rank - 1] = layers[layer].columns;
    }
    int64_t *numbers[] = {
        &info.conv.group,     &info.conv.kernel_h,   &info.conv.kernel_w,   &info.conv.stride_h,
        &info.conv.stride_w,  &info.conv.pad_top,    &info.conv.pad_left,   &info.conv.pad_bottom,
        &info.conv.pad_right, &info.conv.dilation_h, &info.conv.dilation_w, &info.conv.auto_pad,
        &info.layer};
    for (uint32_t n = take(b, 4); n > 0; n--) *numbers[take(b, 13)] = wicked(b);
    if (take(b, 8) == 0) { /* a window whose area wraps around to the right one */
        info.conv.kernel_h = (int64_t)(next_random(&(uint64_t){take(b, 65536)}) | 1);
        info.conv.kernel_w =
            (int64_t)((uint64_t)(w[2] * w[3]) * inverse((uint64_t)info.conv.kernel_h));
    }
    switch (take(b, 16)) {
        case 0:
            x.dims[take(b, 4)] = 0;
            break;
        case 1:
            x.rank = take(b, 19);
            break;
        case 2:
            x.type = x.type == ORT_INT64 ? ORT_FLOAT : ORT_INT64;
            break;
        case 3:
            x.no_tensor = true;
            break;
    }
    for (size_t i = 0; i < x.rank; i++) /* as far as a real tensor could be so long */
        if (x.dims[i] == 0 && i >= 4) x.dims[i] = 1;
    fill_value(&x, b, kind);
    for (int i = 0; i < 2; i++) publish(stores[i], bits[take(b, 5)]);
    int64_t tickets[2] = {0};
    bapq_error error = {0};
    for (int i = 0; i < 2; i++)
        if (bapq_run_begin(stores[i], 0, &tickets[i], &error) != BAPQ_OK)
            fail("begin", error.message);
    int64_t ticket = tickets[0];
    bool forged = false;
    ticket_value.data = &ticket;
    OrtValue residual = {.type = take(b, 8) ? ORT_FLOAT : ORT_INT64, .rank = x.rank};
    memcpy(residual.dims, x.dims, sizeof x.dims);
    if (kind <= DEPTHWISE && x.rank > 0)
        residual.dims[kind <= GEMM ? x.rank - 1 : 1] = layers[layer].rows;
    if (kind == NORMALIZATION) { /* its scale and bias, mostly as long as a row */
        residual.rank = take(b, 8) ? 1 : 2;
        residual.dims[0] = take(b, 8) && x.rank > 0 ? x.dims[x.rank - 1] : 1 + take(b, 9);
        residual.dims[1] = 1;
    }
    size_t residual_elements = 1;
    for (size_t i = 0; i < residual.rank; i++) residual_elements *= (size_t)residual.dims[i];
    residual.data = residual_elements ? calloc(residual_elements, 8) : NULL;
    OrtValue *third = take(b, 2) || kind == NORMALIZATION ? &residual : NULL;
    OrtKernelContext context = {.input = {&x, &ticket_value, third, take(b, 2) ? third : NULL}};
    switch (take(b, 24)) {
        case 0:
            ticket = tickets[1], forged = true;
            break; /* another session's */
        case 1:
            ticket = wicked(b), forged = true;
            break;
        case 2:
            ticket_value.data = NULL, ticket_value.rank = 1, forged = true;
            break;
        case 3:
            ticket_value.rank = 2, ticket_value.dims[0] = ticket_value.dims[1] = 1;
            break;
        case 4:
            ticket_value.type = ORT_FLOAT, forged = true;
            break;
        case 5:
            context.input[1] = NULL, forged = true;
            break;
        case 6:
            context.input[0] = NULL;
            break;
        case 7:
            ticket_value.no_tensor = true, forged = true;
            break;
    }
    void *kernel = NULL;
    bapq_store_owns_operators(stores[0]);
    OrtStatus *status = operators[kind]->CreateKernelV2(operators[kind], &api, &info, &kernel);
    bapq_store_owns_operators(NULL);
    if (status == NULL) {
        status = operators[kind]->KernelComputeV2(kernel, &context);
        operators[kind]->KernelDestroy(kernel);
    }
    if (status == NULL && forged) fail("a forged ticket", "was accepted");
    *(status == NULL ? &answered : &refused) += 1;
    release_status(status);
    for (int i = 0; i < 2; i++) {
        bapq_run_report report;
        bapq_run_end(tickets[i], &report, &error);
    }
    free(x.data);
    free(residual.data);
    free(context.output.data);
}

#ifdef BAPQ_LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!stores[0]) open_stores(getenv("BAPQ_FUZZ_DIRECTORY"));
    run_case(&(bytes){data, size});
    return 0;
}
#else
int main(int argc, char **argv) {
    if (argc < 3) fail("usage", "operators_fuzz DIRECTORY CASES [SEED]");
    open_stores(argv[1]);
    uint64_t state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    for (long left = strtol(argv[2], NULL, 10); left > 0; left--) {
        uint8_t data[96];
        for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)next_random(&state);
        run_case(&(bytes){data, sizeof data});
    }
    bapq_error error = {0};
    for (int i = 0; i < 2; i++)
        if (bapq_store_close(stores[i], &error) != BAPQ_OK) fail("close", error.message);
    printf("operators_fuzz: %lld answered, %lld refused, 0 failed\n", (long long)answered,
           (long long)refused);
    return 0;
}
#endif
