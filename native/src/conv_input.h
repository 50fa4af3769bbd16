/* One sample of a convolution's input, quantized: int8, channels last, one scale and zero point. */
#ifndef BAPQ_CONV_INPUT_H
#define BAPQ_CONV_INPUT_H

#include "work.h"

typedef struct {
    int8_t *q; /* (height, width, channels): x = scale * (q - zero_point) */
    float scale;
    int32_t zero_point; /* the code of 0, also of the padding: -127..127 */
    int32_t finite;     /* 0: the sample holds NaN or infinity, and q is unset */
} bapq_conv_input;

/* Scratch that bapq_conv_input_quantize needs besides q for a sample of so many values, in bytes.
 */
int64_t bapq_conv_input_scratch(int64_t values);

/* x: (channels, height, width). The range is [min(x, 0), max(x, 0)] in 254 steps, rounded half to
 * even; so a sample without negative values, as after Relu, uses all codes from -127 to 127. */
void bapq_conv_input_quantize(const float *x, int64_t channels, int64_t height, int64_t width,
                              const bapq_parallel *parallel, void *scratch, bapq_conv_input *input);

#endif
