/* Quantizing one sample of a convolution's input to int8. */
#include "conv_input.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Bits of the largest value >= 0, and of the largest magnitude of those below, if any is. */
typedef struct {
    int32_t high;
    uint32_t low;
} extent;

typedef struct {
    const float *x; /* (channels, pixels) */
    int64_t channels, pixels;
    extent *extents; /* (tasks,) */
    bapq_conv_input *input;
    float inverse, to_code;
    int clamps; /* whether the ends of the range, so rounded, leave -127..127 */
} job;

enum { EXTENT_VALUES = 4096 }; /* of a task that looks for the extent */

/* The largest bits of n values, as unsigned or as signed numbers; at least 0. */
#define DEFINE_LARGEST(name, type, lane)                                                           \
    static type name(const float *x, int64_t n) {                                                  \
        lane best[4] = {{0}};                                                                      \
        int64_t i = 0;                                                                             \
        for (; i + 16 <= n; i += 16)                                                               \
            for (int k = 0; k < 4; k++) {                                                          \
                lane bits = (lane)bapq_load4(x + i + 4 * k);                                       \
                best[k] = (lane)bapq_choose4((bapq_int4)(bits > best[k]), (bapq_int4)bits,         \
                                             (bapq_int4)best[k]);                                  \
            }                                                                                      \
        type most = 0;                                                                             \
        for (int k = 0; k < 16; k++) most = best[k / 4][k % 4] > most ? best[k / 4][k % 4] : most; \
        for (; i < n; i++) {                                                                       \
            type bits;                                                                             \
            memcpy(&bits, x + i, sizeof bits);                                                     \
            most = bits > most ? bits : most;                                                      \
        }                                                                                          \
        return most;                                                                               \
    }
typedef uint32_t uint4 __attribute__((vector_size(16)));
DEFINE_LARGEST(largest_unsigned, uint32_t, uint4)
DEFINE_LARGEST(largest_signed, int32_t, bapq_int4)

/* Floats >= 0 order like their bits, and those below like theirs without sign, from zero down. So
 * integer maxima, which vectorize without -ffast-math, find both ends; NaNs and infinities lie
 * beyond. The largest unsigned bits are those of the end below zero, if there is one: only then a
 * second look is due, for the end above. */
static void find_extent(void *data, size_t task) {
    job *j = data;
    int64_t first = (int64_t)task * EXTENT_VALUES, left = j->channels * j->pixels - first;
    int64_t n = left < EXTENT_VALUES ? left : EXTENT_VALUES;
    uint32_t low = largest_unsigned(j->x + first, n);
    j->extents[task] =
        (extent){low > INT32_MAX ? largest_signed(j->x + first, n) : (int32_t)low, low};
}

/* Bits of 1.5 * 2^23 plus a value's code: the sum's last bit is worth 1, so it rounds half to even.
 */
enum { ZERO = 0x4b400000 };

static inline int32_t bits_of(float x, float inverse, float to_code) {
    float sum = x * inverse + to_code;
    int32_t bits;
    memcpy(&bits, &sum, sizeof bits);
    return bits;
}

/* The same for four values. The code is the low byte; `clamp` keeps it within -127..127. */
INLINE bapq_int4 codes_at(const float *x, bapq_float4 inverse, bapq_float4 to_code, int clamp) {
    const bapq_int4 low = bapq_splat_int(ZERO - 127), high = bapq_splat_int(ZERO + 127);
    bapq_int4 bits = (bapq_int4)(bapq_load4(x) * inverse + to_code);
    if (!clamp) return bits;
    bits = bapq_choose4(bits < low, low, bits);
    return bapq_choose4(bits > high, high, bits);
}

/* The low bits of one, and the other above them. */
#ifdef __aarch64__
#define JOIN(low, high, bits) ((bapq_int4)vsliq_n_s32((int32x4_t)(low), (int32x4_t)(high), bits))
#else
#define JOIN(low, high, bits) (((low) & ((1 << (bits)) - 1)) | (high) << (bits))
#endif

/* Codes of four pixels and four channels: a word for every pixel. */
INLINE bapq_int4 words_at(const float *const x[4], int64_t i, bapq_float4 inverse,
                          bapq_float4 to_code, int clamp) {
    bapq_int4 code[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) code[k] = codes_at(x[k] + i, inverse, to_code, clamp);
    return JOIN(JOIN(code[0], code[1], 8), JOIN(code[2], code[3], 8), 16);
}

enum { LANES = 16 };                     /* channels at a time */
enum { STRIP = 64, TASK_CHANNELS = 64 }; /* pixels and channels of a task: whole cache lines */

static int64_t channel_tasks(const job *j) { return bapq_ceil_div(j->channels, TASK_CHANNELS); }

/* LANES channels from c on, of `pixels` pixels, a multiple of 4: the words of four pixels are
 * turned into pixels. */
