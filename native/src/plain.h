/* Operators that read no layer: what stands between layers, where ONNX Runtime takes several times
 * the instructions on ARM. The same bits on every CPU; a NaN stays NaN, and no zero has a sign. */
#ifndef BAPQ_PLAIN_H
#define BAPQ_PLAIN_H

#include "ops.h"

/* Maxima of windows: x (batch, channels, height, width) -> y (batch, channels, out_h, out_w). What
 * a window has of the padding counts nothing; if that is all, its maximum is -infinity. */
int32_t bapq_max_pool(bapq_run *run, const bapq_conv *pool, const bapq_parallel *parallel,
                      const float *x, float *y, bapq_error *error);

/* Of each of m rows: y = (x - mean) / sqrt(variance + epsilon) * scale + bias. x, y: (m, n);
 * scale, bias: (n,), and bias may be NULL. */
typedef struct {
    int64_t m, n;
    const float *x, *scale, *bias;
    float epsilon;
    float *y;
} bapq_normalization;

void bapq_normalize(const bapq_normalization *job, const bapq_parallel *parallel);

#endif
