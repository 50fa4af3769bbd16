/* The operator of depthwise convolutions: layers with one input channel per output row. */
#ifndef BAPQ_DEPTHWISE_H
#define BAPQ_DEPTHWISE_H

#include "ops.h"

int32_t bapq_depthwise_run(bapq_run *run, int32_t layer, const bapq_conv *conv,
                           const bapq_epilogue *epilogue, const bapq_parallel *parallel,
                           const float *x, float *y, bapq_error *error);

#endif
