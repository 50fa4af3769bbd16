/* Depthwise convolution: every output channel has one input channel, and one small kernel. On float
 * activations: each value meets a few weights only, so making it an integer and moving it to
 * another layout would cost more than the products (docs/decisions/0022-depthwise.md). A worker
 * decodes the weights of a tile, then goes through its channels. The input is copied in bands of
 * rows, padded with zeros, so that no window is a special case and the kernels see one layout for
 * all strides. */
#include "depthwise.h"

#include <string.h>

#include "error.h"
#include "work.h"

enum { BAND_BYTES = 16 << 10 }; /* half of the smallest first-level cache */

/* Buffers of one worker. */
typedef struct {
    float *weight; /* (16, row_weights) */
    float *band;   /* (band_rows, row_floats) */
    /* What the band holds: a small input serves all outputs of its channel. */
    const float *of_channel; /* NULL: nothing yet */
    int64_t of_row;
} worker_buffers;

/* Columns i, i + stride, i + 2 * stride, ... of a padded row: which of them are the input's. */
typedef struct {
    int64_t first, count; /* in the phase */
    int64_t column;       /* of the input, where the first one is */
} columns;

typedef struct {
    const bapq_kernels *kernels;
    const bapq_conv *conv;
    const bapq_epilogue *epilogue;
    const bapq_layer *layer;
    const float *x;          /* (batch, channels, height, width) */
    float *y;                /* (batch, rows, out_h, out_w) */
    int64_t row_weights;     /* taps, up to a multiple of 4 */
    int64_t span_h;          /* input rows under a window */
    int64_t phases;          /* parts that a row of a band is cut into */
    int64_t phase_floats;    /* of each */
    int64_t output_rows;     /* of a band, at most */
    int64_t band_rows;       /* of the input under them */
    columns *columns;        /* (phases,) */
    ptrdiff_t *tap;          /* (kernel_w,), see bapq_windows */
    worker_buffers *buffers; /* (threads,) */
    bapq_chunk_view view;
} depthwise_job;

/* ---- weights ---- */

/* Codes of tap k of all rows. */
static inline void codes_of(int32_t level, const bapq_tile *tile, int32_t k,
                            int32_t code[BAPQ_TILE_ROWS]) {
    int nibbles = level == BAPQ_L8 || level == BAPQ_L4;
    ptrdiff_t at = (ptrdiff_t)(nibbles ? k / 2 : k / 8) * BAPQ_TILE_ROWS;
    const uint8_t *first = tile->code[0] + at;
    int32_t shift = nibbles ? k % 2 * 4 : k % 8, mask = nibbles ? 15 : 1;
    int32_t factor = level == BAPQ_L8 ? tile->residual_steps : 2;
    for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++) code[r] = first[r] >> shift & mask;
    if (level == BAPQ_L4 || level == BAPQ_L1) return;
    const uint8_t *second = tile->code[1] + at;
    for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++)
        code[r] = factor * code[r] + (second[r] >> shift & mask);
}

/* The tile's weights, a row after the other. */
static void decode_weights(const depthwise_job *j, const bapq_tile *tile, float *weight) {
    int32_t level = j->view.level;
    float zero = bapq_zero_of(level, tile->residual_steps);
    float part = level == BAPQ_L8 ? 1.0f / (float)tile->residual_steps : 1.0f;
    for (int32_t k = 0; k < j->layer->columns; k++) {
        float value[BAPQ_TILE_ROWS];
        if (level == BAPQ_L32) {
            memcpy(value, tile->code[0] + (int64_t)k * (int64_t)sizeof value, sizeof value);
        } else {
            const uint16_t *scale =
                tile->scale + k / BAPQ_BLOCK / tile->scale_blocks * BAPQ_TILE_ROWS;
            int32_t code[BAPQ_TILE_ROWS];
            uint32_t bits[BAPQ_TILE_ROWS];
            float d[BAPQ_TILE_ROWS];
            codes_of(level, tile, k, code);
            for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++) bits[r] = (uint32_t)scale[r] << 16;
            memcpy(d, bits, sizeof d);
            for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++)
                value[r] = d[r] * part * ((float)code[r] - zero);
        }
        for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++) weight[r * j->row_weights + k] = value[r];
    }
}

/* ---- input ---- */

/* Not inlined, so that the compiler has registers for what its loops need. */
__attribute__((noinline)) static void fill_values(const float *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) memcpy(to + i, from + i, 8 * sizeof *to);
    if (i + 4 <= count) memcpy(to + i, from + i, 4 * sizeof *to);
    if (count >= 4) { /* what is left, and some again */
        memcpy(to + count - 4, from + count - 4, 4 * sizeof *to);
        return;
    }
    for (; i < count; i++) to[i] = from[i];
}

