/* Every shape and attribute that an operator is given, checked before anything is computed from it.
 *
 * A graph is untrusted input: its attributes may be any 64-bit numbers. What passes here is small
 * enough that no sum or product of it in the operators can overflow: attributes are at most 2^20,
 * axes and pixels of an image fit 32 bits, a tensor has at most 2^40 elements, and a product takes
 * at most 2^62 multiply-adds. Only these functions look at shapes, and all operators begin here. */
#ifndef BAPQ_SHAPES_H
#define BAPQ_SHAPES_H

#include <stddef.h>

#include "ops.h"

enum { BAPQ_MAX_RANK = 16 };

typedef struct {
    int64_t dims[BAPQ_MAX_RANK];
    size_t rank;
} bapq_shape;

/* Each takes the input's shape and gives the output's; BAPQ_ARGUMENT where they do not fit the
 * layer. */
/* x (..., columns) -> y (..., rows); `m`: rows of x. Gemm's input must be a matrix. */
int32_t bapq_matmul_shape(const bapq_layer *layer, int gemm, const bapq_shape *x, int64_t *m,
                          bapq_shape *y, bapq_error *error);
/* x (batch, channels, height, width), or (batch, channels, width), which is an image of height 1;
 * depthwise layers and others.
 * `conv`: the same in words, with the pads resolved. */
int32_t bapq_conv_shape(const bapq_layer *layer, const bapq_conv_params *params,
                        const bapq_shape *x, bapq_conv *conv, bapq_shape *y, bapq_error *error);
/* The same of windows that hold no weights, on every channel by itself. */
int32_t bapq_pool_shape(const bapq_conv_params *params, const bapq_shape *x, bapq_conv *pool,
                        bapq_shape *y, bapq_error *error);
/* x (..., n) -> y the same; `scale` and, unless it is NULL, `bias` are (n,), and n is not 0; `m`:
 * rows of x. */
int32_t bapq_normalization_shape(const bapq_shape *x, const bapq_shape *scale,
                                 const bapq_shape *bias, int64_t *m, bapq_error *error);
/* What is added to the output has its shape. */
int32_t bapq_residual_shape(const bapq_shape *residual, const bapq_shape *y, bapq_error *error);
/* x: indices; y: as x, with one more axis; `count`: indices in all. */
int32_t bapq_gather_shape(const bapq_layer *layer, const bapq_shape *x, int64_t *count,
                          bapq_shape *y, bapq_error *error);

#endif
