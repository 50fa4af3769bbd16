/* The part of ONNX Runtime's C ABI that an operator library needs.
 *
 * The Python wheel carries no headers. The OrtApi table is append-only, so a function is known by
 * its slot; tests run it against the oldest and the newest version that pyproject.toml admits.
 * Version 17 of the table is the first with all the slots below (KernelContext_ParallelFor came
 * last).
 */
#ifndef BAPQ_ORT_ABI_H
#define BAPQ_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_API_VERSION = 17 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShapeInfo OrtShapeInfo;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtEnv OrtEnv;
typedef struct OrtMemoryInfo OrtMemoryInfo;

typedef struct {
    void *slot[275];
} OrtApi;

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_INT64 = 7 };
enum { ORT_MEMORY_DEFAULT = 0 };
enum { ORT_DEVICE_ALLOCATOR = 0 };
enum { ORT_LOG_FATAL = 4 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

/* What tensors are allocated with, up to the members of version 17. */
typedef struct OrtAllocator OrtAllocator;
struct OrtAllocator {
    uint32_t version;
    void *(*Alloc)(OrtAllocator *, size_t);
    void (*Free)(OrtAllocator *, void *);
    const OrtMemoryInfo *(*Info)(const OrtAllocator *);
};

/* Each macro gives the function at its slot, typed. */
#define ORT_FUNCTION(api, slot_, result, ...) ((result(*)(__VA_ARGS__))(api)->slot[slot_])
#define ORT_CreateStatus(api) ORT_FUNCTION(api, 0, OrtStatus *, int, const char *)
#define ORT_CreateEnv(api) ORT_FUNCTION(api, 3, OrtStatus *, int, const char *, OrtEnv **)
#define ORT_CreateCustomOpDomain(api) \
    ORT_FUNCTION(api, 26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define ORT_CustomOpDomain_Add(api) \
    ORT_FUNCTION(api, 27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)
#define ORT_AddCustomOpDomain(api) \
    ORT_FUNCTION(api, 28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define ORT_GetTensorMutableData(api) ORT_FUNCTION(api, 51, OrtStatus *, OrtValue *, void **)
#define ORT_GetTensorElementType(api) \
    ORT_FUNCTION(api, 60, OrtStatus *, const OrtShapeInfo *, int *)
#define ORT_GetDimensionsCount(api) \
    ORT_FUNCTION(api, 61, OrtStatus *, const OrtShapeInfo *, size_t *)
#define ORT_GetDimensions(api) \
    ORT_FUNCTION(api, 62, OrtStatus *, const OrtShapeInfo *, int64_t *, size_t)
#define ORT_GetTensorTypeAndShape(api) \
    ORT_FUNCTION(api, 65, OrtStatus *, const OrtValue *, OrtShapeInfo **)
#define ORT_CreateCpuMemoryInfo(api) ORT_FUNCTION(api, 69, OrtStatus *, int, int, OrtMemoryInfo **)
#define ORT_GetAllocatorWithDefaultOptions(api) ORT_FUNCTION(api, 78, OrtStatus *, OrtAllocator **)
#define ORT_KernelInfoGetAttribute_float(api) \
    ORT_FUNCTION(api, 85, OrtStatus *, const OrtKernelInfo *, const char *, float *)
#define ORT_KernelInfoGetAttribute_int64(api) \
    ORT_FUNCTION(api, 86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define ORT_KernelContext_GetInput(api) \
    ORT_FUNCTION(api, 90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define ORT_KernelContext_GetOutput(api)                                                    \
    ORT_FUNCTION(api, 91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, \
                 OrtValue **)
#define ORT_ReleaseStatus(api) ORT_FUNCTION(api, 93, void, OrtStatus *)
#define ORT_ReleaseShapeInfo(api) ORT_FUNCTION(api, 99, void, OrtShapeInfo *)
#define ORT_ReleaseCustomOpDomain(api) ORT_FUNCTION(api, 101, void, OrtCustomOpDomain *)
#define ORT_RegisterAllocator(api) ORT_FUNCTION(api, 176, OrtStatus *, OrtEnv *, OrtAllocator *)
#define ORT_KernelContext_ParallelFor(api)                                                  \
    ORT_FUNCTION(api, 274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), \
                 size_t, size_t, void *)

/* The callbacks of one operator, up to the members of version 17. */
typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *,
                                 void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
};

#endif
