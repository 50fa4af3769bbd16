/* Quantizing one sample of a convolution's input to int8. */
#include "conv_input.h"

#include <math.h>
#include <string.h>

typedef struct {
    int32_t low, high; /* ordered keys */
    int32_t amax;      /* bits of the largest absolute value */
} extent;

typedef struct {
    const float *x;
    int64_t channels, height, width;
    extent *extents; /* (channels,) */
    bapq_conv_input *input;
    float inverse;
} job;

/* Floats in the order of integers, so that min and max reduce in vectors without -ffast-math. */
static inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); }

static float from_ordered(int32_t key) {
    int32_t bits = ordered(key);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void find_extent(void *data, size_t channel) {
    job *j = data;
    const float *x = j->x + (int64_t)channel * j->height * j->width;
    int32_t low = 0, high = 0, amax = 0;
    for (int64_t i = 0; i < j->height * j->width; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        int32_t key = ordered(bits), magnitude = bits & INT32_MAX;
        low = key < low ? key : low;
        high = key > high ? key : high;
        amax = magnitude > amax ? magnitude : amax;
    }
    j->extents[channel] = (extent){low, high, amax};
}

enum { STRIP = 64, LANES = 16 };

/* One row of pixels: quantized a strip of one channel at a time, then turned channels last. */
static void quantize_row(void *data, size_t row) {
    job *j = data;
    const bapq_conv_input *input = j->input;
    const float to_even = 12582912.0f; /* 1.5 * 2^23: adding it rounds half to even */
    int8_t strip[LANES][STRIP];
    float zero_point = (float)input->zero_point;
    for (int64_t w = 0; w < j->width; w += STRIP) {
        int64_t width = j->width - w < STRIP ? j->width - w : STRIP;
        for (int64_t c = 0; c < j->channels; c += LANES) {
            int64_t lanes = j->channels - c < LANES ? j->channels - c : LANES;
            for (int64_t lane = 0; lane < lanes; lane++) {
                const float *x = j->x + ((c + lane) * j->height + (int64_t)row) * j->width + w;
                for (int64_t i = 0; i < width; i++) {
                    float v = (x[i] * j->inverse + to_even) - to_even + zero_point;
                    strip[lane][i] = (int8_t)(int32_t)(v < 127.0f ? v : 127.0f);
                }
            }
            int8_t *q = input->q + ((int64_t)row * j->width + w) * j->channels + c;
            for (int64_t i = 0; i < width; i++, q += j->channels)
                for (int64_t lane = 0; lane < lanes; lane++) q[lane] = strip[lane][i];
        }
    }
}

int64_t bapq_conv_input_scratch(int64_t channels) { return channels * (int64_t)sizeof(extent); }

void bapq_conv_input_quantize(const float *x, int64_t channels, int64_t height, int64_t width,
                              const bapq_parallel *parallel, void *scratch,
                              bapq_conv_input *input) {
    job j = {x, channels, height, width, scratch, input, 0.0f};
    parallel->for_each(parallel->self, find_extent, (size_t)channels, &j);
    extent all = {0, 0, 0};
    for (int64_t c = 0; c < channels; c++) {
        all.low = j.extents[c].low < all.low ? j.extents[c].low : all.low;
        all.high = j.extents[c].high > all.high ? j.extents[c].high : all.high;
        all.amax = j.extents[c].amax > all.amax ? j.extents[c].amax : all.amax;
    }
    /* In double, so that neither a huge nor a subnormal range overflows on the way. */
    double low = from_ordered(all.low), range = from_ordered(all.high) - low;
    input->finite = all.amax < 0x7F800000;
    input->scale = (float)(range / 255.0);
    input->zero_point = -128;
    j.inverse = (float)(255.0 / range);
    if (!input->finite) return;
    if (input->scale == 0.0f ||
        !isfinite(j.inverse)) { /* all zero, or below what float32 can tell */
        input->scale = 0.0f;
        memset(input->q, input->zero_point, (size_t)(channels * height * width));
        return;
    }
    input->zero_point -= (int32_t)rint(low * j.inverse);
    parallel->for_each(parallel->self, quantize_row, (size_t)height, &j);
}