/* Each phase takes every stride-th value. */
__attribute__((noinline)) static void fill_phases(const depthwise_job *j, const float *x,
                                                  int64_t stride, float *to) {
    const columns *own = j->columns;
    int64_t done = 0;
    if (stride == 2 && j->phases == 2) { /* one begins at column 0, the other at column 1 */
        int even = own[0].column == 0 ? 0 : 1;
        float *evens = to + even * j->phase_floats + own[even].first;
        float *odds = to + !even * j->phase_floats + own[!even].first;
        int64_t both = own[0].count < own[1].count ? own[0].count : own[1].count;
        for (; done < both && both >= 4; done += 4) {
            done = done + 4 > both ? both - 4 : done; /* what is left of both, and some again */
            bapq_float4 parts[2];
            bapq_part4(x + 2 * done, &parts[0], &parts[1]);
            memcpy(evens + done, &parts[0], sizeof parts[0]);
            memcpy(odds + done, &parts[1], sizeof parts[1]);
        }
    }
    for (int64_t i = 0; i < j->phases; i++, to += j->phase_floats) {
        const float *from = x + own[i].column;
        for (int64_t k = done; k < own[i].count; k++) {
            to[own[i].first + k] = from[k * stride];
            __asm__ volatile(""); /* a vector loop for so few would cost more before it begins */
        }
    }
}

/* The input under output rows [first, first + rows) of a channel. Columns of the padding stay as
 * they are, zero. */
static void fill_band(const depthwise_job *j, worker_buffers *buffers, const float *channel,
                      int64_t first, int64_t rows) {
    if (buffers->of_channel == channel && buffers->of_row == first) return;
    buffers->of_channel = channel;
    buffers->of_row = first;
    const bapq_conv *conv = j->conv;
    const columns own = j->columns[0];
    int64_t y = first * conv->p.stride_h - conv->p.pad_top;
    int64_t end = y + (rows - 1) * conv->p.stride_h + j->span_h;
    int64_t height = conv->height, width = conv->width, stride = conv->p.stride_w;
    int64_t row_floats = j->phases * j->phase_floats;
    for (float *to = buffers->band; y < end; y++, to += row_floats) {
        if (y < 0 || y >= height) {
            memset(to, 0, (size_t)row_floats * sizeof *to);
            continue;
        }
        const float *x = channel + y * width;
        if (stride == 1)
            fill_values(x + own.column, own.count, to + own.first);
        else
            fill_phases(j, x, stride, to);
    }
}

/* ---- product ---- */

static void convolve_channel(const depthwise_job *j, worker_buffers *buffers, const float *channel,
                             const float *weight, float bias, float *y) {
    const bapq_conv *conv = j->conv;
    ptrdiff_t row_floats = j->phases * j->phase_floats;
    for (int64_t first = 0; first < conv->out_h; first += j->output_rows) {
        int64_t rows = conv->out_h - first < j->output_rows ? conv->out_h - first : j->output_rows;
        fill_band(j, buffers, channel, first, rows);
        bapq_windows windows = {.x = buffers->band,
                                .tap = j->tap,
                                .kernel_row = conv->p.dilation_h * row_floats,
                                .output_row = conv->p.stride_h * row_floats,
                                .kernel_h = (int32_t)conv->p.kernel_h,
                                .kernel_w = (int32_t)conv->p.kernel_w,
                                .rows = (int32_t)rows,
                                .width = (int32_t)conv->out_w};
        j->kernels->depthwise(&windows, weight, bias, j->epilogue->clip_low, j->epilogue->clip_high,
                              y + first * conv->out_w);
    }
}

/* Some tiles of the chunk for one sample. */
static void convolve_item(void *data, int32_t worker, int64_t sample, int32_t first_tile,
                          int32_t end_tile) {
    const depthwise_job *j = data;
    const bapq_conv *conv = j->conv;
    worker_buffers *buffers = &j->buffers[worker];
    int64_t multiplier = j->layer->rows / conv->channels;
    for (int32_t t = first_tile; t < end_tile; t++) {
        const float *bias;
        bapq_tile tile = bapq_view_tile(&j->view, t, &bias);
        if (!j->epilogue->use_bias) bias = NULL;
        decode_weights(j, &tile, buffers->weight);
        int32_t row = t * BAPQ_TILE_ROWS;
        for (int32_t r = 0; r < BAPQ_TILE_ROWS && row + r < j->view.rows; r++) {
            int64_t output = bapq_output_row(j->layer, j->view.first_row + row + r);
            int64_t input = sample * conv->channels + output / multiplier;
            convolve_channel(j, buffers, j->x + input * conv->height * conv->width,
                             buffers->weight + r * j->row_weights, bias ? bias[r] : -0.0f,
                             j->y + (sample * j->layer->rows + output) * conv->out_h * conv->out_w);
        }
    }
}

/* Stored rows [first, first + count) are constants: `values`, or zeros where that is NULL. */
static void write_constants(const depthwise_job *j, const float *values, int32_t first,
                            int32_t count) {
    int64_t pixels = j->conv->out_h * j->conv->out_w;
    for (int64_t n = 0; n < j->conv->batch; n++)
        for (int32_t r = 0; r < count; r++) {
            int64_t output = n * j->layer->rows + bapq_output_row(j->layer, first + r);
            float value = bapq_clip(values ? values[r] : 0.0f, j->epilogue);
            for (int64_t i = 0; i < pixels; i++) j->y[output * pixels + i] = value;
        }
}

