/* The operators, independent of the graph engine that calls them. All tensors are float32, dense
 * and row-major. Each function acquires the layer's chunks one after another, in row order, and
 * lets go of each before it takes the next: a chunk is needed only while it is computed on. Rows
 * that are skipped or dropped are constants, whatever the input. */
#ifndef BAPQ_OPS_H
#define BAPQ_OPS_H

#include <stddef.h>
#include <stdint.h>

#include "store.h"

/* How an operator spreads its work: calls task(data, i) for i in [0, count), on several threads. */
typedef struct {
    void (*for_each)(void *self, void (*task)(void *data, size_t i), size_t count, void *data);
    void *self;
} bapq_parallel;

/* y = min(max(function(product + bias) + residual, clip_low), clip_high); a NaN stays NaN, and no
 * zero has a sign. Of a row that a plan skips, its constant stands for what the function gives. */
typedef struct {
    int32_t use_bias;
    bapq_function function;
    const float *residual; /* of y's shape; NULL is none */
    float clip_low;
    float clip_high;
} bapq_epilogue;

/* x: (m, columns), y: (m, rows). */
int32_t bapq_matmul(bapq_run *run, int32_t layer, const bapq_epilogue *epilogue,
                    const bapq_parallel *parallel, int64_t m, const float *x, float *y,
                    bapq_error *error);

enum { BAPQ_PAD_EXPLICIT, BAPQ_PAD_SAME_UPPER, BAPQ_PAD_SAME_LOWER };

typedef struct {
    int64_t group;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t pad_top, pad_left, pad_bottom, pad_right;
    int64_t dilation_h, dilation_w;
    int64_t auto_pad;
} bapq_conv_params;

/* A convolution with its shapes: x (batch, channels, height, width) -> y (batch, rows, out_h,
 * out_w). */
typedef struct {
    bapq_conv_params p; /* pads resolved */
    int64_t batch, channels, height, width;
    int64_t out_h, out_w;
} bapq_conv;

int32_t bapq_conv_run(bapq_run *run, int32_t layer, const bapq_conv *conv,
                      const bapq_epilogue *epilogue, const bapq_parallel *parallel, const float *x,
                      float *y, bapq_error *error);

/* indices: (count,), -rows <= i < rows; y: (count, columns). */
int32_t bapq_gather(bapq_run *run, int32_t layer, int64_t count, const int64_t *indices, float *y,
                    bapq_error *error);

#endif
