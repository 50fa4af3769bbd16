/* Quantizing one sample of a convolution's input to int8. */
#include "conv_input.h"

#include <math.h>
#include <string.h>

/* Bits of the largest value >= 0, and of the largest magnitude of those below, if any is. */
typedef struct {
    int32_t high;
    uint32_t low;
} extent;

typedef struct {
    const float *x; /* (channels, pixels) */
    int64_t channels, pixels;
    extent *extents; /* (channels,) */
    bapq_conv_input *input;
    float inverse;
} job;

static void widen(extent *all, int32_t high, uint32_t low) {
    all->high = high > all->high ? high : all->high;
    all->low = low > all->low ? low : all->low;
}

/* Floats >= 0 order like their bits, and those below like theirs without sign, from zero down. So
 * integer maxima, which vectorize without -ffast-math, find both ends; NaNs and infinities lie
 * beyond. */
static void find_extent(void *data, size_t channel) {
    job *j = data;
    const float *x = j->x + (int64_t)channel * j->pixels;
    extent found = {0, 0};
    for (int64_t i = 0; i < j->pixels; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        widen(&found, bits, (uint32_t)bits);
    }
    j->extents[channel] = found;
}

/* The same of finite values only, where others were found. */
static void find_finite_extent(void *data, size_t channel) {
    job *j = data;
    const float *x = j->x + (int64_t)channel * j->pixels;
    extent found = {0, 0};
    for (int64_t i = 0; i < j->pixels; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        if (!bapq_is_spoiled(x[i])) widen(&found, bits, (uint32_t)bits);
    }
    j->extents[channel] = found;
}

static extent extent_of(job *j, const bapq_parallel *parallel,
                        void (*find)(void *data, size_t channel)) {
    parallel->for_each(parallel->self, find, (size_t)j->channels, j);
    extent all = {0, 0};
    for (int64_t c = 0; c < j->channels; c++) widen(&all, j->extents[c].high, j->extents[c].low);
    if (all.low <= INT32_MAX) all.low = 0; /* no sign: nothing is negative */
    return all;
}

/* A value's code, in the low byte. The sum's last bit is worth 1: it rounds half to even. */
static inline uint32_t code_of(float x, float inverse, float to_code) {
    enum { ZERO = 0x4b400000 }; /* bits of 1.5 * 2^23 */
    float sum = x * inverse + to_code;
    int32_t bits;
    memcpy(&bits, &sum, sizeof bits);
    bits = bits < ZERO - 127 ? ZERO - 127 : bits;
    bits = bits > ZERO + 127 ? ZERO + 127 : bits;
    return (uint32_t)bits & 255;
}

enum { STRIP = 64, LANES = 16 }; /* pixels and channels at a time */
enum { TASK_CHANNELS = 64 };     /* a whole cache line of every pixel */

static int64_t channel_tasks(const job *j) { return bapq_ceil_div(j->channels, TASK_CHANNELS); }

/* A strip of some channels: codes of four channels are put side by side in a word, then the words
 * go to their pixels. */
static void quantize_strip(void *data, size_t task) {
    const job *j = data;
    const float to_code = 12582912.0f + (float)j->input->zero_point;
    int64_t first = (int64_t)task / channel_tasks(j) * STRIP;
    int64_t width = j->pixels - first < STRIP ? j->pixels - first : STRIP;
    int64_t c = (int64_t)task % channel_tasks(j) * TASK_CHANNELS;
    int64_t end = j->channels - c < TASK_CHANNELS ? j->channels : c + TASK_CHANNELS;
    for (; c < end; c += LANES) {
        uint32_t word[LANES / 4][STRIP];
        int64_t lanes = end - c < LANES ? end - c : LANES;
        for (int64_t lane = 0; lane < lanes; lane += 4) {
            const float *x[4];
            for (int64_t k = 0; k < 4; k++) {
                int64_t channel = lane + k < lanes ? c + lane + k : c;
                x[k] = j->x + channel * j->pixels + first;
            }
            for (int64_t i = 0; i < width; i++)
                word[lane / 4][i] = code_of(x[0][i], j->inverse, to_code) |
                                    code_of(x[1][i], j->inverse, to_code) << 8 |
                                    code_of(x[2][i], j->inverse, to_code) << 16 |
                                    code_of(x[3][i], j->inverse, to_code) << 24;
        }
        const int64_t stride = j->channels;
        int8_t *q = j->input->q + first * stride + c;
        if (lanes == LANES) {
            for (int64_t i = 0; i < width; i++, q += stride)
                for (int64_t k = 0; k < LANES / 4; k++) memcpy(q + 4 * k, &word[k][i], 4);
        } else {
            for (int64_t i = 0; i < width; i++, q += stride)
                for (int64_t lane = 0; lane < lanes; lane++)
                    q[lane] = (int8_t)(word[lane / 4][i] >> lane % 4 * 8);
        }
    }
}

int64_t bapq_conv_input_scratch(int64_t channels) { return channels * (int64_t)sizeof(extent); }

void bapq_conv_input_quantize(const float *x, int64_t channels, int64_t height, int64_t width,
                              const bapq_parallel *parallel, void *scratch,
                              bapq_conv_input *input) {
    job j = {x, channels, height * width, scratch, input, 0.0f};
    extent all = extent_of(&j, parallel, find_extent);
    const int32_t infinity_bits = 0x7f800000;
    input->finite = all.high < infinity_bits && (int32_t)(all.low & INT32_MAX) < infinity_bits;
    if (!input->finite) all = extent_of(&j, parallel, find_finite_extent);
    float high, low;
    memcpy(&high, &all.high, sizeof high);
    memcpy(&low, &all.low, sizeof low);
    /* In double, so that neither a huge nor a subnormal range overflows on the way. */
    double range = (double)high - low;
    input->scale = (float)(range / 254.0);
    input->zero_point = -127;
    j.inverse = (float)(254.0 / range);
    if (input->scale == 0.0f ||
        !isfinite(j.inverse)) { /* all zero, or below what float32 can tell */
        input->scale = 0.0f;
        memset(input->q, input->zero_point, (size_t)(channels * height * width));
        return;
    }
    input->zero_point -= (int32_t)rint((double)low * j.inverse);
    size_t strips = (size_t)bapq_ceil_div(j.pixels, STRIP);
    parallel->for_each(parallel->self, quantize_strip, strips * (size_t)channel_tasks(&j), &j);
}