/* ---- run ---- */

static void plan_bands(depthwise_job *j) {
    const bapq_conv *conv = j->conv;
    const bapq_conv_params *p = &conv->p;
    int64_t span_h = j->span_h = (p->kernel_h - 1) * p->dilation_h + 1;
    int64_t span_w = (p->kernel_w - 1) * p->dilation_w + 1;
    j->phases = p->stride_w < span_w ? p->stride_w : span_w;
    int64_t width = conv->out_w < BAPQ_LANES ? BAPQ_LANES : conv->out_w;
    j->phase_floats = width + (span_w - 1) / p->stride_w;
    int64_t most = BAND_BYTES / (j->phases * j->phase_floats * (int64_t)sizeof(float));
    int64_t rows = most < span_h ? 1 : (most - span_h) / p->stride_h + 1;
    rows = rows > 4 ? rows & ~3 : rows; /* kernels take rows by fours */
    j->output_rows = rows < conv->out_h ? rows : conv->out_h;
    j->band_rows = (j->output_rows - 1) * p->stride_h + span_h;
}

static void carve_buffers(depthwise_job *j, int32_t threads, bapq_carver *carver) {
    int64_t band = j->band_rows * j->phases * j->phase_floats, weights = 16 * j->row_weights;
    worker_buffers none;
    j->buffers = bapq_carve(carver, threads * (int64_t)sizeof *j->buffers);
    j->columns = bapq_carve(carver, j->phases * (int64_t)sizeof *j->columns);
    j->tap = bapq_carve(carver, j->conv->p.kernel_w * (int64_t)sizeof *j->tap);
    for (int32_t i = 0; i < threads; i++) {
        worker_buffers *buffers = carver->base ? &j->buffers[i] : &none;
        buffers->of_channel = NULL;
        buffers->weight = bapq_carve(carver, weights * (int64_t)sizeof(float));
        buffers->band = bapq_carve(carver, band * (int64_t)sizeof(float));
        if (carver->base) memset(buffers->band, 0, (size_t)band * sizeof(float));
    }
}

static void place_columns(depthwise_job *j) {
    const bapq_conv_params *p = &j->conv->p;
    int64_t stride = p->stride_w;
    for (int64_t i = 0; i < j->phases; i++) {
        int64_t column = i - p->pad_left;
        int64_t first = column < 0 ? (-column + stride - 1) / stride : 0;
        int64_t end = (j->conv->width - column + stride - 1) / stride;
        end = end < j->phase_floats ? end : j->phase_floats;
        j->columns[i] = (columns){first, end > first ? end - first : 0, column + first * stride};
    }
    for (int64_t kx = 0; kx < p->kernel_w; kx++) {
        int64_t column = kx * p->dilation_w;
        j->tap[kx] = column % stride * j->phase_floats + column / stride;
    }
}

int32_t bapq_depthwise_run(bapq_run *run, int32_t layer, const bapq_conv *conv,
                           const bapq_epilogue *epilogue, const bapq_parallel *parallel,
                           const float *x, float *y, bapq_error *error) {
    const bapq_layer *l = bapq_run_layer(run, layer);
    depthwise_job j = {.kernels = bapq_run_kernels(run),
                       .conv = conv,
                       .epilogue = epilogue,
                       .layer = l,
                       .x = x,
                       .y = y,
                       .row_weights = (l->columns + 3) / 4 * 4};
    if (conv->batch == 0) return BAPQ_OK;
    plan_bands(&j);
    int32_t threads = bapq_run_threads(run);
    bapq_carver count = {0};
    carve_buffers(&j, threads, &count);
    bapq_carver carver = {.base = bapq_run_scratch(run, count.used)};
    if (!carver.base)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for %lld bytes of scratch",
                         (long long)count.used);
    carve_buffers(&j, threads, &carver);
    place_columns(&j);
    for (int32_t i = 0; i < bapq_chunk_count(l); i += j.view.chunks) {
        int32_t status = bapq_run_acquire(run, layer, i, &j.view, error);
        if (status != BAPQ_OK) return status;
        if (j.view.level == BAPQ_SKIP) {
            write_constants(&j, j.view.skip_values, j.view.first_row, j.view.rows);
        } else {
            bapq_work work = {.panels = conv->batch,
                              .tiles = bapq_ceil_div(j.view.rows, BAPQ_TILE_ROWS),
                              .item = convolve_item,
                              .data = &j};
            int64_t outputs = conv->batch * j.view.rows * conv->out_h * conv->out_w;
            bapq_work_run(&work, parallel, threads, outputs * l->columns);
        }
        bapq_run_release(run, &j.view);
    }
    write_constants(&j, epilogue->use_bias ? l->dropped_bias : NULL, l->stored_rows,
                    l->rows - l->stored_rows);
    return BAPQ_OK;
}
