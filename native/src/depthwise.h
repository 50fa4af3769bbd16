/* The operator of depthwise convolutions: layers with one input channel per output row. */
#ifndef BAPQ_DEPTHWISE_H
#define BAPQ_DEPTHWISE_H

#include "ops.h"

/* As bapq_conv_shape, for a layer whose codes are laid out for this operator. */
int32_t bapq_depthwise_shape(const bapq_layer *layer, const bapq_conv_params *params, int64_t batch,
                             int64_t channels, int64_t height, int64_t width, bapq_conv *out,
                             bapq_error *error);
int32_t bapq_depthwise_run(bapq_run *run, int32_t layer, const bapq_conv *conv,
                           const bapq_epilogue *epilogue, const bapq_parallel *parallel,
                           const float *x, float *y, bapq_error *error);

#endif