INLINE void quantize_lanes(const job *j, int64_t first, int64_t pixels, int64_t c, int clamp) {
    const bapq_float4 inverse = bapq_splat(j->inverse), to_code = bapq_splat(j->to_code);
    const int64_t stride = j->channels;
    const float *x[LANES];
    for (int k = 0; k < LANES; k++) x[k] = j->x + (c + k) * j->pixels + first;
    int8_t *q = j->input->q + first * stride + c;
    for (int64_t i = 0; i < pixels; i += 4, q += 4 * stride) {
        bapq_float4 word[4]; /* turning moves bits, whatever they are */
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            word[k] = (bapq_float4)words_at(x + 4 * k, i, inverse, to_code, clamp);
        bapq_turn4(word);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) memcpy(q + k * stride, &word[k], LANES);
    }
}

/* The same for at most four channels. If there are no others, a word may reach into the pixel
 * behind it, which is written next. */
static void quantize_word(const job *j, int64_t first, int64_t pixels, int64_t c, int64_t lanes) {
    const bapq_float4 inverse = bapq_splat(j->inverse), to_code = bapq_splat(j->to_code);
    const int64_t stride = j->channels;
    const float *x[4];
    for (int64_t k = 0; k < 4; k++) x[k] = j->x + (c + (k < lanes ? k : 0)) * j->pixels + first;
    int8_t *q = j->input->q + first * stride + c;
    const int64_t whole = lanes == 4 ? pixels : stride < 4 ? pixels - 4 : 0;
    for (int64_t i = 0; i < pixels; i += 4) {
        bapq_int4 word = words_at(x, i, inverse, to_code, 1);
        if (i < whole) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++, q += stride) memcpy(q, (int8_t *)&word + 4 * k, 4);
            continue;
        }
        for (int k = 0; k < 4; k++, q += stride)
            for (int64_t lane = 0; lane < lanes; lane++) q[lane] = (int8_t)(word[k] >> 8 * lane);
    }
}

/* The last few pixels of a strip. */
static void quantize_rest(const job *j, int64_t first, int64_t pixels, int64_t c, int64_t end) {
    for (int64_t i = first; i < first + pixels; i++)
        for (int64_t channel = c; channel < end; channel++) {
            int32_t bits = bits_of(j->x[channel * j->pixels + i], j->inverse, j->to_code);
            bits = bits < ZERO - 127 ? ZERO - 127 : bits;
            bits = bits > ZERO + 127 ? ZERO + 127 : bits;
            j->input->q[i * j->channels + channel] = (int8_t)bits;
        }
}

static void quantize_strip(void *data, size_t task) {
    const job *j = data;
    int64_t first = (int64_t)task / channel_tasks(j) * STRIP;
    int64_t pixels = j->pixels - first < STRIP ? j->pixels - first : STRIP;
    const int64_t begin = (int64_t)task % channel_tasks(j) * TASK_CHANNELS;
    int64_t c = begin;
    int64_t end = j->channels - c < TASK_CHANNELS ? j->channels : c + TASK_CHANNELS;
    int64_t whole = pixels & ~3;
    for (; end - c >= LANES; c += LANES) {
        if (j->clamps)
            quantize_lanes(j, first, whole, c, 1);
        else
            quantize_lanes(j, first, whole, c, 0);
    }
    for (; c < end; c += 4) quantize_word(j, first, whole, c, end - c < 4 ? end - c : 4);
    quantize_rest(j, first + whole, pixels - whole, begin, end);
}

int64_t bapq_conv_input_scratch(int64_t values) {
    return bapq_ceil_div(values, EXTENT_VALUES) * (int64_t)sizeof(extent);
}

void bapq_conv_input_quantize(const float *x, int64_t channels, int64_t height, int64_t width,
                              const bapq_parallel *parallel, void *scratch,
                              bapq_conv_input *input) {
    job j = {x, channels, height * width, scratch, input, 0.0f, 0.0f, 0};
    size_t tasks = (size_t)bapq_ceil_div(channels * j.pixels, EXTENT_VALUES);
    parallel->for_each(parallel->self, find_extent, tasks, &j);
    extent all = {0, 0};
    for (size_t i = 0; i < tasks; i++) {
        all.high = j.extents[i].high > all.high ? j.extents[i].high : all.high;
        all.low = j.extents[i].low > all.low ? j.extents[i].low : all.low;
    }
    const int32_t infinity_bits = 0x7f800000;
    if (all.low <= INT32_MAX) all.low = 0; /* no sign: nothing is negative */
    input->finite = all.high < infinity_bits && (int32_t)(all.low & INT32_MAX) < infinity_bits;
    if (!input->finite) return;
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
    j.to_code = 12582912.0f + (float)input->zero_point;
    j.clamps = bits_of(low, j.inverse, j.to_code) < ZERO - 127 ||
               bits_of(high, j.inverse, j.to_code) > ZERO + 127;
    size_t strips = (size_t)bapq_ceil_div(j.pixels, STRIP);
    parallel->for_each(parallel->self, quantize_strip, strips * (size_t)channel_tasks(&j), &j);
}
